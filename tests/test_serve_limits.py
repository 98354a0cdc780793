"""What a server refuses and what it survives: bad files, too much of anything, clients that go, a full disk."""

import errno
import json
import socket
import weakref
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

import longfit
from longfit.cache import FitCache
from longfit.context import FitContext
from longfit.docqa import likelihood
from longfit.docqa.server import ServerSettings, create_app
from longfit.docqa.server.documents import shown_name
from longfit.errors import InputError, UnsupportedFeatureError
from longfit.memory import Memory
from tests.documents import pdf
from tests.serving import served, tiny, until


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with served(tmp_path_factory.mktemp("state"), upload_limit=100_000, body_limit=20_000) as made:
        made.document = made.upload()
        yield made


def error_of(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    ("data", "name", "reason"),
    [
        (b"", "a.txt", "empty"),
        (b"  \n ", "a.txt", "empty"),
        (b"\x7fELF\x01\x00\x02", "a.txt", "NUL"),
        (b"caf\xe9 noir", "a.txt", "UTF-8"),
        (b"%PDF-1.7 and no more", "a.pdf", "a.pdf"),
        (pdf(["one page"], password="secret"), "a.pdf", "password"),
        (b"PK\x03\x04....", "a.docx", "a.docx"),
    ],
)
def test_files_that_cannot_be_read_are_refused_with_the_reason(running, data, name, reason):
    before = running.http.get("/v1/documents").json()["data"]
    sent = running.http.post("/v1/documents", files={"file": (name, data)})
    assert sent.status_code == 400 and reason in error_of(sent)["message"]
    assert error_of(sent)["type"] == "invalid_request_error"
    assert running.http.get("/v1/documents").json()["data"] == before


def test_an_upload_without_a_file(running):
    for sent in (
        running.http.post("/v1/documents", data={"text": "abc"}),
        running.http.post("/v1/documents", json={"file": "abc"}),
        running.http.post("/v1/documents", files={"file": ("", b"")}),
        running.http.post("/v1/documents", content=b"--x\r\nbroken", headers={"content-type": "multipart/form-data"}),
    ):
        assert sent.status_code == 400 and error_of(sent)


def raw(running, head, body=b""):
    """Send bytes as they are; the status and the error's code."""
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=10) as line:
        line.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
        answer = b""
        while piece := line.recv(65536):
            answer += piece
    top, _, rest = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(rest)["error"]["code"]


def test_too_large_requests_are_refused_before_they_are_read(running):
    host = "Host: 127.0.0.1\nConnection: close\n"
    form = "Content-Type: multipart/form-data; boundary=x\n"
    assert raw(running, f"POST /v1/documents HTTP/1.1\n{host}{form}Content-Length: 200000000\n") == (413, "too_large")
    chat = f"POST /v1/chat/completions HTTP/1.1\n{host}Content-Type: application/json\n"
    assert raw(running, f"{chat}Content-Length: 20001\n") == (413, "too_large")


def test_a_stream_of_unknown_length_is_counted(running):
    def pieces():
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
        for _ in range(30):
            yield b"a" * 10_000

    head = {"content-type": "multipart/form-data; boundary=x"}
    sent = running.http.post("/v1/documents", content=pieces(), headers=head)
    assert sent.status_code == 413 and error_of(sent)["code"] == "too_large"
    sent = running.http.post("/v1/chat/completions", content=(b"[" * 5000 for _ in range(5)))
    assert sent.status_code == 413
    assert running.ask("who", running.document["id"]).choices


def test_a_question_longer_than_the_budget(running):
    with pytest.raises(openai.BadRequestError, match="the budget holds 150") as error:
        running.ask("when " * 60, running.document["id"])
    assert error.value.code == "question_too_long" and error.value.param == "messages"


