"""Texts of scenes, as people write them, and what a text names.

    caption(scene, random.Random(0))            # "One rainy night, a sad fox sat in a canoe."
    scene_of("The crane flew over the castle")  # Named(("crane", "castle"), ...)

A caption names everything that its scene shows and nothing else: by name, synonym or near word.
Words that show nothing stand around it. `scene_of` is the inverse: it measures whether a picture
shows what a text names. A word with two senses takes the one that the words around it ask for
(SENSES); a word that may be a verb is a thing only after a determiner.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache

import places
from figures import Shown
from people import COLOURS
from scenes import FAIRGROUND, Scene
from things import THINGS

# --------------------------------------------------------------------------------------------------
# 1. Words.
# --------------------------------------------------------------------------------------------------

PLACE_WORDS = {
    "forest": ("in the forest", "in the woods", "in the wood", "among the trees"),
    "beach": ("on the beach", "at the seaside", "on the shore", "by the shore"),
    "mountain": ("on the mountain", "in the mountains", "in the valley", "on the cliff"),
    "village": ("in the village", "in a small town", "in the town"),
    "meadow": ("in the meadow", "in a field", "in the grass", "in the grassland", "on the hill",
        "in the savanna"),
    "desert": ("in the desert", "in the dunes"),
    "city": ("in the city", "downtown", "in a big city"),
    "street": ("in the street", "on the road", "on the path", "in the neighbourhood"),
    "castle": ("at the castle", "in front of the castle", "in the kingdom", "at the palace"),
    "farm": ("on the farm", "in the farmyard", "at the ranch"),
    "sea": ("on the sea", "on the ocean", "at sea", "across the ocean"),
    "river": ("by the river", "at the river", "by the stream", "on the riverbank",
        "by the waterfall"),
    "lake": ("by the lake", "at the lake", "by the pond", "at the pond"),
    "garden": ("in the garden", "in the yard", "in the backyard", "in the orchard"),
    "jungle": ("in the jungle", "in the rainforest", "at the zoo"),
    "snow": ("in the snow", "at the north pole", "on the ice", "in the arctic"),
    "market": ("at the market", "in the marketplace", "in the supermarket"),
    "playground": ("in the playground", "at the park", "in the park"),
    "island": ("on an island", "on the island", "on a desert island"),
    "volcano": ("by the volcano", "near a volcano"),
    "fair": ("at the fair", "at the funfair", "at the circus", "in a theme park", "at the carnival",
        "in a disney park"),
    "swamp": ("in the swamp", "in the marsh"),
    "harbour": ("at the harbour", "in the harbor", "at the port", "on the pier"),
    "sky": ("in the sky", "up in the clouds", "high above the clouds", "in the air"),
    "moon": ("on the moon", "on a far planet", "on mars"),
    "space": ("in space", "in outer space", "among the stars"),
    "underwater": ("under the sea", "under the water", "at the bottom of the sea", "underwater"),
    "cave": ("in the cave", "in a dark cave", "in the mine", "in the tunnel"),
    "living room": ("in the living room", "in the house", "at home", "indoors"),
    "bedroom": ("in the bedroom", "in the nursery"),
    "kitchen": ("in the kitchen", "in the bakery", "in the restaurant"),
    "school": ("at school", "in the classroom", "in the schoolroom"),
    "library": ("in the library", "among the bookshelves"),
    "hospital": ("in the hospital", "at the doctor's"),
    "bathroom": ("in the bathroom",),
    "stage": ("on the stage", "on stage", "in the theatre", "at the theater"),
}  # fmt: skip
TIME_WORDS = {
    "morning": ("in the morning", "early in the morning", "at dawn", "at sunrise"),
    "noon": ("at noon", "at midday", "in the middle of the day"),
    "evening": ("in the evening", "at sunset", "at dusk"),
    "night": ("at night", "at midnight", "in the moonlight", "late at night"),
}
WEATHER_WORDS = {
    "clear": ("in fine weather", "in the sunshine", "under a clear sky"),
    "cloudy": ("under a cloudy sky", "on a cloudy day", "under grey clouds"),
    "rainy": ("in the rain", "on a rainy day", "in a storm"),
    "snowy": ("in falling snow", "on a snowy day", "in a blizzard"),
}
WEATHER_OF = {"clear": "sunny", "cloudy": "cloudy", "rainy": "rainy", "snowy": "snowy"}
MOOD_WORDS = {
    "happy": ("happy", "cheerful", "joyful", "merry", "laughing", "glad"),
    "sad": ("sad", "crying", "unhappy", "lonely", "weeping"),
    "afraid": ("scared", "frightened", "afraid", "terrified", "nervous"),
    "asleep": ("sleeping", "sleepy", "asleep", "dozing", "snoring"),
}
AFTER_NOUN = ("afraid", "asleep")  # moods that no one puts before a noun
SIZE_WORDS = {
    "big": ("big", "huge", "enormous", "giant"),
    "small": ("small", "tiny", "little"),
    "": ("",),
}
NUMBERS = {
    2: ("two",),
    3: ("three", "some", "a few"),
    4: ("four", "many", "lots of"),
    5: ("five", "many", "a crowd of"),
}
COLOUR_WORDS = {colour: (colour,) for colour in COLOURS} | {
    "grey": ("grey", "gray"),
    "gold": ("gold", "golden"),
}

RELATION_WORDS = {
    "holds": ("holds", "is holding", "carries", "has picked up", "found"),
    "rides": ("rides", "is riding", "rides on", "goes for a ride on", "rode"),
    "flies over": ("flies over", "is flying over", "flew above", "soars over", "glides over"),
    "sits in": ("sits in", "is sitting in", "sat in", "hides in", "takes a nap in"),
}
PARTICIPLES = {
    "holds": ("holding", "carrying"), "rides": ("riding", "riding on"),
        "flies over": ("flying over", "gliding over"),
    "sits in": ("sitting in", "hiding in"),
}  # fmt: skip
GIVE_PARTICIPLES = ("{a} giving {b} {c}", "{a} giving {c} to {b}", "{a} sharing {c} with {b}")
PROPER = (
    "santa claus",
    "santa",
    "father christmas",
    "goldilocks",
    "cinderella",
    "dracula",
    "saturn",
    "mars",
)
GIVE_WORDS = (
    "{a} gives {b} {c}",
    "{a} gives {c} to {b}",
    "{a} gave {c} to {b}",
    "{a} brings {b} {c}",
    "{a} shares {c} with {b}",
)

PLURALS = {"mouse": "mice", "goose": "geese", "ox": "oxen", "wolf": "wolves", "leaf": "leaves",
    "elf": "elves",
           "man": "men", "woman": "women", "child": "children", "foot": "feet", "tooth": "teeth",
               "knife": "knives",
           "thief": "thieves", "fish": "fish", "sheep": "sheep", "deer": "deer", "bison": "bison",
               "shelf": "shelves",
           "scarf": "scarves", "calf": "calves", "reindeer": "reindeer", "dwarf": "dwarves",
               "loaf": "loaves"}  # fmt: skip
ALREADY_PLURAL = ("grapes", "cherries", "blueberries", "peas", "beans", "pancakes", "fries",
    "noodles", "glasses", "sunglasses",
                  "socks", "shoes", "boots", "gloves", "trousers", "skates", "skis", "ballet shoes",
                      "roller skates", "books",
                  "blocks", "bubbles", "maracas", "scissors", "paints", "musical notes", "dice",
                      "fireworks")  # fmt: skip
UNCOUNTED = ("bread", "butter", "cheese", "meat", "soup", "rice", "spaghetti", "honey", "milk",
    "juice", "lemonade", "tea", "corn",
             "popcorn", "salad", "chocolate", "broccoli", "cabbage", "wheat", "clover", "wood",
                 "fruit", "ice",
                 "fire", "soap", "thread", "cherry blossom")  # fmt: skip


def plural(word: str) -> str:
    """The plural of a name, by its last word."""
    *before, last = word.split(" ")
    if word in ALREADY_PLURAL or word in UNCOUNTED:
        return word
    if last in PLURALS:
        last = PLURALS[last]
    elif re.search(r"(man)$", last) and last != "human":
        last = last[:-3] + "men"
    elif re.search(r"(s|x|ch|sh|z)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    elif re.search(r"[^aeiou]o$", last) and last not in (
        "piano",
        "yo-yo",
        "hippo",
        "rhino",
        "dodo",
        "dino",
    ):
        last += "es"
    else:
        last += "s"
    return " ".join([*before, last])


def with_article(phrase: str) -> str:
    return (
        "an " if re.match(r"[aeiou]", phrase) and not re.match(r"(uni|ufo)", phrase) else "a "
    ) + phrase


# --------------------------------------------------------------------------------------------------
# 2. Captions.
# --------------------------------------------------------------------------------------------------

NAMES = (
    "Nell",
    "Tom",
    "Mia",
    "Ben",
    "Asha",
    "Kofi",
    "Rosa",
    "Sam",
    "Nora",
    "Juma",
    "Lena",
    "Max",
    "Zuri",
    "Ravi",
    "Timmy",
    "Lucy",
)
NEAR_SHARE, SYNONYM_SHARE = 0.08, 0.35


def word_for(name: str, chance: random.Random) -> str:
    """A name, a synonym or a near word of a thing."""
    thing, draw = THINGS[name], chance.random()
    if thing.near and draw < NEAR_SHARE:
        return chance.choice(thing.near)
    if len(thing.words) > 1 and draw < NEAR_SHARE + SYNONYM_SHARE:
        return chance.choice(thing.words[1:])
    return name


def noun_phrase(shown: Shown, chance: random.Random, definite: bool = False) -> str:
    """How a text calls what is shown: "a small sad green dragon", "three foxes", "the moon"."""
    word = word_for(shown.thing, chance)
    mood = chance.choice(MOOD_WORDS[shown.mood]) if shown.mood else ""
    after = mood if mood in AFTER_NOUN else ""
    size = chance.choice(SIZE_WORDS[shown.size])
    colour = chance.choice(COLOUR_WORDS[shown.colour]) if shown.colour else ""
    adjectives = [adjective for adjective in (size, "" if after else mood, colour) if adjective]
    if shown.count > 1:
        return " ".join([chance.choice(NUMBERS[shown.count]), *adjectives, plural(word)]) + (
            f", {after}," if after else ""
        )
    phrase = " ".join([*adjectives, word])
    if word in PROPER and not adjectives:
        return word.title() + (f", {after}," if after else "")
    if definite or word in ("sun", "moon", "full moon"):
        phrase = f"the {phrase}"
    elif (
        shown.thing in UNCOUNTED
        or word in ALREADY_PLURAL
        or (word.endswith("s") and word[:-1] in THINGS)
    ):
        phrase = f"some {phrase}"
    else:
        phrase = with_article(phrase)
    return f"{phrase}, {after}," if after else phrase


def listed(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def where(scene: Scene, chance: random.Random) -> str:
    """The place; where the hero is at home, sometimes nothing."""
    if scene.place == THINGS[scene.shown[0].thing].home and chance.random() < 0.4:
        return ""
    return chance.choice(PLACE_WORDS[scene.place])


def when(scene: Scene, chance: random.Random) -> tuple[str, str]:
    """Words for time and weather; noon and a clear sky mostly go without saying."""
    time = weather = ""
    if scene.place in places.HAS_TIME and (scene.time != "noon" or chance.random() < 0.2):
        time = chance.choice(TIME_WORDS[scene.time])
    if scene.place in places.HAS_WEATHER and (scene.weather != "clear" or chance.random() < 0.15):
        weather = chance.choice(WEATHER_WORDS[scene.weather])
    return time, weather


def deed(scene: Scene, chance: random.Random, definite: bool, finite: bool) -> str:
    """The things and what they do: "a fox rides a bike"; not finite: "a fox riding a bike"."""
    shown, fair = scene.shown, []
    elsewhere = tuple(one.thing for one in shown[-2:]) == FAIRGROUND and scene.place != "fair"
    if elsewhere and chance.random() < 0.8:  # other scenes' captions take no draw for it
        shown, fair = shown[:-2], [with_article(chance.choice(FAIRS))]
    phrases = [noun_phrase(one, chance, definite and i == 0) for i, one in enumerate(shown)] + fair
    if scene.relation == "gives":
        first = chance.choice(GIVE_WORDS if finite else GIVE_PARTICIPLES).format(
            a=phrases[0], b=phrases[1], c=phrases[2]
        )
        return listed([first, *phrases[3:]])
    if scene.relation:
        verb = chance.choice((RELATION_WORDS if finite else PARTICIPLES)[scene.relation])
        first = f"{phrases[0]} {verb} {phrases[1]}"
        return f"{first}, beside {listed(phrases[2:])}" if phrases[2:] else first
    return listed(phrases)


SENTENCES = (
    "{open} {deed} waited {where} {weather}.", "{open} {deed} lived {where} {weather}.",
        "{open} there was {deed} {where} {weather}.", "{where}, there was {deed} {time} {weather}.",
    "{name} saw {deed} {where} {time} {weather}.", "{open} {name} met {deed} {where} {weather}.",
        "{time} {weather} {deed} could be seen {where}.",
    "Look, {deed} {where} {time} {weather}!", "Have you ever seen {deed} {where} {time} {weather}?",
)  # fmt: skip
DEED_SENTENCES = (
    "{open} {deed} {where} {weather}.",
    "{deed} {where} {time} {weather}.",
    "{where}, {deed} {time} {weather}.",
    "Look, {deed} {where} {time} {weather}!",
)
PROMPTS = (
    "{deed} {where} {time} {weather}", "a picture of {deed} {where} {time} {weather}",
        "a story about {deed} {where} {time} {weather}",
    "tell me a story about {deed} {where} {time} {weather}",
        "please draw {deed} {where} {time} {weather}", "{deed}, {where} {time} {weather}",
    "write a bedtime story with {deed} {where} {time} {weather}",
)  # fmt: skip
FINITE = (
    "{open} {deed}",
    "{where}, {deed}",
    "{deed} {where} {time} {weather}.",
    "Look",
    "How",
)  # templates with a verb
TITLES = (
    "{deed} {where}",
    "The story of {deed} {where}",
    "{deed} {where} {time}",
    "{deed}: a tale {where} {time}",
)
# What shows nothing: how stories begin, go on and end.
BEFORE = (
    "Once upon a time something wonderful happened.", "It was not an ordinary day at all.",
        "Nobody knew what would happen next.",
    "Everyone was talking about it.", "This is how it all began.",
        "{name} could hardly believe it.", "\"What shall we do today?\" asked {name}.",
    "There was a long silence.", "It had all started with a little wish.",
        "{name} was very curious.", "At last the waiting was over.",
    "\"I have an idea,\" said {name}.", "For a long time nothing happened.",
        "Suddenly {name} stopped and looked.",
)  # fmt: skip
AFTER = (
    "What a day it was!", "And so they went on.", "\"How wonderful!\" cried {name}.",
        "Nobody would ever forget it.", "It felt like a dream.",
    "What would happen now?", "{name} did not know what to say.",
        "And that was only the beginning.",
)  # fmt: skip


def opening(scene: Scene, time: str, chance: random.Random) -> str:
    """How a sentence begins; it says the time if there is one to say."""
    if time:
        plain = {"morning": "morning", "noon": "noon", "evening": "evening", "night": "night"}[
            scene.time
        ]
        choices = (
            [f"{time},"]
            if plain == "noon"
            else [f"One {plain},", f"{time},", f"That {plain},", f"It was {plain}, and"]
        )
        return chance.choice(choices)
    return chance.choice(
        ("Once upon a time", "One day,", "Then", "", "Far away,", "That day,", "Long ago,")
    )


def tidy(text: str) -> str:
    """Spaces, commas and capitals put right."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"\s+([.,!?:])", r"\1", text)
    text = re.sub(r",+([.!?:,])", r"\1", text).strip(" ,")
    return re.sub(
        r"(^|[.!?]\"? )(\"?[a-z])", lambda match: match.group(1) + match.group(2).upper(), text
    )


