"""``longfit`` as a model of lm-evaluation-harness (EleutherAI, lm-eval 0.4.13).

    accelerate launch -m longfit.eval.lm_eval --model longfit --tasks niah_single_1 \\
        --model_args pretrained=smollm2-135m,compressor=snapkv,budget=25%,aware=false

lm-eval hands over one prompt; compressing before the question is known needs it in two parts, which `split_request`
finds by the request's document. Deviations from ``--model hf``, with a compressor only (without one, this is HFLM):

- The two parts are tokenised apart, as `longfit.eval.sample` does, and one request runs at a time.
- A long prompt is never truncated; ``batch_size`` is not used.
- Rolling log-likelihood is refused: it would score the text that is being compressed.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from longfit.errors import InputError, UnsupportedFeatureError
from longfit.eval.answering import held_by, target_log_probs
from longfit.eval.cells import Cell
from longfit.eval.lm_eval_split import split_request
from longfit.eval.measures import check_kept
from longfit.memory import Memory

try:
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.models.utils_hf import stop_sequences_criteria
except ImportError as missing:
    raise InputError(f'{missing}; install it: pip install "longfit[lm-eval]"') from missing


class LongfitLM(HFLM):
    """A causal LM whose contexts are compressed before lm-eval's questions are read.

    Args:
        pretrained: what `longfit.load` takes, or a model, which then needs its `tokenizer`.
        compressor: a method; None or "full" is the plain model, run as HFLM runs it.
        budget, total, chunk_tokens: as `longfit.wrap` takes them.
        aware: read context and question together, the method seeing the question.
        options: of the method, a mapping or JSON; ``option_window=32`` does the same for one of them, which is what
            lm-eval's comma-separated ``model_args`` can carry.
        max_length, add_bos_token, prefix_token_id, batch_size, max_batch_size: as HFLM takes them.

    Raises:
        InputError: an unknown argument, a compressor without a budget, a budget without a compressor.
        LoadError, UnknownNameError, UnsupportedModelError, BudgetError: from loading and wrapping.
    """

    def __init__(
        self,
        pretrained: Any,
        compressor: str | None = None,
        budget: str | None = None,
        total: str | None = None,
        chunk_tokens: int | None = None,
        aware: bool = False,
        options: str | Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = 64,
        **more: Any,
    ) -> None:
        self.plain = compressor in (None, "full")
        chosen = _options(options, more)
        size = budget or (f"{total} in total" if total else "100%")
        _check(self.plain, compressor, budget, total, chosen)
        self.cell = Cell(
            compressor or "full", str(size), "aware" if aware else "agnostic", chosen, chunk_tokens=chunk_tokens
        )
        self.calls, self.tokens_in, self.kept_tokens = 0, 0, 0.0
        self._templated = False
        self._compressed: tuple[list[int], Memory] | None = None
        from accelerate import Accelerator

        accelerator = Accelerator()
        several = accelerator.num_processes > 1
        if isinstance(pretrained, str):
            from longfit.loading import load

            place = accelerator.device if several else device
            pretrained, tokenizer = load(pretrained, dtype=dtype, device=place, progress=False)
        elif tokenizer is None:
            raise InputError("a model object needs its tokenizer: give tokenizer=")
        super().__init__(
            pretrained,
            backend="causal",
            tokenizer=tokenizer,
            max_length=max_length,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
        )
        if several:
            # HFLM takes a model object for one process; this one was loaded in each.
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if not self.plain:
            from longfit.compressors import get
            from longfit.model import wrap

            method = get(str(compressor), **chosen)
            wrap(self.model, method, budget=budget, total=total, chunk_tokens=chunk_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self._templated = True
        return super().apply_chat_template(chat_history, add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results; the kept tokens are means over this process's requests."""
        calls = max(1, self.calls)
        return super().get_model_info() | {
            "longfit_cell": self.cell.cell_id,
            "longfit_awareness": self.cell.awareness,
            "longfit_compressions": self.calls,
            "longfit_tokens_in": self.tokens_in / calls,
            "longfit_kept_tokens": self.kept_tokens / calls,
        }

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers, each up to the first of its stop strings."""
        if self.plain:
            return super().generate_until(requests, disable_tqdm)
        answers = []
        for request in requests:
            prompt, arguments = request.args
            answers.append(self._answer(request, prompt, arguments))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether it is the greedy one.

        The part before the question is compressed; where a prompt cannot be cut, all of it but its last token.

        Raises:
            UnsupportedFeatureError: in the aware mode.
            InputError: a context of fewer than two tokens.
        """
        if self.plain:
            return super().loglikelihood(requests, disable_tqdm)
        if self.cell.awareness == "aware":
            raise UnsupportedFeatureError("likelihoods are scored with aware=false only; or use compressor=full")
        found = []
        for request in requests:
            found.append(self._likelihood(*self._likelihood_parts(request)))
            self.cache_hook.add_partial("loglikelihood", request.args, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        if not self.plain:
            raise UnsupportedFeatureError(
                "rolling log-likelihood scores the very text that a compressor drops; use the suite `perplexity`, or "
                "compressor=full"
            )
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def _answer(self, request: Any, prompt: str, arguments: dict[str, Any]) -> str:
        how: dict[str, Any] = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        until = handle_stop_sequences(how.pop("until", None), eos=self.tok_decode([self.eot_token_id], False))
        how["max_new_tokens"] = how.pop("max_gen_toks")
        if how.pop("max_length", None) is not None:
            raise InputError("generation_kwargs has max_length, which counts the prompt; use max_gen_toks")
        if not how["do_sample"]:
            how.pop("temperature", None)
        aware = self.cell.awareness == "aware"
        context, question = split_request(request, prompt, guess=aware)
        context_ids, question_ids = self._opening(context), self.tok_encode(question, add_special_tokens=False)
        if aware:
            given = self._tensor(context_ids + question_ids)
            how["question_tokens"] = len(question_ids)
        else:
            given = self._tensor(question_ids)
            how["memory"] = self._memory(context_ids)
        out = self.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            stopping_criteria=stop_sequences_criteria(self.tokenizer, until, given.shape[1], 1),
            pad_token_id=self.tokenizer.pad_token_id,
            **how,
        )
        if aware:
            self._check(how["max_new_tokens"])
        text = self.tok_decode(out[0, given.shape[1] :].tolist())
        return postprocess_generated_text(generation=text, stop=until, think_end_token=None)

    def _likelihood_parts(self, request: Any) -> tuple[list[int], list[int], list[int]]:
        """Tokens to compress, tokens to read after that (at least one), and the continuation's."""
        prompt, continuation = request.args
        try:
            context, question = split_request(request, prompt)
        except InputError:
            context, question = prompt, ""
        if question.strip():
            # Spaces at a prompt's end belong to the continuation's first token, as in lm-eval's _encode_pair.
            text = question.rstrip(" ")
            question_ids = self.tok_encode(text, add_special_tokens=False)
            whole = self.tok_encode(question + continuation, add_special_tokens=False)
            return self._opening(context), question_ids, whole[len(question_ids) :]
        ids, target = self._encode_pair(prompt, continuation) if prompt else ([], [])
        if len(ids) < 2:
            raise InputError(f"a context of {len(ids)} tokens leaves nothing to compress; use compressor=full")
        return ids[:-1], ids[-1:], target

    @torch.no_grad()
    def _likelihood(self, context: list[int], question: list[int], target: list[int]) -> tuple[float, bool]:
        cache = self._memory(context).fork(self.model._fingerprint())
        scores = target_log_probs(self.model, self._tensor(question), self._tensor(target), cache)
        wanted = torch.tensor(target, device=scores.device)
        total = scores.gather(-1, wanted[:, None]).sum()
        return float(total), bool((scores.argmax(-1) == wanted).all())

    def _memory(self, context: list[int]) -> Memory:
        """The compressed context; that of the last request where it is the same."""
        if self._compressed is None or self._compressed[0] != context:
            self._compressed = context, self.model.compress(self._tensor(context))
            self._check(0)
        return self._compressed[1]

    def _check(self, new_tokens: int) -> None:
        held = held_by(self.model)
        check_kept(self.cell, held, new_tokens)
        self.calls += 1
        self.tokens_in += held.tokens_in
        self.kept_tokens += held.kept_tokens

    def _opening(self, text: str) -> list[int]:
        """Tokens of a prompt's beginning; a chat template has brought the opening tokens as text."""
        return self.tok_encode(text, add_special_tokens=False if self._templated else None)

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        """[1, T] on the model's device."""
        return torch.tensor([ids], dtype=torch.long, device=self.model.device)


