"""The first and the last loads of a run, and their picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

from matplotlib.image import imread

from alignkit.reports.router_loads import draw_loads, equal_shares, keep_loads

EVEN, UNEVEN = {"3": [0.5] * 4, "4": [0.25] * 8}, {"3": [2.0, 0.0, 0.0, 0.0], "4": [0.25] * 8}


def test_the_first_log_stays_the_first_until_a_run_begins_again(tmp_path: Path) -> None:
    assert draw_loads(tmp_path) is None
    for step, loads in ((10, EVEN), (20, UNEVEN), (30, UNEVEN), (20, UNEVEN)):
        keep_loads(tmp_path, step, loads)
    kept = json.loads((tmp_path / "router_loads.json").read_text())
    assert kept == {"first": {"step": 10, "loads": EVEN}, "last": {"step": 20, "loads": UNEVEN}}
    keep_loads(tmp_path, 10, UNEVEN)
    assert json.loads((tmp_path / "router_loads.json").read_text())["first"] == {"step": 10, "loads": UNEVEN}


def test_loads_are_drawn_in_equal_shares(tmp_path: Path) -> None:
    rows = equal_shares(UNEVEN)
    assert rows[0][:4] == [4, 0, 0, 0] and all(map(math.isnan, rows[0][4:])) and rows[1] == [1] * 8
    keep_loads(tmp_path, 10, EVEN)
    keep_loads(tmp_path, 20, UNEVEN)
    picture = draw_loads(tmp_path)
    assert picture is not None
    colours = {tuple(round(255 * x) for x in pixel) for pixel in imread(picture)[..., :3].reshape(-1, 3)}
    # The ends of viridis: no token at all, and four equal shares.
    assert {(68, 1, 84), (253, 231, 36)} <= colours
    listed = json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert {"router_loads.json", "router_loads.png"} <= set(listed)
