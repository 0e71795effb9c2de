"""Records of other forms, such as parquet, to tars that training reads in any order.

    python tools/convert.py IN OUT                      IN: a file, folder or glob; OUT: a folder for the tars
    python tools/convert.py IN OUT --images pictures    whose records name pictures relative to that folder

| what there is                                  | training         | what this tool writes   |
|------------------------------------------------|------------------|-------------------------|
| LLaVA: `conversations`, perhaps `image`        | reads it         | the same record         |
| captions: `image`, `caption`                   | reads it         | the same record         |
| webdataset: in a tar KEY.jpg beside KEY.txt    | reads it         | `image`, `caption`      |
| OBELICS: `images` and `texts` of equal length  | reads it         | the same record         |
| text: `text`                                   | reads it         | the same record         |
| MMC4: `text_list`, `image_info`                | after conversion | `images`, `texts`       |
| Cauldron, FineVision: `images`, `texts` of     | after conversion | `image`,                |
| {"user", "assistant"}                          |                  | `conversations`         |
| VLMEvalKit: `question`, `answer`, `image`,     | after conversion | `image`,                |
| perhaps `A`, `B`, ... and `hint`               |                  | `conversations`         |
| .json (a list), .jsonl, .tar, .txt             | reads them       | .tar                    |
| .parquet, .tsv                                 | after conversion | .tar                    |

NUMBER.json in a tar is a record, NUMBER.0.jpg and so on are its pictures. Tars that are there already are
kept, so that a repeated call goes on. Exit code 1: more than 1 % of what this call converted could not be
used. Parquet needs `pip install pyarrow`. `open_table` gives the records of all these files one by one.
"""

import base64
import csv
import functools
import io
import json
import os
import sys
import tarfile
from array import array
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

import data
import model
from data import BadRecord
from model import UserError

SUFFIXES = (".tar", ".parquet", ".jsonl", ".tsv", ".json", ".txt")  # a folder is searched in this order
MMC4_LEAST_SIMILARITY = 0.24  # of an image to its sentence; the usual choice, MM1 does not say
OPTION_LETTERS = "ABCDEFGHI"
LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
CSV_FIELD_LIMIT = 2**31 - 1  # a picture in base64 is long; more is not a C long everywhere


@dataclass
class ConvertConfig:
    images: str = ""  # folder of the pictures that records name by path
    per_tar: int = 1000  # records of a tar


# ---------------------------------------------------------------------------------------------------------
# Tables


def open_table(path: Path) -> data.Table:
    """Records of a file, folder or glob of any of SUFFIXES: len(table) and table.raw(i) -> (record, place).

    Pictures of parquet are {"bytes", "path"} as on the hub, those of a .tsv base64 (see `tsv_pictures`).
    """
    suffix = data.find_files(path, SUFFIXES)[0].suffix
    return {".tsv": TsvTable, ".parquet": ParquetTable}.get(suffix, data.Table)(path)


class TsvTable(data.Table):
    """VLMEvalKit's tables: a header, then rows, whose quoted cells may hold line ends."""

    suffixes = (".tsv",)

    def __init__(self, path: Path):
        super().__init__(path)
        self.by_index = {}

    def index(self, file: Path, size: int, changed: int) -> tuple[np.ndarray, np.ndarray]:
        return index_tsv(file, size, changed)

    def read(self, file, start: int, end: int, place: str) -> dict[str, str]:
        path = Path(file.name)
        header = tsv_header(path, path.stat().st_mtime_ns)
        file.seek(start)
        cells = tsv_cells(file.read(end - start), place)
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
        if not self.by_index:
            for file, first, (starts, _) in zip(self.files, self.first.tolist(), self.indexes):
                with open(file, "rb") as opened:
                    for k, start in enumerate(starts[:-1].tolist()):
                        opened.seek(start)
                        cell = opened.read(64).partition(b"\t")[0]
                        self.by_index[cell.decode("utf-8", "replace")] = first + k
        if index not in self.by_index:
            raise BadRecord(f"{place}: its image is that of index {index}, which no row has")
        return self.by_index[index]


@functools.cache
def index_tsv(path: Path, size: int, changed: int) -> tuple[np.ndarray, np.ndarray]:
    """Where rows begin behind the header, and the end; the lines they begin in."""
    starts, numbers, at, quoted = array("q"), array("q"), 0, False
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip(b"\r\n") and not quoted:
                starts.append(at)
                numbers.append(number)
            quoted = quote_continues(line, quoted)
            at += len(line)
    starts.append(at)
    return np.array(starts)[1:], np.array(numbers)[1:]


def quote_continues(line: bytes, quoted: bool) -> bool:
    """Whether a quoted cell continues on the next line. A quote opens a cell only as its first character."""
    for cell in line.rstrip(b"\r\n").split(b"\t") if quoted or b'"' in line else ():
        if not quoted and cell[:1] == b'"':
            quoted, cell = True, cell[1:]
        quoted = quoted and cell.count(b'"') % 2 == 0
    return quoted


