"""The demo: SmolLM2 reads the keeper's log inside a quarter of its key/value cache and answers from its middle."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from longfit.demo.document import ANSWER, QUESTION, document
from longfit.units import format_bytes

MODEL = "smollm2-135m"
COMPRESSOR = "snapkv"
OPTIONS: dict[str, Any] = {"kernel_size": 21}
BUDGET = "25%"
MAX_NEW_TOKENS = 24


@dataclass(frozen=True)
class DemoResult:
    """What the demo showed.

    Attributes:
        answer: what the model says with the document in the budget.
        without_document: what it says to the question alone.
        correct: the answer has the document's word.
        report: what was kept and spent, as of `FitReport.to_dict`.
    """

    model: str
    dtype: str
    document_tokens: int
    question: str
    expected: str
    answer: str
    without_document: str
    correct: bool
    report: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return asdict(self)


def run(say: Callable[[str], object] = print) -> DemoResult:
    """Run the demo; `say` gets one line at a time about what happens.

    Raises:
        LoadError: the packaged model cannot be had.
    """
    import longfit
    from longfit.docqa import ask, split_prompt

    loaded, tokenizer = longfit.load(MODEL)
    model = longfit.wrap(loaded, COMPRESSOR, budget=BUDGET, **OPTIONS)
    context, rest = split_prompt(tokenizer, document(), QUESTION)
    planned = model.longfit.plan(1, len(context) + len(rest))
    say(f"model     {MODEL}, {str(model.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads")
    say(f"document  a keeper's log of a year: {len(context):,} tokens")
    say(f"question  {QUESTION}")
    say(
        f"budget    {BUDGET}: {planned.kept_tokens:,} tokens a layer, about {format_bytes(planned.kv_kept_bytes)} "
        f"of the {format_bytes(planned.kv_full_bytes)} of keys and values, in chunks of {planned.chunk_tokens:,}"
    )
    alone = _without_document(model, tokenizer)  # first, so that the weights are resident before the peak is measured
    say("reading   (some seconds to a minute) ...")
    given = ask(model, tokenizer, document(), QUESTION, max_new_tokens=MAX_NEW_TOKENS)
    say(f"answer    {given.text}")
    say(f"          (asked without the document: {alone})")
    say(f"spent     {given.report}")
    return DemoResult(
        model=MODEL,
        dtype=str(model.dtype).removeprefix("torch."),
        document_tokens=len(context),
        question=QUESTION,
        expected=ANSWER,
        answer=given.text,
        without_document=alone,
        correct=ANSWER.lower() in given.text.lower(),
        report=given.report.to_dict(),
    )


@torch.no_grad()
def _without_document(model: Any, tokenizer: Any) -> str:
    """The base model's answer to the question alone, on one line."""
    turn = [{"role": "user", "content": QUESTION}]
    given = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(
        model.device
    )
    with model.disabled():
        out = model.generate(**given, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    text = tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())
