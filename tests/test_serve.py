"""The server, through the public openai client: documents, answers, streams, and nothing lost on restart."""

import json

import openai
import pytest

import longfit
from longfit.docqa import ask_memory
from longfit.docqa.server.text_stream import TextStream
from longfit.memory import Memory
from tests.serving import TEXT, served, tiny, until
from tests.tiny_models_on_disk import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with served(tmp_path_factory.mktemp("state")) as made:
        made.document = made.upload()
        yield made


def test_a_document_is_compressed_and_says_what_it_costs(running):
    document = running.document
    assert document["status"] == "ready" and document["name"] == "log.txt" and document["in_memory"]
    assert document["kept_tokens"] == 150 and document["tokens_in"] > len(TEXT) - 3
    assert 0 < document["kv_bytes"] < document["full_kv_bytes"]
    assert running.http.get("/v1/documents").json()["data"][-1]["id"] == document["id"]


def test_an_answer_is_the_memorys_own_answer(running):
    said = running.ask("when was it lit", running.document["id"], max_tokens=6)
    model, tokenizer = running.server.engine.model, running.server.engine.tokenizer
    folder = running.server.library.record(running.document["id"]).memory_folder(running.server.library.fingerprint)
    expected = ask_memory(model, tokenizer, Memory.load(folder, model), "when was it lit", max_new_tokens=6)
    assert said.choices[0].message.content.strip() == expected.text
    assert said.choices[0].finish_reason == "length" and said.usage.completion_tokens == 6
    assert said.usage.prompt_tokens_details.cached_tokens == running.document["tokens_in"]
    facts = said.model_extra["longfit"]
    assert facts["kept_tokens"] <= 150 and facts["kv_bytes"] > 0 and facts["seconds"] > 0
    again = running.ask("when was it lit", max_tokens=6, extra={"documents": [running.document["id"]]})
    assert again.choices[0].message.content == said.choices[0].message.content


def test_citations_come_with_the_answer(running):
    found = running.ask("when was it lit", running.document["id"]).model_extra["longfit"]["citations"]
    assert 0 < len(found) <= 3
    for citation in found:
        assert TEXT.strip()[citation["start"] : citation["end"]] == citation["quote"]
        assert citation["document"] == "log.txt" and 0 <= citation["kept"] <= 1
    none = running.ask("when was it lit", running.document["id"], extra={"citations": 0})
    assert none.model_extra["longfit"]["citations"] == []


