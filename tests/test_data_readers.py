"""Files of records: text, interleaved documents, captions and chats; offsets; mixtures and their shares."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

import data
import model
from model import UserError

TOKENIZER = data.Tokenizer.from_pretrained(model.ASSETS / "scenes.tiktoken")
MIXTURES = model.ASSETS / "mixtures"
CHAT = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red."}]}
CAPTION = {
    "image": "a.png",
    "conversations": [{"from": "human", "value": "Tell.\n<image>"}, {"from": "gpt", "value": "A ring."}],
}
OBELICS = {"images": ["a.png", None, None, "b/c.png", "d.png"], "texts": [None, "One.", "Two.", None, None]}
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
EXAMPLE = {"chat": CHAT, "caption": CAPTION, "interleaved": OBELICS, "text": {"text": "Some words."}}


def write(path: Path, records: list) -> str:
    """JSON or JSON lines, by the name of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records) if lines else json.dumps(records))
    return str(path)


def mixture(folder: Path, *entries: dict, stage: str = "pretrain", files: bool = True) -> list:
    """Sources of a mixture for which files of the right kind are written first."""
    for entry in entries if files else []:
        if "path" in entry and entry["path"] != "scenes" and not (folder / entry["path"]).exists():
            write(folder / entry["path"], [EXAMPLE[entry["kind"]]])
    return data.open_sources(write(folder / "mix.json", [*entries]), stage)


# --- Layouts
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_every_layout_becomes_its_kind_of_record(tmp_path, suffix):
    def read(name: str, record: dict) -> data.Record:
        ((source, weight),) = data.open_sources(write(tmp_path / (name + suffix), [record]), "pretrain")
        assert weight == 1 and source.name == name and len(source) == 1 and source.kind == source[0].kind
        return source[0]

    obelics = read("obelics", OBELICS)
    assert obelics.kind == "interleaved" and obelics.parts == [0, "One.\n\nTwo.", 1, 2]
    assert obelics.images == [tmp_path / "a.png", tmp_path / "b" / "c.png", tmp_path / "d.png"]
    mmc4 = read("mmc4", MMC4)
    assert mmc4.kind == "interleaved" and mmc4.parts == [0, "Zero. One.", 1, 2, "Two. Three."]
    assert [path.name for path in mmc4.images] == ["a.png", "c.png", "d.png"]
    text = read("text", {"text": "Say <image>,\r\n\n<|end|>.", "url": "http://x"})
    assert text.kind == "text" and text.parts == ["Say <image>,\r\n\n<|end|>."] and text.images == []
    chat = read("chat", CAPTION)
    assert chat.kind == "chat" and chat.images == [tmp_path / "a.png"]
    assert chat.parts == [("user", [0, "Tell."]), ("assistant", ["A ring."])]
    ((caption, _),) = mixture(tmp_path, {"kind": "caption", "path": "chat" + suffix, "images": "pictures"})
    assert caption[0].kind == "caption" and caption[0].parts == [0, "A ring."]
    assert caption[0].images == [tmp_path / "pictures" / "a.png"]


def test_all_text_of_a_document_is_supervised_and_images_stand_at_their_place(tmp_path):
    ((source, _),) = data.open_sources(write(tmp_path / "x.jsonl", [MMC4]), "pretrain")
    laid = data.lay_out(data.pieces_of(source[0], TOKENIZER), [np.arange(4)] * 9)
    words = TOKENIZER.bpe.decode(laid.targets[laid.targets >= 0].tolist())
    assert words == " Zero. One. Two. Three.<|end|>"
    first, second = len(TOKENIZER.encode("Zero. One.")), len(TOKENIZER.encode("Two. Three."))
    assert (laid.slot >= 0).tolist() == [True] * 4 + [False] * first + [True] * 8 + [False] * (second + 1)


