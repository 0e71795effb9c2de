"""Tokenizers of every family: small hand-made ones, and the real vocabularies of Llama-3 and Qwen (slow).

Two oracles: `reference_ids`, byte-pair encoding as it is defined, and Hugging Face's `tokenizers`.
"""

import ast
import base64
import copy
import importlib.metadata
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from helpers_tokenizers import (
    BYTE_LEVEL,
    BYTES,
    CONTROL,
    LLAMA3,
    MISSING,
    QWEN,
    SENTENCEPIECE,
    TEXT,
    cut,
    hostile,
    small,
    small_tokenizer,
    tokenizer_json,
    write_tokenizer,
)

import data
import model

VECTORS = json.loads((Path(__file__).parent / "fixtures" / "tokenizer_vectors.json").read_text())
SCENES = model.ASSETS / "scenes.tiktoken"
KINDS = (*BYTE_LEVEL, *SENTENCEPIECE)
CHATML = CONTROL["qwen"]


def named(kind: str) -> data.Tokenizer:
    return data.Tokenizer.from_pretrained(SCENES) if kind == "scenes" else small_tokenizer(kind)


def reference_ids(text: str, kind: str, vocab: dict, merges: list) -> list[int]:
    """Of all neighbours that are a merge join the first in the list, until none is left."""
    order = {tuple(pair): n for n, pair in enumerate(merges)}
    ids = []
    for piece in cut(unicodedata.normalize("NFC", text) if kind == "qwen" else text, kind):
        tokens = [BYTES[b] for b in piece.encode() if BYTES[b] in vocab]
        if kind == "llama3" and "".join(tokens) in vocab:  # ignore_merges
            tokens = ["".join(tokens)]
        while pairs := [p for p in zip(tokens, tokens[1:]) if p in order]:
            best = min(pairs, key=order.get)
            at = list(zip(tokens, tokens[1:])).index(best)
            tokens[at : at + 2] = ["".join(best)]
        ids += [vocab[token] for token in tokens]
    return ids


def without_controls(kind: str) -> tokenizers.Tokenizer:
    """Hugging Face's own, which would find control tokens in a text: so it has none."""
    spec = tokenizer_json(kind)
    spec["added_tokens"] = []
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "".join(pair) != "</ s>"]
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def round_trip(text: str, kind: str) -> str:
    """What decoding gives back: composed accents, known bytes only, or no space at the beginning."""
    if kind == "qwen":
        return unicodedata.normalize("NFC", text)
    if kind == "smollm2":
        return bytes(b for b in text.encode() if b not in MISSING).decode(errors="replace")
    return text.removeprefix(" ") if kind == "metaspace" else text


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_hugging_face_and_of_plain_bpe_and_decode_to_the_text(kind):
    tokenizer, theirs = small_tokenizer(kind), without_controls(kind)
    texts = hostile(1500, 1) + ["", " ", TEXT, "xyzzy", "xyzzyx xyzzy", "a▁b"]
    noise = [*tokenizer.special.values(), tokenizer.vocab_size, tokenizer.vocab_size + 300]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        if kind in BYTE_LEVEL:
            assert ids == reference_ids(text, kind, *small(kind)), text
        if "▁" not in text or kind in BYTE_LEVEL:
            assert tokenizer.decode([*noise, *ids, *noise]) == round_trip(text, kind)
    pieces = {tokenizer.bpe.id_to_token(i) for text in texts for i in tokenizer.encode(text)}
    assert len([piece for piece in pieces if piece[0] != "<" and len(piece) > 1]) > 30  # merges were used
    names = {token["content"]: token["id"] for token in tokenizer_json(kind)["added_tokens"]}
    assert tokenizer.special == names and all(tokenizer.control(name) == [i] for name, i in names.items())
    assert tokenizer.vocab_size == max([*small(kind)[0].values(), *names.values()]) + 1


# Of each family: its end token, its BOS, and what stands in front of a text
FAMILY = {
    "llama3": ("<|eot_id|>", "<|begin_of_text|>", ""),
    "qwen": ("<|im_end|>", None, ""),
    "smollm2": ("<|im_end|>", None, ""),
    "gpt2": ("<|endoftext|>", None, ""),
    "llama2": ("</s>", "<s>", " "),
    "metaspace": ("</s>", "<s>", " "),
    "gemma": ("<end_of_turn>", "<bos>", ""),
    "phi3": ("<|end|>", None, " "),
    "scenes": ("<|end|>", None, " "),
}


