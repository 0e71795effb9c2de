"""The model: a vision transformer, a connector, a decoder, and the VLM that splices them.

    pixels ── ViT (hidden states at a few levels) ─► connector (Chain-of-Sight, MM1's, …) ─► V visual tokens
    V tokens ─► spliced into the slots of the text ─► decoder ─► head at supervised positions only

From top to bottom: configs and command line, vision transformer, decoder, LoRA, connectors and their token
scaling (arXiv 2407.15819), the VLM, files. Weights keep Hugging Face names inside each half.

Alphabet of all shape comments: B rows, T positions, I images (each tile of a cut picture is one), P patches
an image, S patches a side, W window side, V visual tokens an image, K kept tokens, D width, H heads,
N vocabulary, R supervised positions.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import re
import sys
import timeit
import types
import zipfile
from collections.abc import Callable
from copy import deepcopy as copy_config
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import get_args

from safetensors import SafetensorError, safe_open

HERE = Path(__file__).resolve().parent
ASSETS = HERE / "assets"
PRESETS = ASSETS / "presets"


class UserError(Exception):
    """What can be wrong with a user's input: one sentence that names the thing, the place and the fix."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def require_one_of(name: str, value: str, options) -> None:
    known = ", ".join(option for option in options if option)
    require(value in options, f"{name} '{value}' is unknown: use one of {known}")


def require_at_least(config, least: float, names: str) -> None:
    for name in names.split():
        require(getattr(config, name) >= least, f"--{name} {getattr(config, name)}: must be at least {least}")


# ---------------------------------------------------------------------------------------------------------
# Configs. `parse_cli` makes the command line of every script from such dataclasses: the comment behind a
# field is its help, a line "# -- name" opens a group of flags.


@dataclass
class ViTConfig:
    """CLIP's shape by default; the switches below make it SigLIP, AIMv2 or DINOv2 (assets/key_maps.json)."""

    # -- model: vision transformer
    image_size: int = 64  # pixels a side; 0: what the pre-trained encoder's preprocessor says
    patch_size: int = 8  # pixels a side of a patch
    width: int = 128  # of the hidden states
    layers: int = 4  # transformer blocks
    heads: int = 4  # attention heads of a block
    mlp_width: int = 512  # hidden width of a block's MLP
    activation: str = "quick_gelu"  # of the MLP: quick_gelu, gelu, gelu_pytorch_tanh or silu
    norm_eps: float = 1e-5  # of every norm
    align_corners: bool = False  # when positions are resized: False as transformers, True as Chain-of-Sight
    family: str = "clip"  # whose names the weights have on disk: clip, siglip, aimv2 or dinov2
    cls_token: bool = True  # a class token in front of the patches
    pre_norm: str = "after"  # a norm "before" or "after" the positions are added, "" for none
    rms_norm: bool = False  # RMSNorm instead of LayerNorm
    gated_mlp: bool = False  # SwiGLU instead of two layers
    patch_bias: bool = False  # a bias in the patch embedding
    attention_bias: bool = True  # biases in the attention's projections
    mlp_bias: bool = True  # biases in the MLP
    layer_scale: bool = False  # a learned factor on what each half of a block adds


@dataclass
class DecoderConfig:
    # -- model: decoder
    vocab_size: int = 512  # rows of the embedding table
    width: int = 128  # of the hidden states
    layers: int = 4  # transformer blocks
    heads: int = 4  # attention heads of a block
    kv_heads: int = 2  # heads of keys and values, shared by groups of query heads
    head_dim: int = 32  # width of a head
    mlp_width: int = 384  # hidden width of the gated MLP
    rope_theta: float = 10000.0  # base of the rotary embedding's wavelengths
    rope_factor: float = 1.0  # Llama 3's stretching of slow rotations; 1: none
    rope_low: float = 1.0  # fewer turns than this in rope_length positions: stretched by rope_factor
    rope_high: float = 4.0  # more turns than this: left as they are
    rope_length: int = 8192  # the context before stretching
    norm_eps: float = 1e-6  # of every norm
    context: int = 2048  # positions it was trained for; nothing here depends on it, exports state it
    qkv_bias: bool = False  # biases on queries, keys and values (Qwen2)
    qk_norm: bool = False  # norms on queries and keys (Qwen3)
    tied: bool = True  # the head is the embedding table
    experts: int = 0  # MLPs of a sparse layer, two of which see each token; 0: all layers are dense
    expert_every: int = 2  # every n-th layer is sparse: of each n the last
    capacity: float = 2.0  # in training each expert takes at most capacity * tokens / experts tokens

    def sparse(self, layer: int) -> bool:
        return self.experts > 0 and (layer + 1) % self.expert_every == 0


@dataclass
class LoraConfig:
    # -- model: adapters (LoRA)
    rank: int = 0  # of the adapters on the decoder's seven linears; 0: none
    alpha: float = 64.0  # their outputs are scaled by alpha / rank


@dataclass
class ConnectorConfig:
    # -- model: connector
    kind: str = "chain"  # chain (Chain-of-Sight), resampler, linear, mlp, avgpool, attnpool or cabstractor
    levels: list[int] = field(default_factory=lambda: [2, 4])  # ViT hidden states read, low to high
    width: int = 128  # inside the connector
    heads: int = 4  # attention heads of chain, resampler and attnpool
    windows: list[int] = field(default_factory=lambda: [8, 2])  # chain: sides in patches, coarse to fine
    queries: list[int] = field(default_factory=lambda: [16, 1])  # chain: learned queries in each window
    tokens: int = 16  # resampler and the pooled kinds: tokens an image (a square number if on a grid)
    key_positions: bool = False  # not in the paper: learned positions in a window, on keys and values
    reverse: bool = False  # not in the paper, which found it worse: fine tokens before coarse ones
    plan: str = ""  # chain: 32, 48, 80 or 336 stands for windows and queries, see SCALE_PLANS


@dataclass
class PruneConfig:
    # -- model: pruned tokens
    name: str = "divprune"  # which tokens the fast mode keeps: see prune.PRUNERS
    keep: float = 0.1  # a share of the visual tokens, or a count if above 1
    isolator: int = 4  # learned vectors in front of pruned tokens (DualSpeed: 4)
    isolator_per: str = "tile"  # in front of every tile's tokens (DualSpeed's code), or once an "image"


@dataclass
class ImageConfig:
    """How the encoder wants its pictures (its preprocessor_config.json); travels with every checkpoint."""

    # -- model: pictures
    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])  # of each channel, from 0 to 1
    std: list[float] = field(default_factory=lambda: [0.25, 0.25, 0.25])  # of each channel
    resample: int = 3  # Pillow's number: 2 bilinear, 3 bicubic
    cut: str = ""  # into tiles of vit.image_size: split, anyres, unpad (--resolution); "" or pad: one tile


