"""What is run is compared first: a model's log-probs as a program computes them with those the model itself gives.

Programs never build logits. They take log-probs from a fused head, of rows that stand beside others in a batch or share
a prompt in one packed row. That this gives what the model gives for a row of its own is true of most models and false
of some: a head that does more than multiply, a position encoding that changes with the longest row, a window that a
packed row outgrows, attention that sees later tokens. None of it shows in a loss. So every model that is to be scored
or trained is run on one or two rows before anything else, with the adapters, the attention and the precision of the
run, and what differs is refused.

Every function here is a collective: all processes run the same rows, and a problem of one is a problem of all.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py): the ``fused_lm_head`` input of
``trl.trainer.utils.add_fused_lm_head``; ``rope_parameters`` of transformers' configs, with the types ``dynamic`` and
``longrope`` of ``modeling_rope_utils.dynamic_rope_update``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, gather_object
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from alignkit.data.lengths import RowLengths
from alignkit.data.prefix import Layout
from alignkit.errors import ModelError
from alignkit.models._forward import (
    LOGP_TOLERANCE,
    base_model,
    compute_precision,
    score_rows,
    use_packed_attention,
)
from alignkit.models.modes import evaluating
from alignkit.models.positions import LEARNED_POSITIONS, positions_of

CHECKED_TOKENS = 64
"""Of one row, for what a head does and what a token sees: both show at any length, and logits take memory."""
COMPARED_SHARE = {"float32": 1.0}
"""Share of the tokens that must agree within ``LOGP_TOLERANCE``, by precision; 99 % where not listed.

In 16 bits a logit of 32 is 0.25 from the next, so that among thousands of tokens a few exceed any tolerance.
"""


@dataclass(frozen=True)
class ScoringRun:
    """A model as a program runs it.

    Attributes:
        name: What it is in the run: the policy, the reference.
        model: With its completion head, wrapped or not, on its device.
        precision: Key of ``LOGP_TOLERANCE``.
        context: In force while it is run: autocast, the reference's adapter.
        temperature: What the logits are divided by before log-probs are taken.
    """

    name: str
    model: nn.Module
    precision: str
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    temperature: float = 1.0

    @property
    def base(self) -> nn.Module:
        """The transformers model itself."""
        return base_model(extract_model_from_parallel(self.model))

    @property
    def label(self) -> str:
        """The model in a message."""
        return f"{self.name}, {type(self.base).__name__}"

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Evaluation mode without gradient; modes, attention and random state afterwards as before."""
        device = next(self.model.parameters()).device
        text_config: Any = self.base.config.get_text_config()  # type: ignore[operator, union-attr]
        attention = text_config._attn_implementation
        forked = torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
        with torch.no_grad(), forked, evaluating(self.model), self.context():
            try:
                yield
            finally:
                if text_config._attn_implementation != attention:
                    self.base.set_attn_implementation(attention)  # type: ignore[operator]

    def logps(self, rows: Sequence[Mapping[str, Any]], layout: Layout = "padded", *, of: int = 0) -> Tensor:
        """Log-probs of one of ``rows``, run in one batch with the others; its candidates behind one another."""
        device = next(self.model.parameters()).device
        scores = score_rows(self.model, rows, pad_token_id=0, layout=layout, batch_size=len(rows), device=device)
        return torch.tensor([x for candidate in scores[of] for x in candidate])


def runs_only_in_training(trainer: Any) -> bool:
    """Whether the policy of a trainer can be run only once training has begun: before, no process has its weights."""
    return bool(is_deepspeed_zero3_enabled()) or bool(trainer.is_fsdp_enabled)


