"""Generation: a function of the checkpoint, the prompt and the seed, and of nothing else."""

import dataclasses

import pytest
import torch
from PIL import Image

import story_generative_model as sgm


@pytest.fixture()
def write(checkpoint, tmp_path):
    """generate() on the trained checkpoint: write(name, prompt, **settings) -> (story, path of the picture)."""

    def run(name: str = "a", prompt: str = "The red fox", **changes):
        path = tmp_path / f"{name}.png"
        config = dataclasses.replace(checkpoint["config"], **{"prompt": prompt, "output": str(path), **changes})
        return sgm.generate(config, checkpoint), path

    return run


# Storyboards given by hand


@pytest.mark.parametrize(
    "text, codes",
    [
        ("", [None] * 8), ("  ", [None] * 8), ("0 1 2 3 4 5 6 7", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("3 _ _ _ _ _ _ 7", [3] + [None] * 6 + [7]), ("3,_,_,_, _,_,_,7", [3] + [None] * 6 + [7]),
    ],
)  # fmt: skip
def test_a_storyboard_is_parsed(text, codes):
    assert sgm.parse_storyboard(text, num_codes=8) == codes


@pytest.mark.parametrize(
    "text, told",
    [
        ("1 2 3", "got 3"), ("1 2 3 4 5 6 7 0 1", "got 9"), ("8 _ _ _ _ _ _ _", "'8'"), ("-1 _ _ _ _ _ _ _", "'-1'"),
        ("x _ _ _ _ _ _ _", "'x'"), ("1.0 _ _ _ _ _ _ _", "'1.0'"), ("9999999999999 _ _ _ _ _ _ _", "'9999"),
        ("\u00b2 _ _ _ _ _ _ _", "neither"), ("__ _ _ _ _ _ _ _", "'__'"),
    ],
)  # fmt: skip
def test_a_slip_in_a_storyboard_is_named(text, told):
    with pytest.raises(sgm.StoryError, match="--storyboard") as error:
        sgm.parse_storyboard(text, num_codes=8)
    assert told in str(error.value) and error.value.code == 2


def test_pinned_codes_are_in_the_storyboard(write):
    result, _ = write(storyboard="5 _ _ 2 _ _ _ 7")
    assert [result.storyboard[slot] for slot in (0, 3, 7)] == [5, 2, 7]


# Reproducible


def test_the_same_seed_gives_the_same_story_and_the_same_bytes(write):
    first, path = write("a", seed=3)
    torch.rand(5)
    second, again = write("b", seed=3)
    assert first.story == second.story and first.storyboard == second.storyboard
    assert path.read_bytes() == again.read_bytes()


def test_another_seed_gives_another_story_and_picture(write):
    results = [write(str(seed), seed=seed) for seed in range(3)]
    assert len({result.story for result, _ in results}) == 3
    assert len({path.read_bytes() for _, path in results}) == 3
    assert len({tuple(result.storyboard) for result, _ in results}) > 1


def test_the_storyboard_is_drawn_by_how_well_it_opens_with_the_prompt(checkpoint, lm, diffusion):
    """Sampling-importance resampling: over many seeds the frequencies are the weights of the candidates."""
    config = dataclasses.replace(checkpoint["config"], num_storyboards=2)
    model = sgm.load_model(checkpoint, config, torch.device("cpu"), torch.float32, paints=False)
    model.soft_prompt.unit *= 20  # so that the two candidates differ in weight
    expected, hits = 0.0, 0
    for seed in range(60):
        config.seed = seed
        candidates = model.prior.sample(2, sgm.seeded(seed, 0), [], config.temperature, config.top_p)
        tokens, mask, _ = model.tokenize(["The red fox"] * 2)
        nll = model.lm.nll(model.soft(candidates), tokens, mask, torch.ones(2, dtype=torch.bool))
        expected += (-nll).softmax(0).max().item()
        drawn = sgm.draw_storyboard(model, "The red fox", [], config)[0]
        hits += torch.equal(drawn, candidates[nll.argmin()])
    assert 33 < expected < 57 and abs(hits - expected) < 3 * (expected * (1 - expected / 60)) ** 0.5


# What comes out


def test_stdout_is_the_story_alone_and_the_picture_carries_what_made_it(write, capsys):
    capsys.readouterr()
    result, path = write(prompt="  The red   fox ", seed=4)
    told = capsys.readouterr()
    assert told.out == result.story + "\n" and result.story.startswith("The red fox")
    assert str(path) in told.err
    with Image.open(path) as image:
        notes = image.text
        assert image.size == (32, 32) and image.format == "PNG"
    assert notes["prompt"] == "The red fox" and notes["story"] == result.story and notes["seed"] == "4"
    assert notes["storyboard"] == " ".join(map(str, result.storyboard)) and len(result.storyboard) == 8
    assert notes["checkpoint"] == "ckpt_6.pt" and notes["step"] == "6" and torch.__version__ in notes["versions"]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_prompt_in_any_script(write):
    prompt = "\u0416\u0438\u043b \u043b\u0438\u0441 \U0001f98a \u4e00"
    result, path = write(prompt=prompt)
    assert result.story.startswith(prompt)
    with Image.open(path) as image:
        assert image.text["prompt"] == prompt


@pytest.mark.parametrize("prompt", ["", "   \n"])
def test_an_empty_prompt_is_refused(write, prompt):
    with pytest.raises(sgm.StoryError, match="--prompt is empty") as error:
        write(prompt=prompt)
    assert error.value.code == 2


def test_a_prompt_longer_than_the_context_is_refused(write, tmp_path):
    with pytest.raises(sgm.StoryError, match="context of 64") as error:
        write(prompt="fox " * 200)
    assert error.value.code == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", ["story.jpg", "nowhere/story.png", "story"])
def test_a_picture_that_cannot_be_written_is_told_before_the_work(write, tmp_path, output, capsys):
    with pytest.raises(sgm.StoryError, match="--output"):
        write(output=str(tmp_path / output))
    assert capsys.readouterr().out == ""
