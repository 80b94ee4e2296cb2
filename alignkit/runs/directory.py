"""The directory of one run: made, refused or resumed before anything is loaded, and ``run.json`` in it.

::

    run.json        config with the source of every value, versions, git state, process layout, results, status
    manifest.json   what the run has written, and overwriting deletes
    metrics.jsonl   one line a log                plot.png, README.md   figure and model card
    checkpoint-N/   complete when it holds complete.json               the adapter or model, and its tokenizer
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignkit.config.keys import keys_that
from alignkit.errors import RunDirectoryError
from alignkit.plain_text import all_without_secrets
from alignkit.runs.inputs import inputs_inside
from alignkit.runs.lock import RunLock, is_of_lock
from alignkit.storage import durability
from alignkit.storage.manifest import MANIFEST, RUN_FILE, Manifest

_FORMAT_KEY = "alignkit_run"
_FORMAT = 1

LENGTH = ("max_steps", "num_train_epochs")
"""Keys that may be larger in a resumption, which makes the run longer; the learning rate goes on as if it had been."""


class RunDirectory:
    """An accepted run directory; made by :meth:`create`.

    Attributes:
        path: The directory.
        is_main: Whether this process writes; on the other ranks every writing method does nothing.
        manifest: List of what the run writes; whatever is written here is listed there first.
        lock: Held by this run, so that no other writes here; :meth:`create` takes it, the program gives it back.
        kept: Names in the directory that overwriting has left, because no run wrote them.
        remarks: What there is to say of the checkpoints that were looked at for :meth:`checkpoint_to_resume`.
        extended: What :meth:`check_resumable` found to make the run longer than it was to be, in words.
    """

    def __init__(self, path: Path, *, is_main: bool) -> None:
        self.path, self.is_main = path, is_main
        self._new_session: dict[str, Any] | None = None
        self.manifest = Manifest(path)
        self.lock = RunLock(path)
        self.kept: list[str] = []
        self.remarks: list[str] = []
        self._to_resume: Path | None = None
        self.extended: list[str] = []

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        is_main: bool | None = None,
        config: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> RunDirectory:
        """Make or reopen the directory of a run.

        Args:
            path: Where; created with its parents.
            resume: Continue the run that is there; it must have a complete checkpoint.
            overwrite: Delete the files that the manifest of an earlier run lists, and nothing else.
            is_main: Whether this is the first rank; the others only learn the path. None reads ``RANK``, which
                launchers set before any process group exists.
            config: Effective config, ``{key: {"value": ...}}``; what it names must not lie in what is overwritten.

        Raises:
            RunDirectoryError: The directory cannot be used that way; the message says what to write instead.
        """
        run = cls(Path(path), is_main=os.environ.get("RANK", "0") == "0" if is_main is None else is_main)
        if not run.is_main:
            return run
        if resume and overwrite:
            raise RunDirectoryError("resume continues a run and overwrite deletes it. Keep one of the two.")
        if not run.path.is_dir():
            if resume:
                raise RunDirectoryError(f"there is no run to resume: {run.path} {_what_is(run.path)}. {_NEW_RUN}")
            _make_directory(run.path)
        is_new = not (names := _names(run.path)) and not resume
        if not is_new and RUN_FILE not in names:
            raise RunDirectoryError(_no_run(run.path, names, resume=resume))
        _check_writable(run.path)
        run.lock.acquire()
        try:
            if not is_new:
                run._reopen(resume=resume, overwrite=overwrite, config=config or {})
            run._begin(resume)
        except BaseException:
            run.lock.release()
            raise
        return run

    @property
    def metrics_path(self) -> Path:
        """Log of the run."""
        return self.path / "metrics.jsonl"

    @property
    def plot_path(self) -> Path:
        """Figure drawn at the end."""
        return self.path / "plot.png"

    @property
    def card_path(self) -> Path:
        """Model card."""
        return self.path / "README.md"

    def sections(self) -> dict[str, Any]:
        """Content of ``run.json``.

        Raises:
            RunDirectoryError: There is none, or alignkit did not write it.
        """
        path = self.path / RUN_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunDirectoryError(f"{self.path} does not hold a run of alignkit: it has no {RUN_FILE}") from None
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"{path} cannot be read ({error}). Write another output_dir.") from error
        if not isinstance(content, dict) or content.get(_FORMAT_KEY) != _FORMAT:
            raise RunDirectoryError(f"{path} was not written by this version of alignkit. Write another output_dir.")
        return content

    def record(self, **sections: Any) -> None:
        """Merge sections into ``run.json``, atomically.

        Args:
            **sections: A mapping is merged key by key into the section of its name; anything else replaces it.
                Paths become text, dataclasses mappings, and NaN and infinity the texts ``nan`` and ``inf``.
        """
        if not self.is_main:
            return
        content = self.sections()
        if self._new_session is not None:
            content["status"], content["sessions"] = "running", [*content["sessions"], self._new_session]
            self._new_session = None
            self.manifest.adopt()
        for name, value in sections.items():
            old, new = content.get(name), plain(value)
            content[name] = {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new
        self._write(content)

    def checkpoint_to_resume(self) -> Path | None:
        """The newest checkpoint of which every byte is as it was saved; None when there is none. Looked for once."""
        if self._to_resume is None:
            for checkpoint in reversed(durability.checkpoints(self.path)):
                if not self.manifest.was_complete(checkpoint):
                    continue
                if problem := durability.damage(checkpoint):
                    self.remarks.append(f"{checkpoint} is damaged and not used: {problem}")
                    continue
                if not durability.has_hashes(checkpoint):
                    self.remarks.append(f"{checkpoint} is from before hashes were saved: only sizes are compared")
                self._to_resume = checkpoint
                break
        return self._to_resume

    def last_complete_checkpoint(self) -> Path | None:
        """The newest checkpoint marked complete, by the sizes of its files; None when there is none."""
        complete = durability.complete_checkpoints(self.path)
        return complete[-1] if complete else None

    def check_resumable(self, config: Mapping[str, Mapping[str, Any]], *, world_size: int | None = None) -> None:
        """Refuse to resume under a configuration that would have led elsewhere; call it before ``record(config=...)``.

        Args:
            config: Effective config, ``{key: {"value": ..., "source": ...}}``, as recorded under ``config``.
            world_size: Number of processes now; compared with the recorded ``process_layout`` when given.

        Raises:
            RunDirectoryError: Lists every key that differs, with both values.
        """
        if not self.is_main:
            return
        recorded = self.sections()
        before = recorded.get("config", {})
        differences = list(_differences(before, plain(config)))
        self.extended = [
            f"{key} {before[key]['value']} recorded, {config[key]['value']} now"
            for key in LENGTH
            if _is_longer(key, before.get(key), config.get(key))
        ]
        old_size = recorded.get("process_layout", {}).get("world_size", world_size)
        if world_size is not None and old_size != world_size:
            differences.append(f"number of processes: {old_size} recorded, {world_size} now")
        if differences:
            lines = "\n".join(f"  {line}" for line in differences)
            other = going_on(self.path, config.get("parametrization", {}).get("value"))
            raise RunDirectoryError(
                f"{self.path} cannot be resumed with other settings; the result would be neither run:\n{lines}\n"
                f"Write the recorded values back; or {other}."
            )

    def _reopen(self, *, resume: bool, overwrite: bool, config: Mapping[str, Mapping[str, Any]]) -> None:
        """Accept a directory that exists and is not empty, or say why not."""
        status = self.sections().get("status")
        checkpoint = self.checkpoint_to_resume() if resume else self.last_complete_checkpoint()
        has_ended = str(status).startswith(("failed", "stopped"))
        nothing_to_lose = has_ended and _names(self.path) <= {RUN_FILE, MANIFEST}
        if overwrite or (nothing_to_lose and not resume):
            self._overwrite(config)
        elif not resume:
            way_out = f"`resume: true` to continue from {checkpoint.name}, " if checkpoint else ""
            raise RunDirectoryError(
                f"{self.path} already holds a run (status: {status}). Write {way_out}`overwrite: true` to delete it "
                "and start again, or another output_dir."
            )
        elif checkpoint is None:
            damaged = "".join(f"\n  {line}" for line in self.remarks)
            raise RunDirectoryError(
                f"{self.path} holds a run (status: {status}) but no complete checkpoint{damaged and ' that is whole:'}"
                f"{damaged}{chr(10) if damaged else ', '}so there is nothing to resume "
                "from. Write `overwrite: true` in place of `resume: true` to start it again; a smaller save_steps "
                "saves earlier."
            )

    def _overwrite(self, config: Mapping[str, Mapping[str, Any]]) -> None:
        """Delete an earlier run but for ``run.json``, which is replaced: a kill leaves what is known as a run."""
        if inputs := inputs_inside(self.path, config):
            listed = "\n".join(f"  {line}" for line in inputs)
            raise RunDirectoryError(
                f"{self.path} cannot be overwritten: the run would read from it what it is about to delete:\n{listed}\n"
                "Write another output_dir; or move these out of it first, and name them where they are then."
            )
        if links := self.manifest.links():
            raise RunDirectoryError(
                f"{self.path} cannot be overwritten: {links[0]} in it is a link, no file that a run wrote, and the new "
                "run would write through it. Remove the link, or write another output_dir."
            )
        self.kept = self.manifest.delete_all()

    def _begin(self, resume: bool) -> None:
        """Note when training starts and from where; on resuming at the first record, which a refusal never reaches."""
        checkpoint = self.checkpoint_to_resume() if resume else None
        session = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "resumed_from": checkpoint.name if checkpoint else None,
        }
        if resume:
            self._new_session = session
        else:
            self._write({_FORMAT_KEY: _FORMAT, "status": "running", "sessions": [session]})
            self.manifest.begin()

    def _write(self, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        durability.write_whole(self.path / RUN_FILE, f"{text}\n")


_NEW_RUN = "Remove `resume: true` to start a new run, or write the output_dir of the run to continue."


def plain(value: Any) -> Any:
    """``value`` in terms that JSON has, without the secrets that somebody wrote into it."""
    return all_without_secrets(_plain(value))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value))
    if isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value


def _differences(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    """One line for each key that matters and differs; a key only one side knows counts unless it is at its default."""
    free = keys_that("free_on_resume")
    for key in dict.fromkeys([*recorded, *given]):
        old, new = recorded.get(key), given.get(key)
        if key in free or (old and new and old["value"] == new["value"]):
            continue
        if _is_longer(key, old, new):
            continue
        if (old is None and new["source"] == "default") or (new is None and old["source"] == "default"):
            continue
        yield f"{key}: {_shown(old)} recorded, {_shown(new)} now"


def going_on(path: Path, parametrization: Any) -> str:
    """What to do to go on from the weights of a run in another one.

    Args:
        path: Its directory.
        parametrization: Its parametrisation.
    """
    if parametrization in ("pat", "atp"):
        return (
            f"export its result (alignkit prune --adapter {path} --output DIR) and start a new run with `model: DIR` "
            "in another output_dir"
        )
    return (
        f"start a new run from these weights in another output_dir, with `adapter: {path}` under lora or "
        f"`model: {path}` under full"
    )


def _is_longer(key: str, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> bool:
    """Whether a key asks for more training than was recorded."""
    return key in LENGTH and old is not None and new is not None and 0 < old["value"] < new["value"]


def _shown(entry: Mapping[str, Any] | None) -> str:
    return "absent" if entry is None else f"{json.dumps(entry['value'], ensure_ascii=False)} ({entry['source']})"


def _names(path: Path) -> set[str]:
    """What is in a run directory beside its lock."""
    return {entry.name for entry in path.iterdir() if not is_of_lock(entry.name)}


def _no_run(path: Path, names: set[str], *, resume: bool) -> str:
    """Why a directory without run.json is not used."""
    held = f"holds {_shortened(sorted(names))} and no {RUN_FILE}" if names else "is empty"
    if resume:
        return f"there is no run to resume: {path} {held}. {_NEW_RUN}"
    return (
        f"{path} {held}, so no run of alignkit wrote it and nothing there is touched. Write an output_dir that does "
        "not exist yet."
    )


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _what_is(path: Path) -> str:
    return "is a file" if path.exists() else "does not exist"


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError):
        existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
        kind = "is a file" if existing.exists() else "is a link that leads nowhere"
        raise RunDirectoryError(
            f"output_dir {path} cannot be a directory: {existing} {kind}. Write another output_dir."
        ) from None
    except OSError as error:
        raise RunDirectoryError(
            f"output_dir {path} cannot be created: {error.strerror}. Write an output_dir where you may write."
        ) from error


def _check_writable(path: Path) -> None:
    """Try it: permissions do not tell about full disks, quotas and read-only mounts."""
    trial = path / f".writable.{os.getpid()}.partial"
    try:
        trial.write_bytes(b"\0")
        trial.unlink()
    except OSError as error:
        raise RunDirectoryError(
            f"output_dir {path} cannot be written to: {error.strerror}. Write an output_dir where you may write."
        ) from error
