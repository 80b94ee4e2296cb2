"""Router training: the supervised trainer with the routing of each prompt, compared with what it lies over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig

from alignkit.data.routed import to_routed_rows
from alignkit.errors import DataError, ModelError
from alignkit.losses.roma import roma_loss
from alignkit.models._routers import find_routers
from alignkit.shapes._routed import converter
from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of
from tests.trainers import flat_weights, logged

LAYERS, EXPERTS = 2, 4
WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("mixture")
    save_model(path, num_experts=EXPERTS, num_hidden_layers=3)
    return str(path)


def questions(count: int = 16) -> Dataset:
    """Rows with choices, prompts of different lengths, in two tasks."""
    rows = []
    for i in range(count):
        prompt = " ".join(WORDS[(i + j) % 37] for j in range(3 + i % 4)) + " "
        choices = [WORDS[i % 20] + " ", WORDS[20 + i % 20] + " "]
        rows.append({"prompt": prompt, "completion": choices[i % 2], "choices": choices, "task": "ab"[i % 2]})
    return Dataset.from_list(rows)


def trainer_of(
    model: str,
    folder: Path,
    method: str = "roma",
    held_out: Dataset | None = None,
    rows: Dataset | None = None,
    **keys: Any,
) -> Any:
    program = "sft" if method == "sft" else "router"
    own = (
        {} if method == "sft" else {"bank_layers": LAYERS, "bank_success": "choices", "bank_dir": str(folder / "bank")}
    )
    usual = {"parametrization": "routers", "router_layers": LAYERS, "learning_rate": 1e-2}
    given = {key: value for key, value in (usual | own | keys).items() if value is not None}
    config = config_of(program, model, folder, method=method, **given)
    return build(config, rows or questions(), held_out)


def test_without_the_regulariser_it_is_bitwise_the_supervised_trainer_over_trl(model: str, tmp_path: Path) -> None:
    # Which itself follows TRL's SFTTrainer to the last bit (test_supervised_parity.py).
    runs = []
    for method, keys in (("sft", {"router_aux_loss_coef": 0.0, "layout": "padded"}), ("roma", {"manifold_coef": 0.0})):
        folder = tmp_path / method
        folder.mkdir()
        trainer = trainer_of(model, folder, method, **keys)
        trainer.train()
        runs.append((logged(trainer, "loss"), logged(trainer, "grad_norm"), flat_weights(trainer.model)))
    assert runs[0][:2] == runs[1][:2] and len(runs[0][0]) == 3
    assert torch.equal(runs[0][2], runs[1][2])


def test_routing_is_that_of_the_prompt_alone_and_starts_at_the_banks(model: str, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    seen = batch_of_objective(trainer, batch)
    bank = trainer.banks["train"]
    assert seen.routing.shape == (4, LAYERS * EXPERTS) and seen.routing.requires_grad
    torch.testing.assert_close(seen.routing, bank.routing[batch["bank_row"]], rtol=0, atol=1e-6)
    torch.testing.assert_close(seen.routing.view(4, LAYERS, EXPERTS).sum(-1), torch.ones(4, LAYERS))
    # By hand: each prompt alone, unpadded, in the plain model, softmax of what its routers put out at its last token.
    for row, place in enumerate(batch["bank_row"].tolist()):
        prompt = bank_prompt(trainer, place)
        plain = trainer.model.get_base_model()
        logits = plain(input_ids=torch.tensor([prompt]), output_router_logits=True).router_logits
        by_hand = torch.cat([layer[-1].softmax(-1) for layer in logits[-LAYERS:]])
        torch.testing.assert_close(seen.routing[row], by_hand, rtol=0, atol=1e-6)


def batch_of_objective(trainer: Any, batch: Any) -> Any:
    seen = []
    own = trainer._batch

    def watched(*given: Any) -> Any:
        seen.append(own(*given))
        return seen[-1]

    trainer._batch = watched
    trainer.evaluate_objective(trainer.model, batch)
    trainer._batch = own
    return seen[0]


def bank_prompt(trainer: Any, place: int) -> list[int]:
    row = trainer.train_dataset[place]
    return [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]


def test_the_manifold_term_pulls_at_every_router_that_trains_and_falls(model: str, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, manifold_coef=100.0, max_steps=30, gradient_ratio_steps=10)
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    batch = next(iter(trainer.get_train_dataloader()))
    _, result = trainer.evaluate_objective(trainer.model, batch)
    manifold = result.terms[1].values.sum()
    assert manifold.requires_grad
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(trained) == LAYERS
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(manifold, trained, retain_graph=True))
    trainer.train()
    distances = logged(trainer, "roma/distance")
    assert sum(distances[-4:]) < 0.5 * sum(distances[:4])
    assert len(logged(trainer, "routing/gradient_ratio")) == 3 and min(logged(trainer, "routing/gradient_ratio")) > 0
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


def test_the_comparison_of_gradients_changes_nothing(model: str, tmp_path: Path) -> None:
    ends = []
    for every in (0, 1):
        trainer = trainer_of(model, tmp_path, gradient_ratio_steps=every, gradient_checkpointing=True)
        trainer.train()
        ends.append(flat_weights(trainer.model))
    assert torch.equal(*ends)


def test_held_out_rows_have_neighbours_among_the_training_rows(model: str, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, held_out=questions(5))
    assert len(trainer.banks["eval"]) == 5
    metrics = trainer.evaluate()
    assert metrics["eval_roma/with_target"] == 1.0 and metrics["eval_roma/drift"] < 1e-10
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == metrics["eval_loss"]
    # Rows of the training, numbered likewise, would be held against what the bank says of the held-out ones.
    for others in (trainer.train_dataset.select(range(5)), {"more": trainer.train_dataset.select(range(5))}):
        with pytest.raises(DataError, match="no place in the bank: give them to the trainer as eval_dataset"):
            trainer.evaluate(others)


@pytest.mark.parametrize("solved", [0, 2])
def test_a_run_without_any_neighbour_is_told_that_it_aligns_nothing(
    solved: int, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = questions().add_column("success", [True] * solved + [False] * (16 - solved))
    trainer = trainer_of(model, tmp_path, rows=rows, bank_success="column")
    told = capsys.readouterr().out
    warned = "no row has neighbours among the 0 that may be some" in told
    assert warned == (solved == 0) and ("roma is cross-entropy alone" in told) == warned
    trainer.train()
    shares, losses = logged(trainer, "roma/with_target"), logged(trainer, "loss/manifold")
    assert (max(shares) == 0) == warned and (max(losses) == 0) == warned


@pytest.mark.parametrize(
    ("keys", "looked_at"),
    [
        ({"parametrization": "lora", "router_layers": None}, LAYERS),
        ({"parametrization": "full", "router_layers": None}, LAYERS),
        ({"router_layers": 99, "bank_layers": 99}, 3),
    ],
)
def test_other_weights_may_train_and_more_layers_than_there_are_is_all(
    keys: dict[str, Any], looked_at: int, model: str, tmp_path: Path
) -> None:
    trainer = trainer_of(model, tmp_path, **keys)
    assert len(trainer.routers) == looked_at
    trainer.train()
    assert logged(trainer, "roma/drift")[0] < 1e-10 < logged(trainer, "roma/drift")[-1]


def test_a_dense_model_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    folder.mkdir()
    save_model(folder)
    with pytest.raises(ModelError, match="expert"):
        trainer_of(str(folder), tmp_path, parametrization="lora", router_layers=None)


def test_reentrant_checkpointing_is_refused(model: str, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path)
    args = SFTConfig(
        output_dir=str(tmp_path / "other"),
        use_cpu=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(ModelError, match="use_reentrant"):
        type(trainer)(trainer.model, args, train_dataset=trainer.train_dataset, method=None, options=None)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"choices": ["w1 ", "w2 "], "completion": "w3 "}, "the completion is not exactly one of the choices"),
        ({"choices": ["w3 "], "completion": "w3 "}, "no list of two texts"),
        ({"success": "yes", "completion": "w3 "}, "neither true nor false"),
        ({"task": None, "completion": "w3 "}, "task is no text"),
    ],
)
def test_rows_that_cannot_be_judged_are_refused(row: dict[str, Any], problem: str, model: str, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "w1 w2 ", **row}])
    with pytest.raises(DataError, match=problem):
        to_routed_rows(rows, AutoTokenizer.from_pretrained(model), max_length=64)


@pytest.mark.parametrize(
    ("success", "left_out", "problem"),
    [
        ("choices", "choices", "bank_success: choices reads choices_ids; give each row its choices"),
        ("column", "success", "bank_success: column reads success; add it"),
    ],
)
def test_training_rows_whose_success_cannot_be_told_are_refused_before_a_model_is_there(
    success: str, left_out: str, problem: str, model: str, tmp_path: Path
) -> None:
    rows = questions().add_column("success", [True, False] * 8)
    config = config_of("router", model, tmp_path, method="roma", bank_success=success)
    convert = converter(config, AutoTokenizer.from_pretrained(model))
    whole, _ = convert(rows, name="train")
    assert len(whole) == 16
    with pytest.raises(DataError, match=problem):
        convert(rows.remove_columns(left_out), name="train")
    assert len(convert(rows.remove_columns(left_out), name="held-out")[0]) == 16


def test_choices_that_are_cut_are_refused_with_the_length_that_holds_them(model: str) -> None:
    rows = Dataset.from_list(
        [
            {"prompt": "w1 w2 ", "completion": "w3 ", "choices": ["w3 ", "w4 w5 w6 "]},
            {"prompt": "w1 ", "completion": "w3 w4 ", "choices": ["w3 w4 ", "w5 "]},
        ]
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    longest = 2 + 3 + 1  # words of the prompt and of the longest choice, a token each, and the end of the completion
    with pytest.raises(DataError, match=rf"cuts 1 of 4 choices.*write max_length: {longest},"):
        to_routed_rows(rows, tokenizer, max_length=longest - 1)
    whole, _ = to_routed_rows(rows, tokenizer, max_length=longest)
    assert [len(choice) for choice in whole[0]["choices_ids"]] == [2, 4]


def test_the_loss_is_that_of_the_library(model: str, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, manifold_coef=3.0)
    batch = next(iter(trainer.get_train_dataloader()))
    seen = batch_of_objective(trainer, batch)
    expected = roma_loss(seen, manifold_coef=3.0).mean()
    found = trainer.batch_loss(trainer.model, batch, None, record=False)
    torch.testing.assert_close(found, expected)
    assert len(find_routers(trainer.model)) == 3 and len(trainer.routers) == LAYERS


def test_a_bank_that_is_made_anew_follows_the_routers_and_is_resumed_to_the_last_bit(
    model: str, tmp_path: Path
) -> None:
    keys = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "bank_refresh_steps": 2, "manifold_coef": 50.0}
    whole = trainer_of(model, tmp_path, held_out=questions(4), **keys)
    first = whole.first_banks["train"].routing.clone()
    whole.train()
    anew = whole.banks["train"]
    assert anew is not whole.first_banks["train"] and torch.equal(whole.first_banks["train"].routing, first)
    assert (anew.routing - first).abs().max() > 1e-3 and torch.equal(
        anew.embeddings, whole.first_banks["train"].embeddings
    )
    resumed = trainer_of(model, tmp_path, held_out=questions(4), **keys)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert torch.equal(flat_weights(resumed.model), flat_weights(whole.model))
    for name in ("train", "eval"):
        assert torch.equal(resumed.banks[name].found["target"], whole.banks[name].found["target"])
    assert logged(resumed, "roma/drift") == logged(whole, "roma/drift")
