"""LongBench (Bai et al. 2023, arXiv:2308.14508), LongBench-E and LongBench v2 (Bai et al. 2024, arXiv:2412.15204)."""

from longfit.eval.longbench.tasks import E_TASKS, TASKS, V2_TASKS, generate, means_by, score
from longfit.eval.longbench.v2 import compensated, extract_answer

__all__ = ["E_TASKS", "TASKS", "V2_TASKS", "compensated", "extract_answer", "generate", "means_by", "score"]
