"""The Python API: `upcycle`, `save`, `load` in any precision, without a process group."""

import copy
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import upcycle_bench
from tests.helpers import MODEL, equal, tiny_batches, tiny_clip
from tests.moe_helpers import create_dense, inputs_for
from upcycle_bench.assets import MODELS
from upcycle_bench.model import weights
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.surgery import find_layers, merge
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import PUBLISHED_MOE
from upcycle_bench.strategy import Strategy
from upcycle_bench.upcycling.from_checkpoint import moe_settings
from upcycle_bench.util.errors import UserError

STRATEGIES = sorted(  # without those that train first, which the API refuses
    name
    for name, entry in load_registry().strategies.items()
    if entry.target.replaces_ffn and entry.target.prepare is Strategy.prepare
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FEW = "ignore:.*calibration pairs and saw:UserWarning"


def outputs(model: Any, inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model.encode_image(inputs[0]), model.encode_text(inputs[1]), *model(*inputs)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, upcycle_bench\n"
        "names = {'Clip', 'UserError', 'load', 'moe_layers', 'save', 'upcycle'}\n"
        "assert names <= set(dir(upcycle_bench))\n"
        "from upcycle_bench.util import errors\n"
        "assert upcycle_bench.UserError is errors.UserError\n"
        "heavy = {'torch', 'deepspeed', 'open_clip', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "try: upcycle_bench.nothing\n"
        "except AttributeError as error: print(error)\n"
        "for name in names: assert getattr(upcycle_bench, name).__name__ == name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "module 'upcycle_bench' has no attribute 'nothing'\n"


@pytest.mark.filterwarnings(FEW)
@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [
        *((strategy, torch.bfloat16) for strategy in STRATEGIES),
        *(
            (strategy, dtype)
            for strategy in ("cluster-aware", "sparse-upcycling")
            for dtype in DTYPES
            if dtype != torch.bfloat16
        ),
    ],
    ids=str,
)
def test_every_strategy_in_every_precision(strategy: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The model evaluates, trains every parameter, and is loaded from its file bit for bit."""
    dense = tiny_clip(dtype)
    before = copy.deepcopy(dense.model.state_dict())
    random = torch.get_rng_state()
    model = upcycle_bench.upcycle(dense.model, strategy, calibration=tiny_batches(dense, pairs=32))
    assert torch.equal(torch.get_rng_state(), random)
    assert equal(dense.model.state_dict(), before)
    layers = [layer.name for layer in find_layers(dense.model, PUBLISHED_MOE)]
    assert list(upcycle_bench.moe_layers(model)) == layers and len(layers) >= 2
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}

    inputs = tiny_batches(dense, pairs=6)[0]
    assert not model.training
    evaluated = outputs(model, inputs)
    assert all(value.dtype == dtype and torch.isfinite(value).all() for value in evaluated)

    image_BC, text_BC, _ = model.train()(*inputs)
    balance = sum(layer.l_aux for layer in moe_layers(model).values())
    ((image_BC.float() @ text_BC.float().T).logsumexp(1).sum() + balance).backward()
    trained = {name: p for name, p in model.named_parameters() if name != "logit_scale" and p.requires_grad}
    gradients = {name: p.grad for name, p in trained.items()}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())

    assert upcycle_bench.save(model, tmp_path / "moe.safetensors", MODEL)
    loaded = upcycle_bench.load(tmp_path / "moe.safetensors")
    merge(model.eval())  # the file has plain experts
    assert equal(loaded.model.state_dict(), model.state_dict())
    assert same(outputs(loaded.model, inputs), outputs(model, inputs))
    assert os.listdir(tmp_path) == ["moe.safetensors"]


def test_nothing_distributed_is_started() -> None:
    """It runs in a process of its own, since other tests start process groups."""
    code = (
        "import torch, torch.distributed as dist, upcycle_bench\n"
        "from tests.helpers import tiny_batches, tiny_clip\n"
        "torch.set_num_threads(1)\n"
        "clip = tiny_clip()\n"
        "model = upcycle_bench.upcycle(clip.model, 'cluster-aware', calibration=tiny_batches(clip), pairs=128)\n"
        "inputs = tiny_batches(clip, pairs=4)[0]\n"
        "for k in (1, 2, 3):\n"
        "    model = upcycle_bench.upcycle(clip.model, 'sparse-upcycling', top_k=k)\n"
        "    for training in (False, True):\n"
        "        model.train(training)(*inputs)[0].sum().backward()\n"
        "from deepspeed.comm import comm\n"
        "from deepspeed.utils import groups\n"
        "assert not dist.is_initialized() and comm.cdb is None\n"
        "made = {name: value for name, value in vars(groups).items() if 'GROUP' in name and value}\n"
        "assert not made, made\n"
    )
    done = subprocess.run([sys.executable, "-W", "error::UserWarning:upcycle_bench", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_open_clips_mixed_precision(tmp_path: Path) -> None:
    """Weights in bf16 and LayerNorms in float32 need another class of LayerNorm; the file's dtypes tell which."""
    dense = create_clip(MODEL, precision="bf16", seed=1).model.eval()
    model = upcycle_bench.upcycle(dense, "sparse-upcycling")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.bfloat16}
    images, texts = tiny_batches(tiny_clip(), pairs=4)[0]
    inputs = (images.bfloat16(), texts)
    upcycle_bench.save(model, tmp_path / "moe.safetensors", MODEL)
    loaded = upcycle_bench.load(tmp_path / "moe.safetensors").model
    assert same(outputs(loaded, inputs), outputs(model, inputs))


def test_a_model_as_open_clip_makes_it(tmp_path: Path) -> None:
    """Its logit scale has no dimension, its transform may be that of a pretrained tag; the file keeps both."""
    create_clip(MODEL)  # it registers the name with open_clip
    changes = {"image_mean": (0.5, 0.5, 0.5), "image_interpolation": "bilinear"}
    dense = open_clip.create_model_and_transforms(MODEL, **changes)[0].eval()
    assert dense.logit_scale.dim() == 0
    model = upcycle_bench.upcycle(dense, "drop-upcycling", experts=4, ratio=0.25, seed=3)
    digest = upcycle_bench.save(model, tmp_path / "moe.safetensors", MODEL)
    clip = upcycle_bench.load(str(tmp_path / "moe.safetensors"))
    inputs = tiny_batches(tiny_clip(), pairs=4)[0]
    assert same(outputs(clip.model, inputs), outputs(model, inputs))
    assert clip.model.logit_scale.dim() == 0
    assert clip.mean == (0.5, 0.5, 0.5) and "bilinear" in str(clip.transform) and clip.name == MODEL
    assert upcycle_bench.save(clip.model, tmp_path / "again.safetensors", clip.name) == digest
    mode = (tmp_path / "moe.safetensors").stat().st_mode
    (tmp_path / "other").touch()
    assert mode == (tmp_path / "other").stat().st_mode


def test_a_round_trip_keeps_the_moe_settings(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"experts": 5, "top_k": 3, "every": 1, "offset": 0, "capacity_factor": 1.25}
    model = upcycle_bench.upcycle(tiny_clip().model, "sparse-upcycling", **changes, min_capacity=0)
    upcycle_bench.save(model, tmp_path / "moe.safetensors", MODEL)
    for layer in moe_layers(upcycle_bench.load(tmp_path / "moe.safetensors").model).values():
        assert layer.settings == moe_settings(**changes, min_capacity=0)
        assert layer.gate.own_factor == 1.25 and layer.gate.own_minimum == 0
    blocks = [*tiny_clip().model.visual.transformer.resblocks, *tiny_clip().model.transformer.resblocks]
    assert len(moe_layers(model)) == len(blocks)


def test_a_seed_gives_one_model_and_a_dense_one_round_trips(tmp_path: Path) -> None:
    dense = tiny_clip()
    batches = tiny_batches(dense)
    made = [
        upcycle_bench.upcycle(dense.model, calibration=iter(batches), seed=seed, pairs=100).state_dict()
        for seed in (1, 1, 2)
    ]
    assert equal(made[0], made[1]) and not equal(made[0], made[2])
    upcycle_bench.save(dense.model, tmp_path / "dense.safetensors", MODEL)
    assert equal(upcycle_bench.load(tmp_path / "dense.safetensors").model.state_dict(), dense.model.state_dict())


def test_modes_are_kept_part_by_part() -> None:
    """A user may keep one tower in eval mode; calibration must not change that."""
    dense = tiny_clip().model.train()
    dense.visual.eval()
    modes = [module.training for module in dense.modules()]
    model = upcycle_bench.upcycle(dense, calibration=tiny_batches(tiny_clip()), pairs=64)
    assert [module.training for module in dense.modules()] == modes
    layers = moe_layers(model)
    assert not layers["vision.1"].training and layers["text.1"].training


# ---- calibration -----------------------------------------------------------------------------------------------------


def test_as_many_pairs_are_taken_as_the_strategy_wants() -> None:
    """The last batch is cut, an endless loader is not exhausted, and too few pairs are a warning with their number."""
    dense = tiny_clip()
    batch = tiny_batches(dense, pairs=64)[0]
    taken = 0

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal taken
        while True:
            taken += 1
            yield batch

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = upcycle_bench.upcycle(dense.model, calibration=endless(), pairs=100)
        parts = [batch, (batch[0][:36], batch[1][:36])]
        exact = upcycle_bench.upcycle(dense.model, calibration=parts, pairs=100)
    assert taken == 2
    assert equal(model.state_dict(), exact.state_dict())
    with pytest.warns(UserWarning, match="cluster-aware asks for 131,072 calibration pairs and saw 100;"):
        upcycle_bench.upcycle(dense.model, calibration=parts)


def test_calibration_is_cast_to_the_model() -> None:
    """A transform makes float32 images, also for a model in bf16."""
    dense = tiny_clip(torch.bfloat16)
    images, texts = tiny_batches(tiny_clip(), pairs=64)[0]
    first = upcycle_bench.upcycle(dense.model, calibration=[(images, texts)], pairs=64)
    second = upcycle_bench.upcycle(dense.model, calibration=[(images.bfloat16(), texts)], pairs=64)
    assert equal(first.state_dict(), second.state_dict())


def test_a_resnet_is_refused() -> None:
    with torch.device("meta"):
        dense = open_clip.CLIP(**open_clip.get_model_config("RN50"))
    with pytest.raises(UserError, match=r"CLIP has no visual.transformer.resblocks or visual.trunk.blocks: only CLIPs"):
        upcycle_bench.upcycle(dense, "sparse-upcycling")


def alive() -> int:
    """Bytes of all tensors made since `gc.freeze()` that still exist; a shared storage counts once."""
    found = (thing for thing in gc.get_objects() if isinstance(thing, Tensor) and not thing.is_meta)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}
    return sum(storages.values())


