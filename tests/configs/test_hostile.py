"""Configurations that would never end, or ask for what no machine has, are refused at once."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from alignkit.config import load_config
from alignkit.errors import ConfigError
from alignkit.yaml_text import MOST_VALUES, parse_yaml
from tests.chaos.hostile import DOCUMENTS

GIVEN = {"model": "m", "data": "d.jsonl", "method": "dpo", "output_dir": "run"}


def refusal(path: Path | None, *words: str) -> str:
    begun = time.perf_counter()
    with pytest.raises(ConfigError) as error:
        load_config("preference", path, words, check_files=False)
    assert time.perf_counter() - begun < 10
    return str(error.value)


def test_a_hostile_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, (text, reason) in DOCUMENTS.items():
        (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        assert re.search(reason, refusal(Path("c.yaml"))), name
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"], "nothing was executed"
    print(f"\nfiles that are no config: {len(DOCUMENTS)} of {len(DOCUMENTS)}")


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


@pytest.mark.parametrize(("key", "value", "reason"), NUMBERS, ids=[f"{key}-{value:.9}" for key, value, _ in NUMBERS])
def test_astronomic_numbers_are_refused_with_the_bound(key: str, value: str, reason: str) -> None:
    words = [word for given in GIVEN.items() for word in (f"--{given[0]}", given[1])]
    said = refusal(None, *words, f"--{key}", value)
    assert f"`{key}: " in said and reason in said and ": 1 problem" in said
