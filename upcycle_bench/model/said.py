"""What is said of a file of weights beside its tensors: the model that it belongs to, and the pixels of its training.

    said = said_of(Path("logs/run/checkpoints/epoch_15.pt"), "ViT-B-32")
    said.place, said.config, said.preprocess, said.quick_gelu

`SAYERS` has a row for each place, the first that says something counts; docs/checkpoints.md shows them.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upcycle_bench.model import weights
from upcycle_bench.model.config import Described, describe, description_in, read_description
from upcycle_bench.model.pixels import checked, usual_settings
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import file_sha256

HUB_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # where a tag names no file


@dataclass(frozen=True)
class Said:
    """What is known of a file of weights beside its tensors. `place` says it; `config` is None where it does not."""

    place: str
    config: Mapping[str, Any] | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    quick_gelu: bool | None = None
    assumed: bool = False  # of the model, not of the file: a user may say otherwise


@dataclass(frozen=True)
class Sayer:
    """A place that may say something: `say` is asked with the file and the name of the model that the user gave."""

    what: str
    say: Callable[[Path, str], Said | None]


def said_of(file: Path, name: str) -> Said:
    """What is known of the file, given as weights of the model `name`."""
    found = (sayer.say(file, name) for sayer in SAYERS)
    return next(filter(None, found), Said(str(file)))


def said_in(folder: Path) -> Said | None:
    """What a folder says of the weights in it."""
    if (description := description_in(folder)) is None:
        return None
    return Said(str(description), *read_description(description))


def said_by_tag(tag: Mapping[str, Any], place: str) -> Said:
    """What open_clip's settings of a tag say: where they are silent, they mean the usual pixels, and GELU."""
    return Said(place, None, usual_settings() | checked(tag, place), bool(tag.get("quick_gelu")))


def _ours(file: Path, name: str) -> Said | None:
    if (settings := weights.settings_in(file)) is None:
        return None
    try:
        config = settings.get("config") or describe(settings["model"]).config
    except KeyError:
        raise UserError(f"{file}: does not fit its own metadata (it names no model).") from None
    # A file of ours leaves usual settings out.
    return Said(str(file), config, usual_settings() | checked(settings.get("preprocess") or {}, str(file)))


def _training(file: Path, name: str) -> Said | None:
    from open_clip import get_pretrained_cfg

    folder = file.absolute().parent
    path = folder.parent / "params.txt"
    if folder.name != "checkpoints" or not path.is_file():
        return None
    lines = (line.partition(": ") for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    given = {key.strip(): value.strip() for key, _, value in lines if value.strip() != "None"}
    if "model" not in given:  # a file of another tool
        return None
    try:
        described = describe(given["model"])
    except UserError:  # a model of their own: its configuration is not here, what else stands there is
        described = Described(given["model"], {}, str(path))
    config, quick = described.config, given.get("force_quick_gelu") == "True"
    if config and quick:
        config["quick_gelu"] = True
    if config and (sizes := _numbers(given.get("force_image_size"))):
        config["vision_cfg"]["image_size"] = int(sizes[0]) if len(sizes) == 1 else [int(size) for size in sizes]
    if config and (length := _numbers(given.get("force_context_length"))):
        config["text_cfg"]["context_length"] = int(length[0])
    # The trainer takes the pixels of the weights that it starts from, but for those that were given.
    pixels: dict[str, Any] = dict(described.preprocess)
    pixels |= checked(get_pretrained_cfg(described.name, given.get("pretrained", "")) or {}, str(path))
    words = {key: given[f"image_{key}"] for key in ("interpolation", "resize_mode") if f"image_{key}" in given}
    if words.get("interpolation") == "random":  # in training; it evaluates with the usual one
        del words["interpolation"]
    numbers = {key: _numbers(given.get(f"image_{key}")) or None for key in ("mean", "std")}
    return Said(str(path), config or None, pixels | checked(words | numbers, str(path)), quick or None)


def _numbers(text: str | None) -> list[float]:
    """The numbers in `[0.5, 0.5, 0.5]`, `(224,)` or `224`, as Python prints them; none where it is something else."""
    try:
        found = ast.literal_eval(text or "")
    except (SyntaxError, ValueError):
        return []
    found = found if isinstance(found, list | tuple) else [found]
    return [float(number) for number in found if isinstance(number, int | float)]


def _tag(file: Path, name: str) -> Said | None:
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    digest = functools.cache(lambda: file_sha256(file))  # of a large file, and only if a tag knows hashes
    for tag in open_clip.list_pretrained_tags_by_model(name):
        config = open_clip.get_pretrained_cfg(name, tag)
        folder, _, one = (config.get("hf_hub") or "").rpartition("/")
        cached = [try_to_load_from_cache(folder, each) for each in ([one] if one else HUB_NAMES)] if folder else []
        fetched = any(isinstance(each, str) and _same(Path(each), file, digest) for each in cached)
        if fetched or (config.get("url") and _names(config["url"], digest)):
            return said_by_tag(config, f"open_clip's tag {tag}, which fetches this file,")
    return None


def _same(cached: Path, file: Path, digest: Callable[[], str]) -> bool:
    """Whether a file of the cache is this one, or a copy: the cache calls large files by their sha256."""
    if cached.samefile(file):
        return True
    return cached.stat().st_size == file.stat().st_size and cached.resolve().name == digest()


def _all_tags(file: Path, name: str) -> Said | None:
    import open_clip

    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    said = [usual_settings() | checked(tag, name) for tag in tags]
    if not said or said[0] == usual_settings() or any(each != said[0] for each in said):
        return None
    return Said(f"each of open_clip's tags for {name}", None, said[0], assumed=True)


def _names(url: str, digest: Callable[[], str]) -> bool:
    """Whether open_clip's address of a file holds the hash of this one: OpenAI's the whole, others its beginning."""
    parent, name = url.split("/")[-2:]
    known = parent if "openaipublic" in url else Path(name).stem.rpartition("-")[2] if "mlfoundations" in url else ""
    return bool(known) and digest().startswith(known)


SAYERS = (
    Sayer("a file of ours: itself", _ours),
    Sayer(
        "`open_clip_config.json` beside it, or transformers' `config.json` and `preprocessor_config.json`",
        lambda file, name: said_in(file.parent),
    ),
    Sayer("`LOGS/RUN/params.txt` of open_clip's trainer, for a file in `LOGS/RUN/checkpoints`", _training),
    Sayer("open_clip's tag that fetches this very file, known by its hash where open_clip or its cache tell one", _tag),
    Sayer("all of open_clip's tags for the model, where they agree on pixels that are not the usual ones", _all_tags),
)
