"""Self-samples drawn anew while training: by the policy of the moment, against the frozen reference, resumable."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel, TrainerCallback

from alignkit.data.candidates import to_candidate_rows
from alignkit.data.tokenization import CANDIDATE_FEATURES
from alignkit.errors import CheckpointError, ConfigError
from alignkit.objectives.d2o import METHOD, D2OOptions
from alignkit.runs.python import train_preference
from alignkit.sampling.candidates import SampleSettings
from alignkit.sampling.refresh import ROWS_FILE, SampleRefresh
from alignkit.sampling.resampling import Resampled, Resampler
from alignkit.sampling.store import RowSamples
from alignkit.shapes._candidates import BridgeSettings, LateRowsTrainer, PreferenceTrainer
from alignkit.shapes.candidates import PreferenceConfig
from alignkit.storage.durability import is_complete
from tests.list_oracles import Candidate, d2o
from tests.runs.saved import guarded
from tests.scripts.tiny import byte_tokenizer, save_model, tiny_model, write_rows
from tests.trainers import dpo_arguments, flat_weights, logged

TOKENIZER = byte_tokenizer()
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
GREEDY = SampleSettings(num_samples=1, max_new_tokens=5, temperature=0.0)
DRAWN = SampleSettings(num_samples=2, max_new_tokens=6, seed=7)
MAX_LENGTH = 40
OPTIONS = D2OOptions(alpha=0.1, beta=0.3)
NEGATIVES = ["no", "never mind", "go away", "bad", "why me", "stop it"]


def candidate_lists() -> Dataset:
    """Six lists to train on, the third prompt of seven being too long; the negative need not be the last."""
    prompts = ["Say a.", "Tell me more.", "x" * MAX_LENGTH, "Hi", "What is 2 + 2?", "Count: 1, 2", "Bye now"]
    negatives = [*NEGATIVES[:2], "dropped", *NEGATIVES[2:]]
    lists = [
        {"prompt": p, "completions": [f"old {i}", n, f"older {i}"], "scores": [1.0, 0.0, 1.0]}
        for i, (p, n) in enumerate(zip(prompts, negatives, strict=True))
    ]
    return Dataset.from_list(lists)


def converted(lists: Dataset) -> Dataset:
    rows, _ = to_candidate_rows(lists, TOKENIZER, max_length=MAX_LENGTH, num_candidates=None, max_dropped_fraction=0.5)
    return rows


def make(
    path: Path,
    *,
    steps: int = 2,
    settings: SampleSettings = DRAWN,
    lists: Dataset | None = None,
    lora: bool = False,
    layout: str = "padded",
    kind: type[PreferenceTrainer] = LateRowsTrainer,
    before: Sequence[Callable[[Any], TrainerCallback]] = (),
    **arguments: Any,
) -> Any:
    """A trainer whose samples are drawn anew every ``steps`` steps."""
    lists = candidate_lists() if lists is None else lists
    arguments = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "disable_dropout": False} | arguments
    trainer = kind(
        tiny_model(seed=3),
        dpo_arguments(path, **arguments),
        method=METHOD,
        options=OPTIONS,
        settings=BridgeSettings(layout=layout),
        train_dataset=converted(lists),
        processing_class=TOKENIZER,
        ref_model=None if lora else tiny_model(seed=3),
        peft_config=LORA if lora else None,
    )
    for callback in before:
        trainer.add_callback(callback(trainer))
    if issubclass(kind, LateRowsTrainer):
        resampler = Resampler.of_lists(lists, TOKENIZER, settings, MAX_LENGTH)
        refresh = SampleRefresh(trainer, resampler, steps)
        trainer.add_callback(refresh)
        trainer.persistent.append(refresh)
    return guarded(trainer)


class Watch(TrainerCallback):
    """Keeps the policy's weights after a step; told of it before the samples are drawn."""

    def __init__(self, trainer: Any, step: int) -> None:
        self.trainer, self.step = trainer, step

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if state.global_step == self.step:
            self.weights = {name: tensor.clone() for name, tensor in self.trainer.model.state_dict().items()}

    def policy(self) -> PreTrainedModel:
        """A model of its own with these weights."""
        lora = any("lora_" in name for name in self.weights)
        model = get_peft_model(tiny_model(seed=3), LORA) if lora else tiny_model(seed=3)
        model.load_state_dict(self.weights)
        return (model.merge_and_unload() if lora else model).eval()


def texts(rows: Dataset) -> list[list[str]]:
    return [[TOKENIZER.decode(ids, skip_special_tokens=True) for ids in row] for row in rows["completion_ids"]]


