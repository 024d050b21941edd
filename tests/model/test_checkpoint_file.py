"""What a checkpoint is and which weights it holds: told by content; nothing in it runs; anything else is one line."""

import argparse
import collections
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from upcycle_bench import api
from upcycle_bench.model import checkpoint_file
from upcycle_bench.model.checkpoint_file import content_sha256, read
from upcycle_bench.model.clip import create_clip
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import file_sha256

MODEL = "smoke-vit"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> Any:
    return create_clip(MODEL, seed=1).model


@pytest.fixture
def state(model: Any) -> State:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(path: Path, state: State, name: str = MODEL) -> bool:
    """Whether the model of that checkpoint has these weights, bit by bit."""
    loaded = create_clip(name, path, seed=2).model.state_dict()
    return loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key].float()) for key in state)


def refusal(path: Path, name: str = MODEL) -> str:
    """The one line with which the checkpoint is refused; it names the file."""
    with pytest.raises(UserError) as caught:
        create_clip(name, path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


# An epoch file of a training


def epoch(state: State) -> dict[str, Any]:
    """What older versions of open_clip's trainer wrote: its scheduler made learning rates NumPy scalars."""
    return {
        "epoch": 15,
        "name": "my-run",
        "args": argparse.Namespace(model=MODEL, lr=1e-3, logs=Path("logs")),
        "state_dict": prefixed(state, "module."),
        "optimizer": {
            "state": {0: {"exp_avg": torch.ones(3)}},
            "param_groups": [{"lr": np.float64(1e-4), "params": [0]}],
        },
        "counts": collections.defaultdict(int, seen=np.int64(3)),
        "rng": np.random.RandomState(0).get_state(),
    }


def test_an_epoch_with_its_optimiser_and_a_numpy_learning_rate_loads(tmp_path: Path, state: State) -> None:
    torch.save(epoch(state), tmp_path / "epoch_15.pt")
    assert same(tmp_path / "epoch_15.pt", state)


def test_a_scalar_of_either_numpy_loads(tmp_path: Path, state: State) -> None:
    """NumPy 2 calls the module `numpy._core`, NumPy 1 `numpy.core`; a file has the name of where it was written."""
    new, old = tmp_path / "new.pt", tmp_path / "old.pt"
    torch.save(epoch(state), new)
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            data = source.read(name)
            assert not name.endswith("data.pkl") or b"numpy._core.multiarray" in data
            target.writestr(name, data.replace(b"cnumpy._core.", b"cnumpy.core."))
    assert read(old).value["optimizer"]["param_groups"][0]["lr"] == 1e-4
    assert same(new, state) and same(old, state)


def test_a_file_of_the_old_format_loads(tmp_path: Path, state: State) -> None:
    torch.save(epoch(state), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert checkpoint_file.identify(tmp_path / "old.pt").name == "a pickle"
    assert same(tmp_path / "old.pt", state)


class Evil:
    """Its unpickling writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exec, (f"open({str(self.mark)!r}, 'w')",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, state: State, zipped: bool) -> None:
    held = {"state_dict": state, "args": Evil(tmp_path / "ran")}
    torch.save(held, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    assert "holds Python objects (exec)" in refusal(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=2))
    refusal(tmp_path / "plain.pt")
    assert not (tmp_path / "ran").exists()


# Prefixes and nests

WRAPPED: dict[str, Callable[[State], Any]] = {
    "bare": lambda state: state,
    "module.": lambda state: prefixed(state, "module."),
    "_orig_mod.": lambda state: prefixed(state, "_orig_mod."),
    "module._orig_mod.": lambda state: prefixed(state, "module._orig_mod."),
    "_orig_mod.module.": lambda state: prefixed(state, "_orig_mod.module."),
    "model.": lambda state: prefixed(state, "model."),
    "any prefix": lambda state: prefixed(state, "student.clip."),
    "a compiled tower": lambda state: {key.replace("visual.", "visual._orig_mod."): v for key, v in state.items()},
    "{model}": lambda state: {"model": state, "epoch": 3},
    "{module}": lambda state: {"module": state, "global_steps": 3},
    "{state_dict}": lambda state: {"state_dict": state},
    "{state_dict: model.}": lambda state: {"state_dict": prefixed(state, "model."), "hyper_parameters": {"lr": 1}},
    "{model: {state_dict}}": lambda state: {"model": {"state_dict": state}},
    "{ema}": lambda state: {"ema": state},
    "{model_ema: {module}}": lambda state: {"model_ema": {"module": state}},
    "{state_dict, ema}": lambda state: {"state_dict_ema": {k: v + 1 for k, v in state.items()}, "state_dict": state},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers_come_off(tmp_path: Path, state: State, how: str) -> None:
    torch.save(WRAPPED[how](state), tmp_path / "dense.pt")
    assert same(tmp_path / "dense.pt", state)


def test_a_moving_average_is_said(tmp_path: Path, state: State, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"ema": state}, tmp_path / "ema.pt")
    torch.save({"ema": state, "model": state}, tmp_path / "both.pt")
    create_clip(MODEL, tmp_path / "both.pt")
    assert capsys.readouterr().err == ""
    create_clip(MODEL, tmp_path / "ema.pt")
    assert capsys.readouterr().err.endswith("holds a moving average (ema) and no other weights: it is used\n")


def test_a_prefix_of_some_keys_shows_both_sides(tmp_path: Path, state: State) -> None:
    half = {(f"extra.{key}" if key.startswith("visual.") else key): value for key, value in state.items()}
    torch.save(half, tmp_path / "half.pt")
    towers = sum(key.startswith("visual.") for key in state)
    line = refusal(tmp_path / "half.pt")
    assert f"it has {len(state)} tensors, the model {len(state)}; {towers} missing, first visual." in line
    assert f"{towers} unexpected, first extra.visual." in line


def test_one_tower_alone_keeps_its_name(tmp_path: Path, state: State) -> None:
    torch.save({k: v for k, v in state.items() if k.startswith("visual.")}, tmp_path / "vision.pt")
    assert "missing, first positional_embedding" in refusal(tmp_path / "vision.pt")


def test_position_embeddings_of_another_grid_are_not_bent(tmp_path: Path, state: State) -> None:
    state["visual.positional_embedding"] = torch.zeros(10, 64)
    torch.save(state, tmp_path / "grid.pt")
    assert "1 of other shape, first visual.positional_embedding 10x64, not 17x64" in refusal(tmp_path / "grid.pt")


def test_the_model_whose_weights_they_are_is_named(tmp_path: Path) -> None:
    config = open_clip.get_model_config(MODEL)
    config["vision_cfg"]["layers"] = 2
    (tmp_path / "smoke-flat.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "smoke-flat.json")
    torch.save(create_clip("smoke-flat").model.state_dict(), tmp_path / "flat.pt")
    line = refusal(tmp_path / "flat.pt")
    assert "24 missing, first visual.transformer.resblocks.2." in line
    assert "Its shapes are those of smoke-flat: give that model." in line


# By content, not by name


def test_the_name_does_not_decide(tmp_path: Path, state: State) -> None:
    for name in ("a.pt", "B.SAFETENSORS", "no_suffix"):
        save_file(state, tmp_path / name)
        assert same(tmp_path / name, state)
    for name in ("b.safetensors", "b.npz", "b.bin"):
        torch.save(state, tmp_path / name)
        assert same(tmp_path / name, state)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ([torch.ones(2)], "holds a list, no weights by name; save model.state_dict()"),
        (torch.ones(2), "holds a single tensor, no weights by name"),
        ({}, "holds no weights (but nothing)"),
        ({"epoch": 3, "name": "x"}, "holds no weights (but epoch, name)"),
        ({"state_dict": {}}, "holds no weights (but state_dict)"),
    ],
)
def test_what_holds_no_weights_by_name_is_one_line(tmp_path: Path, value: Any, line: str) -> None:
    torch.save(value, tmp_path / "odd.pt")
    assert line in refusal(tmp_path / "odd.pt")


def test_a_pickled_module_is_one_line(tmp_path: Path, model: Any) -> None:
    torch.save(model, tmp_path / "module.pt")
    line = refusal(tmp_path / "module.pt")
    assert "holds Python objects (open_clip.model.CLIP)" in line and "torch.save(model.state_dict(), FILE)" in line


FILES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is an empty file: copy or download it again"),
    "garbage": (bytes(range(200, 256)) * 20, "is no checkpoint that is known here: give an open_clip state dict"),
    "zeros": (bytes(4096), "is no checkpoint that is known here"),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 605143284\n",
        "is a Git LFS pointer: the weights were not fetched; run `git lfs pull`",
    ),
    "a page": (b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", "is a web page: the download gave a page"),
    "settings": (b'{"model_cfg": {}}', "is a JSON file: give the file of weights"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "is a packed file: unpack it"),
    "a foreign pickle": (pickle.dumps({"a": 1}, protocol=4), "cannot be read as a pickle"),
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("name", ["dense.pt", "dense.safetensors"])
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path: Path, what: str, name: str) -> None:
    content, line = FILES[what]
    (tmp_path / name).write_bytes(content)
    assert line in refusal(tmp_path / name)


def test_a_file_that_is_cut_off_is_one_line(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "cut.pt")
    save_file(state, tmp_path / "cut.safetensors")
    for path in (tmp_path / "cut.pt", tmp_path / "cut.safetensors"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "is a zip archive that is cut off" in refusal(tmp_path / "cut.pt")
    assert "cannot be read as a safetensors file" in refusal(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors", "script"])
def test_a_file_that_is_damaged_anywhere_is_read_or_one_line(tmp_path: Path, kind: str) -> None:
    """A bit that flips within a number cannot be seen; nothing else passes, and nothing has another end."""
    small = {f"module.{number}": torch.ones(2) for number in range(3)}
    path, random = tmp_path / "file", np.random.default_rng(0)
    if kind == "safetensors":
        save_file(small, path)
    elif kind == "script":
        torch.jit.save(torch.jit.script(torch.nn.GELU()), path)
    else:
        torch.save(small, path, _use_new_zipfile_serialization=kind == "zip")
    whole, lines = path.read_bytes(), []
    for number in range(60):
        place = int(random.integers(len(whole)))
        tail = b"" if number % 2 else bytes([whole[place] ^ 1 << number % 8]) + whole[place + 1 :]
        path.write_bytes(whole[:place] + tail)
        try:
            read(path)
        except UserError as error:
            lines.append(str(error))
        else:
            assert number % 2 == 0
    assert len(lines) >= 30 and not any("\n" in line for line in lines)


def test_archives_and_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", a=np.ones(3))
    assert "is a NumPy archive" in refusal(tmp_path / "weights.npz")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    assert "is a zip archive without weights" in refusal(tmp_path / "other.zip")
    assert "is a folder" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "none.pt")


def test_an_upcycled_model_is_called_that(tmp_path: Path, model: Any) -> None:
    moe = api.upcycle(model, "sparse-upcycling", experts=2)
    api.save(moe, tmp_path / "moe.safetensors", MODEL)
    torch.save({"state_dict": prefixed(moe.state_dict(), "module.")}, tmp_path / "moe.pt")
    for name in ("moe.safetensors", "moe.pt"):
        assert "is already upcycled (" in refusal(tmp_path / name)


def test_a_dense_file_of_ours_is_a_checkpoint(tmp_path: Path, model: Any, state: State) -> None:
    api.save(model, tmp_path / "ours.safetensors", MODEL)
    assert same(tmp_path / "ours.safetensors", state)


# TorchScript


def script(model: Any, path: Path) -> None:
    """As OpenAI saved theirs: a traced model."""
    image, text = torch.zeros(1, 3, 8, 8), torch.zeros(1, 12, dtype=torch.long)
    torch.jit.save(torch.jit.trace(model.eval(), (image, text), check_trace=False), path)


def test_a_torchscript_archive_loads(tmp_path: Path, model: Any, state: State) -> None:
    script(model, tmp_path / "ViT.pt")
    assert checkpoint_file.identify(tmp_path / "ViT.pt").name == "a TorchScript archive"
    assert read(tmp_path / "ViT.pt").quick_gelu is False
    assert same(tmp_path / "ViT.pt", state)


def test_a_torchscript_archive_with_quickgelu_needs_a_model_with_quickgelu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = open_clip.get_model_config(MODEL) | {"quick_gelu": True}
    (tmp_path / f"{MODEL}-quickgelu.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{MODEL}-quickgelu.json")
    quick = create_clip(f"{MODEL}-quickgelu", seed=1).model
    script(quick, tmp_path / "ViT.pt")
    assert f"was trained with another activation than that of {MODEL}: choose {MODEL}-quickgelu" in refusal(
        tmp_path / "ViT.pt"
    )
    assert same(tmp_path / "ViT.pt", quick.state_dict(), f"{MODEL}-quickgelu")


# transformers


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


# Shards


def shards(state: State, folder: Path) -> Path:
    """Two parts, one of each format, and their index."""
    keys = sorted(state)
    parts = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.bin": keys[1::2]}
    for (name, held), save in zip(parts.items(), (save_file, torch.save), strict=True):
        save({key: state[key] for key in held}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": {k: name for name, held in parts.items() for k in held}})
    )
    return index


def test_an_index_reads_all_parts(tmp_path: Path, state: State) -> None:
    assert same(shards(state, tmp_path), state)


def test_the_identity_of_an_index_is_that_of_its_parts(tmp_path: Path, state: State) -> None:
    index = shards(state, tmp_path)
    before = content_sha256(index)
    state["logit_scale"] += 1
    shards(state, tmp_path)
    assert content_sha256(index) != before
    part = tmp_path / "model-00001-of-00002.safetensors"
    assert content_sha256(part) == file_sha256(part)


def test_one_part_alone_names_its_index(tmp_path: Path, state: State) -> None:
    index = shards(state, tmp_path)
    assert f"The file is one part of several: give {index}." in refusal(tmp_path / "model-00002-of-00002.bin")


def test_a_part_that_is_missing_or_old_is_one_line(tmp_path: Path, state: State) -> None:
    index = shards(state, tmp_path)
    torch.save({}, tmp_path / "model-00002-of-00002.bin")
    assert "stands in none of its parts; copy index and parts again" in refusal(index)
    (tmp_path / "model-00002-of-00002.bin").unlink()
    assert "its part model-00002-of-00002.bin is not beside it; copy all 2 parts there" in refusal(index)


# Weights that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, state: State, value: float) -> None:
    state["transformer.resblocks.1.mlp.c_fc.bias"][3] = value
    torch.save(state, tmp_path / "diverged.pt")
    line = refusal(tmp_path / "diverged.pt")
    assert "transformer.resblocks.1.mlp.c_fc.bias has 1 values of 256 that are NaN or infinite" in line


def test_a_weight_that_is_no_number_in_a_file_of_ours_is_named(tmp_path: Path) -> None:
    model = api.upcycle(create_clip(MODEL, seed=1).model, "sparse-upcycling", experts=2)
    with torch.no_grad():
        model.ln_final.bias[0] = float("nan")
    api.save(model, tmp_path / "moe.safetensors", MODEL)
    with pytest.raises(UserError, match=r"ln_final.bias has 1 values of 64 that are NaN or infinite"):
        api.load(tmp_path / "moe.safetensors")
