"""The Chain-of-Sight connector and its token scaling (arXiv 2407.15819)."""

import pytest
import torch
from helpers import all_tokens
from torch.testing import assert_close

import model
from model import ChainOfSight, ConnectorConfig, DecoderConfig, ModelConfig, ViTConfig
from tools import report

# The token table (section 2.2): scaling step, base, pixels, windows, tokens of each scale
TABLE = [
    (None, (16, 1), 224, [16, 4], [16, 16]),
    (None, (16, 2), 224, [16, 4], [16, 32]),
    (None, (16, 4), 224, [16, 4], [16, 64]),
    ("80to80", (16, 4), 448, [32, 8], [16, 64]),
    ("80to144w", (16, 4), 224, [16, 8, 4], [16, 64, 64]),
    ("80to272w", (16, 4), 224, [16, 2], [16, 256]),
    ("80to336w", (16, 4), 224, [16, 8, 2], [16, 64, 256]),
    ("80to144", (16, 4), 448, [32, 16, 8], [16, 64, 64]),
    ("80to272", (16, 4), 448, [32, 4], [16, 256]),
    ("80to336", (16, 4), 448, [32, 16, 4], [16, 64, 256]),
    ("80to528", (16, 4), 448, [32, 8, 4], [16, 256, 256]),
    ("80to1104", (16, 4), 448, [32, 8, 2], [16, 64, 1024]),  # 32,16,2 in the paper: likely a misprint
    ("80to1296", (16, 4), 448, [32, 8, 2], [16, 256, 1024]),
    ("32to528", (16, 1), 448, [32, 8, 2], [16, 256, 256]),
    ("48to784", (16, 2), 448, [32, 8, 2], [16, 256, 512]),
    ("32to336", (16, 1), 448, [32, 16, 2], [16, 64, 256]),
    ("32to144", (16, 1), 448, [32, 16, 4], [16, 64, 64]),  # not in the paper: the demo's
]


pytestmark = pytest.mark.usefixtures("fp64")


def published(queries: tuple[int, int] = (16, 4)) -> ModelConfig:
    """CLIP-L/14 at 224, two scales, 4096 wide decoder."""
    return ModelConfig(
        vit=ViTConfig(image_size=224, patch_size=14, width=1024, layers=24, heads=16),
        connector=ConnectorConfig("chain", [16, 23], 1024, 16, windows=[16, 4], queries=list(queries)),
        decoder=DecoderConfig(width=4096),
    )


def narrow(queries: tuple[int, int] = (16, 4), key_positions: bool = False) -> ModelConfig:
    """The published grids of patches and windows, 8 numbers wide: one pixel a patch."""
    return ModelConfig(
        vit=ViTConfig(image_size=16, patch_size=1, width=8, layers=2, heads=2, mlp_width=8),
        connector=ConnectorConfig("chain", [1, 2], 8, 2, [16, 4], list(queries), key_positions=key_positions),
        decoder=DecoderConfig(vocab_size=16, width=12, layers=1, heads=2, kv_heads=1, head_dim=4),
    )


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter of the size that makes it count: at init the queries are small, the biases zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.5)
    return module


def scaled(name: str, **config) -> tuple[ChainOfSight, ChainOfSight, model.VLM]:
    """The connector of a narrow model before and after a scaling step, and the model."""
    before = {"80": (16, 4), "48": (16, 2), "32": (16, 1)}[name[:2]]
    vlm = model.VLM(narrow(before, **config))
    old = shaken(vlm.connector)
    model.scale_up(vlm, name)
    return old, vlm.connector, vlm


def levels_of(side: int, images: int = 2) -> list[torch.Tensor]:
    return [torch.randn(images, side**2, 8) for _ in range(2)]


def upsampled(levels: list[torch.Tensor], factor: int) -> list[torch.Tensor]:
    """Nearest neighbour on the patch grid: (I, P, C) -> (I, factor^2 P, C)"""
    side = round(levels[0].shape[1] ** 0.5)
    grids = [x.unflatten(1, (side, side)) for x in levels]
    return [g.repeat_interleave(factor, 1).repeat_interleave(factor, 2).flatten(1, 2) for g in grids]


