"""Counts what makes the host wait for a device, in a run on the CPU, where nothing does.

Tensors that a collator made, or that were fetched, are on the host; all others are taken to be on the device. A tensor
passes from one to the other by being copied, which waits unless the copy is from pinned memory and not blocking.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
OWNERS = ("alignkit", "trl", "transformers", "accelerate", "peft")
ON_THE_HOST = ("alignkit/data/prefix.py", "alignkit/shapes/_example_collators.py", "torch/utils/data/")
"""Files that work on tensors that have not been sent to the device yet, and what those call."""
NEEDS_VALUES = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
    "unique_consecutive", "bincount",
}  # fmt: skip
"""Operations of which the size or the result is known once the device is done."""


def caller() -> tuple[str, str, bool]:
    """The library that asked for what is being done, the place in it, and whether it is done for a collator."""
    frame = sys._getframe(1)
    owner, place = "", ""
    while frame is not None:
        file = frame.f_code.co_filename
        if any(part in file for part in ON_THE_HOST):
            return "", "", True
        for name in OWNERS:
            if not owner and f"/{name}/" in file and "/tests/" not in file:
                owner, place = name, f"{file[file.rindex(f'/{name}/') + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return owner, place, False


class Waits:
    """What would wait, by step, owner and place; and how many operations each owner asked for."""

    def __init__(self) -> None:
        self.steps: list[Counter[tuple[str, str, str]]] = [Counter()]
        self.operations: list[Counter[tuple[str, str]]] = [Counter()]
        self._host: dict[int, Tensor] = {}

    def begin_step(self) -> None:
        """What comes now is of the next step."""
        self.steps.append(Counter())
        self.operations.append(Counter())

    def is_host(self, tensor: Any) -> bool:
        """Whether a tensor has not been sent to the device."""
        return isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self._host

    def keep_on_host(self, tensor: Tensor) -> Tensor:
        """Take a tensor, and all its views, to be on the host."""
        if place := tensor.untyped_storage().data_ptr():
            self._host[place] = tensor
        return tensor

    def keep_on_device(self, tensor: Tensor) -> Tensor:
        """Take a tensor, and all its views, to be on the device."""
        self._host.pop(tensor.untyped_storage().data_ptr(), None)
        return tensor

    def add(self, what: str, of: Any = None) -> None:
        """Count one wait, unless it is for something on the host."""
        owner, place, collates = caller()
        if not collates and not self.is_host(of):
            self.steps[-1][owner, place, what] += 1

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Count what is done inside."""
        with _Operations(self), _Calls(self):
            yield

    def of(self, step: int, owner: str) -> dict[str, int]:
        """Waits of one owner in one step, by place and kind."""
        return {f"{place} {what}": n for (who, place, what), n in sorted(self.steps[step].items()) if who == owner}


class _Calls(TorchFunctionMode):
    """Sees the copies between host and device, which are none on a CPU, and what is read without an operation."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits, kwargs = self.waits, kwargs or {}
        name = getattr(func, "__name__", "")
        if func in (Tensor.tolist, Tensor.numpy):
            waits.add(name, args[0])
        found = func(*args, **kwargs)
        if func in (Tensor.cpu,) and not waits.is_host(args[0]):
            waits.add(name)
            return waits.keep_on_host(found.clone())
        if func is Tensor.to and _device_of(args, kwargs) and waits.is_host(args[0]):
            if not kwargs.get("non_blocking"):
                owner, place, _ = caller()
                waits.steps[-1][owner, place, "copy to the device"] += 1
            return waits.keep_on_device(found.clone())
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            if kwargs.get("device") is not None or func is Tensor.new_tensor:
                waits.add("made of host values")
            else:
                waits.keep_on_host(found)
        if func is Tensor.__getitem__ and any(isinstance(i, list) for i in _tuple(args[1])):
            waits.add("indexed by a list", args[0])
        return found


def _tuple(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _device_of(args: Any, kwargs: Any) -> bool:
    return "device" in kwargs or any(isinstance(a, torch.device | str) for a in args[1:])


class _Operations(TorchDispatchMode):
    """Sees every operation, those of a backward pass too."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        owner, place, collates = caller()
        lists = args[0] if args and isinstance(args[0], list | tuple) else ()
        given = [a for a in (*args, *lists) if isinstance(a, Tensor)]
        if collates or (given and all(map(self.waits.is_host, given))):
            for each in found if isinstance(found, tuple | list) else [found]:
                if isinstance(each, Tensor):
                    self.waits.keep_on_host(each)
            return found
        name = func.overloadpacket.__name__
        if not func.is_view:
            self.waits.operations[-1][owner, place] += 1
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        )
        if name in NEEDS_VALUES or by_mask:
            self.waits.add(name, args[0])
        return found


@contextmanager
def counted(trainer: Any) -> Iterator[Waits]:
    """Count in the steps that a trainer makes inside."""
    waits = Waits()
    fetch: Callable[..., Any] = trainer.get_batch_samples

    def begin(*args: Any, **kwargs: Any) -> Any:
        waits.begin_step()
        return fetch(*args, **kwargs)

    trainer.get_batch_samples = begin
    with waits.looking():
        yield waits
    del trainer.get_batch_samples
