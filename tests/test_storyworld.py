"""The embedded world: its stories, its pictures, and the weights that were trained on them."""

import hashlib
import re
import subprocess
import sys

import numpy as np
import torch
import world
from conftest import ROOT

import story_generative_model as sgm

FOLDER = ROOT / "assets" / "storyworld"
STORIES = [world.write_story(seed) for seed in range(300)]


def digest(seeds: range) -> str:
    """Of the text and one picture of each story."""
    total = hashlib.sha256()
    for seed in seeds:
        story = world.write_story(seed)
        total.update(
            story.text.encode() + world.draw_panel(story, seed % len(world.BEATS)).tobytes()
        )
    return total.hexdigest()


def test_the_same_seed_gives_the_same_bytes_in_another_process():
    code = "import conftest, test_storyworld; print(test_storyworld.digest(range(12)))"
    folder = ROOT / "tests"
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == digest(range(12))


def test_a_story_opens_with_its_prompt_and_says_what_its_factors_are():
    for story in STORIES:
        assert story.text.startswith(story.prompt) and len(story.beats) == len(world.BEATS) == 8
        assert not re.search(r"[{}\[\]|]|  |\ba [aeiou]", story.text), story.text
        opening = story.beats[0].lower()
        for factor in ("species", "colour", "name", "place", "time", "weather"):
            word = story.factors[factor].lower()
            assert word in opening or factor == "weather", (factor, story.text)
        assert (
            story.factors["helper"] in story.text.lower()
            and story.factors["helper"] != story.factors["species"]
        )
        assert story.factors["object"] in story.text.lower()


def test_openings_are_as_varied_as_people():
    prompts = [story.prompt for story in STORIES]
    assert len(set(prompts)) > 0.9 * len(prompts)
    assert any(prompt.islower() for prompt in prompts) and any(
        prompt.endswith("?") for prompt in prompts
    )


def test_the_entropy_counts_every_choice():
    """Uniform factors alone are worth their logs; no story can be likelier than its factors."""
    factors = sum(
        np.log(len(values)) for name, values in world.FACTORS.items() if name != "helper"
    ) + np.log(7)
    assert all(story.nats > factors for story in STORIES)


def test_a_picture_shows_what_its_beat_says():
    """Changing a factor changes exactly the panels that show it."""
    story = STORIES[3]
    for factor, values in world.FACTORS.items():
        if factor in ("name", "trait"):
            continue
        banned = (story.factors[factor], story.factors["species"], story.factors["helper"])
        other = next(value for value in values if value not in banned)
        changed = world.Story(
            story.seed, story.factors | {factor: other}, story.prompt, story.beats, story.nats
        )
        for beat in range(8):
            differs = np.asarray(world.draw_panel(story, beat)) != np.asarray(
                world.draw_panel(changed, beat)
            )
            assert differs.any() == (factor in world.visible_factors(story, beat)), (factor, beat)


def test_the_weights_load_with_plain_from_pretrained_and_stay_small():
    from diffusers import StableDiffusionPipeline
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "lm")
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "lm", dtype=torch.float32)
    ids = tokenizer(world.write_story(10**9 + 1).text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 0.7  # nats per token; an untrained model has 7.6
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER / "diffusion", dtype=torch.float32)
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 128
    files = [
        path
        for path in FOLDER.rglob("*")
        if path.suffix in (".safetensors", ".pt") and "work" not in path.parts
    ]
    assert sum(path.stat().st_size for path in files) < 40e6


def test_the_autoencoder_keeps_a_drawn_picture():
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(FOLDER / "diffusion" / "vae", dtype=torch.float32)
    drawn = [
        np.asarray(world.draw_panel(world.write_story(10**9 + number), number % 8))
        for number in range(16)
    ]
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        again = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (again - pixels).square().mean((1, 2, 3)))
    assert psnr.mean() > 28  # dB


def shares_right(pictures, stories, beats) -> dict[str, float]:
    """Of each factor that the pictures (B, 3, 128, 128) show, the share that the probe reads
    right."""
    from probe import load_probe

    right = {}
    for read, story, beat in zip(
        load_probe(FOLDER / "probe.safetensors").read(pictures), stories, beats
    ):
        for factor, value in world.visible_factors(story, beat).items():
            right.setdefault(factor, []).append(read[factor] == value)
    return {factor: float(np.mean(marks)) for factor, marks in right.items()}


def test_the_probe_reads_drawn_pictures():
    stories = [world.write_story(2 * 10**9 + number) for number in range(64)]
    beats = [number % 8 for number in range(64)]
    drawn = [np.asarray(world.draw_panel(story, beat)) for story, beat in zip(stories, beats)]
    shares = shares_right(
        torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 255, stories, beats
    )
    assert len(shares) == 9 and min(shares.values()) > 0.9, shares


def test_the_painter_paints_what_a_story_says():
    """A dozen stories; the model card has the figures of hundreds."""
    checkpoint = sgm.load_checkpoint(sgm.EMBEDDED["storyworld"])
    config = checkpoint["config"]
    diffusion = sgm.LatentDiffusion(config.diffusion_model, torch.device("cpu"), torch.float32)
    stories = [world.write_story(2 * 10**9 + number) for number in range(12)]
    condition = diffusion.encode_texts([story.text for story in stories])
    painted = diffusion.sample_images(*condition, config, list(range(12)))
    pixels = (
        torch.from_numpy(np.stack([np.asarray(picture) for picture in painted])).permute(0, 3, 1, 2)
        / 255
    )
    shares = shares_right(pixels, stories, [7] * 12)
    assert np.mean(list(shares.values())) > 0.9 and min(shares.values()) > 0.7, shares
