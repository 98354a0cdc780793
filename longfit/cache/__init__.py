"""Cache layers that hold a memory budget."""

from longfit.cache.fit import FitCache
from longfit.cache.hand_over import new_tier
from longfit.cache.kinds import FULL, SLIDING, layer_types
from longfit.cache.layer import HANDLE, BoundedLayer
from longfit.cache.ledger import Ledger
from longfit.cache.look import Look
from longfit.cache.part import Part
from longfit.cache.place import Memo, Placed, place, stand_for
from longfit.cache.release import recall
from longfit.cache.rotary import Rotary
from longfit.cache.shortened import Allowance, Shortened
from longfit.cache.side_by_side import SideBySide
from longfit.cache.side_index import GROWTH, GROWTH_SLOTS, Rows, SideIndex, appended
from longfit.cache.sliding import SlidingLayer
from longfit.cache.slow_file import Pages, SavedPages, Shelf, bytes_of, shelf_for
from longfit.cache.slow_tier import SlowTier
from longfit.cache.step import Step
from longfit.cache.store import Store, take
from longfit.cache.together import trim_together
from longfit.cache.trim import CERTAIN, SCORE, SINK
from longfit.cache.view import View

__all__ = [
    "CERTAIN",
    "FULL",
    "GROWTH",
    "GROWTH_SLOTS",
    "HANDLE",
    "SCORE",
    "SINK",
    "SLIDING",
    "Allowance",
    "BoundedLayer",
    "FitCache",
    "Ledger",
    "Look",
    "Memo",
    "Pages",
    "Part",
    "Placed",
    "Rotary",
    "Rows",
    "SavedPages",
    "Shelf",
    "Shortened",
    "SideBySide",
    "SideIndex",
    "SlidingLayer",
    "SlowTier",
    "Step",
    "Store",
    "View",
    "appended",
    "bytes_of",
    "layer_types",
    "new_tier",
    "place",
    "recall",
    "shelf_for",
    "stand_for",
    "take",
    "trim_together",
]
