"""Build data/train and data/val: the stories and pictures that story_generative_model.py reads.

    python download_data.py                           # M3IT image paragraphs, streamed from the hub
    python download_data.py --source storyworld       # the embedded world, drawn here: no network
    python download_data.py --source folder PATH      # your own stories
    python download_data.py --source hub --dataset_name roneneldan/TinyStories --caption_column text

Each split is a folder with `stories.jsonl`, one JSON object a line, and the pictures it names:

    {"prompt": "...", "story": "...", "image_path": "images/000000.jpg"}

`prompt` opens the story: its first sentence where the source has no prompts. A story without a
picture has no `image_path`. A story in parts has `panels`: [{"text", "image_path"}, ...] in order.

m3it        MMInstruction/M3IT, image-paragraph-captioning, in the hub's order; train -> train,
            validation -> val. Read from the parquet branch; from the raw JSONL file where that
            branch is missing or only a filled cache is at hand. Every picture becomes an RGB JPEG.
hub         Any data set that the datasets library streams, by its column of texts and, where there
            is one, of pictures. Lists in them are the panels of a story; one text beside a list of
            pictures is divided between them, sentence by sentence.
folder      PATH/train and PATH/val, or one of the two to be divided, or a single file: tables in
            the layout above, in the hub's imagefolder layout or with the columns of a hub's data
            set (JSON lines, JSON, CSV, TSV, parquet); or texts (.txt), each a story, with a picture
            of the same name beside it or none. Every row is checked before the first is copied.
storyworld  Story i of a split has the seed first + i, where first is seed * 10**7 for train and
            5 * 10**8 more for val. With seed < 50 and at most 10**7 stories the splits never meet,
            and both stay below 10**9, where the stories begin that the embedded backbones are
            measured on. Rows carry their `factors`.

Where a source has no validation split, a seeded tenth of its stories becomes val. From the hub and
from parquet, rows that cannot be used are skipped and counted; too many of them are an error.

With --num_shards N, N processes or machines that share the folder make a part each (--shard_index 0
to N - 1), stories-IIIII-of-NNNNN.jsonl, of every Nth row. The trainer reads them as one split.

Stopped at any moment, the same command goes on from there and gives the same bytes: rows collect in
`stories.jsonl.part`, `stories.jsonl.state` says how far they are safe on disk, and `stories.jsonl`
appears when the split is complete. `.source.json` keeps the settings: other settings never mix with
what is there, and `.lock` keeps a second process out.

One line per split goes to standard output, the rest to standard error. Exit status: 0 done, 1 no
usable data (the message says what to do), 2 bad arguments, 130 interrupted.
"""

import argparse
import base64
import codecs
import csv
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

M3IT_REPO, M3IT_BRANCH = "MMInstruction/M3IT", "refs/convert/parquet"
M3IT_SUBSET = "image-paragraph-captioning"
M3IT_RAW_FILE = "data/captioning/image_paragraph_captioning/image_paragraph_captioning_{}.jsonl"
M3IT_SPLITS = {"train": "train", "val": "validation"}  # ours -> the parquet branch's
M3IT_ROWS = {"train": 14_575, "val": 2_487}  # as published: for the progress bar and a note
M3IT_TEXT_KEYS = ("outputs", "output")  # parquet branch, raw files
M3IT_PICTURE_KEYS = ("image_base64_str", "image_str", "img_str", "image")
HUB_BUSY = {429, 500, 502, 503, 504}  # statuses that are worth another try
CHUNK_RECORDS = 16  # records of a stream that are decoded side by side

WORLD_FOLDER = Path(__file__).resolve().parent / "assets" / "storyworld"
WORLD_STORIES = {"train": 2_000, "val": 256}
WORLD_FIRST_SEED = {"train": 0, "val": 5 * 10**8}
WORLD_SEED_BLOCK = 10**7  # stories per --seed, of which there are so many that val ends at 10**9:
WORLD_SEEDS = 50
WORLD_PICTURE_SIZE = 128  # pixels

SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "dev")}
VAL_SHARE = 0.1  # of the stories, where there is no validation split
HOLD_OUT_RECORDS = 1_000  # of a stream: enough to know where the lowest tenth of the hashes ends
COLUMN_NAMES = {  # ours -> what they are called elsewhere, the first one that is there
    "story": ("story", "text", "caption"),
    "image_path": ("image_path", "image", "file_name", "file_names"),
    "prompt": ("prompt",),
    "title": ("title",),
}
FOLDER_TABLES = ("stories.jsonl", "metadata.jsonl", "metadata.csv")
FOLDER_SUFFIXES = ((".parquet",), (".jsonl", ".csv", ".tsv"), (".json",), (".txt",))
PACKED = (b"PK\3\4", b"\x1f\x8b", b"\xd0\xcf\x11\xe0")  # zip (so .xlsx, .ods), gzip, .xls
BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
STORY_BYTES = 500_000  # the trainer's rows, where panels hold a story again, end at twice that

PICTURE_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp"}
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")  # what the trainer reads; those become JPEG:
OTHER_SUFFIXES = (".jpeg", ".avif", ".heic", ".heif", ".gif", ".bmp", ".tif", ".tiff", ".jp2")
OTHER_FORMATS = ("AVIF", "HEIF", "GIF", "BMP", "TIFF", "JPEG2000")
CHECKPOINT_ROWS = 64
SKIP_HANDFUL, SKIP_SHARE = 5, 0.01  # more skipped rows than both allow is an error

CLOSERS = "\"')\\]\u201d\u2019\u00bb\u300d\u300f\uff09"  # quotation marks and brackets
EMOJI = "[\u2600-\u27bf\U0001f300-\U0001faff][\u200d\ufe0f\u2600-\u27bf\U0001f300-\U0001faff]*"
SENTENCE_END = re.compile(
    # A full stop ends a sentence before a space only (2.5 m); those of Chinese and Japanese, Arabic
    # and Urdu, Hindi, Burmese, Khmer, Ethiopic, Armenian and Tibetan stand nowhere else.
    rf"(?:[.!?\u2026]+[{CLOSERS}]*(?:{EMOJI})?(?=\s|$)"
    r"|[\u3002\uff01\uff1f\uff61\u061f\u06d4\u0964\u0965\u104b\u17d4\u1362\u0589\u0f0e]+"
    rf"[{CLOSERS}]*"
    rf"|{EMOJI}(?=\s+[^\Wa-z\d_])"  # before a word that is not in lower case
    r"|(?=\n\s*\n))"  # a heading ends with its paragraph
)
ABBREVIATION = re.compile(r"\b(?:Mrs?|Ms|Dr|St|[A-Z])\.$")
LONG_SENTENCE = 400  # characters: no prompt is as long; it is cut to these then
PROMPT_WORDS, PROMPT_CHARACTERS = 12, 100

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


