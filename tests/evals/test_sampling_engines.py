"""Draws that follow the distribution, and samples that depend on nothing but their own prompt and seed."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, TopPLogitsWarper

from alignkit.errors import ModelError
from alignkit.evals import sharding
from alignkit.evals.sampling_engines import (
    Drawing,
    HuggingFaceEngine,
    Request,
    VllmEngine,
    draw_tokens,
    sample_of,
)
from alignkit.parametrizations.files import read_adapter
from alignkit.parametrizations.loading import ModelSource
from tests.scripts.tiny import byte_tokenizer, save_adapter, save_model, tiny_model

DRAWING = Drawing(max_new_tokens=12, temperature=0.9, top_p=0.95, seed=3, max_sequences=4)
TEXTS = ["Hello", "What is 2 + 2? Tell me slowly.", "x", "Once upon a time", "Hi"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A model that ends some of its answers."""
    model = tiny_model(seed=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[1] *= 2.5
    return model


@pytest.fixture(scope="module")
def requests(tokenizer: PreTrainedTokenizerBase) -> list[Request]:
    ids = tokenizer(TEXTS)["input_ids"]
    return [Request(row, candidate, 0, ids[row]) for row in range(len(TEXTS)) for candidate in range(2)]


def grid(count: int) -> torch.Tensor:
    """u in the middle of ``count`` equal intervals."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(("top_p", "kept"), [(1.0, 4), (0.9, 3), (0.8, 2), (0.1, 1)])
def test_each_token_is_drawn_as_often_as_it_is_likely(temperature: float, top_p: float, kept: int) -> None:
    """On an even grid of u the counts are the probabilities; at temperature 1 they are .1, .3, .55, .05."""
    probabilities = [0.1, 0.3, 0.55, 0.05]
    weights = [p ** (1 / temperature) for p in probabilities]
    if temperature == 1:
        order = sorted(range(4), key=lambda i: -probabilities[i])
        weights = [w if i in order[:kept] else 0.0 for i, w in enumerate(weights)]
    else:
        scores = torch.tensor([probabilities]).log()
        allowed = (
            TopPLogitsWarper(top_p)(None, scores / temperature).isfinite()[0].tolist() if top_p < 1 else [True] * 4
        )
        weights = [w if ok else 0.0 for w, ok in zip(weights, allowed, strict=True)]
    scores = torch.tensor(probabilities).log().expand(10_000, 4)
    drawn = draw_tokens(scores, grid(10_000), temperature, top_p)
    expected = [10_000 * w / math.fsum(weights) for w in weights]
    assert torch.bincount(drawn, minlength=4).tolist() == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_ends_of_the_unit_interval(top_p: float) -> None:
    scores = torch.tensor([[-math.inf, 0.0, -math.inf, -0.1, -math.inf]]).expand(2, 5)
    u = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert draw_tokens(scores, u, 1.0, top_p).tolist() == [1, 3]


def test_a_broken_model_is_named() -> None:
    for top_p in (1.0, 0.5):
        with pytest.raises(ModelError, match="NaN or infinite"):
            draw_tokens(torch.tensor([[0.0, math.nan]]), grid(1), 1.0, top_p)


def by_hand(model: PreTrainedModel, request: Request, drawing: Drawing) -> tuple[list[int], bool]:
    """One sample without padding, cache, batch or generate, by inversion with Python sums."""
    numbers = np.random.default_rng(np.random.SeedSequence([drawing.seed, request.row, request.candidate, 0]))
    ids = list(request.prompt_ids)
    for u in numbers.random(drawing.max_new_tokens):
        with torch.no_grad():
            logits = (model(input_ids=torch.tensor([ids])).logits[0, -1].double() / drawing.temperature).tolist()
        largest = max(logits)
        weights = [math.exp(x - largest) for x in logits]
        order = sorted(range(len(weights)), key=lambda i: -weights[i])
        sums = list(itertools.accumulate(weights[i] / math.fsum(weights) for i in order))
        nucleus = next(i for i, mass in enumerate(sums) if mass >= drawing.top_p)
        token = next(order[i] for i in range(nucleus + 1) if sums[i] > u * sums[nucleus])
        if token == 1:
            return ids[len(request.prompt_ids) :], True
        ids.append(token)
    return ids[len(request.prompt_ids) :], False


def test_samples_are_those_of_each_prompt_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: list[Request]
) -> None:
    expected = [by_hand(model, request, DRAWING) for request in requests]
    assert {finished for _, finished in expected} == {True, False}
    for size in (1, 4, 10):
        engine = HuggingFaceEngine(model, tokenizer, replace(DRAWING, max_sequences=size), PartialState())
        found = engine(requests)
        assert [(s.num_tokens, s.finished) for s in found] == [(len(ids), finished) for ids, finished in expected]
        for sample, request, (ids, _) in zip(found, requests, expected, strict=True):
            plain = tokenizer.decode([*request.prompt_ids, *ids], skip_special_tokens=True)
            assert sample.text == plain[len(TEXTS[request.row]) :]


def test_every_request_has_numbers_of_its_own(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: list[Request]
) -> None:
    engine = HuggingFaceEngine(model, tokenizer, DRAWING, PartialState())
    ids = requests[0].prompt_ids
    varied = [Request(0, 0, 0, ids), Request(1, 0, 0, ids), Request(0, 1, 0, ids), Request(0, 0, 1, ids)]
    texts = [sample.text for sample in engine(varied)]
    assert len(set(texts)) == 4
    assert [sample.text for sample in engine(varied[::-1])] == texts[::-1]
    other = HuggingFaceEngine(model, tokenizer, replace(DRAWING, seed=4), PartialState())
    assert other(varied[:1])[0].text != texts[0]
    greedy = HuggingFaceEngine(model, tokenizer, replace(DRAWING, temperature=0.0), PartialState())
    assert len({sample.text for sample in greedy(varied)}) == 1


def test_any_number_of_processes_generates_the_same_and_equally_often(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three batches on two processes: the second has one of them, and generates once more for the others' sake."""
    whole = HuggingFaceEngine(model, tokenizer, DRAWING, PartialState())(requests)
    parts: list[Any] = []
    monkeypatch.setattr(sharding, "gather_object", lambda local: parts.extend(local) or [(i, None) for i in range(10)])
    for rank in range(2):
        state = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0)
        engine = HuggingFaceEngine(model, tokenizer, DRAWING, state)
        calls: list[int] = []
        generate = engine._generate
        monkeypatch.setattr(engine, "_generate", lambda batch, g=generate, c=calls: c.append(len(batch)) or g(batch))
        engine(requests)
        assert len(calls) == 2
    assert [sample for _, sample in sorted(parts, key=lambda part: part[0])] == whole


