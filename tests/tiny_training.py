"""A tokenizer of bytes, a tiny model and a recipe of a few steps: training without downloads."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_model

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, <pad> and <s>."""
    words = {"<pad>": 0, "<s>": 1} | {letter: number + 2 for number, letter in enumerate(BYTES)}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", padding_side="left")


def loaded():
    """A 2-layer random Llama over bytes, and its tokenizer."""
    return tiny_model("llama", vocab_size=len(BYTES) + 2), byte_tokenizer()


def recipe(**changes):
    return {
        "name": "tiny",
        "compressor": {"strided_kv": {"rank": 4}},
        "data": [{"kind": "lookup", "facts": 2, "asked": 2}],
        "losses": {"kl": 1.0},
        "context_tokens": 96,
        "target_tokens": 64,
        "batch_size": 2,
        "steps": 6,
        "lr": 0.01,
        "warmup_steps": 2,
        "checkpoint_every": 2,
        "evaluation": {"n": 0},
        **changes,
    }


def write_texts(folder, documents=60, words=120):
    """Text files that differ from each other."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = " ".join(f"word{number * 7 + place} stood." for place in range(words))
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return folder
