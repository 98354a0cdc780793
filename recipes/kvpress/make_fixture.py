"""Record which tokens kvpress keeps, so that longfit's tests can compare without kvpress installed.

    bash recipes/kvpress/setup.sh
    .venv-kvpress/bin/python recipes/kvpress/make_fixture.py tiny
    .venv-kvpress/bin/python recipes/kvpress/make_fixture.py smollm2 --model FOLDER    # a transformers folder

Writes to tests/fixtures/kvpress/: `<name>.npz` (packed bits), `<name>.json` (versions, settings) and, for
the tiny model, its weights. Everything is float32, batch 1, one forward over the whole input.
"""

import argparse
import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import kvpress
import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "kvpress"
KEEP_RATIOS = (0.5, 0.25)
RELATIVE_TIE = 1e-4
QUESTION_TOKENS = 24
TINY = {
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 96,
    "intermediate_size": 192,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
}


class ByteTokenizer:
    """Stands in for the tokenizer that KVzip asks for its replay prompt: UTF-8 bytes as ids."""

    chat_template = None

    def encode(self, text: str, return_tensors: str = "pt", add_special_tokens: bool = False) -> torch.Tensor:
        return torch.tensor([list(text.encode())])


@dataclass
class Case:
    """One press at one ratio: `settings` are its options under kvpress's names."""

    name: str
    press: object
    settings: dict
    attention: str = "sdpa"


def build_cases(compression_ratio: float, window: int, lag: int, beta: int) -> list[Case]:
    """The presses both projects have, with options equal to those longfit's tests use."""
    ratio = {"compression_ratio": compression_ratio}
    snap = {"window_size": window, "kernel_size": 5}
    finch = kvpress.FinchPress(**ratio)
    # Raw ids: -1 is never met, so the hook that looks for the delimiter leaves this window alone.
    finch.delimiter_token_id, finch.window_size = -1, QUESTION_TOKENS
    return [
        Case("knorm", kvpress.KnormPress(**ratio), {}),
        Case("keydiff", kvpress.KeyDiffPress(**ratio), {}),
        Case("lagkv", kvpress.LagKVPress(**ratio, n_sink=4, lag_size=lag), {"n_sink": 4, "lag_size": lag}),
        Case("streaming_llm", kvpress.StreamingLLMPress(**ratio, n_sink=4), {"n_sink": 4}),
        Case("h2o", kvpress.ObservedAttentionPress(**ratio), {}, attention="eager"),
        Case("tova", kvpress.TOVAPress(**ratio), {}),
        Case("snapkv", kvpress.SnapKVPress(**ratio, **snap), snap),
        Case("pyramidkv", kvpress.PyramidKVPress(**ratio, **snap, beta=20), {**snap, "beta": 20}),
        Case("pyramidkv_flat", kvpress.PyramidKVPress(**ratio, **snap, beta=beta), {**snap, "beta": beta}),
        Case(
            "adakv_snapkv",
            kvpress.AdaKVPress(kvpress.SnapKVPress(**ratio, **snap), 0.2),
            {**snap, "alpha_safeguard": 0.2},
        ),
        Case("adakv_knorm", kvpress.AdaKVPress(kvpress.KnormPress(**ratio), 0.2), {"alpha_safeguard": 0.2}),
        Case(
            "chunkkv_snapkv",
            kvpress.ChunkKVPress(kvpress.SnapKVPress(**ratio, **snap), 20),
            {**snap, "chunk_length": 20},
        ),
        Case("chunkkv_knorm", kvpress.ChunkKVPress(kvpress.KnormPress(**ratio), 20), {"chunk_length": 20}),
        Case(
            "expected_attention",
            kvpress.ExpectedAttentionPress(**ratio),
            {
                "n_future_positions": 512,
                "n_sink": 4,
                "use_covariance": True,
                "use_vnorm": True,
                "epsilon": 0.0,
            },
        ),
        Case(
            "finch",
            finch,
            {"question_tokens": QUESTION_TOKENS, "normalize_scores": True, "rerotate_keys": True},
        ),
        Case("kvzip", kvpress.KVzipPress(**ratio), {"n_sink": 4, "layerwise": False, "chunk_size": 2048}),
    ]


