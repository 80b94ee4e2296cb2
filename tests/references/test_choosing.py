"""Where the log-probs of a reference come from under ``reference: auto``, and that no number depends on it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from alignkit.errors import ModelError
from alignkit.models.choices import PINNED, Choice
from alignkit.parts.method import load_method
from alignkit.references import _cache, choosing
from alignkit.references._reference import Reference
from alignkit.references.choosing import LEAST_GAIN, RunData
from alignkit.runs.python import train_preference
from tests.programs.conftest import pairs, save_model
from tests.shapes.building import build, config_of
from tests.trainers import flat_weights, logged

ROWS = 8
LORA: Mapping[str, Any] = {"parametrization": "lora", "lora_r": 2, "lora_alpha": 4, "lora_target_modules": ["q_proj"]}
FULL: Mapping[str, Any] = {"parametrization": "full"}
# Adam divides a gradient by its own size: where it is almost 0, rounding would decide the step.
TWICE: Mapping[str, Any] = {"max_steps": 2 * ROWS // 4, "adam_epsilon": 1.0e-2, "learning_rate": 1.0e-2}
ONCE: Mapping[str, Any] = {"max_steps": ROWS // 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models with one tokenizer; the kernels of nf4 need a width of 64."""
    folders = [tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("other")]
    save_model(folders[0], hidden=64, intermediate_size=64)
    save_model(folders[1], num_hidden_layers=1)
    return list(map(str, folders))


def lists() -> Dataset:
    """Lists of three and two completions."""
    texts = [[row["chosen"], row["rejected"], row["prompt"]][: 2 + i % 2] for i, row in enumerate(pairs(ROWS))]
    scores = [[2.0, 0.0, 1.0][: len(row)] for row in texts]
    prompts = [row["prompt"] for row in pairs(ROWS)]
    columns = zip(prompts, texts, scores, strict=True)
    return Dataset.from_list([{"prompt": p, "completions": t, "scores": s} for p, t, s in columns])


def trainer_of(model: str, folder: Path, rows: Any = None, held_out: Any = None, **keys: Any) -> Any:
    """A trainer on eight pairs, as a run builds it."""
    folder.mkdir(exist_ok=True)
    usual = {"method": "dpo"} | ({} if held_out is None else {"eval_data": "rows.jsonl"})
    adapter = {} if keys.get("parametrization") == "full" or "adapter" in keys else LORA
    config = config_of("preference", model, folder, **{**usual, **adapter, **keys})
    return build(config, Dataset.from_list(pairs(ROWS)) if rows is None else rows, held_out)


