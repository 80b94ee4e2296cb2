"""Every refused combination has an example, and its way out works. A new one without an example fails here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from alignkit.config import REFUSALS, IgnoredKeys, check
from alignkit.config.compatibility import _ignored_by
from alignkit.config.keys import base_keys, method_keys, program_methods, rule_keys
from alignkit.parts.method import load_method
from alignkit.parts.options import Ignored
from alignkit.parts.rule import rule_names
from alignkit.parts.shape import shapes_by_program
from tests.configs import dpo_family, loss_refusals, switches
from tests.configs.cases import OF_STEPS, ONLINE, ROUTED, SUPERVISED, load, load_text, problems_of
from tests.configs.other_parametrizations import LORA, of_reward_models, under_another

FULL = {"parametrization": "full"}
ROUTERS = {"parametrization": "routers"}
PAT = {"parametrization": "pat"}
FLASH = {"attn_implementation": "flash_attention_2"}
HELD_OUT = {"eval_fraction": 0.5}
STREAM = {"streaming": True, "max_steps": 10}
ADPO = {"method": "adpo"}
KEEP_BEST = {"eval_strategy": "steps", "keep_best": True}
GUARD = ONLINE | {"method": "grpo_guard"}
IA3 = {"parametrization": "peft", "peft_type": "ia3"}
SPARSE = {"parametrization": "sparse"}
ATP = {"parametrization": "atp"}

# title: (what is refused, what is changed to mend it)
VLLM_KEYS: dict[str, Any] = {
    "vllm_mode": "server",
    "vllm_server_base_url": "http://localhost:8000",
    "vllm_gpu_memory_utilization": 0.5,
    "vllm_tensor_parallel_size": 2,
    "vllm_max_model_length": 2048,
    "vllm_enable_sleep_mode": True,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "token_mask",
    "vllm_importance_sampling_clip_max": 2.0,
    "vllm_importance_sampling_clip_min": 0.5,
}
VLLM = f"{', '.join(VLLM_KEYS)} without use_vllm"
BUDGET = ONLINE | {"max_tokens_per_micro_batch": 4096}
CONFLICTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "max_tokens_per_micro_batch with bnpo": (BUDGET | {"loss_type": "bnpo"}, {"loss_type": "dapo"}),
    "max_tokens_per_micro_batch with an entropy bonus": (BUDGET | {"entropy_coef": 0.1}, {"entropy_coef": 0.0}),
    "max_tokens_per_micro_batch with tokens of large entropy": (
        BUDGET | {"top_entropy_quantile": 0.2},
        {"top_entropy_quantile": 1.0},
    ),
    "max_tokens_per_micro_batch with a gradient rule": (BUDGET | {"gradient_rule": "sam"}, {"gradient_rule": None}),
    "max_tokens_per_micro_batch below the longest row": (
        BUDGET | {"max_prompt_length": 4000, "max_completion_length": 97},
        {"max_completion_length": 96},
    ),
    "dynamic_sampling with an environment": (
        ONLINE | {"dynamic_sampling": 2, "environment": "room.py:Room"},
        {"environment": None},
    ),
    "delta within the clip": (ONLINE | {"delta": 1.1, "epsilon": 0.15, "epsilon_high": 0.2}, {"delta": 2.0}),
    "cispo without its largest weight": (ONLINE | {"loss_type": "cispo"}, {"epsilon_high": 5.0}),
    "delta within the clip of grpo_guard": (GUARD | {"delta": 1.1}, {"delta": 1.3}),
    "guard of a loss type without a hard clip": (GUARD | {"loss_type": "sapo"}, {"loss_type": "grpo"}),
    "guard of tokens at level sequence": (
        GUARD | {"importance_sampling_level": "sequence", "step_axis": "position"},
        {"step_axis": "length"},
    ),
    "guard of completions at level token": (GUARD | {"scale": "sqrt_length"}, {"scale": "pooled"}),
    "guard by the old policy's whole distribution": (GUARD | {"center": "exact_kl"}, {"center": "k3"}),
    "inverse_kappa in mode gate": (GUARD | {"reweight": "inverse_kappa"}, {"mode": "full"}),
    **of_reward_models(),
    "quantization with full fine-tuning": (FULL | {"quantization": "nf4"}, {"parametrization": "lora"}),
    "adapter with full fine-tuning": (FULL | {"adapter": "lora"}, {"adapter": None}),
    "LoRA on the output head": (
        {"lora_target_modules": ["q_proj", "model.lm_head"]},
        {"lora_target_modules": ["q_proj", "not_lm_head"]},
    ),
    "LoRA targets that are no regular expression": (
        {"lora_target_modules": r".*\.(q_proj"},
        {"lora_target_modules": r".*\.(q_proj)"},
    ),
    "dense_mixer with torch_compile": (
        ROUTERS | {"dense_mixer": True, "torch_compile": True},
        {"torch_compile": False},
    ),
    "kernels with torch_compile": ({"kernels": "compile", "torch_compile": True}, {"kernels": "auto"}),
    "compiled layers with quantization": ({"kernels": "compile", "quantization": "nf4"}, {"quantization": "none"}),
    "gradient rule with compiled layers": ({"gradient_rule": "sam", "kernels": "compile"}, {"kernels": "none"}),
    "Liger's kernels on the CPU": ({"kernels": "liger", "use_cpu": True}, {"kernels": "compile"}),
    "no LoRA target": ({"lora_target_modules": []}, {"lora_target_modules": "all-linear"}),
    "bf16 with fp16": ({"bf16": True, "fp16": True}, {"fp16": False}),
    "fp16 on the CPU": ({"fp16": True, "use_cpu": True}, {"fp16": False, "bf16": True}),
    "fp16 with float16 weights that train": (FULL | {"fp16": True, "dtype": "float16"}, {"dtype": "float32"}),
    "flash attention in float32": (FLASH | {"bf16": False}, {"bf16": True}),
    "flash or flex attention on the CPU": (
        {"attn_implementation": "flex_attention", "use_cpu": True},
        {"attn_implementation": "sdpa"},
    ),
    "adapter_disabled with full fine-tuning": (FULL | {"reference": "adapter_disabled"}, {"reference": "copy"}),
    "adapter_disabled with a continued adapter": (
        {"adapter": "lora", "reference": "adapter_disabled"},
        {"reference": "precomputed"},
    ),
    "copied reference with a continued adapter": (
        {"adapter": "lora", "reference": "copy"},
        {"reference": "precomputed"},
    ),
    "adapter_disabled with another reference model": (
        {"reference": "adapter_disabled", "reference_model": "org/other"},
        {"reference": "precomputed"},
    ),
    "reference model equal to the model": ({"reference_model": "base"}, {"reference_model": "org/other"}),
    "precomputed reference with streaming": (STREAM | {"reference": "precomputed"}, {"reference": "auto"}),
    "eval_fraction with streaming": (STREAM | HELD_OUT, {"eval_fraction": 0.0}),
    "streaming without max_steps": ({"streaming": True}, {"max_steps": 10}),
    "eval_fraction with eval_data": (HELD_OUT | {"eval_data": "rows.jsonl"}, {"eval_fraction": 0.0}),
    "evaluation without held-out rows": ({"eval_strategy": "epoch"}, HELD_OUT),
    "keep_best without evaluations": (ONLINE | {"keep_best": True}, HELD_OUT | {"eval_strategy": "steps"}),
    "gradient rule with fp16": ({"gradient_rule": "glad", "fp16": True}, {"gradient_rule": "decay_to_init"}),
    **dpo_family.CONFLICTS,
    "tokens_per_batch with a gradient rule": ({"gradient_rule": "sam", "tokens_per_batch": 9}, {"gradient_rule": None}),
    "gradient rule with torch.compile": (
        {"gradient_rule": "perpgrad", "torch_compile": True},
        {"gradient_rule": "decay_to_init"},
    ),
    "gradient rule with half-precision weights that train": (
        FULL | {"gradient_rule": "sam", "dtype": "bfloat16"},
        {"dtype": "float32", "bf16": True},
    ),
    "gradient rule on LoRA with full fine-tuning": (FULL | {"gradient_rule": "glad"}, {"rule_targets": "all"}),
    "zero steps": ({"max_steps": 0}, {"max_steps": -1}),
    "resume with overwrite": ({"resume": True, "overwrite": True}, {"overwrite": False}),
    "push_to_hub without a repository": ({"push_to_hub": True}, {"hub_model_id": "me/model"}),
    "hub_model_id that names no repository": (
        {"push_to_hub": True, "hub_model_id": "https://hub/me/model"},
        {"hub_model_id": "me/model"},
    ),
    # --- peft ---
    "PEFT without a kind": ({"parametrization": "peft"}, {"peft_type": "vera"}),
    "PEFT kinds that are a parametrisation of their own": (
        IA3 | {"peft_type": "lora"},
        {"parametrization": "lora", "peft_type": None},
    ),
    "PEFT kinds that add tokens": (IA3 | {"peft_type": "prefix_tuning"}, {"peft_type": "ia3"}),
    "PEFT kinds that the loop must serve": (IA3 | {"peft_type": "adalora"}, {"peft_type": "delora"}),
    "PEFT kinds that run otherwise": (IA3 | {"peft_type": "trainable_tokens"}, {"peft_type": "vera"}),
    "PEFT kinds that start elsewhere": (IA3 | {"peft_type": "vblora"}, {"peft_type": "vera"}),
    "PEFT kinds that could not be tried": (IA3 | {"peft_type": "adamss"}, {"peft_type": "ia3"}),
    "PEFT kinds on quantized weights": (IA3 | {"quantization": "nf4"}, {"quantization": "none"}),
    "PEFT kinds that go on from an adapter": (IA3 | {"adapter": "lora"}, {"adapter": None}),
    "PEFT kinds under a gradient rule": (IA3 | {"gradient_rule": "sam"}, {"gradient_rule": None}),
    "PEFT kinds with a moving anchor": (IA3 | ADPO | {"anchor": "ema"}, {"anchor": "fixed"}),
    # --- pat ---
    "PAT that goes on from an adapter": (PAT | {"adapter": "lora"}, {"adapter": None}),
    "PAT with a moving anchor": (PAT | ADPO | {"anchor": "ema"}, {"anchor": "fixed"}),
    "PAT whose mask never gets hard": (PAT | {"pat_milestone_steps": 5, "max_steps": 5}, {"pat_milestone_steps": None}),
    "PAT with keep_best": (ONLINE | PAT | HELD_OUT | KEEP_BEST, {"keep_best": False}),
    "PAT with torch_compile": (PAT | {"torch_compile": True}, {"torch_compile": False}),
    "PAT with DoRA": (PAT | {"use_dora": True}, {"use_dora": False}),
    "PAT with modules that train in full": (
        PAT | {"lora_modules_to_save": ["lm_head"]},
        {"lora_modules_to_save": []},
    ),
    # --- adpo ---
    "tau with beta": (ADPO | {"tau": 0.8, "beta": 0.1}, {"tau": None}),
    "empty range of the temperature": (ADPO | {"adaptive_tau": True, "tau_min": 6.0}, {"tau_max": 7.0}),
    "divergence from no anchor": (ADPO | {"anchor": "uniform", "anchor_kl_coef": 0.1}, {"anchor": "ema"}),
    "moving anchor with a reference that stays": (
        ADPO | {"anchor": "ema", "reference": "precomputed"},
        {"reference": "auto"},
    ),
    "moving anchor with another reference model": (
        ADPO | {"anchor": "periodic", "reference_model": "org/other"},
        {"anchor": "fixed"},
    ),
    "uniform anchor with a reference": (
        ADPO | {"anchor": "uniform", "reference": "precomputed"},
        {"reference": "auto"},
    ),
    # --- d2o ---
    "helpful reference equal to the reference": (
        {"method": "d2o", "helpful_reference_model": "base"},
        {"helpful_reference_model": "org/other"},
    ),
    "refreshed samples with a precomputed reference": (
        {"method": "d2o", "sample_refresh_steps": 50, "reference": "precomputed"},
        {"reference": "auto"},
    ),
    "refreshed samples of streamed rows": (
        STREAM | {"method": "d2o", "sample_refresh_steps": 50},
        {"sample_refresh_steps": 0},
    ),
    # --- treg ---
    "gradient through a static weight": (
        {"method": "treg", "static_weight": True, "detach_weight": False},
        {"static_weight": False},
    ),
    "precomputed reference of the simpo form": (
        {"method": "treg", "form": "simpo", "reference": "precomputed"},
        {"form": "dpo"},
    ),
    # --- roma ---
    "reference bank of streamed rows": (ROUTED | STREAM, {"streaming": False}),
    "routing of a compiled model": (ROUTED | {"torch_compile": True}, {"torch_compile": False}),
    "success by generation without a reward": (
        ROUTED | {"bank_success": "generation"},
        {"bank_success_reward": "gsm8k_answer"},
    ),
    # --- atp ---
    "ATP that removes nothing": (ATP | {"atp_ffn": 0.0, "atp_kv_groups": 0.0}, {"atp_ffn": 0.25}),
    "ATP with fp16": (ATP | {"fp16": True}, {"fp16": False}),
    "ATP with drawn answers": (ATP | ONLINE, {"parametrization": "lora"}),
    "ATP that goes on from an adapter": (ATP | {"adapter": "lora"}, {"adapter": None}),
    "ATP with a moving anchor": (ATP | ADPO | {"anchor": "ema"}, {"anchor": "fixed"}),
    "ATP with torch_compile": (ATP | {"torch_compile": True}, {"torch_compile": False}),
    "ATP with DoRA": (ATP | {"use_dora": True}, {"use_dora": False}),
    "ATP with modules that train in full": (
        ATP | {"lora_modules_to_save": ["lm_head"]},
        {"lora_modules_to_save": []},
    ),
    # --- sparse ---
    "sparse with nothing to remove": (SPARSE | {"sparse_ffn": 0.0}, {"sparse_kv_groups": 0.5}),
    "sparse with a count that comes down too late": (
        SPARSE | {"sparse_regulariser": "wgsef", "sparse_anneal_fraction": 0.8},
        {"sparse_until": 0.9},
    ),
    "sparse with keep_best": (
        ONLINE | SPARSE | HELD_OUT | KEEP_BEST,
        {"keep_best": False},
    ),
}
IGNORED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip of a loss type without one": (
        ONLINE | {"loss_type": "sapo", "epsilon": 0.1, "delta": 2.0},
        {"loss_type": "dapo"},
    ),
    "bounds of a scale that is not there": (
        GUARD | {"scale": "none", "kappa_min": 0.5, "kappa_max": 2.0},
        {"scale": "pooled"},
    ),
    "fixed_std of grpo_guard without scale: fixed": (GUARD | {"fixed_std": 0.2}, {"scale": "fixed"}),
    "alpha, wmax of grpo_guard without reweight: bucket_rms": (
        GUARD | {"alpha": 0.5, "wmax": 2.0},
        {"reweight": "bucket_rms"},
    ),
    "epsilon_high of sapo": (ONLINE | {"loss_type": "sapo", "epsilon_high": 0.3}, {"loss_type": "dapo"}),
    "sapo_temperature_pos, sapo_temperature_neg of grpo without loss_type: sapo": (
        ONLINE | {"sapo_temperature_pos": 1.1, "sapo_temperature_neg": 1.2},
        {"loss_type": "sapo"},
    ),
    VLLM: (ONLINE | VLLM_KEYS, {"use_vllm": True}),
    "router tuning options with a saved adapter": (
        ROUTERS | {"adapter": "lora", "router_layers": 2},
        {"adapter": None},
    ),
    "LoRA options with a saved adapter": ({"adapter": "lora"} | LORA, {"adapter": None, "disable_dropout": False}),
    "sparse_anneal_fraction without wgsef": (
        SPARSE | {"sparse_anneal_fraction": 0.2},
        {"sparse_regulariser": "wgsef"},
    ),
    "factors of PAT where weights move in full": (
        PAT
        | {"pat_weights": "full", "disable_dropout": False}
        | {"lora_r": 4, "lora_alpha": 4, "lora_dropout": 0.1, "use_rslora": True},
        {"pat_weights": "lora"},
    ),
    "LoRA dropout with dropout off": ({"lora_dropout": 0.1}, {"disable_dropout": False}),
    "cache options without a precomputed reference": (
        {"reference": "adapter_disabled", "reference_batch_size": 4, "reference_cache": "cache"},
        {"reference": "auto"},
    ),
    "packing_strategy without packing": (SUPERVISED | {"packing_strategy": "bfd_split"}, {"packing": True}),
    "max_truncated_fraction where nothing is cut": (
        SUPERVISED | {"packing": True, "packing_strategy": "bfd_split", "max_truncated_fraction": 0.9},
        {"packing_strategy": "bfd"},
    ),
    "options of eval_data without it": ({"eval_split": "train", "max_eval_rows": 1}, {"eval_data": "rows.jsonl"}),
    "evaluation options without held-out rows": (
        {"per_device_eval_batch_size": 8, "probe_rows": 32, "allow_overlap": True},
        HELD_OUT,
    ),
    "success_threshold without held-out prompts": (ONLINE | {"success_threshold": 0.5}, HELD_OUT),
    "probe_steps without a probe": (HELD_OUT | {"probe_rows": 0, "probe_steps": 5}, {"probe_rows": 3}),
    "eval_steps without evaluation by steps": ({"eval_steps": 5}, HELD_OUT | {"eval_strategy": "steps"}),
    "save_steps without saving by steps": ({"save_steps": 5, "save_strategy": "epoch"}, {"save_strategy": "steps"}),
    "save_total_limit without checkpoints": (
        {"save_total_limit": 2, "save_strategy": "no"},
        {"save_strategy": "epoch"},
    ),
    "dataset_num_proc with streaming": (STREAM | {"dataset_num_proc": 2}, {"streaming": False}),
    "num_train_epochs with max_steps": ({"num_train_epochs": 1.0, "max_steps": 5}, {"max_steps": -1}),
    "warm-up with a constant schedule": (
        {"warmup_steps": 5, "lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "constant_with_warmup"},
    ),
    "gradient rule in a warm-up that there is not": (
        {"gradient_rule": "sam", "rule_in_warmup": True},
        {"warmup_steps": 0.05},
    ),
    "sample length without samples": ({"num_samples": 0, "sample_max_new_tokens": 8}, {"num_samples": 1}),
    "Hub options without push_to_hub": ({"hub_model_id": "me/model", "hub_private": True}, {"push_to_hub": True}),
    "skip_dead_rows, max_tokens_per_micro_batch without arrange_rows": (
        ONLINE | {"arrange_rows": False, "skip_dead_rows": True, "max_tokens_per_micro_batch": 4096},
        {"arrange_rows": True},
    ),
    "skip_dead_rows with bnpo": (ONLINE | {"skip_dead_rows": True, "loss_type": "bnpo"}, {"loss_type": "dapo"}),
    "skip_dead_rows with a divergence": (ONLINE | {"skip_dead_rows": True, "beta": 0.1}, {"beta": 0.0}),
    "skip_dead_rows with an entropy bonus": (
        ONLINE | {"skip_dead_rows": True, "entropy_coef": 0.1},
        {"entropy_coef": 0.0},
    ),
    "skip_dead_rows with tokens of large entropy": (
        ONLINE | {"skip_dead_rows": True, "top_entropy_quantile": 0.2},
        {"top_entropy_quantile": 1.0},
    ),
    "skip_dead_rows with a gradient rule": (
        ONLINE | {"skip_dead_rows": True, "gradient_rule": "sam"},
        {"gradient_rule": None},
    ),
    # --- adpo; most values are the defaults, which ask for something where they are written down ---
    "beta_reward of adpo without target: listwise_zscore or listwise_raw or kde or pairwise_soft": (
        ADPO | {"target": "plackett_luce", "beta_reward": 0.5},
        {"target": "pairwise_soft"},
    ),
    "anchor_decay of adpo without anchor: ema": (ADPO | {"anchor_decay": 0.99}, {"anchor": "ema"}),
    "anchor_steps of adpo without anchor: periodic": (
        ADPO | {"anchor": "ema", "anchor_steps": 100},
        {"anchor": "periodic"},
    ),
    "anchor_threshold, anchor_window of adpo without anchor: kl_triggered": (
        ADPO | {"anchor": "periodic", "anchor_threshold": 0.1, "anchor_window": 5},
        {"anchor": "kl_triggered"},
    ),
    "adaptive_tau_entropy, adaptive_tau_reward, tau_min, tau_max of adpo without adaptive_tau": (
        ADPO | {"adaptive_tau_entropy": 0.5, "adaptive_tau_reward": 1.0, "tau_min": 0.1, "tau_max": 2.0},
        {"adaptive_tau": True},
    ),
    "sft_normalization of adpo without eta": (ADPO | {"sft_normalization": "token"}, {"eta": 0.1}),
    # --- roma ---
    "manifold_warmup_steps, regularizer of roma without manifold_coef": (
        ROUTED | {"manifold_coef": 0.0, "manifold_warmup_steps": 5, "regularizer": "l1"},
        {"manifold_coef": 1.0},
    ),
    **dpo_family.IGNORED,
    # --- flex_dpo and treg ---
    "sft_normalization of flex_dpo without eta": (
        {"method": "flex_dpo", "sft_normalization": "sequence_sum"},
        {"eta": 0.1},
    ),
    "kd_temperature, teacher of distill without kd_alpha": (
        SUPERVISED | {"method": "distill", "kd_alpha": 0.0, "kd_temperature": 2.0, "teacher": "org/large"},
        {"kd_alpha": 0.5},
    ),
    "gamma of treg without form: simpo": ({"method": "treg", "gamma": 0.5}, {"form": "simpo"}),
    "detach_weight of treg without static_weight: false": (
        {"method": "treg", "static_weight": True, "detach_weight": True},
        {"static_weight": False},
    ),
    "static_weight of treg without alpha": ({"method": "treg", "alpha": 0.0, "static_weight": True}, {"alpha": 0.25}),
}
METHODS = [method for program in shapes_by_program() for method in program_methods(program)]
IGNORED |= under_another() | switches.IGNORED | loss_refusals.IGNORED
CONFLICTS |= switches.CONFLICTS | loss_refusals.CONFLICTS
BY_TITLE = {refusal.title: refusal for refusal in REFUSALS}


@pytest.fixture(autouse=True)
def _every_package_and_an_adapter(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.config.model_files._is_installed", lambda package: True)
    (workspace / "lora").mkdir()
    (workspace / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    (workspace / "lora" / "adapter_model.safetensors").write_text("weights")


def test_every_refusal_has_an_example() -> None:
    assert len(BY_TITLE) == len(REFUSALS), "titles must differ"
    assert set(CONFLICTS) == {refusal.title for refusal in REFUSALS if not isinstance(refusal, IgnoredKeys)}
    assert set(IGNORED) == {refusal.title for refusal in REFUSALS if isinstance(refusal, IgnoredKeys)}


@pytest.mark.parametrize("title", CONFLICTS)
def test_conflict_is_refused_and_its_way_out_works(title: str) -> None:
    broken, mended = CONFLICTS[title]
    refusal = BY_TITLE[title]
    found = problems_of(broken)
    assert len(found) == 1
    first = next(key for key in broken if key in refusal.keys)
    assert found[0].startswith("command line: `") and refusal.why in found[0] and refusal.fix in found[0]
    assert all(f"`{key}: " in found[0] for key in (first, *refusal.keys))
    assert problems_of(broken | mended) == []


@pytest.mark.parametrize("title", IGNORED)
def test_ignored_keys_are_refused_and_the_way_out_works(title: str) -> None:
    broken, mended = IGNORED[title]
    refusal = BY_TITLE[title]
    found = problems_of(broken)
    assert [problem.split("`")[1].partition(":")[0] for problem in found] == list(refusal.keys), (
        "one problem for each key"
    )
    assert all("would be ignored under " in problem and refusal.why in problem for problem in found)
    assert problems_of(broken | mended) == []
    assert problems_of(broken | dict.fromkeys(refusal.keys)) == []


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.title)
def test_refusal_reads_only_keys_that_exist(refusal: Any) -> None:
    keys = {key for program in shapes_by_program() for key in base_keys(program)}
    keys |= {key for name in rule_names() for key in rule_keys(name)}
    keys |= {
        key for program in shapes_by_program() for method in program_methods(program) for key in method_keys(method)
    }
    assert set(refusal.keys) <= keys
    assert set(refusal.under if isinstance(refusal, IgnoredKeys) else ()) <= keys
    assert refusal.why[0].islower() and not refusal.why.endswith(".")
    assert not refusal.fix.endswith(".")


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_never_refused(method: str) -> None:
    programs = {"sft": SUPERVISED, "online": ONLINE, "router": ROUTED}
    own = OF_STEPS if method == OF_STEPS["method"] else programs.get(load_method(method).program, {})
    changes = {**own, "method": method}
    assert set(method_keys(method)) < set(load(changes).sources)


def test_switched_off_keys_ask_for_nothing() -> None:
    off = {"use_dora": False, "lora_dropout": 0.0, "lora_modules_to_save": [], "adapter": None}
    assert problems_of(FULL | off | {"probe_rows": 0, "hub_private": False, "eval_fraction": 0}) == []


def test_a_key_set_to_its_default_in_a_file_is_still_refused_when_ignored() -> None:
    text = "model: base\ndata: rows.jsonl\nmethod: dpo\noutput_dir: x\nparametrization: full\n"
    load_text(text)
    with pytest.raises(Exception, match=r"c.yaml:6: `lora_r: 16` would be ignored under `parametrization: full` \(c.y"):
        load_text(text + "lora_r: 16\n")


def test_a_rule_is_not_judged_on_values_that_are_wrong_themselves() -> None:
    assert len(problems_of({"parametrization": "ful", "quantization": "nf4", "reference": "adapter_disabled"})) == 1


@pytest.mark.parametrize(
    ("modules", "refused"),
    [
        (["lm_head"], True),
        (["q_proj"], False),
        ("lm_head", True),
        (".*", True),
        (r".*\.(q_proj|lm_head)", False),
        (r"(.*\.)?(q_proj|lm_head)", True),
        ("all-linear", False),
    ],
)
def test_output_head_is_found_in_lists_and_expressions(modules: str | list[str], refused: bool) -> None:
    assert bool(problems_of({"lora_target_modules": modules})) is refused


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"anchor": "ema", "reference": "copy"}, True),
        ({"anchor": "ema", "reference": "copy"} | FULL, False),
        ({"anchor": "fixed", "reference": "precomputed"}, False),
        ({"anchor": "uniform", "reference_model": "org/other"}, True),
        ({"anchor": "ema", "anchor_decay": 0.9}, False),
        ({"anchor": "fixed", "anchor_steps": 5}, True),
        ({"target": "pairwise_hard", "beta_reward": 0.5}, True),
    ],
)
def test_anchors_and_references_of_adpo(changes: dict[str, Any], refused: bool) -> None:
    assert bool(problems_of(ADPO | changes)) is refused


def test_a_helpful_reference_may_be_the_base_of_a_continued_adapter() -> None:
    """The samples are then compared with the adapter as it was, which has no name."""
    assert problems_of({"method": "d2o", "helpful_reference_model": "base", "adapter": "lora"}) == []
    twice = {"method": "d2o", "helpful_reference_model": "org/other", "reference_model": "org/other"}
    assert len(problems_of(twice)) == 1


def test_a_method_says_which_keys_it_ignores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under that method, and the values that take the effect away, alone."""
    ignored = Ignored(
        "seed", ("seed",), lambda c: c.bf16, "it draws nothing then", "write bf16: false", under=("bf16",)
    )
    method = replace(load_method("dpo"), ignored=(ignored,))
    monkeypatch.setattr(check, "REFUSALS", (_ignored_by(method, ignored),))
    changes = {"method": "dpo", "seed": 1, "bf16": True}
    (problem,) = problems_of(changes)
    assert "would be ignored" in problem and "it draws nothing then" in problem and "write bf16: false" in problem
    assert problems_of(changes | {"bf16": False}) == problems_of(changes | {"method": "adpo"}) == []
