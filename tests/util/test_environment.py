"""The environment of a record: JSON values only, and the git state of our own code, never of the current directory."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from upcycle_bench.util import environment
from upcycle_bench.util.environment import capture, cpu_name, git_state, installed_version


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository that tracks package/__init__.py; returns that file."""
    file = tmp_path / "repository" / "package" / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    git(file.parent.parent, "init", "-q")
    git(file.parent.parent, "add", ".")
    git(file.parent.parent, "commit", "-q", "-m", "one")
    return file


def test_capture() -> None:
    found = capture("cpu")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["python"] == platform.python_version() and found["platform"] == platform.platform()
    packages = found["packages"]
    assert isinstance(packages, dict) and set(packages) == set(environment.PACKAGES)
    assert packages["torch"] == version("torch") and packages["upcycle-bench"] == version("upcycle-bench")
    assert found["threads"] == torch.get_num_threads()
    assert isinstance(found["device"], str) and found["device"]
    assert isinstance(found["cores"], int) and 1 <= found["cores"] <= (os.cpu_count() or 1)
    assert isinstance(found["memory_bytes"], int) and found["memory_bytes"] > 2**28


def test_the_name_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU at {device}")
    assert environment.device_name("cuda:1") == "GPU at cuda:1"


def test_the_name_of_a_cpu(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz: fast\nprocessor\t: 1\nmodel name\t: Other\n")
    assert cpu_name(cpuinfo) == "Some CPU @ 2.0GHz: fast"
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 50.0\n")  # ARM
    for path in (cpuinfo, tmp_path / "nowhere"):
        assert cpu_name(path) == (platform.processor() or platform.machine())


def test_versions() -> None:
    assert installed_version("numpy") == version("numpy")
    assert installed_version("surely-not-installed") is None


def test_git_state(checkout: Path) -> None:
    top = checkout.parent.parent
    clean = {"commit": git(top, "rev-parse", "HEAD"), "dirty": False}
    assert git_state(checkout) == clean
    (top / "results").mkdir()
    (top / "results" / "record.json").write_text("{}")
    assert git_state(checkout) == clean  # a record that was just written is no change of the code
    checkout.write_text("changed = 1\n")
    assert git_state(checkout) == clean | {"dirty": True}
    git(top, "commit", "-q", "-a", "-m", "two")
    (checkout.parent / "new.py").write_text("")
    assert git_state(checkout) == {"commit": git(top, "rev-parse", "HEAD"), "dirty": True}


def test_an_installed_wheel_has_no_git_state(checkout: Path, tmp_path: Path) -> None:
    installed = checkout.parent.parent / "venv" / "package" / "__init__.py"  # in a repository that does not track it
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    assert git_state(installed) is None
    outside = tmp_path / "__init__.py"
    outside.write_text("")
    assert git_state(outside) is None


def test_a_repository_without_a_commit_has_no_state(tmp_path: Path) -> None:
    file = tmp_path / "__init__.py"
    file.write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    assert git_state(file) is None


def test_neither_the_current_directory_nor_a_git_hook_matters(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    git(other, "commit", "-q", "--allow-empty", "-m", "other")
    monkeypatch.chdir(other)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    state = git_state(checkout)
    monkeypatch.delenv("GIT_DIR")
    assert state == {"commit": git(checkout.parent, "rev-parse", "HEAD"), "dirty": False}


def test_no_git(checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(checkout) is None
