from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from alignkit.config import model_files
from alignkit.models.positions import positions_of
from tests.configs.cases import SUPERVISED, problems_of

pytestmark = pytest.mark.usefixtures("workspace")


def make(folder: str, **files: Any) -> str:
    """A folder with files; ``__`` in a name stands for a dot."""
    Path(folder).mkdir(parents=True)
    for name, content in files.items():
        Path(folder, name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


MODELS = {
    "path that does not exist": ("./bass", "is a path that does not exist. Did you mean base?"),
    "absolute path": ("/gone/base", "is a path that does not exist. The folder /gone does not exist either"),
    "too deep for a Hub id": ("runs/a/b", "is a path that does not exist"),
    "trailing slash": ("org/name/", "is a path that does not exist"),
    "not a Hub id": ("my model", "is a path that does not exist"),
    "a file": ("rows.jsonl", "is a file. Write the folder that holds config.json"),
    "entry of a local folder": ("local/bas", "Did you mean local/base? "),
    "adapter": ("adapter", "is a LoRA adapter, not a model. Write model: org/base and adapter: adapter."),
    "no config": ("nothing", "has no config.json"),
    "no weights": ("weightless", "has no weights (*.safetensors)"),
    "no tokenizer": ("mute", "has no tokenizer"),
}


@pytest.mark.parametrize("key", ["model", "reference_model"])
@pytest.mark.parametrize(("name", "expected"), MODELS.values(), ids=MODELS.keys())
def test_refused_model(name: str, expected: str, key: str) -> None:
    make("local/base")
    make("nothing")
    make("adapter", adapter_config__json={"base_model_name_or_path": "org/base"})
    make("weightless", config__json={}, tokenizer__json={}, training_args__bin="x")
    make("mute", config__json={}, model__safetensors="x")
    found = problems_of({key: name})
    assert len(found) == 1 and found[0].startswith(f"command line: `{key}: {name}` ") and expected in found[0]


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "org/model_v1.2"])
def test_hub_ids_are_left_to_the_loader(name: str) -> None:
    assert problems_of({"model": name, "model_revision": "main", "reference_model": "org/other"}) == []


def test_revision_says_that_a_name_is_a_hub_id() -> None:
    make("local/base")
    found = problems_of({"model": "local/bas"})
    assert found[0].endswith(
        "Did you mean local/base? If you mean the Hub model local/bas, write model_revision: main."
    )
    assert problems_of({"model": "local/bas", "model_revision": "main"}) == []


def test_revision_of_a_local_model_is_refused() -> None:
    assert "would be ignored: base is a local folder" in problems_of({"model_revision": "main"})[0]


POSITIONS = {
    "stated": ({"max_position_embeddings": 64}, "max_position_embeddings in its config.json"),
    "of the text model": ({"text_config": {"max_position_embeddings": 64}}, "the 64 positions of base"),
    "learned": ({"n_positions": 64}, "n_positions in its config.json"),
    "of DBRX and MPT": ({"max_seq_len": 64}, "max_seq_len in its config.json"),
    "of the first GPT": ({"n_ctx": 64}, "n_ctx in its config.json"),
    "a recurrent model": ({"context_length": 64}, None),
    "rope without a factor": (
        {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "Write max_length: 64, or less",
    ),
    "stretched": ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, None),
    "stretched, of old": ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 4.0}}, None),
    "none": ({}, None),
}


@pytest.mark.parametrize(("config", "expected"), POSITIONS.values(), ids=POSITIONS.keys())
def test_rows_longer_than_the_model_has_positions(config: dict[str, Any], expected: str | None) -> None:
    Path("base/config.json").write_text(json.dumps(config))
    assert problems_of({"max_length": 64}) == problems_of({}) == []
    found = problems_of({"max_length": 65})
    if expected is None:
        assert found == []
    else:
        assert len(found) == 1 and found[0].startswith("command line: `max_length: 65` ") and expected in found[0]
    assert problems_of({**SUPERVISED, "max_length": 65, "packing": True}) == []


def test_nothing_is_said_of_the_default_length() -> None:
    """The default is 1024 tokens, which few rows have; those that are too long for a model are found with it."""
    for config in ({"model_type": "openai-gpt", "n_positions": 512}, {"max_position_embeddings": 512}):
        Path("base/config.json").write_text(json.dumps(config))
        assert problems_of({}) == []


@pytest.mark.parametrize("name", ["gpt2", "openai-gpt", "gpt_bigcode", "ctrl", "mpt", "llama", "qwen3"])
def test_the_number_of_positions_of_a_loaded_model(name: str) -> None:
    """Against the attribute under which transformers has it for every family."""
    config = AutoConfig.for_model(name)
    expected = config.max_seq_len if name == "mpt" else config.max_position_embeddings
    assert positions_of(config) == expected > 0


def test_a_reference_with_fewer_positions() -> None:
    make("short", config__json={"max_position_embeddings": 32}, model__safetensors="x", tokenizer__json={})
    (problem,) = problems_of({"max_length": 64, "reference_model": "short"})
    assert "the 32 positions of short" in problem


