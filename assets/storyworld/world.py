"""The storyworld: an endless supply of illustrated eight-beat children's stories with known factors.

    story = write_story(7)          # same seed, same text: story.prompt, story.beats, story.factors, story.nats
    picture = draw_panel(story, 0)  # the picture of the first beat; same story and beat, same bytes

Part one writes. A story is a set of uniform factors (FACTORS; the helper is never of the hero's species) and a choice
of wording for each of the eight BEATS. Every choice is counted, so `Story.nats` is the exact -log probability of the
derivation, and by that an upper bound of the text's own -log probability: a yardstick for a language model. Its tables
hold templates: `{slot}` is replaced by a factor or by a phrase that depends on one (PHRASES), `[a|b|c]` by one of its
parts (brackets do not nest, but a slot's phrase may have its own). "a" becomes "an" and sentences get their capital
after expansion, so templates need neither. To add a wording, add a line to a table.

Part two draws flat picture-book panels from tables of shapes. A shape is a row `(kind, role, *geometry)`. Kinds are
listed in KINDS; a plural kind ("ovals") draws the shape and its mirror image about x = 0. A role is the name of a
colour: an entry of INKS, or one derived from a character's or a place's own colours ("main", "dark", "leaf", ...).
Characters, props and scenery stand on (0, 0) and are about one unit high, y pointing down: a character reaches from
y = -1 to y = 0. Objects are centred on (0, 0). To add an animal, add its rows to ANIMALS and its face to FACES. What
the seed varies moves by 1/16 of the picture among few choices, so that a small network can learn it.

Contents: 1 Factors     2 Phrases         3 Openings    4 Beats                5 Grammar
          6 Colours     7 Interpreter     8 Characters  9 Objects and props   10 Backdrops   11 Panels
"""

import functools
import math
import random
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

# --------------------------------------------------------------------------------------------------
# 1. Factors. The order of the values is the class index everywhere.
# --------------------------------------------------------------------------------------------------

HE = (
    "Pip",
    "Milo",
    "Oscar",
    "Finn",
    "Hugo",
    "Leo",
    "Toby",
    "Max",
    "Otto",
    "Jasper",
    "Felix",
    "Sam",
)
SHE = (
    "Luna",
    "Nora",
    "Ruby",
    "Hazel",
    "Wren",
    "Ivy",
    "Daisy",
    "Mia",
    "Clara",
    "Zoe",
    "Poppy",
    "Tilly",
)
NAMES = dict.fromkeys(HE, "he") | dict.fromkeys(SHE, "she")
COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 134, 36),
    "yellow": (246, 208, 58),
    "blue": (58, 118, 220),
    "purple": (138, 74, 190),
    "pink": (244, 138, 178),
    "white": (246, 246, 242),
    "brown": (134, 86, 50),
}
SPECIES = ("fox", "rabbit", "bear", "cat", "mouse", "frog", "owl", "turtle")
# A helper wears its species' own colour, which no text mentions.
NATURAL = dict(
    zip(SPECIES, ("orange", "white", "brown", "yellow", "pink", "blue", "purple", "red"))
)

FACTORS = {
    "species": SPECIES,
    "colour": tuple(COLOURS),
    "place": ("forest", "beach", "mountain", "village", "meadow", "desert"),
    "time": ("morning", "noon", "evening", "night"),
    "weather": ("clear", "cloudy", "rainy", "snowy"),
    "object": ("kite", "lantern", "key", "star", "flower", "book", "apple", "balloon"),
    "problem": ("lost", "river", "storm", "scared", "stuck", "tired"),
    "helper": SPECIES,
    "ending": ("feast", "song", "sleep", "gift", "dance", "campfire"),
    "name": tuple(NAMES),
    "trait": (
        "shy",
        "brave",
        "curious",
        "kind",
        "clever",
        "gentle",
        "cheerful",
        "quiet",
        "playful",
        "patient",
        "proud",
        "dreamy",
    ),
}
BEATS = ("opening", "wish", "problem", "despair", "helper", "way out", "thanks", "ending")

# --------------------------------------------------------------------------------------------------
# 2. Phrases that follow from a factor: slot -> (factor, {value: template}).
# --------------------------------------------------------------------------------------------------

PRONOUNS = {
    "he": {"he": "he", "him": "him", "his": "his"},
    "she": {"he": "she", "him": "her", "his": "her"},
}

# The one adjective that the object keeps through a story.
FINE = {
    "kite": ("big", "bright", "paper"),
    "lantern": ("bright", "brass", "little"),
    "key": ("golden", "silver", "tiny"),
    "star": ("shining", "tiny", "silver"),
    "flower": ("tiny", "wild", "pretty"),
    "book": ("old", "big", "picture"),
    "apple": ("crisp", "golden", "juicy"),
    "balloon": ("big", "shiny", "round"),
}

WHEN = {
    "morning": "[one|early one|on a] {weather} {time}",
    "noon": "[at {time} on a {weather} day|at {time} one {weather} day]",
    "evening": "[one|late one|on a] {weather} {time}",
    "night": "[one|late one|on a] {weather} {time}",
}
THAT_WHEN = {
    "morning": "[that|on that] {weather} {time}",
    "noon": "at {time} [that|on that] {weather} day",
    "evening": "[that|on that] {weather} {time}",
    "night": "[that|on that] {weather} {time}",
}
MOMENT = dict.fromkeys(FACTORS["time"], "a {weather} {time}") | {
    "noon": "{time} on a {weather} day"
}
IN_PLACE = dict.fromkeys(FACTORS["place"], "in the {place}") | {
    "beach": "on the {place}",
    "mountain": "on the {place}",
}
SKY = {
    "clear": "[the sky was clear and wide|not one cloud was in the sky|the air was clear and still]",
    "cloudy": "[clouds hung low over the {place}|thick clouds filled the sky|clouds drifted over the {place}]",
    "rainy": "[rain was falling|rain tapped on every leaf and stone|the rain made little puddles]",
    "snowy": "[snow lay all around|snow crunched under {his} feet|soft snow was falling]",
}

USE = {
    "kite": "[that could dance in the wind|to fly above the {place}|with a long, curly tail]",
    "lantern": "[to light the way home|with a warm little flame|to hang beside the door]",
    "key": "[that opened a secret door|for a small locked box|to open the treasure chest]",
    "star": "[to keep beside {his} bed|that had fallen from the sky|to hold close and warm]",
    "flower": "[that smelled like honey|to put by the window|with petals as soft as silk]",
    "book": "[full of strange tales|about faraway lands|to read again and again]",
    "apple": "[as sweet as honey|to share with a friend|from the very top of a tree]",
    "balloon": "[that could float up high|on a long string|to float above the {place}]",
}
FOUND = {
    "kite": "[caught on a bush|fluttering beside a rock|with its string wound round a post]",
    "lantern": "[glowing on a flat rock|hanging from a branch|shining beside the path]",
    "key": "[lying under a stone|hanging from a nail|half buried in the ground]",
    "star": "[twinkling on the ground|glowing between two rocks|resting in a small hollow]",
    "flower": "[blooming beside the path|nodding between two stones|standing all alone]",
    "book": "[lying open on a flat rock|tucked under a bench|waiting in a dry box]",
    "apple": "[hanging from a little tree|lying in a basket|under a small, bent tree]",
    "balloon": "[swaying in the air|caught on a bush|floating beside a tall rock]",
}
DELIGHT = {
    "kite": "the {object} [danced on the wind|tugged at its string|swooped over their heads]",
    "lantern": "the {object} glowed [warm and bright|like a small sun|on their happy faces]",
    "key": "the {object} [gleamed like treasure|shone in the light|jingled on a ribbon]",
    "star": "the {object} [twinkled softly|glowed like a tiny lamp|winked as if it knew]",
    "flower": "the {object} smelled [like honey|sweet and fresh|of warm days]",
    "book": "the {object} was full of [wonders|pictures|tales to share]",
    "apple": "the {object} [smelled wonderful|shone like a jewel|was big enough for two]",
    "balloon": "the {object} bobbed [on its string|up and down|above their heads]",
}

TOO_WIDE = dict.fromkeys(SPECIES, "too wide to jump") | {
    "owl": "too wide for small wings",
    "frog": "too fast for a small swimmer",
    "turtle": "too fast for a small swimmer",
}
TROUBLE = {
    "lost": "[the path split in two and {he} took the wrong way|all the paths looked the same and {he} was lost"
    "|{he} turned left, then right, and lost {his} way|the path faded away and {he} was quite lost"
    "|after so many turns {he} was completely lost|{he} missed a turn and could not tell where home was]",
    "river": "[a wide river ran across the path, {too_wide}|{he} came to a river, cold and deep and {too_wide}"
    "|a fast river blocked the way, with no bridge in sight|the path ended at a river, {too_wide}"
    "|a roaring river lay ahead and the old bridge was gone|there was a river, and not one boat to cross it]",
    "storm": "[a great storm came roaring over the {place}|the wind began to howl and a storm broke"
    "|a wild storm blew in and bent every bush|a storm rushed in and nearly blew {him} over"
    "|dark storm clouds raced in and the wind screamed|a sudden storm came, with wind that pushed {him} back]",
    "scared": "[a strange noise came from the shadows and {he} froze|something rustled, and {he} was too scared to move"
    "|a low howl made {him} shake with fear|a tall shadow moved and {he} hid behind a rock"
    "|a creaking sound made {him} stop, scared and still|two eyes seemed to blink in the shadows]",
    "stuck": "[{he} slipped into a narrow hole and got stuck|the ground gave way and {he} was stuck in a hole"
    "|{his} foot slid, and down {he} went into a tight hole|{he} tumbled into a hole and could not get out"
    "|a hidden hole caught {him} and held {him} fast|{he} stepped back, straight into a hole, and was stuck]",
    "tired": "[the road was so long that {he} could not take another step|{his} legs grew heavy and {he} had to stop"
    "|{he} became too tired to go on|the path went up and up until {he} was worn out"
    "|{he} had walked so far that {his} feet ached|{his} eyes began to close and {his} feet dragged]",
}
WORRY = {
    "lost": "[I will never find my way home|I do not know where I am|Every path looks the same to me]",
    "river": "[I can never get across|The water is too strong for me|There is no way over]",
    "storm": "[The wind is too strong for me|This storm will blow me away|I have nowhere to hide]",
    "scared": "[Something is hiding out there|I am too scared to go on|I wish I were not so afraid]",
    "stuck": "[I cannot get out|I will be stuck here forever|This hole is much too tight]",
    "tired": "[I cannot walk any more|My legs are too heavy|I only want to lie down]",
}
PLIGHT = {
    "lost": "[every way looked wrong|nothing looked like home|no path seemed right]",
    "river": "[the water rushed by|the far side was so far away|the cold water would not slow down]",
    "storm": "[the wind howled louder|the storm shook every bush|the wind would not stop]",
    "scared": "[the shadows seemed to creep closer|the strange sound came again|{his} heart went thump, thump, thump]",
    "stuck": "[the hole would not let go|no wriggle would help|the sides were too steep]",
    "tired": "[{his} feet hurt|there was still so far to go|{his} legs would not move]",
}
AFTER = {
    "lost": "[The path led straight to|At the end of the right path was|Round the last turn was]",
    "river": "[On the far side was|Safe across, {name} found|Over on the other bank was]",
    "storm": "[When the storm had passed, there was|After the wind grew still, {name} saw|Once it was calm, they found]",
    "scared": "[Not scared any more, {name} found|And right behind the shadows was|Feeling brave, {name} went on and saw]",
    "stuck": "[Right beside the hole was|Dusty but glad, {name} saw|Up at the top, {name} found]",
    "tired": "[Full of new strength, {name} soon found|Only a few steps farther on was|Rested and glad, {name} soon saw]",
}

