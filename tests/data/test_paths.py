"""A path is the file of that very name, and only a name that leads nowhere can be a pattern."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset

from alignkit.config.data_files import _open_head
from alignkit.config.data_peek import DataFault
from alignkit.data.load import load_rows
from alignkit.errors import DataError

ODD = {"a[12]": "a1", "k::l": "l", "b*": "bb", "c?": "cc", "d{1,2}": "d1", "zip://e": "e", "f[!g]": "fh", "**": "x"}
"""Names with characters that mean more elsewhere, and what another reader would take instead."""


def write(path: Path, prompt: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": prompt, "chosen": "yes", "rejected": "no"}] * 2
    if path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(path: str, *, streaming: bool = False) -> list[str]:
    return [row["prompt"] for row in load_rows(path, streaming=streaming)]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("name", ODD)
def test_a_name_is_taken_as_it_is(name: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / f"{name}{ending}", "right")
    write(tmp_path / f"{ODD[name]}{ending}", "wrong")
    for given in (str(path), f"{name}{ending}"):
        assert prompts(given) == ["right", "right"]
        assert prompts(given, streaming=True) == ["right", "right"]
        head = _open_head(given, "train")
        assert head is not None and head.rows[0]["prompt"] == "right"
    # A file that has changed is read anew, also through a link that stands for it.
    write(path, "new")
    assert prompts(str(path)) == ["new", "new"]


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_folders_and_their_parents(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "set[1]" / f"train{ending}", "right")
    write(tmp_path / "set1" / f"train{ending}", "wrong")
    assert prompts(str(tmp_path / "set[1]")) == ["right", "right"]
    monkeypatch.chdir(tmp_path / "set[1]")
    assert prompts(f"train{ending}") == ["right", "right"]


@pytest.mark.parametrize("name", ["saved[1]", "a::saved"])
def test_a_saved_data_set(name: str, tmp_path: Path) -> None:
    Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b"}]).save_to_disk(str(tmp_path / "plain"))
    (tmp_path / "plain").rename(tmp_path / name)
    assert prompts(str(tmp_path / name)) == ["p"]


def test_a_pattern_says_what_it_matched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("s/1", "s/2", "s/deep/3"):
        for ending in (".jsonl", ".csv"):
            write(tmp_path / f"{name}{ending}", name)
    for ending in (".jsonl", ".csv"):
        for pattern, expected in (
            ("s/*", ["s/1", "s/2"]),
            ("s/[2-9]", ["s/2"]),
            ("s/**/?", ["s/1", "s/2", "s/deep/3"]),
        ):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                found = prompts(str(tmp_path / f"{pattern}{ending}"))
            assert found == [name for name in expected for _ in range(2)]
            said = f"{len(expected)} files match: " + ", ".join(str(tmp_path / f"{n}{ending}") for n in expected)
            assert said in caplog.text
            assert _open_head(str(tmp_path / f"{pattern}{ending}"), "train") is not None
    with pytest.raises(DataError, match="matches no file"):
        prompts(str(tmp_path / "none*.jsonl"))
    with pytest.raises(DataFault, match="matches no file"):
        _open_head(str(tmp_path / "none*.jsonl"), "train")
    assert prompts(str(tmp_path / "s" / "1.*")) == ["s/1"] * 4, "a table and lines of JSON"
    assert _open_head(str(tmp_path / "s" / "1.*"), "train") is not None
