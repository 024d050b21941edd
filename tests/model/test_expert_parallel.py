"""Two gloo processes with captions of different lengths, against one process: outputs, gradients, l_aux, weights.

Also: the group's capacity for many numbers of tokens, and that each rank drops patches of its own.

Both processes run once and write down what they computed (`work`); the tests compare it with the same computation in
this process. All of it in float64.
"""

import itertools
import os
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close

from tests.literal import moe_layer as literal
from tests.moe_helpers import (
    MOE,
    assert_gradients,
    captions,
    create_dense,
    create_layer,
    inputs_for,
    relative_error,
    settings_of,
    upcycled,
)
from upcycle_bench.data.batches import Batch, BatchSource
from upcycle_bench.model import weights
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.deepspeed_import import TopKGate
from upcycle_bench.model.moe import MoEFFN, moe_layers
from upcycle_bench.model.padding import Padding
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.training import session
from upcycle_bench.training.job import Job
from upcycle_bench.training.loop import train

WORLD = 2
EXPERTS, WIDTH, CONTEXT = 4, 6, 10
LENGTHS = ([0, 1, 3, 2, 1, 4, 2], [9, 8, 9, 7, 9, 8, 9])  # words of the captions of rank 0 and of rank 1
NO_DROPS, DROPS = 8.0, 0.4
CASES = list(itertools.product((1, 2), (1, 2, 3), (NO_DROPS, DROPS)))  # ep_size, top_k, capacity factor


