"""Broken records and pictures: skipped, counted, the same for any workers and ranks; runs go on."""

import json
from pathlib import Path

import helpers
import pytest
import torch
from helpers import TOKENIZER, broken_set, chat, draw, half_jpeg, log_of, picture, small_plan, turns, write
from torch.utils.data import DataLoader

import data
import model
import train_sft
from model import UserError


def plan_of(path: Path, batch_size: int = 0, steps: range = range(6), cut: str = "", **fields) -> data.Plan:
    """Slow and pruned samples of a file, eight rows a step."""
    cfg = helpers.small_config()
    cfg.image.cut = cut
    fields = {"rows": 8, "choose_mode": lambda n: "slow" if n % 4 == 0 else "pruned"} | fields
    return small_plan(path, steps, cfg, batch_size=batch_size, **fields)


def stream(plan: data.Plan, workers: int) -> list:
    planner = DataLoader(plan, None, num_workers=min(workers, 1))
    return [*DataLoader(data.Stream(plan), None, sampler=planner, num_workers=workers)]


@pytest.mark.parametrize("batch_size", [0, 16])
def test_broken_records_are_skipped_counted_and_the_same_with_any_workers(tmp_path, batch_size):
    path = broken_set(tmp_path)
    one, four = (stream(plan_of(path, batch_size), workers) for workers in (1, 4))
    assert len(one) == 6 and all(isinstance(batch, data.Batch) for batch in one)
    for a, b in zip(one, four, strict=True):
        assert torch.equal(a.student.ids, b.student.ids) and torch.equal(a.pixels, b.pixels)
        assert torch.equal(a.student.targets, b.student.targets) and a.plan.skipped == b.plan.skipped
    assert {why for batch in one for why, _ in batch.plan.skipped} == {
        "image missing", "image broken", "malformed"
    }  # fmt: skip
    messages = [message for batch in one for _, message in batch.plan.skipped]
    assert any("gone/" in message and "train.json record" in message for message in messages)
    texts = "".join(TOKENIZER.decode(batch.student.targets.tolist()) for batch in one)
    names = [int(name) for name in texts.replace(".", " ").split() if name.isdecimal()]
    assert names and not {n % 20 for n in names} & {3, 7, 11}  # nothing is learned from broken ones
    again = draw(plan_of(path, batch_size, range(3, 6), cursor=one[2].plan.cursor))
    assert all(torch.equal(a.student.ids, b.student.ids) for a, b in zip(one[3:], again, strict=True))


def test_ranks_share_what_one_process_reads_although_records_are_broken(tmp_path):
    path = broken_set(tmp_path)
    halves = [draw(plan_of(path, rank=rank, world=2)) for rank in range(2)]
    for batch, first, second in zip(draw(plan_of(path)), *halves, strict=True):
        assert torch.equal(batch.student.ids, torch.cat([first.student.ids, second.student.ids]))
        skipped = first.plan.skipped + second.plan.skipped
        assert sorted(skipped) == sorted(batch.plan.skipped)  # each is told by one rank alone


def test_a_broken_picture_keeps_its_room_and_a_source_of_broken_records_stops_the_run(tmp_path):
    write(tmp_path / "half.jpg", half_jpeg())
    path = write(tmp_path / "x.json", [chat("half.jpg")])
    for cut in ("", "split"):
        (batch,) = draw(plan_of(path, 1, range(1), cut))
        assert len(batch.student.targets) == 0 and len(batch.pixels) == 0
        assert batch.plan.skipped[0][0] == "image broken"
    write(path, [chat("half.jpg", answer="Half."), chat(None, "Q?", "Text.")])
    plan = plan_of(path, 0, range(1))
    (planned,), (batch,) = plan, draw(plan)
    taken = [(batch.student.doc_ids == n).sum().item() for n in range(batch.student.doc_ids.max() + 1)]
    assert taken == [chunk.length for row in planned.rows for chunk in row]  # the room that was planned
    assert TOKENIZER.decode(batch.student.targets.tolist()).split() == ["Text."] * taken.count(min(taken))
    write(tmp_path / "x.json", [chat("gone.png")] * 3)
    for batch_size in (0, 4):
        (error,) = draw(plan_of(tmp_path / "x.json", batch_size, range(1)))
        assert isinstance(error, UserError) and "100 records of x one after the other cannot" in str(error)
        assert "gone.png does not exist" in str(error) and "tools/check.py" in str(error)


