"""Semantic compression: what a text says about each of its topics, in fewer words."""

from dataclasses import dataclass
from itertools import zip_longest

import torch

from longfit.compressors.prompt.base import Kept, Question
from longfit.compressors.prompt.budgets import best_sentences, by_score
from longfit.compressors.prompt.embedded import centred, contextual
from longfit.compressors.prompt.passage import Passage
from longfit.compressors.prompt.scored import Scored
from longfit.compressors.prompt.topics import topics
from longfit.compressors.prompt.units import Unit, sentences, words
from longfit.errors import InputError

MOST_BLOCKS = 1024  # the graph has the square of them
EXTRACTIVE, WRITTEN = "extractive", "lm"
INSTRUCTION = "Summarise the following text in at most {words} words. Keep names, numbers and dates.\n\n"


@dataclass
class Semantic(Scored):
    """Cuts the text into blocks of sentences, links blocks of like meaning, takes the clusters of that graph for
    topics, and gives each topic its part of the budget.

    A topic's part goes to its most central sentences ("extractive"), or to a summary that the LM writes ("lm").

    Source: Fei et al. 2023, "Extending context window of large language models via semantic compression" (6 to 8
    times).

    Deviations: embeddings are the LM's own hidden states, not a sentence encoder's; the extractive form chooses by
    centrality (Erkan and Radev 2004, LexRank) where the paper has a summariser throughout; a written summary is the
    LM's, not DistilBART's, and each of its tokens stands for the start of its topic.

    Attributes (options):
        summaries: "extractive" or "lm".
        block_tokens: the longest block, of whole sentences (longer in texts of more than 1,024 blocks).
    """

    name = "semantic"
    source = "Fei et al. 2023, Semantic compression"
    summary = "the most central sentences of each topic, or a summary of it"
    scores = "sentences by centrality in their topic; topics are clusters of a graph of similar blocks"
    deviations = "the LM's hidden states for embeddings; extractive by default"
    default_ratio = 1 / 7

    summaries: str = EXTRACTIVE
    block_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.summaries not in (EXTRACTIVE, WRITTEN):
            raise InputError(f"{self.name}: summaries is {EXTRACTIVE} or {WRITTEN}, not {self.summaries!r}")
        if self.block_tokens < 1:
            raise InputError(f"{self.name}: block_tokens has to be at least 1, got {self.block_tokens}")

    def make(self, passage: Passage, free: list[bool], question: Question | None, room: int) -> Kept:
        """See `PromptCompressor.make`."""
        if self.summaries == EXTRACTIVE:
            return super().make(passage, free, question, room)
        made = Kept([], [])
        topics_found = self._topics(passage, free)
        for ranked, part in zip(topics_found, _parts(topics_found, room), strict=True):
            units = sorted(ranked)
            summary = self._summary("".join(passage.said(*unit) for unit in units), part)
            made.ids.extend(summary)
            made.places.extend([units[0].first] * len(summary))
        return made

    def choose(self, passage: Passage, free: list[bool], question: Question | None, room: int) -> list[int]:
        """See `PromptCompressor.choose`."""
        kept: set[int] = set()
        topics_found = self._topics(passage, free)
        for ranked, part in zip(topics_found, _parts(topics_found, room), strict=True):
            for unit in ranked:
                if unit.tokens <= part:
                    kept.update(range(*unit))
                    part -= unit.tokens
        # What no whole sentence of a topic fits into goes to the next best of any.
        rest = [unit for ranked in zip_longest(*topics_found) for unit in ranked if unit and unit.first not in kept]
        kept.update(best_sentences(passage, rest, room - len(kept)))
        return sorted(kept)

    def _topics(self, passage: Passage, free: list[bool]) -> list[list[Unit]]:
        """The sentences of each topic, the most central in front; topics in the order of the text."""
        units = sentences(passage, free)
        found = contextual(self.reader(), self.ids_of(passage, units)).cpu()
        mean = found.mean(0)
        most = max(self.block_tokens, -(-len(passage) // MOST_BLOCKS))
        owner = _blocks(units, most)
        blocks = torch.zeros(owner[-1] + 1, found.shape[1])
        sizes = torch.tensor([unit.tokens for unit in units], dtype=torch.float32)
        blocks.index_add_(0, torch.tensor(owner), (found - mean) * sizes[:, None])
        alike = torch.nn.functional.normalize(blocks, dim=-1)
        topic_of = topics((alike @ alike.T).clamp(min=0.0))
        by_topic: dict[int, list[int]] = {}
        for at, block in enumerate(owner):
            by_topic.setdefault(topic_of[block], []).append(at)
        groups = []
        for members in by_topic.values():
            own = centred(found[members], mean)
            scores = (own @ own.T).clamp(min=0.0).sum(1) - 1.0
            groups.append(by_score([units[at] for at in members], scores.tolist()))
        return groups

    def _summary(self, text: str, room: int) -> list[int]:
        """What the LM makes of a text, as whole words of at most `room` of the target's tokens."""
        lm = self.reader()
        most = max(16, lm.window // 2 - room)
        ids = lm.encode(text)
        parts = [ids[at : at + most] for at in range(0, len(ids), most)]
        said = []
        for part in parts:
            share = room // len(parts)
            said.append(lm.tokenizer.decode(lm.greedy(self._asking(part, share), share), skip_special_tokens=True))
        made = self._encoded("\n".join(line.strip() for line in said if line.strip()) + "\n")
        passage = Passage.of(self.tokenizer, made)
        stop = max((word.stop for word in words(passage, [True] * len(made)) if word.stop <= room), default=0)
        return made[:stop]

    def _asking(self, ids: list[int], room: int) -> list[int]:
        lm = self.reader()
        text = INSTRUCTION.format(words=max(5, room * 2 // 3)) + lm.tokenizer.decode(ids, skip_special_tokens=True)
        if getattr(lm.tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": text}]
            return lm.encode(lm.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        return [*lm.opening, *lm.encode(f"{text}\n\nSummary:")]


def _blocks(units: list[Unit], most: int) -> list[int]:
    """The block of each sentence: neighbours of at most `most` tokens together."""
    owner, number, held = [], -1, most
    for at, unit in enumerate(units):
        apart = at == 0 or units[at - 1].stop != unit.first
        if apart or held + unit.tokens > most:
            number, held = number + 1, 0
        held += unit.tokens
        owner.append(number)
    return owner


def _parts(topics_found: list[list[Unit]], room: int) -> list[int]:
    """Each topic's part of the room, by its tokens; together all of it."""
    sizes = [sum(unit.tokens for unit in units) for units in topics_found]
    ends = [round(room * sum(sizes[: at + 1]) / sum(sizes)) for at in range(len(sizes))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
