"""From records to numbers: scores with intervals, beside the full cache and truncation, with what they cost."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from longfit.eval.intervals import mean_interval, paired_difference, stratified_mean, wilson
from longfit.eval.records import read_records

__all__ = ["MEAN", "read_records", "summarise"]

Record = Mapping[str, Any]
Row = dict[str, Any]
MEAN = "mean"
HELD = ("tokens_in", "kept_tokens", "kv_bytes", "full_kv_bytes", "read_bytes_per_token")


def summarise(records: Iterable[Record], costs: Iterable[Record] = ()) -> list[Row]:
    """One row per (model, length, cell, task), and one with task "mean" over the tasks of a cell, if they are alike.

    ``score`` with its 95 % interval ``low``, ``high`` (see `intervals.mean_interval`); the mean over tasks weighs the
    tasks alike and bootstraps the samples within each. ``minus_full`` and ``minus_truncate`` are paired differences
    over the same samples, the second against truncation at the same budget. ``normalised`` is
    (score - no context) / (full - no context), None where the full cache does not beat no context.
    Costs are means over the samples that ran alone (of ``costs``, where ``records`` came from a shared prefill), the
    peak their maximum, and ratios are to the full cache on the same samples.
    """
    groups: dict[tuple[str, int, str], dict[str, dict[str, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        groups[_place(record)][record["task"]][record["sample"]] = record
    alone: dict[tuple[str, int, str], dict[str, Record]] = defaultdict(dict)
    apart = list(costs) or [r for tasks in groups.values() for group in tasks.values() for r in group.values()]
    for record in apart:
        if not record["shared_prefill"]:
            alone[_place(record)].setdefault(record["sample"], record)
    rows = []
    for place, tasks in groups.items():
        model, length, _ = place
        full, nothing = groups.get((model, length, "full"), {}), groups.get((model, length, "no_context"), {})
        cut = groups.get((model, length, f"truncate-{_budget_of(tasks)}"), {})
        spent = _spent(alone.get(place, {}), alone.get((model, length, "full"), {}))
        common = _common(place, tasks)
        for task, group in tasks.items():
            scored = _scores({task: group}, full, nothing, cut)
            rows.append(common | {"task": task} | scored | _held(group.values()) | spent)
        if len({record["higher_is_better"] for group in tasks.values() for record in group.values()}) > 1:
            continue  # a mean of accuracies and likelihoods says nothing
        everything = [record for group in tasks.values() for record in group.values()]
        scored = _scores(tasks, full, nothing, cut)
        rows.append(common | {"task": MEAN} | scored | _held(everything) | spent)
    return rows


def _place(record: Record) -> tuple[str, int, str]:
    return record["model"], record["length"], record["cell"]


def _first(tasks: Mapping[str, Mapping[str, Record]]) -> Record:
    return next(iter(next(iter(tasks.values())).values()))


def _budget_of(tasks: Mapping[str, Mapping[str, Record]]) -> str:
    return str(_first(tasks)["budget"]).replace(" ", "")


def _common(place: tuple[str, int, str], tasks: Mapping[str, Mapping[str, Record]]) -> Row:
    first, (model, length, cell) = _first(tasks), place
    names = ("method", "options", "budget", "keep_ratio", "awareness", "chunk_tokens")
    common = {"model": model, "length": length, "cell": cell} | {name: first[name] for name in names}
    return common | {"attention": first.get("attention")}


def _scores(
    tasks: Mapping[str, Mapping[str, Record]],
    full: Mapping[str, Mapping[str, Record]],
    nothing: Mapping[str, Mapping[str, Record]],
    cut: Mapping[str, Mapping[str, Record]],
) -> Row:
    values = {task: [float(r["score"]) for r in group.values()] for task, group in tasks.items()}
    score, low, high = mean_interval(next(iter(values.values()))) if len(values) == 1 else stratified_mean(values)
    n = sum(map(len, values.values()))
    if low == high and score in (0, 1):
        low, high = wilson(round(score * n), n)  # every sample alike: a bootstrap would claim certainty
    first = _first(tasks)
    row: Row = {"metric": first["metric"], "higher_is_better": first["higher_is_better"]}
    row |= {"n": n, "score": score, "low": low, "high": high}
    for name, other in (("full", full), ("truncate", cut)):
        mean, below, above = _difference(tasks, other)
        row |= {f"minus_{name}": mean, f"minus_{name}_low": below, f"minus_{name}_high": above}
    return row | {"normalised": _normalised(tasks, full, nothing)}


def _difference(
    ours: Mapping[str, Mapping[str, Record]], theirs: Mapping[str, Mapping[str, Record]]
) -> tuple[float | None, float | None, float | None]:
    """Ours minus theirs on the samples that both have; None unless every task has some."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for task, group in ours.items():
        other = theirs.get(task, {})
        both = sorted(group.keys() & other.keys())
        pairs[task] = [(float(group[s]["score"]), float(other[s]["score"])) for s in both]
    if not pairs or not all(pairs.values()):
        return None, None, None
    if len(pairs) == 1:
        (only,) = pairs.values()
        return paired_difference([a for a, _ in only], [b for _, b in only])
    return stratified_mean({task: [a - b for a, b in given] for task, given in pairs.items()})


def _normalised(
    ours: Mapping[str, Mapping[str, Record]],
    full: Mapping[str, Mapping[str, Record]],
    nothing: Mapping[str, Mapping[str, Record]],
) -> float | None:
    if not all(full.get(task) and nothing.get(task) for task in ours):
        return None
    means = [
        sum(_mean([float(r["score"]) for r in given[task].values()]) or 0.0 for task in ours)
        for given in (ours, full, nothing)
    ]
    here, top, floor = means
    better = top > floor if _first(ours)["higher_is_better"] else top < floor
    return (here - floor) / (top - floor) if better else None


def _held(records: Iterable[Record]) -> Row:
    given = list(records)
    return {name: _mean([r.get(name) for r in given]) for name in HELD}


def _spent(ours: Mapping[str, Record], full: Mapping[str, Record]) -> Row:
    """Peak, seconds, and their ratios to the full cache, of the samples that ran alone."""
    row: Row = {"peak_bytes": _highest([r["peak_bytes"] for r in ours.values()])}
    row["prefill_seconds"] = _mean([r["prefill_seconds"] for r in ours.values()])
    row["decode_seconds_per_token"] = _per_token(ours.values())
    both = sorted(ours.keys() & full.keys())
    mine, theirs = [ours[s] for s in both], [full[s] for s in both]
    prefill = (_mean([r["prefill_seconds"] for r in mine]), _mean([r["prefill_seconds"] for r in theirs]))
    decode = (_per_token(mine), _per_token(theirs))
    for name, (a, b) in (("prefill_ratio", prefill), ("decode_ratio", decode)):
        row[name] = a / b if a is not None and b else None
    return row


def _per_token(records: Iterable[Record]) -> float | None:
    """Seconds of a decoded token after the first, over all records."""
    given = [r for r in records if r["new_tokens"] > 1]
    tokens = sum(r["new_tokens"] - 1 for r in given)
    return sum(r["decode_seconds"] for r in given) / tokens if tokens else None


def _highest(values: list[Any]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _mean(values: list[Any]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
