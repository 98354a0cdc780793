"""Proof that the base model did not move: a hash of every weight that is not trained, before and after."""

import hashlib

import torch
from torch import Tensor, nn

from longfit.errors import TrainingError


def frozen_hashes(student: nn.Module) -> dict[str, str]:
    """SHA-256 of the bytes of each frozen parameter and buffer; of this process's part where they are sharded."""
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    return {name: _sha256(tensor) for name, tensor in _tensors(student).items() if name not in trained}


def check_frozen(student: nn.Module, before: dict[str, str]) -> None:
    """Compare with the hashes from before, bit by bit.

    Raises:
        TrainingError: a weight moved.
    """
    after = _tensors(student)
    if moved := sorted(name for name in before if name not in after or _sha256(after[name]) != before[name]):
        raise TrainingError(
            f"{len(moved)} frozen weights moved while training, {moved[0]} among them: the adapter belongs to no model "
            "that anybody else has, and is not saved. Something changes the base model in place"
        )


def _tensors(student: nn.Module) -> dict[str, Tensor]:
    return {**dict(student.named_parameters()), **dict(student.named_buffers())}


def _sha256(tensor: Tensor) -> str:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return hashlib.sha256(local.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
