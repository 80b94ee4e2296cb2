"""Kernels that compute the layers of a model faster, put into loaded models and taken out again.

Nothing that is saved changes: weights keep their names, and a copy of a model has kernels of its own.

- ``liger``: LinkedIn's Liger kernels for rotary positions, RMSNorm and SwiGLU, on CUDA. Its fused losses are not used.
- ``compile``: each decoder layer by torch.compile, once for all layers of a kind and for all lengths of rows. Attention
  over packed rows stays outside, as its parts are others in every batch; what is around it is compiled for one length,
  then for all. Attention over a cache, which grows with every token that is drawn, runs as it is.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- transformers ``GradientCheckpointingLayer``, the class of decoder layers, its ``gradient_checkpointing`` and
  ``_gradient_checkpointing_func``, and that it wraps ``forward`` of its subclasses; or, in older ones, ``__call__``
- transformers, in the files of ``LIGER_TYPES``: ``apply_rotary_pos_emb(q, k, cos, sin, ...)``, classes ``*RMSNorm``
  with ``weight`` and ``variance_epsilon``, and ``*MLP`` with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from inspect import unwrap
from types import MethodType, ModuleType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from alignkit.data.prefix import CandidateCollator, Layout
from alignkit.models._comparison import ScoringRun, disagreement
from alignkit.models._forward import completion_forward, compute_precision
from alignkit.models.modes import drops, evaluating
from alignkit.models.sparse_adapter import SparseVariant

LIGER_TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
"""Types of models whose rotary positions, RMSNorm and SwiGLU are exactly those that Liger computes."""
GRADIENT_TOLERANCE = {"float32": 1e-3}
"""Largest distance of two gradients of one loss, as a share of their length, that rounding explains; 0.1 in 16 bits."""
COMPARED_NUMBERS = 2**26
"""Of the gradient so many numbers are compared at most, of the smallest weights first: they are kept twice."""
COMPARED_TOKENS = 256
"""Of the prompt and of the completion of the row that is compared."""
BACKEND = "inductor"
VARIANTS = 64
"""How often a kind of layer may be compiled anew: with and without gradient, adapter or mixed precision, at least."""

CHECKPOINTS_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)
"""Whether a layer recomputes its forward pass alone, not the hooks around it."""
CACHES = ("past_key_values", "cache")
"""What layers call a cache, up to transformers 5.23 and from 5.24 on."""

Undo = Callable[[], None]


def liger_problem(bases: Sequence[Any]) -> str | None:
    """Why Liger's kernels cannot compute these models, or None.

    Args:
        bases: Models of transformers, without wrappers.
    """
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install 'alignkit[fast]')"
    if not torch.cuda.is_available():
        return "Liger's kernels are written in Triton, which needs a CUDA device"
    foreign = sorted({base.config.get_text_config().model_type for base in bases} - set(LIGER_TYPES))
    return f"they are not known to be those of a model of type {foreign[0]}" if foreign else None


def compile_problem(bases: Sequence[nn.Module]) -> str | None:
    """Why the decoder layers of these models are not compiled, or None.

    Args:
        bases: Models of transformers, without wrappers.
    """
    for base in bases:
        layers = list(_decoder_layers(base))
        if not layers:
            return f"{type(base).__name__} has no decoder layers that could be told apart"
        if any(name.rpartition(".")[2] == "experts" for name, _ in base.named_modules()):
            return "what listens to the routers of a mixture of experts is left out of compiled layers"
        if compute_precision(base) == "quantized":
            return "quantised layers are not compiled"
        adapted = (module for module in base.modules() if isinstance(module, LoraLayer))
        if any(isinstance(variant, SparseVariant) for layer in adapted for variant in layer.lora_variant.values()):
            return "masks that change with every step would be compiled anew for each"
    return None


def put_liger(bases: Sequence[nn.Module]) -> Undo:
    """Have models computed by Liger's kernels from now on; returns what takes these out.

    Args:
        bases: Models of transformers, without wrappers, of ``LIGER_TYPES``.
    """
    from liger_kernel.transformers import LigerSwiGLUMLP, liger_rotary_pos_emb
    from liger_kernel.transformers.functional import liger_rms_norm

    def normalised(module: Any, hidden_states: Tensor) -> Tensor:
        # Not in place: the gradient that comes in may be that of a residual as well.
        return liger_rms_norm(hidden_states, module.weight, module.variance_epsilon, in_place=False)

    changed: list[nn.Module] = []
    files = {sys.modules[type(base).__module__] for base in bases}
    for module in (module for base in bases for module in base.modules()):
        if type(module).__module__ in {file.__name__ for file in files}:
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = MethodType(normalised, module)
            elif type(module).__name__.endswith("MLP") and isinstance(module.act_fn, type(ACT2FN["silu"])):
                module.forward = MethodType(LigerSwiGLUMLP.forward, module)
            else:
                continue
            changed.append(module)
    undo_rotary = [_put_rotary(file, liger_rotary_pos_emb) for file in files]

    def undo() -> None:
        for module in changed:
            del module.forward
        for restore in undo_rotary:
            restore()

    return undo


def _put_rotary(file: ModuleType, kernel: Callable[..., Any]) -> Undo:
    """Rotary positions are a function of the file that all models of a type share: tensors elsewhere keep theirs."""
    own = file.apply_rotary_pos_emb

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        rotated: tuple[Tensor, Tensor] = (kernel if q.is_cuda else own)(q, k, cos, sin, **more)
        return rotated

    def undo() -> None:
        file.apply_rotary_pos_emb = own  # type: ignore[attr-defined]

    file.apply_rotary_pos_emb = apply_rotary_pos_emb  # type: ignore[attr-defined]
    return undo


def put_compiled(bases: Sequence[nn.Module]) -> Undo:
    """Have the decoder layers of models compiled at their next call; returns what takes that back.

    Args:
        bases: Models of transformers, without wrappers.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    layers: list[Any] = [layer for base in bases for layer in _decoder_layers(base)]
    for layer in layers:
        layer.forward = _Compiled(layer)

    def undo() -> None:
        for layer in layers:
            del layer.forward

    return undo


