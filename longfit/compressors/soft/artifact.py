"""Trained weights of a learned compressor on disk: a few megabytes beside the model they belong to.

A folder holds PEFT's own format for the adapters (`<adapter>/adapter_model.safetensors`, `adapter_config.json`), the
method's own modules (`modules.safetensors`), `longfit_adapter.json` with what they are and whose, and a model card.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longfit.compressors.soft.card import card
from longfit.errors import FingerprintError, LoadError

if TYPE_CHECKING:
    from longfit.compressors.soft.base import LearnedCompressor

FORMAT = 1
FACTS, MODULES, CARD = "longfit_adapter.json", "modules.safetensors", "README.md"
UNTRAINED = "untrained"
SAMPLED = 4096
SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")


@dataclass(frozen=True)
class Artifact:
    """A folder of trained weights, checked to be whole.

    Attributes:
        folder: where it is.
        facts: what `longfit_adapter.json` says: method, options, base, encoder (where it is another model),
            trained_ratios, steps, recipe, files.
    """

    folder: Path
    facts: dict[str, Any]

    @property
    def trained_ratios(self) -> tuple[int, ...]:
        return tuple(self.facts["trained_ratios"])

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.facts["options"])

    def adopt(self, compressor: "LearnedCompressor") -> None:
        """Set the compressor's options to those of the weights; options that differ from their defaults stay.

        Raises:
            FingerprintError: the weights are another method's.
        """
        if self.facts["method"] != compressor.name:
            raise FingerprintError(
                f"the adapter in {self.folder} is for {self.facts['method']}, not for {compressor.name}"
            )
        for option in fields(compressor):
            unset = getattr(compressor, option.name) == option.default
            if unset and option.name in self.options and option.name != "adapter":
                setattr(compressor, option.name, self.options[option.name])

    def check_base(self, model: Any) -> None:
        """Refuse a model that the weights were not trained on.

        Raises:
            FingerprintError: another size, or other weights.
        """
        self._check(self.facts["base"], model, "on")

    def check_encoder(self, compressor: "LearnedCompressor") -> None:
        """Refuse an encoder of a bound compressor that the weights were not trained with, another model or the reader's
        own weights. Older adapters do not say which one it was.

        Raises:
            FingerprintError: another size, or other weights.
        """
        wanted, model = self.facts.get("encoder"), compressor.encoder_model
        if "encoder" in self.facts and (wanted is not None or model is not None):
            own = compressor.backbone.model
            self._check(wanted or self.facts["base"], own if model is None else model, "with the encoder")

    def _check(self, wanted: dict[str, Any], model: Any, how: str) -> None:
        """Raise where a model is not the one that `base_facts` once gave `wanted` of."""
        given = base_facts(model)
        name = f"the adapter in {self.folder} was trained {how} {wanted['name']}"
        if wrong := [key for key in SIZES if wanted["sizes"][key] != given["sizes"][key]]:
            key = wrong[0]
            raise FingerprintError(f"{name} with {key}={wanted['sizes'][key]}; this one has {given['sizes'][key]}")
        if wanted["weights_sha256"] is None or given["weights_sha256"] is None:
            warnings.warn(f"{name}; whether this is the same one cannot be told from quantised or fp16 weights")
        elif wanted["weights_sha256"] != given["weights_sha256"]:
            raise FingerprintError(f"{name}, and this model of the same sizes has other weights; load that one")

    def load_into(self, compressor: "LearnedCompressor") -> None:
        """Put the weights into a bound compressor.

        Raises:
            FingerprintError: they do not fit its model, its encoder or its options.
            LoadError: a file cannot be read.
        """
        self.check_encoder(compressor)
        try:
            compressor.lora.load(self.folder)
            own = compressor.modules.state_dict()
            state = load_file(self.folder / MODULES) if own or (self.folder / MODULES).is_file() else {}
        except (OSError, SafetensorError) as error:
            raise LoadError(f"the adapter in {self.folder} cannot be read: {error}") from error
        # Scales and gates were scalars once; they are vectors of one.
        state = {key: tensor.reshape(1) if tensor.ndim == 0 else tensor for key, tensor in state.items()}
        wrong = sorted(own.keys() ^ state.keys())
        wrong += sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
        if wrong:
            raise FingerprintError(
                f"the adapter in {self.folder} does not fit {compressor.name} with these options: {len(wrong)} tensors "
                f"differ, {wrong[0]} among them; leave the options to the adapter"
            )
        compressor.modules.load_state_dict(state)


def find(name: str) -> Artifact:
    """A folder of trained weights, or those that longfit ships under a name; its files are checked.

    Raises:
        LoadError: no such folder or name, a file missing, cut off or changed.
        FingerprintError: written in a format that this version does not read.
    """
    folder = Path(name).expanduser()
    if not (folder / FACTS).is_file():
        shipped = shipped_folder() / name
        if folder.is_dir():
            raise LoadError(f"{folder} has no {FACTS}: it is no longfit adapter, or was not written to its end")
        if "/" in name or not (shipped / FACTS).is_file():
            known = ", ".join(shipped_names()) or "none"
            raise LoadError(f"no adapter is called {name!r}, and it is no folder; longfit ships: {known}")
        folder = shipped
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        version = facts["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{folder / FACTS} is damaged: {error!r}") from error
    if version != FORMAT:
        raise FingerprintError(f"the adapter in {folder} has format {version}; this longfit reads format {FORMAT}")
    _check_files(folder, facts)
    return Artifact(folder, facts)


def _check_files(folder: Path, facts: dict[str, Any]) -> None:
    for name, wanted in facts["files"].items():
        file = folder / name
        if not file.is_file():
            raise LoadError(f"the adapter in {folder} lacks {name}; copy it anew")
        if file.stat().st_size != wanted["bytes"]:
            raise LoadError(f"{file} is cut off: it has {file.stat().st_size} bytes of {wanted['bytes']}; copy it anew")
        if hashlib.sha256(file.read_bytes()).hexdigest() != wanted["sha256"]:
            raise LoadError(f"{file} is not what was written (SHA-256 differs); copy it anew")


def load(name: str, compressor: "LearnedCompressor", model: Any) -> "LearnedCompressor":
    """The compressor, bound to the model with the trained weights of a folder or a shipped name.

    Raises:
        LoadError, FingerprintError: see `find` and `Artifact`.
    """
    compressor.adapter = name
    return compressor.bind(model)


def shipped_folder() -> Path:
    """Where the adapters that come with longfit are."""
    return Path(str(files("longfit"))) / "adapters"


def shipped_names() -> list[str]:
    """Names of the adapters that come with longfit."""
    return sorted(file.parent.name for file in shipped_folder().glob(f"*/{FACTS}"))


def shipped_for(method: str, model: Any) -> list[str]:
    """Names of those that fit a method and a model's sizes."""
    sizes, fitting = _sizes(model), []
    for name in shipped_names():
        facts = json.loads((shipped_folder() / name / FACTS).read_text(encoding="utf-8"))
        if facts["method"] == method and facts["base"]["sizes"] == sizes:
            fitting.append(name)
    return fitting


