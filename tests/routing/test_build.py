"""Banks of a tiny model: right in every part, made once, and going on where a kill left them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

from alignkit.errors import AlignkitError, CheckpointError, DataError, ModelError
from alignkit.models._forward import add_completion_head
from alignkit.models._routers import last_routers
from alignkit.models.full_rank import full_rank_config, settle
from alignkit.routing import embedders, shards
from alignkit.routing.build import build_bank, held_out_bank, refresh
from alignkit.routing.options import BankOptions
from alignkit.routing.passes import RoutingPass
from alignkit.routing.store import BANK_FILE, RoutingBank, default_bank_dir
from tests.routing import oracles
from tests.routing.tiny import question_rows, tiny_moe

ROWS = question_rows(24)
OPTIONS = BankOptions(bank_layers=2)


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[int]]:
    """Rows of every forward pass of the model."""
    passes: list[int] = []
    hook = model.model.layers[0].register_forward_hook(lambda _, args, __: passes.append(len(args[0])))
    yield passes
    hook.remove()


def log_prob(model: OlmoeForCausalLM, prompt: list[int], completion: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return [float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(completion)]


@pytest.mark.parametrize("score", ["sum", "mean"])
def test_a_bank_of_choices_is_right_in_every_part(
    score: str, moe: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    options = BankOptions(bank_layers=2, bank_choice_score=score, bank_sigma=0.2)
    bank = build_bank(moe, tokenizer, ROWS, options, tmp_path, batch_size=5)
    solved = []
    for row in ROWS:
        logps = [log_prob(moe, row["prompt_ids"], choice) for choice in row["choices_ids"]]
        totals = [sum(tokens) / (len(tokens) if score == "mean" else 1) for tokens in logps]
        solved.append(row["choices_ids"][totals.index(max(totals))] == row["completion_ids"])
    assert bank.success.tolist() == solved and 0 < sum(solved) < len(ROWS)
    plain = RoutingPass(moe, last_routers(moe, 2), pad_token_id=0, token_set="last1", score="softmax", device="cpu")
    embeddings, routing = bank.embeddings.tolist(), bank.routing.tolist()
    tasks = {row["task"] for row, good in zip(ROWS, solved, strict=True) if good}
    for i, row in enumerate(ROWS):
        alone = plain([row["prompt_ids"]])
        assert torch.allclose(bank.routing[i], alone.routing[0], atol=1e-6)
        assert torch.allclose(bank.embeddings[i], alone.pooled[0], atol=1e-5)
        allowed = [j for j in range(len(ROWS)) if solved[j] and j != i]
        weights = oracles.neighbourhood(embeddings[i], embeddings, allowed, sigma=0.2, k=3, epsilon=None)
        given = bank.targets(torch.tensor([i]))
        assert bool(given.has_target) == (row["task"] in tasks)
        if given.has_target:
            assert given.target[0].tolist() == pytest.approx(oracles.weighted_mean(weights, routing), abs=1e-4)
        assert given.routing[0].tolist() == routing[i]


def test_a_bank_is_made_once_and_other_neighbours_need_no_model(
    moe: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with counted(moe) as passes:
        first = build_bank(moe, tokenizer, ROWS, OPTIONS, tmp_path)
        assert passes
        passes.clear()
        again = build_bank(moe, tokenizer, ROWS, OPTIONS, tmp_path)
        other = build_bank(moe, tokenizer, ROWS, BankOptions(bank_layers=2, bank_sigma=0.1), tmp_path)
        everyone = build_bank(moe, tokenizer, ROWS, BankOptions(bank_layers=2, bank_success_filter=False), tmp_path)
        assert not passes
        build_bank(moe, tokenizer, ROWS, BankOptions(bank_layers=2, bank_token_set="first1"), tmp_path)
        assert passes
    assert all(torch.equal(first.found[name], again.found[name]) for name in first.found)
    assert not torch.equal(first.found["target"], other.found["target"])
    assert torch.equal(first.routing, other.routing)
    assert everyone.found["has_target"].all() and not torch.equal(everyone.found["indices"], first.found["indices"])


def test_what_is_opened_is_what_was_built(
    moe: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    bank = build_bank(moe, tokenizer, ROWS, OPTIONS)
    assert bank.directory.parent == default_bank_dir()
    opened = RoutingBank.open(bank.directory)
    for name in ("routing", "success", "embeddings"):
        assert torch.equal(getattr(bank, name), getattr(opened, name))
    assert all(torch.equal(bank.found[name], opened.found[name]) for name in bank.found)
    facts = json.loads((bank.directory / BANK_FILE).read_text())
    assert facts["layers"] == [f"model.layers.{i}.mlp.gate" for i in (1, 2)] and facts["experts"] == [6, 6]
    assert facts["options"]["bank_num_neighbours"] == 3 and facts["tasks"] == list("abcd")
    assert [path for path in bank.directory.iterdir() if path.is_dir()] == []


def test_a_killed_build_goes_on_where_it_was(
    moe: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 5)
    whole = build_bank(moe, tokenizer, ROWS, OPTIONS, tmp_path / "whole", batch_size=2)
    written: list[Path] = []
    write = shards.write_part

    def killed(path: Path, *rest: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        write(path, *rest)
        written.append(path)

    monkeypatch.setattr(shards, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        build_bank(moe, tokenizer, ROWS, OPTIONS, tmp_path / "killed", batch_size=2)
    monkeypatch.setattr(shards, "write_part", write)
    with counted(moe) as passes:
        rest = build_bank(
            moe, tokenizer, ROWS, BankOptions(bank_layers=2, bank_success="all"), tmp_path / "killed", batch_size=2
        )
    assert sum(passes) == len(ROWS) - 3 * 5
    assert torch.equal(rest.routing, whole.routing) and torch.equal(rest.embeddings, whole.embeddings)


@pytest.mark.parametrize("damaged", ["shard", "file"])
def test_damage_is_found_before_the_model_runs(
    damaged: str, moe: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    bank = build_bank(moe, tokenizer, ROWS, OPTIONS, tmp_path)
    path = tmp_path / bank.facts["files"]["routing"]
    if damaged == "shard":
        shard = path.with_suffix(".shards") / "000000000.safetensors"
        shard.parent.mkdir()
        path.rename(shard)
        path = shard
    else:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    with counted(moe) as passes, pytest.raises(CheckpointError) as caught:
        build_bank(moe, tokenizer, ROWS, OPTIONS, tmp_path)
    assert str(path) in str(caught.value) and not passes


def test_the_base_model_inside_an_adapter_has_the_same_bank(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    plain = tiny_moe()
    add_completion_head(plain)
    bank = build_bank(plain, tokenizer, ROWS, OPTIONS, tmp_path / "bank")
    model = tiny_moe()
    add_completion_head(model)
    weights = {f"{router.name}.{router.parameter}": router.num_experts for router in last_routers(model, 2)}
    wrapped = get_peft_model(model, full_rank_config(weights))
    settle(wrapped)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name:
                parameter.normal_()
    with counted(wrapped.get_base_model()) as passes:
        with wrapped.disable_adapter():
            same = build_bank(wrapped, tokenizer, ROWS, OPTIONS, tmp_path / "bank")
        assert not passes and same.facts["files"] == bank.facts["files"]
        moved = refresh(bank, wrapped, tokenizer, ROWS, OPTIONS, tmp_path / "later", adapter="default")
        assert passes
    assert moved.facts["fingerprint"] != bank.facts["fingerprint"]
    assert not torch.allclose(moved.routing, bank.routing, atol=1e-2)
    with wrapped.disable_adapter():
        again = build_bank(wrapped, tokenizer, ROWS, OPTIONS, tmp_path / "other")
    assert torch.equal(again.routing, bank.routing) and torch.equal(again.success, bank.success)


def test_held_out_rows_have_neighbours_in_the_bank(
    moe: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    options = BankOptions(bank_layers=2, bank_success="all")
    bank = build_bank(moe, tokenizer, ROWS, options, tmp_path / "bank")
    others = [*question_rows(6, seed=7), ROWS[0]]
    held_out = held_out_bank(bank, moe, tokenizer, others, options, tmp_path / "others")
    assert len(held_out) == 7 and not held_out.success.any()
    for i in range(7):
        allowed = [j for j in range(len(ROWS)) if not (i == 6 and j == 0)]
        weights = oracles.neighbourhood(
            held_out.embeddings[i].tolist(), bank.embeddings.tolist(), allowed, sigma=0.4, k=3, epsilon=None
        )
        expected = oracles.weighted_mean(weights, bank.routing.tolist())
        assert held_out.targets(torch.tensor([i])).target[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_task_that_the_bank_does_not_solve_has_no_targets_in_held_out_rows(
    moe: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    options = BankOptions(bank_layers=2, bank_success="column")
    rows = [{**row, "success": row["task"] == "b"} for row in ROWS]
    bank = build_bank(moe, tokenizer, rows, options, tmp_path / "bank")
    assert bank.found["has_target"].tolist() == [row["task"] == "b" for row in ROWS]
    others = [{**row, "task": task} for row, task in zip(question_rows(4, seed=7), "zbaz", strict=True)]
    held_out = held_out_bank(bank, moe, tokenizer, others, options, tmp_path / "others")
    assert held_out.found["has_target"].tolist() == [False, True, False, False]


def test_a_refresh_follows_the_routers_and_keeps_the_embeddings(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_moe()
    add_completion_head(model)
    bank = build_bank(model, tokenizer, ROWS, OPTIONS, tmp_path / "bank")
    with torch.no_grad():
        for router in last_routers(model, 2):
            router.module.weight.mul_(-1)
    new = refresh(bank, model, tokenizer, ROWS, OPTIONS, tmp_path / "later")
    assert torch.equal(new.embeddings, bank.embeddings)
    assert not torch.allclose(new.routing, bank.routing)
    assert torch.equal(RoutingBank.open(tmp_path / "later").embeddings, bank.embeddings)
    fresh = build_bank(model, tokenizer, ROWS, OPTIONS, tmp_path / "fresh")
    assert torch.equal(new.routing, fresh.routing) and torch.equal(new.success, fresh.success)


def test_generation_and_a_reward_decide_success(
    moe: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    prompts = [tokenizer.decode(row["prompt_ids"]) for row in ROWS]
    with torch.no_grad():
        ids = [
            moe.generate(torch.tensor([row["prompt_ids"]]), max_new_tokens=3, do_sample=False)[0].tolist()
            for row in ROWS
        ]
    answers = [answer[len(row["prompt_ids"]) :] for answer, row in zip(ids, ROWS, strict=True)]
    # Letters, since half a character of several bytes is written in another way behind the prompt than alone.
    letters = [sum(c.isascii() for c in tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
    (tmp_path / "judge.py").write_text(
        "def longish(completions, least, **_):\n"
        "    return [sum(letter.isascii() for letter in c) / n for c, n in zip(completions, least)]\n"
    )
    least = sorted(letters)[len(letters) // 2]
    rows = [{**row, "prompt": prompt, "least": least} for row, prompt in zip(ROWS, prompts, strict=True)]
    options = BankOptions(
        bank_layers=2,
        bank_success="generation",
        bank_success_reward=f"{tmp_path / 'judge.py'}:longish",
        bank_success_max_new_tokens=3,
    )
    bank = build_bank(moe, tokenizer, rows, options, tmp_path / "bank")
    expected = [count >= least for count in letters]
    assert bank.success.tolist() == expected and 0 < sum(expected) < len(ROWS)


class Encoder:
    """Stands in for sentence-transformers, which is no dependency: the same call, numbers of the text's length."""

    def __init__(self, name: str, device: str) -> None:
        if name != "tiny-encoder":
            raise OSError(f"{name} is nowhere")

    def encode(self, texts: list[str], *, convert_to_tensor: bool, show_progress_bar: bool) -> torch.Tensor:
        assert convert_to_tensor and not show_progress_bar
        return torch.tensor([[float(ord(text[-1])), 1.0 + len(text)] for text in texts])


