"""What to say about a key that this program does not take: whose it is, or which one is probably meant."""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

from alignkit.config import foreign_keys
from alignkit.config.keys import base_keys, method_keys, methods_with, program_methods, rule_keys, rules_with
from alignkit.parts.shape import shapes_by_program

_LAUNCHER_FILES = {
    "zero_stage: 3": "zero3.yaml",
    "zero3": "zero3.yaml",
    "offload": "zero3.yaml",
    "zero": "zero2.yaml",
    "deepspeed": "zero2.yaml",
    "fsdp": "fsdp2.yaml",
    "multi_cpu": "cpu_ddp.yaml",
    "": "ddp.yaml",
}
"""Words of a launcher setting, and the shipped accelerate config that has it; the first that occurs counts."""
_LAUNCHER_PREFIXES = (
    "deepspeed", "zero", "offload_", "fsdp", "dynamo_", "tpu_", "rdzv_", "parallelism_config", "fp8_", "mpirun_",
)  # fmt: skip
_LAUNCHER_KEYS = {
    "accelerate_config",
    "commands", "command_file", "compute_environment", "debug", "distributed_type", "downcast_bf16",
    "enable_cpu_affinity", "gpu_ids", "ipex_config", "local_rank", "machine_rank", "main_process_ip",
    "main_process_port", "main_training_function", "max_restarts", "mixed_precision", "monitor_interval", "multi_gpu",
    "nnodes", "node_rank", "nproc_per_node", "num_cpu_threads_per_process", "num_machines", "num_processes",
    "same_network", "use_deepspeed", "use_fsdp", "world_size",
}  # fmt: skip


class Explanation(NamedTuple):
    """Why a key cannot be taken and what to write."""

    why: str
    fix: str


def is_launcher_key(name: str) -> bool:
    """Whether ``name`` belongs to ``accelerate launch`` or its config file."""
    return name in _LAUNCHER_KEYS or name.startswith(_LAUNCHER_PREFIXES)


def explain_rule_option(rule: str | None, name: str) -> Explanation:
    """What is wrong with an option of a gradient rule under ``rule``, which is another one or none."""
    owners = rules_with(name)
    listed = f"{', '.join(owners)} {'have' if len(owners) > 1 else 'has'} it"
    if rule is None:
        why = f"is an option of gradient rules, and there is none; {listed}"
        return Explanation(why, f"Remove it or write gradient_rule: {owners[0]}")
    own = ", ".join(rule_keys(rule)) or "none"
    why = f"is not an option of gradient rule {rule}; {listed}"
    return Explanation(why, f"Remove it or write gradient_rule: {owners[0]} (options of {rule}: {own})")


def explain_unknown(program: str, method: str | None, name: str, value: Any, rule: str | None = None) -> Explanation:
    """What is wrong with a key that is neither one of ``program`` nor of ``method`` or ``rule``."""
    name = name.strip()
    owners = methods_with(program, name)
    if owners and method is not None:
        return _other_method(method, name, owners)
    if is_launcher_key(name):
        return _launcher(program, name, value)
    if isinstance(value, dict) and any(key in base_keys(program) for key in value):
        return Explanation("is not a key: the file is flat", f"Write the keys below {name} at the top level")
    plain = name.lower().replace("-", "_")
    if (known := _foreign(plain, value)) is not None:
        return known
    others = [other for other in shapes_by_program() if other != program and plain in base_keys(other)]
    if others and plain not in base_keys(program):
        programs = [f"trainers/{other}.py" for other in others]
        alone = f"{programs[0]} alone" if len(programs) == 1 else f"{' and '.join(programs)}, not of this program"
        return Explanation(f"is a key of {alone}", "Remove it")
    negated = plain.removeprefix("no_")
    if negated != plain and negated in base_keys(program):
        return Explanation("is not a key", f"Write {negated}: false (--{negated} false)")
    near = _nearest(program, method, rule, plain)
    if near:
        return Explanation("is not a known key", f"Did you mean {near}?")
    return Explanation("is not a known key", "Remove it; `alignkit keys` lists those there are")


def _foreign(name: str, value: Any) -> Explanation | None:
    """What a key of another toolkit is here; None for one that is not in the table."""
    why = "is not a key of alignkit"
    if name in foreign_keys.WRITE:
        method = explain_method(value) if foreign_keys.WRITE[name] == "method" else None
        return Explanation(why, method or f"Write {foreign_keys.WRITE[name]}")
    if name in foreign_keys.ABSENT:
        return Explanation(why, f"alignkit has no {foreign_keys.ABSENT[name]}. Remove it")
    if name in foreign_keys.SETTLED:
        return Explanation(why, f"Remove it: {foreign_keys.SETTLED[name]}")
    return None


def explain_method(value: Any) -> str | None:
    """What to do in place of a method or loss type of another toolkit; None for one that is not in the table."""
    if isinstance(value, list):
        losses = ", ".join(f"{'dpo' if each == 'sigmoid' else each}: 1.0" for each in value)
        return f"Write method: {{{losses}}}, with the weights you want"
    return foreign_keys.METHODS.get(value.lower().replace("-", "_")) if isinstance(value, str) else None


def _nearest(program: str, method: str | None, rule: str | None, name: str) -> str | None:
    own = method_keys(method) if method else {k: v for m in program_methods(program) for k, v in method_keys(m).items()}
    candidates = [*own, *(rule_keys(rule) if rule else ()), *base_keys(program)]
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.7)
    return close[0] if close else None


def _other_method(method: str, name: str, owners: list[str]) -> Explanation:
    own = ", ".join(method_keys(method)) or "none"
    verb = "have" if len(owners) > 1 else "has"
    why = f"is not an option of method {method}; {', '.join(owners)} {verb} it"
    other = "one of these methods" if len(owners) > 1 else f"method: {owners[0]}"
    return Explanation(why, f"Remove it or write {other} (options of {method}: {own})")


def _launcher(program: str, name: str, value: Any) -> Explanation:
    setting = f"{name}: {value}".lower()
    file = "configs/accelerate/" + next(file for word, file in _LAUNCHER_FILES.items() if word in setting)
    command = f"accelerate launch --config_file {file} trainers/{program}.py --config ..."
    fix = f"Set it in an accelerate config such as {file} and start with `{command}`"
    if name == "mixed_precision":
        fix += "; in this file write bf16: true or fp16: true"
    return Explanation("belongs to the launcher, which reads another file", fix)
