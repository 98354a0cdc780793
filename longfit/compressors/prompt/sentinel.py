"""Sentinel: sentences that a small model's attention says are needed for the answer."""

from dataclasses import dataclass
from pathlib import Path

from longfit.compressors.prompt import probe as probes
from longfit.compressors.prompt.base import Question
from longfit.compressors.prompt.budgets import best_sentences, by_score
from longfit.compressors.prompt.passage import Passage
from longfit.compressors.prompt.scored import Scored
from longfit.compressors.prompt.units import sentences
from longfit.errors import InputError


@dataclass
class Sentinel(Scored):
    """Keeps the sentences that a logistic regression over the attention of the prompt's last token calls needed.

    A chunk of the text stands in a prompt that asks the question; what the last token attends to in every layer and
    head, averaged over a sentence, are the sentence's features. Only the last row of attention is computed.

    Source: Zhang et al. 2025, "Sentinel: attention probing of proxy models for LLM context compression", and its code
    (1,024-token chunks, kept in the order of the text).

    Deviations: a feature is a sentence's attention relative to the chunk's mean, on a log scale; the authors' probe is
    not public, and the one shipped here was trained on SmolLM2-135M by recipes/prompt/train_sentinel_probe.py, on fewer
    and unfiltered questions. The proxy is the model itself unless `scorer` names one.

    Attributes (options):
        probe: a file that the recipe wrote; by default the shipped one that was trained for the proxy's weights.
        chunk_tokens: tokens of the text in one prompt.
    """

    name = "sentinel"
    source = "Zhang et al. 2025, Sentinel: attention probing of proxy models"
    summary = "sentences that the last token's attention calls needed, by a trained probe"
    scores = "sentences, by a logistic regression over the last row of attention in all layers and heads"
    deviations = "attention relative to the chunk's mean; a probe of our own, trained on fewer questions"
    query_aware = True

    probe: str | None = None
    chunk_tokens: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_tokens < 16:
            raise InputError(f"{self.name}: chunk_tokens has to be at least 16, got {self.chunk_tokens}")

    def bind(self, model: object = None, tokenizer: object = None) -> "Sentinel":
        """See `PromptCompressor.bind`.

        Raises:
            InputError: no probe is known for the proxy's weights, or the file is none for its shape.
        """
        super().bind(model, tokenizer)
        lm = self.reader()
        shape = (int(lm.config.num_hidden_layers), int(lm.config.num_attention_heads))
        if self.probe is not None:
            self.fitted = probes.Probe.load(Path(self.probe).expanduser())
            if (self.fitted.layers, self.fitted.heads) != shape:
                raise InputError(
                    f"the probe {self.probe} is for {self.fitted.layers} layers of {self.fitted.heads} heads, and the "
                    f"model has {shape[0]} of {shape[1]}"
                )
            return self
        here = probes.hash_of(lm.model)
        found = next((probe for probe in probes.shipped() if probe.weights_hash == here), None)
        if found is None:
            raise InputError(
                "sentinel has no probe for this model's weights: let a model that has one score the text "
                '(scorer="smollm2-135m" works for any target), or train one with '
                "recipes/prompt/train_sentinel_probe.py and give probe= its file"
            )
        self.fitted = found
        return self

    def choose(self, passage: Passage, free: list[bool], question: Question | None, room: int) -> list[int]:
        """See `PromptCompressor.choose`."""
        assert question is not None
        lm, units = self.reader(), sentences(passage, free)
        ids = [given or [0] for given in self.ids_of(passage, units)]
        scores: list[float] = []
        for start, stop in chunks([len(given) for given in ids], min(self.chunk_tokens, lm.window // 2)):
            features = next(probes.sentence_features(lm, ids[start:stop], [question.text]))
            scores += self.fitted.score(features).tolist()
        return best_sentences(passage, by_score(units, scores), room)


def chunks(sizes: list[int], most: int) -> list[tuple[int, int]]:
    """Runs of neighbours of at most `most` together (one alone may be more), cut evenly."""
    total = sum(sizes)
    share = total / max(1, -(-total // most))
    found, start, held = [], 0, 0
    for at, size in enumerate(sizes):
        if at > start and (held + size > most or held >= share):
            found.append((start, at))
            start, held = at, 0
        held += size
    return [*found, (start, len(sizes))] if sizes else []
