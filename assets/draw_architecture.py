"""Draws architecture.png, the figure of the README: the parts of the model and what flows between them.

    python assets/draw_architecture.py        # same bytes on every run with the same Pillow

The figure is data: CARDS are its boxes, ARROWS run between their sides, LEGEND explains the colours. To move, add or
reword something, change a row. Units are pixels of the finished picture; it is painted SCALE times larger and then
reduced, which smooths every edge.

Contents: 1 Look    2 The figure as data    3 Brush    4 Icons    5 Cards and arrows    6 The picture
"""

import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "storyworld"))
from world import draw_panel, write_story  # noqa: E402

# --------------------------------------------------------------------------------------------------
# 1. Look
# --------------------------------------------------------------------------------------------------

SCALE = 3
WIDTH, HEIGHT = 1600, 964
INK, SOFT_INK, PAPER, EDGE = "#1f2937", "#4b5563", "#fbfaf7", "#d9d5cb"
TITLE, BODY, SMALL = 27, 21, 20  # font sizes; shown at 900 pixels wide the smallest is 11 pixels
GRADIENT, FLOW, GENERATION = "#d9480f", "#475569", "#0f766e"


class Look(NamedTuple):
    fill: str
    edge: str
    hatched: bool = False


LOOKS = {
    "trained": Look("#ffe3bf", "#e08a1e"),
    "averages": Look("#e9defa", "#8b5fd0"),
    "frozen": Look("#dcebf7", "#5b93c2", hatched=True),
    "plain": Look("#ffffff", "#a8a296"),
    "hero": Look("#ffffff", "#374151"),
}
# One colour for each slot, the same wherever the slot appears, and the codes of an example
# storyboard.
SLOTS = ("#d6455d", "#e5772e", "#d9a514", "#5fa544", "#2a9d8f", "#3f7fd0", "#7a5bc7", "#c0529f")
CODES = (37, 102, 5, 88, 64, 19, 121, 73)
TOKENS = 4  # tokens drawn for each slot
STRAY_VOTES = {
    (1, 2): 4,
    (3, 0): 6,
    (4, 3): 0,
    (6, 1): 2,
}  # (slot, token) -> the slot whose code it chose instead

# --------------------------------------------------------------------------------------------------
# 2. The figure as data
# --------------------------------------------------------------------------------------------------

STORY = write_story(10)
LEFT, TOP, MIDDLE, BOTTOM = (
    40,
    146,
    448,
    698,
)  # the left margin, and the upper edge of each row of cards


class Card(NamedTuple):
    x: int
    y: int
    w: int
    h: int
    look: str
    title: str
    lines: tuple[str, ...] = ()
    icon: str = ""  # a key of ICONS, drawn in the space below the lines
    tag: tuple[str, str] | None = None  # a term of the loss, and its formula


CARDS = {
    "story": Card(LEFT, TOP, 320, 236, "plain", "story tokens  (B, T)", (), "excerpt"),
    "encoder": Card(
        440,
        TOP,
        310,
        236,
        "trained",
        "storyboard encoder",
        ("6-layer Transformer over the", "tokens' embeddings"),
        "layers",
    ),
    "quantiser": Card(
        830,
        TOP,
        310,
        236,
        "averages",
        "vector quantiser",
        ("at each token, its nearest", "code; codebook (K, D)"),
        "codebook",
        ("commitment", "||h - e||^2"),
    ),
    "vote": Card(
        1220,
        TOP,
        340,
        236,
        "plain",
        "majority vote",
        ("8 equal chunks of the story;", "each elects its commonest code"),
        "votes",
    ),
    "prior": Card(
        LEFT,
        MIDDLE,
        320,
        184,
        "trained",
        "prior over codes",
        ("causal, with a start token",),
        "growing",
        ("latent NLL", "-log p(z)"),
    ),
    "storyboard": Card(
        440,
        MIDDLE,
        1120,
        184,
        "hero",
        "storyboard z  =  eight codes to read, pin and change",
        (),
        "chips",
    ),
    "prompt": Card(LEFT, BOTTOM, 320, 210, "plain", "prompt", (), "prompt"),
    "soft": Card(
        440,
        BOTTOM,
        240,
        210,
        "trained",
        "soft prompt",
        ("codes mapped to the", "LM's width"),
        "soft",
    ),
    "lm": Card(
        755,
        BOTTOM,
        270,
        210,
        "frozen",
        "GPT-2",
        ("frozen, writes the story",),
        "sequence",
        ("text NLL", "-log p(s | z)"),
    ),
    "diffusion": Card(
        1090,
        BOTTOM,
        265,
        210,
        "frozen",
        "Stable Diffusion",
        ("frozen, paints the story",),
        "pipeline",
        ("diffusion NLL", "||eps - eps_hat||^2"),
    ),
    "picture": Card(1410, BOTTOM, 150, 210, "plain", "picture", (), "picture"),
}


