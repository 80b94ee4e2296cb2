"""A configuration or a command line of TRL, LLaMA-Factory or axolotl as a config of alignkit.

    alignkit translate their.yaml
    alignkit translate their.yaml > run.yaml
    alignkit translate trl dpo --model_name_or_path Qwen/Qwen3-0.6B --dataset_name rows.jsonl --output_dir out

What a key is here is looked up in the table that error messages are made of. What has no place here, or is another
program's business, is left out and named in a comment, as is everything that keeps the result from being run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.config import foreign_keys
from alignkit.config.keys import base_keys, method_keys
from alignkit.config.load import load_config
from alignkit.config.method_value import known_method
from alignkit.config.names import is_launcher_key
from alignkit.config.overrides import UNSET, read_text, split_overrides
from alignkit.config.values import show
from alignkit.config.yaml_file import read_entries
from alignkit.errors import AlignkitError, ConfigError
from alignkit.parts.mixture import components_of
from alignkit.parts.shape import shapes_by_program
from alignkit.yaml_text import dump_yaml

TOOLS = ("trl", "llamafactory-cli", "axolotl")
STAGES = {
    **dict.fromkeys(("pt", "nll", "chunked_nll"), "sft"),
    **dict.fromkeys(("rlhf", "sigmoid"), "dpo"),
    **dict.fromkeys(("rm", "reward"), "bradley_terry"),
    "aot_pair": "aot_unpaired",
}
"""What a stage, subcommand or loss trains, where it is no method of that name."""
THERE = {"beta": 0.1, "gamma": 0.5, "alpha": 0.0, "label_smoothing": 0.0}
"""Defaults of preference losses in all three toolkits, where each loss has the values of its paper here."""
CPO_ALPHA_THERE = 1.0
"""Weight of the likelihood of the chosen that the CPO trainer of TRL and axolotl adds to SimPO if nothing is said."""
SUBCOMMANDS = ("train", "fine-tune", "preprocess", "--")
_NAME = re.compile(r"(?P<key>[a-z_]+)(?:: (?P<value>[\w.]+))?(?= \(|$)")
"""The beginning of advice that says all: a key, or a key with its value."""


@dataclass
class Translation:
    """What a foreign configuration is here.

    Attributes:
        values: Our keys.
        notes: What was left out, and why; one line each.
    """

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Print the translation."""
    given = list(words or ())
    if not given or given[0] in ("-h", "--help"):
        print(__doc__)
        return
    print(translated(_entries(given)), end="")


def translated(entries: Mapping[str, Any]) -> str:
    """The config as YAML, with what was left out, and what is still missing, as comments on top."""
    found = translate(entries)
    problems = _problems(found.values)
    comments = [f"# left out: {note}" for note in found.notes] + [f"# to do: {problem}" for problem in problems]
    method = components_of(str(found.values["method"]))
    shown = {"method": {each.name: each.weight for each in method}} if len(method) > 1 else {}
    return "\n".join([*comments, dump_yaml(found.values | shown)])


def _entries(words: Sequence[str]) -> dict[str, Any]:
    """Keys and values of a file, a command line, or a command line that names a file."""
    entries: dict[str, Any] = {}
    rest = list(words)
    if rest[0] in TOOLS:
        tool, *rest = rest
        if rest and not rest[0].startswith("--") and not Path(rest[0]).suffix:
            stage = rest.pop(0)
            entries |= {} if stage in SUBCOMMANDS else {"stage": stage}
        entries |= {"rl": "sft"} if tool == "axolotl" and "stage" not in entries else {}
        entries |= {"finetuning_type": "lora"} if tool == "llamafactory-cli" else {}
    last = None
    for name, text, _ in split_overrides(rest):
        value = True if text is None else read_text(text, None)
        if name is None and last is not None:  # argparse takes several words: --loss_type sigmoid sft
            earlier = entries[last]
            entries[last] = [*(earlier if isinstance(earlier, list) else [earlier]), value]
        elif name in (None, "config"):
            entries |= _of_file(str(text))
        else:
            last = str(name)
            entries[last] = None if value is UNSET else value
    return entries


def _of_file(path: str) -> dict[str, Any]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise AlignkitError(
            f"there is no file {path}. Give a YAML file, or a command that begins with {', '.join(TOOLS)}."
        )
    entries, problems = read_entries(file, path)
    if problems:
        raise ConfigError("the configuration cannot be read", [str(problem) for problem in problems])
    return {name: entry.value for name, entry in entries.items()}


