"""README, CONTRIBUTING and docs/ taken apart: code blocks, links, headings."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RUN_MARK = "<!-- run -->"
SESSION_MARK = "<!-- one session -->"
"""On a page whose blocks of Python run one after the other, each with what the ones before it have made."""
_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        where: ``docs/index.md:12``, for the name of the test.
        language: Word after the fence.
        text: What stands between the fences.
        run: Whether it is marked to be executed.
    """

    where: str
    language: str
    text: str
    run: bool


def pages() -> list[Path]:
    """All pages a reader may open."""
    return [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def blocks(language: str) -> list[Block]:
    """Fenced blocks of one language, on all pages."""
    found = []
    for page in pages():
        text = page.read_text()
        for match in _FENCE.finditer(text):
            if match["language"] == language:
                line = text.count("\n", 0, match.start()) + 1
                marked = text[: match.start()].rstrip().endswith(RUN_MARK)
                found.append(Block(f"{page.relative_to(REPOSITORY)}:{line}", language, match["text"], marked))
    return found


def sessions() -> list[Block]:
    """Blocks of Python as they run: each by itself, those of a page that is one session together."""
    found = []
    for block in blocks("python"):
        page = block.where.partition(":")[0]
        if SESSION_MARK not in (REPOSITORY / page).read_text():
            found.append(block)
        elif found and found[-1].where.partition(":")[0] == page:
            found[-1] = replace(found[-1], text=f"{found[-1].text}\n{block.text}")
        else:
            found.append(block)
    return found


def commands(block: Block) -> list[str]:
    """The commands of a shell block: continued lines joined, comments left out."""
    joined = block.text.replace("\\\n", " ")
    lines = [line.partition(" #")[0].strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def links(page: Path) -> list[str]:
    """Targets of the links of a page, without those inside code."""
    return [match["target"] for match in _LINK.finditer(_FENCE.sub("", page.read_text()))]


def anchors(page: Path) -> set[str]:
    """Names GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