def test_a_sample_keeps_its_leading_space() -> None:
    """Tokenizers of the sentencepiece family drop the space of the first word they decode."""
    backend = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokenizer.decode([1]) == "two"
    sample = sample_of([0], [1, 1, 2, 1], [2], tokenizer)
    assert (sample.text, sample.num_tokens, sample.finished) == (" two two", 2, True)
    assert sample_of([0], [1], [2], tokenizer).finished is False


def test_what_vllm_is_asked(tokenizer: PreTrainedTokenizerBase, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for vLLM: only our side of the call is tested."""
    seen: dict[str, Any] = {}

    class LLM:
        def __init__(self, **options: Any) -> None:
            seen["options"] = options

        def generate(self, prompts: Sequence[Any], params: Sequence[Any], **options: Any) -> list[Any]:
            seen.update(prompts=prompts, params=params, call=options)
            answers = [SimpleNamespace(token_ids=(70, 71), finish_reason=reason) for reason in ("stop", "length")]
            return [SimpleNamespace(outputs=[answer]) for answer in answers]

    vllm, request = ModuleType("vllm"), ModuleType("vllm.lora.request")
    vars(vllm).update(LLM=LLM, SamplingParams=lambda **options: options)
    vars(request).update(LoRARequest=lambda *words: words)
    for name, module in (("vllm", vllm), ("vllm.lora", ModuleType("vllm.lora")), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, module)
    base = save_model(tmp_path / "base")
    adapter = read_adapter(save_adapter(base, tmp_path / "adapter"))
    engine = VllmEngine(ModelSource(str(base), dtype="auto"), adapter, tokenizer, DRAWING)
    samples = engine([Request(0, 0, 0, [9, 8]), Request(0, 1, 0, [9, 8])])
    assert [(sample.num_tokens, sample.finished) for sample in samples] == [(2, True), (2, False)]
    assert seen["options"]["model"] == str(base) and seen["options"]["max_lora_rank"] == 4
    assert seen["prompts"] == [{"prompt_token_ids": [9, 8]}] * 2
    assert seen["call"]["lora_request"] == ("adapter", 1, str(tmp_path / "adapter"))
    first, second = seen["params"]
    assert first.pop("seed") != second.pop("seed") and first == second
    assert first == {"temperature": 0.9, "top_p": 0.95, "max_tokens": 12, "stop_token_ids": [1]}
