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
import errno
import functools
import glob
import io
import itertools
import json
import math
import mmap
import os
import pickle
import random
import re
import tarfile
import unicodedata
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex  # comes with tiktoken
import tiktoken
import tokenizers
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont
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
# documents, "start" stands in front of them. A turn is before, content, end, tail ("turns", by role); of an
# assistant's turn content and end are supervised. "strips": contents lose the white space around them.
# "system": text of chats that have none, which is part of Vicuna's template.
FAMILIES = read_json(ASSETS / "chat_templates.json")
CONTROL = {name for family in FAMILIES for name in family["control"]}
# What rank files do not tell, by the number of ranks. "pattern" cuts text before merging; possessive forms
# (`++`) cut like the original ones, which overflow the stack of tiktoken's engine on 1,000,000 spaces.
RANK_FILES = read_json(ASSETS / "rank_files.json")
LONG_SPACE = re.compile(r"((?<!\s)\s{100000,})")  # before a word even the possessive forms overflow on these
HUB_FILES = """tokenizer.json vocab.json merges.txt encoder.json vocab.bpe tokenizer.model chat_template.jinja
    tokenizer_config.json special_tokens_map.json added_tokens.json""".split()


class Tokenizer:
    """Ids of text (`encode`) and text of ids (`decode`), without control tokens by default, and how
    the family of the tokenizer writes documents and chats.

    prefix: what `encode` puts in front of a text, "" or " ", so that a word is the same token wherever it
    stands. special: control tokens, name to id. vocab_size: largest id + 1; a decoder may have more rows.
    files: what `save` writes, name to content.
    """

    prefix = ""

    def __init__(self, special: dict[str, int], vocab_size: int, files: dict[str, bytes]):
        family = next((family for family in FAMILIES if special.keys() >= {*family["control"]}), None)
        if not family:
            raise ValueError("it has not the control tokens of any family in assets/chat_templates.json")
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
        path = Path(path).parent if Path(path).suffix == ".json" else Path(path)
        files = {name: (path / name).read_bytes() for name in HUB_FILES if (path / name).is_file()}
        llama3 = [path / "tokenizer.model", path / "original" / "tokenizer.model"]
        ranks = [file for file in (path, *llama3) if file.is_file()][:1] or [*path.glob("*.tiktoken")]
        convert = f"python tools/tokenizer.py {path} makes it of vocab.json and merges.txt"
        missing = f"{path} holds no tokenizer.json ({convert}) and {len(ranks)} rank files, not one"
        require("tokenizer.json" in files or len(ranks) == 1, missing)
        try:
            if "tokenizer.json" in files:
                return HubTokenizer(read_json(path / "tokenizer.json"), files)
            name = "tokenizer.model" if ranks[0].name == "tokenizer.model" else "ranks.tiktoken"
            return RankTokenizer(read_ranks(ranks[0]), files | {name: ranks[0].read_bytes()})
        except UserError:
            raise
        except Exception as e:  # `tokenizers` raises nothing more precise
            raise UserError(f"{path} holds no usable tokenizer ({type(e).__name__}: {e})") from None

    def save(self, folder: Path) -> None:
        """The files it came from, byte for byte: `from_pretrained(folder)` gives the same tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    @functools.cache  # noqa: B019 (templates have few texts, a run one tokenizer)
    def control(self, text: str, after: str = "", before_image: bool = False) -> list[int]:
        """Ids of a template's text behind the text `after`: the only place where control tokens are made.

        A tokenizer with a prefix writes it for the first space of this text, and for the last one when it
        encodes the content that follows. In front of an image the last space stays, as in LLaVA.
        """
        if self.prefix:
            text = text.removeprefix(" ")
            text = text if before_image else text.removesuffix(" ")
        return self.encode(after + text, True)[len(self.encode(after, True)) :]

    def ids_with(self, marks: tuple[str, ...]) -> list[int]:
        """Ids of text that holds one of the marks."""
        texts = [self.decode([i]) for i in range(self.vocab_size)]
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
        self.bpe = tokenizers.Tokenizer.from_str(json.dumps(spec | {"truncation": None, "padding": None}))
        ids = {token.content: i for i, token in self.bpe.get_added_tokens_decoder().items() if token.special}
        super().__init__(ids, max(self.bpe.get_vocab().values()) + 1, files)
        if leaks := [name for name, i in ids.items() if i in self.encode(name)]:
            raise ValueError(f"it makes the control token {leaks[0]} of text")
        if self.bpe.encode("a", add_special_tokens=False).tokens[0].startswith(("▁", "Ġ")):
            self.prefix = " "

    def encode(self, text: str, control: bool = False) -> list[int]:
        self.bpe.encode_special_tokens = not control  # true: their names are text like any other
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half an emoji
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], control: bool = False) -> str:
        return self.bpe.decode(ids, skip_special_tokens=not control)


class RankTokenizer(Tokenizer):
    """tiktoken with the ids of tokens; an id is also the priority of its merge."""

    def __init__(self, ranks: dict[bytes, int], files: dict[str, bytes]):
        self.n_ranks = n = len(ranks)
        if n > 2**16 and str(n) not in RANK_FILES:
            raise ValueError(f"{n} ranks are neither Llama-3 nor Qwen")
        n_bytes = len([token for token in ranks if len(token) == 1])
        if sorted(ranks.values()) != list(range(n)) or n_bytes < 256:
            raise ValueError("its ids must count up from 0, with every byte among its tokens")
        family = RANK_FILES.get(str(n), RANK_FILES["scenes"])
        self.prefix = family["prefix"]
        self.nfc = family["nfc"]
        pattern = family["pattern"]
        special = {name: n + k for k, name in enumerate(family["special"])}
        super().__init__(special, n + len(special), files)
        self.bpe = tiktoken.Encoding("ranks", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str, control: bool = False) -> list[int]:
        if control:
            return self.bpe.encode(text, allowed_special="all")
        text = unicodedata.normalize("NFC", text) if self.nfc else self.prefix + text
        return [i for part in LONG_SPACE.split(text) for i in self.bpe.encode_ordinary(part)]

    def decode(self, ids: list[int], control: bool = False) -> str:
        size = self.vocab_size if control else self.n_ranks
        text = self.bpe.decode([i for i in ids if i < size], errors="replace")
        return text if control else text.removeprefix(self.prefix)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Lines of a token in base64 and its id."""
    content = path.read_bytes()
    load = f"pip install transformers sentencepiece protobuf, AutoTokenizer.from_pretrained('{path.parent}')"
    how = f"{load}.save_pretrained('{path.parent}')"
    require(content.isascii(), f"{path} is SentencePiece's own format: {how}")
    pairs = [line.split() for line in content.splitlines() if line.strip()]
    try:
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise UserError(f"{path} is not a tiktoken rank file: a line of it is not 'base64 rank'") from None


