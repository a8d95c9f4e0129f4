"""Does a typed word come where it was pinned? For each line of open_prompts.txt a story in which one slot, the slots in
turn, is pinned to the first noun of another line. Prints the share of stories in which that slot's chunk has the word (or
one that begins with it), and of stories that have it anywhere behind the line: for nouns that a code says, and for others
that are one token of the language model, which stand in the prompt as their own embeddings.

    python tests/benchmarks/pinned_words.py
"""

import argparse
from pathlib import Path

import torch
from open_prompts import comes_back, read_prompts

import story_generative_model as sgm


def find_nouns(model, lines: list[tuple[str, list[str]]]) -> list[tuple[str, str, bool]]:
    """(line, a noun of a later line that it does not name, whether a code says it)."""
    found = []
    for place, (line, _) in enumerate(lines):
        for _, nouns in lines[place + 1 :] + lines[:place]:
            noun = nouns[0] if nouns else ""
            if noun and not comes_back(noun, line) and model.lm.word_token(noun) is not None:
                (code, *_) = sgm.find_codes(model, [noun])
                found.append((line, noun, code < model.prior.num_codes))
                break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default=str(sgm.EMBEDDED["storyteller"]))
    parser.add_argument("--prompts", default=str(Path(__file__).with_name("open_prompts.txt")))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sgm.quiet_libraries()
    checkpoint = sgm.load_checkpoint(args.ckpt)
    config = checkpoint["config"]
    model = sgm.load_model(checkpoint, config, *sgm.pick_device(), paints=False)
    jobs = find_nouns(model, read_prompts(Path(args.prompts)))
    in_part, anywhere = {True: [], False: []}, {True: [], False: []}
    for part in sgm.progress_bar(sgm.batched(list(enumerate(jobs)), 10)):
        lines, seeds = [line for _, (line, *_) in part], [args.seed + place for place, _ in part]
        slots = [place % sgm.NUM_SLOTS for place, _ in part]
        pinned = [
            [noun if one == slot else None for one in range(sgm.NUM_SLOTS)]
            for slot, (_, (_, noun, _)) in zip(slots, part)
        ]
        _, stories = sgm.write_stories(model, config, lines, seeds, pinned)
        for story, slot, (_, (line, noun, said)) in zip(stories, slots, part):
            in_part[said].append(sgm.has_word(sgm.chunk_words(model, story)[slot], noun))
            anywhere[said].append(comes_back(noun, story[len(line) :]))
    for said, kind in ((True, "that a code says"), (False, "that no code says")):
        count = max(len(in_part[said]), 1)
        shares = f"{sum(in_part[said]) / count:.2f} in its part"
        print(f"nouns {kind:18} {shares}, {sum(anywhere[said]) / count:.2f} anywhere ({count})")


if __name__ == "__main__":
    with torch.no_grad():
        main()
