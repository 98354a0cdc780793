"""A model class of lm-eval that compresses the context before it reads the question."""

from collections.abc import Mapping
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria

from longfit.errors import InputError, UnsupportedFeatureError
from longfit.eval.answering import held_by, target_log_probs
from longfit.eval.lm_eval.arguments import cell_of
from longfit.eval.lm_eval.split import split_request
from longfit.eval.measures import check_kept
from longfit.memory import Memory


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
        self.cell = cell_of(
            compressor, budget, total, chunk_tokens=chunk_tokens, aware=aware, options=options, more=more
        )
        self.plain = self.cell.method == "full"
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

            method = get(self.cell.method, **self.cell.options)
            wrap(self.model, method, budget=budget, total=total, chunk_tokens=chunk_tokens, tokenizer=self.tokenizer)

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
