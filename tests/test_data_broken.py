"""Real data: lists, tars, parquet and tables by offset; broken records; pictures; check and convert."""

import base64
import contextlib
import csv
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import test_training
import torch
from PIL import Image, ImageOps

import data
import model
from model import UserError

TOKENIZER = test_training.TOKENIZER
ROOT = Path(__file__).parent.parent


def turns(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


def chat(image: str | list | None, question: str = "<image>\nWhat?", answer: str = "Red.") -> dict:
    return ({"image": image} if image else {}) | {"conversations": turns(question, answer)}


def picture(colour: str = "red", form: str = "PNG", size: tuple[int, int] = (20, 20), **more) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, form, **more)
    return buffer.getvalue()


def half_jpeg() -> bytes:
    """Its header is whole, half of its pixels are missing."""
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def colour_of(image) -> tuple[int, int, int]:
    return data.open_image(image).getpixel((5, 5))


# --- Lists of objects
def random_value(rng: random.Random, depth: int = 0):
    """Anything JSON can hold, with brackets, quotes and backslashes in its texts."""
    kind = rng.randrange(4 if depth > 3 else 6)
    if kind < 3:
        return "".join(rng.choice('a"\\{}[],:/ \n\té😀') for _ in range(rng.randrange(12)))
    if kind == 3:
        return rng.choice([None, True, -1.5e-9, 7])
    if kind == 4:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(random_value(rng, 9)): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}


@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_offsets_of_a_list_are_those_of_the_json_module(tmp_path, style):
    rng = random.Random(0)
    records = [{"n": n, "x": random_value(rng)} for n in range(300)]
    text = json.dumps(records, **style)
    for extra in ("", "\ufeff"):
        path = write(tmp_path / f"{len(extra)}.json", (extra + " \n" + text + "\n ").encode())
        table = data.Table(path)
        order = rng.sample(range(300), 300)
        assert len(table) == 300 and [table.raw(i)[0] for i in order] == [records[i] for i in order]
        assert table.raw(299)[1] == f"{path} record 299"


@pytest.mark.parametrize(
    "content, words",
    [
        ('[{"a": 1},\n {"a": "x}]', "line 2 column 8: not JSON (Unterminated string"),
        ('[{"a": 1},\n\n  {"a": 2} {"a": 3}]', "line 3 column 12: expected a .json file to be a list"),
        ('[{"a": 1},', "line 1 column 11: not JSON (Expecting value)"),
        ('[{"a": 1}', "line 1 column 10: expected a .json file to be a list"),
        ('{"a": 1}', "line 1 column 1: expected a .json file to be a list"),
        ("", "is empty"),
    ],
)
def test_a_broken_list_is_named_by_line_and_column(tmp_path, content, words):
    with pytest.raises(UserError) as error:
        data.Table(write(tmp_path / "x.json", content.encode()))
    assert words in str(error.value) and "x.json" in str(error.value)


def test_a_broken_record_of_a_list_is_named_and_the_others_are_read(tmp_path):
    table = data.Table(write(tmp_path / "x.json", b'[{"a": 1},\n{"a" 2},\n{"a": 3}]'))
    with pytest.raises(data.BadRecord, match="x.json line 2 column 6: not JSON .Expecting ':' delimiter"):
        table.raw(1)
    assert len(table) == 3 and table.raw(2)[0] == {"a": 3}


def test_a_list_costs_offsets_and_not_objects(tmp_path):
    """40 MB of records: reading all of them keeps less than 1 MB."""
    record = chat("a.png", "<image>\n" + "what is this? " * 70)
    path = write(tmp_path / "x.json", json.dumps([record] * 40_000).encode())
    assert path.stat().st_size > 40e6
    tracemalloc.start()
    source = data.FileSource(path, "chat")
    for i in range(0, 40_000, 40):
        source[i]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 40_000 and held < 1e6


# --- Tars
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_captions_are_read_in_any_order(tmp_path, form):
    deep = "" if form == tarfile.USTAR_FORMAT else "long/" * 60  # needs GNU's or PAX's extra header
    colours = ["red", "green", "blue", "white"]
    for shard in range(2):
        members = {}
        for n in range(2):
            k = shard * 2 + n
            suffix, kind = (("jpg", "JPEG"), ("webp", "WEBP"))[n]
            members[f"{deep}{k:09d}.{suffix}"] = picture(colours[k], kind)
            members[f"{deep}{k:09d}.txt"] = f" a {colours[k]} picture\n".encode()
            members[f"{deep}{k:09d}.json"] = json.dumps({"caption": "other", "url": "http://x"}).encode()
        write_tar(tmp_path / f"{shard:05d}.tar", members, form)
    write(tmp_path / "00000.parquet", b"img2dataset puts these beside")
    for spec in (tmp_path, tmp_path / "0*.tar"):
        source = data.open_file(spec)
        assert source.kind == "caption" and len(source) == 4
        for k in (2, 0, 3, 1):
            assert source[k].parts == [0, f"a {colours[k]} picture"]
            expected = Image.new("RGB", (1, 1), colours[k]).getpixel((0, 0))
            assert np.abs(np.subtract(colour_of(source[k].images[0]), expected)).max() < 8
    assert (tmp_path / "00001.tar.index.npy").is_file()


