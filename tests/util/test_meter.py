"""The meter: seconds, FLOPs and peak memory of a phase."""

import time
from pathlib import Path

import pytest
import torch

from upcycle_bench.model.clip import create_clip
from upcycle_bench.planning.estimate import dense_forward_flops
from upcycle_bench.util.meter import Meter, high_water, peak_memory


def test_the_meter() -> None:
    meter = Meter(torch.device("cpu"))
    with meter.phase("train", count=True):
        torch.randn(8, 4) @ torch.randn(4, 16)
        time.sleep(0.01)
    with pytest.raises(RuntimeError), meter.phase("evaluate"):
        raise RuntimeError
    assert meter.phases["train"].flops == 2 * 8 * 4 * 16
    assert meter.phases["train"].seconds >= 0.01
    assert meter.phases["evaluate"].flops is None
    assert meter.phases["evaluate"].peak_memory_bytes > 10**7


def test_evaluation_is_counted_with_its_attention() -> None:
    clip = create_clip("smoke-vit")
    expected = dense_forward_flops(clip)
    meter = Meter(torch.device("cpu"))
    height, width = clip.model.visual.image_size
    images, texts = torch.zeros(1, 3, height, width), torch.zeros(1, clip.model.context_length, dtype=torch.long)
    enabled = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), meter.phase("evaluate", count=True) as phase:
        clip.model.eval()(images, texts)
    assert phase.flops == expected
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def test_peak_memory_of_this_program(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t  900 kB\nVmHWM:\t  123 kB\nVmRSS:\t  100 kB\n")
    assert high_water(status) == 123 * 1024
    ours = peak_memory(torch.device("cpu"))
    by_usage = high_water(tmp_path / "no such file")
    status.write_text("Name:\tpython\n")  # some kernels do not give VmHWM
    # getrusage includes what was before this program, and may lag behind by a few pages.
    assert high_water(status) >= by_usage >= ours - 2**22 and ours > 10**7
