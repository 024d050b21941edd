"""Misuse of the Python API: a table of what may be given wrong, and the one line that says so; no file is left."""

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import upcycle_bench
from tests.helpers import MODEL, tiny_batches, tiny_clip
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.util.errors import UserError

IMAGES, TEXTS = torch.zeros(2, 3, 8, 8), torch.zeros(2, 12, dtype=torch.long)
NAN = float("nan")


def spoilt(tensor: Tensor, value: float) -> Tensor:
    """A copy with that number in one place."""
    copied = tensor.clone()
    copied.view(-1)[1] = value
    return copied


# ---- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "cluster-aware calibrates on 2 image-text pairs: give calibration="),
        ([], "cluster-aware: the calibration data are empty; it asks for 2 image-text pairs"),
        (5, "calibration is a int, which cannot be looped over"),
        (lambda: iter([(IMAGES, TEXTS)]), "calibration is a function, which cannot be looped over"),
        (IMAGES, "batch 0: a batch must be two tensors, .* this is a Tensor"),
        ("train.tar", "this is a str"),
        ([None], "this is a NoneType"),
        ([{"images": IMAGES, "texts": TEXTS}], "this is a dict of images, texts"),
        ([(IMAGES, TEXTS, TEXTS)], "this is a tuple of Tensor, Tensor, Tensor"),
        ([(IMAGES, ["a", "b"])], "this is a tuple of Tensor, list"),
        ([(IMAGES.numpy(), TEXTS)], "this is a tuple of ndarray, Tensor"),
        ([(IMAGES[0], TEXTS)], r"images are \[3, 8, 8\], the model takes \[B, 3, 8, 8\]; use its transform"),
        ([(IMAGES.permute(0, 2, 3, 1), TEXTS)], r"images are \[2, 8, 8, 3\]"),
        ([(IMAGES[:, :1], TEXTS)], r"images are \[2, 1, 8, 8\]"),
        ([(IMAGES.repeat(1, 1, 2, 2), TEXTS)], r"images are \[2, 3, 16, 16\]"),
        ([(IMAGES, TEXTS[:, :5])], r"texts are \[2, 5\], the model takes \[B, 12\]; use its tokenizer"),
        ([(IMAGES, TEXTS[0])], r"texts are \[12\]"),
        ([(IMAGES, TEXTS[:1])], "2 images and 1 texts"),
        ([(IMAGES[:0], TEXTS[:0])], "0 images and 0 texts"),
        ([(IMAGES.byte(), TEXTS)], "images are torch.uint8"),
        ([(IMAGES.to(torch.complex64), TEXTS)], "images are torch.complex64"),
        ([(IMAGES.to(torch.float8_e4m3fn), TEXTS)], "images are torch.float8_e4m3fn"),
        ([(IMAGES, TEXTS.float())], "texts torch.float32"),
        ([(IMAGES, TEXTS.bool())], "texts torch.bool"),
        ([(IMAGES.to("meta"), TEXTS)], "has no values"),
        ([(IMAGES[:1], TEXTS[:1]), (spoilt(IMAGES, NAN), TEXTS)], "batch 1: images have 1 values of 384 that are NaN"),
        ([(spoilt(IMAGES, math.inf), TEXTS)], "batch 0: images have 1 values of 384 that are NaN or infinite"),
        ([(IMAGES, spoilt(TEXTS, 49408))], "token numbers are 0 to 49408, the model's 0 to 49407; use its tokenizer"),
        ([(IMAGES, spoilt(TEXTS, -1))], "token numbers are -1 to 0"),
    ],
)
def test_bad_calibration_is_one_line(calibration: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        upcycle_bench.upcycle(tiny_clip().model, "cluster-aware", calibration=calibration, pairs=2)
    assert "\n" not in str(raised.value)


def test_sparse_calibration_is_one_line() -> None:
    with pytest.raises(UserError, match="batch 0: a tensor is sparse"):
        upcycle_bench.upcycle(tiny_clip().model, "cluster-aware", calibration=[(IMAGES.to_sparse(), TEXTS)], pairs=2)


def test_an_overflow_within_the_model_names_the_layer() -> None:
    """Finite images and weights may overflow in half precision; no statistics are made of that."""
    dense = tiny_clip(torch.float16)
    images, texts = tiny_batches(dense, pairs=4)[0]
    with torch.no_grad():
        dense.model.visual.transformer.resblocks[0].mlp.c_proj.weight.mul_(3000)
        dense.model.visual.transformer.resblocks[0].mlp.c_fc.weight.mul_(3000)
    with pytest.raises(UserError, match=r"calibration: inputs of vision.1 are NaN or infinite .* calibrate in float32"):
        upcycle_bench.upcycle(dense.model, "cluster-aware", calibration=[(images, texts)], pairs=4)


def test_token_numbers_of_32_bits_do() -> None:
    images, texts = tiny_batches(tiny_clip(), pairs=64)[0]
    made = [
        upcycle_bench.upcycle(tiny_clip().model, calibration=[(images, each)], pairs=64)
        for each in (texts, texts.int())
    ]
    weights = [[layer.router_weight for layer in moe_layers(model).values()] for model in made]
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "cluster-awre"}, "unknown strategy 'cluster-awre': did you mean 'cluster-aware'"),
        ({"strategy": None}, "strategy: give a name, such as 'cluster-aware', not a NoneType"),
        ({"strategy": ["sparse-upcycling"]}, "strategy: give a name, .* not a list"),
        ({"strategy": "dense"}, "dense leaves the model dense"),
        ({"strategy": "clip-moe"}, "clip-moe trains before it upcycles"),
        ({"strategy": "cluster-aware", "tau": 2}, "cluster-aware: tau: Input should be less than or equal to 1"),
        ({"strategy": "cluster-aware", "taau": 2}, "unknown option of cluster-aware 'taau': did you mean 'tau'"),
        ({"expert_noise_std": "much"}, "sparse-upcycling: expert_noise_std: Input should be a valid number"),
        ({"expert_noise_std": None}, "sparse-upcycling: expert_noise_std: Input should be a valid number"),
        ({"experts": 1}, r"experts: Input should be greater than or equal to 2 \(got 1\)"),
        ({"experts": "8"}, "experts: Input should be a valid integer"),
        ({"experts": 2.5}, "experts: Input should be a valid integer"),
        ({"experts": True}, "experts: Input should be a valid integer"),
        ({"top_k": 9}, r"top_k \(9\) exceeds experts \(8\)"),
        ({"top_k": 0}, "top_k: Input should be greater than or equal to 1"),
        ({"every": 0}, "every: Input should be greater than or equal to 1"),
        ({"offset": -1}, "offset: Input should be greater than or equal to 0"),
        ({"offset": 7}, "moe.offset=7 leaves no block to replace"),
        ({"capacity_factor": 0}, "capacity_factor: Input should be greater than 0"),
        ({"capacity_factor": NAN}, "capacity_factor: Input should be a finite number"),
        ({"capacity_factor": math.inf}, "capacity_factor: Input should be a finite number"),
        ({"min_capacity": -1}, "min_capacity: Input should be greater than or equal to 0"),
        ({"second_expert_sampling": 1}, "second_expert_sampling: Input should be a valid boolean"),
        ({"seed": "1"}, "seed: give a whole number from 0 on, not '1'"),
        ({"seed": -1}, "seed: give a whole number from 0 on, not -1"),
        ({"seed": 1.5}, "seed: give a whole number from 0 on, not 1.5"),
        ({"seed": True}, "seed: give a whole number from 0 on, not True"),
        ({"seed": None}, "seed: give a whole number from 0 on, not None"),
    ],
)
def test_a_bad_option_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        upcycle_bench.upcycle(tiny_clip().model, **{"strategy": "sparse-upcycling", **changes})
    assert "\n" not in str(raised.value)


