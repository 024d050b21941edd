"""Weight surgery: parameter counts, what is copied, and function preservation at step 0."""

import copy
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from tests.helpers import random_ffn
from tests.moe_helpers import MOE, SIX_LAYERS, captions, create_dense, inputs_for, sparse_inits, upcycled
from upcycle_bench.model.config import model_config
from upcycle_bench.model.ffn import FFN, LayerInit
from upcycle_bench.model.moe import moe_layers, parameter_counts
from upcycle_bench.model.surgery import all_finite, find_layers, put_experts
from upcycle_bench.util.errors import PluginError, UserError


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return open_clip.CLIP(**model_config(name), nonscalar_logit_scale=True)


# ---- Parameter counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dense_total", "moe_total"),
    [("ViT-B-32", 151_277_313, 437_868_801), ("ViT-B-16", 149_620_737, 436_212_225)],
)
def test_parameter_counts_of_the_published_models(name: str, dense_total: int, moe_total: int) -> None:
    dense = on_meta(name)
    assert parameter_counts(dense) == (dense_total, dense_total)
    ffns = [FFN.of(dense.get_submodule(layer.mlp_path)) for layer in find_layers(dense, MOE)]
    assert len(ffns) == 12
    sizes = {sum(t.numel() for t in (f.w1_HD, f.b1_H, f.w2_DH, f.b2_D)) for f in ffns}
    assert sizes == {4_722_432, 2_099_712}

    model = upcycled(dense)
    routers = 6 * (8 * 768 + 8 * 512)
    assert routers == 61_440 == sum(layer.router_weight.numel() for layer in moe_layers(model).values())
    total, active = parameter_counts(model)
    # 7 * 6 * (4,722,432 + 2,099,712) = 286,530,048 more, and with top-2 one expert more per layer is active.
    assert total == moe_total == dense_total + 286_530_048 + routers
    assert active == dense_total + 40_932_864 + routers
    # Nothing was drawn on the CPU on the way: routers stand where the model stands.
    assert all(parameter.is_meta for parameter in model.parameters())


def test_layers_are_every_second_block_of_both_towers() -> None:
    layers = find_layers(create_dense(), MOE)
    assert [layer.name for layer in layers] == [f"{tower}.{i}" for tower in ("vision", "text") for i in (1, 3, 5)]
    unequal = find_layers(on_meta("smoke-vit"), MOE)
    assert {(layer.tower, layer.depth) for layer in unequal} == {("vision", 4), ("text", 2)}
    moe = MOE.model_copy(update={"every": 3, "offset": 0})
    assert [layer.block for layer in find_layers(create_dense(), moe)] == [0, 3, 0, 3]


# ---- S6, S7 -----------------------------------------------------------------------------------------------------


def test_s6_everything_but_the_ffns_is_a_bit_equal_copy() -> None:
    """S6: all non-MLP tensors bit-equal; the key mapping is a bijection except experts and router."""
    dense = create_dense()
    model = upcycled(dense)
    source, target = dense.state_dict(), model.state_dict()
    replaced = tuple(f"{layer.mlp_path}." for layer in find_layers(dense, MOE))
    kept = {key for key in source if not key.startswith(replaced)}
    assert kept == {key for key in target if not key.startswith(replaced)}
    assert len(kept) == len(source) - 6 * 4
    for key in kept:
        assert torch.equal(source[key], target[key]), key

    expected = set()
    for layer in find_layers(dense, MOE):
        expected.add(f"{layer.mlp_path}.moe.deepspeed_moe.gate.wg.weight")  # a name in files of weights
        for number in range(8):
            for name in ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"):
                key = f"{layer.mlp_path}.moe.deepspeed_moe.experts.deepspeed_experts.{number}.{name}"
                expected.add(key)
                assert torch.equal(target[key], source[f"{layer.mlp_path}.{name}"]), key  # sparse: a copy
    assert {key for key in target if key.startswith(replaced)} == expected
    assert torch.equal(model.attn_mask, dense.attn_mask)  # a buffer that no state dict holds


@pytest.mark.parametrize("training", [True, False])
def test_the_result_is_in_the_dense_models_mode(training: bool) -> None:
    """Otherwise the copy of a model in eval mode would drop tokens."""
    model = upcycled(create_dense().train(training))
    assert {module.training for module in model.modules()} == {training}


