"""The command line: instant help, one JSON document, one-line errors, exit codes."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from tests.ranks import launch
from upcycle_bench import __version__, cli
from upcycle_bench.cli.common import GOES_ON, interruptible, key_value, uncollected, warn_broken
from upcycle_bench.cli.data import show_world
from upcycle_bench.cli.listing import show_listing
from upcycle_bench.cli.tables import table
from upcycle_bench.data.world import World
from upcycle_bench.data.worlds import load_world
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import file_sha256
from upcycle_bench.util.log_lines import LineReporter
from upcycle_bench.util.progress import Reporter


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "upcycle_bench", *arguments], capture_output=True, text=True, timeout=300, cwd=cwd
    )


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["upcycle-bench", *arguments])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    return int(leave.value.code or 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["upcycle", "--help"],
        ["--version"],
        ["leaderboard", "--help"],
        ["reproduce", "--help"],
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom upcycle_bench.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit as leave: assert leave.code == 0\n"
        "heavy = {'torch', 'deepspeed', 'open_clip', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_version() -> None:
    assert command("--version").stdout == f"upcycle-bench {__version__}\n"


@pytest.mark.parametrize(
    "name",
    [
        "run",
        "receipt",
        "list",
        "leaderboard",
        "schema",
        "doctor",
        "pretrain",
        "compress",
        "upcycle",
        "latency",
        "data build",
        "launch",
        "cache list",
        "cache prune",
    ],
)
def test_every_command_answers_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert call(monkeypatch, *name.split(), "--help") == 0
    assert "--json" in capsys.readouterr().out


def test_list_as_json_is_one_document() -> None:
    listing = json.loads(command("list", "--json").stdout)
    assert set(listing) == {"strategies", "suites", "protocols", "broken"}
    cluster_aware = next(row for row in listing["strategies"] if row["name"] == "cluster-aware")
    assert cluster_aware["status"] == "published"
    assert cluster_aware["from"] == f"upcycle-bench {__version__}"
    assert any("tau" in part for part in cluster_aware["reconstructed"])
    assert "CVPR 2026" in cluster_aware["paper"]
    assert cluster_aware["footing"] == "teacher's FLOPs charged"


def test_list_marks_what_is_reconstructed_wherever_its_name_stands(capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"summary": "s", "paper": "p", "from": "x", "status": "published"}
    entries = [{"name": "one", "reconstructed": []} | parts, {"name": "two", "reconstructed": ["tau"]} | parts]
    show_listing("strategies", entries)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["one", "s", "p", "published"] in rows and ["two", "s", "p", "parts", "reconstructed"] in rows


def test_schema_is_json_schema() -> None:
    schema = json.loads(command("schema").stdout)
    assert {"strategy", "protocol", "scores", "receipt", "cost", "environment", "status"} <= set(schema["properties"])


def test_dry_run_says_what_would_run_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "run", "-s", "cluster-aware", "-p", "clip-b16", "--dry-run", "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["parameters_total"] == 436_212_225
    assert facts["steps"] == 39673
    assert facts["samples"] == 39673 * 32768
    assert len(facts["blocks_replaced"]) == 12
    assert facts["training_flops_without_strategy_loss"] > 1e19
    assert facts["estimated_training_seconds_on_one_such_device"] > 0
    assert len(facts["missing"]) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["run", "pretrain"])
def test_the_default_protocol_is_lab(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Nothing is built here; the lab would be built with progress, here in lines, since there is no terminal."""

    def load_world(world: str, seed: int, reporter: Reporter) -> World:
        assert isinstance(reporter, LineReporter)
        raise UserError(f"asked for {world}")

    monkeypatch.setattr("upcycle_bench.planning.plan.load_world", load_world)
    assert call(monkeypatch, name, *(["-s", "dense"] if name == "run" else [])) == 2
    assert capsys.readouterr().err == "error: asked for lab\n"


def test_a_bare_command_shows_its_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch) == 2
    captured = capsys.readouterr()
    assert "leaderboard" in captured.out + captured.err and "error" not in captured.out + captured.err


