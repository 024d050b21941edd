"""Started by test_preparation on every rank: features, and a model trained on chosen batches; rank 0 writes them.

usage: workshop_worker.py OUTPUT
"""

import sys
from typing import Any

import torch

from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.data.worlds import load_world
from upcycle_bench.model.clip import create_clip
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.training import session
from upcycle_bench.upcycling.preparation import TrainingWorkshop
from upcycle_bench.util import distributed
from upcycle_bench.util.rng import Stream


def work() -> dict[str, Any]:
    """What a preparation gets. eps is large, because Adam would turn the rounding of tiny gradients into full steps."""
    smoke = load_registry().protocols["smoke"].target
    protocol = load_protocol(smoke, ["train.schedule.batch_size=32", "train.schedule.eps=0.01"])
    clip = create_clip("smoke-vit", seed=3 + distributed.rank())
    distributed.send_from_main(clip.model)
    workshop = TrainingWorkshop(
        clip, PairDataset(load_world("digits", 0).train_shards, clip), protocol, Stream(("test",))
    )
    model = workshop.dense()
    index_S = torch.arange(0, 1035, 3)  # 345: on two ranks the last part is odd
    features = [torch.cat(parts) for parts in zip(*workshop.encode(model, index_S), strict=True)]
    encoding = workshop.flops
    workshop.train(model, index_S[:96].view(3, 32), "test", trainable=lambda name: "mlp" in name, label_smoothing=0.1)
    return {"features": features, "state": model.state_dict(), "flops": (encoding, workshop.flops)}


def main(output: str) -> None:
    with session.open_session(threads=1):
        made = work()
        every = [distributed.gather(value[None]) for value in made["state"].values()]
        assert all(torch.equal(value[0], each) for value in every for each in value)  # the ranks agree
        if distributed.is_main():
            torch.save(made, output)


if __name__ == "__main__":
    main(sys.argv[1])
