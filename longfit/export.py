"""Memories for other engines: a PEFT CARTRIDGE adapter, and prompt embeddings as vLLM takes them."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from longfit.cache import BoundedLayer
from longfit.compressors.soft.base import READER
from longfit.errors import InputError, UnknownNameError, UnsupportedFeatureError
from longfit.families import text_config
from longfit.memory import Memory

EMBEDDINGS = "prompt_embeds.safetensors"
CLIENT = '''"""Ask a vLLM server about the document that prompt_embeds.safetensors stands for.

Start it:  @SERVE@
Then:      python client.py MODEL "What does the document say?"

MODEL is a folder or a name of the hub, the same in both. The answer is decoded greedily.
"""

import base64
import io
import json
import sys
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model: str, question: str, server: str = "http://127.0.0.1:8000") -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    embed = AutoModelForCausalLM.from_pretrained(model).get_input_embeddings()
    document = load_file(Path(__file__).with_name("prompt_embeds.safetensors"))["prompt_embeds"]
    ids = tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        prompt = torch.cat([document, embed(ids)[0].to(document.dtype)])
    buffer = io.BytesIO()
    torch.save(prompt, buffer)
    body = {
        "model": @SERVED@,
        "prompt_embeds": base64.b64encode(buffer.getvalue()).decode(),
        "max_tokens": 64,
        "temperature": 0,
    }
    request = urllib.request.Request(
        server + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    print(json.load(urllib.request.urlopen(request))["choices"][0]["text"])


if __name__ == "__main__":
    main(*sys.argv[1:])
'''


def prompt_embeds(memory: Memory, model: Any) -> Tensor:
    """The input embeddings [S, E] that stand for the context: its soft slots, and the tokens that stayed raw.

    Handed to the base model as `inputs_embeds`, with the question's embeddings after them, they give what
    `model.generate(question, memory=memory)` gives; where the method reads with an adapter, to the model with it.

    Raises:
        UnsupportedFeatureError: the memory is not made of soft slots.
        InputError: it has several rows.
    """
    cache, encoder = memory.cache, model.longfit.encoder
    if encoder is None or cache.encoded is None or cache.encoded.soft is None or cache.raw_ids is None:
        raise UnsupportedFeatureError(
            "only soft slots are input embeddings; this memory holds keys and values or states: export it as a "
            "cartridge, or compress with arc, mean_pool, icae, autocompressor or another soft method"
        )
    if cache.rows != 1:
        raise InputError(f"the memory has {cache.rows} rows; export one document at a time")
    raw = model.get_input_embeddings()(cache.raw_ids)
    return torch.cat([cache.encoded.soft.to(raw.dtype), raw], 1)[0].detach()


def export_prompt_embeds(memory: Memory, model: Any, folder: Path) -> list[Path]:
    """Write the prompt embeddings, the reader's adapter where the method has one (`reader`, in PEFT's format, for
    `--enable-lora`), and a client for a vLLM server; returns the files.

    Raises:
        UnsupportedFeatureError, InputError: see `prompt_embeds`.
    """
    given = prompt_embeds(memory, model)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / EMBEDDINGS, folder / "client.py"]
    save_file({"prompt_embeds": given.contiguous().cpu()}, str(files[0]))
    serve, served = "vllm serve MODEL --enable-prompt-embeds", "model"
    if reader := _export_reader(model, folder):
        files += reader
        most = max(8, 1 << (model.longfit.encoder.rank - 1).bit_length())  # vLLM takes powers of two
        serve += f" --enable-lora --max-lora-rank {most} --lora-modules {READER}={READER}"
        served = f'"{READER}"'
    files[1].write_text(CLIENT.replace("@SERVE@", serve).replace("@SERVED@", served), encoding="utf-8")
    return files


def _export_reader(model: Any, folder: Path) -> list[Path]:
    """Write the adapter that the compressor reads with to `folder / "reader"`; nothing where the base model reads."""
    encoder = model.longfit.encoder
    if encoder is None or encoder.reads_with is None:
        return []
    encoder.lora.save_one(encoder.reads_with, folder / READER)
    return sorted((folder / READER).iterdir())


def cartridge_prefix(memory: Memory, model: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [1, G, M, D] of every layer, as a prefix of M tokens that the question follows at position M.

    The keys are rotated so that every distance to what follows is the same as in longfit; those of entries with holes
    between them may come to stand before position 0, which rotary embeddings do not mind.

    Raises:
        UnsupportedFeatureError: layers or heads hold different numbers of entries, or some layers are sliding.
        InputError: the memory has several rows.
    """
    cache = memory.cache
    if cache.rows != 1:
        raise InputError(f"the memory has {cache.rows} rows; export one document at a time")
    layers = cache.own_layers
    if not all(isinstance(layer, BoundedLayer) for layer in layers):
        raise UnsupportedFeatureError("a cartridge has no sliding layers; this model has, and a prefix would lose them")
    sizes = {part.kept for layer in cache.bounded for part in layer.parts}
    if len(sizes) != 1 or any(len(layer.parts) != 1 for layer in cache.bounded):
        raise UnsupportedFeatureError(
            "a cartridge holds as many entries in every layer and head; this memory does not (layer or head budgets)"
        )
    M, ledger = sizes.pop(), cache.ledger
    if M == 0 or (cache.encoded is not None and cache.encoded.states is not None):
        raise UnsupportedFeatureError("a memory that is read by cross-attention has no keys and values to export")
    seen = cache.seen - min(ledger.padding or [0])
    following = M if ledger.packed and not ledger.frozen else ledger.base[0] if ledger.packed else seen
    prefix = []
    for layer in cache.bounded:
        store = layer.parts[0].store
        assert store is not None and layer.rotary is not None
        if ledger.packed and not ledger.frozen:
            move = torch.arange(M, device=store.keys.device).expand(store.keys.shape[:3])
        else:
            move = torch.full(store.keys.shape[:3], M - following, device=store.keys.device)
        prefix.append((layer.rotary.rotate(store.keys, move), store.values))
    return prefix


