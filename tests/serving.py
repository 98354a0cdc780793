"""A server over a tiny model on a free port, in a thread of this process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import uvicorn

import longfit
from longfit.docqa.server import ServerSettings, create_app
from tests.tiny_models_on_disk import tiny_llama, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}.{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
TEXT = "the lamp was lit at four. the boat came at six. " * 12


def tiny(budget: str = "150 tokens", method: Any = "snapkv", **options: Any) -> tuple[Any, Any]:
    """A wrapped model and its tokenizer, with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = longfit.wrap(tiny_llama(), method, budget=budget, chunk_tokens=64, **options)
    model.generation_config.eos_token_id = None
    return model, tokenizer


class Served:
    """What a test talks to."""

    def __init__(self, app: Any, port: int) -> None:
        self.server = app.state.server
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx2.Client(base_url=self.url, timeout=30)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def upload(self, text: str | bytes = TEXT, name: str = "log.txt", wait: bool = True) -> dict[str, Any]:
        """Send a document; by default until it is ready or has failed."""
        sent = self.http.post("/v1/documents", files={"file": (name, text)})
        assert sent.status_code == 202, sent.text
        return self.settled(sent.json()["id"]) if wait else sent.json()

    def settled(self, id: str) -> dict[str, Any]:
        """The document once it is ready or has failed."""
        return until(lambda: self.http.get(f"/v1/documents/{id}").json(), lambda d: d["status"] in ("ready", "failed"))

    def ask(self, question: str = "when was it lit", document: str | None = None, **how: Any) -> Any:
        """An answer through the public client."""
        how = {"max_tokens": 5, **how}
        extra = {} if document is None else {"document": document}
        extra |= how.pop("extra", {})
        messages = how.pop("messages", [{"role": "user", "content": question}])
        return self.openai.chat.completions.create(model="tiny", messages=messages, extra_body=extra, **how)


@contextmanager
def served(state: Path, model: Any = None, tokenizer: Any = None, **settings: Any) -> Iterator[Served]:
    """A running server; it stops at the end of the `with`."""
    if model is None:
        model, tokenizer = tiny()
    app = create_app(model, tokenizer, ServerSettings("tiny", state, **settings))
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive(), bool)
    assert thread.is_alive(), "the server did not start"
    made = Served(app, server.servers[0].sockets[0].getsockname()[1])
    try:
        yield made
    finally:
        made.http.close()
        made.openai.close()
        server.should_exit = True
        thread.join(20)


def until(look: Any, good: Any, seconds: float = 20) -> Any:
    """What `look` gives as soon as that is good."""
    end = time.monotonic() + seconds
    while not good(seen := look()):
        assert time.monotonic() < end, f"still {seen} after {seconds} s"
        time.sleep(0.02)
    return seen