def test_s7_every_tensor_has_storage_of_its_own() -> None:
    """S7: modifying one expert leaves the others, and the dense model, untouched."""
    dense = create_dense()
    model = upcycled(dense)
    storages = [p.untyped_storage().data_ptr() for p in [*model.parameters(), *dense.parameters()]]
    assert len(storages) == len(set(storages))

    layer = moe_layers(model)["text.3"]
    before = [[p.clone() for p in expert.parameters()] for expert in layer.experts]
    with torch.no_grad():
        for parameter in layer.experts[2].parameters():
            parameter.add_(1)
    for number, expert in enumerate(layer.experts):
        unchanged = [torch.equal(p, q) for p, q in zip(expert.parameters(), before[number], strict=True)]
        assert unchanged == [number != 2] * 4


def test_the_dense_model_is_not_touched() -> None:
    dense = create_dense()
    images, texts = inputs_for(dense)
    before = copy.deepcopy(dense.state_dict())
    with torch.no_grad():
        features = dense.encode_image(images), dense.encode_text(texts)
    modules = {name: (id(module), module.training) for name, module in dense.named_modules()}

    model = upcycled(dense)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.25)
        model.train()
        model.encode_text(texts)

    assert modules == {name: (id(module), module.training) for name, module in dense.named_modules()}
    for module in dense.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._backward_hooks and not module._backward_pre_hooks
    after = dense.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with torch.no_grad():
        assert torch.equal(dense.encode_image(images), features[0])
        assert torch.equal(dense.encode_text(texts), features[1])


def test_a_copy_of_the_result_keeps_its_own_padding() -> None:
    """deepcopy copies the embedding's hook: the copy's must set the copy's padding, and not the original's."""
    model = upcycled(create_dense()).eval()
    twin = copy.deepcopy(model)
    texts = captions([3, 5, 8])
    with torch.no_grad():
        expected = model.encode_text(texts)
        keep_T = moe_layers(model)["text.1"].padding.keep_T
        assert torch.equal(twin.encode_text(texts), expected)
        twin.encode_text(captions([1, 1]))
    paddings = {id(layer.padding) for layer in moe_layers(twin).values() if layer.place.tower == "text"}
    assert len(paddings) == 1 and id(moe_layers(model)["text.1"].padding) not in paddings
    assert moe_layers(model)["text.1"].padding.keep_T is keep_T


# ---- S1 through the whole model ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("config", ["smoke-vit", SIX_LAYERS], ids=["smoke-vit", "six-layers"])
@pytest.mark.parametrize("top_k", [2, 3])
def test_s1_step_0_is_the_dense_model(config: Any, dtype: torch.dtype, tolerance: float, top_k: int) -> None:
    """S1: renormalised gates and unlimited capacity: image and text features are the dense model's."""
    dense = create_dense(config).to(dtype)
    model = upcycled(dense, top_k=top_k).eval()
    images, texts = inputs_for(dense, dtype=dtype)
    with torch.no_grad():
        for encode, data in (("encode_image", images), ("encode_text", texts)):
            ours, theirs = getattr(model, encode)(data), getattr(dense, encode)(data)
            assert ours.dtype == dtype
            assert (ours - theirs).norm() <= tolerance * theirs.norm(), encode
        assert all(layer.router_weight.dtype == dtype for layer in moe_layers(model).values())


@pytest.mark.parametrize("changes", [{"text_pool_type": "eos", "text_eos_id": 7}, {"text_pool_type": "last"}])
def test_s1_other_text_poolings(changes: dict[str, Any]) -> None:
    dense = create_dense(**changes).double()
    model = upcycled(dense).eval()
    texts = captions([0, 4, 8], end=7) + torch.tensor([0] * 8 + [60, 60])  # noise where the caption is over
    texts[:, :8] = torch.where(texts[:, :8] == 0, 50, texts[:, :8])
    with torch.no_grad():
        ours, theirs = model.encode_text(texts), dense.encode_text(texts)
    assert (ours - theirs).norm() <= 1e-10 * theirs.norm()
    assert (moe_layers(model)["text.1"].padding is None) == (changes["text_pool_type"] == "last")


def test_s1_without_a_causal_mask_padding_is_kept() -> None:
    """Where every position is attended to, what stands behind end-of-text is no padding (open_clip's CLIPA)."""
    dense = create_dense(text_no_causal_mask=True).double()
    model = upcycled(dense).eval()
    assert moe_layers(model)["text.1"].padding is None
    texts = captions([2, 4, 7])
    with torch.no_grad():
        ours, theirs = model.encode_text(texts), dense.encode_text(texts)
    assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


