"""People, drawn: a table of who wears what, and the shapes of hair, clothes, hats and faces.

    rows, inks = person("king", mood="sad", colour=None, look=Look(skin=2, hair=1, clothes=4))

Rows are those of the storyworld (`kind, role, *geometry`); a person stands on (0, 0) and is about
one unit high, y pointing down. To add a person, add a row to WARDROBE and one to things.PEOPLE."""

from __future__ import annotations

from dataclasses import dataclass

import places  # noqa: F401  (its import puts the storyworld on the path)
import world
from world import CREAM, PLUM, Face, mix

SKINS = ((255, 222, 190), (240, 196, 156), (210, 158, 116), (160, 108, 76), (112, 74, 56))
HAIRS = ((60, 44, 48), (104, 68, 46), (196, 128, 60), (238, 200, 110))
CLOTHES = ((226, 74, 66), (66, 128, 220), (92, 176, 92), (250, 200, 74), (152, 92, 196),
    (244, 142, 62),
           (62, 172, 172), (242, 128, 166))  # fmt: skip
TROUSERS = ((70, 84, 130), (104, 92, 116), (120, 96, 74), (84, 116, 150))
GREY_HAIR = (214, 214, 222)
COLOURS = world.COLOURS | {
    "green": (70, 170, 80),
    "black": (66, 62, 76),
    "grey": (150, 152, 162),
    "gold": (240, 190, 60),
}


@dataclass(frozen=True)
class Look:
    """What chance decides about a person: indices into SKINS, HAIRS, CLOTHES (and TROUSERS)."""

    skin: int = 1
    hair: int = 1
    clothes: int = 1


FACE = Face(eyes=-0.64, gap=0.115, mouth=-0.535, width=0.08, blush=0.18)

BARE = (
    ("box", "bottom", -0.13, -0.2, -0.015, -0.03, 0.02), ("box", "bottom", 0.015, -0.2, 0.13, -0.03,
        0.02),
    ("ovals", "shoe", 0.085, -0.03, 0.085, 0.045),
)  # fmt: skip
SLEEVES = ("curves", "top", 0.095, (0.14, -0.37), (0.22, -0.32), (0.235, -0.23))
HANDS = ("ovals", "skin", 0.24, -0.2, 0.05, 0.05)
RAISED = (
    ("curves", "top", 0.095, (0.13, -0.35), (0.26, -0.36), (0.31, -0.47)), ("ovals", "skin", 0.325,
        -0.51, 0.05, 0.05),
)  # fmt: skip
CHEEKS = (
    ("curves", "top", 0.09, (0.14, -0.36), (0.3, -0.34), (0.25, -0.46)), ("ovals", "skin", 0.22,
        -0.51, 0.055, 0.06),
)  # fmt: skip
HEAD = (("ovals", "skin", 0.255, -0.65, 0.045, 0.055), ("oval", "skin", 0, -0.66, 0.26, 0.235))

