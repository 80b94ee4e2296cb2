"""Runs from Python: one call that trains, or an object that is prepared, trained and looked at step by step."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel

from alignkit.config import LoadedConfig, load_config
from alignkit.config.base import ProgramConfig
from alignkit.config.program import program_of
from alignkit.config.settings import KEYWORD
from alignkit.errors import ConfigError, ModelError, RunDirectoryError
from alignkit.references.choosing import AHEAD
from alignkit.references.choosing import KEY as REFERENCE
from alignkit.reports.metrics_log import read_metrics
from alignkit.runs.directory import RunDirectory
from alignkit.runs.in_memory import IN_MEMORY, in_memory_keys, kept_inputs
from alignkit.runs.live_plot import Picture, picture
from alignkit.runs.preemption import StopRequest
from alignkit.runs.results import metrics_of, summary
from alignkit.runs.rows import held_out_rows
from alignkit.runs.run import RunSteps, loaded_from
from alignkit.sampling.conversation import Conversation, base_and_tuned
from alignkit.sampling.generation import Sampling

Given = ProgramConfig | LoadedConfig | str | Path | None

_PREPARED: weakref.WeakValueDictionary[Path, Run]


class Run:
    """A run in hand: :func:`prepare` makes it, :meth:`train` trains it, and what came of it is looked at here.

    Attributes:
        config: Every value in force.
        sources: Where each of them comes from.
        directory: What the run leaves behind.
        trainer: TRL's trainer with the method's objective.
        tokenizer: The tokenizer.
    """

    def __init__(self, steps: RunSteps) -> None:
        self._steps = steps
        self.directory = Path(steps.config.output_dir)
        self.config, self.sources = steps.config, steps.loaded.sources
        self.trainer, self.tokenizer = steps.trainer, steps.tokenizer
        self._give_up: Any = None
        self._conversations: dict[str, Conversation] = {}

    @property
    def model(self) -> Any:
        """The model that is trained; with an adapter, PEFT's."""
        return self.trainer.model

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What was logged, a mapping for each line, as in ``metrics.jsonl``."""
        path = self._steps.directory.metrics_path
        return read_metrics(path) if path.is_file() else []

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint of the best evaluation where that was asked for, else the newest one; None without any."""
        best = self._steps.directory.sections().get("best")
        newest = self._steps.directory.last_complete_checkpoint()
        return newest if best is None else self.directory / best["checkpoint"]

    def train(self) -> Run:
        """Train, evaluate, save and report; a notebook shows the figure meanwhile.

        Returns:
            This run.

        Raises:
            RunDirectoryError: It has been trained, or closed.
        """
        if self._give_up is None or not self._give_up.detach():
            raise RunDirectoryError(
                f"{self.directory} has been trained, or closed. Prepare it again: with resume=True and a larger "
                "max_steps to go on, or with overwrite=True to begin anew."
            )
        with StopRequest().heard() as request, self._steps.recorded():
            self._steps.train(request)
            self._steps.finish()
        return self

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """Metrics of held-out rows with the model as it is now; nothing of it is recorded.

        Args:
            data: Other rows than those that the run holds out, as the key ``data`` takes them, or in memory.

        Raises:
            ConfigError: No rows are given, and none are held out.
            DataError: The rows cannot be used.
            ModelError: The reference that they are to be compared with is not there any more.
        """
        if data is None and self.trainer.eval_dataset is None:
            raise ConfigError("evaluate", ["no rows are held out. Write evaluate(rows), or prepare with eval_data."])
        rows = None if data is None else self._held_out(data)
        handler, history = self.trainer.callback_handler, self.trainer.state.log_history
        callbacks, logged = handler.callbacks, len(history)
        handler.callbacks = []
        try:
            return metrics_of(self.trainer.evaluate(rows))
        finally:
            handler.callbacks = callbacks
            del history[logged:]

    def _held_out(self, data: Any) -> Any:
        choice = self.trainer.choices.get(REFERENCE)
        has_gone = choice is not None and choice.value == AHEAD and not isinstance(self.model, PeftModel)
        if has_gone and self.trainer.state.global_step > 0:
            raise ModelError(
                "every row of the run was scored under the reference ahead of training, which has changed the weights "
                "since: other rows have none to be compared with. Prepare the run with reference='copy'."
            )
        kept, _ = kept_inputs({"data": data})
        steps = self._steps
        return held_out_rows(self.config, kept["data"], self.tokenizer, steps.bridge, steps.preparation)

    def plot(self) -> Picture:
        """The figure as far as the run has come; a notebook shows it."""
        return picture(self.config, self._steps.directory)

    def report(self) -> str:
        """What a finished run has come to, as its program prints it.

        Raises:
            RunDirectoryError: It has not finished.
        """
        if (status := self._status()) != "finished":
            raise RunDirectoryError(f"{self.directory} has not finished (status: {status}). Train it first.")
        return summary(self._steps.directory)

    def chat(self, text: str, *, base: bool = False, **sampling: Any) -> str:
        """The answer of the model as it is now; what was said before is part of the conversation.

        Args:
            text: A turn; or, where the tokenizer has no chat template, a text to continue.
            base: Ask the base in place of the model, which takes an adapter to tell them apart. It has a conversation
                of its own.
            **sampling: ``temperature`` (0 takes the likeliest token, as is done unless said otherwise), ``top_p``,
                ``max_new_tokens`` and ``seed``, see :class:`~alignkit.sampling.generation.Sampling`.

        Raises:
            ModelError: The model cannot answer this, or there is no base to ask.
        """
        if not self.model.can_generate():
            raise ModelError(f"{self.config.method} trains a model that gives scores and no answers")
        speakers = self._speakers()
        if base and "base" not in speakers:
            raise ModelError(f"{self.directory} trains every weight: the base is not there any more. Leave base out.")
        speaker = speakers["base" if base else next(reversed(speakers))]
        speaker.sampling = Sampling(**{"max_new_tokens": 256, **sampling})
        return speaker.answer(text)

    def new_chat(self, system: str | None = None) -> None:
        """Forget what was said in :meth:`chat`.

        Args:
            system: System message to begin with.

        Raises:
            ModelError: The chat template takes none.
        """
        for speaker in self._speakers().values():
            speaker.begin(system)

    def _speakers(self) -> dict[str, Conversation]:
        if not self._conversations:
            self._conversations = base_and_tuned(self.model, self.tokenizer, Sampling())
        return self._conversations

    def save(self, folder: str | Path) -> Path:
        """Write the model as it is now, or its adapter, with the tokenizer.

        Args:
            folder: Where to; must not exist.

        Raises:
            RunDirectoryError: It exists.
        """
        place = Path(folder)
        if place.exists():
            raise RunDirectoryError(f"{place} exists, and is not written over. Write a folder that does not exist yet.")
        self.trainer.save_model(str(place))
        return place

    def close(self) -> None:
        """Give up a run that was prepared and is not to be trained: its directory is free again."""
        if self._give_up is not None:
            self._give_up()

    def _status(self) -> str:
        return str(self._steps.directory.sections()["status"])

    def __repr__(self) -> str:
        return f"<Run of {self.config.method} on {self.config.model} in {self.directory}: {self._status()}>"


