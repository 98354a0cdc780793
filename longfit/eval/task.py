"""What a task is: it makes samples, and it scores an answer."""

from pathlib import Path
from typing import Any, ClassVar

from longfit.eval.sample import Sample


class Task:
    """One task of a suite. A subclass or an instance sets the attributes and writes `samples` and `score`.

    Attributes:
        suite, name: its names; together they are unique.
        metric: the field's name for the score.
        higher_is_better: false for perplexity and its kin.
        chance: the score of a random answer, where it is not 0.
        minimum_length: the shortest prompt in tokens that it makes sense for; None where the length is the data's own.
    """

    suite: ClassVar[str]
    name: str
    metric: str
    higher_is_better: bool = True
    chance: float = 0.0
    minimum_length: int | None = None

    def samples(
        self,
        tokenizer: Any,
        *,
        length: int,
        n: int,
        seed: int = 42,
        data: str | Path | None = None,
        chat: bool = True,
    ) -> list[Sample]:
        """`n` samples, the same for the same arguments; fewer only where the data hold fewer.

        Args:
            length: tokens of the prompt and the longest answer together.
            data: a local folder with the suite's inputs; None takes the public ones.
            chat: use the tokenizer's chat template where it has one.

        Raises:
            DataError: a data file is missing or broken.
            InputError: `length` is below what the task needs.
        """
        raise NotImplementedError

    def score(self, prediction: str, sample: Sample) -> float:
        """The score of the model's text, in 0..1 where higher is better."""
        raise NotImplementedError

    def settled(self, prediction: str, sample: Sample) -> bool:
        """Whether no further token can change the score, so that generation may stop without touching it."""
        return False
