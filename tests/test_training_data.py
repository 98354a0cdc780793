"""Episodes: exact lengths, nothing trained on is evaluated, and the same draw whenever it is asked for."""

import json
import random

import pytest
import torch

from longfit.errors import DataError, InputError
from longfit.training.batches import Batches, collate, evaluation_episodes
from longfit.training.data import EVAL, TRAIN, sources
from longfit.training.data.documents import Document, Pool, read_documents, split_of
from longfit.training.data.episode import Episode
from longfit.training.data.lookup import NOUNS, WORDS, held_out
from longfit.training.data.questions import Questions
from longfit.training.data.streaming import Streamed
from tests.tiny_training import byte_tokenizer, write_texts

TOKENIZER = byte_tokenizer()


def text(ids):
    return TOKENIZER.decode(ids)


def one(kind, data=None, **options):
    return sources([{"kind": kind, **options}], TOKENIZER, data)[0][1]


def draw(source, split=TRAIN, n=96, T=80, seed=0, step=0):
    return source.episode(random.Random(seed), n, T, split, step)


@pytest.fixture
def texts(tmp_path):
    write_texts(tmp_path / "texts")
    return tmp_path


@pytest.mark.parametrize("n", [64, 97, 200])
def test_lookup_contexts_are_exact_and_hold_what_is_asked(texts, n):
    source = one("lookup", texts, files="texts", facts=3, asked=2)
    for seed in range(10):
        episode = draw(source, n=n, seed=seed)
        assert len(episode.context) == n
        context, asked = text(episode.context), text(episode.ids)
        assert asked.startswith("\n The ")
        for sentence in asked.strip().split(".")[:-1]:
            assert f" {sentence.strip()}." in context


def test_the_answers_of_a_lookup_are_the_values():
    episode = draw(one("lookup", facts=2, asked=2, kinds={"number": 1}), n=128)
    answer = text([i for i, a in zip(episode.ids, episode.answers, strict=True) if a])
    numbers = [word for word in answer.split() if word.isdigit() and len(word) == 3]
    assert len(numbers) == 2 == len(answer.split())
    assert {w for w, a in zip(episode.weights, episode.answers, strict=True) if a} == {4.0}


def test_pairs_that_are_evaluated_are_never_trained_on():
    source = one("lookup", facts=2, asked=2)
    seen = {split: set() for split in (TRAIN, EVAL)}
    for split in seen:
        for seed in range(100):
            words = text(draw(source, split, seed=seed).context).replace(".", " ").split()
            seen[split] |= {
                (noun, value)
                for noun, verb, value in zip(words, words[1:], words[2:], strict=False)
                if verb == "is" and noun in NOUNS and value in WORDS
            }
    assert not seen[TRAIN] & seen[EVAL]
    assert all(held_out(*pair) for pair in seen[EVAL])


def test_text_continues_its_context(texts):
    episode = draw(one("text", texts, files="texts"), n=50, T=30)
    assert len(episode.context) == 50 and len(episode.ids) == 30
    whole = text(episode.context + episode.ids)
    assert any(whole in document.text for document in read_documents("texts", texts))


def test_knots_keep_the_order_within_a_document_and_continue_the_one_that_is_asked(texts):
    source = one("text", texts, files="texts", knots=3, chunk_tokens=20)
    documents = [document.text for document in read_documents("texts", texts)]
    for seed in range(5):
        episode = draw(source, n=200, T=40, seed=seed)
        assert len(episode.context) == 200
        chunks = [chunk for chunk in text(episode.context).split("\n[") if chunk]
        asked, tail = text(episode.ids)[2], text(episode.ids)[4:]
        own = "".join(chunk[2:] for chunk in chunks if chunk[0] == asked)
        assert any(own + tail in document for document in documents)
        assert {chunk[0] for chunk in chunks} == {"A", "B", "C"}


@pytest.mark.parametrize(
    ("knots", "chunk_tokens", "n", "T"),
    [(40, 32, 200, 64), (19, 32, 96, 64), (3, 20, 15, 5), (2, 1, 10, 5), (3, 32, 200, 5)],
)
def test_knots_fill_contexts_exactly_down_to_one_token_a_chunk(texts, knots, chunk_tokens, n, T):
    source = one("text", texts, files="texts", knots=knots, chunk_tokens=chunk_tokens)
    for seed in range(5):
        episode = draw(source, n=n, T=T, seed=seed)
        assert len(episode.context) == n and len(episode.ids) == T
        # A label has four bytes: what is predicted comes after it.
        assert episode.weights == [0.0] * 4 + [1.0] * (T - 4)


@pytest.mark.parametrize(
    ("knots", "n", "T", "least"),
    [
        (40, 199, 64, "200 context_tokens"),
        (40, 96, 64, "200 context_tokens"),
        (3, 14, 64, "15"),
        (3, 200, 4, "5 target"),
    ],
)
def test_knots_without_room_are_an_error(texts, knots, n, T, least):
    with pytest.raises(InputError, match=rf"knots={knots} needs .*{least}"):
        draw(one("text", texts, files="texts", knots=knots), n=n, T=T)


def test_chunks_of_no_token_are_an_error(texts):
    with pytest.raises(InputError, match="chunk_tokens=0"):
        one("text", texts, files="texts", knots=2, chunk_tokens=0)


def test_long_documents_are_drawn_more_often_where_wanted():
    documents = [Document("short", "a " * 400), Document("long", "b " * 400)]

    def share(factor):
        pool = Pool([documents[0], Document("long", "b " * 800)], TOKENIZER, factor, 400)
        rng = random.Random(0)
        return sum(pool.window(rng, 20)[1].name == "long" for _ in range(400)) / 400

    assert share(1.0) == pytest.approx(2 / 3, abs=0.08)
    assert share(4.0) == pytest.approx(8 / 9, abs=0.06)


