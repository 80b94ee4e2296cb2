"""Nothing of the user's is lost: what stands where a program would write, under every name it can be reached by."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alignkit.errors import ConfigError, RunDirectoryError
from scripts import quickstart

OPTIONS = {"evaluate": ("output", "reliability"), "score": ("output", "heatmap"), "sample": ("output",)}
"""Options of every program that name a file to write."""
FOLDERS = {"merge", "prune", "quickstart"}
"""Programs whose output is a folder."""
ROW = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Number and content of every file, the target of every link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = (path.lstat().st_ino, os.readlink(path).encode())
        elif path.is_file():
            found[str(path)] = (path.stat().st_ino, path.read_bytes())
    return found


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: rows, a folder of rows, a model, an adapter, a template, notes."""
    monkeypatch.chdir(tmp_path)
    for folder in ("rows", "model", "adapter", "bin"):
        (tmp_path / folder).mkdir()
    for name in ("pairs.jsonl", "notes.jsonl", "rows/a.jsonl", "rows/b.jsonl", "model/card.jsonl", "template.jsonl"):
        (tmp_path / name).write_text(ROW)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    for folder, name in (("model", "model.safetensors"), ("adapter", "adapter_model.safetensors")):
        save_file({"w": torch.ones(1)}, tmp_path / folder / name)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "model")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter" / "eval.jsonl").write_text(ROW)
    return tmp_path


def hard_link(home: Path) -> None:
    os.link(home / "pairs.jsonl", home / "bin" / "hard.jsonl")


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda home: (home / name).symlink_to(home / target)


ALWAYS = {
    "the data": ("pairs.jsonl", {}, None),
    "another spelling": ("bin/../pairs.jsonl", {}, None),
    "a hard link to the data": ("bin/hard.jsonl", {}, hard_link),
    "a link to the data": ("bin/soft.jsonl", {}, link("bin/soft.jsonl", "pairs.jsonl")),
    "what the data is a link to": ("notes.jsonl", {"--data": "bin/in.jsonl"}, link("bin/in.jsonl", "notes.jsonl")),
    "in a folder of data": ("rows/b.jsonl", {"--data": "rows"}, None),
    "linked from a folder of data": ("notes.jsonl", {"--data": "rows"}, link("rows/c.jsonl", "notes.jsonl")),
    "matched by a pattern": ("rows/b.jsonl", {"--data": "rows/*.jsonl"}, None),
    "in the model": ("model/card.jsonl", {}, None),
    "in the adapter": ("adapter/eval.jsonl", {"--model": None, "--adapter": "adapter"}, None),
    "in the base of the adapter": ("model/card.jsonl", {"--model": None, "--adapter": "adapter"}, None),
    "the template": ("template.jsonl", {"--chat_template": "template.jsonl"}, None),
    "a folder": ("rows", {}, None),
    "gathered in a link": ("new.jsonl", {}, link(".new.jsonl.partial", "notes.jsonl")),
    "gathered in an input": (".x/../new.jsonl", {"--data": ".new.jsonl.partial"}, link(".new.jsonl.partial", "rows")),
    "a pipe": ("bin/pipe.jsonl", {}, lambda home: os.mkfifo(home / "bin" / "pipe.jsonl")),
}
"""Refused with and without ``--overwrite``: the path written, other options, what is made first."""
UNLESS_OVERWRITE = {
    "a file": ("notes.jsonl", {}, None),
    "a link to a file": ("bin/soft.jsonl", {}, link("bin/soft.jsonl", "notes.jsonl")),
    "a link to nothing": ("bin/soft.jsonl", {}, link("bin/soft.jsonl", "absent.jsonl")),
}


def refusal(program: str, option: str, path: str, options: dict[str, str | None], *flags: str) -> str:
    """What a program says about writing ``path``; nothing where it would."""
    given = {"--model": "model", "--data": "pairs.jsonl", f"--{option}": path}
    if option != "output" and program != "evaluate":
        given["--output"] = "fresh.jsonl"
    given = {key: value for key, value in (given | options).items() if value is not None}
    module = importlib.import_module(f"alignkit.programs.{program}")
    words = [*(word for item in given.items() for word in item), *flags]
    try:
        module.check_inputs(module.command_line().parse(words), program)
    except ConfigError as error:
        return "\n".join(problem for problem in error.problems if problem.startswith(f"--{option}: "))
    return ""


