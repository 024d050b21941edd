"""Energy counters: RAPL's files and NVML's functions, as a machine that has them shows them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from upcycle_bench.util import energy
from upcycle_bench.util.energy import EnergyCounter

CPU = torch.device("cpu")


def package(folder: Path, number: int, joules: float, name: str = "", most: float = 1000.0) -> Path:
    domain = folder / f"intel-rapl:{number}"
    domain.mkdir(exist_ok=True)
    (domain / "name").write_text((name or f"package-{number}") + "\n")
    (domain / "energy_uj").write_text(f"{joules * 1e6:.0f}\n")
    (domain / "max_energy_range_uj").write_text(f"{most * 1e6:.0f}\n")
    return domain


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path


def test_packages_are_added_up_and_their_counters_begin_again(powercap: Path) -> None:
    package(powercap, 0, 990)
    package(powercap, 1, 5)
    package(powercap, 2, 7, name="psys")  # the whole board: the packages are in it
    (powercap / "intel-rapl:0:0").mkdir()  # a part of package 0, with files of its own
    (powercap / "intel-rapl:0:0" / "name").write_text("core\n")
    counter = EnergyCounter(CPU)
    assert counter.joules() == 0
    package(powercap, 0, 4)  # from 990 over 1000 to 4
    package(powercap, 1, 25)
    assert counter.joules() == pytest.approx(14 + 20)
    package(powercap, 1, 26)
    assert counter.joules() == pytest.approx(35)


def test_without_counters_nothing_is_reported(powercap: Path) -> None:
    assert EnergyCounter(CPU).joules() is None
    domain = package(powercap, 0, 1)
    (domain / "energy_uj").write_text("")  # as good as unreadable; root could read any file
    assert EnergyCounter(CPU).joules() is None


def test_one_rank_of_a_machine_reads_its_packages(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(powercap, 0, 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    other = EnergyCounter(CPU)
    package(powercap, 0, 5)
    assert other.joules() == 0


class _Nvml(SimpleNamespace):
    """pynvml with one GPU that counts, in millijoules."""

    class NVMLError(Exception):
        pass

    counted = 5000

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1234":
            raise self.NVMLError("not found")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        return self.counted


@pytest.mark.parametrize(("uuid", "joules"), [("1234", 2.5), ("a part of it", None)])
def test_a_gpu_is_found_by_its_uuid(uuid: str, joules: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = _Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    counter = EnergyCounter(torch.device("cuda", 0))
    nvml.counted += 2500
    assert counter.joules() == joules


def test_without_the_package_a_gpu_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyCounter(torch.device("cuda", 0)).joules() is None


def test_a_counter_that_fails_or_goes_back_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = _Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    reset, failing = (EnergyCounter(torch.device("cuda", 0)) for _ in range(2))
    nvml.counted -= 4000
    assert reset.joules() is None
    nvml.counted += 9000
    assert reset.joules() is None  # for good: what it counted before is lost

    def fail(handle: str) -> int:
        raise nvml.NVMLError("driver lost")

    monkeypatch.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", fail)
    assert failing.joules() is None
