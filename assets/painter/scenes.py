"""Scenes as data, and their pictures: things in a place, at a time, in a weather.

    scene = sample_scene(7, names)                         # the same scene for the same seed
    picture = Illustrator(Art("work/sprites.zip")).draw(scene)  # RGB: same scene, same bytes

A scene says what is shown; `arrange` says where: the hero on the left, what it meets on the right,
buildings behind, what flies above, what swims at the water's line. What chance varies moves by
small steps among few choices, so that a small network can learn it."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import places
import world
from figures import MOODS, OUTLINE, Figures, Shown
from people import CLOTHES, COLOURS, HAIRS, SKINS, Look
from PIL import Image, ImageDraw
from places import PLACES, TIMES, WEATHERS, Layout
from things import THINGS
from world import Canvas, Spot

HERE = Path(__file__).resolve().parent
PICTURE = 128  # px
CANVAS = 256  # px, reduced to PICTURE
RELATIONS = ("holds", "rides", "flies over", "sits in", "gives")


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `relation` is of the first thing to the second; of "gives" the third is
    the gift.
    """

    shown: tuple[Shown, ...]
    place: str
    time: str = "noon"
    weather: str = "clear"
    relation: str = ""
    seed: int = 0  # of what no text says: layout, positions


@dataclass(frozen=True)
class Placed:
    """A figure in the picture: the middle of its foot and its height, in picture widths. Later ones
    are in front.
    """

    shown: Shown
    x: float
    y: float
    height: float
    flip: bool = False
    grounded: bool = True  # has a shadow


# --------------------------------------------------------------------------------------------------
# 1. Where things go.
# --------------------------------------------------------------------------------------------------

# A hero's height by the number of things on the ground.
ALONE, PAIR, THREE, FOUR = 0.54, 0.46, 0.4, 0.34
HEIGHTS = {1: ALONE, 2: PAIR, 3: THREE}
LEAST = {1: 0.44, 2: 0.28, 3: 0.22}  # no thing is smaller: it must be seen
MOST = 0.74
ROOM = {1: 0.9, 2: 0.52, 3: 0.38}  # the width that one of so many may take
SPOTS = {1: (0.5,), 2: (0.28, 0.72), 3: (0.2, 0.51, 0.82), 4: (0.15, 0.38, 0.62, 0.85)}
STEP = 1 / 32
SCALE = {"big": 1.4, "small": 0.6, "": 1.0}

# What is ridden: where the rider's foot is, in shares of the mount's width from its middle and of
# its height from its top, and whether the rider stands in front of it.
SADDLES = {
    "bicycle": (0.0, 0.62, True), "motorcycle": (0.0, 0.6, True), "scooter": (-0.05, 0.82, True),
    "skateboard": (0.0, 0.4, True), "surfboard": (0.0, 0.5, True), "broom": (0.0, 0.62, True),
    "whale": (0.05, 0.42, False), "dolphin": (0.0, 0.4, False), "giraffe": (0.1, 0.55, False),
}  # fmt: skip
SADDLE = (0.06, 0.46, False)
# What is sat in or on: the same; a sitter in front sits on it.
SEATS = {
    "chair": (0.0, 0.78, True), "sofa": (0.0, 0.85, True), "bed": (0.0, 0.7, True),
        "bench": (0.0, 0.75, True), "swing": (0.0, 0.85, True),
    "hammock": (0.0, 0.7, False), "rocket": (0.0, 0.5, False), "tent": (0.0, 0.98, True),
}  # fmt: skip
SEAT = (0.0, 0.45, False)


def is_airborne(shown: Shown, place: str) -> bool:
    return "air" in THINGS[shown.thing].traits


def is_afloat(shown: Shown, place: str) -> bool:
    return "swims" in THINGS[shown.thing].traits and PLACES[place].water is not None


def is_behind(shown: Shown) -> bool:
    thing = THINGS[shown.thing]
    return thing.kind == "building" or (thing.kind == "plant" and thing.size > 1.3)


def height_of(shown: Shown, base: float, least: float) -> float:
    return min(MOST, max(least, base * THINGS[shown.thing].size) * SCALE[shown.size])


