"""Where do eight words have to stand before a story to be worth the most to a frozen language
model?

    python tests/benchmarks/templates.py --data_root data/tales python tests/benchmarks/templates.py
    --data_root data/tales --lm_adapter assets/storyteller/adapter

Held-out stories of --tokens tokens, --stories of each source. The words are the most salient of
each eighth that are one token, given as soft tokens: the words' own embeddings. Prints the NLL in
nats a story with the story's own words, with those of the next story, and without a prompt, and
what the own words are worth in bits.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "assets" / "storyteller")]

import train_adapter as teller  # noqa: E402

import story_generative_model as sgm  # noqa: E402

PLACES = ", ".join("_" * sgm.NUM_SLOTS)
TEMPLATES = {
    "words": f"Words: {PLACES}\nStory:",
    "in this order": sgm.STORY_TEMPLATE,
    "come up": f"Tell a short story for children in which these come up: {PLACES}.",
}


def windows(
    rows: list[dict], tokenizer, lexicon, tokens: int, count: int
) -> list[tuple[list[int], list[int]]]:
    """(story ids, word ids) of the first `count` stories that have `tokens` tokens and a word in
    each eighth."""
    found = []
    for row in rows:
        if len(found) == count:
            break
        encoded = tokenizer(row["story"], add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"][:tokens], encoded["offset_mapping"][:tokens]
        chunks = lexicon.candidates(row["story"], offsets)
        if len(ids) == tokens and all(chunks):
            words = [lexicon.words[max(chunk, key=lexicon.idf)] for chunk in chunks]
            found.append(
                (
                    ids,
                    [
                        tokenizer(" " + word, add_special_tokens=False)["input_ids"][0]
                        for word in words
                    ],
                )
            )
    return found


@torch.no_grad()
def nll(lm, stories: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """(N,) nats; the windows are cut, so no end is charged."""
    cut = torch.ones(len(stories), dtype=torch.bool)
    batches = zip(stories.split(4), words.split(4), cut.split(4))
    return torch.cat([lm.nll(lm.embed(w), s, torch.ones_like(s).bool(), c) for s, w, c in batches])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_root", default="data/tales")
    parser.add_argument("--lm_model", default=sgm.SMOLLM2)
    parser.add_argument("--lm_adapter", default="")
    parser.add_argument("--stories", type=int, default=12, help="of each source")
    parser.add_argument("--tokens", type=int, default=140)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lm = sgm.LanguageModel(
        args.lm_model, torch.device("cpu"), torch.float32, adapter=args.lm_adapter
    )
    train, val = (teller.read_stories(args.data_root, split) for split in ("train", "val"))
    lexicon = teller.Lexicon([row["story"] for row in train], lm.tokenizer)
    taken = [
        window
        for source in teller.TIMES
        for window in windows(
            [row for row in val if teller.family(row["source"]) == source],
            lm.tokenizer, lexicon, args.tokens, args.stories,
        )
    ]  # fmt: skip
    stories, words = (torch.tensor(part) for part in zip(*taken))
    none = nll(lm, stories, words[:, :0]).mean()
    print(f"{len(stories)} windows of {args.tokens} tokens; without a prompt {none:.1f} nats\n")
    print("| where the words stand | own | another's | bits over none | bits over another's |")
    print("|---|---|---|---|---|")
    chat = lm.tokenizer.chat_template
    for name, template in {"bare": "", **TEMPLATES}.items():
        for in_chat in (False, True) if chat and template else (False,):
            lm.tokenizer.chat_template = chat if in_chat else None
            lm.set_template(template)
            own, other = nll(lm, stories, words).mean(), nll(lm, stories, words.roll(1, 0)).mean()
            gains = " | ".join(f"{float(x - own) / math.log(2):.1f}" for x in (none, other))
            print(
                f"| {name}{', chat' if in_chat else ''} | {own:.1f} | {other:.1f} | {gains} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
