"""Dense models: checkpoints that must fit, our configurations, transforms equal to open_clip's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.config import model_config
from upcycle_bench.util.errors import UserError


def test_a_checkpoint_is_loaded_whole(tmp_path: Path) -> None:
    saved = create_clip("smoke-vit", seed=1)
    path = tmp_path / "dense.pt"
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in saved.model.state_dict().items()}}, path
    )  # as open_clip trains
    loaded = create_clip("smoke-vit", path, seed=2)
    assert all(torch.equal(value, loaded.model.state_dict()[key]) for key, value in saved.model.state_dict().items())


def test_a_scalar_logit_scale_is_accepted(tmp_path: Path) -> None:
    state = create_clip("smoke-vit").model.state_dict()
    state["logit_scale"] = torch.tensor(3.25)
    torch.save(state, tmp_path / "dense.pt")
    assert create_clip("smoke-vit", tmp_path / "dense.pt").model.logit_scale.tolist() == [3.25]


@pytest.mark.parametrize("change", ["missing", "superfluous", "shape"])
def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path: Path, change: str) -> None:
    state = dict(create_clip("smoke-vit").model.state_dict())
    if change == "missing":
        del state["visual.proj"]
    elif change == "superfluous":
        state["visual.extra"] = torch.zeros(1)
    else:
        state["visual.proj"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "dense.pt")
    with pytest.raises(UserError, match=r"dense\.pt does not fit smoke-vit: .*visual\.(proj|extra)") as caught:
        create_clip("smoke-vit", tmp_path / "dense.pt")
    assert "\n" not in str(caught.value)


def test_unknown_model_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'ViT-B-32'"):
        create_clip("ViT-B32")
    with pytest.raises(UserError, match="no such file"):
        create_clip("smoke-vit", tmp_path / "nothing.pt")


def test_seed_decides_the_random_weights_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same, other = (create_clip("smoke-vit", seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.text_projection, same.text_projection)
    assert not torch.equal(first.text_projection, other.text_projection)


@pytest.mark.parametrize("size", [(8, 8), (20, 13)])
def test_our_split_transform_equals_open_clips(size: tuple[int, int]) -> None:
    clip = create_clip("smoke-vit")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    ours = clip.normalise(torch.from_numpy(clip.resize(image).copy())[None])[0]
    assert torch.allclose(ours, clip.transform(image), atol=1e-6)


def test_patch_dropout_is_built_in() -> None:
    assert create_clip("smoke-vit", patch_dropout=0.5).model.visual.patch_dropout.prob == 0.5


def test_model_config() -> None:
    assert model_config("smoke-vit")["embed_dim"] == 32
