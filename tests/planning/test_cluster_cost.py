"""The bill of a cluster, by hand: ViT-B/32 has 12 MoE layers, six of width 768 and six of width 512."""

import pytest

from upcycle_bench.planning.cluster_cost import Cluster, bills
from upcycle_bench.planning.estimate import estimate
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.util.errors import UserError

REGISTRY = load_registry()
DENSE, SPARSE = (REGISTRY.get("strategy", name).target() for name in ("dense", "sparse-upcycling"))
B32 = load_protocol(REGISTRY.get("protocol", "clip-b32").target)
# Half of the 49 patches and the class token; the whole context of text.
ROWS = ((768, 2 * 25), (512, 2 * 77))  # width, chosen rows of a pair in each of six layers


def test_the_bills_of_clip_b32() -> None:
    before, dense, upcycled, spread = bills(B32, DENSE, SPARSE)
    assert [bill.ep_size for bill in (before, dense, upcycled, spread)] == [1, 1, 1, 8]

    control, moe = estimate(B32, DENSE), estimate(B32, SPARSE)
    assert dense.flops == control.train_flops and upcycled.flops == moe.train_flops
    assert before.samples == int(0.75 * 323_486) * 16_384
    assert before.flops / before.samples == pytest.approx(dense.flops / dense.samples, rel=1e-5)
    # Padded to capacity factor 2, the experts compute twice their rows: 4 * D * 4D FLOPs each.
    experts = 6 * sum(16 * width**2 * rows for width, rows in ROWS)
    assert spread.flops - upcycled.flops == 3 * experts * upcycled.samples

    # 64 GPUs at 0.4 * 312 TFLOP/s are 7.9872e15 FLOP/s.
    assert dense.seconds == pytest.approx(dense.flops / 7.9872e15)
    assert dense.gpu_hours == pytest.approx(dense.flops / 7.9872e15 * 64 / 3600)

    # Eight experts of 8 D^2 + 5 D numbers in each layer; their gradients are summed over all GPUs, or over eight.
    numbers = 6 * 8 * sum(8 * width**2 + 5 * width for width, _ in ROWS)
    shared = moe.parameters_total - numbers
    assert upcycled.gradient_bytes == pytest.approx(8 * 63 / 64 * (shared + numbers))
    assert spread.gradient_bytes == pytest.approx(8 * (63 / 64 * shared + 7 / 8 * numbers / 8))
    # Two towers of 16,384 features of 512 float32, there and back.
    assert upcycled.feature_bytes == 2 * 2 * 16_384 * 512 * 4 * 63 / 64
    # 256 pairs a GPU; capacity 2; four exchanges of bf16 rows, of which seven eighths leave the GPU.
    assert upcycled.exchange_bytes == 0
    rows = 6 * sum(width * number for width, number in ROWS)
    assert spread.exchange_bytes == pytest.approx(4 * 2 * 7 / 8 * 2 * 256 * rows)
    sent = spread.gradient_bytes + spread.feature_bytes + spread.exchange_bytes
    assert spread.communication_seconds == pytest.approx(sent / 25e9)


def test_experts_are_spread_evenly() -> None:
    with pytest.raises(UserError, match="ep_size 8 does not divide 4 GPUs"):
        next(bills(B32, DENSE, SPARSE, Cluster(gpus=4)))


def test_one_gpu_sends_nothing() -> None:
    *_, upcycled = bills(B32, DENSE, SPARSE, Cluster(gpus=1), ep_size=1)
    assert upcycled.gradient_bytes == upcycled.feature_bytes == upcycled.exchange_bytes == 0
