"""`data index`, and what becomes of a run whose shards are damaged and then mended."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cli.test_main import call
from tests.cli.test_training_data import arguments, shard  # noqa: F401  (fixtures)
from tests.data.test_pair_index import PNG
from tests.data.test_shards import packed
from upcycle_bench.cli import app
from upcycle_bench.data import shard_index


@pytest.fixture(autouse=True)
def _own_index(tmp_path: Path) -> None:
    """The worlds of the session's cache, and an index of its own."""
    shutil.rmtree(Path(os.environ["UPCYCLE_BENCH_CACHE"]) / "index", ignore_errors=True)


def indexed(*given: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", "index", *given], catch_exceptions=False)
    return result.exit_code, result.stdout


def pairs(numbers: range, **changes: bytes) -> list[tuple[str, bytes]]:
    files = [file for n in numbers for file in ((f"{n:03d}.png", PNG), (f"{n:03d}.txt", f"word {n}".encode()))]
    return [(name, changes.get(f"i{name[:3]}", content) if name[3:] == ".png" else content) for name, content in files]


def test_the_index_says_what_the_shards_hold(tmp_path: Path) -> None:
    (folder := tmp_path / "train").mkdir()
    (folder / "0.tar").write_bytes(packed([*pairs(range(3)), ("9.png", PNG)]))
    status, said = indexed(str(folder), "--json")
    facts = json.loads(said)
    assert status == 0 and facts["left_out"] == {"no caption": 1} and facts["pairs_per_second"] > 0
    assert (facts["number_of_shards"], facts["pairs"], facts["bytes_of_shards"]) == (1, 3, 10_240)
    status, said = indexed(str(folder))
    text = " ".join(said.split())
    assert status == 0 and "pairs 3 " in text and "left out: no caption 1 " in text and "no caption: no .txt" in text
    assert f"identity: {facts['identity']}" in text and "pairs per second" not in text  # nothing was built


def dry_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: list[str]) -> dict[str, Any]:
    assert call(monkeypatch, *run, "--dry-run", "--json") == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    del facts["estimated_training_seconds_on_one_such_device"]
    return facts


def test_a_listed_image_is_mended_and_the_fingerprint_stays(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shard: Path,  # noqa: F811
    arguments: dict[str, list[str]],  # noqa: F811
) -> None:
    shard.write_bytes(packed(pairs(range(40), i007=PNG[:30])))
    first = dry_run(monkeypatch, capsys, arguments["run"])
    monkeypatch.setattr(shard_index, "find_pairs", lambda *_: pytest.fail("the shard was read again"))
    assert dry_run(monkeypatch, capsys, arguments["run"]) == first
    monkeypatch.undo()
    assert call(monkeypatch, "data", "check", str(shard.parent), "--list") == 0
    capsys.readouterr()
    for mended in (pairs(range(40)), pairs(range(7)) + pairs(range(8, 40))):
        shard.write_bytes(packed(mended))
        now = dry_run(monkeypatch, capsys, arguments["run"])
        assert now == first | {"training_pairs_known_to_be_bad": 1}
    shard.write_bytes(packed([*pairs(range(39)), ("039.png", PNG), ("039.txt", b"another word")]))
    assert call(monkeypatch, *arguments["run"], "--dry-run", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["training_fingerprint"] != first["training_fingerprint"]
    lines = [line for line in said.err.splitlines() if "is another data set now" in line]
    assert len(lines) == 1 and lines[0].partition(" ")[2].startswith(
        f"--data {shard}: the shard has changed, and pair 39 of it (now 039.png)"
    )


def test_an_index_warns_of_what_a_training_refuses(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shard: Path,  # noqa: F811
    arguments: dict[str, list[str]],  # noqa: F811
) -> None:
    """So does a dry run that lacks other paths."""
    cut = shard.with_name("001.tar")
    cut.write_bytes(packed(pairs(range(40, 80)))[:9000])
    shard.with_name("002.tar.gz").write_bytes(b"x")
    assert call(monkeypatch, "data", "index", str(shard.parent)) == 0
    *_, first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith(f"warning: {cut}: it is cut at byte 9,000")
    assert second == "warning: a training refuses these shards: more than 1% of the pairs are lost with them."
    assert third == f"warning: {shard.parent}: 002.tar.gz is passed over; only .tar files are shards."
    assert call(monkeypatch, "run", "-s", "dense", "-p", "clip-b32", "--data", str(shard.parent), "--dry-run") == 2
    assert f"error: --data {cut}: it is cut at byte 9,000" in capsys.readouterr().err


def test_a_cut_shard_among_whole_ones_is_counted_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shard: Path,  # noqa: F811
    arguments: dict[str, list[str]],  # noqa: F811
) -> None:
    for number in range(1, 4):
        first = 40 * number
        (shard.parent / f"{number}.tar").write_bytes(packed(pairs(range(first, first + 40))))
    (shard.parent / "2.tar").write_bytes(packed(pairs(range(80, 120)))[: 2048 * 39])  # the last pair is lost
    assert call(monkeypatch, *arguments["run"], "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["status"] == "ok"
    counted = {"dots in a name": 1, "no caption": 3, "cut shard": 1}
    assert made["diagnostics"]["training_samples"] == {"pairs": 159, "left_out": counted}
