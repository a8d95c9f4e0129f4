"""Generation: a function of the checkpoint, the prompt and the seed, and of nothing else."""

import dataclasses
import json
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import story_generative_model as sgm


@pytest.fixture()
def write(checkpoint, tmp_path):
    """generate() on the trained checkpoint: write(name, prompt, **settings) -> (story, path of the
    picture)."""

    def run(name: str = "a", prompt: str = "The red fox", **changes):
        path = tmp_path / f"{name}.png"
        config = dataclasses.replace(
            checkpoint["config"], **{"prompt": prompt, "output": str(path), **changes}
        )
        (result,) = sgm.generate(config, checkpoint)
        return result, path

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
        ("x1 _ _ _ _ _ _ _", "'x1'"), ("1.0 _ _ _ _ _ _ _", "'1.0'"), ("9999999999999 _ _ _ _ _ _ _", "'9999"),
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
    """Sampling-importance resampling: over many seeds the frequencies are the weights of the
    candidates."""
    config = dataclasses.replace(checkpoint["config"], num_storyboards=2)
    model = sgm.load_model(checkpoint, config, torch.device("cpu"), torch.float32, paints=False)
    model.soft_prompt.embed_std *= 20  # so that the two candidates differ in weight
    expected, hits = 0.0, 0
    for seed in range(60):
        candidates = model.prior.sample(
            2,
            sgm.make_generator(seed, sgm.Stream.STORYBOARD),
            None,
            config.temperature,
            config.top_p,
        )
        tokens, mask, _ = model.tokenize(["The red fox"] * 2)
        nll = model.lm.nll(
            model.prompt_embeds(candidates), tokens, mask, torch.ones(2, dtype=torch.bool)
        )
        expected += (-nll).softmax(0).max().item()
        drawn = sgm.draw_storyboard(model, "The red fox", [], config, seed)
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
        parameters, record = image.text["parameters"], json.loads(image.text["story"])
        assert image.size == (32, 32) and image.format == "PNG"
    assert (
        record["prompt"] == "The red fox"
        and record["story"] == result.story
        and record["seed"] == 4
    )
    assert record["storyboard"] == result.storyboard and len(result.storyboard) == 8
    assert record["checkpoint"]["name"] == "ckpt_6.pt" and record["checkpoint"]["step"] == 6
    assert torch.__version__ in record["versions"]
    assert (
        parameters.startswith(result.story)
        and "Steps: 2, " in parameters
        and "Seed: 4, Size: 32x32" in parameters
    )
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_prompt_in_any_script(write):
    prompt = "\u0416\u0438\u043b \u043b\u0438\u0441 \U0001f98a \u4e00"
    result, path = write(prompt=prompt)
    assert result.story.startswith(prompt)
    with Image.open(path) as image:
        assert json.loads(image.text["story"])["prompt"] == prompt


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


# Several panels


STORY = (
    'The fox ran. "Is it far?" asked Tom. He sat down, e.g. on a stone. Why? It rained! The end.'
)


def test_sentences_end_where_the_next_begins():
    assert "".join(sgm.split_sentences(STORY)) == STORY
    assert [sentence.strip() for sentence in sgm.split_sentences(STORY)] == [
        "The fox ran.", '"Is it far?" asked Tom.', "He sat down, e.g. on a stone.", "Why?", "It rained!", "The end.",
    ]  # fmt: skip
    assert sgm.split_sentences("no end at all") == ["no end at all"]


@pytest.mark.parametrize(
    "story",
    [
        "\u72d0\u72f8\u8dd1\u4e86\u3002|\u201c\u8fdc\u5417\uff1f\u201d|\u4ed6\u5750\u4e0b\u3002",  # Chinese
        "\u304d\u3064\u306d\u3002|\u300c\u3042\uff01\u300d|\u304a\u308f\u308a\u3002",  # Japanese
        "\u062c\u0631\u0649 \u0627\u0644\u062b\u0639\u0644\u0628\u061f |\u0646\u0639\u0645. |\u0627\u0646\u062a\u0647\u0649.",  # Arabic
        "\u0932\u094b\u092e\u0921\u093c\u0940 \u0926\u094c\u0921\u093c\u0940\u0964 |\u0935\u0939 \u0930\u0941\u0915\u0940\u0964",  # Hindi
        "A line of its own\n|The fox ran. |It slept.",
    ],
)
def test_sentences_of_other_scripts(story):
    """None is joined with its neighbour, and no space comes in between."""
    parts = story.split("|")
    assert sgm.split_sentences("".join(parts)) == parts
    cut = "".join(parts) + " \u72d0 fox"
    assert sgm.trim_to_last_sentence(cut, "") == "".join(parts).rstrip()


