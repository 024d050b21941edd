"""The script that measures the index runs, and opens and builds what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import index_scale
from upcycle_bench.data import open_index


def test_a_generated_index_is_opened_without_much_memory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    index_scale.main(["open", "--pairs", "2000003", "--shards", "300", "--folder", str(tmp_path / "scale")])
    first, _ = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert (first["pairs"], first["shards"]) == (2_000_003, 300)
    assert first["private"] - first["private_before"] < 16 << 20  # the rows alone have 32 MB
    assert not (tmp_path / "scale").exists()


def test_generated_shards_are_indexed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(open_index, "cores", open_index.cores)  # the script replaces it
    index_scale.main(["build", "--pairs", "100", "--shards", "3", "--folder", str(tmp_path / "scale")])
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert all(line["pairs"] == 100 and line["bytes_of_index"] > 1600 for line in lines)
    assert len({line["identity"] for line in lines}) == 1
