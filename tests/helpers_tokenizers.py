"""Small hand-made tokenizers of every family, as Hugging Face writes them (the real ones are not on PyPI)."""

import functools
import json
import random
import tempfile
from pathlib import Path

import regex

import data

# As in the tokenizer.json of each family; data.py has possessive forms instead.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

SELVES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {b: chr(b) for b in SELVES}
BYTES |= {b: chr(256 + n) for n, b in enumerate(sorted({*range(256)} - {*SELVES}))}
MISSING = {0x05, 0x1C, 0xF1, 0xF4, 0xC0, 0xFF}  # bytes that the small SmolLM2 lacks
BYTE_LEVEL = ("llama3", "qwen", "smollm2", "gpt2")
SENTENCEPIECE = ("llama2", "metaspace", "gemma", "phi3")
CONTROL = {
    "llama3": "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split(),
    "qwen": "<|endoftext|> <|im_start|> <|im_end|>".split(),
    "smollm2": "<|endoftext|> <|im_start|> <|im_end|>".split(), "gpt2": ["<|endoftext|>"],
    "llama2": ["<unk>", "<s>", "</s>"], "metaspace": ["<unk>", "<s>", "</s>"],
    "gemma": "<pad> <eos> <bos> <unk> <start_of_turn> <end_of_turn>".split(),
    "phi3": "<unk> <s> </s> <|endoftext|> <|assistant|> <|system|> <|end|> <|user|>".split(),
}  # fmt: skip

TEXT = (
    "the hello there, hello we'll see 12 1234 red rings; it's the cat's   café é 日本 日本 hello\n\n  x\r\n"
    "is there any yellow square beside another ring? no, only words: north, south, kitchen, window!!\n"
    "x!! y!! z!! x## y## z## x \ny \nz \nx \ny\n"
)
HOSTILE = (
    "a b hello the  x é e\u0301 A\u030a ﬁ ſ 'ſ 's 'S 'LL we'Ve ' ! !! ?! _ -- 1 23 4567 ٣ ½ Ⅷ 中 日本 語 😀 "
    "👩‍👩‍👧 שלום مرحبا Việt \u00a0 \u0085 \u2028 \u3000 \u200d \ufeff \x00 \x05 \x1c \x7f \U000e0001 "
    "\U00040000 <|im_end|> <|eot_id|> <|endoftext|> <|end|> <gh_stars> [INST] http:// \\n </s> <s> <bos>"
).split(" ")
HOSTILE += [*TEXT.split(), " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n "]


def hostile(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(HOSTILE, k=rng.randint(1, 16))) for _ in range(n)]


def cut(text: str, kind: str) -> list[str]:
    """The text cut with the original regexes; SmolLM2's in two stages, digits first."""
    if kind == "smollm2":
        digits = [part for part in regex.split(r"(\p{N})", text) if part]
        return [piece for part in digits for piece in regex.findall(GPT2, part)]
    if kind in SENTENCEPIECE:
        return regex.findall("▁?[^▁]+|▁+", text.replace(" ", "▁"))
    return regex.findall({"llama3": LLAMA3, "qwen": QWEN, "gpt2": GPT2}[kind], text)


@functools.cache
def small(kind: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and 60 merges learned from TEXT, ids as the family has them."""
    if kind in BYTE_LEVEL:
        words = [[BYTES[b] for b in piece.encode()] for piece in cut(TEXT, kind)]
        letters = [BYTES[b] for b in range(256) if not (kind == "smollm2" and b in MISSING)]
    else:
        words = [list(piece) for piece in cut(TEXT, kind)]
        letters = [f"<0x{b:02X}>" for b in range(256)]
        letters += sorted({*"".join(map("".join, words)), *"</>USERAINT"})
    merges = []
    while len(merges) < 60:
        pairs = [pair for word in words for pair in zip(word, word[1:])]
        best = max(set(pairs), key=lambda pair: (pairs.count(pair), pair))
        merges.append(best)
        for word in words:
            while best in zip(word, word[1:]):
                at = list(zip(word, word[1:])).index(best)
                word[at : at + 2] = ["".join(best)]
    first = CONTROL[kind] if kind in ("smollm2", *SENTENCEPIECE) else []
    first = first + [f"<special_{n}>" for n in range(3, 17)] if kind == "smollm2" else first
    last = {"gpt2": ["<|endoftext|>"], "llama3": ["xyzzy"]}  # this one only as a whole piece: ignore_merges
    tokens = first + letters + ["".join(pair) for pair in merges] + last.get(kind, [])
    if kind in ("llama2", "metaspace"):  # text could reach the end token
        tokens += ["</", "s>"]
        merges += [("<", "/"), ("s", ">"), ("</", "s>")]
    assert len(set(tokens)) == len(tokens)
    return {token: n for n, token in enumerate(tokens)}, merges


def tokenizer_json(kind: str) -> dict:
    """As Hugging Face writes it."""
    vocab, merges = small(kind)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ids = {name: vocab.get(name, len(vocab) + n) for n, name in enumerate(CONTROL[kind])}
    added = [{"id": ids[name], "content": name, **flags} for name in sorted(ids, key=ids.get)]
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    bpe |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab}
    bpe |= {"ignore_merges": kind == "llama3"}
    bpe |= {"merges": merges if kind == "llama3" else [" ".join(pair) for pair in merges]}  # both ways exist
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": bpe,
    }  # fmt: skip
    (byte_level_parts if kind in BYTE_LEVEL else sentencepiece_parts)(spec, kind)
    return json.loads(json.dumps(spec))


def byte_level_parts(spec: dict, kind: str) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    cuts = byte_level | {"use_regex": True}
    if kind == "smollm2":
        cuts = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, cuts]}
    elif kind != "gpt2":
        split["pattern"] = {"Regex": LLAMA3 if kind == "llama3" else QWEN}
        cuts = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    spec |= {"pre_tokenizer": cuts, "decoder": byte_level}
    spec["normalizer"] = {"type": "NFC"} if kind == "qwen" else None


def sentencepiece_parts(spec: dict, kind: str) -> None:
    """BPE over letters with byte fallback: how spaces become ▁ is the families' difference."""
    spec["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    back += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    if kind in ("llama2", "phi3"):
        normalizers = [{"type": "Prepend", "prepend": "▁"}, replace]
        spec["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    elif kind == "metaspace":
        pre = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        spec["pre_tokenizer"] = pre
    else:
        spec["normalizer"], strip = replace, []
    spec["decoder"] = {"type": "Sequence", "decoders": back + strip}
    for token in spec["added_tokens"] if kind == "phi3" else ():  # as Phi-3's file has them
        token["rstrip"] = token["content"] not in ("<unk>", "<s>")
        token["special"] = token["content"] != "</s>"


def write_tokenizer(folder: Path, kind: str) -> dict:
    folder.mkdir(exist_ok=True)
    spec = tokenizer_json(kind)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return spec


@functools.cache
def small_tokenizer(kind: str) -> data.Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), kind)
        return data.Tokenizer.from_pretrained(folder)