@contextmanager
def recording(press: object, record: dict):
    """Collect every layer's scores [G, T] and the index of its last gather [G, n_kept] while `press` runs."""
    scorer = getattr(press, "press", press)
    gather = torch.Tensor.gather

    def spy_gather(tensor, dim, index, **kwargs):
        record["index"] = index
        return gather(tensor, dim, index, **kwargs)

    def spy_score(*args, **kwargs):
        scores = score(*args, **kwargs)
        record["scores"].append(scores[0].clone().double())
        return scores

    def spy_compress(module, hidden_states, keys, values, attentions, kwargs):
        out = compress(module, hidden_states, keys, values, attentions, kwargs)
        if out[1].shape[2] < values.shape[2]:
            kept = torch.zeros(values.shape[1:3], dtype=torch.bool)
            kept.scatter_(1, record["index"][0, :, :, 0], True)
            assert torch.equal(gather(values, 2, record["index"]), out[1]), "the recorded index is not what was kept"
            record["kept"].append(kept)
        return out

    def spy_compress_post(model):
        compress_post(model)
        record["scores"] = list(press.score_val[:, 0].clone().double())

    if hasattr(scorer, "score"):
        score, scorer.score = scorer.score, spy_score
    compress, press.compress = press.compress, spy_compress
    if hasattr(press, "compress_post"):
        compress_post, press.compress_post = press.compress_post, spy_compress_post
    torch.Tensor.gather = spy_gather
    try:
        yield
    finally:
        torch.Tensor.gather = gather


