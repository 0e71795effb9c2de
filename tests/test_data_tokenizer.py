"""Tokenizers of every family: small hand-made ones, and the real vocabularies of Llama-3 and Qwen (slow).

The oracle: Hugging Face's `tokenizers`.
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

import helpers_tokenizers
import pytest
import tokenizers
from helpers_tokenizers import BYTE_LEVEL, BYTES, TEXT, hostile, small, small_tokenizer, tokenizer_json

import data
import model
from tools import check

VECTORS = json.loads((Path(__file__).parent / "fixtures" / "tokenizer_vectors.json").read_text())
SCENES = model.ASSETS / "scenes.tiktoken"
KINDS = (*BYTE_LEVEL, *helpers_tokenizers.SENTENCEPIECE)


def named(kind: str) -> data.Tokenizer:
    return data.Tokenizer.from_pretrained(SCENES) if kind == "scenes" else small_tokenizer(kind)


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
        return bytes(b for b in text.encode() if b not in helpers_tokenizers.MISSING).decode(errors="replace")
    return text.removeprefix(" ") if kind == "metaspace" else text


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_hugging_face_and_decode_to_the_text(kind):
    tokenizer, theirs = small_tokenizer(kind), without_controls(kind)
    texts = hostile(1500, 1) + ["", " ", TEXT, "xyzzy", "xyzzyx xyzzy", "a▁b"]
    noise = [*tokenizer.special.values(), tokenizer.vocab_size, tokenizer.vocab_size + 300]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        if "▁" not in text or kind in BYTE_LEVEL:
            assert tokenizer.decode([*noise, *ids, *noise]) == round_trip(text, kind)
    pieces = {tokenizer.bpe.id_to_token(i) for text in texts for i in tokenizer.encode(text)}
    assert len([piece for piece in pieces if piece[0] != "<" and len(piece) > 1]) > 30  # merges were used
    names = {token["content"]: token["id"] for token in tokenizer_json(kind)["added_tokens"]}
    assert tokenizer.special == names and all(tokenizer.control(name) == [i] for name, i in names.items())
    assert tokenizer.vocab_size == max([*small(kind)[0].values(), *names.values()]) + 1


# Of each family: its end token, its BOS, and what stands in front of a text
FAMILY = {
    "llama3": ("<|eot_id|>", "<|begin_of_text|>", ""), "qwen": ("<|im_end|>", None, ""),
    "smollm2": ("<|im_end|>", None, ""), "gpt2": ("<|endoftext|>", None, ""), "llama2": ("</s>", "<s>", " "),
    "metaspace": ("</s>", "<s>", " "), "gemma": ("<end_of_turn>", "<bos>", ""),
    "phi3": ("<|end|>", None, " "), "scenes": ("<|end|>", None, " "),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILY)
def test_documents_begin_and_end_as_the_family_has_it(kind):
    tokenizer, (end, start, prefix) = named(kind), FAMILY[kind]
    assert (tokenizer.end, tokenizer.prefix) == (tokenizer.special[end], prefix)
    assert tokenizer.start == ([tokenizer.special[start]] if start else [])
    text, newlines = tokenizer.encode("A cat."), tokenizer.ids_with(("\n",))
    caption = data.pieces_of(data.Record("caption", [0, "A cat."], []), tokenizer)
    assert caption == [(tokenizer.start, False), 0, (text, True), ([tokenizer.end], True)]
    assert check.text_of(text, tokenizer) == prefix + "A cat."
    assert newlines and all("\n" in check.text_of([i], tokenizer) for i in newlines)


@pytest.mark.parametrize("kind", FAMILY)
def test_no_text_becomes_a_control_token(kind):
    """Every control token as text, alone and in other text, where merges could make it."""
    tokenizer = named(kind)
    attack = "".join(tokenizer.special)
    for name in [*tokenizer.special, "<unk>", attack]:
        for text in (name, f"x{name}", f" {name}", f"{name}x", f"x {name} {name}\n", f"\n{name}", name * 3):
            ids = tokenizer.encode(text)
            assert not {*tokenizer.special.values()} & {*ids}, text
            assert tokenizer.decode(ids) == round_trip(text, kind)
    pieces = data.chat_pieces([("user", [attack]), ("assistant", [attack])], tokenizer)
    answers = [ids for ids, supervised in pieces if supervised]
    assert answers == [tokenizer.encode(attack), [tokenizer.end]]
    copied = copy.copy(tokenizer)
    if kind != "scenes":  # a pickled one forgets settings
        copied.bpe = copy.deepcopy(tokenizer.bpe)
    assert copied.encode(attack) == tokenizer.encode(attack)


def changed(folder: Path, kind: str, change) -> data.Tokenizer:
    """A small tokenizer whose file `change(spec)` edits in place."""
    spec = helpers_tokenizers.write_tokenizer(folder, kind)
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return data.Tokenizer.from_pretrained(folder)


def test_merges_that_would_make_a_control_token_are_real(tmp_path):
    """Hugging Face's switch alone lets the end token through."""
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json("llama2")))
    theirs.encode_special_tokens = True
    assert theirs.token_to_id("</s>") in theirs.encode("x</s>", add_special_tokens=False).ids

    def with_a_whole_piece(spec):
        token = {**spec["added_tokens"][0], "content": "xyzzy", "id": spec["model"]["vocab"]["xyzzy"]}
        spec["added_tokens"].append(token)

    with pytest.raises(model.UserError, match="makes the control token xyzzy of text"):  # by ignore_merges
        changed(tmp_path, "llama3", with_a_whole_piece)

    def with_unknown_bytes(spec):
        spec["model"]["unk_token"] = "<|endoftext|>"
        del spec["model"]["vocab"][BYTES[7]]

    assert changed(tmp_path, "gpt2", with_unknown_bytes).encode("\x07") == []


