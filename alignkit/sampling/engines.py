"""Where samples come from: ``generate`` of Hugging Face on every process, or vLLM in one.

An engine is a function from requests to samples. Each request has random numbers of its own, made from (seed, row,
candidate, attempt): its answer does not depend on the other requests, the number of processes or K. Only the rounding
of the logits depends on the padding of the batch; the caller therefore fixes the batches too.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import ModelError
from alignkit.models.files import ADAPTER_CONFIG, AdapterFiles
from alignkit.models.loading import ModelSource, generation_stop_ids, saved_generation_config
from alignkit.models.modes import evaluating
from alignkit.models.sharding import length_batches, map_batches
from alignkit.sampling.generation import (
    Sample,
    Sampling,
    forward_options,
    generation_config,
    left_padded,
    own_settings_alone,
    repetition,
    stop_token_ids,
    tell_unused_settings,
)


@dataclass(frozen=True)
class Request:
    """One sample asked for.

    Attributes:
        row: Number of the row.
        candidate: Which of its samples, from 0.
        attempt: 0, or how many samples of this candidate were discarded before.
        prompt_ids: What is continued.
    """

    row: int
    candidate: int
    attempt: int
    prompt_ids: Sequence[int]

    def seeds(self, seed: int) -> np.random.SeedSequence:
        """The source of all randomness of this request."""
        return np.random.SeedSequence([seed, self.row, self.candidate, self.attempt])


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn.

    Attributes:
        max_new_tokens: Longest sample.
        temperature: 0 takes the likeliest token each time.
        top_p: Nucleus sampling; 1 draws from the model's own distribution.
        seed: Seed of the draws.
        max_sequences: Sequences generated at once.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    max_sequences: int


Engine = Callable[[Sequence[Request]], list[Sample]]
"""Called by all processes with the same requests; gives all of them all samples, in the order of the requests."""


def draw_tokens(scores: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token a row, by inversion of the cumulative distribution: the first token whose cumulative mass exceeds u.

    Args:
        scores: Logits [B, V].
        uniforms: u, one number of [0, 1) a row [B], float64.
        temperature: Divides the logits; above 0.
        top_p: Only the smallest set of likeliest tokens whose mass reaches this is drawn from.

    Returns:
        Token ids [B].

    Raises:
        ModelError: The logits are NaN.
    """
    probabilities = (scores.float() / temperature).softmax(-1).double()
    if top_p < 1:
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    if not bool(cumulative[:, -1].isfinite().all()):
        raise ModelError(
            "the model gives logits that are NaN or infinite. Its weights are broken, or overflow in this precision: "
            "try --dtype float32."
        )
    if top_p == 1:
        last = cumulative.shape[-1] - 1
        mass = cumulative[:, -1:]
        return torch.searchsorted(cumulative, uniforms[:, None] * mass, right=True).clamp(max=last).squeeze(1)
    last = (cumulative < top_p).sum(-1, keepdim=True).clamp(max=cumulative.shape[-1] - 1)
    mass = cumulative.gather(1, last)
    place = torch.searchsorted(cumulative, uniforms[:, None] * mass, right=True)
    return order.gather(1, torch.minimum(place, last)).squeeze(1)


class DrawnToken(LogitsProcessor):
    """Leaves only the token that a row's own random numbers choose, so that greedy search takes it.

    ``generate`` draws all rows of a batch from one generator; a row would then depend on its neighbours.

    Args:
        uniforms: [B, max_new_tokens], float64.
        prompt_length: Columns of the padded prompts.
        drawing: Temperature and top_p.
    """

    def __init__(self, uniforms: Tensor, prompt_length: int, drawing: Drawing) -> None:
        self.uniforms, self.prompt_length, self.drawing = uniforms, prompt_length, drawing

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Minus infinity everywhere but at the drawn token."""
        step = input_ids.shape[1] - self.prompt_length
        tokens = draw_tokens(scores, self.uniforms[:, step], self.drawing.temperature, self.drawing.top_p)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


class HuggingFaceEngine:
    """``generate`` over batches by length, longest first, shared out among the processes.

    Args:
        model: A causal language model, plain or PEFT, on its device.
        drawing: How samples are drawn.
        state: This process among the others.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        drawing: Drawing,
        state: PartialState,
    ) -> None:
        self.model, self.tokenizer, self.drawing, self.state = model, tokenizer, drawing, state
        self.stops = stop_token_ids(model, tokenizer)
        tell_unused_settings(model.generation_config, state)
        self.config = generation_config(Sampling(max_new_tokens=drawing.max_new_tokens), self.stops, tokenizer)

    def __call__(self, requests: Sequence[Request]) -> list[Sample]:
        """Samples of all requests, on every process."""
        batches = length_batches([len(request.prompt_ids) for request in requests], self.drawing.max_sequences)

        def work(mine: list[list[int]]) -> list[Sample]:
            samples = [s for batch in mine for s in self._generate([requests[i] for i in batch])]
            # Sharded weights are gathered by all processes together, so all must generate equally often.
            if len(mine) * self.state.num_processes < len(batches):
                self._generate([requests[i] for i in batches[-1]])
            return samples

        with torch.no_grad(), evaluating(self.model), own_settings_alone(self.model):
            return map_batches(batches, work, self.state)

    def _generate(self, requests: list[Request]) -> list[Sample]:
        inputs = left_padded([request.prompt_ids for request in requests], self.config.pad_token_id)
        start = inputs["input_ids"].shape[1]
        device = self.model.device
        processors = LogitsProcessorList()
        if self.drawing.temperature > 0:
            drawn = [
                np.random.default_rng(request.seeds(self.drawing.seed)).random(self.drawing.max_new_tokens)
                for request in requests
            ]
            processors.append(DrawnToken(torch.tensor(np.stack(drawn), device=device), start, self.drawing))
        output = self.model.generate(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            generation_config=self.config,
            logits_processor=processors,
            **forward_options(self.model),
        )
        return [
            sample_of(request.prompt_ids, ids, self.stops, self.tokenizer)
            for request, ids in zip(requests, output[:, start:].tolist(), strict=True)
        ]


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as max_lora_rank


