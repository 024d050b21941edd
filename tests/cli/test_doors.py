"""Every command that reads a checkpoint takes the same files, and refuses the others with the same line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cli.test_main import call
from upcycle_bench import api
from upcycle_bench.data.worlds import load_world
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.config import model_config
from upcycle_bench.util.cache import cache_root

MODEL = "smoke-vit"


@pytest.fixture(scope="module")
def model() -> Any:
    return create_clip(MODEL, seed=3).model


def epoch(model: Any) -> dict[str, Any]:
    state = {f"module._orig_mod.{key}": value for key, value in model.state_dict().items()}
    return {"state_dict": state, "optimizer": {"param_groups": [{"lr": np.float64(1e-4)}]}}


def diverged(model: Any) -> dict[str, Any]:
    return {**model.state_dict(), "ln_final.bias": torch.full((64,), float("nan"))}


def upcycled(model: Any) -> dict[str, Any]:
    return api.upcycle(model, "sparse-upcycling", experts=2).state_dict()


def doors(checkpoint: Path, folder: Path) -> dict[str, list[str]]:
    """The commands that read a checkpoint, and what each of them writes into `folder`."""
    world = load_world("digits", 0)
    settings = [f"model={MODEL}", "train.schedule.steps=2", "train.schedule.batch_size=32", "train.log_every=1"]
    settings += ['suites.zero-shot.sets=["digits-test", "digits-validation"]']
    settings += ['suites.zero-shot.headlines.imagenet=["digits-test"]']
    settings += ['suites.zero-shot.headlines.shift=["digits-validation"]']
    data = ["--data", str(world.train_shards[0].parent), "--eval-data", str(world.eval_root)]
    upcycle = ["upcycle", "-m", MODEL, "--pretrained", str(checkpoint), "-s", "sparse-upcycling", "--experts", "2"]
    evaluate = ["evaluate", str(checkpoint), "--model", MODEL, "--data", str(world.eval_root)]
    run = ["run", "-s", "sparse-upcycling", "-p", "clip-b32", "--checkpoint", str(checkpoint), *data]
    return {
        "upcycle": [*upcycle, "--output", str(folder / "moe.safetensors")],
        "evaluate": [*evaluate, "--output", str(folder / "scores.json")],
        "run": [*run, *(part for one in settings for part in ("--set", one)), "--results", str(folder / "results")],
    }


@pytest.mark.parametrize("door", ["upcycle", "evaluate", "run"])
def test_an_epoch_of_a_compiled_distributed_training_goes_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Any, door: str
) -> None:
    torch.save(epoch(model), tmp_path / "epoch_15.pt")
    assert call(monkeypatch, *doors(tmp_path / "epoch_15.pt", tmp_path)[door]) == 0


@pytest.mark.parametrize("door", ["upcycle", "evaluate", "run"])
def test_a_folder_with_its_own_pixels_and_a_logit_bias_goes_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Any, door: str
) -> None:
    """As open_clip writes it for Hugging Face, of a training with --siglip; what was taken is said and recorded."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    said = {"model_cfg": model_config(MODEL), "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    torch.save(model.state_dict() | {"logit_bias": torch.tensor(-10.0)}, folder / "open_clip_pytorch_model.bin")
    assert call(monkeypatch, *doors(folder, tmp_path)[door]) == 0
    shown = capsys.readouterr()
    pixels = {"mean": [0.5, 0.5, 0.5], "std": [0.26862954, 0.26130258, 0.27577711]}
    pixels |= {"interpolation": "bicubic", "resize_mode": "squash", "size": [8, 8]}
    if door == "run":
        (record,) = [json.loads(path.read_text()) for path in (tmp_path / "results").rglob("*.json")]
        assert record["dense"] == {"model": MODEL, "pixels": pixels, "interpolated": {}, "logit_bias": True}
        assert "the dense model has a logit bias, as models for the sigmoid loss have" in shown.err
        weights = cache_root() / "weights" / f"{record['hashes']['weights']}.safetensors"
        assert api.load(weights).model.logit_bias.tolist() == [-10.0]
        assert api.load(weights).pixels == pixels
    else:
        assert "images: 8x8 pixels, bicubic, squash; mean 0.5, 0.5, 0.5; std 0.2686, 0.2613, 0.2758" in shown.out
    if door == "evaluate":
        assert json.loads((tmp_path / "scores.json").read_text())["pixels"] == pixels


def test_the_options_of_pixels_and_positions_change_the_scores_and_stand_with_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Any
) -> None:
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    larger = model_config(MODEL)
    larger["vision_cfg"]["image_size"] = 12
    (tmp_path / "larger.json").write_text(json.dumps(larger))
    command = doors(tmp_path / "dense.pt", tmp_path)["evaluate"]
    command[command.index(MODEL)] = str(tmp_path / "larger.json")
    assert call(monkeypatch, *command) == 2
    assert "--interpolate-positions resizes them" in capsys.readouterr().err
    options = ["--interpolate-positions", "--pixels", "mean=0.5,0.5,0.5", "--pixels", "resize-mode=squash"]
    assert call(monkeypatch, *command, *options) == 0
    assert "visual.positional_embedding was resized from 17x64 to 37x64" in capsys.readouterr().out
    facts = json.loads((tmp_path / "scores.json").read_text())
    assert facts["model"].startswith("larger@") and facts["pixels"]["mean"] == [0.5, 0.5, 0.5]
    assert facts["interpolated"] == {"visual.positional_embedding": "17x64 to 37x64"}


@pytest.mark.parametrize("door", ["upcycle", "evaluate", "run"])
@pytest.mark.parametrize(
    ("make", "line"),
    [
        (diverged, "ln_final.bias has 64 values of 64 that are NaN or infinite"),
        (upcycled, "is already upcycled"),
    ],
)
def test_weights_that_do_not_do_are_one_line_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Any,
    make: Callable[[Any], Any],
    line: str,
    door: str,
) -> None:
    torch.save(make(model), tmp_path / "dense.pt")
    assert call(monkeypatch, *doors(tmp_path / "dense.pt", tmp_path)[door]) != 0
    said = capsys.readouterr().err
    assert line in said and "Traceback" not in said
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "scores.json").exists()


def test_an_index_without_a_model_is_no_record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
    assert call(monkeypatch, "evaluate", str(tmp_path / "model.safetensors.index.json")) == 2
    assert "say with --model which open_clip model it is" in capsys.readouterr().err


@pytest.mark.parametrize("door", ["upcycle", "evaluate", "run", "evaluate without --model"])
def test_a_pointer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, door: str
) -> None:
    (tmp_path / "dense.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 6051\n")
    command = doors(tmp_path / "dense.pt", tmp_path)[door.split()[0]]
    if door.endswith("--model"):
        command.remove("--model")
        command.remove(MODEL)
    assert call(monkeypatch, *command) == 2
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if " start " not in line]
    assert "is a Git LFS pointer: the weights were not fetched" in line
    assert not (tmp_path / "results").exists()
