"""Checkpoints that can be trusted: reopened and verified after each save, marked complete, then rotated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit.errors import AlignkitError, CheckpointError
from alignkit.models.saved_weights import verify_weights, weight_files
from alignkit.runs.best import Ranking
from alignkit.runs.pickles import DEEPSPEED_TAG
from alignkit.storage import durability
from alignkit.storage.manifest import Manifest
from alignkit.storage.refusals import StorageError

SHARDED_MODELS = (DEEPSPEED_TAG, "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin")
"""What DeepSpeed and FSDP save beside, or in place of, consolidated weights."""
FSDP_OPTIMIZERS = ("optimizer_0", "optimizer.bin")


def verify_checkpoint(checkpoint: Path, world_size: int) -> None:
    """Check that a checkpoint holds sound weights and all that resuming needs.

    Args:
        checkpoint: A directory ``checkpoint-<step>``, written by all ranks.
        world_size: Number of ranks that wrote it.

    Raises:
        CheckpointError: Names the file, and the tensor, that is missing or unusable.
    """
    sharded = any((checkpoint / name).exists() for name in SHARDED_MODELS)
    if weight_files(checkpoint) or not sharded:
        verify_weights(checkpoint)
    ranks = [""] if world_size == 1 else [f"_{rank}" for rank in range(world_size)]
    needed = [f"rng_state{rank}.pth" for rank in ranks]
    if (checkpoint / DEEPSPEED_TAG).is_file():
        _verify_deepspeed(checkpoint, world_size)
    elif any((checkpoint / name).exists() for name in FSDP_OPTIMIZERS):
        needed += ["scheduler.pt"]
    else:
        needed += ["optimizer.pt", "scheduler.pt"]
    for name in needed:
        _check_present(checkpoint / name)
    _check_state(checkpoint)


def _verify_deepspeed(checkpoint: Path, world_size: int) -> None:
    engine = checkpoint / (checkpoint / DEEPSPEED_TAG).read_text(encoding="utf-8").strip()
    shards = list(engine.glob("*_optim_states.pt"))
    if len(shards) < world_size:
        raise CheckpointError(f"{engine} holds the optimizer states of {len(shards)} ranks out of {world_size}")
    models = list(engine.glob("*model_states.pt"))
    if not models:
        raise CheckpointError(f"{engine} holds no *model_states.pt")
    for path in [*shards, *models]:
        _check_present(path)


def _check_present(path: Path) -> None:
    if not path.is_file() or path.stat().st_size == 0:
        hint = " (save_only_model leaves it out)" if path.name == "optimizer.pt" else ""
        raise CheckpointError(f"{path} is missing or empty{hint}; the run could not be resumed from this checkpoint")


def _check_state(checkpoint: Path) -> None:
    path = checkpoint / "trainer_state.json"
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); the checkpoint cannot be resumed") from error
    if step != durability.checkpoint_step(checkpoint):
        raise CheckpointError(f"{path} is of step {step}; it does not belong to {checkpoint.name}")


class CheckpointGuard(TrainerCallback):
    """Announces, verifies, marks and rotates the checkpoints of a run.

    A checkpoint is listed in the run's manifest before it is written, when the trainer calls :meth:`announce`: what is
    not listed belongs to someone else and is never written into or deleted. After a save all ranks wait for each other;
    the first one verifies the checkpoint, writes ``complete.json`` as its last file and deletes what is no longer
    wanted. A kill at any instant leaves the last complete checkpoint usable. transformers' own rotation must be off
    (``save_total_limit=None`` in its arguments): it counts incomplete ones, and those of others.

    Args:
        save_total_limit: Number of complete checkpoints kept, the newest; None keeps all.
        check: Called on the first rank before each save; raises where the run is no longer alone in its directory.
        best: What evaluations are compared by. Every one that is better than all before is saved, and the checkpoint
            of the best is kept beside the newest; None is off.
    """

    def __init__(
        self,
        save_total_limit: int | None = None,
        check: Callable[[], None] | None = None,
        best: Ranking | None = None,
    ) -> None:
        if save_total_limit is not None and save_total_limit < 1:
            raise ValueError(f"save_total_limit must be at least 1 or None, not {save_total_limit}")
        self.save_total_limit, self.check, self.best = save_total_limit, check, best

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clear the way of the checkpoints to come: no save may be mixed with what a kill or someone else has left."""
        _on_main(lambda: _clear(Manifest(Path(args.output_dir)), state.global_step, state.max_steps))

    def announce(self, checkpoint: Path) -> None:
        """List a checkpoint before it is written; a collective.

        Args:
            checkpoint: The directory it will be.

        Raises:
            CheckpointError: It is there already, and not of this run.
        """
        _on_main(lambda: self._announce(checkpoint))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint of what has just proved the best."""
        found = self.best_evaluation(state)
        if found is not None and found["step"] == state.global_step:
            control.should_save = True

    def best_evaluation(self, state: TrainerState) -> dict[str, Any] | None:
        """See :meth:`~alignkit.runs.best.Ranking.best`; None where nothing is compared."""
        return None if self.best is None else self.best.best(state.log_history)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Finish the checkpoint of this step; if it is unusable, every rank raises :class:`CheckpointError`."""
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        PartialState().wait_for_everyone()
        found = self.best_evaluation(state)
        best = None if found is None else checkpoint.with_name(found["checkpoint"])
        _on_main(lambda: self._finish(checkpoint, args.world_size, best))

    def _announce(self, checkpoint: Path) -> None:
        if self.check is not None:
            self.check()
        manifest = Manifest(checkpoint.parent)
        if checkpoint.is_symlink() or (checkpoint.exists() and checkpoint not in manifest.checkpoints()):
            raise CheckpointError(
                f"{checkpoint} is there already and this run did not write it, so step {_step_of(checkpoint)} cannot "
                "be saved. Move it elsewhere and resume from the last checkpoint."
            )
        manifest.claim_checkpoint(checkpoint)

    def _finish(self, checkpoint: Path, world_size: int, best: Path | None) -> None:
        """Verify, mark and rotate."""
        try:
            verify_checkpoint(checkpoint, world_size)
            durability.mark_complete(checkpoint)
            manifest = Manifest(checkpoint.parent)
            manifest.complete(checkpoint)
            self._rotate(manifest, best)
        except (OSError, StorageError) as error:
            raise CheckpointError(f"{checkpoint} could not be finished: {error}") from error

    def _rotate(self, manifest: Manifest, best: Path | None) -> None:
        _delete_unfinished(manifest)
        complete = [path for path in manifest.checkpoints() if durability.is_complete(path)]
        if self.save_total_limit is not None:
            for checkpoint in complete[: -self.save_total_limit]:
                if checkpoint != best:
                    manifest.delete_checkpoint(checkpoint)


