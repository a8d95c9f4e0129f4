"""Runs of the program in processes of their own, so that they can be killed, starved and counted.

The processes are forked from a server that has the program and its libraries loaded, which spares each of them some
seconds of import; their signals, files, exit statuses and process groups are real.

    child = Child(["train", ...], tmp_path / "log")        # runs story_generative_model.py with these arguments
    child.wait_for_step(3), child.send(signal.SIGKILL), child.finish()

`FAULTS` names what a child can do to itself first, by the name that is given as `fault`.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import torch

import story_generative_model as sgm

sgm.quiet_libraries()
torch.set_num_threads(1)
with contextlib.suppress(ImportError):  # loaded once, in the server
    import accelerate  # noqa: F401
    from diffusers import DDPMScheduler, StableDiffusionPipeline  # noqa: F401
    from diffusers.optimization import get_scheduler  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

SERVER = multiprocessing.get_context("forkserver")
PROGRAM = str(Path(sgm.__file__).resolve())


def overflow_once(step: int = 3) -> None:
    """The gradient of one step is infinite."""
    backward = sgm.Trainer.check_finite

    def poisoned(self, what, value, losses, batch):
        if self.step + 1 == step and what == "loss":
            weight = self.model.soft_prompt.linear.weight
            weight.register_hook(lambda gradient: gradient * torch.inf)
        return backward(self, what, value, losses, batch)

    sgm.Trainer.check_finite = poisoned


def slow_steps() -> None:
    """A step takes seconds."""
    noise = sgm.Trainer.noise_generator
    sgm.Trainer.noise_generator = lambda self: (time.sleep(3), noise(self))[1]


def small_files(kilobytes: int) -> None:
    """No file can grow beyond this, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000 * kilobytes,) * 2)


def double_precision() -> None:
    """The whole model, frozen and trained, in float64."""
    sgm.pick_device = lambda: (torch.device("cpu"), torch.float64)
    torch.set_default_dtype(torch.float64)


def processor_with_bf16() -> None:
    """torch imitates bf16 where the processor lacks it."""
    sgm.cpu_has_bf16 = lambda: True


FAULTS = {
    "bf16": processor_with_bf16,
    "overflow": overflow_once,
    "slow": slow_steps,
    "double": double_precision,
}
FAULTS |= {f"files of {size} kB": partial(small_files, size) for size in (3, 100)}


def note_steps(log: Path, pulse) -> None:
    """Every step is told to the parent, and the stories that it read go to the log."""
    noise, check = sgm.Trainer.noise_generator, sgm.Trainer.check_finite

    def counted(self):
        pulse.value = self.step
        return noise(self)

    def noted(self, what, value, losses, batch):
        if what == "loss":
            rank = self.accelerator.process_index
            line = dict(step=self.step, rank=rank, index=batch["index"], loss=value)
            with open(f"{log}.stories.{rank}", "a") as file:
                file.write(json.dumps(line) + "\n")
        return check(self, what, value, losses, batch)

    sgm.Trainer.noise_generator, sgm.Trainer.check_finite = counted, noted


def note_codebook(log: Path) -> None:
    """How many codes each update revives, and at the end a hash of all trained weights."""
    revive, fit, rank = sgm.VectorQuantizer.revive, sgm.Trainer.fit, os.environ.get("RANK", 0)

    def counted(self, x):
        before = self.sums.clone()
        revive(self, x)
        with open(f"{log}.revived.{rank}", "a") as file:
            file.write(f"{int((self.sums != before).any(1).sum())}\n")

    def hashed(self):
        model = fit(self)
        digest = hashlib.sha256(
            b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
        )
        Path(f"{log}.weights.{rank}").write_text(digest.hexdigest())
        return model

    sgm.VectorQuantizer.revive, sgm.Trainer.fit = counted, hashed


def note_writes(log: Path) -> None:
    """Every file that is opened for writing goes to the log."""
    notes = os.open(
        f"{log}.writes.{os.environ.get('RANK', 0)}", os.O_CREAT | os.O_WRONLY | os.O_APPEND
    )

    def hook(event: str, arguments: tuple):
        if (
            event == "open"
            and isinstance(arguments[0], str)
            and set(arguments[1] or "") & set("wax+")
        ):
            os.write(notes, (arguments[0] + "\n").encode())

    sys.addaudithook(hook)


def be_the_program(argv: list[str], log: Path, env: dict[str, str], fault: str, pulse) -> None:
    os.setsid()
    os.environ.update(env)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    note_writes(log)
    note_steps(log, pulse)
    note_codebook(log)
    sys.argv = [PROGRAM, *argv]
    if fault:
        FAULTS[fault]()
    status = sgm.run(argv)
    sys.stdout.flush()
    sys.exit(status)


def start_server() -> None:
    """The server finds this module by PYTHONPATH."""
    before = os.environ.get("PYTHONPATH")
    folders = [str(Path(__file__).parent), str(Path(PROGRAM).parent), *filter(None, [before])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    SERVER.set_forkserver_preload(["children"])
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


class Child:
    """The program with the arguments `argv`; what it prints is in log.out and log.err."""

    def __init__(self, argv: list[str], log: Path, fault: str = "", **env: str):
        self.log, self.pulse = Path(log), SERVER.Value("i", -1)
        start_server()
        arguments = (argv, self.log, env, fault, self.pulse)
        self.process = SERVER.Process(target=be_the_program, args=arguments)
        self.process.start()

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        """Until the step after `step` steps is under way, or the process has ended."""
        end = time.monotonic() + seconds
        while self.pulse.value < step and self.process.is_alive():
            assert time.monotonic() < end, f"no step {step}: {self.err}"
            time.sleep(0.002)

    def send(self, number: int, group: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process.pid, number)

    def finish(self, seconds: float = 180) -> int:
        """The exit status; -number for a signal."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.send(signal.SIGKILL, group=True)
            self.process.join()
            raise AssertionError(f"did not end within {seconds} s: {self.err}")
        return self.process.exitcode

    @property
    def out(self) -> str:
        return Path(f"{self.log}.out").read_text()

    @property
    def err(self) -> str:
        return Path(f"{self.log}.err").read_text()


def together(argv: list[str], log: Path, count: int = 2, fault: str = "") -> list[Child]:
    """`count` processes of one run, as torchrun starts them, over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    shared |= dict(
        OMP_NUM_THREADS="1"
    )  # or accelerate sets as many as there are cores, for each of the processes
    return [
        Child(argv, Path(f"{log}{rank}"), fault, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(count)
    ]


def stories_read(*logs: Path) -> dict[tuple[int, int], list[int]]:
    """(step, rank) -> the stories read, the last time that the step was taken."""
    read = {}
    for log in logs:
        for path in sorted(log.parent.glob(f"{log.name}*.stories.*")):
            for line in path.read_text().splitlines():
                note = json.loads(line)
                key = (note["step"], note["rank"])
                read[key] = note["index"]
    return read
