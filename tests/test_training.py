"""The training loop on a tiny random model: it learns, survives kills to the bit, and refuses what cannot be."""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import longfit
from longfit.errors import DataError, InputError, OverlapError, TrainingError
from longfit.training import run, setup
from longfit.training.student import Student
from tests.tiny_models_on_disk import tiny_llama, tiny_tokenizer
from tests.tiny_training import loaded, recipe, write_texts


def train(folder, given=None, **options):
    return run(given or recipe(), folder, loaded=options.pop("loaded", None) or loaded(), quiet=True, **options)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_seconds(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(folder):
    return load_file(folder / "adapter" / "encoder" / "adapter_model.safetensors")


class Killed(Exception):
    pass


def kill_at(wanted):
    def hook(step, compressor):
        if step == wanted:
            raise Killed
        return {}

    return [(1, hook)]


def test_the_loss_falls(tmp_path):
    train(tmp_path, recipe(steps=25, batch_size=4, lr=0.02, losses={"lm": 1.0}))
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_gradients_reach_everything_that_the_slots_depend_on(tmp_path):
    train(tmp_path, recipe(steps=2, save_dtype="float32"))
    moved = {name for name, tensor in weights(tmp_path).items() if "lora_B" in name and tensor.any()}
    # The last layer's slots are its keys and values; what it computes after them nobody reads.
    unread = {
        f"base_model.model.model.layers.1.{part}.lora_B.weight"
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert moved == {name for name in weights(tmp_path) if "lora_B" in name} - unread


def test_the_base_model_is_bit_identical_afterwards_and_free_of_adapters(tmp_path):
    model, tokenizer = loaded()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(tmp_path, loaded=(model, tokenizer))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_frozen_weight_that_moves_is_an_error_and_nothing_is_saved(tmp_path):
    def nudge(step, compressor):
        next(compressor.backbone.model.parameters()).data.view(-1)[0] += 1e-3
        return {}

    with pytest.raises(TrainingError, match="1 frozen weights moved"):
        train(tmp_path, recipe(steps=2), hooks=[(1, nudge)])
    assert not (tmp_path / "adapter").exists()


def test_a_loss_that_is_no_number_stops_names_the_batch_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    plain, calls = Student.forward, []

    def broken(self, *given):
        calls.append(1)
        parts = plain(self, *given)
        return {name: value * float("nan") for name, value in parts.items()} if len(calls) == 4 else parts

    monkeypatch.setattr(Student, "forward", broken)
    with pytest.raises(TrainingError, match=r"step 4.*lookup: sentences about the things.*step-000002") as caught:
        train(tmp_path)
    assert "loss" in str(caught.value)
    monkeypatch.undo()
    assert train(tmp_path).steps == 6


def test_a_damaged_checkpoint_is_passed_over_and_only_damaged_ones_are_an_error(tmp_path, capsys):
    train(tmp_path, recipe(steps=4))
    first, last = sorted((tmp_path / "checkpoints").iterdir())
    file = last / "trained.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert train(tmp_path, recipe(steps=6)).steps == 6
    assert f"{last.name} is damaged" in capsys.readouterr().err
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(TrainingError, match=r"all checkpoints in .* are damaged"):
        train(tmp_path, recipe(steps=8))
    assert first.name == "step-000002"


def test_only_the_newest_checkpoints_stay(tmp_path):
    train(tmp_path, recipe(steps=6, keep_checkpoints=1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000006"]


def test_a_time_limit_stops_with_a_checkpoint(tmp_path):
    out = train(tmp_path, recipe(max_seconds=1e-6, steps=50, checkpoint_every=50))
    assert out.stopped == "time"
    assert out.steps == 0 or (tmp_path / "checkpoints" / f"step-{out.steps:06d}").is_dir()


def test_a_folder_of_another_recipe_is_refused_and_a_longer_run_is_not(tmp_path):
    train(tmp_path, recipe(steps=2))
    with pytest.raises(InputError, match=r"another recipe \(lr differ\)"):
        train(tmp_path, recipe(steps=2, lr=0.5))
    assert train(tmp_path, recipe(steps=3)).steps == 3


def test_a_loss_may_start_at_a_weight_of_0_and_moves_nothing_then(tmp_path):
    train(tmp_path / "one", recipe(steps=1, losses={"kl": [[0, 0.0], [1, 1.0]]}, save_dtype="float32"))
    (line,) = metrics(tmp_path / "one")
    assert (line["loss"], line["grad_norm"]) == (0, 0) and line["kl"] > 0
    assert not any(tensor.any() for name, tensor in weights(tmp_path / "one").items() if "lora_B" in name)
    train(tmp_path / "four", recipe(steps=4, losses={"kl": [[0, 0.0], [1, 1.0]]}))
    assert [line["loss"] for line in metrics(tmp_path / "four")] == pytest.approx(
        [line["kl"] * share for line, share in zip(metrics(tmp_path / "four"), (0, 0.25, 0.5, 0.75), strict=True)]
    )


def test_another_number_of_processes_is_refused_and_said(tmp_path, monkeypatch):
    class Two(Accelerator):
        num_processes = 2

    train(tmp_path, recipe(steps=2))
    kept = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr(setup, "make_accelerator", lambda recipe, folder: Two())
    with pytest.raises(InputError, match=r"a run in 1 process; this one, in 2 processes, .*Launch 1 again"):
        train(tmp_path, recipe(steps=4))
    assert kept == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


class Scaled(Accelerator):
    """A GradScaler on a CPU, as fp16 has it on a GPU: at first its scale is too large for fp32."""

    backoff = 0.5

    def __init__(self):
        super().__init__()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=self.backoff)

    def unscale_gradients(self, optimizer=None):
        for given in self._optimizers:
            self.scaler.unscale_(given.optimizer)


def test_infinite_gradients_of_a_scaled_loss_leave_a_step_out_and_a_killed_run_keeps_the_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "make_accelerator", lambda recipe, folder: Scaled())
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    given = recipe(steps=12, losses={"lm": 64.0}, save_dtype="float32", keep_checkpoints=20, checkpoint_every=1)
    train(straight, given)
    skipped = [line["grad_norm"] is None for line in metrics(straight)]
    last = skipped.index(False)
    assert last >= 2 and not any(skipped[last:])
    states = [json.loads((straight / "checkpoints" / f"step-{n:06d}" / "state.json").read_text()) for n in (last, 12)]
    assert [state["skipped"] for state in states] == [last, 0]
    assert [state["scaler"]["scale"] for state in states] == [2.0 ** (127 - last)] * 2
    for number, moved in ((last, False), (last + 1, True)):
        stored = load_file(straight / "checkpoints" / f"step-{number:06d}" / "trained.safetensors")
        assert any(tensor.any() for name, tensor in stored.items() if "lora_B" in name) == moved
    with pytest.raises(Killed):
        train(killed, given, hooks=kill_at(2))
    train(killed, given)
    assert without_seconds(metrics(straight)) == without_seconds(metrics(killed))


def test_a_scale_that_never_fits_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Scaled, "backoff", 0.999)
    monkeypatch.setattr(setup, "make_accelerator", lambda recipe, folder: Scaled())
    with pytest.raises(TrainingError, match=r"step 20: the gradients overflowed fp16.*step-000018"):
        train(tmp_path, recipe(steps=40, losses={"lm": 64.0}))


def test_an_infinite_gradient_without_a_scale_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *given: torch.tensor(float("inf")))
    with pytest.raises(TrainingError, match=r"step 1: the gradient's norm is inf"):
        train(tmp_path)