class Arranger:
    """Puts the things of one scene where they go."""

    def __init__(self, scene: Scene, size_of) -> None:
        self.scene, self.place = scene, PLACES[scene.place]
        self.chance = random.Random(f"positions {scene.seed}")
        self.size_of = size_of  # (shown, height) -> (width, height), picture widths
        self.behind: list[Placed] = []
        self.middle: list[Placed] = []
        self.front: list[Placed] = []

    def jitter(self) -> float:
        return self.chance.choice((-STEP, 0.0, STEP))

    def arrange(self) -> list[Placed]:
        """All figures, from the back to the front."""
        scene = self.scene
        together = {"gives": 3, "": 0}.get(scene.relation, 2)
        rest = list(scene.shown[together:])
        if together:
            getattr(self, scene.relation.replace(" ", "_"))(*scene.shown[:together])
            self.around(rest, taken=1)
        else:
            self.around(rest, taken=0)
        return [*self.behind, *sorted(self.middle, key=lambda one: one.y), *self.front]

    def around(self, shown: list[Shown], taken: int) -> None:
        """Things without a relation; `taken`: a group already stands in the middle."""
        back = [one for one in shown if is_behind(one)]
        air = [one for one in shown if not is_behind(one) and is_airborne(one, self.scene.place)]
        ground = [one for one in shown if one not in back and one not in air]
        for i, one in enumerate(back[:2]):
            alone = not ground and not taken and len(back) == 1
            x, height = (0.5, 0.68) if alone else ((0.76, 0.24)[i], 0.56)
            height = min(0.74, height * SCALE[one.size])
            self.behind.append(Placed(one, x + self.jitter(), 0.9 if alone else 0.83, height))
        self.float(air, alone=len(shown) == 1 and not taken)
        crowd = [one for one in ground for _ in range(one.count)]
        self.stand(crowd, shifted=bool(back or air), taken=taken)

    def float(self, air: list[Shown], alone: bool) -> None:
        """Things in the air, above the rest; a swarm where there are many."""
        swarm = [one for one in air for _ in range(one.count)]
        if len(swarm) == 1:
            spots = ((0.5, 0.68),) if alone else ((0.74, 0.46),)
        else:
            spots = ((0.26, 0.46), (0.74, 0.42), (0.5, 0.3), (0.5, 0.64), (0.84, 0.7), (0.16, 0.72))
        base, least = (0.62, 0.4) if alone and len(swarm) == 1 else (0.4, 0.24)
        for one, (x, y) in zip(swarm, spots):
            height = height_of(one, base, least)
            self.middle.append(Placed(one, x + self.jitter(), y, height, grounded=False))

    def stand(self, crowd: list[Shown], shifted: bool, taken: int) -> None:
        """Things on the ground (or in the water), side by side; a crowd in two rows."""
        number = len(crowd)
        if not number:
            return
        base, least = HEIGHTS.get(number, FOUR), LEAST.get(number, 0.2)
        if taken:
            base, least, spots = (
                THREE,
                0.2,
                ((0.86,), (0.12, 0.88), (0.1, 0.9, 0.5))[min(number, 3) - 1],
            )
        else:
            spots = SPOTS[min(number, 4)]
        if number == 1 and shifted and not taken:
            spots = (0.36,)
        for i, one in enumerate(crowd[:6]):
            row, column = divmod(i, len(spots))
            x = spots[column] + self.jitter() + row * 0.11
            afloat = is_afloat(one, self.scene.place)
            y = self.place.water if afloat else self.place.floor
            y += 0.02 * row - (0.03 if number > 2 and column % 2 else 0)
            height = height_of(one, base * (0.85 if row else 1), least)
            width, _ = self.size_of(one, height)
            height *= min(1.0, ROOM.get(number, 0.3) / width)
            flip = (x < 0.45 and number > 1) or (
                one == crowd[0] and number == 1 and self.chance.random() < 0.5
            )
            self.middle.append(
                Placed(
                    one,
                    x,
                    y,
                    height,
                    flip,
                    grounded=not afloat and self.scene.place not in ("space", "sky", "underwater"),
                )
            )

    def holds(self, hero: Shown, held: Shown) -> None:
        """`held` in the hero's hand."""
        height = height_of(hero, 0.56, 0.42)
        x, y = 0.4 + self.jitter(), self.place.floor
        width, tall = self.size_of(hero, height)
        high = max(0.2, min(0.3, 0.42 * tall))
        across, _ = self.size_of(held, high)
        self.middle.append(Placed(hero, x, y, height))
        self.front.append(
            Placed(held, x + 0.38 * width + 0.3 * across, y - 0.16 * tall, high, grounded=False)
        )

    def rides(self, rider: Shown, mount: Shown) -> None:
        self.seated(rider, mount, *SADDLES.get(mount.thing, SADDLE), 0.46, 0.36)

    def sits_in(self, sitter: Shown, seat: Shown) -> None:
        self.seated(sitter, seat, *SEATS.get(seat.thing, SEAT), 0.44, 0.38)

    def seated(
        self,
        rider: Shown,
        mount: Shown,
        across: float,
        down: float,
        before: bool,
        low: float,
        high: float,
    ) -> None:
        """`rider` on or in `mount`, the foot at (across, down) of it."""
        x = 0.5 + self.jitter()
        aloft = is_airborne(mount, self.scene.place) or mount.thing == "broom"
        y = (
            0.78
            if aloft
            else self.place.water
            if is_afloat(mount, self.scene.place)
            else self.place.floor
        )
        mount_high = min(0.56, low * max(0.75, THINGS[mount.thing].size))
        width, tall = self.size_of(mount, mount_high)
        mount_one = Placed(mount, x, y, mount_high, grounded=not aloft)
        rider_one = Placed(rider, x + across * width, y - tall * (1 - down), high, grounded=False)
        self.front += [mount_one, rider_one] if before else [rider_one, mount_one]

    def flies_over(self, flyer: Shown, below: Shown) -> None:
        """`flyer` in the air above `below`."""
        x = 0.46 + self.jitter()
        self.around([below], taken=0)
        self.middle = [
            replace(one, x=0.56, height=min(one.height, 0.36), flip=False) for one in self.middle
        ]
        self.behind = [
            replace(one, x=0.6, height=min(one.height, 0.44), y=0.9) for one in self.behind
        ]
        self.front.append(Placed(flyer, x, 0.44, height_of(flyer, 0.32, 0.28), grounded=False))

    def gives(self, giver: Shown, taker: Shown, gift: Shown) -> None:
        """`gift` between the hands of two."""
        y = self.place.floor
        for one, x, flip in ((giver, 0.23, True), (taker, 0.79, False)):
            self.middle.append(Placed(one, x + self.jitter(), y, height_of(one, 0.46, 0.38), flip))
        self.front.append(Placed(gift, 0.51, y - 0.12, 0.22, grounded=False))


