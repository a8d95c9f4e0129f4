"""Make the painter from scratch: a small Stable Diffusion of open scenes and storyworld panels.

Every picture and caption is drawn here, from the open art that `sprites.py` fetches and from the
storyworld. The run is seeded, and a killed one goes on from its last checkpoint:

    python assets/painter/sprites.py             # once: the art, into assets/painter/work
    python assets/painter/train.py               # all stages
    python assets/painter/train.py --stages vae  # one stage
    python assets/painter/train.py --scale 0.01 --output_dir /tmp/out  # a rehearsal

Stage   makes                               from
vae     output_dir/diffusion/vae            scenes, panels
text    work_dir/text_encoder               captions, stories
unet    output_dir/diffusion (a pipeline)   captions, scenes, panels, vae, text
reader  output_dir/reader.safetensors       scenes, vae
card    output_dir/card.md, sheet.png       all of the above, on held-out scenes and captions
costs   (printed, when asked for)           the UNet's shape

Shapes: B pictures in a batch, L latent channels, T tokens, E width, N things.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "storyworld")]

import train_backbones as backbones  # noqa: E402  (loop, checkpoints and losses)
import world  # noqa: E402
from captions import caption  # noqa: E402
from figures import MOODS  # noqa: E402
from people import COLOURS  # noqa: E402
from places import HAS_TIME, HAS_WEATHER, PLACES, TIMES, WEATHERS  # noqa: E402
from scenes import PICTURE, RELATIONS, Illustrator, Scene, sample_scene  # noqa: E402
from sprites import Art  # noqa: E402
from things import KINDS, THINGS  # noqa: E402
from train_backbones import Recipe, Run, fit, psnr, reconstruct, seed_of, to_signal  # noqa: E402

# --------------------------------------------------------------------------------------------------
# Pictures
#
# Scenes are seeds: training takes them from 0 on, measuring from HELD_OUT on; the two never meet. A
# pool is a file of drawn pictures; a killed run draws only what is missing.
# --------------------------------------------------------------------------------------------------

HELD_OUT = 10**9
REPORT = HELD_OUT + 10**6  # seen by no training's checks either
LOG_SECONDS = 10


def illustrator(run: Run) -> Illustrator:
    return Illustrator(Art(run.work_dir / "sprites.zip"))


def draw_scenes(run: Run, count: int, first: int = 0) -> np.ndarray:
    """Pictures (count, 128, 128, 3) uint8 of the scenes from seed `first` on."""
    painter = illustrator(run)
    names = painter.names()
    return np.stack(
        [np.asarray(painter.draw(sample_scene(first + i, names))) for i in range(count)]
    )


def draw_panels(count: int, first: int = 0) -> np.ndarray:
    """A panel of each of `count` stories of the storyworld (count, 128, 128, 3) uint8, the beats in
    turn.
    """
    beats = len(world.BEATS)
    stories = [world.write_story(first + i) for i in range(count)]
    return np.stack(
        [np.asarray(world.draw_panel(story, i % beats, PICTURE)) for i, story in enumerate(stories)]
    )


def pool(run: Run, name: str, count: int, draw) -> np.memmap:
    """The first `count` pictures of a kind (count, 128, 128, 3) uint8, drawn once in parts:
    draw(count, first).
    """
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

# --------------------------------------------------------------------------------------------------
# Autoencoder
#
# AutoencoderKL, 128 px RGB to 4 channels of 32 x 32 latents (f4): the study's figures chose it over
# 8 and 16 channels of 16 x 16 (README). All parts learn on 64 px crops where there is something to
# see; then the decoder alone on whole pictures, where its group norms see what they will see later.
# --------------------------------------------------------------------------------------------------

VAE_SHAPE = dict(
    block_out_channels=(32, 64, 96),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    mid_block_add_attention=False,
    # convolutional throughout, so that crops and pictures share one network
    sample_size=PICTURE,
)
VAE_SCENES, VAE_PANELS = 6000, 2000
VAE_CROP, VAE_BATCH = 64, 8  # px; crops in a step
VAE_RECIPE = Recipe(
    steps=12_000, learning_rate=1.2e-3, muon_rate=2.4e-3, weight_decay=0.0, ema_decay=0.998
)
DECODER_RECIPE = Recipe(
    steps=3000, learning_rate=6e-4, muon_rate=1.5e-3, weight_decay=0.0, ema_decay=0.998
)
CHECK_PICTURES = 64  # held-out scenes; a quarter as many panels
CHECKS = 40  # held-out figures in one run


def new_vae(run: Run):
    """A fresh autoencoder; tensors that the storyworld's has in the same shape start as its are."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed_of(run.seed, "painter vae"))
    vae = AutoencoderKL(**VAE_SHAPE)
    known = AutoencoderKL.from_pretrained(
        HERE.parent / "storyworld" / "diffusion" / "vae", torch_dtype=torch.float32
    )
    known, own = known.state_dict(), vae.state_dict()
    for key, tensor in own.items():
        there = known.get(one_block_up(key))
        if there is not None and there.shape == tensor.shape:
            own[key] = there
    vae.load_state_dict(own)
    nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels :], backbones.VAE_LOG_VARIANCE)
    return vae.to(run.device)


