"""How often a training step waits for the device, counted on the CPU; and that the count sees what waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.models import _segments
from alignkit.models.metric_sums import MetricSums
from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of, text_rows
from tests.shapes.waiting import Waits, counted

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what would wait, where nothing does")
MOST = 3
BATCHES = 2
"""Micro-batches of a step."""
QUIET, LOGGED = 3, 4
"""The third step, which does not log, and the fourth."""
DPO, SFT = ("preference", {"method": "dpo", "parametrization": "lora"}), ("sft", {"method": "sft"})
MOST_BESIDE = {"preference": 140, "sft": 45}
"""Operations of a micro-batch beside model and attention, views not counted."""


def kernel(query: Tensor, key: Tensor, value: Tensor, parts: Any, *, scaling: float, window: int | None) -> Tensor:
    """Takes what the kernels on a GPU take, and is no attention."""
    assert parts.ends[0].dtype == torch.int32
    return query * scaling + (key.sum() + value.sum())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model whose tokenizer knows words."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return str(folder)


def trained(program: str, model: str, folder: Path, look: Any = None, **keys: Any) -> Waits:
    """What waited in four steps.

    Args:
        look: Called with the trainer before it trains.
    """
    # As on a machine with a GPU, where `use_cpu` is not written.
    how = {"use_cpu": False, "logging_steps": 2, "max_steps": 4, "gradient_accumulation_steps": BATCHES, **keys}
    config = config_of(program, model, folder, layout="packed", **how)
    trainer = build(config, text_rows(config, 32))
    if look is not None:
        look(trainer)
    with counted(trainer) as waits:
        trainer.train()
    return waits


@pytest.mark.parametrize(("program", "keys", "on_kernels"), [(*DPO, False), (*DPO, True), (*SFT, True)])
def test_a_step_hardly_waits_for_the_device(
    program: str,
    keys: Any,
    on_kernels: bool,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def use_kernel(trainer: Any) -> None:
        # Not before: packed rows have been compared with padded ones by now.
        assert trainer.layout.layout == "packed"
        if on_kernels:
            monkeypatch.setattr(_segments, "varlen_kernel", lambda states, dropout: kernel)

    waits = trained(program, model, tmp_path, use_kernel, **keys)
    # Batches are sent without waiting, whoever sends them.
    assert not any(what == "copy to the device" for step in waits.steps for _, _, what in step)
    assert waits.of(QUIET, "alignkit") == {}
    assert 1 <= sum(waits.of(LOGGED, "alignkit").values()) <= MOST, waits.of(LOGGED, "alignkit")
    # What the model and attention do not need: the loss, its backward pass, metrics and counts.
    beside = {
        place: n
        for (who, place), n in waits.operations[QUIET].items()
        if who == "alignkit" and "/models/_" not in place
    }
    assert sum(beside.values()) <= MOST_BESIDE[program] * BATCHES, (sum(beside.values()), beside)


@pytest.mark.parametrize("spoiling", ["item", "list", "mask", "nonzero", "tensor"])
def test_the_count_sees_what_waits(spoiling: str) -> None:
    waits, values = Waits(), torch.arange(4.0)
    with waits.looking():
        host = torch.tensor([1.0, 2.0])
        host.tolist(), host[host > 1], float(host[0])
        assert not waits.steps[-1]
        {
            "item": lambda: float(values[0]),
            "list": lambda: values.tolist(),
            "mask": lambda: values[values > 1],
            "nonzero": lambda: values.nonzero(),
            "tensor": lambda: torch.tensor([1.0], device=values.device),
        }[spoiling]()
    assert sum(waits.steps[-1].values()) == 1


def test_a_wait_put_into_a_step_is_counted(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric that is read in every step, in a file of ours."""
    code = "def add(self, name, metric):\n    float(metric.values.sum())\n    plain(self, name, metric)\n"
    scope: dict[str, Any] = {"plain": MetricSums.add}
    exec(compile(code, "/alignkit/models/spoiled.py", "exec"), scope)
    monkeypatch.setattr(MetricSums, "add", scope["add"])
    waits = trained("sft", model, tmp_path, method="sft", max_steps=3)
    assert sum(waits.of(QUIET, "alignkit").values()) > MOST
