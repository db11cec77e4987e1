"""The demo's scenes: a few coloured shapes on a textured background, drawn from a seed.

A scene is a pure function of `(seed, index)`: the same list of objects and, pixel for pixel, the same picture on every
machine with the same numpy. Sampling the objects costs microseconds and drawing costs a millisecond, so instructions
about many scenes can be written before any picture is drawn.

The canvas is 3 x 3 cells of 32 pixels and a cell holds at most one object, which makes "where" a question with nine
answers. Thin lines and specks of the objects' own colours lie under the objects as distractors: they are neither
counted nor described.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from shortzip.data.errors import UserError

CANVAS = 96
CELL = 32
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (35, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 45),
    "purple": (140, 50, 175),
    "orange": (245, 130, 25),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES: dict[str, tuple[int, int]] = {"small": (13, 16), "large": (24, 28)}  # diameter in pixels, both ends included
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
MAX_OBJECTS = 5

_SUPERSAMPLE = 4


@dataclass(frozen=True)
class SceneObject:
    """One object: its words, and its square on the canvas (`left`, `top`, `diameter` in pixels)."""

    color: str
    shape: str
    size: str
    place: str
    left: int
    top: int
    diameter: int


@dataclass(frozen=True)
class Scene:
    """The objects of one scene in reading order (row by row), and the seed that its background is drawn from."""

    objects: tuple[SceneObject, ...]
    texture_seed: tuple[int, int]


def sample_scene(seed: int, index: int) -> Scene:
    """Chooses 1 to 5 objects; no two share both colour and shape, so that "the red star" is never ambiguous."""
    rng = np.random.default_rng((seed, index))
    cells = sorted(rng.choice(9, size=int(rng.integers(1, MAX_OBJECTS + 1)), replace=False).tolist())
    colors, taken, objects = tuple(COLORS), set[tuple[str, str]](), []
    for cell in cells:
        while True:
            kind = (colors[rng.integers(len(colors))], SHAPES[rng.integers(len(SHAPES))])
            if kind not in taken:
                break
        taken.add(kind)
        size = ("small", "large")[rng.integers(2)]
        smallest, largest = SIZES[size]
        diameter = int(rng.integers(smallest, largest + 1))
        room = CELL - diameter - 1
        left = (cell % 3) * CELL + 1 + int(rng.integers(room))
        top = (cell // 3) * CELL + 1 + int(rng.integers(room))
        objects.append(SceneObject(*kind, size, PLACES[cell], left, top, diameter))
    return Scene(tuple(objects), (seed, index))


def render_scene(scene: Scene) -> np.ndarray:
    """Draws a scene. Returns uint8 `[96, 96, 3]`, RGB."""
    rng = np.random.default_rng((*scene.texture_seed, 1))
    canvas = _background(rng)
    picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    _distract(picture, rng)
    canvas = np.asarray(picture).astype(np.float32)
    for item in scene.objects:
        alpha = _silhouette(item.shape, item.diameter, float(rng.uniform(-8, 8)))
        color = np.array(COLORS[item.color], np.float32) + rng.normal(0, 5, 3).astype(np.float32)
        window = canvas[item.top : item.top + item.diameter, item.left : item.left + item.diameter]
        window += alpha[..., None] * (color - window)
    canvas += rng.normal(0, 3, canvas.shape).astype(np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A muted base colour with a slope, low-frequency noise and a faint regular pattern; float32 `[96, 96, 3]`."""
    base = rng.uniform(105, 165) + rng.uniform(-14, 14, 3)
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    field = (x * math.cos(angle) + y * math.sin(angle)) / CANVAS * rng.uniform(-18, 18)
    coarse = Image.fromarray(rng.uniform(-12, 12, (7, 7)).astype(np.float32))
    field = field + np.asarray(coarse.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC))
    period = rng.uniform(5, 14)
    angle = rng.uniform(0, math.pi)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    pattern = rng.integers(3)
    if pattern == 0:
        wave = np.sin(along * 2 * math.pi / period)
    elif pattern == 1:
        wave = np.sign(np.sin(along * 2 * math.pi / period) * np.sin(across * 2 * math.pi / period))
    else:
        wave = rng.normal(0, 1, (CANVAS, CANVAS))
    field = field + wave * rng.uniform(3, 10)
    return (base[None, None, :] + field[..., None]).astype(np.float32)


def _distract(picture: Image.Image, rng: np.random.Generator) -> None:
    """Draws one to three thin lines and three to eight specks of at most 3 pixels, in the objects' own colours."""
    draw = ImageDraw.Draw(picture)
    colors = tuple(COLORS.values())
    for _ in range(int(rng.integers(1, 4))):
        ends = [int(v) for v in rng.integers(0, CANVAS, 4)]
        draw.line(ends, fill=colors[rng.integers(len(colors))], width=1)
    for _ in range(int(rng.integers(3, 9))):
        x, y, width = int(rng.integers(CANVAS)), int(rng.integers(CANVAS)), int(rng.integers(1, 3))
        draw.rectangle([x, y, x + width, y + width], fill=colors[rng.integers(len(colors))])


def _silhouette(shape: str, diameter: int, turn: float) -> np.ndarray:
    """Coverage of one object's square in [0, 1], float32 `[diameter, diameter]`; `turn` is an angle in degrees."""
    side = diameter * _SUPERSAMPLE
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    middle, reach = (side - 1) / 2, (side - 1) / 2

    def corners(angles: list[float], radii: list[float]) -> list[tuple[float, float]]:
        return [
            (
                middle + r * reach * math.sin(math.radians(a + turn)),
                middle - r * reach * math.cos(math.radians(a + turn)),
            )
            for a, r in zip(angles, radii, strict=True)
        ]

    if shape == "circle":
        draw.ellipse([0, 0, side - 1, side - 1], fill=255)
    elif shape == "ring":
        draw.ellipse([0, 0, side - 1, side - 1], fill=255)
        hole = side * 0.28
        draw.ellipse([hole, hole, side - 1 - hole, side - 1 - hole], fill=0)
    elif shape == "square":
        draw.polygon(corners([45, 135, 225, 315], [1.25] * 4), fill=255)
    elif shape == "triangle":
        draw.polygon(corners([0, 125, 235], [1.0, 1.2, 1.2]), fill=255)
    elif shape == "star":
        draw.polygon(corners([36.0 * k for k in range(10)], [1.0, 0.42] * 5), fill=255)
    elif shape == "cross":
        arm, thin = 71.0, 1.02
        notch = 0.42
        angles, radii = [], []
        for quarter in range(4):
            angles += [90.0 * quarter + arm - 90 + 0.0, 90.0 * quarter + 19.0, 90.0 * quarter + 45.0]
            radii += [thin, thin, notch]
        draw.polygon(corners(angles, radii), fill=255)
    else:
        raise UserError(f"no shape {shape!r}: one of {', '.join(SHAPES)}")
    small = mask.resize((diameter, diameter), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255
