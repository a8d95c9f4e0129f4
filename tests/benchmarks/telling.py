"""Telling a story: sampling against transformers' own `generate` on the same model and inputs, without guidance and
penalties on both sides; and the share of a story's time that drawing and weighing 32 storyboards takes.

    python tests/benchmarks/telling.py
"""

import dataclasses

import torch
from timing import machine, medians

import story_generative_model as sgm

LINE = "Build a Disney park on the moon"
TOKENS = 96
NEVER = -1  # no token: a story of any length


@torch.no_grad()
def main() -> None:
    sgm.quiet_libraries()
    checkpoint = sgm.load_checkpoint(str(sgm.EMBEDDED["storyteller"]))
    config = dataclasses.replace(checkpoint["config"], num_storyboards=32)
    model = sgm.load_model(checkpoint, config, *sgm.pick_device(), paints=False)
    lm = model.lm
    draw = medians(
        {
            "storyboards": lambda: sgm.draw_storyboard(model, LINE, [], config, 0),
            "with the story": lambda: sgm.write_stories(model, config, [LINE], [0], [[]]),
        },
        runs=3,
        warm_up=1,
    )
    codes = sgm.draw_storyboard(model, LINE, [], config, 0)[None]
    soft, line = model.prompt_embeds(codes), sgm.opening(LINE)
    tokens = torch.tensor([sgm.token_ids(lm.tokenizer, line)], device=lm.device)
    inputs = lm.build_inputs(soft, tokens)
    lm.stops = [NEVER]
    plain = dataclasses.replace(
        config,
        lm_guidance_scale=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=TOKENS,
    )

    def theirs():
        lm.model.generate(
            inputs_embeds=inputs,
            attention_mask=torch.ones(inputs.shape[:2], dtype=torch.int64, device=lm.device),
            do_sample=True,
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=TOKENS,
            eos_token_id=NEVER,
            pad_token_id=lm.eos,
        )

    told = medians({"ours": lambda: lm.generate_text(soft, [line], plain, [0]), "theirs": theirs})
    print(f"{machine()}\n{config.lm_model} in {lm.model.dtype}\n")
    print("| what | ours, s | against | s | ratio |\n|---|---|---|---|---|")
    lines = [
        (f"{TOKENS} tokens", told["ours"], "transformers", told["theirs"]),
        ("32 storyboards", draw["storyboards"], "these and the story", draw["with the story"]),
    ]
    for what, ours, other, seconds in lines:
        print(f"| {what} | {ours:.2f} | {other} | {seconds:.2f} | {ours / seconds:.2f} |")


if __name__ == "__main__":
    main()
