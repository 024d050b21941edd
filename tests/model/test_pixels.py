"""Settings of pixels: who says them, and the lines for what cannot be."""

from typing import Any

import pytest

from upcycle_bench.model.pixels import agreed, checked, parsed, usual_settings
from upcycle_bench.util.errors import UserError


def test_only_what_is_not_usual_is_kept() -> None:
    assert agreed([("a", usual_settings()), ("b", {"resize_mode": "shortest"})]) == {}
    assert agreed([("a", {"mean": (0.5, 0.5, 0.5)}), ("b", {}), ("c", {"mean": (0.5, 0.5, 0.5)})]) == {
        "mean": (0.5, 0.5, 0.5)
    }


def test_a_usual_value_contradicts_another_one() -> None:
    with pytest.raises(UserError, match=r"resize_mode is shortest by a, but squash by b: leave one of them out"):
        agreed([("a", usual_settings()), ("b", {"resize_mode": "squash"})])


def test_the_option() -> None:
    found = parsed(["mean=0.5,0.25,0", "std=1,1,1", "resize-mode=squash", "interpolation=bilinear"])
    assert found == {
        "mean": (0.5, 0.25, 0),
        "std": (1, 1, 1),
        "resize_mode": "squash",
        "interpolation": "bilinear",
    }


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("mean", "--pixels mean: give one of mean, std, interpolation, resize_mode"),
        ("size=224", "--pixels size=224: give one of"),
        ("mean=0.5", "--pixels: mean is ['0.5']; it must be three numbers up to 1"),
        ("std=0,0,0", "it must be three numbers up to 1"),
        ("mean=nan,0,0", "it must be three numbers up to 1"),
        ("interpolation=nearest", "interpolation is 'nearest'; it must be bicubic or bilinear"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(text: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed([text])
    assert line in str(caught.value)


@pytest.mark.parametrize(("settings", "line"), [({"mode": "L"}, "mode is 'L'; only 'RGB'"), ({"mean": 3}, "mean is 3")])
def test_settings_of_other_kinds(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        checked(settings, "here")
