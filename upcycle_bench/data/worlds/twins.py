"""Twins: a training image that shows an evaluation image's drawing in other colours, negative, mirrored or moved.

    pairs = find_twins(evaluated, trained)      # kind -> (evaluation image, training image)

Two images are compared in a form without colour: grey, stretched so that the darkest pixel is black and the lightest
white. The form of the one may be inverted, mirrored left to right and moved by whole pixels before it is compared with
the form of the other. The search is exact. What is turned, or mirrored top to bottom, is another sign ("up" and "down",
"m" and "w") and no twin. Left and right mean two things too, but many a drawing is mirrored without meaning any.

Shape suffixes: Q queries, N images, H and W pixels, C colours, P pixels in one row, M pairs.
"""

from __future__ import annotations

import numpy as np

from upcycle_bench.data.worlds.near import matches

KINDS = ("recoloured", "inverted", "mirrored", "shifted")  # an image is counted under the first that fits
# Of 255 levels, root mean square. Most icons are #303030 on white; their stretch makes of NEAR's 12 levels 14.8.
TWIN = 14.8
# Nor more than this share of what tells the evaluation image from an empty page: a dot is near to every other dot.
SHARE = 0.25
INK = 32  # a pixel that differs from the page by more levels is ink
CHUNK = 16384  # images that are worked on at a time
LUMA = (299, 587, 114)  # thousandths of red, green and blue in grey


def find_twins(evaluated_QHWC: np.ndarray, trained_NHWC: np.ndarray) -> dict[str, np.ndarray]:
    """Kind -> all pairs (evaluated, trained) of that kind, int64 [M, 2], of images uint8 with three colours."""
    forms_QHW, forms_NHW = stretched(evaluated_QHWC), stretched(trained_NHWC)
    mirrors_QHW = np.ascontiguousarray(forms_QHW[:, :, ::-1])
    moved_QHW, moved_mirrors_QHW = cornered(forms_QHW), cornered(mirrors_QHW)
    bound_Q = bounds(forms_QHW)
    pairs = {
        "recoloured": _pairs([forms_QHW], bound_Q, forms_NHW),
        "inverted": _pairs([255 - forms_QHW], bound_Q, forms_NHW),
        "mirrored": _pairs([mirrors_QHW, 255 - mirrors_QHW], bound_Q, forms_NHW),
    }
    moved = [moved_QHW, 255 - moved_QHW, moved_mirrors_QHW, 255 - moved_mirrors_QHW]
    return pairs | {"shifted": _pairs(moved, bound_Q, cornered(forms_NHW))}


def _pairs(queries: list[np.ndarray], bound_Q: np.ndarray, images_NHW: np.ndarray) -> np.ndarray:
    """All pairs (query, image), int64 [M, 2]; each array uint8 [Q, H, W] of `queries` shows the same drawings."""
    images_NP = images_NHW.reshape(len(images_NHW), -1)
    queries_QP = np.concatenate(queries).reshape(-1, images_NP.shape[1])
    pairs = matches(queries_QP, images_NP, np.tile(bound_Q, len(queries)))
    pairs[:, 0] %= len(bound_Q)
    return np.unique(pairs, axis=0)


def stretched(images_NHWC: np.ndarray) -> np.ndarray:
    """Grey forms uint8 [N, H, W] whose darkest pixel is 0 and whose lightest is 255."""
    forms_NHW = np.empty(images_NHWC.shape[:3], dtype=np.uint8)
    for start in range(0, len(images_NHWC), CHUNK):
        grey = images_NHWC[start : start + CHUNK].astype(np.int32) @ np.array(LUMA, dtype=np.int32)
        low, high = (bound(grey, axis=(1, 2), keepdims=True) for bound in (np.min, np.max))
        span = np.maximum(high - low, 1)
        forms_NHW[start : start + CHUNK] = (255 * (grey - low) + span // 2) // span
    return forms_NHW


def bounds(forms_QHW: np.ndarray) -> np.ndarray:
    """By how many levels a twin may differ from each form, float64 [Q]."""
    ink_QHW = forms_QHW - _page(forms_QHW)
    return np.minimum(TWIN, SHARE * np.sqrt(np.square(ink_QHW).mean(axis=(1, 2), dtype=np.float64)))


def _page(forms_NHW: np.ndarray) -> np.ndarray:
    """The level of the page, float32 [N, 1, 1]: the median of the border, so that an inverted form has its inverse."""
    border = [forms_NHW[:, 0], forms_NHW[:, -1], forms_NHW[:, 1:-1, 0], forms_NHW[:, 1:-1, -1]]
    return np.median(np.concatenate(border, axis=1), axis=1).astype(np.float32)[:, None, None]


def cornered(forms_NHW: np.ndarray) -> np.ndarray:
    """The forms with their ink in the upper left corner; what leaves the page comes in at its other side."""
    height, width = forms_NHW.shape[1:]
    moved_NHW = np.empty_like(forms_NHW)
    for start in range(0, len(forms_NHW), CHUNK):
        form = forms_NHW[start : start + CHUNK]
        ink = abs(form - _page(form)) > INK
        top, left = ink.any(axis=2).argmax(axis=1), ink.any(axis=1).argmax(axis=1)
        rows = (np.arange(height) + top[:, None]) % height
        columns = (np.arange(width) + left[:, None]) % width
        moved_NHW[start : start + CHUNK] = form[np.arange(len(form))[:, None, None], rows[:, :, None], columns[:, None]]
    return moved_NHW
