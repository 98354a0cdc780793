"""Where an input is cut into the chunks that are read one after another."""


def chunk_spans(tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """Start and stop of each chunk. They are counted from the end, so that rows of a left-padded batch are cut where
    they would be cut alone; the first chunk takes the remainder."""
    stops = list(range(tokens, 0, -chunk_tokens))[::-1] or [0]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def one_by_one(spans: list[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
    """The same chunks, with up to the last `tokens` tokens of the last one in a forward each."""
    *before, (start, stop) = spans
    first = max(start, stop - tokens)
    return [*before, *([(start, first)] if first > start else []), *((at, at + 1) for at in range(first, stop))]
