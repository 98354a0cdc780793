"""fp16: the scale of the loss, and the steps that are left out while it is too large."""

from typing import Any

from accelerate import Accelerator

# From 2**16, where the scale starts, it is below a tenth by then: no scale is to blame any more.
MOST_SKIPPED = 20


class Scaling:
    """What accelerate's GradScaler did to the steps; nothing without one.

    fp16 gradients of a scaled loss are infinite now and then, in the first steps as a rule. The scaler then leaves the
    optimizer's step out and halves its scale.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.skipped = accelerator, 0

    @property
    def active(self) -> bool:
        """Whether there is a scaler, so that gradients may be infinite."""
        return self.accelerator.scaler is not None

    def stepped(self) -> bool:
        """To be told of every step of the optimizer: whether too many in a row were left out by now."""
        self.skipped = self.skipped + 1 if self.accelerator.optimizer_step_was_skipped else 0
        return self.skipped >= MOST_SKIPPED

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON; empty without a scaler."""
        scaler = self.accelerator.scaler
        return {"skipped": self.skipped, "scaler": scaler.state_dict()} if scaler is not None else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.skipped = state.get("skipped", 0)
        if state.get("scaler") and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
