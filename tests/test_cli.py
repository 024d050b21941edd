"""The command line: instant help, one JSON document, one-line errors, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from upcycle_bench import __version__, cli, display


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "upcycle_bench", *arguments], capture_output=True, text=True, timeout=300, cwd=cwd
    )


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["leaderboard", "--help"]])
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


def test_every_command_answers_help() -> None:
    for name in ("run", "list", "leaderboard", "schema", "doctor"):
        done = command(name, "--help")
        assert done.returncode == 0
        assert "--json" in done.stdout


def test_list_as_json_is_one_document() -> None:
    listing = json.loads(command("list", "--json").stdout)
    assert set(listing) == {"strategies", "suites", "protocols", "broken"}
    cluster_aware = next(row for row in listing["strategies"] if row["name"] == "cluster-aware")
    assert cluster_aware["status"] == "published"
    assert cluster_aware["from"] == f"upcycle-bench {__version__}"
    assert any("tau" in part for part in cluster_aware["reconstructed"])
    assert "CVPR 2026" in cluster_aware["paper"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "-s", "cluster-awre"], "unknown strategy 'cluster-awre': did you mean 'cluster-aware'?"),
        (["run", "-s", "dense", "-p", "smok"], "unknown protocol 'smok': did you mean 'smoke'?"),
        (["run", "-s", "dense", "-p", "smoke", "--set", "moe.expert=4"], "unknown protocol key 'moe.expert'"),
        (["run", "-s", "cluster-aware", "-p", "smoke", "-o", "tau=2"], "cluster-aware: tau: Input should be less than"),
        (["run", "-s", "cluster-aware", "-p", "smoke", "-o", "tau"], "write it as KEY=VALUE"),
        (["run", "-s", "dense", "-p", "clip-b32"], "protocol clip-b32 needs --data"),
        (["run", "-s", "sparse-upcycling", "-p", "smoke", "--set", "moe.ep_size=2"], "torchrun --nproc_per_node 2"),
        (["run", "-s", "dense,cluster-awre"], "unknown strategy 'cluster-awre': did you mean 'cluster-aware'?"),
        (["run", "-s", "dense,all"], "unknown strategy 'all'"),
        (["run", "-s", "dense,dense"], "--strategy names dense twice"),
        (["run", "-s", "all", "-o", "tau=0.8"], "--option belongs to one strategy"),
        (["run", "-s", "dense", "--seeds", "2", "--init-seed", "0", "--train-seed", "0"], "leaves nothing to vary"),
        (["run", "-s", "all", "-p", "clip-b32"], "protocol clip-b32 needs --data"),
        (["leaderboard", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_schema_is_json_schema() -> None:
    schema = json.loads(command("schema").stdout)
    assert {"strategy", "protocol", "scores", "receipt", "cost", "environment", "status"} <= set(schema["properties"])


def test_dry_run_says_what_would_run_and_writes_nothing(tmp_path: Path) -> None:
    done = command("run", "-s", "cluster-aware", "-p", "clip-b16", "--dry-run", "--json", cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert facts["parameters_total"] == 436_212_225
    assert facts["steps"] == 39673
    assert facts["samples"] == 39673 * 32768
    assert len(facts["blocks_replaced"]) == 12
    assert facts["training_flops_without_strategy_loss"] > 1e19
    assert facts["estimated_training_seconds_on_one_such_device"] > 0
    assert len(facts["missing"]) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_broken_plugin_is_named_and_list_still_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from upcycle_bench import registry

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
    """`strategies` is ours only inside our namespace: outside the checkout it must not be importable."""
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
    cli._warn_broken({"outsider:bad": "ImportError: no"})
    assert capsys.readouterr().err == ""


def test_a_label_with_options_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    display.table("cluster-aware[tau=0.8]", [{"strategy": "cluster-aware[tau=0.8]"}])
    assert capsys.readouterr().out.count("cluster-aware[tau=0.8]") == 2
