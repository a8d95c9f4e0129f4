"""Writes GPT-2-XL and Stable Diffusion 1.5 in their published sizes into a folder, 5.2 GB in bf16. The weights are
random: speed and memory do not depend on them.

    python tests/benchmarks/true_models.py /tmp/true

The other benchmarks take the folder as --true_models. The tokenizers are the embedded ones, which know fewer words.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch
from timing import ROOT

import story_generative_model as sgm

GPT2_XL = dict(n_embd=1600, n_layer=48, n_head=25, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
SD_VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    sample_size=512,
)


def true_models(device: str) -> SimpleNamespace:
    """lm, unet, vae and text_encoder; on the device "meta" they have shapes and no weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, GPT2Config, GPT2LMHeadModel

    with torch.device(device):
        return SimpleNamespace(
            lm=GPT2LMHeadModel(GPT2Config(**GPT2_XL)),
            unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
            vae=AutoencoderKL(**SD_VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        )


def configured(
    folder: str | None, preset="storyworld", **settings
) -> tuple[sgm.Config, torch.device, torch.dtype]:
    """The default configuration with the models in a folder that this script wrote, in bf16;
    without a folder, the preset's. And where and in what they are run."""
    device, dtype = sgm.pick_device()
    if folder is None:
        return sgm.Config(preset=preset, **(sgm.PRESETS[preset] | settings)), device, dtype
    models = dict(lm_model=str(Path(folder, "lm")), diffusion_model=str(Path(folder, "diffusion")))
    for path in models.values():
        if not Path(path).is_dir():
            raise SystemExit(
                f"{path} does not exist: write it with tests/benchmarks/true_models.py {folder}"
            )
    return sgm.Config(**models, mixed_precision="bf16", **settings), device, torch.bfloat16


def main() -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import AutoTokenizer, CLIPTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    sgm.quiet_libraries()
    embedded = ROOT / "assets" / "storyworld"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    models = true_models("cpu")
    models.lm.save_pretrained(folder / "lm")
    AutoTokenizer.from_pretrained(embedded / "lm").save_pretrained(folder / "lm")
    pipeline = StableDiffusionPipeline.from_pretrained(
        embedded / "diffusion",
        unet=models.unet,
        vae=models.vae,
        text_encoder=models.text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(embedded / "diffusion" / "tokenizer"),
        safety_checker=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "diffusion")
    print(
        f"{folder}: {sum(path.stat().st_size for path in folder.rglob('*.safetensors')) / 1e9:.1f} GB"
    )


if __name__ == "__main__":
    main()
