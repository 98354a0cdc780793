"""What prompt compressors score, against slow and plain forms of it."""

import math
import re

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from longfit.bm25 import BM25Index
from longfit.compressors import get
from longfit.compressors.prompt import probe as probes
from longfit.compressors.prompt.embedded import contextual
from longfit.compressors.prompt.passage import Passage
from longfit.compressors.prompt.pruning import prune
from longfit.compressors.prompt.sentinel import chunks
from longfit.compressors.prompt.topics import topics
from longfit.compressors.prompt.units import phrases, sentences, words
from tests.prompt_models import STORY, any_probe, bpe_tokenizer, language_model, story


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def lm(request):
    return language_model(request.param)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def full_losses(lm, ids: list[int]) -> torch.Tensor:
    """−log p of ids[1:] by one plain forward of the whole model."""
    logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    return -logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def encoded(text: str) -> list[int]:
    return bpe_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_losses_are_those_of_a_full_forward(lm):
    ids, bos = encoded(STORY), lm.opening
    assert len(bos) == 1
    torch.testing.assert_close(lm.losses(ids), full_losses(lm, [*bos, *ids]), rtol=1e-4, atol=1e-4)
    before = encoded("The gate?")
    given = full_losses(lm, [*bos, *before, *ids])[len(before) :]
    torch.testing.assert_close(lm.losses(ids, before), given, rtol=1e-4, atol=1e-4)


