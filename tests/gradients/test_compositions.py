"""Every composition of the matrix in docs/concepts/compatibility.md, from its config to trained weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.config import load_config
from alignkit.errors import ConfigError
from alignkit.gradients._hook import chosen_rule
from alignkit.parametrizations._policy import load_policy, prepare
from alignkit.parts.method import load_method
from alignkit.parts.rule import load_rule
from alignkit.yaml_text import dump_yaml
from tests import supervised
from tests.gradients.compositions import (
    ALL,
    IN_FULL,
    METHODS,
    OF_ROUTERS,
    REFUSED,
    RULES,
    TRAINED,
    Composition,
    conflict_of,
    program,
    rules_of,
)
from tests.gradients.conftest import DISPLACING, EDITING, chosen
from tests.gradients.steps import drawn, expected_gradients, micro_batches, step_gradients, trainable
from tests.gradients.test_hook import NOTHING
from tests.models.test_quantized import wide_model
from tests.programs.conftest import save_model
from tests.shapes import building
from tests.shapes.test_preference_trainer import rows_for
from tests.trainers import logged

__all__ = ["wide_model"]

PULL = 0.5
STRONG: dict[str, dict[str, float]] = {"decay_to_init": {"decay_coef": PULL}, "l2_sp": {"l2_sp_coef": 0.5}}
"""Pulls that two steps show; whatever else is asked of a rule is its published default."""
STEPS, RATE = 2, 1e-2
Build = Callable[[Composition], tuple[Any, Any]]


def load(composition: Composition, model: str, folder: Path) -> Any:
    """The composition's config, as a user would write it."""
    own = building.OWN_KEYS.get(program(composition), {})
    values = {"model": model, "data": "rows.jsonl", "output_dir": "run", **own, **composition.config}
    file = folder / "composition.yaml"
    file.write_text(dump_yaml(values))
    return load_config(program(composition), file, check_files=False).config


