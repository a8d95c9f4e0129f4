"""Training: what it logs, what it keeps, and that a run which was stopped goes on as if it had not been."""

import dataclasses
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, as_flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import story_generative_model as sgm


def scalars(folder: str) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(folder, size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def same(first, second) -> bool:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second))
    return first == second


# One run of six steps


def test_the_data_hold_stories_shorter_than_eight_tokens_and_longer_than_the_context(trained, lm):
    rows = sgm.read_rows(trained.data_root, "train")
    assert trained.max_train_steps * trained.train_batch_size == len(
        rows
    )  # one epoch: each was trained on
    lengths = [len(lm.tokenizer(row.story)["input_ids"]) for row in rows]
    assert min(lengths) < 8 and max(lengths) > lm.context


def test_a_run_leaves_the_checkpoints_it_says(trained):
    assert [path.name for path in sgm.list_checkpoints(Path(trained.output_dir))] == [
        "ckpt_3.pt",
        "ckpt_6.pt",
    ]
    assert all(
        path.name.startswith(("ckpt_", "events.")) for path in Path(trained.output_dir).iterdir()
    )


def test_tensorboard_has_each_step_once_and_finite(trained):
    points = scalars(trained.output_dir)
    for tag in ("elbo/text_nll", "elbo/latent_nll", "elbo/commitment", "elbo/diffusion_nll", "elbo/loss",
                "storyboard/codes_used", "storyboard/perplexity", "optim/learning_rate", "optim/grad_norm",
                "speed/stories_per_second"):  # fmt: skip
        assert [step for step, _ in points[tag]] == [1, 2, 3, 4, 5, 6], tag
        assert all(math.isfinite(value) for _, value in points[tag]), tag
    assert [step for step, _ in points["valid/text_nll_true"]] == [6]
    events = EventAccumulator(trained.output_dir)
    events.Reload()
    assert (
        "sample/panels" in events.Tags()["images"]
        and "sample/story/text_summary" in events.Tags()["tensors"]
    )


def test_the_learning_rate_warms_up_and_falls_to_zero(trained):
    rates = dict(scalars(trained.output_dir)["optim/learning_rate"])  # of the next step
    assert rates[1] == pytest.approx(trained.learning_rate / 2) and rates[2] == pytest.approx(
        trained.learning_rate
    )
    assert rates[2] > rates[3] > rates[4] > rates[5] > rates[6] == pytest.approx(0, abs=1e-9)


def test_the_codebook_waits_for_the_warm_up(trained):
    points = scalars(trained.output_dir)
    assert [value for _, value in points["elbo/commitment"]][:2] == [0, 0]
    assert all(value > 0 for _, value in points["elbo/commitment"][2:])
    assert all(value >= 1 for _, value in points["storyboard/codes_used"][2:])


# Going on


@pytest.fixture(scope="module")
def resumed(trained, tmp_path_factory):
    """The same run once more, lost after step 3 and resumed, in a folder that still has the lost
    steps' events."""
    folder = tmp_path_factory.mktemp("resumed") / "run"
    shutil.copytree(trained.output_dir, folder)
    (folder / "ckpt_6.pt").unlink()
    sgm.train(dataclasses.replace(trained, output_dir=str(folder), resume_from_checkpoint="latest"))
    return folder


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(trained, resumed):
    unbroken = torch.load(Path(trained.output_dir) / "ckpt_6.pt", weights_only=True)
    again = torch.load(resumed / "ckpt_6.pt", weights_only=True)
    for part in ("model", "optimizer", "lr_scheduler", "scaler", "step", "backbones"):
        assert same(unbroken[part], again[part]), part
    start = torch.load(Path(trained.output_dir) / "ckpt_3.pt", weights_only=True)
    assert not same(start["model"], again["model"]) and start["step"] == 3


def test_a_resumed_run_logs_what_the_unbroken_one_logged(trained, resumed):
    before, after = scalars(trained.output_dir), scalars(str(resumed))
    for tag in set(before) - {"speed/stories_per_second"}:
        assert before[tag] == after[tag], tag


def test_resuming_with_another_shape_is_refused(trained, tmp_path):
    path = str(Path(trained.output_dir) / "ckpt_3.pt")
    changed = dataclasses.replace(
        trained,
        num_codes=9,
        output_dir=str(tmp_path),
        resume_from_checkpoint=path,
        max_train_steps=4,
    )
    with pytest.raises(
        sgm.StoryError, match=r"ckpt_3\.pt is of another run: .*num_codes 8 there, 9 here"
    ) as error:
        sgm.train(changed)
    assert error.value.code == 2
    with pytest.raises(
        sgm.StoryError, match=r"ckpt_3\.pt was made with another configuration"
    ) as error:
        sgm.train(dataclasses.replace(changed, override=True))
    assert error.value.code == 2