# --------------------------------------------------------------------------------------------------
# Text and pictures


def log(message: str):
    print(message, file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_text(value) -> bool:
    """A string that is not blank, and has no lone surrogate (JSON may hold one, UTF-8 may not)."""
    if not isinstance(value, str) or not value.strip():
        return False
    return value.isascii() or not re.search("[\ud800-\udfff]", value)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, in any script; joined, they are the text. What has no letter or
    digit is no sentence of its own, and "Mr. Fox" and "J. Fox" hold no sentence end."""
    start = 0
    for end in SENTENCE_END.finditer(text):
        sentence = text[start : end.end()]
        if re.search(r"\w", sentence) and not ABBREVIATION.search(sentence):
            yield sentence
            start = end.end()
    if start < len(text):
        yield text[start:]


def first_sentence(text: str) -> str:
    """The prompt of a story: its first sentence, or its first dozen words where that is the whole
    story or does not end soon, as in a list of tags."""
    text = text.strip()
    first = next(sentences(text))
    if len(first) < min(len(text), LONG_SENTENCE):
        return first
    words = re.match(rf"(?:\S+\s+){{0,{PROMPT_WORDS - 1}}}\S+", first)[0]
    if len(words) <= PROMPT_CHARACTERS:
        return words
    return words[:PROMPT_CHARACTERS].rsplit(None, 1)[0]


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32, or else in the cp1252 of Western spreadsheets.
    DataError with the line where it is none of them: a guess must not garble a story."""
    data = path.read_bytes()
    if data.startswith(PACKED):
        raise DataError(
            f"{path} is packed or a spreadsheet; unpack it, or save it as CSV in UTF-8."
        )
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "")
    if not encoding and data[:1000].count(b"\0") > len(data[:1000]) // 4:  # not a stray one
        encoding = "utf-16-be" if data.startswith(b"\0") else "utf-16-le"
    try:
        text = data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
    else:
        if "\0" in text:
            line = text[: text.index("\0")].count("\n") + 1
            raise DataError(f"{path}:{line} holds a NUL; remove it, or save the file as UTF-8.")
        return text
    place, text = f"{path}:{line}", data.decode("cp1252", "replace")
    foreign = sum(not letter.isascii() for letter in text)
    # Accents and quotation marks are few; where every other letter is foreign, it is no cp1252.
    if encoding or "\ufffd" in text or foreign > 0.2 * len(text):
        raise DataError(f"{place} is not {(encoding or 'utf-8').upper()}; save the file as UTF-8.")
    sample = re.search(r".{0,20}[^\0-\x7f].{0,20}", text)[0]
    log(f"note: {place} is not UTF-8; the file is read as cp1252: {sample!r}")
    return text


@contextmanager
def picture_errors():
    """One ValueError for all that Pillow's parsers raise on damaged bytes."""
    try:
        yield
    except Exception as error:  # from SyntaxError to zlib.error
        raise ValueError(f"no readable picture: {first_line(error)}") from error


@functools.cache
def picture_formats() -> list[str]:
    """The formats to open. No other of Pillow's parsers, some of which run programs, is asked."""
    from PIL import Image

    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return [name for name in PICTURE_FORMATS + OTHER_FORMATS if name in Image.OPEN]


def is_rgb_jpeg(image) -> bool:
    return image.format == "JPEG" and image.mode == "RGB"


def decode_picture(data: bytes):
    """The decoded PIL image of an encoded picture; ValueError if it cannot be decoded. An RGB JPEG,
    which keeps its bytes, comes at an eighth of its size: they are all read, in a fraction of the
    time."""
    from PIL import Image

    with picture_errors(), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if re.match(rb"ftyp(hei|hev|mif)", data[4:11]) and "HEIF" not in picture_formats():
            raise ValueError("HEIC needs one more package: pip install pillow-heif")
        image = Image.open(io.BytesIO(data), formats=picture_formats())
        if is_rgb_jpeg(image):
            image.draft(None, (1, 1))
        image.load()  # a truncated file passes open() and verify()
        return image


def rgb_jpeg(data: bytes) -> bytes:
    """An RGB JPEG of a picture, the same bytes if it is one; ValueError if it is unreadable."""
    image = decode_picture(data)
    return data if is_rgb_jpeg(image) else encode_jpeg(image)


def readable_picture(data: bytes) -> bytes:
    """The same bytes where the trainer reads them, else an RGB JPEG; ValueError if unreadable."""
    image = decode_picture(data)
    return data if image.format in PICTURE_FORMATS else encode_jpeg(image)


def encode_jpeg(image) -> bytes:
    from PIL import Image, ImageOps

    with picture_errors():
        image = ImageOps.exif_transpose(image).convert("RGBA")
        page = Image.new("RGBA", image.size, "white")  # a transparent place shows white, not black
        return encode(Image.alpha_composite(page, image).convert("RGB"), "JPEG", quality=95)


def encode(image, picture_format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, picture_format, **options)
    return out.getvalue()


# --------------------------------------------------------------------------------------------------
# Stories. A record of any source becomes `fields` in our names: "story", "image_path" (a picture of
# any kind), "panels", "prompt", "title".


def our_names(names: Iterable[str], asked: dict[str, str | None]) -> dict[str, str]:
    """The columns to take and what we call them: those asked for, or the usual ones."""
    known, ours = {name.strip().lower(): name for name in names}, {}
    for column, usual in COLUMN_NAMES.items():
        wanted = (asked[column],) if asked.get(column) else usual
        if found := next((known[name.lower()] for name in wanted if name.lower() in known), None):
            ours[found] = column
    return ours


def renamed(record: dict, names: dict[str, str]) -> dict:
    """A record in our names, lists of texts and pictures as panels. Other columns stay."""
    fields = {name.strip(): value for name, value in record.items() if name not in names}
    fields |= {names[name]: value for name, value in record.items() if name in names}
    fields = {name: value for name, value in fields.items() if value not in (None, "", [])}
    texts, pictures = fields.get("story"), fields.get("image_path")
    if isinstance(pictures, list):
        fields["image_path"] = pictures[-1]  # as a story's own picture, that of its end
        if is_text(texts) and len(pictures) > 1:
            texts = between_pictures(texts, len(pictures))
    if isinstance(texts, list) and "panels" not in fields:
        if not isinstance(pictures, list):
            pictures = [None] * len(texts)
        pairs = [{"text": text, "image_path": path} for text, path in zip(texts, pictures)]
        fields["panels"] = pairs if len(texts) == len(pictures) else None
        if isinstance(fields["story"], list) and all(map(is_text, texts)):
            fields["story"] = " ".join(map(str.strip, texts))
    return fields


