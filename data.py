"""Data: records, labels, tiles, batches, the plan of a run, pictures, tokenizer, readers, the world *Scenes*.

    record ─► pieces: token ids, each supervised or not, and images ─► rows (B, T) with doc_ids and positions

A source (Scenes, or a file) gives a Record. `Plan` tokenizes and measures it and finds it a row; a worker
decodes its pictures, and `make_batch` lays samples out in rows. Sources are files, folders and globs of .json
(a list), .jsonl and .tar with records of one of these forms, and .txt, where blank lines separate documents:

    chat, caption   {"image": PATHS, "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}
    caption         {"image": PATHS, "caption": TEXT}; in a tar also KEY.jpg beside KEY.txt
    interleaved     {"images": [PATH or null, ...], "texts": [null or TEXT, ...]}, one in each place
    text            {"text": TEXT}

tools/convert.py makes tars of other forms; tools/check.py tells what a run would make of a data set.
"""

import base64
import contextlib
import difflib
import errno
import functools
import glob
import io
import itertools
import json
import math
import mmap
import os
import random
import re
import tarfile
import unicodedata
from array import array
from collections import Counter, defaultdict, namedtuple
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
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

import prune
from model import ASSETS, ModelConfig, UserError, find_half, read_decoder_config, read_json, require

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
# Records and their labels. A piece is an image (its number in the record) or (ids, supervised). Labels come
# from pieces, never from searching strings, so the supervised tokens are the answers by construction.

Piece = int | tuple[list[int], bool]


@dataclass
class Record:
    """One document, before tokenization. Its parts are image numbers and strings in order, all supervised; of
    kind "chat" (role, parts) turns, of which the assistant's are supervised.
    """

    kind: str  # caption, interleaved, text or chat
    parts: list
    images: list  # Scenes, or of type Picture
    name: str = ""  # where it came from, for error messages


def pieces_of(record: Record, tokenizer: Tokenizer) -> list[Piece]:
    if record.kind == "chat":
        return chat_pieces(record.parts, tokenizer)
    contents = [part if isinstance(part, int) else (tokenizer.encode(part), True) for part in record.parts]
    return [(tokenizer.start, False), *contents, ([tokenizer.end], True)]


def chat_pieces(turns: list[tuple], tokenizer: Tokenizer) -> list[Piece]:
    """Turns to pieces. The end token of an answer is supervised with it, so that the model learns to stop. An
    answer without content ends a prompt: there the model begins to speak.
    """
    if tokenizer.system and turns[0][0] != "system":
        turns = [("system", [tokenizer.system]), *turns]
    pieces, last_end, last_tail = [(tokenizer.start, False)], "", ""
    for role, content in turns:
        before, end, tail = tokenizer.template[role]
        content, answer = [*content], role == "assistant"
        if tokenizer.strips and content:  # white space at the ends of a turn; that around images inside stays
            for edge, strip in ((0, str.lstrip), (-1, str.rstrip)):
                if isinstance(content[edge], str):
                    content[edge] = strip(content[edge])
        before_image = bool(content) and isinstance(content[0], int)
        pieces.append((tokenizer.control(last_tail + before, last_end, before_image), False))
        pieces += [item if isinstance(item, int) else (tokenizer.encode(item), answer) for item in content]
        if answer and not content:
            return pieces
        pieces.append((tokenizer.control(end), answer))
        last_end, last_tail = end, tail
    return [*pieces, (tokenizer.control(last_tail, last_end), False)]


def prompt_pieces(question: str, images: int, tokenizer: Tokenizer, history: list = ()) -> list[Piece]:
    """Everything up to where the assistant starts to answer. history: earlier (question, answer) pairs."""
    turns = []
    for earlier, answer in history:
        turns += [("user", [earlier]), ("assistant", [answer])]
    turns += [("user", [question]), ("assistant", [])]
    turns[0] = ("user", [*range(images), *turns[0][1]])
    return chat_pieces(turns, tokenizer)


# Templates of a base model (MM1 6.1, those of BLIP): "{image} A photo of {caption}", and one for questions.
# No space stands between picture and text but the one that Scenes' tokenizer puts in front of every text.
PHOTO, QUESTION = "A photo of", "Question: {} Short answer:"
# A picture with a question and its answer or, where the question is "", with a caption; where it came from
Example = namedtuple("Example", "image question answer name", defaults=[""])


def document_parts(examples: list[Example]) -> list:
    """Parts of an interleaved document: each picture, its text in the template and a newline."""
    parts = []
    for n, example in enumerate(examples):
        stem = QUESTION.format(example.question) if example.question else PHOTO
        parts += [n, f"{stem} {example.answer}\n"]
    return parts


def shot_pieces(demos: list[Example], question: str, tokenizer: Tokenizer) -> list[Piece]:
    """A few-shot prompt: an interleaved document that breaks off before the answer about one more picture."""
    parts = document_parts([*demos, Example(None, question, "")])
    parts[-1] = parts[-1].removesuffix(" \n")
    pieces = pieces_of(Record("interleaved", parts, []), tokenizer)
    return [piece if isinstance(piece, int) else (piece[0], False) for piece in pieces[:-1]]


def split(pieces: list[Piece], lengths, limit: int, tiles=None, most_tiles=10**9, together=False) -> list:
    """Cut pieces into chunks of at most `limit` positions and `most_tiles` tiles. Pictures, whose positions
    (lengths) and tiles are given, are never cut, and left out if they fit into no chunk. together: a picture
    starts a new chunk with the text behind it, if that has room for both.
    """
    chunks, room, free = [[]], limit, most_tiles
    for piece, behind in zip(pieces, [*pieces[1:], 0]):
        if isinstance(piece, int):
            length, count = lengths[piece], tiles[piece] if tiles else 1
            both = length if isinstance(behind, int) or not together else length + len(behind[0])
            if length > room or count > free or room < both <= limit:
                chunks, room, free = [*chunks, []], limit, most_tiles
            if length <= room and count <= free:
                chunks[-1].append(piece)
                room, free = room - length, free - count
            continue
        ids, supervised = piece
        while ids:
            if not room:
                chunks, room, free = [*chunks, []], limit, most_tiles
            chunks[-1].append((ids[:room], supervised))
            ids, room = ids[room:], max(0, room - len(ids))
    return [chunk for chunk in chunks if chunk]


NEWLINE, TEXT = -1, -2  # bank rows: the last one, which ends a row of tiles' tokens; none, no slot is there
Laid = namedtuple("Laid", "ids bank_rows targets")


def lay_out(pieces: list[Piece], slots: list[np.ndarray]) -> Laid:
    """A sample as arrays (T,): ids, 0 at slots; the row of VLM.bank whose visual token goes there, or TEXT;
    the id of the next token where that is supervised, else -1. slots: the bank rows of each image.
    """
    ids, bank_rows, supervised = [], [], []
    for piece in pieces:
        text, learned = ([0] * len(slots[piece]), False) if isinstance(piece, int) else piece
        ids += text
        bank_rows += slots[piece].tolist() if isinstance(piece, int) else [TEXT] * len(text)
        supervised += [learned] * len(text)
    ids = np.array(ids, dtype=np.int64)
    targets = np.full(len(ids), -1)
    targets[:-1] = np.where(supervised[1:], ids[1:], -1)
    return Laid(ids, np.array(bank_rows, dtype=np.int64), targets)


# ---------------------------------------------------------------------------------------------------------
# Tiles (ImageConfig.cut): the whole picture as a square, then pieces of it, all of the encoder's size.

Size = tuple[int, int]  # (width, height) in pixels; of tilings (columns, rows)
TILINGS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # LLaVA-NeXT's, in its order
CUT_BY_SIZE = ("anyres", "unpad")  # for these the size of a picture tells how many tokens it takes


def inside(size: Size, box: Size, ceil: bool = False) -> Size:
    """The largest size of the same aspect in a box, rounded down, or up as LLaVA-NeXT resizes."""
    (w, h), (W, H) = size, box
    if W * h < H * w:  # it fills the width
        return W, (h * W + (w - 1 if ceil else 0)) // w
    return (w * H + (h - 1 if ceil else 0)) // h, H


def tiling_of(cfg: ModelConfig, size: Size, tilings=TILINGS) -> Size:
    """Columns and rows of tiles beside the whole picture, (0, 0) if it is not cut. Where its size matters,
    those that keep most of its pixels; of equals the ones that leave least room empty.
    """
    if cfg.image.cut not in CUT_BY_SIZE:
        return (2, 2) if cfg.image.cut == "split" else (0, 0)  # split: MM1's sub-images (its section 5)

    def fit(tiling: Size) -> tuple:
        box = tiling[0] * cfg.vit.image_size, tiling[1] * cfg.vit.image_size
        kept = min(math.prod(inside(size, box)), math.prod(size))
        return kept, kept - math.prod(box)

    return max(tilings, key=fit)  # the first of equals