OUTFITS = {
    "shirt": (*BARE, ("box", "top", -0.17, -0.44, 0.17, -0.16, 0.08)),
    "overalls": (
        *BARE, ("box", "top", -0.17, -0.44, 0.17, -0.16, 0.08), ("box", "bottom", -0.12, -0.36,
            0.12, -0.16, 0.02),
        ("lines", "bottom", 0.035, (0.09, -0.34), (0.11, -0.43)),
    ),
    "suit": (
        *BARE, ("box", "top", -0.17, -0.44, 0.17, -0.14, 0.06), ("poly", "white", (-0.06, -0.44),
            (0.06, -0.44), (0, -0.28)),
        ("poly", "red", (-0.02, -0.42), (0.02, -0.42), (0, -0.3)),
    ),
    "coat": (
        *BARE, ("box", "top", -0.18, -0.44, 0.18, -0.1, 0.05), ("line", "shade", 0.018, (0, -0.42),
            (0, -0.1)),
        ("poly", "shirt", (-0.07, -0.44), (0.07, -0.44), (0, -0.32)),
    ),
    "dress": (
        ("box", "skin", -0.1, -0.14, -0.02, -0.03, 0.02), ("box", "skin", 0.02, -0.14, 0.1, -0.03,
            0.02),
        ("ovals", "shoe", 0.075, -0.03, 0.075, 0.04),
        ("poly", "top", (-0.12, -0.44), (0.12, -0.44), (0.25, -0.1), (-0.25, -0.1)),
        ("line", "shade", 0.03, (-0.23, -0.11), (0.23, -0.11)),
    ),
    "gown": (
        ("poly", "top", (-0.12, -0.44), (0.12, -0.44), (0.31, 0), (-0.31, 0)),
        ("line", "gold", 0.035, (-0.29, -0.02), (0.29, -0.02)), ("line", "gold", 0.035,
            (-0.15, -0.27), (0.15, -0.27)),
    ),
    "robe": (
        ("poly", "top", (-0.14, -0.44), (0.14, -0.44), (0.26, 0), (-0.26, 0)),
        ("line", "shade", 0.03, (-0.17, -0.24), (0.17, -0.24)), ("ovals", "shoe", 0.09, -0.005,
            0.07, 0.03),
    ),
    "romper": (
        ("ovals", "top", 0.11, -0.06, 0.1, 0.065), ("oval", "top", 0, -0.24, 0.2, 0.2),
        ("oval", "light", 0, -0.2, 0.1, 0.1),
    ),
    "space suit": (
        ("box", "white", -0.15, -0.2, -0.015, -0.02, 0.04), ("box", "white", 0.015, -0.2, 0.15,
            -0.02, 0.04),
        ("ovals", "stone", 0.09, -0.03, 0.1, 0.05), ("box", "white", -0.2, -0.46, 0.2, -0.14, 0.1),
        ("box", "stone", -0.09, -0.34, 0.09, -0.22, 0.02), ("oval", "red", -0.04, -0.28, 0.02,
            0.02),
        ("oval", "green", 0.04, -0.28, 0.02, 0.02),
    ),
    "armour": (
        ("box", "slate", -0.14, -0.2, -0.015, -0.02, 0.02), ("box", "slate", 0.015, -0.2, 0.14,
            -0.02, 0.02),
        ("ovals", "stone", 0.085, -0.03, 0.09, 0.045), ("box", "steel", -0.18, -0.44, 0.18, -0.15,
            0.07),
        ("line", "slate", 0.02, (0, -0.42), (0, -0.18)), ("line", "slate", 0.03, (-0.17, -0.19),
            (0.17, -0.19)),
    ),
    "stripes": (
        *BARE, ("box", "white", -0.17, -0.44, 0.17, -0.16, 0.08),
        *(("box", "top", -0.17, y, 0.17, y + 0.045, 0) for y in (-0.4, -0.31, -0.22)),
    ),
}  # fmt: skip

FRINGE = ("dome", "hair", 0, -0.685, 0.275, 0.245)
HAIR_BEHIND = {
    "long": (("blob", "hair", (-0.31, -0.9), (0.31, -0.9), (0.36, -0.34), (0.14, -0.4),
        (-0.14, -0.4), (-0.36, -0.34)),),
    "pigtails": (("ovals", "hair", 0.34, -0.56, 0.095, 0.15), ("ovals", "red", 0.29, -0.66, 0.045,
        0.045)),
    "bun": (("oval", "hair", 0, -0.95, 0.11, 0.1),),
    "curls": (("ovals", "hair", 0.22, -0.72, 0.14, 0.16), ("oval", "hair", 0, -0.85, 0.2, 0.12)),
}  # fmt: skip
HAIR_BEFORE = {
    "short": (FRINGE, ("poly", "hair", (-0.27, -0.7), (0.1, -0.74), (-0.24, -0.58))),
    "long": (FRINGE,),
    "pigtails": (FRINGE,),
    "bun": (FRINGE,),
    "curls": (
        ("ovals", "hair", 0.16, -0.82, 0.1, 0.09), ("oval", "hair", 0, -0.85, 0.12, 0.09),
            ("ovals", "hair", 0.24, -0.74, 0.07, 0.08),
    ),
    "bald": (("ovals", "hair", 0.25, -0.66, 0.055, 0.09),),
    "tuft": (("curve", "hair", 0.035, (0, -0.89), (0.08, -0.99), (0.1, -0.88)),),
    "none": (),
}  # fmt: skip
BEARD = (
    ("dome", "hair", 0, -0.6, 0.255, -0.24), ("oval", "skin", 0, -0.6, 0.17, 0.07),
        ("ovals", "hair", 0.07, -0.565, 0.08, 0.03),
)  # fmt: skip
MOUSTACHE = (("ovals", "hair", 0.065, -0.57, 0.075, 0.025),)

