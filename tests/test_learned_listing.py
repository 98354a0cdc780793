"""What is stated of learned compressors: slots, bytes, training, and what was left out; the guide says the same."""

import re
from pathlib import Path

import pytest

from longfit.budget import ModelShape
from longfit.compressors import get
from longfit.compressors.soft import available
from longfit.families import model_shape
from longfit.listing import REFERENCE, listing
from tests.soft_models import FOREIGN, METHODS, bound, words

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "learned.md"
NAME = re.compile(r"`(\w+)(?:\((\w+)=True\))?`")


def table() -> dict[tuple[str, str], list[str]]:
    """Cells of each row of the guide's table of methods, by the method and its option."""
    section = GUIDE.read_text(encoding="utf-8").partition("## The methods")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    return {match.groups(default=""): cells for cells in rows[1:] for match in NAME.finditer(cells[0])}


def in_words(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


@pytest.mark.parametrize("name", available())
def test_every_method_says_where_it_is_from_what_trains_and_what_is_left_out(name):
    method = available()[name]
    for stated in (method.source, method.summary, method.trains, method.left_out):
        assert len(stated.strip()) > 5, name
    own = next(kind for kind in method.__mro__ if "name" in vars(kind))
    assert {"name", "source", "summary"} <= set(vars(own)), (
        "stated by the method itself, not by what it is derived from"
    )


def test_the_guides_table_has_every_method_and_its_figures_are_those_of_the_code():
    rows = table()
    assert {name for name, _ in rows} == set(available())
    for (name, option), (_, _, slots, size, training, positions) in rows.items():
        method = get(name, **({option: True} if option else {}))
        assert slots == f"{method.slots_for(1000):,}", name
        assert size == in_words(method.bytes_for(1000, REFERENCE)), name
        assert training.startswith("yes" if method.needs_training else "no"), name
        assert positions == ("-" if method.memory == "cross" else "packed" if method.packs else "of the text"), name
    assert ("sentinel_tokens", "keep_raw") in rows


def test_the_list_states_slots_and_bytes():
    rows = {row["name"]: row for row in listing("compressors") if row["kind"] == "learned"}
    assert set(rows) == set(available())
    for name, row in rows.items():
        method = get(name)
        assert row["slots_per_1000_tokens"] == method.slots_for(1000) > 0
        assert row["bytes_per_1000_tokens"] == method.bytes_for(1000, REFERENCE) > 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("case", [*METHODS, *FOREIGN])
def test_bytes_are_counted_as_they_are(case, family):
    compressor = bound(case, family)
    encoded = compressor.compress(words(1, 20))
    assert encoded.nbytes == compressor.bytes_for(20, model_shape(compressor.backbone.model))
    coarser = compressor.compress(words(1, 20), ratio=6)
    assert coarser.nbytes == compressor.bytes_for(20, model_shape(compressor.backbone.model), ratio=6)


@pytest.mark.real
def test_the_model_that_bytes_are_stated_for_is_as_stated(smollm2):
    assert ModelShape.from_config(smollm2[0].config, dtype_bytes=2) == REFERENCE
