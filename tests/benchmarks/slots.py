"""Which slots earn their bits? What each slot's code costs by the prior, and what the story loses when that code alone
is drawn anew from the prior, given those before it.

    python tests/benchmarks/slots.py --data_root data --max_val_samples 128

A code that is not listened to costs bits and loses none. Bits per story, means over held-out stories.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from timing import machine

import story_generative_model as sgm


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default=str(sgm.EMBEDDED["storyworld"]))
    parser.add_argument("--data_root", default="data")
    parser.add_argument("--max_val_samples", type=int, default=128)
    parser.add_argument("--draws", type=int, default=3, help="new codes for each story and slot")
    arguments = parser.parse_args()
    sgm.quiet_libraries()
    checkpoint = sgm.load_checkpoint(arguments.ckpt)
    config = checkpoint["config"]
    model = sgm.load_model(checkpoint, config, *sgm.pick_device(), paints=False)
    stories = [
        row.story for row in sgm.read_rows(arguments.data_root, "val", arguments.max_val_samples)
    ]
    codes = model.encode_stories(stories)  # (N, S)
    tokens = model.tokenize(stories)
    log_prior = model.prior(codes).log_softmax(-1)  # (N, S, K)

    def nll(board: torch.Tensor) -> torch.Tensor:
        parts = zip(*(part.split(config.eval_batch_size) for part in (board, *tokens)))
        return torch.cat([model.lm.nll(model.prompt_embeds(some), *rest) for some, *rest in parts])

    true, spent = (
        nll(codes),
        F.nll_loss(log_prior.mT, codes, reduction="none").mean(0) / math.log(2),
    )  # (S,)
    print(f"{machine()}\n\n| slot | bits spent | bits lost when drawn anew |\n|---|---|---|")
    for slot in range(sgm.NUM_SLOTS):
        lost = []
        for draw in range(arguments.draws):
            drawn = torch.multinomial(
                log_prior[:, slot].exp().cpu(),
                1,
                generator=torch.Generator().manual_seed(8 * draw + slot),
            )  # (N, 1)
            board = codes.index_copy(1, torch.tensor([slot]).to(codes.device), drawn.to(codes))
            lost.append((nll(board) - true).mean() / math.log(2))
        print(f"| {slot + 1} | {spent[slot]:.1f} | {torch.stack(lost).mean():.1f} |", flush=True)


if __name__ == "__main__":
    main()
