"""A run from top to bottom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, Trainer

from alignkit.config import LoadedConfig
from alignkit.config.base import ProgramConfig
from alignkit.config.check import flatten
from alignkit.config.keys import base_keys, option_keys
from alignkit.config.settings import DEFAULT
from alignkit.errors import Stopped
from alignkit.gradients._hook import chosen_rule
from alignkit.models.choices import Choice
from alignkit.parametrizations._policy import attach, load_policy, prepare
from alignkit.parts.method import Preparation, load_method
from alignkit.parts.shape import load_bridge, shapes_by_program
from alignkit.references.models import check_other
from alignkit.runs import checkpointing, origin, results, steps, token_budget
from alignkit.runs.arguments import check_length, fitted, training_arguments
from alignkit.runs.best import check_metric
from alignkit.runs.directory import RunDirectory
from alignkit.runs.preemption import StopRequest, StopWhenAsked
from alignkit.runs.ranks import Ranks, launched_with
from alignkit.runs.resumption import settled
from alignkit.runs.rows import PreparedData, load_tokenizer, prepare_rows
from alignkit.shapes._kernel_choice import take_kernels

if TYPE_CHECKING:
    from alignkit.shapes._candidates import PreferenceTrainer
    from alignkit.shapes._policy_trainer import OnlineTrainer
    from alignkit.shapes._routed import RoutedTrainer
    from alignkit.shapes._tokens import SupervisedTrainer
    from alignkit.shapes.candidates import PreferenceConfig
    from alignkit.shapes.policy import OnlineConfig
    from alignkit.shapes.routed import RouterConfig
    from alignkit.shapes.tokens import SupervisedConfig


def train_preference(config: PreferenceConfig | LoadedConfig) -> PreferenceTrainer:
    """Train on preferences as the configuration says.

    Args:
        config: A :class:`~alignkit.shapes.candidates.PreferenceConfig`, or a loaded one; see :func:`train`.

    Returns:
        The trainer after training.

    Raises:
        AlignkitError: Config, data, model or directory cannot be used; the message says what to do.
    """
    trainer: PreferenceTrainer = train(config)
    return trainer


def train_sft(config: SupervisedConfig | LoadedConfig) -> SupervisedTrainer:
    """Train on supervised rows as the configuration says.

    Args:
        config: A :class:`~alignkit.shapes.tokens.SupervisedConfig`, or a loaded one; see :func:`train`.

    Returns:
        The trainer after training.

    Raises:
        AlignkitError: Config, data, model or directory cannot be used; the message says what to do.
    """
    trainer: SupervisedTrainer = train(config)
    return trainer


def train_online(config: OnlineConfig | LoadedConfig) -> OnlineTrainer:
    """Train on completions that are drawn and rewarded while training, as the configuration says.

    Args:
        config: An :class:`~alignkit.shapes.policy.OnlineConfig`, or a loaded one; see :func:`train`.

    Returns:
        The trainer after training.

    Raises:
        AlignkitError: Config, data, model or directory cannot be used; the message says what to do.
    """
    trainer: OnlineTrainer = train(config)
    return trainer


def train_router(config: RouterConfig | LoadedConfig) -> RoutedTrainer:
    """Train on completions and on the routing of their prompts, as the configuration says.

    Args:
        config: A :class:`~alignkit.shapes.routed.RouterConfig`, or a loaded one; see :func:`train`.

    Returns:
        The trainer after training.

    Raises:
        AlignkitError: Config, data, model or directory cannot be used; the message says what to do.
    """
    trainer: RoutedTrainer = train(config)
    return trainer


def train(given: ProgramConfig | LoadedConfig) -> Any:
    """Train as the configuration says: check the data, load, train, evaluate, save and report.

    Called by every process of a launch. What the run leaves behind is in ``config.output_dir``.

    Args:
        given: The configuration of a program, checked here, or what :func:`~alignkit.config.load_config` returned,
            which also knows where each value comes from.

    Returns:
        The trainer after training.

    Raises:
        AlignkitError: Config, data, model or directory cannot be used; the message says what to do.
    """
    loaded = given if isinstance(given, LoadedConfig) else _from_python(given)
    resume = loaded.config.resume
    loaded = settled(loaded)
    config: Any = loaded.config
    shape = shapes_by_program()[config.program]
    bridge = load_bridge(shape)
    ranks = Ranks.join(config.ddp_timeout)
    ranks.compare("launched with", lambda: launched_with(loaded))
    with StopRequest().heard() as request:
        directory = steps.open_run_directory(loaded)
        failures = steps.failures_recorded(directory, resume=resume)
        with failures, ranks.losses_named(lambda status: directory.record(status=status)):
            ranks.connect(use_cpu=config.use_cpu)
            choices = steps.choices_before(directory, ranks, resume=bool(config.resume))
            config = fitted(config, choices)
            preparation = load_method(config.method).preparation(config)
            args = training_arguments(config, bridge, choices)
            preparation.check_launch()
            check_metric(config, {**bridge.METRICS, **load_method(config.method).metrics})
            ranks.check_world_size(args.world_size)
            tokenizer = load_tokenizer(config)
            others = bridge.other_models(config)
            for key, path in others.items():
                check_other(config, tokenizer, key, path)
            data = prepare_rows(config, args, tokenizer, bridge, preparation, directory)
            check_length(config, args, data.train, bridge)
            origin.record_origin(config, tokenizer, data, others, directory, ranks)
            trainer = _trainer(config, args, tokenizer, data, preparation, directory, choices)
            trainer.add_callback(StopWhenAsked(request))
            try:
                steps.train(config, trainer, directory)
            finally:
                request.training = False
            if request.signal is not None:
                raise Stopped(request.signal)
            results.finish(loaded, trainer, data.prompts, directory)
    return trainer


def _trainer(
    config: Any,
    args: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    preparation: Preparation,
    directory: RunDirectory,
    choices: dict[str, Choice],
) -> Trainer:
    """Load the models and put the trainer together with its callbacks; ``choices`` are those made so far."""
    plan = checkpointing.chosen(config, args, data, choices)
    bridge, policy = load_bridge(shapes_by_program()[config.program]), load_policy(config)
    trainer = bridge.build(
        config,
        args,
        policy,
        tokenizer,
        data,
        exchanges_rows=preparation.exchanges_rows,
        choices=choices,
        gradient_rule=chosen_rule(config.gradient_rule, config.gradient_options),
        peft_config=prepare(config, policy),
        callbacks=steps.run_callbacks(config, directory, data),
    )
    trainer.choices = choices | trainer.choices
    take_kernels(trainer, config.kernels, choices.get("kernels"))
    attach(config, trainer)
    checkpointing.confirm(trainer, plan, trainer.choices)
    token_budget.filled(trainer, plan)
    preparation.attach(trainer, tokenizer, data.source, directory)
    steps.introduce(config, trainer, directory, **bridge.describe(config, trainer))
    return trainer


def _from_python(config: ProgramConfig) -> LoadedConfig:
    config.validate()
    keys = {**base_keys(config.program), **option_keys(config.method, config.gradient_rule)}
    values = flatten(config)
    unchanged = {name for name in values if not keys[name].required and values[name] == keys[name].default}
    return LoadedConfig(config, {name: DEFAULT if name in unchanged else "python" for name in values})
