"""One's own stories, as people have them: data sets of the hub, tables of spreadsheets, texts, pictures."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
from fakehub import Hub, data_repo, m3it_pictures
from PIL import Image
from pyarrow import parquet
from test_download_data import (
    PROGRAM,
    contents,
    download,
    encoded,
    fail,
    rows_of,
    succeed,
    write_rows,
)

import download_data

NAME = "someone/tales"
HUB = ("--source", "hub", "--dataset_name", NAME)
PICTURES = m3it_pictures(24)


def tales(count: int) -> list[str]:
    return [f"Tale {number} begins. It goes on. It ends." for number in range(count)]


def from_hub(
    tmp_path: Path, repo: dict, *flags, data: str = "data"
) -> tuple[list[dict], list[dict]]:
    """The rows of train and val of a data set."""
    with Hub({f"datasets/{NAME}": repo}) as hub:
        succeed(*HUB, *flags, "--data_root", tmp_path / data, env=hub.env(tmp_path / "hf"))
    return rows_of(tmp_path / data / "train"), rows_of(tmp_path / data / "val")


def from_folder(tmp_path: Path, folder: Path, *flags) -> list[dict]:
    """The rows of train and val as one list, in the order of their stories."""
    data = tmp_path / "data"
    succeed("--source", "folder", folder, *flags, "--data_root", data)
    rows = rows_of(data / "train") + rows_of(data / "val")
    return sorted(rows, key=lambda row: row["story"])


def picture(split: Path, row: dict) -> bytes:
    return (split / row["image_path"]).read_bytes()


# Sentences

FIRST = {
    "Chinese": ("\u4ece\u524d\u6709\u53ea\u72d0\u72f8\u3002", "\u5b83\u5f88\u5c0f\u3002"),
    "Japanese, quoted": ("\u300c\u884c\u3053\u3046\uff01\u300d", "\u72d0\u306f\u8a00\u3063\u305f\u3002"),
    "Arabic": ("\u0645\u0646 \u0647\u0648\u061f", " \u062b\u0639\u0644\u0628."),
    "Urdu": ("\u0627\u06cc\u06a9 \u0644\u0648\u0645\u0691\u06cc \u06d4", " \u0648\u06c1 \u0622\u0626\u06cc \u06d4"),
    "Hindi": ("\u090f\u0915 \u0932\u094b\u092e\u095c\u0940 \u0925\u0940\u0964", " \u0935\u0939 \u0906\u0908\u0964"),
    "Emoji": ("A fox ran home \U0001f98a", " An owl slept \U0001f989"),
    "Emoji behind a mark": ("A fox ran!\U0001f98a\ufe0f", " It fell."),
    "Emoji within": ("A \U0001f98a fox ran.", " It fell."),
    "an ellipsis first": ("... and the fox ran.", " It fell."),
    "a heading": ("The Fox", "\n\nOnce there was a fox. It ran."),
    "tags": ("1girl, fox, star, owl, night sky, golden key, a, b, c, d,", " e, f, g, h" * 40),
    "no end and no spaces": ("\u72d0" * 100, "\u72d0" * 400),
    "an end far away": ("so it ran and ran and ran and ran and ran and", " ran and" * 90 + " fell. It slept."),
}  # fmt: skip


@pytest.mark.check(
    "the prompt of a story in Chinese, Japanese, Arabic, Urdu, Hindi, emoji, tags: its first sentence or words"
)
@pytest.mark.parametrize("name", FIRST)
def test_first_sentences_of_all_scripts(name):
    prompt, rest = FIRST[name]
    assert download_data.first_sentence(prompt + rest) == prompt


@pytest.mark.parametrize("name", FIRST)
def test_sentences_joined_are_the_text(name):
    text = "".join(FIRST[name])
    assert "".join(download_data.sentences(text)) == text
    parts = download_data.between_pictures("A. B. C. D. E.", 2)
    assert parts == ["A. B.", "C. D. E."] or parts == ["A. B. C.", "D. E."]


# The hub


@pytest.mark.check("hub: parquet with pictures, with and without a validation split")
@pytest.mark.parametrize("named", [True, False])
def test_hub_parquet_with_pictures(tmp_path, named):
    rows = [{"image": data, "text": text, "id": 7} for data, text in zip(PICTURES, tales(20))]
    rows[1]["image"] = encoded("GIF")
    splits = {"train": rows[:16], "validation": rows[16:]} if named else {"train": rows}
    train, val = from_hub(tmp_path, data_repo(splits))
    assert (len(train), len(val)) == ((16, 4) if named else (18, 2))
    number = {text: number for number, text in enumerate(tales(20))}
    for split, found in (("train", train), ("val", val)):
        for row in found:
            assert set(row) == {"prompt", "story", "image_path"} and row["prompt"].endswith(
                "begins."
            )
            data = picture(tmp_path / "data" / split, row)
            if number[row["story"]] == 1:
                assert Image.open(io.BytesIO(data)).format == "JPEG"
            else:
                assert data == PICTURES[number[row["story"]]]
    assert {row["story"] for row in train + val} == set(tales(20))


@pytest.mark.check("hub: text alone, in parquet and in JSON lines")
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_hub_text_alone(tmp_path, kind):
    splits = {
        "train": [{"story": text} for text in tales(40)],
        "validation": [{"story": "One. Two."}] * 9,
    }
    flags = ("--caption_column", "story", "--max_train_samples", 18)
    train, val = from_hub(tmp_path, data_repo(splits, kind), *flags)
    assert train == [
        {"prompt": f"Tale {i} begins.", "story": text} for i, text in enumerate(tales(18))
    ]
    assert len(val) == 2  # a ninth


@pytest.mark.check("hub: several panels in a list; one text beside several pictures")
def test_hub_lists_are_panels(tmp_path):
    texts = ["A fox ran.", "It fell.", "It slept."]
    rows = [
        {"image": PICTURES[:3], "text": texts},
        {"image": PICTURES[3:6], "text": ["Yes.", "It.", "Is."]},
    ]
    train, val = from_hub(tmp_path, data_repo({"train": rows[:1], "validation": rows[1:]}))
    assert train == [
        {
            "prompt": "A fox ran.",
            "story": "A fox ran. It fell. It slept.",
            "image_path": "images/000000_2.jpg",
            "panels": [
                {"text": text, "image_path": f"images/000000_{i}.jpg"}
                for i, text in enumerate(texts)
            ],
        }
    ]
    for number, panel in enumerate(val[0]["panels"], start=3):
        assert picture(tmp_path / "data" / "val", panel) == PICTURES[number]
    rows = [{"image": PICTURES[:2], "text": text} for text in tales(4)]
    train, val = from_hub(tmp_path, data_repo({"train": rows}), data="divided")
    assert len(train) == 3 and len(val) == 1
    for row in train + val:
        assert (
            len(row["panels"]) == 2
            and " ".join(panel["text"] for panel in row["panels"]) == row["story"]
        )
    rows = [{"text": ["A fox.", f"It is {number}."]} for number in range(4)]
    train, val = from_hub(tmp_path, data_repo({"train": rows}), data="texts")
    assert train[0]["panels"][0] == {"text": "A fox."} and "image_path" not in train[0]


def test_hub_imagefolder_with_metadata(tmp_path):
    lines = [json.dumps({"file_name": f"{i}.jpg", "text": text}) for i, text in enumerate(tales(6))]
    files = {f"train/{i}.jpg": PICTURES[i] for i in range(6)}
    train, val = from_hub(
        tmp_path, {"main": files | {"train/metadata.jsonl": "\n".join(lines).encode()}}
    )
    assert len(train) == 5 and len(val) == 1
    for row in train:
        assert picture(tmp_path / "data" / "train", row) == PICTURES[tales(6).index(row["story"])]


def test_hub_columns_of_other_names_and_a_config(tmp_path):
    rows = [
        {"pic": data, "said": text, "ask": f"Ask {i}"}
        for i, (data, text) in enumerate(zip(PICTURES, tales(4)))
    ]
    repo = data_repo({"train": rows}, config="big") | {}
    columns = ("--caption_column", "said", "--image_column", "pic", "--prompt_column", "ask")
    repo["main"] |= data_repo({"train": rows[:2]}, config="small")["main"] | {"README.md": CARD}
    train, val = from_hub(tmp_path, repo, "--dataset_config_name", "big", *columns)
    assert (
        len(train) == 3
        and len(val) == 1
        and {row["prompt"] for row in train} < {f"Ask {i}" for i in range(4)}
    )
    with Hub({f"datasets/{NAME}": repo}) as hub:
        env = hub.env(tmp_path / "hf")
        message = fail(*HUB, "--data_root", tmp_path / "a", env=env)
        assert "big" in message and "small" in message and len(message.splitlines()) <= 2
        message = fail(*HUB, "--dataset_config_name", "big", "--data_root", tmp_path / "a", env=env)
        assert "pic, said, ask" in message and "--caption_column" in message
        message = fail(*HUB[:-1], "no/body", "--data_root", tmp_path / "a", env=env)
        assert "Cannot read no/body" in message and "HF_TOKEN" in message
    assert not (tmp_path / "a").exists()


CARD = b"""---
configs:
- config_name: big
  data_files: [{split: train, path: big/train-*}]