def tile_count(cfg: ModelConfig, size: Size) -> int:
    return 1 + math.prod(tiling_of(cfg, size))


def picture_slots(cfg: ModelConfig, view: str, size: Size, first: int = 0) -> np.ndarray:
    """The rows of VLM.bank that a picture takes, in order: token t of tile i is first + i * V + t, where V =
    cfg.visual_tokens(view). "unpad" lays the tiles' tokens side by side, drops the rows or columns that saw
    only padding and ends each row with NEWLINE. Pruned tokens stay flat, behind one isolator or one a tile.
    """
    V, g = cfg.visual_tokens(view), cfg.grid()
    columns, rows = tiling_of(cfg, size)
    flat = np.arange((1 + columns * rows) * V)  # (tiles * V,)
    if view == "pruned" and cfg.prune.isolator_per == "image":
        flat = flat[(flat < V) | (flat % V >= cfg.prune.isolator)]
    flat = flat + first
    if view == "pruned" or cfg.image.cut != "unpad":
        return flat
    grid = flat[V:].reshape(rows, columns, g, g).transpose(0, 2, 1, 3).reshape(rows * g, columns * g)
    w, h = inside(size, (columns * g, rows * g))
    left, top = (columns * g - w) // 2, (rows * g - h) // 2  # as much is dropped at the other end
    grid = grid[top : rows * g - top, left : columns * g - left]
    return np.concatenate([flat[:V], np.pad(grid, ((0, 0), (0, 1)), constant_values=NEWLINE).ravel()])


def square_tokens(cfg: ModelConfig, view: str = "full") -> int:
    """Positions of a square picture of twice a tile's side: the number that runs and reports print."""
    return len(picture_slots(cfg, view, (2 * cfg.vit.image_size,) * 2))


def sample_slots(cfg: ModelConfig, view: str, sizes: list[Size], first: int = 0) -> list[np.ndarray]:
    """`picture_slots` of each picture of a sample whose tokens begin at row `first` of the bank."""
    slots = []
    for size in sizes:
        slots.append(picture_slots(cfg, view, size, first))
        first += tile_count(cfg, size) * cfg.visual_tokens(view)
    return slots


# ---------------------------------------------------------------------------------------------------------
# Batches: several samples in rows of T positions; attention is masked by doc_ids, positions restart.

# Views by mode: the student's, and the teacher's of a slow sample
VIEWS = {"full": ("full",), "pruned": ("pruned",), "slow": ("full", "pruned")}


class Sample(NamedTuple):
    """A document, or a part of a long one. Plain (pieces, pixels) will do where pictures are not cut."""

    pieces: list[Piece]
    pixels: np.ndarray | None  # (tiles, 3, size, size) uint8, None before they are decoded
    sizes: list[Size] | None = None  # of its pictures, see `picture_sizes`
    images: list = ()  # its pictures, not decoded. From here on only a Plan fills in, and needs, the fields
    mode: str = ""  # full, pruned or slow
    kind: str = ""
    name: str = ""
    number: int = 0  # in its group of sources
    tiles: int = 0
    length: int = 0  # positions; of a slow sample the larger of student's and teacher's


@dataclass
class Rows:
    ids: Tensor  # (B, T), 0 at slots and padding
    slot_mask: Tensor  # (B, T) True where a visual token goes
    positions: Tensor  # (B, T), from 0 in every document
    doc_ids: Tensor  # (B, T) number of the sample, -1 at padding
    visual_index: Tensor  # (slots,) the row of the bank of visual tokens (VLM.bank) in each slot, or NEWLINE
    supervised: Tensor  # (R,) flat positions in B*T whose next token is a target
    targets: Tensor  # (R,)
    starts: Tensor | None = None  # (documents + 1,) int32: where each begins in B*T, the end repeated


@dataclass
class Batch:
    pixels: Tensor  # (I, 3, size, size) uint8, all tiles of all pictures
    full_tiles: Tensor  # of I, those whose full tokens are in the bank
    pruned_tiles: Tensor  # of I, those whose pruned tokens are in the bank
    student: Rows
    teacher: Rows | None  # the slow samples once more, on pruned tokens
    distill: Tensor | None  # (R of teacher,) for each of its targets, which of the student's it is
    samples: int
    next_sample: int  # the number of the first sample (or row) after this step, over all ranks
    questions: Tensor | None = None  # (I, M) see `question_ids`
    plan: "Planned | None" = None  # what it was made from, without its rows

    def to(self, device: torch.device) -> "Batch":
        def move(value):
            if isinstance(value, Rows):
                return Rows(*map(move, vars(value).values()))
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return Batch(*map(move, vars(self).values()))


def best_fit(lengths: list[int], capacity: int, images=None, most_images=10**9, most=10**9) -> list:
    """Which samples share a row: longest first, each into the fullest row that still has room. A row takes at
    most `most` samples, and `most_images` of their images.
    """
    images = images or [0] * len(lengths)
    rows, open_rows = [], []  # open: (room, images that it may still take, row), the last that changed last
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [place for place in open_rows if place[0] >= lengths[i] and place[1] >= images[i]]
        if fits:
            place = min(fits, key=lambda place: place[0])  # the first of equals
            open_rows.remove(place)
        else:
            place = (capacity, most_images, [])
            rows.append(place[2])
        room, free, row = place
        row.append(i)
        if room > lengths[i] and len(row) < most:
            open_rows.append((room - lengths[i], free - images[i], row))
    return rows


def row_width(lengths: list[int], row_length: int, step: int = 16) -> int:
    """The multiple of `step` up to row_length, or to the longest sample, that leaves the least padding."""
    least = math.ceil(max(1, *lengths) / step) * step
    widths = range(least, max(least, row_length) + 1, step)
    return min(widths, key=lambda width: len(best_fit(lengths, width)) * width)


