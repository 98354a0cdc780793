"""Benchmarks: longfit, plain `generate` and kvpress in turn, each cell in a fresh process."""

from longfit.bench.runner import run
from longfit.bench.table import render

__all__ = ["render", "run"]
