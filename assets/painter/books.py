"""Real stories as books: what the painter reads for each panel, and the scene that it asks for.

    told = tale_panels(tokenizer, "data/tales", "train", 1000)  # [("A fox ... She swam.", Scene), ...]

A panel shows the story's hero and what its own part names; place, time and weather hold on from
the story's opening until a part names others.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from captions import scene_named, scene_of, things_in, tokens_of  # noqa: E402
from scenes import Scene  # noqa: E402
from things import PAINTED, THINGS  # noqa: E402

import story_generative_model as sgm  # noqa: E402

PANELS = (1, 4, 8)  # of a story, as people ask for them
IN_THE_SKY = ("sun", "moon")  # drawn there already, by the time of day


def hero_of(opening: str) -> str:
    """The first being that a story's opening names; "" if it names none."""
    found = (thing for _, thing in things_in(tokens_of(opening)))
    return next((thing for thing in found if THINGS[thing].is_being), "")


def panel_scene(hero: str, opening: str, part: str, seed: int) -> Scene:
    """The hero and what `part` names, where and when it says so, else as `opening` says."""
    before, named = scene_of(opening), scene_of(part)
    others = tuple(thing for thing in named.things if thing not in (hero, *IN_THE_SKY))
    named = replace(
        named,
        things=(hero, *others),
        place=named.place or before.place,
        time=named.time or before.time,
        weather=named.weather or before.weather,
        colours=tuple((dict(named.colours) | dict(before.colours)).items()),
    )
    return scene_named(named, seed)


def tale_panels(tokenizer, data_root: str, split: str, count: int) -> list[tuple[str, Scene]]:
    """A panel of each of the first `count` stories whose opening has a hero, if the painter learns
    all that it shows: the painter's text, its scene. Which panel of how many is drawn by lot."""
    told = []
    for number, row in enumerate(sgm.read_rows(data_root, split)):
        chance = random.Random(number)
        first = sgm.cut_into_panels(tokenizer, row.story, sgm.NUM_SLOTS)[0]
        parts = sgm.cut_into_panels(tokenizer, row.story, chance.choice(PANELS))
        if hero := hero_of(first):
            panel = chance.randrange(len(parts))
            shown = parts[panel] if len(parts) > 1 else first
            scene = panel_scene(hero, first, shown, seed=number)
            if all(one.thing in PAINTED for one in scene.shown):
                told.append((sgm.panel_texts(first, parts, "part")[panel], scene))
        if len(told) == count:
            return told
    return told
