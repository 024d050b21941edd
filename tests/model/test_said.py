"""What a training or a converter leaves beside the weights, and that it is believed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from tests.model.checkpoints import MODEL, random_state
from tests.model.test_config import small, write
from upcycle_bench import api
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.pretrained import Choices, find_pretrained
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


def test_the_trainer_takes_the_pixels_of_the_weights_that_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = {"a_tag": {"url": "", "mean": (0.5, 0.5, 0.5), "resize_mode": "squash"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, MODEL, tags)
    path = epoch(tmp_path, pretrained="a_tag", image_std=[0.2, 0.2, 0.2], image_interpolation="random")
    found = find_pretrained(MODEL, path).preprocess
    assert found == {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "resize_mode": "squash"}


@pytest.mark.parametrize("size", ["(8,)", "8", "[8, 8]", "eight"])
def test_a_size_as_python_prints_it(tmp_path: Path, size: str) -> None:
    assert find_pretrained(MODEL, epoch(tmp_path, force_image_size=size)).preprocess == {}


def test_where_all_tags_have_the_same_unusual_pixels_they_are_assumed_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SigLIP's, PE's and MobileCLIP's: a copied file has no other sign of them. A user may say otherwise."""
    torch.save(random_state(), tmp_path / "w.pt")
    tags = {name: {"hf_hub": f"org/{name}/", "mean": (0.5, 0.5, 0.5)} for name in ("one", "two")}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, MODEL, tags)
    assert find_pretrained(MODEL, str(tmp_path / "w.pt")).preprocess == {"mean": (0.5, 0.5, 0.5)}
    assert "its pixels: those of each of open_clip's tags for smoke-vit are used" in capsys.readouterr().err
    choices = Choices({"mean": (0.4, 0.4, 0.4)})
    assert find_pretrained(MODEL, str(tmp_path / "w.pt"), choices).preprocess == {"mean": (0.4, 0.4, 0.4)}
    tags["two"]["mean"] = (0.4, 0.4, 0.4)
    assert find_pretrained(MODEL, str(tmp_path / "w.pt")).preprocess == {}


def test_a_copy_of_what_the_cache_has_is_known_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of Hugging Face calls a large file by its sha256."""
    torch.save(random_state(), tmp_path / "w.pt")
    digest = hashlib.sha256((tmp_path / "w.pt").read_bytes()).hexdigest()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / digest).write_bytes((tmp_path / "w.pt").read_bytes())
    (tmp_path / "snapshot" / "open_clip_model.safetensors").symlink_to(tmp_path / digest)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repository, name: str(tmp_path / "snapshot" / name) if name.endswith("safetensors") else None,
    )
    tags = {"one": {"hf_hub": "org/one/", "resize_mode": "squash"}, "two": {"url": ""}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, MODEL, tags)
    assert find_pretrained(MODEL, str(tmp_path / "w.pt")).preprocess == {"resize_mode": "squash"}


@pytest.mark.parametrize("choices", [Choices(), Choices({"mean": (0.5, 0.5, 0.5)})])
def test_a_file_of_ours_means_usual_pixels_where_it_is_silent(tmp_path: Path, choices: Choices) -> None:
    write(tmp_path / "other" / "open_clip_config.json", {"model_cfg": small(), "preprocess_cfg": {"mean": [0.5] * 3}})
    api.save(create_clip(MODEL, seed=1).model, tmp_path / "dense.safetensors", MODEL)
    model = MODEL if choices.pixels else str(tmp_path / "other")
    with pytest.raises(UserError, match=r"mean is .* by .*: leave one of them out"):
        find_pretrained(model, str(tmp_path / "dense.safetensors"), choices)


def test_the_trainers_notes_on_a_model_of_ones_own(tmp_path: Path) -> None:
    """Its name says nothing here; its pixels and its activation do."""
    notes = {"model": "tiny", "image_mean": [0.4, 0.5, 0.6], "image_resize_mode": "squash"}
    path = epoch(tmp_path, **notes)
    model = write(tmp_path / "tiny.json", small(vision_cfg__layers=4, text_cfg__heads=2))
    assert find_pretrained(str(model), path).preprocess == {"mean": (0.4, 0.5, 0.6), "resize_mode": "squash"}
    params = tmp_path / "logs" / "run" / "params.txt"
    params.write_text(params.read_text().replace("force_quick_gelu: False", "force_quick_gelu: True"))
    with pytest.raises(UserError, match=r"trained with another activation than that of tiny@"):
        find_pretrained(str(model), path)