def export_cartridge(memory: Memory, model: Any, folder: Path, base: str | None = None) -> list[Path]:
    """Write the memory as a PEFT CARTRIDGE adapter: `PeftModel.from_pretrained(model, folder)` goes on from it.

    The adapter of a method that reads with one is written to `reader` as well, with a warning: it has to be merged into
    the model first, `PeftModel.from_pretrained(model, folder / "reader").merge_and_unload()`.

    Args:
        base: what the adapter names as its base model; the model's own name if left out.

    Raises:
        UnsupportedFeatureError, InputError: see `cartridge_prefix`.
    """
    from peft import CartridgeConfig
    from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values

    prefix = cartridge_prefix(memory, model)
    M, config = prefix[0][0].shape[2], text_config(model)
    G, D = prefix[0][0].shape[1], prefix[0][0].shape[3]
    made = CartridgeConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=M,
        num_frozen_tokens=0,
        num_layers=config.num_hidden_layers,
        token_dim=G * D,
        num_attention_heads=G,
        num_transformer_submodules=1,
        base_model_name_or_path=base or config._name_or_path,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    made.save_pretrained(str(folder))
    flat = prompt_embeddings_from_past_key_values(prefix, num_virtual_tokens=M)
    save_file({"prompt_embeddings": flat.contiguous().cpu()}, str(folder / "adapter_model.safetensors"))
    facts = {"tokens_in": memory.tokens_in, "virtual_tokens": M, "fingerprint": memory.fingerprint}
    (folder / "longfit.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    files = [folder / name for name in ("adapter_config.json", "adapter_model.safetensors", "longfit.json")]
    if reader := _export_reader(model, folder):
        warnings.warn(
            f"{model.longfit.encoder.name} reads with a LoRA adapter; merge it into the model before the cartridge is "
            f'loaded: PeftModel.from_pretrained(model, "{folder / READER}").merge_and_unload()'
        )
        files += reader
    return files


EXPORTERS = {"cartridge": export_cartridge, "vllm-prompt-embeds": export_prompt_embeds}


def exporter(name: str) -> Any:
    """What writes a memory for the engine `name`.

    Raises:
        UnknownNameError: no such engine.
    """
    if name not in EXPORTERS:
        raise UnknownNameError(f"memories are exported to {' or '.join(EXPORTERS)}, not to {name!r}")
    return EXPORTERS[name]
