"""What the methods share that score with a language model."""

from dataclasses import dataclass
from typing import Any

from longfit.compressors.prompt.base import PromptCompressor
from longfit.compressors.prompt.lm import STRETCH_TOKENS, checked_scorer


@dataclass
class Scored(PromptCompressor):
    """Base of the methods that read the text with a causal LM.

    Attributes (options):
        scorer: the LM that scores, by a name that `longfit.load` takes or as a pair (model, tokenizer); the model
            itself by default. It may have another tokenizer than the model.
    """

    reads = True
    held_tokens = STRETCH_TOKENS

    scorer: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scorer = checked_scorer(self.scorer, self.name)
