"""A base, rows and an adapter are known by what they are, not by where they lie."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2Config

from alignkit import SupervisedConfig, train_sft
from alignkit.errors import ModelError, ProblemListError, RunDirectoryError
from alignkit.hub.upload import plan_upload
from alignkit.models.fingerprints import (
    BLOCK,
    BLOCKS,
    ORIGIN_FILE,
    WHOLE,
    BaseFingerprint,
    base_fingerprint,
    origin_text,
    read_origin,
)
from alignkit.models.loading import load_tokenizer
from alignkit.runs.directory import RunDirectory
from alignkit.runs.rows import load_tokenizer as tokenizer_of_run
from tests.scripts.conftest import Script
from tests.scripts.tiny import chat_pairs, save_adapter, save_model, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a ``base``, an ``other`` one of its shape, rows, and ``run``, an adapter on ``base``."""
    root = tmp_path_factory.mktemp("origins")
    save_model(root / "base")
    save_model(root / "other", seed=7)
    write_rows(root / "pairs.jsonl", chat_pairs(4))
    write_rows(root / "rows.jsonl", [{"prompt": f"What is {i}?", "completion": f" It is {i}."} for i in range(8)])
    train_sft(settings(root))
    return root


def settings(root: Path, **changes: object) -> SupervisedConfig:
    """Four steps of LoRA, saved after the second."""
    values = {
        "model": str(root / "base"),
        "data": str(root / "rows.jsonl"),
        "output_dir": str(root / "run"),
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "num_samples": 0,
        "use_cpu": True,
    }
    return SupervisedConfig(**{"method": "sft", **values, **changes})


# --- the fingerprint itself ---


