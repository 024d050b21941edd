"""The real entry point, as a user starts it: a whole `smoke` run without a compiler and without network; the wheel."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NO_NETWORK = "import socket\ndef refuse(*a, **k): raise OSError('no network')\nsocket.socket.connect = refuse\n"


def test_the_whole_smoke_run(tmp_path: Path) -> None:
    """`upcycle-bench run --strategy cluster-aware --protocol smoke`, nothing overridden, from an empty cache.

    No compiler is on PATH and every attempt to connect to anything fails.
    """
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    environment = {
        **os.environ,
        "PATH": str(tmp_path / "empty"),
        "CC": "/nonexistent",
        "CXX": "/nonexistent",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "UPCYCLE_BENCH_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(tmp_path),
    }
    connect = "import socket; socket.create_connection(('127.0.0.1', 9))"
    refused = subprocess.run([sys.executable, "-c", connect], env=environment, capture_output=True, text=True)
    assert "no network" in refused.stderr
    script = Path(sys.executable).with_name("upcycle-bench")
    command = [
        sys.executable,
        str(script),
        "run",
        "--strategy",
        "cluster-aware",
        "--protocol",
        "smoke",
        "--results",
        str(tmp_path / "out"),
        "--json",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(done.stdout)
    assert record["status"] == "ok"
    assert record["protocol"]["division"] == "closed"
    values = {(score["dataset"], score["metric"]): score["value"] for score in record["scores"]}
    assert values["digits-test", "acc1"] > 0.8  # chance is 0.1
    assert values["digits-test", "log_likelihood"] > -0.8  # chance is -2.3
    assert values["digits-test", "log_rank"] < 0.25  # chance is 1.51; a middle place of 1.3
    assert record["headlines"]["in-distribution"]["value"] < record["headlines"]["in-distribution"]["chance"] - 1
    assert values["digits-retrieval", "text_retrieval_recall@1"] > 0.4  # chance is 0.03
    for layer in record["receipt"]["layers"].values():
        assert layer["router_agreement"] > 0.999
        assert layer["mean_rank"] > 32  # above half of full rank, 64
        assert layer["router_entropy"] < 2.0794  # ln 8: centroids route more decidedly than chance
    assert set(record["cost"]["phases"]) == {"calibrate", "upcycle", "train", "validate", "evaluate"}
    assert not (tmp_path / "extensions").exists()  # nothing was compiled


def test_the_wheel_holds_everything_inside_our_namespace(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "results", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    tops = {name.split("/")[0] for name in names}
    assert tops == {"upcycle_bench", wheel.name.split("-py3")[0] + ".dist-info"}
    for folder, installed, pattern in (
        ("strategies", "upcycle_bench/strategies", "*.py"),
        ("suites", "upcycle_bench/suites", "*.py"),
        ("upcycle_bench/protocols", "upcycle_bench/protocols", "*.toml"),
        ("upcycle_bench/assets/models", "upcycle_bench/assets/models", "*.json"),
        *(
            ("upcycle_bench/assets/checkpoints", "upcycle_bench/assets/checkpoints", f"*.{kind}")
            for kind in ("json", "jsonl", "safetensors", "md")
        ),
    ):
        files = {f"{installed}/{path.name}" for path in (ROOT / folder).glob(pattern)}
        assert files and files <= names
    for path in (ROOT / "strategies").glob("[a-z]*.py"):
        assert f"upcycle_bench.strategies.{path.stem}" in entry_points, (
            "a strategy without an entry point is never found"
        )


@pytest.mark.parametrize("target", ["run", "test", "lint"])
def test_make_targets_set_themselves_up(target: str) -> None:
    """Each target makes its environment first, so one command is enough in a fresh clone."""
    done = subprocess.run(["make", "--dry-run", target, "VENV=/nonexistent"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    commands = done.stdout
    assert (
        commands.index("-m venv /nonexistent") < commands.index("--editable '.[") < commands.rindex("/nonexistent/bin/")
    )
