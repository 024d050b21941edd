"""transformers' `CLIPModel` is the same model under open_clip's names."""

from pathlib import Path

import pytest
import torch

from tests.model.checkpoints import State, prefixed, random_state, refusal, same


@pytest.fixture
def state() -> State:
    return random_state()


def as_transformers(state: State) -> State:
    """The same weights under the names of transformers' CLIPModel."""
    found: State = {
        "logit_scale": state["logit_scale"][0],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.embeddings.position_ids": torch.arange(12)[None],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    norms = {
        "text_model.final_layer_norm": "ln_final",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
    }
    for theirs, ours in norms.items():
        for part in ("weight", "bias"):
            found[f"{theirs}.{part}"] = state[f"{ours}.{part}"]
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    parts["self_attn.out_proj"] = "attn.out_proj"
    for tower, place, layers in (("text_model", "", 2), ("vision_model", "visual.", 4)):
        for number in range(layers):
            theirs, ours = f"{tower}.encoder.layers.{number}", f"{place}transformer.resblocks.{number}"
            for part in ("weight", "bias"):
                for name, other in parts.items():
                    found[f"{theirs}.{name}.{part}"] = state[f"{ours}.{other}.{part}"]
                for letter, rows in zip("qkv", state[f"{ours}.attn.in_proj_{part}"].chunk(3), strict=True):
                    found[f"{theirs}.self_attn.{letter}_proj.{part}"] = rows
    return {key: value.contiguous() for key, value in found.items()}


@pytest.mark.parametrize("prefix", ["", "clip."])
def test_transformers_weights_get_open_clips_names(tmp_path: Path, state: State, prefix: str) -> None:
    torch.save(prefixed(as_transformers(state), prefix), tmp_path / "pytorch_model.bin")
    assert same(tmp_path / "pytorch_model.bin", state)


def test_transformers_weights_that_are_no_clip_are_one_line(tmp_path: Path, state: State) -> None:
    theirs = as_transformers(state) | {"vision_model.head.probe": torch.ones(1)}  # SigLIP's
    torch.save(theirs, tmp_path / "siglip.bin")
    assert "1 unexpected, first vision_model.head.probe" in refusal(tmp_path / "siglip.bin")
