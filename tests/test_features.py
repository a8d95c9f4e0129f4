"""The feature cache: what is encoded once is what would be encoded at each step, and a change is noticed."""

import dataclasses
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from children import Child, together
from conftest import as_flags, make_data

import story_generative_model as sgm


@pytest.fixture()
def split(tmp_path) -> Path:
    return make_data(tmp_path / "data", train=10) / "train"


@pytest.fixture()
def small_blocks(monkeypatch):
    monkeypatch.setattr(sgm, "FEATURE_BLOCK", 4)


def cache_of(split: Path, diffusion) -> sgm.FeatureCache:
    return sgm.FeatureCache(sgm.read_rows(str(split.parent), split.name), split, diffusion)


def build(split: Path, diffusion, **options) -> sgm.FeatureCache:
    cache = cache_of(split, diffusion)
    cache.build(diffusion, **(dict(batch=3, skip_bad=False) | options))
    return cache


def written(cache: sgm.FeatureCache) -> dict[str, int]:
    """When each file of features was written."""
    return {path.name: path.stat().st_mtime_ns for path in cache.key.glob("*.safetensors")}


@torch.no_grad()
def test_it_holds_what_the_encoders_make_of_each_panel(split, diffusion, small_blocks):
    cache = build(split, diffusion)
    assert sorted(written(cache)) == ["000000.safetensors", "000001.safetensors", "000002.safetensors"]
    assert {path.suffix for path in cache.key.iterdir()} == {".safetensors", ".stamp"}
    for index, row in enumerate(cache.rows):
        for number, panel in enumerate(row.panels):
            pixels = sgm.load_picture(split, panel.image_path, diffusion.resolution, row.where)
            moments, states, mask = diffusion.features(dict(pixels=[pixels], text=[panel.text]))
            kept = diffusion.features({key: [value] for key, value in cache.read(index, number).items()})
            torch.testing.assert_close(kept, (moments, states, mask))


def test_what_is_there_is_not_made_again(split, diffusion, small_blocks, monkeypatch):
    before = written(build(split, diffusion))
    monkeypatch.setattr(sgm, "load_picture", None)  # not one picture is opened
    assert written(build(split, diffusion)) == before
    for path in (split / "images").iterdir():  # copied elsewhere: other times, the same bytes
        os.utime(path)
    assert written(build(split, diffusion)) == before


@pytest.mark.parametrize("change", ["picture", "text"])
def test_a_change_is_noticed_in_its_block_alone(split, diffusion, small_blocks, change):
    before = written(build(split, diffusion))
    if change == "picture":
        shutil.copy(split / "images/000000_0.png", split / "images/000005_1.png")
    else:
        rows = (split / "stories.jsonl").read_text().splitlines()
        rows[5] = rows[5].replace('"panels": [{"text": "', '"panels": [{"text": "Once ')
        (split / "stories.jsonl").write_text("\n".join(rows) + "\n")
    cache = build(split, diffusion)
    after = written(cache)
    assert [name for name in before if after[name] != before[name]] == ["000001.safetensors"]
    if change == "picture":
        assert torch.equal(cache.read(5, 1)["moments"], cache.read(0, 0)["moments"])


def test_a_file_that_was_cut_off_is_made_again(split, diffusion, small_blocks):
    cache = build(split, diffusion)
    before = {key: tensor.clone() for key, tensor in cache.read(7, 1).items()}  # not a view of the file
    cache.path(1).write_bytes(cache.path(1).read_bytes()[:-100])
    build(split, diffusion)
    torch.testing.assert_close(cache.read(7, 1), before)


def test_another_model_has_another_folder(split, diffusion, small_blocks):
    cache = build(split, diffusion)
    weight = diffusion.text_encoder.get_input_embeddings().weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1
        other = cache_of(split, diffusion)
        weight.copy_(before)
    assert other.key != cache.key and cache_of(split, diffusion).key == cache.key


def test_several_processes_share_the_blocks(split, diffusion, small_blocks):
    first = build(split, diffusion, rank=0, ranks=2)
    assert sorted(written(first)) == ["000000.safetensors", "000002.safetensors"]
    assert len(written(build(split, diffusion, rank=1, ranks=2))) == 3


