"""What a protocol's training would take on a GPU cluster, by formulas and stated assumptions; nothing is measured.

    for bill in bills(protocol, Dense(), SparseUpcycling()): print(bill.training, bill.gpu_hours)

`make docs` writes them into a table of docs/performance.md. FLOPs are those of a dry run (`planning.estimate`), with
texts at full length and without a strategy's own loss:

    training FLOPs   = 3 * forward FLOPs of a pair * samples            (the backward pass costs two forward ones)
    seconds          = FLOPs / (GPUs * peak rate * utilisation)

With expert parallelism DeepSpeed's layer computes every slot of its capacity, so the experts' part is multiplied by the
capacity factor. Bytes that each of n GPUs sends in a step, with e = ep_size and ring algorithms:

    gradients        2 * 4 * ((n-1)/n * shared parameters + (n/e-1)/(n/e) * expert parameters / e)
                     float32; ZeRO 1 sends as much, by reduce-scatter of gradients and all-gather of weights
    features         2 towers * 2 * 4 * (n-1)/n * batch * embedding
                     features are gathered for the loss, and their gradients sent back
    all-to-all       sum over MoE layers of 4 * 2 * (e-1)/e * capacity factor * k * tokens of a GPU * width
                     to the experts and back, in forward and backward pass, in numbers of 2 bytes (bf16)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from upcycle_bench.model.config import model_config
from upcycle_bench.model.ffn import FFN
from upcycle_bench.model.surgery import find_layers
from upcycle_bench.planning.estimate import estimate, meta_clip, tokens
from upcycle_bench.protocol import Protocol
from upcycle_bench.strategy import Strategy
from upcycle_bench.util.errors import UserError

GRADIENT_BYTES, FEATURE_BYTES, ROW_BYTES = 4, 4, 2


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The assumptions: A100s at their dense bf16 peak, and 200 Gbit/s for each GPU.

    `peak_flops` and `link_bytes` are per second and GPU; `utilisation` is the fraction of the peak that a run reaches.
    """

    gpus: int = 64
    peak_flops: float = 312e12
    utilisation: float = 0.4
    link_bytes: float = 25e9


@dataclass(frozen=True, kw_only=True)
class Bill:
    """The cost of one training on one cluster; bytes are those that each GPU sends in a step."""

    training: str
    cluster: Cluster
    ep_size: int
    steps: int
    samples: int
    flops: int
    gradient_bytes: float
    feature_bytes: float
    exchange_bytes: float

    @property
    def seconds(self) -> float:
        """Seconds of the computation alone."""
        return self.flops / (self.cluster.gpus * self.cluster.peak_flops * self.cluster.utilisation)

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the computation alone, over all GPUs."""
        return self.cluster.gpus * self.seconds / 3600

    @property
    def communication_seconds(self) -> float:
        """Seconds that one step's bytes take, if no communication overlaps with computation."""
        return (self.gradient_bytes + self.feature_bytes + self.exchange_bytes) / self.cluster.link_bytes


def bills(
    protocol: Protocol, dense: Strategy, sparse: Strategy, cluster: Cluster = Cluster(), ep_size: int = 8
) -> Iterator[Bill]:
    """The dense model's own training, then the protocol's: of the dense model, of experts without and with `ep_size`.

    `dense` is the control that stays dense, `sparse` any strategy with the protocol's own MoE. Raises UserError if
    `ep_size` does not divide the number of GPUs.
    """
    if cluster.gpus % ep_size:
        raise UserError(f"ep_size {ep_size} does not divide {cluster.gpus} GPUs: choose a divisor.")
    own = protocol.model_copy(update={"train": protocol.train.model_copy(update={"schedule": protocol.dense.schedule})})
    before, control, moe = estimate(own, dense), estimate(protocol, dense), estimate(protocol, sparse)
    steps = int(before.steps * protocol.dense.stop_fraction)
    schedules = protocol.dense.schedule, protocol.train.schedule
    first, later = (_feature_bytes(protocol.model, schedule.batch_size, cluster) for schedule in schedules)
    shared = _gradient_bytes(control.parameters_total, cluster.gpus)

    yield Bill(
        training="dense model, to the checkpoint", cluster=cluster, ep_size=1, steps=steps,
        samples=steps * schedules[0].batch_size, flops=int(before.train_flops * protocol.dense.stop_fraction),
        gradient_bytes=shared, feature_bytes=first, exchange_bytes=0,
    )  # fmt: skip
    yield Bill(
        training="dense, trained on", cluster=cluster, ep_size=1, steps=control.steps, samples=control.samples,
        flops=control.train_flops, gradient_bytes=shared, feature_bytes=later, exchange_bytes=0,
    )  # fmt: skip
    expert_parameters, expert_flops, row_bytes = _experts(protocol)
    for size in (1, ep_size):
        padding = protocol.moe.capacity_factor - 1 if size > 1 else 0
        kept = moe.parameters_total - expert_parameters
        pairs = protocol.train.schedule.batch_size / cluster.gpus
        yield Bill(
            training="upcycled", cluster=cluster, ep_size=size, steps=moe.steps, samples=moe.samples,
            flops=moe.train_flops + int(3 * padding * expert_flops) * moe.samples,
            gradient_bytes=_gradient_bytes(kept, cluster.gpus)
            + _gradient_bytes(expert_parameters / size, cluster.gpus // size),
            feature_bytes=later,
            exchange_bytes=4 * (size - 1) / size * protocol.moe.capacity_factor * pairs * row_bytes,
        )  # fmt: skip


def _gradient_bytes(parameters: float, gpus: int) -> float:
    return 2 * GRADIENT_BYTES * (gpus - 1) / gpus * parameters


def _feature_bytes(model: str, batch_size: int, cluster: Cluster) -> float:
    width = model_config(model)["embed_dim"]
    return 2 * 2 * FEATURE_BYTES * (cluster.gpus - 1) / cluster.gpus * batch_size * width


def _experts(protocol: Protocol) -> tuple[int, int, int]:
    """Parameters of all experts; for one pair, forward FLOPs in its chosen experts, and bytes of its rows, one way."""
    parameters = flops = row_bytes = 0
    dropout = protocol.train.schedule.patch_dropout
    clip = meta_clip(protocol.model, dropout)
    for layer in find_layers(clip.model, protocol.moe):
        ffn = FFN.of(clip.model.get_submodule(layer.mlp_path))
        rows = layer.top_k * tokens(clip, layer, dropout)
        parameters += layer.num_experts * (2 * ffn.hidden * ffn.width + ffn.hidden + ffn.width)
        flops += 4 * ffn.hidden * ffn.width * rows
        row_bytes += ROW_BYTES * ffn.width * rows
    return parameters, flops, row_bytes