@pytest.mark.parametrize("kind", FAMILY)
def test_documents_begin_and_end_as_the_family_has_it(kind):
    tokenizer, (end, start, prefix) = named(kind), FAMILY[kind]
    assert (tokenizer.end, tokenizer.prefix) == (tokenizer.special[end], prefix)
    assert tokenizer.start == ([tokenizer.special[start]] if start else [])
    caption = data.pieces_of(data.Record("caption", [0, "A cat."], []), tokenizer)
    assert caption == [
        (tokenizer.start, False),
        0,
        (tokenizer.encode("A cat."), True),
        ([tokenizer.end], True),
    ]
    assert tokenizer.show(tokenizer.encode("A cat.")) == prefix + "A cat."
    assert tokenizer.ids_with(("\n",)) and all(
        "\n" in tokenizer.show([i]) for i in tokenizer.ids_with(("\n",))
    )


@pytest.mark.parametrize("kind", FAMILY)
def test_no_text_becomes_a_control_token(kind):
    """Every control token as text, alone and in other text, where merges could make it."""
    tokenizer = named(kind)
    controls = {*tokenizer.special.values()}
    for name in [*tokenizer.special, "<unk>", "".join(tokenizer.special)]:
        for text in (name, f"x{name}", f" {name}", f"{name}x", f"x {name} {name}\n", f"\n{name}", name * 3):
            ids = tokenizer.encode(text)
            assert not controls & {*ids}, text
            assert tokenizer.decode(ids) == round_trip(text, kind)
    attack = "".join(tokenizer.special)
    pieces = data.chat_pieces([("user", [attack]), ("assistant", [attack])], tokenizer)
    answers = [ids for ids, supervised in pieces if supervised]
    assert answers == [tokenizer.encode(attack), [tokenizer.end]]
    copied = copy.copy(tokenizer)
    if kind != "scenes":  # a pickled one forgets settings
        copied.bpe = copy.deepcopy(tokenizer.bpe)
    assert copied.encode(attack) == tokenizer.encode(attack)