def translate(entries: Mapping[str, Any]) -> Translation:
    """What keys and values of another toolkit are here.

    Args:
        entries: As they stand there, nulls among them.
    """
    found = Translation()
    given = {name: value for name, value in entries.items() if value is not None}
    found.values["method"] = _method(given)
    if not {"stage", "rl", "loss_type", "base_model"} & set(given):
        found.notes.append("what is trained, which nothing here says: sft is taken, write method: dpo for preferences")
    own = {**base_keys(_program(found.values["method"])), **method_keys(found.values["method"])}
    for name, value in given.items():
        if name in (*_SAYS_METHOD, *(_GAMMA_BY_BETA if "gamma" in own else ())) and name not in own:
            continue
        if name in _BY_VALUE:
            _take(found, name, value, _BY_VALUE[name](value))
        elif name in own:
            found.values[name] = value
        else:
            _look_up(found, name, value, own)
    if _program(found.values["method"]) == "preference":
        _take_defaults_of_there(found, own)
        ratio = next((given[name] for name in _GAMMA_BY_BETA if name in given), None)
        if ratio is not None and "gamma" in own:
            beta = _number("beta", found.values.get("beta", own["beta"].default))
            found.values["gamma"] = _number("gamma_beta_ratio", ratio) * beta
    _take_what_trains_there(found, given)
    if "disable_dropout" in own and found.values.pop("lora_dropout", 0):
        found.notes.append(
            "lora_dropout: a policy and its reference are compared without dropout; disable_dropout: false"
        )
    return found


def _take_what_trains_there(found: Translation, given: Mapping[str, Any]) -> None:
    """All weights, where no adapter is said: adapters are the default here, and in LLaMA-Factory, of its own size."""
    if given.get("finetuning_type") == "lora":
        found.values.setdefault("lora_r", 8)
        found.values.setdefault("lora_alpha", int(2 * _number("lora_rank", found.values["lora_r"])))
    has_adapter = any(key in ("adapter", "quantization") or "lora" in key for key in found.values)
    if not has_adapter:
        found.values.setdefault("parametrization", "full")


def _take_defaults_of_there(found: Translation, own: Mapping[str, Any]) -> None:
    """What was left to the defaults there has another one here: it is written, unless it is refused here."""
    for name, value in THERE.items():
        allowed = name in own and (own[name].info.gt is None or value > own[name].info.gt)
        if allowed and own[name].default != value:
            found.values.setdefault(name, value)


_GAMMA_BY_BETA = ("gamma_beta_ratio", "simpo_gamma_beta_ratio")
_SAYS_METHOD = (
    "stage",
    "rl",
    "pref_loss",
    "loss_type",
    "loss_weights",
    "do_train",
    "pref_ftx",
    "rpo_alpha",
    "cpo_alpha",
)


def _method(given: Mapping[str, Any]) -> str:
    """The method, or the mixture of methods, that stage and loss say."""
    stage = str(given.get("stage", given.get("rl", "sft")))
    losses = None if stage == "grpo" else given.get("loss_type", given.get("pref_loss"))
    names = [str(name) for name in _as_list(losses or stage)]
    methods = [STAGES.get(name, name) for name in names]
    weights = _as_list(given.get("loss_weights", [1.0] * len(methods)))
    if len(weights) != len(methods):
        raise AlignkitError(f"loss_weights has {len(weights)} weights for {len(methods)} losses. Give each loss one.")
    mixed = {name: _number("loss_weights", weight) for name, weight in zip(methods, weights, strict=True)}
    if (sft := _number("rpo_alpha", given.get("pref_ftx", given.get("rpo_alpha", 0)))) > 0:
        if "sft" in mixed:
            raise AlignkitError(
                f"the weight of the SFT term is given twice, {mixed['sft']:g} and {sft:g}. Keep one of them."
            )
        mixed["sft"] = sft
    likelihood = _number("cpo_alpha", given.get("cpo_alpha", CPO_ALPHA_THERE))
    if names == ["simpo"] and "pref_loss" not in given and likelihood > 0:
        mixed["sft"] = likelihood
    text = next((found for p in shapes_by_program() if (found := known_method(p, mixed))), None)
    if text is None:
        advice = foreign_keys.METHODS.get(names[0], "`alignkit methods` lists what there is")
        raise AlignkitError(f"{' and '.join(map(str, names))}: {advice}.")
    return text


def _program(method: str) -> str:
    return next(program for program in shapes_by_program() if known_method(program, method))


def _look_up(found: Translation, name: str, value: Any, own: Mapping[str, Any]) -> None:
    """One key by the table; what the table says in words is a note, as is what this program has no use for."""
    plain = name.lower().replace("-", "_")
    if is_launcher_key(plain):
        found.notes.append(f"{name}: {show(value)} belongs to the launcher: `accelerate launch --config_file ...`")
    elif advice := foreign_keys.WRITE.get(plain):
        match = _NAME.match(advice)
        if match is None or match["key"] == "method" or (match["key"] not in own and value is not False):
            found.notes.append(f"{name}: {show(value)}. Write {advice}")
        elif match["key"] not in own:
            return  # switched off, where it is not there at all
        elif match["value"] is None:
            found.values[match["key"]] = value
        elif value is not False:
            found.values[match["key"]] = read_text(match["value"], None)
    elif plain in foreign_keys.ABSENT and value is not False:
        found.notes.append(f"{name}: {show(value)} (alignkit has no {foreign_keys.ABSENT[plain]})")
    elif plain not in foreign_keys.ABSENT:
        found.notes.append(f"{name}: {show(value)} ({foreign_keys.SETTLED.get(plain, 'not known here')})")


