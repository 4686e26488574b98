"""Pictures with a word for every place: crops of photographs, and drawn shapes.

Photographs are those inside the wheels of scikit-image and scikit-learn (their README files name
the licences). The same seed gives the same pictures.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from unseen_models.cache import files_of

__all__ = ["WORDS", "Picture", "draw_pictures"]

# file -> the word for it, and a caption
_PHOTOGRAPHS = {
    "astronaut.png": ("woman", "A smiling woman in an orange space suit."),
    "chelsea.png": ("cat", "A cat with brown fur looks at the camera."),
    "coffee.png": ("coffee", "A cup of coffee on a wooden table."),
    "motorcycle_left.png": ("motorcycle", "A motorcycle stands in a garage."),
    "rocket.jpg": ("rocket", "A rocket on its launch pad at night."),
    "camera.png": ("man", "A man with a camera on a field."),
    "hubble_deep_field.jpg": ("stars", "Many galaxies and stars in a dark sky."),
    "retina.jpg": ("eye", "The inside of a human eye."),
    "coins.png": ("coins", "Rows of old coins on a dark ground."),
    "page.png": ("text", "A page of printed text."),
    "brick.png": ("brick", "A wall of brick."),
    "grass.png": ("grass", "A field of grass."),
    "gravel.png": ("stone", "Small stones on the ground."),
    "moon.png": ("moon", "The surface of the moon with craters."),
    "china.jpg": ("temple", "A Chinese temple with a red roof."),
    "flower.jpg": ("flower", "A red flower in a garden."),
}
_COLOURS = {
    "red": (215, 50, 45),
    "green": (50, 165, 75),
    "blue": (60, 95, 225),
    "yellow": (240, 215, 70),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
_SHAPES = ("circle", "square", "triangle")
WORDS = tuple(dict.fromkeys([*(word for word, _ in _PHOTOGRAPHS.values()), *_COLOURS]))


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture, what it shows, and the word for each patch, an index into `WORDS` [rows, rows]."""

    image: Image.Image
    caption: str
    words: np.ndarray


def draw_pictures(count: int, seed: int, side: int, patch: int) -> list[Picture]:
    """Crops of photographs and drawn shapes in turn, `side` pixels wide and high."""
    generator = np.random.default_rng(seed)
    return [(_crop, _shape)[i % 2](generator, side, side // patch) for i in range(count)]


@cache
def _photograph(name: str) -> Image.Image:
    for package, distribution, folder in (
        ("skimage", "scikit-image", "data"),
        ("sklearn", "scikit-learn", "datasets/images"),
    ):
        path = files_of(package, distribution) / folder / name
        if path.is_file():
            with Image.open(path) as image:
                return image.convert("RGB")
    raise FileNotFoundError(name)


def _crop(generator: np.random.Generator, side: int, rows: int) -> Picture:
    name = str(generator.choice(list(_PHOTOGRAPHS)))
    word, caption = _PHOTOGRAPHS[name]
    image = _photograph(name)
    length = int(min(image.size) * generator.uniform(0.5, 1.0))
    left, top = (int(generator.integers(0, size - length + 1)) for size in image.size)
    box = (left, top, left + length, top + length)
    image = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    if generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return Picture(
        image=image, caption=caption, words=np.full((rows, rows), WORDS.index(word), dtype=np.int64)
    )


def _shape(generator: np.random.Generator, side: int, rows: int) -> Picture:
    ground, ink = generator.choice(list(_COLOURS), 2, replace=False).tolist()
    shape = str(generator.choice(_SHAPES))
    size = int(generator.integers(side // 3, 3 * side // 4))
    left, top = generator.integers(0, side - size, 2).tolist()
    right, bottom = left + size, top + size
    mask = Image.new("L", (side, side))
    brush = ImageDraw.Draw(mask)
    if shape == "circle":
        brush.ellipse((left, top, right, bottom), fill=255)
    elif shape == "square":
        brush.rectangle((left, top, right, bottom), fill=255)
    else:
        brush.polygon(((left, bottom), ((left + right) // 2, top), (right, bottom)), fill=255)
    covered = np.asarray(mask, dtype=np.float32)[..., None] / 255
    pixels = np.where(covered > 0.5, _COLOURS[ink], _COLOURS[ground])
    pixels = pixels + generator.normal(0, 8, pixels.shape)
    share = covered.reshape(rows, side // rows, rows, side // rows).mean((1, 3))
    return Picture(
        image=Image.fromarray(pixels.clip(0, 255).astype(np.uint8)),
        caption=f"A {ink} {shape} on a {ground} background.",
        words=np.where(share > 0.5, WORDS.index(ink), WORDS.index(ground)),
    )
