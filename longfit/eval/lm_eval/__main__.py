"""lm-eval's own command line, which then knows the model ``longfit``."""

from lm_eval.__main__ import cli_evaluate

from longfit.eval.lm_eval import register

register()
cli_evaluate()
