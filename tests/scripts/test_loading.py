"""What a folder holds, and models, tokenizers and adapters that do not load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alignkit.errors import AlignkitError, CheckpointError, ModelError
from alignkit.models.files import check_tensors, find_model, model_problem, read_adapter, sha256
from alignkit.models.loading import ModelSource, load_adapter, load_model, load_tokenizer, quantization_of
from tests.scripts.tiny import randomize, save_adapter


@pytest.fixture
def adapter(assets: Path, tmp_path: Path) -> Path:
    """A copy of the adapter to damage."""
    return shutil.copytree(assets / "adapter", tmp_path / "adapter")


def edit_config(adapter: Path, **changes: object) -> None:
    """Change entries of adapter_config.json."""
    config = json.loads((adapter / "adapter_config.json").read_text()) | changes
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def edit_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of an adapter in place."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def test_find_model(assets: Path) -> None:
    base, adapter = str(assets / "base"), str(assets / "adapter")
    assert find_model(base, None) == (base, None, None)
    assert find_model("org/name", None) == ("org/name", None, None)
    for given in ((None, adapter), (adapter, None)):
        model, revision, found = find_model(*given)
        assert (model, revision) == (base, None) and found is not None and found.kind == "LORA"
    assert find_model(str(assets / "other"), adapter)[0] == str(assets / "other")


def test_the_adapter_names_its_base_and_revision(adapter: Path) -> None:
    edit_config(adapter, base_model_name_or_path="org/name", revision="v2")
    assert find_model(None, str(adapter))[:2] == ("org/name", "v2")


@pytest.mark.parametrize("base", [None, "./gone", "/no/such/folder"])
def test_an_adapter_whose_base_is_not_here(base: str | None, adapter: Path) -> None:
    edit_config(adapter, base_model_name_or_path=base)
    with pytest.raises(ModelError, match="Give the model it was trained on with --model"):
        find_model(None, str(adapter))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adapter", "is an adapter, not a model"),
        ("pairs.jsonl", "is a file"),
        ("bose", "base'"),
        ("", "has no config.json, so it is not a saved model; did you mean"),
    ],
)
def test_model_problems(name: str, expected: str, assets: Path) -> None:
    assert expected in (model_problem(str(assets / name)) or "")
    assert model_problem("org/name") is None and model_problem(str(assets / "base")) is None


def test_folders_that_are_no_adapter(assets: Path, tmp_path: Path) -> None:
    for name, expected in (("base", "give it as --model"), ("nothing", "is not a folder"), ("", "did you mean")):
        with pytest.raises(ModelError, match=expected):
            read_adapter(assets / name)
    with pytest.raises(ModelError, match="holds no saved weights"):
        read_adapter(tmp_path)
    with pytest.raises(ModelError, match="no model is given"):
        find_model(None, None)


@pytest.mark.parametrize(
    ("damage", "error", "expected"),
    [
        (lambda a: (a / "adapter_model.safetensors").unlink(), ModelError, "no adapter_model.safetensors"),
        (lambda a: (a / "adapter_model.safetensors").write_bytes(b"\x08"), CheckpointError, "truncated"),
        (lambda a: (a / "adapter_config.json").write_text("{"), ModelError, "is not JSON"),
        (lambda a: (a / "adapter_config.json").write_text("[]"), ModelError, "expected an object"),
        (lambda a: edit_config(a, peft_type=None), ModelError, "no peft_type"),
        (lambda a: edit_tensors(a, dict.clear), CheckpointError, "it has no tensor"),
        (
            lambda a: edit_tensors(a, lambda t: t.update({min(t): torch.empty(0)})),
            CheckpointError,
            "1 of 28 tensors are empty",
        ),
    ],
)
def test_damaged_adapters(
    damage: Callable[[Path], object], error: type[AlignkitError], expected: str, adapter: Path
) -> None:
    damage(adapter)
    with pytest.raises(error, match=expected):
        read_adapter(adapter)


@pytest.mark.parametrize(
    ("base", "expected"),
    [("other", "size mismatch"), ("deep", "4 tensors are missing for it, such as base_model.model.model.layers.2")],
)
def test_an_adapter_of_another_base(base: str, expected: str, assets: Path, tmp_path: Path) -> None:
    adapter = save_adapter(assets / "base", tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    model = load_model(ModelSource(str(assets / base)), "cpu")
    with pytest.raises(ModelError, match=expected) as raised:
        load_adapter(model, read_adapter(adapter))
    assert "It was trained on" in str(raised.value) and "\n" not in str(raised.value)


def test_an_adapter_of_a_deeper_base(assets: Path, tmp_path: Path) -> None:
    deep = save_adapter(assets / "deep", tmp_path / "deep")
    model = load_model(ModelSource(str(assets / "base")), "cpu")
    with pytest.raises(ModelError, match="14 tensors have no place in it"):
        load_adapter(model, read_adapter(deep))


def test_embeddings_saved_with_an_adapter_are_in_their_place(assets: Path, tmp_path: Path) -> None:
    directory = save_adapter(assets / "base", tmp_path / "full", modules_to_save=["lm_head"])
    model = load_adapter(load_model(ModelSource(str(assets / "base")), "cpu"), read_adapter(directory))
    assert not model.training


RESIZED = {
    "the embeddings alone": {},
    "LoRA on them": {"target_modules": ["q_proj", "embed_tokens"]},
    "trained in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "single tokens trained": {"trainable_token_indices": [260, 261]},
}


def resized_adapter(base: Path, directory: Path, settings: dict[str, Any], **saving: Any) -> torch.Tensor:
    """Save an adapter on a model with four tokens more than ``base``; returns what the whole says to one of them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(264)
    config = LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]} | settings))
    wrapped = get_peft_model(model, config).eval()
    randomize(wrapped, 0.05, 1)
    wrapped.save_pretrained(directory, **saving)
    with torch.no_grad():
        return wrapped(input_ids=torch.tensor([[5, 261, 9]])).logits


