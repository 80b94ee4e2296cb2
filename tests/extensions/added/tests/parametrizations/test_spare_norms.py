"""What only ``spare_norms`` promises: it trains the normalisation layers, and nothing else."""

from __future__ import annotations

from pathlib import Path

from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of, text_rows


def test_only_norms_train(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    config = config_of("sft", str(tmp_path / "model"), tmp_path, parametrization="spare_norms")
    model = build(config, text_rows(config, 8)).model
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("norm" in name for name in trained)
