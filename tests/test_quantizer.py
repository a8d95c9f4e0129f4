"""Vector quantiser: the moving averages against a reference, and the ways in which a codebook dies."""

import math

import pytest
import torch
from vector_quantize_pytorch import VectorQuantize

import story_generative_model as sgm

STATE = ("codebook", "counts", "sums", "updates")


def state(quantizer) -> dict:
    return {name: getattr(quantizer, name).clone() for name in STATE}


def clusters(rows: int, count: int = 8, width: int = 4, spread: float = 0.05, seed: int = 0):
    """Rows around `count` far centres, and the centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(count, width, generator=generator)
    return centres.repeat(rows // count, 1) + spread * torch.randn(
        rows, width, generator=generator
    ), centres


def running(
    num_codes: int = 8, width: int = 4, decay: float = 0.9, **options
) -> sgm.VectorQuantizer:
    """A quantiser with a random codebook that has started."""
    quantizer = sgm.VectorQuantizer(num_codes, width, decay, **options)
    generator = torch.Generator().manual_seed(1)
    quantizer.codebook.normal_(generator=generator)
    quantizer.counts.fill_(1)
    quantizer.sums.copy_(quantizer.codebook)
    quantizer.updates.fill_(1)
    return quantizer


def nearest(quantizer, x: torch.Tensor) -> torch.Tensor:
    return quantizer.distances(x).argmin(1)


def step(quantizer, x: torch.Tensor) -> None:
    quantizer.update(x, nearest(quantizer, x))


def test_twenty_steps_agree_with_vector_quantize_pytorch():
    ours = running(16, 4, decay=0.9, dead_share=0)
    reference = VectorQuantize(
        dim=4, codebook_size=16, decay=0.9, eps=1e-5, threshold_ema_dead_code=0
    )._codebook
    reference.embed.data.copy_(ours.codebook[None])
    reference.embed_avg.data.copy_(ours.sums[None])
    reference.cluster_size.data.copy_(ours.counts[None])
    reference.train()
    for number in range(20):
        x = torch.randn(50, 4, generator=torch.Generator().manual_seed(number))
        expected = reference(x[None])[1][0]
        assert torch.equal(nearest(ours, x), expected)
        step(ours, x)
        torch.testing.assert_close(ours.counts, reference.cluster_size[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.sums, reference.embed_avg[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.codebook, reference.embed[0], rtol=1e-5, atol=1e-5)


def test_one_step_by_hand():
    quantizer = sgm.VectorQuantizer(2, 1, decay=0.75, eps=0.5, dead_share=0)
    quantizer.codebook.copy_(torch.tensor([[0.0], [10.0]]))
    quantizer.counts.copy_(torch.tensor([4.0, 4.0]))
    quantizer.sums.copy_(torch.tensor([[0.0], [40.0]]))
    quantizer.updates.fill_(1)
    step(quantizer, torch.tensor([[1.0], [3.0], [8.0]]))
    assert quantizer.counts.tolist() == [3.5, 3.25]  # 0.75 * 4 + 0.25 * 2 and 0.75 * 4 + 0.25 * 1
    assert quantizer.sums.tolist() == [[1.0], [32.0]]  # 0.25 * (1 + 3) and 0.75 * 40 + 0.25 * 8
    smoothed = [(3.5 + 0.5) / (6.75 + 1) * 6.75, (3.25 + 0.5) / (6.75 + 1) * 6.75]
    torch.testing.assert_close(
        quantizer.codebook, torch.tensor([[1 / smoothed[0]], [32 / smoothed[1]]])
    )


def test_the_nearest_code_is_the_nearest_and_ties_go_to_the_smaller():
    quantizer = running(16)
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nearest(quantizer, x), torch.cdist(x, quantizer.codebook).argmin(1))
    quantizer.codebook.copy_(quantizer.codebook[:8].repeat(2, 1))
    assert nearest(quantizer, x).max() < 8


def test_it_starts_on_the_clusters_of_the_first_outputs():
    x, centres = clusters(800)
    quantizer = sgm.VectorQuantizer(8, 4, decay=0.99)
    quantizer.init_codebook(x)
    assert torch.cdist(centres, quantizer.codebook).amin(1).max() < 0.1
    assert int(quantizer.updates) == 1 and quantizer.counts.sum() == 800
    assert torch.equal(nearest(quantizer, x), torch.cdist(x, quantizer.codebook).argmin(1))


def test_kmeans_centres_are_the_means_of_their_rows():
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    centres, counts = sgm.kmeans(x, 5, torch.Generator().manual_seed(0), iterations=100)
    nearest = torch.cdist(x, centres).argmin(1)
    assert torch.equal(counts, torch.bincount(nearest, minlength=5).float())
    for code in range(5):
        torch.testing.assert_close(centres[code], x[nearest == code].mean(0))


def test_kmeans_with_fewer_rows_than_clusters_stands_on_the_rows():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    centres, counts = sgm.kmeans(x, 8, torch.Generator().manual_seed(0))
    assert centres.shape == (8, 2) and counts.sum() == 3 and (counts > 0).sum() == 3
    assert torch.cdist(centres, x).amin(1).max() == 0
    quantizer = sgm.VectorQuantizer(8, 2, decay=0.9)
    quantizer.init_codebook(x)
    torch.testing.assert_close(quantizer.codebook[nearest(quantizer, x)], x)
    step(quantizer, x)
    assert all(torch.isfinite(values).all() for values in state(quantizer).values())


def test_started_from_data_the_codebook_does_not_collapse():
    """Counts at zero beside random sums leave one code alive after two steps; codes started from
    data stay alive."""
    quantizer = sgm.VectorQuantizer(64, 4, decay=0.99)
    quantizer.init_codebook(clusters(512, count=64, spread=0.2)[0])
    for number in range(100):
        step(quantizer, clusters(512, count=64, spread=0.2)[0] + 0.01 * number)
    used, perplexity = quantizer.usage()
    assert used == 64 and perplexity > 40


def test_dead_codes_come_back_on_current_outputs():
    x, centres = clusters(800)
    quantizer = running(8, 4, decay=0.9)
    quantizer.codebook[1:] += 1000
    quantizer.sums[1:] += 1000
    for _ in range(60):
        step(quantizer, x)
    assert quantizer.usage()[0] == 8
    assert len(nearest(quantizer, x).unique()) == 8
    assert torch.cdist(quantizer.codebook, centres).amin(1).max() < 10  # none is left out there


def test_revival_is_the_same_in_every_run():
    states = []
    for _ in range(2):
        quantizer = running(8, 4, decay=0.5)
        torch.rand(len(states) + 1)  # another global random state
        for number in range(10):
            step(quantizer, clusters(80, count=2, seed=number)[0])
        states.append(state(quantizer))
    assert all(torch.equal(states[0][name], states[1][name]) for name in STATE)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_batch_that_is_not_finite_leaves_every_bit(poison):
    quantizer = running()
    before = state(quantizer)
    x = torch.randn(40, 4)
    x[7, 2] = poison
    step(quantizer, x)
    assert all(torch.equal(before[name], after) for name, after in state(quantizer).items())
    step(quantizer, torch.randn(40, 4))
    assert int(quantizer.updates) == int(before["updates"]) + 1


def test_bf16_inputs_are_averaged_in_float32():
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    low, full = running(), running()
    step(low, x)
    step(full, x.float())
    assert all(getattr(low, name).dtype == torch.float32 for name in ("codebook", "counts", "sums"))
    assert all(torch.equal(state(low)[name], state(full)[name]) for name in STATE)


def test_usage_counts_codes_that_are_alive():
    quantizer = running(8)
    assert quantizer.usage() == (8, pytest.approx(8))
    quantizer.counts.copy_(torch.tensor([10.0, 10, 0, 0, 0, 0, 0, 0]))
    assert quantizer.usage() == (2, pytest.approx(2))


def test_the_lagrange_multiplier_is_what_the_codes_explain():
    quantizer = sgm.VectorQuantizer(3, 1, decay=0.9)
    quantizer.codebook.copy_(torch.tensor([[0.0], [1.0], [4.0]]))
    quantizer.counts.copy_(
        torch.tensor([6.0, 2, 0])
    )  # mean 1/4, variance 3/4 * (1/4)^2 + 1/4 * (3/4)^2 = 3/16
    assert quantizer.lagrange_multiplier() == pytest.approx(3 / 16 / math.log(3))
    quantizer.counts.copy_(
        torch.tensor([0.0, 5, 0])
    )  # collapsed, it explains nothing: codes cost nothing any more
    assert quantizer.lagrange_multiplier() == 0
