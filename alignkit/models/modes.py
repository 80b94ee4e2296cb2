"""Where there is dropout: none while a model is looked at, and as before when training goes on; or none at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedConfig


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside (no dropout, no noise in routers), the mode of every single module again after.

    ``model.train()`` would not do: it would also start what was kept in evaluation mode inside a model that trains.

    Args:
        *models: The models; wrappers are models too.
    """
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def drops(model: nn.Module) -> bool:
    """Whether a pass in training mode draws what it leaves out, by any of the rates of :func:`switch_off_dropout`."""
    return any(
        rate > 0
        for module in model.modules()
        for name, rate in vars(module).items()
        if isinstance(rate, float) and ("drop" in name or (name == "p" and isinstance(module, nn.Dropout)))
    )


def switch_off_dropout(model: nn.Module) -> None:
    """Set every rate of dropout to 0: of modules, those that layers pass to functions, and those read off the config.

    TRL does the first alone. The attention of most models has a rate of its own, all of OPT does, some skip whole
    layers (``layerdrop``), and Falcon asks its config in every pass, so that a model saved afterwards says 0 there too.

    Args:
        model: Changed.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        configs = [value for name, value in vars(module).items() if isinstance(value, PreTrainedConfig)]
        for holder in (module, *configs):
            for name, value in vars(holder).items():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)
