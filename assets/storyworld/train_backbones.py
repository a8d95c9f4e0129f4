"""Make the embedded backbones of the storyworld from scratch: a small language model and a small Stable Diffusion.

Every story and picture comes from `world.py`, so the run needs no data and no network, only time: under three
hours on two CPU cores. It is seeded, and a killed run goes on from its last checkpoint:

    python assets/storyworld/train_backbones.py                      # all stages
    python assets/storyworld/train_backbones.py --stages lm          # one stage
    python assets/storyworld/train_backbones.py --scale 0.01 --work_dir /tmp/work --output_dir /tmp/out   # a rehearsal

Stage       makes                                            from
words       work_dir/words       GPT-2 and its tokenizer     stories
lm          output_dir/lm        the same, that has learned  stories, words
                                 to hear storyboards
vae         output_dir/diffusion/vae                         panels
unet        output_dir/diffusion (a StableDiffusionPipeline) stories, panels, vae
probe       output_dir/probe.safetensors                     panels, vae
storyboard  output_dir/storyboard.pt                         the two programs' own commands
report      output_dir/README.md, output_dir/sheet.png       all of the above, on held-out stories

Shapes: B stories or panels in a batch, T tokens, E width, L latent channels.
Contents: Runs and checkpoints, Data, Language model, Autoencoder, Painter, Storyboard, Probe, Report,
Command line.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [
    str(HERE),
    str(ROOT),
]  # `world` and `probe` stand beside this file, the program above it

import world  # noqa: E402
from probe import Probe, load_probe, save_probe  # noqa: E402

import story_generative_model as sgm  # noqa: E402

# --------------------------------------------------------------------------------------------------
# Runs and checkpoints  One loop trains everything. A step draws all its randomness (data order,
# noise, timesteps) from (seed, stage, step), so a checkpoint needs no generator states and a
# resumed run takes the very steps that the killed one would have taken.
# --------------------------------------------------------------------------------------------------

CHECKPOINT_SECONDS = 120  # what a kill may cost
LOG_SECONDS = 10
HELD_OUT_CHECKS = 8  # held-out figures in one run
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """Where and how the stages run."""

    work_dir: Path
    output_dir: Path
    seed: int = 0
    scale: float = 1.0
    device: torch.device = CPU
    bf16: bool = True

    def scaled(self, count: int, least: int = 2) -> int:
        """`count` steps or examples, times --scale."""
        return max(least, round(count * self.scale))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def done(self, stage: str) -> Path:
        """The marker of a finished stage."""
        return self.work_dir / f"{stage}.done"


@dataclass(frozen=True)
class Recipe:
    """How one model is fitted: AdamW, and Muon for the hidden weights where it has a rate; linear
    warm-up, then a cosine to a hundredth of the rates, or `hold`, then a straight line to zero."""

    steps: int
    learning_rate: float  # AdamW's
    muon_rate: float = 0.0  # 0: AdamW trains everything
    warmup: int = 100
    hold: float = 0.0  # the share of the steps up to which the rates stay at their peak; 0: cosine
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0  # 0: no average is kept

    def share_at(self, step: int) -> float:
        """The rates at `step` as a share of their peak, in (0, 1]."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.hold:
            return min(1.0, (1 - step / self.steps) / (1 - self.hold))
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def seed_of(*parts: object) -> int:
    """A seed in [0, 2**63) from any printable parts; the same in every process (unlike `hash`)."""
    return random.Random(repr(parts)).getrandbits(63)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write` a temporary file beside `path`, then put it in place: a kill leaves the old file or
    the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def average_into(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema <- decay * ema + (1 - decay) * model, with a short memory at the start."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], weight)
    for mine, theirs in zip(ema.buffers(), model.buffers()):
        mine.copy_(theirs)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def orthogonalised(matrix: Tensor) -> Tensor:
    """Newton-Schulz towards the nearest (half-)orthogonal matrix of `matrix` (m, n): all singular
    values near 1.

    The quintic's coefficients are those of Jordan et al. 2024: fast rather than exact, values end
    in 0.7 to 1.2. Under autocast it runs, and returns, in autocast's dtype.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    for _ in range(5):
        gram = x @ x.T
        factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, factor, x, beta=3.4445)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for hidden weights of two or more dimensions (torch's own takes two
    only).

    The step is scaled to the size of AdamW's, so that rates are alike (Liu et al. 2025, "Muon is
    scalable").
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, group["lr"], group["momentum"])

    def move(self, parameter: nn.Parameter, lr: float, momentum: float) -> None:
        state = self.state[parameter]
        if not state:
            state["velocity"] = torch.zeros_like(parameter)
        velocity = state["velocity"].mul_(momentum).add_(parameter.grad)
        ahead = parameter.grad.add(velocity, alpha=momentum).flatten(
            1
        )  # Nesterov; a convolution is (out, in * k * k)
        size = 0.2 * max(ahead.shape) ** 0.5  # 0.2: the usual root mean square of an AdamW step
        parameter.sub_(orthogonalised(ahead).reshape(parameter.shape), alpha=lr * size)


OUTER_LAYERS = (
    "conv_in",
    "conv_out",
    "quant_conv",
    "embed",
    "wte",
    "wpe",
)  # no Muon where pixels or words come in


def new_optimizers(model: nn.Module, recipe: Recipe) -> list[tuple[torch.optim.Optimizer, float]]:
    """The optimizers of the trained parameters, each with its peak rate."""
    hidden, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inner = parameter.ndim >= 2 and not any(layer in name for layer in OUTER_LAYERS)
            (hidden if inner and recipe.muon_rate else others).append(parameter)
    adamw = torch.optim.AdamW(
        others, recipe.learning_rate, recipe.betas, weight_decay=recipe.weight_decay
    )
    if not hidden:
        return [(adamw, recipe.learning_rate)]
    return [(adamw, recipe.learning_rate), (Muon(hidden, recipe.muon_rate), recipe.muon_rate)]


def fit(
    run: Run,
    name: str,
    model: nn.Module,
    recipe: Recipe,
    losses_at: Callable[[int], dict[str, Tensor]],
    held_out: Callable[[nn.Module], dict[str, float]] | None = None,
    checks: int = HELD_OUT_CHECKS,
) -> nn.Module:
    """Train the parameters of `model` that require gradients; return its average (or itself), in
    eval mode.

    `losses_at(step)` gives scalar tensors and minimises the one called "loss"; `held_out(model)`
    gives figures for the log, `checks` times in the run. The checkpoint is work_dir/<name>.pt.
    """
    path = run.work_dir / f"{name}.pt"
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = new_optimizers(model, recipe)
    ema = copy.deepcopy(model).requires_grad_(False) if recipe.ema_decay else None
    parts = {
        "model": model,
        **dict(zip(("optimizer", "muon"), (optimizer for optimizer, _ in optimizers))),
    }
    if ema:
        parts["ema"] = ema
    first = resume(path, run, parts)

    def save(step: int) -> None:
        state = {"step": step, **{key: part.state_dict() for key, part in parts.items()}}
        write_atomically(path, lambda partial: torch.save(state, partial))

    log = Log(name, first, recipe.steps)
    print(
        f"[{name}] {sum(p.numel() for p in trained):,} trained parameters, steps {first} to {recipe.steps}",
        flush=True,
    )
    model.train()
    for step in range(first, recipe.steps):
        torch.manual_seed(seed_of(run.seed, name, step))
        with run.autocast():
            losses = losses_at(step)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        for optimizer, rate in optimizers:
            optimizer.param_groups[0]["lr"] = rate * recipe.share_at(step)
            with run.autocast():  # Muon multiplies matrices
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if ema:
            average_into(ema, model, recipe.ema_decay, step)
        log.add(step, losses)
        if log.checkpoint_is_due():
            save(step + 1)
        if held_out and (step + 1) % max(1, recipe.steps // checks) == 0:
            log.figures(step, checked(held_out, ema or model))
            model.train()
    save(recipe.steps)
    return (ema or model).eval()


def resume(path: Path, run: Run, parts: dict[str, nn.Module | torch.optim.Optimizer]) -> int:
    """Load the checkpoint's state into `parts` if there is one; return the step to go on from."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location=run.device, weights_only=True)
    for key, part in parts.items():
        part.load_state_dict(state[key])
    return state["step"]


def checked(
    held_out: Callable[[nn.Module], dict[str, float]], model: nn.Module
) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        return held_out(model)


class Log:
    """Prints a line every LOG_SECONDS: step, mean losses since the last line, speed, time left."""

    def __init__(self, name: str, first: int, steps: int) -> None:
        self.name, self.first, self.steps = name, first, steps
        self.start = self.printed = self.saved = time.monotonic()
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        self.count += 1
        for key, value in losses.items():
            self.sums[key] = self.sums.get(key, 0.0) + value.detach().float().item()
        now = time.monotonic()
        if now - self.printed >= LOG_SECONDS or step + 1 == self.steps:
            speed = (step + 1 - self.first) / (now - self.start)
            means = " ".join(f"{key} {value / self.count:.4f}" for key, value in self.sums.items())
            left = clock((self.steps - step - 1) / speed)
            print(
                f"[{self.name}] step {step + 1}/{self.steps} {means} | {speed:.2f} steps/s, {left} left",
                flush=True,
            )
            self.printed, self.sums, self.count = now, {}, 0

    def figures(self, step: int, figures: dict[str, float]) -> None:
        line = " ".join(f"{key} {value:.3f}" for key, value in figures.items())
        print(f"[{self.name}] step {step + 1} held out: {line}", flush=True)

    def checkpoint_is_due(self) -> bool:
        due = time.monotonic() - self.saved >= CHECKPOINT_SECONDS
        if due:
            self.saved = time.monotonic()
        return due


# --------------------------------------------------------------------------------------------------
# Data  Stories are seeds. Training takes them from TRAIN_SEEDS on, measuring from HELD_OUT_SEEDS
# on; the two never meet.
# --------------------------------------------------------------------------------------------------

TRAIN_SEEDS = 0
HELD_OUT_SEEDS = 10**9
REPORT_SEEDS = HELD_OUT_SEEDS + 10**6  # seen by no training's checks either
SEEN_FACTORS = (
    "species",
    "colour",
    "place",
    "time",
    "weather",
    "object",
    "problem",
    "helper",
    "ending",
)
NOT_SHOWN = -1  # the class index of a factor that a panel does not show


def train_story(index: int) -> world.Story:
    if not 0 <= index < HELD_OUT_SEEDS - TRAIN_SEEDS:
        raise IndexError(
            f"training story {index}: its seed would be one of the held-out seeds, {HELD_OUT_SEEDS} on"
        )
    return world.write_story(TRAIN_SEEDS + index)


def held_out_story(index: int) -> world.Story:
    return world.write_story(HELD_OUT_SEEDS + index)


def report_story(index: int) -> world.Story:
    return world.write_story(REPORT_SEEDS + index)


def factor_labels(stories: list[world.Story]) -> np.ndarray:
    """Class indices (stories, beats, factors), NOT_SHOWN where the panel does not show the
    factor."""
    labels = np.full((len(stories), len(world.BEATS), len(SEEN_FACTORS)), NOT_SHOWN)
    for i, story in enumerate(stories):
        for beat in range(len(world.BEATS)):
            for factor, value in world.visible_factors(story, beat).items():
                if factor in SEEN_FACTORS:
                    labels[i, beat, SEEN_FACTORS.index(factor)] = world.FACTORS[factor].index(value)
    return labels


# --------------------------------------------------------------------------------------------------
# Language model  A GPT-2 of 2.3M parameters that writes the world's stories and has learned to
# listen to a prefix:
#     <|endoftext|> [k prefix embeddings] story tokens <|endoftext|>
#  For a quarter of the stories k = 0. For the others slot j of the prefix holds one telling token
# of chunk j of the story (chunk j: tokens floor(j n / k) to floor((j + 1) n / k)): where a soft
# prompt will stand, the model already looks. Half of the slots are softened (a mean of tokens'
# embeddings, or noise), since a soft prompt is no word.  A keyword is drawn by chance, so the words
# that are not drawn tell nothing. A storyboard is a function of its story, and a model can trust it
# to the last bit: with p(z) p(s | z) = p(s) it returns all that it costs. So the stage ends with
# storyboards for prefixes: those that the program's own encoder makes at its start, from k-means on
# the chunks of the stories at hand, so that no codebook is seen for long and none has to be learned
# by heart.
# --------------------------------------------------------------------------------------------------

LM_VOCABULARY = 2048  # nearly every word of the world is one token
LM_CONTEXT = 512  # a prefix and the longest story, with room to spare
LM_SHAPE = dict(n_embd=192, n_layer=4, n_head=6, n_positions=LM_CONTEXT)
LM_BATCH = 32
LM_POOL = (
    64 * LM_BATCH
)  # stories that are sorted by length together, so that a batch has little padding
LM_RECIPE = Recipe(
    steps=1400, learning_rate=2e-3, muon_rate=3e-3, betas=(0.9, 0.95), weight_decay=0.05
)
LM_TOKENIZER_STORIES = 6000
PREFIX_SHARE = 0.75  # of the stories
PREFIX_USUAL = 8  # the storyboard's length
PREFIX_USUAL_SHARE = 0.6  # of the prefixes; the others have 1 to PREFIX_MOST slots
PREFIX_MOST = 16
SOFT_SHARE = 0.5  # of the prefix slots
SOFT_TOKENS = 3  # embeddings in a softened slot's mean
SOFT_NOISE = 0.5  # most noise on a slot, as a share of the embeddings' own standard deviation
END_OF_TEXT = "<|endoftext|>"
LM_CHECK_STORIES = 128  # in the held-out figures of the log
LISTENING_RECIPE = Recipe(
    steps=2000, learning_rate=1.2e-3, muon_rate=2e-3, betas=(0.9, 0.95), weight_decay=0.05
)
STORYBOARD_SHARE = (
    0.8  # of the stories; the others come without a prefix or with keywords, as before
)
STORYBOARD_CODES = (64, 96, 96, 128)  # K of a pool's codebook is one of these


def train_lm_tokenizer(texts: Iterator[str]):
    """A byte-level BPE tokenizer as GPT-2's: one special token that is both BOS and EOS, none for
    padding."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=LM_VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=LM_CONTEXT,
    )


def story_ids(tokenizer, stories: list[world.Story]) -> list[list[int]]:
    """Token ids of each story and its EOS, cut at what the context leaves beside BOS and the
    longest prefix."""
    most = LM_CONTEXT - 1 - PREFIX_MOST
    rows = tokenizer([story.text for story in stories], add_special_tokens=False)["input_ids"]
    return [(row + [tokenizer.eos_token_id])[:most] for row in rows]


def informativeness(rows: list[list[int]], vocabulary: int) -> np.ndarray:
    """Weight of each token (vocabulary,) as a keyword: squared log of how few stories have it, so
    about 0 for "the"."""
    stories_with = np.ones(vocabulary)
    for row in rows:
        stories_with[np.unique(row)] += 1
    return np.log((len(rows) + 1) / stories_with).clip(min=0) ** 2 + 1e-3


@dataclass
class LmBatch:
    """One padded batch: `ids` and `targets` (B, T) long, targets -100 where nothing is predicted;
    `soft_*` name the softened slots: row and column (N,), the tokens (N, SOFT_TOKENS) whose mean
    stands there, the noise (N,)."""

    ids: Tensor
    targets: Tensor
    soft_row: Tensor
    soft_column: Tensor
    soft_tokens: Tensor
    soft_noise: Tensor


def keyword(chunk: list[int], weights: np.ndarray, rng: random.Random) -> int:
    return rng.choices(chunk, weights=[weights[token] for token in chunk])[0]


def chunks_of(row: list[int], count: int) -> list[list[int]]:
    """`count` equal parts of `row`, at least one token each."""
    edges = [j * len(row) // count for j in range(count + 1)]
    return [row[a : max(b, a + 1)] for a, b in pairwise(edges)]


def draw_prefix_length(rng: random.Random, share: float = PREFIX_SHARE) -> int:
    if rng.random() >= share:
        return 0
    return PREFIX_USUAL if rng.random() < PREFIX_USUAL_SHARE else rng.randint(1, PREFIX_MOST)


def lm_batch(
    rows: list[list[int]],
    lengths: list[int],
    weights: np.ndarray,
    bos: int,
    rng: random.Random,
    soften: bool = True,
) -> LmBatch:
    """Put BOS and a prefix of the given length before each row. Padding is BOS: causal attention
    never sees it."""
    ids, targets, soft = [], [], []
    for i, (row, length) in enumerate(zip(rows, lengths)):
        prefix = []
        for j, chunk in enumerate(chunks_of(row[:-1], length) if length else []):
            prefix.append(keyword(chunk, weights, rng))
            if soften and rng.random() < SOFT_SHARE:
                mean = rng.random() < 0.5  # otherwise noise
                tokens = [
                    keyword(chunk, weights, rng) if mean else prefix[-1] for _ in range(SOFT_TOKENS)
                ]
                soft.append((i, 1 + j, tokens, 0.0 if mean else rng.uniform(0, SOFT_NOISE)))
        ids.append([bos, *prefix, *row])
        targets.append([-100] * length + row)  # the target of position t is the token at t + 1
    width = max(map(len, ids))
    row, column, tokens, noise = zip(*soft) if soft else ([], [], [], [])
    return LmBatch(
        torch.tensor([x + [bos] * (width - len(x)) for x in ids])[:, :-1],
        torch.tensor([x + [-100] * (width - 1 - len(x)) for x in targets]),
        torch.tensor(row, dtype=torch.long),
        torch.tensor(column, dtype=torch.long),
        torch.tensor(tokens, dtype=torch.long).reshape(-1, SOFT_TOKENS),
        torch.tensor(noise, dtype=torch.float32),
    )


def from_pools(pool: Callable[[int], list]) -> Callable[[int], object]:
    """The batch of a step, where pool(number) makes the batches of LM_POOL stories; one pool is
    kept at a time."""
    pool = functools.lru_cache(maxsize=1)(pool)

    def at(step: int):
        number, position = divmod(step, LM_POOL // LM_BATCH)
        return pool(number)[position]

    return at


def lm_batches(run: Run, tokenizer, weights: np.ndarray) -> Callable[[int], LmBatch]:
    """The training batch of a step: fresh stories in pools, each pool sorted by length and its
    batches shuffled."""

    def pool(number: int) -> list[LmBatch]:
        rng = random.Random(seed_of(run.seed, "lm pool", number))
        rows = story_ids(tokenizer, [train_story(number * LM_POOL + i) for i in range(LM_POOL)])
        drawn = sorted(
            ((row, draw_prefix_length(rng)) for row in rows),
            key=lambda pair: len(pair[0]) + pair[1],
        )
        starts = list(range(0, LM_POOL, LM_BATCH))
        rng.shuffle(starts)
        return [
            lm_batch(*zip(*drawn[s : s + LM_BATCH]), weights, tokenizer.bos_token_id, rng)
            for s in starts
        ]

    return from_pools(pool)


def lm_embeddings(model, batch: LmBatch, device: torch.device) -> Tensor:
    """Input embeddings (B, T, E), the softened slots replaced."""
    table = model.transformer.wte
    embeddings = table(batch.ids.to(device))  # (B, T, E)
    if len(batch.soft_row) == 0:
        return embeddings
    soft = table(batch.soft_tokens.to(device)).mean(1)  # (N, E)
    scale = batch.soft_noise.to(device)[:, None] * table.weight.detach().std()
    soft = soft + scale * torch.randn_like(soft)
    places = (batch.soft_row.to(device), batch.soft_column.to(device))
    return embeddings.index_put(places, soft.to(embeddings.dtype))


def lm_token_nll(model, batch: LmBatch, device: torch.device) -> Tensor:
    """-log p of every predicted token, nats, (number of story tokens in the batch,)."""
    return predicted_nll(model, lm_embeddings(model, batch, device), batch.targets.to(device))


def predicted_nll(model, embeddings: Tensor, targets: Tensor) -> Tensor:
    """-log p of the tokens `targets` (B, T) after `embeddings` (B, T, E), one after the other where
    not -100, nats."""
    hidden = model.transformer(inputs_embeds=embeddings).last_hidden_state  # (B, T, E)
    predicted = targets != -100
    logits = model.lm_head(hidden[predicted])  # (tokens, vocabulary)
    return F.cross_entropy(logits.float(), targets[predicted], reduction="none")


def lm_held_out(
    run: Run, model, tokenizer, weights: np.ndarray, stories: list[world.Story], length: int
) -> dict[str, float]:
    """NLL of held-out stories after a keyword prefix of `length` tokens: nats per story, and per
    token."""
    rows = sorted(story_ids(tokenizer, stories), key=len)
    rng, total = random.Random(seed_of("lm held out", length)), 0.0
    for start in range(0, len(rows), LM_BATCH):
        part = rows[start : start + LM_BATCH]
        batch = lm_batch(
            part, [length] * len(part), weights, tokenizer.bos_token_id, rng, soften=False
        )
        total += lm_token_nll(model, batch, run.device).double().sum().item()
    return {"story": total / len(rows), "token": total / sum(map(len, rows))}


def new_lm(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    bos = tokenizer.bos_token_id
    dropout = dict.fromkeys(
        ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0
    )  # no story comes twice
    config = GPT2Config(
        vocab_size=len(tokenizer), bos_token_id=bos, eos_token_id=bos, **LM_SHAPE, **dropout
    )
    config._attn_implementation = (
        "eager"  # the CPU's fused attention has a slow backward; the choice is not saved
    )
    return GPT2LMHeadModel(config)


def train_words(run: Run) -> None:
    """Stage words: tokenizer and model, saved in fp16 to work_dir/words."""
    sample = [train_story(i) for i in range(run.scaled(LM_TOKENIZER_STORIES, 200))]
    tokenizer = train_lm_tokenizer(story.text for story in sample)
    weights = informativeness(story_ids(tokenizer, sample), len(tokenizer))
    torch.manual_seed(seed_of(run.seed, "lm"))
    model = new_lm(tokenizer).to(run.device)
    batch_at = lm_batches(run, tokenizer, weights)
    checked_stories = [held_out_story(i) for i in range(run.scaled(LM_CHECK_STORIES))]

    def losses_at(step: int) -> dict[str, Tensor]:
        return {"loss": lm_token_nll(model, batch_at(step), run.device).mean()}

    def held_out(model) -> dict[str, float]:
        bare = lm_held_out(run, model, tokenizer, weights, checked_stories, 0)
        prefixed = lm_held_out(run, model, tokenizer, weights, checked_stories, PREFIX_USUAL)
        world_nats = np.mean([story.nats for story in checked_stories])
        return {
            "nats/story": bare["story"],
            "nats/token": bare["token"],
            "prefixed nats/story": prefixed["story"],
            "world's nats/story": float(world_nats),
        }

    steps = run.scaled(LM_RECIPE.steps)
    model = fit(run, "words", model, scaled_recipe(LM_RECIPE, steps), losses_at, held_out)
    save_half(model, run.work_dir / "words")
    tokenizer.save_pretrained(run.work_dir / "words")


def starting_storyboards(
    lm: sgm.LanguageModel, texts: list[str], num_codes: int, seed: int
) -> tuple[Tensor, float]:
    """The soft prompts (N, 8, E) of stories by the program's encoder, codebook and soft prompt as
    they start, fitted to these very stories; and the entropy of their codes, summed over the slots,
    nats."""
    config = sgm.Config(
        **sgm.PRESETS["storyworld"] | dict(num_codes=num_codes, seed=seed, encoder_layers=1)
    )
    torch.manual_seed(seed)
    model = sgm.StoryModel(config, lm, None).to(lm.device).eval()
    model.init_encoder(texts)
    model.init_codebook(texts[: sgm.codebook_init_stories(num_codes)])
    codes = model.encode_stories(texts)  # (N, S)
    with torch.no_grad():
        shares = F.one_hot(codes, num_codes).double().mean(0)  # (S, K)
        return model.prompt_embeds(codes), torch.special.entr(shares).sum().item()


@dataclass
class ListeningBatch:
    """A batch of which some stories have a storyboard's soft prompt (N, 8, E) for prefix, `rows`
    (N,) names them."""

    batch: LmBatch
    rows: Tensor
    soft: Tensor


def listening_nll(model, batch: ListeningBatch, device: torch.device) -> Tensor:
    """As lm_token_nll."""
    embeddings = lm_embeddings(model, batch.batch, device)
    places = (batch.rows[:, None].to(device), torch.arange(1, 1 + PREFIX_USUAL, device=device))
    embeddings = embeddings.index_put(places, batch.soft.to(embeddings))
    return predicted_nll(model, embeddings, batch.batch.targets.to(device))


def listening_batches(
    run: Run, lm: sgm.LanguageModel, weights: np.ndarray
) -> Callable[[int], ListeningBatch]:
    """The batch of a step, from pools as in lm_batches; each pool has a codebook of its own."""

    def pool(number: int) -> list[ListeningBatch]:
        seed = seed_of(run.seed, "listening pool", number)
        rng = random.Random(seed)
        stories = [train_story((number + 10_000) * LM_POOL + i) for i in range(LM_POOL)]
        rows = story_ids(lm.tokenizer, stories)
        soft, _ = starting_storyboards(
            lm, [s.text for s in stories], rng.choice(STORYBOARD_CODES), seed % 2**31
        )
        drawn = []
        for i, row in enumerate(rows):
            heard = rng.random() < STORYBOARD_SHARE
            drawn.append(
                (
                    row,
                    PREFIX_USUAL if heard else draw_prefix_length(rng, share=0.5),
                    i if heard else -1,
                )
            )
        drawn.sort(key=lambda one: len(one[0]) + one[1])
        starts = list(range(0, LM_POOL, LM_BATCH))
        rng.shuffle(starts)
        batches = []
        for start in starts:
            parts, lengths, owners = zip(*drawn[start : start + LM_BATCH])
            heard = [place for place, owner in enumerate(owners) if owner >= 0]
            batch = lm_batch(parts, lengths, weights, lm.bos, rng)
            boards = soft[[owners[place] for place in heard]]
            batches.append(ListeningBatch(batch, torch.tensor(heard, dtype=torch.long), boards))
        return batches

    return from_pools(pool)


def train_lm(run: Run) -> None:
    """Stage lm: the model of stage words learns to hear storyboards; saved in fp16 to
    output_dir/lm. The embeddings stay as they are, since they are what storyboards start from."""
    sample = [train_story(i) for i in range(run.scaled(LM_TOKENIZER_STORIES, 200))]
    lm = sgm.LanguageModel(str(run.work_dir / "words"), run.device, torch.float32)
    weights = informativeness(story_ids(lm.tokenizer, sample), len(lm.tokenizer))
    model = lm.model.requires_grad_(True)
    lm.embed.requires_grad_(False)
    batch_at = listening_batches(run, lm, weights)
    checked_stories = [
        held_out_story(i) for i in range(run.scaled(16 * LM_CHECK_STORIES, 2 * LM_BATCH))
    ]
    texts = [story.text for story in checked_stories]

    def losses_at(step: int) -> dict[str, Tensor]:
        return {"loss": listening_nll(model, batch_at(step), run.device).mean()}

    def held_out(model) -> dict[str, float]:
        soft, entropy = starting_storyboards(lm, texts, sgm.PRESETS["storyworld"]["num_codes"], 0)
        few = checked_stories[: run.scaled(LM_CHECK_STORIES)]
        items = [
            dict(index=i, tokens=row[:-1], cut=False)
            for i, row in enumerate(story_ids(lm.tokenizer, few))
        ]
        tokens, mask = (
            sgm.collate(items, LM_CONTEXT)[key].to(run.device) for key in ("tokens", "mask")
        )
        bare = lm.nll(soft[: len(few), :0], tokens, mask).mean().item()
        heard = lm.nll(soft[: len(few)], tokens, mask).mean().item()
        return {
            "nats/story": bare,
            "keywords nats/story": lm_held_out(
                run, model, lm.tokenizer, weights, few, PREFIX_USUAL
            )["story"],
            "bits returned": (bare - heard) / math.log(2),
            "of": entropy / math.log(2),
        }

    recipe = scaled_recipe(LISTENING_RECIPE, run.scaled(LISTENING_RECIPE.steps))
    model = fit(run, "lm", model, recipe, losses_at, held_out)
    save_half(model, run.output_dir / "lm")
    lm.tokenizer.save_pretrained(run.output_dir / "lm")


def scaled_recipe(recipe: Recipe, steps: int) -> Recipe:
    return Recipe(**{**recipe.__dict__, "steps": steps, "warmup": min(recipe.warmup, steps // 10)})


def save_half(model, directory: Path) -> None:
    """Save a copy of `model` in fp16 safetensors; the model itself stays as it is."""
    copy.deepcopy(model).half().save_pretrained(directory, safe_serialization=True)


# --------------------------------------------------------------------------------------------------
# Autoencoder  A convolutional AutoencoderKL, 128 px RGB in [-1, 1] to 8 channels of 16 x 16
# latents. It learns on 64 px crops, which are cheap and can be picked where there is something to
# see; then the encoder is frozen and the decoder is tuned on whole panels, where its group norms
# see what they will see later. Its sharpness bounds every generated picture.
# --------------------------------------------------------------------------------------------------

PANEL_SIZE = 128  # px
VAE_SHAPE = dict(
    block_out_channels=(32, 32, 64, 64),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=8,
    mid_block_add_attention=False,  # convolutional throughout, so that crops and panels share one network
    sample_size=PANEL_SIZE,
)
VAE_STORIES = 1000  # 8,000 panels
VAE_CROP = 64  # px
VAE_CROP_CHOICES = 2  # crops drawn for each one used: the one with the most detail is kept
VAE_BATCH = 16
VAE_LOG_VARIANCE = (
    -6.0
)  # of the latents at the start: noise of unit variance would drown the signal for long
VAE_RECIPE = Recipe(
    steps=3200, learning_rate=2e-3, muon_rate=4e-3, weight_decay=0.0
)  # Muon: half AdamW's steps
DECODER_BATCH = 4  # whole panels: as many pixels as VAE_BATCH crops
DECODER_RECIPE = Recipe(
    steps=500, learning_rate=6e-4, muon_rate=1.5e-3, weight_decay=0.0, ema_decay=0.995
)
KL_WEIGHT = 1e-4  # of the mean KL of one latent element: keeps the latents' scale bounded, costs less than 0.1 dB
VAE_CHECK_PANELS = 32
DRAWING_NICENESS = 5


def draw_stories(path: Path, stories: int, first: int, stride: int) -> None:
    """Draw every missing story among first, first + stride, ...: all panels, then its mark."""
    os.nice(DRAWING_NICENESS)
    panels, marks = open_panels(path, stories)
    for index in range(first, stories, stride):
        if not marks[index]:
            story = train_story(index)
            for beat in range(len(world.BEATS)):
                panels[index, beat] = np.asarray(world.draw_panel(story, beat, PANEL_SIZE))
            marks[index] = 1


def open_panels(path: Path, stories: int) -> tuple[np.memmap, np.memmap]:
    """Memory maps: the panels (stories, beats, 128, 128, 3) uint8, and a mark (stories,) on each
    drawn story."""
    shape = (stories, len(world.BEATS), PANEL_SIZE, PANEL_SIZE, 3)
    return open_map(path, shape, np.uint8), open_map(
        path.with_suffix(".marks"), (stories,), np.uint8
    )


def open_map(path: Path, shape: tuple[int, ...], dtype: type) -> np.memmap:
    """A file of zeros of that shape, or what is in it; a file made for fewer rows is lengthened."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with open(path, "ab") as file:
        if file.tell() < size:
            file.truncate(size)
    return np.memmap(path, dtype, "r+", shape=shape)


def panel_pool(run: Run, stories: int) -> np.memmap:
    """The panels of the first `stories` training stories (stories, beats, 128, 128, 3) uint8, drawn
    on all cores."""
    path = run.work_dir / "panels.u8"
    panels, marks = open_panels(path, stories)
    if marks.all():
        return panels
    workers = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    context = torch.multiprocessing.get_context("spawn")
    jobs = [
        context.Process(target=draw_stories, args=(path, stories, i, workers))
        for i in range(workers)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        while job.is_alive():
            job.join(timeout=LOG_SECONDS)
            print(f"[panels] {int(marks.sum())}/{stories} stories drawn", flush=True)
    if not marks.all():
        raise RuntimeError(
            f"{int((marks == 0).sum())} stories of {path} were not drawn: see the error above"
        )
    return panels


def one_panel_each(stories: list[world.Story]) -> np.ndarray:
    """A drawn panel of each story (stories, 128, 128, 3) uint8, the beats in turn."""
    beats = len(world.BEATS)
    return np.stack(
        [world.draw_panel(story, i % beats, PANEL_SIZE) for i, story in enumerate(stories)]
    )


def to_signal(pixels: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1], channels last in memory (faster
    convolutions on CPU)."""
    signal = torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(0, 3, 1, 2).float()
    return (signal / 127.5 - 1).contiguous()


def detail(crop: np.ndarray) -> float:
    """Mean absolute difference of neighbouring pixels."""
    crop = crop.astype(np.int16)
    return float(np.abs(np.diff(crop, axis=0)).mean() + np.abs(np.diff(crop, axis=1)).mean())


def draw_crops(panels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """VAE_BATCH crops (VAE_BATCH, 64, 64, 3) uint8 at multiples of 8 px (the stride of the
    latents)."""
    places = (PANEL_SIZE - VAE_CROP) // 8 + 1

    def one() -> np.ndarray:
        y, x = 8 * rng.integers(places, size=2)
        return panels[
            rng.integers(len(panels)),
            rng.integers(panels.shape[1]),
            y : y + VAE_CROP,
            x : x + VAE_CROP,
        ]

    return np.stack(
        [max((one() for _ in range(VAE_CROP_CHOICES)), key=detail) for _ in range(VAE_BATCH)]
    )


def draw_whole(panels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    return panels[rng.integers(len(panels), size=count), rng.integers(panels.shape[1], size=count)]


def edge_error(difference: Tensor) -> Tensor:
    """L1 of the finite differences of an error picture: wrong edges, whatever their level."""
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def vae_losses(vae, signal: Tensor) -> dict[str, Tensor]:
    """Both halves: L1 + MSE + edges + KL, on sampled latents."""
    posterior = vae.encode(signal).latent_dist
    error = vae.decode(posterior.sample()).sample.float() - signal
    l1, mse, edges = error.abs().mean(), error.square().mean(), edge_error(error)
    kl = posterior.kl().mean() / posterior.mean[0].numel()  # nats per latent element
    return {
        "loss": l1 + mse + edges + KL_WEIGHT * kl,
        "l1": l1,
        "mse": mse,
        "edges": edges,
        "kl": kl,
    }


def decoder_losses(vae, signal: Tensor) -> dict[str, Tensor]:
    """The decoder alone, mostly MSE (PSNR is what it is measured by), on the posterior's mean."""
    with torch.no_grad():
        latents = vae.encode(signal).latent_dist.mode()
    error = vae.decode(latents).sample.float() - signal
    mse, edges = error.square().mean(), edge_error(error)
    return {"loss": 10 * mse + edges, "mse": mse, "edges": edges}


@torch.no_grad()
def reconstruct(run: Run, vae, pixels: np.ndarray, batch: int = 16) -> np.ndarray:
    """uint8 (N, 128, 128, 3) through the autoencoder (posterior means) and back to uint8."""
    out = []
    for start in range(0, len(pixels), batch):
        with run.autocast():
            latents = vae.encode(
                to_signal(pixels[start : start + batch], run.device)
            ).latent_dist.mode()
            out.append(to_pixels(vae.decode(latents).sample))
    return np.concatenate(out)


def to_pixels(signal: Tensor) -> np.ndarray:
    """float (B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3)."""
    pixels = ((signal.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over pictures of the peak signal-to-noise ratio, dB, of uint8 (N, H, W, 3)."""
    error = np.square(first.astype(np.float32) - second.astype(np.float32)).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-3))))


def measure_scaling(run: Run, vae, panels: np.ndarray) -> float:
    """1 / standard deviation of the latents: diffusion wants unit variance."""
    rng = np.random.default_rng(seed_of(run.seed, "vae scaling"))
    with torch.no_grad(), run.autocast():
        latents = vae.encode(to_signal(draw_whole(panels, 64, rng), run.device)).latent_dist.mode()
    return 1 / latents.float().std().item()


def train_vae(run: Run) -> None:
    """Stage vae: both halves on crops, then the decoder on whole panels; saved in fp16 to
    output_dir/diffusion/vae."""
    from diffusers import AutoencoderKL

    panels = panel_pool(run, run.scaled(VAE_STORIES, 20))
    check = one_panel_each([held_out_story(i) for i in range(VAE_CHECK_PANELS)])
    torch.manual_seed(seed_of(run.seed, "vae"))
    vae = AutoencoderKL(**VAE_SHAPE).to(run.device)
    nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels :], VAE_LOG_VARIANCE)

    def signal(name: str, step: int, draw) -> Tensor:
        return to_signal(draw(np.random.default_rng(seed_of(run.seed, name, step))), run.device)

    def crop_losses(step: int) -> dict[str, Tensor]:
        return vae_losses(vae, signal("vae crops", step, lambda rng: draw_crops(panels, rng)))

    def panel_losses(step: int) -> dict[str, Tensor]:
        return decoder_losses(
            vae, signal("vae panels", step, lambda rng: draw_whole(panels, DECODER_BATCH, rng))
        )

    def held_out(model) -> dict[str, float]:
        return {"PSNR dB": psnr(check, reconstruct(run, model, check))}

    fit(
        run,
        "vae",
        vae,
        scaled_recipe(VAE_RECIPE, run.scaled(VAE_RECIPE.steps)),
        crop_losses,
        held_out,
    )
    vae.register_to_config(scaling_factor=measure_scaling(run, vae, panels))
    save_half(
        vae, run.output_dir / "diffusion" / "vae"
    )  # its latents are final: the painter may start on them
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    recipe = scaled_recipe(DECODER_RECIPE, run.scaled(DECODER_RECIPE.steps))
    tuned = fit(run, "vae_decoder", vae, recipe, panel_losses, held_out)
    save_half(tuned, run.output_dir / "diffusion" / "vae")


# --------------------------------------------------------------------------------------------------
# Painter  A Stable Diffusion of the storyworld's size: a CLIP text encoder and a UNet, trained
# together to predict the noise in the latents of a panel from a text that tells it. A text longer
# than CLIP's 77 tokens is read as several windows of 77, each with its own BOS and EOS, whose
# states are joined along the sequence; so nothing of a story is cut off. A window that a text does
# not need is masked.
# --------------------------------------------------------------------------------------------------

CLIP_VOCABULARY = 1536  # nearly every word of the world is one token, lower-cased
CLIP_WINDOW = 77  # tokens with BOS and EOS, as in every Stable Diffusion 1.x
CLIP_SHAPE = dict(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=CLIP_WINDOW,
    projection_dim=128,
)
UNET_SHAPE = dict(
    sample_size=PANEL_SIZE // 8,
    in_channels=8,
    out_channels=8,
    block_out_channels=(64, 128, 192),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",) * 3,  # the words are heard at every resolution
    up_block_types=("CrossAttnUpBlock2D",) * 3,
    cross_attention_dim=128,
    attention_head_dim=4,  # diffusers' old name for the number of heads
    norm_num_groups=16,
)
NOISE_SCHEDULE = dict(
    num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
)
UNET_STORIES = 2000  # 16,000 panels
UNET_BATCH = 32
UNET_RECIPE = Recipe(
    steps=2000, learning_rate=8e-4, muon_rate=2e-3, weight_decay=0.01, ema_decay=0.998
)
READER_BATCH = 32
READER_RECIPE = Recipe(steps=800, learning_rate=2e-3, weight_decay=0.01)
NO_TEXT_SHARE = 0.1  # for classifier-free guidance
# A step's weight is SNR^-1/2: at equal weights (or with min-SNR, which only lowers those of nearly
# clean latents) what the words decide, the large shapes and colours, is a thousandth of the loss,
# and the painter does not learn to listen.
MOST_WEIGHT = 20.0
ENCODING_BATCH = 8  # stories
UNET_CHECK_PANELS = 64


def train_clip_tokenizer(texts: Iterator[str], size: int = CLIP_VOCABULARY):
    """A CLIPTokenizer whose merges are learned from the world's text; every byte stays writable."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    blank = CLIPTokenizer()  # CLIP's own normaliser and word splitter
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    final = [f"{byte}</w>" for byte in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        # else word-final bytes are numbered in the order of a hash, by which ties are settled
        special_tokens=[blank.bos_token, blank.eos_token, *final],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner = blank.backend_tokenizer
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=CLIP_WINDOW)


def text_windows(tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids (B, W, 77), W as the longest text needs, and which windows are a text's own, (B, W)
    bool.

    A text is cut every 75 tokens; within a window EOS pads, as in Stable Diffusion; every text has
    one window.
    """
    inner = CLIP_WINDOW - 2
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    most = max(1, max(math.ceil(len(row) / inner) for row in rows))
    ids = torch.full((len(rows), most, CLIP_WINDOW), tokenizer.eos_token_id)
    ids[:, :, 0] = tokenizer.bos_token_id
    own = torch.zeros(len(rows), most, dtype=torch.bool)
    own[:, 0] = True
    for i, row in enumerate(rows):
        for w, start in enumerate(range(0, len(row), inner)):
            part = row[start : start + inner]
            ids[i, w, 1 : 1 + len(part)] = torch.tensor(part)
            own[i, w] = True
    return ids, own


def text_states(text_encoder, ids: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Windows (B, W, 77) and their owners (B, W) to states (B, W * 77, E) and their mask (B, W *
    77) bool."""
    states = text_encoder(ids[own]).last_hidden_state  # (own windows, 77, E)
    joined = states.new_zeros(*ids.shape, states.shape[-1]).index_put(
        (own,), states
    )  # (B, W, 77, E)
    return joined.flatten(1, 2), own.repeat_interleave(ids.shape[2], dim=1)


def panel_text(story: world.Story, rng: random.Random) -> tuple[str, int]:
    """A text and the beat whose panel it tells: all the ways in which a painter is asked for a
    picture."""
    last = len(story.beats) - 1
    way, beat = rng.random(), rng.randint(0, last)
    if way < 0.35:
        return story.text, last
    if way < 0.45:
        return story.prompt, last  # a prompt that somebody typed, with nothing after it
    if way < 0.60:
        return story.beats[beat], beat
    if way < 0.80:
        return story.beats[0] if beat == 0 else f"{story.prompt} {story.beats[beat]}", beat
    return " ".join(story.beats[rng.randint(0, beat) : beat + 1]), beat


class Painter(nn.Module):
    """Text encoder and UNet, trained as one. Their attention is in plain products: on a CPU torch's
    fused kernel takes several times as long backwards."""

    def __init__(self, text_encoder: nn.Module, unet: nn.Module) -> None:
        from diffusers.models.attention_processor import AttnProcessor

        super().__init__()
        text_encoder.set_attn_implementation("eager")
        unet.set_attn_processor(AttnProcessor())
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, own: Tensor) -> Tensor:
        """The noise (B, L, 16, 16) in `noisy` at `timesteps` (B,), given the text windows (B, W,
        77)."""
        states, mask = text_states(self.text_encoder, ids, own)
        return self.unet(noisy, timesteps, states, encoder_attention_mask=mask).sample


def new_painter(tokenizer) -> Painter:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **CLIP_SHAPE,
    )
    return Painter(CLIPTextModel(config), UNet2DConditionModel(**UNET_SHAPE))


def load_vae(run: Run):
    """The finished autoencoder, in fp32, frozen."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(
        run.output_dir / "diffusion" / "vae", torch_dtype=torch.float32
    )
    return vae.to(run.device, memory_format=torch.channels_last).requires_grad_(False).eval()


@torch.no_grad()
def encode(run: Run, vae, pixels: np.ndarray) -> Tensor:
    """uint8 (B, 128, 128, 3) to scaled latents (B, L, 16, 16) float32: the posterior's mean."""
    with run.autocast():
        latents = vae.encode(to_signal(pixels, run.device)).latent_dist.mode()
    return latents.float() * vae.config.scaling_factor


def latent_pool(run: Run, vae, panels: np.ndarray) -> np.memmap:
    """The latents (stories, beats, L, 16, 16) float16 of all panels, each encoded once."""
    side = UNET_SHAPE["sample_size"]
    shape = (*panels.shape[:2], UNET_SHAPE["in_channels"], side, side)
    latents = open_map(run.work_dir / "latents.f16", shape, np.float16)
    marks = open_map(run.work_dir / "latents.marks", shape[:1], np.uint8)
    printed = time.monotonic()
    for start in range(0, len(panels), ENCODING_BATCH):
        part = slice(start, start + ENCODING_BATCH)
        if marks[part].all():
            continue
        pixels = panels[part].reshape(-1, *panels.shape[2:])
        latents[part] = encode(run, vae, pixels).cpu().numpy().reshape(-1, *shape[1:])
        marks[part] = 1
        if time.monotonic() - printed >= LOG_SECONDS:
            printed = time.monotonic()
            print(f"[latents] {int(marks.sum())}/{len(panels)} stories encoded", flush=True)
    return latents


def stratified_timesteps(count: int, total: int, device: torch.device) -> Tensor:
    """`count` timesteps (count,) in [0, total), one from each of `count` equal bins: less variance
    in the loss."""
    return ((torch.arange(count) + torch.rand(count)) * total / count).long().to(device)


def noise_errors(
    painter: Painter, scheduler, latents: Tensor, ids: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared epsilon error of each example, mean over the latent's elements (B,), and its weight
    (B,)."""
    timesteps = stratified_timesteps(
        len(latents), scheduler.config.num_train_timesteps, latents.device
    )
    noise = torch.randn_like(latents)
    predicted = painter(scheduler.add_noise(latents, noise, timesteps), timesteps, ids, own).float()
    kept = scheduler.alphas_cumprod.to(latents.device)[timesteps]
    snr = kept / (1 - kept)
    return (predicted - noise).square().mean((1, 2, 3)), snr.rsqrt().clamp(max=MOST_WEIGHT)


class PainterCheck:
    """Held-out epsilon error with the panels' own texts and with others': a painter that listens
    tells them apart."""

    def __init__(self, run: Run, vae, tokenizer, scheduler, count: int) -> None:
        self.run, self.scheduler = run, scheduler
        rng = random.Random(seed_of("painter check"))
        stories = [held_out_story(i) for i in range(count)]
        texts, beats = zip(*(panel_text(story, rng) for story in stories))
        drawn = [world.draw_panel(story, beat, PANEL_SIZE) for story, beat in zip(stories, beats)]
        self.latents = encode(run, vae, np.stack(drawn))
        self.own_text = [x.to(run.device) for x in text_windows(tokenizer, list(texts))]
        self.other_text = [x.roll(1, dims=0) for x in self.own_text]

    def __call__(self, painter: Painter) -> dict[str, float]:
        figures = {}
        for name, windows in (("own text", self.own_text), ("another's text", self.other_text)):
            torch.manual_seed(0)  # common noise and timesteps
            with self.run.autocast():
                errors, _ = noise_errors(painter, self.scheduler, self.latents, *windows)
            figures[name] = errors.mean().item()
        return figures


class Reader(nn.Module):
    """The text encoder and a head for each factor that pictures show, (B, values), on the mean of
    its states: what attention that has not learned to choose gets to see."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.sizes = [len(world.FACTORS[factor]) for factor in SEEN_FACTORS]
        self.heads = nn.Linear(CLIP_SHAPE["hidden_size"], sum(self.sizes))

    def forward(self, ids: Tensor, own: Tensor) -> tuple[Tensor, ...]:
        states, mask = text_states(self.text_encoder, ids, own)  # (B, W * 77, E)
        mean = states.sum(1) / mask.sum(
            1, keepdim=True
        )  # windows that a text does not need are zero
        return self.heads(mean).split(self.sizes, dim=1)


def pretrain_text_encoder(
    run: Run, tokenizer, stories: list[world.Story], text_encoder: nn.Module
) -> None:
    """Teaches the text encoder to read what a picture would show, as CLIP's own training does for
    Stable Diffusion: a UNet that gets meaningless states learns to paint without them, and to
    listen only much later."""
    reader = Reader(text_encoder).to(run.device)
    labels = torch.from_numpy(factor_labels(stories))

    def losses_at(step: int) -> dict[str, Tensor]:
        rng = random.Random(seed_of(run.seed, "reader batch", step))
        chosen = [rng.randrange(len(stories)) for _ in range(READER_BATCH)]
        texts, beats = zip(*(panel_text(stories[i], rng) for i in chosen))
        ids, own = (x.to(run.device) for x in text_windows(tokenizer, list(texts)))
        wanted = labels[chosen, list(beats)].to(run.device)
        losses = [
            F.cross_entropy(
                logits.float(), wanted[:, column], ignore_index=NOT_SHOWN, reduction="sum"
            )
            for column, logits in enumerate(reader(ids, own))
        ]
        return {"loss": sum(losses) / (wanted != NOT_SHOWN).sum()}

    fit(
        run,
        "reader",
        reader,
        scaled_recipe(READER_RECIPE, run.scaled(READER_RECIPE.steps)),
        losses_at,
    )


def train_unet(run: Run) -> None:
    """Stage unet: text encoder and UNet on the autoencoder's latents; the pipeline goes to
    output_dir/diffusion."""
    from diffusers import DDPMScheduler

    count = run.scaled(UNET_STORIES, 20)
    vae = load_vae(run)
    latents = latent_pool(run, vae, panel_pool(run, count))
    stories = [train_story(i) for i in range(count)]
    tokenizer = train_clip_tokenizer(story.text for story in stories)
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    torch.manual_seed(seed_of(run.seed, "unet"))
    painter = new_painter(tokenizer).to(run.device)
    pretrain_text_encoder(run, tokenizer, stories, painter.text_encoder)
    painter.train()

    def losses_at(step: int) -> dict[str, Tensor]:
        rng = random.Random(seed_of(run.seed, "painter batch", step))
        chosen = [rng.randrange(count) for _ in range(UNET_BATCH)]
        texts, beats = zip(*(panel_text(stories[i], rng) for i in chosen))
        heard = ["" if rng.random() < NO_TEXT_SHARE else text for text in texts]
        ids, own = (x.to(run.device) for x in text_windows(tokenizer, heard))
        clean = torch.from_numpy(latents[chosen, list(beats)]).to(run.device).float()
        errors, weights = noise_errors(painter, scheduler, clean, ids, own)
        return {"loss": (weights * errors).mean(), "error": errors.mean()}

    check = PainterCheck(run, vae, tokenizer, scheduler, run.scaled(UNET_CHECK_PANELS, 8))
    recipe = scaled_recipe(UNET_RECIPE, run.scaled(UNET_RECIPE.steps))
    save_pipeline(run, tokenizer, fit(run, "unet", painter, recipe, losses_at, check))


def save_pipeline(run: Run, tokenizer, painter: Painter) -> None:
    """A StableDiffusionPipeline in fp16 safetensors, loadable with the stock classes."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=load_vae(run),  # its decoder may have been tuned since the latents were made
        text_encoder=painter.text_encoder,
        tokenizer=tokenizer,
        unet=painter.unet,
        scheduler=DPMSolverMultistepScheduler(**NOISE_SCHEDULE, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipeline.vae, pipeline.unet):  # where it was loaded from is nobody's business
        part.register_to_config(_name_or_path="")
    pipeline.to(torch.float16).save_pretrained(
        run.output_dir / "diffusion", safe_serialization=True
    )


# --------------------------------------------------------------------------------------------------
# Storyboard  The checkpoint that `generate` uses when it is given none: the documented commands,
# word for word, and of what they leave the trained tensors without the optimizer's state.
# --------------------------------------------------------------------------------------------------


STORYBOARD_STORIES = 12_000  # for the prior, which learns 2,000 by heart
STORYBOARD_STEPS = 1500  # of all parts, and at the end of the prior alone


def train_storyboard(run: Run) -> None:
    """Stage storyboard: output_dir/storyboard.pt, trained on the backbones that stand beside this
    script."""
    data, folder = str(run.work_dir / "stories"), run.work_dir / "storyboard"
    stories, steps = (str(run.scaled(count)) for count in (STORYBOARD_STORIES, STORYBOARD_STEPS))
    drawing = ["--source", "storyworld", "--data_root", data, "--max_train_samples", stories]
    subprocess.run([sys.executable, ROOT / "download_data.py", *drawing], check=True)
    training = ["train", "--preset", "storyworld", "--data_root", data, "--output_dir", str(folder)]
    training += ["--max_train_steps", steps, "--prior_steps", steps, "--seed", str(run.seed)]
    training += ["--resume_from_checkpoint", "latest"]
    subprocess.run([sys.executable, ROOT / "story_generative_model.py", *training], check=True)
    checkpoint = torch.load(sgm.list_checkpoints(folder)[-1], weights_only=True)
    defaults = sgm.Config(preset="storyworld")
    places = {
        name: getattr(defaults, name)
        for name in ("data_root", "output_dir", "resume_from_checkpoint")
    }
    kept = {key: checkpoint[key] for key in sgm.CHECKPOINT_KEYS} | {
        "config": checkpoint["config"] | places,
        "model": {name: sgm.in_half(one) for name, one in checkpoint["model"].items()},
    }
    sgm.save_checkpoint(run.output_dir / "storyboard.pt", kept)


# --------------------------------------------------------------------------------------------------
# Probe  Reads the story's factors off a picture, so that "the picture shows the story" is a number.
# It learns from drawn panels, a quarter of them passed through the autoencoder, some blurred or
# noisy: generated pictures look so.
# --------------------------------------------------------------------------------------------------

PROBE_STORIES = VAE_STORIES
PROBE_BATCH = 32
PROBE_RECIPE = Recipe(steps=450, learning_rate=3e-3, ema_decay=0.99)
PROBE_RECONSTRUCTED = 8  # pictures of the batch that have been through the autoencoder
PROBE_LATENT_NOISE = 0.15  # most noise on their (unit variance) latents
PROBE_BLURRED = 0.25
PROBE_NOISE = 0.04  # most pixel noise
PROBE_CHECK_STORIES = 64


@torch.no_grad()
def look_generated(run: Run, vae, signal: Tensor, latents: Tensor) -> Tensor:
    """[-1, 1] panels (B, 3, 128, 128) to [0, 1] pictures that look generated: the first M
    reconstructed from their latents (M, L, 16, 16) with some noise, then some blurred, all a little
    noisy."""
    with run.autocast():
        noise = torch.randn_like(latents) * torch.rand(len(latents), 1, 1, 1, device=latents.device)
        latents = (latents + PROBE_LATENT_NOISE * noise) / vae.config.scaling_factor
        signal = torch.cat(
            [vae.decode(latents).sample.float().clamp(-1, 1), signal[len(latents) :]]
        )
    blurred = F.interpolate(F.avg_pool2d(signal, 2), scale_factor=2, mode="bilinear")
    chosen = torch.rand(len(signal), 1, 1, 1, device=signal.device) < PROBE_BLURRED
    signal = torch.where(chosen, blurred, signal)
    amount = PROBE_NOISE * torch.rand(len(signal), 1, 1, 1, device=signal.device)
    return ((signal + 1) / 2 + amount * torch.randn_like(signal)).clamp(0, 1)


def probe_losses(probe: Probe, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of every factor that is shown, nats, mean over the factors."""
    losses = {}
    for column, (factor, logits) in enumerate(probe(pictures).items()):
        shown = (labels[:, column] != NOT_SHOWN).sum().clamp(min=1)
        total = F.cross_entropy(
            logits.float(), labels[:, column], ignore_index=NOT_SHOWN, reduction="sum"
        )
        losses[factor] = total / shown
    return {"loss": torch.stack(list(losses.values())).mean()}


def probe_accuracy(
    run: Run, probe: Probe, pixels: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Share of right readings per factor, of uint8 pictures (N, 128, 128, 3) that show `labels` (N,
    factors)."""
    right: dict[str, list[bool]] = {factor: [] for factor in probe.heads}
    for start in range(0, len(pixels), 32):
        part = slice(start, start + 32)
        with torch.no_grad():
            logits = probe((to_signal(pixels[part], run.device) + 1) / 2)
        for column, factor in enumerate(probe.heads):
            truth = labels[part, column]
            guess = logits[factor].argmax(1).cpu().numpy()
            right[factor] += list((guess == truth)[truth != NOT_SHOWN])
    return {factor: float(np.mean(marks)) for factor, marks in right.items() if marks}


def all_panels(stories: list[world.Story]) -> np.ndarray:
    """Every panel of the stories (stories * beats, 128, 128, 3) uint8."""
    beats = range(len(world.BEATS))
    return np.stack(
        [np.asarray(world.draw_panel(s, beat, PANEL_SIZE)) for s in stories for beat in beats]
    )


def train_probe(run: Run) -> None:
    """Stage probe: saved in fp16 to output_dir/probe.safetensors."""
    count = run.scaled(PROBE_STORIES, 20)
    panels, vae = panel_pool(run, count), load_vae(run)
    latents = latent_pool(run, vae, panels)
    labels = factor_labels([train_story(i) for i in range(count)])
    checked_stories = [held_out_story(i) for i in range(run.scaled(PROBE_CHECK_STORIES))]
    check_pixels = all_panels(checked_stories)
    check_labels = factor_labels(checked_stories).reshape(-1, len(SEEN_FACTORS))
    torch.manual_seed(seed_of(run.seed, "probe"))
    probe = Probe({factor: len(world.FACTORS[factor]) for factor in SEEN_FACTORS})
    probe = probe.to(run.device, memory_format=torch.channels_last)

    def losses_at(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng(seed_of(run.seed, "probe batch", step))
        index, beat = (
            rng.integers(count, size=PROBE_BATCH),
            rng.integers(panels.shape[1], size=PROBE_BATCH),
        )
        coded = torch.from_numpy(latents[index, beat][:PROBE_RECONSTRUCTED]).to(run.device).float()
        pictures = look_generated(run, vae, to_signal(panels[index, beat], run.device), coded)
        return probe_losses(probe, pictures, torch.from_numpy(labels[index, beat]).to(run.device))

    def held_out(model) -> dict[str, float]:
        return probe_accuracy(run, model, check_pixels, check_labels)

    recipe = scaled_recipe(PROBE_RECIPE, run.scaled(PROBE_RECIPE.steps))
    fitted = fit(run, "probe", probe, recipe, losses_at, held_out)
    write_atomically(
        run.output_dir / "probe.safetensors", lambda partial: save_probe(fitted, partial)
    )


# --------------------------------------------------------------------------------------------------
# Report  Measures the finished weights on held-out stories and writes the model card and a sheet of
# pictures. It loads what was shipped, fp16 rounding included, and nothing of the training.
# --------------------------------------------------------------------------------------------------

REPORT_STORIES = 512  # for the language model
REPORT_PANELS = 256  # for the autoencoder and the probe
REPORT_PICTURES = 256  # generated from whole stories
REPORT_BEATS = 128  # generated from single beats
REPORT_PROMPTS = 100
REPORT_BATCH = 32
SHEET_COLUMNS, SHEET_ROWS = 8, 2  # rows of pairs
PROMPT_FACTORS = ("species", "colour", "object")
CARD = """# Storyworld backbones

The embedded language model and diffusion pipeline of the storyworld, made from scratch by `train_backbones.py`
from the stories and pictures of `world.py`; no other data and no pretrained weights went in. They know this
world only: simple English stories of eight species, and {size} px pictures of them.

| part | folder | parameters | MB |
|---|---|---|---|
{parts}

Every figure is printed by `python assets/storyworld/train_backbones.py --stages report`, on stories from seed
{held_out} on, which no training saw (training takes its seeds from {train} on).

## Language model

| held-out NLL over {stories} stories | nats per story | nats per token |
|---|---|---|
{lm}

The world's own choices cost {nats:.1f} nats a story on average, an upper bound of the text's entropy. The prefix
is one telling word of each eighth of the story, standing where a soft prompt stands.

## Pictures

The autoencoder returns {panels} held-out panels at {psnr:.1f} dB PSNR. The rest is read off the pictures by the
probe (`probe.safetensors`): share of right readings, on {panels} drawn panels, on panels generated from {pictures}
whole stories and from {beats} single beats ({steps} DPM-Solver++ steps, guidance {guidance}; the last column counts
only factors whose word stands in the beat).

| factor | drawn | from the whole story | from one beat |
|---|---|---|---|
{factors}

![Drawn panels above generated ones](sheet.png)

## The prompt is obeyed

Over {prompts} held-out prompts that name species, colour and object, each given to `generate` as a user would: share
of stories that stay with what the prompt says, and of pictures that show it.

| factor | the story says it | the picture shows it |
|---|---|---|
{obeyed}
"""
CARD_HISTORY = (
    "\n## How these weights came about\n"  # no figure of the weights: written by hand, and kept
)


@dataclass
class Shipped:
    """What is in output_dir, as `generate` loads it, in fp32."""

    model: sgm.StoryModel
    config: sgm.Config
    probe: Probe


def load_shipped(run: Run, **settings) -> Shipped:
    """What is in output_dir, with `settings` of the program in place of the checkpoint's."""
    checkpoint = sgm.load_checkpoint(run.output_dir / "storyboard.pt")
    backbones = dict(
        lm_model=str(run.output_dir / "lm"), diffusion_model=str(run.output_dir / "diffusion")
    )
    config = dataclasses.replace(checkpoint["config"], **backbones | settings)
    model = sgm.load_model(checkpoint, config, run.device, torch.float32)
    return Shipped(model, config, load_probe(run.output_dir / "probe.safetensors").to(run.device))


def paint(diffusion: sgm.LatentDiffusion, config: sgm.Config, texts: list[str]) -> np.ndarray:
    """One generated picture per text, (N, 128, 128, 3) uint8; texts of any length; the seed is the
    text's number."""
    pictures = []
    for start in range(0, len(texts), REPORT_BATCH):
        part = texts[start : start + REPORT_BATCH]
        seeds = list(range(start, start + len(part)))
        pictures += diffusion.sample_images(*diffusion.encode_texts(part), config, seeds)
    return np.stack([np.asarray(picture) for picture in pictures])


def named(text: str, values: tuple[str, ...]) -> list[str]:
    """Which of `values` stand in `text` as words."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return [value for value in values if value in words]


def report_lm(run: Run, shipped: Shipped) -> tuple[list[str], float]:
    """Table rows of the NLL without and with a prefix; the world's own nats per story."""
    stories, lm = [report_story(i) for i in range(run.scaled(REPORT_STORIES))], shipped.model.lm
    sample = story_ids(
        lm.tokenizer, [train_story(i) for i in range(run.scaled(LM_TOKENIZER_STORIES, 200))]
    )
    weights = informativeness(sample, len(lm.tokenizer))
    rows = []
    for name, length in (
        ("without a prefix", 0),
        (f"after {PREFIX_USUAL} prefix words", PREFIX_USUAL),
    ):
        with torch.no_grad():
            nll = lm_held_out(run, lm.model, lm.tokenizer, weights, stories, length)
        rows.append(f"| {name} | {nll['story']:.1f} | {nll['token']:.3f} |")
    return rows, float(np.mean([story.nats for story in stories]))


def factor_accuracy(run: Run, shipped: Shipped) -> tuple[dict[str, float], ...]:
    """The probe's accuracy for each factor: on drawn panels, on whole stories' pictures, on single
    beats' pictures."""
    beats, last = len(world.BEATS), len(world.BEATS) - 1
    count = run.scaled(REPORT_PICTURES, 8)
    stories = [report_story(i) for i in range(count)]
    labels = factor_labels(stories)
    drawn_labels = np.stack([labels[i, i % beats] for i in range(count)])
    drawn = probe_accuracy(run, shipped.probe, one_panel_each(stories), drawn_labels)
    diffusion = shipped.model.diffusion
    whole = paint(diffusion, shipped.config, [story.text for story in stories])
    whole = probe_accuracy(run, shipped.probe, whole, labels[:, last])
    texts = [
        story.beats[i % beats] for i, story in enumerate(stories[: run.scaled(REPORT_BEATS, 8)])
    ]
    single = paint(diffusion, shipped.config, texts)
    single = probe_accuracy(
        run, shipped.probe, single, only_named(drawn_labels[: len(texts)], texts)
    )
    return drawn, whole, single


def report_factors(run: Run, shipped: Shipped) -> list[str]:
    """Table rows of factor_accuracy."""
    columns = factor_accuracy(run, shipped)
    return [
        "| " + " | ".join([f, *(share(column.get(f)) for column in columns)]) + " |"
        for f in SEEN_FACTORS
    ]


def only_named(labels: np.ndarray, texts: list[str]) -> np.ndarray:
    """`labels` (N, factors) without what the text does not say in so many words."""
    kept = labels.copy()
    for i, text in enumerate(texts):
        for column, factor in enumerate(SEEN_FACTORS):
            value = world.FACTORS[factor][labels[i, column]]
            if labels[i, column] != NOT_SHOWN and not named(text, (value,)):
                kept[i, column] = NOT_SHOWN
    return kept


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def telling_prompts(count: int) -> list[world.Story]:
    """The first held-out stories whose prompt names everything in PROMPT_FACTORS."""
    found, index = [], 0
    while len(found) < count:
        story, index = report_story(index), index + 1
        if all(named(story.prompt, (story.factors[factor],)) for factor in PROMPT_FACTORS):
            found.append(story)
    return found


def keeps(text: str, story: world.Story, factor: str) -> bool:
    """Whether a continued prompt stays with the prompt's value: it comes up again after the prompt,
    and no other value takes its place (species: besides the helper's; colour: before the hero's
    species)."""
    value, rest = story.factors[factor], text[len(story.prompt) :]
    others = tuple(v for v in world.FACTORS[factor] if v != value)
    if factor == "object":
        return bool(named(rest, (value,))) and not named(rest, others)
    if factor == "colour":
        return not any(f"{other} {story.factors['species']}" in rest.lower() for other in others)
    return len(named(rest, others)) <= 1


def report_prompts(run: Run, shipped: Shipped) -> list[str]:
    """Table rows: what `generate` makes of prompts, its defaults and a seed for each: does the
    story keep what the prompt names, and does its picture show it."""
    stories = telling_prompts(run.scaled(REPORT_PROMPTS, 4))
    prompts, made = [story.prompt for story in stories], []
    for start in range(0, len(prompts), REPORT_BATCH):
        part = prompts[start : start + REPORT_BATCH]
        made += sgm.illustrate(
            shipped.model, shipped.config, part, list(range(start, start + len(part)))
        )
    pictures = np.stack([np.asarray(one.panels[0].image) for one in made])
    seen = probe_accuracy(
        run, shipped.probe, pictures, factor_labels(stories)[:, len(world.BEATS) - 1]
    )
    said = {
        f: np.mean([keeps(one.story, story, f) for one, story in zip(made, stories)])
        for f in PROMPT_FACTORS
    }
    return [
        f"| {factor} | {share(said[factor])} | {share(seen[factor])} |" for factor in PROMPT_FACTORS
    ]


def write_sheet(run: Run, shipped: Shipped, path: Path) -> None:
    """SHEET_ROWS pairs of rows: drawn endings, and below each the picture generated from the
    story's text."""
    from PIL import Image

    stories = [report_story(i) for i in range(SHEET_COLUMNS * SHEET_ROWS)]
    drawn = [
        np.asarray(world.draw_panel(story, len(story.beats) - 1, PANEL_SIZE)) for story in stories
    ]
    texts = [story.text for story in stories]
    painted = paint(shipped.model.diffusion, shipped.config, texts)
    rows = []
    for start in range(0, len(stories), SHEET_COLUMNS):
        part = slice(start, start + SHEET_COLUMNS)
        rows += [
            np.concatenate(list(drawn[part]), axis=1),
            np.concatenate(list(painted[part]), axis=1),
        ]
    Image.fromarray(np.concatenate(rows)).save(path)


def part_rows(run: Run, shipped: Shipped) -> list[str]:
    """Table rows: name, folder, parameters, megabytes of each shipped part."""
    pipeline = shipped.model.diffusion.pipeline
    parts = (
        ("language model (GPT-2)", "lm", shipped.model.lm.model),
        ("autoencoder", "diffusion/vae", pipeline.vae),
        ("text encoder (CLIP)", "diffusion/text_encoder", pipeline.text_encoder),
        ("UNet", "diffusion/unet", pipeline.unet),
        ("probe", "probe.safetensors", shipped.probe),
        ("storyboard", "storyboard.pt", shipped.model),
    )
    rows = []
    for name, folder, model in parts:
        place = run.output_dir / folder
        files = [place] if place.is_file() else list(place.glob("*.safetensors"))
        megabytes = sum(file.stat().st_size for file in files) / 1e6
        rows.append(
            f"| {name} | `{folder}` | {sum(p.numel() for p in model.parameters()):,} | {megabytes:.1f} |"
        )
    return rows


def write_report(run: Run) -> None:
    """Stage report: output_dir/README.md and output_dir/sheet.png; the card is printed as well."""
    shipped = load_shipped(run)
    panels = one_panel_each([report_story(i) for i in range(run.scaled(REPORT_PANELS, 8))])
    lm_rows, nats = report_lm(run, shipped)
    figures = dict(
        parts=part_rows(run, shipped),
        lm=lm_rows,
        factors=report_factors(run, shipped),
        obeyed=report_prompts(run, shipped),
    )
    card = CARD.format(
        **{name: "\n".join(rows) for name, rows in figures.items()},
        size=PANEL_SIZE,
        held_out=f"{REPORT_SEEDS:,}",
        train=TRAIN_SEEDS,
        stories=run.scaled(REPORT_STORIES),
        nats=nats,
        panels=len(panels),
        pictures=run.scaled(REPORT_PICTURES, 8),
        beats=run.scaled(REPORT_BEATS, 8),
        psnr=psnr(panels, reconstruct(run, shipped.model.diffusion.vae, panels)),
        steps=shipped.config.num_inference_steps,
        guidance=shipped.config.guidance_scale,
        prompts=run.scaled(REPORT_PROMPTS, 4),
    )
    path = run.output_dir / "README.md"
    _, heading, history = (path.read_text() if path.is_file() else "").partition(CARD_HISTORY)
    card += heading + history
    write_sheet(run, shipped, run.output_dir / "sheet.png")
    write_atomically(path, lambda partial: partial.write_text(card))
    print(card, flush=True)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

STAGES = {
    "words": train_words,
    "lm": train_lm,
    "vae": train_vae,
    "unet": train_unet,
    "probe": train_probe,
    "storyboard": train_storyboard,
    "report": write_report,
}
CHAINS = (
    ("words", "lm"),
    ("vae", "unet", "probe"),
)  # neither needs the other: models this small fill no two cores


def run_side_by_side(arguments: argparse.Namespace, chains: list[list[str]]) -> None:
    """Each chain of stages in a process of its own, with its share of the cores. If one fails, the
    other is ended."""
    threads = str(max(1, (os.cpu_count() or 1) // len(chains)))
    names = ("work_dir", "output_dir", "seed", "device", "scale", "mixed_precision")
    same = [word for name in names for word in (f"--{name}", str(getattr(arguments, name)))]
    environment = os.environ | dict(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
    command = [sys.executable, __file__, *same, "--stages"]
    children = [subprocess.Popen([*command, *chain], env=environment) for chain in chains]
    try:
        while None in (statuses := [child.poll() for child in children]) and not any(statuses):
            time.sleep(1)
    finally:
        for child in children:
            child.terminate()
    if any(child.wait() for child in children):
        sys.exit(
            "stopped: a stage failed, see above; the same command goes on from its last checkpoint"
        )


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16; a processor that imitates it takes fifteen times as
    long."""
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else sgm.cpu_has_bf16()


def quiet_libraries() -> None:
    """No progress bars and no advice between the log lines."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def stage_parser(
    description: str, stages: Iterable[str], usual: list[str], home: Path
) -> argparse.ArgumentParser:
    """The command line of a training in stages, whose files are in the folder `home`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--stages", nargs="+", choices=stages, default=usual, help="what to make")
    parser.add_argument(
        "--work_dir", type=Path, default=home / "work", help="checkpoints and drawn pictures"
    )
    parser.add_argument("--output_dir", type=Path, default=home, help="the finished weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="times all step and example counts, for rehearsals"
    )
    parser.add_argument(
        "--mixed_precision",
        choices=("auto", "bf16", "no"),
        default="auto",
        help="auto: bf16 where the device has it",
    )
    return parser


def run_of(arguments: argparse.Namespace) -> Run:
    """The run that a command line asks for; its work_dir exists."""
    device, precision = choose_device(arguments.device), arguments.mixed_precision
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    return Run(
        work_dir=arguments.work_dir,
        output_dir=arguments.output_dir,
        seed=arguments.seed,
        scale=arguments.scale,
        device=device,
        bf16=has_bf16(device) if precision == "auto" else precision == "bf16",
    )


def run_stages(
    run: Run, stages: dict[str, Callable[[Run], None]], chosen: list[str], repeated: Sequence[str]
) -> None:
    """Runs the chosen stages in the table's order: those that are not finished, and those
    `repeated` each time."""
    for stage, work in stages.items():
        if stage not in chosen:
            continue
        if stage not in repeated and run.done(stage).exists():
            print(f"[{stage}] finished before ({run.done(stage)})", flush=True)
            continue
        start = time.monotonic()
        work(run)
        write_atomically(run.done(stage), lambda partial: partial.write_text("done\n"))
        print(f"[{stage}] finished in {clock(time.monotonic() - start)}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = stage_parser("Train the storyworld's embedded backbones.", STAGES, list(STAGES), HERE)
    arguments = parser.parse_args(argv)
    run = run_of(arguments)
    unfinished = [stage for stage in arguments.stages if not run.done(stage).exists()]
    chains = [[stage for stage in chain if stage in unfinished] for chain in CHAINS]
    if run.device.type == "cpu" and all(chains):
        run_side_by_side(arguments, chains)
    quiet_libraries()
    run_stages(run, STAGES, arguments.stages, repeated=("report",))


if __name__ == "__main__":
    main()
