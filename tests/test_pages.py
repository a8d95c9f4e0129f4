"""Pages: what is written is seen in a browser, carries what made it, and lets nothing of the story through as code."""

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

import story_generative_model as sgm

NASTY = 'A <script>alert("fox")</script> & a <b>key</b>'
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture()
def result() -> sgm.IllustratedStory:
    panels = [
        sgm.IllustratedPanel(
            f"{NASTY} {number}.", number, Image.new("RGB", (32, 32), (90 * number, 120, 40))
        )
        for number in range(3)
    ]
    return sgm.IllustratedStory(
        NASTY, " ".join(panel.text for panel in panels), [3, 1, 4, 1, 5, 9, 2, 6], panels
    )


@pytest.fixture()
def record(result) -> dict:
    settings = {name: getattr(sgm.Config(), name) for name in sgm.RECORDED_SETTINGS}
    model = dict(name="a/b", revision="")
    return dict(
        prompt=result.prompt,
        story=result.story,
        storyboard=result.storyboard,
        words=["<b>star", *"abcdefg"],
        panels=[dict(text=panel.text, seed=panel.seed) for panel in result.panels],
        seed=0,
        settings=settings | dict(negative_prompt="rain"),
        checkpoint=dict(name="ckpt_6.pt", step=6, sha256="0" * 64),
        models=dict(language=model, diffusion=model, scheduler=model),
        versions="torch",
    )


@pytest.mark.skipif(not BROWSER, reason="no chromium on this machine")
def test_the_page_in_a_browser(result, record, tmp_path):
    page = tmp_path / "story.html"
    page.write_bytes(sgm.as_html(result, record, None))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    seen = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in seen.stderr
    assert seen.stdout.count("<img ") == 3 and seen.stdout.count("<li ") == 8
    assert seen.stdout.count("<script") == 1  # the record, which is data
    shown = re.search(r"<h1>(.*?)</h1>", seen.stdout)[1]
    assert shown == 'A &lt;script&gt;alert("fox")&lt;/script&gt; &amp; a &lt;b&gt;key&lt;/b&gt;'


def test_the_page_needs_nothing_from_elsewhere_and_carries_the_record(result, record, tmp_path):
    page = tmp_path / "story.html"
    page.write_bytes(sgm.as_html(result, record, None))
    text = page.read_text("utf-8")
    assert "http" not in text and not re.search(r'(src|href)="(?!data:)', text)
    assert sgm.read_record(str(page)) == record


def test_the_page_shows_what_changed(result, record):
    before = dict(record, storyboard=[3, 1, 4, 1, 5, 9, 2, 7], story="An old fox 0.")
    text = sgm.as_html(result, record, before).decode()
    assert text.count("<s>") == 1 and "<s>7</s> 6 <i>g</i></li>" in text and "&lt;b&gt;star" in text
    assert "<del>An old fox</del>" in text and "<ins>" in text
    moved = ["The fox", "ran to the sea."], ["The fox ran", "to the red sea."]
    marked = [("same", "to the"), ("new", "red"), ("same", "sea.")]
    assert sgm.mark_changes(" ".join(moved[0]), moved[1]) == [[("same", "The fox ran")], marked]
    assert sgm.mark_changes("a b c", ["a", "b"]) == [
        [("same", "a")],
        [("same", "b"), ("gone", "c")],
    ]
    longer = dict(record, story=" ".join(panel.text for panel in result.panels) + " The end.")
    changed = sgm.as_html(result, record, longer).decode()
    assert " <del>The end.</del></figcaption>" in changed and "<ins>" not in changed
    assert "<del>" not in sgm.as_html(result, record, record).decode()


def test_a_strip_shows_every_panel_with_its_text(result, record, tmp_path):
    path = tmp_path / "strip.png"
    path.write_bytes(sgm.as_png(result, record, None))
    with Image.open(path) as strip:
        strip.load()
        cards = [strip.getpixel((strip.width * (2 * place + 1) // 6, 100)) for place in range(3)]
        parameters = strip.text["parameters"]
    assert cards == [(90 * number, 120, 40) for number in range(3)]
    assert sgm.read_record(str(path)) == record
    assert f"{result.panels[0].text}\nNegative prompt: rain\nSteps: 20, " in parameters


def test_a_pdf_has_a_page_for_each_panel_and_the_record(result, record):
    data = sgm.as_pdf(result, record, None)
    assert data.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", data)) == 3
    assert data == sgm.as_pdf(result, record, None)
    keywords = re.search(rb"/Keywords <?\(?(.*)", data)[1]
    assert (
        json.dumps(record)[:20].encode("utf-16-be") in keywords
        or json.dumps(record)[:20].encode() in keywords
    )


def test_long_words_and_other_scripts_are_wrapped():
    font = sgm.caption_font(20)
    lines = sgm.wrap("a " + "b" * 200 + " \u4e00\u4e8c \u0416", font, 100)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == "a" + "b" * 200 + "\u4e00\u4e8c\u0416"


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path):
    def broken() -> bytes:
        raise OSError("disk full")

    with pytest.raises(sgm.StoryError, match="disk full"):
        sgm.write_output(tmp_path / "a.png", broken)
    assert not list(tmp_path.iterdir())
    sgm.write_output(tmp_path / "a.png", lambda: b"x")
    assert (tmp_path / "a.png").read_bytes() == b"x"
