"""What a run has left on disk, to the last bit, in a form that two recordings are compared in."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from tests.launches import environment_of_launches, launched, options_of_launch
from tests.programs.launching import (
    Imported,
    Launcher,
    program_environment,
    read_lines,
    run_json,
    write_config,
)
from tests.trajectories.runs import RUNS, ZERO2, config_of, program_of, write_inputs

LIBRARIES = "torch transformers trl peft accelerate datasets numpy deepspeed bitsandbytes".split()
TIMINGS = re.compile(r".*(_runtime|_per_second)")
"""Metrics that no two runs share."""
OF_THE_PLACE = re.compile(r"environment\..*|sessions\.\d+\.started")
"""Entries of run.json that depend on time, machine or commit."""
HASHED = (".safetensors", ".pt", ".pth", ".parquet", ".jsonl", ".json", ".html")
UNSTABLE = ("run.json", "metrics.jsonl", "trainer_state.json", "complete.json", "adapter_config.json")
"""Files whose content is compared, and those of them that hold times, hashes of pickles or sets; these, and all others,
are compared by name. A ``.bin`` is a pickle that names classes."""

Recording = dict[str, Any]


def machine() -> dict[str, Any]:
    """What the last bits of a result depend on beside the code."""
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    flags = next(line for line in cpu.splitlines() if line.startswith(("flags", "Features")))
    return {
        "versions": {name: version(name) for name in LIBRARIES},
        "cpu flags": hashlib.sha256(flags.encode()).hexdigest()[:16],
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
    }


def record(code: Path, names: Sequence[str]) -> Recording:
    """Make the runs with the code in a folder, each in a new process with one thread.

    Args:
        code: A checkout of alignkit.
        names: Of :data:`RUNS` and :data:`ZERO2`; those of a method that the code has not got are left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        place, output = Path(folder, "place"), Path(folder, "output")
        place.mkdir()
        output.mkdir()
        write_inputs(place)
        environment = program_environment(Path(folder, "home"), code)
        runs: dict[str, Any] = {}
        names = [name for name in names if any(code.glob(f"alignkit/*/{config_of(name)['method']}.py"))]
        alone = [name for name in names if name in RUNS]
        together = [name for name in names if name in ZERO2]
        with closing(Imported(environment)) as imported:
            if alone:
                runs |= _record(alone, Launcher(output, [environment], imported), code, place)
            if together:
                launch = environment_of_launches(imported) | {"PYTHONPATH": str(code)}
                ranks = launched(imported, launch, options_of_launch("cpu_zero2"), 2)
                runs |= _record(together, Launcher(output, ranks, imported), code, place)
    return {"machine": machine(), "runs": runs}


def _record(names: Sequence[str], launcher: Launcher, code: Path, place: Path) -> dict[str, Any]:
    with closing(launcher):
        return {name: _run(name, launcher, code, place) for name in names}


def _run(name: str, launcher: Launcher, code: Path, place: Path) -> dict[str, Any]:
    config, cache = config_of(name), place / f"{name}.cache"
    write_config(place / f"{name}.yaml", config)
    ended = launcher.run(
        *("--config", f"{name}.yaml"),
        directory=place,
        program=code / "trainers" / f"{program_of(config)}.py",
        environment={"ALIGNKIT_CACHE": str(cache)},
    )
    if ended.exit_code:
        raise SystemExit(f"{name} ended with {ended.exit_code}:\n{ended.output[-1000:]}{ended.errors[-4000:]}")
    _check_code(name, place / name, code)
    return left_behind(place / name, cache)


def _check_code(name: str, run: Path, code: Path) -> None:
    """A run that was made by other code than the one asked for compares nothing."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=code, capture_output=True, text=True, check=True).stdout
    ran = run_json(run)["environment"]["git"]["commit"]
    if ran != commit.strip():
        raise SystemExit(f"{name} was made by commit {ran}, not by that of {code}")


def left_behind(run: Path, cache: Path) -> dict[str, Any]:
    """What a run has logged, said of itself, written and cached; numbers in full.

    Args:
        run: Its directory.
        cache: What $ALIGNKIT_CACHE was, its own.
    """
    lines = [{k: v for k, v in line.items() if not TIMINGS.fullmatch(k)} for line in read_lines(run / "metrics.jsonl")]
    said = {key: value for key, value in flattened(run_json(run)) if not OF_THE_PLACE.fullmatch(key)}
    return {
        "metrics": {f"{number}, step {line['step']}": exact(line) for number, line in enumerate(lines, 1)},
        "run.json": exact(said),
        "files": contents(run),
        "cache": contents(cache),
    }


def exact(values: Mapping[str, Any]) -> dict[str, Any]:
    """Floats as hexadecimal text, which has all their bits."""
    return {key: value.hex() if isinstance(value, float) else value for key, value in values.items()}


def flattened(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested mappings and lists with its dotted name; an empty one is a leaf."""
    if isinstance(value, (dict, list)) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flattened(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def contents(folder: Path) -> dict[str, str | None]:
    """Every file below a folder, with a hash of what is in it where that is numbers or rows."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _content(path) for path in files}


def _content(path: Path) -> str | None:
    if path.suffix not in HASHED or path.name in UNSTABLE:
        return None
    digest = hashlib.sha256()
    if path.suffix == ".safetensors":
        _feed(digest, load_file(path))
    elif path.suffix in (".pt", ".pth"):
        _feed(digest, torch.load(path, map_location="cpu", weights_only=False))
    elif path.suffix == ".parquet":
        _feed(digest, pq.read_table(path).to_pydict())
    else:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Every number below a value, in an order that does not depend on how it was gathered."""
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(value.tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(str(len(value)).encode())
        for item in value:
            _feed(digest, item)
    elif isinstance(value, (str, int, float, bool, bytes, type(None))):
        digest.update(repr(value).encode())
    else:
        # DeepSpeed pickles objects of its own.
        digest.update(type(value).__name__.encode())
        _feed(digest, vars(value))


def save(recording: Recording, path: Path) -> None:
    """Write a recording."""
    path.write_text(json.dumps(recording, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