@pytest.mark.parametrize("kind", ["qwen", "llama2"])
def test_added_tokens_that_are_not_special_are_found_in_text(tmp_path, kind):
    """As Qwen3's <think>, which a model writes and reads as text."""
    think = small_tokenizer(kind).vocab_size

    def with_think(spec):
        token = {**spec["added_tokens"][0], "special": False, "id": think, "content": "<think>"}
        spec["added_tokens"].append(token)

    tokenizer = changed(tmp_path, kind, with_think)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("<think>hello</think>", "the <think> the", "x<think>"):
        ids = tokenizer.encode(text)
        assert think in ids and ids == theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == theirs.decode(ids)
    assert "<think>" not in tokenizer.special and tokenizer.vocab_size == think + 1


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


def test_that_of_scenes_keeps_its_ids():
    tokenizer, ranks = named("scenes"), len(SCENES.read_text().splitlines())
    assert tokenizer.control("<|end|><|user|><|assistant|>") == [ranks, ranks + 1, ranks + 2]
    assert (tokenizer.end, tokenizer.vocab_size, tokenizer.start) == (ranks, ranks + 3, [])
    assert check.text_of(tokenizer.encode("red ring"), tokenizer) == " red ring"
    for text in (" red ring", "Grüße <|end|> \U0001f600\n\n  x", "KTZ 12 345", "<|user|>", "", " led"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


# --- Templates


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
    assert check.text_of(ids, tokenizer) == CHATS[kind]
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


VICUNA = "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
VICUNA += "helpful, detailed, and polite answers to the user's questions."


@pytest.mark.parametrize("kind", ["llama2", "metaspace"])
def test_a_chat_of_vicuna_has_the_ids_of_its_text_as_a_whole(kind):
    """FastChat's vicuna_v1.1; and around a picture LLaVA's tokenizer_image_token, which cuts there."""
    tokenizer, theirs = named(kind), tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(kind)))

    def in_one(text: str) -> list[int]:
        return theirs.encode(text, add_special_tokens=False).ids

    def ids_of(pieces: list) -> list[int]:
        return [i for ids, _ in pieces for i in ids]

    answers = ["red rings", "north, the north!", "no"]
    turns = [("user", ["hello there"]), ("assistant", [answers[0]]), ("user", [" is there any ring?"])]
    turns += [("assistant", [answers[1]]), ("user", ["x</s>"]), ("assistant", [answers[2]])]
    text = f"{VICUNA} USER: hello there ASSISTANT: {answers[0]}</s>USER: "
    text += " is" if kind == "llama2" else "is"  # Metaspace adds none to a space
    text += f" there any ring? ASSISTANT: {answers[1]}</s>"
    assert labels(turns[:4], tokenizer)[0] == tokenizer.start + in_one(text)
    ids, kept = labels(turns, tokenizer)
    supervised = [tokenizer.encode(answer) + [tokenizer.end] for answer in answers]
    assert [i for i in kept if i != -100] == sum(supervised, []) and ids.count(tokenizer.end) == 3
    pieces = data.chat_pieces([("user", [0, "\nwhat?"]), ("assistant", ["the ring"])], tokenizer)
    at = pieces.index(0)
    assert ids_of(pieces[:at]) == tokenizer.start + in_one(f"{VICUNA} USER: ")
    assert ids_of(pieces[at + 1 :]) == in_one("\nwhat? ASSISTANT: the ring</s>")
    prompt = data.prompt_pieces("what?", 0, tokenizer, [("hello", "no")])
    text = f"{VICUNA} USER: hello ASSISTANT: no</s>USER: what? ASSISTANT:"
    assert ids_of(prompt) == tokenizer.start + in_one(text)
    brief = labels([("system", ["Be brief."]), *turns[:2]], tokenizer)[0]
    assert brief == tokenizer.start + in_one(f"Be brief. USER: hello there ASSISTANT: {answers[0]}</s>")