def test_documents_of_plain_text_are_separated_by_blank_lines(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffEins\r\nzwei  \r\n \t\r\n\r\n\r\nDrei\r\n\r\nvier: \u2028\u00fc".encode())
    ((source, _),) = data.open_sources(str(path), "sft")
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
    ((source, _),) = data.open_sources(str(path), "pretrain")
    assert len(source) == len(texts) and source.table.starts[0].dtype == np.int64
    order = np.random.default_rng(0).permutation(len(texts))
    assert [source[i].parts[0] for i in order] == [texts[i] for i in order]
    assert [int(source[i].name.split()[-1]) for i in range(len(texts))] == [1, 2, 6, 7, 8, 9]


def test_a_file_is_scanned_once_until_it_changes(tmp_path):
    path = tmp_path / "x.jsonl"
    write(path, [{"text": "a"}])
    first = data.FileSource(path).table
    assert data.FileSource(path).table.starts[0] is first.starts[0]
    write(path, [{"text": "a"}, {"text": "b"}])
    assert len(data.FileSource(path)) == 2 and data.FileSource(path)[1].parts == ["b"]


def test_forked_workers_read_one_file_at_the_same_time(tmp_path):
    """The file is open before the fork: with a position shared by all, records would be mixed up."""
    texts = [f"{i} " * (1 + i % 400) for i in range(3000)]
    ((source, _),) = data.open_sources(write(tmp_path / "x.jsonl", [{"text": t} for t in texts]), "pretrain")
    assert source[7].parts == [texts[7]]
    order = np.random.default_rng(0).permutation(3000).tolist()
    loader = DataLoader(source, None, sampler=order, num_workers=2, multiprocessing_context="fork")
    for i, record in zip(order, loader):
        assert record.parts == [texts[i]] and source[i].parts == [texts[i]]


# --- Broken input
@pytest.mark.parametrize(
    "line, words",
    [
        (
            b'{"text": "a"',
            "line 3 column 13: not JSON (Expecting ',' delimiter), and each record must be on one",
        ),
        (b'{"text": "\xff"}', "line 3: byte 10 is not UTF-8"),
        (b"[" * 100000, "line 3 column 1: not JSON (nested too deeply)"),
        (b"[1]", "line 3: expected an object, got '[1]'"),
        (
            b'{"txt": "a", "n": 1}',
            "line 3: expected a record of kind text, but it has txt, n (LLaVA: conversations;",
        ),
        (b'{"text": 5}', "'text' must be a text"),
        (b'{"text": "a", "image": "a.png"}', "'text' must be a text without an image beside it"),
    ],
)
def test_broken_lines_are_named(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    ((source, _),) = data.open_sources(str(path), "pretrain")
    with pytest.raises(UserError) as error:
        source[1]
    assert words in str(error.value) and str(path) in str(error.value) and "line 3" in str(error.value)
    assert source[2].parts == ["b"]


@pytest.mark.parametrize(
    "record, words",
    [
        ({"images": [None], "texts": ["a", "b"]}, "lists of equal length"),
        ({"images": "a.png", "texts": ["a"]}, "lists of equal length"),
        ({"images": ["a.png"], "texts": ["a"]}, "place 0 must have an image or a text"),
        ({"images": ["a.png", None], "texts": [None, None]}, "place 1 must have an image or a text"),
        ({"images": [None], "texts": [3]}, "place 0 must have"),
        ({"images": [3], "texts": [None]}, "an image must be the path of a file, got 3"),
        (
            {"images": ["https://x.org/a.png"], "texts": [None]},
            "https://x.org/a.png is a URL: download it first",
        ),
        ({"text_list": "a", "image_info": []}, "'text_list' must be a list of texts"),
        ({"text_list": ["a", None], "image_info": []}, "'text_list' must be a list of texts"),
        ({"text_list": ["a"], "image_info": {}}, "'image_info' one of objects"),
        ({"text_list": ["a"], "image_info": [5]}, "'matched_text_index' below 1"),
        (
            {"text_list": ["a"], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]},
            "'matched_text_index' below 1, got",
        ),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 0}]}, "an image must be the path"),
        ({**CAPTION, "image": "http://x/a.png"}, "is a URL"),
        ({**CAPTION, "image": 7}, "an image must be the path"),
        ({"conversations": CHAT["conversations"][:1] * 2}, "must start with a human turn and an answer"),
    ],
)
def test_broken_records_are_named(tmp_path, record, words):
    source = data.FileSource(Path(write(tmp_path / "x.jsonl", [record])))
    with pytest.raises(data.BadRecord) as error:
        source[0]
    assert words in str(error.value) and "x.jsonl line 1" in str(error.value)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("x.jsonl", "", "at least one record"),
        ("x.jsonl", "\n \n", "at least one record"),
        ("x.txt", "\n", "at least one record"),
        ("x.json", "[]", "at least one record"),
        ("x.json", '{"text": "a"}', "expected a .json file to be a list"),
        ("x.json", "5", "expected a .json file to be a list"),
        ("x.csv", "a,b", "found .csv; use a file, folder or glob of one of .tar, .parquet"),
        ("x.jsonl", "[\n1]", "x.jsonl line 1 column 2: not JSON (Expecting value), and each"),
    ],
)
def test_files_without_records_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        data.open_sources(str(tmp_path / name), "pretrain")
    assert words in str(error.value) and name in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        data.open_sources(str(tmp_path / "other.json"), "pretrain")


