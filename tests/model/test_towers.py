"""Models of other classes than CLIP: what open_clip builds with text towers of their own, and with ViTs of timm's."""

from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from tests.moe_helpers import MOE
from upcycle_bench import api
from upcycle_bench.model import padding, towers
from upcycle_bench.model.config import model_config
from upcycle_bench.model.ffn import not_plain
from upcycle_bench.model.surgery import find_layers
from upcycle_bench.util.errors import UserError

TIMM = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224, "timm_proj": "linear", "timm_pool": "token"}
SIGLIP = {"timm_model_name": "vit_base_patch16_siglip_224", "image_size": 224, "timm_proj": "none", "timm_pool": "map"}
OWN = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
TEXT = {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
SIGLIP_TEXT = TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
COCA_VISION = OWN | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
COCA_TEXT = TEXT | {"embed_cls": True, "output_tokens": True}

# What distinguishes each family, in a small size: class, towers, pooling.
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SigLIP": (open_clip.CustomTextCLIP, {"vision_cfg": SIGLIP, "text_cfg": SIGLIP_TEXT, "init_logit_bias": -10}),
    "SigLIP 2": (
        open_clip.CustomTextCLIP,
        {"vision_cfg": SIGLIP, "text_cfg": SIGLIP_TEXT | {"act_kwargs": {"approximate": "tanh"}}},
    ),
    "a causal text tower of its own": (open_clip.CustomTextCLIP, {"vision_cfg": OWN, "text_cfg": TEXT}),
    "a ViT of timm's in a CLIP": (open_clip.CLIP, {"vision_cfg": TIMM, "text_cfg": TEXT}),
    "CLIPA": (
        open_clip.CLIP,
        {
            "vision_cfg": OWN | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
            "text_cfg": TEXT | {"pool_type": "last", "no_causal_mask": True},
        },
    ),
    "CoCa": (
        open_clip.CoCa,
        {"vision_cfg": COCA_VISION, "text_cfg": COCA_TEXT, "multimodal_cfg": TEXT | {"attn_pooler_heads": 2}},
    ),
}


def family(name: str) -> Any:
    kind, config = FAMILIES[name]
    torch.manual_seed(1)
    model = kind(embed_dim=768 if "SigLIP" in name else 32, **config).eval()
    if hasattr(model, "text_decoder"):  # open_clip leaves it as the memory was
        torch.nn.init.normal_(model.text_decoder.text_projection)
    if hasattr(model.visual, "trunk"):  # timm knows no smaller depth
        model.visual.trunk.blocks = model.visual.trunk.blocks[:2]
    return model


def inputs(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    texts = torch.randint(1, 90, (3, towers.context_length(model)), generator=generator)
    texts[:, 7], texts[:, 8:] = 99, 0  # end of text, padding
    return torch.randn(3, 3, *towers.image_size(model), generator=generator, dtype=torch.float64), texts


@pytest.mark.parametrize("name", FAMILIES)
def test_upcycling_keeps_the_function(name: str) -> None:
    dense = family(name).double()
    model = api.upcycle(dense, "sparse-upcycling", experts=2)
    assert [layer.name for layer in find_layers(dense, MOE)] == ["vision.1", "text.1"]
    images, texts = inputs(dense)
    with torch.no_grad():
        for encode, batch in (("encode_image", images), ("encode_text", texts)):
            ours, theirs = getattr(model, encode)(batch), getattr(dense, encode)(batch)
            assert (ours - theirs).norm() <= 1e-10 * theirs.norm(), encode


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_is_left_out_only_where_it_has_no_meaning(name: str) -> None:
    model = family(name).double()
    _, texts = inputs(model)
    causal = name in ("a causal text tower of its own", "a ViT of timm's in a CLIP")
    assert padding.packs(model) is causal
    with torch.no_grad():
        packed, plain = padding.text_encoder(model)(texts), model.encode_text(texts)
    assert (packed - plain).norm() <= 1e-10 * plain.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_an_image_are_those_that_the_blocks_see(name: str) -> None:
    model, seen = family(name), []
    (layer,) = [each for each in find_layers(model, MOE) if each.name == "vision.1"]
    model.get_submodule(layer.mlp_path).register_forward_hook(lambda _, args, out: seen.append(args[0].shape[-2]))
    model.encode_image(inputs(model)[0].float())
    assert seen == [sum(towers.image_tokens(model))]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RN50", "CLIP has no visual.transformer.resblocks or visual.trunk.blocks"),
        ("EVA02-B-16", r"visual\.trunk\.blocks\.1\.mlp consists of fc1_g, fc1_x, act, norm, fc2"),  # SwiGLU
        ("convnext_base", "CLIP has no visual.transformer.resblocks or visual.trunk.blocks"),
    ],
)
def test_a_tower_without_plain_ffns_is_a_user_error(name: str, message: str) -> None:
    config = model_config(name)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        model = kind(**config)
    with pytest.raises(UserError, match=message):
        find_layers(model, MOE)


def test_an_ffn_that_an_expert_could_not_be_is_named() -> None:
    from timm.layers import GluMlp, Mlp

    assert not_plain(Mlp(4, 8)) is None
    assert not_plain(Mlp(4, 8, drop=0.1)) == "consists of fc1, act, drop1, fc2, drop2"
    assert not_plain(Mlp(4, 8, bias=False)) == "has no bias in fc1 and fc2"
    assert not_plain(Mlp(4, 8, norm_layer=nn.LayerNorm)) == "consists of fc1, act, norm, fc2"
    assert not_plain(GluMlp(4, 8)) == "is a GluMlp"