@functools.lru_cache
def tsv_header(file: Path, changed: int) -> list[str]:
    with open(file, "rb") as opened:
        return tsv_cells(opened.readline(), f"{file} line 1")


def tsv_cells(line: bytes, place: str) -> list[str]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    try:
        text = line.decode("utf-8-sig").strip("\r\n")
        return next(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True), [])
    except UnicodeDecodeError as error:
        raise BadRecord(f"{place}: byte {error.start} is not UTF-8") from None
    except csv.Error as error:
        raise BadRecord(f"{place}: its quotes do not close where cells end ({error})") from None


def tsv_pictures(cell: str, place: str) -> list[bytes]:
    """The picture, or the list of pictures, that a cell holds in base64."""
    try:
        texts = json.loads(cell.replace("'", '"')) if cell.startswith("[") else [cell]
        return [base64.b64decode(text, validate=True) for text in texts]
    except (ValueError, TypeError, AttributeError):
        raise BadRecord(f"{place}: its image is not base64") from None


class ParquetTable(data.Table):
    """Rows lie in groups, which are read whole; the last one is kept."""

    suffixes = (".parquet",)

    def __init__(self, path: Path):
        self.edges, self.kept = {}, (None, None)  # by file, the first row of each group; the last group
        super().__init__(path)

    def index(self, file: Path, size: int, changed: int) -> tuple[np.ndarray, np.ndarray]:
        metadata = open_parquet(file).metadata
        rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self.edges[str(file)] = np.cumsum([0, *rows])
        return np.arange(sum(rows) + 1), np.arange(sum(rows))

    def read(self, file, start: int, end: int, place: str) -> dict:
        edges = self.edges[file.name]
        group = int(np.searchsorted(edges, start, side="right")) - 1
        key = os.getpid(), file.name, group
        if self.kept[0] != key:
            self.kept = key, open_parquet(Path(file.name)).read_row_group(group).to_pylist()
        return dict(self.kept[1][start - int(edges[group])])


def open_parquet(path: Path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is no parquet file that can be read ({error})") from None


# ---------------------------------------------------------------------------------------------------------
# Forms


def training_form(raw: dict, place: str) -> dict:
    """A record as training reads it."""
    if {"text_list", "image_info"} <= raw.keys():
        return mmc4_to_interleaved(raw, place)
    if {"image", "question", "answer"} <= raw.keys() and "conversations" not in raw:
        return question_to_conversation(raw, place)
    texts = raw.get("texts")
    if "images" in raw and isinstance(texts, list) and any(isinstance(text, dict) for text in texts):
        return cauldron_to_conversation(raw, place)
    if data.layout_of(raw) is None:
        raise BadRecord(f"{place}: no record that is known here, it has {', '.join([*raw][:8])}")
    return raw


def mmc4_to_interleaved(raw: dict, place: str) -> dict:
    """Sentences with images in front of those they were matched with; bad matches are left out."""
    sentences, infos = raw["text_list"], raw["image_info"]
    lists = isinstance(sentences, list) and isinstance(infos, list)
    if not lists or not all(isinstance(sentence, str) for sentence in sentences):
        raise BadRecord(f"{place}: 'text_list' must be a list of texts and 'image_info' one of objects")
    before = [[] for _ in sentences]
    for info in infos:
        info = info if isinstance(info, dict) else {}
        at, similarity = info.get("matched_text_index"), info.get("matched_sim", 1.0)
        matched = isinstance(at, int) and 0 <= at < len(sentences) and isinstance(similarity, int | float)
        if not matched or info.get("image_name") is None:
            needed = f"'image_name' and a 'matched_text_index' below {len(sentences)}"
            raise BadRecord(f"{place}: an image needs {needed}, got {info}")
        if similarity >= MMC4_LEAST_SIMILARITY:
            before[at].append(info["image_name"])
    images, texts = [], []
    for sentence, pictures in zip(sentences, before):
        if pictures or not texts:
            images += [*pictures, None]
            texts += [*(None for _ in pictures), sentence]
        else:
            texts[-1] += " " + sentence
    return {"images": images, "texts": texts}


def conversation(images: list, pairs: list[tuple[str, str]], place: str) -> dict:
    """LLaVA's form of questions and answers about images, which stand in front of the first question."""
    turns = []
    for n, (question, answer) in enumerate(pairs):
        if images and "<image>" in question:
            raise BadRecord(f"{place}: question {n} holds the text <image>, which would stand for a picture")
        marks = "<image>" * len(images) + "\n" if images and n == 0 else ""
        turns += [{"from": "human", "value": marks + question}, {"from": "gpt", "value": answer}]
    return ({"image": images} if images else {}) | {"conversations": turns}


def cauldron_to_conversation(raw: dict, place: str) -> dict:
    pairs = []
    for n, pair in enumerate(raw["texts"]):
        if not isinstance(pair, dict) or not isinstance(pair.get("assistant"), str):
            raise BadRecord(f"{place}: text {n} must have 'user' and 'assistant', got {str(pair)[:200]}")
        pairs.append(((pair.get("user") or "").strip(), pair["assistant"].strip()))
    images = raw["images"] or []
    if not isinstance(images, list):
        raise BadRecord(f"{place}: 'images' must be a list, got {str(images)[:40]}")
    return conversation([image for image in images if image is not None], pairs, place)


def question_to_conversation(raw: dict, place: str) -> dict:
    """A row of VLMEvalKit: its question with hint and options as LLaVA asks it, answered by the letter."""
    options = [f"{letter}. {raw[letter]}" for letter in OPTION_LETTERS if given(raw.get(letter))]
    lines = [str(raw["hint"])] if given(raw.get("hint")) else []
    lines += [str(raw["question"]), *options, *([LETTER_PROMPT] if options else [])]
    if not given(raw["answer"]):
        raise BadRecord(f"{place}: no answer", "empty answer")
    images = raw["image"] if isinstance(raw["image"], list) else tsv_pictures(raw["image"], place)
    return conversation(images, [("\n".join(lines), str(raw["answer"]))], place)


def given(cell: str | None) -> bool:
    """Whether a cell of a table says something: pandas writes "nan" where it has nothing."""
    return cell is not None and str(cell).strip().lower() not in ("", "nan", "none")


# ---------------------------------------------------------------------------------------------------------
# The conversion


def convert(path: Path, out: Path, cfg: ConvertConfig) -> int:
    """Exit code: 1 if more than 1 % of what this call converted is bad."""
    model.require_at_least(cfg, 1, "per_tar")
    table, bad, done = open_table(path), [], 0
    folder = Path(cfg.images) if cfg.images else (path if path.is_dir() else path.parent)
    check_same_conversion(table, out, cfg)
    for first in tqdm(range(0, len(table), cfg.per_tar), desc=str(path), unit=" tars"):
        file = out / f"{first // cfg.per_tar:05d}.tar"
        if file.is_file():
            continue
        temporary = file.with_name(file.name + ".tmp")
        numbers = range(first, min(first + cfg.per_tar, len(table)))
        with tarfile.open(temporary, "w") as tar:
            for i in numbers:
                try:
                    members = sample_members(f"{i:09d}", *table.raw(i), folder)
                except BadRecord as error:
                    bad.append(str(error))
                    continue
                for name, content in members:
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        os.replace(temporary, file)
        done += len(numbers)
    print(f"{len(table):,} records, {done:,} of them converted now to {out}, {len(bad):,} could not be used")
    print("\n".join(bad[:10]))
    return int(len(bad) > done / 100)


def check_same_conversion(table: data.Table, out: Path, cfg: ConvertConfig) -> None:
    """convert.json tells what a folder was made from; tars of two conversations must not mix."""
    files = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in table.files}
    identity = {"images": cfg.images, "per_tar": cfg.per_tar, "records": len(table), "files": files}
    if not (out / "convert.json").is_file():
        model.write_json(out / "convert.json", identity)
    elif model.read_json(out / "convert.json") != identity:
        raise UserError(f"{out} holds another conversion (convert.json): choose another folder")