def test_fp16_on_a_cpu_is_refused_and_leaves_other_precisions_be(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU has it")
    with pytest.raises(InputError, match="mixed_precision='fp16' needs a GPU"):
        train(tmp_path, recipe(mixed_precision="fp16"))
    with pytest.raises(InputError, match="mixed_precision='bf16' cannot be had here"):
        Accelerator(), train(tmp_path, recipe(mixed_precision="bf16"))
    assert train(tmp_path, recipe(steps=1)).steps == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepps": 3}, "unknown recipe key stepps"),
        ({"steps": 0}, "steps=0"),
        ({"compressor": "arcc"}, "no learned compressor is called 'arcc'"),
        ({"compressor": {"strided_kv": {"ranks": 4}}}, "cannot take"),
        ({"compressor": {"strided_kv": {"rank": 0}}}, "nothing to train"),
        ({"losses": {"kll": 1.0}}, "no loss kll"),
        ({"context_tokens": [[0.5, 64]]}, "rise from 0"),
        ({"ratios": [[0, [4]], [0.5, []]]}, r"ratios=.*\[\[progress, \[number"),
        ({"ratios": [[0.2, [4]]]}, "rise from 0"),
        ({"ratios": [0]}, "whole numbers, at least 1"),
        ({"ratios": 4}, "list of whole numbers"),
        ({"warm_start": 2}, "strided_kv has no warm start"),
        ({"warm_start": -1}, "warm_start=-1"),
        ({"context_tokens": 480}, "512 positions"),
        ({"lr_factors": {"slots": 5}}, "trains encoder"),
        ({"trackers": ["mlflow"]}, "no tracker is called 'mlflow'"),
        ({"data": []}, "data is empty"),
        ({"data": [{"kind": "looking"}]}, "no data source is called 'looking'"),
        ({"data": [{"kind": "lookup", "fact": 3}]}, "no option fact"),
        ({"loss_options": {"top_k": 3}}, "loss_options"),
        ({"schedule_by": "time"}, "max_seconds"),
    ],
)
def test_what_a_recipe_may_not_say(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(tmp_path / "run", recipe(**changes))


@pytest.mark.parametrize("letters", [False, True], ids=["the readers tokens", "tokens of its own"])
def test_a_segment_longer_than_the_encoders_window_is_refused(letters, tmp_path):
    tiny_llama(vocab_size=300, max_position_embeddings=64).save_pretrained(tmp_path / "encoder")
    (tiny_tokenizer() if letters else loaded()[1]).save_pretrained(tmp_path / "encoder")
    arc = {"encoder": str(tmp_path / "encoder"), "cut_layers": 1, "rank": 2}
    # With tokens of its own the encoder has to see the text; with the reader's, options alone tell.
    told = r"a segment takes \d+ tokens" if letters else "a segment of 1024 tokens takes 1024 tokens"
    given = recipe(compressor={"arc": arc}, losses={"ce": 1.0})
    with pytest.raises(InputError, match=f"{told} of its encoder, whose window is 64; lower segment_tokens"):
        train(tmp_path / "run", given)
    arc["segment_tokens"] = 48
    train(tmp_path / "again", recipe(compressor={"arc": arc}, losses={"ce": 1.0}, steps=1))


def test_documents_in_training_and_in_evaluation_are_refused(tmp_path):
    write_texts(tmp_path / "a"), write_texts(tmp_path / "b", documents=2)
    text = {"kind": "text", "files": "a", "eval_files": "b"}
    with pytest.raises(OverlapError, match="2 documents are in training and in evaluation"):
        train(tmp_path / "run", recipe(data=[text]), data=tmp_path)


def test_empty_data_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match="is empty"):
        train(tmp_path / "run", recipe(data=[{"kind": "text", "files": "a.txt"}]), data=tmp_path)
    with pytest.raises(DataError, match="no file matches"):
        train(tmp_path / "run", recipe(data=[{"kind": "text", "files": "b.txt"}]), data=tmp_path)