HATS = {
    "crown": (
        ("poly", "gold", (-0.22, -0.8), (-0.26, -1.06), (-0.12, -0.94), (0, -1.1), (0.12, -0.94),
            (0.26, -1.06), (0.22, -0.8)),
        ("oval", "red", 0, -0.88, 0.035, 0.035), ("ovals", "sky", 0.13, -0.86, 0.028, 0.028),
    ),
    "tiara": (
        ("poly", "gold", (-0.16, -0.83), (-0.15, -0.92), (-0.07, -0.88), (0, -1.0), (0.07, -0.88),
            (0.15, -0.92), (0.16, -0.83)),
        ("oval", "rose", 0, -0.9, 0.03, 0.03),
    ),
    "wizard": (
        ("poly", "navy", (-0.26, -0.78), (0.26, -0.78), (0.06, -1.3)), ("oval", "navy", 0, -0.78,
            0.36, 0.07),
        ("poly", "gold", *((0.02 + x * 0.13, -0.95 + y * 0.13) for x, y in world.star_points(0.5, 0.22))),
    ),
    "witch": (
        ("poly", "ink", (-0.24, -0.78), (0.22, -0.78), (0.14, -1.12), (0.24, -1.26)),
            ("oval", "ink", 0, -0.78, 0.38, 0.07),
        ("box", "violet", -0.22, -0.86, 0.2, -0.79, 0),
    ),
    "pirate": (
        ("poly", "ink", (-0.4, -0.76), (-0.2, -0.96), (0, -1.06), (0.2, -0.96), (0.4, -0.76),
            (0, -0.84)),
        ("oval", "white", 0, -0.93, 0.05, 0.045), ("lines", "white", 0.022, (-0.07, -0.87),
            (0.07, -0.84)),
    ),
    "helmet": (
        ("dome", "steel", 0, -0.69, 0.29, 0.27), ("box", "slate", -0.29, -0.73, 0.29, -0.67, 0.01),
        ("curve", "red", 0.07, (0, -0.95), (0.14, -1.16), (0.3, -0.98)), ("boxs", "steel", 0.2,
            -0.7, 0.29, -0.5, 0.03),
    ),
    "bearskin": (("box", "ink", -0.24, -1.12, 0.24, -0.72, 0.16),),
    "cap": (("dome", "top", 0, -0.72, 0.28, 0.22), ("oval", "shade", 0.16, -0.73, 0.2, 0.04)),
    "police": (
        ("box", "navy", -0.28, -0.94, 0.28, -0.78, 0.06), ("box", "ink", -0.25, -0.8, 0.25, -0.73,
            0.02), ("oval", "gold", 0, -0.86, 0.045, 0.045),
    ),
    "pilot": (
        ("box", "navy", -0.28, -0.94, 0.28, -0.78, 0.06), ("box", "ink", -0.25, -0.8, 0.25, -0.73,
            0.02), ("oval", "white", 0, -0.86, 0.06, 0.03),
    ),
    "sailor": (("dome", "white", 0, -0.84, 0.24, 0.14), ("box", "navy", -0.26, -0.86, 0.26, -0.77,
        0.03)),
    "fire": (
        ("dome", "red", 0, -0.74, 0.28, 0.26), ("oval", "crimson", 0, -0.74, 0.34, 0.05),
            ("poly", "gold", (-0.06, -0.78), (0.06, -0.78), (0.05, -0.92), (-0.05, -0.92)),
    ),
    "hard hat": (("dome", "gold", 0, -0.74, 0.28, 0.24), ("oval", "honey", 0, -0.74, 0.33, 0.045),
        ("box", "honey", -0.03, -0.98, 0.03, -0.76, 0.02)),
    "chef": (
        ("ovals", "white", 0.17, -1.02, 0.15, 0.13), ("oval", "white", 0, -1.08, 0.17, 0.14),
            ("box", "white", -0.22, -0.98, 0.22, -0.76, 0.02),
        ("line", "pale", 0.02, (-0.2, -0.82), (0.2, -0.82)),
    ),
    "straw": (("dome", "straw", 0, -0.78, 0.22, 0.22), ("oval", "straw", 0, -0.77, 0.4, 0.065),
        ("box", "red", -0.22, -0.85, 0.22, -0.79, 0)),
    "cowboy": (
        ("blob", "bark", (-0.2, -0.76), (-0.2, -1.08), (0, -1.0), (0.2, -1.08), (0.2, -0.76)),
            ("curve", "bark", 0.08, (-0.42, -0.86), (0, -0.7), (0.42, -0.86)),
    ),
    "fedora": (("box", "slate", -0.2, -1.0, 0.2, -0.78, 0.06), ("oval", "slate", 0, -0.78, 0.34,
        0.05), ("box", "ink", -0.2, -0.86, 0.2, -0.8, 0)),
    "pith": (("dome", "path", 0, -0.76, 0.26, 0.24), ("oval", "path", 0, -0.76, 0.36, 0.06),
        ("box", "bark", -0.26, -0.82, 0.26, -0.77, 0)),
    "hunter": (("poly", "green", (-0.26, -0.78), (0.26, -0.78), (0.1, -1.02), (-0.14, -0.98)),
        ("curve", "red", 0.04, (0.12, -0.84), (0.24, -1.0), (0.2, -1.1))),
    "santa": (
        ("poly", "red", (-0.25, -0.8), (0.25, -0.8), (0.3, -0.98), (0.1, -1.08)),
            ("box", "white", -0.28, -0.84, 0.28, -0.74, 0.05), ("oval", "white", 0.32, -0.94, 0.06,
            0.06),
    ),
    "elf": (("poly", "green", (-0.26, -0.76), (0.26, -0.76), (0.12, -1.14)), ("oval", "gold", 0.12,
        -1.14, 0.045, 0.045), ("line", "red", 0.05, (-0.24, -0.77), (0.24, -0.77))),
    "dwarf": (("poly", "red", (-0.26, -0.76), (0.26, -0.76), (-0.1, -1.2)),),
    "nurse": (("box", "white", -0.18, -0.96, 0.18, -0.8, 0.03), ("box", "red", -0.02, -0.93, 0.02,
        -0.83, 0), ("box", "red", -0.05, -0.9, 0.05, -0.86, 0)),
    "beret": (("oval", "crimson", -0.05, -0.87, 0.28, 0.09), ("line", "crimson", 0.03,
        (-0.05, -0.95), (-0.03, -1.0))),
    "veil": (("blob", "white", (-0.3, -0.88), (0, -0.98), (0.3, -0.88), (0.27, -0.78), (0, -0.86),
        (-0.27, -0.78)), ("ovals", "rose", 0.1, -0.88, 0.04, 0.04)),
    "halo": (("oval", "gold", 0, -1.03, 0.2, 0.055), ("oval", "cream", 0, -1.03, 0.13, 0.025)),
    "hood": (("dome", "ink", 0, -0.66, 0.29, 0.27), ("box", "ink", -0.27, -0.58, 0.27, -0.43,
        0.08)),
    "mask": (("box", "red", -0.24, -0.71, 0.24, -0.58, 0.05),),
    "eye mask": (("box", "ink", -0.25, -0.71, 0.25, -0.58, 0.05), ("dome", "ink", 0, -0.76, 0.24,
        0.17)),
    "bowl": (("box", "white", -0.27, -0.82, 0.27, -0.76, 0.02),),
    "none": (),
}  # fmt: skip

