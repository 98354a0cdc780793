"""Kernels of sparse decoding for NVIDIA GPUs and for CPUs with AVX-512, and plain torch where there is neither."""

from longfit.attention.kernels.dispatch import attend_slots, available, code_nearness, code_products, select_top

__all__ = ["attend_slots", "available", "code_nearness", "code_products", "select_top"]
