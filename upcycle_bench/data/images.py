"""An image file as RGB pixels, or one line that says why it is neither trained on nor scored.

    image = rgb(content)                                    # BadImage, with its fault
    shown = without_alpha(content, image)                   # None where nothing is transparent

Pillow reads what it can, and `convert` drops what RGB cannot hold: alpha, and all above 8 bits. What is read here has
the pixels of open_clip and CLIP_benchmark, which convert likewise. What they would spoil, or die of, is refused.
"""

from __future__ import annotations

import io
import warnings
from typing import Literal

from PIL import Image

RATIO = 1000  # of the sides, at most. Resized to 224 pixels, the shorter side makes 50 million pixels of such an image
UNREADABLE = "is no image that can be read"
WIDE = f"is more than {RATIO:,} times as long as wide, or as wide as long; crop it"
DEEP = "has values beyond 8 bits, which would be clipped to black or white; save it in 8 bits"
HUGE = "has more pixels than Pillow opens; make it smaller"

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many pixels are `HUGE`, fewer are read


class BadImage(Exception):
    """An image that is refused. `fault` is what it "is" or "has", the same for all of a kind; `why` says more."""

    def __init__(self, fault: str, why: str = "") -> None:
        super().__init__(f"{fault} ({why})" if why else fault)
        self.fault, self.why = fault, why


def rgb(content: bytes) -> Image.Image:
    """The image in these bytes; BadImage where it cannot be read, or where RGB would not show it."""
    try:
        image = Image.open(io.BytesIO(content))
        if max(image.size) > RATIO * min(image.size):
            raise BadImage(WIDE)
        if image.mode == "F" or (image.mode.startswith("I") and not _in_8_bits(image)):
            raise BadImage(DEEP)
        return image.convert("RGB")
    except Image.DecompressionBombError:
        raise BadImage(HUGE) from None
    except BadImage:
        raise
    except Exception as error:  # Pillow raises many kinds of errors for a broken image, SyntaxError among them
        why = " ".join(str(error).split()).partition(" <_io.")[0]  # Pillow names our buffer
        raise BadImage(UNREADABLE, why or type(error).__name__) from None


def _in_8_bits(image: Image.Image) -> bool:
    """Whether no value of an image of integers is clipped to 0 or 255."""
    low, high = image.getextrema()
    return low >= 0 and high <= 255  # type: ignore[operator]


def without_alpha(content: bytes, image: Image.Image) -> Literal["drawing", "one colour"] | None:
    """What is left of a readable image with transparent pixels in `image`, its RGB; None where none is transparent."""
    with Image.open(io.BytesIO(content)) as whole:
        if not whole.has_transparency_data:
            return None
        (least, _) = whole.convert("RGBA").getchannel("A").getextrema()
    if least == 255:
        return None
    return "one colour" if image.getcolors(1) else "drawing"  # of more than one it says None
