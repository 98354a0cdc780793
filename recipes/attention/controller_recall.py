"""Does the attention of a question's last queries point at the needle? Largest weight of any head against their mean.

    python recipes/attention/controller_recall.py --data FOLDER [--length 2048] [--samples 4] [--seed 44]

Reads needle prompts with everything kept, takes the last 16 queries but one and all keys of four layers of SmolLM2-135M
(what `ShortKeys` watches, in full precision) and ranks the tokens outside the first 4 and the last 64. Prints the share
of the needle's tokens among the best 32, for each way to sum up and each width over which neighbours share.
"""

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

import longfit
from longfit.attention import AttentionPatch, Scene
from longfit.attention.controller import ShortKeys
from longfit.eval import needle

SINKS, RECENT, BEST, QUERIES, DECAY = 4, 64, 32, 16, 0.95
POOLS = (1, 7, 15, 31)


class Recorder(AttentionPatch):
    """Full attention that notes what the watched layers were given last."""

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        if ShortKeys().watches(scene.layer, scene.layers):
            keys = scene.keys if scene.stored_keys is None else torch.cat([scene.stored_keys, scene.keys], 2)
            self.noted[scene.layer] = scene.queries[0, :, -QUERIES - 1 : -1].float(), keys[0, :, :-1].float()
        return scene.full()


def weights(queries: Tensor, keys: Tensor) -> Tensor:
    """Softmax weights [H, W, n] of the last queries [H, W, D] on keys [G, n, D]."""
    n, W = keys.shape[1], queries.shape[1]
    logits = queries @ keys.repeat_interleave(queries.shape[0] // keys.shape[0], 0).mT * queries.shape[-1] ** -0.5
    later = torch.arange(n) > torch.arange(n - W, n)[:, None]
    return logits.masked_fill(later, float("-inf")).softmax(-1)


def found(importance: Tensor, span: tuple[int, int], pool: int) -> float:
    """The share of the needle among the best."""
    shared = avg_pool1d(importance[None], pool, 1, pool // 2, count_include_pad=False)[0]
    shared[:SINKS] = shared[-RECENT:] = -1
    best = shared.topk(BEST).indices
    return int(((best >= span[0]) & (best < span[1])).sum()) / (span[1] - span[0])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    for name, default in (("length", 2048), ("samples", 4), ("seed", 44)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    model, tokenizer = longfit.load("smollm2-135m", dtype=torch.float32)
    task, shares = needle.TASKS["niah_single"], dict[Any, list[float]]()
    for sample in task.samples(tokenizer, length=asked.length, n=asked.samples, seed=asked.seed, data=asked.data):
        fitted = longfit.wrap(model, attention=Recorder(), chunk_tokens=512)
        noted = fitted.longfit.patch.noted = {}
        fitted(torch.tensor([sample.prompt_ids]), use_cache=True, logits_to_keep=1)
        paid = torch.stack([weights(*layer) for layer in noted.values()])  # [layers, H, W, n]
        ages = DECAY ** torch.arange(QUERIES - 1, -1, -1.0)
        sums = {"mean": paid.mean((0, 1, 2)), "largest": (paid * ages[:, None]).amax((0, 1, 2))}
        for name, importance in sums.items():
            for pool in POOLS:
                shares.setdefault((name, pool), []).append(found(importance, sample.details["needle_tokens"][0], pool))
    for (name, pool), each in shares.items():
        print(f"{name:>8} over {pool:>2}: {sum(each) / len(each):.2f}", [round(share, 2) for share in each])


if __name__ == "__main__":
    main()
