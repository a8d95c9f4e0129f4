"""Checkpoints on disks that fill up, under kills, and after damage."""

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import PROGRAM, SERVER, Child, start_server, together
from conftest import as_flags
from test_checkpoints import Malicious, refused, small

import story_generative_model as sgm

# Writing


def write_for_ever(folder: Path) -> None:
    step = 0
    while True:
        step += 1
        sgm.save_checkpoint(
            folder / f"ckpt_{step}.pt",
            small(step) | {"model": {"weight": torch.full((250_000,), step)}},
        )
        sgm.rotate_checkpoints(folder, 2)


@pytest.mark.check("SIGKILL while checkpoints are written: the newest that is listed loads")
def test_a_kill_during_writing_leaves_a_good_file(tmp_path, record_property):
    record_property("tried", 20)
    start_server()
    rng = random.Random(0)
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = SERVER.Process(target=write_for_ever, args=(folder,))
        process.start()
        while not sgm.list_checkpoints(folder):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        newest = sgm.list_checkpoints(folder)[-1]
        loaded = sgm.load_checkpoint(newest)
        assert (
            loaded["step"]
            == int(loaded["model"]["weight"][0])
            == int(newest.stem.removeprefix("ckpt_"))
        )


@pytest.mark.check(
    "a full disk: exit 1 with path and megabytes, no partial file, the older checkpoint untouched"
)
@pytest.mark.parametrize(
    "fault, what", [("files of 100 kB", "ckpt_6.pt"), ("files of 3 kB", "--output_dir")]
)
def test_a_full_disk(trained, tmp_path, fault, what):
    before = Path(trained.output_dir, "ckpt_3.pt").read_bytes()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "ckpt_3.pt").write_bytes(before)
    config = replace(
        trained, output_dir=str(folder), resume_from_checkpoint="latest", max_train_steps=1000
    )
    settings = dict(checkpointing_steps=6, validation_steps=1000, logging_steps=100, override=True)
    if what == "--output_dir":  # TensorBoard's file is full first
        settings |= dict(checkpointing_steps=1000, logging_steps=1)
    child = Child(as_flags(replace(config, **settings)), tmp_path / "log", fault)
    assert child.finish() == 1
    last = child.err.splitlines()[-1]
    assert last.startswith("error: ") and str(folder) in last and what in last and "MB free" in last
    assert ("MB needed" in last) == (what == "ckpt_6.pt")
    assert sorted(path.name for path in folder.glob("ckpt*")) == ["ckpt_3.pt"]
    assert (folder / "ckpt_3.pt").read_bytes() == before


