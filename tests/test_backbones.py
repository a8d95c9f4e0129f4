"""Backbones: the frozen models give the losses that they give alone, and stay as they were."""

import dataclasses

import pytest
import torch
from conftest import CPU, make_diffusion, make_stories
from diffusers import DDIMScheduler
from transformers import AutoModelForCausalLM

import story_generative_model as sgm

STORIES = ["The fox.", *make_stories(3, seed=3)]


def tokenized(lm, stories):
    items = [dict(index=0, tokens=lm.tokenizer(story)["input_ids"], cut=False) for story in stories]
    batch = sgm.collate(
        items, max(len(item["tokens"]) for item in items)
    )  # a story alone is not padded
    return batch["tokens"], batch["mask"], batch["cut"]


def no_soft(stories, lm):
    return torch.zeros(len(stories), 0, lm.width)


# Language model


def test_without_soft_tokens_the_loss_is_the_plain_model_s(lm, lm_folder):
    plain = AutoModelForCausalLM.from_pretrained(lm_folder).eval()
    nll = lm.nll(no_soft(STORIES, lm), *tokenized(lm, STORIES))
    for number, story in enumerate(STORIES):
        ids = torch.tensor([[lm.bos, *lm.tokenizer(story)["input_ids"], lm.eos]])
        mean = plain(input_ids=ids, labels=ids).loss  # over all tokens but the first
        torch.testing.assert_close(nll[number], mean * (ids.shape[1] - 1))


def test_padding_does_not_change_a_story_s_loss(lm):
    soft = 0.1 * torch.randn(len(STORIES), 8, lm.width, generator=torch.Generator().manual_seed(0))
    together = lm.nll(soft, *tokenized(lm, STORIES))
    for number, story in enumerate(STORIES):
        torch.testing.assert_close(
            lm.nll(soft[number : number + 1], *tokenized(lm, [story])), together[[number]]
        )


def test_a_cut_story_is_not_charged_for_an_end(lm):
    tokens, mask, cut = tokenized(lm, STORIES)
    soft = no_soft(STORIES, lm)
    whole, open_ended = lm.nll(soft, tokens, mask, cut), lm.nll(soft, tokens, mask, ~cut)
    for number, story in enumerate(STORIES):
        ids = torch.tensor([[lm.bos, *lm.tokenizer(story)["input_ids"]]])
        end = -lm.model(input_ids=ids).logits[0, -1].log_softmax(-1)[lm.eos]
        torch.testing.assert_close(whole[number] - open_ended[number], end, atol=1e-4, rtol=1e-4)


def test_the_soft_prompt_stands_between_the_start_token_and_the_story(lm):
    """Soft tokens that are the embeddings of words are charged as those words would be as
    context."""
    words, story = lm.tokenizer(" red fox")["input_ids"], lm.tokenizer(STORIES[1])["input_ids"]
    soft = lm.embed(torch.tensor([words]))
    nll = lm.nll(soft, *tokenized(lm, STORIES[1:2]))
    ids = torch.tensor([[lm.bos, *words, *story, lm.eos]])
    log_probs = (
        lm.model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    )
    torch.testing.assert_close(nll[0], -log_probs[len(words) :].sum())


def test_the_gradient_reaches_the_soft_prompt_alone(lm):
    soft = torch.zeros(len(STORIES), 8, lm.width, requires_grad=True)
    lm.nll(soft, *tokenized(lm, STORIES)).sum().backward()
    assert (soft.grad.abs().amax(-1) > 0).all()
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_frozen_models_ask_for_no_gradient_and_stay_in_eval_mode(model):
    model.train()
    frozen = [
        model.lm.model,
        model.diffusion.vae,
        model.diffusion.unet,
        model.diffusion.text_encoder,
    ]
    for module in frozen:
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(part.training for part in module.modules())
    mine = {id(parameter) for parameter in model.parameters()}
    assert not mine & {id(parameter) for module in frozen for parameter in module.parameters()}


def test_gradient_checkpointing_recomputes_and_changes_nothing(lm, lm_folder):
    saving = sgm.LanguageModel(str(lm_folder), CPU, torch.float32, gradient_checkpointing=True)
    gradients, calls = [], []
    for model in (lm, saving):
        soft = 0.1 * torch.randn(
            len(STORIES), 8, lm.width, generator=torch.Generator().manual_seed(0)
        )
        soft.requires_grad_()
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        hook = model.model.transformer.h[0].ln_1.register_forward_hook(count)
        nll = model.nll(soft, *tokenized(lm, STORIES))
        gradients.append((nll, *torch.autograd.grad(nll.sum(), soft)))
        hook.remove()
    assert calls == [1, 2]
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not any(
        part.training for part in saving.model.modules() if isinstance(part, torch.nn.Dropout)
    )


