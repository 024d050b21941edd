"""Real photographs: views of nine photos that scikit-image ships, as folders of JPEG files.

Views of one photo are in both splits, so a probe that tells them apart has learnt to recognise these photos and no
more: a set to test with, not to compare models by.
"""

from pathlib import Path

from PIL import Image

PHOTOS = {
    "astronaut": "astronaut.png",
    "brick wall": "brick.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxy": "hubble_deep_field.jpg",
    "gravel": "gravel.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
VIEWS = {"train": 10, "test": 3}


def write(folder: Path) -> None:
    """Write FOLDER/{train,test}/CLASS/N.jpg, 64 x 64 pixels: each view begins elsewhere and shows 70 % each way."""
    import skimage

    for name, file in PHOTOS.items():
        photo = Image.open(Path(skimage.__file__).parent / "data" / file).convert("RGB")
        width, height = photo.size
        views = iter(range(sum(VIEWS.values())))
        for split, count in VIEWS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                # 5 and 8 have no divisor in common with 13 views: no two begin at the same place.
                view = next(views)
                x, y = (0.3 * (view * step % 13) / 12 for step in (5, 8))
                box = (int(x * width), int(y * height), int((x + 0.7) * width), int((y + 0.7) * height))
                photo.resize((64, 64), box=box).save(folder / split / name / f"{number}.jpg", quality=95)