ARRIVE = {
    "fox": "[trotted up|came trotting by|slipped out from behind a bush]",
    "rabbit": "[hopped up|came hopping by|popped up with twitching ears]",
    "bear": "[came plodding by|lumbered up|came along with heavy steps]",
    "cat": "[padded up|came by on silent feet|strolled along]",
    "mouse": "[scurried up|came running by|peeped out from under a leaf]",
    "frog": "[hopped up|came by with a hop and a splash|leaped over a stone]",
    "owl": "[flew down|came gliding by|landed beside {him}]",
    "turtle": "[came slowly along|plodded up|came by, step by slow step]",
}
# The one adjective that the helper keeps through a story.
NICE = ("kind", "friendly", "gentle", "wise", "old", "merry")
# What the helper does about the problem; follows "the {helper}".
SKILL = {
    "lost": {
        "fox": "[sniffed out the right path|put nose to the ground and found the way]",
        "rabbit": "[hopped ahead along the right path|knew a secret path and hopped along it]",
        "bear": "[lifted {him} up high to see the way|led the way with big, sure steps]",
        "cat": "[climbed up high and saw the way|led the way without a sound]",
        "mouse": "[knew every tiny path and led the way|scurried ahead and showed the way]",
        "frog": "[hopped from stone to stone to show the way|leaped up high and saw the path]",
        "owl": "[flew up high and saw the way|circled above and called out the way]",
        "turtle": "[remembered the old path and led the way|knew the slow, safe way and showed it]",
    },
    "river": {
        "fox": "[pushed a fallen log across the water|knew a clever way over on dry stones]",
        "rabbit": "[showed {him} a line of stones to hop across|hopped over first, from stone to stone]",
        "bear": "[carried {him} safely across the water|laid a great log across the water]",
        "cat": "[found a narrow log and walked across with {him}|showed {him} how to balance on a log]",
        "mouse": "[pulled a tiny boat out of the reeds|knew where a little boat was hidden]",
        "frog": "[pushed {him} across on a wide leaf|swam ahead, pulling a raft of leaves]",
        "owl": "[stretched a rope from bank to bank|flew a rope across for {him} to hold]",
        "turtle": "[gave {him} a ride across on a round shell|swam {him} safely to the other side]",
    },
    "storm": {
        "fox": "[led {him} to a warm, dry den|dug a snug den out of the wind]",
        "rabbit": "[led {him} down into a snug burrow|showed {him} a burrow, dry and warm]",
        "bear": "[stood like a wall against the wind|hugged {him} close in warm, thick fur]",
        "cat": "[knew a dry corner out of the wind|curled around {him}, soft and warm]",
        "mouse": "[opened a tiny door into a dry hollow|showed {him} a dry crack in the rock]",
        "frog": "[held up a big leaf like an umbrella|made a little roof of broad leaves]",
        "owl": "[spread two wide wings over {him}|led {him} to a dry, hollow tree]",
        "turtle": "[shared a dry place under a rock|made a shelter with a strong, round shell]",
    },
    "scared": {
        "fox": "[crept ahead and found only the wind|looked behind the rock and laughed]",
        "rabbit": "[listened with long ears and heard only the wind|held {him} close and whispered a joke]",
        "bear": "[gave one big roar, and all was quiet|stood tall beside {him}, and nothing dared come near]",
        "cat": "[looked with bright eyes and saw only a bush|chased the shadow away with one paw]",
        "mouse": "[peeked into the shadows and found only a cricket|squeaked so bravely that {he} laughed]",
        "frog": "[sang a funny song until the shadows felt friendly|croaked back, and the noise stopped]",
        "owl": "[looked with big, round eyes and saw only a bush|flew over the shadows and found nothing there]",
        "turtle": "[walked slowly in front, not afraid at all|waited calmly beside {him} until the fear was gone]",
    },
    "stuck": {
        "fox": "[dug with quick paws until {he} was free|scratched the earth away until {he} wriggled out]",
        "rabbit": "[dug a little tunnel, and {he} wriggled free|dug and dug until {he} popped out]",
        "bear": "[pulled with strong arms until {he} popped out|reached in and lifted {him} right out]",
        "cat": "[let down a long tail and pulled {him} up|dropped a ball of wool and pulled {him} out]",
        "mouse": "[tied a string to a rock so {he} could climb|nibbled the earth away until {he} was free]",
        "frog": "[jumped in and pushed {him} up|made a ladder of long reeds]",
        "owl": "[lowered a long branch and pulled {him} out|lifted {him} out with strong wings]",
        "turtle": "[pushed slowly and steadily until {he} was free|stood still so {he} could climb out over the shell]",
    },
    "tired": {
        "fox": "[ran to fetch berries and cool water|made a soft bed of leaves to rest on]",
        "rabbit": "[shared a crunchy carrot and a rest|made a bed of soft grass for {him}]",
        "bear": "[carried {him} on big, strong shoulders|gave {him} honey and a long rest]",
        "cat": "[purred until {he} had napped a little|brought a bowl of warm milk]",
        "mouse": "[brought a crumb of cheese and sat with {him}|shared a tiny cake from a tiny bag]",
        "frog": "[brought cool water in a curled leaf|sang a low, slow tune while {he} rested]",
        "owl": "[kept watch while {he} took a nap|sang softly while {he} slept a little]",
        "turtle": "[let {him} ride on a round shell|showed {him} how to go slowly and rest]",
    },
}

PROBLEM_HINT = {
    "lost": "who [gets lost|loses the way]",
    "river": "who [must cross a river|comes to a river]",
    "storm": "[caught in a storm|who meets a storm]",
    "scared": "who [is scared of a noise|is afraid of shadows]",
    "stuck": "who [gets stuck|falls into a hole]",
    "tired": "who [grows very tired|is too tired to walk]",
}
ENDING_HINT = {
    "feast": "a [big|great] feast",
    "song": "a [happy|merry] song",
    "sleep": "a [long|good] sleep",
    "gift": "a [small|kind] gift",
    "dance": "a [merry|happy] dance",
    "campfire": "a [cosy|warm] campfire",
}
PARTY = {
    "feast": "[they shared a feast of warm bread and berries|they sat down to a feast of soup and honey cakes"
    "|all the neighbours came to a feast with pies|there was a feast, with pears and nuts for everyone"
    "|{name} and the {helper} cooked a feast together|they ate a feast until they could eat no more]",
    "song": "[they sang a song about the {object}|{name} made up a song and the {helper} hummed along"
    "|their happy song rang out over the {place}|they sang every song they knew, loud and clear"
    "|the {helper} taught {him} an old song|they sang a song with a hundred verses]",
    "sleep": "[they curled up side by side for a long sleep|{name} lay down to sleep, with the {object} close by"
    "|the two friends yawned and snuggled down to sleep|it was time for sleep under a soft blanket"
    "|the {helper} hummed a tune to help {name} sleep|they made a soft bed and lay down to sleep]",
    "gift": "[{name} gave the {helper} a gift tied with ribbon|{name} made a gift, a scarf for the {helper}"
    "|the {helper} opened a small gift and beamed|a little gift was waiting for the {helper}"
    "|{name} wrapped a gift and left it at the {helper}'s door|they gave each other a gift in a box]",
    "dance": "[they danced round and round until they were dizzy|{name} and the {helper} danced a silly dance"
    "|they danced across the {place}, hop, skip and twirl|all their friends came out to dance"
    "|the {helper} showed {him} a stamping dance|they joined hands and danced in a ring]",
    "campfire": "[they lit a campfire and told stories|they sat by a crackling campfire, warm and happy"
    "|the {helper} built a campfire and {name} fetched the wood|they toasted bread over a small campfire"
    "|a campfire crackled while the friends told jokes|they watched the sparks of a cosy campfire]",
}

PHRASES = {
    "when": ("time", WHEN),
    "that_when": ("time", THAT_WHEN),
    "moment": ("time", MOMENT),
    "in_place": ("place", IN_PLACE),
    "sky": ("weather", SKY),
    "use": ("object", USE),
    "found": ("object", FOUND),
    "delight": ("object", DELIGHT),
    "too_wide": ("species", TOO_WIDE),
    "trouble": ("problem", TROUBLE),
    "worry": ("problem", WORRY),
    "plight": ("problem", PLIGHT),
    "after": ("problem", AFTER),
    "arrive": ("helper", ARRIVE),
    "problem_hint": ("problem", PROBLEM_HINT),
    "ending_hint": ("ending", ENDING_HINT),
    "party": ("ending", PARTY),
}

# --------------------------------------------------------------------------------------------------
# 3. Openings: what a person might type. One without final punctuation gets a full stop.
# --------------------------------------------------------------------------------------------------

# group -> (weight, templates)
OPENINGS = {
    "hero and object": (
        40,
        (
            "a {trait} {colour} {species} looks for a [lost {object}|{fine_object}|{object}]",
            "the {colour} {species} and the {fine_object}",
            "the {species} and the [lost {object}|{fine_object}|{object}]",
            "a {colour} {species} wants a {object}",
            "[write|tell me] a story about a {species} who wants a {object}",
            "[write|tell] a [short|little] story about a {colour} {species} and a {object}",
            "a bedtime story about a {species} and a {object}, please",
            "a {colour} {species} dreams of a {fine_object}",
            "{name} the {species} looks for a {object}",
            "{name} the {colour} {species} wants a {object} [very much|more than anything]",
            "will the {colour} {species} find a {object}?",
            "how did the {colour} {species} find the {object}?",
            "can you write a story about a {colour} {species} and a {object}?",
            "once there was a {colour} {species} who wished for a {object}",
            "the {species} who wished for a {fine_object}",
            "a {colour} {species} goes out {in_place} to find a {object}",
            "[one|on a] {weather} day, a {colour} {species} went to look for a {object}",
            "it was {moment}, and a {colour} {species} was thinking of a {object}",
            "a story about a {trait} {species} and a {fine_object}",
            "I want a story with a {colour} {species} and a {object}",
            "there was a {trait} {species} who wanted only one thing: a {object}",
            "a {species}, a {object} and a {helper}",
        ),
    ),
    "hero": (
        30,
        (
            "tell me about a {colour} {species} {in_place}",
            "once upon a time there was a {colour} {species} named {name}",
            "once upon a time there was a {trait} {colour} {species}",
            "{name} the {colour} {species}",
            "{name} the {trait} {species}",
            "a {trait} {colour} {species} lives {in_place}",
            "can you tell me a story with a {colour} {species}?",
            "a story about {name}, a {trait} {colour} {species}",
            "the {trait} {species} of the {place}",
            "a {colour} {species} [called|named] {name} lived {in_place}",
            "the {colour} {species} {problem_hint}",
            "a {trait} {colour} {species} {problem_hint}",
            "tell me about a {species} {problem_hint}, please",
            "a little {colour} {species} [alone|out walking|awake] on a {weather} {time}",
            "what does a {colour} {species} do on a {weather} {time}?",
            "long ago, a {trait} {species} lived {in_place}",
            "the day of a {colour} {species}",
            "my favourite animal is a {colour} {species}",
            "a {species} has an adventure {in_place}",
            "please tell me a story about a {trait} {colour} {species}",
            "a {colour} {species}",
            "the adventures of {name} the {species}",
            "this is the story of a {colour} {species}, and how everything went wrong at first",
        ),
    ),
    "friend": (
        14,
        (
            "a {species} and a {helper} become friends",
            "the {colour} {species} and the {helper}",
            "a {colour} {species} [meets|is helped by] a kind {helper}",
            "how the {colour} {species} met a {helper}",
            "a story about a {colour} {species} who needs a friend",
            "{name} and the {trait} surprise, a tale of a {species} and a {helper}",
            "a {helper} helps a {colour} {species} find a {object}",
            "tell me about a {colour} {species} and a {helper} {in_place}",
        ),
    ),
    "scene": (
        11,
        (
            "{moment} {in_place}",
            "a story from the {place}",
            "once, {when}, a {colour} {species} came home to the {place}",
            "it was {moment} {in_place}",
            "tell me a story for a {weather} {time}",
            "what happened {in_place} {when}?",
            "an adventure {in_place}",
            "something is about to happen {in_place}!",
        ),
    ),
    "ending": (
        7,
        (
            "a {colour} {species} story that ends with {ending_hint}",
            "a tale of a {object} and {ending_hint}",
            "a {species} has a hard day, but it ends with {ending_hint}",
            "tell me a story with a {colour} {species} and {ending_hint} at the end",
        ),
    ),
    "name or object": (
        6,
        (
            "a story about {name}",
            "do you know the story of {name}?",
            "the [lost {object}|{fine_object}]",
            "who has seen the {fine_object}?",
            "tell me about a {fine_object}",
        ),
    ),
    "bare": (
        2,
        (
            "tell me a story",
            "tell me a fairy tale",
            "I cannot sleep, so please tell me a story",
            "a bedtime story",
        ),
    ),
}

