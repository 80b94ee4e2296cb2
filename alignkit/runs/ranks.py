"""The processes of one launch: they compare what they were given before anything is loaded, and end together.

A launcher starts the same command on every process and believes that the same happens in all of them. Where a machine
has another config file, other rows or another version of a package, they would train different things and average
them, or wait for each other for ever. Each process therefore writes what it has into the store through which the
processes of a launch meet, reads what the others have, and refuses any difference.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

import alignkit
from alignkit.config import LoadedConfig
from alignkit.config.data_files import source_list
from alignkit.environment import RECORDED, installed_version, launched_on_cpu, process_of_launch
from alignkit.errors import LaunchError, RanksDifferError
from alignkit.runs.directory import plain

GRACE = 5.0
"""Seconds in which a process that has lost another one waits for the launcher, which knows which of them ended first,
and for the others to say that they wait as well."""

Found = Mapping[str, Mapping[str, Any]]
"""What a process has: name to ``value``, and where it is known to ``source``."""


class Ranks:
    """This process among those of its launch; made by :meth:`join`.

    Args:
        rank: Number of this process.
        size: How many processes there are.
        timeout: How long to wait for another process.
        store: Where the processes leave notes for each other; None where there is only one.
    """

    def __init__(self, rank: int, size: int, timeout: timedelta, store: dist.Store | None) -> None:
        self.rank, self.size, self.timeout, self.store = rank, size, timeout, store

    @classmethod
    def join(cls, timeout: int) -> Ranks:
        """Meet the other processes, at the address the launcher gave.

        Args:
            timeout: Seconds one process may wait for another.

        Raises:
            ConfigError: The launcher's variables do not describe a launch.
            LaunchError: The meeting point cannot be opened or reached.
        """
        rank, size = process_of_launch()
        limit = timedelta(seconds=timeout)
        return cls(rank, size, limit, _meeting_point(rank, limit) if size > 1 else None)

    def compare(self, topic: str, find: Callable[[], Found]) -> None:
        """Refuse to go on when another process has found something else; every process raises the same error.

        Args:
            topic: A name of this comparison, used once in a run.
            find: Returns what is compared; not called where there is one process. Sources are shown, not compared.

        Raises:
            RanksDifferError: Lists what differs, with the value of every process.
            LaunchError: A process does not arrive.
        """
        if self.store is None:
            return
        own = plain({"WORLD_SIZE": {"value": self.size}, **find()})
        self.store.set(f"{topic}/{self.rank}", json.dumps(own))
        everyone: list[Found] = []
        for rank in range(self.size):
            everyone.append(json.loads(self._note(f"{topic}/{rank}", rank)))
            # Processes that disagree about their number would wait for some that nobody started.
            if sizes := list(_differences([{"WORLD_SIZE": one["WORLD_SIZE"]} for one in everyone])):
                self._part(topic, rank)
                raise RanksDifferError(_HEADLINE, sizes)
        if differences := list(_differences(everyone)):
            self._part(topic, self.size - 1)
            raise RanksDifferError(_HEADLINE, differences)

    def of_first(self, topic: str, find: Callable[[], Any]) -> Any:
        """What the first process has found, on all of them; before accelerate knows of any but its own.

        Args:
            topic: A name of this exchange, used once in a run.
            find: Returns it, for JSON; called by the first process alone.

        Raises:
            LaunchError: The first process does not arrive.
        """
        if self.store is None:
            return find()
        key = f"{topic}/first"
        if self.rank == 0:
            self.store.set(key, json.dumps(find()))
        return json.loads(self._note(key, 0))

    def connect(self, *, use_cpu: bool) -> None:
        """Connect the processes of a launch on CPUs; accelerate would do so without passing the time limit on.

        Args:
            use_cpu: Whether the config asks for the CPU.
        """
        on_cpu = use_cpu or launched_on_cpu()
        if self.store is None or not on_cpu or dist.is_initialized() or dist.is_mpi_available():
            return
        store = dist.PrefixStore("gloo", self.store)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=self.timeout)

    def check_world_size(self, world_size: int) -> None:
        """Refuse processes that did not find each other: each would train by itself and all write the same files.

        Args:
            world_size: Number of processes that train together.

        Raises:
            RanksDifferError: It is not how many the launcher started.
        """
        if world_size != self.size:
            problem = (
                f"the launcher started {self.size} processes, and each finds itself alone: torch finds no accelerator "
                "on this machine. Write use_cpu: true to train on CPUs, or launch one process"
            )
            raise RanksDifferError("the processes of this launch would not train together", [problem])

    @contextlib.contextmanager
    def losses_named(self, note: Callable[[str], None]) -> Iterator[None]:
        """Say which process has stopped or ended where torch only says that a connection did.

        Args:
            note: Called with one line as soon as a process is lost; the launcher may end this one right after.

        Raises:
            LaunchError: A process was lost, and the launcher has not ended this one.
        """
        try:
            yield
        except RuntimeError as error:
            if self.store is None or not _is_of_a_connection(error):
                raise
            note("failed: another process of the launch was lost")
            raise LaunchError(self._loss(error)) from error

    def _note(self, key: str, rank: int) -> str:
        """What another process left under ``key``, waiting for it."""
        assert self.store is not None
        try:
            self.store.wait([key], self.timeout)
            return self.store.get(key).decode()
        except dist.DistError as error:
            seconds = int(self.timeout.total_seconds())
            raise LaunchError(
                f"rank {rank} did not arrive within {seconds} s (ddp_timeout): it was not started, has ended, or still "
                "starts. Look at what it printed; where machines start far apart, write a larger ddp_timeout"
            ) from error

    def _part(self, topic: str, last: int) -> None:
        """Wait a moment until the others have read this too, or who ends first would take the store with him."""
        assert self.store is not None
        self.store.set(f"{topic}/read/{self.rank}", "")
        with contextlib.suppress(dist.DistError):
            self.store.wait([f"{topic}/read/{rank}" for rank in range(last + 1)], timedelta(seconds=GRACE))

    def _loss(self, error: RuntimeError) -> str:
        """Who was lost, in words; only reached where the launcher, knowing better, does not end this process."""
        assert self.store is not None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            self.store.set(f"waiting/{self.rank}", "")
            time.sleep(GRACE)
            lost = [rank for rank in range(self.size) if not self.store.check([f"waiting/{rank}"])]
        except dist.DistError:
            lost = [0]  # it keeps the store
        who = _ranks(lost) if lost else "another process"
        if "imed out" not in str(error):
            return f"the connection to {who} was lost: that process has ended. What it printed last says why"
        return (
            f"{who} did not answer within {int(self.timeout.total_seconds())} s (ddp_timeout): that process has "
            "stopped, or works on something that takes longer. In the second case write a larger ddp_timeout"
        )


def launched_with(loaded: LoadedConfig) -> dict[str, Mapping[str, Any]]:
    """What a process was started with, to compare: every key of the config, sizes of data files, packages.

    Args:
        loaded: The config.
    """
    sources = {key: source_list(getattr(loaded.config, key) or []) for key in ("data", "eval_data")}
    sizes = {
        f"{key} ({source['path']})": {"value": _size(Path(source["path"]).expanduser())}
        for key, listed in sources.items()
        for source in listed
    }
    packages = {name: {"value": installed_version(name)} for name in RECORDED}
    packages["alignkit"] = {"value": f"{alignkit.__version__} (sources {_sources()})"}
    packages["python"] = {"value": platform.python_version()}
    return {**loaded.effective(), **sizes, **packages}


_HEADLINE = "the processes of this launch were not given the same, and would train different things"


def _meeting_point(rank: int, timeout: timedelta) -> dist.Store:
    """The store of the launch: the launcher's where it has one, otherwise kept by the first process."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeps = rank == 0 and not of_launcher
    try:
        # multi_tenant: torch opens it once more, in this process, when the processes are connected.
        store = dist.TCPStore(
            host, port, is_master=keeps, timeout=timeout, wait_for_workers=False, multi_tenant=not of_launcher
        )
    except dist.DistError as error:
        if keeps:
            why = f"cannot listen on port {port} (MASTER_PORT): another program has it, or it is not ours to take"
            raise LaunchError(f"rank 0 {why}. Launch with another --main_process_port") from error
        where = f"{host}:{port} (MASTER_ADDR and MASTER_PORT)"
        raise LaunchError(f"rank {rank} cannot reach the first process at {where}: nothing answers there") from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"alignkit/{attempt}", store)


