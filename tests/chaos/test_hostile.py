"""Nothing hostile that is handed on is executed, hangs a program or ends it with a traceback; the whole corpus."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.hostile import KINDS
from tests.chaos.hostile_runs import CORPUS, make_workplace, put_before
from tests.programs.launching import REPOSITORY, Imported, Launcher


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory, imported: Imported) -> Iterator[Launcher]:
    home = tmp_path_factory.mktemp("home")
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    variables |= {"HF_DATASETS_CACHE": str(home / "datasets"), "ALIGNKIT_CACHE": str(home / "alignkit")}
    started = Launcher(tmp_path_factory.mktemp("output"), [variables], imported)
    yield started
    started.close()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hostile")
    make_workplace(place)
    return place


@pytest.mark.chaos
@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_file_does_nothing(kind: str, launcher: Launcher, workplace: Path, tmp_path: Path) -> None:
    cases = [case for case in CORPUS if case.kind == kind]
    for case in cases:
        put_before(case, launcher, workplace, tmp_path)
    print(f"\nhostile {kind}: {len(cases)} of {len(cases)}")


def test_every_case_is_one_of_its_own() -> None:
    assert len({(case.kind, case.name) for case in CORPUS}) == len(CORPUS) >= 131
    assert {case.kind for case in CORPUS} == set(KINDS)
