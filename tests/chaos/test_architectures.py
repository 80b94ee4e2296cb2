"""Stopped and resumed, full fine-tuning of every architecture class ends with the bits of the run never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from trl import SFTConfig

from alignkit.errors import CheckpointError, ModelError
from alignkit.models.loading import ModelSource, load_model
from alignkit.models.saved_comparison import model_difference
from alignkit.parts.method import load_method
from alignkit.shapes._tokens import SupervisedTrainer
from tests.chaos.architectures import ARCHITECTURES, VOCABULARY, save_base
from tests.runs.saved import guarded, tiny_tokenizer

SHORT = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3")
"""In every run of the suite; the others with ``-m chaos``."""
LONG = [pytest.param(kind, marks=() if kind in SHORT else pytest.mark.chaos) for kind in ARCHITECTURES]


def rows() -> Dataset:
    """Token ids of different lengths."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (8,), generator=draw).tolist()
    ids = [torch.randint(3, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def trainer(base: Path, output: Path) -> SupervisedTrainer:
    """A trainer of all weights of a base, saving every other step of four."""
    args = SFTConfig(
        output_dir=str(output), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, eval_packing=False, logging_steps=1,
    )  # fmt: skip
    method = load_method("sft")
    made: SupervisedTrainer = guarded(SupervisedTrainer(
        load_model(ModelSource(str(base))), args, method=method, options=method.options(), train_dataset=rows(),
        processing_class=tiny_tokenizer(),
    ))  # fmt: skip
    return made


def resumed_equals_whole(kind: str, folder: Path) -> None:
    base = save_base(kind, folder / "base")
    before = load_model(ModelSource(str(base))).state_dict()
    whole, again = trainer(base, folder / "whole"), trainer(base, folder / "stopped")
    whole.train()
    checkpoint = Path(shutil.copytree(folder / "whole" / "checkpoint-2", folder / "stopped" / "checkpoint-2"))
    again.train(resume_from_checkpoint=str(checkpoint))
    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ, such as {different[0]}"
    assert all(not torch.equal(before[name], found[name]) for name in found if "experts" in name), "experts train"
    saved, again_saved = (
        load_file(folder / run / "checkpoint-4" / "model.safetensors") for run in ("whole", "stopped")
    )
    assert saved.keys() == again_saved.keys() and all(torch.equal(saved[name], again_saved[name]) for name in saved)


@pytest.mark.parametrize("kind", LONG)
def test_resumed_equals_whole(kind: str, tmp_path: Path) -> None:
    resumed_equals_whole(kind, tmp_path)
    print(f"architectures resumed bitwise in full: 1 of 1 ({kind})")


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3"])
@pytest.mark.parametrize("fault", ["value", "extra", "gone"])
def test_any_difference_between_model_and_file_is_found(kind: str, fault: str, tmp_path: Path) -> None:
    """A single changed bit of an expert included; a tied weight is under one name, and that is no difference."""
    model = load_model(ModelSource(str(save_base(kind, tmp_path / "base"))))
    assert model_difference(model, tmp_path / "base") is None
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "mlp" in name and "down_proj" in name)
    if fault == "value":
        tensors[name].view(torch.int32)[0, 0] ^= 1
    elif fault == "extra":
        tensors["more"] = torch.ones(1)
    else:
        del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    assert (model_difference(model, tmp_path / "base") or "").count("more" if fault == "extra" else "down_proj")


def test_a_load_that_loses_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the experts left as they are, as a file read by plain names leaves them, every way in would say so."""
    base = save_base("qwen3_moe", tmp_path / "base")
    trainer(base, tmp_path / "run").train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    monkeypatch.setattr("alignkit.shapes._bridge.load_saved_weights", lambda model, folder: None)
    with pytest.raises(CheckpointError, match="did not come out as it was saved"):
        trainer(base, tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    assert load_model(ModelSource(str(checkpoint))) is not None
    monkeypatch.setattr("alignkit.models.loading.model_difference", lambda model, folder: "lm_head is not")
    with pytest.raises(ModelError, match="not loaded as it was saved"):
        load_model(ModelSource(str(checkpoint)))
