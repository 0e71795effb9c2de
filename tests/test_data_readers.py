"""Files of records by offset: lists, lines, texts, tars; the forms of a record; mixtures and their shares."""

import json
import os
import random
import shutil
import tarfile
import tracemalloc
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from helpers import TOKENIZER, chat, colour_of, picture, turns, write, write_tar
from PIL import Image
from torch.utils.data import DataLoader

import data
import model
from model import UserError

MIXTURES = model.ASSETS / "mixtures"
CHAT = chat(None, "What?")
CAPTION = chat("a.png", "Tell.\n<image>", "A ring.")
DOCUMENT = {"images": ["a.png", None, None, "b/c.png", "d.png"], "texts": [None, "One.", "Two.", None, None]}
EXAMPLE = {"chat": CHAT, "caption": CAPTION, "interleaved": DOCUMENT, "text": {"text": "Some words."}}


def open_one(path: Path, content, stage: str = "pretrain") -> data.FileSource:
    ((source, weight),) = data.open_sources(str(write(path, content)), stage)
    assert weight == 1
    return source


def mixture(folder: Path, *entries: dict, stage: str = "pretrain", files: bool = True) -> list:
    """Sources of a mixture for which files of the right kind are written first."""
    for entry in entries if files else []:
        if "path" in entry and entry["path"] != "scenes" and not (folder / entry["path"]).exists():
            write(folder / entry["path"], [EXAMPLE[entry["kind"]]])
    return data.open_sources(str(write(folder / "mix.json", [*entries])), stage)