@dataclass
class ModelConfig:
    image: ImageConfig = field(default_factory=ImageConfig)
    vit: ViTConfig = field(default_factory=ViTConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    # -- model: pre-trained halves
    encoder_from: str = ""  # a Hugging Face folder or downloaded repository; "" starts at random
    decoder_from: str = ""  # the same
    tokenizer_from: str = ""  # a tokenizer's folder or rank file; "": decoder_from's, else that of Scenes

    @property
    def side(self) -> int:
        """Patches a side."""
        return self.vit.image_size // self.vit.patch_size

    def scales(self) -> list[tuple[int, int]]:
        """(window side in patches, tokens a window), coarse to fine: where the connector's tokens look."""
        return CONNECTORS[self.connector.kind].scales_of(self)

    def scale_tokens(self) -> list[int]:
        """Tokens of each scale."""
        return [(self.side // window) ** 2 * tokens for window, tokens in self.scales()]

    def grid(self) -> int:
        """Side of the square raster that the visual tokens form, 0 if they form none."""
        return CONNECTORS[self.connector.kind].grid(self)

    def visual_tokens(self, view: str = "full", tiles: int = 1) -> int:
        """Positions of a picture of so many tiles ("full" or "pruned" view), before "unpad" drops padding.
        Nothing else computes this; data.picture_slots lists which tokens they are.
        """
        if view == "full":
            return tiles * sum(self.scale_tokens())
        isolators = tiles if self.prune.isolator_per == "tile" else 1
        return tiles * self.kept_tokens() + isolators * self.prune.isolator

    def kept_tokens(self) -> int:
        """What the pruner leaves of a tile, without isolator."""
        p = self.prune
        return prune.kept_tokens(p.name, p.keep, self.visual_tokens(), self.grid(), self.scale_tokens())

    def coarse_scales(self) -> int:
        """How many of Chain-of-Sight's scales the pruner "coarse" keeps."""
        return [*accumulate(self.scale_tokens())].index(self.kept_tokens()) + 1

    def fits(self, pruner: str) -> bool:
        """Whether that pruner can act on this connector's tokens."""
        return prune.PRUNERS[pruner].where in CONNECTORS[self.connector.kind].pruner_places(self)

    def check(self) -> "ModelConfig":
        """Refuse what would silently train another model, or fail only when all is loaded."""
        v, c, d, p = self.vit, self.connector, self.decoder, self.prune
        near = max(1, v.image_size // v.patch_size) * v.patch_size
        size = f"vit.image_size {v.image_size} is no positive multiple of vit.patch_size {v.patch_size}"
        size += f": take --vit.image_size {near}"
        require(v.image_size > 0 and v.image_size % v.patch_size == 0, size)
        require_one_of("vit.pre_norm", v.pre_norm, ("before", "after", ""))
        require_one_of("vit.activation", v.activation, ACTIVATIONS)
        multiple = c.width % c.heads == 0
        require(multiple, f"connector.width {c.width} is no multiple of connector.heads {c.heads}")
        require(min(self.lora.rank, p.isolator) >= 0, "lora.rank and prune.isolator must be at least 0")
        ordered = c.levels and c.levels == sorted(c.levels) and {*c.levels} <= {*range(v.layers + 1)}
        require(ordered, f"connector.levels {c.levels} must lie in 0..{v.layers}, low to high")
        require_one_of("connector.kind", c.kind, CONNECTORS)
        positive = min([c.tokens, *c.queries]) > 0
        require(positive, f"connector.tokens {c.tokens}, connector.queries {c.queries}: must be at least 1")
        CONNECTORS[c.kind].check(self)
        require_one_of("image.cut", self.image.cut, CUTS)
        grid = f"image.cut unpad needs a grid of tokens (mlp, avgpool, cabstractor), not {c.kind}"
        require(self.image.cut != "unpad" or self.grid() > 0, grid)
        fitting = [name for name in prune.PRUNERS if self.fits(name)]
        fix = f"use one of {', '.join(fitting)}"
        require(p.name in fitting, f"prune.name '{p.name}' does not fit connector.kind {c.kind}: {fix}")
        require(p.keep > 0, f"prune.keep {p.keep:g} must be above 0")
        require_one_of("prune.isolator_per", p.isolator_per, ("tile", "image"))
        sums = [*accumulate(self.scale_tokens())]
        whole = p.name != "coarse" or p.keep <= 1 or min(round(p.keep), sums[-1]) in sums
        require(whole, f"prune.keep {p.keep:g}: coarse keeps whole scales, so one of {sums}")
        if d.experts:
            every = d.expert_every
            require(d.experts > 1, f"decoder.experts {d.experts} must be 0 or above 1")
            require(0 < every <= d.layers, f"decoder.expert_every {every} must lie in 1..{d.layers}")
            multiple = d.width % 8 == d.mlp_width % 8 == 0
            require(multiple, f"decoder.experts need widths of multiples of 8, not {d.width}, {d.mlp_width}")
            require(d.capacity > 0, f"decoder.capacity {d.capacity} must be above 0")
            require(self.lora.rank == 0, "decoder.experts: adapters need a dense decoder, add --lora.rank 0")
        return self


# --- JSON files, presets, and the command line: every script has a dataclass of flags ----------------------


def read_json(path: Path):
    require(path.is_file(), f"{path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON ({e})") from None


def write_text(path: Path, text: str) -> None:
    """To a temporary name, then os.replace, as every write here: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def from_dict(cls, values: dict, strict: bool = False):
    """Rebuild a nested dataclass from dataclasses.asdict; unknown keys are ignored, or refused if strict."""
    if not dataclasses.is_dataclass(cls):
        return values
    types_of = {member.name: member.type for member in dataclasses.fields(cls)}
    unknown = ", ".join(values.keys() - types_of.keys())
    require(not strict or not unknown, f"{cls.__name__} has no {unknown}")
    known = {name: value for name, value in values.items() if name in types_of}
    return cls(**{name: from_dict(types_of[name], value, strict) for name, value in known.items()})


def preset_names() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.json"))


def preset(name: str) -> dict:
    """assets/presets/NAME.json: "model" as a ModelConfig, flags of its stages ("pretrain", "pretrain_b" with
    --scale, "sft"), "scale" between them, "source" of the numbers, and what that leaves open, "ours".
    """
    require_one_of("--preset", name, preset_names())
    values = read_json(PRESETS / f"{name}.json")
    return {**values, "model": from_dict(ModelConfig, values["model"], strict=True)}


def flags_of(config, prefix: str = "") -> dict[str, tuple]:
    """Flag name -> (object, field, type, help, group), those of nested configs with dotted names."""
    flags, comments, group = {}, {}, "flags"
    for cls in reversed(type(config).__mro__[:-1]):
        source = Path(inspect.getfile(cls)).read_text("utf-8")
        body = re.search(rf"^class {cls.__name__}\b.*?(?=^\S|\Z)", source, re.M | re.S)[0]
        for title, name, comment in re.findall(r"^    (?:# -- (.+)|(\w+):[^#\n]*(?:# *(.*))?)$", body, re.M):
            group = title or group
            comments[name] = (comment, group)
    for member in dataclasses.fields(config):
        name = member.name
        if dataclasses.is_dataclass(member.type):
            flags |= flags_of(getattr(config, name), f"{prefix}{name}.")
        else:
            flags[prefix + name] = (config, name, member.type, *comments[name])
    return flags


def changed_flags(before, after) -> list[str]:
    """Names of the flags whose values differ between two configs of one type."""
    old, new = flags_of(before), flags_of(after)
    return [name for name in old if getattr(*old[name][:2]) != getattr(*new[name][:2])]


def read_value(kind, text: str):
    """The text behind a flag as its type."""
    if kind is bool:
        return bool(["false", "true"].index(text.lower()))
    if kind in (int, float, str):
        return kind(text)
    return [get_args(kind)[0](word) for word in text.split(",")]  # of list[int] or list[float]


def parse_cli(argv: list[str], doc: str | None, *configs) -> None:
    """Set the fields of `configs` from `--name value` or `--name=value`; a bool may stand alone. --help
    prints doc and the flags with their values; doc None takes a first look and ignores --help.
    """
    flags, words, group = {}, [word for word in argv if word not in ("-h", "--help")], ""
    for config in configs:
        flags |= flags_of(config)
    if doc is not None and len(words) < len(argv):
        print(doc)
        for name, (config, attribute, _, comment, title) in flags.items():
            value = getattr(config, attribute)
            value = ",".join(map(str, value)) if isinstance(value, list) else value
            heading = f"\n{title}:\n" if title != group else ""
            print(f"{heading}  {f'--{name} [{value}]':37} {comment}")
            group = title
        raise SystemExit(0)
    while words:
        word, equals, text = words.pop(0).partition("=")
        name = word.removeprefix("--")
        if name not in flags or name == word:
            close = difflib.get_close_matches(name, flags, 1)
            hint = f"did you mean --{close[0]}?" if close else "see --help"
            raise UserError(f"unknown flag '{word}', {hint}")
        config, attribute, kind, *_ = flags[name]
        if not equals:
            alone = not words or words[0].startswith("--")
            require(kind is bool or not alone, f"--{name}: expected a value")
            text = "true" if alone else words.pop(0)
        try:
            setattr(config, attribute, read_value(kind, text))
        except ValueError:
            kinds = {bool: "true or false", int: "a whole number", float: "a number"}
            expected = kinds.get(kind, "a comma list of numbers")
            raise UserError(f"--{name} '{text}': expected {expected}") from None


def run_cli(main) -> None:
    """An entry point: a UserError, or what the system says of a path, becomes one line and exit code 2. Text
    that a terminal's encoding lacks is printed with a replacement, and Ctrl-C ends without a traceback.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except (UserError, OSError, SafetensorError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # what shells give a program that Ctrl-C ended


def answer_early(argv: list[str]) -> None:
    """Answer --help and mistyped flags of a script before torch is imported, which takes seconds. Its flags
    do not exist yet, as it imports this file first: their classes (…Config) are executed from the source.
    """
    script = Path(sys.argv[0]).resolve()
    if script.parent != HERE or script.stem not in ("train_pretrain", "train_sft", "eval"):
        return
    names = {**globals()}
    for stem in ("data", "train_pretrain", script.stem):
        file = HERE / f"{stem}.py"
        tree = ast.parse(file.read_text("utf-8"))
        classes = [node for node in tree.body if getattr(node, "name", "").endswith("Config")]
        names |= {"__name__": f"flags of {stem}", "__file__": str(file)}
        exec(compile(ast.Module(classes, []), stem, "exec"), names)
        names[stem] = sys.modules[names["__name__"]] = types.SimpleNamespace(**names)
    flags, stage = names[classes[-1].name](), script.stem.removeprefix("train_")
    configs = [flags] if stage == "eval" else [flags, ModelConfig()]
    parse_cli(argv, None, *configs)
    if {"-h", "--help"} & {*argv}:
        if stage != "eval":  # a stage's defaults are those of its preset
            values = preset(flags.preset)
            configs = [dataclasses.replace(flags, **values[stage]), values["model"]]
        parse_cli(argv, ast.get_docstring(tree), *configs)


run_cli(answer_early)
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import prune  # noqa: E402

# --- Attention and MLPs ------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | tuple | None = None) -> Tensor:
    """The one place where attention is computed: (..., H, T, d) -> (..., T, H*d); k and v may have fewer
    heads. mask: (B, 1, T, T), True where a query may look at a key; or for the varlen kernel, which computes
    no pair across documents, starts and longest of data.Rows.
    """
    dtype, T = v.dtype, q.shape[-2]
    # A CPU's backward pass is 2-4 times slower in bf16 (LOG.md). QK-norm leaves q and k in float32.
    wide = torch.promote_types(dtype, torch.float32) if q.is_cpu else dtype
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if isinstance(mask, tuple):
        from torch.nn.attention.varlen import varlen_attn  # here, as it imports dynamo: 1.7 s

        rows, (starts, longest) = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)], mask  # (B*T, H, d)
        out = varlen_attn(*rows, starts, starts, longest, longest, window_size=(-1, 0), enable_gqa=True)
        return out.flatten(1).unflatten(0, (-1, T))  # (B, T, H*d)
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.to(dtype).transpose(-3, -2).flatten(-2)  # (..., T, H*d)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)  # (..., T, D) -> (..., H, T, D/H)


GELU_TANH = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"gelu": F.gelu, "gelu_pytorch_tanh": GELU_TANH, "silu": F.silu}
ACTIVATIONS["quick_gelu"] = lambda x: x * torch.sigmoid(1.702 * x)


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


def init_linear(module: nn.Module, std: float = 0.02) -> None:
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.trunc_normal_(m.weight, std=std)
        if isinstance(m, nn.Linear) and m.bias is not None:
            nn.init.zeros_(m.bias)


# --- Vision transformer, pre-norm with CLIP's names; the config's switches make it another encoder ---------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias)
        self.k_proj = nn.Linear(width, width, bias)
        self.v_proj = nn.Linear(width, width, bias)
        self.out_proj = nn.Linear(width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (split_heads(y, self.heads) for y in projected)  # (I, H, P, D/H)
        return self.out_proj(attend(q, k, v))  # (I, P, D)


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


def resize_grid(table: Tensor, side: int, align_corners: bool = False) -> Tensor:
    """A position table of S x S patches (S*S, D) for side x side patches, bicubic: (side*side, D)"""
    stored = math.isqrt(len(table))
    grid = table.float().T.reshape(1, -1, stored, stored)  # (1, D, S, S)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=align_corners)
    return grid[0].flatten(1).T.to(table.dtype)


class ViT(nn.Module):
    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg, stride = cfg, cfg.patch_size
        self.embeddings = nn.Module()  # a group of parameters, as CLIP has it
        cls = nn.Parameter(torch.randn(cfg.width) * 0.02) if cfg.cls_token else None
        self.embeddings.class_embedding = cls
        self.embeddings.patch_embedding = nn.Conv2d(3, cfg.width, stride, stride, bias=cfg.patch_bias)
        positions = (cfg.image_size // stride) ** 2 + cfg.cls_token
        self.embeddings.position_embedding = nn.Embedding(positions, cfg.width)
        self.pre_layrnorm = vit_norm(cfg) if cfg.pre_norm else nn.Identity()  # the missing "e" is CLIP's
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.layers))})
        self.post_layernorm = vit_norm(cfg)
        init_linear(self)

    def embed(self, pixels: Tensor) -> Tensor:
        """(I, 3, side, side) -> (I, 1 + P, D), or (I, P, D) without CLS: a linear map, then positions."""
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (I, P, D)
        if self.cfg.pre_norm == "before":
            x = self.pre_layrnorm(x)
        if self.cfg.cls_token:
            cls = self.embeddings.class_embedding.to(x.dtype).expand(len(x), 1, -1)  # (I, 1, D)
            x = torch.cat([cls, x], 1)
        x = x + self.positions(pixels.shape[-1])
        return self.pre_layrnorm(x) if self.cfg.pre_norm == "after" else x

    def positions(self, image_size: int) -> Tensor:
        """The position table at that resolution, bicubic from the stored one, CLS kept: ((1 +) P, D)"""
        table, first = self.embeddings.position_embedding.weight, int(self.cfg.cls_token)
        side = image_size // self.cfg.patch_size
        if len(table) == side**2 + first:
            return table
        return torch.cat([table[:first], resize_grid(table[first:], side, self.cfg.align_corners)])

    def hidden_states(self, pixels: Tensor, last: int | None = None, only: set[int] | None = None) -> tuple:
        """What transformers returns: embeddings (CLIP's after its pre-LayerNorm), then each block's output,
        all (I, 1 + P, D), or (I, P, D) without CLS; pixels (I, 3, side, side) are normalised. Stops after
        block `last`; with `only`, states neither in it nor the last are None.
        """
        states = [self.embed(pixels)]
        for n, block in enumerate(self.encoder["layers"][:last]):
            run = block if self.training else block.forward  # not compiled, see Decoder.hidden
            states.append(run(states[n]))
            if only is not None and n not in only:
                states[n] = None
        return tuple(states)

    @torch.no_grad()
    def attention(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Attention that block `layer`, given its input x (I, 1 + P, D), pays to each patch: (I, P), fp32,
        mean over heads; and the patches' keys (I, H, P, d). The query is the CLS token. Without one (SigLIP,
        AIMv2) it is the mean over all patches as queries, whose matrix is computed one head after the other.
        """
        block, first = self.encoder["layers"][layer], int(self.cfg.cls_token)
        x, heads = block.layer_norm1(x), block.self_attn.heads
        k = split_heads(block.self_attn.k_proj(x), heads)  # (I, H, 1 + P, d)
        q = split_heads(block.self_attn.q_proj(x[:, :1] if first else x), heads) / math.sqrt(k.shape[-1])
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            looks = [(q[:, h].float() @ k[:, h].float().mT).softmax(-1).mean(1) for h in range(heads)]
        return sum(looks)[:, first:] / heads, k[:, :, first:]

    @torch.no_grad()
    def resize(self, image_size: int) -> None:
        """Move to another resolution: the position table is resized once and for all, all else is kept."""
        positions = self.positions(image_size).clone()
        self.embeddings.position_embedding = nn.Embedding.from_pretrained(positions, freeze=False)
        self.cfg = dataclasses.replace(self.cfg, image_size=image_size)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, dtype: torch.dtype = torch.float32) -> "ViT":
        """From a Hugging Face folder or downloaded repository: vision-only, or half of a full checkpoint."""
        return load_half(cls, read_vit_config, path_or_repo, dtype)


# Halves in Hugging Face layout. key_maps.json holds our config fields and their keys in config.json; keys of
# which "only" one value is supported; and for each family transformers' defaults with our switches, "fields"
# whose keys differ, and "names", replacements that turn its tensors' names into ours, in order ("original":
# those of Apple's own files). "unused" is a pattern of names that are skipped.
KEY_MAPS = read_json(ASSETS / "key_maps.json")
ENCODERS = KEY_MAPS["encoders"]


def read_half_config(file: Path, half: str) -> tuple[str, dict, dict]:
    """Family, config.json and our fields of a half, "encoder" or "decoder"; of a full model its vision."""
    config, families = read_json(file), KEY_MAPS[f"{half}s"]
    require(isinstance(config, dict), f"{file} is no JSON object, as a Hugging Face config.json is")
    kind = str(config.get("model_type"))
    family = kind.removesuffix("_vision_model")
    known = f"is not one of {', '.join(families)} ({KEY_MAPS['notes'][half]})"
    require(family in families, f"{file}: model_type '{kind}' {known}")
    for nested in ("vision_config", "rope_scaling", "rope_parameters"):
        require(isinstance(config.get(nested) or {}, dict), f"{file}: {nested} is no JSON object")
        config.update(config.get(nested) or {})
    for key, values in KEY_MAPS["only"][half].items():
        require(config.get(key) in (None, *values), f"{file}: {key} {config.get(key)!r} is not supported")
    fields = dict(families[family]["defaults"])
    for name, key in {**KEY_MAPS[f"{half}_fields"], **families[family]["fields"]}.items():
        if config.get(key) is not None:
            fields[name] = config[key]
    return family, config, fields


def read_vit_config(file: Path) -> ViTConfig:
    family, config, fields = read_half_config(file, "encoder")
    cfg = ViTConfig(family=family, **fields)
    if family == "dinov2":
        cfg.mlp_width = int(config.get("mlp_ratio", 4) * cfg.width)
    require_one_of(f"{file}: hidden_act", cfg.activation, ["silu"] if cfg.gated_mlp else ACTIVATIONS)
    return cfg


def read_decoder_config(file: Path) -> DecoderConfig:
    """config.json of a decoder, in today's form (rope_parameters) or the older (rope_theta, rope_scaling)."""
    _, config, fields = read_half_config(file, "decoder")
    for name in ("vocab_size", "width", "layers", "heads", "mlp_width"):
        require(name in fields, f"{file}: '{KEY_MAPS['decoder_fields'][name]}' is missing")
    windowed = set(config.get("layer_types") or ()) - {"full_attention"}
    require(not windowed, f"{file}: layer_types with a sliding window are not supported")
    llama3 = config.get("rope_type", config.get("type")) == "llama3"
    for name, key in KEY_MAPS["rope_fields"].items() if llama3 else ():
        require(key in config, f"{file}: the llama3 rope has no '{key}'")
        fields[name] = config[key]
    heads = fields["heads"]
    return DecoderConfig(**{"head_dim": fields["width"] // heads, "kv_heads": heads, **fields})


def load_half(cls: type, read_config: Callable, path_or_repo: str | Path, dtype: torch.dtype) -> nn.Module:
    """A ViT or Decoder as config.json and the weights of a folder have it."""
    folder = find_half(path_or_repo)
    with torch.device("meta"):
        half = cls(read_config(folder / "config.json"))
    family = ENCODERS[half.cfg.family] if cls is ViT else {}
    names, readers = family.get("names", []) + family.get("original", []), {}
    for name, read in open_weights(folder).items():
        twice = name == "lm_head.weight" and not hasattr(half, "lm_head")  # a table that is tied
        if twice or re.search(KEY_MAPS["unused"], name):
            continue
        name = name.removeprefix("vision_model.").removeprefix("model.")
        for hub_name, our_name in names:
            name = name.replace(hub_name, our_name)
        if ".qkv." in name:  # fused in Apple's files
            for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
                readers[name.replace("qkv", part)] = lambda i=i, read=read: read().chunk(3)[i]
        else:
            readers[name] = read
    load_weights(half, readers, folder, dtype)
    return half


# --- Decoder (Llama and its relatives) ---------------------------------------------------------------------


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

    def forward(self, x: Tensor, rope: tuple, mask: Tensor, cache: dict | None, layer: int) -> Tensor:
        q = split_heads(self.q_proj(x), self.cfg.heads)  # (B, H, T, head_dim)
        k = split_heads(self.k_proj(x), self.cfg.kv_heads)  # (B, Hkv, T, head_dim)
        v = split_heads(self.v_proj(x), self.cfg.kv_heads)
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            if layer in cache:
                k = torch.cat([cache[layer][0], k], 2)  # (B, Hkv, T so far, head_dim)
                v = torch.cat([cache[layer][1], v], 2)
            cache[layer] = k, v
        return self.o_proj(attend(q, k, v, mask))  # (B, T, D)


class Experts(nn.Module):
    """The sparse layer of MM1's experts: each token goes to the two of E gated MLPs that its router prefers,
    with gates that sum to 1. Capacity as in GShard (arXiv 2006.16668): first choices are served before second
    ones, each in the order of positions; a token beyond an expert's capacity keeps only its residual. MM1 did
    not publish the capacity, the default is AXLearn's. Only experts that train drop tokens. A dropped token
    is computed and weighed by 0, so that all shapes are known in advance. M = B * T tokens of a micro-batch.
    grouped_mm takes bfloat16 and, not compiled, float32, in rows of a multiple of 16 bytes.
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
        tokens, n_experts = x.flatten(0, 1), len(self.gate_proj)  # (M, D)
        real = torch.ones_like(tokens[:, 0], dtype=torch.bool) if real is None else real.flatten()  # (M,)
        device = "cpu" if x.is_meta else x.device.type  # meta knows no autocast
        with torch.autocast(device, enabled=False):  # the router always computes in float32
            logits = F.linear(tokens.float(), self.router.weight.float())  # (M, E)
            probabilities = logits.softmax(-1)
            gates, chosen = probabilities.topk(2)  # (M, 2)
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-9)
            # Means over what is not padding. Load balance is E * sum_e f_e * P_e, f_e the share of first
            # choices, P_e the mean probability: 1 if uniform (GShard). z is ST-MoE's (arXiv 2202.08906).
            share = real.float() / real.sum().clamp(min=1)  # (M,)
            first_choices = F.one_hot(chosen[:, 0], n_experts).float()  # (M, E)
            balance = n_experts * (share @ first_choices * (share @ probabilities)).sum()
            losses = torch.stack([balance, share @ logits.logsumexp(-1).square()])
        # 1. List the choices of all tokens: the first ones, then the second ones.
        expert = chosen.T.flatten()  # (2M,)
        # 2. Sort them by expert, stably: first choices stay ahead, positions in order. Padding has the odd
        # key, comes last at its expert and takes no token's place.
        order = (2 * expert + ~real.repeat(2)).argsort(stable=True)
        expert, token, gates = expert[order], order % len(tokens), gates.T.flatten()[order]
        # 3. While the experts train, a choice beyond the capacity of its expert gets the gate 0.
        if self.training and torch.is_grad_enabled() and self.gate_proj.requires_grad:
            share = int(len(tokens) * self.capacity / n_experts)
            limit = (share + 3) // 4 * 4  # AXLearn rounds up to a multiple of 4
            place = torch.arange(len(order), device=x.device) - torch.searchsorted(expert, expert)
            gates = gates * (place < limit)  # places count 0, 1, … at each expert
        # 4. Run each expert on its rows, which end before ends[e], and add the results up at their tokens.
        numbers = torch.arange(n_experts, device=x.device)
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)  # (E,)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        gate, up, down = (w.to(dtype).transpose(1, 2) for w in (self.gate_proj, self.up_proj, self.down_proj))
        rows = tokens.to(dtype).index_select(0, token)  # (2M, D)
        hidden = F.silu(F.grouped_mm(rows, gate, offs=ends)) * F.grouped_mm(rows, up, offs=ends)
        out = F.grouped_mm(hidden, down, offs=ends) * gates[:, None]  # (2M, D), float32
        return out.new_zeros(tokens.shape).index_add(0, token, out).view_as(x).to(x.dtype), losses


EXPERT_FIELDS = ("experts", "expert_every", "capacity")
EXPERT_FLAGS = tuple(f"decoder.{name}" for name in EXPERT_FIELDS)


@torch.no_grad()
def upcycle(decoder: "Decoder", cfg: DecoderConfig) -> None:
    """Make a dense decoder that of cfg, in place: each expert a copy of the dense MLP, routers random. The
    gates sum to 1, so that the logits stay the same where nothing is dropped.
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
    size = 0
    for name, p in decoder.named_parameters():
        if not re.search(r"embed_tokens|lm_head|router|\.lora_", name):
            size += p[0].numel() if p.ndim == 3 else p.numel()
    return size


class DecoderBlock(nn.Module):
    def __init__(self, cfg: DecoderConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.input_layernorm = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.self_attn = DecoderAttention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.mlp = Experts(cfg) if cfg.sparse(layer) else GatedMLP(cfg.width, cfg.mlp_width)

    def forward(self, x: Tensor, rope: tuple, mask: Tensor, cache: dict | None = None, real=None) -> tuple:
        """The residuals (B, T, D), and the router's losses (2,) of a sparse block, None of a dense one."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, self.layer)
        y = self.post_attention_layernorm(x)
        if not isinstance(self.mlp, Experts):
            return x + self.mlp(y), None
        y, losses = self.mlp(y, real)
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

    def hidden(self, x: Tensor, positions: Tensor, mask: Tensor, cache=None, real=None) -> tuple:
        """Embeddings (B, T, D) to final hidden states (B, T, D), and the router losses (2,): means over the
        sparse layers whose routers train, None without gradients. real (B, T) is False at padding; cache, {}
        at first, holds keys and values of the positions before, (B, Hkv, T, head_dim) of each layer.
        """
        rope, losses = rope_tables(positions, self.cfg), []
        for block in self.layers:
            # Else with its hooks, but not compiled, as evaluation and teachers bring many shapes.
            run = block if self.training and torch.is_grad_enabled() else block._call_impl
            x, router = run(x, rope, mask, cache, real)
            if router is not None and torch.is_grad_enabled() and block.mlp.router.weight.requires_grad:
                losses.append(router)
        return self.norm(x), torch.stack(losses).mean(0) if losses else None

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        hidden, _ = self.hidden(self.embed(ids), positions, document_mask(torch.zeros_like(ids)))
        return self.head(hidden)  # (B, T, N)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, dtype: torch.dtype = torch.float32) -> "Decoder":
        """From a Hugging Face folder or downloaded repository."""
        return load_half(cls, read_decoder_config, path_or_repo, dtype)


class LoraLinear(nn.Linear):
    """LoRA (arXiv 2106.09685): W x + alpha / rank * B A x. W is frozen; B starts at zero."""

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
    for name, linear in list(decoder.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            decoder.layers.set_submodule(name, LoraLinear(linear, cfg))


@torch.no_grad()
def merged(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's weights, adapters added to the matrices that they stand beside."""
    weights = {name: value for name, value in decoder.state_dict().items() if ".lora_" not in name}
    for name, part in decoder.named_modules():
        if isinstance(part, LoraLinear):
            update = part.scale * (part.lora_b.float() @ part.lora_a.float())
            weights[f"{name}.weight"] = part.weight.float() + update  # bfloat16 would round it off
    return weights


# --- Connectors: patches of the encoder to visual tokens of the decoder ------------------------------------


class Connector(nn.Module):
    """A new connector is a subclass and a line in CONNECTORS. `forward` takes the patches at
    cfg.connector.levels, low to high, each (I, P, C), and returns (I, V, D); the class tells how many tokens
    it gives, whether they form a grid and which pruners fit. If it ends in a LayerNorm `norm` and a Linear
    `proj`, VLM.build gives proj the scale of the text embeddings.
    """

    per_patch = False  # a token for every patch; else cfg.connector.tokens of them
    on_grid = False  # those form a square raster

    @classmethod
    def scales_of(cls, cfg: ModelConfig) -> list[tuple[int, int]]:
        """(window side in patches, tokens a window), coarse to fine; here one window over all patches."""
        return [(1, 1)] if cls.per_patch else [(cfg.side, cfg.connector.tokens)]

    @classmethod
    def grid(cls, cfg: ModelConfig) -> int:
        """Side of the square raster that the tokens form, 0 if they form none."""
        return math.isqrt(cfg.visual_tokens()) if cls.per_patch or cls.on_grid else 0

    @classmethod
    def pruner_places(cls, cfg: ModelConfig) -> set[str]:
        """The values of prune.Pruner.where that fit."""
        if cls.per_patch and max(cfg.connector.levels) > 0:  # a block whose attention such pruners read
            return {"tokens", "grid", "patches"}
        return {"tokens", "grid"} if cls.grid(cfg) else {"tokens"}

    @classmethod
    def check(cls, cfg: ModelConfig) -> None:
        """Raise UserError for a config that cannot work."""
        c = cfg.connector
        square = f"connector.tokens {c.tokens}: {c.kind} needs a square number, such as 64 or 144"
        require(not cls.on_grid or math.isqrt(c.tokens) ** 2 == c.tokens, square)


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
        """queries (I or 1, windows, q, D), context (I, windows, W*W, C) -> (I, windows, q, D). At the first
        level the queries are the same for all images: they come with I = 1, projected once.
        """
        images_and_windows, context = context.shape[:2], self.norm_context(context)
        if key_positions is not None:
            context = context + key_positions
        q = self.to_q(self.norm_queries(queries)).expand(len(context), -1, -1, -1)
        k, v = self.to_kv(context).chunk(2, -1)
        q, k, v = (split_heads(x.flatten(0, 1), self.heads) for x in (q, k, v))  # (I*windows, H, …, D/H)
        queries = queries + self.to_out(attend(q, k, v).unflatten(0, images_and_windows))
        return queries + self.mlp(self.norm_mlp(queries))


class Scale(nn.Module):
    """One scale: queries for every window of its own, one block a level, shared over the windows."""

    def __init__(self, cfg: ConnectorConfig, context_width: int, side: int, window: int, n_queries: int):
        super().__init__()
        self.window, self.per_side = window, side // window
        self.queries = nn.Parameter(torch.empty(self.per_side**2, n_queries, cfg.width))
        self.blocks = nn.ModuleList(WindowBlock(cfg.width, context_width, cfg.heads) for _ in cfg.levels)
        self.key_positions = None
        init_linear(self, std=0.64 / math.sqrt(cfg.width))  # 0.02 at the published width of 1024
        nn.init.trunc_normal_(self.queries, std=0.02)
        if cfg.key_positions:
            self.key_positions = nn.Parameter(torch.empty(window**2, context_width))
            nn.init.trunc_normal_(self.key_positions, std=0.02)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """levels: low to high, each (I, P, C) -> (I, windows * q, D): windows row-major, then query."""
        x = self.queries[None]  # (1, windows, q, D)
        for block, level in zip(self.blocks, levels):
            x = block(x, cut_windows(level, self.window), self.key_positions)
        return x.flatten(1, 2)

    @torch.no_grad()
    def inflate_from(self, source: "Scale", factor: int) -> None:
        """Parameter inflation: weights are copied as they are, a new window takes the queries of the old one
        that it lies in (on the grid of windows, so both axes are repeated, not the flat list).
        """
        self.blocks.load_state_dict(source.blocks.state_dict())
        grid = source.queries.unflatten(0, (source.per_side, source.per_side))
        grid = grid.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        self.queries.copy_(grid.flatten(0, 1))
        if self.key_positions is not None:  # as a ViT's positions: bicubic from the old window to the new
            self.key_positions.copy_(resize_grid(source.key_positions, self.window))


def cut_windows(x: Tensor, window: int) -> Tensor:
    """(I, P, C) patches in raster order -> (I, windows, W*W, C), windows in raster order."""
    n = math.isqrt(x.shape[1]) // window
    x = x.reshape(len(x), n, window, n, window, -1).transpose(2, 3)  # (I, n, n, W, W, C)
    return x.reshape(len(x), n * n, window * window, -1)


class ChainOfSight(Connector):
    """Chain-of-Sight's multi-scale resampler (arXiv 2407.15819, section 3): scales from coarse to fine,
    concatenated, so that a causal decoder reads the whole before the details. Window side 1 is a linear
    projection, S a plain resampler ("resampler", the baseline of the same levels and depth). All scales share
    the last LayerNorm and Linear. Windows and scales exchange nothing: the chain is only the order.
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

    @classmethod
    def scales_of(cls, cfg: ModelConfig) -> list[tuple[int, int]]:
        """connector.windows and connector.queries, or what connector.plan stands for at this resolution."""
        c = cfg.connector
        if c.kind == "resampler":
            return super().scales_of(cfg)
        plan = SCALE_PLANS[c.plan] if c.plan else ()
        return [(window_side(cfg, n), queries) for n, queries in plan] or [*zip(c.windows, c.queries)]

    @classmethod
    def pruner_places(cls, cfg: ModelConfig) -> set[str]:
        in_order = cfg.connector.kind == "chain" and not cfg.connector.reverse
        return {"tokens", "scales"} if in_order else {"tokens"}

    @classmethod
    def check(cls, cfg: ModelConfig) -> None:
        c, side = cfg.connector, cfg.side
        require_one_of("connector.plan", c.plan, ("", *SCALE_PLANS))
        same = len(c.windows) == len(c.queries)
        require(same, f"connector.windows {c.windows}, connector.queries {c.queries} differ in length")
        windows = [window for window, _ in cfg.scales()]
        divisors = [w for w in range(1, side + 1) if side % w == 0]
        for window in windows:
            grid = f"the {side}x{side} patch grid of {cfg.vit.image_size} px; windows that do: {divisors}"
            require(window in divisors, f"connector.windows: {window} does not divide {grid}")
        ordered = windows == sorted(windows, reverse=True)
        require(ordered, f"connector.windows {windows}: scales go from coarse to fine, largest first")


def window_side(cfg: ModelConfig, per_side: int) -> int:
    """Side in patches of one of per_side windows; 0, which `check` refuses, if they do not fit."""
    return cfg.side // per_side if cfg.side % per_side == 0 else 0


class Linear(Connector):
    """Every patch of the highest level by itself: the baseline with all tokens (the LayerNorm is ours)."""

    per_patch = True

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.side, self.new_side = cfg.side, self.grid(cfg)
        self.norm = nn.LayerNorm(cfg.vit.width)
        self.proj = nn.Linear(cfg.vit.width, cfg.decoder.width)
        init_linear(self.proj)

    def forward(self, levels: list[Tensor]) -> Tensor:
        return self.proj(self.norm(levels[-1]))  # (I, P, C) -> (I, P, D)


class TwoLayers(Connector, MLP):
    """LLaVA-1.5's mlp2x_gelu on every patch of the highest level."""

    per_patch = True

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg.vit.width, cfg.decoder.width, out=cfg.decoder.width)

    def forward(self, levels: list[Tensor]) -> Tensor:
        return super().forward(levels[-1])  # (I, P, C) -> (I, P, D)


class AvgPool(Linear):
    """MM1's average pooling: means over the patch grid, then one linear (the LayerNorm between is ours)."""

    per_patch, on_grid = False, True

    def forward(self, levels: list[Tensor]) -> Tensor:
        grid = levels[-1].mT.unflatten(2, (self.side, self.side))  # (I, C, S, S)
        pooled = F.adaptive_avg_pool2d(grid, self.new_side)  # (I, C, new, new), of overlapping windows
        return super().forward([pooled.flatten(2).transpose(1, 2)])  # (I, tokens, D)


class AttnPool(Connector):
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


class CAbstractor(Connector):
    """Honeybee's C-Abstractor (arXiv 2312.06742), MM1's connector: convolutions, pooling, convolutions."""

    on_grid = True

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        width_in, width, out = cfg.vit.width, cfg.connector.width, cfg.decoder.width
        self.side, self.new_side = cfg.side, self.grid(cfg)
        self.positions = nn.Parameter(torch.empty(1, cfg.side**2, width_in))
        self.before = nn.Sequential(*(ConvBlock(n, width) for n in (width_in, width, width)))
        self.after = nn.Sequential(*(ConvBlock(width, width) for _ in range(3)))
        self.readout = nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))
        nn.init.trunc_normal_(self.positions, std=0.02)
        init_linear(self)

    def forward(self, levels: list[Tensor]) -> Tensor:
        x = (levels[-1] + self.positions).mT.unflatten(2, (self.side, self.side))  # (I, C, S, S)
        x = self.before(x)  # (I, D, S, S)
        x = self.after(F.adaptive_avg_pool2d(x, self.new_side))  # (I, D, new, new)
        return self.readout(x.flatten(2).transpose(1, 2))  # (I, tokens, D)


