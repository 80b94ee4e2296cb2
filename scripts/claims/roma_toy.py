"""A toy for RoMA (arXiv 2511.07419): six tasks, a mixture of experts that knows them, and routers that were damaged.

A prompt is an instruction and two numbers modulo 11; the answer is one number. An instruction names one of six
functions and has six paraphrases. The model is an OLMoE of 4 layers and 12 experts, two of which work on a token, with
weights that are not renormalised. It is pretrained on all of it, and then noise is added to the last two routers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

MODULUS, TASKS, PARAPHRASES = 11, 6, 6
ROUTERS, EXPERTS, ACTIVE = 2, 12, 2
"""Routers that are trained, the last ones; experts of a layer, and how many of them work on a token."""
SIGN = MODULUS + TASKS * PARAPHRASES
"""The token after the numbers, at which the answer is given."""
SEEN = PARAPHRASES // 2
"""Paraphrases that labelled samples have; the others are met in the test only."""
TEST, VALIDATION = 2000, 120


@dataclass(frozen=True)
class Samples:
    """Prompts [N, 4], answers [N], tasks [N], and embeddings [N, 6] of the instructions."""

    prompts: Tensor
    answers: Tensor
    tasks: Tensor
    embeddings: Tensor

    def rows(self, index: Tensor) -> Samples:
        """Some of the samples."""
        return Samples(self.prompts[index], self.answers[index], self.tasks[index], self.embeddings[index])


@dataclass(frozen=True)
class Split:
    """Labelled samples of the seen paraphrases to train on and to choose with, and those of the test, of all."""

    train: Samples
    validation: Samples
    test: Samples


def all_samples(seed: int, spread: float = 0.3) -> Samples:
    """Every instruction with every two numbers, 4356 in all.

    Args:
        seed: Of the embeddings: the task, one-hot, with noise.
        spread: Standard deviation of that noise.
    """
    task, paraphrase, a, b = torch.cartesian_prod(
        torch.arange(TASKS), torch.arange(PARAPHRASES), torch.arange(MODULUS), torch.arange(MODULUS)
    ).T
    functions = torch.stack([a + b, a - b, a * b, 2 * a + b, a + 3 * b, a * a + b]) % MODULUS
    answers = functions.gather(0, task.unsqueeze(0)).squeeze(0)
    instruction = MODULUS + task * PARAPHRASES + paraphrase
    prompts = torch.stack([instruction, a, b, torch.full_like(a, SIGN)], dim=1)
    noise = torch.randn(len(task), TASKS, generator=torch.Generator().manual_seed(seed))
    return Samples(prompts, answers, task, F.one_hot(task, TASKS) + spread * noise)


def draw_split(seed: int, num_train: int) -> Split:
    """Labelled samples of half of the paraphrases, and test samples of all of them; no sample is drawn twice.

    Args:
        seed: Of all draws.
        num_train: Training samples.
    """
    samples = all_samples(seed)
    order = torch.randperm(len(samples.tasks), generator=torch.Generator().manual_seed(1000 + seed))
    labelled = order[paraphrases(samples)[order] < SEEN][: num_train + VALIDATION]
    rest = order[~torch.isin(order, labelled)]
    parts = labelled[:num_train], labelled[num_train:], rest[:TEST]
    return Split(*(samples.rows(part) for part in parts))


def paraphrases(samples: Samples) -> Tensor:
    """Which paraphrase of its task's instruction a sample has [N], from 0."""
    return (samples.prompts[:, 0] - MODULUS) % PARAPHRASES


def new_model(seed: int) -> OlmoeForCausalLM:
    """The untrained model."""
    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=SIGN + 1,
        hidden_size=48,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        norm_topk_prob=False,
        router_aux_loss_coef=0.0,
        max_position_embeddings=8,
        pad_token_id=None,
        eos_token_id=None,
    )
    return OlmoeForCausalLM(config)


def routers(model: OlmoeForCausalLM) -> list[torch.nn.Parameter]:
    """Weights [12, 48] of the last two routers."""
    return [layer.mlp.gate.weight for layer in model.model.layers[-ROUTERS:]]


def answer_logits(model: OlmoeForCausalLM, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the answer [N, 48], and of the last two routers [N, 2, 12], both at the last token of the prompt."""
    output = model(prompts, output_router_logits=True, logits_to_keep=1, use_cache=False)
    routing = [logits.view(*prompts.shape, EXPERTS)[:, -1] for logits in output.router_logits[-ROUTERS:]]
    return output.logits[:, -1], torch.stack(routing, dim=1)


def pretrain(seed: int, *, task_routing: bool, until: float, batch_size: int = 256) -> OlmoeForCausalLM:
    """Train all weights on samples of every paraphrase.

    Args:
        seed: Of the weights and the batches.
        task_routing: Teach the last two routers to send task t to its own experts, 2 t and 2 t + 1. Otherwise they
            learn whatever they come to.
        until: Stop at this accuracy over all samples, asked for every 20 steps.
        batch_size: Samples a step.
    """
    model, samples = new_model(seed), all_samples(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    wanted = F.one_hot(torch.arange(EXPERTS) // ACTIVE, TASKS).T.float() / ACTIVE
    for step in count(1):
        batch = samples.rows(torch.randint(len(samples.tasks), (batch_size,), generator=generator))
        logits, routing = answer_logits(model, batch.prompts)
        loss = F.cross_entropy(logits, batch.answers)
        if task_routing:
            targets = wanted[batch.tasks].unsqueeze(1)
            loss = loss - (targets * routing.log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 and accuracy(model, samples) >= until:
            break
    return model


@torch.no_grad()
def damage(model: OlmoeForCausalLM, noise: float, seed: int) -> None:
    """Add Gaussian noise to the last two routers, ``noise`` times the standard deviation of their weights."""
    generator = torch.Generator().manual_seed(2000 + seed)
    for weight in routers(model):
        weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)


@torch.no_grad()
def accuracy(model: OlmoeForCausalLM, samples: Samples) -> float:
    """Share of right answers."""
    return float(is_right(answer_logits(model, samples.prompts)[0], samples).float().mean())


def is_right(logits: Tensor, samples: Samples) -> Tensor:
    """Whether the most likely number is the answer [N]."""
    return logits[:, :MODULUS].argmax(-1) == samples.answers