# Precision


@pytest.mark.parametrize(
    ("wanted", "capability", "used"),
    [("fp16", True, "no"), ("bf16", False, "no"), ("bf16", True, "bf16"), ("no", True, "no")],
)
def test_a_processor_gets_the_precision_it_has(
    make_config, monkeypatch, capsys, wanted, capability, used
):
    """Where it is not what was asked for, one line says so."""
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": capability, "l2": 5}
    )
    assert sgm.usable_precision(make_config(mixed_precision=wanted), "cpu") == used
    told = capsys.readouterr().err
    assert len(told.splitlines()) == (wanted != used) and ("fp32" in told) == (wanted != used)


# Accumulation, frozen parts, and faults


def test_two_accumulated_batches_are_one_step(make_config, monkeypatch, lm, diffusion):
    config = make_config(
        gradient_accumulation_steps=2, max_train_steps=3, quantizer_warmup_steps=1, checkpoints_total_limit=2,
        checkpointing_steps=1, gradient_checkpointing=True, diffusion_stories=1, lr_warmup_steps=0,
    )  # fmt: skip
    seen, forward = [], sgm.StoryModel.forward

    def recorded(self, batch, noise):
        if self.training:
            weight = self.soft_prompt.linear.weight.detach().clone()
            seen.append(
                (
                    batch["index"],
                    len(batch["painted"]),
                    int(self.encoder.quantizer.updates) > 0,
                    weight,
                )
            )
        return forward(self, batch, noise)

    monkeypatch.setattr(sgm.StoryModel, "forward", recorded)
    model = sgm.train(config)
    indices, pictures, started, weights = zip(*seen)
    keys = iter(sgm.StoryBatches(24, 4, 1, config.seed))
    assert list(indices) == [[index for _, index, _ in next(keys)] for _ in range(6)]
    assert pictures == (0, 1) * 3 and started == (False, False, True, True, True, True)
    assert [torch.equal(weights[i], weights[i + 1]) for i in range(5)] == [
        True,
        False,
        True,
        False,
        True,
    ]
    names = [path.name for path in sgm.list_checkpoints(Path(config.output_dir))]
    assert names == ["ckpt_2.pt", "ckpt_3.pt"] and not model.training
    assert same(model.lm.model.state_dict(), lm.model.state_dict())
    for part in ("vae", "unet", "text_encoder"):
        assert same(
            getattr(model.diffusion, part).state_dict(), getattr(diffusion, part).state_dict()
        )


def test_a_loss_that_is_not_finite_stops_before_the_update(trained, tmp_path, monkeypatch):
    checkpoint = torch.load(Path(trained.output_dir) / "ckpt_3.pt", weights_only=True)
    checkpoint["model"]["soft_prompt.linear.weight"].fill_(float("nan"))
    sgm.save_checkpoint(tmp_path / "ckpt_3.pt", checkpoint)
    models, make_optimizer = [], sgm.make_optimizer

    def remembered(model, config):
        models.append(model)
        return make_optimizer(model, config)

    monkeypatch.setattr(sgm, "make_optimizer", remembered)
    with pytest.raises(sgm.StoryError, match=r"step 4: .*not finite.*stories\.jsonl:\d+") as error:
        sgm.train(
            dataclasses.replace(trained, output_dir=str(tmp_path), resume_from_checkpoint="latest")
        )
    assert error.value.code == 1
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter.nan_to_num(), checkpoint["model"][name].nan_to_num()), name
    assert [path.name for path in tmp_path.glob("*.pt")] == ["ckpt_3.pt"]


