"""A probe that reads a story's factors off a picture: it turns "the picture shows the story" into a number.

    probe = load_probe("assets/storyworld/probe.safetensors")
    probe.read(pictures)  # (B, 3, 128, 128) float in [0, 1] -> [{"species": "owl", "colour": "blue", ...}, ...]

`train_backbones.py` trains it on drawn panels, also on such as look generated, and measures it on others.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch
import world
from torch import Tensor, nn

CHANNELS = (24, 48, 64, 96, 96)


class Probe(nn.Module):
    """Pictures (B, 3, 128, 128) in [0, 1] to logits, one (B, values) per factor; values in
    world.FACTORS' order."""

    def __init__(self, heads: dict[str, int]) -> None:
        super().__init__()
        self.heads = dict(heads)
        widths = (3, *CHANNELS)
        blocks = [
            nn.Sequential(
                nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()
            )
            for a, b in pairwise(widths)
        ]
        self.features = nn.Sequential(
            *blocks, nn.Flatten()
        )  # 4 x 4 places: where a thing is counts
        self.readout = nn.Linear(16 * widths[-1], sum(heads.values()))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        logits = self.readout(self.features(pictures * 2 - 1))
        return dict(zip(self.heads, logits.split(list(self.heads.values()), dim=1)))

    @torch.no_grad()
    def read(self, pictures: Tensor) -> list[dict[str, str]]:
        """The likeliest value of every factor of each picture."""
        best = {factor: logits.argmax(1).tolist() for factor, logits in self(pictures).items()}
        return [{f: world.FACTORS[f][best[f][i]] for f in best} for i in range(len(pictures))]


def save_probe(probe: Probe, path: Path) -> None:
    """fp16 safetensors with the heads' sizes in the metadata."""
    from safetensors.torch import save_file

    state = {
        k: v.half().contiguous() if v.is_floating_point() else v
        for k, v in probe.state_dict().items()
    }
    save_file(state, path, {"heads": json.dumps(probe.heads)})


def load_probe(path: str | Path) -> Probe:
    """The probe saved at `path`, fp32, in eval mode."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        probe = Probe(json.loads(file.metadata()["heads"]))
        probe.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 (not a dict)
    return probe.float().eval()
