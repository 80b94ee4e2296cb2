"""The wheel is complete: what a user gets from ``pip install`` works away from the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from alignkit.shipped import recipe_names
from tests.scripts.tiny import chat_pairs, save_model, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]


def run(command: list[str | Path], cwd: Path) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, repository], folder)
    return next(folder.glob("alignkit-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of an environment with the wheel installed and this environment's packages visible.

    They are made visible by a path entry, whose own ``.pth`` files Python does not read: an editable installation of
    the checkout stays out of sight.
    """
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site_packages = Path(
        run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], environment).strip()
    )
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], environment)
    return environment / "bin"


def test_the_wheel_carries_programs_and_recipes(wheel: Path, repository: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (("trainers", "_trainers"), ("configs", "_configs")):
        files = [p.relative_to(repository / folder) for p in (repository / folder).rglob("*") if p.is_file()]
        wanted = {f"alignkit/{inside}/{file.as_posix()}" for file in files if "__pycache__" not in file.parts}
        assert wanted
        assert wanted <= packed
    assert {"alignkit/py.typed"} <= packed
    assert not [name for name in packed if name.startswith(("tests/", "scripts/", "docs/"))]


def test_the_installed_package_is_the_wheel(installed: Path, tmp_path: Path) -> None:
    where = run([installed / "python", "-c", "import alignkit; print(alignkit.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_the_command_line_works_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    assert "usage: alignkit" in run([installed / "alignkit", "--help"], tmp_path)
    assert "accepted" in run([installed / "alignkit", "env"], tmp_path)
    listed = run([installed / "alignkit", "recipes"], tmp_path)
    assert all(name in listed for name in recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_found_in_the_wheel(name: str, installed: Path, tmp_path: Path) -> None:
    printed = run([installed / "alignkit", "config", name, "--output_dir", "out"], tmp_path)
    assert "command line" in printed


def test_the_program_is_found_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    """A training that is refused was at least reached: the error is about the missing model."""
    command = [installed / "alignkit", "train", recipe_names()[0], "--model", "no/such/folder", "--output_dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no/such/folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_user_of_the_wheel_trains_evaluates_merges_and_publishes(installed: Path, tmp_path: Path) -> None:
    """From rows to the list of what would be published, and an evaluation on two processes, without a checkout."""
    save_model(tmp_path / "base")
    write_rows(tmp_path / "pairs.jsonl", chat_pairs(8))
    python, alignkit = installed / "python", installed / "alignkit"
    settings = {
        "method": "flex_dpo", "model": "base", "data": "pairs.jsonl", "output_dir": "run", "use_cpu": "true",
        "max_steps": "2", "logging_steps": "1", "learning_rate": "1e-2",
    }  # fmt: skip
    run([alignkit, "train", *(word for key, value in settings.items() for word in (f"--{key}", value))], tmp_path)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 2
    assert "agrees" in run([alignkit, "compare", "run", "run"], tmp_path)

    quick = ["--data", "pairs.jsonl", "--num_samples", "1", "--max_new_tokens", "4", "--use_cpu"]
    run([alignkit, "evaluate", "--adapter", "run", "--compare_base", *quick, "--output", "eval.json"], tmp_path)
    run([alignkit, "merge", "--adapter", "run", "--output", "merged"], tmp_path)
    folder = run([alignkit, "recipes"], tmp_path).rpartition("accelerate files: ")[2].strip()
    launch = [python, "-m", "accelerate.commands.launch", "--config_file", Path(folder) / "cpu_ddp.yaml"]
    words = ["evaluate", "--model", "merged", *quick, "--output", "merged.json"]
    run([*launch, "--main_process_port", "0", "-m", "alignkit", *words], tmp_path)
    adapter, merged = (json.loads((tmp_path / name).read_text()) for name in ("eval.json", "merged.json"))
    assert merged["processes"]["world_size"] == 2
    before, after, again = (
        found["logps/chosen"]["mean"] for found in (adapter["base_metrics"], adapter["metrics"], merged["metrics"])
    )
    assert abs(after - before) > 1e-3 and again == pytest.approx(after, abs=1e-3)

    push = ["push", "--directory", "merged", "--repo_id", "me/it", "--dry_run"]
    listed = run([alignkit, *push], tmp_path)
    assert "model.safetensors" in listed and "nothing was sent" in listed
