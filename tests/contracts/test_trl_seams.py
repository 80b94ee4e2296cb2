"""Every upstream private name the bridges use exists with the signature they expect.

When this file is red after an upgrade, read the ``_*.py`` that names the symbol before
anything else: what is asserted here is all that it knows of its host.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import bnb as lora_bnb
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora.layer import ParamWrapper
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Trainer,
    modeling_rope_utils,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.models.qwen3 import modeling_qwen3
from transformers.utils.output_capturing import OutputRecorder
from trl import DPOTrainer, GRPOTrainer, RewardTrainer, SFTTrainer
from trl.models import utils as model_utils
from trl.trainer import sft_trainer
from trl.trainer import utils as trainer_utils

from alignkit.models import _kernels, _routers, _segments
from alignkit.shapes._candidates import PreferenceTrainer
from alignkit.shapes._policy_trainer import OnlineTrainer
from alignkit.shapes._reward import RewardModelTrainer
from alignkit.shapes._tokens import SupervisedTrainer


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (DPOTrainer._prepare_dataset, ["self", "dataset", "processing_class", "args", "dataset_name"]),
        (DPOTrainer._precompute_ref_logps, ["self", "dataset", "name", "batch_size"]),
        (DPOTrainer._set_signature_columns_if_needed, ["self"]),
        (DPOTrainer.log, ["self", "logs", "start_time"]),
        (DPOTrainer.create_model_card, ["self", "model_name", "dataset_name", "tags"]),
        (DPOTrainer.compute_loss, ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
        (GRPOTrainer._prepare_inputs, ["self", "generation_batch"]),
        (GRPOTrainer._generate_and_score_completions, ["self", "inputs"]),
        (GRPOTrainer._generate, ["self", "prompts"]),
        (GRPOTrainer._calculate_rewards, ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        (GRPOTrainer._get_train_sampler, ["self", "dataset"]),
        (SFTTrainer._set_signature_columns_if_needed, ["self"]),
        (sft_trainer.DataCollatorForLanguageModeling.torch_call, ["self", "examples"]),
        (
            Trainer._get_dataloader,
            ["self", "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"],
        ),
        (Trainer._load_from_checkpoint, ["self", "resume_from_checkpoint", "model"]),
        (Trainer._load_optimizer_and_scheduler, ["self", "checkpoint"]),
        (Trainer._save_checkpoint, ["self", "model", "trial"]),
        (Trainer.get_batch_samples, ["self", "epoch_iterator", "num_batches", "device"]),
        (Trainer.get_train_dataloader, ["self"]),
        (Trainer.training_step, ["self", "model", "inputs", "num_items_in_batch"]),
        (Trainer.floating_point_ops, ["self", "inputs"]),
        (Trainer._track_num_input_tokens, ["self", "inputs"]),
        (
            Trainer._init_training_state,
            ["self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"],
        ),
        (trainer_utils.add_fused_lm_head, ["model", "temperature", "cast_lm_head_to_fp32", "outputs"]),
        (trainer_utils.use_adapter, ["model", "adapter_name"]),
        (trainer_utils.maybe_gather_lm_head_ctx, ["params"]),
        (model_utils.prepare_deepspeed, ["model", "accelerator"]),
        (model_utils.prepare_fsdp, ["model", "accelerator"]),
        (model_utils.disable_gradient_checkpointing, ["model", "gradient_checkpointing_kwargs"]),
    ],
    ids=lambda value: value.__qualname__ if callable(value) else "",
)
def test_signature(function: Any, expected: list[str]) -> None:
    assert parameters(function) == expected


def test_position_encodings_that_depend_on_the_longest_row_are_those_two() -> None:
    source = inspect.getsource(modeling_rope_utils.dynamic_rope_update)
    assert source.count('"dynamic" in rope_type') == source.count('rope_type == "longrope"') == 1
    assert 'rope_parameters["original_max_position_embeddings"]' in source
    changing = {name for name in modeling_rope_utils.ROPE_INIT_FUNCTIONS if name in ("dynamic", "longrope")}
    assert changing == {"dynamic", "longrope"}


def test_attention_function_takes_what_the_packed_one_hands_on() -> None:
    names = parameters(sdpa_attention_forward)
    assert names[:5] == ["module", "query", "key", "value", "attention_mask"]
    assert {"dropout", "scaling", "is_causal"} <= set(names)


# Not ours to name: what alignkit/gradients overrides of the Trainer is asserted with its own tests.
BUDGET_HOOKS = {
    "_get_train_sampler",
    "get_train_dataloader",
    "training_step",
    "floating_point_ops",
    "_track_num_input_tokens",
}
OWN_HOOKS = {
    PreferenceTrainer: {"_prepare_dataset", "_precompute_ref_logps", "_set_signature_columns_if_needed"} | BUDGET_HOOKS,
    SupervisedTrainer: {"_set_signature_columns_if_needed"} | BUDGET_HOOKS,
    RewardModelTrainer: {"_prepare_dataset", "_set_signature_columns_if_needed", "prediction_step"} | BUDGET_HOOKS,
    OnlineTrainer: {
        "_get_train_sampler",
        "_calculate_rewards",
        "_generate",
        "_generate_and_score_completions",
        "_get_per_token_logps_and_entropies",
        "_prepare_inputs",
    },
}
SHARED_HOOKS = {"compute_loss", "get_batch_samples", "_get_dataloader", "evaluate", "log", "create_model_card"} | {
    "_init_training_state",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_save_checkpoint",
    "create_optimizer",
    "predict",
    "save_model",
}


def test_signature_of_the_engine() -> None:
    engine = pytest.importorskip("deepspeed").DeepSpeedEngine
    assert parameters(engine._zero3_consolidated_16bit_state_dict) == ["self", "exclude_frozen_parameters"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (PreferenceTrainer, DPOTrainer),
        (SupervisedTrainer, SFTTrainer),
        (OnlineTrainer, GRPOTrainer),
        (RewardModelTrainer, RewardTrainer),
    ],
)
def test_every_override_has_something_to_override(ours: type, theirs: type) -> None:
    """A renamed hook upstream would leave ours uncalled, without an error."""
    before = ours.__mro__[: ours.__mro__.index(theirs)]
    classes = [cls for cls in before if cls.__module__.startswith(("alignkit.references", "alignkit.shapes"))]
    overridden = {name for cls in classes for name in vars(cls) if name in dir(theirs)}
    functions = {name for name in overridden if inspect.isfunction(getattr(ours, name))}
    assert functions - {"__init__"} == SHARED_HOOKS | OWN_HOOKS[ours]


def test_a_checkpoint_is_written_before_callbacks_are_told_and_loaded_once_everything_is_wrapped() -> None:
    saving = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert (
        saving.count("self._save_checkpoint(model, trial)\n            self.control = self.callback_handler.on_save(")
        == 1
    )
    assert 'checkpoint_folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"' in inspect.getsource(
        Trainer._save_checkpoint
    )
    # Everywhere from the path that ``train`` has made of True, and never without one.
    source = inspect.getsource(Trainer._prepare_for_training)
    load = "            self._load_optimizer_and_scheduler(resume_from_checkpoint)\n"
    assert source.count(load) == 1 and inspect.getsource(Trainer).count("_load_optimizer_and_scheduler(") == 2
    before, after = source.split(load)
    assert before.rindex("if resume_from_checkpoint is not None:\n") > before.rindex("self.accelerator.prepare(")
    assert "deepspeed_load_checkpoint(" in before and "self.accelerator.prepare" not in after
    loop = inspect.getsource(Trainer._inner_training_loop)
    assert loop.index("self._prepare_for_training(") < loop.index("self.callback_handler.on_train_begin(")
    assert "resume_from_checkpoint = get_last_checkpoint(args.output_dir)" in inspect.getsource(Trainer.train)


def test_completions_are_drawn_and_rewarded_once_a_draw() -> None:
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert source.count("self._generate(prompts)") == source.count("self._calculate_rewards(") == 1
    assert source.index("self._generate(prompts)") < source.index("self._calculate_rewards(")
    first = "return prompt_ids, completion_ids, tool_mask, completions, logprobs, "
    assert first in inspect.getsource(GRPOTrainer._generate)


def test_the_epoch_of_a_stream_is_counted_in_batches_of_the_run() -> None:
    assert "self.state.epoch = epoch + (step + 1) / steps_in_epoch" in inspect.getsource(Trainer._run_epoch)
    counted = inspect.getsource(Trainer.set_initial_training_values)
    assert "else max_steps * args.gradient_accumulation_steps" in counted


def test_gradients_are_exchanged_after_the_last_item_of_a_step() -> None:
    source = inspect.getsource(Trainer._run_epoch)
    fetched = source.index("self.get_batch_samples(epoch_iterator, num_batches, self.args.device)")
    told = source.index("self.accelerator.gradient_state._set_sync_gradients(do_sync_step)")
    last, run = source.index("i == len(batch_samples) - 1"), source.index("self.training_step(model, inputs, num_items")
    assert fetched < told < last < run < source.index("self.floating_point_ops(inputs)")
    assert "_track_num_input_tokens(inputs)" in source
    assert '"collate_fn": data_collator' in inspect.getsource(Trainer._get_dataloader)
    wrapper = inspect.getsource(DeepSpeedEngineWrapper.backward)
    assert "set_gradient_accumulation_boundary(is_boundary=sync_gradients)" in wrapper
    assert wrapper.index("if sync_gradients:") < wrapper.index("self.engine.step()")
    assert "sync_gradients=self.sync_gradients" in inspect.getsource(Accelerator.backward)


def test_supervised_rows_are_packed_and_otherwise_left_alone() -> None:
    source = inspect.getsource(SFTTrainer._prepare_dataset)
    assert 'is_processed = "input_ids" in column_names' in source
    assert 'if "labels" not in column_names:' in source
    assert "if args.max_length is not None and not packing:" in source
    init = inspect.getsource(SFTTrainer.__init__)
    assert (
        'self.padding_free = args.padding_free or (args.packing and args.packing_strategy in {"bfd", "bfd_split"})'
        in init
    )
    assert 'outputs=("log_probs", "entropy", "is_top1")' in init
    assert "self.aux_loss_enabled" in init and "self.router_aux_loss_coef" in init
    assert "self._metrics[mode].items()" in inspect.getsource(SFTTrainer.log)
    assert "self.compute_loss(model, inputs, return_outputs=False)" in inspect.getsource(SFTTrainer.prediction_step)


def test_the_collator_of_packed_rows_marks_their_boundaries() -> None:
    collator = sft_trainer.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collator([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}])
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5]]
    assert "attention_mask" not in batch


def test_the_hooks_are_called_where_we_think() -> None:
    source = inspect.getsource(DPOTrainer.__init__)
    assert "self._prepare_dataset(train_dataset, processing_class, args" in source
    assert "self.train_dataset = self._precompute_ref_logps(" in source
    assert "hash_module(self.ref_model or self.model) if args.precompute_ref_log_probs else None" in source
    assert "if self.precompute_ref_logps:" in inspect.getsource(DPOTrainer.evaluate)
    ready = source.index("self.ref_model = self.accelerator.prepare_model(")
    assert ready < source.index("self._precompute_ref_logps("), (
        "the reference model is placed when it is first asked for"
    )
    assert 'self.aux_loss_enabled = hasattr(text_config, "output_router_logits") and self.router_aux_loss' in source
    assert 'getattr(text_config, "router_aux_loss_coef", 0.0) if coef is None else coef' in source
    head = inspect.getsource(trainer_utils.add_fused_lm_head)
    assert 'kwargs.setdefault("output_router_logits", True)' in head, "where the config asks for router logits"
    log = inspect.getsource(DPOTrainer.log)
    assert "sum(val) / len(val) for key, val in self._metrics[mode].items()" in log
    assert "num_items_in_batch=num_items_in_batch" in inspect.getsource(Trainer.training_step)
    assert "self.loss_is_scaled_for_ga is not None" in inspect.getsource(Trainer.training_step)
    assert "self.create_model_card(" in inspect.getsource(DPOTrainer._save_checkpoint)


def test_fused_output_has_the_fields_that_are_read() -> None:
    fields = {field.name for field in dataclasses.fields(trainer_utils.FusedCausalLMOutput)}
    assert {"log_probs", "entropy", "is_top1", "label_mask", "aux_loss"} <= fields


def test_fused_head_scores_shift_labels_and_only_log_probs_and_entropy_carry_gradients() -> None:
    config = Qwen3Config(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = AutoModelForCausalLM.from_config(config)
    trainer_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    ids = torch.tensor([[3, 4, 5, 6]])
    labels = torch.tensor([[4, -100, 6, 7]])
    output = model(input_ids=ids, shift_labels=labels, fused_lm_head=True)
    logits = model(input_ids=ids).logits.log_softmax(-1)
    expected = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    torch.testing.assert_close(output.log_probs, expected)
    assert output.log_probs.requires_grad
    assert output.entropy.requires_grad
    assert not output.mean_logits.requires_grad


@pytest.mark.parametrize("attention", ["sdpa", *_segments.OWN.values()])
def test_four_dimensional_masks_pass_untouched(attention: str) -> None:
    config = Qwen3Config(num_hidden_layers=1)
    config._attn_implementation = attention
    mask = _segments.packed_mask()
    passed = create_causal_mask(
        config=config, inputs_embeds=torch.zeros(1, 4, 8), attention_mask=mask, past_key_values=None, position_ids=None
    )
    assert passed is mask


def test_what_attention_is_handed_reaches_it_and_each_family_has_its_eager_form() -> None:
    model = AutoModelForCausalLM.from_config(Qwen3Config(num_hidden_layers=1, hidden_size=16, head_dim=8, vocab_size=8))
    seen = []

    def looking(layer: Any, query: Any, key: Any, value: Any, mask: Any, **how: Any) -> Any:
        seen.append(how["packed_parts"])
        return query.transpose(1, 2), None

    AttentionInterface.register("looking", looking)
    model.set_attn_implementation("looking")
    model(torch.zeros(1, 3, dtype=torch.long), attention_mask=_segments.packed_mask(), packed_parts="here")
    assert seen == ["here"]
    assert _segments._eager_of(model.model.layers[0].self_attn) is modeling_qwen3.eager_attention_forward


def test_torch_has_a_kernel_for_rows_of_varying_length() -> None:
    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa"} <= set(names)


def test_completions_are_drawn_and_kept_as_the_online_trainer_takes_them_to_be() -> None:
    names = parameters(GRPOTrainer._get_per_token_logps_and_entropies)
    assert names[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    prepare = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "generate_every = self.args.steps_per_generation * self.num_iterations" in prepare
    assert "self._step % generate_every == 0 or self._buffered_inputs is None" in prepare
    assert "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]" in prepare
    score = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert score.count("self.beta != 0.0") == 1 and "rewards.view(-1, num_generations)" in score
    for what in ('"prompt"].extend(gather_object(prompts))', '"completion"].extend(gather_object(completions))'):
        assert f"self._logs[{what}" in score
    assert 'self._logs["advantages"].extend(all_process_advantages.tolist())' in score
    assert "rewards_per_func = gather(rewards_per_func)\n" in inspect.getsource(GRPOTrainer._calculate_rewards)
    assert "ids[-1] not in eos_and_pad for ids in completion_ids" in inspect.getsource(GRPOTrainer._generate)
    assert "torch.randperm(self.num_samples, generator=self.generator)" in inspect.getsource(
        trainer_utils.RepeatSampler.__iter__
    )


def test_rewards_are_read_off_the_last_token_that_is_no_padding_under_a_head_called_score() -> None:
    source = inspect.getsource(inspect.unwrap(GenericForSequenceClassification.forward))
    assert "logits = self.score(hidden_states)" in source and "(token_indices * non_pad_mask).argmax(-1)" in source
    trl = inspect.getsource(RewardTrainer.__init__)
    assert "model.config.get_text_config().pad_token_id = processing_class.pad_token_id" in trl


def test_routers_are_recorded_as_the_bridge_to_them_reads_it() -> None:
    fields = {field.name for field in dataclasses.fields(OutputRecorder)}
    assert {"target_class", "index"} <= fields and PreTrainedModel._can_record_outputs is None
    for module, router, index in (
        ("olmoe", "OlmoeTopKRouter", 0),
        ("llama4", "Llama4Router", 1),
        ("dbrx", "DbrxRouter", 0),
    ):
        modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        (recorded,) = {
            (cls._can_record_outputs["router_logits"].target_class, cls._can_record_outputs["router_logits"].index)
            for cls in vars(modeling).values()
            if inspect.isclass(cls) and (getattr(cls, "_can_record_outputs", None) or {}).get("router_logits")
        }
        assert recorded == (getattr(modeling, router), index)
    assert "self.base_layer(x, *args, **kwargs)" in inspect.getsource(ParamWrapper.forward)


def test_scores_of_routers_are_those_in_their_source() -> None:
    """PhiMoE's is in a function beside the router, DBRX's in the block around it."""
    sources = {}
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        if "OutputRecorder(" in text:
            classes = re.findall(r"^class (\w+)\(.*?(?=^class |^@|^def |\Z)", text, flags=re.M | re.S)
            bodies = re.findall(r"^class \w+\(.*?(?=^class |^@|^def |\Z)", text, flags=re.M | re.S)
            sources.update(zip(classes, bodies, strict=True))
    known = _routers.SOFTMAX_ROUTERS | _routers.SIGMOID_ROUTERS
    assert not _routers.SOFTMAX_ROUTERS & _routers.SIGMOID_ROUTERS and not known & set(_routers.REFUSED)
    assert known | set(_routers.REFUSED) <= set(sources)
    for router in known - {"PhimoeTopKRouter", "DbrxRouter"}:
        words = {word for word in ("softmax", "sigmoid") if word in sources[router].partition("def forward")[2]}
        assert words == {"softmax" if router in _routers.SOFTMAX_ROUTERS else "sigmoid"}, router


def test_lora_layers_leave_forward_and_merging_to_their_variant() -> None:
    layers = [lora_layer.Linear]
    if importlib.util.find_spec("bitsandbytes"):
        layers += [lora_bnb.Linear4bit, lora_bnb.Linear8bitLt]
    for layer in layers:
        merging, back = inspect.getsource(layer.merge), inspect.getsource(layer.unmerge)
        assert "self.lora_variant[active_adapter].forward(" in inspect.getsource(layer.forward)
        assert "self.lora_variant[active_adapter].merge_safe(self, active_adapter, " in merging
        assert "self.lora_variant[active_adapter].unmerge(self, active_adapter, " in back
    assert "merge_unsafe(self, active_adapter, base_layer.weight)" in inspect.getsource(lora_layer.Linear.merge)
    assert parameters(lora_layer.LoraVariant.merge_safe) == ["module", "active_adapter", "orig_weight"]
    assert "self._caches: dict[str, Any] = {}" in inspect.getsource(lora_layer.LoraLayer.__init__)
    assert parameters(BufferDict.__init__) == ["self", "buffers", "persistent"]


def test_decoder_layers_checkpoint_what_kernels_compile() -> None:
    layer = modeling_qwen3.Qwen3DecoderLayer
    assert parameters(inspect.unwrap(layer.forward))[:2] == ["self", "hidden_states"]
    assert set(parameters(inspect.unwrap(layer.forward))) & set(_kernels.CACHES)
    source = inspect.getsource(GradientCheckpointingLayer)
    what = "forward, self" if _kernels.CHECKPOINTS_FORWARD else "super().__call__"
    assert f"self._gradient_checkpointing_func(partial({what}, **kwargs), *args)" in source
