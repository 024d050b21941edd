"""Final weights: a round trip changes no bit, the file is named by its content, and failures leave nothing behind."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.moe_helpers import MOE, inputs_for, upcycled
from upcycle_bench.model import weights
from upcycle_bench.model.clip import Clip, create_clip
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.util.errors import UserError

SMALL = MOE.model_copy(update={"experts": 4})


@pytest.fixture(scope="module")
def dense() -> Clip:
    clip = create_clip("smoke-vit", seed=1)
    clip.model.eval()
    return clip


@pytest.fixture
def clip(dense: Clip) -> Clip:
    """An upcycled model whose experts all differ."""
    model = upcycled(dense.model, SMALL)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in moe_layers(model).values():
            for parameter in layer.experts.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return replace(dense, model=model)


def assert_same(loaded: Clip, saved: Clip) -> None:
    ours, theirs = loaded.model.state_dict(), saved.model.state_dict()
    assert list(ours) == list(theirs)
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), key
    images, texts = inputs_for(saved.model)
    saved.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded.model.encode_image(images), saved.model.encode_image(images))
        assert torch.equal(loaded.model.encode_text(texts), saved.model.encode_text(texts))


def test_round_trip_of_an_upcycled_model(clip: Clip, tmp_path: Path) -> None:
    digest = weights.save(clip, SMALL, tmp_path / "weights")
    path = tmp_path / "weights" / f"{digest}.safetensors"
    assert os.listdir(tmp_path / "weights") == [path.name]
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()

    loaded = weights.load(path)
    assert_same(loaded, clip)
    assert not loaded.model.training
    assert loaded.name == "smoke-vit" and loaded.tokenize(["a"]).tolist() == clip.tokenize(["a"]).tolist()
    assert {name: layer.place for name, layer in moe_layers(loaded.model).items()} == {
        name: layer.place for name, layer in moe_layers(clip.model).items()
    }


def test_equal_models_have_one_name(clip: Clip, tmp_path: Path) -> None:
    """Else two equal runs would record different weights."""
    (digest,) = {weights.save(clip, SMALL, tmp_path) for _ in range(10)}
    assert os.listdir(tmp_path) == [f"{digest}.safetensors"]
    loaded = weights.load(tmp_path / f"{digest}.safetensors")
    assert weights.save(loaded, SMALL, tmp_path) == digest


def test_round_trip_of_a_dense_model(dense: Clip, tmp_path: Path) -> None:
    digest = weights.save(dense, SMALL, tmp_path)
    loaded = weights.load(tmp_path / f"{digest}.safetensors")
    assert_same(loaded, dense)
    assert moe_layers(loaded.model) == {}


def test_other_content_has_another_name(clip: Clip, tmp_path: Path) -> None:
    first = weights.save(clip, SMALL, tmp_path)
    with torch.no_grad():
        moe_layers(clip.model)["vision.1"].experts[2].c_fc.bias[0] += 1e-3
    second = weights.save(clip, SMALL, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(f"{digest}.safetensors" for digest in {first, second})
    assert first != second


def test_a_file_trained_in_parallel_loads_in_one_process(clip: Clip, tmp_path: Path) -> None:
    """The protocol's ep_size is in the metadata, but all experts are in the file."""
    digest = weights.save(clip, SMALL.model_copy(update={"ep_size": 2}), tmp_path)
    loaded = weights.load(tmp_path / f"{digest}.safetensors")
    assert_same(loaded, clip)
    assert all(layer.settings.ep_size == 1 for layer in moe_layers(loaded.model).values())


@pytest.mark.parametrize("culprit", ["os.replace", "file_sha256", "save_file"])
def test_a_failure_leaves_nothing_behind(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, culprit: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        for arg in args:  # as a full disk would: half of the file is there
            if isinstance(arg, Path) and not arg.exists():
                arg.write_bytes(b"half")
        raise OSError("no space left on device")

    if culprit == "os.replace":
        monkeypatch.setattr(os, "replace", lambda source, target: fail())
    elif culprit == "save_file":
        monkeypatch.setattr(safetensors.torch, "save_file", fail)
    else:
        monkeypatch.setattr(weights, "file_sha256", fail)
    with pytest.raises(OSError, match="no space left"):
        weights.save(clip, SMALL, tmp_path)
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    weights.save(clip, SMALL, tmp_path)  # nor does it stand in the way of the next attempt
    assert len(os.listdir(tmp_path)) == 1


# ---- files that are not ours ---------------------------------------------------------------------------------


def test_files_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        weights.load(tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="is no checkpoint that is known here"):
        weights.load(tmp_path / "text")
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "other", metadata=metadata)
        with pytest.raises(UserError, match="not written by upcycle-bench"):
            weights.load(tmp_path / "other")


def test_a_file_cut_short(clip: Clip, tmp_path: Path) -> None:
    digest = weights.save(clip, SMALL, tmp_path)
    path = tmp_path / f"{digest}.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"cannot be read as a safetensors file .* it may be cut off"):
        weights.load(path)


MOE_OF_FILE = SMALL.model_dump()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({}, "does not fit its own metadata .*size mismatch"),  # one router row too few
        ({"moe": None}, "does not fit its own metadata .*Missing key"),
        ({"moe": MOE_OF_FILE | {"experts": 8}}, "does not fit its own metadata .*Missing key"),
        ({"moe": MOE_OF_FILE | {"experts": -1}}, "does not fit its own metadata .*experts"),
        ({"moe": "eight experts"}, "does not fit its own metadata"),
        ({"model": "smoke-vat"}, "unknown open_clip model 'smoke-vat'"),
        ("{}", "does not fit its own metadata .*model"),
        ("{", "does not fit its own metadata"),
    ],
)
def test_a_file_that_does_not_fit_its_metadata(
    clip: Clip, tmp_path: Path, changes: dict[str, Any] | str, match: str
) -> None:
    state = {key: value.clone() for key, value in clip.model.state_dict().items()}
    weight = next(iter(moe_layers(clip.model).values())).router_weight
    router = next(name for name, parameter in clip.model.named_parameters() if parameter is weight)
    state[router] = state[router][:-1].clone()
    ours = {"model": "smoke-vit", "moe": MOE_OF_FILE}
    text = changes if isinstance(changes, str) else json.dumps(ours | changes)
    path = tmp_path / "ours.safetensors"
    safetensors.torch.save_file(state, path, metadata={weights.FORMAT: text})
    with pytest.raises(UserError, match=match) as raised:
        weights.load(path)
    assert "\n" not in str(raised.value)
