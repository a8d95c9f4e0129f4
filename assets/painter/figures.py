"""Figures: a thing as a picture with a clear ground, an outline, a colour, a mood, and a body where the art has none.

    picture = Figures(Art("work/sprites.zip")).figure(Shown("lion", mood="sad"), height=120)   # RGBA

Colours change in OKLab (Ottosson 2020): the family of the art's main colour turns, its steps of lightness stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from drawings import DRAWINGS
from people import COLOURS, Look, face_rows, person
from PIL import Image, ImageFilter
from things import THINGS

import world
from world import PLUM, Canvas, Colour, Face, Spot, mix

MOODS = ("happy", "sad", "afraid", "asleep")
OUTLINE = 0.011  # picture widths, as in the storyworld
UNIT = 256  # px a figure is drawn at before it is brought to its height
MOST_WIDTH = 1.35  # of the height

# The storyworld's animals in the colours that they have outside it.
COATS = {"fox": (240, 134, 50), "rabbit": (222, 216, 214), "bear": (142, 94, 60), "cat": (248, 176, 66),
         "mouse": (170, 170, 184), "frog": (112, 186, 70), "owl": (160, 112, 74), "turtle": (98, 164, 84)}  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A thing in a scene: what it is, and how it looks there."""

    thing: str
    colour: str | None = None  # a key of COLOURS; None: its own
    mood: str | None = None  # of MOODS; None: quiet
    count: int = 1
    size: str = ""  # "big", "small" or usual
    look: Look = field(default_factory=Look)  # people's skin, hair and clothes


# ------------------------------------------------------------------------------------------------------------
# Colour.
# ------------------------------------------------------------------------------------------------------------

