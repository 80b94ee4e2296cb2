"""Parametrisation ``routers``: of a mixture of experts, what chooses the experts trains, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.models.adapter_config import LEFT_OUT_BY_ENGINES
from alignkit.parts.options import Conflict, option
from alignkit.parts.parametrization import Parametrization


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """Options of ``routers``."""

    router_layers: int | None = option(
        5,
        ge=1,
        help="Routers that train: those of the last so many layers with experts, all where there are fewer; null is "
        "all.",
        source="RoMA (arXiv 2511.07419), table 3",
    )
    dense_mixer: bool = option(
        False,
        help="Let these routers learn from every expert, not from the chosen ones alone (DenseMixer, Yao et al. 2025): "
        "the output stays as it is, and a training step asks all experts of these layers once more.",
    )


PARAMETRIZATION = Parametrization(
    name="routers",
    summary="The routers of the last layers with experts train, in full; experts and all else stay as they are.",
    label="router tuning",
    options=RouterOptions,
    has_adapter=True,
    goes_on=True,
    of_any_adapter=("dense_mixer",),
    serving=LEFT_OUT_BY_ENGINES,
    product="Routers of a mixture of experts (the last {router_layers} of them), as an adapter of full rank",
    conflicts=(
        Conflict(
            "dense_mixer with torch_compile",
            ("dense_mixer", "torch_compile", "kernels"),
            lambda c: c.dense_mixer and (c.torch_compile or c.kernels == "compile"),
            "a compiled model leaves out what dense_mixer puts between a router and its experts, so that idle experts "
            "would go on unheard without a word",
            "Remove torch_compile and kernels, or dense_mixer",
        ),
    ),
    when="A mixture of experts whose experts are good and are chosen badly.",
)
