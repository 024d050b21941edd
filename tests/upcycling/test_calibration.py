"""Calibrators see the FFN's inputs, in order and without padding (K9), and the model stays as it was."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.moe_helpers import END, MOE, captions, create_dense, inputs_for, upcycled
from upcycle_bench.model.ffn import Layer
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.surgery import find_layers
from upcycle_bench.upcycling.calibration import calibrate


class Recorder:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, x_TD: Tensor) -> None:
        self.seen.append(x_TD.clone())


def record(model: Any, layers: list[Layer], batches: list[tuple[Tensor, Tensor]]) -> dict[str, list[Tensor]]:
    recorders = {layer.name: Recorder() for layer in layers}
    calibrate(model, layers, recorders, batches)
    return {name: recorder.seen for name, recorder in recorders.items()}


def outputs_of_ln_2(model: Any, layers: list[Layer], batches: list[tuple[Tensor, Tensor]]) -> dict[str, list[Tensor]]:
    """What each layer's ln_2 gives, [B, L, D] for each batch, by hooks of the test's own."""
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    handles = []
    for layer in layers:
        norm = model.get_submodule(layer.mlp_path.removesuffix("mlp") + "ln_2")
        handles.append(norm.register_forward_hook(lambda m, a, y, name=layer.name: seen[name].append(y.detach())))
    with torch.no_grad():
        for images, texts in batches:
            model.encode_image(images)
            model.encode_text(texts)
    for handle in handles:
        handle.remove()
    return seen


def keep(text_BL: Tensor, end: int = END) -> Tensor:
    return torch.arange(text_BL.shape[1]) <= (text_BL == end).int().argmax(1, keepdim=True)


def test_calibrators_see_the_ffn_inputs_in_order() -> None:
    dense = create_dense()
    layers = find_layers(dense, MOE)
    batches = [inputs_for(dense, 6), inputs_for(dense, 3)]
    batches[1] = (batches[1][0] + 1, captions([7, 0, 4], seed=5))
    expected = outputs_of_ln_2(dense, layers, batches)
    seen = record(dense, layers, batches)
    assert list(seen) == [layer.name for layer in layers]
    for layer in layers:
        assert len(seen[layer.name]) == 2
        for ours_TD, theirs_BLD, (_, texts) in zip(seen[layer.name], expected[layer.name], batches, strict=True):
            wanted_TD = theirs_BLD[keep(texts)] if layer.tower == "text" else theirs_BLD.flatten(0, 1)
            assert torch.equal(ours_TD, wanted_TD)
            assert ours_TD.dtype == torch.float32 and not ours_TD.requires_grad


def test_what_calibrators_see_is_what_the_moe_layer_sees() -> None:
    dense = create_dense()
    layers = find_layers(dense, MOE)
    batches = [inputs_for(dense)]
    model = upcycled(dense).eval()
    inputs: dict[str, Tensor] = {}
    for name, layer in moe_layers(model).items():
        layer.moe.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0].detach()}))
    model.encode_image(batches[0][0])
    model.encode_text(batches[0][1])
    for name, (x_TD,) in record(dense, layers, batches).items():
        torch.testing.assert_close(x_TD, inputs[name], rtol=1e-4, atol=1e-5)  # sparse: dense up to rounding


@pytest.mark.parametrize(
    ("changes", "end"), [({}, END), ({"text_pool_type": "eos", "text_eos_id": 7}, 7)], ids=["argmax", "eos"]
)
def test_k9_text_behind_its_end_changes_nothing(changes: dict[str, Any], end: int) -> None:
    """K9: padding tokens do not influence what calibrators collect."""
    dense = create_dense(**changes)
    layers = find_layers(dense, MOE)
    images, _ = inputs_for(dense, 5)
    texts = captions([0, 3, 8, 5, 9], end=end)
    others = torch.where(keep(texts, end), texts, torch.randint(8, 90, texts.shape))
    assert not torch.equal(texts, others)
    ours, theirs = record(dense, layers, [(images, texts)]), record(dense, layers, [(images, others)])
    for layer in layers:
        assert torch.equal(ours[layer.name][0], theirs[layer.name][0])
        if layer.tower == "text":
            assert len(ours[layer.name][0]) == 1 + 4 + 9 + 6 + 10


@pytest.mark.parametrize("changes", [{"text_pool_type": "last"}, {"text_no_causal_mask": True}])
def test_text_is_whole_where_nothing_is_padding(changes: dict[str, Any]) -> None:
    """As in the MoE layer: with another pooling, or without the causal mask, every position counts."""
    dense = create_dense(**changes)
    layers = find_layers(dense, MOE)
    batches = [inputs_for(dense)]
    expected = outputs_of_ln_2(dense, layers, batches)
    for name, (x_TD,) in record(dense, layers, batches).items():
        assert torch.equal(x_TD, expected[name][0].flatten(0, 1))


def test_a_double_model_gives_float32() -> None:
    dense = create_dense().double()
    layers = find_layers(dense, MOE)
    batches = [inputs_for(dense, dtype=torch.float64)]
    expected = outputs_of_ln_2(dense, layers, batches)
    for layer in layers[:3]:
        (x_TD,) = record(dense, layers, batches)[layer.name]
        assert torch.equal(x_TD, expected[layer.name][0].flatten(0, 1).float())


@pytest.mark.parametrize(
    ("culprit", "training"),
    [("nothing", True), ("nothing", False), ("calibrator", True), ("data", False), ("missing calibrator", True)],
)
def test_the_model_is_left_as_it_was(culprit: str, training: bool) -> None:
    dense = create_dense().train(training)
    layers = find_layers(dense, MOE)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    recorders: dict[str, Any] = {layer.name: Recorder() for layer in layers}
    modes = []

    class Watcher(Recorder):
        def update(self, x_TD: Tensor) -> None:
            modes.append(dense.training)
            if culprit == "calibrator":
                raise FloatingPointError("a cluster is empty")

    recorders["text.3"] = Watcher()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield inputs_for(dense)
        if culprit == "data":
            raise OSError("a shard is gone")

    if culprit == "nothing":
        calibrate(dense, layers, recorders, batches())
    else:
        if culprit == "missing calibrator":
            del recorders["text.5"]
        with pytest.raises((FloatingPointError, OSError, KeyError)):
            calibrate(dense, layers, recorders, batches())
    assert modes == ([] if culprit == "missing calibrator" else [False])
    assert {module.training for module in dense.modules()} == {training}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())
    assert all(torch.equal(value, dense.state_dict()[key]) for key, value in before.items())
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_patch_dropout_is_off() -> None:
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 8,
            "layers": 2,
            "width": 32,
            "head_width": 8,
            "patch_size": 2,
            "patch_dropout": 0.5,
        },
        "text_cfg": {"context_length": 10, "vocab_size": 100, "width": 24, "heads": 3, "layers": 2},
    }
    dense = create_dense(config).train()
    assert not isinstance(dense.visual.patch_dropout, nn.Identity)
    layers = find_layers(dense, MOE)
    seen = record(dense, layers, [inputs_for(dense, 3)])
    assert len(seen["vision.1"][0]) == 3 * (1 + 16)


@pytest.mark.parametrize("towers", [("vision", "text"), ("vision",), ("text",)])
def test_nothing_is_computed_behind_the_last_layer(towers: tuple[str, ...]) -> None:
    dense = create_dense()
    layers = [layer for layer in find_layers(dense, MOE) if layer.tower in towers]
    last = [max(layer.block for layer in layers if layer.tower == tower) for tower in towers]
    ran: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda m, a, name=name: ran.add(name))
        for name, module in dense.named_modules()
        if name
    ]
    batches = [inputs_for(dense, 3), inputs_for(dense, 2)]
    seen = record(dense, layers[::-1], batches)  # their order does not matter
    for handle in handles:
        handle.remove()
    assert all(len(tensors) == 2 for tensors in seen.values())
    for tower, prefix, norm in (("vision", "visual.", "visual.ln_post"), ("text", "", "ln_final")):
        block = f"{prefix}transformer.resblocks.{max(last)}"
        assert (f"{block}.attn" in ran) == (f"{block}.ln_2" in ran) == (tower in towers)
        assert f"{block}.mlp.c_fc" not in ran
        assert norm not in ran
