"""The science table: small runs of both stages on Scenes, one a cell, compared question by question.

    make claims                                           all of CELLS once, in their order
    python tools/claims.py --list                         names, flags, what each is expected to take
    python tools/claims.py --only cos.chain --seeds 0,1   the cells of that prefix, with two seeds
    python tools/claims.py --minutes 20                   starts no cell after that; call again to go on

Writes OUT.json (a row a cell), OUT/<config hash>.npz (right or wrong, question by question) and the
checkpoints under OUT; equal flags of stage 1 share one. A finished cell is skipped, an unfinished one goes on
at its last checkpoint, a failing one does not stop the others. Finished means: with the same flags, seed,
scripts and halves; --reuse also takes what other scripts made (* behind the commit).

128 px, so 16x16 patches, in both stages; 32 tokens become 336; equal samples everywhere. score: exact match
on scenes_vqa; blind: the same questions about other pictures; ref: scenes_ref (greedy, IoU 0.5). Seconds are
those of the training loops with their checkpoints, one cell after the other: for a fair ratio see `make
bench`. The error of a difference is over questions, those about one picture taken together: it tells whether
these two models differ. Whether their recipes do, only seeds tell; with several the larger of both decides.
"""

import collections
import hashlib
import json
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import eval as evaluation
import model
import prune
import train_pretrain
import train_sft


class Cell(NamedTuple):
    name: str
    stage1: str | None  # flags of train_pretrain.py; None: fine-tuned from the halves
    stage2: str | None  # flags of train_sft.py; None: stage 1 alone
    ms: tuple[float, float]  # a sample of stage 1 and of stage 2, about, on two quiet cores
    steps2: int = 0  # of stage 2, if not those of --steps2
    pruned: bool = False  # also scored on pruned tokens
    mix: str = ""  # shares of captions, documents and text in stage 1, whose model is examined in few shots


