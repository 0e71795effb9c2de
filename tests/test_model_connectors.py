"""The seven connectors: MM1's and the baselines. What is Chain-of-Sight's alone: test_model_chain.py."""

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import data
import model
import train_pretrain
from model import CONNECTORS, ConnectorConfig, DecoderConfig, ModelConfig, UserError, ViTConfig

# A chain of two scales for each side of the patch grid: windows, and queries for 64 and for 144 tokens
CHAINS = {
    16: ([16, 4], {64: [16, 3], 144: [16, 8]}), 24: ([24, 6], {64: [16, 3], 144: [16, 8]}),
    27: ([27, 9], {64: [10, 6], 144: [9, 15]}),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("fp64")


def config(kind: str, side: int = 16, tokens: int = 64, width: int = 8, inner: int = 12) -> ModelConfig:
    windows, queries = CHAINS[side]
    return ModelConfig(
        vit=ViTConfig(image_size=side, patch_size=1, width=width, layers=2, heads=2, mlp_width=8),
        connector=ConnectorConfig(kind, [1, 2], inner, 2, windows, queries[tokens], tokens),
        decoder=DecoderConfig(vocab_size=16, width=20, layers=1, heads=2, kv_heads=1, head_dim=4),
    )


def shaken(kind: str, *args, **changes) -> torch.nn.Module:
    """A connector with parameters of a size that counts: at init queries are small, biases zero."""
    connector = CONNECTORS[kind](config(kind, *args, **changes))
    with torch.no_grad():
        for p in connector.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return connector


def levels_of(side: int, images: int = 2) -> list[Tensor]:
    return [torch.randn(images, side**2, 8) for _ in range(2)]


# --- Shapes, gradients, configs
@pytest.mark.parametrize("tokens", [64, 144])
@pytest.mark.parametrize("side", [16, 24, 27])
@pytest.mark.parametrize("kind", CONNECTORS)
def test_output_shapes(kind, side, tokens):
    cfg = config(kind, side, tokens).check()
    n = side**2 if kind in ("linear", "mlp") else tokens
    assert CONNECTORS[kind](cfg)(levels_of(side, 3)).shape == (3, n, 20)
    assert cfg.visual_tokens() == n
    raster = {"linear": side, "mlp": side, "avgpool": tokens**0.5, "cabstractor": tokens**0.5}
    assert cfg.grid() == raster.get(kind, 0)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_order_of_the_patches_and_levels(kind):
    connector = shaken(kind)
    out = connector(levels_of(16))
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-6 for p in connector.parameters())
    # Pools of the whole have no positions; patch by patch the order goes through; else it matters.
    connector, levels = shaken(kind), levels_of(16)
    order = torch.randperm(256)
    before, after = connector(levels), connector([x[:, order] for x in levels])
    if kind in ("attnpool", "resampler"):
        assert_close(after, before, rtol=0, atol=1e-12)
    elif kind in ("linear", "mlp"):
        assert_close(after, before[:, order], rtol=0, atol=1e-12)
    else:
        assert (after - before).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [kind for kind in CONNECTORS if kind not in ("chain", "resampler")])
def test_the_others_read_the_highest_level_alone(kind):
    connector, (low, high) = shaken(kind), levels_of(16)
    assert torch.equal(connector([low, high]), connector([high]))
    assert not torch.allclose(connector([low, high]), connector([high, low]))


@pytest.mark.parametrize("change, word", [
    ({"kind": "cabstractor", "tokens": 63}, "tokens 63: cabstractor needs a square number"),
    ({"kind": "attnpool", "tokens": 0}, "tokens 0"),
    ({"kind": "qformer"}, f"'qformer' is unknown: use one of {', '.join(CONNECTORS)}"),
    ({"levels": [1, 3]}, r"levels \[1, 3\] must lie in 0..2"), ({"levels": []}, "levels"),
    ({"windows": [16]}, "differ in length"), ({"windows": [16, 3]}, "3 does not divide the 16x16"),
])  # fmt: skip
def test_configs_that_cannot_work_are_refused(change, word):
    cfg = config("chain")
    cfg.connector = model.dataclasses.replace(cfg.connector, **change)
    with pytest.raises(UserError, match=word):
        model.VLM(cfg)