def test_long_losses_are_those_of_stretches_with_a_quarter_before_each(lm, monkeypatch):
    monkeypatch.setattr("longfit.compressors.prompt.lm.STRETCH_TOKENS", 65)
    ids = encoded(story(1))
    longest = 64  # 65 less the opening token
    wanted, start, last_start, last_context = [], 0, 0, 0
    while start < len(ids):
        context = min(start, longest // 4)
        stop = min(len(ids), start - context + longest)
        part = [*lm.opening, *ids[start - context : stop]]
        losses = full_losses(lm, part)[context:]
        if start:  # the first of a stretch is predicted by the stretch before, which saw more
            earlier = [*lm.opening, *ids[last_start - last_context : start + 1]]
            losses[0] = full_losses(lm, earlier)[-1]
        wanted.append(losses)
        last_start, last_context, start = start, context, stop
    torch.testing.assert_close(lm.losses(ids), torch.cat(wanted), rtol=1e-4, atol=1e-4)


def test_a_model_without_an_opening_token_finds_the_first_as_surprising_as_any(lm, monkeypatch):
    monkeypatch.setattr(type(lm), "opening", property(lambda self: []))
    ids = encoded(STORY)
    losses = lm.losses(ids)
    assert losses[0] == pytest.approx(math.log(lm.config.vocab_size))
    torch.testing.assert_close(losses[1:], full_losses(lm, ids), rtol=1e-4, atol=1e-4)
    apart = lm.losses_apart([ids[:20], ids[20:23], []])
    torch.testing.assert_close(apart[0][1:], full_losses(lm, ids[:20]), rtol=1e-4, atol=1e-4)
    assert apart[1][0] == pytest.approx(math.log(lm.config.vocab_size)) and apart[2].numel() == 0


def test_selective_context_measures_every_sentence_alone(lm):
    compressor = get("selective_context").bind(lm.model, bpe_tokenizer())
    ids = encoded(STORY)
    passage = Passage.of(bpe_tokenizer(), ids)
    free = [True] * len(ids)
    by_token = torch.cat(
        [full_losses(lm, [*lm.opening, *ids[unit.first : unit.stop]]) for unit in sentences(passage, free)]
    )
    units = phrases(passage, free)
    order = sorted(units, key=lambda unit: -float(by_token[unit.first : unit.stop].mean()))
    room, kept = 60, []
    for unit in order:
        if unit.tokens > room - len(kept):
            break
        kept += range(*unit)
    made = compressor.compress(ids, 60).places
    assert set(kept) <= set(made) and len(kept) > 30


@pytest.mark.parametrize("before", [None, "What is the code?"])
def test_iterative_pruning_is_a_plain_loop(lm, before):
    ids = encoded(STORY)
    passage = Passage.of(bpe_tokenizer(), ids)
    units = words(passage, [True] * len(ids))
    by_word = [ids[unit.first : unit.stop] for unit in units]
    sizes = [len(given) for given in by_word]
    asked = None if before is None else encoded(before)
    room, segment = 70, 30
    wanted, prefix, owed = [], [], 0.0
    starts = [0]
    for at in range(len(by_word)):
        if sum(sizes[starts[-1] : at + 1]) > segment:
            starts.append(at)
    for start, stop in zip(starts, [*starts[1:], len(by_word)], strict=True):
        flat = [token for given in by_word[start:stop] for token in given]

        fronts = [[]] if asked is None else [[], asked]
        losses = [full_losses(lm, [*lm.opening, *front, *prefix, *flat])[-len(flat) :] for front in fronts]
        scores = losses[0] if asked is None else losses[0] - losses[1]
        owed += room * sum(sizes[start:stop]) / sum(sizes)
        quota = room - sum(sizes[at] for at in wanted) if stop == len(by_word) else int(owed + 1e-6)
        ends = torch.tensor(sizes[start:stop]).cumsum(0).tolist()
        means = [float(scores[end - sizes[start + at] : end].mean()) for at, end in enumerate(ends)]
        chosen = []
        for at in sorted(range(start, stop), key=lambda at: (-means[at - start], at)):
            if sizes[at] <= quota:
                chosen.append(at)
                quota -= sizes[at]
        owed -= sum(sizes[at] for at in chosen)
        wanted += sorted(chosen)
        prefix += [token for at in sorted(chosen) for token in by_word[at]]
    assert prune(lm, by_word, sizes, [1.0] * len(sizes), room, segment, asked) == wanted
    assert sum(sizes[at] for at in wanted) >= room - 3


def test_a_full_prefix_forgets_its_oldest_half(lm):
    from longfit.compressors.prompt.pruning import Prefix

    ids = encoded(story(2))
    prefix = Prefix(lm, [], room=40)
    for start in range(0, 60, 10):
        prefix.take(ids[start : start + 10])
    assert prefix.kept == ids[30:60]  # cut to 20 at the fifth, then one more
    wanted = full_losses(lm, [*lm.opening, *ids[30:70]])[-10:]
    torch.testing.assert_close(prefix.losses(ids[60:70]), wanted, rtol=1e-4, atol=1e-4)


def test_llmlingua_first_keeps_the_passages_of_high_perplexity(lm):
    compressor = get("llmlingua", passage_tokens=40, segment_tokens=24).bind(lm.model, bpe_tokenizer())
    ids = encoded(story(2))
    passage = Passage.of(bpe_tokenizer(), ids)
    from longfit.compressors.prompt.llmlingua import passages

    found = passages(passage, [True] * len(ids), 40)
    losses = full_losses(lm, [*lm.opening, *ids])
    order = sorted(found, key=lambda unit: -float(losses[unit.first : unit.stop].mean()))
    kept, held = [], 0
    while held < 100:
        kept.append(order[len(kept)])
        held += kept[-1].tokens
    places = compressor.compress(ids, 50).places
    allowed = {place for unit in kept for place in range(*unit)}
    assert set(places) <= allowed and len(places) >= 46


def test_longllmlingua_ranks_by_the_question_after_each_passage(lm):
    from longfit.compressors.prompt.base import Question
    from longfit.compressors.prompt.longllmlingua import RESTRICTION, passages

    compressor = get("longllmlingua", passage_tokens=60).bind(lm.model, bpe_tokenizer())
    ids, question = encoded(story(2)), "What is the code?"
    passage = Passage.of(bpe_tokenizer(), ids)
    found = passages(passage, [True] * len(ids), 60)
    tail = encoded("\n\n" + question + RESTRICTION)
    nll = [float(full_losses(lm, [*lm.opening, *ids[u.first : u.stop], *tail])[-len(tail) :].mean()) for u in found]
    wanted = [found[at] for at in sorted(range(len(found)), key=lambda at: nll[at])]
    assert compressor.ranked(passage, found, Question([], question)) == wanted


def test_the_last_row_is_that_of_the_whole_matrix(lm):
    text, tails = encoded(STORY)[:60], [encoded(" What is it? Answer:"), encoded(" Who?")]
    lm.model.set_attn_implementation("eager")
    try:
        whole = [
            torch.stack([a[0, :, -1, : len(text)] for a in given.attentions])
            for tail in tails
            for given in [lm.decoder(torch.tensor([[*text, *tail]]), output_attentions=True)]
        ]
    finally:
        lm.model.set_attn_implementation("sdpa")
    rows = list(lm.last_rows(text, tails))
    assert rows[0].shape == (lm.config.num_hidden_layers, lm.config.num_attention_heads, len(text))
    for row, wanted in zip(rows, whole, strict=True):
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-5)


def test_sentinels_features_are_shares_of_the_text_s_attention_by_sentence(lm):
    units = [encoded(part) for part in ("One sentence here.", " Another, longer sentence.", " End.")]
    (features,) = probes.sentence_features(lm, units, ["Who?"])
    opening = [*lm.opening, *lm.encode(probes.BEFORE)]
    text = [*opening, *(token for unit in units for token in unit)]
    (row,) = lm.last_rows(text, [lm.encode(probes.AFTER.format(question="Who?"))])
    inside, at = row.flatten(0, 1)[:, len(opening) :], 0
    for unit, found in zip(units, features, strict=True):
        mean = (inside[:, at : at + len(unit)].mean(1) / inside.mean(1)).nan_to_num(0.0)  # out of a window's sight
        torch.testing.assert_close(found, (1 + mean).log(), rtol=1e-4, atol=1e-4)
        at += len(unit)


