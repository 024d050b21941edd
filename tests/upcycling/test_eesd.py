"""EESD, the distillation of cluster-aware upcycling: K8 its value, gradient and teacher, K9 padding.

Values are those of the sum over features, unless a test says otherwise: the layers here are 8 wide.
"""

import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.cluster_data import STREAM, ClusterAware, relative, tokens, two_paddings
from tests.helpers import initialise, moe_layer, random_ffn, tiny_clip, tiny_moe
from tests.literal import moe_layer as literal_moe
from upcycle_bench.model.ffn import LayerInit
from upcycle_bench.model.moe import MoEFFN, moe_layers
from upcycle_bench.model.surgery import put_experts
from upcycle_bench.util.errors import UserError


def random_init(
    num_experts: int, seed: int = 0, *, identical: bool = False, router_scale: float = 1.0, width: int = 8
) -> LayerInit:
    """Experts of one layer, H = 12 and D = 8, float64, and a random router."""
    ffns = [random_ffn(12, width, seed=0 if identical else seed + i) for i in range(num_experts)]
    generator = torch.Generator().manual_seed(seed + 1000)
    router_ED = router_scale * torch.randn(num_experts, width, generator=generator, dtype=torch.float64)
    return LayerInit([ffn.expert() for ffn in ffns], router_ED)


def distil(layers: dict[str, MoEFFN], steps: int = 100, **options: Any) -> Any:
    return ClusterAware(**({"eesd_feature_reduction": "sum"} | options)).loss(layers, STREAM, steps)


def student(init: LayerInit, *, top_k: int = 2, capacity_factor: float = 50.0, tower: str = "vision") -> MoEFFN:
    """A layer in training mode."""
    moe = tiny_moe(experts=len(init.experts), top_k=top_k, capacity_factor=capacity_factor, min_capacity=0)
    return moe_layer(init, moe=moe, tower=tower).train()


def weights_of(experts: Any) -> list[literal_moe.Expert]:
    return [(e.c_fc.weight, e.c_fc.bias, e.c_proj.weight, e.c_proj.bias) for e in experts]


