"""What ships with the package: open_clip model configurations of ours, and dense checkpoints."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"  # one JSON file each; `model.clip` adds them to open_clip's
CHECKPOINTS = Path(__file__).parent / "checkpoints"  # MODEL.safetensors, with what trained it beside it
