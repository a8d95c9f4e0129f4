"""Does a story tell of its line? A story for each of a hundred typed lines, whose nouns are marked in open_prompts.txt, and
of lines of another list. Prints the share of nouns that come back in the story behind the line (by a word that begins
like them), of first nouns, of stories that end with a sentence's end, the share of 4-grams that repeat within a story
and that are distinct over all, and of stories with a run of twelve words copied from training. --constant writes the same
stories behind the constant prompt, without a storyboard.

    python tests/benchmarks/open_prompts.py --ckpt assets/storyteller/storyboard --data_root data/tales --output stories.txt
"""

import argparse
import dataclasses
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import story_generative_model as sgm


def read_prompts(path: Path) -> list[tuple[str, list[str]]]:
    """Each line without its marks, and its marked nouns."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    return [(line.replace("*", ""), re.findall(r"\*(\w+)\*", line.lower())) for line in lines]


def comes_back(noun: str, text: str) -> bool:
    stem = noun[: max(3, len(noun) - 1)] if len(noun) > 3 else noun
    return sgm.has_word(set(sgm.words_of(text)), stem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default=str(sgm.EMBEDDED["storyteller"]))
    parser.add_argument("--prompts", default=str(Path(__file__).with_name("open_prompts.txt")))
    parser.add_argument("--data_root", default="data", help="of the training stories, for copies")
    parser.add_argument("--lm_model", help="where the language model lies")
    parser.add_argument("--num_storyboards", type=int, help="drawn for each line")
    parser.add_argument("--constant", action="store_true", help="without a storyboard")
    parser.add_argument("--count", type=int, help="only the first lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="file for the stories")
    args = parser.parse_args()
    sgm.quiet_libraries()
    checkpoint = sgm.load_checkpoint(args.ckpt)
    given = {name: getattr(args, name) for name in ("lm_model", "num_storyboards")}
    given = {name: value for name, value in given.items() if value}
    config = dataclasses.replace(checkpoint["config"], **given)
    model = sgm.load_model(checkpoint, config, *sgm.pick_device(), paints=False)
    prompts, stories, started = read_prompts(Path(args.prompts))[: args.count], [], time.time()
    for part in sgm.progress_bar(sgm.batched(list(range(len(prompts))), 10)):
        lines, seeds = [prompts[place][0] for place in part], [args.seed + place for place in part]
        if args.constant:
            soft = model.soft_prompt.constant_prompt(len(part))
            openings = [sgm.opening(line) for line in lines] if config.story_template else lines
            stories += model.lm.generate_text(soft, openings, config, seeds)
        else:
            stories += sgm.write_stories(model, config, lines, seeds, [[]] * len(part))[1]
    behind = [story[len(line) :] for story, (line, _) in zip(stories, prompts)]
    found = [
        [comes_back(noun, text) for noun in nouns] for text, (_, nouns) in zip(behind, prompts)
    ]
    nouns = [one for story in found for one in story]
    words = [sgm.words_of(story) for story in stories]
    grams = [list(zip(*(story[start:] for start in range(4)))) for story in words]
    everything = [gram for story in grams for gram in story]
    repeated = [1 - len(set(story)) / max(len(story), 1) for story in grams]
    ends = [bool(re.search(rf"[.!?]{sgm.CLOSING}$", story.strip())) for story in stories]
    figures = {
        "nouns that come back": sum(nouns) / max(len(nouns), 1),
        "first nouns": sum(story[0] for story in found if story) / max(sum(map(bool, found)), 1),
        "whole sentences at the end": sum(ends) / len(ends),
        "repeated 4-grams in a story": sum(repeated) / len(repeated),
        "distinct 4-grams over all": len(set(everything)) / len(everything),
        "words in a story": sum(map(len, words)) / len(words),
    }
    try:
        rows = sgm.read_rows(args.data_root, "train")
        corpus = "\n".join(f" {' '.join(sgm.words_of(row.story))} " for row in rows)
        copies = [sgm.longest_copy(text, corpus) >= 12 for text in behind]
        figures["with 12 words copied"] = sum(copies) / len(copies)
    except sgm.StoryError as error:
        print(f"copies are left out: {error}", file=sys.stderr)
    print(f"{len(stories)} stories in {time.time() - started:.0f} s")
    for name, value in figures.items():
        print(f"{name:28} {value:.3f}")
    if args.output:
        Path(args.output).write_text("\n\n".join(stories), "utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main()
