"""Configuration: flags come from the dataclass, presets change defaults, and a slip is answered at once."""

import dataclasses
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import story_generative_model as sgm

FIELDS = dataclasses.fields(sgm.Config)
PROGRAM = str(ROOT / "story_generative_model.py")


def another_value(field):
    """A legal value of the field that is not its default."""
    if field.metadata["choices"]:
        return next(choice for choice in field.metadata["choices"] if choice != field.default)
    return "else" if isinstance(field.default, str) else field.default * 2 or 8


@pytest.mark.parametrize("command", sgm.COMMANDS)
def test_each_field_is_a_flag_of_its_commands_and_of_no_other(command, capsys):
    for field in FIELDS:
        flag = field.metadata["name"] or field.name
        if isinstance(field.default, bool):
            argv, value = [command, f"--{flag}"], True
        else:
            value = another_value(field)
            argv = [command, f"--{flag}", str(value)]
        if command in field.metadata["commands"]:
            name, config, given = sgm.parse_args(argv)
            assert (name, getattr(config, field.name), given) == (command, value, {field.name})
        else:
            with pytest.raises(SystemExit) as stop:
                sgm.parse_args(argv)
            assert stop.value.code == 2 and flag in capsys.readouterr().err


def test_without_flags_the_defaults_hold():
    usual = sgm.Config(**sgm.PRESETS["gpt2-xl"])
    assert sgm.parse_args(["train"]) == ("train", usual, set())


def test_an_explicit_flag_wins_over_the_preset_even_with_the_global_default():
    _, config, _ = sgm.parse_args(["train", "--num_codes", "4096", "--preset", "storyworld"])
    preset = sgm.PRESETS["storyworld"]
    assert config.num_codes == 4096 != preset["num_codes"]
    assert config.encoder_width == preset["encoder_width"] != sgm.Config().encoder_width


@pytest.mark.parametrize(
    "flag, value",
    [
        ("num_codes", "1"), ("num_codes", "many"), ("learning_rate", "-1"), ("learning_rate", "nan"),
        ("train_batch_size", "0"), ("mixed_precision", "fp8"), ("preset", "gpt9"), ("lr_scheduler", "zigzag"),
        ("encoder_width", "100"), ("temperature", "0"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_exit_code_2(flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        sgm.parse_args(["train", f"--{flag}", value])
    told = capsys.readouterr()
    assert stop.value.code == 2 and told.out == ""
    last = told.err.strip().splitlines()[-1]
    assert "error:" in last and f"--{flag}" in last


def test_an_abbreviated_flag_is_refused():
    with pytest.raises(SystemExit):
        sgm.parse_args(["train", "--num_code", "8"])


def test_a_program_that_builds_a_bad_config_gets_the_same_error():
    with pytest.raises(sgm.StoryError, match=r"--num_codes must be at least 2, got 1") as error:
        sgm.Config(num_codes=1)
    assert error.value.code == 2


@pytest.mark.parametrize(
    "argv, status", [(["train", "--help"], 0), (["train", "--num_codes", "1"], 2)]
)
def test_help_and_a_slip_are_answered_without_importing_torch(argv, status):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", PROGRAM, *argv],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status and "Traceback" not in done.stderr
    imported = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, re.M))
    assert "argparse" in imported and not imported & {
        "torch",
        "numpy",
        "transformers",
        "diffusers",
        "PIL",
    }
    if status:
        assert done.stdout == "" and done.stderr.strip().endswith(
            "--num_codes must be at least 2, got 1"
        )
    else:
        assert "--num_codes" in done.stdout and "default: 4096" in done.stdout


def test_the_two_original_commands_parse():
    command, config, _ = sgm.parse_args(["train", "--mixed_precision", "fp16"])
    assert (command, config.mixed_precision, config.lm_model) == (
        "train",
        "fp16",
        "openai-community/gpt2-xl",
    )
    prompt, path = "Build a Disney park on the moon", "checkpoints/story_gen/ckpt_10000.pt"
    command, config, given = sgm.parse_args(["generate", "--prompt", prompt, "--ckpt", path])
    assert (command, config.prompt, config.ckpt, given) == (
        "generate",
        prompt,
        path,
        {"prompt", "ckpt"},
    )


def test_the_side_of_a_picture_is_what_a_pipeline_can_paint():
    with pytest.raises(sgm.StoryError, match="--image_size must be a multiple of 8, got 30"):
        sgm.Config(image_size=30)


@pytest.mark.parametrize("name", ["lm_model", "diffusion_model"])
def test_a_frozen_model_has_a_name(name):
    with pytest.raises(sgm.StoryError, match=f"--{name} is empty: give a hub id or a folder"):
        sgm.Config(**{name: " "})
