"""Files of a repository on Hugging Face, by its own client and in its cache.

    folder = fetch_descriptions("ORG/NAME")         # the folder in the cache, with the small JSON files
    file = fetch_weights("ORG/NAME", folder)        # the file of weights, or the index with all its parts

ORG/NAME@REVISION names a branch, a tag or a commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from upcycle_bench.util.errors import UserError, one_line

DESCRIPTIONS = ("open_clip_config.json", "config.json", "processor_config.json", "preprocessor_config.json")
WEIGHTS = (  # the first that is there: open_clip's names, then transformers'
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def fetch_descriptions(repository: str) -> Path:
    """The folder of the cache with what describes the model; UserError where it cannot be had."""
    return _fetch(repository, DESCRIPTIONS)


def fetch_weights(repository: str) -> Path:
    """The repository's file of weights, fetched unless the cache has it; UserError where there is none."""
    for name in WEIGHTS:
        folder = _fetch(repository, [name])
        if (file := folder / name).is_file():
            if name.endswith(".index.json"):
                _fetch(repository, [f"{name.partition('.')[0]}-*"])
            return file
    raise UserError(f"hf-hub:{repository}: has none of {', '.join(WEIGHTS)}; fetch its weights and give the file.")


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder; UserError where none can be told."""
    if (named := next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)) is not None:
        return named
    if (folder / ".metadata").is_file():
        raise UserError(
            f"{folder}: is a distributed checkpoint; make a file of it: `python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pt`."
        )
    kinds = (".safetensors", ".bin", ".pt", ".pth")
    others = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in kinds)
    if len(others) == 1:
        return others[0]
    found = f"{len(others)} files of weights, {others[0].name} the first" if others else "no file of weights"
    raise UserError(f"{folder}: holds {found}; give the file itself.")


def _fetch(repository: str, patterns: Sequence[str]) -> Path:
    import huggingface_hub

    name, _, revision = repository.partition("@")
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
    except Exception as error:  # of the client, of what it is built on, of the network: each with its own
        raise UserError(
            f"hf-hub:{repository} cannot be fetched ({one_line(error)}); where there is a network, `hf download "
            f"{name}`; then copy the folder and give its path."
        ) from None
