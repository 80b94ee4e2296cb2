"""Publishing with the real client of huggingface_hub, against a Hub on the loopback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from alignkit.errors import CheckpointError, ProblemListError
from alignkit.hub.upload import check_before_training, plan_upload
from alignkit.storage.durability import mark_complete
from tests.scripts.conftest import Script
from tests.scripts.hub_server import Hub, Repository

TOKEN = "hf_" + 5 * "Secret" + "00"
REPO = "ada/tuned"
CARD = """---
base_model: {base}
library_name: {library}
license: mit
tags: [alignkit, "base_model:adapter:{base}"]
---

# Tuned

Load it onto "{base}", a fine base model.
"""
CHECKPOINT = ("checkpoint-2/optimizer.pt", "checkpoint-2/adapter_model.safetensors")
STATE = (*CHECKPOINT, "checkpoint-2/training_args.bin", "training_args.bin")
FOREIGN = (
    ".secret", ".env", "id_rsa", "server.pem", "notes.txt", "train.jsonl", "eval_rows.json", "rows.parquet", "train.py",
    "checkpoint-1000/mine.txt", "runs/mine/thesis.pdf", "logs/app.log", "other/adapter_model.safetensors", "best.pt",
    "other/adapter_config.json", "pytorch_model.bin", "optimizer.pt", "plot.svg", "deep/README.md", "model.pkl",
)  # fmt: skip
"""What is the user's own, and never goes."""
RECORDS = ("run.json", "metrics.jsonl", "eval.json")


@pytest.fixture
def run(assets: Path, tmp_path: Path) -> Path:
    """A finished run: an adapter on a local base with card, plot, records and a checkpoint."""
    directory = shutil.copytree(assets / "adapter", tmp_path / "run")
    (directory / "README.md").write_text(CARD.format(base=assets / "base", library="peft"))
    (directory / "plot.png").write_bytes(bytes(range(256)) * 20)
    (directory / "checkpoint-2").mkdir()
    (directory / "other").mkdir()
    for folder in ("checkpoint-2", "other"):
        shutil.copy(directory / "adapter_model.safetensors", directory / folder)
    for name in (*STATE, *RECORDS, *FOREIGN):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        if not (directory / name).exists():
            (directory / name).write_bytes(b"state")
    mark_complete(directory / "checkpoint-2")
    return directory


@pytest.fixture
def published_base(run: Path, assets: Path) -> Path:
    """The same run with a base on the Hub."""
    for name in ("README.md", "adapter_config.json"):
        (run / name).write_text((run / name).read_text().replace(str(assets / "base"), "org/base"))
    return run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The client of this process talks to the loopback, as HF_ENDPOINT and HF_HUB_DISABLE_XET would make it."""
    with Hub(TOKEN) as server:
        for name, value in (("ENDPOINT", server.endpoint), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def output_of(capfd: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What was printed, without the token in it."""
    out, err = capfd.readouterr()
    assert TOKEN not in out + err
    return out, err


def test_what_arrives_is_what_lies_here(
    hub: Hub, published_base: Path, run_script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_script("push_to_hub", "--directory", published_base, "--repo_id", REPO, "--commit_message", "first") == 0
    out, _ = output_of(capfd)
    received = hub.repositories[REPO]
    assert f"published: {hub.endpoint}/{REPO}/commit/" in out
    assert received.messages == ["first"]
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "plot.png"}
    assert set(received.files) == names
    for name in names - {"README.md"}:
        assert received.files[name] == (published_base / name).read_bytes(), name
    assert hub.storage.keys() == hub.verified and len(hub.storage) == 2
    assert all(r.authorization == f"Bearer {TOKEN}" for r in hub.requests if not r.path.startswith("/storage/"))
    assert all(r.authorization is None for r in hub.requests if r.path.startswith("/storage/"))


