"""The suites and their tasks by name."""

import importlib
from collections.abc import Mapping

from longfit.errors import UnknownNameError
from longfit.eval.names import nearest
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
    """The tasks of a suite, by name. A suite of one's own is `module:MAPPING`, such as `my_tasks:TASKS`.

    Raises:
        UnknownNameError: there is no such suite.
    """
    if ":" not in suite and suite not in SUITES:
        raise UnknownNameError(f"unknown suite {suite!r}{nearest(suite, SUITES)}")
    module, _, name = suite.partition(":") if ":" in suite else (SUITES[suite][0], "", SUITES[suite][1])
    try:
        return dict(getattr(importlib.import_module(module), name))
    except (ModuleNotFoundError, AttributeError, TypeError) as error:
        if suite in SUITES:
            raise
        raise UnknownNameError(f"suite {suite!r} is not a mapping in a module that can be imported: {error}") from error


def get_task(suite: str, name: str) -> Task:
    """One task.

    Raises:
        UnknownNameError: there is no such suite, or no such task in it.
    """
    tasks = tasks_of(suite)
    if name not in tasks:
        raise UnknownNameError(f"suite {suite} has no task {name!r}{nearest(name, tasks)}")
    return tasks[name]