def test_a_stream_brings_the_same_text_and_the_facts_last(running):
    whole = running.ask("who came", running.document["id"], max_tokens=8)
    stream = running.ask(
        "who came", running.document["id"], max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last, usage = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content and len(chunks) > 3
    assert last.choices[0].finish_reason == "length"
    assert last.model_extra["longfit"]["citations"] == whole.model_extra["longfit"]["citations"]
    assert usage.usage == whole.usage and usage.choices == []


def test_without_a_document_the_plain_model_answers(running):
    engine = running.server.engine
    said = running.ask("hello you", max_tokens=5)
    with engine.model.disabled():
        prompt = engine.tokenizer("user hello you.assistant ", add_special_tokens=False, return_tensors="pt")
        ids = engine.model.generate(prompt["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = engine.tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.choices[0].message.content == expected.lstrip()
    assert said.usage.prompt_tokens == prompt["input_ids"].shape[1]
    assert said.usage.prompt_tokens_details.cached_tokens == 0


def test_later_turns_and_a_system_message_reach_the_model(running):
    turns = [
        {"role": "user", "content": "who came"},
        {"role": "assistant", "content": "a boat"},
        {"role": "user", "content": [{"type": "text", "text": "and when"}]},
    ]
    one = running.ask(messages=turns, document=running.document["id"])
    two = running.ask(messages=[{"role": "system", "content": "be brief"}, *turns], document=running.document["id"])
    assert two.usage.prompt_tokens - one.usage.prompt_tokens == len("be brief\n\n")
    assert one.usage.prompt_tokens > running.document["tokens_in"] + len("who came.assistant a boat.user and when")


def test_sampling_follows_its_seed(running):
    def said(seed):
        how = {"temperature": 1.5, "top_p": 0.99, "seed": seed, "max_tokens": 12}
        return running.ask("who came", running.document["id"], **how).choices[0].message.content

    assert said(1) == said(1) and len({said(seed) for seed in range(4)}) > 1


def test_a_stop_sequence_ends_the_answer_before_it(running):
    whole = running.ask("who came", running.document["id"], max_tokens=12).choices[0].message.content
    stop = whole[4:6]
    cut = running.ask("who came", running.document["id"], max_tokens=12, stop=stop)
    assert cut.choices[0].message.content == whole[: whole.index(stop)] and cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 12


def test_models(running):
    assert [model.id for model in running.openai.models.list()] == ["tiny"]
    assert running.openai.models.retrieve("tiny").owned_by == "longfit"
    with pytest.raises(openai.NotFoundError, match="'other'"):
        running.openai.models.retrieve("other")


def test_what_was_kept_is_there_for_the_page(running):
    given = running.http.get(f"/v1/documents/{running.document['id']}/kept").json()
    assert given["documents"][0]["text"] == TEXT.strip() and given["layers"] == [0, 1]
    # Of all tokens 150 are kept in each layer; the template's own are not shown.
    assert given["share"][0] == pytest.approx(100 * 150 / running.document["tokens_in"], abs=0.1)


def test_several_files_are_one_document(running):
    files = [("file", ("a.txt", "one lamp")), ("file", ("b.txt", "two boats"))]
    sent = running.http.post("/v1/documents", files=files).json()
    document = running.settled(sent["id"])
    assert document["files"] == ["a.txt", "b.txt"] and document["status"] == "ready"
    names = {d["name"] for d in running.http.get(f"/v1/documents/{sent['id']}/kept").json()["documents"]}
    assert names == {"a.txt", "b.txt"}
    running.http.delete(f"/v1/documents/{sent['id']}")


def test_a_deleted_document_is_gone_from_the_disk_too(running):
    document = running.upload("a lamp and a boat")
    folder = running.server.library.record(document["id"]).folder
    assert folder.is_dir()
    assert running.http.delete(f"/v1/documents/{document['id']}").json()["deleted"] is True
    assert not folder.exists() and running.http.get(f"/v1/documents/{document['id']}").status_code == 404
    with pytest.raises(openai.NotFoundError) as error:
        running.ask("who", document["id"])
    assert error.value.code == "document_not_found" and error.value.param == "document"


def test_a_restart_loses_nothing_and_reads_nothing_again(tmp_path):
    with served(tmp_path) as first:
        document = first.upload()
        answer = first.ask("who came", document["id"]).choices[0].message.content
    (tmp_path / "documents" / ".coming-doc-half").mkdir()
    with served(tmp_path) as second:
        found = second.http.get("/v1/documents").json()["data"]
        assert found == [{**document, "in_memory": False}]
        second.server.engine.compress = None  # it is not compressed again
        assert second.ask("who came", document["id"]).choices[0].message.content == answer
    assert not (tmp_path / "documents" / ".coming-doc-half").exists()


def test_a_document_that_was_not_compressed_before_the_end_is_compressed_after_the_start(tmp_path):
    with served(tmp_path) as first:
        first.server.worker._stopped = True  # as if killed before the work began
        first.server.worker.submit = lambda job, always=False: job
        waiting = first.upload(wait=False)
        assert waiting["status"] == "queued"
    with served(tmp_path) as second:
        assert second.settled(waiting["id"])["status"] == "ready"


def test_another_method_or_budget_compresses_again_and_leaves_the_old_memory(tmp_path):
    with served(tmp_path) as first:
        document = first.upload()
    for tokens, method in ((100, "knorm"), (120, "snapkv")):
        with served(tmp_path, *tiny(budget=f"{tokens} tokens", method=method)) as second:
            assert second.settled(document["id"])["kept_tokens"] == tokens
    with served(tmp_path) as third:
        assert third.http.get(f"/v1/documents/{document['id']}").json()["kept_tokens"] == 150


def test_a_damaged_memory_is_made_again(tmp_path):
    with served(tmp_path) as first:
        document = first.upload()
        answer = first.ask("who came", document["id"]).choices[0].message.content
    (tensors,) = tmp_path.glob("documents/doc-*/memory-*/*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-9])
    with served(tmp_path) as second:
        assert second.ask("who came", document["id"]).choices[0].message.content == answer


def test_a_second_server_keeps_its_hands_off_the_folder(tmp_path):
    from longfit.errors import InputError

    with served(tmp_path), pytest.raises(InputError, match="another server"), served(tmp_path):
        pass


def test_the_page_asks_for_nothing_from_elsewhere(running):
    page = running.http.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("page.css", "page.js", "kept.css", "kept.js"):
        part = running.http.get(f"/page/{name}")
        assert part.status_code == 200 and "http" not in part.text.replace("http://www.w3.org", "")
    assert running.http.get("/page/../app.py").status_code == 404
    assert running.http.get("/page/app.py").status_code == 404
    assert json.loads(running.http.get("/openapi.json").text)["info"]["title"] == "longfit"


class Letters:
    """Decodes ids as characters; 0xFF and 0xFE are the halves of one letter."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids)).replace("\xff\xfe", "é").replace("\xff", "\ufffd")


def streamed(text, stops=()):
    sent = []
    stream = TextStream(Letters(), sent.append, stops)
    import torch

    stream.put(torch.tensor([[1, 2]]))
    for letter in text:
        stream.put(torch.tensor([ord(letter)]))
        if stream.stopped:
            break
    stream.end()
    return sent, stream


def test_text_goes_out_in_whole_characters_and_without_stop_sequences():
    assert streamed("ca\xff\xfe!")[0] == ["c", "a", "é", "!"]
    assert "".join(streamed("  two words")[0]) == "two words"
    sent, stream = streamed("abcabdxyz", ["abd", "zz"])
    assert "".join(sent) == "abc" and stream.stopped
    sent, stream = streamed("abcab", ["abd"])
    assert sent == ["abc", "ab"] and not stream.stopped and stream.text == "abcab"
    assert until(lambda: 1, bool) == 1


@pytest.mark.parametrize("kind", ["learned", "soft", "attention", "prompt", "head budgets"])
def test_every_kind_of_method_can_be_served(kind, tmp_path):
    tokenizer = tiny_tokenizer()
    made = {
        "learned": lambda: longfit.wrap(tiny_llama(), "strided_kv", ratio=4, segment_tokens=64),
        "soft": lambda: longfit.wrap(tiny_llama(), "mean_pool", ratio=4, segment_tokens=64, adapter="untrained"),
        "attention": lambda: longfit.wrap(tiny_llama(), attention="topk", dense_layers=0),
        "prompt": lambda: longfit.wrap(tiny_llama(), "truncate", budget="50%", tokenizer=tokenizer),
        "head budgets": lambda: longfit.wrap(tiny_llama(), "adakv", budget="50%"),
    }[kind]()
    with served(tmp_path, made, tokenizer) as running:
        document = running.upload()
        assert document["status"] == "ready", document
        assert running.ask("who", document["id"]).usage.completion_tokens == 5
        given = running.http.get(f"/v1/documents/{document['id']}/kept").json()
        expected = {"learned": 25, "soft": 25, "attention": 100, "prompt": 50, "head budgets": 50}[kind]
        assert given["share"][0] == pytest.approx(expected, abs=4)
        running.server.library._memories.clear()
        assert running.ask("who", document["id"]).usage.completion_tokens == 5
