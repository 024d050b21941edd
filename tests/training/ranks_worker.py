"""test_distributed starts it on every rank: gradients of a global batch, and a workshop; rank 0 writes them.

usage: python -m tests.training.ranks_worker OUTPUT
"""

import sys
from typing import Any

import torch
import torch.distributed as dist

from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.data.worlds import load_world
from upcycle_bench.evaluation.held_out import held_out_pairs
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.moe import MoEFFN, moe_layers
from upcycle_bench.model.weights import EXPERT_KEY
from upcycle_bench.planning.plan import Plan, make_plan
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.training import session
from upcycle_bench.training.job import Job
from upcycle_bench.training.loop import create_engine
from upcycle_bench.training.step import Features, compute_losses
from upcycle_bench.upcycling.preparation import TrainingWorkshop
from upcycle_bench.upcycling.starting_model import Start, initialise
from upcycle_bench.util import distributed
from upcycle_bench.util.meter import Meter
from upcycle_bench.util.progress import Reporter
from upcycle_bench.util.rng import Stream

STRATEGIES = ("sparse-upcycling", "cluster-aware")
Gradients = dict[str, dict[str, Any]]  # by strategy


def main(output: str) -> None:
    with session.open_session(threads=1) as device:
        made = {"gradients": {size: gradients(device, size) for size in (1, 2)}, "workshop": workshop()}
        every = [distributed.gather(value[None]) for value in made["workshop"]["state"].values()]
        assert all(torch.equal(value[0], each) for value in every for each in value)  # the ranks agree
        if distributed.is_main():
            torch.save(made, output)


def gradients(device: torch.device, ep_size: int) -> Gradients:
    """Of one forward and backward pass of a global batch, and the held-out pairs before it."""
    registry = load_registry()
    # With capacity_factor 8 nothing is dropped, else the result would depend on the number of ranks.
    overrides = [f"moe.ep_size={ep_size}", "moe.capacity_factor=8.0", "train.schedule.batch_size=32"]
    protocol = load_protocol(registry.get("protocol", "smoke").target, overrides)
    return {name: _pass(make_plan(registry, name, protocol), device, ep_size) for name in STRATEGIES}


def _pass(plan: Plan, device: torch.device, ep_size: int) -> dict[str, dict[str, Any]]:
    """The gradients and losses of one global batch, on every rank."""
    protocol = plan.protocol
    dense = create_clip(protocol.model, seed=3)
    data = PairDataset(plan.world.train_shards, dense, protocol.train.schedule.augmentation)
    start = Start(protocol, plan.world, dense, data)
    model, _ = initialise(plan.strategy, start, plan.init_seed, Meter(device), Reporter())
    model.model.train()
    job = Job(schedule=protocol.train.schedule, peak_lr=1e-3, stop_step=1, seed=0, load_balance=0.5)
    engine = create_engine(Features(model.model, "fp32"), job)
    layers = moe_layers(model.model)
    extra = plan.strategy.loss(layers, Stream(("loss",)), protocol.train.schedule.steps)
    if extra is not None:  # make the teacher differ from the student, or parts of the loss would be 0
        for layer in layers.values():
            with torch.no_grad():
                layer.router_weight.add_(0.3 * layer.router_weight.flip(0))
    held_out = held_out_pairs(protocol.validation, model, plan.world.eval_root, "fp32")
    assert held_out is not None
    held_out_log_rank = held_out.score(model)  # in the midst of a training
    batch = data.batch(0, 0, 32, distributed.rank(), distributed.world_size())
    losses, _ = compute_losses(engine, model, batch, job, layers, extra)
    engine.backward(torch.stack(list(losses.values())).sum())
    gradients = {}
    for name, parameter in model.model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad.clone()
    values = torch.stack([value.detach() for value in losses.values()])
    if distributed.world_size() > 1:
        dist.all_reduce(values)
        values /= distributed.world_size()
    engine.destroy()
    gathered = _gather_experts(gradients, layers, ep_size)
    scores = {**dict(zip(losses, values.tolist(), strict=True)), "held out": held_out_log_rank}
    return {"gradients": gathered, "losses": scores}


def _gather_experts(
    gradients: dict[str, torch.Tensor], layers: dict[str, Any], ep_size: int
) -> dict[str, torch.Tensor]:
    """The gradients of all experts by the names of one process, whose experts are numbered over all ranks."""
    if ep_size == 1:
        return gradients
    whole = {}
    local = next(iter(layers.values())).moe.num_local_experts
    for name, gradient in gradients.items():
        match = EXPERT_KEY.fullmatch(name)
        if match is None:
            whole[name] = gradient
            continue
        path, number, part = match.groups()
        shards = [torch.empty_like(gradient) for _ in range(ep_size)]
        dist.all_gather(shards, gradient.contiguous())
        for rank, shard in enumerate(shards):
            whole[f"{path}.{MoEFFN.state_key(rank * local + int(number), part)}"] = shard
    return whole


def workshop() -> dict[str, Any]:
    """What a preparation gets: features, and a model trained on chosen batches.

    eps is large, because Adam would turn the rounding of tiny gradients into full steps.
    """
    smoke = load_registry().protocols["smoke"].target
    protocol = load_protocol(smoke, ["train.schedule.batch_size=32", "train.schedule.eps=0.01"])
    clip = create_clip("smoke-vit", seed=3 + distributed.rank())
    distributed.send_from_main(clip.model)
    pairs = PairDataset(load_world("digits", 0).train_shards, clip)
    shop = TrainingWorkshop(clip, pairs, protocol, Stream(("test",)))
    model = shop.dense()
    index_S = torch.arange(0, 1035, 3)  # 345: on two ranks the last part is odd
    features = [torch.cat(parts) for parts in zip(*shop.encode(model, index_S), strict=True)]
    encoding = shop.flops
    shop.train(model, index_S[:96].view(3, 32), "test", trainable=lambda name: "mlp" in name, label_smoothing=0.1)
    return {"features": features, "state": model.state_dict(), "flops": (encoding, shop.flops)}


if __name__ == "__main__":
    main(sys.argv[1])
