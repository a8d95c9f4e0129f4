"""Make the painter from scratch: a small Stable Diffusion that paints open scenes and the storyworld's panels.

Every picture and caption is drawn here, from the open art that `sprites.py` fetches and from the storyworld. The run is
seeded, and a killed one goes on from its last checkpoint:

    python assets/painter/sprites.py                          # once: the art, into assets/painter/work
    python assets/painter/train.py                            # all stages
    python assets/painter/train.py --stages vae               # one stage
    python assets/painter/train.py --scale 0.01 --output_dir /tmp/out --work_dir /tmp/work      # a rehearsal

Stage   makes                                    from
vae     output_dir/diffusion/vae                 scenes, panels

Shapes: B pictures in a batch, L latent channels.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "storyworld")]

import train_backbones as backbones  # noqa: E402  (the loop, the checkpoints and the losses are the storyworld's)
from scenes import PICTURE, Illustrator, sample_scene  # noqa: E402
from sprites import Art  # noqa: E402
from train_backbones import Recipe, Run, fit, psnr, reconstruct, seed_of, to_signal  # noqa: E402

import world  # noqa: E402

# ----------------------------------------------------------------------------------------------------------
# Pictures
#
# Scenes are seeds: training takes them from 0 on, measuring from HELD_OUT on; the two never meet. A pool is a file of
# drawn pictures; a killed run draws only what is missing.
# ----------------------------------------------------------------------------------------------------------

HELD_OUT = 10**9
REPORT = HELD_OUT + 10**6  # seen by no training's checks either
LOG_SECONDS = 10


def illustrator(run: Run) -> Illustrator:
    return Illustrator(Art(run.work_dir / "sprites.zip"))


def draw_scenes(run: Run, count: int, first: int = 0) -> np.ndarray:
    """Pictures (count, 128, 128, 3) uint8 of the scenes from seed `first` on."""
    painter = illustrator(run)
    names = painter.names()
    return np.stack([np.asarray(painter.draw(sample_scene(first + i, names))) for i in range(count)])


def draw_panels(count: int, first: int = 0) -> np.ndarray:
    """A panel of each of `count` stories of the storyworld (count, 128, 128, 3) uint8, the beats in turn."""
    beats = len(world.BEATS)
    stories = [world.write_story(first + i) for i in range(count)]
    return np.stack([np.asarray(world.draw_panel(story, i % beats, PICTURE)) for i, story in enumerate(stories)])


def pool(run: Run, name: str, count: int, draw) -> np.memmap:
    """The first `count` pictures of a kind (count, 128, 128, 3) uint8, drawn once in parts: draw(count, first)."""
    path = run.work_dir / f"{name}.u8"
    pictures = backbones.open_map(path, (count, PICTURE, PICTURE, 3), np.uint8)
    marks = backbones.open_map(path.with_suffix(".marks"), (count,), np.uint8)
    printed = time.monotonic()
    for start in range(0, count, POOL_PART):
        part = slice(start, min(start + POOL_PART, count))
        if not marks[part].all():
            pictures[part] = draw(part.stop - part.start, start)
            marks[part] = 1
        if time.monotonic() - printed >= LOG_SECONDS:
            printed = time.monotonic()
            print(f"[{name}] {part.stop}/{count} drawn", flush=True)
    return pictures


POOL_PART = 100

# ----------------------------------------------------------------------------------------------------------
# Autoencoder
#
# AutoencoderKL, 128 px RGB to 4 channels of 32 x 32 latents (f4): the study's figures chose it over 8 and 16 channels of
# 16 x 16 (README). All parts learn on 64 px crops where there is something to see; then the decoder alone on whole
# pictures, where its group norms see what they will see later.
# ----------------------------------------------------------------------------------------------------------

VAE_SHAPE = dict(
    block_out_channels=(32, 64, 96),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    mid_block_add_attention=False,  # convolutional throughout, so that crops and pictures share one network
    sample_size=PICTURE,
)
VAE_SCENES, VAE_PANELS = 6000, 2000
VAE_CROP, VAE_BATCH = 64, 8  # px; crops in a step
VAE_RECIPE = Recipe(steps=12_000, learning_rate=1.2e-3, muon_rate=2.4e-3, weight_decay=0.0, ema_decay=0.998)
DECODER_RECIPE = Recipe(steps=3000, learning_rate=6e-4, muon_rate=1.5e-3, weight_decay=0.0, ema_decay=0.998)
CHECK_PICTURES = 64  # held-out scenes; a quarter as many panels
CHECKS = 40  # held-out figures in one run


def new_vae(run: Run):
    """A fresh autoencoder; tensors that the storyworld's has in the same shape start as its are."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed_of(run.seed, "painter vae"))
    vae = AutoencoderKL(**VAE_SHAPE)
    known = AutoencoderKL.from_pretrained(HERE.parent / "storyworld" / "diffusion" / "vae", torch_dtype=torch.float32)
    known, own = known.state_dict(), vae.state_dict()
    for key, tensor in own.items():
        there = known.get(one_block_up(key))
        if there is not None and there.shape == tensor.shape:
            own[key] = there
    vae.load_state_dict(own)
    nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels :], backbones.VAE_LOG_VARIANCE)
    return vae.to(run.device)