# --- C-Abstractor
PARAMETERS = [  # Dv, h, D, L, then stage 1 = stage 2 where widths agree, readout, positions, total
    (1024, 1024, 4096, 256, 7_914_240, 7_914_240, 20_979_712, 262_144, 37_070_336),  # Honeybee-C-7B-M144
    (1024, 1024, 4096, 576, 7_914_240, 7_914_240, 20_979_712, 589_824, 37_398_016),
    (1024, 1024, 5120, 576, 7_914_240, 7_914_240, 31_467_520, 589_824, 47_885_824),
    (1024, 1024, 2048, 576, 7_914_240, 7_914_240, 6_295_552, 589_824, 22_713_856),
    (1280, 1024, 2560, 729, 9_620_288, 7_914_240, 9_180_160, 933_120, 27_647_808),
    (1280, 1024, 4096, 729, 9_620_288, 7_914_240, 20_979_712, 933_120, 39_447_360),
    (1280, 1280, 4096, 729, 12_350_400, 12_350_400, 22_028_288, 933_120, 47_662_208),
]


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("width, inner, out, patches, before, after, readout, positions, total", PARAMETERS)
def test_c_abstractor_has_honeybees_parameters(
    width, inner, out, patches, before, after, readout, positions, total
):
    cfg = config("cabstractor", tokens=144, width=width, inner=inner)
    cfg.vit.image_size, cfg.decoder.width = round(patches**0.5), out
    with torch.device("meta"):
        c = model.CAbstractor(cfg)
    assert [count(c.before), count(c.after), count(c.readout)] == [before, after, readout]
    assert (c.positions.numel(), count(c)) == (positions, total)