class Arrow(NamedTuple):
    kind: str  # a key of STROKES
    points: tuple  # each (x, y), or (card, side, share of that side from its left or upper end)
    label: str = ""
    label_at: tuple[int, int] = (0, 0)  # the middle of the label


ARROWS = (
    Arrow("flow", (("story", "right", 0.5), ("encoder", "left", 0.5))),
    Arrow("flow", (("encoder", "right", 0.42), ("quantiser", "left", 0.42)), "h", (787, TOP + 80)),
    Arrow("flow", (("quantiser", "right", 0.5), ("vote", "left", 0.5))),
    Arrow("flow", (("vote", "bottom", 0.42), (1363, MIDDLE))),
    Arrow("flow", (("storyboard", "left", 0.3), ("prior", "right", 0.3))),
    Arrow("flow", ((534, MIDDLE + 184), (534, BOTTOM))),
    Arrow("flow", (("soft", "right", 0.4), ("lm", "left", 0.4))),
    Arrow("flow", (("lm", "right", 0.4), ("diffusion", "left", 0.4)), "story", (1057, BOTTOM + 60)),
    Arrow("both", (("diffusion", "right", 0.4), ("picture", "left", 0.4))),
    Arrow("generation", (("prior", "right", 0.55), ("storyboard", "left", 0.55))),
    Arrow(
        "generation",
        (("prompt", "right", 0.5), (400, BOTTOM + 105), (400, MIDDLE + 148), (440, MIDDLE + 148)),
    ),
    Arrow("gradient", (("lm", "left", 0.66), ("soft", "right", 0.66))),
    Arrow(
        "gradient", ((586, BOTTOM), (586, MIDDLE + 184)), "back through the frozen LM", (732, 665)
    ),
    Arrow("gradient", ((1417, MIDDLE), ("vote", "bottom", 0.58))),
    Arrow(
        "gradient",
        (("vote", "top", 0.5), (1390, 112), (595, 112), ("encoder", "top", 0.5)),
        "straight through the vote",
        (985, 112),
    ),
    Arrow("gradient", (("quantiser", "left", 0.62), ("encoder", "right", 0.62))),
)


class Stroke(NamedTuple):
    colour: str
    dash: int = 0  # length of a dash; 0 is a solid line
    both_ends: bool = False


STROKES = {
    "flow": Stroke(FLOW),
    "both": Stroke(FLOW, both_ends=True),
    "generation": Stroke(GENERATION, dash=3),
    "gradient": Stroke(GRADIENT, dash=11),
}
# (x, kind of sample, its look or stroke, words)
LEGEND = (
    (550, "swatch", "trained", "trained"),
    (690, "swatch", "averages", "moving averages"),
    (914, "swatch", "frozen", "frozen"),
    (1050, "stroke", "flow", "data"),
    (1174, "stroke", "gradient", "gradient"),
    (1338, "stroke", "generation", "at generation only"),
)

# --------------------------------------------------------------------------------------------------
# 3. Brush: Pillow in the units of the finished picture
# --------------------------------------------------------------------------------------------------


