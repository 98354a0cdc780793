"""LoRA adapters on the base model, through PEFT: which one acts is said for a stretch of code, never left on."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from longfit.errors import FingerprintError, UnsupportedModelError

# The projections of the families that longfit tests; PEFT takes those that a model has.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "gate_up_proj", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
WEIGHTS = "adapter_model.safetensors"


class Adapters:
    """Named LoRA adapters of one model, all off outside `using()`.

    With every adapter off the model computes what it computed before, bit for bit. `remove()` takes them out again.

    Args:
        model: the model; its linear layers get PEFT's wrappers.
        ranks: rank by adapter name.
        alpha: scale over rank, for all: alpha = 2 rank unless given.
        targets: names of the linear layers; those of the model's family if left out.
        layers: by adapter name, to adapt only the first so many of the model's layers.

    Raises:
        UnsupportedModelError: the model has adapters already, or none of the layers.
    """

    def __init__(
        self,
        model: Any,
        ranks: Mapping[str, int],
        alpha: float | None = None,
        targets: tuple[str, ...] | None = None,
        layers: Mapping[str, int] | None = None,
    ) -> None:
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise UnsupportedModelError(
                f"{type(model).__name__} has adapters already; merge them (merge_and_unload) or unload them before a "
                "learned compressor adds its own"
            )
        self.model, self.peft = model, None
        self._names: list[str] = []
        wanted = set(targets or PROJECTIONS + FUSED)
        found = sorted(
            {
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and name.rpartition(".")[2] in wanted
            }
        )
        if ranks and not found:
            raise UnsupportedModelError(f"{type(model).__name__} has none of the layers {', '.join(sorted(wanted))}")
        frozen = {name: p.requires_grad for name, p in model.named_parameters()}
        for name, rank in ranks.items():
            first = (layers or {}).get(name)
            config = LoraConfig(
                r=rank,
                lora_alpha=int(alpha or 2 * rank),
                target_modules=found,
                bias="none",
                layers_to_transform=None if first is None else list(range(first)),
            )
            if self.peft is None:
                self.peft = get_peft_model(model, config, adapter_name=name)
            else:
                self.peft.add_adapter(name, config)
            self._names.append(name)
        # PEFT freezes the base; that is for whoever trains to decide.
        for name, parameter in model.named_parameters():
            known = name.replace(".base_layer.", ".")
            if known in frozen:
                parameter.requires_grad_(frozen[known])
        self._layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        for name in self._names:
            for parameter in self.parameters(name):
                parameter.requires_grad_(True)
        self._acting: str | None = next(iter(self._names), None)  # PEFT leaves an adapter on
        self._switch(None)

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Inside, the adapter `name` acts, or none; a name that is not there acts as none."""
        before = self._acting
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, name: str | None) -> None:
        wanted = name if name in self._names else None
        if wanted == self._acting:
            return
        self._acting = wanted
        before = [(p, p.requires_grad) for adapter in self._names for p in self.parameters(adapter)]
        for layer in self._layers:
            if self._acting is None:
                layer.enable_adapters(False)
            else:
                layer.set_adapter(self._acting)
                layer.enable_adapters(True)
        # PEFT ties requires_grad to what acts: a graph that was built before must still reach its weights, and what
        # whoever trains has frozen must stay so.
        for parameter, trainable in before:
            parameter.requires_grad_(trainable)

    @property
    def names(self) -> list[str]:
        return list(self._names)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The weights of one adapter."""
        marked = (f".{name}.", f".{name}")
        return [
            parameter
            for layer in self._layers
            for key, parameter in layer.named_parameters()
            if "base_layer" not in key and (marked[0] in f".{key}" or key.endswith(marked[1]))
        ]

    def save(self, folder: Path) -> None:
        """One folder per adapter, in PEFT's format."""
        if self.peft is not None:
            self.peft.save_pretrained(str(folder), selected_adapters=self.names)

    def save_one(self, name: str, folder: Path) -> None:
        """One adapter alone, in PEFT's format, in the folder itself."""
        assert self.peft is not None
        config = copy.copy(self.peft.peft_config[name])
        config.inference_mode = True
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        state = get_peft_model_state_dict(self.peft, adapter_name=name)
        save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, str(folder / WEIGHTS))

    def only(self, name: str) -> "Adapters":
        """These adapters without the others, on the same model; they are taken out with these."""
        view = copy.copy(self)
        view._names = [known for known in self._names if known == name]
        return view

    def load(self, folder: Path) -> None:
        """The weights that `save` wrote.

        Raises:
            FingerprintError: they do not fit this model or these ranks.
        """
        for name in self.names:
            state = load_file(folder / name / WEIGHTS)
            assert self.peft is not None
            own = get_peft_model_state_dict(self.peft, adapter_name=name)
            wrong = [key for key in own.keys() | state.keys() if key not in own or key not in state]
            wrong += [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
            if wrong:
                raise FingerprintError(
                    f"the adapter in {folder / name} does not fit this model: {len(wrong)} tensors differ, "
                    f"{sorted(wrong)[0]} among them"
                )
            set_peft_model_state_dict(self.peft, state, adapter_name=name)

    def remove(self) -> None:
        """Take PEFT's wrappers out of the model again."""
        if isinstance(self.peft, PeftModel):
            with torch.no_grad():
                self.peft.unload()
        self.peft, self._layers, self._names = None, [], []


class SplitAdapters:
    """`Adapters` of two models as one: each name belongs to the model that has it.

    Args:
        parts: adapters of the encoder and of the reader, with different names.
    """

    def __init__(self, *parts: Adapters) -> None:
        self.parts = parts

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Inside, the adapter `name` acts on its model, and none on the others."""
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.using(name))
            yield

    @property
    def names(self) -> list[str]:
        return [name for part in self.parts for name in part.names]

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The weights of one adapter."""
        return [parameter for part in self.parts if name in part.names for parameter in part.parameters(name)]

    def save(self, folder: Path) -> None:
        """One folder per adapter, in PEFT's format."""
        for part in self.parts:
            part.save(folder)

    def save_one(self, name: str, folder: Path) -> None:
        """One adapter alone, in PEFT's format, in the folder itself."""
        next(part for part in self.parts if name in part.names).save_one(name, folder)

    def load(self, folder: Path) -> None:
        """The weights that `save` wrote.

        Raises:
            FingerprintError: they do not fit.
        """
        for part in self.parts:
            part.load(folder)

    def remove(self) -> None:
        """Take PEFT's wrappers out of both models again."""
        for part in self.parts:
            part.remove()
