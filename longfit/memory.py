"""A compressed context as an object: compress once, ask many times."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longfit.cache import FitCache
from longfit.errors import FingerprintError


@dataclass(frozen=True)
class Memory:
    """What `model.compress(...)` keeps of a context. Asking works on a copy; the memory itself never changes.

    Attributes:
        cache: the compressed keys and values of every layer, with their positions.
        tokens_in: tokens of the context, the longest row.
        next_position: rotary position of the next token, per row.
        fingerprint: which model and method made it.
    """

    cache: FitCache
    tokens_in: int
    fingerprint: str

    @property
    def kept_tokens(self) -> float:
        """Entries kept per layer, averaged over rows and heads."""
        return self.cache.kept_tokens

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated."""
        return self.cache.nbytes

    def fork(self, fingerprint: str) -> FitCache:
        """A cache to continue from, for a model with this fingerprint.

        Raises:
            FingerprintError: the memory was made by another model or method.
        """
        if fingerprint != self.fingerprint:
            raise FingerprintError(
                f"this memory was made by {self.fingerprint}, the model here is {fingerprint}; "
                "compress the document again"
            )
        return self.cache.fork()

    def __repr__(self) -> str:
        return f"Memory(tokens_in={self.tokens_in}, kept_tokens={self.kept_tokens:.0f}, kv_bytes={self.kv_bytes})"


def fingerprint(config: Any, method: Any, patch: Any = None) -> str:
    """Model family, sizes, method and attention with a hash of what it learned, in one line."""
    model = f"{config.model_type}/{config.num_hidden_layers}x{config.hidden_size}/{config._name_or_path}"
    attention = "" if patch is None else f" {patch!r}"
    learned = {} if patch is None else patch.learned()
    return f"{model} {method!r}{attention}" + (f" {digest(learned)}" if learned else "")


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of tensors by name: the same for the same names, types, shapes and bits."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + bits.numpy().tobytes())
    return f"sha256:{sha.hexdigest()[:16]}"