def _on_main(action: Callable[[], None]) -> None:
    """Do something on the first rank; where it fails, every rank raises :class:`CheckpointError`."""
    problem = None
    if PartialState().is_main_process:
        try:
            action()
        except AlignkitError as error:
            problem = str(error)
    # The others must not go on to a collective that the first rank will never join.
    (problem,) = broadcast_object_list([problem])
    if problem is not None:
        raise CheckpointError(problem)


def _delete_unfinished(manifest: Manifest) -> None:
    """Delete the run's checkpoints that were never complete."""
    for checkpoint in manifest.checkpoints():
        if not manifest.was_complete(checkpoint):
            manifest.delete_checkpoint(checkpoint)


def _clear(manifest: Manifest, step: int, max_steps: int) -> None:
    """Delete half-written checkpoints and move damaged ones aside; refuse those of others that are in the way."""
    _delete_unfinished(manifest)
    for checkpoint in manifest.checkpoints():
        if _step_of(checkpoint) > step:
            print(f"{checkpoint} cannot be resumed from and is kept as {manifest.move_aside(checkpoint)}")
    later = [path for path in durability.checkpoints(manifest.run) if step < _step_of(path) <= max_steps]
    if later:
        raise CheckpointError(
            f"{later[0]} is there already and this run did not write it, while it would save there at that step. Move "
            "it elsewhere, or write another output_dir."
        )


def _step_of(checkpoint: Path) -> int:
    return durability.checkpoint_order(checkpoint)[0]
