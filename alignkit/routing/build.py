"""A bank from rows and a model: routing, success, embeddings, neighbours. What is on disk already is not made again.

Axis letters: n rows, D numbers of a routing vector, d of an embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from alignkit import __version__
from alignkit.errors import DataError, ModelError
from alignkit.models._forward import base_model, compute_precision
from alignkit.models._routers import last_routers
from alignkit.references._cache import model_fingerprint
from alignkit.routing.embedders import (
    check_embedder,
    check_finite,
    embedder_identity,
    embeddings_of_file,
    is_base,
    is_file,
    sentence_embedder,
)
from alignkit.routing.neighbours import Search, neighbour_targets, tasks_with_success
from alignkit.routing.options import BankOptions
from alignkit.routing.passes import RoutingPass
from alignkit.routing.shards import Compute, batches_of, sharded
from alignkit.routing.store import (
    EMBEDDINGS,
    FORMAT,
    ROUTING,
    SUCCESS,
    TARGETS,
    Identity,
    RoutingBank,
    default_bank_dir,
    read_part,
    write_facts,
    write_part,
)
from alignkit.routing.success import (
    Rows,
    check_success,
    success_by_choices,
    success_by_generation,
    success_columns,
    success_rule,
)
from alignkit.sampling.store import fingerprint, on_first_process

NO_TASK = ""
"""Task of a row that names none."""


def build_bank(
    model: nn.Module,
    tokenizer: Any,
    rows: Rows,
    options: BankOptions,
    directory: Path | None = None,
    *,
    batch_size: int = 8,
    adapter: str | None = None,
    only_read: bool = False,
) -> RoutingBank:
    """The bank of some rows under a model; a collective.

    The model is run as it is: the caller switches adapters off where the base model is meant, and sets autocast.

    Args:
        model: As it is called: plain, PEFT, or wrapped to be launched or sharded. With a completion head
            (``add_completion_head``) where choices decide success.
        tokenizer: Fills batches, and decodes answers.
        rows: With ``prompt_ids``, and what the options need: ``choices_ids`` and ``completion_ids``; ``success``;
            ``prompt`` and the columns of a reward; ``text`` for an embedder; ``task``.
        options: What the bank is made of; a configuration that has its keys is one too.
        directory: Where it is kept; None is a folder of its own in the cache.
        batch_size: Rows a forward pass.
        adapter: Name of the adapter that is in force; None for none.
        only_read: Whether what takes a pass of the model must be there already.

    Raises:
        DataError: Rows lack what the options need.
        ModelError: The model has no routers that are known, or the embedder is not there.
        CheckpointError: A file of the bank is damaged.
    """
    return _Build(model, tokenizer, rows, options, directory, batch_size, adapter, only_read=only_read).bank()


def held_out_bank(
    bank: RoutingBank,
    model: nn.Module,
    tokenizer: Any,
    rows: Rows,
    options: BankOptions,
    directory: Path | None = None,
    *,
    only_read: bool = False,
    **how: Any,
) -> RoutingBank:
    """What a bank says of other rows, such as those of an evaluation; a collective.

    Their neighbours are rows of ``bank``; whether the model solves them is not asked.

    Args:
        bank: Of the training rows, made with the same options.
        model: See :func:`build_bank`, as for the others.
        tokenizer: The same.
        rows: The same.
        options: The same.
        directory: The same.
        only_read: The same.
        **how: ``batch_size`` and ``adapter``, the same.
    """
    settings = {"batch_size": 8, "adapter": None, **how}
    return _Build(
        model, tokenizer, rows, options, directory, only_read=only_read, neighbours_of=bank, **settings
    ).bank()


def refresh(
    bank: RoutingBank,
    model: nn.Module,
    tokenizer: Any,
    rows: Rows,
    options: BankOptions,
    directory: Path,
    *,
    batch_size: int = 8,
    adapter: str | None = None,
) -> RoutingBank:
    """A bank anew under the model as it has become: routing, success and targets; a collective.

    The embedder is frozen, so the embeddings stay those of ``bank``.

    Args:
        bank: The one before, of the same rows.
        model: See :func:`build_bank`, as for the others.
        tokenizer: The same.
        rows: The same.
        options: The same.
        directory: A folder of its own for each refresh.
        batch_size: The same.
        adapter: The same.
    """
    return _Build(model, tokenizer, rows, options, directory, batch_size, adapter, embeddings_of=bank).bank()


@dataclass
class _Build:
    """One bank in the making; every method is a collective."""

    model: nn.Module
    tokenizer: Any
    rows: Rows
    options: BankOptions
    directory: Path | None
    batch_size: int
    adapter: str | None
    only_read: bool = False
    neighbours_of: RoutingBank | None = None
    embeddings_of: RoutingBank | None = None
    files: dict[str, str] = field(default_factory=dict)

    def bank(self) -> RoutingBank:
        self._check()
        if self.directory is None:
            self.directory = default_bank_dir() / self.routing_identity.key
        routing = self._routing()
        embeddings = routing["pooled"] if self._pools else self._embeddings()
        success = torch.zeros(len(self.rows), dtype=torch.bool) if self.neighbours_of else self._success()
        targets = self._targets(routing["routing"], success, embeddings)
        facts = self._facts()
        on_first_process(lambda: write_facts(self._folder, facts), PartialState())
        parts = {ROUTING: routing, SUCCESS: {"success": success}, TARGETS: targets}
        return RoutingBank(self._folder, facts, {**parts, EMBEDDINGS: {"embeddings": embeddings}})

    def _check(self) -> None:
        """What can be refused before the model is run."""
        if not len(self.rows):
            raise DataError("the bank", ["there are no rows. Write data that has some"])
        if self.neighbours_of is None:
            check_success(self.rows, self.options)
        if self.embeddings_of is None:
            check_embedder(self.options.bank_embedder)
            if self._needs_text and "text" not in self.rows[0]:
                raise DataError(
                    "the bank", [f"bank_embedder: {self.options.bank_embedder} reads text, and rows have none"]
                )
            if is_file(self.options.bank_embedder):
                embeddings_of_file(self.options.bank_embedder, len(self.rows))

    # --- what things depend on ---------------------------------------------------------------------------------------

    @property
    def _folder(self) -> Path:
        assert self.directory is not None  # set first of all
        return self.directory

    @property
    def _pools(self) -> bool:
        """Whether the base model embeds the rows in the pass for their routing."""
        return is_base(self.options.bank_embedder) and self.embeddings_of is None

    @property
    def _needs_text(self) -> bool:
        return not is_base(self.options.bank_embedder) and not is_file(self.options.bank_embedder)

    @cached_property
    def _computed_by(self) -> dict[str, Any]:
        plain = extract_model_from_parallel(self.model)
        kind = PartialState().device.type
        autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "no"
        return {
            "model": model_fingerprint(plain, self.adapter),
            "precision": [compute_precision(plain), autocast],
            "prompts": self._hash(lambda row: row["prompt_ids"]),
        }

    def _hash(self, value: Callable[[Any], Any]) -> str:
        """Hash of something of every row, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            digest.update(fingerprint(value(row)).encode())
        return digest.hexdigest()

    @cached_property
    def routing_identity(self) -> Identity:
        options = self.options
        settings = {
            "layers": [router.name for router in self._routers],
            "token_set": options.bank_token_set,
            "score": options.bank_routing_score,
            "pooled": self._pools,
        }
        return Identity(ROUTING, {**self._computed_by, **settings})

    @cached_property
    def _success_identity(self) -> Identity:
        columns = success_columns(self.options)
        labels = self._hash(lambda row: [row[name] for name in columns])
        return Identity(SUCCESS, {**self._computed_by, **success_rule(self.options), "labels": labels})

    @cached_property
    def _embeddings_identity(self) -> Identity:
        settings = embedder_identity(self.options.bank_embedder)
        return Identity(EMBEDDINGS, settings | {"texts": self._hash(lambda row: row.get("text"))})

    # --- the parts ---------------------------------------------------------------------------------------------------

    @cached_property
    def _routers(self) -> Any:
        return last_routers(self.model, self.options.bank_layers)

    def _sharded(
        self, identity: Identity, compute: Compute, title: str, *, together: bool = False
    ) -> dict[str, Tensor]:
        path = identity.path(self._folder)
        self.files[identity.kind] = path.name
        if self.only_read and identity.kind in (ROUTING, SUCCESS) and not path.exists():
            raise ModelError(
                f"the reference bank is not in {self._folder} ({path.name} is missing), and weights that are spread "
                "over processes cannot be run before training. Make it ahead, on one process or with DDP: alignkit "
                "bank, with the words of this training."
            )
        return sharded(identity, self._folder, len(self.rows), compute, title=title, together=together)

    def _routing(self) -> dict[str, Tensor]:
        run = RoutingPass(
            self.model,
            self._routers,
            pad_token_id=self.tokenizer.pad_token_id,
            token_set=self.options.bank_token_set,
            score=self.options.bank_routing_score,  # type: ignore[arg-type]  # its choices are these
            device=PartialState().device,
        )

        def compute(numbers: Sequence[int], most_rows: int) -> dict[str, Tensor]:
            prompts = [self.rows[i]["prompt_ids"] for i in numbers]
            found: dict[str, list[Any]] = {"routing": [None] * len(prompts), "pooled": [None] * len(prompts)}
            for batch in batches_of([len(ids) for ids in prompts], self.batch_size, most_rows):
                routed = run([prompts[i] for i in batch])
                for place, routing, pooled in zip(batch, routed.routing, routed.pooled, strict=True):
                    found["routing"][place], found["pooled"][place] = routing, pooled
            kept = found if self._pools else {"routing": found["routing"]}
            return {name: torch.stack(values) for name, values in kept.items()}

        tensors = self._sharded(self.routing_identity, compute, f"Routing of {len(self.rows)} prompts")
        if self._pools:
            self.files[EMBEDDINGS] = self.files[ROUTING]
        return tensors

    def _success(self) -> Tensor:
        options = self.options
        if options.bank_success == "generation":
            compute = success_by_generation(self.model, self.tokenizer, self.rows, options, self.batch_size)
        elif options.bank_success == "choices":
            pad = self.tokenizer.pad_token_id
            compute = success_by_choices(self.model, self.rows, options, pad_token_id=pad, batch_size=self.batch_size)
        else:

            def compute(numbers: Sequence[int], most_rows: int) -> dict[str, Tensor]:
                solved = [options.bank_success == "all" or self.rows[i]["success"] for i in numbers]
                return {"success": torch.tensor(solved)}

        together = options.bank_success == "generation"
        title = f"Success of {len(self.rows)} rows"
        return self._sharded(self._success_identity, compute, title, together=together)["success"]

    def _embeddings(self) -> Tensor:
        name = self.options.bank_embedder
        if self.embeddings_of is not None:
            before = self.embeddings_of
            self.files[EMBEDDINGS] = str((before.directory / before.facts["files"][EMBEDDINGS]).absolute())
            return before.embeddings
        if is_file(name):
            whole = embeddings_of_file(name, len(self.rows))

            def compute(numbers: Sequence[int], most_rows: int) -> dict[str, Tensor]:
                return {"embeddings": whole[numbers[0] : numbers[-1] + 1]}
        else:
            embed = sentence_embedder(name, PartialState().device)

            def compute(numbers: Sequence[int], most_rows: int) -> dict[str, Tensor]:
                return {"embeddings": embed([self.rows[i]["text"] for i in numbers])}

        return self._sharded(self._embeddings_identity, compute, f"Embeddings of {len(self.rows)} rows")["embeddings"]

    # --- neighbours --------------------------------------------------------------------------------------------------

    @cached_property
    def _tasks(self) -> tuple[list[str], Tensor]:
        """Names of the tasks, those of the other bank first, and the number of each row's."""
        own = [str(row.get("task") or NO_TASK) for row in self.rows]
        before = [] if self.neighbours_of is None else self.neighbours_of.facts["tasks"]
        names = list(dict.fromkeys([*before, *sorted(set(own))]))
        places = {name: place for place, name in enumerate(names)}
        return names, torch.tensor([places[name] for name in own])

    def _groups(self) -> Tensor:
        """A number for each prompt; equal prompts have the same, also in another bank."""
        hashes = [
            hashlib.blake2b(np.asarray(row["prompt_ids"], dtype=np.int64).tobytes(), digest_size=8).digest()
            for row in self.rows
        ]
        return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in hashes])

    def _targets(self, routing: Tensor, success: Tensor, embeddings: Tensor) -> dict[str, Tensor]:
        options, other = self.options, self.neighbours_of
        search = Search(
            mode=options.bank_neighbours,
            count=options.bank_num_neighbours,
            epsilon=options.bank_epsilon,
            sigma=options.bank_sigma,
            max_similarity=options.bank_max_similarity,
            seed=options.bank_seed,
        )
        settings = {
            "made of": [self.files.get(kind) for kind in (ROUTING, SUCCESS, EMBEDDINGS)],
            "bank": None if other is None else other.facts["files"],
            "search": vars(search),
            "success_filter": options.bank_success_filter,
            "tasks": self._tasks[0],
            "task of row": self._tasks[1].tolist(),
        }
        identity = Identity(TARGETS, settings)
        path = identity.path(self._folder)
        self.files[TARGETS] = path.name

        def make() -> None:
            check_finite(embeddings, options.bank_embedder)
            if not path.exists():
                write_part(path, self._searched(search, routing, success, embeddings), identity)

        on_first_process(make, PartialState())
        return read_part(path, identity.key)

    def _searched(self, search: Search, routing: Tensor, success: Tensor, embeddings: Tensor) -> dict[str, Tensor]:
        other, tasks, groups = self.neighbours_of, self._tasks[1], self._groups()
        of_bank = (success, tasks, groups, embeddings, routing)
        if other is not None:
            of_bank = (other.success, other.found["tasks"], other.found["groups"], other.embeddings, other.routing)
        solved, bank_tasks, bank_groups, bank_embeddings, bank_routing = of_bank
        filtered = self.options.bank_success_filter
        kept, found = neighbour_targets(
            bank_embeddings,
            solved if filtered else torch.ones_like(solved),
            bank_routing,
            search,
            queries=None if other is None else embeddings,
            groups=bank_groups,
            query_groups=None if other is None else groups,
            wanted=tasks_with_success(bank_tasks, solved, tasks) if filtered else None,
        )
        return {**vars(found), **vars(kept), "tasks": tasks, "groups": groups}

    def _facts(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "alignkit": __version__,
            "rows": len(self.rows),
            "model": type(base_model(extract_model_from_parallel(self.model))).__name__,
            "fingerprint": self._computed_by["model"],
            "adapter": self.adapter,
            "layers": [router.name for router in self._routers],
            "experts": [router.num_experts for router in self._routers],
            "options": {option.name: vars(self.options)[option.name] for option in fields(BankOptions)},
            "tasks": self._tasks[0],
            "neighbours of": None if self.neighbours_of is None else str(self.neighbours_of.directory.absolute()),
            "files": self.files,
        }