def sentence(scene: Scene, templates: tuple[str, ...], chance: random.Random, name: str) -> str:
    time, weather = when(scene, chance)
    template = chance.choice(templates)
    parts = dict(
        where=where(scene, chance),
        weather=weather,
        name=name,
        time=time,
        open=opening(scene, time, chance),
    )
    finite = template.startswith(FINITE)
    return tidy(template.format(deed=deed(scene, chance, chance.random() < 0.25, finite), **parts))


def caption(scene: Scene, chance: random.Random) -> str:
    """A text that names what the scene shows: a prompt, title, sentence, or story up to it."""
    name, way = chance.choice(NAMES), chance.random()
    if way < 0.35:
        text = sentence(scene, PROMPTS, chance, name)
        return text if chance.random() < 0.5 else text[0].lower() + text[1:]
    if way < 0.45:
        time, weather = when(scene, chance)
        return sentence(scene, TITLES if not (time or weather) else PROMPTS[:1], chance, name)
    told = sentence(scene, DEED_SENTENCES if scene.relation else SENTENCES, chance, name)
    if way < 0.7:
        return told
    before = [chance.choice(BEFORE).format(name=name) for _ in range(chance.randint(0, 2))]
    after = [chance.choice(AFTER).format(name=name) for _ in range(chance.randint(0, 1))]
    return " ".join([*before, told, *after])