def perturb(layer: MoEFFN, seed: int = 5) -> None:
    """Change the student as optimiser steps would, so that it differs from the teacher."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


# ---- K8: value and gradient -----------------------------------------------------------------------------------------


def test_k8_eesd_is_zero_for_identical_experts() -> None:
    layer = student(random_init(4, identical=True))
    loss = distil({"vision.1": layer})
    layer(tokens()[None])
    assert 0 <= loss.compute().item() < 1e-25


@pytest.mark.parametrize("number", [2, 4])
def test_k8_eesd_is_zero_when_every_expert_is_chosen(number: int) -> None:
    layer = student(random_init(number), top_k=number)
    loss = distil({"vision.1": layer})
    layer(tokens()[None])
    assert 0 <= loss.compute().item() < 1e-25
    fewer = student(random_init(4), top_k=2)
    loss = distil({"vision.1": fewer})
    fewer(tokens()[None])
    assert loss.compute().item() > 1e-3  # the zero above is no accident


def test_k8_eesd_falls_as_the_router_sharpens() -> None:
    values = []
    for scale in (0.0, 0.3, 1.0, 3.0, 10.0, 300.0):
        layer = student(random_init(4, router_scale=scale))
        loss = distil({"vision.1": layer})
        layer(tokens()[None])
        values.append(loss.compute().item())
    assert all(later < earlier for earlier, later in itertools.pairwise(values)), values
    assert values[-1] < 1e-3 * values[0]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("capacity_factor", [50.0, 0.4])
def test_k8_eesd_value_and_gradient_equal_the_literal_ones(capacity_factor: float, reduction: str) -> None:
    layer = student(random_init(4), capacity_factor=capacity_factor)
    loss = distil({"vision.1": layer}, eesd_weight=0.7, eesd_feature_reduction=reduction)
    teacher_router_ED = layer.gate.wg.weight.detach().clone()
    teacher = [tuple(p.detach().clone() for p in expert) for expert in weights_of(layer.experts)]
    perturb(layer)
    x_TD = tokens().requires_grad_()
    leaves = [x_TD, *layer.parameters()]
    layer(x_TD[None])
    value = loss.compute()
    actual = torch.autograd.grad(value, leaves, allow_unused=True)

    slots = literal_moe.capacity(40, 4, capacity_factor, 2, 0)
    moe = literal_moe.moe_forward(x_TD, layer.router_weight, weights_of(layer.experts), nn.GELU(), capacity=slots)
    assert bool(moe.kept_TK.all()) == (capacity_factor > 1)  # dropped tokens are included in the loss
    expected_value = 0.7 * literal_moe.eesd_loss(
        x_TD, moe.y_TD, teacher_router_ED, teacher, nn.GELU(), feature_reduction=reduction
    )
    expected = torch.autograd.grad(expected_value, leaves, allow_unused=True)
    assert expected_value.item() > 0.01
    # The loss is float32 at the least; DeepSpeed decides routes in float32, values here are float64 on both sides.
    assert_close(value.double(), expected_value, rtol=1e-6, atol=0)
    for ours, theirs in zip(actual, expected, strict=True):
        assert theirs is not None
        assert relative(ours, theirs) < 1e-5


def test_k8_eesd_gives_the_teacher_no_gradient() -> None:
    layer = student(random_init(4))
    loss = distil({"vision.1": layer})
    perturb(layer)
    layer(tokens()[None])
    loss.compute().backward()
    teacher = list(loss.teacher["vision.1"].parameters())
    assert len(teacher) == 1 + 4 * 4  # router, and W1, b1, W2, b2 of each expert
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in teacher)
    assert all(parameter.grad is not None for parameter in layer.parameters())
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    assert not own & {parameter.data_ptr() for parameter in teacher}


def test_k8_eesd_routes_in_float32_under_bfloat16_autocast() -> None:
    # Logits of about 30 rounded to bfloat16 are off by up to 0.06, gates by as much; experts alone by 2^-8 = 0.004.
    layer = student(random_init(4, router_scale=10.0)).float()
    loss = distil({"vision.1": layer})
    x_TD = tokens(300).float()
    plain_TD = loss.teacher["vision.1"].ensemble(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x_TD[None])
        mixed_TD = loss.teacher["vision.1"].ensemble(x_TD)
        value = loss.compute()
    assert mixed_TD.dtype == torch.float32
    assert value.dtype == torch.float32
    assert ((mixed_TD - plain_TD).norm(dim=1) / plain_TD.norm(dim=1)).max() < 0.02


def test_eesd_weights_and_reductions() -> None:
    def value(names: list[str], **options: Any) -> float:
        layers = {name: student(random_init(4, seed=10 * i)) for i, name in enumerate(("a", "b")) if name in names}
        loss = distil(layers, **options)
        for layer in layers.values():
            layer(tokens()[None])
        return loss.compute().item()

    a, b = value(["a"]), value(["b"])
    assert a != pytest.approx(b, rel=0.01)
    assert value(["a", "b"]) == pytest.approx((a + b) / 2)
    assert value(["a", "b"], eesd_layer_reduction="sum") == pytest.approx(a + b)
    assert value(["a", "b"], eesd_weight=0.1) == pytest.approx(0.1 * (a + b) / 2)
    assert value(["a"], eesd_feature_reduction="mean") == pytest.approx(a / 8)  # D = 8
    assert distil({"a": student(random_init(4))}, eesd_weight=0.0) is None


@pytest.mark.parametrize("capacity_factor", [50.0, 0.4])
def test_k8_masked_tokens_are_those_that_lost_a_choice(capacity_factor: float) -> None:
    layer = student(random_init(4), capacity_factor=capacity_factor)
    every, masked = distil({"vision.1": layer}), distil({"vision.1": layer}, eesd_mask_dropped=True)
    router_ED = layer.gate.wg.weight.detach().clone()
    teacher = [tuple(p.detach().clone() for p in expert) for expert in weights_of(layer.experts)]
    layer(tokens()[None])
    slots = literal_moe.capacity(40, 4, capacity_factor, 2, 0)
    moe = literal_moe.moe_forward(tokens(), layer.router_weight, weights_of(layer.experts), nn.GELU(), capacity=slots)
    whole_T = moe.kept_TK.all(1)
    expected = literal_moe.eesd_loss(
        tokens()[whole_T], moe.y_TD[whole_T], router_ED, teacher, nn.GELU(), feature_reduction="sum"
    )
    assert masked.compute().item() == pytest.approx(expected.item(), rel=1e-6)
    assert bool(whole_T.all()) == (capacity_factor > 1)
    assert (every.compute().item() == pytest.approx(expected.item(), rel=1e-6)) == (capacity_factor > 1)
    before = len(layer.gate._forward_hooks)
    masked.close()
    assert len(layer.gate._forward_hooks) == before - 1


def test_k8_nothing_left_by_the_mask_is_zero() -> None:
    layer = student(random_init(4))
    loss = distil({"vision.1": layer}, eesd_mask_dropped=True)
    layer(tokens()[None])
    loss.whole["vision.1"] = torch.zeros(40, dtype=torch.bool)
    assert loss.compute().item() == 0


def test_k8_a_draw_of_tokens_is_an_unbiased_estimate_from_its_own_stream() -> None:
    layer = student(random_init(4))
    whole, drawn = distil({"vision.1": layer}), distil({"vision.1": layer}, eesd_tokens=0.25)
    torch_state = torch.get_rng_state()
    values = []
    for _ in range(400):
        layer(tokens()[None])
        values.append(drawn.compute().item())
        drawn.after_step()
    assert torch.equal(torch_state, torch.get_rng_state())
    target_TD = whole.teacher["vision.1"].ensemble(tokens())
    error_T = (layer(tokens()[None])[0].detach() - target_TD).square().sum(1)
    assert whole.compute().item() == pytest.approx(float(error_T.mean()), rel=1e-6)
    # A mean of 10 of 40 without replacement has variance s^2/10 * 30/40; 400 draws, five standard errors.
    bound = 5 * float(error_T.var()) ** 0.5 * (0.1 * 0.75 / 400) ** 0.5
    mean = sum(values) / 400
    assert abs(mean - float(error_T.mean())) < bound
    spread = float(torch.tensor(values).var() / (error_T.var() * 0.1 * 0.75))
    assert 0.5 < spread < 1.6  # of normal values it would be 0.7 to 1.35, five sigma of chi^2 with 399 degrees


def test_eesd_draws_the_same_tokens_after_a_resumption() -> None:
    layer = student(random_init(4))
    first = distil({"vision.1": layer}, eesd_tokens=0.2)
    for _ in range(3):
        first.after_step()
    second = distil({"vision.1": layer}, eesd_tokens=0.2)
    layer(tokens()[None])
    assert first.compute().item() != second.compute().item()  # another step, other tokens
    second.load_state_dict(first.state_dict())
    layer(tokens()[None])
    assert first.compute().item() == second.compute().item()


# ---- K8: the teacher and its state ----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.75])
def test_k8_ema_freezes_copies_or_moves(alpha: float) -> None:
    layer = student(random_init(4))
    loss = distil({"vision.1": layer}, eesd_ema=alpha)

    def teacher() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in loss.teacher["vision.1"].parameters()]

    def pupil() -> list[Tensor]:
        return [layer.router_weight.detach().clone(), *(p.detach().clone() for p in layer.experts.parameters())]

    start = teacher()
    assert all(map(torch.equal, start, pupil()))  # equal at step 0
    perturb(layer)
    assert all(map(torch.equal, teacher(), start))  # nothing moves before the step has ended
    loss.after_step()
    if alpha == 1:
        assert all(map(torch.equal, teacher(), start))
    elif alpha == 0:
        assert all(map(torch.equal, teacher(), pupil()))
    else:
        for now, before, target in zip(teacher(), start, pupil(), strict=True):
            assert_close(now, alpha * before + (1 - alpha) * target, rtol=1e-12, atol=1e-12)


def test_k8_ema_after_two_steps_by_hand() -> None:
    # alpha = 1/2, a weight that goes 1 -> 3 -> 7 in the student: teacher 1, then (1 + 3)/2 = 2, then (2 + 7)/2 = 4.5.
    layer = student(random_init(2))
    with torch.no_grad():
        layer.router_weight.fill_(1)
    loss = distil({"vision.1": layer}, eesd_ema=0.5)
    for value, expected in ((3.0, 2.0), (7.0, 4.5)):
        with torch.no_grad():
            layer.router_weight.fill_(value)
        loss.after_step()
        assert (loss.teacher["vision.1"].router_ED == expected).all()


@pytest.mark.parametrize(("steps", "memory"), [(79_346, 1000.0), (800, 10.08), (39_673, 500.0), (50, 1.0)])
def test_the_ema_remembers_the_same_share_of_every_training(steps: int, memory: float) -> None:
    """That of the paper's B/32, where 0.999 remembers 1,000 of 79,346 steps; but never less than one step."""
    notes = distil({"vision.1": student(random_init(2))}, steps).notes()
    assert notes["eesd_memory_steps"] == pytest.approx(memory, rel=1e-3)
    assert notes["eesd_ema"] == pytest.approx(1 - 1 / memory, abs=1e-5)


