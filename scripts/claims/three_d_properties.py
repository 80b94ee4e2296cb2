"""Claim experiment for 3D-Properties (arXiv 2406.07327): do DPO's three pathologies appear, and do the remedies help?

    python scripts/claims/three_d_properties.py

trains the toy model of the paper in four on- and off-policy scenarios, sweeps beta_neg, adds the SFT term, and writes
three_d_properties.md and three_d_properties.png to the output directory. A minute on one CPU core.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from pathlib import Path

import matplotlib
import torch

from three_d_toy_study import write_section

HEADER = """\
# The three properties of DPO, and Flex-DPO's remedies

What "3D-Properties" (Yan et al., arXiv 2406.07327, known to us through its reviews) claims, measured with
`alignkit.losses.flex_dpo`.
"""


def origin(seconds: float) -> str:
    """Command, date, hardware and duration, as a paragraph."""
    command = " ".join(["python scripts/claims/three_d_properties.py", *sys.argv[1:]])
    hardware = f"{platform.system()} {platform.machine()}, CPU, {torch.get_num_threads()} thread(s)"
    return f"`{command}`, {datetime.date.today().isoformat()}; {hardware}; torch {torch.__version__}; {seconds:.0f} s."


def replace_section(page: Path, name: str, text: str) -> None:
    """Put ``text`` in place of the section ``name`` of a page, or at its end; other sections stay as they are."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    content = page.read_text(encoding="utf-8") if page.exists() else HEADER
    before, found, rest = content.partition(begin)
    after = rest.partition(end)[2] if found else ""
    separator = "" if found else "\n"
    page.write_text(before + separator + begin + text.rstrip() + "\n" + end + after, encoding="utf-8")


def main() -> None:
    """Run the study and write its section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50, help="number of seeds (default 50)")
    parser.add_argument("--steps", type=int, default=500, help="Adam steps of each run, at least 50 (default 500)")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page and plot go")
    arguments = parser.parse_args()
    if arguments.seeds < 2 or arguments.steps < 50:
        parser.error("an interval needs --seeds of at least 2, and the early slope --steps of at least 50")
    matplotlib.use("Agg")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    page, plot = (arguments.output_dir / f"three_d_properties.{suffix}" for suffix in ("md", "png"))
    started = time.perf_counter()
    section = write_section(arguments.seeds, arguments.steps, plot)
    replace_section(page, "toy", section.format(origin=origin(time.perf_counter() - started)))
    print(f"wrote {page} and {plot}")


if __name__ == "__main__":
    main()
