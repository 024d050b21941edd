"""Checkpoints of a tiny model for tests: whether one loads, and the line with which one is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from upcycle_bench.model.clip import create_clip
from upcycle_bench.util.errors import UserError

MODEL = "smoke-vit"
State = dict[str, Tensor]


def random_state() -> State:
    """The state dict of the tiny model with random weights."""
    return dict(create_clip(MODEL, seed=1).model.state_dict())


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
    """The same tensors with that before each name."""
    return {f"{prefix}{key}": value for key, value in state.items()}
