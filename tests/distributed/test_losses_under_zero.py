"""Every loss under ZeRO-2 on two processes gives the losses and gradient norms of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignkit.parts.method import load_method
from tests.distributed import losses_under_zero
from tests.distributed.layouts import LAYOUTS
from tests.programs.conftest import save_model
from tests.programs.launching import REPOSITORY
from tests.shapes.loss_table import UNDER_ZERO_2

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.slow]


def test_every_loss_is_on_two_processes_what_it_is_on_one(launchers: Any, tmp_path: Path) -> None:
    model, one, two = (tmp_path / name for name in ("model", "one", "two"))
    for folder in (model, one, two):
        folder.mkdir()
    save_model(model, hidden=64)
    program = Path(losses_under_zero.__file__)
    ended = launchers(LAYOUTS["zero2 2x2"]).run(str(two), str(model), directory=REPOSITORY, program=program)
    assert ended.exit_code == 0, ended.errors[-6000:]
    sharded = json.loads((two / "found.json").read_text())
    plain = losses_under_zero.run(one, str(model))
    assert set(sharded) == set(plain) == set(UNDER_ZERO_2)
    for name, expected in plain.items():
        found = sharded[name]
        assert (found["engine"], len(found["loss"])) == ("DeepSpeedEngine", 2), name
        method = load_method(name)
        if "whole_micro_batch" in method.needs(method.options()) and not method.is_unpaired:
            continue  # it sorts the rows of a process, of which there are half as many
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-5), name
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3), name
