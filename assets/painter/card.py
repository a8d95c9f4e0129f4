"""The card: what the shipped painter shows, on captions, lines and stories that no training saw.

    python assets/painter/train.py --stages card

A measure is a function of `Shipped` that returns table rows. Beside each figure of painted pictures
stands that of drawn ones, read by the same reader: its own mistakes are in both.

Shapes: N pictures, L latent elements, T things.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent / "storyworld"), str(ROOT)]

import reading  # noqa: E402
import train_backbones as backbones  # noqa: E402
from books import hero_of, panel_scene, tale_panels  # noqa: E402
from captions import Named, caption, scene_named, scene_of  # noqa: E402
from pictures import REPORT, illustrator, scene_latents, scenes_from  # noqa: E402
from scenes import Illustrator, Scene  # noqa: E402
from things import KINDS, THINGS  # noqa: E402
from train_backbones import Run, encode, psnr, reconstruct, share  # noqa: E402

import story_generative_model as sgm  # noqa: E402

SCENES = 512
NEAREST = 256  # of them, for the distance to the training scenes
BOOKS, PANELS = 50, 8
LINED = 120  # panels behind typed lines
TIMED = 5
SHEET_COLUMNS = 8
SAMPLING = {
    name: sgm.PRESETS["storyteller"][name] for name in ("num_inference_steps", "guidance_scale")
}
PROMPTS = ROOT / "tests" / "benchmarks" / "open_prompts.txt"
TARGETS = {
    "one thing": 0.85,
    "two things": 0.7,
    "colour": 0.9,
    "place": 0.95,
    "time": 0.95,
    "weather": 0.95,
    "mood": 0.7,
    "relation": 0.5,
}
CARD = """# The painter's figures

Printed by `python assets/painter/train.py --stages card`, of the shipped weights in fp32, with
{num_inference_steps} DPM-Solver++ steps and guidance {guidance_scale}. The shares are of right
readings by the reader of pictures, on drawn scenes and on pictures painted from texts that no
training saw.

## Captions

Of {scenes} scenes from seed {first:,} on. The autoencoder returns them at {psnr:.1f} dB PSNR.

| what | drawn | painted | target |
|---|---|---|---|
{captions}

| kind, one thing | drawn | painted |
|---|---|---|
{kinds}

![Drawn scenes above painted ones](scenes.webp)

## Typed lines

The lines of `tests/benchmarks/open_prompts.txt`: what a line names and can be shown.

| what | drawn | painted | target |
|---|---|---|---|
{prompts}

![Drawn lines above painted ones](prompts.webp)

## Books

{books} stories of the validation split in {panels} panels each, cut as `generate` does. The hero
is the first being that the first part names. The painter reads the story's first part and the
panel's own (`--panel_text part`).

| the hero is shown | drawn | painted | target |
|---|---|---|---|
{stories}

Of {lined} panels of validation stories behind a typed line that names a place, or a fair there:

| what | drawn | painted | target |
|---|---|---|---|
{lines}

![Of each book its drawn panels above the painted ones](books.webp)

## No copies

Distance of latents, root mean square of an element.

| from | to | median | smallest |
|---|---|---|---|
{distances}

## The storyworld

The storyworld's own card, with its painter and with this one: read by its probe.

| factor | drawn | its painter, whole story | one beat | this painter, whole story | one beat |
|---|---|---|---|---|---|
{storyworld}

## Cost

| what | figure | target |
|---|---|---|
{costs}
"""


@dataclass
class Shipped:
    """What is in output_dir, as `generate` loads it, in fp32, and the illustrator beside it."""

    run: Run
    diffusion: sgm.LatentDiffusion
    config: sgm.Config
    reader: reading.PictureReader
    illustrator: Illustrator

    def paint(self, texts: list[str]) -> np.ndarray:
        """A picture of each text (N, 128, 128, 3) uint8; the seed is its number."""
        return backbones.paint(self.diffusion, self.config, texts)

    def read(self, pictures: np.ndarray) -> dict[str, Tensor]:
        """The reader's logits, on the CPU."""
        logits = reading.read_pictures(self.run, self.reader, pictures)
        return {key: value.cpu() for key, value in logits.items()}

    def latents(self, pictures: np.ndarray) -> Tensor:
        """(N, L) float32 on the run's device."""
        parts = [pictures[i : i + 32] for i in range(0, len(pictures), 32)]
        return torch.cat([encode(self.run, self.diffusion.vae, part) for part in parts]).flatten(1)


