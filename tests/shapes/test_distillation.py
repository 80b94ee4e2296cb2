"""Distillation in a supervised trainer: whose distributions, of which tokens, at what cost, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from alignkit.errors import ModelError
from alignkit.models import _distillation
from alignkit.parts.method import load_method
from alignkit.pruning import report
from alignkit.references._teacher import Teacher
from alignkit.references.models import check_other
from alignkit.references.teachers import PRUNING_REPORT, load_teacher, teacher_models
from alignkit.shapes._tokens import METRICS, SupervisedTrainer
from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of, text_rows
from tests.shapes.test_supervised_trainer import SPLITS, TRAINER_KEYS, evaluated
from tests.supervised import arguments, completions, lora, make, model, token_rows, tokenizer
from tests.trainers import flat_weights, logged


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Sixteen rows of which the completions are trained."""
    return token_rows(completions(16))


def distilling(
    output_dir: Path,
    rows: Dataset,
    policy: PreTrainedModel | None = None,
    teacher: PreTrainedModel | None = None,
    peft_config: LoraConfig | None = None,
    options: dict[str, float] | None = None,
    **changes: Any,
) -> SupervisedTrainer:
    """A trainer whose policy, where it has no adapter, is taught by another model."""
    method = load_method("distill")
    evaluation, layout = changes.pop("eval_dataset", None), changes.pop("layout", "auto")
    return SupervisedTrainer(
        policy or model(),
        arguments(output_dir, **changes),
        method=method,
        layout=layout,
        options=method.options(**(options or {})),
        train_dataset=rows,
        eval_dataset=evaluation,
        processing_class=tokenizer(),
        teacher=teacher,
        peft_config=peft_config,
    )


def family(kind: str, width: int = 32, **changes: Any) -> PreTrainedModel:
    """A tiny model of another family, whose distributions are far from uniform."""
    torch.manual_seed(width)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer()), hidden_size=width, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=tokenizer().pad_token_id,
        bos_token_id=0, eos_token_id=0, initializer_range=0.3, attn_implementation="eager", **changes,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def dense_kl(teacher: Any, student: Any, rows: Dataset, temperature: float) -> Tensor:
    """The mean over trained tokens from whole logits in float64, row by row, by transformers alone."""
    found = []
    for row in rows:
        ids, trained = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:]) != -100
        with torch.no_grad():
            p, q = (
                (each(input_ids=ids).logits[0, :-1].double() / temperature).softmax(-1)[trained]
                for each in (teacher, student)
            )
        found.append((p * (p.log() - q.log())).sum(-1))
    return torch.cat(found).mean()


