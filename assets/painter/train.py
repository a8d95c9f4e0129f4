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
unet    output_dir/diffusion (a pipeline)   captions, scenes, tales, panels, vae, text
further the same, 2,400 steps on            the same, output_dir/diffusion
reader  output_dir/reader.safetensors       scenes, vae
card    output_dir/card.md and sheets       all of the above, on held-out captions, lines, stories
costs   (printed, when asked for)           the UNet's shape

Shapes: B pictures in a batch, L latent channels, T tokens, E width, N things.
"""

from __future__ import annotations

import random
import sys
from functools import partial
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "storyworld"), str(HERE.parents[1])]

import reading  # noqa: E402
import train_backbones as backbones  # noqa: E402  (loop, checkpoints and losses)
import world  # noqa: E402
from books import tale_panels  # noqa: E402
from captions import caption  # noqa: E402
from card import write_card  # noqa: E402
from pictures import (  # noqa: E402
    HELD_OUT,
    LATENT_SHAPE,
    SCENES,
    draw_panels,
    draw_scenes,
    draw_story_panels,
    drawn_latents,
    illustrator,
    latent_pool,
    pool,
    scene_latents,
    scene_pictures,
    scenes_from,
)
from scenes import PICTURE, Scene, drawing_weights, sample_fair, sample_scene  # noqa: E402
from things import LATER_NAMES, split  # noqa: E402
from train_backbones import Recipe, Run, fit, psnr, reconstruct, seed_of, to_signal  # noqa: E402

import story_generative_model as sgm  # noqa: E402

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
    scenes = scene_pictures(run)[: run.scaled(VAE_SCENES, 20)]
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
PANEL_SHARE = 0.1  # of the storyworld in every batch
CAPTIONS_FOR_TOKENS = 20_000


class TextReader(nn.Module):
    """The text encoder and heads on the mean of its states."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.heads = reading.Heads(TEXT_SHAPE["hidden_size"])

    def forward(self, ids: Tensor, own: Tensor) -> dict[str, Tensor]:
        states, mask = backbones.text_states(self.text_encoder, ids, own)  # (B, W * 77, E)
        mean = states.sum(1) / mask.sum(1, keepdim=True)  # (B, E)
        return self.heads(mean[..., None])


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
        return reading.losses(reader(ids, own), *reading.batch_labels(scenes, run.device))

    def held_out(model) -> dict[str, float]:
        ids, own, scenes = batch(HELD_OUT, 0)
        return reading.accuracy(model(ids, own), scenes)

    fit(run, "text", reader, scaled(TEXT_RECIPE, run), losses_at, held_out)
    reader.text_encoder.save_pretrained(run.work_dir / "text_encoder")


# --------------------------------------------------------------------------------------------------
# UNet
#
# Text encoder and UNet, trained as one to predict the noise in the latents of a picture from its
# text; the storyworld's loss and weights. Every picture is drawn and encoded once. Its texts are
# captions of drawn scenes, panels of real stories with the scenes that they ask for, and panels of
# the storyworld.
# --------------------------------------------------------------------------------------------------

UNET_SHAPE = dict(
    sample_size=LATENT_SHAPE[-1],
    in_channels=LATENT_SHAPE[0],
    out_channels=LATENT_SHAPE[0],
    block_out_channels=(32, 96, 160, 224),
    layers_per_block=1,
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    # at 32 x 32 attention costs more than it gives
    up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    cross_attention_dim=TEXT_SHAPE["hidden_size"],
    attention_head_dim=4,  # diffusers' old name for the number of heads
    norm_num_groups=16,
)
UNET_STORIES = 500
UNET_FAIRS = 1000
FURTHER_SCENES = 8000  # and as many about the things that came later; an hour of drawing
UNET_TALES = 8000  # real stories, a panel of each
TALE_SHARE = 0.3  # of them in every batch
USUAL = 10.0  # the weight of a thing that 80 stories name
UNET_BATCH = 32
UNET_RECIPE = Recipe(
    steps=12_000, learning_rate=8e-4, muon_rate=2e-3, weight_decay=0.01, ema_decay=0.999
)
FURTHER_RECIPE = Recipe(  # another --seed draws other batches
    steps=2400, learning_rate=4e-4, muon_rate=1e-3, hold=0.5, weight_decay=0.01, ema_decay=0.998
)
STEPS_A_CHECK = 300
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
            unet(torch.zeros(1, *LATENT_SHAPE), torch.tensor([0]), states)
        parameters = sum(parameter.numel() for parameter in unet.parameters())
        print(
            f"| {widths} | {parameters / 1e6:.1f}M | {counter.get_total_flops() / 1e9:.2f} |",
            flush=True,
        )


