"""Tables of other forms, and the tars that are made of them: training reads what the tool writes."""

import base64
import csv
import io
import json
import random
import sys
from pathlib import Path

import pytest
from helpers import chat, colour_of, picture, turns, write, write_tar

import data
from model import UserError
from tools import convert

MMC4 = {
    "text_list": ["Zero.", "One.", "Two.", "Three."],
    "image_info": [
        {"image_name": "c.png", "matched_text_index": 2, "matched_sim": 0.24, "raw_url": "http://x/c.png"},
        {"image_name": "bad.png", "matched_text_index": 3, "matched_sim": 0.2399},
        {"image_name": "a.png", "matched_text_index": 0},
        {"image_name": "d.png", "matched_text_index": 2, "matched_sim": 1},
    ],
    "similarity_matrix": [[0.3]],
}


def converted(path: Path, content, **flags) -> data.FileSource:
    """What training reads of the tars made of a file."""
    write(path, content)
    out = path.with_name(path.name + ".out")
    assert convert.convert(path, out, convert.ConvertConfig(**flags)) == 0
    return data.FileSource(out)


def test_matched_sentences_become_a_document(tmp_path):
    colours = {"a": "red", "c": "green", "d": "blue"}
    for name, colour in colours.items():
        write(tmp_path / f"{name}.png", picture(colour))
    source = converted(tmp_path / "x.jsonl", [MMC4])
    assert source.kind == "interleaved" and source[0].parts == [0, "Zero. One.", 1, 2, "Two. Three."]
    shown = [colour_of(image) for image in source[0].images]
    assert shown == [colour_of(picture(colour)) for colour in ("red", "green", "blue")]


def test_a_table_of_questions_becomes_chats(tmp_path):
    code = base64.b64encode(picture("blue")).decode()
    rows = [
        "index\timage\tquestion\tanswer\tA\tB\tC\thint", f"1\t{code}\tWhich?\tB\tred\tblue\t\tnan",
        f'2\t{code}\t"Two\nlines, ""quoted""\there?"\tA\tyes\tno\tperhaps\tLook.',
        "3\t1\tAgain?\tgreen\t\t\t\t",
    ]  # fmt: skip
    source = converted(tmp_path / "x.tsv", "\n".join(rows) + "\n")
    prompt = "\n" + convert.LETTER_PROMPT
    first = "Which?\nA. red\nB. blue" + prompt
    assert len(source) == 3 and source[0].parts == [("user", [0, first]), ("assistant", ["B"])]
    assert colour_of(source[0].images[0]) == (0, 0, 255)
    second = 'Look.\nTwo\nlines, "quoted"\there?\nA. yes\nB. no\nC. perhaps' + prompt
    assert source[1].parts[0] == ("user", [0, second])
    assert source[2].parts == [("user", [0, "Again?"]), ("assistant", ["green"])]
    assert colour_of(source[2].images[0]) == (0, 0, 255)  # a number is the index of the row that has it


def test_broken_rows_of_a_table_are_named(tmp_path):
    rows = ["4\tx", "6\t7\tNo?\tA", "7\t6\tNo?\tA", "8\t99\tNo?\tA"]
    path = write(tmp_path / "x.tsv", "\n".join(["index\timage\tquestion\tanswer", *rows]))
    table = convert.open_table(path)
    messages = ["line 2: 2 cells, but the header names 4", *["refers back"] * 2, "index 99, which no row has"]
    for i, words in enumerate(messages):
        with pytest.raises(data.BadRecord, match=f"x.tsv line .: .*{words}|{words}"):
            table.raw(i)
    table = convert.open_table(write(tmp_path / "y.tsv", 'a\tb\n1\t"open\n2\tx\n'))
    with pytest.raises(data.BadRecord, match="its quotes do not close"):
        table.raw(0)


def test_quotes_of_a_table_are_read_as_the_csv_module_reads_them(tmp_path):
    rows = ["index\timage\tquestion", '1\t\tA 5" pipe?', "2\t\tB?", '3\t\t"C\nD?"', "4\t\tE?"]
    table = convert.open_table(write(tmp_path / "x.tsv", "\n".join(rows)))
    assert [table.raw(i)[0]["question"] for i in range(4)] == ['A 5" pipe?', "B?", "C\nD?", "E?"]
    rng = random.Random(0)
    for n in range(100):
        cells = [["".join(rng.choices('ab"\n,', k=rng.randrange(6))) for _ in "xyz"] for _ in range(9)]
        buffer = io.StringIO(newline="")
        csv.writer(buffer, delimiter="\t", lineterminator="\n").writerows([["x", "y", "z"], *cells])
        table = convert.open_table(write(tmp_path / f"{n}.tsv", buffer.getvalue()))
        assert [[*table.raw(i)[0].values()] for i in range(len(table))] == cells


