"""Every family of models: shared prompts score as separate ones do, virtual tokens are counted, results reload."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from models import CAUSAL, MASKED, save_model, save_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from zokernel.cli import main
from zokernel.data import load_table
from zokernel.errors import UsageError
from zokernel.finetune import Collator, EncodedDataset, PromptTask, ZOConfig, encode, finetune, get_task, option_scores
from zokernel.finetune.models.adapters import attach_adapter
from zokernel.finetune.models.load import load_model
from zokernel.finetune.scoring.choose_collator import choose_collator
from zokernel.finetune.scoring.decoding import greedy_answers
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.finetune.tasks.toy import toy_files, toy_rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {f: save_model(root / f, f) for f in (*CAUSAL, *MASKED)}


@pytest.fixture(scope="module")
def load(folders):
    """Fresh copies of the models, each read once."""
    cache = {}

    def get(family):
        if family not in cache:
            auto = AutoModelForMaskedLM if family in MASKED else AutoModelForCausalLM
            cache[family] = (
                auto.from_pretrained(folders[family], dtype=torch.float32).eval(),
                AutoTokenizer.from_pretrained(folders[family]),
            )
        return copy.deepcopy(cache[family][0]), cache[family][1]

    return get


def one_by_one(model, example, *, in_front=0):
    """Mean log-probability of each option from a plain forward over prompt and option."""
    scores = []
    for option in example.option_ids:
        if example.mask_id is None:
            ids, first = example.prompt_ids + option, len(example.prompt_ids) - 1
        else:
            ids = [*example.prompt_ids, *[example.mask_id] * len(option), *example.suffix_ids]
            first = len(example.prompt_ids)
        logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0].float()
        rows = logits.log_softmax(-1)[in_front + first : in_front + first + len(option)]
        scores.append(rows[torch.arange(len(option)), torch.tensor(option)].mean())
    return torch.stack(scores)


def unequal_examples(tokenizer, *, masked=False):
    """Options of one and of many tokens, two to four per example."""
    task = get_task("record")
    rows = task.read(toy_rows("record", task, size=6), where="toy")
    examples = encode(task, rows, tokenizer, masked=masked)
    assert len({len(example.option_ids) for example in examples}) > 1
    words = PromptTask("{text} It was", ("great", "quite terrible"))
    return examples + encode(words, [{"text": "so so", "label": 1}], tokenizer, masked=masked)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CAUSAL)
def test_shared_prompts_give_the_scores_of_separate_rows(load, family, attention):
    model, tokenizer = load(family)
    model.set_attn_implementation(attention)
    examples = unequal_examples(tokenizer)
    dataset = EncodedDataset(examples)
    features = [dataset[i] for i in range(len(dataset))]
    plain, packed = (Collator(tokenizer.pad_token_id, shared_prompt=shared)(features) for shared in (False, True))
    assert packed["input_ids"].shape[0] == len(examples) < plain["input_ids"].shape[0]
    with torch.no_grad():
        separate, shared = option_scores(model, plain), option_scores(model, packed)
        reference = [one_by_one(model, example) for example in examples]
    for number, expected in enumerate(reference):
        count = len(expected)
        torch.testing.assert_close(separate[number, :count], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(shared[number, :count], expected, rtol=0, atol=1e-5)
        assert (shared[number, count:] == -torch.inf).all()
    assert choose_collator(model, tokenizer.pad_token_id, dataset).shared_prompt


def test_a_model_that_ignores_the_packed_mask_gets_a_row_an_option_and_a_warning(load, caplog):
    model, tokenizer = load("gpt2")

    class NoPositions(type(model)):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    model.__class__ = NoPositions
    dataset = EncodedDataset(unequal_examples(tokenizer))
    assert not choose_collator(model, tokenizer.pad_token_id, dataset).shared_prompt
    assert "each option gets its own copy of it" in caplog.text


def other_architecture(name, vocabulary):
    """Models that a packed mask does not suit: a window over positions in the row, ALiBi, recurrence."""
    import transformers as tf

    shape = {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    if name == "window":
        return tf.MistralForCausalLM(tf.MistralConfig(**shape, **heads, sliding_window=8)).eval()
    if name == "alibi":
        return tf.MptForCausalLM(tf.MptConfig(vocab_size=vocabulary, d_model=32, n_layers=2, n_heads=4)).eval()
    return tf.MambaForCausalLM(tf.MambaConfig(**shape, state_size=4)).eval()


@pytest.mark.parametrize("name", ["window", "alibi", "recurrent"])
def test_an_architecture_that_cannot_share_prompts_is_found_out(load, name, caplog):
    tokenizer = load("llama")[1]
    model = other_architecture(name, len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    dataset = EncodedDataset(unequal_examples(tokenizer))
    collator = choose_collator(model, tokenizer.pad_token_id, dataset)
    assert not collator.shared_prompt
    assert "each option gets its own copy of it" in caplog.text
    with torch.no_grad():
        scores = option_scores(model, collator([dataset[i] for i in range(3)]))
        expected = one_by_one(model, dataset.examples[0])
    torch.testing.assert_close(scores[0, : len(expected)], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", MASKED)
def test_masked_models_score_options_of_any_length_at_the_mask(load, family):
    model, tokenizer = load(family)
    examples = unequal_examples(tokenizer, masked=True)
    dataset = EncodedDataset(examples)
    batch = Collator(tokenizer.pad_token_id)([dataset[i] for i in range(len(dataset))])
    with torch.no_grad():
        scores = option_scores(model, batch)
        for number, example in enumerate(examples):
            expected = one_by_one(model, example)
            torch.testing.assert_close(scores[number, : len(expected)], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("kind", ["prefix_tuning", "prompt_tuning"])
def test_scored_positions_count_virtual_tokens(load, family, kind):
    model, tokenizer = load(family)
    adapted = attach_adapter(model, ModelArguments(**{kind: True}, num_virtual_tokens=3))
    examples = unequal_examples(tokenizer)
    dataset = EncodedDataset(examples)
    collator = choose_collator(adapted, tokenizer.pad_token_id, dataset)
    assert not collator.shared_prompt
    with torch.no_grad():
        scores = option_scores(adapted, collator([dataset[i] for i in range(len(dataset))]))
        for number, example in enumerate(examples):
            expected = one_by_one(adapted, example, in_front=3 if kind == "prompt_tuning" else 0)
            torch.testing.assert_close(scores[number, : len(expected)], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_prefix_starts_from_real_activations(load, family):
    """With the activations of a text as prefix, the model continues as if that text stood before the input."""
    model, tokenizer = load(family)
    reference = copy.deepcopy(model)
    adapted = attach_adapter(model, ModelArguments(prefix_tuning=True, num_virtual_tokens=4), seed=7)
    vocabulary = reference.get_input_embeddings().num_embeddings
    text = torch.randint(vocabulary, (1, 4), generator=torch.Generator().manual_seed(7))
    ids = torch.tensor([tokenizer("It was good")["input_ids"]])
    with torch.no_grad():
        expected = reference(torch.cat([text, ids], 1)).logits[:, 4:]
        logits = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("adapter", ["none", "prefix_tuning", "prompt_tuning"])
def test_greedy_decoding_of_a_padded_batch_is_that_of_single_prompts(load, family, adapter):
    model, tokenizer = load(family)
    if adapter != "none":
        model = attach_adapter(model, ModelArguments(**{adapter: True}, num_virtual_tokens=3))
    prompts = ["It was", "Rome Rome Rome is a good", "x"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max(map(len, ids))
    padded = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + p for p in ids])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in ids])
    together = greedy_answers(model, tokenizer, padded, mask, max_new_tokens=6)
    for prompt, actual in zip(ids, together, strict=True):
        text = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([text]), attention_mask=torch.ones(1, len(text))).logits
                text.append(logits[0, -1].argmax().item())
            if text[-1] == tokenizer.eos_token_id or "\n" in tokenizer.decode([text[-1]]):
                break
        expected = tokenizer.decode(text[len(prompt) :], skip_special_tokens=True).lstrip().split("\n", 1)[0].strip()
        assert actual == expected


WAYS = [
    ("llama", {}),
    ("roberta", {}),
    ("opt", {"prefix_tuning": True}),
    ("qwen2", {"prompt_tuning": True}),
    ("roberta", {"prompt_tuning": True}),
    ("roberta", {"lora": True, "lora_target_modules": ["query", "value"]}),
]


@pytest.mark.parametrize(("family", "adapter"), WAYS, ids=lambda value: str(value))
def test_a_saved_result_scores_the_same_in_plain_transformers_and_peft(folders, tmp_path, monkeypatch, family, adapter):
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    task, masked = get_task("sst2"), family in MASKED
    files = toy_files(tmp_path / "data", "sst2", task, size=12)
    config = ZOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=6,
        learning_rate=1e-2 if adapter else 1e-3,
        eval_steps=2,
        load_best_model_at_end=False,  # after six steps the start may be the best
        per_device_train_batch_size=4,
        precision="fp32",
        disable_tqdm=True,
        report_to="none",
    )
    model_arguments = ModelArguments(model_name_or_path=str(folders[family]), **adapter)
    metrics = finetune(model_arguments, DataArguments(task="sst2", **files), config)
    assert metrics["language_model"] == ("masked" if masked else "causal")
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    if adapter:
        assert metrics["num_trained"] < metrics["num_parameters"] / 2
        base = auto.from_pretrained(folders[family], dtype=torch.float32)
        plain = peft.PeftModel.from_pretrained(base, tmp_path / "run").eval()
    else:
        plain = auto.from_pretrained(tmp_path / "run", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    rows = load_table(files["test_file"])
    losses = []
    in_front = 5 if "prompt_tuning" in adapter else 0
    with torch.no_grad():
        for example in encode(task, rows, tokenizer, masked=masked):
            scores = one_by_one(plain, example, in_front=in_front)
            losses.append(torch.nn.functional.cross_entropy(scores, torch.tensor(example.label)).item())
    assert sum(losses) / len(losses) == pytest.approx(metrics["after"]["loss"], abs=2e-5)
    assert metrics["after"]["loss"] != pytest.approx(metrics["before"]["loss"], abs=1e-6)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "base_model" not in card  # a folder here means nothing elsewhere
    assert f"# {folders[family].name} fine-tuned with mezo" in card
    assert "zeroth-order" in card


def test_masked_models_refuse_prefixes_and_generation(folders, load, tmp_path):
    model, tokenizer = load("roberta")
    with pytest.raises(UsageError, match="take no prefix"):
        attach_adapter(model, ModelArguments(prefix_tuning=True))
    with pytest.raises(UsageError, match="One adapter"):
        attach_adapter(model, ModelArguments(lora=True, prompt_tuning=True))
    task = get_task("squad")
    with pytest.raises(UsageError, match="use a causal language model"):
        encode(task, toy_rows("squad", task, size=1), tokenizer, masked=True)
    with pytest.raises(UsageError, match="needs a masked language model"):
        encode(PromptTask("It is {mask}: {text}", ("a", "b")), [{"text": "", "label": 0}], load("opt")[1])
    config = ZOConfig(output_dir=str(tmp_path), disable_tqdm=True)
    loaded, _ = load_model(ModelArguments(model_name_or_path=str(folders["bert"])), config)
    assert type(loaded).__name__ == "BertForMaskedLM"


@pytest.mark.parametrize("family", ["esm", "luke"])
def test_models_that_want_more_than_a_head_and_labels_are_trained(folders, family, tiny_reviews_path, tmp_path):
    """ESM adds a bias of all words to what its head returns; LUKE's forward has labels of entities, too."""
    files = [
        w for split in ("train", "validation") for w in (f"--{split}_file", str(tiny_reviews_path / f"{split}.jsonl"))
    ]
    words = [
        "--model_name_or_path",
        str(folders[family]),
        *files,
        "--label_words",
        "bad",
        "good",
        "--precision",
        "fp32",
    ]
    assert main(["finetune", *words, "--max_steps", "3", "--output_dir", str(tmp_path / "run")]) == 0
    assert main(["finetune", *words, "--max_steps", "3", "--lora", "true", "--output_dir", str(tmp_path / "lora")]) == 0