BEHIND = {
    "cape": (("poly", "cape", (-0.14, -0.42), (0.14, -0.42), (0.34, -0.04), (-0.34, -0.04)),),
    "wings": (("ovals", "white", 0.3, -0.4, 0.16, 0.2), ("ovals", "white", 0.26, -0.24, 0.1, 0.12)),
    "long veil": (("poly", "white", (-0.22, -0.85), (0.22, -0.85), (0.38, -0.05), (-0.38, -0.05)),),
    "glass": (("oval", "white", 0, -0.68, 0.34, 0.32),),
}  # fmt: skip
EXTRAS = {
    "beard": BEARD,
    "moustache": MOUSTACHE,
    "spectacles": (("lines", "ink", 0.018, (0.045, -0.64), (-0.045, -0.64)),
                   *(("line", "ink", 0.018, *((x + 0.075 * a, -0.64 + 0.075 * b) for a, b in
                      ((-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)))) for x in (-0.115, 0.115))),
    "apron": (("box", "white", -0.11, -0.34, 0.11, -0.13, 0.03), ("lines", "white", 0.025,
        (0.1, -0.33), (0.08, -0.43))),
    "stethoscope": (("curve", "navy", 0.025, (-0.08, -0.44), (0, -0.2), (0.08, -0.44)),
        ("oval", "stone", 0.02, -0.28, 0.035, 0.035)),
    "badge": (("oval", "gold", 0.09, -0.34, 0.035, 0.035), ("line", "ink", 0.035, (-0.17, -0.19),
        (0.17, -0.19))),
    "reflectors": (("box", "gold", -0.17, -0.32, 0.17, -0.27, 0), ("box", "gold", -0.17, -0.22,
        0.17, -0.17, 0)),
    "trim": (("line", "white", 0.05, (0, -0.42), (0, -0.16)), ("line", "ink", 0.045, (-0.17, -0.22),
        (0.17, -0.22)), ("box", "gold", -0.04, -0.25, 0.04, -0.19, 0.01)),
    "emblem": (("poly", "gold", *((x * 0.16, -0.31 + y * 0.16) for x,
        y in world.star_points(0.5, 0.22))),),
    "belt": (("line", "bark", 0.045, (-0.17, -0.2), (0.17, -0.2)), ("box", "gold", -0.035, -0.23,
        0.035, -0.17, 0.01)),
    "ermine": (("line", "white", 0.06, (0, -0.42), (0, 0)), ("box", "white", -0.17, -0.46, 0.17,
        -0.4, 0.03)),
    "bag": (("line", "bark", 0.03, (-0.14, -0.43), (0.16, -0.22)), ("box", "bark", 0.1, -0.28, 0.26,
        -0.14, 0.03)),
    "eye patch": (("oval", "ink", 0.115, -0.64, 0.065, 0.06), ("line", "ink", 0.02, (-0.24, -0.74),
        (0.2, -0.66))),
    "wand": (("line", "bark", 0.03, (0.26, -0.2), (0.38, -0.44)),
        ("poly", "gold", *((0.39 + x * 0.16, -0.48 + y * 0.16) for x,
        y in world.star_points(0.5, 0.22)))),
    "sword": (("poly", "pale", (0.26, -0.2), (0.31, -0.2), (0.4, -0.6), (0.36, -0.58)),
        ("line", "gold", 0.035, (0.22, -0.24), (0.34, -0.2))),
    "shield": (("blob", "red", (-0.4, -0.36), (-0.14, -0.36), (-0.16, -0.14), (-0.27, -0.04),
        (-0.38, -0.14)), ("line", "gold", 0.03, (-0.27, -0.33), (-0.27, -0.1)),
        ("line", "gold", 0.03, (-0.36, -0.24), (-0.18, -0.24))),
    "palette": (("oval", "path", -0.28, -0.2, 0.12, 0.09), ("oval", "red", -0.33, -0.22, 0.025,
        0.02), ("oval", "sky", -0.27, -0.24, 0.025, 0.02), ("oval", "gold", -0.23, -0.19, 0.025,
        0.02)),
    "spade": (("line", "bark", 0.03, (0.27, -0.5), (0.29, -0.12)), ("blob", "stone", (0.23, -0.16),
        (0.35, -0.16), (0.34, 0.0), (0.24, 0.0))),
    "fork": (("line", "bark", 0.03, (0.28, -0.36), (0.28, -0.02)),
        *(("line", "stone", 0.022, (x, -0.36), (x, -0.52)) for x in (0.22, 0.28, 0.34)),
        ("line", "stone", 0.025, (0.22, -0.37), (0.34, -0.37))),
    "spoon": (("line", "bark", 0.03, (0.26, -0.2), (0.33, -0.42)), ("oval", "bark", 0.345, -0.46,
        0.05, 0.065)),
    "book": (("box", "red", -0.36, -0.32, -0.2, -0.12, 0.01), ("box", "cream", -0.34, -0.3, -0.22,
        -0.27, 0)),
    "hammer": (("line", "bark", 0.03, (0.26, -0.16), (0.28, -0.4)), ("box", "slate", 0.19, -0.46,
        0.38, -0.38, 0.02)),
    "microphone": (("line", "ink", 0.035, (0.24, -0.24), (0.22, -0.38)), ("oval", "slate", 0.21,
        -0.43, 0.05, 0.05)),
    "flask": (("poly", "teal", (0.2, -0.12), (0.38, -0.12), (0.31, -0.28), (0.27, -0.28)),
        ("line", "pale", 0.03, (0.29, -0.28), (0.29, -0.36))),
    "glass in hand": (("oval", "slate", 0.3, -0.3, 0.09, 0.09), ("oval", "sky", 0.3, -0.3, 0.065,
        0.065), ("line", "bark", 0.035, (0.27, -0.22), (0.24, -0.14))),
    "sack": (("oval", "path", 0.33, -0.28, 0.15, 0.17), ("line", "bark", 0.03, (0.27, -0.42),
        (0.39, -0.42))),
    "envelope": (("box", "white", 0.19, -0.28, 0.37, -0.15, 0), ("line", "slate", 0.015,
        (0.19, -0.28), (0.28, -0.2), (0.37, -0.28))),
    "flowers": (("line", "green", 0.03, (0.24, -0.18), (0.24, -0.3)), ("oval", "rose", 0.2, -0.35,
        0.05, 0.05), ("oval", "gold", 0.28, -0.35, 0.05, 0.05), ("oval", "white", 0.24, -0.4, 0.05,
        0.05)),
    "tutu": (("oval", "rose", 0, -0.2, 0.32, 0.09),),
    "cane": (("line", "bark", 0.03, (0.28, -0.26), (0.28, -0.01)), ("curve", "bark", 0.03,
        (0.28, -0.26), (0.24, -0.34), (0.2, -0.26))),
    "pacifier": (("oval", "sky", 0, -0.52, 0.05, 0.035),),
    "fangs": (("polys", "white", (0.02, -0.53), (0.05, -0.53), (0.035, -0.49)),),
    "bow": (("curve", "bark", 0.03, (0.26, -0.46), (0.44, -0.26), (0.26, -0.04)),
        ("line", "white", 0.012, (0.26, -0.46), (0.26, -0.04))),
    "goggles": (("box", "slate", -0.22, -0.8, 0.22, -0.74, 0.03),),
}  # fmt: skip


