"""How the preference bridge scores rows under the reference: its own model, the adapter ``ref``, or no adapter.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- trl ``DPOTrainer._precompute_ref_logps(dataset, name, batch_size)`` and ``_precompute_engine``
- trl ``DPOTrainer.ref_model`` and the adapter name ``ref`` for a continued adapter
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import use_adapter

from alignkit.data.lengths import RowLengths
from alignkit.data.prefix import CandidateCollator, Layout
from alignkit.errors import ModelError
from alignkit.models._aux_loss import check_aux_loss
from alignkit.models._comparison import CompareWhenTrainingBegins, ScoringRun, layout_problem, refuse_other_scores
from alignkit.models._forward import (
    add_completion_head,
    base_model,
    completion_logps,
    compute_precision,
    score_rows,
    support_packed_rows,
    use_packed_attention,
)
from alignkit.models._layouts import LayoutChoice, confirmed
from alignkit.models.modes import evaluating
from alignkit.parts.method import AnchorSchedule
from alignkit.references import _cache as reference
from alignkit.references._anchor import MovingAnchor, add_anchor_adapter
from alignkit.references._token_rewards import choose_pass_layout, refuse_long_sequences, with_token_rewards
from alignkit.references._token_rewards import default_cache_dir as token_reward_cache_dir
from alignkit.references.token_reward_report import TokenRewardReport, token_reward_report


class ReferenceScoring(DPOTrainer):
    """The part of the preference trainer that has to do with the reference.

    A subclass sets ``settings`` (with ``reference_cache`` and ``negative_reference``), ``needs``, ``lengths`` of all
    rows and ``layout`` before TRL's constructor runs.
    """

    lengths: RowLengths
    layout: LayoutChoice
    data_collator: CandidateCollator
    train_dataset: Any
    eval_dataset: Any

    _precompute_engine: nn.Module | None
    anchor: MovingAnchor | None = None
    _negative_reference: nn.Module | None = None
    _is_compared = False

    def _set_up_anchor(self, schedule: AnchorSchedule | None) -> None:
        """Let the reference follow the policy; after TRL's constructor, before anything is sharded.

        Raises:
            ModelError: The weights are sharded by FSDP, or too coarse for an average.
        """
        if schedule is None:
            return
        if self.is_fsdp_enabled:
            raise ModelError(
                "a moving anchor is not available under FSDP. Use DDP or DeepSpeed, or write anchor: fixed"
            )
        policy = self._plain(self.model)
        if isinstance(policy, PeftModel) and self.ref_model is None:
            add_anchor_adapter(policy)
        reference = None if self.ref_model is None else self._plain(self.ref_model)
        self.anchor = MovingAnchor(schedule, self.accelerator, policy, reference)
        self.add_callback(self.anchor)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; a moving anchor continues from the checkpoint as well."""
        if self.anchor is not None and resume_from_checkpoint:
            found = resume_from_checkpoint
            path = get_last_checkpoint(self.args.output_dir) if isinstance(found, bool) else found
            self.anchor.resume_from = None if path is None else Path(path)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # --- what is run is compared first ------------------------------------------------------------------------------

    @property
    def shards_policy(self) -> bool:
        """Whether the policy can be run only once training has begun: before, no process has its weights."""
        return is_deepspeed_zero3_enabled() or self.is_fsdp_enabled

    def compare_models(self) -> None:
        """Compare every model of the run with itself, once, before its first use; a collective.

        Raises:
            ModelError: Scores would not be a model's own, or ``shared_prefix`` was asked for and one cannot run it.
        """
        if self._is_compared:
            return
        self._is_compared = True
        for base in self._bases():
            support_packed_rows(base)
        runs = self._scoring_runs()
        for run in runs:
            refuse_other_scores(run, self.lengths)
        self.take_layout(confirmed(self.layout, runs, self.lengths))
        if self.shards_policy:
            self.add_callback(CompareWhenTrainingBegins(self._compare_sharded_policy))

    def take_layout(self, choice: LayoutChoice) -> None:
        """Run rows in a layout from now on, under every model; not between a forward pass and its backward pass."""
        self.layout = choice
        self.data_collator = replace(self.data_collator, layout=choice.layout)
        if choice.layout == "shared_prefix":
            for base in self._bases():
                use_packed_attention(base, choice.attention)

    def _bases(self) -> list[nn.Module]:
        models = [self.model, self.ref_model, self.settings.negative_reference]
        return [base_model(self._plain(model)) for model in models if model is not None]

    def _scoring_runs(self) -> list[ScoringRun]:
        """The models that can be run before training begins."""
        autocast, precision = self.accelerator.autocast, self.accelerator.mixed_precision
        runs = []
        if not self.shards_policy:
            # DeepSpeed places the policy when training begins.
            if next(self.model.parameters()).device.type != self.accelerator.device.type:
                self.model.to(self.accelerator.device)
            runs.append(ScoringRun("the policy", self.model, compute_precision(self.model, precision), autocast))
        is_apart = self.ref_model is not None or (self.shards_policy and self.args.precompute_ref_log_probs)
        if "reference" in self.needs and (is_apart or isinstance(self.model, PeftModel) and not self.shards_policy):
            model = self._reference_engine() if self.shards_policy else self._reference_model()
            own = compute_precision(self._bases()[1] if self.ref_model is not None else self.model, precision)
            runs.append(ScoringRun("the reference", model, own, self._scoring_mode))
        if self.settings.negative_reference is not None:
            own = compute_precision(self.settings.negative_reference, precision)
            runs.append(ScoringRun("the helpful reference", self._placed_negative_reference(), own, autocast))
        return runs

    def _compare_sharded_policy(self) -> None:
        if self.aux_loss_enabled:
            check_aux_loss(self.model_wrapped, self.router_aux_loss_coef)
        precision = compute_precision(self.model, self.accelerator.mixed_precision)
        run = ScoringRun("the policy", self.model_wrapped, precision, self.accelerator.autocast)
        refuse_other_scores(run, self.lengths)
        if self.layout.layout == "shared_prefix" and (problem := layout_problem(run, self.lengths.longest_row)):
            # The dataloaders are there already, so this cannot be decided for the user any more.
            raise ModelError(f"packed rows cannot be used: {problem}. Write `layout: padded`.")

    @contextlib.contextmanager
    def _scoring_mode(self) -> Iterator[None]:
        with self._reference_mode(), self.accelerator.autocast():
            yield

    # --- scoring -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reference_logps(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Token log-probs [B, K, T] under the reference: its own model, the adapter ``ref``, or no adapter.

        With a reference of its own for the negative, the last candidate of each row is scored by that one.
        """
        with self._reference_mode():
            logps = completion_logps(self._reference_model(), inputs)
        if self.settings.negative_reference is None:
            return logps
        last = inputs["candidate_mask"].sum(-1, keepdim=True) - 1
        is_negative = torch.arange(logps.shape[1], device=logps.device) == last
        return torch.where(is_negative[..., None], completion_logps(self._placed_negative_reference(), inputs), logps)

    def _placed_negative_reference(self) -> nn.Module:
        """The second reference with its head, sharded and placed like the first; prepared when first used."""
        if self._negative_reference is None:
            model = self.settings.negative_reference
            add_completion_head(model)
            if self.is_deepspeed_enabled:
                model = prepare_deepspeed(model, self.accelerator)
            elif self.is_fsdp_enabled:
                model = prepare_fsdp(model, self.accelerator)
            else:
                model = self.accelerator.prepare_model(model, evaluation_mode=True)
            self._negative_reference = model.eval()
        return self._negative_reference

    def _plain(self, model: nn.Module) -> nn.Module:
        """The model inside whatever launches, shards or compiles it."""
        plain: nn.Module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return plain

    def _reference_model(self) -> nn.Module:
        if self.ref_model is None and not isinstance(self.model, PeftModel) and self.state.global_step > 0:
            raise ModelError(
                "the policy has been trained and there is no reference model left to score these rows with"
            )
        # Not `or`, which asks a model for its length: a compiled one has none.
        return self.model if self.ref_model is None else self.ref_model

    @contextlib.contextmanager
    def _reference_mode(self) -> Iterator[None]:
        """The reference in force and without dropout, which the policy it may live in keeps for its own passes."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(self.model if self.ref_model is None else self.ref_model))
            stack.enter_context(disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs))
            if self.ref_model is None and isinstance(self.model, PeftModel):
                stack.enter_context(use_adapter(self.model, adapter_name=self._reference_adapter()))
            yield

    def _reference_adapter(self) -> str | None:
        has_copy = isinstance(self.model, PeftModel) and "ref" in self.model.peft_config
        return "ref" if has_copy else None

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Attach ``ref_token_logps`` [K][tokens] to candidate rows."""
        if "reference" not in self.needs:
            return dataset
        self.compare_models()
        weights = reference.model_fingerprint(self._plain(self._reference_model()), self._reference_adapter())
        if self.settings.negative_reference is not None:
            weights += reference.model_fingerprint(self._plain(self._placed_negative_reference()), None)
        precision = compute_precision(self.model, self.accelerator.mixed_precision)
        cache = reference.ReferenceCache(self.settings.reference_cache or reference.default_cache_dir())
        return reference.with_reference(
            dataset,
            cache=cache,
            path=cache.path(weights, precision, reference.rows_fingerprint(dataset)),
            precision=precision,
            score=lambda rows: self._score_over_ranks(
                rows, f"Reference log-probs of {len(rows)} {name} rows", batch_size=batch_size
            ),
        )

    def _add_token_rewards(self) -> None:
        """Give rows that bring no token rewards the reference's; before training, a collective.

        Raises:
            DataError: A contrast prompt with its completion is longer than the model takes.
        """
        self.token_reward_reports: dict[str, TokenRewardReport] = {}
        self.train_dataset = self._with_token_rewards("train", self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            sets = self.eval_dataset.items()
            self.eval_dataset = {name: self._with_token_rewards(f"eval_{name}", rows) for name, rows in sets}
        else:
            self.eval_dataset = self._with_token_rewards("eval", self.eval_dataset)

    def _with_token_rewards(self, name: str, rows: Any) -> Any:
        """One set of rows with its token rewards, and their report kept; a stream, or nothing, as it is."""
        if not isinstance(rows, Dataset):
            return rows
        if "better_prompt_ids" not in rows.column_names:
            self.token_reward_reports[name] = token_reward_report(rows)
            return rows
        model = self._plain(self._reference_model())
        refuse_long_sequences(rows, model, name)
        precision = compute_precision(self.model, self.accelerator.mixed_precision)
        run = ScoringRun("the reference", self._reference_engine(), precision, self._scoring_mode)
        layout = choose_pass_layout(self.settings.layout, model, rows, run=run)
        size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        rewarded, self.token_reward_reports[name] = with_token_rewards(
            rows,
            cache=reference.ReferenceCache(self.settings.token_reward_cache or token_reward_cache_dir()),
            weights=reference.model_fingerprint(model, self._reference_adapter()),
            precision=precision,
            layout=layout,
            score=partial(self._score_over_ranks, batch_size=size, layout=layout.layout),
        )
        return rewarded

    def _score_over_ranks(
        self, rows: Dataset, title: str, *, batch_size: int, layout: Layout | None = None
    ) -> reference.Scores:
        """Reference scores of all rows on every rank; each rank computes its share in as many batches as the others."""
        share = self._share(len(rows))
        model = self._reference_engine()

        def score(scored_by: nn.Module, chosen: Dataset, progress: str) -> reference.Scores:
            return score_rows(
                scored_by,
                chosen,
                pad_token_id=self.data_collator.pad_token_id,
                layout=layout or self.layout.layout,
                batch_size=batch_size,
                device=self.accelerator.device,
                progress=progress if self.is_local_process_zero() else None,
            )

        with self._scoring_mode():
            scores = score(model, rows.select(share), title)
            if self.settings.negative_reference is not None:
                other = score(self._placed_negative_reference(), rows.select(share), f"{title}, negatives")
                scores = [[*ours[:-1], theirs[-1]] for ours, theirs in zip(scores, other, strict=True)]
        gathered = dict(gather_object(list(zip(share, scores, strict=True))))
        return [gathered[i] for i in range(len(rows))]

    def _reference_engine(self) -> nn.Module:
        """The reference as it can be run before training begins."""
        if self.ref_model is not None or not self.is_deepspeed_enabled:
            return self._reference_model()
        if self._precompute_engine is None:
            self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
        return self._precompute_engine

    def _share(self, num_rows: int) -> list[int]:
        """This rank's row indices; as many on every rank, the last row being repeated where they run out."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        return [min(i * ranks + rank, num_rows - 1) for i in range(-(-num_rows // ranks))]