def test_a_chat_longer_than_the_models_window(running):
    with pytest.raises(openai.BadRequestError, match="upload the long text") as error:
        running.ask("a" * 16_000, max_tokens=1000)
    assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": "who"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "who"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, None),
        ({"messages": [{"role": "user", "content": " "}]}, None),
        ({"messages": [{"role": "assistant", "content": "I"}]}, None),
        ({"document": "doc-1", "documents": ["doc-2"]}, None),
        ({"citations": -1}, "citations"),
    ],
)
def test_requests_that_make_no_sense_name_their_field(running, change, param):
    given = {"model": "tiny", "messages": [{"role": "user", "content": "who"}], "max_tokens": 2} | change
    sent = running.http.post("/v1/chat/completions", json=given)
    assert sent.status_code == 400 and error_of(sent)["type"] == "invalid_request_error"
    assert param is None or error_of(sent)["param"] == param


def test_what_is_not_json_or_not_there(running):
    assert running.http.post("/v1/chat/completions", content=b"{").status_code == 400
    for missing in (running.http.get("/v1/nothing"), running.http.get("/v1/documents/doc-0/kept")):
        assert missing.status_code == 404 and error_of(missing)
    assert running.http.put("/v1/documents").status_code == 405


def test_no_path_of_a_client_is_ever_opened(running, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    for name in (str(tmp_path / "secret.txt"), "../../secret.txt", "C:\\x\\secret.txt"):
        document = running.upload("a lamp", name)
        assert document["name"] == "secret.txt"
        record = running.server.library.record(document["id"])
        assert record.folder.parent == running.server.library.home and record.documents()[0].text == "a lamp"
        running.http.delete(f"/v1/documents/{document['id']}")
    for id in ("../../etc/passwd", "..%2F..%2Fetc%2Fpasswd", running.document["id"] + "/.."):
        assert running.http.get(f"/v1/documents/{id}/kept").status_code == 404
        assert running.http.delete(f"/v1/documents/{id}").status_code in (404, 405)


def test_names_are_shown_without_what_cannot_be_printed():
    assert shown_name("a\x00\u202eb\n.txt") == "ab.txt" and shown_name("") == shown_name(None) == "document"
    assert shown_name("x" * 300 + ".pdf") == "x" * 116 + ".pdf" and shown_name("<b>.txt") == "<b>.txt"


def test_pages_of_other_sites_are_not_answered(running):
    for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}, {"origin": "null"}):
        sent = running.http.post("/v1/documents", files={"file": ("a.txt", b"abc")}, headers=headers)
        assert sent.status_code == 403 and error_of(sent)["code"].startswith("foreign_")
    own = {"origin": running.url}
    assert running.http.get("/v1/documents", headers=own).status_code == 200
    assert "access-control-allow-origin" not in running.http.get("/v1/documents", headers=own).headers


def test_a_defect_is_told_to_the_log_alone_and_the_worker_goes_on(running, monkeypatch):
    engine = running.server.engine
    monkeypatch.setattr(engine, "_alone", lambda job, asked: 1 / 0)
    with pytest.raises(openai.InternalServerError) as error:
        running.ask("who")
    assert "division" not in str(error.value) and error.value.code == "internal_error"
    monkeypatch.undo()
    assert running.ask("who").choices


def test_a_full_disk_fails_one_document_and_leaves_the_others(tmp_path, monkeypatch):
    with served(tmp_path) as made:
        first = made.upload()
        save = Memory.save

        def full(self, folder, about=None):
            save(self, folder, about)  # what is there when the disk is full
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Memory, "save", full)
        failed = made.upload("another lamp")
        assert failed["status"] == "failed" and failed["error"]["code"] == "disk_full"
        with pytest.raises(openai.ConflictError, match="disk is full"):
            made.ask("who", failed["id"])
        monkeypatch.setattr("longfit.docqa.server.library.store", _no_space)
        sent = made.http.post("/v1/documents", files={"file": ("a.txt", b"abc")})
        assert sent.status_code == 507 and error_of(sent)["code"] == "disk_full"
        assert made.ask("who", first["id"]).choices and made.server.library.bytes < 2**20
        monkeypatch.undo()
        assert made.upload("a third lamp")["status"] == "ready"