def test_the_index_of_a_tar_is_written_once_and_anew_if_the_tar_changes(tmp_path, monkeypatch):
    path = write_tar(
        tmp_path / "x.tar", {"a.jpg": picture(), "a.txt": b"one", "b.c.jpg": picture(), "b.txt": b"two"}
    )
    assert [data.open_file(path)[i].parts[1] for i in range(2)] == ["one", "two"]
    data.index_file.cache_clear()
    scanned = []
    opened = tarfile.open

    def watch(name=None, *args, **kwargs):
        scanned.append(name)
        return opened(name, *args, **kwargs)

    monkeypatch.setattr(tarfile, "open", watch)
    assert len(data.Table(path)) == 2 and scanned == []
    os.remove(path)
    write_tar(path, {"z.jpg": picture(), "z.txt": b"new"})
    os.utime(path, ns=(1, 1))
    assert len(data.Table(path)) == 1 and data.open_file(path)[0].parts[1] == "new"
    write(tmp_path / "x.tar.index.npy", b"not an index")
    data.index_file.cache_clear()
    assert len(data.Table(path)) == 1


def test_tars_hold_chats_documents_and_text_too(tmp_path):
    document = {"texts": ["Before.", None, "After.", None], "images": [None, "x", None, "y"]}
    members = {
        "0.json": json.dumps(chat("any/where.jpg", "<image><image> Same?", "No.")).encode(),
        "0.0.png": picture("red"),
        "0.1.png": picture("blue"),
    }
    source = data.open_file(write_tar(tmp_path / "chat.tar", members))
    assert source[0].parts[0] == ("user", [0, 1, " Same?"])
    assert [colour_of(image) for image in source[0].images] == [(255, 0, 0), (0, 0, 255)]
    members["0.json"] = json.dumps(document).encode()
    source = data.open_file(write_tar(tmp_path / "documents.tar", members))
    assert source.kind == "interleaved" and source[0].parts == ["Before.", 0, "After.", 1]
    source = data.open_file(write_tar(tmp_path / "text.tar", {"0.txt": b"words", "1.txt": b"more"}))
    assert source.kind == "text" and source[1].parts == ["more"]


def test_a_compressed_or_broken_tar_is_named(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match="x.tar is damaged or no plain tar .*unpack it if it is compressed"):
        data.Table(tmp_path / "x.tar")
    path = write_tar(tmp_path / "y.tar", {"a.json": b"{", "b.json": json.dumps(chat(None, "Q?")).encode()})
    with pytest.raises(data.BadRecord, match="y.tar record 0: does not read"):
        data.FileSource(path)[0]
    assert data.FileSource(path)[1].parts[1] == ("assistant", ["Red."])


# --- Tables
def test_a_tsv_of_vlmevalkit_is_a_chat(tmp_path):
    code = base64.b64encode(picture("blue")).decode()
    rows = [
        "index\timage\tquestion\tanswer\tA\tB\tC\thint",
        f"1\t{code}\tWhich?\tB\tred\tblue\t\tnan",
        f'2\t{code}\t"Two\nlines, ""quoted""\there?"\tA\tyes\tno\tperhaps\tLook.',
        "3\t1\tAgain?\tgreen\t\t\t\t",
        "4\tx",
        "5\t??\tNo?\tA\ta\tb\t\t",
        "6\t7\tNo?\tA\ta\tb\t\t",
        "7\t6\tNo?\tA\ta\tb\t\t",
        "8\t99\tNo?\tA\ta\tb\t\t",
    ]
    path = write(tmp_path / "x.tsv", ("\n".join(rows) + "\n").encode())
    source = data.open_file(path)
    asked = "Which?\nA. red\nB. blue\n" + data.LETTER_PROMPT
    assert len(source) == 8 and source[0].parts == [("user", [0, asked]), ("assistant", ["B"])]
    assert colour_of(source[0].images[0]) == (0, 0, 255)
    question = 'Look.\nTwo\nlines, "quoted"\there?\nA. yes\nB. no\nC. perhaps\n' + data.LETTER_PROMPT
    assert source[1].parts[0] == ("user", [0, question]) and "line 3" in source[1].name
    assert source[2].parts == [("user", [0, "Again?"]), ("assistant", ["green"])]
    assert source[2].images == source[0].images  # a number is the index of the row that has the picture
    with pytest.raises(data.BadRecord, match="x.tsv line 6: 2 cells, but the header names 8"):
        source[3]
    for i, words in ((4, "is not base64"), (5, "refers back"), (7, "that of index 99, which no row has")):
        with pytest.raises(data.BadRecord, match=f"x.tsv line .: its image .*{words}|line .*{words}"):
            source[i]


