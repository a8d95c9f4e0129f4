"""Real stories as books: what the painter reads for each panel, and the scene that it asks for.

    told = tale_panels(tokenizer, "data/tales", "train", 1000)  # [("A fox ... She swam.", Scene), ...]

A panel shows the story's hero and what its own part names; place, time and weather hold on from
the story's opening until a part names others. Behind a typed line that names a place, the book
plays there.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import places  # noqa: E402
from captions import NAMES, PROMPTS, TITLES, scene_named, scene_of, sentence, things_in, tokens_of  # noqa: E402
from scenes import FAIR_PLACES, FAIR_WEIGHTS, FAIRGROUND, Scene, Shown  # noqa: E402
from things import PAINTED, THINGS  # noqa: E402

import story_generative_model as sgm  # noqa: E402

PANELS = (1, 4, 8)  # of a story, as people ask for them
IN_THE_SKY = ("sun", "moon")  # drawn there already, by the time of day
LINE_SHARE = 0.25  # of panels, behind a typed line
FAIR_SHARE = 0.3  # of these, behind one that asks for a fair
LINES = (*PROMPTS, *TITLES[:2])
FAIR_LINES = (*LINES, "Build {deed} {where}", "We want {deed} {where}", "A trip to {deed} {where}")


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


def behind_line(text: str, scene: Scene, chance: random.Random) -> tuple[str, Scene]:
    """A panel's text behind a line as people type it, which names a place, and with it the panel's
    hero or a fair: the scene is there."""
    hero, *others = scene.shown
    asks_for_fair = chance.random() < FAIR_SHARE
    if asks_for_fair:
        fair = tuple(map(Shown, FAIRGROUND))
        place = chance.choices(FAIR_PLACES, FAIR_WEIGHTS)[0]
        lines, named, shown = FAIR_LINES, fair, (hero, *(others[:1] or fair[1:]), fair[0])
    else:
        place = chance.choice(list(places.PLACES))
        lines, named, shown = LINES, (Shown(hero.thing),), scene.shown
    line = sentence(Scene(named, place), lines, chance, chance.choice(NAMES))
    time = scene.time if place in places.HAS_TIME else "noon"
    weather = scene.weather if place in places.HAS_WEATHER else "clear"
    there = replace(scene, shown=shown, place=place, time=time, weather=weather)
    return f"{line}\n{text}", there


def tale_panels(
    tokenizer, data_root: str, split: str, count: int, line_share: float = LINE_SHARE, seed: int = 0
) -> list[tuple[str, Scene]]:
    """A panel of each of the first `count` stories whose opening has a hero, if the painter learns
    all that it shows: the painter's text, its scene. Which panel of how many, and whether a line
    stands before it, is drawn by lot: another seed, other panels."""
    told = []
    for number, row in enumerate(sgm.read_rows(data_root, split), seed):
        chance = random.Random(number)
        first = sgm.cut_into_panels(tokenizer, row.story, sgm.NUM_SLOTS)[0]
        parts = sgm.cut_into_panels(tokenizer, row.story, chance.choice(PANELS))
        if hero := hero_of(first):
            panel = chance.randrange(len(parts))
            shown = parts[panel] if len(parts) > 1 else first
            scene = panel_scene(hero, first, shown, seed=number)
            if all(one.thing in PAINTED for one in scene.shown):
                text = sgm.panel_texts(first, parts, "part")[panel]
                lined = chance.random() < line_share
                told.append(behind_line(text, scene, chance) if lined else (text, scene))
        if len(told) == count:
            return told
    return told
