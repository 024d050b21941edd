"""Which weights a checkpoint holds: found under any wrapping, compared on both sides, and never NaN."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.model.checkpoints import MODEL, State, prefixed, random_state, refusal, same
from upcycle_bench import api
from upcycle_bench.model.clip import create_clip
from upcycle_bench.util.errors import UserError


@pytest.fixture(scope="module")
def model() -> Any:
    return create_clip(MODEL, seed=1).model


@pytest.fixture
def state() -> State:
    return random_state()


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
    "torch's AveragedModel": lambda state: {**prefixed(state, "module."), "n_averaged": torch.tensor(3)},
    "arrays": lambda state: {key: value.numpy() for key, value in state.items()},
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


@pytest.mark.parametrize(
    ("change", "form"),
    [
        (lambda value: value.to(torch.int8), "int8, strided"),
        (lambda value: value.to(torch.float8_e4m3fn), "float8_e4m3fn, strided"),
        (lambda value: value.to(torch.complex64), "complex64, strided"),
        (lambda value: value.to_sparse(), "float32, sparse_coo"),
        (lambda value: value.to("meta"), "without values"),
    ],
)
def test_weights_that_are_not_plain_numbers_are_named(
    tmp_path: Path, state: State, change: Callable[[torch.Tensor], torch.Tensor], form: str
) -> None:
    torch.save({**state, "visual.proj": change(state["visual.proj"])}, tmp_path / "other.pt")
    assert f"visual.proj is {form}; give dense weights in float32" in refusal(tmp_path / "other.pt")


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


def test_an_upcycled_model_is_called_that(tmp_path: Path, model: Any) -> None:
    moe = api.upcycle(model, "sparse-upcycling", experts=2)
    api.save(moe, tmp_path / "moe.safetensors", MODEL)
    torch.save({"state_dict": prefixed(moe.state_dict(), "module.")}, tmp_path / "moe.pt")
    for name in ("moe.safetensors", "moe.pt"):
        assert "is already upcycled (" in refusal(tmp_path / name)


def test_a_dense_file_of_ours_is_a_checkpoint(tmp_path: Path, model: Any, state: State) -> None:
    api.save(model, tmp_path / "ours.safetensors", MODEL)
    assert same(tmp_path / "ours.safetensors", state)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, state: State, value: float) -> None:
    state["transformer.resblocks.1.mlp.c_fc.bias"][3] = value
    torch.save(state, tmp_path / "diverged.pt")
    line = refusal(tmp_path / "diverged.pt")
    assert "transformer.resblocks.1.mlp.c_fc.bias has 1 values of 256 that are NaN or infinite" in line


def test_a_weight_that_is_no_number_in_a_file_of_ours_is_named(tmp_path: Path) -> None:
    """No command of ours writes one; a disk or another tool may."""
    model = api.upcycle(create_clip(MODEL, seed=1).model, "sparse-upcycling", experts=2)
    api.save(model, path := tmp_path / "moe.safetensors", MODEL)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    state["ln_final.bias"][0] = float("nan")
    save_file(state, path, metadata=metadata)
    with pytest.raises(UserError, match=r"ln_final.bias has 1 values of 64 that are NaN or infinite"):
        api.load(tmp_path / "moe.safetensors")