class CompareWhenTrainingBegins(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Compares a model that cannot run before it is sharded.

    Args:
        compare: Does it, and refuses.
    """

    def __init__(self, compare: Callable[[], None]) -> None:
        self.compare = compare

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """Compare before the first step."""
        self.compare()


def refuse_other_scores(run: ScoringRun, lengths: RowLengths) -> None:
    """Refuse a model whose log-probs would not be its own.

    Args:
        run: The model, as it will be run.
        lengths: The rows it will be run on.

    Raises:
        ModelError: Its tokens see later ones, the fused head gives other log-probs than the model's logits, or a row's
            log-probs depend on the rows beside it.
    """
    config: Any = run.base.config
    positions, longest = positions_of(config), int(lengths.longest.max())
    if config.model_type in LEARNED_POSITIONS and positions is not None and longest > positions:
        raise ModelError(
            f"{run.label} has a table of {positions} positions and the longest row {longest} tokens. Write "
            f"max_length: {positions}, or less."
        )
    if run.base.base_model is run.base:
        raise ModelError(
            f"{run.label} has no backbone apart from its head under the name transformers knows it by "
            f"({run.base.base_model_prefix!r}), so TRL's fused head cannot be put on it. Take a model of another "
            "architecture."
        )
    with run.scoring():
        problem = _head_problem(run, lengths.longest_row) or _neighbour_problem(run, lengths)
    if problem := agreed(problem):
        raise ModelError(f"{problem}.")


def compare_with_itself(model: nn.Module, lengths: RowLengths, name: str, *, together: bool) -> ScoringRun:
    """Refuse a whole model whose log-probs on these rows would not be its own.

    Args:
        model: With its completion head, on its device.
        lengths: Of all rows it will score.
        name: What it is called in messages.
        together: Whether different rows stand in one batch.

    Returns:
        The model as it was run.

    Raises:
        ModelError: See :func:`refuse_other_scores` and :func:`length_dependence`.
    """
    if problem := length_dependence(model, lengths, together=together):
        raise ModelError(f"{name}, {problem}.")
    run = ScoringRun(name, model, compute_precision(model))
    refuse_other_scores(run, lengths)
    return run


def layout_difference(run: ScoringRun, row: Mapping[str, Any]) -> float:
    """How far apart the log-probs of ``row`` are in the two layouts, nats; not a collective.

    Args:
        run: The model, as it will be run.
        row: A candidate row, best the longest: what depends on length shows there.
    """
    with run.scoring():
        padded = run.logps([row])
        use_packed_attention(run.base)
        # The second of two, for rows that stand behind one another must not see each other.
        return disagreement(padded, run.logps([row, row], "packed", of=1), run.precision)


def layout_problem(run: ScoringRun, row: Mapping[str, Any]) -> str | None:
    """Why ``run`` cannot score packed rows, or None where ``row`` gives the same in both layouts.

    Args:
        run: The model, as it will be run; padded rows it can.
        row: See :func:`layout_difference`.
    """
    tolerance = LOGP_TOLERANCE[run.precision]
    try:
        difference = layout_difference(run, row)
    # A model's code may fail in any way on a mask or on positions it was not written for.
    except Exception as error:  # noqa: BLE001
        reason = str(error).strip().splitlines() or [""]
        problem: str | None = f"{run.label} cannot run packed rows ({type(error).__name__}: {reason[0][:200]})"
    else:
        found = f"the layouts differ by {difference:.2g} nats a token on {run.label} (tolerance {tolerance})"
        problem = None if difference <= tolerance else found
    return agreed(problem)


def disagreement(one: Tensor, other: Tensor, precision: str) -> float:
    """How far apart log-probs of the same tokens are, nats: the largest difference that is not put down to rounding.

    Args:
        one: Log-probs.
        other: The same, computed in another way.
        precision: Key of ``LOGP_TOLERANCE``.

    Returns:
        The difference; 0 where there is no token.
    """
    differences = (one.float() - other.float()).abs().sort().values
    if len(differences) == 0:
        return 0.0
    # Rounded up: of fewer than a hundred tokens every one counts, or a short row could hide a gross difference.
    kept = math.ceil(len(differences) * COMPARED_SHARE.get(precision, 0.99))
    # NaN is sorted to the end: it must not be among what is left out.
    return float("nan") if bool(differences.isnan().any()) else float(differences[kept - 1])


def agreed(problem: str | None) -> str | None:
    """The first problem that any process has; a collective."""
    return next((found for found in gather_object([problem]) if found is not None), None)


def _head_problem(run: ScoringRun, row: Mapping[str, Any]) -> str | None:
    """What is wrong with the head or with what tokens see, from one pass through each head.

    The batch is the beginning of ``row`` twice, with other tokens in its second half the second time.
    """
    ids = [*row["prompt_ids"], *row["completion_ids"][0]][:CHECKED_TOKENS]
    half, count = len(ids) // 2, len(ids)
    vocabulary = run.base.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
    device = next(run.model.parameters()).device
    tokens = torch.tensor([ids, [*ids[:half], *((i + 1) % vocabulary for i in ids[half:])]], device=device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    # Prompt-learning adapters put virtual tokens before the row; the row is at the end.
    logps = (run.model(**inputs).logits[:, -count:].float() / run.temperature).log_softmax(-1)
    if logps.isnan().any():
        return (
            f"{run.label}: its log-probs are no numbers (NaN). Its weights hold NaN or infinity, or overflow in "
            f"{run.precision}: give weights that are numbers, or write dtype: float32 without bf16 and fp16"
        )
    first = logps[:, :half].gather(-1, tokens[:1, 1 : half + 1, None].expand(2, -1, -1))
    tolerance = LOGP_TOLERANCE[run.precision]
    moved = disagreement(first[0, :, 0], first[1, :, 0], run.precision)
    if not moved <= tolerance:
        return (
            f"{run.label}: a token sees later ones. With other tokens behind it, its log-prob moves by {moved:.2g} "
            f"nats (tolerance {tolerance}), so scores are not those of generated text, and the model "
            "would learn to copy what it is to predict. This is an encoder, or its attention is bidirectional, or its "
            "routing mixes tokens. Take a causal language model"
        )
    own = logps[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    fused = run.model(**inputs, labels=tokens, fused_lm_head=True).log_probs
    difference = disagreement(own.flatten(), fused[:, fused.shape[1] - own.shape[1] :].flatten(), run.precision)
    if not difference <= tolerance:
        return (
            f"{run.label}: log-probs from TRL's fused head differ by {difference:.2g} nats a token from those of the "
            f"model's own logits (tolerance {tolerance}): its head does more than multiply by the output embeddings. "
            "Neither training nor scores would be this model's. Take a model of another architecture"
        )
    return None


def _neighbour_problem(run: ScoringRun, lengths: RowLengths) -> str | None:
    """What is wrong where the log-probs of the shortest sequence depend on the longest beside it."""
    if lengths.short_sequence == lengths.long_sequence:
        return None
    alone = run.logps([lengths.short_sequence])
    beside = run.logps([lengths.short_sequence, lengths.long_sequence])
    difference, tolerance = disagreement(alone, beside, run.precision), LOGP_TOLERANCE[run.precision]
    if difference <= tolerance:
        return None
    return (
        f"{run.label}: a row beside a longer one differs by {difference:.2g} nats a token from the same row alone "
        f"(tolerance {tolerance}), so its log-probs depend on which rows are in its batch. Write a max_length below "
        "the length at which the model changes, or take a model whose position encoding does not depend on the longest "
        "row"
    )


def length_dependence(model: nn.Module, lengths: RowLengths, *, together: bool) -> str | None:
    """Why rows of these lengths have no log-probs of their own under the model's rotary embedding, or None.

    ``longrope`` takes other frequencies for the whole batch when its longest row exceeds the original length, and
    ``dynamic`` other ones for every longest row so far, so that values depend on what was run before.

    Args:
        model: Plain, PEFT or wrapped.
        lengths: Of all rows.
        together: Whether different rows stand in one batch.
    """
    for kind, limit in _rope_limits(base_model(model)):
        if lengths.bound <= limit:
            continue
        is_past = lengths.longest > limit
        straddles = bool((is_past & (lengths.shortest <= limit)).any()) or not lengths.is_complete
        if kind == "longrope" and not straddles and (not together or bool(is_past.all())):
            continue
        return (
            f"{type(base_model(model)).__name__}, changes its position encoding ({kind}) for a whole batch when a row "
            f"in it is longer than {limit} tokens, and rows here have up to {lengths.bound}: a row's log-probs would "
            f"depend on which rows stand beside it. Write max_length: {limit}, or take a model with another rope_type"
        )
    return None


def _rope_limits(base: nn.Module) -> Iterator[tuple[str, int]]:
    config: Any = base.config
    parameters = config.get_text_config().to_dict().get("rope_parameters") or {}
    positions = positions_of(config)
    # One set of parameters, or one a kind of layer.
    for own in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        kind = own.get("rope_type", "default")
        if kind == "longrope":
            yield kind, own["original_max_position_embeddings"]
        elif "dynamic" in kind and positions is not None:
            yield kind, positions
