"""Sweeps that are killed, and workers that fail or outlive them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from longfit.errors import InputError
from longfit.eval import records, sweep
from tests.tiny_sweep import RECIPE, folder_of_tiny, lines, loaded_tiny, own_cache  # noqa: F401


def test_each_cell_runs_in_a_fresh_process_with_the_same_result(tmp_path, loaded, model_folder):
    recipe = RECIPE | {"models": [model_folder], "n": 1, "tasks": ["niah_single"], "cells": RECIPE["cells"][:2]}
    sweep.run(recipe, tmp_path / "alone")
    sweep.run(recipe, tmp_path / "here", loaded=loaded)
    alone, here = lines(tmp_path / "alone"), lines(tmp_path / "here")
    same = ("model", "cell", "sample", "answer", "kept_tokens", "sha256")
    assert [{k: r[k] for k in same} for r in alone] == [{k: r[k] for k in same} for r in here]
    assert not list((tmp_path / "alone").glob(".job*"))


def test_a_worker_that_fails_is_reported_with_its_own_words(tmp_path, model_folder):
    cells = [{"methods": ["full"]}, {"methods": ["snapkv"], "budgets": ["3 tokens"], "awareness": ["agnostic"]}]
    recipe = RECIPE | {"models": [model_folder], "n": 1, "tasks": ["niah_single"], "cells": cells}
    with pytest.raises(sweep.SweepError, match=r"1 cells failed.*BudgetError"):
        sweep.run(recipe, tmp_path)
    assert [record["cell"] for record in lines(tmp_path)] == ["full"]


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
import tiny_sweep as t
from longfit.eval import sweep, worker
from tests.test_needle import byte_tokenizer
answer = worker.answer
worker.answer = lambda *given: time.sleep(0.05) or answer(*given)
sweep.run(t.RECIPE | {"n": 12}, sys.argv[1], loaded=(t.tiny_model(), byte_tokenizer()))
"""


def test_a_killed_process_loses_at_most_the_sample_it_was_at(tmp_path, loaded):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", KILLED, str(tmp_path), os.path.dirname(__file__)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    file, deadline = tmp_path / "samples.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (file.exists() and file.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    finished = {records.key_of(record) for record in records.read_records(tmp_path)}
    assert len(finished) >= 5
    sweep.run(RECIPE | {"n": 12}, tmp_path, loaded=loaded, limit=2)
    pairs = [records.key_of(record) for record in lines(tmp_path)]
    assert len(pairs) == len(set(pairs)) and finished <= set(pairs)


def test_a_worker_that_outlives_a_killed_sweep_keeps_the_folder_locked(tmp_path):
    code = "import sys, time; print('up', flush=True); time.sleep(60)"
    with records.locked(tmp_path, "") as locks:
        child = subprocess.Popen([sys.executable, "-c", code], pass_fds=locks, stdout=subprocess.PIPE)
        child.stdout.readline()
    try:
        with pytest.raises(InputError, match="another sweep"), records.locked(tmp_path, ""):
            pass
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    with records.locked(tmp_path, ""):
        pass
