"""Data: what a bad row is called, what a picture becomes, and the order in which stories are read."""

import hashlib
import io
import json
from itertools import islice

import pytest
import torch
from PIL import Image

import story_generative_model as sgm

GOOD = {"prompt": "The fox", "story": "The fox sat.", "image_path": "a.png"}


def without(key: str) -> dict:
    return {name: value for name, value in GOOD.items() if name != key}


def write_rows(folder, *lines):
    (folder / "train").mkdir(exist_ok=True)
    data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "train" / "stories.jsonl").write_bytes(b"\n".join(data) + b"\n")
    return str(folder)


# Rows


@pytest.mark.parametrize(
    "bad",
    [
        b"{not json", b'"text"', b"[]", b"5", b"null", without("prompt"), without("story"), GOOD | {"image_path": ""},
        GOOD | {"story": "  "}, GOOD | {"story": 7}, GOOD | {"prompt": None}, GOOD | {"image_path": ["a.png"]},
        GOOD | {"panels": [{"text": "x", "image_path": 5}]}, GOOD | {"panels": [{}]}, GOOD | {"panels": ["x"]}, GOOD | {"panels": "x"}, GOOD | {"panels": 5},
        b'{"prompt": "\xff"}',
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line(tmp_path, bad):
    root = write_rows(tmp_path, GOOD, b"", bad)
    rows = sgm.read_rows(root, "train")
    assert rows[0].story == GOOD["story"] and len(rows) == 2
    with pytest.raises(sgm.StoryError, match=r"stories\.jsonl:3\b"):
        rows[1]


def test_a_row_without_panels_is_one_panel(tmp_path):
    (row,) = sgm.read_rows(write_rows(tmp_path, GOOD), "train")
    assert row.panels == (sgm.Panel("The fox sat.", "a.png"),)
    assert (row.prompt, row.story, row.factors) == ("The fox", "The fox sat.", {})


def test_a_picture_is_optional(tmp_path):
    """Rows and panels without one teach the text alone."""
    mixed = GOOD | {"panels": [{"text": "The fox"}, {"text": "sat.", "image_path": "b.png"}]}
    rows = sgm.read_rows(write_rows(tmp_path, without("image_path"), mixed), "train")
    assert rows[0].panels == (sgm.Panel("The fox sat.", ""),) and rows[0].pictured == []
    assert rows[1].pictured == [sgm.Panel("sat.", "b.png")]


def test_a_limit_reads_no_further(tmp_path):
    assert len(sgm.read_rows(write_rows(tmp_path, GOOD, GOOD, b"{"), "train", 2)) == 2


@pytest.mark.parametrize("block", [1, 7, 1 << 24])
def test_rows_are_found_wherever_blocks_of_the_file_end(tmp_path, monkeypatch, block):
    stories = [f"The fox sat {'and sat ' * number}\u00e9." for number in range(9)]
    root = write_rows(tmp_path, *[GOOD | {"story": story} for story in stories])
    monkeypatch.setattr(sgm, "READ_BLOCK", block)
    rows = sgm.read_rows(root, "train")
    assert [row.story for row in rows] == stories and [row.story for row in rows[-2:]] == stories[
        -2:
    ]
    assert (
        rows.digest
        == hashlib.sha256((tmp_path / "train" / "stories.jsonl").read_bytes()).hexdigest()
    )
    with pytest.raises(IndexError):
        rows[9]


def test_shards_are_read_as_one_split_once_all_are_there(tmp_path):
    for index, stories in enumerate((["The fox.", "The owl."], [], ["The bear."])):
        root = write_rows(tmp_path, *[GOOD | {"story": story} for story in stories])
        whole = tmp_path / "train" / "stories.jsonl"
        whole.rename(whole.with_name(f"stories-{index:05d}-of-00003.jsonl"))
        if index == 1:
            with pytest.raises(sgm.StoryError, match="2 of 3 shards"):
                sgm.read_rows(root, "train")
    rows = sgm.read_rows(root, "train")
    assert [row.story for row in rows] == ["The fox.", "The owl.", "The bear."]
    assert rows[2].where.endswith("stories-00002-of-00003.jsonl:1")
    assert len(sgm.read_rows(root, "train", limit=2)) == 2


def test_no_file_and_no_rows_say_what_to_do(tmp_path):
    with pytest.raises(sgm.StoryError, match=r"download_data\.py"):
        sgm.read_rows(str(tmp_path), "train")
    with pytest.raises(sgm.StoryError, match="no stories"):
        sgm.read_rows(write_rows(tmp_path, b""), "train")


# Pictures


def load(path, resolution: int, where: str = "row"):
    return sgm.load_image(path.parent, path.name, resolution, where)


def picture_file(tmp_path, mode: str, kind: str, **options):
    """Left half red, right half blue."""
    image = Image.new("RGB", (60, 40), (255, 0, 0))
    image.paste((0, 0, 255), (30, 0, 60, 40))
    path = tmp_path / f"picture.{kind.lower()}"
    image.convert(mode).save(path, kind, **options)
    return path


@pytest.mark.parametrize(
    "mode, kind", [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "PNG"), ("RGBA", "PNG"),
                   ("LA", "PNG"), ("1", "PNG"), ("RGB", "WEBP")],
)  # fmt: skip
def test_every_kind_of_picture_becomes_the_centre_square(tmp_path, mode, kind):
    pixels = load(picture_file(tmp_path, mode, kind), 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    if mode in ("RGB", "RGBA", "P", "CMYK"):
        red, _, blue = pixels[:, 8]
        assert red[:6].min() > 0.8 and red[10:].max() < -0.8
        assert blue[:6].max() < -0.8 and blue[10:].min() > 0.8


def test_black_and_white_reach_both_ends_of_the_range(tmp_path):
    for colour, value in ((0, -1.0), (255, 1.0)):
        Image.new("RGB", (20, 20), (colour,) * 3).save(tmp_path / "x.png")
        assert torch.equal(load(tmp_path / "x.png", 8), torch.full((3, 8, 8), value))


def test_a_camera_s_rotation_is_undone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = load(picture_file(tmp_path, "RGB", "JPEG", exif=exif), 16)
    assert pixels[2, 8, :6].min() > 0.8  # blue has come to the left


def damaged_pictures():
    image = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(image, "JPEG")
    png = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(png, "PNG")
    broken = bytearray(png.getvalue())
    broken[len(broken) // 2] ^= 255
    chunk = bytearray(png.getvalue())
    chunk[37] = 1  # the name of the pixels' chunk
    gif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, "GIF")
    return {
        "truncated jpeg": image.getvalue()[:-300], "truncated png": png.getvalue()[:-300], "broken png": bytes(broken),
        "broken chunk": bytes(chunk), "html": b"<html>404</html>", "empty": b"", "gif": gif.getvalue(),
    }  # fmt: skip


@pytest.mark.parametrize("name", damaged_pictures())
def test_a_damaged_picture_is_named_with_its_row(tmp_path, name):
    (tmp_path / "x.jpg").write_bytes(damaged_pictures()[name])
    with pytest.raises(sgm.StoryError, match=r"stories\.jsonl:7.*x\.jpg"):
        load(tmp_path / "x.jpg", 16, "stories.jsonl:7")


def test_a_missing_picture_is_named_with_its_row(tmp_path):
    with pytest.raises(sgm.StoryError, match=r"stories\.jsonl:7.*gone\.png"):
        load(tmp_path / "gone.png", 16, "stories.jsonl:7")


# Items and batches


@pytest.fixture(scope="module")
def dataset(data_folder, lm):
    rows = sgm.read_rows(str(data_folder), "train")
    return sgm.StoryDataset(
        rows, data_folder / "train", lm.tokenizer, max_tokens=40, resolution=16, seed=3
    )


def test_the_panel_is_a_function_of_seed_epoch_and_index(dataset):
    chosen = [
        [dataset[epoch, index, True]["panel"]["text"] for index in range(24)] for epoch in range(3)
    ]
    assert chosen == [
        [dataset[epoch, index, True]["panel"]["text"] for index in range(24)] for epoch in range(3)
    ]
    assert chosen[0] != chosen[1] != chosen[2]
    for index in range(24):
        item = dataset[0, index, True]
        panel = next(
            panel for panel in dataset.rows[index].panels if panel.text == item["panel"]["text"]
        )
        assert torch.equal(
            item["panel"]["pixels"], sgm.load_image(dataset.folder, panel.image_path, 16, "")
        )


def test_a_story_beyond_the_context_is_cut_and_marked(dataset):
    long, short = dataset[0, 1, False], dataset[0, 0, False]
    whole = dataset.tokenizer(dataset.rows[1].story)["input_ids"]
    assert long["cut"] and long["tokens"] == whole[:40] and len(whole) > 40
    assert not short["cut"] and "panel" not in short


def test_collate_masks_padding_alone(dataset):
    items = [dataset[0, index, index < 2] for index in range(4)]
    batch = sgm.collate(items, 40)
    for row, item in enumerate(items):
        length = len(item["tokens"])
        assert batch["tokens"][row, :length].tolist() == item["tokens"]
        assert batch["mask"][row].tolist() == [True] * length + [False] * (
            batch["mask"].shape[1] - length
        )
    assert batch["mask"].dtype == torch.bool and batch["mask"].shape == (
        4,
        40,
    )  # the longest that fits
    assert sgm.collate(items[:1], 40)["mask"].shape == (
        1,
        -(-len(items[0]["tokens"]) // 16) * 16,
    )  # else few lengths
    assert batch["cut"].tolist() == [False, True, False, False]
    assert batch["painted"] == [0, 1] and len(batch["panels"]["text"]) == 2
    assert [pixels.shape for pixels in batch["panels"]["pixels"]] == [(3, 16, 16)] * 2


# The order of the stream


def read(batches: sgm.StoryBatches, count: int) -> list:
    return list(islice(batches, count))


def read_keys(batches: sgm.StoryBatches, count: int) -> list:
    return [key for keys in read(batches, count) for key in keys]


def test_every_epoch_reads_each_story_once_in_an_order_of_its_own():
    keys = read_keys(sgm.StoryBatches(size=10, batch=4, pictures=2, seed=0), 10)
    epochs = [[index for epoch, index, _ in keys if epoch == number] for number in range(4)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert [with_picture for _, _, with_picture in keys] == [True, True, False, False] * 10
    assert keys != read_keys(sgm.StoryBatches(10, 4, 2, seed=1), 10)


@pytest.mark.parametrize("taken", [1, 3, 7])
def test_the_stream_goes_on_from_a_position(taken):
    whole = read(sgm.StoryBatches(10, 4, 4, seed=5), 12)
    assert read(sgm.StoryBatches(10, 4, 4, seed=5, position=4 * taken), 12 - taken) == whole[taken:]


def test_two_ranks_read_one_stream_between_them():
    whole = read(sgm.StoryBatches(10, 4, 4, seed=5, position=8), 12)
    first, second = (read(sgm.StoryBatches(10, 4, 4, 5, 8, rank, ranks=2), 6) for rank in (0, 1))
    assert [keys for pair in zip(first, second) for keys in pair] == whole


def test_a_batch_may_be_larger_than_the_data():
    keys = read(sgm.StoryBatches(size=3, batch=7, pictures=7, seed=0), 1)[0]
    assert (
        sorted(index for epoch, index, _ in keys if epoch < 2) == [0, 0, 1, 1, 2, 2]
        and keys[6][0] == 2
    )


def test_seeded_draws_depend_on_every_number_and_on_nothing_else():
    def draw(*key) -> float:
        return torch.rand((), generator=sgm.make_generator(*key)).item()

    keys = [
        (seed, stream, *rest)
        for seed in (0, 1)
        for stream in sgm.Stream
        for rest in ((), (0,), (1,))
    ]
    draws = {key: draw(*key) for key in keys}
    assert len(set(draws.values())) == len(keys)  # no two streams meet
    torch.manual_seed(9)
    assert draws == {key: draw(*key) for key in keys}


def test_pictures_come_with_every_nth_batch_alone():
    """Of each process, whatever the position it starts from: a picture that nobody scores is not
    read."""
    for rank in range(2):
        batches = iter(sgm.StoryBatches(20, 4, 2, seed=0, position=16, rank=rank, ranks=2, every=3))
        with_pictures = [[key[2] for key in next(batches)] for _ in range(6)]
        assert with_pictures == [
            [True, True, False, False] if number % 3 == 0 else [False] * 4 for number in range(6)
        ]
