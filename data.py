"""Data: tokenizer, records, pictures, labels, packed batches, sources, and the built-in world *Scenes*.

    python data.py check SPEC          what a run would make of --data SPEC: what is broken, lengths, samples
    python data.py convert IN OUT      records of a file, folder or glob (parquet, for one) to tars in OUT
    python data.py download NAME --to DIR     the files of llava (both stages), llava-pretrain or llava-sft

    record ─► pieces: token ids, each supervised or not, and images ─► rows (B, T) with doc_ids and positions

The way of one sample: a source (Scenes, or a file) gives a Record; `Plan` measures it and finds it a row;
`lay_out` turns it into ids, image slots and targets; `make_batch` puts samples into rows. Labels come from
the pieces, never from string splits, so the supervised tokens are the answers by construction.
"""

import base64
import bisect
import collections
import csv
import dataclasses
import difflib
import errno
import functools
import glob
import http.client
import io
import itertools
import json
import math
import mmap
import os
import random
import re
import shutil
import sys
import tarfile
import time
import unicodedata
import urllib.request
import zipfile
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex  # comes with tiktoken
import tiktoken
import tokenizers
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

import model
import prune
from model import ASSETS, ModelConfig, UserError, find_half, read_decoder_config, read_json, write_json

# ---------------------------------------------------------------------------------------------------------
# Tokenizer: `tokenizers` runs those of Hugging Face repositories, tiktoken runs rank files (that of Scenes,
# the original ones of Llama-3 and Qwen). Text of users and data sets never becomes a control token: the
# letters "<|im_end|>" in a caption stay letters.

# A tokenizer belongs to the first family whose "control" tokens it has; the first of these ends answers and
# documents. "start": control token in front of every document. "turns": of each role (before, end, tail): a
# turn is before, content, end, tail; of the assistant's turns content and end are supervised. "strips": white
# space around contents is removed. "system": text of chats that have none; only Vicuna's belongs to its
# template, the default ones of Qwen and SmolLM2 come only if the data has them.
FAMILIES = read_json(ASSETS / "chat_templates.json")
CONTROL = {name for family in FAMILIES for name in family["control"]}
# What rank files do not tell, by the number of ranks. "pattern" cuts text before merging; its possessive
# forms (`++`) cut like the original patterns, which overflow the stack of tiktoken's regex engine on
# 1,000,000 spaces.
RANK_FILES = read_json(ASSETS / "rank_files.json")
LONG_SPACE = re.compile(r"((?<!\s)\s{100000,})")  # before a word even the possessive forms overflow on these
HUB_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


class Tokenizer:
    """Ids of text and text of ids, and how the family of the tokenizer writes documents and chats.

    template: "turns" of FAMILIES. end: id behind answers and documents. start: ids in front of a document.
    prefix: what `encode` puts in front of a text, "" or " ", so that a word is the same token wherever it
    stands. special: control tokens, name to id. vocab_size: largest id + 1; a decoder may have more rows.
    files: what `save` writes, name to content.
    """

    prefix = ""

    def __init__(self, special: dict[str, int], vocab_size: int, files: dict[str, bytes]):
        families = [family for family in FAMILIES if special.keys() >= {*family["control"]}]
        if not families:
            raise ValueError("it has not the control tokens of any family in assets/chat_templates.json")
        family = families[0]
        self.special = special
        self.vocab_size = vocab_size
        self.files = files
        self.template = family["turns"]
        self.strips = family["strips"]
        self.system = family["system"]
        self.end = special[family["control"][0]]
        self.start = [special[family["start"]]] if family["start"] else []

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """A rank file, or a folder with tokenizer.json or with a rank file."""
        path = Path(path)
        path = path.parent if path.suffix == ".json" else path
        files = {name: (path / name).read_bytes() for name in HUB_FILES if (path / name).is_file()}
        llama3 = [path / "tokenizer.model", path / "original" / "tokenizer.model"]
        ranks = [file for file in (path, *llama3) if file.is_file()][:1] or [*path.glob("*.tiktoken")]
        try:
            if "tokenizer.json" in files:
                return HubTokenizer(read_json(path / "tokenizer.json"), files)
            if len(ranks) == 1:
                name = "tokenizer.model" if ranks[0].name == "tokenizer.model" else "ranks.tiktoken"
                return RankTokenizer(read_ranks(ranks[0]), files | {name: ranks[0].read_bytes()})
        except UserError:
            raise
        except Exception as e:  # `tokenizers` raises nothing more precise
            raise UserError(f"{path} holds no usable tokenizer ({type(e).__name__}: {e})") from None
        convert = f"python tools/tokenizer.py {path} makes it of vocab.json and merges.txt"
        raise UserError(f"{path} holds no tokenizer.json ({convert}) and {len(ranks)} rank files, not one")

    def save(self, folder: Path) -> None:
        """The files it came from, byte for byte: `from_pretrained(folder)` gives the same tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / (name + ".tmp")).write_bytes(content)
            os.replace(folder / (name + ".tmp"), folder / name)

    def encode(self, text: str) -> list[int]:
        """Ids of a content: no control token is among them."""
        return self.ids_of(text, control=False)

    def control(self, text: str, after: str = "", before_image: bool = False) -> list[int]:
        """Ids of a template's text behind the text `after`: the only place where control tokens are made.

        A tokenizer with a prefix writes it for the first space of this text, and for the last one when it
        encodes the content that follows. In front of an image the last space stays, as in LLaVA.
        """
        if self.prefix:
            text = text.removeprefix(" ")
            text = text if before_image else text.removesuffix(" ")
        return self.ids_of(after + text, control=True)[len(self.ids_of(after, control=True)) :]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without control tokens and without the prefix."""
        return self.text_of(ids, control=False)

    def show(self, ids: list[int]) -> str:
        """Text of ids as it stands in a document: with control tokens and with the prefix."""
        lead = self.encode("a")
        return self.text_of(lead + ids, control=True).removeprefix(self.text_of(lead, control=True))

    def ids_with(self, marks: tuple[str, ...]) -> list[int]:
        """Ids of text that holds one of the marks."""
        texts = [self.text_of([i], control=False) for i in range(self.vocab_size)]
        return [i for i, text in enumerate(texts) if any(mark in text for mark in marks)]


class HubTokenizer(Tokenizer):
    """`tokenizers` with the content of a tokenizer.json."""

    def __init__(self, spec: dict, files: dict[str, bytes]):
        bpe = spec["model"]
        added = spec.get("added_tokens", [])
        if bpe.get("type", "BPE") != "BPE":
            raise ValueError(f"its model is {bpe['type']}, only BPE works")
        for token in added:  # in Phi-3's file </s> is not special
            token["special"] = token["special"] or token["content"] in CONTROL
        # Merges of letters, or letters that the vocabulary lacks, must not give a control token either.
        special = {token["content"] for token in added if token["special"]}
        bpe["merges"] = [merge for merge in bpe["merges"] if "".join(merge).replace(" ", "") not in special]
        bpe["unk_token"] = None if bpe.get("unk_token") in special else bpe.get("unk_token")
        self.bpe = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self.bpe.no_truncation()
        self.bpe.no_padding()
        ids = {token.content: i for i, token in self.bpe.get_added_tokens_decoder().items() if token.special}
        super().__init__(ids, max(self.bpe.get_vocab().values()) + 1, files)
        if leaks := [name for name, i in ids.items() if i in self.encode(name)]:
            raise ValueError(f"it makes the control token {leaks[0]} of text")
        if self.bpe.encode("a", add_special_tokens=False).tokens[0].startswith(("▁", "Ġ")):
            self.prefix = " "

    def ids_of(self, text: str, control: bool) -> list[int]:
        self.bpe.encode_special_tokens = not control  # true: their names are text like any other
        return self.bpe.encode(text, add_special_tokens=False).ids

    def text_of(self, ids: list[int], control: bool) -> str:
        return self.bpe.decode(ids, skip_special_tokens=not control)


