"""A signal that reaches one process of a launch stops all of them after the same step."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.layouts import LAYOUTS, OPTIONS, record_of

pytestmark = pytest.mark.xdist_group("distributed")

RUN: dict[str, Any] = {"method": "flex_dpo", "max_steps": 500, "save_steps": 1000, "probe_steps": 0}
LAYOUT = LAYOUTS["ddp 2x2"]


def test_a_signal_on_one_rank_stops_all_at_the_same_step(
    launchers: Any, inputs: dict[str, str], tmp_path: Path
) -> None:
    given = {**RUN, "model": inputs["model"], "data": inputs["pairs"]}
    cases = ((1, signal.SIGTERM), (0, signal.SIGUSR1), (1, signal.SIGINT))
    seconds = []
    for rank, number in cases:
        run = tmp_path / number.name
        options = {**OPTIONS, **given, "output_dir": run, "per_device_train_batch_size": LAYOUT.batch_size}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        processes = launchers(LAYOUT).start(*words, directory=tmp_path)
        metrics = run / "metrics.jsonl"
        processes[0].wait_until(lambda metrics=metrics: metrics.is_file() and '"step": 4,' in metrics.read_text())
        begun = time.monotonic()
        os.kill(processes[rank].pid, number)
        ended = [process.wait() for process in processes]
        seconds.append(time.monotonic() - begun)
        assert [one.exit_code for one in ended] == [128 + number] * 2, [one.errors[-2000:] for one in ended]
        assert not any("Traceback" in one.errors for one in ended)
        (checkpoint,) = run.glob("checkpoint-*")
        step = int(checkpoint.name.removeprefix("checkpoint-"))
        assert 4 <= step < RUN["max_steps"] and (checkpoint / "complete.json").is_file()
        assert record_of(run)["status"] == f"stopped: {number.name}"
        assert sum(one.errors.count("to continue from") for one in ended) == 1
    assert max(seconds) < 30
    print(f"\nsignals on two processes: {len(cases)} of {len(cases)}, ended within {max(seconds):.1f} s")
