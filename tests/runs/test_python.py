"""Runs from Python: keywords, what is in memory, and the object that is trained and looked at."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    TrainerCallback,
)

from alignkit import Run, load_config, prepare, train_online, train_preference, train_sft
from alignkit.errors import ConfigError, DataError, ModelError, RunDirectoryError, Stopped
from alignkit.runs.directory import RunDirectory
from alignkit.runs.in_memory import kept_inputs
from alignkit.runs.live_plot import is_notebook
from alignkit.runs.results import figure_of
from alignkit.runs.resumption import how_to_go_on
from tests.scripts.tiny import byte_tokenizer, save_model, tiny_model

PAIRS = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No."} for i in range(8)]
QUICK = {"use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "num_samples": 0}
DPO = {**QUICK, "method": "dpo", "learning_rate": 1e-2}
FULL = {"parametrization": "full"}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def draws() -> None:
    """Asked for by a test whose run draws its figure."""


@pytest.fixture(autouse=True)
def no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than these runs, and are drawn where they are looked at."""
    if "draws" not in request.fixturenames:
        monkeypatch.setattr("alignkit.runs.results.plot_run", lambda log, path, **how: path.touch())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(seed=3)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", seed=3)


# --- in memory is as from files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def from_files(tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("files")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    words = {**DPO, **FULL, "beta": 0.2, "model": save_model(place / "model", seed=3), "data": place / "rows.jsonl"}
    words["output_dir"] = place / "run"
    return train_preference(load_config("preference", None, [f"--{key}={value}" for key, value in words.items()]))


@pytest.mark.parametrize("kind", ["list", "table"])
def test_what_is_in_memory_trains_as_from_files(
    kind: str, from_files: Run, model: PreTrainedModel, tmp_path: Path
) -> None:
    """To the bit; and what was handed over is left as it was."""
    before = weights(model)
    rows: Any = PAIRS if kind == "list" else Dataset.from_list(PAIRS)
    call = {**DPO, **FULL, "model": model, "tokenizer": byte_tokenizer(), "data": rows, "beta": 0.2}
    call["output_dir"] = tmp_path / "m"
    run = train_preference(**call) if kind == "list" else prepare(**call).train()
    assert same(weights(run.model), weights(from_files.model)) and not same(weights(run.model), before)
    assert same(weights(model), before)
    assert run.sources["model"] == run.sources["data"] == "keyword, in memory"
    assert run.sources["beta"] == "keyword" and run.sources["seed"] == "default"
    recorded = json.loads((run.directory / "run.json").read_text())
    assert recorded["origin"]["base"] == json.loads((from_files.directory / "run.json").read_text())["origin"]["base"]
    assert recorded["config"]["beta"] == {"value": 0.2, "source": "keyword"}
    assert "tokenizer" not in {key for key, source in run.sources.items() if source != "default"}


