"""Reward models: parity with TRL's trainer, the head beside an adapter, where rewards are read off, what is refused."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from alignkit.data.reward_batch import RewardCollator
from alignkit.errors import ConfigError, DataError, ModelError
from alignkit.losses.types import LossOutput, RewardBatch
from alignkit.models.export import merge_adapter
from alignkit.models.files import read_adapter
from alignkit.models.loading import ModelSource
from alignkit.models.modes import evaluating
from alignkit.models.reward_model import head_outputs, load_reward_model
from alignkit.parametrizations._policy import load_policy
from alignkit.parts.method import load_method
from alignkit.reports.card import content_of_run, render_card
from alignkit.shapes._reward import RewardModelTrainer
from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of, text_rows
from tests.trainers import SHORT_RUN, flat_weights, logged

SHARED_METRICS = ("accuracy", "margin", "mean_reward", "num_tokens")
CENTER = 0.05


def lora(kind: str) -> LoraConfig | None:
    adapter = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", modules_to_save=["score"])
    return None if kind == "full" else adapter


def model_of(model_path: str) -> Any:
    torch.manual_seed(3)
    return AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1, dtype=torch.float32)


def with_margin(rows: Dataset) -> Dataset:
    return rows.add_column("margin", [0.25 * (i % 4) for i in range(len(rows))])


@pytest.fixture(scope="module", params=["full", "lora"])
def peer(request: Any, tmp_path_factory: Any, model_path: str, tokenizer: Any, rows: Dataset) -> tuple[str, Any]:
    """A finished trl.RewardTrainer run of six steps on the same tokens."""
    pairs = with_margin(rows).map(
        lambda r: {
            "chosen_ids": r["prompt_ids"] + r["completion_ids"][0],
            "rejected_ids": r["prompt_ids"] + r["completion_ids"][1],
        },
        remove_columns=["prompt_ids", "completion_ids", "scores"],
    )
    arguments = RewardConfig(str(tmp_path_factory.mktemp("peer")), **SHORT_RUN, center_rewards_coefficient=CENTER)
    trainer = RewardTrainer(
        model_of(model_path),
        args=arguments,
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=lora(request.param),
    )
    trainer.train()
    return request.param, trainer


def make(
    folder: Path,
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    *,
    method: str = "bradley_terry",
    options: Any = None,
    **inherited: Any,
) -> Any:
    chosen = load_method(method)
    return RewardModelTrainer(
        model,
        RewardConfig(str(folder / "run"), **SHORT_RUN),
        method=chosen,
        options=options or chosen.options(),
        train_dataset=rows,
        processing_class=tokenizer,
        **inherited,
    )


def test_bradley_terry_is_bitwise_trl(
    peer: Any, tmp_path: Path, model_path: str, tokenizer: Any, rows: Dataset
) -> None:
    kind, theirs = peer
    options = load_method("bradley_terry").options(center_rewards_coefficient=CENTER)
    trainer = make(
        tmp_path, model_of(model_path), tokenizer, with_margin(rows), options=options, peft_config=lora(kind)
    )
    trainer.train()
    assert len(logged(trainer, "loss")) == 6 and max(logged(trainer, "grad_norm")) > 0.01
    assert logged(trainer, "loss") == logged(theirs, "loss")
    assert logged(trainer, "grad_norm") == logged(theirs, "grad_norm")
    assert torch.equal(flat_weights(trainer.model), flat_weights(theirs.model))
    for key in SHARED_METRICS:
        assert logged(trainer, key) == pytest.approx(logged(theirs, key), rel=1e-5, abs=1e-6), key


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny language model whose tokenizer knows words."""
    folder = tmp_path_factory.mktemp("words")
    save_model(folder)
    return str(folder)


def rewards_of(trainer: Any) -> list[list[float]]:
    """What the model of a trainer says of its training rows, batch by batch as it trains."""
    found: list[list[float]] = []
    method = trainer.method

    def objective(batch: RewardBatch, options: Any) -> LossOutput:
        found.extend(batch.rewards.tolist())
        return method.objective(batch, options)

    trainer.method, collator = replace(method, objective=objective), trainer.data_collator
    with torch.no_grad(), evaluating(trainer.model):
        for start in range(0, len(trainer.train_dataset), 4):
            batch = collator([trainer.train_dataset[i] for i in range(start, start + 4)])
            trainer.evaluate_objective(trainer.model, batch)
    trainer.method = method
    return found


