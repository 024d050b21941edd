"""Which model is meant? By open_clip's name, a repository on Hugging Face, a folder, or a file with its configuration.

    found = describe("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
    found.name        # "ViT-B-32": open_clip has that very model
    found.config, found.preprocess, found.folder

A configuration that open_clip does not have is registered with it, as LABEL@HASH: from then on it is a name as others.
`DOORS` has a row for each way to name a model, `FORMATS` one for each file that describes one; docs/checkpoints.md
shows both.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from upcycle_bench.assets import MODELS
from upcycle_bench.model import repository
from upcycle_bench.model.pixels import checked
from upcycle_bench.model.transformers_clip import is_transformers_config, read_transformers_config
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError, unknown

HUB, LOCAL = "hf-hub:", "local-dir:"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "spiece.model")
WITHOUT_EFFECT = {  # on what a model computes in evaluation, once it has its weights
    "vision_cfg": ("patch_dropout", "timm_model_pretrained", "timm_drop", "timm_drop_path"),
    "text_cfg": ("hf_model_pretrained",),
}
_own: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True)
class Described:
    """A model. `place`: what describes it; `preprocess`: what it says of pixels; `folder`: where weights may stand."""

    name: str
    config: dict[str, Any]
    place: str
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True)
class Door:
    """A way to name a model: `fits` says whether a text is meant so, `open` finds the model."""

    what: str
    fits: Callable[[str], bool]
    open: Callable[[str], Described]


@dataclass(frozen=True)
class Format:
    """A kind of JSON that describes a model: `read` gives open_clip's configuration and settings of pixels."""

    what: str
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], Path], tuple[dict[str, Any], dict[str, Any]]]


def describe(text: str) -> Described:
    """The model that `text` names; UserError where it names none."""
    door = next((door for door in DOORS if door.fits(text)), None)
    if door is None:
        import open_clip

        if Path(text).suffix == ".json" or len(Path(text).parts) > 1:  # no name of open_clip's has a slash
            raise UserError(f"{text}: no such file or folder; give one that describes a model, or open_clip's name.")
        raise unknown("open_clip model", text, open_clip.list_models())
    return door.open(text)


def model_config(text: str) -> dict[str, Any]:
    """open_clip's configuration of the model that `text` names; UserError where it names none."""
    return describe(text).config


def own_config(name: str) -> dict[str, Any] | None:
    """The configuration that a file has to carry, since open_clip has no model of that name; None for open_clip's."""
    return _own.get(name)


def register(config: Mapping[str, Any], label: str, place: str) -> str:
    """open_clip's name of a model with that configuration: its own, or a new one, LABEL@HASH.

    Raises UserError, which names `place`, for a configuration that open_clip does not know.
    """
    import open_clip

    wanted = canonical(config, place)
    for name in _known():
        if name not in _own and canonical(open_clip.get_model_config(name), name) == wanted:
            return name
    label = re.sub(r"[^\w.+-]", "-", label)[:100]  # it comes from files, and open_clip wants a file of that name
    name = f"{label}@{hashlib.sha256(strict_json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:8]}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.json"
        file.write_text(strict_json.dumps(config), encoding="utf-8")
        open_clip.add_model_config(file)  # reads it now
    _own[name] = dict(config)
    return name


