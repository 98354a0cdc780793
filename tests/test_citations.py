"""Citations: passages with true pages, words that are checked, and a ranking that does not ask the model."""

import pytest
import torch

import longfit
from longfit.bm25 import BM25Index, terms
from longfit.docqa import Document, Page, ask, ask_memory, cite, compress
from longfit.docqa.citations import candidates, ranked
from longfit.docqa.lexical import stands_in
from longfit.docqa.likelihood import lifts
from longfit.docqa.passages import LEAST_WORDS, MOST_CHARACTERS, MOST_WORDS, passages
from longfit.docqa.prompt import context_of, question_ids
from longfit.model import wrap
from tests.tiny_models_on_disk import tiny_llama, tiny_tokenizer

SENTENCE = "the keeper wrote the number {} in the log and went to bed. "
TEXT = "\n\n".join("".join(SENTENCE.format(20 * p + s) for s in range(1 + p % 9)).strip() for p in range(30))


def test_passages_hold_every_word_once_and_neither_too_many_nor_too_few():
    found = passages([Document("log", TEXT)])
    assert " ".join(p.text for p in found).split() == TEXT.split()
    words = [len(p.text.split()) for p in found]
    assert max(words) <= MOST_WORDS and sum(n < LEAST_WORDS for n in words) <= 3
    assert all(TEXT[p.start : p.end] == p.text == p.text.strip() and p.text.endswith(".") for p in found)


def test_no_passage_crosses_a_page_and_each_says_its_document():
    first = Document("a", "one two.\n\nthree four.", (Page(1, 0, 8), Page(2, 10, 21)))
    found = passages([first, Document("b", "five")])
    assert [(p.document, p.text) for p in found] == [(0, "one two."), (0, "three four."), (1, "five")]


@pytest.mark.parametrize("text", ["x" * 5000, "字" * 5000, "word " * 1000, "a.b" * 900 + "\n" * 4000, "w " * 400])
def test_texts_without_sentences_or_spaces_are_cut_too(text):
    found = passages([Document("d", text.strip())])
    assert "".join(p.text for p in found).replace(" ", "") == "".join(text.split())
    assert max(len(p.text) for p in found) <= MOST_CHARACTERS


@pytest.mark.parametrize(
    ("answer", "passage", "question", "verified"),
    [
        ("France", "Normandy is a region in France.", "In what country is Normandy?", True),
        ("Normandy is in Spain", "Normandy is a region in France.", "In what country is Normandy?", False),
        ("The Normans came from Denmark and Iceland.", "Danes, from Denmark, and Icelanders", "Who came?", False),
        ("1,066 men", "there were 1,066 men", "How many?", True),
        ("1,067 men", "there were 1,066 men", "How many?", False),
        ("organisation", "an organization of monks", "What was it?", True),
        ("cat", "a concatenation", "What?", False),
        ("10th", "in the 10th century", "When?", True),
        ("", "anything", "When?", False),
        ("yes", "yes and no", "Is it?", False),
        ("東京", "日本の首都は東京です", "どこ", True),
        ("大阪", "日本の首都は東京です", "どこ", False),
    ],
)
def test_what_stands_in_a_passage(answer, passage, question, verified):
    assert stands_in(answer, passage, question) is verified


def test_bm25_prefers_rare_words_and_knows_no_negative_scores():
    scores = BM25Index(["the lamp the lamp", "the keeper", "the storm of nine"]).scores("the storm")
    assert scores[2] > scores[0] > 0 and scores[2] > scores[1]
    assert BM25Index([]).scores("x") == [] and BM25Index(["a"]).scores("b") == [0.0]
    assert terms("Don't stop at 3.5 km, 東京") == ["don", "t", "stop", "at", "3.5", "km", "東", "京"]


def test_likelihoods_are_those_of_the_base_model_one_by_one():
    """A padded batch gives what a hand-written loop over the prompts gives."""
    model, tokenizer = wrap(tiny_llama(), "snapkv", budget="100 tokens"), tiny_tokenizer()
    texts = ["the lamp was lit.", "a storm at nine, and much later another one.", "x"]
    found = lifts(model, tokenizer, texts, "who lit it", "the keeper")
    target = tokenizer(" the keeper", add_special_tokens=False)["input_ids"]

    def log_p(context):
        ids = torch.tensor([context + question_ids(tokenizer, "who lit it") + target])
        with model.disabled(), torch.no_grad():
            p = model(ids).logits[0, -len(target) - 1 : -1].log_softmax(-1)
        return float(p.gather(-1, torch.tensor(target)[:, None]).mean())

    without = log_p([])
    expected = [log_p(context_of(tokenizer, [Document("p", text)])[0]) - without for text in texts]
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-4)
    assert lifts(model, tokenizer, texts, "who", "") == [0.0, 0.0, 0.0]


