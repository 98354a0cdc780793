"""One answer of the model, sent while it is made."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from longfit.docqa.server.asked import Answered, Asked
from longfit.docqa.server.text_stream import TextStream
from longfit.docqa.server.worker import Job
from longfit.memory import Memory


def generate(
    model: Any, tokenizer: Any, job: Job, asked: Asked, ids: Sequence[int], new: int, memory: Memory | None
) -> Answered:
    """Up to `new` tokens after the ids, each piece of text an event of the job, without citations.

    Args:
        memory: what the ids go on from; without one the model's wrapper is off.

    Raises:
        Cancelled: nobody reads it any more.
    """
    started = time.perf_counter()
    stream = TextStream(tokenizer, lambda text: job.emit("text", text), asked.stop)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    how: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": pad}
    if asked.temperature > 0:
        how |= {"do_sample": True, "temperature": asked.temperature, "top_p": asked.top_p, "top_k": 0}
    if memory is not None:
        how["memory"] = memory
    prompt = torch.tensor([ids], dtype=torch.long, device=model.device)
    ends = StoppingCriteriaList([_Ends(job, stream)])
    with _seeded(asked.seed):
        model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=stream, stopping_criteria=ends, **how)
    job.check()
    ended = stream.stopped or len(stream.ids) < new or stream.ids[-1] in _end_ids(model)
    before = 0 if memory is None else memory.tokens_in
    if memory is None:
        tokens = float(len(ids) + len(stream.ids))
        kept_tokens, kv_bytes = tokens, model.longfit.shape.full_kv_bytes(int(tokens))
    else:
        kept_tokens, kv_bytes = model.fit_report.kept_tokens, model.fit_report.kv_bytes
    return Answered(
        text=stream.text,
        finish_reason="stop" if ended else "length",
        prompt_tokens=before + len(ids),
        cached_tokens=before,
        completion_tokens=len(stream.ids),
        citations=(),
        kept_tokens=round(kept_tokens, 1),
        kv_bytes=kv_bytes,
        seconds=round(time.perf_counter() - started, 3),
    )


class _Ends(StoppingCriteria):
    """The answer ends where a stop sequence was found, or nobody reads it any more."""

    def __init__(self, job: Job, stream: TextStream) -> None:
        self.job, self.stream = job, stream

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        ended = self.stream.stopped or self.job.cancelled.is_set()
        return torch.full((input_ids.shape[0],), ended, dtype=torch.bool, device=input_ids.device)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Inside, what is drawn comes from the seed; the process' own generators stay as they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _end_ids(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]
