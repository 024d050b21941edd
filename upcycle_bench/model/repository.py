"""Files of a repository on Hugging Face, by its own client and in its cache.

    folder = fetch_descriptions("ORG/NAME")         # the folder in the cache, with the small JSON files
    file = fetch_weights("ORG/NAME", folder)        # the file of weights, or the index with all its parts

ORG/NAME@REVISION names a branch, a tag or a commit.
"""

from __future__ import annotations

from pathlib import Path

from upcycle_bench.model import hub
from upcycle_bench.model.checkpoint_file import is_index, parts_of
from upcycle_bench.util.errors import UserError

DESCRIPTIONS = ("open_clip_config.json", "config.json", "processor_config.json", "preprocessor_config.json")
COPIED = ", or copy its folder and give the path"
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

    def load() -> Path:
        found = {name: path for name in DESCRIPTIONS if (path := _one(repository, name)) is not None}
        pixels = "processor_config.json" in found or "preprocessor_config.json" in found
        # Another tool may have fetched a part: without its pixels, a model would get the usual ones.
        if hub.is_offline() and not ("open_clip_config.json" in found or ("config.json" in found and pixels)):
            raise FileNotFoundError(f"what describes {repository} is not in the cache")
        if not found:
            raise UserError(f"hf-hub:{repository}: has none of {', '.join(DESCRIPTIONS)}; name the model otherwise.")
        return next(iter(found.values())).parent

    return hub.from_repository(repository, f"the configuration of hf-hub:{repository}", load, COPIED)


def fetch_weights(repository: str) -> Path:
    """The repository's file of weights, fetched unless the cache has it; UserError where there is none."""

    def load() -> Path:
        file = next(filter(None, (_one(repository, name) for name in WEIGHTS)), None)
        if file is None and hub.is_offline():
            raise FileNotFoundError(f"the weights of {repository} are not in the cache")
        if file is None:
            raise UserError(f"hf-hub:{repository}: has none of {', '.join(WEIGHTS)}; fetch its weights, give the file.")
        for part in parts_of(file) if is_index(file) else ():
            if _one(repository, part) is None:
                raise FileNotFoundError(f"{part} of {repository} is not there")
        return file

    return hub.from_repository(repository, f"the weights of hf-hub:{repository}", load, COPIED)


def _one(repository: str, file: str) -> Path | None:
    """A file of the repository, in the cache; None where the repository, or without a network the cache, lacks it."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    name, _, revision = repository.partition("@")
    try:
        return Path(huggingface_hub.hf_hub_download(name, file, revision=revision or None))
    except EntryNotFoundError:
        return None


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