def tokens(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(texts [B, L], inputs [B, L, D], weights of the outputs in the loss [B, L, D]) of one rank."""
    generator = torch.Generator().manual_seed(rank)
    text_BL = captions(LENGTHS[rank], CONTEXT, seed=rank)
    shape = (*text_BL.shape, WIDTH)
    x_BLD, weight_BLD = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return text_BL, x_BLD, weight_BLD


def compact_tokens(rank: int) -> tuple[Tensor, Tensor]:
    """(inputs [T, D], weights [T, D]) up to the captions' ends."""
    _, x_BLD, weight_BLD = tokens(rank)
    keep_BL = torch.arange(CONTEXT) <= torch.tensor(LENGTHS[rank])[:, None]
    return x_BLD[keep_BL], weight_BLD[keep_BL]


def layer_of(ep_size: int, top_k: int, factor: float, minimum: int = 1, padding: Padding | None = None) -> MoEFFN:
    """The same weights in every process; this rank's experts only where ep_size > 1."""
    torch.manual_seed(top_k)
    return create_layer(WIDTH, settings_of(EXPERTS, top_k, factor, minimum, ep_size=ep_size), padding=padding).train()


def different_experts(model: nn.Module) -> nn.Module:
    """Move every expert by an amount that its global number names."""
    with torch.no_grad():
        for layer in moe_layers(model).values():
            first = dist.get_rank() % layer.settings.ep_size * len(layer.experts) if layer.settings.ep_size > 1 else 0
            for number, expert in enumerate(layer.experts, start=first):
                for parameter in expert.parameters():
                    parameter.add_(0.01 * (number + 1) * torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    return model


# ---- what each of the two processes does --------------------------------------------------------------------------


def work(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD))
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    with session.open_session(threads=2):
        assert torch.get_num_threads() == 1
        results = {case: run_layer(rank, *case) for case in CASES}
        results["model"] = run_model(rank)
        results["weights"] = run_weights(folder)
        results["capacities"] = run_capacities(rank)
        results["patches"] = run_patch_dropout()
        torch.save(results, folder / f"rank{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


def run_layer(rank: int, ep_size: int, top_k: int, factor: float) -> dict[str, Any]:
    padding = Padding()
    layer = layer_of(ep_size, top_k, factor, padding=padding)
    layer.moe.set_deepspeed_parallelism()
    assert len(layer.experts) == EXPERTS // ep_size
    assert all(p.group_name == f"ep_size_{ep_size}" for p in layer.experts.parameters())
    text_BL, x_BLD, weight_BLD = tokens(rank)
    x_BLD.requires_grad_()
    padding.observe(nn.Identity(), (text_BL,))
    routes: list[Any] = []
    layer.gate.register_forward_hook(lambda module, args, output: routes.append(output))

    y_BLD = layer(x_BLD)
    l_aux = layer.l_aux
    leaves = [x_BLD, *layer.parameters()]
    gradients = torch.autograd.grad((y_BLD * weight_BLD).sum(), leaves, retain_graph=True)
    balance = torch.autograd.grad(l_aux, leaves[:2])
    dropped = layer.take_dropped()
    keep_T = padding.keep_T
    is_padding_P = torch.ones(x_BLD.shape[:2], dtype=torch.bool).flatten().index_fill(0, keep_T, False)
    evaluated_TD = None
    if (ep_size, top_k) != (2, 1):  # there DeepSpeed cuts the group's capacity down to the local token count
        with torch.no_grad():
            evaluated_TD = layer.eval()(x_BLD).flatten(0, 1)[keep_T]
    return {
        "y": y_BLD.detach().flatten(0, 1)[keep_T],
        "x gradient": gradients[0].flatten(0, 1)[keep_T],
        "router gradient": gradients[1],
        "expert gradients": gradients[2:],
        "l_aux": l_aux.detach(),
        "l_aux gradients": (balance[0].flatten(0, 1)[keep_T], balance[1]),
        "capacity": int(routes[0].capacity),
        "indices": routes[0].index_KT,
        "dropped": dropped,
        "evaluated": evaluated_TD,
        "at padding": [t.detach().flatten(0, 1)[is_padding_P].abs().sum().item() for t in (y_BLD, gradients[0])],
    }


def create_model(ep_size: int) -> Any:
    return different_experts(upcycled(create_dense().double(), ep_size=ep_size, capacity_factor=NO_DROPS))


def run_model(rank: int) -> tuple[Tensor, Tensor]:
    """Features of a whole CLIP in training mode, each rank with images and captions of its own."""
    model = create_model(ep_size=2).train()
    for layer in moe_layers(model).values():
        layer.moe.set_deepspeed_parallelism()
    images, _ = inputs_for(model, dtype=torch.float64)
    with torch.no_grad():
        return model.encode_image(images + rank), model.encode_text(captions(LENGTHS[rank], CONTEXT, seed=rank))


def run_weights(folder: Path) -> dict[str, Any]:
    """Gather the experts of the smoke model, and save it."""
    clip = create_clip("smoke-vit", seed=1)
    moe = MOE.model_copy(update={"ep_size": 2})
    clip = replace(clip, model=different_experts(upcycled(clip.model, moe)))
    for layer in moe_layers(clip.model).values():
        layer.moe.set_deepspeed_parallelism()
    return {"state": weights.consolidate(clip), "digest": weights.save(clip, moe, folder / "weights")}


COUNTS = [(small, large) for large in range(20, 60) for small in (large // 2, large)]  # tokens of rank 0 and rank 1
FACTORS = {1: 1.0, 2: 1.0, 3: 1.5}  # of top_k; with these DeepSpeed's float32 rounds many capacities up


def run_capacities(rank: int) -> dict[int, list[int]]:
    """top_k -> the capacity with which the gate routed, for each of COUNTS."""
    found = {}
    for top_k, factor in FACTORS.items():
        layer = layer_of(2, top_k, factor)
        layer.moe.set_deepspeed_parallelism()
        inputs = (torch.randn(counts[rank], WIDTH, dtype=torch.float64) for counts in COUNTS)
        found[top_k] = [int(layer.gate(x_TD).capacity) for x_TD in inputs]
    return found


class SamePairs(BatchSource):
    """The same four pairs in every step and on every rank."""

    def part(self, *_: Any) -> Batch:
        images = torch.arange(4 * 3 * 8 * 8).view(4, 3, 8, 8).remainder(256).to(torch.uint8)
        return Batch(images, captions([3, 5, 7, 9], 12, end=49407), torch.arange(4))


def run_patch_dropout() -> Tensor:
    """What was left of the patches [B, tokens, D] in one step of a training."""
    clip, kept = create_clip("smoke-vit", patch_dropout=0.5), []
    clip.model.visual.patch_dropout.register_forward_hook(lambda module, args, output: kept.append(output.detach()))
    schedule = load_protocol(load_registry().get("protocol", "smoke").target).train.schedule
    job = Job(schedule=schedule.model_copy(update={"batch_size": 8}), peak_lr=1e-3, stop_step=1, seed=0)
    train(clip, SamePairs(), job)
    return kept[0]


# ---- the comparison -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.spawn(work, (folder,), nprocs=WORLD, join=False)
    deadline = time.monotonic() + 120
    try:
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in context.processes:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[Any, Any]]:
    """What rank 0 and rank 1 computed."""
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


def capacities(top_k: int, factor: float) -> list[int]:
    """Of each rank by itself."""
    return [literal.capacity(len(compact_tokens(rank)[0]), EXPERTS, factor, top_k, 1) for rank in range(WORLD)]


def run_alone(layer: MoEFFN, x_TD: Tensor, weight_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(y, gradients of x, router, experts) in this process."""
    x_TD = x_TD.clone().requires_grad_()
    y_TD = layer(x_TD[None])[0]
    return y_TD.detach(), list(torch.autograd.grad((y_TD * weight_TD).sum(), [x_TD, *layer.parameters()]))


def expert_gradients(results: list[dict[str, Any]], ep_size: int) -> list[Tensor]:
    """Summed over ranks, under global numbers: with ep_size 2 each rank holds the sum for its half of the experts."""
    if ep_size == 2:
        return [*results[0]["expert gradients"], *results[1]["expert gradients"]]
    return [a + b for a, b in zip(*(result["expert gradients"] for result in results), strict=True)]


def test_the_ranks_differ_in_length() -> None:
    counts = [len(compact_tokens(rank)[0]) for rank in range(WORLD)]
    assert counts == [20, 66]
    for _, top_k, factor in CASES:
        small, large = capacities(top_k, factor)
        assert small < large


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_without_drops_two_processes_are_one(ranks: list[dict[Any, Any]], ep_size: int, top_k: int) -> None:
    """Outputs and gradients are those of one process over all tokens."""
    results = [rank[ep_size, top_k, NO_DROPS] for rank in ranks]
    assert all(result["dropped"] == (0, top_k * len(result["y"])) for result in results)
    x_TD, weight_TD = (torch.cat(parts) for parts in zip(*map(compact_tokens, range(WORLD)), strict=True))
    y_TD, (x_gradient, router_gradient, *experts) = run_alone(layer_of(1, top_k, NO_DROPS), x_TD, weight_TD)
    assert relative_error(torch.cat([result["y"] for result in results]), y_TD) <= 1e-12
    ours = [
        torch.cat([result["x gradient"] for result in results]),
        sum(result["router gradient"] for result in results),
        *expert_gradients(results, ep_size),
    ]
    assert_gradients(ours, [x_gradient, router_gradient, *experts], 1e-12)
    assert all(result["at padding"] == [0, 0] for result in results)


def first_ones(index_KT: Tensor, capacity: int) -> Tensor:
    """The choices of each expert's first `capacity` tokens; -1 for the others."""
    kept, seen = index_KT.clone(), [0] * EXPERTS
    for place, expert in enumerate(index_KT[0].tolist()):
        seen[expert] += 1
        if seen[expert] > capacity:
            kept[0, place] = -1
    return kept


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_with_drops_capacity_is_the_groups_largest(ranks: list[dict[Any, Any]], ep_size: int, top_k: int) -> None:
    """Each rank is as ep_size 1 on its own tokens with that capacity, and routed as DeepSpeed's gate routes with it."""
    results = [rank[ep_size, top_k, DROPS] for rank in ranks]
    own = capacities(top_k, DROPS)
    capacity = [max(own)] * WORLD if ep_size == 2 else own
    assert [result["capacity"] for result in results] == capacity
    summed: list[Tensor] = []
    for rank, result in enumerate(results):
        x_TD, weight_TD = compact_tokens(rank)
        layer = layer_of(1, top_k, DROPS, minimum=capacity[rank])
        y_TD, (x_gradient, router_gradient, *experts) = run_alone(layer, x_TD, weight_TD)
        assert relative_error(result["y"], y_TD) <= 1e-12
        assert_gradients([result["x gradient"], result["router gradient"]], [x_gradient, router_gradient], 1e-12)
        summed = [a + b for a, b in zip(summed, experts, strict=True)] if summed else experts

        stock = TopKGate(
            WIDTH,
            EXPERTS,
            top_k,
            capacity_factor=DROPS,
            min_capacity=capacity[rank],
            drop_tokens=top_k > 1,  # of a single choice, DeepSpeed leaves to torch.topk which it drops
            use_rts=False,
            top2_2nd_expert_sampling=False,
        ).train()
        stock.wg.weight = layer.router_weight
        routed_KT = stock(x_TD, None, True, False)[3]
        assert torch.equal(result["indices"], routed_KT if top_k > 1 else first_ones(routed_KT, capacity[rank]))
        assert result["dropped"] == (int((result["indices"] < 0).sum()), top_k * len(x_TD))
    assert results[1]["dropped"][0] > 0
    assert_gradients(expert_gradients(results, ep_size), summed, 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_l_aux_is_that_of_all_tokens(ranks: list[dict[Any, Any]], case: tuple[int, int, float]) -> None:
    """Its mean over ranks, and the mean of its gradients, are those of one process on the concatenated tokens."""
    _, top_k, factor = case
    results = [rank[case] for rank in ranks]
    x_TD = torch.cat([compact_tokens(rank)[0] for rank in range(WORLD)]).requires_grad_()
    layer = layer_of(1, top_k, factor)
    router_ED = layer.router_weight
    probs_TE = torch.softmax(x_TD @ router_ED.T, dim=1)
    chosen_TE = torch.zeros_like(probs_TE).scatter(1, probs_TE.topk(top_k if top_k > 2 else 1).indices, 1.0)
    expected = EXPERTS * (chosen_TE.mean(0) / chosen_TE.sum(1)[0] * probs_TE.mean(0)).sum()  # Eq. 5
    layer(x_TD[None])
    assert_close(layer.l_aux.double(), expected, rtol=1e-6, atol=0)  # what one process has, DeepSpeed's own

    mean = sum(result["l_aux"] for result in results) / WORLD
    assert mean.item() == pytest.approx(expected.item(), rel=1e-6)  # f_e is float32
    assert results[0]["l_aux"].item() != pytest.approx(results[1]["l_aux"].item(), rel=1e-3)  # not an average of halves
    ours = [
        torch.cat([result["l_aux gradients"][0] for result in results]) / WORLD,
        sum(result["l_aux gradients"][1] for result in results) / WORLD,
    ]
    assert_close(ours, list(torch.autograd.grad(expected, [x_TD, router_ED])), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", [case for case in CASES if case[:2] != (2, 1)])
def test_evaluation_drops_nothing_on_any_rank(ranks: list[dict[Any, Any]], case: tuple[int, int, float]) -> None:
    layer = layer_of(1, case[1], case[2]).eval()
    for rank, result in enumerate(ranks):
        with torch.no_grad():
            y_TD = layer(compact_tokens(rank)[0][None])[0]
        assert relative_error(result[case]["evaluated"], y_TD) <= 1e-12


def test_a_whole_model(ranks: list[dict[Any, Any]]) -> None:
    model = create_model(ep_size=1).train()
    images, _ = inputs_for(model, dtype=torch.float64)
    for rank, result in enumerate(ranks):
        with torch.no_grad():
            expected = model.encode_image(images + rank), model.encode_text(captions(LENGTHS[rank], CONTEXT, seed=rank))
        for ours, theirs in zip(result["model"], expected, strict=True):
            assert relative_error(ours, theirs) <= 1e-10


def test_consolidate_gathers_experts_under_their_global_numbers(ranks: list[dict[Any, Any]], folder: Path) -> None:
    clip = create_clip("smoke-vit", seed=1)
    expected = different_experts(upcycled(clip.model)).state_dict()
    for result in ranks:
        state = result["weights"]["state"]
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)

    # Rank 0 alone writes, and the file loads here, in one process.
    digest, other = (result["weights"]["digest"] for result in ranks)
    assert other == "" and os.listdir(folder / "weights") == [f"{digest}.safetensors"]
    loaded = weights.load(folder / "weights" / f"{digest}.safetensors").model.state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_groups_capacity_is_exact_for_every_number_of_tokens(ranks: list[dict[Any, Any]], top_k: int) -> None:
    """The gate hands DeepSpeed a factor that must give this capacity again, however float32 rounds it."""
    own = [literal.capacity(max(counts), EXPERTS, FACTORS[top_k], top_k, 1) for counts in COUNTS]
    for result in ranks:
        assert result["capacities"][top_k] == own


def test_each_rank_drops_patches_of_its_own(ranks: list[dict[Any, Any]]) -> None:
    """The same images and weights on both ranks: only what was drawn differs."""
    first, second = (result["patches"] for result in ranks)
    assert first.shape == second.shape
    assert not torch.equal(first, second)
