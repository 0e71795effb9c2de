"""Tokenizers of other families: small hand-made ones, and the real vocabularies of Llama-3 and Qwen (slow).

Two oracles: `reference_ids`, byte-pair encoding as it is defined, and Hugging Face's `tokenizers`.
The vocabularies of GPT-2 and SmolLM2 are in no package on PyPI that we know of, so small ones of their shape
stand in.
"""

import ast
import base64
import functools
import importlib.metadata
import json
import random
import unicodedata
from pathlib import Path

import pytest
import regex
import tokenizers

import data
import model

# As in the tokenizer.json of each family; data.py has possessive forms instead.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

OWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {b: chr(b) for b in OWN} | {b: chr(256 + n) for n, b in enumerate(sorted({*range(256)} - {*OWN}))}
MISSING = {0x05, 0x1C, 0xF1, 0xF4, 0xC0, 0xFF}  # bytes that the small SmolLM2 lacks
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
VECTORS = json.loads((Path(__file__).parent / "fixtures" / "tokenizer_vectors.json").read_text())

SAID = (
    "the hello there, hello we'll see 12 1234 red rings; it's the cat's   café é 日本 日本 hello\n\n  x\r\n"
    "is there any yellow square beside another ring? no, only words: north, south, kitchen, window!!\n"
    "x!! y!! z!! x## y## z## x \ny \nz \nx \ny\n"
)
HOSTILE = (
    "a b hello the  x é e\u0301 A\u030a ﬁ ſ 'ſ 's 'S 'LL we'Ve ' ! !! ?! _ -- 1 23 4567 ٣ ½ Ⅷ 中 日本 語 😀 "
    "👩‍👩‍👧 שלום مرحبا Việt \u00a0 \u0085 \u2028 \u3000 \u200d \ufeff \x00 \x05 \x1c \x7f \U000e0001 "
    "\U00040000 <|im_end|> <|eot_id|> <|endoftext|> <|end|> <gh_stars> [INST] http:// \\n"
).split(" ")
HOSTILE += [*SAID.split(), " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n "]


def hostile(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(HOSTILE, k=rng.randint(1, 16))) for _ in range(n)]


def pieces(text: str, kind: str) -> list[str]:
    """The text cut with the original regexes; SmolLM2's in two stages, digits first."""
    if kind == "smollm2":
        parts = [part for part in regex.split(r"(\p{N})", text) if part]
        return [piece for part in parts for piece in regex.findall(GPT2, part)]
    return regex.findall({"llama3": LLAMA3, "qwen": QWEN, "gpt2": GPT2}[kind], text)


def reference_ids(text: str, kind: str, vocab: dict, merges: list) -> list[int]:
    """Of all neighbours that are a merge join the first in the list, until none is left."""
    order = {tuple(pair): n for n, pair in enumerate(merges)}
    ids = []
    for piece in pieces(unicodedata.normalize("NFC", text) if kind == "qwen" else text, kind):
        parts = [BYTES[b] for b in piece.encode() if BYTES[b] in vocab]
        if kind == "llama3" and "".join(parts) in vocab:  # ignore_merges
            parts = ["".join(parts)]
        while pairs := [p for p in zip(parts, parts[1:]) if p in order]:
            best = min(pairs, key=order.get)
            at = list(zip(parts, parts[1:])).index(best)
            parts[at : at + 2] = ["".join(best)]
        ids += [vocab[part] for part in parts]
    return ids


@functools.cache
def small(kind: str) -> tuple[dict, list]:
    """Vocabulary and 60 merges learned from SAID, ids as the family has them."""
    merges = []
    words = [[BYTES[b] for b in piece.encode()] for piece in pieces(SAID, kind)]
    while len(merges) < 60:
        pairs = [pair for word in words for pair in zip(word, word[1:])]
        best = max(set(pairs), key=lambda pair: (pairs.count(pair), pair))
        merges.append(best)
        for word in words:
            while best in zip(word, word[1:]):
                at = list(zip(word, word[1:])).index(best)
                word[at : at + 2] = ["".join(best)]
    first = {"smollm2": [*CHATML, *(f"<special_{n}>" for n in range(3, 17))]}.get(kind, [])
    letters = [BYTES[b] for b in range(256) if not (kind == "smollm2" and b in MISSING)]
    last = {"gpt2": ["<|endoftext|>"], "llama3": ["xyzzy"]}  # this one only as a whole piece: ignore_merges
    tokens = first + letters + ["".join(pair) for pair in merges] + last.get(kind, [])
    assert len(set(tokens)) == len(tokens)
    return {token: n for n, token in enumerate(tokens)}, merges