def test_a_seed_of_numpy_is_that_number() -> None:
    noise = {"strategy": "sparse-upcycling", "expert_noise_std": 0.1}
    made = [upcycle_bench.upcycle(tiny_clip().model, seed=seed, **noise) for seed in (3, np.int64(3), torch.tensor(3))]
    weights = [next(iter(moe_layers(model).values())).experts[0].c_fc.weight for model in made]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


# ---- models ----------------------------------------------------------------------------------------------------------


def with_nan() -> Any:
    model = tiny_clip().model
    with torch.no_grad():
        model.visual.conv1.weight.view(-1)[0] = NAN
    return model


def lora() -> Any:
    """A linear layer of another class, as adapters and quantisation put there."""
    model = tiny_clip().model
    nn.utils.parametrizations.weight_norm(model.visual.transformer.resblocks[1].mlp.c_fc)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: None, "model is a NoneType: give the open_clip CLIP itself"),
        (lambda: "ViT-B-32", "model is a str: give the open_clip CLIP itself"),
        (lambda: (tiny_clip().model, None, None), "model is a tuple: give the open_clip CLIP itself"),
        (tiny_clip, "model is a Clip: give the open_clip CLIP itself, .* load has it as .model"),
        (lambda: nn.Linear(2, 2), "Linear has no visual.transformer.resblocks"),
        (lambda: torch.compile(tiny_clip().model), "model is wrapped in a OptimizedModule: give its ._orig_mod"),
        (lambda: nn.DataParallel(tiny_clip().model), "model is wrapped in a DataParallel: give its .module"),
        (lambda: tiny_clip().model.to("meta"), r"model has no values \(device meta\)"),
        (with_nan, "model: visual.conv1.weight has 1 values of 768 that are NaN or infinite"),
        (lora, "resblocks.1.mlp has a .* as c_fc; merge what was put around the layer"),
        (
            lambda: upcycle_bench.upcycle(tiny_clip().model, "sparse-upcycling", experts=2),
            r"model is upcycled already \(vision.1, .*\): give a dense one",
        ),
    ],
)
def test_what_is_no_dense_clip_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        upcycle_bench.upcycle(make(), "sparse-upcycling", offset=1)
    assert "\n" not in str(raised.value)