@pytest.mark.parametrize("settings", RESIZED.values(), ids=RESIZED.keys())
def test_adapters_that_bring_resized_embeddings(settings: dict[str, Any], assets: Path, tmp_path: Path) -> None:
    expected = resized_adapter(assets / "base", tmp_path / "adapter", settings)
    model = load_adapter(load_model(ModelSource(str(assets / "base")), "cpu"), read_adapter(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=torch.tensor([[5, 261, 9]])).logits, expected, atol=1e-6, rtol=0)


def test_embeddings_that_an_adapter_does_not_bring(assets: Path, tmp_path: Path) -> None:
    settings = RESIZED["LoRA on them"]
    resized_adapter(assets / "base", tmp_path / "adapter", settings, save_embedding_layers=False)
    with pytest.raises(ModelError, match="trained on 264 embeddings, of which the model has 260"):
        load_adapter(load_model(ModelSource(str(assets / "base")), "cpu"), read_adapter(tmp_path / "adapter"))


@pytest.mark.parametrize(("kind", "other"), [("nf4", "int8"), ("int8", "nf4")])
def test_a_checkpoint_that_is_quantised_keeps_its_own_or_is_refused(
    kind: str, other: str, assets: Path, tmp_path: Path
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    load_model(ModelSource(str(assets / "wide"), quantization=kind), "cpu").save_pretrained(tmp_path / "model")
    source = ModelSource(str(tmp_path / "model"))
    layer = {"nf4": bitsandbytes.nn.Linear4bit, "int8": bitsandbytes.nn.Linear8bitLt}[kind]
    for model in (load_model(source, "cpu"), load_model(replace(source, quantization=kind), "cpu")):
        assert isinstance(model.model.layers[0].mlp.up_proj, layer)
    with pytest.raises(ModelError, match=rf"quantised already \({kind}\) and would stay so under quantization {other}"):
        load_model(replace(source, quantization=other), "cpu")
    with pytest.raises(ModelError, match="integers and cannot be trained"):
        quantization_of(source, in_full=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_dtype_and_mode(dtype: str, assets: Path) -> None:
    model = load_model(ModelSource(str(assets / "base"), dtype=dtype), "cpu")
    assert model.dtype == {"bfloat16": torch.bfloat16}.get(dtype, torch.float32) and not model.training


def test_a_checkpoint_that_lacks_weights_is_refused(assets: Path, tmp_path: Path) -> None:
    partial = shutil.copytree(assets / "base", tmp_path / "partial")
    tensors = load_file(partial / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(ModelSource(str(partial)), "cpu")


def test_unknown_models_and_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the model 'nobody/nothing' cannot be loaded"):
        load_model(ModelSource("nobody/nothing"), "cpu")
    with pytest.raises(ModelError, match="does not exist"):
        load_model(ModelSource("./nothing"), "cpu")
    with pytest.raises(ModelError, match="the tokenizer of"):
        load_tokenizer(str(tmp_path))


def test_a_chat_template_replaces_the_tokenizers(assets: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    tokenizer = load_tokenizer(str(assets / "base"), chat_template=tmp_path / "t.jinja")
    assert tokenizer.chat_template == "{{ messages }}"


def test_hash_and_names(assets: Path) -> None:
    file = assets / "adapter" / "adapter_model.safetensors"
    assert len(check_tensors(file)) == 28
    assert len(sha256(file)) == 64 and sha256(file) != sha256(assets / "base" / "model.safetensors")