@pytest.mark.parametrize("parametrization", ["full", "lora"])
def test_what_is_saved_gives_texts_the_rewards_it_was_trained_to_give(
    parametrization: str, words: str, tmp_path: Path
) -> None:
    config = config_of("reward", words, tmp_path, parametrization=parametrization, learning_rate=1.0e-2)
    rows = text_rows(config, 12)
    trainer = build(config, rows)
    before = rewards_of(trainer)
    trainer.train()
    trained = rewards_of(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = load_reward_model(str(tmp_path / "saved"), base=words if parametrization == "lora" else None, batch_size=5)
    found = loaded.score([(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows])
    assert [value for row in found for value in row] == pytest.approx(sum(trained, []), abs=1e-5)
    assert loaded(rows[3]["prompt"], [rows[3]["rejected"]]) == pytest.approx([trained[3][1]], abs=1e-5)
    assert (
        max(abs(a - b) for one, other in zip(before, trained, strict=True) for a, b in zip(one, other, strict=True))
        > 0.01
    )
    answers = [f"{rows[0]['prompt']}{rows[0][side]}<eos>" for side in ("chosen", "rejected")]
    assert snippet_rewards(tmp_path / "saved", words, parametrization, answers) == pytest.approx(trained[0], abs=1e-5)


def snippet_rewards(saved: Path, base: str, parametrization: str, answers: list[str]) -> list[float]:
    """Rewards of texts by the lines that a card shows."""
    values = {"model": base, "method": "bradley_terry", "data": "rows.jsonl", "parametrization": parametrization}
    config = {key: {"value": value, "source": "run.yaml:1"} for key, value in values.items()}
    (snippet,) = re.findall(
        r"```python\n(.*?)```", render_card(content_of_run({"config": config}, str(saved))), flags=re.DOTALL
    )
    found = []
    for text in answers:
        names = {"text": text}
        exec(compile(snippet, "card", "exec"), names)
        found.append(names["reward"].item())
    return found


def test_an_adapter_is_merged_with_its_head_and_nothing_else_of_the_base_trains(words: str, tmp_path: Path) -> None:
    config = config_of("reward", words, tmp_path, learning_rate=1.0e-2, max_steps=2)
    trainer = build(config, text_rows(config, 8))
    trains = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "score.modules_to_save" in name for name in trains)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert [name for name in load_file(tmp_path / "saved" / "adapter_model.safetensors") if "score" in name]
    prompts = [[5, 9, 12], [4, 3]]
    merge_adapter(
        read_adapter(tmp_path / "saved"),
        ModelSource(words),
        tmp_path / "merged",
        tokenizer=trainer.processing_class,
        prompts=prompts,
    )
    whole = load_reward_model(str(tmp_path / "merged"))
    beside = load_reward_model(str(tmp_path / "saved"), base=words)
    assert whole.score_ids(prompts) == pytest.approx(beside.score_ids(prompts), abs=1e-5)
    assert "AutoModelForSequenceClassification" in (tmp_path / "merged" / "README.md").read_text()


def test_a_language_model_gives_no_rewards(words: str) -> None:
    with pytest.raises(ModelError, match="is no reward model: it has no head of rewards"):
        load_reward_model(words)


def test_the_head_is_drawn_from_the_seed(words: str, tmp_path: Path) -> None:
    heads = [load_policy(config_of("reward", words, tmp_path, seed=seed)).score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_a_reward_is_read_off_where_transformers_reads_it_off(pad: str, model_path: str, tokenizer: Any) -> None:
    """Also of rows that end in the padding token, as all do where that is the EOS."""
    model, pad_token_id = model_of(model_path), tokenizer.convert_tokens_to_ids(pad)
    model.config.pad_token_id = pad_token_id
    rows = [{"prompt_ids": [5, 9], "completion_ids": [[7, 8, 3, 1], [7, 1]], "scores": [1.0, 0.0]}]
    batch = RewardCollator(pad_token_id)(rows)
    with torch.no_grad(), head_outputs(model) as outputs:
        own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    found = outputs[0][batch["sequence"], batch["position"], 0]
    assert torch.equal(found[0], own)
    assert batch["position"].tolist() == [[5, 3] if pad == "<pad>" else [4, 2]]


def test_what_is_given_to_the_trainer_of_trl_and_would_change_nothing_is_refused(
    tmp_path: Path, model_path: str, tokenizer: Any, rows: Dataset
) -> None:
    method = load_method("bradley_terry")
    arguments = RewardConfig(str(tmp_path), **SHORT_RUN, center_rewards_coefficient=0.1)
    with pytest.raises(ConfigError, match="center_rewards_coefficient=0.1"):
        RewardModelTrainer(
            model_of(model_path),
            arguments,
            method=method,
            options=method.options(),
            train_dataset=rows,
            processing_class=tokenizer,
        )


def judged_rows(config: Any, count: int) -> Dataset:
    """Pairs of which the longer answer is the better one in one dimension and the other in the second."""
    rows = text_rows(config, count)
    said = [
        {"long": 1 if len(r["chosen"]) > len(r["rejected"]) else -1, "short": None if i % 2 else 1}
        for i, r in enumerate(rows)
    ]
    return Dataset.from_list([{**row, "preferences": found} for row, found in zip(rows, said, strict=True)])


@pytest.mark.parametrize("parametrization", ["full", "lora"])
def test_a_model_of_several_dimensions_learns_them_and_gives_their_mean(
    parametrization: str, words: str, tmp_path: Path
) -> None:
    keys = {"method": "mr_rml", "dimensions": ["long", "short"], "projection_dim": 8, "max_steps": 24}
    config = config_of("reward", words, tmp_path, parametrization=parametrization, learning_rate=1.0e-2, **keys)
    rows = judged_rows(config, 16)
    trainer = build(config, rows)
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert set(trainer.state.log_history[0]) >= {"loss/rank", "loss/axis", "loss/perp", *trainer.method.metrics}
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    assert trainer.item_counts(batch)["label"] == 16 + 8
    trained = rewards_of(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    if parametrization == "lora":
        entry = {"value": ["long", "short"], "source": "run.yaml:1"}
        (tmp_path / "saved" / "run.json").write_text(json.dumps({"config": {"dimensions": entry}}))
    loaded = load_reward_model(str(tmp_path / "saved"), base=words if parametrization == "lora" else None)
    assert loaded.dimensions == ("long", "short")
    found = loaded.score([(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows])
    # Without the prompt to measure from, every reward of a row is off by the same number.
    gaps = [(one - other, a - b) for (one, other), (a, b) in zip(trained, found, strict=True)]
    assert [gap for gap, _ in gaps] == pytest.approx([gap for _, gap in gaps], abs=1e-5)


def test_what_is_wrong_with_dimensions_is_told(words: str, tmp_path: Path) -> None:
    keys = {"method": "mr_rml", "dimensions": ["long", "short"]}
    config = config_of("reward", words, tmp_path, **keys)
    with pytest.raises(DataError, match="column 'preferences' is missing"):
        build(config, text_rows(config, 4))
    wrong = judged_rows(config, 4).map(
        lambda row, i: {"preferences": {"long": 2 if i == 1 else 1, "short": 0}}, with_indices=True
    )
    with pytest.raises(DataError, match=r"other than 1 \(chosen is better\)(.|\n)*row 1: long: 2"):
        build(config, wrong)
    with pytest.raises(ConfigError, match="a dimension is named twice"):
        config_of("reward", words, tmp_path, method="mr_rml", dimensions=["a", "a"])
    with pytest.raises(DataError, match="margin is not a number"):
        plain = config_of("reward", words, tmp_path)
        build(plain, text_rows(plain, 4).add_column("margin", [0.5, None, 1.0, 0.0]))


def solutions(count: int) -> Dataset:
    """Sums of words, of which a step with the word w7 is wrong."""
    draw = random.Random(0)

    def row() -> dict[str, Any]:
        steps = [
            " ".join(f"w{draw.randrange(9)}" for _ in range(draw.randint(1, 3))) for _ in range(draw.randint(1, 4))
        ]
        return {"prompt": "w60 w59 ", "completions": steps, "labels": ["w7" not in step for step in steps]}

    return Dataset.from_list([row() for _ in range(count)])


def test_every_step_of_a_solution_is_judged_at_its_end(words: str, tmp_path: Path) -> None:
    config = config_of("reward", words, tmp_path, method="process_reward", learning_rate=1.0e-2, max_steps=40)
    rows = solutions(16)
    trainer = build(config, rows)
    tokenizer = trainer.processing_class
    for row, converted in zip(rows, trainer.train_dataset, strict=True):
        labels = [label for label in converted["labels"] if label >= 0]
        assert labels == [int(label) for label in row["labels"]]
        ends = [t for t, label in enumerate(converted["labels"]) if label >= 0]
        text = " ".join(row["completions"])
        assert [tokenizer.decode([converted["input_ids"][t]]) for t in ends] == [
            s.split()[-1] for s in row["completions"]
        ]
        assert tokenizer.decode(converted["input_ids"][2 : ends[-1] + 1]) == text
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert set(logs[0]) >= {"loss/steps", *trainer.method.metrics}
    assert sum(e["loss"] for e in logs[-4:]) < 0.7 * sum(e["loss"] for e in logs[:4])
    trained = rewards_of(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = load_reward_model(str(tmp_path / "saved"), base=words)
    prefixes = [
        converted["input_ids"][: t + 1]
        for converted in trainer.train_dataset
        for t, label in enumerate(converted["labels"])
        if label >= 0
    ]
    steps = [reward for row, given in zip(rows, trained, strict=True) for reward in given[: len(row["labels"])]]
    assert loaded.score_ids(prefixes) == pytest.approx(steps, abs=1e-5)
    found = loaded.score_steps([(row["prompt"], row["completions"]) for row in rows])
    assert [len(own) for own in found] == [len(row["labels"]) for row in rows]
    assert sum(found, []) == pytest.approx(steps, abs=1e-5)


def test_steps_with_a_chat_template_and_what_is_wrong_with_rows(words: str, tmp_path: Path) -> None:
    config = config_of("reward", words, tmp_path, method="process_reward", train_on_last_step_only=True)
    tokenizer = AutoTokenizer.from_pretrained(words)
    turns = "{% for m in messages %}w1 {{ m.content | trim }} <eos> {% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}w1 {% endif %}"
    prompt = [{"role": "user", "content": "w60"}]
    rows = Dataset.from_list([{"prompt": prompt, "completions": ["w2 w3", "w4"], "labels": [1, 0]}])
    (converted,) = build(config, rows, tokenizer=tokenizer).train_dataset
    at = converted["labels"].index(0)
    assert (
        tokenizer.decode([converted["input_ids"][at]]) == "w4"
        and converted["labels"].count(-100) == len(converted["labels"]) - 1
    )
    for broken, told in (
        ({"labels": [1]}, "no list of one label a step"),
        ({"labels": [1, 5]}, "a label is neither true nor false"),
        ({"completions": ["w2", " "]}, "a step is empty"),
    ):
        row = {"prompt": "w60", "completions": ["w2", "w4"], "labels": [1, 0], **broken}
        with pytest.raises(DataError, match=told):
            build(config, Dataset.from_list([row]))


def test_a_saved_adapter_goes_on_with_its_head_and_one_of_a_language_model_is_refused(
    words: str, tmp_path: Path
) -> None:
    keys = {"learning_rate": 1.0e-2, "max_steps": 2}
    config = config_of("reward", words, tmp_path, **keys)
    trainer = build(config, text_rows(config, 8))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    going_on = build(
        config_of("reward", words, tmp_path, **keys, adapter=str(tmp_path / "saved")), text_rows(config, 8)
    )
    assert rewards_of(going_on) == rewards_of(trainer)
    going_on.train()
    assert rewards_of(going_on) != rewards_of(trainer)
    preferred = config_of("preference", words, tmp_path, method="dpo", **keys)
    build(preferred, text_rows(preferred, 8)).save_model(str(tmp_path / "of_language"))
    with pytest.raises(ModelError, match="brings no head of rewards"):
        load_policy(config_of("reward", words, tmp_path, **keys, adapter=str(tmp_path / "of_language")))


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_the_tokens_are_those_of_trl(kind: str, words: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(words)
    turns = "{% for m in messages %}{{ 'w1 ' if m.role == 'user' else 'w2 ' }}{{ m.content }} <eos> {% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}w2 {% endif %}"
    config = config_of("reward", words, tmp_path)
    rows = text_rows(config, 6)
    if kind == "messages":
        said = lambda role, text: [{"role": role, "content": text.strip()}]  # noqa: E731
        rows = Dataset.from_list(
            [
                {
                    "prompt": said("user", row["prompt"]),
                    "chosen": said("assistant", row["chosen"]),
                    "rejected": said("assistant", row["rejected"]),
                }
                for row in rows
            ]
        )
    theirs = RewardTrainer(
        model_of(words),
        args=RewardConfig(str(tmp_path / "theirs"), **SHORT_RUN),
        train_dataset=rows,
        processing_class=tokenizer,
    ).train_dataset
    ours = build(config, rows, tokenizer=tokenizer).train_dataset
    for one, other in zip(ours, theirs, strict=True):
        sequences = [one["prompt_ids"] + completion for completion in one["completion_ids"]]
        assert sequences == [other["chosen_ids"], other["rejected_ids"]]


def test_methods_of_reward_models_add_up(words: str, tmp_path: Path) -> None:
    method = {"bradley_terry": 1.0, "plackett_luce": 0.5}
    trainer = build(config := config_of("reward", words, tmp_path, method=method, max_steps=1), text_rows(config, 4))
    trainer.train()
    (logs, *_) = trainer.state.log_history
    terms = [value for key, value in logs.items() if key.startswith("loss/")]
    assert len(terms) == 2 and terms[0] == pytest.approx(terms[1], rel=1e-5)  # of pairs the two are one
    assert logs["loss"] == pytest.approx(1.5 * terms[0], rel=1e-4)
    with pytest.raises(ConfigError, match="parametrization"):
        config_of("reward", words, tmp_path, method=method, parametrization="peft", peft_type="ia3")
