"""Near-identical images: against a double loop over all pairs, on all pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle_bench.data.worlds import near
from upcycle_bench.data.worlds.near import components, matches, near_pairs

RMS = 12.0


def by_hand(images_NP: np.ndarray, queries_Q: np.ndarray, rms: float) -> list[tuple[int, int]]:
    """The definition, pair by pair, in whole numbers."""
    found = []
    for query in sorted(queries_Q.tolist()):
        for other in range(len(images_NP)):
            squares = ((images_NP[query].astype(int) - images_NP[other].astype(int)) ** 2).sum()
            if other != query and squares <= rms**2 * images_NP.shape[1]:
                found.append((query, other))
    return found


def agree(images_NP: np.ndarray, queries_Q: np.ndarray, rms: float = RMS) -> list[tuple[int, int]]:
    pairs = near_pairs(images_NP, queries_Q, rms)
    assert pairs.dtype == np.int64 and pairs.shape[1:] == (2,)
    found = [tuple(pair) for pair in pairs.tolist()]
    assert found == by_hand(images_NP, queries_Q, rms)
    return found


def planted(rng: np.random.Generator, originals: int, pixels: int) -> np.ndarray:
    """Random images, each followed by copies that differ by just under, exactly and just over `RMS`."""
    rows = []
    for _ in range(originals):
        image = rng.integers(40, 216, pixels)
        signs = rng.choice([-1, 1], pixels)
        exact = image + 12 * signs  # every pixel by 12: root mean square 12, not more
        under, over = exact.copy(), exact.copy()
        under[0] -= signs[0]
        over[0] += signs[0]
        rows += [image, image, under, exact, over, image + 30 * signs]
    return np.array(rows, dtype=np.uint8)[rng.permutation(6 * originals)]


# Fewer pixels than COORDINATES, as many, and more.
@pytest.mark.parametrize("pixels", [2, 3, 12, 31, 32, 33, 108, 768])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_copies_around_the_bound(pixels: int, seed: int):
    rng = np.random.default_rng((seed, pixels))
    images = planted(rng, 12, pixels)
    found = agree(images, np.arange(len(images)))
    assert found == sorted((b, a) for a, b in found)  # with all rows as queries, both ways round
    agree(images, rng.choice(len(images), 17, replace=False))  # queries in any order


def test_the_bound_itself_is_near_and_one_level_more_is_not():
    image = np.full(48, 100, dtype=np.uint8)
    exact, over = image + 12, image + 12
    over[0] += 1  # 47 * 144 + 169 > 48 * 144
    images = np.stack([image, exact.astype(np.uint8), over.astype(np.uint8)])
    assert near_pairs(images, np.array([0]), RMS).tolist() == [[0, 1]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_small_images(data: st.DataObject):
    pixels, number = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    spread = data.draw(st.sampled_from([0, 3, 12, 25, 255]))  # all equal, nearly all near, hardly any
    images = rng.integers(0, spread + 1, (number, pixels), dtype=np.uint8)
    queries = np.flatnonzero(rng.random(number) < data.draw(st.sampled_from([0.0, 0.3, 1.0])))
    agree(images, queries, data.draw(st.sampled_from([4.0, RMS, 60.0])))


def test_black_and_white_drawings():
    """Like icons: few distinct levels, a page that is mostly white, many images that differ in few coordinates."""
    rng = np.random.default_rng(5)
    pages = np.full((150, 8, 8, 3), 255, dtype=np.uint8)
    for page in pages:
        top, left = rng.integers(0, 5, 2)
        page[top : top + 3, left : left + 2] = 48
    pages[100:] = np.clip(pages[:50].astype(int) - rng.integers(0, 20, (50, 1, 1, 1)), 0, 255)
    assert agree(pages.reshape(150, -1), np.arange(0, 150, 2))


def test_identical_images_are_near_all_of_each_other():
    images = np.full((5, 40), 77, dtype=np.uint8)
    assert len(agree(images, np.arange(5))) == 20


def test_no_queries_and_a_single_image():
    images = np.zeros((3, 10), dtype=np.uint8)
    assert near_pairs(images, np.zeros(0, dtype=np.int64), RMS).shape == (0, 2)
    assert near_pairs(images[:1], np.array([0]), RMS).shape == (0, 2)


@pytest.mark.parametrize("pixels", [3, 40, 300])
def test_matches_of_images_that_are_not_among_the_others(pixels: int):
    rng = np.random.default_rng(pixels)
    images = planted(rng, 20, pixels)
    queries, others = np.split(rng.permutation(images), [40])
    both = np.concatenate([queries, others])
    asked = [(query, other - 40) for query, other in by_hand(both, np.arange(40), RMS) if other >= 40]
    assert asked and [tuple(pair) for pair in matches(queries, others, RMS).tolist()] == asked
    far = 255 - queries // 4  # hardly any of them is near: the projection is fitted to the others
    expected = [pair for pair in by_hand(np.concatenate([far, others]), np.arange(40), RMS) if pair[1] >= 40]
    assert matches(far, others, RMS).tolist() == [[query, other - 40] for query, other in expected]
    own = rng.choice([4.0, RMS, 60.0], 40)  # a bound for each query
    within = {rms: set(by_hand(both, np.flatnonzero(own == rms), rms)) for rms in set(own.tolist())}
    expected = sorted(pair for found in within.values() for pair in found if pair[1] >= 40)
    assert matches(queries, others, own).tolist() == [[query, other - 40] for query, other in expected]
    assert matches(queries, others[:0], RMS).shape == matches(queries[:0], others, RMS).shape == (0, 2)


def test_strips_blocks_and_a_fit_to_a_sample(monkeypatch: pytest.MonkeyPatch):
    """The same pairs where the queries fill several blocks and the projection saw only some of the images."""
    monkeypatch.setattr(near, "BLOCK", 7)
    monkeypatch.setattr(near, "FITTED", 20)
    monkeypatch.setattr(near, "COORDINATES", 4)
    images = planted(np.random.default_rng(9), 30, 27)
    agree(images, np.arange(0, len(images), 2))


def test_components():
    pairs = np.array([[0, 3], [3, 5], [1, 2], [2, 1]])
    number = components(7, pairs)
    assert number.shape == (7,)
    same = number[:, None] == number[None]
    groups = [{0, 3, 5}, {1, 2}, {4}, {6}]
    assert all(same[a, b] == any({a, b} <= group for group in groups) for a in range(7) for b in range(7))
    assert len(set(components(4, np.zeros((0, 2), dtype=np.int64)))) == 4
