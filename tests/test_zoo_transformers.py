"""One line attached to the architectures of Hugging Face, and nothing of it left."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import torch_dropout_ir as tdi
from tests import traces
from torch_dropout_ir.analysis.measures import Regularizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # their imports' own
    transformers = pytest.importorskip("transformers")

ENCODER = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_labels": 3,
    "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DECODER = {**ENCODER, "attention_dropout": 0.1}
GPT2 = {
    "vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT_NEO = {
    "vocab_size": 20, "hidden_size": 16, "num_layers": 2, "num_heads": 2,
    "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 32,
    "window_size": 4, "bos_token_id": 1, "eos_token_id": 2, "embed_dropout": 0.1,
    "resid_dropout": 0.1, "attention_dropout": 0.1,
}  # fmt: skip
OPT = {
    **DECODER, "ffn_dim": 16, "word_embed_proj_dim": 16, "dropout": 0.1,
    "layerdrop": 0.5,
}  # fmt: skip
DISTILBERT = {
    "vocab_size": 20, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16,
    "num_labels": 3, "max_position_embeddings": 32,
}  # fmt: skip
ALBERT = {
    **ENCODER, "embedding_size": 8, "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1, "classifier_dropout_prob": 0.1,
}  # fmt: skip
T5 = {
    "vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2,
    "num_heads": 2, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
BART = {
    "vocab_size": 20, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "max_position_embeddings": 32, "dropout": 0.1,
    "attention_dropout": 0.1, "activation_dropout": 0.1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 16, "image_size": 32, "patch_size": 16, "num_labels": 3,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2],
    "num_heads": [2, 2], "window_size": 4, "num_labels": 3, "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1, "drop_path_rate": 0.3,
}  # fmt: skip
CONVNEXT = {
    "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_labels": 3,
    "drop_path_rate": 0.3, "layer_scale_init_value": 0.5,
}  # fmt: skip
WAV2VEC2 = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 16, "conv_dim": (8, 8), "conv_stride": (4, 4),
    "conv_kernel": (8, 8), "num_labels": 3, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
    "mask_time_prob": 0.2, "mask_time_length": 2,
}  # fmt: skip


def classes(**inputs):
    return {**inputs, "labels": torch.randint(3, (len(next(iter(inputs.values()))),))}


def texts():
    """Three texts of six symbols, one of them padded."""
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[2, 4:] = 0
    return classes(input_ids=torch.randint(3, 20, (3, 6)), attention_mask=mask)


def symbols():
    """Texts to predict, with symbols that do not count."""
    x = torch.randint(3, 20, (3, 6))
    return {"input_ids": x, "labels": x.where(x != 5, -100)}


def pictures():
    return classes(pixel_values=torch.randn(2, 3, 32, 32))


def sounds():
    return classes(input_values=torch.randn(2, 400))


def of_logits(outputs, labels):
    """The loss of a classifier, as a user would write it."""
    return F.cross_entropy(outputs.logits, labels)


def own(outputs, labels):
    """The loss that the model has computed itself."""
    return outputs.loss


# By name: the class, its configuration, batches, and sites by a piece of their names.
ZOO = {
    "bert": (
        "BertForSequenceClassification", ENCODER, texts,
        {"bert.encoder.layer.0.attention.self:{attention}#0", "dropout"},
    ),
    "roberta": (
        "RobertaForSequenceClassification", ENCODER, texts,
        {"roberta.encoder.layer.1.output.dropout", "classifier.dropout"},
    ),
    "distilbert": (
        "DistilBertForSequenceClassification", DISTILBERT, texts,
        {"distilbert.transformer.layer.1.ffn.dropout"},
    ),
    "electra": (
        "ElectraForSequenceClassification", {**ENCODER, "embedding_size": 8}, texts,
        {"electra.embeddings.dropout", "classifier.dropout"},
    ),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        {**ENCODER, "pos_att_type": ["p2c", "c2p"], "relative_attention": True}, texts,
        {"deberta.encoder.layer.0.attention.self.pos_dropout"},
    ),
    "albert": (
        "AlbertForSequenceClassification", ALBERT, texts,
        {"albert.encoder.albert_layer_groups.0.albert_layers.0.attention"
         ".output_dropout"},
    ),
    "gpt2": (
        "GPT2LMHeadModel", GPT2, symbols,
        {"transformer.drop", "transformer.h.1.attn:{attention}#0"},
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM", GPT_NEO, symbols,
        {"transformer.h.1.attn.attention.attn_dropout"},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM", {**DECODER, "hidden_dropout": 0.1}, symbols,
        {"gpt_neox.layers.1.post_mlp_dropout"},
    ),
    "opt": ("OPTForCausalLM", OPT, symbols, set()),
    "llama": (
        "LlamaForCausalLM", {**DECODER, "num_key_value_heads": 1}, symbols,
        {"model.layers.0.self_attn:{attention}#0"},
    ),
    "mixtral": (  # whose hooks keep what its loss reads
        "MixtralForCausalLM",
        {**DECODER, "num_key_value_heads": 1, "num_local_experts": 3,
         "num_experts_per_tok": 2, "output_router_logits": True},
        symbols, {"model.layers.0.self_attn:{attention}#0"},
    ),
    "phi": (
        "PhiForCausalLM", {**DECODER, "resid_pdrop": 0.1, "embd_pdrop": 0.1}, symbols,
        {"model.embed_dropout", "model.layers.1.self_attn:{attention}#0"},
    ),
    "t5": (
        "T5ForConditionalGeneration", T5, symbols,
        {"decoder.block.1.layer.2.DenseReluDense.dropout",
         "decoder.block.0.layer.1.EncDecAttention:{attention}#0"},
    ),
    "bart": (
        "BartForConditionalGeneration", BART, symbols,
        {"model.encoder:dropout#0", "model.decoder.layers.1:dropout#3",
         "model.decoder.layers.0.encoder_attn:{attention}#0"},
    ),
    "vit": (
        "ViTForImageClassification", VIT, pictures,
        {"vit.embeddings.dropout", "vit.layers.1.attention:{attention}#0"},
    ),
    "swin": (
        "SwinForImageClassification", SWIN, pictures,
        {"swin.encoder.layers.1.blocks.1.drop_path"},
    ),
    "convnext": (
        "ConvNextForImageClassification", CONVNEXT, pictures,
        {"convnext.encoder.stages.3.layers.0.drop_path"},
    ),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification", WAV2VEC2, sounds,
        {"wav2vec2.encoder.layers.0.feed_forward.intermediate_dropout"},
    ),
}  # fmt: skip
# Noise that is no dropout: layers skipped at random, times masked.
HIDDEN = {
    "opt": {"model.decoder:rand"},
    "wav2vec2": {"wav2vec2.encoder:rand", ":numpy.random"},
}
# Their attention is their own, whatever is asked for.
OWN_ATTENTION = {"deberta", "gpt_neo", "convnext"}
CASES = [(name, "sdpa") for name in ZOO if name not in OWN_ATTENTION]
CASES += [(name, "eager") for name in ZOO if name in OWN_ATTENTION]
CASES += [(name, "eager") for name in ("bert", "gpt2", "llama", "t5", "bart", "vit")]


def made(name, attention):
    """A model of a configuration: nothing is downloaded."""
    kind, options, *_ = ZOO[name]
    kind = getattr(transformers, kind)
    config = kind.config_class(**options, attn_implementation=attention)
    config.loss_type = getattr(config, "loss_type", None) or "ForCausalLM"
    return kind(config).train()


def script(name, attention="sdpa"):
    """What makes the model, its loss on a batch, and what the analysis is told."""
    batch = ZOO[name][2]
    return (
        lambda: made(name, attention),
        lambda model: model(**batch()).loss,
        own if batch is symbols else of_logits,
    )


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_it_measures_and_leaves_no_trace(name, attention):
    analysis = traces.compared(*script(name, attention))
    function = "dropout" if attention == "eager" else "scaled_dot_product_attention"
    sites = {site.format(attention=function) for site in ZOO[name][3]}
    observed, measured = traces.assert_measured(analysis, sites)
    # A layer that the pass has dropped whole has no part of R_1.
    drops_layers = any(place.endswith(":rand") for place in HIDDEN.get(name, ()))
    assert measured == observed or (drops_layers and measured < observed)
    hidden = {site.name: site.reason for site in analysis.sites if not site.observed}
    assert HIDDEN.get(name, set()) <= set(hidden)
    noise = {site for site, reason in hidden.items() if "not called" not in reason}
    assert noise == HIDDEN.get(name, set())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_under_gradient_checkpointing_it_leaves_no_trace():
    make, loss_of, loss = script("gpt2")

    def checkpointed():
        model = make()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    traces.assert_measured(traces.compared(checkpointed, loss_of, loss))


@pytest.mark.parametrize("name", ["gpt2", "t5", "swin"])
def test_r1_is_what_dropout_adds_to_the_loss_that_the_model_returns(name):
    torch.manual_seed(0)
    model, (_, _, loss), batch = made(name, "eager"), script(name), ZOO[name][2]()
    fit = torch.optim.Adam(model.eval().parameters(), lr=0.01)
    for _ in range(20):  # before it, R_1 is smaller than what masks make of the loss
        fit.zero_grad()
        model(**batch).loss.backward()
        fit.step()
    sgd = torch.optim.SGD(model.train().parameters(), lr=0.0)
    with tdi.attach_analysis(
        model, loss, log_dir=False, every=1, measures=[Regularizer(num_masks=100)]
    ) as analysis:
        model(**batch).loss.backward()
        sgd.step()
    with torch.no_grad():
        noisy = torch.stack([model(**batch).loss for _ in range(400)])
        clean = model.eval()(**batch).loss
    found = analysis.latest
    assert found["loss/R_S"] == pytest.approx(float(clean), rel=1e-5)
    error = found["regularizer/R1_standard_error"]
    assert 0 < error < 1.5 * float(noisy.std()) / 100**0.5
    both = (error**2 + float(noisy.var()) / len(noisy)) ** 0.5
    assert found["regularizer/R1"] > 15 * both  # so that a wrong number is seen
    assert abs(found["regularizer/R1"] - float((noisy - clean).mean())) < 4 * both
