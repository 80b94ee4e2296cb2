"""Templates and patterns that would never end are found out in seconds, and honest ones are not in their way."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from alignkit import bounded
from alignkit.config import load_config
from alignkit.errors import ConfigError, ModelError
from alignkit.models.files import read_adapter
from alignkit.models.loading import load_adapter, load_tokenizer
from alignkit.parametrizations._lora import check_modules, check_rank
from alignkit.parts.shape import load_bridge, load_shape
from alignkit.runs import arguments
from tests.chaos.hostile import TEMPLATES
from tests.programs.conftest import save_model

HONEST = {
    "plain": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "one that refuses these messages": "{{ raise_exception('no') }}",
    "one with a mistake": "{{ messages[7].content.x }}",
}
CATASTROPHIC = r"(\w+\.?)+!"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds are enough to see that something is cut short."""
    monkeypatch.setattr(bounded, "SECONDS", 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model"
    save_model(path)
    return path


def test_a_template_that_never_ends_is_refused(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    for name in ("a loop in a loop", "a repetition before an answer"):
        file.write_text(str(TEMPLATES[name][0]))
        begun = time.perf_counter()
        with pytest.raises(ModelError, match=r"the chat template of .*t\.jinja.* (takes longer than|needs more than)"):
            load_tokenizer(str(saved), chat_template=file)
        assert time.perf_counter() - begun < 30


@pytest.mark.parametrize("name", HONEST)
def test_other_templates_are_loaded(name: str, saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(HONEST[name])
    assert isinstance(load_tokenizer(str(saved), chat_template=file), PreTrainedTokenizerFast)


@pytest.fixture(scope="module")
def model(saved: Path) -> Any:
    return Qwen3ForCausalLM.from_pretrained(saved)


def test_a_catastrophic_pattern_of_ours_is_refused(model: Any) -> None:
    with pytest.raises(ModelError, match="takes longer than 2 s over .* names of modules. Write all-linear"):
        check_modules(model, CATASTROPHIC)
    check_modules(model, r".*\.(q|v)_proj")


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_catastrophic_pattern_of_an_adapter_is_refused(key: str, model: Any, saved: Path, tmp_path: Path) -> None:
    base = Qwen3ForCausalLM(Qwen3Config.from_pretrained(saved))
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, key: {CATASTROPHIC: 4} if key == "rank_pattern" else CATASTROPHIC}))
    with pytest.raises(ModelError, match=r"adapter_config\.json has a pattern, .* takes longer than 2 s"):
        load_adapter(model, read_adapter(tmp_path))


def test_a_rank_larger_than_the_layers_is_refused(model: Any) -> None:
    widest = 32
    check_rank(model, widest)
    with pytest.raises(ModelError, match=f"`lora_r: {widest + 1}` is larger than .* at most {widest}"):
        check_rank(model, widest + 1)


@pytest.mark.parametrize(
    ("epochs", "refused"), [(1e-9, "less than one step. Write at least 0.2"), (1e5, None), (0.3, None)]
)
def test_a_share_that_is_no_step_is_refused(epochs: float, refused: str | None) -> None:
    """Ten rows in batches of two are five steps."""
    words = ["--model", "m", "--data", "d", "--method", "dpo", "--output_dir", "o"]
    config = replace(load_config("preference", None, words, check_files=False).config, num_train_epochs=epochs)
    args: Any = SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=1, world_size=1)
    rows, bridge = Dataset.from_dict({"x": list(range(10))}), load_bridge(load_shape("candidates"))
    if refused is None:
        arguments.check_length(config, args, rows, bridge)
        return
    with pytest.raises(ConfigError, match=refused):
        arguments.check_length(config, args, rows, bridge)