def greedy(model: PreTrainedModel, prompt: str) -> str:
    """The likeliest continuation, without ``generate``, cache or batch."""
    start = TOKENIZER(prompt)["input_ids"]
    ids = list(start)
    while len(ids) < len(start) + GREEDY.max_new_tokens:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == TOKENIZER.eos_token_id:
            break
    return TOKENIZER.decode(ids, skip_special_tokens=True)[len(prompt) :]


def logps(model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(-1)
    return [float(logits[len(prompt) + t - 1, token]) for t, token in enumerate(completion)]


@pytest.mark.parametrize(("lora", "layout"), [(False, "padded"), (True, "packed")], ids=["full", "lora"])
def test_samples_come_from_the_policy_and_are_scored_by_the_frozen_reference(
    tmp_path: Path, lora: bool, layout: str
) -> None:
    """Greedy answers and losses by hand, from a copy of the policy and from a second starting model."""
    watches: list[Watch] = []
    watch = [lambda trainer: watches.append(Watch(trainer, 2)) or watches[0]]
    options = {"lora": lora, "layout": layout, "disable_dropout": True, "per_device_train_batch_size": 6}
    trainer = make(tmp_path, settings=GREEDY, before=watch, max_steps=3, learning_rate=0.05, **options)
    trainer.train()
    policy, start = watches[0].policy(), tiny_model(seed=3)
    prompts = [row["prompt"] for row in candidate_lists() if row["prompt"][0] != "x"]
    by_policy, by_start = ([greedy(model, prompt) for prompt in prompts] for model in (policy, start))
    assert by_policy != by_start
    assert texts(trainer.train_dataset) == [[a, n] for a, n in zip(by_policy, NEGATIVES, strict=True)]
    expected = []
    for row in trainer.train_dataset:
        scored = [
            Candidate(logps(policy, row["prompt_ids"], ids), logps(start, row["prompt_ids"], ids), score)
            for ids, score in zip(row["completion_ids"], row["scores"], strict=True)
        ]
        expected.append(d2o(scored, OPTIONS.alpha, OPTIONS.beta))
    found = logged(trainer, "loss")
    assert found[2] == pytest.approx(sum(expected) / 6, abs=2e-5) and abs(found[2] - found[1]) > 1e-3


def test_until_the_first_refresh_nothing_is_different(tmp_path: Path) -> None:
    """Row numbers in the dataloader: the same rows in the same order, bit for bit."""
    options = {"lora": True, "max_steps": 5, "gradient_accumulation_steps": 2}
    plain = make(tmp_path / "plain", kind=PreferenceTrainer, **options)
    plain.train()
    late = make(tmp_path / "late", steps=100, **options)
    late.train()
    assert logged(late, "loss") == logged(plain, "loss") and len(set(logged(late, "loss"))) == 5
    assert torch.equal(flat_weights(late.model), flat_weights(plain.model))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_resumed_equals_uninterrupted(tmp_path: Path, lora: bool) -> None:
    """Refreshes after steps 2, 4 and 6 of seven; resumed at a refresh, at the end of an epoch and between."""
    options = {"lora": lora, "max_steps": 7, "save_strategy": "steps", "save_steps": 1}
    whole = make(tmp_path / "whole", **options)
    whole.train()
    assert whole.train_dataset[:] != converted(candidate_lists())[:]
    for step in (2, 3, 5):
        resumed = make(tmp_path / f"resumed{step}", **options | {"save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.train_dataset[:] == whole.train_dataset[:]
        assert logged(resumed, "loss") == logged(whole, "loss")
        assert torch.equal(flat_weights(resumed.model), flat_weights(whole.model))


def test_every_checkpoint_holds_its_rows(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer = make(tmp_path, **options)
    trainer.train()
    rows = [Dataset.from_parquet(str(tmp_path / f"checkpoint-{step}" / ROWS_FILE))[:] for step in (1, 2, 3, 4)]
    assert rows[0] == converted(candidate_lists())[:] and rows[1] == rows[2] == rows[3] == trainer.train_dataset[:]
    assert rows[0] != rows[1] and is_complete(tmp_path / "checkpoint-2")
    assert ROWS_FILE in (tmp_path / "checkpoint-2" / "complete.json").read_text(), "written before it was complete"
    short = make(tmp_path / "short", lists=candidate_lists().select(range(4)), **options)
    with pytest.raises(CheckpointError, match="holds 6 rows, the data 3"):
        short.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-2" / ROWS_FILE).unlink()
    with pytest.raises(CheckpointError, match="was written with sample_refresh_steps: 0"):
        make(tmp_path / "other", **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_workers_of_the_dataloader_hold_no_old_rows(tmp_path: Path) -> None:
    runs = [make(tmp_path / f"{n}", steps=1, max_steps=4, dataloader_num_workers=n) for n in (0, 1)]
    for trainer in runs:
        trainer.train()
    assert logged(runs[1], "loss") == logged(runs[0], "loss")


def random_states() -> tuple[Any, ...]:
    numpy: Any = np.random.get_state()
    return random.getstate(), numpy[1].tolist(), numpy[2], torch.random.get_rng_state().tolist()


def test_nothing_else_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random states, modes, gradients and weights; draws differ from step to step and are repeatable."""
    trainer = make(tmp_path, lora=True, max_steps=3)
    trainer.train()
    printed = capsys.readouterr().out
    assert printed.count("sample_refresh_steps 2: every 2 steps") == printed.count("gradient of their term is 0") == 1
    (refresh,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, SampleRefresh)]
    trainer.model.train()
    states, weights = random_states(), flat_weights(trainer.model)
    modes = [module.training for module in trainer.model.modules()]
    drawn = []
    for step in (2, 4, 2):
        trainer.state.global_step, trainer.state.max_steps = step, 10
        refresh.on_step_end(trainer.args, trainer.state, trainer.control)
        drawn.append(texts(trainer.train_dataset))
    assert drawn[0] == drawn[2] != drawn[1]
    assert random_states() == states and torch.equal(flat_weights(trainer.model), weights)
    assert [module.training for module in trainer.model.modules()] == modes
    assert [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"step {step}: 12 samples for 6 of 6 rows drawn anew from the policy" for step in (2, 4, 2)
    ]


def test_a_row_without_new_samples_keeps_its_old_ones(tmp_path: Path) -> None:
    """One answer equals the negative, and one prompt leaves no room for an answer."""
    lists = candidate_lists().to_list()
    lists[3]["completions"][1] = greedy(tiny_model(seed=3), lists[3]["prompt"])
    trainer = make(tmp_path, lists=Dataset.from_list(lists), settings=GREEDY, max_steps=1)
    before = trainer.train_dataset[:]
    resampler = Resampler.of_lists(Dataset.from_list(lists), TOKENIZER, GREEDY, MAX_LENGTH)
    longest = SampleSettings(**{**vars(GREEDY), "max_prompt_length": len("What is 2 + 2?") - 1})
    for chosen, kept in ((GREEDY, {2}), (longest, {2, 3})):
        result = Resampler(resampler.prompts, TOKENIZER, chosen, MAX_LENGTH)(
            trainer.model, trainer.train_dataset, step=1
        )
        same = {i for i in range(6) if result.rows[i]["completion_ids"] == before["completion_ids"][i]}
        assert (same, result.num_renewed, result.num_samples, len(result.rows)) == (
            kept,
            6 - len(kept),
            6 - len(kept),
            6,
        )


def long_lists() -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"Say {i}.", "completions": ["yes" * 100, "no"], "scores": [1.0, 0.0]} for i in range(512)]
    )


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory that Python objects took at once; tables are not among them."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_python_objects_are_made_of_one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of 512 rows are renewed, thrice; as objects, the ids of all took 58 bytes a token. One table is held."""
    monkeypatch.setattr("alignkit.sampling.resampling.BATCH_ROWS", 16)
    texts = {3: ["fresh", "samples"], 400: ["others"], 401: ["no"]}
    records = [RowSamples(row, texts=texts[row]) for row in (401, 400, 3)]
    monkeypatch.setattr("alignkit.sampling.resampling.sample_candidates", lambda *args, **options: records)
    lists = long_lists()
    resampler = Resampler.of_lists(lists, TOKENIZER, DRAWN, None)
    ids = np.random.default_rng(0).integers(300, 100_000, size=(512, 4, 128)).tolist()
    before = Dataset.from_dict(
        {"prompt_ids": [[1, 2]] * 512, "completion_ids": ids, "scores": [[1.0, 0.5, 0.5, 0.0]] * 512},
        features=CANDIDATE_FEATURES,
    )
    backwards = before.select(range(511, -1, -1))
    model, results = tiny_model(), [Resampled(backwards, 0, 0)]

    def refresh() -> None:
        results[:] = [resampler(model, results[0].rows, step=1)]

    refresh()
    size, held = results[0].rows.data.nbytes, pa.total_allocated_bytes()
    assert peak_bytes(refresh) < 10 * 512 * 4 * 128
    refresh()
    assert pa.total_allocated_bytes() - held < size // 10
    (result,) = results
    assert (result.num_renewed, result.num_samples) == (2, 3) and result.rows.features == CANDIDATE_FEATURES
    expected = backwards.to_list()
    for row in (3, 400):
        expected[row] = converted_list(lists[row]["prompt"], texts[row])
    assert result.rows.to_list() == expected


def converted_list(prompt: str, samples: Sequence[str]) -> dict[str, Any]:
    """The candidate row of samples against the negative ``no``."""
    ends = [[*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id] for text in (*samples, "no")]
    scores = [1.0] * len(samples) + [0.0]
    return {"prompt_ids": TOKENIZER(prompt)["input_ids"], "completion_ids": ends, "scores": scores}


def test_lists_are_tokenised_one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of what is left are the rows of text to sample for; with the ids of all it was 17 bytes a token."""
    lists = long_lists()
    monkeypatch.setattr("alignkit.sampling.resampling.BATCH_ROWS", 16)
    assert peak_bytes(lambda: Resampler.of_lists(lists, TOKENIZER, DRAWN, None)) < 10 * 512 * 300


def conversations() -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": f"What is {i}?"}], "rejected": f"No {i}."} for i in range(10)]


@pytest.fixture
def config(tmp_path: Path) -> Mapping[str, Any]:
    save_model(tmp_path / "model", seed=3)
    write_rows(tmp_path / "rows.jsonl", conversations())
    return {
        "model": str(tmp_path / "model"),
        "data": str(tmp_path / "rows.jsonl"),
        "method": "d2o",
        "use_cpu": True,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "eval_fraction": 0.2,
        "parametrization": "full",
        "num_samples": 0,
    }


def run(config: Mapping[str, Any], output_dir: Path, **options: Any) -> Any:
    sampling = {"num_samples_per_prompt": 2, "sampling_max_new_tokens": 6, "sampling_instruction": "Be brief."}
    options = D2OOptions(**sampling, **options)
    return train_preference(PreferenceConfig(**config, output_dir=str(output_dir), method_options=options)).trainer


def test_the_program_refreshes_training_rows_alone(
    config: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = run({**config, "reference": "copy"}, tmp_path / "frozen")  # as where rows change, not scored ahead
    assert type(frozen) is PreferenceTrainer and "warning: sample_refresh" not in capsys.readouterr().out
    assert not any(isinstance(c, SampleRefresh) for c in frozen.callback_handler.callbacks)
    trainer = run(config, tmp_path / "run", sample_refresh_steps=2)
    printed = capsys.readouterr().out
    assert "step 2: 16 samples for 8 of 8 rows drawn anew from the policy" in printed and "step 4:" not in printed
    assert printed.index("warning: sample_refresh_steps 2") < printed.index("step 2:")
    assert trainer.eval_dataset[:] == frozen.eval_dataset[:]
    assert trainer.train_dataset["prompt_ids"][:] == frozen.train_dataset["prompt_ids"][:]
    answers, before = texts(trainer.train_dataset), texts(frozen.train_dataset)
    assert [row[-1] for row in answers] == [row[-1] for row in before]
    assert all(new[:2] != old[:2] for new, old in zip(answers, before, strict=True))
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert is_complete(checkpoint) and Dataset.from_parquet(str(checkpoint / ROWS_FILE))[:] == trainer.train_dataset[:]
    losses = logged(frozen, "loss"), logged(trainer, "loss")
    assert losses[0][:2] == losses[1][:2] and losses[0][2] != losses[1][2]


def test_the_program_resumes_bit_for_bit(config: Mapping[str, Any], tmp_path: Path) -> None:
    whole = run(config, tmp_path / "run", sample_refresh_steps=2)
    final = load_file(tmp_path / "run" / "model.safetensors")
    for path in (tmp_path / "run" / "checkpoint-4").iterdir():
        path.unlink()
    (tmp_path / "run" / "checkpoint-4").rmdir()
    resumed = run({**config, "resume": True}, tmp_path / "run", sample_refresh_steps=2)
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert resumed.train_dataset[:] == whole.train_dataset[:] and final.keys() == again.keys()
    assert all(torch.equal(final[name], again[name]) for name in final)


@pytest.mark.parametrize("name", ["is_deepspeed_zero3_enabled", "launched_with_fsdp"])
def test_a_sharded_policy_is_refused_before_anything_is_loaded(
    config: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(f"alignkit.objectives._d2o.{name}", lambda: True)
    with pytest.raises(
        ConfigError, match=r"`sample_refresh_steps: 5`.*Write sample_refresh_steps: 0, or launch with DDP"
    ):
        run({**config, "model": str(tmp_path / "model")}, tmp_path / "run", sample_refresh_steps=5)
