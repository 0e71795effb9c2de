"""The model: a vision transformer, a connector, a decoder, and the VLM that splices them.

    pixels ── ViT (hidden states at a few levels) ─► connector (Chain-of-Sight, or linear) ─► V visual tokens
    V tokens ─► spliced into the slots of the text ─► decoder ─► head at supervised positions only

Read it top to bottom: configs and presets, the two backbones, the connector and its token scaling
(arXiv 2407.15819), the VLM, generation, loading and saving. Weights keep Hugging Face names in each half.

Alphabet of all shape comments: B rows, T positions, I images, P patches an image, S patches a side,
W window side, V visual tokens an image, K kept tokens, D width, H heads, N vocabulary, R supervised
positions.
"""

import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import prune

# ---------------------------------------------------------------------------------------------------------
# Configs. The command line of every script is made from such dataclasses by `parse_cli`.


ASSETS = Path(__file__).parent / "assets"


class UserError(Exception):
    """What can be wrong with a user's input: one sentence that names the thing, the place and the fix."""


@dataclass
class ViTConfig:
    image_size: int = 64  # pixels a side
    patch_size: int = 8
    width: int = 128
    layers: int = 4
    heads: int = 4
    mlp_width: int = 512
    activation: str = "quick_gelu"  # or "gelu"
    norm_eps: float = 1e-5
    align_corners: bool = (
        False  # of the bicubic position resize: False as transformers, True as Chain-of-Sight's code
    )


@dataclass
class DecoderConfig:
    vocab_size: int = 512
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp_width: int = 384
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    tied: bool = True  # head = embedding table


@dataclass
class ConnectorConfig:
    kind: str = "chain"  # "chain": Chain-of-Sight; "linear": every patch by itself, the W = 1 baseline
    levels: list[int] = field(
        default_factory=lambda: [2, 4]
    )  # ViT hidden states read, low to high (0: embeddings)
    width: int = 128
    heads: int = 4
    windows: list[int] = field(
        default_factory=lambda: [8, 2]
    )  # window side of each scale in patches, coarse to fine
    queries: list[int] = field(default_factory=lambda: [16, 1])  # learned queries in each window of the scale
    key_positions: bool = (
        False  # not in the paper: a learned position inside the window, added to keys and values
    )


@dataclass
class PruneConfig:
    name: str = "divprune"  # which tokens the fast mode keeps: see prune.PRUNERS
    keep: float = 0.1  # a share of the visual tokens, or a count if above 1
    isolator: int = 4  # learned vectors in front of pruned tokens (DualSpeed: 4)


@dataclass
class ImageConfig:
    """How the encoder wants its pictures (its preprocessor_config.json); travels with every checkpoint."""

    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    std: list[float] = field(default_factory=lambda: [0.25, 0.25, 0.25])
    resample: int = 3  # Pillow's number: 2 bilinear, 3 bicubic


