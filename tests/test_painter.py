"""The painter's scenes and captions: what is data there is checked as data, what is drawn is drawn.

The open art is fetched when weights are trained; here each sprite is a synthetic one, so that
composition, moods and colours run on a bare machine. People, places and hand-drawn things are the
real ones."""

import random
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "assets" / "painter"), str(ROOT / "assets" / "storyworld")]

import captions  # noqa: E402
import drawings  # noqa: E402
import figures  # noqa: E402
import people  # noqa: E402
import places  # noqa: E402
import scenes  # noqa: E402
import sprites  # noqa: E402
import things  # noqa: E402
from figures import Shown  # noqa: E402
from scenes import Illustrator, Scene, sample_scene  # noqa: E402
from things import THINGS  # noqa: E402


class SyntheticArt:
    """An ellipse for each sprite, in a colour of its name's own."""

    names = frozenset(things.sprite_names())

    def sprite(self, name: str) -> Image.Image:
        assert name in self.names
        picture = Image.new("RGBA", (200, sprites.SPRITE_PIXELS))
        colour = tuple(60 + (zlib.crc32(name.encode()) >> shift) % 160 for shift in (0, 8, 16))
        ImageDraw.Draw(picture).ellipse([0, 0, 199, 255], fill=(*colour, 255))
        return picture


@pytest.fixture(scope="module")
def illustrator() -> Illustrator:
    return Illustrator(SyntheticArt())


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


# ---- the tables ----


def test_the_world_is_as_wide_as_a_story_needs():
    assert len(THINGS) >= 400
    assert len(places.PLACES) >= 30
    assert set(people.WARDROBE) == {
        name for name, thing in THINGS.items() if thing.kind == "person"
    }


def test_every_home_is_a_place_and_every_place_has_words():
    assert {thing.home for thing in THINGS.values()} - {""} <= set(places.PLACES)
    assert set(captions.PLACE_WORDS) == set(places.PLACES)


def test_no_word_names_two_things():
    owners: dict[str, str] = {}
    for name, thing in THINGS.items():
        for word in (*thing.words, *thing.near):
            assert owners.setdefault(word, name) == name, (
                f"{word!r} names {owners[word]} and {name}"
            )


def test_every_drawing_is_used_and_every_drawn_thing_has_one():
    drawn = {
        thing.art.removeprefix("drawn:")
        for thing in THINGS.values()
        if thing.art.startswith("drawn:")
    }
    assert drawn == set(drawings.DRAWINGS)


# ---- figures and places ----


def test_every_thing_draws_and_no_two_alike(illustrator):
    seen = {}
    for name in THINGS:
        picture = illustrator.figures.figure(Shown(name), 96)
        opaque = pixels(picture)[..., 3] > 200
        assert opaque.sum() > 250, f"{name} is all but empty"
        assert seen.setdefault(picture.tobytes(), name) == name, (
            f"{name} looks as {seen[picture.tobytes()]}"
        )


@pytest.mark.parametrize("name", ["girl", "king", "fox", "turtle"])
def test_a_mood_changes_the_face(illustrator, name):
    looks = {
        illustrator.figures.figure(Shown(name, mood=mood), 120).tobytes()
        for mood in (None, *figures.MOODS)
    }
    assert len(looks) == 1 + len(figures.MOODS)


def test_a_hero_wears_its_colour(illustrator):
    for name, colour in (("girl", "red"), ("fox", "blue"), ("boy", "green")):
        look = pixels(illustrator.figures.figure(Shown(name, colour), 120))
        near = np.abs(look[..., :3] - people.COLOURS[colour]).max(-1) < 40
        plain = pixels(illustrator.figures.figure(Shown(name), 120))
        before = np.abs(plain[..., :3] - people.COLOURS[colour]).max(-1) < 40
        assert near.sum() > before.sum() + 200, (name, colour)


def test_recolouring_keeps_what_is_not_the_main_colour():
    picture = Image.new("RGBA", (40, 40), (220, 60, 50, 255))
    ImageDraw.Draw(picture).rectangle([0, 0, 9, 39], fill=(60, 60, 220, 255))
    turned = pixels(figures.recolour(picture, people.COLOURS["green"]))
    assert (turned[:, :10, :3] == (60, 60, 220)).all()
    assert turned[20, 30, 1] > turned[20, 30, 0] + 40


@pytest.mark.parametrize("name", places.PLACES)
def test_a_place_shows_its_time_and_weather(name):
    def seen(time, weather):
        return places.backdrop(name, time, weather, places.Layout(), 128).tobytes()

    times = {seen(time, "clear") for time in places.TIMES}
    weathers = {seen("noon", weather) for weather in places.WEATHERS}
    assert len(times) == (len(places.TIMES) if name in places.HAS_TIME else 1)
    assert len(weathers) == (len(places.WEATHERS) if name in places.HAS_WEATHER else 1)
    flipped = places.backdrop(name, "noon", "clear", places.Layout(flip=1), 128)
    assert flipped.tobytes() != seen("noon", "clear")


# ---- scenes ----


def test_a_scene_is_its_seed(illustrator):
    names = illustrator.names()
    assert names == list(THINGS)
    for seed in (3, 11):
        first, second = sample_scene(seed, names), sample_scene(seed, names)
        assert first == second
        assert (
            illustrator.draw(first).tobytes() == Illustrator(SyntheticArt()).draw(second).tobytes()
        )
    assert sample_scene(3, names) != sample_scene(4, names)


def test_scenes_have_every_relation_mood_place_and_kind():
    drawn = [sample_scene(seed, list(THINGS)) for seed in range(1500)]
    assert {scene.relation for scene in drawn} == {"", *scenes.RELATIONS}
    assert {one.mood for scene in drawn for one in scene.shown} == {None, *figures.MOODS}
    assert {scene.place for scene in drawn} == set(places.PLACES)
    assert {THINGS[one.thing].kind for scene in drawn for one in scene.shown} == set(things.KINDS)
    assert max(one.count for scene in drawn for one in scene.shown) > 2


