"""What a trained adapter makes of its base: a plain model, what of it is kept, and what is to be folded into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from alignkit.errors import ModelError
from alignkit.models.sparse_adapter import POLICY, SparseConfig
from alignkit.pruning.families import EMBEDDING
from alignkit.pruning.fold import Fold
from alignkit.pruning.plan import PruningPlan


@dataclass(frozen=True)
class Learnt:
    """What is exported.

    Attributes:
        model: The base with the updates in its weights, and nothing else.
        plan: What is kept; of an adapter that removes nothing, everything.
        folds: By name of a writer of the residual stream, the map behind it.
        cut: Length of the adapter's weights that are cut off although training had not driven them to zero.
    """

    model: PreTrainedModel
    plan: PruningPlan
    folds: Mapping[str, Fold]
    cut: float = 0.0

    @property
    def keep_tied(self) -> bool:
        """Whether embedding and head can stay one matrix: they are one, and no map behind the embedding parts them."""
        behind = self.folds.get(EMBEDDING)
        return bool(self.model.config.tie_word_embeddings) and (behind is None or behind.is_identity)


@torch.no_grad()
def learnt(wrapped: PeftModel) -> Learnt:
    """Take an adapter and its base apart and together again; the weights of the base are changed in place.

    Args:
        wrapped: The base in full precision with the adapter ``default``, which is one of LoRA, PAT or ATP.

    Raises:
        ModelError: The adapter is of another kind, or the base is quantised.
    """
    config = wrapped.peft_config[POLICY]
    if not isinstance(config, SparseConfig):
        return Learnt(wrapped.merge_and_unload(safe_merge=True), PruningPlan(), {})
    kept, folds = config.kept(wrapped, POLICY), config.folds(wrapped, POLICY)
    cut = config.cut(wrapped, POLICY)
    for layer in [module for module in wrapped.modules() if isinstance(module, LoraLayer)]:
        if POLICY in layer.lora_A:
            weight = layer.get_base_layer().weight
            if not weight.is_floating_point():
                raise ModelError("the base is quantised. Load it dequantised: its codes have no place for an update.")
            whole = getattr(layer, "lora_update", {})
            update = whole[POLICY].weight if POLICY in whole else layer.get_delta_weight(POLICY)
            weight.add_(update.to(weight.dtype))
    plan = PruningPlan(**kept)
    named = {name: Fold(*of) for name, of in folds.items()}
    return Learnt(wrapped.unload(), plan, named, cut)