# --------------------------------------------------------------------------------------------------
# 3. What a text names.
# --------------------------------------------------------------------------------------------------

DETERMINER_WORDS = """
a an the his her my your their our its this that these those some two three four five many no
every each another one any few of with little small big old new long tiny huge giant
"""
DETERMINERS = set(DETERMINER_WORDS.split()) | set(COLOURS) | {"golden", "gray"}
DETERMINERS |= {word for words in (*MOOD_WORDS.values(), *SIZE_WORDS.values()) for word in words}
# As often verbs, adverbs or adjectives as things: without a determiner they show nothing.
VERB_WORDS = """
fly flies bear bears duck ducks saw saws well watch watches swing swings slide slides cook cooks
plant plants rose ring rings drum drums fan fans net nets nail nails rock rocks ship ships train
trains park box boxes cart clean cross light lights fire fires ice pan pans star stars shell ball
crane cranes bat bats bark lock locks map maps mask masks match open orange pepper pot ruler shelf
sign signs sled sleigh spring stick sweet swallow top wave present presents letter can fork forks
cage cap caps comb combs fence guard guards knight hammer hammers paint paints plane play pear
picture pictures root skates skis surprise thread tie web wish bark hole fool chest chip chief book
books bottle brush bowl bee sole drink drinks cut cap pipe plaster log bow shower mat tool post
does home bloom blooms whistle whistles mail
"""
VERBS_TOO = frozenset(VERB_WORDS.split())

