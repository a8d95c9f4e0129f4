"""Resume: a run that was killed, as often as one likes, is the run that was never interrupted."""

import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import Child, stories_read, together
from conftest import as_flags, make_data
from test_training import same, scalars

import story_generative_model as sgm

STEPS, KILLS = 18, 5  # 24 stories, four a step: three epochs


@pytest.fixture(scope="module")
def run_config(make_config):
    def make(**changes):
        usual = dict(
            max_train_steps=STEPS, checkpointing_steps=2, checkpoints_total_limit=2, validation_steps=100,
            quantizer_warmup_steps=3, ema_decay=0.9,
        )  # fmt: skip
        return make_config(**usual | changes)

    return make


def start(config, log: Path, processes: int) -> list[Child]:
    argv = [flag for flag in as_flags(config) if flag]
    return together(argv, log, processes) if processes > 1 else [Child(argv, log)]


def finish(children: list[Child]) -> None:
    for child in children:
        assert child.finish() == 0, child.err


@pytest.mark.check(
    "SIGKILL at 5 random steps over 3 epochs, resumed: the unbroken run, bit for bit"
)
@pytest.mark.parametrize(
    "name, changes, processes",
    [
        ("no workers", {}, 1),
        ("0, 2, 0, ... workers", {}, 1),
        ("accumulation 2", dict(gradient_accumulation_steps=2, train_batch_size=2), 1),
        ("two processes", dict(train_batch_size=2), 2),
    ],
)
def test_a_run_killed_five_times(run_config, tmp_path, record_property, name, changes, processes):
    record_property("tried", KILLS)
    whole = run_config(**changes)
    finish(start(whole, tmp_path / "whole", processes))
    broken = replace(run_config(**changes), resume_from_checkpoint="latest")
    rng = random.Random(name)
    for number, step in enumerate(sorted(rng.sample(range(1, STEPS), KILLS))):
        workers = 2 * (number % 2) if "workers" in name and name != "no workers" else 0
        children = start(
            replace(broken, dataloader_num_workers=workers), tmp_path / "broken", processes
        )
        children[0].wait_for_step(step)
        for child in children:
            child.send(signal.SIGKILL, group=True)
        assert children[0].finish() == -signal.SIGKILL, children[0].err
        for child in children[1:]:
            child.finish()
        time.sleep(1)  # TensorBoard orders a folder's files by the second in their names
    finish(start(broken, tmp_path / "broken", processes))

    files = [Path(config.output_dir) / f"ckpt_{STEPS}.pt" for config in (whole, broken)]
    first, second = (torch.load(path, weights_only=True) for path in files)
    for part in ("model", "optimizer", "lr_scheduler", "scaler", "step", "position", "data"):
        assert same(first[part], second[part]), part
    points = [scalars(config.output_dir) for config in (whole, broken)]
    for tag in set(points[0]) - {"speed/stories_per_second"}:
        assert points[0][tag] == points[1][tag], tag
    assert [step for step, _ in points[1]["elbo/loss"]] == list(range(1, STEPS + 1))

    read = stories_read(tmp_path / "broken")
    assert read == stories_read(tmp_path / "whole")
    order = [index for key in sorted(read) for index in read[key]]
    if "accumulation" not in name:  # there the log keeps one of a step's two batches
        for epoch in range(3):
            assert sorted(order[24 * epoch : 24 * (epoch + 1)]) == list(range(24))


@pytest.mark.check("a part missing from a checkpoint: an error that names it")
@pytest.mark.parametrize("key", [*sgm.RESUME_KEYS, "config.seed"])
def test_a_missing_part_is_named(trained, tmp_path, key):
    checkpoint = torch.load(Path(trained.output_dir) / "ckpt_3.pt", weights_only=True)
    part, _, name = key.rpartition(".")
    del (checkpoint[part] if part else checkpoint)[name]
    sgm.save_checkpoint(tmp_path / "ckpt_3.pt", checkpoint)
    config = replace(
        trained, output_dir=str(tmp_path), resume_from_checkpoint=str(tmp_path / "ckpt_3.pt")
    )
    with pytest.raises(sgm.StoryError, match=f"lacks {key}") as error:
        sgm.train(config)
    assert error.value.code == 2


@pytest.mark.check(
    "another configuration or other data: exit 2 with both values, --override insists"
)
@pytest.mark.parametrize(
    "changes", [dict(learning_rate=1e-3), dict(seed=5), dict(beta_kl=0.7), "data"]
)
def test_another_run_is_refused(trained, tmp_path, tmp_path_factory, capsys, changes):
    path = str(Path(trained.output_dir) / "ckpt_3.pt")
    if changes == "data":
        other = make_data(tmp_path / "data", train=20)
        changes, named = dict(data_root=str(other)), ["24 stories", "20 stories"]
    else:
        ((name, value),) = changes.items()
        named = [f"{name} {getattr(trained, name)!r} there, {value!r} here"]
    config = replace(
        trained, output_dir=str(tmp_path / "run"), resume_from_checkpoint=path, **changes
    )
    with pytest.raises(sgm.StoryError, match="--override") as error:
        sgm.train(config)
    assert error.value.code == 2 and all(value in str(error.value) for value in named)
    sgm.train(replace(config, override=True))
    assert "--override: " in capsys.readouterr().err and (tmp_path / "run" / "ckpt_6.pt").is_file()
