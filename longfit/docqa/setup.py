"""How a model is loaded and wrapped for documents: what a command asks for, and what a saved memory remembers."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from longfit.errors import InputError, LongfitError, MemoryFileError
from longfit.units import DEFAULT_BUDGET, MemoryBudget


@dataclass(frozen=True)
class Setup:
    """Plain values only, so that it goes into a file and comes back.

    Attributes:
        model, dtype: as for `longfit.load`.
        compressor: a name; "snapkv" where neither it nor an attention is given.
        attention: a name.
        options: of the compressor, or of an attention alone.
        budget, total, chunk_tokens: as for `longfit.wrap`; without both budgets a quarter of the cache is kept, or what
            a learned compressor or an attention alone makes of it.
    """

    model: str = "smollm2-135m"
    dtype: str = "auto"
    compressor: str | None = None
    attention: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    budget: str | None = None
    total: str | None = None
    chunk_tokens: int | None = None

    def parts(self) -> dict[str, Any]:
        """The arguments of `longfit.wrap`, made and checked; no model is needed.

        Raises:
            UnknownNameError, InputError, BudgetError: something that cannot be.
        """
        from longfit.attention import get as attention
        from longfit.compressors import LearnedCompressor, PromptCompressor
        from longfit.compressors import get as compressor

        alone = self.compressor is None and self.attention is not None
        patch = None
        if self.attention is not None:
            patch = _made(attention, self.attention, self.options if alone else {})
        method = None if alone else _made(compressor, self.compressor or "snapkv", self.options)
        budget = None
        if self.budget or self.total:
            budget = MemoryBudget.parse(self.budget, total=self.total)
        elif isinstance(method, PromptCompressor) and (method.keep_ratio or method.kept_tokens):
            budget = None
        elif method is not None and not isinstance(method, LearnedCompressor):
            budget = MemoryBudget.parse(DEFAULT_BUDGET)
        return {"compressor": method, "attention": patch, "budget": budget, "chunk_tokens": self.chunk_tokens}

    @property
    def names_budget(self) -> bool:
        """Somebody said what the budget is."""
        return bool(self.budget or self.total)

    def keeping_all(self) -> "Setup":
        """The same with room for everything: for texts too short for the share that is kept by default."""
        return replace(self, budget="100%")

    def rewrap(self, model: Any, tokenizer: Any) -> Any:
        """A loaded model, wrapped as this says."""
        from longfit import wrap

        parts = self.parts()
        return wrap(model, parts.pop("compressor"), tokenizer=tokenizer, **parts)

    def prepare(self, progress: bool = True) -> tuple[Any, Any]:
        """The model, loaded and wrapped, and its tokenizer. What can be refused is refused before it is loaded."""
        from longfit import load

        self.parts()
        model, tokenizer = load(self.model, dtype=self.dtype, progress=progress)
        return self.rewrap(model, tokenizer), tokenizer

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Any) -> "Setup":
        """
        Raises:
            MemoryFileError: it is not what `to_dict` gives.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(given, dict) or not given.keys() <= names or not isinstance(given.get("model"), str):
            raise MemoryFileError(
                "this memory does not say how its model was wrapped: it was not made by `longfit compress`; load it "
                "with longfit.Memory.load(folder, model)"
            )
        return cls(**given)


def _made(get: Any, name: str, options: dict[str, Any]) -> Any:
    try:
        return get(name, **options)
    except LongfitError:
        raise
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise InputError(f"{name} cannot take {given}: {error}") from error