@dataclass(frozen=True)
class Wear:
    """How somebody looks. `top` and `bottom`: colours, or None where chance or the text decides."""

    hair: str = "short"
    outfit: str = "shirt"
    hat: str = "none"
    extras: tuple[str, ...] = ()
    behind: str = ""
    top: tuple | None = None
    bottom: tuple | None = None
    grey: bool = False  # the hair
    scale: float = 1.0  # of body to head, below 1 for children


WHITE, BLACK, NAVY, RED = (244, 244, 248), (62, 56, 72), (52, 72, 150), (214, 52, 56)
GREEN, BROWN, VIOLET, PINK = (80, 150, 84), (140, 100, 70), (120, 76, 170), (244, 150, 190)
WARDROBE = {
    "boy": Wear("short"),
    "girl": Wear("pigtails", "dress"),
    "man": Wear("short", "suit"),
    "woman": Wear("long", "dress"),
    "baby": Wear("tuft", "romper", extras=("pacifier",)),
    "toddler": Wear("curls", "overalls"),
    "mother": Wear("bun", "dress", extras=("apron",)),
    "father": Wear("short", "shirt", extras=("moustache", "belt")),
    "grandmother": Wear("bun", "dress", extras=("spectacles",), grey=True),
    "grandfather": Wear("bald", "coat", extras=("moustache", "spectacles", "cane"), grey=True),
    "brother": Wear("curls", "shirt", hat="cap"),
    "sister": Wear("long", "overalls", hat="none"),
    "king": Wear("short", "robe", "crown", ("beard", "ermine"), "cape", RED),
    "queen": Wear("bun", "gown", "crown", (), "cape", VIOLET),
    "prince": Wear("short", "suit", "tiara", ("sword",), "cape", NAVY),
    "princess": Wear("long", "gown", "tiara", (), "", PINK),
    "knight": Wear("none", "armour", "helmet", ("shield", "sword")),
    "guard": Wear("none", "suit", "bearskin", ("belt",), "", RED, BLACK),
    "witch": Wear("long", "gown", "witch", (), "", VIOLET),
    "wizard": Wear("long", "robe", "wizard", ("beard", "wand"), "", NAVY, grey=True),
    "pirate": Wear("short", "stripes", "pirate", ("eye patch", "sword"), "", RED),
    "sailor": Wear("short", "stripes", "sailor", (), "", NAVY, WHITE),
    "elf": Wear("short", "shirt", "elf", ("belt",), "", GREEN, RED),
    "dwarf": Wear("none", "shirt", "dwarf", ("beard", "belt", "hammer"), "", BROWN),
    "vampire": Wear("short", "suit", "none", ("fangs",), "cape", BLACK, BLACK),
    "superhero": Wear(
        "short", "shirt", "mask", ("emblem",), "cape", (58, 118, 220), (58, 118, 220)
    ),
    "angel": Wear("curls", "robe", "halo", (), "wings", WHITE),
    "santa claus": Wear(
        "none", "shirt", "santa", ("beard", "trim", "sack"), "", RED, RED, grey=True
    ),
    "astronaut": Wear("short", "space suit", "none", (), "glass", WHITE),
    "doctor": Wear("short", "coat", "none", ("stethoscope",), "", WHITE),
    "nurse": Wear("bun", "dress", "nurse", ("stethoscope",), "", (170, 214, 236)),
    "teacher": Wear("bun", "coat", "none", ("spectacles", "book")),
    "farmer": Wear("short", "overalls", "straw", ("fork",), "", (226, 96, 80), (76, 106, 170)),
    "cook": Wear("short", "coat", "chef", ("spoon",), "", WHITE),
    "police officer": Wear("short", "suit", "police", ("badge",), "", NAVY, NAVY),
    "firefighter": Wear("short", "coat", "fire", ("reflectors",), "", (196, 60, 50), BLACK),
    "builder": Wear("short", "overalls", "hard hat", ("hammer",), "", (244, 150, 60)),
    "gardener": Wear("long", "overalls", "straw", ("spade",), "", (240, 210, 110), GREEN),
    "postman": Wear("short", "suit", "cap", ("bag", "envelope"), "", (70, 110, 190), NAVY),
    "pilot": Wear("short", "suit", "pilot", (), "", NAVY, NAVY),
    "scientist": Wear("curls", "coat", "none", ("spectacles", "flask"), "", WHITE),
    "artist": Wear("long", "stripes", "beret", ("palette",), "", (70, 90, 150)),
    "singer": Wear("curls", "dress", "none", ("microphone",), "", (200, 60, 140)),
    "dancer": Wear("bun", "shirt", "none", ("tutu",), "", PINK, (250, 214, 224)),
    "detective": Wear("short", "coat", "fedora", ("glass in hand",), "", (170, 140, 100)),
    "ninja": Wear("none", "shirt", "hood", ("belt", "sword"), "", BLACK, BLACK),
    "cowboy": Wear("short", "shirt", "cowboy", ("belt",), "", (200, 90, 70), (86, 110, 170)),
    "explorer": Wear(
        "short", "shirt", "pith", ("bag", "belt"), "", (214, 186, 130), (170, 140, 96)
    ),
    "hunter": Wear("short", "shirt", "hunter", ("bow", "belt"), "", (110, 140, 80), BROWN),
    "shopkeeper": Wear("short", "shirt", "none", ("apron", "moustache")),
    "thief": Wear("none", "stripes", "eye mask", ("sack",), "", BLACK, BLACK),
    "bride": Wear("long", "gown", "veil", ("flowers",), "long veil", WHITE),
}
MOODS = ("happy", "sad", "afraid", "asleep")


