"""The order of the pairs: equal to a slow, obvious twin; exact epochs; pure; lanes for ranks and workers."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle_bench.data.order import BLOCK, LANES, MIXED, Order, distinct, lanes_of
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

SIZES = st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) >= 2)


def order(sizes: list[int], batch: int, **how: object) -> Order:
    return Order(np.concatenate([[0], np.cumsum(sizes)]), [0] * len(sizes), batch, **how)  # type: ignore[arg-type]


def shuffled(items: list, stream: Stream) -> list:
    return [items[place] for place in torch.randperm(len(items), generator=stream.generator()).tolist()]


def twin(sizes: list[int], batch: int, window: int, seed: int, epoch: int) -> list[list[int]]:
    """All batches of one epoch, by the words of the definition."""
    stream = Stream(("data order", seed, epoch))
    numbers = iter(range(sum(sizes)))
    shards = [list(itertools.islice(numbers, size)) for size in sizes]
    windows: list[list[list[int]]] = [[]]
    for shard in shuffled(shards, stream.child("shards")):
        if sum(map(len, windows[-1])) >= window:
            windows.append([])
        windows[-1].append(shard)
    sequence: list[int] = []
    for number, shards in enumerate(windows):
        blocks = [shard[begin : begin + BLOCK] for shard in shards for begin in range(0, len(shard), BLOCK)]
        for block in shuffled(blocks, stream.child("blocks", number)):
            sequence += block
    share = batch // lanes_of(batch)
    together = -(-MIXED // share)  # batches of a group
    steps = len(sequence) // batch
    batches: list[list[int]] = []
    for number in range(-(-steps // together)):
        group = min(together, steps - number * together)
        lanes = []
        for lane in range(lanes_of(batch)):
            own = [sequence.pop(0) for _ in range(group * share)]
            lanes.append(shuffled(own, stream.child("lanes", number).child(lane)))
        batches += [[pair for lane in lanes for pair in lane[m * share : (m + 1) * share]] for m in range(group)]
    return batches


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(1, 400), st.integers(1, 700), st.integers(0, 3), st.integers(0, 2))
def test_the_order_is_the_twins(sizes: list[int], batch: int, window: int, seed: int, epoch: int) -> None:
    if sum(sizes) <= window:
        window = sum(sizes) - 1
    batch = min(batch, sum(sizes))
    ours, expected = order(sizes, batch, window=window), twin(sizes, batch, window, seed, epoch)
    steps = sum(sizes) // batch
    assert [ours.batch(seed, epoch * steps + step).tolist() for step in range(steps)] == expected
    seen = Counter(pair for rows in expected for pair in rows)
    assert len(seen) == steps * batch and max(seen.values(), default=1) == 1  # an exact epoch


@settings(deadline=None, max_examples=30)
@given(SIZES, st.integers(1, 200), st.booleans(), st.randoms(use_true_random=False))
def test_a_batch_is_a_pure_function(sizes: list[int], batch: int, replacement: bool, random) -> None:
    """Whatever was asked before, and in which order."""
    batch = min(batch, sum(sizes))
    steps = list(range(25))
    first = {step: order(sizes, batch, window=64, replacement=replacement).batch("a", step) for step in steps}
    random.shuffle(steps)
    one = order(sizes, batch, window=64, replacement=replacement)
    for step in steps:
        one.batch("b", random.choice(steps))
        assert torch.equal(one.batch("a", step), first[step])


def test_few_pairs_are_permuted_as_a_whole_as_ever() -> None:
    """The bits of published trainings: `torch.randperm` of all pairs, by the stream of that name."""
    ours = order([30, 25], 10)
    for step in range(11):
        epoch, place = divmod(step, 5)
        whole = torch.randperm(55, generator=Stream(("data order", "x", epoch)).generator())
        assert torch.equal(ours.batch("x", step), whole[place * 10 : place * 10 + 10])


@pytest.mark.parametrize(
    ("batch", "lanes"), [(1, 1), (63, 1), (64, 1), (128, 2), (192, 2), (512, 8), (513, 1), (4096, 64), (32768, 64)]
)
def test_lanes_divide_a_batch(batch: int, lanes: int) -> None:
    assert lanes_of(batch) == lanes <= LANES


def test_a_lane_reads_blocks_side_by_side() -> None:
    """Of the pairs that one lane takes over a group, all but those of the blocks at its two ends are whole blocks."""
    ours = order([6400] * 20, 512, window=12_800)
    group, row = ours.group(0, 5)
    assert (tuple(group.shape), row) == ((16, 512), 5)
    for lane in range(8):
        pairs = group[:, lane * 64 : lane * 64 + 64].flatten()
        blocks = Counter((pairs // BLOCK).tolist())
        assert list(blocks.values()) == [BLOCK] * 16
    assert len(set((group // 6400).flatten().tolist())) == 2  # both shards of the window are in each group
    assert len(set((group[0] // BLOCK).tolist())) > 64  # and a batch has pairs of many blocks


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 9), st.integers(1, 64), st.integers(1, 6), st.integers(1, 9))
def test_cuts_fall_between_lanes(share: int, ranks: int, lanes: int, workers: int) -> None:
    batch = share * ranks * 64
    ours = order([batch] * 3, batch, window=1)
    lane = batch // ours.lanes
    for rank in range(ranks):
        first, last = (batch // ranks * each for each in (rank, rank + 1))
        cuts = ours.cuts(first, last, workers)
        assert (cuts[0], cuts[-1]) == (first, last) and all(a < b for a, b in itertools.pairwise(cuts))
        whole = first % lane == last % lane == 0
        assert len(cuts) - 1 == (min(workers, (last - first) // lane) if whole else 1)
        assert not whole or all(cut % lane == 0 for cut in cuts)
    few = order([batch] * 3, batch)  # permuted as a whole: reads are single anyway
    assert len(few.cuts(0, batch, workers)) - 1 == workers


@pytest.mark.parametrize("replacement", [False, True])
def test_steps_of_one_group_have_one_number(replacement: bool) -> None:
    """Over the ends of epochs: 5,000 pairs are 39 batches of 128, in groups of 16."""
    ours = order([1000] * 5, 128, window=2000, replacement=replacement)
    groups = [ours.group_of(step) for step in range(90)]
    same = [ours.group("a", step)[0] is ours.group("a", step + 1)[0] for step in range(89)]
    assert [a == b for a, b in itertools.pairwise(groups)] == same
    assert groups[0] == 0 and all(b - a in (0, 1) for a, b in itertools.pairwise(groups))
    assert [ours.first_step(group) for group in range(groups[-1] + 1)] == [*map(groups.index, sorted(set(groups)))]


def shares(ours: Order, borders: list[int], pairs: int) -> list[float]:
    """The shares of the pairs between two borders each, in all batches of the first so many pairs."""
    steps = pairs // ours.batch_size
    drawn = torch.cat([ours.batch("a", step) for step in range(steps)]).numpy()
    return (np.histogram(drawn, borders)[0] / len(drawn)).tolist()


def test_with_replacement_every_pair_is_drawn_equally_often() -> None:
    """Whatever its shard's size."""
    sizes = [64, 640, 128, 320, 64, 1280]
    ours = order(sizes, 64, replacement=True, window=5000)
    found = shares(ours, [0, *np.cumsum(sizes).tolist()], 1_000_000)
    assert found == pytest.approx([size / sum(sizes) for size in sizes], rel=0.15)


