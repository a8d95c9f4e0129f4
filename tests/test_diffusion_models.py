"""Diffusion models of every kind that users bring: each works, or is refused in one line when it is loaded."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CPU
from safetensors.torch import load_file, save_file

import story_generative_model as sgm


def edit_json(path: Path, **changes) -> None:
    """Sets keys of a JSON file; a key that is set to None goes."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def make_unet(folder: Path, **changes) -> None:
    """In the place of the tiny UNet, one of the same kind that differs in these settings."""
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config(config | changes).save_pretrained(folder / "unet")


def make_vae(folder: Path, **changes) -> None:
    from diffusers import AutoencoderKL

    config = AutoencoderKL.load_config(folder / "vae")
    AutoencoderKL.from_config(config | changes).save_pretrained(folder / "vae")


def kind(folder: Path, name: str) -> None:
    edit_json(folder / "model_index.json", _class_name=name)


def make_xl(folder: Path) -> None:
    """As SDXL is saved: two text encoders and tokenizers, and a UNet that wants sizes as well."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextModelWithProjection

    plain = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    sizes = dict(addition_embed_type="text_time", addition_time_embed_dim=4)
    unet = type(plain.unet).from_config(
        plain.unet.config, **sizes, projection_class_embeddings_input_dim=40, cross_attention_dim=32
    )
    second = CLIPTextModelWithProjection(plain.text_encoder.config)
    texts = (plain.text_encoder, second, plain.tokenizer, plain.tokenizer)
    StableDiffusionXLPipeline(plain.vae, *texts, unet, plain.scheduler).save_pretrained(folder)


def make_upscaler(folder: Path) -> None:
    make_unet(folder, in_channels=7, num_class_embeds=10)
    kind(folder, "StableDiffusionUpscalePipeline")


def make_inpainting(folder: Path) -> None:
    make_unet(folder, in_channels=9)
    kind(folder, "StableDiffusionInpaintPipeline")


def make_flux(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    edit_json(
        folder / "model_index.json",
        _class_name="FluxPipeline",
        unet=None,
        transformer=["diffusers", "FluxTransformer2DModel"],
    )


def make_tiny_autoencoder(folder: Path) -> None:
    """TAESD, which people put in for speed: it has no posterior, so that no picture can be scored."""
    from diffusers import AutoencoderTiny

    shutil.rmtree(folder / "vae")
    layers = dict(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    widths = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8))
    AutoencoderTiny(**layers, **widths).save_pretrained(folder / "vae")
    edit_json(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])


def make_pointer(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_text(pointer)


def make_language_model(folder: Path) -> None:
    """A folder that holds no pipeline: a language model, given to the wrong flag."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def make_lora(folder: Path) -> None:
    """As a training of LoRA saves what it has learned."""
    shutil.rmtree(folder)
    folder.mkdir()
    save_file(
        {"unet.mid.lora_A.weight": torch.zeros(1)}, folder / "pytorch_lora_weights.safetensors"
    )


