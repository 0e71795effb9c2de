"""Labels, rows, batches, sample order, pictures, Scenes."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from helpers import TOKENIZER, draw, picture, samples_of, slot_mask, small_plan
from PIL import Image, ImageOps

import data
import model

CFG = model.ModelConfig(vit=model.ViTConfig(image_size=64))


def samples(kind: str, n: int) -> list:
    return samples_of([data.Scenes(kind)[i] for i in range(n)], CFG)


@pytest.mark.parametrize("mode", ["full", "pruned", "slow"])
def test_supervised_tokens_decode_to_exactly_the_answers(mode):
    for record in (data.Scenes("chat")[i] for i in range(20)):
        batch = data.make_batch(samples_of([record], CFG), [mode], CFG, 64, 999)
        answers = [parts[0] for role, parts in record.parts if role == "assistant"]
        for rows in [batch.student] + ([batch.teacher] if batch.teacher else []):
            ids = rows.targets.tolist()
            ends = [n for n, i in enumerate(ids) if i == TOKENIZER.end]
            spans = zip([0, *(n + 1 for n in ends)], ends)
            assert [TOKENIZER.decode(ids[a:b]) for a, b in spans] == answers and ends[-1] == len(ids) - 1
            shifted = rows.ids.flatten()[rows.supervised + 1]  # a target is the token that comes next
            assert torch.equal(shifted, rows.targets)


def test_rows_hold_every_sample_once_and_slots_point_at_their_own_image():
    modes = ["full", "pruned", "slow", "pruned", "full", "slow", "pruned", "pruned"]
    batch = data.make_batch(samples("chat", 8), modes, CFG, 256, 999)
    full, pruned = CFG.visual_tokens("full"), CFG.visual_tokens("pruned")
    rows, in_full, in_pruned = batch.student, batch.full_tiles.tolist(), batch.pruned_tiles.tolist()
    assert in_full == [0, 2, 4, 5] and in_pruned == [1, 2, 3, 5, 6, 7]  # a slow sample's tiles are in both
    index = torch.full(rows.ids.shape, -1)
    index[slot_mask(rows)] = rows.visual_index
    for i, mode in enumerate(modes):
        here = rows.doc_ids == i
        assert rows.positions[here].tolist() == list(range(int(here.sum())))
        start, count = in_full.index(i) * full if i in in_full else 0, full  # the bank: full, then pruned
        if mode == "pruned":
            start, count = len(in_full) * full + in_pruned.index(i) * pruned, pruned
        slots = index[here & slot_mask(rows)].tolist()
        assert slots == list(range(start, start + count))  # one unbroken run, all tokens of image i in order
    assert (rows.ids[slot_mask(rows)] == 0).all()
    teacher = batch.teacher
    assert sorted(set(teacher.doc_ids[teacher.doc_ids >= 0].tolist())) == [0, 1]
    assert torch.equal(teacher.targets, rows.targets[batch.distill])
    assert slot_mask(teacher).sum() == 2 * pruned


def test_an_image_is_never_cut():
    pieces, lengths = [([5] * 10, True), 0, ([6] * 10, True)], [32]
    assert data.split(pieces, lengths, 52) == [pieces]
    assert data.split(pieces, lengths, 50) == [pieces[:2] + [([6] * 8, True)], [([6] * 2, True)]]
    assert data.split(pieces, lengths, 41) == [[([5] * 10, True)], [0, ([6] * 9, True)], [([6], True)]]
    once = [pieces + [([5] * 10, True)], [0, ([6] * 10, True)]]
    assert data.split(pieces * 2, lengths, 999, [1], 1) == once
    # a picture of a document stays with its text
    text, lengths = ([5] * 10, True), [8] * 3
    pieces = [0, text, 1, text, 2, text]
    assert data.split(pieces, lengths, 30, together=True) == [pieces[:2], pieces[2:4], pieces[4:]]
    assert data.split(pieces, lengths, 30)[0] == [0, text, 1, ([5] * 4, True)]
    long = [0, ([5] * 40, True)]  # fits nowhere: it begins where it is
    assert data.split(long, lengths, 30, together=True) == [[0, ([5] * 22, True)], [([5] * 18, True)]]
    # a sample whose picture is cut off has no tokens in the bank
    far, pixels = [([5] * 20, True), 0, ([6], True)], np.zeros((1, 3, 64, 64), np.uint8)
    batch = data.make_batch([(far, pixels), ([0, ([7], True)], pixels)], ["slow", "full"], CFG, 64, 40)
    assert batch.full_tiles.tolist() == [1] and batch.pruned_tiles.tolist() == [] and batch.teacher is None
    assert batch.student.visual_index.tolist() == list(range(CFG.visual_tokens("full")))


def test_rows_are_best_filled():
    assert data.best_fit([6, 6, 4, 4, 2], 10) == [[0, 2], [1, 3], [4]]
    assert data.best_fit([5, 4, 3, 1], 8) == [[0, 2], [1, 3]]
    assert data.best_fit([3, 3, 3], 9, [2, 2, 2], 4) == [[0, 1], [2]]
    assert data.best_fit([1] * 5, 9, most=2) == [[0, 1], [2, 3], [4]]
    rng = random.Random(0)
    lengths = [rng.randint(20, 200) for _ in range(300)]
    rows = data.best_fit(lengths, 256)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 256
    assert sum(lengths) / (256 * len(rows)) > 0.94
    rng = random.Random(0)
    for samples, visual, limit in ((16, 32, 256), (32, 80, 256), (64, 32, 2048)):
        lengths = [visual + rng.randint(5, 60) for _ in range(samples)]
        width = data.row_width(lengths, limit)
        assert max(lengths) <= width <= limit and width % 16 == 0
        assert sum(lengths) / (width * len(data.best_fit(lengths, width))) > 0.9
    assert data.row_width([55] * 16, 256) == 112  # two a row leave 2 of 112, four leave 4 of 224: the smaller
    assert data.row_width([279] * 3, 256) == 288  # a long sample widens all rows
    assert data.row_width([7], 1) == 16


def test_order_is_a_permutation_an_epoch_and_follows_the_weights():
    def drawn(sizes: list, weights: list, seed: int, n: int, first: int = 0) -> list[tuple[int, int]]:
        return [*itertools.islice(data.sample_order(sizes, weights, seed, first), n)]

    picks = drawn([50, 1000], [0.3, 0.7], 3, 20_000)
    first = [index for source, index in picks if source == 0][:100]
    assert sorted(first[:50]) == sorted(first[50:]) == list(range(50)) and first[:50] != first[50:]
    for start in (1, 4095, 4096, 17_000):  # a pure function of n: nothing needs to have come before
        assert drawn([50, 1000], [0.3, 0.7], 3, 3000, start) == picks[start : start + 3000]

    def kinds_of(seed: int) -> bytes:
        return bytes(source for source, _ in drawn([1000] * 3, shares, seed, 100_000))

    shares = [0.45, 0.45, 0.1]  # MM1's
    kinds = kinds_of(0)
    for kind, share in enumerate(shares):  # within three standard deviations
        assert abs(kinds.count(kind) / 1e5 - share) < 3 * (share * (1 - share) / 1e5) ** 0.5
    assert kinds == kinds_of(0) and kinds_of(1) != kinds
    assert kinds[:9].hex() == "010000000102010101"  # of NumPy's generator: the same on every machine


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_ranks_and_micro_steps_do_not_change_the_samples(workers):
    def plan(**changes) -> data.Plan:
        return small_plan(
            [(data.Scenes("chat"), 1.0)], range(3), CFG, batch_size=8, row_length=128, **changes
        )

    def sums(batches: list) -> list:
        return sorted(pixels.sum().item() for batch in batches for pixels in batch.pixels.long())

    one = draw(plan())
    loader = torch.utils.data.DataLoader(data.Stream(plan()), None, sampler=plan(), num_workers=workers)
    for a, b in zip(one, loader, strict=True):
        assert torch.equal(a.student.ids, b.student.ids) and torch.equal(a.pixels, b.pixels)
    assert sums(one) == sums(draw(plan(rank=0, world=2)) + draw(plan(rank=1, world=2)))
    assert sums(one) == sums(draw(plan(micro_steps=4)))


def test_scenes():
    def pairs(split: str) -> set:
        return {(t.colour, t.shape) for i in range(1500) for t in data.make_scene(split, i).things}

    assert pairs("train") == set(data.PAIRS) - data.HELD_OUT
    assert data.HELD_OUT <= pairs("test")
    train = {data.make_scene("train", i) for i in range(500)}
    assert not train & {data.make_scene("test", i) for i in range(500)}
    for kind in ("caption", "chat", "interleaved", "text"):
        for i in range(200):
            record = data.Scenes(kind)[i]
            text = json.dumps(record.parts)
            assert not any(f"{colour} {shape}" in text for colour, shape in data.HELD_OUT), text
    yes, asked = {"relation": 0, "exists": 0}, {"relation": 0, "exists": 0}
    for i in range(2000):
        scene = data.make_scene("test", i)
        names = [t.name for t in scene.things]
        for kind in asked:
            question = data.ask(scene, kind, random.Random(i), "test")
            if question:
                asked[kind] += 1
                yes[kind] += question.answer == "yes"
        _, text, answer, _ = data.ask(scene, "exists", random.Random(i), "test")
        assert (answer == "yes") == (text.removeprefix("is there any ").removesuffix("?") in names)
        counted = data.ask(scene, "count", random.Random(i), "test")
        if counted.question == "how many shapes are any?":
            assert int(counted.answer) == len(names)
    for kind, n in asked.items():
        assert abs(yes[kind] / n - 0.5) < 3 * 0.5 / n**0.5, kind


# --- Pictures
def test_pictures_with_palette_and_alpha_become_rgb_and_bombs_and_halves_are_refused(tmp_path, monkeypatch):
    Image.new("RGBA", (10, 6), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert data.open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)  # alpha lies on white
    Image.new("RGB", (10, 6), (0, 0, 255)).quantize().save(tmp_path / "palette.png")
    assert data.open_image(tmp_path / "palette.png").getpixel((3, 3)) == (0, 0, 255)
    assert data.to_pixels(data.open_image(tmp_path / "clear.png"), 64).shape == (3, 64, 64)
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    grey = np.asarray(data.open_image(tmp_path / "deep.png"))[0, :, 0].astype(int)
    assert np.abs(grey - np.arange(256)).max() <= 1
    jpeg = picture("red", "JPEG", (40, 20))
    for broken in (jpeg[: len(jpeg) * 2 // 3], b"GIF", b"", picture("red", "PNG", (400, 400))[:-40]):
        with pytest.raises(data.BadRecord, match="x: image of .* bytes does not decode"):
            data.open_image(broken, "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 399)  # Pillow refuses more than twice as many
    with pytest.raises(data.BadRecord, match="x: image of .* does not decode .*decompression bomb"):
        data.open_image(jpeg, "x")


def test_pictures_are_turned_as_pillow_turns_them(tmp_path):
    wide = Image.new("RGB", (40, 20), "blue")
    wide.paste("red", (0, 0, 20, 20))
    for orientation in range(9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        wide.save(tmp_path / "b.png", exif=exif)
        with Image.open(tmp_path / "b.png") as file:
            expected = ImageOps.exif_transpose(file).convert("RGB")
        assert data.picture_size(tmp_path / "b.png") == expected.size
        assert np.array_equal(data.open_image(tmp_path / "b.png"), expected)
    for value in (9, 255):
        exif[0x0112] = value
        wide.save(tmp_path / "c.jpg", exif=exif)
        assert data.picture_size(tmp_path / "c.jpg") == data.open_image(tmp_path / "c.jpg").size == (40, 20)
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    wide.save(tmp_path / "a.jpg", exif=exif, quality=95)
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "x.bin").write_bytes(b"---" + content + b"--")
    for image in (tmp_path / "a.jpg", content, data.FileSlice(tmp_path / "x.bin", 3, len(content))):
        upright = data.open_image(image)
        assert upright.size == data.picture_size(image) == (20, 40)
        assert upright.getpixel((10, 5))[0] > 200 and upright.getpixel((10, 35))[2] > 200
