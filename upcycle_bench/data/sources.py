"""Which shards a text names: folders, files, ranges, lists, commands and addresses, one or several sources.

    sources = expand_sources("/data/cc/{000..127}.tar::s3://bucket/laion/", "--data")
    sources.shards                                  # ("/data/cc/000.tar", ..., "s3://bucket/laion/00000.tar", ...)
    sources.source                                  # (0, ..., 1, ...): the number of the source of each shard

A path that is there as it is written is taken as it is. Nothing is read but folders and lists.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from upcycle_bench.data import places
from upcycle_bench.util.errors import UserError

BETWEEN = "::"  # between two sources, as in open_clip
LIST = "@"  # before the path of a text file that names shards
EXAMPLE = "give webdataset shards, for example 'train/{000..127}.tar'"


@dataclass(frozen=True)
class Sources:
    """The shards of all sources, in their order: paths or addresses. source: of each, the number of its source."""

    shards: tuple[str, ...]
    source: tuple[int, ...]

    @classmethod
    def of(cls, shards: Sequence[Path | str]) -> Sources:
        """One source of these shards."""
        return cls(tuple(str(shard) for shard in shards), (0,) * len(shards))


def expand_sources(text: str, option: str = "--data") -> Sources:
    """The shards that `text` names, of one source or several, `A::B`.

    A source is a folder with .tar files, a file, a path or address with ranges (`train/{000..127}.tar`), an address
    that ends in "/", a list (`@shards.txt`, or a file that ends in .txt), or `pipe:COMMAND`, which may have ranges.
    Raises UserError, which names `option`, if a file is missing, or a folder or a list names none.
    """
    parts = [text] if _there(text) else text.split(BETWEEN)
    found = [_expand(part.strip() if len(parts) > 1 else part, option) for part in parts]
    return Sources(
        tuple(shard for shards in found for shard in shards),
        tuple(number for number, shards in enumerate(found) for _ in shards),
    )


def expand_shards(text: str, option: str = "--data") -> tuple[str, ...]:
    """The shards of `expand_sources`."""
    return expand_sources(text, option).shards


def passed_over(text: str) -> list[str]:
    """A line for each folder of `text` that also has archives which are no .tar files."""
    lines = []
    for part in [text] if _there(text) else text.split(BETWEEN):
        if _there(part) and Path(part).is_dir():
            others = sorted(
                p.name for p in Path(part).iterdir() if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz|zip)$", p.name)
            )
            more = f" and {len(others) - 1:,} more" if others[1:] else ""
            lines += [f"{part}: {others[0]}{more} is passed over; only .tar files are shards."] if others else []
    return lines


def is_list(text: str) -> bool:
    """Whether `text` names a text file that names shards."""
    return text.startswith(LIST) or (text.endswith(".txt") and Path(text).is_file())


def _there(text: str) -> bool:
    try:
        return places.is_local(text) and Path(text).exists()
    except OSError:  # a command or a list of ranges that is too long for a name
        return False


def _expand(text: str, option: str) -> list[str]:
    """The shards of one source."""
    where = f"{option} {text}"
    if not text or text.startswith("-"):
        raise UserError(f"{option} {text!r}: no path stands there; {EXAMPLE}.")
    if is_list(text):
        return _listed(Path(text.removeprefix(LIST)), option)
    if not places.is_local(text) and text.endswith("/") and not places.is_pipe(text):
        shards = places.listing(text)
        if not shards:
            raise UserError(f"{where}: no address there ends in .tar; {EXAMPLE}.")
        return shards
    given = Path(text)
    if _there(text) and given.is_dir():
        shards = sorted(str(path) for path in given.glob("*.tar"))
        if not shards:
            raise UserError(f"{where}: the folder holds no .tar file{_instead(given)}; {EXAMPLE}.")
        return shards
    shards = _expanded(text, where)
    if places.is_local(text):
        shards = [str(Path(shard)) for shard in shards]
        places.require_files(shards, where, EXAMPLE)
    return shards


def _expanded(text: str, where: str) -> list[str]:
    """The shards of a range, or of what is none; UserError for braces that do not match."""
    try:  # in a command, a backslash is the shell's
        return [text] if _there(text) else list(braceexpand(text, escape=not places.is_pipe(text)))
    except ValueError as error:
        raise UserError(f"{where}: {error}; {EXAMPLE}.") from None


def _listed(path: Path, option: str) -> list[str]:
    """The shards in the lines of a text file; relative paths are relative to its folder, # begins a comment."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{option} {path}: the list of shards cannot be read ({why}).") from None
    wanted = [line for line in lines if line and not line.startswith("#")]
    if not wanted:
        raise UserError(f"{option} {path}: the list names no shard; write one path or address a line.")
    shards: list[str] = []
    local: list[str] = []
    for line in wanted:
        where = str(path.parent / line) if places.is_local(line) else line
        own = _expanded(where, f"{option} {path}: {line}")
        local += own if places.is_local(line) else []
        shards += own
    places.require_files(local, f"{option} {path}", "mend the list")
    return shards


def _instead(folder: Path) -> str:
    """What a folder without shards holds: the most frequent suffixes."""
    names = (path.name.partition(".tar") for path in folder.iterdir() if path.is_file())
    suffixes = Counter(tar + rest if tar else Path(name).suffix for name, tar, rest in names)
    return (
        ", but " + ", ".join(f"{n:,} {suffix}" for suffix, n in suffixes.most_common(3) if suffix)
        if any(suffixes)
        else ""
    )
