"""The program as people use it: used folders, moved checkpoints, odd prompts files and terminals."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from children import PROGRAM
from conftest import as_flags

import story_generative_model as sgm


def run(*argv, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, PROGRAM, *map(str, argv)]
    return subprocess.run(command, capture_output=True, timeout=120, **options)


@pytest.fixture()
def latest(trained) -> str:
    return str(Path(trained.output_dir) / "ckpt_6.pt")


@pytest.mark.check(
    "a new run in a folder with another run's checkpoints: refused before torch loads"
)
def test_a_folder_is_one_run_s(trained):
    folder = Path(trained.output_dir)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = run(*as_flags(dataclasses.replace(trained, seed=1)))
    assert done.returncode == 2 and b"--resume_from_checkpoint latest" in done.stderr
    with pytest.raises(sgm.StoryError, match="another --output_dir"):
        sgm.train(dataclasses.replace(trained, seed=1))
    with pytest.raises(sgm.StoryError, match="another run"):  # going on elsewhere, into this one
        sgm.train(dataclasses.replace(trained, resume_from_checkpoint="elsewhere/ckpt_3.pt"))
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.check("train, evaluate and codebook with --data_root FILE: told so in one line")
@pytest.mark.parametrize("command", ["train", "evaluate", "codebook"])
def test_data_that_are_a_file(trained, latest, tmp_path, command):
    file, argv = tmp_path / "stories.jsonl", [command, "--ckpt", latest]
    file.write_text("{}")
    if command == "train":
        argv = as_flags(dataclasses.replace(trained, output_dir=str(tmp_path / "out")))
    with pytest.raises(sgm.StoryError, match=f"--data_root {file} is a file.*give the folder"):
        sgm.main([*argv, "--data_root", str(file)])


def test_a_folder_of_checkpoints_is_its_newest(trained, tmp_path):
    assert sgm.find_checkpoint(trained.output_dir).name == "ckpt_6.pt"
    with pytest.raises(sgm.StoryError, match="does not exist"):
        sgm.find_checkpoint(str(tmp_path))


@pytest.mark.check("models that have moved: generate, codebook and export take their new place")
def test_models_that_have_moved(trained, latest, tmp_path, capsys):
    lm = shutil.copytree(trained.lm_model, tmp_path / "lm")
    painter = shutil.copytree(trained.diffusion_model, tmp_path / "painter")
    checkpoint = sgm.load_checkpoint(latest)
    gone = dict(lm_model=str(tmp_path / "gone"), diffusion_model=str(tmp_path / "gone too"))
    checkpoint["config"] = dataclasses.replace(checkpoint["config"], **gone)
    sgm.save_checkpoint(
        tmp_path / "ckpt_6.pt", dict(checkpoint, config=dataclasses.asdict(checkpoint["config"]))
    )
    moved = ["--ckpt", str(tmp_path), "--lm_model", str(lm)]
    with pytest.raises(sgm.StoryError, match=r"--lm_model .*gone cannot be loaded"):
        sgm.main(["codebook", *moved[:2]])
    sgm.main(["codebook", *moved])
    both = [*moved, "--diffusion_model", str(painter)]
    sgm.main(["generate", *both, "--prompt", "The fox", "--output", str(tmp_path / "a.png")])
    sgm.main(["export", *both, "--output", str(tmp_path / "exported")])
    exported = sgm.load_checkpoint(tmp_path / "exported")["config"]
    assert (exported.lm_model, exported.diffusion_model) == (str(lm), str(painter))


@pytest.mark.check("prompts files: a byte order mark, odd separators, none at all, beside --prompt")
def test_prompts_files(checkpoint, tmp_path):
    path = tmp_path / "prompts.txt"
    config = dataclasses.replace(checkpoint["config"], prompts_file=str(path))
    path.write_bytes("\ufeffThe fox\r\n\r\nThe\u2028owl\x0b\n".encode())
    assert sgm.read_prompts(config) == ["The fox", "The owl"]  # newlines alone end a prompt
    path.write_bytes("\ufeffThe fox\n\ufeffThe owl\n\u200b\n".encode())  # two files, joined
    assert sgm.read_prompts(config) == ["The fox", "The owl"]
    for unseen in ("\u200b", "\ufeff \u2060", "\U000e0041"):
        with pytest.raises(sgm.StoryError, match="--prompt is empty"):
            sgm.read_prompts(dataclasses.replace(config, prompts_file="", prompt=unseen))
    with pytest.raises(sgm.StoryError, match="give one of them"):
        sgm.read_prompts(dataclasses.replace(config, prompt="The fox"))
    for nothing in (b"", b"\n \n", b"\xef\xbb\xbf\n"):
        path.write_bytes(nothing)
        with pytest.raises(sgm.StoryError, match="holds no prompt"):
            sgm.read_prompts(config)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(sgm.StoryError, match="cannot be read"):
        sgm.read_prompts(config)


@pytest.mark.check("a terminal that is not UTF-8, and a closed pipe: no traceback, nothing lost")
def test_narrow_terminals_and_closed_pipes(latest, tmp_path):
    argv = [
        "generate",
        "--ckpt",
        latest,
        "--prompt",
        "The fox \u72d0",
        "--output",
        tmp_path / "a.png",
    ]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = run(*argv, env=ascii_only)
    assert done.returncode == 0 and done.stdout.startswith(b"The fox ?"), done.stderr
    assert "\u72d0" in sgm.read_record(str(tmp_path / "a.png"))["story"]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, PROGRAM, *map(str, argv)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=120)
    os.close(writer)
    assert (
        done.returncode == 141 and b"Traceback" not in done.stderr and b"error" not in done.stderr
    )


@pytest.mark.check("the launcher's gradient accumulation against the program's: refused")
def test_the_environment_s_accumulation(make_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(
        sgm.StoryError, match="=4 in the environment, --gradient_accumulation_steps 1"
    ):
        sgm.train(make_config())


def test_a_story_that_is_longer_than_the_context_and_has_no_sentence(make_config, tmp_path):
    """The sample's prompt is too long: the run goes on, and its checkpoint is saved."""
    from conftest import make_data

    data = make_data(tmp_path / "data")
    for split in ("train", "val"):
        path = data / split / "stories.jsonl"
        tags = "fox, owl, star, " * 40
        row = dict(prompt=tags, story=tags, image_path="images/000000_0.png")
        path.write_text(f"{json.dumps(row)}\n" * 8)
    config = make_config(data_root=str(data))
    sgm.train(config)
    assert (Path(config.output_dir) / "ckpt_6.pt").is_file()
