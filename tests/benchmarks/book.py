"""Is it the same hero on every page? Books of eight panels from prompts of held-out stories, read by a probe.

    python tests/benchmarks/book.py --count 100

Prints, for each --panel_consistency, in what share of neighbouring panels and of whole books the probe reads the same
species and colour, and in what share of panels it reads those that the prompt's story has.
"""

import argparse
import dataclasses
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "assets" / "storyworld")]

import world  # noqa: E402
from probe import load_probe  # noqa: E402

import story_generative_model as sgm  # noqa: E402

HERO = ("species", "colour")
FIRST_SEED = 1_002_000_000  # stories that no training and no other figure has seen


def naming_prompts(count: int) -> list[world.Story]:
    """Stories whose prompt names the hero's species and colour."""
    found, seed = [], FIRST_SEED
    while len(found) < count:
        story = world.write_story(seed)
        found += [story] * all(story.factors[name] in story.prompt for name in HERO)
        seed += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default=str(sgm.EMBEDDED["storyworld"]))
    parser.add_argument("--count", type=int, default=100, help="books")
    parser.add_argument("--consistency", nargs="+", default=["off", "noise", "attention"])
    arguments = parser.parse_args()

    sgm.quiet_libraries()
    checkpoint = sgm.load_checkpoint(arguments.ckpt)
    model = sgm.load_model(checkpoint, checkpoint["config"], *sgm.pick_device())
    probe = load_probe(ROOT / "assets" / "storyworld" / "probe.safetensors")
    stories = naming_prompts(arguments.count)
    print(
        "| --panel_consistency | neighbouring panels alike | whole books alike | panels with the prompt's hero |"
    )
    print("|---|---|---|---|")
    for consistency in arguments.consistency:
        config = dataclasses.replace(checkpoint["config"], panels=8, panel_consistency=consistency)
        neighbours, books, right = [], [], []
        for seed, story in enumerate(stories):
            (book,) = sgm.illustrate(model, config, [story.prompt], [seed])
            pixels = torch.stack([torch.from_numpy(np.array(panel.image)) for panel in book.panels])
            read = [
                tuple(one[name] for name in HERO)
                for one in probe.read(pixels.permute(0, 3, 1, 2) / 255)
            ]
            neighbours += [a == b for a, b in pairwise(read)]
            books.append(len(set(read)) == 1)
            right += [one == tuple(story.factors[name] for name in HERO) for one in read]
        shares = " | ".join(f"{np.mean(values):.2f}" for values in (neighbours, books, right))
        print(f"| {consistency} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