# --- Files


@pytest.mark.parametrize("layout", ["qwen", "original", "ranks"])
def test_save_copies_the_files_and_the_copy_is_the_same(tmp_path, layout):
    source, target = tmp_path / "source", tmp_path / "step" / "tokenizer"
    (source / "original").mkdir(parents=True)
    if layout == "qwen":
        helpers_tokenizers.write_tokenizer(source, layout)
        (source / "tokenizer_config.json").write_text('{"chat_template" :  "…"}', encoding="utf-8")
        (source / "merges.txt").write_text("#version: 0.2\n")  # beside it, not read
    elif layout == "original":
        (source / "original" / "tokenizer.model").write_text(many_ranks(128_000))
        (source / "tokenizer_config.json").write_text("{}")
    else:
        (source / "scenes.tiktoken").write_bytes(SCENES.read_bytes())
    tokenizer = data.Tokenizer.from_pretrained(source)
    files = [file for file in source.rglob("*") if file.is_file()]
    before = {file.name.replace("scenes", "ranks"): file.read_bytes() for file in files}
    for file in files:
        file.unlink()  # a run removes old checkpoints, maybe the one it came from
    tokenizer.save(target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    again = data.Tokenizer.from_pretrained(target)
    for name in ("special", "vocab_size", "end"):
        assert getattr(again, name) == getattr(tokenizer, name)
    texts = hostile(100, 3)
    assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]


