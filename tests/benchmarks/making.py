"""A story and its picture against the plain libraries with the same weights: `model.generate` and
`StableDiffusionPipeline`; and eight panels against eight times one.

    python tests/benchmarks/making.py

The first two lines do the very same: as many tokens, as many steps, the same guidance, ours once with one storyboard
and once with the 32 of which the prompt picks one. Then come the pipeline's own defaults. Prints the time of ours over
theirs.
"""

import dataclasses

import torch
from timing import machine, medians

import story_generative_model as sgm

PROMPT = "A shy blue owl looks for a lost star"


def main() -> None:
    sgm.quiet_libraries()
    checkpoint = sgm.load_checkpoint(str(sgm.EMBEDDED["storyworld"]))
    model = sgm.load_model(checkpoint, checkpoint["config"], *sgm.pick_device())
    one = checkpoint["config"]
    bare, eight = dataclasses.replace(one, num_storyboards=1), dataclasses.replace(one, panels=8)
    (story,) = (made.story for made in sgm.illustrate(model, one, [PROMPT], [0]))
    tokenizer, pipeline = model.lm.tokenizer, model.diffusion.pipeline
    prompt = tokenizer(PROMPT, return_tensors="pt")
    tokens = len(tokenizer(story)["input_ids"]) - prompt["input_ids"].shape[1]
    same = dict(num_inference_steps=one.num_inference_steps, guidance_scale=one.guidance_scale)

    def write_plainly():
        model.lm.model.generate(
            **prompt,
            do_sample=True,
            top_p=one.top_p,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=model.lm.eos,
        )

    def plainly(count: int = 1, **settings):
        with torch.no_grad():
            write_plainly()
            pipeline([story] * count, **settings)

    seconds = medians(
        {
            "ours, one storyboard": lambda: sgm.illustrate(model, bare, [PROMPT], [0]),
            "ours": lambda: sgm.illustrate(model, one, [PROMPT], [0]),
            "plain": lambda: plainly(**same),
            "plain, eight": lambda: plainly(8, **same),
            "plain, its defaults": plainly,
            "ours, eight": lambda: sgm.illustrate(model, eight, [PROMPT], [0]),
        }
    )
    print(f"{machine()}\n{tokens} new tokens, {one.num_inference_steps} steps\n")
    print("| what | ours, s | against | s | ratio |\n|---|---|---|---|---|")
    lines = [
        ("story and picture, one storyboard", "ours, one storyboard", "plain", 1),
        (f"story and picture, {one.num_storyboards} storyboards", "ours", "plain", 1),
        ("story and eight panels", "ours, eight", "plain, eight", 1),
        ("story and picture", "ours", "plain, its defaults", 1),
        ("story and eight panels", "ours, eight", "ours", 8),
    ]
    for what, ours, other, times in lines:
        against = f"{times} x {other}" if times > 1 else other
        first, second = seconds[ours], times * seconds[other]
        print(f"| {what} | {first:.2f} | {against} | {second:.2f} | {first / second:.2f} |")


if __name__ == "__main__":
    main()
