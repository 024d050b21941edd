"""What a user gives as training data and what can go wrong with it: one line, a status that is not 0, and no hang."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.cli.test_main import call
from tests.data.test_pair_index import PNG
from tests.data.test_shards import packed
from upcycle_bench import record
from upcycle_bench.data import pairs
from upcycle_bench.data.open_index import open_index
from upcycle_bench.data.sources import expand_sources
from upcycle_bench.data.worlds import load_world
from upcycle_bench.model.clip import create_clip

MODEL = "smoke-vit"


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """40 pairs whose captions have two lines, 3 samples without a caption, and one with a dot in its name."""
    files = [file for n in range(40) for file in ((f"{n:02d}.png", PNG), (f"{n:02d}.txt", b"a word\non two lines"))]
    files += [*((f"x{n}.png", PNG) for n in range(3)), ("a.b.png", PNG), ("a.b.txt", b"c")]
    (tmp_path / "train").mkdir()
    (path := tmp_path / "train" / "0.tar").write_bytes(packed(files))
    return path


@pytest.fixture
def arguments(tmp_path: Path, shard: Path) -> dict[str, list[str]]:
    """The commands that read training shards, on those of `shard`."""
    torch.save(create_clip(MODEL, seed=3).model.state_dict(), dense := tmp_path / "dense.pt")
    sets = load_world("digits", 0).eval_root
    settings = [f"model={MODEL}", "train.schedule.steps=2", "train.schedule.batch_size=32", "train.log_every=1"]
    settings += ['suites.zero-shot.sets=["digits-test", "digits-validation"]']
    settings += ['suites.zero-shot.headlines.imagenet=["digits-test"]']
    settings += ['suites.zero-shot.headlines.shift=["digits-validation"]']
    run = ["run", "-s", "sparse-upcycling", "-p", "clip-b32", "--checkpoint", str(dense), "--eval-data", str(sets)]
    run += [part for one in settings for part in ("--set", one)]
    run += ["--results", str(tmp_path / "results"), "--data", str(shard.parent)]
    upcycle = ["upcycle", "-m", MODEL, "--pretrained", str(dense), "--experts", "2", "-o", "pairs=30"]
    upcycle += ["--output", str(tmp_path / "moe.safetensors"), "--calibration", str(shard.parent)]
    return {"run": run, "upcycle": upcycle}


LEFT_OUT = {"dots in a name": 1, "no caption": 3}
WORDS = "4 of 44 training samples are left out: 1 dots in a name, 3 no caption"


def test_a_dry_run_counts_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: dict[str, list[str]]
) -> None:
    assert call(monkeypatch, *arguments["run"], "--dry-run", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["training_pairs"], facts["training_samples_left_out"]) == (40, LEFT_OUT)
    assert call(monkeypatch, *arguments["run"], "--dry-run", "--seeds", "2", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["training_pairs"], facts["training_samples_left_out"]) == (40, LEFT_OUT)
    assert call(monkeypatch, *arguments["run"], "--dry-run") == 0
    assert "dots in a name 1, no caption 3" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("augmentation", ["random-resized-crop", "none"])  # none: decoded arrays
def test_a_run_says_and_records_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: dict[str, list[str]],
    augmentation: str,
) -> None:
    for times in (1, 2):  # the second run finds the arrays and the weights in the cache
        capsys.readouterr()
        assert call(monkeypatch, *arguments["run"], "--set", f"train.schedule.augmentation={augmentation}") == 0
        line = f"warning: --data: {WORDS} (`upcycle-bench data check` says more)"
        assert capsys.readouterr().err.splitlines().count(line) == 1
        made = [record.read(path) for path in record.record_paths(tmp_path / "results")]
        assert len(made) == times
        assert all(each.diagnostics["training_samples"] == {"pairs": 40, "left_out": LEFT_OUT} for each in made)
        assert all(each.protocol.resolved["data"]["captions"] == "text" for each in made)  # type: ignore[index, call-overload]


@pytest.mark.parametrize(("captions", "number"), [("text", 1), ("lines", 2)])
def test_captions_of_local_data_are_one_text_unless_the_protocol_says_lines(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, list[str]], captions: str, number: int
) -> None:
    found = []
    monkeypatch.setattr(pairs.PairDataset, "say_left_out", lambda self: found.append(self.decode(0)[1]))
    more = ["--set", f"data.captions={captions}"] if captions == "lines" else []
    assert call(monkeypatch, *arguments["run"], *more) == 0
    assert call(monkeypatch, *arguments["upcycle"], "--captions", captions) == 0
    assert [len(each) for each in found] == [number, number]


def test_upcycle_says_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: dict[str, list[str]]
) -> None:
    assert call(monkeypatch, *arguments["upcycle"], "--json") == 0
    said = capsys.readouterr()
    assert f"warning: --calibration: {WORDS} (`upcycle-bench data check` says more)" in said.err.splitlines()
    assert json.loads(said.out)["calibration_samples"] == {"pairs": 40, "left_out": LEFT_OUT}


BAD = {
    "gzip": (b"\x1f\x8b" + bytes(900), "it is compressed with gzip, and samples are read at their place; unpack it"),
    "empty": (b"", "it is empty (0 bytes); copy or download it again."),
    "no pair": (packed([("0.gif", PNG)]), "no sample with an image and a .txt caption; left out: 1 unknown suffix"),
    "cut": (
        packed([(f"{n}.{suffix}", PNG) for n in (0, 1) for suffix in ("png", "txt")])[:3072],
        "it is cut at byte 3,072, at a",
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize(("door", "option"), [("run", "--data"), ("dry run", "--data"), ("upcycle", "--calibration")])
def test_a_bad_shard_is_one_line_with_the_option(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shard: Path,
    arguments: dict[str, list[str]],
    door: str,
    option: str,
    kind: str,
) -> None:
    content, says = BAD[kind]
    shard.write_bytes(content)
    command = [*arguments["run"], "--dry-run"] if door == "dry run" else arguments[door]
    assert call(monkeypatch, *command) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {option} {shard}: {says}")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["{}/0.tar", "{}/1.tar", "{}/2.tar"], "unexpected extra argument(s) ({0}/1.tar {0}/2.tar). To name several"),
        (["{}/{{0..3}}.tar"], "{0}/{{0..3}}.tar: no such file: {0}/1.tar; give webdataset shards"),
        (["{}/{{0..3.tar"], "{0}/{{0..3.tar: Unbalanced"),
        ([""], "'': no path stands there; give webdataset shards, for example 'train/{{000..127}}.tar'."),
        (["--json"], "'--json': no path stands there"),
    ],
)
@pytest.mark.parametrize(("door", "option"), [("run", "--data"), ("upcycle", "--calibration")])
def test_what_names_no_shards_is_one_line_with_a_hint(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shard: Path,
    arguments: dict[str, list[str]],
    door: str,
    option: str,
    given: list[str],
    says: str,
) -> None:
    command = [*arguments[door][:-1], *(each.format(shard.parent) for each in given)]
    assert call(monkeypatch, *command) == 2
    said = capsys.readouterr().err
    assert says.format(shard.parent) in said and said.count("\n") == 1
    assert option in said or "put a range of shards into quotes" in said


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["run", "--data=a.tar", "--data=b.tar"], "--data is given 2 times; put a range of shards into quotes"),
        (["upcycle", "--calibration", "a", "--calibration", "b"], "--calibration is given 2 times; put a range of"),
        (["data", "check", "a.tar", "b.tar"], "To name several shards, put a range of shards into quotes"),
        (
            ["-p", "lab", "run", "-s", "dense"],
            "No such option: -p. Options stand behind their command: upcycle-bench run",
        ),
        (
            ["run", "-s", "dense", "--data", "--protocol", "lab"],
            "extra argument(s) (lab). An option before it may lack",
        ),
        (["run", "-s", "dense", *(f"{n}.tar" for n in range(99))], "(0.tar 1.tar 2.tar and more). To name several"),
    ],
)
def test_a_command_line_that_the_shell_or_the_order_spoilt_is_one_line_with_a_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str], says: str
) -> None:
    assert call(monkeypatch, *command) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.fixture
def bad_shard(tmp_path: Path, shard: Path) -> Path:
    """A second shard: 24 pairs, of which three images are broken."""
    broken = {0: PNG[:45], 5: b"<html>404</html>", 9: PNG[:45]}
    files = [file for n in range(24) for file in ((f"c{n:02d}.png", broken.get(n, PNG)), (f"c{n:02d}.txt", b"d"))]
    (path := shard.parent / "1.tar").write_bytes(packed(files))
    return path


@pytest.mark.parametrize("how", [[], ["--set", "train.schedule.augmentation=none"], ["--workers", "2"]])
def test_bad_samples_end_no_run_and_stand_in_its_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: dict[str, list[str]], bad_shard: Path, how: list[str]
) -> None:
    """Two steps of 32 are one epoch of 64 pairs: each bad one is met at least once."""
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "cache"))
    assert call(monkeypatch, *arguments["run"], "--set", "data.bad_samples=0.3", *how) == 0
    (path,) = record.record_paths(tmp_path / "results")
    samples = record.read(path).diagnostics["training_samples"]  # type: ignore[index]
    weights = record.read(path).hashes.weights
    assert (
        samples["pairs"] == 64
        and samples["listed_as_bad"] == 3
        and samples["bad"].keys() == {"truncated image", "no image (HTML)"}
    )
    assert samples["bad"]["truncated image"] >= 2 and samples["bad"]["no image (HTML)"] >= 1
    assert samples["first_bad"]["no image (HTML)"] == "1.tar: c05"
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert lines[-1]["bad_samples"] == sum(samples["bad"].values())
    listed = open_index(expand_sources(str(bad_shard.parent))).bad
    assert sorted(listed.values()) == ["no image (HTML)", "truncated image", "truncated image"]
    if not how:  # listed, they are not read again, and no bit and no count changes
        assert call(monkeypatch, *arguments["run"], "--set", "data.bad_samples=0.3", "--fresh") == 0
        (path,) = set(record.record_paths(tmp_path / "results")) - {path}
        again = record.read(path).diagnostics["training_samples"]  # type: ignore[index]
        assert (again["bad"], again["listed_as_bad"]) == (samples["bad"], samples["listed_as_bad"]) and again["bad"]
        assert record.read(path).hashes.weights == weights


def test_too_many_bad_samples_end_a_run_with_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: dict[str, list[str]],
    bad_shard: Path,
) -> None:
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "cache"))
    assert call(monkeypatch, *arguments["run"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "samples are bad, more than data.bad_samples=0.01 of them; most often truncated image" in error
    assert "the first is 1.tar: c0" in error and "`upcycle-bench data check SHARDS --list`" in error
    (path,) = record.record_paths(tmp_path / "results")
    assert "samples are bad, more than" in (record.read(path).reason or "")


def test_synthetic_data_train_and_land_in_the_open_division(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: dict[str, list[str]]
) -> None:
    command = [*arguments["run"][:-1], "synthetic"]
    assert call(monkeypatch, *command, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["missing"] == []
    assert call(monkeypatch, *command) == 0
    (path,) = record.record_paths(tmp_path / "results")
    made = record.read(path)
    assert (made.hashes.data, made.protocol.division) == ("synthetic", "open")
    assert made.cost is not None and made.cost.phases["train"].samples == 64


def test_a_killed_loader_ends_the_run_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: dict[str, list[str]]
) -> None:
    part, here = pairs.PairDataset.part, os.getpid()

    def killed(self: pairs.PairDataset, seed: int | str, step: int, *more: int) -> pairs.Batch:
        if step == 1 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return part(self, seed, step, *more)

    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "cache"))  # which has no finished training
    monkeypatch.setattr(pairs.PairDataset, "part", killed)
    assert call(monkeypatch, *arguments["run"], "--workers", "2") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "training batches: a process that loads them was lost, perhaps for want" in errors[0]
    (path,) = record.record_paths(tmp_path / "results")
    assert "training batches: a process that loads them was lost" in (record.read(path).reason or "")


@pytest.mark.parametrize("where", ["finished", "record", "checkpoint"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: dict[str, list[str]],
    where: str,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {
        "finished": "upcycle_bench.util.files.os.fsync",  # the last step of every small file
        "record": "upcycle_bench.record.write_atomically",
        "checkpoint": "upcycle_bench.training.checkpoint_files.write_atomically",
    }[where]
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "cache"))
    three = [part.replace("train.schedule.steps=2", "train.schedule.steps=3") for part in arguments["run"]]
    command = [*three, "--set", "train.checkpoint_every=1"]  # the second checkpoint in a row ends a training
    with monkeypatch.context() as patched:
        patched.setattr(target, full)
        assert call(monkeypatch, *command) == 2
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "Traceback" not in said
    assert "o space" in errors[0]
    left = [path for root in ("cache", "results") for path in (tmp_path / root).rglob("*") if path.is_file()]
    assert not [path for path in left if path.suffix in (".tmp", ".npz", ".jsonl") and "results" in path.parts]
    assert not [path for path in left if ".tmp" in path.name]
    steps = {path.parent.name for path in left if path.parent.name.startswith("step")}
    assert steps == ({"step2", "step3"} if where == "record" else set())  # the last two stay for the next try
    assert call(monkeypatch, *command) == 0  # with space again
