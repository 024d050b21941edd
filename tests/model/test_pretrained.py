"""Each way to name weights; what is said of them beside their file, and what must not contradict it."""

import hashlib
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from tests.model.checkpoints import MODEL, random_state
from tests.model.test_config import small, stand_in, write
from upcycle_bench import api
from upcycle_bench.model import config, hub
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.config import canonical, model_config
from upcycle_bench.model.pretrained import Choices, find_pretrained
from upcycle_bench.model.upcyclable import require_upcyclable
from upcycle_bench.util.errors import UserError

SQUASH = {"resize_mode": "squash"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as open_clip's push_to_hf_hub writes it."""
    folder = tmp_path / "tiny"
    write(folder / "open_clip_config.json", {"model_cfg": small(), "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}})
    torch.save(random_state(), folder / "open_clip_pytorch_model.bin")
    return folder


def line(*arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        find_pretrained(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model", ["{}", "local-dir:{}", MODEL])
@pytest.mark.parametrize("source", [None, "{}", "local-dir:{}", "{}/open_clip_pytorch_model.bin"])
def test_a_folder_is_one_model_however_it_is_named(folder: Path, model: str, source: str | None) -> None:
    if source is None and model == MODEL:
        assert f"{MODEL} names a model without weights: give them, a file or a tag" in line(model)
        return
    found = find_pretrained(model.format(folder), source and source.format(folder))
    assert found.file == folder / "open_clip_pytorch_model.bin"
    assert (found.name, found.preprocess) == (MODEL, {"mean": (0.5, 0.5, 0.5)})
    clip = found.create()
    state = clip.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in random_state().items())
    assert clip.mean == (0.5, 0.5, 0.5)


def test_a_repository_fetches_first_what_it_says_and_then_its_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = stand_in(monkeypatch, folder)
    assert find_pretrained("hf-hub:org/tiny").file == folder / "open_clip_pytorch_model.bin"
    assert find_pretrained(MODEL, "hf-hub:org/tiny").preprocess == {"mean": (0.5, 0.5, 0.5)}
    asked.clear()
    assert "describes another model than ViT-B-32: " in line("ViT-B-32", "hf-hub:org/tiny")
    assert not any("open_clip_pytorch_model" in file for _, file, _ in asked)  # refused before weights were fetched


@pytest.mark.parametrize(
    ("names", "file"),
    [
        (["model.safetensors", "open_clip_model.safetensors"], "open_clip_model.safetensors"),
        (["training_args.bin", "pytorch_model.bin"], "pytorch_model.bin"),
        (["epoch_3.pt"], "epoch_3.pt"),
    ],
)
def test_which_file_of_a_folder_is_taken(tmp_path: Path, names: list[str], file: str) -> None:
    write(tmp_path / "open_clip_config.json", {"model_cfg": small()})
    for name in names:
        torch.save(random_state(), tmp_path / name)
    assert find_pretrained(str(tmp_path)).file.name == file


def test_a_folder_of_which_the_file_cannot_be_told(tmp_path: Path) -> None:
    write(tmp_path / "open_clip_config.json", {"model_cfg": small()})
    assert "holds no file of weights; give the file itself" in line(str(tmp_path))
    for epoch in (1, 2):
        torch.save(random_state(), tmp_path / f"epoch_{epoch}.pt")
    assert "holds 2 files of weights, epoch_1.pt the first; give the file itself" in line(str(tmp_path))


@pytest.mark.parametrize(
    ("said", "choices", "expected"),
    [
        ({"model_cfg": small(quick_gelu=True)}, {}, "weights were trained with another activation than that of smoke"),
        (
            {"model_cfg": small(text_cfg__heads=2)},
            {},
            "another model than smoke-vit: text_cfg.heads is 2, not 4",
        ),
        ({"model_cfg": small(vision_cfg__pool_type="avg")}, {}, "vision_cfg.pool_type is avg, not tok; name that one"),
        (
            {"model_cfg": small(), "preprocess_cfg": SQUASH},
            {"resize_mode": "longest"},
            "but longest by --pixels: leave one of them out",
        ),
    ],
)
def test_two_places_that_contradict_each_other_are_one_line(
    tmp_path: Path, said: Any, choices: Any, expected: str
) -> None:
    write(tmp_path / "open_clip_config.json", said)
    torch.save(random_state(), tmp_path / "w.bin")
    assert expected in line(MODEL, str(tmp_path / "w.bin"), Choices(choices))


def test_a_dense_file_of_ours_says_its_pixels_and_its_model(tmp_path: Path) -> None:
    clip = create_clip(MODEL, seed=1, preprocess={"mean": (0.5, 0.5, 0.5), "interpolation": "bilinear"})
    api.save(clip.model, tmp_path / "dense.safetensors", MODEL)
    found = find_pretrained(MODEL, str(tmp_path / "dense.safetensors"))
    assert found.preprocess == {"mean": (0.5, 0.5, 0.5), "interpolation": "bilinear"}
    assert "describes another model than lab-vit: " in line("lab-vit", str(tmp_path / "dense.safetensors"))


def test_the_file_that_a_tag_fetches_is_known_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LAION-400M's ViT-B-32 was trained with QuickGELU: as a file, it once gave other numbers than as a tag."""
    torch.save(random_state(), tmp_path / "copy.pt")
    digest = hashlib.sha256((tmp_path / "copy.pt").read_bytes()).hexdigest()
    address = f"scheme://mlfoundations/releases/tiny-quickgelu-{digest[:8]}.pt"
    tags = {"a_tag": {"url": address, "mean": (0.5, 0.5, 0.5), "quick_gelu": True}, "usual": {"url": ""}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, MODEL, tags)
    said = line(MODEL, str(tmp_path / "copy.pt"))
    assert "another activation" in said and "open_clip's tag a_tag, which fetches this file, says" in said
    tags["a_tag"]["quick_gelu"] = False
    assert find_pretrained(MODEL, str(tmp_path / "copy.pt")).preprocess == {"mean": (0.5, 0.5, 0.5)}
    monkeypatch.setattr(open_clip, "download_pretrained", lambda found: str(tmp_path / "copy.pt"))
    monkeypatch.setattr(hub, "unreachable", lambda url: None)
    by_tag, by_file = find_pretrained(MODEL, "a_tag"), find_pretrained(MODEL, str(tmp_path / "copy.pt"))
    assert (by_tag.identity(), by_tag.preprocess) == (by_file.identity(), by_file.preprocess)
    tags["a_tag"]["url"] = address.replace(digest[:8], "0" * 8)
    assert find_pretrained(MODEL, str(tmp_path / "copy.pt")).preprocess == {}


def test_position_embeddings_are_resized_only_where_it_is_asked_for(tmp_path: Path) -> None:
    state = random_state()
    torch.save(state, tmp_path / "w.pt")
    larger = write(tmp_path / "large" / "large.json", small(vision_cfg__image_size=12, text_cfg__context_length=16))
    found = find_pretrained(str(larger), str(tmp_path / "w.pt"))
    with pytest.raises(
        UserError,
        match=r"first positional_embedding 12x64, not 16x64\. It holds position .*: --interpolate-positions",
    ):
        found.create()
    found = find_pretrained(str(larger), str(tmp_path / "w.pt"), Choices(interpolate=True))
    clip = found.create()
    assert clip.interpolated == {
        "visual.positional_embedding": "17x64 to 37x64",
        "positional_embedding": "12x64 to 16x64",
    }
    ours = clip.model.state_dict()
    assert torch.equal(ours["visual.positional_embedding"][0], state["visual.positional_embedding"][0])
    assert torch.equal(ours["token_embedding.weight"], state["token_embedding.weight"])
    plain = find_pretrained(MODEL, str(tmp_path / "w.pt"), Choices(interpolate=True)).create()
    assert plain.interpolated == {}
    assert torch.equal(plain.model.visual.positional_embedding, state["visual.positional_embedding"])


def test_a_model_of_its_own_configuration_travels_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = small(vision_cfg__layers=2, text_cfg__heads=8)
    path = write(tmp_path / "mine.json", made)
    dense = create_clip(str(path), seed=1)
    model = api.upcycle(dense.model, "sparse-upcycling", experts=2).eval()
    api.save(model, tmp_path / "moe.safetensors", dense.name)
    path.unlink()
    monkeypatch.setattr(config, "_own", {})  # as in another process
    monkeypatch.delitem(open_clip.factory._MODEL_CONFIGS, dense.name)
    loaded = api.load(tmp_path / "moe.safetensors")
    assert loaded.name == dense.name and canonical(model_config(loaded.name), "") == canonical(made, "")
    images, texts = torch.randn(2, 3, 8, 8), dense.tokenize(["a cat", "a dog"])
    with torch.no_grad():
        assert torch.equal(loaded.model.encode_image(images), model.encode_image(images))
        assert torch.equal(loaded.model.encode_text(texts), model.encode_text(texts))


def test_a_logit_bias_goes_in_and_stays(tmp_path: Path) -> None:
    state = random_state() | {"logit_bias": torch.tensor(-9.5)}
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "siglip.pt")
    clip = find_pretrained(MODEL, str(tmp_path / "siglip.pt")).create()
    assert clip.model.logit_bias.tolist() == [-9.5]
    api.save(api.upcycle(clip.model, "sparse-upcycling", experts=2), tmp_path / "moe.safetensors", MODEL)
    assert api.load(tmp_path / "moe.safetensors").model.logit_bias.tolist() == [-9.5]


@pytest.mark.parametrize(
    ("model", "trained", "expected"),
    [
        ("RN50", False, "RN50 has a ResNet, which has no FFNs: choose a model with a ViT"),
        ("roberta-ViT-B-32", False, "has a text tower of Hugging Face's, whose FFNs have many forms"),
        ("convnext_base", False, "CLIP has no visual.transformer.resblocks or visual.trunk.blocks"),
        ("coca_ViT-B-32", True, "has a captioning decoder, which contrastive training leaves out"),
        ("coca_ViT-B-32", False, ""),
        ("ViT-B-16-SigLIP", True, ""),
        ("ViT-H-14-CLIPA", True, ""),
    ],
)
def test_a_model_is_refused_by_its_configuration(
    monkeypatch: pytest.MonkeyPatch, model: str, trained: bool, expected: str
) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("it went to the network"))
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda *_: pytest.fail("it made a tokenizer"))
    if not expected:
        require_upcyclable(model, trained=trained)
        return
    with pytest.raises(UserError) as caught:
        require_upcyclable(model, trained=trained)
    assert expected in str(caught.value)


def test_identities_tell_functions_apart(tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "w.pt")
    choices = [Choices(), Choices({"mean": (0.5, 0.5, 0.5)}), Choices(interpolate=True)]
    found = [find_pretrained(MODEL, str(tmp_path / "w.pt"), each).identity() for each in choices]
    assert len(set(found)) == 3
    assert found[0] == hashlib.sha256((tmp_path / "w.pt").read_bytes()).hexdigest()
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in found)