def _differences(everyone: list[Found]) -> Iterator[str]:
    """One line for each thing that is not the same on all ranks."""
    for name in dict.fromkeys(name for one in everyone for name in one):
        ranks_of: dict[str, list[int]] = {}
        for rank, one in enumerate(everyone):
            ranks_of.setdefault(json.dumps(one[name]["value"] if name in one else None), []).append(rank)
        if len(ranks_of) > 1:
            shown = (_shown(everyone[ranks[0]].get(name)) + f" on {_ranks(ranks)}" for ranks in ranks_of.values())
            yield f"{name}: {', '.join(shown)}"


def _shown(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "absent"
    value = entry["value"]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"{text} ({entry['source']})" if entry.get("source") else text


def _ranks(ranks: list[int]) -> str:
    """``rank 1``, ``ranks 0, 2, 5`` or, of many, ``ranks 0 to 6``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def _size(path: Path) -> str | None:
    """Size of a data file, or of all files of a folder; None of what is not a local path, such as a Hub id."""
    if path.is_file():
        return f"{path.stat().st_size:,} bytes"
    if not path.is_dir():
        return None
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    return f"{len(sizes)} files, {sum(sizes):,} bytes"


def _sources() -> str:
    """Hash of our own sources: checkouts of one version differ more often than releases do."""
    digest = hashlib.blake2b(digest_size=4)
    for file in sorted(Path(alignkit.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _is_of_a_connection(error: RuntimeError) -> bool:
    """Whether torch says that another process could not be talked to; errors of gloo name its sources and no class."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