def save(compressor: "LearnedCompressor", folder: Path, *, dtype: torch.dtype = torch.float32, **facts: Any) -> None:
    """Write the trained weights of a bound compressor, and nothing of its model.

    Args:
        folder: a new or empty one.
        dtype: of the weights on disk.
        facts: more of `longfit_adapter.json`: `base_name`, `trained_ratios` (the method's ratio if left out), `steps`,
            `recipe`, `results`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compressor.lora.save(folder)
    # PEFT writes a card of its own at the top, for a model that this is not.
    (folder / CARD).unlink(missing_ok=True)
    base = base_facts(compressor.backbone.model, facts.pop("base_name", None))
    for name in compressor.lora.names:
        _rewrite(folder / name, base["name"], dtype)
    if own := compressor.modules.state_dict():
        _write(own, folder / MODULES, dtype)
    written = sorted(file for file in folder.rglob("*") if file.is_file())
    record = {
        "format": FORMAT,
        "method": compressor.name,
        "options": {**compressor.options(), "adapter": None},
        "base": base,
        "encoder": None if compressor.encoder_model is None else base_facts(compressor.encoder_model),
        "trained_ratios": list(facts.pop("trained_ratios", (compressor.ratio,))),
        **facts,
        "files": {
            file.relative_to(folder).as_posix(): {
                "bytes": file.stat().st_size,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            for file in written
        },
    }
    (folder / CARD).write_text(card(record, compressor), encoding="utf-8")
    (folder / FACTS).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _rewrite(folder: Path, base_name: str, dtype: torch.dtype) -> None:
    """PEFT's files with weights in `dtype` and the model's name where a path of this machine may stand."""
    file = folder / "adapter_model.safetensors"
    _write(load_file(file), file, dtype)
    config = folder / "adapter_config.json"
    given = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_name}
    if isinstance(given.get("target_modules"), list):
        given["target_modules"].sort()  # a set, whose order differs from run to run
    config.write_text(json.dumps(given, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (folder / CARD).unlink(missing_ok=True)


def _write(state: dict[str, Tensor], file: Path, dtype: torch.dtype) -> None:
    """Tensors on the CPU, floating ones in `dtype`, in a file that others may read."""
    stored = {key: (t.to(dtype) if t.is_floating_point() else t).detach().cpu() for key, t in state.items()}
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors writes for its owner alone


def base_facts(model: Any, name: str | None = None) -> dict[str, Any]:
    """A model's name, sizes and a hash of its weights.

    The hash is of at most 4,096 values of each tensor, evenly spread, in bfloat16: the same for a model in float32 that
    was stored in bfloat16. None where the weights cannot be compared (quantised, fp16).
    """
    given = name or str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return {"name": Path(given).name if Path(given).is_absolute() else given, "sizes": _sizes(model)} | {
        "weights_sha256": weights_sha256(model)
    }


def _sizes(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    return {key: getattr(config, key, None) for key in SIZES}


def weights_sha256(model: Any) -> str | None:
    """See `base_facts`; adapters that PEFT put in do not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted((_plain(name), p) for name, p in model.named_parameters()):
        if "lora_" in name:
            continue
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            return None
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].to(torch.bfloat16).cpu().contiguous()
        digest.update(f"{name}{list(tensor.shape)}".encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")
