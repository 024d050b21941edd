"""The wide dense control: function kept, symmetry broken, statistics of the new neurons, its file and its errors.

Shape suffixes: M new neurons.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import contrastive_loss, features, tiny_batches, tiny_clip, tiny_moe, upcycled
from upcycle_bench.model import rebuild, weights
from upcycle_bench.model.ffn import FFN, Layer
from upcycle_bench.model.measure import diagnose
from upcycle_bench.model.surgery import find_layers, hidden_widths
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import MoE
from upcycle_bench.strategy import Strategy, StrategyInfo
from upcycle_bench.upcycling.initialise import make_dense
from upcycle_bench.util.errors import PluginError, UserError
from upcycle_bench.util.rng import Stream

DenseWide = load_registry().strategies["dense-wide"].target
SIGMAS = 5


def pairs(dense: Any, wide: Any) -> list[tuple[FFN, FFN]]:
    """Both FFNs of every widened block."""
    return [
        (FFN.of(dense.get_submodule(layer.mlp_path)), FFN.of(wide.get_submodule(layer.mlp_path)))
        for layer in find_layers(dense, tiny_moe())
    ]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_function_is_kept(top_k: int) -> None:
    clip = tiny_clip(torch.float64)
    wide = upcycled(DenseWide(), clip, 0, tiny_moe(top_k=top_k)).model
    assert {old.hidden * top_k == new.hidden for old, new in pairs(clip.model, wide)} == {True}
    batch = tiny_batches(clip, seed=5)[0]
    assert_close(features(wide, *batch), features(clip.model, *batch), rtol=1e-10, atol=1e-10)
    if top_k == 1:
        assert all(map(torch.equal, wide.state_dict().values(), clip.model.state_dict().values()))


def test_dense_neurons_come_first_and_nothing_else_changes() -> None:
    clip = tiny_clip()
    wide = upcycled(DenseWide(), clip, 0).model
    for old, new in pairs(clip.model, wide):
        assert torch.equal(new.w1_HD[: old.hidden], old.w1_HD)
        assert torch.equal(new.b1_H[: old.hidden], old.b1_H)
        assert torch.equal(new.w2_DH[:, : old.hidden], old.w2_DH)
        assert not new.w2_DH[:, old.hidden :].any()
        assert torch.equal(new.b2_D, old.b2_D)
    paths = tuple(layer.mlp_path for layer in find_layers(clip.model, tiny_moe()))
    dense, ours = clip.model.state_dict(), wide.state_dict()
    assert list(ours) == list(dense)
    assert all(torch.equal(ours[key], dense[key]) for key in dense if not key.startswith(paths))


def test_new_neurons_have_the_moments_of_the_dense_ones() -> None:
    clip = tiny_clip()
    for layer in find_layers(clip.model, tiny_moe()):  # means far from 0, and a scale of their own
        mlp = clip.model.get_submodule(layer.mlp_path)
        mlp.c_fc.weight.data.mul_(0.3).add_(0.2)
        mlp.c_fc.bias.data.mul_(3).sub_(1)
    wide = upcycled(DenseWide(), clip, 0).model
    drawn = []
    for old, new in pairs(clip.model, wide):
        for dense, more in ((old.w1_HD, new.w1_HD[old.hidden :]), (old.b1_H, new.b1_H[old.hidden :])):
            z = (more.double() - dense.double().mean()) / dense.double().std()
            count = z.numel()
            assert count == dense.numel()
            assert abs(float(z.mean())) < SIGMAS / math.sqrt(count)
            assert abs(float(z.std()) - 1) < SIGMAS / math.sqrt(2 * count)
        drawn.append(new.w1_HD[old.hidden :])
    assert not torch.equal(drawn[0], drawn[1])  # blocks have streams of their own


def test_symmetry_is_broken_at_step_0() -> None:
    """New columns of W2 are zero, but they have gradients, and each its own: new neurons do not move as one."""
    clip = tiny_clip(torch.float64)
    wide = upcycled(DenseWide(), clip, 0).model.train()
    images, texts = tiny_batches(clip, seed=3)[0]
    contrastive_loss(*wide(images, texts)[:3]).backward()
    for layer in find_layers(wide, tiny_moe()):
        mlp = wide.get_submodule(layer.mlp_path)
        half = mlp.c_fc.out_features // 2
        gradient_MD = mlp.c_proj.weight.grad[:, half:].T
        assert gradient_MD.any(1).all()
        unit_MD = torch.nn.functional.normalize(gradient_MD, dim=1)
        cosine_MM = unit_MD @ unit_MD.T - torch.eye(half, dtype=torch.float64)
        assert float(cosine_MM.max()) < 1 - 1e-6
        assert not mlp.c_fc.weight.grad[half:].any()  # behind columns of zeros
        assert mlp.c_fc.weight.grad[:half].any(1).all()


def test_parameters_by_formula() -> None:
    clip = tiny_clip()
    wide = upcycled(DenseWide(), clip, 0, tiny_moe(top_k=3)).model
    more = sum(2 * old.hidden * (2 * old.width + 1) for old, _ in pairs(clip.model, wide))  # (k - 1) H (2 D + 1)
    assert sum(p.numel() for p in wide.parameters()) - sum(p.numel() for p in clip.model.parameters()) == more


def test_file_and_receipt(tmp_path: Path) -> None:
    clip = tiny_clip()
    made = upcycled(DenseWide(), clip, 0)
    assert rebuild.unlike_its_file(made.model, clip.model) is None
    digest = weights.save(made, tiny_moe(), tmp_path)
    loaded = weights.load(tmp_path / f"{digest}.safetensors").model
    widths, usual = hidden_widths(loaded), hidden_widths(clip.model)
    paths = {layer.mlp_path for layer in find_layers(clip.model, tiny_moe())}
    assert widths == {path: width * (2 if path in paths else 1) for path, width in usual.items()}
    receipt = diagnose(made.model, clip.model, tiny_batches(clip)[:1])
    assert receipt["layers"] == {}
    assert receipt["feature_cosine_with_dense"] == pytest.approx({"vision": 1, "text": 1}, abs=1e-5)


def test_a_file_whose_width_does_not_fit_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    digest = weights.save(upcycled(DenseWide(), tiny_clip(), 0), tiny_moe(), tmp_path)
    path = tmp_path / f"{digest}.safetensors"
    with safe_open(path, framework="pt") as file:
        text = file.metadata()[weights.FORMAT]
    for old, new in (("512", "511"), (".mlp", ".mpl")):
        assert old in text
        save_file(load_file(path), tmp_path / "bad.safetensors", metadata={weights.FORMAT: text.replace(old, new)})
        with pytest.raises(UserError, match="does not fit its own metadata"):
            weights.load(tmp_path / "bad.safetensors")


class Odd(Strategy):
    """A control that does what its options say."""

    info: ClassVar[StrategyInfo] = StrategyInfo(name="odd", summary="odd", paper="control", status="control")
    replaces_ffn: ClassVar[bool] = False

    def __init__(self, act: str) -> None:
        self.act = act

    def ffn_hidden(self, hidden: int, moe: MoE) -> int:
        return hidden + 1

    def init_dense(self, model: Any, layers: Sequence[Layer], rng: Stream) -> None:
        for layer in layers:
            mlp = model.get_submodule(layer.mlp_path)
            FFN.of(mlp).resized(FFN.of(mlp).hidden + (0 if self.act == "wrong width" else 1)).put_into(mlp)
        if self.act == "another activation":
            model.get_submodule(layers[0].mlp_path).gelu = torch.nn.ReLU()
        if self.act == "wider elsewhere":
            block = model.transformer.resblocks[0]
            block.ln_2 = torch.nn.LayerNorm(block.ln_2.normalized_shape, eps=0.1)
        if self.act == "another tensor":
            model.extra = torch.nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("act", "message"), [("wrong width", "hidden width is 256, but ffn_hidden says 257"), ("another tensor", "adds or")]
)
def test_what_init_dense_may_not_do(act: str, message: str) -> None:
    clip = tiny_clip()
    before = {key: value.clone() for key, value in clip.model.state_dict().items()}
    with pytest.raises(PluginError, match=message):
        make_dense(Odd(act), clip.model, tiny_moe(), 0)
    assert all(torch.equal(value, before[key]) for key, value in clip.model.state_dict().items())


@pytest.mark.parametrize(
    ("act", "can"), [("nothing else", True), ("another activation", False), ("wider elsewhere", False)]
)
def test_only_other_widths_can_be_rebuilt(act: str, can: bool) -> None:
    clip = tiny_clip()
    model = make_dense(Odd(act), clip.model, tiny_moe(), 0)
    assert (rebuild.unlike_its_file(model, clip.model) is None) is can
