"""`download_data.py` on M3IT's shape, from a local hub, against reading the same bytes from that hub and writing the
same files: no parsing, no decoding, no check.

    python tests/benchmarks/prepare.py

Both sides are whole processes; files are written through to the disk on both.
"""

import argparse
import base64
import io
import itertools
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import ROOT, machine, medians

sys.path.insert(0, str(ROOT / "tests"))

COPY = """
import os, sys, urllib.request
from pathlib import Path
url, target, source = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
for address in url.split():
    with urllib.request.urlopen(address) as answer:
        while answer.read(1 << 20):
            pass
for path in sorted(path for path in source.rglob("*") if path.is_file()):
    place = target / path.relative_to(source)
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place, "wb") as file:
        file.write(path.read_bytes())
        file.flush()
        os.fsync(file.fileno())
"""


def pictures(count: int, seed: int = 0) -> list[bytes]:
    """JPEGs of about the size and content of photographs."""
    from PIL import Image

    rng, made = random.Random(seed), []
    for _ in range(count):
        noise = Image.frombytes("RGB", (40, 30), rng.randbytes(3600)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        file = io.BytesIO()
        noise.save(file, "JPEG", quality=92)
        made.append(file.getvalue())
    return made


def main() -> None:
    from fakehub import Hub, m3it_repo

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=14_575, help="M3IT's number by default")
    arguments = parser.parse_args()
    paragraph = "A man stands by the road in picture {}. A dog waits beside him. The sky is grey and it may rain."
    made = itertools.cycle(
        [base64.b64encode(data).decode() for data in pictures(min(500, arguments.rows))]
    )
    rows = [(next(made), paragraph.format(number)) for number in range(arguments.rows)]
    repo = m3it_repo(train=rows, val=rows[:8], shards=2, rows_per_group=100)
    with Hub({"datasets/MMInstruction/M3IT": repo}) as hub, tempfile.TemporaryDirectory() as folder:
        numbers, program = (
            itertools.count(),
            [sys.executable, str(ROOT / "download_data.py"), "--data_root"],
        )

        def fresh() -> str:
            """A folder for each run: in the place of files that were just deleted a file system is
            slow."""
            return str(Path(folder, str(next(numbers))))

        def prepare(target: str = ""):
            target = target or fresh()
            subprocess.run(
                [*program, target],
                check=True,
                env=hub.env(Path(folder, "home")),
                capture_output=True,
            )

        kept = Path(fresh())
        prepare(str(kept))
        branch = next(revision for revision in repo if "parquet" in revision)
        names = [name for name in repo[branch] if name.startswith("image-paragraph-captioning/")]
        base = f"{hub.url}/datasets/MMInstruction/M3IT/resolve/{branch.replace('/', '%2F')}"
        addresses = " ".join(f"{base}/{name}" for name in names if "/test/" not in name)

        def copy_bytes():
            subprocess.run([sys.executable, "-c", COPY, addresses, fresh(), str(kept)], check=True)

        seconds = medians({"prepare": prepare, "copy": copy_bytes})
        size = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) / 1e6
    print(f"{machine()}\n\n| {arguments.rows} rows, {size:.0f} MB | seconds |\n|---|---|")
    print(
        f"| download_data.py | {seconds['prepare']:.2f} |\n| the same bytes | {seconds['copy']:.2f} |"
    )
    print(f"| ratio | {seconds['prepare'] / seconds['copy']:.2f} |")


if __name__ == "__main__":
    main()
