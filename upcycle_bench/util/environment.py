"""The machine, the packages and the git state of the code, for the record of a run.

environment = capture("cpu")      # JSON values only: {"python": "3.11.7", "packages": {...}, "device": "...", ...}
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from pydantic import JsonValue

# The packages that can change a score or the data. Both builds of faiss are imported as `faiss`.
PACKAGES = (
    "torch",
    "torchvision",
    "open_clip_torch",
    "deepspeed",
    "faiss-cpu",
    "faiss-gpu",
    "clip_benchmark",
    "numpy",
    "scipy",
    "scikit-learn",
    "pillow",
    "webdataset",
    "resvg-py",
    "upcycle-bench",
)


def capture(device: str) -> dict[str, JsonValue]:
    """What a record says of the machine and the code; `device` as torch spells it (`cpu`, `cuda:0`)."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "torch_build": torch.__version__,  # 2.14.1+cu130, where the package says 2.14.1
        "device": device_name(device),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "git": git_state(Path(__file__)),
    }


def installed_version(distribution: str) -> str | None:
    """Version of a distribution, without importing it; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    """Name of the GPU or the CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return cpu_name(Path("/proc/cpuinfo"))


def cpu_name(cpuinfo: Path) -> str:
    """Name of the CPU; its architecture where `cpuinfo` has no name (ARM) or does not exist (other systems)."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, models), None) or platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use; a container or a batch job may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_state(file: Path) -> dict[str, JsonValue] | None:
    """Commit of the repository that tracks `file`, and whether it has changes outside `results/`.

    None for an installed wheel, even where it is installed inside a git repository.
    """
    folder = file.resolve().parent
    if _git(folder, "ls-files", "--error-unmatch", "--", file.name) is None:
        return None
    top, commit = _git(folder, "rev-parse", "--show-toplevel"), _git(folder, "rev-parse", "--verify", "HEAD")
    if top is None or commit is None:
        return None
    # Of these no file is code that a run executes, and runs write records into results/.
    others = [f":(exclude){name}" for name in ("results", "docs", "tests", "*.md")]
    changes = _git(Path(top), "status", "--porcelain", "--", ".", *others)
    return {"commit": commit, "dirty": changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command in `folder`; None if it fails, or without git."""
    # Git hooks set GIT_DIR and the like, which would point to another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "--no-optional-locks", *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