# word -> the senses, each with words that ask for it; the first is the one without any of them.
SENSES = {
    "crane": (("crane", ()), ("", ("builder", "building", "construction", "lifts", "lifted",
        "machine", "site"))),
    "cranes": (("crane", ()), ("", ("builder", "building", "construction", "lifts", "lifted",
        "machine", "site"))),
    "bat": (("bat", ()), ("baseball bat", ("baseball", "cricket", "ball", "hit", "swung", "team"))),
    "mouse": (("mouse", ()), ("", ("computer", "click", "clicked", "keyboard"))),
    "ball": (("ball", ()), ("", ("prince", "dance", "danced", "gown", "palace"))),
    "bow": (("bow and arrow", ()), ("ribbon", ("hair", "ribbon", "pink", "tied"))),
    "chest": (("treasure chest", ()), ("", ("heart", "breath", "pain"))),
    "glasses": (("glasses", ()), ("milk", ("milk", "drank"))),
    "horn": (("trumpet", ()), ("", ("unicorn", "rhino", "rhinoceros", "goat", "head"))),
    "kite": (("kite", ()), ("eagle", ("wings", "feathers", "nest", "beak"))),
    "nail": (("nail", ()), ("", ("finger", "toe", "paint"))),
    "plane": (("plane", ()),),
    "seal": (("seal", ()), ("", ("envelope", "letter", "wax"))),
    "star": (("star", ()), ("", ("movie", "film", "pop", "famous"))),
    "trunk": (("", ()),),
    "palm": (("palm tree", ()), ("", ("hand", "his", "her", "my"))),
    "orange": (("orange", ()),),
    "watch": (("watch", ()),),
    "school": (("school", ()),),
    "fish": (("fish", ()),),
}  # fmt: skip
FIGURATIVE = (
    "picture of",
    "story of",
    "magic of",
    "heart of",
    "in love",
    "by heart",
    "of course",
    "at last",
    "as well",
    "ice cold",
    "sea air",
    "home alone",
    *(
        f"{whose} {heart}"
        for whose in ("his", "her", "their", "my", "your")
        for heart in ("heart", "hearts")
    ),
)


