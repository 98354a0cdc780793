"""The model folder and the prompt that all systems of one benchmark share."""

import os
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from longfit.errors import InputError

TINY_MODEL = "tiny"
TINY_VOCABULARY = 512


def prepare_model(name: str, run_folder: Path) -> str:
    """A transformers folder (or hub id) that every worker loads.

    `tiny` is a seeded two-layer Llama written to the run folder; a packaged name is the converted model in
    the user's cache; anything else is handed to `from_pretrained` as it is.
    """
    if name == TINY_MODEL:
        folder = run_folder / "model"
        if not (folder / "config.json").exists():
            model = _tiny_model()
            folder.mkdir(exist_ok=True)
            save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
            model.config.save_pretrained(folder)
        return str(folder)
    from longfit.packaged import PACKAGED_MODELS, model_folder

    return str(model_folder(name)) if name in PACKAGED_MODELS else name


def _tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config)


def prepare_prompt(name: str, model_folder: str, tokens: int, run_folder: Path, data: str | None) -> Path:
    """The file of prompt ids [tokens] (int32) in the run folder, made once; each cell takes the first T.

    Text comes from the `.txt` files of `data` in name order, or from the chapter that longfit carries,
    repeated with the paragraphs rotated; the tiny model gets random ids. Raises `InputError`.
    """
    path = run_folder / "prompt_ids.npy"
    if path.exists() and len(np.load(path)) >= tokens:
        return path
    if name == TINY_MODEL:
        ids = np.random.default_rng(0).integers(3, TINY_VOCABULARY, tokens, dtype=np.int32)
    else:
        ids = _text_ids(AutoTokenizer.from_pretrained(model_folder), tokens, data)
    temporary = path.with_name(".prompt_ids.tmp.npy")
    np.save(temporary, ids)
    os.replace(temporary, path)
    return path


def _text_ids(tokenizer: Any, tokens: int, data: str | None) -> np.ndarray:
    books = _books(data)
    parts: list[np.ndarray] = []
    found = rotation = 0
    while found < tokens:
        book = books[rotation % len(books)]
        turn = rotation // len(books)
        paragraphs = book.split("\n\n")
        shift = turn % len(paragraphs)
        text = "\n\n".join(paragraphs[shift:] + paragraphs[:shift]) + "\n\n"
        ids = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=np.int32)
        parts.append(ids)
        found += len(ids)
        rotation += 1
    return np.concatenate(parts)[:tokens]


def _books(data: str | None) -> list[str]:
    if data is None:
        return [resources.files("longfit.bench").joinpath("prompt.txt").read_text(encoding="utf-8")]
    folder = Path(data)
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    if not any(text.strip() for text in texts):
        raise InputError(f"{data} has no .txt files with text in it; pass a folder of plain-text books")
    return [text for text in texts if text.strip()]
