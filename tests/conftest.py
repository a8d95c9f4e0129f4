"""Fixtures: tiny models of the real classes, saved with save_pretrained: every test runs the real loading code."""

import dataclasses
import json
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "assets" / "storyworld")]
torch.set_num_threads(1)

CPU = torch.device("cpu")
VOCABULARY = "the a small red blue fox owl found lost key star in forest sea and was happy sad then friend came home"
WORDS = VOCABULARY.split()


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "check(name): a line of the robustness table, which `pytest -m check` prints"
    )


def pytest_collection_modifyitems(items):
    for item in items:
        for mark in item.iter_markers("check"):
            item.user_properties.append(("check", mark.args[0]))


def pytest_terminal_summary(terminalreporter, config):
    """The table of `pytest -m check`: what was tried, how often, and how often it passed."""
    if config.option.markexpr != "check":
        return
    tried, passed, place = Counter(), Counter(), {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            noted = dict(report.user_properties)
            if "check" in noted and (report.when == "call" or outcome == "error"):
                name, count = noted["check"], noted.get("tried", 1)
                tried[name] += count
                passed[name] += count * (outcome == "passed")
                place[name] = min(report.location, place.get(name, report.location))
    terminalreporter.write_line("\n| check | tried | passed |\n|---|---|---|")
    for name in sorted(tried, key=place.get):
        terminalreporter.write_line(f"| {name} | {tried[name]} | {passed[name]} |")


def make_stories(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(WORDS, k=rng.randint(12, 30))).capitalize() + "." for _ in range(count)
    ]


def make_lm(folder: Path, embd: int = 16, context: int = 64) -> Path:
    """A GPT-2 of two layers with dropout on, so that a frozen model in train mode would be
    noticed."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        make_stories(100), vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False
    )
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=embd, n_layer=2, n_head=2, n_positions=context, resid_pdrop=0.5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,  # ten times the usual: untrained, but not deaf to its context
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_diffusion(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A Stable Diffusion of a few thousand parameters, 32 px, with its own tokenizer: every letter
    is a token."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(97, 123)] + [".", ",", "0", "1"]
    tokens = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=20
    )
    torch.manual_seed(0)
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    text = CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=20, bos_token_id=start, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, scaling_factor=0.7,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        prediction_type=prediction_type,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae,
        CLIPTextModel(text),
        tokenizer,
        unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_data(root: Path, train: int = 24, val: int = 6, panels: int = 2) -> Path:
    """A data folder in the project's layout; every panel has a picture of its own. In both splits
    the first story has fewer tokens than there are slots, and the second more than the tiny model's
    context."""
    from PIL import Image

    for split, count in (("train", train), ("val", val)):
        (root / split / "images").mkdir(parents=True)
        lines = []
        stories = ["The fox.", " ".join(WORDS * 5), *make_stories(count, seed=len(split))][:count]
        for number, story in enumerate(stories):
            parts = []
            for panel in range(panels):
                path = f"images/{number:06d}_{panel}.png"
                Image.new("RGB", (40, 36), (number * 9 % 256, panel * 90, 120)).save(
                    root / split / path
                )
                parts.append({"text": story[panel::panels], "image_path": path})
            prompt = " ".join(story.split()[:4])
            lines.append(
                {
                    "prompt": prompt,
                    "story": story,
                    "image_path": parts[-1]["image_path"],
                    "panels": parts,
                }
            )
        (root / split / "stories.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    return root


def as_flags(config, command: str = "train") -> list[str]:
    """The command line that gives this configuration."""
    import story_generative_model as sgm

    argv, preset = [command], sgm.PRESETS["gpt2-xl"]
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), preset.get(field.name, field.default)
        if command in field.metadata["commands"] and value != default:
            flag = field.metadata["name"] or field.name
            argv.append(f"--{flag}" if value is True else f"--{flag}={value}")
    return argv


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory) -> Path:
    return make_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="session")
def diffusion_folder(tmp_path_factory) -> Path:
    return make_diffusion(tmp_path_factory.mktemp("diffusion"))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="session")
def make_config(lm_folder, diffusion_folder, data_folder, tmp_path_factory):
    """A maker of configurations on the tiny models that train in seconds, each with an output
    folder of its own."""
    import story_generative_model as sgm

    def make(**changes) -> sgm.Config:
        tiny = dict(
            lm_model=str(lm_folder), diffusion_model=str(diffusion_folder), data_root=str(data_folder),
            output_dir=str(tmp_path_factory.mktemp("out")), num_codes=8, code_dim=4, encoder_width=16, encoder_layers=2,
            prior_width=16, prior_layers=1, num_heads=2, train_batch_size=4, max_train_steps=6, lr_warmup_steps=2,
            quantizer_warmup_steps=2, checkpointing_steps=3, validation_steps=6, logging_steps=1,
            dataloader_num_workers=0, mixed_precision="no", max_new_tokens=12, num_inference_steps=2,
            num_storyboards=4, eval_batch_size=4, prior_steps=20,
        )  # fmt: skip
        return sgm.Config(**{**tiny, **changes})

    return make


@pytest.fixture()
def config(make_config):
    return make_config()


@pytest.fixture(scope="session")
def lm(lm_folder):
    import story_generative_model as sgm

    return sgm.LanguageModel(str(lm_folder), CPU, torch.float32)


@pytest.fixture(scope="session")
def diffusion(diffusion_folder):
    import story_generative_model as sgm

    return sgm.LatentDiffusion(str(diffusion_folder), CPU, torch.float32)


@pytest.fixture()
def model(config, lm, diffusion, data_folder):
    """An untrained model whose codebook has started, in eval mode, on the shared backbones."""
    import story_generative_model as sgm

    torch.manual_seed(0)
    model = sgm.StoryModel(config, lm, diffusion).train()
    model.init_codebook([row.story for row in sgm.read_rows(str(data_folder), "train")])
    return model.eval()


@pytest.fixture()
def batch(config, lm, diffusion, data_folder) -> dict:
    """The first four training stories with their pictures, as the trainer reads them."""
    import story_generative_model as sgm

    rows = sgm.read_rows(str(data_folder), "train", 4)
    dataset = sgm.StoryDataset(
        rows, data_folder / "train", lm.tokenizer, 55, diffusion.resolution, 0
    )
    return sgm.collate([dataset[0, index, True] for index in range(4)], dataset.max_tokens)


@pytest.fixture(scope="session")
def trained(make_config):
    """One finished run of six steps: its configuration, whose output_dir holds ckpt_3.pt and
    ckpt_6.pt."""
    import story_generative_model as sgm

    config = make_config()
    sgm.train(config)
    return config


@pytest.fixture(scope="session")
def checkpoint(trained) -> dict:
    import story_generative_model as sgm

    return sgm.load_checkpoint(Path(trained.output_dir) / "ckpt_6.pt")


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """Training listens for signals; the tests after it must not."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