def test_a_sentence_encoder_embeds_the_texts(
    moe: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BankOptions(bank_layers=2, bank_embedder="tiny-encoder")
    with pytest.raises(ModelError, match="pip install sentence-transformers"):
        build_bank(moe, tokenizer, ROWS, options, tmp_path)
    monkeypatch.setattr(embedders.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(
        embedders.importlib, "import_module", lambda name: type("Package", (), {"SentenceTransformer": Encoder})
    )
    bank = build_bank(moe, tokenizer, ROWS, options, tmp_path)
    assert bank.embeddings.tolist() == [[float(ord(r["text"][-1])), 1.0 + len(r["text"])] for r in ROWS]
    assert torch.equal(RoutingBank.open(tmp_path).embeddings, bank.embeddings)
    with pytest.raises(ModelError, match="nowhere"):
        build_bank(moe, tokenizer, ROWS, BankOptions(bank_layers=2, bank_embedder="other"), tmp_path)


@pytest.mark.parametrize("ending", ["npy", "safetensors"])
def test_embeddings_of_a_file(
    ending: str, moe: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    values = torch.randn(len(ROWS), 3, generator=torch.Generator().manual_seed(0))
    path = tmp_path / f"mine.{ending}"
    np.save(path, values.numpy()) if ending == "npy" else save_file({"x": values}, path)
    options = BankOptions(bank_layers=2, bank_embedder=f"file:{path}")
    assert torch.equal(build_bank(moe, tokenizer, ROWS, options, tmp_path / "bank").embeddings, values)


def broken_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files that hold no embeddings of these rows, and what is said of them."""
    n = len(ROWS)
    for name, values, said in [
        ("few.npy", np.ones((n - 1, 3)), f"{n} rows of embeddings are needed"),
        ("flat.npy", np.ones(n), f"{n} rows"),
        ("words.npy", np.array([["a"]] * n), "numbers are <U1"),
        ("nan.npy", np.array([[math.nan]] * n), "NaN"),
        ("zero.npy", np.zeros((n, 2)), "0 throughout"),
    ]:
        np.save(folder / name, values)
        yield folder / name, said
    (folder / "text.npy").write_text("1,2,3")
    yield folder / "text.npy", "cannot|can be read"
    save_file({"a": torch.ones(n, 1), "b": torch.ones(n, 1)}, folder / "two.safetensors")
    yield folder / "two.safetensors", "2 tensors"
    yield folder / "none.npy", "no file"


def test_files_that_hold_no_embeddings_are_refused_first(
    moe: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with counted(moe) as passes:
        for path, said in broken_files(tmp_path):
            with pytest.raises(AlignkitError, match=said) as caught:
                build_bank(moe, tokenizer, ROWS, BankOptions(bank_embedder=f"file:{path}"), tmp_path / "bank")
            assert str(path) in str(caught.value)
    assert not passes


def changed(rows: Sequence[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
    """The rows, the fourth of them with other values; one that is None takes the column from all."""
    gone = [name for name, value in changes.items() if value is None]
    kept = [{name: value for name, value in row.items() if name not in gone} for row in rows]
    kept[3] |= {name: value for name, value in changes.items() if value is not None}
    return kept


@pytest.mark.parametrize(
    ("options", "rows", "said"),
    [
        ({}, [], "there are no rows"),
        ({}, changed(ROWS, choices_ids=None), "reads choices_ids; give each row its choices"),
        ({}, changed(ROWS, completion_ids=[1, 1, 1, 1]), "row 3: its completion is none of its choices"),
        ({}, changed(ROWS, choices_ids=[[1]]), "row 3: it has fewer than two choices"),
        ({}, changed(ROWS, choices_ids=[[], [1]]), "row 3: one of its choices is empty"),
        ({"bank_success": "column"}, ROWS, "reads success; add it"),
        ({"bank_success": "column"}, [{**r, "success": i} for i, r in enumerate(ROWS)], "row 0: success is 0"),
        ({"bank_success": "generation"}, ROWS, "nothing says which answers are right"),
        ({"bank_success": "generation", "bank_success_reward": "gsm8k_answr"}, ROWS, "gsm8k_answer"),
        ({"bank_success": "generation", "bank_success_reward": "gsm8k_answer"}, ROWS, "reads prompt, answer"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_runs(
    options: dict[str, Any],
    rows: list[dict[str, Any]],
    said: str,
    moe: OlmoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    with counted(moe) as passes, pytest.raises(AlignkitError, match=said):
        build_bank(moe, tokenizer, rows, BankOptions(**options), tmp_path)
    assert not passes and not any(tmp_path.iterdir())


def test_text_is_asked_for_where_it_is_embedded(
    moe: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedders.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(DataError, match="reads text"):
        build_bank(moe, tokenizer, changed(ROWS, text=None), BankOptions(bank_embedder="tiny-encoder"), tmp_path)
