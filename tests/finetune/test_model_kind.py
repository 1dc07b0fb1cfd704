"""Which kind of language model a configuration is loaded as, and a loaded model is."""

import pytest
import transformers as tf
from transformers import BartConfig, BertConfig, LlamaConfig, T5Config, XLMConfig

from zokernel.errors import UsageError
from zokernel.finetune.models.kind import auto_class, fills_masks, kind_of_model, language_model_kind

SAVED_AS = [
    ("LlamaConfig", "LlamaForCausalLM", {}, "causal"),
    ("GPT2Config", "GPT2LMHeadModel", {}, "causal"),
    ("MambaConfig", "MambaForCausalLM", {}, "causal"),
    ("BertConfig", "BertForMaskedLM", {}, "masked"),
    ("BertConfig", "BertForPreTraining", {}, "masked"),
    ("BertConfig", "BertModel", {}, "masked"),
    ("BertConfig", "BertLMHeadModel", {"is_decoder": True}, "causal"),
    ("BertConfig", "BertLMHeadModel", {}, "causal"),
    ("RobertaConfig", "RobertaForMaskedLM", {}, "masked"),
    ("RobertaConfig", "RobertaForCausalLM", {"is_decoder": True}, "causal"),
    ("RoFormerConfig", "RoFormerForMaskedLM", {}, "masked"),
    ("RoFormerConfig", "RoFormerForCausalLM", {"is_decoder": True}, "causal"),
    ("ElectraConfig", "ElectraForMaskedLM", {}, "masked"),
    ("ElectraConfig", "ElectraForCausalLM", {"is_decoder": True}, "causal"),
    ("ReformerConfig", "ReformerModelWithLMHead", {"is_decoder": True}, "causal"),
    ("ReformerConfig", "ReformerForMaskedLM", {}, "masked"),
    ("XLMConfig", "XLMWithLMHeadModel", {}, "masked"),
    ("XLMConfig", "XLMWithLMHeadModel", {"causal": True}, "causal"),
    ("FlaubertConfig", "FlaubertWithLMHeadModel", {}, "masked"),
    ("ModernBertConfig", "ModernBertForMaskedLM", {}, "masked"),
    ("BartConfig", "BartForConditionalGeneration", {}, "seq2seq"),
    ("BartConfig", "BartForCausalLM", {"is_decoder": True, "is_encoder_decoder": False}, "causal"),
    ("MBartConfig", "MBartForConditionalGeneration", {}, "seq2seq"),
    ("MarianConfig", "MarianMTModel", {}, "seq2seq"),
    ("T5Config", "T5ForConditionalGeneration", {}, "seq2seq"),
    ("T5Config", "T5Model", {}, "seq2seq"),
]


@pytest.mark.parametrize(("config", "name", "settings", "kind"), SAVED_AS)
def test_the_class_that_was_saved_decides(config, name, settings, kind):
    architecture = getattr(tf, config)(**settings, architectures=[name])
    assert language_model_kind(architecture) == kind


@pytest.mark.parametrize(
    ("config", "settings", "kind"),
    [
        ("LlamaConfig", {}, "causal"),
        ("BertConfig", {}, "masked"),
        ("BertConfig", {"is_decoder": True}, "causal"),
        ("XLMConfig", {}, "masked"),
        ("BartConfig", {}, "seq2seq"),
        ("T5Config", {}, "seq2seq"),
    ],
)
def test_without_one_the_configuration_decides(config, settings, kind):
    assert language_model_kind(getattr(tf, config)(**settings)) == kind


def test_the_requested_kind_is_loaded_if_there_is_such_a_class():
    assert language_model_kind(BertConfig(architectures=["BertForMaskedLM"]), "causal") == "causal"
    assert language_model_kind(BartConfig(), "seq2seq") == "seq2seq"
    with pytest.raises(UsageError, match="no masked language model of type 'llama'"):
        language_model_kind(LlamaConfig(), "masked")
    with pytest.raises(UsageError, match="no causal language model of type 't5'"):
        language_model_kind(T5Config(), "causal")
    with pytest.raises(UsageError, match="no masked language model of type 'bart'"):  # transformers lists it as one
        language_model_kind(BartConfig(), "masked")
    with pytest.raises(UsageError, match="lm_type must be auto, causal, masked or seq2seq, not 'both'"):
        language_model_kind(LlamaConfig(), "both")
    with pytest.raises(UsageError, match="type 'vit' are not language models"):
        language_model_kind(tf.ViTConfig())
    with pytest.raises(UsageError, match="type 'qwen2_audio' are not language models"):  # listed as seq2seq
        language_model_kind(tf.Qwen2AudioConfig())


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("T5Config", "T5EncoderModel"),
        ("T5Config", "T5ForTokenClassification"),
        ("MT5Config", "MT5EncoderModel"),
        ("UMT5Config", "UMT5EncoderModel"),
        ("LongT5Config", "LongT5EncoderModel"),
        ("SwitchTransformersConfig", "SwitchTransformersEncoderModel"),
        ("T5GemmaConfig", "T5GemmaEncoderModel"),
    ],
)
@pytest.mark.parametrize("requested", ["auto", "seq2seq"])
def test_an_encoder_without_its_decoder_is_called_that(config, name, requested):
    """Saved alone, an encoder's configuration no longer says that its type decodes, too."""
    architecture = getattr(tf, config)(is_encoder_decoder=False, architectures=[name])
    with pytest.raises(UsageError, match=f"has no decoder, since it was saved as {name}: choose the language model"):
        language_model_kind(architecture, requested)


XLM = {"vocab_size": 50, "emb_dim": 16, "n_layers": 1, "n_heads": 2}


def test_models_whose_class_does_not_say_so_fill_masks():
    assert fills_masks(tf.XLMWithLMHeadModel(XLMConfig(**XLM)))
    assert not fills_masks(tf.XLMWithLMHeadModel(XLMConfig(**XLM, causal=True)))
    assert fills_masks(tf.FlaubertWithLMHeadModel(tf.FlaubertConfig(**XLM)))


def test_an_adapter_is_of_the_kind_of_its_base():
    import peft

    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = BertConfig(**small, intermediate_size=16)
    for model, kind in [(tf.BertForMaskedLM(small), "masked"), (tf.BertLMHeadModel(small), "causal")]:
        assert kind_of_model(model) == kind
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
        assert kind_of_model(adapted) == kind


def test_each_kind_has_its_class():
    assert [auto_class(kind) for kind in ("causal", "masked", "seq2seq")] == [
        tf.AutoModelForCausalLM,
        tf.AutoModelForMaskedLM,
        tf.AutoModelForSeq2SeqLM,
    ]
