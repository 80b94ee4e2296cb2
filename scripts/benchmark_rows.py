"""Rows that scripts/benchmark.py trains on: random words of given lengths, or GSM8K as it is."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

VOCABULARY = 2048
SHARED = Path(os.environ.get("ALIGNKIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
GSM_TINY = SHARED / "models" / "gsm-tiny"
GSM8K = SHARED / "data" / "gsm8k"
SOURCES = ("words", "gsm8k", "gsm8k_sft")


def pairs_of_words(count: int, prompt: tuple[int, int], completion: tuple[int, int], k: int) -> list[dict[str, Any]]:
    """Rows of random words, exact in length: a completion gets its EOS from the tokenisation.

    Args:
        count: How many.
        prompt: Fewest and most words of a prompt.
        completion: Of a completion, its EOS counted.
        k: Candidates a row.
    """
    draw = random.Random(0)

    def words(number: int) -> str:
        return " ".join(f"w{draw.randrange(2, VOCABULARY)}" for _ in range(number))

    scores = [1.0] * (k - 1) + [0.0]
    return [
        {
            "prompt": words(draw.randint(*prompt)),
            "completions": [" " + words(draw.randint(*completion) - 1) for _ in range(k)],
            "scores": scores,
        }
        for _ in range(count)
    ]


def gsm8k_pairs(count: int, tokenizer: Any) -> list[dict[str, Any]]:
    """The first questions that models solved both rightly and wrongly, with the first solution of either kind."""
    rows: list[dict[str, Any]] = []
    for line in (GSM8K / "example_model_solutions.jsonl").open(encoding="utf-8"):
        question = json.loads(line)
        solutions = [value for value in question.values() if isinstance(value, dict)]
        right = [each["solution"] for each in solutions if each["is_correct"]]
        wrong = [each["solution"] for each in solutions if not each["is_correct"]]
        if right and wrong and len(rows) < count:
            asked = [{"role": "user", "content": question["question"]}]
            prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            rows.append({"prompt": prompt, "completions": [right[0], wrong[0]], "scores": [1.0, 0.0]})
    return rows


def gsm8k_examples(count: int, tokenizer: Any) -> list[dict[str, Any]]:
    """The first training questions with their answers, which are trained: token ids and labels."""
    rows = []
    for line in (GSM8K / "train.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        prompt = tokenizer(row["question"] + "\n")["input_ids"]
        answer = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        if len(rows) == count:
            break
    return rows


def word_tokenizer() -> Any:
    """One token a word."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tokenizer_of(source: str) -> Any:
    """The tokenizer that fits a source of rows."""
    return word_tokenizer() if source == "words" else AutoTokenizer.from_pretrained(GSM_TINY)


def save_model(directory: str, width: int, layers: int) -> None:
    """A random Qwen3 of the size asked for; both sides load it."""
    heads = max(width // 32, 2)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 32) * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
