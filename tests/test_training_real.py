"""The adapter that longfit ships reads its memories on the real model."""

import pytest

from longfit.compressors.soft import artifact, available
from longfit.training.data import sources
from longfit.training.evaluate import evaluate

NAME = "smollm2-135m-strided-kv-4x"


def test_the_shipped_adapters_are_whole_and_small():
    for name in artifact.shipped_names():
        found = artifact.find(name)
        assert found.facts["method"] in available()
        assert sum(file["bytes"] for file in found.facts["files"].values()) < 21e6
        assert "## Results" in (found.folder / artifact.CARD).read_text()
        text = (found.folder / artifact.FACTS).read_text() + (found.folder / artifact.CARD).read_text()
        assert '"/' not in text, "a path of the machine that trained it"
    assert NAME in artifact.shipped_names()


@pytest.mark.real
def test_the_shipped_adapter_beats_truncation_and_reads_the_memory_it_is_given(smollm2):
    model, tokenizer = smollm2
    compressor = available()["strided_kv"](adapter=NAME).bind(model)
    try:
        assert compressor.trained_ratios == (4,)
        made = [source for _, source in sources([{"kind": "lookup", "facts": 8, "asked": 6}], tokenizer, None)]
        rows = evaluate(compressor, made, n=6, context_tokens=128, target_tokens=64)
        found = {row["condition"]: row["mean"] for row in rows if row["metric"] == "accuracy"}
    finally:
        compressor.release()
    assert found["memory"] >= 0.45
    assert found["memory"] >= found["truncation"] + 0.1
    assert found["shuffled"] <= 0.1