FEW = "--vit.image_size 128 --connector.plan 32"  # windows of 16 and 4 patches
MANY = "--vit.image_size 128 --connector.windows 16,8,1 --connector.queries 16,16,1"  # what GROW comes to
PLAIN = "--vit.image_size 128 --connector.kind resampler --connector.tokens"
FULL = "--slow_share 1 --distill_weight 0"  # stage 2 on all tokens, without a teacher
GROW = f"{FULL} --scale 1:0x1,0x2,1x4"  # 32 -> 16 + 64 + 256 at the same resolution
BASE = "cos.chain.32-336"
CELLS = [
    Cell("cos.linear.256-256", "--vit.image_size 128 --connector.kind linear", FULL, (27, 23)),
    Cell("cos.resampler.32-32", f"{PLAIN} 32", FULL, (10, 7)),  # it has no windows, so it cannot grow
    Cell("cos.resampler.336-336", f"{PLAIN} 336", FULL, (37, 31)),
    Cell(BASE, FEW, GROW, (10, 32)),
    Cell("cos.chain.336-336", MANY, FULL, (39, 32)),
    Cell("cos.chain.32-32", FEW, FULL, (10, 7)),  # what growing is worth
    Cell("cos.chain.0-336", None, f"{MANY} {FULL}", (0, 32)),  # no stage 1: fewer samples
    Cell("cos.reverse.32-336", f"{FEW} --connector.reverse true", GROW, (10, 32)),  # fine to coarse
    Cell("cos.queries.32-336", FEW, f"{GROW} --scale_init queries", (10, 32)),  # new queries at random
    Cell("cos.random.32-336", FEW, f"{GROW} --scale_init random", (10, 32)),  # new scales at random
    Cell("cos.onelevel.32-336", f"{FEW} --connector.levels 4", GROW, (10, 28)),
    Cell("cos.lasttwice.32-336", f"{FEW} --connector.levels 4,4", GROW, (10, 32)),  # as deep as two levels
    Cell("cos.at64px.32-336", "--connector.plan 32", f"{FULL} --scale 32to336", (8, 32)),  # 8x8 patches first
]
# MM1's data mix: stage 1 alone, in packed rows that hold eight demonstrations of 32 tokens.
ROWS = "--batch_size 0 --rows 5 --row_length 640 --steps 300"
MIXES = ("100-0-0", "50-50-0", "0-100-0", "45-45-10", "50-0-50")
CELLS += [Cell(f"mix.{mix}", ROWS, None, (0, 0), mix=mix) for mix in MIXES]
# MM1's connectors: tokens x resolution x type, stage 1 alone.
POOLS = {"avg": "avgpool", "attn": "attnpool", "cabs": "cabstractor"}
CELLS += [
    Cell(f"pool.{name}.{size}px.{tokens}", f"--vit.image_size {size} --connector.kind {kind} "
         f"--connector.levels 4 --connector.tokens {tokens}", None, (size // 8 + tokens // 16, 0))
    for size in (64, 128) for tokens in (16, 64) for name, kind in POOLS.items()
]  # fmt: skip
# DualSpeed: fine-tuned fast on 26 of 256 tokens a picture. One stage 1 for all, on 256; for those of duo.fast
# the paper's, on 26.
LINEAR, LONG = "--vit.image_size 128 --connector.kind linear", {"steps2": 150, "pruned": True}
LADDER = {
    "full": f"{FULL} --prune.isolator 0",  # pruned after training, never in it
    "naive": "--slow_share 0 --prune.isolator 0",
    "switch": "--prune.isolator 0 --distill_weight 0",
    "isolator": "--distill_weight 0",
    "distill": "",  # all of it
}
DUO = LADDER | {
    "batch": "--mode batch",  # as the paper draws
    "batch.long": "--mode batch",  # about as long as "distill" takes, by the bench
    "full.short": f"{FULL} --prune.isolator 0",  # the same
    **{f"prune.{n}": f"--prune.name {n}" for n in prune.PRUNERS if n not in ("divprune", "coarse")},
    **{f"keep.{keep}": f"--prune.keep 0.{keep}" for keep in ("50", "25", "05")},
    **{f"slow.{share}": f"--slow_share 0.{share}" for share in ("05", "20")},
}  # fmt: skip
CELLS += [
    Cell(f"duo.{name}", LINEAR, f"--prune.keep 0.1 {flags}", (27, 25 if "full" in name else 15), **LONG)
    for name, flags in DUO.items()
]
STEPS = {"duo.full.short": 95, "duo.batch.long": 165}
CELLS = [cell._replace(steps2=STEPS.get(cell.name, cell.steps2)) for cell in CELLS]
FAST = f"{LINEAR} --pruner divprune --prune.keep 0.1"
CELLS += [Cell("duo.stage1", LINEAR, None, (27, 0))]  # what the cells above start from
CELLS += [
    Cell("duo.fast.naive", f"{FAST} --prune.isolator 0", LADDER["naive"], (12, 15), **LONG),
    *(Cell(f"duo.fast.{name}", FAST, LADDER[name], (12, 15), **LONG) for name in ("isolator", "distill")),
]
GROWN = "--scale 1:0x1,0x2,1x4 --prune.keep 80 --prune.name"  # of 336: the first two scales, or as many
CELLS += [Cell("duo.chain.full", FEW, f"{GROW} --prune.isolator 0 --prune.keep 80", (10, 32), **LONG)]
CELLS += [
    Cell(f"duo.chain.{name}", FEW, f"{GROWN} {name}", (10, 20), **LONG)
    for name in ("coarse", "divprune", "random")
]
TRAIN = {"stage1": train_pretrain.main, "stage2": train_sft.main}  # the command lines, in this process
COMPARE = [(BASE, cell.name) for cell in CELLS if cell.name.startswith("cos.") and cell.name != BASE]
COMPARE += [("mix.45-45-10", f"mix.{mix}") for mix in MIXES if mix != "45-45-10"]
COMPARE += [
    (f"pool.{name}.128px.64", f"pool.{name}.{other}") for name in POOLS for other in ("128px.16", "64px.64")
]
COMPARE += [("pool.avg.128px.64", f"pool.{name}.128px.64") for name in ("attn", "cabs")]
COMPARE += [("duo.full", f"duo.{name}") for name in [*DUO, "stage1", "fast.naive", "fast.distill"][1:]]
COMPARE += [(f"duo.{b}", f"duo.{a}") for a, b in list(zip(LADDER, [*LADDER][1:]))[1:]]
COMPARE += [("duo.fast.isolator", "duo.fast.naive"), ("duo.fast.distill", "duo.fast.isolator")]
COMPARE += [("duo.distill", name) for name in [cell.name for cell in CELLS if "duo.prune." in cell.name]]
COMPARE += [("duo.distill", f"duo.{name}") for name in ("full.short", "batch", "batch.long")]
COMPARE += [("duo.chain.full", f"duo.chain.{n}") for n in ("coarse", "divprune", "random")]
COMPARE += [("duo.chain.coarse", f"duo.chain.{n}") for n in ("divprune", "random")]
COMPARE += [("cos.chain.336-336", "cos.resampler.336-336"), ("cos.chain.32-32", "cos.resampler.32-32")]


@dataclass
class ClaimsConfig:
    out: str = "runs/claims"  # folder of checkpoints and answers; the table is beside it, OUT.json
    only: str = ""  # names of cells begin so
    seeds: list[int] = field(default_factory=lambda: [0])  # of both stages; the questions stay the same
    list: bool = False  # show the cells, run nothing
    minutes: float = 0.0  # start no cell after that; 0: no limit
    reuse: bool = False  # results that other scripts made count, too
    steps1: int = 350  # optimizer steps of stage 1
    steps2: int = 50  # and of stage 2
    batch_size: int = 16
    n: int = 800  # questions of each of the five types of scenes_vqa
    ref: int = 400  # questions of scenes_ref; 0: none
    shots_n: int = 100  # few-shot questions of each type of scenes_vqa and captions; of scenes_bind 5 x that


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


# What a result depends on besides its flags: the six scripts and the shipped halves.
SCRIPTS = [ROOT / f"{name}.py" for name in "model data prune train_pretrain train_sft eval".split()]
HALVES = sorted([*model.ASSETS.glob("tiny_*/*"), model.ASSETS / "scenes.tiktoken"])
CODE = digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in SCRIPTS + HALVES])


