"""The text behind a memory: where tokens lie in it, how it is saved, and what is refused of it."""

import errno
import json

import pytest

import longfit
from longfit.docqa import Document, Page, Source, append, ask, ask_memory, compress, context_of, source_of
from longfit.docqa.tokens import tokenised
from longfit.errors import FingerprintError, InputError, MemoryFileError
from longfit.memory_file import CONTEXT, _sha256
from longfit.model import wrap
from tests.test_docqa import TEMPLATE
from tests.tiny_models_on_disk import tiny_llama, tiny_tokenizer

DOCUMENTS = [
    Document("a.pdf", "the lamp was lit. a storm came.", (Page(1, 0, 17), Page(2, 18, 31))),
    Document("b", "the keeper slept."),
]
SHORT = {"max_new_tokens": 3}


@pytest.fixture
def model():
    return wrap(tiny_llama(), "snapkv", budget="80 tokens", chunk_tokens=64)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_every_token_lies_where_its_text_is(template):
    tokenizer = tiny_tokenizer(chat_template=template)
    ids, source = context_of(tokenizer, DOCUMENTS)
    assert len(ids) == len(source.token_starts)
    for token, given in enumerate(ids):
        start, end = source.characters_of(token)
        assert tokenizer.convert_ids_to_tokens(given) in (source.text[start:end], "<unk>")
    for number, document in enumerate(DOCUMENTS):
        place = source.places[number]
        assert source.text[place : place + len(document.text)] == document.text
    start = DOCUMENTS[0].text.index("storm")
    first, last = source.tokens_of(0, start, start + 5)
    assert source.characters_of(first)[0] == source.places[0] + start and last - first == 5


def test_one_document_stands_alone_and_several_with_their_names():
    tokenizer = tiny_tokenizer()
    assert context_of(tokenizer, DOCUMENTS[1:])[1].text == "the keeper slept.\n\n"
    assert "Document: a.pdf\n\nthe lamp" in context_of(tokenizer, DOCUMENTS)[1].text
    with pytest.raises(InputError, match="b: the document is empty"):
        context_of(tokenizer, [DOCUMENTS[0], Document("b", " ")])
    with pytest.raises(InputError, match="no document"):
        context_of(tokenizer, [])


def test_a_text_in_pieces_has_the_tokens_of_the_whole():
    tokenizer, text = tiny_tokenizer(), "the lamp was lit at 4. " * 300
    whole, starts = tokenised(tokenizer, text)
    assert tokenised(tokenizer, text, piece=1000) == (whole, starts)
    assert starts[:4] == (0, 1, 2, 3)
    with pytest.raises(InputError, match="no place where this tokenizer lets it be cut"):
        tokenised(tokenizer, "4" * 5000, piece=1000)


@pytest.mark.real
def test_pieces_of_a_real_tokenizer(smollm2):
    _, tokenizer = smollm2
    text = "“Café”, said the 3rd keeper;\n\n  naïve — and\t10,000 日本語 words.  Then he went on. " * 200
    assert tokenised(tokenizer, text, piece=3000) == tokenised(tokenizer, text)


def test_a_source_comes_back_from_its_values():
    source = context_of(tiny_tokenizer(), DOCUMENTS)[1]
    assert Source.from_dict(json.loads(json.dumps(source.to_dict()))) == source
    assert Source.from_dict(json.loads(json.dumps(source.added(source).to_dict()))) == source.added(source)


@pytest.mark.parametrize(
    "change",
    [
        {"text": None},
        {"text": "short"},
        {"documents": [{"name": "x", "place": -1, "length": 3, "pages": []}]},
        {"documents": [{"name": "x", "place": 0, "length": 10**9, "pages": []}]},
        {"documents": [{"name": "x", "place": 0, "length": 5, "pages": [[0, 99]]}]},
        {"documents": [{"name": "x", "place": "0", "length": 5, "pages": []}]},
        {"documents": "x"},
        {"token_steps": [1, -1]},
        {"token_steps": [10**9]},
        {"token_steps": "many"},
        {"token_steps": None},
    ],
)
def test_hostile_sources_are_refused(change):
    given = context_of(tiny_tokenizer(), DOCUMENTS)[1].to_dict() | change
    with pytest.raises(MemoryFileError, match="not as longfit writes them"):
        Source.from_dict(given)