def one_block_up(key: str) -> str:
    """The storyworld's name of a tensor: its decoder has one block more before the others."""
    parts = key.split(".")
    if parts[:2] == ["decoder", "up_blocks"]:
        parts[2] = str(int(parts[2]) + 1)
    return ".".join(parts)


def draw_crops(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """VAE_BATCH crops (VAE_BATCH, 64, 64, 3) uint8; of two drawn for each, the one with more to
    see.
    """
    places = (PICTURE - VAE_CROP) // 4 + 1  # at multiples of the latents' stride

    def one() -> np.ndarray:
        y, x = 4 * rng.integers(places, size=2)
        return pictures[rng.integers(len(pictures)), 0, y : y + VAE_CROP, x : x + VAE_CROP]

    return np.stack([max(one(), one(), key=backbones.detail) for _ in range(VAE_BATCH)])


def mixture(run: Run) -> np.ndarray:
    """The training pictures (N, 1, 128, 128, 3) uint8: scenes, then panels."""
    scenes = pool(
        run,
        "scenes",
        run.scaled(VAE_SCENES, 20),
        lambda count, first: draw_scenes(run, count, first),
    )
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
        return backbones.vae_losses(
            vae, signal("crops", step, lambda rng: draw_crops(pictures, rng))
        )

    def whole_losses(step: int) -> dict:
        def draw(rng: np.random.Generator) -> np.ndarray:
            return backbones.draw_whole(pictures, backbones.DECODER_BATCH, rng)

        return backbones.decoder_losses(vae, signal("whole", step, draw))

    def held_out(model) -> dict[str, float]:
        return {"scenes PSNR dB": psnr(scenes, reconstruct(run, model, scenes)),
                "panels PSNR dB": psnr(panels, reconstruct(run, model, panels))}  # fmt: skip

    vae = fit(run, "vae", vae, scaled(VAE_RECIPE, run), crop_losses, held_out, CHECKS)
    vae.requires_grad_(True)
    vae.register_to_config(scaling_factor=backbones.measure_scaling(run, vae, pictures))
    backbones.save_half(
        vae, run.output_dir / "diffusion" / "vae"
    )  # its latents are final: the UNet may start on them
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    tuned = fit(
        run, "vae_decoder", vae, scaled(DECODER_RECIPE, run), whole_losses, held_out, CHECKS // 4
    )
    backbones.save_half(tuned, run.output_dir / "diffusion" / "vae")


def scaled(recipe: Recipe, run: Run) -> Recipe:
    return backbones.scaled_recipe(recipe, run.scaled(recipe.steps))


# --------------------------------------------------------------------------------------------------
# Texts
#
# Captions of scenes, and stories of the storyworld up to a beat. A text encoder first learns to
# tell what a text names, as CLIP's own training does for Stable Diffusion: a UNet that gets
# meaningless states learns to paint without them.
# --------------------------------------------------------------------------------------------------

THING_NAMES = tuple(THINGS)
FACTORS = {"place": tuple(PLACES), "time": TIMES, "weather": WEATHERS, "colour": ("own", *COLOURS),
    "mood": ("quiet", *MOODS),
           "relation": ("none", *RELATIONS)}  # fmt: skip
NOT_SHOWN = backbones.NOT_SHOWN
VOCABULARY = 4096  # nearly every word of the tables is one or two tokens
TEXT_SHAPE = dict(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=6,
    max_position_embeddings=backbones.CLIP_WINDOW,
    projection_dim=192,
)
TEXT_BATCH = 64
TEXT_RECIPE = Recipe(steps=2500, learning_rate=1.5e-3, weight_decay=0.01)
PANEL_SHARE = 0.2  # of the storyworld in every batch
CAPTIONS_FOR_TOKENS = 20_000


def labels_of(scene: Scene) -> tuple[np.ndarray, dict[str, int]]:
    """Which things a scene shows (N,) in 0 and 1, and the class of each factor, NOT_SHOWN where it
    has none.
    """
    things = np.zeros(len(THING_NAMES), np.float32)
    for one in scene.shown:
        things[THING_NAMES.index(one.thing)] = 1
    hero = scene.shown[0]
    values = dict(place=scene.place, time=scene.time, weather=scene.weather,
        colour=hero.colour or "own",
                  mood=hero.mood or "quiet", relation=scene.relation or "none")  # fmt: skip
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
    """Features (B, E) to logits of the things (B, N) and of each factor (B, values)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(THING_NAMES), *(len(values) for values in FACTORS.values())]
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return dict(zip(("things", *FACTORS), self.linear(features).split(self.sizes, dim=1)))


def reading_losses(
    logits: dict[str, Tensor], things: Tensor, classes: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Binary cross-entropy of the things, summed over them, and cross-entropy of every factor, nats
    a picture.
    """
    losses = {
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
        losses[factor] = total / (wanted != NOT_SHOWN).sum().clamp(min=1)
    return {"loss": sum(losses.values()), **losses}


def batch_labels(scenes: list[Scene], device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """labels_of a batch: (B, N) float32, and (B,) long for each factor."""
    things, classes = zip(*(labels_of(scene) for scene in scenes))
    columns = {
        factor: torch.tensor([one[factor] for one in classes], device=device) for factor in FACTORS
    }
    return torch.from_numpy(np.stack(things)).to(device), columns


class TextReader(nn.Module):
    """The text encoder and heads on the mean of its states."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.heads = Heads(TEXT_SHAPE["hidden_size"])

    def forward(self, ids: Tensor, own: Tensor) -> dict[str, Tensor]:
        states, mask = backbones.text_states(self.text_encoder, ids, own)  # (B, W * 77, E)
        return self.heads(states.sum(1) / mask.sum(1, keepdim=True))


def new_text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **special, **TEXT_SHAPE))


def tokenizer_of_captions(run: Run, names: list[str]):
    """A CLIP tokenizer of VOCABULARY tokens, learned from captions and the storyworld's stories."""
    chance = random.Random(seed_of(run.seed, "tokens"))
    count = run.scaled(CAPTIONS_FOR_TOKENS, 400)
    texts = [caption(sample_scene(i, names), chance) for i in range(count)]
    texts += [world.write_story(i).text for i in range(count // 4)]
    return backbones.train_clip_tokenizer(iter(texts), VOCABULARY)


def train_text(run: Run) -> None:
    """Stage text: tokenizer and text encoder, saved to work_dir."""
    from transformers import CLIPTokenizer

    names = illustrator(run).names()
    if not (run.work_dir / "tokenizer").exists():
        tokenizer_of_captions(run, names).save_pretrained(run.work_dir / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(run.work_dir / "tokenizer")
    torch.manual_seed(seed_of(run.seed, "painter text"))
    reader = TextReader(new_text_encoder(tokenizer)).to(run.device)

    def batch(first: int, seed: int):
        rng = random.Random(seed)
        scenes = [sample_scene(first + i, names) for i in range(TEXT_BATCH)]
        ids, own = backbones.text_windows(tokenizer, [caption(scene, rng) for scene in scenes])
        return ids.to(run.device), own.to(run.device), scenes

    def losses_at(step: int) -> dict[str, Tensor]:
        ids, own, scenes = batch(step * TEXT_BATCH, seed_of(run.seed, "text batch", step))
        return reading_losses(reader(ids, own), *batch_labels(scenes, run.device))

    def held_out(model) -> dict[str, float]:
        ids, own, scenes = batch(HELD_OUT, 0)
        return reading_accuracy(model(ids, own), scenes)

    fit(run, "text", reader, scaled(TEXT_RECIPE, run), losses_at, held_out)
    reader.text_encoder.save_pretrained(run.work_dir / "text_encoder")


def reading_accuracy(logits: dict[str, Tensor], scenes: list[Scene]) -> dict[str, float]:
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
        if factor in ("colour", "mood", "relation"):
            shown &= classes[factor] != 0  # what goes without saying counts for nothing
        if shown.any():
            figures[factor] = (
                (logits[factor].argmax(1) == classes[factor])[shown].float().mean().item()
            )
    return figures


# --------------------------------------------------------------------------------------------------
# UNet
#
# Text encoder and UNet, trained as one to predict the noise in the latents of a picture from its
# text; the storyworld's loss and weights. Every picture is drawn and encoded once.
# --------------------------------------------------------------------------------------------------

LATENT_SIDE = PICTURE // 4
UNET_SHAPE = dict(
    sample_size=LATENT_SIDE,
    in_channels=4,
    out_channels=4,
    block_out_channels=(32, 96, 160, 224),
    layers_per_block=1,
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    # at 32 x 32 attention costs more than it gives
    up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    cross_attention_dim=TEXT_SHAPE["hidden_size"],
    attention_head_dim=4,  # diffusers' old name for the number of heads
    norm_num_groups=16,
)
UNET_SCENES, UNET_STORIES = 16_000, 500
UNET_BATCH = 32
UNET_RECIPE = Recipe(
    steps=40_000, learning_rate=8e-4, muon_rate=2e-3, weight_decay=0.01, ema_decay=0.999
)
UNET_CHECK = 64
# Settled by `--stages costs`: most of a UNet's cost is its first level, at 32 x 32, so that level
# is narrow and deaf.
UNET_WIDTHS = (
    (64, 128, 192),
    (64, 128, 192, 192),
    (32, 128, 192, 256),
    (32, 96, 192),
    (32, 96, 160, 224),
)


def print_costs(run: Run) -> None:
    """Stage costs: parameters, and GFLOP of a forward pass of one picture, by the UNet's widths."""
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    for widths in UNET_WIDTHS:
        deeper = len(widths) - 1
        unet = UNet2DConditionModel(**UNET_SHAPE | dict(
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * deeper,
            up_block_types=("CrossAttnUpBlock2D",) * deeper + ("UpBlock2D",),
        ))  # fmt: skip
        states = torch.zeros(1, backbones.CLIP_WINDOW, TEXT_SHAPE["hidden_size"])
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(torch.zeros(1, 4, LATENT_SIDE, LATENT_SIDE), torch.tensor([0]), states)
        parameters = sum(parameter.numel() for parameter in unet.parameters())
        print(
            f"| {widths} | {parameters / 1e6:.1f}M | {counter.get_total_flops() / 1e9:.2f} |",
            flush=True,
        )


def latent_pool(run: Run, name: str, count: int, draw) -> np.memmap:
    """Scaled latents (count, L, 32, 32) float16 of drawn pictures, each drawn and encoded once:
    draw(count, first).
    """
    vae = backbones.load_vae(run)
    path = run.work_dir / f"{name}_latents.f16"  # its marks are not those of the pictures
    latents = backbones.open_map(path, (count, 4, LATENT_SIDE, LATENT_SIDE), np.float16)
    marks = backbones.open_map(path.with_suffix(".marks"), (count,), np.uint8)
    printed = time.monotonic()
    for start in range(0, count, POOL_PART):
        part = slice(start, min(start + POOL_PART, count))
        if not marks[part].all():
            latents[part] = backbones.encode(run, vae, draw(part.stop - start, start)).cpu().numpy()
            marks[part] = 1
        if time.monotonic() - printed >= LOG_SECONDS:
            printed = time.monotonic()
            print(f"[{name}] {part.stop}/{count} encoded", flush=True)
    return latents


def draw_story_panels(count: int, first: int = 0) -> np.ndarray:
    """Panels from `first` on, eight to a story of the storyworld (count, 128, 128, 3) uint8."""
    beats = len(world.BEATS)
    return np.stack([np.asarray(world.draw_panel(world.write_story(i // beats), i % beats, PICTURE))
                     for i in range(first, first + count)])  # fmt: skip


def load_text(run: Run):
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(run.work_dir / "tokenizer")
    return tokenizer, CLIPTextModel.from_pretrained(run.work_dir / "text_encoder")


def train_unet(run: Run) -> None:
    """Stage unet: the pipeline goes to output_dir/diffusion."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    names, beats = illustrator(run).names(), len(world.BEATS)
    scenes = latent_pool(
        run,
        "scenes",
        run.scaled(UNET_SCENES, 40),
        lambda count, first: draw_scenes(run, count, first),
    )
    panels = latent_pool(run, "panels", beats * run.scaled(UNET_STORIES, 4), draw_story_panels)
    stories = [world.write_story(i) for i in range(len(panels) // beats)]
    tokenizer, text_encoder = load_text(run)
    scheduler = DDPMScheduler(**backbones.NOISE_SCHEDULE)
    torch.manual_seed(seed_of(run.seed, "painter unet"))
    painter = backbones.Painter(text_encoder, UNet2DConditionModel(**UNET_SHAPE)).to(run.device)

    def example(rng: random.Random) -> tuple[np.ndarray, str]:
        if rng.random() < PANEL_SHARE:
            story = rng.randrange(len(stories))
            text, beat = backbones.panel_text(stories[story], rng)
            return panels[story * beats + beat], text
        index = rng.randrange(len(scenes))
        return scenes[index], caption(sample_scene(index, names), rng)

    def losses_at(step: int) -> dict[str, Tensor]:
        rng = random.Random(seed_of(run.seed, "unet batch", step))
        latents, texts = zip(*(example(rng) for _ in range(UNET_BATCH)))
        heard = ["" if rng.random() < backbones.NO_TEXT_SHARE else text for text in texts]
        ids, own = (x.to(run.device) for x in backbones.text_windows(tokenizer, heard))
        clean = torch.from_numpy(np.stack(latents)).to(run.device).float()
        errors, weights = backbones.noise_errors(painter, scheduler, clean, ids, own)
        return {"loss": (weights * errors).mean(), "error": errors.mean()}

    check = UNetCheck(run, tokenizer, scheduler, names)
    backbones.save_pipeline(
        run,
        tokenizer,
        fit(run, "unet", painter, scaled(UNET_RECIPE, run), losses_at, check, CHECKS),
    )


class UNetCheck:
    """Held-out epsilon error with the scenes' own captions and with others': a painter that listens
    tells them apart.
    """

    def __init__(self, run: Run, tokenizer, scheduler, names: list[str]) -> None:
        self.run, self.scheduler = run, scheduler
        count, rng = run.scaled(UNET_CHECK, 8), random.Random(0)
        texts = [caption(sample_scene(HELD_OUT + i, names), rng) for i in range(count)]
        self.latents = backbones.encode(
            run, backbones.load_vae(run), draw_scenes(run, count, HELD_OUT)
        )
        self.own_text = [x.to(run.device) for x in backbones.text_windows(tokenizer, texts)]
        self.other_text = [x.roll(1, dims=0) for x in self.own_text]

    __call__ = backbones.PainterCheck.__call__


# --------------------------------------------------------------------------------------------------
# Reader of pictures
#
# Tells which things, place, time, weather, mood, colour and relation a picture shows, so that "the
# picture shows the text" is a number. It learns from drawn scenes, some of which have been through
# the autoencoder, some blurred or noisy.
# --------------------------------------------------------------------------------------------------

READER_BATCH = 32
READER_RECIPE = Recipe(steps=20_000, learning_rate=2e-3, weight_decay=0.01, ema_decay=0.999)
READER_CHANNELS = (32, 64, 128, 192, 256)
READER_CHECK = 256


class PictureReader(nn.Module):
    """Pictures (B, 3, 128, 128) in [0, 1] to the logits of Heads."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((3, *READER_CHANNELS)):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
            if before > 3:
                layers += [
                    nn.Conv2d(after, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                ]
        self.features = nn.Sequential(*layers)
        self.heads = Heads(3 * READER_CHANNELS[-1])

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.features(pictures * 2 - 1)  # (B, E, 4, 4)
        left, right = features.chunk(2, dim=3)  # the hero stands on the left
        return self.heads(
            torch.cat([left.mean((2, 3)), right.mean((2, 3)), features.amax((2, 3))], dim=1)
        )


def train_reader(run: Run) -> None:
    """Stage reader: saved in fp16 to output_dir/reader.safetensors."""
    from safetensors.torch import save_file

    names, vae = illustrator(run).names(), backbones.load_vae(run)
    count = run.scaled(UNET_SCENES, 40)
    pictures = pool(
        run,
        "scenes",
        run.scaled(VAE_SCENES, 20),
        lambda number, first: draw_scenes(run, number, first),
    )
    latents = latent_pool(
        run, "scenes", count, lambda number, first: draw_scenes(run, number, first)
    )
    checked = [sample_scene(HELD_OUT + i, names) for i in range(run.scaled(READER_CHECK, 8))]
    check_pixels = draw_scenes(run, len(checked), HELD_OUT)
    torch.manual_seed(seed_of(run.seed, "reader"))
    reader = PictureReader().to(run.device)

    def losses_at(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng(seed_of(run.seed, "reader batch", step))
        index = rng.integers(len(pictures), size=READER_BATCH)
        coded = (
            torch.from_numpy(latents[index[: backbones.PROBE_RECONSTRUCTED]]).to(run.device).float()
        )
        looks = backbones.look_generated(run, vae, to_signal(pictures[index], run.device), coded)
        scenes = [sample_scene(int(i), names) for i in index]
        return reading_losses(reader(looks), *batch_labels(scenes, run.device))

    def held_out(model) -> dict[str, float]:
        return reading_accuracy(model((to_signal(check_pixels, run.device) + 1) / 2), checked)

    fitted = fit(run, "reader", reader, scaled(READER_RECIPE, run), losses_at, held_out)
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in fitted.state_dict().items()
    }
    backbones.write_atomically(
        run.output_dir / "reader.safetensors", lambda partial: save_file(state, partial)
    )


# --------------------------------------------------------------------------------------------------
# Card
#
# Measures what was shipped on captions and scenes that no training saw, and writes the table and a
# sheet of pictures.
# --------------------------------------------------------------------------------------------------

CARD_SCENES = 512
CARD_BATCH = 32
GUIDANCE, SAMPLING_STEPS = 3.0, 10
SHEET_COLUMNS, SHEET_ROWS = 8, 4  # rows of pairs: drawn above painted
TARGETS = {"one thing": 0.85, "two things": 0.7, "colour": 0.9, "place": 0.95, "time": 0.95,
    "weather": 0.95, "mood": 0.7,
           "relation": 0.5}  # fmt: skip
CARD = """# The painter's figures

Printed by `python assets/painter/train.py --stages card`, on {scenes} scenes and captions from
seed {first:,} on, which no training saw: share of right readings by the reader of pictures, on
drawn scenes and on pictures painted from their captions ({steps} DPM-Solver++ steps, guidance
{guidance}). The autoencoder returns the drawn scenes at {psnr:.1f} dB PSNR.

| what | drawn | painted | target |
|---|---|---|---|
{rows}

| kind, one thing | drawn | painted |
|---|---|---|
{kinds}

![Drawn scenes above painted ones](sheet.png)
"""


@torch.no_grad()
def paint(run: Run, pipeline, texts: list[str]) -> np.ndarray:
    """A picture of each text (len(texts), 128, 128, 3) uint8, with classifier-free guidance; the
    seed is its number.
    """
    pictures = []
    for start in range(0, len(texts), CARD_BATCH):
        part = texts[start : start + CARD_BATCH]
        ids, own = (
            x.to(run.device)
            for x in backbones.text_windows(pipeline.tokenizer, [*part, *([""] * len(part))])
        )
        states, mask = backbones.text_states(pipeline.text_encoder, ids, own)
        noise = [
            torch.randn(
                1, 4, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(start + i)
            )
            for i in range(len(part))
        ]
        latents = torch.cat(noise).to(run.device)
        pipeline.scheduler.set_timesteps(SAMPLING_STEPS)
        for timestep in pipeline.scheduler.timesteps:
            with run.autocast():
                both = pipeline.unet(
                    torch.cat([latents, latents]), timestep, states, encoder_attention_mask=mask
                ).sample
            told, untold = both.float().chunk(2)
            latents = pipeline.scheduler.step(
                untold + GUIDANCE * (told - untold), timestep, latents
            ).prev_sample
        with run.autocast():
            pictures.append(
                backbones.to_pixels(
                    pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
                )
            )
    return np.concatenate(pictures)


def read_pictures(run: Run, reader: PictureReader, pictures: np.ndarray) -> dict[str, Tensor]:
    parts = [pictures[i : i + CARD_BATCH] for i in range(0, len(pictures), CARD_BATCH)]
    with torch.no_grad():
        logits = [reader((to_signal(part, run.device) + 1) / 2) for part in parts]
    return {key: torch.cat([one[key] for one in logits]) for key in logits[0]}


def load_reader(path: Path) -> PictureReader:
    from safetensors.torch import load_file

    reader = PictureReader()
    reader.load_state_dict(
        {
            key: value.float() if value.is_floating_point() else value
            for key, value in load_file(path).items()
        }
    )
    return reader.eval()


def kind_rows(scenes: list[Scene], columns: list[dict[str, Tensor]]) -> list[str]:
    """Table rows: how often a thing that is alone in its scene is read right, by its kind."""
    rows = []
    for kind in KINDS:
        chosen = [
            i
            for i, scene in enumerate(scenes)
            if len(scene.shown) == 1 and THINGS[scene.shown[0].thing].kind == kind
        ]
        if chosen:
            wanted = torch.tensor([THING_NAMES.index(scenes[i].shown[0].thing) for i in chosen])
            shares = [
                (one["things"][chosen].argmax(1).cpu() == wanted).float().mean().item()
                for one in columns
            ]
            rows.append(
                f"| {kind} ({len(chosen)}) | "
                + " | ".join(f"{share:.2f}" for share in shares)
                + " |"
            )
    return rows


def write_card(run: Run) -> None:
    """Stage card: output_dir/card.md and output_dir/sheet.png."""
    from diffusers import StableDiffusionPipeline
    from PIL import Image

    names, rng = illustrator(run).names(), random.Random(0)
    scenes = [sample_scene(REPORT + i, names) for i in range(run.scaled(CARD_SCENES, 8))]
    drawn, texts = draw_scenes(run, len(scenes), REPORT), [caption(scene, rng) for scene in scenes]
    pipeline = StableDiffusionPipeline.from_pretrained(
        run.output_dir / "diffusion", torch_dtype=torch.float32
    ).to(run.device)
    painted = paint(run, pipeline, texts)
    reader = load_reader(run.output_dir / "reader.safetensors").to(run.device)
    columns = [read_pictures(run, reader, pictures) for pictures in (drawn, painted)]
    figures = [reading_accuracy(one, scenes) for one in columns]
    rows = [
        f"| {key} | {figures[0][key]:.2f} | {figures[1][key]:.2f} | {target} |"
        for key, target in TARGETS.items()
        if key in figures[0]
    ]
    card = CARD.format(scenes=len(scenes), first=REPORT, steps=SAMPLING_STEPS, guidance=GUIDANCE,
        rows="\n".join(rows),
                       psnr=psnr(drawn, reconstruct(run, pipeline.vae, drawn)),
                           kinds="\n".join(kind_rows(scenes, columns)))  # fmt: skip
    pairs = []
    for start in range(
        0,
        min(len(scenes), SHEET_COLUMNS * SHEET_ROWS) // SHEET_COLUMNS * SHEET_COLUMNS,
        SHEET_COLUMNS,
    ):
        pairs += [
            np.concatenate(list(rows[start : start + SHEET_COLUMNS]), axis=1)
            for rows in (drawn, painted)
        ]
    Image.fromarray(np.concatenate(pairs)).save(run.output_dir / "sheet.png")
    backbones.write_atomically(run.output_dir / "card.md", lambda partial: partial.write_text(card))
    print(card, flush=True)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

STAGES = {
    "vae": train_vae,
    "text": train_text,
    "unet": train_unet,
    "reader": train_reader,
    "card": write_card,
    "costs": print_costs,
}
USUAL_STAGES = [stage for stage in STAGES if stage != "costs"]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the painter of open scenes.")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=USUAL_STAGES, help="what to make"
    )
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=HERE / "work",
        help="sprites.zip, checkpoints, drawn pictures",
    )
    parser.add_argument("--output_dir", type=Path, default=HERE, help="the finished weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="times all step and example counts, for rehearsals"
    )
    parser.add_argument(
        "--mixed_precision",
        choices=("auto", "bf16", "no"),
        default="auto",
        help="auto: bf16 where the device has it",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    device = backbones.choose_device(arguments.device)
    precision = arguments.mixed_precision
    bf16 = backbones.has_bf16(device) if precision == "auto" else precision == "bf16"
    run = Run(
        arguments.work_dir, arguments.output_dir, arguments.seed, arguments.scale, device, bf16
    )
    run.work_dir.mkdir(parents=True, exist_ok=True)
    backbones.quiet_libraries()
    for stage in arguments.stages:
        if stage not in ("card", "costs") and run.done(stage).exists():
            print(f"[{stage}] finished before ({run.done(stage)})", flush=True)
            continue
        start = time.monotonic()
        STAGES[stage](run)
        backbones.write_atomically(run.done(stage), lambda partial: partial.write_text("done\n"))
        print(f"[{stage}] finished in {backbones.clock(time.monotonic() - start)}", flush=True)


if __name__ == "__main__":
    main()
