"""The state by global names: put into another engine it is the same to the bit, whatever the stage of ZeRO."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.test_loop import eesd, job, upcycled
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.training.loop import create_engine
from upcycle_bench.training.named_state import Numbering, State, _global_path, collect, leaves, restore
from upcycle_bench.training.step import Features, compute_losses
from upcycle_bench.util.errors import PluginError

pytestmark = pytest.mark.usefixtures("session")


def engine_of(clip: Clip, zero_stage: int) -> Any:
    return create_engine(Features(clip.model, "fp32"), job(zero_stage=zero_stage))


def step(engine: Any, clip: Clip, pairs: PairDataset, number: int, extra: Any) -> None:
    batch = pairs.batch("test", number, 32, 0, 1)
    losses, _ = compute_losses(engine, clip, batch, job(load_balance=0.01), moe_layers(clip.model), extra)
    engine.backward(torch.stack(list(losses.values())).sum())
    engine.step()
    if extra is not None:
        extra.after_step()


def put(state: State, engine: Any, extra: Any) -> None:
    restore(engine, extra, lambda names: {x: state.tensors[x] for x in names}, state.tensors, state.steps, state.loss)


@pytest.fixture
def trained(pairs: PairDataset) -> Iterator[tuple[State, dict[str, Tensor]]]:
    """The state after two steps without ZeRO, with EESD and a frozen parameter, and the weights after a third."""
    clip = upcycled()
    clip.model.logit_scale.requires_grad_(False)
    engine, extra = engine_of(clip, 0), eesd(moe_layers(clip.model))
    for number in range(2):
        step(engine, clip, pairs, number, extra)
    state = collect(engine, extra)
    step(engine, clip, pairs, 2, extra)
    yield state, {name: value.clone() for name, value in clip.model.state_dict().items()}
    extra.close()
    engine.destroy()


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_state_goes_into_another_engine_and_comes_out_the_same(
    pairs: PairDataset,
    trained: tuple[State, dict[str, Tensor]],
    zero_stage: int,
) -> None:
    state, third = trained
    clip = upcycled(seed=5)
    clip.model.logit_scale.requires_grad_(False)
    engine, extra = engine_of(clip, zero_stage), eesd(moe_layers(clip.model))
    put(state, engine, extra)
    again = collect(engine, extra)
    assert again.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(value, again.tensors[name]) for name, value in state.tensors.items())
    assert (again.steps, again.loss) == (state.steps, state.loss)
    step(engine, clip, pairs, 2, extra)
    after = clip.model.state_dict()
    wrong = [name for name, value in third.items() if not torch.allclose(after[name], value, rtol=0, atol=1e-6)]
    assert wrong == []
    if zero_stage == 0:
        assert all(torch.equal(after[name], value) for name, value in third.items())
    extra.close()
    engine.destroy()


def test_what_a_state_holds(trained: tuple[State, dict[str, Tensor]]) -> None:
    state, weights = trained
    assert {f"model.clip.{name}" for name in weights} == {x for x in state.tensors if x.startswith("model.")}
    assert set(state.steps.values()) == {2.0}
    assert "clip.logit_scale" not in state.steps  # frozen
    assert "optimizer.clip.logit_scale.exp_avg@0" not in state.tensors
    assert state.loss["loss.step"].value == 2
    experts = [name for name in state.tensors if "teachers.vision.1.experts." in name]
    assert len(experts) == 8 * 4


LAYERS = {"vision.1": Numbering(4, 4, 2)}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (["teachers", "vision.1", "experts.3.c_fc.weight"], ["teachers", "vision.1", "experts.7.c_fc.weight"]),
        (["vision.1", "experts.0"], ["vision.1", "experts.4"]),
        (["vision.1", "experts", "1", "c_fc"], ["vision.1", "experts", "5", "c_fc"]),
        (["vision.1", "router_ED"], ["vision.1", "router_ED"]),
        (["text.1", "experts.3.c_fc.weight"], ["text.1", "experts.3.c_fc.weight"]),
    ],
)
def test_experts_of_an_extra_loss_are_numbered_over_all_ranks(path: list[str], expected: list[str]) -> None:
    assert _global_path(path, LAYERS)[0] == expected


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"memory": {"queue": (1, 2)}}, "a tuple at memory.queue"),
        ({"seen": {"a"}}, "a set at seen"),
        ({3: torch.zeros(())}, "the key 3"),
    ],
)
def test_a_loss_whose_state_no_checkpoint_can_keep_is_one_line(tree: Any, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        list(leaves(tree))
