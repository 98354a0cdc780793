"""Plain text: a window of a document as the context, and what comes after it as the target."""

import random
from typing import Any

from longfit.errors import InputError
from longfit.training.data.documents import Pool, hashes_of, tokens_of
from longfit.training.data.episode import TEXT, Builder, Episode


class Text:
    """Continuation of documents.

    Args:
        pools: by split; see `documents.pools`.
        knots: documents whose chunks are mixed into one context; 0 or 1 for none. After Tian et al. 2024, "Untie the
            Knots": each chunk carries a label, the order within a document is kept, and the target continues the
            document whose label it starts with. Their labels that point to the next chunk, and their loss on tracing
            the chunks back, are left out.
        chunk_tokens: of a knot's chunks.

    Raises:
        InputError: `chunk_tokens` is not positive; or from `episode`, context or target are too short for the knots.
    """

    kind = "text"

    def __init__(self, pools: dict[str, Pool], tokenizer: Any, knots: int = 0, chunk_tokens: int = 32) -> None:
        self.pools, self.tokenizer = pools, tokenizer
        self.knots, self.chunk_tokens = knots, chunk_tokens
        if chunk_tokens < 1:
            raise InputError(f"chunk_tokens={chunk_tokens} of a text source has to be 1 or more")

    def episode(self, rng: random.Random, context_tokens: int, target_tokens: int, split: str, step: int) -> Episode:
        if self.knots > 1:
            return self._tied(rng, context_tokens, target_tokens, split)
        ids, document = self.pools[split].window(rng, context_tokens + target_tokens)
        built = Builder().add(ids[context_tokens:], TEXT)
        return built.episode(ids[:context_tokens], self.kind, document.name)

    def _tied(self, rng: random.Random, context_tokens: int, target_tokens: int, split: str) -> Episode:
        labels = [tokens_of(self.tokenizer, f"\n[{chr(ord('A') + knot)}]") for knot in range(self.knots)]
        label = max(map(len, labels))
        chunks = max(self.knots, context_tokens // (self.chunk_tokens + label))
        # By the longest label, so that it depends on no draw: a run that takes its first step takes all.
        if context_tokens < chunks * (label + 1) or target_tokens < label + 1:
            raise InputError(
                f"knots={self.knots} needs {chunks * (label + 1)} context_tokens and {label + 1} target_tokens: "
                f"a label of {label} tokens and one of text for each chunk, at least; there are {context_tokens} and "
                f"{target_tokens}: lower knots, or raise them"
            )
        # Every document has at least one chunk; the one that is continued has the first, so that it always has a past.
        owners = [*range(self.knots), *(rng.randrange(self.knots) for _ in range(chunks - self.knots))]
        rng.shuffle(owners)
        room = context_tokens - sum(len(labels[owner]) for owner in owners)
        sizes = [room // chunks + (place < room % chunks) for place in range(chunks)]
        asked = owners[0]
        needed = {knot: sum(s for s, o in zip(sizes, owners, strict=True) if o == knot) for knot in range(self.knots)}
        tail = target_tokens - len(labels[asked])
        texts, names = {}, []
        for knot in range(self.knots):
            texts[knot], document = self.pools[split].window(rng, needed[knot] + (tail if knot == asked else 0))
            names.append(document.name)
        context: list[int] = []
        for size, owner in zip(sizes, owners, strict=True):
            context += labels[owner] + texts[owner][:size]
            texts[owner] = texts[owner][size:]
        built = Builder().add(labels[asked], 0.0).add(texts[asked], TEXT)
        return built.episode(context, self.kind, " + ".join(names))

    def hashes(self, split: str) -> set[str]:
        return hashes_of(self.pools[split].documents)
