"""The cache of reference log-probs depends on what the values depend on, and on nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alignkit.errors import CheckpointError
from alignkit.references import _cache as reference
from alignkit.shapes._candidates import BridgeSettings
from tests.trainers import flat_weights, logged, random_rows

PRECOMPUTE = {"precompute_ref_log_probs": True}


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **changes)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def run(make_trainer: Any, cache: Path, layout: str = "padded", learning_rate: float = 1e-3, **changes: Any) -> Any:
    arguments = PRECOMPUTE | {"learning_rate": learning_rate} | changes.pop("arguments", {})
    trainer = make_trainer(
        settings=BridgeSettings(layout=layout, reference_cache=cache), arguments=arguments, **changes
    )
    trainer.train()
    return trainer


def files(cache: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}


def test_precomputed_equals_computed_on_the_fly(make_trainer: Any, cache: Path) -> None:
    for peft_config in (None, lora()):
        live = make_trainer(peft_config=peft_config)
        live.train()
        cached = run(make_trainer, cache, peft_config=peft_config)
        assert cached.ref_model is None
        assert logged(cached, "loss") == pytest.approx(logged(live, "loss"), abs=2e-6)
        torch.testing.assert_close(flat_weights(cached.model), flat_weights(live.model), atol=1e-5, rtol=1e-4)


def test_one_file_serves_learning_rate_layout_method_and_parametrization(make_trainer: Any, cache: Path) -> None:
    run(make_trainer, cache)
    first = files(cache)
    assert len(first) == 1
    run(make_trainer, cache, learning_rate=5e-4)
    run(make_trainer, cache, layout="packed")
    run(make_trainer, cache, method="flex_dpo")
    run(make_trainer, cache, arguments={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    run(make_trainer, cache, peft_config=lora())
    assert files(cache) == first


def test_other_rows_and_other_weights_are_not_served(
    make_trainer: Any, cache: Path, rows: Dataset, model_path: str
) -> None:
    run(make_trainer, cache)
    run(make_trainer, cache, train_dataset=rows.select(range(15)))
    run(make_trainer, cache, train_dataset=Dataset.from_list([rows[i] for i in reversed(range(16))]))
    shorter = Dataset.from_list([r | {"completion_ids": [c[:4] for c in r["completion_ids"]]} for r in rows])
    run(make_trainer, cache, train_dataset=shorter)
    assert len(files(cache)) == 4
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    run(make_trainer, cache, model=model)
    assert len(files(cache)) == 5
    half = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    run(make_trainer, cache, model=half, peft_config=lora())
    assert len(files(cache)) == 6


def test_an_adapter_that_continues_is_its_own_reference(make_trainer: Any, cache: Path, model_path: str) -> None:
    def continued(scale: float) -> Any:
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        torch.manual_seed(3)
        adapted = get_peft_model(model, lora(init_lora_weights=False))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(scale)
        return adapted

    trainer = run(make_trainer, cache, model=continued(1.0), arguments={"max_steps": 1})
    assert "ref" in trainer.model.peft_config
    assert logged(trainer, "rewards/margins")[0] == pytest.approx(0.0, abs=1e-5)
    run(make_trainer, cache, model=continued(1.0), arguments={"max_steps": 1})
    assert len(files(cache)) == 1
    run(make_trainer, cache, model=continued(2.0), arguments={"max_steps": 1})
    assert len(files(cache)) == 2


def test_the_key_is_the_function_not_the_weights_alone(model_path: str) -> None:
    """One set of weights, other functions; and what no log-prob depends on is not in the key."""

    def key(changes: Any = None, adapter: LoraConfig | None = None) -> str:
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, **(changes or {}))
        if adapter is None:
            return reference.model_fingerprint(model, None)
        torch.manual_seed(3)
        return reference.model_fingerprint(get_peft_model(model, adapter), "default")

    plain = key()
    assert key() == plain == key({"use_cache": False, "attn_implementation": "eager"}) == key({"pad_token_id": 3})
    # A base is the same for the cache as it is for the adapters trained on it.
    without_effect = {"initializer_range": 0.5, "attention_dropout": 0.5, "output_hidden_states": True}
    assert key(without_effect | {"problem_type": "regression"}) == plain
    functions = [{"rms_norm_eps": 0.1}, {"attention_bias": True}, {"sliding_window": 4, "use_sliding_window": True}]
    functions += [{"rope_parameters": {"rope_type": "default", "rope_theta": 2.0}}]
    assert len({plain, *map(key, functions)}) == 5
    scales = [lora(init_lora_weights=False, **kind) for kind in ({}, {"lora_alpha": 99}, {"use_rslora": True})]
    scales += [lora(init_lora_weights=False, alpha_pattern={"v_proj": 3.0})]
    assert len({plain, *(key(adapter=scale) for scale in scales)}) == 5
    assert key(adapter=scales[0]) == key(adapter=lora(init_lora_weights=False, lora_dropout=0.5))


@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_a_cache_of_another_function_is_not_served_in_half_precision(
    make_trainer: Any, cache: Path, model_path: str, kind: str
) -> None:
    """In bfloat16 the comparison of a few rows with the cache lets 0.3 nats a token pass."""

    def model(changed: bool) -> Any:
        config = {"rms_norm_eps": 0.01} if changed and kind == "base" else {}
        plain = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16, **config)
        if kind == "base":
            return plain
        torch.manual_seed(3)
        return get_peft_model(plain, lora(init_lora_weights=False, lora_alpha=8.5 if changed else 8))

    for changed in (False, True):
        adapter = lora() if kind == "base" else None
        arguments = {"max_steps": 1, "learning_rate": 0.0}
        trainer = run(make_trainer, cache, model=model(changed), peft_config=adapter, arguments=arguments)
        # The policy is its own reference here: at learning rate 0 every reward is rounding.
        assert logged(trainer, "rewards/margins") == [pytest.approx(0.0, abs=0.02)]
    assert len(files(cache)) == 2


def test_values_are_per_token_and_right(make_trainer: Any, cache: Path, rows: Dataset) -> None:
    trainer = run(make_trainer, cache, arguments={"max_steps": 1, "learning_rate": 0.0})
    column = trainer.train_dataset["ref_token_logps"]
    assert [[len(c) for c in row] for row in column] == [[len(c) for c in row] for row in rows["completion_ids"]]
    live = make_trainer(settings=BridgeSettings(layout="padded"))
    inputs = live.data_collator([rows[i] for i in range(4)])
    expected = live.reference.token_logps(inputs)
    cached = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])["ref_token_logps"]
    torch.testing.assert_close(cached, expected, atol=1e-5, rtol=1e-5)


def test_a_stale_file_is_found_out(make_trainer: Any, cache: Path) -> None:
    run(make_trainer, cache)
    (path,) = cache.iterdir()
    values = load_file(path)["token_logps"]
    save_file({"token_logps": values - 0.01}, path)
    with pytest.raises(CheckpointError, match=r"differ from the model's by up to 0\.01 nats.*Delete"):
        run(make_trainer, cache)
    path.write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="cannot be read.*Delete"):
        run(make_trainer, cache)
    save_file({"token_logps": values[:-1].contiguous()}, path)
    with pytest.raises(CheckpointError, match=f"holds {len(values) - 1} tokens, the data {len(values)}"):
        run(make_trainer, cache)


def test_a_killed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = reference.ReferenceCache(tmp_path / "cache")
    path = store.path("weights", "float32", "rows")

    def interrupted(tensors: Any, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(reference, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.store(path, torch.zeros(3))
    assert store.load(path, 3) is None


def test_fingerprints_separate_what_must_be_separate() -> None:
    row = random_rows([(3, (2, 2))])[0]
    moved = row | {"prompt_ids": row["prompt_ids"] + row["completion_ids"][0][:1]}
    swapped = row | {"completion_ids": row["completion_ids"][::-1]}
    scored = row | {"scores": [0.3, 0.1]}
    prints = {reference.token_ids_fingerprint([r]) for r in (row, moved, swapped)}
    assert len(prints) == 3
    assert reference.token_ids_fingerprint([scored]) == reference.token_ids_fingerprint([row]), (
        "scores change no log-prob"
    )
