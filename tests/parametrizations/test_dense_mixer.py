"""``dense_mixer`` of router tuning in a run: who learns by it, and who pays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of, text_rows
from tests.trainers import logged

EXPERTS, CHOSEN = 32, 2
LAST = "base_model.model.model.layers.1.mlp"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny mixture whose weights are divided by their sum, with more experts than a few tokens can choose."""
    path = tmp_path_factory.mktemp("model")
    save_model(path, num_experts=EXPERTS, num_experts_per_tok=CHOSEN, norm_topk_prob=True)
    return str(path)


def trainer_of(model: str, folder: Path, **keys: Any) -> Any:
    """One step of DPO on four pairs, without the loss that balances experts: it moves the idle ones too.

    Plain SGD moves a number by what its gradient is; Adam would make large steps of what rounding leaves.
    """
    keys |= {"max_steps": 1, "method": "dpo", "router_aux_loss_coef": 0.0, "optim": "sgd", "learning_rate": 1.0}
    config = config_of("preference", model, folder, parametrization="routers", **keys)
    return build(config, text_rows(config, 4), evaluation=text_rows(config, 4, seed=1))


class Watch:
    """What the last mixture of a model is asked while it is watched.

    Attributes:
        chosen: Experts that any token chose.
        passes: How often the router was asked.
        calls: How often the experts were.
    """

    def __init__(self, model: nn.Module) -> None:
        self.chosen: set[int] = set()
        self.passes = self.calls = 0
        router = model.get_submodule(f"{LAST}.gate.base_layer")
        router.register_forward_hook(self._routed)
        model.get_submodule(f"{LAST}.experts").register_forward_pre_hook(self._asked)

    def _routed(self, module: nn.Module, args: Any, output: Any) -> None:
        self.chosen |= set(output[2].flatten().tolist())
        self.passes += 1

    def _asked(self, module: nn.Module, args: Any) -> None:
        self.calls += 1


def change_of(trainer: Any) -> torch.Tensor:
    """How far the last router is from the base's, one number an expert."""
    weight = trainer.model.get_parameter(f"{LAST}.gate.lora_A.default.weight")
    return weight.detach().norm(dim=-1)


def test_routers_learn_of_experts_that_were_never_chosen_and_only_training_pays(model: str, tmp_path: Path) -> None:
    losses, moved = {}, {}
    for dense in (False, True):
        folder = tmp_path / str(dense)
        folder.mkdir()
        trainer = trainer_of(model, folder, router_layers=1, dense_mixer=dense)
        watch = Watch(trainer.model)
        trainer.train()
        idle = sorted(set(range(EXPERTS)) - watch.chosen)
        assert watch.calls == watch.passes + dense * EXPERTS // CHOSEN, "the reference pass and comparisons pay nothing"
        losses[dense], moved[dense] = logged(trainer, "loss"), change_of(trainer)[idle]

        watch.passes = watch.calls = 0
        trainer.evaluate()
        trainer.model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2)
        assert watch.passes == watch.calls >= 3
    assert losses[True] == losses[False], "what comes out is the same"
    assert len(moved[True]) > 2
    assert moved[False].max() < 1e-6 < 1e-4 < moved[True].min()


def test_a_saved_adapter_goes_on_with_it(model: str, tmp_path: Path) -> None:
    first = trainer_of(model, tmp_path, router_layers=1)
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    trainer = trainer_of(model, tmp_path, adapter=str(tmp_path / "adapter"), dense_mixer=True)
    watch = Watch(trainer.model)
    before = change_of(trainer)
    trainer.train()
    idle = sorted(set(range(EXPERTS)) - watch.chosen)
    assert ((change_of(trainer) - before).abs()[idle] > 1e-5).all()
    hooked = [name for name, module in trainer.model.named_modules() if "experts" in name and module._forward_hooks]
    assert hooked == [f"{LAST}.experts"], "no layer pays whose router does not train"
