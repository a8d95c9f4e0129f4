"""A training step against its floor: the frozen language model's forward and backward to its inputs, and the frozen
autoencoder's, text encoder's and UNet's forward, alone on the same tensors.

    python tests/benchmarks/step.py --data_root data
    python tests/benchmarks/step.py --data_root data/tales --preset storyteller --train_batch_size 8
    python tests/benchmarks/step.py --data_root data --true_models /tmp/true    # that true_models.py wrote

A step is all that `train` does with a batch that is read: encoder, quantiser, vote, prior, soft prompt, both
frozen models, backward, clipping, AdamW, codebook. Prints its time over the floor's, side by side; its memory (all
weights, AdamW's state, the peak within the step) over the floor's (the frozen weights, the peak within it); and how
much of the machine's fastest matrix product the floor achieves.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from timing import machine, medians, peak_memory
from torch.utils.flop_counter import FlopCounterMode
from true_models import configured

import story_generative_model as sgm

START_STORIES = 64  # that encoder and codebook start from: a step takes as long after a good start


def batch_of(model: sgm.StoryModel, data_root: str, story_tokens: int, pictures: bool) -> dict:
    """The first stories of the training set, cut to `story_tokens`, with their pictures."""
    config, diffusion = model.config, model.diffusion
    rows = sgm.read_rows(data_root, "train", config.train_batch_size)
    longest = min(story_tokens or model.max_tokens, model.max_tokens)
    sizes = (longest, diffusion.resolution)
    dataset = sgm.StoryDataset(
        rows, Path(data_root, "train"), model.lm.tokenizer, *sizes, config.seed
    )
    count = (config.diffusion_stories or len(rows)) if pictures else 0
    batch = sgm.collate([dataset[0, index, index < count] for index in range(len(rows))], longest)
    return batch


def started(
    config: sgm.Config,
    lm: sgm.LanguageModel,
    diffusion: sgm.LatentDiffusion | None,
    stories: list[str],
):
    """The model of a configuration as training starts it."""
    model = sgm.StoryModel(config, lm, diffusion).to(lm.device).train()
    model.init_encoder(stories)
    model.init_codebook(stories[: sgm.codebook_init_stories(config.num_codes)])
    return model


def step_of(model: sgm.StoryModel) -> Callable[[dict], None]:
    """All that `train` does with a batch."""
    config, device = model.config, model.lm.device
    optimizer, parameters = sgm.make_optimizer(model, config), list(model.parameters())

    def step(batch: dict) -> None:
        with autocast(config, device):
            losses = model(batch, torch.Generator().manual_seed(0))
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.encoder.step_codebook()

    return step


def autocast(config: sgm.Config, device: torch.device) -> torch.autocast:
    precision = sgm.usable_precision(config, device.type)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def sides(model: sgm.StoryModel, batch: dict) -> tuple[dict, dict]:
    """A step and its floor, and the bytes that lie there before each begins."""
    config, lm, diffusion, step = model.config, model.lm, model.diffusion, step_of(model)
    tokens, mask, cut = (batch[key].to(lm.device) for key in ("tokens", "mask", "cut"))
    rows = torch.cat(
        [torch.arange(len(tokens)), torch.arange(0, len(tokens), 8)]
    )  # the constant prompt's are a part
    inputs = model.soft_prompt.constant_prompt(len(rows)).detach().clone().requires_grad_()

    def floor():
        with autocast(config, lm.device):
            lm.nll(inputs, tokens[rows], mask[rows], cut[rows]).mean().backward()
            if batch["painted"]:
                model.diffusion_nll(batch, torch.Generator().manual_seed(0))
        inputs.grad = None

    modules = [
        lm.model,
        *([diffusion.unet, diffusion.vae, diffusion.text_encoder] if batch["painted"] else []),
    ]
    frozen = sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())
    state = frozen + 3 * sum(
        parameter.nbytes for parameter in model.parameters()
    )  # themselves and AdamW's two moments
    return {"step": lambda: step(batch), "floor": floor}, {"step": state, "floor": frozen}


def operations(run: Callable) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def product_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    x = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / medians({"product": lambda: x @ x})["product"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", default="data")
    parser.add_argument("--preset", default="storyworld", help="whose models and sizes")
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument(
        "--story_tokens", type=int, default=0, help="cut stories to this; 0: they stay whole"
    )
    parser.add_argument(
        "--diffusion_stories", type=int, default=2, help="stories of a batch with a picture"
    )
    parser.add_argument(
        "--true_models", help="folder that true_models.py wrote; the embedded models by default"
    )
    arguments = parser.parse_args()
    sgm.quiet_libraries()
    torch.manual_seed(0)
    sizes = dict(
        train_batch_size=arguments.train_batch_size, diffusion_stories=arguments.diffusion_stories
    )
    config, device, dtype = configured(arguments.true_models, arguments.preset, **sizes)
    rows = sgm.read_rows(arguments.data_root, "train", START_STORIES)
    stories = [row.story for row in rows]
    lm = sgm.load_language_model(config, device, dtype)
    diffusion = sgm.LatentDiffusion(config.diffusion_model, device, dtype)
    peak = product_peak(
        device, torch.bfloat16 if sgm.usable_precision(config, device.type) == "bf16" else dtype
    )
    batch = f"{config.train_batch_size} stories a step, {config.diffusion_stories} with a picture"
    print(f"{machine()}\n{config.lm_model}, {config.diffusion_model}, {batch}")
    print(f"a matrix product achieves {peak / 1e12:.2f} TFLOP/s\n")
    head = "a step | seconds | floor | step / floor | MB | floor | step / floor | stories a second | floor / product"
    print(f"| {head} |\n|{'---|' * len(head.split(' | '))}")
    kinds = {"stories alone": False, "with pictures": True}
    if not any(row.pictured for row in rows):
        del kinds["with pictures"]
    for name, pictures in kinds.items():
        model = started(config, lm, diffusion, stories)
        both, before = sides(
            model, batch_of(model, arguments.data_root, arguments.story_tokens, pictures)
        )
        seconds = medians(both)
        size = {side: (before[side] + peak_memory(both[side])) / 1e6 for side in both}
        share = operations(both["floor"]) / seconds["floor"] / peak
        cells = [
            f"{seconds['step']:.3f} | {seconds['floor']:.3f} | {seconds['step'] / seconds['floor']:.2f}"
        ]
        cells += [f"{size['step']:.0f} | {size['floor']:.0f} | {size['step'] / size['floor']:.2f}"]
        cells += [f"{config.train_batch_size / seconds['step']:.2f} | {share:.0%}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