def test_parquet_of_the_hub_and_its_conversion(tmp_path, capsys):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def image(colour: str) -> dict:
        return {"bytes": picture(colour), "path": "x.png"}

    pair = {"user": " Which colour? ", "assistant": "Red.", "source": "s"}
    tables = {
        "next": [{"id": str(n), "data_source": "s", **chat(None, "<image>\nQ?", f"{n}.")} for n in range(5)],
        "cauldron": [{"images": [image("red"), image("blue")], "texts": [pair, pair | {"user": "And?"}]}] * 3,
        "obelics": [{"images": [None, "http://x.org/p/a.png"], "texts": ["One.", None], "metadata": "[]"}],
        "caption": [{"image": image("green"), "caption": "green"}],
    }
    tables["next"] = [row | {"image": image("red")} for row in tables["next"][:4]]
    tables["next"].append({"id": "4", "data_source": "s", "image": None, **chat(None, "Q?", "4.")})
    expected = {
        "next": ("chat", [("user", [0, "Q?"]), ("assistant", ["0."])]),
        "cauldron": (
            "chat",
            [
                ("user", [0, 1, "Which colour?"]),
                ("assistant", ["Red."]),
                ("user", ["And?"]),
                ("assistant", ["Red."]),
            ],
        ),
        "obelics": ("interleaved", ["One.", 0]),
        "caption": ("caption", [0, "green"]),
    }
    write(tmp_path / "web" / "x.org" / "p" / "a.png", picture("blue"))
    for name, rows in tables.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        cfg = data.ConvertConfig(images=str(tmp_path / "web"), per_tar=3)
        assert data.convert(path, tmp_path / name, cfg) == 0
        assert f"{len(rows)} records, {len(rows)} of them converted now" in capsys.readouterr().out
        kind, parts = expected[name]
        for source in (data.open_file(path, images="web"), data.open_file(tmp_path / name)):
            assert (source.kind, len(source), source[0].parts) == (kind, len(rows), parts), name
            assert source[len(rows) - 1].parts == (
                parts if name != "next" else [("user", ["Q?"]), ("assistant", ["4."])]
            )
        direct, tarred = (data.open_file(p, images="web")[0].images for p in (path, tmp_path / name))
        assert [colour_of(i) for i in direct] == [colour_of(i) for i in tarred]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "next").iterdir()}
    assert data.convert(tmp_path / "next.parquet", tmp_path / "next", cfg) == 0
    assert "5 records, 0 of them converted now" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds another conversion"):
        data.convert(
            tmp_path / "next.parquet", tmp_path / "next", data.ConvertConfig(str(tmp_path / "web"), 4)
        )
    assert {file: file.stat().st_mtime_ns for file in before} == before  # a repeated call goes on


def test_a_stray_quote_in_a_tsv_is_text_and_an_open_one_is_told(tmp_path):
    rows = [
        "index\timage\tquestion\tanswer",
        '1\t\tA 5" pipe?\tyes',
        "2\t\tB?\tno",
        '3\t\t"C\nD?"\tno',
        "4\t\tE?\tno",
    ]
    table = data.Table(write(tmp_path / "x.tsv", "\n".join(rows).encode()))
    told = [table.raw(i)[0]["question"] for i in range(len(table))]
    assert told == ['A 5" pipe?', "B?", "C\nD?", "E?"]
    rng = random.Random(0)
    for n in range(200):  # the same records as the csv module finds in the whole file
        cells = [
            ["".join(rng.choice('ab"\n,') for _ in range(rng.randrange(6))) for _ in range(3)]
            for _ in range(9)
        ]
        buffer = io.StringIO(newline="")
        csv.writer(buffer, delimiter="\t", lineterminator="\n").writerows([["x", "y", "z"], *cells])
        table = data.Table(write(tmp_path / f"{n}.tsv", buffer.getvalue().encode()))
        assert [[*table.raw(i)[0].values()] for i in range(len(table))] == cells
    table = data.Table(write(tmp_path / "y.tsv", b'a\tb\n1\t"open\n2\tx\n'))
    with pytest.raises(data.BadRecord, match="its quotes do not close"):
        table.raw(0)


def test_other_formats_and_layouts_survive_conversion(tmp_path):
    write(tmp_path / "a.gif", picture("red", "GIF"))
    write(tmp_path / "b.bmp", picture("blue", "BMP"))
    code = base64.b64encode(picture("green")).decode()
    records = {
        "llava.jsonl": json.dumps(chat(["a.gif", "b.bmp"], "<image><image> Same?")),
        "plural.jsonl": json.dumps({"images": ["a.gif"], "conversations": turns("<image>Q?", "A.")}),
        "text.jsonl": json.dumps(chat(None, "Say <image>.")),
        "mmc4.jsonl": json.dumps(
            {
                "text_list": ["One.", "Two."],
                "image_info": [{"image_name": "a.gif", "matched_text_index": 1, "matched_sim": 0.3}],
            }
        ),
        "tsv.tsv": f"index\timage\tquestion\tanswer\n1\t{code}\tWhat?\tGreen",
        "words.txt": "Some words.",
    }
    for name, content in records.items():
        source = data.open_file(write(tmp_path / name, content.encode()))
        assert data.convert(tmp_path / name, tmp_path / f"{name}.out", data.ConvertConfig()) == 0
        tarred = data.open_file(tmp_path / f"{name}.out")
        assert (source.kind, source[0].parts) == (tarred.kind, tarred[0].parts), name
        assert [colour_of(i) for i in source[0].images] == [colour_of(i) for i in tarred[0].images], name
    assert len(data.open_file(tmp_path / "plural.jsonl")[0].images) == 1
    members = {
        "0.json": json.dumps(chat(["a.gif", "b.gif"], "<image><image>")).encode(),
        "0.0.gif": picture("red", "GIF"),
    }
    with pytest.raises(data.BadRecord, match="its .json names 2 images, it has 1"):
        data.FileSource(write_tar(tmp_path / "less.tar", members))[0]


