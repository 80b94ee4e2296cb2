"""A preference run from top to bottom."""

from __future__ import annotations

from alignkit import results, steps
from alignkit.config import LoadedConfig, PreferenceConfig
from alignkit.config.check import flatten
from alignkit.config.keys import base_keys, method_keys
from alignkit.config.settings import DEFAULT
from alignkit.data_steps import prepare_data
from alignkit.methods._preference import PreferenceTrainer


def train_preference(config: PreferenceConfig | LoadedConfig) -> PreferenceTrainer:
    """Train as the configuration says: check the data, load the model, train, evaluate, save and report.

    Called by every process of a launch. What the run leaves behind is in ``config.output_dir``.

    Args:
        config: A :class:`~alignkit.config.PreferenceConfig`, checked here, or what
            :func:`~alignkit.config.load_config` returned, which also knows where each value comes from.

    Returns:
        The trainer after training.

    Raises:
        AlignkitError: Config, data, model or directory cannot be used; the message says what to do.
    """
    loaded = config if isinstance(config, LoadedConfig) else _from_python(config)
    config = loaded.config
    directory = steps.open_run_directory(loaded)
    with steps.failures_recorded(directory):
        args = steps.training_arguments(config)
        tokenizer = steps.load_tokenizer(config)
        data = prepare_data(config, args, tokenizer, directory)
        trainer = steps.build_trainer(config, args, tokenizer, data, directory)
        steps.train(config, trainer, directory)
        results.finish(loaded, trainer, directory)
    return trainer


def _from_python(config: PreferenceConfig) -> LoadedConfig:
    config.validate()
    keys = {**base_keys(config.program), **method_keys(config.method)}
    values = flatten(config)
    unchanged = {name for name, key in keys.items() if not key.required and values[name] == key.default}
    return LoadedConfig(config, {name: DEFAULT if name in unchanged else "python" for name in values})