def load_shipped(run: Run) -> Shipped:
    diffusion = sgm.LatentDiffusion(str(run.output_dir / "diffusion"), run.device, torch.float32)
    reader = reading.load_reader(run.output_dir / "reader.safetensors").to(run.device)
    return Shipped(run, diffusion, sgm.Config(**SAMPLING), reader, illustrator(run))


def row(*cells: object) -> str:
    """A line of a table; figures to two places."""
    return "| " + " | ".join(share(c) if isinstance(c, float) else str(c) for c in cells) + " |"


def write_sheet(path: Path, *strips: np.ndarray) -> None:
    """Pictures (N, 128, 128, 3) of each strip, SHEET_COLUMNS in a row, the strips by turns."""
    from PIL import Image

    whole = len(strips[0]) // SHEET_COLUMNS * SHEET_COLUMNS
    starts = range(0, whole, SHEET_COLUMNS)
    rows = [
        np.concatenate(list(strip[start : start + SHEET_COLUMNS]), axis=1)
        for start in starts
        for strip in strips
    ]
    Image.fromarray(np.concatenate(rows)).save(path)


# --------------------------------------------------------------------------------------------------
# Captions of scenes
# --------------------------------------------------------------------------------------------------


def caption_rows(shipped: Shipped, scenes: list[Scene], columns: list[dict]) -> list[str]:
    """What is read right of drawn and of painted scenes."""
    drawn, painted = (reading.accuracy(logits, scenes) for logits in columns)
    return [row(key, drawn[key], painted[key], TARGETS[key]) for key in TARGETS if key in drawn]


def kind_rows(scenes: list[Scene], columns: list[dict[str, Tensor]]) -> list[str]:
    """How often a thing that is alone in its scene is read right, by its kind."""
    rows = []
    for kind in KINDS:
        alone = {i: s.shown[0].thing for i, s in enumerate(scenes) if len(s.shown) == 1}
        chosen = [i for i, thing in alone.items() if THINGS[thing].kind == kind]
        if chosen:
            wanted = torch.tensor([reading.THING_NAMES.index(alone[i]) for i in chosen])
            right = [logits["things"][chosen].argmax(1) == wanted for logits in columns]
            rows.append(row(f"{kind} ({len(chosen)})", *(x.float().mean().item() for x in right)))
    return rows


# --------------------------------------------------------------------------------------------------
# Typed lines
# --------------------------------------------------------------------------------------------------


def typed_lines() -> list[tuple[str, Named]]:
    """The lines that name a thing, and what they name."""
    lines = PROMPTS.read_text("utf-8").replace("*", "").splitlines()
    named = [(line, scene_of(line)) for line in lines]
    return [(line, names) for line, names in named if names.things]


def things_read(logits: Tensor, wanted: list[tuple[str, ...]]) -> list[bool]:
    """For every named thing of every picture, logits (N, T): does it rank among as many first?"""
    found = []
    for scores, names in zip(logits, wanted):
        first = {reading.THING_NAMES[i] for i in scores.topk(len(names)).indices.tolist()}
        found += [name in first for name in names]
    return found


def values_read(logits: Tensor, factor: str, wanted: list[str | None]) -> list[bool]:
    """For every picture whose text names a value of the factor: is it read?"""
    best = logits.argmax(1).tolist()
    return [reading.FACTORS[factor][i] == value for i, value in zip(best, wanted) if value]


