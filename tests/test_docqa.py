"""Reading documents, and splitting a prompt into what is compressed and what is asked."""

import pytest

from longfit.demo import document as keepers_log
from longfit.docqa import ask, document_of, read_document, split_prompt
from longfit.errors import InputError
from longfit.model import wrap
from tests.tiny_models_on_disk import tiny_llama, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}.{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
DOCUMENT = "the lamp was lit at four. " * 20


def test_text_is_read_without_its_byte_order_mark(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9")
    assert read_document(path).text == "café"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b" \n\t", "empty"),
        (b"\xef\xbb\xbf \n", "empty"),
        (b"abc\0def", "byte 3 is NUL"),
        (b"caf\xe9 noir", "not text in UTF-8.*byte 3"),
        (b"\xff\xfea\0b\0", "UTF-16"),
        (b"{\\rtf1 x", "an RTF file.*not read"),
        (b"PK\x03\x04....", "ZIP archive without a DOCX"),
    ],
)
def test_what_is_not_text_is_refused_by_name(data, reason):
    with pytest.raises(InputError, match=f"the file.*{reason}"):
        document_of(data, "the file")


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "Report.txt").write_text("text")
    with pytest.raises(InputError, match=r"did you mean .*Report\.txt\?"):
        read_document(tmp_path / "reprot.txt")
    with pytest.raises(InputError, match="no folder"):
        read_document(tmp_path / "nowhere" / "a.txt")
    with pytest.raises(InputError, match="is a folder"):
        read_document(tmp_path)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_context_and_question_join_to_the_whole_prompt(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    context, rest = split_prompt(tokenizer, DOCUMENT, " who lit it ")
    text = tokenizer.decode(context + rest).replace(" ", "").replace("<unk>", "")
    whole = f"{DOCUMENT}who lit it" if template is None else f"user {DOCUMENT}who lit it.assistant"
    assert text.startswith(whole.replace(" ", ""))
    assert "wholitit" in tokenizer.decode(rest).replace(" ", "")
    assert "lamp" not in tokenizer.decode(rest).replace(" ", "")


def test_a_document_that_looks_like_the_template_stays_in_the_context():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tricky = "{{ messages }} \u27e6document\u27e7\n\nassistant " + DOCUMENT
    context, rest = split_prompt(tokenizer, tricky, "who")
    plain_context, plain_rest = split_prompt(tokenizer, DOCUMENT, "who")
    assert rest == plain_rest and len(context) > len(plain_context)


@pytest.mark.parametrize("aware", [True, False])
def test_asking_keeps_the_budget_both_ways(aware):
    model, tokenizer = wrap(tiny_llama(), "snapkv", budget="100 tokens", chunk_tokens=64), tiny_tokenizer()
    first = ask(model, tokenizer, DOCUMENT, "who lit it", aware=aware, max_new_tokens=4)
    again = ask(model, tokenizer, DOCUMENT, "who lit it", aware=aware, max_new_tokens=4)
    assert first.text == again.text
    assert first.report.question_aware is aware
    assert first.report.tokens_in > 400 and first.report.kept_tokens <= 100
    assert first.report.chunks > 4


@pytest.mark.parametrize(
    ("document", "question", "new_tokens", "reason"),
    [
        (" ", "who", 4, "document is empty"),
        ("a", " ", 4, "question is empty"),
        ("a", "b", 0, "max_new_tokens"),
    ],
)
def test_nothing_to_ask_is_refused(document, question, new_tokens, reason):
    model = wrap(tiny_llama(), "knorm", budget="50%")
    with pytest.raises(InputError, match=reason):
        ask(model, tiny_tokenizer(), document, question, max_new_tokens=new_tokens)


def test_the_demo_document_holds_its_answer_once_and_in_the_middle():
    text = keepers_log.document()
    assert text == keepers_log.document()
    assert text.count(keepers_log.ANSWER) == 1 and keepers_log.ANSWER not in keepers_log.QUESTION
    assert 0.4 < text.index(keepers_log.ANSWER) / len(text) < 0.6
    entries = keepers_log.entries()
    assert len(set(entries)) == len(entries) > 100
