"""`cache list` and `cache prune`: what is there, and that nothing is deleted that somebody needs."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.records import make_record
from upcycle_bench import cli, record
from upcycle_bench.util.cache import locked

Cache = Callable[..., tuple[int, str, str]]
DAY = 86_400


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with something of each kind, all last used 10 days ago."""
    root = tmp_path / "cache"
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(root))
    about = {"command": {"strategy": "cluster-aware", "protocol": "lab", "seeds": [0, 3]}, "facts": {}}
    files = {
        "runs/aaa/run.json": json.dumps(about),
        "runs/aaa/checkpoints/step200/model.pt": "x" * 100,
        "runs/aaa/checkpoints/step1000/model.pt": "x" * 100,
        "runs/dense-old/metrics.jsonl": "{}",
        "weights/used.safetensors": "x" * 1000,
        "weights/unused.safetensors": "x" * 2000,
        "trained/k1.json": json.dumps({"weights": "used"}),
        "trained/k1.jsonl": "",
        "trained/k2.json": json.dumps({"weights": "unused"}),
        "trained/k2.jsonl": "",
        "dense/recipe.safetensors": "x" * 10,
        "dense/recipe.json": "{}",
        "worlds/lab-2.1/train/0.tar": "x" * 50,
        "worlds/.lab-2.1.abc123.tmp/lab-2.1/0.tar": "x" * 5,
        "features/f.npz": "x" * 7,
        "mystery/thing": "x",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in [root, *root.rglob("*")]:
        age(path, 10)
    return root


def age(path: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(path, (then, then))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cache:
    """`upcycle-bench cache`: exit status, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["upcycle-bench", "cache", *arguments])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        return int(leave.value.code or 0), *capsys.readouterr()

    return call


def standing(root: Path) -> set[str]:
    """What there is below the kinds, without locks."""
    return {f"{path.parent.name}/{path.name}" for path in root.glob("*/*") if path.parent.name != "locks"}


def test_list_has_each_kind_and_each_interrupted_training(root: Path, cache: Cache) -> None:
    status, out, _ = cache("list", "--json")
    found = json.loads(out)
    kinds: dict[str, dict[str, Any]] = {row.pop("kind"): row for row in found["kinds"]}
    assert status == 0 and found["cache"] == str(root)
    assert (kinds["weights"]["bytes"], kinds["weights"]["files"], kinds["weights"]["entries"]) == (3000, 2, 2)
    assert (kinds["dense"]["entries"], kinds["dense"]["files"]) == (1, 2)  # a model is its files together
    assert kinds["worlds"]["bytes"] == 50 and kinds["half-written"]["bytes"] == 5
    assert kinds["mystery"]["what"] == "not known to this version"
    assert 9.9 * DAY < time.time() - kinds["features"]["last_used"] < 10.1 * DAY
    run, old = found["runs"]
    assert (run["strategy"], run["protocol"], run["seeds"], run["step"]) == ("cluster-aware", "lab", [0, 3], 1000)
    assert (old["strategy"], old["step"], old["going_on"]) == (None, 0, False)
    status, out, _ = cache("list")
    assert status == 0 and "cluster-aware" in out and out.count("10 d") >= 8  # no look at it counts as a use


def test_list_of_no_cache(tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "none"))
    status, out, _ = cache("list", "--json")
    assert status == 0 and json.loads(out)["kinds"] == [] and not (tmp_path / "none").exists()
    assert cache("list")[0] == 0


def test_prune_takes_what_is_old_and_of_that_kind(root: Path, cache: Cache) -> None:
    before = standing(root)
    age(root / "features" / "f.npz", 2)
    assert cache("prune", "--kind", "features,runs", "--older-than", "5d", "--dry-run")[0] == 0
    assert standing(root) == before
    status, out, _ = cache("prune", "--kind", "features,runs", "--older-than", "5d", "--yes")
    assert status == 0 and "in 2 entries" in out
    assert before - standing(root) == {"runs/aaa", "runs/dense-old"}
    status, out, _ = cache("prune", "--older-than", "3d", "--yes", "--json")
    assert status == 0 and standing(root) == {"features/f.npz"} and json.loads(out)["bytes"] > 3000


def test_what_numbers_a_users_pairs_is_deleted_by_its_name_alone(root: Path, cache: Cache) -> None:
    """Deleted, mended shards would be numbered anew, and their runs would not go on."""
    names = ["f00-1.rows", "f00-2.rows", "f00-aaa.json", "f00.json", "aaa.bad.jsonl", "shards/0a/b.idx"]
    for name in names:
        path = root / "index" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    for path in (root / "index").rglob("*"):
        age(path, 10)
    status, _, err = cache("prune", "--older-than", "1d", "--yes")
    assert status == 0 and err.count("kept: index/") == 2 and "kept: index/f00: runs on these shards need" in err
    assert cache("prune", "--kind", "index,features", "--yes")[0] == 0
    assert standing(root) == {f"index/{name}" for name in names[:-1]}
    status, out, _ = cache("prune", "--kind", "index", "--yes")
    assert status == 0 and "in 2 entries" in out and standing(root) == set()


def test_unused_weights_are_those_without_a_record(root: Path, cache: Cache, tmp_path: Path) -> None:
    results = tmp_path / "results"
    status, _, err = cache("prune", "--unused", "--results", str(results), "--yes")
    assert status == 2 and "no records below" in err and "no weights are known as used" in err
    made = make_record(status="failed", reason="r")
    named = made.model_copy(update={"hashes": made.hashes.model_copy(update={"weights": "used"})})
    record.write(named, None, results)
    before = standing(root)
    assert cache("prune", "--unused", "--results", str(results), "--dry-run")[0] == 0 and standing(root) == before
    assert cache("prune", "--unused", "--results", str(results), "--yes")[0] == 0
    assert before - standing(root) == {"weights/unused.safetensors", "trained/k2.json", "trained/k2.jsonl"}
    for name in ("new", *"abcd"):
        (root / "weights" / f"{name}.safetensors").write_text("x")  # of a run that is still evaluated
    status, out, err = cache("prune", "--unused", "--results", str(results), "--yes")
    assert status == 0 and "to delete" not in out and "freed 0 B in 0 entries" in out
    assert "kept: weights/a and 4 more: it was used within a day, and its record may be still to come" in err
    assert (root / "weights" / "new.safetensors").is_file()


def test_what_a_living_process_has_locked_stays(root: Path, cache: Cache) -> None:
    """A training reads worlds and dense models without a lock: they stay while one goes on."""
    with locked(root / "runs" / "aaa"):
        status, out, _ = cache("list", "--json")
        assert [run["going_on"] for run in json.loads(out)["runs"]] == [True, False]
        status, _, err = cache("prune", "--older-than", "1d", "--yes")
        assert status == 0 and "kept: runs/aaa: a process has locked it" in err
        assert "kept: worlds/lab-2.1: a training goes on, which may read it" in err
        assert standing(root) == {"runs/aaa", "worlds/lab-2.1", "dense/recipe.safetensors", "dense/recipe.json"}
    with locked(root / "dense" / "recipe.safetensors"):
        assert cache("prune", "--older-than", "1d", "--yes")[0] == 0
        assert standing(root) == {"dense/recipe.safetensors", "dense/recipe.json"}
    assert cache("prune", "--older-than", "1d", "--yes")[0] == 0
    assert standing(root) == set() and list((root / "locks").iterdir())


def test_the_dense_model_of_a_training_that_waits_stays(root: Path, cache: Cache) -> None:
    """Another one would have to be trained, on which the training cannot go on. Without the training it may go."""
    (root / "runs" / "aaa" / "run.json").write_text(json.dumps({"dense": "recipe"}))
    status, _, err = cache("prune", "--kind", "dense", "--yes")
    assert status == 0 and "kept: dense/recipe: an interrupted training goes on from it" in err
    assert "dense/recipe.safetensors" in standing(root)
    assert cache("prune", "--kind", "dense,runs", "--yes")[0] == 0
    assert not standing(root) & {"dense/recipe.safetensors", "runs/aaa"}


def test_the_shards_of_this_machine_are_shown_and_pruned(
    root: Path, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else in that folder is: it may be anyone's."""
    for name in ("node/shards/a.tar", "node/other/b.tar", "cache/shards/c.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x" * 30)
    monkeypatch.setenv("UPCYCLE_BENCH_LOCAL_CACHE", str(tmp_path / "node"))
    (shards,) = (row for row in json.loads(cache("list", "--json")[1])["kinds"] if row["kind"] == "shards")
    assert (shards["files"], shards["bytes"]) == (2, 60)
    assert cache("prune", "--kind", "shards", "--yes")[0] == 0
    assert [path.name for path in (tmp_path / "node").glob("*/*")] == ["b.tar"]
    assert not (root / "shards" / "c.tar").exists()


def test_what_may_still_be_written_stays(root: Path, cache: Cache) -> None:
    part = root / "worlds" / ".lab-2.1.abc123.tmp"
    age(part / "lab-2.1" / "0.tar", 0.1)
    status, _, err = cache("prune", "--kind", "half-written", "--yes")
    assert status == 0 and part.exists() and "it may still be written" in err
    age(part / "lab-2.1" / "0.tar", 2)
    with locked(root / "worlds" / "lab-2.1"):
        assert cache("prune", "--kind", "half-written", "--yes")[0] == 0 and part.exists()
    assert cache("prune", "--kind", "half-written", "--yes")[0] == 0 and not part.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "cache prune needs --older-than, --kind or --unused"),
        (["--older-than", "30"], "--older-than '30': write an age as 45m, 12h, 30d or 4w"),
        (["--kind", "wieghts"], "unknown kind 'wieghts': did you mean 'weights'?"),
        (["--kind", "locks"], "unknown kind 'locks'"),
        (["--kind", "runs"], "nobody can answer here; give --yes or --dry-run"),
    ],
)
def test_nothing_is_deleted_on_a_wrong_option(root: Path, cache: Cache, arguments: list[str], says: str) -> None:
    before = standing(root)
    status, _, err = cache("prune", *arguments)
    assert status == 2 and says in err and standing(root) == before


@pytest.mark.parametrize("answer", ["n", "y"])
def test_it_asks(root: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self, *_: Any) -> str:
            return f"{answer}\n"

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda *_: answer)
    status, _, _ = cache("prune", "--kind", "runs")
    assert (status, (root / "runs" / "aaa").exists()) == ((130, True) if answer == "n" else (0, False))