def test_documents_are_split_by_hash_whatever_their_white_space():
    assert split_of(Document("a", "One  text.\n")) == split_of(Document("b", "one text."))
    shares = [split_of(Document("x", f"text {i}")) == EVAL for i in range(2000)]
    assert 0.03 < sum(shares) / 2000 < 0.07


def test_a_document_shorter_than_a_window_is_an_error(tmp_path):
    write_texts(tmp_path / "t", words=3)
    with pytest.raises(DataError, match=r"none of the .* documents has 130 tokens"):
        draw(one("text", tmp_path, files="t"), n=100, T=30)


def squad(folder, paragraphs=80):
    rows = []
    for number in range(paragraphs):
        context = f"Paragraph {number} says that the key of door {number} is under stone {number * 13}."
        question = {
            "question": f"Where is the key of door {number}?",
            "answers": [{"text": f"under stone {number * 13}"}],
            "is_impossible": False,
        }
        rows.append({"context": context, "qas": [question]})
    (folder / "squad.json").write_text(json.dumps({"data": [{"paragraphs": rows}]}))


def test_a_question_follows_its_paragraph_and_splits_share_none(tmp_path):
    squad(tmp_path)
    source = Questions("squad", TOKENIZER, tmp_path)
    for split in (TRAIN, EVAL):
        for seed in range(5):
            episode = draw(source, split, n=150, T=120, seed=seed)
            assert len(episode.context) == 150
            answer = text([i for i, a in zip(episode.ids, episode.answers, strict=True) if a]).strip()
            assert answer in text(episode.context)
    assert not source.hashes(TRAIN) & source.hashes(EVAL)


def test_a_paragraph_that_is_too_long_is_cut_around_the_answer(tmp_path):
    squad(tmp_path)
    episode = draw(Questions("squad", TOKENIZER, tmp_path), n=60, T=120)
    answer = text([i for i, a in zip(episode.ids, episode.answers, strict=True) if a]).strip()
    assert len(episode.context) == 60 and answer in text(episode.context)


def test_questions_that_are_missing_or_broken(tmp_path):
    with pytest.raises(DataError, match=r"has neither"):
        Questions("squad", TOKENIZER, tmp_path)
    (tmp_path / "squad.json").write_text('{"data": [{}]}')
    with pytest.raises(DataError, match="broken"):
        Questions("squad", TOKENIZER, tmp_path)


def stream(rows):
    return lambda skip: iter([f"Row {n} of a stream, which is told {n * 7} times." for n in range(skip, rows)])


def test_a_stream_stands_where_its_step_says_also_when_opened_late():
    def opened():
        return Streamed(stream(200), TOKENIZER, buffer=20, per_step=3)

    running, names = opened(), {}
    for step in range(90):
        names[step] = [draw(running, n=20, T=10, step=step, seed=seed).name for seed in range(3)]
    for step in (0, 5, 63, 70, 89):
        assert [draw(opened(), n=20, T=10, step=step, seed=seed).name for seed in range(3)] == names[step]
    assert draw(running, EVAL, n=20, T=10).name not in {name for found in names.values() for name in found}


def test_an_empty_stream_is_an_error():
    with pytest.raises(DataError, match="empty"):
        Streamed(lambda skip: iter([]), TOKENIZER)


def test_batches_are_the_same_whenever_asked_for_and_differ_by_step_micro_and_process():
    mixture = sources([{"kind": "lookup", "facts": 2, "asked": 1}], TOKENIZER, None)
    batches = Batches(mixture, 2, 64, seed=3)
    first = batches.batch(5, 96)
    assert torch.equal(first.context, Batches(mixture, 2, 64, seed=3).batch(5, 96).context)
    for other in (batches.batch(6, 96), batches.batch(5, 96, micro=1), batches.batch(5, 96, process=1)):
        assert not torch.equal(first.context, other.context)


def test_a_batch_pads_on_the_right_and_can_leave_the_last_tokens_raw():
    episodes = [
        Episode([1, 2, 3, 4], [5, 6], [0.0, 1.0], [False, True], "a", "x"),
        Episode([7, 8, 9, 10], [11, 12, 13], [1.0, 1.0, 4.0], [False, False, True], "a", "y"),
    ]
    batch = collate(episodes, pad=99, window_tokens=1)
    assert batch.context.tolist() == [[1, 2, 3], [7, 8, 9]]
    assert batch.ids.tolist() == [[4, 5, 6, 99], [10, 11, 12, 13]]
    assert batch.weights.tolist() == [[0, 0, 1, 0], [0, 1, 1, 4]]
    assert batch.answers.tolist() == [[False, False, True, False], [False, False, False, True]]


def test_evaluation_samples_are_always_the_same():
    source = one("lookup", facts=2, asked=1)
    assert evaluation_episodes(source, 3, 64, 64) == evaluation_episodes(source, 3, 64, 64)


def test_a_dataset_is_streamed_from_where_it_is_asked(tmp_path):
    pytest.importorskip("datasets")
    from longfit.training.data.streaming import hub_stream

    lines = [json.dumps({"body": f"Row {n}."}) for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    opened = hub_stream({"dataset": str(tmp_path), "column": "body"})
    assert list(opened(3)) == ["Row 3.", "Row 4."]
    with pytest.raises(DataError, match="no column 'text'"):
        list(hub_stream({"dataset": str(tmp_path)})(0))
    with pytest.raises(DataError, match="cannot be read"):
        list(hub_stream({"dataset": str(tmp_path / "nothing")})(0))