- config_name: small
  data_files: [{split: train, path: small/train-*}]
---
"""


def test_hub_stopped_and_run_again_equals_an_unbroken_run(tmp_path):
    rows = [{"image": PICTURES[i % 24], "text": text} for i, text in enumerate(tales(400))]
    repo = data_repo({"train": rows}, shards=2, rows_per_group=20)
    from_hub(tmp_path, repo, data="whole")
    with Hub({f"datasets/{NAME}": repo}) as hub:
        env = hub.env(tmp_path / "hf", USE_TORCH="0")
        command = [sys.executable, str(PROGRAM), *HUB, "--data_root", str(tmp_path / "broken")]
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not (tmp_path / "broken/train/images/000130.jpg").exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert not (tmp_path / "broken" / "train" / "stories.jsonl").exists()
        done = succeed(*HUB, "--data_root", tmp_path / "broken", env=env)
    assert "going on after" in done.stderr
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_hub_rows_that_cannot_be_used_are_counted(tmp_path):
    rows = [{"image": PICTURES[0], "text": text} for text in tales(20)]
    rows[3]["image"], rows[4]["text"] = b"no picture", " "
    with Hub({f"datasets/{NAME}": data_repo({"train": rows})}) as hub:
        done = succeed(*HUB, "--data_root", tmp_path / "data", env=hub.env(tmp_path / "hf"))
    assert "with undecodable picture" in done.stderr and "must be a text" in done.stderr


@pytest.mark.check("hub: a row that names a file of this machine as its picture: it is not read")
def test_hub_rows_name_no_file_of_this_machine(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(PICTURES[0])
    rows = [
        {"image": {"bytes": None, "path": str(tmp_path / "secret.jpg")}, "text": text}
        for text in tales(4)
    ]
    with Hub({f"datasets/{NAME}": data_repo({"train": rows})}) as hub:
        message = fail(*HUB, "--data_root", tmp_path / "data", env=hub.env(tmp_path / "hf"))
    assert "undecodable picture" in message


# Folders

TABLES = {  # bytes of a table with three stories, the second of which begins with "Caf\u00e9"
    "cp1252": ("metadata.csv", lambda text: text.replace("\n", "\r\n").encode("cp1252")),
    "UTF-8 with a mark": ("metadata.csv", lambda text: text.encode("utf-8-sig")),
    "UTF-16": ("metadata.csv", lambda text: text.encode("utf-16")),
    "UTF-16 without a mark": ("metadata.csv", lambda text: text.encode("utf-16-le")),
    "semicolons": ("metadata.csv", lambda text: text.replace(",", ";").encode()),
    "sep=": ("metadata.csv", lambda text: ("sep=;\n" + text.replace(",", ";")).encode()),
    "bars": ("metadata.csv", lambda text: text.replace(",", "|").encode()),
    "tabs": ("a.tsv", lambda text: text.replace(",", "\t").encode()),
    "a name of its own": ("My Stories.CSV", lambda text: text.replace("file_name,text", "File_Name , Text").encode()),
    "blank lines": ("metadata.csv", lambda text: ("\n" + text.replace("\n", "\n\n ,\n") + "\n\n").encode()),
    "empty cells at the end": ("metadata.csv", lambda text: text.replace("\n", ",,\n").encode()),
    "CR alone": ("metadata.csv", lambda text: text.replace("\n", "\r").encode()),
    "JSON lines": ("metadata.jsonl", lambda text: (as_json(text).replace("\n", "\n\n \r\n") + "\n\n").encode()),
    "JSON lines with a mark": ("metadata.jsonl", lambda text: as_json(text).encode("utf-8-sig")),
    "a list": ("stories.json", lambda text: ("[" + ",\n".join(as_json(text).split("\n")) + "]").encode()),
}  # fmt: skip


def as_json(text: str) -> str:
    rows = [line.split(",", 1) for line in text.splitlines()[1:]]
    return "\n".join(
        json.dumps({"file_name": name, "text": story}, ensure_ascii=False) for name, story in rows
    )


TEXT = "file_name,text\n0.png,A bear baked. It ate.\n1.png,Caf\u00e9 fox \u2018is\u2019 old. It naps.\n2.png,Owl. Ow.\n"


def three_pictures(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encoded("PNG", colour=(number, 0, 0)))
    return folder


@pytest.mark.check(
    "tables: cp1252, UTF-16, marks, separators, blank lines, cells at the end: read as they were meant"
)
@pytest.mark.parametrize("name", TABLES)
def test_tables_as_spreadsheets_write_them(tmp_path, name):
    file, encode = TABLES[name]
    folder = three_pictures(tmp_path / "mine")
    (folder / file).write_bytes(encode(TEXT))
    rows = from_folder(tmp_path, folder)
    assert [row["story"] for row in rows] == [
        "A bear baked. It ate.",
        "Caf\u00e9 fox \u2018is\u2019 old. It naps.",
        "Owl. Ow.",
    ]
    assert rows[1]["prompt"] == "Caf\u00e9 fox \u2018is\u2019 old."
    assert all(set(row) == {"prompt", "story", "image_path"} for row in rows)


REFUSED = {
    "an unquoted comma": (b"file_name,text\n0.png,A fox.\n1.png,An owl, a bear. They met.\n", "metadata.csv:3: 3 cells"),
    "a cell too few": (b"text,file_name\nA fox.,0.png\nAn owl.\n", "metadata.csv:3: 1 cells"),
    "an open quote": (b'file_name,text\n0.png,A fox.\n1.png,"An owl.\n2.png,Ow.\n', "metadata.csv:3: "),
    "another script": ("file_name,text\n0.png,\u041b\u0438\u0441\u0430 \u0441\u043f\u0438\u0442.\n".encode("cp1251"),
                       "metadata.csv:2 is not UTF-8"),
    "half a UTF-16": ("file_name,text\n".encode("utf-16") + b"x", "is not UTF-16"),
    "one name twice": (b"file_name,text,text\n0.png,A fox.,B.\n", "metadata.csv:1: two columns"),
    "a NUL": (b"file_name,text\n0.png,A f\0ox.\n1.png,An owl.\n", "metadata.csv:2 holds a NUL"),
    "a spreadsheet's own format": (b"PK\3\4" + bytes(90), "metadata.csv is packed or a spreadsheet"),
    "no text column": (b"file_name,words\n0.png,A fox.\n",
                       "metadata.csv has the columns file_name, words: choose with --caption_column"),
    "no line of names": (b"A fox ran.\nAn owl slept.\n", "metadata.csv has the columns A fox ran.: choose"),
    "one name twice, but for its case": (b"file_name,Text,text\n0.png,A fox.,B.\n", "metadata.csv:1: two columns"),
    "a novel": (b"text\nA fox.\n" + b"word " * 100_001 + b"\n", "metadata.csv:3: the story is longer"),
}  # fmt: skip


@pytest.mark.check(
    "tables: unquoted commas, missing cells, open quotes, other encodings: refused with the line"
)
@pytest.mark.parametrize("name", REFUSED)
def test_tables_that_cannot_be_meant_are_refused_with_their_line(tmp_path, name):
    data, expected = REFUSED[name]
    folder = three_pictures(tmp_path / "mine")
    (folder / "metadata.csv").write_bytes(data)
    assert expected in fail("--source", "folder", folder, "--data_root", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_long_field_and_quotes_are_read(tmp_path):
    folder = three_pictures(tmp_path / "mine")
    long = "word " * 30_000 + "end."
    (folder / "metadata.csv").write_text(
        f'file_name,text\n0.png,"A ""fox"",\nran. Ow."\n1.png,{long}\n'
    )
    rows = from_folder(tmp_path, folder)
    assert [row["story"] for row in rows] == ['A "fox",\nran. Ow.', long]
    assert rows[1]["prompt"] == " ".join(["word"] * 12)


@pytest.mark.check(
    "folder: .txt files, some with a picture beside them, divided or in train and val"
)
@pytest.mark.parametrize("split", [True, False])
def test_texts_with_pictures_beside_them_or_none(tmp_path, split):
    folder = tmp_path / "mine"
    for number, text in enumerate(tales(10)):
        place = folder / (("val" if number > 7 else "train") if split else f"book{number % 2}")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.txt").write_text(f"\ufeff{text}\n", "utf-8")
        if number == 3:
            Image.new("RGB", (9, 9), (0, 200, 0)).save(place / "3.avif")
        elif number % 2:
            (place / f"{number}.JPG").write_bytes(PICTURES[number])
    rows = from_folder(tmp_path, folder)
    assert [row["story"] for row in rows] == tales(10)
    assert ["image_path" in row for row in rows] == [False, True] * 5
    assert len(rows_of(tmp_path / "data" / "val")) == (2 if split else 1)
    found = [data for name, data in contents(tmp_path / "data").items() if name.endswith(".jpg")]
    assert len(found) == 5 and {PICTURES[i] for i in (1, 5, 7, 9)} < set(found)
    assert all(Image.open(io.BytesIO(data)).format == "JPEG" for data in found)


def test_one_file_and_files_named_as_splits(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, texts in (
        ("train-1.csv", tales(3)),
        ("train-2.csv", tales(6)[3:]),
        ("validation.csv", ["One. Two."]),
    ):
        (folder / name).write_text("text\n" + "\n".join(texts) + "\n")
    succeed("--source", "folder", folder, "--data_root", tmp_path / "a")
    assert [row["story"] for row in rows_of(tmp_path / "a" / "train")] == tales(6)
    assert len(rows_of(tmp_path / "a" / "val")) == 1
    succeed("--source", "folder", folder / "train-1.csv", "--data_root", tmp_path / "b")
    assert len(rows_of(tmp_path / "b" / "train")) == 2 and len(rows_of(tmp_path / "b" / "val")) == 1


def test_parquet_and_other_column_names(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [{"image": data, "text": text} for data, text in zip(PICTURES, tales(12))]
    (data,) = [
        data
        for name, data in data_repo({"train": rows})["main"].items()
        if name.endswith(".parquet")
    ]
    (folder / "x.parquet").write_bytes(data)
    assert [row["story"] for row in from_folder(tmp_path, folder)] == sorted(tales(12))
    (folder / "x.parquet").write_bytes(data[:900])
    assert "mine" in fail("--source", "folder", folder, "--data_root", tmp_path / "other")
    other = tmp_path / "other names"
    other.mkdir()
    write_rows(other / "a.jsonl", [{"said": text, "text": "no", "pic": ""} for text in tales(4)])
    flags = ("--caption_column", "said", "--image_column", "pic")
    succeed("--source", "folder", other, *flags, "--data_root", tmp_path / "b")
    assert len(rows_of(tmp_path / "b" / "train")) == 3


def test_lists_in_json_lines_are_panels(tmp_path):
    folder = three_pictures(tmp_path / "mine")
    names = ["0.png", "1.png", "2.png"]
    panels = {"file_names": names, "text": ["A fox.", "It ran.", "It slept."]}
    write_rows(folder / "metadata.jsonl", [panels, {"text": "Zoo. It ends."}])
    rows = from_folder(tmp_path, folder)
    assert [panel["text"] for panel in rows[0]["panels"]] == panels[
        "text"
    ] and "image_path" not in rows[1]
    write_rows(
        folder / "metadata.jsonl", [panels | {"file_names": names[:2]}, {"text": "Zoo. It ends."}]
    )
    assert "equally long" in fail("--source", "folder", folder, "--data_root", tmp_path / "other")


def test_heic(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 64), (0, 200, 0))).save(tmp_path / "x.heic")
    data = download_data.readable_picture((tmp_path / "x.heic").read_bytes())
    assert Image.open(io.BytesIO(data)).format == "JPEG"


def test_heic_without_its_package_names_it(monkeypatch):
    monkeypatch.setattr(download_data, "picture_formats", lambda: ["JPEG"])
    with pytest.raises(ValueError, match="pip install pillow-heif"):
        download_data.readable_picture(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


# Nothing is lost


@pytest.mark.check(
    "folder: input and output are one, one in the other, by links and ..: refused, nothing written"
)
@pytest.mark.parametrize(
    "way",
    [
        "same",
        "split",
        "inside",
        "dots",
        "link",
        "linked split",
        "linked output",
        "table",
        "pictures",
    ],
)
def test_input_and_output_are_one_folder(tmp_path, way):
    data = tmp_path / "data"
    mine = three_pictures(data / "train") if way != "inside" else three_pictures(data)
    (mine / "metadata.csv").write_text(TEXT)
    source, target = data, data
    if way == "split":
        source = mine
    elif way == "dots":
        (tmp_path / "x").mkdir()
        source, target = mine, tmp_path / "x" / ".." / "data"
    elif way == "link":
        (tmp_path / "link").symlink_to(data)
        source = tmp_path / "link" / "train"
    elif way == "linked split":
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "train").symlink_to(mine)
        source = tmp_path / "other"
    elif way == "linked output":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "val").symlink_to(mine)
        source, target = mine, tmp_path / "out"
    elif way == "table":
        source = mine / "metadata.csv"
    elif way == "pictures":
        source = tmp_path / "mine.csv"
        source.write_text(TEXT.replace("0.png", "data/train/0.png").replace("1.png", "2.png"))
        shutil.copy(mine / "2.png", tmp_path)
    before = contents(tmp_path)
    assert "Choose another --data_root" in fail("--source", "folder", source, "--data_root", target)
    assert contents(tmp_path) == before


@pytest.mark.check(
    "two download_data.py into one folder at once: the second is told so, the first is whole"
)
def test_two_at_once(tmp_path):
    world = ("--source", "storyworld", "--data_root", tmp_path / "two", "--max_val_samples", 2)
    command = [sys.executable, str(PROGRAM), *map(str, world), "--max_train_samples", "600"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while (
        not (tmp_path / "two" / "train" / "stories.jsonl.part").exists() and process.poll() is None
    ):
        time.sleep(0.01)
    os.kill(process.pid, 19)  # stopped, so that it is still there
    try:
        message = fail(*world, "--max_train_samples", 600)
    finally:
        os.kill(process.pid, 18)
    assert "Another download_data.py is writing" in message
    assert process.wait(300) == 0
    assert "already complete" in download(*world, "--max_train_samples", 600).stdout


@pytest.mark.check(
    "two download_data.py with other --num_shards at the same moment: the second is told so"
)
@pytest.mark.parametrize("first, second", [(2, 3), (1, 2), (2, 1)])
def test_other_numbers_of_shards_at_once(tmp_path, first, second):
    """The first to look finds an empty folder; while it opens its source, the other has begun."""
    stories = [download_data.Sample({"story": text, "prompt": text}, [None]) for text in tales(4)]

    def source():
        return download_data.Indexed(lambda start: stories[start:], 4)

    def build(count, opened) -> int:
        shard = download_data.Shard(0, count)
        return download_data.build_split(tmp_path, {"source": "test"}, shard, opened)

    def late():
        assert build(second, source) == 4
        return source()

    with pytest.raises(download_data.DataError, match="of another --num_shards"):
        build(first, late)
    shard = f"-00000-of-{second:05d}" if second > 1 else ""
    assert [path.name for path in tmp_path.glob("stories*")] == [f"stories{shard}.jsonl"]


@pytest.mark.check("folder: pictures that belong to no story are counted and said")
@pytest.mark.parametrize("kind", ["texts", "table"])
def test_pictures_that_belong_to_no_story_are_counted(tmp_path, kind):
    folder = three_pictures(tmp_path / "mine")
    (folder / "more").mkdir()
    (folder / "more" / "9.jpg").write_bytes(PICTURES[0])
    if kind == "texts":
        (folder / "0.txt").write_text("A fox. It ran.")
        (folder / "story.txt").write_text("An owl. It slept.")
    else:
        (folder / "metadata.csv").write_text("file_name,text\n0.png,A fox. It ran.\n,An owl.\n")
    done = succeed("--source", "folder", folder, "--data_root", tmp_path / "data")
    assert "3 of 4 pictures belong to no story and are left out" in done.stderr
    assert "1 of 2 stories have no picture" in done.stderr


@pytest.mark.check("folder: links that lead nowhere among texts or tables are counted and said")
@pytest.mark.parametrize("whole", [2, 0])
def test_links_that_lead_nowhere_are_counted(tmp_path, whole):
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, text in enumerate(tales(whole)):
        (folder / f"{number}.txt").write_text(text)
    (folder / "8.txt").symlink_to(tmp_path / "gone.txt")
    (folder / "9.txt").symlink_to(tmp_path / "gone.txt")
    command = ("--source", "folder", folder, "--data_root", tmp_path / "data")
    said = succeed(*command).stderr if whole else fail(*command)
    assert f"2 links lead nowhere and are left out, {folder / '8.txt'} first" in said


def make_special(kind: str, path: Path):
    """A file that gives no bytes, or waits for ever when it is opened."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.check("folder: pipes, sockets and devices are said, and never opened")
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_pipes_sockets_and_devices_are_not_opened(tmp_path, monkeypatch, kind):
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, text in enumerate(tales(2)):
        (folder / f"{number}.txt").write_text(text)
    monkeypatch.chdir(folder)  # the address of a socket is short
    make_special(kind, Path("9.txt"))
    command = ("--source", "folder", folder, "--data_root", tmp_path / "data")
    expected = f"1 pipes, sockets or devices are no files and are left out, {folder / '9.txt'}"
    assert expected in succeed(*command).stderr
    make_special(kind, Path("1.jpg"))
    problem = "outside" if kind == "device" else "no file in"  # the device behind a link
    message = fail(*command[:-1], tmp_path / "again")
    assert f"{folder / '1.txt'}:1: 1.jpg is {problem} {folder}" in message
    message = fail("--source", "folder", folder / "9.txt", *command[3:])
    assert f"{folder / '9.txt'} is a pipe, a socket or a device" in message


