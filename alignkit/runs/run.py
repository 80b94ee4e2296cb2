"""A run from top to bottom, one function a program."""

from __future__ import annotations

from typing import Any

from alignkit.runs import origin as origin_steps, results, steps, steps_preference, steps_sft
from alignkit.runs.preemption import StopRequest
from alignkit.config import LoadedConfig, PreferenceConfig, SFTConfig
from alignkit.config.check import flatten
from alignkit.config.keys import base_keys, option_keys
from alignkit.config.settings import DEFAULT
from alignkit.errors import Stopped
from alignkit.shapes._candidates import PreferenceTrainer
from alignkit.shapes._tokens import SupervisedTrainer
from alignkit.runs.ranks import Ranks, launched_with
from alignkit.runs.resumption import settled


def train_preference(config: PreferenceConfig | LoadedConfig) -> PreferenceTrainer:
    """Train on preferences as the configuration says.

    Args:
        config: A :class:`~alignkit.config.PreferenceConfig`, or a loaded one; see :func:`train_sft`.

    Returns:
        The trainer after training.

    Raises:
        AlignkitError: Config, data, model or directory cannot be used; the message says what to do.
    """
    return _train(config, steps_preference)


def train_sft(config: SFTConfig | LoadedConfig) -> SupervisedTrainer:
    """Train on supervised rows as the configuration says: check the data, load, train, evaluate, save and report.

    Called by every process of a launch. What the run leaves behind is in ``config.output_dir``.

    Args:
        config: A :class:`~alignkit.config.SFTConfig`, checked here, or what :func:`~alignkit.config.load_config`
            returned, which also knows where each value comes from.

    Returns:
        The trainer after training.

    Raises:
        AlignkitError: Config, data, model or directory cannot be used; the message says what to do.
    """
    return _train(config, steps_sft)


def _train(given: Any, own: Any) -> Any:
    """The run itself; ``own`` holds the steps of the program."""
    loaded = given if isinstance(given, LoadedConfig) else _from_python(given)
    resume = loaded.config.resume
    loaded = settled(loaded)
    config = loaded.config
    ranks = Ranks.join(config.ddp_timeout)
    ranks.compare("launched with", lambda: launched_with(loaded))
    with StopRequest().heard() as request:
        directory = steps.open_run_directory(loaded)
        failures = steps.failures_recorded(directory, resume=resume)
        with failures, ranks.losses_named(lambda status: directory.record(status=status)):
            ranks.connect(use_cpu=config.use_cpu)
            args = own.training_arguments(config)
            ranks.check_world_size(args.world_size)
            tokenizer = steps.load_tokenizer(config)
            data = own.prepare_data(config, args, tokenizer, directory)
            steps.check_length(config, args, data.train)
            rows = {"train": data.train, "held-out": data.evaluation}
            origin_steps.record_origin(config, tokenizer, rows, directory, ranks)
            trainer = own.build_trainer(config, args, tokenizer, data, directory)
            steps.stop_when_asked(trainer, request)
            try:
                steps.train(config, trainer, directory)
            finally:
                request.training = False
            if request.signal is not None:
                raise Stopped(request.signal)
            results.finish(loaded, trainer, data.prompts, directory)
    return trainer


def _from_python(config: steps.RunConfig) -> LoadedConfig:
    config.validate()
    keys = {**base_keys(config.program), **option_keys(config.method, config.gradient_rule)}
    values = flatten(config)
    unchanged = {name for name, key in keys.items() if not key.required and values[name] == key.default}
    return LoadedConfig(config, {name: DEFAULT if name in unchanged else "python" for name in values})
