"""What a training or a converter leaves beside the weights, and that it is believed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.checkpoints import MODEL, random_state
from tests.model.test_config import write
from upcycle_bench.model.pretrained import find_pretrained
from upcycle_bench.util.errors import UserError


def epoch(folder: Path, **arguments: Any) -> str:
    """An epoch of open_clip's trainer with the params.txt that it writes; the path of the epoch."""
    path = folder / "logs" / "run" / "checkpoints" / "epoch_1.pt"
    path.parent.mkdir(parents=True)
    torch.save({"epoch": 1, "state_dict": random_state()}, path)
    usual = {"image_mean": None, "image_std": None, "force_image_size": None, "force_quick_gelu": False}
    given = {"accum_freq": 1, "model": MODEL, **usual, **arguments}
    (folder / "logs" / "run" / "params.txt").write_text("".join(f"{key}: {given[key]}\n" for key in sorted(given)))
    return str(path)


def test_the_trainers_own_notes(tmp_path: Path) -> None:
    path = epoch(tmp_path, image_mean=[0.5, 0.5, 0.5], image_std=[0.2, 0.2, 0.2], image_resize_mode="longest")
    assert find_pretrained(MODEL, path).preprocess == {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2),
        "resize_mode": "longest",
    }


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        # mlfoundations/open_clip 771, 915: trained with QuickGELU, scored without
        ({"force_quick_gelu": True}, "trained with another activation than that of smoke-vit, as .*params.txt says"),
        ({"force_image_size": [16]}, "another model than smoke-vit: vision_cfg.image_size is 16, not 8"),
        ({"force_image_size": [16, 8]}, r"vision_cfg.image_size is \[16, 8\], not 8"),
        ({"force_context_length": 20}, "text_cfg.context_length is 20, not 12"),
        ({"model": "ViT-B-32"}, "another model than smoke-vit"),
    ],
)
def test_the_trainers_notes_against_the_name(tmp_path: Path, arguments: dict[str, Any], line: str) -> None:
    path = epoch(tmp_path, **arguments)
    with pytest.raises(UserError, match=line):
        find_pretrained(MODEL, path)


@pytest.mark.parametrize("arguments", [{}, {"model": "a-model-of-theirs"}])
def test_notes_that_say_nothing_new(tmp_path: Path, arguments: dict[str, Any]) -> None:
    assert find_pretrained(MODEL, epoch(tmp_path, **arguments)).preprocess == {}


def test_transformers_activation_stands_beside_its_weights(tmp_path: Path) -> None:
    """huggingface/transformers 26584: MetaCLIP went out with the wrong activation."""
    from transformers import CLIPConfig

    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision |= {"image_size": 8, "patch_size": 2, "hidden_act": "quick_gelu"}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"max_position_embeddings": 12, "hidden_act": "quick_gelu"}
    both = CLIPConfig(vision_config=vision, text_config=text, projection_dim=32).to_dict()
    torch.save(random_state(), tmp_path / "pytorch_model.bin")
    write(tmp_path / "config.json", both)
    with pytest.raises(UserError, match=r"another activation than that of smoke-vit, as .*config.json says"):
        find_pretrained(MODEL, str(tmp_path / "pytorch_model.bin"))
    both["vision_config"]["hidden_act"] = both["text_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(both))
    assert find_pretrained(MODEL, str(tmp_path / "pytorch_model.bin")).name == MODEL