@pytest.mark.check("--data_root that is a file, lies in one or holds one: told so in one line")
@pytest.mark.parametrize("place", ["data", "data/train", "link", "file/data"])
def test_a_data_root_that_is_no_folder(tmp_path, place):
    root = tmp_path / ("data" if place == "data/train" else place)
    file = tmp_path / place.replace("file/data", "file")
    file.parent.mkdir(exist_ok=True)
    if place == "link":
        file.symlink_to(tmp_path / "gone")
    else:
        file.write_text("mine")
    kind = "a link that leads nowhere" if place == "link" else "a file"
    message = fail("--source", "storyworld", "--data_root", root)
    assert f"--data_root {root}: {file} is {kind}, not a folder. Give a folder" in message
    assert message.count("\n") == 1 and (place == "link" or file.read_text() == "mine")


@pytest.mark.check("folder: texts and tables of a second kind are counted and said")
@pytest.mark.parametrize("table", ["b.csv", "metadata.csv"])
def test_stories_of_a_second_kind_are_counted(tmp_path, table):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / table).write_text("text\nA fox. It ran.\nAn owl. It slept.\n")
    (folder / "c.txt").write_text("A bear. It ate.")
    done = succeed("--source", "folder", folder, "--data_root", tmp_path / "data")
    said = f"1 other texts or tables in {folder} are left out, {folder / 'c.txt'} first"
    assert said in done.stderr