# ---------------------------------------------------------------------------------------------------------
# Training


# Of each stage: all cells are trained with these, whatever the preset of the demo comes to use.
RATES = "--lr 0.002 --muon_lr 0.01 --weight_decay 0", "--lr 0.001 --muon_lr 0.005 --weight_decay 0"


def stage_flags(cell: Cell, seed: int, cfg: ClaimsConfig) -> list[list[str] | None]:
    """The flags of both stages, but for --init, --out and --resume."""
    common = f"--seed {seed} --batch_size {cfg.batch_size} --log_every 10 --save_every 50"
    source, flags = f"{cfg.out}/mix-{cell.mix}.json" if cell.mix else "scenes", []
    stages = (cell.stage1, cfg.steps1), (cell.stage2, cell.steps2 or cfg.steps2)
    for (stage, steps), rates in zip(stages, RATES):
        words = f"--data {source} {common} --steps {steps} {rates} {stage}"
        flags.append(None if stage is None else words.split())
    return flags


def write_mix(cell: Cell, cfg: ClaimsConfig) -> None:
    shares = zip(("caption", "interleaved", "text"), map(int, cell.mix.split("-")))
    entries = [{"kind": kind, "path": "scenes", "weight": share} for kind, share in shares if share]
    model.write_json(Path(f"{cfg.out}/mix-{cell.mix}.json"), entries)