def make_half_precision(folder: Path) -> None:
    """As repositories that have no weights but those in fp16."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    shutil.rmtree(folder)
    pipeline.to(torch.float16).save_pretrained(folder, variant="fp16")
    assert list(folder.glob("unet/*.fp16.safetensors"))


def make_unet_of_nan(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"].fill_(torch.nan)
    save_file(tensors, file, metadata={"format": "pt"})


REFUSED = {  # what it is: how it is made, and what its line says
    "SDXL": (make_xl, "StableDiffusionXLPipeline"),
    "inpainting": (make_inpainting, "StableDiffusionInpaintPipeline.*9 channels"),
    "an upscaler": (make_upscaler, "StableDiffusionUpscalePipeline"),
    "Flux": (make_flux, "FluxPipeline.*unet"),
    "TAESD": (make_tiny_autoencoder, "AutoencoderTiny"),
    "a Git LFS pointer": (make_pointer, "unet/.*git lfs pull"),
    "a part that is missing": (lambda folder: shutil.rmtree(folder / "vae"), "vae"),
    "a part that is null": (
        lambda folder: edit_json(folder / "model_index.json", text_encoder=[None, None]),
        "text_encoder",
    ),
    "a text encoder of another width": (
        lambda folder: make_unet(folder, cross_attention_dim=24),
        "StableDiffusionPipeline.*16",
    ),
    "latents of another width": (lambda folder: make_vae(folder, latent_channels=8), "8"),
    "weights that are not finite": (make_unet_of_nan, "noise that is not finite"),
    "LoRA weights": (make_lora, "LoRA adapter.*fuse_lora"),
    "a language model": (make_language_model, "model_index.json"),
    "an index that is a list": (
        lambda folder: (folder / "model_index.json").write_text("[]"),
        "AttributeError",
    ),
}


@pytest.fixture()
def folder(diffusion_folder, tmp_path) -> Path:
    return shutil.copytree(diffusion_folder, tmp_path / "painter")


def load(path: Path) -> sgm.LatentDiffusion:
    return sgm.LatentDiffusion(str(path), CPU, torch.float32)


@pytest.mark.check(
    "diffusion models of another kind, or broken: refused at load, flag and kind named"
)
@pytest.mark.parametrize("name", REFUSED)
def test_models_of_another_kind_are_refused_when_they_are_loaded(folder, name):
    make, said = REFUSED[name]
    make(folder)
    with pytest.raises(sgm.StoryError, match=said) as error:
        load(folder)
    message = str(error.value)
    assert "\n" not in message and f"--diffusion_model {folder}" in message
    assert "Stable Diffusion 1.x or 2.x" in message


@pytest.mark.check("diffusion models in a single file: refused at load, with the way to a folder")
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_is_refused_with_the_way_to_a_folder(tmp_path, suffix):
    (tmp_path / f"model{suffix}").write_bytes(b"weights")
    with pytest.raises(sgm.StoryError, match=r"--diffusion_model .*from_single_file") as error:
        load(tmp_path / f"model{suffix}")
    assert "\n" not in str(error.value)


def test_a_file_of_lora_weights_is_told_as_such(tmp_path):
    file = tmp_path / "style.safetensors"
    save_file({"lora_unet_mid.lora_down.weight": torch.zeros(1)}, file)
    for path in (file, tmp_path):
        with pytest.raises(sgm.StoryError, match=f"--diffusion_model {path} is a LoRA.*fuse_lora"):
            load(path)


@pytest.mark.check("more denoising steps than the scheduler's: refused at load, with its number")
def test_more_steps_than_the_scheduler_has_are_refused(folder, config):
    edit_json(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=50)
    diffusion = load(folder)
    diffusion.check_steps(50)
    with pytest.raises(sgm.StoryError, match=r"--num_inference_steps 51: .*painter has 50"):
        sgm.StoryModel(dataclasses.replace(config, num_inference_steps=51), None, diffusion)


WORKING = {
    "an autoencoder without quant_conv": (
        lambda folder: make_vae(folder, use_quant_conv=False, use_post_quant_conv=False)
    ),
    "a tokenizer without model_max_length": (
        lambda folder: edit_json(
            folder / "tokenizer" / "tokenizer_config.json", model_max_length=None
        )
    ),
    "a sample_size that is a list": lambda folder: make_unet(folder, sample_size=[16, 16]),
    "no sample_size": lambda folder: edit_json(folder / "unet" / "config.json", sample_size=None),
    "weights in fp16 alone": make_half_precision,
    "an image-to-image pipeline": lambda folder: kind(folder, "StableDiffusionImg2ImgPipeline"),
    "a guidance-distilled UNet": lambda folder: make_unet(folder, time_cond_proj_dim=8),
    "layers that halve once more": lambda folder: make_unet(
        folder,
        block_out_channels=(8, 8, 8),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ),
}


@pytest.mark.check("diffusion models with odd or missing settings: they score and paint")
@pytest.mark.parametrize("name", WORKING)
@torch.no_grad()
def test_odd_settings_work(folder, name, config):
    WORKING[name](folder)
    diffusion = load(folder)
    states, mask = diffusion.encode_texts(["a fox", "b" * 40])
    assert states.shape == (2, 60, 16) and mask.sum(1).tolist() == [20, 60]
    side = diffusion.resolution
    assert side == 32
    moments = diffusion.encode_images(torch.zeros(2, 3, side, side))
    assert diffusion.nll(moments, states, mask, torch.Generator().manual_seed(0)).isfinite().all()
    pictures = diffusion.sample_images(states, mask, config, [0, 1])
    assert [picture.size for picture in pictures] == [(32, 32)] * 2