def canonical(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """All that decides what the model computes: equal for two configurations of one function."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    whole: dict[str, Any] = {}
    for part, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        try:
            values = asdict(kind(**config[part]))
            values["hidden"] = int(values["width"] * values.pop("mlp_ratio"))  # two ratios may give one width
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{place}: {part} is no configuration that open_clip knows ({error}).") from None
        whole[part] = {key: _single(value) for key, value in values.items() if key not in WITHOUT_EFFECT[part]}
    own_text = bool(config.get("custom_text") or whole["text_cfg"]["hf_model_name"])
    whole |= {"embed_dim": config.get("embed_dim"), "quick_gelu": bool(config.get("quick_gelu"))}
    whole |= {"custom_text": own_text, "multimodal_cfg": config.get("multimodal_cfg")}
    return strict_json.loads(strict_json.dumps(whole))  # tuples become lists


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Where two canonical configurations differ: `text_cfg.heads is 8, not 12`; None where they do not.

    Whether a text tower is a module of its own makes no difference: weights are renamed.
    """
    for key in sorted((ours.keys() | theirs.keys()) - {"custom_text"}):
        one, other = ours.get(key), theirs.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            if inner := first_difference(one, other):
                return f"{key}.{inner}"
        elif one != other:
            return f"{key} is {one}, not {other}"
    return None


def _single(value: Any) -> Any:
    """224 for [224, 224]; any other value as it is."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1] else value


def read_description(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(open_clip's configuration, settings of pixels) in a JSON file; UserError for any other file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({' '.join(str(error).split())}).") from None
    row = next((row for row in FORMATS if isinstance(values, dict) and row.fits(values)), None)
    if row is None:
        raise UserError(f"{path}: describes no CLIP; give {' or '.join(row.what for row in FORMATS)}.")
    config, preprocess = row.read(values, path)
    return config, checked(preprocess, str(path))


def description_in(folder: Path) -> Path | None:
    """The file in a folder that describes the model of the weights there, or None."""
    if (own := folder / "open_clip_config.json").is_file():
        return own
    other = folder / "config.json"
    try:
        fits = other.is_file() and is_transformers_config(json.loads(other.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
    return other if fits else None


def _known() -> list[str]:
    import open_clip

    if not _known_ours():
        open_clip.add_model_config(MODELS)
    return list(open_clip.list_models())


def _known_ours() -> bool:
    import open_clip

    return {path.stem for path in Path(MODELS).glob("*.json")} <= set(open_clip.list_models())


def _of_name(text: str) -> Described:
    import open_clip

    return Described(text, open_clip.get_model_config(text), text)


def _of_file(text: str, label: str = "", folder: Path | None = None) -> Described:
    path = Path(text)
    config, preprocess = read_description(path)
    name = register(config, label or path.stem, str(path))
    return Described(name, config, text, preprocess, folder)


def _of_folder(text: str, label: str = "") -> Described:
    folder = Path(text.removeprefix(LOCAL)).expanduser()
    if not folder.is_dir():
        raise UserError(f"{text}: no such folder; give one with open_clip_config.json and weights.")
    file = description_in(folder)
    if file is not None and any((folder / name).is_file() for name in TOKENIZERS):
        config = read_description(file)[0]
        if theirs := config.get("text_cfg", {}).get("hf_tokenizer_name"):
            print(
                f"{folder} holds a tokenizer, too; texts are tokenised by {theirs}, as {file.name} says",
                file=sys.stderr,
            )
    if file is None:
        raise UserError(
            f"{folder}: holds no open_clip_config.json and no config.json of a CLIP; name the model (--model ViT-B-32) "
            "and give the file of weights."
        )
    return _of_file(str(file), label or folder.resolve().name, folder)


def _of_hub(text: str) -> Described:
    name = text.removeprefix(HUB)
    return _of_folder(str(_fetched(name)), name.partition("@")[0].rpartition("/")[2])


@functools.cache
def _fetched(name: str) -> Path:
    return repository.fetch_descriptions(name)


DOORS = (
    Door("a name that open_clip has (`ViT-B-32`), or one of ours (`lab-vit`)", lambda text: text in _known(), _of_name),
    Door("`hf-hub:ORG/NAME`, a repository on Hugging Face", lambda text: text.startswith(HUB), _of_hub),
    Door(
        "`local-dir:PATH` or the path of a folder, as open_clip or transformers saves one",
        lambda text: text.startswith(LOCAL) or Path(text).is_dir(),
        _of_folder,
    ),
    Door("the path of a JSON file that describes a model", lambda text: Path(text).is_file(), _of_file),
)
FORMATS = (
    Format(
        "an `open_clip_config.json` (`model_cfg`, `preprocess_cfg`)",
        lambda values: isinstance(values.get("model_cfg"), dict),
        lambda values, path: (values["model_cfg"], values.get("preprocess_cfg") or {}),
    ),
    Format(
        "a model configuration of open_clip's (`embed_dim`, `vision_cfg`, `text_cfg`)",
        lambda values: all(key in values for key in ("embed_dim", "vision_cfg", "text_cfg")),
        lambda values, path: (dict(values), {}),
    ),
    Format(
        "transformers' `config.json` of a `CLIPModel`, with `preprocessor_config.json` beside it",
        is_transformers_config,
        read_transformers_config,
    ),
)
