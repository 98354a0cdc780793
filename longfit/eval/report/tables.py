"""The tables of a run: means over tasks, tasks at each budget, differences, costs."""

from collections.abc import Callable, Sequence
from functools import partial

from longfit.eval.cells import BASELINES
from longfit.eval.report.document import Block, Heading, Table, Text
from longfit.eval.report.series import (
    ENDS,
    MIB,
    Condition,
    Row,
    at_budget,
    budgets_of,
    by_series,
    counts,
    end,
    series_of,
    shown_value,
)


def score(row: Row, interval: bool = True) -> str:
    """``54.2 [50.1, 58.3]`` in per cent, or nats a token with three decimals."""
    digits = 1 if row["higher_is_better"] else 3
    mean = f"{shown_value(row, row['score']):.{digits}f}"
    if not interval or row["low"] is None:
        return mean
    return f"{mean} [{shown_value(row, row['low']):.{digits}f}, {shown_value(row, row['high']):.{digits}f}]"


def difference(row: Row, other: str, interval: bool = True) -> str:
    """The paired difference from ``other`` ("full" or "truncate"), bold where its interval excludes 0."""
    mean, low, high = (row[f"minus_{other}{part}"] for part in ("", "_low", "_high"))
    return "" if mean is None else marked(mean, low, high, row["higher_is_better"], interval)


def marked(mean: float, low: float, high: float, higher_is_better: bool, interval: bool = True) -> str:
    """A difference with its sign, in points or nats, bold where its interval excludes 0."""
    scale, digits = (100, 1) if higher_is_better else (1, 3)
    text = f"{scale * mean:+.{digits}f}"
    if interval:
        text += f" [{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def mean_blocks(condition: Condition) -> list[Block]:
    """Score, minus full and minus truncation of the mean over tasks: methods down, budgets across."""
    means = condition.means()
    if not means:
        return [Text("No mean over tasks: their scores have different units. The tasks stand below.")]
    what = "Mean over the tasks" if len(condition.tasks) > 1 else f"Task {condition.tasks[0]}"
    unit = "per cent" if means[0]["higher_is_better"] else "nats a token, lower is better"
    ends = "; ".join(f"{name.replace('_', ' ')} {score(row)}" for name in ENDS if (row := end(means, name)))
    caption = f"{what}, {unit}, with the 95 % interval; {counts(means)}." + (f" For scale: {ends}." if ends else "")
    blocks: list[Block] = [_by_budget(means, score, caption)]
    if any(row["minus_full"] is not None for row in means if row["method"] not in ENDS):
        blocks.append(
            _by_budget(means, lambda row: difference(row, "full"), f"Minus full cache, paired. {_bold(means)}")
        )
    if any(row["minus_truncate"] is not None for row in means if row["method"] not in BASELINES):
        chosen = [row for row in means if row["method"] != "truncate"]
        caption = f"Minus truncation to the same size, paired. {_bold(means)}"
        blocks.append(_by_budget(chosen, lambda row: difference(row, "truncate"), caption))
    if any(row["normalised"] is not None for row in means if row["method"] not in ENDS):
        caption = "Normalised, per cent: (score - no context) / (full - no context)."
        blocks.append(_by_budget(means, _normalised, caption))
    return blocks


def _bold(rows: Sequence[Row]) -> str:
    unit = "Points" if rows[0]["higher_is_better"] else "Nats a token"
    return f"{unit}; bold where the 95 % interval excludes 0."


def _normalised(row: Row) -> str:
    return "" if row["normalised"] is None else f"{100 * row['normalised']:.0f}"


def _by_budget(rows: Sequence[Row], show: Callable[[Row], str], caption: str) -> Table:
    budgets = budgets_of(rows)
    lines = []
    for series, group in by_series(row for row in rows if row["method"] not in ENDS).items():
        found = {row["budget"]: show(row) for row in group}
        lines.append((series.label, series.question, *(found.get(budget, "") for budget in budgets)))
    return Table(("method", "question", *(f"{budget} kept" for budget in budgets)), tuple(lines), 2, caption)


def task_blocks(condition: Condition) -> list[Block]:
    """For each budget one wide table a view: methods down, tasks across. Empty where there is one task."""
    if len(condition.tasks) < 2:
        return []
    blocks: list[Block] = []
    for budget in budgets_of(condition.rows) or ["100%"]:
        rows = at_budget(condition.rows, budget)
        blocks.append(Heading(f"Tasks at {budget}", 3))
        caption = f"Scores with the 95 % interval; {counts(row for row in rows if row['task'] != 'mean')} a task."
        blocks.append(_by_task(condition, rows, score, caption))
        for other, name in (("full", "full cache"), ("truncate", "truncation to the same size")):
            left_out = ENDS if other == "full" else BASELINES
            chosen = [row for row in rows if row["method"] not in left_out]
            if any(row[f"minus_{other}"] is not None for row in chosen):
                caption = f"Minus {name}, paired; bold where the 95 % interval excludes 0."
                blocks.append(_by_task(condition, chosen, partial(difference, other=other, interval=False), caption))
    return blocks


def _by_task(condition: Condition, rows: Sequence[Row], show: Callable[[Row], str], caption: str) -> Table:
    tasks = [*(["mean"] if any(row["task"] == "mean" for row in rows) else []), *condition.tasks]
    lines = []
    for series, group in by_series(rows).items():
        found = {row["task"]: show(row) for row in group}
        lines.append((series.label, series.question, *(found.get(task, "") for task in tasks)))
    return Table(("method", "question", *tasks), tuple(lines), 2, caption)


def cost_table(condition: Condition) -> Table:
    """What each cell read, kept and took; ratios are to the full cell of the same run."""
    lines = []
    rows = condition.means() or condition.of(condition.tasks[0])
    for budget in [None, *budgets_of(rows)]:
        chosen = [row for row in rows if row["method"] in ENDS] if budget is None else at_budget(rows, budget)
        for row in chosen:
            if budget is None or row["method"] not in ENDS:
                lines.append(_cost(row))
    sizes = ("tokens in", "kept tokens", "KV MiB", "peak MiB")
    times = ("prefill s", "prefill ratio", "decode s/token", "decode ratio")
    caption = (
        "Means over samples, the peak their maximum. Kept tokens are per layer, averaged over heads; peak MiB and "
        "seconds come from samples that ran alone; ratios are to full cache in the same run."
    )
    return Table(("method", "question", "budget", *sizes, *times), tuple(lines), 3, caption)


def _cost(row: Row) -> tuple[str, ...]:
    series = series_of(row)
    numbers = (
        (row["tokens_in"], "{:,.0f}"),
        (row["kept_tokens"], "{:,.0f}"),
        (_mib(row["kv_bytes"]), "{:,.2f}"),
        (_mib(row["peak_bytes"]), "{:,.1f}"),
        (row["prefill_seconds"], "{:.2f}"),
        (row["prefill_ratio"], "{:.2f}"),
        (row["decode_seconds_per_token"], "{:.4f}"),
        (row["decode_ratio"], "{:.2f}"),
    )
    shown = ("" if number is None else form.format(number) for number, form in numbers)
    return series.label, series.question, row["budget"], *shown


def _mib(value: float | None) -> float | None:
    return None if value is None else value / MIB