def find_tokenizer(cfg: ModelConfig) -> Tokenizer:
    """cfg.tokenizer_from if set, else the tokenizer in the decoder's folder, else that of Scenes, which also
    belongs to a decoder with as many rows as it has ids, such as the shipped one.
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
    positions: Tensor  # (B, T), from 0 in every document
    doc_ids: Tensor  # (B, T) number of the sample, -1 at padding
    slots: Tensor  # (slots,) flat positions in B*T where a visual token goes
    visual_index: Tensor  # (slots,) the row of the bank of visual tokens (VLM.bank) in each slot, or NEWLINE
    supervised: Tensor  # (R,) flat positions in B*T whose next token is a target
    targets: Tensor  # (R,)
    starts: Tensor  # (documents + 1,) int32: where each begins in B*T, the end repeated
    longest: int  # positions of the longest document, rounded up


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

    def map(self, change) -> "Batch":
        """The batch with change(tensor) in place of each tensor."""

        def visit(value):
            if isinstance(value, Rows):
                return Rows(*map(visit, vars(value).values()))
            return change(value) if isinstance(value, Tensor) else value

        return Batch(*map(visit, vars(self).values()))

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by DataLoader: what is pinned is copied to a GPU while the host goes on."""
        return self.map(Tensor.pin_memory)


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
    slots, supervised = np.flatnonzero(bank_rows != TEXT), np.flatnonzero(targets >= 0)  # (slots,), (R,)
    left = np.pad(doc_ids, ((0, 0), (1, 0)), constant_values=-2)[:, :-1]  # (B, T), what stands on the left
    starts = np.flatnonzero(doc_ids != left).astype(np.int32)  # (documents,), and padding is one, too
    longest = np.diff(starts, append=ids.size).max().item()
    # Rounded, so that compiled code sees few shapes: kernels for documents launch blocks for count x longest.
    starts = np.pad(starts, (0, 1 + -len(starts) % (8 * len(rows))), constant_values=ids.size)
    arrays = [ids, positions, doc_ids, slots, bank_rows.reshape(-1)[slots], supervised]
    arrays += [targets.reshape(-1)[supervised], starts]
    return Rows(*map(torch.from_numpy, arrays), min(T, -(-longest // 256) * 256))


def make_batch(
    samples: list[Sample], modes: list[str], cfg: ModelConfig, row_length: int, limit: int,
    next_sample: int = 0, rows=None, tile_multiple: int = 1, prompts: bool = False, teaches: bool = False,
) -> Batch:  # fmt: skip
    """modes: for each sample "full", "pruned" or "slow": its student on full tokens, its teacher on pruned.
    limit: positions of a sample. rows: which samples share a row of row_length positions; None: best fit, in
    rows as wide as they need. tile_multiple: blank pictures fill up the number of tiles to such a multiple.
    teaches: there is a teacher even for no slow sample, as on other ranks: sharded, all make the same passes.
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
    if slow or teaches:
        taught = [laid["pruned"][i] for i in slow] or [lay_out([], [])]
        teacher = make_rows(taught, row_length, fixed and bool(slow))
        of_student = student.doc_ids.view(-1)[student.supervised]  # (R,), the sample of each target
        of_teacher = teacher.doc_ids.view(-1)[teacher.supervised]
        distill = torch.zeros_like(of_teacher)
        for j, i in enumerate(slow):
            distill[of_teacher == j] = (of_student == i).nonzero()[:, 0]
    blank = np.zeros((-first_tile[-1] % tile_multiple, *samples[0].pixels.shape[1:]), np.uint8)
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


def open_store(host: str, port: int, **options):
    """torch's key-value store over TCP; its newer backend takes no value above 8 MiB."""
    options |= {"timeout": timedelta(hours=0.5), "use_libuv": False}
    return torch.distributed.TCPStore(host, port, **options)


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
    any_slow: bool = False  # has any rank a slow sample in this micro-batch?
    shares: dict[str, float] | None = None  # for the log: how full it is, and of what
    names: list[str] | None = None  # of its records


@dataclass
class Plan(IterableDataset):
    """What each step of this rank trains on, tokenized and measured, but before any picture is decoded.

    Packed, pools of samples are put into rows by best fit, and the rows shuffled; by_kind, a row holds one
    kind, drawn by weight (stage 1). Every rank plans for all, in a process of its own, though it draws only
    one pool of `world` if there is a board. That process opens pictures only where their size matters or a
    document can do without them; others may prove broken when decoded.
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
    tile_multiple: int = 1  # of a micro-batch, see `make_batch`; 8 where code is compiled for each shape
    cursor: list | None = None  # where to go on
    board: tuple[str, int] | None = None  # host and port of a store where ranks share the pools they draw

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
                    slow = "slow" in [self.choose_mode(number) for number, _ in samples]
                    samples, skipped = self.draw(0, samples[self.rank * share : (self.rank + 1) * share])
                    yield Planned(step, [samples], skipped, [], slow)
                else:  # every rank plans for all, the first one reports
                    start = (micro * self.world + self.rank) * share
                    reported = skipped if self.rank == 0 and micro == 0 else []
                    of_all = itertools.chain(*rows[micro * self.world * share :][: self.world * share])
                    slow = "slow" in [sample.mode for sample in of_all]
                    yield Planned(step, rows[start : start + share], reported, [*cursor], slow)

    def packed_rows(self, group: int, pool: int, first: int):
        """Endless rows from row `first` of a pool on: samples, cursor behind them, what the pool skipped."""
        length = self.rows.row_length
        for samples, skipped in self.pools(group, pool):
            lengths, tiles = [sample.length for sample in samples], [sample.tiles for sample in samples]
            rows = best_fit(lengths, length, tiles, self.rows.row_images, length // 16)
            random.Random(f"{self.rows.seed}-{group}-{pool}").shuffle(rows)
            for n in range(first, len(rows)):
                cursor = [pool, n + 1] if n + 1 < len(rows) else [pool + 1, 0]
                yield [samples[i] for i in rows[n]], cursor, [] if n else skipped
            pool, first = pool + 1, 0

    def pools(self, group: int, first: int):
        """What `draw` makes of each pool from that one on: of `world` pools a rank draws one and reads the
        others from the board.
        """
        order, world = self.order(group, first * self.POOL), self.world if self.board else 1
        board = open_store(*self.board, is_master=False) if self.board else None
        drawn, at = None, first  # order stands at the first sample of pool `at`
        for pool in itertools.count(first):
            mine = pool + (self.rank - pool) % world  # the next pool that this rank draws
            if mine >= at:
                samples = itertools.islice(order, (mine - at) * self.POOL, (mine - at + 1) * self.POOL)
                at = mine + 1
                try:
                    drawn = self.draw(group, samples)
                except UserError as error:  # of all ranks, which raise it when they come to this pool
                    drawn = error
                if board:
                    board.set(f"{group}-{mine}", pickle.dumps(drawn))
            key = f"{group}-{pool}"
            here = drawn if mine == pool else pickle.loads(board.get(key))
            if isinstance(here, UserError):
                raise here
            yield here
            if board and board.add(f"{key}-reads", 1) == world:
                board.delete_key(key)
                board.delete_key(f"{key}-reads")

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
                size_matters = document or cfg.image.cut in CUT_BY_SIZE
                sizes[n] = picture_size(image, record.name) if size_matters else ANY_SIZE
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
            limits = f"{limit} positions"
            if sum(tiles.values()) > most_tiles:
                limits += f", nor its {sum(tiles.values())} tiles within --row_images {most_tiles}"
            raise BadRecord(f"{record.name}: no answer is left within {limits}", "no answer within the limit")
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
        next_sample = (planned.step + 1) * (cfg.batch_size or cfg.rows)
        shares, layout = {name: n / filled.total() for name, n in filled.items()}, {}
        if not cfg.batch_size:
            layout = {"rows": rows}
            tiles = sum(len(sample.pixels) for sample in samples)
            shares["image_fill"] = tiles / (len(rows) * cfg.row_images)
        batch = make_batch(
            samples, modes, plan.cfg, cfg.row_length, cfg.sample_limit, next_sample,
            tile_multiple=plan.tile_multiple, teaches=planned.any_slow and plan.world > 1, **layout,
        )  # fmt: skip
        shares["fill"] = filled.total() / batch.student.ids.numel()
        names = [sample.name for row in planned.rows for sample in row]
        batch.plan = replace(planned, rows=[], skipped=skipped, shares=shares, names=names)
        return batch


# --- Pictures ----------------------------------------------------------------------------------------------


class BadRecord(UserError):
    """A record that cannot be used, while others can: runs skip it and count it by `why`."""

    def __init__(self, text: str, why: str = "malformed"):
        text = text if len(text) < 500 else f"{text[:300]} ... {text[-150:]}"  # a picture in base64
        super().__init__(text.encode("utf-8", "backslashreplace").decode())
        self.why = why


def require_usable(condition: bool, message: str, why: str = "malformed") -> None:
    if not condition:
        raise BadRecord(message, why)


class FileSlice(NamedTuple):
    """A picture inside a tar: `size` bytes of a file."""

    file: str
    start: int
    size: int

    def read(self) -> bytes:
        with open(self.file, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


Picture = Image.Image | str | Path | bytes | FileSlice  # at hand, in a file, encoded, in a tar
ANY_SIZE = (1, 1)  # stands for the size of a picture where it does not matter
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")  # none runs a program
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
# What undoes an EXIF orientation, from 2 on
FLIPS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
TURNS = dict(enumerate((Image.Transpose[flip] for flip in FLIPS), 2))


@contextlib.contextmanager
def opened(image: Picture, name: str):
    """A picture that is not decoded yet, and its EXIF orientation, 1 to 8, or 0 for none.

    Raises BadRecord if its file is missing, no picture or truncated.
    """
    content = image.read() if isinstance(image, FileSlice) else image
    encoded = isinstance(content, bytes)
    place = f"{name}: image of {len(content):,} bytes" if encoded else f"{name}: image {content}"
    file = io.BytesIO(content) if encoded else content
    at_hand = isinstance(image, Image.Image)
    try:
        with contextlib.nullcontext(image) if at_hand else Image.open(file, formats=FORMATS) as picture:
            # In a PNG an orientation behind the pixels is not read yet; TIFFs are turned by Pillow itself.
            unread = picture.format == "PNG" and "exif" not in picture.info
            orientation = 0
            if not unread and picture.format != "TIFF":
                with contextlib.suppress(SyntaxError, ValueError):  # of a damaged EXIF block
                    orientation = picture.getexif().get(ExifTags.Base.Orientation)
            yield picture, orientation if orientation in range(9) else 0
    except Exception as error:  # decoders raise anything
        number = getattr(error, "errno", None)
        require_usable(number not in NOT_THERE, f"{place} does not exist", "image missing")
        # too many open files, a network that hangs, no memory: not the picture's fault
        if number or isinstance(error, MemoryError):
            raise
        raise BadRecord(f"{place} does not decode ({error})", "image broken") from None


def require_picture(image, name: str) -> None:
    """Raises BadRecord where a picture's file is missing, without opening it."""
    there = not isinstance(image, str | Path) or os.path.isfile(image)
    require_usable(there, f"{name}: image {image} does not exist", "image missing")


def open_image(image: Picture, name: str = "") -> Image.Image:
    """Decode to RGB: EXIF orientation applied, palette and alpha laid on white."""
    with opened(image, name) as (picture, orientation):
        picture.load()
    if orientation > 1:
        picture = picture.transpose(TURNS[orientation])
    if picture.mode[0] in "IF":  # 16 bits, or numbers of any size
        values = np.asarray(picture, np.float32)
        largest = next((x for x in (1, 255, 65535) if values.max() <= x), values.max())
        picture = Image.fromarray((values * (255 / largest)).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def picture_size(image, name: str = "") -> tuple[int, int]:
    """(width, height) of a Scene or picture as `open_image` would turn it, from the header alone."""
    if isinstance(image, Scene):
        return CANVAS, CANVAS
    with opened(image, name) as (picture, orientation):
        return picture.size[::-1] if orientation >= 5 else picture.size


def picture_sizes(images: list, cfg: ModelConfig, name: str = "") -> list[tuple[int, int]]:
    """Sizes of a sample's pictures; ANY_SIZE, without opening a file, where all pictures are cut alike."""
    return [picture_size(image, name) if cfg.image.cut in CUT_BY_SIZE else ANY_SIZE for image in images]


def to_pixels(image: Image.Image, size: int, resample: int = Image.Resampling.BICUBIC) -> np.ndarray:
    """Plain square resize, aspect not kept: uint8 (3, size, size); normalised later, on the device."""
    image = image.resize((size, size), resample, reducing_gap=3.0)
    return np.stack([np.asarray(band) for band in image.split()])  # (3, size, size); faster than transposing


def cut_picture(picture: Image.Image, cfg: ModelConfig) -> np.ndarray:
    """An RGB picture's tiles, uint8 (tiles, 3, side, side): the whole as a square, then tiles row by row.

    "pad" first centres it on a square of the encoder's mean colour, as LLaVA-1.5 does. "split" cuts it as a
    square, "anyres" and "unpad" with its aspect, centred on black.
    """
    side, resample, cut = cfg.vit.image_size, cfg.image.resample, cfg.image.cut
    if cut == "pad":
        if max(picture.size) > 8 * side:  # of a banner the square would be huge
            size = [max(1, x) for x in inside(picture.size, (8 * side, 8 * side))]
            picture = picture.resize(size, resample, reducing_gap=3.0)
        mean = tuple(int(255 * x) for x in cfg.image.mean)
        picture = centred(picture, (max(picture.size), max(picture.size)), mean)
    columns, rows = tiling_of(cfg, picture.size)
    square = to_pixels(picture, side, resample)[None]  # (1, 3, side, side)
    if not columns:
        return square
    canvas = columns * side, rows * side
    size = canvas if cut == "split" else inside(picture.size, canvas, ceil=True)
    sheet = centred(picture.resize(size, resample, reducing_gap=3.0), canvas, "black")
    tiles = np.asarray(sheet).reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    return np.concatenate([square, tiles.reshape(-1, 3, side, side)])  # (1 + rows * columns, 3, side, side)


def centred(picture: Image.Image, size: tuple[int, int], colour) -> Image.Image:
    sheet = Image.new("RGB", size, colour)
    sheet.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return sheet


def load_images(images: list, cfg: ModelConfig, name: str = "") -> np.ndarray:
    """Scenes or pictures to the uint8 (tiles, 3, size, size) that the encoder wants: all tiles of all."""
    side = cfg.vit.image_size
    scene_size = CANVAS if cfg.image.cut else side
    pixels = [np.zeros((0, 3, side, side), np.uint8)]
    for image in images:
        picture = render(image, scene_size) if isinstance(image, Scene) else open_image(image, name)
        pixels.append(cut_picture(picture, cfg))
    return np.concatenate(pixels)


def load_sample(pieces: list[Piece], images: list, cfg: ModelConfig, name: str = "") -> Sample:
    return Sample(pieces, load_images(images, cfg, name), picture_sizes(images, cfg, name))


# --- Readers: files of records by offset, the forms of a record, mixtures of files -------------------------

SUFFIXES = (".tar", ".jsonl", ".json", ".txt")  # a folder is searched in this order
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
PROBE = 100  # records that are tried before a file is given up
CONVERT = "python tools/convert.py PATH OUT makes tars of other forms"
# A list of JSON objects, walked without parsing them: 50 MB a second
LIST_BEGINS = regex.compile(rb"(?:\xef\xbb\xbf)?\s*+\[")
LIST_OBJECT = rb'(?P<object>\{(?:[^"{}]++|"(?:[^"\\]++|\\.)*+"|(?&object))*+\})'
LIST_ITEM = regex.compile(rb"\G\s*+" + LIST_OBJECT + rb"\s*+(?:,(?!\s*+\])|(?=\]))", regex.DOTALL)
LIST_ENDS = regex.compile(rb"\s*+\]\s*+\Z")


def find_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """A file itself; those of the first suffix that a folder has; those that match a glob."""
    files = [path] if path.is_file() else sorted(path.parent.glob(path.name)) if path.name else []
    if path.is_dir():
        files = next(filter(None, (sorted(path.glob(f"*{suffix}")) for suffix in suffixes)), [])
    kinds = {file.suffix for file in files}
    what = f"found {', '.join(sorted(kinds))}" if files else "no such file"
    hint = f"use a file, folder or glob of one of {', '.join(suffixes)}"
    hint += f"; {CONVERT}" if files and suffixes == SUFFIXES else ""
    require(len(kinds) == 1 and kinds <= set(suffixes), f"{path}: {what}; {hint}")
    return files


@functools.cache
def index_file(path: Path, size: int, changed: int) -> np.ndarray:
    """int64 (2, n + 1): where records begin, and the end; their line or record numbers. A file is scanned
    once, as long as its size and time of change stay; NAME.tar.index.npy keeps the index of a tar.
    """
    scan = {".tar": scan_tar, ".json": scan_json}.get(path.suffix, scan_lines)
    kept = f"{path}.index.npy"
    temporary = f"{path}.index.{os.getpid()}.npy"
    if path.suffix == ".tar":
        with contextlib.suppress(OSError, ValueError, EOFError, IndexError):  # none yet, or not one of ours
            index = np.load(kept)
            if index[0].tolist() == [size, changed]:
                return index[1:].T
    index = np.fromiter(scan(path), np.dtype((np.int64, 2)))
    if path.suffix == ".tar":
        with contextlib.suppress(OSError):  # a folder that cannot be written: the next run scans again
            np.save(temporary, np.concatenate([[[size, changed]], index]))
            os.replace(temporary, kept)
    return index.T


def scan_lines(path: Path):
    """.jsonl: a record is a line that is not blank; .txt: the lines up to a blank one."""
    at, inside = 0, False
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            blank = not line.strip()
            if not blank and not inside:
                yield at, number
            inside = path.suffix == ".txt" and not blank
            at += len(line)
    yield at, 0


def scan_json(path: Path):
    """The objects of a list. What is wrong with the list as a whole shows here."""
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        begin, number = LIST_BEGINS.match(content), -1
        at = begin.end() if begin else len(content)
        for number, item in enumerate(LIST_ITEM.finditer(content, at)):
            yield item.start("object"), number
            at = item.end()
        if not LIST_ENDS.match(content, at):
            read_json(path)  # tells where it is no JSON
            raise UserError(f"{path}: a .json file must be a list of objects")
    yield at, number + 1


def scan_tar(path: Path):
    """Samples: members that share their path up to its first dot."""
    number, last = 0, None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key = folder, base.partition(".")[0]
                if member.isfile() and key != last:
                    yield member.offset, number
                    number, last = number + 1, key
                tar.members = []  # it would keep them all
            yield tar.offset, number
            tar.fileobj.seek(tar.offset)
            while block := tar.fileobj.read(2**20):
                if block.strip(b"\0"):  # tarfile takes a damaged header for the end
                    raise tarfile.TarError(f"no member where one should begin, at byte {tar.offset}")
    except tarfile.TarError as error:
        raise UserError(f"{path} is damaged or no plain tar ({error}): unpack a compressed one") from None


class Table:
    """Random access to the records of a file, or of all in a folder or a glob such as "cc3m/*.tar".

    Only where records begin is held in memory. raw(i) is a pure function of the files and i.
    """

    suffixes = SUFFIXES
    index = staticmethod(index_file)

    def __init__(self, path: Path):
        self.files = find_files(path, self.suffixes)
        self.indexes = []
        self.unit = "record" if self.files[0].suffix in (".tar", ".json") else "line"
        for file in tqdm(self.files, desc=f"index {path}", disable=len(self.files) < 20, leave=False):
            stat = file.stat()
            self.indexes.append(self.index(file, stat.st_size, stat.st_mtime_ns))
        self.first = np.cumsum([0] + [len(starts) - 1 for starts, _ in self.indexes])
        require(len(self) > 0, f"{path}: expected at least one record, in a .json file a list of them")

    def __len__(self) -> int:
        return int(self.first[-1])

    def raw(self, i: int) -> tuple[dict, str]:
        """Record i as its file has it, and its place for error messages. Pictures of tars are FileSlices."""
        n = int(np.searchsorted(self.first, i, side="right")) - 1
        starts, numbers = self.indexes[n]
        k = i - int(self.first[n])
        place = f"{self.files[n]} {self.unit} {numbers[k]}"
        with open(self.files[n], "rb") as file:
            return self.read(file, int(starts[k]), int(starts[k + 1]), place), place

    def read(self, file, start: int, end: int, place: str) -> dict:
        """The record between two bytes of a file."""
        suffix = Path(file.name).suffix
        if suffix == ".tar":
            return read_tar_sample(file, start, end, place)
        file.seek(start)
        content = file.read(end - start).strip()
        return read_object(content.rstrip(b", \t\r\n") if suffix == ".json" else content, suffix, place)


def read_object(content: bytes, suffix: str, place: str) -> dict:
    """A JSON object; of a .txt {"text"}."""
    try:
        text = content.decode("utf-8-sig")
        value = {"text": text.strip().replace("\r\n", "\n")} if suffix == ".txt" else json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = ", and each record must be on one line" if suffix == ".jsonl" else ""
        raise BadRecord(f"{place}: not {'UTF-8' if suffix == '.txt' else 'JSON'} ({error}){hint}") from None
    require_usable(isinstance(value, dict), f"{place}: expected an object, got {content[:40]!r}")
    return value


def read_tar_sample(file, start: int, end: int, place: str) -> dict:
    """A sample's .json, or its .txt as a caption, with its pictures in order, which are not read yet."""
    objects, pictures, others = {}, [], []
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in itertools.takewhile(lambda member: member.offset < end, tar):
                base = member.name.rpartition("/")[2]
                suffix = "." + base.partition(".")[2].lower()  # KEY.ocr.txt: .ocr.txt
                if member.isfile() and suffix.endswith(PICTURES):
                    pictures.append(FileSlice(file.name, member.offset_data, member.size))
                elif member.isfile() and suffix in (".json", ".txt"):
                    objects[suffix] = read_object(tar.extractfile(member).read(), suffix, place)
                elif member.isfile():
                    others.append(base)
    except tarfile.TarError as error:
        raise BadRecord(f"{place}: does not read ({error})") from None
    raw = objects.get(".json", {})
    if layout_of(raw) in (None, ("text",)) and (".txt" in objects or "caption" in raw):
        text = objects[".txt"]["text"] if ".txt" in objects else raw["caption"]
        raw = {"caption": text} if pictures else {"text": text}
    text_beside = f"{place}: {', '.join(others)} beside its text is no picture that is read"
    require_usable(pictures or not others or "text" not in raw, text_beside, "media not read")
    key = "images" if isinstance(raw.get("images"), list) else "image"
    if not isinstance(raw.get(key), list):
        return raw | {"image": pictures} if pictures else raw
    named = sum(image is not None for image in raw[key])  # in a document null stands where a text is
    counts = f"its .json names {named} images, it has {len(pictures)}"
    require_usable(named == len(pictures), f"{place}: {counts}", "image missing")
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


class FileSource(Table):
    """Records of one kind; record i is a pure function of the files and i.

    Without a kind the first record's form tells it. Image paths are relative to the file, or to the folder
    `images` beside it, and stay inside.
    """

    def __init__(self, path: Path, kind: str = "", images: str = ""):
        super().__init__(path)
        self.name = path.stem
        self.folder = (path if path.is_dir() else path.parent) / images
        raw, _ = self.first_usable(self.raw)
        self.kind = kind or LAYOUTS.get(layout_of(raw), ("chat",))[0]
        if kind:  # one that does not fit shows before a run begins
            self.first_usable(self.__getitem__)

    def first_usable(self, read):
        """read(i) of the first record for which it succeeds; if PROBE fail, the first one's error."""
        errors = []
        for i in range(min(PROBE, len(self))):
            try:
                return read(i)
            except BadRecord as error:
                errors.append(error)
        raise errors[0]

    def with_pictures(self, i: int) -> Record:
        record = self[i]
        for image in record.images:
            require_picture(image, record.name)
        return record

    def __getitem__(self, i: int) -> Record:
        raw, place = self.raw(i)
        layout = layout_of(raw)
        if self.kind not in LAYOUTS.get(layout, ()):
            keys = ", ".join([*raw][:8])
            raise BadRecord(f"{place}: expected a record of kind {self.kind}, but it has {keys}; {CONVERT}")
        read = read_conversation if layout == ("conversations",) else read_document
        try:
            return read(raw, self.kind, self.folder, place)
        except (TypeError, ValueError, KeyError, AttributeError) as error:  # values of other types
            raise BadRecord(f"{place}: not a record of {', '.join(layout)} ({error!r}); {CONVERT}") from None


def local_pictures(images: list, folder: Path, place: str) -> list[Picture]:
    """Pictures at hand as they are; paths must lie inside the folder, where wget -x puts what a URL names."""
    pictures, root = [], os.path.join(os.path.abspath(folder), "")
    for image in images:
        if not isinstance(image, bytes | FileSlice):
            text = isinstance(image, str)
            require_usable(text, f"{place}: an image must be the path of a file, got {image!r}")
            path = os.path.join(folder, image.partition("://")[2] or image)
            there = "://" not in image or os.path.isfile(path)
            require_usable(there, f"{place}: image {image} is a URL: download it and write the file's path")
            inside = os.path.abspath(path).startswith(root)  # links are followed
            require_usable(inside, f"{place}: image {image} leads out of the folder", "image outside")
            image = Path(path)
        pictures.append(image)
    return pictures


def read_document(raw: dict, kind: str, folder: Path, place: str) -> Record:
    """Images and texts in order, captions and texts alone, too; texts behind each other become one."""
    if kind == "interleaved":
        images, texts = raw["images"], raw["texts"]
    elif kind == "caption":
        images = raw["image"] if isinstance(raw["image"], list) else [raw["image"]]
        images, texts = [*images, None], [*(None for _ in images), raw["caption"]]
    else:
        images, texts = [None], [raw["text"]]
        require_usable(not raw.keys() & {"image", "images"}, f"{place}: a text has an image beside it")
    parts, pictures = [], []
    for n, (image, text) in enumerate(zip(images, texts, strict=True)):
        one = (image is None) != (text is None) and isinstance(text, str | None)
        require_usable(one, f"{place}: place {n} must have an image or a text, else null; {CONVERT}")
        if text is None:
            parts.append(len(pictures))
            pictures += local_pictures([image], folder, place)
        elif parts and isinstance(parts[-1], str):
            parts[-1] += "\n\n" + text
        else:
            parts.append(text)
    has_text = any(isinstance(part, str) and part.strip() for part in parts)
    require_usable(has_text, f"{place}: a {kind} without text", "empty text")
    return Record(kind, parts, pictures, place)


ROLE_OF = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def read_conversation(raw: dict, kind: str, folder: Path, place: str) -> Record:
    """LLaVA's form, in stage 1 a caption: the bare images and the first answer, without the instruction. In a
    record without images "<image>" is plain text.
    """
    media = ", ".join(raw.keys() & {"video", "videos", "audio", "audios"})
    require_usable(not media, f"{place}: has {media}, which is not read", "media not read")
    images = raw.get("image") or raw.get("images") or []
    images = images if isinstance(images, list) else [images]
    turns, marks = [], 0
    for turn in raw["conversations"]:
        role, text = ROLE_OF.get(str(turn["from"])), turn["value"]
        fits = role is not None and isinstance(text, str)
        require_usable(fits, f"{place}: a turn must have 'from' (human or gpt) and a text 'value'")
        content = [text]
        if role == "user" and raw.keys() & {"image", "images"}:
            content = split_at_images(text, marks)
            marks += text.count("<image>")
        turns.append((role, content))
    require_usable(marks == len(images), f"{place}: {len(images)} images but {marks} <image> marks")
    images = local_pictures(images, folder, place)
    if turns and turns[0][0] == "assistant":  # ShareGPT's cuts: LLaVA drops it, too
        turns = turns[1:]
    roles = [role for role, _ in turns]
    first = 1 if roles[:1] == ["system"] else 0
    begins = roles[first : first + 2] == ["user", "assistant"] and "system" not in roles[1:]
    require_usable(begins, f"{place}: a conversation must start with a human turn and an answer")
    empty = any(role == "assistant" and not content[0].strip() for role, content in turns)
    require_usable(not empty, f"{place}: an answer is empty", "empty answer")
    if kind == "caption":
        return Record("caption", [*range(len(images)), turns[first + 1][1][0]], images, place)
    return Record("chat", turns, images, place)


def split_at_images(text: str, first: int) -> list:
    """'<image>\\nWhat?' -> [first, 'What?']. A single image moves to the front of its turn, as in LLaVA."""
    chunks = text.split("<image>")
    if len(chunks) == 2:
        return [first, f"{chunks[0].strip()} {chunks[1].strip()}".strip()]
    content = []
    for n, chunk in enumerate(chunks):
        content += [first + n - 1] if n else []
        content += [chunk.strip("\n")] if chunk.strip() else []
    return content


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
    path is "scenes" or that of a file, folder or glob of records, relative to the mixture. Where no entry has
    a weight, SHARES hold, equally within a kind. A source's `name` is its entry's, or its file's.
    """
    path = Path(spec)
    if spec == "scenes":
        entries = [{"kind": kind, "path": "scenes", "weight": weight} for kind, weight in SCENES_MIX[stage]]
    else:
        there = spec and (path.exists() or glob.has_magic(path.name))
        require(there, f"--data {spec}: no such file; use 'scenes', a file of records or a mixture file")
        first = {}
        if path.suffix == ".json":
            with contextlib.suppress(BadRecord):  # one that is broken is skipped like others
                first = Table(path).raw(0)[0]
        is_mixture = layout_of(first) is None and first.keys() & {"kind", "path"}
        entries = read_json(path) if is_mixture else [{"kind": FileSource(path).kind, "path": path.name}]
    check_entries(entries, stage, path)
    kinds = [entry["kind"] for entry in entries]
    total, sources = sum(SHARES[kind] for kind in set(kinds)), []
    for kind, entry in zip(kinds, entries):
        file = path.parent / entry["path"]
        scenes = entry["path"] == "scenes"
        source = Scenes(kind) if scenes else FileSource(file, kind, entry.get("images", ""))
        source.name = entry.get("name", file.stem)
        sources.append((source, entry.get("weight", SHARES[kind] / total / kinds.count(kind))))
    return sources


def check_entries(entries: list[dict], stage: str, path: Path) -> None:
    for n, entry in enumerate(entries):
        place = f"{path} entry {n}"
        kind = entry.get("kind")
        weight = entry.get("weight", 1.0)
        require(isinstance(entry.get("path"), str), f"{place}: expected an object with kind and path")
        require(kind in KINDS, f"{place}: kind '{kind}' is not known, use {', '.join(KINDS)}")
        fits = kind != "interleaved" or stage != "sft"
        require(fits, f"{place}: interleaved data is for stage 1, stage 2 takes chat, caption and text")
        unknown = ", ".join(entry.keys() - set(ENTRY_KEYS))
        require(not unknown, f"{place}: unknown key '{unknown}', use {', '.join(ENTRY_KEYS)}")
        odd = ", ".join(k for k, value in entry.items() if k != "weight" and not isinstance(value, str))
        require(not odd, f"{place}: {odd} must be a text")
        valid = isinstance(weight, int | float) and 0 <= weight < math.inf
        require(valid, f"{place}: weight {weight!r} is not a number of at least 0")
    names = dict.fromkeys(entry["path"] for entry in entries if entry["path"] != "scenes")
    missing = ", ".join(n for n in names if not (path.parent / n).exists() and not glob.has_magic(n))
    require(not missing, f"{path}: these files are missing in {path.parent}: {missing}; put them there")
    bare = sum("weight" not in entry for entry in entries)
    require(bare in (0, len(entries)), f"{path}: {bare} entries have no weight: give one to all or to none")
    require(any(entry.get("weight", 1.0) for entry in entries), f"{path}: all weights are 0")


# ---------------------------------------------------------------------------------------------------------
# Scenes: a world drawn by Pillow from a seed, so it needs no download and its ground truth is exact.
# Two to six shapes and perhaps a three-letter word lie in a loose 3x3 grid on grey paper.

COLOURS = {
    "red": (214, 40, 40), "green": (40, 150, 60), "blue": (40, 70, 220), "yellow": (245, 215, 40),
    "purple": (140, 40, 170), "orange": (245, 130, 20), "white": (250, 250, 250), "black": (15, 15, 15),
}  # fmt: skip
DRAWN = read_json(ASSETS / "scene_shapes.json")  # of a shape (form, corners in units of the radius)
SHAPES = tuple(DRAWN)
PLACES = ("northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast")
LETTERS = "AEHKLNORTX"
MADE_UP = ("dax", "wug", "blick", "fep", "zorp", "tulv")
HELD_OUT = {("red", "star"), ("blue", "ring"), ("green", "square")}  # never drawn nor mentioned in training
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
CANVAS = 128  # pixels per side of the drawing, before it is resized to what the encoder wants
WORD_FONT = ImageFont.load_default(size=18)  # the font that Pillow carries
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

    def names(self) -> dict[int, str]:
        """What lies in each cell."""
        words = {self.word_cell: f"word {self.word}"} if self.word else {}
        return words | {thing.cell: thing.name for thing in self.things}


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
        for form, points in DRAWN[thing.shape]:
            xy = (np.array(points) * thing.radius + (thing.x, thing.y)).flatten().tolist()
            draw = {"polygon": pen.polygon, "rectangle": pen.rectangle}.get(form, pen.ellipse)
            draw(xy, fill=(scene.paper,) * 3 if form == "hole" else COLOURS[thing.colour])
    if scene.word:
        pen.text(scene.word_xy, scene.word, fill=(0, 0, 60), font=WORD_FONT, anchor="mm")
    return picture if size == CANVAS else picture.resize((size, size), Image.Resampling.BOX)


# Questions end with what they are about, places come before things.
QUESTION_TYPES = ("colour", "shape", "count", "relation", "exists")
SCENE_QUESTIONS = (*QUESTION_TYPES, *QUESTION_TYPES, "place", "what", "text", "ref")  # the five come twice
YES_NO = ("no", "yes")


def say(scene: Scene, rng: random.Random | None = None) -> str:
    """One sentence that names everything, in raster order or, given rng, in a random one."""
    phrases = [f"{PLACES[cell]} {name}" for cell, name in sorted(scene.names().items())]
    if rng:
        rng.shuffle(phrases)
    return ", ".join(phrases) + "."


class SceneQuestion(NamedTuple):
    kind: str
    question: str
    answer: str
    held_out: bool  # about a pair that training never shows


def ask(scene: Scene, kind: str, rng: random.Random, split: str) -> SceneQuestion | None:
    """A question of one type, or None where the scene offers none; yes and no are equally likely."""
    things = scene.things
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
    if kind == "exists":  # absent pairs are mostly hard: colour and shape are both there, but apart
        yes = rng.random() < 0.5
        colours, shapes = zip(*pairs)
        absent = [pair for pair in PAIRS if pair not in pairs and (split == "test" or pair not in HELD_OUT)]
        hard = [pair for pair in absent if pair[0] in colours and pair[1] in shapes]
        absent = hard if not yes and hard and rng.random() < 0.6 else absent
        colour, shape = pair = rng.choice(pairs if yes else absent)
        return SceneQuestion(kind, f"is there any {colour} {shape}?", YES_NO[yes], pair in HELD_OUT)
    if kind == "what":
        cell = rng.randrange(9)
        return SceneQuestion(kind, f"what is {PLACES[cell]}?", scene.names().get(cell, "nothing"), False)
    if kind == "text" and scene.word:
        return SceneQuestion(kind, "what is the word?", scene.word, False)
    if kind in ("place", "ref") and unique:
        thing = rng.choice(unique)
        words, answer = ("where", PLACES[thing.cell]) if kind == "place" else ("in which box", thing.box)
        return SceneQuestion(kind, f"{words} is the {thing.name}?", answer, thing.pair in HELD_OUT)
    return None


def ask_relation(unique: list[Thing], rng: random.Random) -> SceneQuestion | None:
    """Only where A and B lie in different columns (rows); listed both ways round, as many yes as no."""
    options = []
    for a, b in itertools.product(unique, repeat=2):
        right = a.cell % 3 - b.cell % 3
        down = a.cell // 3 - b.cell // 3
        if right:
            options += [(a, b, "left of", right < 0), (a, b, "right of", right > 0)]
        if down:
            options += [(a, b, "above", down < 0), (a, b, "below", down > 0)]
    if not options:
        return None
    a, b, relation, true = rng.choice(options)
    question = f"is the {a.name} {relation} the {b.name}?"
    return SceneQuestion("relation", question, YES_NO[true], bool({a.pair, b.pair} & HELD_OUT))


def ask_many(scene: Scene, kinds: tuple, n: int, rng: random.Random, split: str) -> list[SceneQuestion]:
    """n different questions of types drawn from `kinds`; fewer where the scene offers fewer."""
    questions = {}
    for _ in range(3 * n):
        if len(questions) < n and (question := ask(scene, rng.choice(kinds), rng, split)):
            questions.setdefault(question.question, question)
    return list(questions.values())


def ask_bound(scene: Scene, thing: Thing, word: str, meaning: str, named: bool) -> Example:
    """A question that needs the meaning of a made-up word: "is the north shape dax?" or, named, "what colour
    is north?", whose answer is the word if it fits and else the ordinary name.
    """
    attribute = "colour" if meaning in COLOURS else "shape"
    place = PLACES[thing.cell]
    ordinary = getattr(thing, attribute)
    if named:
        return Example(scene, f"what {attribute} is {place}?", word if ordinary == meaning else ordinary)
    return Example(scene, f"is the {place} shape {word}?", YES_NO[ordinary == meaning])


def draw_bound(word: str, meaning: str, fits: bool, named: bool, rng: random.Random, split: str) -> Example:
    """Such a question about a new scene; in training not even a "no" is about a held-out pair."""
    attribute = "colour" if meaning in COLOURS else "shape"
    while True:  # one thing of each scene: all things of a scene would make rare ones fit more often
        number = rng.randrange(1 << 40)
        scene = make_scene(split, number)
        thing = rng.choice(scene.things)
        meant = replace(thing, **{attribute: meaning})
        if (meant == thing) == fits and (split == "test" or meant.pair not in HELD_OUT):
            return ask_bound(scene, thing, word, meaning, named)._replace(name=str(number))


def chat_about(scene: Scene, picture: list, rng: random.Random, split: str) -> list[tuple]:
    """Six questions and answers; `picture` opens the first: [0] for an image, or a text about the scene."""
    turns = []
    for question in ask_many(scene, SCENE_QUESTIONS, 6, rng, split):
        turns += [("user", [question.question]), ("assistant", [question.answer])]
    if rng.random() < 0.2:
        turns[-2:] = [("user", [CAPTION_PROMPT]), ("assistant", [say(scene)])]
    turns[0] = ("user", picture + turns[0][1])
    return turns


def facts_about(scene: Scene, rng: random.Random) -> str:
    """Text only: the sentence and a few true statements, no picture."""
    facts = [f"{fact.question} {fact.answer}." for fact in ask_many(scene, QUESTION_TYPES, 3, rng, "train")]
    return " ".join([say(scene, rng), *facts])


class Scenes:
    """Endless records of one kind; record i is a pure function of (split, kind, i).

    That captions lift 0-shot and interleaved documents few-shot (MM1 3.2) holds by construction: captions
    alone describe a picture in ordinary words, some behind the template that asks for it; documents do so in
    words of their own, but they alone reward reading what stands before and have questions in the template.
    """

    def __init__(self, kind: str, split: str = "train"):
        self.kind, self.split = kind, split

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, i: int) -> Record:
        rng = random.Random(f"{self.split}-{self.kind}-{i}")
        name = f"scenes {self.kind} {i}"
        scene = make_scene(self.split, rng.randrange(1 << 40))
        if self.kind == "caption":  # plain as on the web, or as 0-shot prompts ask
            begin = PHOTO + " " if rng.random() < 0.25 else ""
            return Record("caption", [0, begin + say(scene)], [scene], name)
        if self.kind == "chat":
            return Record("chat", chat_about(scene, [0], rng, self.split), [scene], name)
        if self.kind == "text":
            return Record("text", [facts_about(scene, rng)], [], name)
        examples = self.examples(scene, rng)
        return Record("interleaved", document_parts(examples), [example.image for example in examples], name)

    def examples(self, first: Scene, rng: random.Random) -> list[Example]:
        """2 to 9 pictures (8 shots and a question): each with a caption, where a made-up word stands for one
        colour or shape throughout; or each with a question; or each with a question about such a word.
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
        return examples
