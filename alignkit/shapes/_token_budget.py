"""Micro-batches filled by tokens: the rows of an optimizer step stay what they are, and are laid out anew.

Rows differ in length, so that micro-batches of equally many rows differ in tokens: the longest decide how many rows fit
into memory, and all others leave most of it unused, or are padded to their length. With a budget the rows of a whole
step, which are drawn as ever, are sorted by length and put into few micro-batches, with little padding. What the loss
is divided by is counted over the step, so that loss, metrics and gradient stay what they were but for rounding.

transformers counts the micro-batches it is given, to know when a step ends. It is given as many as it asked for, of
which all but the last are empty: the last holds those that are really run.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- transformers ``Trainer._get_train_sampler(train_dataset)``
- transformers ``Trainer.get_train_dataloader``, which takes ``data_collator`` as it is when it is called
- transformers ``Trainer._run_epoch``: gradients are exchanged after the last of what ``get_batch_samples`` returns,
  and what each of it is goes to ``training_step``, ``floating_point_ops`` and ``_track_num_input_tokens``
- accelerate's ``DeepSpeedEngineWrapper.backward``, which steps its engine where ``sync_gradients`` is True
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from operator import attrgetter
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from alignkit.data.lengths import RowLengths
from alignkit.data.prefix import on_device, packed_length
from alignkit.errors import ConfigError
from alignkit.models._layouts import LayoutChoice
from alignkit.models.choices import Choice, pinned
from alignkit.shapes._bridge import ObjectiveBridge
from alignkit.shapes._row_order import LengthGrouped

CPU_TOKENS = 2048
"""What ``auto`` is on a CPU, where larger products are no faster: on GSM8K pairs 1,024 to 4,096 are within 2 %."""


PASS_SHARE = 1 / 16
"""How much of the budget may be spent on padding to save a pass, which takes time of its own."""


@dataclass(frozen=True)
class Rows:
    """Rows on their way from a dataloader, which are collated later: nothing that passes them on looks into them."""

    rows: Sequence[Any]


def micro_batches(lengths: Sequence[int], budget: int, at_least: int = 1, *, padded: bool) -> list[list[int]]:
    """Rows dealt out over micro-batches, longest rows first.

    Args:
        lengths: Tokens of each row.
        budget: Most tokens of a micro-batch; a row that has more stands alone.
        at_least: Micro-batches there must be. Those of most rows are halved for that; where every row stands alone,
            empty ones are added.
        padded: Whether every row of a micro-batch takes as many tokens as its longest.

    Returns:
        Numbers of the rows of each micro-batch, longest first.
    """
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    found = (_least_padding if padded else _first_fit)(rows, lengths, budget)
    while len(found) < at_least and (halved := max(found, key=len, default=[])) and len(halved) > 1:
        place, middle = found.index(halved), (len(halved) + 1) // 2
        found[place : place + 1] = [halved[:middle], halved[middle:]]
    found.sort(key=lambda part: -lengths[part[0]])
    return found + [[] for _ in range(at_least - len(found))]


def _first_fit(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Each row, longest first, in the first micro-batch that has room for it."""
    found: list[list[int]] = []
    room: list[int] = []
    for row in rows:
        place = next((i for i, left in enumerate(room) if lengths[row] <= left), len(found))
        if place == len(found):
            found.append([])
            room.append(budget)
        found[place].append(row)
        room[place] -= lengths[row]
    return found


