"""Where are the weights of a model, and what is said of them? A file, folder, repository, or a tag.

    found = find_pretrained("ViT-B-32", "laion2b_s34b_b79k")
    found = find_pretrained("hf-hub:ORG/NAME")
    clip = found.create()

What is said of them (`said`) must not contradict the model that was named. `DOORS` has a row for each way to name
weights.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from upcycle_bench.model import checkpoint_file, hub, repository
from upcycle_bench.model.clip import Clip, create_clip, other_activation
from upcycle_bench.model.config import HUB, LOCAL, Described, canonical, describe, first_difference
from upcycle_bench.model.pixels import agreed
from upcycle_bench.model.said import Said, said_by_tag, said_in, said_of
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError, unknown

Fetch = Callable[[], Path]


@dataclass(frozen=True)
class Choices:
    """What a user may add to what is found: settings of pixels, and that position embeddings may be resized."""

    pixels: Mapping[str, Any] = field(default_factory=dict)
    interpolate: bool = False


@dataclass(frozen=True)
class Pretrained:
    """Weights and the model they belong to: open_clip's `name`, the `file`, settings of pixels that are not usual.

    `source` is what the user wrote.
    """

    name: str
    file: Path
    source: str
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    interpolate: bool = False

    def create(self, **options: Any) -> Clip:
        """The model with these weights; `options` are those of `create_clip`."""
        return create_clip(self.name, self.file, preprocess=self.preprocess, interpolate=self.interpolate, **options)

    def sha256(self) -> str:
        """Of the content of the file, and of all parts where it is an index."""
        return checkpoint_file.content_sha256(self.file)

    def identity(self) -> str:
        """What these weights are as a model of that name: the sha256 of the file, hashed with what the user added."""
        more: dict[str, Any] = {"preprocess": dict(self.preprocess)} if self.preprocess else {}
        more |= {"interpolate": True} if self.interpolate else {}
        if not more:
            return self.sha256()
        return hashlib.sha256(f"{self.sha256()} {strict_json.dumps(more, sort_keys=True)}".encode()).hexdigest()


@dataclass(frozen=True)
class Door:
    """A way to name weights of a model: `fits` says whether a text, the first argument, is meant so.

    `find` gives what is said of them, and what fetches the file: it is called only if nothing contradicts.
    """

    what: str
    fits: Callable[[str, str], bool]
    find: Callable[[str, str], tuple[Fetch, Said]]


def find_pretrained(model: str, source: str | None = None, choices: Choices | None = None) -> Pretrained:
    """The weights that `source` names, for `model`; without `source`, those that stand where the model is described.

    Raises UserError where there are none, where they cannot be fetched, and where two places contradict each other.
    """
    choices = choices or Choices()
    described = describe(model)
    fetch: Fetch
    if source is None:
        fetch, said = partial(_weights_of, described, model), Said(described.place)
    else:
        door = next((door for door in DOORS if door.fits(source, described.name)), None)
        if door is None:
            raise _unknown(source, described.name)
        fetch, said = door.find(source, described.name)
    _require_same(described, said, source or model)
    if said.assumed and (choices.pixels or described.preprocess):
        said = Said(said.place)
    settings = [(described.place, described.preprocess), (said.place, said.preprocess), ("--pixels", choices.pixels)]
    preprocess = agreed(settings)
    if said.assumed:
        print(f"{source} does not say its pixels: those of {said.place} are used (--pixels)", file=sys.stderr)
    file = fetch()
    checkpoint_file.require_readable(file)  # so that a plan says it, too
    return Pretrained(described.name, file, source or model, preprocess, choices.interpolate)


def _weights_of(described: Described, model: str) -> Path:
    if described.folder is None:
        raise UserError(
            f"{model} names a model without weights: give them, a file or a tag (--pretrained, --checkpoint)."
        )
    return (
        repository.fetch_weights(model.removeprefix(HUB))
        if model.startswith(HUB)
        else repository.weights_in(described.folder)
    )


def _require_same(described: Described, said: Said, source: str) -> None:
    """UserError where what is said of the weights is another model than the one that was named."""
    quick_said = said.quick_gelu
    if said.config is not None:
        quick_said = bool(said.config.get("quick_gelu"))
        theirs, ours = canonical(said.config, said.place), canonical(described.config, described.name)
        if difference := first_difference(theirs | {"quick_gelu": None}, ours | {"quick_gelu": None}):
            raise UserError(f"{said.place} describes another model than {described.name}: {difference}; name that one.")
    if quick_said not in (None, bool(described.config.get("quick_gelu"))):
        raise UserError(
            f"{source} weights were trained with another activation than that of {described.name}, as {said.place} "
            f"says: choose {other_activation(described.name)}."
        )


def _of_folder(source: str, name: str) -> tuple[Fetch, Said]:
    folder = Path(source.removeprefix(LOCAL)).expanduser()
    if not folder.is_dir():
        raise UserError(f"{source}: no such folder; give the file of weights, or a folder that holds one.")
    return _of_file(str(repository.weights_in(folder)), name)


def _of_hub(source: str, name: str) -> tuple[Fetch, Said]:
    name_there = source.removeprefix(HUB)
    said = said_in(repository.fetch_descriptions(name_there))
    return partial(repository.fetch_weights, name_there), said or Said(source)


def _of_file(source: str, name: str) -> tuple[Fetch, Said]:
    file = Path(source)
    return lambda: file, said_of(file, name)


def _of_tag(source: str, name: str) -> tuple[Fetch, Said]:
    import open_clip

    tag = open_clip.get_pretrained_cfg(name, source)
    return partial(_download, tag, source, name), said_by_tag(tag, source)


def _download(tag: Mapping[str, Any], source: str, name: str) -> Path:
    import open_clip

    what, fetch = f"the {source} weights of {name}", partial(open_clip.download_pretrained, tag)
    if tag.get("hf_hub"):
        return Path(hub.from_repository(tag["hf_hub"].rpartition("/")[0], what, fetch, ", or give the file"))
    url = tag.get("url", "")
    return Path(fetch() if hub.is_cached(url) else hub.from_url(url, what, fetch))


def _is_tag(source: str, name: str) -> bool:
    import open_clip

    return bool(open_clip.get_pretrained_cfg(name, source))


def _unknown(source: str, name: str) -> UserError:
    import open_clip

    if Path(source).suffix or len(Path(source).parts) > 1:  # no tag of open_clip's has a dot or a slash
        return UserError(f"{source}: no such file; give one with weights of {name}, or a tag of open_clip's for it.")
    tags: Sequence[str] = open_clip.list_pretrained_tags_by_model(name)
    return unknown(f"pretrained weights of {name}", source, tags, "Or give a file: there is none of that name.")


DOORS = (
    Door("the path of a file of weights", lambda source, name: Path(source).is_file(), _of_file),
    Door(
        "`local-dir:PATH` or the path of a folder with weights",
        lambda source, name: source.startswith(LOCAL) or Path(source).is_dir(),
        _of_folder,
    ),
    Door("`hf-hub:ORG/NAME`, a repository on Hugging Face", lambda source, name: source.startswith(HUB), _of_hub),
    Door("a tag that open_clip has for the model (`laion2b_s34b_b79k`)", _is_tag, _of_tag),
)
