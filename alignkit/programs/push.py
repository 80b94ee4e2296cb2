"""Publish an adapter or a model with its card on the Hugging Face Hub.

    alignkit push --directory runs/first --repo_id name/my-model --dry_run
    alignkit push --directory runs/first --repo_id name/my-model --private

--dry_run lists every file and the card's metadata, and sends nothing. Checkpoints, optimizer states and the records of
the run stay here unless asked for. The token is read from the environment variable HF_TOKEN: it is no option, so no
shell history keeps it, and it is never printed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from alignkit.programs.arguments import StrictParser

if TYPE_CHECKING:
    from alignkit.hub.upload import Upload


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Upload a folder to the Hub, or list what an upload would send."""
    arguments = command_line(prog).parse(words)

    # The Hugging Face libraries are imported here, once the command line is known to be right.
    from alignkit.hub.upload import plan_upload, push

    upload = plan_upload(
        arguments.directory,
        arguments.repo_id,
        base_model=arguments.base_model,
        include_metrics=arguments.include_metrics,
        include_checkpoints=arguments.include_checkpoints,
    )
    print(describe(upload))
    if arguments.dry_run:
        print("\ndry run: nothing was sent")
    else:
        url = push(upload, private=arguments.private, message=arguments.commit_message)
        print(f"\npublished: {url}")


def command_line(prog: str | None = None) -> StrictParser:
    """The options; ``prog`` as for :class:`~alignkit.programs.arguments.StrictParser`."""
    parser = StrictParser(*__doc__.split("\n\n", 1), prog=prog)
    parser.add_argument("--directory", required=True, help="a finished run, or a saved adapter or model")
    parser.add_argument("--repo_id", required=True, help="repository, such as name/my-model; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private; refuse a public one")
    parser.add_argument("--dry_run", action="store_true", help="list what would be sent, and send nothing")
    parser.add_argument("--base_model", help="Hub id of the base, where card or adapter config name a local folder")
    parser.add_argument("--include_metrics", action="store_true", help="send run.json, metrics and evaluations too")
    parser.add_argument("--include_checkpoints", action="store_true", help="send checkpoints and optimizer states too")
    parser.add_argument("--commit_message", default="Upload with alignkit")
    return parser


def describe(upload: Upload) -> str:
    """Files, total, the card's metadata, and what stays here."""
    from alignkit.reports.table import render_table

    files = [[file.path, f"{file.size:,}"] for file in upload.files]
    blocks = [
        f"{upload.kind} for {upload.repo_id}",
        render_table(["file", "bytes"], [*files, ["total", f"{upload.size:,}"]]),
        "\n  ".join(["card", *(f"{key}: {json.dumps(value)}" for key, value in upload.metadata.items())]),
    ]
    if upload.notes:
        blocks.append("\n  ".join(["changed on the way, or not checked", *upload.notes]))
    if upload.left_out:
        blocks.append("\n  ".join([f"stays here ({len(upload.left_out)} files)", *upload.left_out]))
    return "\n\n".join(blocks)