@pytest.mark.parametrize("name", ["ProphetNetForConditionalGeneration", "ProphetNetForCausalLM"])
def test_models_that_predict_several_tokens_at_once_are_refused(name, tiny_reviews_path, tmp_path, capsys):
    fast = save_tokenizer(tmp_path / "model", masked=True)
    layers = {
        f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("ffn_dim", "layers", "attention_heads")
    }
    sizes = {f"num_{k}" if "ffn" not in k else k: 8 if "ffn" in k else v for k, v in layers.items()}
    ids = {"pad_token_id": fast.pad_token_id, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
    config = transformers.ProphetNetConfig(vocab_size=320, hidden_size=16, max_position_embeddings=64, **sizes, **ids)
    getattr(transformers, name)(config).save_pretrained(tmp_path / "model")
    words = ["--model_name_or_path", str(tmp_path / "model"), "--train_file", str(tiny_reviews_path / "train.jsonl")]
    words += ["--label_words", "bad", "good"]
    for adapter in ([], ["--lora", "true"]):
        assert main(["finetune", *words, *adapter, "--output_dir", str(tmp_path / f"run{len(adapter)}")]) == 2
        assert (
            f"error: {name} predicts several tokens at once, not options: train it with "
            "zokernel.finetune.zeroth_order(Trainer)."
        ) in capsys.readouterr().err
