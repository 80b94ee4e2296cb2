"""Draws that follow the distribution, and samples that depend on nothing but their own prompt and seed."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, TopPLogitsWarper

from alignkit.errors import ModelError
from alignkit.models import sharding
from alignkit.models.files import read_adapter
from alignkit.models.loading import ModelSource
from alignkit.sampling.engines import (
    Drawing,
    HuggingFaceEngine,
    Request,
    VllmEngine,
    draw_tokens,
    sample_of,
    vllm_lora_rank,
)
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


VLLM_OPTIONS = frozenset(
    "runner convert tokenizer tokenizer_mode skip_tokenizer_init trust_remote_code tensor_parallel_size dtype revision "
    "quantization tokenizer_revision seed gpu_memory_utilization enforce_eager hf_overrides max_model_len enable_lora "
    "generation_config max_loras max_lora_rank max_cpu_loras lora_dtype".split()
)
"""Keyword arguments of ``LLM`` and, through it, of ``EngineArgs`` that somebody might want here."""
SAMPLING_FIELDS = (
    "n presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p seed stop stop_token_ids "
    "ignore_eos max_tokens min_tokens logprobs prompt_logprobs detokenize skip_special_tokens"
)
SamplingParams = make_dataclass("SamplingParams", [(name, Any, None) for name in SAMPLING_FIELDS.split()])


@dataclass(frozen=True)
class LoRARequest:
    """As in vLLM: an id from 1, and a path."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False

    def __post_init__(self) -> None:
        assert self.lora_int_id >= 1 and self.lora_path


class StandIn:
    """A vLLM that checks what it is asked as strictly as the real one (an unknown keyword is a TypeError).

    An answer ends with its stop token where it stopped.
    """

    def __init__(self, reasons: Sequence[str] = ("stop", "length")) -> None:
        seen = self.seen = SimpleNamespace()

        class LLM:
            def __init__(self, model: str, **options: Any) -> None:
                if unknown := options.keys() - VLLM_OPTIONS:
                    raise TypeError(f"EngineArgs got an unexpected keyword argument {unknown.pop()!r}")
                assert options.get("max_lora_rank", 16) in (1, 8, 16, 32, 64, 128, 256, 320, 512)
                assert options["dtype"] in ("auto", "half", "float16", "bfloat16", "float", "float32")
                seen.model, seen.options = model, options

            def generate(
                self,
                prompts: Any,
                sampling_params: Any = None,
                *,
                use_tqdm: Any = True,
                lora_request: Any = None,
                priority: list[int] | None = None,
                tokenization_kwargs: dict[str, Any] | None = None,
            ) -> list[Any]:
                assert len(prompts) == len(sampling_params) and all(p.keys() == {"prompt_token_ids"} for p in prompts)
                assert all(isinstance(p, SamplingParams) and 0 <= p.temperature <= 2 for p in sampling_params)
                assert all(type(p.seed) is int and type(p.stop_token_ids) is list for p in sampling_params)
                assert lora_request is None or isinstance(lora_request, LoRARequest)
                seen.prompts, seen.params, seen.lora, seen.use_tqdm = prompts, sampling_params, lora_request, use_tqdm
                ends = {"stop": [1], "length": []}
                answers = [
                    SimpleNamespace(index=0, token_ids=[70, 71, *ends.get(r, [])], finish_reason=r, stop_reason=None)
                    for r in reasons
                ]
                return [SimpleNamespace(outputs=[answer], finished=True) for answer in answers]

        vllm, lora, request = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
        vars(vllm).update(LLM=LLM, SamplingParams=SamplingParams)
        vars(request).update(LoRARequest=LoRARequest)
        self.modules = {module.__name__: module for module in (vllm, lora, request)}


@pytest.mark.parametrize("with_adapter", [True, False])
def test_what_vllm_is_asked(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_adapter: bool
) -> None:
    """A stand-in for vLLM: only our side of the call is tested."""
    vllm = StandIn()
    for name, module in vllm.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    base = save_model(tmp_path / "base")
    adapter = read_adapter(save_adapter(base, tmp_path / "adapter")) if with_adapter else None
    engine = VllmEngine(ModelSource(str(base), dtype="auto"), adapter, tokenizer, DRAWING)
    samples = engine([Request(0, 0, 0, [9, 8]), Request(0, 1, 0, [9, 8])])
    assert [(sample.num_tokens, sample.finished) for sample in samples] == [(2, True), (2, False)]
    seen = vllm.seen
    assert seen.model == str(base) and seen.options["generation_config"] == "vllm" and seen.use_tqdm is False
    assert seen.options.get("max_lora_rank") == (8 if with_adapter else None), "4 is none that vLLM takes"
    assert seen.prompts == [{"prompt_token_ids": [9, 8]}] * 2
    assert seen.lora == (LoRARequest("adapter", 1, str(tmp_path / "adapter")) if with_adapter else None)
    first, second = seen.params
    assert first.seed != second.seed and replace(first, seed=0) == replace(second, seed=0)
    assert replace(first, seed=0) == SamplingParams(
        temperature=0.9, top_p=0.95, max_tokens=12, stop_token_ids=[1], seed=0
    )


def test_what_vllm_would_refuse_or_pass_over(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = read_adapter(save_adapter(save_model(tmp_path / "base"), tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_config.json"
    plain = json.loads(file.read_text())
    for rank, taken in ((1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512)):
        file.write_text(json.dumps(plain | {"r": rank}))
        assert vllm_lora_rank(adapter) == taken
    changes = {"modules_to_save": ["embed_tokens"], "use_dora": True, "rank_pattern": {"q_proj": 8}, "bias": "all"}
    for key, value in changes.items():
        file.write_text(json.dumps(plain | {key: value}))
        with pytest.raises(ModelError, match=f"{key}. Write --engine hf, or merge"):
            vllm_lora_rank(adapter)
    file.write_text(json.dumps(plain | {"r": 513}))
    with pytest.raises(ModelError, match="LORA of rank 513, where LoRA up to 512 works"):
        vllm_lora_rank(adapter)
    for name, module in StandIn(["stop", "abort"]).modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    engine = VllmEngine(ModelSource(str(tmp_path / "base")), None, tokenizer, DRAWING)
    with pytest.raises(ModelError, match=r"broke off a sample \(abort\)"):
        engine([Request(0, 0, 0, [9, 8]), Request(0, 1, 0, [9, 8])])
