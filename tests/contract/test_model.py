"""What the model of every registered strategy, ours or a plugin's, must do, on a tiny CLIP."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import upcycle_bench
from tests.helpers import SMOKE, contrastive_loss, equal, features, tiny_batches, tiny_clip, tiny_moe, upcycled
from upcycle_bench.model import rebuild, weights
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.cost import model_cost
from upcycle_bench.model.measure import diagnose
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.surgery import merge
from upcycle_bench.planning.estimate import estimate
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.strategy import ExtraLoss, Strategy, configure, resolve_moe
from upcycle_bench.upcycling.final_form import require_describable
from upcycle_bench.util.rng import Stream

REGISTRY = load_registry()


@pytest.fixture(params=sorted(REGISTRY.strategies))
def strategy(request: pytest.FixtureRequest) -> Strategy:
    return configure(REGISTRY.strategies[request.param].target, {})


def test_outputs_are_finite(strategy: Strategy) -> None:
    clip = tiny_clip()
    model = upcycled(strategy, clip, seed=0).model
    output = features(model, *tiny_batches(clip, seed=5)[0])
    assert torch.isfinite(output).all()
    assert output.std(0).min() > 1e-4  # and they depend on the input


def test_preserves_function_is_what_it_says(strategy: Strategy) -> None:
    clip = tiny_clip(torch.float64)
    batch = tiny_batches(clip, seed=5)[0]
    expected = features(clip.model, *batch)
    actual = features(upcycled(strategy, clip, seed=0).model, *batch)
    assert actual.dtype == torch.float64
    if strategy.preserves_function:
        assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    else:
        assert float((actual - expected).norm() / expected.norm()) > 1e-6


@pytest.mark.parametrize("name", ["sparse-upcycling", "eesd-only", "ders-sm", "ders-lm"])
def test_a_single_choice_scales_the_dense_function_and_is_warned_of(name: str) -> None:
    """Copies of the FFN under a raw gate p give p FFN(x): no strategy keeps the function, and the user is told."""
    clip = tiny_clip()
    batches = tiny_batches(clip, seed=5)
    with pytest.warns(UserWarning, match="top_k=1: an expert's output is scaled by the router's probability of it"):
        model = upcycle_bench.upcycle(clip.model, name, experts=4, top_k=1, calibration=batches)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    layers = moe_layers(model)
    for where, layer in layers.items():
        layer.moe.register_forward_hook(lambda _m, args, out, at=where: seen.__setitem__(at, (args[0], out[0])))
    features(model, *batches[0])
    found = diagnose(model, clip.model, batches[:1])["layers"]
    for where, (x_TD, y_TD) in seen.items():
        dense_TD = clip.model.get_submodule(layers[where].place.mlp_path)(x_TD)
        gate_T1 = (x_TD @ layers[where].router_weight.T).softmax(1).max(1, keepdim=True).values
        assert_close(y_TD, gate_T1 * dense_TD, rtol=1e-4, atol=1e-5)
        assert found[where]["function_drift"] > 0.05


def reaching(model: Any, layer: Any, text_BL: Tensor) -> Tensor:
    """Which tokens [T] of a layer a contrastive loss depends on: in the last block of a tower only the pooled one."""
    if layer.tower == "vision":
        tokens, blocks = len(model.visual.positional_embedding), model.visual.transformer.resblocks
        pooled_T = torch.arange(len(text_BL) * tokens) % tokens == 0
    else:
        length_B, blocks = text_BL.argmax(1) + 1, model.transformer.resblocks
        pooled_T = torch.zeros(int(length_B.sum()), dtype=torch.bool)
        pooled_T[length_B.cumsum(0) - 1] = True
    return pooled_T if layer.block == len(blocks) - 1 else torch.ones_like(pooled_T)


def test_everything_trains(strategy: Strategy) -> None:
    clip = tiny_clip()
    model = upcycled(strategy, clip, seed=0).model.train()
    images, text_BL = tiny_batches(clip, seed=3, pairs=192, batch_size=192)[0]
    layers = moe_layers(model)
    routes: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.gate.register_forward_hook(lambda _m, _args, out, name=name: routes.__setitem__(name, out[3]))  # index_KT
    image_BC, text_BC, scale = model(images, text_BL)[:3]
    loss = contrastive_loss(image_BC, text_BC, scale)
    for layer in layers.values():
        loss = loss + 0.01 * layer.l_aux
    loss.backward()
    assert torch.isfinite(loss)
    for key, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), key
    outside = [p for key, p in model.named_parameters() if ".mlp.moe." not in key]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in outside)
    assert (len(layers) > 0) == strategy.replaces_ffn
    trained = 0
    for name, layer in layers.items():
        assert layer.router_weight.grad.any(dim=1).all(), name  # every row, if only by the load-balancing loss
        reaching_T = reaching(model, layer.place, text_BL)
        for number, expert in enumerate(layer.experts):
            gradients = [p.grad for p in expert.parameters() if p.grad is not None]
            if (routes[name] == number)[:, reaching_T].any():  # dropped choices are -1
                assert any(gradient.any() for gradient in gradients), (name, number)
                trained += 1
    assert trained >= 0.6 * sum(len(layer.experts) for layer in layers.values())  # or the loop above would prove little


def test_extra_loss(strategy: Strategy) -> None:
    clip = tiny_clip()
    model = upcycled(strategy, clip, seed=0).model.train()
    layers = moe_layers(model)
    hooks = count_hooks(model)
    loss = strategy.loss(layers, Stream(("strategy loss", 0)), 100)
    if loss is None:
        assert count_hooks(model) == hooks
        return
    assert isinstance(loss, ExtraLoss)
    assert loss.name
    assert all(math.isfinite(value) for value in loss.notes().values())
    assert loss.name not in ("contrastive", "load_balance", "step", "loss")  # columns of the metrics file
    batch = tiny_batches(clip, seed=3)[0]
    for _ in range(2):
        model.zero_grad()
        model(*batch)
        value = loss.compute()
        assert value.shape == ()
        assert torch.isfinite(value)
        value.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert gradients
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * parameter.std(correction=0)
        loss.after_step()
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    twin = strategy.loss(layers, Stream(("strategy loss", 0)), 100)
    twin.load_state_dict(torch.load(file, weights_only=True))
    model(*batch)
    assert loss.compute().item() == twin.compute().item()
    loss.close()
    twin.close()
    assert count_hooks(model) == hooks


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_merged_experts_compute_the_same_and_stand_alone(strategy: Strategy) -> None:
    clip = tiny_clip(torch.float64)
    batch = tiny_batches(clip, seed=5)[0]
    model = upcycled(strategy, clip, seed=0).model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in moe_layers(model).values():  # as training would leave them
            for parameter in layer.experts.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    expected = features(model, *batch)
    before = [expert for layer in moe_layers(model).values() for expert in layer.experts]
    marks = [(p.allreduce, p.group_name) for layer in moe_layers(model).values() for p in layer.experts.parameters()]
    merge(model)
    assert_close(features(model, *batch), expected, rtol=1e-10, atol=1e-10)
    experts = [parameter for layer in moe_layers(model).values() for parameter in layer.experts.parameters()]
    assert {(p.allreduce, p.group_name) for p in experts} == set(marks)
    assert len({p.untyped_storage().data_ptr() for p in experts}) == len(experts)
    assert not [expert for layer in moe_layers(model).values() for expert in layer.experts if hasattr(expert, "merged")]
    if any(hasattr(expert, "merged") for expert in before):
        assert rebuild.unlike_its_file(model, clip.model) is None


def test_round_trips(strategy: Strategy, tmp_path: Path) -> None:
    clip = tiny_clip()
    batch = tiny_batches(clip, seed=5)[0]
    made: Clip = upcycled(strategy, clip, seed=0)
    expected = features(made.model, *batch)
    other = upcycled(strategy, tiny_clip(), seed=1)
    other.model.load_state_dict(made.model.state_dict(), strict=True)
    assert torch.equal(features(other.model, *batch), expected)

    merge(made.model)  # as a run does before it saves
    expected = features(made.model, *batch)
    moe = resolve_moe(strategy, tiny_moe())
    digest = weights.save(made, moe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{digest}.safetensors"]
    loaded = weights.load(tmp_path / f"{digest}.safetensors")
    assert loaded.name == made.name
    assert equal(loaded.model.state_dict(), made.model.state_dict())
    assert torch.equal(features(loaded.model, *batch), expected)
    assert len(moe_layers(loaded.model)) == len(moe_layers(made.model))
    assert weights.save(loaded, moe, tmp_path) == digest  # same content, same name
    assert rebuild.unlike_its_file(made.model, clip.model) is None
    assert rebuild.other_answers(made.model, clip.model, *batch) is None


def test_a_file_will_describe_what_training_makes(strategy: Strategy) -> None:
    """Also of experts that are merged, between the stages or at the end; a run would refuse it else."""
    clip = tiny_clip()
    model = upcycled(strategy, clip, seed=0).model
    require_describable(strategy, model, clip.model, 100, tiny_batches(clip, seed=5))


def test_the_built_model_costs_what_the_plan_says(strategy: Strategy) -> None:
    """DeepSpeed's gate has a few products more than the formula of the plan."""
    protocol = load_protocol(SMOKE, ["moe.experts=4"])
    model = upcycled(strategy, tiny_clip(), 0, protocol.moe).model
    merge(model)
    planned = estimate(protocol, strategy)
    assert model_cost(model) == (planned.parameters_active, pytest.approx(planned.forward_flops, rel=1e-3))