# The sentence after the opening, by what the opening said of the hero. `{scene}` says when, and
# where if that is new.
INTRODUCTIONS = {
    "nothing": (
        "{scene}, a {trait} {colour} {species} named {name} [looked out and sighed|sat thinking|was wide awake].",
        "{name} was a {trait} {colour} {species}, and {scene} {he} was [out for a walk|all alone|full of dreams].",
        "a {colour} {species} called {name} lived nearby, and {scene} {he} [could not sit still|went outside].",
        "there was a {trait} {colour} {species}, {name}, who {scene} [sat by the door|began to daydream].",
        "{scene}, {name} the {colour} {species} [came outside|was up and about|sat on a stone].",
        "meet {name}, a {trait} {colour} {species} who {scene} [was feeling restless|had nothing to do].",
    ),
    "species": (
        "{name} was what they called the {colour} {species}, who was [all alone|out walking] {scene}.",
        "{scene}, the {colour} {species}, whose name was {name}, [sat thinking|looked out and sighed].",
        "{name} was the {colour} {species}'s name, and {scene} {he} [could not sit still|sat by the door].",
        "this {colour} {species}, called {name}, [went outside|was up and about] {scene}.",
        "this {trait} {colour} {species}, {name}, [came outside|had nothing to do] {scene}.",
        "{scene}, {name}, for that was the {colour} {species}'s name, [sat on a stone|was wide awake].",
        "{name}, as the {colour} {species} was called, was [up and about|all alone] {scene}.",
        "the {colour} {species}, {name}, [began to daydream|sat by the door|went outside] {scene}.",
        "{scene}, {name} (so the {colour} {species} was called) [came outside|sat on a stone].",
    ),
    "name": (
        "{name} was a {trait} {colour} {species}, and {scene} {he} [could not sit still|sat by the door].",
        "{scene}, {name} the {colour} {species} [came outside|was up and about|sat on a stone].",
        "{name} was {colour} from head to toe, a {trait} little {species}, and {scene} {he} sat thinking.",
        "{scene}, {name}, a {trait} {colour} {species}, [was wide awake|sat thinking|went outside].",
        "{name}, the {trait} {colour} {species}, was [all alone|full of dreams|out for a walk] {scene}.",
    ),
    "species and name": (
        "{scene}, {name} the {colour} {species} was [out for a walk|wide awake|up and about].",
        "{scene}, this {trait} {colour} {species} [sat thinking|looked out and sighed|went outside].",
        "the {colour} {species} was [all alone|full of dreams|feeling restless] {scene}.",
        "everyone knew the {trait} {colour} {species}, and {scene} {he} [came outside|had nothing to do].",
        "this {colour} {species} [sat thinking|was wide awake|looked out and sighed] {scene}.",
        "{scene}, the little {colour} {species} [could not sit still|sat by the door|began to daydream].",
    ),
}

# --------------------------------------------------------------------------------------------------
# 4. Beats 1 to 7.
# --------------------------------------------------------------------------------------------------

WISHES = (
    "{name} had [just one|only one|a secret] wish. More than anything, {he} wanted a {fine_object} {use}.",
    "{he} had heard of a {fine_object} {use}, and {he} could think of [nothing else|little else].",
    '"If only I had a {object}," said {name}. {he} [dreamed of|longed for] a {fine_object} {use}.',
    "[Every single day|For weeks|For a long time] {name} had dreamed of a {object} {use}. {he} wanted to find one.",
    '"I am going to find a {fine_object}," {name} said. {he} wanted one {use}.',
    "what {name} wanted most was a {object}, a {fine_object} {use}. {he} thought of it all the time.",
    "in {his} [head|dreams] {he} saw a {object}. It was a {fine_object} {use}, and {name} wanted it.",
    "{name} closed {his} eyes and wished for a {object} {use}. How [lovely|fine|happy] that would be!",
    '"Somewhere {in_place} there is a {object}," {name} thought. {he} wished for one {use}.',
    "{his} [grandmother|grandfather] had once told {him} of a {object} {use}, and now {name} wanted to find one.",
    "how {name} wished for a {object}! {he} could almost see it: a {fine_object} {use}.",
    "there was one thing {name} did not have: a {object}. {he} longed for a {fine_object} {use}.",
)

PROBLEMS = (
    "so {he} set off [to look for one|to find one], but [before long|after a while|on the way] {trouble}.",
    "{name} packed a small bag and [set out|set off|waved goodbye]. But [then|on the way] {trouble}.",
    "{he} looked [high and low|here and there|under every stone], [singing|humming] as {he} went. Then {trouble}.",
    "off went {name} along the [winding|stony|old] path, [humming a tune|step by step], until {trouble}.",
    "the search began well, and {name} [whistled|skipped along|felt brave]. But then {trouble}.",
    "{name} walked and walked, [hoping to find one|looking all around]. Then, [all at once|after a time], {trouble}.",
    "at first it was fun to [search|look for it]. {name} [whistled|skipped along]. But then {trouble}.",
    "{sky} as {name} set out to look. {he} had not [gone far|found a thing] when {trouble}.",
    "nobody at home had one, so {name} went out [to look|to search]. [On the way|Before long] {trouble}.",
    '"I will find it," {name} [said|told the wind], and off {he} went. But [then|before long] {trouble}.',
)

DESPAIRS = (
    '{name} [hung {his} head|began to cry|sighed a long sigh], for {plight}. "{worry}," {he} [said|sobbed|whispered].',
    '"{worry}," [said|whispered|sobbed] {name}. A [big|small|warm] tear rolled down {his} [cheek|nose], and {plight}.',
    "{he} called for help, but [nobody|no one] came, and {plight}. Poor {name} [felt very small|began to sob].",
    "even a {trait} {species} needs help sometimes. {plight}, and {name} felt [very small|so alone|close to tears].",
    '{name} tried [once, twice, three times|and tried again], but {plight}. "{worry}," {he} [cried|said sadly].',
    "{he} tried [to be brave|not to cry], but {plight}. {name} thought of the {object} and [wept|sniffled|sobbed].",
    'the {object} seemed [far away|like a dream] now. "{worry}," {name} [thought sadly|said in a tiny voice|sobbed].',
    '"Oh dear, oh dear," said {name}, for {plight}. "{worry}." And {he} [began to cry|hid {his} face].',
    "{name} felt [cold and small|sad and alone], and {plight}. Would {he} ever [see the {object}|get home again]?",
    "what could {name} do? {plight}, and [nobody was near|{he} was all alone]. [Two tears|A tear] fell to the ground.",
)

HELPERS = (
    'just then a {nice} {helper} {arrive}. "[Do not cry|Do not worry], {name}," said the {helper}. "I can help."',
    'a {nice} {helper} {arrive}. "What is the matter, little {species}?" [it asked|asked the {helper}] [kindly|softly].',
    '"Hello there!" said a [voice|cheerful voice]. It was a {nice} {helper}, who had heard {name} [calling|crying].',
    "but {name} was not alone. A {nice} {helper} {arrive} and [smiled at|sat down beside|listened to] {him}.",
    "then something [wonderful|lucky] happened. A {nice} {helper} {arrive} and asked how to help {name}.",
    'who was that? A {nice} {helper} {arrive}. "[Cheer up|Chin up]," said the {helper}, "two heads are better than one."',
    'luckily, a {nice} {helper} lived close by. It {arrive} and said, "[Let me help|You look sad], {name}."',
    '{name} looked up. A {nice} {helper} {arrive} and said, "[I know what to do|We can do this together]."',
    "at that very moment a {nice} {helper} {arrive}. {name} told the {helper} [everything|the whole story].",
    '"[Is someone there|May I help you]?" asked a {nice} {helper} as it {arrive}. {name} [nodded|looked up] and '
    "[sniffed|dried {his} eyes].",
)

WAYS_OUT = (
    "the {helper} {skill}. {after} a {fine_object}, {found}!",
    '"[Watch me|Come with me|Leave it to me]!" The {helper} {skill}. {after} the {object}!',
    "[without a word|quickly|at once], the {helper} {skill}. {after} a {fine_object}, {found}.",
    "the {helper} {skill}, and {name} [laughed|smiled again|felt much better]. {after} the {fine_object}!",
    '"[Like this|Ready]?" said the {helper}, who {skill}. {after} the {object}!',
    "the {helper} thought [a little|hard], then {skill}. {after} the {object}, {found}.",
    "[so|and so] the {helper} {skill}. It worked! {after} a {fine_object}.",
    "the {helper} had an idea. It {skill}. {after} the very {object} {he} wanted!",
    "together they did it: the {helper} {skill}. {after} a {fine_object}!",
    "[kindly|carefully|cheerfully], the {helper} {skill}. {after} the {object}, {found}.",
)

THANKS = (
    '"Thank you, [dear|kind|good] {helper}!" {name} [cried|laughed|said], holding the {object} tight. And {delight}!',
    "{name} [hugged|thanked] the {helper} and [laughed out loud|danced on the spot], and {delight}.",
    '{name} held the {object} [close|very carefully]. "[I could not have done it|I would still be there] without you," {he} told the {helper}.',
    '"Look!" {name} [whispered|said], for {delight}. {he} [gave the {helper} a hug|thanked the {helper} three times].',
    '{delight}, and {name} [beamed|could not stop smiling]. "Thank you, my friend," {he} told the {helper}.',
    'how happy {name} was! "Thank you," {he} said to the {helper}. "[We will share|You may share] the {object}."',
    "{name} thanked the {helper} [with all {his} heart|again and again]. They sat down together, and {delight}.",
    '"You are a [true|real|good] friend," {name} told the {helper}. [Side by side they smiled|They both laughed], and {delight}.',
    '{name} picked up the {object} and [spun around|gave a cheer]. "Thank you, {helper}," {he} said, "for [everything|being so kind]."',
    'the {helper} smiled, for {delight}. "It is [yours|all yours]," it said, and {name} gave [it|the {helper}] a [big|warm] hug.',
)

ENDINGS = (
    "[in the end|after that|later on], {party}. {name} and the {helper} were friends [for good|ever after].",
    "[then|at last] {party}. The {trait} little {species} had a {object} and a [new friend|true friend].",
    "[back home|when they got home], {party}. And the {object} was [never far away|always close by].",
    'to celebrate, {party}. "[What a day|What an adventure]!" said {name}, and the {helper} nodded.',
    "and so {party}. {name} [looked at the {object} and smiled|had never been so happy].",
    "that is how it ended: {party}. {sky}, and {name} [smiled at the {object}|laughed with the {helper}].",
    "[before they said goodbye|when all was well], {party}. {name} never forgot the {nice} {helper}.",
    "[then|after that] {party}, and the {object} [stayed beside them|was there too]. {name} was [happy|glad] at last.",
    "[soon|before long] {party}. It was the happiest day that {name} [had ever known|could remember].",
)