def sample_members(key: str, raw: dict, place: str, folder: Path) -> list[tuple[str, bytes]]:
    """A record as members of a tar, (name, content). In its .json a number stands for each picture."""
    raw = training_form(raw, place)
    name = next((name for name in ("images", "image") if raw.get(name)), "")
    images = []
    if name:
        images = raw[name] if isinstance(raw[name], list) else [raw[name]]
        raw = {**raw, name: [None if image is None else n for n, image in enumerate(images)]}
    contents = [picture_content(image, folder, place) for image in images if image is not None]
    members = [(f"{key}.json", json.dumps(raw, ensure_ascii=False, default=str).encode(errors="replace"))]
    for n, content in enumerate(contents):
        members.append((f"{key}.{n}.{picture_suffix(content, place)}", content))
    return members


def picture_content(image, folder: Path, place: str) -> bytes:
    """The bytes of a path, of bytes, of a picture inside a tar, or of the hub's {"bytes", "path"}."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    (picture,) = data.local_pictures([image], folder, place)
    try:
        if isinstance(picture, bytes):
            return picture
        return picture.read_bytes() if isinstance(picture, Path) else picture.read()
    except OSError as error:
        raise BadRecord(f"{place}: {error}", "image missing") from None


def picture_suffix(content: bytes, place: str) -> str:
    with data.opened(content, place) as (picture, _):
        suffix = (picture.format or "").lower()
    suffix = {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2"}.get(suffix, suffix)
    if f".{suffix}" not in data.PICTURES:
        raise BadRecord(f"{place}: a picture of format {suffix} has no place in a tar", "image broken")
    return suffix


def main(argv: list[str]) -> None:
    paths, cfg = argv[:2], ConvertConfig()
    model.parse_cli(argv[2:] if argv and not argv[0].startswith("-") else argv, __doc__, cfg)
    if len(paths) < 2 or any(path.startswith("-") for path in paths):
        raise UserError("what to convert, and where to? python tools/convert.py IN OUT")
    raise SystemExit(convert(Path(paths[0]), Path(paths[1]), cfg))


if __name__ == "__main__":
    model.run_cli(main)
