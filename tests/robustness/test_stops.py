"""Signals, and numbers that are not finite."""

import signal
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from children import Child, together
from conftest import as_flags
from test_training import same

import story_generative_model as sgm


@pytest.fixture()
def endless(make_config):
    return make_config(
        max_train_steps=100_000, checkpointing_steps=100_000, validation_steps=100_000
    )


@pytest.mark.check(
    "SIGTERM and SIGINT, to the process and its group, 0 and 2 workers: saved, exit 143 or 130"
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_saves_and_stops(endless, tmp_path, number, group, workers):
    child = Child(as_flags(replace(endless, dataloader_num_workers=workers)), tmp_path / "log")
    child.wait_for_step(4)
    child.send(number, group)
    assert child.finish() == 128 + number, child.err
    (path,) = sgm.list_checkpoints(Path(endless.output_dir))
    step, stopped_in = sgm.load_checkpoint(path)["step"], child.pulse.value
    assert step == stopped_in + 1  # the step in hand, and none after it
    assert (
        f"after step {step};" in child.err.splitlines()[-1]
        and "Traceback" not in child.err
        and child.out == ""
    )


@pytest.mark.check("a second signal stops at once")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal(endless, tmp_path, number):
    child = Child(as_flags(endless), tmp_path / "log", "slow")
    child.wait_for_step(1)
    child.send(number)
    while "once more" not in child.err:
        time.sleep(0.01)
    child.send(number)
    assert child.finish() == -number
    assert child.pulse.value == 1 and not sgm.list_checkpoints(Path(endless.output_dir))


@pytest.mark.check("two processes, one signalled: both save the same step and stop")
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_signalled_stops_both(endless, tmp_path, rank):
    children = together(as_flags(replace(endless, train_batch_size=2)), tmp_path / "log")
    for child in children:
        child.wait_for_step(3)
    children[rank].send(signal.SIGTERM)
    assert [child.finish() for child in children] == [143, 143], children[0].err
    (path,) = sgm.list_checkpoints(Path(endless.output_dir))
    step = sgm.load_checkpoint(path)["step"]
    assert all(f"after step {step};" in child.err for child in children)


@pytest.mark.check(
    "a NaN or an infinity in the loss: stopped before the update, all named, codebook untouched"
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(trained, tmp_path, monkeypatch, value):
    checkpoint = torch.load(Path(trained.output_dir) / "ckpt_3.pt", weights_only=True)
    checkpoint["model"]["soft_prompt.linear.weight"].fill_(value)
    sgm.save_checkpoint(tmp_path / "ckpt_3.pt", checkpoint)
    stopped_before_the_update(trained, tmp_path, monkeypatch, checkpoint, "loss")


@pytest.mark.check("an infinite gradient: the same")
def test_a_gradient_that_is_not_finite(trained, tmp_path, monkeypatch):
    checkpoint = torch.load(Path(trained.output_dir) / "ckpt_3.pt", weights_only=True)
    sgm.save_checkpoint(tmp_path / "ckpt_3.pt", checkpoint)
    make_optimizer = sgm.make_optimizer

    def poisoned(model, config):
        model.soft_prompt.linear.weight.register_hook(lambda gradient: gradient * torch.inf)
        return make_optimizer(model, config)

    monkeypatch.setattr(sgm, "make_optimizer", poisoned)
    stopped_before_the_update(trained, tmp_path, monkeypatch, checkpoint, "gradient")


def stopped_before_the_update(trained, folder, monkeypatch, checkpoint, what):
    models, resume = [], sgm.Trainer.resume
    monkeypatch.setattr(
        sgm.Trainer, "resume", lambda self: (models.append(self.model), resume(self))
    )
    named = (
        rf"step 4: the {what} is not finite \(text_nll .*learning rate .*rows .*stories\.jsonl:\d+"
    )
    with pytest.raises(sgm.StoryError, match=named) as error:
        sgm.train(replace(trained, output_dir=str(folder), resume_from_checkpoint="latest"))
    assert error.value.code == 1
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor.nan_to_num(), checkpoint["model"][name].nan_to_num()), name
    assert [path.name for path in folder.glob("*.pt")] == ["ckpt_3.pt"]


@pytest.mark.check("two processes, an infinity on one: both stop, and the codebook is not saved")
def test_an_infinity_on_one_process(make_config, tmp_path):
    config = make_config(train_batch_size=2, checkpointing_steps=100)
    children = together(as_flags(config), tmp_path / "log", fault="overflow")
    assert [child.finish() for child in children] == [1, 1], children[0].err
    assert all("the gradient is not finite" in child.err.splitlines()[-1] for child in children)
    assert not sgm.list_checkpoints(Path(config.output_dir))


@pytest.mark.check("fp16 overflow: step skipped, scale halved, schedule and codebook untouched")
def test_fp16_overflow(make_config, monkeypatch):
    """On a CPU too: its gradient scaler is the GPU's, and so is the optimizer that heeds it."""
    config = make_config(
        max_train_steps=8,
        quantizer_warmup_steps=0,
        validation_steps=100,
        commitment_weight=20.0,
        lr_warmup_steps=0,
    )
    trainer = sgm.Trainer(config)
    accelerator = trainer.accelerator
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=accelerator.scaler)
    accelerator._optimizers = [trainer.optimizer]
    seen, noise = [], sgm.Trainer.noise_generator

    def note(self):
        quantizer = self.model.encoder.quantizer
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        seen.append(
            (
                accelerator.scaler.get_scale(),
                self.schedule.last_epoch,
                state,
                int(quantizer.updates),
            )
        )
        return noise(self)

    monkeypatch.setattr(sgm.Trainer, "noise_generator", note)
    trainer.fit()
    scales, schedule, states, updates = zip(*seen)
    skipped = [second < first for first, second in pairwise(scales)]
    assert any(skipped) and not all(skipped)
    for step, was_skipped in enumerate(skipped):
        assert scales[step + 1] == scales[step] / (2 if was_skipped else 1)
        assert same(states[step], states[step + 1]) == was_skipped
        assert (
            (schedule[step + 1] == schedule[step])
            == was_skipped
            == (updates[step + 1] == updates[step])
        )
