"""An epoch with the feature cache against one without: reading, encoding, forward, backward and AdamW of every story,
where the picture trains the storyboard (or, with --image_condition text, is scored at each step).

    python tests/benchmarks/epoch.py --data_root data
    python tests/benchmarks/epoch.py --data_root data --true_models /tmp/true --stories 4 --image_condition text

The cache of the stories at hand is built first, and what that takes is printed beside the epochs.
"""

import argparse
import time
from pathlib import Path

import torch
from step import started, step_of
from timing import machine, medians
from true_models import configured

import story_generative_model as sgm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", default="data")
    parser.add_argument("--stories", type=int, default=64)
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--image_condition", choices=("text", "storyboard"), default="storyboard")
    parser.add_argument("--true_models", help="folder that true_models.py wrote; the embedded models by default")
    arguments = parser.parse_args()
    sgm.quiet_libraries()
    torch.manual_seed(0)
    settings = dict(image_condition=arguments.image_condition, train_batch_size=arguments.train_batch_size)
    config, device, dtype = configured(arguments.true_models, **settings)
    lm = sgm.LanguageModel(config.lm_model, device, dtype)
    diffusion = sgm.LatentDiffusion(config.diffusion_model, device, dtype)
    rows = sgm.read_rows(arguments.data_root, "train", arguments.stories)
    model = started(config, lm, diffusion, [row.story for row in rows])
    step = step_of(model)
    folder = Path(arguments.data_root, "train")
    cache = sgm.FeatureCache(rows, folder, diffusion)
    start = time.perf_counter()
    cache.build(diffusion, config.train_batch_size, skip_bad=False)
    built = time.perf_counter() - start

    def epoch(features):
        sizes = (model.max_tokens, diffusion.resolution, config.seed)
        dataset = sgm.StoryDataset(rows, folder, lm.tokenizer, *sizes, features)
        for batch in sgm.batches_of(list(range(len(rows))), config.train_batch_size):
            step(sgm.collate([dataset[0, index, True] for index in batch], model.max_tokens))

    seconds = medians({"with": lambda: epoch(cache), "without": lambda: epoch(None)})
    panels = sum(len(row.panels) for row in rows)
    size = sum(path.stat().st_size for path in cache.key.glob("*.safetensors")) / panels / 1e3
    print(f"{machine()}\n\n| {len(rows)} stories, {config.diffusion_model} | |\n|---|---|")
    print(f"| epoch without the cache, seconds | {seconds['without']:.2f} |")
    print(f"| epoch with it | {seconds['with']:.2f} |")
    print(f"| without / with | {seconds['without'] / seconds['with']:.2f} |")
    print(f"| building it: {panels} panels, seconds (0 where it was there) | {built:.1f} |")
    print(f"| kB a panel | {size:.0f} |")


if __name__ == "__main__":
    main()
