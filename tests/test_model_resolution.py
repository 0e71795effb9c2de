"""Resolution: interpolated positions, MM1's sub-images, LLaVA-NeXT's tilings, from a picture to the bank."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, TOKENIZER, all_tokens, log_of, slot_mask, write
from PIL import Image
from torch.testing import assert_close

import data
import eval as evaluation
import model
import prune
import train_pretrain
import train_sft
from model import ConnectorConfig, DecoderConfig, ImageConfig, ModelConfig, PruneConfig, UserError, ViTConfig
from tools import report

VECTORS = json.loads((Path(__file__).parent / "fixtures" / "eval_vectors.json").read_text())
NEXT, MAX9 = VECTORS["anyres_336_clip24"], VECTORS["anyres_max9_siglip384_side27"]
SMALL = [*SMALL, *"--batch_size 4 --row_length 256 --steps 3".split()]


def config(cut: str, side: int = 16, patch: int = 4, kind: str = "linear", **connector) -> ModelConfig:
    return ModelConfig(
        image=ImageConfig(cut=cut),
        vit=ViTConfig(side, patch, 16, 2, 2, 32),
        connector=ConnectorConfig(kind, [1, 2], 16, 2, **connector),
        decoder=DecoderConfig(TOKENIZER.vocab_size, 32, 2, 2, 1, 16, 48),
        prune=PruneConfig("divprune", 3, 2),
    ).check()


def with_pixels(cfg: ModelConfig) -> model.VLM:
    """A VLM whose visual token is the mean colour of its patch, the rest zero: one sees what lies where."""
    torch.manual_seed(0)
    vlm = model.VLM(cfg)

    def states(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        colours = F.avg_pool2d(pixels.float(), cfg.vit.patch_size).flatten(2).mT  # (I, P, 3)
        return (F.pad(colours, (0, cfg.decoder.width - 3)),)

    vlm.states, vlm.levels = states, lambda states, tiles=slice(None): [states[0][tiles]]
    vlm.connector.forward = lambda levels: levels[-1]
    return vlm


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    drawn = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(drawn)


def sample(pictures: list, cfg: ModelConfig, text: int = 5) -> data.Sample:
    pieces = [piece for n in range(len(pictures)) for piece in (([7] * text, True), n)] + [([8] * text, True)]
    return data.load_sample(pieces, pictures, cfg)


def spliced(vlm: model.VLM, rows: data.Rows, batch: data.Batch) -> torch.Tensor:
    """What stands in the slots of the first document, in order: (slots, D)"""
    first = slot_mask(rows) & (rows.doc_ids == 0)
    return vlm.splice(rows, vlm.bank(batch))[first]


# --- Geometry
@pytest.mark.parametrize("vector", NEXT, ids=lambda v: "x".join(map(str, v["image_wh"])))
def test_llava_next_takes_these_tiles_and_tokens(vector):
    cfg, size = config("unpad", 336, 14, "mlp"), tuple(vector["image_wh"])
    assert [336 * n for n in data.tiling_of(cfg, size)] == vector["best_resolution_wh"]
    assert data.tile_count(cfg, size) == vector["tiles"]
    flat = data.picture_slots(config("anyres", 336, 14, "mlp"), "full", size)
    assert flat.tolist() == [*range(vector["flat_tokens"])]
    slots, (rows, columns) = data.picture_slots(cfg, "full", size), vector["unpadded_grid_hw"]
    assert len(slots) == vector["spatial_unpad_tokens"] == 576 + rows * (columns + 1)
    ends = np.flatnonzero(slots == data.NEWLINE)
    assert ends.tolist() == [576 + (n + 1) * (columns + 1) - 1 for n in range(rows)]
    views, newline = torch.randn(vector["tiles"], 576, 3), torch.full((3,), 9.0)
    bank = torch.cat([views.flatten(0, 1), newline[None]])
    tiling = tuple(n // 336 for n in vector["best_resolution_wh"])
    expected = reference_unpad(views, tiling, size, newline)
    assert_close(bank[np.where(slots == data.NEWLINE, -1, slots)], expected)


@pytest.mark.parametrize("vector", MAX9, ids=lambda v: "x".join(map(str, v["image_wh"])))
def test_other_tilings_work_as_well(vector, monkeypatch):
    """OneVision's 36 on a 27 x 27 grid, as far as it does not shrink the grid, which is not built."""
    cfg, size = config("unpad", 27 * 14, 14, "mlp"), tuple(vector["image_wh"])
    cfg.vit.image_size = 384  # 6 px are left over
    tiling = data.tiling_of(cfg, size, [(columns, rows) for columns in range(1, 7) for rows in range(1, 7)])
    cfg.vit.image_size = 27 * 14
    assert [384 * n for n in tiling] == vector["best_resolution_wh"]
    monkeypatch.setattr(data, "tiling_of", lambda cfg, size: tiling)
    assert data.tile_count(cfg, size) == vector["tiles"]
    if not vector["downsampled"]:
        slots, (rows, columns) = data.picture_slots(cfg, "full", size), vector["unpadded_grid_hw"]
        assert len(slots) == vector["spatial_unpad_tokens"] == 729 + rows * (columns + 1)