def test_the_painter_s_activations_are_recomputed_too(diffusion, diffusion_folder):
    saving = sgm.LatentDiffusion(
        str(diffusion_folder), CPU, torch.float32, gradient_checkpointing=True
    )
    moments = torch.rand(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    gradients, calls = [], []
    for painter in (diffusion, saving):
        states, mask = painter.encode_texts(["a red fox", "the sea"])
        states.requires_grad_()
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        hook = painter.unet.up_blocks[-1].resnets[0].conv1.register_forward_hook(count)
        nll = painter.nll(moments, states, mask, torch.Generator().manual_seed(0))
        gradients.append((nll, *torch.autograd.grad(nll.sum(), states)))
        hook.remove()
    assert calls == [1, 2]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_writing_depends_on_its_seed_alone(lm, config):
    soft = torch.zeros(1, 8, lm.width)
    state = torch.get_rng_state()
    first = lm.generate_text(soft, ["The fox"], config, [1])
    assert lm.generate_text(soft, ["The fox"], config, [1]) == first and first[0].startswith(
        "The fox"
    )
    assert torch.equal(state, torch.get_rng_state())
    assert (
        len(set(lm.generate_text(soft.expand(4, -1, -1), ["The fox"] * 4, config, list(range(4)))))
        == 4
    )


def test_a_story_does_not_depend_on_those_that_are_written_beside_it(lm, config):
    """Prompts of many lengths in one batch, each with its own seed and soft prompt."""
    soft = torch.randn(3, 8, lm.width, generator=torch.Generator().manual_seed(0))
    prompts, seeds = ["The fox", "A small blue owl was sad in the forest. Then", "Key"], [5, 6, 5]
    together = lm.generate_text(soft, prompts, config, seeds)
    for row in range(3):
        assert lm.generate_text(soft[[row]], [prompts[row]], config, [seeds[row]]) == [
            together[row]
        ]


def test_guidance_weighs_a_line_against_no_line(lm, config):
    """Nearly greedy stories are those of the guided scores, computed here from two plain passes; at
    0 nothing of soft prompt or line is left; beside others a story is what it is alone."""
    greedy = dataclasses.replace(config, temperature=0.01, top_p=1.0, max_new_tokens=6)
    soft = torch.randn(2, 8, lm.width, generator=torch.Generator().manual_seed(0))
    lines = ["The fox", "A small blue owl was sad"]

    def tell(scale: float, rows: slice = slice(2)) -> list[str]:
        guided = dataclasses.replace(greedy, lm_guidance_scale=scale)
        return lm.generate_text(soft[rows], lines[rows], guided, [3, 4][rows])

    together = tell(1.7)
    assert [tell(1.7, slice(i, i + 1))[0] for i in range(2)] == together
    untold = [told[len(line) :] for told, line in zip(tell(0.0), lines)]
    assert untold[0] == untold[1] and tell(1.0) != together
    for row, line in enumerate(lines):
        ids, written = sgm.token_ids(lm.tokenizer, line), []
        for _ in range(6):
            passes = []
            for prefix, text in ((soft[[row]], ids), (soft[:1, :0], [])):
                tokens = torch.tensor([text + written], dtype=torch.int64)
                inputs = lm.build_inputs(prefix, tokens)
                passes.append(lm.model(inputs_embeds=inputs).logits[0, -1].log_softmax(-1))
            written.append(int(torch.lerp(passes[1], passes[0], 1.7).argmax()))
        assert together[row] == lm.join(line, ids, written)


def test_guidance_lifts_no_token_that_the_story_finds_unlikely():
    """Of four tokens the third has little of the story's probability and less without its line: by
    guidance alone it would win."""
    told = torch.tensor([[0.6, 0.389, 0.01, 0.001]]).log()
    untold = torch.tensor([[0.4, 0.5, 1e-7, 0.0999999]]).log()
    guide = sgm.ClassifierFreeGuidance(3.0, lambda ids, scores: scores)
    first, second = guide(torch.zeros(2, 0, dtype=torch.int64), torch.cat([told, untold]))
    assert torch.equal(first, second)
    guided = torch.lerp(untold, told, 3.0)[0]
    assert guided.argmax() == 2 and first.argmax() == 0
    assert first.tolist() == pytest.approx(
        [*guided[:2].tolist(), float(told[0, 2]), float(guided[3])]
    )


def test_a_keyword_gains_in_its_part_until_it_is_said():
    """33 tokens behind a prompt of 7: eight parts of five, of which the prompt takes up one and two
    tokens of a second. From the middle of what is written of a part a keyword gains all, the one of
    another part nothing, and a story ends in its last part, behind that part's keyword."""
    keywords = torch.zeros(1, 8, 20, dtype=torch.bool)
    keywords[0, torch.arange(8), torch.arange(10, 18)] = True
    keywords[0, 3, 19] = True  # two tokens say the word of the fourth part
    gains = sgm.KeywordShift(6.0, keywords, [[12] * 7], 33, [0])
    zeros = torch.zeros(1, 20)

    def gained(*written: int) -> dict:
        row = gains(torch.tensor([written], dtype=torch.int64), zeros)[0]
        return {place: float(row[place]) for place in row.nonzero()[:, 0].tolist() if place}

    def ends(written: int) -> bool:
        return bool(gains(torch.zeros(1, written, dtype=torch.int64), zeros)[0, 0] == 0)

    near = pytest.approx
    assert gained() == {11: near(4.0)} and gained(1) == gained(1, 1) == {11: 6.0}
    assert gained(11) == gained(1, 11) == {} and gained(12, 12) == {11: 6.0}
    assert gained(1, 1, 1) == {12: near(2.4)} and gained(1, 1, 12) == {12: near(2.4)}
    assert gained(1, 1, 1, 12) == {} and gained(*[1] * 6) == {12: 6.0}
    assert gained(*[1] * 8) == {13: near(2.4), 19: near(2.4)}
    assert gained(*[1] * 8, 19) == gained(*[1] * 8, 1, 13) == {}
    assert list(gained(*[1] * 32)) == [17]
    assert not any(ends(written) for written in range(33))
    keywords[0, 7] = False  # the last part has no keyword
    gains = sgm.KeywordShift(6.0, keywords, [[12] * 7], 33, [0])
    assert [ends(written) for written in range(33)] == [False] * 28 + [True] * 5
    gains = sgm.KeywordShift(6.0, torch.zeros_like(keywords), [[12] * 7], 33, [0])
    assert all(ends(written) for written in range(33))  # no keyword at all


def test_a_storyboard_s_words_stand_in_their_parts_of_a_story(lm, config, monkeypatch):
    """With a shift that outweighs all else every part has its word, whatever stands beside."""
    config = dataclasses.replace(config, keyword_shift=50.0, max_new_tokens=32)
    words = list(lm.word_tokens().values())[:16]
    keywords = torch.zeros(16, lm.embed.num_embeddings, dtype=torch.bool)
    for row, ids in zip(keywords, words, strict=True):
        row[ids] = True
    keywords, soft = keywords.view(2, 8, -1), torch.zeros(2, 8, lm.width)
    monkeypatch.setattr(lm, "join", lambda prompt, prompt_ids, ids: prompt_ids + ids)
    stories = lm.generate_text(soft, ["The", "A fox"], config, [1, 2], keywords)
    assert lm.generate_text(soft[1:], ["A fox"], config, [2], keywords[1:]) == stories[1:]
    for story, slots in zip(stories, keywords):
        members = sgm.chunk_membership(torch.ones(1, len(story), dtype=torch.bool))[0]  # (S, T)
        said = members.long() @ slots[:, story].T.long()  # (part, slot)
        assert said.diagonal().all()


def test_a_ban_on_repeated_n_grams_breaks_no_word(lm, config):
    """The token that would repeat a pair is banned if it begins a word, and not inside one."""
    config = dataclasses.replace(config, no_repeat_ngram_size=2, top_p=1.0)
    pieces = lm.tokenizer.convert_ids_to_tokens(range(lm.embed.num_embeddings))
    inside = lm.word_continuations()
    assert all(pieces[i].isalpha() for i in inside.nonzero()[:, 0].tolist()) and inside.any()
    begins = next(i for i, piece in enumerate(pieces) if piece[:1] in sgm.WORD_MARKS)
    goes_on = int(inside.nonzero()[0])
    banned = []
    for token in (begins, goes_on):
        scores = torch.zeros(1, len(pieces))
        for processor in sgm.logits_processors(config, [[0]], [0], inside)[:-1]:
            scores = processor(torch.tensor([[0, token, 0]]), scores)
        banned.append((scores == -torch.inf).nonzero()[:, 1].tolist())
    assert banned == [[begins], []]
    config = dataclasses.replace(config, max_new_tokens=5)
    assert lm.generate_text(torch.zeros(1, 8, lm.width), ["The fox"], config, [1])


def test_the_noise_is_a_sample_s_and_comes_back_with_its_words():
    """Over many seeds the largest is drawn as often as its probability says; the same two words at
    the same count meet the same noise, whatever stands before them."""
    scores = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    drawn = [
        sgm.KeyedGumbelNoise([[1]], [seed])(torch.tensor([[2]]), scores[None]).argmax().item()
        for seed in range(2000)
    ]
    shares = torch.bincount(torch.tensor(drawn)) / 2000
    torch.testing.assert_close(shares, scores.exp(), atol=0.04, rtol=0)
    one, other = sgm.KeyedGumbelNoise([[1, 2]], [7]), sgm.KeyedGumbelNoise([[0]], [7])
    here = one(torch.tensor([[0, 1, 2]]), scores[None])
    assert torch.equal(here, other(torch.tensor([[2, 0, 0, 1, 2]]), scores[None]))
    assert not torch.equal(
        here, one(torch.tensor([[0, 1, 2, 1, 2]]), scores[None])
    )  # the second time they stand there


def test_a_prompt_that_leaves_no_room_is_refused(lm, config):
    with pytest.raises(sgm.StoryError, match="64") as error:
        lm.generate_text(torch.zeros(1, 8, lm.width), ["fox " * 100], config, [0])
    assert error.value.code == 2


@pytest.mark.parametrize(
    "story, kept",
    [
        ("A fox. It ran. It", "A fox. It ran."), ("A fox. It", "A fox. It"), ('He said "go." Then', 'He said "go."'),
        ("A fox. Cost 3.5 coins", "A fox. Cost 3.5 coins"), ("A fox. Why? No! ", "A fox. Why? No!"),
    ],
)  # fmt: skip
def test_a_story_that_ran_out_of_tokens_ends_at_a_sentence_behind_the_prompt(story, kept):
    assert sgm.trim_to_last_sentence(story, "A fox.") == kept


def test_a_model_that_cannot_be_loaded_says_what_to_do(tmp_path):
    with pytest.raises(sgm.StoryError, match=r"--lm_model .*storyworld"):
        sgm.LanguageModel(str(tmp_path), CPU, torch.float32)
    with pytest.raises(sgm.StoryError, match=r"--diffusion_model .*storyworld"):
        sgm.LatentDiffusion(str(tmp_path), CPU, torch.float32)


# Latent diffusion


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def either_diffusion(request, tmp_path_factory):
    folder = make_diffusion(tmp_path_factory.mktemp("either"), request.param)
    return sgm.LatentDiffusion(str(folder), CPU, torch.float32)


@torch.no_grad()
def test_the_error_is_that_of_the_noise_whatever_the_model_predicts(either_diffusion):
    """By another way: the sampler's own estimate of the clean latents gives the noise that the
    model believes in."""
    diffusion = either_diffusion
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    states, mask = diffusion.encode_texts(["a fox"] * 4)
    moments = torch.stack([latents, torch.zeros_like(latents)], 1)
    nll = diffusion.nll(moments, states, mask, torch.Generator().manual_seed(0))
    noisy, timesteps, noise = diffusion.add_noise(moments, torch.Generator().manual_seed(0))
    scheduler = DDIMScheduler.from_config(diffusion.pipeline.scheduler.config)
    scheduler.set_timesteps(1000)
    for row, t in enumerate(timesteps):
        alpha_bar = scheduler.alphas_cumprod[t]
        expected = alpha_bar.sqrt() * latents[row] + (1 - alpha_bar).sqrt() * noise[row]
        torch.testing.assert_close(noisy[row], expected)
        output = diffusion.unet(noisy[[row]], t, states[[row]]).sample
        clean = scheduler.step(output, t, noisy[[row]]).pred_original_sample[0]
        believed = (noisy[row] - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
        torch.testing.assert_close(
            nll[row], (believed - noise[row]).square().mean(), atol=1e-3, rtol=1e-3
        )


def test_another_prediction_type_is_refused(tmp_path):
    with pytest.raises(sgm.StoryError, match="'sample'"):
        sgm.LatentDiffusion(str(make_diffusion(tmp_path / "sample", "sample")), CPU, torch.float32)


@torch.no_grad()
def test_moments_are_the_scaled_posterior_s_and_latents_are_drawn_from_it(diffusion):
    pixels = torch.rand(3, 3, 32, 32) * 2 - 1
    posterior = diffusion.vae.encode(pixels).latent_dist
    moments = diffusion.encode_images(pixels)
    torch.testing.assert_close(moments, 0.7 * torch.stack([posterior.mean, posterior.std], 1))
    assert diffusion.resolution == 32
    sharp = moments * torch.tensor([1.0, 0.0])[:, None, None, None]
    (drawn, timesteps, _), (mean, _, _) = (
        diffusion.add_noise(some, torch.Generator().manual_seed(0)) for some in (moments, sharp)
    )
    share = diffusion.noise_schedule.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
    off = (drawn - mean) / share / moments[:, 1]  # in the posterior's own standard deviations
    assert abs(off.mean()) < 0.1 and abs(off.std() - 1) < 0.1


@torch.no_grad()
def test_a_long_text_is_read_in_windows(diffusion):
    short, long = "a fox", "b" * 40  # 4 and 40 tokens; a window holds 18 and two ends
    states, mask = diffusion.encode_texts([short, long, ""])
    assert states.shape == (3, 60, 16) and mask.sum(1).tolist() == [20, 60, 20]
    assert (mask.int().diff(dim=1) <= 0).all()  # the masked windows stand at the end
    for row, text in enumerate([short, long, ""]):
        alone, own_mask = diffusion.encode_texts([text])
        assert own_mask.all()
        torch.testing.assert_close(states[row][mask[row]], alone[0])
    reference = diffusion.pipeline.encode_prompt(short, CPU, 1, False)[0]
    torch.testing.assert_close(states[0, :20], reference[0])
    assert not torch.allclose(states[1, 20:40], states[1, 40:])  # the last window is not full


@torch.no_grad()
def test_masked_windows_do_not_change_the_shorter_text(diffusion):
    moments = torch.rand(2, 2, 4, 16, 16)
    with_long = diffusion.nll(
        moments, *diffusion.encode_texts(["a fox", "b" * 40]), torch.Generator().manual_seed(0)
    )
    alone = diffusion.nll(
        moments, *diffusion.encode_texts(["a fox", "a fox"]), torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(with_long[0], alone[0])
    assert not torch.allclose(with_long[1], alone[1], rtol=1e-6, atol=0)


def test_timesteps_are_stratified(diffusion):
    moments = torch.zeros(10, 2, 4, 16, 16)
    draws = [
        diffusion.add_noise(moments, torch.Generator().manual_seed(seed))[1] for seed in range(20)
    ]
    assert all(sorted((timesteps // 100).tolist()) == list(range(10)) for timesteps in draws)
    assert len({tuple(timesteps.tolist()) for timesteps in draws}) == 20
    assert any(timesteps.tolist() != sorted(timesteps.tolist()) for timesteps in draws)


def test_a_picture_is_a_function_of_text_and_seed(diffusion, config):
    def sample_images(*asked: tuple[str, int]) -> list[bytes]:
        texts, seeds = zip(*asked)
        pictures = diffusion.sample_images(
            *diffusion.encode_texts(list(texts)), config, list(seeds)
        )
        assert all(picture.size == (32, 32) and picture.mode == "RGB" for picture in pictures)
        return [picture.tobytes() for picture in pictures]

    first = sample_images(("a fox", 0))
    assert first == sample_images(("a fox", 0))
    assert first != sample_images(("a fox", 1)) and first != sample_images(("b" * 40, 0))
    together = sample_images(
        ("b" * 40, 2), ("a fox", 0), ("a fox", 1)
    )  # in two groups, and back in their order
    for picture, alone in zip(
        together, (sample_images(("b" * 40, 2)), first, sample_images(("a fox", 1)))
    ):
        difference = torch.frombuffer(bytearray(picture), dtype=torch.uint8).int()
        difference -= torch.frombuffer(bytearray(alone[0]), dtype=torch.uint8).int()
        assert difference.abs().max() <= 1  # a batch rounds its sums in another order
