"""Late chunking: chunks whose embeddings, taken from the whole text, are near the question's."""

from dataclasses import dataclass

from longfit.compressors.prompt.base import Question
from longfit.compressors.prompt.budgets import best_sentences, by_score
from longfit.compressors.prompt.embedded import centred, contextual
from longfit.compressors.prompt.passage import Passage
from longfit.compressors.prompt.scored import Scored
from longfit.compressors.prompt.units import joined, sentences
from longfit.errors import InputError


@dataclass
class LateChunking(Scored):
    """Keeps the chunks of the highest cosine with the question, in the order of the text. The text is read before it is
    cut: a chunk's embedding is the mean of its tokens' states, which have seen what comes before.

    Source: Günther et al. 2024, "Late chunking: contextual chunk embeddings using long-context embedding models".

    Deviations: the embeddings are a causal LM's final hidden states, not an embedding model's, less their mean over the
    text; past the stretch that is read at once, a token sees the last quarter of a stretch before its own.

    Attributes (options):
        chunk_tokens: the longest chunk, of whole sentences.
    """

    name = "late_chunking"
    source = "Günther et al. 2024, Late chunking"
    summary = "chunks whose contextual embeddings are near the question's"
    scores = "chunks of sentences, by the cosine of mean hidden states with the question's"
    deviations = "the LM's own hidden states, centred, in place of an embedding model's"
    query_aware = True

    chunk_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_tokens < 1:
            raise InputError(f"{self.name}: chunk_tokens has to be at least 1, got {self.chunk_tokens}")

    def choose(self, passage: Passage, free: list[bool], question: Question | None, room: int) -> list[int]:
        """See `PromptCompressor.choose`."""
        assert question is not None
        lm = self.reader()
        units = joined(passage, sentences(passage, free, self.chunk_tokens), lambda *_: False, self.chunk_tokens)
        found = contextual(lm, self.ids_of(passage, units))
        asked = contextual(lm, [lm.encode(question.text)[: lm.stretch // 2]])
        mean = found.mean(0)
        scores = centred(found, mean) @ centred(asked, mean)[0]
        return best_sentences(passage, by_score(units, scores.tolist()), room)