def _no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def long_stream(made, **how):
    return made.ask("who came", made.document["id"], max_tokens=20_000, stream=True, **how)


def test_a_client_that_goes_stops_its_answer_and_frees_the_worker(running):
    stream = long_stream(running)
    for _, chunk in zip(range(5), stream, strict=False):
        assert chunk.choices[0].finish_reason is None
    job = running.server.worker._running
    stream.close()
    until(lambda: running.server.worker._running is job, lambda busy: not busy, seconds=5)
    assert job.cancelled.is_set() and running.ask("who", running.document["id"]).choices


def test_a_client_that_goes_stops_the_search_for_passages(running, monkeypatch):
    worker, searched, batch = running.server.worker, [], likelihood._batch

    def until_the_client_has_gone(*given):
        searched.append(worker._running)
        until(worker._running.cancelled.is_set, bool)
        return batch(*given)

    with monkeypatch.context() as patched:
        patched.setattr("longfit.docqa.citations.stands_in", lambda *given: True)
        patched.setattr(likelihood, "_batch", until_the_client_has_gone)
        patched.setattr(likelihood, "BATCH_TOKENS", 1)  # each passage is a batch
        stream = running.ask("who came", running.document["id"], max_tokens=3, stream=True)
        job = until(lambda: worker._running if searched else None, bool)
        stream.close()
        until(lambda: worker._running is job, lambda busy: not busy)
    assert searched == [job] and running.ask("who", running.document["id"]).choices


def test_a_client_that_goes_while_it_waits_is_never_answered(running, monkeypatch):
    stream = long_stream(running)
    next(stream)
    answered = []
    answer = running.server.engine.answer
    monkeypatch.setattr(running.server.engine, "answer", lambda job, asked: answered.append(1) or answer(job, asked))
    with pytest.raises(openai.APITimeoutError):
        running.openai.with_options(timeout=0.5).chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "who"}]
        )
    until(lambda: running.server.worker.waiting, lambda waiting: waiting == 0, seconds=5)
    stream.close()
    assert running.ask("who").choices and answered == [1]


def test_fifty_questions_at_once_are_all_answered_or_told_to_wait(running, monkeypatch):
    worker = running.server.worker
    monkeypatch.setattr(worker, "most_waiting", 10)

    def one(number):
        try:
            return running.ask(f"who came {number}", running.document["id"], max_tokens=3).choices[0].message.content
        except openai.RateLimitError as error:
            assert error.code == "queue_full" and int(error.response.headers["retry-after"]) >= 1
            return error

    with ThreadPoolExecutor(50) as pool:
        said = list(pool.map(one, range(50)))
    refused = [answer for answer in said if isinstance(answer, openai.RateLimitError)]
    assert 0 < len(refused) < 40 and running.ask("who", running.document["id"]).choices


@pytest.fixture
def watched(monkeypatch):
    """What all caches of the process take together, after every forward."""
    caches, seen = weakref.WeakSet(), []

    def remembered(make):
        def made(*args, **kwargs):
            caches.add(cache := make(*args, **kwargs))
            return cache

        return made

    def looked_at(end):
        def after(self):
            end(self)
            seen.append(sum(cache.nbytes for cache in caches))

        return after

    monkeypatch.setattr(FitContext, "new_cache", remembered(FitContext.new_cache))
    monkeypatch.setattr(FitCache, "fork", remembered(FitCache.fork))
    monkeypatch.setattr(FitCache, "end", looked_at(FitCache.end))
    return seen