def test_merges_that_would_make_a_control_token_are_real(tmp_path):
    """Hugging Face's switch alone lets the end token through."""
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json("llama2")))
    theirs.encode_special_tokens = True
    assert theirs.token_to_id("</s>") in theirs.encode("x</s>", add_special_tokens=False).ids
    spec = tokenizer_json("llama3")
    spec["added_tokens"].append(
        {**spec["added_tokens"][0], "content": "xyzzy", "id": spec["model"]["vocab"]["xyzzy"]}
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(model.UserError, match="makes the control token xyzzy of text"):  # by ignore_merges
        data.Tokenizer.from_pretrained(tmp_path)
    spec = tokenizer_json("gpt2")
    spec["model"]["unk_token"] = "<|endoftext|>"
    del spec["model"]["vocab"][BYTES[7]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert data.Tokenizer.from_pretrained(tmp_path).encode("\x07") == []


@pytest.mark.parametrize("kind", ["qwen", "llama2"])
def test_added_tokens_that_are_not_special_are_found_in_text(tmp_path, kind):
    """As Qwen3's <think>, which a model writes and reads as text."""
    spec = write_tokenizer(tmp_path, kind)
    think = max([*spec["model"]["vocab"].values(), *(t["id"] for t in spec["added_tokens"])]) + 1
    flags = {**spec["added_tokens"][0], "special": False}
    spec["added_tokens"] += [{**flags, "id": think, "content": "<think>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = data.Tokenizer.from_pretrained(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("<think>hello</think>", "the <think> the", "x<think>"):
        ids = tokenizer.encode(text)
        assert think in ids and ids == theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == theirs.decode(ids)
    assert "<think>" not in tokenizer.special and tokenizer.vocab_size == think + 1


@pytest.mark.parametrize("kind", ["qwen", "smollm2", "gpt2"])
@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_vocab_and_merges_are_the_same_tokenizer(tmp_path, kind, names):
    whole = small_tokenizer(kind)
    write_vocab(tmp_path, kind, names)
    if kind == "qwen":  # its control tokens stand in other files
        last = len(small(kind)[0])
        model.write_json(tmp_path / "added_tokens.json", {CHATML[1]: last + 1})
        others = {str(last): {"content": CHATML[0]}, str(last + 2): {"content": CHATML[2]}}
        others[str(last + 3)] = {"content": "<think>", "special": False}
        model.write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": others})
    apart = data.Tokenizer.from_pretrained(tmp_path)
    assert (apart.end, apart.template) == (whole.end, whole.template)
    assert {name: apart.special[name] for name in whole.special} == whole.special
    assert apart.vocab_size == whole.vocab_size + (kind == "qwen")
    for text in hostile(300, 2):
        assert apart.encode(text) == whole.encode(text) and apart.decode(apart.encode(text)) == round_trip(
            text, kind
        )
    if kind == "qwen":
        assert len(apart.encode("<think>")) == 1


def write_vocab(folder: Path, kind: str, names=("vocab.json", "merges.txt")) -> None:
    vocab, merges = small(kind)
    (folder / names[0]).write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / names[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_smollm_specials_inside_the_vocabulary_are_never_text(tmp_path):
    write_vocab(tmp_path, "smollm2")
    tokenizer = data.Tokenizer.from_pretrained(tmp_path)
    assert sorted(tokenizer.special.values()) == [*range(17)] and tokenizer.end == 2
    for name in [*CHATML, "<special_16>"]:
        assert tokenizer.control(name)[0] < 17 and len(tokenizer.control(name)) == 1
        assert min(tokenizer.encode(name)) >= 17 and tokenizer.decode(tokenizer.encode(name)) == name
    assert tokenizer.encode("\x05\x1c") == []  # bytes the vocabulary lacks
    assert tokenizer.encode("hello\x05") == tokenizer.encode("hello")
    assert tokenizer.encode("!\x05!") == tokenizer.encode("!!")  # dropped before merging
    assert len(tokenizer.encode("!!")) == 1


def many_ranks(n: int) -> str:
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes([a, b, c]) for a in range(97, 157) for b in range(97, 157) for c in range(97, 157)]
    return "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens[:n]))


def test_rank_files_know_their_family_by_size(tmp_path):
    (tmp_path / "tokenizer.model").write_text(many_ranks(128_000))
    llama = data.Tokenizer.from_pretrained(tmp_path)
    assert (llama.vocab_size, llama.start, llama.end) == (128_256, [128_000], 128_009)
    names = "<|end_header_id|><|image|><|reserved_special_token_245|>"
    assert llama.control(names) == [128_007, 128_011, 128_255]
    (tmp_path / "qwen.tiktoken").write_text(many_ranks(151_643))
    qwen = data.Tokenizer.from_pretrained(tmp_path / "qwen.tiktoken")
    assert qwen.control("<|endoftext|><|im_start|><|im_end|>") == [151_643, 151_644, 151_645]
    assert qwen.end == 151_645 and qwen.start == []
    assert qwen.encode("e\u0301") == qwen.encode("é") and llama.encode("e\u0301") != llama.encode("é")
    (tmp_path / "other.tiktoken").write_text(many_ranks(100_256))
    with pytest.raises(model.UserError, match="100256 ranks.*Llama-3"):
        data.Tokenizer.from_pretrained(tmp_path / "other.tiktoken")


def test_that_of_scenes_keeps_its_ids():
    tokenizer = named("scenes")
    ranks = len(SCENES.read_text().splitlines())
    assert tokenizer.control("<|end|><|user|><|assistant|>") == [ranks, ranks + 1, ranks + 2]
    assert (tokenizer.end, tokenizer.vocab_size, tokenizer.start) == (ranks, ranks + 3, [])
    assert tokenizer.show(tokenizer.encode("red ring")) == " red ring"
    assert tokenizer.decode(tokenizer.encode(" red ring")) == " red ring"


# --- templates


def labels(turns: list, tokenizer: data.Tokenizer) -> tuple[list, list]:
    ids, kept = [], []
    for piece, supervised in data.chat_pieces(turns, tokenizer):
        ids += piece
        kept += piece if supervised else [-100] * len(piece)
    return ids, kept


TURNS = [("system", ["Be brief."]), ("user", ["What is it?"]), ("assistant", ["A cat."])]
CHATS = {
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is it?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>",
    "qwen": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n"
    "<|im_start|>assistant\nA cat.<|im_end|>\n",
    "gpt2": "Be brief. USER: What is it? ASSISTANT: A cat.<|endoftext|>",
    "scenes": " Be brief.<|user|> What is it?<|assistant|> A cat.<|end|>",
    "llama2": "<s> Be brief. USER: What is it? ASSISTANT: A cat.</s>",
    "metaspace": "<s> Be brief. USER: What is it? ASSISTANT: A cat.</s>",
    "gemma": "<bos><start_of_turn>user\nBe brief.<end_of_turn>\n<start_of_turn>user\nWhat is it?"
    "<end_of_turn>\n<start_of_turn>model\nA cat.<end_of_turn>\n",
    # Phi-3's tokens take the newlines behind them (rstrip)
    "phi3": "<|system|> Be brief.<|end|><|user|> What is it?<|end|><|assistant|> A cat.<|end|>",
}


@pytest.mark.parametrize("kind", CHATS)
def test_templates_and_what_they_supervise(kind):
    tokenizer = named(kind)
    ids, kept = labels(TURNS, tokenizer)
    assert tokenizer.show(ids) == CHATS[kind]
    assert [i for i in kept if i != -100] == tokenizer.encode("A cat.") + [tokenizer.end]
    assert (kept[-1] == -100) == (kind in ("qwen", "gemma"))  # the newline after the end is not supervised
    stripped = labels([(role, [f" \n{parts[0]} "]) for role, parts in TURNS], tokenizer)
    assert (stripped == (ids, kept)) == (kind in ("llama3", "gemma"))

    prompt = data.prompt_pieces("And now?", 1, tokenizer, [("What is it?", "A cat.")])
    assert [piece for piece in prompt if isinstance(piece, int)] == [0]
    flat = [i for piece in prompt if not isinstance(piece, int) for i in piece[0]]
    assert flat[: len(tokenizer.start)] == tokenizer.start
    assert sum(flat.count(i) for i in tokenizer.start) == len(tokenizer.start)
    before = tokenizer.control(tokenizer.template["assistant"][0])
    assert flat[-len(before) :] == before
    assert flat.count(tokenizer.end) == (3 if kind in ("llama3", "qwen", "gemma", "phi3") else 1)  # a turn's


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)


@pytest.mark.parametrize("kind", ["llama2", "metaspace"])
def test_a_chat_of_vicuna_has_the_ids_of_its_text_as_a_whole(kind):
    """FastChat's vicuna_v1.1; and around a picture LLaVA's tokenizer_image_token, which cuts there."""
    tokenizer, theirs = named(kind), tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(kind)))

    def whole(text: str) -> list[int]:
        return theirs.encode(text, add_special_tokens=False).ids

    answers = ["red rings", "north, the north!", "no"]
    turns = [("user", ["hello there"]), ("assistant", [answers[0]]), ("user", [" is there any ring?"])]
    turns += [("assistant", [answers[1]]), ("user", ["x</s>"]), ("assistant", [answers[2]])]
    ids, kept = labels(turns[:4], tokenizer)
    text = f"{VICUNA} USER: hello there ASSISTANT: {answers[0]}</s>USER: "
    text += f"{' ' * (kind == 'llama2')}is there any ring? ASSISTANT: {answers[1]}</s>"
    assert ids == tokenizer.start + whole(
        text
    )  # Metaspace gives a text that begins with a space no other one
    ids, kept = labels(turns, tokenizer)
    supervised = [tokenizer.encode(answer) + [tokenizer.end] for answer in answers]
    assert [i for i in kept if i != -100] == sum(supervised, [])
    assert ids.count(tokenizer.end) == 3

    pieces = data.chat_pieces([("user", [0, "\nwhat?"]), ("assistant", ["the ring"])], tokenizer)
    at = pieces.index(0)
    first, second = (sum((ids for ids, _ in part), []) for part in (pieces[:at], pieces[at + 1 :]))
    assert first == tokenizer.start + whole(f"{VICUNA} USER: ")
    assert second == whole("\nwhat? ASSISTANT: the ring</s>")
    prompt = data.prompt_pieces("what?", 0, tokenizer, [("hello", "no")])
    assert sum((ids for ids, _ in prompt), []) == tokenizer.start + whole(
        f"{VICUNA} USER: hello ASSISTANT: no</s>USER: what? ASSISTANT:"
    )
    brief = labels([("system", ["Be brief."]), *turns[:2]], tokenizer)[0]
    assert brief == tokenizer.start + whole(f"Be brief. USER: hello there ASSISTANT: {answers[0]}</s>")


# --- files


@pytest.mark.parametrize("layout", ["tokenizer.json", "llama2", "vocab.json", "original", "ranks"])
def test_save_copies_the_files_and_the_copy_is_the_same(tmp_path, layout):
    source = tmp_path / "source"
    source.mkdir()
    if layout in ("tokenizer.json", "llama2"):
        write_tokenizer(source, "llama2" if layout == "llama2" else "qwen")
        (source / "tokenizer_config.json").write_text('{"chat_template" :  "…"}', encoding="utf-8")
    elif layout == "vocab.json":
        write_vocab(source, "smollm2")
    elif layout == "original":
        (source / "original").mkdir()
        (source / "original" / "tokenizer.model").write_text(many_ranks(128_000))
        (source / "tokenizer_config.json").write_text("{}")
    else:
        (source / "scenes.tiktoken").write_bytes(SCENES.read_bytes())
    tokenizer = data.Tokenizer.from_pretrained(source)
    before = {file.name: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    for file in [f for f in source.rglob("*") if f.is_file()]:
        file.unlink()  # a run removes old checkpoints, maybe the one it came from
    tokenizer.save(tmp_path / "step" / "tokenizer")
    saved = {file.name: file.read_bytes() for file in (tmp_path / "step" / "tokenizer").iterdir()}
    if layout == "ranks":
        assert saved == {"ranks.tiktoken": before["scenes.tiktoken"]}
    else:
        assert saved == before
    again = data.Tokenizer.from_pretrained(tmp_path / "step" / "tokenizer")
    assert (again.special, again.vocab_size, again.end) == (
        tokenizer.special,
        tokenizer.vocab_size,
        tokenizer.end,
    )
    assert [again.encode(text) for text in hostile(100, 3)] == [
        tokenizer.encode(text) for text in hostile(100, 3)
    ]


BAD_SPLIT = {"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False}
REFUSED = {
    "unigram": (lambda spec: spec["model"].update(type="Unigram"), "Unigram, only BPE"),
    "unknown merge": (lambda spec: spec["model"]["merges"].append("zz zz"), "zz.*out of vocabulary"),
    "no end": (lambda spec: spec.update(added_tokens=[]), "end tokens"),
    "no model": (lambda spec: spec.pop("model"), "KeyError: 'model'"),
    "regex": (lambda spec: spec.update(pre_tokenizer=BAD_SPLIT), "holds no usable"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_work_is_refused_in_one_sentence(tmp_path, what):
    change, words = REFUSED[what]
    spec = write_tokenizer(tmp_path, "gpt2")
    data.Tokenizer.from_pretrained(tmp_path)  # unchanged it loads
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(model.UserError, match=words) as error:
        data.Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


SENTENCEPIECE_MODEL = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x08\xe2\x96\x81the"
CONVERT = (
    r"pip install transformers sentencepiece protobuf.*AutoTokenizer.from_pretrained\('.*'\).save_pretrained"
)
BROKEN = {
    "nothing": ({}, "holds 0 tokenizers: give.*tokenizer.json"),
    "two": ({"a.tiktoken": b"YQ== 0\n", "b.tiktoken": b"YQ== 0\n"}, "holds 2 tokenizers"),
    "sentencepiece": ({"tokenizer.model": SENTENCEPIECE_MODEL}, CONVERT),
    "base64": ({"x.tiktoken": b"YQ== 0\nYg== 1\n!!! 2\n"}, "no usable tokenizer"),
    "number": ({"x.tiktoken": b"YQ== 0\n\nYg== one\n"}, "no usable tokenizer.*one"),
    "negative": ({"x.tiktoken": b"YQ== -1\n"}, "count up from 0"),
    "twice": ({"x.tiktoken": many_ranks(255).encode() + b"/w== 254\n"}, "count up from 0"),
    "a byte": ({"x.tiktoken": many_ranks(255).encode()}, "every byte"),
    "empty": ({"x.tiktoken": b""}, "every byte"),
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


def test_settings_of_a_file_that_change_texts_do_not_count(tmp_path):
    """Some files on the hub have been saved with a truncation and a padding."""
    spec = write_tokenizer(tmp_path, "qwen")
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None}
    spec["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert data.Tokenizer.from_pretrained(tmp_path).encode(TEXT) == small_tokenizer("qwen").encode(TEXT)


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "llama2", "scenes"])
def test_very_long_runs_do_not_panic(kind):
    tokenizer = named(kind)
    for text in (" " * 10**6, "x" + " " * 10**6 + "x", "\n" * 10**6 + "x", "x" * 10**5):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_it_works_in_forked_processes_without_a_word(tmp_path):
    write_tokenizer(tmp_path, "llama2")
    code = (
        "import multiprocessing, sys, data\n"
        "tokenizer = data.Tokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer.encode('hello there')\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "    assert pool.map(tokenizer.encode, ['hello there'] * 4) == [ids] * 4\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    root = Path(data.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=env, cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---------------------------------------------------------------------------------------------------------
# The real vocabularies, from the packages in requirements-vocab.txt


def packaged(package: str, name: str) -> Path:
    """A file of an installed package, which is not imported."""
    return Path(importlib.metadata.distribution(package).locate_file(name))


RANKS = {
    "llama3": ("llama-models", "llama_models/llama3/tokenizer.model"),
    "qwen2": ("dashscope", "dashscope/resources/qwen.tiktoken"),
}


def real(kind: str) -> data.Tokenizer:
    return data.Tokenizer.from_pretrained(packaged(*RANKS[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
def test_golden_ids_of_the_real_vocabularies(kind):
    tokenizer = real(kind)
    assert len(VECTORS["strings"][kind]) == 38
    for case in VECTORS["strings"][kind]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
    for text, ids in VECTORS["external_hf_parity"][{"qwen2": "qwen2.5"}.get(kind, kind)].items():
        assert tokenizer.encode(text) == ids, text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
def test_golden_chats_of_the_real_vocabularies(kind):
    system = {"llama3": "Be brief.", "qwen2": "You are a helpful assistant."}[kind]
    ids, kept = labels([("system", [system]), *TURNS[1:]], real(kind))
    golden = VECTORS[f"{kind}_chat"]
    assert ids == golden["ids"] and kept == golden["labels_recommended"]
    assert real(kind).show(ids) == golden["text"]


@pytest.mark.slow
def test_llama3_special_tokens_are_those_of_its_own_code():
    tree = ast.parse(packaged("llama-models", "llama_models/llama3/tokenizer.py").read_text())
    assigned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    lists = [value for value in assigned if isinstance(value, ast.List)]
    names = next(names for names in map(ast.literal_eval, lists) if "<|begin_of_text|>" in names)
    others = [f"<|reserved_special_token_{2 + n}|>" for n in range(256 - len(names))]
    assert real("llama3").control("".join(names + others)) == list(range(128_000, 128_256))


def merges_of(ranks: dict[bytes, int], all_splits: bool) -> list[tuple[str, str]]:
    """Merges from ranks: the two tokens it has just before it comes up, or all pairs that make it."""
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
            tokens = [bytes([b]) for b in token]
            while len(tokens) > 2:
                joined = [ranks.get(a + b, rank) for a, b in zip(tokens, tokens[1:])]
                at = joined.index(min(joined))
                assert joined[at] < rank, token
                tokens[at : at + 2] = [tokens[at] + tokens[at + 1]]
            pairs = [tuple(tokens)]
        merges += [tuple("".join(BYTES[b] for b in token) for token in pair) for pair in pairs]
    return merges


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
def test_hugging_face_gives_the_same_ids_and_its_folder_the_same_tokenizer(tmp_path, kind):
    tokenizer, ranks = real(kind), data.read_ranks(packaged(*RANKS[kind]))
    vocab = {"".join(BYTES[b] for b in token): rank for token, rank in ranks.items()}
    merges = merges_of(ranks, all_splits=kind == "llama3")
    bpe = tokenizers.models.BPE(vocab, merges, ignore_merges=kind == "llama3")
    theirs, pre = tokenizers.Tokenizer(bpe), tokenizers.pre_tokenizers
    split = pre.Split(tokenizers.Regex(LLAMA3 if kind == "llama3" else QWEN), "isolated")
    theirs.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs.decoder = tokenizers.decoders.ByteLevel()
    if kind == "qwen2":
        theirs.normalizer = tokenizers.normalizers.NFC()
    texts = hostile(8000, 4) + [case["text"] for case in VECTORS["strings"][kind]]
    expected = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
    assert [tokenizer.encode(text) for text in texts] == expected

    theirs.add_special_tokens([*tokenizer.special])
    theirs.save(str(tmp_path / "tokenizer.json"))
    folder = data.Tokenizer.from_pretrained(tmp_path)
    assert (folder.special, folder.end, folder.start) == (tokenizer.special, tokenizer.end, tokenizer.start)
    assert folder.vocab_size == tokenizer.vocab_size
    assert [folder.encode(text) for text in texts] == expected
    assert [folder.decode(ids) for ids in expected] == [tokenizer.decode(ids) for ids in expected]
    assert folder.ids_with((".", "\n")) == tokenizer.ids_with((".", "\n"))
    if kind == "qwen2":  # the same without tokenizer.json; control tokens then come from the size alone
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in merges), encoding="utf-8")
        folder = data.Tokenizer.from_pretrained(tmp_path)
        assert folder.special == tokenizer.special and folder.end == tokenizer.end
        assert [folder.encode(text) for text in texts] == expected
