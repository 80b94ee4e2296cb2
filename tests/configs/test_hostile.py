"""Configurations that would never end, or ask for what no machine has, are refused at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from alignkit.config import load_config
from alignkit.config.yaml_schema import MOST_VALUES, parse_yaml
from alignkit.errors import ConfigError

GIVEN = {"model": "m", "data": "d.jsonl", "method": "dpo", "output_dir": "run"}


def bomb(levels: int, width: int) -> str:
    """Aliases of aliases: few lines that stand for width ** levels values."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


HOSTILE = {
    "a bomb of aliases": (bomb(12, 10), "values, more than"),
    "a bomb of mappings": (bomb(40, 2).replace("[x]", "{x: y}"), "values, more than"),
    "a document that contains itself": ("data: &a [*a]", "has no end"),
    "a mapping that contains itself": ("data: &a {b: *a}", "has no end"),
    "a deep nest": (f"data: {'[' * 20_000}{']' * 20_000}", "nested too deeply"),
    "a number of many digits": (f"max_steps: {'9' * 5000}", "5,000 digits"),
    "a large file": (f"data: '{'x' * 300_000}'", "which is no configuration"),
    "many values": (f"data: [{'x,' * 25_000}]", "values, more than"),
    "an object": ("data: !!python/object/apply:os.system ['touch pwned']", "could not determine a constructor"),
    "bytes": ("data: \x00", "not valid YAML"),
}


def refusal(path: Path | None, *words: str) -> str:
    begun = time.perf_counter()
    with pytest.raises(ConfigError) as error:
        load_config("preference", path, words, check_files=False)
    assert time.perf_counter() - begun < 10
    return str(error.value)


def test_a_hostile_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text, reason in HOSTILE.values():
        (tmp_path / "c.yaml").write_text(text)
        assert reason in refusal(Path("c.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"], "nothing was executed"
    print(f"\nhostile YAML: {len(HOSTILE)} of {len(HOSTILE)}")


def test_aliases_that_a_person_writes_are_read() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    assert len(parse_yaml(f"[{'x,' * (MOST_VALUES - 10)}]")) == MOST_VALUES - 10


NUMBERS = (
    ("max_steps", "99999999999999999999", "<= 1000000000"),
    ("num_train_epochs", "1e300", "<= 100000"),
    ("num_train_epochs", "1e400", "not a finite number"),
    ("num_train_epochs", "9" * 400, "not a finite number"),
    ("learning_rate", "9" * 400, "not a finite number"),
    ("per_device_train_batch_size", "100000000000000000000", "<= 1048576"),
    ("per_device_eval_batch_size", "100000000000000000000", "<= 1048576"),
    ("gradient_accumulation_steps", "100000000000000000000", "<= 1048576"),
    ("lora_r", "1000000000", "<= 65536"),
    ("dataloader_num_workers", "100000", "<= 256"),
    ("dataset_num_proc", "100000", "<= 256"),
    ("pad_to_multiple_of", "1000000000", "<= 4096"),
    ("save_steps", "99999999999999999999", "<= 2147483647"),
    ("logging_steps", "99999999999999999999", "<= 2147483647"),
    ("max_rows", "99999999999999999999", "<= 2147483647"),
    ("num_samples", "99999999999999999999", "<= 2147483647"),
)


def test_astronomic_numbers_are_refused_with_the_bound() -> None:
    words = [word for key, value in GIVEN.items() for word in (f"--{key}", value)]
    for key, value, reason in NUMBERS:
        said = refusal(None, *words, f"--{key}", value)
        assert f"`{key}: " in said and reason in said and ": 1 problem" in said
    print(f"\nastronomic numbers: {len(NUMBERS)} of {len(NUMBERS)}")
