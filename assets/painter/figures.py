"""Figures: a thing as a picture with a clear ground, an outline, a colour, a mood, and a body where
the art has none.

    Figures(Art("work/sprites.zip")).figure(Shown("lion", mood="sad"), height=120)  # RGBA

Colours change in OKLab (Ottosson 2020): the family of the art's main colour turns, its steps of
lightness stay."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import world
from drawings import DRAWINGS
from drawings import INKS as DRAWN_INKS
from people import COLOURS, Look, face_rows, person
from PIL import Image, ImageFilter
from things import THINGS
from world import PLUM, Canvas, Colour, Spot, mix

MOODS = ("happy", "sad", "afraid", "asleep")
OUTLINE = 0.011  # picture widths, as in the storyworld
UNIT = 256  # px a figure is drawn at before it is brought to its height
MOST_WIDTH = 1.35  # of the height

# The storyworld's animals in the colours that they have outside it.
COATS = {"fox": (240, 134, 50), "rabbit": (222, 216, 214), "bear": (142, 94, 60),
    "cat": (248, 176, 66),
         "mouse": (170, 170, 184), "frog": (112, 186, 70), "owl": (160, 112, 74),
             "turtle": (98, 164, 84)}  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A thing in a scene: what it is, and how it looks there."""

    thing: str
    colour: str | None = None  # a key of COLOURS; None: its own
    mood: str | None = None  # of MOODS; None: quiet
    count: int = 1
    size: str = ""  # "big", "small" or usual
    look: Look = field(default_factory=Look)  # people's skin, hair and clothes


# --------------------------------------------------------------------------------------------------
# Colour.
# --------------------------------------------------------------------------------------------------

