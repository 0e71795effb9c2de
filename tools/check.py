"""What a run would make of a data set: what is broken, lengths, samples.

    python tools/check.py SPEC                          SPEC: what --data takes: a file, a mixture, scenes
    python tools/check.py SPEC --stage pretrain --preset cos-7b
    python tools/check.py SPEC --row_length 512 --limit 1000

Reads all records and pictures and tells of each source how many records are usable on all visual tokens, why
others are not (ten of each reason by name), what share of the tokens is learned and how long records are, and
shows some as the decoder sees them. Exit code 1: a run would skip more than 1 %.
"""

import dataclasses
import math
import os
import random
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import model
from data import BadRecord
from model import UserError


@dataclass
class CheckConfig:
    stage: str = "sft"  # the stage that is to train on it: pretrain or sft
    preset: str = "tiny"  # whose tokenizer, visual tokens and recipe
    resolution: str = ""  # as in training; so are these three, where 0 is what the recipe says
    row_length: int = 0  # positions of a row
    row_limit: int = 0  # positions of a record, with --batch_size
    row_images: int = 0  # most tiles of a row
    limit: int = 0  # look at this many records of each source; 0: at all
    samples: int = 3  # records that are shown
    workers: int = 0  # processes; 0: one a core


class Counts(NamedTuple):
    """Of one usable record."""

    pictures: int
    tokens: int  # of text
    learned: int
    cut: bool
    positions: int
    marks: bool  # "<image>" stands in it as text


class Chunks(Dataset):
    """Item c: for the c-th chunk of records of a plan's only source, an array (n, 6) of Counts and a list of
    (reason, message) for those that are skipped.
    """

    SIZE = 64

    def __init__(self, plan: data.Plan, records: int):
        self.plan, self.records = plan, records

    def __len__(self) -> int:
        return math.ceil(self.records / self.SIZE)

    def __getitem__(self, c: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
        counts, skipped = [], []
        for i in range(c * self.SIZE, min((c + 1) * self.SIZE, self.records)):
            try:
                counts.append(examine(self.plan, i, skipped))
            except BadRecord as error:
                skipped.append((error.why, str(error)))
        return np.array(counts, np.int64).reshape(-1, len(Counts._fields)), skipped


def examine(plan: data.Plan, i: int, skipped: list[tuple[str, str]]) -> Counts:
    """Counts of record i; raises BadRecord if it cannot be used."""
    source = plan.sources[0][0]
    record, samples = source[i], plan.read(source, i, "full", i, skipped)
    images = [image for sample in samples for image in sample.images]
    for image in images:
        if not isinstance(image, data.Scene):
            with data.opened(image, record.name) as (picture, _):
                picture.draft("RGB", (1, 1))  # of a JPEG only an eighth of its pixels a side
                picture.load()
    kept = [text for sample in samples for text in texts_of(sample.pieces)]
    tokens = sum(len(ids) for ids, _ in kept)
    uncut = sum(len(ids) for ids, _ in texts_of(data.pieces_of(record, plan.tokenizer)))
    return Counts(
        pictures=len(images),
        tokens=tokens,
        learned=sum(len(ids) for ids, supervised in kept if supervised),
        cut=tokens < uncut,
        positions=sum(sample.length for sample in samples),
        marks=has_marks(record),
    )


def texts_of(pieces: list[data.Piece]) -> list[tuple[list[int], bool]]:
    return [piece for piece in pieces if not isinstance(piece, int)]


def has_marks(record: data.Record) -> bool:
    """Whether a question has "<image>" as text, which often means that a picture was meant."""
    questions = [content for role, content in record.parts if role == "user"] if record.kind == "chat" else []
    return any("<image>" in item for content in questions for item in content if isinstance(item, str))


def check(spec: str, cfg: CheckConfig) -> int:
    """Prints what a run would make of --data SPEC. Exit code: 1 if it would skip more than 1 %."""
    if cfg.stage not in data.SCENES_MIX:
        raise UserError(f"--stage '{cfg.stage}': use pretrain or sft")
    model.require_at_least(cfg, 0, "row_length row_limit row_images limit samples workers")
    rows, model_cfg = planned_run(cfg)
    tokenizer, bad, records = data.find_tokenizer(model_cfg), 0, 0
    for source, _ in data.open_sources(spec, cfg.stage):
        plan = data.Plan([(source, 1.0)], tokenizer, model_cfg, rows, lambda number: "full", range(0))
        most = cfg.limit or (1000 if isinstance(source, data.Scenes) else len(source))
        chunks = Chunks(plan, min(most, len(source)))
        counts, reasons, messages = count_records(chunks, cfg, source.name)
        print(f"{source.name}: {chunks.records:,} records of kind {source.kind}, ", end="")
        print(f"at most {rows.sample_limit:,} positions each")
        print("\n".join("  " + line for line in report(chunks, counts, reasons, messages)))
        show_samples(plan, chunks.records, cfg.samples)
        bad, records = bad + chunks.records - len(counts), records + chunks.records
    if bad > records / 100:
        print(f"{bad:,} of {records:,} records would be skipped, more than 1 %")
        return 1
    return 0


def planned_run(cfg: CheckConfig) -> tuple[data.RowConfig, model.ModelConfig]:
    """Rows and model of the run: flags over the preset's recipe over defaults."""
    preset = model.preset(cfg.preset)
    recipe = preset[cfg.stage]
    rows = model.from_dict(data.RowConfig, {**dataclasses.asdict(data.RowConfig()), **recipe})
    for name in ("row_length", "row_limit", "row_images"):
        setattr(rows, name, getattr(cfg, name) or getattr(rows, name))
    model_cfg = model.copy_config(preset["model"])
    if cfg.stage == "sft" and "scale" in preset:
        model_cfg = model.scaled_config(model_cfg, preset["scale"])
    resolution = cfg.resolution or recipe.get("resolution", "")
    return rows, model.at_resolution(model_cfg, resolution).check()


def count_records(
    chunks: Chunks, cfg: CheckConfig, name: str
) -> tuple[np.ndarray, Counter, dict[str, list[str]]]:
    """Counts of the usable records (n, 6), how many were skipped by reason, and ten messages of each."""
    counts, reasons, messages = [], Counter(), defaultdict(list)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cfg.workers or cores, len(chunks))
    loader = DataLoader(
        chunks, None, num_workers=workers, multiprocessing_context="fork" if workers else None
    )
    with tqdm(total=chunks.records, desc=name, unit=" records", leave=False) as bar:
        for usable, skipped in loader:
            bar.update(min(Chunks.SIZE, chunks.records - bar.n))
            counts.append(usable)
            for reason, message in skipped:
                reasons[reason] += 1
                if reasons[reason] <= 10:
                    messages[reason].append(message)
    return np.concatenate(counts), reasons, messages