TO_LMS = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                   [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
TO_LAB = np.array([[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099],
                   [0.0259040371, 0.7827717662, -0.808675766]])  # fmt: skip


def oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) in 0 to 255 to OKLab (..., 3)."""
    share = np.asarray(rgb, np.float32) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ TO_LMS.T) @ TO_LAB.T


def srgb(lab: np.ndarray) -> np.ndarray:
    """OKLab (..., 3) to sRGB (..., 3) uint8."""
    linear = ((lab @ np.linalg.inv(TO_LAB).T) ** 3 @ np.linalg.inv(TO_LMS).T).clip(0, 1)
    share = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (share * 255).round().clip(0, 255).astype(np.uint8)


def main_colour(picture: Image.Image) -> Colour:
    """The commonest colour of what is not transparent, in steps of 16."""
    pixels = np.asarray(picture).reshape(-1, 4)
    pixels = pixels[pixels[:, 3] > 200][:, :3].astype(int)
    if not len(pixels):
        return (150, 150, 150)
    steps = pixels // 16 @ (256, 16, 1)
    best = np.bincount(steps).argmax()
    return tuple(int(x) for x in pixels[steps == best].mean(0))


def recolour(picture: Image.Image, colour: Colour) -> Image.Image:
    """The picture with the family of its main colour turned to `colour`."""
    pixels = np.array(picture)
    lab, main, target = oklab(pixels[..., :3]), oklab(main_colour(picture)), oklab(colour)
    chroma, own = np.hypot(lab[..., 1], lab[..., 2]), np.hypot(main[1], main[2])
    lighter = lab[..., 0] - main[0]
    if own > 0.04:
        turn = np.arctan2(lab[..., 2], lab[..., 1]) - np.arctan2(main[2], main[1])
        apart = np.abs((turn + np.pi) % (2 * np.pi) - np.pi)
        family = (apart < 0.62) & (chroma > 0.03) & (np.abs(lighter) < 0.42)
    else:
        family = (chroma < 0.04) & (np.abs(lighter) < 0.3) & (lab[..., 0] > 0.2)
    fade = np.where(lighter < 0, 1 - 0.8 * np.minimum(0.3, -lighter), 1 - 1.5 * np.minimum(0.3, lighter))
    turned = np.stack([(target[0] + 0.8 * lighter).clip(0.12, 0.99), target[1] * fade, target[2] * fade], -1)
    pixels[..., :3] = np.where(family[..., None], srgb(turned), pixels[..., :3])
    return Image.fromarray(pixels)


# ------------------------------------------------------------------------------------------------------------
# Bodies and faces for art that is a head.
# ------------------------------------------------------------------------------------------------------------

BODY = (
    ("ovals", "dark", 0.14, -0.045, 0.12, 0.055), ("oval", "main", 0, -0.23, 0.25, 0.24), ("oval", "light", 0, -0.19, 0.16, 0.16),
)  # fmt: skip
ARMS = {
    None: (("curves", "dark", 0.1, (0.2, -0.34), (0.3, -0.28), (0.27, -0.18)),),
    "happy": (("curves", "dark", 0.1, (0.2, -0.32), (0.33, -0.34), (0.37, -0.46)),),
    "afraid": (("curves", "dark", 0.1, (0.2, -0.32), (0.34, -0.34), (0.26, -0.44)),),
}
TAIL = (("curve", "dark", 0.09, (0.15, -0.08), (0.48, -0.02), (0.42, -0.3)), ("oval", "dark", 0.42, -0.32, 0.07, 0.09))
TAILED = ("lion", "puppy", "kitten", "wolf", "unicorn", "calf", "monster")
HEAD_WIDTH, CHIN = 0.74, -0.33  # of a body's unit


# Where a face is in its art, in shares of the picture's width and height from the upper left corner: the middle, the
# eyes, from the middle to an eye, the mouth (None: it stays), the radius of an eye.
@dataclass(frozen=True)
class Features:
    x: float
    eyes: float
    gap: float
    mouth: float | None
    radius: float = 0.07


HEADS: dict[str, Features] = {}
EYES: dict[str, tuple[float, float, float]] = {}  # seen from the side: the one eye, and its radius


def shades(main: Colour) -> dict[str, Colour]:
    return world.INKS | world.shades(main)


class Figures:
    """Draws things; `art` has the sprites (`art.sprite(name)`)."""

    def __init__(self, art) -> None:
        self.art = art
        self.whole = lru_cache(maxsize=2048)(self._whole)
        self.figure = lru_cache(maxsize=4096)(self._figure)

    def can_draw(self, thing: str) -> bool:
        """Whether the art of a thing is there."""
        source, _, name = THINGS[thing].art.partition(":")
        if source == "drawn":
            return name in DRAWINGS
        return source in ("world", "person") or f"{source}:{name}" in self.art.names

    def _figure(self, shown: Shown, height: int, flip: bool = False) -> Image.Image:
        """The figure as it stands in a scene, RGBA, `height` px high (less, if it is wide), with its outline."""
        picture = self.whole(shown.thing, shown.colour, shown.mood, shown.look)
        scale = min(height / picture.height, MOST_WIDTH * height / picture.width)
        size = (max(2, round(picture.width * scale)), max(2, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
        if flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return outlined(picture)

    def _whole(self, thing: str, colour: str | None, mood: str | None, look: Look) -> Image.Image:
        """The figure at its own size, trimmed."""
        source, _, name = THINGS[thing].art.partition(":")
        if source == "person":
            rows, inks = person(thing, mood, colour, look)
            return painted(rows, inks)
        if source == "world" and name in world.ANIMALS:
            inks = shades(COLOURS[colour] if colour else COATS[name])
            return painted([*world.ANIMALS[name], *face_rows(world.FACES[name], mood)], inks)
        if source in ("world", "drawn"):
            rows = world.OBJECTS[name] if source == "world" else DRAWINGS[name]
            picture = painted(rows, world.INKS | DRAWN_INKS)
            return recolour(picture, COLOURS[colour]) if colour else picture
        picture = self.art.sprite(THINGS[thing].art)
        if colour:
            picture = recolour(picture, COLOURS[colour])
        if "head" in THINGS[thing].traits:
            return with_body(thing, picture, mood)
        return with_eye(picture, EYES[thing], mood) if mood and thing in EYES else picture


DRAWN_INKS: dict[str, Colour] = {
    "straw": (242, 206, 120), "hay": (222, 178, 84), "steel": (188, 194, 210), "pale": (214, 220, 232), "tan": (206, 164, 110),
    "brown": (142, 94, 60), "dark": (84, 62, 60), "orange": (244, 140, 52), "pink": (246, 150, 180), "mint": (150, 214, 180),
    "blue": (70, 120, 214), "grey": (150, 152, 162), "rust": (190, 96, 60), "leaf": (76, 150, 82), "yellow": (250, 214, 80),
    "sand": (238, 208, 146), "plum": (120, 70, 130), "black": (58, 52, 66), "lime": (160, 210, 90), "snow": (236, 244, 252),
    "iceblue": (190, 220, 244),
}  # fmt: skip


def painted(rows, inks: dict) -> Image.Image:
    """Rows in a unit box about (0, -0.5), RGBA, trimmed; twice as fine as UNIT, then reduced."""
    canvas = Canvas(Image.new("RGBA", (4 * UNIT, 4 * UNIT)))
    canvas.paint(rows, Spot(0.5, 0.75, 0.5), inks)
    picture = canvas.image.reduce(2)
    return picture.crop(picture.getbbox())


def with_body(thing: str, head: Image.Image, mood: str | None) -> Image.Image:
    """A body in the head's main colour, and the head on it, with the mood's face where HEADS knows it."""
    inks = shades(main_colour(head))
    canvas = Canvas(Image.new("RGBA", (4 * UNIT, 4 * UNIT)))
    rows = [*(TAIL if thing in TAILED else ()), *BODY, *ARMS.get(mood, ARMS[None])]
    canvas.paint(rows, Spot(0.5, 0.75, 0.5), inks)
    picture = canvas.image.reduce(2)
    unit = UNIT  # px of a body's unit in `picture`
    if mood and thing in HEADS:
        head = with_face(head, HEADS[thing], mood)
    width = round(HEAD_WIDTH * unit)
    head = head.resize((width, round(head.height * width / head.width)), Image.Resampling.LANCZOS)
    left = picture.width // 2 - width // 2
    top = round(0.75 * picture.height + CHIN * unit) - head.height
    chin = Image.new("RGBA", head.size, (*mix(main_colour(head), PLUM, 0.5), 0))
    chin.putalpha(head.getchannel("A"))
    picture.alpha_composite(chin, (left, max(0, top + round(0.02 * unit))))
    picture.alpha_composite(head, (left, max(0, top)))
    return picture.crop(picture.getbbox())


def colour_at(picture: Image.Image, x: float, y: float) -> Colour:
    """The colour at a point, in shares of the picture."""
    inside = (min(max(round(x * picture.width), 0), picture.width - 1), min(max(round(y * picture.height), 0), picture.height - 1))
    return picture.getpixel(inside)[:3]


def with_face(head: Image.Image, at: Features, mood: str) -> Image.Image:
    """The head with its own eyes and mouth covered and the mood's drawn."""
    head = head.copy()
    canvas, ratio = Canvas(head), head.height / head.width
    skin = {side: colour_at(head, at.x + side * (at.gap + 1.5 * at.radius), at.eyes) for side in (-1, 1)}
    rows, inks = [], dict(world.INKS)
    for side in (-1, 1):
        inks[f"skin{side}"] = skin[side]
        rows.append(("oval", f"skin{side}", at.x + side * at.gap, at.eyes * ratio, at.radius * 1.35, at.radius * 1.45))
    scale = at.gap / 0.155
    mouth = None if at.mouth is None else (at.mouth * ratio - at.eyes * ratio) / scale
    face = Face(x=0, eyes=0, gap=0.155, mouth=mouth, width=0.09, blush=0.3)
    canvas.paint(rows, Spot(0, 0, head.width / canvas.pixels), inks)
    canvas.paint(face_rows(face, mood), Spot(at.x, at.eyes * ratio, scale), inks)
    return head