@dataclass(frozen=True)
class Named:
    """What a text names."""

    things: tuple[str, ...]  # in the order of the text
    place: str | None = None
    time: str | None = None
    weather: str | None = None
    colours: tuple[tuple[str, str], ...] = ()  # (thing, colour)
    moods: tuple[tuple[str, str], ...] = ()
    relation: str = ""


@cache
def vocabulary() -> dict[tuple[str, ...], str]:
    """Words (tuples; singular and plural) -> the thing that they name; exact names win."""
    table: dict[tuple[str, ...], str] = {}
    for column in ("near", "words"):
        for name, thing in THINGS.items():
            for word in getattr(thing, column):
                for form in (plural(word), word):
                    table[tuple(tokens_of(form))] = name
    for name in THINGS:
        table[tuple(tokens_of(name))] = name
    return table


@cache
def phrases() -> dict[str, dict[str, list[str]]]:
    """What names places, times and weathers, longest first."""
    tables = {"place": PLACE_WORDS, "time": TIME_WORDS, "weather": WEATHER_WORDS}
    out = {key: {v: list(words) for v, words in table.items()} for key, table in tables.items()}
    for time in TIME_WORDS:
        if time != "noon":
            out["time"][time] += [
                time,
                *(f"{start} {time}" for start in ("one", "that", "it was", "this")),
            ]
    for weather, word in WEATHER_OF.items():
        out["weather"][weather] += [word]
    return out