def face_rows(face: Face, mood: str | None) -> list[tuple]:
    """Eyes, mouth and what else a face shows of a mood; None: a quiet smile."""
    eyes, mouth = {"happy": ("merry", "laugh"), "sad": ("open", "frown"),
        "afraid": ("wide", "gape"),
                   "asleep": ("closed", "smile")}.get(mood, ("open", "smile"))  # fmt: skip
    small = face.gap / 0.155  # the storyworld's eyes are made for this gap
    rows = []
    for side in (-1, 1):
        x, y = face.x + side * face.gap, face.eyes
        if eyes == "wide":
            rows += [
                ("oval", "white", x, y, 0.095 * small, 0.11 * small),
                ("oval", "ink", x, y, 0.04, 0.05),
            ]
        if mood in ("sad", "afraid"):
            rows.append(
                ("line", "ink", 0.03, (x - side * 0.05, y - 0.145), (x + side * 0.06, y - 0.1))
            )
        if mood in (None, "happy", "asleep"):
            rows.append(("oval", "blush", face.x + side * face.blush, y + 0.1, 0.05, 0.033))
    if eyes != "wide":
        rows += world.eye_rows(face, eyes)
    if mood == "sad":
        x, y = face.x + face.gap + 0.06, face.eyes + 0.15
        rows += [
            ("poly", "tear", (x - 0.045, y), (x, y - 0.1), (x + 0.045, y)),
            ("oval", "tear", x, y + 0.02, 0.05, 0.055),
        ]
    if mouth == "gape" and face.mouth is not None:
        rows.append(("oval", "mouth", face.x, face.mouth, 0.05, 0.06))
    elif mouth != "gape":
        rows += world.mouth_rows(face, mouth)
    return rows


