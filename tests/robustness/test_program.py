"""The program as a whole: exit codes, where its words go, and what its sources do without."""

import ast
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from children import PROGRAM
from conftest import ROOT, as_flags

ERRORS = {  # arguments, exit status, and what the one line says
    "an unknown flag": (["train", "--no_such_flag"], 2, "--no_such_flag"),
    "a number out of range": (["train", "--num_codes", "1"], 2, "--num_codes must be at least 2"),
    "no prompt": (["generate"], 2, "--prompt is empty"),
    "a checkpoint that is not there": (
        ["generate", "--prompt", "x", "--ckpt", "gone.pt"],
        2,
        "gone.pt does not exist",
    ),
    "no data": (["train", "--preset", "storyworld", "--data_root", "gone"], 1, "download_data.py"),
    "no such output folder": (
        ["generate", "--prompt", "x", "--output", "gone/a.png"],
        2,
        "a folder that exists",
    ),
    "a storyboard of three codes": (
        ["generate", "--prompt", "x", "--storyboard", "1 2 3"],
        2,
        "needs 8 places",
    ),
    "--from of another file": (["generate", "--from", "story.jsonl"], 2, "not a book"),
}


def run(*argv: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, PROGRAM, *argv], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.check(
    "an error: its exit status, one line on standard error, nothing on standard output"
)
@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line(tmp_path, name):
    argv, status, told = ERRORS[name]
    done = run(*argv, cwd=tmp_path)
    assert done.returncode == status and done.stdout == "", done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1 and told in errors[0] and "Traceback" not in done.stderr


@pytest.mark.check(
    "Ctrl-C while the libraries load, and while a story is made: exit 130, no traceback"
)
@pytest.mark.parametrize("moment", ["libraries", "story"])
def test_ctrl_c(tmp_path, moment):
    command = [sys.executable, PROGRAM, "generate", "--preset", "storyworld", "--prompt", "x"]
    command += ["--num_stories", "50"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if moment == "libraries":
        time.sleep(1)
    else:
        assert "embedded" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in err


@pytest.mark.check("--debug shows the traceback")
def test_debug_shows_the_traceback(tmp_path):
    done = run("generate", "--prompt", "x", "--ckpt", "gone.pt", "--debug", cwd=tmp_path)
    assert (
        done.returncode != 0
        and "Traceback" in done.stderr
        and "gone.pt does not exist" in done.stderr
    )


@pytest.mark.check(
    "standard output holds results alone, in train, generate, evaluate, codebook and export"
)
@pytest.mark.parametrize(
    "command, lines",
    [("train", 0), ("generate --prompt x --json", 1), ("evaluate --max_val_samples 3", None), ("codebook", None),
     ("export", 1)],
)  # fmt: skip
def test_standard_output(trained, make_config, tmp_path, command, lines):
    if command == "train":
        argv = as_flags(make_config(max_train_steps=2, validation_steps=2))
    else:
        argv = [*command.split(), "--ckpt", str(Path(trained.output_dir) / "ckpt_6.pt")]
    done = run(*argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert len(told) == lines if lines is not None else len(told) > 3
    assert not any(word in done.stdout for word in ("Warning", "INFO", "Loading", "it/s"))


FORBIDDEN_CALLS = {"eval", "exec", "__import__"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "yaml"}


@pytest.mark.check(
    "sources: no trust_remote_code, weights_only=False, pickle, yaml.load, eval, shell=True"
)
@pytest.mark.parametrize(
    "path",
    [path.relative_to(ROOT) for path in [*ROOT.glob("*.py"), *ROOT.glob("assets/**/*.py")]],
    ids=str,
)
def test_what_the_sources_do_without(path):
    """Read as syntax, so that a method named eval and a word in a comment are what they are."""
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") not in FORBIDDEN_CALLS, f"{path}:{node.lineno}"
            assert getattr(node.func, "attr", "") not in ("system", "popen"), (
                f"{path}:{node.lineno}"
            )
        if isinstance(node, ast.keyword):
            value = getattr(node.value, "value", None)
            refused = node.arg != "trust_remote_code" or value is False
            assert refused, f"{path}:{node.lineno}"
            assert (node.arg, value) not in (("weights_only", False), ("shell", True)), (
                f"{path}:{node.lineno}"
            )
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(keyword.arg == "weights_only" for keyword in node.keywords), (
                f"{path}:{node.lineno}"
            )
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
            assert not names & FORBIDDEN_MODULES, f"{path}:{node.lineno}"
