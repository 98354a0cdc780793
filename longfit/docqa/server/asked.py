"""What the engine is asked, and what comes of it."""

from dataclasses import dataclass

from longfit.docqa.citations import Citation
from longfit.docqa.server.conversation import Message


@dataclass(frozen=True)
class Asked:
    """A request for an answer.

    Attributes:
        messages: the chat, its last message the question.
        document: id of the document that it is about; None for the chat alone.
        max_tokens: the longest answer.
        temperature: 0 takes the likeliest token each time.
        top_p: as in the OpenAI API, where the temperature is above 0.
        seed: of what is drawn; None for another answer each time.
        stop: the answer ends before the first of these.
        citations: passages to name at most.
    """

    messages: tuple[Message, ...]
    document: str | None
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    citations: int = 3


@dataclass(frozen=True)
class Answered:
    """What came of it. The text itself went out as ("text", piece) events of the job.

    Attributes:
        text: the whole answer.
        finish_reason: "stop" or "length".
        prompt_tokens, cached_tokens, completion_tokens: of the prompt, of its part that is a memory, of the answer.
        citations: passages that it rests on.
        kept_tokens, kv_bytes: entries a layer and bytes of the cache at the end.
        seconds: until the answer was complete, without the citations.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    citations: tuple[Citation, ...]
    kept_tokens: float
    kv_bytes: int
    seconds: float


class Cancelled(Exception):
    """Nobody waits for this work any more."""