def test_a_panel_is_told_by_the_story_up_to_it_or_by_the_opening_and_its_part():
    parts = ["A. B.", "C.", "D."]
    assert sgm.panel_texts("A.", parts, "story") == ["A. B.", "A. B. C.", "A. B. C. D."]
    assert sgm.panel_texts("A.", parts, "part") == ["A. B.", "A. C.", "A. D."]
    assert sgm.panel_texts("A.", ["A. B. C."], "part") == ["A."]


@pytest.mark.parametrize("panels", range(1, 9))
def test_panels_are_whole_sentences_in_order(model, panels):
    parts = sgm.cut_into_panels(model.lm.tokenizer, STORY, panels)
    assert len(parts) == min(panels, 6) and " ".join(parts) == STORY
    assert all(part[-1] in ".!?" for part in parts)


def test_panels_end_nearest_to_where_equal_chunks_end(model):
    story = " ".join(["The fox ran in the red forest."] * 9)
    three, eight = (sgm.cut_into_panels(model.lm.tokenizer, story, count) for count in (3, 8))
    assert [part.count("The fox") for part in three] == [3, 3, 3]
    assert [part.count("The fox") for part in eight].count(1) == 7


def test_each_panel_is_painted_from_the_story_so_far(write, diffusion, checkpoint):
    """The second panel of a book is the picture of its condition alone."""
    result, _ = write("book", panels=3, seed=2, storyboard="1 2 3 4 5 6 7 0")
    texts = [panel.text for panel in result.panels]
    assert " ".join(texts) == result.story
    if len(texts) > 1:
        states, mask = diffusion.encode_texts([f"{texts[0]} {texts[1]}"])
        (alone,) = diffusion.sample_images(
            states, mask, checkpoint["config"], [result.panels[1].seed]
        )
        difference = np.asarray(alone, dtype=float) - np.asarray(
            result.panels[1].image, dtype=float
        )
        assert np.abs(difference).max() <= 2


def test_shared_attention_makes_panels_alike_and_is_gone_afterwards(diffusion, config):
    states, mask = diffusion.encode_texts(["a red fox", "the blue owl", "the sea"])

    def sample_images(consistency: str) -> np.ndarray:
        settings = dataclasses.replace(config, panel_consistency=consistency)
        return np.stack(
            [
                np.asarray(image, dtype=float)
                for image in diffusion.sample_images(states, mask, settings, [1, 2, 3])
            ]
        )

    before, shared, after = sample_images("off"), sample_images("attention"), sample_images("off")
    assert np.array_equal(before, after) and not np.array_equal(before, shared)


# Many at once


def test_a_bad_prompt_is_named_and_the_rest_is_made(checkpoint, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("The red fox\n\nbell \x07\n" + "fox " * 200 + "\n\u72d0\u72f8\n", "utf-8")
    config = dataclasses.replace(
        checkpoint["config"],
        prompts_file=str(file),
        output=str(tmp_path / "a.png"),
        num_stories=2,
        json=True,
    )
    capsys.readouterr()
    with pytest.raises(sgm.StoryError, match="2 of 4 prompts") as error:
        sgm.generate(config, checkpoint)
    told = capsys.readouterr()
    assert (
        error.value.code == 1
        and "prompt 2: the prompt holds a control" in told.err
        and "prompt 3" in told.err
    )
    records = [json.loads(line) for line in told.out.splitlines()]
    assert [record["prompt"] for record in records] == ["The red fox"] * 2 + ["\u72d0\u72f8"] * 2
    assert [record["seed"] for record in records] == [0, 1, 0, 1]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        f"a_00{number}.png" for number in range(4)
    ]
    alone = dataclasses.replace(
        config, prompts_file="", prompt="The red fox", num_stories=1, seed=1
    )
    assert sgm.generate(alone, checkpoint)[0].story == records[1]["story"]


# Again, and edited


