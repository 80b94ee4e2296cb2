"""What a run has written, listed in its directory before it is written, and deleted by that list alone.

``manifest.json`` names files and checkpoints. A name gets there before the file does, so that a kill at any instant
leaves nothing of the run unlisted; what is not listed was written by someone else and is never deleted. Links are not
followed and not removed, and no pattern is matched against names.

Neither torch nor transformers is needed, so that a run directory is inspected before these are imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

from alignkit.storage import durability

MANIFEST = "manifest.json"
RUN_FILE = "run.json"

_NAMES_BEFORE = (
    "metrics.jsonl", "plot.png", "README.md", "token_rewards.html", "training_args.bin", "alignkit.json",
    "adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json", "model.safetensors",
    "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip
"""What runs wrote before there was a manifest."""

_OF_THE_RUN = (RUN_FILE, MANIFEST, "run.lock", ".run.lock.", ".run.json.")
_INDEX = "model.safetensors.index.json"


class Manifest:
    """The list of one run; read anew for every question, so that it is right after any kill."""

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / MANIFEST

    def files(self) -> set[str]:
        """Files outside checkpoints, relative to the run."""
        return set(self._read()["files"])

    def checkpoints(self) -> list[Path]:
        """Folders of checkpoints, begun or complete, by rising step; links are left out."""
        folders = [self.run / name for name in self._read()["checkpoints"]]
        return sorted((f for f in folders if f.is_dir() and not f.is_symlink()), key=durability.checkpoint_order)

    def claim(self, *names: str) -> None:
        """List files that are about to be written.

        Args:
            *names: Relative to the run.
        """
        self._change("files", lambda listed: listed | set(names))

    def claim_checkpoint(self, folder: Path) -> None:
        """List the folder of a checkpoint that is about to be written.

        Args:
            folder: A folder directly in the run.
        """
        self._change("checkpoints", lambda listed: listed | {folder.name})

    def complete(self, folder: Path) -> None:
        """List a checkpoint as one that has been complete, so that the loss of its marker is noticed.

        Args:
            folder: A listed checkpoint that holds its marker.
        """
        self._change("complete", lambda listed: listed | {folder.name})

    def was_complete(self, folder: Path) -> bool:
        """Whether a checkpoint has been marked complete once, whatever has become of it since."""
        return durability.was_complete(folder) or folder.name in self._read()["complete"]

    def delete_checkpoint(self, folder: Path) -> None:
        """Delete a listed checkpoint but for what someone else has put into it, and list it no longer."""
        self._change("complete", lambda listed: listed - {folder.name})
        durability.delete_checkpoint(folder)
        self._forget(folder)

    def move_aside(self, folder: Path) -> Path:
        """Give a listed checkpoint a name under which no run looks for it.

        Returns:
            Where it is now.
        """
        names = (f"{folder.name}.damaged{'' if n == 1 else f'-{n}'}" for n in count(1))
        aside = next(path for path in map(folder.with_name, names) if not path.exists())
        self.claim_checkpoint(aside)
        folder.rename(aside)
        self._forget(folder)
        return aside

    def begin(self) -> None:
        """Start the list of a new run."""
        self._write(_nothing())

    def adopt(self) -> None:
        """List what a run wrote before there was a manifest: exact names that are files, and complete checkpoints."""
        if not self.path.exists():
            self._write(self._before())

    def delete_all(self) -> list[str]:
        """Delete what is listed; repeated after a kill, it goes on.

        Returns:
            What is kept, relative to the run, because no run wrote it; run.json and the manifest are not counted.
        """
        listed = self._read() if self.path.exists() else self._before()
        for name in listed["checkpoints"]:
            folder = self.run / name
            if folder.is_dir() and not folder.is_symlink():
                durability.delete_checkpoint(folder)
        partial = [durability.partial_path(Path(name)).as_posix() for name in listed["files"]]
        for name in [*listed["files"], *partial]:
            if (file := durability.own_file(self.run, name)) is not None:
                file.unlink()
                durability.remove_empty(file.parent, self.run)
        return sorted(path.name for path in self.run.iterdir() if not path.name.startswith(_OF_THE_RUN))

    def links(self) -> list[str]:
        """Names the run writes under which someone else has put a link."""
        listed = self._read() if self.path.exists() else self._before()
        names = {*listed["files"], *listed["checkpoints"], *_NAMES_BEFORE, RUN_FILE, MANIFEST}
        return sorted(name for name in names if (self.run / name).is_symlink())

    def _before(self) -> dict[str, set[str]]:
        shards: Iterable[str] = ()
        if (self.run / _INDEX).is_file():
            shards = json.loads((self.run / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        names = {name for name in (*_NAMES_BEFORE, *shards) if durability.own_file(self.run, name) is not None}
        complete = [path for path in durability.complete_checkpoints(self.run) if not path.is_symlink()]
        folders = {path.name for path in complete}
        return {"files": names, "checkpoints": folders, "complete": folders}

    def _forget(self, folder: Path) -> None:
        for kind in ("complete", "checkpoints"):
            self._change(kind, lambda listed: listed - {folder.name})

    def _change(self, kind: str, change: Callable[[set[str]], set[str]]) -> None:
        listed = self._read()
        changed = change(listed[kind])
        if changed != listed[kind]:
            self._write({**listed, kind: changed})

    def _read(self) -> dict[str, set[str]]:
        if not self.path.exists():
            return _nothing()
        content = json.loads(self.path.read_text(encoding="utf-8"))
        return {kind: {str(name) for name in content[kind]} for kind in _nothing()}

    def _write(self, listed: dict[str, set[str]]) -> None:
        content = {kind: sorted(names) for kind, names in listed.items()}
        durability.write_whole(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _nothing() -> dict[str, set[str]]:
    return {"files": set(), "checkpoints": set(), "complete": set()}
