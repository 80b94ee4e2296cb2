"""Checkpoints, caches and records that lie on users' disks: runs cut off under older code are finished by this one.

Floating-point numbers of another machine are compared to 1e-5, and what only has to be carried over bit for bit.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.programs.before_second_storey import FOLDER, KEPT, LAST, RUNS, program_of
from tests.programs.launching import Launcher, read_lines, run_json
from tests.programs.test_resume import CHANGES_WITH_TIME

pytestmark = pytest.mark.xdist_group("programs")

TOLERANCE = 1e-5
CACHES_OF = {
    "treg_lora_precomputed": {"reference", "token_rewards"},
    "d2o_lora_refresh": {"samples"},
}
"""Folders of the cache that a run reads."""

YOUNGER = {
    *("kernels", "tokens_per_batch", "lr_scheduler_kwargs", "run_name", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better", "early_stopping_patience", "early_stopping_threshold"),
    *("neftune_noise_alpha", "optim_args", "train_sampling_strategy", "loraplus_lr_ratio"),
    *("init_lora_weights", "new_tokens", "tokenizer", "layout"),
    *("label_smoothing", "ld_alpha", "use_weighting", "f_divergence_type", "f_alpha_divergence_coef"),
}
"""Keys that there are now, and were not then."""

Finish = Callable[[str], Path]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The model or adapter that a run or a checkpoint holds."""
    (file,) = directory.glob("*model.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def finish(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Finish:
    """Go on with a run in a copy of the folder; the directory of the run."""

    @functools.cache
    def make(name: str) -> Path:
        place = Path(shutil.copytree(FOLDER, tmp_path_factory.mktemp("before") / "place"))
        ended = launcher.run(
            *("--config", f"{name}.yaml", "--resume"),
            directory=place,
            environment={"ALIGNKIT_CACHE": str(place / "cache")},
            **program_of(name),
        )
        assert ended.exit_code == 0, ended.errors[-3000:]
        assert f"resuming from {name}/checkpoint-{KEPT}\n" in ended.output
        return place / name

    return make


def known_then(now: Any, then: Any) -> Any:
    """What a section says now of the things that it told then; it may tell more."""
    if isinstance(then, dict):
        return {key: known_then(now.get(key), value) for key, value in then.items()}
    if isinstance(then, list) and isinstance(now, list) and len(now) == len(then):
        return [known_then(*pair) for pair in zip(now, then, strict=True)]
    return now


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_is_finished(name: str, finish: Finish) -> None:
    run, then = finish(name), FOLDER / name
    record, old_record = run_json(run), run_json(then)
    assert record["status"] == "finished"
    assert [session["resumed_from"] for session in record["sessions"]] == [None, f"checkpoint-{KEPT}"]
    # The layout is chosen anew: packed rows without padding are younger than these runs.
    assert record["batch_layout"]["layout"] == "packed"
    for key in ("origin", "trainable", "process_layout"):
        assert record.get(key) == old_record.get(key)
    assert known_then(record["data"], old_record["data"]) == old_record["data"]
    assert old_record["config"].keys() <= record["config"].keys() <= old_record["config"].keys() | YOUNGER

    ended, expected, kept = (
        weights(run),
        load_file(FOLDER / f"{name}.end.safetensors"),
        weights(then / f"checkpoint-{KEPT}"),
    )
    assert ended.keys() == expected.keys() == kept.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            ended[key], value, atol=TOLERANCE, rtol=0, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert max(float((expected[key] - kept[key]).abs().max()) for key in kept) > 100 * TOLERANCE, (
        "nothing was left to do"
    )

    lines, old_lines = (
        [line for line in read_lines(path / "metrics.jsonl") if "train_runtime" not in line] for path in (run, then)
    )
    assert [line["step"] for line in lines] == list(range(1, LAST + 1))
    for line, old in zip(lines, old_lines, strict=True):
        assert line.keys() == old.keys()
        timeless = [key for key in old if not CHANGES_WITH_TIME.match(key)]
        assert {key: line[key] for key in timeless} == pytest.approx({key: old[key] for key in timeless}, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("adpo_lora_triggered", "anchor.safetensors"),
        ("dpo_lora_decay", "starting_weights_0.pt"),
        ("d2o_lora_refresh", "training_rows.parquet"),
    ],
)
def test_what_does_not_change_is_carried_over_bit_for_bit(name: str, file: str, finish: Finish) -> None:
    """The step after the checkpoint moves no anchor, no start and no sample, so the next checkpoint has the same."""
    before, after = (
        path / file for path in (FOLDER / name / f"checkpoint-{KEPT}", finish(name) / f"checkpoint-{KEPT + 1}")
    )
    if file.endswith(".parquet"):
        assert pq.read_table(before).to_pydict() == pq.read_table(after).to_pydict()
        return
    read = load_file if file.endswith(".safetensors") else lambda path: dict(enumerate(torch.load(path)))
    old, new = read(before), read(after)
    assert old and old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


