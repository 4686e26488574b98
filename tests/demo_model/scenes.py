"""Pictures of nine cells that hold coloured shapes and handwritten digits, drawn many at a time.

A scene is nine cells of 16x16 pixels on a textured background. A cell is empty, or holds one of six
shapes, or a handwritten digit (scikit-learn's `load_digits`, UCI "Optical Recognition of
Handwritten Digits", CC BY 4.0) in coloured ink. Shapes and digits are kept as coverage masks in a
`SpriteBank`; a batch of pictures is then a few array operations:

    picture = background * (1 - mask) + colour * mask, clipped, rounded to uint8

The same seed gives the same pictures. The handwritten digits are split once into training and
held-out instances (`digit_instances`), so that no test picture shows a digit that was trained on.

Legend: N pictures, 9 cells in reading order, V variants of a mask; masks are float32 in [0, 1],
pictures uint8 [N, 48, 48, 3]."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

__all__ = [
    "CELL",
    "COLORS",
    "DIGIT",
    "EMPTY",
    "PLACES",
    "SHAPES",
    "SIDE",
    "SceneBatch",
    "SceneOptions",
    "SpriteBank",
    "digit_instances",
    "draw_scenes",
    "load_sprite_bank",
    "sample_scenes",
]

CELL = 16
SIDE = 3 * CELL
PLACES = tuple(
    f"{row} {column}"
    for row in ("top", "middle", "bottom")
    for column in ("left", "center", "right")
)
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLORS = {
    "red": (225, 45, 45),
    "green": (45, 180, 70),
    "blue": (60, 95, 240),
    "yellow": (245, 225, 60),
    "purple": (165, 60, 205),
    "orange": (250, 140, 30),
    "white": (245, 245, 245),
}
EMPTY = -1  # kind of an empty cell; 0..5 index SHAPES
DIGIT = len(SHAPES)  # kind of a cell with a digit
_SPLIT_SEED = 20240
_HELD_OUT_SHARE = 0.3
_SUPERSAMPLING = 8


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """How full and how varied the pictures are.

    Attributes:
        shapes: smallest and largest number of shapes in a picture.
        digits: smallest and largest number of digits in a picture; at least 2, or questions that
            compare two have no object.
        noise: amplitude of the grain, in grey levels of 255.
        color_jitter: largest change of an object's red, green and blue, in levels of 255.
    """

    shapes: tuple[int, int] = (2, 4)
    digits: tuple[int, int] = (2, 4)
    noise: int = 8
    color_jitter: int = 14

    def __post_init__(self) -> None:
        """Check the counts against the nine cells."""
        for name, (low, high) in (("shapes", self.shapes), ("digits", self.digits)):
            if not 2 <= low <= high:
                raise ValueError(
                    f"{name}={(low, high)}: needs 2 <= low <= high; raise low or high."
                )
        if self.shapes[1] + self.digits[1] > 8:
            total = self.shapes[1] + self.digits[1]
            raise ValueError(
                f"shapes and digits fill {total} cells: at most 8 of 9 may be filled; lower an "
                f"upper bound."
            )


@dataclass(frozen=True, kw_only=True)
class SpriteBank:
    """Coverage masks to draw with.

    Attributes:
        shapes: float32 [6, V, 16, 16], in the order of `SHAPES`.
        digits: float32 [instances, V, 16, 16].
        digit_labels: int64 [instances], the digit that each instance shows.
    """

    shapes: np.ndarray
    digits: np.ndarray
    digit_labels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class SceneBatch:
    """What N pictures show; all int64 [N, 9] with cells in reading order, -1 where it does not
    apply.

    Attributes:
        kind: `EMPTY`, an index of `SHAPES`, or `DIGIT`.
        color: index of `COLORS`.
        digit: 0..9.
        instance: the handwritten instance in the bank.
    """

    kind: np.ndarray
    color: np.ndarray
    digit: np.ndarray
    instance: np.ndarray

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.kind)


def _polygon(points: int, inner: float, start: float) -> list[tuple[float, float]]:
    """Return corners in [-1, 1]: a regular polygon, or a star where every second corner lies at
    radius `inner`.
    """
    radii = [1.0] * points if inner == 1.0 else [1.0, inner] * points
    angles = [start + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _polygon(40, 1.0, 0.0),
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0.0, -0.95), (0.95, 0.8), (-0.95, 0.8)],
    "star": _polygon(5, 0.42, -math.pi / 2),
    "cross": [
        (x * s, y * s)
        for s in (1, -1)
        for x, y in ((-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3))
    ],
    "diamond": [(0.0, -1.05), (0.75, 0.0), (0.0, 1.05), (-0.75, 0.0)],
}


def _shape_mask(shape: str, radius: float, angle: float, shift: tuple[float, float]) -> np.ndarray:
    """Draw one anti-aliased shape; radius and shift in pixels, angle in radians; float32 [16, 16]."""
    canvas = Image.new("L", (CELL * _SUPERSAMPLING,) * 2)
    cos, sin = math.cos(angle), math.sin(angle)
    center_x, center_y = CELL / 2 + shift[0], CELL / 2 + shift[1]
    corners = [
        (
            (center_x + radius * (x * cos - y * sin)) * _SUPERSAMPLING,
            (center_y + radius * (x * sin + y * cos)) * _SUPERSAMPLING,
        )
        for x, y in _OUTLINES[shape]
    ]
    ImageDraw.Draw(canvas).polygon(corners, fill=255)
    return np.asarray(canvas.resize((CELL, CELL), Image.Resampling.BOX), np.float32) / 255


def _digit_mask(glyph: np.ndarray, size: int, angle: float, shift: tuple[int, int]) -> np.ndarray:
    """Enlarge one 8x8 handwritten digit (values 0..16) to `size` pixels, turned by `angle` degrees;
    float32 [16, 16].
    """
    image = Image.fromarray(np.clip(glyph * 16, 0, 255).astype(np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    cell = Image.new("L", (CELL, CELL))
    margin = (CELL - size) // 2
    cell.paste(image, (margin + shift[0], margin + shift[1]))
    cell = cell.rotate(angle, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(cell, np.float32) / 255 * 1.25, 0, 1)


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return (glyphs float64 [1797, 8, 8] in 0..16, labels int64 [1797])."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "Drawing scenes needs the handwritten digits of scikit-learn, which is not installed; "
            "run `pip install scikit-learn`. The shipped model and data work without it."
        ) from error
    data = load_digits()
    return data.images, data.target.astype(np.int64)


def digit_instances(held_out: bool) -> np.ndarray:
    """Return the indices of the handwritten digits for training (70 %) or held out for calibration
    and test; int64, sorted.
    """
    _, labels = _load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    count = round(len(labels) * _HELD_OUT_SHARE)
    return np.sort(order[:count] if held_out else order[count:])


def load_sprite_bank(seed: int, shape_variants: int = 256, digit_variants: int = 12) -> SpriteBank:
    """Draw the masks: every shape and every handwritten digit at several sizes, angles and shifts.

    Args:
        seed: of the sizes, angles and shifts.
        shape_variants: masks for each shape.
        digit_variants: masks for each handwritten digit.

    Raises:
        ImportError: scikit-learn, which carries the handwritten digits, is not installed.
    """
    rng = np.random.default_rng(seed)
    shapes = np.stack(
        [
            np.stack(
                [
                    _shape_mask(
                        shape,
                        rng.uniform(4.8, 6.8),
                        rng.uniform(-0.2, 0.2),
                        (rng.uniform(-1, 1), rng.uniform(-1, 1)),
                    )
                    for _ in range(shape_variants)
                ]
            )
            for shape in SHAPES
        ]
    )
    glyphs, labels = _load_digits()
    digits = np.stack(
        [
            np.stack(
                [
                    _digit_mask(
                        glyph,
                        int(rng.integers(14, 17)),
                        rng.uniform(-10, 10),
                        (int(rng.integers(-1, 2)), int(rng.integers(-1, 2))),
                    )
                    for _ in range(digit_variants)
                ]
            )
            for glyph in glyphs
        ]
    )
    return SpriteBank(shapes=shapes, digits=digits, digit_labels=labels)


def sample_scenes(
    count: int,
    bank: SpriteBank,
    instances: np.ndarray,
    rng: np.random.Generator,
    options: SceneOptions | None = None,
) -> SceneBatch:
    """Choose what `count` pictures show: cells, kinds, colours and handwritten instances,
    independently and uniformly.
    """
    options = options or SceneOptions()
    shapes = rng.integers(options.shapes[0], options.shapes[1] + 1, (count, 1))
    digits = rng.integers(options.digits[0], options.digits[1] + 1, (count, 1))
    # a random order of the cells: the first hold shapes, the next digits
    rank = rng.random((count, 9)).argsort(axis=1)
    is_shape, is_digit = rank < shapes, (rank >= shapes) & (rank < shapes + digits)
    kind = np.where(
        is_shape, rng.integers(0, len(SHAPES), (count, 9)), np.where(is_digit, DIGIT, EMPTY)
    )
    color = np.where(kind == EMPTY, -1, rng.integers(0, len(COLORS), (count, 9)))
    instance = np.where(is_digit, instances[rng.integers(0, len(instances), (count, 9))], -1)
    digit = np.where(is_digit, bank.digit_labels[instance], -1)
    return SceneBatch(kind=kind, color=color, digit=digit, instance=instance)


def _backgrounds(count: int, rng: np.random.Generator, noise: int) -> np.ndarray:
    """Paint muted backgrounds: a colour, stripes or checks, and a grain of three levels; float32
    [count, 48, 48, 3].
    """
    base = rng.integers(35, 105, (count, 1, 1, 3)).astype(np.float32)
    row, column = np.mgrid[0:SIDE, 0:SIDE]
    across = rng.integers(0, 2, (count, 1, 1))
    down = rng.integers(0, 2, (count, 1, 1))
    period = rng.integers(3, 9, (count, 1, 1))
    texture = ((across * column + down * row) // period % 2) * rng.integers(0, 15, (count, 1, 1))
    grain = rng.integers(-1, 2, (count, SIDE, SIDE)) * noise
    return base + (texture + grain)[..., None].astype(np.float32)


def draw_scenes(
    scenes: SceneBatch,
    bank: SpriteBank,
    rng: np.random.Generator,
    options: SceneOptions | None = None,
) -> np.ndarray:
    """Draw a batch of scenes; uint8 [N, 48, 48, 3].

    Variants, colour jitter and backgrounds are drawn from `rng`: the same scenes and generator
    state give the same pictures."""
    options = options or SceneOptions()
    count = len(scenes)
    shape_variant = rng.integers(0, bank.shapes.shape[1], (count, 9))
    digit_variant = rng.integers(0, bank.digits.shape[1], (count, 9))
    mask = np.zeros((count, 9, CELL, CELL), np.float32)
    is_digit = scenes.kind == DIGIT
    is_shape = (scenes.kind != EMPTY) & ~is_digit
    mask[is_shape] = bank.shapes[scenes.kind[is_shape], shape_variant[is_shape]]
    mask[is_digit] = bank.digits[scenes.instance[is_digit], digit_variant[is_digit]]
    # the last row, index -1, belongs to empty cells
    palette = np.array([*COLORS.values(), (0, 0, 0)], np.float32)
    ink = palette[scenes.color] + rng.integers(
        -options.color_jitter, options.color_jitter + 1, (count, 9, 3)
    )
    # [N, 9, 16, 16] -> [N, 48, 48]: cell rows and pixel rows, cell columns and pixel columns
    mask = (
        mask.reshape(count, 3, 3, CELL, CELL).transpose(0, 1, 3, 2, 4).reshape(count, SIDE, SIDE, 1)
    )
    ink = ink.reshape(count, 3, 3, 3).repeat(CELL, axis=1).repeat(CELL, axis=2).astype(np.float32)
    picture = _backgrounds(count, rng, options.noise) * (1 - mask) + ink * mask
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
