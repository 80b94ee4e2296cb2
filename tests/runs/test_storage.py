"""What a file system refuses becomes one message, whoever it refused it to; what is a bug stays one."""

from __future__ import annotations

import errno
import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alignkit.programs.entry import run_program
from alignkit.storage.durability import write_whole
from alignkit.storage.refusals import StorageError, storage_error

NOBODY = 65534


def in_a_child(action: Callable[[], object]) -> str:
    """What a program that does ``action`` says, in a process that may lose rights."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        sys.stderr = os.fdopen(write, "w")
        try:
            run_program(lambda: action() and None)
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(int(end.code or 0))
        finally:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2, text
    assert "Traceback" not in text and text.count("error: ") == 1
    return text


def limited(action: Callable[[], object]) -> Callable[[], object]:
    def act() -> object:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        return action()

    return act


def test_a_file_that_becomes_too_long(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    said = in_a_child(limited(lambda: write_whole(path, b"x" * 10_000)))
    assert f"{path} could not be written" in said and "10,000 bytes are needed" in said and "free bytes: " in said
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("writer", ["torch", "safetensors", "plain"])
def test_whoever_writes_it(writer: str, tmp_path: Path) -> None:
    tensor, path = torch.zeros(100_000), tmp_path / "out"
    writers = {
        "torch": lambda: torch.save(tensor, path),
        "safetensors": lambda: save_file({"x": tensor}, path),
        "plain": lambda: path.write_bytes(b"x" * 10_000),
    }
    assert "free bytes: " in in_a_child(limited(writers[writer]))


def as_nobody(action: Callable[[], object]) -> Callable[[], object]:
    def act() -> object:
        os.seteuid(NOBODY)
        return action()

    return act


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become someone else")
@pytest.mark.parametrize("action", ["read a file", "write into a folder", "list a folder"])
def test_modes_that_forbid(action: str, tmp_path: Path) -> None:
    """Modes do not bind root, so the program becomes someone whom they bind."""
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir(mode=0)
    file.write_text("secret")
    file.chmod(0)
    actions = {
        "read a file": (file, lambda: file.read_text()),
        "write into a folder": (folder, lambda: write_whole(folder / "x", "y")),
        "list a folder": (folder, lambda: list(folder.iterdir())),
    }
    path, act = actions[action]
    said = in_a_child(as_nobody(act))
    assert str(path) in said and "permission denied" in said


@pytest.mark.parametrize(
    ("code", "words"), [(errno.EROFS, "read-only"), (errno.EDQUOT, "quota"), (errno.ENOSPC, "the disk is full")]
)
def test_other_refusals(code: int, words: str) -> None:
    told = storage_error(OSError(code, os.strerror(code), "/there/file"))
    assert isinstance(told, StorageError) and words in str(told) and "/there/file" in str(told)


def test_names_that_are_none(tmp_path: Path) -> None:
    assert "too long" in in_a_child(lambda: (tmp_path / ("x" * 300)).read_text())
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "circle" in in_a_child(lambda: (tmp_path / "loop").read_text())


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "x"), RuntimeError("a bug"), KeyError("x")])
def test_a_bug_stays_a_bug(error: Exception) -> None:
    assert storage_error(error) is None
