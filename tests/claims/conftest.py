"""The claim experiments import each other as programs do, by their bare names."""

from __future__ import annotations

import sys
from pathlib import Path

CLAIMS = Path(__file__).resolve().parents[2] / "scripts" / "claims"
sys.path.append(str(CLAIMS))
