"""How long the neighbours and targets of a routing bank take, and how much memory, as the bank grows.

    python scripts/benchmark_bank.py
    python scripts/benchmark_bank.py --rows 12500 25000 50000 --mode epsilon --sigma 0.8

Made-up embeddings in 50 clusters and made-up routings; nine of ten rows are solved. Every size is measured in a process
of its own: seconds on the clock, seconds of the processor, and how far the peak of the resident set is above what the
process held before it made anything. The inputs are part of that.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time

import torch

from alignkit.programs.arguments import StrictParser, positive_int
from alignkit.programs.entry import run_program
from alignkit.reports.table import render_table
from alignkit.routing.neighbours import Search, neighbour_targets
from alignkit.routing.options import NEIGHBOURS

CLUSTERS = 50
MIB = 2**20


def main() -> None:
    """Measure every size in a process of its own and print a table."""
    parser = StrictParser(*__doc__.split("\n\n", 1))
    parser.add_argument("--rows", type=positive_int, nargs="+", default=[25_000, 50_000])
    parser.add_argument("--routing", type=positive_int, default=640, help="numbers of a routing vector, D")
    parser.add_argument("--embedding", type=positive_int, default=384, help="numbers of an embedding, d")
    parser.add_argument("--neighbours", type=positive_int, default=3, help="k")
    parser.add_argument("--mode", choices=NEIGHBOURS, default="knn")
    parser.add_argument("--sigma", type=float, default=0.4, help="width of the kernel")
    parser.add_argument("--threads", type=positive_int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse()
    if arguments.worker:
        print(json.dumps(measured(arguments)))
        return
    lines = []
    for rows in arguments.rows:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", "--rows", str(rows)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        share = found["inputs"] / found["peak"]
        lines.append(
            [f"{rows:,}", f"{found['clock']:.1f}", f"{found['processor']:.1f}"]
            + [f"{found['peak'] / MIB:.0f}", f"{found['peak'] / rows / 1024:.1f}", f"{share:.2f}"]
        )
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {arguments.threads} threads, torch {torch.__version__}, {arguments.mode}\n")
    print(render_table(["rows", "seconds", "of processors", "peak MiB", "KiB a row", "share of inputs"], lines))


def measured(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds, and bytes at the peak above those of a process that has made nothing, of the one size that is named."""
    torch.set_num_threads(arguments.threads)
    (rows,), draw = arguments.rows, torch.Generator().manual_seed(0)
    before = peak_bytes()
    cluster = torch.randint(CLUSTERS, (rows,), generator=draw)
    centres = torch.randn(CLUSTERS, arguments.embedding, generator=draw)
    embeddings = torch.randn(rows, arguments.embedding, generator=draw).add_(centres[cluster])
    routing = torch.rand(rows, arguments.routing, generator=draw)
    solved = torch.rand(rows, generator=draw) < 0.9
    search = Search(mode=arguments.mode, count=arguments.neighbours, sigma=arguments.sigma)
    clock, processor = time.perf_counter(), time.process_time()
    _, found = neighbour_targets(embeddings, solved, routing, search)
    seconds = {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}
    assert found.target.shape == routing.shape
    inputs = sum(tensor.numel() * tensor.element_size() for tensor in (embeddings, routing))
    return {**seconds, "peak": peak_bytes() - before, "inputs": inputs}


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    run_program(main)