def tokens_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:['-][a-z]+)*", text.lower().replace("\u2019", "'"))


def masked(text: str, phrase: str) -> tuple[str, bool]:
    """The text without a phrase, and whether it was there."""
    out, count = re.subn(rf"\b{re.escape(phrase)}\b", " , ", text)
    return out, count > 0


def take(text: str, key: str) -> tuple[str, str | None]:
    """The text without its words for place, time or weather, and the first that it names."""
    pairs = sorted(
        ((phrase, value) for value, words in phrases()[key].items() for phrase in words),
        key=lambda p: -len(p[0]),
    )
    found = []
    for phrase, value in pairs:
        position = re.search(rf"\b{re.escape(phrase)}\b", text)
        if position:
            found.append((position.start(), value))
            text, _ = masked(text, phrase)
    return text, min(found)[1] if found else None


def sense_of(word: str, thing: str, before: str, around: set[str]) -> str:
    """The thing that a word means here, or "" if it means none."""
    if word in VERBS_TOO and before not in DETERMINERS:
        return ""
    for meaning, cues in reversed(SENSES.get(word, ())):
        if not cues or around & set(cues):
            return meaning
    return thing


def things_in(tokens: list[str]) -> list[tuple[int, str]]:
    """(position, thing) of everything that is named, longest names first at each position."""
    table, found, i = vocabulary(), [], 0
    around = set(tokens)
    while i < len(tokens):
        for length in (4, 3, 2, 1):
            words = tuple(tokens[i : i + length])
            singular = words[:-1] + (words[-1].removesuffix("'s"),) if words else words
            thing = table.get(words) or table.get(singular)
            if len(words) == length and thing:
                if length == 1:
                    after = [tuple(tokens[i + 1 : i + 1 + n]) in table for n in (1, 2, 3)]
                    adjective = words[0] in (*COLOURS, "toy") and any(after)
                    thing = (
                        ""
                        if adjective
                        else sense_of(singular[0], thing, tokens[i - 1] if i else "", around)
                    )
                if thing:
                    found.append((i, thing))
                    i += length - 1
                break
        i += 1
    return found


def relation_in(text: str) -> str:
    """The relation that the text's verbs name."""
    for relation, verbs in RELATION_WORDS.items():
        if any(re.search(rf"\b{verb}\b", text) for verb in (*verbs, *RELATION_STEMS[relation])):
            return relation
    return (
        "gives"
        if re.search(
            r"\b(giving|sharing|gives?|gave|giving|brings?|brought|shares?|shared)\b", text
        )
        else ""
    )


RELATION_STEMS = {
    "holds": ("holding", "held", "carrying", "carried"),
    "rides": ("riding", "ride"),
    "flies over": (
        "flying over",
        "gliding over",
        "fly over",
        "flew over",
        "flies above",
        "flying above",
    ),
    "sits in": ("sitting in", "hiding in", "sit in", "sits on", "sitting on", "sat on"),
}


def adjectives_before(
    tokens: list[str], position: int, table: dict[str, tuple[str, ...]]
) -> str | None:
    """The value whose word stands among the three tokens before a thing, or right after it."""
    near = tokens[max(0, position - 3) : position]
    for value, words in table.items():
        if any(word in near for word in words):
            return value
    return None


def scene_of(text: str) -> Named:
    """What a text names, as far as the painter can show it."""
    rest = text.lower().replace("\u2019", "'")
    for phrase in FIGURATIVE:
        rest, _ = masked(rest, phrase)
    relation = relation_in(rest)
    rest, weather = take(rest, "weather")
    rest, time = take(rest, "time")
    rest, place = take(rest, "place")
    tokens = tokens_of(rest)
    found = things_in(tokens)
    colours, moods = [], []
    for number, (position, thing) in enumerate(found):
        since = found[number - 1][0] + 1 if number else 0
        near = tokens[since:position]
        colour = adjectives_before(near, len(near), COLOUR_WORDS)
        mood = adjectives_before(near, len(near), MOOD_WORDS)
        follows = tokens[position + len(thing.split()) : position + len(thing.split()) + 1]
        mood = mood or next(
            (
                value
                for value, words in MOOD_WORDS.items()
                if follows and follows[0] in words and follows[0] in AFTER_NOUN
            ),
            None,
        )
        colours += [(thing, colour)] if colour else []
        moods += [(thing, mood)] if mood else []
    names = tuple(dict.fromkeys(thing for _, thing in found))
    fair = re.search(rf"\b({'|'.join(FAIRS)})\b", rest)  # it stands in the place that is named
    if fair and place:
        names += FAIRGROUND
    place = place or ("fair" if fair else bare_place(tokens, found))
    weather = weather or bare_weather(tokens, found)
    return Named(
        names,
        place,
        time,
        weather,
        tuple(dict(colours).items()),
        tuple(dict(moods).items()),
        relation,
    )


def scene_named(named: Named, seed: int = 0, most: int = 3) -> Scene:
    """A scene that shows what a text names, its first `most` things; where it names no place, the
    first is at home. Raises ValueError where it names no thing.
    """
    if not named.things:
        raise ValueError("a scene needs a thing to show, and this text names none")
    colours, moods = dict(named.colours), dict(named.moods)
    shown = tuple(
        Shown(name, colours.get(name), moods.get(name) if THINGS[name].is_being else None)
        for name in named.things[:most]
    )
    place = named.place or THINGS[named.things[0]].home or "meadow"
    time = named.time if place in places.HAS_TIME else None
    weather = named.weather if place in places.HAS_WEATHER else None
    return Scene(shown, place, time or "noon", weather or "clear", seed=seed)


PLACE_NOUNS = {"ocean": "sea", "forest": "forest", "jungle": "jungle", "desert": "desert",
    "city": "city", "garden": "garden",
               "beach": "beach", "sea": "sea", "mountain": "mountain", "village": "village",
                   "town": "village", "farm": "farm",
               "river": "river", "lake": "lake", "pond": "lake", "kitchen": "kitchen",
                   "bedroom": "bedroom", "library": "library",
               "cave": "cave", "island": "island", "volcano": "volcano", "market": "market",
                   "playground": "playground",
               "park": "playground", "space": "space", "swamp": "swamp", "street": "street",
                   "woods": "forest", "field": "meadow",
               "meadow": "meadow", "snow": "snow", "mars": "moon", "moon": "moon",
                   "school": "school", "hill": "meadow", "fields": "meadow", "stream": "river",
               "brook": "river", "pool": "lake", "cliff": "mountain", "ranch": "farm",
               "road": "street", "zoo": "jungle", "backyard": "garden", "yard": "garden",
               "shore": "beach", "valley": "mountain", "wood": "forest",
               "room": "living room"}  # fmt: skip
WEATHER_NOUNS = {"rain": "rainy", "storm": "rainy", "raining": "rainy", "snowing": "snowy"}
FAIRS = ("disney park", "theme park", "amusement park", "disneyland", "funfair")
PREPOSITIONS = (
    "in",
    "on",
    "at",
    "by",
    "to",
    "into",
    "across",
    "through",
    "near",
    "under",
    "along",
    "from",
    "over",
    "a",
    "the",
)


def bare_place(tokens: list[str], found: list[tuple[int, str]]) -> str | None:
    """A place named by its noun alone: "crosses the ocean"."""
    taken = {position for position, _ in found}
    for i, token in enumerate(tokens):
        leads = tokens[max(0, i - 3) : i]  # "across the wide ocean"
        if token in PLACE_NOUNS and i not in taken and any(word in PREPOSITIONS for word in leads):
            return PLACE_NOUNS[token]
    return None


def bare_weather(tokens: list[str], found: list[tuple[int, str]]) -> str | None:
    """A weather named by its noun alone: "The rain would not stop"."""
    taken = {position for position, _ in found}
    free = (token for i, token in enumerate(tokens) if i not in taken)
    return next((WEATHER_NOUNS[token] for token in free if token in WEATHER_NOUNS), None)