def test_no_program_writes_over_what_is_there(home: Path) -> None:
    (home / ".x").mkdir()
    tried = 0
    for name, (path, options, prepare) in {**ALWAYS, **UNLESS_OVERWRITE}.items():
        if prepare is not None:
            prepare(home)
        before = snapshot(home)
        for program, written in OPTIONS.items():
            for option in written:
                with_flag = refusal(program, option, path, options, "--overwrite")
                assert bool(with_flag) == (name in ALWAYS), (program, option, name, with_flag)
                assert refusal(program, option, path, options), (program, option, name)
                tried += 1
        assert snapshot(home) == before
        for made in ("bin/hard.jsonl", "bin/soft.jsonl", "bin/in.jsonl", "rows/c.jsonl", ".new.jsonl.partial"):
            (home / made).unlink(missing_ok=True)
    print(f"outputs that would have replaced something, refused: {tried} of {tried}")


def test_an_evaluation_beside_a_run_may_be_made_again(home: Path) -> None:
    """It is loaded by nothing; whatever else lies in a run is an input, and so is its name in another folder."""
    options = {"--model": None, "--adapter": "adapter"}
    for name in ("eval.json", "adapter_config.json"):
        (home / "adapter" / "eval.json").write_text("{}")
        assert refusal("evaluate", "output", f"adapter/{name}", options, "--overwrite")
    (home / "adapter" / "run.json").write_text("{}")
    assert "--overwrite" in refusal("evaluate", "output", "adapter/eval.json", options)
    assert refusal("evaluate", "output", "adapter/eval.json", options, "--overwrite") == ""
    assert refusal("evaluate", "output", "adapter/adapter_config.json", options, "--overwrite")


def test_two_outputs_are_two_files(home: Path) -> None:
    same = {"--output": "new.jsonl"}
    assert "--output too" in refusal("score", "heatmap", "bin/../new.jsonl", same)
    assert refusal("score", "heatmap", "new.html", same) == ""


def test_every_program_with_an_output_is_tried(repository: Path) -> None:
    written = {f'"--{option}"' for options in OPTIONS.values() for option in options}
    folders = (repository / "alignkit" / "programs", repository / "scripts")
    files = [path for folder in folders for path in folder.glob("*.py")]
    programs = {path.stem for path in files if any(w in path.read_text() for w in written)}
    elsewhere = {"rewards", "data"}  # which tests/rewards/test_try.py and tests/programs/test_data_program.py try
    assert programs - {"serve"} == {*OPTIONS, *FOLDERS, *elsewhere}, "serve hands --output on to merge"


@pytest.mark.parametrize(
    ("program", "more"), [("merge", {}), ("prune", {"--drop_layers": "1", "--criterion": "magnitude"})]
)
def test_no_place_that_is_taken_is_taken(program: str, more: dict[str, str], home: Path) -> None:
    (home / "soft").symlink_to(home / "empty")
    (home / "listed").mkdir()
    for folder in ("listed", "adapter"):
        (home / folder / "written_files.json").write_text('{"files": []}')
    places = {
        "rows": "is not empty", "pairs.jsonl": "is a file", "soft": "is a link", "adapter": "is an input",
        "model": "is an input", "listed": "--overwrite", "pairs.jsonl/x": "would lie in pairs.jsonl",
    }  # fmt: skip
    before, options = snapshot(home), {"--model": None, "--data": None, "--adapter": "adapter", **more}
    for flags in ((), ("--overwrite",)):
        for name, reason in places.items():
            said = refusal(program, "output", name, options, *flags)
            assert (reason in said) if (name, flags) != ("listed", ("--overwrite",)) else not said, (name, said)
    (home / "empty").mkdir()
    assert "is a link" in refusal(program, "output", "soft", options)
    assert not refusal(program, "output", "empty", options)
    assert snapshot(home) == before


def test_the_quickstart_deletes_its_own_files_alone(home: Path) -> None:
    (home / "data").mkdir()
    (home / "data" / "corpus.jsonl").write_text("mine\n")
    before = snapshot(home)
    for overwrite in (False, True):
        with pytest.raises(RunDirectoryError, match=r"has no quickstart\.json"):
            quickstart.make_folder(home, overwrite=overwrite)
    assert snapshot(home) == before
    folder = home / "quickstart"
    quickstart.make_folder(folder, overwrite=False)
    for name in ("data/corpus.jsonl", "base/model.safetensors", "evaluation.json", "data/mine.jsonl", "base/mine/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    os.link(folder / "data" / "corpus.jsonl", home / "kept.jsonl")
    with pytest.raises(RunDirectoryError, match="--overwrite"):
        quickstart.make_folder(folder, overwrite=False)
    quickstart.make_folder(folder, overwrite=True)
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert left == {"quickstart.json", "data/mine.jsonl", "base/mine/x"}
    assert (home / "kept.jsonl").read_text() == "data/corpus.jsonl"
    (folder / "run").symlink_to(home / "rows")
    with pytest.raises(RunDirectoryError, match="is a link"):
        quickstart.make_folder(folder, overwrite=True)
