"""Own query, key and value projections for slots, beside the model's, for the duration of a pass."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longfit.errors import UnsupportedModelError

NAMES = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")


class SlotProjections(nn.Module):
    """A copy of each layer's q, k and v projections (or the fused one), in fp32, which acts at slots only.

    Args:
        layers: the model's layers.

    Raises:
        UnsupportedModelError: a layer has none of the projections, or its weights are quantised.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.copies = nn.ModuleDict()
        for index, layer in enumerate(layers):
            found = projections(layer)
            if not found or not all(module.weight.is_floating_point() for module in found.values()):
                raise UnsupportedModelError(
                    f"layer {index} ({type(layer).__name__}) has no unquantised q, k and v projections to start from"
                )
            for name, module in found.items():
                self.copies[f"{index}_{name}"] = _copied(module)

    @contextmanager
    def acting(self, layers: list[nn.Module], slots: Tensor) -> Iterator[None]:
        """Inside, what the layers' projections give at the places `slots` [N] comes from the copies."""
        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                for name, module in projections(layer).items():
                    hook = _hook(cast(nn.Linear, self.copies[f"{index}_{name}"]), slots)
                    stack.callback(module.register_forward_hook(hook).remove)
            yield


def projections(layer: nn.Module) -> dict[str, Any]:
    """The q, k and v projections of a layer by name, or its fused one."""
    named = ((name.rpartition(".")[2], module) for name, module in layer.named_modules())
    return {name: module for name, module in named if name in NAMES and isinstance(module, nn.Linear)}


def _copied(module: nn.Linear) -> nn.Linear:
    copy = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    with torch.no_grad():
        copy.weight.copy_(module.weight)
        if module.bias is not None:
            copy.bias.copy_(module.bias)
    return copy


def _hook(copy: nn.Linear, slots: Tensor) -> Any:
    weight, bias = copy.weight, copy.bias

    def at_slots(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        given, at = args[0], slots.to(output.device)
        own = F.linear(given[:, at], weight.to(given.dtype), None if bias is None else bias.to(given.dtype))
        return output.index_copy(1, at, own)

    return at_slots