def test_parquet_of_the_hub(tmp_path, capsys):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def image(colour: str) -> dict:
        return {"bytes": picture(colour), "path": "x.png"}

    pair = {"user": " Which colour? ", "assistant": "Red.", "source": "s"}
    rows = [{"id": f"{n}", "image": image("red"), **chat(None, "<image>\nQ?", f"{n}.")} for n in range(5)]
    tables = {
        "next": rows,
        "cauldron": [{"images": [image("red"), image("blue")], "texts": [pair, pair | {"user": "And?"}]}] * 3,
        "obelics": [{"images": [None, "http://x.org/p/a.png"], "texts": ["One.", None], "metadata": "[]"}],
        "caption": [{"image": image("green"), "caption": "green"}],
    }
    tables["next"][4] = {"id": "4", "image": None, **chat(None, "Q?", "4.")}
    answer = ("assistant", ["Red."])
    both = [("user", [0, 1, "Which colour?"]), answer, ("user", ["And?"]), answer]
    expected = {
        "next": ("chat", [("user", [0, "Q?"]), ("assistant", ["0."])], ["red"]),
        "cauldron": ("chat", both, ["red", "blue"]), "obelics": ("interleaved", ["One.", 0], ["blue"]),
        "caption": ("caption", [0, "green"], ["green"]),
    }  # fmt: skip
    write(tmp_path / "web" / "x.org" / "p" / "a.png", picture("blue"))
    cfg = convert.ConvertConfig(images=str(tmp_path / "web"), per_tar=3)
    for name, rows in tables.items():
        path, out = tmp_path / f"{name}.parquet", tmp_path / name
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        table = convert.open_table(path)
        assert [table.raw(i)[0] for i in reversed(range(len(table)))] == pq.read_table(path).to_pylist()[::-1]
        assert convert.convert(path, out, cfg) == 0
        assert f"{len(rows)} records, {len(rows)} of them converted now" in capsys.readouterr().out
        source, (kind, parts, colours) = data.FileSource(out), expected[name]
        assert (source.kind, len(source), source[0].parts) == (kind, len(rows), parts), name
        shown = [colour_of(image) for image in source[0].images]
        assert shown == [colour_of(picture(colour)) for colour in colours]
    last = data.FileSource(tmp_path / "next")[4]
    assert last.parts == [("user", ["Q?"]), ("assistant", ["4."])] and last.images == []
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "next").iterdir()}
    assert convert.convert(tmp_path / "next.parquet", tmp_path / "next", cfg) == 0
    assert "5 records, 0 of them converted now" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds another conversion"):
        convert.convert(tmp_path / "next.parquet", tmp_path / "next", convert.ConvertConfig(cfg.images, 4))
    assert {file: file.stat().st_mtime_ns for file in before} == before  # a repeated call goes on
    with pytest.raises(UserError, match="x.parquet is no parquet file that can be read"):
        convert.open_table(write(tmp_path / "x.parquet", b"PAR1 and nothing"))


def test_parquet_without_pyarrow_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="x.parquet: reading parquet needs pyarrow: pip install pyarrow"):
        convert.open_table(write(tmp_path / "x.parquet", b"PAR1"))


def test_what_training_reads_survives_conversion(tmp_path):
    write(tmp_path / "a.gif", picture("red", "GIF"))
    write(tmp_path / "b.bmp", picture("blue", "BMP"))
    members = {"0.json": json.dumps(chat("any.png")).encode(), "0.png": picture("green")}
    contents = {
        "llava.jsonl": [chat(["a.gif", "b.bmp"], "<image><image> Same?")],
        "plural.jsonl": [{"images": ["a.gif"], "conversations": turns("<image>Q?", "A.")}],
        "text.json": [chat(None, "Say <image>.")], "captioned.jsonl": [{"image": "a.gif", "caption": "red"}],
        "document.jsonl": [{"images": [None, "b.bmp"], "texts": ["One.", None]}], "words.txt": "Some words.",
        "tar.tar": write_tar(tmp_path / "x.tar", members).read_bytes(),
    }  # fmt: skip
    for name, content in contents.items():
        tarred, source = converted(tmp_path / name, content), data.FileSource(tmp_path / name)
        assert (source.kind, source[0].parts) == (tarred.kind, tarred[0].parts), name
        assert [colour_of(i) for i in source[0].images] == [colour_of(i) for i in tarred[0].images], name


@pytest.mark.parametrize("record, words", [
    ({"text_list": "a", "image_info": []}, "'text_list' must be a list of texts"),
    ({"text_list": ["a", None], "image_info": []}, "'text_list' must be a list of texts"),
    ({"text_list": ["a"], "image_info": {}}, "'image_info' one of objects"),
    ({"text_list": ["a"], "image_info": [5]}, "'matched_text_index' below 1"),
    (MMC4 | {"text_list": ["a"]}, "'matched_text_index' below 1, got"),
    ({"text_list": ["a"], "image_info": [{"matched_text_index": 0}]}, "an image needs 'image_name'"),
    ({"images": 5, "texts": [{"user": "a", "assistant": "b"}]}, "'images' must be a list"),
    ({"images": [], "texts": [{"user": "a", "assistant": None}]}, "must have 'user' and 'assistant'"),
    ({"images": ["a.png"], "texts": [{"user": "<image>?", "assistant": "b"}]}, "holds the text <image>"),
    ({"image": "?" * 5000, "question": "Q?", "answer": "A"}, "is not base64"),
    ({"image": "", "question": "Q?", "answer": "nan"}, "no answer"), (chat("gone.png"), "No such file"),
    ({"txt": "a", "n": 1}, "no record that is known here, it has txt, n"),
])  # fmt: skip
def test_broken_records_are_counted_and_named(tmp_path, record, words, capsys):
    path = write(tmp_path / "x.jsonl", [record])
    assert convert.convert(path, tmp_path / "out", convert.ConvertConfig()) == 1
    out = capsys.readouterr().out
    assert "1 could not be used" in out and "x.jsonl line 1: " in out and words in out


@pytest.mark.parametrize("words", [[], ["x.parquet"], ["--per_tar", "3"], ["x.parquet", "--per_tar"]])
def test_a_command_without_in_and_out_is_one_sentence(words):
    with pytest.raises(UserError, match="what to convert, and where to|needs a value|unknown flag"):
        convert.main(words)
    with pytest.raises(UserError, match="nowhere.parquet: no such file"):
        convert.main(["nowhere.parquet", "out"])
