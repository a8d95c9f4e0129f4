"""StoryDiffusion: one line in, a short illustrated story out, through eight readable codes.

A story s with picture x is explained by a *storyboard* z of eight discrete codes, and training minimises

    -log p_psi(s | z)  +  beta_kl * -log p_theta(z)  +  VQ commitment  +  lambda * E ||eps_omega(x_t, t, s) - eps||^2
       text NLL              latent NLL                                      diffusion NLL

the negative ELBO of a model with a deterministic encoder z = q_phi(s), whose entropy is zero. Trained: the encoder
phi with its EMA codebook, the prior theta, and the map from codes to a soft prompt. Frozen: the language model psi
and the latent diffusion omega.

    python story_generative_model.py generate --prompt "A shy blue owl looks for a lost star"    # embedded, on a CPU
    python download_data.py --source storyworld
    python story_generative_model.py train --preset storyworld                                   # a few minutes
    python story_generative_model.py evaluate --ckpt checkpoints/story_gen/ckpt_500.pt
    python story_generative_model.py train --mixed_precision fp16                                # GPT-2-XL and SD

Shapes: B stories, T story tokens, S = 8 slots, K codes, D storyboard width, E language-model width, P soft tokens.

Contents: 1 Configuration   2 Data          3 Vector quantiser   4 Storyboard encoder   5 Prior        6 Backbones
          7 Objective       8 Checkpoints   9 Generation        10 Pages   11 Evaluation   12 Training   13 Command line
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

NUM_SLOTS = 8  # S: a storyboard is eight codes, one for each equal chunk of the story
ROOT = Path(__file__).resolve().parent
EMBEDDED_CHECKPOINT = ROOT / "assets" / "storyworld" / "storyboard.pt"


class StoryError(Exception):
    """A mistake that its maker can mend: shown as one line, without a traceback; `code` is the exit status."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def say(message: str) -> None:
    """Progress and warnings go to standard error: standard output is for results alone."""
    print(message, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------------
# 1. Configuration
# In: the command line. Out: one Config. A default, its unit and its help stand in one place, the field; the flags are
# made from the fields, a preset changes defaults, and an explicit flag wins over the preset.
# ------------------------------------------------------------------------------------------------------------------


def flag(
    default,
    text: str,
    commands: str = "train",
    low: float | None = None,
    high: float | None = None,
    choices: tuple = (),
    name: str = "",
):
    """A Config field that is also a flag of each command in `commands`, by its own or another `name`; numbers outside
    `low` to `high` are refused."""
    bounds = dict(low=low, high=high, choices=choices)
    return field(default=default, metadata=dict(help=text, commands=commands.split(), name=name, **bounds))


@dataclass
class Config:
    preset: str = flag("gpt2-xl", "defaults to start from", choices=("gpt2-xl", "storyworld"))
    # the frozen backbones: a hub id or a local folder
    lm_model: str = flag("openai-community/gpt2-xl", "causal language model, frozen")
    diffusion_model: str = flag("stable-diffusion-v1-5/stable-diffusion-v1-5", "Stable Diffusion 1.x or 2.x, frozen")
    # the trained parts
    num_codes: int = flag(4096, "K, codes in the codebook", low=2)
    code_dim: int = flag(256, "D, width of a code vector", low=1)
    encoder_width: int = flag(512, "width of the storyboard encoder", low=1)
    encoder_layers: int = flag(6, "layers of the storyboard encoder", low=1)
    prior_width: int = flag(512, "width of the prior", low=1)
    prior_layers: int = flag(4, "layers of the prior", low=1)
    num_heads: int = flag(8, "attention heads of encoder and prior", low=1)
    soft_tokens_per_slot: int = flag(1, "soft prompt tokens for each slot", low=1)
    image_condition: str = flag("text", "what the painter is conditioned on", choices=("text", "storyboard"))
    # the objective
    beta_kl: float = flag(0.1, "weight of the latent NLL", low=0)
    commitment_weight: float = flag(0.25, "weight of the VQ commitment term", low=0)
    diffusion_weight: float = flag(0.1, "lambda, weight of the diffusion NLL", low=0)
    diffusion_stories: int = flag(0, "stories of each batch whose picture is scored; 0 is all of them", low=0)
    ema_decay: float = flag(0.99, "decay of the codebook's moving averages", low=0)
    quantizer_warmup_steps: int = flag(1000, "steps before the quantiser is switched on", low=0)
    # data
    data_root: str = flag("data", "folder that holds train/ and val/", "train evaluate codebook")
    max_train_samples: int = flag(0, "use only the first N training stories; 0 is all of them", low=0)
    max_val_samples: int = flag(
        256, "use only the first N validation stories; 0 is all of them", "train evaluate codebook", low=0
    )
    dataloader_num_workers: int = flag(2, "processes that read pictures", low=0)
    no_feature_cache: bool = flag(False, "encode pictures and texts at each step, instead of once into data_root")
    # optimisation
    output_dir: str = flag("checkpoints/story_gen", "folder for checkpoints and TensorBoard")
    max_train_steps: int = flag(150_000, "optimizer steps", low=1)
    train_batch_size: int = flag(8, "stories per step on each process", low=1)
    gradient_accumulation_steps: int = flag(1, "batches per optimizer step", low=1)
    learning_rate: float = flag(2e-4, "AdamW learning rate of the encoder", low=0)
    soft_prompt_lr_scale: float = flag(1.0, "learning rate of the soft prompt's map, times the rest's", low=0)
    prior_learning_rate: float = flag(5e-4, "learning rate of the prior", low=0)
    adam_weight_decay: float = flag(0.01, "AdamW weight decay", low=0)
    lr_scheduler: str = flag("cosine", "learning-rate schedule", choices=("cosine", "linear", "constant_with_warmup"))
    lr_warmup_steps: int = flag(2000, "optimizer steps of linear warm-up", low=0)
    prior_steps: int = flag(
        1000, "most steps of the prior alone at the end, when the codes settle; 0 leaves them as they are", low=0
    )
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", low=0)
    mixed_precision: str = flag("fp16", "precision of the matrix products", choices=("no", "fp16", "bf16"))
    gradient_checkpointing: bool = flag(False, "recompute the frozen models' activations to save memory")
    # bookkeeping
    checkpointing_steps: int = flag(5000, "optimizer steps between checkpoints", low=1)
    checkpoints_total_limit: int = flag(0, "checkpoints to keep, at least 2; 0 is all of them", low=0)
    resume_from_checkpoint: str = flag("", "a checkpoint's path, or 'latest'")
    validation_steps: int = flag(1000, "optimizer steps between validations", low=1)
    logging_steps: int = flag(10, "optimizer steps between points in TensorBoard", low=1)
    override: bool = flag(False, "go on from a checkpoint of another configuration or other data")
    skip_bad_rows: bool = flag(False, "leave out rows that cannot be read, and count them, instead of stopping")
    seed: int = flag(0, "seed of data order, noise and sampling", "train generate evaluate", low=0)
    # generation
    validation_prompt: str = flag("", "opening of the sample story; by default the first validation prompt")
    prompt: str = flag("", "opening line of the story", "generate")
    ckpt: str = flag(
        "",
        "checkpoint, or a folder or hub id that export wrote; the embedded storyworld one by default",
        "generate evaluate codebook export",
    )
    output: str = flag(
        "",
        "where the picture or book (.png, .html, .pdf), the metrics, the codebook's page or the export go",
        "generate evaluate codebook export",
    )
    push_to_hub: str = flag("", "owner/name of a hub repository to write to as well", "export")
    storyboard: str = flag("", 'codes to pin, "3 17 _ _ 5 _ _ _"; _ leaves a slot free', "generate")
    num_storyboards: int = flag(
        32, "storyboards drawn from the prior, of which the prompt picks one", "generate", low=1
    )
    temperature: float = flag(1.0, "sampling temperature of storyboard and story", "train generate", low=0.01)
    top_p: float = flag(0.95, "nucleus of storyboard and story", "train generate", low=0.01)
    repetition_penalty: float = flag(1.0, "above 1 makes the words that were written less likely", "generate", low=0.01)
    max_new_tokens: int = flag(320, "longest continuation of the prompt, in tokens", "train generate", low=1)
    num_inference_steps: int = flag(20, "denoising steps of the picture", "train generate evaluate", low=1)
    guidance_scale: float = flag(7.5, "classifier-free guidance of the picture", "train generate", low=0)
    negative_prompt: str = flag("", "what the picture should not show", "generate")
    image_size: int = flag(0, "side of the picture, pixels; 0 is the model's own", "generate", low=0)
    panels: int = flag(1, "pictures of a story, 1 to 8", "generate", low=1, high=8)
    panel_consistency: str = flag(
        "off", "what the panels of a story share", "generate", choices=("off", "noise", "attention")
    )
    num_stories: int = flag(1, "stories of each prompt, with seeds from --seed on", "generate", low=1)
    prompts_file: str = flag("", "a text file with a prompt on each line, instead of --prompt", "generate")
    source: str = flag("", "a .png or .html that generate wrote: make it again, or edited", "generate", name="from")
    json: bool = flag(False, "print what was made as JSON, a line for each story", "generate")
    split: str = flag("val", "which split to look at", "evaluate codebook", choices=("train", "val"))
    eval_batch_size: int = flag(32, "stories per pass in evaluation", "train evaluate codebook", low=1)
    top_codes: int = flag(24, "how many of the most used codes to show", "codebook", low=1)
    debug: bool = flag(False, "show the traceback of an error", "train generate evaluate codebook export")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            choices, kind = f.metadata["choices"], type(f.default)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
            if not (number if kind is float else type(value) is kind):
                raise StoryError(f"--{f.name} must be a {kind.__name__}, got {value!r:.40}", 2)
            if low is not None and not value >= low:
                raise StoryError(f"--{f.name} must be at least {low:g}, got {value}", 2)
            if high is not None and not value <= high:
                raise StoryError(f"--{f.name} must be at most {high:g}, got {value}", 2)
            if choices and value not in choices:
                raise StoryError(f"--{f.name} must be one of {', '.join(choices)}, got {value!r}", 2)
        if self.encoder_width % self.num_heads or self.prior_width % self.num_heads:
            raise StoryError(f"--encoder_width and --prior_width must be multiples of --num_heads {self.num_heads}", 2)


PRESETS = {
    "gpt2-xl": {},
    "storyworld": dict(
        lm_model="assets/storyworld/lm",
        diffusion_model="assets/storyworld/diffusion",
        num_codes=64,
        code_dim=96,
        encoder_width=96,
        prior_width=96,
        prior_layers=2,
        num_heads=4,
        learning_rate=3e-4,
        soft_prompt_lr_scale=2.0,
        prior_learning_rate=4e-3,
        prior_steps=500,
        lr_warmup_steps=20,
        quantizer_warmup_steps=0,
        ema_decay=0.998,
        beta_kl=0.25,
        max_train_steps=500,
        train_batch_size=4,
        diffusion_stories=2,
        checkpointing_steps=500,
        validation_steps=500,
        max_val_samples=64,
        guidance_scale=2.5,
        num_inference_steps=10,
        dataloader_num_workers=0,
        mixed_precision="bf16",
    ),
}

COMMANDS = {
    "train": "train encoder, codebook, prior and soft prompt on data made by download_data.py",
    "generate": "write a story from a prompt and paint its picture",
    "evaluate": "measure a checkpoint on held-out stories",
    "codebook": "show what the codes of a checkpoint mean",
    "export": "write the trained part of a checkpoint for others to load",
}


def parse_args(argv: list[str]) -> tuple[str, Config, set[str]]:
    """Returns the command, its configuration, and the names of the flags that were given by hand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for command, text in COMMANDS.items():
        options = commands.add_parser(command, help=text, description=text, allow_abbrev=False)
        for f in dataclasses.fields(Config):
            if command not in f.metadata["commands"]:
                continue
            text = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
            if isinstance(f.default, bool):
                kind = dict(action="store_true")
            else:
                kind = dict(type=type(f.default), choices=f.metadata["choices"] or None)
            name = f.metadata["name"] or f.name
            options.add_argument(f"--{name}", dest=f.name, default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    try:
        return command, Config(**{**PRESETS[given.get("preset", "gpt2-xl")], **given}), set(given)
    except StoryError as error:
        parser.error(str(error))


def prepare_folder(folder: Path, flag_name: str) -> None:
    """Finds out in the first second, not at the first checkpoint, that a folder cannot be written. Of several processes
    rank 0 alone writes."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # without a name that another process could take away
    except OSError as error:
        raise StoryError(f"--{flag_name} {folder} cannot be written: {error}") from error


def answer_early(argv: list[str]) -> None:
    """--help, a mistyped flag and a folder that cannot be written are answered before torch's seconds of import."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # until main listens
    command, config, _ = parse_args(argv)
    try:
        if command == "train":
            prepare_folder(Path(config.output_dir), "output_dir")
    except StoryError as error:
        say(f"error: {error}")
        sys.exit(error.code)


if __name__ == "__main__":
    answer_early(sys.argv[1:])

import base64
import codecs
import hashlib
import html
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from difflib import SequenceMatcher
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------------
# 2. Data
# In: data_root/{train,val}/stories.jsonl and the pictures beside it. Out: batches of story tokens with one panel of
# each story, its text and its picture in [-1, 1] at the painter's resolution. The order of the stories is a function
# of (seed, position), so that a resumed run reads exactly what an unbroken one would have read.
# ------------------------------------------------------------------------------------------------------------------


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator that is a function of the numbers: every random draw of this program comes from one, keyed by
    the seed and by what is drawn, so that there is no random state to lose."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0] >> 1)
    )


class Panel(NamedTuple):
    text: str
    image_path: str


class Row(NamedTuple):
    prompt: str
    story: str
    panels: tuple[Panel, ...]
    where: str  # "stories.jsonl:LINE", for messages
    factors: dict[str, str]  # the storyworld's ground truth; empty for real stories


MAX_ROW = 1 << 20  # bytes: no story is as long as that, and a line without an end must not fill the memory
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may hold one alone, no text encoding may


def parse_row(line: bytes, where: str) -> Row:
    """One line of stories.jsonl. Raises StoryError that names the file, the line, and what is wrong with it."""
    if len(line) > MAX_ROW:
        raise StoryError(f"{where}: the row is longer than {MAX_ROW:,} bytes")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise StoryError(f"{where}: not JSON ({error}); run download_data.py again") from None
    panels = (row.get("panels") or [dict(row, text=row.get("story"))]) if isinstance(row, dict) else None
    if panels is None:
        raise StoryError(f"{where}: expected an object with prompt, story and image_path, got {str(row)[:40]!r}")
    wanted = [("prompt", row.get("prompt")), ("story", row.get("story"))]
    if not isinstance(panels, list):
        raise StoryError(f"{where}: panels must be a list, got {str(panels)[:40]!r}")
    for number, panel in enumerate(panels):
        panel = panel if isinstance(panel, dict) else {}
        wanted += [
            (f"panels[{number}].text", panel.get("text")),
            (f"panels[{number}].image_path", panel.get("image_path")),
        ]
    for name, value in wanted:
        if not isinstance(value, str) or not value.strip() or SURROGATE.search(value):
            raise StoryError(f"{where}: {name} must be text that is not empty, got {str(value)[:40]!r}")
    for panel in panels:
        check_image_path(panel["image_path"], where)
    panels = tuple(Panel(panel["text"], panel["image_path"]) for panel in panels)
    factors = row.get("factors") or {}
    if not isinstance(factors, dict) or not all(isinstance(value, str) for value in factors.values()):
        raise StoryError(f"{where}: factors must be names with texts, got {str(factors)[:40]!r}")
    return Row(row["prompt"], row["story"], panels, where, factors)


def check_image_path(path: str, where: str) -> None:
    """Data come from elsewhere: a path in them may name files below the split's folder and no others."""
    parts = path.replace("\\", "/").split("/")
    if "\0" in path or ".." in parts or not parts[0] or re.match("[A-Za-z]:", path):
        raise StoryError(f"{where}: image_path must name a file below the split's folder, got {path[:60]!r}")


class Rows(Sequence):
    """The rows of a split's file, or of its shards, read from the disk when they are asked for: of a million rows only
    the places are in memory. A row that is no row raises StoryError with its line when its turn comes; with `skip_bad`
    all are read at the start, and such rows told and left out."""

    def __init__(self, paths: list[Path], limit: int = 0, skip_bad: bool = False):
        self.paths = paths
        lines, digests = zip(*map(find_lines, paths))
        self.lines = np.concatenate([np.insert(rows, 0, file, 1) for file, rows in enumerate(lines)])  # (N, 4)
        self.digest = digests[0] if len(paths) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        if skip_bad:
            readable = np.array([self.is_readable(index) for index in range(len(self))], dtype=bool)
            self.lines = self.lines[readable]
            if not readable.all():
                say(f"{paths[0].parent}: {(~readable).sum()} rows skipped")
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
            say(f"skipped: {error}")
            return False


READ_BLOCK = 1 << 24  # bytes


def find_lines(path: Path) -> tuple[np.ndarray, str]:
    """The lines of a file that are not blank, (N, 3) int64: number from 1, first byte (behind a byte order mark), end;
    and the sha256 of all bytes, the data's name in a checkpoint."""
    digest, ends, size = hashlib.sha256(), [], 0
    with open(path, "rb") as file, ThreadPoolExecutor(1) as hasher:
        while chunk := file.read(READ_BLOCK):
            hashing = hasher.submit(digest.update, chunk)  # beside the search: both leave the interpreter free
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
            hashing.result()
        ends = np.concatenate([*ends, [size]])  # the last line may end without a newline
        starts = np.concatenate([[0], ends[:-1] + 1])
        file.seek(0)
        starts[0] = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        lines, filled = np.stack([np.arange(1, len(ends) + 1), starts, ends], 1), ends > starts
        for place in np.flatnonzero(ends - starts < len('{"prompt":"","story":"","image_path":""}')):
            file.seek(starts[place])
            filled[place] = bool(file.read(ends[place] - starts[place]).strip())
    return lines[filled], digest.hexdigest()


def read_rows(data_root: str, split: str, limit: int = 0, skip_bad: bool = False) -> Rows:
    """The first `limit` rows of a split (0: all): of stories.jsonl, or of all stories-IIIII-of-NNNNN.jsonl in order."""
    path = Path(data_root) / split / "stories.jsonl"
    if path.is_file():
        return Rows([path], limit, skip_bad)
    shards = sorted(path.parent.glob("stories-*-of-*.jsonl"))
    if not shards:
        raise StoryError(f"{path} does not exist: make it with download_data.py (--source storyworld needs no network)")
    count = int(re.search(r"-of-(\d+)", shards[0].name)[1])
    if len(shards) != count:
        there = f"{len(shards)} of {count} shards"
        raise StoryError(f"{path.parent} holds {there}: make the others with download_data.py --shard_index")
    return Rows(shards, limit, skip_bad)


def load_picture(folder: Path, name: str, resolution: int, where: str) -> Tensor:
    """The centre square of the picture folder/name, (3, R, R) float32 in [-1, 1], the range of Stable Diffusion's
    autoencoder; upright, on white where it is transparent. A picture that lies elsewhere, behind a symbolic link, is
    not opened."""
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise StoryError(f"{where}: {path} leads out of {folder}: copy the picture there")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
                image = on_white(ImageOps.exif_transpose(image))
    except StoryError:
        raise
    except Exception as error:  # damaged bytes make Pillow's parsers raise almost anything
        raise StoryError(f"{where}: {path}: not a readable JPEG, PNG or WebP picture ({error})") from None
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(resolution, resolution, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1  # (3, R, R)


def on_white(image: Image.Image) -> Image.Image:
    """Any picture as RGB: 16 bits become 8, and what is transparent shows white."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


class StoryDataset(Dataset):
    """Rows by (epoch, index, with_picture): the epoch seeds the choice of the panel, and pictures that nobody will
    score are not read. With `features` a panel comes encoded, as (moments, states)."""

    def __init__(self, rows: Rows, folder: Path, tokenizer, max_tokens: int, resolution: int, seed: int, features=None):
        self.rows, self.folder, self.tokenizer, self.features = rows, folder, tokenizer, features
        self.max_tokens, self.resolution, self.seed = max_tokens, resolution, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int, bool]) -> dict:
        epoch, index, with_picture = key
        try:
            row = self.rows[index]
        except StoryError as error:
            return dict(index=index, tokens=[0], cut=False, problem=str(error))
        tokens = self.tokenizer(row.story, add_special_tokens=False)["input_ids"]
        number = int(torch.randint(len(row.panels), (), generator=seeded(self.seed, epoch, index)))
        item = dict(index=index, tokens=tokens[: self.max_tokens], cut=len(tokens) > self.max_tokens)
        if with_picture:
            try:
                item["panel"] = self.read_panel(index, number, row)
            except StoryError as error:  # told by the trainer: a reader process can only fail with a traceback
                item["problem"] = str(error)
        return item

    def read_panel(self, index: int, number: int, row: Row) -> dict:
        if self.features:
            return self.features.read(index, number)
        panel = row.panels[number]
        return dict(text=panel.text, pixels=load_picture(self.folder, panel.image_path, self.resolution, row.where))


PAD_TO = 16  # batches come in few lengths: the CPU's kernels are compiled, and kept in memory, for each


def collate(items: list[dict], max_tokens: int) -> dict:
    """tokens (B, T) int64, padded at the right with 0 to a multiple of PAD_TO, or to the `max_tokens` that a story may
    have; mask (B, T) bool; cut (B,) bool: the story was longer than that.
    M items carry a panel: `painted` are their places in the batch, `panels` what LatentDiffusion.features takes, a
    list for each key; `problems` tells of what could not be read."""
    length = min(-(-max(len(item["tokens"]) for item in items) // PAD_TO) * PAD_TO, max_tokens)
    tokens = torch.tensor([item["tokens"] + [0] * (length - len(item["tokens"])) for item in items])  # (B, T)
    lengths = torch.tensor([len(item["tokens"]) for item in items])
    places = [place for place, item in enumerate(items) if "panel" in item]
    panels = [items[place]["panel"] for place in places]
    return dict(
        index=[item["index"] for item in items],
        tokens=tokens,
        mask=torch.arange(length) < lengths[:, None],  # (B, T)
        cut=torch.tensor([item["cut"] for item in items]),
        painted=places,
        panels={key: [panel[key] for panel in panels] for key in (panels[0] if panels else ())},
        problems=[item["problem"] for item in items if "problem" in item],
    )


def batches_of(items: list, size: int) -> list[list]:
    """The items in order, `size` at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]


class StoryBatches:
    """An endless batch sampler: position p of the stream is story randperm(seed, epoch)[p mod N] of epoch p // N.
    Process r of n takes every n-th batch, so the stream does not depend on who reads it. The first `pictures` stories
    of every `every`-th batch of a process come with their picture."""

    def __init__(
        self,
        size: int,
        batch: int,
        pictures: int,
        seed: int,
        position: int = 0,
        rank: int = 0,
        ranks: int = 1,
        every: int = 1,
    ):
        self.size, self.batch, self.pictures, self.every, self.seed = size, batch, pictures, every, seed
        self.position, self.rank, self.ranks = position, rank, ranks

    def __iter__(self):
        epoch, order, position = -1, None, self.position + self.rank * self.batch
        while True:
            keys, number = [], position // (self.batch * self.ranks) + 1  # of this process's batches, from 1 on
            pictures = self.pictures if number % self.every == 0 else 0
            for place in range(position, position + self.batch):
                if place // self.size != epoch:
                    epoch = place // self.size
                    order = torch.randperm(self.size, generator=seeded(self.seed, epoch))
                keys.append((epoch, int(order[place % self.size]), len(keys) < pictures))
            yield keys
            position += self.batch * self.ranks


# ------------------------------------------------------------------------------------------------------------------
# 3. Vector quantiser
# In: encoder outputs (N, D), one row for each token. Out: the nearest code of each. The codebook is learned by moving
# averages (van den Oord et al. 2017, appendix A.1), never by gradient: counts and sums are kept apart in float32,
#     N_k <- decay N_k + (1 - decay) n_k      m_k <- decay m_k + (1 - decay) sum of x in k      e_k = m_k / N_k
# starts from k-means on encoder outputs, and a code that dies is revived from the outputs of the moment.
# ------------------------------------------------------------------------------------------------------------------


def all_sum(x: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_mean(x: Tensor) -> Tensor:
    """The mean over all processes."""
    return all_sum(x.clone()) / (dist.get_world_size() if dist.is_initialized() else 1)


def largest(number: float, device) -> float:
    """The largest of all processes' numbers."""
    if not dist.is_initialized():
        return number
    x = torch.tensor(float(number), device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return float(x)


def gather_rows(x: Tensor) -> Tensor:
    """The rows (N, D) of every process, in rank order; N may differ between processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    sizes = [torch.zeros((), dtype=torch.int64, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor(len(x), device=x.device))
    longest = int(max(sizes))
    parts = [x.new_empty(longest, x.shape[1]) for _ in sizes]
    dist.all_gather(parts, F.pad(x, (0, 0, 0, longest - len(x))).contiguous())
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes)])


def spread_picks(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices (count,) of rows far apart: each drawn with probability of its squared distance to those before
    (k-means++, Arthur and Vassilvitskii 2007)."""
    picks = [int(torch.randint(len(x), (), generator=generator))]
    distance = (x - x[picks[0]]).square().sum(1)  # (N,)
    while len(picks) < count:
        weights = distance.cpu() if distance.any() else torch.ones(len(x))  # fewer distinct rows than clusters
        picks.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = torch.minimum(distance, (x - x[picks[-1]]).square().sum(1))
    return torch.tensor(picks, device=x.device)


def kmeans(x: Tensor, num_clusters: int, generator: torch.Generator, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on the rows of x (N, D): centres (K, D) and their counts (K,). Fewer rows than clusters leave
    clusters with a count of zero, which stand on a copy of a row."""
    centres = x[spread_picks(x, num_clusters, generator)]  # (K, D)
    for _ in range(iterations):
        nearest = torch.cdist(x, centres).argmin(1)  # (N,)
        counts = torch.bincount(nearest, minlength=num_clusters).to(x.dtype)  # (K,)
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
    return centres, counts


class VectorQuantizer(nn.Module):
    """EMA codebook of K codes of width D. All state is float32 buffers; call it outside autocast.

    A code whose moving-average count falls below `dead_share` of the uniform share is moved onto a current output.
    """

    def __init__(self, num_codes: int, code_dim: int, decay: float, eps=1e-5, dead_share=0.1, seed: int = 0):
        super().__init__()
        self.num_codes, self.seed = num_codes, seed
        self.decay, self.eps, self.dead_share = decay, eps, dead_share
        self.register_buffer("codebook", torch.zeros(num_codes, code_dim))  # (K, D)
        self.register_buffer("counts", torch.zeros(num_codes))  # (K,), per update
        self.register_buffer("sums", torch.zeros(num_codes, code_dim))  # (K, D)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # 0: the codebook has not started

    def distances(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, K): squared distances of outputs to codes, less |x|^2, which is the same for all codes."""
        return self.codebook.square().sum(1) - 2 * x.to(self.codebook) @ self.codebook.T

    def variance_per_nat(self) -> Tensor:
        """() float32: the variance that the codes explain, for each of the log K nats that a choice among them may
        cost. A codebook that loses codes explains less, so that the cost weighs less and takes no more of them."""
        shares = self.counts / self.counts.sum().clamp(min=self.eps)  # (K,)
        mean = shares @ self.codebook  # (D,)
        return shares @ (self.codebook - mean).square().sum(1) / math.log(self.num_codes)

    def look_up(self, codes: Tensor) -> Tensor:
        """Codes (...) -> their vectors (..., D)."""
        return self.codebook[codes]

    @torch.no_grad()
    def update(self, x: Tensor, codes: Tensor) -> None:
        """One step of the moving averages on outputs x (N, D) of this process and the codes (N,) that they chose; all
        processes step together.

        A batch with a NaN or an infinity anywhere is left out whole: it would stay in the averages for good.
        """
        x = x.to(self.codebook)
        batch = torch.zeros(self.num_codes, 1 + x.shape[1], device=x.device)  # (K, 1 + D): counts and sums in one
        batch.index_add_(0, codes, F.pad(x, (1, 0), value=1.0))
        all_sum(batch)
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
    def start(self, x: Tensor) -> None:
        """Puts the codes on the k-means centres of encoder outputs x (N, D), the same on every process."""
        x = x.to(self.codebook)
        centres, counts = kmeans(x, self.num_codes, seeded(self.seed))
        self.counts.copy_(counts.clamp(min=1))
        self.sums.copy_(centres * self.counts[:, None])
        self.codebook.copy_(centres)
        self.updates.fill_(1)

    def revive(self, x: Tensor) -> None:
        """Moves dead codes onto rows drawn from the outputs, with the count of an average code."""
        share = self.counts.sum() / self.num_codes
        dead = (self.counts < self.dead_share * share).nonzero().squeeze(1)
        if len(dead) == 0:
            return
        rows = gather_rows(x)
        picks = torch.randint(len(rows), (len(dead),), generator=seeded(self.seed, int(self.updates)))
        self.counts[dead] = share
        self.sums[dead] = rows[picks.to(rows.device)] * share

    def usage(self) -> tuple[float, float]:
        """Codes alive and perplexity exp(H) of the moving-average counts."""
        shares = self.counts / self.counts.sum().clamp(min=self.eps)
        return float((shares > self.dead_share / self.num_codes).sum()), perplexity(shares)


def perplexity(shares: Tensor) -> float:
    """exp of the entropy of a distribution (K,): how many equally used codes would be as rich."""
    return float(torch.special.entr(shares).sum().exp())


# ------------------------------------------------------------------------------------------------------------------
# 4. Storyboard encoder
# In: story tokens (B, T), embedded by the frozen language model. Out: the storyboard: for each of 8 equal chunks the
# code that most of its tokens chose (B, S), and its vector (B, S, D), through which the gradient goes straight to the
# mean of the outputs that voted for it. Trained by gradient: the Transformer. By moving averages: the codebook.
# ------------------------------------------------------------------------------------------------------------------


def chunk_members(mask: Tensor) -> Tensor:
    """(B, T) bool -> (B, S, T) bool: slot j of a story of n tokens covers tokens floor(j n/8) to floor((j+1) n/8),
    one at the least, so that stories shorter than 8 tokens share theirs. Padding belongs to no slot."""
    n = mask.sum(1)[:, None]  # (B, 1)
    slots = torch.arange(NUM_SLOTS, device=mask.device)
    first, last = slots * n // NUM_SLOTS, (slots + 1) * n // NUM_SLOTS  # (B, S)
    last = torch.maximum(last, first + 1)
    place = torch.arange(mask.shape[1], device=mask.device)
    return (place >= first[..., None]) & (place < last[..., None]) & mask[:, None]  # (B, S, T)


def majority_vote(nearest: Tensor, members: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """(B, T) token codes and (B, S, T) membership -> winning code (B, S) and its share of the votes (B, S).
    A tie goes to the smaller code."""
    story, slot, token = members.nonzero(as_tuple=True)
    votes = torch.zeros(*members.shape[:2], num_codes, device=nearest.device)  # (B, S, K)
    votes.index_put_((story, slot, nearest[story, token]), votes.new_ones(()), accumulate=True)
    return votes.argmax(-1), votes.amax(-1) / members.sum(-1)


def principal_directions(rows: Tensor) -> tuple[Tensor, Tensor]:
    """PCA of embedding rows (V, E): orthonormal directions (E, E), one a row, by falling variance, and the standard
    deviation along each (E,)."""
    rows = rows.detach().float()
    variances, directions = torch.linalg.eigh(torch.cov(rows.T).cpu())
    spreads = variances.flip(0).clamp(min=1e-8).sqrt()
    return directions.T.flip(0).to(rows.device), spreads.to(rows.device)


class Storyboard(NamedTuple):
    codes: Tensor  # (B, S) int64, each in 0..K-1
    vectors: Tensor  # (B, S, D) float32: the codes' vectors, with the straight-through gradient
    share: Tensor  # (B, S) float32: share of a chunk's tokens that voted for the winner
    commitment: Tensor  # () float32: mean squared distance of token outputs to their codes


class StoryboardEncoder(nn.Module):
    """q_phi(z | s): Transformer, quantiser at every token, majority vote over 8 equal chunks.

    It starts as words: its layers pass their input on (their last projections are zero), so that a token's output is
    its embedding in the language model, in the D principal directions of the embedding table; a chunk's vector is
    mostly that of its loudest word, by how words are spread over stories; and SoftPrompt starts as the way back. So the
    frozen language model reads keywords of each chunk from the first step, and training has something to improve.
    """

    def __init__(self, config: Config, rows: Tensor, max_tokens: int):
        super().__init__()
        width = config.encoder_width
        self.unit = float(rows.float().std())  # vectors are in units of the embedding rows' own spread
        self.from_embeds = nn.Linear(rows.shape[1], width, bias=False)
        self.position = nn.Embedding(max_tokens, width)
        self.slot = nn.Embedding(NUM_SLOTS, width)
        layer = nn.TransformerEncoderLayer(
            width, config.num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.encoder_layers, enable_nested_tensor=False)
        self.to_code = nn.Linear(width, config.code_dim)
        self.to_loudness = nn.Linear(width, 1, bias=False)  # how much a token has to say in its chunk's vector,
        self.word_loudness = nn.Embedding(len(rows), NUM_SLOTS)  # by what stands around it and by what word it is
        self.own_share = nn.Parameter(torch.tensor(0.1))  # how far a token may leave its chunk's vector
        self.quantizer = VectorQuantizer(config.num_codes, config.code_dim, config.ema_decay, seed=config.seed)
        self.register_buffer("heard", torch.ones(NUM_SLOTS))  # how far the language model hears each slot, at most 1
        self.seen: list[tuple[Tensor, Tensor]] = []  # outputs and their codes, from which the codebook is to learn
        self.start_as_words(rows)

    @torch.no_grad()
    def start_as_words(self, rows: Tensor) -> None:
        directions, spreads = principal_directions(rows)
        whiten = torch.diag(self.unit / spreads)  # all directions at one scale: no word lies apart for being frequent
        for weight, start in ((self.from_embeds.weight, directions), (self.to_code.weight, whiten)):
            shared = tuple(slice(min(sizes)) for sizes in zip(weight.shape, start.shape))
            weight.zero_()[shared] = start[shared]
        zeros = [self.position.weight, self.slot.weight, self.to_loudness.weight, self.word_loudness.weight]
        for layer in self.layers.layers:
            zeros += [layer.self_attn.out_proj.weight, layer.linear2.weight, layer.linear2.bias]
        for weight in (*zeros, self.to_code.bias):
            weight.zero_()

    @torch.no_grad()
    def start_loudness(self, stories: list[list[int]], sharpness: float = 4.0) -> None:
        """Token ids of stories -> how loud each word is in each slot. Loud is what a story is about: words that few
        stories have (idf), that come back in those that have them (their adaptation, Church 2000: the mean count in a
        story that has the word), and that stand in this slot more than in others (pointwise mutual information)."""
        size = len(self.word_loudness.weight)
        counts, with_word, in_slot = torch.zeros(size), torch.zeros(size), torch.zeros(NUM_SLOTS, size)
        for story in stories:
            tokens = torch.tensor(story)
            counts.index_add_(0, tokens, torch.ones(len(tokens)))
            with_word[tokens.unique()] += 1
            for slot, members in enumerate(chunk_members(torch.ones(1, len(tokens), dtype=torch.bool))[0]):
                in_slot[slot, tokens[members].unique()] += 1
        idf = ((len(stories) + 1) / (with_word + 1)).log()
        adaptation = (counts / with_word.clamp(min=1)).clamp(min=1).log()
        information = ((in_slot + 1) / (in_slot + 1).mean(0)).log().clamp(min=0)  # (S, V)
        loudness = (idf + 1e-3) * (adaptation + 1e-3) ** 0.7 * (information + 0.02)
        self.word_loudness.weight.copy_(sharpness * loudness.log().T)

    @torch.no_grad()
    def standardize(self, chunks: Tensor) -> None:
        """Shifts and scales the outputs so that chunk vectors like these (N, D) have mean zero and the spread of words
        about it: a mean of many words is quieter than a word, and a soft prompt of another scale is not heard."""
        mean = chunks.mean(0)
        spread = (chunks - mean).square().mean().sqrt()
        self.to_code.bias.sub_(mean).div_(spread)
        self.to_code.weight.div_(spread)

    def outputs(self, tokens: Tensor, embeds: Tensor, mask: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        """What each token says, (B, T, E) -> (B, T, D), and how loudly in each slot, (B, T, S)."""
        place = torch.arange(embeds.shape[1], device=embeds.device)
        hidden = self.from_embeds(embeds / self.unit) + self.position(place) + self.slot(slot)  # (B, T, width)
        hidden = self.layers(hidden, src_key_padding_mask=~mask)
        return self.to_code(hidden), self.to_loudness(hidden) + self.word_loudness(tokens)

    def pool(self, own: Tensor, loudness: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        """Token outputs (B, T, D), float32: mostly their chunk's vector, which is an attention over the chunk's tokens,
        so that the votes of a chunk agree: a vote that splits spends bits on nothing."""
        scores = loudness.mT.masked_fill(~members, -torch.inf)  # (B, S, T)
        chunks = scores.softmax(-1) @ own  # (B, S, D)
        shares = members.to(own) / members.sum(1, keepdim=True).clamp(min=1)  # (B, S, T)
        shared = shares.mT @ chunks  # (B, T, D): a token of several slots has the mean of theirs
        return shared + self.own_share * (own - shared)

    def forward(self, tokens: Tensor, embeds: Tensor, mask: Tensor, rate=None, learn: bool = False) -> Storyboard:
        """Stories of at least one token each; tokens and mask (B, T), embeds (B, T, E). `rate` maps codes (B, S) to
        what each code would cost in their place (B, S, K). With `learn` the outputs are kept for `step_codebook`.
        Until the codebook has started the vectors are the chunks' own, not quantised."""
        members = chunk_members(mask)  # (B, S, T)
        slot = members.float().argmax(1)  # (B, T): the first slot that a token belongs to
        own, loudness = self.outputs(tokens, embeds, mask, slot)
        with torch.autocast(own.device.type, enabled=False):
            own, loudness = (x.to(self.quantizer.codebook) for x in (own, loudness))  # float32
            return self.quantize(self.pool(own, loudness, members), mask, members, rate, learn)

    def quantize(self, outputs: Tensor, mask: Tensor, members: Tensor, rate, learn: bool) -> Storyboard:
        """Votes by distance, and with a rate again by distance and cost: entropy-constrained quantisation (Chou et
        al. 1989), a nat at the variance that it explains, and at more where the same distance is heard less."""
        if not self.quantizer.updates:
            shares = members.to(outputs) / members.sum(-1, keepdim=True)  # (B, S, T)
            nothing = torch.zeros(members.shape[:2], dtype=torch.int64, device=outputs.device)
            return Storyboard(nothing, shares @ outputs, shares.sum(-1), outputs.new_zeros(()))
        x = outputs[mask].detach()  # (N, D), the tokens of all stories
        distances = self.quantizer.distances(x)  # (N, K)
        codes, share, nearest = self.vote(distances, mask, members)
        if rate is not None:
            story, slot = mask.nonzero()[:, 0], members.float().argmax(1)[mask]  # (N,): where each token's slot is
            worth = self.quantizer.variance_per_nat() / self.heard[:, None]  # (S, 1), of a nat, in squared distance
            for _ in range(2):  # what a code costs goes by the codes before it
                costs = (worth * rate(codes))[story, slot]  # (N, K)
                codes, share, nearest = self.vote(distances + costs, mask, members)
        if learn:
            self.seen.append((x, nearest[mask]))
        voters = (members & (nearest[:, None] == codes[..., None])).to(outputs)  # (B, S, T)
        mean = voters @ outputs / voters.sum(-1, keepdim=True)  # (B, S, D): the outputs that voted for the winner
        vectors = self.quantizer.look_up(codes)  # (B, S, D)
        commitment = F.mse_loss(outputs[mask], self.quantizer.look_up(nearest[mask]))
        return Storyboard(codes, vectors + (mean - mean.detach()), share, commitment)

    def step_codebook(self) -> None:
        """One step of the codebook on all outputs since the last: after the optimizer's, so that a step which is
        skipped or refused leaves the codebook as it was."""
        if self.seen:
            self.quantizer.update(*map(torch.cat, zip(*self.seen)))
        self.seen = []

    def vote(self, costs: Tensor, mask: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each token votes for the code that costs it least, (N, K), of two the smaller: winning codes (B, S), their
        shares (B, S), and each token's own code (B, T)."""
        nearest = torch.zeros_like(mask, dtype=torch.int64)
        nearest[mask] = costs.argmin(1)
        return *majority_vote(nearest, members, self.quantizer.num_codes), nearest


# ------------------------------------------------------------------------------------------------------------------
# 5. Prior
# In: codes (B, S). Out: log p_theta(z) = sum over all eight slots of log p(z_j | z_<j). The first code is modelled
# too, behind a start token. Trained.
# ------------------------------------------------------------------------------------------------------------------


class Prior(nn.Module):
    """p_theta(z): a causal Transformer over the eight codes."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.prior_width
        self.num_codes = config.num_codes
        self.code = nn.Embedding(config.num_codes + 1, width)  # the last row is the start token
        self.position = nn.Embedding(NUM_SLOTS, width)
        layer = nn.TransformerEncoderLayer(
            width, config.num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.prior_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.to_logits = nn.Linear(width, config.num_codes)
        nn.init.normal_(self.code.weight, std=0.02)
        nn.init.zeros_(self.to_logits.weight)  # the first prediction is uniform
        nn.init.zeros_(self.to_logits.bias)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, L) int64, 1 <= L <= S -> logits (B, L, K); those of slot j have seen the codes before j alone."""
        shifted = F.pad(codes[:, :-1], (1, 0), value=self.num_codes)  # (B, L): start token, then the codes
        length = shifted.shape[1]
        hidden = self.code(shifted) + self.position.weight[:length]  # (B, L, width)
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=codes.device)
        return self.to_logits(self.layers(hidden, mask=causal, is_causal=True)).to(self.to_logits.weight)  # (B, L, K)

    def nll(self, codes: Tensor) -> Tensor:
        """-log p_theta(z) of each storyboard: (B, S) -> (B,), nats."""
        return F.cross_entropy(self(codes).mT, codes, reduction="none").sum(1)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        generator: torch.Generator,
        pinned: list[int | None] = (),
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Tensor:
        """Draws `count` storyboards (count, S), slot by slot; a pinned slot keeps its code. Generator on the CPU."""
        device = self.code.weight.device
        codes = torch.zeros(count, 0, dtype=torch.int64, device=device)
        for slot in range(NUM_SLOTS):
            if slot < len(pinned) and pinned[slot] is not None:
                drawn = torch.full((count, 1), pinned[slot], device=device)
            else:
                logits = self(F.pad(codes, (0, 1)))[:, -1] / temperature  # (count, K)
                drawn = torch.multinomial(nucleus(logits.softmax(-1), top_p).cpu(), 1, generator=generator).to(device)
            codes = torch.cat([codes, drawn], 1)
        return codes


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """(B, K) -> (B, K): the likeliest codes whose mass reaches top_p (Holtzman et al. 2020), the others at zero."""
    ordered, order = probs.sort(-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
    return torch.zeros_like(probs).scatter(-1, order, ordered)


# ------------------------------------------------------------------------------------------------------------------
# 6. Backbones
# The frozen language model p_psi(s | z) and the frozen latent diffusion p_omega(x | s), loaded by from_pretrained from
# the hub or a folder. Everything that differs between models (widths, scaling factor, prediction type, resolution,
# text length) is read from the models. Frozen means: no parameter asks for a gradient, and always in eval mode; they
# are plain attributes of what uses them, so that neither .train() nor the optimizer ever sees them.
# ------------------------------------------------------------------------------------------------------------------


def local_or_hub(name: str) -> str:
    """A path below the script's folder where there is one (the embedded backbones), else the name as it stands."""
    return str(ROOT / name) if (ROOT / name).is_dir() else name


@contextmanager
def loading(name: str, flag_name: str):
    """Turns the hub's and the libraries' errors about one model into a line that says what to do."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StoryError(
            f"--{flag_name} {name} cannot be loaded ({reason}): give a hub id or a local folder, set HF_ENDPOINT or "
            "fill the cache if the hub cannot be reached, or use --preset storyworld, which needs no network"
        ) from error


def freeze(*modules: nn.Module) -> None:
    for module in modules:
        module.requires_grad_(False).eval()


def revision_of(config) -> str:
    """The hub commit a loaded model came from; empty for a local folder."""
    found = re.search(r"/snapshots/([0-9a-f]{40})", str(config.get("_name_or_path", "")))
    return config.get("_commit_hash") or (found.group(1) if found else "")


class LanguageModel:
    """A frozen causal language model that reads a soft prompt: [start token] [P soft tokens] [story] [end token]."""

    def __init__(self, name: str, device, dtype: torch.dtype, gradient_checkpointing: bool = False):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with loading(name, "lm_model"):
            self.tokenizer = AutoTokenizer.from_pretrained(local_or_hub(name))
            self.model = AutoModelForCausalLM.from_pretrained(local_or_hub(name), dtype=dtype).to(device)
        if self.model.device.type == "cpu":
            self.model.set_attn_implementation("eager")  # the CPU's fused attention has a slow backward
        freeze(self.model)
        self.device = device
        self.embed = self.model.get_input_embeddings()
        self.width = self.embed.weight.shape[1]  # E
        self.context = self.model.config.max_position_embeddings
        self.end = self.tokenizer.eos_token_id
        start = self.tokenizer.bos_token_id
        self.start = self.end if start is None else start
        self.revision = revision_of(self.model.config.to_dict() | {"_name_or_path": self.model.config._name_or_path})
        if gradient_checkpointing:
            self.checkpoint_layers()

    def checkpoint_layers(self) -> None:
        """transformers checkpoints a layer only in train mode; the mode of the layer's container alone is set, so
        that the dropout inside stays off."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in self.model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True

    def frame(self, soft: Tensor, tokens: Tensor) -> Tensor:
        """(B, P, E), (B, T) -> (B, 1 + P + T, E): the start token stands first, as in training on documents."""
        start = self.embed.weight[self.start].expand(len(tokens), 1, -1)
        embeds = self.embed(tokens)  # (B, T, E)
        return torch.cat([start, soft.to(embeds.dtype), embeds], 1)

    def nll(self, soft: Tensor, tokens: Tensor, mask: Tensor, cut: Tensor | None = None) -> Tensor:
        """-log p_psi(s | soft prompt) of each story, (B,) nats over its tokens and its end token.

        soft (B, P, E) with P >= 0; tokens (B, T) and mask (B, T) bool, padded at the right. A story that was cut at
        the context (cut, (B,) bool) has no end, and is not charged for one. Differentiable in `soft`.
        """
        soft_tokens, lengths = soft.shape[1], mask.sum(1)
        seen = F.pad(mask, (1 + soft_tokens, 0), value=True)  # (B, 1 + P + T)
        logits = self.model(inputs_embeds=self.frame(soft, tokens), attention_mask=seen.long(), use_cache=False).logits
        targets = F.pad(tokens.masked_fill(~mask, -100), (0, 1), value=-100)  # (B, T + 1)
        end = torch.full_like(lengths, self.end)
        if cut is not None:
            end = end.masked_fill(cut, -100)
        targets = targets.scatter(1, lengths[:, None], end[:, None])
        logits = logits[:, soft_tokens:].to(torch.promote_types(logits.dtype, torch.float32))  # (B, T + 1, V)
        losses = F.cross_entropy(logits.mT, targets, ignore_index=-100, reduction="none")
        return losses.sum(1)

    @torch.no_grad()
    def write(self, soft: Tensor, prompts: list[str], config: Config, seeds: list[int]) -> list[str]:
        """Continues each prompt after its soft prompt, soft (B, P, E): prompt and continuation, sampled (top-p) with
        the row's own seed, so that a story does not depend on those that are written beside it."""
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopPLogitsWarper,
        )

        rows = [self.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        length = max(map(len, rows))  # T
        room = self.context - 1 - soft.shape[1] - length
        if room < 1:
            raise StoryError(f"the prompt has {length} tokens, more than the model's context of {self.context}", 2)
        # padded at the left, so that all prompts end in one place
        framed = [
            self.frame(one[None], torch.tensor([row], dtype=torch.int64, device=self.device))[0]
            for one, row in zip(soft, rows)
        ]
        embeds = torch.stack([F.pad(one, (0, 0, length - len(row), 0)) for one, row in zip(framed, rows)])
        seen = torch.tensor([[0] * (length - len(row)) + [1] * (len(one)) for one, row in zip(framed, rows)])
        sampler = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
                TemperatureLogitsWarper(config.temperature),
                TopPLogitsWarper(config.top_p),
                KeyedGumbel(rows, seeds),
            ]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = self.model.generate(
                inputs_embeds=embeds,
                attention_mask=seen.to(self.device),
                do_sample=False,
                logits_processor=sampler,
                max_new_tokens=min(config.max_new_tokens, room),
                eos_token_id=self.end,
                pad_token_id=self.end,
            ).tolist()
        stories = []
        for prompt, row in zip(prompts, written):
            story = prompt + self.tokenizer.decode(row, skip_special_tokens=True)
            stories.append(story.strip() if self.end in row else up_to_last_sentence(story, prompt))
        return stories


class KeyedGumbel:
    """Gumbel noise on the scores (B, V), after which the largest is a sample (Gumbel 1954; a LogitsProcessor).

    The noise of a token is a function of the row's seed, of the two tokens before it, and of how often those two have
    stood there: each token has noise of its own, so the samples are the model's; and where an edited story comes back
    to the words it had, it meets the chances it had, so that an edit stays local.
    """

    def __init__(self, prompts: list[list[int]], seeds: list[int]):
        self.prompts, self.seeds = prompts, seeds
        self.seen = [Counter() for _ in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = []
        for prompt, seed, seen, row in zip(self.prompts, self.seeds, self.seen, input_ids[:, -2:].tolist()):
            pair = tuple((prompt + row)[-2:])
            noise.append(torch.empty(scores.shape[1]).exponential_(generator=seeded(seed, 3, seen[pair], *pair)))
            seen[pair] += 1
        return scores - torch.stack(noise).log().to(scores)


def up_to_last_sentence(story: str, prompt: str) -> str:
    """A story that ran out of tokens ends at its last full sentence, if there is one behind the prompt."""
    ends = [match.end() for match in re.finditer(r"[.!?]['\"]?(?=\s|$)", story) if match.end() > len(prompt)]
    return story[: ends[-1]] if ends else story.strip()


class LatentDiffusion:
    """A frozen Stable Diffusion 1.x/2.x: E ||eps_omega(x_t, t, s) - eps||^2 of a picture, and pictures from texts."""

    def __init__(self, name: str, device, dtype: torch.dtype, gradient_checkpointing: bool = False):
        from diffusers import DDPMScheduler, StableDiffusionPipeline

        with loading(name, "diffusion_model"):
            self.pipeline = StableDiffusionPipeline.from_pretrained(
                local_or_hub(name), dtype=dtype, safety_checker=None, requires_safety_checker=False
            ).to(device)
        self.pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
        self.vae, self.unet = self.pipeline.vae, self.pipeline.unet
        self.text_encoder, self.tokenizer = self.pipeline.text_encoder, self.pipeline.tokenizer
        freeze(self.vae, self.unet, self.text_encoder)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.device, self.dtype = device, dtype
        self.resolution = self.unet.config.sample_size * self.pipeline.vae_scale_factor
        self.noise_schedule = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        self.prediction_type = self.noise_schedule.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise StoryError(
                f"--diffusion_model {name} predicts {self.prediction_type!r}: epsilon and v_prediction work",
                2,
            )
        self.revision = revision_of(self.pipeline.unet.config)

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts of any length -> states (B, W * L, C) and mask (B, W * L) bool. A text longer than the text encoder's
        L tokens is read in W windows, which are joined; the windows that a shorter text lacks are masked."""
        tokenizer = self.tokenizer
        length = tokenizer.model_max_length  # L
        start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
        windows, counts = [], []
        for tokens in ids:
            pieces = [tokens[i : i + length - 2] for i in range(0, max(len(tokens), 1), length - 2)]
            counts.append(len(pieces))
            windows += [([start] + piece + [end] + [pad] * length)[:length] for piece in pieces]
        states = self.text_encoder(torch.tensor(windows, device=self.text_encoder.device))[0]  # (all windows, L, C)
        return joined([part.flatten(0, 1).to(self.device, self.dtype) for part in states.split(counts)])

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """(M, 3, R, R) in [-1, 1] -> moments (M, 2, C, R/f, R/f): mean and standard deviation of the autoencoder's
        posterior over scaled latents."""
        posterior = self.vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], 1) * self.vae.config.scaling_factor

    def features(self, panels: dict[str, list]) -> tuple[Tensor, Tensor, Tensor]:
        """What the frozen encoders make of M panels: moments, states (M, L, C) and their mask (M, L), from their pixels
        and texts or, where these were encoded before, from the FeatureCache."""
        if "pixels" in panels:
            return self.encode_pictures(torch.stack(panels["pixels"])), *self.encode_texts(panels["text"])
        moments = torch.stack(panels["moments"]).to(self.device, self.dtype)
        return moments, *joined([states.to(self.device, self.dtype) for states in panels["states"]])

    def add_noise(self, moments: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents x_t, timesteps t (B,) and noise eps; x_0 is drawn from the posterior of the moments. The
        timesteps are stratified: one from each of B equal parts of the schedule, so that a small batch sees all noise
        levels."""
        count, steps = len(moments), self.noise_schedule.config.num_train_timesteps
        spots = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        timesteps = (spots * steps).long().clamp(max=steps - 1).to(self.device)
        mean, deviation = moments.unbind(1)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        latents = mean + deviation * torch.randn(mean.shape, generator=generator).to(mean)
        return self.noise_schedule.add_noise(latents, noise, timesteps), timesteps, noise

    def nll(self, moments: Tensor, states: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """Denoising error of each picture, (B,): mean over latent elements of ||eps_omega(x_t, t, s) - eps||^2, given
        the states (B, L, C) of s and their mask. Differentiable in `states`."""
        noisy, timesteps, noise = self.add_noise(moments, generator)
        predicted = self.unet(noisy, timesteps, states, encoder_attention_mask=mask).sample
        if self.prediction_type == "v_prediction":  # v = alpha eps - sigma x_0, so eps = alpha v + sigma x_t
            alpha_bar = self.noise_schedule.alphas_cumprod.to(noisy)[timesteps][:, None, None, None]
            predicted = alpha_bar.sqrt() * predicted + (1 - alpha_bar).sqrt() * noisy
        return (predicted.float() - noise.float()).square().mean((1, 2, 3))

    def release_encoders(self) -> None:
        """Where all panels are encoded the autoencoder's encoder goes, and the text encoder leaves the device: it has
        the sample's texts to read and no more."""
        self.vae.encoder = self.vae.quant_conv = None
        self.pipeline.text_encoder = None  # the pipeline would take its device for the painter's
        self.text_encoder.to("cpu")

    def silence(self) -> Tensor:
        """The last state (C,) of the empty text: a token that asks for nothing."""
        return self.encode_texts([""])[0][0, -1]

    @torch.no_grad()
    def paint(self, states: Tensor, mask: Tensor, config: Config, seeds: list[int]) -> list[Image.Image]:
        """A picture of each condition, states (B, L, C) and mask (B, L), all in one batch; each is a function of its
        own condition and seed, unless --panel_consistency shares attention between them."""
        count, length = mask.shape
        negative, heard = self.encode_texts([config.negative_prompt])  # (1, N, C), (1, N)
        longest = max(length, negative.shape[1])
        states, mask = F.pad(states, (0, 0, 0, longest - length)), F.pad(mask, (0, longest - length))
        negative = F.pad(negative, (0, 0, 0, longest - negative.shape[1])).expand(count, -1, -1)
        heard = F.pad(heard, (0, longest - heard.shape[1])).expand(count, -1)
        size = config.image_size or None
        with self.listening_to(torch.cat([heard, mask]), mask), self.sharing(config.panel_consistency, count):
            return self.pipeline(
                prompt_embeds=states,
                negative_prompt_embeds=negative,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                height=size,
                width=size,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            ).images

    @contextmanager
    def listening_to(self, guided: Tensor, plain: Tensor):
        """The pipeline knows no mask of the text: the UNet is given it here, (2 B, L) with guidance, (B, L) without."""

        def add_mask(unet, args: tuple, kwargs: dict):
            batch = len(args[0] if args else kwargs["sample"])
            return args, kwargs | dict(encoder_attention_mask=guided if batch == len(guided) else plain)

        hook = self.unet.register_forward_pre_hook(add_mask, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def sharing(self, consistency: str, count: int):
        """With "attention", the self-attention of the `count` pictures of a batch sees all of them."""
        before = self.unet.attn_processors
        if consistency == "attention" and count > 1:
            self.unet.set_attn_processor(shared_attention(count))
        try:
            yield
        finally:
            self.unet.set_attn_processor(before)


FEATURE_BLOCK = 256  # stories in a file


class FeatureCache:
    """What the frozen encoders make of the panels of a split, kept in memory-mapped safetensors beside them:
    split/features/KEY/NNNNNN.safetensors, a file for each block of stories. KEY names the encoders by their weights, so
    another model has another folder; a file names the texts and picture bytes that it was made of, so a picture that
    has changed is encoded again. Its .stamp says when that was last looked at: while no file has another size or time,
    no picture is opened."""

    def __init__(self, rows: Rows, folder: Path, diffusion: LatentDiffusion):
        self.rows, self.folder, self.resolution = rows, folder, diffusion.resolution
        self.key = folder / "features" / fingerprint(diffusion)
        self.blocks = range(-(-len(rows) // FEATURE_BLOCK))

    def path(self, block: int) -> Path:
        return self.key / f"{block:06d}.safetensors"

    def build(self, diffusion: LatentDiffusion, batch: int, skip_bad: bool, rank: int = 0, ranks: int = 1) -> None:
        """Encodes what is missing or has changed, every `ranks`-th block on this process. A killed build has lost the
        blocks in hand."""
        mine = self.blocks[rank::ranks]
        try:
            self.key.mkdir(parents=True, exist_ok=True)
            for block in tqdm(mine, desc="feature cache", disable=bool(rank) or not sys.stderr.isatty(), leave=False):
                rows = self.rows[block * FEATURE_BLOCK : (block + 1) * FEATURE_BLOCK]
                stamp, stamped = stamp_of(rows, self.folder), self.path(block).with_suffix(".stamp")
                kept = content_kept(self.path(block))
                if kept and stamped.is_file() and stamped.read_text() == stamp:
                    continue
                content = content_of(rows, self.folder)
                if kept != content:
                    tensors, problems = self.encode(diffusion, rows, batch, skip_bad)
                    metadata = dict(content=content, problems=json.dumps(problems))
                    write_whole(self.path(block), safetensors.torch.save(tensors, metadata))
                write_whole(stamped, stamp.encode())
        except OSError as error:
            free = shutil.disk_usage(self.folder).free / 1e6
            advice = "--no_feature_cache encodes at each step instead"
            raise StoryError(f"{self.key} cannot be written: {error}; {free:.1f} MB free; {advice}") from error

    def encode(self, diffusion: LatentDiffusion, rows: list[Row], batch: int, skip_bad: bool) -> tuple[dict, dict]:
        """The tensors of a block of N panels: moments (N, 2, C, h, w), all states one after the other, where each ends
        (N,), and the first panel of each story; and what was wrong with which panel."""
        panels = [(row.where, panel) for row in rows for panel in row.panels]
        moments, states, problems = [], [], {}
        for start in range(0, len(panels), batch):
            part, pixels = panels[start : start + batch], []
            for place, (where, panel) in enumerate(part, start):
                try:
                    pixels.append(load_picture(self.folder, panel.image_path, self.resolution, where))
                except StoryError as error:
                    if not skip_bad:
                        raise
                    problems[str(place)] = str(error)
                    pixels.append(torch.zeros(3, self.resolution, self.resolution))
            moments.append(diffusion.encode_pictures(torch.stack(pixels)).cpu())
            own, heard = diffusion.encode_texts([panel.text for _, panel in part])
            states += [one[mask].cpu() for one, mask in zip(own, heard)]
        ends, firsts = ([0, *np.cumsum(list(map(len, many)))] for many in (states, [row.panels for row in rows]))
        places = dict(ends=torch.tensor(ends[1:]), firsts=torch.tensor(firsts[:-1]))
        return dict(moments=torch.cat(moments), states=torch.cat(states), **places), problems

    def read(self, index: int, panel: int) -> dict:
        """The moments (2, C, h, w) and states (L, C) of one panel of a story."""
        file = open_features(self.path(index // FEATURE_BLOCK))
        place = int(file.get_slice("firsts")[index % FEATURE_BLOCK]) + panel
        problem = json.loads(file.metadata()["problems"]).get(str(place))
        if problem:
            raise StoryError(problem)
        ends = file.get_slice("ends")
        start = int(ends[place - 1]) if place else 0
        moments, states = file.get_slice("moments")[place], file.get_slice("states")[start : int(ends[place])]
        return dict(moments=moments, states=states)


def open_features(path: Path):
    """A file of features, memory-mapped; the last few stay open in each process."""
    return memory_mapped(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def memory_mapped(path: Path, _written: int):
    return safetensors.safe_open(path, framework="pt")


def content_kept(path: Path) -> str:
    """What a file of features was made of; empty where there is none, or one that was cut off."""
    try:
        return open_features(path).metadata()["content"]
    except (OSError, safetensors.SafetensorError):
        return ""


def fingerprint(diffusion: LatentDiffusion) -> str:
    """Names the frozen encoders by all that features depend on: weights, resolution, scale, text length."""
    settings = (diffusion.resolution, diffusion.vae.config.scaling_factor, diffusion.tokenizer.model_max_length)
    digest = hashlib.sha256(repr((settings, diffusion.dtype)).encode())
    for part in (diffusion.vae.encoder, diffusion.vae.quant_conv, diffusion.text_encoder):
        for tensor in part.state_dict().values():
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def stamp_of(rows: list[Row], folder: Path) -> str:
    """Changes with each text, and with the name, size or time of each picture; of a missing one it says that."""
    digest = hashlib.sha256()
    for panel in (panel for row in rows for panel in row.panels):
        path = folder / panel.image_path
        state = path.stat() if path.is_file() else None
        digest.update(repr((panel, state and (state.st_size, state.st_mtime_ns))).encode())
    return digest.hexdigest()


def content_of(rows: list[Row], folder: Path) -> str:
    """Changes with each text and with the bytes of each picture."""
    digest = hashlib.sha256()
    for panel in (panel for row in rows for panel in row.panels):
        path = folder / panel.image_path
        picture = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        digest.update(repr((panel.text, picture)).encode())
    return digest.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all; where that fails nothing is left of it."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def joined(states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """States of texts (L_i, C), i < B -> (B, L, C), padded with zeros, and a mask (B, L) bool of what is no padding."""
    lengths = torch.tensor([len(one) for one in states], device=states[0].device)
    padded = nn.utils.rnn.pad_sequence(states, batch_first=True)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


def shared_attention(count: int):
    """Consistent self-attention (Zhou et al. 2024, StoryDiffusion), without sampling: keys and values of a picture are
    those of all `count` pictures that are painted together; cross-attention stays as it is."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    class SharedAttention(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *args, **kwargs):
            if encoder_hidden_states is None:
                together = hidden_states.unflatten(0, (-1, count)).flatten(1, 2)  # (halves, count N, C)
                encoder_hidden_states = together.repeat_interleave(count, 0)  # (B, count N, C)
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)

    return SharedAttention()


# ------------------------------------------------------------------------------------------------------------------
# 7. Objective
# The four parts meet here, and only here. In: a batch. Out: the terms of the negative ELBO, each in its own unit.
# Trained: encoder, prior, soft prompt. Frozen: the language model, through which the gradient of the text NLL flows
# back into the storyboard, and the diffusion.
# ------------------------------------------------------------------------------------------------------------------


class SoftPrompt(nn.Module):
    """Code vectors (B, S, D) -> soft prompt (B, P, E): one map for all slots that knows the slot, on top of a constant.

    The map starts as the way back from the encoder's start, at the scale of the language model's own embedding rows,
    since a prompt of another scale is not listened to (Lester et al. 2021). `nothing` is the constant alone, a learned
    soft prompt: the fair baseline, trained at each step on an eighth of the batch. What all stories have in common is
    its to learn, and the codes' to add to.
    """

    def __init__(self, config: Config, rows: Tensor):
        super().__init__()
        width, self.per_slot = rows.shape[1], config.soft_tokens_per_slot
        self.unit = float(rows.float().std())
        self.straight = nn.Linear(config.code_dim, self.per_slot * width, bias=False)
        self.slot = nn.Parameter(torch.randn(NUM_SLOTS, 16))
        self.hidden = nn.Linear(config.code_dim + 16, 4 * config.code_dim)
        self.bent = nn.Linear(4 * config.code_dim, self.per_slot * width)
        with torch.no_grad():
            directions, spreads = principal_directions(rows)
            ways_back = (directions * spreads[:, None] / self.unit)[: config.code_dim]  # (D, E)
            self.straight.weight.zero_()[:, : len(ways_back)] = ways_back.T.repeat(self.per_slot, 1)
            nn.init.normal_(self.bent.weight, std=0.001)
            nn.init.zeros_(self.bent.bias)
        # in fine units: AdamW moves each number by the learning rate, and a sum over D codes' numbers D times as far
        self.fine = self.unit * config.code_dim
        self.constant = nn.Parameter(torch.zeros(NUM_SLOTS * self.per_slot, width))  # (P, E)

    def forward(self, vectors: Tensor) -> Tensor:
        slots = self.slot.expand(len(vectors), -1, -1)
        hidden = F.gelu(self.hidden(torch.cat([vectors, slots], -1)))  # (B, S, 4 D)
        embeds = self.straight(vectors) + self.bent(hidden)  # (B, S, P / S * E)
        embeds = self.unit * embeds.unflatten(-1, (self.per_slot, -1)).flatten(1, 2)  # (B, P, E)
        return embeds + self.nothing(len(vectors)).detach()

    def nothing(self, count: int) -> Tensor:
        """The constant soft prompt for `count` stories, (count, P, E), which says nothing about them."""
        return (self.fine * self.constant).expand(count, -1, -1)


class ImageCondition(nn.Module):
    """Code vectors (B, S, D) -> tokens (B, S, C) that stand behind the text's in the painter's cross-attention. They
    start as the empty text's last state, which asks for nothing."""

    def __init__(self, config: Config, silence: Tensor):
        super().__init__()
        self.slot = nn.Parameter(torch.randn(NUM_SLOTS, 16))
        self.silence = nn.Parameter(silence.float().clone())
        self.hidden = nn.Linear(config.code_dim + 16, 4 * config.code_dim)
        self.out = nn.Linear(4 * config.code_dim, len(silence))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        slots = self.slot.expand(len(vectors), -1, -1)
        hidden = F.gelu(self.hidden(torch.cat([vectors, slots], -1)))  # (B, S, 4 D)
        return self.silence + self.out(hidden)  # (B, S, C)


class Losses(NamedTuple):
    """Means over the batch. The ELBO's own unit is nats per story; the sum is taken per token, where text NLL has the
    size that learning rates and clipping are used to."""

    text_nll: Tensor  # nats per story
    latent_nll: Tensor  # nats per story
    commitment: Tensor  # squared distance per element
    diffusion_nll: Tensor  # squared error per latent element; NaN where no picture was scored
    constant_nll: Tensor  # nats per story, with the constant soft prompt: not part of the model
    vote_share: Tensor  # share of a chunk's tokens that chose the winning code
    total: Tensor  # what is minimised


def codebook_sample(num_codes: int) -> int:
    """How many stories give each of the codes thirty-two chunks to start from."""
    return -(-32 * num_codes // NUM_SLOTS)


class StoryModel(nn.Module):
    """All that is trained, and the frozen backbones as plain attributes."""

    def __init__(self, config: Config, lm: LanguageModel, diffusion: LatentDiffusion | None):
        super().__init__()
        self.config = config
        self.backbones = (lm, diffusion)  # a tuple: not registered, not saved, not moved, not switched to train mode
        self.max_tokens = lm.context - NUM_SLOTS * config.soft_tokens_per_slot - 1
        rows = lm.embed.weight.detach()
        self.encoder = StoryboardEncoder(config, rows, self.max_tokens)
        self.prior = Prior(config)
        self.soft_prompt = SoftPrompt(config, rows)
        self.image_condition = None  # the text alone
        if config.image_condition == "storyboard" and diffusion is not None:
            self.image_condition = ImageCondition(config, diffusion.silence())

    @property
    def lm(self) -> LanguageModel:
        return self.backbones[0]

    @property
    def diffusion(self) -> LatentDiffusion | None:
        return self.backbones[1]

    def encode(self, tokens: Tensor, mask: Tensor, learn: bool = False) -> Storyboard:
        embeds = self.lm.embed(tokens).to(self.encoder.quantizer.codebook)
        return self.encoder(tokens, embeds, mask, self.rate, learn)

    @torch.no_grad()
    def rate(self, codes: Tensor) -> Tensor:
        """beta_kl * -log p_theta(k | z_<j) of each code k in each place of storyboards (B, S): (B, S, K), nats."""
        return -self.config.beta_kl * self.prior(codes).log_softmax(-1)

    def soft(self, codes: Tensor) -> Tensor:
        """Storyboards as numbers (B, S) -> soft prompts (B, P, E)."""
        return self.soft_prompt(self.encoder.quantizer.look_up(codes))

    @torch.no_grad()
    def words_of(self, codes: list[int]) -> list[str]:
        """The word of the language model that each code's soft token lies nearest to, by cosine: codes start as words
        and stay readable as far as training leaves them there."""
        vectors = self.encoder.quantizer.look_up(torch.tensor(codes, device=self.lm.device))  # (N, D)
        tokens = F.normalize(self.soft_prompt.straight(vectors).float(), dim=-1)  # (N, P / S * E)
        rows = F.normalize(self.lm.embed.weight.float(), dim=-1).repeat(1, self.soft_prompt.per_slot)  # (V, P / S * E)
        words = (self.lm.tokenizer.decode([token]).strip() for token in (tokens @ rows.T).argmax(1).tolist())
        return ["".join(letter for letter in word if letter.isprintable()) for word in words]

    def condition(self, states: Tensor, mask: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """What the painter is told: the states of M texts (M, L, C) and their mask (M, L), and with `--image_condition
        storyboard` what the vectors (M, S, D) say behind them."""
        if self.image_condition is None:
            return states, mask
        tokens = self.image_condition(vectors).to(states)  # (M, S, C)
        return torch.cat([states, tokens], 1), F.pad(mask, (0, NUM_SLOTS), value=True)

    def tokenize(self, stories: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Stories -> tokens (B, T), mask (B, T), cut (B,) on the model's device; every story needs a token."""
        ids = [self.lm.tokenizer(story, add_special_tokens=False)["input_ids"] for story in stories]
        if not all(ids):
            raise StoryError("a story without a single token has no storyboard", 2)
        items = [dict(index=0, tokens=row[: self.max_tokens], cut=len(row) > self.max_tokens) for row in ids]
        batch = collate(items, self.max_tokens)
        return tuple(batch[key].to(self.lm.device) for key in ("tokens", "mask", "cut"))

    def forward(self, batch: dict, noise: torch.Generator) -> Losses:
        config, lm = self.config, self.lm
        tokens, mask, cut = (batch[key].to(lm.device) for key in ("tokens", "mask", "cut"))
        storyboard = self.encode(tokens, mask, learn=self.training)
        # one pass of the language model: the batch with its storyboards, every eighth story with the constant prompt
        eighth = torch.arange(0, len(tokens), 8)
        constant = self.soft_prompt.nothing(len(eighth))
        rows = torch.cat([torch.arange(len(tokens)), eighth])
        soft = torch.cat([self.soft_prompt(storyboard.vectors), constant])
        nll = lm.nll(soft, tokens[rows], mask[rows], cut[rows])
        text_nll, constant_nll = nll[: len(tokens)].mean(), nll[len(tokens) :].mean()
        latent_nll = self.prior.nll(storyboard.codes).mean()
        diffusion_nll = self.diffusion_nll(batch, storyboard.vectors, noise)
        started = bool(self.encoder.quantizer.updates)  # before that there are no codes for the prior to learn
        bound = text_nll + constant_nll + (config.beta_kl if started else 0.0) * latent_nll
        length = mask.sum(1).to(bound).mean()  # tokens of a story
        # per token of all processes' stories: several processes train as one would with the joined batch
        total = (bound + config.commitment_weight * storyboard.commitment * length) / all_mean(length)
        if batch["painted"]:
            total = total + config.diffusion_weight * diffusion_nll
        share = storyboard.share.mean()
        return Losses(text_nll, latent_nll, storyboard.commitment, diffusion_nll, constant_nll, share, total)

    def start_encoder(self, stories: list[str]) -> None:
        """Fits the encoder's start to stories of the training set: document frequencies, and the vectors' scale."""
        self.encoder.start_loudness(self.lm.tokenizer(stories[:4096], add_special_tokens=False)["input_ids"])
        self.encoder.standardize(self.chunk_vectors(stories[:512]))

    def start_codebook(self, stories: list[str]) -> None:
        """k-means on the chunk vectors of stories of the training set, of which `codebook_sample` are enough."""
        self.encoder.quantizer.start(self.chunk_vectors(stories))

    @torch.no_grad()
    def chunk_vectors(self, stories: list[str]) -> Tensor:
        """Stories -> the vectors of their chunks (8 N, D), before the quantiser has started."""
        batches = batches_of(stories, self.config.eval_batch_size)
        return torch.cat([self.encode(*self.tokenize(batch)[:2]).vectors for batch in batches]).flatten(0, 1)

    def listen(self, stories: list[str]) -> None:
        """Finds how far the language model hears each slot: the mean squared gradient of the text NLL in the slot's
        vector, which is the diagonal of its Fisher information, and with it what a small squared distance there costs
        in nats, up to a factor. The slot heard most has 1, and none less than a hundredth."""
        power = torch.zeros(NUM_SLOTS, device=self.lm.device)
        for batch in batches_of(stories, self.config.eval_batch_size):
            vectors = self.encoder.quantizer.look_up(self.codes_of(batch)).requires_grad_()  # (B, S, D)
            nll = self.lm.nll(self.soft_prompt(vectors), *self.tokenize(batch)).sum()
            power += torch.autograd.grad(nll, vectors)[0].square().sum((0, 2))
        if power.max() > 0:
            self.encoder.heard.copy_((power / power.max()).clamp(min=0.01))

    @torch.no_grad()
    def codes_of(self, stories: list[str]) -> Tensor:
        """Stories -> their storyboards (N, S)."""
        batches = batches_of(stories, self.config.eval_batch_size)
        return torch.cat([self.encode(*self.tokenize(batch)[:2]).codes for batch in batches])

    def diffusion_nll(self, batch: dict, vectors: Tensor, noise: torch.Generator) -> Tensor:
        """The denoising error of the batch's M pictures; NaN without any. Where the painter is conditioned on the text
        alone, which nothing here trains, the term is a monitor."""
        diffusion = self.diffusion
        if diffusion is None or not batch["painted"]:
            return torch.full((), math.nan, device=self.lm.device)
        moments, *heard = diffusion.features(batch["panels"])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.image_condition is not None):
            condition = self.condition(*heard, vectors[batch["painted"]])
            return diffusion.nll(moments, *condition, noise).mean()


# ------------------------------------------------------------------------------------------------------------------
# 8. Checkpoints
# One file, ckpt_STEP.pt, holds the trained tensors, what goes on from them (optimizer, schedule, scaler) and the
# configuration that rebuilds the model; never the frozen backbones. It is complete or it is not there.
# ------------------------------------------------------------------------------------------------------------------

CHECKPOINT_KEYS = ("config", "step", "model", "backbones")
RESUME_KEYS = ("optimizer", "lr_scheduler", "scaler", "position", "data")
FREE_TO_CHANGE = {  # where a run goes on; all other settings of train make it another run
    "preset", "data_root", "output_dir", "max_train_samples", "max_val_samples", "dataloader_num_workers",
    "no_feature_cache", "gradient_checkpointing", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "validation_steps", "logging_steps", "validation_prompt", "override", "skip_bad_rows",
    "temperature", "top_p", "max_new_tokens", "num_inference_steps", "guidance_scale", "eval_batch_size", "debug",
}  # fmt: skip


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Writes beside the target, forces the bytes to the disk, reads them back, and only then takes the name. Where
    that fails, nothing is left of it and an older file of the name stays."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        check_archive(part)
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the name, too, is on the disk
        os.close(folder)
    except (OSError, RuntimeError) as error:
        needed = sum(tensor.nbytes for tensor in tensors_in(checkpoint)) / 1e6
        free = shutil.disk_usage(path.parent).free / 1e6 if path.parent.is_dir() else 0.0
        reason = f"{needed:.1f} MB needed, {free:.1f} MB free; {str(error).splitlines()[0]}"
        raise StoryError(f"{path} cannot be written: {reason}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def tensors_in(value) -> Iterator[Tensor]:
    """All tensors in dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def check_archive(path: Path) -> None:
    """torch.load takes a flipped bit without a word; the checksums inside the file do not."""
    try:
        with zipfile.ZipFile(path) as archive:
            attributes = [entry.filename for entry in archive.infolist() if entry.external_attr]
            damaged = archive.testzip() or next(iter(attributes), None)  # torch skips what is marked a folder
    except Exception as error:  # a damaged header makes zipfile raise almost anything
        raise StoryError(f"{path} is not a checkpoint or is damaged ({error})", 2) from error
    if damaged:
        raise StoryError(f"{path} is damaged: {damaged} does not match its checksum; use an older checkpoint", 2)


def load_checkpoint(path: str | Path, needed: tuple = CHECKPOINT_KEYS) -> dict:
    """Reads a checkpoint that save_checkpoint wrote; nothing in it is ever executed."""
    path = find_checkpoint(str(path))
    if path.suffix == ".safetensors":
        checkpoint = load_export(path)
    else:
        check_archive(path)
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise StoryError(f"{path} is not one of this program's checkpoints ({type(error).__name__})", 2) from None
    missing = [key for key in needed if not isinstance(checkpoint, dict) or key not in checkpoint]
    if not missing and not isinstance(checkpoint["config"], dict):
        raise StoryError(f"{path} is not one of this program's checkpoints: its config is no dictionary", 2)
    if not missing and needed != CHECKPOINT_KEYS:
        missing = [f"config.{name}" for name in fixed_settings() if name not in checkpoint["config"]]
    if missing:
        raise StoryError(f"{path} lacks {', '.join(missing)}: it cannot be used for this", 2)
    fields = {f.name for f in dataclasses.fields(Config)}
    try:
        checkpoint["config"] = Config(**{name: value for name, value in checkpoint["config"].items() if name in fields})
    except StoryError as error:
        raise StoryError(f"{path} has a configuration that cannot be: {error}", 2) from None
    checkpoint["path"] = str(path)
    return checkpoint


def fixed_settings() -> list[str]:
    """The settings that a run keeps from its first step to its last."""
    fields = (f for f in dataclasses.fields(Config) if "train" in f.metadata["commands"])
    return [f.name for f in fields if f.name not in FREE_TO_CHANGE]


def newest_readable(found: list[Path]) -> dict:
    """The newest of the checkpoints, oldest first, from which a run can go on; the damaged ones are told."""
    for path in reversed(found):
        try:
            return load_checkpoint(path, CHECKPOINT_KEYS + RESUME_KEYS)
        except StoryError as error:
            say(f"--resume_from_checkpoint latest: {error}; trying the one before it")
    raise StoryError(f"--resume_from_checkpoint latest: none of the checkpoints in {found[0].parent} can be read", 2)


def find_checkpoint(name: str) -> Path:
    """The file of a checkpoint, of a folder that `export` wrote, or of one that it pushed to the hub as owner/name."""
    path = Path(name)
    if path.is_dir() and (path / EXPORTED[0]).is_file():
        return path / EXPORTED[0]
    if path.is_file():
        return path
    if path.suffix or path.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise StoryError(f"{name} does not exist: train writes ckpt_STEP.pt into its --output_dir", 2)
    from huggingface_hub import snapshot_download

    with loading(name, "ckpt"):
        return Path(snapshot_download(name, allow_patterns=EXPORTED)) / EXPORTED[0]


EXPORTED = ["model.safetensors", "config.json", "README.md"]
MODEL_CARD = """---
library_name: storydiffusion
tags: [story-generation, vector-quantization]
base_model: {bases}
---
# A storyboard of StoryDiffusion

The trained part of a StoryDiffusion model after {step} steps: storyboard encoder, codebook of {codes} codes, prior and
soft prompt. The language model ({lm}) and the latent diffusion ({diffusion}) that it was trained with are frozen and
not in here.

    python story_generative_model.py generate --ckpt {name} --prompt "The red fox and the golden key"
"""


def export(config: Config, checkpoint: dict) -> Path:
    """The trained part as safetensors with its configuration and a model card, in --output; with --push_to_hub also on
    the hub. `--ckpt` takes the folder, or the hub's owner/name."""
    from safetensors.torch import save_file

    folder = Path(config.output or "exported")
    prepare_folder(folder, "output")
    trained = checkpoint["config"]
    save_file({name: tensor.contiguous() for name, tensor in checkpoint["model"].items()}, folder / EXPORTED[0])
    settings = dict(config=dataclasses.asdict(trained), step=checkpoint["step"], backbones=checkpoint["backbones"])
    (folder / EXPORTED[1]).write_text(json.dumps(settings, indent=2) + "\n")
    models = dict(lm=trained.lm_model, diffusion=trained.diffusion_model)
    name = config.push_to_hub or str(folder)
    bases = json.dumps([model for model in models.values() if not Path(local_or_hub(model)).is_dir()])
    card = MODEL_CARD.format(**models, bases=bases, step=checkpoint["step"], codes=trained.num_codes, name=name)
    (folder / EXPORTED[2]).write_text(card, "utf-8")
    print(folder)
    if config.push_to_hub:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            HfApi().create_repo(config.push_to_hub, exist_ok=True)
            HfApi().upload_folder(repo_id=config.push_to_hub, folder_path=folder, allow_patterns=EXPORTED)
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            reason = str(error).splitlines()[0]
            raise StoryError(
                f"--push_to_hub {config.push_to_hub}: {reason}; log in with `hf auth login` or set HF_TOKEN"
            ) from error
        say(f"pushed to {config.push_to_hub}")
    return folder


def load_export(path: Path) -> dict:
    """What `export` wrote, as a checkpoint from which training cannot go on."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        settings = json.loads(path.with_name(EXPORTED[1]).read_text("utf-8"))
        return dict(settings, model=load_file(path))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise StoryError(f"{path.parent} is not a folder that export wrote ({error})", 2) from None


def list_checkpoints(folder: Path) -> list[Path]:
    """ckpt_STEP.pt of a folder, oldest first."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("ckpt_*.pt")
        if (match := re.fullmatch(r"ckpt_(\d+)\.pt", path.name))
    ]
    return [path for _, path in sorted(found)]


def rotate_checkpoints(folder: Path, limit: int, resumed_from: str = "") -> None:
    """Deletes the oldest beyond the limit, once the newest is safely written; two at least are kept, and the one that
    the run went on from."""
    if limit:
        for path in list_checkpoints(folder)[: -max(limit, 2)]:
            if str(path) != resumed_from:
                path.unlink()


def load_model(checkpoint: dict, config: Config, device, dtype: torch.dtype, paints: bool = True) -> StoryModel:
    """The model of a checkpoint with its backbones, in eval mode."""
    lm = LanguageModel(config.lm_model, device, dtype)
    diffusion = LatentDiffusion(config.diffusion_model, device, dtype) if paints else None
    model = StoryModel(config, lm, diffusion).to(device)
    tensors = {key: tensor for key, tensor in checkpoint["model"].items() if paints or "image_condition" not in key}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise StoryError(f"{checkpoint['path']} does not fit its configuration: {reason}", 2) from error
    if not model.encoder.quantizer.updates:
        say(
            f"{checkpoint['path']} is from before step {config.quantizer_warmup_steps}: its storyboards say nothing yet"
        )
    return model.eval()


def pick_device() -> tuple[torch.device, torch.dtype]:
    """The fastest device at hand, and the dtype of the frozen models there."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if torch.backends.mps.is_available():
        return torch.device("mps"), torch.float16
    return torch.device("cpu"), torch.float32


# ------------------------------------------------------------------------------------------------------------------
# 9. Generation
# In: a prompt. Out: a story that goes on from it, its storyboard and its picture. The prior knows nothing of the
# prompt, so storyboards drawn from it are weighed by p_psi(prompt | z) and one is drawn by weight: sampling-importance
# resampling (Rubin 1988), the posterior p(z | prompt) of the model that was trained.
# ------------------------------------------------------------------------------------------------------------------


class IllustratedPanel(NamedTuple):
    text: str
    seed: int
    image: Image.Image


class IllustratedStory(NamedTuple):
    prompt: str
    story: str
    storyboard: list[int]
    panels: list[IllustratedPanel]


def parse_storyboard(text: str, num_codes: int) -> list[int | None]:
    """'3 17 _ _ 5 _ _ _' -> one code or None for each slot; the empty text pins nothing."""
    words = text.replace(",", " ").split() or ["_"] * NUM_SLOTS
    if len(words) != NUM_SLOTS:
        raise StoryError(
            f"--storyboard needs {NUM_SLOTS} places, a code or _ each, got {len(words)} in {text[:60]!r}", 2
        )
    for word in words:
        if word != "_" and not (re.fullmatch(r"[0-9]{1,9}", word) and int(word) < num_codes):
            raise StoryError(f"--storyboard: {word[:20]!r} is neither _ nor a code from 0 to {num_codes - 1}", 2)
    return [None if word == "_" else int(word) for word in words]


@torch.no_grad()
def draw_storyboard(model: StoryModel, prompt: str, pinned: list[int | None], config: Config, seed: int) -> Tensor:
    """One storyboard (S,) from p(z | prompt), with the pinned slots as they are."""
    if pinned and None not in pinned:
        return torch.tensor(pinned, device=model.lm.device)
    generator = seeded(seed, 0)
    codes = model.prior.sample(config.num_storyboards, generator, pinned, config.temperature, config.top_p)  # (N, S)
    if len(codes) == 1:
        return codes[0]
    tokens, mask, _ = model.tokenize([prompt])
    endless = torch.ones(len(codes), dtype=torch.bool, device=tokens.device)  # a prompt is no finished story
    nll = model.lm.nll(model.soft(codes), tokens.expand(len(codes), -1), mask.expand(len(codes), -1), endless)  # (N,)
    pick = torch.multinomial((-nll).softmax(0).cpu(), 1, generator=generator)
    return codes[int(pick)]


def sentences_of(story: str) -> list[str]:
    """Cut behind a full stop and its closing quotes, where what follows does not go on in lower case."""
    ends = [match.end() for match in re.finditer(r"[.!?\u2026\u3002\uff01\uff1f]+[\"'\u201d\u2019\u00bb)]*\s+", story)]
    ends = [end for end in ends if end < len(story) and not story[end].islower()]
    return [story[start:end].strip() for start, end in pairwise([0, *ends, len(story)])]


def cut_into_panels(model: StoryModel, story: str, panels: int) -> list[str]:
    """The story in `panels` pieces of whole sentences, cut nearest to where equal chunks of its tokens end; in fewer if
    it has fewer sentences."""
    sentences = sentences_of(story)
    lengths = [len(model.lm.tokenizer(sentence, add_special_tokens=False)["input_ids"]) for sentence in sentences]
    panels, ends = min(panels, len(sentences)), np.cumsum(lengths)  # tokens up to the end of each sentence
    cuts = [0]
    for number in range(1, panels):
        possible = range(cuts[-1] + 1, len(sentences) - (panels - number) + 1)  # one sentence at least for each
        cuts.append(min(possible, key=lambda cut: abs(ends[cut - 1] - number * ends[-1] / panels)))
    return [" ".join(sentences[start:end]) for start, end in pairwise([*cuts, len(sentences)])]


@torch.no_grad()
def illustrate(model: StoryModel, config: Config, prompts: list[str], seeds: list[int]) -> list[IllustratedStory]:
    """Stories and their pictures, written and painted in one batch each; a story is a function of the model, the
    configuration, its prompt and its seed."""
    pinned = parse_storyboard(config.storyboard, model.prior.num_codes)
    codes = [draw_storyboard(model, prompt, pinned, config, seed) for prompt, seed in zip(prompts, seeds)]
    codes = torch.stack(codes)  # (B, S)
    stories = model.lm.write(model.soft(codes), prompts, config, seeds)
    texts = [cut_into_panels(model, story, config.panels) for story in stories]
    counts = [len(parts) for parts in texts]
    told = [story_so_far(parts) for parts in texts]
    shift = 0 if config.panel_consistency == "noise" else 1
    noise = [seed + shift * number for seed, count in zip(seeds, counts) for number in range(count)]
    vectors = model.encoder.quantizer.look_up(codes).repeat_interleave(torch.tensor(counts, device=codes.device), 0)
    texts_so_far = [text for parts in told for text in parts]
    condition = model.condition(*model.diffusion.encode_texts(texts_so_far), vectors)
    pictures = iter(model.diffusion.paint(*condition, config, noise))
    noise = iter(noise)
    return [
        IllustratedStory(prompt, story, board, [IllustratedPanel(text, next(noise), next(pictures)) for text in parts])
        for prompt, story, board, parts in zip(prompts, stories, codes.tolist(), texts)
    ]


def story_so_far(parts: list[str]) -> list[str]:
    """What the painter reads for each panel: all up to its part. It opens with the prompt and says who it is about,
    where and when; what it ends with is what there is to see."""
    return [" ".join(parts[: number + 1]) for number in range(len(parts))]


# What generate reads and writes


def read_prompts(config: Config) -> list[str]:
    """The prompts of --prompt or --prompts_file, white space made plain."""
    if config.prompts_file:
        path = Path(config.prompts_file)
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StoryError(f"--prompts_file {path} cannot be read: {error}", 2) from error
        return [" ".join(line.split()) for line in lines if line.strip()]
    if not config.prompt.strip():
        raise StoryError(
            '--prompt is empty: give the opening line, such as --prompt "The red fox and the golden key"', 2
        )
    return [" ".join(config.prompt.split())]


def check_prompt(model: StoryModel, prompt: str) -> None:
    """Raises StoryError for a prompt that no story can begin with."""
    strange = next((letter for letter in prompt if unicodedata.category(letter) in ("Cc", "Cs")), None)
    if strange:
        raise StoryError(f"the prompt holds a control character, {strange!r}: {prompt[:40]!r}", 2)
    length = len(model.lm.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if length >= model.max_tokens:
        raise StoryError(f"the prompt has {length} tokens, more than the model's context of {model.lm.context}", 2)


MADE_WITH = ("panels", "panel_consistency", "num_storyboards", "temperature", "top_p",
             "repetition_penalty", "max_new_tokens", "num_inference_steps", "guidance_scale", "negative_prompt",
             "image_size")  # fmt: skip


def record_of(result: IllustratedStory, seed: int, config: Config, model: StoryModel, stamp: dict) -> dict:
    """All that made a story: with the checkpoint that `stamp` names, enough to make it again."""
    return dict(
        prompt=result.prompt,
        story=result.story,
        storyboard=result.storyboard,
        words=model.words_of(result.storyboard),
        panels=[dict(text=panel.text, seed=panel.seed) for panel in result.panels],
        seed=seed,
        settings={name: getattr(config, name) for name in MADE_WITH},
        checkpoint=stamp,
        models=dict(
            language=dict(name=config.lm_model, revision=model.lm.revision),
            diffusion=dict(name=config.diffusion_model, revision=model.diffusion.revision),
            scheduler=dict(name=type(model.diffusion.pipeline.scheduler).__name__, revision=""),
        ),
        versions=versions(),
    )


def read_record(path: str) -> dict:
    """The record in a .png or .html that `generate` wrote."""
    try:
        if path.lower().endswith(".html"):
            found = re.search(
                r'<script type="application/json" id="story">(.*?)</script>', Path(path).read_text("utf-8")
            )
            text = found and found[1]
        else:
            with Image.open(path, formats=("PNG",)) as image:
                image.load()
                text = image.text.get("story")
        record = json.loads(text)
        board = " ".join(str(int(code)) for code in record["storyboard"])
        parse_storyboard(board, 10**9)
        settings = {name: record["settings"][name] for name in MADE_WITH}
        return dict(record, settings=settings, prompt=str(record["prompt"]), seed=int(record["seed"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StoryError, SyntaxError) as error:
        raise StoryError(
            f"--from {path}: not a .png or .html that generate wrote ({type(error).__name__}: {error})", 2
        ) from None


def again(config: Config, given: set[str]) -> tuple[Config, dict]:
    """The configuration that makes --from's story again, but for what was given by hand; and its record."""
    record = read_record(config.source)
    theirs = dict(record["settings"], prompt=record["prompt"], seed=record["seed"])
    edits = parse_storyboard(config.storyboard, 10**9)
    board = [code if edit is None else edit for code, edit in zip(record["storyboard"], edits)]
    changes = {name: value for name, value in theirs.items() if name not in given}
    return dataclasses.replace(config, **changes, storyboard=" ".join(map(str, board))), record


def sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> str:
    import diffusers
    import transformers

    return f"torch {torch.__version__}, transformers {transformers.__version__}, diffusers {diffusers.__version__}"


def generate(config: Config, checkpoint: dict, given: set[str] = frozenset()) -> list[IllustratedStory]:
    """Writes stories to standard output and their pictures or books to --output (generated.png)."""
    path, original = Path(config.output or "generated.png"), None
    stamp = dict(name=Path(checkpoint["path"]).name, step=checkpoint["step"], sha256=sha256(checkpoint["path"]))
    if path.suffix.lower() not in WRITERS or not path.parent.is_dir():
        raise StoryError(f"--output {path} must be a {', '.join(WRITERS)} file in a folder that exists", 2)
    if config.source:
        config, original = again(config, given)
        if original["checkpoint"]["sha256"] != stamp["sha256"]:
            say(f"--from {config.source} was made with another checkpoint, {original['checkpoint']['name']}")
    parse_storyboard(config.storyboard, config.num_codes)  # a slip is told before any model is loaded
    prompts = read_prompts(config)
    model = load_model(checkpoint, config, *pick_device())
    jobs, refused = [], 0
    for number, prompt in enumerate(prompts, 1):
        try:
            check_prompt(model, prompt)
        except StoryError as error:
            if not config.prompts_file:
                raise
            say(f"{config.prompts_file}, prompt {number}: {error}")
            refused += 1
            continue
        jobs += [(prompt, config.seed + story) for story in range(config.num_stories)]
    results = []
    for part in tqdm(batches_of(jobs, config.eval_batch_size), disable=not sys.stderr.isatty(), leave=False):
        for (_, seed), result in zip(part, illustrate(model, config, *map(list, zip(*part)))):
            number = len(results)
            target = path if len(jobs) == 1 else path.with_name(f"{path.stem}_{number:03d}{path.suffix}")
            record = record_of(result, seed, config, model, stamp)
            write_safely(target, partial(WRITERS[path.suffix.lower()], result, record, original))
            board = (f"{code} ({word})" for code, word in zip(result.storyboard, record["words"]))
            say(f"storyboard: {' '.join(board)}\npicture: {target}")
            print(json.dumps(record, ensure_ascii=False) if config.json else result.story)
            results.append(result)
    if refused:
        raise StoryError(f"{refused} of {len(prompts)} prompts were refused, the rest was made")
    return results


# ------------------------------------------------------------------------------------------------------------------
# 10. Pages
# In: an illustrated story and the record of what made it. Out: one file, by its ending: a picture or a strip of panels
# (.png), a web page (.html), a book (.pdf). Each carries the record, and the same record gives the same bytes.
# ------------------------------------------------------------------------------------------------------------------


def write_safely(path: Path, write) -> None:
    """`write` makes bytes; they are at `path` as a whole or not at all."""
    try:
        write_whole(path, write())
    except OSError as error:
        raise StoryError(f"--output {path} cannot be written: {error}") from error


def png_bytes(image: Image.Image, notes: PngImagePlugin.PngInfo | None = None) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=notes)
    return file.getvalue()


def as_png(result: IllustratedStory, record: dict, original: dict | None) -> bytes:
    """The picture, or a strip of captioned panels. `parameters` is the text that A1111, ComfyUI and Civitai read."""
    settings, notes = record["settings"], PngImagePlugin.PngInfo()
    image = result.panels[0].image if len(result.panels) == 1 else strip_of(result)
    wanted = f"\nNegative prompt: {settings['negative_prompt']}" if settings["negative_prompt"] else ""
    width, height = result.panels[0].image.size
    notes.add_itxt(
        "parameters",
        f"{result.panels[0].text}{wanted}\nSteps: {settings['num_inference_steps']}, "
        f"Sampler: {record['models']['scheduler']['name']}, "
        f"CFG scale: {settings['guidance_scale']}, Seed: {result.panels[0].seed}, Size: {width}x{height}, "
        f"Model: {Path(record['models']['diffusion']['name']).name}, Version: StoryDiffusion",
    )
    notes.add_itxt("story", json.dumps(record, ensure_ascii=False))
    return png_bytes(image, notes)


def caption_font(size: int) -> ImageFont.FreeTypeFont:
    """A font that is on the machine and knows many scripts, or the one that Pillow carries."""
    for name in ("NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"):
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines of at most `width` pixels; a word that is longer than a line is broken."""
    lines = [""]
    for word in text.split():
        line = f"{lines[-1]} {word}".strip()
        if font.getlength(line) <= width:
            lines[-1] = line
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


def captioned(panel: IllustratedPanel, side: int) -> Image.Image:
    """A panel of `side` pixels with its text below, as high as the text asks."""
    font, margin = caption_font(side // 20), side // 20
    lines = wrap(panel.text, font, side)
    step = round(font.size * 1.35)
    card = Image.new("RGB", (side + 2 * margin, side + 3 * margin + step * len(lines)), PAPER)
    card.paste(panel.image.resize((side, side), Image.Resampling.LANCZOS), (margin, margin))
    for number, line in enumerate(lines):
        ImageDraw.Draw(card).text((margin, side + 2 * margin + step * number), line, fill=INK, font=font)
    return card


PAPER, INK, STRIP_SIDE, PAGE_SIDE = "#fffdf7", "#22252b", 320, 900  # colours; pixels


def strip_of(result: IllustratedStory) -> Image.Image:
    """Up to four panels in a row."""
    cards = [captioned(panel, STRIP_SIDE) for panel in result.panels]
    across, width = min(4, len(cards)), cards[0].width
    rows = [cards[start : start + across] for start in range(0, len(cards), across)]
    heights = [max(card.height for card in row) for row in rows]
    strip = Image.new("RGB", (across * width, sum(heights)), PAPER)
    for number, row in enumerate(rows):
        for place, card in enumerate(row):
            strip.paste(card, (place * width, sum(heights[:number])))
    return strip


def as_pdf(result: IllustratedStory, record: dict, original: dict | None) -> bytes:
    """A page for each panel; the record is in the document's keywords."""
    cards = [captioned(panel, PAGE_SIDE) for panel in result.panels]
    height, day = max(card.height for card in cards), time.gmtime(0)  # no date: the same record, the same bytes
    pages = []
    for card in cards:
        pages.append(Image.new("RGB", (card.width, height), PAPER))
        pages[-1].paste(card)
    file = io.BytesIO()
    pages[0].save(
        file,
        format="PDF",
        save_all=True,
        append_images=pages[1:],
        resolution=150,
        title=title_of(result),
        keywords=json.dumps(record),
        creationDate=day,
        modDate=day,
    )
    return file.getvalue()


def title_of(result: IllustratedStory) -> str:
    return result.prompt.rstrip(".!? ")


STORY_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark;
  --paper: #fffdf7; --ink: #22252b; --soft: #6b7078; --line: #e6e1d5; --new: #fff0b8; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #16181d; --ink: #eceae4; --soft: #9a9fa8; --line: #2d3038; --new: #4a3f12; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 18px/1.6 Georgia, "Times New Roman", serif; }}
main {{ max-width: 68rem; margin: 0 auto; padding: 2rem 1rem 4rem; }}
h1 {{ font-size: clamp(1.5rem, 5vw, 2.4rem); line-height: 1.2; margin: 0 0 1rem; text-wrap: balance; }}
.board {{ display: flex; flex-wrap: wrap; gap: .4rem; margin: 0 0 2rem; padding: 0; list-style: none;
          font: 600 .85rem/1 system-ui, sans-serif; }}
.board li {{ padding: .5rem .7rem; border-radius: 1rem; color: #fff; }}
.board s, .board i {{ opacity: .8; font-weight: 400; font-style: normal; }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: 2rem 1.5rem; }}
figure {{ margin: 0; max-width: 32rem; }}
img {{ display: block; width: 100%; border-radius: .5rem; border: 1px solid var(--line); }}
figcaption {{ margin-top: .7rem; }}
ins {{ background: var(--new); text-decoration: none; border-radius: .2rem; }}
del {{ color: var(--soft); }}
details {{ margin-top: 3rem; color: var(--soft); font: .85rem/1.6 system-ui, sans-serif; overflow-wrap: anywhere; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }}
dd {{ margin: 0; }}
@media print {{
  main {{ max-width: none; padding: 0; }}
  .panels {{ display: block; }}
  figure {{ break-inside: avoid; break-after: page; margin: 0 auto; }}
  details {{ display: none; }}
}}
</style>
<main>
<h1>{title}</h1>
<ul class="board" aria-label="Storyboard">
{chips}
</ul>
<div class="panels">
{panels}
</div>
<details><summary>How it was made</summary><dl>
{facts}
</dl></details>
</main>
<script type="application/json" id="story">{record}</script>
</html>
"""


def as_html(result: IllustratedStory, record: dict, original: dict | None) -> bytes:
    """One self-contained page. With `original`, the record that it was edited from, it shows what changed."""
    before = original["storyboard"] if original else result.storyboard
    chips = []
    for code, word, old in zip(result.storyboard, record["words"], before):
        was = f"<s>{old}</s> " if old != code else ""
        chips.append(f'<li style="background: {code_colour(code)}">{was}{code} <i>{html.escape(word)}</i></li>')
    texts = [panel.text for panel in result.panels]
    texts = (
        changes_in(original["story"], texts) if original else [html.escape(" ".join(text.split())) for text in texts]
    )
    panels = []
    for number, (panel, text) in enumerate(zip(result.panels, texts), 1):
        data = base64.b64encode(png_bytes(panel.image)).decode()
        picture = f'<img alt="Panel {number}" src="data:image/png;base64,{data}">'
        panels.append(f"<figure>{picture}<figcaption>{text}</figcaption></figure>")
    facts = {"prompt": record["prompt"], "seed": record["seed"], **record["settings"]}
    facts |= {"checkpoint": f"{record['checkpoint']['name']}, sha256 {record['checkpoint']['sha256'][:16]}"}
    facts |= {name: model["name"] for name, model in record["models"].items()} | {"versions": record["versions"]}
    page = STORY_PAGE.format(
        title=html.escape(title_of(result)),
        chips="\n".join(chips),
        panels="\n".join(panels),
        facts="\n".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(facts[key]))}</dd>" for key in facts),
        record=json.dumps(record, ensure_ascii=False).replace("<", "\\u003c"),
    )
    return page.encode()


def changes_in(before: str, parts: list[str]) -> list[str]:
    """HTML of each part of a story, compared with the story `before` as a whole, wherever it was cut: words that are
    new marked, those that are gone struck out."""
    old, new = before.split(), " ".join(parts).split()
    fresh, gone = set(), {}
    for kind, start, end, first, last in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind != "equal":
            fresh.update(range(first, last))
            gone[first] = html.escape(" ".join(old[start:end]))
    texts, first = [], 0
    for part in parts:
        last, pieces = first + len(part.split()), []
        for place in range(first, last + (last == len(new))):  # what is gone from the very end stands behind it
            if gone.get(place):
                pieces.append(f"<del>{gone[place]}</del>")
            if place < last:
                word = html.escape(new[place])
                pieces.append(f"<ins>{word}</ins>" if place in fresh else word)
        texts.append(" ".join(pieces).replace("</ins> <ins>", " "))
        first = last
    return texts


def code_colour(code: int) -> str:
    """A hue of its own for each code: steps of the golden angle keep neighbours apart."""
    return f"hsl({code * 137.508 % 360:.0f} 55% 42%)"


def board_of(codes: np.ndarray, side: int = 12) -> np.ndarray:
    """Storyboards (N, S) as a picture (N side, S side, 3) uint8: a row for each story, a colour for each code."""
    colours = {
        code: ImageColor.getrgb(code_colour(code).replace(" ", ",").replace("deg", "")) for code in set(codes.flat)
    }
    pixels = np.array([[colours[code] for code in row] for row in codes], dtype=np.uint8)  # (N, S, 3)
    return pixels.repeat(side, 0).repeat(side, 1)


WRITERS = {".png": as_png, ".html": as_html, ".pdf": as_pdf}


# ------------------------------------------------------------------------------------------------------------------
# 11. Evaluation
# In: a model and held-out stories. Out: what the storyboard costs and what it returns, in nats and bits per story,
# beside the fair baselines: another story's storyboard, one drawn from the prior, a learned constant soft prompt of
# the same length, and no soft prompt at all; whether the pictures listen; and what each code has come to mean.
# ------------------------------------------------------------------------------------------------------------------


class TextMeasures(NamedTuple):
    """Per story, (N,) float64 numpy; codes (N, S)."""

    text_nll: dict[str, np.ndarray]  # nats, under each kind of soft prompt
    latent_nll: np.ndarray  # nats
    num_tokens: np.ndarray
    vote_share: np.ndarray
    codes: np.ndarray


@torch.no_grad()
def measure_text(
    model: StoryModel, stories: list[str], config: Config, kinds: tuple = ("true", "shuffled", "constant")
) -> TextMeasures:
    """Text NLL of each story with each kind of soft prompt, and the cost of its storyboard under the prior."""
    batches = [model.tokenize(batch) for batch in batches_of(stories, config.eval_batch_size)]
    boards = [model.encode(tokens, mask) for tokens, mask, _ in batches]
    codes = torch.cat([board.codes for board in boards])  # (N, S)
    drawn = model.prior.sample(len(stories), seeded(config.seed, 1))
    soft_of = {
        "true": model.soft(codes),
        "shuffled": model.soft(codes.roll(1, 0)),
        "prior": model.soft(drawn),
        "constant": model.soft_prompt.nothing(len(stories)),
        "none": model.soft_prompt.nothing(len(stories))[:, :0],
    }
    text_nll = {kind: [] for kind in kinds}
    work = tqdm(total=len(batches) * len(kinds), desc="text NLL", disable=not sys.stderr.isatty(), leave=False)
    for kind in kinds:
        for (tokens, mask, cut), soft in zip(batches, soft_of[kind].split(config.eval_batch_size)):
            text_nll[kind].append(model.lm.nll(soft, tokens, mask, cut).double().cpu().numpy())
            work.update()
    work.close()
    return TextMeasures(
        {kind: np.concatenate(values) for kind, values in text_nll.items()},
        model.prior.nll(codes).double().cpu().numpy(),
        torch.cat([mask.sum(1) + ~cut for _, mask, cut in batches]).double().cpu().numpy(),
        torch.cat([board.share.mean(1) for board in boards]).double().cpu().numpy(),
        codes.cpu().numpy(),
    )


@torch.no_grad()
def measure_retrieval(
    model: StoryModel, stories: list[str], codes: Tensor, config: Config, among: int = 64
) -> np.ndarray:
    """Whether a story is the likeliest of `among` under its own storyboard, argmax of p_psi(s | z): (N,) of 0 and 1.
    codes (N, S)."""
    found, size = [], config.eval_batch_size
    work = tqdm(total=len(stories), desc="retrieval", disable=not sys.stderr.isatty(), leave=False)
    for start in range(0, len(stories), among):
        end = min(start + among, len(stories))
        first = max(0, end - among)  # the last group borrows candidates from the one before
        tokens, mask, cut = model.tokenize(stories[first:end])
        for place in range(start - first, end - first):
            soft = model.soft(codes[[first + place]])
            groups = zip(tokens.split(size), mask.split(size), cut.split(size))
            nll = [model.lm.nll(soft.expand(len(group[0]), -1, -1), *group) for group in groups]
            found.append(float(torch.cat(nll).argmin() == place))
            work.update()
    work.close()
    return np.array(found)


@torch.no_grad()
def measure_pictures(
    model: StoryModel, rows: list[Row], codes: Tensor, folder: Path, config: Config
) -> dict[str, np.ndarray]:
    """Diffusion NLL of one panel of each story: with its own text and storyboard, with another story's text, and with
    another's storyboard, on common noise. codes (N, S)."""
    diffusion, size = model.diffusion, config.eval_batch_size
    errors = {"true": [], "shuffled_story": [], "shuffled_storyboard": []}
    for start in tqdm(range(0, len(rows), size), desc="diffusion NLL", disable=not sys.stderr.isatty(), leave=False):
        batch = range(start, min(start + size, len(rows)))
        panels = [rows[i].panels[i % len(rows[i].panels)] for i in batch]
        pixels = [
            load_picture(folder, panel.image_path, diffusion.resolution, rows[i].where)
            for i, panel in zip(batch, panels)
        ]
        moments = diffusion.encode_pictures(torch.stack(pixels))
        followers = [rows[(i + 1) % len(rows)].panels for i in batch]
        others = [candidates[i % len(candidates)] for i, candidates in zip(batch, followers)]  # the same beat
        own, other = codes[list(batch)], codes.roll(-1, 0)[list(batch)]
        for kind, speakers, board in zip(errors, (panels, others, panels), (own, own, other)):
            heard = diffusion.encode_texts([panel.text for panel in speakers])
            condition = model.condition(*heard, model.encoder.quantizer.look_up(board))
            nll = diffusion.nll(moments, *condition, seeded(config.seed, 2, start))
            errors[kind].append(nll.double().cpu().numpy())
    return {f"diffusion_nll.{kind}": np.concatenate(values) for kind, values in errors.items()}


@torch.no_grad()
def measure_factors(model: StoryModel, rows: list[Row], codes: Tensor, config: Config) -> dict[str, np.ndarray]:
    """The storyworld alone: each story is painted as `generate` paints, and a probe that was trained on drawn pictures
    reads its factors off the picture. factors.NAME is (N,) of 0 and 1: right or wrong."""
    if not all(row.factors for row in rows):
        return {}
    sys.path.insert(0, str(EMBEDDED_CHECKPOINT.parent))
    from probe import load_probe
    from world import ALWAYS_SHOWN, SCENES

    probe, size, right = load_probe(EMBEDDED_CHECKPOINT.with_name("probe.safetensors")), config.eval_batch_size, {}
    shown = (*ALWAYS_SHOWN, *SCENES[-1].shows)  # by the picture of a whole story, which is its last panel
    for start in tqdm(range(0, len(rows), size), desc="pictures", disable=not sys.stderr.isatty(), leave=False):
        batch = rows[start : start + size]
        heard = model.diffusion.encode_texts([row.story for row in batch])
        condition = model.condition(*heard, model.encoder.quantizer.look_up(codes[start : start + size]))
        seeds = [config.seed + start + place for place in range(len(batch))]
        pictures = model.diffusion.paint(*condition, config, seeds)
        pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2) / 255
        for row, read in zip(batch, probe.read(pixels)):
            for name in shown:
                right.setdefault(f"factors.{name}", []).append(float(read[name] == row.factors[name]))
    return {name: np.array(values) for name, values in right.items()}


@torch.no_grad()
def measure_openings(model: StoryModel, rows: list[Row], config: Config) -> dict[str, np.ndarray]:
    """rest_nll.KIND (N,): nats of what truly comes after a story's prompt, given the prompt and one storyboard that
    was drawn for it: from the prior alone, or resampled as in `generate`."""
    nll = {"resampled": [], "prior": []}
    for number, row in enumerate(tqdm(rows, desc="openings", disable=not sys.stderr.isatty(), leave=False)):
        tokens, mask, cut = model.tokenize([row.story])
        opening = int(model.tokenize([row.prompt])[1].sum())  # tokens of the prompt
        for kind, candidates in (("resampled", config.num_storyboards), ("prior", 1)):
            drawing = dataclasses.replace(config, num_storyboards=candidates)
            codes = draw_storyboard(model, row.prompt, [], drawing, config.seed + number)[None]
            soft, endless = model.soft(codes), torch.ones_like(cut)
            whole = model.lm.nll(soft, tokens, mask, cut)
            nll[kind].append(float(whole - model.lm.nll(soft, tokens[:, :opening], mask[:, :opening], endless)))
    return {f"rest_nll.{kind}": np.array(values) for kind, values in nll.items()}


@torch.no_grad()
def measure_edits(model: StoryModel, rows: list[Row], codes: Tensor, config: Config) -> dict[str, np.ndarray]:
    """Each story is written twice from its prompt with one seed, the second time with one slot (the slots in turn)
    at another code, the likeliest by the prior. edit_locality (N,) is the share of the changed tokens that stand in the
    slot's own chunk, edit_locality_chance what it would be if they fell anywhere behind the prompt; NaN where nothing
    changed. codes (N, S)."""
    slots = torch.arange(len(rows), device=codes.device) % NUM_SLOTS
    logits = model.prior(codes)[torch.arange(len(rows)), slots]  # (N, K)
    edited = codes.clone()
    edited[torch.arange(len(rows)), slots] = logits.scatter(1, codes.gather(1, slots[:, None]), -torch.inf).argmax(1)
    locality, chance, size = [], [], config.eval_batch_size
    for start in tqdm(range(0, len(rows), size), desc="edits", disable=not sys.stderr.isatty(), leave=False):
        prompts = [row.prompt for row in rows[start : start + size]]
        seeds = [config.seed + start + place for place in range(len(prompts))]
        before, after = (
            model.lm.write(model.soft(board[start : start + size]), prompts, config, seeds) for board in (codes, edited)
        )
        for prompt, first, second, slot in zip(prompts, before, after, slots[start : start + size].tolist()):
            ids = [model.lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, first, second)]
            own = range(slot * len(ids[1]) // NUM_SLOTS, (slot + 1) * len(ids[1]) // NUM_SLOTS)
            changed = changed_places(ids[1], ids[2])
            locality.append(np.mean([place in own for place in changed]) if changed else np.nan)
            chance.append(np.mean([place in own for place in range(len(ids[0]), len(ids[1]))] or np.nan))
    return {"edit_locality": np.array(locality), "edit_locality_chance": np.array(chance)}


def changed_places(before: list[int], after: list[int]) -> list[int]:
    """Where the edits are that lead from one row of tokens to the other: a place in `before` for each token that is
    replaced, deleted or inserted."""
    places = []
    for kind, start, end, first, last in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind != "equal":
            edits = max(end - start, last - first)
            places += [start + (end - start) * edit // edits for edit in range(edits)]
    return places


def bootstrap(statistic, count: int, draws: int = 1000, seed: int = 0) -> list[float]:
    """95 % interval of statistic(indices) under resampling of the `count` stories with replacement (Efron 1979). A
    resample has fewer distinct stories, so fewer distinct codes: such a bias is taken off."""
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(rng.integers(count, size=count)) for _ in range(draws)])
    return (np.nanpercentile(drawn, [2.5, 97.5]) - np.nanmean(drawn) + statistic(np.arange(count))).tolist()


def summarize(text: TextMeasures, others: dict[str, np.ndarray], num_codes: int) -> dict:
    """The table of the README: each key with its 95 % interval under key_ci. `others`: more columns, (N,) each."""
    nll, bit = text.text_nll, math.log(2)
    returned, spent = (nll["constant"] - nll["true"]) / bit, text.latent_nll / bit
    columns = {f"text_nll.{kind}": values for kind, values in nll.items()}
    columns |= {"bits_returned": returned, "bits_spent": spent}
    columns |= {
        "elbo": -nll["true"] - text.latent_nll,
        "elbo_constant": -nll["constant"],
        "elbo_none": -nll["none"],
    }
    columns |= {"codebook.vote_share": text.vote_share, **others}
    statistics = {key: partial(mean_of, values) for key, values in columns.items()}
    for kind, values in nll.items():
        statistics[f"text_nll_per_token.{kind}"] = partial(ratio_of_sums, values, text.num_tokens)
    statistics["efficiency"] = partial(ratio_of_sums, returned, spent)
    statistics["codebook.used"] = lambda pick: float(len(np.unique(text.codes[pick])))
    statistics["codebook.perplexity"] = lambda pick: code_perplexity(text.codes[pick], num_codes)
    table, count = {"bits_uniform": NUM_SLOTS * math.log2(num_codes)}, len(text.codes)
    for key, statistic in statistics.items():
        table[key] = statistic(np.arange(count))
        table[f"{key}_ci"] = bootstrap(statistic, count)
    return table


def mean_of(values: np.ndarray, pick: np.ndarray) -> float:
    """The mean over the stories that have a value; a measure may leave stories out with NaN."""
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
    rows = read_rows(config.data_root, config.split, config.max_val_samples)
    device, dtype = pick_device()
    model = load_model(checkpoint, config, device, dtype)
    stories = [row.story for row in rows]
    text = measure_text(model, stories, config, ("true", "shuffled", "prior", "constant", "none"))
    codes = torch.from_numpy(text.codes).to(device)
    others = {"retrieval_at_64": measure_retrieval(model, stories, codes, config)}
    others |= measure_openings(model, rows, config) | measure_edits(model, rows, codes, config)
    others |= measure_pictures(model, rows, codes, Path(config.data_root) / config.split, config)
    others |= measure_factors(model, rows, codes, config)
    table = summarize(text, others, config.num_codes)
    print(f"{len(rows)} stories of {config.data_root}/{config.split}, {checkpoint['path']}, step {checkpoint['step']}")
    for key, value in table.items():
        if not key.endswith("_ci"):
            low, high = table.get(f"{key}_ci", (value, value))
            print(f"{key:32s} {value:10.3f}   [{low:.3f}, {high:.3f}]")
    if config.output:
        Path(config.output).write_text(json.dumps(table, indent=2) + "\n")
    return table


class CodeMeaning(NamedTuple):
    """What goes with one code: in how many chunks it stands, in which slots (1 to 8), and which words and (on the
    storyworld) factors are there more often than in those slots at large."""

    code: int
    count: int
    slots: list[int]
    words: list[str]
    factors: list[str]


def telling(inside: list[set[str]], expected: dict[str, float], most: int) -> list[tuple[str, float]]:
    """The `most` things that tell a code's chunks from others of their slots, by p log(p / expected), each with p, its
    share of the chunks. What stands in one chunk alone tells nothing."""
    counts = Counter(thing for chunk in inside for thing in chunk)
    shares = {thing: count / len(inside) for thing, count in counts.items() if count > 1 or len(inside) == 1}
    scores = {thing: share * math.log(share / expected[thing]) for thing, share in shares.items()}
    best = sorted(scores, key=lambda thing: (-scores[thing], thing))[:most]
    return [(thing, shares[thing]) for thing in best if scores[thing] > 0]


def chunk_words(model: StoryModel, story: str) -> list[set[str]]:
    """The words of each of a story's eight chunks, lower-cased."""
    tokens = model.lm.tokenizer(story, add_special_tokens=False)["input_ids"][: model.max_tokens]
    members = chunk_members(torch.ones(1, len(tokens), dtype=torch.bool))[0]  # (S, T)
    chunks = [[token for token, member in zip(tokens, row) if member] for row in members.tolist()]
    return [set(re.findall(r"\w+", model.lm.tokenizer.decode(chunk).lower())) for chunk in chunks]


@torch.no_grad()
def explain_codes(model: StoryModel, rows: list[Row], config: Config) -> list[CodeMeaning]:
    """The most used codes of some stories, by falling use, with what goes with each."""
    codes = model.codes_of([row.story for row in rows]).cpu().numpy()  # (N, S)
    words = [chunk_words(model, row.story) for row in rows]
    factors = [{f"{name} {value}" for name, value in row.factors.items()} for row in rows]
    word_shares = [shares_of([story[slot] for story in words]) for slot in range(NUM_SLOTS)]
    factor_shares, meanings = shares_of(factors), []
    for code, count in Counter(codes.flatten().tolist()).most_common(config.top_codes):
        places = np.argwhere(codes == code).tolist()  # [story, slot]
        expected = Counter()
        for _, slot in places:
            expected.update({word: share / count for word, share in word_shares[slot].items()})
        found = [word for word, _ in telling([words[story][slot] for story, slot in places], expected, most=6)]
        facts = telling([factors[story] for story, _ in places], factor_shares, most=3)
        facts = [f"{fact} {share:.0%}" for fact, share in facts]
        slots = sorted({slot + 1 for _, slot in places})
        meanings.append(CodeMeaning(code, count, slots, found, facts))
    return meanings


def shares_of(sets: list[set[str]]) -> dict[str, float]:
    """In which share of the sets each thing is."""
    return {thing: count / len(sets) for thing, count in Counter(thing for one in sets for thing in one).items()}


def codebook(config: Config, checkpoint: dict) -> list[CodeMeaning]:
    """Prints what the most used codes mean, and writes it to --output as a page."""
    if config.output and not (config.output.endswith(".html") and Path(config.output).parent.is_dir()):
        raise StoryError(f"--output {config.output} must be an .html file in a folder that exists", 2)
    rows = read_rows(config.data_root, config.split, config.max_val_samples)
    model = load_model(checkpoint, config, *pick_device(), paints=False)
    meanings = explain_codes(model, rows, config)
    print(f"{'code':>5} {'uses':>5}  {'slots':8} {'words':52} factors")
    for code, count, slots, words, factors in meanings:
        print(f"{code:5d} {count:5d}  {spans(slots):8} {' '.join(words):52} {', '.join(factors)}".rstrip())
    if config.output:
        Path(config.output).write_text(
            codebook_page(meanings, f"{len(rows)} stories, {Path(checkpoint['path']).name}"), "utf-8"
        )
        say(f"page: {config.output}")
    return meanings


def spans(numbers: list[int]) -> str:
    """[1, 2, 3, 6] -> '1-3,6'"""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends))


CODEBOOK_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Codebook</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
div {{ display: grid; grid-template-columns: 4rem 4rem 4rem 1fr 1fr; gap: 0 1rem; padding: .5rem 0;
       border-top: 1px solid #8884; align-items: baseline; }}
b {{ border-radius: .5rem; color: #fff; text-align: center; }}
i {{ font-style: normal; opacity: .7; }}
@media (max-width: 40rem) {{ div {{ grid-template-columns: 4rem 4rem 1fr; }} p {{ grid-column: 1 / -1; }} }}
p {{ margin: 0; }}
</style>
<h1>What the codes mean</h1>
<p><i>{title}. Words and factors that stand with a code more often than in its slots at large.</i></p>
<div><i>code</i><i>uses</i><i>slots</i><p><i>words</i></p><p><i>factors</i></p></div>
{rows}
</html>
"""


def codebook_page(meanings: list[CodeMeaning], title: str) -> str:
    rows = [
        f'<div><b style="background: {code_colour(code)}">{code}</b><span>{count}</span><span>{spans(slots)}</span>'
        f"<p>{html.escape(' '.join(words))}</p><p>{html.escape(', '.join(factors))}</p></div>"
        for code, count, slots, words, factors in meanings
    ]
    return CODEBOOK_PAGE.format(title=html.escape(title), rows="\n".join(rows))


# ------------------------------------------------------------------------------------------------------------------
# 12. Training
# In: data and a configuration. Out: checkpoints and TensorBoard in --output_dir. accelerate runs it on the devices at
# hand. The loop, Trainer.fit, is one paragraph: batch, forward, backward, clip, step; then what is due: log, validate,
# save, stop. Steps are optimizer steps.
# ------------------------------------------------------------------------------------------------------------------


def precision_for(config: Config, device_type: str) -> str:
    """What --mixed_precision asks for, where the device has it: a processor that must imitate it is far slower."""
    wanted = config.mixed_precision
    if wanted == "fp16" and device_type != "cuda":
        say(f"--mixed_precision fp16 needs a GPU: this run on {device_type} uses fp32")
        return "no"
    if wanted == "bf16" and device_type == "cpu" and not cpu_has_bf16():
        say("--mixed_precision bf16: this processor has no bf16 arithmetic, so this run uses fp32")
        return "no"
    return wanted


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies in bf16 (AVX-512 BF16, AMX, Arm's BF16)."""
    return any(present is True for name, present in torch.cpu.get_capabilities().items() if "bf16" in name)


def make_optimizer(model: StoryModel, config: Config) -> torch.optim.Optimizer:
    """AdamW on all that is trained; the soft prompt and the prior at rates of their own."""
    rates = {"soft_prompt": config.learning_rate * config.soft_prompt_lr_scale, "prior": config.prior_learning_rate}
    groups = [
        dict(params=list(part.parameters()), lr=rates.get(name, config.learning_rate))
        for name, part in model.named_children()
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.adam_weight_decay)


class StopSignal:
    """SIGTERM or SIGINT: the step in hand is finished and saved. A second signal stops at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)
        say(f"\n{signal.Signals(number).name}: saving after this step; once more to stop at once")


def ignore_signals(worker: int) -> None:
    """Reader processes outlive a signal to the group: the trainer needs them for its last step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


CHECKED_ROWS = 20_000  # at the start, a second's worth: most data whole; later rows are checked when they are read
PRIOR_BATCH = 128
PRIOR_PASSES = 32  # over the training set: beyond that the prior learns a small one by heart
PRIOR_ROUNDS = 2  # of coding and fitting: the codes go by the prior
HEARD_STORIES = 128  # to find how far each slot is heard


def settle(model: StoryModel, stories: list[str], config: Config, batch: int = PRIOR_BATCH) -> None:
    """The end of a training, the same on every process. So far every slot has paid the same for a code, heard or not,
    and the prior has run behind codes that moved as long as the encoder learned. Now the rate goes by how far a slot is
    heard, and the prior is fitted to what the codes become, in rounds, since they go by the prior in turn."""
    model.listen(stories[:HEARD_STORIES])
    steps = min(config.prior_steps, PRIOR_PASSES * len(stories) // batch)
    for _ in range(PRIOR_ROUNDS):
        fit_prior(model, model.codes_of(stories), steps // PRIOR_ROUNDS, config, batch)


def fit_prior(model: StoryModel, codes: Tensor, steps: int, config: Config, batch: int) -> None:
    """Trains the prior alone, on storyboards (N, S)."""
    optimizer = torch.optim.AdamW(
        model.prior.parameters(), lr=config.prior_learning_rate, weight_decay=config.adam_weight_decay
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, max(1, steps))
    for step in tqdm(range(steps), desc="prior", disable=not sys.stderr.isatty(), leave=False):
        picks = torch.randint(len(codes), (batch,), generator=seeded(config.seed, 4, step))
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
        self.rows = read_rows(config.data_root, "train", config.max_train_samples, config.skip_bad_rows)
        self.held_out = list(read_rows(config.data_root, "val", config.max_val_samples, config.skip_bad_rows))
        self.data = dict(stories=len(self.rows), sha256=self.rows.digest)
        device, dtype = pick_device()
        self.accelerator = Accelerator(
            mixed_precision=precision_for(config, device.type),
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],  # the prior idles in warm-up
        )
        device = self.accelerator.device
        torch.manual_seed(config.seed)  # the weights at the start
        lm = LanguageModel(config.lm_model, device, dtype, config.gradient_checkpointing)
        diffusion = LatentDiffusion(config.diffusion_model, device, dtype, config.gradient_checkpointing)
        self.model = StoryModel(config, lm, diffusion)
        checked = self.rows[:CHECKED_ROWS]
        self.panels = len(self.rows) * float(np.mean([len(row.panels) for row in checked]))  # of all rows, about
        self.model.start_encoder([row.story for row in checked])
        optimizer = make_optimizer(self.model, config)
        lengths = dict(num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.max_train_steps)
        self.schedule = get_scheduler(config.lr_scheduler, optimizer, **lengths)
        # neither the schedule, which would run as many times too fast as there are processes, nor anything frozen
        self.prepared, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.pictures = min(config.diffusion_stories or config.train_batch_size, config.train_batch_size)  # of a batch
        # a monitor is worth its time where it is logged
        trains = self.model.image_condition is not None
        self.every = 1 if trains else config.logging_steps * config.gradient_accumulation_steps
        self.step, self.micro_step, self.grad_norm = 0, 0, 0.0
        self.position, self.skipped, self.resumed_from = 0, 0, ""  # stories read, pictures left out
        self.resume()
        self.writer = None
        if self.accelerator.is_main_process:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1)

    @property
    def stories_per_step(self) -> int:
        config = self.config
        return config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    def some_stories(self, count: int) -> list[str]:
        """The same on every process."""
        picks = torch.randperm(len(self.rows), generator=seeded(self.config.seed))[:count]
        return [self.rows[pick].story for pick in picks.tolist()]

    def banner(self) -> None:
        from torch.utils.tensorboard.summary import hparams

        config, model = self.config, self.model
        frozen = [model.lm.model, model.diffusion.vae, model.diffusion.unet, model.diffusion.text_encoder]
        count = [sum(p.numel() for module in modules for p in module.parameters()) for modules in ([model], frozen)]
        say("***** Running training *****")
        say(f"  device {self.accelerator.device}, precision {self.accelerator.mixed_precision}, {versions()}")
        say(f"  parameters: {count[0]:,} trained, {count[1]:,} frozen ({config.lm_model}, {config.diffusion_model})")
        batch = f"{config.train_batch_size} x {config.gradient_accumulation_steps} accumulated"
        batch += f" x {self.accelerator.num_processes} processes = {self.stories_per_step}"
        say(f"  {len(self.rows)} stories; batch {batch} stories a step")
        say(f"  steps {self.step} to {config.max_train_steps}, seed {config.seed}")
        say(f"  losses: tensorboard --logdir {config.output_dir}")
        if model.image_condition is None:
            say("  the diffusion NLL is a monitor: with the text as its only condition it cannot train the storyboard")
        settings = dataclasses.asdict(config)
        self.writer.add_text("config", f"```json\n{json.dumps(settings, indent=2)}\n```", self.step)
        outcomes = dict.fromkeys(("valid/bits_returned", "valid/efficiency", "valid/text_nll_true"), 0.0)
        for summary in hparams(settings, outcomes):  # its own tab, to compare runs by settings and outcomes
            self.writer.file_writer.add_summary(summary)

    def loader(self) -> DataLoader:
        """Batches from the place in the stream that this step has come to, without end."""
        config, accelerator = self.config, self.accelerator
        ranks = dict(rank=accelerator.process_index, ranks=accelerator.num_processes, every=self.every)
        batches = StoryBatches(
            len(self.rows), config.train_batch_size, self.pictures, config.seed, self.position, **ranks
        )
        lm, diffusion, folder = self.model.lm, self.model.diffusion, Path(config.data_root) / "train"
        sizes = (self.model.max_tokens, diffusion.resolution)
        return DataLoader(
            StoryDataset(self.rows, folder, lm.tokenizer, *sizes, config.seed, self.encode_panels()),
            batch_sampler=batches,
            collate_fn=partial(collate, max_tokens=self.model.max_tokens),
            num_workers=config.dataloader_num_workers,
            worker_init_fn=ignore_signals,
            pin_memory=accelerator.device.type == "cuda",
        )

    def encode_panels(self) -> FeatureCache | None:
        """The feature cache, where the run will look at more panels than there are; else encoding them at their step is
        less work."""
        config, processes = self.config, self.accelerator.num_processes
        looks = config.max_train_steps * config.gradient_accumulation_steps // self.every * self.pictures * processes
        if config.no_feature_cache or looks <= self.panels:
            return None
        diffusion = self.model.diffusion
        features = FeatureCache(self.rows, Path(config.data_root) / "train", diffusion)
        if self.writer:
            say(f"  feature cache: about {self.panels:,.0f} panels, encoded once into {features.key}")
        features.build(
            diffusion, config.train_batch_size, config.skip_bad_rows, self.accelerator.process_index, processes
        )
        self.accelerator.wait_for_everyone()
        diffusion.release_encoders()
        return features

    def fit(self) -> StoryModel:
        config, accelerator, parameters = self.config, self.accelerator, list(self.model.parameters())
        stop, self.clock = StopSignal(), (self.step, time.monotonic())
        if self.writer:
            self.banner()
        progress = tqdm(
            total=config.max_train_steps, initial=self.step, disable=not (self.writer and sys.stderr.isatty())
        )
        self.prepared.train()
        for batch in self.loader() if self.step < config.max_train_steps else ():
            if self.step >= config.quantizer_warmup_steps and not self.model.encoder.quantizer.updates:
                self.model.start_codebook(self.some_stories(codebook_sample(config.num_codes)))
            self.tell(batch["problems"])
            with accelerator.accumulate(self.prepared):
                losses = self.prepared(batch, self.noise())
                self.check_finite("loss", float(losses.total.detach()), losses, batch)
                accelerator.backward(losses.total)
                if accelerator.sync_gradients:
                    self.grad_norm = float(accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
                    if not accelerator.scaler:  # which skips a step that overflowed, and halves its scale
                        self.check_finite("gradient", self.grad_norm, losses, batch)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.micro_step += 1
            if not accelerator.sync_gradients:
                continue
            if accelerator.optimizer_step_was_skipped:
                self.model.encoder.seen = []
            else:
                self.model.encoder.step_codebook()
                self.schedule.step()
            self.step += 1
            self.position += self.stories_per_step
            progress.update()

            done = self.step == config.max_train_steps
            if done or self.step % config.logging_steps == 0:
                self.log(losses, progress)
            if done and config.prior_steps:
                settle(self.model, self.some_stories(config.prior_steps * PRIOR_BATCH), config)
            stopped = int(largest(stop.number, accelerator.device))  # a signal to one process stops all
            if not stopped and (done or self.step % config.validation_steps == 0):
                self.validate()
            if done or self.step % config.checkpointing_steps == 0 or stopped:
                self.save()
            if stopped:
                name = signal.Signals(stopped).name
                again = "go on with --resume_from_checkpoint latest"
                raise StoryError(f"stopped by {name} after step {self.step}; {again}", 128 + stopped)
            if done:
                break
        progress.close()
        if self.writer:
            self.writer.close()
        return self.model.eval()

    def tell(self, problems: list[str]) -> None:
        """Pictures that could not be read: the first ends the run, unless --skip_bad_rows has them left out."""
        if problems and not self.config.skip_bad_rows:
            raise StoryError(f"{problems[0]}; --skip_bad_rows goes on without such rows")
        for problem in problems:
            self.skipped += 1
            say(f"skipped, {self.skipped} so far: {problem}")

    def check_finite(self, what: str, value: float, losses: Losses, batch: dict) -> None:
        """Stops every process before the update if the value is not finite on one of them."""
        fine = math.isfinite(value)
        if not largest(not fine, self.accelerator.device):
            return
        message = f"step {self.step + 1}: the {what} is not finite"
        if fine:
            raise StoryError(f"{message} on another process; stopped before the update")
        terms = ", ".join(f"{name} {float(term.detach()):.4g}" for name, term in losses._asdict().items())
        rate = self.schedule.get_last_lr()[0]
        where = ", ".join(self.rows[index].where for index in batch["index"])
        raise StoryError(f"{message} ({terms}; learning rate {rate:.4g}); stopped before the update; rows {where}")

    def noise(self) -> torch.Generator:
        """A function of the step, so that a resumed run draws what an unbroken one would have drawn."""
        micro_step = self.micro_step % self.config.gradient_accumulation_steps
        return seeded(self.config.seed, self.step, micro_step, self.accelerator.process_index)

    def log(self, losses: Losses, progress) -> None:
        stacked = torch.stack([value.detach().float() for value in losses])
        means = Losses(*self.accelerator.reduce(stacked, "mean").tolist())
        if not self.writer:
            return
        (step, started), now = self.clock, time.monotonic()
        used, spread = self.model.encoder.quantizer.usage()
        points = {
            "elbo/text_nll": means.text_nll,
            "elbo/latent_nll": means.latent_nll,
            "elbo/commitment": means.commitment,
            "elbo/diffusion_nll": means.diffusion_nll,
            "elbo/loss": means.total,
            "storyboard/constant_minus_true": means.constant_nll - means.text_nll,
            "storyboard/codes_used": used,
            "storyboard/perplexity": spread,
            "storyboard/vote_share": means.vote_share,
            "optim/learning_rate": self.schedule.get_last_lr()[0],
            "optim/grad_norm": self.grad_norm,
            "speed/stories_per_second": (self.step - step) * self.stories_per_step / (now - started),
        }
        for name, value in points.items():
            if not math.isnan(value):
                self.writer.add_scalar(name, value, self.step)
        self.writer.flush()
        progress.set_postfix(text_nll=f"{means.text_nll:.1f}", latent_nll=f"{means.latent_nll:.1f}")
        self.clock = (self.step, now)

    def validate(self) -> None:
        """Held-out text NLL with the true, another's and the constant storyboard; a sample story and its picture."""
        started = time.monotonic()
        if self.writer:
            self.model.eval()
            text = measure_text(self.model, [row.story for row in self.held_out], self.config)
            points = {f"valid/text_nll_{kind}": float(values.mean()) for kind, values in text.text_nll.items()}
            returned = float((text.text_nll["constant"] - text.text_nll["true"]).mean()) / math.log(2)
            points["valid/latent_nll"] = float(text.latent_nll.mean())
            points["valid/bits_returned"] = returned
            points["valid/bits_spent"] = points["valid/latent_nll"] / math.log(2)
            points["valid/efficiency"] = returned / points["valid/bits_spent"]
            points["valid/vote_share"] = float(text.vote_share.mean())
            points["valid/codes_used"] = float(len(np.unique(text.codes)))
            points["valid/perplexity"] = code_perplexity(text.codes, self.config.num_codes)
            for name, value in points.items():
                self.writer.add_scalar(name, value, self.step)
            settings = dataclasses.replace(self.config, panels=4)
            prompt = self.config.validation_prompt or self.held_out[0].prompt
            (sample,) = illustrate(self.model, settings, [prompt], [self.config.seed])
            storyboard = " ".join(map(str, sample.storyboard))
            self.writer.add_text("sample/story", f"storyboard {storyboard}\n\n{sample.story}", self.step)
            self.writer.add_image("sample/panels", np.asarray(strip_of(sample)), self.step, dataformats="HWC")
            self.writer.add_image("sample/codes", board_of(text.codes[:32]), self.step, dataformats="HWC")
            self.writer.flush()
            figures = ", ".join(f"{name.removeprefix('valid/')} {value:.2f}" for name, value in points.items())
            say(f"step {self.step}: {figures}")
        self.prepared.train()
        self.clock = (self.clock[0], self.clock[1] + time.monotonic() - started)  # not the speed of training

    def save(self) -> None:
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        model, path = self.model, self.folder / f"ckpt_{self.step}.pt"
        save_checkpoint(
            path,
            dict(
                config=dataclasses.asdict(self.config),
                step=self.step,
                model=model.state_dict(),
                backbones=dict(lm_revision=model.lm.revision, diffusion_revision=model.diffusion.revision),
                optimizer=self.optimizer.state_dict(),
                lr_scheduler=self.schedule.state_dict(),
                scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
                position=self.position,
                data=self.data,
            ),
        )
        rotate_checkpoints(self.folder, self.config.checkpoints_total_limit, self.resumed_from)
        say(f"step {self.step}: saved {path}")

    def resume(self) -> None:
        """Puts everything back to where --resume_from_checkpoint was. There are no states of random generators: each
        draw is keyed by the seed and the step."""
        wanted, found = self.config.resume_from_checkpoint, list_checkpoints(self.folder)
        if wanted == "latest" and not found:
            say(f"--resume_from_checkpoint latest: no ckpt_STEP.pt in {self.folder}, starting from step 0")
        if not wanted or (wanted == "latest" and not found):
            return
        if wanted == "latest":
            checkpoint = newest_readable(found)
        else:
            checkpoint = load_checkpoint(wanted, CHECKPOINT_KEYS + RESUME_KEYS)
        self.check_same_run(checkpoint)
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise StoryError(f"{checkpoint['path']} was made with another configuration: {reason}", 2) from error
        self.schedule.load_state_dict(checkpoint["lr_scheduler"])
        if self.accelerator.scaler and checkpoint["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint["scaler"])
        self.step, self.position, self.resumed_from = (checkpoint[key] for key in ("step", "position", "path"))
        say(f"resumed from {checkpoint['path']}")

    def check_same_run(self, checkpoint: dict) -> None:
        """A run goes on with the settings and the stories it began with, unless --override insists."""
        there, here = (dataclasses.asdict(config) for config in (checkpoint["config"], self.config))
        changed = [f"{name} {there[name]!r} there, {here[name]!r} here" for name in fixed_settings()
                   if there[name] != here[name]]  # fmt: skip
        if checkpoint["data"] != self.data:
            named = (f"{data['stories']} stories with sha256 {data['sha256'][:12]}" for data in
                     (checkpoint["data"], self.data))  # fmt: skip
            changed.append("data {} there, {} here".format(*named))
        if changed and not self.config.override:
            reason = "; ".join(changed)
            raise StoryError(f"{checkpoint['path']} is of another run: {reason}; --override goes on all the same", 2)
        for change in changed:
            say(f"--override: {change}")


def train(config: Config) -> StoryModel:
    """Trains and returns the model; a signal, once the step is saved, raises StoryError with code 128 + its number."""
    prepare_folder(Path(config.output_dir), "output_dir")
    trainer = Trainer(config)
    try:
        return trainer.fit()
    except OSError as error:  # TensorBoard's, which does not say where
        free = shutil.disk_usage(config.output_dir).free / 1e6
        raise StoryError(f"--output_dir {config.output_dir} cannot be written: {error}; {free:.1f} MB free") from error


# ------------------------------------------------------------------------------------------------------------------
# 13. Command line
# ------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command, config, given = parse_args(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    if command == "train":
        train(config)
        return
    if not config.ckpt:
        say(f"no --ckpt: using the embedded storyworld checkpoint {EMBEDDED_CHECKPOINT.relative_to(ROOT)}")
    checkpoint = load_checkpoint(config.ckpt or EMBEDDED_CHECKPOINT)
    config = dataclasses.replace(checkpoint["config"], **{name: getattr(config, name) for name in given})
    if command == "generate":
        generate(config, checkpoint, given)
        return
    {"evaluate": evaluate, "codebook": codebook, "export": export}[command](config, checkpoint)


def quiet_libraries() -> None:
    """The libraries' advice about themselves is not this program's output; their errors are."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers
    from diffusers.utils import logging as diffusers_logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


def run(argv: list[str] | None = None) -> int:
    """main, with the exit status: an error is one line, and its traceback is for --debug."""
    threading.excepthook = lambda error: None  # TensorBoard's writer: what fails there is raised at the next point
    try:
        main(argv)
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # a StoryError is meant for the user, any other is a fault of the program or the machine
        if "--debug" in (sys.argv if argv is None else argv):
            raise
        told = str(error).strip().partition("\n")[0]
        hint = "" if isinstance(error, StoryError) else f" ({type(error).__name__}; --debug shows where)"
        say(f"error: {told}{hint}")
        return error.code if isinstance(error, StoryError) else 1


if __name__ == "__main__":
    sys.exit(run())