@dataclass
class ModelConfig:
    image: ImageConfig = field(default_factory=ImageConfig)
    vit: ViTConfig = field(default_factory=ViTConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    encoder_from: str = ""  # folder with pre-trained weights in Hugging Face layout; "" starts at random
    decoder_from: str = ""  # the same
    tokenizer_from: str = str(ASSETS / "scenes.tiktoken")  # a tiktoken rank file or a Hugging Face folder

    @property
    def side(self) -> int:
        return self.vit.image_size // self.vit.patch_size

    def visual_tokens(self, mode: str = "full") -> int:
        """How many positions one image takes: the one owner of this number.

        "full": all tokens of the connector; "pruned": what the fast mode keeps, its isolator included.
        """
        if self.connector.kind == "linear":
            full = self.side**2
        else:
            full = sum(
                (self.side // w) ** 2 * q for w, q in zip(self.connector.windows, self.connector.queries)
            )
        return full if mode == "full" else prune.kept_tokens(full, self.prune.keep) + self.prune.isolator

    def check(self) -> "ModelConfig":
        """Reject geometry that cannot work, before anything is built."""
        if self.vit.image_size % self.vit.patch_size:
            raise UserError(
                f"vit.image_size {self.vit.image_size} is no multiple of vit.patch_size {self.vit.patch_size}"
            )
        c = self.connector
        if c.kind not in ("chain", "linear"):
            raise UserError(f"connector.kind '{c.kind}' is unknown: use chain or linear")
        if len(c.windows) != len(c.queries):
            raise UserError(
                f"connector.windows {c.windows} and connector.queries {c.queries} differ in length"
            )
        for window in c.windows if c.kind == "chain" else []:
            if window < 1 or self.side % window:
                divisors = [w for w in range(1, self.side + 1) if self.side % w == 0]
                raise UserError(
                    f"connector.windows: {window} does not divide the {self.side}x{self.side} patch grid "
                    f"({self.vit.image_size} px / patch {self.vit.patch_size}); windows that do: {divisors}"
                )
        if not c.levels or min(c.levels) < 0 or max(c.levels) > self.vit.layers:
            raise UserError(
                f"connector.levels {c.levels} must lie in 0..{self.vit.layers}, the ViT's hidden states"
            )
        if c.width % c.heads:
            raise UserError(f"connector.width {c.width} is not a multiple of connector.heads {c.heads}")
        if self.prune.name not in prune.PRUNERS:
            raise UserError(
                f"prune.name '{self.prune.name}' is unknown: use one of {', '.join(prune.PRUNERS)}"
            )
        return self


# A preset is a model and a recipe for each stage: what trains, at which rate. The rates of `tiny` are ours.
PRESETS = {
    "tiny": {
        "model": ModelConfig(
            prune=PruneConfig(keep=0.25),
            encoder_from=str(ASSETS / "tiny_vit"),
            decoder_from=str(ASSETS / "tiny_lm"),
        ),
        "pretrain": {"train": "connector,decoder", "steps": 500, "lr": 2e-3, "muon_lr": 0.01},
        "sft": {"train": "connector,decoder", "steps": 300, "lr": 1e-3, "muon_lr": 0.005},
    },
}


def preset(name: str) -> dict:
    if name not in PRESETS:
        raise UserError(f"--preset '{name}' is unknown: use one of {', '.join(PRESETS)}")
    return PRESETS[name]


# ---------------------------------------------------------------------------------------------------------
# Vision transformer


class Attention(nn.Module):
    """Multi-head self-attention of the ViT, CLIP's names."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(self.q_proj(x), self.heads)  # (I, H, P, D/H)
        k = split_heads(self.k_proj(x), self.heads)
        v = split_heads(self.v_proj(x), self.heads)
        return self.out_proj(merge_heads(attend(q, k, v)))  # (I, P, D)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)  # (..., T, D) -> (..., H, T, D/H)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).flatten(-2)  # (..., H, T, D/H) -> (..., T, D)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The one place where attention is computed: (..., H, T, d); k and v may have fewer heads.

    On a CPU always in fp32: the backward pass of its bf16 kernel is 2-4 times slower at our lengths (LOG.md).
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    with torch.autocast("cpu", enabled=False):
        wide = torch.promote_types(v.dtype, torch.float32)
        q, k, values = q.to(wide), k.to(wide), v.to(wide)
        out = F.scaled_dot_product_attention(q, k, values, attn_mask=mask, enable_gqa=True)
    return out.to(v.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str = "gelu"):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class ViTBlock(nn.Module):
    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.self_attn = Attention(cfg.width, cfg.heads)
        self.layer_norm2 = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.mlp = MLP(cfg.width, cfg.mlp_width, cfg.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ViTEmbeddings(nn.Module):
    """Patches as one linear map, a CLS token in front, learned positions resized to the grid at hand."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg = cfg
        self.class_embedding = nn.Parameter(torch.randn(cfg.width) * 0.02)
        self.patch_embedding = nn.Conv2d(3, cfg.width, cfg.patch_size, stride=cfg.patch_size, bias=False)
        self.position_embedding = nn.Embedding((cfg.image_size // cfg.patch_size) ** 2 + 1, cfg.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """(I, 3, pixels, pixels) -> (I, 1 + P, D)"""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (I, P, D)
        cls = self.class_embedding.expand(len(patches), 1, -1)  # (I, 1, D)
        return torch.cat([cls, patches], 1) + self.positions(pixels.shape[-1] // self.cfg.patch_size)

    def positions(self, side: int) -> Tensor:
        """Position embeddings for a side x side grid: bicubic from the stored grid, CLS kept. (1 + side^2,
        D)
        """
        weight = self.position_embedding.weight
        if len(weight) == side**2 + 1:
            return weight
        stored = math.isqrt(len(weight) - 1)
        grid = weight[1:].reshape(1, stored, stored, -1).permute(0, 3, 1, 2)  # (1, D, S, S)
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=self.cfg.align_corners)
        return torch.cat([weight[:1], grid.flatten(2)[0].T])


class ViT(nn.Module):
    """CLIP's vision tower (pre-LN, with the extra LayerNorm before the first block)."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg = cfg
        self.embeddings = ViTEmbeddings(cfg)
        self.pre_layrnorm = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)  # the missing "e" is CLIP's
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.layers))})
        self.post_layernorm = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)
        init_linear(self)

    def hidden_states(self, pixels: Tensor, last: int | None = None) -> tuple[Tensor, ...]:
        """What transformers returns: embeddings after the pre-LayerNorm, then the output of each block.

        pixels: (I, 3, side, side), normalised. Every entry is (I, 1 + P, D). Stops after block `last`.
        """
        states = [self.pre_layrnorm(self.embeddings(pixels))]
        for block in self.encoder["layers"][:last]:
            states.append(block(states[-1]))
        return tuple(states)

    def resize(self, image_size: int) -> None:
        """Keep the weights, move to another resolution: the position table is resized once and for all."""
        with torch.no_grad():
            positions = self.embeddings.positions(image_size // self.cfg.patch_size)
        self.embeddings.position_embedding = nn.Embedding.from_pretrained(positions.clone(), freeze=False)
        self.cfg = dataclasses.replace(self.cfg, image_size=image_size)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "ViT":
        """From a folder in Hugging Face layout: CLIPVisionModel, today's key names or with
        `vision_model.`.
        """
        config = read_json(Path(path) / "config.json")
        if config.get("model_type") != "clip_vision_model":
            raise UserError(
                f"{path}/config.json: model_type '{config.get('model_type')}' is not clip_vision_model"
            )
        known = {
            ours: config[theirs] for ours, theirs in CLIP_NAMES.items() if config.get(theirs) is not None
        }
        if known.get("activation", "quick_gelu") not in ACTIVATIONS:
            raise UserError(
                f"{path}/config.json: hidden_act '{known['activation']}' is not in {list(ACTIVATIONS)}"
            )
        vit = cls(ViTConfig(**known))
        weights = {k.removeprefix("vision_model."): v for k, v in read_weights(path).items()}
        load_weights(vit, weights, path)
        return vit

    def save_pretrained(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        config = {theirs: getattr(self.cfg, ours) for ours, theirs in CLIP_NAMES.items()}
        write_json(Path(path) / "config.json", {"model_type": "clip_vision_model", **config})
        write_weights(
            Path(path) / "model.safetensors", {k: v.to(dtype) for k, v in self.state_dict().items()}
        )


CLIP_NAMES = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
}


def init_linear(module: nn.Module, std: float = 0.02) -> None:
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.trunc_normal_(m.weight, std=std)
        if isinstance(m, nn.Linear) and m.bias is not None:
            nn.init.zeros_(m.bias)


# ---------------------------------------------------------------------------------------------------------
# Decoder (Llama and its relatives)


def rope_tables(positions: Tensor, cfg: DecoderConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, fp32: (B, T) -> two of (B, 1, T, head_dim)."""
    steps = torch.arange(0, cfg.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = cfg.rope_theta ** (-steps / cfg.head_dim)
    angle = positions[:, None, :, None].float() * frequency  # (B, 1, T, head_dim / 2)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention of Llama's Hugging Face weights."""
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def document_mask(doc_ids: Tensor) -> Tensor:
    """Causal, and only within a document: (B, T) -> (B, 1, T, T), True where a row may look at a column.

    Padding is a document of its own (-1), so no row is empty and no softmax turns into NaN.
    """
    T = doc_ids.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=doc_ids.device).tril()
    return causal & (doc_ids[:, None, :, None] == doc_ids[:, None, None, :])


class KVCache:
    """Keys and values of all layers, written in place: (layers, B, Hkv, T_max, head_dim)."""

    def __init__(self, cfg: DecoderConfig, rows: int, length: int, like: Tensor):
        shape = (cfg.layers, rows, cfg.kv_heads, length, cfg.head_dim)
        self.k = torch.zeros(shape, device=like.device, dtype=like.dtype)
        self.v = torch.zeros_like(self.k)
        self.used = 0

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.used + k.shape[2]
        self.k[layer, :, :, self.used : end] = k
        self.v[layer, :, :, self.used : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class DecoderAttention(nn.Module):
    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.cfg = cfg
        self.q_proj = nn.Linear(cfg.width, cfg.heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.width, cfg.kv_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.width, cfg.kv_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(cfg.heads * cfg.head_dim, cfg.width, bias=False)
        if cfg.qk_norm:
            self.q_norm = nn.RMSNorm(cfg.head_dim, eps=cfg.norm_eps)
            self.k_norm = nn.RMSNorm(cfg.head_dim, eps=cfg.norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None, layer: int
    ) -> Tensor:
        q = split_heads(self.q_proj(x), self.cfg.heads)  # (B, H, T, head_dim)
        k = split_heads(self.k_proj(x), self.cfg.kv_heads)  # (B, Hkv, T, head_dim)
        v = split_heads(self.v_proj(x), self.cfg.kv_heads)
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache:
            k, v = cache.put(layer, k, v)
        return self.o_proj(merge_heads(attend(q, k, v, mask)))  # (B, T, D)


class SwiGLU(nn.Module):
    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.width, cfg.mlp_width, bias=False)
        self.up_proj = nn.Linear(cfg.width, cfg.mlp_width, bias=False)
        self.down_proj = nn.Linear(cfg.mlp_width, cfg.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(nn.Module):
    def __init__(self, cfg: DecoderConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.input_layernorm = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.self_attn = DecoderAttention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.mlp = SwiGLU(cfg)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, self.layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A Llama-style causal decoder; `Decoder(ids)` gives the logits of all positions."""

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.width)
        self.layers = nn.ModuleList(DecoderBlock(cfg, i) for i in range(cfg.layers))
        self.norm = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.width, cfg.vocab_size, bias=False)
        init_linear(self)
        if cfg.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def hidden(self, x: Tensor, positions: Tensor, mask: Tensor, cache: KVCache | None = None) -> Tensor:
        """Embeddings (B, T, D) to final hidden states (B, T, D)."""
        rope = rope_tables(positions, self.cfg)
        for block in self.layers:  # with a cache past a compiled block, which would recompile at every length
            x = block.forward(x, rope, mask, cache) if cache else block(x, rope, mask)
        if cache:
            cache.used += x.shape[1]
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        mask = document_mask(torch.zeros_like(ids))
        return self.lm_head(self.hidden(self.embed_tokens(ids), positions, mask))  # (B, T, N)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Decoder":
        """From a folder in Hugging Face layout; config.json in today's form or with a bare `rope_theta`."""
        config = read_json(Path(path) / "config.json")
        family = config.get("model_type")
        if family not in ("llama", "qwen2", "qwen3"):
            raise UserError(f"{path}/config.json: model_type '{family}' is not one of llama, qwen2, qwen3")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or config.get("use_sliding_window"):
            raise UserError(f"{path}/config.json: rope type '{kind}' or a sliding window is not supported")
        known = {
            ours: config[theirs] for ours, theirs in LLAMA_NAMES.items() if config.get(theirs) is not None
        }
        known.setdefault("tied", False)
        known.setdefault("head_dim", known["width"] // known["heads"])
        known.setdefault("kv_heads", known["heads"])
        known["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        known["qkv_bias"] = family == "qwen2" or config.get("attention_bias", False)
        decoder = cls(DecoderConfig(**known, qk_norm=family == "qwen3"))
        weights = {k.removeprefix("model."): v for k, v in read_weights(path).items()}
        if decoder.cfg.tied:
            weights["lm_head.weight"] = weights["embed_tokens.weight"]
        load_weights(decoder, weights, path)
        return decoder

    def save_pretrained(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        cfg = self.cfg
        config = {theirs: getattr(cfg, ours) for ours, theirs in LLAMA_NAMES.items()}
        config["model_type"] = "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama"
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": cfg.rope_theta}
        write_json(Path(path) / "config.json", config)
        weights = {
            k if k == "lm_head.weight" else f"model.{k}": v.to(dtype) for k, v in self.state_dict().items()
        }
        if cfg.tied:
            del weights["lm_head.weight"]
        write_weights(Path(path) / "model.safetensors", weights)


LLAMA_NAMES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}


# ---------------------------------------------------------------------------------------------------------
# Connector: Chain-of-Sight's multi-scale resampler (arXiv 2407.15819, section 3)


class WindowBlock(nn.Module):
    """Queries look at the patches of their own window, then an MLP: one scale at one ViT level."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_queries = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(context_width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(context_width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)

    def forward(self, queries: Tensor, context: Tensor, key_positions: Tensor | None) -> Tensor:
        """queries (I or 1, windows, q, D), context (I, windows, W*W, C) -> (I, windows, q, D)

        At the first level the queries are the same for all images: they come with I = 1 and are projected
        once.
        """
        images, windows = context.shape[:2]
        context = self.norm_context(context)
        if key_positions is not None:
            context = context + key_positions
        q = self.to_q(self.norm_queries(queries)).expand(images, -1, -1, -1)
        k, v = self.to_kv(context).chunk(2, -1)
        q, k, v = (
            split_heads(x.flatten(0, 1), self.heads) for x in (q, k, v)
        )  # (I*windows, H, q or W*W, D/H)
        out = merge_heads(attend(q, k, v)).unflatten(0, (images, windows))
        queries = queries + self.to_out(out)  # (I, windows, q, D)
        return queries + self.mlp(self.norm_mlp(queries))


class Scale(nn.Module):
    """One scale: own queries for every window, one block a level, shared over the windows."""

    def __init__(self, cfg: ConnectorConfig, context_width: int, side: int, window: int, n_queries: int):
        super().__init__()
        self.window, self.per_side = window, side // window
        self.queries = nn.Parameter(torch.empty(self.per_side**2, n_queries, cfg.width))
        self.blocks = nn.ModuleList(WindowBlock(cfg.width, context_width, cfg.heads) for _ in cfg.levels)
        self.key_positions = (
            nn.Parameter(torch.empty(window**2, context_width)) if cfg.key_positions else None
        )
        init_linear(self, std=0.64 / math.sqrt(cfg.width))  # 0.02 at the published width of 1024
        for p in (self.queries, self.key_positions):
            if p is not None:
                nn.init.trunc_normal_(p, std=0.02)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """levels: low to high, each (I, P, C) -> (I, windows * q, D): windows row-major, then query."""
        x = self.queries[None]  # (1, windows, q, D)
        for block, level in zip(self.blocks, levels):
            x = block(x, cut_windows(level, self.window), self.key_positions)
        return x.flatten(1, 2)

    @torch.no_grad()
    def inflate_from(self, source: "Scale", factor: int) -> None:
        """Parameter inflation: weights are copied as they are, a new window takes the queries of the old
        window that it lies in (nearest neighbour on the grid of windows, so both axes are repeated, not the
        flat list).
        """
        self.blocks.load_state_dict(source.blocks.state_dict())
        grid = source.queries.unflatten(0, (source.per_side, source.per_side))
        grid = grid.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        self.queries.copy_(grid.flatten(0, 1))
        if self.key_positions is not None:  # as a ViT's positions: bicubic from the old window to the new
            old = source.key_positions.T.reshape(1, -1, source.window, source.window)
            new = F.interpolate(old, size=(self.window, self.window), mode="bicubic")
            self.key_positions.copy_(new[0].flatten(1).T)


def cut_windows(x: Tensor, window: int) -> Tensor:
    """(I, P, C) patches in raster order -> (I, windows, W*W, C), windows in raster order."""
    side = math.isqrt(x.shape[1])
    n = side // window
    x = x.reshape(len(x), n, window, n, window, -1).transpose(2, 3)  # (I, n, n, W, W, C)
    return x.reshape(len(x), n * n, window * window, -1)


class ChainOfSight(nn.Module):
    """Scales from coarse to fine, concatenated: a causal decoder reads the whole before the details.

    Window side 1 is a linear projection, window side S a plain resampler; Chain-of-Sight lies between. All
    scales share the last LayerNorm and Linear. No exchange between windows or scales: the chain is only the
    order.
    """

    def __init__(self, cfg: ConnectorConfig, context_width: int, side: int, out_width: int):
        super().__init__()
        sizes = zip(cfg.windows, cfg.queries)
        self.scales = nn.ModuleList(Scale(cfg, context_width, side, window, n) for window, n in sizes)
        self.norm = nn.LayerNorm(cfg.width)
        self.proj = nn.Linear(cfg.width, out_width)
        init_linear(self.proj)

    def forward(self, levels: list[Tensor], n_scales: int | None = None) -> Tensor:
        """levels: patches at cfg.levels, each (I, P, C) -> (I, V, D); only the first n_scales if given."""
        return self.proj(self.norm(torch.cat([scale(levels) for scale in self.scales[:n_scales]], 1)))


class Linear(nn.Module):
    """Every patch of the highest level by itself: the baseline with all tokens (the LayerNorm is ours)."""

    def __init__(self, cfg: ConnectorConfig, context_width: int, side: int, out_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(context_width)
        self.proj = nn.Linear(context_width, out_width)
        init_linear(self.proj)

    def forward(self, levels: list[Tensor]) -> Tensor:
        return self.proj(self.norm(levels[-1]))  # (I, P, C) -> (I, P, D)


CONNECTORS = {"chain": ChainOfSight, "linear": Linear}

# Token scaling (section 3.2, Table 4). name: (tokens before, tokens after, resolution factor,
# the new scales as (source scale, factor on windows a side)). Tokens grow by the square of the factor.
# The counts are the table's; the same step may start from another base with the same two scales, see
# `scale_up`.
SCALINGS = {
    "80to80": (80, 80, 2, [(0, 1), (1, 1)]),  # resolution alone
    "80to144w": (80, 144, 1, [(0, 1), (0, 2), (1, 1)]),  # window scaling at the same resolution
    "80to272w": (80, 272, 1, [(0, 1), (1, 2)]),
    "80to336w": (80, 336, 1, [(0, 1), (0, 2), (1, 2)]),
    "80to144": (
        80,
        144,
        2,
        [(0, 1), (0, 2), (1, 1)],
    ),  # resolution scaling: windows keep their size in patches
    "80to272": (80, 272, 2, [(0, 1), (1, 2)]),
    "80to336": (80, 336, 2, [(0, 1), (0, 2), (1, 2)]),
    "80to528": (80, 528, 2, [(0, 1), (0, 4), (1, 2)]),  # compound scaling: both
    "80to1104": (
        80,
        1104,
        2,
        [(0, 1), (1, 1), (1, 4)],
    ),  # the table prints windows 32,16,2: a likely misprint
    "80to1296": (80, 1296, 2, [(0, 1), (0, 4), (1, 4)]),
    "32to336": (32, 336, 2, [(0, 1), (0, 2), (1, 4)]),  # not spelled out in the paper: ours
    "32to528": (32, 528, 2, [(0, 1), (0, 4), (1, 4)]),
    "48to784": (48, 784, 2, [(0, 1), (0, 4), (1, 4)]),
    "32to144": (32, 144, 2, [(0, 1), (0, 2), (1, 2)]),  # the step of 80to336 from 32 tokens: the demo's
}


def scaled_config(cfg: ModelConfig, name: str) -> ModelConfig:
    """The config after a named scaling step; refuses one that starts from another number of tokens."""
    if name not in SCALINGS:
        close = difflib.get_close_matches(name, SCALINGS, 1)
        raise UserError(
            f"--scale '{name}' is unknown{f', did you mean {close[0]}?' if close else ''} "
            f"Known: {', '.join(SCALINGS)}"
        )
    before, after, resolution, sources = SCALINGS[name]
    old = cfg.connector
    if old.kind != "chain" or len(old.windows) != 2 or cfg.visual_tokens() != before:
        raise UserError(
            f"--scale {name} starts from two scales with {before} tokens, "
            f"this model has {cfg.visual_tokens()} in {len(old.windows)}"
        )
    new = dataclasses.replace(
        cfg, vit=dataclasses.replace(cfg.vit, image_size=cfg.vit.image_size * resolution)
    )
    windows = []
    for source, factor in sources:
        per_side = cfg.side // old.windows[source] * factor
        windows.append(new.side // per_side if new.side % per_side == 0 else 0)  # 0 is refused by check()
    new.connector = dataclasses.replace(
        old, windows=windows, queries=[old.queries[source] for source, _ in sources]
    )
    if new.check().visual_tokens() != after:
        raise UserError(f"--scale {name} would give {new.visual_tokens()} tokens: its base has other windows")
    return new


def scale_up(vlm: "VLM", name: str, inflate: bool = True) -> None:
    """Scale the visual tokens of a model in place, by inflation or, to compare, with random new scales."""
    cfg = scaled_config(vlm.cfg, name)
    old = vlm.connector
    new = ChainOfSight(cfg.connector, cfg.vit.width, cfg.side, cfg.decoder.width).to(old.proj.weight)
    new.norm, new.proj = old.norm, old.proj
    for scale, (source, factor) in zip(new.scales, SCALINGS[name][3]):
        if inflate or factor == 1:
            scale.inflate_from(old.scales[source], factor)
    vlm.vit.resize(cfg.vit.image_size)
    vlm.connector, vlm.cfg = new, cfg


# ---------------------------------------------------------------------------------------------------------
# The VLM


class VLM(nn.Module):
    """Encoder, connector and decoder. `vlm(batch)` gives the logits of student and teacher."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg.check()
        self.vit = ViT(cfg.vit)
        self.connector = CONNECTORS[cfg.connector.kind](
            cfg.connector, cfg.vit.width, cfg.side, cfg.decoder.width
        )
        self.decoder = Decoder(cfg.decoder)
        self.isolator = prune.ModeIsolator(cfg.prune.isolator, cfg.decoder.width)
        self.register_buffer("pixel_mean", torch.tensor(cfg.image.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(cfg.image.std).view(3, 1, 1) * 255, persistent=False)

    @classmethod
    def build(cls, cfg: ModelConfig) -> "VLM":
        """A new model from pre-trained halves, whose shapes replace those in cfg; the connector is new."""
        if cfg.encoder_from:
            vit = ViT.from_pretrained(cfg.encoder_from)
            cfg.vit = dataclasses.replace(vit.cfg, image_size=cfg.vit.image_size)
            cfg.check()
            vit.resize(cfg.vit.image_size)
            cfg.image = read_preprocessor(Path(cfg.encoder_from))
        if cfg.decoder_from:
            decoder = Decoder.from_pretrained(cfg.decoder_from)
            cfg.decoder = decoder.cfg
        vlm = cls(cfg)
        if cfg.encoder_from:
            vlm.vit = vit
        if cfg.decoder_from:
            vlm.decoder = decoder
        # Visual tokens enter at the scale of text embeddings: behind a LayerNorm every input of the last
        # Linear has
        # unit variance, so weights of std rms / sqrt(fan in) give outputs with the rms of the embedding
        # table.
        rms = vlm.decoder.embed_tokens.weight.float().pow(2).mean().sqrt().item()
        nn.init.normal_(vlm.connector.proj.weight, std=rms / math.sqrt(vlm.connector.proj.in_features))
        return vlm

    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 (I, 3, size, size) -> visual tokens (I, V, D), all of them."""
        levels = self.cfg.connector.levels
        trains = self.vit.embeddings.class_embedding.requires_grad and torch.is_grad_enabled()
        with torch.set_grad_enabled(trains):  # a frozen encoder keeps no activations
            pixels = (pixels.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
            states = self.vit.hidden_states(pixels, last=max(levels))
        tokens = self.connector([states[level][:, 1:] for level in levels])  # without CLS
        if tokens.shape[1] != self.cfg.visual_tokens():
            raise RuntimeError(
                f"the connector gives {tokens.shape[1]} tokens, slots are {self.cfg.visual_tokens()}"
            )
        return tokens

    def bank(self, batch) -> Tensor | None:
        """All visual tokens that slots may refer to: (I*V, D), then the pruned ones (I*(l+K), D)."""
        if not len(batch.pixels):
            return None
        full = self.encode(batch.pixels)  # (I, V, D)
        if not batch.pruned:
            return full.flatten(0, 1)
        keep = prune.kept_tokens(full.shape[1], self.cfg.prune.keep)
        grid = self.cfg.side if self.cfg.connector.kind == "linear" else 0  # one raster of tokens, or none
        chosen = prune.select(self.cfg.prune.name, full, keep, grid=grid, seed=batch.next_sample)
        kept = prune.gather(full, chosen)  # (I, K, D)
        return torch.cat([full.flatten(0, 1), self.isolator(kept).flatten(0, 1)])

    def splice(self, rows, bank: Tensor | None) -> Tensor:
        """Text embeddings with visual tokens in the slots: (B, T, D)"""
        x = self.decoder.embed_tokens(rows.ids)
        if bank is None or not len(rows.visual_index):
            return x
        visual = bank[rows.visual_index].to(x.dtype)
        return x.masked_scatter(rows.slot_mask[..., None], visual)

    def logits(self, rows, x: Tensor) -> Tensor:
        """The head at supervised positions only: (R, N), fp32."""
        hidden = self.decoder.hidden(x, rows.positions, document_mask(rows.doc_ids))
        return self.decoder.lm_head(hidden.flatten(0, 1)[rows.supervised]).float()

    def forward(self, batch) -> tuple[Tensor, Tensor | None]:
        """Student logits (R, N), and for slow samples the teacher's (R', N): pruned tokens, no gradient.

        Student and teacher share one pass of the encoder and the connector.
        """
        bank = self.bank(batch)
        teacher = None
        if batch.teacher is not None:
            with torch.no_grad():
                teacher = self.logits(batch.teacher, self.splice(batch.teacher, bank.detach()))
        x = self.splice(batch.student, bank)
        if bank is None or not len(
            batch.student.visual_index
        ):  # a batch of text: touch what it leaves out, so that DDP finds every gradient
            seen = [self.vit, self.connector, self.isolator]
            x = x + 0.0 * sum(p.sum() for part in seen for p in part.parameters() if p.requires_grad)
        return self.logits(batch.student, x), teacher

    def set_trainable(self, parts: list[str], isolator: bool) -> None:
        """Freeze everything but the named parts ("vit", "connector", "decoder"); the isolator if it is
        used.
        """
        self.requires_grad_(False)
        for name in parts:
            getattr(self, name).requires_grad_(True)
        self.isolator.requires_grad_(isolator)
        self.vit.encoder["layers"][max(self.cfg.connector.levels) :].requires_grad_(False)  # never run
        self.vit.post_layernorm.requires_grad_(False)

    @torch.no_grad()
    def generate(
        self, batch, end: int, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        """Continue the rows of `data.prompt_batch`: the new ids of each row, without `end`.

        temperature 0 takes the likeliest token; above, it samples from softmax(logits / temperature).
        """
        rows = batch.student
        x = self.splice(rows, self.bank(batch))
        B, T = rows.ids.shape
        cache = KVCache(self.cfg.decoder, B, T + max_new_tokens, self.decoder.embed_tokens.weight)
        hidden = self.decoder.hidden(x, rows.positions, document_mask(rows.doc_ids), cache)
        visible = F.pad(rows.doc_ids >= 0, (0, max_new_tokens), value=True)  # (B, T + new)
        position = rows.positions[:, -1:]
        draw = torch.Generator(x.device).manual_seed(seed)
        new = torch.full((B, max_new_tokens), end, device=x.device)
        ended = torch.zeros(B, dtype=torch.bool, device=x.device)
        for t in range(max_new_tokens):
            logits = self.decoder.lm_head(hidden[:, -1]).float()  # (B, N)
            if temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=draw)[:, 0]
            else:
                token = logits.argmax(-1)
            new[:, t] = torch.where(ended, end, token)
            ended |= token == end
            if ended.all() or t == max_new_tokens - 1:
                break
            position = position + 1
            mask = visible[:, None, None, : T + t + 1]
            hidden = self.decoder.hidden(self.decoder.embed_tokens(new[:, t : t + 1]), position, mask, cache)
        return [row[: row.index(end)] if end in row else row for row in new.tolist()]

    def save_pretrained(self, folder: Path, extra: dict | None = None) -> None:
        """model.safetensors, config.json (the model's and `extra`), preprocessor.json."""
        weights = self.state_dict()
        if self.cfg.decoder.tied:
            del weights["decoder.lm_head.weight"]
        write_weights(folder / "model.safetensors", weights)
        write_json(
            folder / "preprocessor.json",
            {"image_size": self.cfg.vit.image_size, **dataclasses.asdict(self.cfg.image)},
        )
        write_json(folder / "config.json", {"model": dataclasses.asdict(self.cfg), **(extra or {})})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "VLM":
        """From a run folder (its newest complete step) or a step folder."""
        folder = find_step(path)
        vlm = cls(from_dict(ModelConfig, read_run_config(folder, "model")["model"]))
        weights = read_weights(folder)
        if vlm.cfg.decoder.tied:
            weights["decoder.lm_head.weight"] = weights["decoder.embed_tokens.weight"]
        load_weights(vlm, weights, folder)
        return vlm


def find_device(name: str) -> str:
    """ "cpu" or "cuda" for a --device of auto, cpu or cuda."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device '{name}' is unknown: use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def require_at_least(config, least: float, names: str) -> None:
    """Refuse flags below a bound."""
    for name in names.split():
        if getattr(config, name) < least:
            raise UserError(f"--{name} {getattr(config, name)}: must be at least {least}")


def trainable_parts(train: str) -> list[str]:
    """--train "vit,connector" as a list of parts of the VLM."""
    parts = train.split(",")
    for part in parts:
        if part not in ("vit", "connector", "decoder"):
            raise UserError(f"--train '{part}' is unknown: use a comma list of vit, connector, decoder")
    return parts


def read_preprocessor(folder: Path) -> ImageConfig:
    if not (folder / "preprocessor_config.json").is_file():
        raise UserError(
            f"{folder}/preprocessor_config.json is missing: the encoder's image mean and std are not known"
        )
    theirs = read_json(folder / "preprocessor_config.json")
    return ImageConfig(theirs["image_mean"], theirs["image_std"], theirs.get("resample", 3))


def read_run_config(step: Path, key: str = "train") -> dict:
    """config.json of a checkpoint of ours: {"model", and of a run "stage", "train", ...}."""
    config = read_json(step / "config.json")
    if key not in config:
        raise UserError(f"{step} is no run of this project; halves go to --encoder_from and --decoder_from")
    return config


def find_step(path: str | Path) -> Path:
    """A run folder leads to the step named in its file `latest`; a step folder to itself."""
    path = Path(path)
    if (path / "latest").is_file():
        return path / (path / "latest").read_text().strip()
    if not (path / "model.safetensors").is_file():
        raise UserError(
            f"{path} is neither a run folder (with a file 'latest') nor a checkpoint (with model.safetensors)"
        )
    return path


# ---------------------------------------------------------------------------------------------------------
# Files. Every write goes to a temporary name, then os.replace: a reader never meets half a file.


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        return json.loads(path.read_text())
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e})") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{path} line {e.lineno} column {e.colno}: not valid JSON ({e.msg})") from None


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    file = Path(path) / "model.safetensors"
    if not file.is_file():
        raise UserError(f"{file} does not exist: {path} holds no weights")
    try:
        return load_file(file)
    except SafetensorError as e:
        raise UserError(f"{file} is damaged or no safetensors file ({e})") from None


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, temporary)
    os.replace(temporary, path)


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Strict: names the first tensor that is missing, unknown or of another shape."""
    own = module.state_dict()
    weights = {
        k: v for k, v in weights.items() if not k.endswith("position_ids")
    }  # a buffer in older CLIP files
    for name in own:
        if name not in weights:
            raise UserError(f"{source}: tensor '{name}' is missing")
        if weights[name].shape != own[name].shape:
            raise UserError(
                f"{source}: tensor '{name}' is {tuple(weights[name].shape)}, not {tuple(own[name].shape)}"
            )
    for name in weights:
        if name not in own:
            raise UserError(f"{source}: tensor '{name}' is not part of this model")
    module.load_state_dict(weights)


# ---------------------------------------------------------------------------------------------------------
# The command line: every script has a dataclass of flags; nested fields get dotted names.


def copy_config(config):
    return from_dict(type(config), dataclasses.asdict(config))


def from_dict(cls, values: dict):
    """Rebuild a nested dataclass from dataclasses.asdict."""
    hints = typing.get_type_hints(cls)
    nested = {
        k: from_dict(hints[k], v) if dataclasses.is_dataclass(hints[k]) else v
        for k, v in values.items()
        if k in hints
    }
    return cls(**nested)


def flags_of(config, prefix: str = "") -> dict[str, tuple]:
    """Flag name -> (object, field, type, comment): the comment behind the field is its help text."""
    source = "".join(inspect.getsource(cls) for cls in type(config).__mro__[:-1])
    flags = {}
    for name, kind in typing.get_type_hints(type(config)).items():
        if dataclasses.is_dataclass(kind):
            flags.update(flags_of(getattr(config, name), f"{prefix}{name}."))
        else:
            comment = re.search(rf"^    {name}:(?:(?!\n    \w+:)[^#])*#(.*)$", source, re.M)
            flags[prefix + name] = (config, name, kind, comment[1].strip() if comment else "")
    return flags


def changed_flags(before, after) -> list[str]:
    """Names of the flags whose values differ between two configs of one type."""
    old, new = flags_of(before), flags_of(after)
    return [name for name in old if getattr(*old[name][:2]) != getattr(*new[name][:2])]


def parse_value(flag: str, text: str, kind):
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if typing.get_origin(kind) is list:
            return [typing.get_args(kind)[0](item) for item in text.split(",")]
        return kind(text)
    except (ValueError, KeyError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(
            kind, "a comma list of numbers"
        )
        raise UserError(f"--{flag} '{text}': expected {wanted}") from None


def parse_cli(argv: list[str], doc: str, *configs) -> None:
    """Set the fields of `configs` from `--name value` or `--name=value`; --help prints them with defaults."""
    flags = {name: entry for config in configs for name, entry in flags_of(config).items()}
    if "--help" in argv or "-h" in argv:
        print(doc.strip() + "\n\nflags (defaults in brackets):")
        for name, (config, attribute, _, comment) in flags.items():
            print(f"  --{name} [{getattr(config, attribute)}]".ljust(40) + f"  {comment}")
        raise SystemExit(0)
    words = [part for word in argv for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    while words:
        name = words.pop(0)
        if not name.startswith("--") or name[2:] not in flags:
            close = difflib.get_close_matches(name.lstrip("-"), flags, 1)
            raise UserError(
                f"unknown flag '{name}'" + (f", did you mean --{close[0]}?" if close else "; see --help")
            )
        if not words:
            raise UserError(f"{name} needs a value")
        config, attribute, kind, _ = flags[name[2:]]
        setattr(config, attribute, parse_value(name[2:], words.pop(0), kind))


def run_cli(main) -> None:
    """An entry point: a UserError, or what the system says of a path, becomes one line and exit code 2."""
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
