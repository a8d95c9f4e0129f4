"""Build data/train and data/val: the stories and pictures that story_generative_model.py learns from.

    python download_data.py                           # M3IT image paragraphs, streamed from the hub
    python download_data.py --source storyworld       # the embedded world, drawn here: no network
    python download_data.py --source folder PATH      # your own stories

Each split is a folder with `stories.jsonl`, one JSON object a line, and the pictures it names by row number:

    {"prompt": "...", "story": "...", "image_path": "images/000000.jpg"}

`prompt` opens the story. A story of several pictures also has `panels`: [{"text", "image_path"}, ...] in order.

m3it        MMInstruction/M3IT, image-paragraph-captioning, in the hub's order; train -> train, validation ->
            val. Read from the parquet branch; from the raw JSONL file where that branch is missing or only a
            filled cache is at hand. An RGB JPEG keeps its bytes, other pictures become one. Rows without text or
            readable picture are skipped and counted; too many of them are an error.
storyworld  Story i of a split has the seed first + i, where first is seed * 10**7 for train and 5 * 10**8 more
            for val. With seed < 50 and at most 10**7 stories the splits never meet, and both stay below 10**9,
            where the stories begin that the embedded backbones are measured on. Rows carry their `factors`.
folder      PATH/train and PATH/val in the layout above or in the hub's imagefolder layout (metadata.jsonl or
            metadata.csv, with file_name and text or caption). Where there is one split only, a seeded tenth of
            its stories becomes val. Every row is checked before the first is copied.

With --num_shards N, N processes or machines that share the folder make a part each (--shard_index 0 to N - 1): every
Nth row, into stories-IIIII-of-NNNNN.jsonl. The trainer reads the parts as one split, once all are there.

Stopped at any moment, the same command goes on from there and gives the same bytes: rows collect in
`stories.jsonl.part`, `stories.jsonl.state` says how far they are safe on disk, and `stories.jsonl` appears when
the split is complete. `.source.json` keeps the settings: other settings never mix with what is there.

One line per split goes to standard output, the rest to standard error. Exit status: 0 done, 1 no usable data
(the message says what to do), 2 bad arguments, 130 interrupted.
"""

import argparse
import base64
import csv
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

M3IT_REPO, M3IT_BRANCH = "MMInstruction/M3IT", "refs/convert/parquet"
M3IT_SUBSET = "image-paragraph-captioning"
M3IT_RAW_FILE = "data/captioning/image_paragraph_captioning/image_paragraph_captioning_{}.jsonl"
M3IT_SPLITS = {"train": "train", "val": "validation"}  # ours -> the parquet branch's
M3IT_ROWS = {"train": 14_575, "val": 2_487}  # as published: for the progress bar, and a note where it differs
M3IT_CHUNK = 16  # records that are decoded side by side
M3IT_TEXT_KEYS = ("outputs", "output")  # parquet branch, raw files
M3IT_PICTURE_KEYS = ("image_base64_str", "image_str", "img_str", "image")
HUB_BUSY = {429, 500, 502, 503, 504}  # statuses that are worth another try

WORLD_FOLDER = Path(__file__).resolve().parent / "assets" / "storyworld"
WORLD_STORIES = {"train": 2_000, "val": 256}
WORLD_FIRST_SEED = {"train": 0, "val": 5 * 10**8}
WORLD_SEED_BLOCK = 10**7  # stories per --seed, of which there are so many that val ends at 10**9:
WORLD_SEEDS = 50
WORLD_PICTURE_SIZE = 128  # pixels

FOLDER_SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "all": (".",)}
FOLDER_TABLES = ("stories.jsonl", "metadata.jsonl", "metadata.csv")
FOLDER_NAMES = {"file_name": "image_path", "text": "story", "caption": "story"}  # the hub's -> ours
FOLDER_VAL_SHARE = 0.1

PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")  # none of Pillow's other parsers sees these bytes
PICTURE_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp"}
CHECKPOINT_ROWS = 64
SKIP_HANDFUL, SKIP_SHARE = 5, 0.01  # more skipped rows than both allow is an error

Limits = dict[str, int | None]  # split -> the most stories to take, None for all


class Shard(NamedTuple):
    """One of `count` parts of a split: every `count`-th row from row `index` on."""

    index: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        """Empty for the whole."""
        return f"{self.index:05d}-of-{self.count:05d}" if self.count > 1 else ""

    def of(self, rows: Sequence) -> Sequence:
        return rows[self.index :: self.count]

    def size(self, total: int | None) -> int | None:
        return total and len(self.of(range(total)))


WHOLE = Shard()


class DataError(Exception):
    """Data that cannot be had or used; the message says where and what to do."""


# ------------------------------------------------------------------------------------------------------------
# Text and pictures


def log(message: str):
    print(message, file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_text(value) -> bool:
    """A string that is not blank, and has no lone surrogate (JSON may hold one, UTF-8 may not)."""
    if not isinstance(value, str) or not value.strip():
        return False
    return value.isascii() or not re.search("[\ud800-\udfff]", value)  # a picture in base64 is quickly seen


def first_sentence(text: str) -> str:
    """`text` up to its first sentence end, or all of it. "Mr. Fox" and "J. Fox" hold no sentence end."""
    for end in re.finditer(r"[.!?]+[\"')\]\u201d\u2019]*(?=\s)", text):
        if not re.search(r"\b(?:Mrs?|Ms|Dr|St|[A-Z])\.$", text[: end.end()]):
            return text[: end.end()]
    return text


@contextmanager
def picture_errors():
    """One ValueError for all that Pillow's parsers raise on damaged bytes, from SyntaxError to zlib.error."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"no readable {', '.join(PICTURE_FORMATS)} picture: {first_line(error)}") from error


def keeps_its_bytes(image) -> bool:
    return image.format == "JPEG" and image.mode == "RGB"


def decode_picture(data: bytes):
    """The decoded PIL image of an encoded picture; ValueError if it cannot be decoded. One that keeps its bytes comes
    at an eighth of its size: they are all read, in a fraction of the time."""
    from PIL import Image

    with picture_errors(), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
        if keeps_its_bytes(image):
            image.draft(None, (1, 1))
        image.load()  # a truncated file passes open() and verify()
        return image


def rgb_jpeg(data: bytes) -> bytes:
    """An RGB JPEG of any readable picture, the same bytes if it is one; ValueError if it is unreadable."""
    from PIL import Image, ImageOps

    image = decode_picture(data)
    if keeps_its_bytes(image):
        return data
    with picture_errors():
        image = ImageOps.exif_transpose(image).convert("RGBA")
        page = Image.new("RGBA", image.size, "white")  # a transparent place shows white, not black
        return encode(Image.alpha_composite(page, image).convert("RGB"), "JPEG", quality=95)


def encode(image, picture_format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, picture_format, **options)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------------
# Writing a split. A source is an iterable of Sample (a story) or str (why a row was skipped). It has the number
# of rows it announces (`expected`) and the state_dict() and load_state_dict() of a datasets stream: the state
# is JSON and stands right behind what was yielded last.


@dataclass
class Sample:
    """One story: its row without paths, its encoded pictures, and which of them stands for the whole."""

    row: dict
    pictures: list[bytes]
    cover: int = 0
    panel_texts: list[str] = field(default_factory=list)  # one for each of the first pictures, or none at all


class Indexed:
    """A source that can start anywhere: `items_from(start)` yields its items from index `start` on."""

    def __init__(self, items_from: Callable[[int], Iterable], expected: int | None = None):
        self.items_from, self.expected, self.next = items_from, expected, 0

    def __iter__(self) -> Iterator:
        for item in self.items_from(self.next):
            self.next += 1
            yield item

    def state_dict(self) -> dict:
        return {"next": self.next}

    def load_state_dict(self, state: dict):
        self.next = state["next"]


class SplitWriter:
    """Appends stories to one split's folder; those before the last checkpoint survive any kind of stop."""

    def __init__(self, folder: Path, settings: dict, shard: Shard):
        self.folder, self.settings, self.shard = folder, settings, shard
        name = "-".join(filter(None, ["stories", shard.name])) + ".jsonl"
        self.final, self.record = folder / name, folder / f".source{shard.name}.json"
        self.part, self.state = folder / f"{name}.part", folder / f"{name}.state"
        self.images = folder / "images" / shard.name
        self.rows, self.skipped = 0, Counter()
        self.pool, self.unwritten = ThreadPoolExecutor(os.cpu_count()), []  # pictures, since the last checkpoint

    def complete_rows(self) -> int | None:
        """The number of stories of a complete split of these settings; None if the split is not complete."""
        for other in self.folder.glob("stories*.jsonl*"):
            if other.name.partition("-of-")[2][:5] != self.shard.name.partition("-of-")[2]:
                advice = "Delete or move that folder."
                raise DataError(f"{self.folder} holds {other.name}, of another --num_shards. {advice}")
        if not self.final.exists():
            return None
        record = read_json(self.record) or {"settings": "unknown"}
        self.check_settings(record["settings"])
        self.state.unlink(missing_ok=True)  # left by a stop between the last two lines of finish()
        return record["rows"]

    def check_settings(self, found):
        if found != self.settings:
            there, asked = json.dumps(found), json.dumps(self.settings)
            advice = "Delete or move that folder, or choose another --data_root."
            raise DataError(f"{self.folder} holds other data.\n  there: {there}\n  asked: {asked}\n{advice}")

    def open(self, source):
        """Go on after the last checkpoint, or start."""
        self.images.mkdir(parents=True, exist_ok=True)
        state = read_json(self.state)
        if state:
            self.check_settings(state["settings"])
            source.load_state_dict(state["source"])
            self.rows, self.skipped = state["rows"], Counter(state["skipped"])
            log(f"{self.folder}: going on after {self.rows} stories")
        self.part.touch()
        self.stream = self.part.open("rb+")
        self.stream.truncate(state["bytes"] if state else 0)
        self.stream.seek(0, os.SEEK_END)

    def add(self, sample: Sample):
        paths = [self.add_picture(n, data, len(sample.pictures)) for n, data in enumerate(sample.pictures)]
        row = {**sample.row, "image_path": paths[sample.cover]}
        if sample.panel_texts:
            row["panels"] = [{"text": t, "image_path": p} for t, p in zip(sample.panel_texts, paths)]
        self.stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.rows += 1

    def add_picture(self, n: int, data: bytes, count: int) -> str:
        stem = f"{self.rows:06d}" if count == 1 else f"{self.rows:06d}_{n}"
        suffix = next(suffix for magic, suffix in PICTURE_SUFFIXES.items() if data.startswith(magic))
        path = self.images / (stem + suffix)
        self.unwritten.append(self.pool.submit(write_through, path, data))
        return path.relative_to(self.folder).as_posix()

    def checkpoint(self, source):
        """Pictures, then rows, then the state that vouches for both."""
        for written in self.unwritten:
            written.result()
        self.unwritten.clear()
        self.stream.flush()
        os.fsync(self.stream.fileno())
        state = {"settings": self.settings, "rows": self.rows, "bytes": self.stream.tell()}
        write_json(self.state, {**state, "skipped": self.skipped, "source": source.state_dict()})

    def finish(self, expected: int, limit: int | None):
        """Judge what was read and, if it will do, make it the split."""
        self.stream.close()
        self.pool.shutdown()
        skipped = self.skipped.total()
        seen = self.rows + skipped
        reasons = f"{skipped} of {seen} rows skipped ({', '.join(f'{n} {why}' for why, n in self.skipped.items())})"
        if (self.rows == 0 and expected) or skipped > max(SKIP_HANDFUL, SKIP_SHARE * seen):
            advice = "The source is damaged or has changed: delete the folder and retry, or use another --source."
            raise DataError(f"{self.folder}: {reasons}. {advice}")
        if skipped:
            log(f"{self.folder}: {reasons}")
        if self.rows != limit and seen != expected:
            log(f"{self.folder}: note: {expected} rows were expected, the source has {seen}")
        write_json(self.record, {"settings": self.settings, "rows": self.rows, "skipped": self.skipped})
        os.replace(self.part, self.final)
        self.state.unlink()


def build_split(folder: Path, settings: dict, shard: Shard, open_source: Callable, limit: int | None = None) -> int:
    """Write one split, go on with it, or leave it alone if it is complete. Returns its number of stories."""
    writer, limit = SplitWriter(folder, settings, shard), shard.size(limit)
    rows = writer.complete_rows()
    if rows is not None:
        print(f"{folder}: {rows} stories, already complete", flush=True)
        return rows
    source = open_source()
    writer.open(source)
    copy_samples(source, writer, limit)
    writer.checkpoint(source)
    writer.finish(source.expected, limit)
    print(f"{folder}: {writer.rows} stories from {settings['source']}", flush=True)
    return writer.rows


def copy_samples(source, writer: SplitWriter, limit: int | None):
    from tqdm import tqdm

    total = min(source.expected, limit or source.expected)
    # disable=None: silent where standard error is not a terminal
    with tqdm(total=total, initial=writer.rows, desc=str(writer.folder), unit=" stories", disable=None) as bar:
        for sample in source:
            if writer.rows == limit:
                break
            if isinstance(sample, str):
                writer.skipped[sample] += 1
                continue
            writer.add(sample)
            bar.update()
            if writer.rows % CHECKPOINT_ROWS == 0:
                writer.checkpoint(source)


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_through(path: Path, data: bytes):
    """To the disk, not only to the system's memory."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value):
    """Replace `path` in one step: it holds the old value or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    write_through(temporary, json.dumps(value).encode())
    os.replace(temporary, path)


def json_lines(path, start: int, shard: Shard = WHOLE) -> Iterator:
    """The values of a shard's lines in a JSONL file, from its line index `start` on; None for a line that is not
    JSON."""
    with open(path, "rb") as file:
        for line in itertools.islice(file, shard.index + start * shard.count, None, shard.count):
            try:
                yield json.loads(line)
            except ValueError:
                yield None


def sha256(*paths) -> str:
    """Of the contents of all these files, one after the other; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Source m3it


def build_m3it(data_root: Path, limits: Limits, shard: Shard = WHOLE) -> dict[str, int]:
    """Stream M3IT's paragraphs into data_root/{train,val}; stories per split. DataError without a hub."""
    rows = {}
    for split, limit in limits.items():
        settings = {"source": "m3it", "max_samples": limit}
        source = functools.partial(M3ITSource, split, shard)
        rows[split] = build_split(data_root / split, settings, shard, source, limit)
    return rows


class M3ITSource:
    """One split of M3IT. Its state names the data it was read from, since a position holds only there, and how many
    records of the chunk that begins at the position have been taken."""

    def __init__(self, split: str, shard: Shard = WHOLE):
        self.expected, self.taken = shard.size(M3IT_ROWS[split]), 0
        with hub_errors():
            self.origin, self.records = open_m3it(split, shard)
        self.position = self.records.state_dict()
        log(f"{split}: reading {self.origin}")

    def __iter__(self) -> Iterator[Sample | str]:
        before = self.taken
        for position, samples in self.chunks():
            for taken, sample in enumerate(samples, 1):
                if taken > before:
                    self.position, self.taken = position, taken
                    yield sample.result()
            before = 0

    def chunks(self) -> Iterator[tuple[dict, list[Future]]]:
        """Where each chunk of records begins, and its samples: pictures are decoded on all cores (Pillow leaves the
        interpreter free) while the next chunk is read."""
        with hub_errors(), ThreadPoolExecutor(os.cpu_count()) as pool:
            records, ahead = iter(self.records), None
            while True:
                position = self.records.state_dict()
                samples = [pool.submit(m3it_sample, record) for record in itertools.islice(records, M3IT_CHUNK)]
                if ahead:
                    yield ahead
                if not samples:
                    return
                ahead = position, samples

    def state_dict(self) -> dict:
        return {"origin": self.origin, "position": self.position, "taken": self.taken}

    def load_state_dict(self, state: dict):
        if state["origin"] != self.origin:
            advice = "Delete the split's folder and start again."
            raise DataError(f"The unfinished split is from {state['origin']}, not {self.origin}. {advice}")
        self.position, self.taken = state["position"], state.get("taken", 0)
        self.records.load_state_dict(self.position)


def open_m3it(split: str, shard: Shard):
    """(name of the exact data, stream of its records). Where no hub answers, a cached raw file will do."""
    from huggingface_hub import errors

    try:
        return open_m3it_parquet(split, shard)
    except (FileNotFoundError, errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as error:
        log(f"{split}: no parquet branch ({first_line(error)}); downloading the raw file")
        return open_m3it_raw(split, shard, local_files_only=False)
    except hub_exceptions() as error:
        try:
            return open_m3it_raw(split, shard, local_files_only=True)
        except errors.LocalEntryNotFoundError:
            raise error from None  # that the cache is empty is no news; why the hub does not answer is


def open_m3it_parquet(split: str, shard: Shard):
    import datasets
    from datasets.distributed import split_dataset_by_node
    from huggingface_hub import HfApi

    datasets.config.TORCH_AVAILABLE = False  # a stream would import it, for seconds, to share with its workers
    commit = HfApi().dataset_info(M3IT_REPO, revision=M3IT_BRANCH).sha
    # A config name in the place of data_dir fails, and without either all 80 subsets are mixed.
    names = {"revision": M3IT_BRANCH, "data_dir": M3IT_SUBSET, "split": M3IT_SPLITS[split]}
    stream = datasets.load_dataset(M3IT_REPO, **names, streaming=True)
    return f"{M3IT_REPO}@{commit}", split_dataset_by_node(stream, shard.index, shard.count)


def open_m3it_raw(split: str, shard: Shard, local_files_only: bool):
    from huggingface_hub import hf_hub_download

    name = M3IT_RAW_FILE.format(split)
    where = dict(repo_type="dataset", local_files_only=local_files_only)
    path = patiently(lambda: hf_hub_download(M3IT_REPO, name, **where))
    blob, digest = Path(path).resolve(), sha256(path)
    # The cache calls a large file by the sha256 that the hub gave for it, and nobody else compares the two.
    if re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != digest:
        raise DataError(f"{blob} is damaged: its sha256 is {digest}. Delete it and run the same command again.")
    lines = functools.partial(json_lines, path, shard=shard)
    return f"{name} sha256 {digest}", Indexed(lines)


def patiently(ask: Callable):
    """Ask again where the hub is only busy: for one file its client does not."""
    from huggingface_hub.errors import HfHubHTTPError

    for seconds in (1, 2, 4):
        try:
            return ask()
        except HfHubHTTPError as error:
            if error.response.status_code not in HUB_BUSY:
                raise
            time.sleep(seconds)
    return ask()


def m3it_sample(record) -> Sample | str:
    """A record of either layout as a sample, or why it is skipped."""
    if not isinstance(record, dict):
        return "not a JSON object"
    text = next((record[key] for key in M3IT_TEXT_KEYS if record.get(key)), None)
    encoded = next((record[key] for key in M3IT_PICTURE_KEYS if record.get(key)), None)
    encoded = encoded[0] if isinstance(encoded, list) else encoded
    if not is_text(text):
        return "without text"
    if not is_text(encoded):
        return "without picture"
    try:
        picture = rgb_jpeg(base64.b64decode(encoded))
    except ValueError:
        return "with undecodable picture"
    story = " ".join(text.split())
    return Sample({"prompt": first_sentence(story), "story": story}, [picture])


@functools.cache
def hub_exceptions() -> tuple[type[Exception], ...]:
    """What the hub's clients raise where it does not answer or does not have what was asked."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.utils import httpx
    from pyarrow import ArrowException

    return OSError, httpx.HTTPError, DatasetsError, ArrowException


@contextmanager
def hub_errors():
    """Turn a failure of the hub into one message with the ways out."""
    try:
        yield
    except hub_exceptions() as error:
        from huggingface_hub import constants

        raise DataError(
            f"Cannot read {M3IT_REPO} from {constants.ENDPOINT}: {first_line(error)}\n"
            "  - The embedded stories need no network: python download_data.py --source storyworld\n"
            "  - Take stories of your own: python download_data.py --source folder PATH\n"
            "  - Set HF_ENDPOINT to a mirror that answers. Or fill the cache where there is a network, with\n"
            f'    hf download {M3IT_REPO} --repo-type dataset --include "{M3IT_RAW_FILE.format("*")}",\n'
            "    and run this again with HF_HOME set to that cache and HF_HUB_OFFLINE=1.\n"
            "What has been read stays, and the same command goes on from there."
        ) from error


# ------------------------------------------------------------------------------------------------------------
# Source storyworld


def build_storyworld(data_root: Path, limits: Limits, shard: Shard = WHOLE, seed: int = 0) -> dict[str, int]:
    """Draw the embedded world into data_root/{train,val}; stories per split."""
    world = sha256(*sorted(WORLD_FOLDER.glob("world*.py")))[:16]
    rows = {}
    for split, limit in limits.items():
        count = limit or WORLD_STORIES[split]
        first = WORLD_FIRST_SEED[split] + seed * WORLD_SEED_BLOCK
        settings = {"source": "storyworld", "seed": seed, "stories": count, "world": world}
        seeds = shard.of(range(first, first + count))
        draw = functools.partial(draw_stories, seeds)
        source = functools.partial(Indexed, draw, len(seeds))
        rows[split] = build_split(data_root / split, settings, shard, source)
    return rows


def draw_stories(seeds: range, start: int) -> Iterator[Sample]:
    """The stories of seeds[start:] in order, drawn on all cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with multiprocessing.Pool(cores, initializer=follow_parent) as pool:
        yield from pool.imap(draw_story, seeds[start:], chunksize=8)


def follow_parent():
    """Leave Ctrl-C to the parent, and end with it even where it was killed and could not say so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def draw_story(seed: int) -> Sample:
    world = load_world()
    story = world.write_story(seed)
    panels = [world.draw_panel(story, beat, WORLD_PICTURE_SIZE) for beat in range(len(story.beats))]
    pictures = [encode(panel, "PNG", compress_level=2) for panel in panels]  # 2: half of the default's time
    row = {"prompt": story.prompt, "story": story.text, "factors": story.factors}
    return Sample(row, pictures, len(panels) - 1, list(story.beats))


@functools.cache
def load_world():
    """assets/storyworld/world.py, which is no package, as the module `world`."""
    sys.path.insert(0, str(WORLD_FOLDER))
    import world

    return world


# ------------------------------------------------------------------------------------------------------------
# Source folder


@dataclass
class FolderRow:
    """A row in our names, the folder its paths start from, and its place "file:line" for messages."""

    fields: dict
    folder: Path
    place: str


def build_folder(path: Path, data_root: Path, limits: Limits, shard: Shard = WHOLE, seed: int = 0) -> dict[str, int]:
    """Check the stories in the folder `path` and copy them to data_root/{train,val}; stories per split.

    Raises DataError with file, line and remedy of up to ten bad rows; nothing has been written then.
    """
    tables = find_tables(path)
    settings = {"source": "folder", "path": str(path.resolve()), "tables": sha256(*tables.values())[:16]}
    if "all" in tables:
        settings["seed"] = seed
    checked = functools.cache(lambda: check_tables(tables, seed))  # both splits, before either is written
    rows = {}
    for split, limit in limits.items():
        settings["max_samples"] = limit
        source = functools.partial(lambda split: copies(shard.of(checked()[split])), split)
        rows[split] = build_split(data_root / split, settings, shard, source, limit)
    return rows


def copies(rows: list[FolderRow]) -> Indexed:
    return Indexed(lambda start: map(folder_sample, rows[start:]), len(rows))


def find_tables(path: Path) -> dict[str, Path]:
    """The tables of train and val, or {"all": table} where there is one only, to be divided."""
    tables = {}
    for split, names in FOLDER_SPLITS.items():
        found = [path / name / table for name in names for table in FOLDER_TABLES]
        if table := next(filter(Path.is_file, found), None):
            tables[split] = table
    if "train" in tables and "val" in tables:
        return {"train": tables["train"], "val": tables["val"]}
    if not tables:
        names = ", ".join(FOLDER_TABLES)
        raise DataError(f"No stories in {path}: put one of {names} there, or into train/ and val/ below it.")
    return {"all": next(iter(tables.values()))}


def check_tables(tables: dict[str, Path], seed: int) -> dict[str, list[FolderRow]]:
    """The rows of train and val, each of them checked; DataError with the first bad ones."""
    splits = {split: read_table(table) for split, table in tables.items()}
    rows = list(itertools.chain(*splits.values()))
    problems = [f"{row.place}: {problem}" for row in rows if (problem := row_problem(row))]
    if problems:
        head = f"{len(problems)} of {len(rows)} rows cannot be used; correct or remove them:"
        raise DataError("\n".join([head, *problems[:10], *(["..."] if len(problems) > 10 else [])]))
    strange = sum(not row.fields["story"].startswith(row.fields.get("prompt", "")) for row in rows)
    if strange:
        log(f"note: {strange} prompts do not open their story; the model writes a story on from its prompt")
    return divide(splits["all"], seed) if "all" in splits else splits


def read_table(table: Path) -> list[FolderRow]:
    if table.suffix == ".csv":
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            numbered = [(reader.line_num, fields) for fields in reader]
    else:
        numbered = enumerate(json_lines(table, 0), start=1)
    rows = [FolderRow(our_names(fields), table.parent, f"{table}:{line}") for line, fields in numbered]
    if not rows:
        raise DataError(f"{table} has no rows.")
    return rows


def our_names(fields):
    """The hub's imagefolder names replaced by ours; what is no object stays as it is, for row_problem."""
    if not isinstance(fields, dict):
        return fields
    return {FOLDER_NAMES.get(name, name): value for name, value in fields.items()}


def row_problem(row: FolderRow) -> str | None:
    """What is wrong with a row and what to do, or None."""
    fields = row.fields
    if not isinstance(fields, dict):
        return "no JSON object; write one row a line"
    if not is_text(fields.get("story")):
        return '"story" (or "text", "caption") must be a text that is not empty'
    if "prompt" in fields and not is_text(fields["prompt"]):
        return '"prompt" must be a text that is not empty; without it, the first sentence is taken'
    panels = fields.get("panels", [])
    if not isinstance(panels, list) or not all(isinstance(p, dict) and is_text(p.get("text")) for p in panels):
        return '"panels" must be a list of {"text", "image_path"}, with texts that are not empty'
    paths = [fields.get("image_path"), *(panel.get("image_path") for panel in panels)]
    return next(filter(None, (picture_problem(row.folder, path) for path in paths)), None)


def picture_problem(folder: Path, path) -> str | None:
    if not is_text(path):
        return '"image_path" (or "file_name") must name a picture'
    file = (folder / path).resolve()
    if not file.is_relative_to(folder.resolve()):
        return f"{path} is outside {folder}; copy the picture into that folder"
    if not file.is_file():
        return f"{path} does not exist in {folder}"
    try:
        decode_picture(file.read_bytes())
    except ValueError as error:
        return f"{path} is {error}"
    return None


def divide(rows: list[FolderRow], seed: int) -> dict[str, list[FolderRow]]:
    """A seeded tenth of the stories for val. Rows of one title, or of the same text, are one story."""
    story_of = [row.fields.get("title") or row.fields["story"] for row in rows]
    stories = list(dict.fromkeys(story_of))
    if len(stories) < 2:
        raise DataError(f"{rows[0].folder} has a single story; at least two are needed, one of them for val.")
    val = set(random.Random(seed).sample(stories, max(1, round(FOLDER_VAL_SHARE * len(stories)))))
    return {
        "train": [row for row, story in zip(rows, story_of) if story not in val],
        "val": [row for row, story in zip(rows, story_of) if story in val],
    }


def folder_sample(row: FolderRow) -> Sample:
    """A checked row and its pictures as they are, each once however often the row names it."""
    fields = {"prompt": first_sentence(row.fields["story"]), **row.fields}
    cover, panels = fields.pop("image_path"), fields.pop("panels", [])
    paths = [panel["image_path"] for panel in panels]
    if cover not in paths:
        paths.append(cover)
    pictures = [(row.folder / path).read_bytes() for path in paths]
    return Sample(fields, pictures, paths.index(cover), [panel["text"] for panel in panels])


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Build data/train and data/val: stories.jsonl and the pictures beside it.",
        epilog="Stopped at any moment, the same command goes on from there.",
    )
    add = parser.add_argument
    add("path", type=Path, nargs="?", metavar="PATH", help="the folder with your stories, for --source folder")
    add("--source", choices=("m3it", "storyworld", "folder"), default="m3it", help="default: m3it")
    add("--data_root", type=Path, default=Path("data"), help="where train/ and val/ go; default: data")
    add("--seed", type=int, default=0, help="of the storyworld, or of a val that is split off; default: 0")
    add("--max_train_samples", type=int, metavar="N", help="default: all, of the storyworld 2,000")
    add("--max_val_samples", type=int, metavar="N", help="default: all, of the storyworld 256")
    add("--num_shards", type=int, default=1, metavar="N", help="make one of N parts of the data; default: 1, the whole")
    add("--shard_index", type=int, default=0, metavar="I", help="which of them, from 0 on")
    args = parser.parse_intermixed_args(argv)  # intermixed: PATH stands before or after any flag
    if (args.source == "folder") != (args.path is not None):
        parser.error("--source folder and PATH go together")
    if not 0 <= args.shard_index < args.num_shards <= 99_999:
        parser.error(f"--shard_index must be from 0 to --num_shards - 1, not {args.shard_index} of {args.num_shards}")
    args.shard = Shard(args.shard_index, args.num_shards)
    args.limits = {"train": args.max_train_samples, "val": args.max_val_samples}
    for limit in args.limits.values():
        if limit is not None and not 1 <= limit <= WORLD_SEED_BLOCK:
            parser.error(f"the number of samples must be from 1 to {WORLD_SEED_BLOCK:,}, not {limit}")
    if args.source == "storyworld" and not 0 <= args.seed < WORLD_SEEDS:
        parser.error(f"--seed must be from 0 to {WORLD_SEEDS - 1} for the storyworld, not {args.seed}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        if args.source == "m3it":
            build_m3it(args.data_root, args.limits, args.shard)
        elif args.source == "storyworld":
            build_storyworld(args.data_root, args.limits, args.shard, args.seed)
        else:
            build_folder(args.path, args.data_root, args.limits, args.shard, args.seed)
    except DataError as error:
        log(f"download_data.py: {error}")
        return 1
    except OSError as error:  # a full disk, a folder that may not be written
        log(f"download_data.py: {error}. Correct that; the same command goes on from here.")
        return 1
    except KeyboardInterrupt:
        log("Stopped; the same command goes on from here.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
