from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignkit.config import find_recipe, load_config
from alignkit.config.foreign_keys import ABSENT, SETTLED, WRITE
from alignkit.config.names import is_launcher_key
from alignkit.errors import ConfigError
from alignkit.gradients.glad import GLADOptions
from alignkit.parts.method import load_method
from alignkit.shipped import configs_dir, recipe_names, recipe_path
from alignkit.yaml_text import parse_yaml
from tests.docs.pages import REPOSITORY

LAUNCHER_FILES = sorted((configs_dir() / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_loads(name: str) -> None:
    """Files are left out: models and data on the Hub cannot be seen from here, and smoke data is made by its tests."""
    method = parse_yaml(recipe_path(name).read_text())["method"]
    loaded = load_config(load_method(method).program, name, check_files=False)
    assert find_recipe(name) == recipe_path(name)
    assert f"{name}.yaml:" in loaded.sources["method"]


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_opens_with_its_launch_command(name: str) -> None:
    assert recipe_path(name).read_text().startswith("#")
    header = [line for line in recipe_path(name).read_text().splitlines() if line.startswith("#")]
    assert any(name in line and ("accelerate launch" in line or "alignkit train" in line) for line in header)


def values_of(recipe: str) -> dict[str, Any]:
    return parse_yaml(recipe_path(recipe).read_text())


@pytest.mark.parametrize(
    ("recipe", "plain", "added"),
    [
        ("preference/flex_dpo_qlora_glad", "preference/flex_dpo_qlora", {"gradient_rule", "rho", "scope"}),
        ("sft/full_decay_to_init", "sft/full", {"gradient_rule", "decay_coef"}),
    ],
)
def test_a_gradient_rule_is_a_few_lines_more(recipe: str, plain: str, added: set[str]) -> None:
    """All else is the plain recipe's, so that the two can be compared."""
    ruled, without = values_of(recipe), values_of(plain)
    assert ruled.pop("output_dir") != without.pop("output_dir")
    assert set(ruled) - set(without) == added
    assert {key: ruled[key] for key in without} == without


def test_recipes_with_glad_take_its_published_options() -> None:
    for program, recipe in [("preference", "preference/flex_dpo_qlora_glad"), ("sft", "sft/lora_glad")]:
        assert load_config(program, recipe, check_files=False).config.gradient_options == GLADOptions()


def test_the_control_of_the_few_shot_recipe_is_one_word_away() -> None:
    header = recipe_path("sft/lora_glad").read_text().partition("model:")[0]
    words = next(line for line in header.splitlines() if "control" in line).partition(": ")[2].split()
    control = load_config("sft", "sft/lora_glad", words, check_files=False).config
    assert (control.gradient_rule, control.gradient_options.rho) == ("random_perturbation", GLADOptions().rho)


@dataclass(frozen=True)
class Architecture:
    """Sizes of a dense decoder, from its published config; its parameters are counted here by hand."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    tied: bool = False
    head_norms: bool = False

    def linear_maps(self) -> list[tuple[int, int]]:
        """Inputs and outputs of q, k, v, o, gate, up and down."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.hidden, query), (self.hidden, key), (self.hidden, key), (query, self.hidden)]
        return [*attention, (self.hidden, self.ffn), (self.hidden, self.ffn), (self.ffn, self.hidden)]

    def parameters(self) -> int:
        layer = sum(a * b for a, b in self.linear_maps()) + 2 * self.hidden + self.head_norms * 2 * self.head_dim
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.layers * layer + self.hidden

    def lora(self, rank: int) -> int:
        return self.layers * sum(rank * (a + b) for a, b in self.linear_maps())

    def pat(self, rank: int, *, with_embedding: bool = True) -> int:
        """Modules of 2 D r + D behind the embedding, each attention and each MLP, and D logits of the mask."""
        modules = 2 * self.layers + with_embedding
        return modules * (2 * self.hidden * rank + self.hidden) + self.hidden


LLAMA_1B = Architecture(128_256, 2048, 16, 32, 8, 64, 8192, tied=True)
LLAMA_8B = Architecture(128_256, 4096, 32, 32, 8, 128, 14_336)
MISTRAL_7B = Architecture(32_768, 4096, 32, 32, 8, 128, 14_336)
QWEN3_600M = Architecture(151_936, 1024, 28, 16, 8, 128, 3072, tied=True, head_norms=True)
QWEN3_4B = Architecture(151_936, 2560, 36, 32, 8, 128, 9728, tied=True, head_norms=True)
QWEN3_8B = Architecture(151_936, 4096, 36, 32, 8, 128, 12_288, head_norms=True)


@pytest.mark.parametrize(
    ("recipe", "dense", "pruned", "trained"),
    [
        (
            "pat_llama32_1b",
            LLAMA_1B,
            [replace(LLAMA_1B, hidden=1536), replace(LLAMA_1B, hidden=1536, tied=False)],
            [LLAMA_1B.pat(103, with_embedding=False), LLAMA_1B.lora(20)],
        ),
        ("pat_qwen3_8b", QWEN3_8B, [replace(QWEN3_8B, hidden=3072)], [QWEN3_8B.pat(200), QWEN3_8B.lora(20)]),
        ("pat_mistral_7b", MISTRAL_7B, [replace(MISTRAL_7B, hidden=3072)], [MISTRAL_7B.pat(200), MISTRAL_7B.lora(20)]),
        ("atp_llama", LLAMA_8B, [replace(LLAMA_8B, ffn=8192, heads=24, kv_heads=6)], [LLAMA_8B.lora(32)]),
    ],
)
def test_recipes_that_prune_say_the_sizes_before_and_after(
    recipe: str, dense: Architecture, pruned: list[Architecture], trained: list[int]
) -> None:
    header = recipe_path(f"sft/{recipe}").read_text().partition("model:")[0]
    said = [int(word.replace(",", "")) for word in re.findall(r"\d+(?:,\d{3}){2,}", header)]
    assert said == [dense.parameters(), *(each.parameters() for each in pruned), *trained]


def row_of_pruning_page(*begins: str) -> list[str]:
    """The cells behind the first of the only row that begins like this."""
    lines = [line.split(" | ") for line in (REPOSITORY / "docs/howto/pruning.md").read_text().splitlines()]
    (found,) = [[cell.strip("| ") for cell in line[1:]] for line in lines if line[: len(begins)] == list(begins)]
    return found


@pytest.mark.parametrize(
    ("model", "dense", "rank"),
    [
        ("Qwen3-0.6B", QWEN3_600M, 52),
        ("Llama-3.2-1B", LLAMA_1B, 103),
        ("Qwen3-4B", QWEN3_4B, 128),
        ("Mistral-7B-v0.3", MISTRAL_7B, 200),
        ("Qwen3-8B", QWEN3_8B, 200),
    ],
)
def test_what_pat_trains_is_shown_right(model: str, dense: Architecture, rank: int) -> None:
    a_map, tied = 2 * dense.hidden * rank + dense.hidden, dense.pat(rank, with_embedding=False)
    figures = [dense.hidden, dense.layers, rank, a_map, dense.pat(rank), tied if dense.tied else None, dense.lora(20)]
    shown = [str(figure) for figure in figures[:3]] + [
        "not tied" if each is None else f"{each:,}" for each in figures[3:]
    ]
    assert row_of_pruning_page(f"| {model}") == shown


@pytest.mark.parametrize(("model", "dense"), [("Qwen3-0.6B (tied)", QWEN3_600M), ("Qwen3-8B (untied)", QWEN3_8B)])
def test_what_a_quarter_of_an_axis_is_worth_is_shown_right(model: str, dense: Architecture) -> None:
    groups = dense.kv_heads * 3 // 4
    pruned = [
        replace(dense, hidden=dense.hidden * 3 // 4),
        replace(dense, ffn=dense.ffn * 3 // 4),
        replace(dense, heads=dense.heads // dense.kv_heads * groups, kv_heads=groups),
        replace(dense, layers=dense.layers - 4),
    ]
    assert row_of_pruning_page(f"| {model}") == [f"{each.parameters():,}" for each in (dense, *pruned)]


def keys_of(value: Any) -> set[str]:
    if not isinstance(value, dict):
        return set()
    return set(value) | {key for item in value.values() for key in keys_of(item)}


@pytest.mark.parametrize("path", LAUNCHER_FILES, ids=lambda path: path.stem)
def test_every_key_of_a_launcher_file_is_refused_as_such(path: Path) -> None:
    for key in keys_of(yaml.safe_load(path.read_text())):
        assert is_launcher_key(key) or key in {*WRITE, *ABSENT, *SETTLED, "gradient_accumulation_steps", "use_cpu"}, key


def test_launcher_files_named_in_messages_are_shipped(workspace: Path) -> None:
    keys = (
        "zero_stage: 2",
        "offload_param_device: cpu",
        "fsdp_version: 2",
        "num_processes: 2",
        "distributed_type: MULTI_CPU",
    )
    Path("c.yaml").write_text("\n".join(keys))
    with pytest.raises(ConfigError) as caught:
        load_config("preference", "c.yaml")
    named = {word for problem in caught.value.problems for word in problem.split() if word.startswith("configs/acc")}
    assert named == {f"configs/accelerate/{name}.yaml" for name in ("zero2", "zero3", "fsdp2", "ddp", "cpu_ddp")}
    assert all((configs_dir().parent / name).is_file() for name in named)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recipes in place of the shipped ones."""
    root = tmp_path / "configs"
    for name in ("preference/flex_dpo", "smoke/dpo", "accelerate/ddp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.yaml").write_text("method: dpo\n")
    monkeypatch.setattr("alignkit.shipped.configs_dir", lambda: root)
    monkeypatch.setattr("alignkit.config.recipes.configs_dir", lambda: root)
    return root


@pytest.mark.parametrize(
    "name", ["preference/flex_dpo", "preference/flex_dpo.yaml", "configs/preference/flex_dpo.yaml"]
)
def test_recipe_is_found_by_name(name: str, workspace: Path, shipped: Path) -> None:
    assert find_recipe(name) == shipped / "preference" / "flex_dpo.yaml"


def test_a_file_comes_before_a_recipe_of_the_same_name(workspace: Path, shipped: Path) -> None:
    (workspace / "smoke").mkdir()
    (workspace / "smoke" / "dpo.yaml").write_text("method: dpo\n")
    assert find_recipe("smoke/dpo.yaml") == Path("smoke/dpo.yaml")
    assert find_recipe("smoke/dpo") == shipped / "smoke" / "dpo.yaml"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("preference/flexdpo", "no shipped recipe. Did you mean preference/flex_dpo?"),
        ("mine.yml", "no shipped recipe. Did you mean mine.yaml?"),
        ("zzz", "Give the path of a YAML file. Shipped recipes: preference/flex_dpo, smoke/dpo."),
        ("accelerate/ddp", "configures the launcher, not the training"),
        (".", "is a folder, not a YAML file. Did you mean mine.yaml?"),
    ],
)
def test_recipe_that_does_not_exist(name: str, expected: str, workspace: Path, shipped: Path) -> None:
    (workspace / "mine.yaml").write_text("method: dpo\n")
    with pytest.raises(ConfigError) as caught:
        find_recipe(name)
    assert expected in caught.value.problems[0]
