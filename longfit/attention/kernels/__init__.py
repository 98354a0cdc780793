"""Kernels of sparse decoding for NVIDIA GPUs, and plain torch where there is none."""

from longfit.attention.kernels.dispatch import attend_slots, available, code_nearness, code_products, select_top

__all__ = ["attend_slots", "available", "code_nearness", "code_products", "select_top"]