def prompt_rows(shipped: Shipped) -> list[str]:
    """Things and places that typed lines name: are they shown? Writes prompts.webp."""
    lines = typed_lines()[: shipped.run.scaled(len(typed_lines()), 8)]
    texts, named = zip(*lines)
    scenes = [scene_named(names, seed) for seed, names in enumerate(named)]
    drawn, painted = shipped.illustrator.draw_all(scenes), shipped.paint(list(texts))
    write_sheet(shipped.run.output_dir / "prompts.webp", drawn, painted)
    columns = [shipped.read(pictures) for pictures in (drawn, painted)]
    things = [tuple(one.thing for one in scene.shown) for scene in scenes]
    places = [names.place for names in named]
    things_right = [things_read(logits["things"], things) for logits in columns]
    places_right = [values_read(logits["place"], "place", places) for logits in columns]
    return [
        row(f"{title} ({len(right[0])})", *(float(np.mean(marks)) for marks in right), target)
        for title, right, target in (("things", things_right, 0.8), ("places", places_right, "-"))
        if right[0]
    ]


# --------------------------------------------------------------------------------------------------
# Books of open stories
# --------------------------------------------------------------------------------------------------


def open_books(shipped: Shipped, data_root: Path) -> list[tuple[str, list[str]]]:
    """(hero, parts) of the first stories whose opening has a hero, with a sentence for each panel."""
    books, count = [], shipped.run.scaled(BOOKS, 2)
    for story in (one.story for one in sgm.read_rows(str(data_root), "val")):
        parts = sgm.cut_into_panels(shipped.diffusion.tokenizer, story, PANELS)
        hero = hero_of(parts[0])
        if hero and len(parts) == PANELS:
            books.append((hero, parts))
        if len(books) == count:
            break
    return books


def book_rows(shipped: Shipped, data_root: Path) -> list[str]:
    """Is a story's hero shown in its panels, in neighbouring ones, in all? Writes books.webp: of
    each book its drawn panels, and the painted ones."""
    books = open_books(shipped, data_root)
    told = [(hero, parts[0], part) for hero, parts in books for part in parts]
    scenes = [panel_scene(*panel, seed) for seed, panel in enumerate(told)]
    texts = [text for _, parts in books for text in sgm.panel_texts(parts[0], parts, "part")]
    strips = [shipped.illustrator.draw_all(scenes), shipped.paint(texts)]
    write_sheet(shipped.run.output_dir / "books.webp", *strips)
    number = torch.tensor([reading.THING_NAMES.index(hero) for hero, *_ in told])[:, None]
    columns = []
    for pictures in strips:
        logits = shipped.read(pictures)["things"].gather(1, number)  # (N, 1)
        columns.append(shown_shares((logits > 0).view(-1, PANELS).tolist()))
    titles = ("in a panel", "in two neighbouring panels", "in all panels")
    return [row(*cells) for cells in zip(titles, *columns, ("-", 0.9, 0.8))]


def line_rows(shipped: Shipped, data_root: Path) -> list[str]:
    """Panels of real stories behind typed lines: do they show the line's place?"""
    count = shipped.run.scaled(LINED, 4)
    told = tale_panels(shipped.diffusion.tokenizer, str(data_root), "val", count, line_share=1.0)
    texts, scenes = zip(*told)
    drawn, painted = shipped.illustrator.draw_all(list(scenes)), shipped.paint(list(texts))
    columns = [shipped.read(pictures) for pictures in (drawn, painted)]
    places = [values_read(x["place"], "place", [scene.place for scene in scenes]) for x in columns]
    return [row("the line's place", *(float(np.mean(marks)) for marks in places), 0.95)]


def shown_shares(books: list[list[bool]]) -> tuple[float, float, float]:
    """Of books whose panels show their hero or not: share of panels that do, of neighbouring panels
    that both do, of books that do throughout."""
    pairs = [a and b for book in books for a, b in pairwise(book)]
    panels = [shown for book in books for shown in book]
    return tuple(float(np.mean(marks)) for marks in (panels, pairs, [all(b) for b in books]))


# --------------------------------------------------------------------------------------------------
# Distances, the storyworld, costs
# --------------------------------------------------------------------------------------------------


def nearest(latents: Tensor, known: np.ndarray, block: int = 1000) -> Tensor:
    """Root mean square distance (N,) of each row of `latents` (N, L) to the nearest of `known`
    (M, ...)."""
    best = torch.full((len(latents),), torch.inf, device=latents.device)
    for start in range(0, len(known), block):
        part = torch.from_numpy(known[start : start + block]).to(latents).flatten(1)
        best = torch.minimum(best, torch.cdist(latents, part).amin(1))
    return best / latents.shape[1] ** 0.5


