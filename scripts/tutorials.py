"""The first commands of the tutorials of TRL, LLaMA-Factory and axolotl, translated and run.

    python scripts/tutorials.py              translate and run them all (make tutorials), some minutes on a CPU
    python scripts/tutorials.py --list       show each command with what it is here

What trains there is given to `alignkit translate`, and what that makes is trained; other commands stand beside what
they are here. Models and data sets of the Hub are replaced by a tiny model and by rows in the form of the data set.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError
from alignkit.programs.entry import run_program
from alignkit.yaml_text import dump_yaml

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = "tiny"
QUICK = {"max_steps": 2, "max_length": 64, "use_cpu": True, "max_truncated_fraction": 1}
"""What every run is told besides, to take seconds."""
ALPACA = {"instruction": "Name a colour.", "input": "", "output": "Blue is one."}
CHAT = {"messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue is one."}]}
QUESTION = [{"role": "user", "content": "Name a colour."}]
PAIR = {
    "chosen": [*QUESTION, {"role": "assistant", "content": "Blue is one."}],
    "rejected": [*QUESTION, {"role": "assistant", "content": "No."}],
    "score_chosen": 8.0,
    "score_rejected": 2.0,
}
MARKED = {"prompt": QUESTION, "completion": [{"role": "assistant", "content": "Blue is one."}], "label": True}
SHAREGPT = {"conversations": [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue is one."}]}
SHAREGPT_PAIR = {
    "conversations": [{"from": "human", "value": "Name a colour."}],
    "chosen": {"from": "gpt", "value": "Blue is one."},
    "rejected": {"from": "gpt", "value": "No."},
}
SUM = {"prompt": [{"role": "user", "content": "What is 2 + 3?"}], "answer": "#### 5"}


@dataclass(frozen=True)
class Tutorial:
    """One command of a tutorial.

    Attributes:
        theirs: The command.
        ours: What it is here; empty where `alignkit translate` says it.
        config: The YAML file that the command names, as keys.
        row: A row of the data set, in the form that the Hub has it in.
        keys: What a run must be told besides, of which theirs has another default or none.
    """

    theirs: str
    ours: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    row: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tool(self) -> str:
        """Whose command it is."""
        names = {"trl": "TRL", "accelerate": "TRL", "llamafactory-cli": "LLaMA-Factory", "axolotl": "axolotl"}
        return names[self.theirs.split()[0]]

    @property
    def shown(self) -> str:
        """What to type here."""
        return self.ours or f"alignkit translate {self.theirs} > run.yaml; alignkit train run.yaml"


_TRL = "--model_name_or_path tiny --dataset_name rows.jsonl --output_dir out"
_FACTORY: Mapping[str, Any] = {
    "model_name_or_path": MODEL,
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "dataset": "rows.jsonl",
    "template": "default",
    "cutoff_len": 64,
    "max_samples": 1000,
    "overwrite_cache": True,
    "preprocessing_num_workers": 1,
    "output_dir": "out",
    "logging_steps": 1,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1.0e-4,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "resume_from_checkpoint": None,
}
_AXOLOTL: Mapping[str, Any] = {
    "base_model": MODEL,
    "load_in_8bit": False,
    "load_in_4bit": False,
    "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
    "dataset_prepared_path": "last_run_prepared",
    "val_set_size": 0.1,
    "output_dir": "out",
    "adapter": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "sequence_len": 64,
    "sample_packing": True,
    "gradient_accumulation_steps": 2,
    "micro_batch_size": 2,
    "optimizer": "adamw_torch",
    "lr_scheduler": "cosine",
    "learning_rate": 0.0002,
    "train_on_inputs": False,
    "bf16": False,
    "tf32": False,
    "gradient_checkpointing": True,
    "logging_steps": 1,
    "warmup_steps": 1,
    "saves_per_epoch": 1,
    "weight_decay": 0.0,
}
TUTORIALS = (
    Tutorial(f"trl sft {_TRL}", row=CHAT),
    Tutorial(f"trl sft {_TRL} --use_peft --lora_r 8 --packing", row=CHAT),
    Tutorial(f"trl dpo {_TRL}", row=PAIR),
    Tutorial(f"trl dpo {_TRL} --loss_type sigmoid sft --loss_weights 1.0 0.2 --use_peft", row=PAIR),
    Tutorial(f"trl kto {_TRL}", row=MARKED),
    Tutorial(f"trl reward {_TRL}", row=PAIR),
    Tutorial(
        f"trl grpo {_TRL} --reward_funcs accuracy_reward --num_generations 4 --max_completion_length 8",
        row=SUM,
        keys={"max_length": None, "max_truncated_fraction": None},
    ),
    Tutorial(
        "trl dpo --config theirs.yaml",
        config={
            "model_name_or_path": MODEL,
            "dataset_name": "rows.jsonl",
            "output_dir": "out",
            "beta": 0.2,
            "learning_rate": 5.0e-7,
            "rl": "dpo",
        },
        row=PAIR,
    ),
    Tutorial("trl env", ours="alignkit env"),
    Tutorial("trl vllm-serve --model out", ours="alignkit serve out --engine transformers --dry_run"),
    Tutorial("llamafactory-cli train theirs.yaml", config={**_FACTORY, "stage": "sft"}, row=ALPACA),
    Tutorial("llamafactory-cli chat inference.yaml", ours="alignkit chat out --max_new_tokens 4 --use_cpu"),
    Tutorial("llamafactory-cli export merge.yaml", ours="alignkit merge --adapter out --output merged"),
    Tutorial(
        "llamafactory-cli train theirs.yaml",
        config={**_FACTORY, "stage": "dpo", "pref_beta": 0.1, "pref_loss": "sigmoid"},
        row=SHAREGPT_PAIR,
    ),
    Tutorial(
        "llamafactory-cli train theirs.yaml",
        config={**_FACTORY, "stage": "dpo", "pref_beta": 0.1, "pref_loss": "orpo"},
        row=SHAREGPT_PAIR,
    ),
    Tutorial("llamafactory-cli train theirs.yaml", config={**_FACTORY, "stage": "kto", "pref_beta": 0.1}, row=MARKED),
    Tutorial("llamafactory-cli train theirs.yaml", config={**_FACTORY, "stage": "rm"}, row=SHAREGPT_PAIR),
    Tutorial(
        "llamafactory-cli train theirs.yaml",
        config={**_FACTORY, "stage": "sft", "quantization_bit": 4, "quantization_method": "bnb"},
        row=SHAREGPT,
    ),
    Tutorial("llamafactory-cli api inference.yaml", ours="alignkit serve out --engine transformers --dry_run"),
    Tutorial("llamafactory-cli env", ours="alignkit env"),
    Tutorial("axolotl fetch examples", ours="alignkit recipes"),
    Tutorial("axolotl config-schema", ours="alignkit config --schema"),
    Tutorial("axolotl preprocess theirs.yml", ours="alignkit data rows.jsonl --model tiny", row=ALPACA),
    Tutorial("axolotl train theirs.yml", config=_AXOLOTL, row=ALPACA),
    Tutorial(
        "axolotl inference theirs.yml --lora-model-dir=out", ours="alignkit chat out --max_new_tokens 4 --use_cpu"
    ),
    Tutorial("axolotl evaluate theirs.yml", ours="alignkit evaluate --adapter out --data rows.jsonl --num_samples 0"),
    Tutorial("axolotl merge-lora theirs.yml", ours="alignkit merge --adapter out --output merged"),
    Tutorial(
        "axolotl train theirs.yml",
        config={**_AXOLOTL, "adapter": "qlora", "load_in_4bit": True, "datasets": [{"path": "rows.jsonl"}]},
        row=SHAREGPT,
    ),
    Tutorial(
        "axolotl train theirs.yml",
        config={**_AXOLOTL, "rl": "dpo", "sample_packing": False, "datasets": [{"path": "rows.jsonl"}]},
        row=PAIR,
    ),
    Tutorial(
        "axolotl train theirs.yml",
        config={**_AXOLOTL, "rl": "kto", "sample_packing": False, "datasets": [{"path": "rows.jsonl"}]},
        row=MARKED,
    ),
)


def main() -> int:
    """Run them all, and say which did not come to their end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the commands alone")
    parser.add_argument("--only", type=int, nargs="+", default=range(len(TUTORIALS)), metavar="N", help="run these")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{n:2}  {one.theirs}\n    {one.shown}" for n, one in enumerate(TUTORIALS)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_model(folder / MODEL)
        failed = [n for n in options.only if not try_one(n, TUTORIALS[n], folder)]
    print(f"{len(options.only) - len(failed)} of {len(options.only)} ran")
    return 1 if failed else 0


