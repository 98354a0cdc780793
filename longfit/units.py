"""What a user types for a size: bytes, tokens, a share, and the memory budget made of them."""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from longfit.errors import BudgetError, InputError

BYTE_UNITS: dict[str, int] = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
# "120k" is 120,000 and never 122,880: a count of tokens has no binary units.
TOKEN_MULTIPLES: dict[str, int] = {"": 1, "k": 10**3, "m": 10**6}

ACCEPTED_FORMS = (
    'budget="64MiB" or "1.5 GB" (bytes of key/value memory and working set), budget="2048 tokens" or '
    '"120k tokens" (k = 1000; tokens kept per layer), budget="25%" (share of the input kept), '
    'or total="2GiB" (the same as bytes, with the weights counted too)'
)

_NUMBER = r"([0-9][0-9_,]*(?:\.[0-9]+)?|\.[0-9]+)"
_BYTES = re.compile(rf"\s*{_NUMBER}\s*([kmgt]?i?b|bytes?)\s*", re.IGNORECASE)
_TOKENS = re.compile(rf"\s*{_NUMBER}\s*([km]?)\s*(tokens?)?\s*", re.IGNORECASE)
_SHARE = re.compile(rf"\s*{_NUMBER}\s*%\s*")

DEFAULT_BUDGET = "25%"


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text.replace("_", "").replace(",", ""))
    except InvalidOperation:  # pragma: no cover - the patterns above let only numbers through
        raise BudgetError(f"{text!r} is not a number") from None


def parse_bytes(text: str) -> int:
    """Bytes of "64MiB", "1.5 GB", "512kb", "4096 B"; fractions of a byte are cut off.

    Raises:
        BudgetError: no number, no unit, or an unknown unit.
    """
    match = _BYTES.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise BudgetError(f'cannot read {text!r} as bytes: write "64MiB", "1.5 GB" or "4096 B"')
    unit = match[2].lower()
    return int(_decimal(match[1]) * BYTE_UNITS["b" if unit.startswith("byte") else unit])


def parse_tokens(text: str | int) -> int:
    """Tokens of 4096, "4096", "4,096 tokens", "120k" (120,000) or "1.5m" (1,500,000).

    Raises:
        InputError: not a whole, positive number of tokens.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        tokens = Decimal(text)
    else:
        match = _TOKENS.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise InputError(f'cannot read {text!r} as a number of tokens: write 4096 or "120k"')
        tokens = _decimal(match[1]) * TOKEN_MULTIPLES[match[2].lower()]
    if tokens != int(tokens) or tokens < 1:
        raise InputError(f"{text!r} is not a whole number of tokens of at least 1")
    return int(tokens)


def format_bytes(count: int) -> str:
    """Bytes for people, three to four digits: 1536 -> "1.50 KiB". Not exact: see :func:`exact_bytes`."""
    if abs(count) < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if abs(value) < 1024 or unit == "TiB":
            break
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {unit}"


def exact_bytes(count: int) -> str:
    """The shortest exact form that :func:`parse_bytes` reads back: "64MiB", or "67108865B"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        size = BYTE_UNITS[unit.lower()]
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return f"{count}B"


def kept_for_ratio(tokens: int, keep_ratio: float) -> int:
    """Entries kept of ``tokens`` at ``keep_ratio`` (fraction kept): ``max(1, floor(tokens * keep_ratio))``.

    kvpress' ``compute_n_kept`` with the fraction taken as the decimal the user wrote: in floats 29 % of 100
    is 28.999..., and kvpress' ``1 - 0.9`` keeps 9 of 100.
    """
    return max(1, int(tokens * Decimal(repr(keep_ratio)))) if tokens else 0


def share_of(tokens: int, ratio: float) -> int:
    """The same, at least 1, for a ratio that may have been computed: a small term undoes its binary rounding."""
    return max(1, int(tokens * ratio + 1e-9))


@dataclass(frozen=True)
class MemoryBudget:
    """One memory budget: exactly one field is set. ``MemoryBudget.parse(str(budget)) == budget``.

    Attributes:
        budget_bytes: bytes for everything stored (keys, values, positions, states) of all layers and rows,
            plus the working set of one chunk of prefill.
        kept_tokens: entries kept per layer.
        keep_ratio: fraction of the input kept per layer, 0..1.
        total_bytes: as ``budget_bytes`` with the model's weights counted too.
    """

    budget_bytes: int | None = None
    kept_tokens: int | None = None
    keep_ratio: float | None = None
    total_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in self._fields().values() if value is not None]
        if len(given) != 1:
            raise BudgetError(f"a memory budget is exactly one of {', '.join(self._fields())}: {self!r}")
        if given[0] < 0 or (self.keep_ratio is not None and self.keep_ratio > 1):
            raise BudgetError(f"a memory budget cannot be negative or above 100 %: {self!r}")

    def _fields(self) -> dict[str, int | float | None]:
        return {
            "budget_bytes": self.budget_bytes,
            "kept_tokens": self.kept_tokens,
            "keep_ratio": self.keep_ratio,
            "total_bytes": self.total_bytes,
        }

    @classmethod
    def parse(cls, budget: "str | MemoryBudget | None" = None, total: str | None = None) -> "MemoryBudget":
        """The budget that a user wrote, as ``budget`` or as ``total`` (not both).

        Raises:
            BudgetError: nothing or both given, or a text that is none of the accepted forms (it lists them).
        """
        if (budget is None) == (total is None):
            problem = "no memory budget was given" if budget is None else "budget and total were both given"
            raise BudgetError(f"{problem}: give {ACCEPTED_FORMS}")
        if isinstance(budget, MemoryBudget):
            return budget
        text = total if budget is None else budget
        if not isinstance(text, str):
            hint = f'; did you mean "{text} tokens"?' if isinstance(text, int) else ""
            raise BudgetError(f"cannot read the memory budget {text!r}{hint}: give {ACCEPTED_FORMS}")
        if budget is not None and text.replace(" ", "").lower().startswith("total="):
            budget, text = None, text.split("=", 1)[1]
        if match := _BYTES.fullmatch(text):
            size = parse_bytes(text)
            return cls(total_bytes=size) if budget is None else cls(budget_bytes=size)
        if budget is not None and (match := _SHARE.fullmatch(text)):
            if (share := _decimal(match[1])) > 100:
                raise BudgetError(f"the memory budget {text!r} is above 100 %: give {ACCEPTED_FORMS}")
            return cls(keep_ratio=float(share / 100))
        if budget is not None and (match := _TOKENS.fullmatch(text)) and match[3]:
            tokens = _decimal(match[1]) * TOKEN_MULTIPLES[match[2].lower()]
            if tokens == int(tokens):
                return cls(kept_tokens=int(tokens))
        name = "memory budget" if budget is not None else "total"
        raise BudgetError(f"cannot read the {name} {text!r}: give {ACCEPTED_FORMS}")

    def __str__(self) -> str:
        if self.budget_bytes is not None:
            return exact_bytes(self.budget_bytes)
        if self.kept_tokens is not None:
            return f"{self.kept_tokens} token{'' if self.kept_tokens == 1 else 's'}"
        if self.keep_ratio is not None:
            return format_share(Decimal(repr(self.keep_ratio)) * 100)
        assert self.total_bytes is not None
        return f"total={exact_bytes(self.total_bytes)}"


def format_share(percent: Decimal) -> str:
    """A percentage without exponent or trailing zeros: "25%", "12.5%"."""
    text = f"{percent:f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}%"