class Brush:
    def __init__(self):
        self.image = Image.new("RGBA", (WIDTH * SCALE, HEIGHT * SCALE), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)
        self.fonts = {}

    def box(self, x, y, w, h, fill, edge=None, radius=6, width=2):
        corners = [round(v * SCALE) for v in (x, y, x + w, y + h)]
        self.draw.rounded_rectangle(
            corners, round(radius * SCALE), fill, edge, round(width * SCALE)
        )

    def line(self, points, colour, width=2.0):
        self.draw.line(
            [(x * SCALE, y * SCALE) for x, y in points], colour, round(width * SCALE), joint="curve"
        )

    def polygon(self, points, colour):
        self.draw.polygon([(x * SCALE, y * SCALE) for x, y in points], colour)

    def text(self, x, y, words, size=BODY, colour=INK, anchor="lm", bold=False):
        stroke = (
            0.35 * SCALE if bold else 0
        )  # the built-in font has one weight: an outline makes the other
        self.draw.text(
            (x * SCALE, y * SCALE),
            words,
            colour,
            self.font(size),
            anchor,
            stroke_width=stroke,
            stroke_fill=colour,
        )

    def width_of(self, words, size=BODY) -> float:
        return self.font(size).getlength(words) / SCALE

    def font(self, size):
        if size not in self.fonts:
            self.fonts[size] = ImageFont.load_default(size * SCALE)
        return self.fonts[size]

    def paste(self, picture, x, y, w, radius):
        """A square picture, its corners rounded."""
        side = round(w * SCALE)
        mask = Image.new("L", (side, side), 0)
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, side - 1, side - 1), radius * SCALE, 255)
        self.image.paste(
            picture.resize((side, side), Image.Resampling.LANCZOS),
            (round(x * SCALE), round(y * SCALE)),
            mask,
        )

    def hatch(self, x, y, w, h, colour, radius, gap=11):
        """Slanted lines inside a rounded box."""
        layer = Image.new("L", (round(w * SCALE), round(h * SCALE)), 0)
        pen = ImageDraw.Draw(layer)
        for start in range(-round(h), round(w), gap):
            pen.line([(start * SCALE, h * SCALE), ((start + h) * SCALE, 0)], 255, SCALE)
        mask = Image.new("L", layer.size, 0)
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, *layer.size), radius * SCALE, 255)
        layer.paste(0, (0, 0), mask.point(lambda v: 255 - v))
        self.image.paste(colour, (round(x * SCALE), round(y * SCALE)), layer)

    def snowflake(self, x, y, radius, colour):
        for arm in range(6):
            across, down = (
                math.cos(arm * math.pi / 3 + math.pi / 6),
                math.sin(arm * math.pi / 3 + math.pi / 6),
            )
            self.line([(x, y), (x + radius * across, y + radius * down)], colour, 2)
            for turn in (-1, 1):
                angle = arm * math.pi / 3 + math.pi / 6 + turn * math.pi / 4
                root = (x + 0.55 * radius * across, y + 0.55 * radius * down)
                tip = (
                    root[0] + 0.38 * radius * math.cos(angle),
                    root[1] + 0.38 * radius * math.sin(angle),
                )
                self.line([root, tip], colour, 2)


