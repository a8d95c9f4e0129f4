"""Open emoji art as sprites: fetched by package name and pinned version, rendered once, kept in one
file.

    python assets/painter/sprites.py --work_dir assets/painter/work  # makes work/sprites.zip

The two sets come from the npm registry through `npm pack` and are rendered by `resvg-py`; neither
is needed again once `sprites.zip` stands. NOTICE names authors and licences. A sprite is called
"set:name", as "noto:elephant"."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
PACKAGES = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
}
SPRITE_PIXELS = 256  # the longer side: a hero is at most three quarters of a 256 px canvas high
VISIBLE = 8  # alpha from which a pixel counts as part of the picture


class Art:
    """The rendered sprites of one `sprites.zip`."""

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"{path}: no sprites; python {Path(__file__).name} --work_dir {Path(path).parent} "
                f"fetches and renders them (npm and resvg-py are needed for that)"
            )
        self.archive = zipfile.ZipFile(path)
        self.names = {name.removesuffix(".png") for name in self.archive.namelist()}
        self.sprite = lru_cache(maxsize=None)(self._load)

    def _load(self, name: str) -> Image.Image:
        """The sprite called `name`, RGBA, trimmed, SPRITE_PIXELS on its longer side. Copy before
        drawing on it.
        """
        if name not in self.names:
            raise KeyError(f"no sprite {name!r} in {self.archive.filename}")
        with self.archive.open(f"{name}.png") as file:
            return Image.open(io.BytesIO(file.read())).convert("RGBA")


def pack(package: str, version: str, work_dir: Path) -> Path:
    """The archive of a package of the npm registry, fetched once into work_dir/packages."""
    folder = work_dir / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not archive.is_file():
        command = ["npm", "pack", "--silent", f"{package}@{version}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return archive


def fetch(package: str, version: str, work_dir: Path) -> dict:
    """The package's icons.json: {"icons": {name: {"body": svg, ...}}, "aliases": ..., "width": ...,
    "height": ...}.
    """
    with tarfile.open(pack(package, version, work_dir)) as file:
        return json.load(file.extractfile("package/icons.json"))


def svg_of(icons: dict, name: str) -> str:
    """The SVG text of an icon."""
    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    width, height = (icon.get(side, icons.get(side)) for side in ("width", "height"))
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'


def render(svg: str) -> Image.Image:
    """RGBA, trimmed to what is visible, SPRITE_PIXELS on its longer side."""
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SPRITE_PIXELS, height=2 * SPRITE_PIXELS)
    picture = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha > VISIBLE)).getbbox()
    picture = picture.crop(box)
    scale = SPRITE_PIXELS / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    return picture.resize(size, Image.Resampling.LANCZOS)


def make(names: Iterable[str], work_dir: Path) -> Path:
    """Render the sprites called `names` into work_dir/sprites.zip; those that are there already
    stay.
    """
    path = work_dir / "sprites.zip"
    work_dir.mkdir(parents=True, exist_ok=True)
    there = set(zipfile.ZipFile(path).namelist()) if path.is_file() else set()
    missing = sorted(name for name in set(names) if f"{name}.png" not in there)
    if not missing:
        return path
    icons = {key: fetch(*package, work_dir) for key, package in PACKAGES.items()}
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as file:
        for name in missing:
            key, _, icon = name.partition(":")
            picture, data = render(svg_of(icons[key], icon)), io.BytesIO()
            picture.save(data, "PNG")
            file.writestr(f"{name}.png", data.getvalue())
    return path


def main(argv: list[str] | None = None) -> None:
    import things

    parser = argparse.ArgumentParser(
        description="Fetch and render the art of the painter's scenes."
    )
    parser.add_argument(
        "--work_dir", type=Path, default=HERE / "work", help="where sprites.zip goes"
    )
    path = make(things.sprite_names(), parser.parse_args(argv).work_dir)
    print(f"{path}: {len(zipfile.ZipFile(path).namelist())} sprites")


if __name__ == "__main__":
    main()
