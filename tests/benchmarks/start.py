"""Reading the data of 1,000 to 1,000,000 rows: how long a run waits for its rows, and how much memory they take.

    python tests/benchmarks/start.py

The rows are the storyworld's own, without pictures. Each size is read in a process of its own.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import ROOT, machine

sys.path.insert(0, str(ROOT / "assets" / "storyworld"))

READ = """
import resource, sys, time
sys.path.insert(0, sys.argv[2])
import story_generative_model as sgm
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
rows = sgm.read_rows(sys.argv[1], "train")
rows[: sgm.CHECKED_ROWS]
print(len(rows), time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def main() -> None:
    import world

    lines = []
    for seed in range(1000):
        story = world.write_story(seed)
        panels = [
            dict(text=text, image_path=f"images/{seed}-{beat}.jpg")
            for beat, text in enumerate(story.beats)
        ]
        row = dict(
            prompt=story.prompt,
            story=story.text,
            image_path=panels[-1]["image_path"],
            panels=panels,
        )
        lines.append(json.dumps(row | dict(factors=story.factors)) + "\n")
    print(f"{machine()}\n\n| rows | seconds | MB |\n|---|---|---|")
    for count in (1_000, 10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "train").mkdir()
            with open(Path(folder, "train", "stories.jsonl"), "w") as file:
                for _ in range(count // len(lines)):
                    file.writelines(lines)
            command = [sys.executable, "-c", READ, folder, str(ROOT)]
            read = subprocess.run(command, check=True, capture_output=True, text=True)
            rows, seconds, megabytes = read.stdout.split()
        print(f"| {int(rows):,} | {float(seconds):.1f} | {float(megabytes):.0f} |", flush=True)


if __name__ == "__main__":
    main()