class RankTokenizer(Tokenizer):
    """tiktoken with the ids of tokens; an id is also the priority of its merge."""

    def __init__(self, ranks: dict[bytes, int], files: dict[str, bytes]):
        self.n_ranks = len(ranks)
        if self.n_ranks > 2**16 and str(self.n_ranks) not in RANK_FILES:
            raise ValueError(f"{self.n_ranks} ranks are neither Llama-3 nor Qwen")
        n_bytes = len([token for token in ranks if len(token) == 1])
        if sorted(ranks.values()) != list(range(self.n_ranks)) or n_bytes < 256:
            raise ValueError("its ids must count up from 0, with every byte among its tokens")
        family = RANK_FILES.get(str(self.n_ranks), RANK_FILES["scenes"])
        self.prefix = family["prefix"]
        self.nfc = family["nfc"]
        special = {name: self.n_ranks + n for n, name in enumerate(family["special"])}
        super().__init__(special, self.n_ranks + len(special), files)
        self.bpe = tiktoken.Encoding(
            "ranks", pat_str=family["pattern"], mergeable_ranks=ranks, special_tokens=special
        )

    def ids_of(self, text: str, control: bool) -> list[int]:
        if control:
            return self.bpe.encode(text, allowed_special="all")
        text = unicodedata.normalize("NFC", text) if self.nfc else self.prefix + text
        return [i for part in LONG_SPACE.split(text) for i in self.bpe.encode_ordinary(part)]

    def text_of(self, ids: list[int], control: bool) -> str:
        size = self.vocab_size if control else self.n_ranks
        text = self.bpe.decode([i for i in ids if i < size], errors="replace")
        return text if control else text.removeprefix(self.prefix)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Lines of a token in base64 and its id."""
    content = path.read_bytes()
    if not content.isascii():
        convert = f"AutoTokenizer.from_pretrained('{path.parent}').save_pretrained('{path.parent}')"
        raise UserError(
            f"{path} is SentencePiece's own format: pip install transformers sentencepiece protobuf, then "
            f'write tokenizer.json with python -c "from transformers import AutoTokenizer; {convert}"'
        )
    pairs = [line.split() for line in content.splitlines() if line.strip()]
    try:
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise UserError(f"{path} is not a tiktoken rank file: a line of it is not 'base64 rank'") from None


def find_tokenizer(cfg: ModelConfig) -> Tokenizer:
    """cfg.tokenizer_from if set, else the tokenizer in the decoder's folder, else that of Scenes.

    A decoder with as many rows as Scenes has ids, as the shipped one has, gets that of Scenes, too.
    """
    scenes = Tokenizer.from_pretrained(ASSETS / "scenes.tiktoken")
    source = cfg.tokenizer_from or cfg.decoder_from
    if not source:
        return scenes
    path = Path(source) if Path(source).exists() else find_half(source)
    if not cfg.tokenizer_from and read_decoder_config(path / "config.json").vocab_size == scenes.vocab_size:
        return scenes
    return Tokenizer.from_pretrained(path)


# ---------------------------------------------------------------------------------------------------------
# Records and their pieces. A piece is an image (its number in the record) or (ids, supervised).

Piece = int | tuple[list[int], bool]


@dataclass
class Record:
    """One document of any kind, before tokenization.

    parts: for "caption", "interleaved" and "text": image numbers and strings in order, all text supervised.
           for "chat": (role, parts) turns, where only what the assistant says is supervised.
    images: paths, encoded pictures or PIL images. name: where it came from, for error messages.
    """

    kind: str
    parts: list
    images: list
    name: str = ""
    lost: tuple[str, str] | None = None  # (why, what) of pictures that a document goes without


def pieces_of(record: Record, tokenizer: Tokenizer) -> list[Piece]:
    if record.kind == "chat":
        return chat_pieces(record.parts, tokenizer)
    pieces = [part if isinstance(part, int) else (tokenizer.encode(part), True) for part in record.parts]
    return [(tokenizer.start, False), *pieces, ([tokenizer.end], True)]


def chat_pieces(turns: list[tuple[str, list]], tokenizer: Tokenizer, to_answer: bool = False) -> list[Piece]:
    """Turns to pieces; the end token of an answer is supervised with it, so that the model learns to stop.

    to_answer: only up to where the last turn, an assistant's, begins to speak.
    """
    if tokenizer.system and turns[0][0] != "system":
        turns = [("system", [tokenizer.system]), *turns]
    pieces, last_end, last_tail = [(tokenizer.start, False)], "", ""
    for role, parts in turns:
        before, end, tail = tokenizer.template[role]
        answer = role == "assistant"
        if tokenizer.strips:
            parts = strip_edges(parts)
        before_image = isinstance(parts[0], int) if parts else False
        pieces.append((tokenizer.control(last_tail + before, last_end, before_image), False))
        pieces += [part if isinstance(part, int) else (tokenizer.encode(part), answer) for part in parts]
        pieces.append((tokenizer.control(end), answer))
        last_end, last_tail = end, tail
    return pieces[:-1] if to_answer else [*pieces, (tokenizer.control(last_tail, last_end), False)]


def strip_edges(parts: list) -> list:
    """The parts without white space at either end of the turn; that next to an image inside it stays."""
    parts = [p.lstrip() if n == 0 and isinstance(p, str) else p for n, p in enumerate(parts)]
    return [p.rstrip() if n == len(parts) - 1 and isinstance(p, str) else p for n, p in enumerate(parts)]


def prompt_pieces(question: str, images: int, tokenizer: Tokenizer, history: list = ()) -> list[Piece]:
    """Everything up to where the assistant starts to answer. history: earlier (question, answer) pairs."""
    asked = [q for q, _ in history] + [question]
    turns = []
    for n, text in enumerate(asked):
        turns.append(("user", [*range(images), text] if n == 0 else [text]))
        turns.append(("assistant", [history[n][1]] if n < len(history) else []))
    return chat_pieces(turns, tokenizer, to_answer=True)


# Templates of a base model (MM1 6.1, those of BLIP): "{image} A photo of {caption}" and the one of questions.
# No space stands between picture and text but the one that Scenes' tokenizer puts in front of every text.
PHOTO, QUESTION = "A photo of", "Question: {} Short answer:"


class Example(NamedTuple):
    """A picture with a question and its answer, or, where the question is "", with a caption."""

    image: object
    question: str
    answer: str
    name: str = ""  # where it came from


def stem(question: str) -> str:
    """The template's text between a picture and its answer; a caption's if there is no question."""
    return QUESTION.format(question) if question else PHOTO


def document_parts(examples: list[Example]) -> list:
    """Parts of an interleaved document: each picture, its text and a newline."""
    told = [[n, f"{stem(e.question)} {e.answer}\n"] for n, e in enumerate(examples)]
    return [part for parts in told for part in parts]


def shot_pieces(demos: list[Example], question: str, tokenizer: Tokenizer) -> list[Piece]:
    """An interleaved document that breaks off where the answer about one more picture begins, with the space
    in front of it. Without demonstrations it is truly 0-shot (Flamingo's 0-shot has two, without pictures).
    """
    parts = [*document_parts(demos), len(demos), stem(question)]
    pieces = pieces_of(Record("interleaved", parts, []), tokenizer)[:-1]
    return [piece if isinstance(piece, int) else (piece[0], False) for piece in pieces]


def split(
    pieces: list[Piece], slots: list[np.ndarray], limit: int, views: list[int] | None = None,
    most_views: int = 10**9, together: bool = False,
) -> list[list[Piece]]:  # fmt: skip
    """Parts of at most `limit` positions and `most_views` views, in order; none cuts into a picture.

    slots: of each picture, and views: how many it has. The first part is what is left of a cut sample. A
    picture that fits into no part is left out. together: a picture goes with the text behind it, if a part
    has room for both.
    """
    parts, room, free = [[]], limit, most_views
    for n, piece in enumerate(pieces):
        if isinstance(piece, int):
            length, seen = len(slots[piece]), views[piece] if views else 1
            text = pieces[n + 1] if together and n + 1 < len(pieces) else 0
            both = length + (0 if isinstance(text, int) else len(text[0]))
            if length > room or seen > free or room < both <= limit:
                parts, room, free = [*parts, []], limit, most_views
            if length <= room and seen <= free:
                parts[-1].append(piece)
                room, free = room - length, free - seen
            continue
        ids, supervised = piece
        while ids:
            if not room:
                parts, room, free = [*parts, []], limit, most_views
            parts[-1].append((ids[:room], supervised))
            ids, room = ids[room:], max(0, room - len(ids))
    return [part for part in parts if part]


@dataclass
class Laid:
    """One sample as flat arrays of length T."""

    ids: np.ndarray
    slot: np.ndarray  # token number inside the sample's visual tokens, NEWLINE, or -1 at text
    targets: np.ndarray  # id of the next token where that is supervised, else -1
    images: int


def lay_out(pieces: list[Piece], slots: list[np.ndarray]) -> Laid:
    """Pieces to positions: image n takes slots[n] (see `sample_slots`), ids 0 there; targets are shifted by
    one already.
    """
    ids, slot, supervised, images = [], [], [], 0
    for piece in pieces:
        if isinstance(piece, int):
            ids += [0] * len(slots[piece])
            slot += slots[piece].tolist()
            supervised += [False] * len(slots[piece])
            images += 1
        else:
            ids += piece[0]
            slot += [-1] * len(piece[0])
            supervised += [piece[1]] * len(piece[0])
    ids, slot = np.array(ids, dtype=np.int64), np.array(slot, dtype=np.int64)
    targets = np.full(len(ids), -1)
    targets[:-1] = np.where(supervised[1:], ids[1:], -1)
    return Laid(ids, slot, targets, images)


# ---------------------------------------------------------------------------------------------------------
# Pictures


class BadRecord(UserError):
    """A record that cannot be used, while others can: runs skip it and count it by `why`."""

    def __init__(self, text: str, why: str = "malformed"):
        text = text if len(text) < 500 else f"{text[:300]} ... {text[-150:]}"  # a picture in base64
        super().__init__(text.encode("utf-8", "backslashreplace").decode())
        self.why = why


Picture = Image.Image | str | Path | bytes  # at hand, in a file, or encoded
MOST_PIXELS = 178_956_970  # Pillow's limit against decompression bombs; files with more are broken to us
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")  # none runs a program
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def read_image(image: Picture, name: str, read):
    """read(picture) of a file, whose errors are the user's, or of a picture at hand. A truncated file is
    broken, not half a picture.
    """
    if isinstance(image, Image.Image):
        return read(image)
    told = f"of {len(image):,} bytes" if isinstance(image, bytes) else image
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as opened:
            if math.prod(opened.size) > MOST_PIXELS:
                raise ValueError(f"{opened.size[0]} x {opened.size[1]} pixels are too many")
            return read(opened)
    except MemoryError:
        raise
    except Exception as e:  # decoders raise anything
        if getattr(e, "errno", None) in NOT_THERE:
            raise BadRecord(f"{name}: image {told} does not exist", "image missing") from None
        if getattr(e, "errno", None):  # too many open files, a network that hangs: not the picture's fault
            raise
        raise BadRecord(f"{name}: image {told} does not decode ({e})", "image broken") from None


def turned(picture: Image.Image) -> int:
    """Its EXIF orientation, 1 to 8, or 0. A PNG's counts only before the pixels: no need to decode those."""
    if isinstance(picture, PngImagePlugin.PngImageFile) and "exif" not in picture.info:
        return 0
    found = picture.getexif().get(ExifTags.Base.Orientation, 0)
    return found if isinstance(found, int) and 1 <= found <= 8 else 0


# What undoes an EXIF orientation, from 2 on
FLIPS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
TURNS = dict(enumerate((Image.Transpose[flip] for flip in FLIPS), 2))


def open_image(image: Picture, name: str = "") -> Image.Image:
    """Decode to RGB: EXIF orientation applied, palette and alpha laid on white."""

    def decode(picture: Image.Image) -> Image.Image:
        orientation = turned(picture)
        picture.load()
        return picture.transpose(TURNS[orientation]) if orientation > 1 else picture

    image = read_image(image, name, decode)
    if image.mode[0] in "IF":  # 16 bits, or numbers of any size
        values = np.asarray(image, np.float32)
        largest = next((x for x in (1, 255, 65535) if values.max() <= x), values.max())
        image = Image.fromarray((values * (255 / largest)).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_pixels(image: Image.Image, size: int, resample: int = Image.Resampling.BICUBIC) -> np.ndarray:
    """Plain square resize, aspect not kept: uint8 (3, size, size); normalised later, on the device."""
    if image.size != (size, size):
        image = image.resize((size, size), resample, reducing_gap=3.0)
    return np.stack([np.asarray(band) for band in image.split()])  # (3, size, size); faster than transposing


def load_images(images: list, cfg: ModelConfig, name: str = "") -> np.ndarray:
    """Scenes, paths or pictures to the uint8 (n, 3, size, size) that the encoder wants: all views of all."""
    size = cfg.vit.image_size
    pixels = [np.zeros((0, 3, size, size), np.uint8)]
    for image in images:
        if isinstance(image, Scene):
            picture = render(image, CANVAS if cfg.image.cut else size)
        else:
            picture = open_image(image, name)
        pixels.append(cut_picture(picture, cfg))
    return np.concatenate(pixels)


# ---------------------------------------------------------------------------------------------------------
# Pictures cut into views (ImageConfig.cut): the whole picture as a square, then tiles of the encoder's size.
# Sizes are (width, height) in pixels, tilings (columns, rows).

NEWLINE = -2  # in Laid.slot: the learned vector that ends a row of tokens
TILINGS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # LLaVA-NeXT's, in its order


def picture_size(image, name: str = "") -> tuple[int, int]:
    """Of a Scene, path or picture as `open_image` would turn it, without decoding it where that is possible
    (Pillow finds the orientation of a PNG only by decoding).
    """
    if isinstance(image, Scene):
        return CANVAS, CANVAS

    def read(picture: Image.Image) -> tuple[int, int]:
        return picture.size[::-1] if turned(picture) >= 5 else picture.size

    return read_image(image, name, read)


def picture_sizes(images: list, cfg: ModelConfig, name: str = "") -> list[tuple[int, int]]:
    """What `sample_slots` wants to know of a sample's pictures; no file is read where all are cut alike."""
    by_size = cfg.image.cut in ("anyres", "unpad")
    return [picture_size(image, name) if by_size else (1, 1) for image in images]


def inside(size: tuple[int, int], box: tuple[int, int], ceil: bool = False) -> tuple[int, int]:
    """The largest size of the same aspect in a box, rounded down, or up as LLaVA-NeXT resizes."""
    (w, h), (W, H) = size, box
    if W * h < H * w:  # it fills the width
        return W, (h * W + ceil * (w - 1)) // w
    return (w * H + ceil * (h - 1)) // h, H


def best_tiling(size: tuple[int, int], side: int, tilings=TILINGS) -> tuple[int, int]:
    """The tiling that keeps most of a picture's pixels, of equals the one with least left over."""

    def fit(tiling: tuple[int, int]) -> tuple[int, int]:
        area = tiling[0] * tiling[1] * side**2
        kept = min(math.prod(inside(size, (tiling[0] * side, tiling[1] * side))), math.prod(size))
        return kept, kept - area

    return max(tilings, key=fit)  # the first of equals


def tiling_of(cfg: ModelConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Columns and rows of tiles beside the whole picture, (0, 0) if it is not cut."""
    fixed = {"": (0, 0), "pad": (0, 0), "split": (2, 2)}  # split: MM1's sub-images (its section 5)
    return fixed.get(cfg.image.cut) or best_tiling(size, cfg.vit.image_size)


def view_count(cfg: ModelConfig, size: tuple[int, int]) -> int:
    columns, rows = tiling_of(cfg, size)
    return 1 + columns * rows


def cut_picture(picture: Image.Image, cfg: ModelConfig) -> np.ndarray:
    """An RGB picture's views, uint8 (views, 3, side, side): the whole as a square, then tiles row by row.

    "split" cuts the picture as a square, "anyres" and "unpad" with its aspect, centred on black.
    """
    side, resample = cfg.vit.image_size, cfg.image.resample
    if cfg.image.cut == "pad":
        picture = padded(picture, cfg.image.mean)
    columns, rows = tiling_of(cfg, picture.size)
    whole = to_pixels(picture, side, resample)[None]
    if not columns:
        return whole
    W, H = canvas = columns * side, rows * side
    w, h = canvas if cfg.image.cut == "split" else inside(picture.size, canvas, ceil=True)
    sheet = Image.new("RGB", canvas)
    sheet.paste(picture.resize((w, h), resample, reducing_gap=3.0), ((W - w) // 2, (H - h) // 2))
    tiles = np.asarray(sheet).reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    return np.concatenate([whole, tiles.reshape(-1, 3, side, side)])


def padded(picture: Image.Image, mean: list[float]) -> Image.Image:
    """On a square of its longer side, in the encoder's mean colour, as LLaVA-1.5 has it."""
    (w, h), side = picture.size, max(picture.size)
    sheet = Image.new("RGB", (side, side), tuple(int(255 * x) for x in mean))
    sheet.paste(picture, ((side - w) // 2, (side - h) // 2))
    return sheet


def picture_slots(cfg: ModelConfig, mode: str, size: tuple[int, int]) -> np.ndarray:
    """Which visual tokens a picture takes, in order: the one owner of this.

    Token t of view v has the number v * V + t, where V = cfg.visual_tokens(mode). "unpad" lays the tiles'
    tokens side by side, drops the rows or columns that saw only padding and ends each row with NEWLINE;
    pruned tokens form no grid and stay flat, in front of each view an isolator, or before the first alone.
    """
    V, g = cfg.visual_tokens(mode), cfg.grid()
    columns, rows = tiling_of(cfg, size)
    flat = np.arange(view_count(cfg, size) * V)
    if mode != "full":
        per_tile = cfg.prune.isolator_per == "tile"
        return flat if per_tile else flat[(flat < V) | (flat % V >= cfg.prune.isolator)]
    if cfg.image.cut != "unpad":
        return flat
    grid = flat[V:].reshape(rows, columns, g, g).transpose(0, 2, 1, 3).reshape(rows * g, columns * g)
    w, h = inside(size, (columns * g, rows * g))
    left, top = (columns * g - w) // 2, (rows * g - h) // 2  # as much at the other end
    grid = grid[top : rows * g - top, left : columns * g - left]
    return np.concatenate([flat[:V], np.pad(grid, ((0, 0), (0, 1)), constant_values=NEWLINE).ravel()])


def square_tokens(cfg: ModelConfig, mode: str = "full") -> int:
    """Positions that a square picture of twice a view's side takes: what runs and reports tell of a model."""
    return len(picture_slots(cfg, mode, (2 * cfg.vit.image_size,) * 2))


def sample_slots(cfg: ModelConfig, mode: str, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """`picture_slots` of each picture, numbered through the sample's visual tokens. mode: full or pruned."""
    slots, first = [], 0
    for size in sizes:
        own = picture_slots(cfg, mode, size)
        slots.append(np.where(own == NEWLINE, NEWLINE, own + first))
        first += view_count(cfg, size) * cfg.visual_tokens(mode)
    return slots


class Sample(NamedTuple):
    """One document, ready to be laid out; a plain (pieces, pixels) will do where pictures are not cut."""

    pieces: list[Piece]
    pixels: np.ndarray  # (views, 3, size, size) uint8, of all its pictures
    sizes: list[tuple[int, int]] | None = None  # of its pictures, see `picture_sizes`

    def slots(self, cfg: ModelConfig, mode: str) -> list[np.ndarray]:
        sizes = [(1, 1)] * len(self.pixels) if self.sizes is None else self.sizes
        views = sum(view_count(cfg, size) for size in sizes)
        if views != len(self.pixels):
            raise RuntimeError(f"{len(self.pixels)} views, but pictures of {sizes} make {views}")
        return sample_slots(cfg, mode, sizes)


def load_sample(pieces: list[Piece], images: list, cfg: ModelConfig, name: str = "") -> Sample:
    return Sample(pieces, load_images(images, cfg, name), picture_sizes(images, cfg, name))


# ---------------------------------------------------------------------------------------------------------
# Batches: several samples in rows of T positions; attention is masked by doc_ids, positions restart.


@dataclass
class Rows:
    ids: Tensor  # (B, T), 0 at slots and padding
    slot_mask: Tensor  # (B, T) True where a visual token goes
    positions: Tensor  # (B, T), from 0 in every document
    doc_ids: Tensor  # (B, T), -1 at padding
    visual_index: Tensor  # (slots,) the row of the bank of visual tokens (VLM.bank) in each slot; -1: newline
    supervised: Tensor  # (R,) flat positions in B*T whose next token is a target
    targets: Tensor  # (R,)
    starts: Tensor | None = None  # (documents + 1,) int32: where each begins in B*T, the end repeated


@dataclass
class Batch:
    pixels: Tensor  # (I, 3, size, size) uint8, all views of all pictures
    full_views: Tensor  # of I, those of which slots want all tokens
    pruned_views: Tensor  # those of which slots, of student or teacher, want the pruned tokens
    student: Rows
    teacher: Rows | None  # the slow samples once more, on pruned tokens, their targets in the same order
    distill: Tensor | None  # (R of teacher,) rows of student's `supervised` that the teacher's rows belong to
    samples: int
    next_sample: int  # the number of the first sample (or row) after this step, over all ranks
    questions: Tensor | None = None  # (I, M) ids of what is asked about each view, -1 behind; see `asked`
    plan: "Planned | None" = None  # where it came from

    def to(self, device: torch.device) -> "Batch":
        def move(value):
            if isinstance(value, Rows):
                return Rows(*(move(getattr(value, f.name)) for f in dataclasses.fields(value)))
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return Batch(*(move(getattr(self, f.name)) for f in dataclasses.fields(self)))


def best_fit(
    lengths: list[int], capacity: int, images: list[int] | None = None, most_images=10**9, most=10**9
) -> list[list[int]]:
    """Which samples share a row: longest first, each into the fullest row that still has room.

    A row takes at most `most` samples, and `most_images` images: images[i] is how many sample i has.
    """
    images = images or [0] * len(lengths)
    rows, free, rooms, by_room = [], [], [], collections.defaultdict(list)  # rooms: sorted keys of by_room
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (
            (room, r)
            for room in rooms[bisect.bisect_left(rooms, lengths[i]) :]
            for r in by_room[room]
            if free[r] >= images[i] and len(rows[r]) < most
        )
        room, r = next(fits, (capacity, len(rows)))
        if r == len(rows):
            rows.append([])
            free.append(most_images)
        else:
            by_room[room].remove(r)
            if not by_room[room]:
                rooms.remove(room)
        rows[r].append(i)
        free[r] -= images[i]
        left = room - lengths[i]
        if not by_room[left]:
            bisect.insort(rooms, left)
        by_room[left].append(r)
    return rows


def row_width(lengths: list[int], row_length: int, step: int = 16) -> int:
    """The multiple of `step` that leaves the least padding, the smallest of equals: at most row_length, or
    what the longest sample needs.
    """
    least = -(-max(1, *lengths) // step) * step
    widths = range(least, max(least, row_length) + 1, step)
    return min(widths, key=lambda width: len(best_fit(lengths, width)) * width)


def make_rows(
    laid: list[Laid], first_slot: list[int], T: int, rows: list[list[int]]
) -> tuple[Rows, list[np.ndarray]]:
    """Place samples in rows of T; also returns, for each sample, which entries of `supervised` are its own.

    first_slot[i]: row of the bank of visual tokens that holds sample i's first visual token.
    """
    ids, doc_ids, positions, index = (np.full((len(rows), T), fill) for fill in (0, -1, 0, -1))
    targets, owner, starts = np.full((len(rows), T), -1), np.full((len(rows), T), -1), []
    for b, row in enumerate(rows):
        start = 0
        for i in row:
            length = len(laid[i].ids)
            here = slice(start, start + length)
            ids[b, here], doc_ids[b, here], positions[b, here] = laid[i].ids, i, np.arange(length)
            index[b, here] = np.where(laid[i].slot >= 0, laid[i].slot + first_slot[i], laid[i].slot)
            targets[b, here], owner[b, here] = laid[i].targets, i
            starts.append(b * T + start)
            start = here.stop
        starts += [b * T + start] if start < T else []  # the padding is a document of its own
    places = len(rows) * (T // 16 + 2)  # a fixed number, so that compiled code sees one shape
    starts += [ids.size] * (1 + max(0, places - len(starts)))
    supervised = np.flatnonzero(targets.reshape(-1) >= 0)
    owner = owner.reshape(-1)[supervised]
    t = torch.from_numpy
    slot_mask = index != -1
    batch = Rows(
        t(ids), t(slot_mask), t(positions), t(doc_ids), t(index[slot_mask].clip(-1)), t(supervised),
        t(targets.reshape(-1)[supervised]), torch.tensor(starts, dtype=torch.int32),
    )  # fmt: skip
    return batch, [np.flatnonzero(owner == i) for i in range(len(laid))]


def make_batch(
    samples: list[Sample], modes: list[str], cfg: ModelConfig, row_length: int, limit: int,
    next_sample: int = 0, rows: list[list[int]] | None = None, capacity: int = 0,
) -> Batch:  # fmt: skip
    """modes: "full", "fast" or "slow" for each sample.

    A slow sample is one whose student row holds all visual tokens and whose teacher row holds the pruned
    ones. The bank of visual tokens (VLM.bank) lists the full tokens of Batch.full_views, then the pruned ones
    of Batch.pruned_views. Samples whose pictures were cut off are in neither.
    rows: which samples share a row of row_length positions; None: best-fit, in rows as wide as they need.
    capacity: blank pictures make up the number of images to it, so that compiled code sees one shape.
    """
    samples = [Sample(*sample) for sample in samples]
    full, pruned = cfg.visual_tokens("full"), cfg.visual_tokens("pruned")
    views, size = [len(sample.pixels) for sample in samples], cfg.vit.image_size
    blank = np.zeros((max(0, capacity - sum(views)), 3, size, size), np.uint8)
    slots = [s.slots(cfg, "pruned" if mode == "fast" else "full") for s, mode in zip(samples, modes)]
    pieces = [split(sample.pieces, own, limit)[0] for sample, own in zip(samples, slots)]
    student = [lay_out(own, where) for own, where in zip(pieces, slots)]
    shown = np.array([laid.images > 0 for laid in student])
    wants_all, wants_few = (shown & np.isin(modes, those) for those in (["full", "slow"], ["fast", "slow"]))
    before_all, before_few = (np.cumsum(np.where(those, views, 0)) for those in (wants_all, wants_few))
    student_slot, teacher, teacher_slot, slow = [], [], [], []
    for i, (sample, mode) in enumerate(zip(samples, modes)):
        pruned_slot = before_all[-1] * full + (before_few[i] - views[i]) * pruned
        student_slot.append(pruned_slot if mode == "fast" else (before_all[i] - views[i]) * full)
        if mode == "slow" and shown[i]:  # without images teacher and student would be the same
            slow.append(i)
            teacher.append(lay_out(pieces[i], sample.slots(cfg, "pruned")))
            teacher_slot.append(pruned_slot)
    fixed, lengths = rows is not None, [len(s.ids) for s in student]
    T = row_length if fixed else row_width(lengths, row_length)
    student_rows, entries = make_rows(student, student_slot, T, rows or best_fit(lengths, T))
    teacher_rows, distill = None, None
    if teacher:
        lengths = [len(s.ids) for s in teacher]
        T = row_length if fixed else row_width(lengths, row_length)
        teacher_rows, theirs = make_rows(teacher, teacher_slot, T, best_fit(lengths, T))
        order = np.argsort(np.concatenate(theirs))
        distill = torch.from_numpy(np.concatenate([entries[i] for i in slow])[order])
    pixels = torch.from_numpy(np.concatenate([s.pixels for s in samples] + [blank]))
    own = (torch.from_numpy(np.flatnonzero(np.repeat(w, views))) for w in (wants_all, wants_few))
    return Batch(
        pixels, *own, student_rows, teacher_rows, distill, len(samples), next_sample,
        asked(samples, len(pixels), cfg),
    )  # fmt: skip


def asked(samples: list[Sample], views: int, cfg: ModelConfig) -> Tensor | None:
    """What is asked about each view, for pruners that read it: ids (I, M), -1 behind; None for the others.

    The text behind its sample's last picture but for what is supervised, the answers: all questions of a
    dialogue, with the words of the template; of few-shot prompts the last question alone.
    """
    if "text" not in prune.PRUNERS[cfg.prune.name].needs:
        return None
    texts = []
    for s in samples:
        behind = max((n for n, piece in enumerate(s.pieces) if isinstance(piece, int)), default=len(s.pieces))
        texts.append([i for ids, supervised in s.pieces[behind + 1 :] if not supervised for i in ids])
    ids = np.full((views, max(1, *map(len, texts))), -1)
    view = 0
    for sample, text in zip(samples, texts):
        ids[view : view + len(sample.pixels), : len(text)] = text
        view += len(sample.pixels)
    return torch.from_numpy(ids)


def prompt_batch(samples: list[Sample], mode: str, cfg: ModelConfig) -> Batch:
    """Prompts to continue: one a row, padded on the left so that all end together. mode: "full" or
    "pruned".
    """
    samples = [Sample(*sample) for sample in samples]
    laid = [lay_out(sample.pieces, sample.slots(cfg, mode)) for sample in samples]
    T = max(len(s.ids) for s in laid)
    ids, doc_ids, positions, index = (np.full((len(laid), T), fill) for fill in (0, -1, 0, -1))
    pixels = torch.from_numpy(np.concatenate([sample.pixels for sample in samples]))
    slot = 0
    for b, s in enumerate(laid):
        here = slice(T - len(s.ids), T)
        ids[b, here], doc_ids[b, here], positions[b, here] = s.ids, 0, np.arange(len(s.ids))
        index[b, here] = np.where(s.slot >= 0, s.slot + slot, s.slot)
        slot += len(samples[b].pixels) * cfg.visual_tokens(mode)
    t, none, slot_mask = torch.from_numpy, torch.zeros(0, dtype=torch.long), index != -1
    rows = Rows(t(ids), t(slot_mask), t(positions), t(doc_ids), t(index[slot_mask].clip(-1)), none, none)
    views = [torch.arange(len(pixels)), torch.arange(0)]
    views = views if mode == "full" else views[::-1]
    return Batch(pixels, *views, rows, None, None, len(samples), 0, asked(samples, len(pixels), cfg))


# ---------------------------------------------------------------------------------------------------------
# Scenes: a world drawn by Pillow from a seed, so it needs no download and its ground truth is exact.
# Two to six shapes and perhaps a three-letter word lie in a loose 3x3 grid on grey paper.

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 70, 220),
    "yellow": (245, 215, 40),
    "purple": (140, 40, 170),
    "orange": (245, 130, 20),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLACES = ("northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast")
LETTERS = "AEHKLNORTX"
MADE_UP = ("dax", "wug", "blick", "fep", "zorp", "tulv")
HELD_OUT = {("red", "star"), ("blue", "ring"), ("green", "square")}  # never drawn nor told in training
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
CANVAS = 128  # pixels per side of the drawing, before it is resized to what the encoder wants
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    cell: int  # 0-8, row-major in the 3x3 grid
    x: float  # centre and radius in canvas pixels
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def box(self) -> str:
        """x0 y0 x1 y1 as integers 0-999 of the image side."""
        sides = (self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)
        return " ".join(str(min(999, max(0, round(1000 * side / CANVAS)))) for side in sides)


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]  # sorted by cell
    word: str  # three letters, or "" for none
    word_cell: int
    word_xy: tuple[float, float]
    paper: int  # grey level


def make_scene(split: str, index: int) -> Scene:
    """Scene number `index` of "train" or "test": the streams never meet, and only "test" has HELD_OUT
    pairs.
    """
    rng = random.Random(f"{split}-scene-{index}")
    allowed = PAIRS if split == "test" else [pair for pair in PAIRS if pair not in HELD_OUT]
    palette = rng.sample(
        list(COLOURS), 4
    )  # few colours and shapes a scene, so that counting has something to count
    forms = rng.sample(SHAPES, 3)
    allowed = [pair for pair in allowed if pair[0] in palette and pair[1] in forms]
    if split == "test" and rng.random() < 0.3:
        allowed = allowed + 4 * [rng.choice(sorted(HELD_OUT))]
    cells = rng.sample(range(9), rng.randint(2, 6) + 1)

    def jitter(cell: int) -> tuple[float, float]:
        third = CANVAS / 3
        return (cell % 3 + 0.5) * third + rng.uniform(-4, 4), (cell // 3 + 0.5) * third + rng.uniform(-4, 4)

    things = [
        Thing(*rng.choice(allowed), cell, *jitter(cell), rng.uniform(10, 16)) for cell in sorted(cells[1:])
    ]
    word = "".join(rng.choice(LETTERS) for _ in range(3)) if rng.random() < 0.5 else ""
    x, y = jitter(cells[0])
    word_xy = (min(max(x, 21), CANVAS - 21), y)  # all three letters stay on the paper
    return Scene(tuple(things), word, cells[0], word_xy, rng.randint(120, 205))


def render(scene: Scene, size: int = CANVAS) -> Image.Image:
    """The scene as an RGB picture of size x size pixels."""
    picture = Image.new("RGB", (CANVAS, CANVAS), (scene.paper,) * 3)
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        draw_shape(pen, thing, scene.paper)
    if scene.word:
        pen.text(scene.word_xy, scene.word, fill=(0, 0, 60), font=word_font(), anchor="mm")
    return picture if size == CANVAS else picture.resize((size, size), Image.Resampling.BOX)


def draw_shape(pen: ImageDraw.ImageDraw, thing: Thing, paper: int) -> None:
    x, y, r, fill = thing.x, thing.y, thing.radius, COLOURS[thing.colour]
    if thing.shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        if thing.shape == "ring":
            pen.ellipse((x - r * 0.5, y - r * 0.5, x + r * 0.5, y + r * 0.5), fill=(paper,) * 3)
    elif thing.shape == "square":
        pen.rectangle((x - r * 0.9, y - r * 0.9, x + r * 0.9, y + r * 0.9), fill=fill)
    elif thing.shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + r * 0.8), (x - r, y + r * 0.8)], fill=fill)
    elif thing.shape == "cross":
        pen.rectangle((x - r, y - r * 0.33, x + r, y + r * 0.33), fill=fill)
        pen.rectangle((x - r * 0.33, y - r, x + r * 0.33, y + r), fill=fill)
    else:  # star: ten points, alternately far and near
        reach = [r if k % 2 == 0 else r * 0.45 for k in range(10)]
        turn = [math.pi * (k / 5 - 0.5) for k in range(10)]
        pen.polygon([(x + a * math.cos(t), y + a * math.sin(t)) for a, t in zip(reach, turn)], fill=fill)


@functools.cache
def word_font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=18)  # the font that Pillow carries


# What can be said and asked about a scene. Questions end with what they are about, places come before things.

QUESTION_TYPES = ("colour", "shape", "count", "relation", "exists")
YES_NO = ("no", "yes")


def say(scene: Scene, rng: random.Random | None = None, boxes: bool = False) -> str:
    """One sentence that names everything, in raster order or, given rng, in a random one."""
    parts = [(t.cell, f"{PLACES[t.cell]} {t.name}" + (f" [{t.box}]" if boxes else "")) for t in scene.things]
    if scene.word:
        parts.append((scene.word_cell, f"{PLACES[scene.word_cell]} word {scene.word}"))
    parts.sort()
    if rng:
        rng.shuffle(parts)
    return ", ".join(part for _, part in parts) + "."


class Asked(NamedTuple):
    kind: str
    question: str
    answer: str
    held_out: bool  # about a pair that training never shows


def ask(scene: Scene, kind: str, rng: random.Random, split: str) -> Asked | None:
    """A question of one type, or None where the scene offers none; yes and no are equally likely."""
    things = list(scene.things)
    pairs = [(t.colour, t.shape) for t in things]
    alone = [t for t in things if pairs.count((t.colour, t.shape)) == 1]
    if kind in ("colour", "shape"):
        thing = rng.choice(things)
        other = thing.shape if kind == "colour" else thing.colour
        by_name = sum(other in pair for pair in pairs) == 1 and rng.random() < 0.5
        question = f"what {kind} is {'the ' + other if by_name else PLACES[thing.cell]}?"
        return Asked(kind, question, getattr(thing, kind), (thing.colour, thing.shape) in HELD_OUT)
    if kind == "count":
        counts = [(other, sum(other in pair for pair in pairs)) for other in (*SHAPES, *COLOURS)]
        counts.append(("any", len(things)))
        answer = rng.choice(sorted({n for _, n in counts}))  # the number first: else mostly 0 and 1
        what = rng.choice([other for other, n in counts if n == answer])
        return Asked(kind, f"how many shapes are {what}?", str(answer), False)
    if kind == "relation":
        return ask_relation(alone, rng)
    if kind == "exists":
        return ask_exists(pairs, rng, split)
    if kind == "what":
        cell = rng.randrange(9)
        here = [t.name for t in things if t.cell == cell]
        word = f"word {scene.word}" if scene.word and scene.word_cell == cell else "nothing"
        return Asked(kind, f"what is {PLACES[cell]}?", here[0] if here else word, False)
    if kind == "text" and scene.word:
        return Asked(kind, "what is the word?", scene.word, False)
    if kind in ("place", "ref") and alone:
        thing = rng.choice(alone)
        ask, answer = ("where", PLACES[thing.cell]) if kind == "place" else ("in which box", thing.box)
        return Asked(kind, f"{ask} is the {thing.name}?", answer, (thing.colour, thing.shape) in HELD_OUT)
    return None


def ask_relation(alone: list[Thing], rng: random.Random) -> Asked | None:
    """Is A left of / right of / above / below B? Only where the two lie in different columns (rows)."""
    options = []
    for a in alone:
        for b in alone:
            if a.cell % 3 != b.cell % 3:
                options.append((a, b, "left of", a.cell % 3 < b.cell % 3))
                options.append((a, b, "right of", a.cell % 3 > b.cell % 3))
            if a.cell // 3 != b.cell // 3:
                options.append((a, b, "above", a.cell // 3 < b.cell // 3))
                options.append((a, b, "below", a.cell // 3 > b.cell // 3))
    if not options:
        return None
    a, b, relation, true = rng.choice(
        options
    )  # every pair is listed both ways round: yes and no are balanced
    held_out = bool({(a.colour, a.shape), (b.colour, b.shape)} & HELD_OUT)
    return Asked("relation", f"is the {a.name} {relation} the {b.name}?", YES_NO[true], held_out)


def ask_exists(pairs: list[tuple[str, str]], rng: random.Random, split: str) -> Asked:
    """Half the answers are yes. A "no" asks for a held-out pair in tests only, else training would teach the
    no.
    """
    yes = rng.random() < 0.5
    if yes:
        pair = rng.choice(pairs)
    else:
        absent = [pair for pair in PAIRS if pair not in pairs and (split == "test" or pair not in HELD_OUT)]
        near = [p for p in absent if p[0] in {c for c, _ in pairs} and p[1] in {s for _, s in pairs}]
        pair = rng.choice(
            near if near and rng.random() < 0.6 else absent
        )  # hard: both halves are there, apart
    return Asked("exists", f"is there any {pair[0]} {pair[1]}?", YES_NO[yes], pair in HELD_OUT)


def ask_many(scene: Scene, kinds: tuple[str, ...], n: int, rng: random.Random, split: str) -> list[Asked]:
    """n different questions of types drawn from `kinds`; fewer where the scene offers fewer."""
    found = {}
    for _ in range(3 * n):
        asked = ask(scene, rng.choice(kinds), rng, split)
        if asked and asked.question not in found:
            found[asked.question] = asked
        if len(found) == n:
            break
    return list(found.values())


def ask_bound(scene: Scene, thing: Thing, word: str, meaning: str, named: bool) -> Example:
    """A question about a thing that only who knows what `word` stands for can answer.

    named: "what colour is north?", whose answer is the word if it fits and else the ordinary name; otherwise
    "is the north shape dax?".
    """
    attribute = "colour" if meaning in COLOURS else "shape"
    place, ordinary = PLACES[thing.cell], getattr(thing, attribute)
    if named:
        return Example(scene, f"what {attribute} is {place}?", word if ordinary == meaning else ordinary)
    return Example(scene, f"is the {place} shape {word}?", YES_NO[ordinary == meaning])


def draw_bound(word: str, meaning: str, fits: bool, named: bool, rng: random.Random, split: str) -> Example:
    """Such a question about a thing of a new scene that the word fits, or does not fit."""
    attribute = "colour" if meaning in COLOURS else "shape"
    while True:  # one thing of each scene: all things of a scene would make rare ones fit more often
        number = rng.randrange(1 << 40)
        scene = make_scene(split, number)
        thing = rng.choice(scene.things)
        told = replace(thing, **{attribute: meaning})  # in training not even a "no" is about a held-out pair
        if (told == thing) == fits and (split == "test" or (told.colour, told.shape) not in HELD_OUT):
            return ask_bound(scene, thing, word, meaning, named)._replace(name=str(number))


# Records made of scenes, in the three data kinds of MM1 and as instructions. That captions lift 0-shot and
# interleaved documents few-shot (MM1 3.2) holds by construction. Captions alone tell a lone picture in
# ordinary words, some in the template that asks for it; but they have one picture and no question.
# Interleaved documents caption in words of their own, so that the first caption learned from them is wrong;
# but they alone have something to learn from what stands before. Questions in the template are theirs, too.

SCENE_QUESTIONS = (*QUESTION_TYPES, *QUESTION_TYPES, "place", "what", "text", "ref")  # the five come twice


class Scenes:
    """Endless records of one kind; record i is a pure function of (split, kind, i)."""

    def __init__(self, kind: str, split: str = "train"):
        self.kind, self.split = kind, split

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, i: int) -> Record:
        rng = random.Random(f"{self.split}-{self.kind}-{i}")
        scene = make_scene(self.split, rng.randrange(1 << 40))
        name = f"scenes {self.kind} {i}"
        if self.kind == "caption":
            stem = PHOTO + " " if rng.random() < 0.25 else ""  # plain as on the web, or as 0-shot prompts ask
            return Record("caption", [0, stem + say(scene)], [scene], name)
        if self.kind == "chat":
            return Record("chat", chat_about(scene, [0], rng, self.split), [scene], name)
        if self.kind == "text":
            return Record("text", [told_in_words(scene, rng)], [], name)
        return self.interleaved(scene, rng, name)

    def interleaved(self, first: Scene, rng: random.Random, name: str) -> Record:
        """2 to 9 pictures (8 shots and a question), each with a caption, or each with a question, or the
        first showing what a made-up word stands for and the others with questions about that.

        In captions, too, a made-up word stands for one colour or shape of the first picture throughout.
        """
        scenes = [first]
        for _ in range(rng.choices(range(1, 9), [1 / n for n in range(1, 9)])[0]):  # 3.9 pictures on average
            scenes.append(make_scene(self.split, rng.randrange(1 << 40)))
        meaning = rng.choice([thing.colour if rng.random() < 0.5 else thing.shape for thing in first.things])
        word, sort = rng.choice(MADE_UP), rng.choice(("captions", "questions", "binding"))
        told = [Example(scene, "", say(scene).replace(meaning, word)) for scene in scenes]
        if sort == "questions":
            for n, scene in enumerate(scenes):  # colour is what every scene can be asked
                kind = rng.choice(QUESTION_TYPES)
                asked = ask(scene, kind, rng, self.split) or ask(scene, "colour", rng, self.split)
                told[n] = Example(scene, asked.question, asked.answer)
        elif sort == "binding":
            if rng.random() < 0.5:
                told[0] = draw_bound(word, meaning, True, True, rng, self.split)
            for n in range(1, len(scenes)):
                fits, named = rng.random() < 0.5, rng.random() < 0.5
                told[n] = draw_bound(word, meaning, fits, named, rng, self.split)
        return Record("interleaved", document_parts(told), [example.image for example in told], name)


def chat_about(
    scene: Scene, picture: list, rng: random.Random, split: str, n: int = 6
) -> list[tuple[str, list]]:
    """n questions and answers; `picture` opens the first: [0] for an image, or words that tell the scene."""
    turns = []
    for _, question, answer, _ in ask_many(scene, SCENE_QUESTIONS, n, rng, split):
        turns += [("user", [question]), ("assistant", [answer])]
    if rng.random() < 0.2:
        turns[-2:] = [("user", [CAPTION_PROMPT]), ("assistant", [say(scene)])]
    turns[0] = ("user", picture + turns[0][1])
    return turns


def told_in_words(scene: Scene, rng: random.Random) -> str:
    """Text only: the sentence and a few true statements, no picture."""
    facts = [
        f"{question} {answer}." for _, question, answer, _ in ask_many(scene, QUESTION_TYPES, 3, rng, "train")
    ]
    return " ".join([say(scene, rng), *facts])


# ---------------------------------------------------------------------------------------------------------
# Files: the three kinds of MM1's pre-training data and LLaVA's conversations, and mixtures of sources

# Layouts: the keys that a record is known by, and the kinds it can be read as. The first that fits counts.
LAYOUTS = {
    "LLaVA": ({"conversations"}, ("chat", "caption")),
    "Cauldron": ({"images", "texts"}, ("chat",)),  # pairs of user and assistant: see `layout_of`
    "VLMEvalKit": ({"image", "question", "answer"}, ("chat",)),
    "OBELICS": ({"images", "texts"}, ("interleaved",)),
    "MMC4": ({"text_list", "image_info"}, ("interleaved",)),
    "captioned": ({"image", "caption"}, ("caption",)),  # what a .jpg and a .txt of a tar make, too
    "text": ({"text"}, ("text",)),
}
KINDS = ("chat", "caption", "interleaved", "text")
MMC4_LEAST_SIMILARITY = 0.24  # of an image to its sentence; the usual choice, MM1 does not say
ROLES = ("system", "user", "assistant")
ROLE_OF = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}  # LLaVA's names, and ours
SUFFIXES = (".tar", ".parquet", ".jsonl", ".tsv", ".json", ".txt")  # a folder is searched in this order
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
WITHIN_OBJECT = rb'(?:[^"{}]++|"(?:[^"\\]++|\\.)*+"|(?R))*+'
JSON_OBJECT = regex.compile(rb"\{" + WITHIN_OBJECT + rb"\}", regex.DOTALL)
CSV_FIELD_LIMIT = 2**31 - 1  # a picture in base64 is long; more is not a C long everywhere


class Table:
    """Random access to the records of a file, or of all alike in a folder or a glob such as "cc3m/*.tar".

    .json holds a list, .jsonl a record a line, .txt documents with blank lines between them, .tsv a header
    and rows, .tar the members of a record one after the other, .parquet row groups. Only where records begin
    is held in memory. raw(i) is a pure function of the files and i.
    """

    def __init__(self, path: Path):
        self.path, self.files = path, find_files(path)
        self.suffix = self.files[0].suffix
        indexes, self.changed = [], []
        for file in tqdm(self.files, desc=f"index {path}", disable=len(self.files) < 20, leave=False):
            stat = file.stat()
            indexes.append(index_file(file, stat.st_size, stat.st_mtime_ns))
            self.changed.append(stat.st_mtime_ns)
        self.starts, self.lines = [starts for starts, _ in indexes], [lines for _, lines in indexes]
        self.first = np.cumsum([0] + [len(lines) for lines in self.lines])
        if not self.first[-1]:
            raise UserError(f"{path}: expected at least one record, in a .json file a list of them")
        self.rows_by_index, self.group = None, (None, None)

    def __len__(self) -> int:
        return int(self.first[-1])

    def raw(self, i: int) -> tuple[dict, str]:
        """Record i as its file has it, and its place for error messages. Pictures of tars and parquet are
        bytes under "image" or "images"; those of a .tsv are base64, see `tsv_pictures`.
        """
        n = int(np.searchsorted(self.first, i, side="right")) - 1
        file, k = self.files[n], i - int(self.first[n])
        number = k if self.suffix == ".parquet" else int(self.lines[n][k])
        place = f"{file} {'line' if self.suffix in ('.jsonl', '.tsv', '.txt') else 'record'} {number}"
        if self.suffix == ".parquet":
            return self.parquet_row(file, n, k), place
        start, end = int(self.starts[n][k]), int(self.starts[n][k + 1])
        handle = shared_handle(file, self.changed[n])
        handle.seek(start)
        content = handle.read(end - start)
        if self.suffix == ".tar":
            return read_tar_sample(content, place), place
        try:
            text = content.decode("utf-8-sig").strip("\r\n" if self.suffix == ".tsv" else None)
        except UnicodeDecodeError as e:
            raise BadRecord(f"{place}: byte {e.start} is not UTF-8") from None
        if self.suffix == ".txt":
            return {"text": text.replace("\r\n", "\n")}, place
        if self.suffix == ".tsv":
            return self.tsv_row(tsv_header(file, self.changed[n]), text, place), place
        return read_object(text, file, start, end, place), place

    def tsv_row(self, header: list[str], text: str, place: str) -> dict[str, str]:
        cells = tsv_cells(text, place)
        if len(cells) != len(header):
            raise BadRecord(f"{place}: {len(cells)} cells, but the header names {len(header)}")
        row = dict(zip(header, cells))
        if header[0] == "index" and row.get("image", "").isdecimal() and row["image"] != row["index"]:
            try:
                row["image"] = self.raw(self.row_of_index(row["image"], place))[0]["image"]
            except RecursionError:
                raise BadRecord(f"{place}: its image refers to a row that refers back") from None
        return row

    def row_of_index(self, index: str, place: str) -> int:
        """VLMEvalKit writes a picture once: other rows have the index of that one."""
        if self.rows_by_index is None:
            self.rows_by_index = {}
            for *file, starts, first in zip(self.files, self.changed, self.starts, self.first):
                handle = shared_handle(*file)
                for k, start in enumerate(starts[:-1].tolist()):
                    handle.seek(start)
                    cell = handle.read(64).partition(b"\t")[0]
                    self.rows_by_index[cell.decode("utf-8", "replace")] = int(first) + k
        if index not in self.rows_by_index:
            raise BadRecord(f"{place}: its image is that of index {index}, which no row has")
        return self.rows_by_index[index]

    def parquet_row(self, file: Path, n: int, k: int) -> dict:
        """Rows lie in groups, which are read whole; the last one is kept."""
        group = int(self.lines[n][k])
        if self.group[0] != (os.getpid(), file, group):
            rows = open_parquet(file).read_row_group(group).to_pylist()
            self.group = (os.getpid(), file, group), rows
        return dict(self.group[1][k - int(np.searchsorted(self.lines[n], group))])


HANDLES = {}  # of files, by process: a forked worker would share the file position of its parent


def shared_handle(file: Path, changed: int):
    key = os.getpid(), file, changed
    if key not in HANDLES:
        for other in [k for k in HANDLES if k[0] != os.getpid()] + [*HANDLES][: max(0, len(HANDLES) - 63)]:
            HANDLES.pop(other, None)
        HANDLES[key] = open(file, "rb")
    return HANDLES[key]


def find_files(path: Path) -> list[Path]:
    """A file itself; those of one kind in a folder; those that match a glob."""
    if path.is_dir():
        found = {suffix: sorted(path.glob(f"*{suffix}")) for suffix in SUFFIXES}
        files = next((files for files in found.values() if files), [])
    elif path.is_file() or not any(mark in path.name for mark in "*?["):
        files = [path] if path.is_file() else []
    else:
        files = sorted(path.parent.glob(path.name))
    kinds = {file.suffix for file in files}
    if len(kinds) != 1 or not kinds <= set(SUFFIXES):
        found = f"found {', '.join(sorted(kinds))}" if files else "no such file"
        raise UserError(f"{path}: {found}; use a file, folder or glob of one of {', '.join(SUFFIXES)}")
    return files


@functools.cache
def index_file(path: Path, size: int, changed: int) -> tuple[np.ndarray, np.ndarray]:
    """Where records begin, and the file's end: int64 (n + 1,); their line or record numbers: int64 (n,), in
    parquet those of their row groups.

    A file is scanned once, as long as its size and time of change stay. A record reaches up to the next one,
    with the white space between them.
    """
    if path.suffix == ".parquet":
        about = open_parquet(path).metadata
        rows = [about.row_group(g).num_rows for g in range(about.num_row_groups)]
        return np.zeros(0, np.int64), np.repeat(np.arange(len(rows)), rows)
    if path.suffix == ".tar":
        starts = index_tar(path, size, changed)
    elif path.suffix == ".json":
        starts = index_json(path)
    else:
        return index_lines(path)
    return starts, np.arange(len(starts) - 1)


def index_lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """.jsonl, .txt, .tsv: a record is a line, lines up to a blank one, or as many as close its quotes."""
    starts, numbers, at, inside = array("q"), array("q"), 0, False
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            blank = not line.strip(b"\r\n" if path.suffix == ".tsv" else None)
            if not blank and not inside:
                starts.append(at)
                numbers.append(number)
            if path.suffix == ".tsv":
                inside = quote_goes_on(line, inside)
            else:
                inside = path.suffix == ".txt" and not blank
            at += len(line)
    starts.append(at)
    header = path.suffix == ".tsv"
    return np.array(starts)[header:], np.array(numbers)[header:]


def quote_goes_on(line: bytes, inside: bool) -> bool:
    """Whether a quoted cell of a .tsv goes on behind a line. Only at a cell's beginning a quote opens it."""
    for cell in line.rstrip(b"\r\n").split(b"\t") if inside or b'"' in line else ():
        if not inside and cell[:1] == b'"':
            inside, cell = True, cell[1:]
        inside = inside and cell.count(b'"') % 2 == 0
    return inside


def index_json(path: Path) -> np.ndarray:
    """A list of objects: 50 MB a second. What is broken beyond one record shows here, by line and column."""
    starts = array("q")
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise UserError(f"{path} is empty: expected a list of records")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        gap = regex.compile(rb"\s*+")
        at = gap.match(content, 3 if content[:3] == b"\xef\xbb\xbf" else 0).end()
        mark = b"["
        while content[at : at + 1] == mark:
            at = gap.match(content, at + 1).end()
            if not starts and content[at : at + 1] == b"]":
                break
            found = JSON_OBJECT.match(content, at)
            if not found:
                raise UserError(f"{path} {broken_json(content, at, len(content))}")
            starts.append(at)
            at, mark = gap.match(content, found.end()).end(), b","
        if content[at : at + 1] != b"]":
            place = line_and_column(content, at)
            raise UserError(
                f"{path} {place}: expected a .json file to be a list of objects, [{{...}}, {{...}}]"
            )
    starts.append(at)
    return np.array(starts)


def line_and_column(content, at: int) -> str:
    line = 1 + sum(content[k : min(k + 2**24, at)].count(b"\n") for k in range(0, at, 2**24))
    column = at - content.rfind(b"\n", 0, at)
    return f"line {line} column {column}"


def broken_json(content, at: int, end: int) -> str:
    """Where and why what begins at a byte is no JSON object."""
    piece = content[at : min(end, at + 2**20)].rstrip()
    try:
        json.JSONDecoder().raw_decode(piece.decode("utf-8", "replace"))
        why = "an object was expected"
    except (ValueError, RecursionError) as e:
        at += len(piece.decode("utf-8", "replace")[: getattr(e, "pos", 0)].encode())
        why = getattr(e, "msg", "nested too deeply")
    return f"{line_and_column(content, at)}: not JSON ({why})"


def read_object(text: str, file: Path, start: int, end: int, place: str) -> dict:
    """One JSON object; errors name line and column in the file."""
    try:
        raw = json.loads(text.rstrip(", \t\r\n") if file.suffix == ".json" else text)
    except (ValueError, RecursionError):
        with open(file, "rb") as opened:
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            one_line = ", and each record must be on one line" * (file.suffix == ".jsonl")
            raise BadRecord(f"{file} {broken_json(content, start, end)}{one_line}") from None
    if not isinstance(raw, dict):
        raise BadRecord(f"{place}: expected an object, got {str(raw)[:40]!r}")
    return raw


def index_tar(path: Path, size: int, changed: int) -> np.ndarray:
    """Where the samples of a tar begin. Kept beside it as NAME.tar.index.npy: every header is read."""
    kept = path.with_name(path.name + ".index.npy")
    try:
        found = np.load(kept, allow_pickle=False)
        if (
            found.dtype == np.int64
            and (found[:2] == (size, changed)).all()
            and (np.diff(found[2:]) > 0).all()
        ):
            return found[2:]
    except Exception:
        pass  # none yet, or not one of ours: it is written anew
    starts, last = array("q"), None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    key = tar_key(member.name)
                    if key != last:
                        starts.append(member.offset)
                    last, end = key, member.offset_data + -(-member.size // 512) * 512
                tar.members = []  # it would keep them all
            tar.fileobj.seek(tar.offset)
            while rest := tar.fileobj.read(2**20):
                if rest.strip(b"\0"):
                    raise tarfile.TarError(f"no member where one should begin, at byte {tar.offset}")
    except tarfile.TarError as e:
        raise UserError(f"{path} is damaged or no plain tar ({e}): unpack it if it is compressed") from None
    if starts:
        starts.append(min(end, size))
    found = np.array(starts, np.int64)
    temporary = path.with_name(f"{path.name}.index.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, np.concatenate([np.array([size, changed]), found]))
        os.replace(temporary, kept)
    except OSError:
        pass  # a folder that cannot be written: it is scanned again by the next run
    return found if len(found) else np.zeros(1, np.int64)


def tar_key(name: str) -> str:
    """Of a member: its path up to the first dot of the base name (webdataset)."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def read_tar_sample(content: bytes, place: str) -> dict:
    """The members of one sample: pictures in order, .json its record, else .txt its caption."""
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    name = member.name.rpartition("/")[2].partition(".")[2].lower()
                    members[name] = tar.extractfile(member).read()
        raw = json.loads(members.get("json", b"{}"))
        text = members["txt"].decode("utf-8-sig").strip() if "txt" in members else None
    except (tarfile.TarError, OSError, ValueError, RecursionError) as e:
        raise BadRecord(f"{place}: does not read ({e})") from None
    if not isinstance(raw, dict):
        raise BadRecord(f"{place}: its .json is not an object")
    pictures = [content for name, content in members.items() if f".{name}".endswith(PICTURES)]
    named = next(
        (raw[key] for key in ("image_info", "images", "image") if isinstance(raw.get(key), list)), None
    )
    if named is not None and sum(image is not None for image in named) != len(pictures):
        raise BadRecord(
            f"{place}: its .json names {len(named)} images, it has {len(pictures)}", "image missing"
        )
    rest = iter(pictures)
    if isinstance(raw.get("image_info"), list):  # MMC4
        raw["image_info"] = [dict(info, image_name=next(rest)) for info in raw["image_info"]]
        return raw
    if isinstance(raw.get("images"), list):  # in a document null stands where a text is
        raw["images"] = [None if image is None else next(rest) for image in raw["images"]]
        return raw
    if layout_of(raw) is None and (text is not None or isinstance(raw.get("caption"), str)):
        raw = {"caption": raw["caption"] if text is None else text} if pictures else {"text": text}
    return raw | ({"image": pictures} if pictures else {})


@functools.lru_cache
def tsv_header(file: Path, changed: int) -> list[str]:
    with open(file, "rb") as opened:
        return tsv_cells(opened.readline().decode("utf-8-sig", "replace").strip("\r\n"), f"{file} line 1")


def tsv_cells(text: str, place: str) -> list[str]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True), [])
    except csv.Error as e:
        raise BadRecord(f"{place}: its quotes do not close where cells end ({e})") from None


def open_parquet(path: Path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as e:
        raise UserError(f"{path} is no parquet file that can be read ({e})") from None


class FileSource:
    """The records of a Table, of one kind; record i is a pure function of the files and i.

    Without a kind the first record's layout tells it. Image paths are relative to the file, or to the folder
    `images` beside it, and stay inside.
    """

    def __init__(self, path: Path, kind: str = "", images: str = ""):
        self.table = Table(path)
        self.path, self.name = path, path.stem
        self.folder = (path if path.is_dir() else path.parent) / images
        if not kind:
            layout = layout_of(self.first(lambda i: self.table.raw(i)[0]))
            kind = LAYOUTS[layout][1][0] if layout else "chat"
        self.kind = kind

    def __len__(self) -> int:
        return len(self.table)

    def first(self, read):
        """read(i) of the first record for which it succeeds; if PROBE fail, the first one's error."""
        errors = []
        for i in range(min(PROBE, len(self))):
            try:
                return read(i)
            except BadRecord as e:
                errors.append(e)
        raise errors[0]

    def with_pictures(self, i: int) -> Record:
        record = self[i]
        for image in record.images:
            picture_size(image, record.name)
        return record

    def __getitem__(self, i: int) -> Record:
        raw, place = self.table.raw(i)
        layout = layout_of(raw)
        if layout is None or self.kind not in LAYOUTS[layout][1]:
            known = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, (keys, _) in LAYOUTS.items())
            has = ", ".join([*raw][:8])
            raise BadRecord(f"{place}: expected a record of kind {self.kind}, but it has {has} ({known})")
        try:
            return READERS[layout](raw, self.kind, self.folder, place)
        except (TypeError, ValueError, KeyError, AttributeError) as e:  # values of other types than ever seen
            raise BadRecord(f"{place}: not a record of {layout} ({e!r})") from None


PROBE = 100  # records that are tried before a file is given up


def open_file(path: Path, kind: str = "", images: str = "", name: str = "") -> FileSource:
    """A file is read once, as long as it does not change: each validation asks for its sources anew."""
    changed = path.stat().st_mtime_ns if path.exists() else 0
    return read_file(path, kind, images, name, changed)


@functools.lru_cache(maxsize=32)
def read_file(path: Path, kind: str, images: str, name: str, changed: int) -> FileSource:
    return FileSource(path, kind, images)


def layout_of(raw: dict) -> str | None:
    """The first of LAYOUTS whose keys a record has; what tells Cauldron's from OBELICS's are its texts."""
    for name, (keys, _) in LAYOUTS.items():
        if keys <= raw.keys():
            pairs = name == "Cauldron" and isinstance(raw["texts"], list)
            if name != "Cauldron" or pairs and any(isinstance(text, dict) for text in raw["texts"]):
                return name
    return None


def local_pictures(images: list, folder: Path, place: str) -> list[Path | bytes]:
    """Paths inside the folder, or pictures at hand: bytes, or parquet's {"bytes", "path"}."""
    found = []
    for image in images:
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            found.append(image)
            continue
        if not isinstance(image, str):
            raise BadRecord(f"{place}: an image must be the path of a file, got {image!r}")
        if "://" in image and (folder / image.partition("://")[2]).is_file():
            image = image.partition("://")[2]  # where wget --force-directories puts it
        if "://" in image:
            raise BadRecord(f"{place}: image {image} is a URL: download it first and write the file's path")
        path = os.path.abspath(folder / image)  # links are followed, ".." is not
        if not path.startswith(os.path.join(os.path.abspath(folder), "")):
            raise BadRecord(f"{place}: image {image} leads out of the folder {folder}", "image outside")
        found.append(folder / image)
    return found


def read_obelics(raw: dict, kind: str, folder: Path, place: str) -> Record:
    """'images' and 'texts' of equal length with a null wherever the other one has something: in order."""
    images, texts = raw["images"], raw["texts"]
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise BadRecord(f"{place}: 'images' and 'texts' must be lists of equal length")
    items = []
    for n, (image, text) in enumerate(zip(images, texts)):
        if (image is None) == (text is None) or not isinstance(text, str | None):
            raise BadRecord(f"{place}: place {n} must have an image or a text, and null in the other list")
        items += local_pictures([image], folder, place) if text is None else [text]
    return interleave(items, "\n\n", place)


def read_mmc4(raw: dict, kind: str, folder: Path, place: str) -> Record:
    """Sentences with images in front of those they were matched with; bad matches are left out."""
    texts, infos = raw["text_list"], raw["image_info"]
    lists = isinstance(texts, list) and isinstance(infos, list)
    if not lists or not all(isinstance(text, str) for text in texts):
        raise BadRecord(f"{place}: 'text_list' must be a list of texts and 'image_info' one of objects")
    before = [[] for _ in texts]
    for info in infos:
        info = info if isinstance(info, dict) else {}
        at, similarity = info.get("matched_text_index"), info.get("matched_sim", 1.0)
        if not isinstance(at, int) or not 0 <= at < len(texts) or not isinstance(similarity, int | float):
            needed = f"'image_name' and a 'matched_text_index' below {len(texts)}"
            raise BadRecord(f"{place}: an image needs {needed}, got {info}")
        if similarity >= MMC4_LEAST_SIMILARITY:
            before[at] += local_pictures([info.get("image_name")], folder, place)
    return interleave([item for text, images in zip(texts, before) for item in (*images, text)], " ", place)


def interleave(items: list[str | Path | bytes], joint: str, place: str) -> Record:
    """Images stay where they are; texts that follow each other become one, with `joint` between."""
    parts, images = [], []
    for is_text, run in itertools.groupby(items, lambda item: isinstance(item, str)):
        run = list(run)
        parts += [joint.join(run)] if is_text else range(len(images), len(images) + len(run))
        images += [] if is_text else run
    if not any(isinstance(part, str) and part.strip() for part in parts):
        raise BadRecord(f"{place}: a document without text", "empty text")
    return Record("interleaved", parts, images, place)


def read_llava(raw: dict, kind: str, folder: Path, place: str) -> Record:
    """{"image": path, paths or none, "conversations": [{"from": "human" or "gpt", "value": text}, ...]}"""
    if not isinstance(raw["conversations"], list):
        raise BadRecord(f"{place}: expected an object with a list of 'conversations'")
    images = raw.get("image") or raw.get("images") or []
    images = images if isinstance(images, list) else [images]
    has_images = bool(images) or "image" in raw or "images" in raw
    turns, seen = [], 0
    for turn in raw["conversations"]:
        turn = turn if isinstance(turn, dict) else {}
        if (
            not isinstance(turn.get("from"), str)
            or turn["from"] not in ROLE_OF
            or not isinstance(turn.get("value"), str)
        ):
            told = "a turn must have 'from' (human or gpt) and a text 'value'"
            raise BadRecord(f"{place}: {told}, got {str(turn)[:200]}")
        role, parts = ROLE_OF[turn["from"]], [turn["value"]]
        if role == "user" and has_images:  # in a record without them "<image>" is plain text
            parts, seen = split_at_images(turn["value"], seen)
        turns.append((role, parts))
    if seen != len(images):
        raise BadRecord(f"{place}: {len(images)} images but {seen} <image> marks in its human turns")
    return chat_record(turns, local_pictures(images, folder, place), kind, place)


def chat_record(turns: list[tuple[str, list]], images: list, kind: str, place: str) -> Record:
    """Turns that begin with a question (and perhaps a system text), or a caption: the first answer alone."""
    roles = [role for role, _ in turns]
    first = int(roles[:1] == ["system"])
    if roles[:1] == ["assistant"]:  # ShareGPT's cuts: LLaVA drops it, too
        turns, roles = turns[1:], roles[1:]
    if roles[first : first + 2] != ["user", "assistant"] or "system" in roles[1:]:
        raise BadRecord(f"{place}: a conversation must start with a human turn and an answer")
    empty = [n for n, (role, parts) in enumerate(turns) if role == "assistant" and not parts[0].strip()]
    if empty:
        raise BadRecord(f"{place}: turn {empty[0]} is an empty answer", "empty answer")
    if kind == "caption":  # stage 1 of LLaVA: the bare image and its caption, no instruction
        return Record("caption", [*range(len(images)), turns[first + 1][1][0]], images, place)
    return Record("chat", turns, images, place)


def split_at_images(text: str, seen: int) -> tuple[list, int]:
    """'<image>\\nWhat?' -> [0, 'What?']; a single image moves to the front of its turn, as LLaVA does."""
    chunks = text.split("<image>")
    if len(chunks) == 2:
        return [seen, (chunks[0].strip() + " " + chunks[1].strip()).strip()], seen + 1
    parts = []
    for n, chunk in enumerate(chunks):
        parts += ([seen + n - 1] if n else []) + ([chunk.strip("\n")] if chunk.strip() else [])
    return parts, seen + len(chunks) - 1


def read_cauldron(raw: dict, kind: str, folder: Path, place: str) -> Record:
    """{"images": [...], "texts": [{"user", "assistant"}, ...]}: images come before the first question."""
    images = local_pictures([image for image in raw["images"] or [] if image is not None], folder, place)
    turns = []
    for n, pair in enumerate(raw["texts"]):
        if not isinstance(pair, dict) or not isinstance(pair.get("assistant"), str):
            raise BadRecord(f"{place}: text {n} must have 'user' and 'assistant', got {str(pair)[:200]}")
        turns.append(("user", [*(range(len(images)) if n == 0 else ()), (pair.get("user") or "").strip()]))
        turns.append(("assistant", [pair["assistant"].strip()]))
    return chat_record(turns, images, kind, place)


def read_tsv_question(raw: dict, kind: str, folder: Path, place: str) -> Record:
    """A row of VLMEvalKit: its question with hint and options as LLaVA asks it, answered by the letter."""
    options = [f"{letter}. {raw[letter]}" for letter in OPTION_LETTERS if given(raw.get(letter))]
    asked = [str(raw.get("hint"))] * given(raw.get("hint")) + [str(raw["question"]), *options]
    asked += [LETTER_PROMPT] * bool(options)
    if not given(raw["answer"]):
        raise BadRecord(f"{place}: no answer", "empty answer")
    images = raw["image"] if isinstance(raw["image"], list) else tsv_pictures(raw["image"], place)
    turns = [("user", [*range(len(images)), "\n".join(asked)]), ("assistant", [str(raw["answer"])])]
    return chat_record(turns, images, kind, place)


OPTION_LETTERS = "ABCDEFGHI"
LETTER_PROMPT = "Answer with the option's letter from the given choices directly."


def given(cell: str | None) -> bool:
    """Whether a cell of a table says something: pandas writes "nan" where it has nothing."""
    return cell is not None and str(cell).strip().lower() not in ("", "nan", "none")


def tsv_pictures(cell: str, place: str) -> list[bytes]:
    """The picture, or the list of pictures, that a cell holds in base64."""
    try:
        texts = json.loads(cell.replace("'", '"')) if cell.startswith("[") else [cell]
        return [base64.b64decode(text, validate=True) for text in texts]
    except (ValueError, TypeError, AttributeError):
        raise BadRecord(f"{place}: its image is not base64") from None


def read_captioned(raw: dict, kind: str, folder: Path, place: str) -> Record:
    images = raw["image"] if isinstance(raw["image"], list) else [raw["image"]]
    if not isinstance(raw["caption"], str) or not raw["caption"].strip():
        raise BadRecord(f"{place}: an empty caption", "empty answer")
    return Record(
        "caption", [*range(len(images)), raw["caption"]], local_pictures(images, folder, place), place
    )


def read_text(raw: dict, kind: str, folder: Path, place: str) -> Record:
    if not isinstance(raw["text"], str) or raw.keys() & {"image", "images"}:
        raise BadRecord(f"{place}: 'text' must be a text without an image beside it")
    if not raw["text"].strip():
        raise BadRecord(f"{place}: a document without text", "empty text")
    return Record("text", [raw["text"]], [], place)


READERS = {
    "LLaVA": read_llava, "Cauldron": read_cauldron, "VLMEvalKit": read_tsv_question, "OBELICS": read_obelics,
    "MMC4": read_mmc4, "captioned": read_captioned, "text": read_text,
}  # fmt: skip


# What `--data scenes` means in each stage: (kind, weight). Chain-of-Sight's stage 1 is multi-task as well.
SCENES_MIX = {
    "pretrain": [("caption", 0.22), ("chat", 0.60), ("interleaved", 0.12), ("text", 0.06)],
    "sft": [("chat", 1.0)],
}
# Shares of the kinds in a mixture without weights: MM1's in pre-training, which has no chat.
SHARES = {"interleaved": 45, "caption": 45, "text": 10, "chat": 45}
ENTRY_KEYS = ("kind", "path", "images", "weight", "name", "note")


def open_sources(spec: str, stage: str) -> list[tuple[Dataset, float]]:
    """--data: "scenes", one file of records (see FileSource) or a mixture; gives (source, weight) pairs.

    A mixture is a .json list of {"kind", "path", "images", "weight", "name", "note"}, the last four optional.
    path is "scenes" or that of a file, folder or glob of records, relative to the mixture. What the weights
    of a kind's sources sum to is its share; where no entry has a weight, SHARES hold. Every source has `kind`
    and `name`: the entry's, or the file's without suffix.
    """
    path = Path(spec)
    if spec == "scenes":
        entries = [{"kind": kind, "path": "scenes", "weight": weight} for kind, weight in SCENES_MIX[stage]]
    elif not spec or (not path.exists() and not glob.has_magic(path.name)):
        raise UserError(f"--data {spec}: no such file; use 'scenes', a file of records or a mixture file")
    else:
        source = open_file(path)
        first = source.first(lambda i: source.table.raw(i)[0])
        if layout_of(first) or path.suffix != ".json" or not first.keys() & {"kind", "path"}:
            check_kind(source.kind, stage, spec)
            source.first(source.__getitem__)
            return [(source, 1.0)]
        entries = read_json(path)
    for n, entry in enumerate(entries):
        check_entry(entry, stage, f"{spec} entry {n}")
    files = [path.parent / entry["path"] for entry in entries]
    missing = [e["path"] for e, f in zip(entries, files) if e["path"] != "scenes" and not f.exists()]
    missing = [name for name in missing if not glob.has_magic(name)]  # find_files tells of those
    if missing:
        names = ", ".join(dict.fromkeys(missing))
        raise UserError(f"{spec}: these files are missing in {path.parent}: {names}; put them there")
    sources = []
    for entry, file, weight in zip(entries, files, weights_of(entries, spec)):
        kind, builtin = entry["kind"], entry["path"] == "scenes"
        name = entry.get("name", file.stem)
        source = Scenes(kind) if builtin else open_file(file, kind, entry.get("images", ""), name)
        source.name = name
        if not builtin:  # a kind that does not fit its file shows before a run begins
            source.first(source.__getitem__)
        sources.append((source, weight))
    return sources


def check_kind(kind: object, stage: str, place: str) -> None:
    if kind not in KINDS:
        raise UserError(f"{place}: kind '{kind}' is not known, use {', '.join(KINDS)}")
    if kind == "interleaved" and stage == "sft":
        raise UserError(f"{place}: interleaved data is for stage 1, stage 2 takes chat, caption and text")


def check_entry(entry: object, stage: str, place: str) -> None:
    """An entry of a mixture: known keys, values of their types, and none that would have no effect."""
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise UserError(f"{place}: expected an object with kind and path")
    check_kind(entry.get("kind"), stage, place)
    for key, value in entry.items():
        if key not in ENTRY_KEYS:
            close = difflib.get_close_matches(key, ENTRY_KEYS, 1, 0)[0]
            raise UserError(f"{place}: unknown key '{key}', the closest one is '{close}'")
        if key != "weight" and not isinstance(value, str):
            raise UserError(f"{place}: {key} {value!r} is not a text")
    if "images" in entry and (entry["kind"] == "text" or entry["path"] == "scenes"):
        raise UserError(f"{place}: 'images' has no effect on text or scenes, leave it out")
    weight = entry.get("weight", 1.0)
    if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise UserError(f"{place}: weight {weight!r} is not a number of at least 0")


def weights_of(entries: list[dict], place: str) -> list[float]:
    """As given; where no entry has one, MM1's shares of the kinds that are there, equal within a kind."""
    without = [n for n, entry in enumerate(entries) if "weight" not in entry]
    if not without:
        if not any(entry["weight"] for entry in entries):
            raise UserError(f"{place}: all weights are 0")
        return [entry["weight"] for entry in entries]
    if len(without) < len(entries):
        numbers = ", ".join(map(str, without))
        raise UserError(f"{place}: entries {numbers} have no weight, others have: give one to all or to none")
    kinds = [entry["kind"] for entry in entries]
    total = sum(SHARES[kind] for kind in set(kinds))
    return [SHARES[kind] / total / kinds.count(kind) for kind in kinds]


# ---------------------------------------------------------------------------------------------------------
# The plan of a run: which samples come, in which order, and who shares a row. Sample number n of a kind, and
# the kind of row r, are pure functions of (seed, n) and (seed, r): not of workers, ranks or restarts.


class SampleOrder:
    """n -> (source, index): a source drawn by weight, its records in a new permutation each epoch."""

    BLOCK = 4096  # draws at a time

    def __init__(self, sizes: list[int], weights: list[float], seed: int):
        self.sizes, self.seed = sizes, seed
        self.share = np.cumsum(weights) / np.sum(weights)
        self.before = [np.zeros(len(sizes), np.int64)]  # how often each source came before each block
        self.block = functools.lru_cache(maxsize=4)(self._block)
        self.permutation = functools.lru_cache(maxsize=2 * len(sizes))(self._permutation)

    def draw(self, b: int) -> np.ndarray:
        drawn = np.random.default_rng((self.seed, b)).random(self.BLOCK)
        return np.searchsorted(self.share[:-1], drawn, side="right")

    def source(self, n: int) -> int:
        return int(self.block(n // self.BLOCK)[0][n % self.BLOCK])

    def _block(self, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources of a block, and how often each of them came before."""
        for earlier in range(len(self.before) - 1, b):
            came = np.bincount(self.draw(earlier), minlength=len(self.sizes))
            self.before.append(self.before[-1] + came)
        source = self.draw(b)
        turn = np.zeros(self.BLOCK, np.int64)
        for s in range(len(self.sizes)):
            turn[source == s] = self.before[b][s] + np.arange((source == s).sum())
        return source, turn

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, source, epoch)).permutation(self.sizes[source])

    def __getitem__(self, n: int) -> tuple[int, int]:
        block, place = divmod(n, self.BLOCK)
        source, turn = (int(x[place]) for x in self.block(block))
        epoch, place = divmod(turn, self.sizes[source])
        return source, int(self.permutation(source, epoch)[place])


class Place(NamedTuple):
    """A part of a sample: what rows are filled with."""

    group: int  # in which group of sources
    number: int  # of the sample in that group
    part: int  # a document longer than a row goes on in the next part
    mode: str  # full, fast or slow
    source: int  # in that group
    index: int  # of the record in that source
    length: int = 0  # positions that a row has for it; 0: not packed


@dataclass
class Planned:
    """A micro-batch of one rank before it is drawn: what workers are handed."""

    step: int
    rows: list[list[Place]]  # unpacked: one list of samples
    cursor: list[list[int]]  # where each group goes on after this step: [pool, row in it]
    kinds: dict[str, float]  # share of the step's filled positions by kind of record, over all ranks
    fill: float  # filled share of the step's positions
    images: float  # share of the step's room for images that is used; 0 if it is not packed
    skipped: list[tuple[str, str]]  # (why, what) of the records that could not be used, see `Plan.usable`


def check_room(cfg: ModelConfig, limit: int, most_views: int) -> None:
    """limit: positions of a sample; most_views: of a row. Pictures must fit, or they would be left out."""
    takes = max(square_tokens(cfg), square_tokens(cfg, "pruned"))
    if takes >= limit:
        raise UserError(
            f"a picture takes {takes} positions, a sample may take {limit}: "
            "raise --row_limit and --row_length"
        )
    if view_count(cfg, (1, 1)) > most_views:
        raise UserError(
            f"a picture has {view_count(cfg, (1, 1))} views, a row takes {most_views}: raise --row_images"
        )


@dataclass
class Plan(IterableDataset):
    """What each step of this rank trains on, before anything is drawn or decoded.

    Packed, a step takes batch_rows rows of row_length positions, over all ranks. Sources form groups: in
    stage 1 one of each kind, drawn for each row by weight, so that a row holds one kind; in stage 2 all are
    one group and mix. A pool of samples is measured, packed by best fit, its rows are shuffled. With
    batch_size a step takes that many samples. The plan of all ranks is made by a process of its own in each.
    """

    sources: list[tuple]  # (source, weight), see open_sources
    tokenizer: Tokenizer
    cfg: ModelConfig
    choose_mode: object  # sample number -> "full", "fast" or "slow"
    seed: int
    steps: range
    batch_rows: int
    batch_size: int = 0  # above 0: not packed
    micro_steps: int = 1
    rank: int = 0
    world: int = 1
    row_length: int = 256
    row_images: int = 16  # most images of a packed row, each view of a cut one counted
    limit: int = 2048  # most positions of a sample
    by_kind: bool = False
    pad_images: bool = False  # blank pictures up to the capacity of the micro-batch
    cursor: list[list[int]] | None = None  # where to go on

    POOL = 512  # samples that are packed together
    KEPT = 512  # parts of long documents that are held

    def __post_init__(self):
        if not self.batch_size:
            self.limit = min(self.limit, self.row_length)
        self.row_images = 10**9 if self.batch_size else self.row_images
        check_room(self.cfg, self.limit, self.row_images)
        self.sources = [(s, w) for s, w in self.sources if w > 0]
        self.found = {}  # what `parts` found last, and long documents: they come again, in other rows
        names = {s.kind if self.by_kind and not self.batch_size else "": None for s, _ in self.sources}
        self.groups = [[(s, w) for s, w in self.sources if name in ("", s.kind)] for name in names]
        shares = [sum(w for _, w in group) for group in self.groups]
        self.kinds = SampleOrder([1] * len(names), shares, self.seed + 500_000)
        self.orders = [
            SampleOrder([len(s) for s, _ in group], [w for _, w in group], self.seed + 1000 * g)
            for g, group in enumerate(self.groups)
        ]

    def __iter__(self):
        try:
            yield from self.unpacked() if self.batch_size else self.packed()
        except UserError as error:  # raised across a process's border it would lose its one clear sentence
            yield error

    def unpacked(self):
        share = self.batch_size // (self.micro_steps * self.world)
        for step in self.steps:
            for micro in range(self.micro_steps):
                first = step * self.batch_size + (micro * self.world + self.rank) * share
                samples = [self.place(0, n) for n in range(first, first + share)]
                yield Planned(step, [samples], [], {}, 0.0, 0.0, [])

    def packed(self):
        cursor = [list(at) for at in self.cursor or [[0, 0]] * len(self.groups)]
        streams = [self.rows_of(g, *at) for g, at in enumerate(cursor)]
        share = self.batch_rows // (self.micro_steps * self.world)
        for step in self.steps:
            rows, filled, images, skipped = [], Counter(), 0, []
            for r in range(step * self.batch_rows, (step + 1) * self.batch_rows):
                group = self.kinds.source(r)
                cursor[group], row, kinds, seen, more = next(streams[group])
                rows.append(row)
                filled.update(kinds)
                images += seen
                skipped += more
            total = filled.total()
            shares = {kind: n / total for kind, n in filled.items()}
            fill = total / (self.batch_rows * self.row_length)
            images /= self.batch_rows * self.row_images
            for micro in range(self.micro_steps):
                first = (micro * self.world + self.rank) * share
                at = [list(c) for c in cursor]
                told = skipped if self.rank == 0 and micro == 0 else []  # every rank plans for all
                yield Planned(step, rows[first : first + share], at, shares, fill, images, told)

    def rows_of(self, group: int, pool: int, first: int):
        """Endless rows of a group from row `first` of a pool on: (where to go on, row, positions by kind,
        views, what was skipped since the pool before).
        """
        while True:
            found, lengths, views, kinds, skipped = [], [], [], [], []
            for number in range(pool * self.POOL, (pool + 1) * self.POOL):
                place = self.usable(self.place(group, number), skipped)
                record, parts = self.parts(place)
                for n, (_, length, seen) in enumerate(parts):
                    found.append(place._replace(part=n, length=length))
                    lengths.append(length)
                    views.append(seen)
                    kinds.append(record.kind)
            rows = best_fit(lengths, self.row_length, views, self.row_images, self.row_length // 16)
            random.Random(f"{self.seed}-{group}-{pool}").shuffle(rows)
            for n in range(first, len(rows)):
                filled = Counter()
                for i in rows[n]:
                    filled[kinds[i]] += lengths[i]
                on = [pool, n + 1] if n + 1 < len(rows) else [pool + 1, 0]
                seen, told = sum(views[i] for i in rows[n]), skipped if n == 0 else []
                yield on, [found[i] for i in rows[n]], filled, seen, told
            pool, first = pool + 1, 0

    def place(self, group: int, number: int) -> Place:
        mode = self.choose_mode(number * len(self.groups) + group)
        return Place(group, number, 0, mode, *self.orders[group][number])

    def usable(self, place: Place, skipped: list[tuple[str, str]]) -> Place:
        """The place itself, or, where its record is broken or has nothing to learn, that of another record of
        the same source: a pure function of seed and place, so that neither workers nor ranks change it. Adds
        (why, what) to `skipped`.
        """
        source, before = self.groups[place.group][place.source][0], len(skipped)
        for attempt in range(PROBE):
            rng = random.Random(f"{self.seed}-{place.group}-{place.source}-{place.index}-{attempt}")
            tried = place._replace(index=rng.randrange(len(source))) if attempt else place
            try:
                record, parts = self.parts(tried)
                if parts:
                    skipped += [record.lost] if record.lost else []
                    return tried
                told = f"{record.name}: no answer is left within {self.limit} positions"
                skipped.append(("no answer within the limit", told))
            except BadRecord as e:
                skipped.append((e.why, str(e)))
        raise UserError(
            f"{PROBE} records of {source.name} one after the other cannot be used, the first: "
            f"{skipped[before][1]}; python data.py check tells all; answers may need a larger --row_length "
            "and --row_limit"
        )

    def record(self, place: Place) -> Record:
        return self.groups[place.group][place.source][0][place.index]

    def parts(self, place: Place) -> tuple[Record, list[tuple[list[Piece], int, int]]]:
        """A sample in parts that fit a row and have something to learn: (pieces, positions, views) each.

        Documents go on in a next part (MM1 cuts at the sixteenth image), questions and captions are cut.
        """
        key = place._replace(number=0, part=0, length=0)
        if key not in self.found:
            record, parts = self.find_parts(key)
            held = {k: found for k, found in self.found.items() if len(found[1]) > 1}
            room = self.KEPT - len(parts) - sum(len(parts) for _, parts in held.values())
            self.found = (held if room >= 0 else {}) | {key: (record, parts)}
        return self.found[key]

    def find_parts(self, place: Place) -> tuple[Record, list[tuple[list[Piece], int, int]]]:
        record = whole_pictures(self.record(place))
        sizes = [picture_size(image, record.name) for image in record.images]  # that it is there, at least
        modes = {"fast": ["pruned"], "slow": ["full", "pruned"]}.get(place.mode, ["full"])
        slots = [max(each, key=len) for each in zip(*(sample_slots(self.cfg, m, sizes) for m in modes))]
        views = [view_count(self.cfg, size) for size in sizes]
        goes_on = record.kind in ("interleaved", "text") and not self.batch_size
        parts = split(pieces_of(record, self.tokenizer), slots, self.limit, views, self.row_images, goes_on)
        parts = parts if goes_on else parts[:1]
        measured = []
        for part in parts:
            pictures = [piece for piece in part if isinstance(piece, int)]
            text = [piece for piece in part if not isinstance(piece, int)]
            length = sum(len(slots[i]) for i in pictures) + sum(len(ids) for ids, _ in text)
            targets = sum(len(ids) for ids, supervised in text if supervised)
            targets -= not isinstance(part[0], int) and part[0][1]  # nothing comes before the first token
            if targets:
                measured.append((part, length, sum(views[i] for i in pictures)))
        return record, measured


def whole_pictures(record: Record) -> Record:
    """A document without those of its pictures that are missing or broken: of the web's many are."""
    errors, kept = [], []
    for n, image in enumerate(record.images if record.kind == "interleaved" else ()):
        try:
            picture_size(image, record.name)
            kept.append(n)
        except BadRecord as e:
            errors.append((f"{e.why}, its document kept", str(e)))
    if not errors:
        return record
    parts = [part for part in record.parts if isinstance(part, str) or part in kept]
    parts = [part if isinstance(part, str) else kept.index(part) for part in parts]
    return replace(record, parts=parts, images=[record.images[n] for n in kept], lost=errors[0])


@dataclass
class Stream(Dataset):
    """Item `planned` is that micro-batch, ready to train on."""

    plan: Plan

    def __getitem__(self, planned: Planned | UserError) -> Batch | UserError:
        if isinstance(planned, UserError):
            return planned
        plan, places, skipped = self.plan, [place for row in planned.rows for place in row], planned.skipped
        per_step = plan.batch_size or plan.batch_rows
        samples, filled, packing = [], Counter(), {}
        if not plan.batch_size:
            edges = np.cumsum([0] + [len(row) for row in planned.rows])
            packing["rows"] = [[*range(a, b)] for a, b in zip(edges, edges[1:])]
            packing["capacity"] = plan.pad_images * len(planned.rows) * plan.row_images
        try:
            for place in places:
                sample, kind, length = self.draw(place, skipped)
                samples.append(sample)
                filled[kind] += length
            batch = make_batch(
                samples, [place.mode for place in places], plan.cfg, plan.row_length, plan.limit,
                (planned.step + 1) * per_step, **packing,
            )  # fmt: skip
        except UserError as error:
            return error
        if plan.batch_size:  # of this rank's micro-batch, while a packed plan tells them of the whole step
            planned.kinds = {kind: n / filled.total() for kind, n in filled.items()}
            planned.fill = filled.total() / batch.student.ids.numel()
        batch.plan = planned
        return batch

    def draw(self, place: Place, skipped: list[tuple[str, str]]) -> tuple[Sample, str, int]:
        """The sample of a place, the kind of its record and its positions.

        A picture that is found to be broken only here, where it is decoded, or that vanished since the plan
        was made, leaves the room that was planned empty: text of which nothing is learned.
        """
        plan, kind, length = self.plan, self.plan.groups[place.group][place.source][0].kind, place.length
        try:
            if not length:
                place = plan.usable(place, skipped)
            record, parts = plan.parts(place)
            if place.part >= len(parts):
                raise BadRecord(f"{record.name}: is not what it was when the run began")
            part, length, _ = parts[place.part]
            own = [piece for piece in part if isinstance(piece, int)]
            pieces = [own.index(piece) if isinstance(piece, int) else piece for piece in part]
            return load_sample(pieces, [record.images[i] for i in own], plan.cfg, record.name), kind, length
        except BadRecord as e:
            skipped.append((e.why, str(e)))
        return load_sample([([plan.tokenizer.end] * max(1, length), False)], [], plan.cfg), kind, length


# ---------------------------------------------------------------------------------------------------------
# Downloads: LLaVA-1.5's training data below one folder. What was cut short goes on when it is repeated. A zip
# is deleted once it is unpacked (100 GB together), and DIR/.download/*.done says so: without that file it is
# fetched anew. A zip that one already has may be put under the name that the plan shows.
# With SIGHTSPEED_MIRROR=http://host/prefix https://site/x.zip comes from http://host/prefix/site/x.zip.

HUB = "https://huggingface.co"  # or HF_ENDPOINT
TRIES, WAIT, TIMEOUT, BLOCK = 5, 1.0, 60, 2**20  # in vain; seconds, doubled each time; seconds; bytes


class Part(NamedTuple):
    url: str
    to: str  # below DIR: the file, or the folder of a zip's members
    keep: int  # so many last parts of a member's name are its path there, whatever is around; 0: no zip
    gb: float  # for the plan alone
    note: str

    def file(self, root: Path) -> Path:
        return root / ".download" / f"{self.to.replace('/', '_')}.zip" if self.keep else root / self.to

    def finished(self, root: Path) -> Path:
        return self.file(root).with_suffix(".done") if self.keep else self.file(root)


# As LLaVA's README says, but: COCO's host has no certificate for its own name, S3's path to the same files
# has; OCR-VQA's links are dead, this copy has the covers, all as .jpg as the records say (some were GIFs;
# Pillow looks at the bytes). Not verified: that it has all by that name, that Stanford's servers know ranges,
# the terms of GQA's and OCR-VQA's pictures.
DOWNLOADS = {
    "llava-pretrain": [
        Part(f"{HUB}/datasets/liuhaotian/LLaVA-Pretrain/resolve/main/blip_laion_cc_sbu_558k.json",
             "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", 0, 0.181, "558,128 captions; licence: other"),
        Part(f"{HUB}/datasets/liuhaotian/LLaVA-Pretrain/resolve/main/images.zip",
             "LLaVA-Pretrain/images", 2, 27.4, "for research, under the terms of LAION, CC3M and SBU"),
    ],
    "llava-sft": [
        Part(f"{HUB}/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json",
             "llava_v1_5_mix665k.json", 0, 1.03, "665,298 conversations; CC BY 4.0"),
        Part("https://s3.amazonaws.com/images.cocodataset.org/zips/train2017.zip",
             "coco/train2017", 1, 19.337, "118,287 pictures; Flickr's terms"),
        Part("https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
             "gqa/images", 1, 21.8, "148,854 pictures of Visual Genome and COCO"),
        Part(f"{HUB}/datasets/weizhiwang/llava_v15_instruction_images/resolve/main/"
             "ocr_vqa_images_llava_v15.zip", "ocr_vqa/images", 1, 8.972, "207,572 book covers"),
        Part("https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
             "textvqa/train_images", 1, 7.072, "25,119 pictures of Open Images; CC BY 4.0"),
        Part("https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
             "vg/VG_100K", 1, 9.732, "64,346 pictures; CC BY 4.0"),
        Part("https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
             "vg/VG_100K_2", 1, 5.472, "43,903 pictures; CC BY 4.0"),
    ],
}  # fmt: skip
DOWNLOADS["llava"] = DOWNLOADS["llava-pretrain"] + DOWNLOADS["llava-sft"]
MIXTURES = {  # what --data takes: kind, path and images of the one source in each
    "pretrain.json": ("caption", "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "images"),
    "sft.json": ("chat", "llava_v1_5_mix665k.json", ""),
}


def download(name: str, to: str) -> Path:
    """Data set `name` of DOWNLOADS complete below folder `to`, with the mixtures that --data takes.

    A repeated call goes on where it stopped, without asking for what is finished. UserError: why it stopped.
    """
    if name not in DOWNLOADS:
        raise UserError(f"no data set is called '{name}': use {', '.join(DOWNLOADS)}")
    root, parts = Path(to), DOWNLOADS[name]
    root.mkdir(parents=True, exist_ok=True)
    check_disk(name, root, [part for part in parts if not part.finished(root).exists()])
    broken = (zipfile.BadZipFile, zlib.error, EOFError)
    for part in parts:
        url, file, finished = mirrored(part.url), part.file(root), part.finished(root)
        try:
            if not finished.exists():
                fetch(url, file)
            if part.keep and not finished.exists():
                unpack(file, root / part.to, part.keep)
                finished.touch()
            if part.keep:  # also of a call that was killed right here
                file.unlink(missing_ok=True)
        except (OSError, http.client.HTTPException, KeyboardInterrupt, *broken) as error:
            if isinstance(error, broken):
                file.unlink()
            goes_on = f"repeat the command and it goes on, or put that file at {file} yourself"
            raise UserError(f"{url} was not fetched and unpacked ({error!r}): {goes_on}") from error
    for mixture, (kind, path, images) in MIXTURES.items():
        if path in [part.to for part in parts] and not (root / mixture).exists():
            write_json(root / mixture, [{"kind": kind, "path": path, "images": images}])
    return root


def check_disk(name: str, root: Path, missing: list[Part]) -> None:
    """Prints what will be fetched; while a zip is unpacked it takes its room twice."""
    fetched, most, free = 0.0, 0.0, shutil.disk_usage(root).free / 1e9
    for part in missing:
        file = part.file(root)
        print(f"{part.gb:6.2f} GB  {mirrored(part.url)}\n{'':11}{part.note}; {file}")
        if not file.exists():  # a zip that is there is being unpacked: how much of it is, nobody knows
            fetched += max(0.0, part.gb - size_of(Path(f"{file}.part")) / 1e9)
            most = max(most, 1.05 * (fetched + part.gb * (part.keep > 0)))  # 5% for half-filled blocks
    print(f"{name}: {fetched:.1f} GB to fetch, at most {most:.1f} GB of disk, {free:.1f} GB are free")
    if most > free:
        raise UserError(f"{root} has {free:.1f} GB free but {name} takes {most:.1f} GB: choose another --to")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def mirrored(url: str) -> str:
    if mirror := os.environ.get("SIGHTSPEED_MIRROR"):
        return f"{mirror.rstrip('/')}/{url.partition('://')[2]}"
    return url.replace(HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"))


def fetch(url: str, file: Path) -> None:
    """url to file if it is not there, tried again until TRIES attempts in a row brought nothing new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part, most, failed = Path(f"{file}.part"), 0, 0
    while not file.exists():
        try:
            fetch_rest(url, file, part, Path(f"{file}.etag"))
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", 500)
            full = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)
            if code == 416:  # nothing comes behind what `part` has: it is of another file
                part.unlink()
            failed = 0 if size_of(part) > most else failed + 1
            most = max(most, size_of(part))
            if full or failed == TRIES or code < 500 and code not in (408, 416, 429):
                raise
            print(f"{url}: {error}; trying again")
            time.sleep(WAIT * 2**failed)


def fetch_rest(url: str, file: Path, part: Path, note: Path) -> None:
    """One connection: appends to `part` what it lacks. note: the ETag, so that two versions never mix."""
    start = size_of(part)
    etag = note.read_text() if start and note.exists() else ""
    headers = {"User-Agent": "sightspeed"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers | ({"If-Range": etag} if etag else {}))
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        told, rest = answer.headers, answer.status == 206
        if told.get_content_type() == "text/html":
            raise UserError(f"{url} gave a web page, not the file: does the network ask to log in?")
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", told.get("Content-Range", ""))
        now = told.get("ETag", "")
        if rest and (not span or int(span[1]) != start or etag not in ("", now)):
            part.unlink()
            raise ConnectionError("it is not the file that was begun")
        whole = int(span[2] if rest else told.get("Content-Length", 0))
        note.write_text("" if now.startswith("W/") else now)  # a weak one never matches
        bar = tqdm(total=whole or None, initial=start * rest, unit="B", unit_scale=True, desc=file.name)
        with open(part, "ab" if rest else "wb") as target, bar:
            while block := answer.read(BLOCK):
                target.write(block)
                bar.update(len(block))
    if whole and size_of(part) != whole:
        raise ConnectionError(f"the connection ended after {size_of(part)} of {whole} bytes")
    os.replace(part, file)
    note.unlink()


def unpack(archive: Path, folder: Path, keep: int) -> None:
    """Files of a zip below `folder`; one that is there with its size stays. Reading checks their CRC."""
    with zipfile.ZipFile(archive) as packed:
        members = [(m, m.filename.split("/")) for m in packed.infolist() if not m.is_dir()]
        if outside := [m.filename for m, names in members if {"", ".."} & {*names}]:
            raise UserError(f"{archive} would write outside of {folder}: {outside[0]}; nothing is unpacked")
        total = sum(m.file_size for m, _ in members)
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"unpack {archive.name}") as bar:
            for member, names in members:
                path = folder.joinpath(*names[-keep:])
                if not path.exists() or size_of(path) != member.file_size:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with packed.open(member) as source, open(f"{path}.tmp", "wb") as target:
                        shutil.copyfileobj(source, target, BLOCK)
                    os.replace(f"{path}.tmp", path)
                bar.update(member.file_size)


# ---------------------------------------------------------------------------------------------------------
# Commands: what is in a data set, and a form of it that trains well.


@dataclass
class CheckConfig:
    stage: str = "sft"  # the stage that is to train on it: pretrain or sft
    preset: str = "tiny"  # whose tokenizer, visual tokens and recipe
    resolution: str = ""  # as in training; so are these three, where 0 is what the recipe says
    row_length: int = 0  # positions of a row
    row_limit: int = 0  # positions of a record, with --batch_size
    row_images: int = 0  # most views of a row
    limit: int = 0  # look at this many records of each source; 0: at all
    samples: int = 3  # records that are shown
    workers: int = 0  # processes; 0: one a core


COUNTED = ("pictures", "tokens", "learned", "cut", "positions", "marks")


class Chunks(Dataset):
    """Item c: COUNTED of the usable ones of the c-th CHUNK records of a plan's only source, an array
    (records, 6), and (why, what) of the others.
    """

    CHUNK = 64

    def __init__(self, plan: Plan, records: int):
        self.plan, self.records = plan, records

    def __len__(self) -> int:
        return -(-self.records // self.CHUNK)

    def __getitem__(self, c: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
        counts, bad = [], []
        for i in range(c * self.CHUNK, min((c + 1) * self.CHUNK, self.records)):
            try:
                counts.append(self.examine(i, bad))
            except BadRecord as e:
                bad.append((e.why, str(e)))
        return np.array(counts, np.int64).reshape(-1, len(COUNTED)), bad

    def examine(self, i: int, bad: list) -> list[int]:
        record, parts = self.plan.parts(Place(0, 0, 0, "full", 0, i))
        for image in record.images:
            if not isinstance(image, Scene):
                read_image(image, record.name, decode_small)
        if not parts:
            raise BadRecord(f"{record.name}: no answer within {self.plan.limit} positions", "no answer left")
        if record.lost:
            bad.append(record.lost)
        text = [piece for part, _, _ in parts for piece in part if not isinstance(piece, int)]
        tokens = sum(len(ids) for ids, _ in text)
        whole = sum(len(p[0]) for p in pieces_of(record, self.plan.tokenizer) if not isinstance(p, int))
        learned = sum(len(ids) for ids, supervised in text if supervised)
        length = sum(length for _, length, _ in parts)
        turns = record.parts if record.kind == "chat" else []
        asked = [part for role, said in turns if role == "user" for part in said if isinstance(part, str)]
        marks = any("<image>" in part for part in asked)
        return [len(record.images), tokens, learned, tokens < whole, length, marks]


def decode_small(picture: Image.Image) -> None:
    """Reads a whole file, but of a JPEG only an eighth of its pixels a side."""
    picture.draft("RGB", (1, 1))
    picture.load()


def check(spec: str, cfg: CheckConfig) -> int:
    """Reads all records and pictures of --data SPEC, and tells what a run on all visual tokens would make of
    them. Exit code: 1 if it would skip more than 1 %.
    """
    from train_pretrain import RunConfig  # which imports this file

    if cfg.stage not in SCENES_MIX:
        raise UserError(f"--stage '{cfg.stage}': use pretrain or sft")
    model.require_at_least(cfg, 0, "row_length row_limit row_images limit samples workers")
    row = model.preset(cfg.preset)
    if row.get("plan_only"):
        raise UserError(f"--preset {cfg.preset} is {row['plan_only']}")
    run = model.from_dict(RunConfig, {**dataclasses.asdict(RunConfig()), **row[cfg.stage]})
    run.row_length, run.row_limit = cfg.row_length or run.row_length, cfg.row_limit or run.row_limit
    model_cfg = model.copy_config(row["model"])
    if cfg.stage == "sft" and "scale" in row:
        model_cfg = model.scaled_config(model_cfg, row["scale"])
    model_cfg = model.at_resolution(model_cfg, cfg.resolution or run.resolution).check()
    tokenizer, bad, records = find_tokenizer(model_cfg), 0, 0
    for source, _ in open_sources(spec, cfg.stage):
        plan = Plan(
            [(source, 1.0)], tokenizer, model_cfg, lambda number: "full", 0, range(0), 1, run.batch_size,
            row_length=run.row_length, row_images=cfg.row_images or run.row_images, limit=run.row_limit,
        )  # fmt: skip
        most = cfg.limit or (1000 if isinstance(source, Scenes) else len(source))
        chunks, counts, reasons, told = Chunks(plan, min(most, len(source))), [], Counter(), {}
        workers = min(cfg.workers or len(os.sched_getaffinity(0)), len(chunks))
        loader = DataLoader(chunks, None, num_workers=workers, multiprocessing_context="fork")
        bar = tqdm(total=chunks.records, desc=source.name, unit=" records", leave=False)
        for some, skips in loader:
            bar.update(min(Chunks.CHUNK, chunks.records - bar.n))
            counts.append(some)
            for why, what in skips:
                reasons[why] += 1
                told.setdefault(why, []).extend([what] * (reasons[why] <= 10))
        bar.close()
        counts = np.concatenate(counts)
        about = f"kind {source.kind}, at most {plan.limit:,} positions each"
        print(f"{source.name}: {chunks.records:,} records of {about}")
        print("\n".join("  " + line for line in told_of(chunks, counts, reasons, told)))
        bad, records = bad + chunks.records - len(counts), records + chunks.records
        shown = 0
        for i in random.Random(0).sample(range(chunks.records), chunks.records):
            if shown == cfg.samples:
                break
            shown += show_sample(plan, i)
    if bad > records / 100:
        print(f"{bad:,} of {records:,} records would be skipped, more than 1 %")
        return 1
    return 0


def told_of(chunks: Chunks, counts: np.ndarray, reasons: Counter, told: dict[str, list[str]]) -> list[str]:
    """Lines about what `Chunks` counted."""
    usable, bad = len(counts), chunks.records - len(counts)
    lines = [f"usable   {usable:,}, skipped {bad:,} ({bad / chunks.records:.2%})"]
    for why, n in reasons.most_common():
        lines += [f"skipped  {n:,} {why}"] + [f"         {what}" for what in told[why]]
    if not usable:
        return lines
    pictures, tokens, learned, cut, positions, marks = counts.T
    lines.append(f"pictures {pictures.sum():,}, in {(pictures > 0).sum():,} records; others have none")
    if marks.any():
        lines.append(f"marks    {marks.sum():,} records have <image> as text, as no picture belongs to it")
    lines.append(f"cut      {cut.sum():,} records, longer than {chunks.plan.limit:,} positions")
    lines.append(f"learned  {learned.sum() / tokens.sum():.1%} of {tokens.sum():,} tokens of text")
    middle = np.median(positions)
    lines.append(f"length   {positions.min():,} to {positions.max():,} positions, median {middle:,.0f}")
    powers = np.bincount(np.log2(positions).astype(int))
    for power in np.flatnonzero(powers):
        bar = "█" * math.ceil(40 * powers[power] / powers.max())
        lines.append(f"         {f'{2**power:,}-{2 ** (power + 1) - 1:,}':>14} {bar} {powers[power]:,}")
    return lines


def show_sample(plan: Plan, i: int) -> bool:
    """A record as the decoder sees it: what is learned is green, or in brackets where there is no colour.
    False if it cannot be used.
    """
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    on, off = ("\x1b[32m", "\x1b[0m") if colour else ("[[", "]]")
    try:
        record, parts = plan.parts(Place(0, 0, 0, "full", 0, i))
    except BadRecord:
        return False
    shown = ""
    for piece in parts[0][0] if parts else []:
        if isinstance(piece, int):
            shown += "<picture>"
            continue
        text = plan.tokenizer.show(piece[0])
        text = "".join(
            c if c.isprintable() or c == "\n" else "?" for c in text
        )  # no escape codes of the data's
        shown += f"{on}{text}{off}" if piece[1] and text else text
    print(
        f"\n{record.name}, learned text {'is green' if colour else 'in [[ ]]'}:\n{shown}\n" if parts else ""
    )
    return bool(parts)


@dataclass
class ConvertConfig:
    images: str = ""  # folder of the pictures that records name by path
    per_tar: int = 1000  # records of a tar


def convert(path: Path, out: Path, cfg: ConvertConfig) -> int:
    """Records of any form, such as parquet, to tars that are read in any order: NUMBER.json and its pictures,
    NUMBER.0.jpg and so on. Tars that are there already are kept, so that a repeated call goes on. Exit code:
    1 if more than 1 % of what this call converted is bad.
    """
    model.require_at_least(cfg, 1, "per_tar")
    table, bad, done = Table(path), [], 0
    folder = Path(cfg.images) if cfg.images else (path if path.is_dir() else path.parent)
    about = {"images": cfg.images, "per_tar": cfg.per_tar, "records": len(table), "files": {}}
    about["files"] = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in table.files}
    if (out / "convert.json").is_file() and read_json(out / "convert.json") != about:
        raise UserError(f"{out} holds another conversion (convert.json): choose another folder")
    if not (out / "convert.json").is_file():
        write_json(out / "convert.json", about)
    for first in tqdm(range(0, len(table), cfg.per_tar), desc=str(path), unit=" tars"):
        file = out / f"{first // cfg.per_tar:05d}.tar"
        temporary = file.with_name(file.name + ".tmp")
        if file.is_file():
            continue
        with tarfile.open(temporary, "w") as tar:
            for i in range(first, min(first + cfg.per_tar, len(table))):
                done += 1
                try:
                    members = sample_members(f"{i:09d}", *table.raw(i), folder)
                except BadRecord as e:
                    bad.append(str(e))
                    continue
                for name, content in members:
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        os.replace(temporary, file)
    print(f"{len(table):,} records, {done:,} of them converted now to {out}, {len(bad):,} could not be used")
    print("\n".join(bad[:10]))
    return int(len(bad) > done / 100)


def sample_members(key: str, raw: dict, place: str, folder: Path) -> list[tuple[str, bytes]]:
    """A record as members of a tar, (name, content). In its .json a number stands for each picture."""
    layout = layout_of(raw)
    if layout is None:
        raise BadRecord(f"{place}: no record that is known here, it has {', '.join([*raw][:8])}")
    name = next((name for name in ("image_info", "images", "image") if raw.get(name)), "")
    images = raw[name] if isinstance(raw.get(name), list) else [raw[name]] if name else []
    images = (
        tsv_pictures(images[0], place) if layout == "VLMEvalKit" and name and len(images) == 1 else images
    )
    paths = [image.get("image_name") if name == "image_info" else image for image in images]
    pictures = local_pictures([each for each in paths if each is not None], folder, place)
    try:
        contents = [p if isinstance(p, bytes) else p.read_bytes() for p in pictures]
    except OSError as e:
        raise BadRecord(f"{place}: {e}", "image missing") from None
    if name and name != "image_info":
        raw = {**raw, name: [None if image is None else n for n, image in enumerate(images)]}
    members = [(f"{key}.json", json.dumps(raw, ensure_ascii=False, default=str).encode(errors="replace"))]
    return members + [(f"{key}.{n}.{picture_suffix(c, place)}", c) for n, c in enumerate(contents)]


def picture_suffix(content: bytes, place: str) -> str:
    suffix = read_image(content, place, lambda picture: picture.format or "").lower()
    suffix = {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2"}.get(suffix, suffix)
    if f".{suffix}" not in PICTURES:
        raise BadRecord(f"{place}: a picture of format {suffix} has no place in a tar", "image broken")
    return suffix


@dataclass
class DownloadConfig:
    to: str = ""  # folder that the data set is downloaded to


def main(argv: list[str]) -> None:
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    command, flags = words[:1], argv[len(words) :]
    if command == ["check"]:
        model.parse_cli(flags, __doc__, cfg := CheckConfig())
        if len(words) == 2:
            raise SystemExit(check(words[1], cfg))
    elif command == ["convert"]:
        model.parse_cli(flags, __doc__, cfg := ConvertConfig())
        if len(words) == 3:
            raise SystemExit(convert(Path(words[1]), Path(words[2]), cfg))
    elif command == ["download"]:
        model.parse_cli(flags, __doc__, cfg := DownloadConfig())
        if len(words) == 2 and cfg.to:
            return print(f"in {download(words[1], cfg.to)}")
    else:
        model.parse_cli(flags, __doc__, CheckConfig(), ConvertConfig(), DownloadConfig())
    raise UserError(f"{' '.join(words) or 'nothing'}: what to do? See python data.py --help")


if __name__ == "__main__":
    model.run_cli(main)