# --- Counts and shapes
@pytest.mark.parametrize("step, queries, pixels, windows, tokens", TABLE)
def test_token_table(step, queries, pixels, windows, tokens):
    cfg = published(queries)
    cfg = model.scaled_config(cfg, step) if step else cfg
    assert (cfg.vit.image_size, cfg.connector.windows) == (pixels, windows)
    assert cfg.visual_tokens() == sum(tokens)
    side = pixels // 14
    assert [(side // w) ** 2 * n for w, n in zip(windows, cfg.connector.queries)] == tokens
    cfg.vit.width, cfg.decoder.width = 8, 12  # so that it can run
    cfg.connector.width, cfg.connector.heads = 8, 2
    connector, levels = ChainOfSight(cfg), levels_of(side)
    assert [scale(levels).shape for scale in connector.scales] == [(2, n, 8) for n in tokens]
    assert connector(levels).shape == (2, sum(tokens), 12)


def test_what_no_step_reaches_and_what_is_refused():
    cfg = published()
    cfg.connector.windows, cfg.connector.queries = [16, 8, 2], [16, 16, 4]
    assert cfg.visual_tokens() == 336  # CoS pre-trained with 336 tokens at 224
    cfg.connector.kind = "linear"
    assert cfg.visual_tokens() == 256  # every patch
    assert set(model.SCALINGS) == {row[0] for row in TABLE} - {None}
    with pytest.raises(model.UserError, match="two scales with 48 tokens, this model has 80"):
        model.scaled_config(published(), "48to784")
    with pytest.raises(model.UserError, match="did you mean 80to336"):
        model.scaled_config(published(), "80to366")
    cfg = published()
    cfg.connector.windows = [16, 5]
    with pytest.raises(model.UserError, match=r"5 does not divide the 16x16 patch grid.*\[1, 2, 4, 8, 16\]"):
        cfg.check()


@pytest.mark.parametrize("step, total", [(None, 54_663_168), ("80to1296", 81_098_752)])
def test_parameter_counts(step, total):
    cfg = model.scaled_config(published(), step) if step else published()
    with torch.device("meta"):
        built = ChainOfSight(cfg)
    blocks = [block for scale in built.scales for block in scale.blocks]
    assert {sum(p.numel() for p in block.parameters()) for block in blocks} == {12_595_200}
    assert sum(p.numel() for p in built.parameters()) == total


@pytest.mark.parametrize("step", ["80to1296", "32to336"])
def test_scales_come_coarse_to_fine(step):
    _, new, vlm = scaled(step)
    levels = levels_of(32)
    out = new(levels)  # (2, V, 12)
    sizes = [(32 // w) ** 2 * n for w, n in zip(vlm.cfg.connector.windows, vlm.cfg.connector.queries)]
    assert out.shape == (2, sum(sizes), 12) and sizes[0] == 16
    for part, scale in zip(out.split(sizes, 1), new.scales):
        assert_close(part, new.proj(new.norm(scale(levels))), rtol=0, atol=1e-12)
    for k in (1, 2, 3):
        assert_close(new(levels, n_scales=k), out[:, : sum(sizes[:k])], rtol=0, atol=1e-12)


def test_one_scale_against_loops_over_windows_and_heads():
    """Two levels, low then high; pre-norm; windows row-major, then queries."""
    scale = shaken(model.Scale(narrow().connector, 8, 16, window=4, n_queries=3))
    levels = levels_of(16, images=1)
    expected = []
    for r in range(4):
        for c in range(4):
            x = scale.queries[4 * r + c]  # (3, 8)
            for block, level in zip(scale.blocks, levels):
                patches = level[0].unflatten(0, (16, 16))[4 * r : 4 * r + 4, 4 * c : 4 * c + 4].flatten(0, 1)
                q = block.to_q(block.norm_queries(x))
                k, v = block.to_kv(block.norm_context(patches)).chunk(2, -1)
                heads = [slice(0, 4), slice(4, 8)]
                out = [torch.softmax(q[:, h] @ k[:, h].T / 2, -1) @ v[:, h] for h in heads]
                x = x + block.to_out(torch.cat(out, -1))
                x = x + block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(block.norm_mlp(x))))
            expected.append(x)
    assert_close(scale(levels)[0], torch.cat(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window, key_positions", [(16, False), (4, False), (4, True)])
def test_attention_shown_is_the_softmax_of_the_last_block(window, key_positions):
    cfg = narrow(key_positions=key_positions)
    scale = shaken(model.Scale(cfg.connector, 8, 16, window, n_queries=3))
    levels = levels_of(16)
    looks, n = report.patch_attention(scale, levels), 16 // window
    assert looks.shape == (2, n * n * 3, 256) and looks.dtype == torch.float32 and not looks.requires_grad
    assert_close(looks.sum(-1), torch.ones(2, n * n * 3, dtype=torch.float32))
    added = scale.key_positions if key_positions else 0
    block, grids = scale.blocks[1], [level.unflatten(1, (16, 16)) for level in levels]
    for w in range(n * n):
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[w // n * window :, w % n * window :][:window, :window] = True
        low, high = (grid[:, inside][:, None] for grid in grids)  # (I, 1, W*W, C)
        x = scale.blocks[0](scale.queries[None, w : w + 1], low, scale.key_positions)[:, 0]
        q = block.to_q(block.norm_queries(x))
        k = block.to_kv(block.norm_context(high[:, 0]) + added)[..., :8]
        heads = [(q[..., h] @ k[..., h].mT / 2).softmax(-1) for h in (slice(0, 4), slice(4, 8))]
        inside_window = looks[:, 3 * w : 3 * w + 3].unflatten(2, (16, 16))
        assert_close(inside_window[..., inside].double(), sum(heads) / 2, rtol=0, atol=1e-6)
        assert not inside_window[..., ~inside].any()


# --- Locality and symmetry
@pytest.mark.parametrize("key_positions", [False, True])
def test_order_inside_a_window(key_positions):
    connector = shaken(ChainOfSight(narrow(key_positions=key_positions)))
    levels = levels_of(16)
    order = torch.arange(256).reshape(16, 16)
    order[4:8, 8:12] = order[4:8, 8:12].flatten()[torch.randperm(16)].reshape(4, 4)
    moved = connector([x[:, order.flatten()] for x in levels]) - connector(levels)
    assert (moved.abs().max() > 1e-3) == key_positions  # positions inside a window exist only if asked for
    assert key_positions or moved.abs().max() < 1e-12


# --- Inflation
@pytest.mark.parametrize("step", ["80to80", "80to1296", "80to336", "32to528", "80to1104"])
def test_inflated_scales_repeat_their_source_on_constant_windows(step):
    """Else only scales that keep their windows do: a smaller one sees fewer patches than its source.
    A larger resolution alone (80to80) changes nothing on upsampled features.
    """
    old, new, _ = scaled(step)
    for scale, (source, factor) in zip(new.scales, model.read_scaling(step)[1]):
        source = old.scales[source]
        constant = upsampled(levels_of(source.per_side), 16 // source.per_side)  # one feature a source window
        for levels, equal in ((constant, True), (levels_of(16), factor == 1)):
            tokens = source(levels).unflatten(1, (source.per_side**2, -1)).flatten(2)  # (I, windows, q * 8)
            out = scale(upsampled(levels, 2)).unflatten(1, (scale.per_side**2, -1)).flatten(2)
            difference = (out - upsampled([tokens], factor)[0]).abs().max()
            assert difference < 1e-12 if equal else difference > 0.1


def test_new_scales_own_their_weights():
    old, new, _ = scaled("80to1296")
    pointers = [p.data_ptr() for scale in (*old.scales, *new.scales) for p in scale.parameters()]
    assert len(set(pointers)) == len(pointers)
    kept, inflated = new.scales[0].blocks, new.scales[1].blocks  # both from the old global scale
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), inflated.parameters()))


# --- Plans by name, steps spelled out, and the switches that the paper does not have
PLANS = {
    "32": ([16, 4], [16, 16]), "48": ([16, 4], [16, 32]), "80": ([16, 4], [16, 64]),
    "336": ([16, 8, 2], [16, 64, 256]),
}  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_plans_set_windows_and_queries_on_any_grid(plan):
    windows, tokens = PLANS[plan]
    assert plan == str(sum(tokens)) and PLANS.keys() == model.SCALE_PLANS.keys()
    for factor in (1, 2):  # 224 and 448 pixels: the same tokens from larger windows
        cfg = published()
        cfg.connector.plan, cfg.vit.image_size = plan, 224 * factor
        assert [window for window, _ in cfg.check().scales()] == [w * factor for w in windows]
        assert cfg.scale_tokens() == tokens and cfg.connector.windows == [16, 4]  # nothing is set
    cfg.vit.image_size = 14 * 18
    with pytest.raises(model.UserError, match="does not divide the 18x18 patch grid"):
        cfg.check()
    cfg.connector.plan = "81"
    with pytest.raises(model.UserError, match="connector.plan '81' is unknown: use one of 32, 48, 80, 336"):
        cfg.check()


@pytest.mark.parametrize(
    "spelled, named", [("2:0x1,0x4,1x4", "80to1296"), ("1:0x1,1x2", "80to272w"), ("2:0x1,1x1", "80to80")]
)
def test_a_step_spelled_out_is_the_named_one(spelled, named):
    assert model.scaled_config(published(), spelled) == model.scaled_config(published(), named)
    torch.manual_seed(1)
    vlm = model.VLM(narrow())
    other = model.VLM(narrow())
    other.load_state_dict(vlm.state_dict())
    model.scale_up(vlm, spelled)
    model.scale_up(other, named)
    named_weights = other.state_dict()
    assert all(torch.equal(value, named_weights[name]) for name, value in vlm.state_dict().items())
    three = model.scaled_config(published(), "80to336w")
    again = model.scaled_config(three, "2:0x1,1x1,2x1")
    assert again.connector.windows == [32, 16, 4] and again.visual_tokens() == 336


@pytest.mark.parametrize("step", ["2:0x1,2x1", "0:0x1", "2:0x0", "2:", "2:0x1;1x1", "1:0x1,1x8"])
def test_steps_that_make_no_sense_are_refused(step):
    with pytest.raises(model.UserError, match="--scale|does not divide"):
        model.scaled_config(published(), step)


def test_reversed_order_puts_the_fine_tokens_first():
    cfg = narrow()
    connector, levels = shaken(ChainOfSight(cfg)), levels_of(16)
    tokens = connector(levels)
    cfg.connector.reverse = True
    other = ChainOfSight(cfg)
    other.load_state_dict(connector.state_dict())
    assert torch.equal(other(levels), torch.cat([tokens[:, 16:], tokens[:, :16]], 1))
    assert torch.equal(other(levels, n_scales=1), connector(levels, n_scales=1))  # the coarse one


@pytest.mark.parametrize("init", model.SCALE_INITS)
def test_how_new_scales_start(init):
    vlm = model.VLM(narrow())
    old = shaken(vlm.connector)
    model.scale_up(vlm, "80to336", init)
    kept, first, second = vlm.connector.scales
    assert torch.equal(kept.queries, old.scales[0].queries)  # factor 1: inherited whatever the init

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))

    assert same(kept.blocks, old.scales[0].blocks)
    assert same(first.blocks, old.scales[0].blocks) == same(second.blocks, old.scales[1].blocks)
    assert same(first.blocks, old.scales[0].blocks) == (init != "random")
    assert torch.equal(vlm.connector.proj.weight, old.proj.weight)
    assert torch.equal(first.queries[0], old.scales[0].queries[0]) == (init == "inflate")


def test_one_level_is_a_list_of_one_and_scaling_keeps_the_dtype():
    cfg = narrow()
    cfg.connector.levels = [2]
    vlm = model.VLM(cfg)
    assert [len(scale.blocks) for scale in vlm.connector.scales] == [1, 1]
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert all_tokens(vlm.float(), pixels).shape == (1, 80, 12)
    vlm = model.VLM(narrow()).bfloat16()
    model.scale_up(vlm, "80to336")
    assert {p.dtype for p in vlm.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("stage", ["pretrain", "pretrain_b", "sft"])
def test_freeze_map(stage):
    """Resampler and adapters always, the ViT from 1b on up to its last used block, the decoder never."""
    cfg = narrow()
    cfg.vit.layers, cfg.lora = 3, model.LoraConfig(2)
    vlm = model.VLM(cfg)
    trained_parts = model.preset("cos-8b")[stage]["train"]
    vlm.set_trainable(model.trainable_parts(trained_parts), isolator=False)
    trained = {name for name, p in vlm.named_parameters() if p.requires_grad}
    names = {name for name, _ in vlm.named_parameters()}
    expected = {name for name in names if name.startswith("connector.") or ".lora_" in name}
    if stage != "pretrain":
        unused = ("vit.encoder.layers.2.", "vit.post_layernorm.")  # levels end at block 2 of 3
        expected |= {name for name in names if name.startswith("vit.") and not name.startswith(unused)}
    assert trained == expected
    assert trained_parts == ("connector,lora" if stage == "pretrain" else "vit,connector,lora")