def taken(trainer: Any) -> str:
    choice = trainer.choices["reference"]
    assert trainer.args.precompute_ref_log_probs == (choice.value == "precomputed")
    return choice.value


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Logged values that two runs can share."""
    return [{k: v for k, v in line.items() if "time" not in k and "second" not in k} for line in lines]


# --- no number depends on it ------------------------------------------------------------------------------------------

CASES: Mapping[str, Mapping[str, Any]] = {
    "lists full": {"method": "adpo", "target": "kde", **FULL},
    "lora": {},
    "nf4": {"quantization": "nf4"},
    "treg lora": {"method": "treg"},
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same(case: str, models: list[str], tmp_path: Path) -> None:
    if case == "nf4":
        pytest.importorskip("bitsandbytes")
    keys, live, rows, held_out = {**CASES[case], **TWICE}, "adapter_disabled", None, None
    if case == "lists full":
        rows, held_out, live = lists(), Dataset.from_list(pairs(3, seed=1)), "copy"
        keys |= {"eval_strategy": "steps", "eval_steps": 2}
    runs = {}
    for reference in (live, "auto"):
        trainer = trainer_of(models[0], tmp_path / reference, rows, held_out, reference=reference, **keys)
        assert taken(trainer) == (live if reference == live else "precomputed")
        assert (trainer.ref_model is not None) == (reference == "copy") and trainer.layout.layout == "packed"
        trainer.train()
        runs[reference] = trainer
    theirs, ours = (timeless(runs[name].state.log_history) for name in (live, "auto"))
    evaluations = sum("eval_loss" in line for line in ours)
    assert len(ours) == len(theirs) == TWICE["max_steps"] + evaluations + 1 and evaluations == 2 * (live == "copy")
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, abs=1e-6, rel=1e-5)
    torch.testing.assert_close(flat_weights(runs["auto"].model), flat_weights(runs[live].model), atol=1e-6, rtol=0)
    losses = logged(runs["auto"], "loss")
    assert abs(losses[-1] - losses[0]) > 1e-4, "nothing was trained"


# --- which is taken, and why ------------------------------------------------------------------------------------------


def config(method: str = "dpo", *, options: Mapping[str, Any] | None = None, **keys: Any) -> Any:
    """What the choice reads of a config."""
    usual = {"reference": "auto", "reference_model": None, "adapter": None, "reference_cache": None, "resume": False}
    own = {"method": method, "method_options": load_method(method).options(**options or {}), "parametrization": "lora"}
    return SimpleNamespace(**{**usual, **own, **keys})


def data(epochs: float = 2.0, **changes: Any) -> RunData:
    rows = Dataset.from_list([{"prompt_ids": [2], "completion_ids": [[3], [4]]}] * 4)
    return RunData(
        **{"train": rows, "held_out": (), "epochs": epochs, "evaluations": 0, "exchanges_rows": False, **changes}
    )


def choose(config: Any, data: RunData, before: Choice | None = None) -> Any:
    args = SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False)
    width = SimpleNamespace(hidden_size=8, num_hidden_layers=1, vocab_size=8)
    policy = torch.nn.Linear(8, 8)
    policy.config = SimpleNamespace(get_text_config=lambda: width)  # type: ignore[assignment]
    return choosing.choose_reference(config, args, policy, data, before=before, others=[])


def test_what_pays() -> None:
    assert choose(config(), data()).reason == "2 epochs would score every row 2 times"
    once = choose(config(), data(epochs=1.0))
    assert (once.value, once.reason) == ("adapter_disabled", "every row is scored once, too seldom for a cache to pay")
    assert choose(config(parametrization="full"), data(epochs=1.0)).value == "copy"
    rows = data().train
    # 4 + 2 * 1 rows against 5; and 4 + 3 * 4 against 8.
    assert choose(config(), data(epochs=1.0, evaluations=2, held_out=(rows.select([0]),))).value == "adapter_disabled"
    assert choose(config(), data(epochs=1.0, evaluations=3, held_out=(rows,))) == Choice(
        "reference", "precomputed", "1 epoch and 3 evaluations would score every row 2 times on average"
    )
    assert choose(config(reference="copy"), data()) == Choice("reference", "copy", PINNED)
    assert choose(config("adpo", options={"anchor": "uniform"}), data()) is None, "it is compared with nothing"


def test_what_cannot_be_scored_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(config(), data()).value == "precomputed"
    stream = data().train.to_iterable_dataset()
    for changed, reason in (
        (data(train=stream), "streamed"),
        (data(held_out=(stream,)), "streamed"),
        (data(exchanges_rows=True), "exchanged"),
    ):
        choice = choose(config(), changed)
        assert choice.value == "adapter_disabled" and reason in choice.reason
    assert choose(config(adapter="folder"), data(exchanges_rows=True)).value == "adapter_copy"
    moving = config("adpo", options={"anchor": "ema"})
    assert choose(moving, data()) == Choice("reference", "adapter_copy", "it follows the policy")
    monkeypatch.setattr(choosing, "launched_with_fsdp", lambda: True)
    assert choose(config(parametrization="full"), data()) == Choice(
        "reference", "copy", "FSDP shards the weights that a cache would be keyed by"
    )


def test_a_run_that_is_resumed_goes_on_as_it_began() -> None:
    resumed = config(resume=True)
    began = Choice("reference", "precomputed", "")
    assert choose(resumed, data(epochs=1.0), began) == Choice("reference", "precomputed", "as this run began")
    assert choose(resumed, data(epochs=9.0), Choice("reference", "adapter_disabled", "")).value == "adapter_disabled"
    assert choose(resumed, data(epochs=9.0)).value == "adapter_disabled", "older runs said nothing, and had no cache"


def test_weights_that_take_longer_to_tell_than_rows_to_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "KEY_BYTES_A_SECOND", 72.0)  # 4 bytes of 72 weights: 4 seconds
    choice = choose(config(), data())
    assert choice.value == "adapter_disabled" and "takes 4 s, and it would save about 0 s" in choice.reason
    monkeypatch.setattr(choosing, "FREE_SECONDS", 4.0)
    assert choose(config(), data()).value == "precomputed"


def test_how_often_rows_are_scored() -> None:
    args = SimpleNamespace(
        per_device_train_batch_size=2, world_size=2, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=3.0,
        eval_strategy=SimpleNamespace(value="steps"), eval_steps=2, logging_steps=1,
    )  # fmt: skip
    rows = data().train
    found = RunData.of(args, rows, {"one": rows, "two": rows}, exchanges_rows=False)
    # 12 rows in steps of 8 are two steps, the second of which is evaluated after; and at both ends.
    assert (found.epochs, found.evaluations) == (3.0, 3)
    assert (found.while_training, found.ahead) == (3 * 4 + 3 * 8, 12)
    args.max_steps = 5
    assert RunData.of(args, rows, None, exchanges_rows=False).epochs == 10.0
    assert 1.0 < LEAST_GAIN < 2.0


# --- what is kept on disk is used, and proven -------------------------------------------------------------------------


def test_a_later_run_takes_what_is_on_disk(models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another learning rate, length, method and parametrisation; in another precision nothing is taken."""
    scored: list[int] = []
    score = Reference.score

    def counted(self: Reference, rows: Dataset, *arguments: Any, **named: Any) -> Any:
        scored.append(len(rows))
        return score(self, rows, *arguments, **named)

    monkeypatch.setattr(Reference, "score", counted)

    def choice(**keys: Any) -> tuple[str, list[int]]:
        scored.clear()
        trainer = trainer_of(
            models[1], tmp_path / "a", held_out=Dataset.from_list(pairs(2, seed=1)), **{**ONCE, **keys}
        )
        return taken(trainer), list(scored)

    def files() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in _cache.default_cache_dir().iterdir()}

    assert choice(**TWICE) == ("precomputed", [ROWS, 2])
    kept = files()
    assert choice(learning_rate=0.5, method="flex_dpo", **FULL) == ("precomputed", [_cache.CHECKED_ROWS, 2])
    assert files() == kept
    assert choice(bf16=True) == ("adapter_disabled", [])
    for file in kept:
        file.write_bytes(b"half a file")
    assert choice() == ("adapter_disabled", []), "what cannot be read was never asked for"


