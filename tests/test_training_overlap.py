"""Training and evaluation share no document: streams beside files, books in pieces, folders of few documents."""

import json
import random

import pytest

from longfit.errors import DataError, OverlapError
from longfit.training.data import EVAL, TRAIN, sources
from longfit.training.data.documents import PIECE_CHARACTERS, Document, read_documents, split, split_of
from longfit.training.data.sources import check_overlap, leave_out_evaluated
from longfit.training.data.streaming import Streamed
from longfit.training.data.text import Text
from tests.tiny_training import byte_tokenizer, write_texts

TOKENIZER = byte_tokenizer()
ROWS = [f"Row {n} of a long text, which is told {n * 7} times over and over." for n in range(200)]
STEPS = range(0, 60)


def jsonl(file, rows):
    file.write_text("\n".join(json.dumps({"text": row}) for row in rows), encoding="utf-8")


def streamed(rows=ROWS, **options):
    return Streamed(lambda skip: iter(rows[skip:]), TOKENIZER, **{"buffer": 20, "per_step": 3, **options})


def beside(folder, evaluated, rows=ROWS, **options):
    """A stream of `rows` in a mixture with a source that evaluates `evaluated`."""
    jsonl(folder / "train.jsonl", [f"Another text {n} that stands here alone." for n in range(50)])
    jsonl(folder / "eval.jsonl", evaluated)
    files = {"kind": "text", "files": "train.jsonl", "eval_files": "eval.jsonl"}
    given = streamed(rows, **options)
    mixture = [given, sources([files], TOKENIZER, folder)[0][1]]
    check_overlap(mixture)
    leave_out_evaluated(mixture)
    return given


def trained_rows(given):
    """Numbers of all rows that can be drawn for training."""
    return {int(d.name.split(":")[1]) for step in STEPS for d in given.at(step).documents}


def book(name, lines=4000):
    return "\n".join(f"Line {n} of {name}, chapter {n // 100}." for n in range(lines))


def test_a_stream_trains_on_no_row_that_another_source_evaluates(tmp_path):
    alone, left = trained_rows(streamed()), trained_rows(beside(tmp_path, ROWS[::3]))
    assert len([row for row in alone if row % 3 == 0]) > 40
    assert left == {row for row in alone if row % 3}


def test_the_wiring_from_a_recipe_hands_evaluated_hashes_to_its_streams(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "rows").mkdir()
    jsonl(tmp_path / "rows" / "rows.jsonl", ROWS)
    jsonl(tmp_path / "train.jsonl", ["Another text that stands here alone."])
    jsonl(tmp_path / "eval.jsonl", [row.upper() for row in ROWS[:60]])
    given = sources(
        [
            {"kind": "text", "dataset": str(tmp_path / "rows")},
            {"kind": "lookup", "files": "train.jsonl", "eval_files": "eval.jsonl"},
        ],
        TOKENIZER,
        tmp_path,
    )
    rows = {int(document.name.split(":")[-1]) for document in given[0][1].at(0).documents}
    assert len(rows) > 100 and min(rows) >= 60


def test_rows_that_are_left_out_do_not_move_where_a_stream_stands(tmp_path):
    running, names = beside(tmp_path, ROWS[::2]), {}
    for step in STEPS:
        names[step] = [document.name for document in running.at(step).documents]
    for step in (0, 1, 30, 59):
        late = beside(tmp_path, ROWS[::2])
        assert [document.name for document in late.at(step).documents] == names[step]
        assert {int(name.split(":")[1]) for name in names[step]} <= {n % 200 for n in range(step * 3, step * 3 + 20)}


def test_a_stream_passes_over_a_whole_book_whose_pieces_are_evaluated(tmp_path):
    whole = book("a book")
    assert split_of(Document("", whole)) == TRAIN and len(whole) > 2 * PIECE_CHARACTERS
    assert 5 in trained_rows(streamed([*ROWS[:5], whole, *ROWS[5:]]))
    assert 5 not in trained_rows(beside(tmp_path, [whole], [*ROWS[:5], whole, *ROWS[5:]]))


def test_a_streams_own_share_is_still_what_it_evaluates(tmp_path):
    given = beside(tmp_path, ROWS[::3])
    own = [row for row in ROWS if split_of(Document("", row)) == EVAL]
    assert [document.text for document in given.held.documents] == own
    assert not trained_rows(given) & {ROWS.index(row) for row in own}


def test_files_that_train_on_what_a_stream_evaluates_are_refused(tmp_path):
    jsonl(tmp_path / "train.jsonl", ROWS)
    jsonl(tmp_path / "eval.jsonl", ["Something else."])
    files = sources([{"kind": "text", "files": "train.jsonl", "eval_files": "eval.jsonl"}], TOKENIZER, tmp_path)[0][1]
    with pytest.raises(OverlapError, match="in training and in evaluation"):
        check_overlap([streamed(), files])