def between_pictures(text: str, count: int) -> list[str]:
    """A text in `count` parts of about as many sentences, or words where it has too few of them."""
    parts = list(sentences(text))
    if len(parts) < count:
        parts = re.findall(r"\S+\s*", text)
    cuts = [round(number * len(parts) / count) for number in range(count + 1)]
    return ["".join(parts[start:end]).strip() for start, end in itertools.pairwise(cuts)]


def text_problem(fields) -> str | None:
    """What is wrong with the texts of a story and what to do, or None."""
    if not is_text(fields.get("story")):
        return '"story" (or "text", "caption") must be a text that is not empty'
    if len(fields["story"].encode()) > STORY_BYTES:
        return f"the story is longer than {STORY_BYTES:,} bytes; divide it"
    if "prompt" in fields and not is_text(fields["prompt"]):
        return '"prompt" must be a text that is not empty; without it, the first sentence is taken'
    panels = fields.get("panels", [])
    if not isinstance(panels, list) or not all(map(is_panel, panels)):
        shape = '"panels" must be a list of {"text", "image_path"}, with texts that are not empty'
        return f"{shape}; lists of texts and of pictures must be equally long"
    return None


def is_panel(panel) -> bool:
    return isinstance(panel, dict) and is_text(panel.get("text"))


def story_sample(fields: dict, read: Callable) -> "Sample":
    """A checked story and its pictures, each once however often it is named; `read` gives bytes."""
    story = fields["story"].strip()
    row = {"prompt": first_sentence(story), **fields, "story": story}
    cover, panels = row.pop("image_path", None), row.pop("panels", [])
    names = [panel.get("image_path") or None for panel in panels]
    if cover is None:
        cover = next(filter(None, reversed(names)), None)
    if cover not in names:
        names.append(cover)
    pictures = [read(name) if name else None for name in names]
    return Sample(row, pictures, names.index(cover), [panel["text"] for panel in panels])


def story_key(fields: dict) -> str:
    """What makes rows one story, so that no part of it is in both splits: its title or its text."""
    return str(fields.get("title") or fields["story"])


def split_hash(story: str, seed: int) -> str:
    return hashlib.sha256(f"{seed} {story}".encode(errors="replace")).hexdigest()


def last_val_hash(stories: Iterable[str], seed: int) -> str | None:
    """Where val ends: a tenth of the stories, one at least, have hashes up to this one. None if
    there is a single story."""
    hashes = sorted({split_hash(story, seed) for story in stories})
    return hashes[max(1, round(VAL_SHARE * len(hashes))) - 1] if len(hashes) > 1 else None


# --------------------------------------------------------------------------------------------------
# Writing a split. A source is an iterable of Sample (a story) or str (why a row was skipped) with
# `expected`, the number of rows it announces (None: unknown), and the state_dict() and
# load_state_dict() of a datasets stream: the state is JSON and stands behind what came last.


@dataclass
class Sample:
    """One story: its row without paths, its encoded pictures (None where a part has none), which of
    them stands for the whole, and the text of each of the first of them, or none at all."""

    row: dict
    pictures: list[bytes | None]
    cover: int = 0
    panel_texts: list[str] = field(default_factory=list)


class Indexed:
    """A source that can start anywhere: `items_from(start)` yields its items from that index on."""

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
    """Appends stories to one split's folder; those before the last checkpoint survive any stop."""

    def __init__(self, folder: Path, settings: dict, shard: Shard):
        self.folder, self.settings, self.shard = folder, settings, shard
        name = "-".join(filter(None, ["stories", shard.name])) + ".jsonl"
        self.final, self.record = folder / name, folder / f".source{shard.name}.json"
        self.part, self.state = folder / f"{name}.part", folder / f"{name}.state"
        self.images = folder / "images" / shard.name
        self.rows, self.skipped = 0, Counter()
        self.pool = ThreadPoolExecutor(os.cpu_count())
        self.unwritten: list[Future] = []  # pictures, since the last checkpoint

    def check_shards(self):
        """DataError where the folder holds, or another process makes, parts of another number."""
        for other in self.folder.glob("stories*.jsonl*"):
            if other.name.partition("-of-")[2][:5] != self.shard.name.partition("-of-")[2]:
                found = f"{self.folder} holds {other.name}, of another --num_shards."
                raise DataError(f"{found} Delete or move that folder.")

    def complete_rows(self) -> int | None:
        """The number of stories of a complete split of these settings, or None."""
        self.check_shards()
        if not self.final.exists():
            return None
        record = read_json(self.record) or {"settings": "unknown"}
        self.check_settings(record["settings"])
        self.state.unlink(missing_ok=True)  # left by a stop between the last two lines of finish()
        return record["rows"]

    def check_settings(self, found):
        if found != self.settings:
            raise DataError(
                f"{self.folder} holds other data.\n"
                f"  there: {json.dumps(found)}\n  asked: {json.dumps(self.settings)}\n"
                "Delete or move that folder, or choose another --data_root."
            )

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
        paths = [self.add_picture(sample, number) for number in range(len(sample.pictures))]
        row = {**sample.row, **paths[sample.cover]}
        if sample.panel_texts:
            row["panels"] = [
                {"text": text, **path} for text, path in zip(sample.panel_texts, paths)
            ]
        line = json.dumps(row, ensure_ascii=False)
        self.stream.write(line.encode(errors="replace") + b"\n")  # a title may hold a surrogate
        self.rows += 1

    def add_picture(self, sample: Sample, number: int) -> dict[str, str]:
        """The "image_path" of a picture, which is being written; {} where there is none."""
        data = sample.pictures[number]
        if data is None:
            return {}
        suffix = next(end for magic, end in PICTURE_SUFFIXES.items() if data.startswith(magic))
        stem = f"{self.rows:06d}" + (f"_{number}" if len(sample.pictures) > 1 else "")
        path = self.images / (stem + suffix)
        self.unwritten.append(self.pool.submit(write_through, path, data))
        return {"image_path": path.relative_to(self.folder).as_posix()}

    def checkpoint(self, source):
        """Pictures, then rows, then the state that vouches for both."""
        for written in self.unwritten:
            written.result()
        self.unwritten.clear()
        self.stream.flush()
        os.fsync(self.stream.fileno())
        state = {"settings": self.settings, "rows": self.rows, "bytes": self.stream.tell()}
        write_json(self.state, {**state, "skipped": self.skipped, "source": source.state_dict()})

    def finish(self, expected: int | None, limit: int | None):
        """Judge what was read and, if it will do, make it the split."""
        self.stream.close()
        self.pool.shutdown()
        skipped = self.skipped.total()
        seen = self.rows + skipped
        why = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
        reasons = f"{skipped} of {seen} rows skipped ({why})"
        # Of a stream whose length nobody knows, one part of many may have no story of val.
        empty = self.rows == 0 and (expected or (expected is None and self.shard == WHOLE))
        if empty or skipped > max(SKIP_HANDFUL, SKIP_SHARE * seen):
            advice = "delete the folder and retry, or use another --source"
            raise DataError(
                f"{self.folder}: {reasons}. The source is damaged, has changed or is not what the "
                f"columns say: {advice}."
            )
        if skipped:
            log(f"{self.folder}: {reasons}")
        if expected is not None and self.rows != limit and seen != expected:
            log(f"{self.folder}: note: {expected} rows were expected, the source has {seen}")
        rows = {"rows": self.rows, "skipped": self.skipped}
        write_json(self.record, {"settings": self.settings, **rows})
        os.replace(self.part, self.final)
        self.state.unlink()


