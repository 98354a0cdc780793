"""A byte-pair tokenizer and texts for prompt compressors, built in code, and every prompt compressor with options that
fit tiny models."""

import json
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longfit.compressors import available_prompt, get
from longfit.compressors.prompt.lm import LanguageModel
from longfit.compressors.prompt.probe import Probe
from tests.tiny import tiny_model

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
STORY = (
    "The keeper lit the lamp at four. Nobody came that night, and the sea was calm. In the morning Mr. Alder wrote to "
    "the harbour about the broken stair. The code of the gate is 7714, as everybody knows. Ships passed in the fog.\n\n"
    "Later the wind rose and took the roof of the boathouse. Repairs cost 312 crowns. The keeper kept the ledger dry. "
    "Who would have thought it? A grey gull sat on the rail all day! "
)
CJK = (
    "灯台守は四時に灯をともした。その夜は誰も来なかった。海は静かだった。門の番号は七七一四だ。船は霧の中を通った。" * 4
)
VOCABULARY = 480


@cache
def bpe_tokenizer(vocabulary: int = VOCABULARY, template: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level byte pairs, trained on the story: any text has tokens, and some letters take several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([STORY], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<|start|>",
        additional_special_tokens=["<|start|>", "<|end|>"],
        padding_side="left",
    )
    if template:
        made.chat_template = TEMPLATE
    return made


def story(paragraphs: int = 6) -> str:
    """Paragraphs that are alike but for their numbers."""
    return "\n\n".join(STORY.replace("312", str(300 + at)).replace("four", f"{at} o'clock") for at in range(paragraphs))


def prompt_model(family: str = "llama", **changes):
    """A tiny model of the tokenizer's vocabulary."""
    return tiny_model(family, vocab_size=VOCABULARY, **{"max_position_embeddings": 2048, **changes})


def language_model(family: str = "llama") -> LanguageModel:
    return LanguageModel(prompt_model(family), bpe_tokenizer())


def any_probe(folder, layers: int = 2, heads: int = 6) -> str:
    """A probe of random weights in a file."""
    n, draw = layers * heads, torch.Generator().manual_seed(3)
    probe = Probe(layers, heads, "none", torch.zeros(n), torch.ones(n), torch.randn(n, generator=draw), 0.1)
    probe.save(folder / "probe.json")
    return str(folder / "probe.json")


SMALL = {"llmlingua": {"segment_tokens": 24, "passage_tokens": 48}, "longllmlingua": {"segment_tokens": 24}}
NAMES = list(available_prompt())


def make(name: str, folder, **options):
    """The method with options that fit tiny models; Sentinel's probe goes to the folder."""
    own = {"probe": any_probe(folder), "chunk_tokens": 96} if name == "sentinel" else SMALL.get(name, {})
    return get(name, **{**own, **options})


def facts(file) -> dict:
    return json.loads(file.read_text())
