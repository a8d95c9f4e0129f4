"""Several processes are one: their codebook, their weights, their learning rate; and the frozen stays frozen."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children import PROGRAM, Child, together
from conftest import as_flags
from test_training import same, scalars

import story_generative_model as sgm


@pytest.mark.check(
    "two gloo processes, 40 steps with revivals: one process on the joined batch (1e-12 in float64)"
)
@pytest.mark.parametrize("fault, tolerance", [("double", 1e-12), ("", 1e-5)])
def test_two_processes_are_one(make_config, tmp_path, fault, tolerance):
    usual = dict(
        max_train_steps=40, checkpointing_steps=40, validation_steps=100, prior_steps=0, ema_decay=0.5, num_codes=48,
        learning_rate=1e-4, prior_learning_rate=1e-4,
    )  # fmt: skip
    alone = make_config(train_batch_size=16, **usual)
    joined = make_config(train_batch_size=8, **usual)
    child = Child(as_flags(alone), tmp_path / "alone", fault)
    assert child.finish() == 0, child.err
    children = together(as_flags(joined), tmp_path / "joined", fault=fault)
    assert [child.finish() for child in children] == [0, 0], children[0].err
    first, second = (
        torch.load(Path(config.output_dir) / "ckpt_40.pt", weights_only=True)["model"]
        for config in (alone, joined)
    )
    for name, tensor in first.items():
        assert fault != "double" or tensor.dtype != torch.float32, name
        torch.testing.assert_close(
            tensor, second[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    rates = [scalars(config.output_dir)["optim/learning_rate"] for config in (alone, joined)]
    assert rates[0] == rates[1] and len(rates[0]) == 40
    revived = Path(f"{children[0].log}.revived.0").read_text().split()
    assert sum(map(int, revived)) > 0
    assert revived == Path(f"{children[1].log}.revived.1").read_text().split()
    hashes = [
        Path(f"{child.log}.weights.{rank}").read_text() for rank, child in enumerate(children)
    ]
    assert hashes[0] == hashes[1] != ""  # the ranks end with the same bits


@pytest.mark.check("the codebook with gradient checkpointing is the codebook without")
def test_gradient_checkpointing_leaves_the_codebook(make_config):
    books = []
    for checkpointing in (False, True):
        config = make_config(gradient_checkpointing=checkpointing, validation_steps=100)
        quantizer = sgm.train(config).encoder.quantizer
        books.append((quantizer.codebook, quantizer.counts, quantizer.sums, quantizer.updates))
    assert all(torch.equal(first, second) for first, second in zip(*books)) and books[0][3] > 1


@pytest.mark.check("EMA buffers stay float32 under bf16")
def test_buffers_under_bf16(make_config, tmp_path):
    sums = []
    for precision, fault in (("bf16", "bf16"), ("no", "")):
        config = make_config(mixed_precision=precision, validation_steps=100)
        child = Child(as_flags(config), tmp_path / precision, fault)
        assert child.finish() == 0, child.err
        model = torch.load(Path(config.output_dir) / "ckpt_6.pt", weights_only=True)["model"]
        quantizer = {
            name: tensor
            for name, tensor in model.items()
            if "quantizer" in name and "updates" not in name
        }
        assert len(quantizer) >= 3 and {tensor.dtype for tensor in quantizer.values()} == {
            torch.float32
        }
        sums.append(quantizer["encoder.quantizer.sums"])
    assert not torch.equal(*sums)  # the first did compute in bf16


@pytest.mark.check("python, torchrun and accelerate launch start the same run")
def test_three_launchers(make_config, tmp_path):
    launchers = {
        "python": [],
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"],
        "accelerate launch": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1",
                              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
    }  # fmt: skip
    parts = []
    for name, start in launchers.items():
        config = make_config(max_train_steps=2, validation_steps=100, quantizer_warmup_steps=0)
        command = [sys.executable, *start, PROGRAM, *as_flags(config)]
        env = dict(os.environ, OMP_NUM_THREADS="1", HF_HOME=str(tmp_path))
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0 and done.stdout == "", (name, done.stderr)
        parts.append(torch.load(Path(config.output_dir) / "ckpt_2.pt", weights_only=True))
    for part in ("model", "optimizer", "lr_scheduler", "position"):
        assert same(parts[0][part], parts[1][part]) and same(parts[0][part], parts[2][part]), part


@pytest.mark.check("frozen models: no parameter asks for a gradient, unchanged hash after 50 steps")
def test_frozen_models_stay(make_config):
    config = make_config(max_train_steps=50, checkpointing_steps=50, validation_steps=50)
    trainer = sgm.Trainer(config)
    lm, diffusion = trainer.model.lm, trainer.model.diffusion
    frozen = [lm.model, diffusion.vae, diffusion.unet, diffusion.text_encoder]

    def digest() -> str:
        tensors = (tensor for module in frozen for tensor in module.state_dict().values())
        return hashlib.sha256(
            b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
        ).hexdigest()

    before = digest()
    trainer.fit()
    assert digest() == before
    for module in frozen:
        assert not module.training
        assert all(
            not parameter.requires_grad and parameter.grad is None
            for parameter in module.parameters()
        )