def test_an_adapter_that_continues_finds_its_own_scores(models: list[str], tmp_path: Path) -> None:
    """The frozen copy that scores has another name than the adapter whose scores are looked for."""
    base = AutoModelForCausalLM.from_pretrained(models[1], dtype=torch.float32)
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, adapter).save_pretrained(tmp_path / "adapter")
    keys = {"adapter": str(tmp_path / "adapter")}
    assert taken(trainer_of(models[1], tmp_path / "b", **TWICE, **keys)) == "precomputed"
    assert taken(trainer_of(models[1], tmp_path / "b", **ONCE, **keys)) == "precomputed"


# --- memory -----------------------------------------------------------------------------------------------------------


def test_no_second_model_is_loaded_for_rows_scored_ahead(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = choosing.load_model
    monkeypatch.setattr(
        choosing, "load_model", lambda config, path, *rest: loaded.append(path) or load(config, path, *rest)
    )
    trainer_of(models[1], tmp_path / "a", **FULL, **TWICE)
    assert loaded == []
    trainer_of(models[1], tmp_path / "a", **FULL, **TWICE, reference="copy")
    assert loaded == [models[1]]


def test_a_model_of_its_own_is_let_go_once_all_rows_are_scored(models: list[str], tmp_path: Path) -> None:
    seen: list[weakref.ref[torch.nn.Module]] = []
    release = Reference.release

    def watched(self: Reference) -> None:
        assert self.model is not None
        seen.append(weakref.ref(self.model))
        release(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reference, "release", watched)
        trainer = trainer_of(models[0], tmp_path / "a", reference_model=models[1], **TWICE)
    gc.collect()
    assert taken(trainer) == "precomputed" and [model() for model in seen] == [None]
    with pytest.raises(ModelError, match="can score no others. Write reference: copy"):
        trainer.reference.token_logps(trainer.data_collator([trainer.train_dataset[0]]))


def test_every_process_scores_its_share() -> None:
    """Each row by one of three processes, but for the last one, which fills up."""
    shares = []
    for rank in range(3):
        accelerator = SimpleNamespace(num_processes=3, process_index=rank)
        shares.append(Reference._share(SimpleNamespace(host=SimpleNamespace(accelerator=accelerator)), 7))  # type: ignore[arg-type]
    assert shares == [[0, 3, 6], [1, 4, 6], [2, 5, 6]]


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_took_and_takes_it_again_when_resumed(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(
        Dataset.from_list(pairs(ROWS)).to_pandas().to_json(orient="records", lines=True)
    )
    keys = {**LORA, **TWICE, "method": "dpo", "data": str(tmp_path / "rows.jsonl"), "save_strategy": "steps"}
    keys |= {"save_steps": 2, "num_samples": 0, "output_dir": str(tmp_path / "out")}
    (tmp_path / "a").mkdir()
    trainer = train_preference(config_of("preference", models[1], tmp_path / "a", **keys)).trainer
    out = capsys.readouterr().out
    assert ", reference precomputed (2 epochs would score every row 2 times)" in out
    assert f"; reference: log-probs of {models[1]}, precomputed; " in out
    for file in _cache.default_cache_dir().iterdir():
        file.unlink()
    again = train_preference(config_of("preference", models[1], tmp_path / "a", **keys, resume=True)).trainer
    assert ", reference precomputed (as this run began)" in capsys.readouterr().out
    assert again.state.log_history[-2]["loss"] == trainer.state.log_history[-2]["loss"]