def undecided(case: Case, scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Positions [L, G, T] whose score lies within RELATIVE_TIE of the cut, where rounding or topk decides.

    The cut is per head, per layer (adakv, chunkkv) or global (kvzip), as the press selects.
    """
    scores = scores.clone()
    layers, _, tokens = scores.shape
    if case.name.startswith("adakv"):
        n_safe = max(1, int(kept[0].float().mean().mul(tokens).round().item() * case.press.alpha_safeguard))
        scores.scatter_(-1, scores.topk(n_safe, dim=-1).indices, torch.finfo(torch.float32).max)
        flat = (scores.view(layers, -1), kept.reshape(layers, -1))
    elif case.name.startswith("chunkkv"):
        summed = scores.sum(1)
        blocks = [block.mean(-1, keepdim=True).expand_as(block) for block in summed.split(case.press.chunk_length, -1)]
        scores = torch.cat(blocks, -1)[:, None].expand_as(scores)
        flat = (scores.reshape(layers, -1), kept.reshape(layers, -1))
    elif case.name == "kvzip":
        flat = (scores.view(1, -1), kept.reshape(1, -1))
    else:
        flat = (scores.view(-1, tokens), kept.reshape(-1, tokens))
    score, keep = flat
    lowest_kept = score.masked_fill(~keep, torch.inf).amin(-1, keepdim=True)
    highest_dropped = score.masked_fill(keep, -torch.inf).amax(-1, keepdim=True)
    width = RELATIVE_TIE * torch.maximum(lowest_kept.abs(), highest_dropped.abs())
    near = torch.where(keep, score - highest_dropped <= width, lowest_kept - score <= width)
    return near.view(kept.shape)


def run_case(model: LlamaForCausalLM, input_ids: torch.Tensor, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(kept, undecided), each [L, G, T] bool, for one press on one input."""
    model.set_attn_implementation(case.attention)
    record: dict = {"scores": [], "kept": []}
    tokens = input_ids.shape[1]
    with torch.inference_mode(), recording(case.press, record), case.press(model):
        model(input_ids, past_key_values=DynamicCache(), logits_to_keep=1)
    if not record["kept"]:
        heads = model.config.num_key_value_heads
        for layer in model.model.layers:
            mask = torch.ones(heads, tokens, dtype=torch.bool)
            _, head, position = layer.self_attn.masked_key_indices
            mask[head, position] = False
            layer.self_attn.masked_key_indices = None
            record["kept"].append(mask)
    kept, scores = torch.stack(record["kept"]), torch.stack(record["scores"])
    return kept, undecided(case, scores, kept)


def tiny_model() -> tuple[LlamaForCausalLM, torch.Tensor]:
    """A seeded random Llama whose attention is far from uniform, and 300 random ids [1, 300]."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, attn_implementation="sdpa")).eval()
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.normal_(projection.weight, std=0.3)
    return model, torch.randint(0, TINY["vocab_size"], (1, 300))


def weights_checksum(model: LlamaForCausalLM) -> str:
    """SHA-256 over the parameters' float32 bytes in name order: fixtures only hold for these weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Run every case of one model and write its fixture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("tiny", "smollm2"))
    parser.add_argument("--model", help="transformers folder of SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=FIXTURES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    model, input_ids, options = load_inputs(arguments)
    tokens = input_ids.shape[1]

    arrays: dict[str, np.ndarray] = {"input_ids": input_ids.numpy().astype(np.int32)}
    cases = {}
    for keep_ratio in KEEP_RATIOS:
        for case in build_cases(1 - keep_ratio, **options):
            kept, near = run_case(model, input_ids, case)
            key = f"{case.name}@{keep_ratio}"
            arrays[f"{key}/kept"] = np.packbits(kept.numpy(), axis=-1)
            arrays[f"{key}/undecided"] = np.packbits(near.numpy(), axis=-1)
            cases[key] = {
                "method": case.name,
                "keep_ratio": keep_ratio,
                "settings": case.settings,
                "attention": case.attention,
                "kept_tokens_per_layer": [round(value, 4) for value in kept.float().sum(-1).mean(-1).tolist()],
                "undecided": int(near.sum()),
            }
            print(key, cases[key]["kept_tokens_per_layer"][:4], "undecided", cases[key]["undecided"])
    replay = replay_ids(model, input_ids)
    arrays["kvzip_replay_ids"] = replay.numpy().astype(np.int32)
    description = {
        "model": arguments.name,
        "shape": [model.config.num_hidden_layers, model.config.num_key_value_heads, tokens],
        "layout": "np.unpackbits(array, axis=-1, count=T).astype(bool) -> [L, G, T]",
        "n_kept": "max(1, int(T * (1 - compression_ratio)))",
        "versions": {
            "kvpress": "0.5.5",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "weights_sha256": weights_checksum(model),
        "relative_tie": RELATIVE_TIE,
        "cases": cases,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    replace(arguments.output / f"{arguments.name}.npz", lambda path: np.savez_compressed(path, **arrays))
    text = json.dumps(description, indent=1) + "\n"
    replace(arguments.output / f"{arguments.name}.json", lambda path: path.write_text(text))


def load_inputs(arguments: argparse.Namespace) -> tuple[LlamaForCausalLM, torch.Tensor, dict]:
    """Model, input ids [1, T] and the per-model options of `build_cases`."""
    if arguments.name == "tiny":
        model, input_ids = tiny_model()
        model.save_pretrained(arguments.output / "tiny_llama")
        (arguments.output / "tiny_llama" / "model.safetensors").chmod(0o644)
        AutoTokenizer.from_pretrained = lambda *args, **kwargs: ByteTokenizer()
        return model, input_ids, {"window": 16, "lag": 32, "beta": 4}
    model = LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    # Raw text, no chat prefix: KVzip would otherwise leave the prefix out of its scores.
    tokenizer.chat_template = None
    AutoTokenizer.from_pretrained = lambda *args, **kwargs: tokenizer
    text = (FIXTURES / "passage.txt").read_text()
    input_ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :512]
    return model, input_ids, {"window": 64, "lag": 32, "beta": 2}


def replay_ids(model: LlamaForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """The ids KVzip replays after the context: request, newline, context [1, R]."""
    press = kvpress.KVzipPress(compression_ratio=0.5)
    tokenizer = AutoTokenizer.from_pretrained("any")
    press._context_ids, press.context_length = input_ids, input_ids.shape[1]
    press._suffix_ids = tokenizer.encode("\n", return_tensors="pt", add_special_tokens=False)
    return press.prepare(model, tokenizer)[0][1]


def replace(path: Path, write) -> None:
    """Write beside `path` and move into place."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    write(temporary)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
