"""Normalisation, packing, metrics and conformance of the supervised bridge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AttentionInterface, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl import SFTTrainer
from trl.chat_template_utils import qwen3_chat_template

from alignkit.errors import ModelError
from alignkit.models._comparison import ScoringRun
from alignkit.models._forward import LOGP_TOLERANCE
from alignkit.shapes._tokens import METRICS, packing_difference, template_with_marks
from tests.models.test_comparison import scored
from tests.supervised import arguments, completions, conversations, make, model, token_rows, tokenizer
from tests.trainers import flat_weights, logged

TRAINER_KEYS = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
SPLITS = [(4, 1), (2, 2), (1, 4)]


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Sixteen rows of which the completions are trained."""
    return token_rows(completions(16))


def evaluated(trainer: Any) -> dict[str, float]:
    """An evaluation without its timings."""
    return {k: v for k, v in trainer.evaluate().items() if not k.endswith(("time", "second"))}


def test_splitting_a_step_into_micro_batches_changes_nothing(rows: Dataset, tmp_path: Path) -> None:
    """Completions differ in length, so a mean of means would show, in the loss and in the metrics."""
    runs = []
    for size, steps in SPLITS:
        trainer = make(tmp_path, rows, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        trainer.train()
        runs.append(trainer)
    for other in runs[1:]:
        for key in ("loss", "grad_norm", "loss/nll", "entropy", "mean_token_accuracy", "num_tokens"):
            assert logged(other, key) == pytest.approx(logged(runs[0], key), abs=1e-5), key


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_does_not_depend_on_the_batch_size(packing: bool, rows: Dataset, tmp_path: Path) -> None:
    how = {"packing": packing, "max_length": 256 if packing else None, "eval_dataset": rows}
    first, *others = [evaluated(make(tmp_path, rows, per_device_eval_batch_size=n, **how)) for n in (1, 3, 16)]
    for other in others:
        assert other == pytest.approx(first, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_do_not_see_each_other(attention: str, rows: Dataset, tmp_path: Path) -> None:
    """Evaluated behind one another in a single sequence, rows score what they score apart."""
    policy = model(attn_implementation=attention)
    assert packing_difference(scored(policy)) < 1e-5
    apart = evaluated(make(tmp_path, rows, model=policy, eval_dataset=rows))
    packed = make(
        tmp_path, rows, model=model(attn_implementation=attention), packing=True, max_length=256, eval_dataset=rows
    )
    assert packed.padding_free and len(packed.train_dataset) < len(rows)
    assert evaluated(packed) == pytest.approx(apart, abs=1e-5)


def test_attention_that_knows_no_boundaries_is_refused(rows: Dataset, tmp_path: Path) -> None:
    """A registered attention function without a mask function is given no mask: rows would see each other."""
    AttentionInterface.register("without_masks", sdpa_attention_forward)
    policy = model(attn_implementation="without_masks")
    assert packing_difference(scored(policy)) > 0.1
    # In 16 bit a token in a hundred may be off by any amount, but not both of a short row beside a long one.
    long_and_short = [[i % 90 for i in range(400)], [5, 9, 7]]
    in_bfloat16 = ScoringRun("the policy", policy, "bfloat16")
    assert packing_difference(in_bfloat16, long_and_short) > LOGP_TOLERANCE["bfloat16"]
    with pytest.raises(ModelError, match=r"attn_implementation: without_masks.*see each other.*Write attn_impl"):
        make(tmp_path, rows, model=policy, packing=True, max_length=256)
    make(tmp_path, rows, model=policy)


def test_packed_rows_are_compared_without_their_logits() -> None:
    """Logits of a packed row of 8,192 tokens and a vocabulary of 151,936 take 5 GB in float32, several times over."""
    policy = model()
    run = scored(policy)
    policy.lm_head.register_forward_hook(lambda *unused: pytest.fail("the model's own head was run"))
    assert packing_difference(run, [[(7 * i) % 290 for i in range(200)], [5], [9, 7, 4]]) < LOGP_TOLERANCE["float32"]


def test_the_last_rows_of_an_evaluation_count_once(rows: Dataset, tmp_path: Path) -> None:
    """Accelerate repeats rows to fill the last batch; masked, they are as if they were not there."""
    for packing in (False, True):
        trainer = make(tmp_path, rows, packing=packing, max_length=256 if packing else None)
        few, more = (trainer.data_collator([rows[i] for i in range(n)]) for n in (2, 4))
        assert trainer.num_rows(more) == 4
        kept = trainer.keep_rows(more, 2)
        assert trainer.item_counts(kept)["token"] == trainer.item_counts(few)["token"] > 0
        assert trainer.item_counts(trainer.keep_rows(more, 4))["token"] == trainer.item_counts(more)["token"]
        losses = [trainer.batch_loss(trainer.model, batch, None, record=False).item() for batch in (kept, few)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_evaluated_twice_counts_once(packing: bool, rows: Dataset, tmp_path: Path) -> None:
    trainer = make(tmp_path, rows, packing=packing, max_length=256 if packing else None)
    batch = next(iter(trainer.get_train_dataloader()))
    before = {key: value.clone() if torch.is_tensor(value) else value for key, value in batch.items()}
    trainer.model.train()
    counts = torch.stack(list(trainer.item_counts(batch).values()))
    twice = [trainer.batch_loss(trainer.model, batch, counts, record=record) for record in (False, True)]
    assert twice[0].item() == twice[1].item() and twice[0].requires_grad
    assert set(batch) == set(before)
    logs = {"loss": 0.0}
    trainer.log(logs)
    assert logs["loss/nll"] == pytest.approx(twice[0].item(), rel=1e-6)
    size = batch["input_ids"].numel() if packing else batch["attention_mask"].sum().item()
    assert logs["num_tokens"] == size
    assert trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts).item() == twice[0].item()


def test_tokens_are_counted_on_after_a_resumption(rows: Dataset, tmp_path: Path) -> None:
    trainer = make(tmp_path, rows, max_steps=2)
    trainer.state.log_history.append({"loss": 1.0, "num_tokens": 1000, "step": 2})
    logs = {"loss": 0.0}
    trainer.model.train()
    trainer.log(logs)
    assert logs["num_tokens"] == 1000


def test_exactly_the_documented_metrics_are_logged(rows: Dataset, tmp_path: Path) -> None:
    trainer = make(tmp_path, rows, max_steps=2, eval_dataset=rows, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert set(trainer.state.log_history[0]) - TRAINER_KEYS == {*METRICS, "loss/nll"}
    (evaluation,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    found = {key.removeprefix("eval_") for key in evaluation if key.startswith("eval_")}
    assert found >= {"loss/nll", "entropy", "mean_token_accuracy"} and "num_tokens" not in found
    assert evaluation["eval_loss"] == evaluation["eval_loss/nll"]


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_conformance_memorises_eight_rows(peft: bool, tmp_path: Path) -> None:
    rows = token_rows(completions(8))
    trainer = make(
        tmp_path, rows, peft, max_steps=40, per_device_train_batch_size=8, learning_rate=3e-2 if peft else 1e-2
    )
    trainer.train()
    assert logged(trainer, "loss")[-1] < 0.5 * logged(trainer, "loss")[0]
    if peft:
        assert all("lora_" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


def test_gradient_checkpointing_changes_no_number_with_packing(rows: Dataset, tmp_path: Path) -> None:
    weights = []
    for enabled in (False, True):
        trainer = make(tmp_path, rows, packing=True, max_length=256, max_steps=3, gradient_checkpointing=enabled)
        trainer.train()
        weights.append(flat_weights(trainer.model))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-7, rtol=1e-6)


def test_a_mixture_of_experts_follows_trl_with_its_auxiliary_loss(tmp_path: Path) -> None:
    def mixture() -> Qwen3MoeForCausalLM:
        torch.manual_seed(0)
        dense = model().config.to_dict()
        kept = {
            k: dense[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
        }
        config = Qwen3MoeConfig(
            **kept, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            output_router_logits=True, router_aux_loss_coef=0.1,
        )  # fmt: skip
        return Qwen3MoeForCausalLM(config)

    how = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 3}
    theirs = SFTTrainer(
        mixture(),
        args=arguments(tmp_path / "theirs", **how),
        train_dataset=Dataset.from_list(completions()),
        processing_class=tokenizer(),
    )
    ours = make(tmp_path / "ours", token_rows(completions()), model=mixture(), **how)
    for trainer in (theirs, ours):
        trainer.train()
    assert logged(ours, "loss") == logged(theirs, "loss")
    assert logged(ours, "aux_loss") == pytest.approx(logged(theirs, "aux_loss"), rel=1e-6)
    assert torch.equal(flat_weights(ours.model), flat_weights(theirs.model))


def test_marks_of_the_assistant_are_found_made_or_asked_for() -> None:
    own = tokenizer()
    assert template_with_marks(own) is None
    known, unknown = (type(own)(tokenizer_object=own.backend_tokenizer, eos_token="<|endoftext|>") for _ in range(2))
    assert template_with_marks(known) is None, "no template, nothing to mark"
    known.chat_template = qwen3_chat_template
    assert "{% generation %}" in str(template_with_marks(known))
    unknown.chat_template = own.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    with pytest.raises(ModelError, match=r"\{% generation %\} before and .*chat_template: FILE"):
        template_with_marks(unknown)


def test_no_logits_are_ever_returned(tmp_path: Path) -> None:
    trainer = make(tmp_path, token_rows(conversations(4)))
    with pytest.raises(NotImplementedError, match=r"alignkit evaluate"):
        trainer.compute_loss(trainer.model, {}, return_outputs=True)
