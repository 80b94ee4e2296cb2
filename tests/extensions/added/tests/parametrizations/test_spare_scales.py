"""What only ``spare_scales`` promises: it trains its scales, and nothing else."""

from __future__ import annotations

from pathlib import Path

from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of, text_rows


def test_only_the_scales_of_the_named_modules_train(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    keys = {"parametrization": "spare_scales", "spare_modules": ["v_proj"]}
    config = config_of("sft", str(tmp_path / "model"), tmp_path, **keys)
    model = build(config, text_rows(config, 8)).model
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 and all("v_proj.ia3_l" in name for name in trained)
