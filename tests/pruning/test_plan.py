"""A plan has one form, one digest, and nothing in it that stock models cannot have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import ModelError
from alignkit.pruning.plan import PLAN_FILE, PruningPlan

PLAN = PruningPlan(hidden=(0, 2), ffn=((0, 1), (1, 3)), kv_groups=((0,), (1,)), layers=(1,))


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    """By the folder or by the file; what is absent is whole."""
    PLAN.save(tmp_path)
    assert PruningPlan.load(tmp_path) == PruningPlan.load(tmp_path / PLAN_FILE) == PLAN
    assert json.loads((tmp_path / PLAN_FILE).read_text()) == {
        "hidden": [0, 2],
        "ffn": [[0, 1], [1, 3]],
        "kv_groups": [[0], [1]],
        "layers": [1],
    }
    assert PruningPlan.from_json({}) == PruningPlan()
    assert PruningPlan.from_json(PruningPlan().to_json()) == PruningPlan()


def test_the_digest_is_that_of_what_is_kept() -> None:
    """Equal plans have equal digests, on any machine; another index or another axis has another."""
    assert PLAN.digest() == PruningPlan.from_json(json.loads(json.dumps(PLAN.to_json()))).digest()
    others = [PruningPlan(hidden=(0, 2)), PruningPlan(layers=(0, 2)), PruningPlan(hidden=(0, 3)), PruningPlan(), PLAN]
    assert len({plan.digest() for plan in others}) == len(others)
    assert PruningPlan(
        hidden=(0, 2)
    ).digest() == (  # sha256 of {"ffn":null,"hidden":[0,2],"kv_groups":null,"layers":null}
        "5f8b1eabd9f8a948d47fe35f9ef3d7185fe0812a913d92b4b5dac179f32062e9"
    )


def test_plans_on_different_axes_are_one() -> None:
    """In either order; an axis that both prune is refused."""
    hidden, rest = PruningPlan(hidden=(0, 2)), PruningPlan(ffn=PLAN.ffn, kv_groups=PLAN.kv_groups, layers=(1,))
    assert hidden.merged_with(rest) == rest.merged_with(hidden) == PLAN
    with pytest.raises(ModelError, match="two plans prune hidden, layers"):
        PLAN.merged_with(PruningPlan(hidden=(1,), layers=(0,)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head_dim": [0, 1]}, "width of a head cannot be pruned.*Prune kv_groups"),
        ({"heads": [[0]]}, "query heads cannot be pruned apart from their group.*Prune kv_groups"),
        ({"vocab": [0]}, "the vocabulary is no axis"),
        ({"channels": [0]}, "'channels', which is none of its axes: hidden, ffn, kv_groups, layers"),
        ({"hidden": []}, "keeps nothing of hidden"),
        ({"hidden": [1, 0]}, "of hidden must be at least 0 and ascend"),
        ({"hidden": [1, 1]}, "of hidden must be at least 0 and ascend"),
        ({"layers": [-1, 0]}, "of layers must be at least 0 and ascend"),
        ({"ffn": [[0], []]}, "keeps nothing of ffn of layer 1"),
        ({"kv_groups": [[0], [2, 1]]}, "of kv_groups of layer 1 must be at least 0 and ascend"),
        ({"hidden": [0, True]}, "whole numbers for hidden"),
        ({"hidden": [0.0]}, "whole numbers for hidden"),
        ({"hidden": 24}, "whole numbers for hidden"),
        ({"ffn": [0, 1]}, "whole numbers for ffn of layer 0"),
        ({"ffn": 3}, "ffn as one list for each layer"),
    ],
)
def test_what_is_no_plan_is_refused(values: dict[str, Any], message: str) -> None:
    """With what to write instead."""
    with pytest.raises(ModelError, match=message):
        PruningPlan.from_json(values)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"hidden": [0}'])
def test_a_file_that_holds_no_plan_is_named(content: str, tmp_path: Path) -> None:
    """As is one that is not there."""
    with pytest.raises(ModelError, match=f"no pruning plan can be read from .*{PLAN_FILE}"):
        PruningPlan.load(tmp_path / PLAN_FILE)
    (tmp_path / PLAN_FILE).write_text(content)
    with pytest.raises(ModelError, match=f"{PLAN_FILE}"):
        PruningPlan.load(tmp_path)