def build_split(
    folder: Path, settings: dict, shard: Shard, open_source: Callable, limit: int | None = None
) -> int:
    """Write one split, go on with it, or leave it alone if it is complete. Returns its number of
    stories."""
    writer, limit = SplitWriter(folder, settings, shard), shard.size(limit)
    rows = writer.complete_rows()
    if rows is not None:
        print(f"{folder}: {rows} stories, already complete", flush=True)
        return rows
    source = open_source()
    with only_process(folder, f".lock{shard.name}", seconds=2):
        if writer.final.exists():
            raise DataError(f"{folder} was completed by another download_data.py just now.")
        with only_process(folder, ".lock-shards", seconds=60):  # for a moment: look, and be seen
            writer.check_shards()
            writer.open(source)
        copy_samples(source, writer, limit)
        writer.checkpoint(source)
        writer.finish(source.expected, limit)
    print(f"{folder}: {writer.rows} stories from {settings['source']}", flush=True)
    return writer.rows


def build_splits(
    data_root: Path, limits: Limits, shard: Shard, settings: dict, open_source: Callable
) -> dict[str, int]:
    """Write train and val of the sources that `open_source(split)` gives; stories per split."""
    rows = {}
    for split, limit in limits.items():
        known, source = settings | {"max_samples": limit}, functools.partial(open_source, split)
        rows[split] = build_split(data_root / split, known, shard, source, limit)
    return rows


@contextmanager
def only_process(folder: Path, name: str, seconds: float):
    """Hold a lock of the folder, which ends with this process in any case; DataError where another
    process keeps it for longer. The children of one that was killed end within two seconds."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / name).acquire(timeout=seconds)
    except Timeout:
        advice = "Wait for it, stop it, or choose another --data_root."
        raise DataError(f"Another download_data.py is writing {folder}. {advice}") from None
    with lock:
        yield


def copy_samples(source, writer: SplitWriter, limit: int | None):
    from tqdm import tqdm

    total = min((count for count in (source.expected, limit) if count is not None), default=None)
    # disable=None: silent where standard error is not a terminal
    title = {"desc": str(writer.folder), "unit": " stories"}
    with tqdm(total=total, initial=writer.rows, **title, disable=None) as bar:
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
    """The values of a shard's lines in a JSONL file, from its line index `start` on."""
    with open(path, "rb") as file:
        for line in itertools.islice(file, shard.index + start * shard.count, None, shard.count):
            yield json_value(line)


def sha256(*paths) -> str:
    """Of the contents of all these files, one after the other; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# The hub: M3IT, and any data set that the datasets library streams


class Stream:
    """A source of streamed records. `convert` makes a Sample of a record, or why it is skipped, or
    None where it is not of this split. The state names the data it was read from, since a position
    holds only there, and how many records of the chunk at the position have been taken."""

    def __init__(self, origin: str, records, convert: Callable, expected: int | None):
        self.origin, self.records, self.convert = origin, records, convert
        self.expected, self.position, self.taken = expected, records.state_dict(), 0
        log(f"reading {origin}")

    def __iter__(self) -> Iterator[Sample | str]:
        with hub_errors(self.origin):
            before = self.taken
            for position, samples in self.chunks():
                for taken, sample in enumerate(samples, 1):
                    if taken > before:
                        self.position, self.taken = position, taken
                        if (result := sample.result()) is not None:
                            yield result
                before = 0

    def chunks(self) -> Iterator[tuple[dict, list[Future]]]:
        """Where each chunk of records begins, and its samples: pictures are decoded on all cores
        (Pillow leaves the interpreter free) while the next chunk is read."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            records, ahead = iter(self.records), None
            while True:
                position = self.records.state_dict()
                chunk = itertools.islice(records, CHUNK_RECORDS)
                samples = [pool.submit(self.convert, record) for record in chunk]
                if ahead:
                    yield ahead
                if not samples:
                    return
                ahead = position, samples

    def state_dict(self) -> dict:
        return {"origin": self.origin, "position": self.position, "taken": self.taken}

    def load_state_dict(self, state: dict):
        if state["origin"] != self.origin:
            found = f"The unfinished split is from {state['origin']}, not {self.origin}."
            raise DataError(f"{found} Delete the split's folder and start again.")
        self.position, self.taken = state["position"], state.get("taken", 0)
        self.records.load_state_dict(self.position)


def build_m3it(data_root: Path, limits: Limits, shard: Shard = WHOLE) -> dict[str, int]:
    """Stream M3IT's paragraphs into data_root/{train,val}; stories per split. DataError without a
    hub."""
    source = functools.partial(m3it_stream, shard=shard)
    return build_splits(data_root, limits, shard, {"source": "m3it"}, source)


def m3it_stream(split: str, shard: Shard) -> Stream:
    with hub_errors(M3IT_REPO):
        origin, records = open_m3it(split, shard)
        return Stream(origin, records, m3it_sample, shard.size(M3IT_ROWS[split]))