@pytest.mark.parametrize("cut", ["", "split", "anyres", "unpad"])
def test_views_counted_are_views_cut(cut):
    cfg = config(cut)
    for size in [(40, 40), (64, 16), (16, 64), (9, 40), (30, 20), (200, 3), (1, 1)]:
        views = data.cut_picture(noise(*size), cfg)
        assert views.shape == (data.tile_count(cfg, size), 3, 16, 16) and views.dtype == np.uint8
        for mode in ("full", "pruned"):
            slots = data.picture_slots(cfg, mode, size)
            inside = slots[slots != data.NEWLINE]
            assert len(set(inside)) == len(inside) and inside.max() < len(views) * cfg.visual_tokens(mode)


def test_mm1_at_1344_pixels():
    cfg = model.at_resolution(model.preset("7b")["model"], "672+split").check()
    assert cfg.side == 48 and len(data.picture_slots(cfg, "full", (640, 480))) == 5 * 144 == 720
    assert data.square_tokens(cfg) == 720
    for name in ("1.2b", "3b", "7b", "30b", "3b-moe", "7b-moe"):
        recipe = model.preset(name)["sft"]
        assert recipe["resolution"] == "672+split" and recipe["row_limit"] > 720
    values = model.preset("llava-next")
    cfg = model.at_resolution(values["model"], values["sft"]["resolution"]).check()
    assert data.square_tokens(cfg) == 2928 < values["sft"]["row_limit"]


# --- Pixels
COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)  # 2 x 2


