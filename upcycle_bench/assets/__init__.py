"""Files that ship with the package: our open_clip model configurations, and dense checkpoints."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"  # one JSON file a model; `model/clip.py` adds them to open_clip's models
CHECKPOINTS = Path(__file__).parent / "checkpoints"  # MODEL.safetensors, its record, metrics and description
