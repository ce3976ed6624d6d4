"""The transformers families of the coverage table, each as small as its configuration allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

WIDTH = 32
LAYERS = 3
HEADS = 4
VOCABULARY = 99
LENGTH = 7

TEXT = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 64, "vocab_size": VOCABULARY,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
VISION = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 64, "image_size": 32, "patch_size": 8,
}  # fmt: skip
STAGES = {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16, "image_size": 64}
SPEECH = {
    **TEXT, "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False,
}  # fmt: skip
SEQ2SEQ = {
    "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": VOCABULARY,
}  # fmt: skip


def _tokens(batch: int, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def text(batch: int, length: int = LENGTH) -> dict[str, Any]:
    """Tokens, the last of some sequences being padding."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1::2, -2:] = 0
    return {"input_ids": _tokens(batch, length), "attention_mask": mask}


def plain_text(batch: int, length: int = LENGTH) -> dict[str, Any]:
    """Tokens without a mask."""
    return {"input_ids": _tokens(batch, length)}


def translation(batch: int, length: int = LENGTH) -> dict[str, Any]:
    """Tokens in and tokens out, of different lengths."""
    return {**text(batch, length), "decoder_input_ids": _tokens(batch, max(length - 2, 1))}


def pixels(size: int = 32) -> Callable[..., dict[str, Any]]:
    """Pictures."""
    return lambda batch, length=0: {"pixel_values": torch.randn(batch, 3, size, size)}


def captions(size: int = 32) -> Callable[..., dict[str, Any]]:
    """Pictures and texts."""
    return lambda batch, length=LENGTH: {**text(batch, length), **pixels(size)(batch)}


def waves(batch: int, length: int = 0) -> dict[str, Any]:
    """Sound."""
    return {"input_values": torch.randn(batch, 400)}


def spectra(batch: int, length: int = LENGTH) -> dict[str, Any]:
    """Spectrograms, and tokens out."""
    return {
        "input_features": torch.randn(batch, 80, 40),
        "decoder_input_ids": _tokens(batch, length),
    }


@dataclass
class Family:
    """One family: its classes, a small configuration, and what has to be found.

    Attributes:
        config, model: Names of classes of transformers.
        options: What the configuration is made with.
        inputs: A batch from its size (and the length of its sequences).
        blocks, branches: How many there are, from the configuration: layers, and what each adds.
        named: Whether it is one of the families that the project promises.
    """

    config: str
    model: str
    options: dict[str, Any]
    inputs: Callable[..., dict[str, Any]]
    blocks: int
    branches: int
    named: bool = field(default=True)

    def build(self, batch: int, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
        config = getattr(transformers, self.config)(**{**self.options, **options})
        for name in vars(config):
            if "drop" in name and isinstance(getattr(config, name), float):
                setattr(config, name, 0.0)
        # With a cache and without gradients, as in many checks, nothing would be dropped.
        for part in (config, *vars(config).values()):
            if hasattr(part, "use_cache"):
                part.use_cache = False
        model = getattr(transformers, self.model)(config)
        return model, self.inputs(batch)


def _text(name: str, options: dict[str, Any] | None = None, **more: Any) -> Family:
    """A stack of layers with two branches each, called as ``NameConfig`` and ``NameModel``."""
    settings = {"inputs": text, "blocks": LAYERS, "branches": 2 * LAYERS, **more}
    return Family(f"{name}Config", f"{name}Model", options or TEXT, **settings)


def _vision(name: str, options: dict[str, Any] | None = None, **more: Any) -> Family:
    return _text(name, options or VISION, **{"inputs": pixels(), **more})


_CLIP = {
    "text_config": {**TEXT, "max_position_embeddings": 32, "eos_token_id": 2},
    "vision_config": VISION,
    "projection_dim": 16,
}

_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}

# attention and MLP side by side: both are summed first, and then reach the skip in one sum
_PARALLEL = {"branches": LAYERS}

