"""Folders that somebody hostile could hand on: adapters, models, and the cards that come with them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.chaos.hostile import CODE, GIVEN, MERGES, PICKLE, SPRUNG, Hostile, bomb
from tests.programs.launching import PREFERENCE, REPOSITORY

MERGE = REPOSITORY / "scripts" / "merge_adapter.py"
CATASTROPHIC = r"(\w+\.?)+!"
OUTSIDE = "../secret.txt"
Edit = Callable[[Path], object]


def changed(file: str, **values: Any) -> Edit:
    """Changes values of a JSON file."""

    def edit(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def holding(file: str, content: str | bytes, *removed: str) -> Edit:
    """Replaces a file, and removes others."""

    def edit(folder: Path) -> None:
        for name in removed:
            (folder / name).unlink()
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return edit


def both(*edits: Edit) -> Edit:
    """Makes several changes."""

    def edit(folder: Path) -> None:
        for one in edits:
            one(folder)

    return edit


def tensors(file: str, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Edit:
    """Changes the tensors of a safetensors file."""

    def edit(folder: Path) -> None:
        save_file(dict(change(load_file(folder / file))), folder / file, metadata={"format": "pt"})

    return edit


def header(file: str, change: Callable[[dict[str, Any]], Any]) -> Edit:
    """Changes the header of a safetensors file and nothing of its numbers."""

    def edit(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        new = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size :])

    return edit


def cut(file: str) -> Edit:
    """Cuts a file in half."""
    return lambda folder: (folder / file).write_bytes(
        (folder / file).read_bytes()[: (folder / file).stat().st_size // 2]
    )


def overlapping(content: dict[str, Any]) -> dict[str, Any]:
    """All tensors take the place of the first."""
    first = next(value for name, value in content.items() if name != "__metadata__")
    return {name: value if name == "__metadata__" else first for name, value in content.items()}


def beyond(content: dict[str, Any]) -> dict[str, Any]:
    """The tensors are where no file is."""
    far = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    return {name: value if name == "__metadata__" else far for name, value in content.items()}


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTERS: Mapping[str, tuple[Edit, str | None]] = {
    "a pattern of modules that never ends": (
        changed(CONFIG, target_modules=CATASTROPHIC),
        "has a pattern, .* takes longer than 10 s",
    ),
    "an exception that never ends": (
        changed(CONFIG, exclude_modules=CATASTROPHIC),
        "has a pattern, .* takes longer than 10 s",
    ),
    "parameters by a pattern that never ends": (
        changed(CONFIG, target_parameters=[CATASTROPHIC]),
        "has a pattern, .* takes longer than 10 s",
    ),
    "modules to save by a pattern": (
        changed(CONFIG, modules_to_save=[CATASTROPHIC]),
        "has a pattern, .* takes longer than 10 s",
    ),
    "a pattern that is none": (changed(CONFIG, target_modules="(q_proj"), "that is none: missing .*, unterminated"),
    "ranks by a pattern that is none": (changed(CONFIG, rank_pattern={"(q_proj": 4}), "that is none: missing"),
    "a huge rank": (changed(CONFIG, r=10**9), "r is 1000000000, expected"),
    "an astronomic rank": (changed(CONFIG, r=10**30), "r is 10*, expected"),
    "ranks by layer that are huge": (
        changed(CONFIG, rank_pattern={"q_proj": 10**9}),
        "rank_pattern is .* expected a rank",
    ),
    "a negative rank": (changed(CONFIG, r=-1), "r is -1, expected"),
    "a rank that is text": (changed(CONFIG, r="4"), "r is '4', expected"),
    "a rank of NaN": (changed(CONFIG, r=float("nan")), "r is nan, expected"),
    "a scale that is text": (changed(CONFIG, lora_alpha="many"), "lora_alpha is 'many'"),
    "modules of a wrong type": (changed(CONFIG, target_modules=7), "target_modules is 7"),
    "a mapping of ranks that is a list": (changed(CONFIG, rank_pattern=["x"]), "rank_pattern is"),
    "a base of a wrong type": (changed(CONFIG, base_model_name_or_path=["x"]), "base_model_name_or_path is"),
    "a base outside": (changed(CONFIG, base_model_name_or_path="../../../etc"), "which is not here"),
    "an unknown kind": (changed(CONFIG, peft_type="EVIL"), "is of kind 'EVIL'"),
    "a kind of a wrong type": (changed(CONFIG, peft_type={"a": 1}), "has no peft_type"),
    "an unknown task": (changed(CONFIG, task_type="EVIL"), "Invalid task type"),
    "unknown keys": (changed(CONFIG, __reduce__="os.system", evil={"a": 1}), None),
    "classes of its own": (changed(CONFIG, auto_mapping={"base_model_class": "x", "parent_library": "os"}), None),
    "a library of its own": (
        both(
            changed(CONFIG, megatron_config={"a": 1}, megatron_core="sprung_module"),
            lambda folder: (folder.parent / "sprung_module.py").write_text(CODE),
        ),
        "potential security risk",
    ),
    "a search of its data": (changed(CONFIG, init_lora_weights="eva", eva_config={"rho": 2.0}), None),
    "a file for CorDA": (
        changed(CONFIG, init_lora_weights="corda", corda_config={"cache_file": OUTSIDE, "covariance_file": OUTSIDE}),
        "preprocess_corda",
    ),
    "LoftQ": (changed(CONFIG, init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "does not fit the model"),
    "LoRA-GA": (changed(CONFIG, init_lora_weights="lora_ga", lora_ga_config={}), None),
    "PiSSA": (changed(CONFIG, init_lora_weights="pissa"), None),
    "endless layers again": (
        changed(CONFIG, layer_replication=[[0, 2]] * 10**6),
        "layer_replication is .* at most 10,000 layers",
    ),
    "layers in a range without end": (changed(CONFIG, layer_replication=[[0, 10**9]]), "layer_replication is"),
    "tokens beyond the vocabulary": (changed(CONFIG, trainable_token_indices=[10**9]), "out of bounds"),
    "modules to save that are the model": (changed(CONFIG, modules_to_save=["model"]), "does not fit the model"),
    "modules to save that are none": (changed(CONFIG, modules_to_save=["../x", "__class__"]), None),
    "a config nested deeply": (holding(CONFIG, "[" * 10**5), "is not JSON: it is nested too deeply"),
    "a config that is a list": (holding(CONFIG, "[]"), "holds list"),
    "a config with a long number": (
        holding(CONFIG, '{"peft_type": "LORA", "r": ' + "9" * 10**5 + "}"),
        "is not JSON: Exceeds",
    ),
    "a config that is not text": (holding(CONFIG, b"\xff\xfe"), "is not JSON"),
    "a pickle for weights": (holding("adapter_model.bin", PICKLE, WEIGHTS), "no adapter_model.safetensors"),
    "a pickle beside weights": (holding("adapter_model.bin", PICKLE), None),
    "a pickle called safe": (holding(WEIGHTS, PICKLE), "truncated or not a safetensors file"),
    "weights cut off": (cut(WEIGHTS), "truncated or not a safetensors file"),
    "tensors over one another": (header(WEIGHTS, overlapping), "truncated or not"),
    "tensors beyond the file": (header(WEIGHTS, beyond), "truncated or not"),
    "a header without end": (holding(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"), "truncated or not"),
    "a header of nothing": (holding(WEIGHTS, struct.pack("<Q", 0)), "truncated or not"),
    "a header nested deeply": (holding(WEIGHTS, struct.pack("<Q", 10**5) + b"[" * 10**5), "truncated or not"),
    "numbers that are none": (
        tensors(WEIGHTS, lambda found: {name: np.full_like(value, np.nan) for name, value in found.items()}),
        "tensors hold NaN or infinity",
    ),
    "numbers of another kind": (
        tensors(WEIGHTS, lambda found: {name: value.astype(np.int64) for name, value in found.items()}),
        None,
    ),
    "wrong shapes": (
        tensors(WEIGHTS, lambda found: {name: value.T.copy() for name, value in found.items()}),
        "size mismatch",
    ),
    "tensors of other names": (
        tensors(WEIGHTS, lambda found: {f"../{name}": value for name, value in found.items()}),
        "have no place in it",
    ),
    "a tokenizer that is broken": (
        both(holding("tokenizer_config.json", "[" * 10**5), holding("tokenizer.json", "{}")),
        "the tokenizer of 'adapter' cannot be loaded",
    ),
    "an origin nested deeply": (holding("alignkit.json", "[" * 10**5), "alignkit.json cannot be read"),
}
"""Adapters: what is done to a good one."""

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"


def index(weight_map: Any) -> Edit:
    """An index of shards in place of the one file."""
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    return both(
        lambda folder: (folder / MODEL).rename(folder / "shard.safetensors"), holding(INDEX, json.dumps(content))
    )


AUTO = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoTokenizer": ["mine.T", None]}
MODELS: Mapping[str, tuple[Edit, str | None]] = {
    "code of its own": (
        both(changed("config.json", auto_map=AUTO, model_type="mine"), holding("mine.py", CODE)),
        "trust_remote_code",
    ),
    "a tokenizer with code": (
        both(
            changed("tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.T", None]}, tokenizer_class="T"),
            holding("mine.py", CODE),
        ),
        None,
    ),
    "a generation with code": (
        both(
            changed("generation_config.json", custom_generate="mine", auto_map={"x": "mine.x"}),
            holding("mine.py", CODE),
        ),
        None,
    ),
    "code from elsewhere": (
        changed("config.json", auto_map={"AutoConfig": "evil/repo--mine.C"}, model_type="mine"),
        "trust_remote_code",
    ),
    "a billion layers": (
        changed("config.json", num_hidden_layers=10**9, layer_types=None),
        "num_hidden_layers: 1000000000, .* at most 10,000",
    ),
    "a vocabulary without end": (changed("config.json", vocab_size=10**12), "says vocab_size: 1000000000000"),
    "a width without end": (changed("config.json", hidden_size=10**9), "says hidden_size"),
    "a width beyond any": (changed("config.json", hidden_size=10**30), "says hidden_size"),
    "a billion positions": (changed("config.json", max_position_embeddings=10**18), None),
    "no layers": (changed("config.json", num_hidden_layers=0, layer_types=[]), "no linear layer"),
    "negative layers": (
        changed("config.json", num_hidden_layers=-1, layer_types=None),
        "the tokenizer of 'model' cannot be loaded",
    ),
    "heads that are text": (
        changed("config.json", num_attention_heads="many"),
        "the tokenizer of 'model' cannot be loaded",
    ),
    "no heads": (changed("config.json", num_attention_heads=0), "the model 'model' cannot be loaded"),
    "a vocabulary that is a list": (
        changed("config.json", vocab_size=[64]),
        "the tokenizer of 'model' cannot be loaded",
    ),
    "an activation that is code": (
        changed("config.json", hidden_act="__import__('os').mkdir('sprung')"),
        "the model 'model' cannot be loaded",
    ),
    "an unknown type": (changed("config.json", model_type="evil"), "the model 'model' cannot be loaded"),
    "a type that is a path": (changed("config.json", model_type="../../evil"), "the model 'model' cannot be loaded"),
    "a type of a wrong type": (
        changed("config.json", model_type=["qwen3"]),
        "the tokenizer of 'model' cannot be loaded",
    ),
    "a type that is no language model": (
        changed("config.json", model_type="vit"),
        "the model 'model' cannot be loaded",
    ),
    "an unknown quantisation": (
        changed("config.json", quantization_config={"quant_method": "evil"}),
        "quantised by 'evil'",
    ),
    "a quantisation of a wrong type": (
        changed("config.json", quantization_config="nf4"),
        "the tokenizer of 'model' cannot be loaded",
    ),
    "a number format that is code": (
        changed("config.json", dtype="os.system"),
        "the tokenizer of 'model' cannot be loaded",
    ),
    "an attention from elsewhere": (
        changed("config.json", _attn_implementation="evil/kernel"),
        "the model 'model' cannot be loaded",
    ),
    "experts of its own": (
        changed("config.json", rope_parameters={"rope_type": "evil"}),
        "the model 'model' cannot be loaded",
    ),
    "a config nested deeply": (holding("config.json", "[" * 10**5), "is not JSON: it is nested"),
    "a config with a long number": (
        holding("config.json", '{"vocab_size": ' + "9" * 10**5 + "}"),
        "is not JSON: Exceeds",
    ),
    "a config that is a list": (holding("config.json", "[]"), "holds list"),
    "a config that is not text": (holding("config.json", b"\xff\xfe\x00"), "is not JSON"),
    "a pickle for weights": (holding("pytorch_model.bin", PICKLE, MODEL), "is a pickle"),
    "shards outside": (index({"model.norm.weight": "../secret.safetensors"}), "which lies elsewhere"),
    "shards of a rooted path": (index({"model.norm.weight": "/etc/hostname"}), "which lies elsewhere"),
    "shards that are missing": (index({"model.norm.weight": "gone.safetensors"}), "which is not here"),
    "an index of weights that nobody loads": (
        holding("pytorch_model.bin.index.json", json.dumps({"weight_map": {"x": "pytorch_model-1.bin"}})),
        None,
    ),
    "an index that is a list": (index(["x"]), "no weight_map"),
    "an index nested deeply": (both(holding(INDEX, "[" * 10**5, MODEL)), "has no weights"),
    "weights cut off": (cut(MODEL), "truncated or damaged"),
    "tensors over one another": (header(MODEL, overlapping), "truncated or damaged"),
    "a header without end": (holding(MODEL, struct.pack("<Q", 2**63) + b"{}"), "header"),
    "numbers that are none": (
        tensors(MODEL, lambda found: {name: np.full_like(value, np.nan) for name, value in found.items()}),
        "its log-probs are no numbers",
    ),
    "a tokenizer nested deeply": (holding("tokenizer.json", "[" * 10**5), "the tokenizer of 'model' cannot be loaded"),
    "a tokenizer that is empty": (holding("tokenizer.json", "{}"), "the tokenizer of 'model' cannot be loaded"),
    "a tokenizer with ids beyond any": (
        lambda folder: (folder / "tokenizer.json").write_text(
            (folder / "tokenizer.json").read_text().replace('"w5": 8', '"w5": 4294967295')
        ),
        "the id 4,294,967,295",
    ),
    "a tokenizer with a catastrophic pattern": (
        changed(
            "tokenizer.json",
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(\\w+\\s*)+!"},
                "behavior": "Isolated",
                "invert": False,
            },
        ),
        "candidates are identical",
    ),
    "a tokenizer of another class": (changed("tokenizer_config.json", tokenizer_class="os.system"), None),
    "special tokens of a wrong type": (
        changed("tokenizer_config.json", eos_token=7),
        "the tokenizer of 'model' cannot be loaded",
    ),
    "lengths beyond any": (changed("tokenizer_config.json", model_max_length=10**400), None),
    "a tokenizer config nested deeply": (
        holding("tokenizer_config.json", "[" * 10**5),
        "the tokenizer of 'model' cannot be loaded",
    ),
    "a template with code": (
        holding("chat_template.jinja", "{{ cycler.__init__.__globals__.os.mkdir('sprung') }}"),
        None,
    ),
    "a template that never ends": (
        holding(
            "chat_template.jinja", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        ),
        "takes longer than",
    ),
    "a generation that is none": (
        holding("generation_config.json", "[" * 10**5),
        "the generation config of 'model' cannot be read",
    ),
    "a generation of wrong types": (
        changed("generation_config.json", temperature="hot", eos_token_id={"a": 1}),
        "generation config of 'model' cannot be",
    ),
}
"""Models: what is done to a good one."""

CARDS: Mapping[str, tuple[str | bytes, str | None]] = {
    "a bomb of aliases": (f"---\n{bomb(12, 10)}\n---\n", "values, more than"),
    "a bomb of merges": (f"---\n{MERGES}\n---\n", "values, more than"),
    "metadata that contain themselves": ("---\ntags: &a [*a]\n---\n", "has no end"),
    "metadata nested deeply": (f"---\ntags: {'[' * 20_000}\n---\n", "nested too deeply|not valid"),
    "an object": (f"---\ntags: !!python/object/apply:os.mkdir [{SPRUNG}]\n---\n", "could not determine a constructor"),
    "a list": ("---\n- a\n---\n", "it holds list"),
    "tags of a wrong type": ("---\ntags: 7\n---\n", "tags is 7"),
    "tags that are mappings": ("---\ntags: [{a: b}]\n---\n", "tags is "),
    "keys of the reader": ("---\nignore_metadata_errors: true\nself: 1\n---\n", "is not valid"),
    "a time that is none": ("---\ndate: 2024-13-45\n---\n", "is not valid"),
    "bytes": (b"---\nlicense: \xff\n---\n", "is not valid"),
    "NUL": ("---\nlicense: a\0\n---\n", "is not valid"),
    "metadata without end": ("---\nlicense: mit\n" * 2000, None),
    "a long line of spaces": (" " * 10**6 + "---", None),
    "another card inside": ('---\ntags: ["a\\n---\\nlicense: evil\\n---\\n# x"]\n---\n', None),
}
"""Cards that come with an adapter; the merged model inherits from them."""
NAMES = {
    "terminal codes": "\x1b]0;owned\x07\x1b[2J",
    "right to left": "\u202egnirts",
    "tags": "<script>alert(1)<script><img src=x onerror=alert(1)>",
    "links": "[here](javascript:alert(1))![](x.png)",
    "metadata": "a\n---\nlicense: evil\n---\n# heading",
    "a table": "|x|y|-|-|",
    "code": "`` ` ``code`$(mkdir sprung);mkdir sprung",
    "a template": "{{ 7*7 }}{% for i in range(9) %}",
}
"""Names of data, model and run, which get into the card of a run."""


def name_all(place: Path, name: str) -> None:
    """Gives rows and model a name."""
    (place / "rows.jsonl").rename(place / f"{name}.jsonl")
    (place / "model").rename(place / name)


def of_adapter(name: str, edit: Edit, says: str | None, *words: str, program: Path = MERGE) -> Hostile:
    """An adapter to which something was done, merged or trained on."""
    words = words or ("--adapter", "adapter", "--output", "merged")
    return Hostile("adapter", name, lambda place: edit(place / "adapter"), says, words, program, "never ends" in name)


CONTINUED = ("a pattern of modules that never ends", "a huge rank", "modules of a wrong type", "a kind of a wrong type")
"""What is tried with a training that continues the adapter, too: its config is looked at before torch is imported."""

CORPUS = [
    *(of_adapter(name, edit, says) for name, (edit, says) in ADAPTERS.items()),
    *(
        of_adapter(
            f"{name}, continued", ADAPTERS[name][0], "adapter", *GIVEN, "--adapter", "adapter", program=PREFERENCE
        )
        for name in CONTINUED
    ),
    *(
        Hostile("model", name, lambda place, edit=edit: edit(place / "model"), says, is_slow="never ends" in name)
        for name, (edit, says) in MODELS.items()
    ),
    *(
        Hostile(
            "card",
            name,
            lambda place, text=text: holding("README.md", text)(place / "adapter"),
            says,
            ("--adapter", "adapter", "--output", "merged"),
            MERGE,
        )
        for name, (text, says) in CARDS.items()
    ),
    *(
        Hostile(
            "card",
            f"a name of {name}",
            lambda place, text=text: name_all(place, text),
            None,
            (*GIVEN, "--model", f"./{text}", "--data", f"{text}.jsonl", "--output_dir", f"run {text}"),
        )
        for name, text in NAMES.items()
    ),
]
