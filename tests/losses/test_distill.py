"""Distillation: the loss and the chunked KL against plain Python, their gradients, and what the KL holds in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alignkit.losses.chunked_kl import CHUNK_TOKENS, Head, HeadForm, chunked_kl
from alignkit.losses.distill import distill_loss
from alignkit.losses.sft import sft_loss
from alignkit.losses.types import LossOutput, TokenBatch
from tests.oracles import distill, forward_kl, head_logits

FORMS = [(1.0, None), (0.25, None), (1.0, 2.0), (1.5, 3.0)]
"""Plain heads, those of Granite and Cohere, those of Gemma 2, and both at once."""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers of a normal distribution, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def heads(
    scale: float = 1.0, softcap: float | None = None, bias: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[Head, Head]:
    """Of a student of width 3 and a teacher of width 5, over 11 tokens; the teacher's head is of another form."""
    form, other = HeadForm(scale, softcap), HeadForm(1 / scale, softcap)
    biases = [draw(11, seed=seed, dtype=dtype) if bias else None for seed in (3, 4)]
    weights = draw(11, 3, seed=1, dtype=dtype), draw(11, 5, seed=2, dtype=dtype)
    return Head(weights[0], biases[0], form), Head(weights[1], biases[1], other)


@pytest.mark.parametrize(("scale", "softcap"), FORMS)
@pytest.mark.parametrize(("bias", "temperature", "chunk"), [(False, 1.0, 1), (True, 2.5, 2), (True, 0.7, 100)])
def test_the_chunked_kl_is_the_definition(
    scale: float, softcap: float | None, bias: bool, temperature: float, chunk: int
) -> None:
    student, teacher = heads(scale, softcap, bias)
    hidden, teacher_hidden = draw(40, 3, seed=5), draw(40, 5, seed=6)
    kl, agrees = chunked_kl(hidden, student, teacher_hidden, teacher, temperature=temperature, chunk=chunk)
    logits = [
        [
            head_logits(h, head.weight.tolist(), None if head.bias is None else head.bias.tolist(), s, softcap)
            for h in states.tolist()
        ]
        for states, head, s in ((hidden, student, scale), (teacher_hidden, teacher, 1 / scale))
    ]
    expected = [forward_kl(y, z, temperature) for z, y in zip(*logits, strict=True)]
    assert kl.tolist() == pytest.approx(expected, abs=1e-12) and min(expected) > 1e-3
    assert agrees.tolist() == [z.index(max(z)) == y.index(max(y)) for z, y in zip(*logits, strict=True)]
    assert {True, False} == set(agrees.tolist())


