"""Generated answers: batching, stopping, repetition, and what generation leaves behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM

from alignkit.sampling.engines import Drawing, HuggingFaceEngine, Request
from alignkit.sampling.generation import Sampling, generate_samples, generation_sums, repetition, stop_token_ids
from tests.scripts.tiny import byte_tokenizer, tiny_model

PROMPTS = ["Hello", "What is 2 + 2? Tell me slowly.", "x", "Once upon a time"]
GREEDY = Sampling(max_new_tokens=24, batch_size=4)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture
def model() -> PreTrainedModel:
    """A model that ends about half of its answers."""
    model = tiny_model(seed=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[1] *= 1.5
    return model


@pytest.fixture
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(PROMPTS)["input_ids"]


def one_by_one(model: PreTrainedModel, prompt: list[int], limit: int) -> tuple[list[int], bool]:
    """Greedy decoding without padding, cache or generate."""
    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == 1:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


def test_padded_batches_give_what_each_prompt_gives_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    expected = [one_by_one(model, prompt, GREEDY.max_new_tokens) for prompt in prompts]
    assert {finished for _, finished in expected} == {True, False}
    for batch_size in (1, 3, 4):
        samples = generate_samples(
            model, tokenizer, prompts, replace(GREEDY, batch_size=batch_size), state=PartialState()
        )
        assert [(sample.num_tokens, sample.finished) for sample in samples] == [(len(i), f) for i, f in expected]
        assert [s.text for s in samples] == [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in expected]


@pytest.fixture
def mixture() -> PreTrainedModel:
    """A mixture of experts that gives router logits unless told otherwise, as for its load-balancing loss."""
    config = Qwen3MoeConfig(
        vocab_size=260, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=512, initializer_range=0.3, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        output_router_logits=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).eval()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_mixture_of_experts_answers_padded_prompts(
    adapted: bool, mixture: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """The load-balancing loss cannot be computed there; both ways of generating leave it out."""
    expected = [one_by_one(mixture, prompt, 8) for prompt in prompts]
    model = get_peft_model(mixture, LoraConfig(target_modules=["q_proj"])) if adapted else mixture
    state, how = PartialState(), {"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    answers = generate_samples(model, tokenizer, prompts, Sampling(**how, batch_size=4), state=state)
    engine = HuggingFaceEngine(model, tokenizer, Drawing(**how, max_sequences=4), state)
    samples = engine([Request(row, 0, 0, ids) for row, ids in enumerate(prompts)])
    for found in (answers, samples):
        assert [(s.num_tokens, s.finished) for s in found] == [(len(ids), finished) for ids, finished in expected]
    assert [s.text for s in answers] == [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in expected]
    assert model.config.output_router_logits


SETTINGS = {
    "min_p": 0.9, "typical_p": 0.1, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "top_h": 0.1, "top_k": 3, "top_p": 0.2,
    "temperature": 5.0, "do_sample": True, "suppress_tokens": list(range(40, 120)), "bad_words_ids": [[101], [110]],
    "begin_suppress_tokens": list(range(40, 120)), "sequence_bias": [[[101], -50.0], [[50], 90.0]],
    "min_new_tokens": 8, "min_length": 60, "repetition_penalty": 9.0, "no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 5.0, "encoder_no_repeat_ngram_size": 1, "guidance_scale": 2.0, "num_beams": 3,
    "num_return_sequences": 2, "exponential_decay_length_penalty": (2, 1.5), "forced_eos_token_id": 7,
    "forced_bos_token_id": 7, "length_penalty": 3.0, "stop_strings": ["a"], "max_length": 5, "max_time": 1e-9,
    "remove_invalid_values": True, "renormalize_logits": True, "return_dict_in_generate": True, "output_scores": True,
    "use_cache": False,
}  # fmt: skip
"""What a generation_config.json may ask for. Beams, several sequences and stop strings used to end in an error."""


@pytest.mark.parametrize("adapted", [False, True])
def test_the_models_own_generation_config_is_not_used(
    adapted: bool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """One setting after the other, greedy, drawn and as D2O draws: nothing changes, and the config stays."""
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapted else model
    state, how = PartialState(), {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    prompts = prompts[:2]

    def answers() -> list[Any]:
        engine = HuggingFaceEngine(model, tokenizer, Drawing(**how, max_sequences=2), state)
        drawn = engine([Request(row, 0, 0, ids) for row, ids in enumerate(prompts)])
        greedy, sampled = (Sampling(8, temperature, batch_size=2) for temperature in (0.0, 1.0))
        return [drawn, *(generate_samples(model, tokenizer, prompts, how, state=state) for how in (greedy, sampled))]

    expected = answers()
    assert [(s.num_tokens, s.finished) for s in expected[1]] == [
        (len(ids), finished) for ids, finished in (one_by_one(model, prompt, 8) for prompt in prompts)
    ]
    own = model.get_base_model() if adapted else model
    for name, value in list(SETTINGS.items())[:: 6 if adapted else 1]:
        own.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
        setattr(own.generation_config, name, value)
        assert answers() == expected, name
        assert getattr(own.generation_config, name) == value


def test_what_the_model_asks_for_is_said_once(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):
        generate_samples(model, tokenizer, prompts[:1], GREEDY, state=PartialState())
    assert "generation_config" not in capsys.readouterr().out
    model.generation_config.update(repetition_penalty=1.25, stop_strings=["###"])
    for _ in range(2):
        generate_samples(model, tokenizer, prompts[:1], GREEDY, state=PartialState())
    assert capsys.readouterr().out.count("asks for stop_strings ['###'], repetition_penalty 1.25; answers") == 1


def test_drawn_answers_depend_on_the_seed_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    drawn = replace(GREEDY, temperature=1.0, seed=3)
    torch.manual_seed(0)
    first = generate_samples(model, tokenizer, prompts, drawn, state=PartialState())
    torch.manual_seed(1)
    assert generate_samples(model, tokenizer, prompts, drawn, state=PartialState()) == first
    assert generate_samples(model, tokenizer, prompts, replace(drawn, seed=4), state=PartialState()) != first


def test_no_dropout_inside_and_training_goes_on_undisturbed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    answers = generate_samples(model, tokenizer, prompts, GREEDY, state=PartialState())
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    assert generate_samples(model, tokenizer, prompts, GREEDY, state=PartialState()) == answers
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    generate_samples(model, tokenizer, prompts, replace(GREEDY, temperature=1.0), state=PartialState())
    assert model.training
    assert torch.equal(torch.rand(3), expected)


def test_every_stop_token_of_model_and_tokenizer_stops(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert stop_token_ids(model, tokenizer) == [1]
    model.generation_config.eos_token_id = [2, 7]
    assert stop_token_ids(model, tokenizer) == [1, 2, 7]
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, tokenizer) == [1]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], 0.0),
        ([1, 2, 3], 0.0),
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
        ([7] * 13, 9 / 10),
    ],
)
def test_repetition(ids: list[int], expected: float) -> None:
    assert repetition(ids) == pytest.approx(expected)


def test_sums_over_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    samples = generate_samples(model, tokenizer, prompts, GREEDY, state=PartialState())
    sums = {name: values.estimate().mean for name, values in generation_sums(samples).items()}
    assert sums["generation/finished"] == sum(sample.finished for sample in samples) / 4
    assert sums["generation/tokens"] == sum(sample.num_tokens for sample in samples) / 4
    assert sums["generation/repetition"] == pytest.approx(sum(sample.repetition for sample in samples) / 4)
