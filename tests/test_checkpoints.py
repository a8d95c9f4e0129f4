"""Checkpoints: complete or not there, damaged or refused, and never executed."""

import pickle
import resource
import zipfile
from pathlib import Path

import pytest
import torch

import story_generative_model as sgm


def small(step: int = 5) -> dict:
    model = {"weight": torch.arange(64.0).view(8, 8)}
    return dict(config={"num_codes": 8}, step=step, model=model, backbones={"lm_revision": ""})


def refused(path: Path) -> str:
    """The message with which a file is refused as a checkpoint."""
    with pytest.raises(sgm.StoryError) as error:
        sgm.load_checkpoint(path)
    assert (
        error.value.code == 2
        and str(path) in str(error.value)
        and "weights_only" not in str(error.value)
    )
    return str(error.value)


def test_what_is_saved_is_loaded(tmp_path):
    sgm.save_checkpoint(tmp_path / "ckpt_5.pt", small())
    loaded = sgm.load_checkpoint(tmp_path / "ckpt_5.pt")
    assert torch.equal(loaded["model"]["weight"], small()["model"]["weight"])
    assert loaded["step"] == 5 and loaded["config"] == sgm.Config(num_codes=8)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt_5.pt"]


def test_a_newer_program_s_extra_settings_are_ignored(tmp_path):
    sgm.save_checkpoint(
        tmp_path / "ckpt_5.pt", small() | {"config": {"num_codes": 8, "of_another_time": 1}}
    )
    assert sgm.load_checkpoint(tmp_path / "ckpt_5.pt")["config"].num_codes == 8


def damaged_files(whole: bytes) -> dict[str, bytes]:
    flipped = bytearray(whole)
    flipped[whole.index(torch.arange(64.0).numpy().tobytes()) + 100] ^= 1
    return {
        "truncated": whole[: len(whole) // 2], "one byte short": whole[:-1], "flipped bit": bytes(flipped),
        "html": b"<!DOCTYPE html><html>Not found</html>", "empty": b"", "old format": pickle.dumps({"step": 1}),
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["truncated", "one byte short", "flipped bit", "html", "empty", "old format"]
)
def test_a_damaged_file_is_refused(tmp_path, kind):
    path = tmp_path / "ckpt_5.pt"
    sgm.save_checkpoint(path, small())
    path.write_bytes(damaged_files(path.read_bytes())[kind])
    refused(path)


def test_whatever_byte_is_damaged_nothing_else_is_loaded(tmp_path):
    """Each byte in turn: refused in one line, or of no consequence (padding, dates), or merely
    renamed."""
    path = tmp_path / "ckpt_5.pt"
    sgm.save_checkpoint(path, small())
    whole, taken = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            loaded = sgm.load_checkpoint(path)
        except sgm.StoryError as error:
            assert error.code == 2 and str(path) in str(error)
            continue
        taken += 1
        assert (
            torch.equal(loaded["model"]["weight"], small()["model"]["weight"])
            and loaded["step"] == 5
        )
    assert taken < len(whole) / 3 * 0.9


@pytest.mark.parametrize("key", sgm.CHECKPOINT_KEYS)
def test_a_missing_part_is_named(tmp_path, key):
    checkpoint = small()
    del checkpoint[key]
    sgm.save_checkpoint(tmp_path / "ckpt_5.pt", checkpoint)
    assert f"lacks {key}" in refused(tmp_path / "ckpt_5.pt")


def test_a_bare_state_dict_and_a_missing_file_are_refused(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    assert "lacks config" in refused(tmp_path / "list.pt")
    assert "does not exist" in refused(tmp_path / "gone.pt")


class Malicious:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_malicious_pickle_runs_nothing(tmp_path):
    path, trace = tmp_path / "ckpt_5.pt", tmp_path / "trace"
    torch.save(small() | {"step": Malicious(trace)}, path)
    refused(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the trap was live


@pytest.mark.parametrize("fault", ["a file for a folder", "no folder"])
def test_a_path_that_cannot_be_written_is_told(tmp_path, fault):
    (tmp_path / "a file for a folder").touch()
    with pytest.raises(sgm.StoryError, match="cannot be written"):
        sgm.save_checkpoint(tmp_path / fault / "ckpt_5.pt", small())


def test_a_full_disk_leaves_the_older_file_and_no_part(tmp_path):
    path = tmp_path / "ckpt_5.pt"
    sgm.save_checkpoint(path, small())
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(sgm.StoryError, match="cannot be written"):
            sgm.save_checkpoint(path, small() | {"model": {"weight": torch.zeros(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == [
        "ckpt_5.pt"
    ]


@pytest.mark.parametrize("limit, kept", [(0, 5), (1, 2), (2, 2), (3, 3), (9, 5)])
def test_rotation_keeps_the_newest_and_two_at_the_least(tmp_path, limit, kept):
    for step in (1000, 9, 80, 700, 6):
        (tmp_path / f"ckpt_{step}.pt").touch()
    for other in ("ckpt_best.pt", "ckpt_5.pt.part", "notes.pt"):
        (tmp_path / other).touch()
    sgm.rotate_checkpoints(tmp_path, limit)
    assert [path.name for path in sgm.list_checkpoints(tmp_path)] == [
        f"ckpt_{step}.pt" for step in (6, 9, 80, 700, 1000)[-kept:]
    ]
    assert (tmp_path / "ckpt_best.pt").exists() and (tmp_path / "notes.pt").exists()


# A checkpoint that training wrote


@pytest.mark.check("a checkpoint loads with plain torch.load(weights_only=True)")
def test_it_holds_the_trained_tensors_alone_and_any_torch_reads_it(
    trained, checkpoint, lm, diffusion
):
    path = Path(trained.output_dir) / "ckpt_6.pt"
    plain = torch.load(path, weights_only=True)
    assert set(plain) == {*sgm.CHECKPOINT_KEYS, *sgm.RESUME_KEYS} and plain["config"] == vars(
        trained
    )
    model = sgm.StoryModel(trained, lm, diffusion)
    assert set(plain["model"]) == set(model.state_dict())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert path.stat().st_size <= 12 * parameters + 1_000_000
    assert zipfile.ZipFile(path).testzip() is None
    saved = sgm.load_model(checkpoint, checkpoint["config"], torch.device("cpu"), torch.float32)
    assert all(
        torch.equal(tensor, plain["model"][name]) for name, tensor in saved.state_dict().items()
    )
    assert not saved.training and saved.encoder.quantizer.updates > 0


def test_a_checkpoint_of_another_shape_is_refused(checkpoint, make_config):
    with pytest.raises(sgm.StoryError, match=r"ckpt_6\.pt does not fit") as error:
        sgm.load_model(
            checkpoint, make_config(num_codes=9), torch.device("cpu"), torch.float32, paints=False
        )
    assert error.value.code == 2