def one_block_up(key: str) -> str:
    """The storyworld's name of a tensor: its decoder has one block more before those at full size."""
    parts = key.split(".")
    if parts[:2] == ["decoder", "up_blocks"]:
        parts[2] = str(int(parts[2]) + 1)
    return ".".join(parts)


def draw_crops(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """VAE_BATCH crops (VAE_BATCH, 64, 64, 3) uint8; of two drawn for each, the one with more to see."""
    places = (PICTURE - VAE_CROP) // 4 + 1  # at multiples of the latents' stride

    def one() -> np.ndarray:
        y, x = 4 * rng.integers(places, size=2)
        return pictures[rng.integers(len(pictures)), 0, y : y + VAE_CROP, x : x + VAE_CROP]

    return np.stack([max(one(), one(), key=backbones.detail) for _ in range(VAE_BATCH)])


def mixture(run: Run) -> np.ndarray:
    """The training pictures (N, 1, 128, 128, 3) uint8: scenes, then panels."""
    scenes = pool(run, "scenes", run.scaled(VAE_SCENES, 20), lambda count, first: draw_scenes(run, count, first))
    panels = pool(run, "panels", run.scaled(VAE_PANELS, 8), draw_panels)
    return np.concatenate([scenes, panels])[:, None]


def train_vae(run: Run) -> None:
    """Stage vae: saved in fp16 to output_dir/diffusion/vae."""
    pictures = mixture(run)
    scenes = draw_scenes(run, run.scaled(CHECK_PICTURES, 4), HELD_OUT)
    panels = draw_panels(run.scaled(CHECK_PICTURES // 4, 2), HELD_OUT)
    vae = new_vae(run)

    def signal(name: str, step: int, draw):
        return to_signal(draw(np.random.default_rng(seed_of(run.seed, name, step))), run.device)

    def crop_losses(step: int) -> dict:
        return backbones.vae_losses(vae, signal("crops", step, lambda rng: draw_crops(pictures, rng)))

    def whole_losses(step: int) -> dict:
        draw = lambda rng: backbones.draw_whole(pictures, backbones.DECODER_BATCH, rng)  # noqa: E731
        return backbones.decoder_losses(vae, signal("whole", step, draw))

    def held_out(model) -> dict[str, float]:
        return {"scenes PSNR dB": psnr(scenes, reconstruct(run, model, scenes)),
                "panels PSNR dB": psnr(panels, reconstruct(run, model, panels))}  # fmt: skip

    vae = fit(run, "vae", vae, scaled(VAE_RECIPE, run), crop_losses, held_out, CHECKS)
    vae.requires_grad_(True)
    vae.register_to_config(scaling_factor=backbones.measure_scaling(run, vae, pictures))
    backbones.save_half(vae, run.output_dir / "diffusion" / "vae")  # its latents are final: the UNet may start on them
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    tuned = fit(run, "vae_decoder", vae, scaled(DECODER_RECIPE, run), whole_losses, held_out, CHECKS // 4)
    backbones.save_half(tuned, run.output_dir / "diffusion" / "vae")


def scaled(recipe: Recipe, run: Run) -> Recipe:
    return backbones.scaled_recipe(recipe, run.scaled(recipe.steps))


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------

STAGES = {"vae": train_vae}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the painter of open scenes.")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to make")
    parser.add_argument("--work_dir", type=Path, default=HERE / "work", help="sprites.zip, checkpoints, drawn pictures")
    parser.add_argument("--output_dir", type=Path, default=HERE, help="the finished weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--scale", type=float, default=1.0, help="times all step and example counts, for rehearsals")
    parser.add_argument("--mixed_precision", choices=("auto", "bf16", "no"), default="auto", help="auto: bf16 where the device has it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    device = backbones.choose_device(arguments.device)
    precision = arguments.mixed_precision
    bf16 = backbones.has_bf16(device) if precision == "auto" else precision == "bf16"
    run = Run(arguments.work_dir, arguments.output_dir, arguments.seed, arguments.scale, device, bf16)
    run.work_dir.mkdir(parents=True, exist_ok=True)
    backbones.quiet_libraries()
    for stage in arguments.stages:
        if stage != "card" and run.done(stage).exists():
            print(f"[{stage}] finished before ({run.done(stage)})", flush=True)
            continue
        start = time.monotonic()
        STAGES[stage](run)
        backbones.write_atomically(run.done(stage), lambda partial: partial.write_text("done\n"))
        print(f"[{stage}] finished in {backbones.clock(time.monotonic() - start)}", flush=True)


if __name__ == "__main__":
    main()