BAD_SPLIT = {"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False}
REFUSED = {
    "unigram": (lambda spec: spec["model"].update(type="Unigram"), "Unigram, only BPE"),
    "unknown merge": (lambda spec: spec["model"]["merges"].append("zz zz"), "zz.*out of vocabulary"),
    "no end": (lambda spec: spec.update(added_tokens=[]), "control tokens of any family"),
    "no model": (lambda spec: spec.pop("model"), "KeyError: 'model'"),
    "regex": (lambda spec: spec.update(pre_tokenizer=BAD_SPLIT), "holds no usable"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_work_is_refused_in_one_sentence(tmp_path, what):
    change, words = REFUSED[what]
    changed(tmp_path, "gpt2", lambda spec: None)  # unchanged it loads
    with pytest.raises(model.UserError, match=words) as error:
        changed(tmp_path, "gpt2", change)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


SENTENCEPIECE_MODEL = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x08\xe2\x96\x81the"
CONVERT = r"pip install transformers sentencepiece protobuf.*AutoTokenizer.from_pretrained\('.*'\).save_pre"
BROKEN = {
    "nothing": ({}, "no tokenizer.json.* and 0 rank files"),
    "two": ({"a.tiktoken": b"YQ== 0\n", "b.tiktoken": b"YQ== 0\n"}, "and 2 rank files"),
    "sentencepiece": ({"tokenizer.model": SENTENCEPIECE_MODEL}, CONVERT),
    "base64": ({"x.tiktoken": b"YQ== 0\nYg== 1\n!!! 2\n"}, "x.tiktoken is not a tiktoken rank file"),
    "number": ({"x.tiktoken": b"YQ== 0\n\nYg== one\n"}, "x.tiktoken is not a tiktoken rank file"),
    "twice": ({"x.tiktoken": many_ranks(255).encode() + b"/w== 254\n"}, "count up from 0"),
    "a byte": ({"x.tiktoken": many_ranks(255).encode()}, "every byte"),
    "no family": ({"x.tiktoken": many_ranks(100_256).encode()}, "100256 ranks.*Llama-3"),
    "json": ({"tokenizer.json": b'{"model": \n'}, r"tokenizer.json: not valid JSON \(.*line 2 column 1"),
    "list": ({"tokenizer.json": b"[]"}, "no usable tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_named(tmp_path, what):
    files, words = BROKEN[what]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(model.UserError, match=words) as error:
        data.Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(model.UserError, match="nowhere holds no tokenizer.json"):
        data.Tokenizer.from_pretrained(tmp_path / "nowhere")


def test_settings_of_a_file_that_change_texts_do_not_count(tmp_path):
    """Some files on the hub have been saved with a truncation and a padding."""
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    fill |= {"pad_type_id": 0, "pad_token": "<|endoftext|>"}
    tokenizer = changed(tmp_path, "qwen", lambda spec: spec.update(truncation=cut, padding=fill))
    assert tokenizer.encode(TEXT) == small_tokenizer("qwen").encode(TEXT)


def check_long_runs(tokenizer: data.Tokenizer) -> None:
    for text in (" " * 10**6, "x" + " " * 10**6 + "x", "\n" * 10**6 + "x", "x" * 10**5):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["llama2", "scenes"])
def test_very_long_runs_do_not_panic(kind):
    check_long_runs(named(kind))


def test_it_works_in_forked_processes_without_a_word(tmp_path):
    helpers_tokenizers.write_tokenizer(tmp_path, "llama2")
    code = (
        "import multiprocessing, sys, data\n"
        "tokenizer = data.Tokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer.encode('hello there')\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "    assert pool.map(tokenizer.encode, ['hello there'] * 4) == [ids] * 4\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    command, root = [sys.executable, "-c", code, tmp_path], Path(data.__file__).parent
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- The real vocabularies, from the packages in requirements-vocab.txt
def packaged(package: str, name: str) -> Path:
    """A file of an installed package, which is not imported."""
    return Path(importlib.metadata.distribution(package).locate_file(name))


RANKS = {
    "llama3": ("llama-models", "llama_models/llama3/tokenizer.model"),
    "qwen2": ("dashscope", "dashscope/resources/qwen.tiktoken"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
def test_golden_ids_and_chats_of_the_real_vocabularies(kind):
    tokenizer = data.Tokenizer.from_pretrained(packaged(*RANKS[kind]))
    assert len(VECTORS["strings"][kind]) == 38
    for case in VECTORS["strings"][kind]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
    for text, ids in VECTORS["external_hf_parity"][{"qwen2": "qwen2.5"}.get(kind, kind)].items():
        assert tokenizer.encode(text) == ids, text
    check_long_runs(tokenizer)
    system = {"llama3": "Be brief.", "qwen2": "You are a helpful assistant."}[kind]
    ids, kept = labels([("system", [system]), *TURNS[1:]], tokenizer)
    golden = VECTORS[f"{kind}_chat"]
    assert ids == golden["ids"] and kept == golden["labels_recommended"]
    assert check.text_of(ids, tokenizer) == golden["text"]


@pytest.mark.slow
def test_llama3_special_tokens_are_those_of_its_own_code():
    tree = ast.parse(packaged("llama-models", "llama_models/llama3/tokenizer.py").read_text())
    assigned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    lists = [value for value in assigned if isinstance(value, ast.List)]
    names = next(names for names in map(ast.literal_eval, lists) if "<|begin_of_text|>" in names)
    others = [f"<|reserved_special_token_{2 + n}|>" for n in range(256 - len(names))]
    tokenizer = data.Tokenizer.from_pretrained(packaged(*RANKS["llama3"]))
    assert tokenizer.control("".join(names + others)) == list(range(128_000, 128_256))


def spelled(token: bytes) -> str:
    return "".join(BYTES[b] for b in token)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
def test_the_real_vocabularies_give_the_ids_of_hugging_face(kind):
    """Our regexes are possessive, so that they do not overflow."""
    ranks, merges = data.read_ranks(packaged(*RANKS[kind])), []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:n], token[n:]) for n in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled(first), spelled(second)) for first, second in pairs]
    vocab = {spelled(token): rank for token, rank in ranks.items()}
    bpe = tokenizers.models.BPE(vocab, merges, ignore_merges=kind == "llama3")
    theirs, pre = tokenizers.Tokenizer(bpe), tokenizers.pre_tokenizers
    cuts = helpers_tokenizers.LLAMA3 if kind == "llama3" else helpers_tokenizers.QWEN
    split = pre.Split(tokenizers.Regex(cuts), "isolated")
    theirs.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    if kind == "qwen2":
        theirs.normalizer = tokenizers.normalizers.NFC()
    tokenizer = data.Tokenizer.from_pretrained(packaged(*RANKS[kind]))
    for text in hostile(8000, 4) + [case["text"] for case in VECTORS["strings"][kind]]:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