def test_an_ema_that_is_given_is_taken_as_printed() -> None:
    layers = {"vision.1": student(random_init(2))}
    assert {distil(layers, steps, eesd_ema=0.999).notes()["eesd_ema"] for steps in (10, 800, 79_346)} == {0.999}
    assert distil(layers, eesd_ema=1.0).notes()["eesd_memory_steps"] == 0  # it never forgets: JSON has no infinity
    with pytest.raises(UserError, match="exclude each other"):
        ClusterAware(eesd_ema=0.999, eesd_memory=0.5)
    with pytest.raises(UserError, match="exclude each other"):  # also where it is the usual share
        ClusterAware(eesd_ema=0.999, eesd_memory=0.0126)


def test_what_the_teacher_keeps_of_step_0_by_hand() -> None:
    """A quarter of 8 steps is a memory of 2 and an EMA of 1/2: after 8 steps 1/256 of step 0 is left.

    The printed 0.999 would leave 0.999^8 = 0.992, and of the lab's 800 steps 0.449.
    """
    for options, left in (({"eesd_memory": 0.25}, 1 / 256), ({"eesd_ema": 0.999}, 0.999**8)):
        layer = student(random_init(2))
        with torch.no_grad():
            layer.router_weight.fill_(1)
        loss = distil({"vision.1": layer}, 8, **options)
        with torch.no_grad():
            layer.router_weight.fill_(0)
        for _ in range(8):
            loss.after_step()
        kept = loss.teacher["vision.1"].router_ED
        assert_close(kept, torch.full_like(kept, left), rtol=1e-12, atol=0)
    at_the_end = {steps: distil({"a": layer}, steps).notes()["eesd_ema"] ** steps for steps in (800, 79_346)}
    assert all(share < 1e-30 for share in at_the_end.values())  # exp(-1 / 0.0126), in the paper and in the lab
    assert 0.449 < 0.999**800 < 0.45


