"""Prior: causal, normalised over all storyboards, and sampled as it says."""

from itertools import product

import pytest
import torch

import story_generative_model as sgm


def make_prior(num_codes: int, sharpness: float = 1.0) -> sgm.Prior:
    """A prior with opinions: its last layer starts at zero, which would make every test of it
    pass."""
    torch.manual_seed(0)
    config = sgm.Config(
        num_codes=num_codes, prior_width=16, prior_layers=2, num_heads=2, encoder_width=16
    )
    prior = sgm.Prior(config).eval()
    for weight in (prior.to_logits.weight, prior.code.weight):
        torch.nn.init.normal_(weight, std=sharpness)
    return prior


def all_boards(num_codes: int) -> torch.Tensor:
    return torch.tensor(list(product(range(num_codes), repeat=8)))


@pytest.mark.parametrize("slot", range(8))
@pytest.mark.parametrize("training", [False, True])
def test_a_code_is_seen_by_later_slots_alone(slot, training):
    prior = make_prior(8).train(training)
    codes = torch.randint(8, (5, 8), generator=torch.Generator().manual_seed(0))
    changed = codes.clone()
    changed[:, slot] = (codes[:, slot] + 1) % 8
    before, after = prior(codes), prior(changed)
    assert torch.equal(before[:, : slot + 1], after[:, : slot + 1])
    later = (before[:, slot + 1 :] - after[:, slot + 1 :]).abs().amax(-1)
    assert (later > 1e-4).all()


def test_the_probabilities_of_all_storyboards_sum_to_one():
    prior = make_prior(2)
    with torch.no_grad():
        probs = (-prior.nll(all_boards(2)).double()).exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-5)
    assert probs.max() / probs.min() > 10


def test_it_starts_uniform():
    config = sgm.Config(num_codes=8, prior_width=16, num_heads=2, encoder_width=16)
    nll = sgm.Prior(config).nll(torch.randint(8, (4, 8)))
    torch.testing.assert_close(nll, torch.full((4,), 8 * torch.log(torch.tensor(8.0)).item()))


def test_the_first_code_is_modelled():
    """A prior fitted to storyboards that all begin with 3 knows it, and charges for another
    beginning."""
    prior = make_prior(8).train()
    optimizer = torch.optim.Adam(prior.parameters(), 0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        codes = torch.randint(8, (32, 8), generator=generator)
        codes[:, 0] = 3
        optimizer.zero_grad()
        prior.nll(codes).mean().backward()
        optimizer.step()
    drawn = prior.sample(200, torch.Generator().manual_seed(0))
    assert (drawn[:, 0] == 3).float().mean() > 0.95
    codes = torch.randint(8, (64, 8), generator=generator)
    first = prior(codes).log_softmax(-1)[:, 0]
    assert first[:, 3].min() > -0.1 and first[:, :3].max() < -3


def test_samples_follow_the_model():
    prior, count = make_prior(2), 8_000
    drawn = prior.sample(count, torch.Generator().manual_seed(0))
    observed = torch.bincount((drawn * 2 ** torch.arange(7, -1, -1)).sum(1), minlength=256).double()
    with torch.no_grad():
        expected = (-prior.nll(all_boards(2)).double()).exp() * count
    chi_square = ((observed - expected).square() / expected).sum().item()
    assert chi_square < 255 + 5 * (2 * 255) ** 0.5


def test_sampling_is_a_function_of_the_generator():
    prior = make_prior(8)
    drawn = prior.sample(20, torch.Generator().manual_seed(0))
    torch.rand(3)
    assert torch.equal(drawn, prior.sample(20, torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn, prior.sample(20, torch.Generator().manual_seed(1)))
    assert drawn.shape == (20, 8) and drawn.min() >= 0 and drawn.max() < 8


def test_pinned_slots_stay_and_the_rest_follow_them():
    prior = make_prior(8)
    free = sgm.FREE
    pinned = torch.tensor([free, 5, free, free, 0, free, free, 7])
    drawn = prior.sample(500, torch.Generator().manual_seed(0), pinned)
    assert (drawn[:, 1] == 5).all() and (drawn[:, 4] == 0).all() and (drawn[:, 7] == 7).all()
    assert all(len(drawn[:, slot].unique()) > 1 for slot in (0, 2, 3, 5, 6))
    whole = torch.arange(8)
    assert (prior.sample(3, torch.Generator().manual_seed(0), whole) == whole).all()
    rows = torch.stack([pinned, whole.where(whole > 0, free)])  # each row its own
    one, other = prior.sample(2, torch.Generator().manual_seed(0), rows).tolist()
    assert (one[1], one[4], one[7]) == (5, 0, 7) and other[1:] == list(range(1, 8))


def test_top_p_draws_from_the_nucleus_alone():
    prior = make_prior(8, sharpness=0.5)
    drawn = prior.sample(300, torch.Generator().manual_seed(0), top_p=0.6)
    with torch.no_grad():
        probs = prior(drawn).softmax(-1)
    assert (
        sgm.top_p_filter(probs.flatten(0, 1), 0.6).gather(1, drawn.flatten()[:, None]) > 0
    ).all()
    free = prior.sample(300, torch.Generator().manual_seed(0))
    assert not (
        sgm.top_p_filter(prior(free).softmax(-1).flatten(0, 1), 0.6).gather(
            1, free.flatten()[:, None]
        )
        > 0
    ).all()


def test_a_low_temperature_draws_the_likeliest():
    prior = make_prior(8)
    drawn = prior.sample(5, torch.Generator().manual_seed(0), temperature=1e-4)
    assert torch.equal(drawn, prior(drawn).argmax(-1)) and len(drawn.unique(dim=0)) == 1


def test_the_nucleus_by_hand():
    probs = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]])
    assert sgm.top_p_filter(probs, 0.6)[0].tolist() == pytest.approx(
        [0, 0.5, 0, 0.25]
    )  # 0.5 is not enough, 0.75 is
    assert sgm.top_p_filter(probs, 0.5)[0].tolist() == pytest.approx(
        [0, 0.5, 0, 0]
    )  # 0.5 reaches it
    assert (sgm.top_p_filter(probs, 0.01) > 0).sum(1).tolist() == [1, 1]  # one always stays
    assert torch.equal(sgm.top_p_filter(probs, 1.0)[1], probs[1])