ADAPTERS = {
    "gone": (None, "does not exist"),
    "no config": ({}, "has no adapter_config.json"),
    "no weights": ({"adapter_config__json": {"peft_type": "LORA"}}, "has no adapter_model.safetensors"),
    "other kind": (
        {"adapter_config__json": {"peft_type": "IA3"}, "adapter_model__safetensors": "x"},
        "holds peft_type IA3. Only LoRA adapters can be continued",
    ),
    "pruning": (
        {"adapter_config__json": {"peft_type": "ALIGNKIT_PAT"}, "adapter_model__safetensors": "x"},
        "Only LoRA adapters can be continued; export it (alignkit prune)",
    ),
    "no JSON": ({"adapter_config__json": "{", "adapter_model__safetensors": "x"}, "holds peft_type None"),
    "on the output head": (
        {
            "adapter_config__json": {"peft_type": "LORA", "target_modules": ["q_proj", "lm_head"]},
            "adapter_model__safetensors": "x",
        },
        "has low-rank factors on lm_head",
    ),
}


@pytest.mark.parametrize(("files", "expected"), ADAPTERS.values(), ids=ADAPTERS.keys())
def test_refused_adapter(files: dict[str, Any] | None, expected: str) -> None:
    if files is not None:
        make("lora", **files)
    found = problems_of({"adapter": "lora"})
    assert len(found) == 1 and expected in found[0]


def test_adapter_in_a_checkpoint_of_the_run_named() -> None:
    """The last one by its number, not by its name."""
    for step in (4, 12):
        make(f"runs/x/checkpoint-{step}", adapter_config__json={"peft_type": "LORA"}, adapter_model__safetensors="x")
    make("runs/x/plots")
    found = problems_of({"adapter": "runs/x"})
    assert len(found) == 1
    assert found[0].endswith("has no adapter_config.json. Write adapter: runs/x/checkpoint-12, which has one.")
    assert problems_of({"adapter": "runs/x/checkpoint-12"}) == []


def test_a_head_trained_in_full_can_be_continued() -> None:
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    make("lora", adapter_config__json=config, adapter_model__safetensors="x")
    assert problems_of({"adapter": "lora"}) == problems_of({"lora_modules_to_save": ["lm_head"]}) == []


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}
GPTQ = {"quant_method": "gptq", "bits": 4}
FULL = {"parametrization": "full"}


@pytest.mark.parametrize(
    ("stored", "change", "expected"),
    [
        (NF4, {}, None),
        (NF4, {"quantization": "nf4"}, None),
        (NF4, {"quantization": "int8"}, "quantised already (nf4) and would stay so under quantization int8"),
        (INT8, {"quantization": "nf4"}, "quantised already (int8)"),
        (GPTQ, {}, None),
        (GPTQ, {"quantization": "nf4"}, "quantised already (gptq)"),
        (NF4, FULL, "quantised already (nf4): they are integers and cannot be trained. Write parametrization: lora"),
        (None, {"quantization": "nf4"}, None),
    ],
)
def test_a_model_that_is_quantised_already(
    stored: dict[str, Any] | None, change: dict[str, Any], expected: str | None
) -> None:
    config = {} if stored is None else {"quantization_config": stored}
    make("quantised", config__json=config, model__safetensors="x", tokenizer__json={})
    found = problems_of({"model": "quantised", **change})
    assert (expected in found[0] and len(found) == 1) if expected else found == []


def test_adapter_with_its_base_as_the_reference() -> None:
    make("lora", adapter_config__json={"peft_type": "LORA"}, adapter_model__safetensors="x")
    assert problems_of({"adapter": "lora", "reference_model": "base"}) == []


def test_template_must_be_a_file() -> None:
    Path("chat.jinja").write_text("")
    assert problems_of({"chat_template": "chat.jinja"}) == []
    assert "is not an existing file. Did you mean chat.jinja?" in problems_of({"chat_template": "chat.jinj"})[0]


@pytest.mark.parametrize("key", ["output_dir", "reference_cache"])
def test_folders_that_cannot_be_made(key: str) -> None:
    reference = {"reference": "precomputed"}
    assert "is an existing file" in problems_of(reference | {key: "rows.jsonl"})[0]
    assert "lies below rows.jsonl, which is a file" in problems_of(reference | {key: "rows.jsonl/a/b"})[0]
    assert problems_of(reference | {key: "base"}) == problems_of(reference | {key: "new/folder"}) == []


PACKAGES = {
    "bitsandbytes for quantization": ({"quantization": "nf4"}, "pip install 'alignkit[quantization]'"),
    "bitsandbytes for the optimizer": ({"optim": "paged_adamw_8bit"}, "pip install 'alignkit[quantization]'"),
    "tracker": ({"report_to": "wandb"}, "needs the Python package wandb. Install it: pip install wandb."),
    "Liger's kernels": ({"kernels": "liger"}, "pip install 'alignkit[fast]'"),
    "flash attention": ({"attn_implementation": "flash_attention_2", "bf16": True}, "flash_attn or kernels"),
}


@pytest.mark.parametrize(("change", "expected"), PACKAGES.values(), ids=PACKAGES.keys())
def test_missing_package(change: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "find_spec", lambda package: None)
    found = problems_of(change)
    assert len(found) == 1 and expected in found[0]


def test_a_folder_called_like_a_package_is_no_package(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("some_tracker")
    monkeypatch.syspath_prepend(str(workspace))
    assert not model_files._is_installed("some_tracker")
    assert model_files._is_installed("yaml")