def test_bf16_that_is_emulated_is_not_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is one line on stderr, and the protocol does not change."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["run", "-s", "dense", "-p", "smoke", "--dry-run", "--json"]
    bf16 = ["--set", "train.schedule.precision=bf16"]
    for supported, flags, lines in ((["amx"], bf16, 0), ([], [], 0), ([], bf16, 1)):
        monkeypatch.setattr("upcycle_bench.planning.machine.cpu_bf16", lambda supported=supported: supported)
        assert call(monkeypatch, *arguments, *flags) == 0
        captured = capsys.readouterr()
        assert len(captured.err.splitlines()) == lines
        assert json.loads(captured.out)["overrides"] == flags[1:]
    assert captured.err.startswith("warning: ") and "lab-fp32" in captured.err


def test_data_build(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path))
    folder = tmp_path / "worlds" / "digits-1-seed0"
    assert call(monkeypatch, "data", "build", "digits") == 0
    out = capsys.readouterr().out
    assert "digits, just built" in out and f"folder: {folder}" in out.replace("\n/", "/")
    rows = [line.split() for line in out.splitlines()]
    assert ["evaluation", "set", "digits-retrieval", "30"] in rows
    assert call(monkeypatch, "data", "build", "digits") == 0
    assert "in the cache already" in capsys.readouterr().out
    assert call(monkeypatch, "data", "build", "digits", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    manifest = folder / "manifest.json"
    assert document.pop("sha256") == file_sha256(manifest)
    assert document.pop("folder") == str(folder)
    facts = json.loads(manifest.read_text())
    del facts["files"]
    assert document == facts


def test_what_a_table_says_of_the_lab(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The table has the sets that were written (not the splits of icons), every removal, and the classes."""
    facts = {
        "counts": {"train": 9, "near": 1, "set train": 9_000, "set dev-uil": 4, "dev-uil": 5},
        "removed": {"blank": 3, "licence": {"GPL-2.0-only": 207}},
        "classes": 2,
        "files": {},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    show_world(World("lab", (), tmp_path / "eval", "0"), built=False, as_json=False)
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    begin = next(number for number, words in enumerate(out) if words[:1] == ["training"])
    assert out[begin : begin + 5] == [
        ["training", "pairs", "9,000"],
        ["evaluation", "set", "dev-uil", "4"],
        ["removed:", "blank", "3"],
        ["removed:", "licence", "GPL-2.0-only", "207"],
        ["classes", "2"],
    ]


QUICKER = ["-p", "smoke", "--set", "dense.schedule.steps=8", "--set", "dense.schedule.batch_size=32"]


def test_pretrain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The model is trained once; --output gets a copy in half precision."""
    assert call(monkeypatch, "pretrain", *QUICKER, "--json") == 0
    first = json.loads(capsys.readouterr().out)
    checkpoint = Path(first["checkpoint"])
    assert first["trained"] is True
    assert first["sha256"] == file_sha256(checkpoint)
    output = tmp_path / "half.safetensors"
    assert call(monkeypatch, "pretrain", *QUICKER, "--output", str(output)) == 0
    captured = capsys.readouterr()
    loss = f"{first['last metrics']['loss']:.4f}"
    assert "nothing was trained" in captured.out and f"6 steps, last loss {loss}" in captured.out  # 75 % of 8
    assert f"checkpoint: {checkpoint}\n" in captured.out
    assert f"half precision: {output}, sha256 {file_sha256(output)}" in captured.out
    assert "dense model" not in captured.err
    assert output.stat().st_size < 0.6 * checkpoint.stat().st_size
    assert {path.name for path in tmp_path.iterdir()} == {"half.safetensors", "half.json", "half.jsonl"}
    assert call(monkeypatch, "pretrain", *QUICKER, "--output", str(output), "--json") == 0
    assert json.loads(capsys.readouterr().out)["output sha256"] == file_sha256(output)


@pytest.mark.parametrize("every", ["0", "1"])
def test_an_interrupted_pretraining(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], every: str
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("upcycle_bench.training.pretrain.pretrain", interrupted)
    flags = ["--set", "dense.seed=77", "--set", f"train.checkpoint_every={every}"]
    assert call(monkeypatch, "pretrain", *QUICKER, *flags) == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"interrupted: {GOES_ON}\n")


def test_pretrain_with_local_data_and_two_ranks() -> None:
    """Rank 0 prints one document."""
    shards = load_world("digits", 0).train_shards[0].parent
    flags = ["--set", "model=smoke-vit", "--set", "dense.schedule.steps=4", "--set", "dense.schedule.batch_size=32"]
    flags += ["--set", "dense.schedule.precision=fp32", "--set", "threads=2", "--data", str(shards), "--json"]
    facts = json.loads(launch(2, "-m", "upcycle_bench", "pretrain", "-p", "clip-b32", *flags))
    assert facts["trained"] and facts["samples"] == 3 * 32


def test_a_broken_plugin_is_named_and_list_still_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from upcycle_bench.planning import registry

    real = registry.load_registry()
    real.broken["outsider:bad"] = "ImportError: no"
    monkeypatch.setattr(registry, "load_registry", lambda: real)
    monkeypatch.setattr(sys, "argv", ["upcycle-bench", "list", "strategies"])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    assert leave.value.code == 0
    captured = capsys.readouterr()
    assert "cluster-aware" in captured.out
    assert captured.err == "warning: plugin outsider:bad did not load: ImportError: no\n"


def test_the_installed_packages_do_not_claim_common_names() -> None:
    """Our `strategies` lives in our namespace: outside the checkout `import strategies` must fail."""
    code = (
        "from importlib.util import find_spec\n"
        "assert find_spec('upcycle_bench.strategies.cluster_aware')\n"
        "assert not find_spec('strategies')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rank_one_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    warn_broken({"outsider:bad": "ImportError: no"})
    assert capsys.readouterr().err == ""


def test_a_label_with_options_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table("cluster-aware[tau=0.8]", [{"strategy": "cluster-aware[tau=0.8]"}])
    assert capsys.readouterr().out.count("cluster-aware[tau=0.8]") == 2


def fail_uncollected() -> None:
    with uncollected():
        assert not gc.isenabled()
        raise ImportError


@pytest.mark.parametrize("enabled", [True, False])
def test_imports_are_not_collected(enabled: bool) -> None:
    before = gc.isenabled()
    switch = {True: gc.enable, False: gc.disable}
    switch[enabled]()
    try:
        with pytest.raises(ImportError):
            fail_uncollected()
        assert gc.isenabled() is enabled
    finally:
        switch[before]()


def test_list_leaves_deepspeed_and_others_alone() -> None:
    """DeepSpeed, and Triton with PyTorch's own FLOP counter, would be a fifth of what `list` takes."""
    code = "import sys; from upcycle_bench.cli import app; app(['list', '--json'], standalone_mode=False)"
    code += "; sys.exit(bool({'deepspeed', 'triton', 'open_clip', 'faiss'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_an_interrupted_command_ends_with_130_and_sigterm_means_afterwards_what_it_did(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    @interruptible("nothing was written")
    def wait() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with pytest.raises(typer.Exit) as leave:
        wait()
    assert leave.value.exit_code == 130
    assert capsys.readouterr().err == "interrupted: nothing was written\n"
    assert signal.getsignal(signal.SIGTERM) == before
    with interruptible("unused"):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_options_value_may_hold_an_equals_sign() -> None:
    assert key_value("eval=a=b.tar") == ("eval", "a=b.tar")


def test_a_run_that_is_asked_to_stop_ends_with_75(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("upcycle_bench.run.run", lambda *_, **__: os.kill(os.getpid(), signal.SIGUSR1) or time.sleep(5))
    for flags, then in ([], GOES_ON), (["--fresh"], GOES_ON.replace("command", "command without --fresh")):
        assert call(monkeypatch, "run", "-s", "dense", "-p", "smoke", *flags) == 75
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("", f"stopped by SIGUSR1: {then}\n")


def test_a_run_ends_with_75_when_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("upcycle_bench.run.run", lambda *_, **__: time.sleep(30))
    assert call(monkeypatch, "run", "-s", "dense", "-p", "smoke", "--stop-after", "1s") == 75
    assert "stopped by --stop-after: " in capsys.readouterr().err
    for arguments in (["run", "-s", "dense"], ["pretrain"]):
        assert call(monkeypatch, *arguments, "--stop-after", "soon") == 2
        assert "error: --stop-after 'soon': write a time as 90s, 45m" in capsys.readouterr().err