def test_a_picture_that_cannot_be_read_stops_or_is_remembered(split, diffusion, small_blocks):
    (split / "images/000006_0.png").write_bytes(b"")
    with pytest.raises(sgm.StoryError, match=r"stories\.jsonl:7: .*000006_0\.png"):
        build(split, diffusion)
    cache = build(split, diffusion, skip_bad=True)
    with pytest.raises(sgm.StoryError, match=r"stories\.jsonl:7: .*000006_0\.png"):
        cache.read(6, 0)
    assert cache.read(6, 1)["moments"].shape == cache.read(7, 0)["moments"].shape


def test_a_full_disk_names_the_way_on(split, diffusion, monkeypatch):
    def fail(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sgm, "write_whole", fail)
    with pytest.raises(sgm.StoryError, match=r"features.*No space left.*--no_feature_cache"):
        build(split, diffusion)


# In training


LOOKS = dict(max_train_steps=8, image_condition="storyboard", train_batch_size=4)  # 32 looks at 20 panels


def test_training_with_the_cache_is_training_without(make_config, tmp_path):
    """The frozen encoders are gone, the sample is painted all the same, and both runs come to one place."""
    data = make_data(tmp_path / "data", train=10)
    with_cache = sgm.train(make_config(data_root=str(data), **LOOKS))
    assert list((data / "train" / "features").iterdir())
    assert with_cache.diffusion.vae.encoder is None
    without = sgm.train(make_config(data_root=str(data), no_feature_cache=True, **LOOKS))
    assert without.diffusion.vae.encoder is not None
    for name, tensor in with_cache.state_dict().items():
        torch.testing.assert_close(tensor, without.state_dict()[name], atol=1e-4, rtol=1e-3, msg=name)


def test_few_looks_are_not_worth_a_cache(make_config, tmp_path):
    data = make_data(tmp_path / "data", train=10)
    sgm.train(make_config(data_root=str(data), **LOOKS | dict(max_train_steps=4)))
    assert not (data / "train" / "features").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_picture_in_the_cache_is_told_as_in_training_without(make_config, tmp_path, capsys, workers):
    data = make_data(tmp_path / "data", train=10)
    (data / "train/images/000006_0.png").write_bytes(b"")
    config = make_config(data_root=str(data), dataloader_num_workers=workers, **LOOKS)
    with pytest.raises(sgm.StoryError, match=r"stories\.jsonl:7: "):
        sgm.train(config)
    sgm.train(dataclasses.replace(config, skip_bad_rows=True))
    assert "stories.jsonl:7: " in capsys.readouterr().err


def test_killed_while_it_is_built_it_goes_on(make_config, tmp_path):
    """A real process, killed once two blocks stand; the next run makes the others and leaves those alone."""
    data = make_data(tmp_path / "data", train=3 * sgm.FEATURE_BLOCK, val=4)
    config = make_config(data_root=str(data), **LOOKS | dict(max_train_steps=400))
    child = Child(as_flags(config), tmp_path / "log")
    features, end = data / "train" / "features", time.monotonic() + 120
    while len(list(features.glob("*/*.stamp"))) < 2 and child.process.is_alive():
        assert time.monotonic() < end, child.err
        time.sleep(0.005)
    child.send(signal.SIGKILL)
    assert child.finish() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in features.glob("*/*.stamp")}
    diffusion = sgm.LatentDiffusion(config.diffusion_model, torch.device("cpu"), torch.float32)
    cache = build(data / "train", diffusion)
    assert len(before) >= 2 and all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert len(list(cache.key.glob("*.stamp"))) == 3 and not list(cache.key.glob("*.part"))
    assert cache.read(len(cache.rows) - 1, 1)["moments"].isfinite().all()


def test_two_processes_build_one_cache(make_config, tmp_path):
    data = make_data(tmp_path / "data", train=2 * sgm.FEATURE_BLOCK, val=4, panels=1)
    changes = dict(max_train_steps=2, train_batch_size=200, eval_batch_size=50)
    config = make_config(data_root=str(data), **LOOKS | changes)
    children = together(as_flags(config), tmp_path / "log")
    assert [child.finish() for child in children] == [0, 0], children[0].err + children[1].err
    assert len(list((data / "train" / "features").glob("*/*.stamp"))) == 2