# ---- errors -----------------------------------------------------------------------------------------------------


def test_wrong_number_of_experts() -> None:
    dense = create_dense()
    inits = sparse_inits(dense, MOE)
    inits["text.3"] = LayerInit(inits["text.3"].experts[:7], inits["text.3"].router_ED)
    with pytest.raises(ValueError, match=r"text\.3: 7 experts were made, the protocol wants 8"):
        put_experts(dense, inits, MOE)


def test_wrong_router_shape() -> None:
    dense = create_dense()
    inits = sparse_inits(dense, MOE)
    inits["vision.5"] = LayerInit(inits["vision.5"].experts, inits["vision.5"].router_ED.T)
    with pytest.raises(ValueError, match=r"vision\.5: the router's shape is \(32, 8\), it must be \(8, 32\)"):
        put_experts(dense, inits, MOE)


@pytest.mark.parametrize("name", ["c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"])
def test_s7_an_expert_that_shares_storage_with_the_dense_model(name: str) -> None:
    dense = create_dense()
    inits = sparse_inits(dense, MOE)
    owner, _, leaf = name.partition(".")
    shared = dense.get_submodule("transformer.resblocks.1.mlp").get_parameter(name)
    setattr(inits["text.1"].experts[4].get_submodule(owner), leaf, nn.Parameter(shared.detach()))
    with pytest.raises(ValueError, match=r"text\.1: expert 4 shares storage"):
        put_experts(dense, inits, MOE)


def test_layers_must_be_those_of_the_protocol() -> None:
    dense = create_dense()
    inits = sparse_inits(dense, MOE)
    with pytest.raises(ValueError, match="were initialised, but the protocol replaces"):
        put_experts(dense, dict(list(inits.items())[1:]), MOE)


def test_an_ffn_with_a_norm_inside_is_a_user_error() -> None:
    """open_clip's `scale_fc` puts a LayerNorm between the two linears, which an expert would lose."""
    config = copy.deepcopy(SIX_LAYERS)
    config["vision_cfg"]["scale_fc"] = True
    with pytest.raises(UserError, match=r"visual\.transformer\.resblocks\.1\.mlp consists of c_fc, gelu, ln, c_proj"):
        find_layers(create_dense(config), MOE)
    del config["vision_cfg"]["scale_fc"]
    config["vision_cfg"]["qk_norm"] = True  # the same block type, but its FFN is the plain one
    dense = create_dense(config).double()
    images, _ = inputs_for(dense, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = upcycled(dense).eval().encode_image(images), dense.encode_image(images)
    assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


def test_upcycling_twice_is_a_user_error() -> None:
    with pytest.raises(UserError, match="consists of moe"):
        find_layers(upcycled(create_dense()), MOE)


def test_offset_behind_the_last_block_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"moe\.offset=6 leaves no block to replace; lower it"):
        find_layers(create_dense(), MOE.model_copy(update={"offset": 6}))


def test_an_expert_stands_where_the_ffn_does_wherever_its_tensors_were_made() -> None:
    ffn = random_ffn(8, 4, dtype=torch.float32)
    there = FFN(*(tensor.to("meta") for tensor in (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D)), ffn.act)
    expert = there.expert(w1_HD=ffn.w1_HD.double(), b2_D=ffn.b2_D)
    assert {(p.device.type, p.dtype) for p in expert.parameters()} == {("meta", torch.float32)}


# ---- values that are not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        (torch.full((1000,), 3e38), True),  # whose sum is infinite
        (torch.full((100_000,), 100.0, dtype=torch.float16), True),
        (torch.tensor([1.0, torch.inf, -torch.inf]), False),
        (torch.tensor([1.0, torch.nan]), False),
        (torch.tensor([-torch.inf], dtype=torch.bfloat16), False),
        (torch.arange(3), True),
        (torch.tensor([]), True),
    ],
)
def test_finite(values: torch.Tensor, finite: bool) -> None:
    assert all_finite(values) is finite


def test_an_expert_that_is_not_finite_is_named() -> None:
    dense = create_dense()
    inits = sparse_inits(dense, MOE)
    bad: Any = inits["text.3"].experts[5]
    with torch.no_grad():
        bad.c_proj.bias[0] = torch.nan
    with pytest.raises(PluginError, match=r"text\.3: expert 5 holds values that are not finite"):
        put_experts(dense, inits, MOE)
