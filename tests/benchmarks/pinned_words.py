"""Does a typed word come where it was pinned? For each line of open_prompts.txt a story in which one slot, the slots in
turn, is pinned to the first noun of another line. Prints the share of stories in which that slot's chunk has the word (or
one that begins with it), and of stories that have it anywhere behind the line: for nouns that a code says, and for others
that are one token of the language model, which stand in the prompt as their own embeddings.

    python tests/benchmarks/pinned_words.py
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from open_prompts import comes_back, read_prompts

import story_generative_model as sgm


class Job(NamedTuple):
    line: str
    noun: str
    slot: int
    seed: int


def list_jobs(model, lines: list[tuple[str, list[str]]], seed: int) -> list[Job]:
    """Each line with the first noun of the next line that has one which it does not name."""
    jobs = []
    for place, (line, _) in enumerate(lines):
        others = (nouns[0] for _, nouns in lines[place + 1 :] + lines[:place] if nouns)
        known = (noun for noun in others if model.lm.word_token(noun) is not None)
        noun = next((noun for noun in known if not comes_back(noun, line)), None)
        if noun:
            jobs.append(Job(line, noun, len(jobs) % sgm.NUM_SLOTS, seed + len(jobs)))
    return jobs


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
    words = {word.lower() for word in model.code_words(range(model.prior.num_codes))}
    found = {"that a code says": [], "that no code says": []}  # (in its part, anywhere)
    jobs = list_jobs(model, read_prompts(Path(args.prompts)), args.seed)
    for part in sgm.progress_bar(sgm.batched(jobs, 10)):
        pinned = [
            [None] * job.slot + [job.noun] + [None] * (sgm.NUM_SLOTS - 1 - job.slot) for job in part
        ]
        lines, seeds = [job.line for job in part], [job.seed for job in part]
        _, stories = sgm.write_stories(model, config, lines, seeds, pinned)
        for job, story in zip(part, stories):
            in_part = sgm.has_word(sgm.chunk_words(model, story)[job.slot], job.noun)
            kind = "that a code says" if job.noun in words else "that no code says"
            found[kind].append((in_part, comes_back(job.noun, story[len(job.line) :])))
    for kind, each in found.items():
        in_part, anywhere = (sum(one) / max(len(each), 1) for one in zip(*each, (0, 0)))
        print(f"nouns {kind:18} {in_part:.2f} in its part, {anywhere:.2f} anywhere ({len(each)})")


if __name__ == "__main__":
    with torch.no_grad():
        main()