# ---- files -----------------------------------------------------------------------------------------------------------


def special(folder: Path) -> dict[str, Any]:
    """Paths of all kinds below a folder, by name."""
    os.mkfifo(folder / "fifo")
    (folder / "empty").touch()
    (folder / "text").write_text("hello")
    (folder / "dangling").symlink_to(folder / "nowhere")
    names = {name: folder / name for name in ("fifo", "empty", "text", "dangling", "nothing", "x" * 300)}
    return {"None": None, "5": 5, "": "", "bytes": b"moe", "nul": f"{folder}/a\0b", "folder": folder, **names}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("None", "None is no path of a file"),
        ("5", "5 is no path of a file"),
        ("bytes", "b'moe' is no path of a file"),
        ("nul", "is no path of a file"),
        ("", "is a folder"),
        ("folder", "is a folder"),
        ("fifo", "fifo is no ordinary file"),
        ("empty", "empty is an empty file"),
        ("text", "text is no checkpoint that is known here"),
        ("dangling", "dangling: no such file"),
        ("nothing", "nothing: no such file"),
        ("x" * 300, "cannot be read .*File name too long"),
    ],
)
def test_load_of_a_strange_path_is_one_line(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        upcycle_bench.load(special(tmp_path)[name])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("None", "None is no path of a file"),
        ("bytes", "b'moe' is no path of a file"),
        ("nul", "is no path of a file"),
        ("", "is a folder: give the name of a file to write"),
        ("folder", "is a folder: give the name of a file to write"),
        ("fifo", "fifo is no ordinary file"),
        ("x" * 300, "cannot be written .*File name too long"),
    ],
)
def test_save_to_a_strange_path_is_one_line(tmp_path: Path, name: str, message: str) -> None:
    path = special(tmp_path)[name]
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=message) as raised:
        upcycle_bench.save(tiny_clip().model, path, MODEL)
    assert "\n" not in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == before and not (tmp_path / "fifo").is_file()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_nan, "the model: visual.conv1.weight has 1 values of 768 that are NaN or infinite; nothing was written"),
        (tiny_clip, "model is a Clip: give the open_clip CLIP itself"),
        (lambda: tiny_clip().model.to("meta"), "model has no values"),
        (lambda: nn.DataParallel(tiny_clip().model), "model is wrapped in a DataParallel"),
    ],
)
def test_save_of_what_has_no_numbers_is_one_line_and_no_file(
    tmp_path: Path, make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        upcycle_bench.save(make(), tmp_path / "moe.safetensors", MODEL)
    assert "\n" not in str(raised.value) and not os.listdir(tmp_path)


def test_a_trained_model_that_diverged_names_the_experts_tensor(tmp_path: Path) -> None:
    """The file that was there stays."""
    model = upcycle_bench.upcycle(tiny_clip().model, "sparse-upcycling", experts=2)
    path = tmp_path / "moe.safetensors"
    digest = upcycle_bench.save(model, path, MODEL)
    diverged = copy.deepcopy(model)
    with torch.no_grad():
        moe_layers(diverged)["text.1"].experts[1].c_proj.bias[0] = math.inf
    with pytest.raises(UserError, match=r"the model: transformer\..*experts\.1\.c_proj\.bias has 1 values of"):
        upcycle_bench.save(diverged, path, MODEL)
    assert os.listdir(tmp_path) == [path.name]
    assert upcycle_bench.save(upcycle_bench.load(path).model, tmp_path / "again.safetensors", MODEL) == digest