@pytest.mark.parametrize("weights", [[1.0, 3.0], [1.0, 1.0], [5.0, 0.5]])
def test_weights_are_the_shares_of_the_sources_pairs(weights: list[float]) -> None:
    """Source 0 has shards of 100 and 300 pairs, source 1 those of 1,000, 50 and 50."""
    sizes, source = [100, 1000, 300, 50, 50], [0, 1, 0, 1, 1]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    ours = Order(starts, source, 10, replacement=True, weights=weights, window=20_000)
    found = shares(ours, starts.tolist(), 500_000)
    share = weights[0] / sum(weights)
    assert found[0] + found[2] == pytest.approx(share, abs=0.03)
    assert 3 * found[0] == pytest.approx(found[2], rel=0.2) and found[1] == pytest.approx(20 * found[3], rel=0.25)


def test_weights_hold_for_few_shards_of_very_different_sizes() -> None:
    """A large shard is drawn seldom; no batch at the end of an epoch is left out, which would be most of the small."""
    ours = Order(np.array([0, 100_000, 100_100]), [0, 1], 512, replacement=True, weights=[1.0, 3.0])
    assert shares(ours, [0, 100_000, 100_100], 12_000_000)[1] == pytest.approx(0.75, abs=0.1)


def test_with_replacement_a_late_step_is_found_at_once() -> None:
    """A run of few small shards that goes on at step 100,000 draws some hundred epochs, not millions."""
    ours = order([10, 20], 20, replacement=True)
    late = ours.batch("a", 1_000_000)
    assert len(late) == 20 and len(ours._ends["a"]) < 30
    assert torch.equal(late, order([10, 20], 20, replacement=True).batch("a", 1_000_000))


def test_weights_for_other_sources_are_one_line() -> None:
    with pytest.raises(UserError, match=r"data\.weights has 3 numbers, and the training shards are 1 sources with 20"):
        order([10, 10], 5, replacement=True, weights=[1.0, 2.0, 3.0])
    with pytest.raises(UserError, match=r"2 numbers, .* 2 sources with 10, 0 pairs"):
        Order(np.array([0, 10, 10]), [0, 1], 5, replacement=True, weights=[1.0, 2.0])


def test_fewer_pairs_than_a_batch_are_one_line() -> None:
    with pytest.raises(UserError, match="the training set has 20 pairs, fewer than one batch of 21"):
        order([10, 10], 21)


def test_many_pairs_take_the_memory_of_a_window() -> None:
    """400 million pairs in 40,000 shards: the first group takes no array of all pairs."""
    import tracemalloc

    ours = order([10_000] * 40_000, 16_384)
    tracemalloc.start()
    batch = ours.batch(0, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(batch.tolist())) == 16_384
    assert peak < 100 << 20


def test_distinct_pairs_are_distinct() -> None:
    few = distinct(100, 30, Stream(("a",)))
    assert torch.equal(few, torch.randperm(100, generator=Stream(("a",)).generator())[:30])  # as ever
    many = distinct(400_000_000, 10_000, Stream(("a",)))
    assert (
        len(set(many.tolist())) == 10_000
        and many.max() < 400_000_000
        and many.float().mean() == pytest.approx(2e8, rel=0.05)
    )
    assert len(distinct(5, 30, Stream(("a",)))) == 5
