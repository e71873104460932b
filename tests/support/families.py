"""Tiny random models of families whose names, ties and keys differ, with inputs that they take."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

_WORDS = 120
_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_LONG = {"max_position_embeddings": 640}
_LABELS = {"vocab_size": _WORDS, "num_labels": 3, "pad_token_id": 0}
_BERT = {**_ENCODER, **_LABELS, **_LONG}
_SMALL = {**_BERT, "embedding_size": 16}
_DECODER = {**_BERT, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
_EMBEDDER = {**_DECODER, "use_cache": False}
_T5 = {**_LABELS, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "decoder_start_token_id": 0}
_SEEN = {**_ENCODER, "image_size": 16, "patch_size": 8}
_IMAGE = {**_SEEN, "num_labels": 3}


def _text() -> dict[str, Tensor]:
    ids = torch.randint(5, _WORDS, (6, 10), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(10) < torch.tensor([10, 10, 10, 7, 7, 7])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def _sound() -> dict[str, Tensor]:
    return {"input_values": torch.randn(3, 800, generator=torch.Generator().manual_seed(1))}


@dataclass(frozen=True)
class Family:
    """`heads`: other classes that open a checkpoint of `model`."""

    model: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]] = _text
    heads: tuple[str, ...] = ("AutoModel",)
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, *, widened: float = 4) -> Any:
        """The model, random in float; its answers differ by input. `widened`: how often its small weights are taken."""
        torch.manual_seed(0)
        kind = getattr(transformers, self.model)
        model = kind(kind.config_class(**self.config), **self.options).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter.std() < 0.1:
                parameter.mul_(widened)
        return model


FAMILIES = {
    "albert": Family("AlbertForSequenceClassification", _SMALL),
    "bert": Family("BertForSequenceClassification", _BERT, heads=("AutoModel", "BertForTokenClassification")),
    "bert alone": Family("BertModel", _BERT, heads=("BertForSequenceClassification",)),
    "bert without pooler": Family("BertModel", _BERT, options={"add_pooling_layer": False}),
    "bert with words": Family("BertForMaskedLM", _BERT, heads=("AutoModel", "BertForSequenceClassification")),
    "beit": Family("BeitForImageClassification", {**_IMAGE, "use_relative_position_bias": True}, _image),
    "clip": Family(
        "CLIPModel",
        {"text_config": {**_BERT, "eos_token_id": 2}, "vision_config": _SEEN, "projection_dim": 16},
        lambda: {**_text(), **_image()},
    ),
    "convnext": Family(
        "ConvNextForImageClassification",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": 3, "patch_size": 4},
        _image,
    ),
    "ctrl": Family("CTRLForSequenceClassification", {**_LABELS, "n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 64}),
    "deberta": Family(
        "DebertaV2ForSequenceClassification", {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    ),
    "detr": Family(
        "DetrForObjectDetection",
        {
            "backbone_config": {
                **{"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]},
                "out_features": ["stage2"],
            },
            **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5, "num_labels": 3},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
            **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "use_timm_backbone": False},
            **{"use_pretrained_backbone": False, "backbone": None},
        },
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))},
        heads=(),
    ),
    "dinov2": Family("Dinov2ForImageClassification", {**_IMAGE, "use_swiglu_ffn": True}, _image),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        {**_LABELS, **_LONG, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "electra": Family("ElectraForSequenceClassification", _SMALL),
    "eurobert": Family("EuroBertModel", {**_BERT, "bos_token_id": 1, "eos_token_id": 2}),
    "gemma3": Family("Gemma3ForCausalLM", _DECODER),
    "gemma3, bidirectional": Family("Gemma3TextModel", {**_EMBEDDER, "use_bidirectional_attention": True}, heads=()),
    "gpt2": Family(
        "GPT2ForSequenceClassification",
        {**_LABELS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gte": Family("GteModel", _BERT),
    "jina v3": Family("JinaEmbeddingsV3Model", _BERT),
    "llama": Family("LlamaForCausalLM", _DECODER, heads=("AutoModel", "LlamaForSequenceClassification")),
    "longformer": Family("LongformerModel", {**_BERT, "attention_window": [8, 8]}),
    "mamba": Family(
        "MambaForCausalLM",
        {"vocab_size": _WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        heads=(),
    ),
    "mobilebert with words": Family(
        "MobileBertForMaskedLM", {**_SMALL, "true_hidden_size": 16, "intra_bottleneck_size": 16}, heads=()
    ),
    "modernbert": Family(
        "ModernBertForSequenceClassification",
        {**_BERT, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "mpnet": Family("MPNetForSequenceClassification", _BERT),
    "nomic": Family("NomicBertModel", _BERT),
    "qwen2, tied": Family("Qwen2ForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
    "opt": Family("OPTForCausalLM", {**_BERT, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "qwen3": Family("Qwen3Model", _EMBEDDER),
    "roberta": Family("RobertaForSequenceClassification", _BERT, heads=("AutoModel", "RobertaForTokenClassification")),
    "llama, tied": Family("LlamaForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
    "longt5 encoder": Family("LongT5EncoderModel", _T5, heads=()),
    "swin": Family(
        "SwinForImageClassification",
        {
            **{"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]},
            **{"window_size": 4, "num_labels": 3},
        },
        _image,
    ),
    "t5": Family("T5ForConditionalGeneration", _T5, lambda: {**_text(), "decoder_input_ids": _text()["input_ids"]}, ()),
    "t5 encoder": Family("T5EncoderModel", _T5, heads=("T5ForTokenClassification",)),
    "t5 of tokens": Family("T5ForTokenClassification", _T5, heads=("T5EncoderModel",)),
    "umt5 encoder": Family("UMT5EncoderModel", _T5, heads=()),
    "vit": Family("ViTForImageClassification", _IMAGE, _image),
    "wav2vec2": Family(
        "Wav2Vec2ForSequenceClassification",
        {
            **_ENCODER,
            **{"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2},
            **{"num_labels": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
        },
        _sound,
    ),
    "xlm-roberta": Family("XLMRobertaModel", {**_BERT, "pad_token_id": 1}),
    "xlm-roberta with words": Family("XLMRobertaForMaskedLM", _BERT),
}

LEFT = ("qwen3", "gemma3, bidirectional")  # read at their last token, so padding comes first
READERS_OF_TOKENS = (
    "albert", "deberta", "distilbert", "electra", "eurobert", "gemma3, bidirectional", "gte", "jina v3", "longformer",
    "modernbert", "mpnet", "nomic", "qwen3", "roberta", "t5 encoder", "xlm-roberta",
)  # fmt: skip
