"""The model that DeepSpeed has loaded from its own shards, against the plain files that were saved beside them.

Upstream names relied on (asserted by tests/contracts/test_trl_seams.py):
- deepspeed ``DeepSpeedEngine._zero3_consolidated_16bit_state_dict()``: the whole model on the first process, as saving
  gathers it
- deepspeed ``_hp_mapping`` of a parameter under ZeRO-1 and ZeRO-2, ``ds_id`` under ZeRO-3, and with an engine
  ``_z3_optimizer``
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from alignkit.models.files import ADAPTER_WEIGHTS
from alignkit.models.full_rank import full_rank_layers
from alignkit.models.saved_comparison import adapter_difference, has_model, model_difference

PERSISTENCE, DEEPSPEED_PERSISTENCE = "stage3_param_persistence_threshold", 100_000
"""DeepSpeed's key for the largest parameter that stays whole, and its default."""


def engine_difference(engine: Any, model: PreTrainedModel | PeftModel, folder: Path) -> str | None:
    """What differs between a model in an engine and the files of a checkpoint; None on all but the first process.

    A collective: under ZeRO-3 an adapter is gathered on every process, a whole model on the first one, as in a save.
    Without plain weights in the checkpoint, which ``zero3_save_16bit_model: false`` leaves out, there is nothing to
    compare with.

    Args:
        engine: DeepSpeed's.
        folder: The checkpoint.
    """
    is_first = PartialState().is_main_process
    if isinstance(model, PeftModel):
        # The shards leave out what is frozen, such as a moving anchor, which is restored by itself.
        with _gathered(engine, model):
            return adapter_difference(model, folder / ADAPTER_WEIGHTS) if is_first else None
    if not has_model(folder):
        return None
    state = engine._zero3_consolidated_16bit_state_dict() if engine.zero_optimization_partition_weights() else None
    return model_difference(model, folder, state) if is_first else None


def keep_sums_whole(model: nn.Module, config: dict[str, Any]) -> None:
    """Have ZeRO-3 leave whole the weights that an adapter of full rank trains; of other adapters nothing is changed.

    PEFT forms the sum before the module that holds the weight is called, whose turn would be too late to gather it.
    Routers are small, as is all that stays whole with them; experts, which LoRA may adapt, are not.

    Nor are blocks with experts gathered as one, which DeepSpeed does by itself: it reduces the gradients inside such a
    block when that of the block's input has arrived, and the input of the first that trains has none, so that those of
    its router would be reduced before they are there.

    Args:
        model: What trains, before it is sharded.
        config: DeepSpeed's; changed.
    """
    layers = full_rank_layers(model)
    if not (is_deepspeed_zero3_enabled() and layers):
        return
    sizes = [int(vars(p).get("ds_numel", p.numel())) for layer in layers for p in layer.parameters()]
    zero, hidden = config["zero_optimization"], model.config.get_text_config().hidden_size
    given = zero.get(PERSISTENCE, DEEPSPEED_PERSISTENCE)
    # What "auto" would become, in transformers and accelerate.
    zero[PERSISTENCE] = max(*sizes, 10 * hidden if given == "auto" else int(given))
    zero["leaf_module"] = {"classes": [], "names": [], "name_suffixes": []}


@torch.no_grad()
def trained_value(parameter: nn.Parameter) -> Tensor:
    """The value of a trained parameter, whole and in the precision it is stepped in; a collective under DeepSpeed.

    Args:
        parameter: Of a model that trains, wrapped or not.
    """
    if not _is_stepped_elsewhere(parameter):
        return parameter.detach().clone()
    if "ds_id" in vars(parameter) and "_z3_optimizer" not in vars(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):  # Sharded as it was loaded: no engine steps it yet.
            return parameter.detach().clone()
    from deepspeed.utils import safe_get_full_fp32_param

    value: Tensor = safe_get_full_fp32_param(parameter)
    return value.to(parameter.device)


@torch.no_grad()
def set_trained_value(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a trained parameter another value, in the optimizer's copy of it too; a collective under DeepSpeed.

    Args:
        parameter: Of a model that trains, wrapped or not.
        value: Whole, the same on every process.
    """
    if _is_stepped_elsewhere(parameter):
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value)
        if "ds_id" in vars(parameter):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
            return
    parameter.data.copy_(value)


def _is_stepped_elsewhere(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed steps a copy of a parameter, of which this is the rounded or gathered image."""
    return "_hp_mapping" in vars(parameter) or "ds_id" in vars(parameter)


def _gathered(engine: Any, model: PeftModel) -> AbstractContextManager[Any]:
    """What is saved with an adapter, in one piece: what trains, and the embeddings, which PEFT may store too."""
    if not engine.zero_optimization_partition_weights():
        return nullcontext()
    import deepspeed

    base = model.get_base_model()
    ends = [module for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module is not None]
    trained = (p for p in model.parameters() if p.requires_grad)
    saved = [*trained, *(p for module in ends for p in module.parameters())]
    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(dict.fromkeys(saved)))
    return gathered