@pytest.mark.check("a folder that cannot be written: told before torch is imported")
@pytest.mark.parametrize("folder", ["file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written(tmp_path, folder):
    (tmp_path / "file").touch()
    command = [sys.executable, "-X", "importtime", PROGRAM, "train", "--output_dir", folder]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (
        done.returncode == 1
        and len(told) == 1
        and told[0].startswith(f"error: --output_dir {folder} cannot")
    )
    assert "| torch" not in done.stderr and "| numpy" not in done.stderr


@pytest.mark.check("rotation: never below two, never the one the run went on from")
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_rotation_spares_where_the_run_came_from(trained, tmp_path, limit):
    config = replace(trained, output_dir=str(tmp_path), max_train_steps=10, checkpointing_steps=1)
    (tmp_path / "ckpt_3.pt").write_bytes(Path(trained.output_dir, "ckpt_3.pt").read_bytes())
    settings = dict(
        resume_from_checkpoint="latest",
        checkpoints_total_limit=limit,
        validation_steps=100,
        override=True,
    )
    sgm.train(replace(config, **settings))
    left = [path.name for path in sgm.list_checkpoints(tmp_path)]
    assert left == ["ckpt_3.pt", *(f"ckpt_{step}.pt" for step in range(11 - max(limit, 2), 11))]


@pytest.mark.check("two processes: only rank 0 writes")
def test_only_rank_0_writes(make_config, tmp_path):
    config = make_config(train_batch_size=2)
    children = together(as_flags(config), tmp_path / "log")
    assert [child.finish() for child in children] == [0, 0], children[1].err
    writes = [
        [
            line
            for line in Path(f"{child.log}.writes.{rank}").read_text().splitlines()
            if config.output_dir in line
        ]
        for rank, child in enumerate(children)
    ]
    assert any("ckpt_6.pt.part" in line for line in writes[0]) and writes[1] == []
    assert [path.name for path in sgm.list_checkpoints(Path(config.output_dir))] == [
        "ckpt_3.pt",
        "ckpt_6.pt",
    ]


@pytest.mark.check("size: at most 1.05 x 12 bytes a trained parameter + 1 MB")
def test_the_size_of_a_checkpoint(make_config):
    config = make_config(
        encoder_width=256, prior_width=256, num_codes=512, max_train_steps=1, validation_steps=100
    )
    model = sgm.train(config)
    size = (Path(config.output_dir) / "ckpt_1.pt").stat().st_size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters > 1_000_000 and size <= 1.05 * 12 * parameters + 1e6


# Reading


def damaged(path: Path) -> dict[str, bytes]:
    whole = path.read_bytes()
    weight = torch.load(path, weights_only=True)["model"]["encoder.layers.layers.0.linear1.weight"]
    tensor, pickle = whole.index(weight.numpy().tobytes()), whole.index(b"data.pkl")
    return {
        "half": whole[: len(whole) // 2], "one byte short": whole[:-1], "the first 100 bytes": whole[:100],
        "empty": b"",
        "an HTML page": b"<!DOCTYPE html><html><body>404</body></html>",
        "a flipped bit in the pickle": flip(whole, pickle + 200), "a flipped bit in a tensor": flip(whole, tensor + 40),
        "a zeroed page": whole[:tensor] + bytes(4096) + whole[tensor + 4096 :],
    }  # fmt: skip


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


KINDS = ["half", "one byte short", "the first 100 bytes", "empty", "an HTML page", "a flipped bit in the pickle",
         "a flipped bit in a tensor", "a zeroed page"]  # fmt: skip


@pytest.mark.check("a damaged checkpoint given by hand: exit 2")
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found(trained, tmp_path, kind):
    path = tmp_path / "ckpt_6.pt"
    path.write_bytes(damaged(Path(trained.output_dir) / "ckpt_6.pt")[kind])
    refused(path)
    assert sgm.run(["generate", "--prompt", "x", "--ckpt", str(path)]) == 2


@pytest.mark.check(
    "a damaged newest checkpoint: `latest` warns with file and reason, and takes the one before"
)
@pytest.mark.parametrize("kind", KINDS)
def test_latest_falls_back(trained, tmp_path, capsys, kind):
    source = Path(trained.output_dir)
    (tmp_path / "ckpt_3.pt").write_bytes((source / "ckpt_3.pt").read_bytes())
    (tmp_path / "ckpt_6.pt").write_bytes(damaged(source / "ckpt_6.pt")[kind])
    settings = dict(output_dir=str(tmp_path), resume_from_checkpoint="latest", validation_steps=100)
    sgm.train(replace(trained, **settings))
    told = capsys.readouterr().err
    assert (
        f"{tmp_path / 'ckpt_6.pt'} is" in told and f"resumed from {tmp_path / 'ckpt_3.pt'}" in told
    )
    assert sgm.load_checkpoint(tmp_path / "ckpt_6.pt")["step"] == 6  # written anew


@pytest.mark.check("all checkpoints damaged: `latest` exits 2")
def test_latest_without_a_good_one(trained, tmp_path):
    for step in (3, 6):
        (tmp_path / f"ckpt_{step}.pt").write_bytes(b"damaged")
    with pytest.raises(sgm.StoryError, match="none of the checkpoints") as error:
        sgm.train(replace(trained, output_dir=str(tmp_path), resume_from_checkpoint="latest"))
    assert error.value.code == 2


@pytest.mark.check("a malicious pickle runs nothing, under four ways to read a checkpoint")
@pytest.mark.parametrize("command", ["generate --prompt x", "evaluate", "codebook", "export"])
def test_a_malicious_pickle(tmp_path, capsys, command):
    path, trace = tmp_path / "ckpt_5.pt", tmp_path / "trace"
    torch.save(small() | {"step": Malicious(trace)}, path)
    assert sgm.run([*command.split(), "--ckpt", str(path)]) == 2
    assert not trace.exists() and "weights_only" not in capsys.readouterr().err
