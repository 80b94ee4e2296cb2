"""Settings of every test: no network, no telemetry, no window, and where real inputs are."""

from __future__ import annotations

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

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(autouse=True)
def _no_state_outside_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of reference log-probs goes to the test's own folder, never to the user's home."""
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "alignkit_cache"))
