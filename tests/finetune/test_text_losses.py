"""The loss of chats and texts: trl's, whatever the head does, packed or not, and with few logits at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from chats import MARKED, chat_tokenizer, turns
from models import build

from zokernel.errors import UsageError
from zokernel.finetune.data.check_text import text_encoder
from zokernel.finetune.data.collate_text import TextCollator, TextDataset, pack
from zokernel.finetune.data.repeat import repeat_batch
from zokernel.finetune.scoring.language import LanguageObjective
from zokernel.finetune.scoring.language_head import blocks_agree, token_losses
from zokernel.finetune.scoring.prepare_text import language_objective
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.tasks.encode_text import EncodedText
from zokernel.finetune.tasks.text import TextTask
from zokernel.optim import MeZO
from zokernel.perturb import InForward, Stacked

SMALL = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SMALL, "intermediate_size": 48, "max_position_embeddings": 128}
GROUPED = {**WIDE, "num_key_value_heads": 2}
# What follows the head, or comes before it, in each its own way.
OTHERS = {
    "gemma2, soft-capped": (
        "Gemma2",
        {**GROUPED, "head_dim": 8, "final_logit_softcapping": 3.0},
    ),
    "cohere, scaled": ("Cohere", {**GROUPED, "logit_scale": 0.3}),
    "granite, divided": ("Granite", {**GROUPED, "logits_scaling": 3.0}),
    "gpt_neox": ("GPTNeoX", WIDE),
    "opt, projected": (
        "OPT",
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 128},
    ),
    "mamba": ("Mamba", {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2}),
}


def other(name):
    family, settings = OTHERS[name]
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    config = getattr(transformers, f"{family}Config")(**settings, **ids)
    return loud(getattr(transformers, f"{family}ForCausalLM")(config))


def loud(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return loud(build("llama"))


def documents(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        EncodedText(torch.randint(5, 119, (n,), generator=generator).tolist(), list(range(max(1, n // 3), n)), [n])
        for n in sizes
    ]


def collated(examples):
    return TextCollator(1)([vars(example) for example in examples])


def plain_losses(model, examples):
    """Return the loss of each scored token from all logits of one row after the other."""
    scored = []
    for example in examples:
        ids = torch.tensor(example.input_ids)
        losses = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1].float(), ids[1:], reduction="none")
        scored.append(losses[torch.tensor(example.scored) - 1])
    return torch.cat(scored)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", *OTHERS])
def test_losses_are_those_of_the_models_own_logits(name, llama):
    model, examples = llama if name == "llama" else other(name), documents(20, 9, 33, 14)
    expected = plain_losses(model, examples)
    for block in (1, 7, 512):
        torch.testing.assert_close(token_losses(model, collated(examples), block=block)[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(token_losses(model, collated(examples), whole=True)[0], expected, rtol=0, atol=1e-5)
    assert blocks_agree(model, collated(examples))
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_no_more_logits_exist_than_those_of_a_block(llama):
    counts = []
    handle = llama.lm_head.register_forward_hook(lambda module, args, logits: counts.append(logits.numel() // 120))
    token_losses(llama, collated(documents(40, 30)), block=16)
    handle.remove()
    assert counts == [16, 16, 15]  # 27 and 20 scored tokens


@torch.no_grad()
def test_a_head_in_fp32_computes_in_fp32_under_autocast(llama):
    examples = documents(20, 9)
    with torch.autocast("cpu", torch.bfloat16):
        kinds = []
        handle = llama.lm_head.register_forward_hook(lambda module, args, logits: kinds.append(logits.dtype))
        token_losses(llama, collated(examples), block=8)
        handle.remove()
    assert set(kinds) == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2, soft-capped", "gpt_neox", "opt, projected"])
def test_packed_documents_have_the_losses_that_they_have_alone(name, llama):
    model, examples = llama if name == "llama" else other(name), documents(20, 9, 33, 14, 30, 7)
    rows = pack(examples, 44)
    assert [row.lengths for row in rows] == [[33, 9], [30, 14], [20, 7]]
    order = [33, 9, 30, 14, 20, 7]
    expected = plain_losses(model, sorted(examples, key=lambda e: order.index(len(e.input_ids))))
    torch.testing.assert_close(token_losses(model, collated(rows))[0], expected, rtol=0, atol=1e-5)


def test_packing_is_refused_where_documents_would_see_each_other():
    dataset = TextDataset(pack(documents(20, 9, 33, 14), 44))
    with pytest.raises(UsageError, match=r"cannot keep packed texts apart.*--packing"):
        language_objective(other("mamba"), TextCollator(1), dataset)


def test_a_refusal_to_pack_names_the_window_of_attention(caplog):
    config = transformers.MistralConfig(**GROUPED, sliding_window=8, pad_token_id=1)
    torch.manual_seed(0)
    model = loud(transformers.MistralForCausalLM(config))
    dataset = TextDataset(pack(documents(20, 9, 33, 14), 44))
    with (
        caplog.at_level("INFO"),
        pytest.raises(UsageError, match=r"leave out --packing, or lower --max_length to .* 8 tok"),
    ):
        language_objective(model, TextCollator(1), dataset)
    assert "share one row" not in caplog.text


def test_a_model_without_a_known_backbone_computes_all_logits_at_once(llama, monkeypatch, caplog):
    monkeypatch.setattr(type(llama), "base_model_prefix", "nothing")
    monkeypatch.setattr(type(llama), "get_decoder", lambda self: self)
    examples = documents(20, 9)
    objective = language_objective(llama, TextCollator(1), TextDataset(examples))
    assert objective.whole
    assert "cannot compute its logits in blocks" in caplog.text
    with torch.no_grad():
        expected = plain_losses(llama, examples).mean()
        torch.testing.assert_close(objective(llama, collated(examples)), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_evaluation_weighs_tokens_however_they_are_batched(llama):
    examples, objective = documents(20, 9, 33, 14), LanguageObjective()
    parts = [objective.evaluate(llama, collated(part))[1]["terms"] for part in (examples[:1], examples[1:])]
    prediction = type("Prediction", (), {"predictions": torch.cat(parts)})
    expected = plain_losses(llama, examples).double().mean().item()
    assert objective.total_loss(prediction) == pytest.approx(expected, abs=1e-6)
    assert objective.metrics(prediction) == {"perplexity": pytest.approx(torch.tensor(expected).exp().item(), rel=1e-5)}
    assert objective.weight(collated(examples)) == sum(len(e.scored) for e in examples)


def lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("rows", ["apart", "packed"])
def test_stacked_losses_of_an_adapter_are_those_taken_in_place(llama, rows):
    model, objective = lora(llama), LanguageObjective()
    examples = documents(20, 9, 33, 14)
    batch = collated(pack(examples, 44) if rows == "packed" else examples)
    stacked = Stacked(lambda copies: objective.stacked(model, repeat_batch(batch, copies), copies))
    options = {"lr": 0.0, "eps": 1e-2, "num_perturbations": 3}
    losses = []
    for perturb in (None, stacked):
        params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        optimizer = MeZO(params, **options, **({"perturb": perturb} if perturb else {}))
        optimizer.step(lambda: objective(model, batch))
        losses.append(torch.tensor(optimizer.record()))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)
    assert losses[0].std() > 1e-4


@pytest.mark.parametrize("block", [16, 512])
def test_losses_in_forward_are_those_taken_in_place(llama, block):
    batch = collated(documents(20, 9, 33, 14))
    losses = []
    for perturb in ({}, {"perturb": InForward()}):
        optimizer = MeZO(llama.named_parameters(), lr=0.0, eps=1e-2, num_perturbations=2, **perturb)
        for _ in range(2):  # the first forward is learned from
            optimizer.step(lambda: token_losses(llama, batch, block=block).mean())
        losses.append(torch.tensor(optimizer.record()))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=2e-5)


ROWS = {
    "messages": [{"messages": turns("Hi", "Hello", "And?", "Bye", system="S")}, {"messages": turns("good?", "bad")}],
    "prompt-completion": [
        {"prompt": "Was it", "completion": " good"},
        {"prompt": "A film, ", "completion": "bad ends"},
    ],
    "prompt-completion of messages": [
        {"prompt": turns("Hi"), "completion": turns("Hi", "Hello")[1:]},
        {"prompt": turns("a film", system="S"), "completion": turns("", "bad it is")[1:]},
    ],
    "text": [{"text": "It was a good film."}, {"text": "bad"}],
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_tokens_and_loss_are_those_of_trl(llama, tmp_path, name, whole):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer, form = chat_tokenizer(MARKED), name.split(" ")[0]
    flags = {}
    if form == "messages":
        flags = {"assistant_only_loss": not whole}
    elif form == "prompt-completion":
        flags = {"completion_only_loss": not whole}
    length = 20
    llama.resize_token_embeddings(len(tokenizer))
    config = trl.SFTConfig(str(tmp_path), max_length=length, use_cpu=True, report_to="none", **flags)
    reference = trl.SFTTrainer(
        llama, config, train_dataset=datasets.Dataset.from_list(ROWS[name]), processing_class=tokenizer
    )
    task = TextTask(form=form)
    encoder = text_encoder(task, tokenizer, DataArguments(**flags), max_length=length)
    examples = encoder.encode(task.read(ROWS[name], where="train"), where="train")
    expected = [reference.train_dataset[n] for n in range(len(examples))]
    assert [e.input_ids for e in examples] == [row["input_ids"] for row in expected]
    for example, row in zip(examples, expected, strict=True):
        assert example.scored == [n for n, label in enumerate(row["labels"]) if label != -100 and n]
    model = reference.model.eval()
    with torch.no_grad():
        batch = reference.data_collator(expected)
        outputs = model(**batch, use_cache=False, fused_lm_head=True)
        losses = token_losses(model, collated(examples))[0]
        torch.testing.assert_close(losses, -outputs.log_probs[outputs.label_mask], rtol=0, atol=1e-6)
        loss = reference.compute_loss(model, dict(batch))
        assert LanguageObjective()(model, collated(examples)).item() == pytest.approx(loss.item(), abs=1e-6)