RUN = "--dtype float32 --log_every 1 --workers 0".split()


def test_runs_go_on_over_broken_records_and_tell_them(tmp_path, small_halves, capsys):
    path = broken_set(tmp_path)
    flags = [*small_halves, *RUN, "--data", str(path), "--steps", "3", "--train", "connector", "--rows", "4"]
    train_sft.main([*flags, "--workers", "1", "--out", str(tmp_path / "run")])
    lines, out = log_of(tmp_path / "run"), capsys.readouterr().out
    assert lines[-1]["skipped"] > 10 and "image missing: " in out and "gone/" in out
    assert out.count("skipped, ") == 10 and " image missing" in out
    assert "tools/check.py " + str(path) in out and all(line["loss"] > 0 for line in lines if "loss" in line)
    (tmp_path / "images").rename(tmp_path / "away")
    write(path, [record for record in json.loads(path.read_text()) if "image" in record])
    with pytest.raises(UserError, match="does not exist"):  # a wrong folder shows before anything is written
        train_sft.main([*flags, "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_a_step_whose_pictures_are_all_broken_changes_nothing(tmp_path, small_halves):
    write(tmp_path / "half.jpg", half_jpeg())
    path = write(tmp_path / "x.json", [chat("half.jpg")])
    flags = [*small_halves, *RUN, "--data", str(path), "--batch_size", "2", "--slow_share", "0.5"]
    for steps, name in (("2", "two"), ("1", "one")):
        train_sft.main([*flags, "--out", str(tmp_path / name), "--steps", steps])
    lines = log_of(tmp_path / "two")
    assert not any("loss" in line for line in lines) and [line["skipped"] for line in lines] == [2, 4]
    first, second = (model.open_weights(model.find_step(tmp_path / name)) for name in ("one", "two"))
    assert all(torch.equal(read(), second[name]()) for name, read in first.items())


def test_a_document_goes_without_its_missing_and_broken_pictures(tmp_path):
    write(tmp_path / "a.png", picture("red"))
    write(tmp_path / "page.jpg", b"<html>")
    images = [None, "gone.png", "a.png", "page.jpg", None]
    path = write(tmp_path / "x.jsonl", [{"texts": ["One.", None, None, None, "Two."], "images": images}])
    plan = small_plan(path, range(1), stage="pretrain", rows=2)
    (sample,) = plan.read(plan.sources[0][0], 0, "full", 0, [])
    texts = [piece if isinstance(piece, int) else TOKENIZER.decode(piece[0]) for piece in sample.pieces]
    assert texts[:-1] == ["One.", 0, "Two."] and sample.images == [tmp_path / "a.png"]
    (planned,) = plan
    assert planned.skipped[0][0] == "image missing, its document kept" and "gone.png" in planned.skipped[0][1]
    assert isinstance(data.Stream(plan)[planned], data.Batch)


def test_a_picture_that_vanishes_after_the_plan_leaves_its_room_empty(tmp_path):
    records = []
    for n in range(20):
        write(tmp_path / f"{n}.png", picture("red"))
        records.append(chat(f"{n}.png", "<image>\nWhat?", f"Number {n}."))
    plan = small_plan(write(tmp_path / "x.json", records), range(4), rows=2)
    plans = [*plan]
    for n in range(0, 20, 2):
        (tmp_path / f"{n}.png").unlink()
    for planned in plans:
        batch, chunks = data.Stream(plan)[planned], [chunk for row in planned.rows for chunk in row]
        assert (batch.student.doc_ids >= 0).sum() == sum(chunk.length for chunk in chunks)
        gone = sum(int(chunk.images[0].stem) % 2 == 0 for chunk in chunks)
        assert [why for why, _ in batch.plan.skipped] == ["image missing"] * gone
        answers = TOKENIZER.decode(batch.student.targets.tolist())
        assert not {f"{n}." for n in range(0, 20, 2)} & set(answers.split())


def test_validation_on_broken_data(tmp_path, small_halves, capsys):
    write(tmp_path / "half.jpg", half_jpeg())
    write(tmp_path / "a.png", picture("red"))
    system = {"conversations": [{"from": "system", "value": "Be brief."}, *turns("Which?", "That.")]}
    good = write(tmp_path / "good.json", [chat("half.jpg"), chat("a.png"), system])
    bad = write(tmp_path / "bad.json", [chat("half.jpg")])
    flags = [*small_halves, *RUN, *"--batch_size 2 --eval_every 1 --steps 1".split(), "--data", str(good)]
    train_sft.main([*flags, "--out", str(tmp_path / "a")])
    out = capsys.readouterr().out
    assert "validation loss" in out
    with pytest.raises(UserError, match="validation: no sample of kind chat in .*bad.json can be used"):
        train_sft.main([*flags, "--val_data", str(bad), "--out", str(tmp_path / "b")])


@pytest.mark.slow
def test_memory_of_workers_stays_flat_over_an_epoch(tmp_path):
    """Of 20,000 records, of which every fifth is broken or has no picture."""
    plan = small_plan(broken_set(tmp_path, 20_000), range(100), choose_mode=lambda n: "pruned", rows=64)
    planner = DataLoader(plan, None, num_workers=1)
    batches = iter(DataLoader(data.Stream(plan), None, sampler=planner, num_workers=2))

    def held() -> list[int]:
        """Anonymous kB of both workers."""
        texts = [Path(f"/proc/{worker.pid}/status").read_text() for worker in batches._workers]
        return [int(text.partition("RssAnon:")[2].split()[0]) for text in texts]

    samples = 0
    for step, batch in enumerate(batches):
        samples += batch.samples
        if step == 20:
            before = held()
        if step == 85:  # later batches come from workers that may have ended
            after, epoch = held(), samples
    print(f"workers held {before} and {after} kB, {epoch} samples")
    assert epoch > 17_000 and all(b < a + 8_000 for a, b in zip(before, after))


# --- What public bug reports tell of
def test_a_damaged_exif_block_costs_no_picture():
    broken = helpers.picture("red", "WEBP", exif=b"Exif\0\0\0\x08\0\x02\x01\x12\0\x03")
    assert helpers.colour_of(broken)[0] > 240 and data.picture_size(broken) == (20, 20)


def test_media_that_is_not_read_is_named_and_never_trained_on_as_text(tmp_path):
    video = {"video": "a.mp4", **helpers.chat(None, "<video>\nWhat?", "A cat.")}
    records = [helpers.chat(None, "What?", "Red."), video]
    source = data.FileSource(helpers.write(tmp_path / "a.json", records))
    with pytest.raises(data.BadRecord, match="record 1: has video, which is not read"):
        source[1]
    for suffix in ("jp2", "img"):
        tar = helpers.write_tar(tmp_path / f"{suffix}.tar", {f"0.{suffix}": b"x", "0.txt": b"A cat."})
        with pytest.raises(data.BadRecord, match=f"0.{suffix} beside its text is no picture that is read"):
            data.FileSource(tar)


def test_a_text_column_of_img2dataset_makes_no_text(tmp_path):
    members = {
        "0.jpg": helpers.picture("red", "JPEG"),
        "0.txt": b"A cat.",
        "0.json": b'{"text": "alt", "n": 1}',
    }
    record = data.FileSource(helpers.write_tar(tmp_path / "a.tar", members))[0]
    assert (record.kind, record.parts, len(record.images)) == ("caption", [0, "A cat."], 1)


def test_too_many_pictures_are_named_as_such(tmp_path):
    images = [f"{n}.png" for n in range(20)]
    for name in images:
        helpers.write(tmp_path / name, helpers.picture())
    path = helpers.write(tmp_path / "a.json", [helpers.chat(images, "<image>" * 20 + "What?")])
    (error,) = helpers.draw(helpers.small_plan(path, rows=1, row_length=4096, row_limit=4096))
    assert "nor its 20 tiles within --row_images 16" in str(error)