def test_a_buffer_of_nothing_but_evaluated_rows_is_an_error(tmp_path):
    given = beside(tmp_path, ROWS[:60])
    with pytest.raises(DataError, match=r"at step 2 every row .* raise buffer=20"):
        given.at(2)


@pytest.mark.parametrize("form", ["files", "rows"])
def test_all_pieces_of_a_book_are_on_one_side(tmp_path, form):
    books = [book(f"book {n}") for n in range(30)]
    for number, text in enumerate(books if form == "files" else []):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    if form == "rows":
        jsonl(tmp_path / "rows.jsonl", books)
    source = sources([{"kind": "text", "files": "."}], TOKENIZER, tmp_path)[0][1]
    pieces = {name: source.pools[name].documents for name in (TRAIN, EVAL)}
    of = {name: {piece.name.split("@")[0] for piece in found} for name, found in pieces.items()}
    assert of[EVAL] and len(of[TRAIN]) + len(of[EVAL]) == 30 and not of[TRAIN] & of[EVAL]
    assert all(len(found) > 2 * len(of[name]) for name, found in pieces.items())
    assert {split_of(piece) for piece in pieces[TRAIN]} == {TRAIN}


def test_pieces_carry_the_hash_of_the_book_and_a_short_document_its_own(tmp_path):
    (tmp_path / "a.txt").write_text(book("a book"), encoding="utf-8")
    (tmp_path / "b.txt").write_text("A short text.", encoding="utf-8")
    *pieces, short = read_documents(".", tmp_path)
    assert {piece.unit for piece in pieces} == {Document("", book("a book")).sha256}
    assert "".join(piece.text for piece in pieces) == book("a book")
    assert short.unit == short.sha256


def test_one_book_alone_needs_eval_files(tmp_path):
    (tmp_path / "a.txt").write_text(book("a book"), encoding="utf-8")
    with pytest.raises(DataError, match=r"single document, .* name others as eval_files"):
        sources([{"kind": "text", "files": "a.txt"}], TOKENIZER, tmp_path)
    (tmp_path / "b.txt").write_text(book("another"), encoding="utf-8")
    source = sources([{"kind": "text", "files": "a.txt", "eval_files": "b.txt"}], TOKENIZER, tmp_path)[0][1]
    assert {document.name.split("@")[0] for document in source.pools[TRAIN].documents} == {"a.txt"}


def test_of_few_documents_one_is_held_back_the_same_one_in_any_order():
    few = [Document(str(n), f"text {n}") for n in range(20)]
    few = [document for document in few if split_of(document) == TRAIN][:8]
    held = split(few)[EVAL]
    assert len(held) == 1 and split(few[::-1])[EVAL] == held and len(split(few)[TRAIN]) == 7


def test_documents_that_all_hash_to_the_evaluation_leave_some_to_train_on():
    held = [document for n in range(200) if split_of(document := Document(str(n), f"text {n}")) == EVAL][:3]
    assert len(held) == 3
    assert {name: len(found) for name, found in split(held).items()} == {TRAIN: 2, EVAL: 1}


def test_many_documents_are_split_by_their_hash_alone(tmp_path):
    documents = read_documents(".", write_texts(tmp_path, documents=200))
    found = split(documents)
    assert found == {name: [d for d in documents if split_of(d) == name] for name in (TRAIN, EVAL)}
    assert 1 < len(found[EVAL]) < 25


def test_a_book_in_training_and_in_evaluation_is_refused_across_sources(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(book(name), encoding="utf-8")
    first = {"kind": "text", "files": "a.txt", "eval_files": "b.txt"}
    second = {"kind": "lookup", "files": "c.txt", "eval_files": "a.txt"}
    with pytest.raises(OverlapError):
        sources([first, second], TOKENIZER, tmp_path)


def test_a_source_of_text_draws_training_and_evaluation_from_different_books(tmp_path):
    for n in range(6):
        (tmp_path / f"{n}.txt").write_text(book(f"book {n}"), encoding="utf-8")
    source = sources([{"kind": "text", "files": "."}], TOKENIZER, tmp_path)[0][1]
    assert isinstance(source, Text)
    drawn = {
        name: {source.episode(random.Random(seed), 40, 20, name, 0).name.split("@")[0] for seed in range(40)}
        for name in (TRAIN, EVAL)
    }
    assert len(drawn[EVAL]) == 1 and not drawn[TRAIN] & drawn[EVAL]