def test_sentinel_keeps_the_sentences_that_the_probe_calls_needed(tmp_path):
    lm = language_model()
    file = any_probe(tmp_path)
    compressor = get("sentinel", probe=file, chunk_tokens=10_000).bind(lm.model, bpe_tokenizer())
    ids = encoded(STORY)
    passage = Passage.of(bpe_tokenizer(), ids)
    units = sentences(passage, [True] * len(ids))
    (features,) = probes.sentence_features(lm, [ids[u.first : u.stop] for u in units], ["What is the code?"])
    odds = probes.Probe.load(tmp_path / "probe.json").score(features)
    best = units[int(odds.argmax())]
    places = compressor.compress(ids, best.tokens, compressor.question_from(encoded("What is the code?"))).places
    assert places == list(range(*best))


def test_a_probe_scores_as_the_regression_that_it_was(tmp_path):
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(80, 12, generator=draw), torch.rand(80, generator=draw) > 0.5
    mean, scale = x.mean(0), x.std(0)
    fitted = LogisticRegression().fit(((x - mean) / scale).numpy(), y.numpy())
    weights = torch.tensor(fitted.coef_[0], dtype=torch.float32)
    probes.Probe(2, 6, "none", mean, scale, weights, float(fitted.intercept_[0])).save(tmp_path / "p.json")
    odds = probes.Probe.load(tmp_path / "p.json").score(x)
    wanted = torch.tensor(fitted.decision_function(((x - mean) / scale).numpy()), dtype=torch.float32)
    torch.testing.assert_close(odds, wanted, rtol=1e-3, atol=1e-4)


def test_chunks_are_even_and_hold_every_sentence():
    assert chunks([10] * 10, 40) == [(0, 4), (4, 8), (8, 10)]
    assert chunks([50, 5, 5], 20) == [(0, 1), (1, 3)]
    assert chunks([], 20) == []


def test_bm25_is_its_formula():
    texts = ["The gate is open.", "A gate, a gate and a wall.", "Nothing here.", ""]
    query, k1, b = "open the gate", 1.2, 0.6
    split = [re.findall(r"\w+", text.lower()) for text in texts]
    mean = sum(map(len, split)) / len(split)
    for text, found in zip(split, BM25Index(texts, k1, b).scores(query), strict=True):
        wanted = 0.0
        for term in query.split():
            n = sum(term in other for other in split)
            idf = math.log(1 + (len(split) - n + 0.5) / (n + 0.5))
            f = text.count(term)
            wanted += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(text) / mean))
        assert found == pytest.approx(wanted)
    assert BM25Index([]).scores("x") == [] and BM25Index(["", ""]).scores("x") == [0.0, 0.0]


def test_contextual_embeddings_are_means_of_the_whole_text_s_states(lm):
    ids = encoded(STORY)
    units = [ids[:10], ids[10:11], ids[11:]]
    states = lm.decoder(torch.tensor([[*lm.opening, *ids]]), use_cache=False).last_hidden_state[0, 1:]
    wanted = torch.stack([states[:10].mean(0), states[10], states[11:].mean(0)])
    torch.testing.assert_close(contextual(lm, units), wanted, rtol=1e-4, atol=1e-4)


def test_topics_are_the_blocks_of_a_graph_of_blocks():
    similarity = torch.full((12, 12), 0.02)
    for start, stop in ((0, 5), (5, 9), (9, 12)):
        similarity[start:stop, start:stop] = 0.9
    found = topics(similarity)
    assert len(set(found)) == 3
    assert all(len(set(found[a:b])) == 1 for a, b in ((0, 5), (5, 9), (9, 12)))
    assert topics(torch.ones(2, 2)) == [0, 0]


def test_semantic_gives_every_topic_its_part():
    lm = language_model()
    compressor = get("semantic", block_tokens=24).bind(lm.model, bpe_tokenizer())
    ids = encoded(story(3))
    passage = Passage.of(bpe_tokenizer(), ids)
    groups = compressor._topics(passage, [True] * len(ids))
    everything = sorted(place for group in groups for unit in group for place in range(*unit))
    assert everything == list(range(len(ids)))
    kept = set(compressor.compress(ids, len(ids) // 3).places)
    for group in groups:
        size = sum(unit.tokens for unit in group)
        if size > 60:
            assert sum(place in kept for unit in group for place in range(*unit)) > 0.15 * size


def test_greedy_is_generate(lm):
    ids = encoded(STORY)[:30]
    wanted = lm.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 30:]
    assert lm.greedy(ids, 6) == wanted.tolist()
