"""`save` compares what a name would build with what the model computes, not with shapes alone."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import upcycle_bench
from tests.helpers import MODEL, tiny_batches, tiny_clip
from tests.test_api import outputs, same
from upcycle_bench.assets import MODELS
from upcycle_bench.model.clip import create_clip
from upcycle_bench.util.errors import UserError


def with_heads(model: Any, heads: int) -> Any:
    for block in model.transformer.resblocks:
        block.attn.num_heads, block.attn.head_dim = heads, 64 // heads
    return model


def with_eps(model: Any) -> Any:
    model.ln_final.eps = 1e-3
    return model


def with_pooling(model: Any) -> Any:
    model.text_pool_type = "last"
    return model


def without_mask(model: Any) -> Any:
    model.attn_mask = None
    return model


def with_tanh(model: Any) -> Any:
    model.visual.transformer.resblocks[0].mlp.gelu = torch.nn.GELU("tanh")
    return model


def with_hook(model: Any) -> Any:
    model.visual.ln_post.register_forward_hook(lambda _module, _args, out: 2 * out)
    return model


def with_average(model: Any) -> Any:
    model.visual.pool_type = "avg"
    return model


@pytest.mark.parametrize("experts", [0, 2])
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda model: with_heads(model, 2), "num_heads is 2, the file's is 4"),
        (with_eps, r"ln_final is LayerNorm\(.*eps=0.001"),
        (with_pooling, "text_pool_type is 'last', the file's is 'argmax'"),
        (without_mask, "attn_mask is missing, the file's is of shape"),
        (with_tanh, r"mlp.gelu is GELU\(approximate='tanh'\), the file's is GELU\(approximate='none'\)"),
        (with_hook, "visual.ln_post does not compute what its tensors say"),
        (with_average, "visual.pool_type is 'avg', the file's is 'tok'"),
    ],
)
def test_a_model_of_another_function_is_not_saved_under_a_name(
    tmp_path: Path, change: Callable[[Any], Any], line: str, experts: int
) -> None:
    model = change(create_clip(MODEL, seed=1).model)
    if experts:
        model = upcycle_bench.upcycle(model, "sparse-upcycling", experts=experts)
    with pytest.raises(UserError, match=rf"the model is no {MODEL}: .*{line}.* give the name or the configuration"):
        upcycle_bench.save(model, tmp_path / "moe.safetensors", MODEL)
    assert os.listdir(tmp_path) == []


def test_a_model_without_a_name_takes_its_configuration_along(tmp_path: Path) -> None:
    config = json.loads((MODELS / f"{MODEL}.json").read_text())
    config["text_cfg"]["heads"] = 2
    model = with_heads(create_clip(MODEL, seed=1).model, 2).eval()
    upcycle_bench.save(model, tmp_path / "dense.safetensors", config)
    inputs = tiny_batches(tiny_clip(), pairs=4)[0]
    assert same(outputs(upcycle_bench.load(tmp_path / "dense.safetensors").model, inputs), outputs(model, inputs))


def test_patch_dropout_has_no_part_in_the_function(tmp_path: Path) -> None:
    upcycle_bench.save(create_clip(MODEL, seed=1, patch_dropout=0.5).model, tmp_path / "dense.safetensors", MODEL)
    assert upcycle_bench.load(tmp_path / "dense.safetensors").name == MODEL


def test_saving_changes_nothing_of_the_model(tmp_path: Path) -> None:
    model = create_clip(MODEL, seed=1).model.train()
    model.visual.eval()
    before = [module.training for module in model.modules()]
    upcycle_bench.save(model, tmp_path / "dense.safetensors", MODEL)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("experts", [0, 2])
def test_a_deeper_model_than_the_name_says_is_one_line(tmp_path: Path, experts: int) -> None:
    model = create_clip("lab-vit", seed=1).model
    if experts:
        model = upcycle_bench.upcycle(model, "sparse-upcycling", experts=experts)
    with pytest.raises(UserError, match=rf"the model is no {MODEL}: \S+ is there, the file's is missing"):
        upcycle_bench.save(model, tmp_path / "moe.safetensors", MODEL)
