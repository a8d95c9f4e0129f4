"""Does a long training keep its memory? Trains the storyworld preset and reads the process's memory every ten seconds.

    python tests/benchmarks/soak.py --data_root data                # 20,000 steps, or one hour
    python tests/benchmarks/soak.py --data_root data --minutes 10   # a shorter look

Prints the median memory of the first tenth after warm-up (two minutes) and of the last tenth, and their ratio; more
than 2 % of growth is a failure (exit 1). Resident memory of the trainer and its readers, megabytes.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

PROGRAM = Path(__file__).resolve().parents[2] / "story_generative_model.py"
WARM_UP, PERIOD, GROWTH = 120, 10, 0.02  # seconds, seconds, share


def resident(process: psutil.Process) -> float:
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_info().rss for member in family) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", default="data")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--steps", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = [
            "--max_train_steps",
            str(arguments.steps),
            "--validation_steps",
            "1000",
            "--checkpointing_steps",
            "1000",
        ]
        where = [
            "--data_root",
            arguments.data_root,
            "--output_dir",
            folder,
            "--checkpoints_total_limit",
            "2",
        ]
        command = [sys.executable, str(PROGRAM), "train", "--preset", "storyworld", *steps, *where]
        training = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        process, readings, start = psutil.Process(training.pid), [], time.monotonic()
        while training.poll() is None and time.monotonic() - start < 60 * arguments.minutes:
            time.sleep(PERIOD)
            if time.monotonic() - start > WARM_UP and training.poll() is None:
                readings.append(resident(process))
        training.terminate()
        status = training.wait()
    if status not in (0, 143) or len(readings) < 10:
        print(f"the training ended with {status} after {len(readings)} readings")
        return 1
    tenth = max(len(readings) // 10, 3)
    first, last = statistics.median(readings[:tenth]), statistics.median(readings[-tenth:])
    print(
        "| minutes | first tenth, MB | last tenth, MB | growth | largest, MB |\n|---|---|---|---|---|"
    )
    minutes = (time.monotonic() - start) / 60
    print(
        f"| {minutes:.0f} | {first:.0f} | {last:.0f} | {last / first - 1:+.1%} | {max(readings):.0f} |"
    )
    return int(last / first - 1 > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
