"""Scores by a property of the samples: LongBench-E's length buckets, LongBench v2's difficulties and lengths."""

from collections.abc import Mapping, Sequence
from typing import Any

from longfit.eval.report.document import Block, Heading, Table
from longfit.eval.report.series import ENDS, Condition, Row, budgets_of, by_series
from longfit.eval.report.tables import score
from longfit.eval.summary import MEAN, summarise

OVERALL = "overall"
# suite -> detail of a sample -> its values in the official order
GROUPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "longbench_e": {"bucket": ("0-4k", "4-8k", "8k+")},
    "longbench_v2": {"difficulty": ("easy", "hard"), "length_category": ("short", "medium", "long")},
}
TITLES = {"longbench_e": "LongBench-E by length in words", "longbench_v2": "LongBench v2 by difficulty and length"}


def group_rows(records: Sequence[dict[str, Any]]) -> list[Row]:
    """Rows as `summarise` gives them, over the samples of each group, with ``suite``, ``detail`` and ``group``.

    Group "overall" is all samples of the suite. Empty for a run without such a suite.
    """
    rows: list[Row] = []
    for suite, details in GROUPS.items():
        ours = [record for record in records if record["suite"] == suite]
        parts = [("", OVERALL, ours)]
        for detail, groups in details.items():
            parts += [(detail, g, [r for r in ours if r["details"].get(detail) == g]) for g in groups]
        for detail, group, chosen in parts:
            mark = {"suite": suite, "detail": detail, "group": group}
            rows += [mark | row for row in summarise(chosen)]
    return rows


def group_blocks(condition: Condition, rows: Sequence[Row]) -> list[Block]:
    """For each suite its tables by budget: methods down, groups across; a table a task where there are several."""
    blocks: list[Block] = []
    here = [row for row in rows if (row["model"], row["length"]) == (condition.model, condition.length)]
    for suite, details in GROUPS.items():
        ours = [row for row in here if row["suite"] == suite]
        if not ours:
            continue
        groups = [OVERALL, *(group for found in details.values() for group in found)]
        present = {row["group"] for row in ours}
        tasks = list(dict.fromkeys(row["task"] for row in ours if row["task"] != MEAN))
        blocks.append(Heading(TITLES[suite], 3))
        for task in [MEAN, *tasks] if len(tasks) > 1 else tasks:
            chosen = [row for row in ours if row["task"] == task]
            blocks.append(_table(task, chosen, [group for group in groups if group in present]))
    return blocks


def _table(task: str, rows: Sequence[Row], groups: Sequence[str]) -> Table:
    lines = []
    for series, found in by_series(rows).items():
        for budget in ["100%"] if series.method in ENDS else budgets_of(found):
            scores = {row["group"]: score(row) for row in found if row["budget"] == budget}
            lines.append((series.label, series.question, budget, *(scores.get(group, "") for group in groups)))
    counts = {group: max((row["n"] for row in rows if row["group"] == group), default=0) for group in groups}
    what = "Mean over the tasks that have samples of a group" if task == MEAN else f"Task {task}"
    n = ", ".join(f"{group} {count}" for group, count in counts.items())
    caption = f"{what}, per cent, with the 95 % interval; empty where a group has no sample. n: {n}."
    return Table(("method", "question", "budget", *groups), tuple(lines), 3, caption)
