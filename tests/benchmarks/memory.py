"""What `generate` holds in memory, with and without --low_memory: weights counted from the models' shapes.

    python tests/benchmarks/memory.py            # GPT-2-XL and Stable Diffusion 1.5: shapes alone, nothing is read
    python tests/benchmarks/memory.py --run      # the embedded models too: a story is made both ways, and measured

Beside the weights stand, for a story of --tokens tokens, the language model's keys and values, and for a picture of its
own size the largest that one layer of the painter reads and writes.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from timing import ROOT
from true_models import true_models

GB = 1e9
PROMPT = "A shy blue owl looks for a lost star"
CHILD = (
    "import resource, sys; import story_generative_model as sgm; code = sgm.run(sys.argv[1:]);"
    " print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr); sys.exit(code)"
)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def largest_layer(module: torch.nn.Module, run) -> int:
    """The most numbers that a layer without layers of its own reads and writes, while `run` runs."""
    sizes = [0]

    def note(layer, inputs, output):
        tensors = [one for one in (*inputs, output) if isinstance(one, torch.Tensor)]
        sizes.append(sum(one.numel() for one in tensors))

    hooks = [
        layer.register_forward_hook(note)
        for layer in module.modules()
        if not list(layer.children())
    ]
    run()
    for hook in hooks:
        hook.remove()
    return max(sizes)


@torch.no_grad()
def count_true_models(tokens: int) -> None:
    models = true_models("meta")
    lm = models.lm.config
    painter = {name: getattr(models, name) for name in ("text_encoder", "unet", "vae")}
    latents = torch.zeros(2, 4, 64, 64, device="meta")  # two: with and without the text (guidance)
    states = torch.zeros(2, 77, 768, device="meta")
    step = largest_layer(
        models.unet, lambda: models.unet(latents, torch.zeros(2, device="meta"), states)
    )
    decoding = largest_layer(models.vae, lambda: models.vae.decode(latents[:1]))
    cache = 2 * lm.n_layer * lm.n_embd * tokens
    print("| GB | parameters | fp32 (CPU) | bf16 (GPU) |\n|---|---|---|---|")
    rows = {"gpt2-xl": count(models.lm)} | {
        f"sd 1.5 {name}": count(part) for name, part in painter.items()
    }
    painting = sum(rows.values()) - rows["gpt2-xl"]
    rows["weights, all at once"] = sum(rows.values())
    rows["weights, --low_memory"] = max(rows["gpt2-xl"], painting)
    rows[f"keys and values of {tokens} tokens"] = cache
    rows["largest layer, UNet, a picture"], rows["largest layer, decoder"] = step, decoding
    for name, numbers in rows.items():
        print(f"| {name} | {numbers:,} | {4 * numbers / GB:.2f} | {2 * numbers / GB:.2f} |")
    print(
        f"{2 * painting / GB:.1f} GB of bf16 files are read a second time: the painter is checked "
        "before the story is written, and loaded again when it is"
    )


def measure_a_story(*flags: str) -> None:
    """Peak resident memory and wall time of one command in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, "generate", "--prompt", PROMPT]
        command += ["--output", str(Path(folder, "a.png")), *flags]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - start
    peak = int(done.stderr.split()[-1])
    print(f"generate {' '.join(flags)}: {peak / GB:.2f} GB at most, {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=350, help="of the story with its prompt")
    parser.add_argument(
        "--run", action="store_true", help="make a story, too, with what follows --"
    )
    parser.add_argument("flags", nargs="*", help="of generate, behind --")
    args = parser.parse_args()
    count_true_models(args.tokens)
    if args.run:
        for more in ([], ["--low_memory"]):
            measure_a_story(*args.flags, *more)


if __name__ == "__main__":
    main()
