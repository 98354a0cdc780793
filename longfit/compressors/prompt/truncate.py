"""Both ends of the text: the baseline that every method has to beat."""

from dataclasses import dataclass

from longfit.compressors.prompt.base import PromptCompressor, Question
from longfit.compressors.prompt.passage import Passage
from longfit.compressors.prompt.units import words
from longfit.errors import InputError


@dataclass
class Truncate(PromptCompressor):
    """Keeps words from the start and from the end, as many tokens of each, and leaves out the middle.

    Source: LongBench's rule for prompts past the window (Bai et al. 2023), on whole words.

    Attributes (options):
        head_share: the part of what is kept that comes from the start; 0 keeps the end alone, 1 the start.
    """

    name = "truncate"
    source = "Bai et al. 2023, LongBench (middle truncation)"
    summary = "both ends of the text"
    scores = "nothing: the place in the text"

    head_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.head_share <= 1:
            raise InputError(f"{self.name}: head_share has to be from 0 to 1, got {self.head_share}")

    def choose(self, passage: Passage, free: list[bool], question: Question | None, room: int) -> list[int]:
        """See `PromptCompressor.choose`."""
        units = words(passage, free)
        head, first = 0, 0
        while first < len(units) and head + units[first].tokens <= int(room * self.head_share):
            head += units[first].tokens
            first += 1
        tail, last = 0, len(units)
        while last > first and head + tail + units[last - 1].tokens <= room:
            last -= 1
            tail += units[last].tokens
        if self.head_share == 1 or last == len(units):  # a word too long for the end: the start may go on
            while first < last and head + tail + units[first].tokens <= room:
                head += units[first].tokens
                first += 1
        return [place for unit in (*units[:first], *units[last:]) for place in range(*unit)]
