"""The page of completions: whatever a model wrote is text on it, and it never grows beyond bounds."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from alignkit.errors import ConfigError
from alignkit.programs.rollouts import main
from alignkit.reports import rollouts
from alignkit.reports.rollouts import FOLDER, PAGE, file_name, render_page, rollout_files, spread, write_page
from alignkit.storage.manifest import Manifest

HOSTILE = "</script><script>alert(1)</script><img src=https://example.org/x onerror=alert(2)>\x1b[31m\u202e&amp;'\""


class Page(HTMLParser):
    """Tags with their attributes, and the text of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.rows[-1][-1] += data


def row(group: int = 0, reward: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    return {
        "step": 1, "group": group, "prompt": "2 + 2 =", "completion": "4", "rewards/right": 1.0,
        "rewards/short": -0.5, "reward": reward, "advantage": 0.1, "length": 3, "truncated": False, **changes,
    }  # fmt: skip


def write(run: Path, step: int, rows: list[dict[str, Any]]) -> None:
    (run / FOLDER).mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), run / FOLDER / file_name(step))


def page_of(run: Path) -> Page:
    assert write_page(run) == run / PAGE
    return Page((run / PAGE).read_text())


def test_a_prompts_completions_stand_together_the_best_first_with_every_reward(tmp_path: Path) -> None:
    write(tmp_path, 1, [row(0, 0.2, completion="meh"), row(1, 5.0), row(0, 0.7, completion="good"), row(0, None)])
    found = page_of(tmp_path)
    header = ["reward", "right", "short", "advantage", "length", "completion"]
    bodies = [line[-1] for line in found.rows if line != header]
    assert [line for line in found.rows if line == header] == [header] * 2
    assert bodies[:2] == ["good", "meh"]
    assert found.rows[1] == ["0.7", "1", "-0.5", "0.1", "3", "good"] and found.rows[3][0] == ""
    assert PAGE in Manifest(tmp_path).files()


def test_hostile_text_is_text(tmp_path: Path) -> None:
    write(tmp_path, 1, [row(prompt=HOSTILE, completion=HOSTILE, **{f"rewards/{HOSTILE}": 1.0})])
    text = render_page(rollout_files(tmp_path), "<b>run")
    found = Page(text)
    assert [tag for tag, _ in found.tags if tag in ("script", "img", "b")] == ["script"]
    assert not [a for _, attributes in found.tags for a in attributes if a.startswith("on") or a in ("src", "href")]
    assert "https://" not in text.replace("src=https://example.org/x", "")
    assert "\x1b" not in text and "\u202e" not in text and r"\x1b[31m" in text
    policy = next(attributes for tag, attributes in found.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in str(policy["content"])


def test_the_page_is_bounded_and_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MAX_STEPS": 3, "MAX_PROMPTS": 2, "MAX_COMPLETIONS": 4, "MAX_CHARACTERS": 50}.items():
        monkeypatch.setattr(rollouts, name, value)
    rows = [row(group, float(i), completion="é" * 2**20) for group in range(5) for i in range(6)]
    for step in range(10, 60, 10):
        write(tmp_path, step, rows if step == 50 else rows[:1])
    found = page_of(tmp_path)
    text = (tmp_path / PAGE).read_text()
    assert len(text) < 10_000
    assert "3 of 5 steps" in text and "Step 10:" in text and "Step 50:" in text and "Step 20:" not in text
    kept = [line for line in found.rows if line[0] in "012345" and line[-1].startswith("é")]
    assert [line[0] for line in kept[-4:]] == ["5", "4", "1", "0"] and len(kept) == 2 * 4 + 2
    assert kept[-1][-1] == "é" * 50 + " … 1,048,526 more"
    assert "(2 of 6 completions between the best and the worst left out)" in text


def test_spread_keeps_both_ends() -> None:
    assert spread([1, 50, 100], 3) == [1, 50, 100]
    assert spread(list(range(101)), 5) == [0, 25, 50, 75, 100]


def test_the_command_makes_the_page_anew_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="is no run directory: it holds no run.json"):
        main([str(tmp_path)], "alignkit rollouts")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no rollouts"):
        main([str(tmp_path)], "alignkit rollouts")
    write(tmp_path, 1, [row()])
    main([str(tmp_path)], "alignkit rollouts")
    assert capsys.readouterr().out == f"written: {tmp_path / PAGE}\n"