def lesson_weight(scene: Scene) -> float:
    """How often the UNet learns from a scene: less if few stories name one of its things, more if a
    thing is alone in it, so that its name is plain."""
    rarest = min(drawing_weights()[one.thing] for one in scene.shown)
    return min(rarest, USUAL) ** 2 * (2 if len(scene.shown) == 1 else 1)


def load_text(run: Run):
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(run.work_dir / "tokenizer")
    return tokenizer, CLIPTextModel.from_pretrained(run.work_dir / "text_encoder")


def train_unet(run: Run, data_root: Path) -> None:
    """Stage unet: the pipeline goes to output_dir/diffusion."""
    from diffusers import UNet2DConditionModel

    tokenizer, text_encoder = load_text(run)
    torch.manual_seed(seed_of(run.seed, "painter unet"))
    painter = backbones.Painter(text_encoder, UNet2DConditionModel(**UNET_SHAPE))
    fit_painter(run, "unet", tokenizer, painter, UNET_RECIPE, data_root)


def train_further(run: Run, data_root: Path) -> None:
    """Stage further: trains the pipeline in output_dir/diffusion on, each time that it is run."""
    from diffusers import StableDiffusionPipeline

    made = StableDiffusionPipeline.from_pretrained(run.output_dir / "diffusion")
    painter = backbones.Painter(made.text_encoder, made.unet).float()
    fit_painter(run, "further", made.tokenizer, painter, FURTHER_RECIPE, data_root)
    (run.work_dir / "further.pt").unlink()  # the next run begins from what this one saved