TO_LMS = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451,
    0.1073969566],
                   [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
TO_LAB = np.array([[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205,
    0.4505937099],
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
    fade = np.where(
        lighter < 0, 1 - 0.8 * np.minimum(0.3, -lighter), 1 - 1.5 * np.minimum(0.3, lighter)
    )
    turned = np.stack(
        [(target[0] + 0.8 * lighter).clip(0.12, 0.99), target[1] * fade, target[2] * fade], -1
    )
    pixels[..., :3] = np.where(family[..., None], srgb(turned), pixels[..., :3])
    return Image.fromarray(pixels)


# --------------------------------------------------------------------------------------------------
# Bodies and faces for art that is a head.
# --------------------------------------------------------------------------------------------------

BODY = (
    ("ovals", "dark", 0.14, -0.045, 0.12, 0.055), ("oval", "main", 0, -0.23, 0.25, 0.24),
        ("oval", "light", 0, -0.19, 0.16, 0.16),
)  # fmt: skip
ARMS = {
    None: (("curves", "dark", 0.1, (0.2, -0.34), (0.3, -0.28), (0.27, -0.18)),),
    "happy": (("curves", "dark", 0.1, (0.2, -0.32), (0.33, -0.34), (0.37, -0.46)),),
    "afraid": (("curves", "dark", 0.1, (0.2, -0.32), (0.34, -0.34), (0.26, -0.44)),),
}
TAIL = (
    ("curve", "dark", 0.09, (0.15, -0.08), (0.48, -0.02), (0.42, -0.3)),
    ("oval", "dark", 0.42, -0.32, 0.07, 0.09),
)
TAILED = ("lion", "puppy", "kitten", "wolf", "unicorn", "calf", "monster")
HEAD_WIDTH, CHIN = 0.74, -0.33  # of a body's unit


# Where the eyes of the art are, in shares of the picture from its upper left corner, and their
# radius in shares of its width: the mood goes there.
EYES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "dog": ((0.54, 0.29, 0.041), (0.28, 0.30, 0.041)),
    "puppy": ((0.32, 0.52, 0.053), (0.68, 0.52, 0.056)),
    "kitten": ((0.71, 0.55, 0.064), (0.31, 0.56, 0.063)),
    "gorilla": ((0.14, 0.20, 0.019), (0.24, 0.21, 0.021)),
    "wolf": ((0.34, 0.47, 0.059), (0.66, 0.47, 0.058)),
    "lion": ((0.36, 0.38, 0.038), (0.65, 0.38, 0.038)),
    "moose": ((0.37, 0.51, 0.044), (0.62, 0.51, 0.043)),
    "calf": ((0.38, 0.42, 0.053), (0.67, 0.42, 0.051)),
    "buffalo": ((0.18, 0.28, 0.026), (0.35, 0.31, 0.027)),
    "piglet": ((0.27, 0.52, 0.056), (0.71, 0.52, 0.056)),
    "sheep": ((0.19, 0.33, 0.030), (0.38, 0.36, 0.032)),
    "hippopotamus": ((0.14, 0.29, 0.024), (0.31, 0.35, 0.029)),
    "hamster": ((0.30, 0.53, 0.052), (0.69, 0.53, 0.050)),
    "beaver": ((0.09, 0.10, 0.020), (0.27, 0.12, 0.023)),
    "bat": ((0.45, 0.32, 0.018), (0.56, 0.33, 0.019)),
    "koala": ((0.28, 0.47, 0.061), (0.72, 0.47, 0.059)),
    "sloth": ((0.12, 0.39, 0.032), (0.31, 0.39, 0.029)),
    "lizard": ((0.24, 0.15, 0.038), (0.09, 0.17, 0.038)),
    "snake": ((0.31, 0.06, 0.031), (0.41, 0.16, 0.036)),
    "ladybug": ((0.44, 0.18, 0.028), (0.27, 0.24, 0.029)),
    "scorpion": ((0.45, 0.58, 0.033), (0.57, 0.60, 0.033)),
    "crab": ((0.42, 0.35, 0.030), (0.58, 0.35, 0.030)),
    "hatchling": ((0.41, 0.19, 0.039), (0.70, 0.26, 0.040)),
    "seal": ((0.21, 0.11, 0.027), (0.39, 0.15, 0.026)),
    "octopus": ((0.61, 0.39, 0.043), (0.68, 0.53, 0.032)),
    "squid": ((0.34, 0.55, 0.041), (0.47, 0.66, 0.040)),
    "monster": ((0.26, 0.51, 0.027), (0.74, 0.51, 0.027)),
    "clown": ((0.38, 0.38, 0.074), (0.62, 0.38, 0.074)),
    "genie": ((0.18, 0.24, 0.020), (0.32, 0.24, 0.020)),
    "snowman": ((0.35, 0.38, 0.036), (0.61, 0.39, 0.036)),
    "tiger": ((0.15, 0.26, 0.024),),
    "polar bear": ((0.28, 0.34, 0.042), (0.73, 0.34, 0.042)),
    "horse": ((0.14, 0.24, 0.021),),
    "unicorn": ((0.37, 0.45, 0.043),),
    "zebra": ((0.20, 0.19, 0.023),),
    "donkey": ((0.23, 0.71, 0.018),),
    "deer": ((0.30, 0.30, 0.036),),
    "cow": ((0.20, 0.21, 0.028),),
    "ox": ((0.18, 0.24, 0.028),),
    "pig": ((0.15, 0.43, 0.036),),
    "boar": ((0.48, 0.44, 0.047),),
    "goat": ((0.38, 0.36, 0.041),),
    "elephant": ((0.30, 0.37, 0.027),),
    "mammoth": ((0.29, 0.31, 0.023),),
    "rhinoceros": ((0.33, 0.46, 0.031),),
    "rat": ((0.27, 0.30, 0.024),),
    "squirrel": ((0.19, 0.36, 0.035),),
    "kangaroo": ((0.15, 0.28, 0.020),),
    "dinosaur": ((0.23, 0.11, 0.025),),
    "tyrannosaurus": ((0.24, 0.06, 0.021),),
    "caterpillar": ((0.19, 0.19, 0.030),),
    "ant": ((0.17, 0.37, 0.053),),
    "cricket": ((0.23, 0.54, 0.043),),
    "bird": ((0.23, 0.23, 0.035),),
    "dove": ((0.23, 0.44, 0.024),),
    "eagle": ((0.22, 0.47, 0.021),),
    "parrot": ((0.26, 0.17, 0.041),),
    "hen": ((0.39, 0.39, 0.051),),
    "rooster": ((0.21, 0.25, 0.034),),
    "chick": ((0.26, 0.24, 0.042),),
    "duck": ((0.37, 0.13, 0.035),),
    "goose": ((0.26, 0.07, 0.024),),
    "turkey": ((0.19, 0.12, 0.033),),
    "flamingo": ((0.31, 0.06, 0.031),),
    "dodo": ((0.27, 0.08, 0.019),),
    "fish": ((0.23, 0.52, 0.031),),
    "goldfish": ((0.21, 0.49, 0.050),),
    "whale": ((0.58, 0.67, 0.028),),
    "dolphin": ((0.26, 0.24, 0.040),),
    "bee": ((0.26, 0.45, 0.079),),
    "dragon": ((0.28, 0.18, 0.020),),
    "ghost": ((0.62, 0.24, 0.051),),
    "black cat": ((0.30, 0.29, 0.041),),
    "poodle": ((0.27, 0.25, 0.028),),
    "hedgehog": ((0.25, 0.53, 0.033),),
}


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
        """The figure as it stands in a scene, RGBA, `height` px high (less, if it is wide), with
        its outline.
        """
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
            picture = painted(rows, DRAWN_INKS)
            return recolour(picture, COLOURS[colour]) if colour else picture
        picture = self.art.sprite(THINGS[thing].art)
        if colour:
            picture = recolour(picture, COLOURS[colour])
        picture = with_mood(picture, thing, mood)
        return with_body(thing, picture, mood) if "head" in THINGS[thing].traits else picture


def painted(rows, inks: dict) -> Image.Image:
    """Rows in a unit box about (0, -0.5), RGBA, trimmed; twice as fine as UNIT, then reduced."""
    canvas = Canvas(Image.new("RGBA", (4 * UNIT, 4 * UNIT)))
    canvas.paint(rows, Spot(0.5, 0.75, 0.5), inks)
    picture = canvas.image.reduce(2)
    return picture.crop(picture.getbbox())


def with_body(thing: str, head: Image.Image, mood: str | None) -> Image.Image:
    """A body in the head's main colour, its arms as the mood has them, and the head on it."""
    inks = shades(main_colour(head))
    canvas = Canvas(Image.new("RGBA", (4 * UNIT, 4 * UNIT)))
    rows = [*(TAIL if thing in TAILED else ()), *BODY, *ARMS.get(mood, ARMS[None])]
    canvas.paint(rows, Spot(0.5, 0.75, 0.5), inks)
    picture = canvas.image.reduce(2)
    unit = UNIT  # px of a body's unit in `picture`
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
    inside = (
        min(max(round(x * picture.width), 0), picture.width - 1),
        min(max(round(y * picture.height), 0), picture.height - 1),
    )
    return picture.getpixel(inside)[:3]


def with_mood(picture: Image.Image, thing: str, mood: str | None) -> Image.Image:
    """The art with its eyes as the mood has them, where EYES knows them: closed, wide, merry or
    with a tear.
    """
    if not mood or thing not in EYES:
        return picture
    canvas, ratio = Canvas(picture.copy()), picture.height / picture.width
    for x, y, radius in EYES[thing]:
        beside = max((colour_at(picture, x + side * 1.8 * radius, y) for side in (-1, 1)), key=sum)
        canvas.paint(
            EYE_ROWS[mood], Spot(x, y * ratio, radius / 0.07), world.INKS | {"skin": beside}
        )
    return canvas.image


EYE_ROWS = {
    "asleep": (("oval", "skin", 0, 0, 0.1, 0.1), ("curve", "ink", 0.045, (-0.09, -0.02), (0, 0.1),
        (0.09, -0.02))),
    "happy": (("oval", "skin", 0, 0, 0.1, 0.1), ("curve", "ink", 0.045, (-0.09, 0.02), (0, -0.1),
        (0.09, 0.02))),
    "afraid": (("oval", "ink", 0, 0, 0.135, 0.145), ("oval", "white", 0, 0, 0.12, 0.13),
        ("oval", "ink", 0, 0, 0.05, 0.06)),
    "sad": (("poly", "tear", (-0.07, 0.22), (0, 0.06), (0.07, 0.22)), ("oval", "tear", 0, 0.24,
        0.075, 0.08),
            ("line", "ink", 0.035, (-0.1, -0.1), (0.1, -0.16))),
}  # fmt: skip


def outlined(picture: Image.Image) -> Image.Image:
    """The picture over its silhouette, grown by about OUTLINE of a 256 px canvas, in a dark shade
    of its own.
    """
    margin = 5
    grown = Image.new("RGBA", (picture.width + 2 * margin, picture.height + 2 * margin))
    grown.alpha_composite(picture, (margin, margin))
    silhouette = (
        grown.getchannel("A").filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.GaussianBlur(0.7))
    )
    line = Image.new("RGBA", grown.size, (*mix(main_colour(picture), PLUM, 0.72), 255))
    line.putalpha(silhouette)
    line.alpha_composite(grown)
    return line