@pytest.mark.check("--from a PNG, page, PDF and EPUB: the same bytes again")
@pytest.mark.parametrize("name", ["book.png", "book.html", "book.pdf", "book.epub"])
def test_what_was_made_is_made_again_to_the_byte(checkpoint, tmp_path, name):
    first, second = tmp_path / name, tmp_path / f"again_{name}"
    config = dataclasses.replace(
        checkpoint["config"],
        prompt="The <b>red</b> fox",
        seed=5,
        panels=2,
        temperature=0.7,
        keyword_shift=3.0,
        storyboard="_ 3 _ _ _ _ _ 2",
        output=str(first),
    )
    sgm.generate(config, checkpoint)
    plain = dataclasses.replace(checkpoint["config"], source=str(first), output=str(second))
    sgm.generate(plain, checkpoint, {"source", "output"})
    assert first.read_bytes() == second.read_bytes()


def test_an_edited_book_keeps_the_other_codes_and_shows_what_changed(checkpoint, tmp_path):
    config = dataclasses.replace(
        checkpoint["config"],
        prompt="The red fox",
        panels=2,
        output=str(tmp_path / "a.png"),
        storyboard="1 2 3 4 5 6 7 0",
    )
    sgm.generate(config, checkpoint)
    page = tmp_path / "b.html"
    edited = dataclasses.replace(
        checkpoint["config"],
        source=str(tmp_path / "a.png"),
        storyboard="_ _ _ 0 _ _ _ _",
        output=str(page),
    )
    (result,) = sgm.generate(edited, checkpoint, {"source", "storyboard", "output"})
    assert result.storyboard == [1, 2, 3, 0, 5, 6, 7, 0]
    assert "<s>4</s> 0 <i>" in page.read_text("utf-8")


def test_a_book_keeps_a_word_that_no_code_says(checkpoint, model, tmp_path):
    """As a word, in its record and on its page; made again it has the same bytes."""
    said = {word.lower() for word in model.code_words(range(model.prior.num_codes))}
    word = next(word for word in model.lm.word_tokens() if word not in said)
    config = dataclasses.replace(checkpoint["config"], codebook_init="words")
    first, second, edited = (tmp_path / f"{name}.html" for name in "abc")
    pinned = dict(storyboard=f"_ {word} _ _ _ _ _ _", prompt="The red fox", output=str(first))
    sgm.generate(dataclasses.replace(config, **pinned), checkpoint)
    record = sgm.read_record(str(first))
    assert record["storyboard"][1] == record["words"][1] == word
    assert f"<i>{word}</i>" in first.read_text("utf-8")
    again = dataclasses.replace(config, source=str(first), output=str(second))
    sgm.generate(again, checkpoint, {"source", "output"})
    assert first.read_bytes() == second.read_bytes()
    changed = dataclasses.replace(again, storyboard="_ 3 _ _ _ _ _ _", output=str(edited))
    sgm.generate(changed, checkpoint, {"source", "output", "storyboard"})
    assert sgm.read_record(str(edited))["storyboard"] == [
        *record["storyboard"][:1], 3, *record["storyboard"][2:],
    ]  # fmt: skip
    assert f"<s>{word}</s> 3 <i>" in edited.read_text("utf-8")


@pytest.mark.parametrize(
    "given, slots",
    [
        ({}, "2"),
        (dict(storyboard="_ _ _ 0 _ _ _ _"), "2 4"),
        (dict(keyword_slots="1,8"), "1 8"),
        (dict(keyword_slots="0"), "0"),
    ],
)
def test_words_of_pinned_and_edited_slots_lead_a_story(checkpoint, tmp_path, given, slots):
    """A book tells whose words led it, so that one that is made again is led by the same."""
    first, second = (str(tmp_path / name) for name in ("a.png", "b.png"))
    pinned = dict(storyboard="_ 3 _ _ _ _ _ _", keyword_shift=3.0, prompt="The red fox")
    sgm.generate(dataclasses.replace(checkpoint["config"], output=first, **pinned), checkpoint)
    again = dataclasses.replace(checkpoint["config"], source=first, output=second, **given)
    sgm.generate(again, checkpoint, {"source", "output", *given})
    assert sgm.read_record(first)["settings"]["keyword_slots"] == "2"
    assert sgm.read_record(second)["settings"]["keyword_slots"] == slots


@pytest.mark.parametrize("slots", ["9", "fox", "1;2", "-1"])
def test_slots_that_are_none_are_named(write, slots):
    with pytest.raises(sgm.StoryError, match="--keyword_slots takes slots from 1 to 8") as error:
        write("bad", keyword_slots=slots)
    assert error.value.code == 2