def test_a_local_base_is_refused_with_the_way_out(
    hub: Hub, run: Path, run_script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_script("push_to_hub", "--directory", run, "--repo_id", REPO) == 2
    _, err = output_of(capfd)
    assert "which is not on the Hub" in err and "--base_model" in err and "alignkit merge" in err
    assert hub.requests == []


def test_a_given_base_takes_the_place_of_the_local_one(
    hub: Hub, run: Path, assets: Path, run_script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert run_script("push_to_hub", "--directory", run, "--repo_id", REPO, "--base_model", "org/base") == 0
    out, _ = output_of(capfd)
    files = hub.repositories[REPO].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    card = files["README.md"].decode()
    assert "base_model: org/base" in card and 'Load it onto "org/base", a fine base model.' in card
    assert str(assets) not in "".join(map(str, files.values())) and "base_model:adapter" not in card
    assert "changed on the way" in out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_adapter_that_engines_leave_out_is_published_with_that_said(published_base: Path) -> None:
    file = published_base / "adapter_config.json"
    plain = plan_upload(published_base, REPO)
    assert not any("leave out" in note for note in plain.notes)
    config = json.loads(file.read_text()) | {"target_parameters": ["model.layers.0.mlp.gate.weight"]}
    file.write_text(json.dumps(config))
    upload = plan_upload(published_base, REPO)
    assert any("leave out" in note and "alignkit merge" in note for note in upload.notes)
    (card,) = [file for file in upload.files if file.path == "README.md"]
    assert b"## Serving" in card.read() and b"alignkit merge" in card.read()
    # A card that says so already, as a run writes it, is sent as it is.
    (published_base / "README.md").write_bytes(card.read())
    (again,) = [file for file in plan_upload(published_base, REPO).files if file.path == "README.md"]
    assert again.read().count(b"Engines that serve LoRA adapters") == 1


def test_dry_run_lists_everything_and_sends_nothing(
    hub: Hub,
    published_base: Path,
    run_script: Script,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert run_script("push_to_hub", "--directory", published_base, "--repo_id", REPO, "--dry_run") == 0
    out, _ = output_of(capfd)
    assert hub.requests == []
    upload = plan_upload(published_base, REPO)
    for file in upload.files:
        assert f"{file.path} " in out and f"{file.size:,}" in out
    assert f"{sum(len(file.read()) for file in upload.files):,}" in out
    assert 'library_name: "peft"' in out and 'base_model: "org/base"' in out
    assert {*STATE, *RECORDS, *FOREIGN, "checkpoint-2/complete.json"} == set(upload.left_out)
    assert all(name in out.split("stays here")[1] for name in upload.left_out)


def test_records_and_checkpoints_go_when_asked_for(published_base: Path) -> None:
    with_metrics = plan_upload(published_base, REPO, include_metrics=True)
    assert {file.path for file in with_metrics.files} >= set(RECORDS)
    everything = plan_upload(published_base, REPO, include_metrics=True, include_checkpoints=True)
    assert {file.path for file in everything.files} >= {*CHECKPOINT, "checkpoint-2/complete.json"}
    assert set(everything.left_out) == {*FOREIGN, "training_args.bin", "checkpoint-2/training_args.bin"}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "README.md", "chat_template.jinja"])
def test_no_link_out_of_the_directory_is_followed(
    name: str, hub: Hub, published_base: Path, tmp_path: Path, run_script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither a file that is a link nor one in a folder that is; a link within the directory is like any other file."""
    target = tmp_path / "id_rsa"
    target.write_bytes((published_base / name).read_bytes() if (published_base / name).exists() else b"key")
    (published_base / name).unlink(missing_ok=True)
    (published_base / name).symlink_to(target)
    assert run_script("push_to_hub", "--directory", published_base, "--repo_id", REPO) == 2
    assert f"{name} is a link out of the directory" in output_of(capfd)[1] and hub.requests == []
    (published_base / name).unlink()
    target.rename(published_base / "inside")
    (published_base / name).symlink_to("inside")
    assert name in {file.path for file in plan_upload(published_base, REPO).files}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "events.out.tfevents.1").write_bytes(b"elsewhere")
    (published_base / "runs" / "linked").symlink_to(tmp_path / "runs")
    assert not any("linked" in file.path for file in plan_upload(published_base, REPO, include_metrics=True).files)


def test_the_code_that_a_config_names_goes_and_no_other(assets: Path, tmp_path: Path) -> None:
    model = shutil.copytree(assets / "base", tmp_path / "model")
    (model / "README.md").write_text(CARD.format(base="org/base", library="transformers"))
    config = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling_my.MyModel"}}
    (model / "config.json").write_text(json.dumps(config))
    for name in ("modeling_my.py", "secrets.py"):
        (model / name).write_text("pass\n")
    upload = plan_upload(model, REPO)
    assert "modeling_my.py" in {file.path for file in upload.files} and "secrets.py" in upload.left_out


def test_an_upload_while_offline_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for is_adapter in (True, False):
        with pytest.raises(ProblemListError, match="HF_HUB_OFFLINE is set"):
            check_before_training(REPO, "org/base", is_adapter=is_adapter)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    check_before_training(REPO, "org/base", is_adapter=True)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/api/repos/create", 401, "does not accept the token of HF_TOKEN"),
        ("/api/repos/create", 403, f"may not write to {REPO} (403)"),
        ("/commit/main", 500, "failed (500), and nothing was committed"),
        ("/preupload/main", 400, f"refused the upload to {REPO} (400)"),
        ("/objects/batch", 403, f"may not write to {REPO} (403)"),
    ],
)
def test_a_refusal_is_one_message(
    path: str,
    status: int,
    message: str,
    hub: Hub,
    published_base: Path,
    run_script: Script,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hub.faults[path] = status
    assert run_script("push_to_hub", "--directory", published_base, "--repo_id", REPO) == 2
    _, err = output_of(capfd)
    assert message in err and err.count("error:") == 1 and "Traceback" not in err
    assert not any(repository.files for repository in hub.repositories.values())


def test_a_wrong_token_and_a_missing_one(
    hub: Hub,
    published_base: Path,
    run_script: Script,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN[::-1])
    assert run_script("push_to_hub", "--directory", published_base, "--repo_id", REPO) == 2
    _, err = output_of(capfd)
    assert "(401): it is mistyped, expired or revoked" in err and TOKEN[::-1] not in err
    hub.requests.clear()
    monkeypatch.setenv("HF_TOKEN", "")
    assert run_script("push_to_hub", "--directory", published_base, "--repo_id", REPO) == 2
    assert "HF_TOKEN is not set" in output_of(capfd)[1]
    assert hub.requests == []


def test_metadata_that_only_the_hub_can_judge(
    hub: Hub, published_base: Path, run_script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    card = published_base / "README.md"
    card.write_text(card.read_text().replace("license: mit", "license: not-a-licence"))
    assert run_script("push_to_hub", "--directory", published_base, "--repo_id", REPO) == 2
    assert '"license" must be one of' in output_of(capfd)[1]
    assert hub.storage == {}


def test_no_server(
    hub: Hub,
    published_base: Path,
    run_script: Script,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert run_script("push_to_hub", "--directory", published_base, "--repo_id", REPO) == 2
    assert "the upload to http://127.0.0.1:9 failed" in output_of(capfd)[1]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert run_script("push_to_hub", "--directory", published_base, "--repo_id", REPO) == 2
    assert "HF_HUB_OFFLINE is set" in output_of(capfd)[1]


def test_private_never_becomes_public(
    hub: Hub, published_base: Path, run_script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_script("push_to_hub", "--directory", published_base, "--repo_id", REPO, "--private") == 0
    assert hub.repositories[REPO].private
    hub.repositories["ada/open"] = Repository(private=False)
    assert run_script("push_to_hub", "--directory", published_base, "--repo_id", "ada/open", "--private") == 2
    assert "exists and is public, so nothing was sent" in output_of(capfd)[1]
    assert hub.repositories["ada/open"].files == {}


def test_a_token_in_a_file_stops_the_upload(
    hub: Hub, published_base: Path, run_script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    (published_base / "chat_template.jinja").write_text(f"export HF_TOKEN={TOKEN}")
    assert run_script("push_to_hub", "--directory", published_base, "--repo_id", REPO) == 2
    assert "chat_template.jinja contains the token" in output_of(capfd)[1]
    assert hub.requests == []


def break_weights(run: Path) -> None:
    weights = run / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def break_metadata(run: Path) -> None:
    (run / "README.md").write_text("---\nlibrary_name: [peft\n---\n")


def name_local_data(run: Path) -> None:
    card = (run / "README.md").read_text()
    wrong = card.replace("library_name: peft", "library_name: trl\ndatasets: [./rows.jsonl]\npipeline_tag: [text]")
    (run / "README.md").write_text(wrong)


@pytest.mark.parametrize(
    ("damage", "error", "expected"),
    [
        (break_weights, CheckpointError, ["cannot be read"]),
        (break_metadata, ProblemListError, ["the metadata of README.md is not valid"]),
        (lambda run: (run / "README.md").unlink(), ProblemListError, ["there is no README.md"]),
        (
            name_local_data,
            ProblemListError,
            ["3 problems", "write library_name: peft", "says datasets: ./rows.jsonl", "pipeline_tag"],
        ),
        (shutil.rmtree, ProblemListError, ["is no folder"]),
    ],
)
def test_what_cannot_be_published(
    damage: Callable[[Path], None], error: type[Exception], expected: list[str], published_base: Path
) -> None:
    damage(published_base)
    with pytest.raises(error) as raised:
        plan_upload(published_base, REPO)
    assert all(part in str(raised.value) for part in expected), str(raised.value)


def test_names_are_checked_first(published_base: Path) -> None:
    with pytest.raises(ProblemListError, match="2 problems") as raised:
        plan_upload(published_base, "a/b/c", base_model="org//base")
    assert "'a/b/c' is no Hub id" in str(raised.value) and "'org//base' is no Hub id" in str(raised.value)


def test_a_full_model(assets: Path, tmp_path: Path) -> None:
    model = shutil.copytree(assets / "base", tmp_path / "model")
    (model / "README.md").write_text(CARD.format(base="org/base", library="transformers"))
    upload = plan_upload(model, REPO)
    assert upload.kind == "model"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.path for file in upload.files}


def test_as_a_program(published_base: Path, launch: Callable[..., object]) -> None:
    """The same through the environment and a process of its own."""
    with Hub(TOKEN) as server:
        environment = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        words = ("--directory", published_base, "--repo_id", REPO)
        done = launch("scripts/push_to_hub.py", *words, **environment)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert "adapter_model.safetensors" in server.repositories[REPO].files
