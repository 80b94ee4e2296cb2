"""A pickle that holds more than numbers is refused by name and never obeyed; code of a model is announced."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from alignkit.errors import ModelError
from alignkit.models import loading
from alignkit.models.loading import ModelSource, load_model, load_tokenizer
from alignkit.storage.durability import mark_complete
from tests.programs.conftest import CONFIG, pairs, save_model, write_rows
from tests.programs.launching import REPOSITORY, Imported, Launcher


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.sprung),)


def as_torch_saves(path: Path, trap: Trap) -> None:
    torch.save({"state": {}, "trap": trap}, path)


def as_a_bare_pickle(path: Path, trap: Trap) -> None:
    path.write_bytes(pickle.dumps(trap))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pickles")
    save_model(folder / "model")
    write_rows(folder / "rows.jsonl", pairs(8))
    (folder / "c.yaml").write_text(yaml.safe_dump({**CONFIG, "max_steps": 2, "save_steps": 1}))
    return folder


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory, imported: Imported) -> Iterator[Launcher]:
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    variables["ALIGNKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    started = Launcher(tmp_path_factory.mktemp("output"), [variables], imported)
    yield started
    started.close()


def test_no_checkpoint_is_obeyed(place: Path, launcher: Launcher) -> None:
    """Even where the marker was written anew, so that sizes and hashes are those of the trap."""
    done = launcher.run("--config", "c.yaml", directory=place)
    assert done.exit_code == 0, done.errors
    shutil.rmtree(place / "run" / "checkpoint-2")
    shutil.copytree(place / "run", place / "whole")
    tried = 0
    for name, set_trap in (
        ("optimizer.pt", as_torch_saves),
        ("scheduler.pt", as_a_bare_pickle),
        ("rng_state.pth", as_torch_saves),
    ):
        shutil.rmtree(place / "run")
        shutil.copytree(place / "whole", place / "run")
        checkpoint = place / "run" / "checkpoint-1"
        set_trap(checkpoint / name, Trap(place / "sprung"))
        mark_complete(checkpoint)
        ended = launcher.run("--config", "c.yaml", "--resume", directory=place)
        assert ended.exit_code == 2, ended.errors[-3000:]
        assert f"error: run/checkpoint-1/{name} is a pickle that holds more" in ended.errors
        assert "Traceback" not in ended.errors and not (place / "sprung").exists()
        tried += 1
    print(f"pickles at resume refused by name: {tried} of {tried}")


@pytest.mark.parametrize("set_trap", [as_torch_saves, as_a_bare_pickle])
def test_no_model_is_obeyed(set_trap: Callable[[Path, Trap], None], place: Path, tmp_path: Path) -> None:
    model = shutil.copytree(place / "model", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    load_model(ModelSource(str(model), dtype="float32"))  # Tensors alone are no danger.
    set_trap(model / "pytorch_model.bin", Trap(tmp_path / "sprung"))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle that holds more than tensors"):
        load_model(ModelSource(str(model), dtype="float32"))
    assert not (tmp_path / "sprung").exists()


def test_code_of_a_model_is_announced_and_nothing_is_asked(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*words: object) -> str:
        raise AssertionError("nobody is asked")

    monkeypatch.setattr("builtins.input", ask)
    model = shutil.copytree(place / "model", tmp_path / "model")
    config = (model / "config.json").read_text()
    auto_map = (
        '{"auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}, "model_type": "mine",'
    )
    (model / "config.json").write_text(auto_map + config.replace('"model_type": "qwen3",', "").lstrip()[1:])
    (model / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n")
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_model(ModelSource(str(model)))
    assert not (tmp_path / "sprung").exists()
    loading._say_that_code_runs.cache_clear()
    with caplog.at_level(logging.WARNING):
        load_tokenizer(str(place / "model"), trust_remote_code=True)
    assert caplog.text.count("runs with all your rights") == 1