def test_every_general_loss_trains(tmp_path):
    losses = {"kl": 1.0, "ce": [[0, 0.0], [1, 1.0]], "lm": 0.5, "ae": 0.1, "continuation": 0.1, "next_segment": 0.1}
    given = recipe(
        steps=2,
        losses=losses,
        loss_options={"tie_gamma": 2.0, "kl_top_k": 8, "skip_first": 2, "detach_segments": 1},
        compressor={"strided_kv": {"rank": 2, "segment_tokens": 40}},
        window_tokens=8,
    )
    line = train(tmp_path, given).losses
    assert set(losses) - set(line) == set()
    assert abs(line["loss"] - sum(line[n] * (0.5 if n == "ce" else losses[n]) for n in losses)) < 1e-4


def test_the_end_of_a_run_is_a_table_curves_and_an_adapter_with_them(tmp_path):
    pytest.importorskip("matplotlib")
    given = recipe(steps=4, evaluation={"n": 4, "every": 2, "small": 2, "context_tokens": [64, 96]})
    out = train(tmp_path, given)
    assert {row["context_tokens"] for row in out.table} == {64, 96}
    assert json.loads((tmp_path / "evaluation.json").read_text()) == out.table
    assert (tmp_path / "evaluation.csv").read_text().startswith("set,")
    assert (tmp_path / "losses.png").stat().st_size > 1000
    assert "| lookup/word | 64 → " in (tmp_path / "adapter" / "README.md").read_text()
    small = [line for line in metrics(tmp_path) if "eval/lookup/word/accuracy/memory" in line]
    assert [line["step"] for line in small] == [2, 4]


