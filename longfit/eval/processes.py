"""Workers of a sweep: fresh processes that hold its lock as long as they live."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from longfit.errors import LongfitError
from longfit.eval.records import write_atomically

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(LongfitError, RuntimeError):
    """A worker of a sweep ended without having done its samples."""


def run_worker(job: dict[str, Any], job_file: Path, threads: int | None, locks: list[int]) -> None:
    """Run `longfit.eval.worker` on a job and wait for it.

    Args:
        job: see `longfit.eval.worker.main`; written to `job_file` for the worker to read.
        locks: file descriptors of the folder's locks: the worker inherits them, so that no other sweep can start there
            while a worker outlives a killed one.

    Raises:
        WorkerError: it failed; the message ends with its own last line.
    """
    write_atomically(job_file, json.dumps(job))
    command = [sys.executable, "-m", "longfit.eval.worker", str(job_file)]
    done = subprocess.run(command, env=_environment(threads), stderr=subprocess.PIPE, text=True, pass_fds=locks)
    if done.returncode < 0:
        raise WorkerError(f"the worker was killed by signal {-done.returncode} (out of memory?)")
    if done.returncode:
        raise WorkerError(done.stderr.strip() or f"the worker ended with exit code {done.returncode}")
    job_file.unlink(missing_ok=True)


def _environment(threads: int | None) -> dict[str, str]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if threads:
        environment |= {name: str(threads) for name in THREAD_VARIABLES}
    source = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, environment.get("PYTHONPATH")]))
    return environment