def open_m3it(split: str, shard: Shard):
    """(name of the exact data, stream of its records). Where no hub answers, a cached raw file will
    do."""
    from huggingface_hub import errors

    missing = FileNotFoundError, errors.RevisionNotFoundError, errors.RepositoryNotFoundError
    try:
        return open_m3it_parquet(split, shard)
    except missing as error:
        log(f"{split}: no parquet branch ({first_line(error)}); downloading the raw file")
        return open_m3it_raw(split, shard, local_files_only=False)
    except hub_exceptions() as error:
        try:
            return open_m3it_raw(split, shard, local_files_only=True)
        except errors.LocalEntryNotFoundError:
            raise error from None  # why the hub does not answer is news, an empty cache is none


def open_m3it_parquet(split: str, shard: Shard):
    # A config name in the place of data_dir fails, and without either all 80 subsets are mixed.
    where = {"data_dir": M3IT_SUBSET, "split": M3IT_SPLITS[split]}
    origin, stream = load_stream(M3IT_REPO, M3IT_BRANCH, **where)
    return origin, in_parts(stream, shard)


def load_stream(repo: str, revision: str | None = None, **options):
    """(name and commit, stream or streams of a data set), pinned to the commit."""
    from huggingface_hub import HfApi

    info = patiently(lambda: HfApi().dataset_info(repo, revision=revision))
    options["revision"] = revision or info.sha
    return f"{repo}@{info.sha}", patiently(lambda: stream_of(repo, **options))


def stream_of(*where, **options):
    import datasets

    datasets.config.TORCH_AVAILABLE = False  # a stream would import it, for seconds, for nothing
    return datasets.load_dataset(*where, **options, streaming=True)


def in_parts(stream, shard: Shard):
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(stream, shard.index, shard.count)


def open_m3it_raw(split: str, shard: Shard, local_files_only: bool):
    from huggingface_hub import hf_hub_download

    name = M3IT_RAW_FILE.format(split)
    where = dict(repo_type="dataset", local_files_only=local_files_only)
    path = patiently(lambda: hf_hub_download(M3IT_REPO, name, **where))
    blob, digest = Path(path).resolve(), sha256(path)
    # The cache calls a large file by the sha256 that the hub gave for it; nobody else compares.
    if re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != digest:
        advice = "Delete it and run the same command again."
        raise DataError(f"{blob} is damaged: its sha256 is {digest}. {advice}")
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


def build_hub(
    name: str,
    data_root: Path,
    limits: Limits,
    columns: dict[str, str | None],
    shard: Shard = WHOLE,
    seed: int = 0,
    config: str | None = None,
    parquet: dict[str, list[str]] | None = None,
) -> dict[str, int]:
    """Stream a data set of the hub, or the parquet files {split: paths} of a folder `name`, into
    data_root/{train,val}; stories per split. DataError where it cannot be had."""
    if not parquet and Path(name).exists():
        raise DataError(
            f"{name} is a folder here, too: take it with --source folder, or go elsewhere."
        )
    files = sha256(*sorted(itertools.chain(*parquet.values())))[:16] if parquet else None
    settings = {"source": "folder" if parquet else "hub", "dataset_name": name, "seed": seed}
    settings |= {"config": config, "files": files, "columns": columns}

    @functools.cache
    def opened():
        if parquet:
            return f"{name} sha256 {files}", stream_of("parquet", data_files=parquet)
        return load_stream(name, name=config)

    def source(split: str) -> Stream:
        with hub_errors(name):
            return split_stream(*opened(), split, columns, shard, seed)

    return build_splits(data_root, limits, shard, settings, source)


def split_stream(
    origin: str, streams: dict, split: str, columns: dict, shard: Shard, seed: int
) -> Stream:
    """The stories of train or val, which is held out of train's where no split has its name."""
    val = next((name for name in SPLIT_NAMES["val"] if name in streams), None)
    train = "train" if "train" in streams else next((name for name in streams if name != val), val)
    named = val is not None and val != train
    stream = streams[val if named and split == "val" else train]
    names = chosen_columns(origin, stream, columns)
    if stream.features:
        stream = stream.decode(False)  # the bytes as they are; select_columns would decode them
    stream = stream.select_columns(list(names))
    last = None if named else held_out_up_to(origin, stream, names, seed)

    def convert(record: dict) -> Sample | str | None:
        fields = renamed(record, names)
        if problem := text_problem(fields):
            return f"refused: {problem}"
        if last and (split_hash(story_key(fields), seed) <= last) != (split == "val"):
            return None
        if any(map(is_file_name, picture_paths(fields))):
            return "with the name of a picture: the table must hold the picture itself"
        try:
            return story_sample(fields, read)
        except ValueError:
            return "with undecodable picture"

    def read(value) -> bytes:
        return readable_picture(picture_bytes(value, origin))

    info = stream.info.splits or {}
    expected = info[stream.split].num_examples if named and str(stream.split) in info else None
    return Stream(origin, in_parts(stream, shard), convert, shard.size(expected))


def chosen_columns(origin: str, stream, columns: dict[str, str | None]) -> dict[str, str]:
    """The columns to take and what we call them; DataError where one that is needed is missing."""
    known = stream.column_names or list(next(iter(stream), {}))
    names = our_names(known, columns)
    if not columns["prompt"]:  # a hub's prompts are seldom what a story begins with
        names = {name: ours for name, ours in names.items() if ours != "prompt"}
    check_columns(origin, known, names.values(), columns)
    return names


def check_columns(origin, known: Iterable[str], found: Iterable[str], columns: dict):
    """DataError where no column has texts, or one that was asked for is not there."""
    if not {"story", *filter(columns.get, columns)} <= set(found):
        listed = ", ".join(itertools.islice(known, 20))
        advice = "choose with --caption_column, --image_column and --prompt_column"
        raise DataError(f"{origin} has the columns {listed}: {advice}")


def held_out_up_to(origin: str, stream, names: dict[str, str], seed: int) -> str:
    """The hash where val ends, by the stream's first records; DataError for a single story."""
    heads = [renamed(record, names) for record in stream.take(HOLD_OUT_RECORDS)]
    problems = list(map(text_problem, heads))
    if problems and all(problems):
        raise DataError(f"{origin}: none of the first {len(heads)} rows will do: {problems[0]}")
    keys = [story_key(one) for one, problem in zip(heads, problems) if not problem]
    last = last_val_hash(keys, seed)
    if last is None:
        raise DataError(f"{origin} has a single story; two are needed, one of them for val.")
    return last