HEADS = {
    "Gemma 2 bounds its logits": {"kind": "gemma2", "final_logit_softcapping": 3.0},
    "Granite divides them": {"kind": "granite", "logits_scaling": 4.0},
    "Cohere multiplies them": {"kind": "cohere", "logit_scale": 0.25},
    "Phi adds a bias": {"kind": "phi"},
    "plain": {"kind": "qwen3"},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("packing", [False, True])
def test_the_divergence_is_that_of_the_models_own_logits(
    head: str, packing: bool, rows: Dataset, tmp_path: Path
) -> None:
    """Of two models of one family and different widths; the policy is what transformers makes of it, and no other."""
    policy, teacher = (family(**HEADS[head], width=width) for width in (32, 48))
    if head == "Phi adds a bias":
        for each in (policy, teacher):
            torch.nn.init.normal_(each.lm_head.bias)
    expected = dense_kl(teacher, policy, rows, temperature=1.5)
    how = {"packing": True, "max_length": 256, "eval_packing": True} if packing else {}
    trainer = distilling(tmp_path, rows, policy, teacher, options={"kd_temperature": 1.5}, eval_dataset=rows, **how)
    found = trainer.evaluate()["eval_loss/kl"]
    assert found == pytest.approx(expected.item(), rel=1e-4) and found > 0.05


def test_the_teacher_of_an_adapter_is_the_policy_without_it(rows: Dataset, tmp_path: Path) -> None:
    """In training mode too, where dropout is the policy's alone and all is as it was when the teacher is done."""
    base, config = model(attention_dropout=0.3), lora()
    config.lora_dropout, config.modules_to_save = 0.5, ["lm_head"]
    trainer = distilling(tmp_path, rows, base, peft_config=config, options={"kd_temperature": 2.0})
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    trainer.model.eval()
    expected = dense_kl(model(), trainer.model, rows, temperature=2.0)
    trainer.model.train()
    batch = trainer.data_collator(list(rows))
    teacher = trainer.teacher
    assert teacher is not None
    first, second = (teacher.states({k: v for k, v in batch.items() if k != "row_tokens"}) for _ in range(2))
    assert torch.equal(first.hidden, second.hidden) and not first.hidden.requires_grad
    assert trainer.model.training and all(p.requires_grad for n, p in trainer.model.named_parameters() if "lora_" in n)
    trainer.model.eval()
    _, output = trainer.evaluate_objective(trainer.model, batch)
    kl = {term.name: term for term in output.terms}["kl"]
    assert (kl.values.sum() / kl.num_items).item() == pytest.approx(expected.item(), rel=1e-4)
    assert kl.weight == 0.5 * 2.0**2 and expected > 0.05


def test_without_a_share_of_the_teacher_a_run_is_sft_to_the_last_bit(rows: Dataset, tmp_path: Path) -> None:
    plain = make(tmp_path, rows, max_steps=3)
    taught = distilling(tmp_path, rows, options={"kd_alpha": 0.0}, layout="padded", max_steps=3)
    for trainer in (plain, taught):
        trainer.train()
    assert taught.teacher is None
    assert logged(plain, "loss") == logged(taught, "loss")
    assert torch.equal(flat_weights(plain.model), flat_weights(taught.model))


def test_an_adapter_that_has_not_moved_learns_nothing_from_itself(rows: Dataset, tmp_path: Path) -> None:
    trainer = distilling(tmp_path, rows, peft_config=lora(), options={"kd_alpha": 1.0}, max_steps=2)
    before = flat_weights(trainer.model)
    trainer.train()
    assert logged(trainer, "loss") == logged(trainer, "grad_norm") == [0.0, 0.0]
    assert logged(trainer, "distill/top1_agreement") == [1.0, 1.0] and logged(trainer, "loss/nll")[0] > 1
    assert torch.equal(flat_weights(trainer.model), before)


def test_a_student_comes_to_resemble_its_teacher_alone(rows: Dataset, tmp_path: Path) -> None:
    trainer = distilling(
        tmp_path, rows, teacher=model(hidden_size=48), options={"kd_alpha": 1.0}, max_steps=20,
        learning_rate=2e-2, per_device_train_batch_size=16, eval_dataset=rows,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss/kl"] < 0.5 * before["eval_loss/kl"]
    assert after["eval_distill/top1_agreement"] > before["eval_distill/top1_agreement"] + 0.1
    assert set(trainer.state.log_history[1]) - TRAINER_KEYS == {
        *METRICS, *load_method("distill").metrics, "loss/nll", "loss/kl",
    }  # fmt: skip


def test_splitting_a_step_changes_nothing_and_an_evaluation_does_not_depend_on_its_batches(
    rows: Dataset, tmp_path: Path
) -> None:
    runs = []
    for size, steps in SPLITS:
        trainer = distilling(
            tmp_path, rows, teacher=model(hidden_size=48), per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, max_steps=2, per_device_eval_batch_size=size, eval_dataset=rows,
        )  # fmt: skip
        found = evaluated(trainer)
        trainer.train()
        runs.append((found, {key: logged(trainer, key) for key in ("loss", "grad_norm", "loss/kl", "loss/nll")}))
    for found, steps_of in runs[1:]:
        assert found == pytest.approx(runs[0][0], abs=1e-5, rel=1e-5)
        for key, values in steps_of.items():
            assert values == pytest.approx(runs[0][1][key], abs=1e-5), key


@pytest.mark.parametrize("kind", ["adapter", "second model"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(kind: str, rows: Dataset, tmp_path: Path) -> None:
    def run() -> SupervisedTrainer:
        how: Any = {"peft_config": lora()} if kind == "adapter" else {"teacher": model(hidden_size=48)}
        steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        return distilling(tmp_path, rows, gradient_checkpointing=True, **how, **steps)

    whole, resumed = run(), run()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(flat_weights(resumed.model), flat_weights(whole.model))
    assert logged(resumed, "loss/kl") == logged(whole, "loss/kl") and logged(whole, "loss/kl")[-1] > 0


def test_a_head_that_its_config_does_not_describe_is_refused(
    rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_distillation, "FACTORS", ())
    with pytest.raises(ModelError, match=r"the policy, CohereForCausalLM.*does more than its config says"):
        distilling(tmp_path, rows, family("cohere", logit_scale=4.0), family("cohere", 48, logit_scale=4.0))


def test_a_teacher_of_another_vocabulary_or_under_fsdp_is_refused(rows: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has 400 next tokens and the policy .* 300.*Write a teacher of the same"):
        distilling(tmp_path, rows, teacher=model(vocab_size=400))
    with pytest.raises(ModelError, match="not available under FSDP.*zero3"):
        Teacher(SimpleNamespace(is_fsdp_enabled=True), None, 1.0)


# --- whose weights teach ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model that was not pruned."""
    folder = tmp_path_factory.mktemp("dense")
    save_model(folder)
    return folder


def write_report(folder: Path, model_name: str, revision: str | None = None) -> None:
    """What ``alignkit prune`` says of the model it was given, written by itself."""
    size = SimpleNamespace(axes=SimpleNamespace(layers=2, kv_groups=1, head_dim=16))
    told = {key: {} for key in ("dense", "pruned", "model_type", "dtype", "is_tied", "exact", "verification", "notes")}
    export: Any = SimpleNamespace(dense=size, pruned=size, dtype="float32", plan="", to_json=lambda: told)
    origin = report.Origin(model_name, revision, adapter=None, adapter_kind=None, choice={}, card=None)
    report.write_report(folder, export, origin, None)


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """Folder of what a model of the Hub was pruned to, with the report on that."""
    folder = tmp_path / "pruned"
    folder.mkdir()
    save_model(folder)
    write_report(folder, "org/dense")
    return folder


def config(folder: Path, path: Path, parametrization: str = "full", **keys: Any) -> Any:
    return config_of("sft", str(path), folder, method="distill", parametrization=parametrization, **keys)


def test_base_is_what_the_report_names_else_the_policy_without_its_adapter(
    dense: Path, pruned: Path, tmp_path: Path
) -> None:
    for parametrization in ("full", "lora"):
        assert teacher_models(config(tmp_path, pruned, parametrization)) == {"teacher": "org/dense"}
    plain = config(tmp_path, dense, "lora")
    assert teacher_models(plain) == {} and load_teacher(plain) is None
    assert teacher_models(config(tmp_path, dense, teacher=str(pruned))) == {"teacher": str(pruned)}
    assert teacher_models(config(tmp_path, dense, kd_alpha=0.0)) == {}


def test_a_run_is_taught_by_the_model_it_names(dense: Path, pruned: Path, tmp_path: Path) -> None:
    of_pruned = config(tmp_path, pruned, teacher=str(dense), attn_implementation="eager")
    loaded = load_teacher(of_pruned)
    assert loaded is not None and loaded.name_or_path == str(dense)
    assert loaded.config._attn_implementation == "eager" and loaded.dtype == torch.float32
    trainer = build(of_pruned, text_rows(of_pruned, 8))
    trainer.train()
    assert logged(trainer, "loss/kl")[0] == 0 and logged(trainer, "loss/kl")[-1] > 0, (
        "the weights are the same at first"
    )


@pytest.mark.parametrize(
    ("parametrization", "shape"),
    [
        ("pat", {"hidden": 128, "num_key_value_heads": 2}),
        ("atp", {"hidden": 64, "num_key_value_heads": 2}),
        ("routers", {"num_experts": 4}),
    ],
)
def test_an_adapter_is_taught_by_the_model_under_it(
    parametrization: str, shape: dict[str, int], tmp_path: Path
) -> None:
    """Also where it prunes while it tunes: the teacher stays the whole model, and what trains is not disturbed."""
    save_model(tmp_path, **({"num_attention_heads": 4} | shape))
    chosen = config(tmp_path, tmp_path, parametrization, max_steps=6, learning_rate=1e-2)
    trainer = build(chosen, text_rows(chosen, 16))
    trainer.train()
    assert logged(trainer, "loss/kl")[-1] > max(logged(trainer, "loss/kl")[0], 1e-4), "the policy moved away from it"
    batch, trained = next(iter(trainer.get_train_dataloader())), trained_names(trainer.model)
    found = trainer.teacher.states({key: batch[key] for key in ("input_ids", "attention_mask", "labels")})
    assert trained_names(trainer.model) == trained != []
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        hidden = plain.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, :-1]
    torch.testing.assert_close(found.hidden, hidden[batch["labels"][:, 1:] != -100], rtol=1e-5, atol=1e-5)


def trained_names(of: Any) -> list[str]:
    return [name for name, parameter in of.named_parameters() if parameter.requires_grad]


def test_base_is_refused_where_there_is_none(dense: Path, pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=rf"full: the weights of '{dense}' train.*Write teacher: .*or train an adapter"
    ):
        teacher_models(config(tmp_path, dense))
    write_report(pruned, str(dense.parent / "gsm-tiny"))
    with pytest.raises(ModelError, match="a folder called 'gsm-tiny'.*Write teacher: the path of gsm-tiny"):
        teacher_models(config(tmp_path, pruned))
    write_report(pruned, "org/dense", "v2")
    with pytest.raises(
        ModelError, match=r"org/dense at revision v2.*hf download org/dense --revision v2.*teacher: DIR"
    ):
        teacher_models(config(tmp_path, pruned))
    for content in ('{"made_of": 1}', '{"plan": 1}', "{", "[]"):
        (pruned / PRUNING_REPORT).write_text(content)
        with pytest.raises(ModelError, match=r"cannot be read as a pruning report.*Write teacher:"):
            teacher_models(config(tmp_path, pruned))


def test_a_teacher_with_other_token_ids_is_refused_before_anything_is_loaded(dense: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    model().save_pretrained(other)
    tokenizer().save_pretrained(other)
    chosen = config(tmp_path, dense, teacher=str(other))
    with pytest.raises(ModelError, match=r"`teacher: .*other` has other token ids.*Write a teacher with the same"):
        for key, path in teacher_models(chosen).items():
            check_other(chosen, AutoTokenizer.from_pretrained(dense), key, path)