def test_cluster_aware_keeps_no_activations() -> None:
    """During calibration, the bytes that are held are the same for four times as much data."""
    dense = tiny_clip()

    def held(batches: int) -> list[int]:
        measured = []
        images, texts = tiny_batches(dense, pairs=16)[0]

        def stream() -> Iterator[tuple[Tensor, Tensor]]:
            for number in range(batches):
                measured.append(alive())
                yield images + number / 100, texts

        upcycle_bench.upcycle(dense.model, calibration=stream(), pairs=16 * batches, cluster_tokens=200)
        return measured

    held(2)  # the first call makes tensors that stay
    gc.collect()
    gc.freeze()
    try:
        once, fourfold = held(6), held(24)
    finally:
        gc.unfreeze()
    assert max(fourfold) == max(once)
    assert fourfold[-1] == once[-1]
    assert once[1] > once[0]  # the buffer of the first batches is seen, so activations would be too


# ---- save and load ---------------------------------------------------------------------------------------------------


def test_quickgelu_needs_its_own_name(tmp_path: Path) -> None:
    """Its tensors are those of ViT-B-32; its activation is not. Only forms are compared, so tensors need no memory."""
    with torch.device("meta"):
        dense = create_clip("ViT-B-32-quickgelu").model
    with pytest.raises(UserError, match=r"the model is no ViT-B-32: \S+mlp.gelu is QuickGELU\(\), the file's is GELU"):
        upcycle_bench.save(dense, tmp_path / "moe.safetensors", "ViT-B-32")
    with pytest.raises(
        UserError, match=r"the model is no ViT-B-16-quickgelu: visual.conv1 is .*kernel_size=\(32, 32\)"
    ):
        upcycle_bench.save(dense, tmp_path / "moe.safetensors", "ViT-B-16-quickgelu")
    assert os.listdir(tmp_path) == []