# --- Mixtures
@pytest.mark.parametrize(
    "kinds, expected",
    [
        ("interleaved caption text", [0.45, 0.45, 0.1]),
        ("caption interleaved caption text caption", [0.15, 0.45, 0.15, 0.1, 0.15]),
        ("text text", [0.5, 0.5]),
        ("text caption", [10 / 55, 45 / 55]),
        ("chat text chat", [45 / 110, 10 / 55, 45 / 110]),
        ("chat caption interleaved text", [45 / 145, 45 / 145, 45 / 145, 10 / 145]),
    ],
)
def test_shares_of_a_mixture_without_weights_are_those_of_mm1(tmp_path, kinds, expected):
    entries = [{"kind": kind, "path": f"{kind}.jsonl"} for kind in kinds.split()]
    sources = mixture(tmp_path, *entries)
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
    assert isinstance(sources[3][0], data.Scenes) and sources[3][0][5] == data.Scenes("interleaved")[5]
    order = data.SampleOrder([len(s) for s, _ in sources], [w for _, w in sources], 0)
    counts = np.bincount([order.source(n) for n in range(20000)], minlength=4) / 20000
    assert counts == pytest.approx(np.array([3, 1.5, 0, 7]) / 11.5, abs=0.015)


def test_scenes_alone_are_named_too():
    for stage in ("pretrain", "sft"):
        sources = data.open_sources("scenes", stage)
        assert [(s.kind, w) for s, w in sources] == data.SCENES_MIX[stage]
        assert all(s.name == "scenes" for s, _ in sources)