def placed(illustrator: Illustrator, scene: Scene) -> list[scenes.Placed]:
    return scenes.Arranger(scene, illustrator.size_of).arrange()


def test_relations_are_where_they_should_be(illustrator):
    girl, horse, apple, boat, boy = (
        Shown(name) for name in ("girl", "horse", "apple", "canoe", "boy")
    )
    held = placed(illustrator, Scene((girl, apple), "meadow", relation="holds"))
    hero, thing = (next(one for one in held if one.shown == which) for which in (girl, apple))
    assert thing.height < hero.height and hero.y - hero.height < thing.y < hero.y

    riding = placed(illustrator, Scene((girl, horse), "farm", relation="rides"))
    assert (
        riding[-1].shown == horse and riding[0].y < riding[-1].y
    )  # the rider is higher and behind the mount's back

    sitting = placed(illustrator, Scene((girl, boat), "river", relation="sits in"))
    assert [one.shown for one in sitting] == [girl, boat]

    flying = placed(illustrator, Scene((Shown("owl"), horse), "farm", relation="flies over"))
    above, below = (
        next(one for one in flying if one.shown.thing == name) for name in ("owl", "horse")
    )
    assert above.y <= below.y - below.height + 0.15

    giving = placed(illustrator, Scene((girl, boy, apple), "meadow", relation="gives"))
    across = {one.shown.thing: one.x for one in giving}
    assert across["girl"] < across["apple"] < across["boy"]


def test_big_beside_small_and_many_of_one_kind(illustrator):
    pair = (Shown("cat", size="big"), Shown("dog", size="small"))
    big, small = sorted(placed(illustrator, Scene(pair, "garden")), key=lambda one: -one.height)
    assert big.shown.thing == "cat" and big.height > 1.5 * small.height
    for name in ("fox", "butterfly"):  # on the ground, and in the air
        assert len(placed(illustrator, Scene((Shown(name, count=4),), "garden"))) == 4


def test_a_mood_is_signed_beside_the_figure(illustrator):
    quiet = Scene((Shown("whale"),), "sea")
    looks = {
        illustrator.draw(replace(quiet, shown=(Shown("whale", mood=mood),))).tobytes()
        for mood in (None, *figures.MOODS)
    }
    assert len(looks) == 5


# ---- captions ----


def test_a_caption_names_what_is_shown_and_nothing_else():
    chance, right, total = random.Random(5), 0, 400
    for seed in range(total):
        scene = sample_scene(seed, list(THINGS))
        text = captions.caption(scene, chance)
        named = captions.scene_of(text)
        assert named.place in (None, scene.place), text
        assert named.time in (None, scene.time), text
        assert named.weather in (None, scene.weather), text
        right += (
            set(named.things) == {one.thing for one in scene.shown}
            and named.relation == scene.relation
        )
    assert right >= 0.97 * total


def test_colours_and_moods_are_read_back():
    hero = Shown("dragon", colour="blue", mood="sad")
    scene = Scene((hero, Shown("girl")), "castle", "night", "rainy")
    for seed in range(20):
        named = captions.scene_of(captions.caption(scene, random.Random(seed)))
        assert dict(named.colours) == {"dragon": "blue"} and dict(named.moods) == {"dragon": "sad"}


@pytest.mark.parametrize(
    "text, names",
    [
        ("The crane flew over the lake with a fish", ("crane", "fish")),
        ("The crane lifted a house at the building site", ("house",)),
        ("A bat hung in the cave", ("bat",)),
        ("He swung the bat and hit the ball", ("baseball bat", "ball")),
        ("She saw well that the water could fly", ()),
        ("An orange cat and an orange", ("cat", "orange")),
        ("The puppies chased two mice", ("puppy", "mouse")),
        ("Grandma baked a birthday cake", ("grandmother", "cake")),
        ("A hot air balloon over the desert", ("hot air balloon",)),
        ("He could not bear it and had to duck", ()),
    ],
)  # fmt: skip
def test_a_word_has_the_sense_that_its_neighbours_ask_for(text, names):
    assert captions.scene_of(text).things == names


def test_what_a_text_says_of_place_time_weather_and_relation():
    named = captions.scene_of("One snowy night a scared rabbit rode a donkey through the forest")
    assert (named.place, named.time, named.weather, named.relation) == (
        "forest",
        "night",
        "snowy",
        "rides",
    )
    assert named.things == ("rabbit", "donkey") and dict(named.moods) == {"rabbit": "afraid"}


# ---- the art ----


def test_without_sprites_the_error_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sprites\.py --work_dir"):
        sprites.Art(tmp_path / "sprites.zip")


def test_sprites_come_back_as_they_were_put(tmp_path):
    import zipfile

    picture = Image.new("RGBA", (10, 12), (200, 30, 40, 255))
    picture.save(tmp_path / "x.png")
    with zipfile.ZipFile(tmp_path / "sprites.zip", "w") as file:
        file.write(tmp_path / "x.png", "noto:x.png")
    art = sprites.Art(tmp_path / "sprites.zip")
    assert art.names == {"noto:x"} and art.sprite("noto:x").tobytes() == picture.tobytes()
    with pytest.raises(KeyError, match="noto:y"):
        art.sprite("noto:y")


def test_a_park_on_the_moon_is_both():
    named = captions.scene_of("Build a Disney park on the moon")
    assert named.place == "moon" and named.things == ("ferris wheel", "roller coaster")
    assert captions.scene_of("A day at a theme park").place == "fair"
