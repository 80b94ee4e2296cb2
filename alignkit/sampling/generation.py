"""Sample answers: do they end, and do they repeat themselves?

A preference objective can raise every margin while the model turns into one that never stops or says the same words
again and again. Only generated text shows that.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import PartialState
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignkit.models.modes import evaluating
from alignkit.models.sharding import length_batches, map_batches
from alignkit.reports.bars import hidden_unless
from alignkit.reports.estimates import RowSums, row_sums

NGRAM = 4
NOT_ABOUT_WORDS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache",
    "cache_implementation", "cache_config", "compile_config", "disable_compile", "return_dict_in_generate",
    "output_scores", "output_logits", "output_attentions", "output_hidden_states", "max_length", "max_new_tokens",
}  # fmt: skip
"""Entries of a generation config that do not change which words come out, or that every caller sets."""


@dataclass(frozen=True)
class Sampling:
    """How answers are generated. Of the model's own generation config only the stop tokens are used.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 takes the likeliest token each time (greedy).
        top_p: Nucleus sampling, with a temperature above 0.
        seed: Seed of the draws; a batch draws the same whatever other batches there are.
        batch_size: Prompts at once.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 8


@dataclass(frozen=True)
class Sample:
    """One generated answer.

    Attributes:
        text: The answer without special tokens.
        num_tokens: Its tokens, the stop token not counted.
        finished: Whether it ended with a stop token rather than at ``max_new_tokens``.
        repetition: Share of its 4-grams of tokens that occurred earlier in it; 0 none, near 1 a loop.
    """

    text: str
    num_tokens: int
    finished: bool
    repetition: float


class Answer(NamedTuple):
    """The tokens of a generated answer.

    Attributes:
        ids: Its tokens, the stop token included.
        finished: Whether the last of them is a stop token.
    """

    ids: list[int]
    finished: bool

    def sample(self, tokenizer: PreTrainedTokenizerBase) -> Sample:
        """As text, without the stop token.

        Args:
            tokenizer: Decodes it.
        """
        ids = self.ids[:-1] if self.finished else self.ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return Sample(text, len(ids), self.finished, repetition(ids))


def generate_samples(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    state: PartialState,
    progress: str | None = None,
) -> list[Sample]:
    """Answer every prompt as text; arguments as for :func:`generate_answers`."""
    answers = generate_answers(model, tokenizer, prompts, sampling, state=state, progress=progress)
    return [answer.sample(tokenizer) for answer in answers]


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    state: PartialState,
    progress: str | None = None,
) -> list[Answer]:
    """Answer every prompt, on all processes together.

    Args:
        model: A causal language model with ``generate``, plain or PEFT, on the device of ``state``.
        tokenizer: Its EOS stops the answers, as do the stop tokens of the model's generation config.
        prompts: Token ids, rendered with the chat template and the generation prompt where there is one.
        sampling: How.
        state: This process among the others.
        progress: Title of the progress bar of the first process, or None for none.
    """
    stops = stop_token_ids(model, tokenizer)
    config = generation_config(sampling, stops, tokenizer)
    tell_unused_settings(model.generation_config, state)
    extra = forward_options(model)

    def answer(batches: list[list[int]]) -> list[Answer]:
        answers: list[Answer] = []
        for batch in tqdm(batches, desc=progress, **hidden_unless(progress is not None and state.is_main_process)):
            padded = left_padded([prompts[i] for i in batch], config.pad_token_id)
            inputs = {name: tensor.to(state.device) for name, tensor in padded.items()}
            # Each batch has a seed of its own: its draws do not depend on which process it falls to.
            torch.manual_seed(sampling.seed + batch[0])
            output = model.generate(**inputs, generation_config=config, **extra)
            answers += [_up_to_stop(ids, stops) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]
        return answers

    devices = [state.device] if state.device.type == "cuda" else []
    with torch.no_grad(), evaluating(model), own_settings_alone(model), torch.random.fork_rng(devices):
        return map_batches(length_batches([len(ids) for ids in prompts], sampling.batch_size), answer, state)


def stop_token_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: those of the generation config and the tokenizer's EOS.

    Args:
        model: A model with a generation config.
    """
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def repetition(token_ids: Sequence[int]) -> float:
    """Share of 4-grams that occurred earlier in the sequence (seq-rep-4 of arXiv 1908.04319); 0 for shorter ones.

    Args:
        token_ids: One answer.
    """
    ngrams = [tuple(token_ids[i : i + NGRAM]) for i in range(len(token_ids) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def generation_sums(samples: Iterable[Sample]) -> dict[str, RowSums]:
    """Share of finished answers, mean repetition and mean length, as sums over prompts.

    Args:
        samples: One answer a prompt.
    """
    columns = {
        "generation/finished": lambda sample: float(sample.finished),
        "generation/repetition": lambda sample: sample.repetition,
        "generation/tokens": lambda sample: float(sample.num_tokens),
    }
    answers = list(samples)
    return {name: row_sums([(value(sample), 1.0) for sample in answers]) for name, value in columns.items()}


def generation_config(sampling: Sampling, stops: list[int], tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """What ``generate`` is told; to be used inside :func:`own_settings_alone`.

    Args:
        sampling: How answers are generated.
        stops: Ids that end an answer.
        tokenizer: Its pad token fills what follows the end.
    """
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = stops[0] if stops else 0
    drawn = sampling.temperature > 0
    draws = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if drawn else {}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=drawn,
        eos_token_id=stops or None,
        pad_token_id=pad,
        **draws,
    )


@contextmanager
def own_settings_alone(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Inside, ``generate`` does what it is told and nothing else.

    It fills whatever it is not told from the generation config of the model: penalties, beams, forbidden words, stop
    strings. That config is empty inside, and the model's own again after.

    Args:
        model: A causal language model.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def tell_unused_settings(config: GenerationConfig, state: PartialState) -> None:
    """Say once what a model's generation config asks for and does not get.

    Args:
        config: The model's own.
        state: This process among the others.
    """
    own = config.to_diff_dict().items()
    asked = {name: value for name, value in own if name not in NOT_ABOUT_WORDS and not name.startswith("_")}
    if asked and state.is_main_process:
        shown = ", ".join(f"{name} {value}" for name, value in asked.items())
        _tell(f"note: the model's generation_config asks for {shown}; answers are drawn without, as the settings say.")


@functools.cache
def _tell(note: str) -> None:
    tqdm.write(note)


def forward_options(model: PreTrainedModel | PeftModel) -> dict[str, bool]:
    """What ``generate`` is to hand on to every forward pass of this model.

    A mixture of experts whose config asks for router logits computes its load-balancing loss from them, also while it
    generates. That fails where prompts are padded: from the second token on the mask is longer than the input.

    Args:
        model: A causal language model.
    """
    asks = model.config.get_text_config().to_dict().get("output_router_logits", False)
    return {"output_router_logits": False} if asks else {}


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` [B, T] of prompts that all end in the last column.

    Args:
        prompts: Token ids.
        pad_token_id: Fills the space before the shorter ones.
    """
    length = max(map(len, prompts))
    input_ids = torch.full((len(prompts), length), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, ids in enumerate(prompts):
        input_ids[row, length - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        attention_mask[row, length - len(ids) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _up_to_stop(ids: list[int], stops: list[int]) -> Answer:
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    return Answer(ids, False) if end is None else Answer(ids[: end + 1], True)
