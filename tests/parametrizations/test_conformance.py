"""What every parametrisation must do, whichever it is: one joins by its file in ``alignkit/parametrizations``.

Trained is on pairs, with a reference: what the model was when training began.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.errors import ModelError
from alignkit.losses.types import CandidateBatch, LossOutput
from alignkit.models.adapter_config import is_sparse_kind
from alignkit.models.export import merge_adapter
from alignkit.models.files import read_adapter
from alignkit.models.loading import ModelSource, load_adapter, load_model
from alignkit.parts.parametrization import load_parametrization, parametrization_names
from alignkit.parts.shape import load_bridge, load_shape
from alignkit.pruning.export import pruned_model
from alignkit.pruning.learnt import learnt
from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of, text_rows
from tests.trainers import logged

NAMES = parametrization_names()
PROMPTS = [[5, 9, 12, 30, 7], [20, 3, 41]]
KEYS = {"method": "dpo", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1.0e-2}
NEEDED = {"peft": {"peft_type": "ia3"}}
"""What a config says besides, of a parametrisation that is many."""

NEEDED_SHAPE = {"atp": {"num_attention_heads": 4, "num_key_value_heads": 2}, "routers": {"num_experts": 4}}
"""Of a model with a place for it, where not every model has one."""

WHOLE = ("full", "sparse")
"""Those under which every weight trains."""

for_every_parametrization = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folder of a tiny model for each of them."""
    folders = {}
    for name in NAMES:
        shape = NEEDED_SHAPE.get(name, {})
        path = tmp_path_factory.getbasetemp() / "-".join(["model", *shape])
        if not path.exists():
            save_model(path, **shape)
        folders[name] = str(path)
    return folders


@pytest.fixture
def model(name: str, models: dict[str, str]) -> str:
    """Folder of a tiny model that the parametrisation can train."""
    return models[name]


def trainer_of(name: str, model: str, folder: Path) -> Any:
    config = config_of("preference", model, folder, parametrization=name, **NEEDED.get(name, {}), **KEYS)
    return build(config, text_rows(config, 16))


def weights(model: torch.nn.Module, trained: bool) -> dict[str, Tensor]:
    """The parameters that train, or those that do not."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad == trained}


def policy_token_logps(trainer: Any, batch: dict[str, Tensor]) -> Tensor:
    """Under the policy as it is, as the objective sees them."""
    method, seen = trainer.method, []

    def objective(batch: CandidateBatch, options: Any) -> LossOutput:
        seen.append(batch.policy_token_logps)
        return method.objective(batch, options)

    trainer.method = replace(method, objective=objective)
    with torch.no_grad():
        trainer.evaluate_objective(trainer.model, batch)
    trainer.method = method
    return seen[0]


@for_every_parametrization
def test_it_trains_what_it_says_against_the_start_and_resumes_to_the_last_bit(
    name: str, model: str, tmp_path: Path
) -> None:
    trainer = trainer_of(name, model, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    start = policy_token_logps(trainer, batch)
    torch.testing.assert_close(trainer.reference.token_logps(batch), start, rtol=0, atol=1e-5)
    moving, still = weights(trainer.model, trained=True), weights(trainer.model, trained=False)
    assert moving and bool(still) == (name not in WHOLE)

    trainer.train()
    trainer.model.eval()
    assert min(logged(trainer, "grad_norm")) > 0 and len(logged(trainer, "loss")) == 4
    after = dict(trainer.model.named_parameters())
    assert [key for key, value in moving.items() if not torch.equal(after[key], value)] == list(moving)
    assert [key for key, value in still.items() if not torch.equal(after[key], value)] == []
    assert (policy_token_logps(trainer, batch) - start).abs().max() > 1e-3
    torch.testing.assert_close(trainer.reference.token_logps(batch), start, rtol=0, atol=1e-5)

    resumed = trainer_of(name, model, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert logged(resumed, "loss") == logged(trainer, "loss")
    for key, value in weights(resumed.model, trained=True).items():
        assert torch.equal(value, after[key]), key


def merged(adapter: Path, model: str, output: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(model)
    merge_adapter(read_adapter(str(adapter)), ModelSource(model), output, tokenizer=tokenizer, prompts=PROMPTS)
    return output


def exported(adapter: Path, model: str, output: Path) -> Path:
    found = learnt(load_adapter(load_model(ModelSource(model)), read_adapter(str(adapter))))
    pruned_model(found.model, found.plan, folds=found.folds, keep_tied=found.keep_tied).save_pretrained(output)
    return output


@for_every_parametrization
def test_what_is_saved_is_the_model_that_was_trained(name: str, model: str, tmp_path: Path) -> None:
    trainer = trainer_of(name, model, tmp_path)
    trainer.train()
    trainer.model.eval()
    trained = [trainer.model(torch.tensor([prompt])).logits.detach() for prompt in PROMPTS]
    trainer.save_model(str(tmp_path / "saved"))
    whole = tmp_path / "saved"
    if isinstance(trainer.model, PeftModel) and is_sparse_kind(read_adapter(tmp_path / "saved").kind):
        with pytest.raises(ModelError, match="alignkit prune"):
            merged(tmp_path / "saved", model, tmp_path / "merged")
        whole = exported(tmp_path / "saved", model, tmp_path / "exported")
    elif load_parametrization(name).has_adapter:
        whole = merged(tmp_path / "saved", model, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    untouched = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for prompt, expected in zip(PROMPTS, trained, strict=True):
        tokens = torch.tensor([prompt])
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        assert (untouched(tokens).logits - expected).abs().max() > 1e-3


@for_every_parametrization
def test_what_it_logs_is_what_its_record_says(name: str, model: str, tmp_path: Path) -> None:
    trainer = trainer_of(name, model, tmp_path)
    trainer.train()
    found = {key for entry in trainer.state.log_history for key in entry}
    of_any = set(load_bridge(load_shape("candidates")).METRICS)
    own = {key for key in found if key.partition("/")[0] in ("loss", name)} - of_any - {"loss", "loss/preference"}
    told = load_parametrization(name).metrics
    assert own <= set(told)
    assert bool(own) == bool(told)