def test_a_damaged_tar_or_parquet_is_told_and_not_cut_short(tmp_path):
    members = {f"{n}.txt": b"words" for n in range(6)}
    content = bytearray(write_tar(tmp_path / "x.tar", members).read_bytes())
    content[3 * 1024 + 5] ^= 255  # in the fourth member's header
    for name, broken in (("a.tar", bytes(content)), ("b.tar", (tmp_path / "x.tar").read_bytes() * 2)):
        with pytest.raises(UserError, match=f"{name} is damaged or no plain tar"):
            data.Table(write(tmp_path / name, broken))
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match="x.parquet is no parquet file that can be read"):
        data.Table(write(tmp_path / "x.parquet", b"PAR1 and nothing"))


def test_many_files_take_few_handles(tmp_path):
    for n in range(150):
        write(tmp_path / f"{n:03d}.jsonl", json.dumps({"text": f"{n}"}).encode())
    source = data.open_file(tmp_path)
    assert [source[i].parts[0] for i in range(150)] == [str(n) for n in range(150)]
    assert len(data.HANDLES) <= 64


def test_parquet_without_pyarrow_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="x.parquet: reading parquet needs pyarrow: pip install pyarrow"):
        data.Table(write(tmp_path / "x.parquet", b"PAR1"))


# --- Broken records
@pytest.mark.parametrize(
    "record, words",
    [
        (chat("../secret.png"), "leads out of the folder"),
        (chat("a/../../secret.png"), "leads out of the folder"),
        (chat("/etc/secret.png"), "leads out of the folder"),
        (chat("a.png", "No mark"), "1 images but 0 <image> marks"),
        (chat("a.png", "<image><image>"), "1 images but 2 <image> marks"),
        (chat(["a.png", "b.png"]), "2 images but 1 <image> marks"),
        (chat(None, "Q?", " \n"), "turn 1 is an empty answer"),
        (chat("") | {"image": ""}, "0 images but 1 <image> marks"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "'from' (human or gpt)"),
        ({"images": 5, "texts": [{"user": "a", "assistant": "b"}]}, "not a record of Cauldron"),
        ({"images": [], "texts": [{"user": "a", "assistant": None}]}, "must have 'user' and 'assistant'"),
        ({"image": "?" * 5000, "question": "Q?", "answer": "A"}, "is not base64"),
        ({"image": "", "question": "Q?", "answer": "nan"}, "no answer"),
        (chat("\ud800.png", "no mark"), "1 images but 0"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "'from' (human or gpt)"),
        (
            {"conversations": turns("Q?", "A.") + [{"from": "system", "value": "x"}]},
            "must start with a human turn",
        ),
    ],
)
def test_broken_records_are_told(tmp_path, record, words):
    source = data.FileSource(write(tmp_path / "x.jsonl", json.dumps(record).encode()), "chat")
    with pytest.raises(data.BadRecord) as error:
        source[0]
    assert words in str(error.value) and "x.jsonl line 1" in str(error.value)


def test_system_texts_and_answers_that_come_first(tmp_path):
    system = {"conversations": [{"from": "system", "value": "Be brief."}, *turns("Q?", "A.")]}
    begun = [{"from": "gpt", "value": "Hi!"}, *turns("Q?", "A.")]  # as ShareGPT's pieces begin
    cut = {"conversations": begun}
    source = data.FileSource(write(tmp_path / "x.json", json.dumps([system, cut]).encode()))
    told = [("user", ["Q?"]), ("assistant", ["A."])]
    assert source[0].parts == [("system", ["Be brief."]), *told] and source[1].parts == told


def broken_set(folder: Path, n: int = 200) -> Path:
    """LLaVA's list: of 20 records one lacks its picture, one has half, one is malformed, four are text."""
    whole = picture("red", "JPEG", (64, 48))
    records = []
    for i in range(n):
        name = f"{'gone' if i % 20 == 3 else 'images'}/{i}.jpg"
        if i % 20 != 3:
            write(folder / name, half_jpeg() if i % 20 == 7 else whole)
        record = chat(name, "<image>\nWhat is it?", f"It is number {i}.")
        record = chat(None, "What now?", f"Text {i}.") if i % 5 == 0 else record
        records.append(chat("a.png", "no mark") if i % 20 == 11 else record)
    return write(folder / "train.json", json.dumps(records).encode())