def test_an_output_folder_that_cannot_be_written_is_told_first(make_config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(sgm.StoryError, match="--output_dir"):
        sgm.train(make_config(output_dir=str(tmp_path / "file" / "run"), lm_model="nowhere"))


def test_sigterm_to_the_group_saves_the_step_in_hand_and_exits_143(make_config):
    config = make_config(
        max_train_steps=100_000, checkpointing_steps=2, checkpoints_total_limit=2, validation_steps=100_000,
        dataloader_num_workers=1,
    )  # fmt: skip
    command = [sys.executable, str(ROOT / "story_generative_model.py"), *as_flags(config)]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    run = subprocess.Popen(
        command, env=env, stdout=-1, stderr=-1, text=True, start_new_session=True
    )
    try:
        lines = []
        for line in run.stderr:
            lines.append(line)
            if (
                "saved" in line
            ):  # the banner is out, the reader processes are at work, and the trainer is listening
                os.killpg(run.pid, signal.SIGTERM)
                break
        out, err = run.communicate(timeout=120)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    told = "".join(lines) + err
    assert (
        run.returncode == 143
        and "Running training" in told
        and "Traceback" not in told
        and out == ""
    )
    assert "SIGTERM" in err and "--resume_from_checkpoint latest" in err.splitlines()[-1]
    last = sgm.load_checkpoint(sgm.list_checkpoints(Path(config.output_dir))[-1])
    assert f"after step {last['step']};" in err and last["step"] >= 2


def test_tensorboard_shows_the_run(trained):
    """TensorBoard itself reads the run back, through its own HTTP interface."""
    import json
    import socket
    import subprocess
    import sys
    import time
    from urllib.error import URLError
    from urllib.parse import quote
    from urllib.request import urlopen

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        trained.output_dir,
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(path: str):
        with urlopen(f"http://127.0.0.1:{port}/data/plugin/{path}", timeout=20) as answer:
            return json.load(answer)

    try:
        for _ in range(240):
            try:
                tags = ask("scalars/tags").get(".", {})
                if "valid/bits_returned" in tags:
                    break
            except (URLError, OSError):
                pass
            time.sleep(0.25)
        assert {
            "elbo/text_nll",
            "optim/learning_rate",
            "valid/bits_returned",
            "valid/efficiency",
        } <= set(tags)
        points = ask("scalars/scalars?run=.&tag=elbo/text_nll")
        assert [step for _, step, _ in points] == [1, 2, 3, 4, 5, 6]
        pictures = {"sample/panels", "sample/codes"}
        assert pictures <= set(ask("images/tags")["."])
        assert any("sample/story" in tag for tag in ask("text/tags")["."])
        settings = ask("hparams/experiment?request=" + quote(json.dumps({"experimentName": ""})))
        names = {info["name"] for info in settings["hparamInfos"]}
        metrics = {info["name"]["tag"] for info in settings["metricInfos"]}
        assert {"learning_rate", "num_codes", "seed"} <= names and "valid/efficiency" in metrics
    finally:
        server.terminate()
        server.wait(20)


def test_the_end_of_a_training_fits_the_prior(checkpoint, data_folder):
    """At the end the rate goes by each slot's Fisher information, the prior is fitted to the codes that this makes,
    and nothing else moves."""
    config = dataclasses.replace(checkpoint["config"], prior_steps=10_000, prior_learning_rate=1e-2)
    model = sgm.load_model(checkpoint, config, torch.device("cpu"), torch.float32, paints=False)
    stories = [row.story for row in sgm.read_rows(str(data_folder), "train")]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def latent_nll() -> float:
        return model.prior.nll(model.encode_stories(stories)).mean().item()

    start, steps = latent_nll(), []
    hook = model.prior.register_forward_hook(lambda *_: steps.append(torch.is_grad_enabled()))
    sgm.finetune_prior(model, stories, config, batch=4)
    hook.remove()
    passes = (
        sgm.PRIOR_EPOCHS * len(stories) // 4
    )  # so often it goes through a small training set, not more
    assert sum(steps) == passes // sgm.PRIOR_ROUNDS * sgm.PRIOR_ROUNDS
    assert latent_nll() < 0.8 * start
    moved = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    fitted = moved - {"encoder.slot_fisher"}
    assert fitted and all(name.startswith("prior.") for name in fitted)
    assert (
        "encoder.slot_fisher" in moved
        and model.encoder.slot_fisher.max() == 1
        and model.encoder.slot_fisher.min() >= 0.01
    )


def test_slot_fisher_is_how_far_a_slot_s_vector_moves_the_text_nll(checkpoint, data_folder):
    """Against the squared slope along each direction, by differences."""
    config = checkpoint["config"]
    model = sgm.load_model(
        checkpoint, config, torch.device("cpu"), torch.float64, paints=False
    ).double()
    stories = [row.story for row in sgm.read_rows(str(data_folder), "train")][:3]
    model.estimate_slot_fisher(stories)
    vectors, tokens = (
        model.encoder.quantizer.embed_codes(model.encode_stories(stories)),
        model.tokenize(stories),
    )
    power, step = torch.zeros(sgm.NUM_SLOTS, dtype=torch.float64), 1e-4
    with torch.no_grad():
        for slot in range(sgm.NUM_SLOTS):
            for dim in range(vectors.shape[-1]):
                moved = vectors.clone()
                moved[:, slot, dim] += step
                there = model.lm.nll(model.soft_prompt(moved), *tokens)
                moved[:, slot, dim] -= 2 * step
                slopes = (there - model.lm.nll(model.soft_prompt(moved), *tokens)) / (2 * step)
                power[slot] += slopes.square().sum()
    torch.testing.assert_close(
        model.encoder.slot_fisher, (power / power.max()).clamp(min=0.01), rtol=1e-3, atol=1e-5
    )