@pytest.mark.check("--redo: one picture is painted anew, all else byte for byte")
@pytest.mark.parametrize("consistency", ["off", "attention"])
def test_one_picture_is_painted_anew_and_nothing_else(checkpoint, tmp_path, consistency):
    """Twice, the second time with a seed of its own; and the book with both is made again."""
    made = dict(
        prompt="The fox ran. The owl sat. The sea", panels=3, seed=5, panel_consistency=consistency
    )

    def run(name: str, given: dict, source: str = ""):
        paths = dict(output=str(tmp_path / name), source=source and str(tmp_path / source))
        config = dataclasses.replace(checkpoint["config"], **given, **paths)
        return sgm.generate(config, checkpoint, {*given, "source", "output"})[0]

    first = run("a.epub", made)
    assert len(first.panels) == 3
    second = run("b.html", dict(redo="2"), "a.epub")
    third = run("c.pdf", dict(redo="1", seed=9), "b.html")
    again = run("d.pdf", {}, "c.pdf")
    books = [[panel.image.tobytes() for panel in book.panels] for book in (first, second, third)]
    assert first.story == second.story == third.story == again.story
    for changed, before, after in ((1, *books[:2]), (0, *books[1:])):
        same = [old == new for old, new in zip(before, after)]
        assert same == [place != changed for place in range(3)]
    assert [panel.seed for panel in third.panels] == [9, first.panels[1].seed + 8, 7]
    assert (tmp_path / "c.pdf").read_bytes() == (tmp_path / "d.pdf").read_bytes()
    another = run("e.png", dict(redo="1", seed=10), "b.html")
    assert another.panels[0].image.tobytes() not in (books[1][0], books[2][0])
    other = run("e.pdf", dict(seed=20), "c.pdf")
    assert [panel.seed for panel in other.panels] == [20, 21, 22]


@pytest.mark.check("--redo of a picture that is not there: refused")
@pytest.mark.parametrize("redo", ["0", "3", "x", "1:2"])
def test_a_picture_that_is_not_there_is_not_painted_anew(checkpoint, tmp_path, redo):
    made = dict(
        prompt="The fox ran. The owl sat. The sea", panels=2, output=str(tmp_path / "a.html")
    )
    sgm.generate(dataclasses.replace(checkpoint["config"], **made), checkpoint)
    config = dataclasses.replace(checkpoint["config"], source=made["output"], redo=redo)
    with pytest.raises(sgm.StoryError, match=f"--redo {redo} is not a picture of .*which has 2"):
        sgm.generate(config, checkpoint, {"source", "redo"})
    with pytest.raises(sgm.StoryError, match="it goes with --from"):
        sgm.generate(dataclasses.replace(config, source="", prompt="A fox"), checkpoint)