def stream(path: Path, batch_size: int = 0, workers: int = 0, steps: range = range(6), cursor=None, **more):
    cfg = test_training.small_config()
    cfg.image.cut = more.pop("cut", "")
    sources = data.open_sources(str(path), "sft")
    plan = data.Plan(
        sources, TOKENIZER, cfg, lambda n: "slow" if n % 4 == 0 else "fast", 0, steps, 8, batch_size,
        row_length=256, cursor=cursor, **more,
    )  # fmt: skip
    planner = torch.utils.data.DataLoader(plan, None, num_workers=min(workers, 1))
    return [*torch.utils.data.DataLoader(data.Stream(plan), None, sampler=planner, num_workers=workers)]


@pytest.mark.parametrize("batch_size", [0, 16])
def test_broken_records_are_skipped_counted_and_the_same_with_any_workers(tmp_path, batch_size):
    path = broken_set(tmp_path)
    one, four = stream(path, batch_size, 1), stream(path, batch_size, 4)
    assert len(one) == 6 and all(isinstance(batch, data.Batch) for batch in one)
    for a, b in zip(one, four):
        assert torch.equal(a.student.ids, b.student.ids) and torch.equal(a.pixels, b.pixels)
        assert torch.equal(a.student.targets, b.student.targets) and a.plan.skipped == b.plan.skipped
    counted = {why for batch in one for why, _ in batch.plan.skipped}
    assert counted == {"image missing", "image broken", "malformed"}
    told = [what for batch in one for _, what in batch.plan.skipped]
    assert any("gone/" in what and "train.json record" in what for what in told)
    texts = "".join(TOKENIZER.decode(batch.student.targets.tolist()) for batch in one)
    names = [int(name) for name in texts.replace(".", " ").split() if name.isdecimal()]
    assert names and not {n % 20 for n in names} & {3, 7, 11}  # nothing is learned from broken ones
    again = stream(path, batch_size, 0, range(3, 6), cursor=one[2].plan.cursor)
    assert all(torch.equal(a.student.ids, b.student.ids) for a, b in zip(one[3:], again))


def test_ranks_share_what_one_process_reads_although_records_are_broken(tmp_path):
    path = broken_set(tmp_path)
    whole = stream(path, 0, 0)
    halves = [stream(path, 0, 0, rank=rank, world=2) for rank in range(2)]
    for batch, first, second in zip(whole, *halves):
        ids = torch.cat([first.student.ids, second.student.ids])
        assert torch.equal(batch.student.ids, ids)
        planned = [skip for half in (first, second) for skip in half.plan.skipped]
        assert sorted(planned) == sorted(batch.plan.skipped)  # each is told by one rank alone


def test_a_broken_picture_keeps_its_room_and_teaches_nothing(tmp_path):
    write(tmp_path / "half.jpg", half_jpeg())
    path = write(tmp_path / "x.json", json.dumps([chat("half.jpg")]).encode())
    for cut in ("", "split"):
        (batch,) = stream(path, 1, 0, range(1), cut=cut)
        assert len(batch.student.targets) == 0 and len(batch.pixels) == 0
        assert batch.plan.skipped[0][0] == "image broken"
    path.write_bytes(json.dumps([chat("half.jpg", answer="Half."), chat(None, "Q?", "Text.")]).encode())
    (packed,) = stream(path, 0, 0, range(1))
    places = [place for row in packed.plan.rows for place in row]
    taken = [(packed.student.doc_ids == n).sum().item() for n in range(packed.student.doc_ids.max() + 1)]
    assert sum(taken) == sum(place.length for place in places)  # the room that was planned
    assert TOKENIZER.decode(packed.student.targets.tolist()).split() == ["Text."] * taken.count(min(taken))


def test_a_source_of_broken_records_alone_stops_the_run(tmp_path):
    write(tmp_path / "x.json", json.dumps([chat("gone.png")] * 3).encode())
    (error,) = stream(tmp_path / "x.json", 4, 0, range(1))
    assert isinstance(error, UserError) and "100 records of x one after the other cannot be used" in str(
        error
    )
    assert "gone.png does not exist" in str(error) and "data.py check" in str(error)