def with_eye(picture: Image.Image, eye: tuple[float, float, float], mood: str) -> Image.Image:
    """A side view with its eye closed (asleep), wide (afraid), merry (happy) or with a tear (sad)."""
    x, y, radius = eye
    picture, ratio = picture.copy(), picture.height / picture.width
    inks = world.INKS | {"skin": colour_at(picture, x + 1.7 * radius, y)}
    size = radius / 0.07
    rows = [("oval", "skin", 0, 0, 0.1, 0.1)] if mood != "sad" else []
    rows += {
        "asleep": [("curve", "ink", 0.045, (-0.09, -0.02), (0, 0.1), (0.09, -0.02))],
        "happy": [("curve", "ink", 0.045, (-0.09, 0.02), (0, -0.1), (0.09, 0.02))],
        "afraid": [("oval", "white", 0, 0, 0.12, 0.13), ("oval", "ink", 0, 0, 0.05, 0.06)],
        "sad": [("poly", "tear", (-0.07, 0.22), (0, 0.06), (0.07, 0.22)), ("oval", "tear", 0, 0.24, 0.075, 0.08),
                ("line", "ink", 0.035, (-0.12, -0.1), (0.08, -0.18))],
    }[mood]  # fmt: skip
    Canvas(picture).paint(rows, Spot(x, y * ratio, size), inks)
    return picture


def outlined(picture: Image.Image) -> Image.Image:
    """The picture over its silhouette, grown by about OUTLINE of a 256 px canvas, in a dark shade of its own."""
    margin = 5
    grown = Image.new("RGBA", (picture.width + 2 * margin, picture.height + 2 * margin))
    grown.alpha_composite(picture, (margin, margin))
    silhouette = grown.getchannel("A").filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.GaussianBlur(0.7))
    line = Image.new("RGBA", grown.size, (*mix(main_colour(picture), PLUM, 0.72), 255))
    line.putalpha(silhouette)
    line.alpha_composite(grown)
    return line