def test_an_anchor_counts_on(finish: Finish) -> None:
    """The drift of the step before the kill counts towards the copy that is due after the last step."""
    run, then = finish("adpo_lora_triggered"), FOLDER / "adpo_lora_triggered" / f"checkpoint-{KEPT}"
    recorded = json.loads((then / "anchor.json").read_text())["recent_drift"]
    drift = json.loads((run / f"checkpoint-{KEPT + 1}" / "anchor.json").read_text())["recent_drift"]
    assert len(recorded) == 1 and len(drift) == 2 and drift[0] == recorded[0]
    anchor, policy = load_file(run / f"checkpoint-{LAST}" / "anchor.safetensors"), weights(run / f"checkpoint-{LAST}")
    assert all(torch.equal(value, policy[name.replace(".default", "")]) for name, value in anchor.items())


@pytest.mark.parametrize("name", CACHES_OF)
def test_an_old_cache_is_used(name: str, finish: Finish) -> None:
    """Nothing is added to it and no file is written again."""
    made_with = run_json(FOLDER / name)["environment"]["versions"]["transformers"]
    if version("transformers") != made_with:
        pytest.skip(f"the names in a cache depend on the version of transformers; these are of {made_with}")
    cache = finish(name).parent / "cache"
    files = {path.relative_to(cache): path for path in cache.rglob("*") if path.is_file()}
    assert {path.parts[0] for path in files} >= CACHES_OF[name]
    assert files.keys() == {
        path.relative_to(FOLDER / "cache") for path in (FOLDER / "cache").rglob("*") if path.is_file()
    }
    for name, path in files.items():
        # Copied with its time; a file that is written again has another.
        assert path.stat().st_mtime_ns == (FOLDER / "cache" / name).stat().st_mtime_ns
        assert path.read_bytes() == (FOLDER / "cache" / name).read_bytes()


@pytest.mark.parametrize(("name", "key"), [("sft_full", "model"), ("dpo_lora_decay", "adapter")])
def test_a_new_run_starts_from_old_weights(name: str, key: str, launcher: Launcher, tmp_path: Path) -> None:
    """With a learning rate of 0 in its only step it saves what it loaded, bit for bit."""
    place = Path(shutil.copytree(FOLDER, tmp_path / "place"))
    start = f"{name}/checkpoint-{KEPT}"
    # An adapter keeps the shape it was saved with.
    own = [option for option in RUNS[name] if option.startswith("lora_")]
    ended = launcher.run(
        *("--config", f"{name}.yaml", f"--{key}", start, "--output_dir", "new"),
        *("--max_steps", "1", "--warmup_steps", "1", "--lr_scheduler_type", "linear"),
        *(word for option in own for word in (f"--{option}", "null")),
        directory=place,
        **program_of(name),
    )
    assert ended.exit_code == 0, ended.errors[-3000:]
    old, new = weights(place / start), weights(place / "new")
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 600_000
