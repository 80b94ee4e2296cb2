"""Files of the bank: whole, named by their content, mapped; damage and strangers are named."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alignkit.errors import CheckpointError
from alignkit.routing.store import BANK_FILE, Identity, RoutingBank, read_part, write_facts, write_part
from alignkit.storage.refusals import StorageError


def small_bank(directory: Path, n: int = 6) -> Path:
    """A bank with recognisable numbers: row i has routing i, target 10 i, variance 100 i."""
    row = torch.arange(n).float()
    parts = {
        "routing": {"routing": row[:, None].expand(n, 4), "pooled": torch.eye(n)},
        "success": {"success": row > 2},
        "targets": {
            "target": 10 * row[:, None].expand(n, 4),
            "variance": 100 * row,
            "has_target": row % 2 == 0,
            "indices": torch.zeros(n, 3, dtype=torch.long),
            "weights": torch.zeros(n, 3, dtype=torch.double),
            "sizes": torch.zeros(n, dtype=torch.long),
        },
    }
    files = {}
    for kind, tensors in parts.items():
        identity = Identity(kind, {"of": kind})
        path = identity.path(directory)
        write_part(path, tensors, identity)
        files[kind] = path.name
    files["embeddings"] = files["routing"]
    write_facts(directory, {"files": files, "layers": ["a", "b"]})
    return directory


def test_a_bank_comes_back_row_by_row(tmp_path: Path) -> None:
    bank = RoutingBank.open(small_bank(tmp_path))
    assert (len(bank), bank.num_layers) == (6, 2)
    rows = bank.targets(torch.tensor([4, 1]))
    assert rows.routing.tolist() == [[4.0] * 4, [1.0] * 4]
    assert rows.target.tolist() == [[40.0] * 4, [10.0] * 4]
    assert rows.variance.tolist() == [400.0, 100.0]
    assert rows.has_target.tolist() == [True, False]
    assert bank.success.tolist() == [False] * 3 + [True] * 3
    assert torch.equal(bank.embeddings, torch.eye(6))


def test_a_key_is_of_the_content_and_of_nothing_else() -> None:
    one = Identity("targets", {"k": 3, "sigma": 0.4})
    assert one.key == Identity("targets", {"sigma": 0.4, "k": 3}).key
    others = [Identity("targets", {"k": 5, "sigma": 0.4}), Identity("success", {"k": 3, "sigma": 0.4})]
    assert len({one.key, *(other.key for other in others)}) == 3


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "renamed"])
def test_a_damaged_or_foreign_file_is_named(damage: str, tmp_path: Path) -> None:
    identity = Identity("success", {})
    path = identity.path(tmp_path)
    write_part(path, {"success": torch.ones(64, dtype=torch.bool)}, identity)
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[:-8])
    elif damage == "flipped":
        path.write_bytes(whole[:-1] + bytes([1 - whole[-1]]))
    elif damage == "foreign":
        save_file({"success": torch.ones(64)}, path)
    expected = {"truncated": "cannot be read", "flipped": "its hash differs"}.get(damage, "is not the file")
    other = Identity("success", {"rows": "others"})
    with pytest.raises(CheckpointError, match=expected) as caught:
        read_part(path, other.key if damage == "renamed" else identity.key)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"files": 3}', None])
def test_a_folder_without_a_readable_list_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / BANK_FILE).write_text(content)
    with pytest.raises(CheckpointError, match="missing" if content is None else "not the list") as caught:
        RoutingBank.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    small_bank(tmp_path)
    (gone,) = tmp_path.glob("success-*")
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        RoutingBank.open(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = Identity("success", {})
    path = identity.path(tmp_path)
    write_part(path, {"success": torch.ones(8).bool()}, identity)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match=path.name):
            write_part(path, {"success": torch.ones(100_000).bool()}, identity)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_part(path, identity.key)["success"].shape == (8,)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_list_says_what_it_was_given(tmp_path: Path) -> None:
    write_facts(tmp_path, {"files": {}, "options": {"bank_sigma": 0.4}})
    assert json.loads((tmp_path / BANK_FILE).read_text())["options"] == {"bank_sigma": 0.4}