# --- Forms of a record
FORMS = {  # a record, and what is read of it: kind, parts, pictures
    "document": (DOCUMENT, "interleaved", [0, "One.\n\nTwo.", 1, 2], ["a.png", "b/c.png", "d.png"]),
    "text": ({"text": "Say <image>,\r\n\n<|end|>.", "url": "x"}, "text", ["Say <image>,\r\n\n<|end|>."], []),
    "captioned": ({"image": "a.png", "caption": "A ring."}, "caption", [0, "A ring."], ["a.png"]),
    "chat": (CAPTION, "chat", [("user", [0, "Tell."]), ("assistant", ["A ring."])], ["a.png"]),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_every_form_becomes_its_kind_of_record(tmp_path, suffix):
    for name, (record, *expected, images) in FORMS.items():
        source = open_one(tmp_path / (name + suffix), [record])
        assert source.name == name and len(source) == 1 and source.kind == source[0].kind
        assert [source.kind, source[0].parts] == expected
        assert source[0].images == [tmp_path / image for image in images]
    ((caption, _),) = mixture(tmp_path, {"kind": "caption", "path": "chat" + suffix, "images": "pictures"})
    assert caption[0].kind == "caption" and caption[0].parts == [0, "A ring."]
    assert caption[0].images == [tmp_path / "pictures" / "a.png"]


def test_turns_documents_and_texts_of_files(tmp_path):
    turn = {"from": "system", "value": "Be brief."}
    records = [
        {"id": 1, "image": "a.png", "conversations": turns("What?\n<image>", "Red.", "Sure?", "Yes.")},
        {"id": 2, "conversations": turns("Say <image> or <|end|>.", "<image>")},
        {"id": 3, "image": ["a.png", "a.png"], "conversations": turns("<image> vs <image>?", "Equal.")},
        {"conversations": [turn, *turns("Q?", "A.")]},
        {"conversations": [{"from": "gpt", "value": "Hi!"}, *turns("Q?", "A.")]},  # as ShareGPT's begin
    ]
    source = open_one(tmp_path / "x.json", records, "sft")
    assert source[0].parts[0] == ("user", [0, "What?"])  # the image moves to the front of its turn
    assert source[1].parts[0] == ("user", ["Say <image> or <|end|>."]) and source[1].images == []
    assert source[2].parts[0] == ("user", [0, " vs ", 1, "?"])
    answered = [("user", ["Q?"]), ("assistant", ["A."])]
    assert source[3].parts == [("system", ["Be brief."]), *answered] and source[4].parts == answered
    laid = data.lay_out(data.pieces_of(source[1], TOKENIZER), [])
    assert TOKENIZER.decode(laid.targets[laid.targets >= 0].tolist()) == "<image>"
    assert (laid.bank_rows == data.TEXT).all()
    source = open_one(tmp_path / "d.jsonl", [DOCUMENT])
    laid = data.lay_out(data.pieces_of(source[0], TOKENIZER), [np.arange(4)] * 9)
    ids = laid.targets[laid.targets >= 0].tolist()
    assert TOKENIZER.decode(ids) == "One.\n\nTwo." and ids[-1] == TOKENIZER.end
    text = len(TOKENIZER.encode("One.\n\nTwo."))
    assert (laid.bank_rows != data.TEXT).tolist() == [True] * 4 + [False] * text + [True] * 8 + [False]
    content = "\ufeffEins\r\nzwei  \r\n \t\r\n\r\n\r\nDrei\r\n\r\nvier: \u2028\u00fc"
    source = open_one(tmp_path / "book.txt", content, "sft")
    assert source.kind == "text" and source.name == "book"
    assert [source[i].parts for i in range(len(source))] == [["Eins\nzwei"], ["Drei"], ["vier: \u2028\u00fc"]]
    assert [source[i].name.split()[-1] for i in range(3)] == ["1", "6", "8"]


# --- Offsets
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("at_end", [True, False])
def test_offsets_find_every_line(tmp_path, newline, at_end):
    texts = ["plain", "-", "Grüße \U0001f600 \u2028 \u0085 x", "line\nbreak\r\n", "x" * 70000, "last"]
    lines = [json.dumps({"text": t}, ensure_ascii=n % 2 == 0) for n, t in enumerate(texts)]
    lines[2:2] = ["", "  \t", ""]  # empty lines are no records, but count as lines
    path = tmp_path / "x.jsonl"
    path.write_bytes((newline.join(lines) + newline * at_end).encode())
    source = data.FileSource(path)
    assert len(source) == len(texts) and source.indexes[0][0].dtype == np.int64
    order = np.random.default_rng(0).permutation(len(texts))
    assert [source[i].parts[0] for i in order] == [texts[i] for i in order]
    assert [int(source[i].name.split()[-1]) for i in range(len(texts))] == [1, 2, 6, 7, 8, 9]


def test_a_file_is_scanned_once_until_it_changes(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"text": "a"}])
    first = data.FileSource(path)
    assert data.FileSource(path).indexes[0] is first.indexes[0]
    write(path, [{"text": "a"}, {"text": "b"}])
    assert len(data.FileSource(path)) == 2 and data.FileSource(path)[1].parts == ["b"]
    for n in range(150):  # many files leave no handles open
        write(tmp_path / "many" / f"{n:03d}.jsonl", [{"text": f"{n}"}])
    source = data.FileSource(tmp_path / "many")
    assert [source[i].parts[0] for i in range(150)] == [str(n) for n in range(150)]
    assert not [fd for fd in Path("/proc/self/fd").iterdir() if fd.resolve().is_relative_to(tmp_path)]


