"""The speedrun: seconds of training on two CPU cores to 90 % of scenes_vqa, as records that anyone can beat.

    python tools/speedrun.py --record tools/records/03-yours                     # make speedrun RECORD=...
    python tools/speedrun.py --record tools/records/03-yours --seeds 0 --against ""      # a first look
    python tools/speedrun.py --list true                                         # the table of all records

A record is a folder with record.json: "flags" of both stages over preset tiny, in full, and a "note"; where
flags are not enough also change.patch, which applies to the commit that the record names. This program runs
it and the record before it in turns on one machine, seed by seed, and writes what it measured into
record.json; what is finished in runs/speedrun is not run again.

Rules
    1. Counted are the seconds of both training loops, compiling and waiting for data included. Starting,
       checkpoints and evaluation are not.
    2. The median score of seeds 0-4 is at least 90, the blind score of each at most 34 (200 questions of each
       type, greedy, on all tokens).
    3. It is faster than the record before it: Welch's test over the seeds, one-sided, p < 0.05.
    4. The world, its questions and the shipped halves stay as they are; no weights are made by hand; nothing
       is learned from test scenes. Both methods stay in: few tokens, then more; fast and slow samples.
    5. A record that makes the code harder to read is refused.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model
from tools import bench

RECORDS = ROOT / "tools" / "records"
LEAST_SCORE, MOST_BLIND, LEVEL = 90, 34, 0.05


@dataclass
class SpeedrunConfig:
    record: str = ""  # folder of the record to measure
    against: str = "last"  # folder of the record to beat; last: the one before it by name; "": none
    seeds: str = "0,1,2,3,4"  # a comma list
    out: str = "runs/speedrun"  # folder of all runs
    list: bool = False  # print the table of records and do nothing


def run_once(record: Path, seed: int, out: Path) -> dict:
    """Train and score one seed, or read what is there: seconds, score and blind score."""
    flags, folder = model.read_json(record / "record.json")["flags"], out / f"{record.name}-seed{seed}"
    stages = {
        "pretrain": ["train_pretrain.py", "--preset", "tiny", *flags["pretrain"].split()],
        "sft": ["train_sft.py", "--init", str(folder / "pretrain"), *flags["sft"].split()],
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    for stage, command in stages.items():
        run = ["--data", "scenes", "--device", "cpu", "--resume", "auto", "--out", str(folder / stage)]
        call = [sys.executable, *command, *run, "--seed", str(seed)]
        subprocess.run(call, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    result = folder / "eval.json"
    if not result.is_file():
        call = [sys.executable, "eval.py", "--model", str(folder / "sft"), "--tasks", "scenes_vqa"]
        call += ["--seed", str(seed), "--out", str(result)]
        subprocess.run(call, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    row, seconds = model.read_json(result)["results"][0], {}
    for stage in stages:
        lines = (folder / stage / "metrics.jsonl").read_text("utf-8").splitlines()
        seconds[stage] = round(sum(json.loads(line).get("seconds", 0) for line in lines), 1)
    facts = {"seed": seed, "seconds": round(sum(seconds.values()), 1), "by_stage": seconds}
    return {**facts, "score": row["score"], "blind": row["blind_score"]}


def welch(faster: list[float], slower: list[float]) -> float:
    """p of Welch's one-sided test that the mean of `faster` is below that of `slower`, variances unequal."""
    shares = [statistics.variance(values) / len(values) for values in (faster, slower)]
    t = (statistics.mean(slower) - statistics.mean(faster)) / math.sqrt(sum(shares))
    freedom = sum(shares) ** 2
    freedom /= sum(share**2 / (len(v) - 1) for share, v in zip(shares, (faster, slower)))
    return student_tail(t, freedom)


def student_tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's distribution. With T = sqrt(freedom) tan(angle) the density of the angle is
    proportional to cos(angle)^(freedom - 1), a sum over a fine grid.
    """
    grid = ((np.arange(200_000) + 0.5) / 200_000 - 0.5) * math.pi
    density = np.cos(grid) ** (freedom - 1)
    return float(density[grid > math.atan(t / math.sqrt(freedom))].sum() / density.sum())


def judge(rows: list[dict], before: list[dict] | None) -> list[str]:
    """Why these runs are no record; nothing if they are one."""
    reasons, score = [], statistics.median(row["score"] for row in rows)
    if score < LEAST_SCORE:
        reasons.append(f"median score {score:.1f} is below {LEAST_SCORE}")
    blind = max(row["blind"] for row in rows)
    if blind > MOST_BLIND:
        reasons.append(f"blind score {blind:.1f} is above {MOST_BLIND}")
    if sorted(row["seed"] for row in rows) != [0, 1, 2, 3, 4]:
        reasons.append("seeds 0-4 were not all run")
    if before is not None and len(rows) > 1 and len(before) > 1:
        p = welch([row["seconds"] for row in rows], [row["seconds"] for row in before])
        if p >= LEVEL:
            reasons.append(f"not faster than the record before it: p {p:.3f}")
    return reasons


def show_records() -> None:
    print(f"{'record':<24}{'seconds':>9}{'score':>8}{'blind':>8}{'seeds':>7}  note")
    for file in sorted(RECORDS.glob("*/record.json")):
        record = model.read_json(file)
        rows, line = record.get("results", []), file.parent.name.ljust(24)
        for key, width in (("seconds", 9), ("score", 8), ("blind", 8)):
            middle = f"{statistics.median(row[key] for row in rows):.1f}" if rows else "-"
            line += middle.rjust(width)
        print(f"{line}{len(rows):>7}  {record['note']}")


def main(argv: list[str]) -> None:
    cfg = SpeedrunConfig()
    model.parse_cli(argv, __doc__, cfg)
    if cfg.list:
        return show_records()
    record = Path(cfg.record)
    model.require(
        bool(cfg.record), "--record is missing: a folder with record.json, such as tools/records/03-x"
    )
    before = Path(cfg.against) if cfg.against not in ("", "last") else None
    if cfg.against == "last":
        folders = sorted(file.parent for file in RECORDS.glob("*/record.json"))
        before = ([None] + [folder for folder in folders if folder.name < record.name])[-1]
    runs = {folder: [] for folder in (before, record) if folder}
    seeds = [int(seed) for seed in cfg.seeds.split(",")]
    for seed in tqdm(seeds, "seeds", dynamic_ncols=True):
        for folder, rows in runs.items():
            rows.append(run_once(folder, seed, Path(cfg.out)))
            tqdm.write(f"{folder.name}: {rows[-1]}")
    machine = {"cpu": bench.cpu_name(), "capability": torch.backends.cpu.get_cpu_capability(), "threads": 2}
    machine |= {"commit": bench.commit(), "torch": torch.__version__}
    values = model.read_json(record / "record.json")
    measured = {"results": runs[record], "machine": machine}
    if before:
        measured["before"] = {"record": before.name, "results": runs[before]}
    model.write_json(record / "record.json", {**values, **measured})
    reasons = judge(runs[record], runs.get(before))
    print(
        f"{record.name} is a record" if not reasons else f"{record.name} is no record: {'; '.join(reasons)}"
    )


if __name__ == "__main__":
    model.run_cli(main)