def test_memories_stay_under_the_limit_and_come_back_from_the_disk(tmp_path, watched):
    with served(tmp_path) as made:
        texts = [f"the {name} was lit at four. " * 20 for name in ("lamp", "boat", "fire", "star")]
        documents = [made.upload(text) for text in texts]
        answers = [made.ask("who", document["id"]).choices[0].message.content for document in documents]
    one = documents[0]["kv_bytes"]
    limit = int(3.5 * one)  # of the four memories two, beside the copy that a question works on
    watched.clear()
    with served(tmp_path, memory_limit=limit) as made:
        for _ in "ab":
            for document, answer in zip(documents, answers, strict=True):
                assert made.ask("who", document["id"]).choices[0].message.content == answer
                assert made.http.get("/v1/documents").json()["memory_bytes"] <= limit
        held = [document["in_memory"] for document in made.http.get("/v1/documents").json()["data"]]
        assert held == [True, True, False, False]  # the newest were asked last
    assert 2.9 * one < max(watched) <= limit and len(watched) >= 40


def test_what_never_fits_the_limit_is_refused_with_the_reason(tmp_path):
    with served(tmp_path, memory_limit=100_000) as made:
        document = made.upload()
        assert document["status"] == "failed" and document["error"]["code"] == "memory_limit"
        with pytest.raises(openai.APIStatusError, match="memory-limit") as error:
            made.ask("a" * 3000)
        assert error.value.status_code == 413
        assert made.ask("hello", max_tokens=2).choices


def test_a_document_that_is_removed_while_it_waits_is_not_compressed(running, monkeypatch):
    stream = long_stream(running)
    next(stream)
    waiting = running.upload("a lamp", wait=False)
    assert running.http.delete(f"/v1/documents/{waiting['id']}").status_code == 200
    stream.close()
    until(lambda: running.server.worker.waiting, lambda n: n == 0)
    assert running.ask("who", running.document["id"]).choices
    assert waiting["id"] not in [d["id"] for d in running.http.get("/v1/documents").json()["data"]]


def test_a_document_that_is_removed_while_it_is_read_leaves_nothing(running, monkeypatch):
    save, removed = Memory.save, []

    def slow(self, folder, about=None):
        removed.append(running.http.delete(f"/v1/documents/{folder.parent.name}").status_code)
        return save(self, folder, about)

    monkeypatch.setattr(Memory, "save", slow)
    document = running.upload("a lamp and a boat", wait=False)
    until(lambda: removed, bool)
    assert running.ask("who", running.document["id"]).choices and removed == [200]
    assert not (running.server.library.home / document["id"]).exists()
    assert running.http.get(f"/v1/documents/{document['id']}").status_code == 404


def test_a_stop_ends_what_runs_and_tells_who_waits(tmp_path):
    with served(tmp_path) as made:
        made.document = made.upload()
        stream = long_stream(made)
        next(stream)
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(made.http.post, "/v1/chat/completions", json=_question())
            until(lambda: made.server.worker.waiting, bool)
            made.server.worker.stop()
            told = waits.result(10)
            assert told.status_code == 503 and told.headers["retry-after"] and error_of(told)["code"] == "stopping"
        assert made.http.post("/v1/chat/completions", json=_question()).status_code == 503


def _question():
    return {"model": "tiny", "messages": [{"role": "user", "content": "who"}], "max_tokens": 2}


def test_settings_and_models_that_cannot_serve(tmp_path):
    model, tokenizer = tiny()
    for wrong in ({"memory_limit": 0}, {"port": 99999}, {"queue": 0}):
        with pytest.raises(InputError):
            ServerSettings("tiny", tmp_path, **wrong)
    assert ServerSettings("tiny", tmp_path, host="localhost").is_loopback
    assert not ServerSettings("tiny", tmp_path, host="0.0.0.0").is_loopback
    with pytest.raises(InputError, match="wrap"):
        create_app(object(), tokenizer, ServerSettings("tiny", tmp_path))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be used"):
        create_app(model, tokenizer, ServerSettings("tiny", tmp_path / "file"))
    model = longfit.wrap(model, "bm25", budget="25%", tokenizer=tokenizer)
    with pytest.raises(UnsupportedFeatureError, match="bm25 compresses a document for one question"):
        create_app(model, tokenizer, ServerSettings("tiny", tmp_path))
