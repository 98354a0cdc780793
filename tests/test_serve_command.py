"""`longfit serve` as a user starts it, and what it says before it listens."""

import json
import socket
import subprocess
import sys

import httpx2
import pytest
import uvicorn

import longfit
from longfit.docqa.server import ServerSettings, serve
from longfit.errors import InputError
from tests.serving import TEXT, served, tiny, until
from tests.tiny_models_on_disk import save_tiny


def started(folder, state, *options):
    command = [sys.executable, "-m", "longfit", "serve", "-m", str(folder), "--state", str(state)]
    command += ["--port", "0", "-b", "150 tokens", "--json", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_process_that_is_killed_has_lost_nothing(tmp_path):
    save_tiny(tmp_path / "model")
    process = started(tmp_path / "model", tmp_path / "state")
    try:
        said = json.loads(process.stdout.readline())
        assert said["state"] == str(tmp_path / "state")
        with httpx2.Client(base_url=said["address"]) as http:
            (model,) = http.get("/v1/models").json()["data"]
            assert model["id"] == "model" and model["longfit"]["budget"] == "150 tokens"
            id = http.post("/v1/documents", files={"file": ("log.txt", TEXT)}).json()["id"]
            until(lambda: http.get(f"/v1/documents/{id}").json(), lambda d: d["status"] == "ready")
    finally:
        process.kill()
        process.communicate()
    assert not list(tmp_path.glob("state/documents/.*"))
    model, tokenizer = longfit.load(tmp_path / "model", progress=False)
    with served(tmp_path / "state", longfit.wrap(model, "snapkv", budget="150 tokens"), tokenizer) as made:
        (document,) = made.http.get("/v1/documents").json()["data"]
        assert document["id"] == id and document["status"] == "ready"
        said = made.ask("who", id, max_tokens=3)
        assert said.usage.prompt_tokens_details.cached_tokens == document["tokens_in"]


def told(monkeypatch, tmp_path, **settings):
    lines = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: [taken.close() for taken in sockets])
    serve(*tiny(), ServerSettings("tiny", tmp_path, port=0, **settings), lines.append)
    return "\n".join(lines)


def test_an_open_address_is_called_open(monkeypatch, tmp_path):
    assert "no password" not in told(monkeypatch, tmp_path / "a") and "127.0.0.1" in told(monkeypatch, tmp_path / "b")
    assert "warning: anyone who can reach 0.0.0.0" in told(monkeypatch, tmp_path / "c", host="0.0.0.0")


def test_a_taken_port_is_refused_before_the_state_folder_is_touched(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve(*tiny(), ServerSettings("tiny", tmp_path / "state", port=port), print)
    assert not (tmp_path / "state").exists()
    with pytest.raises(InputError, match="another --port or --host"):
        serve(*tiny(), ServerSettings("tiny", tmp_path / "state", port=0, host="192.0.2.7"), print)
