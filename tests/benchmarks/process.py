"""`generate` as a whole process against importing the same libraries and loading the same weights; and --help.

python tests/benchmarks/process.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from timing import ROOT, machine, medians

LOAD = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from diffusers import StableDiffusionPipeline
AutoTokenizer.from_pretrained("assets/storyworld/lm")
AutoModelForCausalLM.from_pretrained("assets/storyworld/lm", dtype=torch.float32)
folder = "assets/storyworld/diffusion"
StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False)
torch.load("assets/storyworld/storyboard.pt", weights_only=True)
"""


def main() -> None:
    program = [sys.executable, "story_generative_model.py"]
    with tempfile.TemporaryDirectory() as folder:
        output = ["--output", str(Path(folder, "story.png"))]
        generate = [
            *program,
            "generate",
            "--prompt",
            "A shy blue owl looks for a lost star",
            *output,
        ]
        commands = {
            "generate": generate,
            "book of eight panels": [*generate, "--panels", "8"],
            "imports and weights alone": [sys.executable, "-c", LOAD],
            "--help": [*program, "--help"],
        }
        run = dict(cwd=ROOT, check=True, capture_output=True)
        sides = {
            name: lambda command=command: subprocess.run(command, **run)
            for name, command in commands.items()
        }
        seconds = medians(sides)
    print(f"{machine()}\n\n| process | seconds | over imports and weights alone |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} | {value / seconds['imports and weights alone']:.2f} |")


if __name__ == "__main__":
    main()
