"""A compressed context as an object: compress once, ask many times, keep it on disk."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longfit.cache import FitCache
from longfit.errors import FingerprintError, InputError, UnsupportedFeatureError


@dataclass(frozen=True)
class Memory:
    """What `model.compress(...)` keeps of a context. Asking works on a copy; the memory itself never changes.

    Attributes:
        cache: the compressed keys and values of every layer, with their positions.
        tokens_in: tokens of the context, the longest row.
        fingerprint: which model and method made it.
        question: [B, Q] the ids that it was compressed for; None if any question may be asked.
        source: the text that was read and what else belongs to it, as plain values for JSON; None if nobody said.
    """

    cache: FitCache
    tokens_in: int
    fingerprint: dict[str, str]
    question: Tensor | None = None
    source: dict[str, Any] | None = None

    @property
    def kept_tokens(self) -> float:
        """Entries kept per layer, averaged over rows and heads."""
        return self.cache.kept_tokens

    @property
    def kept_spans(self) -> list[tuple[int, int]] | None:
        """Stretches [first, stop) of the first row's tokens that a prompt compressor kept; None if it left out none."""
        return None if self.cache.shortened is None else self.cache.shortened.spans()

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated."""
        return self.cache.nbytes

    def fork(self, fingerprint: dict[str, str]) -> FitCache:
        """A cache to continue from, for a model with this fingerprint.

        Raises:
            FingerprintError: the memory was made by another model or method.
        """
        check_same(self.fingerprint, fingerprint)
        return self.cache.fork()

    def append(self, model: Any, input_ids: Tensor) -> "Memory":
        """The memory that also holds what follows its context; this one does not change.

        Args:
            model: wrapped as it was when the memory was made.
            input_ids: [B, T], without padding.

        Raises:
            FingerprintError: the memory was made by another model or method.
            UnsupportedFeatureError: a memory of a learned or a prompt compressor, one made for a question, or one
                whose positions end before the longer context does.
        """
        return model.compress(input_ids, memory=self)

    def grown(self, model: Any, ids: Tensor, mask: Tensor | None, question: Tensor | None) -> FitCache:
        """A cache to read ids [B, T] into, after this context.

        Raises:
            FingerprintError, InputError, UnsupportedFeatureError: see `append`.
        """
        cache, context = self.fork(model._fingerprint()), model.longfit
        if self.question is not None or question is not None:
            raise UnsupportedFeatureError(
                "a memory that was compressed for one question cannot be added to; compress both texts in one go"
            )
        if (whole := context.encoder or context.prompt) is not None:
            raise UnsupportedFeatureError(
                f"{whole.name} makes its memory of the whole context; compress both texts in one go"
            )
        if cache.releases:
            raise UnsupportedFeatureError(f"{context.patch.name} forwards tokens again and cannot be added to")
        if ids.shape[0] != cache.rows or (mask is not None and not bool(mask.bool().all())):
            raise InputError(f"the memory has {cache.rows} rows; give as many, of equal length and without padding")
        context.check_growth(cache.ledger, cache.tokens_in + ids.shape[1])
        return cache

    def check_question(self, ids: Tensor) -> None:
        """
        Raises:
            InputError: the memory was compressed for another question than ids [B, T].
        """
        if self.question is None:
            return
        asked = ids.to(self.question.device)
        if asked.shape[1] != self.question.shape[1] or not bool((asked == self.question).all()):
            raise InputError(
                "this memory was compressed for another question, and what that did not need is gone; compress the "
                "document again, without question_ids for a memory that takes any question"
            )

    def save(self, folder: str | os.PathLike[str], about: dict[str, Any] | None = None) -> Path:
        """Write the memory to a folder (`context.json`, a safetensors file, the source), whole or not at all.

        What is saved of soft slots is the slots, and of a prompt compressor alone the token ids that it kept, not the
        keys and values that the model makes of them. Pages on a slow tier go to a file of their own, one at a time, and
        are brought in from there, when they are asked for, once the memory is loaded.

        Args:
            about: anything else that JSON can hold, to be found again with `longfit info`.

        Raises:
            MemoryFileError: the folder holds something else.
        """
        from longfit.memory_file import write

        return write(self, Path(folder), about or {})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: Any) -> "Memory":
        """Read what `save` wrote, for a model that was wrapped as it was then.

        Raises:
            FingerprintError: another model, other weights, method, options or attention.
            MemoryFileError: no memory, one of another version, cut off or changed.
        """
        from longfit.memory_file import read

        if not hasattr(model, "longfit"):
            raise InputError("wrap the model as it was when the memory was made: longfit.wrap(model, ...)")
        return read(Path(folder), model)

    def __repr__(self) -> str:
        return f"Memory(tokens_in={self.tokens_in}, kept_tokens={self.kept_tokens:.0f}, kv_bytes={self.kv_bytes})"


def check_same(made_by: dict[str, str], here: dict[str, str]) -> None:
    """
    Raises:
        FingerprintError: the two differ; the message says in what.
    """
    for part in made_by | here:
        if made_by.get(part) != here.get(part):
            raise FingerprintError(
                f"this memory belongs to another {part}: it was made by {made_by.get(part, 'none')}, and here is "
                f"{here.get(part, 'none')}; wrap the model as it was then, or compress the document again"
            )


def fingerprint(model: Any, context: Any) -> dict[str, str]:
    """What a memory depends on: model, weights, dtype, method, attention and learned compressor."""
    config, encoder, prompt = context.config, context.encoder, context.prompt
    own = [] if encoder is None else [p for group in encoder.parameters().values() for p in group]
    made = {
        "model": f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights_hash(model.named_parameters(), skip=own),
        "method": repr(context.method),
    }
    if context.patch is not None:
        made["attention"] = repr(context.patch)
        if learned := context.patch.learned():
            made["attention's learned weights"] = digest(learned)
    if prompt is not None:
        made["prompt compressor"] = prompt.fingerprint()
    if encoder is not None:
        made["learned compressor"] = encoder.fingerprint()
    return made


@torch.no_grad()
def weights_hash(parameters: Iterable[tuple[str, Tensor]], skip: list[Any], samples: int = 16) -> str:
    """A hash of names, shapes and some evenly spaced values of every weight: fast, and other for any other training."""
    left_out, sha, values = {id(parameter) for parameter in skip}, hashlib.sha256(), []
    for name, parameter in sorted(parameters, key=lambda item: item[0].replace(".base_layer", "")):
        if id(parameter) in left_out:
            continue
        sha.update(f"{name.replace('.base_layer', '')}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        values.append(flat[:: max(1, flat.numel() // samples)][:samples].float())
    sha.update(torch.cat(values).cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of tensors by name: the same for the same names, types, shapes and bits."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + bits.numpy().tobytes())
    return f"sha256:{sha.hexdigest()[:16]}"
