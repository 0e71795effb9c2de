"""Labels, rows, sample order, pictures, Scenes, LLaVA's JSON."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model

TOKENIZER = data.Tokenizer.from_pretrained(model.ASSETS / "scenes.tiktoken")
CFG = model.ModelConfig(vit=model.ViTConfig(image_size=64))


def samples(kind: str, n: int) -> list:
    records = [data.Scenes(kind)[i] for i in range(n)]
    return [(data.pieces_of(r, TOKENIZER), data.load_images(r.images, CFG)) for r in records]


def test_tokenizer_round_trip_and_control_tokens_in_text_stay_text():
    for text in (
        "red ring northwest.",
        "Grüße <|end|> \U0001f600\n\n  x",
        "KTZ 12 345",
        "<|user|>",
        "",
        " led",
    ):
        ids = TOKENIZER.encode(text)
        assert TOKENIZER.decode(ids) == text
        assert all(i < len(TOKENIZER.ranks) for i in ids)
    assert TOKENIZER.control("<|user|>") == [len(TOKENIZER.ranks) + 1]


@pytest.mark.parametrize("mode", ["full", "fast", "slow"])
def test_supervised_tokens_decode_to_exactly_the_answers(mode):
    for i in range(20):
        record = data.Scenes("chat")[i]
        batch = data.make_batch(
            [(data.pieces_of(record, TOKENIZER), data.load_images(record.images, CFG))], [mode], CFG, 64, 999
        )
        answers = [parts[0] for role, parts in record.parts if role == "assistant"]
        for rows in [batch.student] + ([batch.teacher] if batch.teacher else []):
            ids = rows.targets.tolist()
            assert ids.count(TOKENIZER.end) == len(answers)
            decoded = TOKENIZER.bpe.decode(ids).split("<|end|>")[:-1]
            assert decoded == [" " + answer for answer in answers]
            shifted = rows.ids.flatten()[rows.supervised + 1]  # a target is the token that comes next
            assert torch.equal(shifted, rows.targets)


def test_rows_hold_every_sample_once_and_slots_point_at_their_own_image():
    modes = ["full", "fast", "slow", "fast", "full", "slow", "fast", "fast"]
    batch = data.make_batch(samples("chat", 8), modes, CFG, 256, 999)
    full, pruned = CFG.visual_tokens("full"), CFG.visual_tokens("pruned")
    rows, whole, few = batch.student, batch.full_tiles.tolist(), batch.pruned_tiles.tolist()
    assert whole == [0, 2, 4, 5] and few == [1, 2, 3, 5, 6, 7]  # a slow sample's views are in both
    index = torch.full(rows.ids.shape, -1)
    index[rows.slot_mask] = rows.visual_index
    for i, mode in enumerate(modes):
        here = rows.doc_ids == i
        assert rows.positions[here].tolist() == list(range(int(here.sum())))
        mine = index[here & rows.slot_mask].tolist()
        start, count = whole.index(i) * full if i in whole else 0, full  # the bank: whole ones, then pruned
        if mode == "fast":
            start, count = len(whole) * full + few.index(i) * pruned, pruned
        assert mine == list(range(start, start + count))  # one unbroken run, all tokens of image i in order
    assert (rows.ids[rows.slot_mask] == 0).all()
    slow = batch.teacher
    assert sorted(set(slow.doc_ids[slow.doc_ids >= 0].tolist())) == [0, 1]
    assert torch.equal(slow.targets, rows.targets[batch.distill])
    assert slow.slot_mask.sum() == 2 * pruned


def test_an_image_is_never_cut():
    pieces, slots = [([5] * 10, True), 0, ([6] * 10, True)], [data.np.arange(32)]
    assert data.split(pieces, slots, 52) == [pieces]
    assert data.split(pieces, slots, 50) == [pieces[:2] + [([6] * 8, True)], [([6] * 2, True)]]
    assert data.split(pieces, slots, 41) == [[([5] * 10, True)], [0, ([6] * 9, True)], [([6], True)]]
    once = [pieces + [([5] * 10, True)], [0, ([6] * 10, True)]]
    assert data.split(pieces * 2, slots, 999, [1], 1) == once


def test_best_fit_never_overfills_and_wastes_little():
    rng = random.Random(0)
    lengths = [rng.randint(20, 200) for _ in range(300)]
    rows = data.best_fit(lengths, 256)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 256
    assert sum(lengths) / (256 * len(rows)) > 0.94


def test_rows_are_as_wide_as_wastes_least():
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
    order = data.SampleOrder([50, 1000], [0.3, 0.7], seed=3)
    picks = [order[n] for n in range(20_000)]
    first = [index for source, index in picks if source == 0][:100]
    assert sorted(first[:50]) == sorted(first[50:]) == list(range(50)) and first[:50] != first[50:]
    share = np.mean([source == 0 for source, _ in picks])
    assert abs(share - 0.3) < 3 * (0.3 * 0.7 / 20_000) ** 0.5
    fresh = data.SampleOrder([50, 1000], [0.3, 0.7], seed=3)
    assert fresh[17_000] == picks[17_000]  # a pure function of n: nothing needs to have come before
    other = data.SampleOrder([50, 1000], [0.3, 0.7], 4)
    assert [other[n] for n in range(500)] != picks[:500]


def batches(rank: int = 0, world: int = 1, micro_steps: int = 1, workers: int = 0) -> list[data.Batch]:
    sources, mode, steps = [(data.Scenes("chat"), 1.0)], (lambda n: "full"), range(3)
    plan = data.Plan(sources, TOKENIZER, CFG, mode, 0, steps, 0, 8, micro_steps, rank, world, 128)
    return [*torch.utils.data.DataLoader(data.Stream(plan), None, sampler=plan, num_workers=workers)]


def test_workers_ranks_and_micro_steps_do_not_change_the_samples():
    def seen(batches) -> list:
        return sorted(p.sum().item() for b in batches for p in b.pixels.long())

    whole = batches()
    for a, b in zip(whole, batches(workers=2), strict=True):
        assert torch.equal(a.student.ids, b.student.ids) and torch.equal(a.pixels, b.pixels)
    assert seen(whole) == seen(batches(0, 2) + batches(1, 2))
    assert seen(whole) == seen(batches(micro_steps=4))


def test_scenes_splits_are_disjoint_and_held_out_pairs_only_in_tests():
    def pairs(split: str) -> set:
        return {(t.colour, t.shape) for i in range(1500) for t in data.make_scene(split, i).things}

    assert pairs("train") == set(data.PAIRS) - data.HELD_OUT
    assert data.HELD_OUT <= pairs("test")
    train = {data.make_scene("train", i) for i in range(500)}
    assert not train & {data.make_scene("test", i) for i in range(500)}
    for kind in ("caption", "chat", "interleaved", "text"):
        for i in range(200):
            record = data.Scenes(kind)[i]
            told = json.dumps(record.parts)
            assert not any(f"{colour} {shape}" in told for colour, shape in data.HELD_OUT), told


def test_yes_and_no_are_balanced_and_answers_are_true():
    yes = {"relation": 0, "exists": 0}
    asked = {"relation": 0, "exists": 0}
    for i in range(2000):
        scene = data.make_scene("test", i)
        names = [t.name for t in scene.things]
        for kind in asked:
            question = data.ask(scene, kind, random.Random(i), "test")
            if question:
                asked[kind] += 1
                yes[kind] += question[2] == "yes"
        _, text, answer, _ = data.ask(scene, "exists", random.Random(i), "test")
        assert (answer == "yes") == (text.removeprefix("is there any ").removesuffix("?") in names)
        counted = data.ask(scene, "count", random.Random(i), "test")
        if counted[1] == "how many shapes are any?":
            assert int(counted[2]) == len(names)
    for kind, n in asked.items():
        assert abs(yes[kind] / n - 0.5) < 3 * 0.5 / n**0.5, kind


def test_pictures_with_palette_alpha_and_exif_become_rgb(tmp_path):
    red = Image.new("RGBA", (10, 6), (255, 0, 0, 0))
    red.save(tmp_path / "clear.png")
    assert data.open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)  # alpha lies on white
    Image.new("RGB", (10, 6), (0, 0, 255)).quantize().save(tmp_path / "palette.png")
    assert data.open_image(tmp_path / "palette.png").getpixel((3, 3)) == (0, 0, 255)
    turned = Image.Exif()
    turned[274] = 6  # rotate by 90 degrees to view
    Image.new("RGB", (10, 6)).save(tmp_path / "turned.jpg", exif=turned)
    assert data.open_image(tmp_path / "turned.jpg").size == (6, 10)
    assert data.to_pixels(data.open_image(tmp_path / "clear.png"), 64).shape == (3, 64, 64)


def write_llava(folder, records: list) -> str:
    (folder / "train.json").write_text(json.dumps(records))
    return str(folder / "train.json")


def turns(*values: str) -> list[dict]:
    return [{"from": "human" if n % 2 == 0 else "gpt", "value": value} for n, value in enumerate(values)]


def test_llava_json_turns_images_and_labels(tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    first = turns("What?\n<image>", "Red.", "And <image> now?", "Same.")
    records = [
        {"id": 1, "image": "a.png", "conversations": first[:2] + turns("Sure?", "Yes.")},
        {"id": 2, "conversations": turns("Say <image> or <|end|>.", "<image>")},
        {"id": 3, "image": ["a.png", "a.png"], "conversations": turns("<image> vs <image>?", "Equal.")},
    ]
    source = data.open_sources(write_llava(tmp_path, records), "sft")[0][0]
    assert source[0].parts[0] == ("user", [0, "What?"])  # the image moves to the front of its turn
    assert source[1].parts[0] == ("user", ["Say <image> or <|end|>."]) and source[1].images == []
    assert source[2].parts[0] == ("user", [0, " vs ", 1, "?"])
    laid = data.lay_out(data.pieces_of(source[1], TOKENIZER), [])
    assert TOKENIZER.decode(laid.targets[laid.targets >= 0].tolist()) == "<image>"
    assert laid.images == 0 and (laid.slot == -1).all()


@pytest.mark.parametrize(
    "record, words",
    [
        ({"image": "a.png", "conversations": turns("What?", "Red.")}, ["record 0", "1 images but 0 <image>"]),
        ({"image": "a.png", "conversations": turns("<image><image>", "x")}, ["1 images but 2 <image>"]),
        ({"conversations": [{"from": "robot", "value": "x"}]}, ["record 0", "'from'", "robot"]),
        ({"image": None, "conversations": None}, ["record 0", "list of 'conversations'"]),
        ({"conversations": turns("Only a question")}, ["must start with a human turn and an answer"]),
    ],
)
def test_broken_llava_records_are_named(tmp_path, record, words):
    source = data.FileSource(Path(write_llava(tmp_path, [record])), "chat")
    with pytest.raises(model.UserError) as error:
        source[0]
    assert all(word in str(error.value) for word in [*words, "train.json"])


def test_mixture_file(tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    write_llava(tmp_path, [{"image": "a.png", "conversations": turns("<image>\nDescribe.", "A red square.")}])
    entries = [
        {"kind": "caption", "path": "train.json", "weight": 3},
        {"kind": "chat", "path": "train.json", "weight": 1},
    ]
    (tmp_path / "mix.json").write_text(json.dumps(entries))
    (caption, three), (chat, one) = data.open_sources(str(tmp_path / "mix.json"), "pretrain")
    assert (three, one) == (3, 1.0) and caption[0].parts == [0, "A red square."]
    assert chat[0].parts[0] == ("user", [0, "Describe."])