def test_sources_of_any_kind_make_batches(tmp_path):
    """Files of all four kinds through the stream that training reads."""
    for name in ("a.png", "b/c.png", "d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data.render(data.make_scene("train", 1), 64).save(tmp_path / name)
    sources = mixture(tmp_path, *({"kind": kind, "path": f"{kind}.jsonl"} for kind in EXAMPLE))
    cfg = model.ModelConfig(vit=model.ViTConfig(image_size=64))
    for source, _ in sources:
        record = source[0]
        sample = (data.pieces_of(record, TOKENIZER), data.load_images(record.images, cfg, record.name))
        batch = data.make_batch([sample], ["full"], cfg, 512, 999)
        slots = cfg.visual_tokens() * {"caption": 1, "interleaved": 3}.get(source.kind, 0)
        assert int(batch.student.slot_mask.sum()) == slots and len(batch.student.targets) > 1


TEXT = {"kind": "text", "path": "t.jsonl"}


@pytest.mark.parametrize(
    "entries, stage, words",
    [
        ([TEXT | {"weight": 1}, TEXT, TEXT], "pretrain", "entries 1, 2 have no weight, others have"),
        ([TEXT | {"weight": 0}] * 2, "pretrain", "all weights are 0"),
        (
            [TEXT, TEXT | {"wieght": 3}],
            "pretrain",
            "entry 1: unknown key 'wieght', the closest one is 'weight'",
        ),
        ([TEXT | {"image": "x"}], "pretrain", "entry 0: unknown key 'image', the closest one is 'images'"),
        ([TEXT | {"name": 3}], "pretrain", "entry 0: name 3 is not a text"),
        ([TEXT | {"weight": -1}], "pretrain", "entry 0: weight -1 is not a number of at least 0"),
        ([TEXT | {"weight": "1"}], "pretrain", "entry 0: weight '1' is not a number"),
        ([TEXT | {"weight": float("nan")}], "pretrain", "entry 0: weight nan"),
        ([TEXT | {"weight": float("inf")}], "pretrain", "entry 0: weight inf"),
        ([TEXT | {"images": "x"}], "pretrain", "entry 0: 'images' has no effect"),
        ([{"kind": "caption", "path": "scenes", "images": "x"}], "pretrain", "'images' has no effect"),
        ([TEXT | {"kind": "video"}], "pretrain", "entry 0: kind 'video' is not known, use chat, caption"),
        ([TEXT | {"kind": ["text"]}], "pretrain", "entry 0: kind '['text']' is not known"),
        ([{"path": "t.jsonl"}], "pretrain", "entry 0: kind 'None' is not known"),
        ([TEXT, {"kind": "text"}], "pretrain", "entry 1: expected an object with kind and path"),
        ([TEXT, 5], "pretrain", "line 1 column 39: not JSON (an object was expected)"),
        ([TEXT, TEXT | {"kind": "interleaved"}], "sft", "entry 1: interleaved data is for stage 1"),
        ([{"kind": "interleaved", "path": "scenes"}], "sft", "entry 0: interleaved data is for stage 1"),
    ],
)
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
    if kind in data.LAYOUTS[data.layout_of(EXAMPLE[layout])][1]:  # captions and chats are both conversations
        assert mixture(tmp_path, entry)[0][0].kind == kind
        return
    with pytest.raises(UserError, match=f"x.jsonl line 1: expected a record of kind {kind}, but it has"):
        mixture(tmp_path, entry)


def test_files_that_are_missing_are_named_all_at_once(tmp_path):
    write(tmp_path / "t.jsonl", [{"text": "a"}])
    gone = [{"kind": "text", "path": name} for name in ("a/b.jsonl", "c.jsonl", "c.jsonl")]
    with pytest.raises(UserError) as error:
        mixture(tmp_path, gone[0], TEXT, {"kind": "text", "path": "scenes"}, *gone[1:], files=False)
    words = f"these files are missing in {tmp_path}: a/b.jsonl, c.jsonl; put them there"
    assert str(error.value) == f"{tmp_path / 'mix.json'}: {words}"


def test_stage_2_takes_all_but_interleaved_documents(tmp_path):
    for kind, example in EXAMPLE.items():
        spec = write(tmp_path / f"{kind}.jsonl", [example])
        assert data.open_sources(spec, "pretrain")
        if kind == "interleaved":
            with pytest.raises(UserError, match="interleaved data is for stage 1"):
                data.open_sources(spec, "sft")
        else:
            assert data.open_sources(spec, "sft")
    kinds = ["chat", "text", "caption"]
    sources = mixture(tmp_path, *({"kind": kind, "path": f"{kind}.jsonl"} for kind in kinds), stage="sft")
    assert [source.kind for source, _ in sources] == kinds


def test_a_list_of_chats_with_other_keys_is_no_mixture(tmp_path):
    spec = write(tmp_path / "x.json", [CHAT | {"path": "from/here", "kind": "talk"}])
    ((source, _),) = data.open_sources(spec, "sft")
    assert source.kind == "chat" and source[0].parts[1] == ("assistant", ["Red."])


# --- The shipped mixtures
MM1 = {"interleaved": 0.45, "caption": 0.45, "text": 0.10}  # section 3 of the paper
SHIPPED = {
    "mm1_pretrain": ("pretrain", MM1),
    "scenes_mm1": ("pretrain", MM1),
    "mm1_sft": ("sft", {"chat": 1}),
    "llava_1.5_sft": ("sft", {"chat": 1}),
}


def shipped(folder: Path, name: str) -> list:
    """The sources of a shipped mixture, with files of one record at the paths it names."""
    shutil.copy(MIXTURES / f"{name}.json", folder)
    for entry in json.loads((MIXTURES / f"{name}.json").read_text()):
        if entry["path"] != "scenes":
            write(folder / entry["path"], [EXAMPLE[entry["kind"]]])
    return data.open_sources(str(folder / f"{name}.json"), SHIPPED[name][0])


def test_every_shipped_mixture_is_tested():
    assert {path.name for path in MIXTURES.iterdir()} == {f"{name}.json" for name in SHIPPED}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_mixtures_open_and_have_their_shares(tmp_path, name):
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


def test_the_mixture_of_scenes_works_where_it_lies():
    sources = data.open_sources(str(MIXTURES / "scenes_mm1.json"), "pretrain")
    assert all(isinstance(source, data.Scenes) for source, _ in sources)
    with pytest.raises(UserError, match="files are missing in .*mixtures: cc3m/captions.jsonl, cc12m"):
        data.open_sources(str(MIXTURES / "mm1_pretrain.json"), "pretrain")
