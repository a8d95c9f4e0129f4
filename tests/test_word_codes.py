"""Codes that start as words: which words, what the language model reads, and pinning one by its
word."""

import dataclasses
import random

import pytest
import torch
from conftest import CPU

import story_generative_model as sgm

THINGS = ["fox", "owl", "key", "kite", "boat", "pond", "snow", "star"]


def tell(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    line = "The {} and the {} saw the {} and the {} and the {} and the {} and the {} and the {}."
    return [line.format(*rng.choices(THINGS, k=8)) for _ in range(count)]


@pytest.fixture(scope="module")
def words(make_config):
    """A model on the embedded language model, whose eight codes started as words."""
    config = make_config(
        lm_model="assets/storyworld/lm", codebook_init="words", num_codes=8, code_dim=8,
        encoder_width=16, prior_width=16, num_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = sgm.StoryModel(config, sgm.load_language_model(config, CPU, torch.float32), None)
    model.init_encoder(tell(64))
    model.init_codebook([])
    return model.eval()


def test_codes_start_at_the_salient_whole_words(words):
    tokenizer = words.lm.tokenizer
    single = {word for word in THINGS if len(tokenizer(" " + word)["input_ids"]) == 1}
    started = set(words.code_words(range(8)))
    assert len(started) == 8 and single <= started | {"owl"} and len(started & single) >= 5
    tokens, uses = words.code_words_start
    assert uses.min() >= 1 and torch.equal(words.encoder.quantizer.counts, uses.float())
    # the constant prompt is the words' mean, and with it a soft token is its word's embedding
    rows = words.lm.embedding_rows()[tokens]
    torch.testing.assert_close(words.soft_prompt.constant[0], rows.mean(0))
    soft = words.code_tokens(range(8)) * words.soft_prompt.embed_std + rows.mean(0)
    assert torch.equal(torch.cdist(soft, rows).argmin(1), torch.arange(8))


def test_a_chunk_gets_the_code_of_its_word(words):
    (codes,) = words.encode_stories(["fox. " * 3 + "The fox and the fox saw the fox."]).tolist()
    assert "fox" in words.code_words(codes)


def test_a_code_is_pinned_by_its_word(words):
    fox = words.code_words(range(8)).index("fox")
    pinned = sgm.parse_storyboard("_ Fox _ 3 _ _ _ fox", 8)
    assert sgm.find_codes(words, pinned) == [None, fox, None, 3, None, None, None, fox]
    with pytest.raises(
        sgm.StoryError,
        match=r"no code says 'dragon', nor is it one token .* near it are .*codebook",
    ) as error:
        sgm.find_codes(words, sgm.parse_storyboard("dragon _ _ _ _ _ _ _", 8))
    assert error.value.code == 2


def test_a_word_that_no_code_says_stands_for_itself(words):
    """In the prompt it is its own embedding; to the prior it is the code nearest to it."""
    said = {word.lower() for word in words.code_words(range(8))}
    word, tokens = next(one for one in words.lm.word_tokens().items() if one[0] not in said)
    pinned = sgm.find_codes(words, sgm.parse_storyboard(f"_ {word} _ _ _ _ _ 3", 8))
    assert pinned == [None, 8 + tokens[0], *[None] * 5, 3]
    config = dataclasses.replace(words.config, num_storyboards=4)
    board = sgm.draw_storyboard(words, "The fox", pinned, config, 0)
    near = words.nearest_codes(board)
    assert board[1] == pinned[1] and board[7] == 3 and bool((near < 8).all())
    assert torch.equal(near[2:], board[2:])
    distances = (words.word_vectors(board[1:2] - 8) - words.encoder.quantizer.codebook).norm(dim=1)
    assert near[1] == distances.argmin()
    assert words.code_words(board.tolist())[1] == word
    assert words.keywords(board[None])[0, 1].nonzero()[:, 0].tolist() == tokens
    soft = words.prompt_embeds(torch.stack([near, board]))  # (2, P, E)
    own = slice(words.soft_prompt.per_slot, 2 * words.soft_prompt.per_slot)
    row = words.lm.embed(torch.tensor(tokens[:1]))
    torch.testing.assert_close(soft[1, own], row.expand_as(soft[1, own]))
    soft[1, own] = soft[0, own]
    assert torch.equal(soft[0], soft[1])


def test_the_codes_that_a_prompt_names(words):
    named = sgm.codes_named(words, "The FOX, a dragon, the fox")
    assert words.code_words(named.tolist()) == ["fox"]
    for prompt in ("of it", "\u65e5\u672c", "!!!"):
        assert len(sgm.codes_named(words, prompt)) == 0


def test_a_storyboard_with_the_prompt_s_words_is_drawn_as_often_as_it_should_be(words):
    """Proposals that hold a word of the prompt do not make it likelier: with one free slot the
    frequencies over seeds are those of p(z) p(prompt | z), over all 8 boards."""
    prompt, pinned = "The fox", [None, 1, 2, 3, 4, 5, 6, 0]
    config = dataclasses.replace(words.config, num_storyboards=16, temperature=1.0, top_p=1.0)
    boards = torch.tensor([[code, *pinned[1:]] for code in range(8)])
    tokens, mask, _ = words.tokenize([prompt] * 8)
    cut = torch.ones(8, dtype=torch.bool)
    with torch.no_grad():
        own = words.prior(boards)[:, 0].log_softmax(-1).diagonal()
        nll = words.lm.nll(words.prompt_embeds(boards), tokens, mask, cut)
    wanted = (own - nll).softmax(0)
    fox = int(sgm.codes_named(words, prompt))
    seeds = 120
    drawn = [sgm.draw_storyboard(words, prompt, pinned, config, seed) for seed in range(seeds)]
    has_fox, share = sum(int(board[0]) == fox for board in drawn), float(wanted[fox])
    assert abs(has_fox - seeds * share) < 3.5 * (seeds * share * (1 - share)) ** 0.5
    assert 0.05 < share < 0.6 and all(board.tolist()[1:] == pinned[1:] for board in drawn)


def test_each_prompt_has_draws_of_its_own(words):
    """With one proposal nothing is weighed: the draw itself differs, and is the same again."""
    config = dataclasses.replace(words.config, num_storyboards=1, temperature=1.0, top_p=1.0)
    prompts = [f"line {number}" for number in range(20)]
    boards = [sgm.draw_storyboard(words, prompt, [], config, 3).tolist() for prompt in prompts]
    again = [sgm.draw_storyboard(words, prompt, [], config, 3).tolist() for prompt in prompts]
    assert len(set(map(tuple, boards))) > 15 and boards == again


def test_fewer_words_than_codes_start_by_turns(make_config, lm, diffusion):
    """A second code of a word votes for nothing until it is revived."""
    config = make_config(codebook_init="words", num_codes=8)
    model = sgm.StoryModel(config, lm, diffusion)
    stories = ["The fox and the owl and the fox, a small owl and a red fox."] * 4
    model.init_encoder(stories)
    model.init_codebook([])
    words, _ = model.code_words_start
    quantizer = model.encoder.quantizer
    assert 0 < len(words) < 8
    assert torch.equal(quantizer.codebook[len(words)], quantizer.codebook[0])
    assert model.encode_stories(stories).max() < len(words)


def test_a_context_that_the_instruction_fills_is_told(make_config):
    config = make_config(story_template=sgm.STORY_TEMPLATE)
    lm = sgm.load_language_model(config, CPU, torch.float32)
    with pytest.raises(sgm.StoryError, match=r"context of 64 .* shorter --story_template") as error:
        sgm.StoryModel(config, lm, None)
    assert error.value.code == 2


def test_stories_without_whole_words_start_by_kmeans(make_config, lm, diffusion, capsys):
    model = sgm.StoryModel(make_config(codebook_init="words"), lm, diffusion)
    stories = ["on on a a on on on a a in in on in"] * 12
    model.init_encoder(stories)
    model.init_codebook(stories)
    assert "codes start by k-means" in capsys.readouterr().err
    assert model.encoder.quantizer.updates == 1


def test_a_book_is_made_again_by_the_storyboard_that_made_it():
    book = sgm.Config(source="assets/generated.png")
    assert sgm.find_maker(book) == "storyworld" != sgm.find_maker(sgm.Config())


def test_the_embedded_storyteller_says_words():
    """Its codes as they are committed, named by the embedding rows that they started from."""
    checkpoint = sgm.load_checkpoint(sgm.EMBEDDED["storyteller"])
    assert checkpoint["config"] == sgm.Config(**sgm.PRESETS["storyteller"] | {
        "preset": "storyteller", "logging_steps": 4,
    })  # fmt: skip
    counts = checkpoint["model"]["encoder.quantizer.counts"]
    assert len(counts) == 512 and (counts > 0).all()
