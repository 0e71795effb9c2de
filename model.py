"""The model: a vision transformer, a connector, a decoder, and the VLM that splices them.

    pixels ── ViT (hidden states at a few levels) ─► connector (Chain-of-Sight, MM1's, …) ─► V visual tokens
    V tokens ─► spliced into the slots of the text ─► decoder ─► head at supervised positions only

Read it top to bottom: configs, the two backbones, LoRA, the connectors and their token scaling (arXiv
2407.15819), the VLM, generation, files, the hub, presets, the plan. Weights keep Hugging Face names in each
half. As a script it does what needs no training:

    python model.py --preset 7b --plan --gpus 8             what a preset costs, counted without weights
    python model.py --download REPO[@REVISION] --to DIR     a repository (default: to weights/REPO)
    python model.py --export RUN OUT                        encoder/ and decoder/, Hugging Face layout

Alphabet of all shape comments: B rows, T positions, I images, P patches an image, S patches a side,
W window side, V visual tokens an image, K kept tokens, D width, H heads, N vocabulary, R supervised
positions.
"""

import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import pickle
import re
import shutil
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import FlopCounterMode

import prune

# ---------------------------------------------------------------------------------------------------------
# Configs. The command line of every script is made from such dataclasses by `parse_cli`.


ASSETS = Path(__file__).parent / "assets"


class UserError(Exception):
    """What can be wrong with a user's input: one sentence that names the thing, the place and the fix."""


@dataclass
class ViTConfig:
    """CLIP's shape by default; the switches below make it SigLIP, AIMv2 or DINOv2, see VIT_FAMILIES."""

    image_size: int = 64  # pixels a side; 0: what the pre-trained encoder's preprocessor says
    patch_size: int = 8
    width: int = 128
    layers: int = 4
    heads: int = 4
    mlp_width: int = 512
    activation: str = "quick_gelu"  # quick_gelu, gelu, gelu_pytorch_tanh or silu
    norm_eps: float = 1e-5
    align_corners: bool = (
        False  # of the position resize: False as transformers, True as Chain-of-Sight's code
    )
    family: str = "clip"  # whose names the weights have on disk: clip, siglip, aimv2 or dinov2
    cls_token: bool = True
    pre_norm: str = "after"  # a norm "before" or "after" the positions are added, "" for none
    rms_norm: bool = False  # RMSNorm instead of LayerNorm
    gated_mlp: bool = False  # SwiGLU instead of two layers
    patch_bias: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    layer_scale: bool = False  # a learned factor on what each half of a block adds


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
    rope_factor: float = 1.0  # Llama 3's stretching of slow rotations; 1: none
    rope_low: float = 1.0  # fewer turns than this in rope_length positions: stretched by rope_factor
    rope_high: float = 4.0  # more turns than this: left as they are
    rope_length: int = 8192  # the context before stretching
    norm_eps: float = 1e-6
    context: int = 2048  # positions it was trained for; nothing here depends on it, exports state it
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    tied: bool = True  # head = embedding table
    experts: int = 0  # MLPs of a sparse layer, two of which see each token; 0: all layers are dense
    expert_every: int = 2  # every n-th layer is sparse: of each n the last
    capacity: float = 2.0  # tokens that an expert takes in training, in shares of tokens / experts

    def sparse(self, layer: int) -> bool:
        return self.experts > 0 and (layer + 1) % self.expert_every == 0


@dataclass
class LoraConfig:
    rank: int = 0  # of the adapters on the decoder's seven linears; 0: none
    alpha: float = 64.0  # their outputs are scaled by alpha / rank


@dataclass
class ConnectorConfig:
    kind: str = "chain"  # chain (Chain-of-Sight), resampler, linear, mlp, avgpool, attnpool or cabstractor
    levels: list[int] = field(default_factory=lambda: [2, 4])  # ViT hidden states read, low to high
    width: int = 128
    heads: int = 4
    windows: list[int] = field(default_factory=lambda: [8, 2])  # chain: sides in patches, coarse to fine
    queries: list[int] = field(default_factory=lambda: [16, 1])  # chain: learned queries in each window
    tokens: int = 16  # resampler and the pooled kinds: tokens an image (a square number if on a grid)
    key_positions: bool = False  # not in the paper: learned positions in a window, on keys and values
    reverse: bool = False  # not in the paper, which found it worse: fine tokens before coarse ones
    plan: str = ""  # chain: 32, 48, 80 or 336 sets windows and queries, see SCALE_PLANS


@dataclass
class PruneConfig:
    name: str = "divprune"  # which tokens the fast mode keeps: see prune.PRUNERS
    keep: float = 0.1  # a share of the visual tokens, or a count if above 1
    isolator: int = 4  # learned vectors in front of pruned tokens (DualSpeed: 4)
    isolator_per: str = "tile"  # in front of every tile's tokens (DualSpeed's code), or once an "image"


@dataclass
class ImageConfig:
    """How the encoder wants its pictures (its preprocessor_config.json); travels with every checkpoint."""

    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    std: list[float] = field(default_factory=lambda: [0.25, 0.25, 0.25])
    resample: int = 3  # Pillow's number: 2 bilinear, 3 bicubic
    cut: str = ""  # into views of vit.image_size: split, anyres, unpad (--resolution); "" or pad: one


