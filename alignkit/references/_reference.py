"""The reference of a run: what it is, how rows are scored under it, and what is kept of the scores.

A bridge owns one :class:`Reference`. It knows of its trainer only what every trainer of transformers has, so that it
serves any batch shape.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- trl ``prepare_deepspeed``, ``prepare_fsdp``, ``disable_gradient_checkpointing`` and ``use_adapter``
- trl's adapter name ``ref`` for the frozen copy of an adapter that training continues
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import use_adapter

from alignkit.data.prefix import Layout
from alignkit.errors import ModelError
from alignkit.models._comparison import ScoringRun, runs_only_in_training
from alignkit.models._forward import (
    add_completion_head,
    base_model,
    completion_logps,
    compute_precision,
    score_rows,
    support_packed_rows,
)
from alignkit.models.modes import evaluating
from alignkit.parts.method import AnchorSchedule
from alignkit.references import _cache
from alignkit.references._anchor import ANCHOR, MovingAnchor, add_anchor_adapter
from alignkit.references._token_rewards import choose_pass_layout, refuse_long_sequences, with_token_rewards
from alignkit.references._token_rewards import default_cache_dir as token_reward_cache_dir
from alignkit.references.token_reward_report import TokenRewardReport, token_reward_report

Result = TypeVar("Result")


class Reference:
    """Scores rows under a model of its own, under the policy's adapter ``ref``, or under the policy without adapter.

    Args:
        host: The trainer whose policy it is the reference of, already constructed as far as its model, accelerator
            and arguments.
        model: A model of its own, with a completion head and placed (see :func:`placed`); None where the policy's own
            weights serve.
        negative: Another model for the last candidate of each row, as it was loaded; None scores all alike.
        pad_token_id: Fills the batches of rows that are scored ahead.
        cache: Directory of precomputed log-probs; None is the default one.
        token_reward_cache: Directory of the log-probs that token rewards are made of; None is the default one.
        forward: Token log-probs of one of the host's batches under a model.

    Attributes:
        anchor: What moves the reference; None for one that is frozen.
        token_reward_reports: What token rewards are like, by the name of their rows.
    """

    def __init__(
        self,
        host: Any,
        model: nn.Module | None = None,
        *,
        negative: nn.Module | None = None,
        pad_token_id: int,
        cache: Path | None = None,
        token_reward_cache: Path | None = None,
        forward: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] = completion_logps,
    ) -> None:
        self.host, self.model, self.negative, self.pad_token_id = host, model, negative, pad_token_id
        self.cache = _cache.ReferenceCache(cache or _cache.default_cache_dir())
        self.token_reward_cache = _cache.ReferenceCache(token_reward_cache or token_reward_cache_dir())
        self.forward = forward
        self.anchor: MovingAnchor | None = None
        self.token_reward_reports: dict[str, TokenRewardReport] = {}
        self._placed_negative: nn.Module | None = None
        self._engine: nn.Module | None = None
        self._is_released = False
        for base in self.bases():
            support_packed_rows(base)

    # --- which models ------------------------------------------------------------------------------------------------

    def bases(self) -> list[nn.Module]:
        """The transformers models that are run: the policy's and the reference's own."""
        models = [self.host.model, self.model, self.negative]
        return [base_model(self._plain(model)) for model in models if model is not None]

    def runs(self, *, ahead: bool) -> list[ScoringRun]:
        """The models that score and can be run before training begins, to be compared with themselves first.

        Args:
            ahead: Whether rows are scored ahead, for which the pieces of a sharded policy are brought together.
        """
        runs, precision = [], self.host.accelerator.mixed_precision
        in_pieces = runs_only_in_training(self.host)
        is_apart = self.model is not None or (in_pieces and ahead)
        if is_apart or (isinstance(self.host.model, PeftModel) and not in_pieces):
            model = self._ready() if in_pieces else self._in_training()
            own = self.host.model if self.model is None else base_model(self._plain(self.model))
            runs.append(ScoringRun("the reference", model, compute_precision(own, precision), self._scoring))
        if self.negative is not None:
            own = compute_precision(self.negative, precision)
            context = self.host.accelerator.autocast
            runs.append(ScoringRun("the helpful reference", self._negative(), own, context))
        return runs

    def release(self) -> None:
        """Let go of the models beside the policy, once every row of the run has been scored; before training begins."""
        if self.model is None and self.negative is None:
            return
        self.model = self.negative = self._placed_negative = None
        self._is_released = True
        self.host.accelerator.free_memory()  # it keeps all that it has prepared

    def run(self) -> ScoringRun:
        """The reference as it is run before training begins; under DeepSpeed a collective."""
        return ScoringRun("the reference", self._ready(), self.precision, self._scoring)

    def _plain(self, model: nn.Module) -> nn.Module:
        """The model inside whatever launches, shards or compiles it."""
        plain: nn.Module = self.host.accelerator.unwrap_model(model, keep_torch_compile=False)
        return plain

    def _adapter(self) -> str | None:
        has_copy = isinstance(self.host.model, PeftModel) and ANCHOR in self.host.model.peft_config
        return ANCHOR if has_copy else None

    def _in_training(self) -> nn.Module:
        """The reference as it is run while training."""
        if self._is_released:
            raise ModelError(
                "the reference model was let go when all rows of the run had been scored, so that it can score no "
                "others. Write reference: copy to keep it"
            )
        if self.model is None and not isinstance(self.host.model, PeftModel) and self.host.state.global_step > 0:
            raise ModelError(
                "the policy has been trained and there is no reference model left to score these rows with. Write "
                "reference: copy to keep one"
            )
        # Not `or`, which asks a model for its length: a compiled one has none.
        return self.host.model if self.model is None else self.model

    def _ready(self) -> nn.Module:
        """The reference as it can be run before training begins."""
        if self.model is not None or not self.host.is_deepspeed_enabled:
            return self._in_training()
        if self._engine is None:
            self._engine = prepare_deepspeed(self.host.model, self.host.accelerator)
        return self._engine

    def _negative(self) -> nn.Module:
        """The second reference, prepared when first used."""
        if self._placed_negative is None:
            assert self.negative is not None
            self._placed_negative = placed(self.negative, self.host)
        return self._placed_negative

    @contextlib.contextmanager
    def _in_force(self) -> Iterator[None]:
        """The reference in force and without dropout, which the policy it may live in keeps for its own passes."""
        policy = self.host.model
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(policy if self.model is None else self.model))
            stack.enter_context(disable_gradient_checkpointing(policy, self.host.args.gradient_checkpointing_kwargs))
            if self.model is None and isinstance(policy, PeftModel):
                stack.enter_context(use_adapter(policy, adapter_name=self._adapter()))
            yield

    @contextlib.contextmanager
    def _scoring(self) -> Iterator[None]:
        with self._in_force(), self.host.accelerator.autocast():
            yield

    # --- a reference that moves --------------------------------------------------------------------------------------

    @property
    def moves(self) -> bool:
        """Whether it follows the policy."""
        return self.anchor is not None

    def follow(self, schedule: AnchorSchedule) -> MovingAnchor:
        """Follow the policy from now on; before anything is sharded.

        Returns:
            What the reference has become, which belongs in every checkpoint of the host.

        Raises:
            ModelError: The weights are sharded by FSDP, or too coarse for an average.
        """
        if self.host.is_fsdp_enabled:
            raise ModelError(
                "a moving anchor is not available under FSDP. Use DDP or DeepSpeed, or write anchor: fixed"
            )
        policy = self._plain(self.host.model)
        if isinstance(policy, PeftModel) and self.model is None:
            add_anchor_adapter(policy)
        own = None if self.model is None else self._plain(self.model)
        self.anchor = MovingAnchor(schedule, self.host.accelerator, policy, own)
        self.host.add_callback(self.anchor)
        return self.anchor

    # --- scoring -----------------------------------------------------------------------------------------------------

    @property
    def precision(self) -> str:
        """Key of ``LOGP_TOLERANCE`` that the host computes in; part of the keys of the caches."""
        return compute_precision(self.host.model, self.host.accelerator.mixed_precision)

    @torch.no_grad()
    def seen_by(self, forward: Callable[[nn.Module], Result]) -> Result:
        """What a pass gives under the reference, as it is run while training.

        Args:
            forward: The pass, of the model it is given.
        """
        with self._in_force():
            return forward(self._in_training())

    @torch.no_grad()
    def token_logps(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Token log-probs of a collated batch, [B, K, T] of candidate rows.

        With a reference of its own for the negative, the last candidate of each row is scored by that one.
        """
        logps = self.seen_by(lambda model: self.forward(model, inputs))
        if self.negative is None:
            return logps
        last = inputs["candidate_mask"].sum(-1, keepdim=True) - 1
        is_negative = torch.arange(logps.shape[1], device=logps.device) == last
        return torch.where(is_negative[..., None], self.forward(self._negative(), inputs), logps)

    def score(self, rows: Dataset, title: str, *, batch_size: int, layout: Layout) -> _cache.Scores:
        """Token log-probs of all candidate rows on every rank, which each computes a share of; a collective.

        Args:
            rows: Candidate rows.
            title: Of the progress bar.
            batch_size: Rows a forward pass.
            layout: ``padded`` or ``packed``.
        """
        share, accelerator = self._share(len(rows)), self.host.accelerator
        model = self._ready()

        def score(scored_by: nn.Module, chosen: Dataset, progress: str) -> _cache.Scores:
            return score_rows(
                scored_by,
                chosen,
                pad_token_id=self.pad_token_id,
                layout=layout,
                batch_size=batch_size,
                device=accelerator.device,
                progress=progress if accelerator.is_local_main_process else None,
            )

        with self._scoring():
            scores = score(model, rows.select(share), title)
            if self.negative is not None:
                other = score(self._negative(), rows.select(share), f"{title}, negatives")
                scores = [[*ours[:-1], theirs[-1]] for ours, theirs in zip(scores, other, strict=True)]
        gathered = dict(gather_object(list(zip(share, scores, strict=True))))
        return [gathered[i] for i in range(len(rows))]

    def _share(self, num_rows: int) -> list[int]:
        """This rank's row indices; as many on every rank, the last row being repeated where they run out."""
        ranks, rank = self.host.accelerator.num_processes, self.host.accelerator.process_index
        return [min(i * ranks + rank, num_rows - 1) for i in range(-(-num_rows // ranks))]

    # --- what is kept ------------------------------------------------------------------------------------------------

    def precomputed(self, rows: Dataset, name: str, *, batch_size: int, layout: Layout) -> Dataset:
        """Candidate rows with ``ref_token_logps`` [K][tokens], from the cache or computed and stored; a collective.

        Args:
            rows: Candidate rows.
            name: What they are called.
            batch_size: Rows a forward pass.
            layout: ``padded`` or ``packed``.
        """
        weights = _cache.model_fingerprint(self._plain(self._in_training()), self._adapter())
        if self.negative is not None:
            weights += _cache.model_fingerprint(self._plain(self._negative()), None)

        def score(chosen: Dataset) -> _cache.Scores:
            title = f"Reference log-probs of {len(chosen)} {name} rows"
            return self.score(chosen, title, batch_size=batch_size, layout=layout)

        path = self.cache.path(weights, self.precision, _cache.token_ids_fingerprint(rows))
        return _cache.with_reference(rows, cache=self.cache, path=path, precision=self.precision, score=score)

    def token_rewarded(self, rows: Any, name: str, *, batch_size: int, layout: Literal["auto", Layout]) -> Any:
        """Rows with their ``token_rewards``, from contrast prompts where they bring none; a collective.

        What the rewards are like is kept in ``token_reward_reports``. A stream, or nothing, comes back as it is.

        Args:
            rows: Candidate rows.
            name: What they are called.
            batch_size: Rows a forward pass.
            layout: The ``layout`` that the config asks for.

        Raises:
            DataError: A contrast prompt with its completion is longer than the model takes.
        """
        if not isinstance(rows, Dataset):
            return rows
        if "better_prompt_ids" not in rows.column_names:
            self.token_reward_reports[name] = token_reward_report(rows)
            return rows
        model = self._plain(self._in_training())
        refuse_long_sequences(rows, model, name)
        chosen = choose_pass_layout(layout, model, rows, run=self.run())
        rewarded, self.token_reward_reports[name] = with_token_rewards(
            rows,
            cache=self.token_reward_cache,
            weights=_cache.model_fingerprint(model, self._adapter()),
            precision=self.precision,
            layout=chosen,
            score=partial(self.score, batch_size=batch_size, layout=chosen.layout),
        )
        return rewarded


def placed(model: nn.Module, host: Any, temperature: float = 1.0) -> nn.Module:
    """A model beside the policy with its completion head, sharded and placed as the policy will be.

    Args:
        model: As it was loaded.
        host: The trainer of the policy.
        temperature: What its log-probs are taken at.
    """
    add_completion_head(model, temperature)
    if host.is_deepspeed_enabled:
        model = prepare_deepspeed(model, host.accelerator)
    elif host.is_fsdp_enabled:
        model = prepare_fsdp(model, host.accelerator)
    else:
        model = host.accelerator.prepare_model(model, evaluation_mode=True)
    model.eval()  # DeepSpeed's engine returns nothing here
    return model
