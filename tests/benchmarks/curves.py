"""How the time of a training step grows with the length of a story, the batch, the codes K, and the rows of the data.

    python tests/benchmarks/curves.py --plot assets/cost.png

One thing is changed at a time, from 256 tokens, a batch of 8, 64 codes and 1,000 rows; a step reads its batch first.
`growth` is the exponent between a point and the one before it: 1 is linear. Beside the steps stands the frozen language
model alone, whose attention grows with the square. Its window is widened for this: time does not depend on the weights.
Needs matplotlib for the plot.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch
from step import autocast, started, step_of
from timing import machine, medians

import story_generative_model as sgm

BASE = dict(tokens=256, batch=8, codes=64, rows=1_000)
POINTS = {
    "tokens": (64, 128, 256, 512, 1024),
    "batch": (1, 2, 4, 8, 16, 32),
    "codes": (64, 256, 1024, 4096),
    "rows": (1_000, 10_000, 100_000, 1_000_000),
}
NAMES = {
    "tokens": "story length, tokens",
    "batch": "stories in a batch",
    "codes": "codes K",
    "rows": "rows of data",
}


def wide_lm(folder: str, positions: int) -> sgm.LanguageModel:
    """The embedded language model with another window and random weights."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    embedded = sgm.resolve_model_path(sgm.PRESETS["storyworld"]["lm_model"])
    GPT2LMHeadModel(GPT2Config.from_pretrained(embedded, n_positions=positions)).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(embedded).save_pretrained(folder)
    return sgm.LanguageModel(folder, *sgm.pick_device())


def write_rows(path: Path, tokens: list[int], tokenizer, count: int) -> None:
    lines = []
    for shift in range(100):
        story = tokenizer.decode(tokens[shift:] + tokens[:shift])
        lines.append(json.dumps(dict(prompt="The fox", story=story, image_path="a.png")) + "\n")
    with open(path, "w") as file:
        for _ in range(count // len(lines)):
            file.writelines(lines)


def measure(
    lm: sgm.LanguageModel, words: list[int], tokens: int, batch: int, codes: int, rows: int
) -> dict:
    """Seconds of a step, and of the language model's part of it."""
    preset = sgm.PRESETS["storyworld"] | dict(train_batch_size=batch, num_codes=codes)
    config = sgm.Config(preset="storyworld", **preset)
    some = [lm.tokenizer.decode(words[shift : shift + 256]) for shift in range(0, 4096, 16)]
    model = started(config, lm, None, some)
    step = step_of(model)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train").mkdir()
        write_rows(
            Path(folder, "train", "stories.jsonl"), words[: 2 * tokens], lm.tokenizer, rows
        )  # cut to `tokens`
        read = sgm.read_rows(folder, "train")
        dataset = sgm.StoryDataset(read, Path(folder), lm.tokenizer, tokens, 0, 0)
        stream = iter(sgm.StoryBatches(len(read), batch, 0, seed=0))

        def next_batch() -> dict:
            return sgm.collate([dataset[key] for key in next(stream)], model.max_tokens)

        fixed = next_batch()
        ids, mask, cut = (fixed[key].to(lm.device) for key in ("tokens", "mask", "cut"))
        picks = torch.cat([torch.arange(batch), torch.arange(0, batch, 8)])
        soft = model.soft_prompt.constant_prompt(len(picks)).detach().requires_grad_()

        def frozen():
            with autocast(config, lm.device):
                torch.autograd.grad(
                    lm.nll(soft, ids[picks], mask[picks], cut[picks]).mean(), [soft]
                )

        return medians({"step": lambda: step(next_batch()), "language model": frozen})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", default="", help="where to draw the curves, .png")
    arguments = parser.parse_args()
    sgm.quiet_libraries()
    torch.manual_seed(0)
    print(
        f"{machine()}\n\n| changed | to | step, seconds | growth | language model alone | growth |"
    )
    print("|---|---|---|---|---|---|")
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        lm = wide_lm(folder, POINTS["tokens"][-1] + sgm.NUM_SLOTS + 1)
        words = torch.randint(
            lm.model.config.vocab_size, (8192,), generator=torch.Generator().manual_seed(0)
        ).tolist()
        for name, points in POINTS.items():
            before = None
            for point in points:
                seconds = measure(lm, words, **BASE | {name: point})
                curves.setdefault(name, []).append(
                    (point, seconds["step"], seconds["language model"])
                )
                cells = [f"{seconds['step']:.3f}", growth(before, curves[name][-1], 1)]
                cells += [f"{seconds['language model']:.3f}", growth(before, curves[name][-1], 2)]
                print(f"| {NAMES[name]} | {point:,} | {' | '.join(cells)} |", flush=True)
                before = curves[name][-1]
    if arguments.plot:
        draw(curves, arguments.plot)


def growth(before: tuple | None, now: tuple, column: int) -> str:
    """The exponent of the time's growth from one point to the next."""
    return (
        f"{math.log(now[column] / before[column]) / math.log(now[0] / before[0]):.2f}"
        if before
        else ""
    )


def draw(curves: dict[str, list[tuple]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, panes = plt.subplots(1, len(curves), figsize=(13, 3.4), dpi=130, sharey=True)
    for pane, (name, points) in zip(panes, curves.items()):
        at, step, frozen = zip(*points)
        pane.loglog(at, step, "-o", color="#31688e", label="a step")
        pane.loglog(
            at, frozen, "-o", color="#c26a2d", markersize=3, label="the frozen language model in it"
        )
        pane.loglog(
            at, [step[0] * x / at[0] for x in at], "--", color="#999", linewidth=1, label="linear"
        )
        pane.set(xlabel=NAMES[name])
    seconds = [value for points in curves.values() for _, *pair in points for value in pair]
    panes[0].set(ylabel="seconds", ylim=(min(seconds) / 1.5, max(seconds) * 1.5))
    panes[2].legend(frameon=False, fontsize=9, loc="lower center")
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
