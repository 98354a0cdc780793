"""How much a passage raises the likelihood of an answer, by the base model."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from longfit.docqa.document import Document
from longfit.docqa.prompt import bare_ids, context_of, question_ids

MOST_ANSWER_TOKENS = 64
# Of one forward: tokens, and numbers in the logits of the answer (64 MiB in float32).
BATCH_TOKENS, BATCH_LOGITS = 2048, 2**24


@torch.no_grad()
def lifts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    question: str,
    answer: str,
    before_each: Callable[[], None] | None = None,
) -> list[float]:
    """log p(answer | text, question) - log p(answer | question) of each text, in nats per token of the answer.

    The base model is asked, without memory and compressor, and the question is put as it is put after a document.
    An answer past `MOST_ANSWER_TOKENS` is judged by its beginning. An empty one is raised by nothing. `before_each` is
    called before each batch; what it raises ends the search.

    Raises:
        InputError: an empty question or text.
    """
    answer = answer.strip()
    said = tokenizer(answer if getattr(tokenizer, "chat_template", None) else f" {answer}", add_special_tokens=False)
    target = list(said["input_ids"])[:MOST_ANSWER_TOKENS]
    if not answer or not target:
        return [0.0] * len(texts)
    asked = question_ids(tokenizer, question)
    prompts = [context_of(tokenizer, [Document("passage", text)])[0] + asked for text in texts]
    prompts.append(bare_ids(tokenizer) + asked)
    with model.disabled() if hasattr(model, "disabled") else nullcontext():
        given = _log_likelihoods(model, prompts, target, before_each or (lambda: None))
    return [value - given[-1] for value in given[:-1]]


def _log_likelihoods(
    model: Any, prompts: list[list[int]], target: list[int], before_each: Callable[[], None]
) -> list[float]:
    """Mean log-likelihood of the target's tokens after each prompt; prompts of like length go through together."""
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    found = [0.0] * len(prompts)
    logits = (len(target) + 1) * model.config.get_text_config().vocab_size
    while order:
        before_each()
        most = len(prompts[order[-1]]) + len(target)
        rows = max(1, min(BATCH_TOKENS // most, BATCH_LOGITS // logits))
        batch = [order.pop() for _ in range(min(len(order), rows))]
        values = _batch(model, [prompts[place] for place in batch], target)
        for place, value in zip(batch, values.tolist(), strict=True):
            found[place] = value
    return found


def _batch(model: Any, prompts: list[list[int]], target: list[int]) -> Tensor:
    """[B] the same for one batch, left-padded."""
    most, n = max(map(len, prompts)), len(target)
    rows = [[target[0]] * (most - len(prompt)) + prompt + target for prompt in prompts]
    ids = torch.tensor(rows, device=model.device)
    padding = torch.tensor([[most - len(prompt)] for prompt in prompts], device=model.device)
    columns = torch.arange(ids.shape[1], device=model.device)[None]
    mask, positions = (columns >= padding).long(), (columns - padding).clamp(min=0)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=n + 1, use_cache=False
    ).logits
    logits = logits[:, :-1].float()  # [B, n, vocabulary]
    said = logits.gather(-1, ids[:, -n:, None])[..., 0]
    return (said - logits.logsumexp(-1)).mean(1)
