"""test_other_ranks starts it on two ranks, with expert parallelism: a training that begins, or ends; and round trips.

usage: python -m tests.training.other_ranks_worker begin|end FOLDER
"""

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import tiny_clip
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.data.worlds import load_world
from upcycle_bench.model import weights
from upcycle_bench.model.clip import Clip, create_clip
from upcycle_bench.model.ffn import FFN
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.surgery import find_layers, put_experts
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import MoE, load_protocol
from upcycle_bench.training import session
from upcycle_bench.training.job import Job
from upcycle_bench.training.loop import create_engine, train
from upcycle_bench.training.named_state import State, collect, restore
from upcycle_bench.training.step import Features, compute_losses
from upcycle_bench.training.stopping import Stopped, stoppable
from upcycle_bench.util import distributed
from upcycle_bench.util.rng import Stream

REGISTRY = load_registry()
# Nothing is dropped. eps is large, since Adam would turn rounding of tiny gradients into steps of full size.
PROTOCOL = load_protocol(REGISTRY.protocols["smoke"].target, ["moe.capacity_factor=8.0", "train.schedule.eps=0.01"])


def job(**changes: Any) -> Job:
    schedule = PROTOCOL.train.schedule.model_copy(update={"steps": 6, "batch_size": 32})
    settings = {"schedule": schedule, "peak_lr": 1e-3, "stop_step": 6, "seed": 0, "log_every": 1, "load_balance": 0.01}
    return Job(**{**settings, **changes})


def moe(ep_size: int) -> MoE:
    return PROTOCOL.moe.model_copy(update={"ep_size": ep_size})


def upcycled(ep_size: int, seed: int = 0) -> Clip:
    """Copies of a dense FFN whose routers differ by the seed."""
    clip = tiny_clip()
    strategy = REGISTRY.strategies["sparse-upcycling"].target()
    inits = {}
    for layer in find_layers(clip.model, moe(1)):
        ffn = FFN.of(clip.model.get_submodule(layer.mlp_path))
        inits[layer.name] = strategy.init_layer(ffn, layer, None, Stream(("test", layer.name, seed)))
    return replace(clip, model=put_experts(clip.model, inits, moe(ep_size)))


def eesd(layers: Mapping[str, Any]) -> Any:
    return REGISTRY.strategies["cluster-aware"].target(eesd_ema=0.9).loss(layers, Stream(("loss",)), 6)


def pairs() -> PairDataset:
    return PairDataset(load_world("digits", 0).train_shards, create_clip("smoke-vit"))


def stopping_at(wanted: int, rank: int = 0) -> Any:
    """Sends SIGUSR1 to one rank after that step."""

    def on_step(step: int, metrics: Mapping[str, float]) -> None:
        if step == wanted and distributed.rank() == rank:
            os.kill(os.getpid(), signal.SIGUSR1)

    return on_step


def begin(folder: Path) -> None:
    """Two steps with ZeRO 1; only rank 1 gets the signal, and both end after the same step."""
    settings = job(checkpoints=folder, zero_stage=1)
    with pytest.raises(Stopped) as stopped, stoppable():
        train(upcycled(2), pairs(), settings, make_loss=eesd, on_step=stopping_at(2, rank=1))
    assert distributed.from_all(stopped.value.step) == [2, 2]


def end(folder: Path) -> None:
    """The last steps with ZeRO 2; then round trips between engines."""
    clip = upcycled(2, seed=1)
    train(clip, pairs(), job(checkpoints=folder, zero_stage=2), make_loss=eesd)
    name = weights.save(clip, moe(2), folder)
    if distributed.is_main():
        (folder / "weights").write_text(str(name))
    made = None
    for zero_stage, ep_size in ((0, 1), (2, 2), (1, 1), (0, 2), (1, 2), (2, 1)):
        made = round_trip(zero_stage, ep_size, made)


def round_trip(zero_stage: int, ep_size: int, before: State | None) -> State:
    """The whole state of a new engine, after a step or with the state `before`, which must come out as it was."""
    clip = upcycled(ep_size, seed=zero_stage)
    engine = create_engine(Features(clip.model.train(), "fp32"), job(zero_stage=zero_stage))
    layers = moe_layers(clip.model)
    extra = eesd(layers)
    if before is None:
        batch = pairs().batch("test", 0, 32, distributed.rank(), 2)
        losses, _ = compute_losses(engine, clip, batch, job(), layers, extra)
        engine.backward(torch.stack(list(losses.values())).sum())
        engine.step()
        extra.after_step()
    else:
        names = before.tensors
        restore(engine, extra, lambda wanted: {x: names[x] for x in wanted}, names, before.steps, before.loss)
    after = State()
    for share in distributed.from_all(collect(engine, extra)):
        assert not after.tensors.keys() & share.tensors.keys()  # each is kept once
        after.tensors |= share.tensors
        after.steps |= share.steps
        after.loss |= share.loss
    if before is not None:
        made, given = joined(after), joined(before)
        assert made.keys() == given.keys()
        assert all(torch.equal(value, made[name]) for name, value in given.items())
        assert (after.steps, after.loss) == (before.steps, before.loss)
    extra.close()
    engine.destroy()
    return after


def joined(state: State) -> dict[str, torch.Tensor]:
    """The tensors, and of moments the pieces joined."""
    whole: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, value in state.tensors.items():
        key, _, start = name.partition("@")
        whole.setdefault(key, []).append((int(start or 0), value))
    return {
        key: torch.cat([piece.flatten() for _, piece in sorted(pieces, key=lambda item: item[0])])
        for key, pieces in whole.items()
    }


if __name__ == "__main__":
    with session.open_session(threads=1):
        {"begin": begin, "end": end}[sys.argv[1]](Path(sys.argv[2]))
