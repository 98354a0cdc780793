"""From token ids, one by one, to text that can be sent: whole characters, and nothing of a stop sequence."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

UNFINISHED = "\ufffd"
# Tokens before the new ones with which these are decoded, so that spaces between words come out right.
BEFORE = 8


class TextStream(BaseStreamer):
    """A streamer for `generate` with one row.

    Args:
        send: called with each new piece of text.
        stops: the text ends before the first of these.

    Attributes:
        ids: the answer's tokens so far.
        text: what was sent.
        stopped: a stop sequence was found.
    """

    def __init__(self, tokenizer: Any, send: Callable[[str], Any], stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.send = tokenizer, send
        self.stops = [stop for stop in stops if stop]
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._decoded = 0  # tokens that are in `_held` or were sent
        self._held = ""  # text that may be the beginning of a stop sequence
        self._in_prompt = True

    def put(self, value: Tensor) -> None:
        """The prompt first, then each new token."""
        if self._in_prompt:
            self._in_prompt = False
            return
        self.ids += value.reshape(-1).tolist()
        if not self.stopped:
            new = self._new_text()
            if not new.endswith(UNFINISHED):
                self._take(new)

    def end(self) -> None:
        """No token comes any more: what was held back goes out."""
        if not self.stopped:
            self._take(self._new_text())
            self._send(self._held)
            self._held = ""

    def _new_text(self) -> str:
        first = max(0, self._decoded - BEFORE)
        before = self._decode(self.ids[first : self._decoded])
        return self._decode(self.ids[first:])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _take(self, new: str) -> None:
        self._decoded = len(self.ids)
        held = self._held + (new if self.text else new.lstrip())
        found = [at for at in (held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped = True
            self._send(held[: min(found)])
            self._held = ""
            return
        safe = len(held) - max((_overlap(held, stop) for stop in self.stops), default=0)
        self._send(held[:safe])
        self._held = held[safe:]

    def _send(self, text: str) -> None:
        if text:
            self.text += text
            self.send(text)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` may go on from."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
