"""From a run folder to tables, plots and one HTML page; and two runs side by side."""

from longfit.eval.report.build import report
from longfit.eval.report.compare import compare
from longfit.eval.report.document import Report

__all__ = ["Report", "compare", "report"]
