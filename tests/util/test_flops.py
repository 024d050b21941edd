"""The FLOP counter against PyTorch's own, on all operations that this project counts."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tests.helpers import captions, tiny_clip, upcycled
from upcycle_bench.model import padding
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.strategy import configure
from upcycle_bench.util.flops import FlopCounter, counted_flops, counted_once, counting, flop_formulas, uncounted


def by_pytorch(work: Callable[[], Any]) -> int:
    formulas = {key: partial(formula) for key, formula in flop_formulas().items() if key not in flop_registry}
    for formula in formulas.values():
        formula._get_raw = True  # type: ignore[attr-defined]  # our formulas turn tensors into shapes themselves
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return counter.get_total_flops()


def by_us(work: Callable[[], Any]) -> int:
    with FlopCounter() as counter:
        work()
    return counter.get_total_flops()


def model_of(kind: str) -> Any:
    clip = tiny_clip()
    if kind == "dense":
        return clip.model
    strategy = configure(load_registry().get("strategy", "sparse-upcycling").target, {})
    return upcycled(strategy, clip, seed=0).model


def images_of(model: Any, count: int) -> Tensor:
    return torch.rand(count, 3, *model.visual.image_size)


@pytest.mark.parametrize("kind", ["dense", "upcycled"])
@pytest.mark.parametrize("mode", ["evaluation", "inference mode", "training"])
def test_the_count_is_pytorchs(kind: str, mode: str) -> None:
    model = model_of(kind).train(mode == "training")
    images, texts = images_of(model, 3), captions([3, 6, 4], model.context_length, torch.Generator().manual_seed(0))

    def work() -> None:
        image_BD, text_BD = model.encode_image(images), padding.encode_text(model, texts)
        scores = F.normalize(image_BD, dim=1) @ F.normalize(text_BD, dim=1).T
        if mode == "training":
            F.cross_entropy(scores, torch.arange(3)).backward()

    guard = {"evaluation": torch.no_grad, "inference mode": torch.inference_mode, "training": nullcontext}[mode]
    with guard():
        ours, theirs = by_us(work), by_pytorch(work)
    assert ours == theirs > 10**5


def test_other_operations_are_counted_as_pytorch_does() -> None:
    image, sequence = torch.rand(2, 3, 8, 8), torch.rand(2, 4, 6, 8)
    convolution = nn.Conv2d(3, 5, 3)
    works: list[Callable[[], Any]] = [
        lambda: convolution(image).sum().backward(),
        lambda: F.scaled_dot_product_attention(sequence, sequence, sequence),
        lambda: torch.baddbmm(torch.zeros(2, 4, 4), torch.rand(2, 4, 3), torch.rand(2, 3, 4)),
        lambda: torch.einsum("abcd,abed->abce", sequence, sequence),
        lambda: sequence.exp().sum(),
    ]
    counts = [by_us(work) for work in works]
    assert counts == [by_pytorch(work) for work in works]
    assert counts[2] == 2 * 2 * 4 * 3 * 4
    assert min(counts[:4]) > 0 == counts[4]


def test_counting_changes_no_number() -> None:
    model = model_of("upcycled").eval()
    images = images_of(model, 3)
    before = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        with counted_flops() as counter:
            assert not torch.backends.mha.get_fastpath_enabled()
            counted = model.encode_image(images)
        assert torch.backends.mha.get_fastpath_enabled() is before
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            plain = model.encode_image(images)
        finally:
            torch.backends.mha.set_fastpath_enabled(before)
    assert torch.equal(counted, plain) and counter.get_total_flops() > 0


def test_what_is_uncounted_is_left_out_and_counting_goes_on() -> None:
    product = partial(torch.mm, torch.rand(2, 3), torch.rand(3, 4))
    with FlopCounter() as outer:
        product()
        with FlopCounter() as inner:
            with uncounted():
                assert not counting()
                product()
            with pytest.raises(ZeroDivisionError), uncounted():
                1 / 0  # noqa: B018
            product()
        assert counting()
        product()
    assert not counting()
    assert (inner.get_total_flops(), outer.get_total_flops()) == (
        48,
        3 * 48,
    )  # the outer counter also counts within the inner one


def test_work_of_a_kind_is_watched_once_and_counted_each_time() -> None:
    watched: list[bool] = []
    known: dict[Any, int] = {}

    def product() -> None:
        with counted_once(known, "product"):
            watched.append(counting())
            torch.mm(torch.rand(2, 3), torch.rand(3, 4))

    product()  # without a counter it leaves `known` empty
    with FlopCounter() as outer:
        with FlopCounter() as inner:
            with pytest.raises(ZeroDivisionError), counted_once(known, "product"):
                1 / 0  # noqa: B018  # a block that raises leaves `known` empty
            product()
            product()
            product()
        product()
    assert (inner.get_total_flops(), outer.get_total_flops()) == (3 * 48, 4 * 48)
    assert watched == [False, True, False, False, False]


def test_counters_go_on_where_another_mode_is_active_within_them() -> None:
    known: dict[Any, int] = {}

    def product() -> None:
        with counted_once(known, "product"):
            torch.mm(torch.rand(2, 3), torch.rand(3, 4))
        with uncounted():
            torch.rand(2)

    with FlopCounter() as outer:
        product()
        with FlopCounterMode(display=False) as theirs:
            product()
            with FlopCounter() as inner:
                product()
        product()
    assert (outer.get_total_flops(), theirs.get_total_flops(), inner.get_total_flops()) == (4 * 48, 2 * 48, 48)


def test_each_thread_counts_for_itself() -> None:
    product = partial(torch.mm, torch.rand(2, 3), torch.rand(3, 4))

    def elsewhere() -> int:
        assert not counting()
        with uncounted():
            product()
        with FlopCounter() as own:
            product()
        return own.get_total_flops()

    with FlopCounter() as counter, ThreadPoolExecutor(1) as thread:
        assert thread.submit(elsewhere).result() == 48
        assert counting()
        product()
    assert counter.get_total_flops() == 48