@pytest.mark.parametrize(
    ("tower", "width", "factor"), [("vision", 768, 1.0), ("text", 512, 1.0), ("vision", 128, 6.0), ("text", 128, 4.0)]
)
def test_the_papers_weight_keeps_its_meaning_at_another_width(tower: str, width: int, factor: float) -> None:
    """At the widths of ViT-B it is the plain sum, to the bit; elsewhere the mean over features times that width."""
    x_TD = tokens(20, width=width)
    value = {}
    for reduction in ("paper", "sum", "mean"):
        layer = student(random_init(3, width=width), tower=tower)
        loss = distil({f"{tower}.1": layer}, eesd_feature_reduction=reduction)
        perturb(layer)
        layer(x_TD[None])
        value[reduction] = loss.compute().item()
        assert loss.notes()[f"eesd_factor_{tower}"] == {"paper": factor, "sum": 1.0, "mean": 1 / width}[reduction]
    assert value["paper"] == pytest.approx(factor * value["sum"], rel=0 if factor == 1 else 1e-6)
    assert value["sum"] > 0
    assert value["paper"] == pytest.approx({"vision": 768, "text": 512}[tower] * value["mean"], rel=1e-6)


def test_eesd_state_round_trip() -> None:
    layer = student(random_init(4))
    loss = distil({"vision.1": layer}, eesd_ema=0.5)
    perturb(layer)
    loss.after_step()
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = distil({"vision.1": layer}, eesd_ema=0.5)  # a new teacher starts as the student that is there now
    other.load_state_dict(torch.load(file, weights_only=True))
    perturb(layer, seed=6)
    for each in (loss, other):
        each.after_step()
    layer(tokens()[None])
    assert loss.compute().item() == other.compute().item() > 0


def test_eesd_close_removes_its_hooks() -> None:
    layer = student(random_init(4))
    before = len(layer.moe._forward_hooks)
    loss = distil({"vision.1": layer})
    assert len(layer.moe._forward_hooks) == before + 1
    loss.close()
    assert len(layer.moe._forward_hooks) == before
    layer(tokens()[None])
    assert loss.seen == {}


def test_eesd_sees_training_forwards_only_and_keeps_none() -> None:
    layer = student(random_init(4))
    loss = distil({"vision.1": layer})
    layer.eval()(tokens()[None])
    assert loss.seen == {}
    layer.train()(tokens()[None])
    loss.compute()
    assert loss.seen == {}  # the activations go with the step


# ---- K9: padding ----------------------------------------------------------------------------------------------------


def test_k9_padding_does_not_influence_eesd() -> None:
    clip = tiny_clip()
    *texts, lengths = two_paddings(clip)
    made = initialise(ClusterAware(), clip, seed=0)
    moe = tiny_moe(capacity_factor=1.0)  # with drops: padding must not take anyone's place
    model = put_experts(clip.model, made.inits, moe).train()
    layers = {name: layer for name, layer in moe_layers(model).items() if layer.place.tower == "text"}
    loss = distil(layers)
    values, gradients = [], []
    for text_BL in texts:
        model.zero_grad()
        model.encode_text(text_BL)
        assert all(len(x_TD) == sum(lengths) for x_TD, _ in loss.seen.values())
        value = loss.compute()
        value.backward()
        values.append(value.item())
        gradients.append(torch.cat([p.grad.flatten() for layer in layers.values() for p in layer.parameters()]))
    assert values[0] > 1e-4
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert relative(gradients[0], gradients[1]) < 1e-4


def test_eesd_draws_other_tokens_on_another_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = student(random_init(4))
    drawn, values = distil({"vision.1": layer}, eesd_tokens=0.2), []
    perturb(layer)
    for rank in ("0", "0", "1"):
        monkeypatch.setenv("RANK", rank)  # as torchrun sets it
        layer(tokens()[None])
        values.append(drawn.compute().item())
    assert values[0] == values[1] != values[2]