def person(name: str, mood: str | None, colour: str | None, look: Look) -> tuple[list[tuple], dict]:
    """The rows of a person and their inks. `colour` names the clothes' colour."""
    wear = WARDROBE[name]
    top = COLOURS[colour] if colour else wear.top or CLOTHES[look.clothes]
    bottom = wear.bottom or TROUSERS[look.clothes % len(TROUSERS)]
    inks = world.INKS | {
        "skin": SKINS[look.skin], "hair": GREY_HAIR if wear.grey else HAIRS[look.hair], "top": top,
            "bottom": bottom,
        "shade": mix(top, PLUM, 0.28), "light": mix(top, CREAM, 0.55), "shoe": mix(bottom, PLUM,
            0.5), "shirt": CLOTHES[look.hair],
        "cape": mix(RED, PLUM, 0.2) if name != "queen" else (230, 220, 240),
            "steel": (188, 194, 210), "pale": (214, 220, 232),
        "straw": (242, 206, 120),
    }  # fmt: skip
    arms = {"happy": RAISED, "afraid": CHEEKS}.get(mood, (SLEEVES, HANDS))
    behind, worn = HAIR_BEHIND.get(wear.hair, ()), [EXTRAS[extra] for extra in wear.extras]
    on_face = ("beard", "moustache", "spectacles", "eye patch", "pacifier", "fangs")
    body = [row for extra, rows in zip(wear.extras, worn) if extra not in on_face for row in rows]
    face = [row for extra, rows in zip(wear.extras, worn) if extra in on_face for row in rows]
    masks = HATS[wear.hat] if wear.hat in ("mask", "eye mask") else ()
    beard_below = [row for row in face if wear.extras and "beard" in wear.extras] or []
    rest = [] if beard_below else face
    rows = [*BEHIND.get(wear.behind, ()), *behind, *OUTFITS[wear.outfit], *body, *arms, *HEAD,
        *beard_below, *masks,
            *HAIR_BEFORE[wear.hair], *face_rows(FACE, mood), *rest,
                *(() if masks else HATS[wear.hat])]  # fmt: skip
    return rows, inks