@dataclass
class ModelConfig:
    image: ImageConfig = field(default_factory=ImageConfig)
    vit: ViTConfig = field(default_factory=ViTConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    encoder_from: str = ""  # pre-trained: a Hugging Face folder or downloaded repo; "" starts at random
    decoder_from: str = ""  # the same
    tokenizer_from: str = ""  # a tokenizer's folder or rank file; "": decoder_from's, else that of Scenes

    @property
    def side(self) -> int:
        return self.vit.image_size // self.vit.patch_size

    def scales(self) -> list[tuple[int, int]]:
        """(window side, queries a window) of each scale; a plain resampler is one window over all patches."""
        c = self.connector
        return [(self.side, c.tokens)] if c.kind == "resampler" else [*zip(c.windows, c.queries)]

    def grid(self) -> int:
        """Side of the raster that the visual tokens form, 0 if they form none."""
        if self.connector.kind in ("linear", "mlp"):
            return self.side
        return math.isqrt(self.connector.tokens) if self.connector.kind in ("avgpool", "cabstractor") else 0

    def visual_tokens(self, mode: str = "full", views: int = 1) -> int:
        """How many positions the views of a picture take: the one owner of this number. Which tokens those
        are, and what "unpad" drops of them, is in data.picture_slots.

        "full": all tokens of the connector; "pruned": what the fast mode keeps, isolators included.
        """
        full = sum(self.scale_tokens()) or self.grid() ** 2 or self.connector.tokens
        isolators = views if self.prune.isolator_per == "tile" else 1
        return (
            views * full if mode == "full" else views * self.kept_tokens() + isolators * self.prune.isolator
        )

    def scale_tokens(self) -> list[int]:
        """Tokens of each of Chain-of-Sight's scales, none of another connector."""
        chain = self.connector.kind == "chain"
        return [(self.side // window) ** 2 * queries for window, queries in self.scales() if chain]

    def kept_tokens(self) -> int:
        """What the pruner leaves of a view, without isolator."""
        p, full = self.prune, self.visual_tokens()
        return prune.kept_tokens(p.name, p.keep, full, self.grid(), self.scale_tokens())

    def coarse_scales(self) -> int:
        """How many of Chain-of-Sight's scales the pruner "coarse" keeps."""
        return [*accumulate(self.scale_tokens())].index(self.kept_tokens()) + 1

    def fits(self, pruner: str) -> bool:
        """Whether that pruner can act on this connector's tokens."""
        c, where = self.connector, prune.PRUNERS[pruner].where
        return {
            "tokens": True, "grid": self.grid() > 0, "scales": c.kind == "chain" and not c.reverse,
            "patches": c.kind in ("linear", "mlp") and max(c.levels) > 0,
        }[where]  # fmt: skip

    def check(self) -> "ModelConfig":
        """Reject geometry that cannot work, before anything is built."""
        v, c = self.vit, self.connector
        if v.image_size < 1 or self.lora.rank < 0:
            raise UserError(
                f"vit.image_size {v.image_size} must be above 0, lora.rank {self.lora.rank} at least 0"
            )
        if v.image_size % v.patch_size:
            raise UserError(f"vit.image_size {v.image_size} is no multiple of vit.patch_size {v.patch_size}")
        if v.activation not in ACTIVATIONS or v.pre_norm not in ("before", "after", ""):
            raise UserError(
                f"vit.activation '{v.activation}' must be one of {', '.join(ACTIVATIONS)}; "
                f"vit.pre_norm '{v.pre_norm}' before, after or empty"
            )
        if c.kind not in CONNECTORS:
            raise UserError(f"connector.kind '{c.kind}' is unknown: use one of {', '.join(CONNECTORS)}")
        if c.plan and c.plan not in SCALE_PLANS:
            raise UserError(f"connector.plan '{c.plan}' is unknown: use one of {', '.join(SCALE_PLANS)}")
        if c.plan:  # a window of no size is refused below
            per_side, c.queries = (list(x) for x in zip(*SCALE_PLANS[c.plan]))
            c.windows = [self.side // n if self.side % n == 0 else 0 for n in per_side]
        if len(c.windows) != len(c.queries):
            raise UserError(
                f"connector.windows {c.windows} and connector.queries {c.queries} differ in length"
            )
        for window in c.windows if c.kind == "chain" else []:
            if window < 1 or self.side % window:
                divisors = [w for w in range(1, self.side + 1) if self.side % w == 0]
                raise UserError(
                    f"connector.windows: {window} does not divide the {self.side}x{self.side} patch grid "
                    f"({v.image_size} px / patch {v.patch_size}); windows that do: {divisors}"
                )
        if c.kind == "chain" and c.windows != sorted(c.windows, reverse=True):
            raise UserError(f"connector.windows {c.windows}: scales go from coarse to fine, largest first")
        if c.tokens < 1:
            raise UserError(f"connector.tokens {c.tokens}: must be at least 1")
        if c.kind in ("avgpool", "cabstractor") and math.isqrt(c.tokens) ** 2 != c.tokens:
            raise UserError(f"connector.tokens {c.tokens}: {c.kind} needs a square number, such as 64 or 144")
        if not c.levels or c.levels != sorted(c.levels) or c.levels[0] < 0 or c.levels[-1] > v.layers:
            raise UserError(
                f"connector.levels {c.levels} must lie in 0..{v.layers}, the ViT's hidden states, low to high"
            )
        if c.width % c.heads:
            raise UserError(f"connector.width {c.width} is not a multiple of connector.heads {c.heads}")
        if self.image.cut not in CUTS or (self.image.cut == "unpad" and not self.grid()):
            raise UserError(
                f"image.cut '{self.image.cut}': use {', '.join(CUTS[1:])} or nothing; unpad needs a grid of "
                f"tokens (connector.kind linear, mlp, avgpool or cabstractor), not {c.kind}"
            )
        self.check_pruner()
        d, dense = self.decoder, DecoderConfig()
        for name in ("expert_every", "capacity"):
            if not d.experts and getattr(d, name) != getattr(dense, name):
                raise UserError(f"decoder.{name} has no effect on a dense decoder: add decoder.experts 4")
        if d.experts and (d.experts < 2 or not 1 <= d.expert_every <= d.layers or d.capacity <= 0):
            raise UserError(
                f"decoder.experts {d.experts} must be 0 or above 1, decoder.expert_every {d.expert_every} "
                f"lie in 1..{d.layers}, decoder.capacity {d.capacity} be above 0"
            )
        if d.experts and (d.width % 8 or d.mlp_width % 8):
            raise UserError(f"decoder.experts need multiples of 8, not {d.width} and {d.mlp_width} wide MLPs")
        if d.experts and self.lora.rank:
            raise UserError(
                f"lora.rank {self.lora.rank}: adapters stand beside a dense decoder's linears only; "
                "--lora.rank 0 merges them"
            )
        return self

    def check_pruner(self) -> None:
        p, kind, known = self.prune, self.connector.kind, self.prune.name in prune.PRUNERS
        if not known or not self.fits(p.name):
            fit = ", ".join(name for name in prune.PRUNERS if self.fits(name))
            why = f"does not fit connector.kind {kind}" if known else "is unknown"
            raise UserError(f"prune.name '{p.name}' {why}: use one of {fit}")
        if not p.keep > 0 or p.isolator < 0 or p.isolator_per not in ("tile", "image"):
            raise UserError(
                f"prune.keep {p.keep:g} must be above 0, prune.isolator {p.isolator} at least 0, "
                f"prune.isolator_per '{p.isolator_per}' tile or image"
            )
        whole = p.keep <= 1 or self.kept_tokens() == min(round(p.keep), self.visual_tokens())
        if p.name == "coarse" and not whole:
            sums = ", ".join(map(str, accumulate(self.scale_tokens())))
            raise UserError(f"prune.keep {p.keep:g}: coarse keeps whole scales, so one of {sums}")


# ---------------------------------------------------------------------------------------------------------
# Vision transformer


class Attention(nn.Module):
    """Multi-head self-attention of the ViT, CLIP's names."""

    def __init__(self, width: int, heads: int, bias: bool = True):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias)
        self.k_proj = nn.Linear(width, width, bias)
        self.v_proj = nn.Linear(width, width, bias)
        self.out_proj = nn.Linear(width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(self.q_proj(x), self.heads)  # (I, H, P, D/H)
        k = split_heads(self.k_proj(x), self.heads)
        v = split_heads(self.v_proj(x), self.heads)
        return self.out_proj(merge_heads(attend(q, k, v)))  # (I, P, D)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)  # (..., T, D) -> (..., H, T, D/H)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).flatten(-2)  # (..., H, T, D/H) -> (..., T, D)


class Documents(NamedTuple):
    """Instead of a mask: where the documents of the flattened rows begin. Others are skipped, not masked."""

    starts: Tensor  # (documents + 1,) int32, the end repeated
    longest: int  # positions, at most


def attend(q: Tensor, k: Tensor, v: Tensor, mask: "Tensor | Documents | None" = None) -> Tensor:
    """The one place where attention is computed: (..., H, T, d); k and v may have fewer heads.

    On a CPU always in fp32: the backward pass of its bf16 kernel is 2-4 times slower at our lengths (LOG.md).
    """
    if isinstance(
        mask, Documents
    ):  # autocast knows SDPA, not this kernel: a norm on q and k left them float32
        flat = [x.to(v.dtype).transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # (B*T, H, d)
        cut, longest = (mask.starts, mask.starts), (mask.longest, mask.longest)
        out = varlen_attn(*flat, *cut, *longest, window_size=(-1, 0), enable_gqa=True)  # causal
        return out.unflatten(0, (len(q), -1)).transpose(1, 2)  # (B, H, T, d)
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    with torch.autocast("cpu", enabled=False):
        wide = torch.promote_types(v.dtype, torch.float32)
        q, k, values = q.to(wide), k.to(wide), v.to(wide)
        out = F.scaled_dot_product_attention(q, k, values, attn_mask=mask, enable_gqa=True)
    return out.to(v.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str = "gelu", bias: bool = True, out: int = 0):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias)
        self.fc2 = nn.Linear(hidden, out or width, bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class GatedMLP(nn.Module):
    """SwiGLU, Llama's names; also AIMv2's."""

    def __init__(self, width: int, hidden: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias)
        self.up_proj = nn.Linear(width, hidden, bias)
        self.down_proj = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def vit_norm(cfg: ViTConfig) -> nn.Module:
    return (nn.RMSNorm if cfg.rms_norm else nn.LayerNorm)(cfg.width, eps=cfg.norm_eps)


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))  # DINOv2's name

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class ViTBlock(nn.Module):
    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.layer_norm1 = vit_norm(cfg)
        self.self_attn = Attention(cfg.width, cfg.heads, cfg.attention_bias)
        self.layer_norm2 = vit_norm(cfg)
        if cfg.gated_mlp:
            self.mlp = GatedMLP(cfg.width, cfg.mlp_width, cfg.mlp_bias)
        else:
            self.mlp = MLP(cfg.width, cfg.mlp_width, cfg.activation, cfg.mlp_bias)
        self.layer_scale1 = LayerScale(cfg.width) if cfg.layer_scale else nn.Identity()
        self.layer_scale2 = LayerScale(cfg.width) if cfg.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale1(self.self_attn(self.layer_norm1(x)))
        return x + self.layer_scale2(self.mlp(self.layer_norm2(x)))


class ViTEmbeddings(nn.Module):
    """Patches as one linear map, perhaps a CLS token in front, positions resized to the grid at hand."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg = cfg
        self.class_embedding = nn.Parameter(torch.randn(cfg.width) * 0.02) if cfg.cls_token else None
        stride = cfg.patch_size
        self.patch_embedding = nn.Conv2d(3, cfg.width, stride, stride=stride, bias=cfg.patch_bias)
        self.position_embedding = nn.Embedding((cfg.image_size // stride) ** 2 + cfg.cls_token, cfg.width)

    def forward(self, pixels: Tensor, norm: nn.Module) -> Tensor:
        """(I, 3, pixels, pixels) -> (I, 1 + P, D), or (I, P, D) without CLS"""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (I, P, D)
        if self.cfg.pre_norm == "before":
            x = norm(x)
        if self.class_embedding is not None:
            cls = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)  # (I, 1, D)
            x = torch.cat([cls, x], 1)
        x = x + self.positions(pixels.shape[-1] // self.cfg.patch_size)
        return norm(x) if self.cfg.pre_norm == "after" else x

    def positions(self, side: int) -> Tensor:
        """Positions of a side x side grid, bicubic from the stored one, CLS kept: ((1 +) side^2, D)"""
        weight = self.position_embedding.weight
        first = int(self.cfg.cls_token)
        if len(weight) == side**2 + first:
            return weight
        return torch.cat([weight[:first], resize_grid(weight[first:], side, self.cfg.align_corners)])


def resize_grid(table: Tensor, side: int, align_corners: bool = False) -> Tensor:
    """A position table of S x S patches (S*S, D) for side x side patches, bicubic: (side*side, D)"""
    stored = math.isqrt(len(table))
    grid = table.float().T.reshape(1, -1, stored, stored)  # (1, D, S, S)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=align_corners)
    return grid[0].flatten(1).T.to(table.dtype)


class ViT(nn.Module):
    """A pre-norm vision transformer with CLIP's names; the config's switches make it one of VIT_FAMILIES."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg = cfg
        self.embeddings = ViTEmbeddings(cfg)
        self.pre_layrnorm = vit_norm(cfg) if cfg.pre_norm else nn.Identity()  # the missing "e" is CLIP's
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.layers))})
        self.post_layernorm = vit_norm(cfg)
        init_linear(self)

    def hidden_states(
        self, pixels: Tensor, last: int | None = None, only: set[int] | None = None
    ) -> tuple[Tensor | None, ...]:
        """What transformers returns: embeddings (CLIP's after its pre-LayerNorm), then each block's output.

        pixels: (I, 3, side, side), normalised. Every entry is (I, 1 + P, D), or (I, P, D) without a CLS
        token. Stops after block `last`; of all states but the last and those in `only`, None is left.
        """
        states = [self.embeddings(pixels, self.pre_layrnorm)]
        for block in self.encoder["layers"][:last]:
            # past a compiled block in evaluation, which would recompile at every number of images
            states.append(block(states[-1]) if self.training else block.forward(states[-1]))
            if only is not None and len(states) - 2 not in only:
                states[-2] = None
        return tuple(states)

    @torch.no_grad()
    def attention(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """How much block `layer`, given its input (I, 1 + P, D), looks at each patch: (I, P), fp32, mean over
        heads; and the patches' keys (I, H, P, d).

        By the CLS token: one row of the matrix that fused attention never shows. Where there is none (SigLIP,
        AIMv2), by all patches on average, a substitute: the whole matrix, one head after the other. Queries
        and keys come in the run's precision, as those of the block itself.
        """
        block, first = self.encoder["layers"][layer], int(self.cfg.cls_token)
        x, heads = block.layer_norm1(x), block.self_attn.heads
        k = split_heads(block.self_attn.k_proj(x), heads)  # (I, H, 1 + P, d)
        q = split_heads(block.self_attn.q_proj(x[:, :1] if first else x), heads) / math.sqrt(k.shape[-1])
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            looks = [(q[:, h].float() @ k[:, h].float().mT).softmax(-1).mean(1) for h in range(heads)]
        return sum(looks)[:, first:] / heads, k[:, :, first:]

    def resize(self, image_size: int) -> None:
        """Keep the weights, move to another resolution: the position table is resized once and for all."""
        with torch.no_grad():
            positions = self.embeddings.positions(image_size // self.cfg.patch_size)
        self.embeddings.position_embedding = nn.Embedding.from_pretrained(positions.clone(), freeze=False)
        self.embeddings.cfg = self.cfg = dataclasses.replace(self.cfg, image_size=image_size)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, dtype: torch.dtype = torch.float32) -> "ViT":
        """From a Hugging Face folder (or downloaded repo) of one of VIT_FAMILIES: vision-only, or the vision
        half of a full CLIP, SigLIP or AIMv2 checkpoint; today's key names or older ones.
        """
        folder = find_half(path_or_repo)
        cfg = read_vit_config(folder / "config.json")
        with torch.device("meta"):
            vit = cls(cfg)
        load_weights(vit, vit_weights(open_weights(folder), cfg.family), folder, dtype)
        return vit

    def save_pretrained(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """config.json and model.safetensors as the family's vision-only model in transformers has them."""
        family, switches = self.cfg.family, dataclasses.asdict(self.cfg)
        config = {theirs: switches[ours] for ours, theirs in VIT_NAMES.items()}
        extra = VIT_FAMILIES[family]["export"](self.cfg)
        write_json(Path(path) / "config.json", {**config, **extra})
        weights = {}
        for name, value in self.state_dict().items():
            for theirs, ours in reversed(VIT_FAMILIES[family]["names"]):
                name = name.replace(ours, theirs)
            name = (
                "vision_model." * (family in ("clip", "siglip")) + name
            )  # as on the hub; both releases read it
            lead = 2 if name.endswith("cls_token") else 1 if name.endswith("position_embeddings") else 0
            weights[name] = value.to(dtype)[(None,) * lead]
        write_weights(Path(path) / "model.safetensors", weights)


# The encoders that load: what all families call the values in config.json, then what differs. "defaults" are
# transformers' own, for configs on the hub that leave them out, and our switches; "names" the replacements,
# in order, that turn its weights' names into ours.
VIT_NAMES = {
    "image_size": "image_size", "patch_size": "patch_size", "width": "hidden_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "mlp_width": "intermediate_size",
    "activation": "hidden_act", "norm_eps": "layer_norm_eps",
}  # fmt: skip
BASE = {"image_size": 224, "width": 768, "layers": 12, "heads": 12, "mlp_width": 3072}
VIT_FAMILIES = {
    "clip": {
        "defaults": {**BASE, "patch_size": 32, "activation": "quick_gelu", "norm_eps": 1e-5},
        "export": lambda cfg: {"model_type": "clip_vision_model"},
        "names": [],
    },
    "siglip": {
        "defaults": {
            **BASE, "patch_size": 16, "activation": "gelu_pytorch_tanh", "norm_eps": 1e-6,
            "cls_token": False, "pre_norm": "", "patch_bias": True,
        },
        "export": lambda cfg: {"model_type": "siglip_vision_model", "vision_use_head": False},
        "names": [],
    },
    "aimv2": {
        "defaults": {
            **BASE, "patch_size": 14, "width": 1024, "layers": 24, "heads": 8, "mlp_width": 2816,
            "activation": "silu", "norm_eps": 1e-5, "cls_token": False, "pre_norm": "before",
            "patch_bias": True, "rms_norm": True, "gated_mlp": True, "attention_bias": False,
            "mlp_bias": False,
        },
        "export": lambda cfg: {
            "model_type": "aimv2_vision_model", "rms_norm_eps": cfg.norm_eps, "qkv_bias": cfg.attention_bias,
            "mlp_bias": cfg.mlp_bias, "use_head": False, "is_native": False,
        },
        "names": [
            ("embeddings.patch_embed.", "embeddings.patch_embedding."),
            ("embeddings.rms_norm.", "pre_layrnorm."),
            (".attention.", ".self_attn."),
            (".ffn.", ".mlp."),
            (".rms_norm1.", ".layer_norm1."),
            (".rms_norm2.", ".layer_norm2."),
            ("rms_norm.", "post_layernorm."),
        ],
        "original": [  # Apple's own files
            ("preprocessor.patchifier.proj.", "embeddings.patch_embedding."),
            ("preprocessor.patchifier.norm.", "pre_layrnorm."),
            ("preprocessor.pos_embed", "embeddings.position_embedding.weight"),
            ("trunk.blocks.", "encoder.layers."),
            (".attn.qkv.", ".self_attn.qkv."),
            (".attn.proj.", ".self_attn.out_proj."),
            (".mlp.fc1.", ".mlp.gate_proj."),
            (".mlp.fc2.", ".mlp.down_proj."),
            (".mlp.fc3.", ".mlp.up_proj."),
            (".norm_1.", ".layer_norm1."),
            (".norm_2.", ".layer_norm2."),
            ("trunk.post_trunk_norm.", "post_layernorm."),
        ],
    },
    "dinov2": {
        "defaults": {
            **BASE, "patch_size": 14, "activation": "gelu", "norm_eps": 1e-6, "pre_norm": "",
            "patch_bias": True, "layer_scale": True,
        },
        "export": lambda cfg: {
            "model_type": "dinov2", "mlp_ratio": cfg.mlp_width // cfg.width, "qkv_bias": cfg.attention_bias,
            "use_mask_token": False,
        },
        "names": [
            ("embeddings.cls_token", "embeddings.class_embedding"),
            ("embeddings.position_embeddings", "embeddings.position_embedding.weight"),
            ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
            ("encoder.layer.", "encoder.layers."),
            (".attention.attention.query.", ".self_attn.q_proj."),
            (".attention.attention.key.", ".self_attn.k_proj."),
            (".attention.attention.value.", ".self_attn.v_proj."),
            (".attention.output.dense.", ".self_attn.out_proj."),
            (".norm1.", ".layer_norm1."),
            (".norm2.", ".layer_norm2."),
            ("layernorm.", "post_layernorm."),
        ],
    },
}  # fmt: skip


def read_vit_config(file: Path) -> ViTConfig:
    """config.json of a vision model, or the vision half of a full one."""
    config = read_config(file)
    kind = config.get("model_type")
    family = str(kind).removesuffix("_vision_model")
    if family not in VIT_FAMILIES:
        why = ": its NaFlex grids change with the picture; take a fixed-resolution SigLIP2" * (
            family == "siglip2"
        )
        raise UserError(f"{file}: model_type '{kind}' is not one of {', '.join(VIT_FAMILIES)}{why}")
    config = {**config, **(config.get("vision_config") or {})}
    known = {ours: config[theirs] for ours, theirs in VIT_NAMES.items() if config.get(theirs) is not None}
    cfg = ViTConfig(**{**VIT_FAMILIES[family]["defaults"], "family": family, **known})
    if family == "aimv2":
        cfg.norm_eps = config.get("rms_norm_eps", cfg.norm_eps)
        cfg.mlp_bias = config.get("mlp_bias", config.get("use_bias", False))
        cfg.attention_bias = config.get("qkv_bias", False)
    if family == "dinov2":
        cfg.mlp_width = int(config.get("mlp_ratio", 4) * cfg.width)
        cfg.attention_bias = config.get("qkv_bias", True)
    for unknown in ("is_native", "use_swiglu_ffn"):  # sine positions of AIMv2's native models; DINOv2-giant
        if config.get(unknown):
            raise UserError(f"{file}: {unknown} is not supported")
    allowed = ["silu"] if cfg.gated_mlp else ACTIVATIONS
    if cfg.activation not in allowed:
        raise UserError(f"{file}: hidden_act '{cfg.activation}' is not one of {', '.join(allowed)}")
    return cfg


def vit_weights(readers: dict, family: str) -> dict:
    """Our names for one encoder's tensors: no text half, no pooling head, fused q, k, v taken apart."""
    other = (
        "text_model.",
        "text_projection.",
        "visual_projection.",
        "logit_",
        "head.",
        "embeddings.mask_token",
    )
    names = VIT_FAMILIES[family]["names"]
    if any(name.startswith("trunk.") for name in readers):
        names = VIT_FAMILIES[family]["original"]
    renamed = {}
    for name, read in readers.items():
        name = name.removeprefix("vision_model.")
        if name.startswith(other) or name.endswith("position_ids"):  # a buffer in older CLIP files
            continue
        for theirs, ours in names:
            name = name.replace(theirs, ours)
        if ".qkv." in name:
            for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
                renamed[name.replace("qkv", part)] = lambda i=i, read=read: read().chunk(3)[i]
        else:
            renamed[name] = read
    return renamed


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
    if cfg.rope_factor != 1:  # Llama 3: between rope_low and rope_high turns, from stretched to unchanged
        turns = cfg.rope_length * frequency / (2 * math.pi)
        keep = ((turns - cfg.rope_low) / (cfg.rope_high - cfg.rope_low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / cfg.rope_factor)
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


def attention_mask(rows) -> Tensor | Documents:
    """Of a training step. CUDA's varlen kernel takes 16 bits only: fp32 and CPUs get the boolean mask, which
    is the reference.
    """
    if rows.ids.is_cuda and torch.is_autocast_enabled("cuda") and rows.starts is not None:
        return Documents(rows.starts, rows.ids.shape[1])
    return document_mask(rows.doc_ids)


class KVCache:
    """Keys and values of all layers, written in place: (layers, B, Hkv, T_max, head_dim)."""

    def __init__(self, cfg: DecoderConfig, rows: int, length: int):
        self.shape = (cfg.layers, rows, cfg.kv_heads, length, cfg.head_dim)
        self.used = 0

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.used == 0 and layer == 0:  # now their dtype and device are known
            self.k, self.v = k.new_zeros(self.shape), v.new_zeros(self.shape)
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


class Experts(nn.Module):
    """The sparse layer of MM1's experts: each token goes to the two of E gated MLPs that its router prefers.

    The two gates are divided by their sum. In training an expert takes at most C tokens, first choices before
    second ones and each in the order of positions; what it drops is left with the residual (GShard, arXiv
    2006.16668; MM1 did not publish C, the default is AXLearn's). A rank's micro-batch is one group. Padding
    comes last, so that it takes no token's place, and does not count in the losses. Nothing is dropped
    without gradients, as in evaluation, generation and the teacher's pass, nor by experts that do not train.
    A dropped token is computed and weighed by 0: all shapes are known in advance, and on one device a full
    expert costs no more than others.

    grouped_mm has a kernel for bfloat16 on CUDA; other dtypes and the CPU take its slower loop. Only
    float32 (not compiled) and bfloat16, rows of a multiple of 16 bytes. Here E experts, M = B * T tokens.
    """

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.capacity = cfg.capacity
        self.router = nn.Linear(cfg.width, cfg.experts, bias=False)
        inner, outer = (cfg.experts, cfg.mlp_width, cfg.width), (cfg.experts, cfg.width, cfg.mlp_width)
        self.gate_proj = nn.Parameter(nn.init.trunc_normal_(torch.empty(inner), std=0.02))
        self.up_proj = nn.Parameter(nn.init.trunc_normal_(torch.empty(inner), std=0.02))
        self.down_proj = nn.Parameter(nn.init.trunc_normal_(torch.empty(outer), std=0.02))

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, D), real (B, T) False at padding -> the layer's output (B, T, D), router losses (2,)"""
        tokens = x.flatten(0, 1)  # (M, D)
        real = torch.ones_like(tokens[:, 0], dtype=torch.bool) if real is None else real.flatten()  # (M,)
        device = "cpu" if x.is_meta else x.device.type  # meta knows no autocast
        with torch.autocast(device, enabled=False):  # the router always computes in float32
            logits = F.linear(tokens.float(), self.router.weight.float())  # (M, E)
            probabilities = logits.softmax(-1)
            gates, chosen = probabilities.topk(2)  # (M, 2)
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-9)
            losses = router_losses(logits, probabilities, chosen[:, 0], real)

        chosen = chosen.T.flatten()  # (2M,): all first choices, then all second ones
        order = (2 * chosen + ~real.repeat(2)).argsort(stable=True)  # by expert; padding behind its tokens
        chosen, token, gates = chosen[order], order % len(tokens), gates.T.flatten()[order]
        if self.training and torch.is_grad_enabled() and self.gate_proj.requires_grad:
            limit = -(-int(len(tokens) * self.capacity / len(self.gate_proj)) // 4) * 4
            rank = torch.arange(len(order), device=x.device) - torch.searchsorted(chosen, chosen)
            gates = gates * (rank < limit)
        number = torch.arange(len(self.gate_proj), device=x.device)
        ends = torch.searchsorted(chosen, number, right=True, out_int32=True)  # (E,) last row of each, + 1

        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        gate, up, down = (w.to(dtype).transpose(1, 2) for w in (self.gate_proj, self.up_proj, self.down_proj))
        rows = tokens.to(dtype).index_select(0, token)  # (2M, D)
        hidden = F.silu(F.grouped_mm(rows, gate, offs=ends)) * F.grouped_mm(rows, up, offs=ends)
        out = F.grouped_mm(hidden, down, offs=ends) * gates[:, None]  # (2M, D), float32
        return out.new_zeros(tokens.shape).index_add(0, token, out).view_as(x).to(x.dtype), losses


def router_losses(logits: Tensor, probabilities: Tensor, first: Tensor, real: Tensor) -> Tensor:
    """Load balance and z-loss of a router (2,), means over the real tokens; all but `first` with gradient.

    Balance is E * sum_e f_e * P_e with f_e the share of first choices, P_e the mean probability: 1 if these
    are uniform (GShard). z is the mean squared logsumexp of the logits (ST-MoE, arXiv 2202.08906).
    """
    share = real.float() / real.sum().clamp(min=1)  # (M,)
    experts = logits.shape[-1]
    balance = experts * (share @ F.one_hot(first, experts).float() * (share @ probabilities)).sum()
    return torch.stack([balance, share @ logits.logsumexp(-1).square()])


EXPERT_FIELDS = ("experts", "expert_every", "capacity")


@torch.no_grad()
def upcycle(decoder: "Decoder", cfg: DecoderConfig) -> None:
    """Make a dense decoder that of cfg, in place: each expert a copy of the dense MLP, routers random.

    The gates sum to 1, so that the logits stay the same while nothing is dropped: outside of training, and
    at capacity >= experts.
    """
    decoder.cfg = cfg
    for block in decoder.layers:
        if cfg.sparse(block.layer):
            with torch.device("meta"):
                experts = Experts(cfg)
            for name in ("gate_proj", "up_proj", "down_proj"):
                dense = getattr(block.mlp, name).weight  # (out, in)
                setattr(experts, name, nn.Parameter(dense.expand(cfg.experts, -1, -1).clone()))
            experts.router = nn.Linear(cfg.width, cfg.experts, bias=False, device=dense.device)
            init_linear(experts.router)
            block.mlp = experts


def backbone_size(decoder: nn.Module) -> int:
    """N of MM1's learning-rate law: matrices and norms of the dense decoder, without embeddings and head.

    Of a sparse layer one expert counts, its router does not; adapters do not either.
    """
    skipped = ("embed_tokens", "lm_head", "router", ".lora_")
    sizes = ((name, p.numel() // (len(p) if p.ndim == 3 else 1)) for name, p in decoder.named_parameters())
    return sum(size for name, size in sizes if not any(part in name for part in skipped))


class DecoderBlock(nn.Module):
    def __init__(self, cfg: DecoderConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.input_layernorm = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.self_attn = DecoderAttention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.mlp = Experts(cfg) if cfg.sparse(layer) else GatedMLP(cfg.width, cfg.mlp_width)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor,
        cache: KVCache | None = None,
        real: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The residuals (B, T, D); of a sparse block also its router's losses (2,)."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, self.layer)
        if isinstance(self.mlp, GatedMLP):
            return x + self.mlp(self.post_attention_layernorm(x))
        y, losses = self.mlp(self.post_attention_layernorm(x), real)
        return x + y, losses


class Decoder(nn.Module):
    """A Llama-style causal decoder; `Decoder(ids)` gives the logits of all positions."""

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.width)
        self.layers = nn.ModuleList(DecoderBlock(cfg, i) for i in range(cfg.layers))
        self.norm = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        if not cfg.tied:
            self.lm_head = nn.Linear(cfg.width, cfg.vocab_size, bias=False)
        init_linear(self)

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D), in the norms' dtype: a bfloat16 table does not narrow the residuals."""
        return self.embed_tokens(ids).to(self.norm.weight.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) to logits (..., N)."""
        return F.linear(hidden, (self.embed_tokens if self.cfg.tied else self.lm_head).weight)

    def hidden(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor,
        cache: KVCache | None = None,
        real: Tensor | None = None,
    ) -> Tensor:
        """Embeddings (B, T, D) to final hidden states (B, T, D); real (B, T) is False at padding.

        A pass with gradients leaves the mean router losses of its sparse layers in `router_losses`.
        """
        rope, losses = rope_tables(positions, self.cfg), []
        for block in self.layers:
            if self.training and torch.is_grad_enabled():
                x = block(x, rope, mask, real=real)
            else:  # past a compiled block, which would recompile at every shape of a teacher or of evaluation
                x = block.forward(x, rope, mask, cache, real)
            if isinstance(x, tuple):
                x, router = x
                losses += [router] if block.mlp.router.weight.requires_grad else []
        if losses and torch.is_grad_enabled():
            self.router_losses = torch.stack(losses).mean(0)  # (2,)
        if cache:
            cache.used += x.shape[1]
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        mask = document_mask(torch.zeros_like(ids))
        return self.head(self.hidden(self.embed(ids), positions, mask))  # (B, T, N)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, dtype: torch.dtype = torch.float32) -> "Decoder":
        """From a Hugging Face folder (or downloaded repo) of one of DECODERS."""
        folder = find_half(path_or_repo)
        cfg = read_decoder_config(folder / "config.json")
        with torch.device("meta"):
            decoder = cls(cfg)
        readers = {name.removeprefix("model."): read for name, read in open_weights(folder).items()}
        readers = {name: read for name, read in readers.items() if not name.endswith("rotary_emb.inv_freq")}
        if cfg.tied:
            readers.pop("lm_head.weight", None)  # some files hold the table twice
        load_weights(decoder, readers, folder, dtype)
        return decoder

    def save_pretrained(
        self, path: str | Path, dtype: torch.dtype = torch.float32, end: int | None = None
    ) -> None:
        """config.json and model.safetensors, Hugging Face names, LoRA merged. end: id that ends text."""
        cfg = self.cfg
        if cfg.experts:
            raise UserError(f"{path}: no Llama layout holds decoder.experts; a run folder keeps them")
        config = {theirs: getattr(cfg, ours) for ours, theirs in LLAMA_NAMES.items()}
        config["model_type"] = "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama"
        config["architectures"] = [DECODERS[config["model_type"]]]
        rope = {"rope_type": "default"}
        if cfg.rope_factor != 1:
            rope = {
                "rope_type": "llama3",
                **{theirs: getattr(cfg, ours) for ours, theirs in ROPE_NAMES.items()},
            }
            config["rope_scaling"] = rope
        config["rope_theta"] = cfg.rope_theta  # this and rope_scaling are what transformers 4 reads
        config["rope_parameters"] = {**rope, "rope_theta": cfg.rope_theta}
        if end is not None:
            config["eos_token_id"] = end
        write_json(Path(path) / "config.json", config)
        weights = {k if k == "lm_head.weight" else f"model.{k}": v.to(dtype) for k, v in merged(self).items()}
        write_weights(Path(path) / "model.safetensors", weights)


DECODERS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LLAMA_NAMES = {
    "vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "mlp_width": "intermediate_size", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings",
    "context": "max_position_embeddings",
}  # fmt: skip
ROPE_NAMES = {
    "rope_factor": "factor", "rope_low": "low_freq_factor", "rope_high": "high_freq_factor",
    "rope_length": "original_max_position_embeddings",
}  # fmt: skip


def read_decoder_config(file: Path) -> DecoderConfig:
    """config.json of a decoder, in today's form (rope_parameters) or the older (rope_theta, rope_scaling)."""
    config = read_config(file)
    family = config.get("model_type")
    if family not in DECODERS:
        raise UserError(
            f"{file}: model_type '{family}' is not one of {', '.join(DECODERS)} (SmolLM2 is a llama)"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{file}: rope type '{kind}' is not supported, only default and llama3")
    for unknown in ("quantization_config", "mlp_bias"):
        if config.get(unknown):
            raise UserError(f"{file}: {unknown} is not supported")
    windowed = config.get("use_sliding_window") or set(config.get("layer_types") or ()) - {"full_attention"}
    if windowed or config.get("hidden_act", "silu") != "silu" or config.get("partial_rotary_factor", 1) != 1:
        raise UserError(
            f"{file}: a sliding window, partial rotation or a gate other than silu is not supported"
        )
    known = {ours: config[theirs] for ours, theirs in LLAMA_NAMES.items() if config.get(theirs) is not None}
    for ours in ("vocab_size", "width", "layers", "heads", "mlp_width"):
        if ours not in known:
            raise UserError(f"{file}: '{LLAMA_NAMES[ours]}' is missing")
    known.setdefault("tied", False)
    known.setdefault("head_dim", 128 if family == "qwen3" else known["width"] // known["heads"])
    known.setdefault("kv_heads", known["heads"])
    known["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if kind == "llama3":
        for ours, theirs in ROPE_NAMES.items():
            if theirs not in rope:
                raise UserError(f"{file}: the llama3 rope has no '{theirs}'")
            known[ours] = rope[theirs]
    qkv_bias = family == "qwen2" or config.get("attention_bias", False)
    return DecoderConfig(**known, qkv_bias=qkv_bias, qk_norm=family == "qwen3")


# ---------------------------------------------------------------------------------------------------------
# LoRA (arXiv 2106.09685): small trained matrices beside the decoder's frozen ones


class LoraLinear(nn.Linear):
    """W x + alpha / rank * B A x. W is frozen; B starts at zero, so that step 0 is the base model."""

    def __init__(self, base: nn.Linear, cfg: LoraConfig):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = cfg.alpha / cfg.rank
        like = {"device": base.weight.device, "dtype": torch.float32}  # whatever the base is kept in
        self.lora_a = nn.Parameter(torch.empty(cfg.rank, base.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, cfg.rank, **like))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = self.scale * F.linear(x, self.lora_a.to(x.dtype))  # (..., rank): scaled here it costs least
        return F.linear(x, self.weight, self.bias) + F.linear(low, self.lora_b.to(x.dtype))


def add_lora(decoder: Decoder, cfg: LoraConfig) -> None:
    """Put adapters on q, k, v, o, gate, up and down of every block, in place."""
    for block in decoder.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, LoraLinear(linear, cfg))


@torch.no_grad()
def merged(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's weights with the adapters added to the matrices they stand beside, names without them."""
    weights = {name: value for name, value in decoder.state_dict().items() if ".lora_" not in name}
    for name, part in decoder.named_modules():
        if isinstance(part, LoraLinear):
            update = part.scale * (part.lora_b.float() @ part.lora_a.float())
            weights[f"{name}.weight"] = part.weight.float() + update  # bfloat16 would round it off
    return weights


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

    def project(self, queries: Tensor, context: Tensor, key_positions: Tensor | None) -> list[Tensor]:
        """queries (I or 1, windows, q, D), context (I, windows, W*W, C) -> q, k, v

        At the first level the queries are the same for all images: they come with I = 1 and are projected
        once.
        """
        context = self.norm_context(context)
        if key_positions is not None:
            context = context + key_positions
        q = self.to_q(self.norm_queries(queries)).expand(len(context), -1, -1, -1)
        k, v = self.to_kv(context).chunk(2, -1)
        return [split_heads(x.flatten(0, 1), self.heads) for x in (q, k, v)]  # (I*windows, H, q or W*W, D/H)

    def forward(self, queries: Tensor, context: Tensor, key_positions: Tensor | None) -> Tensor:
        """queries (I or 1, windows, q, D), context (I, windows, W*W, C) -> (I, windows, q, D)"""
        q, k, v = self.project(queries, context, key_positions)
        out = merge_heads(attend(q, k, v)).unflatten(0, context.shape[:2])
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
    def attention(self, levels: list[Tensor]) -> Tensor:
        """Which patches each token looks at in the block of the highest level: (I, windows * q, P), fp32.

        Mean over heads; rows sum to 1 and are 0 outside the token's own window. Only for pictures: computed
        anew from queries and keys, as fused attention never holds these weights.
        """
        x, cut = self.queries[None], [cut_windows(level, self.window) for level in levels]
        for block, context in zip(self.blocks[:-1], cut):
            x = block(x, context, self.key_positions)
        q, k, _ = self.blocks[-1].project(x, cut[-1], self.key_positions)
        scores = q.float() @ k.float().mT / math.sqrt(q.shape[-1])
        inside = scores.softmax(-1).mean(1).unflatten(0, cut[-1].shape[:2])  # (I, windows, q, W*W)
        P = levels[-1].shape[1]
        patches = torch.arange(P, device=q.device).view(1, P, 1)
        where = cut_windows(patches, self.window).mT.expand_as(inside)  # a patch's number in the whole grid
        return inside.new_zeros(*inside.shape[:3], P).scatter_(3, where, inside).flatten(1, 2)

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
            self.key_positions.copy_(resize_grid(source.key_positions, self.window))


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

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        c, context_width = cfg.connector, cfg.vit.width
        self.reverse = c.reverse
        self.scales = nn.ModuleList(Scale(c, context_width, cfg.side, w, n) for w, n in cfg.scales())
        self.norm = nn.LayerNorm(c.width)
        self.proj = nn.Linear(c.width, cfg.decoder.width)
        init_linear(self.proj)

    def forward(self, levels: list[Tensor], n_scales: int | None = None) -> Tensor:
        """levels: patches at cfg.levels, each (I, P, C) -> (I, V, D); only the first n_scales if given."""
        tokens = [scale(levels) for scale in self.scales[:n_scales]]
        return self.proj(self.norm(torch.cat(tokens[::-1] if self.reverse else tokens, 1)))


class Linear(nn.Module):
    """Every patch of the highest level by itself: the baseline with all tokens (the LayerNorm is ours)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.norm = nn.LayerNorm(cfg.vit.width)
        self.proj = nn.Linear(cfg.vit.width, cfg.decoder.width)
        init_linear(self.proj)

    def forward(self, levels: list[Tensor]) -> Tensor:
        return self.proj(self.norm(levels[-1]))  # (I, P, C) -> (I, P, D)


class TwoLayers(MLP):
    """LLaVA-1.5's mlp2x_gelu on every patch of the highest level."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg.vit.width, cfg.decoder.width, out=cfg.decoder.width)

    def forward(self, levels: list[Tensor]) -> Tensor:
        return super().forward(levels[-1])  # (I, P, C) -> (I, P, D)


class AvgPool(Linear):
    """MM1's average pooling: means over the patch grid, then one linear (the LayerNorm between is ours)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.tokens = cfg.connector.tokens

    def forward(self, levels: list[Tensor]) -> Tensor:
        side = math.isqrt(levels[-1].shape[1])
        grid = levels[-1].transpose(1, 2).unflatten(2, (side, side))  # (I, C, S, S)
        pooled = F.adaptive_avg_pool2d(
            grid, math.isqrt(self.tokens)
        )  # windows overlap where sides do not divide
        return super().forward([pooled.flatten(2).transpose(1, 2)])  # (I, tokens, D)


class AttnPool(nn.Module):
    """MM1's attention pooling: learned queries look once at all patches of the highest level.

    MM1 did not publish heads, norms, MLP, width or depth: all of that is ours.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        c = cfg.connector
        self.queries = nn.Parameter(torch.randn(1, 1, c.tokens, c.width) * 0.02)
        self.block = WindowBlock(c.width, cfg.vit.width, c.heads)
        self.norm = nn.LayerNorm(c.width)
        self.proj = nn.Linear(c.width, cfg.decoder.width)
        init_linear(self, std=0.64 / math.sqrt(c.width))

    def forward(self, levels: list[Tensor]) -> Tensor:
        pooled = self.block(self.queries, levels[-1][:, None], None)[:, 0]  # (I, tokens, D)
        return self.proj(self.norm(pooled))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel: (I, C, S, S) -> (I, C, S, S)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvBlock(nn.Module):
    """A RegNet bottleneck as Honeybee has it: 1x1, depthwise 3x3, squeeze-and-excite, 1x1, shortcut."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        squeezed = round(width_in / 4)  # of the block's input
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.norm1 = ChannelNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm2 = ChannelNorm(width)
        self.squeeze = nn.Conv2d(width, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, width, 1)
        self.conv3 = nn.Conv2d(width, width, 1, bias=False)
        self.norm3 = ChannelNorm(width)
        self.shortcut = nn.Identity()
        if width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, bias=False), ChannelNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.conv1(x)))
        y = F.silu(self.norm2(self.conv2(y)))
        gate = self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True))))  # (I, C, 1, 1)
        y = self.norm3(self.conv3(y * gate.sigmoid()))
        return F.silu(y + self.shortcut(x))


class CAbstractor(nn.Module):
    """Honeybee's C-Abstractor (arXiv 2312.06742), MM1's connector: convolutions, pooling, convolutions."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        width_in, width, out = cfg.vit.width, cfg.connector.width, cfg.decoder.width
        self.tokens = cfg.connector.tokens
        self.positions = nn.Parameter(torch.empty(1, cfg.side**2, width_in))
        self.before = nn.Sequential(*(ConvBlock(width_in if n == 0 else width, width) for n in range(3)))
        self.after = nn.Sequential(*(ConvBlock(width, width) for _ in range(3)))
        self.readout = nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))
        nn.init.trunc_normal_(self.positions, std=0.02)
        init_linear(self)

    def forward(self, levels: list[Tensor]) -> Tensor:
        x = levels[-1] + self.positions  # (I, P, C)
        side, new = math.isqrt(x.shape[1]), math.isqrt(self.tokens)
        x = self.before(x.transpose(1, 2).unflatten(2, (side, side)))  # (I, D, S, S)
        x = self.after(F.adaptive_avg_pool2d(x, new))  # (I, D, new, new)
        return self.readout(x.flatten(2).transpose(1, 2))  # (I, tokens, D)


CONNECTORS = {
    "chain": ChainOfSight,
    "resampler": ChainOfSight,  # one window over all patches: the baseline of the same levels and depth
    "linear": Linear,
    "mlp": TwoLayers,
    "avgpool": AvgPool,
    "attnpool": AttnPool,
    "cabstractor": CAbstractor,
}

# Scales to start from by name: (windows a side, queries in each), coarse to fine (section 3.2, Table 4).
SCALE_PLANS = {
    "32": [(1, 16), (4, 1)],
    "48": [(1, 16), (4, 2)],
    "80": [(1, 16), (4, 4)],
    "336": [(1, 16), (2, 16), (8, 4)],
}

# Token scaling. name: (tokens before, tokens after, resolution factor, the new scales as (source scale,
# factor on windows a side)). Tokens grow by the square of the factor. A larger grid with windows of the same
# size (factor 2 at resolution 2) is resolution scaling, more windows at the same resolution window scaling,
# both compound scaling. The counts are the table's; `--scale 2:0x1,1x4` spells out a step without a name.
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


def read_scaling(name: str) -> tuple[int, int, int, list[tuple[int, int]]]:
    """A row of SCALINGS, or one spelled out as RESOLUTION:SOURCExFACTOR,… (tokens 0: whatever they are)."""
    if name in SCALINGS:
        return SCALINGS[name]
    if not re.fullmatch(r"[1-9]:\d+x[1-9]\d*(,\d+x[1-9]\d*)*", name):
        close = difflib.get_close_matches(name, SCALINGS, 1)
        raise UserError(
            f"--scale '{name}' is unknown{f', did you mean {close[0]}?' if close else ''} "
            f"Known: {', '.join(SCALINGS)}, or a step such as 2:0x1,1x4"
        )
    resolution, scales = name.split(":")
    return 0, 0, int(resolution), [tuple(map(int, scale.split("x"))) for scale in scales.split(",")]


def scaled_config(cfg: ModelConfig, name: str) -> ModelConfig:
    """The config after a scaling step; a named one refuses to start from another number of tokens."""
    before, after, resolution, sources = read_scaling(name)
    old = cfg.connector
    if old.kind != "chain" or max(source for source, _ in sources) >= len(old.windows):
        raise UserError(f"--scale {name} does not fit a {old.kind} connector with {len(old.windows)} scales")
    if before and (len(old.windows) != 2 or cfg.visual_tokens() != before):
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
    queries = [old.queries[source] for source, _ in sources]
    new.connector = dataclasses.replace(old, plan="", windows=windows, queries=queries)
    if new.check().visual_tokens() != (after or new.visual_tokens()):
        raise UserError(f"--scale {name} would give {new.visual_tokens()} tokens: its base has other windows")
    return new


SCALE_INITS = ("inflate", "queries", "random")


def scale_up(vlm: "VLM", name: str, init: str = "inflate") -> None:
    """Scale the visual tokens of a model in place. init of the new scales: "inflate" copies weights and
    queries of their source (the paper); to compare, "queries" leaves queries random, "random" everything.
    """
    cfg = scaled_config(vlm.cfg, name)
    old = vlm.connector
    new = ChainOfSight(cfg).to(old.norm.weight)
    new.norm, new.proj = old.norm, old.proj
    for scale, (source, factor) in zip(new.scales, read_scaling(name)[3]):
        if init != "random" or factor == 1:
            drawn = scale.queries.detach().clone()
            scale.inflate_from(old.scales[source], factor)
            if init == "queries" and factor > 1:
                scale.queries.data.copy_(drawn)
    vlm.vit.resize(cfg.vit.image_size)
    vlm.connector, vlm.cfg = new, cfg


# Resolution: how large a view is and into how many a picture is cut. "split": MM1's sub-images, a 2x2 crop
# beside the whole (its section 5); "anyres": LLaVA-NeXT's tilings; "unpad": those without their padding.
# "pad": LLaVA-1.5's one view, a square with the mean colour beside the picture instead of a distorted one.
CUTS = ("", "pad", "split", "anyres", "unpad")


def at_resolution(cfg: ModelConfig, resolution: str) -> ModelConfig:
    """The config after --resolution SIDE, SIDE+CUT or +CUT; not checked yet. "" changes nothing."""
    asked = re.fullmatch(rf"([1-9]\d*)?(?:\+({'|'.join(CUTS[1:])}))?", resolution)
    if not asked:
        raise UserError(
            f"--resolution '{resolution}': use SIDE in pixels, SIDE+CUT or +CUT, CUT {' or '.join(CUTS[1:])}"
        )
    if not resolution:
        return cfg
    side = cfg.vit.image_size
    if cfg.connector.kind == "chain" and int(asked[1] or side) != side:
        raise UserError(
            f"--resolution {resolution}: this chain connector sees {side} px, which --scale changes (a new "
            "model: --vit.image_size); without a SIDE it cuts pictures, as +split"
        )
    vit = dataclasses.replace(cfg.vit, image_size=int(asked[1] or side))
    return dataclasses.replace(cfg, vit=vit, image=dataclasses.replace(cfg.image, cut=asked[2] or ""))


def set_resolution(vlm: "VLM", resolution: str) -> None:
    """Take a model to another resolution in place; all position tables are resized, once and for all."""
    cfg = at_resolution(vlm.cfg, resolution).check()
    if cfg.side != vlm.cfg.side:
        vlm.vit.resize(cfg.vit.image_size)
        weights = vlm.connector.state_dict()
        for name in weights:
            if name.endswith("positions"):  # the C-Abstractor's, (1, P, C); a resampler's, (P, C)
                table = resize_grid(weights[name].flatten(0, -2), cfg.side)
                weights[name] = table.view(*weights[name].shape[:-2], *table.shape)
        with torch.device("meta"):
            vlm.connector = CONNECTORS[cfg.connector.kind](cfg)
        vlm.connector.load_state_dict(weights, assign=True)
    if cfg.image.cut != vlm.cfg.image.cut:
        vlm.newline = make_newline(cfg, vlm.decoder.embed_tokens.weight)
    vlm.cfg = cfg


def make_newline(cfg: ModelConfig, table: Tensor) -> nn.Parameter | None:
    """LLaVA-NeXT's learned vector at the end of each row of tokens, (D,), only for "unpad"; at the scale of
    the table of text embeddings, as the connector's tokens.
    """
    if cfg.image.cut != "unpad":
        return None
    scale = table.detach().float().pow(2).mean().sqrt()
    return nn.Parameter(torch.randn(cfg.decoder.width, device=table.device) * scale)


# ---------------------------------------------------------------------------------------------------------
# The VLM


def of_views(x: Tensor, views: Tensor | None) -> Tensor:
    """Those rows of x; no copy where they are all (views are sorted)."""
    return x if views is None or len(views) == len(x) else x[views]


class VLM(nn.Module):
    """Encoder, connector and decoder. `vlm(batch)` gives the logits of student and teacher."""

    def __init__(self, cfg: ModelConfig, vit: ViT | None = None, decoder: Decoder | None = None):
        super().__init__()
        self.cfg = cfg.check()
        self.vit = vit or ViT(cfg.vit)
        self.connector = CONNECTORS[cfg.connector.kind](cfg)
        self.decoder = decoder or Decoder(cfg.decoder)
        if cfg.lora.rank:
            add_lora(self.decoder, cfg.lora)
        self.isolator = prune.ModeIsolator(cfg.prune.isolator, cfg.decoder.width)
        self.newline = make_newline(cfg, self.decoder.embed_tokens.weight)
        mean, std = (
            torch.tensor(x, device="cpu").view(3, 1, 1) * 255 for x in (cfg.image.mean, cfg.image.std)
        )
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)

    @classmethod
    def build(cls, cfg: ModelConfig, dtype: torch.dtype | None = torch.float32) -> "VLM":
        """A new model from pre-trained halves, whose shapes replace those in cfg; the connector is new.

        dtype: of the halves; None keeps what their files hold.
        """
        vit, decoder = None, None
        if cfg.encoder_from:
            image, size = read_preprocessor(find_half(cfg.encoder_from))
            cfg.image = dataclasses.replace(image, cut=cfg.image.cut)
            vit = ViT.from_pretrained(cfg.encoder_from, dtype)
            vit.cfg.align_corners = cfg.vit.align_corners
            cfg.vit = dataclasses.replace(vit.cfg, image_size=cfg.vit.image_size or size)
            cfg.check()
            vit.resize(cfg.vit.image_size)
        if cfg.decoder_from:
            decoder = Decoder.from_pretrained(cfg.decoder_from, dtype)
            sparse = {name: getattr(cfg.decoder, name) for name in EXPERT_FIELDS}
            cfg.decoder = dataclasses.replace(decoder.cfg, **sparse)
            upcycle(decoder, cfg.check().decoder)
        vlm = cls(cfg, vit, decoder)
        if hasattr(vlm.connector, "norm"):
            # Visual tokens enter at the scale of text embeddings: behind a LayerNorm every input of the
            # last Linear has unit variance, so weights of std rms / sqrt(fan in) give the rms of the table.
            rms = vlm.decoder.embed_tokens.weight.float().pow(2).mean().sqrt().item()
            nn.init.normal_(vlm.connector.proj.weight, std=rms / math.sqrt(vlm.connector.proj.in_features))
        return vlm

    def states(self, pixels: Tensor) -> tuple[Tensor | None, ...]:
        """uint8 (I, 3, size, size) -> the encoder's hidden states up to the highest level that is read: those
        of the connector's levels and the one that the last block starts from, which pruners ask for.
        """
        trains = self.vit.embeddings.patch_embedding.weight.requires_grad and torch.is_grad_enabled()
        with torch.set_grad_enabled(trains):  # a frozen encoder keeps no activations
            pixels = (pixels.float() - self.pixel_mean) / self.pixel_std
            dtype = self.vit.embeddings.position_embedding.weight.dtype
            last = max(self.cfg.connector.levels)
            return self.vit.hidden_states(pixels.to(dtype), last, {*self.cfg.connector.levels, last - 1})

    def levels(self, states: tuple[Tensor, ...], views: Tensor | None = None) -> list[Tensor]:
        """Patches of those views at the levels that the connector reads, each (I, P, C)."""
        first, levels = int(self.cfg.vit.cls_token), self.cfg.connector.levels
        return [of_views(states[level][:, first:], views) for level in levels]

    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 (I, 3, size, size) -> visual tokens (I, V, D), all of them."""
        return self.connector(self.levels(self.states(pixels)))

    def bank(self, batch) -> Tensor | None:
        """The visual tokens that slots refer to, one after the other: all of batch.full_views (V each), the
        pruned ones of batch.pruned_views (l + K each), the newline. (rows, D); None if no slot wants any.
        """
        full, pruned = batch.full_views, batch.pruned_views
        if not len(full) and not len(pruned):
            return None
        states = self.states(batch.pixels)
        if len(pruned) and prune.PRUNERS[self.cfg.prune.name].where in ("tokens", "grid"):
            every = self.connector(self.levels(states))  # (I, V, D): it chooses among them
            bank = [of_views(every, full), self.pruned_tokens(states, batch, of_views(every, pruned))]
        else:
            bank = [self.connector(self.levels(states, full))] if len(full) else []
            bank += [self.pruned_tokens(states, batch)] if len(pruned) else []
        bank = torch.cat([x.flatten(0, 1) for x in bank])
        slots = len(full) * self.cfg.visual_tokens() + len(pruned) * self.cfg.visual_tokens("pruned")
        if len(bank) != slots:
            raise RuntimeError(f"connector and pruner give {len(bank)} visual tokens, slots are {slots}")
        return bank if self.newline is None else torch.cat([bank, self.newline[None].to(bank.dtype)])

    def pruned_tokens(self, states: tuple, batch, tokens: Tensor | None = None) -> Tensor:
        """What the fast mode sees of batch.pruned_views, behind the isolator: (F, l + K, D).

        tokens (F, V, D): where the pruner chooses among the connector's. Others spare the connector work.
        """
        name, keep = self.cfg.prune.name, self.cfg.kept_tokens()
        needs, where = self.pruner_needs(name, states, batch), prune.PRUNERS[name].where
        if where == "scales":  # the finer ones are not computed
            tokens = self.connector(self.levels(states, batch.pruned_views), self.cfg.coarse_scales())
        elif where == "patches":
            patches = self.levels(states, batch.pruned_views)[-1]
            tokens = self.connector([prune.reduce(name, patches, keep, **needs)])
        else:
            tokens = prune.reduce(name, tokens, keep, **needs)
        return self.isolator(tokens)

    def pruner_needs(self, name: str, states: tuple, batch) -> dict:
        """What that pruner asks for besides the features, of batch.pruned_views; no more is computed."""
        asks, views, given = prune.PRUNERS[name].needs, batch.pruned_views, {"grid": self.cfg.grid()}
        if "seeds" in asks:  # picture and step: neither its place in the batch nor the run's seed matters
            pixels = of_views(batch.pixels, views).flatten(1)
            given["seeds"] = pixels.sum(1) + 1_000_003 * batch.next_sample
        if "cls" in asks:
            given["cls"] = of_views(states[-1], views)[:, :1] if self.cfg.vit.cls_token else None
        if {"cls_attention", "keys"} & set(asks):
            seen = self.vit.attention(of_views(states[-2], views), len(states) - 2)
            given["cls_attention"], given["keys"] = seen
        if "text" in asks:
            ids = of_views(batch.questions, views)
            given["text"] = self.decoder.embed(ids.clamp(0)).detach() * (ids >= 0)[..., None]
        return {need: given[need] for need in asks}

    def splice(self, rows, bank: Tensor | None) -> Tensor:
        """Text embeddings with visual tokens in the slots: (B, T, D)"""
        x = self.decoder.embed(rows.ids)
        if bank is None or not len(rows.visual_index):
            return x
        visual = bank[rows.visual_index].to(x.dtype)
        return x.masked_scatter(rows.slot_mask[..., None], visual)

    def logits(self, rows, x: Tensor) -> Tensor:
        """The head at supervised positions only: (R, N), fp32."""
        real = rows.doc_ids >= 0
        hidden = self.decoder.hidden(x, rows.positions, attention_mask(rows), real=real)
        return self.decoder.head(hidden.flatten(0, 1)[rows.supervised]).float()

    def forward(self, batch) -> tuple[Tensor, Tensor | None]:
        """Student logits (R, N), and for slow samples the teacher's (R', N): pruned tokens, no gradient.

        Student and teacher share one pass of the encoder, and of the connector if the pruner stands behind.
        """
        bank = self.bank(batch)
        teacher = None
        if batch.teacher is not None:
            with torch.no_grad():
                teacher = self.logits(batch.teacher, self.splice(batch.teacher, bank.detach()))
        x = self.splice(batch.student, bank)
        # What this batch leaves out (of text: all but the decoder) is touched, or DDP misses its gradients.
        # A gradient of zero, where DualSpeed's code has none: Adam's momentum goes on.
        unused = [] if len(batch.pruned_views) else [*self.isolator.parameters()]
        if not len(batch.full_views) and self.cfg.prune.name == "coarse":  # it leaves the finer scales out
            unused += self.connector.parameters()
        if not len(batch.student.visual_index):
            unused = [p for name, p in self.named_parameters() if not name.startswith("decoder.")]
        touched = [p.sum() for p in unused if p.requires_grad]
        if touched:
            x = x + 0.0 * sum(touched)
        return self.logits(batch.student, x), teacher

    def set_trainable(self, parts: list[str], isolator: bool) -> None:
        """Freeze everything but the named parts of PARTS; the isolator if it is used.

        With adapters "decoder" means the whole of it, "lora" the adapters alone.
        """
        self.requires_grad_(False)
        for name in parts:
            if name == "lora" and not self.cfg.lora.rank:
                raise UserError("--train lora: the model has no adapters, add --lora.rank 64")
            part = getattr(self, "decoder" if name == "lora" else name)
            for key, p in part.named_parameters():
                if name != "lora" or ".lora_" in key:
                    p.requires_grad_(True)
        self.isolator.requires_grad_(isolator)
        if self.newline is not None:
            self.newline.requires_grad_(True)  # it may be new where nothing else of the connector is
        self.vit.encoder["layers"][max(self.cfg.connector.levels) :].requires_grad_(False)  # never run
        self.vit.post_layernorm.requires_grad_(False)

    @torch.no_grad()
    def generate(
        self, batch, end: int, max_new_tokens: int, temperature: float = 0.0, seed: int = 0,
        stops: list[int] | tuple = (),
    ) -> list[list[int]]:  # fmt: skip
        """Continue the rows of `data.prompt_batch`: the new ids of each row, without `end`.

        A row also ends behind one of `stops`, which is kept: it may hold more than what ends an answer.
        temperature 0 takes the likeliest token; above, it samples from softmax(logits / temperature).
        """
        rows = batch.student
        x = self.splice(rows, self.bank(batch))
        B, T = rows.ids.shape
        cache = KVCache(self.cfg.decoder, B, T + max_new_tokens)
        hidden = self.decoder.hidden(x, rows.positions, document_mask(rows.doc_ids), cache)
        visible = F.pad(rows.doc_ids >= 0, (0, max_new_tokens), value=True)  # (B, T + new)
        position = rows.positions[:, -1:]
        draw = torch.Generator(x.device).manual_seed(seed)
        new = torch.full((B, max_new_tokens), end, device=x.device)
        ended = torch.zeros(B, dtype=torch.bool, device=x.device)
        last = torch.tensor([end, *stops], device=x.device)
        for t in range(max_new_tokens):
            logits = self.decoder.head(hidden[:, -1]).float()  # (B, N)
            if temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=draw)[:, 0]
            else:
                token = logits.argmax(-1)
            new[:, t] = torch.where(ended, end, token)
            ended |= torch.isin(token, last)
            if ended.all() or t == max_new_tokens - 1:
                break
            position = position + 1
            mask = visible[:, None, None, : T + t + 1]
            hidden = self.decoder.hidden(self.decoder.embed(new[:, t : t + 1]), position, mask, cache)
        return [row[: row.index(end)] if end in row else row for row in new.tolist()]

    def set_lora(self, cfg: LoraConfig) -> None:
        """Adapters of another shape: those at hand are merged into the decoder, new ones start at 0."""
        if cfg == self.cfg.lora:
            return
        if self.cfg.lora.rank:
            weights = merged(self.decoder)
            with torch.device("meta"):
                self.decoder = Decoder(self.cfg.decoder)
            self.decoder.load_state_dict(weights, assign=True)
        if cfg.rank:
            add_lora(self.decoder, cfg)
        self.cfg.lora = cfg

    def save_pretrained(self, folder: Path, extra: dict | None = None) -> None:
        """model.safetensors, config.json (the model's and `extra`), preprocessor.json."""
        write_weights(folder / "model.safetensors", self.state_dict())
        write_json(
            folder / "preprocessor.json",
            {"image_size": self.cfg.vit.image_size, **dataclasses.asdict(self.cfg.image)},
        )
        write_json(folder / "config.json", {"model": dataclasses.asdict(self.cfg), **(extra or {})})

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = torch.float32) -> "VLM":
        """From a run folder (its newest complete step) or a step folder. dtype None: as it was saved."""
        folder = find_step(path)
        with torch.device("meta"):
            vlm = cls(from_dict(ModelConfig, read_run_config(folder, "model")["model"]))
        load_weights(vlm, open_weights(folder), folder, dtype)
        return vlm


def find_device(name: str) -> str:
    """ "cpu" or "cuda" for a --device of auto, cpu or cuda."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device '{name}' is unknown: use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def find_ranks(device: str, hours: float = 0.5) -> tuple[int, int, torch.device]:
    """Rank, world size and device, from torchrun's environment; gloo on CPU, NCCL on CUDA. hours: how long a
    rank waits for another.
    """
    device = find_device(device)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = torch.device(device, int(os.environ.get("LOCAL_RANK", 0)) if device == "cuda" else None)
    if device == "cuda":
        torch.cuda.set_device(place)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=hours))
    return rank, world, place


def require_at_least(config, least: float, names: str) -> None:
    """Refuse flags below a bound."""
    for name in names.split():
        if getattr(config, name) < least:
            raise UserError(f"--{name} {getattr(config, name)}: must be at least {least}")


PARTS = ("vit", "connector", "decoder", "lora")


def trainable_parts(train: str) -> list[str]:
    """--train "vit,connector" as a list of parts of the VLM."""
    parts = train.split(",")
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--train '{part}' is unknown: use a comma list of {', '.join(PARTS)}")
    return parts


def read_preprocessor(folder: Path) -> tuple[ImageConfig, int]:
    """Mean, std and interpolation the encoder was trained with, and the side of its pictures in pixels."""
    file = folder / "preprocessor_config.json"
    if not file.is_file() and (folder / "processor_config.json").is_file():  # newer exports
        file = folder / "processor_config.json"
    if not file.is_file():
        raise UserError(f"{file} is missing: the encoder's image mean and std are not known")
    theirs = read_json(file)
    theirs = theirs.get("image_processor", theirs)
    if "image_mean" not in theirs or "image_std" not in theirs:
        raise UserError(f"{file}: image_mean or image_std is missing")
    size = theirs.get("crop_size") if theirs.get("do_center_crop") else theirs.get("size")
    if isinstance(size, dict):  # {"height", "width"} or {"shortest_edge"}
        size = size.get("height", size.get("shortest_edge"))
    size = size or read_vit_config(folder / "config.json").image_size
    return ImageConfig(theirs["image_mean"], theirs["image_std"], theirs.get("resample", 3)), size


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


def read_config(path: Path) -> dict:
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} is no JSON object, as a Hugging Face config.json is")
    return config


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def open_weights(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Name -> a function that reads that tensor from model.safetensors, its shards, or else a .bin file.

    Nothing is read yet. Files are mapped, not loaded, and a safetensors file anew for each tensor, so that
    the pages of one tensor are given back before the next is cast.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return readers_of(folder / name)
        if (folder / f"{name}.index.json").is_file():
            index = read_json(folder / f"{name}.index.json")
            if "weight_map" not in index:
                raise UserError(f"{folder / name}.index.json has no weight_map")
            shards = sorted(set(index["weight_map"].values()))
            return {key: read for shard in shards for key, read in readers_of(folder / shard).items()}
    raise UserError(f"{folder}/model.safetensors does not exist, nor its .index.json, nor pytorch_model.bin")


def readers_of(file: Path) -> dict[str, Callable[[], Tensor]]:
    if not file.is_file():
        raise UserError(f"{file} does not exist, although its index names it: repeat the download")
    try:
        if file.suffix == ".bin":  # never unpickles anything but tensors
            tensors = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
            if not all(isinstance(value, Tensor) for value in dict(tensors).values()):
                raise ValueError("it holds more than tensors")
            return {name: lambda value=value: value for name, value in tensors.items()}
        with safe_open(file, "pt") as opened:
            return {name: functools.partial(read_tensor, file, name) for name in opened.keys()}
    except pickle.UnpicklingError:  # torch's text advises to load it all the same
        raise UserError(
            f"{file} holds more than tensors, which is not loaded: convert it to safetensors"
        ) from None
    except (SafetensorError, RuntimeError, OSError, ValueError, TypeError) as e:
        why = str(e).splitlines()[0]
        raise UserError(f"{file} is damaged or no file of weights that can be mapped ({why})") from None


def read_tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    plain = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    save_file(plain, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def load_weights(module: nn.Module, readers: dict, source: str | Path, dtype: torch.dtype | None) -> None:
    """Fill a module made on the meta device, each tensor cast once to dtype (None: as it is stored).

    Strict: names the first tensor that is missing, unknown or of another shape.
    """
    own = module.state_dict()
    for name in own:
        if name not in readers:
            raise UserError(f"{source}: tensor '{name}' is missing")
    for name in readers:
        if name not in own:
            raise UserError(f"{source}: tensor '{name}' is not part of this model")
    loaded = {}
    for name, like in own.items():
        value = readers[name]()
        while value.ndim > like.ndim and value.shape[0] == 1:  # some tables have a leading axis
            value = value[0]
        if not value.is_floating_point():
            raise UserError(f"{source}: tensor '{name}' is {value.dtype}: quantized weights are not read")
        if value.shape != like.shape:
            raise UserError(f"{source}: tensor '{name}' is {tuple(value.shape)}, not {tuple(like.shape)}")
        loaded[name] = value.to(dtype or value.dtype, copy=True)  # off the mapped file
    module.load_state_dict(loaded, assign=True)


# ---------------------------------------------------------------------------------------------------------
# The hub: `download` fills a folder, `find_half` finds it again. Only `download` imports the hub's client.

REPO = r"(\w[\w.-]*/\w[\w.-]*)(?:@(.+))?"  # owner/name or owner/name@revision
SMALL_FILES = r"(|preprocessor_|processor_|tokenizer_)config\.json|(tokenizer|vocab|added_tokens)\.json|"
SMALL_FILES += r"special_tokens_map\.json|merges\.txt|[^/]+\.tiktoken|(original/)?tokenizer\.model"
STATE = Path(".cache/huggingface/download")  # the client's notes in the folder that it fills
HUB_ERRORS = {  # the client's, by name
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "GatedRepoError": "it is gated: accept its licence on its page, then set HF_TOKEN",
    "RevisionNotFoundError": "it has no such revision",
    "RepositoryNotFoundError": "no such repository: check the name, or set HF_TOKEN if it is not public",
}


def choose_files(names: list[str]) -> list[str]:
    """What our loaders read of a repository, its weights in one format; nothing where there are none."""
    for weights in (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin"):
        if any(re.fullmatch(weights, name) for name in names):
            return [n for n in names if re.fullmatch(rf"{SMALL_FILES}|{weights}(\.index\.json)?", n)]
    return []


def download(repo: str, to: str) -> Path:
    """The files of a repository in folder `to`. A repeated call fetches only those not complete."""
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    if not (asked := re.fullmatch(REPO, repo)):
        raise UserError(f"'{repo}' is no repository: write owner/name, owner/name@revision or a local folder")
    name, revision, folder = asked[1], asked[2] or "main", Path(to)
    begun = folder / STATE / "source.json.incomplete"
    try:
        wait = constants.HF_HUB_ETAG_TIMEOUT  # by default this call would wait for ever
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=wait)
        sizes = {file.rfilename: file.size for file in info.siblings}
        if not (wanted := choose_files(list(sizes))):
            raise UserError(f"{repo} has neither model.safetensors nor pytorch_model.bin: choose another")
        for note in (begun, folder / "source.json"):  # two commits in one folder could mix
            if note.is_file() and read_json(note).get("commit") != info.sha:
                raise UserError(f"{folder} holds another download ({note}): delete the folder or change --to")
        source = {"repo": name, "revision": revision, "commit": info.sha}
        write_json(begun, source)
        # One file at a time: the client starts an interrupted file anew, so a break costs one at most.
        snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=wanted, max_workers=1)
    except (OSError, ValueError, RuntimeError, errors.HTTPError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):  # "nor is it in the cache": the cause says why
            error = error.__cause__ or error
        said = f"{constants.ENDPOINT}: {type(error).__name__}: {' '.join(str(error).split())}"
        why = next((HUB_ERRORS[c.__name__] for c in type(error).__mro__ if c.__name__ in HUB_ERRORS), said)
        local = "a local folder in Hugging Face layout works too"
        raise UserError(f"{repo} was not downloaded ({why}); {local}") from error
    for file in wanted:  # when the hub fails half-way, the client may be content with what is there
        if not (folder / file).is_file() or (folder / file).stat().st_size != sizes[file]:
            raise UserError(f"{folder / file} is not complete: repeat the download of {repo}")
    for rest in (folder / STATE).rglob("*.incomplete"):  # `begun`, and what killed processes left
        rest.unlink()
    write_json(folder / "source.json", source)
    return folder


def find_half(half: str | Path) -> Path:
    """A folder as it is, or the one that a repository was downloaded to. Never asks the network."""
    folder = Path(half)
    if not folder.is_dir() and (asked := re.fullmatch(REPO, str(half))):
        folder = Path("weights") / asked[1]
        if not folder.is_dir():
            fetch = f"python model.py --download {half}, or give a folder in Hugging Face layout"
            raise UserError(f"{half} is no folder and not downloaded: fetch it with {fetch}")
        source = read_json(folder / "source.json") if (folder / "source.json").is_file() else {}
        if asked[2] and source and asked[2] not in (source["revision"], source["commit"]):
            raise UserError(f"{folder} holds revision {source['revision']} of {asked[1]}, not {asked[2]}")
    if not folder.is_dir():
        raise UserError(f"{half} is neither a folder in Hugging Face layout nor a repository (owner/name)")
    if not (folder / "source.json").is_file() and any((folder / STATE).rglob("*.incomplete")):
        raise UserError(f"{folder} is an unfinished download: repeat its python model.py --download")
    return folder


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


source_of = functools.cache(inspect.getsource)  # which parses a whole file for every class


def flags_of(config, prefix: str = "") -> dict[str, tuple]:
    """Flag name -> (object, field, type, comment): the comment behind the field is its help text."""
    source = "".join(source_of(cls) for cls in type(config).__mro__[:-1])
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
        config, attribute, kind, _ = flags[name[2:]]
        if kind is bool and (not words or words[0].startswith("--")):
            words.insert(0, "true")  # --plan is --plan true
        if not words:
            raise UserError(f"{name} needs a value")
        setattr(config, attribute, parse_value(name[2:], words.pop(0), kind))


def run_cli(main) -> None:
    """An entry point: a UserError, or what the system says of a path, becomes one line and exit code 2."""
    try:
        main(sys.argv[1:])
    except (UserError, OSError, SafetensorError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


# ---------------------------------------------------------------------------------------------------------
# Presets: a model and a recipe for each stage (flags of train_pretrain.RunConfig: what trains, which rates).
# "source" says where a row comes from, "ours" what that source did not publish and we chose, "plan_only" why
# it cannot be trained. "pretrain_b" is the recipe of a stage-1 call with --scale; "scale" is for the plan.

VIT_L = ViTConfig(224, 14, 1024, 24, 16, 4096)  # openai/clip-vit-large-patch14 (and -336)
VIT_H = ViTConfig(378, 14, 1280, 32, 16, 5120)  # apple/DFN5B-CLIP-ViT-H-14-378
SIGLIP2_B = ViTConfig(256, 16, 768, 12, 12, 3072, "gelu_pytorch_tanh", 1e-6, False, "siglip", False, "")
SIGLIP2_B.patch_bias = True  # google/siglip2-base-patch16-256
VICUNA_7B = DecoderConfig(32000, 4096, 32, 32, 32, 128, 11008, norm_eps=1e-5, tied=False)
LLAMA3_8B = DecoderConfig(128256, 4096, 32, 32, 8, 128, 14336, 500000.0, norm_eps=1e-5, tied=False)
QWEN_7B = DecoderConfig(152064, 3584, 28, 28, 4, 128, 18944, 1e6, qkv_bias=True, tied=False)
QWEN_1B = DecoderConfig(151936, 1536, 28, 12, 2, 128, 8960, 1e6, qkv_bias=True)
QWEN_HALF_B = DecoderConfig(151936, 896, 24, 14, 2, 64, 4864, 1e6, qkv_bias=True)
SMOLLM2_360M = DecoderConfig(49152, 960, 32, 15, 5, 64, 2560, 100000.0, norm_eps=1e-5)
SPM = "for planning only: Vicuna's SentencePiece tokenizer does not load here; train on Qwen or Llama-3"


def gala(
    width: int, layers: int, heads: int, mlp_width: int, experts: int = 0, expert_every: int = 2
) -> DecoderConfig:
    """MM1's decoders are known by size only; these are the shapes of AXLearn's Gala family (mm1.md 1.3)."""
    head = width // heads
    return DecoderConfig(
        32768, width, layers, heads, heads, head, mlp_width, norm_eps=1e-5, context=4096, qk_norm=True,
        tied=False, experts=experts, expert_every=expert_every,
    )  # fmt: skip


def mm1(vit: ViTConfig, decoder: DecoderConfig, resolution: str = "672+split", z_loss: float = 0.0) -> dict:
    """MM1 (2403.09611): nothing frozen, C-Abstractor with 144 tokens, the rate from its law (section 3.3);
    fine-tuned on 1344 px: the whole and four crops, each of 672 (section 5).
    """
    connector = ConnectorConfig("cabstractor", [vit.layers], 1024, 16, tokens=144)
    train = {
        "train": "vit,connector,decoder", "weight_decay": 0.1, "decay": "all", "final_lr": 0.1,
        "micro_steps": 16, "z_loss": z_loss,
    }  # fmt: skip
    return {
        "source": "MM1, arXiv 2403.09611, sections 3.1-3.3 and 4",
        "ours": "decoder shape and vocabulary (AXLearn's Gala; no tokenizer here has its 32,768 ids), width "
        "inside the C-Abstractor (Honeybee's), what decays, the encoder's rate, warm-up and AdamW of stage 2 "
        "(it had AdaFactor). Its weights were never released: it starts at random"
        + "; experts' capacity and drops (AXLearn's), and that none began as a copy" * bool(decoder.experts),
        "model": ModelConfig(vit=vit, connector=connector, decoder=decoder),
        "pretrain": {
            **train, "lr": -1, "vit_lr": 5e-5, "rows": 512, "row_length": 4096, "row_limit": 4096,
            "steps": 200_000, "warmup": 0.01,
        },
        "sft": {
            **train, "lr": 1e-5, "vit_lr": 1e-5, "batch_size": 256, "row_length": 2048, "row_limit": 2048,
            "steps": 10_000, "slow_share": 1.0, "distill_weight": 0.0, "resolution": resolution,
        },
    }  # fmt: skip


# What trains in each stage of Chain-of-Sight (its section 3.3); the decoder itself never does.
COS_TRAINS = {
    "pretrain": "connector,lora",  # 1a, at 224 px
    "pretrain_b": "vit,connector,lora",  # 1b, at 448 px on the scaled tokens
    "sft": "vit,connector,lora",
}


def chain_of_sight(decoder: DecoderConfig, decoder_from: str, plan_only: str = "") -> dict:
    """CoS (2407.15819): 80 tokens at 224 px, then 1296 at 448; always LoRA, the ViT trains from 1b on."""
    train = {"lr": 2e-4, "vit_lr": 2e-5, "batch_size": 512, "micro_steps": 4, "frozen": "bfloat16"}
    return {
        "source": "Chain-of-Sight, arXiv 2407.15819, sections 3 and 4",
        "ours": "all rates and batches (Table A3 was not at hand), LoRA's rank and alpha, steps of stage 2",
        "plan_only": plan_only,
        "model": ModelConfig(
            vit=dataclasses.replace(VIT_L, align_corners=True),
            connector=ConnectorConfig("chain", [16, 23], 1024, 16, [16, 4], [16, 4]),
            decoder=decoder,
            lora=LoraConfig(64, 64.0),
            encoder_from="openai/clip-vit-large-patch14",
            decoder_from=decoder_from,
        ),
        "scale": "80to1296",
        "pretrain": {**train, "train": COS_TRAINS["pretrain"], "steps": 120_000},
        "pretrain_b": {**train, "train": COS_TRAINS["pretrain_b"], "steps": 30_000, "batch_size": 128},
        "sft": {
            **train, "train": COS_TRAINS["sft"], "steps": 10_000, "batch_size": 128, "row_length": 2048,
            "slow_share": 1.0, "distill_weight": 0.0,
        },
    }  # fmt: skip


def llava(decoder: DecoderConfig, decoder_from: str, resolution: str = "+pad", plan_only: str = "") -> dict:
    """LLaVA as DualSpeed (2602.03815) trains it: fast on a tenth of the tokens, one step of ten on all."""
    tiles, row = (5, 4096) if "unpad" in resolution else (1, 2048)
    return {
        "source": f"DualSpeed, arXiv 2602.03815, on LLaVA's recipe; {tiles} x 576 tokens a picture",
        "ours": "packed rows, one mode a step (the code: a micro-batch), 58 tokens kept (57), AdamW's 0.95"
        + ("" if decoder is VICUNA_7B else ", the decoder (Vicuna-7B)"),
        "plan_only": plan_only,
        "model": ModelConfig(
            vit=dataclasses.replace(VIT_L, image_size=336),
            connector=ConnectorConfig("mlp", [23], 1024, 16),
            decoder=decoder,
            prune=PruneConfig("divprune", 0.1, 4),
            encoder_from="openai/clip-vit-large-patch14-336",
            decoder_from=decoder_from,
        ),
        "pretrain": {
            "train": "connector", "lr": 1e-3, "batch_size": 256, "steps": 2180, "row_length": 1024,
            "final_lr": 0.0, "pruner": "divprune", "frozen": "bfloat16", "micro_steps": 2,
        },
        "sft": {
            "train": "connector,decoder", "lr": 2e-5, "batch_size": 128, "steps": 5198, "row_length": row,
            "row_limit": row, "final_lr": 0.0, "mode": "batch", "frozen": "bfloat16", "micro_steps": 8,
            "resolution": resolution,
        },
    }  # fmt: skip


def tonight(
    vit: ViTConfig, encoder_from: str, levels: list[int], decoder: DecoderConfig, decoder_from: str
) -> dict:
    """One GPU, one evening: 80 tokens in stage 1, 336 at twice the side in stage 2, nine of ten fast."""
    return {
        "source": "ours: Chain-of-Sight and DualSpeed together, for one GPU",
        "ours": "everything but the methods",
        "model": ModelConfig(
            vit=vit,
            connector=ConnectorConfig("chain", levels, 768, 12, [16, 4], [16, 4]),
            decoder=decoder,
            prune=PruneConfig("divprune", 0.25, 4),
            encoder_from=encoder_from,
            decoder_from=decoder_from,
        ),
        "scale": "80to336",
        "pretrain": {
            "train": "connector", "lr": 1e-3, "rows": 32, "row_length": 1024, "row_images": 12,
            "steps": 1860, "frozen": "bfloat16", "micro_steps": 8,
        },
        "sft": {
            "train": "connector,decoder", "lr": 5e-5, "rows": 32, "row_length": 1024, "row_images": 6,
            "steps": 6650, "frozen": "bfloat16", "micro_steps": 16,
        },
    }  # fmt: skip


CLIP_L, SIGLIP2 = "openai/clip-vit-large-patch14", "google/siglip2-base-patch16-256"
PRESETS = {
    "tiny": {
        "source": "ours: the demo on two CPU cores, with the shipped halves",
        "ours": "everything but the methods",
        "model": ModelConfig(
            prune=PruneConfig(keep=0.25),
            decoder=DecoderConfig(447, kv_heads=4, tied=False),
            encoder_from=str(ASSETS / "tiny_vit"),
            decoder_from=str(ASSETS / "tiny_lm"),
        ),
        "scale": "32to144",
        "pretrain": {"train": "connector,decoder", "steps": 400, "lr": 2e-3, "muon_lr": 0.01},
        "sft": {"train": "connector,decoder", "steps": 340, "lr": 1e-3, "muon_lr": 0.005},
    },
    "clip-smollm2-360m": tonight(VIT_L, CLIP_L, [16, 23], SMOLLM2_360M, "HuggingFaceTB/SmolLM2-360M"),
    "siglip2-qwen2.5-0.5b": tonight(SIGLIP2_B, SIGLIP2, [8, 11], QWEN_HALF_B, "Qwen/Qwen2.5-0.5B"),
    "siglip2-qwen2.5-1.5b": tonight(SIGLIP2_B, SIGLIP2, [8, 11], QWEN_1B, "Qwen/Qwen2.5-1.5B"),
    "llava-1.5": llava(QWEN_7B, "Qwen/Qwen2.5-7B"),
    "llava-next": llava(LLAMA3_8B, "meta-llama/Meta-Llama-3-8B", "336+unpad"),
    "llava-1.5-vicuna": llava(VICUNA_7B, "lmsys/vicuna-7b-v1.5", plan_only=SPM),
    "cos-7b": chain_of_sight(VICUNA_7B, "lmsys/vicuna-7b-v1.5", SPM),
    "cos-8b": chain_of_sight(LLAMA3_8B, "meta-llama/Meta-Llama-3-8B-Instruct"),
    "1.2b": mm1(dataclasses.replace(VIT_L, image_size=336), gala(2048, 24, 32, 5632), ""),
    "3b": mm1(VIT_H, gala(2560, 36, 20, 6912)),
    "7b": mm1(VIT_H, gala(4096, 32, 32, 11008)),
    "30b": mm1(VIT_H, gala(7168, 48, 56, 19200), z_loss=1e-4),
    "3b-moe": {  # the rate is that of the dense backbone; N + N * 2/3 * share * (E - 1) parameters of 2.9B
        **mm1(VIT_H, gala(2560, 36, 20, 6912, 64, 2)), "reported": "\n  (63.8B by formula, MM1: 64B)",
    },
    "7b-moe": {  # MM1's own 7B decoder must have a larger feed-forward share than 2/3
        **mm1(VIT_H, gala(4096, 32, 32, 11008, 32, 4)), "reported": "\n  (39.5B by formula, MM1: 47B)",
    },
}  # fmt: skip
PRESETS["tiny-moe"] = {  # the shipped decoder upcycled
    **PRESETS["tiny"],
    "model": dataclasses.replace(
        PRESETS["tiny"]["model"], decoder=dataclasses.replace(PRESETS["tiny"]["model"].decoder, experts=4)
    ),
}


def preset(name: str) -> dict:
    if name not in PRESETS:
        raise UserError(f"--preset '{name}' is unknown: use one of {', '.join(PRESETS)}")
    return PRESETS[name]


# ---------------------------------------------------------------------------------------------------------
# The plan: what a preset costs before anything is downloaded, counted on the meta device. Matrix products
# only, causal attention not halved, no recomputation, no padding; one block is counted, taken times layers.

# name, samples in each stage, text tokens a sample: what the hours are given for
WORKLOADS = (
    ("LLaVA-Pretrain 558k", {"1": 558_128}, 23),  # captions of 14 tokens on average, and their template
    ("LLaVA mix665k", {"2": 665_298}, 200),
    ("Chain-of-Sight's 65M pairs", {"1": 120_000 * 512, "1b": 30_000 * 128}, 23),
    ("MM1: 200k steps of 512 rows of 4096", {"1": 200_000 * 512 * 14}, 148),  # half text, half images of 144
    ("MM1: 10k steps of 256", {"2": 2_560_000}, 200),
)
# Under autocast residuals, norms and rotations stay float32: measured 1.6 (a Qwen2.5 block) to 2.0 (a small
# VLM) times the bytes that pure bfloat16 keeps.
AUTOCAST = 1.8
# FlopCounterMode does not know grouped_mm: (rows, in) times (E, in, out), or (in, rows) times (rows, out)
GROUPED_MM = {torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1]}


def count(run: Callable[[], Tensor], positions: int = 0) -> tuple[float, float]:
    """FLOPs of forward and backward of `run`, and the bytes that its backward pass keeps; all on meta.

    Kept are neither weights nor what fused attention over `positions` never stores: its probabilities.
    """
    kept = {}

    def pack(x: Tensor) -> Tensor:
        weight = isinstance(x if x._base is None else x._base, nn.Parameter)
        if x.is_floating_point() and not weight and x.shape[-2:] != (positions, positions):
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    unpack, hooks = (lambda x: x), torch.autograd.graph.saved_tensors_hooks
    with FlopCounterMode(display=False, custom_mapping=GROUPED_MM) as counter, hooks(pack, unpack):
        out = run()
        stored = sum(kept.values())
        if out.requires_grad:
            out.sum().backward()
    return float(counter.get_total_flops()), float(stored)


def sample_cost(cfg: ModelConfig, train: list[str], text: int, mode: str, images: int) -> tuple[dict, float]:
    """FLOPs by part and kept bytes of a sample. mode: full, fast, or slow (full, and a teacher's forward)."""
    vit, decoder, late = cfg.vit, cfg.decoder, "vit" in train
    with torch.device("meta"):
        block = ViTBlock(vit).bfloat16().requires_grad_(late)
        connector = CONNECTORS[cfg.connector.kind](cfg).bfloat16().requires_grad_("connector" in train)
        one = Decoder(dataclasses.replace(decoder, layers=1 + bool(decoder.experts), expert_every=2))
        if cfg.lora.rank:
            add_lora(one, cfg.lora)
        one.bfloat16().requires_grad_("decoder" in train)
        for name, p in one.named_parameters():
            p.requires_grad_(p.requires_grad or ("lora" in train and ".lora_" in name))

        P = cfg.side**2 + vit.cls_token
        patches = torch.zeros(images, P, vit.width).bfloat16().requires_grad_(late)
        flops, kept = count(lambda: block(patches), P)
        stem = 2 * images * cfg.side**2 * 3 * vit.patch_size**2 * vit.width * (2 if late else 1)
        depth = max(cfg.connector.levels)
        parts, bytes_kept = {"vit": depth * flops + stem}, depth * kept
        levels = [patches[:, int(vit.cls_token) :] for _ in cfg.connector.levels]
        where, scales = prune.PRUNERS[cfg.prune.name].where if mode == "fast" else "", {}
        if where == "scales":  # these two spare the connector work: see VLM.pruned_tokens
            scales["n_scales"] = cfg.coarse_scales()
        elif where == "patches":
            levels = [x[:, : cfg.kept_tokens()] for x in levels]
        parts["connector"], kept = count(lambda: connector(levels, **scales))
        bytes_kept += kept

        sparse = sum(map(decoder.sparse, range(decoder.layers)))
        times = (decoder.layers - sparse, sparse)  # how often each block of `one` is there

        def run(mode: str) -> tuple[float, float, float]:
            T = text + cfg.visual_tokens(mode, images)
            x = torch.zeros(1, T, decoder.width).bfloat16().requires_grad_()
            rope, mask = rope_tables(torch.zeros(1, T), decoder), torch.zeros(1, 1, T, T, dtype=torch.bool)
            outs = [lambda: one.layers[0](x, rope, mask), lambda: one.layers[1](x, rope, mask)[0]]
            blocks = [count(out, T) for out, _ in zip(outs, one.layers)]
            flops, kept = (sum(n * block[i] for n, block in zip(times, blocks)) for i in (0, 1))
            logits = 3 * 4 * text * decoder.vocab_size / AUTOCAST  # in float32: they, log-softmax, gradient
            return flops, count(lambda: one.head(x[:, :text]))[0], kept + logits

        parts["decoder"], parts["head"], kept = run("pruned" if mode == "fast" else "full")
        if mode == "slow":
            with torch.no_grad():
                parts["teacher"] = sum(run("pruned")[:2])
    return parts, AUTOCAST * (bytes_kept + kept)


@dataclass
class Stage:
    """One stage of a preset, as the plan sees it."""

    name: str
    cfg: ModelConfig
    train: list[str]
    frozen_bytes: int
    samples: dict[str, float]  # mode -> share of the samples
    flags: dict  # its recipe

    @property
    def text(self) -> int:
        """Tokens of text in a sample, about: LLaVA's captions, its conversations."""
        return 200 if self.name == "2" else 23

    @property
    def micro(self) -> int:
        """Samples of a micro-batch, over all GPUs: with one picture each, as many as its rows take."""
        samples, length = self.flags.get("batch_size"), self.flags.get("row_length", 256)
        if not samples:
            modes = {mode: "pruned" if mode == "fast" else "full" for mode in self.samples}
            tokens = sum(n * self.cfg.visual_tokens(modes[m], self.views) for m, n in self.samples.items())
            per_row = min(int(length / (tokens + self.text)), self.flags.get("row_images", 16) // self.views)
            samples = self.flags.get("rows", 16) * max(1, per_row)
        return samples // self.flags.get("micro_steps", 1)

    @property
    def views(self) -> int:
        """Of one picture: the whole and 2x2 tiles, the most that there are, where pictures are cut."""
        return 5 if self.cfg.image.cut else 1

    def cost(self, text: int) -> tuple[dict, float]:
        """FLOPs by part of a mean sample of one picture, and the most bytes that a sample keeps."""
        parts, kept = {}, 0.0
        for mode, share in self.samples.items():
            costs, bytes_kept = sample_cost(self.cfg, self.train, text, mode, self.views)
            kept = max(kept, bytes_kept)
            for part, flops in costs.items():
                parts[part] = parts.get(part, 0.0) + share * flops
        return parts, kept


def grows(row: dict, cfg: ModelConfig) -> bool:
    """Whether the preset's scaling step still fits: a flag may have changed the connector."""
    mine, theirs = (c.check().connector for c in (cfg, row["model"]))
    return "scale" in row and (mine.kind, mine.windows, mine.queries) == (
        "chain",
        theirs.windows,
        theirs.queries,
    )


def flags_over(row: dict, tools: "ToolConfig") -> dict:
    """The preset with the plan's own --micro_steps in every recipe and --train in that of stage 2."""
    row = dict(row)
    for stage in ("pretrain", "pretrain_b", "sft") if tools.micro_steps else ():
        if stage in row:
            row[stage] = {**row[stage], "micro_steps": tools.micro_steps}
    if tools.train:
        row["sft"] = {**row["sft"], "train": tools.train}
    return row


def stages_of(row: dict, cfg: ModelConfig) -> list[Stage]:
    """Stage 1, perhaps 1b, and 2, each with the config it has by then."""
    later = scaled_config(cfg, row["scale"]) if grows(row, cfg) else cfg
    stages = []
    for name, recipe in (("1", "pretrain"), ("1b", "pretrain_b"), ("2", "sft")):
        if recipe not in row:
            continue
        flags, mine = row[recipe], cfg if recipe == "pretrain" else later
        if mine.connector.kind == row["model"].connector.kind:  # else the recipe's resolution may not fit
            mine = at_resolution(mine, flags.get("resolution", ""))
        slow, taught = flags.get("slow_share", 0.1), flags.get("distill_weight", 1.0) > 0
        samples = {"fast": 1 - slow, "slow" if taught else "full": slow}
        if name != "2":
            samples = {"fast" if flags.get("pruner") else "full": 1.0}
        train = trainable_parts(flags["train"])
        if not {"lora", "decoder"} & {*train}:
            mine = dataclasses.replace(mine, lora=LoraConfig())
        stages.append(Stage(
            name, mine, train, 2 if flags.get("frozen") == "bfloat16" else 4,
            {mode: n for mode, n in samples.items() if n}, flags,
        ))  # fmt: skip
    return stages


def part_sizes(vlm: nn.Module) -> dict[str, tuple[int, int]]:
    """Part -> (parameters, those that train)."""
    sizes = {}
    for name, p in vlm.named_parameters():
        part = "lora" if ".lora_" in name else name.split(".")[0]
        if "embed_tokens" in name or "lm_head" in name:
            part = "embeddings"
        total, trained = sizes.get(part, (0, 0))
        sizes[part] = (total + p.numel(), trained + p.numel() * p.requires_grad)
    return sizes


def state_bytes(stage: Stage, sizes: dict) -> tuple[float, float]:
    """Weights, gradients and moments on one GPU under DDP: as the stage trains, and with LoRA 64 instead.

    Float32 weights, gradients and two moments and autocast's bfloat16 copy: 18 bytes; frozen ones as kept.
    """
    trained, total = (sum(size[i] for size in sizes.values()) for i in (1, 0))
    plain = 18 * trained + stage.frozen_bytes * (total - trained)
    c = stage.cfg.decoder
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    adapters = 64 * c.layers * (2 * (c.width + q) + 2 * (c.width + kv) + 3 * (c.width + c.mlp_width))
    full = sum(sizes[part][1] for part in ("decoder", "embeddings"))
    return plain, plain - 16 * full + 18 * adapters if full and not c.experts else plain


def savings(stage1: Stage, stage2: Stage) -> list[str]:
    """What the papers' two ideas are worth with these halves, in FLOPs, beside what they report.

    What they report is time, with a 7B decoder behind CLIP-L: no halves but those can be expected to match.
    """

    def parts(stage: Stage, text: int, mode: str, images: int, pixels: int, **connector) -> dict:
        vit = dataclasses.replace(stage1.cfg.vit, image_size=pixels)
        connector = dataclasses.replace(stage1.cfg.connector, plan="", **connector)
        cfg = dataclasses.replace(stage1.cfg, vit=vit, connector=connector, prune=PruneConfig(keep=0.1))
        return sample_cost(cfg, stage.train, text, mode, images)[0]

    side = stage1.cfg.vit.image_size
    few = [parts(stage1, 23, "full", 1, side, kind="resampler", tokens=n) for n in (32, 48, 80, 336)]
    total = [sum(x.values()) for x in few]
    fixed = (few[0]["vit"] + few[0]["connector"]) / total[0]
    lines = [
        "Chain-of-Sight, stage 1 with 32 / 48 / 80 / 336 tokens and 23 of text: "
        + " / ".join(f"{x / total[-1]:.2f}" for x in total),
        "  reported: 0.27 / 0.35 / 0.42 / 1.00 of the time (steps 30 % shorter, batches 2.5 times larger)",
        f"  encoder and connector, which fewer tokens do not shrink, are {fixed:.0%} of the FLOPs at 32 here",
    ]
    for images, told in (
        (1, "576 tokens (LLaVA-1.5): reported 2.1"),
        (5, "5 x 576 (LLaVA-NeXT): reported 4.0"),
    ):
        times = []
        for text in (200, 100, 300):
            modes = [
                (stage2, text, m, images, 24 * stage1.cfg.vit.patch_size) for m in ("full", "fast", "slow")
            ]
            full, fast, slow = (sum(parts(*mode, kind="mlp").values()) for mode in modes)
            times.append(full / (0.9 * fast + 0.1 * slow))
        lines.append(f"DualSpeed, one in ten slow, 200 of text: {times[0]:.1f} times on {told} (time)")
        lines.append(f"  {times[1]:.1f} at 100 of text, {times[2]:.1f} at 300: its own lengths are not known")
    return lines


def expert_sizes(decoder: Decoder) -> str:
    """How many parameters the experts make of a dense backbone, and how many of them a token meets."""
    cfg = decoder.cfg
    total = sum(p.numel() for name, p in decoder.named_parameters() if "lm_head" not in name)
    total -= decoder.embed_tokens.weight.numel()
    idle = sum(p.numel() for p in decoder.parameters() if p.ndim == 3) * (cfg.experts - 2) // cfg.experts
    return (
        f"  {cfg.experts} experts in {sum(map(cfg.sparse, range(cfg.layers)))} of {cfg.layers} layers: a "
        f"decoder of {total / 1e6:,.1f}, {(total - idle) / 1e6:,.1f} active for a token, dense "
        f"{backbone_size(decoder) / 1e6:,.1f}"
    )


def print_plan(name: str, cfg: ModelConfig, tools: "ToolConfig") -> None:
    """What a preset trains, sees, computes, keeps and takes, and what the papers' ideas are worth in it."""
    row = flags_over(preset(name), tools)
    stages = stages_of(row, cfg)
    print(f"preset {name}: {row['source']}\nnot from there, ours: {row['ours']}\n{row.get('plan_only', '')}")

    if "scale" in row and not grows(row, cfg):
        print(f"its tokens are not scaled up: {row['scale']} does not fit these flags")
    print("parameters (millions)".ljust(30) + "".join(f"stage {s.name}, trained".rjust(22) for s in stages))
    sizes = []
    for stage in stages:
        with torch.device("meta"):
            vlm = VLM(stage.cfg)
        vlm.set_trainable(stage.train, isolator=True)
        sizes.append(part_sizes(vlm))
        sizes[-1]["all"] = tuple(map(sum, zip(*sizes[-1].values())))
    for part in dict.fromkeys(part for size in sizes for part in size):
        numbers = (size.get(part, (0, 0)) for size in sizes)
        cells = (f"{total / 1e6:,.1f}, {trained / 1e6:,.1f}".rjust(22) for total, trained in numbers)
        print(f"  {part}".ljust(30) + "".join(cells))
    if cfg.decoder.experts:
        print(expert_sizes(vlm.decoder) + row.get("reported", ""))

    print("\nvisual tokens a view")
    for stage in stages:
        c = stage.cfg
        seen = ", ".join(f"{share:.0%} {mode}" for mode, share in stage.samples.items())
        print(f"  stage {stage.name}: {c.vit.image_size} px, {c.side**2} patches; full {c.visual_tokens()}, "
              f"fast {c.visual_tokens('pruned')}; samples {seen}; views a picture {stage.views}")  # fmt: skip

    parts = ("vit", "connector", "decoder", "head", "teacher")
    print("\nTFLOP a sample".ljust(31) + "".join(part.rjust(11) for part in (*parts, "all")))
    kept = []
    for stage in stages:
        flops, bytes_kept = stage.cost(stage.text)
        kept.append(bytes_kept)
        cells = [flops.get(part, 0.0) for part in parts] + [sum(flops.values())]
        print(
            f"  stage {stage.name}, {stage.text} of text".ljust(30)
            + "".join(f"{c / 1e12:11.3f}" for c in cells)
        )

    print(f"\nGB on each of {tools.gpus}".ljust(31) + "DDP".rjust(11) + "FSDP2".rjust(11)
          + "LoRA 64".rjust(11) + "   and activations of a sample, of a micro-batch")  # fmt: skip
    for stage, size, bytes_kept in zip(stages, sizes, kept):
        size = {part: n for part, n in size.items() if part != "all"}
        ddp, lora = state_bytes(stage, size)
        micro = bytes_kept * max(1, stage.micro // tools.gpus)
        cells = "".join(f"{x / 1e9:11.1f}" for x in (ddp, ddp / tools.gpus, lora, bytes_kept, micro))
        print(f"  stage {stage.name}".ljust(30) + cells)
    print("  FSDP2 is not built here yet; about, without recomputation")

    print(
        f"\n{tools.gpus} x {tools.peak_tflops:g} TFLOP/s at {tools.mfu:.0%}".ljust(47)
        + "samples/s      hours"
    )
    for work, counts, text in WORKLOADS:
        flops = 0.0
        for name, samples in counts.items():  # a preset without stage 1b sees all pairs in stage 1
            stage = next((stage for stage in stages if stage.name == name), stages[0])
            flops += samples * sum(stage.cost(text)[0].values())
        seconds = flops / (tools.gpus * tools.peak_tflops * 1e12 * tools.mfu)
        print(f"  {work}".ljust(44) + f"{sum(counts.values()) / seconds:11,.0f}{seconds / 3600:11,.1f}")

    print("\nwhat the papers' ideas save here (FLOPs), beside what they report (time, 7B behind CLIP-L)")
    lines = savings(stages[0], stages[-1])
    print("".join(f"  {line}\n" for line in lines), end="")


# ---------------------------------------------------------------------------------------------------------
# Export


def export(run: str, out: str) -> Path:
    """encoder/ and decoder/ of a run in Hugging Face layout, LoRA merged, with preprocessor and tokenizer."""
    step, to = find_step(run), Path(out).resolve()
    if to.exists() and any(to.iterdir()):
        raise UserError(f"--to {to} is not empty: choose a new folder")
    vlm = VLM.from_pretrained(step)
    part = to.with_name(to.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    vlm.decoder.save_pretrained(part / "decoder", end=read_json(step / "config.json").get("end_token"))
    vlm.vit.save_pretrained(part / "encoder")
    size = {"height": vlm.cfg.vit.image_size, "width": vlm.cfg.vit.image_size}
    switches = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    image = {
        "image_processor_type": "CLIPImageProcessor", "image_mean": vlm.cfg.image.mean,
        "image_std": vlm.cfg.image.std, "resample": vlm.cfg.image.resample, "size": size,
        "do_center_crop": False, **switches,
    }  # fmt: skip
    write_json(part / "encoder" / "preprocessor_config.json", image)
    for file in (step / "tokenizer").iterdir():
        shutil.copy(file, part / "decoder" / file.name)
    to.mkdir(parents=True, exist_ok=True)
    os.replace(part, to)
    return to


@dataclass
class ToolConfig:
    """Flags of python model.py."""

    preset: str = "tiny"  # see PRESETS
    plan: bool = False  # print what the preset would cost; the model's flags below change it first
    gpus: int = 8
    peak_tflops: float = 989.0  # of one GPU, dense bfloat16: 989 H100, 312 A100
    mfu: float = 0.4  # share of it that a run reaches
    micro_steps: int = 0  # of every stage in the plan, instead of its recipe's
    train: str = ""  # in stage 2 of the plan, instead of its recipe's: connector,lora with --lora.rank 64
    download: str = ""  # owner/name or owner/name@revision: fetch it from the hub to --to
    export: str = ""  # run or checkpoint: write encoder/ and decoder/ in Hugging Face layout to --to
    to: str = ""  # folder; for a download weights/REPO if not given


def main(argv: list[str]) -> None:
    if "--export" in argv[:-2] and not argv[argv.index("--export") + 2].startswith("--"):  # --export RUN OUT
        argv = [*argv[: argv.index("--export") + 2], "--to", *argv[argv.index("--export") + 2 :]]
    asked = ToolConfig()
    parse_cli(argv, __doc__, asked, ModelConfig())
    cfg = copy_config(preset(asked.preset)["model"])
    model_before = copy_config(cfg)
    parse_cli(argv, __doc__, ToolConfig(), cfg)
    require_at_least(asked, 1, "gpus")
    require_at_least(asked, 0, "micro_steps")
    if asked.mfu <= 0 or asked.peak_tflops <= 0:
        raise UserError(f"--mfu {asked.mfu} and --peak_tflops {asked.peak_tflops} must be above 0")
    if bool(asked.plan) + bool(asked.download) + bool(asked.export) > 1:
        raise UserError("--plan, --download and --export are separate steps: give one of them")
    if not asked.plan and changed_flags(model_before, cfg):
        raise UserError(
            f"--{changed_flags(model_before, cfg)[0]} changes a plan, not a download or an export"
        )
    if asked.plan:
        print_plan(asked.preset, cfg, asked)
    elif asked.download:
        print(f"in {download(asked.download, asked.to or f'weights/{asked.download}')}")
    elif asked.export and asked.to:
        print(f"in {export(asked.export, asked.to)}")
    else:
        raise UserError("nothing to do: --preset NAME --plan, --download REPO --to DIR, or --export RUN OUT")


if __name__ == "__main__":
    run_cli(main)
