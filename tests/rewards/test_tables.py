"""Struc-Bench's H-score against a plain table of edit distances, and the figures that were measured on its own code."""

from __future__ import annotations

import random

import pytest

from alignkit.rewards._table_text import read_html, read_latex, read_text_table
from alignkit.rewards._words import dl, edit_distance, lev
from tests.rewards.calls import reward, rewards

GOLD = "| Name | Points | Wins |\n|------|:---:|---|\n| Hawks | 95 | 3 |\n| Bulls | 88 | 1 |"
CELLS = ["Hawks", "95", "3", "Bulls", "88", "1"]
HTML = "<table><tr><th>Name</th><th>Points</th></tr><tr><td>Hawks</td><td>95</td></tr></table>"
LATEX = r"""\begin{table}\caption{Games}
\begin{tabular}{|l|p{3cm}|}
\hline
\textbf{Name} & Points \\ \hline
Hawks & 95 \\
\end{tabular}\end{table}"""


def table_distance(a: list[str], b: list[str]) -> int:
    """Levenshtein distance by the table that everybody draws."""
    above = list(range(len(b) + 1))
    for i, item in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (item != other)))
        above = row
    return above[-1]


def test_the_edit_distance_is_that_of_the_table() -> None:
    random.seed(0)
    for _ in range(300):
        a, b = ([random.choice("abcd") for _ in range(random.randrange(0, 90))] for _ in range(2))
        assert edit_distance(a, b) == table_distance(a, b)
    assert edit_distance("kitten", "sitting") == 3


def test_the_measured_figures() -> None:
    """Of the authors' code: 11 cells against 3 give -0.333, none against some 1/2, some against none 0."""
    assert lev([f"x{n}" for n in range(8)] + ["a", "b", "c"], ["a", "b", "c"]) == pytest.approx(-0.333, abs=1e-3)
    assert lev([], ["a", "b"]) == 0.5 and dl([], ["a", "b"]) == 0.0
    assert lev(["a"], []) == 0.0
    assert dl(list("abcd"), list("bcde")) == 2 * 3 / 8


def h_score(text: str, gold: str, raw: bool = True, **options: object) -> tuple[float | None, float | None]:
    return tuple(reward(name, text, answer=gold, raw=raw, **options) for name in ("table_content", "table_structure"))


@pytest.mark.parametrize(
    ("format", "gold", "sums"), [("text", GOLD, (2, 4)), ("html", HTML, (2, 3)), ("latex", LATEX, (3, 4))]
)
def test_an_equal_table_has_all_of_it(format: str, gold: str, sums: tuple[float, float]) -> None:
    assert h_score(gold, gold, format=format) == sums
    assert h_score(gold, gold, raw=False, format=format) == (1, 1)


def test_a_text_table_by_hand() -> None:
    """A row is missing, and a header has another name."""
    text = "Name | Score | Wins\nHawks | 95 | 3"
    content = (1 - 3 / 12) + 2 * 3 / 9
    structure = 0 + 1 + (1 - 1 / 6) + 2 * 2 / 6
    assert h_score(text, GOLD) == pytest.approx((content, structure))
    assert h_score(text, GOLD, raw=False) == pytest.approx((content / 2, structure / 4))


def test_what_changes_content_and_what_changes_structure() -> None:
    spaced = GOLD.replace("| 95 |", "|   95|").replace("|---|\n", "|---|\n|===|===|===|\n")
    assert h_score(spaced, GOLD) == (2, 4)
    assert h_score(GOLD.replace("\n", "<NEWLINE>"), GOLD) == (2, 4)
    lines = GOLD.split("\n")
    swapped = h_score("\n".join([*lines[:2], lines[3], lines[2]]), GOLD)
    assert swapped[0] < 2 and swapped[1] == 4
    renamed = h_score(GOLD.replace("Points", "Score"), GOLD)
    assert renamed[0] == 2 and renamed[1] < 4
    shorter = h_score("\n".join(lines[:-1]), GOLD)
    assert shorter[0] < 2 and shorter[1] == 3


def test_a_text_table_is_taken_apart() -> None:
    table = read_text_table(GOLD)
    assert table.header == ("Name", "Points", "Wins") and list(table.data) == CELLS
    assert (table.num_rows, table.num_columns) == (3, 3)


def test_long_predictions_are_below_zero_only_raw() -> None:
    text = "a\n" + "\n".join(f"x{n}" for n in range(30))
    assert reward("table_content", text, answer="a\nb\nc", raw=True) == pytest.approx(1 - 30 / 4)
    assert reward("table_content", text, answer="a\nb\nc") == 0.0


def test_saying_nothing_pays_only_raw() -> None:
    for name in ("table_content", "table_structure"):
        for format, gold in (("text", GOLD), ("html", HTML), ("latex", LATEX)):
            assert reward(name, "", answer=gold, format=format) == 0.0
            assert reward(name, "", answer=gold, format=format, raw=True) > 0
    assert reward("table_content", GOLD, answer=None) is None


def test_html_is_taken_apart() -> None:
    page = read_html(f"<p class='x'>So:</p><!-- <td>no</td> -->{HTML}<foo>")
    assert page.cells == ("Name", "Points", "Hawks", "95")
    assert page.tags[:6] == ("p", "/p", "table", "tr", "th", "/th")
    assert read_html("<ul><li>one <b>two</b><li>three</ul>").cells == ("one two", "three")
    assert read_html("<p>one</p><p>two</p>").cells == ("one", "two")
    assert read_html("no tags < at all").is_empty


def test_html_by_hand() -> None:
    text = HTML.replace("<td>95</td>", "")
    # 3 of 4 cells; 14 of 16 tags, and one run of cells and tags each is missing.
    assert h_score(text, HTML, format="html") == pytest.approx(
        ((1 - 1 / 8) + 6 / 7, 0 + (1 - 2 / 28) + 2 * 12 / 26), abs=1e-12
    )


def test_latex_is_taken_apart() -> None:
    table = read_latex(LATEX)
    assert table.header == ("Name", "Points") and table.data == ("Hawks", "95")
    assert (table.num_rows, table.num_columns) == (2, 2)
    assert table.alignment == "|l|p|" and table.caption == "Games"
    assert read_latex("no table").is_empty and read_latex("no table").caption == "None"


def test_latex_by_hand() -> None:
    text = LATEX.replace("Games", "Other").replace("|l|p{3cm}|", "|l|l|")
    assert h_score(text, LATEX, format="latex") == pytest.approx((2, (1 - 1 / 10) + 2 * 4 / 10 + 2))


def test_rotowire_averages_two_tables() -> None:
    gold = f"Team:\n{GOLD}\nPlayer:\n| P |\n| x |"
    assert h_score(gold, gold, format="rotowire") == (2, 4)
    without = f"Team:\n{GOLD}"
    assert rewards("table_content", without, "nothing", answer=gold, format="rotowire") == [0.5, 0.0]