def is_file_name(value) -> bool:
    """A picture's name, which is neither an address nor base64."""
    return isinstance(value, str) and bool(re.fullmatch(r"[^:]*\.\w{2,5}", value))


def picture_bytes(value, origin: str) -> bytes:
    """A picture as data sets hold it: encoded, in base64, or by the address of a file of the same
    data set, and of no other, which a row could name to read what is not its own."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"a picture cannot be a {type(value).__name__}")
    if re.match(rf"(zip://[^:]*::)?hf://datasets/{re.escape(origin)}/", value):
        import fsspec

        with patiently(lambda: fsspec.open(value, "rb").open()) as file:
            return file.read()
    return base64.b64decode(value.rpartition(",")[2])  # behind the head of a data: address


@functools.cache
def hub_exceptions() -> tuple[type[Exception], ...]:
    """What the hub's clients raise where it does not answer or does not have what was asked."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.utils import httpx
    from pyarrow import ArrowException

    return OSError, httpx.HTTPError, DatasetsError, ArrowException


@contextmanager
def hub_errors(name: str):
    """Turn a failure of the hub into one message with the ways out."""
    try:
        yield
    except hub_exceptions() as error:
        from huggingface_hub import constants

        if Path(name.partition(" sha256 ")[0]).exists():  # parquet files of a folder
            raise DataError(f"{name}: {first_line(error)}") from error
        raw_files = M3IT_RAW_FILE.format("*")
        raise DataError(
            f"Cannot read {name} from {constants.ENDPOINT}: {first_line(error)}\n"
            "  - No network: python download_data.py --source storyworld\n"
            "  - Stories of your own: python download_data.py --source folder PATH\n"
            "  - A data set that is private or gated: set HF_TOKEN.\n"
            "  - Set HF_ENDPOINT to a mirror that answers. Or fill the cache of M3IT with\n"
            f"    hf download {M3IT_REPO} --repo-type dataset --include '{raw_files}'\n"
            "    and run this again with HF_HOME set to that cache and HF_HUB_OFFLINE=1.\n"
            "What has been read stays, and the same command goes on from there."
        ) from error
    except (ValueError, RuntimeError) as error:  # which config of many, or a script in its place
        raise DataError(f"{name}: {' '.join(str(error).split())[:400]}") from error


# --------------------------------------------------------------------------------------------------
# Source folder


@dataclass
class FolderRow:
    """A row in our names, or what is wrong with it; the folder its paths start from; and its place
    "file:line" for messages."""

    fields: dict | str
    folder: Path
    place: str


def build_folder(
    path: Path,
    data_root: Path,
    limits: Limits,
    columns: dict[str, str | None],
    shard: Shard = WHOLE,
    seed: int = 0,
) -> dict[str, int]:
    """Check the stories in `path` and copy them to data_root/{train,val}; stories per split.

    Raises DataError with file, line and remedy of up to ten bad rows; nothing has been written
    then.
    """
    files = find_stories(path)
    listed = sorted(itertools.chain(*files.values()))
    others = sorted(set(filter(Path.is_file, texts_below(path))) - set(listed))
    if others:
        log(f"note: {len(others)} other texts or tables in {path} are left out, {others[0]} first")
    # Of a folder all is read, and what is beside a linked table; of a single table its pictures.
    sources = {path, *(file.resolve().parent for file in listed if path.is_dir())}
    refuse_overlap(sources, data_root)
    if listed[0].suffix == ".parquet":
        check_parquet(listed)
        parquet = {split: list(map(str, found)) for split, found in files.items()}
        name = str(path.resolve())
        return build_hub(name, data_root, limits, columns, shard, seed, parquet=parquet)
    settings = {"source": "folder", "path": str(path.resolve())}
    settings["tables"] = sha256(*itertools.chain(*files.values()))[:16]
    if any(columns.values()):
        settings["columns"] = columns
    if "all" in files:
        settings["seed"] = seed

    @functools.cache
    def checked() -> dict[str, list[FolderRow]]:  # both splits, before either is written
        rows = check_rows(path, files, seed, columns)
        if path.is_file():
            refuse_overlap(pictures_of(itertools.chain(*rows.values())), data_root)
        return rows

    def copies(split: str) -> Indexed:
        rows = shard.of(checked()[split])
        return Indexed(lambda start: map(folder_sample, rows[start:]), len(rows))

    return build_splits(data_root, limits, shard, settings, copies)


def check_parquet(files: list[Path]):
    """DataError for a file that is damaged or has no rows, at which a stream of several ends."""
    import pyarrow
    from pyarrow import parquet

    for file in files:
        try:
            rows = parquet.read_metadata(file).num_rows
        except (OSError, pyarrow.ArrowException) as error:
            reason = first_line(error)
            raise DataError(f"{file} cannot be read as parquet: {reason}") from error
        if not rows:
            raise DataError(f"{file} has no rows; remove it.")


def refuse_overlap(sources: Iterable[Path], data_root: Path):
    """DataError where a split would be written into, over or around what it is made of."""
    for target in (data_root / split for split in SPLIT_NAMES):
        for source in sources:
            one, other = source.resolve(), target.resolve()  # links and .. are seen through
            if one == other or one in other.parents or other in one.parents:
                raise DataError(
                    f"{target} and the stories in {source} lie in one another, and writing the one "
                    "would destroy the other. Choose another --data_root, outside that folder."
                )


def find_stories(path: Path) -> dict[str, list[Path]]:
    """The files of train and val, or {"all": files} where there are those of one only, to be
    divided."""
    if not path.exists():
        raise DataError(f"{path} does not exist; --source folder takes a folder or a table.")
    if path.is_file():
        return {"all": [path]}
    if not path.is_dir():
        raise DataError(f"{path} is a pipe, a socket or a device; save what it gives in a file.")
    strange = [one for one in texts_below(path) if not one.is_file() and not one.is_dir()]
    dangling = [one for one in strange if not one.exists()]
    special = [one for one in strange if one.exists()]  # never opened: a pipe may wait for ever
    kinds = {"links lead nowhere": dangling, "pipes, sockets or devices are no files": special}
    for kind, left in kinds.items():
        if left:
            log(f"note: {len(left)} {kind} and are left out, {left[0]} first")
    found = {}
    folders = {one.name.lower(): one for one in sorted(path.iterdir()) if one.is_dir()}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            below = story_files(folders[name]) if name in folders else []
            if files := below or story_files(path, f"(?i:{name})[._-]"):
                found.setdefault(split, files)
    if set(found) == set(SPLIT_NAMES):
        return found
    files = story_files(path) if not found else next(iter(found.values()))
    if not files:
        raise DataError(
            f"No stories in {path}: put a table there ({', '.join(FOLDER_TABLES)}, or any .csv, "
            ".tsv, .jsonl or .parquet) or texts (.txt), or into train/ and val/ below it."
        )
    return {"all": files}