def _take(found: Translation, name: str, value: Any, taken: Mapping[str, Any] | str) -> None:
    """What a value is here: keys of ours, or why it is left out."""
    if isinstance(taken, str):
        found.notes.append(f"{name}: {show(value)} ({taken})")
    else:
        found.values.update(taken)


def _number(name: str, value: Any) -> float:
    """A value that must be one; raises AlignkitError with the key that has it."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise AlignkitError(f"{name}: {show(value)} is no number. Write one, or remove the key.") from None


def _named(names: Mapping[Any, Any], value: Any) -> Any:
    """Our name of a value, or the value itself."""
    return names.get(value, value) if isinstance(value, (str, int)) else value


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _sources(value: Any) -> Mapping[str, Any]:
    """Data sets: a name, names with commas between them, or entries with a path."""
    entries = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    kept = ("path", "weight", "split", "config")
    sources = [
        {key: each[old] for key, old in zip(kept, ("path", "weight", "split", "name"), strict=True) if each.get(old)}
        if isinstance(each, Mapping)
        else str(each).strip()
        for each in entries
    ]
    plain = [each["path"] if isinstance(each, dict) and set(each) == {"path"} else each for each in sources]
    return {"data": plain[0] if len(plain) == 1 and isinstance(plain[0], str) else plain}


def _adapter(value: Any) -> Mapping[str, Any] | str:
    known = {"lora": {}, "qlora": {"quantization": "nf4"}}
    if str(value) in known:
        return {"parametrization": "lora", **known[str(value)]}
    return {"adapter": value}


def _held_out(value: Any) -> Mapping[str, Any] | str:
    if isinstance(value, (int, float)) and 0 < value < 1:
        return {"eval_fraction": value}
    return "nothing is held out" if not value else "a share of the rows: write eval_fraction: 0.05"


def _each_epoch(what: str, times: Any) -> Mapping[str, Any] | str:
    if times == 1:
        return {f"{what}_strategy": "epoch"}
    return f"write {what}_strategy: steps and {what}_steps, below 1 a share of all steps"


def _switch(key: str, value: Any) -> Callable[[Any], Mapping[str, Any] | str]:
    return lambda given: {key: value} if given else {}


_BY_VALUE: Mapping[str, Callable[[Any], Mapping[str, Any] | str]] = {
    "reward_funcs": lambda value: {"rewards": [_named(_REWARDS, name) for name in _as_list(value)]},
    "lora_target_linear": _switch("lora_target_modules", "all-linear"),
    "template": lambda value: "the tokenizer's own chat template is used; chat_template: FILE names another",
    "dataset_dir": lambda value: "data sets are named by their paths: data",
    "datasets": _sources,
    "dataset": _sources,
    "dataset_name": _sources,
    "adapter": _adapter,
    "finetuning_type": lambda value: {"parametrization": value},
    "use_peft": _switch("parametrization", "lora"),
    "lora_target": lambda value: {"lora_target_modules": "all-linear" if value == "all" else str(value).split(",")},
    "load_in_4bit": _switch("quantization", "nf4"),
    "load_in_8bit": _switch("quantization", "int8"),
    "quantization_method": lambda value: {} if value == "bnb" else "bitsandbytes alone is taken",
    "quantization_bit": lambda value: {"quantization": _named({4: "nf4", 8: "int8"}, value)},
    "flash_attention": _switch("attn_implementation", "flash_attention_2"),
    "flash_attn": lambda value: {} if value == "auto" else {"attn_implementation": _named(_ATTENTION, value)},
    "val_size": _held_out,
    "val_set_size": _held_out,
    "evals_per_epoch": lambda value: _each_epoch("eval", value),
    "saves_per_epoch": lambda value: _each_epoch("save", value),
    "overwrite_output_dir": _switch("overwrite", True),
    "resume_from_checkpoint": _switch("resume", "auto"),
    "train_on_inputs": lambda value: {"completion_only_loss": False} if value else {},
    "optimizer": lambda value: {"optim": _named({"adamw_8bit": "adamw_bnb_8bit"}, value)},
}
"""Keys whose value says what they are here."""
_REWARDS = {"accuracy_reward": "gsm8k_answer", "get_soft_overlong_punishment": "soft_overlong"}
_ATTENTION = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "disabled": "eager"}


def _problems(values: Mapping[str, Any]) -> list[str]:
    """What keeps the config from being used, files aside."""
    words = [word for key, value in values.items() for word in (f"--{key}", dump_yaml(value, one_line=True))]
    try:
        load_config(_program(str(values["method"])), None, words, check_files=False)
    except ConfigError as error:
        return [problem.removeprefix("command line: ") for problem in error.problems]
    return []
