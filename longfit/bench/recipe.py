"""What a benchmark recipe (YAML) may say, and its checks."""

import difflib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from longfit.bench.kvpress_worker import PRESSES
from longfit.errors import InputError
from longfit.units import parse_tokens
from longfit.yaml_file import read_mapping

MEASURES = ("time", "memory")
STATISTICS = ("median", "min")
DTYPES = ("float32", "bfloat16", "float16")
LIMITS = ("speedup_at_least", "ratio_at_most", "value_at_most")


@dataclass(frozen=True)
class Target:
    """A bound to meet, on `metric` of `system` at `length`.

    Exactly one limit: `speedup_at_least` (reference / system), `ratio_at_most` (system / reference) or
    `value_at_most` (the metric itself). The reference is the baseline at the same length, or the same system
    at `reference_length`.
    """

    metric: str
    system: str
    length: int
    speedup_at_least: float | None = None
    ratio_at_most: float | None = None
    value_at_most: float | None = None
    reference_length: int | None = None


@dataclass(frozen=True)
class Recipe:
    """One benchmark: every system at every length, `repeats` times, each in a fresh process.

    `only` limits a length to some systems; `repeats` is a number or one per length; `environment` is set for
    the workers (malloc settings for memory cells); `options` are constructor arguments per system.
    """

    name: str
    model: str
    kept: str
    lengths: list[int]
    systems: list[str]
    measure: str = "time"
    dtype: str = "float32"
    threads: int = 2
    baseline: str = "plain"
    repeats: int | dict[int, int] = 3
    new_tokens: int = 1
    chunk_tokens: int | None = None
    prefill_chunk_size: int = 1024
    statistic: str = "median"
    timeout_seconds: int = 7200
    only: dict[int, list[str]] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    target: list[Target] = field(default_factory=list)

    @property
    def kept_tokens(self) -> int:
        return parse_tokens(self.kept)

    def repeats_at(self, length: int) -> int:
        """How often each system runs at `length`."""
        return self.repeats if isinstance(self.repeats, int) else self.repeats[length]

    def systems_at(self, length: int) -> list[str]:
        """The systems that run at `length`, in the recipe's order."""
        allowed = self.only.get(length, self.systems)
        return [system for system in self.systems if system in allowed]

    def cells(self) -> list[tuple[str, int, int]]:
        """(system, length, repeat) in running order: the systems in turn, each round led by another one."""
        order = []
        for length in self.lengths:
            systems = self.systems_at(length)
            for repeat in range(self.repeats_at(length)):
                shift = repeat % len(systems)
                order += [(system, length, repeat) for system in systems[shift:] + systems[:shift]]
        return order

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file.

    Raises `InputError`, naming the field and what would work.
    """
    path = Path(path)
    content = read_mapping(path)
    return check_recipe(content, str(path))


def check_recipe(content: dict[str, Any], source: str) -> Recipe:
    """The recipe of a parsed mapping; `source` names it in errors. Raises `InputError`."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise InputError(f"{source}: {message}")

    known = {one.name for one in fields(Recipe)}
    for name in content:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
        require(name in known, f"unknown field {name!r}{hint}")
    for name in ("name", "model", "kept", "lengths", "systems"):
        require(bool(content.get(name)), f"the field {name!r} is missing")
    content = dict(content)
    targets = content.pop("target", None) or []
    require(isinstance(targets, list), "target must be a list of bounds")
    recipe = Recipe(**content, target=[_target(entry, require) for entry in targets])

    recipe.kept_tokens  # noqa: B018 - raises InputError for an unreadable size
    for name, choices in (("measure", MEASURES), ("dtype", DTYPES), ("statistic", STATISTICS)):
        value = getattr(recipe, name)
        require(value in choices, f"{name} is {value!r}; choose one of {', '.join(choices)}")
    require(_positive_integers(recipe.lengths), "lengths must be a list of whole numbers of tokens, e.g. [4096]")
    for name in ("threads", "new_tokens", "prefill_chunk_size", "timeout_seconds"):
        require(_positive_integers([getattr(recipe, name)]), f"{name} must be a whole number of at least 1")
    repeats = recipe.repeats
    counts = list(repeats.values()) if isinstance(repeats, dict) else [repeats]
    require(_positive_integers(counts), "repeats must be a whole number of at least 1, or one for each length")
    for length in recipe.lengths:
        require(not isinstance(repeats, dict) or length in repeats, f"repeats has no entry for length {length}")
    require(isinstance(recipe.systems, list), "systems must be a list, e.g. [plain, longfit:snapkv]")
    for system in recipe.systems:
        _check_system(system, require)
    require(recipe.baseline in recipe.systems, f"the baseline {recipe.baseline!r} is not among the systems")
    for length, systems in recipe.only.items():
        require(length in recipe.lengths, f"only names length {length}, which is not among the lengths")
        for system in systems:
            require(system in recipe.systems, f"only names {system!r}, which is not among the systems")
        require(bool(systems), f"only leaves length {length} without a system")
    for system in recipe.options:
        require(system in recipe.systems, f"options names {system!r}, which is not among the systems")
    for target in recipe.target:
        require(target.system in recipe.systems, f"a target names {target.system!r}, not among the systems")
        for tokens in {target.length, target.reference_length} - {None}:
            require(tokens in recipe.lengths, f"a target names length {tokens}, which is not measured")
    return recipe


def _target(entry: Any, require: Any) -> Target:
    known = {one.name for one in fields(Target)}
    require(isinstance(entry, dict) and set(entry) <= known, f"a target may only have {', '.join(sorted(known))}")
    for name in ("metric", "system", "length"):
        require(name in entry, f"a target lacks {name!r}")
    limits = [name for name in LIMITS if name in entry]
    require(len(limits) == 1, f"a target needs exactly one of {', '.join(LIMITS)}")
    return Target(**entry)


def _positive_integers(values: Any) -> bool:
    if not isinstance(values, list) or not values:
        return False
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 1 for value in values)


def _check_system(system: Any, require: Any) -> None:
    require(isinstance(system, str), f"system {system!r} must be a text such as longfit:snapkv")
    if system in ("plain", "plain_chunked"):
        return
    kind, _, name = system.partition(":")
    require(
        kind in ("longfit", "kvpress") and bool(name),
        f"unknown system {system!r}; write plain, plain_chunked, longfit:<method> or kvpress:<press>",
    )
    if kind == "kvpress":
        available = list(PRESSES)
    else:
        from longfit import compressors

        available = list(compressors.available_kv())
    near = difflib.get_close_matches(name, available, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(available)}"
    require(name in available, f"{kind} has no {name!r}; {hint}")
