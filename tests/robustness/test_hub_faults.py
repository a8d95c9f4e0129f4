"""A hub that fails, lies or is not there; and a token that must not get out."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from children import PROGRAM
from conftest import as_flags
from fakehub import Hub, m3it_repo, m3it_rows, model_repo
from test_download_data import M3IT, NO_HUB, client_env, contents, fail, succeed

import download_data

LM, DIFFUSION = "openai-community/gpt2-xl", "stable-diffusion-v1-5/stable-diffusion-v1-5"


def first(count: int, part: str, answer):
    """A fault that answers the first `count` requests whose path has `part`."""
    left = [count]

    def fault(request) -> bool:
        if part not in request.path or request.command != "GET" or not left[0]:
            return False
        left[0] -= 1
        answer(request)
        return True

    return fault, left


def cut_body(request) -> None:
    """Promises more bytes than it sends."""
    request.send_response(200)
    request.send_header("Content-Length", "100000")
    request.end_headers()
    request.wfile.write(b"x" * 100)
    request.close_connection = True
    request.connection.close()


FAULTS = {
    "503 twice": (2, lambda request: request.send(503, b"busy", {})),
    "429": (1, lambda request: request.send(429, b"slow down", {"Retry-After": "1"})),
    "a cut body": (1, cut_body),
}


@pytest.mark.check("M3IT: 503 twice, 429, a cut body: the same bytes as without")
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("parquet", [True, False])
def test_a_hub_that_fails_for_a_while(tmp_path, name, parquet):
    part = ".parquet" if parquet else "resolve/main/data"
    count, answer = FAULTS[name]
    with Hub({M3IT: m3it_repo(train=m3it_rows(12), parquet=parquet)}) as hub:
        succeed("--data_root", tmp_path / "whole", env=hub.env(tmp_path / "home1"))
        fault, left = first(count, part, answer)
        hub.faults.append(fault)
        succeed("--data_root", tmp_path / "again", env=hub.env(tmp_path / "home2"))
    assert left == [0] and contents(tmp_path / "again") == contents(tmp_path / "whole")


@pytest.mark.check(
    "M3IT: SIGKILL at any row, run again: byte-identical, stories.jsonl only when complete"
)
def test_killed_at_any_row(tmp_path, record_property):
    rows, kills = 400, 5
    record_property("tried", kills)
    targets = sorted(random.Random(0).sample(range(1, rows - 100), kills))
    train = tmp_path / "broken" / "train"
    command = [sys.executable, download_data.__file__, "--data_root", str(tmp_path / "broken")]
    with Hub({M3IT: m3it_repo(train=m3it_rows(rows), rows_per_group=20)}) as hub:
        succeed("--data_root", tmp_path / "whole", env=hub.env(tmp_path / "home"))
        env = hub.env(tmp_path / "home", USE_TORCH="0")
        for target in targets:
            process = subprocess.Popen(
                command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while not (train / "images" / f"{target:06d}.jpg").exists() and process.poll() is None:
                time.sleep(0.0005)
            process.kill()
            assert process.wait() == -signal.SIGKILL and not (train / "stories.jsonl").exists()
        succeed("--data_root", tmp_path / "broken", env=env)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


@pytest.mark.check("M3IT: a flipped bit on the way, refused by sha256")
def test_a_flipped_bit_on_the_way(tmp_path):
    repo = m3it_repo(train=m3it_rows(12), parquet=False)

    def flip(request):
        (path,) = [path for path in repo["main"] if path in request.path]
        data = bytearray(repo["main"][path])
        data[len(data) // 2] ^= 1
        request.send(200, bytes(data), {"ETag": '"0"', "Accept-Ranges": "bytes"})

    with Hub({M3IT: repo}) as hub:
        fault, left = first(1, "_train.jsonl", flip)
        hub.faults.append(fault)
        message = fail("--data_root", tmp_path / "data", env=hub.env(tmp_path / "home"))
    assert left == [0] and "is damaged: its sha256 is" in message
    assert not (tmp_path / "data" / "train" / "stories.jsonl").exists()


@pytest.mark.check("no network: the error names the remedies, within 30 seconds")
@pytest.mark.parametrize("endpoint", [NO_HUB, "http://no-such-host.invalid"])
def test_no_network(tmp_path, endpoint):
    start = time.monotonic()
    message = fail("--data_root", tmp_path / "data", env=client_env(endpoint, tmp_path / "home"))
    assert all(
        remedy in message
        for remedy in ("--source storyworld", "--source folder PATH", "HF_ENDPOINT")
    )
    seconds = time.monotonic() - start
    assert (
        seconds < 30 or os.getloadavg()[0] > os.cpu_count()
    )  # a promise to the user, not a benchmark


@pytest.fixture(scope="module")
def model_hub(lm_folder, diffusion_folder):
    with Hub(
        {f"models/{LM}": model_repo(lm_folder), f"models/{DIFFUSION}": model_repo(diffusion_folder)}
    ) as hub:
        yield hub


def program(*argv: str, env: dict, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, PROGRAM, *argv]
    return subprocess.run(
        command,
        env=env | {"OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.check(
    "generate from a filled cache with HF_HUB_OFFLINE=1: no request at all, the same picture"
)
def test_offline_from_a_filled_cache(model_hub, make_config, tmp_path):
    config = make_config(
        lm_model=LM, diffusion_model=DIFFUSION, max_train_steps=2, validation_steps=100
    )
    online, home = model_hub.env(tmp_path / "home"), tmp_path / "home"
    done = program(*as_flags(config), env=online, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ask = [
        "generate",
        "--prompt",
        "The fox",
        "--ckpt",
        str(Path(config.output_dir) / "ckpt_2.pt"),
        "--output",
    ]
    assert program(*ask, "a.png", env=online, cwd=tmp_path).returncode == 0
    before = len(model_hub.log)
    done = program(
        *ask, "b.png", env=client_env(model_hub.url, home, HF_HUB_OFFLINE="1"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert len(model_hub.log) == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


LORA_REPOS = {  # flag, what lies on the hub, and the way on that is told
    "of a language model": (
        "lm_model",
        {"adapter_config.json": b"{}"},
        "--lm_adapter someone/lora",
    ),
    "of a painter": ("diffusion_model", {"pytorch_lora_weights.safetensors": b""}, "fuse_lora"),
    "of another name, tagged": (
        "diffusion_model",
        {"fox.safetensors": b"", "README.md": b"---\ntags:\n- lora\n---\n"},
        "fuse_lora",
    ),
}


@pytest.mark.check("a LoRA given by its hub id: refused as a folder of it is, and no base fetched")
@pytest.mark.parametrize("name", LORA_REPOS)
def test_a_lora_on_the_hub(trained, lm_folder, tmp_path, name):
    flag, files, way = LORA_REPOS[name]
    if flag == "lm_model":  # beside it lies the tokenizer
        files = files | {path.name: path.read_bytes() for path in lm_folder.glob("*token*.json")}
    argv = ["generate", "--ckpt", trained.output_dir, "--prompt", "A fox", f"--{flag}"]
    with Hub({"models/someone/lora": {"main": files}}) as hub:
        done = program(*argv, "someone/lora", env=hub.env(tmp_path / "home"), cwd=tmp_path)
    told = f"error: --{flag} someone/lora is a LoRA adapter, not a model: "
    assert done.returncode == 2 and done.stderr.startswith(told) and way in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.check("HF_TOKEN stands in no log, checkpoint, page, picture or export")
def test_the_token_stays_inside(model_hub, make_config, tmp_path):
    token = "hf_ThisIsATokenThatMustNotGetOut1234"
    config = make_config(
        lm_model=LM, diffusion_model=DIFFUSION, max_train_steps=2, output_dir=str(tmp_path / "run")
    )
    env = model_hub.env(tmp_path / "home", HF_TOKEN=token)
    ckpt = ["--ckpt", str(tmp_path / "run" / "ckpt_2.pt")]
    prompt = ["--prompt", "The fox", "--json", "--panels", "2"]
    told = ""
    for argv in (
        as_flags(config), ["generate", *ckpt, *prompt], ["generate", *ckpt, *prompt, "--output", "a.html"],
        ["generate", *ckpt, *prompt, "--output", "a.pdf"], ["export", *ckpt], ["generate", "--ckpt", "nobody/nothing"],
    ):  # fmt: skip
        done = program(*argv, env=env, cwd=tmp_path)
        assert done.returncode == 0 or "nobody/nothing" in argv, done.stderr
        told += done.stdout + done.stderr
    assert token not in told
    files = [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and (tmp_path / "home") not in path.parents
    ]
    assert len(files) >= 7 and {".pt", ".png", ".html", ".pdf", ".safetensors"} <= {
        path.suffix for path in files
    }
    for path in files:
        assert token.encode() not in path.read_bytes(), path
