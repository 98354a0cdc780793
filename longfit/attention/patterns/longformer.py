"""Longformer: a window, and global tokens chosen by position, by id or by score."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longfit.attention.base import Scene
from longfit.attention.global_tokens import NOBODY, GlobalTokensPatch
from longfit.attention.received import received_mass
from longfit.errors import InputError

SCORED, MASS = "global_scored", "global_mass"


@dataclass
class Longformer(GlobalTokensPatch):
    """Every token sees a window of recent tokens and the global tokens before it; a global token sees everything.

    Beltagy et al. 2020, "Longformer: The Long-Document Transformer", causal: the paper's window has two sides and its
    global tokens projections of their own, which a pretrained decoder does not have. The paper chooses global tokens
    by task; here they are chosen

    - by position (`global_positions`, places in the input; by default the first four, which are attention sinks),
    - by token id (`global_ids`, a separator or a heading mark, say), in the prompt and while decoding,
    - by score (`scored_tokens`, ours): for each key/value head the tokens that received most attention, summed over the
      queries of the window that came in the same chunk. They turn global when their chunk has been read, so they are
      seen by everything after it, see no more than their window themselves, and depend on the size of the chunks.

    A token whose turn to see everything may come late needs everything stored; so what is out of sight is dropped only
    where there are no `global_ids` and all `global_positions` lie within the first window.
    """

    name = "longformer"
    source = "Beltagy et al. 2020 (Longformer)"
    summary = "a window and global tokens by position, by token id or by attention received"

    global_positions: tuple[int, ...] = (0, 1, 2, 3)
    global_ids: tuple[int, ...] = ()
    scored_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, scored_tokens=self.scored_tokens)
        self.global_positions = _whole_numbers("global_positions", self.global_positions)
        self.global_ids = _whole_numbers("global_ids", self.global_ids)

    @classmethod
    def reading(cls, read_tokens: int) -> dict[str, Any]:
        return {"window_tokens": read_tokens + 1 - len(cls.global_positions)}

    @property
    def looks_back(self) -> bool:
        """Whether a later token may want everything before it."""
        return bool(self.global_ids) or any(place >= self.window_tokens for place in self.global_positions)

    def reach(self, layer: int, layers: int) -> int | None:
        if self.looks_back:
            return None
        return self.window_tokens - 1 + len(self.global_positions) + self.scored_tokens

    def still_reachable(
        self, positions: Tensor, seen: int, layer: int, layers: int, state: dict[str, Tensor]
    ) -> Tensor | None:
        if self.looks_back:
            return None
        wanted = torch.tensor(self.global_positions, dtype=positions.dtype, device=positions.device)
        found = (positions > seen - self.window_tokens) | torch.isin(positions, wanted)
        if SCORED in state:
            found |= (positions[..., None] == state[SCORED][:, :, None]).any(-1)
        return found

    def marks(self, scene: Scene) -> Tensor:
        """
        Raises:
            InputError: global ids where the model was given embeddings.
        """
        B, _, Q, _ = scene.queries.shape
        places = torch.arange(scene.first, scene.first + Q, device=scene.queries.device)
        marked = torch.isin(places, places.new_tensor(self.global_positions)).expand(B, -1)
        if not self.global_ids:
            return marked
        if scene.ids is None:
            raise InputError("longformer: global_ids need token ids, and the model was given embeddings")
        ids = scene.ids.to(places.device)
        return marked | torch.isin(ids, ids.new_tensor(self.global_ids))

    def known(self, scene: Scene, marked: Tensor) -> Tensor:
        places = super().known(scene, marked)
        if SCORED not in scene.part.state:
            return places
        scored = scene.part.state[SCORED]
        return torch.cat([places.expand(-1, scored.shape[1], -1), scored], 2)

    def attend(self, scene: Scene) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(scene)
        if self.scored_tokens and scene.phase == "prefill" and scene.queries.shape[2] > scene.probe_tokens:
            self._score(scene, lse)
        return out, lse

    def _score(self, scene: Scene, lse: Tensor) -> None:
        """Keep the best of the tokens scored so far and the new ones."""
        mass = received_mass(scene.queries, scene.keys, lse, self.window_tokens, scene.scaling)
        B, G, Q = mass.shape
        taken = self.marks(scene)
        taken = taken | (torch.arange(Q, device=taken.device) >= Q - scene.probe_tokens)
        mass = mass.masked_fill(taken[:, None], float("-inf"))
        places = torch.arange(scene.first, scene.first + Q, device=mass.device).expand(B, G, -1)
        state = scene.part.state
        if SCORED in state:
            mass, places = torch.cat([state[MASS], mass], 2), torch.cat([state[SCORED], places], 2)
        top, slots = mass.topk(min(self.scored_tokens, mass.shape[2]), -1)
        state[MASS], state[SCORED] = top, places.gather(2, slots).masked_fill(top.isneginf(), NOBODY)


def _whole_numbers(option: str, values: Any) -> tuple[int, ...]:
    """
    Raises:
        InputError: something other than whole numbers from 0.
    """
    listed = [values] if isinstance(values, int) else values
    if isinstance(listed, str) or not all(isinstance(v, int) and v >= 0 for v in listed):
        raise InputError(f"longformer: {option}={values!r}; it is a list of whole numbers from 0, such as [0, 1]")
    return tuple(dict.fromkeys(listed))