CONNECTORS = {
    "chain": ChainOfSight,
    "resampler": ChainOfSight,
    "linear": Linear,
    "mlp": TwoLayers,
    "avgpool": AvgPool,
    "attnpool": AttnPool,
    "cabstractor": CAbstractor,
}

# --- Token scaling: more visual tokens, or larger pictures, for a trained model ----------------------------

# Scales to start from by name: (windows a side, queries in each), coarse to fine (section 3.2, Table 4).
SCALE_PLANS = {
    "32": [(1, 16), (4, 1)],
    "48": [(1, 16), (4, 2)],
    "80": [(1, 16), (4, 4)],
    "336": [(1, 16), (2, 16), (8, 4)],
}

# Steps RESOLUTION:SOURCExFACTOR,…: the pictures' side grows by RESOLUTION; each new scale takes its weights
# from scale SOURCE of the old ones and has FACTOR times its windows a side, so tokens grow by the square.
# Windows keep their size in patches if FACTOR is RESOLUTION ("resolution scaling"), else there are more of
# them ("window scaling"); both make compound scaling. Names give tokens before and after, as in the paper.
SCALINGS = {
    "80to80": "2:0x1,1x1",  # resolution alone
    "80to144w": "1:0x1,0x2,1x1",  # window scaling at the same resolution
    "80to272w": "1:0x1,1x2",
    "80to336w": "1:0x1,0x2,1x2",
    "80to144": "2:0x1,0x2,1x1",  # resolution scaling
    "80to272": "2:0x1,1x2",
    "80to336": "2:0x1,0x2,1x2",
    "80to528": "2:0x1,0x4,1x2",  # compound scaling
    "80to1104": "2:0x1,1x1,1x4",  # the paper's windows 32,16,2: likely a misprint
    "80to1296": "2:0x1,0x4,1x4",
    "32to336": "2:0x1,0x2,1x4",  # not spelled out in the paper: ours
    "32to528": "2:0x1,0x4,1x4",
    "48to784": "2:0x1,0x4,1x4",
    "32to144": "2:0x1,0x2,1x2",  # the step of 80to336 from 32 tokens: the demo's
}
SCALE_INITS = ("inflate", "queries", "random")


