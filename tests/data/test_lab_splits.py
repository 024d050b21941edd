"""The lab's splits, function by function; `test_lab.py` looks at the splits of a whole lab."""

from __future__ import annotations

import numpy as np
import pytest

from upcycle_bench.data.worlds import lab_splits
from upcycle_bench.data.worlds.icons import Family, Icons


def test_a_held_out_group_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lab_splits, "HELD_OUT", {"kappa": ("dev", "")})
    pages = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    pages[:, :16] = 255
    lone = Family("lone", "", "", "MIT", "", (), ("a", "b"), ("", ""), 0, 0)
    with pytest.raises(AssertionError, match="kappa"):
        lab_splits.tabulate(Icons([lone], pages, np.ones(2, dtype=bool), {}))


def test_a_share_of_the_drawings_is_held_for_each_purpose(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lab_splits, "HELD_SHARE", 0.03)
    splits = [lab_splits.split_of("group", f"name-{n}") for n in range(10_000)]
    # 300 expected of 10,000, standard deviation 17
    assert all(abs(splits.count(split) - 300) < 85 for split in ("validation", "temperature"))
    assert set(splits) == {"train", "validation", "temperature"}


def test_what_is_named_like_a_training_icon_leaves_evaluation():
    names = ["add", "add-line", "bell-duo", "bell-duo-line", "cat", "cat-line", "dog-house", "dog"]
    splits = ["train", "validation", "temperature", "near", "validation", "validation", "train", "validation"]
    columns = [["g"] * len(names), ["g"] * len(names), names, names, names, [""] * len(names), names]
    table = lab_splits.Table(np.arange(len(names)), *columns, np.array(splits, dtype=object))
    lab_splits.drop_variants(table)
    changed = ["train", "variant", "variant", "near", "validation", "validation", "train", "validation"]
    assert table.split.tolist() == changed  # "house" is no style