def test_forked_workers_read_one_file_at_the_same_time(tmp_path):
    """With a file position shared by all, records would be mixed up."""
    texts = [f"{i} " * (1 + i % 400) for i in range(3000)]
    source = open_one(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    assert source[7].parts == [texts[7]]
    order = np.random.default_rng(0).permutation(3000).tolist()
    loader = DataLoader(source, None, sampler=order, num_workers=2, multiprocessing_context="fork")
    for i, record in zip(order, loader):
        assert record.parts == [texts[i]] and source[i].parts == [texts[i]]


# --- Lists of objects
@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_offsets_of_a_list_are_those_of_the_json_module(tmp_path, style):
    rng, signs = random.Random(0), [*'a"\\{}[],:/ \n\té😀']
    texts = ["".join(rng.choices(signs, k=rng.randrange(12))) for _ in range(900)]
    records = [{a: [b, {c: [None, -1.5e-9]}, []], c: {}} for a, b, c in zip(texts, texts[300:], texts[600:])]
    text = json.dumps(records, **style)
    for mark in ("", "\ufeff"):
        path = write(tmp_path / f"{len(mark)}.json", mark + " \n" + text + "\n ")
        table = data.Table(path)
        order = rng.sample(range(300), 300)
        assert len(table) == 300 and [table.raw(i)[0] for i in order] == [records[i] for i in order]
        assert table.raw(299)[1] == f"{path} record 299"


def test_a_list_costs_offsets_and_not_objects(tmp_path):
    """40 MB of records: reading all of them keeps less than 1 MB."""
    record = chat("a.png", "<image>\n" + "what is this? " * 70)
    path = write(tmp_path / "x.json", [record] * 40_000)
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
        source = data.FileSource(spec)
        assert source.kind == "caption" and len(source) == 4
        for k in (2, 0, 3, 1):
            assert source[k].parts == [0, f"a {colours[k]} picture"]
            assert isinstance(source[k].images[0], data.FileSlice)  # not read yet
            expected = Image.new("RGB", (1, 1), colours[k]).getpixel((0, 0))
            assert np.abs(np.subtract(colour_of(source[k].images[0]), expected)).max() < 8
    assert (tmp_path / "00001.tar.index.npy").is_file()


def test_the_index_of_a_tar_is_written_once_and_anew_if_the_tar_changes(tmp_path, monkeypatch):
    members = {"a.jpg": picture(), "a.txt": b"one", "b.c.jpg": picture(), "b.txt": b"two"}
    path = write_tar(tmp_path / "x.tar", members)
    assert [data.FileSource(path)[i].parts[1] for i in range(2)] == ["one", "two"]
    data.index_file.cache_clear()
    scanned, scan = [], data.scan_tar
    monkeypatch.setattr(data, "scan_tar", lambda path: scanned.append(path) or scan(path))
    assert len(data.Table(path)) == 2 and scanned == []
    os.remove(path)
    write_tar(path, {"z.jpg": picture(), "z.txt": b"new"})
    os.utime(path, ns=(1, 1))
    assert len(data.Table(path)) == 1 and data.FileSource(path)[0].parts[1] == "new" and len(scanned) == 1
    write(tmp_path / "x.tar.index.npy", b"not an index")
    data.index_file.cache_clear()
    assert len(data.Table(path)) == 1 and len(scanned) == 2


def test_tars_hold_chats_documents_and_text_and_damaged_ones_are_named(tmp_path):
    def open_tar(name: str, members: dict) -> data.FileSource:
        return data.FileSource(write_tar(tmp_path / name, members))

    document = {"texts": ["Before.", None, "After.", None], "images": [None, "x", None, "y"]}
    record = chat(["any/where.jpg", "x"], "<image><image> Same?", "No.")
    members = {"0.json": json.dumps(record).encode(), "0.0.png": picture("red"), "0.1.png": picture("blue")}
    source = open_tar("chat.tar", members)
    assert source[0].parts[0] == ("user", [0, 1, " Same?"])
    assert [colour_of(image) for image in source[0].images] == [(255, 0, 0), (0, 0, 255)]
    members["0.json"] = json.dumps(document).encode()
    source = open_tar("documents.tar", members)
    assert source.kind == "interleaved" and source[0].parts == ["Before.", 0, "After.", 1]
    del members["0.1.png"]
    with pytest.raises(data.BadRecord, match="its .json names 2 images, it has 1"):
        open_tar("fewer.tar", members)[0]
    source = open_tar("text.tar", {"0.txt": b"words", "1.txt": b"more"})
    assert source.kind == "text" and source[1].parts == ["more"]
    with tarfile.open(tmp_path / "x.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match="x.tar is damaged or no plain tar .*unpack a compressed one"):
        data.Table(tmp_path / "x.tar")
    path = write_tar(tmp_path / "y.tar", {"a.json": b"{", "b.json": json.dumps(CHAT).encode()})
    with pytest.raises(data.BadRecord, match="y.tar record 0: not JSON"):
        data.FileSource(path)[0]
    assert data.FileSource(path)[1].parts[1] == ("assistant", ["Red."])
    content = bytearray(write_tar(path, {f"{n}.txt": b"words" for n in range(6)}).read_bytes())
    twice = bytes(content * 2)
    content[3 * 1024 + 5] ^= 255  # in the fourth member's header
    for name, broken in (("a.tar", bytes(content)), ("b.tar", twice)):
        with pytest.raises(UserError, match=f"{name} is damaged or no plain tar"):
            data.Table(write(tmp_path / name, broken))


# --- Broken input
@pytest.mark.parametrize("line, words", [
    (b'{"text": "a"', "line 3: not JSON (Expecting ',' delimiter"),
    (b'{"text": "\xff"}', "line 3: not JSON ('utf-8' codec can't decode byte 0xff in position 10"),
    (b"[" * 100000, "line 3: not JSON (maximum recursion depth"),
    (b"[1]", "line 3: expected an object, got b'[1]'"),
    (b'{"txt": "a", "n": 1}', "line 3: expected a record of kind text, but it has txt, n; python tools/con"),
    (b'{"text": 5}', "must have an image or a text"),
    (b'{"text": " "}', "a text without text"),
    (b'{"text": "a", "image": "a.png"}', "a text has an image beside it"),
])  # fmt: skip
def test_broken_lines_are_named(tmp_path, line, words):
    source = open_one(tmp_path / "x.jsonl", b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(data.BadRecord) as error:
        source[1]
    assert words in str(error.value) and "x.jsonl line 3" in str(error.value)
    assert source[2].parts == ["b"]


@pytest.mark.parametrize("record, words", [
    ({"images": [None], "texts": ["a", "b"]}, "not a record of images, texts (ValueError('zip() arg"),
    ({"images": "a.png", "texts": ["a"]}, "place 0 must have an image or a text"),
    ({"images": 3, "texts": ["a"]}, "not a record of images, texts (TypeError("),
    ({"images": ["a.png"], "texts": ["a"]}, "place 0 must have an image or a text"),
    ({"images": ["a.png", None], "texts": [None, None]}, "place 1 must have an image or a text"),
    ({"images": ["a.png"], "texts": [{"user": "a", "assistant": "b"}]}, "python tools/convert.py PATH OUT"),
    ({"images": [3], "texts": [None]}, "an image must be the path of a file, got 3"),
    ({"images": ["https://x.org/a.png"], "texts": [None]}, "https://x.org/a.png is a URL: download it"),
    ({"image": "a.png", "caption": ""}, "a caption without text"),
    ({"image": "a.png", "caption": None}, "must have an image or a text"),
    ({"conversations": turns("Only a question")}, "must start with a human turn and an answer"),
    ({"conversations": CHAT["conversations"][:1] * 2}, "must start with a human turn and an answer"),
    ({"image": None, "conversations": None}, "not a record of conversations (TypeError("),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "'from' (human or gpt)"),
    ({"conversations": [{"from": ["human"], "value": "x"}]}, "'from' (human or gpt)"),
    (chat("../secret.png"), "leads out of the folder"),
    (chat("a/../../secret.png"), "leads out of the folder"),
    (chat("/etc/secret.png"), "leads out of the folder"),
    (chat("a.png", "No mark"), "1 images but 0 <image> marks"),
    (chat(["a.png", "b.png"]), "2 images but 1 <image> marks"),
    (chat("\ud800.png", "no mark"), "1 images but 0"),
    (chat("") | {"image": ""}, "0 images but 1 <image> marks"),
    (chat(None, "Q?", " \n"), "an answer is empty"),
])  # fmt: skip
def test_broken_records_are_named(tmp_path, record, words):
    source = data.FileSource(write(tmp_path / "x.jsonl", [record]))
    with pytest.raises(data.BadRecord) as error:
        source[0]
    assert words in str(error.value) and "x.jsonl line 1" in str(error.value)


@pytest.mark.parametrize("name, content, words", [
    ("x.jsonl", "\n \n", "at least one record"),
    ("x.txt", "\n", "at least one record"),
    ("x.json", "[]", "at least one record"),
    ("x.json", "", "not valid JSON (Expecting value: line 1 column 1"),
    ("x.json", '{"text": "a"}', "a .json file must be a list of objects"),
    ("x.json", '[{"a": 1},\n {"a": "x}]', "not valid JSON (Unterminated string starting at: line 2 col"),
    ("x.json", '[{"a": 1},\n\n  {"a": 2} {"a": 3}]', "not valid JSON (Expecting ',' delimiter: line 3 col"),
    ("x.json", '[{"a": 1},', "not valid JSON"),
    ("x.json", '[{"a": 1},]', "not valid JSON"),
    ("x.json", '[{"a": 1}', "not valid JSON"),
    ("x.csv", "a,b", "found .csv; use a file, folder or glob of one of .tar, .jsonl, .json, .txt; python"),
    ("x.parquet", "PAR1", "python tools/convert.py PATH OUT makes tars of other forms"),
    ("x.jsonl", "[\n1]", "x.jsonl line 1: not JSON (Expecting value"),
])  # fmt: skip
def test_files_without_records_are_refused(tmp_path, name, content, words):
    with pytest.raises(UserError) as error:
        open_one(tmp_path / name, content)
    assert words in str(error.value) and name in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        data.open_sources(str(tmp_path / "other.json"), "pretrain")


def test_a_broken_record_of_a_list_is_named_and_the_others_are_read(tmp_path):
    table = data.Table(write(tmp_path / "x.json", '[{"a": 1},\n{"a" 2},\n{"a": 3}]'))
    with pytest.raises(data.BadRecord, match="x.json record 1: not JSON .Expecting ':' delimiter"):
        table.raw(1)
    assert len(table) == 3 and table.raw(2)[0] == {"a": 3}


# --- Mixtures
@pytest.mark.parametrize("kinds, expected", [
    ("interleaved caption text", [0.45, 0.45, 0.1]),
    ("caption interleaved caption text caption", [0.15, 0.45, 0.15, 0.1, 0.15]),
    ("text text", [0.5, 0.5]),
    ("chat text chat", [45 / 110, 10 / 55, 45 / 110]),
    ("chat caption interleaved text", [45 / 145, 45 / 145, 45 / 145, 10 / 145]),
])  # fmt: skip
def test_shares_of_a_mixture_without_weights_are_those_of_mm1(tmp_path, kinds, expected):
    sources = mixture(tmp_path, *({"kind": kind, "path": f"{kind}.jsonl"} for kind in kinds.split()))
    assert [source.kind for source, _ in sources] == kinds.split()
    assert [weight for _, weight in sources] == pytest.approx(expected, abs=1e-12)


def test_weights_are_kept_names_and_scenes(tmp_path):
    sources = mixture(
        tmp_path,
        {"kind": "caption", "path": "a/one.jsonl", "weight": 3, "note": "made by a model"},
        {"kind": "caption", "path": "two.json", "weight": 1.5, "name": "synthetic"},
        {"kind": "text", "path": "scenes", "weight": 0},
        {"kind": "interleaved", "path": "scenes", "weight": 7, "name": "toys"},
    )
    assert [weight for _, weight in sources] == [3, 1.5, 0, 7]
    assert [source.name for source, _ in sources] == ["one", "synthetic", "scenes", "toys"]
    assert [source.kind for source, _ in sources] == ["caption", "caption", "text", "interleaved"]
    for stage in ("pretrain", "sft"):
        scenes = data.open_sources("scenes", stage)
        assert [(s.kind, w) for s, w in scenes] == data.SCENES_MIX[stage]
        assert all(s.name == "scenes" for s, _ in scenes)
    assert isinstance(sources[3][0], data.Scenes) and sources[3][0][5] == data.Scenes("interleaved")[5]
    order = data.sample_order([len(s) for s, _ in sources], [w for _, w in sources], 0)
    counts = np.bincount([next(order)[0] for _ in range(20000)], minlength=4) / 20000
    assert counts == pytest.approx(np.array([3, 1.5, 0, 7]) / 11.5, abs=0.015)


TEXT = {"kind": "text", "path": "t.jsonl"}


@pytest.mark.parametrize("entries, stage, words", [
    ([TEXT | {"weight": 1}, TEXT, TEXT], "pretrain", "2 entries have no weight: give one to all or to none"),
    ([TEXT | {"weight": 0}] * 2, "pretrain", "all weights are 0"),
    ([TEXT, TEXT | {"wieght": 3}], "pretrain", "entry 1: unknown key 'wieght', use kind, path, images"),
    ([TEXT | {"weight": -1}], "pretrain", "entry 0: weight -1 is not a number of at least 0"),
    ([TEXT | {"weight": "1"}], "pretrain", "entry 0: weight '1' is not a number"),
    ([TEXT | {"weight": float("nan")}], "pretrain", "entry 0: weight nan"),
    ([TEXT | {"kind": ["text"]}], "pretrain", "entry 0: kind '['text']' is not known, use chat, caption"),
    ([{"path": "t.jsonl"}], "pretrain", "entry 0: kind 'None' is not known"),
    ([TEXT, {"kind": "text"}], "pretrain", "entry 1: expected an object with kind and path"),
    ([TEXT, 5], "pretrain", "a .json file must be a list of objects"),
    ([TEXT, TEXT | {"kind": "interleaved"}], "sft", "entry 1: interleaved data is for stage 1"),
    ([{"kind": "interleaved", "path": "scenes"}], "sft", "entry 0: interleaved data is for stage 1"),
])  # fmt: skip
def test_what_is_wrong_with_a_mixture_is_said(tmp_path, entries, stage, words):
    write(tmp_path / "t.jsonl", [{"text": "a"}])
    with pytest.raises(UserError) as error:
        mixture(tmp_path, *entries, stage=stage, files=False)
    assert words in str(error.value) and str(error.value).startswith(str(tmp_path / "mix.json"))


@pytest.mark.parametrize("kind", EXAMPLE)
@pytest.mark.parametrize("layout", EXAMPLE)
def test_a_kind_must_fit_the_layout(tmp_path, kind, layout):
    write(tmp_path / "x.jsonl", [EXAMPLE[layout]])
    entry = {"kind": kind, "path": "x.jsonl"}
    if kind in data.LAYOUTS[data.layout_of(EXAMPLE[layout])]:  # captions and chats are both conversations
        assert mixture(tmp_path, entry)[0][0].kind == kind
        return
    with pytest.raises(UserError, match=f"x.jsonl line 1: expected a record of kind {kind}, but it has"):
        mixture(tmp_path, entry)


def test_missing_files_and_what_stage_2_takes(tmp_path):
    write(tmp_path / "t.jsonl", [{"text": "a"}])
    gone = [{"kind": "text", "path": name} for name in ("a/b.jsonl", "c.jsonl", "c.jsonl")]
    with pytest.raises(UserError) as error:
        mixture(tmp_path, gone[0], TEXT, {"kind": "text", "path": "scenes"}, *gone[1:], files=False)
    words = f"these files are missing in {tmp_path}: a/b.jsonl, c.jsonl; put them there"
    assert str(error.value) == f"{tmp_path / 'mix.json'}: {words}"
    for kind, example in EXAMPLE.items():
        spec = str(write(tmp_path / f"{kind}.jsonl", [example]))
        assert data.open_sources(spec, "pretrain")
        if kind != "interleaved":
            assert data.open_sources(spec, "sft")
    with pytest.raises(UserError, match="interleaved data is for stage 1"):
        data.open_sources(str(tmp_path / "interleaved.jsonl"), "sft")
    kinds = ["chat", "text", "caption"]
    sources = mixture(tmp_path, *({"kind": kind, "path": f"{kind}.jsonl"} for kind in kinds), stage="sft")
    assert [source.kind for source, _ in sources] == kinds
    # a list of chats with other keys is no mixture
    source = open_one(tmp_path / "x.json", [CHAT | {"path": "from/here", "kind": "talk"}], "sft")
    assert source.kind == "chat" and source[0].parts[1] == ("assistant", ["Red."])


# --- The shipped mixtures
MM1 = {"interleaved": 0.45, "caption": 0.45, "text": 0.10}  # section 3 of the paper
SHIPPED = {
    "mm1_pretrain": ("pretrain", MM1), "scenes_mm1": ("pretrain", MM1), "mm1_sft": ("sft", {"chat": 1}),
    "llava_1.5_sft": ("sft", {"chat": 1}),
}  # fmt: skip


def shipped(folder: Path, name: str) -> list:
    """The sources of a shipped mixture, with files of one record at the paths it names."""
    shutil.copy(MIXTURES / f"{name}.json", folder)
    for entry in json.loads((MIXTURES / f"{name}.json").read_text()):
        if entry["path"] != "scenes":
            path = folder / entry["path"]
            write(path if path.suffix else path / "x.jsonl", [EXAMPLE[entry["kind"]]])
    return data.open_sources(str(folder / f"{name}.json"), SHIPPED[name][0])


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_mixtures_open_and_have_their_shares(tmp_path, name):
    assert {path.stem for path in MIXTURES.iterdir()} == SHIPPED.keys()
    sources = shipped(tmp_path, name)
    shares, total = defaultdict(float), sum(weight for _, weight in sources)
    for source, weight in sources:
        shares[source.kind] += weight / total
        assert source[0].kind == source.kind
    assert shares == pytest.approx(SHIPPED[name][1], abs=1e-9)
    names = [source.name for source, _ in sources]
    assert len(set(names)) == len(names)


def test_weights_within_the_shipped_mixtures(tmp_path):
    """VeCap is 7 % of the captions (section 3.2); other sources follow their sizes; counts of SFT sum up."""
    weight = {source.name: w for source, w in shipped(tmp_path, "mm1_pretrain")}
    assert weight["vecap"] == pytest.approx(0.07 * 45)
    pairs = {"cc3m": 3.3, "cc12m": 12.4, "coyo": 747}
    for name, n in pairs.items():
        assert weight[name] == pytest.approx(0.93 * 45 * n / sum(pairs.values()), abs=0.006)
    assert weight["obelics"] == pytest.approx(45 * 141 / (141 + 101), abs=0.006)
    sft = shipped(tmp_path, "mm1_sft")
    assert len(sft) == 17 and sum(w for _, w in sft) == 1448
    sources = data.open_sources(str(MIXTURES / "scenes_mm1.json"), "pretrain")  # works where it lies
    assert all(isinstance(source, data.Scenes) for source, _ in sources)
    with pytest.raises(UserError, match="files are missing in .*mixtures: cc3m/captions.jsonl, cc12m"):
        data.open_sources(str(MIXTURES / "mm1_pretrain.json"), "pretrain")