def test_runs_go_on_over_broken_records_and_tell_them(tmp_path, small_halves, capsys):
    import train_sft

    path = broken_set(tmp_path)
    flags = [
        "--workers",
        "1",
        "--log_every",
        "1",
        "--dtype",
        "float32",
        "--train",
        "connector",
        "--rows",
        "4",
    ]
    train_sft.main(
        [*small_halves, "--data", str(path), "--out", str(tmp_path / "run"), "--steps", "3", *flags]
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = capsys.readouterr().out
    assert lines[-1]["skipped"] > 10 and "image missing: " in told and "gone/" in told
    assert told.count("skipped, ") == 10 and f"skipped {lines[-1]['skipped']} records: " in told
    assert "data.py check " + str(path) in told and all(line["loss"] > 0 for line in lines if "loss" in line)
    (tmp_path / "images").rename(tmp_path / "away")
    chats = json.loads(path.read_text())
    path.write_text(json.dumps([record for record in chats if "image" in record]))
    with pytest.raises(UserError, match="does not exist"):  # a wrong folder shows before anything is written
        train_sft.main([*small_halves, "--data", str(path), "--out", str(tmp_path / "other"), "--steps", "3"])
    assert not (tmp_path / "other").exists()


def test_a_step_whose_pictures_are_all_broken_changes_nothing(tmp_path, small_halves):
    import train_sft

    write(tmp_path / "half.jpg", half_jpeg())
    path = write(tmp_path / "x.json", json.dumps([chat("half.jpg")]).encode())
    flags = [
        "--batch_size",
        "2",
        "--dtype",
        "float32",
        "--log_every",
        "1",
        "--slow_share",
        "0.5",
        "--workers",
        "0",
    ]
    out = tmp_path / "run"
    train_sft.main([*small_halves, "--data", str(path), "--out", str(out), "--steps", "2", *flags])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert not any("loss" in line for line in lines) and [line["skipped"] for line in lines] == [2, 4]
    train_sft.main(
        [*small_halves, "--data", str(path), "--out", str(tmp_path / "one"), "--steps", "1", *flags]
    )
    first, second = (model.open_weights(model.find_step(folder)) for folder in (tmp_path / "one", out))
    assert all(torch.equal(read(), second[name]()) for name, read in first.items())


# --- Pictures
def test_pictures_are_turned_and_bombs_and_halves_are_refused(tmp_path, monkeypatch):
    tall = Image.new("RGB", (40, 20), "blue")
    tall.paste("red", (0, 0, 20, 20))
    for orientation in range(9):  # as Pillow turns them, and as it sees their sizes
        exif = Image.Exif()
        exif[0x0112] = orientation
        tall.save(tmp_path / "b.png", exif=exif)
        with Image.open(tmp_path / "b.png") as file:
            expected = ImageOps.exif_transpose(file).convert("RGB")
        assert data.picture_size(tmp_path / "b.png") == expected.size
        assert np.array_equal(data.open_image(tmp_path / "b.png"), expected)
    for value in (9, 255):
        exif[0x0112] = value
        tall.save(tmp_path / "c.jpg", exif=exif)
        assert data.picture_size(tmp_path / "c.jpg") == data.open_image(tmp_path / "c.jpg").size == (40, 20)
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "d.png")
    assert (
        np.abs(np.asarray(data.open_image(tmp_path / "d.png"))[0, :, 0].astype(int) - np.arange(256)).max()
        <= 1
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    tall.save(tmp_path / "a.jpg", exif=exif, quality=95)
    for image in (tmp_path / "a.jpg", (tmp_path / "a.jpg").read_bytes()):
        turned = data.open_image(image)
        assert turned.size == data.picture_size(image) == (20, 40)
        assert turned.getpixel((10, 5))[0] > 200 and turned.getpixel((10, 35))[2] > 200
    whole = (tmp_path / "a.jpg").read_bytes()
    for broken in (whole[: len(whole) * 2 // 3], b"GIF", b"", picture("red", "PNG", (400, 400))[:-40]):
        with pytest.raises(data.BadRecord, match="x: image of .* bytes does not decode"):
            data.open_image(broken, "x")
    monkeypatch.setattr(data, "MOST_PIXELS", 799)
    with pytest.raises(data.BadRecord, match="40 x 20 pixels are too many"):
        data.open_image(tmp_path / "a.jpg", "x")


# --- The commands
def run(*words: str) -> tuple[int, str]:
    """Exit code and output of data.py, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            data.main([*words])
            code = 0
        except SystemExit as e:
            code = e.code
        except UserError as e:
            code = 2
            print(e)
    return code, out.getvalue()


def test_check_tells_what_is_there_and_fails_if_much_is_broken(tmp_path):
    path = broken_set(tmp_path)
    code, out = run("check", str(path))
    assert (
        code == 1 and "train: 200 records of kind chat" in out and "usable   170, skipped 30 (15.00%)" in out
    )
    for line in ("10 image missing", "10 image broken", "10 malformed", "record 3: image", "130 records"):
        assert line in out
    assert "[[ It is number" in out or "[[ Text" in out  # the learned part of a sample
    assert out.count("learned text in [[ ]]") >= 1 and "30 of 200 records would be skipped" in out
    good = [chat(None, "Q?", f"{i}. \x1b[31m<|end|>") for i in range(300)]
    path.write_text(json.dumps([*good, chat("gone.png")]))
    code, out = run("check", str(path), "--workers", "2")
    assert code == 0 and "usable   300, skipped 1 (0.33%)" in out
    assert "\x1b" not in out  # of the data's own


def test_check_counts_what_a_plain_loop_counts(tmp_path, capsys):
    answers = [" ".join(["word"] * (1 + i % 40 * 6)) for i in range(150)]
    records = [chat(None, "Say it:", answer) for answer in answers]
    path = write(tmp_path / "x.json", json.dumps(records).encode())
    assert data.check(str(path), data.CheckConfig(row_limit=160, workers=1, samples=0)) == 0
    out = capsys.readouterr().out
    lengths, learned, text, cut = [], 0, 0, 0
    for answer in answers:
        head, tail = len(TOKENIZER.encode("Say it:")) + 2, len(TOKENIZER.encode(answer)) + 1
        kept = min(160, head + tail)
        lengths.append(kept)
        learned, text, cut = learned + kept - head, text + kept, cut + (head + tail > 160)
    assert f"learned  {learned / text:.1%} of {text:,} tokens of text" in out
    assert f"cut      {cut:,} records" in out and cut
    assert f"length   {min(lengths)} to {max(lengths)} positions" in out


def test_check_takes_every_kind(tmp_path):
    code, out = run("check", "scenes", "--stage", "pretrain", "--limit", "64", "--workers", "1")
    kinds = ("caption", "chat", "interleaved", "text")
    assert code == 0 and all(f"64 records of kind {kind}" in out for kind in kinds)
    assert out.count("<picture>") >= 3 * 3


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "what to do?"),
        (["chek", "x"], "what to do?"),
        (["check"], "what to do?"),
        (["check", "nowhere.json"], "nowhere.json: no such file"),
        (["check", "scenes", "--stage", "both"], "--stage 'both': use pretrain or sft"),
        (["check", "scenes", "--presset", "tiny"], "did you mean --preset?"),
        (["convert", "nowhere.parquet", "out"], "nowhere.parquet: no such file"),
    ],
)
def test_wrong_commands_are_one_sentence(words, told):
    code, out = run(*words)
    assert code == 2 and told in out and out.count("\n") == 1


def test_the_command_line_gives_one_sentence_and_exit_code_2():
    done = subprocess.run([sys.executable, "data.py", "chek"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "data.py: chek: what to do? See python data.py --help\n"


def test_a_document_goes_without_its_missing_pictures(tmp_path):
    write(tmp_path / "a.png", picture("red"))
    document = {"texts": ["One.", None, None, "Two."], "images": [None, "gone.png", "a.png", None]}
    path = write(tmp_path / "x.jsonl", json.dumps(document).encode())
    cfg = test_training.small_config()
    plan = data.Plan(
        data.open_sources(str(path), "pretrain"), TOKENIZER, cfg, lambda n: "full", 0, range(1), 2
    )
    record, parts = plan.parts(plan.place(0, 0))
    assert record.parts == ["One.", 0, "Two."] and record.images == [tmp_path / "a.png"]
    planned = next(iter(plan))
    assert planned.skipped[0][0] == "image missing, its document kept" and "gone.png" in planned.skipped[0][1]
    assert isinstance(data.Stream(plan)[planned], data.Batch)


def test_a_long_document_is_tokenized_once_for_all_of_its_rows(tmp_path, monkeypatch):
    texts = [{"text": f"{n} " + "many words " * (2000 if n == 0 else 20)} for n in range(12)]
    path = write(tmp_path / "x.jsonl", "\n".join(json.dumps(text) for text in texts).encode())
    cfg, encoded = test_training.small_config(), []
    plan = data.Plan(
        data.open_sources(str(path), "pretrain"), TOKENIZER, cfg, lambda n: "full", 0, range(40), 2
    )
    planned = list(plan)
    plan.found.clear()
    real = TOKENIZER.encode
    monkeypatch.setattr(TOKENIZER, "encode", lambda text: encoded.append(len(text)) or real(text))
    batches = [data.Stream(plan)[each] for each in planned]
    long = [place for each in planned for row in each.rows for place in row if place.index == 0]
    assert len({place.part for place in long}) > 10 and sum(n > 2000 for n in encoded) <= len(long) / 5
    words = [
        len(piece[0]) for part in plan.parts(long[0])[1] for piece in part[0] if not isinstance(piece, int)
    ]
    assert sum(words) >= 4000 and all(len(batch.student.targets) for batch in batches)


def test_a_picture_that_vanishes_after_the_plan_leaves_its_room_empty(tmp_path):
    records = []
    for n in range(20):
        write(tmp_path / f"{n}.png", picture("red"))
        records.append(chat(f"{n}.png", "<image>\nWhat?", f"Number {n}."))
    path = write(tmp_path / "x.json", json.dumps(records).encode())
    cfg = test_training.small_config()
    plan = data.Plan(data.open_sources(str(path), "sft"), TOKENIZER, cfg, lambda n: "full", 0, range(4), 2)
    planned = list(plan)
    for n in range(0, 20, 2):
        (tmp_path / f"{n}.png").unlink()
    plan.found.clear()
    for each in planned:
        batch = data.Stream(plan)[each]
        assert (batch.student.doc_ids >= 0).sum() == sum(place.length for row in each.rows for place in row)
        gone = sum(place.index % 2 == 0 for row in each.rows for place in row)
        assert [why for why, _ in batch.plan.skipped] == ["image missing"] * gone
        said = TOKENIZER.decode(batch.student.targets.tolist())
        assert not {f"{n}." for n in range(0, 20, 2)} & set(said.split())


def test_validation_and_answers_on_broken_data(tmp_path, small_halves, capsys):
    import train_sft

    write(tmp_path / "half.jpg", half_jpeg())
    write(tmp_path / "a.png", picture("red"))
    system = {"conversations": [{"from": "system", "value": "Be brief."}, *turns("Which?", "That.")]}
    good = write(tmp_path / "good.json", json.dumps([chat("half.jpg"), chat("a.png"), system]).encode())
    bad = write(tmp_path / "bad.json", json.dumps([chat("half.jpg")]).encode())
    flags = ["--batch_size", "2", "--dtype", "float32", "--eval_every", "1", "--workers", "0", "--steps", "1"]
    train_sft.main([*small_halves, "--data", str(good), "--out", str(tmp_path / "a"), *flags])
    told = capsys.readouterr().out
    assert "validation loss" in told and "(right: 'That.')" in told and "'Which?' ->" in told
    with pytest.raises(UserError, match="validation: no sample of kind chat in .*bad.json can be used"):
        train_sft.main(
            [*small_halves, "--data", str(good), "--val_data", str(bad), "--out", str(tmp_path / "b"), *flags]
        )


def test_check_takes_the_limits_of_the_recipe(tmp_path):
    path = write(tmp_path / "x.json", json.dumps([chat(None, "word " * 300, "Yes.")] * 40).encode())
    code, out = run("check", str(path), "--workers", "1")
    assert code == 1 and "40 no answer left" in out and "within 256 positions" in out
    code, out = run("check", str(path), "--workers", "1", "--row_length", "1024")
    assert code == 0 and "usable   40" in out
    path.write_text(json.dumps([chat(None, "Say <image>.", "Yes.")] * 3))
    assert "3 records have <image> as text" in run("check", str(path))[1]
    assert run("check", "scenes", "--preset", "cos-7b")[0] == 2


# --- Twenty thousand records
def large_set(folder: Path, n: int = 20_000) -> Path:
    """A hundredth is broken, a fiftieth in a folder that is missing, a tenth has no picture."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=50)
    whole, records = buffer.getvalue(), []
    (folder / "images").mkdir(parents=True)
    for i in range(n):
        answer = "It is " + "very " * (i % 7) + "good."
        name = f"{'ocr' if i % 50 == 9 else 'images'}/{i}.jpg"
        if i % 10 == 0:
            records.append(chat(None, "What now?", answer))
            continue
        if i % 50 != 9:
            (folder / name).write_bytes(whole[: len(whole) // 2] if i % 100 == 17 else whole)
        records.append(chat(name, "<image>\nWhat is it?", answer))
    return write(folder / "train.json", json.dumps(records).encode())


@pytest.mark.slow
def test_twenty_thousand_records_with_holes_train_to_the_end(tmp_path, small_halves, capsys):
    import train_sft

    path, out = large_set(tmp_path), tmp_path / "run"
    flags = [
        "--workers",
        "2",
        "--log_every",
        "20",
        "--dtype",
        "float32",
        "--train",
        "connector",
        "--rows",
        "64",
    ]
    flags += ["--row_length", "256", "--row_images", "16", "--steps", "80"]
    train_sft.main([*small_halves, "--data", str(path), "--out", str(out), *flags])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seen = sum(line["samples_per_s"] * line["seconds"] for line in lines if "samples_per_s" in line)
    told = capsys.readouterr().out
    assert seen > 20_000 and 0.025 < lines[-1]["skipped"] / seen < 0.04 and lines[-1]["loss"] > 0
    (last,) = [
        line for line in told.splitlines() if line.startswith(f"skipped {lines[-1]['skipped']} records")
    ]
    assert "image missing" in last and "image broken" in last and "/ocr/" in told


@pytest.mark.slow
def test_memory_of_workers_stays_flat_over_an_epoch(tmp_path):
    path = large_set(tmp_path)
    plan = data.Plan(
        data.open_sources(str(path), "sft"), TOKENIZER, test_training.small_config(), lambda n: "fast", 0,
        range(100), 64, row_length=256,
    )  # fmt: skip
    planner = torch.utils.data.DataLoader(plan, None, num_workers=1)
    batches = iter(torch.utils.data.DataLoader(data.Stream(plan), None, sampler=planner, num_workers=2))

    def held() -> list[int]:
        """Anonymous kB of both workers."""
        found = [Path(f"/proc/{worker.pid}/status").read_text() for worker in batches._workers]
        return [int(text.partition("RssAnon:")[2].split()[0]) for text in found]

    samples = 0
    for step, batch in enumerate(batches):
        samples += batch.samples
        if step == 20:
            before = held()
        if step == 85:  # later batches come from workers that may have ended
            after, epoch = held(), samples
    print(f"workers held {before} and {after} kB")
    assert epoch > 20_000 and all(b < a + 8_000 for a, b in zip(before, after))
