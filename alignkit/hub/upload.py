"""Publish an adapter or a model with its card: everything that can be checked is checked before anything is sent.

The usual ways to get this wrong are a card that names a folder of this machine as base model, an adapter whose config
does, and a commit with gigabytes of optimizer states, or with what happened to lie in the folder. So
the upload is planned first: :func:`plan_upload` reads the directory and lists each file, or every reason why not;
:func:`push` sends exactly that, in one commit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

import alignkit
from alignkit.errors import AlignkitError, ProblemListError
from alignkit.hub.allowed import allowed_files, leads_out
from alignkit.hub.card import Kind, id_fault, no_base, prepare_card
from alignkit.models.files import ADAPTER_CONFIG, MODEL_CONFIG
from alignkit.models.saved_weights import verify_weights
from alignkit.reports.card import hub_id

SECRET_SEARCH_BYTES = 4 * 2**20


class HubError(AlignkitError):
    """The Hub cannot be reached, or refuses."""


@dataclass(frozen=True)
class UploadFile:
    """One file of an upload.

    Attributes:
        path: Path in the repository.
        content: The file here, or the bytes sent in its place.
    """

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    def read(self) -> bytes:
        """The bytes sent."""
        return self.content.read_bytes() if isinstance(self.content, Path) else self.content


@dataclass(frozen=True)
class Upload:
    """What will be sent.

    Attributes:
        repo_id: Where to.
        kind: ``adapter`` or ``model``.
        files: Every file.
        metadata: Metadata of the card as sent.
        left_out: Files of the directory that stay here.
        notes: What is sent otherwise than it lies here, and why; what could not be checked.
    """

    repo_id: str
    kind: Kind
    files: tuple[UploadFile, ...]
    metadata: dict[str, Any]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes altogether."""
        return sum(file.size for file in self.files)


def plan_upload(
    directory: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    include_metrics: bool = False,
    include_checkpoints: bool = False,
) -> Upload:
    """Check a directory and list what would be sent; nothing is sent and no token is needed.

    Args:
        directory: Adapter or model with its card: a run directory, or what ``alignkit merge`` wrote.
        repo_id: Repository such as ``name/my-model``.
        base_model: Hub id of the base, for a card or adapter config that names a folder of this machine; it takes that
            folder's place in the copies sent.
        include_metrics: Send the records of the run too.
        include_checkpoints: Send checkpoints and optimizer states too.

    Raises:
        ProblemListError: The directory cannot be published as it is; every reason, with the way out.
        CheckpointError: Its weights are missing, truncated, empty or not finite.
    """
    root = Path(directory).expanduser()
    named = {"repo_id": repo_id, "base_model": base_model}
    problems = [f"{key}: {fault}" for key, name in named.items() if name is not None and (fault := id_fault(name))]
    kind = _kind(root)
    if kind is None:
        lacking = f"holds neither {ADAPTER_CONFIG} nor {MODEL_CONFIG}" if root.is_dir() else "is no folder"
        problems.append(f"it {lacking}; give a finished run or a saved model")
        raise ProblemListError(f"{root} cannot be published", problems)
    names = allowed_files(root, kind, include_metrics=include_metrics, include_checkpoints=include_checkpoints)
    advice = "is a link out of the directory, and none is followed: put the file in its place, or remove the link"
    problems += [f"{name} {advice}" for name in names if leads_out(root, name)]
    if problems:
        raise ProblemListError(f"{root} cannot be published", problems)
    card = prepare_card(root, kind, base_model)
    problems += card.problems
    if problems:
        raise ProblemListError(f"{root} cannot be published", problems)
    verify_weights(root)
    there = (path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if not path.is_dir())
    left_out = tuple(name for name in there if name not in names)
    files = tuple(UploadFile(name, card.replacements.get(name, root / name)) for name in names)
    return Upload(repo_id, kind, files, card.metadata, left_out, tuple(card.notes))