# --------------------------------------------------------------------------------------------------
# 2. Signs: what stands beside a figure so that its mood, its flight or its gift is seen.
# --------------------------------------------------------------------------------------------------


def heart(x: float, y: float, size: float, role: str) -> list[tuple]:
    return [("oval", role, x - 0.23 * size, y - 0.2 * size, 0.26 * size, 0.25 * size),
            ("oval", role, x + 0.23 * size, y - 0.2 * size, 0.26 * size, 0.25 * size),
            ("poly", role, (x - 0.47 * size, y - 0.1 * size), (x + 0.47 * size, y - 0.1 * size),
                (x, y + 0.5 * size))]  # fmt: skip


def zed(x: float, y: float, size: float) -> tuple:
    return ("line", "cream", size / 4, (x, y), (x + size, y), (x, y + size), (x + size, y + size))


SIGNS = {
    "happy": [*heart(-0.3, 0.05, 0.62, "red"), *heart(0.32, -0.3, 0.46, "rose")],
    "sad": [("ovals", "gloom", 0.3, -0.22, 0.28, 0.2), ("oval", "gloom", 0, -0.34, 0.34, 0.26),
        ("line", "sky", 0.1, (-0.3, 0.1), (-0.36, 0.34)),
            ("line", "sky", 0.1, (0, 0.14), (-0.06, 0.4)), ("line", "sky", 0.1, (0.3, 0.1),
                (0.24, 0.34))],
    "afraid": [("poly", "gold", (-0.34, -0.6), (-0.06, -0.6), (-0.14, 0.08), (-0.26, 0.08)),
        ("oval", "gold", -0.2, 0.26, 0.11, 0.11),
               ("poly", "gold", (0.1, -0.6), (0.38, -0.6), (0.3, 0.08), (0.18, 0.08)),
                   ("oval", "gold", 0.24, 0.26, 0.11, 0.11)],
    "asleep": [zed(-0.5, 0.02, 0.36), zed(0.0, -0.3, 0.3), zed(0.4, -0.56, 0.24)],
    "flight": [("line", "white", 0.07, (-0.6, -0.2), (0.1, -0.2)), ("line", "white", 0.07,
        (-0.8, 0), (0.2, 0)), ("line", "white", 0.07, (-0.6, 0.2), (0.1, 0.2))],
    "gift": [("line", "gold", 0.07, (0, -0.62), (0, -0.86)), ("lines", "gold", 0.07, (0.4, -0.5),
        (0.56, -0.7))],
}  # fmt: skip
SIGN_SIZE = 0.15


