"""Each way to name a model, and each file that describes one."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.model.checkpoints import MODEL
from upcycle_bench.model import config, hub
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.config import canonical, describe, first_difference, model_config, own_config
from upcycle_bench.util.errors import UserError


def small(**changes: Any) -> dict[str, Any]:
    """The tiny model's configuration, with other values by dotted name."""
    made: dict[str, Any] = json.loads(json.dumps(model_config(MODEL)))
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        inner = made
        for parent in parents:
            inner = inner[parent]
        inner[leaf] = value
    return made


def write(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[tuple[str, str, str | None]]:
    """Hugging Face's client, whose repositories are all that folder; the files that it is asked for."""
    asked = []

    def download(name: str, file: str, revision: str | None) -> str:
        asked.append((name, file, revision))
        if not (folder / file).is_file():
            raise LocalEntryNotFoundError("not there")
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    config._fetched.cache_clear()
    return asked


def test_a_configuration_that_open_clip_has_gets_its_name(tmp_path: Path) -> None:
    for name in (MODEL, "ViT-B-32", "ViT-B-32-quickgelu", "ViT-H-14-CLIPA", "ViT-B-16-SigLIP"):
        found = describe(str(write(tmp_path / f"{name}.json", model_config(name))))
        assert found.name == name or canonical(found.config, "") == canonical(model_config(name), "")
        assert own_config(found.name) is None


def test_another_configuration_is_built_under_a_name_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.json", small(vision_cfg__layers=3, text_cfg__heads=2))
    found = describe(str(path))
    assert found.name.startswith("mine@") and own_config(found.name) == found.config
    clip = create_clip(str(path), seed=1)
    assert clip.name == found.name
    assert len(clip.model.visual.transformer.resblocks) == 3
    assert clip.model.transformer.resblocks[0].attn.num_heads == 2
    assert describe(clip.name).config == found.config  # from now on it is a name
    other = write(tmp_path / "other" / "mine.json", small(vision_cfg__layers=5))
    assert describe(str(other)).name != found.name  # the same label, another model


@pytest.mark.parametrize("text", ["local-dir:{}", "{}"])
def test_a_folder_says_model_and_pixels(tmp_path: Path, text: str) -> None:
    pixels = {"mean": [0.5, 0.5, 0.5], "resize_mode": "squash", "size": 224}
    write(tmp_path / "open_clip_config.json", {"model_cfg": small(), "preprocess_cfg": pixels})
    found = describe(text.format(tmp_path))
    assert (found.name, found.folder) == (MODEL, tmp_path)
    assert found.preprocess == {"mean": (0.5, 0.5, 0.5), "resize_mode": "squash"}
    clip = create_clip(text.format(tmp_path))
    assert clip.mean == (0.5, 0.5, 0.5) and clip.pixels["resize_mode"] == "squash"
    assert clip.preprocess == {"mean": (0.5, 0.5, 0.5), "resize_mode": "squash"}


def test_a_label_with_siglip_in_it_keeps_clips_tokenizer(tmp_path: Path) -> None:
    """open_clip goes by the name there, and would fetch SigLIP's."""
    clip = create_clip(str(write(tmp_path / "my-siglip-run.json", small(vision_cfg__layers=2))))
    assert isinstance(clip.tokenize, open_clip.SimpleTokenizer)
    assert clip.tokenize(["a cat"]).shape == (1, 12)


def test_a_repository_is_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "open_clip_config.json", {"model_cfg": small(vision_cfg__layers=7)})
    asked = stand_in(monkeypatch, tmp_path)
    found = describe("hf-hub:org/tiny@v2")
    assert found.name.startswith("tiny@")
    assert {(name, revision) for name, _, revision in asked} == {("org/tiny", "v2")}


