"""Export: what others load is what was trained, from a folder and from a hub that is really spoken to."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from fakehub import Hub
from safetensors.torch import load_file

import story_generative_model as sgm


@pytest.fixture()
def exported(checkpoint, tmp_path):
    folder = tmp_path / "exported"
    sgm.export(dataclasses.replace(checkpoint["config"], output=str(folder)), checkpoint)
    return folder


def test_the_folder_holds_the_trained_tensors_their_configuration_and_a_card(exported, checkpoint):
    tensors = load_file(exported / "model.safetensors")
    assert set(tensors) == set(checkpoint["model"])
    for name, tensor in checkpoint["model"].items():
        half = tensor.is_floating_point()
        assert tensors[name].dtype == (torch.float16 if half else tensor.dtype)
        torch.testing.assert_close(tensors[name].to(tensor.dtype), tensor, rtol=2**-10, atol=2**-24)
    settings = json.loads((exported / "config.json").read_text())
    assert sgm.Config(**settings["config"]) == checkpoint["config"] and settings["step"] == 6
    card = (exported / "README.md").read_text()
    assert card.startswith("---\n") and checkpoint["config"].lm_model in card


def test_a_folder_generates_what_its_checkpoint_generates(exported, checkpoint, tmp_path):
    settings = dict(prompt="The red fox", output=str(tmp_path / "a.png"))
    again = sgm.load_checkpoint(exported)
    results = [
        sgm.generate(dataclasses.replace(one["config"], **settings), one)[0]
        for one in (checkpoint, again)
    ]
    assert results[0].story == results[1].story and results[0].storyboard == results[1].storyboard


def test_what_half_precision_does_not_hold_stays_as_it_is():
    large = torch.tensor([1.0, 1e6])
    assert torch.equal(sgm.in_half(large), large) and sgm.in_half(large).dtype == torch.float32
    assert sgm.in_half(large[:1]).dtype == torch.float16


def test_training_cannot_go_on_from_an_export(exported, make_config):
    with pytest.raises(sgm.StoryError, match="lacks optimizer"):
        sgm.train(make_config(resume_from_checkpoint=str(exported)))


@pytest.mark.parametrize("damage", ["no config", "cut"])
def test_a_damaged_folder_is_named(exported, damage):
    if damage == "cut":
        (exported / "model.safetensors").write_bytes(b"cut")
    else:
        (exported / "config.json").unlink()
    with pytest.raises(sgm.StoryError, match="not a folder that export wrote") as error:
        sgm.load_checkpoint(exported)
    assert error.value.code == 2


def test_pushed_to_the_hub_and_used_from_there(trained, tmp_path):
    """Three processes that know the hub by HF_ENDPOINT alone."""
    with Hub({}) as hub:
        env = hub.env(tmp_path / "home", HF_TOKEN="hf_" + "x" * 34)

        def run(*argv: str) -> subprocess.CompletedProcess:
            command = [sys.executable, str(ROOT / "story_generative_model.py"), *argv]
            return subprocess.run(
                command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
            )

        ckpt = f"{trained.output_dir}/ckpt_6.pt"
        pushed = run(
            "export", "--ckpt", ckpt, "--output", "out", "--push_to_hub", "someone/storyboard"
        )
        assert pushed.returncode == 0, pushed.stderr
        assert set(hub.repos["models/someone/storyboard"]["main"]) == {
            "model.safetensors",
            "config.json",
            "README.md",
        }
        used = run(
            "generate",
            "--ckpt",
            "someone/storyboard",
            "--prompt",
            "The red fox",
            "--output",
            "a.png",
        )
        assert used.returncode == 0 and used.stdout.startswith("The red fox"), used.stderr
        missing = run("generate", "--ckpt", "someone/else", "--prompt", "The red fox")
    assert (
        missing.returncode == 1
        and "--ckpt someone/else" in missing.stderr
        and "Traceback" not in missing.stderr
    )
    assert "hf_xxx" not in pushed.stdout + pushed.stderr + used.stderr