def texts_below(folder: Path) -> list[Path]:
    """Whatever has the name of a text or a table, and be it no file."""
    suffixes = set(itertools.chain(*FOLDER_SUFFIXES))
    return [one for one in sorted(folder.rglob("[!.]*")) if one.suffix.lower() in suffixes]


def story_files(folder: Path, pattern: str = "") -> list[Path]:
    """The table that has one of the usual names; else all tables, or else all texts, of which names
    begin with the pattern."""
    usual = [folder / name for name in FOLDER_TABLES if (folder / name).is_file()]
    if usual and not pattern:
        return usual[:1]
    files = [file for file in sorted(folder.rglob("*")) if re.match(pattern or "[^.]", file.name)]
    for suffixes in FOLDER_SUFFIXES:
        if found := [file for file in files if file.suffix.lower() in suffixes and file.is_file()]:
            return found
    return []


def check_rows(
    path: Path, files: dict[str, list[Path]], seed: int, columns: dict[str, str | None]
) -> dict[str, list[FolderRow]]:
    """The rows of train and val, each of them checked; DataError with the first bad ones."""
    splits = {split: read_rows(found, columns) for split, found in files.items()}
    rows = list(itertools.chain(*splits.values()))
    problems = [f"{row.place}: {problem}" for row in rows if (problem := row_problem(row))]
    if problems:
        head = f"{len(problems)} of {len(rows)} rows cannot be used; correct or remove them:"
        rest = ["..."] if len(problems) > 10 else []
        raise DataError("\n".join([head, *problems[:10], *rest]))
    strange = sum(not row.fields["story"].startswith(row.fields.get("prompt", "")) for row in rows)
    if strange:
        log(f"note: {strange} prompts do not open their story, which is written on from them")
    if bare := sum(not any(picture_paths(row.fields)) for row in rows):
        log(f"note: {bare} of {len(rows)} stories have no picture")
    told = pictures_of(rows)
    pictures = [file for file in sorted(path.rglob("*")) if is_picture(file)]
    if left := [file for file in pictures if file not in told]:
        of = f"{len(left)} of {len(pictures)} pictures"
        log(f"note: {of} belong to no story and are left out, {left[0]} first")
    return divide(splits["all"], seed) if "all" in splits else splits


def read_rows(files: list[Path], columns: dict[str, str | None]) -> list[FolderRow]:
    """The rows of these files in our names. Blank lines are passed over."""
    rows = []
    for file in files:
        read = ROW_READERS.get(file.suffix.lower(), json_rows)
        known, found, whole = {}, set(), file.suffix.lower() != ".txt"
        for line, record in read(file, read_text(file).removeprefix("\ufeff")):
            if isinstance(record, dict):
                names = our_names(record, columns)
                known, found = known | dict.fromkeys(record), found | set(names.values())
                record = renamed(record, names)
            else:
                whole = False  # what is wrong with it is said of the row
            rows.append(FolderRow(record, file.parent, f"{file}:{line}"))
        if whole and known:
            check_columns(file, known, found, columns)
    if not rows:
        raise DataError(f"{files[0]} has no rows.")
    return rows


def text_rows(file: Path, text: str) -> Iterator[tuple[int, dict]]:
    """A text is a story, with the picture of the same name: fox.jpg for fox.txt or fox.jpg.txt."""
    picture = pictures_in(file.parent).get(file.stem)
    yield 1, {"story": text, "image_path": picture}


def is_picture(path: Path) -> bool:
    suffixes = (*PICTURE_SUFFIXES.values(), *OTHER_SUFFIXES)
    return path.suffix.lower() in suffixes and not path.name.startswith(".")


@functools.cache
def pictures_in(folder: Path) -> dict[str, str]:
    """The names of a folder's pictures by their names with and without suffix."""
    names = sorted(path.name for path in folder.iterdir() if is_picture(path))
    return {Path(name).stem: name for name in names} | {name: name for name in names}


def json_rows(file: Path, text: str) -> Iterator[tuple[int, dict | str]]:
    """(line, object or what is wrong with it) of JSON lines; (number, ...) of a list of objects."""
    lines = enumerate(text.split("\n"), start=1)  # not splitlines: JSON may hold U+2028
    if text.lstrip().startswith("[") and file.suffix.lower() == ".json":
        lines = enumerate(json_value(text) or [text], start=1)
    for line, value in lines:
        if isinstance(value, str) and not value.strip():
            continue
        value = json_value(value) if isinstance(value, str) else value
        yield line, value if isinstance(value, dict) else "no JSON object; write one row a line"


