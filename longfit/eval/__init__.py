"""Evaluation: task data, sweeps that survive a kill, intervals and tables."""