@pytest.mark.check("--from a file that generate did not write: refused")
@pytest.mark.parametrize(
    "name, data",
    [
        ("a.png", b""), ("a.html", b"<p>hello"), ("b.png", b"\x89PNG\r\n\x1a\n"), ("a.epub", b"PK"), ("b.epub", b""),
        ("a.pdf", b""), ("b.pdf", b"%PDF-1.4\n"), ("c.pdf", b"%PDF-1.4\ntrailer\n<< /Size 1 >>\nstartxref\n9\n%%EOF"),
    ],
)  # fmt: skip
def test_a_file_that_generate_did_not_write_is_refused(checkpoint, tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    config = dataclasses.replace(
        checkpoint["config"], source=str(tmp_path / name), output=str(tmp_path / "o.png")
    )
    with pytest.raises(sgm.StoryError, match="--from") as error:
        sgm.generate(config, checkpoint, {"source"})
    assert error.value.code == 2


RECORDS = {  # what a book's record says, and what is said of it
    "no checkpoint": (dict(checkpoint=None), "not a book that generate wrote"),
    "no story": (dict(story=...), "not a book that generate wrote"),
    "a code of a larger codebook": (
        dict(storyboard=[99] * 8),
        "'99' is neither _ nor a code from 0",
    ),
    "a storyboard with a free slot": (dict(storyboard=["_"] * 8), "is no storyboard"),
    "a negative seed": (dict(seed=-5), "--seed must be at least 0"),
    "a seed that torch does not take": (dict(seed=2**70), "--seed must be at most"),
    "too many panels": (dict(settings=dict(panels=99)), "--panels must be at most 8"),
    "a setting of another type": (dict(settings=dict(top_p="x")), "--top_p must be a float"),
}


@pytest.mark.check("--from a book whose record was edited by hand: refused, with the book's name")
@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_cannot_be_is_refused(checkpoint, tmp_path, name):
    changes, said = RECORDS[name]
    source, book = tmp_path / "a.html", tmp_path / "b.html"
    made = dict(prompt="The fox", output=str(source))
    sgm.generate(dataclasses.replace(checkpoint["config"], **made), checkpoint)
    record = sgm.read_record(str(source)) | changes
    record = {key: value for key, value in record.items() if value is not ...}
    tag = f'<script type="application/json" id="story">{json.dumps(record)}</script>'
    book.write_text(tag, "utf-8")
    config = dataclasses.replace(checkpoint["config"], source=str(book), output=str(source))
    with pytest.raises(sgm.StoryError, match=f"--from {book}: .*{said}"):
        sgm.generate(config, checkpoint, {"source"})


def test_a_redone_picture_that_an_edit_took_away_is_said(checkpoint, tmp_path, capsys):
    made = dict(prompt="The fox ran. The owl sat.", panels=2, output=str(tmp_path / "a.html"))
    sgm.generate(dataclasses.replace(checkpoint["config"], **made), checkpoint)
    config = dataclasses.replace(checkpoint["config"], source=made["output"], redo="2", panels=1)
    edited = dataclasses.replace(config, output=str(tmp_path / "b.html"))
    (story,) = sgm.generate(edited, checkpoint, {"source", "redo", "panels"})
    assert len(story.panels) == 1
    assert "--redo 2: the story has 1 pictures now" in capsys.readouterr().err


@pytest.mark.check(
    "generate --output that is a folder, or in one that cannot be written: told first"
)
@pytest.mark.parametrize("place", ["folder.png", "/proc/a.png"])
def test_an_output_that_cannot_be_written_is_told_before_models_load(
    checkpoint, tmp_path, monkeypatch, place
):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(sgm, "load_model", None)
    config = dataclasses.replace(checkpoint["config"], prompt="A fox", output=str(tmp_path / place))
    with pytest.raises(sgm.StoryError, match=r"--output .* (must be a|cannot be written)"):
        sgm.generate(config, checkpoint)


# Memory


@pytest.mark.check("--low_memory: one model in memory at a time, the same story and picture")
@pytest.mark.parametrize("consistency", ["off", "attention"])
def test_low_memory_holds_one_backbone_at_a_time_and_makes_the_same(
    write, monkeypatch, consistency
):
    """At each load, nothing of the other backbone is alive."""
    parts = {sgm.LanguageModel: "model", sgm.LatentDiffusion: "unet"}
    loaded, held_together = [], []

    def watch(kind):
        load = kind.load

        def watched(self):
            load(self)
            loaded.append((kind, weakref.ref(getattr(self, parts[kind]))))
            held_together.append(len({kind for kind, part in loaded if part() is not None}))

        monkeypatch.setattr(kind, "load", watched)

    settings = dict(panels=3, panel_consistency=consistency)
    usual, path = write("usual", **settings)
    for kind in parts:
        watch(kind)
    frugal, other = write("frugal", low_memory=True, **settings)
    assert [kind for kind, _ in loaded[:3]] == [*reversed(parts), sgm.LanguageModel]
    assert len(loaded) == 4 and set(held_together) == {1}
    assert (frugal.story, frugal.storyboard) == (usual.story, usual.storyboard)
    pixels = [np.asarray(Image.open(one).convert("RGB"), dtype=int) for one in (path, other)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1  # a batch rounds its sums in another order


def test_low_memory_reads_the_language_model_again_for_the_next_batch(checkpoint, tmp_path):
    settings = dict(prompt="The red fox", num_stories=3, eval_batch_size=1, low_memory=True)
    config = dataclasses.replace(checkpoint["config"], output=str(tmp_path / "a.png"), **settings)
    stories = [result.story for result in sgm.generate(config, checkpoint)]
    config = dataclasses.replace(config, low_memory=False, eval_batch_size=3)
    assert stories == [result.story for result in sgm.generate(config, checkpoint)]