def make_rows(laid: list[Laid], row_length: int, fixed=False, rows=None, prompts=False) -> Rows:
    """Samples in rows, by best fit or as `rows` says, which lists the samples that share each row.
    fixed: rows of row_length positions, else as wide as they need. prompts: one a row, padded on the left.
    """
    lengths = [len(sample.ids) for sample in laid]
    T = row_length if fixed else row_width(lengths, row_length)
    if prompts:
        T, rows = max(lengths), [[i] for i in range(len(laid))]
    rows = rows or best_fit(lengths, T)
    empty = np.array([0, TEXT, -1, 0, -1])
    table = np.tile(empty[:, None, None], (1, len(rows), T))  # (5, B, T)
    for b, row in enumerate(rows):
        start = T - lengths[b] if prompts else 0
        for i in row:
            doc_ids = np.full(lengths[i], 0 if prompts else i)
            table[:, b, start : start + lengths[i]] = [*laid[i], np.arange(lengths[i]), doc_ids]
            start += lengths[i]
    ids, bank_rows, targets, positions, doc_ids = table
    slot_mask, supervised = bank_rows != TEXT, np.flatnonzero(targets >= 0)  # (B, T), (R,)
    left = np.pad(doc_ids, ((0, 0), (1, 0)), constant_values=-2)[:, :-1]  # (B, T), what stands on the left
    starts = np.flatnonzero(doc_ids != left).astype(np.int32)  # (documents,), and padding is one, too
    most = len(rows) * (T // 16 + 2)  # a fixed number, so that compiled code sees one shape
    starts = np.pad(starts, (0, 1 + max(0, most - len(starts))), constant_values=ids.size)
    arrays = [ids, slot_mask, positions, doc_ids, bank_rows[slot_mask], supervised]
    return Rows(*map(torch.from_numpy, [*arrays, targets.reshape(-1)[supervised], starts]))


def make_batch(
    samples: list[Sample], modes: list[str], cfg: ModelConfig, row_length: int, limit: int,
    next_sample: int = 0, rows=None, capacity: int = 0, prompts: bool = False,
) -> Batch:  # fmt: skip
    """modes: for each sample "full", "pruned" or "slow": its student on full tokens, its teacher on pruned.
    limit: positions of a sample. rows: which samples share a row of row_length positions; None: best fit, in
    rows as wide as they need. capacity: blank pictures make up the number of tiles to it.
    """
    samples = [Sample(*sample) for sample in samples]
    first_tile = np.cumsum([0] + [len(sample.pixels) for sample in samples])
    # The bank of visual tokens (VLM.bank) lists the full tokens of bank_tiles, then the pruned ones. Samples
    # whose pictures were cut off are in neither, and as slow ones they have no teacher.
    bank_tiles, bank_row = {"full": [], "pruned": []}, 0
    pieces, laid = {}, {"full": {}, "pruned": {}}  # by the number of the sample
    for view in bank_tiles:
        for i, (sample, mode) in enumerate(zip(samples, modes)):
            if view not in VIEWS[mode]:
                continue
            tiles = len(sample.pixels)
            sizes = [ANY_SIZE] * tiles if sample.sizes is None else sample.sizes
            slots = sample_slots(cfg, view, sizes, bank_row)
            if sum(tile_count(cfg, size) for size in sizes) != tiles:
                raise RuntimeError(f"{tiles} tiles, but pictures of {sizes} make another number")
            if view == VIEWS[mode][0]:
                pieces[i] = split(sample.pieces, [*map(len, slots)], limit)[0]
            has_images = any(isinstance(piece, int) for piece in pieces[i])
            if has_images or view == VIEWS[mode][0]:
                laid[view][i] = lay_out(pieces[i], slots)
            if has_images:
                bank_tiles[view] += range(first_tile[i], first_tile[i + 1])
                bank_row += tiles * cfg.visual_tokens(view)
    fixed, teacher, distill = rows is not None, None, None
    student = [laid[VIEWS[mode][0]][i] for i, mode in enumerate(modes)]
    student = make_rows(student, row_length, fixed, rows, prompts)
    slow = [i for i in laid["pruned"] if modes[i] == "slow"]
    if slow:
        teacher = make_rows([laid["pruned"][i] for i in slow], row_length, fixed)
        of_student = student.doc_ids.view(-1)[student.supervised]  # (R,), the sample of each target
        of_teacher = teacher.doc_ids.view(-1)[teacher.supervised]
        distill = torch.zeros_like(of_teacher)
        for j, i in enumerate(slow):
            distill[of_teacher == j] = (of_student == i).nonzero()[:, 0]
    blank = np.zeros((max(0, capacity - first_tile[-1]), *samples[0].pixels.shape[1:]), np.uint8)
    pixels = torch.from_numpy(np.concatenate([*(sample.pixels for sample in samples), blank]))
    full, pruned = (torch.tensor(tiles, dtype=torch.long) for tiles in bank_tiles.values())
    questions = question_ids(samples, len(pixels), cfg)
    return Batch(pixels, full, pruned, student, teacher, distill, len(samples), next_sample, questions)


def prompt_batch(samples: list[Sample], view: str, cfg: ModelConfig) -> Batch:
    """Prompts to continue: one a row, padded on the left so that all end together. view: full or pruned."""
    return make_batch(samples, [view] * len(samples), cfg, 0, 10**9, prompts=True)


def question_ids(samples: list[Sample], tiles: int, cfg: ModelConfig) -> Tensor | None:
    """For pruners that read it the question about each tile: ids (I, M), -1 behind. It is the text behind its
    sample's last picture that is not supervised: all questions of a dialogue, of few-shot prompts the last.
    """
    if "text" not in prune.PRUNERS[cfg.prune.name].needs:
        return None
    questions = []
    for sample in samples:
        question = []
        for piece in sample.pieces:
            if isinstance(piece, int):
                question = []
            elif not piece[1]:
                question = question + piece[0]
        questions += [question] * len(sample.pixels)
    ids = np.full((tiles, max([1, *map(len, questions)])), -1)
    for row, question in zip(ids, questions):
        row[: len(question)] = question
    return torch.from_numpy(ids)


# ---------------------------------------------------------------------------------------------------------
# The plan of a run: which samples come, in which order, and who shares a row. Sample number n of a kind, and
# the kind of row r, are pure functions of (seed, n) and (seed, r): not of workers, ranks or restarts.


@dataclass
class RowConfig:
    """How samples become rows: the flags of both stages that the plan needs."""

    seed: int = 0  # of connector, sample order and modes
    rows: int = 16  # packed rows of an optimizer step, over all ranks and micro-steps
    batch_size: int = 0  # above 0: a step takes this many samples instead, in rows as wide as they need
    micro_steps: int = 1  # gradient accumulation
    row_length: int = 256  # positions of a row (with --batch_size: at most), shared by several samples
    row_images: int = 16  # packing: most images of a row (MM1: 16), each tile of a cut one counted
    row_limit: int = 2048  # positions of a sample (packed: row_length at most); documents go on in a next one

    @property
    def sample_limit(self) -> int:
        return self.row_limit if self.batch_size else min(self.row_limit, self.row_length)

    def check_room(self, cfg: ModelConfig) -> None:
        """Pictures must fit into a sample and a row, or all of them would be left out."""
        positions, tiles = max(square_tokens(cfg), square_tokens(cfg, "pruned")), tile_count(cfg, ANY_SIZE)
        text = f"a picture takes {positions} positions, a sample may take {self.sample_limit}"
        require(positions < self.sample_limit, f"{text}: raise --row_limit and --row_length")
        text = f"a picture has {tiles} tiles, a row takes {self.row_images}"
        require(self.batch_size or tiles <= self.row_images, f"{text}: raise --row_images")


def sample_order(sizes: list[int], weights: list[float], seed: int, first: int = 0, block: int = 4096):
    """Endless (source, index) from sample number `first` on: a source drawn by weight, its records in a new
    permutation each epoch. Sources are drawn in blocks, so that earlier ones need only be counted.
    """
    shares = np.cumsum(weights) / np.sum(weights)
    turns, permutations = np.zeros(len(sizes), np.int64), {}
    for number in itertools.count():
        uniform = np.random.default_rng((seed, number)).random(block)
        sources = np.searchsorted(shares[:-1], uniform, side="right")
        earlier = max(0, first - number * block)
        turns += np.bincount(sources[:earlier], minlength=len(sizes))
        for source in sources[earlier:].tolist():
            epoch, place = divmod(int(turns[source]), sizes[source])
            turns[source] += 1
            if (source, epoch) not in permutations:
                permutations.pop((source, epoch - 1), None)
                rng = np.random.default_rng((seed, source, epoch))
                permutations[source, epoch] = rng.permutation(sizes[source])
            yield source, int(permutations[source, epoch][place])


@dataclass
class Planned:
    """A micro-batch of one rank before its pictures are decoded: what workers are handed."""

    step: int
    rows: list[list[Sample]]  # with batch_size: one list of samples
    skipped: list[tuple]  # (reason, message) of records that could not be used
    cursor: list  # where each group goes on: [pool, row]
    shares: dict[str, float] | None = None  # for the log: how full it is, and of what


@dataclass
class Plan(IterableDataset):
    """What each step of this rank trains on, tokenized and measured, but before any picture is decoded.

    Packed, pools of samples are put into rows by best fit, and the rows shuffled; by_kind, a row holds one
    kind, drawn by weight (stage 1). Every rank plans for all, in a process of its own, which opens pictures
    only where their size matters or a document can do without them; others may prove broken when decoded.
    """

    sources: list[tuple]  # (source, weight), see open_sources
    tokenizer: Tokenizer
    cfg: ModelConfig
    rows: RowConfig
    choose_mode: object  # sample number -> "full", "pruned" or "slow"
    steps: range
    rank: int = 0
    world: int = 1
    by_kind: bool = False
    pad_images: bool = False  # blank pictures up to the capacity of the micro-batch
    cursor: list | None = None  # where to go on

    POOL = 512  # samples that are packed together

    def __post_init__(self):
        self.rows.check_room(self.cfg)
        groups = defaultdict(list)
        for source, weight in self.sources:
            if weight > 0:
                kind = source.kind if self.by_kind and not self.rows.batch_size else ""
                groups[kind].append((source, weight))
        self.groups = [*groups.values()]

    def order(self, group: int, first: int):
        """(number, (source, index)) of a group's samples from number `first` on."""
        sources, weights = zip(*self.groups[group])
        sizes = [len(source) for source in sources]
        return enumerate(sample_order(sizes, weights, self.rows.seed + 1000 * group, first), first)

    def __iter__(self):
        try:
            yield from self.micro_batches()
        except UserError as error:  # yielded instead of raised: DataLoader would wrap it in a traceback
            yield error

    def micro_batches(self):
        cfg, shares = self.rows, [sum(weight for _, weight in group) for group in self.groups]
        first, cursor = self.steps.start, [*(self.cursor or [[0, 0]] * len(self.groups))]
        streams = [self.packed_rows(group, *at) for group, at in enumerate(cursor)]
        groups = sample_order([1] * len(shares), shares, cfg.seed + 500_000, first * cfg.rows)  # of rows
        order = self.order(0, first * cfg.batch_size)
        share = (cfg.batch_size or cfg.rows) // (cfg.micro_steps * self.world)
        for step in self.steps:
            rows, skipped = [], []
            while len(rows) < cfg.rows and not cfg.batch_size:
                group, _ = next(groups)
                row, cursor[group], reports = next(streams[group])
                rows.append(row)
                skipped += reports
            for micro in range(cfg.micro_steps):
                if cfg.batch_size:
                    samples = [*itertools.islice(order, share * self.world)]  # of all ranks
                    samples, skipped = self.draw(0, samples[self.rank * share : (self.rank + 1) * share])
                    yield Planned(step, [samples], skipped, [])
                else:  # every rank plans for all, the first one reports
                    start = (micro * self.world + self.rank) * share
                    reported = skipped if self.rank == 0 and micro == 0 else []
                    yield Planned(step, rows[start : start + share], reported, [*cursor])

    def packed_rows(self, group: int, pool: int, first: int):
        """Endless rows from row `first` of a pool on: samples, cursor behind them, what the pool skipped."""
        length, order = self.rows.row_length, self.order(group, pool * self.POOL)
        while True:
            samples, skipped = self.draw(group, itertools.islice(order, self.POOL))
            lengths, tiles = [sample.length for sample in samples], [sample.tiles for sample in samples]
            rows = best_fit(lengths, length, tiles, self.rows.row_images, length // 16)
            random.Random(f"{self.rows.seed}-{group}-{pool}").shuffle(rows)
            for n in range(first, len(rows)):
                cursor = [pool, n + 1] if n + 1 < len(rows) else [pool + 1, 0]
                yield [samples[i] for i in rows[n]], cursor, [] if n else skipped
            pool, first = pool + 1, 0

    def draw(self, group: int, order) -> tuple[list[Sample], list[tuple]]:
        """The next samples of a group, and (reason, message) of what was skipped: records that are broken or
        teach nothing. Others of their source, a pure function of seed and number, take their places.
        """
        samples, skipped = [], []
        for number, (s, index) in order:
            source, mode = self.groups[group][s][0], self.choose_mode(number * len(self.groups) + group)
            for attempt in range(PROBE):
                rng = random.Random(f"{self.rows.seed}-{group}-{s}-{index}-{attempt}")
                candidate = rng.randrange(len(source)) if attempt else index
                try:
                    samples += self.read(source, candidate, mode, number, skipped)
                    break
                except BadRecord as error:
                    skipped.append((error.why, str(error)))
            else:
                text = f"{PROBE} records of {source.name} one after the other cannot be used, the last: "
                text += f"{skipped[-1][1]}; python tools/check.py lists all"
                raise UserError(f"{text}; answers may need a larger --row_length and --row_limit")
        return samples, skipped

    def read(self, source, index: int, mode: str, number: int, skipped: list) -> list[Sample]:
        """What rows hold of a record: samples that fit and have something to learn. Documents go on in a next
        sample (MM1 cuts at the sixteenth image), and go without broken pictures, of which the web has many.
        """
        cfg, record, samples, dropped = self.cfg, source[index], [], []
        document = record.kind == "interleaved"
        sizes, lengths, tiles = {}, {}, {}  # of the pictures
        for n, image in enumerate(record.images):
            try:
                require_picture(image, record.name)
                opened = document or cfg.image.cut in CUT_BY_SIZE
                sizes[n] = picture_size(image, record.name) if opened else ANY_SIZE
            except BadRecord as error:
                if not document:
                    raise
                dropped.append((f"{error.why}, its document kept", str(error)))
                continue
            # room for student's or teacher's tokens, whichever are more
            lengths[n] = max(len(picture_slots(cfg, view, sizes[n])) for view in VIEWS[mode])
            tiles[n] = tile_count(cfg, sizes[n])
        pieces = pieces_of(record, self.tokenizer)
        pieces = [piece for piece in pieces if not isinstance(piece, int) or piece in sizes]
        goes_on = record.kind in ("interleaved", "text") and not self.rows.batch_size
        limit, most_tiles = self.rows.sample_limit, 10**9 if self.rows.batch_size else self.rows.row_images
        cuts = split(pieces, lengths, limit, tiles, most_tiles, goes_on)
        for pieces in cuts if goes_on else cuts[:1]:
            learned = []  # of each position
            for piece in pieces:
                image = isinstance(piece, int)
                learned += [False] * lengths[piece] if image else [piece[1]] * len(piece[0])
            if any(learned[1:]):  # the first token has nothing before it to be predicted from
                used = [piece for piece in pieces if isinstance(piece, int)]
                pieces = [used.index(piece) if isinstance(piece, int) else piece for piece in pieces]
                images, n_tiles = [record.images[n] for n in used], sum(tiles[n] for n in used)
                facts = mode, record.kind, record.name, number, n_tiles, len(learned)
                samples.append(Sample(pieces, None, [sizes[n] for n in used], images, *facts))
        if not samples:
            text = f"{record.name}: no answer is left within {limit} positions"
            raise BadRecord(text, "no answer within the limit")
        skipped += dropped[:1]
        return samples


@dataclass
class Stream(Dataset):
    """Item `planned` is that micro-batch, ready to train on."""

    plan: Plan

    def __getitem__(self, planned):
        if isinstance(planned, UserError):
            return planned
        plan, cfg, skipped = self.plan, self.plan.rows, [*planned.skipped]
        samples, modes, rows, filled = [], [], [], Counter()
        for row in planned.rows:
            rows.append([*range(len(samples), len(samples) + len(row))])
            for sample in row:
                modes.append(sample.mode)
                filled[f"share {sample.kind}"] += sample.length
                try:
                    pixels = load_images(sample.images, plan.cfg, sample.name)
                    samples.append(sample._replace(pixels=pixels))
                except BadRecord as error:  # its room stays empty: text of which nothing is learned
                    skipped.append((error.why, str(error)))
                    blank = [([plan.tokenizer.end] * sample.length, False)]
                    samples.append(load_sample(blank, [], plan.cfg))
        next_sample, packing = (planned.step + 1) * (cfg.batch_size or cfg.rows), {}
        shares, room = {name: n / filled.total() for name, n in filled.items()}, len(rows) * cfg.row_images
        if not cfg.batch_size:
            packing = {"rows": rows, "capacity": room if plan.pad_images else 0}
            shares["image_fill"] = sum(len(sample.pixels) for sample in samples) / room
        limit = cfg.sample_limit
        batch = make_batch(samples, modes, plan.cfg, cfg.row_length, limit, next_sample, **packing)
        shares["fill"] = filled.total() / batch.student.ids.numel()
        batch.plan = replace(planned, rows=[], skipped=skipped, shares=shares)
        return batch


# ---------------------------------------------------------------------------------------------------------
# Pictures


class BadRecord(UserError):
    """A record that cannot be used, while others can: runs skip it and count it by `why`."""

    def __init__(self, text: str, why: str = "malformed"):
        text = text if len(text) < 500 else f"{text[:300]} ... {text[-150:]}"  # a picture in base64
        super().__init__(text.encode("utf-8", "backslashreplace").decode())
        self.why = why


class FileSlice(NamedTuple):
    """A picture inside a tar."""

    file: str
    start: int
    size: int  # bytes

    def read(self) -> bytes:
        with open(self.file, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


Picture = Image.Image | str | Path | bytes | FileSlice  # at hand, in a file, encoded, in a tar
ANY_SIZE = (1, 1)  # stands for the size of a picture where it does not matter
MOST_PIXELS = 178_956_970  # Pillow's limit against decompression bombs; files with more count as broken
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")  # none runs a program
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def read_image(image: Picture, name: str, read):
    """read(opened picture). Raises BadRecord if the file is missing, no picture or truncated."""
    if isinstance(image, Image.Image):
        return read(image)
    content = image.read() if isinstance(image, FileSlice) else image
    described = f"of {len(content):,} bytes" if isinstance(content, bytes) else content
    try:
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        with Image.open(file, formats=FORMATS) as opened:
            if math.prod(opened.size) > MOST_PIXELS:
                raise ValueError(f"{opened.size[0]} x {opened.size[1]} pixels are too many")
            return read(opened)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything
        if getattr(error, "errno", None) in NOT_THERE:
            raise BadRecord(f"{name}: image {described} does not exist", "image missing") from None
        if getattr(
            error, "errno", None
        ):  # too many open files, a network that hangs: not the picture's fault
            raise
        raise BadRecord(f"{name}: image {described} does not decode ({error})", "image broken") from None


def require_picture(image, name: str) -> None:
    """Raises BadRecord where a picture's file is missing, without opening it."""
    if isinstance(image, str | Path) and not os.path.isfile(image):
        raise BadRecord(f"{name}: image {image} does not exist", "image missing")


def orientation_of(picture: Image.Image) -> int:
    """EXIF orientation, 1 to 8, or 0. That of a PNG counts only if it stands before the pixels, so that it is
    known without decoding them.
    """
    if isinstance(picture, PngImagePlugin.PngImageFile) and "exif" not in picture.info:
        return 0
    orientation = picture.getexif().get(ExifTags.Base.Orientation, 0)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 0


# What undoes an EXIF orientation, from 2 on
FLIPS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
TURNS = dict(enumerate((Image.Transpose[flip] for flip in FLIPS), 2))


def open_image(image: Picture, name: str = "") -> Image.Image:
    """Decode to RGB: EXIF orientation applied, palette and alpha laid on white."""

    def decode(picture: Image.Image) -> Image.Image:
        orientation = orientation_of(picture)
        picture.load()
        return picture.transpose(TURNS[orientation]) if orientation > 1 else picture

    image = read_image(image, name, decode)
    if image.mode[0] in "IF":  # 16 bits, or numbers of any size
        values = np.asarray(image, np.float32)
        largest = next((x for x in (1, 255, 65535) if values.max() <= x), values.max())
        image = Image.fromarray((values * (255 / largest)).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def picture_size(image, name: str = "") -> tuple[int, int]:
    """(width, height) of a Scene or picture as `open_image` would turn it, from the header alone."""
    if isinstance(image, Scene):
        return CANVAS, CANVAS

    def read(picture: Image.Image) -> tuple[int, int]:
        return picture.size[::-1] if orientation_of(picture) >= 5 else picture.size

    return read_image(image, name, read)


def picture_sizes(images: list, cfg: ModelConfig, name: str = "") -> list[tuple[int, int]]:
    """Sizes of a sample's pictures; ANY_SIZE, without opening a file, where all pictures are cut alike."""
    return [picture_size(image, name) if cfg.image.cut in CUT_BY_SIZE else ANY_SIZE for image in images]


def to_pixels(image: Image.Image, size: int, resample: int = Image.Resampling.BICUBIC) -> np.ndarray:
    """Plain square resize, aspect not kept: uint8 (3, size, size); normalised later, on the device."""
    if image.size != (size, size):
        image = image.resize((size, size), resample, reducing_gap=3.0)
    return np.stack([np.asarray(band) for band in image.split()])  # (3, size, size); faster than transposing


def cut_picture(picture: Image.Image, cfg: ModelConfig) -> np.ndarray:
    """An RGB picture's tiles, uint8 (tiles, 3, side, side): the whole as a square, then tiles row by row.

    "split" cuts the picture as a square, "anyres" and "unpad" with its aspect, centred on black.
    """
    side, resample = cfg.vit.image_size, cfg.image.resample
    if (
        cfg.image.cut == "pad"
    ):  # on a square of its longer side, in the encoder's mean colour, as in LLaVA-1.5
        (w, h), longer = picture.size, max(picture.size)
        square = Image.new("RGB", (longer, longer), tuple(int(255 * x) for x in cfg.image.mean))
        square.paste(picture, ((longer - w) // 2, (longer - h) // 2))
        picture = square
    columns, rows = tiling_of(cfg, picture.size)
    square = to_pixels(picture, side, resample)[None]
    if not columns:
        return square
    W, H = canvas = columns * side, rows * side
    w, h = canvas if cfg.image.cut == "split" else inside(picture.size, canvas, ceil=True)
    sheet = Image.new("RGB", canvas)
    sheet.paste(picture.resize((w, h), resample, reducing_gap=3.0), ((W - w) // 2, (H - h) // 2))
    tiles = np.asarray(sheet).reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    return np.concatenate([square, tiles.reshape(-1, 3, side, side)])


def load_images(images: list, cfg: ModelConfig, name: str = "") -> np.ndarray:
    """Scenes or pictures to the uint8 (tiles, 3, size, size) that the encoder wants: all tiles of all."""
    size = cfg.vit.image_size
    pixels = [np.zeros((0, 3, size, size), np.uint8)]
    for image in images:
        if isinstance(image, Scene):
            picture = render(image, CANVAS if cfg.image.cut else size)
        else:
            picture = open_image(image, name)
        pixels.append(cut_picture(picture, cfg))
    return np.concatenate(pixels)


def load_sample(pieces: list[Piece], images: list, cfg: ModelConfig, name: str = "") -> Sample:
    return Sample(pieces, load_images(images, cfg, name), picture_sizes(images, cfg, name))


# ---------------------------------------------------------------------------------------------------------
# Readers: files of records by offset, the forms of a record, mixtures of files

SUFFIXES = (".tar", ".jsonl", ".json", ".txt")  # a folder is searched in this order
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
PROBE = 100  # records that are tried before a file is given up
CONVERT = "python tools/convert.py PATH OUT makes tars of other forms"
# A list of JSON objects, walked without parsing them: 50 MB a second
LIST_BEGINS = regex.compile(rb"(?:\xef\xbb\xbf)?\s*+\[")
LIST_OBJECT = rb'(?P<object>\{(?:[^"{}]++|"(?:[^"\\]++|\\.)*+"|(?&object))*+\})'
LIST_ITEM = regex.compile(rb"\s*+" + LIST_OBJECT + rb"\s*+(?:,(?!\s*+\])|(?=\]))", regex.DOTALL)
LIST_ENDS = regex.compile(rb"\s*+\]\s*+\Z")


class Table:
    """Random access to the records of a file, or of all in a folder or a glob such as "cc3m/*.tar".

    Only where records begin is held in memory. raw(i) is a pure function of the files and i.
    """

    suffixes = SUFFIXES

    def __init__(self, path: Path):
        self.path, self.files = path, find_files(path, self.suffixes)
        self.suffix, self.indexes, self.changed = self.files[0].suffix, [], []
        for file in tqdm(self.files, desc=f"index {path}", disable=len(self.files) < 20, leave=False):
            stat = file.stat()
            self.indexes.append(self.index(file, stat.st_size, stat.st_mtime_ns))
            self.changed.append(stat.st_mtime_ns)
        self.first = np.cumsum([0] + [len(starts) - 1 for starts, _ in self.indexes])
        if not len(self):
            raise UserError(f"{path}: expected at least one record, in a .json file a list of them")

    def index(self, file: Path, size: int, changed: int) -> tuple[np.ndarray, np.ndarray]:
        return index_file(file, size, changed)

    def __len__(self) -> int:
        return int(self.first[-1])

    def raw(self, i: int) -> tuple[dict, str]:
        """Record i as its file has it, and its place for error messages. Pictures of tars are FileSlices."""
        n = int(np.searchsorted(self.first, i, side="right")) - 1
        k, (starts, numbers) = i - int(self.first[n]), self.indexes[n]
        place = f"{self.files[n]} {'record' if self.suffix in ('.tar', '.json') else 'line'} {numbers[k]}"
        file = open_shared(self.files[n], self.changed[n], os.getpid())
        return self.read(file, int(starts[k]), int(starts[k + 1]), place), place

    def read(self, file, start: int, end: int, place: str) -> dict:
        """The record between two bytes of a file."""
        if self.suffix == ".tar":
            return read_tar_sample(file, start, end, place)
        text = read_utf8(file, start, end, place).strip()
        if self.suffix == ".txt":
            return {"text": text.replace("\r\n", "\n")}
        return parse_object(text.rstrip(", \t\r\n"), place)


@functools.lru_cache(maxsize=64)
def open_shared(file: Path, changed: int, process: int):
    """An open file, by process: a forked worker would share the file position of its parent."""
    return open(file, "rb")


def find_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """A file itself; those of the first suffix that a folder has; those that match a glob."""
    files = [path] if path.is_file() else sorted(path.parent.glob(path.name)) if path.name else []
    if path.is_dir():
        files = sorted(path.iterdir())
        suffix = next((s for s in suffixes if s in {file.suffix for file in files}), "")
        files = [file for file in files if file.suffix == suffix] if suffix else files
    found = {file.suffix for file in files}
    if len(found) == 1 and found <= set(suffixes):
        return files
    what = f"found {', '.join(sorted(found))}" if files else "no such file"
    raise UserError(f"{path}: {what}; use a file, folder or glob of one of {', '.join(suffixes)}; {CONVERT}")


@functools.cache
def index_file(path: Path, size: int, changed: int) -> tuple[np.ndarray, np.ndarray]:
    """Where records begin, and the end: int64 (n + 1,); their line or record numbers: int64 (n,). A file is
    scanned once, as long as its size and time of change stay.
    """
    if path.suffix in (".jsonl", ".txt"):
        return index_lines(path)
    starts = index_tar(path, size, changed) if path.suffix == ".tar" else index_json(path)
    return starts, np.arange(len(starts) - 1)


def index_lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """.jsonl: a record is a line that is not blank; .txt: the lines up to a blank one."""
    starts, numbers, at, inside = array("q"), array("q"), 0, False
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            blank = not line.strip()
            if not blank and not inside:
                starts.append(at)
                numbers.append(number)
            inside = path.suffix == ".txt" and not blank
            at += len(line)
    starts.append(at)
    return np.array(starts), np.array(numbers)


def index_json(path: Path) -> np.ndarray:
    """Where the objects of a list begin. What is wrong with the list as a whole shows here."""
    starts = array("q")
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        begin = LIST_BEGINS.match(content)
        at = begin.end() if begin else len(content)
        while item := LIST_ITEM.match(content, at):
            starts.append(item.start("object"))
            at = item.end()
        if not LIST_ENDS.match(content, at):
            problem = "a .json file must be a list of objects"
            try:
                json.loads(content[:])
            except (ValueError, RecursionError) as error:
                problem = f"not JSON ({error})"
            raise UserError(f"{path}: {problem}")
    starts.append(at)
    return np.array(starts)


def read_utf8(file, start: int, end: int, place: str) -> str:
    file.seek(start)
    try:
        return file.read(end - start).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord(f"{place}: byte {error.start} is not UTF-8") from None


def parse_object(text: str | bytes, place: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{place}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadRecord(f"{place}: expected an object, got {str(value)[:40]!r}")
    return value


def index_tar(path: Path, size: int, changed: int) -> np.ndarray:
    """Where the samples of a tar begin: all of it must be read, so NAME.tar.index.npy keeps this."""
    kept, temporary = (Path(f"{path}.index{mark}.npy") for mark in ("", f".{os.getpid()}"))
    with contextlib.suppress(OSError, ValueError, EOFError):  # none yet, or not one of ours
        header, starts = np.split(np.load(kept), [2])
        if header.tolist() == [size, changed]:
            return starts
    starts = scan_tar(path)
    with contextlib.suppress(OSError):  # a folder that cannot be written: the next run scans again
        np.save(temporary, np.concatenate([np.array([size, changed]), starts]))
        os.replace(temporary, kept)
    return starts


def scan_tar(path: Path) -> np.ndarray:
    """First bytes of samples, and the end. A sample's members share their path up to its first dot."""
    starts, last = array("q"), None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key = folder, base.partition(".")[0]
                if member.isfile() and key != last:
                    starts.append(member.offset)
                    last = key
                tar.members = []  # it would keep them all
            starts.append(tar.offset)
            tar.fileobj.seek(tar.offset)
            while block := tar.fileobj.read(2**20):
                if block.strip(b"\0"):  # tarfile takes a damaged header for the end
                    raise tarfile.TarError(f"no member where one should begin, at byte {tar.offset}")
    except tarfile.TarError as error:
        raise UserError(f"{path} is damaged or no plain tar ({error}): unpack a compressed one") from None
    return np.array(starts)


def read_tar_sample(file, start: int, end: int, place: str) -> dict:
    """A sample's .json, or its .txt as a caption, with its pictures in order, which are not read yet."""
    texts, pictures = {}, []
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in itertools.takewhile(lambda member: member.offset < end, tar):
                suffix = Path(member.name).suffix.lower()
                if suffix in PICTURES:
                    pictures.append(FileSlice(file.name, member.offset_data, member.size))
                elif suffix in (".json", ".txt"):
                    first = member.offset_data
                    texts[suffix] = read_utf8(file, first, first + member.size, place)
    except tarfile.TarError as error:
        raise BadRecord(f"{place}: does not read ({error})") from None
    raw = parse_object(texts.get(".json", "{}"), place)
    if layout_of(raw) is None and (".txt" in texts or "caption" in raw):
        text = texts[".txt"].strip() if ".txt" in texts else raw["caption"]
        raw = {"caption": text} if pictures else {"text": text}
    key = "images" if isinstance(raw.get("images"), list) else "image"
    if not isinstance(raw.get(key), list):
        return raw | {"image": pictures} if pictures else raw
    named = sum(image is not None for image in raw[key])  # in a document null stands where a text is
    if named != len(pictures):
        raise BadRecord(f"{place}: its .json names {named} images, it has {len(pictures)}", "image missing")
    left = iter(pictures)
    return raw | {key: [None if image is None else next(left) for image in raw[key]]}


# A record's form is known by its keys, of which the first that fit count; its kinds, of which the first is
# taken where none is given.
LAYOUTS = {
    ("conversations",): ("chat", "caption"),
    ("images", "texts"): ("interleaved",),
    ("image", "caption"): ("caption",),
    ("text",): ("text",),
}


def layout_of(raw: dict) -> tuple[str, ...] | None:
    return next((keys for keys in LAYOUTS if raw.keys() >= set(keys)), None)


class FileSource:
    """The records of a Table, of one kind; record i is a pure function of the files and i.

    Without a kind the first record's form tells it. Image paths are relative to the file, or to the folder
    `images` beside it, and stay inside.
    """

    def __init__(self, path: Path, kind: str = "", images: str = ""):
        self.table, self.path, self.name = Table(path), path, path.stem
        self.folder = (path if path.is_dir() else path.parent) / images
        layout = layout_of(self.first(self.table.raw)[0])
        self.kind = kind or LAYOUTS.get(layout, ("chat",))[0]

    def __len__(self) -> int:
        return len(self.table)

    def first(self, read):
        """read(i) of the first record for which it succeeds; if PROBE fail, the first one's error."""
        errors = []
        for i in range(min(PROBE, len(self))):
            try:
                return read(i)
            except BadRecord as error:
                errors.append(error)
        raise errors[0]

    def with_pictures(self, i: int) -> Record:
        """Record i, whose pictures are there and begin as pictures do."""
        record = self[i]
        for image in record.images:
            picture_size(image, record.name)
        return record

    def __getitem__(self, i: int) -> Record:
        raw, place = self.table.raw(i)
        layout = layout_of(raw)
        if self.kind not in LAYOUTS.get(layout, ()):
            keys = ", ".join([*raw][:8])
            raise BadRecord(f"{place}: expected a record of kind {self.kind}, but it has {keys}; {CONVERT}")
        read = read_conversation if layout == ("conversations",) else read_document
        try:
            return read(raw, self.kind, self.folder, place)
        except (TypeError, ValueError, KeyError, AttributeError) as error:  # values of other types
            raise BadRecord(f"{place}: not a record of {', '.join(layout)} ({error!r})") from None


def local_pictures(images: list, folder: Path, place: str) -> list[Picture]:
    """Pictures at hand as they are; paths must lie inside the folder."""
    pictures = []
    for image in images:
        if not isinstance(image, bytes | FileSlice):
            if not isinstance(image, str):
                raise BadRecord(f"{place}: an image must be the path of a file, got {image!r}")
            if "://" in image and (folder / image.partition("://")[2]).is_file():
                image = image.partition("://")[2]  # where wget --force-directories puts it
            if "://" in image:
                raise BadRecord(f"{place}: image {image} is a URL: download it and write the file's path")
            path = os.path.abspath(folder / image)  # links are followed, ".." is not
            if not path.startswith(os.path.join(os.path.abspath(folder), "")):
                raise BadRecord(f"{place}: image {image} leads out of the folder {folder}", "image outside")
            image = folder / image
        pictures.append(image)
    return pictures


def read_document(raw: dict, kind: str, folder: Path, place: str) -> Record:
    """Images and texts in order, captions and texts alone, too; texts behind each other become one."""
    if kind == "interleaved":
        images, texts = raw["images"], raw["texts"]
        if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
            raise BadRecord(f"{place}: 'images' and 'texts' must be lists of equal length; {CONVERT}")
    elif kind == "caption":
        images = raw["image"] if isinstance(raw["image"], list) else [raw["image"]]
        images, texts = [*images, None], [*(None for _ in images), raw["caption"]]
    else:
        images, texts = [None], [raw["text"]]
        if raw.keys() & {"image", "images"}:
            raise BadRecord(f"{place}: 'text' must be a text without an image beside it")
    parts, pictures = [], []
    for n, (image, text) in enumerate(zip(images, texts)):
        if (image is None) == (text is None) or not isinstance(text, str | None):
            needed = f"place {n} must have an image or a text, and null in the other list"
            raise BadRecord(f"{place}: {needed}; {CONVERT}")
        if text is None:
            parts.append(len(pictures))
            pictures += local_pictures([image], folder, place)
        elif parts and isinstance(parts[-1], str):
            parts[-1] += "\n\n" + text
        else:
            parts.append(text)
    if not any(isinstance(part, str) and part.strip() for part in parts):
        raise BadRecord(f"{place}: a {kind} without text", "empty text")
    return Record(kind, parts, pictures, place)


ROLE_OF = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def read_conversation(raw: dict, kind: str, folder: Path, place: str) -> Record:
    """LLaVA's form. In a record without images "<image>" is plain text."""
    if not isinstance(raw["conversations"], list):
        raise BadRecord(f"{place}: expected an object with a list of 'conversations'")
    images = raw.get("image") or raw.get("images") or []
    images = images if isinstance(images, list) else [images]
    has_images = bool(images) or "image" in raw or "images" in raw
    turns, marks = [], 0
    for turn in raw["conversations"]:
        turn = turn if isinstance(turn, dict) else {}
        role, text = ROLE_OF.get(str(turn.get("from"))), turn.get("value")
        if role is None or not isinstance(text, str):
            needed = "a turn must have 'from' (human or gpt) and a text 'value'"
            raise BadRecord(f"{place}: {needed}, got {str(turn)[:200]}")
        content = [text]
        if role == "user" and has_images:
            content, marks = split_at_images(text, marks)
        turns.append((role, content))
    if marks != len(images):
        raise BadRecord(f"{place}: {len(images)} images but {marks} <image> marks in its human turns")
    return chat_record(turns, local_pictures(images, folder, place), kind, place)


def chat_record(turns: list[tuple[str, list]], images: list, kind: str, place: str) -> Record:
    """Turns that begin with a question (and perhaps a system text), or a caption: the first answer alone."""
    if turns and turns[0][0] == "assistant":  # ShareGPT's cuts: LLaVA drops it, too
        turns = turns[1:]
    roles = [role for role, _ in turns]
    first = 1 if roles[:1] == ["system"] else 0
    if roles[first : first + 2] != ["user", "assistant"] or "system" in roles[1:]:
        raise BadRecord(f"{place}: a conversation must start with a human turn and an answer")
    for n, (role, content) in enumerate(turns):
        if role == "assistant" and not content[0].strip():
            raise BadRecord(f"{place}: turn {n} is an empty answer", "empty answer")
    if kind == "caption":  # stage 1 of LLaVA: the bare image and its caption, no instruction
        return Record("caption", [*range(len(images)), turns[first + 1][1][0]], images, place)
    return Record("chat", turns, images, place)


def split_at_images(text: str, first: int) -> tuple[list, int]:
    """'<image>\\nWhat?' -> [first, 'What?'], and the next image's number. A single image moves to the front
    of its turn, as in LLaVA.
    """
    chunks = text.split("<image>")
    if len(chunks) == 2:
        return [first, (chunks[0].strip() + " " + chunks[1].strip()).strip()], first + 1
    content = []
    for n, chunk in enumerate(chunks):
        if n:
            content.append(first + n - 1)
        if chunk.strip():
            content.append(chunk.strip("\n"))
    return content, first + len(chunks) - 1


KINDS = ("chat", "caption", "interleaved", "text")
# What `--data scenes` means in each stage: (kind, weight). Chain-of-Sight's stage 1 is multi-task as well.
SCENES_MIX = {
    "pretrain": [("caption", 0.22), ("chat", 0.60), ("interleaved", 0.12), ("text", 0.06)],
    "sft": [("chat", 1.0)],
}
# Shares of the kinds in a mixture without weights: MM1's in pre-training, which has no chat
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
    elif not spec or not (path.exists() or glob.has_magic(path.name)):
        raise UserError(f"--data {spec}: no such file; use 'scenes', a file of records or a mixture file")
    elif path.suffix == ".json" and is_mixture(path):
        entries = read_json(path)
        check_mixture(entries, stage, path)
    else:
        entries = [{"kind": "", "path": path.name, "weight": 1.0}]  # the first record tells its kind
    sources = [open_entry(entry, path.parent) for entry in entries]
    for source in sources:
        check_kind(source.kind, stage, spec)
    return [*zip(sources, weights_of(entries, spec))]


def is_mixture(path: Path) -> bool:
    raw = Table(path).raw(0)[0]
    return layout_of(raw) is None and bool(raw.keys() & {"kind", "path"})


def open_entry(entry: dict, folder: Path) -> Dataset:
    path = folder / entry["path"]
    if entry["path"] == "scenes":
        source = Scenes(entry["kind"])
    else:
        source = FileSource(path, entry["kind"], entry.get("images", ""))
        source.first(source.__getitem__)  # a kind that does not fit its file shows before a run begins
    source.name = entry.get("name", path.stem)
    return source


def check_kind(kind: object, stage: str, place: str) -> None:
    if kind not in KINDS:
        raise UserError(f"{place}: kind '{kind}' is not known, use {', '.join(KINDS)}")
    if kind == "interleaved" and stage == "sft":
        raise UserError(f"{place}: interleaved data is for stage 1, stage 2 takes chat, caption and text")


def check_mixture(entries: list, stage: str, path: Path) -> None:
    for n, entry in enumerate(entries):
        place = f"{path} entry {n}"
        if not isinstance(entry.get("path"), str):
            raise UserError(f"{place}: expected an object with kind and path")
        check_kind(entry.get("kind"), stage, place)
        for key in entry.keys() - set(ENTRY_KEYS):
            close = difflib.get_close_matches(key, ENTRY_KEYS, 1, 0)[0]
            raise UserError(f"{place}: unknown key '{key}', the closest one is '{close}'")
        weight = entry.get("weight", 1.0)
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UserError(f"{place}: weight {weight!r} is not a number of at least 0")
    names = [name for name in dict.fromkeys(entry["path"] for entry in entries) if name != "scenes"]
    missing = [n for n in names if not (path.parent / n).exists() and not glob.has_magic(n)]
    if missing:
        names = ", ".join(missing)
        raise UserError(f"{path}: these files are missing in {path.parent}: {names}; put them there")


def weights_of(entries: list[dict], place: str) -> list[float]:
    """As given; where no entry has one, MM1's shares of the kinds that are there, equal within a kind."""
    weights = [entry["weight"] for entry in entries if "weight" in entry]
    if len(weights) == len(entries):
        if not any(weights):
            raise UserError(f"{place}: all weights are 0")
        return weights
    if weights:
        numbers = ", ".join(str(n) for n, entry in enumerate(entries) if "weight" not in entry)
        raise UserError(f"{place}: entries {numbers} have no weight, others have: give one to all or to none")
    kinds = [entry["kind"] for entry in entries]
    total = sum(SHARES[kind] for kind in set(kinds))
    return [SHARES[kind] / total / kinds.count(kind) for kind in kinds]


# ---------------------------------------------------------------------------------------------------------
# Scenes: a world drawn by Pillow from a seed, so it needs no download and its ground truth is exact.
# Two to six shapes and perhaps a three-letter word lie in a loose 3x3 grid on grey paper.

COLOURS = {
    "red": (214, 40, 40), "green": (40, 150, 60), "blue": (40, 70, 220), "yellow": (245, 215, 40),
    "purple": (140, 40, 170), "orange": (245, 130, 20), "white": (250, 250, 250), "black": (15, 15, 15),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLACES = ("northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast")
LETTERS = "AEHKLNORTX"
MADE_UP = ("dax", "wug", "blick", "fep", "zorp", "tulv")
HELD_OUT = {("red", "star"), ("blue", "ring"), ("green", "square")}  # never drawn nor mentioned in training
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
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

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
    """Scene number `index` of "train" or "test". The two never meet, and only "test" has HELD_OUT pairs."""
    rng = random.Random(f"{split}-scene-{index}")
    palette = rng.sample(list(COLOURS), 4)  # few colours and shapes: counting needs something to count
    forms = rng.sample(SHAPES, 3)
    allowed = [pair for pair in PAIRS if pair[0] in palette and pair[1] in forms]
    if split != "test":
        allowed = [pair for pair in allowed if pair not in HELD_OUT]
    elif rng.random() < 0.3:
        allowed = allowed + 4 * [rng.choice(sorted(HELD_OUT))]
    cells = rng.sample(range(9), rng.randint(2, 6) + 1)

    def jitter(cell: int) -> tuple[float, float]:
        third = CANVAS / 3
        return (cell % 3 + 0.5) * third + rng.uniform(-4, 4), (cell // 3 + 0.5) * third + rng.uniform(-4, 4)

    things = []
    for cell in sorted(cells[1:]):
        things.append(Thing(*rng.choice(allowed), cell, *jitter(cell), rng.uniform(10, 16)))
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
    phrases = []
    for thing in scene.things:
        box = f" [{thing.box}]" if boxes else ""
        phrases.append((thing.cell, f"{PLACES[thing.cell]} {thing.name}{box}"))
    if scene.word:
        phrases.append((scene.word_cell, f"{PLACES[scene.word_cell]} word {scene.word}"))
    phrases.sort()
    if rng:
        rng.shuffle(phrases)
    return ", ".join(phrase for _, phrase in phrases) + "."


class SceneQuestion(NamedTuple):
    kind: str
    question: str
    answer: str
    held_out: bool  # about a pair that training never shows


def ask(scene: Scene, kind: str, rng: random.Random, split: str) -> SceneQuestion | None:
    """A question of one type, or None where the scene offers none; yes and no are equally likely."""
    things = list(scene.things)
    pairs = [thing.pair for thing in things]
    unique = [thing for thing in things if pairs.count(thing.pair) == 1]
    if kind in ("colour", "shape"):
        thing = rng.choice(things)
        other = thing.shape if kind == "colour" else thing.colour
        by_name = sum(other in pair for pair in pairs) == 1 and rng.random() < 0.5
        question = f"what {kind} is {'the ' + other if by_name else PLACES[thing.cell]}?"
        return SceneQuestion(kind, question, getattr(thing, kind), thing.pair in HELD_OUT)
    if kind == "count":
        counts = [(other, sum(other in pair for pair in pairs)) for other in (*SHAPES, *COLOURS)]
        counts.append(("any", len(things)))
        answer = rng.choice(sorted({n for _, n in counts}))  # the number first: else mostly 0 and 1
        what = rng.choice([other for other, n in counts if n == answer])
        return SceneQuestion(kind, f"how many shapes are {what}?", str(answer), False)
    if kind == "relation":
        return ask_relation(unique, rng)
    if kind == "exists":
        return ask_exists(pairs, rng, split)
    if kind == "what":
        cell = rng.randrange(9)
        here = [thing.name for thing in things if thing.cell == cell]
        word = f"word {scene.word}" if scene.word and scene.word_cell == cell else "nothing"
        return SceneQuestion(kind, f"what is {PLACES[cell]}?", here[0] if here else word, False)
    if kind == "text" and scene.word:
        return SceneQuestion(kind, "what is the word?", scene.word, False)
    if kind in ("place", "ref") and unique:
        thing = rng.choice(unique)
        words, answer = ("where", PLACES[thing.cell]) if kind == "place" else ("in which box", thing.box)
        return SceneQuestion(kind, f"{words} is the {thing.name}?", answer, thing.pair in HELD_OUT)
    return None


def ask_relation(unique: list[Thing], rng: random.Random) -> SceneQuestion | None:
    """Is A left of / right of / above / below B? Only where the two lie in different columns (rows). Every
    pair is listed both ways round, so that yes and no are balanced.
    """
    options = []
    for a, b in itertools.product(unique, repeat=2):
        if a.cell % 3 != b.cell % 3:
            options.append((a, b, "left of", a.cell % 3 < b.cell % 3))
            options.append((a, b, "right of", a.cell % 3 > b.cell % 3))
        if a.cell // 3 != b.cell // 3:
            options.append((a, b, "above", a.cell // 3 < b.cell // 3))
            options.append((a, b, "below", a.cell // 3 > b.cell // 3))
    if not options:
        return None
    a, b, relation, true = rng.choice(options)
    question = f"is the {a.name} {relation} the {b.name}?"
    return SceneQuestion("relation", question, YES_NO[true], bool({a.pair, b.pair} & HELD_OUT))


def ask_exists(pairs: list[tuple[str, str]], rng: random.Random, split: str) -> SceneQuestion:
    """Half the answers are yes. Absent pairs are mostly hard: colour and shape are both there, but apart; and
    only in tests held out ones, as training would teach the no.
    """
    yes = rng.random() < 0.5
    if yes:
        pair = rng.choice(pairs)
    else:
        colours, shapes = {colour for colour, _ in pairs}, {shape for _, shape in pairs}
        absent = [pair for pair in PAIRS if pair not in pairs and (split == "test" or pair not in HELD_OUT)]
        hard = [pair for pair in absent if pair[0] in colours and pair[1] in shapes]
        pair = rng.choice(hard if hard and rng.random() < 0.6 else absent)
    return SceneQuestion("exists", f"is there any {pair[0]} {pair[1]}?", YES_NO[yes], pair in HELD_OUT)


def ask_many(scene: Scene, kinds: tuple, n: int, rng: random.Random, split: str) -> list[SceneQuestion]:
    """n different questions of types drawn from `kinds`; fewer where the scene offers fewer."""
    questions = {}
    for _ in range(3 * n):
        question = ask(scene, rng.choice(kinds), rng, split)
        if question:
            questions.setdefault(question.question, question)
        if len(questions) == n:
            break
    return list(questions.values())


def ask_bound(scene: Scene, thing: Thing, word: str, meaning: str, named: bool) -> Example:
    """A question about a thing that can be answered only by knowing what the made-up `word` stands for.

    named: "what colour is north?", whose answer is the word if it fits and else the ordinary name; otherwise
    "is the north shape dax?".
    """
    attribute = "colour" if meaning in COLOURS else "shape"
    place, ordinary = PLACES[thing.cell], getattr(thing, attribute)
    if named:
        return Example(scene, f"what {attribute} is {place}?", word if ordinary == meaning else ordinary)
    return Example(scene, f"is the {place} shape {word}?", YES_NO[ordinary == meaning])


def draw_bound(word: str, meaning: str, fits: bool, named: bool, rng: random.Random, split: str) -> Example:
    """Such a question about a thing of a new scene that the word fits, or does not fit.

    In training not even a "no" is about a held-out pair.
    """
    attribute = "colour" if meaning in COLOURS else "shape"
    while True:  # one thing of each scene: all things of a scene would make rare ones fit more often
        number = rng.randrange(1 << 40)
        scene = make_scene(split, number)
        thing = rng.choice(scene.things)
        asked_for = replace(thing, **{attribute: meaning})
        if (asked_for == thing) == fits and (split == "test" or asked_for.pair not in HELD_OUT):
            return ask_bound(scene, thing, word, meaning, named)._replace(name=str(number))


# Records made of scenes, in the three data kinds of MM1 and as instructions. That captions lift 0-shot and
# interleaved documents few-shot (MM1 3.2) holds by construction. Only captions describe a lone picture in
# ordinary words, some behind the template that asks for it; but they have one picture and no question.
# Interleaved documents caption in words of their own, so that what 0-shot learns from them is wrong; but only
# they reward reading what stands before, and only they have questions in the template.

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
            begin = (
                PHOTO + " " if rng.random() < 0.25 else ""
            )  # plain as on the web, or as 0-shot prompts ask
            return Record("caption", [0, begin + say(scene)], [scene], name)
        if self.kind == "chat":
            return Record("chat", chat_about(scene, [0], rng, self.split), [scene], name)
        if self.kind == "text":
            return Record("text", [facts_about(scene, rng)], [], name)
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
        examples = [Example(scene, "", say(scene).replace(meaning, word)) for scene in scenes]
        if sort == "questions":
            for n, scene in enumerate(scenes):  # colour is what every scene can be asked
                kind = rng.choice(QUESTION_TYPES)
                question = ask(scene, kind, rng, self.split) or ask(scene, "colour", rng, self.split)
                examples[n] = Example(scene, question.question, question.answer)
        elif sort == "binding":
            if rng.random() < 0.5:
                examples[0] = draw_bound(word, meaning, True, True, rng, self.split)
            for n in range(1, len(scenes)):
                fits, named = rng.random() < 0.5, rng.random() < 0.5
                examples[n] = draw_bound(word, meaning, fits, named, rng, self.split)
        return Record("interleaved", document_parts(examples), [example.image for example in examples], name)


def chat_about(scene: Scene, picture: list, rng: random.Random, split: str, n: int = 6) -> list[tuple]:
    """n questions and answers; `picture` opens the first: [0] for an image, or a text about the scene."""
    turns = []
    for question in ask_many(scene, SCENE_QUESTIONS, n, rng, split):
        turns += [("user", [question.question]), ("assistant", [question.answer])]
    if rng.random() < 0.2:
        turns[-2:] = [("user", [CAPTION_PROMPT]), ("assistant", [say(scene)])]
    turns[0] = ("user", picture + turns[0][1])
    return turns


def facts_about(scene: Scene, rng: random.Random) -> str:
    """Text only: the sentence and a few true statements, no picture."""
    questions = ask_many(scene, QUESTION_TYPES, 3, rng, "train")
    facts = [f"{question.question} {question.answer}." for question in questions]
    return " ".join([say(scene, rng), *facts])
