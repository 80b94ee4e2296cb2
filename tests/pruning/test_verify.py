"""A folder passes only as what it should be: whole, as the masked model, with its cache, without code of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.errors import ModelError
from alignkit.pruning.fresh_process import look
from alignkit.pruning.verify import Verification, judge, refuse_code, verify
from tests.scripts.tiny import tiny_model

TEXTS = [[5, 6, 7, 8, 9], [40, 41, 42]]
TOLERANCE = 1e-4
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(family="llama").save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    """What the masked model would say: here the model itself, before it was saved."""
    model = tiny_model(family="llama")
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0] for ids in TEXTS]


def judged(folder: Path, expected: list[Tensor], tolerance: float = TOLERANCE) -> Verification:
    """As :func:`verify`, in this process: each fresh one takes seconds."""
    logits = folder.parent / "logits.safetensors"
    return judge(folder, look(str(folder), TEXTS, str(logits)), logits, expected, tolerance)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_good_folder_passes_where_alignkit_cannot_be_imported(
    folder: Path, expected: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first" / "alignkit").mkdir(parents=True)
    (tmp_path / "first" / "alignkit" / "__init__.py").write_text("raise SystemExit('alignkit was imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "first"))
    found = verify(folder, TEXTS, expected, TOLERANCE)
    model = tiny_model(family="llama")
    assert found.max_error < TOLERANCE and found.cache_error < TOLERANCE and found.positions == 8
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.bytes == (folder / "model.safetensors").stat().st_size
    assert found.model_class == "LlamaForCausalLM"


def test_a_tensor_of_another_shape_does_not_load(folder: Path, expected: list[Tensor]) -> None:
    change(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:-1].clone()}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        judged(folder, expected)


def test_what_a_fresh_process_dies_of_is_told(
    folder: Path, expected: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "child.py").write_text("raise RuntimeError('size mismatch of a weight')")
    monkeypatch.setattr("alignkit.pruning.verify._CHILD", tmp_path / "child.py")
    with pytest.raises(ModelError, match=r"(?s)cannot load and run .* \(status 1\).*size mismatch of a weight"):
        verify(folder, TEXTS, expected, TOLERANCE)


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda tensors: tensors.pop(WEIGHT), "1 weights of the model are in no file"),
    "extra": (
        lambda tensors: tensors.update({"model.layers.0.mlp.down_proj.bias": torch.zeros(32)}),
        r"1 tensors of the files have no place in the model.*such as model\.layers\.0\.mlp\.down_proj\.bias",
    ),
    "ignored": (
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}),
        "the files hold .* numbers, the model that is loaded|have no place in the model",
    ),
    "changed": (lambda tensors: tensors[WEIGHT].mul_(1.01), "a logit differs by .* from the masked model's"),
    "not a number": (lambda tensors: tensors[WEIGHT].fill_(torch.nan), "a logit differs by nan"),
}


@pytest.mark.parametrize(("edit", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_folder_that_is_not_the_masked_model_is_refused(
    edit: Callable[[dict[str, Tensor]], object], message: str, folder: Path, expected: list[Tensor]
) -> None:
    assert judged(folder, expected).max_error == 0.0
    change(folder, edit)
    with pytest.raises(ModelError, match=message):
        judged(folder, expected)


def test_what_the_cache_gets_wrong_is_refused(folder: Path, expected: list[Tensor]) -> None:
    logits = folder.parent / "logits.safetensors"
    answer = look(str(folder), TEXTS, str(logits))
    for wrong, message in (
        ({"cache_error": 0.3}, "differs by 0.3 between reading through the KV cache"),
        ({"cache_error": float("nan")}, "differs by nan between"),
        ({"generated": {"True": [1, 2], "False": [1, 3]}}, r"\[1, 2\] with the KV cache and \[1, 3\] without"),
    ):
        with pytest.raises(ModelError, match=message):
            judge(folder, answer | wrong, logits, expected, TOLERANCE)
    with pytest.raises(ModelError, match="differs by inf"):
        judge(folder, answer, logits, [expected[0][:, :-1], expected[1]], TOLERANCE)


def test_a_folder_with_code_of_its_own_is_never_loaded(folder: Path, expected: list[Tensor]) -> None:
    refuse_code(folder)
    (folder / "modeling_own.py").write_text("raise SystemExit")
    with pytest.raises(ModelError, match=r"holds modeling_own\.py"):
        verify(folder, TEXTS, expected, TOLERANCE)
    (folder / "modeling_own.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "own.Own"}}))
    with pytest.raises(ModelError, match="auto_map"):
        verify(folder, TEXTS, expected, TOLERANCE)


def test_a_text_without_a_second_token_says_nothing_of_the_cache(folder: Path) -> None:
    with pytest.raises(ModelError, match="at least two tokens"):
        verify(folder, [[5]], [torch.zeros(1, 260)], TOLERANCE)