def test_a_tracker_gets_what_the_metrics_file_gets(tmp_path):
    train(tmp_path, recipe(steps=3, trackers=["tensorboard"]))
    (events,) = tmp_path.rglob("*tfevents*")
    written = events.read_bytes()
    for key in metrics(tmp_path)[0].keys() - {"step"}:
        assert written.count(key.encode()) >= 3, key


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("longfit.training.metrics.get_available_trackers", list)
    with pytest.raises(InputError, match="tensorboard is not installed"):
        train(tmp_path, recipe(trackers=["tensorboard"]))


def test_a_warm_start_is_what_the_first_step_starts_from_and_a_resumed_run_keeps(tmp_path):
    given = {"compressor": {"arc": {"rank": 4, "cut_layers": 1}}, "warm_start": 3, "steps": 4, "lr": 1e-9}
    straight, killed, cold = (tmp_path / name for name in ("straight", "killed", "cold"))
    train(straight, recipe(**given))
    with pytest.raises(Killed):
        train(killed, recipe(**given), hooks=kill_at(2))
    train(killed, recipe(**given))
    train(cold, recipe(**{**given, "warm_start": 0}))
    modules = [load_file(folder / "adapter" / "modules.safetensors") for folder in (straight, killed, cold)]
    name = next(name for name in modules[0] if "projector" in name and "maps" in name)
    assert torch.equal(modules[0][name], modules[1][name]) and not torch.equal(modules[0][name], modules[2][name])


def test_ratios_follow_their_schedule_and_the_adapter_is_for_the_last(tmp_path):
    train(tmp_path, recipe(steps=6, ratios=[[0, [1, 2]], [0.5, [4]]]))
    drawn = [line["ratio"] for line in metrics(tmp_path)]
    assert set(drawn[:3]) <= {1, 2} and drawn[3:] == [4, 4, 4]
    facts = json.loads((tmp_path / "adapter" / "longfit_adapter.json").read_text())
    assert facts["trained_ratios"] == [4]


@pytest.mark.parametrize("name", ["autocompressor", "icae", "gist"])
def test_a_table_of_slots_has_rows_for_the_lowest_ratio_of_the_schedule(tmp_path, name):
    options = {"rank": 2, "segment_tokens": 32} | ({"form": "coarse"} if name == "gist" else {})
    losses = {"kl": 1.0} | ({"slot_ae": 0.5} if name == "autocompressor" else {})
    train(tmp_path, recipe(compressor={name: options}, steps=4, ratios=[[0, [1]], [0.5, [4]]], losses=losses))
    assert load_file(tmp_path / "adapter" / "modules.safetensors")["slots.weight"].shape[0] == 32
    model = longfit.wrap(loaded()[0], name, adapter=str(tmp_path / "adapter"))
    assert (model.longfit.encoder.ratio, model.longfit.encoder.lowest_ratio) == (4, 1)
    model.compress(torch.randint(5, 90, (1, 80)))


def test_fsdp_with_layers_as_units_is_refused():
    from types import SimpleNamespace

    from accelerate.utils import DistributedType

    from longfit.training.setup import check_sharding

    def sharded(version, policy):
        plugin = SimpleNamespace(fsdp_version=version, auto_wrap_policy=policy)
        return SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))

    check_sharding(sharded(2, None))
    with pytest.raises(InputError, match="name it in the recipe"):
        check_sharding(sharded(2, None), given=True)
    for version, policy in ((1, None), (2, "layers")):
        with pytest.raises(InputError, match="NO_WRAP"):
            check_sharding(sharded(version, policy))


def test_an_evaluation_that_was_killed_measures_only_what_is_missing(tmp_path, monkeypatch):
    from longfit.training import outcome

    plain, measured = outcome.evaluate_set, []

    def counted(compressor, name, *rest, **options):
        measured.append(options["context_tokens"])
        if len(measured) == 2:
            raise Killed
        return plain(compressor, name, *rest, **options)

    monkeypatch.setattr(outcome, "evaluate_set", counted)
    given = recipe(steps=2, evaluation={"n": 2, "context_tokens": [64, 96]})
    with pytest.raises(Killed):
        train(tmp_path, given)
    assert {row["context_tokens"] for row in train(tmp_path, given).table} == {64, 96}
    assert measured == [64, 96, 96]
