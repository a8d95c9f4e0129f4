"""Data from elsewhere: pictures, paths, rows, and whatever a fuzzer comes up with."""

import dataclasses
import io
import json
import os
import re
from dataclasses import replace

import pytest
import torch
from conftest import make_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_checkpoints import small
from test_data import GOOD

import story_generative_model as sgm

WHERE = "stories.jsonl:7"

# Pictures


def encoded(
    picture_format: str, mode: str = "RGB", colour=(200, 30, 30), size=(40, 24), **options
) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, picture_format, **options)
    return out.getvalue()


def deep_png() -> bytes:
    """16 bits of grey, dark at the left and light at the right."""
    image = Image.new("I;16", (40, 24))
    image.putdata([65535 * (x >= 20) for _ in range(24) for x in range(40)])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def turned_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


def bomb() -> bytes:
    """200 megapixels in a few hundred kilobytes."""
    return encoded("PNG", "1", 0, (20_000, 10_000))


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"
RED, GREY, WHITE = (200, 30, 30), (128, 128, 128), (255, 255, 255)
PICTURES = {  # what becomes of it: a colour at its centre, or refused
    "truncated JPEG": (lambda: encoded("JPEG", size=(400, 400))[:-900], None),
    "empty file": (lambda: b"", None),
    "not a picture": (lambda: b"<html>404</html>", None),
    "CMYK": (lambda: encoded("JPEG", "CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    "16-bit": (deep_png, "both ends"),
    "RGBA": (lambda: encoded("PNG", "RGBA", (0, 0, 0, 0)), WHITE),
    "palette": (lambda: encoded("PNG", "P", 0), "any"),
    "1x1": (lambda: encoded("PNG", size=(1, 1)), RED),
    "EXIF-rotated": (turned_jpeg, RED),
    "200-megapixel bomb": (bomb, None),
    "SVG named .png": (lambda: SVG, None),
    "EPS named .jpg": (lambda: EPS, None),
}


@pytest.mark.check(
    "pictures: damaged, of every kind, a bomb, SVG, EPS: a result, or an error with line and path"
)
@pytest.mark.parametrize("name", PICTURES)
def test_pictures(tmp_path, name):
    make, expected = PICTURES[name]
    (tmp_path / "x.png").write_bytes(make())
    if expected is None:
        with pytest.raises(sgm.StoryError, match=rf"{re.escape(WHERE)}: .*x\.png: not a readable"):
            sgm.load_image(tmp_path, "x.png", 16, WHERE)
        return
    pixels = sgm.load_image(tmp_path, "x.png", 16, WHERE)
    assert pixels.shape == (3, 16, 16) and pixels.min() >= -1 and pixels.max() <= 1
    if expected == "both ends":
        assert pixels[:, :, :5].max() < -0.95 and pixels[:, :, -5:].min() > 0.95
    elif expected != "any":
        torch.testing.assert_close(
            pixels[:, 8, 8] * 127.5 + 127.5, torch.tensor(expected).float(), atol=12, rtol=0
        )


@pytest.mark.check("image_path that leads out: refused with its line")
@pytest.mark.parametrize(
    "path", ["../x.png", "/etc/passwd", "C:\\x.png", "c:x.png", "images/../../x.png", "images\\..\\..\\x.png",
             "a\0.png", "\\\\server\\x.png", ".."],
)  # fmt: skip
def test_image_paths(tmp_path, path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "stories.jsonl").write_text(
        json.dumps(GOOD | {"image_path": path}) + "\n"
    )
    with pytest.raises(
        sgm.StoryError, match=r"stories\.jsonl:1: image_path must name a file below"
    ):
        sgm.read_rows(str(tmp_path), "train")[0]


@pytest.mark.check("a picture behind a symbolic link that leads out: refused")
@pytest.mark.parametrize("link", ["file", "folder"])
def test_symbolic_links(tmp_path, link):
    split = tmp_path / "train"
    split.mkdir()
    (tmp_path / "secret.png").write_bytes(encoded("PNG"))
    if link == "file":
        (split / "x.png").symlink_to(tmp_path / "secret.png")
    else:
        (split / "images").symlink_to(tmp_path)
    name = "x.png" if link == "file" else "images/secret.png"
    with pytest.raises(sgm.StoryError, match=r"stories\.jsonl:7: .*leads out of"):
        sgm.load_image(split, name, 16, WHERE)


@pytest.mark.check("a picture that is a pipe or a folder: refused with its line, never opened")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_pictures_that_are_no_files(tmp_path, make):
    make(tmp_path / "x.png")
    with pytest.raises(sgm.StoryError, match=r"stories\.jsonl:7: .*x\.png is no file"):
        sgm.load_image(tmp_path, "x.png", 16, WHERE)


# Rows

ROW = json.dumps(GOOD).encode()
ROWS = {  # the second line of a file, and whether it can be used
    "a byte order mark at the start": (None, True),
    "CRLF": (ROW + b"\r", True),
    "blank lines": (b"\n \t\n" + ROW, True),
    "a cut last line": (ROW[:-9], False),
    "a missing key": (json.dumps({"story": "The fox."}).encode(), False),
    "a number for a string": (json.dumps(GOOD | {"story": 5}).encode(), False),
    "a line of 10 MB": (json.dumps(GOOD | {"story": "fox " * 2_500_000}).encode(), False),
    "a lone surrogate": (b'{"prompt": "a", "story": "\\ud800", "image_path": "a.png"}', False),
    "a nest of brackets": (b"[" * 200_000, False),
    "not UTF-8": (b'{"prompt": "\xff"}', False),
    "factors that are a list": (json.dumps(GOOD | {"factors": [1]}).encode(), False),
}


@pytest.mark.check(
    "stories.jsonl: BOM, CRLF, blank, cut, missing, of another type, 10 MB, surrogates: read, or its line"
)
@pytest.mark.parametrize("name", ROWS)
def test_rows(tmp_path, name):
    line, good = ROWS[name]
    (tmp_path / "train").mkdir()
    data = (
        b"\xef\xbb\xbf" + ROW + b"\n" + ROW + b"\n" if line is None else ROW + b"\n" + line + b"\n"
    )
    (tmp_path / "train" / "stories.jsonl").write_bytes(data + (ROW + b"\n" if not good else b""))
    if good:
        assert [row.story for row in sgm.read_rows(str(tmp_path), "train")] == [GOOD["story"]] * 2
        return
    with pytest.raises(sgm.StoryError, match=r"stories\.jsonl:2: ") as error:
        list(sgm.read_rows(str(tmp_path), "train"))
    assert len(str(error.value)) < 400
    numbers = [row.where[-2:] for row in sgm.read_rows(str(tmp_path), "train", skip_bad=True)]
    assert numbers == [":1", ":3"]


@pytest.mark.check(
    "a broken row in training: stops with its line; --skip_bad_rows counts and goes on"
)
@pytest.mark.parametrize("broken", ["row", "late row", "picture"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_row_in_training(make_config, monkeypatch, tmp_path, capsys, broken, workers):
    if broken == "late row":  # one of a million, found when its turn comes
        monkeypatch.setattr(sgm, "CHECKED_ROWS", 4)
    data = make_data(tmp_path / "data")
    path = data / "train" / "stories.jsonl"
    lines = path.read_text().splitlines()
    if broken != "picture":
        lines[4] = lines[4][:-5]
        path.write_text("\n".join(lines) + "\n")
    else:
        for panel in range(2):
            (data / "train" / f"images/000004_{panel}.png").write_bytes(b"")
    config = make_config(data_root=str(data), dataloader_num_workers=workers, validation_steps=100)
    with pytest.raises(sgm.StoryError, match=r"stories\.jsonl:5: ") as error:
        sgm.train(config)
    assert error.value.code == 1 and "\n" not in str(error.value)
    sgm.train(replace(config, skip_bad_rows=True))
    told = capsys.readouterr().err
    assert "skipped" in told and "stories.jsonl:5: " in told
    assert ("skipped, 1 so far" if broken == "picture" else "1 rows skipped") in told


# Fuzzing

FUZZ = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=True,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from([*GOOD, "panels", "factors", "x"]), inner)
    ),
)
LINES = st.binary() | JSON.map(lambda value: json.dumps(value).encode())


def told_in_one_line(function, *arguments) -> None:
    """It works, or it says what is wrong: nothing else."""
    try:
        function(*arguments)
    except sgm.StoryError as error:
        assert str(error) and error.code in (1, 2)


@pytest.mark.check(
    "fuzzed: 300 rows, storyboards, records and checkpoints each: no traceback, no hang"
)
def test_fuzzed_rows(record_property):
    record_property("tried", 300)
    FUZZ(given(LINES)(lambda line: told_in_one_line(sgm.parse_row, line, WHERE)))()


@pytest.mark.check(
    "fuzzed: 300 rows, storyboards, records and checkpoints each: no traceback, no hang"
)
def test_fuzzed_storyboards(record_property):
    record_property("tried", 300)
    boards = st.text() | st.lists(st.sampled_from(["_", "3", "99", "-1", "x"])).map(" ".join)
    FUZZ(given(boards)(lambda text: told_in_one_line(sgm.parse_storyboard, text, 64)))()


@pytest.mark.check(
    "fuzzed: 300 rows, storyboards, records and checkpoints each: no traceback, no hang"
)
def test_fuzzed_records(record_property, tmp_path):
    record_property("tried", 300)
    usual = sgm.Config(source="x")
    values = {name: st.just(getattr(usual, name)) | JSON for name in sgm.RECORDED_SETTINGS}
    record = dict(
        prompt=JSON | st.just("A fox"),
        seed=JSON | st.just(3),
        settings=JSON | st.fixed_dictionaries(values),
    )
    boards = JSON | st.lists(st.integers(0, 99), min_size=8, max_size=8)
    records = st.fixed_dictionaries(record | dict(storyboard=boards))
    pages = records.map(
        lambda record: f'<script type="application/json" id="story">{json.dumps(record)}</script>'
    )

    def read(page):
        (tmp_path / "a.html").write_text(page, "utf-8", "surrogatepass")
        told_in_one_line(sgm.replay_config, sgm.Config(source=str(tmp_path / "a.html")), set())

    FUZZ(given(pages | st.text())(read))()


@pytest.mark.check(
    "fuzzed: 300 rows, storyboards, records and checkpoints each: no traceback, no hang"
)
def test_fuzzed_checkpoints(record_property, tmp_path):
    record_property("tried", 300)
    path = tmp_path / "ckpt_1.pt"
    sgm.save_checkpoint(path, small())
    whole = path.read_bytes()

    def read(place: int, data: bytes, cut: int):
        path.write_bytes((whole[:place] + data + whole[place + len(data) :])[: cut or None])
        told_in_one_line(sgm.load_checkpoint, path)

    places = st.integers(0, len(whole))
    FUZZ(given(places, st.binary(), st.just(0) | places)(read))()

    def read_settings(name: str, value):
        sgm.save_checkpoint(path, small() | {"config": {name: value}})
        told_in_one_line(sgm.load_checkpoint, path)

    names = st.sampled_from([field.name for field in dataclasses.fields(sgm.Config)])
    FUZZ(given(names, JSON)(read_settings))()
