"""The original's three commands, as they stand, against a local hub that serves tiny models under the true ids."""

import json
import shlex
import signal
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
from conftest import ROOT, make_lm
from fakehub import Hub, m3it_repo, model_repo
from PIL import Image

LM, DIFFUSION = "openai-community/gpt2-xl", "stable-diffusion-v1-5/stable-diffusion-v1-5"
PROMPT = "Build a Disney park on the moon"


@pytest.fixture(scope="module")
def hub(diffusion_folder, tmp_path_factory):
    lm_folder = make_lm(tmp_path_factory.mktemp("lm"), context=256)  # with room for a template
    repos = {
        "datasets/MMInstruction/M3IT": m3it_repo(),
        f"models/{LM}": model_repo(lm_folder),
        f"models/{DIFFUSION}": model_repo(diffusion_folder),
    }
    with Hub(repos) as hub:
        yield hub


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """An empty folder with the two scripts in it."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("download_data.py", "story_generative_model.py"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def start(command: str, folder: Path, hub: Hub) -> subprocess.Popen:
    env = hub.env(folder / "home", OMP_NUM_THREADS="2")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(
        [sys.executable, *shlex.split(command)[1:]], cwd=folder, env=env, **pipes
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def test_the_three_commands_run_one_after_the_other(hub, workplace):
    finish(start("python download_data.py", workplace, hub))
    assert (workplace / "data/train/stories.jsonl").is_file()

    process = start("python story_generative_model.py train --mixed_precision fp16", workplace, hub)
    lines = [*takewhile(lambda line: "Running training" not in line, process.stderr)]
    assert sum("fp16 needs a GPU" in line for line in lines) == 1
    process.send_signal(
        signal.SIGTERM
    )  # 150,000 steps are not waited for: the step in hand is finished and saved
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, err
    (saved,) = (workplace / "checkpoints/story_gen").glob("ckpt_*.pt")
    saved.rename(saved.with_name("ckpt_10000.pt"))

    ckpt = "checkpoints/story_gen/ckpt_10000.pt"
    out, err = finish(
        start(
            f'python story_generative_model.py generate --prompt "{PROMPT}" --ckpt {ckpt}',
            workplace,
            hub,
        )
    )
    assert out.startswith(PROMPT)
    with Image.open(workplace / "generated.png") as picture:
        record = json.loads(picture.text["story"])
        assert picture.size == (32, 32)
    assert record["prompt"] == PROMPT and len(record["storyboard"]) == 8
    asked = json.dumps([request.path for request in hub.log])
    assert LM in asked and DIFFUSION in asked and "MMInstruction/M3IT" in asked


def test_a_model_that_the_hub_lacks_is_named_in_one_line(hub, workplace):
    finish(start("python download_data.py", workplace, hub))
    process = start(
        "python story_generative_model.py train --output_dir other --lm_model nobody/nothing",
        workplace,
        hub,
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in err
    assert (
        "--lm_model nobody/nothing" in err.splitlines()[-1]
        and "--preset storyworld" in err.splitlines()[-1]
    )
