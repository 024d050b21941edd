"""Two records side by side: what differs, paired differences with hand-worked numbers, and what is not paired."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from tests.reporting.tampering import BASE, LAB, OTHER, RESULTS, at, fresh
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.reporting.difference import compare, mcnemar
from upcycle_bench.reporting.sent import Here, Sent, open_whole
from upcycle_bench.util.errors import UserError

HERE = Here(load_registry())


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    return fresh(tmp_path)


def record(folder: Path, start: str) -> Sent:
    (path,) = folder.glob(f"{start}-*.json")
    return open_whole(path)


def test_what_was_run_differs_name_by_name(sent: Path) -> None:
    at("protocol.resolved.train.lr_factor", 2.0, OTHER)(sent)
    at("environment.packages.torch", "2.13.0", OTHER)(sent)
    found = compare(record(sent, BASE), record(sent, OTHER), HERE)
    assert found.settings["strategy"]["name"] == ("cluster-aware", "sparse-upcycling")
    assert found.settings["options"]["tau"] == (0.9, None)
    assert found.settings["protocol"] == {"train.lr_factor": (1.0, 2.0)}
    assert found.settings["environment"] == {"packages.torch": ("2.14.1", "2.13.0")}
    assert "seeds" not in found.settings and "data" not in found.settings


def test_nothing_differs_between_a_record_and_itself(sent: Path) -> None:
    found = compare(record(sent, BASE), record(sent, BASE), HERE)
    assert found.settings == {} and found.notes == [] and found.same_table
    assert all(
        score.difference == 0 and score.standard_error is None and score.p in (None, 1) for score in found.scores
    )


def test_differences_are_paired_over_samples(sent: Path) -> None:
    one, other = record(sent, BASE), record(sent, OTHER)
    found = compare(one, other, HERE)
    (score,) = [each for each in found.scores if (each.dataset, each.metric) == ("digits-test", "acc1")]
    right = [each.outcomes["zero-shot/digits-test/rank"] < 1 for each in (one, other)]
    gained, lost = int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum())
    samples = len(right[0])
    assert score.difference == pytest.approx((gained - lost) / samples)
    # The variance of a difference of -1, 0 and 1, over n - 1, and that of its mean.
    variance = (gained + lost - (gained - lost) ** 2 / samples) / (samples - 1)
    assert score.standard_error == pytest.approx(np.sqrt(variance / samples))
    assert score.p == mcnemar(*right)
    unpaired = np.hypot(*(np.std(each) / np.sqrt(samples) for each in right))
    assert score.standard_error < unpaired
    assert found.headlines["in-distribution"].difference == pytest.approx(
        other.record.headlines["in-distribution"].value - one.record.headlines["in-distribution"].value
    )


def test_a_mean_over_sets_has_the_error_of_the_sets(sent: Path) -> None:
    other = sent / "other"
    other.mkdir()
    for file in (RESULTS / "lab").glob("drop-upcycling-*"):
        shutil.copy(file, other / file.name)
    found = {
        (each.dataset, each.metric): each for each in compare(record(sent, LAB), record(other, "drop"), HERE).scores
    }
    sets = ["carbon", "game-icons", "glyphs", "openmoji", "pepicons", "ri"]
    errors = [found[f"test-{name}", "acc1"].standard_error for name in sets]
    mean = found["average/shift", "acc1"]
    assert mean.standard_error == pytest.approx(np.sqrt(np.square(errors).sum()) / 6)
    assert mean.interval == pytest.approx(
        (mean.difference - 1.96 * mean.standard_error, mean.difference + 1.96 * mean.standard_error), abs=1e-5
    )


def test_mcnemar_by_hand() -> None:
    # Of 10 samples that one run alone has right, it is 1 against 9: 2 (1 + 10) / 2^10.
    before = np.array([True] * 1 + [False] * 9 + [True] * 50)
    after = np.array([False] * 1 + [True] * 9 + [True] * 50)
    assert mcnemar(before, after) == pytest.approx(22 / 1024)
    assert mcnemar(before, before) == 1
    assert mcnemar(after, before) == mcnemar(before, after) == pytest.approx(2 * binom.cdf(1, 10, 0.5))


def test_scores_of_other_settings_are_not_paired(sent: Path) -> None:
    at("protocol.suite_fingerprints.zero-shot", "b" * 16, OTHER)(sent)
    found = compare(record(sent, BASE), record(sent, OTHER), HERE)
    assert not found.same_table and any("zero-shot" in note for note in found.notes)
    assert all(score.standard_error is None and score.p is None for score in found.scores)


def test_nothing_in_common_is_refused_in_one_line(sent: Path) -> None:
    with pytest.raises(UserError, match="no score in common") as raised:
        compare(record(sent, BASE), record(sent, LAB), HERE)
    assert "\n" not in str(raised.value)
