"""What a file of weights describes, and what it loses: modules, hooks and functions of a plugin's own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tests.helpers import tiny_batches, tiny_clip, tiny_moe, upcycled
from upcycle_bench.model import rebuild
from upcycle_bench.model.ffn import FFN
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.strategy import LayerInit, Strategy, StrategyInfo, configure, random_router
from upcycle_bench.upcycling.final_form import require_describable
from upcycle_bench.util.errors import PluginError

MLP = "transformer.resblocks.1.mlp"


def upcycled_tiny() -> Any:
    """A model whose experts differ, so that routes matter."""
    strategy = configure(load_registry().get("strategy", "noise-upcycling").target, {})
    return upcycled(strategy, tiny_clip(), 0, tiny_moe()).model


def replace_expert(model: Any, make: Callable[[FFN, nn.ModuleList], nn.Module]) -> None:
    """Replace the last expert of the last layer, text.1."""
    layer = list(moe_layers(model).values())[-1]
    ffn = FFN.of(tiny_clip().model.get_submodule(layer.place.mlp_path))
    layer.experts[-1] = make(ffn, layer.experts)


class Shifted(nn.Module):
    """A plugin's expert: the FFN plus a learned shift."""

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self.base, self.shift = ffn.expert(), nn.Parameter(torch.zeros(ffn.width))

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.base(x_TD) + self.shift


class MergedShift(Shifted):
    """The same, which says of which plain FFN it is another form."""

    def merged(self) -> nn.Sequential:
        ffn = FFN.of(self.base)
        return ffn.expert(b2_D=ffn.b2_D + self.shift.detach())


def other_activation(ffn: FFN, _: nn.ModuleList) -> nn.Module:
    expert = ffn.expert()
    expert.gelu = nn.ReLU()
    return expert


def other_shape(ffn: FFN, _: nn.ModuleList) -> nn.Module:
    return ffn.expert(w1_HD=ffn.w1_HD[1:], b1_H=ffn.b1_H[1:], w2_DH=ffn.w2_DH[:, 1:])


def shared_tensor(ffn: FFN, experts: nn.ModuleList) -> nn.Module:
    expert: Any = ffn.expert()
    expert.c_fc.weight = experts[0].c_fc.weight
    return expert


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda ffn, _: ffn.expert(), None),
        (lambda ffn, _: Shifted(ffn), f"{MLP} expert 3 is tests.model.test_rebuild.Shifted(), the file's is Sequ"),
        (other_activation, f"{MLP} expert 3 gelu is ReLU(), the file's is GELU("),
        (other_shape, f"{MLP} expert 3 c_fc is Linear(in_features=64, out_features=255, bias=True), the file's is Lin"),
        (shared_tensor, "text.1: its experts share tensors, and the file has a copy for each"),
        (lambda ffn, _: ffn.expert().double(), f"{MLP} expert 3 c_fc.weight is float64 [256, 64], the file's is float"),
    ],
    ids=["plain", "own module", "activation", "shape", "shared", "dtype"],
)
def test_only_plain_experts_are_what_a_file_describes(make: Any, reason: str | None) -> None:
    model = upcycled_tiny()
    replace_expert(model, make)
    found = rebuild.unlike_its_file(model, tiny_clip().model)
    assert (found or "").startswith(reason or "") and (found is None) == (reason is None), found


def test_a_dense_model_is_what_its_file_describes_and_one_with_an_adapter_is_not() -> None:
    model = tiny_clip().model
    assert rebuild.unlike_its_file(model, tiny_clip().model) is None
    model.visual.adapter = nn.Linear(3, 3)
    found = rebuild.unlike_its_file(model, tiny_clip().model)
    assert found == "visual.adapter is Linear(in_features=3, out_features=3, bias=True), the file's is missing"


def patched_forward(model: Any) -> str:
    gate = moe_layers(model)["vision.3"].gate
    gate.forward = lambda x_TD, *_: type(gate).forward(gate, -x_TD)  # type: ignore[method-assign]
    return "visual.transformer.resblocks.3.mlp.moe.deepspeed_moe.gate does not compute what its tensors say"


def hook(model: Any) -> str:
    model.visual.register_forward_hook(lambda module, args, output: 2 * output)
    return "visual does not compute what its tensors say"


def other_encoder(model: Any) -> str:
    model.encode_image = replace(tiny_clip(), model=upcycled_tiny()).model.encode_image
    model.encode_text = lambda texts: -type(model).encode_text(model, texts)
    return "the model does not compute what its tensors say"


@pytest.mark.parametrize("patch", [patched_forward, hook, other_encoder])
def test_a_function_that_no_tensor_holds_is_noticed(patch: Callable[[Any], str]) -> None:
    model, dense, batch = upcycled_tiny(), tiny_clip().model, tiny_batches(tiny_clip())[0]
    assert rebuild.other_answers(model, dense, *batch) is None
    expected = patch(model)
    assert rebuild.unlike_its_file(model, dense) is None
    assert rebuild.other_answers(model, dense, *batch) == expected


def test_a_hook_that_only_looks_is_allowed() -> None:
    model = upcycled_tiny()
    model.visual.register_forward_hook(lambda module, args, output: None)
    assert rebuild.other_answers(model, tiny_clip().model, *tiny_batches(tiny_clip())[0]) is None


@dataclass(frozen=True, kw_only=True)
class Staged(Strategy):
    """Experts of a form of their own, which the second stage merges if it has `merged`."""

    info: ClassVar[StrategyInfo] = StrategyInfo(name="staged", summary="s", paper="p", status="unpublished")
    mergeable: bool = True

    def init_layer(self, ffn: Any, layer: Any, calibration: Any, rng: Any) -> LayerInit:
        form = MergedShift if self.mergeable else Shifted
        return LayerInit([form(ffn) for _ in range(layer.num_experts)], random_router(ffn, layer, rng))


class Replacing(Staged):
    """The same, whose second stage replaces its experts by hand."""

    def stages(self, steps: int) -> tuple[int, ...]:
        return (steps // 2,)

    def next_stage(self, layers: Any) -> None:
        for layer in layers.values():
            for number, expert in enumerate(layer.experts):
                layer.experts[number] = expert.base


@pytest.mark.parametrize("strategy", [Staged(), Replacing(mergeable=False)])
def test_what_counts_is_the_form_in_which_training_ends(strategy: Staged) -> None:
    clip = tiny_clip()
    model = upcycled(strategy, clip, 0).model
    kept = {name: type(part) for name, part in model.named_modules()}
    require_describable(strategy, model, clip.model, 100, tiny_batches(clip))
    assert {name: type(part) for name, part in model.named_modules()} == kept  # that was a copy


def test_a_strategy_that_its_file_cannot_describe_is_told_in_one_line() -> None:
    clip, strategy = tiny_clip(), Staged(mergeable=False)
    model = upcycled(strategy, clip, 0).model
    with pytest.raises(PluginError, match=r"^staged: \S+ expert 0 is \S+Shifted\(\), the file's is Seq.*a merged\(\)"):
        require_describable(strategy, model, clip.model, 100, tiny_batches(clip))