class _Compiled:
    """The forward pass of a layer, compiled but for attention over a cache; checkpointing stays around it.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.compiled = torch.compile(MethodType(unwrap(type(layer).forward), layer), dynamic=True, backend=BACKEND)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        if any(kwargs.get(name) is not None for name in CACHES):
            return type(layer).forward(layer, *args, **kwargs)
        if CHECKPOINTS_FORWARD and layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
            return layer._gradient_checkpointing_func(partial(self.compiled, **kwargs), *args)
        return self.compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Compiled:
        return _Compiled(deepcopy(self.layer, memo))


def _decoder_layers(base: nn.Module) -> Iterator[nn.Module]:
    return (module for module in base.modules() if isinstance(module, GradientCheckpointingLayer))


# --- what they compute is compared with the plain model --------------------------------------------------------------


class Passes:
    """Log-probs of one row, and their gradient, as a model computes them.

    Args:
        run: The model, as it will be run.
        row: A candidate row, of which the beginning of the first completion is taken.
        layout: In which rows are run.
        gradient: Whether a backward pass can be made: not where training has split the weights.
    """

    def __init__(self, run: ScoringRun, row: Any, layout: Layout = "padded", *, gradient: bool = True) -> None:
        prompt, completion = row["prompt_ids"][-COMPARED_TOKENS:], row["completion_ids"][0][:COMPARED_TOKENS]
        cut = {"prompt_ids": prompt, "completion_ids": [completion], "scores": [1.0]}
        device = next(run.model.parameters()).device
        # Twice: for rows that stand alone a compiler makes code of its own.
        batch = CandidateCollator(0, layout)([cut, cut])
        self.inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        self.run, self.weights = run, _compared(run.model) if gradient else []

    def __call__(self, *, training: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probs and gradient, in float32.

        Args:
            training: In training mode, which compiles what training will run; only for a model without dropout.
        """
        if training:
            return self._computed()
        with evaluating(self.run.model):
            return self._computed()

    def _computed(self) -> tuple[Tensor, Tensor]:
        with self.run.context(), torch.set_grad_enabled(bool(self.weights)):
            logps = completion_forward(self.run.model, self.inputs).token_logps
        logps = logps[self.inputs["completion_mask"]]
        if not self.weights:
            return logps.float(), logps.new_zeros(0)
        gradients = torch.autograd.grad(logps.mean(), self.weights, allow_unused=True)
        flat = [gradient.float().flatten() for gradient in gradients if gradient is not None]
        return logps.detach().float(), torch.cat(flat)


def kernel_difference(passes: Passes, put: Callable[[], Undo], *, compiles: bool) -> tuple[float, float, Undo]:
    """Put kernels into a model, and how far it is from the plain one.

    Args:
        passes: Of the model without them.
        put: Puts them in.
        compiles: Whether they are compiled for the mode the model is in.

    Returns:
        The distance of log-probs, nats a token; of gradients, as a share of their length; and what takes them out.
    """
    training = compiles and not drops(passes.run.model)
    plain_logps, plain_gradient = passes(training=training)
    undo = put()
    try:
        logps, gradient = passes(training=training)
    except BaseException:
        undo()
        raise
    length = float(plain_gradient.norm())
    apart = float((gradient - plain_gradient).norm()) / length if length else float(gradient.norm())
    return disagreement(plain_logps, logps, passes.run.precision), apart, undo


def is_within(logps: float, gradient: float, precision: str, tolerance: float) -> bool:
    """Whether rounding explains the distances; what is no number is not explained.

    Args:
        logps: Of log-probs, nats.
        gradient: Of gradients, as a share of their length.
        precision: That of the run.
        tolerance: Of log-probs, nats.
    """
    both_finite = math.isfinite(logps) and math.isfinite(gradient)
    return both_finite and logps <= tolerance and gradient <= GRADIENT_TOLERANCE.get(precision, 0.1)


def _compared(model: nn.Module) -> list[nn.Parameter]:
    """The smallest of the weights that train, up to ``COMPARED_NUMBERS`` together, and the smallest of all anyway."""
    taken: list[nn.Parameter] = []
    left = COMPARED_NUMBERS
    for parameter in sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.numel()):
        if taken and parameter.numel() > left:
            break
        taken.append(parameter)
        left -= parameter.numel()
    return taken
