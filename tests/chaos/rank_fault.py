"""The launch program ``trainers/preference.py`` with a fault on one rank, as a machine of a cluster may have one.

``CHAOS_FAULT`` names the fault, ``CHAOS_RANK`` the rank. Nothing of the toolkit knows of either.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any

from alignkit.errors import DataError, ModelError
from tests.programs.launching import PREFERENCE

AT_STEP = 2


def raises(error: BaseException) -> Callable[..., Any]:
    """A function that only raises."""

    def function(*args: Any, **kwargs: Any) -> None:
        raise error

    return function


def in_step(act: Callable[[], object]) -> None:
    """Do something amid a training step, when the processes are connected and one has begun to wait for the other."""
    from transformers import Trainer

    whole, count = Trainer.training_step, [0]

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == AT_STEP:
            act()
        return whole(self, *args, **kwargs)

    Trainer.training_step = step


def after_loading(engine: Any, *args: Any, **kwargs: Any) -> None:
    """Load the shards of a checkpoint as DeepSpeed does, but for one number of a weight that trains."""
    from transformers.integrations.deepspeed import deepspeed_load_checkpoint

    deepspeed_load_checkpoint(engine, *args, **kwargs)
    # DeepSpeed keeps the true size of what it has taken apart.
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    largest = max(trained, key=lambda p: p.ds_numel if hasattr(p, "ds_numel") else p.numel())
    # Under ZeRO-3 a process has a part of it, and of what is small the whole beside that.
    for held in (largest.data, largest.ds_tensor.data) if hasattr(largest, "ds_tensor") else (largest.data,):
        held.view(-1)[:1] += 1


def patch(fault: str) -> None:
    """Bring the fault about."""
    import transformers.trainer

    import alignkit.runs.ranks
    import alignkit.runs.rows
    import alignkit.runs.run

    match fault:
        case "config missing":
            sys.argv = [word.replace("c.yaml", "gone.yaml") for word in sys.argv]
        case "package":
            installed = alignkit.runs.ranks.installed_version
            alignkit.runs.ranks.installed_version = lambda name: "0.0.7" if name == "trl" else installed(name)
        case "other files":
            os.chdir("twin")
        case "world size":
            os.environ["WORLD_SIZE"] = "3"
        case "data step":
            alignkit.runs.rows.load_splits = raises(DataError("rows.jsonl", ["row 3 is empty on this machine"]))
        case "model loading":
            alignkit.runs.run.load_policy = raises(ModelError("the weights on this machine are damaged"))
        case "resumption":
            transformers.trainer.deepspeed_load_checkpoint = after_loading
        case "training step":
            in_step(raises(ArithmeticError("this device has failed")))
        case "killed":
            in_step(lambda: os.kill(os.getpid(), signal.SIGKILL))
        case "stopped":
            in_step(lambda: os.kill(os.getpid(), signal.SIGSTOP))


if __name__ == "__main__":
    if os.environ["RANK"] == os.environ.get("CHAOS_RANK"):
        patch(os.environ["CHAOS_FAULT"])
    runpy.run_path(str(PREFERENCE), run_name="__main__")
