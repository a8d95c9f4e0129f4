"""The places of the painter's scenes, the storyworld's six among them, at every time and weather.

    picture = backdrop("castle", "night", "snowy", Layout(), 512)  # RGB; copy it to draw on it

A place is a function that gives rows of shapes in picture widths, x to the right and y down from
the upper left corner, as the storyworld's tables have them: `(kind, role, *geometry)`. A role is a
name in INKS, "ground", "grass" or "pane", or a colour itself. Every place has its mirror image, so
each is seen in two ways."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "storyworld")]

import world  # noqa: E402
from world import PLUM, Canvas, Colour, Spot, mix  # noqa: E402

TIMES, WEATHERS = tuple(world.TIMES), tuple(world.WEATHERS)
Row = tuple  # (kind, role, *geometry)

# --------------------------------------------------------------------------------------------------
# Colours by name; what snow lies on, as in the storyworld.
# --------------------------------------------------------------------------------------------------

INKS: dict[str, Colour] = {
    "leaf": (76, 150, 82), "tip": (58, 138, 86), "trunk": (112, 78, 56), "bark": (140, 96, 66),
    "meadow": (122, 190, 86), "hill": (104, 168, 92), "field": (214, 196, 96),
        "sand": (246, 220, 156),
    "stone": (206, 204, 220), "slate": (176, 172, 196), "rock": (136, 144, 176),
        "cliff": (116, 86, 86),
    "water": (70, 160, 214), "foam": (150, 214, 236), "deep": (44, 128, 190),
        "road": (112, 112, 124),
    "kerb": (196, 192, 190), "line": (240, 234, 210), "white": (252, 250, 244),
        "cream": (252, 240, 216),
    "red": (214, 62, 62), "gold": (250, 196, 64), "blue": (70, 120, 214), "teal": (60, 164, 166),
    "violet": (150, 84, 190), "pink": (240, 130, 160), "green": (90, 170, 80),
        "orange": (244, 140, 52),
    "wood": (186, 132, 92), "door": (132, 88, 62), "iron": (90, 90, 104), "ink": (60, 50, 66),
    "roof": (204, 82, 64), "wall": (250, 232, 202), "lava": (250, 120, 50), "dusk": (62, 54, 76),
}  # fmt: skip
SNOW_ON = {"ground": 1.0, "grass": 1.0, "meadow": 0.9, "hill": 0.85, "field": 0.85, "sand": 0.7,
    "leaf": 0.4,
           "tip": 0.6, "roof": 0.8, "road": 0.45, "kerb": 0.7, "rock": 0.4}  # fmt: skip
LAMPLIGHT: Colour = (255, 222, 110)


class Light(dict):
    """Inks in a light: name or colour -> colour, worked out when first asked for."""

    def __init__(self, ground: Colour, time: str, weather: str) -> None:
        super().__init__()
        self.time, self.weather = world.TIMES[time], world.WEATHERS[weather]
        self.ground, self.lamps = ground, time in ("evening", "night")

    def __missing__(self, role: str | Colour) -> Colour:
        if role == "pane":
            colour = LAMPLIGHT if self.lamps else self.lit((150, 204, 230), 0.0)
        elif role == "grass":
            colour = self.lit(mix(self.ground, PLUM, 0.07), SNOW_ON["grass"])
        elif role == "ground":
            colour = self.lit(self.ground, SNOW_ON["ground"])
        else:
            colour = self.lit(INKS[role] if isinstance(role, str) else role, SNOW_ON.get(role, 0.0))
        self[role] = colour
        return colour

    def lit(self, colour: Colour, snow: float) -> Colour:
        colour = mix(colour, world.SNOW, self.weather.snow * snow)
        return mix(mix(colour, world.GREY, self.weather.veil), self.time.light, self.time.strength)


# --------------------------------------------------------------------------------------------------
# Parts.
# --------------------------------------------------------------------------------------------------


def oval(role, x, y, rx, ry) -> Row:
    return ("oval", role, x, y, rx, ry)


def box(role, left, top, right, bottom, radius=0.0) -> Row:
    return ("box", role, left, top, right, bottom, radius)


def poly(role, *corners) -> Row:
    return ("poly", role, *corners)


def line(role, width, *points) -> Row:
    return ("line", role, width, *points)


def moved(rows, x: float, y: float, scale: float) -> list[Row]:
    """A storyworld motif put at (x, y): its rows in picture widths."""
    return [place_row(row, x, y, scale) for row in both_sides(rows)]


def both_sides(rows) -> list[Row]:
    """Rows with the mirror images that plural kinds stand for spelled out."""
    out = []
    for kind, role, *geometry in rows:
        out.append((kind.removesuffix("s"), role, *geometry))
        if kind.endswith("s"):
            out.append((kind[:-1], role, *world.mirrored(geometry)))
    return out


def place_row(row: Row, x: float, y: float, scale: float) -> Row:
    kind, role, *geometry = row
    if kind in ("oval", "dome"):
        cx, cy, rx, ry = geometry
        return (kind, role, x + cx * scale, y + cy * scale, rx * scale, ry * scale)
    if kind == "box":
        left, top, right, bottom, radius = geometry
        corners = (x + left * scale, y + top * scale, x + right * scale, y + bottom * scale)
        return (kind, role, *corners, radius * scale)
    width = [part * scale for part in geometry if not isinstance(part, tuple)]
    points = [(x + px * scale, y + py * scale) for px, py in geometry[len(width) :]]
    return (kind, role, *width, *points)


def grass() -> list[Row]:
    """The two swells of ground that everybody stands on."""
    return [oval("ground", 0.5, 1.02, 1.0, 0.30), oval("grass", 0.5, 1.12, 0.9, 0.26)]


def hills(first="hill", second="meadow") -> list[Row]:
    return [oval(first, 0.12, 0.84, 0.5, 0.2), oval(second, 0.92, 0.84, 0.48, 0.2)]


def tree(x, y, height) -> list[Row]:
    return moved(world.SCENERY["tree"], x, y, height)


def pine(x, y, height) -> list[Row]:
    return moved(world.SCENERY["pine"], x, y, height)


def palm(x, y, height) -> list[Row]:
    return moved(world.SCENERY["palm"], x, y, height)


def house(x, y, height, wall="wall", roof="roof") -> list[Row]:
    inks = {"wall": wall, "roof": roof}
    rows = [(kind, inks.get(role, role), *rest) for kind, role, *rest in world.SCENERY["house"]]
    return moved(rows, x, y, height)


def waves(spots, width=0.12) -> list[Row]:
    return [line("foam", 0.012, (x, y), (x + width, y)) for x, y in spots]


def blooms(spots) -> list[Row]:
    rows, colours = [], ("red", "gold", "violet", "pink")
    for i, (x, y) in enumerate(spots):
        rows.append(line("leaf", 0.012, (x, y), (x, y + 0.05)))
        rows += [oval(colours[i % 4], x, y, 0.028, 0.028), oval("cream", x, y, 0.011, 0.011)]
    return rows


def fence(top, bottom, posts=9, role="white") -> list[Row]:
    step = 1 / posts
    rows = [box(role, i * step + 0.02, top, i * step + 0.055, bottom, 0.01) for i in range(posts)]
    high, low = top + (bottom - top) * 0.25, top + (bottom - top) * 0.65
    return [*rows, box(role, 0, high, 1, high + 0.018), box(role, 0, low, 1, low + 0.018)]


def road() -> list[Row]:
    dashes = [box("line", x, 0.905, x + 0.16, 0.925) for x in (0.05, 0.38, 0.71)]
    return [box("kerb", 0, 0.76, 1, 1), box("road", 0, 0.83, 1, 1), *dashes]


def skyline(windows=True) -> list[Row]:
    towers = ((0, 0.14, 0.3), (0.13, 0.27, 0.42), (0.26, 0.38, 0.24), (0.38, 0.52, 0.46),
        (0.52, 0.64, 0.34),
              (0.63, 0.77, 0.5), (0.76, 0.88, 0.3), (0.87, 1, 0.44))  # fmt: skip
    colours = (
        (150, 166, 200),
        (196, 150, 150),
        (172, 182, 206),
        (140, 150, 190),
        (206, 178, 150),
        (156, 176, 190),
    )
    rows = []
    for i, (left, right, height) in enumerate(towers):
        top = 0.78 - height
        rows.append(box(colours[i % 6], left, top, right, 0.8))
        if windows:
            rows += [box("pane", left + 0.025 + 0.045 * column, top + 0.04 + 0.075 * row,
                         left + 0.047 + 0.045 * column, top + 0.075 + 0.075 * row)
                     for row in range(int((height - 0.06) / 0.075))
                     for column in range(int((right - left - 0.03) / 0.045))]  # fmt: skip
    return rows


def tower(x, top, bottom, half, roof) -> list[Row]:
    tip = top - 2.6 * half
    return [box("slate", x - half, top, x + half, bottom), box("pane", x - 0.02, top + 0.1,
        x + 0.02, top + 0.18, 0.02),
            poly(roof, (x - 1.4 * half, top + 0.01), (x + 1.4 * half, top + 0.01),
                (x, tip))]  # fmt: skip


def awning(x, width, first, second, top=0.38) -> list[Row]:
    step, rows = width / 6, []
    for i in range(6):
        role, left = (first, second)[i % 2], x + i * step
        rows += [
            box(role, left, top, left + step, top + 0.14),
            oval(role, left + step / 2, top + 0.14, step / 2, 0.03),
        ]
    return rows


def room(wall, floor, board) -> list[Row]:
    boards = [line(mix(floor, PLUM, 0.15), 0.006, (0, y), (1, y)) for y in (0.82, 0.92)]
    return [
        box(wall, 0, 0, 1, 0.74),
        box(floor, 0, 0.72, 1, 1),
        box(board, 0, 0.705, 1, 0.735),
        *boards,
    ]


def window(x, y, width, height) -> list[Row]:
    """A window in a wall; "sky" is what is seen through it."""
    right, bottom = x + width, y + height
    across, down = x + width / 2, y + height / 2
    return [box("white", x - 0.02, y - 0.02, right + 0.02, bottom + 0.02, 0.01),
        box("sky", x, y, right, bottom),
            oval("disc", x + width * 0.74, y + height * 0.27, 0.035, 0.035),
            box("white", across - 0.008, y, across + 0.008, bottom),
            box("white", x, down - 0.008, right, down + 0.008)]  # fmt: skip


def books(x, y, width, count) -> list[Row]:
    colours, step = ("red", "blue", "gold", "green", "violet", "teal"), width / count
    return [box(colours[i * 5 % 6], x + i * step, y - 0.07 - 0.012 * (i * 7 % 3),
        x + (i + 0.85) * step, y)
            for i in range(count)]  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Outdoors.
# --------------------------------------------------------------------------------------------------


def city():
    return [*skyline(), *road()]


def street():
    walls = (((250, 226, 190), (204, 82, 64)), ((204, 224, 240), (84, 110, 160)),
        ((250, 210, 200), (150, 90, 110)),
             ((226, 236, 200), (110, 140, 90)))  # fmt: skip
    rows = []
    for (wall, roof), x, height in zip(walls, (0.08, 0.37, 0.66, 0.94), (0.46, 0.54, 0.44, 0.52)):
        rows += house(x, 0.78, height, wall, roof)
    return [*rows, *road()]


def castle():
    x, rows = 0.62, [*hills()]
    rows += [box("stone", x - 0.22, 0.36, x + 0.22, 0.8)]
    rows += [box("stone", x - 0.22 + i * 0.095, 0.31, x - 0.165 + i * 0.095, 0.4) for i in range(5)]
    for side in (-1, 1):
        rows += tower(x + side * 0.27, 0.28, 0.8, 0.075, "violet")
    rows += tower(x, 0.18, 0.4, 0.075, "red")
    rows += [oval("door", x, 0.62, 0.07, 0.07), box("door", x - 0.07, 0.62, x + 0.07, 0.8)]
    return [*rows, *grass()]


def farm():
    x = 0.25
    rows = [*hills("meadow", "field"), box("red", x - 0.17, 0.46, x + 0.17, 0.78)]
    rows += [poly("door", (x - 0.21, 0.48), (x - 0.12, 0.32), (x + 0.12, 0.32), (x + 0.21, 0.48))]
    rows += [
        box("white", x - 0.07, 0.58, x + 0.07, 0.78),
        box("white", x - 0.04, 0.38, x + 0.04, 0.45),
    ]
    rows += [
        line("red", 0.012, (x - side * 0.07, 0.58), (x + side * 0.07, 0.78)) for side in (-1, 1)
    ]
    return [*rows, *grass(), *fence(0.73, 0.83)]


def sea():
    rows = [box("water", 0, 0.6, 1, 1)]
    for y, role in ((0.66, "foam"), (0.76, "deep"), (0.88, (36, 116, 176))):
        rows += [oval(role, i * 0.22 + y * 3 % 0.2, y + 0.03, 0.12, 0.026) for i in range(-1, 6)]
    return [*rows, box((34, 110, 170), 0, 0.93, 1, 1)]


def river():
    rows = [*hills(), *tree(0.9, 0.68, 0.36), *tree(0.1, 0.66, 0.3), box("ground", 0, 0.72, 1, 1)]
    stream = (
        (0.38, 0.66),
        (0.62, 0.66),
        (0.74, 0.8),
        (1, 0.9),
        (1, 1),
        (0, 1),
        (0, 0.92),
        (0.3, 0.8),
    )
    return [
        *rows,
        poly("water", *stream),
        *waves(((0.43, 0.74), (0.3, 0.86), (0.62, 0.93), (0.1, 0.96))),
    ]


def lake():
    rows = [
        oval("hill", 0.15, 0.74, 0.5, 0.2),
        oval("leaf", 0.85, 0.74, 0.5, 0.22),
        box("water", 0, 0.66, 1, 1),
    ]
    rows += [
        *waves(((0.2, 0.72), (0.55, 0.76), (0.75, 0.7), (0.35, 0.84))),
        oval("ground", 0.5, 1.06, 0.8, 0.18),
    ]
    for x in (0.05, 0.09, 0.93, 0.97):
        rows += [
            line("leaf", 0.012, (x, 0.98), (x, 0.76)),
            box("bark", x - 0.012, 0.74, x + 0.012, 0.82, 0.01),
        ]
    return rows


def garden():
    pickets = [box("white", i * 0.1, 0.5, i * 0.1 + 0.075, 0.78) for i in range(11)]
    pickets += [
        poly("white", (i * 0.1, 0.505), (i * 0.1 + 0.075, 0.505), (i * 0.1 + 0.0375, 0.45))
        for i in range(11)
    ]
    spots = ((0.04, 0.8), (0.14, 0.83), (0.27, 0.78), (0.42, 0.79), (0.58, 0.79), (0.73, 0.78),
        (0.86, 0.83),
             (0.97, 0.8), (0.07, 0.95), (0.93, 0.95))  # fmt: skip
    rows = [*pickets, box((232, 224, 210), 0, 0.6, 1, 0.63), *tree(0.88, 0.66, 0.44), *grass()]
    return [*rows, *blooms(spots)]


def jungle():
    rows = [box((42, 120, 84), 0, 0.2, 1, 1)]
    rows += [box("trunk", x - 0.035, 0, x + 0.035, 0.85) for x in (0.05, 0.3, 0.72, 0.96)]
    canopy = (
        (0, 0.08, 0.2),
        (0.2, 0.02, 0.2),
        (0.45, 0.05, 0.22),
        (0.7, 0, 0.2),
        (0.95, 0.07, 0.22),
    )
    rows += [oval((34, 104, 72), x, y, radius, 0.12) for x, y, radius in canopy]
    rows += [
        line((70, 150, 76), 0.014, (x, 0), (x + 0.03, 0.2), (x - 0.02, 0.42))
        for x in (0.17, 0.55, 0.86)
    ]
    rows += [oval((60, 146, 84), x, 0.8, 0.12, 0.14) for x in (0, 0.14, 0.34, 0.52, 0.7, 0.88, 1.0)]
    return [*rows, *grass()]


def snow():
    rows = []
    for x, y, height in ((0.12, 0.76, 0.44), (0.86, 0.76, 0.5), (0.5, 0.74, 0.34)):
        rows.append(poly((176, 198, 226), (x - 0.34, y), (x, y - height), (x + 0.34, y)))
        rows.append(poly("white", (x - 0.1, y - height * 0.7), (x, y - height),
            (x + 0.1, y - height * 0.7),
                         (x + 0.03, y - height * 0.62), (x - 0.04, y - height * 0.7)))  # fmt: skip
    return [*rows, *pine(0.03, 0.8, 0.42), *pine(0.97, 0.8, 0.46), *grass()]


def market():
    rows = [box((236, 206, 160), 0, 0.5, 1, 0.8)]
    fruits = ("red", "orange", "green")
    for number, (x, role) in enumerate(((0.0, "red"), (0.52, "blue"))):
        rows += [box("door", x + side, 0.52, x + side + 0.04, 0.8) for side in (0.02, 0.42)]
        rows += [box("wood", x + 0.02, 0.66, x + 0.46, 0.8), *awning(x, 0.48, role, "white")]
        rows += [
            oval(fruits[(i + number) % 3], x + 0.07 + i * 0.07, 0.645, 0.032, 0.032)
            for i in range(6)
        ]
    return [*rows, *grass()]


def playground():
    x, rows = 0.2, [*hills("hill", "meadow"), *tree(0.95, 0.68, 0.34)]
    rows += [
        line("blue", 0.02, (x - 0.14, 0.8), (x - 0.08, 0.42)),
        line("blue", 0.02, (x + 0.2, 0.8), (x + 0.14, 0.42)),
    ]
    rows += [
        line("red", 0.022, (x - 0.1, 0.42), (x + 0.16, 0.42)),
        box("gold", x - 0.04, 0.65, x + 0.1, 0.675),
    ]
    rows += [line("iron", 0.008, (x + side, 0.42), (x + side, 0.66)) for side in (-0.02, 0.08)]
    rows += [line("gold", 0.03, (0.62, 0.46), (0.86, 0.78)), box("red", 0.52, 0.44, 0.64, 0.47)]
    rows += [line("blue", 0.02, (side, 0.46), (side, 0.8)) for side in (0.54, 0.62)]
    return [*rows, *grass()]


def island():
    return [*sea(), oval("sand", 0.5, 0.98, 0.62, 0.24), *palm(0.87, 0.9, 0.56)]


def volcano():
    x = 0.5
    rows = [poly("cliff", (x - 0.5, 0.8), (x - 0.1, 0.28), (x + 0.1, 0.28), (x + 0.5, 0.8))]
    rows.append(poly("lava", (x - 0.1, 0.28), (x + 0.1, 0.28), (x + 0.16, 0.44), (x + 0.08, 0.38),
        (x + 0.03, 0.56),
                     (x - 0.04, 0.4), (x - 0.1, 0.48)))  # fmt: skip
    rows += [
        oval((150, 140, 150), x, 0.2, 0.1, 0.07),
        oval((170, 160, 168), x + 0.1, 0.12, 0.13, 0.08),
    ]
    return [*rows, *grass()]


def fair():
    x, y, rows = 0.74, 0.4, [oval("hill", 0.5, 0.86, 0.9, 0.2)]
    rim = [
        (x + 0.2 * math.cos(i * math.pi / 12), y + 0.2 * math.sin(i * math.pi / 12))
        for i in range(25)
    ]
    spokes, cabins = rim[:24:3], ("gold", "blue", "red", "green")
    rows += [line("white", 0.01, (x, y), spoke) for spoke in spokes]
    rows += [line("pink", 0.016, *rim)]
    rows += [oval(cabins[i % 4], cx, cy, 0.035, 0.035) for i, (cx, cy) in enumerate(spokes)]
    rows += [line("violet", 0.018, (x, y), (x + side * 0.08, 0.78)) for side in (-1, 1)]
    for i in range(6):
        role = ("red", "white")[i % 2]
        rows.append(poly(role, (0.24, 0.34), (0.02 + i * 0.075, 0.58), (0.095 + i * 0.075, 0.58)))
        rows.append(box(role, 0.05 + i * 0.065, 0.57, 0.115 + i * 0.065, 0.78))
    return [*rows, poly("gold", (0.24, 0.36), (0.24, 0.24), (0.31, 0.27)), *grass()]


def swamp():
    rows = [box((96, 122, 96), 0, 0.55, 1, 1)]
    for x, height in ((0.08, 0.6), (0.9, 0.66)):
        rows += [line("trunk", 0.05, (x, 0.85), (x, 0.85 - height)), line("trunk", 0.025, (x, 0.5),
            (x + 0.12, 0.36)),
                 line("trunk", 0.025, (x, 0.4), (x - 0.1, 0.28))]  # fmt: skip
        rows += [
            line((110, 140, 90), 0.014, (x + dx, 0.34), (x + dx, 0.5)) for dx in (-0.08, 0.06, 0.11)
        ]
    rows += [box((82, 110, 84), 0, 0.72, 1, 1), *waves(((0.2, 0.78), (0.62, 0.8), (0.4, 0.88)))]
    rows += [
        oval((110, 160, 80), x, y, 0.07, 0.022)
        for x, y in ((0.3, 0.84), (0.76, 0.88), (0.12, 0.92))
    ]
    return [*rows, oval("ground", 0.5, 1.08, 0.6, 0.16)]


def harbour():
    rows = [*sea()[:8], *house(0.1, 0.66, 0.34, "white", "blue"), *house(0.34, 0.66, 0.3)]
    rows += [line("white", 0.02, (0.8, 0.64), (0.8, 0.3)), poly("red", (0.82, 0.34), (0.82, 0.58),
        (0.96, 0.58)),
             poly("door", (0.66, 0.63), (0.98, 0.63), (0.92, 0.72), (0.72, 0.72))]  # fmt: skip
    rows += [box("wood", 0, 0.8, 1, 1)] + [line("door", 0.008, (x, 0.8), (x - 0.04, 1)) for x in
                                          (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)]  # fmt: skip
    return rows


def sky():
    clouds = ((0.1, 0.9, 0.2), (0.4, 0.98, 0.24), (0.75, 0.92, 0.22), (1.0, 0.98, 0.2),
        (0.85, 0.34, 0.11),
              (0.14, 0.46, 0.1))  # fmt: skip
    return [oval("white", x + side * radius, y + abs(side) * radius * 0.3, radius * 0.6,
        radius * 0.5)
            for x, y, radius in clouds for side in (-0.6, 0, 0.6)]  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Places without weather: space, under the sea and in a cave without a sky; indoors it is seen
# through the window.
# --------------------------------------------------------------------------------------------------


def moon():
    rows = [oval((64, 134, 214), 0.8, 0.2, 0.11, 0.11), oval((100, 190, 110), 0.77, 0.17, 0.05,
        0.04),
            oval((100, 190, 110), 0.84, 0.24, 0.04, 0.03), oval((176, 176, 188), 0.5, 1.06, 1.0,
                0.4),
            oval((156, 156, 170), 0.5, 1.16, 0.95, 0.36)]  # fmt: skip
    for x, y, radius in (
        (0.12, 0.8, 0.08),
        (0.4, 0.75, 0.05),
        (0.82, 0.78, 0.09),
        (0.62, 0.9, 0.07),
        (0.25, 0.93, 0.06),
    ):
        rows += [oval((136, 136, 152), x, y, radius, radius * 0.42),
                 oval((150, 150, 166), x, y + 0.012, radius * 0.84, radius * 0.3)]  # fmt: skip
    return rows


def space():
    return [oval((200, 120, 90), 0.84, 0.84, 0.22, 0.22), oval((220, 146, 110), 0.78, 0.8, 0.06,
        0.06),
            oval((176, 100, 80), 0.9, 0.9, 0.05, 0.05), oval((110, 190, 200), 0.16, 0.2, 0.07,
                0.07)]  # fmt: skip


def underwater():
    rows = [
        poly((110, 206, 234), (x - 0.03, 0), (x + 0.05, 0), (x + 0.12, 0.7), (x - 0.08, 0.7))
        for x in (0.2, 0.5, 0.8)
    ]
    rows += [
        oval((232, 206, 146), 0.5, 1.06, 0.9, 0.22),
        oval((214, 186, 126), 0.5, 1.14, 0.9, 0.2),
    ]
    for x, height, role in (
        (0.05, 0.34, "leaf"),
        (0.1, 0.24, "green"),
        (0.92, 0.36, "leaf"),
        (0.97, 0.22, "green"),
    ):
        points = [
            (x + side * 0.025, 0.94 - height * part / 3) for part, side in enumerate((0, 1, -1, 0))
        ]
        rows.append(line(role, 0.03, *points))
    rows += [oval("pink", 0.85, 0.86, 0.05, 0.05), oval("pink", 0.8, 0.91, 0.035, 0.035)]
    return rows + [
        oval((200, 236, 248), x, y, 0.012, 0.012)
        for x, y in ((0.2, 0.3), (0.23, 0.22), (0.7, 0.4), (0.73, 0.3))
    ]


def cave():
    rows = [
        box((84, 74, 96), 0, 0, 1, 1),
        oval("dusk", 0.5, 0.5, 0.52, 0.5),
        oval((48, 42, 62), 0.5, 0.58, 0.36, 0.38),
    ]
    drips = ((0.06, 0.24), (0.18, 0.15), (0.32, 0.2), (0.66, 0.18), (0.82, 0.24), (0.95, 0.16))
    rows += [poly((104, 94, 116), (x - 0.06, 0), (x + 0.06, 0), (x, height)) for x, height in drips]
    for x, y in ((0.12, 0.6), (0.9, 0.56)):
        rows += [poly((110, 200, 220), (x - 0.05, y + 0.2), (x, y), (x + 0.05, y + 0.2)),
                 poly((150, 120, 220), (x, y + 0.2), (x + 0.05, y + 0.06),
                     (x + 0.09, y + 0.2))]  # fmt: skip
    return [*rows, *grass()]


def living_room():
    x = 0.12
    rows = [
        *room((250, 222, 186), (186, 132, 92), (230, 190, 150)),
        *window(0.62, 0.14, 0.26, 0.28),
    ]
    rows += [
        box((214, 170, 110), x, 0.16, x + 0.2, 0.36),
        box("teal", x + 0.02, 0.18, x + 0.18, 0.34),
    ]
    return [
        *rows,
        oval((206, 96, 96), 0.5, 0.9, 0.36, 0.09),
        oval((232, 150, 130), 0.5, 0.9, 0.28, 0.065),
    ]


def bedroom():
    rows = [
        *room((178, 196, 236), (170, 128, 100), (224, 228, 246)),
        *window(0.38, 0.12, 0.26, 0.28),
    ]
    rows += [box("door", 0.02, 0.5, 0.07, 0.86), box((90, 130, 220), 0.05, 0.62, 0.32, 0.8, 0.03),
             box("white", 0.06, 0.58, 0.16, 0.66, 0.02), box("door", 0.29, 0.6, 0.33,
                 0.86)]  # fmt: skip
    return [*rows, oval((240, 190, 210), 0.55, 0.93, 0.34, 0.07)]


def kitchen():
    rows = [
        *room((226, 240, 222), (206, 190, 170), (200, 214, 196)),
        *window(0.38, 0.1, 0.24, 0.22),
    ]
    rows += [box((120, 170, 190), 0, 0.5, 0.36, 0.76), box("cream", 0, 0.47, 0.38, 0.52),
        box("white", 0.66, 0.5, 1, 0.76),
             box("iron", 0.64, 0.47, 1, 0.52), box((70, 70, 86), 0.72, 0.56, 0.94, 0.72, 0.02),
             box((214, 150, 100), 0.02, 0.14, 0.3, 0.32, 0.01), line("door", 0.008, (0.16, 0.14),
                 (0.16, 0.32))]  # fmt: skip
    return rows + [
        box((100, 150, 170), x - 0.03, 0.56, x + 0.03, 0.7, 0.01) for x in (0.08, 0.18, 0.28)
    ]


def school():
    rows = [
        *room((250, 238, 204), (196, 160, 118), (226, 206, 160)),
        *window(0.02, 0.14, 0.14, 0.26),
    ]
    rows += [box("door", 0.22, 0.12, 0.78, 0.46), box((56, 110, 90), 0.24, 0.14, 0.76, 0.44)]
    rows += [
        line("white", 0.012, (0.3, 0.22), (0.5, 0.22)),
        line("white", 0.012, (0.3, 0.3), (0.62, 0.3)),
    ]
    rows += [oval("white", 0.89, 0.2, 0.06, 0.06), line("ink", 0.01, (0.89, 0.2), (0.89, 0.165)),
             line("ink", 0.01, (0.89, 0.2), (0.915, 0.2))]  # fmt: skip
    for x in (0.06, 0.94):
        rows.append(box((206, 150, 96), x - 0.1, 0.64, x + 0.1, 0.67))
        rows += [
            box("iron", x + side * 0.07 - 0.01, 0.67, x + side * 0.07 + 0.01, 0.8)
            for side in (-1, 1)
        ]
    return rows


def library():
    rows = [*room((222, 200, 170), (150, 104, 76), (190, 150, 110)), *window(0.42, 0.12, 0.18, 0.3)]
    for x in (0.02, 0.66):
        rows.append(box("door", x, 0.08, x + 0.32, 0.74))
        for y in (0.24, 0.4, 0.56, 0.72):
            rows += [
                box((84, 56, 44), x + 0.02, y - 0.12, x + 0.3, y),
                *books(x + 0.03, y, 0.26, 7),
            ]
    return [*rows, oval("teal", 0.5, 0.92, 0.32, 0.07)]


def hospital():
    rows = [
        *room((220, 240, 244), (206, 214, 222), (180, 210, 220)),
        *window(0.4, 0.12, 0.24, 0.26),
    ]
    rows += [
        box("white", 0.04, 0.12, 0.24, 0.32, 0.02),
        box("red", 0.12, 0.15, 0.16, 0.29),
        box("red", 0.07, 0.2, 0.21, 0.24),
    ]
    rows += [line("iron", 0.014, (0.72, 0.5), (0.72, 0.84)), line("iron", 0.014, (0.98, 0.56),
        (0.98, 0.84)),
             box("white", 0.7, 0.64, 1, 0.74, 0.02), box((120, 200, 210), 0.8, 0.62, 1, 0.74, 0.02),
             box("cream", 0.72, 0.59, 0.82, 0.65, 0.02)]  # fmt: skip
    return rows


def bathroom():
    rows = [*room((196, 226, 236), (220, 226, 232), (240, 246, 250)), *window(0.4, 0.12, 0.2, 0.2)]
    rows += [line((170, 206, 220), 0.006, (0, y), (1, y)) for y in (0.46, 0.54, 0.62)]
    rows += [
        line((170, 206, 220), 0.006, (x, 0.42), (x, 0.7)) for x in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
    ]
    rows += [box("white", 0.64, 0.58, 1.02, 0.8, 0.06), box((120, 190, 230), 0.68, 0.58, 1, 0.62,
        0.02),
             line("iron", 0.02, (0.94, 0.58), (0.94, 0.44), (0.88, 0.44)), oval("white", 0.14, 0.24,
                 0.09, 0.12),
             oval((190, 230, 246), 0.14, 0.24, 0.07, 0.1)]  # fmt: skip
    return [*rows, oval((240, 190, 210), 0.35, 0.93, 0.26, 0.06)]


def stage():
    rows = [box((96, 40, 60), 0, 0, 1, 0.74), box((186, 126, 80), 0, 0.74, 1, 1)]
    rows += [
        poly((255, 236, 170), (0.5, 0), (0.26, 0.86), (0.74, 0.86)),
        oval((255, 240, 190), 0.5, 0.88, 0.26, 0.06),
    ]
    for x, side in ((0, 1), (1, -1)):
        rows += [box("red", min(x, x + side * 0.16), 0, max(x, x + side * 0.16), 0.9)]
        rows += [
            line((160, 36, 50), 0.014, (x + side * dx, 0), (x + side * dx, 0.9))
            for dx in (0.05, 0.11, 0.16)
        ]
    rows += [oval("red", 0.1 + 0.2 * i, 0.02, 0.12, 0.1) for i in range(5)]
    return rows + [line("gold", 0.014, (0, 0.13), (1, 0.13))]


@dataclass(frozen=True)
class Place:
    """A drawn place: its rows, and where things go in it."""

    rows: Callable[[], list[Row]] | None  # None: the storyworld's own
    ground: Colour = (128, 190, 96)
    floor: float = 0.94  # where feet stand
    water: float | None = None  # the water's line, for those that swim
    scene: str = "open"  # or "room", "space", "water", "cave"


STORYWORLD = {name: Place(None, water=0.66 if name == "beach" else None) for name in world.PLACES}
PLACES: dict[str, Place] = STORYWORLD | {
    "city": Place(city),
    "street": Place(street),
    "castle": Place(castle),
    "farm": Place(farm, (134, 190, 90)),
    "sea": Place(sea, floor=0.9, water=0.8),
    "river": Place(river, water=0.9),
    "lake": Place(lake, water=0.8),
    "garden": Place(garden, (124, 192, 92)),
    "jungle": Place(jungle, (86, 150, 70)),
    "snow": Place(snow, (238, 244, 252)),
    "market": Place(market, (206, 186, 150)),
    "playground": Place(playground, (140, 200, 100)),
    "island": Place(island, floor=0.92, water=0.72),
    "volcano": Place(volcano, (120, 110, 100)),
    "fair": Place(fair, (150, 200, 110)),
    "swamp": Place(swamp, (120, 140, 84), water=0.86),
    "harbour": Place(harbour, floor=0.95, water=0.78),
    "sky": Place(sky, floor=0.86),
    "moon": Place(moon, scene="space"),
    "space": Place(space, floor=0.74, scene="space"),
    "underwater": Place(underwater, floor=0.92, water=0.92, scene="water"),
    "cave": Place(cave, (112, 100, 118), scene="cave"),
    "living room": Place(living_room, scene="room"),
    "bedroom": Place(bedroom, scene="room"),
    "kitchen": Place(kitchen, scene="room"),
    "school": Place(school, scene="room"),
    "library": Place(library, scene="room"),
    "hospital": Place(hospital, scene="room"),
    "bathroom": Place(bathroom, scene="room"),
    "stage": Place(stage, scene="room"),
}
INDOORS = tuple(name for name, place in PLACES.items() if place.scene == "room")
WITHOUT_SKY = tuple(
    name for name, place in PLACES.items() if place.scene in ("space", "water", "cave")
)
HAS_WEATHER = tuple(name for name, place in PLACES.items() if place.scene == "open")
HAS_TIME = (*HAS_WEATHER, *(name for name in INDOORS if name != "stage"))


@dataclass(frozen=True)
class Layout:
    """What chance decides about a place."""

    flip: int = 0  # 0, 1: as drawn, or its mirror image
    disc: int = 0  # 0, 1: the two places of sun and moon
    scatter: int = 0  # which pattern of stars, rain or snow


def gradient(top: Colour, low: Colour, pixels: int) -> Image.Image:
    down = np.linspace(0, 1, pixels)[:, None]
    rows = (np.array(top) * (1 - down) + np.array(low) * down).round().astype(np.uint8)
    return Image.fromarray(
        np.ascontiguousarray(np.broadcast_to(rows[:, None], (pixels, pixels, 3)))
    )


def paint_rows(canvas: Canvas, rows: list[Row], inks: dict, flip: int) -> None:
    canvas.paint(rows, Spot(1.0, 0.0, 1.0, -1) if flip else Spot(0.0, 0.0, 1.0), inks)


@functools.lru_cache(maxsize=256)
def backdrop(name: str, time: str, weather: str, layout: Layout, pixels: int) -> Image.Image:
    """The place without things, (pixels, pixels) RGB."""
    place = PLACES[name]
    if place.rows is None:
        variant = layout.flip % len(world.PLACES[name].variants)
        return world.backdrop(
            name, time, weather, world.Layout(layout.disc, variant, layout.scatter), pixels
        )
    return BACKDROPS[place.scene](place, time, weather, layout, pixels)


def open_air(place: Place, time: str, weather: str, layout: Layout, pixels: int) -> Image.Image:
    hour, sky = world.TIMES[time], world.WEATHERS[weather]
    own = world.Layout(layout.disc, 0, layout.scatter)
    canvas = Canvas(world.draw_sky(hour, sky, pixels))
    if weather == "clear" and time == "night":
        world.draw_scatter(canvas, hour, weather, own)
    world.draw_disc(canvas, hour, sky, own)
    if sky.cloud:
        world.draw_clouds(canvas, hour, sky, own)
    paint_rows(canvas, place.rows(), Light(place.ground, time, weather), layout.flip)
    if weather in ("rainy", "snowy"):
        world.draw_scatter(canvas, hour, weather, own)
    return canvas.image


LAMPLIT = 0.45  # of the hour's light falls into a room


def indoors(place: Place, time: str, weather: str, layout: Layout, pixels: int) -> Image.Image:
    hour = world.TIMES[time]
    light = Light(place.ground, "noon", "clear")
    light.update(sky=mix(hour.top, hour.low, 0.5), disc=hour.disc)
    canvas = Canvas(Image.new("RGB", (pixels, pixels)))
    dim = {role: role for role in ("sky", "disc")}
    rows = place.rows()
    strength = (
        LAMPLIT * hour.strength if any(role == "sky" for _, role, *_ in rows) else 0.0
    )  # without a window: none
    for _, role, *_ in rows:
        if role not in dim:
            light[role] = mix(light[role], hour.light, strength)
            dim[role] = role
    paint_rows(canvas, rows, light, layout.flip)
    return canvas.image


def without_light(top: Colour, low: Colour, stars: bool = False):
    """The backdrop of a place where it is always the same hour."""

    def draw(place: Place, time: str, weather: str, layout: Layout, pixels: int) -> Image.Image:
        canvas = Canvas(gradient(top, low, pixels))
        if stars:
            spots = world.SCATTERS[layout.scatter]
            paint_rows(
                canvas,
                [
                    oval((240, 236, 210), (x + 0.5) / 16, (y + 0.3) / 16, 0.011, 0.011)
                    for x, y in spots
                ],
                Light(top, "noon", "clear"),
                0,
            )
        paint_rows(canvas, place.rows(), Light(place.ground, "noon", "clear"), layout.flip)
        return canvas.image

    return draw


BACKDROPS = {
    "open": open_air,
    "room": indoors,
    "space": without_light((20, 18, 62), (58, 40, 110), stars=True),
    "water": without_light((96, 200, 232), (24, 90, 160)),
    "cave": without_light((84, 74, 96), (84, 74, 96)),
}
