"""Storyboard encoder: chunks, votes, padding, and the gradient that goes straight through."""

from fractions import Fraction
from math import floor

import pytest
import torch
from conftest import make_stories

import story_generative_model as sgm


def members_by_loop(n: int, length: int) -> list[list[bool]]:
    """Slot j covers tokens floor(j n / 8) to floor((j + 1) n / 8), one at the least."""
    rows = []
    for slot in range(8):
        first, last = floor(Fraction(slot * n, 8)), floor(Fraction((slot + 1) * n, 8))
        rows.append([first <= place < max(last, first + 1) for place in range(length)])
    return rows


def test_chunks_follow_the_definition_for_every_length():
    length = 40
    mask = (
        torch.arange(length) < torch.arange(1, length + 1)[:, None]
    )  # (40, 40): one story of each length
    members = sgm.chunk_membership(mask)
    for n in range(1, length + 1):
        assert members[n - 1].tolist() == members_by_loop(n, length), n
    assert members.any(-1).all()  # no slot is empty, also below 8 tokens
    assert not (members & ~mask[:, None]).any()
    cover = members.sum(1)
    assert (
        torch.equal(cover > 0, mask) and (cover[7:] <= 1).all()
    )  # from 8 tokens on, each token has one slot


def vote(codes: list[int], num_codes: int = 8):
    """The votes of one story whose slots all see all its tokens."""
    members = torch.ones(1, 8, len(codes), dtype=torch.bool)
    winners, share = sgm.majority_vote(torch.tensor([codes]), members, num_codes)
    return winners[0, 0].item(), share[0, 0].item()


def test_the_majority_wins_and_a_tie_goes_to_the_smaller_code():
    assert vote([7, 3, 7]) == (7, pytest.approx(2 / 3))
    assert vote([7, 3, 3, 7, 5]) == (3, pytest.approx(2 / 5))
    assert vote([6, 1]) == (1, 0.5)
    assert vote([0]) == (0, 1.0)


def test_padding_never_votes():
    mask = torch.arange(30) < torch.tensor([[9], [30]])
    members = sgm.chunk_membership(mask)
    nearest = torch.randint(8, (2, 30), generator=torch.Generator().manual_seed(0))
    codes, share = sgm.majority_vote(nearest, members, 8)
    poisoned = nearest.masked_fill(~mask, 5)
    again, share_again = sgm.majority_vote(poisoned, members, 8)
    assert torch.equal(codes, again) and torch.equal(share, share_again)
    alone = sgm.majority_vote(nearest[:1, :9], sgm.chunk_membership(mask[:1, :9]), 8)
    assert torch.equal(codes[:1], alone[0])


# The start


def test_at_the_start_the_layers_pass_their_input_on_and_the_soft_prompt_leads_back(
    make_config, lm
):
    """With as many directions as the embedding has, the way there and back is the identity."""
    config, rows = make_config(code_dim=16), lm.embed.weight
    whole = sgm.StoryModel(config, lm, None)
    encoder, soft_prompt = whole.encoder, whole.soft_prompt
    tokens, mask = torch.arange(5, 25)[None], torch.ones(1, 20, dtype=torch.bool)
    own, salience = encoder.outputs(tokens, rows[tokens], mask, torch.zeros_like(tokens))
    torch.testing.assert_close(
        soft_prompt.linear(own) * soft_prompt.embed_std, rows[tokens], atol=1e-5, rtol=1e-4
    )
    assert (
        not salience.any()
    )  # before the stories are counted every word is as salient as every other


