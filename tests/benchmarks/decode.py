"""How near a story's writing comes to the bandwidth limit: the bytes of the language model's weights, each of which a
token needs once, over what a copy moves in a second. Batch 1.

    python tests/benchmarks/decode.py
    python tests/benchmarks/decode.py --true_models /tmp/true    # GPT-2-XL in bf16, that true_models.py wrote
"""

import argparse
import dataclasses

import torch
from timing import machine, medians
from true_models import configured

import story_generative_model as sgm

PROMPT = "A shy blue owl looks for a lost star"


def bandwidth(device: torch.device) -> float:
    """Bytes that a copy reads and writes in a second."""
    source = torch.zeros(1 << 28, device=device)  # a GB
    target = torch.empty_like(source)
    return 2 * source.nbytes / medians({"copy": lambda: target.copy_(source)})["copy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--true_models", help="folder that true_models.py wrote; the embedded model by default"
    )
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    sgm.quiet_libraries()
    config, device, dtype = configured(arguments.true_models)
    lm = sgm.LanguageModel(config.lm_model, device, dtype)
    soft = torch.zeros(1, sgm.NUM_SLOTS, lm.width, device=device)
    lengths = {
        count: dataclasses.replace(config, max_new_tokens=count)
        for count in (1, 1 + arguments.tokens)
    }
    seconds = medians(
        {
            n: lambda one=one: lm.generate_text(soft, [PROMPT], one, [0])
            for n, one in lengths.items()
        }
    )
    token = (seconds[1 + arguments.tokens] - seconds[1]) / arguments.tokens
    weights = sum(p.nbytes for name, p in lm.model.named_parameters() if "wpe" not in name)
    limit = weights / bandwidth(device)
    print(f"{machine()}\n{config.lm_model}, {weights / 1e9:.2f} GB in {dtype}\n")
    print("| a token, ms | by the bandwidth, ms | of the limit |\n|---|---|---|")
    print(f"| {1e3 * token:.2f} | {1e3 * limit:.2f} | {limit / token:.0%} |")


if __name__ == "__main__":
    main()
