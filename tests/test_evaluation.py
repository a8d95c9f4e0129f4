"""Evaluation: each number against one made by hand, and the baselines are what they say."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import CPU, make_data, make_stories

import story_generative_model as sgm

KINDS = ("true", "shuffled", "prior", "constant", "none")


@pytest.fixture(scope="module")
def evaluated(checkpoint, tmp_path_factory):
    """The table of the trained checkpoint on the six validation stories, and the same from its
    JSON."""
    path = tmp_path_factory.mktemp("metrics") / "metrics.json"
    table = sgm.evaluate(dataclasses.replace(checkpoint["config"], output=str(path)), checkpoint)
    return table, json.loads(path.read_text())


@pytest.fixture(scope="module")
def measured(checkpoint):
    """The trained model, ten stories, and their measures."""
    config = dataclasses.replace(checkpoint["config"], eval_batch_size=4)
    model = sgm.load_model(checkpoint, config, CPU, torch.float32)
    stories = make_stories(10, seed=5)
    return model, stories, sgm.measure_text(model, stories, config, KINDS)


def test_every_number_is_there_with_its_interval(evaluated):
    table, written = evaluated
    assert written == table
    wanted = {f"text_nll.{kind}" for kind in KINDS} | {
        f"text_nll_per_token.{kind}" for kind in KINDS
    }
    wanted |= {"bits_returned", "bits_spent", "efficiency", "elbo", "elbo_constant", "elbo_none", "codebook.codes_used",
               "codebook.perplexity", "codebook.vote_share", "diffusion_nll.true",
               "diffusion_nll.shuffled_story", "retrieval_at_64", "elbo_tight", "telling.repeated_4grams",
               "telling.longest_copy",
               "continuation_nll.resampled", "continuation_nll.prior", "edit_locality", "edit_locality_chance"}  # fmt: skip
    assert wanted <= set(table)
    assert table["bits_uniform"] == 24  # eight codes of three bits
    for key in wanted:
        assert np.isfinite(table[key]), key
    for key in wanted:
        low, high = table[f"{key}_ci"]
        assert low <= table[key] <= high, key


def test_the_numbers_belong_together(evaluated):
    table, _ = evaluated
    bits = (table["text_nll.constant"] - table["text_nll.true"]) / np.log(2)
    assert table["bits_returned"] == pytest.approx(bits)
    assert table["efficiency"] == pytest.approx(bits / table["bits_spent"])
    assert table["elbo"] == pytest.approx(-table["text_nll.true"] - table["bits_spent"] * np.log(2))
    assert table["elbo_none"] == pytest.approx(-table["text_nll.none"])


@torch.no_grad()
def test_retrieval_finds_the_storyboard_that_makes_a_story_likeliest(measured):
    """By hand, in groups of four: the last of the ten stories looks among the last four's."""
    model, stories, text = measured
    codes = torch.from_numpy(text.codes)
    found = sgm.measure_retrieval(model, stories, codes, model.config, among=4)
    assert len(found) == 10
    for number in range(10):
        first = min(number // 4 * 4, 6)
        tokens, mask, cut = model.tokenize([stories[number]] * 4)
        nll = model.lm.nll(model.prompt_embeds(codes[first : first + 4]), tokens, mask, cut)
        assert found[number] == (nll.argmin() == number - first)


def test_none_is_the_plain_language_model(measured):
    model, stories, text = measured
    for number, story in enumerate(stories):
        ids = torch.tensor([[model.lm.bos, *model.lm.tokenizer(story)["input_ids"], model.lm.eos]])
        with torch.no_grad():
            loss = model.lm.model(input_ids=ids, labels=ids).loss.item()
        assert text.text_nll["none"][number] == pytest.approx(loss * (ids.shape[1] - 1), rel=1e-4)
        assert text.num_tokens[number] == ids.shape[1] - 1


@torch.no_grad()
def test_each_kind_is_measured_with_its_own_storyboard(measured):
    model, stories, text = measured
    boards = torch.from_numpy(text.codes)
    drawn = model.prior.sample(10, sgm.make_generator(0, sgm.Stream.EVAL_STORYBOARD))
    for number, story in enumerate(stories):
        tokens, mask, cut = model.tokenize([story])
        own = model.encode(tokens, mask)
        assert torch.equal(own.codes[0], boards[number])
        soft = {
            "true": model.prompt_embeds(own.codes),
            "shuffled": model.prompt_embeds(boards[[number - 1]]),
            "prior": model.prompt_embeds(drawn[[number]]),
            "constant": model.soft_prompt.constant_prompt(1),
        }
        for kind, prompt in soft.items():
            nll = model.lm.nll(prompt, tokens, mask, cut).item()
            assert text.text_nll[kind][number] == pytest.approx(nll, rel=1e-4), (kind, number)
        assert text.latent_nll[number] == pytest.approx(model.prior.nll(own.codes).item(), rel=1e-4)


def test_no_story_is_shuffled_onto_itself(checkpoint, measured, tmp_path):
    """Also not the last picture where it is alone in its batch."""
    model, _, text = measured
    config = dataclasses.replace(checkpoint["config"], eval_batch_size=4)
    root = make_data(tmp_path / "data", train=1, val=5, panels=1)
    rows = sgm.read_rows(str(root), "val")
    pictures = sgm.measure_images(model, rows, root / "val", config)
    own, other = pictures["diffusion_nll.true"], pictures["diffusion_nll.shuffled_story"]
    assert len(own) == len(other) == 5 and (own != other).all()
    distinct = [
        number for number in range(10) if (text.codes[number] != text.codes[number - 1]).any()
    ]
    assert distinct
    assert all(
        text.text_nll["true"][number] != text.text_nll["shuffled"][number] for number in distinct
    )


def test_the_measures_do_not_depend_on_the_batch(measured):
    model, stories, text = measured
    other = sgm.measure_text(
        model, stories, dataclasses.replace(model.config, eval_batch_size=3), KINDS
    )
    for kind in KINDS:
        np.testing.assert_allclose(text.text_nll[kind], other.text_nll[kind], rtol=1e-4)
    assert (text.codes == other.codes).all()


def spread_measures(count: int) -> sgm.TextMeasures:
    rng = np.random.default_rng(0)
    nll = {kind: rng.normal(50 + place, 5, count) for place, kind in enumerate(KINDS)}
    latent, tokens, share = (
        rng.normal(10, 1, count),
        rng.integers(5, 30, count).astype(float),
        rng.random(count),
    )
    return sgm.TextMeasures(nll, latent, tokens, share, rng.integers(64, size=(count, 8)))


def test_every_interval_brackets_its_number():
    """Also those of statistics that resampling biases, such as the number of codes used, which is
    taken off."""
    table = sgm.summarize(spread_measures(40), {}, num_codes=64)
    intervals = [key for key in table if key.endswith("_ci")]
    assert len(intervals) > 10
    for key in intervals:
        low, high = table[key]
        assert low <= table[key.removesuffix("_ci")] <= high, key


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        values = rng.normal(3, 1, 50)
        low, high = sgm.bootstrap(
            lambda pick, values=values: values[pick].mean(), 50, resamples=200
        )
        hits += low <= 3 <= high
    assert 0.88 < hits / 200 < 0.99


def test_perplexity():
    assert sgm.code_perplexity(np.array([[0, 1, 2, 3]]), 8) == pytest.approx(4)
    assert sgm.code_perplexity(np.zeros((3, 8), dtype=int), 8) == pytest.approx(1)


def test_metrics_that_cannot_be_written_are_told_as_one_line(checkpoint, tmp_path):
    config = dataclasses.replace(
        checkpoint["config"], output=str(tmp_path / "nowhere" / "metrics.json")
    )
    with pytest.raises(sgm.StoryError, match="--output"):
        sgm.evaluate(config, checkpoint)


# The codebook, explained


def test_what_goes_with_a_code_is_what_its_slots_do_not_all_have():
    expected = {"owl": 0.1, "the": 1.0, "star": 0.5}
    found = sgm.distinctive_terms(
        [{"owl", "the", "star"}, {"owl", "the"}, {"the", "once"}], expected | {"once": 0.1}, most=2
    )
    assert found == [
        ("owl", pytest.approx(2 / 3))
    ]  # "the" is everywhere, "star" and "once" stand here once


def test_the_codebook_is_explained_in_a_table_and_on_a_page(checkpoint, tmp_path, capsys):
    page = tmp_path / "codebook.html"
    config = dataclasses.replace(checkpoint["config"], output=str(page), top_codes=5, split="train")
    meanings = sgm.codebook(config, checkpoint)
    assert 0 < len(meanings) <= 5
    assert [m.count for m in meanings] == sorted((m.count for m in meanings), reverse=True)
    printed, written = capsys.readouterr().out, page.read_text()
    for meaning in meanings:
        assert (
            f"{meaning.code:5d} {meaning.count:5d}" in printed and f">{meaning.code}</b>" in written
        )
        assert all(word in printed for word in meaning.words)
    assert "http" not in written and "<script" not in written


def test_words_on_the_page_are_escaped():
    row = dict(code=1, count=2, slots="1-2,4", words="<script>", factors="a & b", color="red")
    page = sgm.render_template("codebook.html", title="<title>", rows=[row])
    assert (
        "<script>" not in page
        and "&lt;script&gt;" in page
        and "a &amp; b" in page
        and "1-2,4" in page
    )


def test_a_page_that_cannot_be_written_is_told_as_one_line(checkpoint):
    with pytest.raises(sgm.StoryError, match="--output"):
        sgm.codebook(dataclasses.replace(checkpoint["config"], output="codebook.txt"), checkpoint)


# Openings and edits


def test_changed_places():
    assert sgm.changed_positions([1, 2, 3, 4], [1, 2, 3, 4]) == []
    assert sgm.changed_positions([1, 2, 3, 4], [1, 9, 3, 4]) == [1]
    assert sgm.changed_positions([1, 2, 3, 4], [1, 2, 8, 9, 3, 4]) == [2, 2]
    assert sgm.changed_positions([1, 2, 3, 4], [1, 4]) == [1, 2]


@torch.no_grad()
def test_the_rest_of_a_story_is_measured_behind_its_prompt(measured, data_folder):
    model, _, _ = measured
    rows = sgm.read_rows(str(data_folder), "val")[2:4]
    found = sgm.measure_continuations(
        model, rows, dataclasses.replace(model.config, num_storyboards=1)
    )
    np.testing.assert_array_equal(
        found["continuation_nll.prior"], found["continuation_nll.resampled"]
    )  # of one there is no choice
    for number, row in enumerate(rows):
        codes = sgm.draw_storyboard(
            model, row.prompt, [], dataclasses.replace(model.config, num_storyboards=1), number
        )
        ids = [
            model.lm.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (row.prompt, row.story)
        ]
        assert ids[1][: len(ids[0])] == ids[0]
        tokens = torch.tensor([[*ids[1], model.lm.eos]])
        embeds = model.lm.build_inputs(model.prompt_embeds(codes[None]), tokens)
        logits = model.lm.model(inputs_embeds=embeds).logits[0, 8:-1].log_softmax(-1)
        nll = -logits[torch.arange(len(tokens[0])), tokens[0]]
        assert found["continuation_nll.prior"][number] == pytest.approx(
            nll[len(ids[0]) :].sum().item(), rel=1e-3
        )


def test_edits_are_counted_in_the_slot_s_own_chunk(measured, data_folder):
    model, _, _ = measured
    rows = sgm.read_rows(str(data_folder), "val")[2:]
    codes = torch.randint(8, (len(rows), 8), generator=torch.Generator().manual_seed(1))
    found = sgm.measure_edits(model, rows, codes, model.config)
    share, chance = found["edit_locality"], found["edit_locality_chance"]
    assert len(share) == len(chance) == len(rows)
    assert (
        all(0 <= value <= 1 for value in share[~np.isnan(share)])
        and (chance >= 0).all()
        and (chance < 0.5).all()
    )


# The tight bound, control, telling


@torch.no_grad()
def test_the_tight_bound_is_the_sum_over_the_storyboard_and_its_neighbours(measured, monkeypatch):
    """By hand, story by story: 1 + 8 x 7 storyboards of eight codes each, and never below the ELBO."""
    model, stories, text = measured
    monkeypatch.setattr(sgm, "TIGHT_STORIES", 3)
    codes = torch.from_numpy(text.codes)
    bounds = sgm.measure_tight_bound(model, stories, codes, model.config)["elbo_tight"]
    assert np.isnan(bounds[3:]).all()
    for number in range(3):
        boards = [text.codes[number].tolist()]
        for slot in range(8):
            for code in range(8):
                if code != text.codes[number, slot]:
                    boards.append(boards[0][:slot] + [code] + boards[0][slot + 1 :])
        assert len(boards) == 57
        joint = []
        for board in torch.tensor(boards)[:, None]:
            nll = model.lm.nll(model.prompt_embeds(board), *model.tokenize([stories[number]]))
            joint.append(-(nll + model.prior.nll(board)).double())
        assert bounds[number] == pytest.approx(float(torch.cat(joint).logsumexp(0)), rel=1e-4)
        assert bounds[number] > -text.text_nll["true"][number] - text.latent_nll[number]
    monkeypatch.setattr(sgm, "TIGHT_NEIGHBORS", 5)  # the likeliest alone: a looser bound
    fewer = sgm.measure_tight_bound(model, stories, codes, model.config)["elbo_tight"]
    assert (fewer[:3] < bounds[:3]).all()


def test_control_compares_the_pinned_code_s_word_with_another_s(measured, data_folder, monkeypatch):
    """A writer that puts the word of the pinned code into its slot has control 1 and chance 0; one
    that writes both words everywhere has 1 and 1."""
    model, _, _text = measured
    rows = list(sgm.read_rows(str(data_folder), "val"))
    codes = torch.arange(len(rows))[:, None].expand(-1, 8)
    monkeypatch.setattr(
        model, "code_words", lambda numbers: [f"word{number}x" for number in numbers]
    )

    def obey(model, config, prompts, seeds, pinned):
        slots = [[slot for slot, code in enumerate(one) if code is not None] for one in pinned]
        return None, [f"{slot} word{one[slot]}xed" for (slot,), one in zip(slots, pinned)]

    monkeypatch.setattr(sgm, "write_stories", obey)
    monkeypatch.setattr(
        sgm, "chunk_words", lambda model, story: {int(story[0]): set(story.split())}
    )
    measures = sgm.measure_control(model, rows, codes, model.config)
    assert (measures["control"] == 1).all() and (measures["control_chance"] == 0).all()
    everything = " ".join(f"word{number}x" for number in range(len(rows)))
    monkeypatch.setattr(
        sgm, "chunk_words", lambda model, story: {int(story[0]): set(everything.split())}
    )
    measures = sgm.measure_control(model, rows, codes, model.config)
    assert (measures["control"] == 1).all() and (measures["control_chance"] == 1).all()
    same = sgm.measure_control(model, rows, torch.zeros_like(codes), model.config)
    assert np.isnan(same["control"]).all()


def test_control_of_a_real_model_is_a_share(measured, data_folder):
    model, _, text = measured
    rows = list(sgm.read_rows(str(data_folder), "val"))
    measures = sgm.measure_control(
        model, rows, torch.from_numpy(text.codes[: len(rows)]), model.config
    )
    for values in measures.values():
        assert len(values) == len(rows) and set(values[~np.isnan(values)]) <= {0.0, 0.5, 1.0}


def test_telling_counts_4grams_and_copies(measured, data_folder, monkeypatch):
    model, _, _ = measured
    rows = list(sgm.read_rows(str(data_folder), "val"))[:2]
    copied = " ".join(sgm.words_of(sgm.read_rows(str(data_folder), "train")[2].story)[3:9])
    stories = ["A b c d. A b c d, a b c d!", f"quite {copied} new"]
    monkeypatch.setattr(sgm, "write_stories", lambda *_: (None, stories))
    config = dataclasses.replace(model.config, data_root=str(data_folder))
    columns, totals = sgm.measure_telling(model, rows, config)
    assert columns["telling.repeated_4grams"].tolist() == [5 / 9, 0]  # 9 in all, 4 of them distinct
    assert columns["telling.longest_copy"][1] == 6
    assert totals["telling.distinct_4grams"] == pytest.approx((4 + 5) / (9 + 5))
    without = dataclasses.replace(config, data_root="gone")
    assert "telling.longest_copy" not in sgm.measure_telling(model, rows, without)[0]


def test_the_longest_copied_run_of_words():
    corpus = " the red fox ran home \n the owl sat "
    assert sgm.longest_copy("A red fox ran away", corpus) == 3
    assert sgm.longest_copy("home the owl", corpus) == 2  # not across stories
    assert sgm.longest_copy("ed fo", corpus) == 0  # words, not letters
