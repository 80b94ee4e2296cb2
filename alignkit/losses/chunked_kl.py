"""KL between the next-token distributions of two models over the whole vocabulary, without the logits of a batch.

Logits are made of hidden states, a few tokens at a time, and made again in the backward pass. What is held beside
hidden states and weights are ``CHUNK_TOKENS`` rows of logits, however many tokens a batch has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CHUNK_TOKENS = 256
"""Tokens whose logits are held at once: of a vocabulary of 151,936, 160 MB for each model in float32.

Fewer would have a GPU wait for the head's weight, which is read once for each chunk; more only take memory.
"""


@dataclass(frozen=True)
class HeadForm:
    """What a head does beside its product: ``softcap * tanh(scale * (W h + b) / softcap)``.

    Attributes:
        scale: Factor of the product.
        softcap: Bound of the logits; None leaves the hyperbolic tangent out.
    """

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states.

    Attributes:
        weight: W.
        bias: b, or None.
        form: What is done to the product.
    """

    weight: Tensor
    bias: Tensor | None = None
    form: HeadForm = HeadForm()


def all_here(*parts: Tensor | None) -> AbstractContextManager[Any]:
    """What ``gathered`` of :func:`chunked_kl` is where weights lie whole in every process."""
    return nullcontext()


def chunked_kl(
    hidden: Float[Tensor, "N H"],
    head: Head,
    teacher_hidden: Float[Tensor, "N G"],
    teacher_head: Head,
    *,
    temperature: float = 1.0,
    gathered: Callable[..., AbstractContextManager[Any]] = all_here,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    r"""Forward KL of each token, teacher || student, and whether both find the same token the likeliest.

    Equation, with z and y the logits of student and teacher::

        q = softmax(z / T),   p = softmax(y / T),   KL = sum over v of p_v * (log p_v - log q_v),
        dKL/dz_v = (q_v - p_v) / T

    Symbols: T is ``temperature``; v runs over the vocabulary. The gradient goes to the student's hidden states, weight
    and bias, and has no derivative of its own.

    Deviations: none. Products are of the type of the hidden states, or of autocast, and give float32; what follows is
    float32. All is float64 where the student's hidden states are.

    Fidelity: the definition.

    Args:
        hidden: Last hidden states of the student, of the tokens that count.
        head: The student's.
        teacher_hidden: Those of the teacher for the same tokens, of any width.
        teacher_head: With as many rows as the student's.
        temperature: Of both distributions; > 0.
        gathered: Given weights and biases, the context in which they lie whole; entered in both passes.
        chunk: Tokens at a time.
    """
    how = _How(head.form, teacher_head.form, temperature, gathered, chunk)
    kl, agrees = _ChunkedKL.apply(  # type: ignore[no-untyped-call]  # so torch declares it
        hidden, head.weight, head.bias, teacher_hidden, teacher_head.weight, teacher_head.bias, how
    )
    return kl, agrees


def head_logits(hidden: Float[Tensor, "N H"], head: Head) -> Float[Tensor, "N V"]:
    """The logits of a few tokens, made as :func:`chunked_kl` makes them; the head lies whole.

    Args:
        hidden: Last hidden states.
        head: Of the same model.
    """
    dtype, wide = _product_type(hidden), _wide(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        product = _product(_operand(hidden, dtype, wide), _operand(head.weight, dtype, wide).t(), wide)
        return _shaped(product, head.bias, head.form)


@dataclass(frozen=True)
class _How:
    student: HeadForm
    teacher: HeadForm
    temperature: float
    gathered: Callable[..., AbstractContextManager[Any]]
    chunk: int


class _ChunkedKL(torch.autograd.Function):
    """The two passes of :func:`chunked_kl`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, how = inputs
        hidden, device = tensors[0], tensors[0].device.type
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.how = how
        ctx.dtype = _product_type(hidden)
        kl = torch.empty(len(hidden), dtype=_wide(hidden), device=hidden.device)
        agrees = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        with torch.autocast(device, enabled=False), how.gathered(*_weights(tensors)):
            for place, logits, teacher in _tiles(tensors, how, ctx.dtype):
                student = (logits / how.temperature).log_softmax(-1)
                agrees[place] = student.argmax(-1) == teacher.argmax(-1)
                kl[place] = (teacher.exp() * (teacher - student)).sum(-1)
        ctx.mark_non_differentiable(agrees)
        return kl, agrees

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_kl: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        tensors, how, device = ctx.saved_tensors, ctx.how, ctx.saved_tensors[0].device.type
        if grad_kl is None:
            return (None,) * 7
        hidden, wide = tensors[0], _wide(tensors[0])
        with torch.autocast(device, enabled=False), how.gathered(*_weights(tensors)):
            grads = [
                torch.zeros(tensor.shape, dtype=wide, device=tensor.device) if needed else None
                for tensor, needed in zip(tensors[:3], ctx.needs_input_grad, strict=False)
            ]
            weight = _operand(tensors[1], ctx.dtype, wide)
            for place, logits, teacher in _tiles(tensors, how, ctx.dtype):
                # Not softmax, which rounds otherwise: a student that is its teacher has gradient 0.
                grad = (logits / how.temperature).log_softmax(-1).exp_().sub_(teacher.exp_())
                grad *= (how.student.scale / how.temperature * grad_kl[place].to(wide))[:, None]
                if how.student.softcap is not None:
                    grad *= 1 - (logits / how.student.softcap) ** 2
                if grads[2] is not None:
                    grads[2] += grad.sum(0)
                rounded = _operand(grad, ctx.dtype, wide)
                if grads[0] is not None:
                    grads[0][place] = _product(rounded, weight, wide)
                if grads[1] is not None:
                    grads[1] += _product(rounded.t(), _operand(hidden[place], ctx.dtype, wide), wide)
        found = [None if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors, strict=False)]
        return (*found, None, None, None, None)


def _weights(tensors: Any) -> tuple[Tensor | None, ...]:
    _, weight, bias, _, teacher_weight, teacher_bias = tensors
    return weight, bias, teacher_weight, teacher_bias


def _tiles(tensors: Any, how: _How, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of each chunk its place, the student's logits and the teacher's log-probs, [tokens, V] each."""
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = tensors
    wide = _wide(hidden)
    ours, theirs = (_operand(matrix, dtype, wide).t() for matrix in (weight, teacher_weight))
    for start in range(0, len(hidden), how.chunk):
        place = slice(start, start + how.chunk)
        logits = _shaped(_product(_operand(hidden[place], dtype, wide), ours, wide), bias, how.student)
        teacher = _shaped(
            _product(_operand(teacher_hidden[place], dtype, wide), theirs, wide), teacher_bias, how.teacher
        )
        yield place, logits, (teacher / how.temperature).log_softmax(-1)


def _shaped(logits: Tensor, bias: Tensor | None, form: HeadForm) -> Tensor:
    """What a head makes of its product."""
    if bias is not None:
        logits += bias.to(logits.dtype)
    if form.scale != 1:
        logits *= form.scale
    return logits if form.softcap is None else torch.tanh(logits / form.softcap) * form.softcap


def _product_type(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _operand(matrix: Tensor, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
    """A matrix rounded to ``dtype``: in that type on a GPU, where products widen of themselves, else in ``wide``."""
    rounded = matrix.to(dtype)
    return rounded if matrix.is_cuda else rounded.to(wide)


def _product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    return left @ right if left.dtype == wide else torch.mm(left, right, out_dtype=wide)
