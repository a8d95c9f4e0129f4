"""Draws rate.png, the figure of the README: bits returned against bits spent over training, for several beta_kl.

    for beta in 0.0 0.25 0.5 2.0; do
        python story_generative_model.py train --preset storyworld --beta_kl $beta --validation_steps 100 \\
            --output_dir checkpoints/beta_$beta
    done
    pip install matplotlib && python assets/draw_rate.py checkpoints/beta_*

It reads what the runs wrote for TensorBoard: each point is a validation on held-out stories, each line a run, the last
point of a run is drawn large.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_run(folder: Path) -> tuple[list[float], list[float]]:
    """Bits spent and bits returned at each validation."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return tuple(
        [point.value for point in events.Scalars(f"valid/bits_{name}")]
        for name in ("spent", "returned")
    )


def main(folders: list[str]) -> None:
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(7.2, 4.8), dpi=150)
    most = 0.0
    for folder, colour in zip(
        sorted(map(Path, folders)), plt.cm.viridis([0.0, 0.3, 0.6, 0.85, 0.95])
    ):
        spent, returned = read_run(folder)
        label = "beta_kl " + folder.name.rpartition("_")[2]
        axes.plot(spent, returned, "-o", color=colour, markersize=3, linewidth=1.5, alpha=0.8)
        axes.plot(spent[-1:], returned[-1:], "o", color=colour, markersize=10, label=label)
        most = max(most, *spent)
    axes.plot([0, most], [0, most], "--", color="#888", linewidth=1, label="worth what it costs")
    axes.plot([0, most], [0, 0.8 * most], ":", color="#888", linewidth=1, label="efficiency 0.8")
    axes.set(
        xlabel="bits spent, -log2 p(z), per story", ylabel="bits returned per story", xlim=(0, None)
    )
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("rate.png"), metadata={"Software": None})


if __name__ == "__main__":
    main(sys.argv[1:])
