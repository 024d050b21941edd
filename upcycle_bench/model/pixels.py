"""Settings of the transforms that make pixels of an image: who says them, and that nobody contradicts another.

    settings = agreed([("open_clip_config.json", {"mean": ...}), ("--pixels", {"resize_mode": "squash"})])

Only what differs from open_clip's usual settings is kept: models of usual settings keep their bytes and identities.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from upcycle_bench.util.errors import UserError

PREPROCESS = ("mean", "std", "interpolation", "resize_mode")  # the settings that an open_clip tag may change
CHOICES = {"interpolation": ("bicubic", "bilinear"), "resize_mode": ("shortest", "longest", "squash")}


def checked(settings: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The settings in `PREPROCESS`, of the right form. UserError, which names `place`, for a value that cannot be.

    `size` is that of the model, and is left out.
    """
    if not isinstance(settings, Mapping):
        raise UserError(f"{place}: its settings of pixels are no table of names and values.")
    for key, only in (("mode", "RGB"), ("fill_color", 0)):
        if settings.get(key, only) != only:
            raise UserError(f"{place}: {key} is {settings[key]!r}; only {only!r} is known here.")
    return {key: _value(key, settings[key], place) for key in PREPROCESS if settings.get(key) is not None}


def parsed(texts: Iterable[str]) -> dict[str, Any]:
    """The settings that the option --pixels gives, each KEY=VALUE: `mean=0.5,0.5,0.5`, `resize-mode=squash`."""
    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.replace("-", "_")
        if not equals or key not in PREPROCESS:
            raise UserError(f"--pixels {text}: give one of {', '.join(PREPROCESS)}, such as mean=0.5,0.5,0.5.")
        settings[key] = value.split(",") if key in ("mean", "std") else value
    return checked(settings, "--pixels")


def agreed(said: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """All settings together, without those that are usual. UserError where two places contradict each other."""
    settings: dict[str, tuple[str, Any]] = {}
    for place, values in said:
        for key, value in values.items():
            first, before = settings.setdefault(key, (place, value))
            if before != value:
                raise UserError(f"{key} is {before} by {first}, but {value} by {place}: leave one of them out.")
    usual = usual_settings()
    return {key: settings[key][1] for key in PREPROCESS if key in settings and settings[key][1] != usual[key]}


def usual_settings() -> dict[str, Any]:
    """open_clip's settings where nothing else is said."""
    from open_clip.transform import PreprocessCfg

    return checked(asdict(PreprocessCfg()), "open_clip")


def _value(key: str, value: Any, place: str) -> Any:
    if key in CHOICES:
        if value not in CHOICES[key]:
            raise UserError(f"{place}: {key} is {value!r}; it must be {' or '.join(CHOICES[key])}.")
        return value
    try:
        numbers = tuple(float(each) for each in value)
    except (TypeError, ValueError):
        numbers = ()
    least = 0 if key == "mean" else 1e-6
    if len(numbers) != 3 or not all(least <= number <= 1 for number in numbers):
        raise UserError(f"{place}: {key} is {value!r}; it must be three numbers up to 1, of red, green and blue.")
    return numbers