class VllmEngine:
    """vLLM's offline ``LLM.generate``, which batches by itself; in one process.

    **Never run**: there is no vLLM where this is developed. Every name and argument was read against vLLM's source of
    2026: ``entrypoints/llm.py`` at commit 10fdb8f, ``entrypoints/offline_utils.py`` at 904f21b, ``sampling_params.py``
    at 00388f6, ``outputs.py`` at 003d3ee, ``config/lora.py`` at 01230b4. The tests have a stand-in as strict as those.

    Args:
        source: The model. vLLM's ``auto`` dtype runs float32 weights in half precision.
        adapter: A LoRA adapter, or None.
        drawing: How samples are drawn.

    Raises:
        ModelError: vLLM cannot run the adapter as it is.
    """

    def __init__(
        self,
        source: ModelSource,
        adapter: AdapterFiles | None,
        tokenizer: PreTrainedTokenizerBase,
        drawing: Drawing,
    ) -> None:
        # Not a dependency: vLLM holds torch to one exact version.
        vllm: Any = importlib.import_module("vllm")
        options: dict[str, Any] = {
            "model": source.model,
            "revision": source.revision,
            "tokenizer": tokenizer.name_or_path,
            "dtype": source.dtype,
            "trust_remote_code": source.trust_remote_code,
            "generation_config": "vllm",
        }
        self.lora = None
        if adapter is not None:
            options |= {"enable_lora": True, "max_lora_rank": vllm_lora_rank(adapter)}
            self.lora = importlib.import_module("vllm.lora.request").LoRARequest("adapter", 1, str(adapter.directory))
        self.tokenizer, self.drawing, self.params = tokenizer, drawing, vllm.SamplingParams
        self.stops = sorted({*generation_stop_ids(source.model, source.revision), tokenizer.eos_token_id} - {None})
        tell_unused_settings(saved_generation_config(source.model, source.revision), PartialState())
        self.llm = vllm.LLM(**options)

    def __call__(self, requests: Sequence[Request]) -> list[Sample]:
        """Samples of all requests."""
        drawing = self.drawing
        how = {"temperature": drawing.temperature, "top_p": drawing.top_p, "max_tokens": drawing.max_new_tokens}
        params = [
            self.params(**how, seed=int(request.seeds(drawing.seed).generate_state(1)[0]), stop_token_ids=self.stops)
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False, lora_request=self.lora)
        samples = []
        for request, answer in zip(requests, (output.outputs[0] for output in outputs), strict=True):
            if answer.finish_reason not in ("stop", "length"):
                raise ModelError(f"vLLM broke off a sample ({answer.finish_reason}). Repeat the call to continue.")
            # The stop token is the last of token_ids already; a second one changes nothing.
            ended = self.stops[:1] if answer.finish_reason == "stop" else []
            samples.append(sample_of(request.prompt_ids, [*answer.token_ids, *ended], self.stops, self.tokenizer))
        return samples


def vllm_lora_rank(adapter: AdapterFiles) -> int:
    """The smallest ``max_lora_rank`` of vLLM that holds ``adapter``.

    Raises:
        ModelError: It has what vLLM refuses (modules saved whole, DoRA, biases) or passes over (ranks by module).
    """
    config = json.loads((adapter.directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    found = [key for key in ("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern") if config.get(key)]
    found += ["bias"] if config.get("bias", "none") != "none" else []
    ranks = [rank for rank in VLLM_RANKS if rank >= config.get("r", VLLM_RANKS[-1] + 1)]
    if found or not ranks:
        why = ", ".join(found) or f"{adapter.kind} of rank {config.get('r')}, where LoRA up to {VLLM_RANKS[-1]} works"
        advice = "Write --engine hf, or merge the adapter first (alignkit merge)."
        raise ModelError(f"vLLM cannot run the adapter {str(adapter.directory)!r}: {why}. {advice}")
    return ranks[0]


def sample_of(
    prompt_ids: Sequence[int], token_ids: Sequence[int], stops: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Sample:
    """What was said, up to the first stop token.

    Decoded behind the prompt: some tokenizers lose a leading space where a text begins.

    Args:
        prompt_ids: What was continued.
        token_ids: What followed.
        stops: Ids that end an answer.
        tokenizer: Decodes it.
    """
    end = next((i for i, token in enumerate(token_ids) if token in stops), None)
    answer = list(token_ids[:end])
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = tokenizer.decode(prompt_ids, **plain), tokenizer.decode([*prompt_ids, *answer], **plain)
    text = whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(answer, **plain)
    return Sample(text, len(answer), end is not None, repetition(answer))
