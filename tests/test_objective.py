"""Objective: what moves, what stays, what each loss is, and that the storyboard is listened to."""

import dataclasses

import pytest
import torch
from conftest import make_stories

import story_generative_model as sgm


def frozen_tensors(model) -> dict[str, torch.Tensor]:
    modules = dict(
        lm=model.lm.model,
        vae=model.diffusion.vae,
        unet=model.diffusion.unet,
        text=model.diffusion.text_encoder,
    )
    return {
        f"{name}.{key}": t.clone()
        for name, part in modules.items()
        for key, t in part.state_dict().items()
    }


def trained_tensors(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def take_steps(model, batch, count: int, **changes):
    optimizer = sgm.make_optimizer(model, dataclasses.replace(model.config, **changes))
    model.train()
    for step in range(count):
        optimizer.zero_grad()
        model(batch, torch.Generator().manual_seed(step)).total.backward()
        optimizer.step()


def test_every_trained_tensor_moves_and_every_frozen_one_is_bit_equal(model, batch):
    """Two steps, without weight decay, since the prior's output layer starts at zero and moves
    first."""
    trained, frozen = trained_tensors(model), frozen_tensors(model)
    take_steps(model, batch, 2, adam_weight_decay=0.0)
    still = [
        name
        for name, before in trained.items()
        if torch.equal(before, dict(model.named_parameters())[name])
    ]
    assert not still
    assert all(torch.equal(before, frozen_tensors(model)[name]) for name, before in frozen.items())


def test_before_the_codebook_starts_the_prior_and_the_codebook_wait(config, lm, diffusion, batch):
    model = sgm.StoryModel(config, lm, diffusion).train()
    losses = model(batch, torch.Generator().manual_seed(0))
    losses.total.backward()
    assert not model.encoder.quantizer.codebook.any() and not model.encoder.quantizer.updates
    assert not any(
        parameter.grad is not None and parameter.grad.any()
        for parameter in model.prior.parameters()
    )
    assert losses.commitment == 0 and model.encoder.to_code.weight.grad.any()


def test_the_codebook_steps_once_on_all_batches_seen_in_train_mode(model, batch):
    quantizer = model.encoder.quantizer
    before = int(quantizer.updates)
    model(batch, torch.Generator().manual_seed(0))
    model.encoder.step_codebook()
    assert int(quantizer.updates) == before
    model.train()
    for _ in range(2):
        model(batch, torch.Generator().manual_seed(0))
    counts = quantizer.counts.clone()
    model.encoder.step_codebook()
    assert int(quantizer.updates) == before + 1
    total = torch.lerp(counts.sum(), 2.0 * batch["mask"].sum(), 1 - quantizer.decay)
    torch.testing.assert_close(quantizer.counts.sum(), total)


@torch.no_grad()
def test_the_losses_have_their_stated_units(model, batch):
    losses = model(batch, torch.Generator().manual_seed(0))
    tokens, mask, cut = batch["tokens"], batch["mask"], batch["cut"]
    board = model.encode(tokens, mask)
    soft = model.soft_prompt(board.vectors)
    text = [model.lm.nll(soft[[i]], tokens[[i]], mask[[i]], cut[[i]]) for i in range(4)]
    torch.testing.assert_close(losses.text_nll, torch.cat(text).mean())
    log_probs = model.prior(board.codes).log_softmax(-1).gather(-1, board.codes[..., None])
    torch.testing.assert_close(losses.latent_nll, -log_probs.sum() / 4)
    constant = model.lm.nll(model.soft_prompt.constant_prompt(1), tokens[:1], mask[:1], cut[:1])
    torch.testing.assert_close(losses.constant_nll, constant[0])
    moments = model.diffusion.encode_images(torch.stack(batch["panels"]["pixels"]))
    states = model.diffusion.encode_texts(batch["panels"]["text"])
    errors = model.diffusion.nll(moments, *states, torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses.diffusion_nll, errors.mean())
    torch.testing.assert_close(losses.vote_share, board.share.mean())


@pytest.mark.parametrize(
    "weights", [(0.0, 0.0, 0.0), (2.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 4.0)]
)
@torch.no_grad()
def test_the_total_is_the_weighted_sum_per_token(model, batch, weights):
    beta, commitment, diffusion = weights
    model.config = dataclasses.replace(
        model.config, beta_kl=beta, commitment_weight=commitment, diffusion_weight=diffusion
    )
    losses = model(batch, torch.Generator().manual_seed(0))
    bound = losses.text_nll + losses.constant_nll + beta * losses.latent_nll
    expected = (
        bound / (batch["mask"].sum() / 4)
        + commitment * losses.commitment
        + diffusion * losses.diffusion_nll
    )
    torch.testing.assert_close(losses.total, expected)


def test_the_diffusion_term_is_a_monitor_and_may_be_absent(model, batch):
    losses = model(batch, torch.Generator().manual_seed(0))
    assert losses.diffusion_nll > 0 and not losses.diffusion_nll.requires_grad
    without = model(batch | dict(painted=[], panels={}), torch.Generator().manual_seed(0))
    assert without.diffusion_nll.isnan() and without.total.isfinite()
    torch.testing.assert_close(
        losses.total - without.total, model.config.diffusion_weight * losses.diffusion_nll
    )


@torch.no_grad()
def test_padding_changes_no_loss(model, batch):
    first = {key: value[:1] for key, value in batch.items() if key != "panels"}
    first["panels"] = {key: value[:1] for key, value in batch["panels"].items()}
    length = int(first["mask"].sum())
    narrow = first | dict(tokens=first["tokens"][:, :length], mask=first["mask"][:, :length])
    wide = first | dict(tokens=first["tokens"].masked_fill(~first["mask"], 7))
    assert wide["tokens"].shape[1] > length
    torch.testing.assert_close(
        tuple(model(wide, torch.Generator().manual_seed(0))),
        tuple(model(narrow, torch.Generator().manual_seed(0))),
    )


# The soft prompt and the storyboard


@pytest.mark.parametrize("per_slot", [1, 2])
@torch.no_grad()
def test_a_code_changes_the_soft_tokens_of_its_slot_alone(make_config, lm, diffusion, per_slot):
    model = sgm.StoryModel(make_config(soft_tokens_per_slot=per_slot), lm, diffusion)
    model.encoder.quantizer.codebook.normal_()
    codes = torch.zeros(8, 8, dtype=torch.int64)
    changed = codes + torch.eye(8, dtype=torch.int64)  # row j changes slot j
    moved = (model.prompt_embeds(codes) != model.prompt_embeds(changed)).any(-1)  # (8, P)
    assert torch.equal(moved, torch.eye(8, dtype=torch.bool).repeat_interleave(per_slot, 1))
    tokens = model.prompt_embeds(codes)[0, ::per_slot]
    assert len(tokens.unique(dim=0)) == 8  # the map knows the slot


@torch.no_grad()
def test_soft_tokens_have_the_scale_of_the_model_s_own_rows(model, make_config, lm, data_folder):
    whole = sgm.StoryModel(
        make_config(code_dim=16), lm, None
    )  # as many directions as the embedding has
    tokens, mask, _ = whole.tokenize(
        [row.story for row in sgm.read_rows(str(data_folder), "train", 4)]
    )
    soft = whole.soft_prompt(whole.encode(tokens, mask).vectors)
    assert (
        0.2 < soft.std().item() / model.lm.embed.weight.std().item() < 1.2
    )  # chunks are means of words


def test_the_storyboard_adds_to_the_constant_soft_prompt_and_does_not_train_it(model, batch):
    vectors = torch.randn(2, sgm.NUM_SLOTS, model.config.code_dim)
    before, constant = model.soft_prompt(vectors), model.soft_prompt.constant_prompt(2).clone()
    with torch.no_grad():
        model.soft_prompt.constant += torch.randn_like(model.soft_prompt.constant)
    moved = model.soft_prompt.constant_prompt(2) - constant
    assert (
        torch.allclose(model.soft_prompt(vectors) - before, moved, atol=1e-4)
        and moved.abs().min() > 0
    )
    model.train()
    model(batch, torch.Generator().manual_seed(0)).text_nll.backward()
    assert not model.soft_prompt.constant.grad.any()


@torch.no_grad()
def test_a_code_changes_the_story_that_the_same_seed_writes():
    """The embedded storyboard: a language model that was never trained hears nothing."""
    checkpoint = sgm.load_checkpoint(sgm.EMBEDDED["storyworld"])
    device, config = (
        torch.device("cpu"),
        dataclasses.replace(checkpoint["config"], max_new_tokens=120),
    )
    model = sgm.load_model(checkpoint, config, device, torch.float32, paints=False)
    codes = model.prior.sample(1, torch.Generator().manual_seed(0)).repeat(4, 1)
    codes[:, 4] = (
        model.prior(codes[:1])[0, 4].topk(4).indices
    )  # what may well stand in the fifth slot
    stories = model.lm.generate_text(
        model.prompt_embeds(codes[[0, 1, 2, 3, 0]]), ["The red fox."] * 5, config, [0] * 5
    )
    assert len(set(stories)) > 1 and stories[0] == stories[4]


def test_the_text_loss_teaches_the_encoder(model, batch):
    model.train()
    take_steps(model, batch, 1)
    model.zero_grad()
    model(batch, torch.Generator().manual_seed(0)).text_nll.backward()
    encoder = {
        name for name, p in model.encoder.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert encoder == {name for name, _ in model.encoder.named_parameters()}
    assert not any(p.grad is not None and p.grad.any() for p in model.prior.parameters())


def test_a_story_that_does_not_fit_is_cut_and_an_empty_one_refused(model):
    tokens, mask, cut = model.tokenize([*make_stories(1), "fox " * 100])
    assert model.max_tokens == 64 - 8 - 1 == tokens.shape[1] == mask[1].sum() and cut.tolist() == [
        False,
        True,
    ]
    with pytest.raises(sgm.StoryError):
        model.tokenize(["A fox.", ""])