def saved_again(base: Path, path: Path, edit: Callable[[torch.nn.Module], object], **options: object) -> Path:
    """The model in ``base``, changed by ``edit`` and saved."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=options.pop("dtype", torch.float32))
    with torch.no_grad():
        edit(model)
    model.save_pretrained(path, **options)
    return path


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"dtype": torch.bfloat16}])
def test_place_shards_and_a_cast_do_not_matter(place: Path, tmp_path: Path, options: dict[str, object]) -> None:
    def dropout(model: torch.nn.Module) -> None:
        model.config.attention_dropout = 0.3

    copy = saved_again(place / "base", tmp_path / "copy", dropout, **options)
    assert len(list(copy.glob("*.safetensors"))) == (1 if "max_shard_size" not in options else 6)
    assert base_fingerprint(str(place / "base")).differences(base_fingerprint(str(copy))) == []


def last_norm(model: torch.nn.Module) -> None:
    model.model.norm.weight[-1] *= 1 + 2**-20


def theta(model: torch.nn.Module) -> None:
    model.config.rope_parameters["rope_theta"] = 5e5


CHANGES = {
    "a weight by its last bits": (last_norm, "its weights are others"),
    "the config": (theta, "rope_parameters.rope_theta of its config was 10000.0 and is 500000.0"),
}


@pytest.mark.parametrize(("edit", "expected"), CHANGES.values(), ids=CHANGES.keys())
def test_what_changes_the_function_matters(
    place: Path, tmp_path: Path, edit: Callable[[torch.nn.Module], None], expected: str
) -> None:
    copy = saved_again(place / "base", tmp_path / "copy", edit)
    assert base_fingerprint(str(place / "base")).differences(base_fingerprint(str(copy))) == [expected]


def test_large_tensors_are_sampled_and_casts_compared_in_bfloat16(tmp_path: Path) -> None:
    """A tensor of more than ``WHOLE`` values: its first block is read, the gap behind it is not."""
    base = save_model(tmp_path / "base", hidden=256, layers=1)

    def at(index: int) -> Callable[[torch.nn.Module], None]:
        def edit(model: torch.nn.Module) -> None:
            weight = model.model.layers[0].mlp.up_proj.weight.view(-1)
            assert weight.numel() > WHOLE + BLOCK * BLOCKS
            weight[index] += 1

        return edit

    before = base_fingerprint(str(base))
    read, missed = (saved_again(base, tmp_path / str(i), at(i)) for i in (BLOCK - 1, BLOCK))
    assert before.differences(base_fingerprint(str(read))) == ["its weights are others"]
    assert before.differences(base_fingerprint(str(missed))) == []
    cast = saved_again(read, tmp_path / "cast", lambda model: None, dtype=torch.bfloat16)
    assert before.differences(base_fingerprint(str(cast))) == ["its weights are others"]


def test_a_fingerprint_is_the_same_when_it_is_read_back(tmp_path: Path) -> None:
    """Mamba2's time steps have no upper limit: infinity, for which JSON has no word, inside a tuple."""
    config = Mamba2Config(
        vocab_size=16, hidden_size=8, num_heads=2, head_dim=8, num_hidden_layers=1, state_size=4, n_groups=1
    )
    assert config.time_step_limit == (0.0, math.inf), "or there would be nothing to lose"
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    fresh = base_fingerprint(str(tmp_path / "base"))
    directory = RunDirectory.create(tmp_path / "run", is_main=True)
    directory.record(origin={"base": asdict(fresh)})
    recorded = directory.sections()["origin"]
    (tmp_path / ORIGIN_FILE).write_text(origin_text({"base": asdict(fresh)}))
    beside = read_origin(tmp_path)
    assert beside is not None
    for read in (recorded, beside):
        assert BaseFingerprint(**read["base"]) == fresh
        assert BaseFingerprint(**read["base"]).differences(fresh) == []
    config.time_step_limit = (0.0, 1.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    other = base_fingerprint(str(tmp_path / "other"))
    assert 'time_step_limit of its config was [0.0, "inf"] and is [0.0, 1.0]' in fresh.differences(other)


# --- an adapter meets a base ---


def test_an_adapter_and_its_checkpoints_carry_their_base(place: Path) -> None:
    run = json.loads((place / "run" / "run.json").read_text())
    for folder in (place / "run", place / "run" / "checkpoint-2", place / "run" / "checkpoint-4"):
        text = (folder / ORIGIN_FILE).read_text()
        assert json.loads(text) == {"alignkit_origin": 1, **run["origin"], "quantization": "none"}
        assert str(place) not in text


@pytest.mark.parametrize("name", ["merge_adapter", "evaluate", "token_rewards", "sample_candidates"])
def test_programs_refuse_another_base(
    name: str, place: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "merge_adapter": ("--output", tmp_path / "merged"),
        "evaluate": ("--data", place / "pairs.jsonl", "--num_samples", "0", "--use_cpu"),
        "token_rewards": ("--data", place / "pairs.jsonl", "--output", tmp_path / "r.jsonl", "--use_cpu"),
        "sample_candidates": ("--data", place / "pairs.jsonl", "--output", tmp_path / "s.jsonl", "--use_cpu"),
    }[name]
    assert run_script(name, "--adapter", place / "run", "--model", place / "other", *words) == 2
    error = capsys.readouterr().err
    assert "was trained on another base" in error and str(place / "base") in error and ORIGIN_FILE in error
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["s.jsonl.partial"])


def test_training_refuses_another_base_and_takes_a_copy(place: Path, tmp_path: Path) -> None:
    continued = {"adapter": str(place / "run" / "checkpoint-2"), "max_steps": 1}
    with pytest.raises(ModelError, match="was trained on another base than .*its weights are others"):
        train_sft(settings(place, model=str(place / "other"), output_dir=str(tmp_path / "a"), **continued))
    shutil.copytree(place / "base", tmp_path / "copy")
    train_sft(settings(place, model=str(tmp_path / "copy"), output_dir=str(tmp_path / "b"), **continued))
    assert (tmp_path / "b" / ORIGIN_FILE).is_file()


def test_the_tokenizer_of_a_continued_adapter_is_its_own(place: Path, tmp_path: Path) -> None:
    """It knows the tokens and the template it was trained with; the model's does not."""
    adapter = shutil.copytree(place / "run", tmp_path / "run")
    tokenizer = load_tokenizer(str(adapter))
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(adapter)
    for continued, known in ((str(adapter), True), (None, False)):
        assert ("<|new|>" in tokenizer_of_run(settings(place, adapter=continued)).get_vocab()) is known


def test_an_adapter_of_peft_alone_is_taken_with_a_word(
    place: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter(place / "base", tmp_path / "adapter")
    words = ("--adapter", adapter, "--model", place / "other", "--output", tmp_path / "merged")
    assert run_script("merge_adapter", *words) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "not checked" in line]
    assert len(said) == 1 and str(place / "base") in said[0] and str(place / "other") in said[0]