def tokenizer_json(kind: str, vocab: dict, merges: list) -> dict:
    """As Hugging Face writes it."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    cut = byte_level | {"use_regex": True}
    if kind == "smollm2":
        cut = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, cut]}
    elif kind != "gpt2":
        split["pattern"] = {"Regex": LLAMA3 if kind == "llama3" else QWEN}
        cut = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    names = {"llama3": LLAMA, "gpt2": ["<|endoftext|>"]}.get(kind, CHATML)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [
        {"id": vocab.get(name, len(vocab) + n), "content": name, **flags} for n, name in enumerate(names)
    ]
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    bpe |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab}
    bpe |= {"ignore_merges": kind == "llama3"}
    bpe |= {"merges": merges if kind == "llama3" else [" ".join(pair) for pair in merges]}  # both ways exist
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if kind == "qwen" else None, "pre_tokenizer": cut,
        "post_processor": None, "decoder": byte_level, "model": bpe,
    }  # fmt: skip


def write_small(folder: Path, kind: str) -> dict:
    folder.mkdir(exist_ok=True)
    spec = tokenizer_json(kind, *small(kind))
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return json.loads(json.dumps(spec))


def write_vocab(folder: Path, kind: str, names=("vocab.json", "merges.txt")) -> None:
    vocab, merges = small(kind)
    (folder / names[0]).write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / names[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")


KINDS = ["llama3", "qwen", "smollm2", "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_json_agrees_with_plain_bpe_and_with_hugging_face(tmp_path, kind):
    spec = write_small(tmp_path, kind)
    ours = data.Tokenizer.from_pretrained(tmp_path)
    spec["added_tokens"] = []  # Hugging Face would find these in the text; ours takes it as ordinary text
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    texts = hostile(1500, 1) + ["", " ", SAID, "xyzzy", "xyzzyx xyzzy"]
    for text in texts:
        ids = ours.encode(text)
        assert ids == reference_ids(text, kind, *small(kind)), text
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert all(i in ours.text_ids for i in ids)
    merged = {
        i for text in texts for i in ours.encode(text) if len(ours.bpe.decode_single_token_bytes(i)) > 1
    }
    assert len(merged) > 30  # the merges were in fact used
    names = {token["content"]: token["id"] for token in write_small(tmp_path, kind)["added_tokens"]}
    assert all(ours.control(name) == [i] for name, i in names.items())
    assert ours.vocab_size == max([*small(kind)[0].values(), *names.values()]) + 1
    assert ours.start == ([names["<|begin_of_text|>"]] if kind == "llama3" else [])
    end = {"llama3": "<|eot_id|>", "gpt2": "<|endoftext|>"}.get(kind, "<|im_end|>")
    assert ours.end == names[end]
    for text in texts:
        back = unicodedata.normalize("NFC", text) if kind == "qwen" else text
        if kind == "smollm2":
            kept = bytes(b for b in back.encode() if b not in MISSING)
            back = kept.decode(errors="replace")
        noise = [*names.values(), ours.vocab_size, ours.vocab_size + 300]  # specials and rows without a token
        assert ours.decode([*noise, *ours.encode(text), *noise]) == back


@pytest.mark.parametrize("kind", ["qwen", "smollm2", "gpt2"])
@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_vocab_and_merges_are_the_same_tokenizer(tmp_path, kind, names):
    write_small(tmp_path / "json", kind)
    whole = data.Tokenizer.from_pretrained(tmp_path / "json")
    write_vocab(tmp_path, kind, names)
    if kind == "qwen":  # its special tokens stand in other files
        last = len(small(kind)[0])
        model.write_json(tmp_path / "added_tokens.json", {CHATML[1]: last + 1})
        rest = {str(last): {"content": CHATML[0]}, str(last + 2): {"content": CHATML[2]}}
        model.write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": rest})
    apart = data.Tokenizer.from_pretrained(tmp_path)
    assert (apart.ranks, apart.end, apart.vocab_size, apart.template) == (
        whole.ranks, whole.end, whole.vocab_size, whole.template,
    )  # fmt: skip
    for text in hostile(300, 2):
        assert apart.encode(text) == whole.encode(text)


def test_smollm_specials_inside_the_vocabulary_are_never_text(tmp_path):
    write_vocab(tmp_path, "smollm2")
    ours = data.Tokenizer.from_pretrained(tmp_path)
    assert min(ours.text_ids) == 17 and ours.end == 2
    for name in [*CHATML, "<special_16>"]:
        assert ours.control(name)[0] < 17 and len(ours.control(name)) == 1
        assert min(ours.encode(name)) >= 17 and ours.decode(ours.encode(name)) == name
    assert ours.encode("\x05\x1c") == []  # bytes the vocabulary lacks
    assert ours.encode("hello\x05") == ours.encode("hello")
    assert (
        ours.encode("!\x05!") == ours.encode("!!") and len(ours.encode("!!")) == 1
    )  # dropped before merging


def many_ranks(n: int) -> str:
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes([a, b, c]) for a in range(97, 157) for b in range(97, 157) for c in range(97, 157)]
    return "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens[:n]))


def test_rank_files_know_their_family_by_size(tmp_path):
    (tmp_path / "tokenizer.model").write_text(many_ranks(128_000))
    llama = data.Tokenizer.from_pretrained(tmp_path)
    assert (llama.vocab_size, llama.start, llama.end) == (128_256, [128_000], 128_009)
    assert llama.control("<|end_header_id|><|image|><|reserved_special_token_245|>") == [
        128_007,
        128_011,
        128_255,
    ]
    (tmp_path / "qwen.tiktoken").write_text(many_ranks(151_643))
    qwen = data.Tokenizer.from_pretrained(tmp_path / "qwen.tiktoken")
    assert qwen.control("<|endoftext|><|im_start|><|im_end|>") == [151_643, 151_644, 151_645]
    assert qwen.end == 151_645 and qwen.start == []
    assert qwen.encode("e\u0301") == qwen.encode("é") and llama.encode("e\u0301") != llama.encode("é")
    (tmp_path / "other.tiktoken").write_text(many_ranks(100_256))
    with pytest.raises(model.UserError, match="100256 ranks.*Llama-3"):
        data.Tokenizer.from_pretrained(tmp_path / "other.tiktoken")


def test_ours_keeps_its_ids():
    ours = data.Tokenizer.from_pretrained(model.ASSETS / "scenes.tiktoken")
    ranks = len((model.ASSETS / "scenes.tiktoken").read_text().splitlines())
    assert ours.control("<|end|><|user|><|assistant|>") == [ranks, ranks + 1, ranks + 2]
    assert (ours.end, ours.vocab_size, ours.start) == (ranks, ranks + 3, [])
    assert ours.bpe.decode(ours.encode("red ring")) == " red ring"
    assert ours.decode(ours.encode(" red ring")) == " red ring"


def labels(turns: list, tokenizer: data.Tokenizer) -> tuple[list, list]:
    ids, kept = [], []
    for piece, supervised in data.chat_pieces(turns, tokenizer):
        ids += piece
        kept += piece if supervised else [-100] * len(piece)
    return ids, kept


TURNS = [("system", ["Be brief."]), ("user", ["What is it?"]), ("assistant", ["A cat."])]
SAID_AS = {
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is it?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>",
    "qwen": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n"
    "<|im_start|>assistant\nA cat.<|im_end|>\n",
    "gpt2": "Be brief. USER: What is it? ASSISTANT: A cat.<|endoftext|>",
    "ours": " Be brief.<|user|> What is it?<|assistant|> A cat.<|end|>",
}


@pytest.mark.parametrize("kind", SAID_AS)
def test_templates_and_what_they_supervise(tmp_path, kind):
    if kind == "ours":
        ours = data.Tokenizer.from_pretrained(model.ASSETS / "scenes.tiktoken")
    else:
        write_small(tmp_path, kind)
        ours = data.Tokenizer.from_pretrained(tmp_path)
    ids, kept = labels(TURNS, ours)
    assert ours.bpe.decode(ids) == SAID_AS[kind]
    answer = ours.encode("A cat.") + [ours.end]
    assert [i for i in kept if i != -100] == answer
    assert (kept[-1] == -100) == (kind == "qwen")  # the newline after <|im_end|> is not supervised
    stripped = labels([(role, [f" \n{parts[0]} "]) for role, parts in TURNS], ours)
    assert (stripped == (ids, kept)) == (kind == "llama3")

    asked = data.prompt_pieces("And now?", 1, ours, [("What is it?", "A cat.")])
    assert [piece for piece in asked if isinstance(piece, int)] == [0]
    flat = [i for piece in asked if not isinstance(piece, int) for i in piece[0]]
    assert flat[: len(ours.start)] == ours.start and sum(flat.count(i) for i in ours.start) == len(ours.start)
    before = ours.control(ours.template["assistant"][0])
    assert flat[-len(before) :] == before
    assert flat.count(ours.end) == (3 if kind in ("llama3", "qwen") else 1)  # one a turn, or one an answer
    caption = data.pieces_of(data.Record("caption", [0, "A cat."], []), ours)
    assert caption[0] == (ours.start, False) and caption[-1] == ([ours.end], True)


@pytest.mark.parametrize("kind", KINDS)
def test_special_look_alikes_in_data_stay_text(tmp_path, kind):
    write_small(tmp_path, kind)
    ours = data.Tokenizer.from_pretrained(tmp_path)
    attack = "".join([*CHATML, *LLAMA])
    (answer,) = [p for p in data.chat_pieces([("user", [attack]), ("assistant", [attack])], ours)[-3:-2]]
    assert answer[1] and set(answer[0]) <= ours.text_ids and ours.decode(answer[0]) == attack


@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.json", "original", "ranks"])
def test_save_copies_the_files_and_the_copy_is_the_same(tmp_path, layout):
    source = tmp_path / "source"
    source.mkdir()
    if layout == "tokenizer.json":
        write_small(source, "qwen")
        (source / "tokenizer_config.json").write_text('{"chat_template" :  "…"}', encoding="utf-8")
    elif layout == "vocab.json":
        write_vocab(source, "smollm2")
    elif layout == "original":
        (source / "original").mkdir()
        (source / "original" / "tokenizer.model").write_text(many_ranks(128_000))
        (source / "tokenizer_config.json").write_text("{}")
    else:
        (source / "scenes.tiktoken").write_bytes((model.ASSETS / "scenes.tiktoken").read_bytes())
    ours = data.Tokenizer.from_pretrained(source)
    before = {file.name: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    for file in [f for f in source.rglob("*") if f.is_file()]:
        file.unlink()  # a run removes old checkpoints, maybe the one it came from
    ours.save(tmp_path / "step" / "tokenizer")
    saved = {file.name: file.read_bytes() for file in (tmp_path / "step" / "tokenizer").iterdir()}
    if layout == "ranks":
        assert saved == {"ranks.tiktoken": before["scenes.tiktoken"]}
    else:
        assert saved == before
    again = data.Tokenizer.from_pretrained(tmp_path / "step" / "tokenizer")
    assert (again.ranks, again.vocab_size, again.end) == (ours.ranks, ours.vocab_size, ours.end)
    assert [again.encode(text) for text in hostile(100, 3)] == [ours.encode(text) for text in hostile(100, 3)]


def llama2_json(spec: dict) -> None:
    spec["model"]["byte_fallback"] = True
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}
    spec["pre_tokenizer"] = None


def swap_merges(spec: dict) -> None:
    merges = spec["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


REFUSED = {
    "llama2": (llama2_json, "SentencePiece.*Llama-3, Qwen2/2.5/3, SmolLM2 and GPT-2"),
    "unigram": (lambda spec: spec["model"].update(type="Unigram"), "SentencePiece.*Llama-3"),
    "metaspace": (lambda s: s.update(pre_tokenizer={"type": "Metaspace"}), "SentencePiece.*Llama-3"),
    "clip": (lambda spec: spec["model"].update(end_of_word_suffix="</w>"), "not plain byte-level.*Llama-3"),
    "lower case": (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "normalizer.*Lowercase"),
    "space": (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "cuts text.*add_prefix_space"),
    "no cut": (lambda s: s["pre_tokenizer"].update(use_regex=False), "cuts text"),
    "order": (swap_merges, "comes after one of a higher id"),
    "unknown merge": (lambda spec: spec["model"]["merges"].append("zz zz"), "'zz' 'zz' has parts"),
    "no end": (lambda s: (s["model"]["vocab"].pop("<|endoftext|>"), s.update(added_tokens=[])), "end tokens"),
    "twice": (lambda spec: spec["model"]["vocab"].update({"<x>": 3}), "stands for two tokens"),
    "no model": (lambda spec: spec.pop("model"), "KeyError: 'model'"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_tiktoken_cannot_run_exactly_is_refused_in_one_sentence(tmp_path, what):
    change, words = REFUSED[what]
    spec = json.loads(json.dumps(tokenizer_json("gpt2", *small("gpt2"))))
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    data.Tokenizer.from_pretrained(tmp_path)  # unchanged it loads
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(model.UserError, match=words) as error:
        data.Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x08\xe2\x96\x81the"
BROKEN = {
    "nothing": ({}, "holds 0 tokenizers: give.*tokenizer.json"),
    "two": ({"a.tiktoken": b"YQ== 0\n", "b.tiktoken": b"YQ== 0\n"}, "holds 2 tokenizers"),
    "binary": ({"tokenizer.model": SENTENCEPIECE}, "SentencePiece.*Llama-3"),
    "base64": ({"x.tiktoken": b"YQ== 0\nYg== 1\n!!! 2\n"}, "x.tiktoken line 3: not a tiktoken rank file"),
    "number": ({"x.tiktoken": b"YQ== 0\n\nYg== one\n"}, "x.tiktoken line 3: not a tiktoken rank file"),
    "negative": ({"x.tiktoken": b"YQ== -1\n"}, "negative"),
    "twice": ({"x.tiktoken": b"YQ== 0\nYg== 0\n"}, "two tokens"),
    "empty": ({"x.tiktoken": b""}, "has 0 ranks"),
    "json": ({"tokenizer.json": b'{"model": \n'}, "tokenizer.json line 2 column 1: not valid JSON"),
    "list": ({"tokenizer.json": b"[]"}, "no usable tokenizer"),
    "merges": ({"vocab.json": b'{"a": 0, "b": 1, "ab": 2}', "merges.txt": b"a b c\n"}, "no usable tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_named(tmp_path, what):
    files, words = BROKEN[what]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(model.UserError, match=words) as error:
        data.Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(model.UserError, match="nowhere holds 0 tokenizers"):
        data.Tokenizer.from_pretrained(tmp_path / "nowhere")


def test_an_unknown_regex_is_used_as_it_stands_and_a_broken_one_refused(tmp_path):
    spec = write_small(tmp_path, "qwen")
    assert len(data.Tokenizer.from_pretrained(tmp_path).encode(" hello")) < 4
    split = spec["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = r"[a-z]{1,2}|[\s\S]"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert len(data.Tokenizer.from_pretrained(tmp_path).encode(" hello")) == 4  # " " he ll o
    split["pattern"]["Regex"] = "(["
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(model.UserError, match="no usable tokenizer"):
        data.Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_very_long_runs_do_not_panic(tmp_path, kind):
    write_small(tmp_path, kind)
    ours = data.Tokenizer.from_pretrained(tmp_path)
    for text in (" " * 10**6, "x" + " " * 10**6 + "x", "\n" * 10**6 + "x", "x" * 10**5):
        assert ours.decode(ours.encode(text)) == text


# ---------------------------------------------------------------------------------------------------------
# The real vocabularies, from the packages in requirements-vocab.txt


def packaged(package: str, name: str) -> Path:
    """A file of an installed package, which is not imported."""
    return Path(importlib.metadata.distribution(package).locate_file(name))


def real(kind: str) -> data.Tokenizer:
    files = {
        "llama3": ("llama-models", "llama_models/llama3/tokenizer.model"),
        "qwen2": ("dashscope", "dashscope/resources/qwen.tiktoken"),
    }
    return data.Tokenizer.from_pretrained(packaged(*files[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
def test_golden_ids_of_the_real_vocabularies(kind):
    ours = real(kind)
    assert len(VECTORS["strings"][kind]) == 38
    for case in VECTORS["strings"][kind]:
        assert ours.encode(case["text"]) == case["ids"], case["text"]
    for text, ids in VECTORS["external_hf_parity"][{"qwen2": "qwen2.5"}.get(kind, kind)].items():
        assert ours.encode(text) == ids, text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
def test_golden_chats_of_the_real_vocabularies(kind):
    system = {"llama3": "Be brief.", "qwen2": "You are a helpful assistant."}[kind]
    ids, kept = labels([("system", [system]), *TURNS[1:]], real(kind))
    golden = VECTORS[f"{kind}_chat"]
    assert ids == golden["ids"] and kept == golden["labels_recommended"]
    assert real(kind).bpe.decode(ids) == golden["text"]


@pytest.mark.slow
def test_llama3_special_tokens_are_those_of_its_own_code():
    tree = ast.parse(packaged("llama-models", "llama_models/llama3/tokenizer.py").read_text())
    assigned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    lists = [value for value in assigned if isinstance(value, ast.List)]
    named = next(names for names in map(ast.literal_eval, lists) if "<|begin_of_text|>" in names)
    rest = [f"<|reserved_special_token_{2 + n}|>" for n in range(256 - len(named))]
    assert real("llama3").control("".join(named + rest)) == list(range(128_000, 128_256))


def merges_of(ranks: dict[bytes, int], all_splits: bool) -> list[tuple[str, str]]:
    """Merges from ranks: the two parts a token has just before it comes up, or all pairs that make it."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        if all_splits:  # as Hugging Face made Llama-3's list
            pairs = [(token[:n], token[n:]) for n in range(1, len(token))]
            pairs = sorted(
                (pair for pair in pairs if pair[0] in ranks and pair[1] in ranks),
                key=lambda p: (ranks[p[0]], ranks[p[1]]),
            )
        else:
            parts = [bytes([b]) for b in token]
            while len(parts) > 2:
                found = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
                at = found.index(min(found))
                assert found[at] < rank, token
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            pairs = [tuple(parts)]
        merges += [tuple("".join(BYTES[b] for b in part) for part in pair) for pair in pairs]
    return merges


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
def test_hugging_face_gives_the_same_ids_and_its_folder_the_same_tokenizer(tmp_path, kind):
    ours = real(kind)
    vocab = {"".join(BYTES[b] for b in token): rank for token, rank in ours.ranks.items()}
    merges = merges_of(ours.ranks, all_splits=kind == "llama3")
    bpe = tokenizers.models.BPE(vocab, merges, ignore_merges=kind == "llama3")
    theirs = tokenizers.Tokenizer(bpe)
    cut = tokenizers.Regex(LLAMA3 if kind == "llama3" else QWEN)
    pre = tokenizers.pre_tokenizers
    theirs.pre_tokenizer = pre.Sequence(
        [pre.Split(cut, "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if kind == "qwen2":
        theirs.normalizer = tokenizers.normalizers.NFC()
    texts = hostile(8000, 4)
    golden = [case["text"] for case in VECTORS["strings"][kind]]
    expected = [theirs.encode(text, add_special_tokens=False).ids for text in texts + golden]
    assert [ours.encode(text) for text in texts + golden] == expected

    theirs.add_special_tokens(list(data.LLAMA3_SPECIAL if kind == "llama3" else data.QWEN_SPECIAL))
    theirs.save(str(tmp_path / "tokenizer.json"))
    folder = data.Tokenizer.from_pretrained(tmp_path)
    assert folder.ranks == ours.ranks and folder.bpe._special_tokens == ours.bpe._special_tokens
    assert (folder.end, folder.start, folder.vocab_size) == (ours.end, ours.start, ours.vocab_size)
    assert [folder.encode(text) for text in texts + golden] == expected
    if kind == "qwen2":  # the same without tokenizer.json; special tokens then come from the size alone
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in merges), encoding="utf-8")
        folder = data.Tokenizer.from_pretrained(tmp_path)
        assert folder.ranks == ours.ranks and folder.end == ours.end
        assert [folder.encode(text) for text in texts + golden] == expected
