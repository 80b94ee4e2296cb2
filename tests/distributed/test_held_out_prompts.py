"""What is seen of completions on two processes is what one process sees: no prompt counts twice.

Accelerate gives every process as many rows as the others, and counts a prompt of four completions as one row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import held_out_prompts
from tests.distributed.layouts import LAYOUTS
from tests.programs.launching import REPOSITORY

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.slow]


def test_two_processes_see_what_one_sees(launchers: Any, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    program = Path(held_out_prompts.__file__)
    ended = launchers(LAYOUTS["ddp 2x2"]).run(str(folder), directory=REPOSITORY, program=program)
    assert ended.exit_code == 0, ended.errors[-6000:]
    two, one = torch.load(folder / "found.pt"), held_out_prompts.run(tmp_path / "one")
    timed = ("_runtime", "_per_second", "_time")
    for what in ("evaluation", "log"):
        kept = {key: value for key, value in one[what].items() if not key.endswith(timed)}
        assert set(two[what]) == set(one[what])
        assert {key: two[what][key] for key in kept} == pytest.approx(kept, rel=1e-5, abs=1e-6)
    assert two["rows"] == one["rows"] and len(one["rows"]) == 8
    assert len({row["prompt"] for row in one["rows"]}) == 2 and {row["group"] for row in one["rows"]} == {0, 1}
    assert one["evaluation"]["eval_pass@4_low"] < one["evaluation"]["eval_pass@4"] == pytest.approx(1 / 3)
