"""The memory of a run, from its config and the lengths of its rows: the estimate, and which knobs would make it fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from accelerate.utils import DeepSpeedPlugin
from datasets import Dataset
from transformers import AutoConfig

from alignkit.data.lengths import RowLengths
from alignkit.environment import launched_with_deepspeed
from alignkit.errors import ModelError
from alignkit.memory.decoder import LINEAR_PLACES, Tokens, Trained
from alignkit.memory.estimate import Estimate, Step, estimate
from alignkit.memory.shape import ModelShape
from alignkit.models.files import ADAPTER_CONFIG, read_adapter, read_json
from alignkit.parametrizations._policy import weights_dtype
from alignkit.parts.method import load_method
from alignkit.parts.parametrization import load_parametrization
from alignkit.references.models import other_models

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 2**30


@dataclass(frozen=True)
class Launch:
    """How many processes share a run, and what of it.

    Attributes:
        device: ``cpu``, or ``cuda`` for any accelerator.
        processes: How many there are.
        zero_stage: DeepSpeed's ZeRO; 0 without.
        offload_optimizer, offload_parameters: What it holds in the host's memory.
    """

    device: str = "cuda"
    processes: int = 1
    zero_stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @classmethod
    def of_arguments(cls, args: Any) -> Launch:
        """That of a run whose processes are set up.

        Args:
            args: The trainer's arguments.
        """
        device = "cpu" if args.device.type == "cpu" else "cuda"
        plugin: DeepSpeedPlugin | None = args.deepspeed_plugin if launched_with_deepspeed() else None
        if plugin is None:
            return cls(device, args.world_size)
        zero = plugin.deepspeed_config["zero_optimization"]
        offloaded = [
            zero.get(key, {}).get("device", "none") in ("cpu", "nvme") for key in ("offload_optimizer", "offload_param")
        ]
        return cls(device, args.world_size, int(plugin.zero_stage), *offloaded)


@dataclass(frozen=True)
class Plan:
    """What a run will do, as far as its memory goes.

    Attributes:
        config: The run's, with precisions settled.
        shape: Its model.
        launch: Its processes.
        train, held_out: Lengths of its rows; None where they are not known, and as long as they may be.
        packed: Whether rows stand behind one another without padding.
    """

    config: Any
    shape: ModelShape
    launch: Launch
    train: RowLengths | None = None
    held_out: RowLengths | None = None
    packed: bool = False

    @classmethod
    def of(cls, config: Any, launch: Launch, train: Any = None, held_out: Any = None, **how: Any) -> Plan:
        """The plan of a run.

        Args:
            config: Its configuration.
            launch: Its processes.
            train: Tokenised training rows; None, a stream or prompts take the longest there may be.
            held_out: The same of held-out rows.
            **how: ``packed``.

        Raises:
            ModelError: The architecture or the parametrisation is none whose memory is known.
        """
        options = {"revision": config.model_revision} if config.model_revision else {}
        content = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code, **options)
        lengths = [RowLengths.of(rows) if has_tokens(rows) else None for rows in (train, held_out)]
        plan = cls(config, ModelShape.of(content.to_dict()), launch, *lengths, **how)
        plan.trained()
        return plan

    def estimate(self, *, checkpointing: bool, **changes: Any) -> Estimate:
        """Bytes of a step.

        Args:
            checkpointing: Whether activations are computed again.
            **changes: Keys of the config with another value.
        """
        changed = replace(self, config=replace(self.config, **changes)) if changes else self
        return estimate(self.shape, changed.step(checkpointing=checkpointing))

    def step(self, *, checkpointing: bool) -> Step:
        """What the estimate is made of."""
        config, launch = self.config, self.launch
        held_out = config.eval_data is not None or config.eval_fraction > 0
        size = config.per_device_eval_batch_size
        return Step(
            tokens=self.tokens(self.train, config.per_device_train_batch_size),
            trained=self.trained(),
            autocast=2 if config.bf16 is True or config.fp16 else None,
            checkpointing=checkpointing,
            accumulates=config.gradient_accumulation_steps > 1,
            optimizer=config.optim,
            reference=self.reference(),
            evaluation=self.tokens(self.held_out or self.train, size, evaluated=True) if held_out else None,
            attention=config.attn_implementation or self.shape.family.attention,
            device="cpu" if launch.device == "cpu" else "cuda",
            # Autocast casts them anyway; PEFT is told to leave that to it.
            casts_adapter_inputs=not (config.bf16 is True or config.fp16),
            processes=launch.processes,
            zero_stage=launch.zero_stage,
            offload_optimizer=launch.offload_optimizer,
            offload_parameters=launch.offload_parameters,
        )

    # --- rows ------------------------------------------------------------------------------------------------------

    def tokens(self, lengths: RowLengths | None, size: int, *, evaluated: bool = False) -> Tokens:
        """The fullest micro-batch that ``size`` rows can be."""
        candidates, longest = self._row(lengths)
        if lengths is not None:
            each = lengths.each_packed if self.packed else candidates * lengths.longest
            whole = np.sort(each)[::-1][:size]
        else:
            whole = self._packed_rows(size) if self.packed else np.full(size, candidates * longest)
        budget = getattr(self.config, "tokens_per_batch", None)
        if isinstance(budget, int) and not evaluated:
            # As many of the longest rows as the budget holds, or one that is longer.
            whole = np.array([max(budget, int(whole[0]))])
        if self.packed:
            return Tokens(1, int(whole.sum()), False, int(whole.sum()), is_packed=True)
        rows = max(-(-int(whole.sum()) // longest), 1)
        return Tokens(rows, longest, self._is_ragged(lengths), rows * (longest - 1))

    def _row(self, lengths: RowLengths | None) -> tuple[int, int]:
        """Candidates of a row, and its length in tokens."""
        config = self.config
        if config.program == "preference":
            known = len(lengths.longest_row["completion_ids"]) if lengths is not None else None
            candidates = known or load_method(config.method).num_candidates or 2
        else:
            candidates = 1
        if config.program == "sft" and config.packing:
            return candidates, config.max_length
        return candidates, sum(self._longest_parts()) if lengths is None else int(lengths.longest.max())

    def _longest_parts(self) -> tuple[int, int]:
        """Tokens of a prompt and a completion of which nothing is known: half and half, but for online runs."""
        config = self.config
        if config.program == "online":
            return config.max_prompt_length, config.max_completion_length
        return config.max_length // 2, config.max_length - config.max_length // 2

    def _packed_rows(self, size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of each prompt with its completions, of rows of which nothing is known."""
        prompt, answer = self._longest_parts()
        if self.config.program == "online":
            # Its rows are completions, so many of them a prompt.
            together = min(self.config.num_generations, size)
            return np.full(-(-size // together), prompt + together * answer)
        return np.full(size, prompt + self._row(None)[0] * answer)

    def _is_ragged(self, lengths: RowLengths | None) -> bool:
        return lengths is None or int(lengths.shortest.min()) != int(lengths.longest.max())

    # --- what trains -----------------------------------------------------------------------------------------------

    def trained(self) -> Trained:
        """What trains, and in what precision the rest is held.

        Raises:
            ModelError: It is a parametrisation whose memory is not known.
        """
        config, launch = self.config, self.launch
        record = load_parametrization(config.parametrization)
        sharded = launch.zero_stage > 0
        common = {
            "width": WIDTHS.get(weights_dtype(config), 2),
            "held": 2 if sharded and (config.bf16 is True or config.fp16) else 4,
            "gradient_share": 1 / launch.processes if launch.zero_stage >= 2 else 1.0,
        }
        if record.name == "full":
            return Trained("full", **common)
        if record.name == "routers":
            return Trained("routers", quantization=config.quantization, **common)
        if record.name != "lora":
            raise ModelError(f"the memory of parametrization: {record.name} is not known")
        return Trained("lora", quantization=config.quantization, **common, **self._factors())

    def _factors(self) -> dict[str, Any]:
        config = self.config
        rank, modules, beside = config.lora_r, config.lora_target_modules, config.lora_modules_to_save
        if config.adapter is not None:
            saved = read_json(read_adapter(config.adapter).directory / ADAPTER_CONFIG)
            rank, modules = saved["r"], saved["target_modules"]
            beside = saved.get("modules_to_save") or []
        names = tuple(name.rpartition(".")[2] for name in beside)
        return {"rank": rank, "targets": _targets(modules), "saved_beside": names}

    def reference(self) -> Any:
        """Where reference log-probs come from, as far as memory goes."""
        config = self.config
        method = load_method(config.method)
        if "reference" not in method.needs(config.method_options):
            return "copy" if method.teacher(config.method_options) is not None else "none"
        if config.program == "preference" and other_models(config):
            return "copy"
        has_adapter = load_parametrization(config.parametrization).has_adapter
        given = getattr(config, "reference", "auto")
        if given == "precomputed":
            return "none"
        return "copy" if given == "copy" or not has_adapter else "adapter_disabled"


def has_tokens(rows: Any) -> bool:
    """Whether rows are at hand and tokenised, so that their lengths are known."""
    return isinstance(rows, Dataset) and bool({"prompt_ids", "input_ids"} & set(rows.column_names))


def _targets(modules: Any) -> tuple[str, ...] | None:
    """The linear layers that LoRA modules name, by the last part; None is all of them."""
    if modules == "all-linear":
        return None
    if isinstance(modules, str):
        places = {name: f"model.layers.0.{place}" for name, place in LINEAR_PLACES.items()}
        return tuple(name for name, full in places.items() if re.fullmatch(modules, full))
    return tuple(name.rpartition(".")[2] for name in modules)


# --- what would fit ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Knob:
    """One change of the config that makes a run take less.

    Attributes:
        keys: What to write, by key.
        peak: Bytes it takes then.
    """

    keys: Mapping[str, Any]
    peak: int

    def __str__(self) -> str:
        """As a user writes it."""
        shown = {key: str(value).lower() if isinstance(value, bool) else value for key, value in self.keys.items()}
        return ", ".join(f"{key}: {value}" for key, value in shown.items()) + f" ({self.peak / GIB:.1f} GiB)"


def knobs(plan: Plan, limit: int, *, checkpointing: bool) -> list[Knob]:
    """Changes that bring a run below a limit, the cheapest in speed first.

    Args:
        plan: The run.
        limit: Bytes there are.
        checkpointing: Whether it is on already.
    """
    found = []
    for keys in _changes(plan, checkpointing=checkpointing):
        given = dict(keys)
        on = bool(given.pop("gradient_checkpointing", checkpointing))
        knob = Knob(keys, plan.estimate(checkpointing=on, **given).peak)
        if knob.peak <= limit:
            found.append(knob)
    return found


def _changes(plan: Plan, *, checkpointing: bool) -> Iterator[dict[str, Any]]:
    """What can be changed, the cheapest in speed first; later ones add to what is cheap."""
    config = plan.config
    base: dict[str, Any] = {} if checkpointing else {"gradient_checkpointing": True}
    if base:
        yield dict(base)
    size, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    while size > 1:
        size, steps = size // 2, steps * 2
        smaller = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        if plan.step(checkpointing=True).evaluation is not None:
            smaller["per_device_eval_batch_size"] = min(config.per_device_eval_batch_size, size)
        yield smaller
        if base:
            yield base | smaller
    least = base | ({"per_device_train_batch_size": 1} if config.per_device_train_batch_size > 1 else {})
    has_adapter = load_parametrization(config.parametrization).has_adapter
    if has_adapter and config.quantization == "none":
        yield least | {"quantization": "nf4"}
    if not has_adapter and config.optim == "adamw_torch":
        yield least | {"optim": "adamw_bnb_8bit"}
    if plan.reference() == "copy" and config.program == "preference":
        yield least | {"reference": "precomputed"}