def distance_rows(shipped: Shipped, scenes: list[Scene], drawn, painted) -> list[str]:
    """Painted and drawn pictures to the nearest training scene, and two drawings of one caption."""
    count = shipped.run.scaled(NEAREST, 8)
    known, first = scene_latents(shipped.run), shipped.latents(drawn[:count])
    again = shipped.illustrator.draw_all(
        [replace(scene, seed=scene.seed + SCENES) for scene in scenes[:count]]
    )
    between = (first - shipped.latents(again)).square().mean(1).sqrt()
    scenes_known = f"nearest of {len(known):,} training scenes"
    rows = (
        ("painted", scenes_known, nearest(shipped.latents(painted[:count]), known)),
        ("drawn", scenes_known, nearest(first, known)),
        ("drawn", "another drawing of its caption", between),
    )
    return [row(a, b, x.median().item(), x.min().item()) for a, b, x in rows]


def storyworld_rows(run: Run, folder: Path) -> list[str]:
    """The storyworld's card for its own painter and for the pipeline in `folder`."""
    home = replace(run, output_dir=HERE.parent / "storyworld")
    own = backbones.factor_accuracy(home, backbones.load_shipped(home))
    settings = dict(diffusion_model=str(folder), **SAMPLING)
    new = backbones.factor_accuracy(home, backbones.load_shipped(home, **settings))
    columns = (*own, *new[1:])  # the drawn panels are the same
    return [row(f, *(share(column.get(f)) for column in columns)) for f in own[0]]


def cost_rows(shipped: Shipped) -> list[str]:
    """Time of one picture, and megabytes of the weights."""
    seconds = []
    for seed in range(TIMED + 1):
        start = time.monotonic()
        states = shipped.diffusion.encode_texts(["A fox in the snow"])
        shipped.diffusion.sample_images(*states, shipped.config, [seed])
        seconds.append(time.monotonic() - start)
    files = [*(shipped.run.output_dir / "diffusion").rglob("*.safetensors")]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    where = f"{shipped.run.device.type}, {torch.get_num_threads()} threads"
    return [
        row(f"one picture, seconds ({where})", statistics.median(seconds[1:]), "1.5 (two cores)"),
        row("weights, MB", f"{megabytes:.0f}", "100"),
    ]


def write_card(run: Run, data_root: Path) -> None:
    """Stage card: card.md and its sheets in output_dir; the card is printed as well."""
    shipped, chance = load_shipped(run), random.Random(0)
    stories = book_rows(shipped, data_root)  # first, since the data may be missing
    scenes = scenes_from(run, run.scaled(SCENES, 8), REPORT)
    drawn = shipped.illustrator.draw_all(scenes)
    painted = shipped.paint([caption(scene, chance) for scene in scenes])
    columns = [shipped.read(pictures) for pictures in (drawn, painted)]
    write_sheet(run.output_dir / "scenes.webp", drawn[:64], painted[:64])
    tables = dict(
        captions=caption_rows(shipped, scenes, columns),
        kinds=kind_rows(scenes, columns),
        prompts=prompt_rows(shipped),
        stories=stories,
        lines=line_rows(shipped, data_root),
        distances=distance_rows(shipped, scenes, drawn, painted),
        storyworld=storyworld_rows(run, run.output_dir / "diffusion"),
        costs=cost_rows(shipped),
    )
    card = CARD.format(
        **{name: "\n".join(rows) for name, rows in tables.items()},
        **SAMPLING,
        scenes=len(scenes),
        first=REPORT,
        psnr=psnr(drawn, reconstruct(run, shipped.diffusion.vae, drawn)),
        books=run.scaled(BOOKS, 2),
        panels=PANELS,
        lined=run.scaled(LINED, 4),
    )
    backbones.write_atomically(run.output_dir / "card.md", lambda partial: partial.write_text(card))
    print(card, flush=True)
