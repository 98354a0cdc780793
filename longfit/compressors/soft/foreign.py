"""An encoder that is another model than the reader: opening it, and the way from the reader's ids to its own."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longfit.compressors.soft.backbone import Backbone
from longfit.errors import InputError


@dataclass(frozen=True)
class Foreign:
    """A model and its tokenizer.

    Attributes:
        name: what it was loaded by, for records; the model's own name or class where it was given in code (and has to
            be given again: such a name need not load).
    """

    name: str
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)

    @classmethod
    def given(cls, model: Any, tokenizer: Any) -> "Foreign":
        return cls(getattr(model, "name_or_path", "") or type(model).__name__, model, tokenizer)

    @classmethod
    def loaded(cls, name: str, like: Backbone) -> "Foreign":
        """A causal LM by a name that `longfit.load` takes, in the reader's dtype and on its device."""
        from longfit.loading import load  # a floor above: only a method that names a model needs it

        model, tokenizer = load(name, dtype=like.dtype, device=like.device, attn_implementation="sdpa", progress=False)
        return cls(name, model, tokenizer)


def checked(encoder: Any, method: str) -> Any:
    """`encoder` as an option: None, a name, or a pair (model, tokenizer), which becomes a `Foreign`.

    Raises:
        InputError: it is none of them.
    """
    if encoder is None or isinstance(encoder, str | Foreign):
        return encoder
    if isinstance(encoder, tuple | list) and len(encoder) == 2:
        return Foreign.given(*encoder)
    raise InputError(f"{method}: encoder is a model's name or a pair (model, tokenizer), not {type(encoder).__name__}")


def reader_tokenizer(tokenizer: Any, model: Any, method: str) -> Any:
    """The reader's tokenizer: the one given, else the one that lies with the model.

    Raises:
        InputError: there is none.
    """
    if tokenizer is not None:
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{method}: the encoder has its own tokenizer, and the reader's is not found at {model.name_or_path!r}; "
            "give tokenizer="
        ) from error


def texts(tokenizer: Any, ids: Tensor) -> list[str]:
    """The text of each row of ids [B, n], without special tokens."""
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def same_vocabulary(first: Any, second: Any) -> bool:
    return first is second or first.get_vocab() == second.get_vocab()


def tokens_of(tokenizer: Any, rows: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, n] of each text, padded on the right with any id, and how many of them count, [B], 1 at least.

    A text without tokens becomes one token: the tokenizer's padding, end or first token.
    """
    blank = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    lists = [given or [blank] for given in (tokenizer(rows).input_ids if rows else [])]
    longest = max(len(given) for given in lists)
    padded = [given + [blank] * (longest - len(given)) for given in lists]
    return torch.tensor(padded, device=device), torch.tensor([len(given) for given in lists])