def test_the_data_may_lie_beside_a_table(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": text} for text in tales(2)])
    succeed("--source", "folder", tmp_path / "a.jsonl", "--data_root", tmp_path / "data")
    assert len(rows_of(tmp_path / "data" / "train")) == 1


def test_columns_that_were_asked_for_and_are_not_there(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": text, "image": ""} for text in tales(2)])
    command = ("--source", "folder", tmp_path / "a.jsonl", "--data_root", tmp_path / "data")
    for flag in ("--caption_column", "--image_column", "--prompt_column"):
        assert "a.jsonl has the columns text, image: choose" in fail(*command, flag, "words")


def test_one_story_in_every_row(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "A fox."}] * 3)
    command = ("--source", "folder", tmp_path / "a.jsonl", "--data_root", tmp_path / "data")
    assert f"{tmp_path / 'a.jsonl'}:1: the single story of 3 rows" in fail(*command)


def test_names_of_splits_in_any_case(tmp_path):
    for number, split in enumerate(("Train", "VAL", "Test")):
        (tmp_path / "mine" / split).mkdir(parents=True)
        (tmp_path / "mine" / split / "a.txt").write_text(tales(3)[number])
    command = ("--source", "folder", tmp_path / "mine", "--data_root", tmp_path / "data")
    assert "1 other texts or tables" in succeed(*command).stderr
    stories = [rows_of(tmp_path / "data" / split)[0]["story"] for split in ("train", "val")]
    assert stories == tales(2)


ODD_PARQUET = {
    "no rows": ({"text": pyarrow.array([], "string")}, "x.parquet has no rows; remove it"),
    "texts as bytes": (
        {"text": [b"A fox.", b"An owl."]},
        'none of the first 2 rows will do: "story"',
    ),
    "pictures by name": (
        {"text": tales(8), "image": [f"{number}.png" for number in range(8)]},
        "7 with the name of a picture: the table must hold the picture itself",
    ),
}


@pytest.mark.check("parquet: no rows, texts as bytes, pictures by name, damaged: refused, and why")
@pytest.mark.parametrize("name", [*ODD_PARQUET, "damaged"])
def test_odd_parquet_says_what_is_wrong(tmp_path, name):
    columns, expected = ODD_PARQUET.get(name, ({"text": tales(2)}, "cannot be read as parquet"))
    file = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table(columns), file)
    if name == "damaged":
        file.write_bytes(file.read_bytes()[:-20])
    command = ("--source", "folder", file, "--data_root", tmp_path / "data")
    assert expected in fail(*command)


def test_a_folder_that_does_not_exist(tmp_path):
    message = fail("--source", "folder", tmp_path / "gone", "--data_root", tmp_path / "data")
    assert "gone does not exist" in message
