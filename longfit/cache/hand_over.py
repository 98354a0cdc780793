"""What leaves the fast side of a layer goes to the slow one, where the attention offloads."""

from typing import Any

import torch

from longfit.cache.ledger import Ledger
from longfit.cache.part import Part
from longfit.cache.rotary import Rotary
from longfit.cache.slow_tier import SlowTier
from longfit.cache.store import Store
from longfit.errors import BudgetError


def hand_over(part: Part, entries: Store, patch: Any, ledger: Ledger, rotary: Rotary | None) -> None:
    """Give a part's entries to its slow tier, which is made when something first leaves.

    Where the patch limits distances, keys leave without rotation.
    """
    if rotary is not None and patch.limits_distance(ledger.packed):
        entries.keys = rotary.rotate(entries.keys, -ledger.angles(entries))
    if part.tier is None:
        part.tier = new_tier(patch, ledger, entries.keys.device)
    patch.release(part.tier, entries)


def new_tier(patch: Any, ledger: Ledger, device: torch.device) -> SlowTier:
    """An empty slow tier on the shelf that all layers of a cache write to."""
    if ledger.shelf is None:
        ledger.shelf = patch.shelf(device)
    tier: SlowTier = patch.tier(ledger.shelf)
    return tier


def room_beside_pages(limit: int, most: int, patch: Any, whole: bool, least: int) -> int:
    """Entries that stay on the fast side beside the pages brought in.

    Args:
        limit: entries that the budget allows; `whole`: those of the whole input, so that pages take nothing off.
        most: entries that the attention can look at, pages included.
        least: entries that have to stay.

    Raises:
        BudgetError: the pages leave too little.
    """
    beside = patch.brought_tokens
    room = limit if whole else limit - beside
    if room < least:
        raise BudgetError(
            f"the budget holds {limit:,} tokens a layer on the fast side; {beside:,} of them are pages brought in "
            f"by {patch.name}, and {least:,} have to stay; raise the budget or bring in less"
        )
    return min(room, most - beside)
