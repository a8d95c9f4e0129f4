"""Does the picture listen to the storyboard? On held-out storyworld panels whose own text names neither the hero's
colour nor its species, so that a picture of the hero needs the rest of the story.

    python tests/benchmarks/image_condition.py --ckpt checkpoints/image_condition/ckpt_500.pt --data_root data

Prints, for a checkpoint trained with `--image_condition storyboard`: the denoising error on common noise with the
panel's text alone, with its own storyboard, with another story's, and with a text that goes on to name the hero, which
is all that a storyboard could say; how often a probe reads the hero's colour and species off the pictures that are
painted under each; and how far the codes tell colour and species at all.
"""

import argparse
import re
import sys
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "assets" / "storyworld")]

from probe import load_probe  # noqa: E402

import story_generative_model as sgm  # noqa: E402

HERO = ("species", "colour")
HERO_NAMED = "The {colour} {species}."


def silent_panels(rows: list[sgm.Row], count: int) -> list[tuple[int, sgm.Panel]]:
    """(row, panel) of panels that do not name their hero, a panel of each story and the beats in turn."""
    found = []
    for number, row in enumerate(rows):
        names = re.compile("|".join(row.factors[name] for name in HERO), re.IGNORECASE)
        panels = [panel for panel in row.panels if not names.search(panel.text)]
        if panels and len(found) < count:
            found.append((number, panels[number % len(panels)]))
    return found


def share_below(better: np.ndarray, worse: np.ndarray, pick) -> float:
    return 1 - better[pick].mean() / worse[pick].mean()


def told_by_codes(rows: list[sgm.Row], codes: torch.Tensor, factor: str) -> float:
    """Share of stories whose factor is the commonest among those with the same code, in the slot that tells it best."""
    shares = []
    for slot in range(sgm.NUM_SLOTS):
        found = defaultdict(Counter)
        for row, code in zip(rows, codes[:, slot].tolist()):
            found[code][row.factors[factor]] += 1
        shares.append(sum(max(counts.values()) for counts in found.values()) / len(rows))
    return max(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data_root", default="data")
    parser.add_argument("--count", type=int, default=128, help="panels")
    parser.add_argument("--draws", type=int, default=4, help="noises and timesteps for each panel")
    arguments = parser.parse_args()

    sgm.quiet_libraries()
    checkpoint = sgm.load_checkpoint(arguments.ckpt)
    config = checkpoint["config"]
    if config.image_condition != "storyboard":
        parser.error("the checkpoint was not trained with --image_condition storyboard")
    model = sgm.load_model(checkpoint, config, *sgm.pick_device())
    rows = sgm.read_rows(arguments.data_root, "val")
    chosen = silent_panels(rows, arguments.count)
    probe = load_probe(ROOT / "assets" / "storyworld" / "probe.safetensors")
    learned, size = model.image_condition, 32
    errors, right = {}, {}
    with torch.no_grad():
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            vectors = model.encoder.quantizer.look_up(model.codes_of([rows[number].story for number, _ in part]))
            texts = [panel.text for _, panel in part]
            pixels = [
                sgm.load_picture(Path(arguments.data_root, "val"), panel.image_path, model.diffusion.resolution, "")
                for _, panel in part
            ]
            moments = model.diffusion.encode_pictures(torch.stack(pixels))
            heard = model.diffusion.encode_texts(texts)
            naming = [f"{text} {HERO_NAMED.format(**rows[number].factors)}" for text, (number, _) in zip(texts, part)]
            named = model.diffusion.encode_texts(naming)
            conditions = {
                "own storyboard": (heard, vectors),
                "another's storyboard": (heard, vectors.roll(1, 0)),
                "text alone": (heard, None),
                "text that names the hero": (named, None),
            }
            for kind, (text, said) in conditions.items():
                model.image_condition = None if said is None else learned
                condition = model.condition(*text, said)
                draws = [
                    model.diffusion.nll(moments, *condition, sgm.seeded(9, start, d)) for d in range(arguments.draws)
                ]
                errors.setdefault(kind, []).append(torch.stack(draws).mean(0).numpy())
                pictures = model.diffusion.paint(*condition, config, list(range(start, start + len(part))))
                stacked = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures])
                for (number, _), read in zip(part, probe.read(stacked.permute(0, 3, 1, 2) / 255)):
                    hits = [read[name] == rows[number].factors[name] for name in HERO]
                    right.setdefault(kind, []).append([*hits, all(hits)])
    errors = {kind: np.concatenate(values) for kind, values in errors.items()}
    print(f"{len(chosen)} panels, {arguments.draws} draws of noise each")
    for kind, values in errors.items():
        species, colour, both = np.mean(right[kind], axis=0)
        print(f"{kind:26s} error {values.mean():.4f}   read: species {species:.2f} colour {colour:.2f} both {both:.2f}")
    pairs = [("own storyboard", "another's storyboard"), ("own storyboard", "text alone")]
    for better, worse in [*pairs, ("text that names the hero", "text alone")]:
        gain = partial(share_below, errors[better], errors[worse])
        low, high = sgm.bootstrap(gain, len(chosen))
        print(f"{better} below {worse}: {gain(slice(None)):.1%} [{low:.1%}, {high:.1%}]")
    everything = list(rows)
    codes = model.codes_of([row.story for row in everything]).cpu()
    for factor in everything[0].factors:
        chance = Counter(row.factors[factor] for row in everything).most_common(1)[0][1] / len(everything)
        print(
            f"{factor} is told by the best slot's code in {told_by_codes(everything, codes, factor):.2f} ({chance:.2f})"
        )


if __name__ == "__main__":
    main()
