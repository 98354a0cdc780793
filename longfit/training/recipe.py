"""What a training recipe (YAML) may say."""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from longfit.compressors.soft import LearnedCompressor, available
from longfit.errors import InputError
from longfit.training.limits import checked, checked_options
from longfit.training.schedules import choices, points
from longfit.training.student import LossOptions
from longfit.user_code import load_code
from longfit.yaml_file import read_mapping

# What may differ when a run goes on: how long, and what is written and shown.
FREE = (
    "steps",
    "max_seconds",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "trackers",
    "evaluation",
    "threads",
    "code",
)


@dataclass(frozen=True)
class Evaluation:
    """When and on how much to evaluate.

    Attributes:
        every: steps between evaluations in small; 0 for none.
        small: samples of each source then; n: at the end.
        batch_size: rows at once.
        context_tokens: of the samples; the longest that training has where empty. All of them at the end, the first in
            small.
        ratio: tokens for each slot; the first of the recipe's where None.
    """

    every: int = 0
    small: int = 8
    n: int = 32
    batch_size: int = 8
    context_tokens: list[int] = field(default_factory=list)
    ratio: int | None = None


@dataclass(frozen=True)
class Recipe:
    """One training run. Values that cannot be are an `InputError`; see `limits`.

    Attributes:
        name: of the run, and of its folder below runs/ where none is given.
        model: as `longfit.load` takes it; it stays frozen.
        compressor: a learned method by name, or a mapping of one name to its options: `{strided_kv: {rank: 8}}`.
        data: sources of the mixture; see `training.data.sources`.
        losses: weight of each, a number or `[[progress, weight], ...]` (linear in between); the method's own where
            empty. See `training.student.LOSSES`; a method may have more.
        loss_options: see `training.student.LossOptions`.
        ratios: tokens for each slot, one drawn for each step; or `[[progress, [ratios]], ...]`, of which the last one
            reached holds, as low ratios first. The method's own where empty. The adapter is for those of the end.
        warm_start: batches whose contexts give the method its first weights, where it has such a start (`arc`).
        context_tokens: n of every context in a batch, a number or `[[progress, n], ...]` (the last one reached holds).
        target_tokens: that follow a context, at most.
        window_tokens: last tokens of a context that the reader gets raw; the slots stand for those before them.
        batch_size: rows for each process and micro-batch; `accumulate`: micro-batches of a step.
        steps: of the optimizer; max_seconds: of training, all starts together, whichever is first.
        schedule_by: "steps" (a resumed run is exact), or "time": progress is the larger of steps and seconds done.
        lr, warmup_steps, final_lr: AdamW's rate, rising first, then down a cosine to this share of it.
        lr_factors: of the groups of `compressor.parameters()`, as `{slots: 5}`.
        weight_decay, betas, clip: of AdamW, and the norm that gradients are clipped to.
        mixed_precision: "no", "bf16" or "fp16" autocast by accelerate. "no" is right for a bf16 model: its trained
            weights are fp32 whatever its own are.
        dtype: of the frozen model.
        seed: of data and whatever the method draws; initial weights are always the same.
        log_every, checkpoint_every, keep_checkpoints: in steps, in steps, and how many.
        trackers: "tensorboard", "wandb", "trackio", as accelerate knows them; metrics.jsonl is always written.
        save_dtype: of the adapter's weights on disk.
        evaluation: see `Evaluation`.
        threads: of torch; as they are where None.
        code: Python files that are imported first, such as the one that holds the compressor; beside the recipe, or
            from the working directory.
    """

    name: str
    compressor: str | dict[str, dict[str, Any]]
    data: list[dict[str, Any]]
    steps: int
    model: str = "smollm2-135m"
    losses: dict[str, Any] = field(default_factory=dict)
    loss_options: dict[str, Any] = field(default_factory=dict)
    ratios: list[Any] = field(default_factory=list)
    warm_start: int = 0
    context_tokens: Any = 256
    target_tokens: int = 48
    window_tokens: int = 0
    batch_size: int = 4
    accumulate: int = 1
    max_seconds: float | None = None
    schedule_by: str = "steps"
    lr: float = 1e-3
    warmup_steps: int = 10
    final_lr: float = 0.0
    lr_factors: dict[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    clip: float = 1.0
    mixed_precision: str = "no"
    dtype: str = "auto"
    seed: int = 0
    log_every: int = 1
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    trackers: list[str] = field(default_factory=list)
    save_dtype: str = "bfloat16"
    evaluation: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None
    code: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, value in checked({f.name: getattr(self, f.name) for f in fields(self)}).items():
            object.__setattr__(self, name, value)

    @classmethod
    def read(cls, source: "str | Path | dict[str, Any] | Recipe") -> "Recipe":
        """From a YAML file or a mapping.

        Raises:
            InputError: keys that are unknown or missing, or values that cannot be.
        """
        if isinstance(source, Recipe):
            return source
        given = source if isinstance(source, dict) else read_mapping(Path(source))
        known = {f.name for f in fields(cls)}
        if unknown := sorted(map(str, set(given) - known)):
            raise InputError(f"unknown recipe key {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if missing := sorted({"name", "compressor", "data", "steps"} - set(given)):
            raise InputError(f"the recipe lacks {', '.join(missing)}")
        recipe = cls(**given)
        load_code(recipe.code, None if isinstance(source, dict) else Path(source).parent)
        return recipe

    def within(self, max_seconds: float) -> "Recipe":
        """The same with another limit of time.

        Raises:
            InputError: the limit is not above 0.
        """
        return replace(self, max_seconds=max_seconds)

    @property
    def longest_context(self) -> int:
        """The largest n that training reaches."""
        return max(tokens for _, tokens in points(self.context_tokens, "context_tokens"))

    def ratios_at(self, progress: float) -> list[int]:
        """What a step's ratio is drawn from; empty for the method's own."""
        return [ratios for start, ratios in choices(self.ratios, "ratios") if progress >= start][-1]

    @property
    def final_ratios(self) -> list[int]:
        """Those that the adapter is for; empty for the method's own."""
        return self.ratios_at(1.0)

    @property
    def loss_settings(self) -> LossOptions:
        return LossOptions(**self.loss_options)

    @property
    def evaluation_settings(self) -> Evaluation:
        return Evaluation(**self.evaluation)

    def make_compressor(self) -> LearnedCompressor:
        """The method with its options, bound to nothing; it starts from initial weights unless `adapter` is given.

        Raises:
            InputError: no such method, or options that it does not have.
        """
        given = self.compressor
        name, options = (given, {}) if isinstance(given, str) else next(iter(given.items()))
        if name not in available():
            raise InputError(f"no learned compressor is called {name!r}; there are {', '.join(available())}")
        options = {"adapter": "untrained", **checked_options(available()[name], options or {}, name)}
        if self.ratios and "ratio" not in options:
            options["ratio"] = self.final_ratios[0]
        lowest = min((ratio for _, ratios in choices(self.ratios, "ratios") for ratio in ratios), default=None)
        if lowest is not None and lowest < options.get("ratio", lowest) and hasattr(available()[name], "lowest_ratio"):
            options.setdefault("lowest_ratio", lowest)
        try:
            return available()[name](**options)
        except TypeError as error:
            raise InputError(f"{name} cannot take {options}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differs(self, other: dict[str, Any]) -> list[str]:
        """Keys in which a run of `other` could not go on as this."""
        own = self.to_dict()
        return sorted(key for key in own if key not in FREE and own[key] != other.get(key))
