"""A training step against its floor: the frozen language model's forward and backward to its inputs, and the frozen
UNet's forward (with its backward where the storyboard conditions the picture), alone on the same tensors.

    python tests/benchmarks/step.py --data_root data

A step is all that `train` does: encoder, quantiser, vote, prior, soft prompt, both frozen models, backward, clipping,
AdamW, codebook. Prints its time over the floor's, side by side.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from timing import machine, medians

import story_generative_model as sgm


def batch_of(model: sgm.StoryModel, config: sgm.Config, data_root: str) -> dict:
    rows = sgm.read_rows(data_root, "train", config.train_batch_size)
    sizes = (model.max_tokens, model.diffusion.resolution)
    dataset = sgm.StoryDataset(rows, Path(data_root, "train"), model.lm.tokenizer, *sizes, config.seed)
    items = [dataset[0, index, index < config.diffusion_stories] for index in range(len(rows))]
    return sgm.collate(items, model.max_tokens)


def started(config: sgm.Config, lm: sgm.LanguageModel, diffusion: sgm.LatentDiffusion | None, stories: list[str]):
    """The model of a configuration as training starts it."""
    model = sgm.StoryModel(config, lm, diffusion).to(lm.device).train()
    model.start_encoder(stories)
    model.start_codebook(stories[: sgm.codebook_sample(config.num_codes)])
    return model


def step_of(model: sgm.StoryModel) -> Callable[[dict], None]:
    """All that `train` does with a batch."""
    config, device = model.config, model.lm.device
    optimizer, parameters = sgm.make_optimizer(model, config), list(model.parameters())

    def step(batch: dict) -> None:
        with autocast(config, device):
            losses = model(batch, sgm.seeded(0))
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.encoder.step_codebook()

    return step


def autocast(config: sgm.Config, device: torch.device) -> torch.autocast:
    precision = sgm.precision_for(config, device.type)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def sides(config: sgm.Config, data_root: str, pictures: bool) -> dict:
    """A step and its floor, on the model of a configuration as training starts it."""
    device, dtype = sgm.pick_device()
    lm = sgm.LanguageModel(config.lm_model, device, dtype)
    diffusion = sgm.LatentDiffusion(config.diffusion_model, device, dtype)
    model = started(config, lm, diffusion, [row.story for row in sgm.read_rows(data_root, "train")])
    batch, step = batch_of(model, config, data_root), step_of(model)
    if not pictures:
        batch |= dict(panels={}, painted=[])
    tokens, mask, cut = (batch[key].to(device) for key in ("tokens", "mask", "cut"))
    heard = torch.cat([torch.arange(len(tokens)), torch.arange(0, len(tokens), 8)])  # the constant prompt's are a part
    soft = model.soft_prompt.nothing(len(heard)).detach().requires_grad_()
    if pictures:
        moments, *heard_texts = model.diffusion.features(batch["panels"])
        states, seen = model.condition(*heard_texts, torch.zeros(len(moments), sgm.NUM_SLOTS, config.code_dim))
        states = states.detach().requires_grad_(model.image_condition is not None)

    def floor():
        with autocast(config, device):
            loss = lm.nll(soft, tokens[heard], mask[heard], cut[heard]).mean()
            if pictures:
                with torch.set_grad_enabled(states.requires_grad):
                    error = model.diffusion.nll(moments, states, seen, sgm.seeded(0)).mean()
                loss = loss + error
        torch.autograd.grad(loss, [soft, states] if pictures and states.requires_grad else [soft])

    return {"step": lambda: step(batch), "floor": floor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", default="data")
    parser.add_argument("--train_batch_size", type=int, default=16)
    arguments = parser.parse_args()
    sgm.quiet_libraries()
    torch.manual_seed(0)
    preset = sgm.Config(preset="storyworld", **sgm.PRESETS["storyworld"])
    preset = dataclasses.replace(preset, train_batch_size=arguments.train_batch_size)
    cases = {
        "stories alone": (preset, False),
        "with pictures, scored": (preset, True),
        "with pictures, trained": (dataclasses.replace(preset, image_condition="storyboard"), True),
    }
    print(f"{machine()}\n\n| a step | seconds | floor, seconds | step / floor |\n|---|---|---|---|")
    for name, (config, pictures) in cases.items():
        seconds = medians(sides(config, arguments.data_root, pictures))
        print(f"| {name} | {seconds['step']:.3f} | {seconds['floor']:.3f} | {seconds['step'] / seconds['floor']:.2f} |")


if __name__ == "__main__":
    main()
