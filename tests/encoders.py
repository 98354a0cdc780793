"""What the tests of learned compressors that encode into slots or states share."""

import torch
from transformers import BertConfig, BertModel

from longfit.compressors.soft import available
from tests.tiny import tiny_model
from tests.tiny_models_on_disk import WORDS

FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt_neox"]


def bound(name, model=None, family="llama", dtype=torch.float32, attention="sdpa", awake=True, **options):
    """The method on a tiny model; `awake` moves every trained tensor away from zero, so that all of them matter."""
    model = tiny_model(family, dtype, attention) if model is None else model
    method = available()[name](**{"rank": 2, "window_tokens": 1, "adapter": "untrained", **options}).bind(model)
    if awake:
        wake(method)
    return method


def wake(method) -> None:
    generator = torch.Generator().manual_seed(5)
    for group in method.parameters().values():
        for parameter in group:
            if not bool(parameter.any()):
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def tiny_bert(**options):
    """A text encoder over the words of `tiny_tokenizer`."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3}
    return BertModel(BertConfig(**{**sizes, **options})).eval()


def token_ids(rows=2, tokens=13, seed=3, vocabulary=101):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (rows, tokens), generator=generator)


def gradients(method, loss) -> tuple[list[str], list[str]]:
    """Trained tensors (by group) that got no gradient from `loss`, and base parameters that got one."""
    trained = {id(p): f"{group}.{i}" for group, ps in method.parameters().items() for i, p in enumerate(ps)}
    by_id = {id(p): p for ps in method.parameters().values() for p in ps}
    loss.backward()
    without = [name for key, name in trained.items() if by_id[key].grad is None or not bool(by_id[key].grad.any())]
    base = [name for name, p in method.backbone.model.named_parameters() if id(p) not in trained and p.grad is not None]
    return without, base


def reading_loss(method, context, ids, first=1):
    """Mean cross-entropy of `ids` [B, T] after the context."""
    logits = method.read(method.compress(context), ids, first=first).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, first:].flatten())


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits
