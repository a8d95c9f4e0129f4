"""What a text or a picture shows, as labels, and the reader of pictures that tells it.

    reader = load_reader("reader.safetensors")
    reader(pictures)["things"]  # (B, 3, 128, 128) float in [0, 1] -> logits (B, N)

`train.py` trains it on drawn scenes, also on such as look painted, and `card.py` measures by it: so
"the picture shows the text" is a number.

Shapes: B pictures in a batch, E width, N things, P places.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from figures import MOODS
from people import COLOURS
from places import HAS_TIME, HAS_WEATHER, PLACES, TIMES, WEATHERS
from scenes import RELATIONS, Scene
from things import THINGS
from torch import Tensor, nn
from train_backbones import NOT_SHOWN, Run, to_signal

THING_NAMES = tuple(THINGS)
FACTORS = {
    "place": tuple(PLACES),
    "time": TIMES,
    "weather": WEATHERS,
    "colour": ("own", *COLOURS),
    "mood": ("quiet", *MOODS),
    "relation": ("none", *RELATIONS),
}
UNSAID = ("colour", "mood", "relation")  # their first value is not counted: no text says it
CHANNELS = (32, 64, 128, 192, 256)
WIDTH, VIEWS, PLACES_A_SIDE = 384, 8, 8
RARE = -5.0  # a thing's logit at the start
READING_BATCH = 32


def labels_of(scene: Scene) -> tuple[np.ndarray, dict[str, int]]:
    """Which things a scene shows (N,) in 0 and 1, and the class of each factor, NOT_SHOWN where it
    has none.
    """
    things = np.zeros(len(THING_NAMES), np.float32)
    for one in scene.shown:
        things[THING_NAMES.index(one.thing)] = 1
    hero = scene.shown[0]
    values = dict(
        place=scene.place,
        time=scene.time,
        weather=scene.weather,
        colour=hero.colour or "own",
        mood=hero.mood or "quiet",
        relation=scene.relation or "none",
    )
    known = dict(
        time=scene.place in HAS_TIME,
        weather=scene.place in HAS_WEATHER,
        mood=THINGS[hero.thing].is_being,
    )
    classes = {
        key: FACTORS[key].index(value) if known.get(key, True) else NOT_SHOWN
        for key, value in values.items()
    }
    return things, classes


class Heads(nn.Module):
    """Features (B, E, P) at P places to logits of the things (B, N) and of each factor (B, values);
    a text is one place.

    A thing is read where it stands: its logits at all places are pooled by log-sum-exp, a smooth
    maximum. The factors are read off features that learned attention over the places has gathered.
    """

    def __init__(self, width: int, places: int = 1) -> None:
        super().__init__()
        views = min(places, VIEWS)
        self.sizes = [len(values) for values in FACTORS.values()]
        self.things = nn.Linear(width, len(THING_NAMES))
        nn.init.constant_(self.things.bias, RARE - math.log(places))
        self.attention = nn.Linear(width, views)
        self.factors = nn.Linear(views * width, sum(self.sizes))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        rows = features.transpose(1, 2)  # (B, P, E)
        seen = self.attention(rows).softmax(1).transpose(1, 2) @ rows  # (B, views, E)
        factors = self.factors(seen.flatten(1)).split(self.sizes, dim=1)
        return {"things": self.things(rows).logsumexp(1), **dict(zip(FACTORS, factors))}


def losses(
    logits: dict[str, Tensor], things: Tensor, classes: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Binary cross-entropy of the things, summed over them, and cross-entropy of every factor, nats
    a picture.
    """
    parts = {
        "things": F.binary_cross_entropy_with_logits(
            logits["things"].float(), things, reduction="sum"
        )
        / len(things)
    }
    for factor in FACTORS:
        wanted = classes[factor]
        total = F.cross_entropy(
            logits[factor].float(), wanted, ignore_index=NOT_SHOWN, reduction="sum"
        )
        parts[factor] = total / (wanted != NOT_SHOWN).sum().clamp(min=1)
    return {"loss": sum(parts.values()), **parts}


def batch_labels(scenes: list[Scene], device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """labels_of a batch: (B, N) float32, and (B,) long for each factor."""
    things, classes = zip(*(labels_of(scene) for scene in scenes))
    columns = {
        factor: torch.tensor([one[factor] for one in classes], device=device) for factor in FACTORS
    }
    return torch.from_numpy(np.stack(things)).to(device), columns


def accuracy(logits: dict[str, Tensor], scenes: list[Scene]) -> dict[str, float]:
    """Share of scenes of which all things rank first among N (by their number), and of factors that
    are right.
    """
    things, classes = batch_labels(scenes, logits["things"].device)
    figures: dict[str, float] = {}
    ranked = logits["things"].argsort(1, descending=True)
    for number, key in ((1, "one thing"), (2, "two things"), (3, "three things")):
        rows = (things.sum(1) == number).nonzero()[:, 0]
        right = [bool(things[row, ranked[row, :number]].all()) for row in rows]
        if right:
            figures[key] = float(np.mean(right))
    for factor in FACTORS:
        shown = classes[factor] != NOT_SHOWN
        if factor in UNSAID:
            shown &= classes[factor] != 0
        if shown.any():
            figures[factor] = (
                (logits[factor].argmax(1) == classes[factor])[shown].float().mean().item()
            )
    return figures


class PictureReader(nn.Module):
    """Pictures (B, 3, 128, 128) in [0, 1] to the logits of Heads, by the features of two scales at
    8 x 8 places, each of which knows where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for before, after in pairwise((3, *CHANNELS)):
            layers = convolved(before, after, 3, stride=2)
            layers += convolved(after, after, 3) if before > 3 else []
            self.stages.append(nn.Sequential(*layers))
        self.places = nn.Parameter(torch.zeros(1, WIDTH, PLACES_A_SIDE, PLACES_A_SIDE))
        self.joined = nn.Conv2d(sum(CHANNELS[-2:]), WIDTH, 1)
        self.mixed = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.ReLU(), *convolved(WIDTH, WIDTH, 1))
        self.heads = Heads(WIDTH, PLACES_A_SIDE**2)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        maps = [pictures * 2 - 1]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        near, wide = maps[-2], F.interpolate(maps[-1], scale_factor=2)
        features = self.mixed(self.joined(torch.cat([near, wide], 1)) + self.places)
        return self.heads(features.flatten(2))


def convolved(before: int, after: int, size: int, stride: int = 1) -> list[nn.Module]:
    """A convolution with its normalisation and nonlinearity."""
    layer = nn.Conv2d(before, after, size, stride=stride, padding=size // 2, bias=False)
    return [layer, nn.BatchNorm2d(after), nn.ReLU()]


MOST_SHIFT, MOST_SCALE = 0.15, 0.15  # of half a side; of the size


def moved(pictures: Tensor) -> Tensor:
    """Each of the pictures (B, 3, 128, 128) shifted and scaled by chance: a reader that sees a
    picture twenty times learns what it shows, and not the picture."""
    count = len(pictures)
    lot = torch.rand(count, 3, device=pictures.device) * 2 - 1
    theta = torch.zeros(count, 2, 3, device=pictures.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + MOST_SCALE * lot[:, 0]
    theta[:, :, 2] = MOST_SHIFT * lot[:, 1:]
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def read_pictures(run: Run, reader: PictureReader, pictures: np.ndarray) -> dict[str, Tensor]:
    """Logits of pictures (B, 128, 128, 3) uint8."""
    parts = [pictures[i : i + READING_BATCH] for i in range(0, len(pictures), READING_BATCH)]
    logits = [reader((to_signal(part, run.device) + 1) / 2) for part in parts]
    return {key: torch.cat([one[key] for one in logits]) for key in logits[0]}


def save_reader(reader: PictureReader, path: Path) -> None:
    """fp16 safetensors."""
    from safetensors.torch import save_file

    state = reader.state_dict()
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, path)


def load_reader(path: Path) -> PictureReader:
    """The reader saved at `path`, fp32, in eval mode."""
    from safetensors.torch import load_file

    reader = PictureReader()
    state = load_file(path)
    reader.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return reader.eval()
