"""RULER (Hsieh et al. 2024, arXiv:2404.06654), all 13 tasks, as NVIDIA/RULER's main branch generates and scores them.

With the same seed, tokenizer, inputs and template the texts and references are the original's, byte for byte:
``base`` for a tokenizer without a chat template, else a run whose template is that tokenizer's. Deviations:

- The prompt is tokenised in two parts, context and question. Where that makes it longer than the length, the sample
  takes the next smaller haystack; later samples stay the original's.
- Where the original loops for ever because its smallest haystack does not fit, `InputError` says what would.
- For one-answer needles the original also turns "are" into "is" in the chat template ("You is a helpful ..."); here
  the chat template stays as it is.
- The opening tokens that a tokenizer adds without a chat template (BOS) count against the length; the original does
  not count them.
- With a data set of fewer questions than samples asked for there are fewer samples (the original loops for ever).

lm-eval 0.4.13's port differs from both: docs/evaluation.md says where.
"""

from longfit.eval.ruler.tasks import TASKS, RulerTask, generate, score

__all__ = ["TASKS", "RulerTask", "generate", "score"]
