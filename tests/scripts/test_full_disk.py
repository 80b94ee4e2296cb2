"""A disk that is full under caches and outputs: one message with path and bytes, and no half of a file."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from alignkit.data import json_files
from alignkit.data.load import load_rows
from alignkit.references._cache import ReferenceCache
from alignkit.sampling.store import write_rows
from alignkit.storage.refusals import StorageError, storage_error
from tests.scripts.conftest import Script


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(path)], check=False)
    if mounted.returncode != 0:
        pytest.skip("a disk of its own needs the right to mount one")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path) -> None:
    """Leave no byte."""
    status = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(status.f_bavail * status.f_frsize))


def left(disk: Path) -> list[str]:
    """What lies on it, hidden files included."""
    return sorted(path.relative_to(disk).as_posix() for path in disk.rglob("*") if path.name != "ballast")


def test_outputs_of_scripts(assets: Path, disk: Path, run_script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    fill(disk)
    rows = ("--model", assets / "base", "--data", assets / "pairs.jsonl", "--max_rows", "3")
    scripts = {
        "evaluate eval.json": (*rows, "--num_samples", "0"),
        "token_rewards rewarded.jsonl": rows,
        "token_rewards rewarded.parquet": rows,
        "sample_candidates sampled.jsonl": (*rows, "--num_samples", "2", "--max_new_tokens", "4"),
        "merge_adapter merged": ("--adapter", assets / "adapter"),
    }
    for name, words in scripts.items():
        script, file = name.split()
        assert run_script(script, *words, "--output", disk / file) == 2, name
        said = capsys.readouterr().err
        assert said.count("error: ") == 1 and "Traceback" not in said, (name, said)
        assert f"error: {disk / file}" in said and "the disk is full" in said and "free bytes: 0 there" in said, said
        # Its folder of samples is there for the next call, and empty.
        assert left(disk) == (["sampled.jsonl.partial"] if script == "sample_candidates" else []), name
        for folder in disk.glob("*.partial"):
            folder.rmdir()
    print(f"outputs of scripts on a full disk: {len(scripts)} of {len(scripts)}")


def test_caches(assets: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "cache_folder", lambda: disk)
    rows = load_rows([str(assets / "lists.jsonl")])
    before = left(disk)
    fill(disk)
    values = torch.ones(1000)
    makers: dict[str, Callable[[], object]] = {
        "a table of the data": lambda: load_rows([str(assets / "pairs.jsonl")]),
        "rows of datasets": lambda: rows.map(lambda row: {"more": "x" * 100_000}),
        "log-probs and token rewards": lambda: ReferenceCache(disk / "logps").store(disk / "logps" / "a", values),
        "rows as text": lambda: write_rows(disk / "rows.jsonl", [{"text": "x" * 100}]),
        "rows in parquet": lambda: write_rows(disk / "rows.parquet", [{"text": "x" * 100}]),
    }
    for name, make in makers.items():
        with pytest.raises(Exception) as error:
            make()
        told = storage_error(error.value)
        assert told is not None and "free bytes" in str(told), (name, error.value)
        assert isinstance(error.value, StorageError) == (name != "rows of datasets"), name
        assert str(disk) in str(told) or name == "rows of datasets", (name, str(told))
        # datasets gathers rows in a file of a random name, which it never reads again.
        assert [path for path in left(disk) if path != "logps" and "/tmp" not in path] == before, name
    print(f"caches on a full disk: {len(makers)} of {len(makers)}")
