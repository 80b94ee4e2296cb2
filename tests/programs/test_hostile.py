"""A part of the hostile corpus, a few of each kind; ``tests/chaos/test_hostile.py`` runs all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.hostile import KINDS
from tests.chaos.hostile_runs import CORPUS, make_workplace, put_before
from tests.programs.launching import Launcher

# One worker runs all of this folder: its programs are forked from one process, and its finished runs made once.
pytestmark = pytest.mark.xdist_group("programs")
EACH = 3


@pytest.fixture(scope="module")
def hostile_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hostile")
    make_workplace(place)
    return place


def test_hostile_files_do_nothing(launcher: Launcher, hostile_place: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        quick = [case for case in CORPUS if case.kind == kind and not case.is_slow and case.says is not None]
        chosen = quick[:: max(1, len(quick) // EACH)][:EACH]
        for case in chosen:
            put_before(case, launcher, hostile_place, tmp_path)
        print(f"\nhostile {kind}: {len(chosen)} of {len(chosen)}")
