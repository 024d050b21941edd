"""What a checkpoint is: told by content. Nothing in it runs; what is no checkpoint is one line."""

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

from tests.model.checkpoints import MODEL, State, prefixed, random_state, refusal, same
from upcycle_bench.model import checkpoint_file
from upcycle_bench.model.checkpoint_file import content_sha256, read
from upcycle_bench.model.clip import create_clip
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import file_sha256


@pytest.fixture(scope="module")
def model() -> Any:
    return create_clip(MODEL, seed=1).model


@pytest.fixture
def state() -> State:
    return random_state()


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


def test_the_name_does_not_decide(tmp_path: Path, state: State) -> None:
    for name in ("a.pt", "B.SAFETENSORS", "no_suffix"):
        save_file(state, tmp_path / name)
        assert same(tmp_path / name, state)
    for name in ("b.safetensors", "b.npz", "b.bin"):
        torch.save(state, tmp_path / name)
        assert same(tmp_path / name, state)


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