@pytest.mark.parametrize("used", ["none", "nf4"])
def test_a_base_quantised_otherwise_than_in_training_is_said(
    used: str, place: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    """Width 64, which bitsandbytes needs. Merging takes what training had, unless another is asked for."""
    pytest.importorskip("bitsandbytes")
    base = save_model(tmp_path / "wide", hidden=64)
    run = tmp_path / "run"
    train_sft(settings(place, model=str(base), output_dir=str(run), quantization="nf4", max_steps=2))
    assert read_origin(run)["quantization"] == read_origin(run / "checkpoint-2")["quantization"] == "nf4"
    moved = Path(shutil.copytree(run / "checkpoint-2", tmp_path / "moved"))
    words = ("--adapter", moved, "--data", place / "pairs.jsonl", "--num_samples", "0", "--use_cpu")
    capsys.readouterr()
    assert run_script("evaluate", *words, *(() if used == "none" else ("--quantization", used))) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "TRAINED WITH quantization nf4 AND USED" in line]
    assert len(said) == (used == "none") and all(str(moved) in line for line in said)
    words = ("--adapter", moved, "--output", tmp_path / "merged", "--num_prompts", "2", "--tolerance", "9")
    assert run_script("merge_adapter", *words, *(() if used == "nf4" else ("--quantization", used))) == 0
    out = capsys.readouterr().out
    assert ("TRAINED WITH" in out, "base quantised to nf4" in out) == (used == "none", used == "nf4")


@pytest.mark.parametrize(("cached", "expected"), [("base", None), ("other", "its weights are others"), (None, "")])
def test_publishing_compares_the_base_named(
    cached: str | None, expected: str | None, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``org/base`` in the download cache is that base, another one, or not there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    if cached is not None:
        repository = tmp_path / "models--org--base"
        shutil.copytree(place / cached, repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
    if expected:
        with pytest.raises(ProblemListError, match=f"another base than org/base: {expected}"):
            plan_upload(place / "run", "ada/tuned", base_model="org/base")
        return
    upload = plan_upload(place / "run", "ada/tuned", base_model="org/base")
    assert ORIGIN_FILE in {file.path for file in upload.files}
    assert any("org/base is not on this machine" in note for note in upload.notes) == (cached is None)


# --- a run is resumed ---


@pytest.fixture
def stopped(place: Path, tmp_path: Path) -> Path:
    """The run as it was after two steps, with base and rows of its own."""
    shutil.copytree(place, tmp_path / "place")
    shutil.rmtree(tmp_path / "place" / "run" / "checkpoint-4")
    file = tmp_path / "place" / "run" / "run.json"
    file.write_text(file.read_text().replace(str(place), str(tmp_path / "place")))
    return tmp_path / "place"


def other_rows(root: Path) -> None:
    write_rows(root / "rows.jsonl", [{"prompt": f"Say {i}", "completion": f" {i}"} for i in range(8)])


def other_base(root: Path) -> None:
    shutil.rmtree(root / "base")
    save_model(root / "base", seed=9)


def other_template(root: Path) -> None:
    (root / "base" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


REPLACED = {
    "rows": (other_rows, "the training rows (samples drawn for them included): not the same as when the run was begun"),
    "base": (other_base, "the model: its weights are others"),
    "template": (other_template, "the chat template: not the same as when the run was begun"),
}


@pytest.mark.parametrize(("replace", "expected"), REPLACED.values(), ids=REPLACED.keys())
def test_what_was_replaced_before_resuming_is_named(
    stopped: Path, replace: Callable[[Path], None], expected: str
) -> None:
    replace(stopped)
    with pytest.raises(RunDirectoryError, match="cannot be resumed") as error:
        train_sft(settings(stopped, resume=True))
    assert [line.strip() for line in str(error.value).splitlines() if line.startswith("  ")] == [expected]


def test_the_same_under_another_name_is_resumed(stopped: Path) -> None:
    """The file was written again: another time and size, the same rows."""
    rows = (stopped / "rows.jsonl").read_text()
    (stopped / "rows.jsonl").write_text(rows + "\n")
    trainer = train_sft(settings(stopped, resume=True)).trainer
    assert trainer.state.global_step == 4
