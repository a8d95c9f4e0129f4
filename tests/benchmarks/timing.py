"""Two sides of a benchmark, timed in alternation: what disturbs the machine disturbs both."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the program that is measured

RUNS, WARM_UP = 7, 2


def machine() -> str:
    """The machine in a line, for the table's head."""
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    processor = names[0] if names else platform.processor()
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{processor}, {threads}, {device}, torch {torch.__version__}"


def medians(
    sides: dict[str, Callable], runs: int = RUNS, warm_up: int = WARM_UP
) -> dict[str, float]:
    """Seconds of each side: the median of `runs` after `warm_up`, the sides in turns."""
    seconds = {name: [] for name in sides}
    for run in range(warm_up + runs):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if run >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(side: Callable) -> int:
    """Bytes that `side` needs at its peak above what stands before it: torch's own allocations, by
    its profiler, or by its allocator on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        side()
    total = peak = 0
    for event in sorted(
        profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()
    ):
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak
