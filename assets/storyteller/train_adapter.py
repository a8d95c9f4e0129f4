"""Teaches a pretrained language model to tell children's stories and to listen to eight words: a
LoRA adapter (Hu et al. 2021, by peft) for SmolLM2-135M-Instruct, trained on data/tales.

    python assets/storyteller/train_adapter.py --data_root data/tales
    python assets/storyteller/train_adapter.py --data_root data/tales --evaluate

The first resumes where it stopped; the second prints the held-out NLL per token, by source.

Every example is [prefix] [text] [end token], and all that follows the prefix is learned.

- prefix, 60 %: the story template in the model's chat template, with one word from each eighth of
  the story; 40 %: the start token alone.
- text, half: the story as it stands, which opens with a whole sentence; half: a line as people type
  it (a title, a wish, an order, a question), then the story.

Words are drawn by salience among those that are one token, as a code is; some of them are wrong, so
that the model learns how far to trust them. Batch t is a function of (seed, t) alone, so a resumed
run is the run.
"""

import argparse
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import story_generative_model as sgm

# how often an epoch tells each source's stories: picture books are few and the best told,
# Gutenberg's English is old
TIMES = {"TinyStories": 1, "Picture books": 3, "Gutenberg": 1 / 3}
FUNCTION_WORDS = frozenset(
    """
    a about after again all also always am an and another any are aren't around as asked at away
    back be became because been before began behind being but by came can can't cannot come
    could couldn't day did didn't do does doesn't doing don't done down each even ever every
    everyone everything few first for from get gets give go goes going gone good got had has
    have having he he's her here hers herself him himself his how i i'll i'm i've if in into is
    isn't it it's its itself just knew know let let's like liked little ll long looked made make
    many may me more most mr mrs much must my myself never new next no not nothing now of off oh
    on once one only or other our out over own put ran re really right said saw say see she
    she's should so some someone something soon still such take tell than that that's the their
    them then there these they thing things think this those thought three time to together told
    too took two under until up upon us ve very want wanted was wasn't way we well went were
    what when where which while who why will with won't would yes yet you your
    """.split()  # noqa: SIM905
)


def family(source: str) -> str:
    if source.startswith("Project Gutenberg"):
        return "Gutenberg"
    return source if source == "TinyStories" else "Picture books"