def _least_padding(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Runs of rows, longest first, that cost least: tokens with padding, and ``PASS_SHARE`` of the budget for each.

    As few as can be would put the shortest row beside the longest wherever memory is plenty.
    """

    def tokens(begin: int, end: int) -> int:
        return (end - begin) * lengths[rows[begin]]

    costs, begins = [0.0], [0]
    for end in range(1, len(rows) + 1):
        longer = takewhile(lambda begin: tokens(begin, end) <= budget, range(end - 2, -1, -1))  # noqa: B023
        totals = {begin: costs[begin] + tokens(begin, end) for begin in (end - 1, *longer)}
        begins.append(min(totals, key=lambda begin: totals[begin]))
        costs.append(totals[begins[-1]] + PASS_SHARE * budget)
    found: list[list[int]] = []
    end = len(rows)
    while end:
        found.append(list(rows[begins[end] : end]))
        end = begins[end]
    return found[::-1]


def row_tokens(rows: Sequence[Mapping[str, Any]], *, packed: bool, multiple: int | None) -> list[int]:
    """Tokens that each row takes in a batch with the others.

    Args:
        rows: Candidate rows, or supervised ones (``input_ids``).
        packed: Whether the candidates of a row stand behind one prompt, and not each behind its own.
        multiple: What lengths are rounded up to a multiple of.
    """
    if "input_ids" in rows[0]:
        return [_rounded(len(row["input_ids"]), multiple) for row in rows]
    if packed:
        return [_rounded(packed_length(row["prompt_ids"], row["completion_ids"]), multiple) for row in rows]
    widest = max(len(row["completion_ids"]) for row in rows)
    longest = [len(row["prompt_ids"]) + max(map(len, row["completion_ids"])) for row in rows]
    return [widest * _rounded(length, multiple) for length in longest]


def _rounded(length: int, multiple: int | None) -> int:
    return -(-length // (multiple or 1)) * (multiple or 1)


class TokenBudget(ObjectiveBridge):
    """A bridge whose micro-batches can be filled by tokens.

    Attributes:
        tokens_per_batch: Most tokens of a micro-batch; None leaves rows in the micro-batches they were drawn in.
    """

    tokens_per_batch: int | None = None
    needs: frozenset[str] = frozenset()
    """What the method needs beside the policy."""
    data_collator: Any
    layout: LayoutChoice
    lengths: RowLengths
    train_dataset: Any
    _of_step = 1

    @property
    def pads_rows(self) -> bool:
        """Whether rows of a micro-batch are as long as its longest."""
        return self.layout.layout == "padded"

    def row_tokens(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of each of the rows."""
        return row_tokens(rows, packed=self.layout.layout == "packed", multiple=self.args.pad_to_multiple_of)

    def fill_by_tokens(self, tokens: int | Literal["auto"] | None, before: Choice | None = None) -> None:
        """Fill micro-batches by tokens from now on; called before training, by all processes.

        Args:
            tokens: Most tokens of a micro-batch; None is no budget; ``auto`` is what was chosen before, or else as many
                as ``per_device_train_batch_size`` rows of the longest have, and ``CPU_TOKENS`` on a CPU.
            before: What a run that is resumed chose when it began.

        Raises:
            ConfigError: What is trained depends on which rows are together.
        """
        if tokens is None:
            return
        if (reason := self._why_rows_stay()) is not None:
            raise ConfigError(
                "rows cannot be dealt by their tokens",
                [f"`tokens_per_batch: {tokens}` changes which rows are together, but {reason}"],
            )
        (longest,) = self.row_tokens([self.lengths.longest_row])
        key = "tokens_per_batch"
        self.choices[key] = pinned(key, tokens) if tokens != "auto" else before or self._largest(longest)
        self.tokens_per_batch = budget = int(self.choices[key].value)
        if longest > budget and self.accelerator.is_main_process:
            print(
                f"tokens_per_batch: {budget:,} tokens are less than the longest row has ({longest:,}). No row is "
                "split: one that is longer is a micro-batch of its own."
            )

    def _why_rows_stay(self) -> str | None:
        if self.gradient_rule is not None and self.gradient_rule.rule.edit is not None:
            rule = self.gradient_rule.rule.name
            return f"gradient_rule: {rule} acts on one micro-batch at a time. Remove one of the two"
        if self.aux_loss_enabled:
            return (
                "the load-balancing loss is a statistic of a micro-batch. Write router_aux_loss_coef: 0, or remove "
                "tokens_per_batch"
            )
        if "whole_micro_batch" in self.needs:
            return "the loss has a statistic within a micro-batch. Remove tokens_per_batch"
        return None

    def _largest(self, longest: int) -> Choice:
        if self.accelerator.device.type == "cpu":
            return Choice("tokens_per_batch", CPU_TOKENS, "on a CPU")
        rows = self.args.per_device_train_batch_size
        return Choice("tokens_per_batch", longest * rows, f"as many as {rows} of the longest rows have")

    # --- the micro-batches of a step -------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The order of the rows; group_by_length goes by the tokens of the longest candidate of each."""
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(self.train_dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        rows_a_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        seed = args.seed if args.data_seed is None else args.data_seed
        return LengthGrouped(RowLengths.of(self.train_dataset).longest.tolist(), rows_a_step, seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A dataloader of the same rows in the same order, not collated yet."""
        if self.tokens_per_batch is None:
            plain: DataLoader[Any] = super().get_train_dataloader()
            return plain
        collator, self.data_collator = self.data_collator, Rows
        try:
            dataloader: DataLoader[Any] = super().get_train_dataloader()
            return dataloader
        finally:
            self.data_collator = collator

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """As many items as were asked for, the last of which holds all micro-batches; and what they are divided by."""
        if self.tokens_per_batch is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        taken, _ = self.next_batches(map(attrgetter("rows"), epoch_iterator), num_batches, device)
        if not taken:
            return super().get_batch_samples(iter(()), 0, device)
        *before, last = taken
        counted = len(last) if self.args.dataloader_drop_last else self.rows_that_count(len(last), self.train_dataset)
        rows = [row for batch in (*before, last[:counted]) for row in batch]
        batches, counts = self._agreed(rows, last, device)
        self._of_step = len(batches)
        return [*([] for _ in before), [on_device(batch, device) for batch in batches]], counts

    def _agreed(
        self, rows: Sequence[Any], spare: Sequence[Any], device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The micro-batches of this process, as many as the others have, and the item counts of all; a collective.

        Args:
            rows: Of this process.
            spare: Some of which nothing is trained where there are too few.
        """
        batches = self._laid_out(rows, spare, at_least=1)
        counts = [self.item_counts(batch) for batch in batches]
        local = [sum(int(count[kind]) for count in counts) for kind in self.item_kinds]
        everywhere = self.accelerator.gather(torch.tensor([*local, len(batches)], device=device))
        everywhere = everywhere.view(-1, len(local) + 1)
        if len(everywhere) > 1 and (most := int(everywhere[:, -1].max())) > len(batches):
            batches = self._laid_out(rows, spare, at_least=most)
        return batches, everywhere[:, :-1].sum(0)

    def _laid_out(self, rows: Sequence[Any], spare: Sequence[Any], at_least: int) -> list[dict[str, Any]]:
        assert self.tokens_per_batch is not None
        lengths = self.row_tokens(rows) if rows else []
        parts = micro_batches(lengths, self.tokens_per_batch, at_least, padded=self.pads_rows)
        return [self.data_collator([rows[i] for i in part]) if part else self._idle(rows or spare) for part in parts]

    def _idle(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The shortest row, of which nothing is trained or counted: other processes wait for every pass."""
        lengths = self.row_tokens(rows)
        return self.keep_rows(self.data_collator([rows[lengths.index(min(lengths))]]), 0)

    @property
    def micro_batches_of_step(self) -> int:
        """Micro-batches that are really run."""
        return super().micro_batches_of_step if self.tokens_per_batch is None else self._of_step

    # --- running them ----------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run micro-batches one after the other, and return the sum of their losses."""
        if self.tokens_per_batch is None:
            alone: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return alone
        loss = torch.zeros((), device=self.args.device)
        for i, batch in enumerate(inputs):
            with nullcontext() if i == len(inputs) - 1 else self._before_the_last(model):
                loss = loss + super().training_step(model, batch, num_items_in_batch)
        return loss

    @contextmanager
    def _before_the_last(self, model: nn.Module) -> Iterator[None]:
        """Gradients add up inside, and nothing is exchanged or stepped, as far as the host would not either."""
        self.accelerator.sync_gradients = False
        try:
            with self._deferred(model):
                yield
        finally:
            self.accelerator.sync_gradients = True

    def _deferred(self, model: nn.Module) -> AbstractContextManager[Any]:
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        if each or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return nullcontext()
        return self.accelerator.no_sync(model=model)

    def floating_point_ops(self, inputs: Any) -> int:
        """Of all micro-batches that ``inputs`` holds."""
        batches = [inputs] if self.tokens_per_batch is None else inputs
        return sum(super(TokenBudget, self).floating_point_ops(batch) for batch in batches)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        for batch in [inputs] if self.tokens_per_batch is None else inputs:
            super()._track_num_input_tokens(batch)
