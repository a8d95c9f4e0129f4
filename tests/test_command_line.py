"""Command line: the commands from argv to what they leave."""

import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, as_flags
from PIL import Image

import story_generative_model as sgm


def test_processes_that_look_at_one_folder_together_do_not_disturb_each_other(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: sgm.prepare_folder(tmp_path / "run", "output_dir"), range(2000)))
    assert not list((tmp_path / "run").iterdir())


@pytest.fixture()
def ckpt(trained) -> str:
    return str(Path(trained.output_dir) / "ckpt_6.pt")


def test_generate_from_a_checkpoint_writes_what_the_function_writes(
    ckpt, checkpoint, tmp_path, capsys
):
    path = tmp_path / "fox.png"
    sgm.main(
        [
            "generate",
            "--prompt",
            "The red fox",
            "--ckpt",
            ckpt,
            "--output",
            str(path),
            "--seed",
            "4",
        ]
    )
    told = capsys.readouterr()
    config = dataclasses.replace(
        checkpoint["config"], prompt="The red fox", seed=4, output=str(tmp_path / "b.png")
    )
    assert told.out == sgm.generate(config, checkpoint)[0].story + "\n"
    assert path.read_bytes() == (tmp_path / "b.png").read_bytes() and "embedded" not in told.err


def test_a_flag_wins_over_the_checkpoint_which_wins_over_the_preset(ckpt, trained, monkeypatch):
    seen = []
    monkeypatch.setattr(
        sgm, "generate", lambda config, checkpoint, given: seen.append((config, checkpoint["step"]))
    )
    sgm.main(
        [
            "generate",
            "--prompt",
            "x",
            "--ckpt",
            ckpt,
            "--temperature",
            "1.0",
            "--max_new_tokens",
            "5",
        ]
    )
    config, step = seen[0]
    given = dict(prompt="x", ckpt=ckpt, temperature=1.0, max_new_tokens=5)
    assert config == dataclasses.replace(trained, **given) and step == 6


def test_generate_without_a_checkpoint_says_that_it_uses_the_embedded_one(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    prompt = "A shy blue owl looks for a lost star"
    sgm.main(
        ["generate", "--preset", "storyworld", "--prompt", prompt]
        + ["--num_inference_steps", "2", "--max_new_tokens", "60"]
    )
    told = capsys.readouterr()
    assert "embedded" in told.err and "assets/storyworld/storyboard.pt" in told.err
    assert told.out.startswith(prompt) and len(told.out) > len(prompt) + 20
    with Image.open(tmp_path / "generated.png") as image:
        record = json.loads(image.text["story"])
    assert record["checkpoint"]["name"] == "storyboard.pt" and record["prompt"] == prompt


def test_evaluate_prints_its_table(ckpt, trained, tmp_path, capsys):
    output = tmp_path / "metrics.json"
    sgm.main(["evaluate", "--ckpt", ckpt, "--max_val_samples", "3", "--output", str(output)])
    told = capsys.readouterr()
    assert told.out.startswith(f"3 stories of {trained.data_root}/val")
    assert all(
        name in told.out
        for name in ("text_nll.true", "bits_returned", "elbo", "diffusion_nll.true")
    )
    assert output.is_file()


def test_train_from_flags_trains(make_config, monkeypatch):
    config = make_config(
        seed=7, gradient_checkpointing=True, num_storyboards=32
    )  # 32: no flag of train
    seen = []
    monkeypatch.setattr(sgm, "train", seen.append)
    sgm.main(as_flags(config))
    assert seen == [config]


def test_a_wrong_checkpoint_is_one_line_and_exit_code_2(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "story_generative_model.py"),
        "generate",
        "--prompt",
        "x",
        "--ckpt",
        "gone.pt",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: gone.pt does not exist")
