"""From one GPU to a thousand: what the true models cost, by arithmetic that anyone can repeat without a GPU.

    python tests/benchmarks/scale.py

Floating-point operations are counted by torch's own counter on GPT-2-XL, Stable Diffusion 1.5's UNet and autoencoder
and CLIP's text encoder, built from their published sizes on the meta device. Bytes are those of the tensors that
`train` makes and exchanges. Four numbers are assumptions, to be set by hand: what a GPU achieves, how far its steps
differ in time, what its network carries, and how large a picture file is.

Two parts are simulated: synchronous steps of many GPUs, which wait for the slowest, and an epoch read from shards
through shuffle buffers.
"""

import argparse
import random
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import torch
from timing import machine
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from true_models import true_models

import story_generative_model as sgm

ROWS = {"M3IT": 14_575, "its COCO rows": 566_747, "a billion web pairs": 1_000_000_000}
GPUS = (1, 8, 64, 1000)
ROW_INDEX = 4 * 8  # bytes that Rows keeps for each: file, line, start and end


def teraflops(model: nn.Module, run) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(model)
    return counter.get_total_flops() / 1e12


def activations(run, frozen: nn.Module) -> float:
    """GB that a forward keeps for its backward, each storage once, weights apart."""
    weights, kept = {p.untyped_storage()._cdata for p in frozen.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(frozen)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 1e9


def memory_table(models: SimpleNamespace, length: int, trained: int) -> None:
    """What training keeps on the GPU, in bf16 but for what is trained."""
    half = dict(dtype=torch.bfloat16)
    for model in vars(models).values():
        model.to(**half).requires_grad_(False)

    def read(lm):
        mask = empty(1, 1, length, length, dtype=torch.bool)
        lm(
            inputs_embeds=empty(1, length, 1600, **half).requires_grad_(),
            attention_mask=mask,
            use_cache=False,
        )

    rows = {
        f"{name}, weights": 2 * sum(p.numel() for p in model.parameters())
        for name, model in vars(models).items()
    }
    rows["trained: weights, gradients, AdamW"] = 16 * trained
    rows = {name: f"{size / 1e9:.2f}" for name, size in rows.items()}
    plain = activations(read, models.lm)
    models.lm.train()
    models.lm.gradient_checkpointing_enable()
    checkpointed = f"{activations(read, models.lm):.2f} with --gradient_checkpointing"
    rows["lm, activations of a story"] = f"{plain:.2f}; {checkpointed}"
    print("\n| kept on the GPU | GB |\n|---|---|")
    for name, size in rows.items():
        print(f"| {name} | {size} |")


def waiting(gpus: int, spread: float, steps: int = 2000) -> float:
    """How many times a GPU's own step the steps take of which all wait for the slowest: times are
    log-normal."""
    noise = torch.Generator().manual_seed(gpus)
    times = (spread * torch.randn(steps, gpus, generator=noise)).exp()
    return float(times.amax(1).mean() / times.mean())


def read_shards(readers: int, shards: int, rows: int, buffer: int, batch: int) -> tuple[float, int]:
    """An epoch of `shards` x `rows` rows, in which every reader goes through its shards in sequence
    and draws from a shuffle buffer. Returns the share of two stories of a batch (`batch` of every
    reader) that come from one shard, and how many rows were not read exactly once."""
    order = random.Random("shards").sample(range(shards), shards)

    def reader(rank: int):
        draw, held = random.Random(rank), []
        for row in ((shard, row) for shard in order[rank::readers] for row in range(rows)):
            held.append(row)
            if len(held) > buffer:
                place = draw.randrange(len(held))
                held[place], held[-1] = held[-1], held[place]
                yield held.pop()
        draw.shuffle(held)
        yield from held

    streams, seen, same, pairs = [reader(rank) for rank in range(readers)], Counter(), 0, 0
    while found := [row for stream in streams for row in islice(stream, batch)]:
        seen.update(found)
        same += sum(count * (count - 1) for count in Counter(shard for shard, _ in found).values())
        pairs += len(found) * (len(found) - 1)
    return same / pairs, shards * rows - sum(count == 1 for count in seen.values())


def simulate(compute: float, sending: dict[int, float], spread: float) -> None:
    """compute: seconds of a step; sending: seconds of all-reduce by number of GPUs, none of it
    hidden."""
    print(
        "\n| GPUs | a step that waits for the slowest, times one GPU's | and for the all-reduce | kept |"
    )
    print("|---|---|---|---|")
    for gpus, seconds in sending.items():
        slowest = waiting(gpus, spread)
        step = slowest * compute + seconds
        print(f"| {gpus:,} | {slowest:.2f} | {step / compute:.2f} | {compute / step:.0%} |")
    readers, shards, rows, batch = 50, 1000, 200, 8
    print(
        f"\n{shards} shards of {rows} rows, {readers} readers, {batch} stories of each in a batch\n"
    )
    print(
        "| shuffle buffer, shards | two stories of a batch share a shard, times as often as at random | misread |"
    )
    print("|---|---|---|")
    for buffer in (0, rows // 2, rows, 5 * rows):
        share, wrong = read_shards(readers, shards, rows, buffer, batch)
        print(f"| {buffer / rows:g} | {share * shards:.1f} | {wrong} |")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--story_tokens", type=int, default=256, help="tokens of a story")
    parser.add_argument(
        "--achieved", type=float, default=400, help="TFLOP/s that a GPU achieves; an assumption"
    )
    parser.add_argument(
        "--spread", type=float, default=0.05, help="of a step's log time, one GPU's; an assumption"
    )
    parser.add_argument(
        "--network", type=float, default=50, help="GB/s into a GPU from others; an assumption"
    )
    parser.add_argument(
        "--picture", type=float, default=100, help="kB of a picture file; an assumption"
    )
    arguments = parser.parse_args()
    models, config = true_models("meta"), sgm.Config()
    length = 1 + sgm.NUM_SLOTS + arguments.story_tokens
    forward = {
        "language model": teraflops(models.lm, lambda lm: lm(inputs_embeds=empty(1, length, 1600))),
        "UNet": teraflops(
            models.unet, lambda unet: unet(empty(1, 4, 64, 64), empty(1), empty(1, 77, 768))
        ),
        "autoencoder": teraflops(models.vae, lambda vae: vae.encode(empty(1, 3, 512, 512))),
        "text encoder": teraflops(
            models.text_encoder, lambda clip: clip(empty(1, 77, dtype=torch.long))
        ),
    }
    # frozen weights: backward goes to the inputs alone, and costs a forward; every eighth story
    # also has the constant
    text, encoders = (
        2 * forward["language model"] * (1 + 1 / 8),
        forward["autoencoder"] + forward["text encoder"],
    )
    print(f"{machine()}\n\n| forward of one story | TFLOP | parameters, million |\n|---|---|---|")
    for name, model in zip(forward, (models.lm, models.unet, models.vae, models.text_encoder)):
        print(
            f"| {name} | {forward[name]:.2f} | {sum(p.numel() for p in model.parameters()) / 1e6:.0f} |"
        )

    scored = forward["UNet"] + encoders
    print("\n| a story's step | TFLOP |\n|---|---|")
    print(f"| text alone | {text:.2f} |\n| with a picture scored | {text + scored:.2f} |")
    step = text + scored / config.logging_steps  # the diffusion NLL is computed where it is logged
    print(f"| mean of a run, a picture at each {config.logging_steps}th step | {step:.2f} |")

    seconds = 1e12 / (arguments.achieved * 1e12)  # of a TFLOP
    head = "pictures | index of rows, each process | an epoch, GPU hours"
    print(f"\n| data | {head} |\n|---|---|---|---|")
    for name, rows in ROWS.items():
        sizes = (arguments.picture * 1e3 * rows, ROW_INDEX * rows)
        hours = f"{rows * step * seconds / 3600:,.2f}"
        print(f"| {name}, {rows:,} | {' | '.join([*map(readable, sizes), hours])} |")

    rows = torch.randn(50257, 1600)
    lm = SimpleNamespace(  # what StoryModel asks of a language model
        context=1024, embedding_rows=lambda: rows, prefix_length=lambda soft_tokens: 1 + soft_tokens
    )
    trained = sum(p.numel() for p in sgm.StoryModel(config, lm, None).parameters())
    statistics = config.num_codes * (1 + config.code_dim) * 4
    compute = config.train_batch_size * step * seconds
    exchanged = (
        f"{readable(4 * trained)} of gradients and {readable(statistics)} of codebook a step"
    )
    print(f"\n{trained:,} trained parameters: {exchanged}")
    print(
        "\n| GPUs | stories a step | computing, ms | all-reduce, ms | share of it that is the codebook |"
    )
    print("|---|---|---|---|---|")
    size, sending = 4 * trained + statistics, {}
    for gpus in GPUS:
        passed = 2 * (gpus - 1) / gpus * size  # ring: each byte is sent and received twice
        sending[gpus] = passed / (arguments.network * 1e9)
        cells = (f"{1e3 * compute:.0f}", f"{1e3 * sending[gpus]:.1f}")
        share = statistics / size
        print(
            f"| {gpus:,} | {gpus * config.train_batch_size:,} | {' | '.join(cells)} | {share:.0%} |"
        )
    simulate(compute, sending, arguments.spread)
    memory_table(models, length, trained)


def readable(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"
        size /= 1000
    return ""


if __name__ == "__main__":
    main()