def test_a_file_under_a_quickgelu_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((MODELS / f"{MODEL}.json").read_text())
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "small-quickgelu.json").write_text(json.dumps(config | {"quick_gelu": True}))
    open_clip.add_model_config(folder)
    dense = create_clip("small-quickgelu").model.eval()
    model = upcycle_bench.upcycle(dense, "sparse-upcycling")
    upcycle_bench.save(model, tmp_path / "moe.safetensors", "small-quickgelu")
    inputs = tiny_batches(tiny_clip(), pairs=4)[0]
    assert same(outputs(upcycle_bench.load(tmp_path / "moe.safetensors").model, inputs), outputs(model, inputs))
    with pytest.raises(UserError, match=r"the model is no smoke-vit: .*gelu is QuickGELU"):
        upcycle_bench.save(model, tmp_path / "other.safetensors", MODEL)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "moe.safetensors"
    upcycle_bench.save(tiny_clip().model, path, MODEL)
    before = path.read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "file_sha256", fail)
    with pytest.raises(UserError, match=r"moe\.safetensors: no space is left on its disk"):
        upcycle_bench.save(upcycle_bench.upcycle(tiny_clip().model, "sparse-upcycling"), path, MODEL)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    with pytest.raises(UserError, match="is not a folder; make it first"):
        upcycle_bench.save(tiny_clip().model, tmp_path / "no" / "moe.safetensors", MODEL)
    with pytest.raises(UserError, match="unknown open_clip model 'smoke-vat'"):
        upcycle_bench.save(tiny_clip().model, path, "smoke-vat")


def test_a_process_group_of_the_user_changes_nothing() -> None:
    """In a script that has a process group, routing and outputs are those without one."""
    dense = create_dense()
    model = upcycle_bench.upcycle(dense, "sparse-upcycling").train()
    inputs = inputs_for(dense)
    alone = outputs(model, inputs)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert same(outputs(model, inputs), alone)
    finally:
        dist.destroy_process_group()
