"""Embeddings of images: in the order of the set, shown to the witness, with the FLOPs of every image; errors."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from upcycle_bench.data import evalset, evalset_write
from upcycle_bench.evaluation.features import encode_images
from upcycle_bench.model import backends
from upcycle_bench.suite import EvalContext
from upcycle_bench.util.flops import counted_flops, counting

CPU = torch.device("cpu")
PROJECTION = torch.randn(6 * 6 * 3, 4, generator=torch.Generator().manual_seed(0))


def transform(image: Image.Image) -> Tensor:
    pixels: Tensor = pil_to_tensor(image)
    return pixels.float()


@pytest.fixture(params=[1, 2, 5])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A set of 1, 2 or 5 images."""
    pixels = np.random.default_rng(0).integers(0, 256, (request.param, 6, 6, 3), dtype=np.uint8)
    samples = [(Image.fromarray(p), number % 2) for number, p in enumerate(pixels)]
    evalset_write.write_classification(tmp_path / "x", samples, ("a", "b"), ("{c}",))
    return tmp_path / "x"


def encoded(
    folder: Path, encode: Callable[[Tensor], Tensor], batch_size: int = 1, **more: Any
) -> tuple[Tensor, list[Any]]:
    model: Any = SimpleNamespace(encode_image=encode)
    context = EvalContext(
        model=model,
        tokenizer=lambda texts: torch.zeros(len(texts), 1, dtype=torch.long),
        transform=transform,
        root=folder.parent,
        device=CPU,
        batch_size=batch_size,
        **more,
    )
    return encode_images(evalset.read(folder, transform, batch_size), context)


def test_embeddings_flops_and_what_a_witness_sees(folder: Path) -> None:
    seen: list[Tensor] = []

    def encode(images_B3HW: Tensor) -> Tensor:
        return images_B3HW.flatten(1) @ PROJECTION

    def witness(_model: Any, encode: Any, inputs: Tensor, embedded: Tensor) -> None:
        assert torch.equal(torch.nn.functional.normalize(encode(inputs), dim=-1), embedded)
        seen.append(embedded)

    with counted_flops() as counter:
        features_NC, labels = encoded(folder, encode, on_encoded=witness)
    count = len(features_NC)
    assert [int(label) for label in labels] == [number % 2 for number in range(count)]
    assert len(seen) == count and torch.equal(torch.cat(seen), features_NC) and not features_NC.requires_grad
    assert len(features_NC.unique(dim=0)) == count
    assert counter.get_total_flops() == 2 * count * 2 * PROJECTION.numel()  # twice as many, as the witness encodes too
    expected = torch.cat([encode(images) for images, _ in evalset.read(folder, transform, 1).batches])
    assert torch.equal(features_NC, torch.nn.functional.normalize(expected, dim=-1))


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("backend", ["", "deepspeed"])
def test_the_flops_are_those_of_every_image(
    folder: Path, batch_size: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(backends.VARIABLE, backend)
    watched: list[bool] = []

    def encode(images_B3HW: Tensor, width: int = 0) -> Tensor:
        watched.append(counting())
        return images_B3HW.flatten(1) @ (PROJECTION[:, :width] if width else PROJECTION)

    with counted_flops() as counter:
        features_NC, _ = encoded(folder, encode, batch_size=batch_size)
        seen = tuple(watched)
        encoded(folder, partial(encode, width=1), batch_size=batch_size)  # a second model, with the same images
    count, (pixels, width) = len(features_NC), PROJECTION.shape
    assert counter.get_total_flops() == count * 2 * pixels * (width + 1) > 0
    assert len(seen) == -(-count // batch_size)
    sizes = 1 + (count > batch_size and count % batch_size > 0)
    if backend:  # the router decides how many rows DeepSpeed's layer computes, so every batch is counted
        assert all(watched)
    else:  # the first batch of each size is counted
        assert sum(seen) == sizes


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_of_the_model_ends_the_encoding(tmp_path: Path, broken: int) -> None:
    samples = [(Image.fromarray(np.full((6, 6, 3), number, dtype=np.uint8)), 0) for number in range(4)]
    evalset_write.write_classification(tmp_path / "x", samples, ("a",), ("{c}",))
    done: list[int] = []

    def encode(images_B3HW: Tensor) -> Tensor:
        number = int(images_B3HW[0, 0, 0, 0])
        if number == broken:
            raise ZeroDivisionError
        done.append(number)
        return images_B3HW.flatten(1) @ PROJECTION

    with pytest.raises(ZeroDivisionError):
        encoded(tmp_path / "x", encode)
    assert done == list(range(broken))