def quadrants(width: int, height: int) -> Image.Image:
    return Image.fromarray(COLOURS.repeat(height // 2, 0).repeat(width // 2, 1))


@pytest.mark.parametrize("cut", ["split", "anyres", "unpad"])
@pytest.mark.parametrize("side", [32, 64])
def test_tiles_run_from_top_left_to_bottom_right_after_the_whole(cut, side):
    whole, *tiles = data.cut_picture(quadrants(2 * side, 2 * side), config(cut, side))
    for tile, colour in zip(tiles, COLOURS.reshape(4, 3), strict=True):
        assert (tile == colour[:, None, None]).all()
    half = side // 4
    centres = whole[:, half::half, half::half][:, ::2, ::2].transpose(1, 2, 0)  # of the four quadrants
    assert (centres[:2, :2] == COLOURS).all()


def test_pictures_are_split_stretched_or_padded():
    picture, cfg = quadrants(64, 48), config("split", 32)
    cfg.image.resample = Image.Resampling.NEAREST  # no overshoot at the borders
    split = data.cut_picture(picture, cfg)
    assert (split[1:] == COLOURS.reshape(4, 3, 1, 1)).all()  # stretched to 64 x 64
    whole, *tiles = data.cut_picture(picture, config("anyres", 32))
    assert (whole == data.to_pixels(picture, 32)).all()
    for n, (tile, colour) in enumerate(zip(tiles, COLOURS.reshape(4, 3), strict=True)):
        black, drawn = (tile[:, :8], tile[:, 8:]) if n < 2 else (tile[:, -8:], tile[:, :-8])
        assert not black.any() and (drawn == colour[:, None, None]).all()
    wide = data.cut_picture(quadrants(96, 32), config("anyres", 32))  # three columns, one row: no padding
    assert len(wide) == 4 and (wide[1, :, :16] == COLOURS[0, 0][:, None, None]).all()
    assert (wide[3, :, 16:] == COLOURS[1, 1][:, None, None]).all()
    cfg = ModelConfig(vit=ViTConfig(64, 8, 32, 4, 2, 64))
    cfg.image.cut, cfg.image.mean = "pad", [0.48145466, 0.4578275, 0.40821073]  # CLIP's: (122, 116, 104)
    side = cfg.vit.image_size
    for size in ((side, side // 2), (side // 2 + 1, side)):
        picture = Image.new("RGB", size, "red")
        views = data.cut_picture(picture, cfg)
        expected = np.full((side, side, 3), (122, 116, 104), np.uint8)
        left, top = (side - size[0]) // 2, (side - size[1]) // 2
        expected[top : top + size[1], left : left + size[0]] = (255, 0, 0)
        assert np.array_equal(views, expected.transpose(2, 0, 1)[None])
    assert len(data.picture_slots(cfg, "full", (300, 200))) == cfg.visual_tokens()


def test_the_size_of_a_photograph_comes_without_decoding(tmp_path):
    noise(60, 40).save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:700])  # header, hardly any picture
    assert data.picture_size(tmp_path / "b.jpg") == (60, 40)
    assert data.picture_sizes([tmp_path / "c.jpg"], config("split")) == [(1, 1)]  # not read: all cut alike


# --- From slots to the bank
def reference_unpad(views: torch.Tensor, tiling: tuple, size: tuple, newline: torch.Tensor) -> torch.Tensor:
    """B4 of LLaVA-NeXT in torch: (1 + tiles, g*g, D) -> (tokens, D), written from its description."""
    (columns, rows), (width, height) = tiling, size
    g = int(views.shape[1] ** 0.5)
    grid = views[1:].view(rows, columns, g, g, -1).permute(4, 0, 2, 1, 3)
    grid = grid.flatten(3, 4).flatten(1, 2)  # (D, h, w)
    h, w = grid.shape[1:]
    if width / height > w / h:
        pad = (h - int(height * (w / width))) // 2
        grid = grid[:, pad : h - pad]
    else:
        pad = (w - int(width * (h / height))) // 2
        grid = grid[:, :, pad : w - pad]
    ends = newline[:, None, None].expand(-1, grid.shape[1], 1)
    return torch.cat([views[0], torch.cat([grid, ends], 2).flatten(1).T])


@pytest.mark.parametrize("cut", ["split", "anyres", "unpad"])
def test_every_sample_finds_its_own_views_in_every_mode(cut):
    """Several pictures of several sizes, packed in all modes, against each picture by itself."""
    cfg = config(cut)
    vlm, sizes = with_pixels(cfg), [[(32, 32), (40, 13)], [], [(20, 64)], [(33, 31)]]
    samples = [sample([noise(*size, seed=n) for n, size in enumerate(one)], cfg) for one in sizes]
    modes = ["slow", "full", "pruned", "full"]
    batch = data.make_batch(samples, modes, cfg, 4096, 4096)
    assert len(batch.student.ids) == 1
    assert len(batch.pruned_tiles) == len(samples[0].pixels) + len(samples[2].pixels)

    def alone(n: int, mode: str) -> torch.Tensor:
        views = all_tokens(vlm, torch.from_numpy(samples[n].pixels))  # (views, V, D)
        parts, first = [], 0
        for size in sizes[n]:
            count = data.tile_count(cfg, size)
            tiles, first = views[first : first + count], first + count
            if mode == "pruned":  # tile by tile, each behind the isolator
                kept = prune.select("divprune", tiles, 3, grid=4)
                parts.append(vlm.isolator(prune.gather(tiles, kept)).flatten(0, 1))
            elif cut == "unpad":
                parts.append(reference_unpad(tiles, data.tiling_of(cfg, size), size, vlm.newline))
            else:
                parts.append(tiles.flatten(0, 1))
        return torch.cat(parts)

    rows, bank = batch.student, vlm.bank(batch)
    x = vlm.splice(rows, bank)
    for n, mode in enumerate(modes):
        if sizes[n]:
            got = x[slot_mask(rows) & (rows.doc_ids == n)]
            assert_close(got, alone(n, mode))
    assert_close(spliced(vlm, batch.teacher, batch), alone(0, "pruned"))  # the slow sample's other view
    for mode in ("full", "pruned"):
        prompts = data.prompt_batch(samples, mode, cfg)
        x = vlm.splice(prompts.student, vlm.bank(prompts))
        for n in (0, 2, 3):
            assert_close(x[n][slot_mask(prompts.student)[n]], alone(n, mode))


def test_a_picture_is_never_cut_by_the_limit_and_its_tiles_fit_its_size():
    cfg = config("unpad")
    one = sample([noise(32, 24), noise(64, 16)], cfg)
    lengths = [len(slots) for slots in data.sample_slots(cfg, "full", one.sizes)]
    assert lengths == [16 + 6 * 9, 16 + 4 * 13]
    whole = 5 + lengths[0] + 5 + lengths[1] + 5
    for limit in range(1, whole + 2, 3):
        batch = data.make_batch([one], ["full"], cfg, 16, limit)
        length = int((batch.student.doc_ids == 0).sum())
        assert length <= limit
        assert slot_mask(batch.student).sum() in (0, lengths[0], sum(lengths))
    assert length == whole
    # tiles and sizes that disagree are refused
    cfg = config("anyres")
    one = sample([noise(32, 32)], cfg)
    for wrong in (one._replace(sizes=[(64, 16)]), one._replace(pixels=one.pixels[:4]), one[:2]):
        with pytest.raises(RuntimeError, match="tiles, but pictures of"):
            data.make_batch([wrong], ["full"], cfg, 128, 512)


# --- The newline
@pytest.mark.parametrize(
    "kind, mode, lines", [("chat", "full", 8), ("chat", "pruned", 0), ("text", "full", 0)]
)
def test_the_newline_always_has_a_gradient(kind, mode, lines):
    """One for each line of a picture; zero, not missing, where none is used: DDP waits for it."""
    cfg = config("unpad")
    torch.manual_seed(0)
    vlm = model.VLM(cfg)
    vlm.set_trainable(["connector"], isolator=True)
    record = data.Scenes(kind)[0]
    one = data.load_sample(data.pieces_of(record, TOKENIZER), record.images, cfg)
    batch = data.make_batch([one], [mode], cfg, 256, 512)
    vlm(batch)[0].square().sum().backward()
    trained = {name: p.grad for name, p in vlm.named_parameters() if p.requires_grad}
    assert "newline" in trained and all(grad is not None for grad in trained.values())
    assert bool(vlm.newline.grad.any()) == bool(lines)
    if lines:
        vlm.zero_grad()
        vlm.splice(batch.student, vlm.bank(batch)).sum().backward()
        assert_close(vlm.newline.grad, torch.full((32,), float(lines)))
    vlm.set_trainable(["decoder"], isolator=False)
    assert vlm.newline.requires_grad  # else one drawn at the hand-over would stay noise


# --- Models at another resolution
def test_position_tables_are_resized_once_and_for_all(tmp_path):
    torch.manual_seed(0)
    vlm = model.VLM(config("", 32, 4, "cabstractor", tokens=4))
    grids = {"vit.embeddings.position_embedding.weight": slice(1, None)}
    grids["connector.positions"] = (0, slice(None))
    before = {name: p.detach().clone() for name, p in vlm.named_parameters()}
    model.set_resolution(vlm, "48+unpad")
    for name, p in vlm.named_parameters():
        if name in grids:
            old = before[name][grids[name]].unflatten(0, (8, 8)).permute(2, 0, 1)[None]
            new = F.interpolate(old, size=(12, 12), mode="bicubic", align_corners=False)[0].flatten(1).T
            assert_close(p.detach()[grids[name]], new)
        elif name != "newline":
            assert torch.equal(p, before[name]), name
    assert (vlm.cfg.side, vlm.vit.cfg.image_size, vlm.cfg.image.cut) == (12, 48, "unpad")
    assert vlm.newline.shape == (32,) and vlm.cfg.visual_tokens() == 4
    vlm.save_pretrained(tmp_path)
    again = model.VLM.from_pretrained(tmp_path)
    assert again.cfg == vlm.cfg and torch.equal(again.newline, vlm.newline)
    one = sample([noise(96, 60)], vlm.cfg)
    batch = data.make_batch([one], ["slow"], vlm.cfg, 256, 512)
    with torch.no_grad():
        for actual, expected in zip(vlm(batch)[:2], again(batch)[:2]):
            assert torch.equal(actual, expected)
    model.set_resolution(vlm, "48+split")
    assert vlm.newline is None and "newline" not in vlm.state_dict()
    unchanged = vlm.vit.embeddings.position_embedding
    model.set_resolution(vlm, "")
    assert vlm.cfg.image.cut == "split" and vlm.vit.embeddings.position_embedding is unchanged


@pytest.mark.parametrize("kind", [kind for kind in model.CONNECTORS if kind != "chain"])
def test_every_other_connector_runs_at_another_side(kind):
    torch.manual_seed(0)
    vlm = model.VLM(config("", 16, 4, kind, tokens=4, key_positions=True))
    tokens = vlm.cfg.visual_tokens()
    model.set_resolution(vlm, "24")
    full = all_tokens(vlm, torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8))
    assert full.shape == (2, 36 if kind in ("linear", "mlp") else tokens, 32)


# --- Runs
def test_a_run_is_cut_by_one_flag_and_stays_so(tmp_path, small_halves, capsys):
    """Chain-of-Sight: --resolution 64+split for stage 2 alone, then go on, evaluate, chat, all without it."""
    a, b = tmp_path / "a", tmp_path / "b"
    train_pretrain.main([*SMALL, *small_halves, "--out", str(a)])
    flags = [*SMALL, "--init", str(a), "--slow_share", "0.5", "--resolution", "64+split", "--out", str(b)]
    with pytest.raises(UserError, match="this chain connector sees 64 px"):
        train_sft.main([*flags, "--resolution", "128+split"])
    refused = {"+unpad": "needs a grid", "+four": "use SIDE", "split": "use SIDE", "0": "sees 64 px"}
    for wrong, words in refused.items():
        with pytest.raises(UserError, match=words):
            train_sft.main([*flags, "--resolution", wrong])
    assert not b.exists()
    scaled = [*flags[:-1], str(tmp_path / "c"), "--scale", "32to144"]  # to 128 px, which is cut after that
    with pytest.raises(UserError, match="this chain connector sees 128 px"):
        train_sft.main(scaled)
    train_sft.main([*scaled, "--resolution", "128+anyres"])
    cfg = model.VLM.from_pretrained(tmp_path / "c").cfg
    assert (cfg.vit.image_size, cfg.visual_tokens(), cfg.image.cut) == (128, 144, "anyres")
    train_sft.main(flags)
    vlm = model.VLM.from_pretrained(b)
    assert vlm.cfg.image.cut == "split" and vlm.newline is None
    full, pruned = 5 * 32, 5 * vlm.cfg.visual_tokens("pruned")
    assert [line["visual_tokens"] for line in log_of(b)] == [round((full + pruned) / 2)] * 3
    assert "160" in capsys.readouterr().out
    go_on = [*SMALL, "--steps", "4", "--resume", "auto", "--out", str(b)]
    with pytest.raises(UserError, match="--resolution cannot change"):
        train_sft.main([*go_on, "--resolution", "64"])
    train_sft.main([*go_on, "--init", str(a)])
    assert len(log_of(b)) == 4 and model.VLM.from_pretrained(b).cfg == vlm.cfg
    noise(90, 60).save(tmp_path / "a.png")
    write(tmp_path / "vqa.jsonl", [{"question_id": 0, "image": "a.png", "text": "What?", "answers": ["red"]}])
    tasks = ["--tasks", f"vqa:{tmp_path}/vqa.jsonl", "--tokens", "both", "--out", str(b / "e")]
    evaluation.main(["--model", str(b), *tasks])
    report.main([str(b / "e"), "--out", str(tmp_path / "report.html")])
    assert "160 full" in (tmp_path / "report.html").read_text()


def test_a_new_model_starts_at_the_resolution_and_recipes_carry_it(tmp_path, small_halves, add_preset):
    add_preset("mine", sft={**model.preset("tiny")["sft"], "resolution": "+anyres"})
    one = [*SMALL, "--steps", "1", "--preset", "mine"]
    mlp = [*one, *small_halves, "--connector.kind", "mlp"]
    train_pretrain.main([*mlp, "--resolution", "48", "--out", str(tmp_path / "a")])
    cfg = model.VLM.from_pretrained(tmp_path / "a").cfg
    assert (cfg.vit.image_size, cfg.image.cut, cfg.visual_tokens()) == (48, "", 36)
    train_sft.main([*one, "--init", str(tmp_path / "a"), "--out", str(tmp_path / "b")])
    assert model.VLM.from_pretrained(tmp_path / "b").cfg.image.cut == "anyres"
    train_sft.main([*one, "--init", str(tmp_path / "b"), "--resolution", "48", "--out", str(tmp_path / "c")])
    assert model.VLM.from_pretrained(tmp_path / "c").cfg.image.cut == ""  # the flag wins over the recipe


def test_padding_a_banner_costs_no_square_of_its_longer_side():
    banner = Image.new("RGB", (20_000, 10), "red")
    cfg = config("pad", 64, 8, "mlp")
    (tile,) = data.cut_picture(banner, cfg)
    middle = tile[:, 31:33].reshape(3, -1).mean(1)
    assert tile.shape == (3, 64, 64) and middle[0] > tile[:, 0].mean(1)[0] + 5  # a thin red line