def _options(options: str | Mapping[str, Any] | None, more: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options of both spellings."""
    try:
        chosen = json.loads(options) if isinstance(options, str) else dict(options or {})
    except json.JSONDecodeError as error:
        raise InputError(f"options={options!r} is not JSON: {error}") from error
    if not isinstance(chosen, dict):
        raise InputError(f"options={options!r} is not a JSON object")
    if unknown := sorted(key for key in more if not key.startswith("option_")):
        raise InputError(f"unknown model argument {', '.join(unknown)}; options of a method are option_NAME=VALUE")
    return chosen | {key.removeprefix("option_"): value for key, value in more.items()}


def _check(plain: bool, compressor: str | None, budget: str | None, total: str | None, options: dict[str, Any]) -> None:
    if plain and (options or total or budget not in (None, "100%")):
        raise InputError("a budget or options without a compressor; name one, as compressor=snapkv")
    if not plain and not (budget or total):
        raise InputError(f"compressor={compressor} needs a budget, as budget=25%")


def register() -> None:
    """Make lm-eval know the model ``longfit``. Again is harmless."""
    if "longfit" not in model_registry:
        model_registry.register("longfit", target="longfit.eval.lm_eval:LongfitLM")


def run(
    tasks: Sequence[str],
    model: Any,
    compressor: str | None = None,
    budget: str | None = None,
    *,
    limit: int | float | None = None,
    metadata: Mapping[str, Any] | None = None,
    include_path: str | Path | None = None,
    chat: bool = False,
    seed: int = 42,
    output: str | Path | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Evaluate lm-eval's ``tasks`` and, where ``output`` names a file, write the results there as JSON.

    Args:
        model, compressor, budget, arguments: of `LongfitLM`.
        limit: of requests a task, as lm-eval takes it.
        metadata: for the tasks, as {"max_seq_lengths": [4096]}; RULER's also get the model's tokenizer from here.
        include_path: a folder with more tasks in YAML.
        chat: use the tokenizer's chat template.

    Returns:
        lm-eval's results; empty in all but the first of several processes.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable

    register()
    lm = model_registry.get("longfit")(model, compressor, budget, **arguments)
    with tempfile.TemporaryDirectory() as folder:
        lm.tokenizer.save_pretrained(folder)  # RULER's tasks load it by name, and a packaged model's is not on the hub
        known = {"tokenizer": folder, **(metadata or {})}
        manager = TaskManager(include_path=str(include_path) if include_path else None, metadata=known)
        results = simple_evaluate(
            lm,
            tasks=list(tasks),
            limit=limit,
            apply_chat_template=chat,
            task_manager=manager,
            random_seed=seed,
            bootstrap_iters=0,
        )
    found: dict[str, Any] = dict(results or {})
    if output is not None and found:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, default=handle_non_serializable, ensure_ascii=False, indent=2)
        Path(output).write_text(text, encoding="utf-8")
    return found


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()
