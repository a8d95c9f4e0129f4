"""A training step against its floor: the frozen language model's forward and backward to its inputs, and the frozen
UNet's forward (with its backward where the storyboard conditions the picture), alone on the same tensors.

    python tests/benchmarks/step.py --data_root data

A step is all that `train` does: encoder, quantiser, vote, prior, soft prompt, both frozen models, backward, clipping,
AdamW, codebook. Prints its time over the floor's, side by side, and its memory (all weights, AdamW's state, the peak
within the step) over the floor's (the frozen weights, the peak within it).
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from timing import machine, medians, peak_memory

import story_generative_model as sgm


def batch_of(model: sgm.StoryModel, config: sgm.Config, data_root: str) -> dict:
    rows = sgm.read_rows(data_root, "train", config.train_batch_size)
    sizes = (model.max_tokens, model.diffusion.resolution)
    dataset = sgm.StoryDataset(rows, Path(data_root, "train"), model.lm.tokenizer, *sizes, config.seed)
    items = [dataset[0, index, index < config.diffusion_stories] for index in range(len(rows))]
    return sgm.collate(items, model.max_tokens)


def random_lm(folder: str, **shape: int) -> sgm.LanguageModel:
    """The embedded language model in another shape: time does not depend on the weights, which are random."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    embedded = sgm.local_or_hub(sgm.PRESETS["storyworld"]["lm_model"])
    GPT2LMHeadModel(GPT2Config.from_pretrained(embedded, **shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded).save_pretrained(folder)
    return sgm.LanguageModel(folder, *sgm.pick_device())


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


def sides(config: sgm.Config, lm: sgm.LanguageModel, data_root: str, pictures: bool) -> tuple[dict, dict]:
    """A step and its floor, on the model of a configuration as training starts it, and the bytes that lie there before
    each begins."""
    device, dtype = sgm.pick_device()
    diffusion = sgm.LatentDiffusion(config.diffusion_model, device, dtype)
    model = started(config, lm, diffusion, [row.story for row in sgm.read_rows(data_root, "train", 2000)])
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

    modules = [lm.model, *([diffusion.unet, diffusion.vae, diffusion.text_encoder] if pictures else [])]
    frozen = sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())
    state = frozen + 3 * sum(parameter.nbytes for parameter in model.parameters())  # themselves and AdamW's two moments
    return {"step": lambda: step(batch), "floor": floor}, {"step": state, "floor": frozen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", default="data")
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--lm_shape", type=int, nargs=2, metavar=("WIDTH", "LAYERS"), help="also with such a GPT-2")
    arguments = parser.parse_args()
    sgm.quiet_libraries()
    torch.manual_seed(0)
    preset = sgm.PRESETS["storyworld"] | dict(train_batch_size=arguments.train_batch_size)
    config = sgm.Config(preset="storyworld", **preset)
    lm = sgm.LanguageModel(config.lm_model, *sgm.pick_device())
    cases = {
        "stories alone": (config, lm, False),
        "with pictures, scored": (config, lm, True),
        "with pictures, trained": (dataclasses.replace(config, image_condition="storyboard"), lm, True),
    }
    if arguments.lm_shape:
        width, layers = arguments.lm_shape
        true = sgm.Config(diffusion_model=config.diffusion_model, train_batch_size=arguments.train_batch_size)
        true = dataclasses.replace(true, mixed_precision=config.mixed_precision, num_codes=1024)
        shape = dict(n_embd=width, n_layer=layers, n_head=width // 64)
        with tempfile.TemporaryDirectory() as folder:
            large = random_lm(folder, **shape)
        cases[f"stories alone, GPT-2 of width {width} and {layers} layers, encoder of the true sizes"] = (
            true,
            large,
            False,
        )
    print(f"{machine()}\n\n| a step | seconds | floor | step / floor | MB | floor | step / floor |")
    print("|---|---|---|---|---|---|---|")
    for name, (config, lm, pictures) in cases.items():
        both, before = sides(config, lm, arguments.data_root, pictures)
        seconds = medians(both)
        size = {side: (before[side] + peak_memory(both[side])) / 1e6 for side in both}
        cells = [f"{seconds['step']:.3f} | {seconds['floor']:.3f} | {seconds['step'] / seconds['floor']:.2f}"]
        cells += [f"{size['step']:.0f} | {size['floor']:.0f} | {size['step'] / size['floor']:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