# beat -> templates, in the order of BEATS[1:]
LATER_BEATS = dict(zip(BEATS[1:], (WISHES, PROBLEMS, DESPAIRS, HELPERS, WAYS_OUT, THANKS, ENDINGS)))

# --------------------------------------------------------------------------------------------------
# 5. The grammar.
# --------------------------------------------------------------------------------------------------

ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\w+)\}")
# "a" in front of a vowel; no noun or adjective of the tables is an exception such as "hour" or
# "unicorn".
ARTICLE = re.compile(r"\b([Aa])(?= \"?[aeiou])")
# Not after a quoted "!" or "?", where the same sentence goes on: "Ready?" said the bear.
SENTENCE_START = re.compile(r"(?:^|[.!?] |\.\" )\"?[a-z]")
LOWER_CASE_PERCENT = 12


@dataclass(frozen=True)
class Story:
    """One story: its factors, the line that opens it, and the text of its eight beats (the first
    begins with `prompt`).

    `nats` is -log of the probability of all the choices made for factors and wordings.
    """

    seed: int
    factors: dict[str, str]
    prompt: str
    beats: tuple[str, ...]
    nats: float

    @property
    def text(self) -> str:
        return " ".join(self.beats)


class Chooser:
    """A seeded source of choices that adds up their -log probability in `nats`."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.nats = 0.0

    def pick(self, options):
        """One of the options, each as likely as the others."""
        self.nats += math.log(len(options))
        return options[int(self.rng.random() * len(options))]

    def pick_weighted(self, weights):
        """A key of `weights` (option -> weight), as likely as its share of the sum."""
        (option,) = self.rng.choices(list(weights), list(weights.values()))
        self.nats -= math.log(weights[option] / sum(weights.values()))
        return option


class Writer:
    """Expands templates for one set of factors and keeps in `said` which slots went into the text
    so far."""

    def __init__(self, chooser: Chooser, factors: dict[str, str]):
        self.chooser = chooser
        self.said: set[str] = set()
        self.slots = {slot: table[factors[factor]] for slot, (factor, table) in PHRASES.items()}
        self.slots["skill"] = SKILL[factors["problem"]][factors["helper"]]
        self.slots |= factors | PRONOUNS[NAMES[factors["name"]]]
        self.slots["fine_object"] = chooser.pick(FINE[factors["object"]]) + " {object}"
        self.slots["nice"] = chooser.pick(NICE)

    def expand(self, template: str) -> str:
        # Alternatives first: the slots of a part that was not chosen must not count as said, nor
        # cost nats.
        chosen = ALTERNATIVES.sub(lambda match: self.chooser.pick(match[1].split("|")), template)
        return SLOT.sub(self.fill, chosen)

    def fill(self, match: re.Match) -> str:
        self.said.add(match[1])
        return self.expand(self.slots[match[1]])

    def write(self, templates: tuple[str, ...]) -> str:
        """One of the templates as finished sentences."""
        text = ARTICLE.sub(r"\1n", self.expand(self.chooser.pick(templates)))
        return SENTENCE_START.sub(lambda match: match[0][:-1] + match[0][-1].upper(), text)


def sample_factors(chooser: Chooser) -> dict[str, str]:
    """Every factor uniform and independent, but for the helper, which is another species than the
    hero."""
    factors = {}
    for factor, values in FACTORS.items():
        if factor == "helper":
            values = tuple(value for value in values if value != factors["species"])
        factors[factor] = chooser.pick(values)
    return factors


def write_opening(writer: Writer) -> str:
    """The line that a person might have typed, with its final punctuation."""
    chooser = writer.chooser
    group = chooser.pick_weighted({group: weight for group, (weight, _) in OPENINGS.items()})
    opening = writer.write(OPENINGS[group][1])
    if chooser.pick_weighted({True: LOWER_CASE_PERCENT, False: 100 - LOWER_CASE_PERCENT}):
        opening = opening.lower()
    return opening if opening[-1] in ".?!:" else opening + "."


def write_introduction(writer: Writer) -> str:
    """Who the hero is, where and when: all that the opening left out, and the species and colour
    once more."""
    said = writer.said
    when = ("{when}", "{that_when}", "[{that_when}|just then]")[len(said & {"time", "weather"})]
    writer.slots["scene"] = when if "place" in said else when + " {in_place}"
    hero = " and ".join(slot for slot in ("species", "name") if slot in said) or "nothing"
    return writer.write(INTRODUCTIONS[hero])


def write_story(seed: int) -> Story:
    """The story of a seed: the same text for the same seed, on every machine."""
    chooser = Chooser(seed)
    factors = sample_factors(chooser)
    writer = Writer(chooser, factors)
    opening = write_opening(writer)
    beats = [f"{opening} {write_introduction(writer)}"]
    beats += [writer.write(templates) for templates in LATER_BEATS.values()]
    # People often leave out the full stop. The text is the same either way, so this choice costs no
    # nats.
    bare = opening.endswith(".") and chooser.rng.random() < 0.5
    return Story(seed, factors, opening[:-1] if bare else opening, tuple(beats), chooser.nats)


# --------------------------------------------------------------------------------------------------
# 6. Colours.
# --------------------------------------------------------------------------------------------------

Colour = tuple[int, int, int]
Inks = dict[str, Colour]

PLUM: Colour = (62, 36, 58)  # every shade and outline leans to it, never to pure black
CREAM: Colour = (255, 250, 238)
INKS: Inks = {
    "ink": (48, 34, 46), "edge": (84, 54, 70), "white": (255, 255, 255), "cream": CREAM, "blush": (250, 160, 170),
    "ear": (252, 188, 196), "mouth": (150, 44, 60), "tear": (110, 190, 250), "beak": (250, 170, 44),
    "gold": (252, 200, 50), "honey": (222, 156, 30), "glow": (255, 236, 160), "red": (226, 56, 62),
    "crimson": (176, 36, 54), "rose": (242, 100, 150), "teal": (44, 172, 170), "sky": (96, 170, 240),
    "navy": (52, 72, 150), "violet": (140, 84, 196), "green": (70, 160, 76), "wood": (150, 102, 66),
    "bark": (108, 72, 50), "water": (58, 136, 214), "foam": (170, 216, 248), "stone": (150, 150, 162),
    "slate": (112, 112, 128), "gloom": (66, 66, 92), "hollow": (36, 64, 54), "path": (232, 206, 160),
    "flame": (250, 130, 40),
}  # fmt: skip
UNLINED = {"ink", "glow", "blush", "tear"}  # roles that take no part in an outline


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """`a` with `share` (0 to 1) of it replaced by `b`."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b))


def shades(main: Colour) -> Inks:
    """The roles that follow from a character's own colour."""
    return {
        "main": main,
        "dark": mix(main, PLUM, 0.26),
        "deep": mix(main, PLUM, 0.46),
        "skin": mix(main, CREAM, 0.3),
        "light": mix(main, CREAM, 0.62),
        "edge": mix(main, PLUM, 0.68),
    }


# --------------------------------------------------------------------------------------------------
# 7. The interpreter.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spot:
    """Where a table goes: its origin and unit length in picture widths, flipped (-1) or not,
    leaning or not."""

    x: float
    y: float
    scale: float
    flip: int = 1
    lean: float = 0.0  # how far the top (y = -1) is pushed sideways


class Canvas:
    """A square RGB image in progress, `pixels` wide."""

    def __init__(self, image: Image.Image):
        self.image, self.pixels = image, image.width
        self.draw = ImageDraw.Draw(image)

    def paint(self, rows, spot: Spot, inks: Inks, outline: float = 0.0) -> None:
        """Draws the rows in order, over their common silhouette grown by `outline` (picture
        widths)."""
        passes = (outline, 0.0) if outline else (0.0,)
        for grow in passes:
            for kind, role, *geometry in rows:
                if grow and role in UNLINED:
                    continue
                colour = inks["edge" if grow else role]
                KINDS[kind.removesuffix("s")](self, spot, geometry, colour, grow * self.pixels)
                if kind.endswith("s"):
                    KINDS[kind[:-1]](self, spot, mirrored(geometry), colour, grow * self.pixels)

    def point(self, spot: Spot, x: float, y: float) -> tuple[float, float]:
        """A table's (x, y) in pixels."""
        across = spot.x + spot.flip * spot.scale * (x - spot.lean * y)
        return across * self.pixels, (spot.y + spot.scale * y) * self.pixels


def mirrored(geometry):
    """The geometry reflected about x = 0: of points, of a box (five numbers) or of an oval
    (four)."""
    if isinstance(geometry[-1], tuple):
        return [(-part[0], part[1]) if isinstance(part, tuple) else part for part in geometry]
    if len(geometry) == 5:
        left, top, right, bottom, radius = geometry
        return [-right, top, -left, bottom, radius]
    return [-geometry[0], *geometry[1:]]


def _oval_box(canvas, spot, geometry, grow):
    x, y, rx, ry = geometry
    (x, y), unit = canvas.point(spot, x, y), spot.scale * canvas.pixels
    rx, ry = rx * unit + grow, abs(ry) * unit + grow
    return [x - rx, y - ry, x + rx, y + ry]


def _oval(canvas, spot, geometry, colour, grow):
    """centre x, centre y, radius x, radius y"""
    canvas.draw.ellipse(_oval_box(canvas, spot, geometry, grow), fill=colour)


def _dome(canvas, spot, geometry, colour, grow):
    """The upper half of an oval, or with a negative radius y the lower half."""
    start = 180 if geometry[3] > 0 else 0
    canvas.draw.chord(_oval_box(canvas, spot, geometry, grow), start, start + 180, fill=colour)


def _poly(canvas, spot, geometry, colour, grow):
    """corner, corner, corner, ..."""
    corners = [canvas.point(spot, *corner) for corner in geometry]
    canvas.draw.polygon(corners, fill=colour)
    if grow:
        _stroke(canvas, [*corners, corners[0]], colour, 2 * grow)


def _blob(canvas, spot, geometry, colour, grow):
    """A polygon with its corners rounded off, each cut twice at a quarter of its sides
    (Chaikin)."""
    corners = geometry
    for _ in range(2):
        pairs = list(zip(corners, [*corners[1:], corners[0]]))
        corners = [
            (ax + (bx - ax) * t, ay + (by - ay) * t)
            for (ax, ay), (bx, by) in pairs
            for t in (0.25, 0.75)
        ]
    _poly(canvas, spot, corners, colour, grow)


def _box(canvas, spot, geometry, colour, grow):
    """left, top, right, bottom, corner radius"""
    left, top, right, bottom, radius = geometry
    (x0, y0), (x1, y1) = canvas.point(spot, left, top), canvas.point(spot, right, bottom)
    x0, x1 = min(x0, x1), max(x0, x1)
    frame = [x0 - grow, y0 - grow, x1 + grow, y1 + grow]
    canvas.draw.rounded_rectangle(frame, radius * spot.scale * canvas.pixels + grow, fill=colour)


def _line(canvas, spot, geometry, colour, grow):
    """width, point, point, ..."""
    width, *points = geometry
    _stroke(
        canvas,
        [canvas.point(spot, *p) for p in points],
        colour,
        width * spot.scale * canvas.pixels + 2 * grow,
    )


def _curve(canvas, spot, geometry, colour, grow):
    """width, start, control point, end: a quadratic Bezier curve"""
    width, (ax, ay), (bx, by), (cx, cy) = geometry
    weights = [((1 - t) ** 2, 2 * t * (1 - t), t * t) for t in (i / 8 for i in range(9))]
    points = [(a * ax + b * bx + c * cx, a * ay + b * by + c * cy) for a, b, c in weights]
    _line(canvas, spot, (width, *points), colour, grow)