def read_stories(data_root: str, split: str) -> list[dict]:
    with open(Path(data_root) / split / "stories.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# --------------------------------------------------------------------------------------------------
# Words: one from each eighth of a story
# --------------------------------------------------------------------------------------------------


class Lexicon:
    """The words that tell stories apart: salience, spelling, and which words stand in one another's
    company."""

    def __init__(self, stories: list[str], tokenizer, most_common: float = 0.2, least: int = 4):
        self.tokenizer, self.count = tokenizer, len(stories)
        spellings, self.stories_with = defaultdict(Counter), Counter()
        self.sets = []
        for story in stories:
            words = re.findall(r"[A-Za-z]+(?:'[a-z]+)?", story)
            for word in words:
                spellings[word.lower()][word] += 1
            self.sets.append({word.lower() for word in words})
            self.stories_with.update(self.sets[-1])
        self.words = {}  # word -> how it is spelled within a sentence
        for word, count in sorted(self.stories_with.items()):  # sets have no order of their own
            spelling = spellings[word].most_common(1)[0][0]
            one_token = len(tokenizer(" " + spelling, add_special_tokens=False)["input_ids"]) == 1
            common = count > most_common * self.count and spelling.islower()
            if (
                count >= least
                and len(word) > 2
                and word not in FUNCTION_WORDS
                and one_token
                and not common
            ):
                self.words[word] = spelling

    def idf(self, word: str) -> float:
        return math.log(self.count / self.stories_with[word]) if self.stories_with[word] else 0.0

    @cached_property
    def near(self) -> dict[str, list[str]]:
        """The ten words that keep the most similar company: cosine of the leading 64 directions of
        the positive pointwise mutual information within stories (Levy and Goldberg 2014)."""
        number = {word: i for i, word in enumerate(self.words)}
        inside = torch.zeros(self.count, len(number))
        for row, words in enumerate(self.sets):
            inside[row, [number[word] for word in words if word in number]] = 1
        both, alone = inside.T @ inside / self.count, inside.mean(0)
        information = (
            (both / (alone[:, None] * alone)).clamp(min=1e-9).log().clamp(min=0).fill_diagonal_(0)
        )
        directions, scales, _ = torch.svd_lowrank(information, 64, niter=2)
        vectors = F.normalize(directions * scales.sqrt(), dim=1)
        closest = (vectors @ vectors.T).fill_diagonal_(-1).topk(10).indices.tolist()
        names = list(number)
        return {word: [names[i] for i in row] for word, row in zip(names, closest)}

    def candidates(self, story: str, offsets: list[tuple[int, int]]) -> list[list[str]]:
        """The words of each eighth of the story's tokens."""
        chunks = [[] for _ in range(sgm.NUM_SLOTS)]
        starts = {start: i for i, (start, _) in enumerate(offsets)} | {
            end: i for i, (_, end) in enumerate(offsets, 1)
        }
        for match in re.finditer(r"[A-Za-z]+", story[: offsets[-1][1]]):
            word = match.group().lower()
            place = starts.get(match.start(), starts.get(match.start() - 1))
            if word in self.words and place is not None:
                chunks[min(place * sgm.NUM_SLOTS // len(offsets), sgm.NUM_SLOTS - 1)].append(word)
        return chunks

    def choose(self, chunks: list[list[str]], rng: random.Random) -> list[str]:
        """A word for each slot: by salience, mostly true; a wrong one keeps similar company or is
        any word."""
        names = list(self.words)
        wrong = 0.6 if rng.random() < 0.06 else 0.14
        chosen = []
        for chunk in chunks:
            weights = [self.idf(word) ** 1.5 for word in chunk]
            word = rng.choices(chunk, weights)[0] if sum(weights) else rng.choice(names)
            if rng.random() < wrong:
                word = rng.choice(self.near[word]) if rng.random() < 0.6 else rng.choice(names)
            chosen.append(self.words[word])
        return chosen


# --------------------------------------------------------------------------------------------------
# Lines: what people type, made from the story that shall answer it
# --------------------------------------------------------------------------------------------------

PHRASE = re.compile(
    r"\b(?:a|an|the|his|her|their|its|my|some|two|many) ((?:[a-z]+ ){0,2}[a-z]{3,})"
    r"(?=[.,!?;\"]| (?:and|but|was|is|in|on|to|that|with|who|of|had|from|for|said|at|were|could|"
    r"would|saw|went|wanted|named|called|came|has|by)\b)"
)
PLAN = re.compile(
    r"\b(?:wanted|want|wants|decided|tried|loved|loves|liked|likes|learned|planned|hoped|went|"
    r"ready|going|how|able) to ((?:[\w']+ ){1,7}[\w']+)"
    r"(?=[.,!?;\"]| (?:and|but|so|because|when)\b)"
)


def with_article(phrase: str) -> str:
    if phrase.endswith("s") and not phrase.endswith("ss"):
        return phrase
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


class Line:
    """Lines that a story answers: titles, orders, wishes, questions and single sentences."""

    def __init__(self, row: dict, lexicon: Lexicon, rng: random.Random):
        self.rng, self.title, story = rng, row["title"], row["story"]
        self.names = [name for name in re.findall(r"\b(?:named|called) ([A-Z][a-z]+)", story)]
        phrases = [
            p
            for p in dict.fromkeys(PHRASE.findall(story))
            if not set(p.split()) & FUNCTION_WORDS - {"little"}
        ]
        weight = {p: lexicon.idf(p.split()[-1]) * (1 + rng.random()) for p in phrases}
        self.phrases = sorted(phrases, key=weight.get, reverse=True)[:3]
        rng.shuffle(self.phrases)
        self.plans = [re.sub(r"\b(his|her|their)\b", "the", plan) for plan in PLAN.findall(story)]
        sentences = re.split(r"(?<=[.!?]) ", story)
        self.sentences = [
            s[:-1]
            for s in sentences[: max(3, len(sentences) // 2)]
            if 5 <= len(s.split()) <= 14
            and s[-1] == "."
            and not re.match(r"(He|She|They|It|But|And|So|Then)\b", s)
        ]

    def someone(self) -> str:
        if self.names and self.rng.random() < 0.4:
            return self.rng.choice(self.names)
        return "the " + self.phrases[0]

    def about(self) -> str:
        things = [with_article(phrase) for phrase in self.phrases]
        if self.names and self.rng.random() < 0.25:
            things[0] = self.rng.choice(self.names)
        return " and ".join(things[: self.rng.choice((1, 2, 2))])

    def kinds(self) -> list[str]:
        """One line of each form that this story has the parts for."""
        pick, found = self.rng.choice, []
        if self.title:
            found += [self.title] * 4
        if self.sentences:
            found += [
                re.sub(
                    r"^One day, |^Once upon a time, (there (was|lived) )?", "", pick(self.sentences)
                )
            ] * 3
        if self.phrases:
            one, two = self.phrases[0], self.phrases[-1]
            order = pick(
                [
                    "Write a story about",
                    "Tell me a story about",
                    "Write a short story about",
                    "Write about",
                ]
            )
            ask = pick(
                [
                    "Please tell me a story about",
                    "Can you tell a story about",
                    "Make up a story about",
                    order,
                ]
            )
            found += [f"{pick([order, ask])} {self.about()}"] * 3
            found += [
                pick(["A story about", "A tale of", "I want a story about"]) + " " + self.about()
            ]
            found += [
                pick(
                    [
                        f"The {one} and the {two}",
                        f"The {one}",
                        self.about(),
                        ", ".join(self.phrases),
                    ]
                )
            ] * 2
            found += [
                pick(
                    [
                        f"What happens when {with_article(one)} meets {with_article(two)}?",
                        f"Where is the {one}?",
                    ]
                )
            ]
            found += [f"I wish I had {with_article(one)}"]
        if self.plans and self.phrases:
            plan = pick(self.plans)
            found += [plan, f"I want to {plan}", f"{self.someone()} wants to {plan}"]
            found += [
                f"How do you {plan}?",
                f"Why did {self.someone()} want to {plan}?",
                f"Can you {plan}?",
            ]
        return found

    def draw(self) -> str:
        """One line, spelled as people spell; empty where the story gives none."""
        kinds, rng = self.kinds(), self.rng
        if not kinds:
            return ""
        line = rng.choice(kinds).strip()
        line = line[0].upper() + line[1:] if rng.random() < 0.75 else line.lower()
        if line[-1] == "?":
            return line if rng.random() < 0.8 else line[:-1]
        return line + rng.choices(("", ".", "!"), (0.8, 0.15, 0.05))[0]


# --------------------------------------------------------------------------------------------------
# Examples and batches
# --------------------------------------------------------------------------------------------------


class Teller:
    """Turns rows into examples: (prefix ids, text ids with the end token)."""

    def __init__(self, rows: list[dict], tokenizer, seed: int, max_tokens: int):
        self.rows, self.tokenizer, self.seed, self.max_tokens = rows, tokenizer, seed, max_tokens
        self.lexicon = Lexicon([row["story"] for row in rows], tokenizer)
        self.pieces = sgm.tokenize_template(tokenizer, sgm.STORY_TEMPLATE, tokenizer.bos_token_id)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def in_template(self, words: list[str]) -> list[int]:
        """Eight words, each of one token, stand in the template exactly where the soft tokens
        stand."""
        prefix = list(self.pieces[0])
        for word, piece in zip(words, self.pieces[1:]):
            prefix += self.ids(" " + word) + piece
        return prefix

    def cut(self, story: str) -> tuple[str, list[tuple[int, int]]]:
        offsets = self.tokenizer(story, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        offsets = offsets[: self.max_tokens]
        return story[: offsets[-1][1]], offsets

    def example(self, row: dict, rng: random.Random) -> tuple[list[int], list[int]]:
        story, offsets = self.cut(row["story"])
        end = [self.tokenizer.eos_token_id] if len(story) == len(row["story"]) else []
        prefix = [self.tokenizer.bos_token_id]
        if rng.random() < 0.6:
            prefix = self.in_template(
                self.lexicon.choose(self.lexicon.candidates(story, offsets), rng)
            )
        line = Line(row, self.lexicon, rng).draw() if rng.random() < 0.5 else ""
        before = sgm.opening(line) if line else ""
        before += " " * (before != "" and not before[-1].isspace())
        return prefix, self.ids(before + story) + end

    def epoch(self, number: int) -> list[int]:
        """The rows of one epoch in order, TIMES as often as their source says."""
        rng, order = random.Random(f"{self.seed} epoch {number}"), []
        for i, row in enumerate(self.rows):
            times = TIMES[family(row["source"])]
            order += [i] * (int(times) + (rng.random() < times % 1))
        rng.shuffle(order)
        return order

    def batches(self, step: int, size: int, pool: int = 8):
        """Batches of `size` examples from optimizer step `step` on. `pool` batches are cut from one
        draw sorted by length, so that little is padded."""
        number, draws = 0, step // pool
        per_epoch = len(self.epoch(0)) // (size * pool)
        for draw in range(draws, 10**9):
            number, place = divmod(draw, per_epoch)
            order = self.epoch(number)[place * size * pool :][: size * pool]
            rng = random.Random(f"{self.seed} draw {draw}")
            examples = sorted(
                (self.example(self.rows[i], rng) for i in order),
                key=lambda e: len(e[0]) + len(e[1]),
            )
            batches = [examples[i : i + size] for i in range(0, len(examples), size)]
            rng.shuffle(batches)
            yield from batches[step - draw * pool if draw == draws else 0 :]


# --------------------------------------------------------------------------------------------------
# Model, loss and loop
# --------------------------------------------------------------------------------------------------


def batch_loss(
    model, examples: list[tuple[list[int], list[int]]], backward: bool
) -> tuple[list[float], int]:
    """Summed NLL of each example's text in nats, and the count of tokens. The logits of 49,152
    words are what does not fit the cache, so they are made for a few positions at a time, forward
    and backward."""
    length = max(len(prefix) + len(text) for prefix, text in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.int64)
    learned = torch.zeros(len(examples), length, dtype=torch.bool)
    for i, (prefix, text) in enumerate(examples):
        ids[i, : len(prefix) + len(text)] = torch.tensor(prefix + text)
        learned[i, len(prefix) : len(prefix) + len(text)] = True
    tokens = int(learned.sum())
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.autocast("cpu", torch.bfloat16):
        # padded at the right: a causal model never sees the padding, so no mask is needed
        hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state
    before = hidden[:, :-1][learned[:, 1:]]  # (tokens, E)
    targets = ids[:, 1:][learned[:, 1:]]
    leaf, losses = before.detach().requires_grad_(backward), []
    for some, wanted in zip(leaf.split(64), targets.split(64)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = causal.lm_head(some)
        loss = F.cross_entropy(logits.float(), wanted, reduction="none")
        if backward:
            (loss.sum() / tokens).backward()
        losses.append(loss.detach())
    if backward:
        before.backward(leaf.grad)
    return [float(part.sum()) for part in torch.cat(losses).split(learned.sum(1).tolist())], tokens


def with_lora(model, rank: int):
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, settings)


def learning_rate_factor(step: int, args) -> float:
    """Warm-up, a plateau, and a linear fall to zero over the last part: a longer run resumes from
    the plateau."""
    fall = args.max_train_steps * args.decay_fraction
    return min(
        1.0,
        (step + 1) / args.lr_warmup_steps,
        max(0.0, (args.max_train_steps - step) / max(fall, 1)),
    )


def write_whole(path: Path, content: dict) -> None:
    """A temporary file, then one rename: a kill leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, path)


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model, teller: Teller, args) -> None:
    output, start = Path(args.output_dir), time.time()
    output.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=args.learning_rate, weight_decay=0.0)
    step, path = 0, output / "checkpoint.pt"
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        model.load_state_dict(kept["adapter"], strict=False)
        optimizer.load_state_dict(kept["optimizer"])
        step = kept["step"]
    print(f"from step {step} to {args.max_train_steps}: {vars(args)}", flush=True)
    print(f"{len(teller.rows)} stories, {len(teller.lexicon.words)} words", flush=True)

    def save():
        adapter = {name: p.detach() for name, p in trained(model).items()}
        write_whole(path, {"adapter": adapter, "optimizer": optimizer.state_dict(), "step": step})

    saved, logged, seen = time.time(), time.time(), Counter()
    for batch in teller.batches(step, args.train_batch_size):
        if step >= args.max_train_steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_factor(step, args)
        losses, tokens = batch_loss(model, batch, backward=True)
        norm = torch.nn.utils.clip_grad_norm_(trained(model).values(), args.max_grad_norm)
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        step += 1
        for (prefix, text), loss in zip(batch, losses):
            kind = "bare" if len(prefix) == 1 else "words"
            seen.update({kind: loss, kind + " tokens": len(text)})
        seen.update({"stories": len(batch), "tokens": tokens})
        if step % args.logging_steps == 0:
            wall = time.time() - logged
            nll = " ".join(
                f"{k} {seen[k] / max(seen[k + ' tokens'], 1):.3f}" for k in ("bare", "words")
            )
            rate = f"{seen['stories'] / wall:.2f} stories/s"
            print(
                f"step {step} nats/token {nll} norm {norm:.2f} lr {group['lr']:.1e} {rate}",
                flush=True,
            )
            logged, seen = time.time(), Counter()
        if time.time() - saved > 60 * args.checkpointing_minutes:
            save()
            saved = time.time()
        if time.time() - start > args.time_limit * 60:
            break
    save()
    export(model, output / "adapter", args)


def export(model, folder: Path, args) -> None:
    """What peft reads: the adapter in fp16 and its configuration, which names the base model on the
    hub."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file({name: x.half() for name, x in load_file(path).items()}, path, {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = args.base_model_name
    config["target_modules"].sort()  # a set, whose order changes from run to run
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card


@torch.no_grad()
def evaluate(model, teller: Teller, rows: list[dict], per_source: int) -> None:
    """Prints the held-out NLL per token, end token included, by source: the model as it came, and
    taught."""
    print("source | stories | tokens | nats a token before | after | change")
    for source in TIMES:
        own = [row for row in rows if family(row["source"]) == source][:per_source]
        if not own:
            continue
        examples = []
        for row in own:
            story, _ = teller.cut(row["story"])
            whole = len(story) == len(row["story"])
            ids = teller.ids(story) + [teller.tokenizer.eos_token_id] * whole
            examples.append(([teller.tokenizer.bos_token_id], ids))
        examples.sort(key=lambda example: len(example[1]))
        sums, tokens = Counter(), 0
        for batch in [examples[i : i + 8] for i in range(0, len(examples), 8)]:
            sums["after"] += sum(batch_loss(model, batch, backward=False)[0])
            with model.disable_adapter():
                sums["before"] += sum(batch_loss(model, batch, backward=False)[0])
            tokens += sum(len(text) for _, text in batch)
        before, after = sums["before"] / tokens, sums["after"] / tokens
        change = f"{100 * (after / before - 1):.1f} %"
        print(f"{source} | {len(own)} | {tokens} | {before:.3f} | {after:.3f} | {change}")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_root", default="data/tales")
    parser.add_argument("--output_dir", default="checkpoints/storyteller_adapter")
    parser.add_argument("--lm_model", default=sgm.SMOLLM2)
    parser.add_argument("--base_model_name", default=sgm.SMOLLM2)
    parser.add_argument("--max_train_steps", type=int, default=2000)
    parser.add_argument(
        "--time_limit", type=float, default=math.inf, help="minutes, after which it saves and stops"
    )
    parser.add_argument("--train_batch_size", type=int, default=6)
    parser.add_argument("--learning_rate", type=float, default=8e-4)
    parser.add_argument("--lr_warmup_steps", type=int, default=20)
    parser.add_argument("--decay_fraction", type=float, default=0.4)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument(
        "--max_tokens", type=int, default=288, help="a longer story is cut there and has no end"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--logging_steps", type=int, default=10)
    parser.add_argument("--checkpointing_minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--evaluate",
        nargs="?",
        const=str(Path(__file__).with_name("adapter")),
        metavar="ADAPTER",
        help="print the held-out NLL of an adapter (default: the committed one) and stop",
    )
    parser.add_argument("--stories_per_source", type=int, default=64)
    parser.add_argument("--show", type=int, default=0, help="print this many examples and stop")
    args = parser.parse_args(argv)
    wanted = [Path(args.data_root, split, "stories.jsonl") for split in ("train", "val")]
    wanted += [Path(args.evaluate, "adapter_config.json")] if args.evaluate else []
    for path in wanted:  # now, and not as a traceback
        if not path.is_file():
            parser.error(f"{path} is missing: see --data_root and --evaluate")
    return args


def main(argv=None) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = parse_args(argv)
    torch.manual_seed(args.seed)
    base = sgm.find_language_model(args.lm_model)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    teller = Teller(read_stories(args.data_root, "train"), tokenizer, args.seed, args.max_tokens)
    if args.show:
        for batch in list(zip(teller.batches(0, 1), range(args.show))):
            for prefix, text in batch[0]:
                print(
                    repr(tokenizer.decode(prefix)[-110:]),
                    "\n   ",
                    repr(tokenizer.decode(text)[:400]),
                )
        return
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, attn_implementation="sdpa", trust_remote_code=False
    )
    if args.evaluate:
        model = PeftModel.from_pretrained(model, args.evaluate)
        evaluate(model, teller, read_stories(args.data_root, "val"), args.stories_per_source)
    else:
        train(with_lora(model, args.rank), teller, args)


if __name__ == "__main__":
    main()
