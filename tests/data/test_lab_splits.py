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


def without_variants(
    names: list[str], splits: list[str], groups: list[str] | None = None, drawings: list[str] | None = None
) -> list[str]:
    """The splits after `drop_variants`; one group, and drawings called like the icons, unless told."""
    empty = [""] * len(names)
    columns = [empty, groups or ["g"] * len(names), names, names, drawings or names, empty, names]
    table = lab_splits.Table(np.arange(len(names)), *columns, np.array(splits, dtype=object))
    lab_splits.drop_variants(table)
    return table.split.tolist()


def test_what_is_named_like_a_training_icon_leaves_evaluation():
    names = ["add", "add-line", "bell-duo", "bell-duo-line", "cat", "cat-line", "dog-house", "dog"]
    splits = ["train", "validation", "temperature", "near", "validation", "validation", "train", "validation"]
    changed = ["train", "variant", "variant", "near", "validation", "validation", "train", "validation"]
    assert without_variants(names, splits) == changed  # "house" is no style


def test_negative_dark_icon_and_wordmark_make_variants_in_either_direction():
    names = ["foot-negative", "foot", "foot-outline-24px", "x", "x-icon", "y-wordmark", "y-dark", "z-dark", "z-cat"]
    splits = ["train", "validation", "validation", "train", "temperature", "validation", "near", "dev-g", "dev-g"]
    changed = ["train", "variant", "variant", "train", "variant", "variant", "near", "dev-g", "dev-g"]
    assert without_variants(names, splits) == changed


def test_every_icon_of_that_name_leaves_and_none_of_another_group():
    """A group has several families, and so a name more than once."""
    names = ["foot", "foot", "foot", "foot-negative"]
    splits = ["validation"] * 3 + ["train"]
    assert without_variants(names, splits, ["g", "g", "h", "g"]) == ["variant", "variant", "validation", "train"]


def test_a_twin_stays_a_twin():
    assert without_variants(["foot", "foot-dark"], ["twin", "train"]) == ["twin", "train"]


def test_drawings_count_as_names():
    """What the families' declared styles tell: "foot-wavy" and "foot-negative" are one if a family declares "wavy"."""
    assert without_variants(["foot-wavy", "foot-dark"], ["validation", "train"]) == ["validation", "train"]
    found = without_variants(["foot-wavy", "foot-dark"], ["validation", "train"], drawings=["foot", "foot-dark"])
    assert found == ["variant", "train"]