def read_scaling(name: str) -> tuple[int, list[tuple[int, int]]]:
    """Resolution and [(source, factor), …] of a step, given by name or spelled out."""
    step = SCALINGS.get(name, name)
    if not re.fullmatch(r"[1-9]:\d+x[1-9]\d*(,\d+x[1-9]\d*)*", step):
        close = [*difflib.get_close_matches(name, SCALINGS, 1), "a step such as 2:0x1,1x4"][0]
        raise UserError(f"--scale '{name}' is none of {', '.join(SCALINGS)}: did you mean {close}?")
    resolution, scales = step.split(":")
    return int(resolution), [tuple(map(int, scale.split("x"))) for scale in scales.split(",")]


def scaled_config(cfg: ModelConfig, name: str) -> ModelConfig:
    """The config after a scaling step; a named one refuses to start from another number of tokens."""
    resolution, sources = read_scaling(name)
    kind, old, new = cfg.connector.kind, cfg.scales(), copy_config(cfg)
    fits = kind == "chain" and max(source for source, _ in sources) < len(old)
    require(fits, f"--scale {name} does not fit a {kind} connector with {len(old)} scales")
    new.vit.image_size *= resolution
    scales = [(*old[source], factor) for source, factor in sources]
    new.connector.windows = [window_side(new, cfg.side // side * factor) for side, _, factor in scales]
    new.connector.queries, new.connector.plan = [queries for _, queries, _ in scales], ""
    tokens = [cfg.visual_tokens(), new.check().visual_tokens()]
    named = [*map(int, re.findall(r"\d+", name))] if name in SCALINGS else tokens
    start = f"starts from two scales with {named[0]} tokens, this model has {tokens[0]} in {len(old)}"
    require(tokens == named, f"--scale {name} {start}")
    return new


def scale_up(vlm: "VLM", name: str, init: str = "inflate") -> None:
    """Scale the visual tokens of a model in place. init of the new scales: "inflate" copies weights and
    queries of their source (the paper); to compare, "queries" leaves queries random, "random" everything.
    """
    cfg, old = scaled_config(vlm.cfg, name), vlm.connector
    new = ChainOfSight(cfg).to(old.norm.weight)
    new.norm, new.proj = old.norm, old.proj
    for scale, (source, factor) in zip(new.scales, read_scaling(name)[1]):
        drawn = scale.queries.detach().clone()
        if init != "random" or factor == 1:
            scale.inflate_from(old.scales[source], factor)
        if init == "queries" and factor > 1:
            scale.queries.data.copy_(drawn)
    vlm.vit.resize(cfg.vit.image_size)
    vlm.connector, vlm.cfg = new, cfg


# How a picture is cut into tiles. "split": MM1's sub-images, a 2x2 crop beside the whole (its section 5);
# "anyres": LLaVA-NeXT's tilings; "unpad": those without their padding. "pad": LLaVA-1.5's one tile, a square
# with the mean colour beside the picture instead of a distorted one.
CUTS = ("", "pad", "split", "anyres", "unpad")


def at_resolution(cfg: ModelConfig, resolution: str) -> ModelConfig:
    """The config after --resolution SIDE, SIDE+CUT or +CUT; not checked yet. "" changes nothing."""
    if not resolution:
        return cfg
    side, _, cut = resolution.partition("+")
    form = f"use SIDE in pixels, SIDE+CUT or +CUT, CUT {' or '.join(CUTS[1:])}"
    require((side or "1").isdigit() and cut in CUTS, f"--resolution '{resolution}': {form}")
    new, old_side = copy_config(cfg), cfg.vit.image_size
    new.vit.image_size, new.image.cut = int(side or old_side), cut
    fits = cfg.connector.kind != "chain" or new.vit.image_size == old_side
    chain = f"this chain connector sees {old_side} px, which --scale changes; +split or so cuts pictures"
    require(fits, f"--resolution {resolution}: {chain}")
    return new


def set_resolution(vlm: "VLM", resolution: str) -> None:
    """Take a model to another resolution in place; all position tables are resized, once and for all."""
    cfg = at_resolution(vlm.cfg, resolution).check()
    if cfg.side != vlm.cfg.side:
        vlm.vit.resize(cfg.vit.image_size)
        weights = vlm.connector.state_dict()
        for name, table in weights.items():
            if name.endswith("positions"):  # the C-Abstractor's, (1, P, C); a resampler's, (P, C)
                resized = resize_grid(table.flatten(0, -2), cfg.side)  # (P, C)
                weights[name] = resized.expand(*table.shape[:-2], -1, -1)
        with torch.device("meta"):
            vlm.connector = CONNECTORS[cfg.connector.kind](cfg)
        vlm.connector.load_state_dict(weights, assign=True)
    if cfg.image.cut != vlm.cfg.image.cut:
        vlm.newline = make_newline(cfg, vlm.decoder.embed_tokens.weight)
    vlm.cfg = cfg


def make_newline(cfg: ModelConfig, table: Tensor) -> nn.Parameter | None:
    """LLaVA-NeXT's learned end of each row of tokens ("unpad"), (D,), at the scale of the text's table."""
    if cfg.image.cut != "unpad":
        return None
    scale = table.detach().float().pow(2).mean().sqrt()
    return nn.Parameter(torch.randn(cfg.decoder.width, device=table.device) * scale)


# --- The VLM -----------------------------------------------------------------------------------------------


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
        mean, std = torch.tensor([cfg.image.mean, cfg.image.std], device="cpu").view(2, 3, 1, 1) * 255
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)

    @classmethod
    def build(cls, cfg: ModelConfig, dtype: torch.dtype | None = torch.float32) -> "VLM":
        """A new model from pre-trained halves, whose shapes replace those in cfg; the connector is new.
        dtype: of the halves' matrices; None keeps them as their files hold them. Vectors are in float32.
        """
        vit = decoder = None
        if cfg.encoder_from:
            image, size = read_preprocessor(find_half(cfg.encoder_from))
            cfg.image = dataclasses.replace(image, cut=cfg.image.cut)
            vit = ViT.from_pretrained(cfg.encoder_from, dtype)
            vit.cfg.align_corners = cfg.vit.align_corners
            cfg.vit = dataclasses.replace(vit.cfg, image_size=cfg.vit.image_size or size)
            vit.resize(cfg.check().vit.image_size)
        if cfg.decoder_from:
            decoder = Decoder.from_pretrained(cfg.decoder_from, dtype)
            sparse = {name: getattr(cfg.decoder, name) for name in EXPERT_FIELDS}
            cfg.decoder = dataclasses.replace(decoder.cfg, **sparse)
            upcycle(decoder, cfg.check().decoder)
        vlm = cls(cfg, vit, decoder)
        if hasattr(vlm.connector, "norm") and hasattr(vlm.connector, "proj"):
            # Visual tokens enter at the scale of text embeddings: inputs behind a LayerNorm have unit
            # variance, so weights of std rms / sqrt(fan in) give the rms of the table.
            rms = vlm.decoder.embed_tokens.weight.float().pow(2).mean().sqrt().item()
            nn.init.normal_(vlm.connector.proj.weight, std=rms / math.sqrt(vlm.connector.proj.in_features))
        return vlm

    def states(self, pixels: Tensor) -> tuple[Tensor | None, ...]:
        """uint8 (I, 3, size, size) -> the encoder's hidden states up to the highest level that is read; None
        but for the connector's levels and the input of the last block, which pruners ask for.
        """
        trains = self.vit.embeddings.patch_embedding.weight.requires_grad and torch.is_grad_enabled()
        with torch.set_grad_enabled(trains):  # a frozen encoder keeps no activations
            pixels = (pixels.float() - self.pixel_mean) / self.pixel_std
            dtype, last = self.vit.embeddings.position_embedding.weight.dtype, max(self.cfg.connector.levels)
            return self.vit.hidden_states(pixels.to(dtype), last, {*self.cfg.connector.levels, last - 1})

    def levels(self, states: tuple[Tensor, ...], tiles: Tensor | slice = slice(None)) -> list[Tensor]:
        """Patches of those tiles at the levels that the connector reads, each (I, P, C)."""
        return [states[level][tiles, int(self.cfg.vit.cls_token) :] for level in self.cfg.connector.levels]

    def bank(self, batch) -> Tensor | None:
        """All visual tokens that the batch's slots refer to (Rows.visual_index), one row each: (rows, D), or
        None without slots. First come all V tokens of every tile in batch.full_tiles, then isolator and kept
        tokens (l + K) of every tile in batch.pruned_tiles; a slow sample's tiles are in both. The newline, if
        any, is last.
        """
        full, pruned = batch.full_tiles, batch.pruned_tiles
        if not len(full) and not len(pruned):
            return None
        states, bank, name = self.states(batch.pixels), [], self.cfg.prune.name
        where, keep = prune.PRUNERS[name].where, self.cfg.kept_tokens()
        if len(pruned) and where in ("tokens", "grid"):  # the pruner chooses among the connector's tokens
            tokens = self.connector(self.levels(states))  # (I, V, D)
            bank.append(tokens[full])
        elif len(full):
            bank.append(self.connector(self.levels(states, full)))
        if len(pruned):
            needs = self.pruner_needs(name, states, batch)
            if where == "scales":  # the finer ones are not computed
                kept = self.connector(self.levels(states, pruned), self.cfg.coarse_scales())
            elif where == "patches":  # the connector only sees what is kept
                patches = prune.reduce(name, self.levels(states, pruned)[-1], keep, **needs)
                kept = self.connector([patches])
            else:
                kept = prune.reduce(name, tokens[pruned], keep, **needs)
            bank.append(self.isolator(kept))  # (F, l + K, D)
        bank = torch.cat([x.flatten(0, 1) for x in bank])
        slots = len(full) * self.cfg.visual_tokens() + len(pruned) * self.cfg.visual_tokens("pruned")
        if len(bank) != slots:
            raise RuntimeError(f"connector and pruner give {len(bank)} visual tokens, slots are {slots}")
        return bank if self.newline is None else torch.cat([bank, self.newline[None].to(bank.dtype)])

    def pruner_needs(self, name: str, states: tuple, batch) -> dict:
        """Arguments of that pruner besides the features, for batch.pruned_tiles; only those are computed."""
        needs, tiles = prune.PRUNERS[name].needs, batch.pruned_tiles
        cls = states[-1][tiles, :1] if self.cfg.vit.cls_token else None
        given = {"grid": self.cfg.grid(), "cls": cls}
        if "seeds" in needs:  # picture and step: neither its place in the batch nor the run's seed matters
            given["seeds"] = batch.pixels[tiles].flatten(1).sum(1) + 1_000_003 * batch.next_sample
        if "cls_attention" in needs:
            given["cls_attention"], given["keys"] = self.vit.attention(states[-2][tiles], len(states) - 2)
        if "text" in needs:
            ids = batch.questions[tiles]
            given["text"] = self.decoder.embed(ids.clamp(0)).detach() * (ids >= 0)[..., None]
        return {need: given[need] for need in needs}

    def splice(self, rows, bank: Tensor | None) -> Tensor:
        """Text embeddings with visual tokens in the slots: (B, T, D)"""
        x = self.decoder.embed(rows.ids)
        if bank is None or not len(rows.visual_index):
            return x
        visual = bank[rows.visual_index].to(x.dtype)  # (slots, D)
        return x.flatten(0, 1).index_copy(0, rows.slots, visual).view_as(x)

    def logits(self, rows, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The head at supervised positions only, (R, N) in fp32; router losses (2,) or None."""
        # The varlen kernel supports only bf16 and fp16; all else uses the dense mask, which is the reference.
        varlen = rows.ids.is_cuda and torch.is_autocast_enabled("cuda")
        mask = (rows.starts, rows.longest) if varlen else document_mask(rows.doc_ids)
        hidden, losses = self.decoder.hidden(x, rows.positions, mask, real=rows.doc_ids >= 0)
        return self.decoder.head(hidden.flatten(0, 1)[rows.supervised]).float(), losses

    def forward(self, batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Student logits (R, N); the teacher's (R', N) for slow samples, from pruned tokens and without
        gradient, or None; and the router losses (2,) of the student's pass, None unless experts train.
        Student and teacher share one pass of the encoder, and of the connector if the pruner stands behind.
        """
        bank, teacher = self.bank(batch), None
        if batch.teacher is not None:
            with torch.no_grad():
                teacher, _ = self.logits(batch.teacher, self.splice(batch.teacher, bank))
        x = self.splice(batch.student, bank)
        # DDP needs a gradient for every parameter, so those that this batch does not use (for text alone: all
        # but the decoder) get zeros, with which Adam's momentum keeps moving them; DualSpeed's get None.
        unused = [] if len(batch.pruned_tiles) else [*self.isolator.parameters()]
        if not len(batch.full_tiles) and self.cfg.prune.name == "coarse":  # it leaves the finer scales out
            unused += self.connector.parameters()
        if not len(batch.student.visual_index):
            unused = [p for name, p in self.named_parameters() if not name.startswith("decoder.")]
        touched = [p.sum() for p in unused if p.requires_grad]
        if touched:
            x = x + 0.0 * sum(touched)
        student, router_losses = self.logits(batch.student, x)
        return student, teacher, router_losses

    def set_trainable(self, parts: list[str], isolator: bool) -> None:
        """Freeze everything but the named parts, the isolator if it is used, and the newline, which may be
        new where nothing else is. With adapters "decoder" is all of the decoder, "lora" the adapters alone.
        """
        adapted = "lora" not in parts or self.cfg.lora.rank > 0
        require(adapted, "--train lora: the model has no adapters, add --lora.rank 64")
        trained = {*parts, "newline", "isolator" if isolator else ""}
        for name, p in self.named_parameters():
            p.requires_grad_(name.split(".")[0] in trained or ("lora" in parts and ".lora_" in name))
        self.vit.encoder["layers"][max(self.cfg.connector.levels) :].requires_grad_(False)  # never run
        self.vit.post_layernorm.requires_grad_(False)

    @torch.no_grad()
    def generate(self, batch, end: int, max_new_tokens: int, temperature=0.0, seed=0, stops=()) -> list[list]:
        """Continue the rows of `data.prompt_batch`: the new ids of each row, without `end`. A row also ends
        behind one of the ids `stops`, which is kept. At temperature 0 it takes the likeliest token.
        """
        rows, cache = batch.student, {}
        x, positions, mask = self.splice(rows, self.bank(batch)), rows.positions, document_mask(rows.doc_ids)
        B, T = rows.ids.shape
        visible = F.pad(rows.doc_ids >= 0, (0, max_new_tokens), value=True)  # (B, T + new)
        draw = torch.Generator(x.device).manual_seed(seed)
        new = torch.full((B, max_new_tokens), end, device=x.device)
        ended = torch.zeros(B, dtype=torch.bool, device=x.device)
        last = torch.tensor([end, *stops]).to(x.device, non_blocking=True)
        for t in range(max_new_tokens):
            hidden, _ = self.decoder.hidden(x, positions, mask, cache)
            logits = self.decoder.head(hidden[:, -1]).float()  # (B, N)
            token = logits.argmax(-1)
            if temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=draw)[:, 0]
            new[:, t] = torch.where(ended, end, token)
            ended |= (token[:, None] == last).any(-1)  # torch.isin may wait for the GPU
            if (t % 8 == 7 or not x.is_cuda) and ended.all():  # to look makes the host wait for the GPU
                break
            x, positions = self.decoder.embed(new[:, t : t + 1]), positions[:, -1:] + 1
            mask = visible[:, None, None, : T + t + 1]
        return [row[: row.index(end)] if end in row else row for row in new.tolist()]

    def adapt(self, cfg: ModelConfig) -> None:
        """Take over other pruners and isolators, adapters (the old ones are merged, new ones start at 0) and
        experts.
        """
        old = self.cfg
        cfg.check()
        if cfg.prune.isolator != old.prune.isolator:
            self.isolator = prune.ModeIsolator(cfg.prune.isolator, cfg.decoder.width)
        if cfg.lora != old.lora and old.lora.rank:
            weights = merged(self.decoder)
            with torch.device("meta"):
                self.decoder = Decoder(old.decoder)
            self.decoder.load_state_dict(weights, assign=True)
        if cfg.lora != old.lora and cfg.lora.rank:
            add_lora(self.decoder, cfg.lora)
        if cfg.decoder.experts != old.decoder.experts:
            upcycle(self.decoder, cfg.decoder)
        self.cfg = dataclasses.replace(old, prune=cfg.prune, lora=cfg.lora, decoder=cfg.decoder)

    def save_pretrained(self, folder: Path, extra: dict | None = None) -> None:
        """model.safetensors, config.json (the model's and `extra`), preprocessor.json."""
        write_weights(folder / "model.safetensors", self.state_dict())
        self.save_config(folder, extra)

    def save_config(self, folder: Path, extra: dict | None = None) -> None:
        image = {"image_size": self.cfg.vit.image_size, **dataclasses.asdict(self.cfg.image)}
        write_json(folder / "preprocessor.json", image)
        write_json(folder / "config.json", {"model": dataclasses.asdict(self.cfg), **(extra or {})})

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = torch.float32) -> "VLM":
        """From a run folder (its newest complete step) or a step folder. dtype None: matrices as saved."""
        folder = find_step(path)
        with torch.device("meta"):
            vlm = cls(from_dict(ModelConfig, read_json(folder / "config.json")["model"]))
        load_weights(vlm, open_weights(folder), folder, dtype)
        return vlm


