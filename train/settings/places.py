"""Where what travels with the package lies: in a clone its top folders, in a wheel the same folders under
shortzip/."""

from __future__ import annotations

from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
CONFIGS = HOME / "configs"
DEMO_MODEL = HOME / "checkpoints" / "demo-llava"