def test_salience_is_what_a_story_is_about(model):
    """Stories of 16 words, two a slot. Word 5 is everywhere; 6 and 7 are in every tenth story, 7
    twice; 8 stands in the second chunk alone, 9 in any."""
    stories = []
    for number in range(100):
        story = [5] * 16
        if number % 10 == 0:
            story[0], story[1], story[12] = 6, 7, 7
        if number % 5 == 1:
            story[3] = 8
        if number % 5 == 2:
            story[number // 5 % 16] = 9
        stories.append(story)
    model.encoder.init_salience(stories)
    salience = model.encoder.word_salience.weight  # (V, S)
    assert (
        salience[[6, 7, 8], [0, 0, 1]] > salience[5].max()
    ).all()  # what every story has tells nothing
    assert salience[7, 0] > salience[6, 0]  # what comes back is what a story is about
    assert (
        salience[8, 1] > salience[9].max() and salience[8, 1] > salience[8, 2]
    )  # what belongs to a slot is salient there
    members, own = sgm.chunk_membership(torch.ones(1, 16, dtype=torch.bool)), torch.eye(16)[None]
    model.encoder.token_residual.data.zero_()
    outputs = model.encoder.pool(own, salience[torch.tensor(stories[0])][None], members)
    assert (
        outputs[0, 0].argmax() == 1 and outputs[0, 0, 1] > 0.9
    )  # the chunk's vector is its most salient word's
    torch.testing.assert_close(outputs[0, 0], outputs[0, 1])


def test_chunk_vectors_start_with_mean_zero_and_the_spread_of_words(config, lm):
    torch.manual_seed(0)
    model = sgm.StoryModel(config, lm, None)
    stories = make_stories(40)
    model.init_encoder(stories)
    vectors = model.chunk_vectors(stories)
    assert vectors.shape == (40 * 8, 4) and abs(vectors.square().mean() - 1) < 1e-4
    torch.testing.assert_close(vectors.mean(0), torch.zeros(4), atol=1e-4, rtol=0)


# The whole encoder


def test_a_padded_story_has_the_storyboard_it_has_alone(model):
    stories = ["The fox.", *make_stories(5, seed=3), "a " * 50]
    tokens, mask, _ = model.tokenize(stories)
    together = model.encode(tokens, mask)
    assert len(together.codes.unique()) > 1
    for number, story in enumerate(stories):
        alone = model.encode(*model.tokenize([story])[:2])
        assert torch.equal(alone.codes[0], together.codes[number])
        torch.testing.assert_close(alone.vectors[0], together.vectors[number], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.share[0], together.share[number])


def test_padding_never_enters_the_codebook(model):
    tokens, mask, _ = model.tokenize(["The fox.", *make_stories(3, seed=3)])
    model.encode(tokens, mask, learn=True)
    ((seen, _),) = model.encoder.pending
    assert len(seen) == mask.sum() < mask.numel() and not seen.requires_grad
    embeds = model.lm.embed(tokens)
    clean = model.encode(tokens, mask)
    dirty = model.encoder(tokens, embeds.masked_fill(~mask[..., None], 50.0), mask)
    assert torch.equal(clean.codes, dirty.codes)
    torch.testing.assert_close(clean.commitment, dirty.commitment)


def test_the_codebook_learns_only_when_asked(model):
    tokens, mask, _ = model.tokenize(make_stories(4))
    before = model.encoder.quantizer.codebook.clone()
    model.encode(tokens, mask)
    model.encoder.step_codebook()
    assert torch.equal(before, model.encoder.quantizer.codebook)
    model.encode(tokens, mask, learn=True)
    assert torch.equal(
        before, model.encoder.quantizer.codebook
    )  # not before the step is known to be good
    model.encoder.step_codebook()
    assert not torch.equal(before, model.encoder.quantizer.codebook) and not model.encoder.pending


def test_before_the_start_the_vectors_are_the_chunks_means(config, lm):
    encoder = sgm.StoryboardEncoder(config, lm.embed.weight, 55)
    mask = torch.arange(20) < torch.tensor([[5], [20]])
    members, outputs = sgm.chunk_membership(mask), torch.randn(2, 20, 4)
    board = encoder.unquantized(outputs, members)
    for story in range(2):
        for slot in range(8):
            torch.testing.assert_close(
                board.vectors[story, slot], outputs[story, members[story, slot]].mean(0)
            )
    assert board.commitment == 0


@pytest.fixture()
def quantized(config, lm):
    """Outputs of stories of 5, 20 and 33 tokens, their storyboard, and what it was made with."""
    generator = torch.Generator().manual_seed(0)
    encoder = sgm.StoryboardEncoder(config, lm.embed.weight, 55)
    encoder.quantizer.codebook.normal_(generator=generator)
    encoder.quantizer.updates.fill_(1)
    mask = torch.arange(33) < torch.tensor([[5], [20], [33]])
    outputs = torch.randn(3, 33, 4, generator=generator).requires_grad_()
    members = sgm.chunk_membership(mask)
    return (
        encoder.quantizer,
        outputs,
        mask,
        members,
        encoder.quantize(outputs, mask, members, None, learn=False),
    )


def test_forward_is_exactly_the_winning_code_s_vector(quantized):
    quantizer, _, _, _, board = quantized
    assert torch.equal(board.vectors, quantizer.codebook[board.codes])


def test_backward_goes_straight_to_the_mean_of_the_winning_voters(quantized):
    quantizer, outputs, _, members, board = quantized
    upstream = torch.randn(board.vectors.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(board.vectors, outputs, upstream)
    nearest = torch.cdist(outputs, quantizer.codebook).argmin(-1)
    expected = torch.zeros_like(outputs)
    for story in range(3):
        for slot in range(8):
            places = members[story, slot].nonzero().flatten().tolist()
            votes = [nearest[story, place].item() for place in places]
            winner = min(set(votes), key=lambda code: (-votes.count(code), code))
            voters = [place for place, code in zip(places, votes) if code == winner]
            assert board.codes[story, slot] == winner
            assert board.share[story, slot] == pytest.approx(len(voters) / len(places))
            for place in voters:
                expected[story, place] += upstream[story, slot] / len(voters)
    torch.testing.assert_close(gradient, expected)


def test_commitment_pulls_each_token_to_its_own_code(quantized):
    quantizer, outputs, mask, _, board = quantized
    nearest = torch.cdist(outputs, quantizer.codebook).argmin(-1)
    errors = [
        (outputs[place] - quantizer.codebook[nearest[place]]).square().mean()
        for place in zip(*torch.where(mask))
    ]
    torch.testing.assert_close(board.commitment, torch.stack(errors).mean())
    (gradient,) = torch.autograd.grad(board.commitment, outputs)
    assert (gradient[mask] != 0).any(-1).all() and (gradient[~mask] == 0).all()


def bare_encoder(quantizer) -> sgm.StoryboardEncoder:
    """An encoder that quantises, and has nothing else."""
    encoder = sgm.StoryboardEncoder.__new__(sgm.StoryboardEncoder)
    torch.nn.Module.__init__(encoder)
    encoder.quantizer, encoder.pending = quantizer, []
    encoder.register_buffer("slot_fisher", torch.ones(sgm.NUM_SLOTS))
    return encoder


def test_the_rate_moves_the_vote_of_its_own_slot_alone(quantized):
    """A code that costs too much in one slot loses it there and nowhere else."""
    quantizer, outputs, mask, members, board = quantized
    quantizer.counts.fill_(1.0)
    story, slot = 2, 5
    dear = torch.zeros(3, 8, quantizer.num_codes)
    dear[story, slot, board.codes[story, slot]] = 1e6
    encoder = bare_encoder(quantizer)
    seen = []

    def code_costs(codes):
        seen.append(codes)
        return dear

    moved = encoder.quantize(outputs, mask, members, code_costs, learn=False)
    assert torch.equal(seen[0], board.codes)
    changed = (moved.codes != board.codes).nonzero().tolist()
    assert changed == [[story, slot]]


def test_the_assignment_is_entropy_constrained(quantized):
    """Chou et al. 1989, token by token: the least sum of squared distance and cost, a nat at what
    it explains, and at more in a slot of less Fisher information."""
    quantizer, outputs, mask, members, _ = quantized
    quantizer.counts.fill_(1.0)
    costs = 3 * torch.rand(3, 8, quantizer.num_codes, generator=torch.Generator().manual_seed(0))
    encoder = bare_encoder(quantizer)
    encoder.slot_fisher.copy_(torch.linspace(0.1, 1.0, 8))
    encoder.quantize(outputs, mask, members, lambda codes: costs, learn=True)
    ((x, chosen),) = encoder.pending
    slots = members.float().argmax(1)[mask]
    own = costs[mask.nonzero()[:, 0], slots]
    worth = quantizer.lagrange_multiplier() / encoder.slot_fisher[slots]
    expected = (torch.cdist(x, quantizer.codebook).square() + worth[:, None] * own).argmin(1)
    assert torch.equal(chosen, expected)
    assert not torch.equal(chosen, torch.cdist(x, quantizer.codebook).argmin(1))
