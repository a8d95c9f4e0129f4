"""The EMA quantiser against vector-quantize-pytorch: one training step on the tokens of 16 stories of 256 each.

    python tests/benchmarks/quantizer.py

Both assign 4,096 vectors to their nearest code, step their moving averages and look for dead codes. Prints time and
peak memory of ours over theirs for each width D and number of codes K: below 1 is better.
"""

import torch
from timing import machine, medians, peak_memory
from vector_quantize_pytorch import VectorQuantize

import story_generative_model as sgm

VECTORS = 16 * 256


def sides(width: int, codes: int) -> dict:
    """The two quantisers, started from the same vectors, as functions that take a step."""
    vectors = torch.randn(VECTORS, width, generator=torch.Generator().manual_seed(0))
    ours = sgm.VectorQuantizer(codes, width, decay=0.99)
    ours.start(vectors[torch.arange(max(codes, VECTORS)) % VECTORS])
    theirs = VectorQuantize(width, codebook_size=codes, decay=0.99, threshold_ema_dead_code=0.1)
    theirs._codebook.embed.copy_(ours.codebook)
    theirs._codebook.embed_avg.copy_(ours.sums)
    theirs._codebook.cluster_size.copy_(ours.counts)
    theirs.train()

    def our_step():
        with torch.no_grad():
            codes = ours.distances(vectors).argmin(1)
            ours.embed_codes(codes)
            ours.update(vectors, codes)

    def their_step():
        with torch.no_grad():
            theirs(vectors[None])

    return {"ours": our_step, "theirs": their_step}


def main() -> None:
    print(
        f"{machine()}\n\n| D | K | ours, ms | time / theirs | memory / theirs |\n|---|---|---|---|---|"
    )
    for width in (16, 96, 256, 768):
        for codes in (128, 1024, 8192):
            pair = sides(width, codes)
            seconds, bytes_ = (
                medians(pair),
                {name: peak_memory(side) for name, side in pair.items()},
            )
            time, memory = (found["ours"] / found["theirs"] for found in (seconds, bytes_))
            print(
                f"| {width} | {codes} | {1e3 * seconds['ours']:.1f} | {time:.2f} | {memory:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