# --------------------------------------------------------------------------------------------------
# 3. The picture.
# --------------------------------------------------------------------------------------------------

LIGHT_ON_FIGURES = 0.3  # of the hour's: their colours must stay tellable


@lru_cache(maxsize=512)
def shadow(width: int) -> Image.Image:
    """A soft shadow's mask."""
    height = max(4, width // 6)
    mask = Image.new("L", (2 * width, 2 * height))
    ImageDraw.Draw(mask).ellipse([0, 0, 2 * width - 1, 2 * height - 1], fill=70)
    return mask.resize((width, height), Image.Resampling.BILINEAR)


class Illustrator:
    """Draws scenes with the sprites of `art`."""

    def __init__(self, art) -> None:
        self.figures = Figures(art)

    def names(self) -> list[str]:
        """All things that can be drawn with this art."""
        return [name for name in THINGS if self.figures.can_draw(name)]

    def size_of(self, shown: Shown, height: float) -> tuple[float, float]:
        picture = self.figures.figure(shown, quantised(height))
        return picture.width / CANVAS, picture.height / CANVAS

    def draw(self, scene: Scene) -> Image.Image:
        """The scene's picture, RGB, PICTURE x PICTURE."""
        chance = random.Random(f"layout {scene.seed}")
        layout = Layout(chance.randrange(2), chance.randrange(2), chance.randrange(3))
        back = places.backdrop(scene.place, scene.time, scene.weather, layout, 2 * CANVAS)
        canvas = back.reduce(2)
        placed = Arranger(scene, self.size_of).arrange()
        for one in placed:
            self.put(canvas, scene, one)
        self.put_signs(canvas, scene, placed)
        return canvas.reduce(CANVAS // PICTURE)

    def draw_all(self, scenes: list[Scene]) -> np.ndarray:
        """Their pictures (N, PICTURE, PICTURE, 3) uint8."""
        return np.stack([np.asarray(self.draw(scene)) for scene in scenes])

    def put(self, canvas: Image.Image, scene: Scene, one: Placed) -> None:
        """One figure with its shadow, in the scene's light."""
        figure = self.lit(scene, self.figures.figure(one.shown, quantised(one.height), one.flip))
        left = round(one.x * CANVAS - figure.width / 2)
        left = min(max(left, 0), max(0, CANVAS - figure.width))
        top = round(one.y * CANVAS - figure.height)
        top = max(top, 0)
        if one.grounded:
            mask = shadow(max(8, round(0.86 * figure.width)))
            canvas.paste(
                (40, 30, 60),
                (left + round(0.07 * figure.width), round(one.y * CANVAS) - mask.height * 2 // 3),
                mask,
            )
        canvas.paste(figure, (left, top), figure)
        if is_afloat(one.shown, scene.place) and PLACES[scene.place].scene == "open":
            self.ripple(canvas, left, round(one.y * CANVAS), figure.width)

    def ripple(self, canvas: Image.Image, left: int, line: int, width: int) -> None:
        draw = ImageDraw.Draw(canvas)
        for dx, dy, share in ((0.0, -9, 0.5), (0.4, -5, 0.6), (0.1, -1, 0.7)):
            start = left + dx * width
            draw.line(
                [(start, line + dy), (start + share * width, line + dy)],
                fill=(150, 214, 236),
                width=5,
            )

    def lit(self, scene: Scene, figure: Image.Image) -> Image.Image:
        """The figure in the hour's light."""
        hour = world.TIMES[scene.time]
        if not hour.strength or PLACES[scene.place].scene in ("space", "water", "cave"):
            return figure
        share = LIGHT_ON_FIGURES * hour.strength
        tinted = Image.blend(
            figure.convert("RGB"), Image.new("RGB", figure.size, hour.light), share
        )
        tinted.putalpha(figure.getchannel("A"))
        return tinted

    def put_signs(self, canvas: Image.Image, scene: Scene, placed: list[Placed]) -> None:
        """The signs of moods, of flight and of giving."""
        easel, marked = Canvas(canvas), set()
        for one in placed:
            width, height = self.size_of(one.shown, one.height)
            top = max(0.0, one.y - height)
            if one.shown.mood and one.shown.thing not in marked:
                marked.add(one.shown.thing)
                side = 1 if one.x < 0.6 else -1
                x = min(max(one.x + side * (0.3 * width + 0.06), 0.1), 0.9)
                self.sign(easel, one.shown.mood, x, max(0.11, top - 0.02))
            if scene.relation == "flies over" and one.shown == scene.shown[0]:
                self.sign(
                    easel, "flight", max(0.1, one.x - 0.5 * width - 0.06), one.y - 0.5 * height
                )
            if scene.relation == "gives" and one.shown == scene.shown[2]:
                self.sign(easel, "gift", one.x, one.y - height + 0.04)

    def sign(self, easel: Canvas, name: str, x: float, y: float) -> None:
        easel.paint(SIGNS[name], Spot(x, y, SIGN_SIZE), world.INKS, outline=OUTLINE * 0.8)


def quantised(height: float) -> int:
    """Pixels of the canvas, in steps of 6, so that figures are drawn once and used often."""
    return max(12, 6 * round(height * CANVAS / 6))


# --------------------------------------------------------------------------------------------------
# 4. Scenes by chance.
# --------------------------------------------------------------------------------------------------

HERO_COLOURS = tuple(COLOURS)
OWN_COLOUR_ONLY = ("zebra", "panda", "skunk", "black cat", "polar bear", "rainbow", "snowman")
USUAL_PLACES = (
    "meadow",
    "forest",
    "garden",
    "village",
    "street",
    "beach",
    "living room",
    "playground",
)


def can_be_coloured(name: str) -> bool:
    thing = THINGS[name]
    if name in OWN_COLOUR_ONLY or "plain" in thing.traits or thing.kind in ("building", "sky"):
        return False
    if thing.kind == "person":
        import people

        return people.WARDROBE[name].top is None
    return True


RARE = 20  # stories; a thing that none names is drawn as one of so many


@lru_cache
def drawing_weights() -> dict[str, float]:
    """Of each thing, by the square root of how many training stories of data/tales name it
    (`word_counts.py --count`)."""
    counts = json.loads((HERE / "story_counts.json").read_text())
    return {name: math.sqrt(RARE + count) for name, count in counts.items()}


def choose(names: list[str], chance: random.Random) -> str:
    """One of the things, those that stories name often more often."""
    weights = drawing_weights()
    return chance.choices(names, [weights[name] for name in names])[0]


def sample_shown(name: str, chance: random.Random, hero: bool) -> Shown:
    look = Look(
        chance.randrange(len(SKINS)), chance.randrange(len(HAIRS)), chance.randrange(len(CLOTHES))
    )
    thing = THINGS[name]
    if thing.kind != "person":
        look = Look()
    colour = (
        chance.choice(HERO_COLOURS)
        if can_be_coloured(name) and chance.random() < (0.3 if hero else 0.12)
        else None
    )
    mood = (
        chance.choice(MOODS)
        if thing.is_being and chance.random() < (0.4 if hero else 0.2)
        else None
    )
    return Shown(name, colour, mood, look=look)


def sample_place(shown: list[Shown], chance: random.Random) -> str:
    """Mostly where one of them is at home; sometimes anywhere."""
    homes = [THINGS[one.thing].home for one in shown if THINGS[one.thing].home in PLACES]
    draw = chance.random()
    if homes and draw < 0.6:
        return chance.choice(homes)
    if draw < 0.75:
        return chance.choice(USUAL_PLACES)
    return chance.choice(list(PLACES))


def sample_relation(names: list[str], chance: random.Random) -> tuple[str, list[str]]:
    """A relation and the things in it: the hero, and what it takes; the hero is a being."""
    relation = chance.choice(RELATIONS)
    beings = [name for name in names if THINGS[name].is_being]
    land = [name for name in beings if THINGS[name].kind in ("person", "animal", "fantasy", "bird")]
    small = [name for name in land if THINGS[name].size <= 1.0 and THINGS[name].kind != "bird"]

    def of(trait: str) -> list[str]:
        return [name for name in names if trait in THINGS[name].traits]

    if relation == "holds":
        return relation, [choose(land, chance), choose(of("carried"), chance)]
    if relation == "rides":
        return relation, [choose(small, chance), choose(of("ridden"), chance)]
    if relation == "sits in":
        return relation, [choose(small, chance), choose(of("seat"), chance)]
    if relation == "gives":
        return relation, [choose(land, chance), choose(land, chance), choose(of("carried"), chance)]
    flyers = [name for name in beings if {"flies", "air"} & THINGS[name].traits] + [
        "superhero",
        "witch",
    ]
    flyers += [name for name in of("air") if THINGS[name].kind == "vehicle"]
    below = [
        name for name in names if "air" not in THINGS[name].traits and THINGS[name].size >= 0.65
    ]
    return relation, [
        choose([name for name in flyers if name in names], chance),
        choose(below, chance),
    ]


def sample_scene(seed: int, names: list[str], heroes: list[str] | None = None) -> Scene:
    """The scene of a seed, of things among `names`; its first thing is one of `heroes`, where these
    are given, as likely as another."""
    chance = random.Random(f"scene {seed}")
    beings = [name for name in names if THINGS[name].is_being]
    relation = ""
    if chance.random() < 0.3 and not heroes:
        relation, chosen = sample_relation(names, chance)
    else:
        number = chance.choices((1, 2, 3), (40, 40, 20))[0]
        first = beings if chance.random() < 0.6 else names
        chosen = [chance.choice(heroes) if heroes else choose(first, chance)]
        chosen += [
            choose(names if chance.random() < 0.7 else beings, chance) for _ in range(number - 1)
        ]
    chosen = list(dict.fromkeys(chosen))
    if relation and len(chosen) < (3 if relation == "gives" else 2):
        relation = ""
    shown = [sample_shown(name, chance, hero=i == 0) for i, name in enumerate(chosen)]
    if relation and relation != "sits in":
        shown = [replace(one, mood=None) if one.mood == "asleep" else one for one in shown]
    if relation == "gives":
        shown[2] = replace(shown[2], colour=None)
    elif not relation and len(shown) == 1 and chance.random() < 0.2:
        shown[0] = replace(shown[0], count=chance.randint(2, 5))
    elif not relation and len(shown) == 2 and chance.random() < 0.2:
        sizes = chance.choice((("big", "small"), ("small", "big")))
        shown = [replace(one, size=size) for one, size in zip(shown, sizes)]
    place = sample_place(shown, chance)
    time = chance.choices(TIMES, (20, 40, 20, 20))[0]
    weather = chance.choices(WEATHERS, (55, 15, 15, 15))[0]
    if place not in places.HAS_TIME:
        time = "noon"
    if place not in places.HAS_WEATHER:
        weather = "clear"
    return Scene(tuple(shown), place, time, weather, relation, seed)


FAIRGROUND = ("ferris wheel", "circus tent")  # what shows a fair where it is not the place
FAIR_PLACES = ("moon", "beach", "desert", "snow", "meadow", "forest", "mountain", "island", "city")
FAIR_WEIGHTS = (4, *[1] * (len(FAIR_PLACES) - 1))  # people ask for a fair on the moon


def sample_fair(seed: int, names: list[str]) -> Scene:
    """A fair in another place, mostly with a hero among `names`."""
    chance = random.Random(f"fair {seed}")
    beings = [name for name in names if THINGS[name].is_being]
    hero = sample_shown(choose(beings, chance), chance, hero=True)
    before = (hero,) if chance.random() < 0.7 else ()
    place = chance.choices(FAIR_PLACES, FAIR_WEIGHTS)[0]
    time = chance.choice(TIMES) if place in places.HAS_TIME else "noon"
    return Scene((*before, *map(Shown, FAIRGROUND)), place, time, "clear", seed=seed)
