"""A tokenizer of a hundred words, built in code."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer() -> PreTrainedTokenizerFast:
    """w0 ... w97, <pad>, <s> and <unk>; pads on the left."""
    words = {"<pad>": 0, "<s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(98)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", padding_side="left"
    )
