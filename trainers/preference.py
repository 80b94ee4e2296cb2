"""Preference tuning: train a model on chosen against rejected responses with any method of the preference family.

    accelerate launch trainers/preference.py --config preference/flex_dpo --model Qwen/Qwen3-0.6B --data rows.jsonl
    accelerate launch --config_file configs/accelerate/zero2.yaml trainers/preference.py --config my_run.yaml

``--help`` lists every key; ``--print_config`` shows each value and where it comes from.
"""

import sys

from alignkit.config import parse_program_arguments
from alignkit.programs import run_program


def main() -> None:
    """One run, from the configuration to the model card."""
    loaded = parse_program_arguments("preference", sys.argv[1:])
    config = loaded.config

    # Torch and the Hugging Face libraries are imported here, once the configuration is known to be right.
    from alignkit import results, run

    directory = run.open_run_directory(loaded)
    with run.failures_recorded(directory):
        args = run.training_arguments(config)
        tokenizer = run.load_tokenizer(config)
        data = run.prepare_data(config, args, tokenizer, directory)
        trainer = run.build_trainer(config, args, tokenizer, data, directory)
        run.train(config, trainer, directory)
        results.finish(loaded, trainer, directory)


if __name__ == "__main__":
    run_program(main)