def config_hash(cell: Cell, seed: int, cfg: ClaimsConfig) -> str:
    questions = [cfg.shots_n] if cell.mix else [cfg.n, cfg.ref]
    return digest([stage_flags(cell, seed, cfg), *questions])


def run_stage(stage: str, argv: list[str], init: Path | None, out: Path) -> tuple[Path, dict]:
    """Train a stage unless it is done. Its folder is named by all it depends on, the stage before included.

    Also returns what its log says: seconds, with those before an interruption, and visual tokens.
    """
    folder = out / f"{stage}-{digest([argv, init and init.name, CODE])}"
    if not (folder / "done.json").is_file():
        start = ["--init", str(init)] if init else []
        TRAIN[stage]([*argv, *start, "--out", str(folder), "--resume", "auto"])
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        timed = [line for line in lines if "seconds" in line]
        seconds = sum(line["seconds"] for line in timed)
        facts = {"seconds": round(seconds, 1), "visual_tokens": timed[-1]["visual_tokens"]}
        model.write_json(folder / "done.json", facts)
    return folder, model.read_json(folder / "done.json")


def run_cell(cell: Cell, seed: int, cfg: ClaimsConfig) -> dict:
    """Both stages and the questions: the row of the table. The answers are written to a file."""
    out, facts, run = Path(cfg.out), {}, None
    if cell.mix:
        write_mix(cell, cfg)
    for stage, argv in zip(("stage1", "stage2"), stage_flags(cell, seed, cfg)):
        if argv:
            run, facts[stage] = run_stage(stage, argv, run, out)
    name, began = config_hash(cell, seed, cfg), time.perf_counter()
    answers = examine_shots(run, cfg) if cell.mix else examine(run, cfg, cell.pruned)
    seconds = {stage: values["seconds"] for stage, values in facts.items()}
    seconds["eval"] = round(time.perf_counter() - began, 1)
    np.savez_compressed(out / f"{name}.npz", **answers)
    score, error = mean_and_error(100 * answers["right"], answers["picture"])

    def percent(key: str) -> float | None:
        values = answers.get(key, np.zeros(0))
        return round(100 * float(values.mean()), 2) if values.size else None

    return {
        "cell": cell.name, "config_hash": name, "code_hash": CODE, "commit": evaluation.git_commit(),
        "seed": seed, "score": round(score, 2), "stderr": round(error, 2), "blind_score": percent("blind"),
        "n": len(answers["right"]), "ref": percent("ref"), "pruned": percent("pruned"),
        "shots": {key: percent(key) for key in SHOTS if key in answers}, "seconds": seconds,
        "visual_tokens": {stage: values["visual_tokens"] for stage, values in facts.items()},
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# Scoring. Greedy decoding gives exactly the right answer, and stops, if and only if the likeliest token after
# the question and the right answer so far is the next one, at every place of the answer and at its end: one
# forward pass instead of a generation. (eval.py forgives more: "two" for 2.) All questions asked about a
# picture lie behind it in one row, each seeing the picture and itself only: it is encoded and read once.

PICTURE = -2  # in place of a question's number: the start of a row, which all its questions see


def exam(n: int, size: int, resample: int) -> tuple:
    """Questions, different pictures, and the number of each question's picture and of a swapped one."""
    questions = evaluation.scenes_task("scenes_vqa", n, 0).questions
    images = [question.images for question in questions]
    number = {image: i for i, (image,) in enumerate(dict.fromkeys(images))}
    cfg = model.ModelConfig(model.ImageConfig(resample=resample), model.ViTConfig(image_size=size))
    pixels = torch.from_numpy(data.load_images([*number], cfg))
    shown = [number[image] for (image,) in images]
    swapped = [number[image] for (image,) in evaluation.derange(images, 0)]
    return questions, pixels, shown, swapped


@torch.no_grad()
def right_answers(
    vlm, tokenizer, questions, pixels, pictures: list[int], batch: int = 16, view: str = "full"
) -> np.ndarray:
    """Whether question i, asked about picture pictures[i], gets exactly its answer: bool (questions,)"""
    columns, prompts, members = [], [], collections.defaultdict(list)
    reads_text = view == "pruned" and "text" in prune.PRUNERS[vlm.cfg.prune.name].needs
    for i, (question, picture) in enumerate(zip(questions, pictures)):
        pieces = data.prompt_pieces(question.text, 1, tokenizer)
        prompts.append(data.Sample([*pieces], pixels[picture][None].numpy()))
        pieces.append(([*tokenizer.encode(question.answers[0]), tokenizer.end], True))
        laid = data.lay_out(pieces, [np.arange(vlm.cfg.visual_tokens(view))])
        T = len(laid.ids)
        arrays = [np.full(T, i), laid.ids, laid.bank_rows, laid.targets, np.arange(T)]
        columns.append(torch.from_numpy(np.stack(arrays, 1)))  # (T, 5)
        members[-i if reads_text else picture].append(i)  # a question in a row, or all about a picture
    head = int((columns[0][:, 2] >= 0).nonzero()[-1]) + 1  # the end of the picture: so far all are equal
    rows = []
    for numbers in members.values():
        start = columns[numbers[0]][:head].clone()
        start[:, 0] = PICTURE
        rows.append((prompts[numbers[0]], torch.cat([start, *(columns[i][head:] for i in numbers)])))
    rows.sort(key=lambda row: len(row[1]))
    right = np.ones(len(questions), bool)
    for first in range(0, len(rows), batch):
        row_prompts, row_columns = zip(*rows[first : first + batch])
        padded = pad_sequence(row_columns, True, -1)  # (B, T, 5)
        owner, ids, bank_rows, targets, positions = padded.unbind(-1)  # each (B, T)
        bank = vlm.bank(data.prompt_batch(row_prompts, view, vlm.cfg))  # (B*V, D)
        slots = (bank_rows >= 0).flatten().nonzero()[:, 0]
        rest = torch.arange(len(bank)), None, None, None, 0  # what splice does not read
        x = vlm.splice(data.Rows(ids.clamp(0), positions, owner, slots, *rest), bank)
        mask = ((owner[:, :, None] == owner[:, None]) | (owner[:, None] == PICTURE)).tril()  # (B, T, T)
        hidden = vlm.decoder.hidden(x, positions, mask[:, None])[0][targets >= 0]  # (R, D)
        wrong = vlm.decoder.head(hidden).argmax(-1) != targets[targets >= 0]
        right[owner[targets >= 0][wrong].numpy()] = False
    return right


def load_run(run: Path) -> tuple[model.VLM, data.Tokenizer]:
    step = model.find_step(run)
    return model.VLM.from_pretrained(step).eval(), data.Tokenizer.from_pretrained(step / "tokenizer")


def greedy_scores(vlm, tokenizer, task: evaluation.Task, images: list[tuple]) -> np.ndarray:
    """The score of each question, answered greedily about these pictures."""
    answers = evaluation.answer_all(vlm, tokenizer, task, images, "full", evaluation.EvalConfig())
    return np.array(evaluation.score_answers(task, answers))


def examine(run: Path, cfg: ClaimsConfig, pruned: bool) -> dict[str, np.ndarray]:
    """right, blind and picture of every question of scenes_vqa; ref: hits of scenes_ref, decoded greedily;
    pruned: right on pruned tokens behind the isolator.
    """
    vlm, tokenizer = load_run(run)
    questions, pixels, shown, swapped = exam(cfg.n, vlm.cfg.vit.image_size, vlm.cfg.image.resample)
    both = right_answers(vlm, tokenizer, questions * 2, pixels, shown + swapped)
    task = evaluation.scenes_task("scenes_ref", cfg.ref, 0)
    answers = {"right": both[: len(shown)], "blind": both[len(shown) :], "picture": np.array(shown)}
    answers["ref"] = greedy_scores(vlm, tokenizer, task, [question.images for question in task.questions])
    if pruned:
        answers["pruned"] = right_answers(vlm, tokenizer, questions, pixels, shown, view="pruned")
    return answers


SHOTS = ("vqa 0", "vqa 4", "vqa 8", "caption 0", "caption 4", "caption 8", "bind 0", "bind 8", "text nll")


def examine_shots(run: Path, cfg: ClaimsConfig) -> dict[str, np.ndarray]:
    """Few-shot answers in MM1's templates, generated; right and blind are those of scenes_vqa at 8 shots."""
    vlm, tokenizer = load_run(run)
    answers = {"ref": np.zeros(0)}
    for key in SHOTS[:-1]:
        name, shots = key.split()
        name, n = {"caption": "cap"}.get(name, name), cfg.shots_n * (5 if name == "bind" else 1)
        task = evaluation.scenes_task(f"scenes_{name}", n, 0, int(shots))
        images = [question.images for question in task.questions]
        answers[key] = greedy_scores(vlm, tokenizer, task, images)
        if key == "vqa 8":
            answers["right"], answers["picture"] = answers[key], np.arange(len(images))
            answers["blind"] = greedy_scores(vlm, tokenizer, task, evaluation.derange(images, 0))
    task = evaluation.scenes_task("scenes_words", 500, 0)
    words = evaluation.score_text(vlm, tokenizer, task, evaluation.EvalConfig())
    return answers | {"text nll": np.array([words["score"] / 100])}


def mean_and_error(values: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error where values of a group (a picture's questions) hang together."""
    _, member = np.unique(groups, return_inverse=True)
    sums = np.bincount(member, values - values.mean())
    square = len(sums) / max(1, len(sums) - 1) * (sums**2).sum()
    return float(values.mean()), float(np.sqrt(square)) / len(values)


def difference(a: list[dict], b: list[dict], key: str = "right") -> tuple[float, float, float]:
    """Mean of a - b in points, its error over questions, and over seeds (0 for one); an entry a seed."""
    points = np.array([100.0 * x[key] - 100.0 * y[key] for x, y in zip(a, b)])  # (seeds, n)
    mean, error = mean_and_error(points.mean(0), a[0]["picture"])
    return mean, error, points.mean(1).std(ddof=1) / len(points) ** 0.5 if len(points) > 1 else 0.0


# ---------------------------------------------------------------------------------------------------------
# The table


def read_rows(cfg: ClaimsConfig, old_code: bool) -> dict[str, dict]:
    """Config hash -> row; old_code: also those that other scripts made."""
    table = Path(cfg.out).with_suffix(".json")
    rows = model.read_json(table)["rows"] if table.is_file() else []
    return {row["config_hash"]: row for row in rows if old_code or row["code_hash"] == CODE}


def print_table(cells: list[Cell], cfg: ClaimsConfig) -> None:
    saved, rows = read_rows(cfg, cfg.reuse), {}
    for cell in cells:
        for seed in cfg.seeds:
            rows[cell.name, seed] = saved.get(config_hash(cell, seed, cfg))
    print_rows([row for row in rows.values() if row])
    print(f"\n{'a':<24}{'b':<24}  a - b     ±  ± seeds  on pruned tokens")
    for pair in COMPARE:
        seeds = [seed for seed in cfg.seeds if all(rows.get((name, seed)) for name in pair)]
        if seeds:
            a, b = (
                [np.load(f"{cfg.out}/{rows[name, s]['config_hash']}.npz") for s in seeds] for name in pair
            )
            line = f"{pair[0]:<24}{pair[1]:<24}"
            for key in ("right", "pruned") if all("pruned" in answers for answers in a + b) else ("right",):
                mean, error, spread = difference(a, b, key)
                remark = "below resolution" if abs(mean) <= 2 * max(error, spread) else ""
                line += f"{mean:>+7.1f}{error:>6.1f}{spread or float('nan'):>9.1f}  {remark:<18}"
            print(line)


def print_rows(rows: list[dict]) -> None:
    """Scores, tokens and seconds of each cell and seed; then the few-shot scores, where there are any."""
    head = f"\n{'cell':<24}seed   score     ±  blind pruned    ref    tokens  stage 1 s  stage 2 s  eval s"
    print(f"{head}  commit")
    for row in rows:
        tokens, seconds = ">".join(map(str, row["visual_tokens"].values())), row["seconds"]
        line = f"{row['cell']:<24}{row['seed']:>4}{row['score']:>8.1f}{row['stderr']:>6.1f}"
        line += f"{row['blind_score']:>7.1f}{row.get('pruned') or 0:>7.1f}{row['ref'] or 0:>7.1f}{tokens:>10}"
        line += f"{seconds.get('stage1', 0):>11.1f}{seconds.get('stage2', 0):>11.1f}{seconds['eval']:>8.1f}"
        print(f"{line}  {row['commit']}" + ("*" if row["code_hash"] != CODE else ""))
    few_shot = [row for row in rows if row.get("shots")]
    if few_shot:
        print("\n" + "cell".ljust(24) + "seed" + "".join(key.rjust(11) for key in SHOTS))
    for row in few_shot:
        print(f"{row['cell']:<24}{row['seed']:>4}" + "".join(f"{row['shots'][key]:>11.2f}" for key in SHOTS))


def list_cells(cells: list[Cell], cfg: ClaimsConfig) -> list[tuple[Cell, int, float]]:
    """Cells still to run, with their seed and the seconds expected; --list prints all."""
    done, todo, trained = read_rows(cfg, cfg.reuse), [], set()
    for seed in cfg.seeds:
        for cell in cells:
            ms = cell.ms[1] * (cell.steps2 or cfg.steps2)
            if (seed, cell.stage1) not in trained:  # else it is shared
                ms += cell.ms[0] * cfg.steps1
            trained.add((seed, cell.stage1))
            seconds = 120 if cell.mix else ms * cfg.batch_size / 1000 + 25  # for the start and the questions
            is_done = config_hash(cell, seed, cfg) in done
            if not is_done:
                todo.append((cell, seed, seconds))
            if cfg.list:
                state = "done" if is_done else f"about {seconds:.0f} s"
                stages = " | ".join(filter(None, (cell.stage1, cell.stage2 or "no stage 2", cell.mix)))
                print(f"{cell.name:<24}{seed:>3}  {state:<12}{stages}")
    return todo


def main(argv: list[str]) -> None:
    cfg = ClaimsConfig()
    model.parse_cli(argv, __doc__, cfg)
    cells = [cell for cell in CELLS if cell.name.startswith(cfg.only)]
    model.require(cells, f"--only '{cfg.only}': no cell begins so; see --list")
    todo, failed = list_cells(cells, cfg), []
    total = sum(seconds for _, _, seconds in todo) / 60
    print(f"{len(todo)} cells to run, about {total:.0f} minutes on two quiet cores", flush=True)
    if cfg.list:
        return
    began = time.perf_counter()
    for cell, seed, seconds in todo:
        if cfg.minutes and time.perf_counter() - began > 60 * cfg.minutes:
            print(f"--minutes {cfg.minutes:g} are over: call again to go on")
            break
        print(f"{cell.name}, seed {seed}: about {seconds:.0f} s", flush=True)
        try:
            row = run_cell(cell, seed, cfg)
            rows = {**read_rows(cfg, old_code=True), row["config_hash"]: row}
            model.write_json(Path(cfg.out).with_suffix(".json"), {"rows": [*rows.values()]})
        except Exception:  # whatever it is, the other cells are not to be lost
            traceback.print_exc()
            failed.append(f"{cell.name} seed {seed}")
    print_table(cells, cfg)
    model.require(not failed, f"failed, while the others are done: {', '.join(failed)}")


if __name__ == "__main__":
    model.run_cli(main)