def trainable_parts(train: str) -> list[str]:
    """--train "vit,connector" as a list of parts of the VLM."""
    parts = train.split(",")
    for part in parts:
        require_one_of("--train", part, ("vit", "connector", "decoder", "lora"))
    return parts


# --- Devices, checkpoints and weight files -----------------------------------------------------------------


@functools.cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA and on CPUs that multiply it at least as fast as float32: many only emulate it."""
    if device.type == "cuda":
        return torch.bfloat16
    matrices = {dtype: torch.ones(256, 256, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    seconds = dict.fromkeys(matrices, math.inf)
    for _ in range(10):  # in turns, so that what else the machine does slows down both
        for dtype, x in matrices.items():
            seconds[dtype] = min(seconds[dtype], timeit.timeit(lambda: x @ x, number=1))
    return min(seconds, key=seconds.get)


def find_ranks(name: str, hours: float = 0.5) -> tuple[int, int, torch.device]:
    """Rank, world size and device of a --device auto, cpu or cuda, from torchrun's environment; gloo on CPU,
    NCCL on CUDA. hours: how long a rank waits for another.
    """
    require_one_of("--device", name, ("auto", "cpu", "cuda"))
    cuda = name != "cpu" and torch.cuda.is_available()
    require(cuda or name != "cuda", "--device cuda: torch sees no GPU here; use --device cpu")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length of the keys
    if world > 1 and not dist.is_initialized():
        place = {"backend": "nccl", "device_id": device} if cuda else {"backend": "gloo"}
        dist.init_process_group(**place, timeout=timedelta(hours=hours))
    return rank, world, device


def find_step(path: str | Path) -> Path:
    """A run folder leads to the step named in its file `latest`; a step folder to itself."""
    step = Path(path)
    if (step / "latest").is_file():
        step = step / (step / "latest").read_text().strip()
    config = read_json(step / "config.json") if (step / "config.json").is_file() else {}
    fix = "other models go to --encoder_from and --decoder_from"
    ours = isinstance(config, dict) and isinstance(config.get("model"), dict)
    require(ours, f"{path} is neither a run folder nor a checkpoint of this project; {fix}")
    return step


REPO = r"(\w[\w.-]*/\w[\w.-]*)(?:@(.+))?"  # owner/name or owner/name@revision


def find_half(half: str | Path) -> Path:
    """A folder, here or beside this file, or the one that a repository was downloaded to. No network."""
    for folder in (Path(half), HERE / half):
        if folder.is_dir():
            return folder
    repo = re.fullmatch(REPO, str(half))
    require(bool(repo), f"{half} is neither a folder in Hugging Face layout nor a repository (owner/name)")
    folder = Path("weights") / repo[1]
    complete = (folder / "source.json").is_file()  # the last file of a download: its repo, revision, commit
    known = [None, *read_json(folder / "source.json").values()] if complete else []
    fetch = f"fetch it with python tools/download.py {half}"
    require(repo[2] in known, f"{half} is no folder and not downloaded: {fetch}")
    return folder


def read_preprocessor(folder: Path) -> tuple[ImageConfig, int]:
    """Mean, std and interpolation the encoder was trained with, and the side of its pictures in pixels."""
    file, newer = folder / "preprocessor_config.json", folder / "processor_config.json"
    file = newer if newer.is_file() and not file.is_file() else file
    config = read_json(file)
    require(isinstance(config, dict), f"{file} is no JSON object")
    config = config.get("image_processor", config)
    require(config.keys() >= {"image_mean", "image_std"}, f"{file}: image_mean or image_std is missing")
    size = config.get("crop_size") if config.get("do_center_crop") else config.get("size")
    if isinstance(size, dict):  # {"height", "width"} or {"shortest_edge"}
        size = size.get("height", size.get("shortest_edge"))
    size = size or read_vit_config(folder / "config.json").image_size
    return ImageConfig(config["image_mean"], config["image_std"], config.get("resample", 3)), size


def open_weights(folder: Path) -> dict:
    """Name -> a function that reads that tensor from model.safetensors, its shards, or else a .bin file. A
    file is mapped, safetensors anew for each tensor: its pages are given back before the next is cast.
    """
    readers, parts = {}, {}
    files = sorted(folder.glob("shard-*-model-*.safetensors"))  # of a sharded run, a rank each
    for name in ("pytorch_model.bin", "model.safetensors"):  # the latter is taken where both are
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [folder / name]
        elif index.is_file():
            files = sorted({folder / shard for shard in read_json(index)["weight_map"].values()})
    require(bool(files), f"{folder}/model.safetensors does not exist, nor its index, nor pytorch_model.bin")
    for file in files:
        require(file.is_file(), f"{file} does not exist, although its index names it: repeat the download")
        try:
            if file.suffix == ".bin":  # torch unpickles nothing but tensors
                mapped = zipfile.is_zipfile(file)  # files of old versions of torch are not
                tensors = torch.load(file, weights_only=True, mmap=mapped, map_location="cpu")
                if not all(isinstance(value, Tensor) for value in tensors.values()):
                    raise TypeError("more than tensors")
                readers |= {name: functools.partial(tensors.get, name) for name in tensors}
            else:
                whole = safe_open(file, "pt")
                shards = json.loads((whole.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
                for name in whole.keys():
                    if name in shards:
                        parts.setdefault(name, []).append((shards[name]["saved_offsets"], file))
                    else:
                        parts[name] = [([0], file)]
        except Exception as e:  # of many kinds; some texts advise to load a .bin file all the same
            damage = f"damaged, or holds more than tensors ({type(e).__name__})"
            raise UserError(f"{file} is {damage}") from None

    def read(name: str) -> Tensor:
        tensors, rows = [], 0
        for offsets, file in sorted(parts[name]):
            require(not offsets or offsets[0] == rows, f"{folder}: a shard of tensor '{name}' is missing")
            tensors.append(safe_open(file, "pt").get_tensor(name))
            rows += len(tensors[-1]) if tensors[-1].ndim else 0
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    return readers | {name: functools.partial(read, name) for name in parts}


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    plain = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    save_file(plain, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def kept_dtype(name: str, p: Tensor, dtype: torch.dtype) -> torch.dtype:
    """dtype for matrices; vectors and position tables, which are few, keep the residuals in float32."""
    return dtype if p.ndim > 1 and "position" not in name else torch.float32


def load_weights(module: nn.Module, readers: dict, source: str | Path, dtype: torch.dtype | None) -> None:
    """Fill a module made on the meta device, each tensor cast once to its `kept_dtype` (None: matrices
    stay as they are stored). Strict: names the first tensor that is missing, unknown or of another shape.
    """
    expected, loaded = module.state_dict(), {}
    for name in [*expected, *readers]:
        require(name in readers, f"{source}: tensor '{name}' is missing")
        require(name in expected, f"{source}: tensor '{name}' is not part of this model")
    for name, like in expected.items():
        value = readers[name]()
        while value.ndim > like.ndim and value.shape[0] == 1:  # some tables have a leading axis
            value = value[0]
        fits = value.shape == like.shape and value.is_floating_point()  # not quantized
        kinds = f"{tuple(value.shape)} of {value.dtype}, not {tuple(like.shape)} of floats"
        require(fits, f"{source}: tensor '{name}' is {kinds}")
        loaded[name] = value.to(kept_dtype(name, value, dtype or value.dtype), copy=True)  # not mapped
    module.load_state_dict(loaded, assign=True)
