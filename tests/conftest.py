"""Settings of every test: no network, no telemetry, no window, and where real inputs are."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# Read by the Hugging Face libraries and matplotlib when they are imported, hence set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest

from tests.launches import imported as imported
from tests.launches import launch_environment as launch_environment
from tests.launches import launchers as launchers

REPOSITORY = Path(__file__).resolve().parents[1]
GSM8K = REPOSITORY / "tests" / "data" / "gsm8k" / "model_solutions.jsonl"
TRUTHFULQA = REPOSITORY / "tests" / "data" / "truthfulqa" / "TruthfulQA.csv"
"""Real rows for tests; the README beside them says where they come from."""

SHARED_VARIABLE = "ALIGNKIT_SHARED"
"""Environment variable with the folder of trained checkpoints that are too large for the repository; unset, the tests
marked ``shared`` are skipped."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave long fault injection and experiments out of whatever is asked for, unless the word is in it."""
    for word in ("chaos", "experiment"):
        if word in config.option.markexpr:
            continue
        left_out = [item for item in items if item.get_closest_marker(word)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_sessionstart() -> None:
    """Look for no garbage in what is imported and collected, which stays: that took a third of the time of collection.

    It goes on in ``pytest_collection_finish``.
    """
    gc.disable()


def pytest_collection_finish() -> None:
    """Count nothing of what is there when the first test begins as garbage, ever.

    A trainer collects garbage when it starts, and looking at all of torch and of the tests took half of a short run.
    """
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs more than the repository holds, unless it is said where that is."""
    if item.get_closest_marker("shared") and SHARED_VARIABLE not in os.environ:
        pytest.skip(f"needs a trained checkpoint; set {SHARED_VARIABLE} to the folder with models/gsm-tiny")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with trained checkpoints and whole data sets; for tests marked ``shared`` alone."""
    folder = Path(os.environ[SHARED_VARIABLE]).absolute()
    assert (folder / "models" / "gsm-tiny").is_dir(), f"{SHARED_VARIABLE} names {folder}, without models/gsm-tiny"
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(autouse=True)
def _no_state_outside_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of reference log-probs goes to the test's own folder, never to the user's home."""
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "alignkit_cache"))
