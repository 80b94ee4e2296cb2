"""The memory of a run, from its config and the lengths of its rows: the estimate, and which knobs would make it fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
from accelerate.utils import DeepSpeedPlugin
from datasets import Dataset
from transformers import AutoConfig

from alignkit.data.lengths import RowLengths, candidate_row
from alignkit.environment import launched_with_deepspeed
from alignkit.errors import ModelError
from alignkit.memory.decoder import LINEAR_PLACES, Tokens, Trained
from alignkit.memory.estimate import Estimate, Step, estimate
from alignkit.memory.shape import ModelShape
from alignkit.models.choices import Choice
from alignkit.models.files import ADAPTER_CONFIG, read_adapter, read_json
from alignkit.parametrizations._policy import weights_dtype
from alignkit.parts.method import load_method
from alignkit.parts.parametrization import load_parametrization
from alignkit.references.models import other_models

MOST_ROWS = 4096
"""Of a micro-batch, that are looked at one by one."""
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


def has_tokens(rows: Any) -> bool:
    """Whether rows are at hand and tokenised: none of a stream, nor prompts whose completions are yet to be drawn."""
    return isinstance(rows, Dataset) and bool({"prompt_ids", "input_ids"} & set(rows.column_names))


@dataclass(frozen=True)
class LongestRows:
    """The rows that decide whether a run fits.

    Attributes:
        sequence: Tokens of the longest sequence.
        candidates: Sequences that a row is.
        is_ragged: Whether rows differ in length, so that some are padded.
        prompts: Of the rows with most tokens, those first: the length of the prefix and those of the branches.
    """

    sequence: int
    candidates: int
    is_ragged: bool
    prompts: tuple[tuple[int, tuple[int, ...]], ...]

    @classmethod
    def of(cls, rows: Any) -> LongestRows | None:
        """Those of tokenised rows; None of a stream, and of prompts whose completions are yet to be drawn."""
        if not has_tokens(rows):
            return None
        lengths = RowLengths.of(rows)
        order = np.argsort(-lengths.each_packed, kind="stable")[:MOST_ROWS]
        longest = [candidate_row(rows[int(i)]) for i in order]
        return cls(
            sequence=int(lengths.longest.max()),
            candidates=max(len(row["completion_ids"]) for row in longest),
            is_ragged=int(lengths.shortest.min()) != int(lengths.longest.max()),
            prompts=tuple((len(row["prompt_ids"]) - 1, tuple(map(len, row["completion_ids"]))) for row in longest),
        )

    @classmethod
    def unknown(cls, config: Any, size: int) -> LongestRows:
        """Rows of which nothing is known: as long as the config allows, half of it prompt unless it says otherwise.

        Args:
            size: Rows of a micro-batch.
        """
        if config.program == "online":
            # Its rows are completions, so many of them a prompt.
            together = min(config.num_generations, size)
            prompt, answer = config.max_prompt_length, config.max_completion_length
            return cls(prompt + answer, 1, True, ((prompt - 1, (answer,) * together),) * -(-size // together))
        if config.program not in ("preference", "reward"):
            return cls(config.max_length, 1, True, ((0, (config.max_length - 1,)),) * size)
        candidates = load_method(config.method).num_candidates or 2
        prompt = config.max_length // 2
        prompts = ((prompt - 1, (config.max_length - prompt,) * candidates),) * size
        return cls(config.max_length, candidates, True, prompts)


@dataclass(frozen=True)
class Plan:
    """What a run will do, as far as its memory goes.

    Attributes:
        config: The run's, with precisions settled.
        shape: Its model.
        launch: Its processes.
        train, held_out: Its longest rows; None where they are not known, and as long as they may be.
        packed: Whether rows stand behind one another without padding.
        kernels: What computes the layers: ``none``, ``liger`` or ``compile``.
    """

    config: Any
    shape: ModelShape
    launch: Launch
    train: LongestRows | None = None
    held_out: LongestRows | None = None
    packed: bool = False
    kernels: str = "none"

    @classmethod
    def of(cls, config: Any, launch: Launch, train: Any = None, held_out: Any = None, **how: Any) -> Plan:
        """The plan of a run.

        Args:
            config: Its configuration.
            launch: Its processes.
            train: Tokenised training rows; None, a stream or prompts take the longest there may be.
            held_out: The same of held-out rows.
            **how: ``packed`` and ``kernels``.

        Raises:
            ModelError: The architecture or the parametrisation is none whose memory is known.
        """
        options = {"revision": config.model_revision} if config.model_revision else {}
        content = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code, **options)
        longest = map(LongestRows.of, (train, held_out))
        plan = cls(config, ModelShape.of(content.to_dict()), launch, *longest, **how)
        plan.trained()
        return plan

    @classmethod
    def at_best(cls, config: Any, launch: Launch, train: Any = None, held_out: Any = None) -> Plan:
        """The plan of a run whose other choices are still to be made: as if each were the one that takes least.

        Args:
            config: Its configuration.
            launch: Its processes.
            train: As in :meth:`of`.
            held_out: As in :meth:`of`.
        """
        values = vars(config)
        if values.get("reference") == "auto":
            config = replace(config, reference="precomputed")
        has_liger = launch.device != "cpu" and find_spec("liger_kernel") is not None
        kernels = config.kernels if config.kernels != "auto" else "liger" if has_liger else "none"
        packed = values.get("layout", "padded") != "padded"
        return cls.of(config, launch, train, held_out, packed=packed, kernels=kernels)

    def after(self, choices: Mapping[str, Choice]) -> Plan:
        """The plan once other choices are made."""
        taken = {key: choice.value for key, choice in choices.items()}
        packed = taken.get("layout", "padded") != "padded"
        plan = replace(self, packed=packed, kernels=taken.get("kernels", "none"))
        return replace(plan, config=replace(plan.config, **{k: taken[k] for k in ("reference",) if k in taken}))

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
            is_fused=self.kernels != "none",
            processes=launch.processes,
            zero_stage=launch.zero_stage,
            offload_optimizer=launch.offload_optimizer,
            offload_parameters=launch.offload_parameters,
        )

    # --- rows ------------------------------------------------------------------------------------------------------

    def tokens(self, rows: LongestRows | None, size: int, *, evaluated: bool = False) -> Tokens:
        """The fullest micro-batch that ``size`` rows can be, or that the token budget allows."""
        config = self.config
        longest = rows or LongestRows.unknown(config, size)
        budget = None if evaluated else vars(config).get("tokens_per_batch")
        if self.packed:
            return Tokens.packed(_fullest(longest.prompts, size, budget if isinstance(budget, int) else None))
        count, length = size * longest.candidates, longest.sequence
        if isinstance(budget, int):
            count = max(budget // length, longest.candidates)
        if config.program == "sft" and config.packing:
            length = config.max_length
        return Tokens(count, length, longest.is_ragged, count * (length - 1))

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
            if config.dense_mixer:
                raise ModelError("the memory of dense_mixer is not known")
            return Trained("routers", last_routers=config.router_layers, **common)
        if record.name != "lora":
            raise ModelError(f"the memory of parametrization: {record.name} is not known, only of full, lora, routers")
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


def _fullest(
    prompts: tuple[tuple[int, tuple[int, ...]], ...], size: int, budget: int | None
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """The first rows, as many as a micro-batch holds; one at least."""
    if budget is None:
        return prompts[:size]
    ends = np.cumsum([prefix + sum(branches) for prefix, branches in prompts])
    return prompts[: max(int(np.searchsorted(ends, budget, side="right")), 1)]


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