FAMILIES: dict[str, Family] = {
    "bert": _text("Bert"),
    "roberta": _text("Roberta"),
    "deberta": _text("Deberta", {**TEXT, **_RELATIVE}),
    "deberta_v2": _text("DebertaV2", {**TEXT, **_RELATIVE}),
    "distilbert": _text(
        "DistilBert",
        {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 64, "vocab_size": 99},
    ),
    "electra": _text("Electra", {**TEXT, "embedding_size": 16}),
    # one layer, used three times
    "albert": _text("Albert", {**TEXT, "embedding_size": 16}, blocks=1, branches=2),
    "modernbert": _text("ModernBert", {**TEXT, "pad_token_id": 0, "local_attention": 4}),
    "vit": _vision("ViT"),
    "deit": _vision("DeiT"),
    "beit": _vision("Beit", {**VISION, "drop_path_rate": 0.1}),
    "dinov2": _vision("Dinov2", {**VISION, "drop_path_rate": 0.1}),
    "dinov3_vit": _vision("DINOv3ViT", {**VISION, "drop_path_rate": 0.1}),
    "dinov3_convnext": _vision(
        "DINOv3ConvNext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
        inputs=pixels(64), blocks=5, branches=5,
    ),
    "swin": _vision("Swin", {**STAGES, "window_size": 4}, inputs=pixels(64), blocks=4, branches=8),
    "swinv2": _vision(
        "Swinv2", {**STAGES, "window_size": 4}, inputs=pixels(64), blocks=4, branches=8
    ),
    "hiera": _vision(
        "Hiera",
        {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2],
         "image_size": [64, 64]},
        inputs=pixels(64), blocks=5, branches=10,
    ),
    "segformer": _vision(
        "Segformer",
        {
            "depths": [2, 2, 1, 1], "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 16,
        },
        inputs=pixels(64), blocks=6, branches=12,
    ),
    "convnext": _vision(
        "ConvNext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, inputs=pixels(64),
        blocks=5, branches=5,
    ),
    "convnextv2": _vision(
        "ConvNextV2", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, inputs=pixels(64),
        blocks=5, branches=5,
    ),
    "resnet": _vision(
        "ResNet",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1]},
        inputs=pixels(64), blocks=5, branches=5,
    ),
    "clip": Family("CLIPConfig", "CLIPModel", _CLIP, captions(), 2 * LAYERS, 4 * LAYERS),
    "siglip": Family(
        "SiglipConfig", "SiglipModel",
        {"text_config": {**TEXT, "max_position_embeddings": 32}, "vision_config": VISION},
        captions(), 2 * LAYERS, 4 * LAYERS,
    ),
    "llama": _text("Llama", GROUPED),
    "mistral": _text("Mistral", {**GROUPED, "sliding_window": 4}),
    "qwen2": _text("Qwen2", GROUPED),
    "qwen3": _text("Qwen3", GROUPED),
    "gemma2": _text("Gemma2", {**GROUPED, "sliding_window": 4}),
    "phi3": _text("Phi3", GROUPED),
    "olmo2": _text("Olmo2", GROUPED),
    "gpt2": _text(
        "GPT2", {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCABULARY}
    ),
    "gpt_neox": _text("GPTNeoX", **_PARALLEL),
    "opt": _text("OPT", {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": WIDTH}),
    "bloom": _text(
        "Bloom", {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": 99}
    ),
    "falcon": _text("Falcon", **_PARALLEL),
    "mixtral": _text(
        "Mixtral",
        # the grouped product of torch takes no float64
        {**GROUPED, "num_local_experts": 3, "experts_implementation": "eager"},
    ),
    "t5": Family(
        "T5Config", "T5Model",
        {
            "d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS,
            "num_decoder_layers": LAYERS, "num_heads": HEADS, "vocab_size": VOCABULARY,
        },
        # attention and feed-forward are elements of a list, and blocks of their own
        translation, 5 * LAYERS, 5 * LAYERS,
    ),
    "bart": Family("BartConfig", "BartModel", SEQ2SEQ, translation, 2 * LAYERS, 5 * LAYERS),
    "whisper": Family(
        "WhisperConfig", "WhisperModel",
        {
            **SEQ2SEQ, "max_source_positions": 20, "max_target_positions": 20,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
        },
        spectra, 2 * LAYERS, 5 * LAYERS,
    ),
    "wav2vec2": _text("Wav2Vec2", SPEECH, inputs=waves),
    "hubert": _text("Hubert", SPEECH, inputs=waves),
    "mamba": _text(
        "Mamba",
        {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": 99, "state_size": 4},
        inputs=plain_text, branches=LAYERS,
    ),
    # Not promised, and as much of a test as any.
    "gemma": _text("Gemma", GROUPED, named=False),
    "gemma3": _text(
        "Gemma3Text", {**GROUPED, "sliding_window": 4}, named=False
    ),
    "phi": _text("Phi", **_PARALLEL, named=False),
    "cohere": _text("Cohere", GROUPED, named=False),
    "stablelm": _text("StableLm", GROUPED, named=False),
    "starcoder2": _text("Starcoder2", GROUPED, named=False),
    "gptj": _text(
        "GPTJ",
        {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": 99, "rotary_dim": 4},
        **_PARALLEL, named=False,
    ),
    "gpt_neo": _text(
        "GPTNeo",
        {
            "hidden_size": WIDTH, "num_layers": 2, "num_heads": HEADS, "vocab_size": 99,
            "attention_types": [[["global", "local"], 1]], "window_size": 4,
        },
        blocks=2, branches=4, named=False,
    ),
    "granite": _text("Granite", GROUPED, named=False),
    "mpnet": _text("MPNet", named=False),
    "xlnet": _text(
        "XLNet",
        {"d_model": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "d_inner": 64, "vocab_size": 99},
        blocks=2 * LAYERS,  # the residual of attention is added in a module of its own
        named=False,
    ),
    # its Fourier transform has no parameters: only the MLP is a branch
    "fnet": _text("FNet", inputs=plain_text, branches=LAYERS, named=False),
    "roformer": _text("RoFormer", named=False),
    "esm": _text("Esm", {**TEXT, "pad_token_id": 0, "mask_token_id": 1}, named=False),
    "mamba2": _text(
        "Mamba2",
        {
            "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": 99, "state_size": 4,
            "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4,
        },
        inputs=plain_text, branches=LAYERS, named=False,
    ),
    "mbart": Family(
        "MBartConfig", "MBartModel", SEQ2SEQ, translation, 2 * LAYERS, 5 * LAYERS, named=False
    ),
    "vit_mae": _vision("ViTMAE", {**VISION, "mask_ratio": 0.0}, named=False),
    "ijepa": _vision("IJepa", named=False),
    # its pooling is linear: only the MLP is a branch
    "poolformer": _vision(
        "PoolFormer", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1]},
        inputs=pixels(64), blocks=5, branches=5, named=False,
    ),
    "regnet": _vision(
        "RegNet", {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1]},
        inputs=pixels(64), blocks=5, branches=5, named=False,
    ),
    "wavlm": _text("WavLM", SPEECH, inputs=waves, named=False),
    "audio_spectrogram": Family(
        "ASTConfig", "ASTModel",
        {**VISION, "num_mel_bins": 16, "max_length": 24, "patch_size": 8},
        lambda batch, length=0: {"input_values": torch.randn(batch, 24, 16)},
        LAYERS, 2 * LAYERS, named=False,
    ),
}  # fmt: skip
