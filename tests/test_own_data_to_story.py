"""From one's own data to a story: download_data.py, `train` and `generate`, on tiny models."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import as_flags, make_stories
from fakehub import Hub, data_repo, m3it_pictures
from PIL import Image
from test_download_data import rows_of, succeed

import story_generative_model as sgm

NAME = "someone/tales"
PICTURES = m3it_pictures(12)
STORIES = make_stories(12, seed=5)


def texts(folder: Path) -> None:
    """A folder of .txt files, a third of them with a picture of the same name."""
    for number, story in enumerate(STORIES):
        (folder / f"{number}.txt").write_text(story + "\n")
        if number % 3 == 0:
            (folder / f"{number}.jpg").write_bytes(PICTURES[number])


def spreadsheet(folder: Path, encoding: str) -> None:
    """A table as a spreadsheet saves it, semicolons between its columns, pictures beside it."""
    lines = ["file_name;text"]
    for number, story in enumerate(STORIES):
        (folder / f"{number}.jpg").write_bytes(PICTURES[number])
        lines.append(f'{number}.jpg;"Caf\u00e9; {story}"')
    (folder / "stories.csv").write_bytes("\r\n".join(lines).encode(encoding))


def parquet_with_images() -> list[dict]:
    return [{"image": data, "text": text} for data, text in zip(PICTURES, STORIES)]


def text_alone() -> list[dict]:
    return [{"text": text} for text in STORIES]


def panels_in_a_list() -> list[dict]:
    return [
        {"image": [PICTURES[number], PICTURES[number - 1]], "text": [text, STORIES[number - 1]]}
        for number, text in enumerate(STORIES)
    ]


FOLDERS = {
    "a folder of .txt files": texts,
    "a table in cp1252": lambda folder: spreadsheet(folder, "cp1252"),
    "a table in UTF-16": lambda folder: spreadsheet(folder, "utf-16"),
}
DATA_SETS = {
    "hub: parquet with images": parquet_with_images,
    "hub: text alone": text_alone,
    "hub: several panels in a list": panels_in_a_list,
}


def download(name: str, tmp_path: Path) -> Path:
    """data_root, made by download_data.py of one's own data of this kind."""
    data = tmp_path / "data"
    if name in FOLDERS:
        mine = tmp_path / "mine"
        mine.mkdir()
        FOLDERS[name](mine)
        succeed("--source", "folder", mine, "--data_root", data)
        return data
    with Hub({f"datasets/{NAME}": data_repo({"train": DATA_SETS[name]()})}) as hub:
        flags = ("--source", "hub", "--dataset_name", NAME, "--data_root", data)
        succeed(*flags, env=hub.env(tmp_path / "hf"))
    return data


@pytest.mark.check("one's own texts, tables and hub data sets: from download_data.py to a story")
@pytest.mark.parametrize("name", [*FOLDERS, *DATA_SETS])
def test_from_own_data_to_a_story(name, make_config, tmp_path, capsys):
    data = download(name, tmp_path)
    rows = rows_of(data / "train") + rows_of(data / "val")
    assert len(rows) == len(STORIES)
    panels = 2 if name.endswith("list") else 1
    config = make_config(data_root=str(data), max_train_steps=3, panels=panels)
    assert sgm.run(as_flags(config)) == 0, capsys.readouterr().err
    capsys.readouterr()
    checkpoint, output = Path(config.output_dir) / "ckpt_3.pt", tmp_path / "story.png"
    prompt = rows[0]["prompt"]
    asked = dataclasses.replace(config, ckpt=str(checkpoint), output=str(output), prompt=prompt)
    assert sgm.run(as_flags(asked, "generate")) == 0
    story = capsys.readouterr().out.strip()
    assert (
        story.startswith(prompt) and json.loads(Image.open(output).text["story"])["story"] == story
    )
