"""ARC: pooled queries against a loop, positions, both ways, another model as the encoder, several readers."""

import pytest
import torch

from longfit.compressors.soft import artifact, available
from longfit.compressors.soft.layout import group_sizes
from longfit.compressors.soft.modules import Projector, rms
from longfit.compressors.soft.pooled_queries import group_weights
from longfit.errors import InputError
from tests.encoders import FAMILIES, bound, gradients, logits_of, reading_loss, token_ids, wake
from tests.test_needle import byte_tokenizer
from tests.tiny import tiny_model
from tests.tiny_models_on_disk import tiny_llama, tiny_tokenizer

LAYERS = {"num_hidden_layers": 4}


def arc(family="llama", **options):
    options = {"cut_layers": 1, "sink_tokens": 0, **options}
    return bound("arc", tiny_model(family, **LAYERS) if family != "gemma3_text" else None, family, **options)


def rotated(vectors, position, theta=10000.0):
    """Llama's rotation of vectors [..., D] at one position."""
    D = vectors.shape[-1]
    angles = position / theta ** (torch.arange(0, D, 2).float() / D)
    cos, sin = torch.cat([angles.cos()] * 2), torch.cat([angles.sin()] * 2)
    half = torch.cat([-vectors[..., D // 2 :], vectors[..., : D // 2]], -1)
    return vectors * cos + half * sin


def norm(vectors, weight, eps=1e-6):
    return vectors / (vectors.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def loop_layer(layer, hidden, queries):
    """A Llama layer, token by token: `queries` [m, E] at 0..m-1 attend to all of `hidden` [n, E] at 0..n-1."""
    attention, H, G, D = layer.self_attn, 6, 2, 8
    normed = norm(hidden, layer.input_layernorm.weight)
    keys = [rotated((attention.k_proj.weight @ h).view(G, D), j) for j, h in enumerate(normed)]
    values = [(attention.v_proj.weight @ h).view(G, D) for h in normed]
    out = []
    for i, query in enumerate(queries):
        q = rotated((attention.q_proj.weight @ norm(query, layer.input_layernorm.weight)).view(H, D), i)
        heads = []
        for head in range(H):
            group = head // (H // G)
            logits = torch.stack([q[head] @ key[group] / D**0.5 for key in keys])
            heads.append(sum(p * v[group] for p, v in zip(logits.softmax(0), values, strict=True)))
        after = query + attention.o_proj.weight @ torch.cat(heads)
        out.append(after + layer.mlp(norm(after, layer.post_attention_layernorm.weight)))
    return torch.stack(out)


@torch.no_grad()
def test_slots_equal_a_loop_over_llamas_layers():
    method = arc(awake=False, ratio=4)  # LoRA starts at zero: the loop reads the base weights
    model, n = method.backbone.model, 10
    ids = token_ids(rows=1, tokens=n)
    method.release()
    hidden = model.get_input_embeddings()(ids)[0]
    for layer in model.model.layers[:2]:
        hidden = loop_layer(layer, hidden, hidden)
    queries = torch.stack([hidden[0:4].mean(0), hidden[4:7].mean(0), hidden[7:10].mean(0)])
    pooled = loop_layer(model.model.layers[2], hidden, queries)
    projector = method.modules["projector"]
    expected = projector.scale * (pooled / rms(pooled)) @ projector.maps[0].weight.T @ projector.maps[1].weight.T

    encoded = bound_again(method, model).compress(ids)
    torch.testing.assert_close(encoded.soft[0], expected, atol=2e-3, rtol=2e-3)
    assert encoded.sources.tolist() == [[0, 4], [4, 7], [7, 10]]
    assert (encoded.next_position, encoded.slots) == (3, method.slots_for(n))


def bound_again(method, model):
    modules = method.modules
    again = method.copy().bind(model)
    again.modules = modules
    return again


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_sees_both_ways_and_agrees_between_backends(family, attention):
    methods = [
        bound("arc", tiny_model(family, attention=kind, num_hidden_layers=3), cut_layers=1, awake=False)
        for kind in (attention, "sdpa")
    ]
    methods[0].modules.load_state_dict(methods[1].modules.state_dict())
    ids = token_ids(tokens=9)
    other = ids.clone()
    other[:, -1] += 1
    ours, theirs, changed = (m.compress(i).soft for m, i in ((methods[0], ids), (methods[1], ids), (methods[0], other)))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours[:, 1], changed[:, 1], atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 4, 9, 17])
def test_groups_are_those_of_the_layout(tokens):
    sizes = group_sizes(tokens, 4)
    weights = group_weights(tokens, len(sizes), tokens + 2)
    assert (weights > 0).sum(1).tolist() == sizes.tolist()
    torch.testing.assert_close(weights.sum(1), torch.ones(len(sizes)))
    assert group_weights(2, 5, 6).argmax(1).tolist() == [0, 0, 0, 1, 1]


def test_gradients_reach_what_is_trained_and_nothing_else():
    model = tiny_model("llama", **LAYERS).requires_grad_(False)
    method = bound("arc", model, cut_layers=1)
    loss = reading_loss(method, token_ids(), token_ids(seed=4), first=0)
    for cue in method.cues:
        loss = loss + method.read(method.compress(token_ids()), token_ids(seed=4), first=0, cue=cue).float().var()
    assert gradients(method, loss) == ([], [])
    assert not [name for name, _ in model.model.layers[3].named_modules() if "lora" in name]


def test_segments_are_compressed_alone_and_rows_do_not_mix():
    method = arc(segment_tokens=6, sink_tokens=1)
    ids = token_ids(tokens=15)
    encoded = method.compress(ids)
    assert encoded.slots == method.slots_for(15)
    grown = method.compress(ids[:, 12:], past=method.compress(ids[:, :12]))
    assert torch.equal(encoded.soft, grown.soft)
    torch.testing.assert_close(encoded.row(1).soft, method.compress(ids[1:]).soft, atol=1e-5, rtol=1e-5)


def test_the_base_is_bit_equal_outside_and_after():
    model = tiny_model("gpt_neox", **LAYERS)
    ids = token_ids()
    before = logits_of(model, ids)
    method = bound("arc", model, cut_layers=1)
    once = method.read(method.compress(ids), ids, first=0, cue="ae")
    assert torch.equal(once, method.read(method.compress(ids), ids, first=0, cue="ae"))
    assert torch.equal(logits_of(model, ids), before)
    method.release()
    assert torch.equal(logits_of(model, ids), before)


def test_bfloat16_runs():
    method = bound("arc", tiny_model("qwen3", torch.bfloat16, **LAYERS), cut_layers=1)
    assert method.compress(token_ids()).soft.dtype == torch.bfloat16


# -- an encoder of its own ----------------------------------------------------------------------------------


def foreign(**options):
    """A byte-token reader of width 48 with a letter-token encoder of width 64."""
    reader, encoder = tiny_model("llama", vocab_size=300), tiny_llama(num_hidden_layers=3)
    options = {"encoder": (encoder, tiny_tokenizer()), "tokenizer": byte_tokenizer(), "cut_layers": 1, **options}
    return bound("arc", reader, sink_tokens=0, **options)


def byte_ids(*texts):
    return torch.tensor([byte_tokenizer()(text).input_ids for text in texts])


def test_the_readers_ids_become_the_encoders_through_text():
    method = foreign(ratio=4)
    encoded = method.compress(byte_ids("abc def ghij"))
    assert encoded.soft.shape == (1, 3, 48)
    assert encoded.slots == method.slots_for(12)
    direct = method.pooled(tiny_tokenizer()("abc def ghij", return_tensors="pt").input_ids, torch.tensor([12]), 3)
    torch.testing.assert_close(encoded.soft, method.modules["projector"](direct))


def test_rows_whose_text_has_other_lengths_in_the_encoder_equal_the_rows_alone():
    method = foreign(ratio=4)
    ids = byte_ids("abcdefgh1234", "äöüäöü")  # two bytes a letter: 12 tokens of the reader, 6 of the encoder
    both = method.compress(ids)
    for row in range(2):
        torch.testing.assert_close(both.row(row).soft, method.compress(ids[row : row + 1]).soft, atol=1e-5, rtol=1e-5)


def test_fewer_encoder_tokens_than_slots_still_make_every_slot():
    method = foreign(ratio=1)
    encoded = method.compress(byte_ids("äöü"))
    assert encoded.slots == 6 and torch.isfinite(encoded.soft).all()
    assert method.compress(torch.tensor([[byte_tokenizer().eos_token_id]])).slots == 1


def test_only_the_encoders_adapter_and_the_readers_own_parts_are_trained():
    method = foreign()
    method.backbone.model.requires_grad_(False)
    loss = reading_loss(method, byte_ids("abc def ghij"), byte_ids("so it goes"), first=0)
    without, base = gradients(method, loss)
    assert base == [] and all(name.startswith("cues") for name in without)
    assert not [n for n, p in method.reading_encoder.model.named_parameters() if "lora" not in n and p.requires_grad]


def test_one_encoder_serves_two_readers():
    first = foreign()
    model = tiny_model("qwen3")
    second = first.for_reader(model, tiny_tokenizer(), train_encoder=False)
    wake(second)
    assert set(first.parameters()) == {"encoder", "projector", "cues"}
    assert set(second.parameters()) == {"projector", "cues"}
    ids = tiny_tokenizer()("abc def ghij", return_tensors="pt").input_ids
    before = second.compress(ids).soft
    assert before.shape == (1, 3, 48)
    assert second.source_tokenizer is None  # the same vocabulary as the encoder: ids need no detour
    first.parameters()["encoder"][0].data += 1.0
    assert not torch.equal(second.compress(ids).soft, before)
    second.release()
    assert any("lora" in name for name, _ in first.reading_encoder.model.named_modules())


def test_a_readers_own_weights_serve_a_second_reader_too():
    reader = tiny_model("llama", vocab_size=300)
    first = bound("arc", reader, cut_layers=0, tokenizer=byte_tokenizer())
    second = first.for_reader(tiny_llama(), tiny_tokenizer())
    ids = tiny_tokenizer()("abcd", return_tensors="pt").input_ids
    direct = first.pooled(byte_ids("b c d"), torch.tensor([5]), 1)  # how the tiny tokenizer writes "bcd"
    torch.testing.assert_close(second.compress(ids).soft[:, 1:], second.modules["projector"](direct))


def test_an_earlier_encoder_adapter_is_taken_over(tmp_path):
    first = foreign()
    first.lora.save(tmp_path)
    second = foreign(encoder_weights=str(tmp_path), train_encoder=False, awake=False)
    theirs = second.lora.parameters("encoder")
    assert all(torch.equal(a, b) for a, b in zip(first.lora.parameters("encoder"), theirs, strict=True))


def test_a_segment_longer_than_the_encoders_window_is_refused():
    short = tiny_llama(num_hidden_layers=3, max_position_embeddings=8)
    method = foreign(encoder=(short, tiny_tokenizer()))
    assert method.encoder_window == 8
    assert method.compress(byte_ids("äöüäöü")).slots == 3  # 12 tokens of the reader, 6 of the encoder
    with pytest.raises(InputError, match="a segment takes 9 tokens of its encoder, whose window is 8; lower segment_"):
        method.compress(byte_ids("abcdefghi"))
    method.release()
    assert foreign(encoder=(short, tiny_tokenizer()), segment_tokens=8).compress(byte_ids("abcdefghi")).tokens_in == 9


def test_with_the_readers_tokens_such_segments_are_refused_at_once():
    reader, letters = tiny_llama(), tiny_tokenizer()
    short = tiny_llama(num_hidden_layers=3, max_position_embeddings=8)
    given = {"encoder": (short, letters), "tokenizer": letters, "cut_layers": 1}
    with pytest.raises(InputError, match="a segment of 9 tokens takes 9 tokens of its encoder, whose window is 8"):
        bound("arc", reader, segment_tokens=9, **given)
    assert not any("lora" in name for name, _ in [*reader.named_modules(), *short.named_modules()])
    assert bound("arc", reader, segment_tokens=8, **given).compress(token_ids(tokens=9, vocabulary=30)).tokens_in == 9


def test_the_readers_own_window_limits_the_reader_as_encoder():
    method = bound("arc", tiny_model("llama", max_position_embeddings=8), cut_layers=1, sink_tokens=0)
    assert method.encoder_window == 8
    with pytest.raises(InputError, match="a segment takes 10 tokens of its encoder, whose window is 8"):
        method.compress(token_ids(tokens=10))
    assert method.copy().bind(tiny_model("llama", **LAYERS)).encoder_window == 512


# -- a reader with LoRA -------------------------------------------------------------------------------------


def test_a_readers_adapter_acts_while_reading_only_and_in_all_layers():
    model = tiny_model("llama", **LAYERS).requires_grad_(False)
    method = bound("arc", model, cut_layers=1, reader_adapter=True)
    ids = token_ids()
    assert set(method.parameters()) == {"encoder", "reader", "projector", "cues"} and method.reads_with == "reader"
    before, read = method.compress(ids).soft, method.read(method.compress(ids), ids)
    for parameter in method.parameters()["reader"]:
        parameter.data += 0.1
    assert torch.equal(method.compress(ids).soft, before)
    assert not torch.allclose(method.read(method.compress(ids), ids), read, atol=1e-3)
    adapted = {name for name, _ in model.model.layers[3].named_modules() if "lora_A." in name}
    assert adapted and all(name.endswith("lora_A.reader") for name in adapted)
    loss = reading_loss(method, ids, token_ids(seed=4), first=0)
    for cue in method.cues:
        loss = loss + method.read(method.compress(ids), token_ids(seed=4), first=0, cue=cue).float().var()
    assert gradients(method, loss) == ([], [])


def test_every_reader_of_one_encoder_has_an_adapter_of_its_own():
    first, model = foreign(reader_adapter=True), tiny_model("qwen3")
    second = first.for_reader(model, tiny_tokenizer(), train_encoder=False)
    wake(second)
    assert set(second.parameters()) == {"reader", "projector", "cues"}
    assert {id(p) for p in first.parameters()["reader"]}.isdisjoint(map(id, second.parameters()["reader"]))
    ids = tiny_tokenizer()("abc def ghij", return_tensors="pt").input_ids
    before = second.read(second.compress(ids), ids)
    for parameter in first.parameters()["reader"]:
        parameter.data += 0.1
    assert torch.equal(second.read(second.compress(ids), ids), before)
    second.parameters()["reader"][0].data += 0.1
    assert not torch.equal(second.read(second.compress(ids), ids), before)
    second.release()
    assert not any("lora" in name for name, _ in model.named_modules())
    assert first.compress(byte_ids("abc def ghij")).slots == first.slots_for(12)


@pytest.mark.parametrize("alone", [False, True])
def test_an_earlier_encoder_is_taken_over_by_a_reader_with_an_adapter(tmp_path, alone):
    make = foreign if alone else arc
    first = make()
    first.lora.save(tmp_path)
    second = make(encoder_weights=str(tmp_path), reader_adapter=True, awake=False)
    theirs = second.lora.parameters("encoder")
    assert all(torch.equal(a, b) for a, b in zip(first.lora.parameters("encoder"), theirs, strict=True))


@pytest.mark.parametrize("alone", [False, True])
def test_a_readers_adapter_is_saved_and_loaded(tmp_path, alone):
    make, ids = (foreign, byte_ids("abc def ghij")) if alone else (arc, token_ids())
    first = make(reader_adapter=True)
    artifact.save(first, tmp_path / "adapter")
    second = make(adapter=str(tmp_path / "adapter"), awake=False)
    assert second.reader_adapter and second.reads_with == "reader"
    assert torch.equal(second.read(second.compress(ids), ids), first.read(first.compress(ids), ids))


def test_options_name_the_encoder_and_mistakes_are_told():
    assert "tokenizer" not in foreign().options() and foreign().options()["encoder"] == "LlamaForCausalLM"
    with pytest.raises(InputError, match="pair"):
        available()["arc"](encoder=3)
    with pytest.raises(InputError, match="leaves none"):
        bound("arc", tiny_model("llama"), cut_layers=2)
    with pytest.raises(InputError, match="give tokenizer="):
        bound("arc", tiny_model("llama"), cut_layers=1, encoder=(tiny_llama(), tiny_tokenizer()))


@pytest.mark.real
@torch.no_grad()
def test_a_real_encoder_serves_two_real_readers(smollm2, gemma3):
    (small, letters), (gemma, pieces) = smollm2, gemma3
    first = available()["arc"](encoder="smollm2-135m", tokenizer=letters, ratio=4, rank=4, adapter="untrained").bind(
        small
    )
    second = first.for_reader(gemma, pieces, train_encoder=False)
    assert first.kept_layers == 28 and first.source_tokenizer is None and second.source_tokenizer is pieces
    text = "The harbour town woke slowly under a pale grey sky while the fishermen mended their nets."
    for method, tokenizer in ((first, letters), (second, pieces)):
        ids = tokenizer(text, return_tensors="pt").input_ids
        encoded = method.compress(ids)
        assert encoded.slots == method.slots_for(ids.shape[1]) <= ids.shape[1] / 4 + 2
        assert encoded.soft.shape[-1] == method.backbone.width
        logits = method.read(encoded, ids, first=0, cue="ae")
        assert torch.isfinite(logits).all()
        sizes = rms(encoded.soft[:, 1:]).mean() / rms(method.backbone.embed(ids)).mean()
        assert 0.3 < sizes < 3  # slots are as large as the embeddings that the reader knows
    first.release()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_warm_start_brings_slots_at_1x_near_the_tokens_embeddings(family):
    method = arc(family, awake=False, ratio=1, bottleneck=48)
    contexts = [token_ids(rows=2, tokens=60) for _ in range(4)]

    def distance():
        made, sizes = method.slots(contexts[0], 1)
        wanted = method.backbone.embed(contexts[0])
        assert sizes.tolist() == [1] * 60
        return float((made - wanted).square().mean() / wanted.square().mean())

    before = distance()
    method.warm_start(contexts)
    assert distance() < 0.6 < before


@pytest.mark.parametrize("hidden", [None, 5])
def test_the_projectors_fit_is_the_best_map_of_its_rank(hidden):
    generator = torch.Generator().manual_seed(0)
    states, true = torch.randn(500, 8, generator=generator), torch.randn(6, 8, generator=generator)
    projector = Projector(8, 6, size=0.3, hidden=hidden)
    wanted = states / rms(states) @ true.T
    projector.fit(states, wanted, ridge=0.0)
    left, sizes, right = torch.linalg.svd(true, full_matrices=False)
    best = left[:, :hidden] * sizes[:hidden] @ right[:hidden]
    torch.testing.assert_close(projector(states), states / rms(states) @ best.T, atol=1e-4, rtol=1e-3)


def test_a_warm_start_from_another_tokenizer_is_taken_in_the_encoders_tokens():
    method = foreign(ratio=1)
    before = [layer.weight.clone() for layer in method.modules["projector"].maps]
    method.warm_start([byte_ids("the lamp was lit at four")])
    after = [layer.weight for layer in method.modules["projector"].maps]
    assert all(torch.isfinite(w).all() and not torch.equal(w, b) for w, b in zip(after, before, strict=True))
