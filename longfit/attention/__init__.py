"""Attention functions, through transformers' own interface."""

from longfit.attention.bounded import NAMES, register

register()

__all__ = ["NAMES", "register"]