def test_ranking_weighs_the_lift_and_the_words():
    assert [place for place, _ in ranked([4.0, 2.0], [0.0, 0.6], weight=1.0)] == [1, 0]
    assert [place for place, _ in ranked([4.0, 2.0], [0.0, 0.4], weight=1.0)] == [0, 1]
    assert ranked([], []) == []


def test_candidates_share_a_word_with_question_or_answer():
    documents = [Document("a", "the lamp was lit."), Document("b", "nothing of the kind.")]
    assert [c.passage.document for c in candidates(documents, "who lit", "keeper")] == [0]
    model = wrap(tiny_llama(), "knorm", budget="50%")
    assert cite(model, tiny_tokenizer(), documents, "who", "zebra") == []
    assert cite(model, tiny_tokenizer(), documents, "who", "  ") == []


def test_an_answer_that_stands_nowhere_leaves_the_ranking_to_the_question(monkeypatch):
    texts = ["the storm came at nine.", "the zebra in the zebra pen was a zebra.", "a lamp was lit by the keeper."]
    documents = [Document(str(place), text) for place, text in enumerate(texts)]
    model = wrap(tiny_llama(), "knorm", budget="50%")
    asked = []
    monkeypatch.setattr("longfit.docqa.citations.lifts", lambda *given: asked.append(given) or [0.0] * len(given[2]))
    found = cite(model, tiny_tokenizer(), documents, "when was the storm", "at the zebra of 1066")
    assert found[0].quote == texts[0] and not asked and not any(c.verified for c in found)
    assert [c.score for c in found] == sorted((c.score for c in found), reverse=True)
    found = cite(model, tiny_tokenizer(), documents, "when was the storm", "zebra")
    assert found[0].quote == texts[1] and found[0].verified and len(asked) == 1
    (only,) = cite(model, tiny_tokenizer(), documents, "who", "lamp of 1066")  # the question alone finds nothing
    assert only.quote == texts[2]


@pytest.mark.parametrize("how", ["aware", "agnostic", "memory"])
def test_an_answer_comes_with_pages_and_what_was_kept_of_them(how):
    pages, at, text = [], 0, ""
    for number in range(1, 7):
        part = SENTENCE.format(number) * 4
        pages.append(Page(number, at, at + len(part.strip())))
        text += part.strip() + "\n\n"
        at = len(text)
    document = Document("log.pdf", text.strip(), tuple(pages))
    model, tokenizer = wrap(tiny_llama(), "snapkv", budget="25%"), tiny_tokenizer()
    if how == "memory":
        memory = compress(model, tokenizer, document)
        given = ask_memory(model, tokenizer, memory, "keeper wrote", max_new_tokens=4, citations=2)
    else:
        aware = how == "aware"
        given = ask(model, tokenizer, document, "keeper wrote", aware=aware, max_new_tokens=4, citations=2)
    assert 1 <= len(given.citations) <= 2
    for citation in given.citations:
        assert citation.document == "log.pdf" and document.text[citation.start : citation.end] == citation.quote
        assert pages[citation.page - 1].start <= citation.start and citation.end <= pages[citation.page - 1].end
        assert 0 < citation.kept < 0.6
    assert given.text == ask(model, tokenizer, document, "keeper wrote", aware=how == "aware", max_new_tokens=4).text


@pytest.mark.real
def test_the_real_model_finds_the_passage_that_holds_the_answer(smollm2):
    model, tokenizer = smollm2
    filler = [f"Day {n}. The sea was calm, the wind came from the west and the oil was enough." for n in range(40)]
    told = "The relief boat that came in March was steered by a woman called Ottilie Brandt."
    text = "\n\n".join([*filler[:20], told, *filler[20:]])
    model = longfit.wrap(model, "snapkv", budget="25%")
    best = cite(model, tokenizer, [Document("log", text)], "Who steered the relief boat?", "Ottilie Brandt")[0]
    assert "Ottilie Brandt" in best.quote and best.verified and best.score > 1