def wrap(brush, words: str, width: float, size=BODY) -> list[str]:
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if brush.width_of(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


# --------------------------------------------------------------------------------------------------
# 4. Icons: each fills the box (x, y, w, h), which is the part of its card that the text leaves free
# --------------------------------------------------------------------------------------------------


def row_of(count: int, x: float, w: float, gap: float) -> tuple[list[float], float]:
    """`count` equal places side by side in [x, x + w]: their left ends and their width."""
    width = (w - gap * (count - 1)) / count
    return [x + i * (width + gap) for i in range(count)], width


def draw_excerpt(brush, x, y, w, h):
    """The first lines of a story, and its tokens in the colours of the slots."""
    for number, line in enumerate(wrap(brush, STORY.text, w, SMALL)[:5]):
        brush.text(x, y + 12 + 27 * number, line + (" ..." if number == 4 else ""), SMALL, SOFT_INK)
    places, width = row_of(len(SLOTS) * TOKENS, x, w, 2)
    for number, left in enumerate(places):
        brush.box(left, y + h - 22, width, 22, SLOTS[number // TOKENS], radius=2)


def draw_layers(brush, x, y, w, h):
    places, height = row_of(6, y, h, 5)
    for top in places:
        brush.box(x, top, w, height, "#f5b55f", "#e08a1e", radius=5, width=1)


def draw_codebook(brush, x, y, w, h):
    """Codes as rows of D cells, of which a token's nearest is picked out."""
    columns, width = row_of(12, x, w, 4)
    rows, height = row_of(3, y, h, 4)
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            shade = ("#cdb8ef", "#b497e4", "#9673d6")[(i * 5 + j * j * 3 + i * j) % 3]
            brush.box(left, top, width, height, shade, radius=3)
    brush.box(x - 5, rows[1] - 4, w + 10, height + 8, None, "#5b2fa8", radius=6, width=2.5)


def draw_votes(brush, x, y, w, h):
    """The codes that the tokens chose, eight chunks of them; a few tokens disagree with their
    chunk."""
    columns, width = row_of(len(SLOTS), x, w, 12)
    rows, height = row_of(TOKENS, y, h, 4)
    for slot, left in enumerate(columns):
        for token, top in enumerate(rows):
            brush.box(
                left, top, width, height, SLOTS[STRAY_VOTES.get((slot, token), slot)], radius=4
            )


def draw_chips(brush, x, y, w, h):
    places, width = row_of(len(SLOTS), x, w, 14)
    for code, colour, left in zip(CODES, SLOTS, places):
        brush.box(left, y, width, h, colour, radius=16)
        brush.text(left + width / 2, y + h / 2, str(code), 42, "#ffffff", "mm", bold=True)


def draw_growing_codes(brush, x, y, w, h):
    """The start token, then the codes one after the other; and what they are for at generation."""
    places, width = row_of(1 + len(SLOTS), x, w, 6)
    for left, colour in zip(places, (PAPER, *SLOTS)):
        brush.box(left, y, width, 24, colour, "#e08a1e" if colour == PAPER else None, 5, 2)
    brush.text(x, y + h - 10, "proposes storyboards", SMALL, GENERATION)


def draw_prompt(brush, x, y, w, h):
    lines = wrap(brush, f'"{STORY.prompt}"', w)
    for number, line in enumerate(lines):
        brush.text(x, y + 12 + 28 * number, line)
    brush.text(x, y + h - 42, "opens the story, and picks a", SMALL, GENERATION)
    brush.text(x, y + h - 14, "storyboard by p(prompt | z)", SMALL, GENERATION)


def draw_soft(brush, x, y, w, h):
    places, width = row_of(len(SLOTS), x, w, 6)
    for colour, left in zip(SLOTS, places):
        brush.box(left, y, width, h, colour, radius=6)


def draw_sequence(brush, x, y, w, h):
    """What the language model reads: the soft prompt, then the story."""
    places, width = row_of(16, x, w, 3)
    for number, left in enumerate(places):
        brush.box(left, y + h / 2 - 15, width, 30, (SLOTS + ("#8fa3b5",) * 8)[number], radius=3)


def draw_pipeline(brush, x, y, w, h):
    spots = ((x, 0.42 * w, "VAE"), (x + 0.47 * w, 0.53 * w, "UNet"), (x, w, "text encoder"))
    height = (h - 6) / 2
    for number, (left, width, words) in enumerate(spots):
        top = y + (height + 6) * (number == 2)
        brush.box(left, top, width, height, "#f4f9fd", "#5b93c2", radius=7, width=1)
        brush.text(left + width / 2, top + height / 2, words, 19, INK, "mm")


def draw_picture(brush, x, y, w, h):
    brush.paste(draw_panel(STORY, 7, 384), x - 8, y + (h - w - 16) / 2, w + 16, 8)


ICONS = {
    "excerpt": draw_excerpt,
    "layers": draw_layers,
    "codebook": draw_codebook,
    "votes": draw_votes,
    "chips": draw_chips,
    "growing": draw_growing_codes,
    "prompt": draw_prompt,
    "soft": draw_soft,
    "sequence": draw_sequence,
    "pipeline": draw_pipeline,
    "picture": draw_picture,
}

# --------------------------------------------------------------------------------------------------
# 5. Cards and arrows
# --------------------------------------------------------------------------------------------------

PADDING, RADIUS, TAG_HEIGHT, HEAD = 18, 16, 56, 13


def draw_card(brush, card: Card):
    look = LOOKS[card.look]
    brush.box(card.x, card.y, card.w, card.h, look.fill, radius=RADIUS)
    if look.hatched:
        brush.hatch(card.x, card.y, card.w, card.h, "#cbdff0", RADIUS)
    brush.box(
        card.x, card.y, card.w, card.h, None, look.edge, RADIUS, 3.5 if card.look == "hero" else 2.5
    )
    brush.text(card.x + PADDING, card.y + 28, card.title, TITLE, bold=True)
    if look.hatched:
        brush.snowflake(card.x + card.w - 24, card.y + 26, 13, "#2f6f9f")
    for number, line in enumerate(card.lines):
        brush.text(card.x + PADDING, card.y + 62 + 27 * number, line, BODY, SOFT_INK)
    top = card.y + 54 + 27 * len(card.lines) + 5 * bool(card.lines)
    bottom = card.y + card.h - (TAG_HEIGHT / 2 + 12 if card.tag else PADDING)
    ICONS[card.icon](brush, card.x + PADDING, top, card.w - 2 * PADDING, bottom - top)
    if card.tag:
        draw_tag(brush, card)


def draw_tag(brush, card: Card):
    """A term of the loss, on the lower edge of the card that it belongs to."""
    width = max(brush.width_of(words, SMALL) for words in card.tag) + 32
    x, y = card.x + (card.w - width) / 2, card.y + card.h - TAG_HEIGHT / 2
    brush.box(x, y, width, TAG_HEIGHT, "#374151", radius=14)
    for words, down, colour in zip(card.tag, (17, 39), ("#fcd9a8", "#ffffff")):
        brush.text(x + width / 2, y + down, words, SMALL, colour, "mm")


def spot(place) -> tuple[float, float]:
    """(x, y) as it stands; (card, side, share) -> the point on that side of the card."""
    if len(place) == 2:
        return place
    name, side, share = place
    card = CARDS[name]
    if side in ("left", "right"):
        return card.x + card.w * (side == "right"), card.y + card.h * share
    return card.x + card.w * share, card.y + card.h * (side == "bottom")


def shorten(start, end, by: float):
    """The point `by` before `end` on the way from `start`."""
    share = by / math.dist(start, end)
    return end[0] + (start[0] - end[0]) * share, end[1] + (start[1] - end[1]) * share


def dashes(points, length: float, gap: float):
    """Cuts each leg of a path into dashes that begin and end the leg."""
    for start, end in pairwise(points):
        far = math.dist(start, end)
        count = max(1, round((far + gap) / (length + gap)))
        period = (far + gap) / count
        for number in range(count):
            span = (number * period / far, (number * period + period - gap) / far)
            yield [tuple(a + (b - a) * share for a, b in zip(start, end)) for share in span]


def draw_head(brush, start, end, colour):
    (x, y), back = end, shorten(start, end, HEAD)
    across, down = (y - back[1]) * 0.52, (back[0] - x) * 0.52
    brush.polygon(
        [(x, y), (back[0] + across, back[1] + down), (back[0] - across, back[1] - down)], colour
    )


def draw_path(brush, kind: str, points):
    stroke = STROKES[kind]
    points = [shorten(points[1], points[0], 3), *points[1:-1], shorten(points[-2], points[-1], 3)]
    line = [*points[:-1], shorten(points[-2], points[-1], HEAD - 1)]
    if stroke.both_ends:
        line[0] = shorten(points[1], points[0], HEAD - 1)
        draw_head(brush, points[1], points[0], stroke.colour)
    for piece in dashes(line, stroke.dash, 5) if stroke.dash else [line]:
        brush.line(piece, stroke.colour, 3)
    draw_head(brush, points[-2], points[-1], stroke.colour)


def draw_arrow(brush, arrow: Arrow):
    draw_path(brush, arrow.kind, [spot(place) for place in arrow.points])
    if arrow.label:
        (x, y), width = arrow.label_at, brush.width_of(arrow.label, SMALL) + 16
        brush.box(x - width / 2, y - 14, width, 28, PAPER)
        brush.text(x, y, arrow.label, SMALL, STROKES[arrow.kind].colour, "mm")


def draw_legend(brush, y: float):
    for x, sample, name, words in LEGEND:
        if sample == "stroke":
            draw_path(brush, name, [(x, y), (x + 48, y)])
            brush.text(x + 58, y, words, SMALL)
            continue
        look = LOOKS[name]
        brush.box(x, y - 12, 30, 24, look.fill, look.edge, 6, 2)
        if look.hatched:
            brush.snowflake(x + 15, y, 9, "#2f6f9f")
        brush.text(x + 40, y, words, SMALL)


# --------------------------------------------------------------------------------------------------
# 6. The picture
# --------------------------------------------------------------------------------------------------


def draw_architecture() -> Image.Image:
    """The figure, RGBA (HEIGHT, WIDTH): a light card with clear corners, for light and for dark
    pages."""
    brush = Brush()
    brush.box(1, 1, WIDTH - 2, HEIGHT - 2, PAPER, EDGE, 28)
    brush.text(LEFT, 54, "StoryDiffusion", 38, bold=True)
    draw_legend(brush, 56)
    for card in CARDS.values():
        draw_card(brush, card)
    for arrow in ARROWS:
        draw_arrow(brush, arrow)
    return brush.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    draw_architecture().save(HERE / "architecture.png", optimize=True)