def test_a_run_in_memory_is_resumed_with_the_same_and_refuses_another(
    model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {**DPO, "data": PAIRS, "tokenizer": byte_tokenizer(), "output_dir": tmp_path / "run"}
    whole = train_preference(
        model=model, **{**call, "output_dir": tmp_path / "whole"}, save_steps=1, save_total_limit=2
    )
    train_preference(model=model, **{**call, "max_steps": 1}, save_steps=1, save_total_limit=2)
    resumed = train_preference(model=model, **call, save_steps=1, save_total_limit=2, resume=True)
    assert [line["loss"] for line in resumed.metrics if "loss" in line] == [
        line["loss"] for line in whole.metrics if "loss" in line
    ]
    assert resumed.best_checkpoint == tmp_path / "run" / "checkpoint-2"
    with pytest.raises(RunDirectoryError, match="cannot be resumed with other settings.*\n.*data: "):
        train_preference(model=model, **{**call, "data": PAIRS[1:]}, save_steps=1, save_total_limit=2, resume=True)
    with pytest.raises(RunDirectoryError, match="cannot be resumed with other settings.*\n.*model: "):
        train_preference(model=tiny_model(seed=4), **call, save_steps=1, save_total_limit=2, resume=True)


# --- what is kept, and where -----------------------------------------------------------------------------------------


def inputs(tmp_path: Path) -> set[str]:
    folder = tmp_path / "alignkit_cache" / "inputs"
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def test_the_same_is_kept_once(model: PreTrainedModel, tmp_path: Path) -> None:
    given = {"model": model, "tokenizer": byte_tokenizer(), "data": PAIRS, "eval_data": Dataset.from_list(PAIRS)}
    kept, objects = kept_inputs({**given, "beta": 0.1})
    assert objects == {"model", "data", "eval_data"} and "tokenizer" not in kept and kept["beta"] == 0.1
    names = {Path(kept[key]).name for key in objects}
    assert inputs(tmp_path) == names
    again, _ = kept_inputs({**given, "model": tiny_model(seed=3), "data": [dict(row) for row in PAIRS]})
    assert {again[key] for key in objects} == {kept[key] for key in objects} and inputs(tmp_path) == names
    other, _ = kept_inputs({"data": [*PAIRS[1:], PAIRS[0]]})
    assert other["data"] != kept["data"]
    assert same(weights(AutoModelForCausalLM.from_pretrained(kept["model"])), weights(model))


def test_a_model_that_is_still_what_it_was_loaded_from_is_not_written(saved: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    kept, _ = kept_inputs({"model": loaded, "tokenizer": byte_tokenizer()})
    assert kept == {"model": str(saved)} and inputs(tmp_path) == set()
    other = byte_tokenizer()
    other.chat_template = other.chat_template.replace("<|user|>", "<|user|> ")
    kept, _ = kept_inputs({"model": loaded, "tokenizer": other})
    assert kept["model"] == str(saved) and Path(kept["tokenizer"]).name in inputs(tmp_path)


@pytest.mark.parametrize("what", ["weight", "rope_theta", "stop"])
def test_a_model_that_was_changed_is_written(what: str, saved: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    if what == "weight":
        with torch.no_grad():
            loaded.model.norm.weight[0] += 1e-3
    elif what == "stop":
        loaded.generation_config.eos_token_id = [1, 2]
    else:
        loaded.config.rms_norm_eps *= 2
    kept, _ = kept_inputs({"model": loaded})
    assert kept["model"] != str(saved) and Path(kept["model"]).name in inputs(tmp_path)
    assert (Path(kept["model"]) / "tokenizer.json").is_file()  # that of the name it was loaded under


def test_sources_of_a_mixture_may_be_in_memory(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "more.jsonl"
    file.write_text(json.dumps(PAIRS[0]) + "\n")
    mixture = [
        {"path": PAIRS, "weight": 2},
        {"path": Dataset.from_list(PAIRS), "weight": 1},
        {"path": file, "weight": 1},
    ]
    kept, _ = kept_inputs({"data": mixture})
    assert [source["weight"] for source in kept["data"]] == [2, 1, 1]
    assert [Path(source["path"]).suffix for source in kept["data"]] == [".jsonl", ".parquet", ".jsonl"]
    with prepared(saved, tmp_path, data=mixture) as run:
        assert len(run.trainer.train_dataset) == 4  # until the file is used up


# --- refused, before anything is written -----------------------------------------------------------------------------


def adapted() -> PeftModel:
    return get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "range": ({"learning_rate": -1.0}, r"keyword: `learning_rate: -1.0` is out of range"),
    "unknown key": ({"betta": 0.1}, r"keyword: `betta: 0.1` is not a known key. Did you mean beta"),
    "their key": ({"num_epochs": 1}, r"keyword: `num_epochs: 1` is not a key of alignkit. Write num_train_epochs"),
    "arguments of TRL": (
        {"args": object(), "peft_config": LoraConfig(), "train_dataset": Dataset.from_list(PAIRS)},
        r"(?s)3 problems.*each of its values is a key of its own.*Write parametrization: lora.*Write data\.",
    ),
    "type": ({"data": 3}, r"`data`: is a int. Write a path or Hub id, a datasets.Dataset"),
    "splits": ({"data": DatasetDict(train=Dataset.from_list(PAIRS))}, r"Write data=dataset\['train'\]"),
    "stream": (
        {"data": Dataset.from_list(PAIRS).to_iterable_dataset()},
        r"is a IterableDataset. Write a path or Hub id",
    ),
    "row": (
        {"data": [*PAIRS, {"prompt": b"x", "chosen": "a", "rejected": "b"}]},
        r"row 8 holds what JSON does not have",
    ),
    "columns": ({"data": [{"question": "a", "answer": "b"}]}, r"column_map: .prompt: question"),
    "adapter": ({"model": adapted().get_base_model()}, r"`model`: carries an adapter. Save that"),
    "PEFT": ({"model": adapted()}, r"keyword: `model: PeftModel"),
    "no tokenizer": ({"model": tiny_model()}, r"`model`: has no tokenizer. Write tokenizer="),
    "no model": ({"model": "no/where/model"}, r"keyword: `model: no/where/model` is a path that does not exist"),
    "tokenizer": (
        {"tokenizer": "no/where/model"},
        r"keyword: `tokenizer: no/where/model` is a path that does not exist",
    ),
    "another program": ({"method": "sft"}, r"keyword: `method: sft`"),
}


@pytest.mark.parametrize(("wrong", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_work_is_refused(wrong: dict[str, Any], message: str, saved: Path, tmp_path: Path) -> None:
    call = {**DPO, "model": str(saved), "data": PAIRS, "output_dir": tmp_path / "run"}
    with pytest.raises(ConfigError, match=message):
        train_preference(**{**call, **wrong})
    assert not (tmp_path / "run").exists()


def test_everything_wrong_is_said_at_once_and_nothing_is_written(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 problems") as raised:
        train_preference(model=model, data=PAIRS, method="dpo", beta=-1, output_dir=tmp_path / "run", max_steps="many")
    assert "`beta: -1`" in str(raised.value) and inputs(tmp_path) == set()


def test_keywords_beside_a_checked_configuration_are_refused(saved: Path, tmp_path: Path) -> None:
    words = [f"--{key}={value}" for key, value in {**DPO, "model": saved, "data": "org/rows"}.items()]
    loaded = load_config("preference", None, [*words, "--output_dir=x"], check_files=False)
    with pytest.raises(ConfigError, match="`beta` stands beside a configuration that is checked already"):
        train_preference(loaded, beta=0.3)


def test_a_file_and_keywords(saved: Path, tmp_path: Path) -> None:
    """The keywords win; the program is that of the method in the file."""
    (tmp_path / "run.yaml").write_text(f"method: sft\nlearning_rate: 1.0e-3\nmodel: {saved}\n")
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    run = train_sft(tmp_path / "run.yaml", data=rows, output_dir=tmp_path / "run", **{**QUICK, "max_steps": 1})
    assert run.config.learning_rate == 1e-3 and run.sources["learning_rate"].endswith("run.yaml:2")
    assert prepare(tmp_path / "run.yaml", data=rows, output_dir=tmp_path / "p", **QUICK).config.program == "sft"


# --- the object ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def prepared(saved: Path, tmp_path: Path, **keys: Any) -> Iterator[Run]:
    run = prepare(**{**DPO, "model": str(saved), "data": PAIRS, "output_dir": tmp_path / "run", **keys})
    yield run
    run.close()


def test_a_run_step_by_step(draws: None, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = {**DPO, "learning_rate": 0.1, "model": str(saved), "data": PAIRS, "eval_fraction": 0.25}
    run = prepare(**call, output_dir=tmp_path / "run")
    assert run.metrics == [] and run.best_checkpoint is None and "running" in repr(run)
    with pytest.raises(RunDirectoryError, match="has not finished"):
        run.report()
    before = run.evaluate()
    assert run.metrics == [] and run.trainer.state.log_history == []
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)  # nothing has moved
    assert run.train() is run
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    assert len(losses) == 2 and losses[0] == pytest.approx(math.log(2), abs=1e-6)
    after = run.evaluate()
    recorded = json.loads((run.directory / "run.json").read_text())
    assert after == pytest.approx(recorded["results"]) and after["loss"] != before["loss"]
    assert recorded["results_before"]["loss"] == pytest.approx(before["loss"])
    assert run.report() in capsys.readouterr().out and f"run directory: {run.directory}" in run.report()
    assert run.plot()._repr_png_() == (run.directory / "plot.png").read_bytes()
    assert run.best_checkpoint == run.directory / "checkpoint-2"
    with pytest.raises(RunDirectoryError, match="has been trained, or closed"):
        run.train()


@pytest.mark.parametrize("reference", ["adapter_disabled", "precomputed"])
def test_other_rows_are_evaluated_as_those_held_out(reference: str, saved: Path, tmp_path: Path) -> None:
    with prepared(saved, tmp_path, data=PAIRS[4:], eval_data=PAIRS[:4], reference=reference) as run:
        run.train()
        assert run.evaluate(PAIRS[:4]) == run.evaluate() != run.evaluate(Dataset.from_list(PAIRS[4:]))
        for rows in ([{"question": "a", "answer": "b"}], Dataset.from_list([{"question": "a", "answer": "b"}])):
            with pytest.raises(DataError, match="column 'prompt' is missing") as raised:
                run.evaluate(rows)
            assert str(raised.value).startswith("rows in memory: ") and "inputs" not in str(raised.value)


def test_rows_without_a_reference_are_not_evaluated(saved: Path, tmp_path: Path) -> None:
    with prepared(saved, tmp_path, **FULL, reference="precomputed") as run:
        with pytest.raises(ConfigError, match="no rows are held out. Write evaluate.rows."):
            run.evaluate()
        run.train()
        with pytest.raises(ModelError, match="Prepare the run with reference='copy'"):
            run.evaluate(PAIRS[:4])


def test_what_is_saved_is_what_was_trained(saved: Path, tmp_path: Path) -> None:
    with prepared(saved, tmp_path) as run:
        run.train()
        folder = run.save(tmp_path / "saved")
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved), folder)
        assert same(weights(again), weights(run.model))
        assert (folder / "tokenizer.json").is_file()
        with pytest.raises(RunDirectoryError, match="exists, and is not written over"):
            run.save(folder)
    with pytest.raises(RunDirectoryError, match="already holds a run .status: finished.*overwrite: true"):
        prepare(**DPO, model=str(saved), data=PAIRS, output_dir=tmp_path / "run")


def test_the_trained_model_answers_and_so_does_its_base(saved: Path, tmp_path: Path) -> None:
    with prepared(saved, tmp_path, learning_rate=0.1) as run:
        before = run.chat("Hello", max_new_tokens=6)
        assert run.chat("Hello", base=True, max_new_tokens=6) == before  # a new adapter changes nothing
        assert run.chat("More", max_new_tokens=6) and len(run._speakers()["tuned"].messages) == 4
        run.train()
        run.new_chat()
        assert run.chat("Hello", base=True, max_new_tokens=6) == before != run.chat("Hello", max_new_tokens=6)


def test_a_mixture_of_methods_and_a_reward_model(saved: Path, tmp_path: Path) -> None:
    """The method tells the program, however it is written."""
    with prepared(saved, tmp_path, method={"ipo": 1.0, "sft": 0.2}) as run:
        assert run.config.method == "1.0*ipo+0.2*sft" and run.config.program == "preference"
    settings = tiny_model().config
    settings.num_labels = 1
    scores = AutoModelForSequenceClassification.from_config(settings)
    call = {"use_cpu": True, "max_steps": 1, "model": scores, "tokenizer": byte_tokenizer(), "data": PAIRS}
    with contextlib.closing(prepare(**call, method="bradley_terry", output_dir=tmp_path / "reward")) as run:
        assert run.config.program == "reward"
        with pytest.raises(ModelError, match="gives scores and no answers"):
            run.chat("Hello")


LONGEST = 4


def brevity(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion) < LONGEST) for completion in completions]


def test_a_reward_function_in_memory(saved: Path, tmp_path: Path) -> None:
    call = {"use_cpu": True, "max_steps": 1, "method": "grpo", "model": str(saved), "num_samples": 0}
    call |= {"data": [{"prompt": f"Say {i}."} for i in range(4)], "num_generations": 2, "max_completion_length": 4}
    call |= {"per_device_train_batch_size": 2, "logging_steps": 1, "output_dir": tmp_path / "run"}
    run = train_online(**call, rewards=brevity)
    assert any("rewards/brevity/mean" in line for line in run.metrics)
    with pytest.raises(ConfigError, match="`rewards`: only what `def` makes can be written down"):
        train_online(**call, rewards=lambda completions: [0.0])


def test_a_cell_that_prepares_can_be_executed_again(saved: Path, tmp_path: Path) -> None:
    first = prepare(**DPO, model=str(saved), data=PAIRS, output_dir=tmp_path / "run")
    with prepared(saved, tmp_path):
        with pytest.raises(RunDirectoryError, match="has been trained, or closed"):
            first.train()
        del first
        assert (tmp_path / "run" / "run.lock").exists()  # the second's


def test_a_run_that_nobody_holds_any_more_gives_its_directory_back(saved: Path, tmp_path: Path) -> None:
    prepare(**DPO, model=str(saved), data=PAIRS, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "run.lock").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped: not trained"


def test_a_run_that_fails_says_so_and_frees_its_directory(saved: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "p" * 2000, "chosen": "a", "rejected": "b"}] * 4
    with pytest.raises(DataError):
        prepare(**DPO, model=str(saved), data=rows, output_dir=tmp_path / "run", max_length=32)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"].startswith("failed: DataError")
    assert not (tmp_path / "run" / "run.lock").exists()


@pytest.mark.parametrize(
    ("resume", "expected"), [(False, "make the same call with resume=True"), ("auto", "same call goes on")]
)
def test_how_to_go_on_from_python(resume: Any, expected: str, saved: Path, tmp_path: Path) -> None:
    with prepared(saved, tmp_path, save_steps=1) as run:
        run.trainer.add_callback(Interrupted())
        with pytest.raises(Stopped):
            run.train()
    told = how_to_go_on(RunDirectory(tmp_path / "run", is_main=True), None, resume=resume)
    assert expected in told and "checkpoint-1" in told


class Interrupted(TrainerCallback):
    """Ctrl-C in the first step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """As a notebook interrupts its kernel."""
        if state.global_step == 0:
            signal.raise_signal(signal.SIGINT)


# --- the figure in a notebook ----------------------------------------------------------------------------------------


class Display:
    """IPython's display, as far as it is used: what was shown, and what took its place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        self.shown: list[Any] = []
        ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
        ipython.version_info, ipython.display = (9, 0), display
        ipython.get_ipython = lambda: SimpleNamespace(config=config)
        display.display = self._display
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        monkeypatch.setitem(sys.modules, "IPython.display", display)

    def _display(self, value: Any, *, display_id: bool) -> SimpleNamespace:
        assert display_id and not self.shown
        self.shown.append(value)
        return SimpleNamespace(update=self.shown.append)


def test_a_notebook_shows_the_figure_while_it_trains(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = Display(monkeypatch, IPKernelApp={})
    monkeypatch.setattr("alignkit.runs.live_plot.SHARE", 1.0)
    monkeypatch.setattr("alignkit.runs.live_plot.drawn", lambda log, **how: (len(log), sorted(how)))
    with prepared(saved, tmp_path) as run:
        run.train()
    lines, last = [picture.png[0] for picture in notebook.shown], len(run.metrics)
    assert lines == [1, 2, 3, 3] and last == 3  # after every line of the log, and at the end
    assert notebook.shown[-1].png[1] == sorted([*figure_of(run.config), "marks"])


def test_elsewhere_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "IPython" not in sys.modules and not is_notebook()
    Display(monkeypatch, TerminalIPythonApp={})
    assert not is_notebook()