def json_value(text: str | bytes):
    """None for what is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def csv_rows(file: Path, text: str) -> Iterator[tuple[int, dict | str]]:
    """(line, cells by column or what is wrong with them) of a table whose separator is a comma, a
    semicolon, a tab or a bar. A row has as many cells as the header: a comma without quotes is an
    error and no shorter story."""
    if named := re.match(r"sep=(.)\r?\n", text):  # as spreadsheets write
        text = "\n" + text[named.end() :]
    first = re.match(r"[^\r\n]*", text.lstrip("\r\n "))[0]
    separator = named[1] if named else max(",;\t|", key=first.count)
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header, line = None, 1
    try:
        for cells in reader:
            filled = len(cells)
            while filled and not cells[filled - 1].strip():
                filled -= 1  # spreadsheets fill rows up with empty cells
            if not filled:
                pass  # a blank line
            elif header is None:
                header = cells[:filled]
                if len({name.strip().lower() for name in header}) < filled:
                    yield line, "two columns have the same name"
            elif filled > len(header) or len(cells) < len(header):
                yield line, f"{len(cells)} cells and not {len(header)}; write texts in quotes"
            else:
                yield line, dict(zip(header, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        yield line, f"{error}; write texts in quotes and a quote in them twice"


ROW_READERS = {".csv": csv_rows, ".tsv": csv_rows, ".txt": text_rows}


def row_problem(row: FolderRow) -> str | None:
    """What is wrong with a row and what to do, or None."""
    if isinstance(row.fields, str):
        return row.fields
    if problem := text_problem(row.fields):
        return problem
    problems = (picture_problem(row.folder, path) for path in picture_paths(row.fields))
    return next(filter(None, problems), None)


def picture_paths(fields: dict) -> list:
    """Of a row and its panels; pictures are optional."""
    named = [fields, *fields.get("panels", [])]
    return [one["image_path"] for one in named if one.get("image_path") not in (None, "")]


def pictures_of(rows: Iterable[FolderRow]) -> set[Path]:
    return {row.folder / name for row in rows for name in picture_paths(row.fields)}


def picture_problem(folder: Path, path) -> str | None:
    if not is_text(path):
        return '"image_path" (or "file_name") must name a picture'
    file = (folder / path).resolve()
    if not file.is_relative_to(folder.resolve()):
        return f"{path} is outside {folder}; copy the picture into that folder"
    if not file.is_file():
        missing = "is no file" if file.exists() else "does not exist"
        return f"{path} {missing} in {folder}"
    try:
        decode_picture(file.read_bytes())
    except ValueError as error:
        return f"{path} is {error}"
    return None


def divide(rows: list[FolderRow], seed: int) -> dict[str, list[FolderRow]]:
    """A seeded tenth of the stories for val."""
    last = last_val_hash((story_key(row.fields) for row in rows), seed)
    if last is None:
        one = f"{rows[0].place}: the single story" + f" of {len(rows)} rows" * (len(rows) > 1)
        raise DataError(f"{one}; at least two are needed, one of them for val.")
    split = {"train": [], "val": []}
    for row in rows:
        held_out = split_hash(story_key(row.fields), seed) <= last
        split["val" if held_out else "train"].append(row)
    return split


def folder_sample(row: FolderRow) -> Sample:
    def read(path: str) -> bytes:
        return readable_picture((row.folder / path).read_bytes())

    return story_sample(row.fields, read)


# --------------------------------------------------------------------------------------------------
# Source storyworld


def build_storyworld(
    data_root: Path, limits: Limits, shard: Shard = WHOLE, seed: int = 0
) -> dict[str, int]:
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
    pictures = [
        encode(panel, "PNG", compress_level=2) for panel in panels
    ]  # 2: half of the default's time
    row = {"prompt": story.prompt, "story": story.text, "factors": story.factors}
    return Sample(row, pictures, len(panels) - 1, list(story.beats))


@functools.cache
def load_world():
    """assets/storyworld/world.py, which is no package, as the module `world`."""
    sys.path.insert(0, str(WORLD_FOLDER))
    import world

    return world


# --------------------------------------------------------------------------------------------------
# Command line


def check_data_root(data_root: Path):
    """DataError where something else stands in the place of a folder that will be written."""
    for place in (data_root, *data_root.parents, *(data_root / split for split in SPLIT_NAMES)):
        if os.path.lexists(place) and not place.is_dir():
            kind = "a file" if place.exists() else "a link that leads nowhere"
            advice = "Give a folder, which need not exist, or move that away."
            raise DataError(f"--data_root {data_root}: {place} is {kind}, not a folder. {advice}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Build data/train and data/val: stories.jsonl and the pictures beside it.",
        epilog="Stopped at any moment, the same command goes on from there.",
    )
    add = parser.add_argument
    sources = ("m3it", "storyworld", "folder", "hub")
    add("path", type=Path, nargs="?", metavar="PATH", help="your stories, for --source folder")
    add("--source", choices=sources, default="m3it", help="default: m3it")
    add("--dataset_name", metavar="OWNER/NAME", help="for --source hub")
    add("--dataset_config_name", metavar="NAME", help="of a data set that has several")
    add("--caption_column", metavar="NAME", help="default: story, text or caption")
    add("--image_column", metavar="NAME", help="default: image, if there is one")
    add("--prompt_column", metavar="NAME", help="default: the first sentence is the prompt")
    add("--data_root", type=Path, default=Path("data"), help="where the data go; default: data")
    add("--seed", type=int, default=0, help="of the storyworld, or of a val that is held out")
    add("--max_train_samples", type=int, metavar="N", help="default: all, of the storyworld 2,000")
    val = "default: all, of the storyworld 256, of the hub a ninth of --max_train_samples"
    add("--max_val_samples", type=int, metavar="N", help=val)
    add("--num_shards", type=int, default=1, metavar="N", help="make one of N parts; default: 1")
    add("--shard_index", type=int, default=0, metavar="I", help="which of them, from 0 on")
    args = parser.parse_intermixed_args(argv)  # intermixed: PATH stands before or after any flag
    if (args.source == "folder") != (args.path is not None):
        parser.error("--source folder and PATH go together")
    if (args.source == "hub") != (args.dataset_name is not None):
        parser.error("--source hub and --dataset_name go together")
    if not 0 <= args.shard_index < args.num_shards <= 99_999:
        found = f"{args.shard_index} of {args.num_shards}"
        parser.error(f"--shard_index must be from 0 to --num_shards - 1, not {found}")
    args.shard = Shard(args.shard_index, args.num_shards)
    args.limits = {"train": args.max_train_samples, "val": args.max_val_samples}
    for limit in args.limits.values():
        if limit is not None and not 1 <= limit <= WORLD_SEED_BLOCK:
            parser.error(f"a number of samples must be from 1 to {WORLD_SEED_BLOCK:,}, not {limit}")
    if args.source == "storyworld" and not 0 <= args.seed < WORLD_SEEDS:
        parser.error(f"--seed of the storyworld must be from 0 to {WORLD_SEEDS - 1}")
    if args.source == "hub" and args.max_train_samples and not args.max_val_samples:
        args.limits["val"] = -(-args.max_train_samples // 9)
    columns = {"story": args.caption_column, "image_path": args.image_column}
    args.columns = columns | {"prompt": args.prompt_column}
    if args.source in ("m3it", "storyworld") and any(args.columns.values()):
        parser.error("the columns are chosen for --source folder and --source hub")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        check_data_root(args.data_root)
        if args.source == "m3it":
            build_m3it(args.data_root, args.limits, args.shard)
        elif args.source == "storyworld":
            build_storyworld(args.data_root, args.limits, args.shard, args.seed)
        elif args.source == "folder":
            where = args.data_root, args.limits
            build_folder(args.path, *where, args.columns, args.shard, args.seed)
        else:
            where = args.data_root, args.limits
            config = args.dataset_config_name
            build_hub(args.dataset_name, *where, args.columns, args.shard, args.seed, config)
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
