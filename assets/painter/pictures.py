"""Pictures to learn from and to measure on: drawn once, kept in files, encoded once.

    pool(run, "scenes", 6000, partial(draw_scenes, run))  # (6000, 128, 128, 3) uint8, a memory map

Scenes are seeds: training takes them from 0 on, its checks from HELD_OUT on, the card from REPORT
on; the three never meet. A killed run draws only what is missing.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "storyworld")]

import train_backbones as backbones  # noqa: E402  (memory maps, the autoencoder's encoder)
import world  # noqa: E402
from scenes import PICTURE, Illustrator, Scene, sample_scene  # noqa: E402
from sprites import Art  # noqa: E402
from things import PAINTED  # noqa: E402
from train_backbones import Run  # noqa: E402

HELD_OUT = 10**9
REPORT = HELD_OUT + 10**6  # seen by no training's checks either
LOG_SECONDS = 10
POOL_PART = 100  # pictures that are drawn between two marks
LATENT_SHAPE = (4, PICTURE // 4, PICTURE // 4)
SCENES = 16_000  # to learn from


def illustrator(run: Run) -> Illustrator:
    return Illustrator(Art(run.work_dir / "sprites.zip"))


def scenes_from(run: Run, count: int, first: int = 0, sample=sample_scene) -> list[Scene]:
    """The scenes `sample(seed, names)` from seed `first` on, of things that the painter learns."""
    names = [name for name in illustrator(run).names() if name in PAINTED]
    return [sample(first + i, names) for i in range(count)]


def draw_scenes(run: Run, count: int, first: int = 0) -> np.ndarray:
    """Their pictures (count, 128, 128, 3) uint8."""
    return illustrator(run).draw_all(scenes_from(run, count, first))


def draw_panels(count: int, first: int = 0) -> np.ndarray:
    """A panel of each of `count` stories of the storyworld (count, 128, 128, 3) uint8, the beats in
    turn.
    """
    beats = len(world.BEATS)
    stories = [world.write_story(first + i) for i in range(count)]
    return np.stack(
        [np.asarray(world.draw_panel(story, i % beats, PICTURE)) for i, story in enumerate(stories)]
    )


def made_once(path: Path, shape: tuple, dtype, make) -> np.memmap:
    """An array of `shape` in a file, of which make(count, first) gives the rows from `first` on;
    a file of marks beside it says which are there."""
    rows = backbones.open_map(path, shape, dtype)
    done = backbones.open_map(path.with_suffix(".marks"), shape[:1], np.uint8)
    printed = time.monotonic()
    for start in range(0, len(rows), POOL_PART):
        part = slice(start, min(start + POOL_PART, len(rows)))
        if not done[part].all():
            rows[part] = make(part.stop - part.start, start)
            done[part] = 1
        if time.monotonic() - printed >= LOG_SECONDS:
            printed = time.monotonic()
            print(f"[{path.name}] {part.stop}/{len(rows)} made", flush=True)
    return rows


def pool(run: Run, name: str, count: int, draw) -> np.memmap:
    """The first `count` pictures of a kind (count, 128, 128, 3) uint8: draw(count, first)."""
    path = run.work_dir / f"{name}.u8"
    return made_once(path, (count, PICTURE, PICTURE, 3), np.uint8, draw)


def latent_pool(run: Run, name: str, count: int, draw) -> np.memmap:
    """Scaled latents (count, L, 32, 32) float16 of drawn pictures: draw(count, first)."""
    vae = backbones.load_vae(run)

    def make(part: int, first: int) -> np.ndarray:
        return backbones.encode(run, vae, draw(part, first)).cpu().numpy()

    path = run.work_dir / f"{name}_latents.f16"
    return made_once(path, (count, *LATENT_SHAPE), np.float16, make)


def draw_story_panels(count: int, first: int = 0) -> np.ndarray:
    """Panels from `first` on, eight to a story of the storyworld (count, 128, 128, 3) uint8."""
    beats = len(world.BEATS)
    return np.stack([np.asarray(world.draw_panel(world.write_story(i // beats), i % beats, PICTURE))
                     for i in range(first, first + count)])  # fmt: skip


def scene_pictures(run: Run, scenes: int = SCENES) -> np.memmap:
    """The scenes that every stage learns from (N, 128, 128, 3) uint8; the reader asks for more."""
    return pool(run, "scenes", run.scaled(scenes, 40), partial(draw_scenes, run))


def scene_latents(run: Run) -> np.memmap:
    """Their latents (N, L, 32, 32) float16."""
    pictures = scene_pictures(run)
    return latent_pool(
        run, "scenes", len(pictures), lambda count, first: pictures[first : first + count]
    )


def drawn_latents(run: Run, name: str, scenes: list[Scene]) -> np.memmap:
    """The latents (N, L, 32, 32) float16 of any scenes, under a name of their own."""

    def draw(count: int, first: int) -> np.ndarray:
        return illustrator(run).draw_all(scenes[first : first + count])

    return latent_pool(run, name, len(scenes), draw)