class TestSaved:
    @pytest.fixture
    def folder(self, model, tmp_path):
        return compress(model, tiny_tokenizer(), DOCUMENTS).save(tmp_path / "m")

    def test_documents_come_back_and_nothing_else_is_left(self, model, folder):
        loaded = longfit.Memory.load(folder, model)
        assert source_of(loaded).documents == tuple(DOCUMENTS)
        loaded.save(folder)
        assert len(list(folder.iterdir())) == 3

    def test_a_memory_without_documents_is_valid_and_says_so(self, model, tmp_path):
        import torch

        folder = model.compress(torch.arange(2, 40)[None]).save(tmp_path / "bare")
        assert len(list(folder.iterdir())) == 2
        loaded = longfit.Memory.load(folder, model)
        assert loaded.source is None and ask_memory(model, tiny_tokenizer(), loaded, "who", **SHORT).citations == ()
        with pytest.raises(MemoryFileError, match="does not know its documents"):
            ask_memory(model, tiny_tokenizer(), loaded, "who", citations=1, **SHORT)

    def test_a_changed_cut_or_missing_source_is_refused(self, model, folder):
        file = next(folder.glob("source-*.json"))
        whole = file.read_text()
        for changed in (whole.replace("lamp", "lump"), whole[:-20]):
            file.write_text(changed)
            with pytest.raises(MemoryFileError, match="changed or cut off"):
                longfit.Memory.load(folder, model)
        file.unlink()
        with pytest.raises(MemoryFileError, match="cannot be read"):
            longfit.Memory.load(folder, model)

    @pytest.mark.parametrize("name", ["../../etc/passwd", None, 7, "source-x.json"])
    def test_a_source_of_another_name_is_never_opened(self, model, folder, name):
        facts = json.loads((folder / CONTEXT).read_text())
        (folder / CONTEXT).write_text(json.dumps(facts | {"source": name}))
        with pytest.raises(MemoryFileError, match="not a file that longfit writes"):
            longfit.Memory.load(folder, model)

    def test_a_source_that_is_no_object_is_refused(self, model, folder):
        file, facts = next(folder.glob("source-*.json")), json.loads((folder / CONTEXT).read_text())
        for text in ("[1]", "[" * 100_000):
            file.write_text(text)
            (folder / CONTEXT).write_text(json.dumps(facts | {"source_sha256": _sha256(file)}))
            with pytest.raises(MemoryFileError):
                longfit.Memory.load(folder, model)

    @pytest.mark.parametrize("fails", ["tensors", "source", "context"])
    def test_a_full_disk_leaves_the_old_memory_whole(self, model, folder, monkeypatch, fails):
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        memory = compress(model, tiny_tokenizer(), "another text altogether, and a longer one.")

        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        if fails == "tensors":
            monkeypatch.setattr("longfit.memory_file.save_file", full)
        elif fails == "context":
            monkeypatch.setattr("longfit.memory_file.os.replace", full)
        else:
            monkeypatch.setattr("longfit.memory_file.json.dumps", full)
        with pytest.raises(OSError, match="No space left"):
            memory.save(folder)
        monkeypatch.undo()
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        assert source_of(longfit.Memory.load(folder, model)).documents == tuple(DOCUMENTS)


def test_another_tokenizer_or_template_is_refused(model):
    memory = compress(model, tiny_tokenizer(), DOCUMENTS)
    for ask_it in (
        lambda t: ask_memory(model, t, memory, "who", **SHORT),
        lambda t: append(model, t, memory, DOCUMENTS[1]),
    ):
        with pytest.raises(FingerprintError, match="another tokenizer or chat template"):
            ask_it(tiny_tokenizer(chat_template=TEMPLATE))


def test_appending_documents_is_reading_them_in_one_go_where_nothing_is_dropped():
    model, tokenizer = wrap(tiny_llama(), "snapkv", budget="400 tokens", chunk_tokens=64), tiny_tokenizer()
    grown = append(model, tokenizer, compress(model, tokenizer, DOCUMENTS[0]), DOCUMENTS[1])
    source = source_of(grown)
    assert source.documents == tuple(DOCUMENTS) and grown.tokens_in == len(source.token_starts)
    text = DOCUMENTS[0].text + "\n\nDocument: b\n\n" + DOCUMENTS[1].text
    assert source.text == text + "\n\n"
    whole = compress(model, tokenizer, text)
    asked = [ask_memory(model, tokenizer, memory, "who slept", max_new_tokens=6).text for memory in (grown, whole)]
    assert asked[0] == asked[1]


@pytest.mark.parametrize("aware", [True, False])
def test_a_question_longer_than_what_is_kept_is_refused(model, aware):
    long = "storm " * 30
    with pytest.raises(InputError, match=r"question has 18\d tokens, and the budget keeps 80"):
        ask(model, tiny_tokenizer(), DOCUMENTS, long, aware=aware, **SHORT)
    memory = compress(model, tiny_tokenizer(), DOCUMENTS)
    with pytest.raises(InputError, match="fewer words, or raise the budget"):
        ask_memory(model, tiny_tokenizer(), memory, long, **SHORT)
