"""Whether a name is a path or an id of the Hub is decided by one rule, wherever it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from alignkit.data.readers import Source, open_source
from alignkit.errors import DataError
from alignkit.models.files import model_problem
from alignkit.places import is_hub_id, is_local, similar_entry
from alignkit.reports.card import hub_id

NAMES = {
    "gpt2": True,
    "Qwen/Qwen3-0.6B": True,
    "a/b": True,
    "_lab/_model_": True,
    "owner/" + "x" * 96: True,
    "owner/" + "x" * 97: False,
    "runs/my model": False,
    "my model": False,
    "a/b/c": False,
    "org/name/": False,
    "/models/base": False,
    "./base": False,
    "../base": False,
    "~/base": False,
    ".": False,
    "": False,
    "owner/.hidden": False,
    "owner/name.": False,
    "-name": False,
    "a--b": False,
    "a..b": False,
    "owner/name.git": False,
    "runs\\base": False,
    "runs/a\nb": False,
    "name\n": False,
}


def the_hub_takes(name: str) -> bool:
    """What huggingface_hub says of a name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_the_rule(name: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name) is expected
    if not name.endswith("\n"):  # which the pattern of huggingface_hub overlooks
        assert the_hub_takes(name) is expected
    if name not in ("", "."):  # which are the folder we are in
        assert is_local(name) is not expected
        assert (model_problem(name) is None) is expected
        assert hub_id(name) == (name if expected else None)


@pytest.mark.parametrize("name", ["runs/my model", "owner/name.", "my model"])
def test_data_that_can_only_be_a_path_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(DataError) as refused:
        open_source(Source(name), streaming=False)
    assert "no such file or folder" in str(refused.value)


def test_what_is_here_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert is_hub_id("runs/base") and is_local("runs/base") and not is_local("runs/other")


def test_similar_entry(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    assert similar_entry(tmp_path / "bass") == tmp_path / "base"
    assert similar_entry(tmp_path / "unlike") is None
    assert similar_entry(tmp_path / "gone" / "base") is None