def _stroke(canvas, points, colour, width):
    """A line with round joints and ends, in pixels."""
    canvas.draw.line(points, fill=colour, width=max(1, round(width)), joint="curve")
    for x, y in (points[0], points[-1]):
        canvas.draw.ellipse(
            [x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=colour
        )


KINDS = {
    "oval": _oval,
    "dome": _dome,
    "poly": _poly,
    "blob": _blob,
    "box": _box,
    "line": _line,
    "curve": _curve,
}

# --------------------------------------------------------------------------------------------------
# 8. Characters.
# --------------------------------------------------------------------------------------------------

FEET = ("ovals", "dark", 0.14, -0.045, 0.12, 0.055)
BODY = ("oval", "main", 0, -0.23, 0.25, 0.22)
BELLY = ("oval", "light", 0, -0.19, 0.16, 0.15)
ARMS = ("curves", "main", 0.1, (0.2, -0.32), (0.29, -0.26), (0.27, -0.17))
HEAD = ("oval", "main", 0, -0.59, 0.34, 0.26)

ANIMALS = {
    "fox": (
        ("blob", "main", (-0.05, -0.02), (-0.4, 0.02), (-0.58, -0.22), (-0.46, -0.56), (-0.3, -0.3), (-0.1, -0.24)),
        ("blob", "cream", (-0.56, -0.26), (-0.47, -0.58), (-0.31, -0.32), (-0.42, -0.26)),
        FEET, BODY, BELLY, ARMS,
        ("polys", "main", (0.33, -0.58), (0.34, -1.0), (0.04, -0.8)),
        ("polys", "ink", (0.275, -0.78), (0.3, -0.93), (0.15, -0.82)),
        HEAD,
        ("polys", "main", (0.2, -0.72), (0.42, -0.5), (0.2, -0.36)),
        ("polys", "cream", (0.0, -0.34), (0.06, -0.53), (0.24, -0.53), (0.41, -0.5), (0.24, -0.37), (0.1, -0.33)),
        ("oval", "ink", 0, -0.49, 0.055, 0.045),
    ),
    "rabbit": (
        ("oval", "cream", -0.28, -0.14, 0.11, 0.11),
        FEET, BODY, BELLY, ARMS,
        ("ovals", "main", 0.15, -0.79, 0.105, 0.24),
        ("ovals", "ear", 0.15, -0.81, 0.055, 0.17),
        ("oval", "main", 0, -0.5, 0.32, 0.25),
        ("box", "white", -0.045, -0.39, 0.045, -0.31, 0.015),
        ("oval", "ear", 0, -0.45, 0.05, 0.035),
    ),
    "bear": (
        FEET, ("oval", "main", 0, -0.24, 0.3, 0.24), ("oval", "light", 0, -0.2, 0.19, 0.17),
        ("curves", "main", 0.13, (0.24, -0.34), (0.34, -0.26), (0.31, -0.16)),
        ("ovals", "main", 0.27, -0.86, 0.14, 0.14),
        ("ovals", "dark", 0.27, -0.86, 0.075, 0.075),
        ("oval", "main", 0, -0.62, 0.37, 0.29),
        ("oval", "light", 0, -0.49, 0.19, 0.135),
        ("oval", "ink", 0, -0.55, 0.075, 0.05),
    ),
    "cat": (
        ("curve", "main", 0.1, (-0.15, -0.08), (-0.55, -0.05), (-0.43, -0.3)),
        ("curve", "dark", 0.1, (-0.44, -0.26), (-0.4, -0.38), (-0.5, -0.42)),
        FEET, BODY, BELLY, ARMS,
        ("polys", "main", (0.335, -0.55), (0.35, -0.97), (0.05, -0.8)),
        ("polys", "ear", (0.28, -0.7), (0.295, -0.88), (0.14, -0.79)),
        HEAD,
        ("line", "dark", 0.05, (0, -0.82), (0, -0.73)),
        ("lines", "dark", 0.05, (0.11, -0.8), (0.09, -0.73)),
        ("lines", "ink", 0.024, (0.25, -0.53), (0.44, -0.57)),
        ("lines", "ink", 0.024, (0.25, -0.48), (0.43, -0.45)),
        ("poly", "mouth", (-0.05, -0.52), (0.05, -0.52), (0, -0.46)),
    ),
    "mouse": (
        ("curve", "dark", 0.05, (-0.15, -0.06), (-0.42, 0.0), (-0.4, -0.2)),
        ("curve", "dark", 0.05, (-0.4, -0.2), (-0.38, -0.33), (-0.5, -0.32)),
        FEET, BODY, BELLY, ARMS,
        ("ovals", "main", 0.34, -0.78, 0.21, 0.21),
        ("ovals", "ear", 0.34, -0.78, 0.135, 0.135),
        ("oval", "main", 0, -0.56, 0.31, 0.25),
        ("oval", "mouth", 0, -0.47, 0.05, 0.042),
    ),
    "frog": (
        ("ovals", "main", 0.3, -0.13, 0.17, 0.13),
        ("ovals", "dark", 0.29, -0.04, 0.19, 0.05),
        ("oval", "main", 0, -0.27, 0.3, 0.26), ("oval", "light", 0, -0.22, 0.21, 0.18),
        ("curves", "main", 0.09, (0.2, -0.3), (0.25, -0.18), (0.13, -0.06)),
        ("ovals", "main", 0.22, -0.83, 0.155, 0.155),
        ("oval", "main", 0, -0.61, 0.43, 0.24),
        ("ovals", "white", 0.22, -0.85, 0.11, 0.11),
    ),
    "owl": (
        ("ovals", "beak", 0.12, -0.035, 0.1, 0.045),
        ("oval", "main", 0, -0.36, 0.35, 0.34),
        ("ovals", "dark", 0.33, -0.33, 0.11, 0.22),
        ("oval", "light", 0, -0.24, 0.22, 0.2),
        ("ovals", "main", 0.1, -0.3, 0.05, 0.04),
        ("oval", "main", 0, -0.18, 0.05, 0.04),
        ("polys", "dark", (0.36, -0.6), (0.4, -1.0), (0.06, -0.82)),
        ("oval", "main", 0, -0.64, 0.37, 0.26),
        ("ovals", "cream", 0.17, -0.64, 0.17, 0.17),
        ("poly", "beak", (-0.07, -0.57), (0.07, -0.57), (0, -0.43)),
    ),
    "turtle": (
        ("poly", "skin", (-0.36, -0.14), (-0.52, -0.05), (-0.34, -0.06)),
        ("oval", "skin", -0.26, -0.07, 0.13, 0.075), ("oval", "skin", 0.23, -0.07, 0.13, 0.075),
        ("curve", "skin", 0.2, (0.19, -0.22), (0.26, -0.3), (0.24, -0.55)),
        ("dome", "deep", -0.06, -0.16, 0.42, 0.54),
        ("box", "light", -0.5, -0.2, 0.38, -0.11, 0.045),
        ("blob", "main", (-0.2, -0.65), (0.08, -0.66), (0.1, -0.4), (-0.2, -0.42)),
        ("blob", "main", (-0.24, -0.64), (-0.23, -0.42), (-0.44, -0.38), (-0.4, -0.54)),
        ("blob", "main", (-0.47, -0.34), (-0.24, -0.37), (-0.24, -0.22), (-0.48, -0.22)),
        ("blob", "main", (-0.2, -0.37), (0.12, -0.35), (0.14, -0.22), (-0.2, -0.22)),
        ("oval", "skin", 0.2, -0.72, 0.3, 0.27),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Face:
    """Where a species' features are, in its table's units."""

    x: float = 0.0  # middle of the face
    eyes: float = -0.62
    gap: float = 0.155  # from the middle to an eye
    mouth: float | None = -0.42  # None: the table has a beak
    width: float = 0.09  # half the mouth
    blush: float = 0.25  # from the middle to a cheek


FACES = {
    "fox": Face(eyes=-0.63, mouth=-0.42, width=0.08, blush=0.29),
    "rabbit": Face(eyes=-0.54, mouth=-0.405, width=0.08),
    "bear": Face(eyes=-0.68, mouth=-0.45, width=0.08, blush=0.27),
    "cat": Face(mouth=-0.43),
    "mouse": Face(eyes=-0.59, mouth=-0.4),
    "frog": Face(eyes=-0.85, gap=0.22, mouth=-0.55, width=0.19, blush=0.31),
    "owl": Face(eyes=-0.64, gap=0.17, mouth=None, blush=0.31),
    "turtle": Face(x=0.22, eyes=-0.75, gap=0.135, mouth=-0.6, blush=0.2),
}

# Each mood: eyes, mouth, and what else the face shows.
MOODS = {
    "smile": ("open", "smile", ("blush",)),
    "sad": ("open", "frown", ("brows",)),
    "crying": ("open", "frown", ("brows", "tear")),
    "weary": ("closed", "frown", ("brows",)),
    "weeping": ("closed", "frown", ("brows", "tear")),
    "happy": ("merry", "laugh", ("blush",)),
    "asleep": ("closed", "smile", ("blush",)),
}


def face_rows(species: str, mood: str):
    """The rows of a face: the eyes, the mouth and the signs of the mood."""
    face = FACES[species]
    eyes, mouth, signs = MOODS[mood]
    rows = [*eye_rows(face, eyes), *mouth_rows(face, mouth)]
    for side in (-1, 1):
        x, y = face.x + side * face.gap, face.eyes
        if "blush" in signs:
            rows.append(("oval", "blush", face.x + side * face.blush, face.eyes + 0.13, 0.06, 0.04))
        if "brows" in signs:
            rows.append(
                ("line", "ink", 0.035, (x - side * 0.06, y - 0.155), (x + side * 0.07, y - 0.1))
            )
    if "tear" in signs:
        x, y = face.x + face.gap + 0.07, face.eyes + 0.19
        rows += [
            ("poly", "tear", (x - 0.05, y), (x, y - 0.1), (x + 0.05, y)),
            ("oval", "tear", x, y + 0.02, 0.055, 0.06),
        ]
    return rows


def eye_rows(face: Face, look: str):
    for x in (face.x - face.gap, face.x + face.gap):
        y = face.eyes
        if look == "open":
            yield "oval", "ink", x, y, 0.058, 0.072
            yield "oval", "white", x + 0.02, y - 0.026, 0.023, 0.026
        else:  # an arch for merry eyes, a bowl for closed ones
            bend = -0.085 if look == "merry" else 0.085
            yield (
                "curve",
                "ink",
                0.038,
                (x - 0.07, y - bend / 4),
                (x, y + bend),
                (x + 0.07, y - bend / 4),
            )


def mouth_rows(face: Face, look: str):
    if face.mouth is None:
        return
    x, y, width = face.x, face.mouth, face.width
    if look == "laugh":
        yield "dome", "mouth", x, y - 0.02, width, -0.085
        yield "dome", "rose", x, y + 0.02, width * 0.6, -0.04
    else:
        bend = 0.08 if look == "smile" else -0.08
        yield (
            "curve",
            "ink",
            0.032,
            (x - width, y - bend / 4),
            (x, y + bend),
            (x + width, y - bend / 4),
        )


# --------------------------------------------------------------------------------------------------
# 9. Objects, centred on (0, 0), and props, standing on it.
# --------------------------------------------------------------------------------------------------


def star_points(radius: float, inner: float, points: int = 5):
    """Corners of a star about the origin."""
    turns = [(i * math.pi / points, inner if i % 2 else radius) for i in range(2 * points)]
    return [(r * math.sin(a), -r * math.cos(a)) for a, r in turns]


def _petals(count: int, distance: float, radius: float):
    angles = [2 * math.pi * i / count for i in range(count)]
    return [
        ("oval", "rose", distance * math.sin(a), -0.16 - distance * math.cos(a), radius, radius)
        for a in angles
    ]


OBJECTS = {
    "kite": (
        ("curve", "cream", 0.05, (0, 0.22), (0.22, 0.3), (0.08, 0.52)),
        ("poly", "gold", (0.12, 0.35), (0.32, 0.26), (0.28, 0.48)),
        ("poly", "red", (0, -0.52), (0.41, -0.12), (0, -0.12)), ("poly", "gold", (0, -0.52), (-0.41, -0.12), (0, -0.12)),
        ("poly", "teal", (0, 0.3), (0.41, -0.12), (0, -0.12)), ("poly", "navy", (0, 0.3), (-0.41, -0.12), (0, -0.12)),
    ),
    "lantern": (
        ("oval", "glow", 0, 0.06, 0.5, 0.5),
        ("curve", "bark", 0.06, (-0.16, -0.28), (0, -0.66), (0.16, -0.28)),
        ("box", "gold", -0.25, -0.22, 0.25, 0.36, 0.08), ("oval", "cream", 0, 0.1, 0.13, 0.2),
        ("oval", "flame", 0, 0.14, 0.07, 0.12),
        ("box", "bark", -0.3, -0.32, 0.3, -0.18, 0.05), ("box", "bark", -0.3, 0.32, 0.3, 0.46, 0.05),
        ("lines", "bark", 0.06, (0.24, -0.2), (0.24, 0.36)),
    ),
    "key": (
        ("line", "gold", 0.13, (0, 0), (0, 0.42)), ("line", "gold", 0.11, (0.05, 0.4), (0.22, 0.4)),
        ("line", "gold", 0.11, (0.05, 0.2), (0.18, 0.2)),
        ("oval", "gold", 0, -0.24, 0.27, 0.26), ("oval", "honey", 0, -0.24, 0.14, 0.13),
    ),
    "star": (("poly", "gold", *star_points(0.52, 0.25)), ("poly", "glow", *star_points(0.3, 0.15))),
    "flower": (
        ("line", "green", 0.09, (0, 0), (0, 0.5)),
        ("oval", "green", 0.17, 0.34, 0.16, 0.08), ("oval", "green", -0.17, 0.26, 0.16, 0.08),
        *_petals(5, 0.22, 0.175), ("oval", "gold", 0, -0.16, 0.15, 0.15),
    ),
    "book": (
        ("polys", "navy", (0, -0.28), (0.52, -0.36), (0.52, 0.3), (0, 0.4)),
        ("polys", "cream", (0, -0.26), (0.44, -0.36), (0.44, 0.2), (0, 0.3)),
        ("lines", "stone", 0.05, (0.11, -0.13), (0.34, -0.18)), ("lines", "stone", 0.05, (0.11, 0.02), (0.34, -0.03)),
        ("line", "navy", 0.045, (0, -0.26), (0, 0.34)),
    ),
    "apple": (
        ("line", "bark", 0.08, (0, -0.2), (0.05, -0.46)), ("oval", "green", 0.22, -0.38, 0.17, 0.09),
        ("ovals", "red", 0.17, 0.1, 0.29, 0.35), ("oval", "blush", -0.22, -0.02, 0.09, 0.13),
    ),
    "balloon": (
        ("curve", "cream", 0.05, (0, 0.26), (0.16, 0.36), (0, 0.54)),
        ("poly", "crimson", (-0.09, 0.32), (0.09, 0.32), (0, 0.2)),
        ("oval", "red", 0, -0.13, 0.34, 0.39), ("oval", "blush", -0.13, -0.27, 0.08, 0.12),
    ),
}  # fmt: skip

QUESTION = (
    ("curve", "crimson", 0.075, (-0.12, -0.76), (-0.1, -0.9), (0.02, -0.88)),
    ("curve", "crimson", 0.075, (0.02, -0.88), (0.24, -0.8), (0.02, -0.66)),
    ("line", "crimson", 0.075, (0.02, -0.66), (0.02, -0.6)), ("oval", "crimson", 0.02, -0.49, 0.05, 0.05),
)  # fmt: skip


def _zed(x: float, y: float, size: float):
    return ("line", "white", size / 4, (x, y), (x + size, y), (x, y + size), (x + size, y + size))


@dataclass(frozen=True)
class Prop:
    """A table and its place; `x` and `y` in picture widths."""

    x: float
    y: float
    scale: float
    rows: tuple
    front: bool = True  # drawn over the characters


PROBLEM_PROPS = {
    "lost": Prop(12 / 16, 0.9, 0.46, (
        ("box", "wood", -0.06, -0.9, 0.06, 0, 0.03),
        ("poly", "path", (-0.42, -1.0), (0.3, -1.0), (0.5, -0.69), (0.3, -0.38), (-0.42, -0.38)),
        *QUESTION,
    )),
    "river": Prop(11.5 / 16, 1.02, 0.36, (
        ("blob", "water", (-0.1, -1.0), (0.5, -1.0), (0.5, -0.76), (0.2, -0.6), (0.7, -0.45), (1.0, 0.2), (-0.8, 0.2),
         (-0.8, -0.1), (-0.2, -0.36), (-0.5, -0.56), (-0.2, -0.74)),
        ("curve", "foam", 0.06, (0.06, -0.82), (0.16, -0.9), (0.26, -0.82)),
        ("curve", "foam", 0.06, (-0.22, -0.57), (-0.1, -0.66), (0.02, -0.57)),
        ("curve", "foam", 0.06, (0.16, -0.4), (0.29, -0.5), (0.42, -0.4)),
        ("curve", "foam", 0.06, (-0.4, -0.15), (-0.26, -0.26), (-0.12, -0.15)),
        ("curve", "foam", 0.06, (0.24, -0.15), (0.4, -0.26), (0.56, -0.15)),
    ), front=False),
    "storm": Prop(12.5 / 16, 0.9, 0.58, (
        ("poly", "gold", (0.0, -0.55), (0.22, -0.55), (0.13, -0.36), (0.28, -0.36), (-0.08, 0.0), (0.02, -0.25),
         (-0.13, -0.25)),
        ("oval", "gloom", -0.2, -0.68, 0.2, 0.15), ("oval", "gloom", 0.26, -0.66, 0.2, 0.14),
        ("oval", "gloom", 0.04, -0.76, 0.25, 0.2), ("box", "gloom", -0.3, -0.68, 0.36, -0.53, 0.07),
        ("curve", "stone", 0.045, (-0.14, -0.7), (-0.02, -0.9), (0.1, -0.74)),
        ("curve", "stone", 0.045, (0.1, -0.74), (0.1, -0.6), (-0.02, -0.66)),
    )),
    "scared": Prop(12 / 16, 0.92, 0.46, (
        ("ovals", "hollow", 0.3, -0.2, 0.22, 0.22), ("oval", "hollow", 0, -0.34, 0.34, 0.36),
        ("ovals", "hollow", 0.2, -0.5, 0.19, 0.2), ("box", "hollow", -0.46, -0.2, 0.46, 0, 0.1),
        ("ovals", "gold", 0.16, -0.42, 0.12, 0.13), ("ovals", "ink", 0.14, -0.4, 0.05, 0.08),
        ("lines", "ink", 0.05, (0.02, -0.54), (0.28, -0.62)),
    )),
    "stuck": Prop(4.5 / 16, 0.99, 0.4, (
        ("blob", "slate", (-0.66, 0.06), (-0.66, -0.3), (-0.46, -0.5), (-0.2, -0.42), (-0.06, -0.16), (0.0, 0.06)),
        ("blob", "stone", (-0.54, -0.22), (-0.44, -0.37), (-0.26, -0.33), (-0.32, -0.2)),
        ("blob", "slate", (-0.02, 0.06), (-0.04, -0.2), (0.14, -0.54), (0.5, -0.64), (0.78, -0.34), (0.78, 0.06)),
        ("blob", "stone", (0.12, -0.26), (0.22, -0.43), (0.44, -0.48), (0.5, -0.3)),
    )),
    "tired": Prop(11 / 16, 1.02, 0.36, (
        ("blob", "path", (-0.02, -1.0), (0.14, -1.0), (0.1, -0.86), (0.5, -0.72), (0.5, -0.5), (0.1, -0.4), (0.6, 0.2),
         (-0.7, 0.2), (-0.5, -0.4), (0.1, -0.6), (-0.2, -0.74)),
        _zed(-0.1, -1.42, 0.2), _zed(-0.12, -1.9, 0.28), _zed(-0.15, -2.5, 0.38),
    ), front=False),
}  # fmt: skip

ENDING_PROPS = {
    "feast": Prop(9.25 / 16, 0.95, 0.28, (
        ("lines", "bark", 0.09, (0.3, -0.2), (0.34, 0)), ("box", "wood", -0.46, -0.3, 0.46, -0.18, 0.04),
        ("box", "rose", -0.34, -0.64, 0.34, -0.3, 0.06), ("box", "cream", -0.34, -0.66, 0.34, -0.52, 0.06),
        ("ovals", "cream", 0.24, -0.52, 0.08, 0.08), ("oval", "cream", 0, -0.52, 0.08, 0.1),
        ("line", "sky", 0.09, (0, -0.68), (0, -0.84)), ("oval", "gold", 0, -0.96, 0.075, 0.1),
    )),
    "song": Prop(9.25 / 16, 0.95, 0.28, (
        ("box", "red", -0.32, -0.36, 0.32, -0.04, 0.05), ("oval", "red", 0, -0.06, 0.32, 0.09),
        ("lines", "gold", 0.06, (0.28, -0.32), (0.14, -0.04)), ("lines", "gold", 0.06, (0.0, -0.3), (0.14, -0.04)),
        ("oval", "cream", 0, -0.38, 0.34, 0.11),
        ("line", "gold", 0.08, (-0.2, -0.62), (-0.2, -0.98), (0.24, -1.04), (0.24, -0.68)),
        ("line", "gold", 0.14, (-0.18, -0.96), (0.22, -1.01)),
        ("oval", "gold", -0.28, -0.62, 0.12, 0.095), ("oval", "gold", 0.16, -0.68, 0.12, 0.095),
    )),
    "sleep": Prop(9.25 / 16, 0.95, 0.28, (
        ("box", "wood", -0.52, -0.9, -0.38, 0, 0.05), ("box", "wood", 0.4, -0.56, 0.52, 0, 0.05),
        ("box", "cream", -0.4, -0.4, 0.42, -0.14, 0.03), ("oval", "white", -0.2, -0.52, 0.2, 0.16),
        ("box", "sky", -0.08, -0.58, 0.43, -0.12, 0.14), ("box", "navy", -0.1, -0.58, 0.06, -0.12, 0.07),
    )),
    "gift": Prop(9.25 / 16, 0.95, 0.28, (
        ("box", "teal", -0.36, -0.56, 0.36, 0, 0.03), ("box", "teal", -0.42, -0.66, 0.42, -0.46, 0.04),
        ("box", "gold", -0.09, -0.66, 0.09, 0, 0.0),
        ("ovals", "gold", 0.17, -0.78, 0.17, 0.12), ("ovals", "honey", 0.17, -0.78, 0.08, 0.05),
        ("oval", "gold", 0, -0.72, 0.08, 0.08),
    )),
    "dance": Prop(8 / 16, 0.0, 1.0, (
        ("curve", "cream", 0.018, (-0.52, 0.02), (0, 0.16), (0.52, 0.02)),
        *(("poly", ink, (x - 0.06, y), (x + 0.06, y), (x, y + 0.12)) for x, y, ink in (
            (-0.42, 0.045, "red"), (-0.25, 0.07, "gold"), (-0.085, 0.085, "teal"),
            (0.085, 0.085, "violet"), (0.25, 0.07, "gold"), (0.42, 0.045, "rose"))),
        *(("oval", ink, x, y, 0.02, 0.02) for x, y, ink in (
            (0.02, 0.62, "gold"), (0.12, 0.68, "rose"), (0.05, 0.75, "teal"), (0.15, 0.81, "gold"), (0.06, 0.89, "red"),
            (-0.44, 0.5, "rose"), (-0.46, 0.66, "gold"), (0.4, 0.5, "teal"), (0.3, 0.53, "red"))),
    ), front=False),
    "campfire": Prop(9.25 / 16, 0.95, 0.28, (
        ("oval", "glow", 0, -0.4, 0.5, 0.5),
        ("blob", "red", (-0.36, -0.04), (-0.4, -0.5), (-0.22, -0.7), (-0.12, -0.52), (0.0, -1.12), (0.2, -0.54),
         (0.28, -0.8), (0.4, -0.4), (0.36, -0.04)),
        ("blob", "flame", (-0.26, -0.04), (-0.26, -0.44), (-0.1, -0.5), (0.02, -0.86), (0.26, -0.42), (0.24, -0.04)),
        ("blob", "gold", (-0.16, -0.06), (-0.12, -0.34), (0.02, -0.62), (0.16, -0.34), (0.16, -0.06)),
        ("line", "bark", 0.15, (-0.36, -0.02), (0.36, -0.16)), ("line", "wood", 0.15, (-0.36, -0.16), (0.36, -0.02)),
    )),
}  # fmt: skip

BUBBLE = (
    ("oval", "white", 0, -0.1, 0.66, 0.6), ("ovals", "white", 0.5, 0.06, 0.4, 0.4), ("oval", "white", 0, 0.26, 0.6, 0.4),
    ("oval", "white", -0.74, 0.52, 0.15, 0.13), ("oval", "white", -0.88, 0.78, 0.09, 0.08),
)  # fmt: skip
HELLO = (
    ("poly", "white", (-0.1, -0.3), (0.24, -0.3), (0.1, 0.02)), ("oval", "white", 0, -0.6, 0.5, 0.4),
    ("ovals", "ink", 0.17, -0.7, 0.07, 0.09), ("curve", "ink", 0.075, (-0.22, -0.52), (0, -0.26), (0.22, -0.52)),
)  # fmt: skip
HEART = (
    ("ovals", "red", 0.23, -0.2, 0.26, 0.25), ("poly", "red", (-0.47, -0.1), (0.47, -0.1), (0.0, 0.5)),
    ("oval", "blush", -0.24, -0.24, 0.09, 0.08),
)  # fmt: skip

# --------------------------------------------------------------------------------------------------
# 10. Backdrops.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Time:
    top: Colour  # the sky above
    low: Colour  # and at the horizon
    disc: Colour  # sun or moon
    height: float  # of its centre, from the top of the picture
    radius: float
    light: Colour  # what falls on everything
    strength: float  # of the light on the scenery (ACTORS_SHARE of it on the rest)


TIMES = {
    "morning": Time(
        (140, 206, 246), (255, 226, 196), (255, 206, 110), 5 / 16, 0.085, (255, 226, 200), 0.16
    ),
    "noon": Time(
        (72, 166, 244), (190, 230, 255), (255, 232, 90), 2.5 / 16, 0.09, (255, 255, 255), 0.0
    ),
    "evening": Time(
        (112, 72, 156), (255, 160, 96), (255, 96, 60), 4 / 16, 0.115, (206, 96, 90), 0.28
    ),
    "night": Time(
        (18, 24, 72), (58, 70, 134), (252, 244, 206), 2.5 / 16, 0.085, (24, 30, 92), 0.47
    ),
}


@dataclass(frozen=True)
class Weather:
    grey: float  # how much of the sky's colour it takes
    cloud: Colour | None
    veil: float  # how much grey lies over the scenery
    dim: float = 0.0  # how far sun and moon fade into the sky
    snow: float = 0.0  # how white the ground is


WEATHERS = {
    "clear": Weather(0.0, None, 0.0),
    "cloudy": Weather(0.2, (250, 250, 252), 0.06, dim=0.2),
    "rainy": Weather(0.5, (112, 120, 140), 0.22, dim=0.6),
    "snowy": Weather(0.3, (224, 230, 242), 0.04, dim=0.35, snow=0.85),
}
GREY: Colour = (120, 130, 150)

CLOUD = (
    ("oval", "cloud", -0.55, 0.08, 0.42, 0.26), ("oval", "cloud", 0.55, 0.08, 0.42, 0.26),
    ("oval", "cloud", 0, -0.1, 0.5, 0.38), ("box", "cloud", -0.8, 0.05, 0.8, 0.34, 0.14),
)  # fmt: skip
SCENERY = {
    "pine": (
        ("box", "trunk", -0.05, -0.25, 0.05, 0.05, 0), ("poly", "leaf", (-0.27, -0.14), (0.27, -0.14), (0, -0.6)),
        ("poly", "leaf", (-0.22, -0.4), (0.22, -0.4), (0, -0.82)), ("poly", "tip", (-0.16, -0.66), (0.16, -0.66), (0, -1.0)),
    ),
    "thicket": (("box", "tip", -1, -1, 1, 1, 0),),
    "bush": (("ovals", "leaf", 0.4, -0.2, 0.4, 0.4), ("oval", "leaf", 0, -0.4, 0.5, 0.5)),
    "peak": (
        ("poly", "rock", (-0.8, 0.1), (0, -1), (0.8, 0.1)), ("poly", "shade", (0, -1), (0.8, 0.1), (0.2, 0.1)),
        ("poly", "snow", (-0.25, -0.66), (0, -1), (0.25, -0.66), (0.1, -0.58), (0, -0.7), (-0.1, -0.58)),
    ),
    "house": (
        ("box", "wall", -0.36, -0.62, 0.36, 0.05, 0), ("poly", "roof", (-0.48, -0.58), (0.48, -0.58), (0, -1.0)),
        ("box", "door", -0.09, -0.32, 0.09, 0.05, 0.03), ("boxs", "pane", 0.16, -0.5, 0.29, -0.34, 0.01),
    ),
    "hill": (("oval", "leaf", 0, 0, 1, 0.6),),
    "tree": (
        ("box", "trunk", -0.08, -0.4, 0.08, 0.05, 0), ("ovals", "leaf", 0.18, -0.55, 0.22, 0.22), ("oval", "leaf", 0, -0.74, 0.27, 0.26),
    ),
    "dune": (("oval", "ground", 0, 0, 1, 0.5),),
    "cactus": (
        ("line", "leaf", 0.2, (0, 0), (0, -0.9)), ("line", "leaf", 0.14, (0, -0.35), (0.3, -0.35), (0.3, -0.65)),
        ("line", "leaf", 0.14, (0, -0.5), (-0.28, -0.5), (-0.28, -0.78)),
    ),
    "sea": (("box", "sea", -1, -1, 1, 1, 0),),
    "wave": (("curve", "foam", 0.3, (-1, 0), (0, -0.5), (1, 0)),),
    "palm": (
        ("curve", "trunk", 0.1, (0, 0), (-0.1, -0.4), (0.04, -0.75)), ("curves", "leaf", 0.12, (0, -0.76), (0.22, -1.0), (0.42, -0.66)),
        ("curves", "leaf", 0.12, (0, -0.76), (0.16, -0.76), (0.26, -0.48)),
    ),
    "sail": (("poly", "wall", (0.0, -0.2), (0.0, -1), (0.5, -0.2)), ("poly", "roof", (-0.4, -0.16), (0.5, -0.16), (0.3, 0.1), (-0.25, 0.1))),
    "bloom": (
        ("oval", "petal", 0, -0.5, 0.5, 0.5), ("oval", "pollen", 0, -0.5, 0.22, 0.22),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    inks: Inks
    always: tuple  # rows (motif, x, y, scale), back to front, in every variant
    variants: tuple[tuple, ...]
    near: tuple = ()  # what stands on the ground


PLACES = {
    "forest": Place(
        {"ground": (96, 150, 78), "leaf": (46, 122, 78), "tip": (58, 138, 86), "trunk": (104, 72, 52)},
        (("thicket", 0.5, 1.56, 1.0),),
        (
            tuple(("pine", x / 16, 0.76, h) for x, h in (
                (1, 0.6), (4, 0.5), (7, 0.56), (10, 0.48), (12.5, 0.54), (15.5, 0.62))),
            tuple(("pine", x / 16, 0.76, h) for x, h in (
                (0, 0.52), (2.5, 0.6), (6, 0.48), (9, 0.56), (12, 0.5), (15, 0.6))),
        ),
        (("bush", 0.0, 0.86, 0.1), ("bush", 1.0, 0.84, 0.1)),
    ),
    "beach": Place(
        {"ground": (246, 220, 156), "sea": (48, 156, 200), "foam": (150, 214, 232), "leaf": (62, 152, 84), "trunk": (150, 104, 68),
         "wall": (252, 248, 240), "roof": (210, 80, 66)},
        (("sea", 0.5, 1.5, 1.0), ("wave", 0.34, 0.57, 0.05), ("wave", 0.66, 0.6, 0.05), ("wave", 0.1, 0.62, 0.05)),
        (
            (("palm", 15 / 16, 0.8, 0.5), ("sail", 9 / 16, 0.52, 0.14)),
            (("palm", 1 / 16, 0.8, 0.5), ("sail", 14 / 16, 0.52, 0.14)),
        ),
    ),
    "mountain": Place(
        {"ground": (136, 158, 116), "rock": (136, 144, 176), "shade": (112, 120, 154), "snow": (250, 251, 255)},
        (),
        (
            (("peak", 13 / 16, 0.76, 0.48), ("peak", 2 / 16, 0.76, 0.46), ("peak", 8 / 16, 0.76, 0.36)),
            (("peak", 4 / 16, 0.76, 0.4), ("peak", 15 / 16, 0.76, 0.42), ("peak", 9.5 / 16, 0.76, 0.5)),
        ),
    ),
    "village": Place(
        {"ground": (158, 178, 112), "wall": (250, 232, 202), "roof": (204, 82, 64), "door": (132, 88, 62), "pane": (150, 204, 230)},
        (),
        (
            tuple(("house", x / 16, 0.76, h) for x, h in ((1, 0.4), (5.5, 0.36), (9.5, 0.42), (14, 0.38))),
            tuple(("house", x / 16, 0.76, h) for x, h in ((2.5, 0.38), (7, 0.42), (11, 0.36), (15, 0.41))),
        ),
    ),
    "meadow": Place(
        {"ground": (122, 190, 86), "leaf": (98, 172, 88), "petal": (250, 244, 244), "pollen": (250, 202, 70), "trunk": (120, 84, 58)},
        (("hill", 2 / 16, 0.82, 0.5), ("hill", 14 / 16, 0.84, 0.46)),
        (
            (("tree", 14 / 16, 0.64, 0.3),),
            (("tree", 9 / 16, 0.74, 0.26),),
            (("tree", 1 / 16, 0.62, 0.3),),
        ),
        tuple(("bloom", x, y, 0.065) for x, y in ((0.06, 0.82), (0.5, 0.8), (0.95, 0.8), (0.1, 0.99), (0.9, 1.0), (0.7, 0.84))),
    ),
    "desert": Place(
        {"ground": (242, 204, 136), "leaf": (78, 152, 98)},
        (("dune", 3 / 16, 0.8, 0.5), ("dune", 13 / 16, 0.82, 0.5)),
        (
            (("cactus", 15 / 16, 0.78, 0.4), ("cactus", 9.5 / 16, 0.74, 0.24)),
            (("cactus", 1 / 16, 0.78, 0.38), ("cactus", 11 / 16, 0.76, 0.36)),
        ),
    ),
}  # fmt: skip

# Three well-spread patterns (16ths of the picture) serve for stars, rain and snow alike.
SCATTERS = (
    ((1, 3), (4, 1), (7, 4), (10, 2), (13, 4), (15, 1), (2, 8), (6, 7), (9, 8), (12, 7), (15, 9), (1, 13), (5, 12), (8, 14), (11, 12), (14, 14)),
    ((2, 2), (5, 4), (8, 1), (11, 4), (14, 2), (0, 6), (4, 8), (7, 7), (10, 8), (13, 8), (15, 6), (2, 14), (6, 13), (9, 12), (12, 14), (15, 12)),
    ((0, 1), (3, 4), (6, 2), (9, 4), (12, 1), (15, 4), (1, 8), (5, 6), (8, 8), (11, 7), (14, 8), (0, 12), (4, 14), (7, 12), (10, 14), (14, 12)),
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """What the seed decides about a story's place; the same in all its panels. The characters
    always stand in the same places: a painter that had to guess the side for each picture would
    paint neither well."""

    disc: int  # 0, 1: the two places of sun and moon
    variant: int
    scatter: int


def layout_of(story: Story) -> Layout:
    """The story's layout, from its seed alone (and the number of its place's variants)."""
    chance = random.Random(f"layout {story.seed}")
    variants = len(PLACES[story.factors["place"]].variants)
    return Layout(
        disc=chance.randrange(2),
        variant=chance.randrange(variants),
        scatter=chance.randrange(len(SCATTERS)),
    )


def draw_sky(time: Time, weather: Weather, pixels: int) -> Image.Image:
    """A vertical gradient, (pixels, pixels) RGB; the horizon's colour is reached at 0.75 of the
    height."""
    grey = mix(GREY, time.light, time.strength)
    ends = [np.array(mix(colour, grey, weather.grey)) for colour in (time.top, time.low)]
    down = np.clip(np.linspace(0, 1 / 0.75, pixels), 0, 1)[:, None]
    rows = (ends[0] * (1 - down) + ends[1] * down).round().astype(np.uint8)
    return Image.fromarray(
        np.ascontiguousarray(np.broadcast_to(rows[:, None], (pixels, pixels, 3)))
    )


def _lit(inks: Inks, time: Time, weather: Weather, share: float = 1.0) -> Inks:
    """The inks in this light; `share` scales the effect."""

    def lit(colour):
        return mix(mix(colour, GREY, weather.veil * share), time.light, time.strength * share)

    return {role: lit(colour) for role, colour in inks.items()}


SNOW: Colour = (250, 252, 255)
SNOW_ON = {
    "ground": 1.0,
    "leaf": 0.35,
    "tip": 0.9,
    "roof": 0.8,
    "petal": 0.9,
    "pollen": 0.9,
}  # its share, by role


def _scenery_inks(place: Place, time: Time, weather: Weather) -> Inks:
    """The place's inks in this weather and light, and "grass", the nearer and darker ground."""
    inks = {
        role: mix(ink, SNOW, weather.snow * SNOW_ON.get(role, 0.0))
        for role, ink in place.inks.items()
    }
    inks["grass"] = mix(inks["ground"], PLUM, 0.07)
    inks = _lit(inks, time, weather)
    if time in (TIMES["evening"], TIMES["night"]):
        inks["pane"] = (255, 222, 110)  # lamps are lit
    return inks


def _crescent():
    """Corners of a moon of radius 1: 3/4 of its rim and, back again, the bay through (-0.3, 0)."""
    turns = [math.radians(45 + i * 15) for i in range(19)]
    rim = [(math.cos(a), math.sin(a)) for a in turns]
    bay = [(0.36 + 0.66 * math.cos(a), 0.71 * math.sin(a)) for a in reversed(turns[3:-3])]
    return rim + bay


def draw_disc(canvas: Canvas, time: Time, weather: Weather, layout: Layout) -> None:
    """Sun or moon, in the sky above the hero."""
    behind = mix(time.top, time.low, time.height / 0.75)
    haze = mix(behind, GREY, weather.grey)
    disc = mix(time.disc, mix(haze, CREAM, 0.4), weather.dim)  # paler, as behind mist
    inks = {"disc": disc, "halo": mix(disc, haze, 0.7)}
    rows = [("oval", "halo", 0, 0, 1.4, 1.4), ("oval", "disc", 0, 0, 1, 1)]
    if time is TIMES["night"]:
        rows = [("poly", "disc", *_crescent())]
    canvas.paint(rows, Spot((3 + layout.disc) / 16, time.height, time.radius), inks)


def draw_clouds(canvas: Canvas, time: Time, weather: Weather, layout: Layout) -> None:
    """Three big clouds along the top."""
    colour = mix(weather.cloud, time.light, time.strength * 0.8)
    for x, y, scale in ((0.1, 0.1, 0.16), (0.5, 0.07, 0.17), (0.9, 0.11, 0.17)):
        canvas.paint(CLOUD, Spot(x + (layout.disc - 0.5) / 16, y, scale), {"cloud": colour})


def draw_scatter(canvas: Canvas, time: Time, weather: str, layout: Layout) -> None:
    """Stars on a clear night, rain or snow: behind the characters, so that they hide nothing."""
    inks = {
        "star": (240, 236, 210),
        "drop": mix((206, 226, 250), time.light, time.strength * 0.5),
        "flake": mix((255, 255, 255), time.light, time.strength * 0.25),
    }
    row = {
        "clear": ("oval", "star", 0, 0, 0.012, 0.012),
        "rainy": ("line", "drop", 0.017, (0.013, -0.042), (-0.013, 0.042)),
        "snowy": ("oval", "flake", 0, 0, 0.019, 0.019),
    }[weather]
    for x, y in SCATTERS[layout.scatter]:
        if weather != "clear" or y < 8:  # stars keep to the sky
            canvas.paint([row], Spot(x / 16, y / 16, 1.0), inks)


@functools.lru_cache(maxsize=32)  # a story's eight panels share their backdrop
def backdrop(place: str, time: str, weather: str, layout: Layout, pixels: int) -> Image.Image:
    """The scene without its characters, (pixels, pixels) RGB. Copy before drawing on it."""
    scene, hour, sky = PLACES[place], TIMES[time], WEATHERS[weather]
    canvas = Canvas(draw_sky(hour, sky, pixels))
    inks = _scenery_inks(scene, hour, sky)
    if weather == "clear" and time == "night":
        draw_scatter(canvas, hour, weather, layout)
    draw_disc(canvas, hour, sky, layout)
    if sky.cloud:
        draw_clouds(canvas, hour, sky, layout)

    def stand(motifs):
        for motif, x, y, scale in motifs:
            canvas.paint(SCENERY[motif], Spot(x, y, scale), inks)

    stand((*scene.always, *scene.variants[layout.variant]))
    middle = Spot(0.5, 1.0, 1.0)
    canvas.paint(
        [("oval", "ground", 0, 0.02, 1.0, 0.30), ("oval", "grass", 0, 0.12, 0.9, 0.26)],
        middle,
        inks,
    )
    stand(scene.near)
    if weather in ("rainy", "snowy"):
        draw_scatter(canvas, hour, weather, layout)
    return canvas.image


# --------------------------------------------------------------------------------------------------
# 11. Panels.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What a beat's picture shows beside the hero, the place, the time and the weather."""

    mood: str
    shows: tuple[str, ...] = ()  # factors
    mark: tuple | None = None  # (rows, x, y, scale) over the characters
    thought: bool = False  # the object is only thought of


SCENES = (
    Scene("smile"),
    Scene("smile", ("object",), thought=True),
    Scene("sad", ("problem",)),
    Scene("crying", ("problem",)),
    Scene("smile", ("helper",), (HELLO, 12.5 / 16, 0.57, 0.24)),
    Scene("happy", ("object", "helper")),
    Scene("happy", ("object", "helper"), (HEART, 9.5 / 16, 0.66, 0.19)),
    Scene("happy", ("object", "helper", "ending")),
)
ALWAYS_SHOWN = ("species", "colour", "place", "time", "weather")

SUPERSAMPLE = 4
OUTLINE = 0.011  # 1.4 pixels of 128
HERO_X, HERO_Y, HERO_SCALE = 4.5 / 16, 0.93, 0.52
HELPER_X, HELPER_Y, HELPER_SCALE = 13.5 / 16, 0.93, 0.33
OBJECT_X, OBJECT_Y, OBJECT_SCALE = 10.5 / 16, 0.36, 0.29
BUBBLE_LIFT, BUBBLE_SCALE = 0.04, 0.27
TIRED_LEAN = 0.16
ACTORS_SHARE = 0.3  # how much of the light's effect falls on characters and props: their colours must stay tellable


class _Panel:
    """One panel in progress: the backdrop, and what is put before it."""

    def __init__(self, story: Story, pixels: int):
        self.layout = layout_of(story)
        place, time, weather = (story.factors[key] for key in ("place", "time", "weather"))
        self.canvas = Canvas(backdrop(place, time, weather, self.layout, pixels).copy())
        self.light = TIMES[time], WEATHERS[weather]
        self.inks = _lit(INKS, *self.light, share=ACTORS_SHARE)
        self.shadow = mix(_scenery_inks(PLACES[place], *self.light)["grass"], PLUM, 0.3)

    def put(self, rows, x, y, scale, flip=1, lean=0.0, inks=None, outline=OUTLINE):
        """Rows at (x, y); `flip` -1 turns them round."""
        self.canvas.paint(rows, Spot(x, y, scale, flip, lean), inks or self.inks, outline)

    def character(self, species, colour, mood, x, y, scale, flip=1):
        """An animal with its face and its shadow."""
        own = _lit(shades(COLOURS[colour]), *self.light, share=ACTORS_SHARE)
        lean = TIRED_LEAN if mood in ("weary", "weeping") else 0.0
        self.put(
            [("oval", "shadow", 0, 0, 0.42, 0.06)],
            x,
            y,
            scale,
            inks={"shadow": self.shadow},
            outline=0,
        )
        rows = [*ANIMALS[species], *face_rows(species, mood)]
        self.put(rows, x, y, scale, flip, lean, {**self.inks, **own})

    def props(self, props, front: bool):
        """Those of the props that are in front of the characters, or those behind."""
        for prop in props:
            if prop.front == front:
                self.put(prop.rows, prop.x, prop.y, prop.scale)


def mood_of(story: Story, beat: int) -> str:
    """The mood of everybody in the panel: its scene's, unless they are tired or asleep."""
    mood = SCENES[beat].mood
    if story.factors["problem"] == "tired":
        mood = {"sad": "weary", "crying": "weeping"}.get(mood, mood)
    if "ending" in SCENES[beat].shows and story.factors["ending"] == "sleep":
        mood = "asleep"
    return mood


def visible_factors(story: Story, beat: int) -> dict[str, str]:
    """The factors that panel `beat` (0 to 7) shows, with their values."""
    return {key: story.factors[key] for key in (*ALWAYS_SHOWN, *SCENES[beat].shows)}


def draw_panel(story: Story, beat: int, size: int = 128) -> Image.Image:
    """Panel `beat` (0 to 7): RGB, `size` x `size` pixels; the same bytes for the same story and
    beat."""
    shown, scene = visible_factors(story, beat), SCENES[beat]
    mood = mood_of(story, beat)
    panel = _Panel(story, SUPERSAMPLE * size)
    tables = {"problem": PROBLEM_PROPS, "ending": ENDING_PROPS}
    props = [table[shown[key]] for key, table in tables.items() if key in shown]

    panel.props(props, front=False)
    panel.character(shown["species"], shown["colour"], mood, HERO_X, HERO_Y, HERO_SCALE)
    if "helper" in shown:
        helper = shown["helper"]
        panel.character(helper, NATURAL[helper], mood, HELPER_X, HELPER_Y, HELPER_SCALE, flip=-1)
    panel.props(props, front=True)
    if scene.thought:
        panel.put(BUBBLE, OBJECT_X, OBJECT_Y - BUBBLE_LIFT, BUBBLE_SCALE)
    if "object" in shown:
        y = OBJECT_Y - BUBBLE_LIFT if scene.thought else OBJECT_Y
        panel.put(OBJECTS[shown["object"]], OBJECT_X, y, OBJECT_SCALE)
    if scene.mark:
        panel.put(*scene.mark)
    return panel.canvas.image.reduce(SUPERSAMPLE)