_PREPARED = weakref.WeakValueDictionary()
"""Runs of this process by directory: a cell that prepares one is often executed again."""


def _give_up(directory: RunDirectory) -> None:
    directory.record(status="stopped: not trained")
    directory.lock.release()


def prepare(config: Given = None, /, **keywords: Any) -> Run:
    """Check a configuration, look at its data and load its model, and train nothing yet.

    Args:
        config: As for :func:`train_preference`.
        **keywords: As for :func:`train_preference`; ``method`` tells which kind of run it is.

    Raises:
        AlignkitError: Config, data, model or directory cannot be used; the message says what to do.
    """
    recipe = str(config) if isinstance(config, (str, Path)) else None
    is_checked = isinstance(config, (ProgramConfig, LoadedConfig))
    program = "" if is_checked else program_of(recipe, [], keywords.get("method"))
    steps = RunSteps(_loaded(program, config, keywords))
    place = Path(steps.config.output_dir).absolute()
    if (earlier := _PREPARED.get(place)) is not None:
        earlier.close()
    with StopRequest().heard():
        steps.open()
        with steps.recorded(goes_on=True):
            steps.load()
    run = _PREPARED[place] = Run(steps)
    run._give_up = weakref.finalize(run, _give_up, steps.directory)
    return run


def train_preference(config: Given = None, /, **keywords: Any) -> Run:
    """Train on preferences.

    Args:
        config: A YAML file or the name of a shipped recipe; or a checked configuration: what
            :func:`~alignkit.config.load_config` returned, or a :class:`~alignkit.shapes.candidates.PreferenceConfig`.
        **keywords: Any key of a config file, which wins over the file. Besides, ``model`` may be a model in memory,
            ``tokenizer`` a tokenizer, and ``data`` and ``eval_data`` a ``datasets.Dataset`` or a list of rows. What
            is in memory is written to a cache, under its content, and stays as it is: the run trains its own copy.

    Returns:
        The run: its model, tokenizer, metrics, figure and directory.

    Raises:
        AlignkitError: Config, data, model or directory cannot be used; the message says what to do.
    """
    return _trained("preference", config, keywords)


def train_sft(config: Given = None, /, **keywords: Any) -> Run:
    """Train on supervised rows; arguments, result and errors are those of :func:`train_preference`."""
    return _trained("sft", config, keywords)


def train_online(config: Given = None, /, **keywords: Any) -> Run:
    """Train on completions that are drawn and rewarded while training; otherwise as :func:`train_preference`.

    ``rewards`` may be a function or a list with functions in it: each is written down with what it uses.
    """
    return _trained("online", config, keywords)


def train_router(config: Given = None, /, **keywords: Any) -> Run:
    """Train on completions and on the routing of their prompts; otherwise as :func:`train_preference`."""
    return _trained("router", config, keywords)


def train_reward(config: Given = None, /, **keywords: Any) -> Run:
    """Train a reward model; otherwise as :func:`train_preference`."""
    return _trained("reward", config, keywords)


def _trained(program: str, config: Given, keywords: Mapping[str, Any]) -> Run:
    steps = RunSteps(_loaded(program, config, keywords))
    steps.take_all()
    return Run(steps)


def _loaded(program: str, config: Given, keywords: Mapping[str, Any]) -> LoadedConfig:
    """The configuration of a call.

    Raises:
        ConfigError: Lists everything wrong with it.
    """
    if isinstance(config, (ProgramConfig, LoadedConfig)):
        if keywords:
            beside = f"`{next(iter(keywords))}` stands beside a configuration that is checked already"
            raise ConfigError("the configuration cannot work", [f"keyword: {beside}. Write it there."])
        return loaded_from(config)
    # Before anything is written to the cache, the rest must be right.
    load_config(program, config, keywords={**keywords, **in_memory_keys(keywords)}, check_files=False)
    kept, were_objects = kept_inputs(keywords)
    loaded = load_config(program, config, keywords=kept)
    told = dict.fromkeys(were_objects, f"{KEYWORD}, {IN_MEMORY}")
    return dataclasses.replace(loaded, sources={**loaded.sources, **told})
