"""The benchmarks: rows, claims and FLOPs by hand, and the sides of the suite for a GPU with next to nothing to do."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def cuda() -> Iterator[ModuleType]:
    """scripts/benchmark_cuda.py, found as python finds it when it is started."""
    sys.path.insert(0, str(SCRIPTS))
    import benchmark_cuda

    yield benchmark_cuda
    sys.path.remove(str(SCRIPTS))


def test_sides_of_a_large_model_with_tiny_shapes(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception):
        pass

    real = cuda.build

    def build(side: str, *given: Any) -> Any:
        if side == "padded":
            raise Refused("no such kernel\nand a long trace")
        return real(side, *given)

    monkeypatch.setattr(cuda, "build", build)
    monkeypatch.setattr(cuda, "SIDES", ("padded", "trl", "cached"))
    case = "8B 384/128"
    padded, trl, cached = cuda.work_on([case], torch.device("cpu"), tiny=True, until=time.time() + 60)
    assert padded["error"] == "Refused: no such kernel"
    # Two pairs of 24 + 8 tokens: four padded rows, against two prefixes of 23 and four branches of 8.
    assert (trl["tokens"], cached["tokens"]) == (4 * 32, 2 * 23 + 4 * 8)
    assert "layout packed" in cached["chosen"] and "reference precomputed" in cached["chosen"]
    late = list(cuda.work_on([case], torch.device("cpu"), tiny=True, until=0.0))
    assert len(late) == 3 and all(each["error"].startswith("not run") for each in late)


def test_flops_of_a_step_by_hand(cuda: ModuleType) -> None:
    size = cuda.Size(width=4, layers=1, heads=2, key_heads=1, ffn=8, head_size=2, vocabulary=10)
    work = cuda.Work.__new__(cuda.Work)
    work.steps, work.tokens, work.seen = 2, 12, 14
    # Queries and output 4 x 4 each, keys and values 4 x 2 each, and three of 4 x 8.
    weights = 16 + 16 + 8 + 8 + 3 * 32
    layers, attention, head = 2 * weights * 6, 4 * 2 * 2 * 7, 2 * 4 * 10 * 3
    plain = cuda.flops_of_step(size, work, 3.0, is_full=False, recomputes=False, scores_ref=False)
    most = cuda.flops_of_step(size, work, 3.0, is_full=True, recomputes=True, scores_ref=True)
    assert plain == 2 * layers + 3 * attention + 3 * head
    assert most == 5 * layers + 5 * attention + 5 * head


def test_claims_of_the_gpu_suite(cuda: ModuleType) -> None:
    case = cuda.CASES["8B 384/128"]
    sides: dict[str, dict[str, Any]] = {
        "trl": {"seconds": 2.0, "tokens": 8192},
        "padded": {"seconds": 1.6, "tokens": 8192},
        "auto": {"seconds": 1.0, "tokens": 5112, "use": 0.5},
        "cached": {"error": "OutOfMemoryError"},
    }
    found = {words: value >= least for words, value, least in cuda.verdicts(case, sides)}
    assert list(found.values()) == [True, False, True, True]
    assert cuda.judge(dict.fromkeys(cuda.CASES, sides), tiny=False) == 1


def test_claims_of_a_case() -> None:
    sys.path.insert(0, str(SCRIPTS))
    try:
        import benchmark
    finally:
        sys.path.remove(str(SCRIPTS))
    built = [{"layout": "packed", "tokens": 100, "peak_mib": 30.0}, {"layout": "trl", "tokens": 200, "peak_mib": 29.0}]
    case = benchmark.CASES["gsm8k"]
    figures = benchmark.figures_of(built, [[1.0, 1.9], [1.0, 1.7], [2.0, 3.8]], rows=16)
    assert (figures["ratio"], figures["bound"], case.least(figures)) == (1.9, 2.0, 1.8)
    assert case.missed(figures) == ["memory"]
    built[0] |= {"peak_mib": 28.0, "tokens": 80}
    assert case.missed(benchmark.figures_of(built, [[1.0, 1.9]], rows=16)) == ["speed"]