def block_by_the_text(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """RegNet's bottleneck from its description: no convolution, norm or activation of torch's is used."""

    def norm(x: Tensor, name: str) -> Tensor:
        """Over the channels of each pixel, affine, eps 1e-5."""
        mean = x.mean(1, keepdim=True)
        variance = ((x - mean) ** 2).mean(1, keepdim=True)
        weight, bias = (p[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def mix(x: Tensor, name: str) -> Tensor:
        """A 1x1 convolution: a matrix over the channels."""
        out = torch.einsum("oi,nihw->nohw", p[f"{name}.weight"][:, :, 0, 0], x)
        return out + p[f"{name}.bias"][:, None, None] if f"{name}.bias" in p else out

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    y = silu(norm(mix(x, "conv1"), "norm1"))
    rows, columns, padded = *y.shape[2:], F.pad(y, (1, 1, 1, 1))
    y = sum(
        p["conv2.weight"][:, 0, a, b, None, None] * padded[:, :, a : a + rows, b : b + columns]
        for a in range(3)
        for b in range(3)
    )
    y = silu(norm(y, "norm2"))
    gate = mix(silu(mix(y.sum((2, 3), keepdim=True) / (rows * columns), "squeeze")), "excite")
    y = norm(mix(y / (1 + torch.exp(-gate)), "conv3"), "norm3")
    return silu(y + (norm(mix(x, "shortcut.0"), "shortcut.1") if "shortcut.0.weight" in p else x))


def windows(old: int, new: int) -> list[tuple[int, int]]:
    """Adaptive pooling: from floor(k * old / new) to ceil((k + 1) * old / new)."""
    return [(k * old // new, -(-(k + 1) * old // new)) for k in range(new)]


def pooled_by_hand(x: Tensor, side: int, new: int) -> Tensor:
    """(I, P, C) in raster order -> (I, new^2, C)"""
    grid = x.unflatten(1, (side, side))
    cells = [grid[:, a:b, c:d].mean((1, 2)) for a, b in windows(side, new) for c, d in windows(side, new)]
    return torch.stack(cells, 1)


@pytest.mark.parametrize(
    "side, new, first",
    [
        (27, 12, [(0, 3), (2, 5), (4, 7), (6, 9)]),  # 378 px: uneven, overlapping windows
        (16, 12, [(0, 2), (1, 3), (2, 4), (4, 6)]),
        (24, 12, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (16, 8, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (24, 8, [(0, 3), (3, 6), (6, 9), (9, 12)]),
    ],
)
@pytest.mark.parametrize("kind", ["avgpool", "cabstractor"])
def test_pool_windows(kind, side, new, first):
    assert windows(side, new)[:4] == first
    connector, levels = shaken(kind, side, new**2), levels_of(side)
    if kind == "avgpool":  # means, the norm, one linear
        means = pooled_by_hand(levels[-1], side, new)
        by_hand = F.layer_norm(means, (8,), connector.norm.weight, connector.norm.bias)
        by_hand = by_hand @ connector.proj.weight.T + connector.proj.bias
    else:  # positions, three blocks, means, three blocks, two linears
        x = (levels[-1] + connector.positions).transpose(1, 2).unflatten(2, (side, side))
        for block in connector.before:
            x = block_by_the_text(dict(block.named_parameters()), x)
        x = pooled_by_hand(x.flatten(2).transpose(1, 2), side, new)
        x = x.transpose(1, 2).unflatten(2, (new, new))
        for block in connector.after:
            x = block_by_the_text(dict(block.named_parameters()), x)
        x = x.flatten(2).transpose(1, 2)
        one, _, two = connector.readout
        x = x @ one.weight.T + one.bias
        by_hand = (x * torch.sigmoid(x)) @ two.weight.T + two.bias
    assert_close(connector(levels), by_hand, rtol=0, atol=1e-10)


# --- The others
def test_mlp_and_attention_pooling_are_their_formulas():
    c, levels = shaken("mlp"), levels_of(16)
    x = levels[-1] @ c.fc1.weight.T + c.fc1.bias
    x = x * (1 + torch.erf(x / 2**0.5)) / 2  # the exact GELU, not tanh's
    assert_close(c(levels), x @ c.fc2.weight.T + c.fc2.bias, rtol=0, atol=1e-12)
    c, levels = shaken("attnpool"), levels_of(16, 1)
    b, queries = c.block, c.queries[0, 0]

    def norm(x, layer):
        return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias)

    q = norm(queries, b.norm_queries) @ b.to_q.weight.T
    k, v = (norm(levels[-1][0], b.norm_context) @ b.to_kv.weight.T).chunk(2, -1)
    heads = [slice(0, 6), slice(6, 12)]
    out = torch.cat([torch.softmax(q[:, h] @ k[:, h].T / 6**0.5, -1) @ v[:, h] for h in heads], -1)
    out = queries + out @ b.to_out.weight.T + b.to_out.bias
    hidden = F.gelu(norm(out, b.norm_mlp) @ b.mlp.fc1.weight.T + b.mlp.fc1.bias)
    out = norm(out + hidden @ b.mlp.fc2.weight.T + b.mlp.fc2.bias, c.norm)
    out = out @ c.proj.weight.T + c.proj.bias
    assert_close(c(levels)[0], out, rtol=0, atol=1e-12)


def test_a_resampler_is_a_chain_of_one_window():
    resampler, cfg = shaken("resampler"), config("chain")
    cfg.connector.windows, cfg.connector.queries = [16], [64]
    chain = model.ChainOfSight(cfg.check())
    chain.load_state_dict(resampler.state_dict())
    levels = levels_of(16)
    assert torch.equal(chain(levels), resampler(levels)) and cfg.visual_tokens() == 64


# --- One of one's own: a class and a line
class Quarter(model.Connector):
    """The mean of each 2x2 patches, through one linear map."""

    def __init__(self, cfg):
        super().__init__()
        self.proj = torch.nn.Linear(cfg.vit.width, cfg.decoder.width)

    @classmethod
    def scales_of(cls, cfg):
        return [(2, 1)]  # one token for each window of 2x2 patches

    def forward(self, levels):
        return self.proj(model.cut_windows(levels[-1], 2).mean(2))


def test_a_connector_is_a_class_and_a_line(monkeypatch, tmp_path, small_halves):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setitem(CONNECTORS, "quarter", Quarter)
    cfg = config("quarter").check()
    assert (cfg.visual_tokens(), cfg.grid(), cfg.kept_tokens()) == (64, 0, 6)
    assert cfg.fits("divprune") and not cfg.fits("pool") and not cfg.fits("fastervlm")
    flags = [*helpers.SMALL, *small_halves, "--steps", "2", "--connector.kind", "quarter"]
    train_pretrain.main([*flags, "--out", str(tmp_path)])
    assert type(model.VLM.from_pretrained(tmp_path).connector) is Quarter


@pytest.mark.parametrize("kind", CONNECTORS)
def test_generation(kind):
    """That it trains: test_golden.py."""
    torch.set_default_dtype(torch.float32)
    connector = ConnectorConfig(kind, [1, 2], 32, 2, [4, 2], [4, 1], 4)
    vlm = model.VLM(helpers.small_config(connector=connector).check())
    assert type(vlm.connector) is CONNECTORS[kind]
    assert vlm.cfg.visual_tokens() == {"linear": 16, "mlp": 16, "chain": 8}.get(kind, 4)
    pieces = data.prompt_pieces("how many stars?", 1, helpers.TOKENIZER)
    picture = data.load_images([data.make_scene("test", 0)], vlm.cfg)
    for mode in ("full", "pruned"):
        batch = data.prompt_batch([(pieces, picture)], mode, vlm.cfg)
        assert len(vlm.generate(batch, helpers.TOKENIZER.vocab_size, 4)[0]) == 4
