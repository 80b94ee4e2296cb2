"""The report's numbers against plain Python, and the picture against the geometry of its points."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

from alignkit.routing.build import build_bank, held_out_bank
from alignkit.routing.options import BankOptions
from alignkit.routing.picture import draw_routing, project
from alignkit.routing.report import bank_report, render_report
from alignkit.routing.store import RoutingBank
from tests.routing import oracles
from tests.routing.tiny import question_rows

N = 24
ROWS = [{**row, "success": i % 3 > 0 and row["task"] != "d"} for i, row in enumerate(question_rows(N))]
OPTIONS = BankOptions(bank_layers=2, bank_success="column", bank_sigma=0.2)


@pytest.fixture
def bank(moe: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> RoutingBank:
    return build_bank(moe, tokenizer, ROWS, OPTIONS, tmp_path / "bank")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_the_report_says_what_is_in_the_bank(bank: RoutingBank) -> None:
    report = bank_report(bank)
    embeddings, routing = bank.embeddings.tolist(), bank.routing.tolist()
    solved = [i for i in range(N) if ROWS[i]["success"]]
    wanted = [i for i in range(N) if ROWS[i]["task"] != "d"]
    weights = {
        i: oracles.neighbourhood(embeddings[i], embeddings, [j for j in solved if j != i], sigma=0.2, k=3, epsilon=None)
        for i in wanted
    }
    purity = [sum(w for j, w in weights[i].items() if ROWS[j]["task"] == ROWS[i]["task"]) for i in wanted]
    assert report["purity"] == pytest.approx(mean(purity), abs=1e-5)
    chance = [mean([float(ROWS[j]["task"] == ROWS[i]["task"]) for j in solved]) for i in wanted]
    assert report["purity_by_chance"] == pytest.approx(mean(chance))
    spread = [oracles.manifold(routing[i], weights[i], routing) for i in wanted]
    assert report["spread"] == pytest.approx(mean(spread), abs=1e-6)
    by_chance = [mean([oracles.squared_distance(routing[i], routing[j]) for j in solved]) for i in wanted]
    assert report["spread_by_chance"] == pytest.approx(mean(by_chance), abs=1e-6)
    entropy = [mean([-sum(p * math.log(p) for p in row[a : a + 6]) for row in routing]) / math.log(6) for a in (0, 6)]
    assert report["entropy"] == pytest.approx(entropy, abs=1e-5)
    distances = sorted(
        math.sqrt(oracles.squared_distance(oracles.unit(embeddings[i]), oracles.unit(embeddings[j])))
        for i in wanted
        for j in weights[i]
    )
    assert report["distance"][0] == pytest.approx(distances[0], abs=1e-5)
    assert report["distance"][-1] == pytest.approx(distances[-1], abs=1e-5)
    assert report["neighbours"] == [3.0] * 5
    assert report["tasks"]["d"] == {"rows": 6, "solved": 0.0, "with target": 0.0}
    assert report["tasks"]["a"]["solved"] == mean([float(row["success"]) for row in ROWS if row["task"] == "a"])
    assert json.loads(json.dumps(report)) == report
    text = render_report(report)
    assert f"{100 * report['purity']:.1f}%" in text and "d        6    0.0%         0.0%" in text


def test_a_report_of_held_out_rows_looks_at_the_bank_they_are_compared_with(
    bank: RoutingBank, moe: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    others = question_rows(8, seed=5)
    report = bank_report(held_out_bank(bank, moe, tokenizer, others, OPTIONS, tmp_path / "others"), bank)
    assert report["rows"] == 8 and report["candidates"] == sum(row["success"] for row in ROWS)
    assert 0 < report["spread_by_chance"] < 4 and report["tasks"]["d"]["with target"] == 0


def test_a_bank_of_failures_is_reported_without_numbers(
    moe: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{**row, "success": False} for row in ROWS]
    report = bank_report(build_bank(moe, tokenizer, rows, OPTIONS, tmp_path))
    assert report["purity"] is None and report["distance"] is None and report["spread"] is None
    assert "by chance -" in render_report(report)


def test_the_projection_keeps_distances_in_a_plane() -> None:
    draw = torch.Generator().manual_seed(0)
    flat = torch.randn(30, 2, generator=draw).double() * torch.tensor([3.0, 1.0])
    turned = flat @ torch.linalg.qr(torch.randn(7, 7, generator=draw).double()).Q[:2] + 5
    found = project([turned[:20], turned[20:]])
    points = torch.cat(found.points)
    assert torch.allclose(torch.cdist(points, points), torch.cdist(flat, flat), atol=1e-6)
    assert sum(found.shares) == pytest.approx(1) and found.shares[0] > found.shares[1]
    assert float(points[:, 0].var()) > float(points[:, 1].var())


@pytest.mark.parametrize("with_after", [False, True])
def test_the_picture_is_written(with_after: bool, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    routing = torch.rand(50, 8, generator=draw)
    tasks = torch.arange(50) % 10
    path = tmp_path / "routing.png"
    draw_routing(path, routing, tasks, [f"t{i}" for i in range(10)], after=routing.flip(0) if with_after else None)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert (width > 1.5 * height) == with_after
