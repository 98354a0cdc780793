"""From a recipe's `data` to sources of episodes, and the check that training and evaluation never share a document."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longfit.errors import InputError, OverlapError
from longfit.training.checks import number
from longfit.training.data.documents import pools
from longfit.training.data.episode import EVAL, TRAIN, Source
from longfit.training.data.lookup import Lookup
from longfit.training.data.questions import FILES, Questions
from longfit.training.data.streaming import Streamed, hub_stream
from longfit.training.data.text import Text
from longfit.training.limits import SOURCES

DOCUMENTS = ("files", "eval_files", "long_factor", "long_tokens")
DATASET = ("dataset", "config", "split", "column", "revision")
KINDS = ("lookup", "text", *FILES)


def sources(given: Sequence[dict[str, Any]], tokenizer: Any, data: str | Path | None) -> list[tuple[float, Source]]:
    """Each source of a recipe with its weight in the mixture.

    Args:
        given: mappings with `kind` ("lookup", "text", "squad" or "hotpotqa"), `weight` (1) and the kind's options.
        data: the data folder.

    Raises:
        InputError: an unknown kind or option, or no source at all.
        DataError: files that are missing, broken or empty.
        OverlapError: a document is in both splits.
    """
    if not given:
        raise InputError("the recipe's data is empty; give at least one source, such as {kind: lookup}")
    made = []
    for entry in given:
        options = dict(entry)
        weight = number(least=0)(options.pop("weight", 1.0), f"{options.get('kind')}.weight")
        made.append((float(weight), source(options, tokenizer, data)))
    if not sum(weight for weight, _ in made):
        raise InputError("every data source has weight 0")
    check_overlap([source for _, source in made])
    leave_out_evaluated([source for _, source in made])
    return made


def source(options: dict[str, Any], tokenizer: Any, data: str | Path | None) -> Source:
    """One source by its options."""
    kind = options.pop("kind", None)
    options |= {key: SOURCES[key](value, f"{kind}.{key}") for key, value in options.items() if key in SOURCES}
    if kind not in KINDS:
        raise InputError(f"no data source is called {kind!r}; there are {', '.join(KINDS)}")
    if kind in FILES:
        _known(kind, options, ())
        return Questions(kind, tokenizer, data)
    if kind == "text" and "dataset" in options:
        wanted = _arguments(Streamed, "open_stream", "tokenizer", "name")
        _known(kind, options, (*wanted, *DATASET))
        dataset = {key: options.pop(key) for key in DATASET if key in options}
        return Streamed(hub_stream(dataset), tokenizer, name=str(dataset["dataset"]), **options)
    maker: Any = Lookup if kind == "lookup" else Text
    _known(kind, options, (*_arguments(maker, "pools", "tokenizer"), *DOCUMENTS))
    documents = {key: options.pop(key) for key in DOCUMENTS if key in options}
    found = None if kind == "lookup" and not documents else pools(documents, tokenizer, data)
    return maker(found, tokenizer, **options)


def check_overlap(made: Sequence[Source]) -> None:
    """Refuses documents that are trained on and evaluated, in one source or across them.

    Raises:
        OverlapError: there is one.
    """
    hashes: dict[str, set[str]] = {TRAIN: set(), EVAL: set()}
    for given in made:
        for split, found in hashes.items():
            found |= given.hashes(split)
    if common := hashes[TRAIN] & hashes[EVAL]:
        raise OverlapError(
            f"{len(common)} documents are in training and in evaluation, {sorted(common)[0][:12]} (SHA-256) among "
            "them; leave eval_files out (about a twentieth is then held back by hash), name other files, or give the "
            "same files to the sources that share documents"
        )


def leave_out_evaluated(made: Sequence[Source]) -> None:
    """Tells streams, whose rows nobody knows beforehand, which documents any source of the mixture evaluates."""
    evaluated = set().union(*(given.hashes(EVAL) for given in made))
    for given in made:
        if isinstance(given, Streamed):
            given.leave_out(evaluated)


def _arguments(maker: Any, *without: str) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(maker).parameters if name not in without)


def _known(kind: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    if unknown := sorted(map(str, set(options) - set(known))):
        raise InputError(
            f"data source {kind!r} has no option {', '.join(unknown)}; it has weight"
            + "".join(f", {name}" for name in sorted(known))
        )
