"""The suites and their tasks by name."""

import difflib
import importlib
from collections.abc import Mapping

from longfit.errors import UnknownNameError
from longfit.eval.task import Task

# suite -> (module, name of its mapping of tasks); a module is imported when its suite is asked for.
SUITES: Mapping[str, tuple[str, str]] = {
    "needle": ("longfit.eval.needle", "TASKS"),
    "ruler": ("longfit.eval.ruler", "TASKS"),
    "longbench": ("longfit.eval.longbench", "TASKS"),
    "longbench_e": ("longfit.eval.longbench", "E_TASKS"),
    "longbench_v2": ("longfit.eval.longbench", "V2_TASKS"),
    "perplexity": ("longfit.eval.perplexity", "TASKS"),
    "probes": ("longfit.eval.probes", "TASKS"),
}


def tasks_of(suite: str) -> dict[str, Task]:
    """The tasks of a suite, by name.

    Raises:
        UnknownNameError: there is no such suite.
    """
    if suite not in SUITES:
        raise UnknownNameError(f"unknown suite {suite!r}{_nearest(suite, list(SUITES))}")
    module, name = SUITES[suite]
    return dict(getattr(importlib.import_module(module), name))


def get_task(suite: str, name: str) -> Task:
    """One task.

    Raises:
        UnknownNameError: there is no such suite, or no such task in it.
    """
    tasks = tasks_of(suite)
    if name not in tasks:
        raise UnknownNameError(f"suite {suite} has no task {name!r}{_nearest(name, list(tasks))}")
    return tasks[name]


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} There are {', '.join(known)}" if hint else f"; there are {', '.join(known)}"