def try_one(number: int, one: Tutorial, folder: Path) -> bool:
    """Run one command in the folder of all; what follows a training finds its output there."""
    start = time.perf_counter()
    try:
        commands = prepare(one, folder)
    except AlignkitError as error:
        print(f"{number:2}  NOT TRANSLATED  {one.theirs}\n{error}")
        return False
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    for command in commands:
        words = [sys.executable, "-m", *shlex.split(command)]
        ended = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, input="Hello\n")
        if ended.returncode:
            print(f"{number:2}  FAILED  {one.theirs}\n    {command}\n{ended.stdout[-800:]}{ended.stderr[-3000:]}")
            return False
    print(f"{number:2}  ran in {time.perf_counter() - start:3.0f} s  {one.theirs}", flush=True)
    return True


def prepare(one: Tutorial, folder: Path) -> list[str]:
    """Write the files that a command names, and return what to run here."""
    if one.row:
        marked = [{"label": number % 2 == 0} if "label" in one.row else {} for number in range(24)]
        rows = [json.dumps(one.row | label) for label in marked]
        # What differs in the text keeps rows from being repeated.
        texts = [
            row.replace("a colour", f"colour {n}").replace("Blue is", f"Blue {n} is") for n, row in enumerate(rows)
        ]
        (folder / "rows.jsonl").write_text("\n".join(texts) + "\n")
    if one.ours:
        shutil.rmtree(folder / "merged", ignore_errors=True)
        return [one.ours]
    words = shlex.split(one.theirs)
    for place, word in enumerate(words):
        if word in ("theirs.yaml", "theirs.yml"):
            words[place] = str(folder / word)
            (folder / word).write_text(dump_yaml(dict(one.config)))
    text = translation(words)
    (folder / "run.yaml").write_text(text)
    changes = {**QUICK, "overwrite": True, **one.keys}
    told = " ".join(f"--{key} {shlex.quote(dump_yaml(value, one_line=True))}" for key, value in changes.items())
    return [f"alignkit train run.yaml {told}"]


def translation(words: Sequence[str]) -> str:
    """What `alignkit translate` makes of a command; refused where something is left to do."""
    from alignkit.programs.translate import _entries, translated

    text = translated(_entries(words))
    if "# to do:" in text:
        raise AlignkitError(text)
    return text


def save_tiny_model(folder: Path) -> None:
    """A chat model of two layers over single characters, with a template."""
    import string

    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = ["<pad>", "<eos>", "<unk>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %} "
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(words)}
    Qwen3ForCausalLM(Qwen3Config(**size, **heads, pad_token_id=0, eos_token_id=1)).save_pretrained(folder)


if __name__ == "__main__":
    run_program(main)
