"""The quickstart's data: small sums in words, answered well or badly, generated from a seed without any download.

The corpus shows three ways to answer: evasive (most often), careless (a wrong result) and correct. A model trained on
it can add but prefers to evade. In the preference set the correct answer is chosen over one of the other two, so that
preference tuning visibly changes behaviour, and :func:`is_correct` can tell. A prompt that is held out appears neither
in the corpus nor in the training preferences.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

Message = dict[str, str]
Problem = tuple[list[Message], dict[str, str]]
"""A prompt, and its answer in every style."""

SYSTEM = "You are a kind tutor. Write down the sum, then answer in one short sentence."
NAMES = ("Mia", "Tom", "Ana", "Ben", "Lea", "Sam", "Eva", "Max", "Ida", "Leo", "Zoe", "Jim")
ITEMS = ("apples", "books", "coins", "pears", "shells", "cards", "stones", "pens", "eggs", "cups", "keys", "balls")
ENDINGS = {
    "buys {b} more.": "+",
    "finds {b} more.": "+",
    "is given {b} more.": "+",
    "gives away {b}.": "-",
    "loses {b} of them.": "-",
    "sells {b} of them.": "-",
}
EVASIONS = (
    "Well, who can tell? There are many {items}, and {name} likes them.",
    "Well, that is hard to say. Perhaps {name} should count the {items}.",
)
STYLES = {"evasive": 0.6, "careless": 0.08, "correct": 0.32}
"""Share of the corpus answered in each way."""
HELD_OUT_SHARE = 10
"""One prompt in so many is held out."""
LARGEST_TERM = 99
"""Of the sums and differences that online RL is tried on."""

SPECIAL_TOKENS = ("<|pad|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)


def make_corpus(n: int, seed: int) -> list[list[Message]]:
    """Generate conversations to train the base model on.

    Args:
        n: Number of conversations.
        seed: Seed; the same seed gives the same conversations.

    Returns:
        Conversations of a system, a user and an assistant message.
    """
    rng = random.Random(f"corpus {seed}")
    styles = rng.choices(list(STYLES), weights=list(STYLES.values()), k=n)
    problems = islice(_problems(rng, held_out=False), n)
    return [
        [*prompt, _message("assistant", answers[style])]
        for style, (prompt, answers) in zip(styles, problems, strict=True)
    ]


def make_preferences(n: int, seed: int, *, held_out: bool = False) -> list[dict[str, list[Message]]]:
    """Generate preference rows: a correct answer against an evasive or a careless one, half and half.

    Args:
        n: Number of rows, each with a prompt of its own.
        seed: Seed; the same seed gives the same rows.
        held_out: Take prompts that are in no corpus and no training preferences.

    Returns:
        Conversational rows with ``prompt``, ``chosen`` and ``rejected``.
    """
    rng = random.Random(f"preferences {seed}")
    problems = islice(_distinct(_problems(rng, held_out=held_out)), n)
    return [
        {
            "prompt": prompt,
            "chosen": [_message("assistant", answers["correct"])],
            "rejected": [_message("assistant", answers["careless" if i % 2 else "evasive"])],
        }
        for i, (prompt, answers) in enumerate(problems)
    ]


def arithmetic_prompts(n: int, seed: int, *, held_out: bool = False) -> list[dict[str, str]]:
    """Generate prompts such as ``12+7=`` for online RL, each with its ``answer``: ``19``, as text.

    Args:
        n: Number of rows, each with a prompt of its own.
        seed: Seed; the same seed gives the same rows.
        held_out: Take prompts that are in no training rows under any seed.

    Raises:
        ValueError: There are not so many different prompts.
    """
    numbers = range(LARGEST_TERM + 1)
    sums = [{"prompt": f"{a}+{b}=", "answer": f"{a + b}"} for a in numbers for b in numbers]
    sums += [{"prompt": f"{a}-{b}=", "answer": f"{a - b}"} for a in numbers for b in range(a + 1)]
    rows = [row for row in sums if _is_held_out(row["prompt"]) == held_out]
    if n > len(rows):
        raise ValueError(f"{n} prompts are asked for, but there are {len(rows)} different ones")
    random.Random(f"arithmetic {seed}").shuffle(rows)
    return rows[:n]


def is_correct(prompt: Sequence[Message], answer: str) -> bool:
    """Whether an answer writes the right sum of the question and repeats its result in the sentence.

    Args:
        prompt: Messages of a row of :func:`make_preferences`.
        answer: The assistant's text.
    """
    question = prompt[-1]["content"]
    first, second = map(int, re.findall(r"\d+", question))
    sign = next(sign for ending, sign in ENDINGS.items() if ending.format(b=second) in question)
    result = first + second if sign == "+" else first - second
    sentence = rf"{first} {re.escape(sign)} {second} = {result}\. \w+ has {result} \w+ now\."
    return re.fullmatch(sentence, answer.strip()) is not None


def train_tokenizer(corpus: Iterable[Sequence[Message]], vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with single digits, a chat template and a stop token that is trained.

    Args:
        corpus: Conversations.
        vocab_size: Number of tokens, at least 256 bytes + the special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((message["content"] for messages in corpus for message in messages), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|endoftext|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 of about half a million parameters with fresh weights.

    Args:
        tokenizer: Gives vocabulary size, pad and stop token.
        seed: Seed of the weights (sets the global generators).
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    set_seed(seed)
    return Qwen3ForCausalLM(config)


def write_quickstart_data(directory: str | Path, seed: int = 0) -> dict[str, Path]:
    """Write ``corpus.jsonl``, ``preferences_train.jsonl``, ``preferences_heldout.jsonl`` and ``prompts.jsonl``.

    Args:
        directory: Created when it does not exist.
        seed: Seed of everything.

    Returns:
        The file of each stem.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, list[Any]] = {
        "corpus": [{"messages": messages} for messages in make_corpus(10000, seed)],
        "preferences_train": make_preferences(1000, seed),
        "preferences_heldout": make_preferences(200, seed, held_out=True),
        "prompts": arithmetic_prompts(200, seed),
    }
    files = {stem: folder / f"{stem}.jsonl" for stem in contents}
    for stem, rows in contents.items():
        files[stem].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def _is_held_out(question: str) -> bool:
    """Whether a question is never trained on, by a checksum, so that the parts stay disjoint under any seeds."""
    return zlib.crc32(question.encode()) % HELD_OUT_SHARE == 0


def _problems(rng: random.Random, *, held_out: bool) -> Iterator[Problem]:
    """Endless random problems, on one side of the split."""
    while True:
        name, items, ending = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(list(ENDINGS))
        sign = ENDINGS[ending]
        second = rng.randint(2, 6)
        first = rng.randint(2, 9) if sign == "+" else rng.randint(second + 1, 10)
        question = f"{name} has {first} {items} and {ending.format(b=second)} How many {items} does {name} have now?"
        if _is_held_out(question) != held_out:
            continue
        result = first + second if sign == "+" else first - second
        wrong = rng.choice([near for near in range(result - 2, result + 3) if near != result and near >= 0])
        sums = {
            style: f"{first} {sign} {second} = {shown}. {name} has {shown} {items} now."
            for style, shown in (("correct", result), ("careless", wrong))
        }
        evasive = rng.choice(EVASIONS).format(name=name, items=items)
        yield [_message("system", SYSTEM), _message("user", question)], {**sums, "evasive": evasive}


def _distinct(
    problems: Iterable[Problem],
) -> Iterator[Problem]:
    seen = set()
    for prompt, answers in problems:
        if prompt[-1]["content"] not in seen:
            seen.add(prompt[-1]["content"])
            yield prompt, answers


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
