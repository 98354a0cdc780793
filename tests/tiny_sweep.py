"""A small grid of cells on needles, a model of one layer for it, and their fixtures."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.test_needle import byte_tokenizer

MODEL = "tiny"
RECIPE = {
    "name": "tiny",
    "suite": "needle",
    "models": [MODEL],
    "dtype": "float32",
    "tasks": ["niah_single", "niah_multikey"],
    "lengths": [700],
    "n": 4,
    "block_samples": 2,
    "max_new_tokens": 2,
    "cells": [
        {"methods": [{"snapkv": {"window": 16}}], "keep_ratios": [0.5, 0.25], "awareness": ["agnostic", "aware"]},
        {"methods": ["full", "no_context"]},
        {"methods": ["truncate"], "keep_ratios": [0.5]},
    ],
}
CELLS, SAMPLES = 7, 8


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LONGFIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module", name="loaded")
def loaded_tiny():
    return tiny_model(), byte_tokenizer()


@pytest.fixture(scope="module", name="model_folder")
def folder_of_tiny(tmp_path_factory, loaded):
    folder = tmp_path_factory.mktemp("model")
    loaded[0].save_pretrained(folder)
    loaded[1].save_pretrained(folder)
    return str(folder)


def lines(folder, stem="samples"):
    return [json.loads(line) for line in (folder / f"{stem}.jsonl").read_text().splitlines()]