@pytest.mark.parametrize(("scale", "softcap"), FORMS)
def test_the_gradient_is_that_of_finite_differences(scale: float, softcap: float | None) -> None:
    student, teacher = heads(scale, softcap, bias=True)
    teacher_hidden = draw(5, 5, seed=6)

    def kl(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = Head(weight, bias, student.form)
        return chunked_kl(hidden, head, teacher_hidden, teacher, temperature=1.7, chunk=2)[0]

    inputs = (draw(5, 3, seed=5), student.weight, student.bias)
    assert torch.autograd.gradcheck(kl, tuple(tensor.clone().requires_grad_() for tensor in inputs))


def test_the_teacher_gets_no_gradient_and_what_is_frozen_none_either() -> None:
    student, teacher = heads(bias=True)
    hidden, teacher_hidden = draw(4, 3), draw(4, 5).requires_grad_()
    hidden.requires_grad_(), teacher.weight.requires_grad_()
    kl, agrees = chunked_kl(hidden, student, teacher_hidden, teacher)
    kl.sum().backward()
    assert hidden.grad is not None and bool(hidden.grad.any()) and not agrees.requires_grad
    assert teacher_hidden.grad is None and teacher.weight.grad is None and student.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_that_is_its_teacher_has_no_kl_and_no_gradient(dtype: torch.dtype) -> None:
    head, _ = heads(1.5, 3.0, bias=True, dtype=dtype)
    hidden = draw(6, 3, dtype=dtype).requires_grad_()
    head.weight.requires_grad_()
    kl, agrees = chunked_kl(hidden, head, hidden.detach(), head, temperature=2.0, chunk=4)
    kl.sum().backward()
    assert kl.dtype == torch.float32 and not kl.any() and bool(agrees.all())
    assert hidden.grad is not None and hidden.grad.dtype == dtype and not hidden.grad.any()
    assert head.weight.grad is not None and not head.weight.grad.any()


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation puts out."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(dtype: torch.dtype) -> None:
    """400 tokens and a vocabulary of 1000 would make 400,000 logits; a chunk of 8 makes 8,000, more than the weight."""
    hidden, weight = draw(400, 3, dtype=dtype).requires_grad_(), draw(1000, 3, dtype=dtype).requires_grad_()
    head, teacher = Head(weight, None, HeadForm(2.0, 9.0)), Head(draw(1000, 5, seed=1, dtype=dtype))
    with LargestTensor() as seen:
        chunked_kl(hidden, head, draw(400, 5, seed=2, dtype=dtype), teacher, chunk=8)[0].sum().backward()
    assert seen.largest == 8 * 1000
    assert CHUNK_TOKENS * 151_936 * 4 < 2**28, "a chunk of a large vocabulary is below 256 MB"


def test_no_token_is_a_differentiable_nothing() -> None:
    student, teacher = heads()
    hidden = draw(0, 3).requires_grad_()
    student.weight.requires_grad_()
    kl, agrees = chunked_kl(hidden, student, draw(0, 5), teacher)
    kl.sum().backward()
    assert kl.shape == agrees.shape == (0,)
    assert student.weight.grad is not None and not student.weight.grad.any()


def test_products_are_of_the_type_of_autocast_and_the_rest_is_float32() -> None:
    """Of inputs that bfloat16 holds exactly, autocast changes no product; the KL is not rounded to three digits."""
    student, teacher = heads(dtype=torch.bfloat16)
    exact = [Head(head.weight.float()) for head in (student, teacher)]
    hidden, teacher_hidden = draw(9, 3, dtype=torch.bfloat16), draw(9, 5, seed=1, dtype=torch.bfloat16)
    expected, _ = chunked_kl(hidden.double(), *_double(exact[0], teacher_hidden, exact[1]))
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = chunked_kl(hidden.float(), exact[0], teacher_hidden.float(), exact[1])
    outside, _ = chunked_kl(hidden, student, teacher_hidden, teacher)
    for kl in (inside, outside):
        assert kl.dtype == torch.float32
        torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-6)


def _double(head: Head, teacher_hidden: Tensor, teacher: Head) -> tuple[Head, Tensor, Head]:
    return Head(head.weight.double()), teacher_hidden.double(), Head(teacher.weight.double())


def test_weights_are_gathered_in_both_passes() -> None:
    """Under ZeRO-3 no process holds a whole head outside of these."""
    student, teacher = heads(bias=True)
    hidden, entered = draw(4, 3).requires_grad_(), []

    @contextmanager
    def gathered(*parts: Tensor | None) -> Iterator[None]:
        entered.append([None if part is None else part.data_ptr() for part in parts])
        yield

    kl, _ = chunked_kl(hidden, student, draw(4, 5), teacher, gathered=gathered)
    parts = [student.weight, student.bias, teacher.weight, teacher.bias]
    assert entered == [[part.data_ptr() for part in parts if part is not None]]
    kl.sum().backward()
    assert len(entered) == 2 and entered[0] == entered[1]


# --- the loss ---------------------------------------------------------------------------------------------------------


