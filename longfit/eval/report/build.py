"""A run's report: its blocks and plots in order, and the files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longfit.eval.report import markdown, page
from longfit.eval.report.document import Block, Heading, Listing, Report
from longfit.eval.report.figure import Plot, save, style
from longfit.eval.report.files import write_atomically, write_rows
from longfit.eval.report.groups import group_blocks, group_rows
from longfit.eval.report.kept_map import kept_plots
from longfit.eval.report.load import Run, conditions, load
from longfit.eval.report.needle_map import needle_plots
from longfit.eval.report.position_plot import position_plots
from longfit.eval.report.quality_plots import pareto_plot, quality_plot
from longfit.eval.report.series import Condition, Row, conditions_of
from longfit.eval.report.tables import cost_table, mean_blocks, task_blocks
from longfit.eval.report.task_plots import task_plots


def report(folder: str | Path, output: str | Path | None = None) -> Report:
    """Write report.md, report.html, summary.csv, summary.json and plots/ into ``output``, by default the run folder.

    A run of LongBench-E or v2 also has groups.csv and groups.json, its scores by length and difficulty.

    Raises:
        InputError: the folder holds no run or no finished sample, a file in it is damaged, or matplotlib is absent.
    """
    run = load(folder)
    return write_run(run, Path(output) if output is not None else run.folder)


def write_run(run: Run, output: Path) -> Report:
    """The report of a run in memory, written into ``output``."""
    title = str(run.config.get("name") or run.folder.name)
    blocks: list[Block] = [Heading(title, 1), Heading("Conditions", 2), Listing(conditions(run))]
    groups = group_rows(run.records)
    with style():
        plots: list[Plot] = []
        for condition in conditions_of(run.rows):
            found, drawn = _condition(condition, run, groups)
            blocks += found
            plots += drawn
        needles = needle_plots(run.records)
        if needles:
            blocks += [Heading("Needles by depth", 2), *(plot.picture for plot in needles)]
        written = write_rows(output, groups, "groups") if groups else []
        made = write(title, blocks, [*plots, *needles], run.rows, output)
        return Report(made.markdown, [*written, *made.files])


def _condition(condition: Condition, run: Run, groups: list[Row]) -> tuple[list[Block], list[Plot]]:
    above = [plot for plot in (quality_plot(condition), pareto_plot(condition)) if plot]
    tasks = task_plots(condition)
    details = [*kept_plots(condition, run.kept), *position_plots(condition, run.records)]
    blocks: list[Block] = [Heading(condition.title, 2), *mean_blocks(condition), *(plot.picture for plot in above)]
    blocks += [Heading("Costs", 3), cost_table(condition)]
    blocks += group_blocks(condition, groups)
    blocks += [*task_blocks(condition), *(plot.picture for plot in [*tasks, *details])]
    return blocks, [*above, *tasks, *details]


def write(
    title: str, blocks: Sequence[Block], plots: Sequence[Plot], rows: Sequence[dict[str, Any]], output: Path
) -> Report:
    """All files of a report; the documents last, so that what they show is there."""
    files = write_rows(output, rows)
    for plot in plots:
        files += save(plot, output)
    text = markdown.render(blocks)
    files.append(write_atomically(output / "report.html", page.render(title, blocks, output)))
    files.append(write_atomically(output / "report.md", text))
    return Report(text, files)