def report(chunks: Chunks, counts: np.ndarray, reasons: Counter, messages: dict[str, list[str]]) -> list[str]:
    usable, bad = len(counts), chunks.records - len(counts)
    lines = [f"usable   {usable:,}, skipped {bad:,} ({bad / chunks.records:.2%})"]
    for reason, n in reasons.most_common():
        lines.append(f"skipped  {n:,} {reason}")
        lines += [f"         {message}" for message in messages[reason]]
    if not usable:
        return lines
    pictures, tokens, learned, cut, positions, marks = counts.T
    lines.append(f"pictures {pictures.sum():,}, in {(pictures > 0).sum():,} records; others have none")
    if marks.any():
        lines.append(f"marks    {marks.sum():,} records have <image> as text, as no picture belongs to it")
    lines.append(f"cut      {cut.sum():,} records, longer than {chunks.plan.rows.sample_limit:,} positions")
    lines.append(f"learned  {learned.sum() / tokens.sum():.1%} of {tokens.sum():,} tokens of text")
    middle = np.median(positions)
    lines.append(f"length   {positions.min():,} to {positions.max():,} positions, median {middle:,.0f}")
    powers = np.bincount(np.log2(positions).astype(int))
    for power in np.flatnonzero(powers):
        bar = "█" * math.ceil(40 * powers[power] / powers.max())
        lines.append(f"         {f'{2**power:,}-{2 ** (power + 1) - 1:,}':>14} {bar} {powers[power]:,}")
    return lines


def show_samples(plan: data.Plan, records: int, samples: int) -> None:
    """Some records as the decoder sees them: what is learned is green, or in brackets without colours."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    on, off = ("\x1b[32m", "\x1b[0m") if colour else ("[[", "]]")
    shown = 0
    for i in random.Random(0).sample(range(records), records):
        if shown == samples:
            return
        try:
            first = plan.read(plan.sources[0][0], i, "full", i, [])[0]
        except BadRecord:
            continue
        text = as_text(first.pieces, plan.tokenizer, on, off)
        print(f"\n{first.name}, learned text {'is green' if colour else 'in [[ ]]'}:\n{text}\n")
        shown += 1


def as_text(pieces: list[data.Piece], tokenizer: data.Tokenizer, on: str, off: str) -> str:
    shown = ""
    for piece in pieces:
        if isinstance(piece, int):
            shown += "<picture>"
            continue
        ids, supervised = piece
        text = text_of(ids, tokenizer)  # without escape codes of the data
        text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
        shown += f"{on}{text}{off}" if supervised and text else text
    return shown


def text_of(ids: list[int], tokenizer: data.Tokenizer) -> str:
    """Text of ids as it stands in a document: with control tokens and with the tokenizer's prefix."""
    lead = tokenizer.encode("a")
    return tokenizer.decode(lead + ids, True).removeprefix(tokenizer.decode(lead, True))


def main(argv: list[str]) -> None:
    spec, cfg = argv[:1], CheckConfig()
    flags = argv if not spec or spec[0].startswith("-") else argv[1:]
    model.parse_cli(flags, __doc__, cfg)
    if flags is argv:
        raise UserError("what to check? python tools/check.py SPEC, where SPEC is what --data takes")
    raise SystemExit(check(spec[0], cfg))


if __name__ == "__main__":
    model.run_cli(main)
