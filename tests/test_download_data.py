"""download_data.py as a user runs it: the real program in a process of its own, against a hub on this machine."""

import base64
import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fakehub import Hub, client_env, m3it_pictures, m3it_repo, m3it_rows
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "assets" / "storyworld")]
import download_data  # noqa: E402

PROGRAM = ROOT / "download_data.py"
M3IT = "datasets/MMInstruction/M3IT"
NO_HUB = "http://127.0.0.1:9"  # the discard port: nothing listens


def download(*args, env=None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROGRAM), *map(str, args)]
    env = {
        **(env or os.environ),
        "USE_TORCH": "0",
    }  # spares datasets the import of torch, two seconds a run
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def succeed(*args, env=None) -> subprocess.CompletedProcess:
    done = download(*args, env=env)
    assert done.returncode == 0, done.stderr
    return done


def fail(*args, env=None, status: int = 1) -> str:
    """The message of a run that must end with `status`, without a traceback and with nothing on
    standard output."""
    done = download(*args, env=env)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and "stories" not in done.stdout
    return done.stderr


def rows_of(split: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in (split / "stories.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def encoded(picture_format: str, mode: str = "RGB", colour=(200, 30, 30), size=(40, 24)) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, picture_format)
    return out.getvalue()


def noisy_jpeg() -> bytes:
    """A JPEG with enough data that half of it still has the whole header."""
    out = io.BytesIO()
    Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(3 * 64 * 64)).save(out, "JPEG")
    return out.getvalue()


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# Command line


def test_help_needs_no_heavy_import():
    start = time.monotonic()
    assert "--source" in succeed("--help").stdout
    assert time.monotonic() - start < 1 or os.getloadavg()[0] > os.cpu_count()


@pytest.mark.parametrize(
    "args",
    [
        ["--source", "folder"],
        ["some/path"],
        ["--source", "elsewhere"],
        ["--max_train_samples", "0"],
        ["--source", "storyworld", "--seed", "50"],
    ],
)
def test_bad_arguments_exit_2(args, tmp_path):
    assert "error:" in fail(*args, "--data_root", tmp_path, status=2)


# Text and pictures


@pytest.mark.parametrize(
    "prompt, rest",
    [
        ("A fox ran.", " It fell."),
        ('"Who is it?"', " said Owl. Nobody."),
        ("Mr. J. Fox met Dr. Owl!", " They spoke."),
        ("A kite of 2.5 m flew.", " High."),
        ("No end at all", ""),
        ("One sentence.", ""),
    ],
)
def test_the_prompt_is_the_first_sentence(prompt, rest):
    assert download_data.first_sentence(prompt + rest) == prompt


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "RGB"])
def test_any_kind_of_picture_becomes_an_rgb_jpeg(mode):
    data = encoded("PNG", mode, colour=None)
    picture = Image.open(io.BytesIO(download_data.rgb_jpeg(data)))
    assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (40, 24))


def test_a_picture_that_is_converted_is_turned_upright_first():
    out, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned by a quarter
    Image.new("L", (40, 24)).save(out, "JPEG", exif=turned)
    assert Image.open(io.BytesIO(download_data.rgb_jpeg(out.getvalue()))).size == (24, 40)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("lost", [8, 200, 0.5])
def test_a_jpeg_that_lacks_its_end_is_noticed_though_decoded_small(progressive, lost):
    out = io.BytesIO()
    Image.effect_noise((200, 120), 90).convert("RGB").save(out, "JPEG", progressive=progressive)
    data = out.getvalue()
    assert download_data.rgb_jpeg(data) == data
    with pytest.raises(ValueError, match="truncated"):
        download_data.rgb_jpeg(data[: -int(lost if lost > 1 else lost * len(data))])


# Storyworld