@pytest.fixture(scope="session")
def supervised_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved models of the supervised tests by parametrisation; bitsandbytes wants multiples of 64 on the CPU."""
    narrow, wide = (str(tmp_path_factory.mktemp(name)) for name in ("narrow", "wide_supervised"))
    supervised.model().save_pretrained(narrow)
    supervised.model(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(wide)
    # Of few experts none is idle, and of mixing weights that are not made to sum to 1 every router has a gradient.
    mixture = str(tmp_path_factory.mktemp("mixture"))
    words = map(str, range(len(supervised.tokenizer())))
    save_model(
        Path(mixture), words=("<pad>", "<eos>", "<unk>", *words), hidden=64, num_experts=4, tie_word_embeddings=False
    )
    return {"full": narrow, "LoRA": narrow, "QLoRA": wide, "mixture": mixture}


@pytest.fixture(scope="session")
def supervised_rows() -> Any:
    return supervised.token_rows(supervised.completions(8), max_length=48)


@pytest.fixture
def build(
    make_trainer: Any,
    model_path: str,
    wide_model: str,
    supervised_models: dict[str, str],
    supervised_rows: Any,
    rows: Any,
    tmp_path: Path,
    watched: Any,
) -> Build:
    """The trainer of a composition, and what its rule sees."""
    pairs = {"full": model_path, "LoRA": model_path, "QLoRA": wide_model}
    arguments = {"max_steps": STEPS, "learning_rate": RATE, "lr_scheduler_type": "constant"}
    arguments |= {"per_device_train_batch_size": 2}

    def make(composition: Composition) -> tuple[Any, Any]:
        is_supervised = program(composition) == "sft"
        models = pairs if program(composition) == "preference" else supervised_models
        chooses = composition.parametrization == "routers" or program(composition) == "router"
        model = supervised_models["mixture"] if chooses else models[composition.parametrization]
        config = load(composition, model, tmp_path)
        options = {**asdict(config.gradient_options), **STRONG.get(composition.rule, {})}
        rule, seen = chosen_rule(composition.rule, load_rule(composition.rule).options(**options)), None
        if composition.rule in EDITING:
            rule, seen = watched(composition.rule, **options)
        # Without Adam's memory of earlier gradients a step with none shows the pull alone.
        changes = arguments | ({"optim": "sgd", "learning_rate": 0.5} if composition.rule == "decay_to_init" else {})
        if program(composition) not in ("preference", "sft"):
            keys = changes | {"use_cpu": True, "per_device_train_batch_size": 8}
            run = building.config_of(program(composition), config.model, tmp_path, **composition.config, **keys)
            rows_as_text = building.text_rows(run, 8)
            return building.build(run, rows_as_text, rule=rule, tokenizer=supervised.tokenizer()), seen
        policy = load_policy(config)
        adapter = {"full": None, "routers": prepare(config, policy)}.get(composition.parametrization, supervised.lora())
        if is_supervised:
            trainer = supervised.make(tmp_path / "run", supervised_rows, model=policy, peft_config=adapter, **changes)
            trainer.gradient_rule = rule
            return trainer, seen
        trainer = make_trainer(
            composition.method,
            config.method_options,
            gradient_rule=rule,
            arguments=changes,
            model=policy,
            train_dataset=rows_for(composition.method, rows.select(range(8))),
            peft_config=adapter,
        )
        return trainer, seen

    return make


@pytest.mark.parametrize("composition", TRAINED, ids=str)
def test_composition_trains(build: Build, composition: Composition) -> None:
    if composition.parametrization == "QLoRA":
        pytest.importorskip("bitsandbytes")
    trainer, seen = build(composition)
    batches, counts = micro_batches(trainer)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()

    assert [math.isfinite(loss) for loss in logged(trainer, "loss")] == [True] * STEPS
    entry = trainer.state.log_history[STEPS - 1]
    metrics = {key: value for key, value in entry.items() if key.startswith("gradient/")}
    assert set(metrics) == set(load_rule(composition.rule).metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, start[name]) != p.requires_grad, f"{name}: what trains has moved, the rest has not"
    assert all("lora_" in n for n, p in trainer.model.named_parameters() if p.requires_grad) == (
        composition.parametrization != "full"
    )
    if composition.rule in EDITING:
        check_edited_gradient(trainer, seen, batches, counts)
    else:
        check_pull(trainer, start)


def check_edited_gradient(trainer: Any, seen: Any, batches: list[dict[str, Tensor]], counts: Tensor) -> None:
    """It is not the plain one, it is the one computed by writing weights, and with a strength of 0 the plain one."""
    assert {p.dtype for p in trainable(trainer)} == {torch.float32}, "on a 4-bit base too"
    rule = trainer.gradient_rule
    if load_method(trainer.method.name).program == "online":
        trainer.model.train()
        batches = drawn(trainer, batches)
    edited = step_gradients(trainer, batches, counts)
    seed = seen.evaluations[-1][0].seed
    trainer.gradient_rule = None
    plain = step_gradients(trainer, batches, counts)
    difference = length([x - y for x, y in zip(edited, plain, strict=True)])
    assert difference > 1e-3 * length(plain)
    if not rule.rule.needs_start:
        for x, y in zip(edited, expected_gradients(trainer, rule, batches[0], counts, seed), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    if rule.rule.name in NOTHING:
        trainer.gradient_rule = chosen(rule.rule.name, **NOTHING[rule.rule.name])
        for x, y in zip(step_gradients(trainer, batches, counts), plain, strict=True):
            assert torch.equal(x, y)
    else:
        for w, x, y in zip(trainable(trainer), edited, plain, strict=True):
            assert abs((w * x).sum()) < 1e-4 * w.norm() * x.norm()
            assert x.norm().item() == pytest.approx(y.norm().item(), rel=1e-4)


def check_pull(trainer: Any, start: dict[str, Tensor]) -> None:
    """One more step, on gradients of 0: every tensor that trains comes back by its share of the distance."""
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for p in trainable(trainer):
        p.grad = torch.zeros_like(p)
    trainer.optimizer.step()
    for name, p in trainer.model.named_parameters():
        share = trainer.args.learning_rate * PULL if p.requires_grad else 0.0
        torch.testing.assert_close(p - trained[name], share * (start[name] - trained[name]), rtol=1e-3, atol=1e-7)


def length(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors]).norm()


@pytest.mark.parametrize("composition", REFUSED, ids=str)
def test_composition_is_refused_with_the_documented_reason(composition: Composition, tmp_path: Path) -> None:
    conflict = conflict_of(composition)
    with pytest.raises(ConfigError) as caught:
        load(composition, "base", tmp_path)
    (problem,) = caught.value.problems
    assert conflict.why in problem and conflict.fix in problem


def test_what_the_matrix_must_hold() -> None:
    """The list is derived; these are the compositions that no change of it may lose."""
    tried = {(c.method, c.rule, c.parametrization) for c in TRAINED}
    assert len(tried) == len(TRAINED) == len({str(c) for c in TRAINED})
    assert {"adpo", "d2o", "dpo", "flex_dpo", "sft", "treg"} <= set(METHODS) and len(RULES) >= 10
    assert set(DISPLACING) < set(EDITING) < set(RULES)
    everywhere = [method for method in METHODS if rules_of(method) == RULES]
    assert {"adpo", "d2o", "distill", "dpo", "flex_dpo", "grpo", "roma", "sft", "treg"} <= set(everywhere)
    assert {(m, r, "LoRA") for m, r in product(everywhere, RULES)} <= tried
    assert {(m, r, "QLoRA") for m, r in product(everywhere, ["glad", "perpgrad"])} <= tried
    assert all(len(rules_of(method)) == 1 for method in {*METHODS} - {*everywhere})
    assert {c.method for c in TRAINED} == set(METHODS), "every method trains with a rule"
    assert {(m, r, "full") for m, r in product(IN_FULL, RULES)} <= tried
    refused = [f"{method}-glad-routers" for method in OF_ROUTERS]
    assert [str(c) for c in REFUSED] == ["flex_dpo-glad-full", "sft-glad-full", *refused]
    assert {(m, r, "routers") for m, r in product(OF_ROUTERS, ["glad", "perpgrad"])} <= tried


def test_glad_on_a_qlora_model_is_three_lines() -> None:
    for method in ("flex_dpo", "treg", "adpo"):
        (composition,) = [c for c in ALL if (c.method, c.rule, c.parametrization) == (method, "glad", "QLoRA")]
        assert dump_yaml(composition.config).splitlines() == [
            f"method: {method}",
            "gradient_rule: glad",
            "quantization: nf4",
        ]


def test_the_page_shows_what_is_tried(repository: Path) -> None:
    """Read from the page by itself: a cell holds exactly the parametrisations that some test above trains."""
    page = (repository / "docs" / "concepts" / "compatibility.md").read_text()
    table = page.partition("begin generated: compositions -->")[2].partition("<!-- end generated -->")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:1] == "|"]
    header, _, *body = lines
    shown = {(row[0].strip("`"), header[i].strip("`")): row[i] for row in body for i in range(1, len(header))}
    assert len(shown) == len(METHODS) * len(RULES)
    for (rule, method), cell in shown.items():
        tried = [c.label for c in TRAINED if (c.rule, c.method) == (rule, method)]
        assert cell.split("; ") == (tried or ["-"]), (rule, method)