def fit_painter(
    run: Run, stage: str, tokenizer, painter: nn.Module, recipe: Recipe, data_root: Path
) -> None:
    """Fits text encoder and UNet as one, and saves the pipeline."""
    from diffusers import DDPMScheduler

    (drawn, scenes), beats = scenes_of_seed(run), len(world.BEATS)
    panels = latent_pool(run, "panels", beats * run.scaled(UNET_STORIES, 4), draw_story_panels)
    stories = [world.write_story(i) for i in range(len(panels) // beats)]
    count = run.scaled(UNET_TALES, 4)
    told = tale_panels(tokenizer, str(data_root), "train", count, seed=run.seed * SCENES)
    tales = drawn_latents(run, f"tales_{run.seed}", [scene for _, scene in told])
    up_to = [*accumulate(map(lesson_weight, drawn))]
    scheduler = DDPMScheduler(**backbones.NOISE_SCHEDULE)
    painter.to(run.device)

    def example(rng: random.Random) -> tuple[np.ndarray, str]:
        kind = rng.random()
        if kind < TALE_SHARE:
            index = rng.randrange(len(told))
            return tales[index], told[index][0]
        if kind < TALE_SHARE + PANEL_SHARE:
            story = rng.randrange(len(stories))
            text, beat = backbones.panel_text(stories[story], rng)
            return panels[story * beats + beat], text
        index = rng.choices(range(len(scenes)), cum_weights=up_to)[0]
        return scenes[index], caption(drawn[index], rng)

    def losses_at(step: int) -> dict[str, Tensor]:
        rng = random.Random(seed_of(run.seed, "unet batch", step))
        latents, texts = zip(*(example(rng) for _ in range(UNET_BATCH)))
        heard = ["" if rng.random() < backbones.NO_TEXT_SHARE else text for text in texts]
        ids, own = (x.to(run.device) for x in backbones.text_windows(tokenizer, heard))
        clean = torch.from_numpy(np.stack(latents)).to(run.device).float()
        errors, weights = backbones.noise_errors(painter, scheduler, clean, ids, own)
        return {"loss": (weights * errors).mean(), "error": errors.mean()}

    check, recipe = UNetCheck(run, tokenizer, scheduler), scaled(recipe, run)
    checks = max(1, recipe.steps // STEPS_A_CHECK)
    fitted = fit(run, stage, painter, recipe, losses_at, check, checks)
    backbones.save_pipeline(run, tokenizer, fitted)


def scenes_of_seed(run: Run) -> tuple[list[Scene], np.ndarray]:
    """Scenes and fairs, each seed's own, and their latents (N, L, 32, 32) float16: a further run
    learns from pictures that none before it saw, half of them about the things that came later."""

    def drawn(name: str, scenes: list[Scene]) -> tuple[list[Scene], np.ndarray]:
        return scenes, drawn_latents(run, f"{name}_{run.seed}", scenes)

    if not run.seed:  # those of the other stages
        latents = scene_latents(run)
        made = [(scenes_from(run, len(latents)), latents)]
    else:
        first, later = run.seed * SCENES, split(LATER_NAMES)
        count = run.scaled(FURTHER_SCENES, 40)
        about_later = partial(sample_scene, heroes=later)
        made = [
            drawn("scenes", scenes_from(run, count, first)),
            drawn("later", scenes_from(run, count, first + FURTHER_SCENES, about_later)),
        ]
    count = run.scaled(UNET_FAIRS, 4)
    made.append(drawn("fairs", scenes_from(run, count, run.seed * count, sample_fair)))
    scenes, latents = zip(*made)
    return [*chain(*scenes)], np.concatenate(latents)


class UNetCheck:
    """Held-out epsilon error with the scenes' own captions and with others': a painter that listens
    tells them apart.
    """

    def __init__(self, run: Run, tokenizer, scheduler) -> None:
        self.run, self.scheduler = run, scheduler
        count, rng = run.scaled(UNET_CHECK, 8), random.Random(0)
        texts = [caption(scene, rng) for scene in scenes_from(run, count, HELD_OUT)]
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
# the autoencoder, some blurred or noisy, all shifted and scaled a little.
# --------------------------------------------------------------------------------------------------

READER_SCENES = 32_000  # it sees pictures themselves, so more of them help it
READER_BATCH = 32
READER_CODED = 2  # of a batch have been through the autoencoder
READER_RECIPE = Recipe(steps=10_000, learning_rate=2e-3, weight_decay=0.01, ema_decay=0.999)
READER_CHECK = 256


def train_reader(run: Run) -> None:
    """Stage reader: saved in fp16 to output_dir/reader.safetensors."""
    vae, latents = backbones.load_vae(run), scene_latents(run)
    pictures = scene_pictures(run, READER_SCENES)
    drawn = scenes_from(run, len(pictures))
    checked = scenes_from(run, run.scaled(READER_CHECK, 8), HELD_OUT)
    check_pixels = draw_scenes(run, len(checked), HELD_OUT)
    torch.manual_seed(seed_of(run.seed, "reader"))
    reader = reading.PictureReader().to(run.device)

    def losses_at(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng(seed_of(run.seed, "reader batch", step))
        index = rng.integers(len(pictures), size=READER_BATCH)
        index[:READER_CODED] %= len(latents)
        coded = torch.from_numpy(latents[index[:READER_CODED]])
        signal = to_signal(pictures[index], run.device)
        looks = backbones.look_generated(run, vae, signal, coded.to(run.device).float())
        scenes = [drawn[i] for i in index]
        return reading.losses(
            reader(reading.moved(looks)), *reading.batch_labels(scenes, run.device)
        )

    def held_out(model) -> dict[str, float]:
        return reading.accuracy(model((to_signal(check_pixels, run.device) + 1) / 2), checked)

    fitted = fit(run, "reader", reader, scaled(READER_RECIPE, run), losses_at, held_out)
    path = run.output_dir / "reader.safetensors"
    backbones.write_atomically(path, partial(reading.save_reader, fitted))


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

STAGES = {
    "vae": train_vae,
    "text": train_text,
    "unet": train_unet,
    "further": train_further,
    "reader": train_reader,
    "card": write_card,
    "costs": print_costs,
}
ASKED_FOR = ("further", "costs")  # no part of a run of all stages
REPEATED = ("further", "card", "costs")  # a finished one is no reason not to


def main(argv: list[str] | None = None) -> None:
    usual = [stage for stage in STAGES if stage not in ASKED_FOR]
    parser = backbones.stage_parser("Train the painter of open scenes.", STAGES, usual, HERE)
    data = "real stories: the UNet learns from train, the card's books are from val"
    parser.add_argument("--data_root", type=Path, default=Path("data/tales"), help=data)
    arguments = parser.parse_args(argv)
    read = {name: STAGES[name] for name in ("unet", "further", "card")}  # they read stories
    try:  # now, and not after the hours of the stages before
        if read.keys() & set(arguments.stages):
            for split in ("train", "val"):
                sgm.read_rows(str(arguments.data_root), split)
    except sgm.StoryError as error:
        parser.error(f"--data_root: {error}")
    backbones.quiet_libraries()
    stages = STAGES | {
        name: partial(stage, data_root=arguments.data_root) for name, stage in read.items()
    }
    backbones.run_stages(backbones.run_of(arguments), stages, arguments.stages, REPEATED)


if __name__ == "__main__":
    main()