@pytest.fixture(scope="module")
def storyworld(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("storyworld")
    small = ["--max_train_samples", 5, "--max_val_samples", 2]
    done = succeed("--source", "storyworld", "--data_root", data, *small)
    assert done.stdout.splitlines() == [
        f"{data}/train: 5 stories from storyworld",
        f"{data}/val: 2 stories from storyworld",
    ]
    assert done.stderr == ""  # no progress bar where standard error is not a terminal
    return data


def test_storyworld_rows_hold_the_panels_of_their_story(storyworld):
    import world

    for split, first in {"train": 0, "val": 5 * 10**8}.items():
        for i, row in enumerate(rows_of(storyworld / split)):
            story = world.write_story(first + i)
            assert row["prompt"] == story.prompt and row["story"] == story.text
            assert row["factors"] == story.factors
            assert [panel["text"] for panel in row["panels"]] == list(story.beats)
            assert row["image_path"] == row["panels"][-1]["image_path"] == f"images/{i:06d}_7.png"
            for beat in (0, 7):
                picture = Image.open(storyworld / split / row["panels"][beat]["image_path"])
                assert picture.size == (128, 128)
                assert picture.tobytes() == world.draw_panel(story, beat, 128).tobytes()


def test_storyworld_same_seed_same_bytes_and_another_seed_other_stories(storyworld, tmp_path):
    small = ["--max_train_samples", 5, "--max_val_samples", 2]
    succeed("--source", "storyworld", "--data_root", tmp_path / "again", *small)
    assert contents(tmp_path / "again") == contents(storyworld)
    succeed("--source", "storyworld", "--data_root", tmp_path / "other", *small, "--seed", 1)
    stories = {row["story"] for split in ("train", "val") for row in rows_of(storyworld / split)}
    assert stories.isdisjoint(row["story"] for row in rows_of(tmp_path / "other" / "train"))


def test_complete_data_are_left_alone_and_other_settings_refused(storyworld):
    before = contents(storyworld)
    same = ["--source", "storyworld", "--data_root", storyworld, "--max_val_samples", 2]
    assert succeed(*same, "--max_train_samples", 5).stdout.count("already complete") == 2
    message = fail(*same, "--max_train_samples", 6)
    assert '"stories": 5' in message and '"stories": 6' in message and "--data_root" in message
    assert contents(storyworld) == before


# M3IT


def test_m3it_keeps_jpegs_converts_the_rest_and_skips_what_cannot_be_used(tmp_path):
    rows, noise = m3it_rows(8), noisy_jpeg()
    rows[1] = (in_base64(encoded("PNG", "RGBA", (0, 0, 0, 0))), "A clear pane. Nothing to see.")
    rows[2] = (None, "There is no picture. At all.")
    rows[3] = (
        in_base64(noise[: len(noise) // 2]),
        "A picture cut off. It opens, and does not load.",
    )
    rows[4] = (in_base64(encoded("JPEG", "L", 90)), 'Mr. Grey said "Hi." Then he left.')
    rows[5] = (rows[5][0], "   ")
    rows[6] = (in_base64(encoded("PCX", "P", 3)), "A format that is not allowed. It is left out.")
    with Hub({M3IT: m3it_repo(train=rows)}) as hub:
        done = succeed("--data_root", tmp_path / "data", env=hub.env(tmp_path / "hf"))
    assert done.stdout.splitlines() == [
        f"{tmp_path}/data/train: 4 stories from m3it",
        f"{tmp_path}/data/val: 3 stories from m3it",
    ]
    skipped = "4 of 8 rows skipped (1 without picture, 2 with undecodable picture, 1 without text)"
    assert skipped in done.stderr
    train = rows_of(tmp_path / "data" / "train")
    assert [row["image_path"] for row in train] == [f"images/{i:06d}.jpg" for i in range(4)]
    assert [row["prompt"] for row in train] == [
        "Picture 0 shows a plain colour.",
        "A clear pane.",
        'Mr. Grey said "Hi."',
        "Picture 7 shows a plain colour.",
    ]
    assert (
        train[0]["story"]
        == "Picture 0 shows a plain colour. It is very small. Nothing else is in it."
    )
    pictures = [(tmp_path / "data" / "train" / row["image_path"]).read_bytes() for row in train]
    assert (pictures[0], pictures[3]) == (m3it_pictures(8)[0], m3it_pictures(8)[7])
    for data, colour in ((pictures[1], (255, 255, 255)), (pictures[2], (90, 90, 90))):
        picture = Image.open(io.BytesIO(data))
        assert (picture.format, picture.mode, picture.getpixel((5, 5))) == ("JPEG", "RGB", colour)
    assert not hub.requests("coco/train/0000.parquet")


def test_m3it_killed_and_run_again_equals_an_unbroken_run(tmp_path):
    rows = m3it_rows(240)
    rows[30] = (None, "A row to skip.")  # before the checkpoint, which has to remember it
    repo = {M3IT: m3it_repo(train=rows, shards=2, rows_per_group=25)}
    released = threading.Event()

    def hold_second_shard(request) -> bool:
        if "train/0001.parquet" in request.path:
            released.wait(60)
        return False

    with Hub(repo) as hub:
        succeed("--data_root", tmp_path / "whole", env=hub.env(tmp_path / "hf"))
        hub.faults.append(hold_second_shard)
        command = [sys.executable, str(PROGRAM), "--data_root", str(tmp_path / "broken")]
        process = subprocess.Popen(
            command, env=hub.env(tmp_path / "hf"), stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
        train = tmp_path / "broken" / "train"
        wait_for(
            lambda: (
                (train / "stories.jsonl.state").exists()
                and (train / "images" / "000080.jpg").exists()
            )
        )
        process.send_signal(signal.SIGKILL)
        process.communicate()
        released.set()
        assert not (train / "stories.jsonl").exists()
        with (train / "stories.jsonl.part").open("ab") as part:
            part.write(b'{"half a row that was being')
        done = succeed("--data_root", tmp_path / "broken", env=hub.env(tmp_path / "hf"))
    assert "going on after 64 stories" in done.stderr
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert len(rows_of(train)) == 239


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.check(
    "M3IT: no parquet branch: the raw file, the same bytes; offline from the cache; damage there found"
)
def test_m3it_without_parquet_branch_reads_the_raw_file_and_an_offline_cache_serves_it(tmp_path):
    with Hub({M3IT: m3it_repo(parquet=False)}) as hub:
        succeed("--data_root", tmp_path / "raw", env=hub.env(tmp_path / "hf"))
    with Hub({M3IT: m3it_repo()}) as hub:
        succeed("--data_root", tmp_path / "parquet", env=hub.env(tmp_path / "hf2"))
    assert contents(tmp_path / "raw") == contents(tmp_path / "parquet")
    offline = client_env(NO_HUB, tmp_path / "hf", HF_HUB_OFFLINE="1")
    succeed("--data_root", tmp_path / "offline", env=offline)
    assert contents(tmp_path / "offline") == contents(tmp_path / "raw")
    blob = max((tmp_path / "hf" / "hub").glob("*/blobs/*"), key=lambda path: path.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    assert "is damaged" in fail("--data_root", tmp_path / "damaged", env=offline)


def test_m3it_limits_are_counted_in_stories_kept(tmp_path):
    rows = [(None, "No picture."), *m3it_rows(6)]
    with Hub({M3IT: m3it_repo(train=rows, parquet=False)}) as hub:
        limits = ["--max_train_samples", 2, "--max_val_samples", 9]
        succeed("--data_root", tmp_path / "data", *limits, env=hub.env(tmp_path / "hf"))
    assert [len(rows_of(tmp_path / "data" / split)) for split in ("train", "val")] == [2, 3]


def test_m3it_with_too_many_skipped_rows_is_an_error(tmp_path):
    rows = m3it_rows(20)[:14] + [(None, "No picture.")] * 6
    with Hub({M3IT: m3it_repo(train=rows)}) as hub:
        message = fail("--data_root", tmp_path / "data", env=hub.env(tmp_path / "hf"))
    assert "6 of 20 rows skipped (6 without picture)" in message
    assert not (tmp_path / "data" / "train" / "stories.jsonl").exists()


def test_without_a_hub_the_message_names_the_ways_out(tmp_path):
    message = fail(
        "--data_root", tmp_path, env=client_env(NO_HUB, tmp_path / "hf", HF_HUB_OFFLINE="1")
    )
    for remedy in (
        "--source storyworld",
        "--source folder PATH",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE=1",
    ):
        assert remedy in message


# Folder


@pytest.fixture
def stories(tmp_path) -> Path:
    """A folder in the project's layout: a story of two panels, one of a single picture, and one for
    val."""
    folder = tmp_path / "stories"
    for split in ("train", "val"):
        (folder / split / "pictures").mkdir(parents=True)
        for name, picture_format in {"a.jpg": "JPEG", "b.png": "PNG", "c.webp": "WEBP"}.items():
            (folder / split / "pictures" / name).write_bytes(encoded(picture_format))
    panels = [
        {"text": "A fox.", "image_path": "pictures/a.jpg"},
        {"text": "An owl.", "image_path": "pictures/b.png"},
    ]
    book = {
        "prompt": "A fox.",
        "story": "A fox. An owl.",
        "image_path": "pictures/b.png",
        "panels": panels,
        "title": "F",
    }
    page = {"story": "A bear sleeps. It snores.", "image_path": "pictures/c.webp"}
    write_rows(folder / "train" / "stories.jsonl", [book, page])
    write_rows(folder / "val" / "stories.jsonl", [page])
    return folder


def write_rows(path: Path, rows: list):
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows),
        encoding="utf-8",
    )


def test_folder_is_copied_with_its_panels(stories, tmp_path):
    succeed("--source", "folder", stories, "--data_root", tmp_path / "data")
    book, page = rows_of(tmp_path / "data" / "train")
    assert book["image_path"] == "images/000000_1.png" and book["title"] == "F"
    assert book["panels"] == [
        {"text": "A fox.", "image_path": "images/000000_0.jpg"},
        {"text": "An owl.", "image_path": "images/000000_1.png"},
    ]
    assert page == {
        "prompt": "A bear sleeps.",
        "story": "A bear sleeps. It snores.",
        "image_path": "images/000001.webp",
    }
    copy = (tmp_path / "data" / "train" / "images" / "000001.webp").read_bytes()
    assert copy == (stories / "train" / "pictures" / "c.webp").read_bytes()
    assert len(rows_of(tmp_path / "data" / "val")) == 1


BAD_ROWS = {
    "not an object": ("{broken\n", "no JSON object"),
    "a list": ([1], "no JSON object"),
    "empty story": ({"story": " ", "image_path": "pictures/a.jpg"}, '"story"'),
    "prompt of another type": (
        {"story": "A.", "prompt": 3, "image_path": "pictures/a.jpg"},
        '"prompt"',
    ),
    "a number as picture": ({"story": "A.", "image_path": 3}, '"image_path"'),
    "absent picture": ({"story": "A.", "image_path": "pictures/z.jpg"}, "does not exist"),
    "picture outside": ({"story": "A.", "image_path": "../val/pictures/a.jpg"}, "is outside"),
    "text as picture": ({"story": "A.", "image_path": "stories.jsonl"}, "no readable"),
    "panel without text": (
        {
            "story": "A.",
            "image_path": "pictures/a.jpg",
            "panels": [{"image_path": "pictures/a.jpg"}],
        },
        '"panels"',
    ),
    "a number as a panel's picture": (
        {
            "story": "A.",
            "image_path": "pictures/a.jpg",
            "panels": [{"text": "A.", "image_path": 3}],
        },
        '"image_path"',
    ),
}


def test_folder_with_bad_rows_names_file_line_and_problem_and_writes_nothing(stories, tmp_path):
    table = stories / "train" / "stories.jsonl"
    good = {"story": "A bear.", "image_path": "pictures/a.jpg"}
    write_rows(table, [good, *(row for row, _ in BAD_ROWS.values())])
    message = fail("--source", "folder", stories, "--data_root", tmp_path / "data")
    assert f"{len(BAD_ROWS)} of {len(BAD_ROWS) + 2} rows" in message
    lines = [line for line in message.splitlines() if line.startswith(str(table))]
    for number, (line, (name, (_, problem))) in enumerate(
        zip(lines, BAD_ROWS.items(), strict=True), start=2
    ):
        assert line.startswith(f"{table}:{number}: ") and problem in line, (name, line)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl"])
def test_imagefolder_is_read_and_a_seeded_tenth_split_off(table, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    pictures = m3it_pictures(20)
    rows = [
        {"file_name": f"{i}.jpg", "text": f"Story {i}. Its end, with a comma."} for i in range(20)
    ]
    for i, picture in enumerate(pictures):
        (folder / f"{i}.jpg").write_bytes(picture)
    random.Random(0).shuffle(rows)
    if table.endswith(".csv"):
        with (folder / table).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_rows(folder / table, rows)
    succeed("--source", "folder", folder, "--data_root", tmp_path / "data")
    succeed("--data_root", tmp_path / "again", "--source", "folder", folder)
    assert contents(tmp_path / "again") == contents(tmp_path / "data")
    found = {}
    for split in ("train", "val"):
        for row in rows_of(tmp_path / "data" / split):
            number = int(row["prompt"].removeprefix("Story ").removesuffix("."))
            assert (tmp_path / "data" / split / row["image_path"]).read_bytes() == pictures[number]
            found.setdefault(split, set()).add(number)
    assert len(found["train"]) == 18 and len(found["val"]) == 2
    assert found["train"] | found["val"] == set(range(20))
    succeed("--source", "folder", folder, "--data_root", tmp_path / "other", "--seed", 7)
    assert rows_of(tmp_path / "other" / "val") != rows_of(tmp_path / "data" / "val")


def test_the_pages_of_one_book_stay_in_one_split():
    rows = [
        download_data.FolderRow({"title": f"Book {i % 12}", "story": f"Page {i}."}, Path("."), "")
        for i in range(120)
    ]
    split = download_data.divide(rows, seed=3)
    train, val = ({row.fields["title"] for row in split[name]} for name in ("train", "val"))
    assert (
        len(val) == 1 and train.isdisjoint(val) and len(split["train"]) + len(split["val"]) == 120
    )


def test_folder_without_stories_says_what_it_needs(tmp_path):
    assert "metadata.csv" in fail("--source", "folder", tmp_path, "--data_root", tmp_path / "data")


# Shards


def shards_of(folder: Path, split: str, count: int) -> list[dict]:
    """The rows of all shards as one list, in the order of the whole."""
    parts = []
    for index in range(count):
        path = folder / split / f"stories-{index:05d}-of-{count:05d}.jsonl"
        parts.append([json.loads(line) for line in path.read_text("utf-8").splitlines()])
    return [parts[number % count][number // count] for number in range(sum(map(len, parts)))]


def without_paths(rows: list[dict]) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key not in ("image_path", "panels")}
        for row in rows
    ]


@pytest.mark.parametrize("source", ["m3it", "m3it, raw", "folder"])
def test_shards_are_the_whole_dealt_out(tmp_path, stories, source):
    repo = m3it_repo(
        train=m3it_rows(11), val=m3it_rows(4), shards=2, rows_per_group=2, parquet=source == "m3it"
    )
    flags = ("--source", "folder", stories) if source == "folder" else ()
    with Hub({M3IT: repo}) as hub:
        env = hub.env(tmp_path / "hf")
        succeed(*flags, "--data_root", tmp_path / "whole", env=env)
        for index in range(3):
            shard = ("--num_shards", "3", "--shard_index", str(index))
            succeed(*flags, *shard, "--data_root", tmp_path / "parts", env=env)
    for split in ("train", "val"):
        whole = rows_of(tmp_path / "whole" / split)
        parts = shards_of(tmp_path / "parts", split, 3)
        assert sorted(map(repr, without_paths(parts))) == sorted(map(repr, without_paths(whole)))
        named = {panel["image_path"] for row in parts for panel in row.get("panels", [row])}
        folder = tmp_path / "parts" / split
        assert named == {path.relative_to(folder).as_posix() for path in folder.glob("images/*/*")}


def test_shards_never_mix_with_another_number_of_them(tmp_path, stories):
    flags = ("--source", "folder", stories, "--data_root", tmp_path / "data")
    succeed(*flags, "--num_shards", "2", "--shard_index", "1")
    assert "of another --num_shards" in fail(*flags)
    assert "of another --num_shards" in fail(*flags, "--num_shards", "3", "--shard_index", "1")
    assert "already complete" in succeed(*flags, "--num_shards", "2", "--shard_index", "1").stdout


def test_a_shard_that_is_none_is_refused():
    for flags in (
        ("--shard_index", "1"),
        ("--num_shards", "2", "--shard_index", "-1"),
        ("--num_shards", "0"),
    ):
        with pytest.raises(SystemExit):
            download_data.parse_arguments(list(flags))