def test_a_part_of_a_repository_in_the_cache_is_not_taken_for_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers fetches config.json alone; without the pixels beside it, they would be the usual ones."""
    write(tmp_path / "config.json", {"model_type": "clip", "vision_config": {}, "text_config": {}})
    stand_in(monkeypatch, tmp_path)
    monkeypatch.setattr(hub, "unreachable", lambda url: "no network")
    with pytest.raises(UserError, match=r"cannot fetch the configuration of hf-hub:org/part \(no network\): run `hf"):
        describe("hf-hub:org/part")
    write(tmp_path / "preprocessor_config.json", PROCESSOR)
    config._fetched.cache_clear()
    assert describe("hf-hub:org/part").preprocess["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ("{", "cannot be read as JSON"),
        ([1], "describes no CLIP; give an `open_clip_config.json`"),
        ({"model_type": "siglip", "vision_config": {}, "text_config": {}}, "describes no CLIP"),
        (
            {"embed_dim": 32, "vision_cfg": {"layer": 3}, "text_cfg": {}},
            "vision_cfg is no configuration that",
        ),
        (small(vision_cfg__width=None), "vision_cfg is no configuration that open_clip knows"),
        ({"model_cfg": {"embed_dim": 8, "vision_cfg": {}}}, "text_cfg is no configuration that open_clip knows"),
        (
            {"model_cfg": small(), "preprocess_cfg": {"mean": [122, 117, 104]}},
            "mean is [122, 117, 104]; it must be three numbers up to 1",
        ),
        ({"model_cfg": small(), "preprocess_cfg": {"resize_mode": "pad"}}, "resize_mode is 'pad'; it must be shortest"),
        ({"model_cfg": small(), "preprocess_cfg": {"fill_color": 255}}, "fill_color is 255; only 0 is known here"),
    ],
)
def test_a_file_that_describes_no_model_is_one_line(tmp_path: Path, values: Any, line: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    with pytest.raises(UserError) as caught:
        describe(str(path))
    assert line in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_open_clip_cannot_build_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "odd.json", small(text_cfg__heads=7))  # 64 is no multiple of it
    with pytest.raises(UserError, match=r"odd@\w+: open_clip cannot build this model \("):
        create_clip(str(path))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("ViT-B32", "unknown open_clip model 'ViT-B32': did you mean"),
        ("tinny.json", "tinny.json: no such file or folder; give one that describes a model"),
        ("local-dir:nowhere", "local-dir:nowhere: no such folder; give one with open_clip_config.json"),
        ("{}", "holds no open_clip_config.json and no config.json of a CLIP; name the model"),
    ],
)
def test_what_names_no_model_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        describe(text.format(tmp_path))
    assert line in str(caught.value)


def test_a_vocabulary_that_is_smaller_than_the_tokenizers_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "few.json", small(text_cfg__vocab_size=1000))
    with pytest.raises(UserError, match=r"vocab_size is 1,000, but CLIP's tokenizer has 49,408; give hf_"):
        create_clip(str(path))


def test_every_model_of_open_clips_has_ids_for_clips_tokenizer() -> None:
    for name in open_clip.list_models():
        text = open_clip.get_model_config(name)["text_cfg"]
        named = text.get("hf_tokenizer_name") or text.get("hf_model_name") or "siglip" in name.lower()
        assert named or "@" in name or text.get("vocab_size", 49408) >= 49408, name


def test_the_first_difference_of_two_models() -> None:
    ours, theirs = canonical(small(), ""), canonical(small(vision_cfg__head_width=32), "")
    assert first_difference(theirs, ours) == "vision_cfg.head_width is 32, not 16"
    assert first_difference(ours, ours) is None
    assert first_difference(canonical(small(custom_text=True), ""), ours) is None  # weights are renamed
    assert first_difference(canonical(small(vision_cfg__patch_dropout=0.5), ""), ours) is None


@pytest.mark.parametrize("eos", [2, 49407, 5])
def test_transformers_configuration_builds_the_same_function(tmp_path: Path, eos: int) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 8, "patch_size": 4, "layer_norm_eps": 1e-3, "projection_dim": 16}
    text = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3}
    text |= {"max_position_embeddings": 10, "projection_dim": 16, "eos_token_id": eos}
    theirs = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).eval()
    theirs.save_pretrained(tmp_path)
    write(tmp_path / "preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "resample": 2, "size": 8})
    clip = create_clip(str(tmp_path), tmp_path / "model.safetensors")
    clip.model.eval()
    assert clip.preprocess == {"mean": (0.1, 0.2, 0.3), "interpolation": "bilinear"}
    images, texts = torch.randn(3, 3, 8, 8), clip.tokenize(["a cat", "two dogs on a sofa", ""])
    texts[:2, 2] = 5
    with torch.no_grad():
        image_BC = theirs.visual_projection(theirs.vision_model(pixel_values=images).pooler_output)
        text_BC = theirs.text_projection(theirs.text_model(input_ids=texts).pooler_output)
        assert torch.allclose(clip.model.encode_image(images), image_BC, atol=1e-5)
        assert torch.allclose(clip.model.encode_text(texts), text_BC, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"text_config": {"hidden_act": "gelu"}}, "its towers have the activations gelu and quick_gelu"),
        ({"text_config": {"vocab_size": 250_000}}, "a vocabulary of 250,000 tokens is not CLIP's (49,408)"),
    ],
)
def test_a_transformers_model_that_open_clip_has_not_is_one_line(tmp_path: Path, change: Any, line: str) -> None:
    write(tmp_path / "config.json", {"model_type": "clip", "vision_config": {}, "text_config": {}} | change)
    with pytest.raises(UserError) as caught:
        describe(str(tmp_path))
    assert line in str(caught.value)


PROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"preprocessor_config.json": PROCESSOR | {"size": 224, "crop_size": 224}}, "shortest"),
        ({"preprocessor_config.json": PROCESSOR | {"size": {"shortest_edge": 224}, "crop_size": 224}}, "shortest"),
        ({"processor_config.json": {"image_processor": PROCESSOR}}, "shortest"),  # as transformers 5 writes it
        ({"preprocessor_config.json": PROCESSOR | {"size": {"height": 224, "width": 224}}}, "squash"),
        (
            {"preprocessor_config.json": PROCESSOR | {"size": {"height": 224, "width": 224}, "do_center_crop": True}},
            "squash",
        ),
        ({"processor_config.json": {"tokenizer": {}}, "preprocessor_config.json": PROCESSOR}, "shortest"),
        (
            {"preprocessor_config.json": PROCESSOR | {"size": 256, "crop_size": 224}},
            "it resizes to 256 and crops to",
        ),
        ({"preprocessor_config.json": PROCESSOR | {"do_normalize": False}}, "do_normalize is False"),
        ({"preprocessor_config.json": PROCESSOR | {"rescale_factor": 1 / 127.5}}, "rescale_factor is 0.0078"),
        ({"preprocessor_config.json": []}, "describes no image processor"),
        (
            {"preprocessor_config.json": PROCESSOR, "processor_config.json": {"image_processor": {"resample": 2}}},
            "has other settings of pixels than processor_config.json beside it",
        ),
    ],
)
def test_pixels_of_an_image_processor(tmp_path: Path, files: dict[str, Any], expected: str) -> None:
    write(tmp_path / "config.json", {"model_type": "clip", "vision_config": {}, "text_config": {}})
    for name, values in files.items():
        write(tmp_path / name, values)
    if expected not in ("shortest", "squash"):
        with pytest.raises(UserError) as caught:
            describe(str(tmp_path))
        assert expected in str(caught.value)
        return
    found = describe(str(tmp_path)).preprocess
    assert (found["mean"], found["resize_mode"]) == ((0.5, 0.5, 0.5), expected)


@pytest.mark.parametrize(
    "values", [[], {"model_type": "clip", "vision_config": {"num_attention_heads": 0}, "text_config": {}}]
)
def test_a_config_of_another_shape_is_one_line(tmp_path: Path, values: Any) -> None:
    write(tmp_path / "config.json", values)
    with pytest.raises(UserError):
        describe(str(tmp_path))


def test_an_mlp_ratio_counts_by_the_width_that_it_gives(tmp_path: Path) -> None:
    vision = {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 16}
    vision |= {"image_size": 224, "patch_size": 14, "hidden_act": "gelu"}
    text = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    text |= {"hidden_act": "gelu"}
    both = {"model_type": "clip", "vision_config": vision, "text_config": text, "projection_dim": 1280}
    assert describe(str(write(tmp_path / "config.json", both))).name == "ViT-bigG-14"


def test_a_label_from_a_file_is_no_path(tmp_path: Path) -> None:
    name = config.register(small(vision_cfg__layers=9), f"{tmp_path}/../evil", "a file")
    assert "/" not in name and not list(tmp_path.parent.glob("evil*"))


def test_a_timm_tower_of_another_size_is_one_line(tmp_path: Path) -> None:
    timm = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 160, "timm_proj": "linear", "timm_pool": "token"}
    path = write(tmp_path / "tiny.json", small() | {"vision_cfg": timm})
    with pytest.raises(UserError, match=r"timm builds this tower for images of 224x224: image_size must be that, too"):
        create_clip(str(path))


def test_equal_sides_are_one_size_and_the_first_difference_is_always_the_same() -> None:
    assert canonical(small(vision_cfg__image_size=[8, 8]), "") == canonical(small(), "")
    other = canonical(small(vision_cfg__layers=3, text_cfg__layers=3, vision_cfg__head_width=32), "")
    assert first_difference(other, canonical(small(), "")) == "text_cfg.layers is 3, not 2"


def test_a_tokenizer_in_the_folder_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "open_clip_config.json", {"model_cfg": small(text_cfg__hf_tokenizer_name="org/theirs")})
    write(tmp_path / "tokenizer.json", {})
    describe(str(tmp_path))
    assert "holds a tokenizer, too; texts are tokenised by org/theirs" in capsys.readouterr().err
