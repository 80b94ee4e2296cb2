"""The picture of a plan shows what is kept where."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread

from alignkit.pruning.families import Sizes
from alignkit.pruning.picture import COLUMNS, draw_plan, grids_of
from alignkit.pruning.plan import PruningPlan

SIZES = Sizes(hidden=8, ffn=6, kv_groups=2, layers=3, heads=4, head_dim=4)
PLAN = PruningPlan(
    hidden=(0, 1, 4, 5), ffn=((0, 1, 2), (3, 4, 5), (0, 2, 4)), kv_groups=((0,), (1,), (1,)), layers=(0, 2)
)


def test_a_dropped_layer_keeps_nothing_and_the_hidden_channels_are_one_row() -> None:
    grids = grids_of(PLAN, SIZES)
    assert grids["hidden"].rows == [[1, 1, 0, 0, 1, 1, 0, 0]]
    assert grids["ffn"].rows == [[1, 1, 1, 0, 0, 0], [0] * 6, [1, 0, 1, 0, 1, 0]]
    assert grids["kv_groups"].rows == [[1, 0], [0, 0], [0, 1]]
    assert grids["ffn"].title == "feed-forward channels a layer: 3 of 6, 2 of 3 layers"
    whole = grids_of(PruningPlan(), SIZES)
    assert whole["hidden"].rows == [[1] * 8] and whole["kv_groups"].rows == [[1, 1]] * 3


def test_a_wide_axis_is_drawn_in_bins() -> None:
    wide = Sizes(hidden=3 * COLUMNS, ffn=6, kv_groups=2, layers=3, heads=4, head_dim=4)
    row = grids_of(PruningPlan(hidden=(0, 1, 2, 3)), wide)["hidden"].rows[0]
    assert len(row) == COLUMNS and row[:3] == pytest.approx([1, 1 / 3, 0])
    uneven = grids_of(PruningPlan(), Sizes(hidden=COLUMNS + 1, ffn=6, kv_groups=2, layers=3, heads=4, head_dim=4))
    assert uneven["hidden"].rows == [[1] * COLUMNS]


def test_the_picture_has_both_colours(tmp_path: Path) -> None:
    draw_plan(tmp_path / "pruning.png", PLAN, SIZES, title="tiny")
    colours = {
        tuple(round(255 * x) for x in pixel) for pixel in imread(tmp_path / "pruning.png")[..., :3].reshape(-1, 3)
    }
    assert {(0, 114, 178), (232, 232, 232)} <= colours
