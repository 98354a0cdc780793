"""What a run says while it goes: metrics.jsonl always, accelerate's trackers where wanted, a progress bar."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from tqdm.auto import tqdm

from longfit.errors import InputError
from longfit.training.files import append_line

TRACKERS = ("tensorboard", "wandb", "trackio")
LOG = "metrics.jsonl"


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that are unknown or not installed.

    Raises:
        InputError: which, and what installs them.
    """
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"no tracker is called {name!r}; there are {', '.join(TRACKERS)}")
        if name not in map(str, get_available_trackers()):
            raise InputError(f"the tracker {name} is not installed: pip install {name}")


class Metrics:
    """The metrics of one run; only the main process writes.

    Args:
        folder: of the run.
        start: the step that the run goes on from; total: the last one.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, start: int, total: int, quiet: bool) -> None:
        self.folder, self.accelerator = folder, accelerator
        hidden = quiet or not accelerator.is_main_process
        self.bar: Any = tqdm(total=total, initial=start, unit="step", disable=hidden, dynamic_ncols=True)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and its numbers to the trackers."""
        if not values or not self.accelerator.is_main_process:
            return
        append_line(self.folder / LOG, {"step": step, **values})
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=step)

    def step(self, loss: float) -> None:
        """One more step is done."""
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        self.accelerator.end_training()
