"""Twins: hand-made copies of each kind are found and other drawings are not; the search against its definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from upcycle_bench.data.worlds import lab_splits, twins
from upcycle_bench.data.worlds.twins import KINDS, SHARE, TWIN, bounds, cornered, find_twins, stretched

PAGE, INK = 255, 48


def drawn(seed: int, side: int = 20, top: int = 4, left: int = 7) -> np.ndarray:
    """A drawing of its own for each seed, uint8 [32, 32, 3]: cells of four pixels, ink in two opposite corners."""
    rng = np.random.default_rng(seed)
    cells = rng.random((side // 4, side // 4)) < 0.5
    cells[[0, -1], [0, -1]] = True
    cells[0, -1] = False  # so that no drawing is its own mirror image
    cells[-1, 0] = True
    page = np.full((32, 32, 3), PAGE, dtype=np.uint8)
    page[top : top + side, left : left + side][np.kron(cells, np.ones((4, 4))) > 0] = INK
    return page


def painted(image: np.ndarray, ink: tuple[int, int, int], page: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """The drawing in other colours; between ink and page in proportion."""
    share = (PAGE - image.astype(float)) / (PAGE - INK)
    return np.rint(share * ink + (1 - share) * page).astype(np.uint8)


def moved(image: np.ndarray) -> np.ndarray:
    return np.roll(image, (5, -3), axis=(0, 1))


COPIES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "the same": ("recoloured", lambda image: image),
    "red": ("recoloured", lambda image: painted(image, (200, 30, 30))),
    "a skin tone": ("recoloured", lambda image: painted(image, (120, 80, 60), (250, 220, 190))),
    "pale": ("recoloured", lambda image: painted(image, (200, 200, 220))),
    "negative": ("inverted", lambda image: PAGE - image),
    "white on blue": ("inverted", lambda image: painted(image, (255, 255, 255), (20, 40, 160))),
    "mirrored": ("mirrored", lambda image: image[:, ::-1]),
    "mirrored, red": ("mirrored", lambda image: painted(image, (200, 30, 30))[:, ::-1]),
    "mirrored, negative": ("mirrored", lambda image: PAGE - image[:, ::-1]),
    "moved": ("shifted", moved),
    "moved, red": ("shifted", lambda image: moved(painted(image, (200, 30, 30)))),
    "moved, negative": ("shifted", lambda image: moved(PAGE - image)),
    "moved, mirrored": ("shifted", lambda image: moved(image[:, ::-1])),
    "moved, mirrored, negative": ("shifted", lambda image: moved(PAGE - image[:, ::-1])),
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_is_found_as_its_kind_and_as_nothing_before(copy: str):
    kind, change = COPIES[copy]
    evaluated = np.stack([drawn(seed) for seed in range(6)])
    trained = np.stack([*(drawn(seed) for seed in range(100, 110)), change(drawn(2)), change(drawn(4))])
    pairs = find_twins(evaluated, trained)
    assert list(pairs) == list(KINDS)
    assert pairs[kind].tolist() == [[2, 10], [4, 11]]
    assert all(not len(pairs[earlier]) for earlier in KINDS[: KINDS.index(kind)])


@pytest.mark.parametrize(
    "change",
    [
        lambda image: np.rot90(image),  # turned: of an arrow another arrow
        lambda image: image[::-1],
        lambda image: np.where(np.arange(32)[:, None, None] < 16, image, PAGE),  # half of it
        lambda image: np.kron(image[4:20, 7:23], np.ones((2, 2, 1))).astype(np.uint8),  # larger
    ],
)
def test_another_drawing_is_no_twin(change: Callable[[np.ndarray], np.ndarray]):
    evaluated = np.stack([drawn(seed) for seed in range(6)])
    pairs = find_twins(evaluated, np.stack([change(image) for image in evaluated]))
    assert all(not len(found) for found in pairs.values())


def test_forms_are_grey_and_have_full_contrast():
    image = np.full((32, 32, 3), 200, dtype=np.uint8)
    image[0, 0], image[1, 1] = 100, 150
    (form,) = stretched(image[None])
    assert (form[0, 0], form[1, 1], form[2, 2]) == (0, 128, 255)  # 127.5 is rounded up
    colours = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    colours[0, 0, :3] = np.eye(3) * 255
    colours[0, 1] = 255
    assert stretched(colours)[0, 0, :4].tolist() == [76, 150, 29, 0]


def test_an_image_of_one_grey_has_no_contrast_to_stretch():
    assert not stretched(np.full((1, 32, 32, 3), 77, dtype=np.uint8)).any()


def test_ink_goes_to_the_corner_and_faint_pixels_with_it():
    form = np.full((32, 32), 255, dtype=np.uint8)
    form[10, 12], form[8, 20], form[9, 11] = 0, 30, 230  # the last is no ink
    (cornered_form,) = cornered(form[None])
    assert cornered_form[2, 0] == 0 and cornered_form[0, 8] == 30 and cornered_form[1, -1] == 230
    assert sorted(cornered_form.ravel()) == sorted(form.ravel())
    assert np.array_equal(cornered(255 - form[None]), 255 - cornered(form[None]))


def test_a_dot_is_no_twin_of_every_other_dot():
    dots = np.full((2, 32, 32, 3), PAGE, dtype=np.uint8)
    dots[0, 4:6, 4:6], dots[1, 4:5, 4:6] = INK, INK
    difference = np.sqrt((np.subtract(*stretched(dots).astype(float)) ** 2).mean())
    assert difference < TWIN
    assert all(not len(found) for found in find_twins(dots[:1], dots[1:]).values())
    assert [len(found) for found in find_twins(dots[:1], dots[:1]).values()] == [1, 0, 0, 1]
    few, many = bounds(stretched(np.stack([dots[0], drawn(0)])))
    assert few == pytest.approx(SHARE * 255 * np.sqrt(4 / 1024)) and many == TWIN


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    images = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)
    forms, corners = stretched(images), cornered(stretched(images))
    monkeypatch.setattr(twins, "CHUNK", 4)
    assert np.array_equal(stretched(images), forms) and np.array_equal(cornered(forms), corners)


def by_hand(evaluated: np.ndarray, trained: np.ndarray) -> dict[str, list[list[int]]]:
    """The definition, pair by pair, in whole numbers."""
    same = {"recoloured": [(False, False)], "inverted": [(True, False)], "mirrored": [(False, True), (True, True)]}
    turns = {**same, "shifted": [(negative, mirror) for negative in (False, True) for mirror in (False, True)]}
    found: dict[str, list[list[int]]] = {kind: [] for kind in KINDS}
    for query, image in enumerate(stretched(evaluated)):
        for other, form in enumerate(stretched(trained)):
            for kind, ways in turns.items():
                for negative, mirror in ways:
                    shown = image[:, ::-1] if mirror else image
                    shown = 255 - shown if negative else shown
                    one, two = (cornered(a[None])[0] if kind == "shifted" else a for a in (shown, form))
                    difference = one.astype(int) - two
                    limit = min(TWIN, SHARE * np.sqrt(((image - 255.0) ** 2).mean())) ** 2 * difference.size
                    if (difference**2).sum() <= limit and [query, other] not in found[kind]:
                        found[kind].append([query, other])
    return found


def test_the_search_is_exact():
    """Against the definition, on copies of all kinds with noise that puts them on both sides of the bound."""
    rng = np.random.default_rng(3)
    evaluated = np.stack([drawn(seed % 8, top=2 + seed % 5, left=seed) for seed in range(12)])
    evaluated[5:7, :, :15] = PAGE  # little ink, where the bound is a share of it
    copies = [change(image) for image in evaluated[:8] for _, change in COPIES.values()]
    noise = rng.integers(-1, 2, (len(copies), 32, 32, 1)) * rng.choice([0, 8, 12, 16, 20], (len(copies), 1, 1, 1))
    trained = np.clip(np.stack(copies).astype(int) + noise, 0, 255).astype(np.uint8)
    expected = by_hand(evaluated, trained)
    assert {kind: pairs.tolist() for kind, pairs in find_twins(evaluated, trained).items()} == expected
    assert all(len(pairs) > 5 for pairs in expected.values())


def test_twins_leave_evaluation_and_never_training():
    """Every kind is counted once, under the first that fits; icons that are in no set already stay where they are."""
    images = [drawn(0), drawn(1), drawn(2), drawn(3), drawn(4), drawn(5), drawn(6)]
    splits = ["validation", "dev-a", "temperature", "test-b", "validation", "near", "variant"]
    copies = [painted(images[0], (200, 30, 30)), PAGE - images[1], images[2][:, ::-1], moved(images[3])]
    copies += [PAGE - images[0], PAGE - images[5], PAGE - images[6], drawn(20)]
    images += copies
    splits += ["train"] * len(copies)
    blank = np.zeros((32, 32, 3), dtype=np.uint8)  # icons that are in no table
    columns = [[""] * len(images)] * 7
    table = lab_splits.Table(np.arange(1, len(images) + 1), *columns, np.array(splits, dtype=object))
    counts = lab_splits.drop_twins(table, np.stack([blank, *images, blank]))
    assert counts == {"recoloured": 1, "inverted": 1, "mirrored": 1, "shifted": 1}
    assert table.split.tolist() == ["twin"] * 4 + ["validation", "near", "variant"] + ["train"] * len(copies)
