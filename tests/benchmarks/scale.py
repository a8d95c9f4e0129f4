"""From one GPU to a thousand: what the true models cost, by arithmetic that anyone can repeat without a GPU.

    python tests/benchmarks/scale.py

Floating-point operations are counted by torch's own counter on GPT-2-XL, Stable Diffusion 1.5's UNet and autoencoder
and CLIP's text encoder, built from their published sizes on the meta device. Bytes are those of the tensors that
`train` makes and exchanges. Three numbers are assumptions, to be set by hand: what a GPU achieves, what its network
carries, and how large a picture file is.
"""

import argparse
from types import SimpleNamespace

import torch
from timing import machine
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import story_generative_model as sgm

ROWS = {"M3IT": 14_575, "its COCO rows": 566_747, "a billion web pairs": 1_000_000_000}
GPUS = (1, 8, 64, 1000)
ROW_INDEX = 4 * 8  # bytes that Rows keeps for each: file, line, start and end


def true_models() -> SimpleNamespace:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, GPT2Config, GPT2LMHeadModel

    widths = (128, 256, 512, 512)
    with torch.device("meta"):
        return SimpleNamespace(
            lm=GPT2LMHeadModel(
                GPT2Config(n_embd=1600, n_layer=48, n_head=25, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
            ),
            unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
            vae=AutoencoderKL(
                block_out_channels=widths,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                sample_size=512,
            ),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
            ),
        )


def teraflops(model: nn.Module, run) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(model)
    return counter.get_total_flops() / 1e12


def activations(run, frozen: nn.Module) -> float:
    """GB that a forward keeps for its backward, each storage once, weights apart."""
    weights, kept = {p.untyped_storage()._cdata for p in frozen.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(frozen)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 1e9


def memory_table(models: SimpleNamespace, length: int, trained: int) -> None:
    """What training keeps on the GPU, in bf16 but for what is trained."""
    half = dict(dtype=torch.bfloat16)
    for model in vars(models).values():
        model.to(**half).requires_grad_(False)

    def read(lm):
        mask = empty(1, 1, length, length, dtype=torch.bool)
        lm(inputs_embeds=empty(1, length, 1600, **half).requires_grad_(), attention_mask=mask, use_cache=False)

    def paint(unet):
        unet(empty(1, 4, 64, 64, **half), empty(1), empty(1, 77, 768, **half).requires_grad_())

    rows = {f"{name}, weights": 2 * sum(p.numel() for p in model.parameters()) for name, model in vars(models).items()}
    rows["trained: weights, gradients, AdamW"] = 16 * trained
    rows = {name: f"{size / 1e9:.2f}" for name, size in rows.items()}
    plain = [activations(read, models.lm), activations(paint, models.unet)]
    models.lm.train()
    models.lm.gradient_checkpointing_enable()
    models.unet.enable_gradient_checkpointing()
    few = [activations(read, models.lm), activations(paint, models.unet)]
    for name, before, after in zip(("lm, activations of a story", "unet, of a picture that trains"), plain, few):
        rows[name] = f"{before:.2f}; {after:.2f} with --gradient_checkpointing"
    print("\n| kept on the GPU | GB |\n|---|---|")
    for name, size in rows.items():
        print(f"| {name} | {size} |")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--story_tokens", type=int, default=256, help="tokens of a story")
    parser.add_argument("--achieved", type=float, default=400, help="TFLOP/s that a GPU achieves; an assumption")
    parser.add_argument("--network", type=float, default=50, help="GB/s into a GPU from others; an assumption")
    parser.add_argument("--picture", type=float, default=100, help="kB of a picture file; an assumption")
    arguments = parser.parse_args()
    models, config = true_models(), sgm.Config()
    length = 1 + sgm.NUM_SLOTS + arguments.story_tokens
    forward = {
        "language model": teraflops(models.lm, lambda lm: lm(inputs_embeds=empty(1, length, 1600))),
        "UNet": teraflops(models.unet, lambda unet: unet(empty(1, 4, 64, 64), empty(1), empty(1, 77, 768))),
        "autoencoder": teraflops(models.vae, lambda vae: vae.encode(empty(1, 3, 512, 512))),
        "text encoder": teraflops(models.text_encoder, lambda clip: clip(empty(1, 77, dtype=torch.long))),
    }
    # frozen weights: backward goes to the inputs alone, and costs a forward; every eighth story also has the constant
    text, encoders = 2 * forward["language model"] * (1 + 1 / 8), forward["autoencoder"] + forward["text encoder"]
    print(f"{machine()}\n\n| forward of one story | TFLOP | parameters, million |\n|---|---|---|")
    for name, model in zip(forward, (models.lm, models.unet, models.vae, models.text_encoder)):
        print(f"| {name} | {forward[name]:.2f} | {sum(p.numel() for p in model.parameters()) / 1e6:.0f} |")

    print("\n| a story's step, TFLOP | encoded each time | from the feature cache | ratio |\n|---|---|---|---|")
    for name, painter in (("picture scored", 1), ("picture trains the storyboard", 2)):
        cached = text + painter * forward["UNet"]
        print(f"| {name} | {cached + encoders:.2f} | {cached:.2f} | {1 + encoders / cached:.2f} |")
    step = text + 2 * forward["UNet"]

    moments, states = 2 * 4 * 64 * 64 * 2, 77 * 768 * 2  # fp16
    seconds = 1e12 / (arguments.achieved * 1e12)  # of a TFLOP
    head = "pictures | index of rows, each process | feature cache | encoding it, GPU hours | an epoch, GPU hours"
    print(f"\n| data | {head} |\n|---|---|---|---|---|---|")
    for name, rows in ROWS.items():
        sizes = (arguments.picture * 1e3 * rows, ROW_INDEX * rows, (moments + states) * rows)
        hours = [f"{rows * work * seconds / 3600:,.2f}" for work in (encoders, step)]
        print(f"| {name}, {rows:,} | {' | '.join([*map(readable, sizes), *hours])} |")

    rows = torch.randn(50257, 1600)
    lm = SimpleNamespace(context=1024, embed=SimpleNamespace(weight=rows))
    trained = sum(p.numel() for p in sgm.StoryModel(config, lm, None).parameters())
    statistics = config.num_codes * (1 + config.code_dim) * 4
    compute = config.train_batch_size * step * seconds
    exchanged = f"{readable(4 * trained)} of gradients and {readable(statistics)} of codebook a step"
    print(f"\n{trained:,} trained parameters: {exchanged}")
    print("\n| GPUs | stories a step | computing, ms | all-reduce, ms | share of it that is the codebook |")
    print("|---|---|---|---|---|")
    for gpus in GPUS:
        sent = 2 * (gpus - 1) / gpus * (4 * trained + statistics)  # ring: each byte is sent and received twice
        cells = (f"{1e3 * compute:.0f}", f"{1e3 * sent / (arguments.network * 1e9):.1f}")
        share = statistics / (4 * trained + statistics)
        print(f"| {gpus:,} | {gpus * config.train_batch_size:,} | {' | '.join(cells)} | {share:.0%} |")
    memory_table(models, length, trained)


def readable(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"
        size /= 1000
    return ""


if __name__ == "__main__":
    main()
