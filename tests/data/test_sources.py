"""Sources of shards: folders, ranges, several sources, lists, commands and addresses."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from upcycle_bench.data.sources import Sources, expand_sources
from upcycle_bench.util.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/00.tar", "a/01.tar", "b/00.tar", "b/01.tar", "b/10.tar"):
        (path := tmp_path / name).parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def names(sources: Sources, folder: Path) -> list[str]:
    return [str(Path(shard).relative_to(folder)) for shard in sources.shards]


def test_several_sources_are_numbered(folder: Path) -> None:
    found = expand_sources(f"{folder}/b/{{00..01}}.tar::{folder}/a")
    assert names(found, folder) == ["b/00.tar", "b/01.tar", "a/00.tar", "a/01.tar"]
    assert found.source == (0, 0, 1, 1)


def test_several_ranges_are_all_expanded(folder: Path) -> None:
    found = expand_sources(f"{folder}/{{a,b}}/{{00..01}}.tar")
    assert names(found, folder) == ["a/00.tar", "a/01.tar", "b/00.tar", "b/01.tar"]
    assert set(found.source) == {0}


@pytest.mark.parametrize("text", ["@{folder}/shards", "{folder}/shards.txt"])
def test_a_list_names_shards_and_its_paths_are_relative_to_it(folder: Path, text: str) -> None:
    content = f"# two of b\nb/{{00..01}}.tar\r\n\n{folder}/a/01.tar\nmemory://far/0.tar\npipe:cat x\n"
    for name in ("shards", "shards.txt"):
        (folder / name).write_text(content)
    found = expand_sources(text.format(folder=folder))
    assert names(Sources.of(found.shards[:3]), folder) == ["b/00.tar", "b/01.tar", "a/01.tar"]
    assert found.shards[3:] == ("memory://far/0.tar", "pipe:cat x")


def test_addresses_and_commands_have_ranges_and_are_not_looked_for() -> None:
    found = expand_sources("memory://no/{0..2}.tar::pipe:printf '\\%d' {7..8} | cat")
    assert found.shards[:3] == ("memory://no/0.tar", "memory://no/1.tar", "memory://no/2.tar")
    assert found.shards[3:] == ("pipe:printf '\\%d' 7 | cat", "pipe:printf '\\%d' 8 | cat")
    assert found.source == (0, 0, 0, 1, 1)


def test_an_address_that_ends_in_a_slash_is_a_folder() -> None:
    files = fsspec.filesystem("memory")
    for name in ("1.tar", "0.tar", "readme.md"):
        files.pipe_file(f"/slash/train/{name}", b"")
    assert expand_sources("memory://slash/train/").shards == (
        "memory:///slash/train/0.tar",
        "memory:///slash/train/1.tar",
    )
    files.makedirs("/slash/none", exist_ok=True)
    with pytest.raises(UserError, match=r"^--data memory://slash/none/: no address there ends in \.tar"):
        expand_sources("memory://slash/none/")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no path stands there; give webdataset shards"),
        ("{folder}/a::", "no path stands there"),
        ("--steps", "no path stands there"),
        ("{folder}/a::{folder}/b/{{00..02}}.tar", r"no such file: .*/b/02\.tar; give webdataset shards"),
        ("{folder}", r"the folder holds no \.tar file, but 1 \.md"),
        ("{folder}/{{0", "Unbalanced braces"),
        ("@{folder}/none", "the list of shards cannot be read"),
        ("@{folder}/readme.md", "the list names no shard; write one path or address a line"),
        ("@{folder}/wrong.list", r"wrong\.list: no such file: .*/c\.tar; mend the list"),
        ("unheard://bucket/", "Protocol not known: unheard; "),
    ],
)
def test_what_names_no_shard_is_one_line(folder: Path, text: str, says: str) -> None:
    (folder / "readme.md").write_text("# nothing\n")
    (folder / "wrong.list").write_text("a/00.tar\nc.tar\n")
    with pytest.raises(UserError, match=says) as caught:
        expand_sources(text.format(folder=folder), "--data")
    assert "\n" not in str(caught.value)
