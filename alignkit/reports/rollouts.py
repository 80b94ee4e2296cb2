"""A page to read what was drawn: the completions of each prompt side by side, the best first, with all their rewards.

The page stands alone: it asks for nothing elsewhere, what a model wrote is only ever text in it, and its size has a
bound, however long the run was.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from alignkit.plain_text import visible
from alignkit.storage.durability import write_whole
from alignkit.storage.manifest import Manifest

FOLDER = "rollouts"
PAGE = "rollouts.html"
MAX_STEPS = 24
"""Steps on the page; of more, the first, the last and some between."""
MAX_PROMPTS = 16
"""Prompts of a step, the last ones drawn."""
MAX_COMPLETIONS = 16
"""Completions of a prompt: the best and the worst."""
MAX_CHARACTERS = 2000
"""Characters of a text. All of it makes the page 25 MB at the very most, of texts that long."""
_NAME = re.compile(r"step-(\d+)\.parquet")

Row = Mapping[str, Any]


def file_name(step: int) -> str:
    """Name of the file that holds the completions of a step; sorts by step up to a million."""
    return f"step-{step:06d}.parquet"


def rollout_files(run: Path) -> dict[int, Path]:
    """The files of a run by their steps, in order.

    Args:
        run: A run directory.
    """
    folder = run / FOLDER
    found = {int(match[1]): path for path in folder.glob("*.parquet") if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def write_page(run: Path) -> Path | None:
    """Write ``rollouts.html`` of a run anew.

    Args:
        run: A run directory.

    Returns:
        Where it is; None where the run has written no completions.
    """
    files = rollout_files(run)
    if not files:
        return None
    Manifest(run).claim(PAGE)
    write_whole(run / PAGE, render_page(files, run.resolve().name))
    return run / PAGE


def render_page(files: Mapping[int, Path], title: str) -> str:
    """The page of some files.

    Args:
        files: Step to file, in order.
        title: Such as the name of the run.
    """
    steps = spread(list(files), MAX_STEPS)
    sections = "\n".join(_step(step, pyarrow.parquet.read_table(files[step]).to_pylist()) for step in steps)
    left_out = len(files) - len(steps)
    shown = f"{len(steps)} of {len(files)} steps, " if left_out else ""
    bounds = (
        f"Shown: {shown}of each step at most the last {MAX_PROMPTS} prompts, of a prompt the best and the worst of at "
        f"most {MAX_COMPLETIONS} completions, of a text {MAX_CHARACTERS} characters. All of them are in {FOLDER}/."
    )
    return _PAGE.format(title=_text(title), bounds=_text(bounds), steps=sections)


def spread(items: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of some items, evenly spread, the first and the last among them.

    Args:
        items: In order.
        most: At least 2.
    """
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def groups_of(rows: Sequence[Row]) -> Iterator[tuple[Any, list[Row], int]]:
    """Group, its completions with the best reward first, and how many of them there were before any were left out.

    Args:
        rows: All completions of a step.
    """
    by_group: dict[Any, list[Row]] = {}
    for row in rows:
        by_group.setdefault(row["group"], []).append(row)
    for group in list(by_group)[-MAX_PROMPTS:]:
        ordered = sorted(by_group[group], key=_worth, reverse=True)
        half = MAX_COMPLETIONS // 2
        kept = ordered if len(ordered) <= MAX_COMPLETIONS else [*ordered[:half], *ordered[-half:]]
        yield group, kept, len(ordered)


def _worth(row: Row) -> float:
    return float("-inf") if row["reward"] is None else row["reward"]


def _step(step: int, rows: Sequence[Row]) -> str:
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    mean = f", mean reward {sum(rewards) / len(rewards):.4g}" if rewards else ""
    lengths = f", mean length {sum(row['length'] for row in rows) / len(rows):.4g} tokens"
    groups = "\n".join(_group(kept, count) for _, kept, count in groups_of(rows))
    return (
        f'<details class="step" open><summary>Step {step}: {len(rows)} completions{mean}{lengths}</summary>\n'
        f"{groups}\n</details>"
    )


def _group(rows: Sequence[Row], count: int) -> str:
    parts = [key for key in rows[0] if key.startswith("rewards/")]
    header = ["reward", *(key.removeprefix("rewards/") for key in parts), "advantage", "length", "completion"]
    left_out = f" ({count - len(rows)} of {count} completions between the best and the worst left out)"
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    body = "\n".join(_completion(row, parts) for row in rows)
    return (
        f'<section class="group"><pre class="prompt">{_cut(rows[0]["prompt"])}</pre>{left_out * (count > len(rows))}'
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></section>"
    )


def _completion(row: Row, parts: Sequence[str]) -> str:
    numbers = "".join(f"<td>{_number(row[key])}</td>" for key in ("reward", *parts, "advantage"))
    cut = ' <span class="cut">did not stop</span>' if row["truncated"] else ""
    return f"<tr>{numbers}<td>{row['length']}{cut}</td><td><pre>{_cut(row['completion'])}</pre></td></tr>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _cut(text: str) -> str:
    more = len(text) - MAX_CHARACTERS
    return _text(text) if more <= 0 else f'{_text(text[:MAX_CHARACTERS])}<span class="cut"> … {more:,} more</span>'


def _text(text: str) -> str:
    """Text of the page: no tag, no control character."""
    return html.escape(visible(text))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}: rollouts</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1.5em; color: #222; }}
summary {{ font-weight: 600; font-size: 1.1em; margin: .8em 0; cursor: pointer; }}
.group {{ border: 1px solid #ddd; border-radius: 6px; padding: .6em; margin: .6em 0; overflow-x: auto; }}
.hidden {{ display: none; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: 13px; }}
.prompt {{ background: #f3f5f8; padding: .5em; margin-bottom: .5em; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .25em .6em; border-top: 1px solid #eee; }}
td:last-child, th:last-child {{ width: 65%; }}
.cut {{ color: #b3541e; font-size: 12px; }}
#controls {{ position: sticky; top: 0; background: #fff; padding: .5em 0; border-bottom: 1px solid #ddd; }}
</style></head><body>
<h1>{title}: rollouts</h1>
<p>{bounds}</p>
<div id="controls"><label>Only prompts with the text <input id="filter" type="search" size="40"></label>
<span id="count"></span></div>
{steps}
<script>
const groups = [...document.querySelectorAll('.group')];
const texts = groups.map(group => group.textContent.toLowerCase());
document.getElementById('filter').addEventListener('input', event => {{
  const wanted = event.target.value.toLowerCase();
  let shown = 0;
  groups.forEach((group, i) => {{
    const is_shown = texts[i].includes(wanted);
    group.classList.toggle('hidden', !is_shown);
    shown += is_shown;
  }});
  document.getElementById('count').textContent = shown + ' of ' + groups.length + ' prompts';
}});
</script>
</body></html>
"""
