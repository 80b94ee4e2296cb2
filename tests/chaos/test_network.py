"""No connection that was not asked for: every program on local paths alone, with the Hub not switched off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.programs.conftest import CONFIG, pairs, save_model, write_rows

SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
QUICK = ("--use_cpu", "--batch_size", "4")
RUN = {**CONFIG, "max_steps": 2, "save_steps": 1, "eval_data": "rows.csv", "num_samples": 1, "sample_max_new_tokens": 4}


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with rows in every format."""
    folder = tmp_path_factory.mktemp("network")
    save_model(folder / "model")
    write_rows(folder / "rows.jsonl", pairs(8))
    pd.DataFrame(pairs(8, seed=1)).to_csv(folder / "rows.csv", index=False)
    pd.DataFrame(pairs(8)).to_parquet(folder / "rows.parquet")
    for name, seed in (("texts", 0), ("held_out", 1)):
        write_rows(folder / f"{name}.jsonl", [{"text": row["prompt"] + row["chosen"]} for row in pairs(8, seed)])
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    (folder / "full.yaml").write_text(
        yaml.safe_dump(
            {**RUN, "parametrization": "full", "output_dir": "full", "data": "rows.parquet", "dtype": "float32"}
        )
    )
    own = {"method": "sft", "data": "texts.jsonl", "output_dir": "sft", "eval_data": "held_out.jsonl"}
    (folder / "sft.yaml").write_text(yaml.safe_dump({**RUN, **own}))
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in pairs(8)])
    online = {"model": "model", "method": "grpo", "data": "prompts.jsonl", "output_dir": "online", "max_steps": 2}
    online |= {"rewards": ["repetition"], "num_generations": 2, "max_completion_length": 4, "use_cpu": True}
    (folder / "online.yaml").write_text(yaml.safe_dump(online))
    save_model(folder / "mixture", num_experts=4)
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(8)]
    write_rows(folder / "routed.jsonl", rows)
    reward = {"model": "model", "method": "bradley_terry", "data": "rows.csv", "output_dir": "judge", "max_steps": 2}
    (folder / "reward.yaml").write_text(yaml.safe_dump({**reward, "use_cpu": True}))
    router = {"model": "mixture", "method": "roma", "data": "routed.jsonl", "output_dir": "router", "max_steps": 2}
    router |= {"bank_success": "all", "bank_dir": "bank", "use_cpu": True, "num_samples": 0}
    (folder / "router.yaml").write_text(yaml.safe_dump(router))
    reward = {"model": "model", "method": "bradley_terry", "data": "rows.parquet", "output_dir": "reward"}
    (folder / "reward.yaml").write_text(yaml.safe_dump({**reward, "max_steps": 2, "use_cpu": True}))
    return folder


def programs(repository: Path) -> list[list[str]]:
    """Every program with options under which it reads, trains, draws, merges and writes."""
    trainers, scripts = repository / "trainers", repository / "scripts"
    script = lambda name, *words: [name, str(scripts / f"{name}.py"), *words]  # noqa: E731
    adapter = ("--adapter", "run", "--data", "rows.parquet")
    return [
        ["preference", str(trainers / "preference.py"), "--config", "run.yaml"],
        ["full", str(trainers / "preference.py"), "--config", "full.yaml"],
        ["sft", str(trainers / "sft.py"), "--config", "sft.yaml"],
        ["online", str(trainers / "online.py"), "--config", "online.yaml"],
        ["reward", str(trainers / "reward.py"), "--config", "reward.yaml"],
        ["build_routing_bank", str(scripts / "build_routing_bank.py"), "router.yaml"],
        ["router", str(trainers / "router.py"), "--config", "router.yaml"],
        ["reward", str(trainers / "reward.py"), "--config", "reward.yaml"],
        ["resume", str(trainers / "preference.py"), "--config", "run.yaml", "--resume", "--max_steps", "3"],
        script("evaluate", *adapter, "--compare_base", "--max_new_tokens", "4", "--output", "eval.json", *QUICK),
        script("token_rewards", "--model", "model", "--data", "rows.csv", "--output", "r.jsonl", *QUICK),
        script(
            "sample_candidates", *adapter, "--max_new_tokens", "4", "--output", "s.jsonl", "--num_samples", "2", *QUICK
        ),
        script("merge_adapter", "--adapter", "run", "--output", "merged"),
        script(
            "export_pruned", "--model", "model", "--drop_layers", "1", "--criterion", "magnitude", "--output", "less"
        ),
        script("compare_runs", "run", "run"),
        script("push_to_hub", "--directory", "full", "--repo_id", "me/it", "--dry_run"),
        *([f"alignkit_{name}", "alignkit", name] for name in ("methods", "recipes", "env")),
        ["alignkit_config", "alignkit", "config", "run.yaml"],
        ["alignkit_data", "alignkit", "data", "rows.parquet", "--model", "model"],
    ]


SHORT = ("preference", "evaluate", "token_rewards", "alignkit_env")
"""What is tried in every test run: training, an adapter, data of every format."""


@pytest.mark.parametrize("names", [SHORT, pytest.param((), marks=pytest.mark.chaos)], ids=["short", "all"])
def test_no_program_opens_a_connection(names: tuple[str, ...], place: Path, repository: Path, tmp_path: Path) -> None:
    commands = [command for command in programs(repository) if not names or command[0] in names]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    helper, found = Path(__file__).with_name("guarded.py"), tmp_path / "found.json"
    subprocess.run(
        [sys.executable, str(helper), str(tmp_path / "commands.json"), str(found)],
        cwd=place,
        env=environment,
        check=True,
    )
    seen = json.loads(found.read_text())
    assert seen["imports"] == []
    for name, ended in seen["programs"].items():
        assert ended["status"] == 0, (name, ended["output"][-2000:])
        assert ended["attempts"] == [], (name, ended["attempts"])
    print(f"programs that opened no connection: {len(seen['programs'])} of {len(commands)}")


def test_no_program_is_left_out(repository: Path) -> None:
    tried = {Path(program).stem for _, program, *_ in programs(repository)}
    without = {
        "tutorials": "calls programs that are tried, with HF_HUB_OFFLINE",
        "docs": "writes tables into the pages of the checkout; imports no library of Hugging Face's network",
        "quickstart": "calls programs that are tried",
        "benchmark": "reads nothing; its processes run with HF_HUB_OFFLINE",
        "benchmark_worker": "is a process of benchmark",
        "benchmark_rows": "makes the rows of benchmark",
        "benchmark_cuda": "reads nothing but models it makes",
        "validate_memory": "reads nothing but models it makes",
        "benchmark_gradients": "reads nothing but a model it makes",
        "benchmark_token_rewards": "reads nothing but a model it makes",
        "benchmark_startup": "reads nothing but rows and a model it makes",
        "benchmark_online": "reads nothing but a model it makes",
        "benchmark_bank": "reads nothing but tensors it makes",
        "benchmark_router": "reads nothing but a model it makes",
        "benchmark_pruning_step": "reads nothing but a model it makes, or a folder of its user, offline",
        "benchmark_pruned": "reads nothing but a model it makes, or folders of its user, offline",
        "benchmark_rewards": "reads nothing; it imports no library of Hugging Face's network",
    }
    there = {path.stem for folder in ("scripts", "trainers") for path in (repository / folder).glob("*.py")}
    assert there == (tried & there) | without.keys()