def push(upload: Upload, *, private: bool = False, message: str = "Upload with alignkit") -> str:
    """Create the repository where needed and send everything in one commit.

    Args:
        upload: What :func:`plan_upload` returned.
        private: Make a new repository private; an existing public one is refused.
        message: Commit message.

    Returns:
        Address of the commit.

    Raises:
        HubError: No token, no connection, or the Hub refuses; nothing was committed.
    """
    token = require_token()
    _refuse_secrets(upload, token)
    api = HfApi(token=token, library_name="alignkit", library_version=alignkit.__version__)
    operations = [CommitOperationAdd(file.path, file.content) for file in upload.files]
    try:
        repo_id = api.create_repo(upload.repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            advice = "make it private in its settings, or leave --private out"
            raise HubError(f"{repo_id} exists and is public, so nothing was sent: {advice}")
        return api.create_commit(repo_id, operations, commit_message=message).commit_url
    except HfHubHTTPError as error:
        raise HubError(_explain(error, upload.repo_id, api.endpoint).replace(token, "***")) from error
    except OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be sent. Unset it and try again.") from error
    except (HTTPError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HubError(f"the upload to {api.endpoint} failed: {reason}".replace(token, "***")) from error


def require_token() -> str:
    """The token of the environment variable HF_TOKEN; call it before a long training that ends in a push.

    Raises:
        HubError: It is not set.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise HubError(
            "HF_TOKEN is not set. Make a token with write access at https://huggingface.co/settings/tokens and put it "
            "into the environment: export HF_TOKEN=..."
        )
    return token


def check_before_training(repo_id: str, base_model: str, *, is_adapter: bool) -> None:
    """Find out before a training, not after it, that its result could not be published.

    Args:
        repo_id: Where to.
        base_model: The model trained, as the user wrote it.
        is_adapter: Whether an adapter is trained.

    Raises:
        ProblemListError: There is no token, the Hub is switched off, the repository's name is no Hub id, or the base of
            an adapter is not on the Hub.
    """
    problems = [f"hub_model_id: {fault}"] if (fault := id_fault(repo_id)) else []
    try:
        require_token()
    except HubError as error:
        problems.append(str(error))
    if constants.HF_HUB_OFFLINE:
        advice = "unset it, or write push_to_hub: false and publish later with alignkit push"
        problems.append(f"HF_HUB_OFFLINE is set, so nothing can be sent: {advice}")
    if is_adapter and hub_id(base_model) is None:
        problems.append(no_base(base_model, option="model"))
    if problems:
        raise ProblemListError("the result of this training could not be published", problems)


def _kind(root: Path) -> Kind | None:
    if (root / ADAPTER_CONFIG).is_file():
        return "adapter"
    return "model" if (root / MODEL_CONFIG).is_file() else None


def _refuse_secrets(upload: Upload, token: str) -> None:
    """A token that some log has caught must not be published."""
    for file in upload.files:
        if file.size <= SECRET_SEARCH_BYTES and token.encode() in file.read():
            raise HubError(f"{file.path} contains the token of HF_TOKEN, so nothing was sent. Remove it there.")


def _explain(error: HfHubHTTPError, repo_id: str, endpoint: str) -> str:
    status = error.response.status_code
    if status == 401:
        return (
            f"the Hub ({endpoint}) does not accept the token of HF_TOKEN (401): it is mistyped, expired or revoked. "
            "Make one with write access at https://huggingface.co/settings/tokens"
        )
    if status == 403:
        return f"the token of HF_TOKEN may not write to {repo_id} (403): give it write access, or take your own name"
    if status >= 500:
        return f"the Hub ({endpoint}) failed ({status}), and nothing was committed to {repo_id}. Try again later."
    said = error.server_message or " ".join(str(error).split())
    return f"the Hub ({endpoint}) refused the upload to {repo_id} ({status}): {said}"