def rows_of(dtype: torch.dtype = torch.float64) -> TokenBatch:
    """Two rows, of whose masked tokens both numbers are there too."""
    logps = torch.tensor([[-1.0, -2.5, -4.0], [-0.5, -3.0, -7.0]], dtype=dtype, requires_grad=True)
    kl = torch.tensor([[0.25, 9.0, 1.5], [8.0, 0.75, math.nan]], dtype=dtype, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    return TokenBatch(logps, mask, kl, torch.tensor([[True, True, False], [True, True, True]]))


def check_loss(loss: Callable[..., LossOutput]) -> None:
    """The definition on given rows; tests/losses/test_mutations.py calls this."""
    trained = [[(-1.0, 0.25), (-4.0, 1.5)], [(-3.0, 0.75)]]
    for alpha, temperature in ((0.3, 2.0), (0.5, 1.0), (1.0, 3.0)):
        batch = rows_of()
        result = loss(batch, kd_alpha=alpha, kd_temperature=temperature)
        nll, kl = result.terms
        assert (nll.name, nll.item, int(nll.num_items)) == ("nll", "token", 3)
        assert (kl.name, kl.item, int(kl.num_items)) == ("kl", "token", 3)
        assert nll.values.tolist() == [1.0, 0.0, 4.0, 0.0, 3.0, 0.0]
        assert kl.values.tolist() == [0.25, 0.0, 1.5, 0.0, 0.75, 0.0]
        assert result.mean().item() == pytest.approx(distill(trained, alpha, temperature), abs=1e-12)
        assert kl.values.requires_grad and nll.values.requires_grad == (alpha != 1)
        metric = result.metrics["distill/top1_agreement"]
        assert metric.values.tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        assert metric.counts is not None and metric.counts.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    (alone,) = loss(rows_of(), kd_alpha=0.0, kd_temperature=2.0).terms
    assert (alone.name, alone.weight, alone.values.tolist()) == ("nll", 1.0, [1.0, 0.0, 4.0, 0.0, 3.0, 0.0])
    for lacking in (("teacher_kl",), ("teacher_agrees",)):
        given = {**vars(rows_of()), **dict.fromkeys(lacking)}
        with pytest.raises(ValueError, match="carries no divergence"):
            loss(TokenBatch(**given), kd_alpha=0.5, kd_temperature=1.0)


def test_the_loss_on_given_rows() -> None:
    check_loss(distill_loss)


def test_without_the_teacher_it_is_supervised_fine_tuning_to_the_last_bit() -> None:
    batch = TokenBatch(draw(3, 4, dtype=torch.float32), torch.ones(3, 4, dtype=torch.bool))
    ours, theirs = distill_loss(batch, kd_alpha=0.0, kd_temperature=2.0), sft_loss(batch)
    assert torch.equal(ours.mean(), theirs.mean()) and not ours.metrics


def test_the_gradient_goes_to_trained_tokens_alone() -> None:
    batch = rows_of()
    distill_loss(batch, kd_alpha=0.25, kd_temperature=2.0).mean().backward()
    assert batch.policy_token_logps.grad is not None and batch.teacher_kl is not None
    assert batch.teacher_kl.grad is not None
    assert batch.policy_token_logps.grad.tolist() == [[-0.25, 0.0, -0.25], [0.0, -0.25, 0.0]]
    torch.testing.assert_close(batch.teacher_kl.grad, batch.label_mask.double() / 3)


def test_the_temperature_does_not_change_how_strongly_a_near_teacher_pulls() -> None:
    """T^2 makes up for the gradient's 1/T^2 where logits are small beside T: both differ by terms of higher order."""
    head, _ = heads()
    hidden = 0.01 * draw(6, 3)
    norms = []
    for temperature in (2.0, 20.0):
        student = (hidden + 0.001 * draw(6, 3, seed=9)).requires_grad_()
        kl, agrees = chunked_kl(student, head, hidden, head, temperature=temperature)
        batch = TokenBatch(draw(1, 6), torch.ones(1, 6, dtype=torch.bool), kl[None], agrees[None])
        distill_loss(batch, kd_alpha=1.0, kd_temperature=temperature).mean().backward()
        assert student.grad is not None
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.02) and norms[0] > 0
