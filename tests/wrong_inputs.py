"""Which tests hold the wrong inputs, by kind: the one list of them.

``scripts/docs.py`` counts their cases for docs/results/reliability.md. Each test asserts that its input is refused by
an error of ours, which a program prints as one message with exit status 2 (tests/contracts/test_programs.py); those
that run a whole program assert that too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.configs import (
    test_data_files,
    test_foreign_keys,
    test_gradient_rules,
    test_hostile,
    test_model_files,
    test_overrides,
    test_problems,
    test_refusals,
)
from tests.contracts import test_launch_variables
from tests.data import test_json_rows, test_load, test_schema
from tests.programs import test_bad_inputs, test_online_bad_inputs, test_sft_bad_inputs
from tests.scripts import (
    test_arguments,
    test_compare_runs,
    test_evaluate,
    test_evaluate_rows,
    test_push_to_hub,
    test_sample_candidates,
    test_token_rewards,
)

Test = Callable[..., None]

TESTS: Mapping[str, Sequence[Test]] = {
    "a key of the config: unknown, of another tool, of a wrong type, out of range": (
        test_problems.test_bad_line,
        test_foreign_keys.test_known_keys_are_looked_up,
        test_foreign_keys.test_methods_of_other_toolkits,
    ),
    "a number that no run and no machine has": (test_hostile.test_astronomic_numbers_are_refused_with_the_bound,),
    "keys that cannot go together, or would have no effect": (
        test_refusals.test_conflict_is_refused_and_its_way_out_works,
        test_refusals.test_ignored_keys_are_refused_and_the_way_out_works,
        test_gradient_rules.test_bad_values_are_refused,
    ),
    "a file that is no config": (test_problems.test_file_that_is_no_mapping,),
    "the command line": (
        test_overrides.test_refused,
        test_bad_inputs.test_a_bad_command_line,
        test_arguments.test_mistakes,
    ),
    "a folder that is no model or adapter, a package that is missing": (
        test_model_files.test_refused_model,
        test_model_files.test_refused_adapter,
        test_model_files.test_missing_package,
    ),
    "a data source: not there, of no known format, weighed wrongly": (
        test_data_files.test_place_without_data,
        test_data_files.test_bad_mixture,
        test_data_files.test_bad_column_map,
        test_load.test_sources_that_make_no_sense,
    ),
    "a data file: empty, malformed, without a column": (
        test_data_files.test_refused,
        test_json_rows.test_strict_json,
        test_load.test_unreadable_files,
        test_schema.test_missing_columns_are_named_with_the_nearest,
    ),
    "a row that cannot be trained on": (test_schema.test_bad_rows_are_fatal,),
    "a whole preference run": (test_bad_inputs.test_a_bad_config, test_bad_inputs.test_a_bad_run),
    "a whole supervised run": (test_sft_bad_inputs.test_a_bad_config, test_sft_bad_inputs.test_a_bad_run),
    "a whole online run": (
        test_online_bad_inputs.test_a_bad_config,
        test_online_bad_inputs.test_a_bad_run,
        test_online_bad_inputs.test_a_bad_reward,
    ),
    "evaluate, sample_candidates, token_rewards, compare_runs": (
        test_evaluate.test_what_cannot_be_evaluated,
        test_evaluate_rows.test_what_cannot_be_evaluated,
        test_sample_candidates.test_what_cannot_be_sampled,
        test_token_rewards.test_what_cannot_be_scored,
        test_compare_runs.test_unusable_runs,
    ),
    "an upload": (test_push_to_hub.test_a_refusal_is_one_message,),
    "the environment of a launch": (test_launch_variables.test_what_is_no_launch_is_refused,),
}


def cases(test: Any) -> int:
    """Inputs that a test tries: its longest parameter, as shorter ones are ways to give the same input."""
    tables = [mark.args[1] for mark in test.pytestmark if mark.name == "parametrize"]
    return max(len(list(table)) for table in tables)


def counts() -> dict[str, int]:
    """Number of wrong inputs by kind."""
    return {kind: sum(map(cases, tests)) for kind, tests in TESTS.items()}
