"""Evaluation: tasks, prompts, scorers, the blind control, chat, and report.html.

    python eval.py --model runs/a/sft --tasks scenes --out runs/a/eval.json --report runs/a/report.html
    python eval.py --model runs/a/sft --tasks choice:my/questions.jsonl,caption:my/captions.jsonl
    python eval.py --model runs/a/sft --chat image.png
    python eval.py --model runs/a/pretrain --tasks scenes_bind,scenes_cap --shots 0,4,8    # MM1's protocol
    python eval.py --model runs/a/pretrain --tasks vqa:my/val.jsonl --shots 4 --demos my/train.jsonl
    python eval.py --model runs/a/sft --tasks pope,mme --root playground/data/eval --out runs/a/eval.json
    torchrun --nproc_per_node=8 eval.py --model runs/a/sft --tasks mmstar:MMStar.tsv,mmmu:MMMU --out eval.json
    python eval.py --answers runs/a/eval_answers --tasks pope    # scores answers that are there, no model

Benchmarks (the names in BENCHMARKS) are read from LLaVA's folders, from a .tsv of VLMEvalKit or from parquet
files of the hub. Answers of files are kept in LLaVA's format beside --out; a run that was killed goes on.

A task is scored twice: as it is, and with the images swapped (a seeded derangement): what a model scores
blind it did not see. Scores are 0-100 (CIDEr-D x 100), with n and the standard error beside them; that of
text is a loss. Without --shots a question comes in the chat template; with it, at 0 shots too, in that of a
base model, behind demonstrations of the train split whose pictures are never swapped.
"""

import model  # first of all: it answers --help before torch is loaded

# isort: split

import ast
import base64
import collections
import glob
import hashlib
import html
import io
import itertools
import json
import math
import os
import random
import re
import string
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
import prune
from model import UserError

BITS = {2: torch.int16, 4: torch.int32}


@dataclass
class EvalConfig:
    model: str = ""  # run or checkpoint folder
    tasks: str = "scenes"  # comma list of scenes (most), scenes_vqa, ..., pope or pope:PATH, ..., kind:FILE
    shots: str = ""  # demonstrations, in MM1's templates of a base model: 0, 4 or 0,4,8; "": chat template
    demos: str = ""  # train split of a task of files: what its demonstrations are drawn from
    scoring: str = "generate"  # or likelihood: the likeliest of the possible answers, where these are known
    images: str = ""  # folder of the images of tasks of files; default: the file's own
    tokens: str = "full"  # visual tokens at inference: full, pruned, or both
    root: str = "playground/data/eval"  # where benchmarks without a path have their folders, as LLaVA's do
    limit: int = 0  # above 0: of each task of files only so many questions, drawn by the seed
    out: str = ""  # eval.json to write
    answers: str = ""  # folder to keep answers in and to go on from; default: beside --out (but for Scenes)
    report: str = ""  # report.html to write
    blind: bool = True  # ask everything twice, the second time about other pictures
    chat: str = ""  # a picture to ask about in the terminal, instead of tasks
    n: int = 200  # questions of each Scenes task and of each type of scenes_vqa
    seed: int = 0  # of the questions, the demonstrations, and the swapped images of the blind score
    batch_size: int = 64  # questions answered at once
    temperature: float = 0.0  # of --chat; tasks are always greedy
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # of the whole model: float32 or bfloat16; auto: bfloat16 on cuda


def main(argv: list[str]) -> None:
    cfg = EvalConfig()
    model.parse_cli(argv, __doc__, cfg)
    if not cfg.model and (not cfg.answers or cfg.chat or cfg.report):
        raise UserError("--model is missing: a run or checkpoint folder, such as runs/a/sft")
    if cfg.tokens not in ("full", "pruned", "both"):
        raise UserError(f"--tokens '{cfg.tokens}' is unknown: use full, pruned or both")
    if cfg.dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype '{cfg.dtype}' is unknown: use auto, float32 or bfloat16")
    if cfg.scoring not in ("generate", "likelihood"):
        raise UserError(f"--scoring '{cfg.scoring}' is unknown: use generate or likelihood")
    if cfg.chat and (cfg.shots or cfg.demos or cfg.answers or cfg.limit or cfg.scoring != "generate"):
        raise UserError("--shots, --demos, --scoring, --answers and --limit have no effect on --chat")
    model.require_at_least(cfg, 1, "n batch_size")
    model.require_at_least(cfg, 0, "limit")
    for flag in ("out", "report"):
        if getattr(cfg, flag) and (Path(getattr(cfg, flag)).is_dir() or not Path(getattr(cfg, flag)).name):
            raise UserError(f"--{flag} {getattr(cfg, flag)} is a folder: give a file in it")
    if not cfg.model and int(os.environ.get("RANK", 0)):
        return  # rank 0 scores what is there
    tasks = [] if cfg.chat else open_tasks(cfg)
    if not cfg.model and any(task.kind == "text" for task in tasks):
        raise UserError("--tasks: a loss on text needs --model")
    log, step, vlm, tokenizer = Log(), "", None, None
    if cfg.model:
        log.rank, log.world, device = model.find_ranks(cfg.device, hours=24)  # they do not keep step
        step = model.find_step(cfg.model)
        narrow = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda")
        vlm = model.VLM.from_pretrained(step, torch.bfloat16 if narrow else torch.float32).to(device).eval()
        tokenizer = data.Tokenizer.from_pretrained(step / "tokenizer")
    if cfg.chat:
        return chat(vlm, tokenizer, cfg)
    if cfg.answers or cfg.out:
        log.folder = Path(cfg.answers or Path(cfg.out).with_suffix("").as_posix() + "_answers")
        log.facts = {"model": str(step), "weights": fingerprint(vlm)} if vlm else {}
    results, examples = [], []
    modes = ("full", "pruned") if cfg.tokens == "both" else (cfg.tokens,)
    for mode in modes:
        for task in [task for task in tasks if mode == modes[0] or task.kind not in WORDS_ONLY]:
            kept = log if cfg.answers or task.path else replace(log, folder=None)
            rows, shown = score_task(vlm, tokenizer, task, mode, cfg, kept)
            results += rows
            examples += shown if mode == "full" or cfg.tokens == "pruned" else []
    if log.world > 1:
        dist.destroy_process_group()
    if log.rank:
        return
    print_table(results)
    summary = {"model": str(step), "commit": git_commit(), "seed": cfg.seed, "results": results}
    summary |= {"prompt": "base" if cfg.shots else "chat", "scoring": cfg.scoring, "limit": cfg.limit}
    shown = {f"{task.name} {task.shots}-shot": task.questions for task in tasks if task.shots}
    summary["demos"] = {k: [" ".join(d.name for d in q.demos) for q in qs] for k, qs in shown.items()}
    if cfg.out:
        model.write_json(Path(cfg.out), summary)
    if cfg.report:
        make_report(Path(cfg.report), vlm, step, summary, examples)
        print(f"report: {cfg.report}")


def fingerprint(vlm) -> str:
    """Tells weights apart that lie at the same path: the sum of their bits, alike on every device."""
    total = sum(
        p.detach().view(BITS[p.element_size()]).sum(dtype=torch.int64).item() for p in vlm.parameters()
    )
    return f"{total % (1 << 64):016x}"


# ---------------------------------------------------------------------------------------------------------
# Tasks


@dataclass
class Question:
    images: tuple  # Scenes, paths or encoded pictures (bytes); none where it is about text alone
    text: str  # "<image 2>" in it is where the second picture stands; the others stand in front
    answers: list[str]  # none where only a server knows them
    parts: tuple[str, ...] = ()  # sub-scores it belongs to; chance is that of who knows the first
    choices: tuple[str, ...] = ()  # possible answers, where these are known
    name: str | int = ""  # its id
    demos: list[data.Example] = field(default_factory=list)
    options: tuple[str, ...] = ()  # texts of lettered choices; where there are none, those in its text
    group: str = ""  # questions of a group count as one, right if all of them are (MMBench's rotations)

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from the others: several about one picture may have that picture's id."""
        return str(self.name), self.text


@dataclass
class Task:
    name: str
    kind: str  # how an answer is scored, see KINDS
    questions: list[Question]
    max_new_tokens: int = 24
    shots: int | None = None  # demonstrations before a question, in MM1's templates; None: the chat template
    chance: float | None = None  # where guessing well beats the best constant answer
    benchmark: str = ""  # its row in BENCHMARKS, if it has one
    path: Path | None = None  # where its questions come from, if from files
    limit: int = 0  # above 0: only so many were drawn of them


def letter_is(parse):
    """The scorer of an answer's letter, as parse(answer, the options' texts) reads it."""
    return lambda a, q: float(parse(a, [*(q.options or option_letters(q.text).values())]) == q.answers[0])


KINDS = {  # metric, and the score of an answer to a question; caption and text are scored as a whole
    "vqa": ("accuracy", lambda a, q: vqa_accuracy(a, q.answers)),
    "exact": ("accuracy", lambda a, q: float(any(gqa_match(a, right.lower()) for right in q.answers))),
    "relaxed": ("relaxed_accuracy", lambda a, q: float(any(relaxed_match(a, right) for right in q.answers))),
    "anls": ("anls", lambda a, q: anls(a, q.answers)),
    "yesno": ("accuracy", lambda a, q: float(yesno_parse(a) == q.answers[0].lower())),
    "mme": ("accuracy", lambda a, q: float(mme_parse(a) == q.answers[0].lower())),
    "choice": ("accuracy", letter_is(lambda a, options: choice_parse(a, options))),
    "letter": ("accuracy", lambda a, q: float(a.strip() == q.answers[0])),
    "scienceqa": ("accuracy", letter_is(lambda a, options: scienceqa_parse(a, len(options)))),
    "mmbench": ("accuracy", letter_is(lambda a, options: mmbench_parse(a, options))),
    "mmstar": ("accuracy", letter_is(lambda a, options: mmstar_parse(a))),
    "mmmu": ("accuracy", lambda a, q: (mmmu_letter if q.choices else mmmu_open_hit)(a, q)),
    "ref": ("accuracy_iou50", lambda a, q: box_hit(a, q.answers[0])),
    "caption": ("cider_d_x100", None),
    "likelihood": ("acc", lambda a, q: float(likeliest(a, q) == int(q.answers[0]))),
    "text": ("nll_per_token", None),
}
mmmu_letter = letter_is(lambda a, options: mmmu_parse(a, options))
FILE_KINDS = ("vqa", "exact", "relaxed", "anls", "choice", "yesno", "caption", "ref", "text")
LETTERED = ("choice", "letter", "scienceqa", "mmbench", "mmstar", "mmmu")
WORDS_ONLY = ("text", "likelihood")  # nothing to look at, so nothing to swap or to demonstrate
SCENE_TASKS = ("scenes_vqa", "scenes_text", "scenes_pope", "scenes_ref", "scenes_cap")
MORE_TASKS = ("scenes_words", "scenes_bind")  # the first of them is one of "scenes", too
CHOICES = {"colour": (*data.COLOURS,), "shape": data.SHAPES, "count": (*"0123456",)}
CHOICES |= {kind: data.YES_NO for kind in ("relation", "exists", "yesno")}


def mmmu_open_hit(answer: str, question: Question) -> float:
    return float(mmmu_open(answer, question.answers))


def likeliest(answer: str, question: Question, by_bytes: bool = False) -> int:
    """Which option has the largest of the summed log-likelihoods that `answer` lists, or the largest a byte
    (lm-eval's acc_norm counts characters: the same where all are ASCII)."""
    lengths = [len(option.encode()) if by_bytes else 1 for option in question.choices]
    return int(np.argmax(np.array(json.loads(answer)) / lengths))


def open_tasks(cfg: EvalConfig) -> list[Task]:
    """The tasks of --tasks, each once for every number of --shots; what has no effect is refused."""
    counts = cfg.shots.split(",") if cfg.shots else []
    if not all(count.isdecimal() for count in counts):
        raise UserError(f"--shots '{cfg.shots}': use a number of at least 0 or a list such as 0,4,8")
    names = []
    for name in cfg.tasks.split(","):
        names += [*SCENE_TASKS, MORE_TASKS[0]] if name == "scenes" else [name]
    tasks = []
    for name in dict.fromkeys(names):
        for shots in [int(count) for count in dict.fromkeys(counts)] or [None]:
            tasks.append(open_task(name, shots, cfg))
            if tasks[-1].kind in WORDS_ONLY:
                break
    asked = [task for task in tasks if task.kind not in WORDS_ONLY]
    if (cfg.shots or cfg.scoring != "generate") and not asked:
        raise UserError(f"--shots and --scoring have no effect on --tasks {cfg.tasks}")
    kinds = {task.benchmark or task.kind for task in tasks if task.path}
    twice = [name for (name, _), n in Counter((task.name, task.shots) for task in tasks).items() if n > 1]
    if twice:
        raise UserError(f"--tasks has two tasks named {twice[0]}: rename a file, or score them one by one")
    if cfg.demos and len(kinds) > 1:
        raise UserError(f"--demos holds examples of one kind, --tasks asks for {' and '.join(sorted(kinds))}")
    if cfg.demos and not any(task.shots and task.path for task in asked):
        raise UserError("--demos has no effect without --shots above 0 and a task of files")
    if cfg.limit and not kinds:
        raise UserError("--limit has no effect without a task of files; of Scenes --n are asked")
    for task in asked if cfg.scoring == "likelihood" else []:
        if not all(question.choices for question in task.questions):
            raise UserError(
                f"--scoring likelihood: the possible answers of {task.name} are not known; use scenes_vqa, "
                "scenes_pope, scenes_bind, a benchmark of letters or yes and no, choice:FILE or yesno:FILE"
            )
    return tasks


def open_task(name: str, shots: int | None, cfg: EvalConfig) -> Task:
    kind, _, file = name.partition(":")
    if name == "scenes_words":
        return words_task(cfg.n, cfg.seed)
    if name in (*SCENE_TASKS, *MORE_TASKS):
        return few_shot_task(name, cfg.n, shots, cfg.seed)
    if kind in BENCHMARKS:
        path, read = Path(file) if file else default_folder(kind, cfg.root), read_benchmark
    elif file and kind in FILE_KINDS:
        path, read = Path(file), file_task
    else:
        known = ", ".join((*SCENE_TASKS, *MORE_TASKS, *BENCHMARKS))
        raise UserError(f"--tasks '{name}' is unknown: use scenes, {known} or {'|'.join(FILE_KINDS)}:FILE")
    task = read(kind, path, cfg.images)
    check_labels(task)
    units = [
        q.group or (str(q.name) if kind == "mme" else q.key) for q in task.questions
    ]  # MME asks in pairs
    if cfg.limit and len({*units}) > cfg.limit:
        few = {*random.Random(f"limit-{cfg.seed}").sample([*dict.fromkeys(units)], cfg.limit)}
        task.questions, task.limit = [q for q, u in zip(task.questions, units) if u in few], cfg.limit
    if shots is None or task.kind in WORDS_ONLY:
        return task
    if shots and not cfg.demos:
        raise UserError(f"--shots {shots}: {name} needs --demos FILE, with questions of its train split")
    pool = read(kind, Path(cfg.demos), cfg.images).questions if shots else []
    tested = {place_of(picture) for question in task.questions for picture in question.images}
    both = next((p for question in pool for p in question.images if place_of(p) in tested), None)
    if both:
        which = f"one of {cfg.demos}" if isinstance(both, bytes) else both
        raise UserError(f"--demos {cfg.demos} is not of the train split: {which} is also a picture of {path}")
    return add_demos(task, pool, shots, cfg.seed)


def place_of(picture):
    return picture.resolve() if isinstance(picture, Path) else picture


def add_demos(task: Task, pool: list[Question], shots: int, seed: int) -> Task:
    """The task in MM1's templates, behind `shots` demonstrations, drawn from `pool` for each question."""
    if shots > len(pool):
        raise UserError(f"--shots {shots}: {task.name} has only {len(pool)} demonstrations to draw from")
    odd = next((q for q in task.questions + pool if len(q.images) != 1), None)
    if odd:
        told = f"question {odd.name} has {len(odd.images)} pictures, MM1's templates have one"
        raise UserError(f"--shots {shots}: {task.name} {told}")
    unknown = next((q for q in pool if not q.answers), None)
    if unknown:
        raise UserError(f"--demos: question {unknown.name} has no answer, so it demonstrates nothing")
    tail = BENCHMARKS[task.benchmark].tail if task.benchmark else ""
    caption = task.kind == "caption"  # asked by the template alone
    pool = [replace(q, text="" if caption else q.text.removesuffix(tail)) for q in pool]
    shown = [data.Example(q.images[0], q.text, q.answers[0], str(q.name)) for q in pool]
    questions = []
    for i, question in enumerate(task.questions):
        demos = random.Random(f"demos-{task.name}-{seed}-{i}").sample(shown, shots)
        questions.append(replace(question, text=question.text.removesuffix(tail), demos=demos))
    return replace(task, questions=questions, shots=shots)


def few_shot_task(name: str, n: int, shots: int | None, seed: int) -> Task:
    """A task of Scenes with `shots` demonstrations in MM1's templates, or None in the chat template; the same
    questions each time. They are drawn from about as many training questions as OpenFlamingo's, 2,048.
    """
    if name == "scenes_bind":
        return bind_task(n, shots, seed)
    task = scenes_task(name, n, seed)
    if shots is None:
        return task
    each = 2048 // len(data.QUESTION_TYPES) if name == "scenes_vqa" else 2048
    pool = scenes_task(name, each, seed, "train").questions if shots else []
    return add_demos(task, pool, shots, seed)


def bind_task(n: int, shots: int | None, seed: int) -> Task:
    """Questions whose demonstrations alone tell what a made-up word stands for: at least one, anywhere, has
    it as its answer. The thing asked about is drawn first, then whether the word is to fit it (half do), then
    the meaning: who ignores that, and anyone at 0 shots, is right half the time at best.
    """
    found = []
    for i in range(n):
        rng = random.Random(f"scenes_bind-{seed}-{i}")
        scene, word = data.make_scene("test", rng.randrange(1 << 40)), rng.choice(data.MADE_UP)
        thing, fits, named = rng.choice(scene.things), i % 2 == 0, i % 4 < 2
        attribute = rng.choice(("colour", "shape"))
        own, names = getattr(thing, attribute), CHOICES[attribute]
        meaning = own if fits else rng.choice([name for name in names if name != own])
        asked = data.ask_bound(scene, thing, word, meaning, named)
        sure, demos = rng.random(), []
        for k in range(shots or 0):
            draw = (True, True) if k == int(sure * shots) else (rng.random() < 0.5, rng.random() < 0.5)
            demos.append(data.draw_bound(word, meaning, *draw, rng, "train"))
        kind, choices = ("name", (*names, *data.MADE_UP)) if named else ("yes_no", data.YES_NO)
        found.append(Question((scene,), asked.question, [asked.answer], (kind,), choices, str(i), demos))
    return Task("scenes_bind", "vqa", found, 16, shots, chance=50.0)


def words_task(n: int, seed: int) -> Task:
    """Unseen scenes told in words: a loss that rises where training on pictures makes a decoder forget."""
    texts = [data.Scenes("text", "test")[seed * 1_000_000 + i].parts[0] for i in range(n)]
    return Task("scenes_words", "text", [Question((), text, []) for text in texts])


def scenes_task(name: str, n: int, seed: int, split: str = "test") -> Task:
    """Questions about unseen scenes (or training ones); scenes_vqa has n of each of its types."""
    kinds = {
        "scenes_vqa": data.QUESTION_TYPES,
        "scenes_text": ("text",),
        "scenes_pope": ("exists",),
        "scenes_ref": ("ref",),
    }
    found = []
    for kind in kinds.get(name, ("caption",)):
        index, before = 0, len(found)
        while len(found) - before < n:
            rng = random.Random(f"{name}-{kind}-{seed}-{index}")
            scene = data.make_scene(split, seed * 1_000_000 + index)
            index += 1
            number = str(len(found))
            if kind == "caption":
                references = [data.say(scene)] + [data.say(scene, rng) for _ in range(2)]
                found.append(Question((scene,), data.CAPTION_PROMPT, references, name=number))
                continue
            asked = data.ask(scene, kind, rng, split)
            if asked:
                sub, choices = kind if name == "scenes_vqa" else "", CHOICES.get(kind, ())
                parts = (sub, *["held_out"] * asked[3])  # about a pair that no training scene has
                found.append(Question((scene,), asked[1], [asked[2]], parts, choices, number))
    scorer = {"scenes_pope": "yesno", "scenes_ref": "ref", "scenes_cap": "caption"}.get(name, "vqa")
    return Task(name, scorer, found, max_new_tokens=96 if scorer == "caption" else 16)


def file_task(kind: str, path: Path, images: str) -> Task:
    """JSON lines of {"question_id", "image", "text", "answers": [...]}; of kind text, {"text"} will do."""
    if not path.is_file():
        raise UserError(f"--tasks {kind}:{path}: no such file")
    questions, table = [], data.Table(path)
    for row, place in (table.raw(i) for i in range(len(table))):
        try:
            if not isinstance(row["text"], str):
                raise ValueError("'text' must be a string")
            if kind == "text":
                questions.append(Question((), row["text"], []))
                continue
            if not isinstance(row["answers"], list) or not row["answers"]:
                raise ValueError("'answers' must be a list of at least one")
            answers = [str(answer) for answer in row["answers"]]
            shown = data.local_pictures([row["image"]], Path(images) if images else path.parent, place)
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{place}: expected an object with image, text and answers ({e})") from None
        if not shown[0].is_file():
            raise UserError(f"{place}: image {shown[0]} does not exist")
        choices = tuple(option_letters(row["text"])) if kind == "choice" else CHOICES.get(kind, ())
        if kind == "choice" and answers[0] not in choices:
            raise UserError(
                f"{place}: answer '{answers[0]}' is no letter of an option, a line 'A. ...' of its text"
            )
        parts = (str(row.get("category") or ""),) if kind != "caption" else ()
        name = row.get("question_id", place.rpartition(" ")[2])
        questions.append(Question((*shown,), row["text"], answers, parts, choices, name))
    return Task(path.stem, kind, questions, max_new_tokens=64, path=path)


def check_labels(task: Task) -> None:
    """What would only show once all is answered: right answers that are missing or none, ids twice."""
    answered = [bool(q.answers) for q in task.questions]
    for q, known in zip(task.questions, answered):
        where = f"{task.path}: question {q.name}"
        if not known and any(answered) and task.kind not in WORDS_ONLY:
            raise UserError(f"{where} has no answer, while others have")
        if known and task.kind in ("yesno", "mme") and q.answers[0].strip().lower() not in data.YES_NO:
            raise UserError(f"{where} has the answer '{q.answers[0]}', which is neither yes nor no")
        if known and task.kind == "ref" and parse_box(q.answers[0]) is None:
            raise UserError(f"{where} has the answer '{q.answers[0]}', not four integers 0-999")
    twice = [key for key, n in Counter(q.key for q in task.questions).items() if n > 1]
    if twice and task.kind != "text":
        raise UserError(f"{task.path}: question_id {twice[0][0]} is there twice with one text: drop one")


# ---------------------------------------------------------------------------------------------------------
# Benchmarks: a row each. Prompts are LLaVA-1.5's where it has the benchmark, else lmms-eval's; what LLaVA's
# question files hold ends in the prompt's tail already and is taken as it is.

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
CN_LETTER = "\n请直接回答选项字母。"
UNSURE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
REGION = (
    "Please provide the bounding box of the region this sentence describes, "
    "as four integers 0-999 (x1, y1, x2, y2): {question}"
)
VAL2014 = "val2014/COCO_val2014_{image_id:0>12}.jpg"


class Benchmark(NamedTuple):
    kind: str  # of scorer, see KINDS
    prompt: str  # of question, hint, context (a hint, announced), options (one a line), ocr
    max_new_tokens: int
    split: str  # what the names of its parquet files begin with, where a folder has several splits
    source: str
    files: tuple[str, ...] = ()  # of its folder, "questions | labels | picture": the first that are there
    parts: tuple[str, ...] = ()  # columns that sub-scores are told by
    join: tuple[str, ...] = ("id",)  # what labels in a file of their own have in common with their question
    extra: Callable | None = None  # more rows: (questions, answers) -> [(name, metric, score, n)]
    upload: tuple[str, Callable] | None = None  # for a server: its name of the id, how it wants answers spelt
    macro: bool = False  # the mean over the last part's means, not over questions
    folder: str = ""  # under --root; default: its name

    @property
    def tail(self) -> str:
        return self.prompt.rpartition("}")[2]


def pope_rows(asked: list[Question], answers: list[str]) -> list[tuple]:
    """LLaVA reports the mean F1 of the three categories."""
    rows, parts = [], dict.fromkeys(q.parts[:1] for q in asked)
    for part in parts:
        mine = [(a, q.answers[0]) for a, q in zip(answers, asked) if q.parts[:1] == part]
        scores = yesno_metrics(*map(list, zip(*mine)))
        rows += [(" ".join([*part, name]), name, 100 * score, len(mine)) for name, score in scores.items()]
    f1 = [row[2] for row in rows if row[1] == "f1"]
    return [("mean f1", "f1", sum(f1) / len(f1), len(asked))] + [row for row in rows if row[1] != "accuracy"]


def mme_rows(asked: list[Question], answers: list[str]) -> list[tuple]:
    """Points: accuracy + that of pictures with both answers right, 200 a category."""
    rows, count = [], Counter(q.parts[0] for q in asked)
    for q, said in zip(asked, answers):
        rows.append({"category": q.parts[0], "question_id": str(q.name), "gt": q.answers[0], "pred": said})
    scores = {k: v["score"] if isinstance(v, dict) else v for k, v in mme_score(rows).items()}
    count |= {name: sum(count[part] for part in parts) for name, parts in MME_CATEGORIES.items()}
    return [(f"{name} points", "points", score, count[name]) for name, score in scores.items()]


def bleu_rows(asked: list[Question], answers: list[str]) -> list[tuple]:
    return [("bleu4", "bleu4", 100 * bleu4(answers, [q.answers for q in asked]), len(asked))]


def norm_rows(asked: list[Question], answers: list[str]) -> list[tuple]:
    right = [likeliest(a, q, by_bytes=True) == int(q.answers[0]) for a, q in zip(answers, asked)]
    return [("norm", "acc_norm", 100 * sum(right) / len(right), len(right))]


CAPTION = {"extra": bleu_rows, "prompt": data.CAPTION_PROMPT, "kind": "caption", "max_new_tokens": 64}
BOX = {"kind": "ref", "prompt": REGION, "max_new_tokens": 32, "parts": ("split",)}
WORDS = {
    "kind": "likelihood",
    "prompt": "Question: {question}\nAnswer:",
    "max_new_tokens": 64,  # room for an option
    "extra": norm_rows,
}
BENCHMARKS = {
    "vqav2": Benchmark(
        "vqa", "{question}" + SHORT, 16, "val", "Goyal et al. 2017",
        (f"v2_OpenEnded_mscoco_val2014_questions.json | v2_mscoco_val2014_annotations.json | {VAL2014}",
         "llava_vqav2_mscoco_test-dev2015.jsonl | | test2015/{image}",
         "llava_vqav2_mscoco_test2015.jsonl | | test2015/{image}"),
        upload=("question_id", lambda said: vqa_normalise(said)),
    ),
    "okvqa": Benchmark(
        "vqa", "{question}" + SHORT, 16, "val", "Marino et al. 2019",
        (f"OpenEnded_mscoco_val2014_questions.json | mscoco_val2014_annotations.json | {VAL2014}",),
    ),
    "textvqa": Benchmark(  # without what an OCR system read; lmms-eval's way
        "vqa", "{question}" + SHORT, 16, "val", "Singh et al. 2019",
        ("llava_textvqa_val_v051_ocr.jsonl | TextVQA_0.5.1_val.json | train_images/{image}",
         "TextVQA_0.5.1_val.json | | train_images/{image_id}.jpg"), join=("image", "question"),
    ),
    "textvqa_ocr": Benchmark(  # with it: LLaVA's numbers
        "vqa", "{question}\nReference OCR token: {ocr}" + SHORT, 16, "val", "Singh et al. 2019",
        ("llava_textvqa_val_v051_ocr.jsonl | TextVQA_0.5.1_val.json | train_images/{image}",),
        join=("image", "question"), folder="textvqa",
    ),
    "vizwiz": Benchmark(
        "vqa", "{question}" + UNSURE, 16, "val", "Gurari et al. 2018",
        ("val.json | | val/{image}", "llava_test.jsonl | | test/{image}"),
        upload=("image", lambda said: vqa_normalise(said)),
    ),
    "gqa": Benchmark(
        "exact", "{question}" + SHORT, 16, "testdev", "Hudson & Manning 2019",
        ("llava_gqa_testdev_balanced.jsonl | data/testdev_balanced_questions.json | data/images/{image}",
         "llava_gqa_testdev_balanced.jsonl | testdev_balanced_questions.json | data/images/{image}",
         "data/testdev_balanced_questions.json | | data/images/{imageId}.jpg"),
    ),
    "scienceqa": Benchmark(
        "scienceqa", "{context}{question}{options}" + LETTER, 16, "test", "Lu et al. 2022",
        ("llava_test_CQM-A.json | problems.json | images/test/{image}",), ("picture",),
    ),
    "pope": Benchmark(
        "yesno", "{question}" + SHORT, 16, "test", "Li et al. 2023",
        ("llava_pope_test.jsonl | coco/coco_pope_*.json | val2014/{image}",
         "coco/coco_pope_*.json | | val2014/{image}"),
        ("category",), ("category", "image", "question"), pope_rows,
    ),
    "mme": Benchmark(
        "mme", "{question}" + SHORT, 16, "test", "Fu et al. 2023",
        ("llava_mme.jsonl | MME_Benchmark_release_version/**/*.txt | MME_Benchmark_release_version/{image}",),
        ("category",), ("category", "image", "question"), mme_rows, folder="MME",
    ),
    "mmbench": Benchmark(
        "mmbench", "{hint}{question}{options}" + LETTER, 32, "dev", "Liu et al. 2023",
        ("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv"), ("l2-category L2-category", "category"),
    ),
    "mmbench_cn": Benchmark(
        "mmbench", "{hint}{question}{options}" + CN_LETTER, 32, "dev", "Liu et al. 2023",
        ("mmbench_dev_cn_20231003.tsv",), ("l2-category L2-category", "category"), folder="mmbench",
    ),
    "seed": Benchmark(
        "letter", "{question}{options}" + LETTER, 16, "test", "Li et al. 2023",
        ("llava-seed-bench.jsonl | SEED-Bench.json | {image}",),
        ("data_type", "question_type category question_type_id"), folder="seed_bench",
    ),
    "mmmu": Benchmark(
        "mmmu", "{question}{options}\n" + LETTER, 128, "validation", "Yue et al. 2023", parts=("subject",)
    ),
    "mmstar": Benchmark(
        "mmstar", "{question}{options}" + LETTER[:-1], 32, "val", "Chen et al. 2024",
        parts=("category", "l2_category l2-category"), macro=True,
    ),
    "docvqa": Benchmark(
        "anls", "{question}" + SHORT, 32, "validation", "Mathew et al. 2021",
        ("val_v1.0*.json | | {image}", "test_v1.0*.json | | {image}"),
        upload=("questionId", str),
    ),
    "chartqa": Benchmark(
        "relaxed", "{question}\nAnswer the question with a single word.", 16, "test", "Masry et al. 2022",
        ("test/test_*.json | | test/png/{imgname}", "test_*.json | | png/{imgname}"), ("type split",),
    ),
    "coco_cap": Benchmark(
        **CAPTION, split="val", source="Chen et al. 2015; Karpathy's test split",
        files=("dataset_coco.json | | {filepath}/{filename}", "captions_val2014.json | | val2014/{file_name}",
               "captions_val2017.json | | val2017/{file_name}"),
    ),
    "flickr30k": Benchmark(
        **CAPTION, split="test", source="Young et al. 2014; Karpathy's test split",
        files=("dataset_flickr30k.json | | flickr30k-images/{filename}",),
    ),
    "nocaps": Benchmark(
        **CAPTION, split="val", source="Agrawal et al. 2019", parts=("domain image_domain",),
        files=("nocaps_val_4500_captions.json | | images/{file_name}",),
    ),
    "textcaps": Benchmark(
        **CAPTION, split="val", source="Sidorov et al. 2020",
        files=("TextCaps_0.1_val.json | | train_images/{image_id}.jpg",),
    ),
    **{
        name: Benchmark(**BOX, split="val", source=source, files=(f"{name}_*.jsonl | | {{image}}",))
        for name, source in (
            ("refcoco", "Yu et al. 2016"), ("refcoco+", "Yu et al. 2016"), ("refcocog", "Mao et al. 2016"),
        )
    },
    "arc_easy": Benchmark(**WORDS, split="test", source="Clark et al. 2018", files=("ARC-Easy-Test.jsonl",)),
    "arc_challenge": Benchmark(
        **WORDS, split="test", source="Clark et al. 2018", files=("ARC-Challenge-Test.jsonl",)
    ),
    "piqa": Benchmark(
        **WORDS, split="valid", source="Bisk et al. 2020", files=("valid.jsonl | valid-labels.lst",)
    ),
    "hellaswag": Benchmark(
        **{**WORDS, "prompt": "{question}"}, split="valid", source="Zellers et al. 2019",
        files=("hellaswag_val.jsonl",),
    ),
}  # fmt: skip
COLUMNS = {  # ours: what files call it; the first that is there and not empty counts
    "id": "question_id questionId index id ind cocoid imgid img_id image_id",
    "image id": "image_id cocoid imgid img_id id question_id ind",  # captions are about pictures
    "image": "image imgname file_name filename image_id imageId",
    "question": "question query ctx goal sent expression text",
    "answers": "answers answer answerKey reference_strs annotations_captions sentences captions caption "
    "caption_str label multiple_choice_answer",
    "options": "options choices endings",
}


def default_folder(name: str, root: str) -> Path:
    folder = Path(root) / (BENCHMARKS[name].folder or name)
    if not folder.is_dir():
        raise UserError(
            f"--tasks {name}: no folder {folder}; say where it is: --root DIR or --tasks {name}:PATH"
        )
    return folder


def first_of(raw: dict, names: str):
    return next((raw[n] for n in names.split() if n in raw and raw[n] not in (None, "", "nan", [])), None)


def json_rows(pattern: str, folder: Path) -> list[tuple[dict, str]]:
    """Records of files as benchmarks lay them out, and their places; `file` in one is its file's stem."""
    rows = []
    for path in sorted(folder.glob(pattern)):
        if path.suffix == ".txt":  # MME: a picture's questions, each with its answer behind a tab
            name = "/".join([path.relative_to(folder).parts[1], path.stem])
            told = [line.split("\t") for line in path.read_text().splitlines() if line.count("\t") == 1]
            found = [{"question_id": name, "image": path.stem, "question": q, "answer": a} for q, a in told]
        elif path.suffix == ".lst":  # PIQA: the number of the right answer of every line
            found = [{"ind": i, "label": label} for i, label in enumerate(path.read_text().split())]
        else:
            found = whole_json(path) if path.suffix == ".json" else None
        if found is None:  # records by lines
            table = data.Table(path)
            some = [table.raw(i) for i in range(len(table))]
        else:
            some = [(raw, f"{path} record {n}") for n, raw in enumerate(found)]
        for raw, place in some:
            if not isinstance(raw, dict):
                raise UserError(f"{place}: expected an object, got {str(raw)[:40]}")
            rows.append(({"file": path.stem, **raw}, place))
    return rows


def whole_json(path: Path) -> list[dict]:
    """The records of a .json: a list, the list in an object (with COCO's captions put to their pictures), an
    object of objects by their ids, or, as POPE has it, one a line."""
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        lines = path.read_text().splitlines()
        try:
            value = [json.loads(line) for line in lines if line.strip()]
        except json.JSONDecodeError:
            raise UserError(f"{path} line {e.lineno} column {e.colno}: not valid JSON ({e.msg})") from None
    if isinstance(value, dict) and {"images", "annotations"} <= value.keys():
        told = collections.defaultdict(list)
        for each in value["annotations"]:
            told[each["image_id"]].append(each["caption"])
        return [{**image, "captions": told[image["id"]]} for image in value["images"]]
    if isinstance(value, dict):
        types = {n: name for name, n in value.get("question_type", {}).items()}  # SEED's
        lists = [value[key] for key in ("questions", "annotations", "data", "images") if key in value]
        value = lists[0] if lists else [{"question_id": key, **each} for key, each in value.items()]
        for each in value if types else ():
            each["question_type"] = types.get(each.get("question_type_id"))
    return [each for each in value if not isinstance(each, dict) or each.get("split", "test") == "test"]


def find_files(name: str, path: Path, images: str) -> tuple[Path, str, str, str]:
    """Folder, question files, label files and the pattern of pictures; a path that is a file says which."""
    row, folder = BENCHMARKS[name], path if path.is_dir() else path.parent
    tried = []
    for files in row.files:
        asked, labels, picture = [*(part.strip() for part in files.split("|")), "", ""][:3]
        if path.is_file() and not path.match(Path(asked).name):
            continue
        shown = Path(images) if images else folder / picture.partition("{")[0].rpartition("/")[0]
        needed = {asked: any(folder.glob(asked)) or path.is_file(), str(shown): shown.is_dir()}
        if labels and "llava" in asked:
            needed[labels] = any(folder.glob(labels))
        missing = [what for what, there in needed.items() if not there]
        if not missing:
            return folder, path.name if path.is_file() else asked, labels, picture
        tried.append(" and ".join(missing))
    only = [path] if path.is_file() else [*folder.glob("*.tsv")]
    if len(only) == 1:
        return folder, only[0].name, "", "{image}"
    raise UserError(
        f"{path}: not the folder of {name}: it lacks {', or '.join(tried) or 'a .tsv or .parquet file'}; "
        f"give such a folder, a .tsv or parquet files: --tasks {name}:PATH"
    )


def table_rows(name: str, path: Path) -> Iterator[tuple[dict, str]]:
    """Rows of a .tsv, or of parquet files: those of the benchmark's split, if it is one of several."""
    every = sorted(path.rglob("*.parquet")) if path.is_dir() else sorted(path.parent.glob(path.name))
    files = [file for file in every if file.name.startswith(BENCHMARKS[name].split)] or every
    splits = {file.name.partition("-")[0] for file in files}
    if len(splits) > 1:
        raise UserError(
            f"{path}: has the splits {', '.join(sorted(splits))}: name one, --tasks {name}:FILE.parquet"
        )
    folders = {file.parent for file in files if not file.parent.name.endswith("_images")}
    if len(folders) > 1 and name != "mmmu":  # whose subjects have a folder each
        told = ", ".join(sorted(str(folder) for folder in folders))
        raise UserError(f"{path}: has several sets of questions, name one of them: {told}")
    shown = {}  # GQA's pictures lie in files of their own
    for file in sorted(files, key=lambda file: not file.parent.name.endswith("_images")):
        table = data.Table(file)
        kept = rows_of_split(name, table)
        for i in range(len(table)):
            raw, place = table.raw(i)
            if kept and raw["split"] not in kept:
                continue
            if file.parent.name.endswith("_images"):
                shown[raw["id"]] = raw["image"]
            else:
                yield ({**raw, "image": shown.get(raw["imageId"])} if "imageId" in raw else raw), place


def rows_of_split(name: str, table: data.Table) -> set[str]:
    """The splits that count of a table of several, as MMMU_DEV_VAL.tsv is one; none: all its rows do."""
    if "split" not in table.raw(0)[0] or "split" in BENCHMARKS[name].parts:
        return set()
    return {
        s for i in range(len(table)) if str(s := table.raw(i)[0]["split"]).startswith(BENCHMARKS[name].split)
    }


def read_benchmark(name: str, path: Path, images: str) -> Task:
    """The questions of a benchmark: a folder as LLaVA or its authors lay it out, a .tsv of VLMEvalKit, or
    parquet files of the hub. Pictures of tables stay in memory, each once.
    """
    row, seen = BENCHMARKS[name], {}
    if not path.exists() and ("**" in path.name or not any(path.parent.glob(path.name))):
        raise UserError(f"--tasks {name}:{path}: no such file or folder")
    table = path.suffix in (".tsv", ".parquet") or (path.is_dir() and any(path.rglob("*.parquet")))
    labels, folder, pattern = {}, path.parent, ""
    if not table:
        folder, asked, label_files, pattern = find_files(name, path, images)
        table = asked.endswith(".tsv")
        try:
            rows = table_rows(name, folder / asked) if table else json_rows(asked, folder)
            for raw, _ in json_rows(label_files, folder) if label_files else ():
                labels.setdefault(join_key(row, raw), raw)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            raise UserError(
                f"{folder}: {asked} or {label_files} are not laid out as {name}'s ({e!r})"
            ) from None
    else:
        rows = table_rows(name, path)
    if table and images:
        raise UserError(f"--images has no effect on {path}, whose pictures lie in it")
    questions, places = [], []
    for n, (raw, place) in enumerate(rows):
        raw = {**raw, "ind": raw.get("ind", n)}  # what has no id is counted
        if labels:
            label = labels.get(join_key(row, raw))
            if label is None:
                told = ", ".join(f"{key} {value}" for key, value in zip(row.join, join_key(row, raw)))
                raise UserError(f"{place}: {label_files} in {folder} has no label for {told}")
            raw = {**label, "question": None, **{k: v for k, v in raw.items() if v is not None}}
        try:
            pictures = (raw, seen, place) if table else (raw, folder, images, pattern, place)
            shown = encoded_pictures(*pictures) if table else file_pictures(*pictures)
            found = questions_of(name, raw, shown)
        except (KeyError, ValueError, TypeError, IndexError, SyntaxError, AttributeError) as e:
            has = ", ".join(map(str, [*raw][:20]))
            raise UserError(f"{place}: not a question of {name} ({e!r}); its columns are {has}") from None
        questions += found
        places += [place] * len(found)
    if row.kind == "caption":  # files with a row for each caption
        merged = {}
        for q in questions:
            first = merged.setdefault(str(q.name), q)
            first.answers += q.answers if first.answers != q.answers else []  # TextCaps has all in each row
        questions = [*merged.values()]
    twice = [key for key, k in Counter(q.key for q in questions).items() if k > 1]
    if twice and all(q.parts for q in questions):  # POPE numbers its questions anew in every category
        questions = [replace(q, name=f"{q.parts[0]}/{q.name}") for q in questions]
    first = {}
    for q, place in zip(questions, places):
        if q.key in first and "image" in row.join:  # its id is the picture's, who is asked the same twice
            q.name = f"{q.name}#{len(first)}"
        if q.key in first:
            raise UserError(
                f"{place}: question_id {q.name} is there twice, first at {first[q.key]}: drop one"
            )
        first[q.key] = place
    if not questions:
        raise UserError(f"{path}: holds no questions of {name}")
    return Task(name, row.kind, questions, row.max_new_tokens, benchmark=name, path=path)


def bare_question(row: Benchmark, raw: dict) -> str:
    """Without what prompts add to it."""
    text = re.sub(r"\n?Reference OCR token:.*", "", str(first_of(raw, COLUMNS["question"]) or ""))
    text = text.replace("in the imange?", "in the image?")  # POPE's typo, not in all of its versions
    text = text.strip().removesuffix(SHORT.strip()).strip()
    return text.removesuffix("Please answer yes or no.").strip()


def join_key(row: Benchmark, raw: dict) -> tuple[str, ...]:
    found = {
        "id": str(first_of(raw, COLUMNS["id"])),
        "image": Path(str(first_of(raw, COLUMNS["image"]))).stem,
        "question": bare_question(row, raw).lower(),
        "category": part_of(raw, "category", ()),
    }
    return tuple(found[key] for key in row.join)


def part_of(raw: dict, column: str, shown: tuple) -> str:
    """The sub-score a record belongs to: from that column, its id or its file's name."""
    if column == "picture":
        return "IMG" if shown else "TXT"
    value, name = first_of(raw, column), str(first_of(raw, COLUMNS["id"]))
    if column == "subject":
        value = first_of(raw, "subject category") or re.sub(r"^[a-z]+_|_\d+$", "", name)  # validation_Art_1
    if value in (None, "default"):
        value = name.partition("/")[0] if "/" in name else raw.get("file", "")
    return re.sub(r"^(coco_pope_|test_|refcoco[+g]?_)|_test$", "", str(value))


def encoded_pictures(raw: dict, seen: dict, place: str) -> tuple:
    """The bytes of a row's pictures, each picture once in memory."""
    found = []
    for cell in (first_of(raw, key) for key in ("image", *(f"image_{i}" for i in range(1, 10)))):
        cell = data.tsv_pictures(cell, place) if isinstance(cell, str) else cell
        for each in cell if isinstance(cell, list) else [cell]:
            content = each["bytes"] if isinstance(each, dict) else each
            if content:
                found.append(seen.setdefault(content, content))
    return tuple(found)


def file_pictures(raw: dict, folder: Path, images: str, pattern: str, place: str) -> tuple:
    if not pattern or (pattern.endswith("{image}") and not raw.get("image")):  # ScienceQA has some without
        return ()
    path = Path(images or folder) / (pattern.rpartition("/")[2] if images else pattern).format_map(raw)
    deeper = path.parent / "images" / path.name  # some of MME's categories have it so
    if not path.is_file() and not deeper.is_file():
        raise UserError(f"{place}: image {path} does not exist")
    return (path if path.is_file() else deeper,)


def texts_of(value) -> list[str]:
    """Answers of any form: a text, a number, a list (or what Python writes of it), objects that have it."""
    if value is None or value == "?":
        return []
    if isinstance(value, str) and value.startswith(("['", '["')):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # a text that begins so
    if isinstance(value, dict):
        value = first_of(value, "raw_answer answer raw caption sent")  # OKVQA's others are stems
    return [text for each in value for text in texts_of(each)] if isinstance(value, list) else [str(value)]


def options_of(raw: dict) -> list[str]:
    value = first_of(raw, COLUMNS["options"])
    if isinstance(value, str):
        value = ast.literal_eval(value)
    if isinstance(value, dict):  # ARC
        value = value["text"]
    columns = ["ABCDEFGHI", [f"choice_{c}" for c in "abcd"], ("sol1", "sol2")]
    for names in columns if value is None else ():
        there = itertools.takewhile(lambda n: raw.get(n) not in (None, "", "nan"), names)
        value = value or [raw[n] for n in there]
    return [each["text"] if isinstance(each, dict) else str(each) for each in value]


def questions_of(name: str, raw: dict, shown: tuple) -> list[Question]:
    """A record as the question to ask: one, but for RefCOCO, which tells a box in several sentences."""
    row = BENCHMARKS[name]
    if not shown and row.kind not in ("scienceqa", "likelihood"):
        raise KeyError("image")
    if isinstance(raw.get("question"), dict):  # ARC's own files
        raw = {**raw, **raw["question"], "question": raw["question"]["stem"]}
    if "conversations" in raw:  # LLaVA's ScienceQA
        told = raw["conversations"][0]["value"].replace("<image>", "").strip()
        raw = {**raw, "text": told, "question": None}
    ids = COLUMNS["image id" if row.kind == "caption" else "id"]
    number = first_of(
        raw, ids if name != "mme" else "question_id image_path " + ids
    )  # MME's pairs: a picture
    parts = tuple(part_of(raw, column, shown) for column in row.parts)
    if row.kind == "ref":
        return box_questions(row, raw, shown, parts, number)
    options, answers = options_of(raw), texts_of(first_of(raw, COLUMNS["answers"]))
    text, asked = raw.get("text") if raw.get("question") is None else None, bare_question(row, raw)
    if name == "textvqa":  # lmms-eval's way, whatever the file
        asked, text = asked.capitalize(), None
    if row.kind == "likelihood":
        if name == "hellaswag":
            asked = f"{raw['activity_label']}: {raw['ctx_a']} {raw['ctx_b'].capitalize()}"
            asked, options = plain_steps(asked), [plain_steps(each) for each in options]
        labels = raw.get("choices", {})
        labels = [c["label"] for c in labels] if isinstance(labels, list) else labels.get("label", [])
        right = [str(labels.index(a) if a in labels else int(a)) for a in answers]
        return [Question((), row.prompt.format(question=asked), right, parts, (*options,), number)]
    if text is not None:
        text = text if "ocr" in row.prompt else re.sub(r"\nReference OCR token:.*", "", text)
        text = text if text.endswith(row.tail) else text + row.tail
    else:
        if "{question}" in row.prompt and not asked:
            raise KeyError("question")
        hint, lines = first_of(raw, "hint"), [f"\n{c}. {o}" for c, o in zip(string.ascii_uppercase, options)]
        told = {"hint": f"{hint}\n" if hint else "", "context": f"Context: {hint}\n" if hint else ""}
        prompt = row.prompt if options or row.kind != "mmmu" else "{question}\n" + SHORT  # an open question
        text = prompt.format(
            question=asked, options="".join(lines), ocr=", ".join(raw.get("ocr_tokens") or []), **told
        )
    choices = CHOICES["yesno"] if row.kind in ("yesno", "mme") else ()
    if row.kind in LETTERED:
        choices = tuple(string.ascii_uppercase[: len(options)] or option_letters(text))
        if options and answers and answers[0].isdecimal():
            answers = [string.ascii_uppercase[int(answers[0])]]
        if choices and answers and answers[0] not in choices and row.kind != "mmstar":
            raise ValueError(f"answer {answers[0]} is none of the options {', '.join(choices)}")
    group = str(int(number) % 1_000_000) if row.kind == "mmbench" else ""
    options = (*options,) if row.kind in LETTERED else ()
    return [Question(shown, text, answers, parts, choices, number, options=options, group=group)]


def box_questions(row: Benchmark, raw: dict, shown: tuple, parts: tuple, number) -> list[Question]:
    """bbox is (x1, y1, x2, y2) beside the picture's width and height, else COCO's (x, y, width, height)."""
    sentences = texts_of(first_of(raw, "sent expression sentences answer text"))
    box = [float(x) for x in raw["bbox"]]
    if "width" in raw:
        size = raw["width"], raw["height"]
    else:
        size, box = data.picture_size(shown[0]), [*box[:2], box[0] + box[2], box[1] + box[3]]
    right = " ".join(str(max(0, min(999, round(1000 * x / size[i % 2])))) for i, x in enumerate(box))
    made = [row.prompt.format(question=sentence) for sentence in sentences]
    names = [number] if len(made) == 1 else [f"{number}/{i}" for i in range(len(made))]
    return [Question(shown, text, [right], parts, name=name) for text, name in zip(made, names)]


def plain_steps(text: str) -> str:
    """HellaSwag's WikiHow texts without their marks, as lm-eval cleans them."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def more_ids(task: Task) -> list:
    """Every question a server wants to see: VQAv2's takes those of the whole test split, test-dev's too."""
    whole = (task.path if task.path.is_dir() else task.path.parent) / "llava_vqav2_mscoco_test2015.jsonl"
    if task.benchmark != "vqav2" or not whole.is_file():
        return []
    return [raw["question_id"] for raw, _ in json_rows(whole.name, whole.parent)]


# ---------------------------------------------------------------------------------------------------------
# Answering and scoring


@dataclass
class Log:
    """Where answers are kept, and whose they are: a run that was killed goes on where it stopped."""

    folder: Path | None = None
    facts: dict = field(default_factory=dict)  # about the model
    rank: int = 0
    world: int = 1


def score_task(
    vlm, tokenizer, task: Task, mode: str, cfg: EvalConfig, log: Log | None = None
) -> tuple[list[dict], list[dict]]:
    """Rows of eval.json (the task, then its parts) and a few examples for the report; no rows where nobody
    here knows the right answers. Without a vlm answers come from the files of an earlier run.
    """
    log = log or Log()
    if task.kind == "text":
        return [score_text(vlm, tokenizer, task, mode, cfg)], []
    asked, row = task.questions, BENCHMARKS.get(task.benchmark)
    answers = answer_all(vlm, tokenizer, task, [q.images for q in asked], mode, cfg, log)
    if row and row.upload and log.folder and not log.rank and not any(q.answers for q in asked):
        write_upload(task, answers, answers_path(log.folder, task, mode).with_suffix(".upload.json"))
    if not any(q.answers for q in asked):
        where = answers_path(log.folder, task, mode) if log.folder else "nowhere: give --out or --answers"
        if not log.rank:
            print(f"{task.name}: no right answers in {task.path}, so no score; answers are kept in {where}")
        return [], []
    try:
        return score_rows(vlm, tokenizer, task, answers, mode, cfg, log)
    except ValueError as e:  # a right answer that is none
        raise UserError(f"{task.path or task.name}: {e}") from None


def score_rows(
    vlm, tokenizer, task: Task, answers: list[str], mode: str, cfg: EvalConfig, log: Log
) -> tuple[list[dict], list[dict]]:
    asked, row = task.questions, BENCHMARKS.get(task.benchmark)
    scores = score_answers(task, answers)
    seeing = [i for i, q in enumerate(asked) if q.images]
    blind = other = None
    if (
        cfg.blind
        and seeing
        and (vlm or not log.folder or answers_path(log.folder, task, mode, True).is_file())
    ):
        swapped = derange([asked[i].images for i in seeing], cfg.seed)
        some, other = replace(task, questions=[asked[i] for i in seeing]), [*answers]
        for i, said in zip(seeing, answer_all(vlm, tokenizer, some, swapped, mode, cfg, log, blind=True)):
            other[i] = said
        blind = score_answers(task, other)
    cuts = {"": range(len(asked))}
    for depth in range(max(len(q.parts) for q in asked)):
        for i, q in enumerate(asked):
            if q.parts[depth : depth + 1] > ("",) and i not in cuts.setdefault(q.parts[depth], {}):
                cuts[q.parts[depth]][i] = None
    rows = [row_of(task, name, [*members], scores, blind, mode) for name, members in cuts.items()]
    if all(q.parts > ("",) and q.parts[0] for q in asked):  # who knows the part has the best constant of each
        firsts = {f"{task.name}/{q.parts[0]}" for q in asked}
        known = [(r["chance"], r["n"]) for r in rows if r["task"] in firsts]
        rows[0]["chance"] = round(sum(c * n for c, n in known) / sum(n for _, n in known), 2)
    if row and row.extra:
        found = row.extra(asked, answers)
        unseen = row.extra(asked, other) if other else [(0, 0, None, 0)] * len(found)
        for (name, metric, score, n), (_, _, hidden, _) in zip(found, unseen):
            told = {"task": f"{task.name}/{name}", "metric": metric, "score": round(score, 2), "stderr": None}
            told |= {"n": n, "shots": task.shots or 0, "tokens": mode, "chance": None}
            rows.append(told | {"blind_score": None if hidden is None else round(hidden, 2)})
    if row and task.shots is None:
        rows = [{**r, "prompt": row.prompt} for r in rows]
    if task.limit:
        rows = [{**r, "limit": task.limit} for r in rows]
    picked = random.Random(cfg.seed).sample(range(len(answers)), min(6, len(answers)))
    shown = []
    for q, answer, score in ((asked[i], answers[i], scores[i]) for i in picked):
        about = {"image": q.images[0] if q.images else None, "task": task.name, "question": q.text}
        shown.append({**about, "right": q.answers, "answer": answer, "score": min(1.0, score)})
    return rows, shown


def row_of(
    task: Task, name: str, members: list[int], scores: list[float], blind: list[float] | None, mode: str
) -> dict:
    asked, macro = task.questions, task.benchmark and BENCHMARKS[task.benchmark].macro

    def mean(values) -> tuple[float, list[float]]:
        """In percent, and what it is the mean of: one number a group, as low as that of its worst answer."""
        cells = collections.defaultdict(lambda: collections.defaultdict(list))
        for i in members:
            cells[asked[i].parts[-1] if macro else ""][asked[i].group or i].append(100 * values[i])
        lowest = [[min(group) for group in cell.values()] for cell in cells.values()]
        return sum(sum(cell) / len(cell) for cell in lowest) / len(lowest), sum(lowest, [])

    score, mine = mean(scores)
    chance = 0.0
    if KINDS[task.kind][0] in ("accuracy", "acc"):
        firsts = {i: asked[i].answers[0] for i in members}
        constants = [answer for answer, _ in Counter(firsts.values()).most_common(5)]
        chance = max(mean({i: firsts[i] == constant for i in members})[0] for constant in constants)
    sees = blind and any(asked[i].images for i in members)
    return {
        "task": f"{task.name}/{name}" if name else task.name,
        "metric": KINDS[task.kind][0],
        "score": round(score, 2),
        "stderr": round(standard_error(mine), 2),
        "n": len(mine),
        "shots": task.shots or 0,
        "tokens": mode,
        "blind_score": round(mean(blind)[0], 2) if sees else None,
        "chance": round(chance if task.chance is None else task.chance, 2),  # the best constant answer
    }


def derange(images: list[tuple], seed: int) -> list[tuple]:
    """The same pictures dealt out anew, none where it was: one cycle through them in random order.

    A task with a single picture keeps it: its blind score says nothing.
    """
    different = [*dict.fromkeys(p for each in images for p in each)]  # questions about one stay together
    rng = random.Random(seed)
    for _ in range(100):  # where a question has several pictures, until none has one of its others
        cycle = rng.sample(different, len(different))
        other = dict(zip(cycle, cycle[1:] + cycle[:1]))
        dealt = [tuple(other[picture] for picture in each) for each in images]
        if len(cycle) < 2 or not any({*new} & {*old} for new, old in zip(dealt, images)):
            break
    return dealt


def answer_all(
    vlm, tokenizer, task: Task, images: list[tuple], mode: str, cfg: EvalConfig, log: Log | None = None,
    blind: bool = False,
) -> list[str]:  # fmt: skip
    """Greedy answers, or the likeliest of the possible ones, in batches of similar length.

    images: the pictures of each question; those of its demonstrations stay theirs. What log.folder has of
    the answers is not asked again; what is new is written there batch by batch. Ranks share the batches.
    """
    log, asked = log or Log(), task.questions
    path, about = answers_path(log.folder, task, mode, blind), answers_about(task, mode, cfg, log, blind)
    answers = open_answers(path, task, about, log) if log.folder else {}
    todo = [i for i in range(len(asked)) if i not in answers]
    if vlm is None and todo:
        told = f"{len(todo)} of {len(asked)} questions have no answer, the first is {asked[todo[0]].name}"
        raise UserError(f"{path}: {told}: give --model to have them answered")
    prompts = {i: prompt_of(task, asked[i], tokenizer) for i in todo}
    shown = {i: [*(demo.image for demo in asked[i].demos), *images[i]] for i in todo}
    lengths = check_lengths(task, prompts, shown, vlm.cfg, mode) if todo else {}
    order = sorted(lengths, key=lambda i: (lengths[i], i))
    answers |= {i: "" for i in todo if i not in lengths}  # too long
    marks = stop_marks(task)
    ranks = tokenizer.ranks.items() if todo else ()
    stops = [i for token, i in ranks if any(mark.encode() in token for mark in marks)]
    size = max(1, cfg.batch_size // (1 + (task.shots or 0)))  # as many pictures at any number of shots
    batches = [order[start : start + size] for start in range(0, len(order), size)][log.rank :: log.world]
    new = {}
    for chosen in tqdm(batches, desc=f"{task.name} {mode}", leave=False, disable=log.rank > 0):
        samples = []
        for i in chosen:
            samples.append(data.load_sample(prompts[i], shown[i], vlm.cfg, f"{task.name} question {i}"))
        if "likelihood" in (cfg.scoring, task.kind):
            space = "" if (task.shots is None and task.kind != "likelihood") or tokenizer.prefix else " "
            options = [asked[i].choices for i in chosen]
            coded = [[tokenizer.encode(space + option) for option in each] for each in options]
            sums = answer_likelihoods(vlm, samples, coded, mode)
            if task.kind == "likelihood":
                said = [json.dumps([round(float(x), 4) for x in each]) for each in sums]
            else:
                said = [each[k.argmax()] for each, k in zip(options, sums)]
        else:
            batch = data.prompt_batch(samples, mode, vlm.cfg).to(next(vlm.parameters()).device)
            ids = vlm.generate(batch, tokenizer.end, task.max_new_tokens, stops=stops)
            said = [cut_answer(tokenizer.decode(each), marks) for each in ids]
        new |= zip(chosen, said)
        if log.folder:
            rank_path = part_path(path, log) if log.world > 1 else path
            write_answers(rank_path, task, {i: new[i] for i in chosen}, about, append=True)
    everyone = [new]
    if log.world > 1:
        everyone = [None] * log.world
        dist.all_gather_object(everyone, new)
    for each in everyone:
        answers |= each
    if log.folder and vlm is not None and not log.rank:
        write_answers(path, task, dict(sorted(answers.items())), about)
        for part in path.parent.glob(f"{glob.escape(path.stem)}.rank*.jsonl"):
            part.unlink()
    return [answers[i] for i in range(len(asked))]


# --- Files of answers, as LLaVA writes them


def answers_path(folder: Path | None, task: Task, mode: str, blind: bool = False) -> Path:
    name = task.name if task.shots is None else f"{task.name}.{task.shots}shot"
    name += f".limit{task.limit}" * (task.limit > 0)
    name += ".pruned" * (mode == "pruned") + ".blind" * blind
    return (folder or Path()) / f"{name}.jsonl"


def part_path(path: Path, log: Log) -> Path:
    return path.with_name(f"{path.stem}.rank{log.rank}.jsonl")


def answers_about(task: Task, mode: str, cfg: EvalConfig, log: Log, blind: bool) -> dict:
    """What an answer depends on beside its question: from a run where this was different none is taken."""
    about = {**log.facts, "template": "chat" if task.shots is None else "base", "scoring": cfg.scoring}
    about |= {"shots": task.shots or 0, "tokens": mode, "seed": cfg.seed, "most_tokens": task.max_new_tokens}
    shown = [(d.name, d.question, d.answer) for q in task.questions for d in q.demos]
    about |= {"demos": hashlib.sha1(repr(shown).encode()).hexdigest()[:16], "images": cfg.images}
    return {**about, "swapped_over": len(task.questions)} if blind else about


def open_answers(path: Path, task: Task, about: dict, log: Log) -> dict[int, str]:
    """The answers that are there, by the number of their question; rank 0 collects those that the ranks of a
    killed run left, the others wait for it.
    """
    if task.path and path.resolve() == task.path.resolve():
        raise UserError(f"--answers {path.parent}: {path} holds the questions themselves, use another folder")
    if "model" not in about:
        return read_answers(path, task, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not log.rank:
        left = sorted(path.parent.glob(f"{glob.escape(path.stem)}.rank*.jsonl"))
        found = {}
        for each in [path, *left]:
            found |= read_answers(each, task, about)
        if path.is_file() or left:
            write_answers(path, task, found, about)  # whole lines only: others will be appended
        for each in left:
            each.unlink()
    if log.world > 1:
        dist.barrier()
    return read_answers(path, task, about)


def read_answers(path: Path, task: Task, about: dict) -> dict[int, str]:
    """A last line that was cut off is left out; answers of another model, prompt or setting are refused."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    numbers, names = {q.key: i for i, q in enumerate(task.questions)}, {str(q.name) for q in task.questions}
    found = {}
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
            name, prompt, said, its = (str(row["question_id"]), row["prompt"], row["text"], row["metadata"])
            sure = "model" in about  # else they are scored as they are, LLaVA's own too, which tell less
            known = {key: value for key, value in about.items() if key != "model"}  # a path, which may move
            other = [key for key, value in known.items() if its.get(key, None if sure else value) != value]
            if not isinstance(said, str):
                raise ValueError("'text' must be a string")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            if line == len(lines) and isinstance(e, json.JSONDecodeError):
                break
            raise UserError(f"{path} line {line}: expected an answer in LLaVA's format ({e!r})") from None
        number = numbers.get((name, prompt.removeprefix("<image>\n")), numbers.get((name, prompt)))
        if other:
            told = ", ".join(f"{key} {its.get(key)} instead of {about[key]}" for key in other)
        elif number in found:
            raise UserError(f"{path} line {line}: question_id {name} is answered twice, delete one of them")
        elif number is not None:
            found[number] = said
            continue
        elif name in names:
            told = "another prompt"
        else:
            told = f"question_id {name} is not one of {task.name}"
        raise UserError(f"{path} line {line}: not an answer of this run ({told}): use another --answers")
    return found


def write_answers(path: Path, task: Task, answers: dict[int, str], about: dict, append: bool = False) -> None:
    lines = []
    for i, said in answers.items():
        name, prompt = task.questions[i].name, task.questions[i].text
        one = hashlib.sha1(f"{path.stem} {name} {prompt}".encode()).hexdigest()[:22]
        row = {"question_id": name, "prompt": prompt, "text": said, "answer_id": one}
        lines.append(json.dumps({**row, "model_id": about.get("model", ""), "metadata": about}) + "\n")
    target = path if append else path.with_name(path.name + ".tmp")
    with open(target, "a" if append else "w") as file:
        file.write("".join(lines))
    if not append:
        os.replace(target, path)


def write_upload(task: Task, answers: list[str], path: Path) -> None:
    """What the benchmark's server takes: every question of its files once, with "" where it was not asked."""
    (id_name, spell), rows = BENCHMARKS[task.benchmark].upload, {}
    for name in more_ids(task):
        rows[str(name)] = {id_name: name, "answer": ""}
    for q, said in zip(task.questions, answers):
        name = q.images[0].name if id_name == "image" and isinstance(q.images[0], Path) else q.name
        rows[str(name)] = {id_name: name, "answer": spell(said)}
    model.write_json(path, [*rows.values()])


# --- Prompts and batches


def prompt_of(task: Task, question: Question, tokenizer) -> list[data.Piece]:
    """A question in the chat template, each picture where it is marked; in MM1's behind demonstrations; or
    bare, as lm-eval asks a base model.
    """
    if task.kind == "likelihood":
        return data.pieces_of(data.Record("text", [question.text], []), tokenizer)[:-1]
    if task.shots is None:
        parts, unseen = [], {*range(len(question.images))}
        for n, part in enumerate(re.split(r"<image (\d+)>", question.text)):
            number = int(part) - 1 if n % 2 else -1
            parts.append(number if number in unseen else f"<image {part}>" if n % 2 else part)
            unseen.discard(number)
        turns = [("user", [*sorted(unseen), *(part for part in parts if part != "")]), ("assistant", [])]
        return data.chat_pieces(turns, tokenizer, to_answer=True)
    return data.shot_pieces(question.demos, "" if task.kind == "caption" else question.text, tokenizer)


def check_lengths(
    task: Task, prompts: dict[int, list], shown: dict[int, list], cfg: model.ModelConfig, mode: str
) -> dict[int, int]:
    """Positions of each prompt that leaves room for an answer within what the decoder was trained for.
    Without those that do not, if they are few: they count as wrong.
    """
    lengths = {}
    for i, pieces in prompts.items():
        slots = data.sample_slots(cfg, mode, data.picture_sizes(shown[i], cfg))
        lengths[i] = len(data.lay_out(pieces, slots).ids)
    room, longest = cfg.decoder.context, max(lengths, key=lengths.get)
    needed = {i: length + task.max_new_tokens for i, length in lengths.items()}
    long = [i for i in needed if needed[i] > room]
    told = f"{1 + (task.shots or 0)} x {data.square_tokens(cfg, mode)} visual tokens, text and answer take "
    told += (
        f"{needed[longest]} positions in question {task.questions[longest].name}, the decoder was trained "
    )
    if len(long) > len(needed) / 50:
        raise UserError(f"{task.name}: {told}for {room}: use fewer --shots or --tokens pruned")
    if long and not int(os.environ.get("RANK", 0)):
        print(f"{task.name}: {len(long)} questions are too long and count as wrong: {told}for {room}")
    return {i: length for i, length in lengths.items() if i not in set(long)}


def stop_marks(task: Task) -> tuple[str, ...]:
    """What ends an answer besides the end token: a base model goes on with the next example (MM1 6.1)."""
    if task.shots is None:
        return ()
    return ("\n",) if task.kind in ("caption", "ref") else ("\n", ".", ",", "Question")


def cut_answer(text: str, marks: tuple[str, ...]) -> str:
    """The text in front of the first mark."""
    for mark in marks:
        text = text.partition(mark)[0]
    return text.strip()


@torch.no_grad()
def answer_likelihoods(
    vlm, samples: list[data.Sample], options: list[list[list[int]]], mode: str
) -> list[np.ndarray]:
    """Summed log-probability of the tokens of every option of every prompt, an array a prompt.

    samples: prompts as for data.prompt_batch; options: token ids. All options of a prompt lie behind it in
    one row, each seeing the prompt and itself only, so that the prompt is read once.
    """
    batch = data.prompt_batch(samples, mode, vlm.cfg).to(next(vlm.parameters()).device)
    rows = batch.student
    B, T = rows.ids.shape
    tails = [
        [(k + 1, i, t) for k, ids in enumerate(each) for t, i in enumerate(ids[:-1])] for each in options
    ]
    tail = torch.full((B, max(map(len, tails)), 3), -1)  # which option, id, place in it: (B, W, 3)
    told = []  # row, place to predict from, token; options one after the other
    for b, each in enumerate(options):
        tail[b, : len(tails[b])] = torch.tensor(tails[b], dtype=torch.long).view(-1, 3)
        behind = iter(range(T, T + len(tails[b])))
        told += [(b, next(behind) if t else T - 1, i) for ids in each for t, i in enumerate(ids)]
    who, ids, place = tail.to(rows.ids.device).unbind(-1)  # each (B, W)
    x = torch.cat([vlm.splice(rows, vlm.bank(batch)), vlm.decoder.embed(ids.clamp(0))], 1)  # (B, T + W, D)
    positions = torch.cat([rows.positions, rows.positions[:, -1:] + 1 + place], 1)
    who = torch.cat([rows.doc_ids, who], 1)  # 0 in the prompt
    mask = ((who[:, :, None] == who[:, None]) | (who[:, None] == 0)).tril()  # (B, T + W, T + W)
    hidden, _ = vlm.decoder.hidden(x, positions, mask[:, None])
    row, place, token = torch.tensor(told, device=x.device).unbind(-1)  # each (R,)
    logits = vlm.decoder.head(hidden[row, place]).float().log_softmax(-1)  # (R, N)
    each = iter(logits.gather(1, token[:, None])[:, 0].cpu().split([len(ids) for o in options for ids in o]))
    return [np.array([next(each).sum() for _ in o]) for o in options]


@torch.no_grad()
def score_text(vlm, tokenizer, task: Task, mode: str, cfg: EvalConfig) -> dict:
    """Mean negative log-likelihood of a token in nats, the end token too: lower is better. Its standard error
    is that of a ratio, documents drawn at random.
    """
    records = [data.Record("text", [question.text], []) for question in task.questions]
    samples = [(data.pieces_of(record, tokenizer), data.load_images([], vlm.cfg)) for record in records]
    samples.sort(key=lambda sample: sum(len(piece[0]) for piece in sample[0]))  # rows of similar length
    sums, counts = [], []
    for start in range(0, len(samples), cfg.batch_size):
        some = samples[start : start + cfg.batch_size]
        batch = data.make_batch(some, ["full"] * len(some), vlm.cfg, 0, vlm.cfg.decoder.context)
        batch = batch.to(next(vlm.parameters()).device)
        loss = F.cross_entropy(vlm(batch)[0], batch.student.targets, reduction="none")  # (R,)
        owner = batch.student.doc_ids.flatten()[batch.student.supervised]
        sums += torch.bincount(owner, loss, len(some)).tolist()
        counts += torch.bincount(owner, minlength=len(some)).tolist()
    mean = sum(sums) / sum(counts)
    error = len(sums) * standard_error([nll - mean * n for nll, n in zip(sums, counts)]) / sum(counts)
    return {
        "task": task.name, "metric": KINDS["text"][0], "score": round(mean, 4), "stderr": round(error, 4),
        "n": len(sums), "shots": 0, "tokens": "full", "blind_score": None, "chance": None,
    }  # fmt: skip


def option_letters(text: str) -> dict[str, str]:
    """Letter -> option of the lines "A. red" in a question: the last A and what follows it in order."""
    found = re.findall(r"^([A-Z])\. (.*)$", text, re.M)
    first = max((i for i, (letter, _) in enumerate(found) if letter == "A"), default=0)
    lines = zip(found[first:], string.ascii_uppercase)
    return dict(line for line, letter in itertools.takewhile(lambda each: each[0][0] == each[1], lines))


def score_answers(task: Task, answers: list[str]) -> list[float]:
    """One score for each question, 0..1 (CIDEr-D: 0..10)."""
    missing = next((q for q in task.questions if not q.answers), None)
    if missing:
        raise UserError(f"{task.path}: question {missing.name} of {task.name} has no right answer, others do")
    if task.kind == "caption":
        return cider_d(answers, [q.answers for q in task.questions])
    return [KINDS[task.kind][1](answer, question) for answer, question in zip(answers, task.questions)]


def print_table(results: list[dict]) -> None:
    head = f"\n{'task':<28}{'shots':>5}  {'tokens':<8}{'score':>7}{'±':>7}{'blind':>8}{'chance':>8}{'n':>7}"
    print(head + "  metric")
    for r in results:
        name = "  " + r["task"].partition("/")[2] if "/" in r["task"] else r["task"]
        blind, chance = ("–" if r[key] is None else f"{r[key]:.1f}" for key in ("blind_score", "chance"))
        digits = 1 if r["metric"] != KINDS["text"][0] else 3
        error = "–" if r["stderr"] is None else f"{r['stderr']:.{digits}f}"
        print(
            f"{name:<28}{r['shots']:>5}  {r['tokens']:<8}{r['score']:>7.{digits}f}{error:>7}"
            f"{blind:>8}{chance:>8}{r['n']:>7}  {r['metric']}"
        )


def git_commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def chat(vlm, tokenizer, cfg: EvalConfig) -> None:
    """Ask about one picture; earlier questions and answers stay in the context. An empty line ends."""
    picture = data.load_sample([], [Path(cfg.chat)], vlm.cfg, "--chat")
    device = next(vlm.parameters()).device
    mode = "pruned" if cfg.tokens == "pruned" else "full"
    tokens = len(picture.slots(vlm.cfg, mode)[0])
    print(f"{cfg.chat}: {tokens} visual tokens. Ask; an empty line ends.")
    history = []
    while question := ask_line():
        sample = picture._replace(pieces=data.prompt_pieces(question, 1, tokenizer, history))
        batch = data.prompt_batch([sample], mode, vlm.cfg).to(device)
        ids = vlm.generate(batch, tokenizer.end, 128, cfg.temperature, cfg.seed + len(history))[0]
        history.append((question, tokenizer.decode(ids).strip()))
        print(history[-1][1])


def ask_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


# ---------------------------------------------------------------------------------------------------------
# Scorers: pure functions from text to numbers

# --- VQA accuracy (VQAv2, TextVQA, VizWiz, OKVQA). Of the two normalisers in use we take EvalAI's everywhere.

VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # apostrophes, $ % & # * : ~ and curly quotes are left alone
VQA_NUMBERS = {"none": "0"}
VQA_NUMBERS |= {
    word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())
}

# An entry of the contraction table is one of these words with one apostrophe left out: dont -> don't,
# couldnt've and couldn'tve -> couldn't've (but not couldntve). The table's one slip, somebody'd -> somebodyd,
# is kept. Its I'm, I've and I'd've are not: words are lower-cased before the look-up, so "im" stays "im".
VQA_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
""".split()
VQA_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in VQA_CONTRACTED
    for i, letter in enumerate(word)
    if letter == "'"
}
VQA_CONTRACTIONS["somebody'd"] = "somebodyd"


def vqa_normalise(text: str, official: bool = False) -> str:
    """An answer as VQA scorers compare it: lower case, digits for number words, no articles or punctuation.

    Source: the EvalAI rules, as TextVQA and LLaVA apply them; `official=True` gives those of VQA-v2, which
    differ in 's, ? and commas only. Quirks kept: EvalAI turns "it's" into "it 's" and "yes,no" into "yesno";
    a mark beside a space anywhere is deleted everywhere, any other becomes a space (VQA-v2 deletes all marks
    once a comma stands between two digits); the first 32 periods go unless a digit follows.
    """
    if not official:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in VQA_PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        cleaned = cleaned.replace(mark, "" if beside_space or thousands else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=32)
    words = [VQA_NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(VQA_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(prediction: str, answers: list[str], official: bool = False) -> float:
    """Soft accuracy in 0..1 of one prediction against the answers of (usually ten) annotators.

    Source: Antol et al. 2015. Each annotator in turn is left out and min(1, matches among the others / 3) is
    averaged: with ten answers k = 0, 1, 2, 3, 4+ matches give 0, .3, .6, .9, 1. Other numbers of answers use
    the same formula, so below four nobody reaches 1 (two equal answers: 1/3); only a single answer, which
    leaves nothing to compare with, is plain equality. `official=True` has VQA-v2's quirk of comparing raw
    strings when all answers are identical: "Yes" against ten times "yes" is 0. No answers: ValueError.
    """
    if not answers:
        raise ValueError("vqa_accuracy needs at least one answer, this question has none")
    if not official or len(set(answers)) > 1:
        prediction = vqa_normalise(prediction, official)
        answers = [vqa_normalise(answer, official) for answer in answers]
    n, k = len(answers), answers.count(prediction)
    if n == 1:
        return float(k)
    return (k * min(1, (k - 1) / 3) + (n - k) * min(1, k / 3)) / n


# --- Yes or no (POPE, MME)
def yesno_parse(text: str) -> str:
    """'yes' or 'no' by POPE's rule: 'no' if No, no or not is a word before the first period, otherwise 'yes'.

    Quirks kept: case matters and words are split at single spaces only, so "NO", "Not", "Nope", "isn't",
    a no followed by a newline and the empty string are all 'yes'.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "no", "not") for word in words) else "yes"


def yesno_metrics(predictions: list[str], labels: list[str]) -> dict[str, float]:
    """accuracy, precision, recall, f1 and yes_ratio, all in 0..1, with 'yes' as the positive class (POPE).

    predictions: the model's raw texts, parsed here; labels: yes or no in any case, in that order. The
    yes_ratio is the predictions'. A ratio over nothing is 0. Unequal lengths or other labels: ValueError.
    """
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions but {len(labels)} labels")
    truths = [label.strip().lower() for label in labels]
    if not set(truths) <= {"yes", "no"}:
        raise ValueError(f"labels must be yes or no, found also {sorted(set(truths) - {'yes', 'no'})}")
    pairs = Counter(zip(map(yesno_parse, predictions), truths, strict=True))
    hits = pairs["yes", "yes"]
    said_yes = hits + pairs["yes", "no"]
    precision = hits / max(1, said_yes)
    recall = hits / max(1, hits + pairs["no", "yes"])
    return {
        "accuracy": (hits + pairs["no", "no"]) / max(1, len(truths)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": said_yes / max(1, len(truths)),
    }


MME_CATEGORIES = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split(),
}


def mme_parse(text: str) -> str:
    """'yes', 'no' or 'other' by MME's rule: a lone y or n, else what the first four characters contain.

    Source: lmms-eval; case, outer spaces and all periods are dropped first. Quirks
    kept: yes is looked for before no; "nothing" and "Know" are 'no', "The answer is yes" and "Yep" 'other'.
    """
    text = text.lower().strip().replace(".", "")
    head = {"y": "yes", "n": "no"}.get(text, text[:4])
    return next((answer for answer in ("yes", "no") if answer in head), "other")


def mme_score(rows: list[dict]) -> dict:
    """MME's points: {category: {acc, acc_plus, score}}, and the sums "perception" and "cognition".

    rows: category, question_id (the same for an image's two questions), gt (yes or no), pred (the raw text).
    acc is the % of questions right, acc_plus the % of images with both right, score their sum; the two totals
    add up the categories that occur, to at most 2000 and 800 points. Another category or gt, or an image
    without two questions: ValueError.
    """
    hits = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        truth = row["gt"].lower().strip().replace(".", "")
        if truth not in ("yes", "no") or row["category"] not in sum(MME_CATEGORIES.values(), []):
            raise ValueError(f"expected yes or no in one of MME's 14 categories, got {row}")
        hits[row["category"]][row["question_id"]].append(mme_parse(row["pred"]) == truth)
    scores = {}
    for category, images in hits.items():
        for image, pair in images.items():
            if len(pair) != 2:
                raise ValueError(f"MME asks two questions about an image, {category} {image} has {len(pair)}")
        acc = 100 * sum(map(sum, images.values())) / (2 * len(images))
        acc_plus = 100 * sum(map(all, images.values())) / len(images)
        scores[category] = {"acc": acc, "acc_plus": acc_plus, "score": acc + acc_plus}
    for name, categories in MME_CATEGORIES.items():
        scores[name] = sum(scores[category]["score"] for category in categories if category in scores)
    return scores


# --- Multiple choice
def choice_parse(text: str, options: list[str]) -> str | None:
    """The letter a free text chooses among options ("A" is options[0]), or None, to be counted as wrong.

    The rule is ours (LLaVA, MMBench, SEED and MMMU each have another). The first step to give a letter wins:
    1. the text is one letter, in any case or brackets: B, b, (B), B.
    2. it starts with a capital and a mark: "B. blue", "(B) blue", "B: blue", "B, because", but not "B, C"
    3. "answer is B" or "Answer: B"; an A must be followed by a mark or the end, since "a" is also a word
    4. exactly one option's text occurs, as whole words in any case ("dark green" does not count as "green")
    "A and B" and "blue or red" give None, and so does a letter beyond the options. It never guesses.
    """
    letters = string.ascii_uppercase[: len(options)]
    alone = re.findall(r"^\W*([A-Za-z])\W*$", text)
    marked = re.findall(r"^\W*([A-Z])(?:[.:)\]](?!\w)|,(?!\W*[A-Z]\b))", text)
    stated = re.findall(r"(?i:\banswer(?: is|:))\W*([B-Z]\b(?!')|A(?=[.:),;]|\W*$))", text)
    for found in (alone, marked, stated):
        letter = found[0].upper() if len(set(found)) == 1 else ""
        if letter and letter in letters:
            return letter
    wanted = [" ".join(option.lower().split()) for option in options]
    longest_first = sorted(wanted, key=len, reverse=True)  # so that "dark green" is tried before "green"
    pattern = r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)"
    said = set(re.findall(pattern, " ".join(text.lower().split()))) - {""}
    chosen = [letter for letter, option in zip(letters, wanted, strict=False) if option in said]
    return chosen[0] if len(chosen) == 1 else None


def scienceqa_parse(text: str, n: int) -> str | None:
    """The letter of an answer to a ScienceQA question with n choices by LLaVA's rule, or None (wrong).

    The text is one of A-E, or starts with "A. ", or holds exactly one "The answer is A" and one character
    more (the rule's period is a regex dot). Quirks kept: no strip and no lower case, so " A", "a", "(A)" and
    "A." alone fail, as does a final "The answer is C" without a period. A letter beyond n or beyond E: None.
    """
    start = re.match(r"([A-E])(?:\. |\Z)", text)
    found = [start[1]] if start else re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 and found[0] in "ABCDE"[:n] else None


MMBENCH_SHAPES = "{} {}. {}, {}: {}) {}). ({}) ({}). :{} :{}, :{}. :{}) :{}).".split()


def mmbench_parse(text: str, options: list[str]) -> str | None:
    """The letter a text chooses by MMBench's rule without a judge, or None, to be counted as wrong.

    Source: lmms-eval's evaluator, up to where it would ask GPT. The first step to give one letter wins:
    1. for each shape (B, "B.", "B,", ... "(B)", ":B") in turn: exactly one of A-E is a word of that shape
    2. exactly one option's text occurs in the lower-cased text, even inside a word
    Quirks kept: E counts even where there are four options (never right, but then no option's text is tried);
    a bare A among more than three words is taken for the article.
    """
    words = text.split()
    for shape in MMBENCH_SHAPES:
        found = [letter for letter in "ABCDE" if shape.format(letter) in words]
        article = shape == "{}" and found == ["A"] and len(words) > 3
        if len(found) == 1 and not article:
            return found[0]
    lettered = zip(string.ascii_uppercase, options, strict=False)
    said = [letter for letter, option in lettered if option.lower() in text.lower()]
    return said[0] if len(said) == 1 else None


def mmbench_circular(groups: list[list[bool]]) -> float:
    """MMBench's circular accuracy, 0..1: the share of questions right in every rotation of the options.

    groups: for each question one flag a rotation. Nothing to score is 0.
    """
    return sum(map(all, groups)) / max(1, len(groups))


MMMU_MARKS = ",.!?;:'"
MMMU_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
MMMU_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.2e3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_parse(text: str, options: list[str]) -> str | None:
    """The letter a text chooses by MMMU's rule, or None where MMMU's script draws one at random.

    Each of , . ! ? ; : ' is stripped once, in that order. The first shape that occurs gives the candidates:
    "(B)", "B ", "B.", then, in texts of more than five words, an option's text in any case. Of several the
    one said last wins. Quirks kept: "B " needs no space before it, so "DNA helix" says A; candidates of the
    second and third shape are placed by " B " alone, and where that is nowhere the first letter wins; "B)",
    "b" and a short "blue" give None.
    """
    letters = string.ascii_uppercase[: len(options)]
    for mark in MMMU_MARKS:
        text = text.strip(mark)
    text = f" {text} "
    for shape, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if shape.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    places = [text.lower().rfind(option.lower()) for option in options]
    if max(places, default=-1) < 0 or len(text.split()) <= 5:
        return None
    return letters[places.index(max(places))]


def mmmu_normalise(text: str) -> list[str | float]:
    """What MMMU compares: a number rounded to two places, or lower case; a lone character needs a space."""
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.strip().lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def mmmu_values(text: str) -> list[str | float]:
    """What an open answer says by MMMU's rule: the tails of its lines after a cue, and all numbers in them.

    A line's tail is the shortest text after a cue ("is ", "answer ", ..., in the last line also "="); without
    any, the whole text is taken. Quirks kept: a cue also counts inside a word ("this "), and 1,234.5 is read
    as the two numbers 1234 and 234.5.
    """
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    tails = []
    for i, line in enumerate(lines):
        best = ""
        for cue in (*MMMU_CUES, "=") if i == len(lines) - 1 else MMMU_CUES:
            tail = line.split(cue)[-1].strip()
            if cue in line and (not best or len(tail) < len(best)):
                best = tail
        if best and best not in tuple(MMMU_MARKS):
            tails.append(best)
    said = tails or [text]
    numbers = [number for tail in said for pattern in MMMU_NUMBERS for number in re.findall(pattern, tail)]
    return sorted({value for part in said + numbers for value in mmmu_normalise(part)}, key=str)


def mmmu_open(text: str, golds: list[str]) -> bool:
    """Whether an open answer is right by MMMU's rule: a gold lies within a text it gives, or is its number.

    Numbers are rounded to two places; see `mmmu_values`. Quirks kept: a gold "no" is right where the text
    says "unknown"; number words are no numbers.
    """
    wanted = [value for gold in golds for value in mmmu_normalise(gold)]
    return any(
        gold in value if isinstance(gold, str) and isinstance(value, str) else gold == value
        for value in mmmu_values(text)
        for gold in wanted
    )


MMSTAR_NAMES = "answer/correct answer/best answer/correct option/best option/choice/correct choice".split("/")
MMSTAR_PHRASES = [f"{the}{name} is" for name in MMSTAR_NAMES for the in ("", "the ")]
MMSTAR_PHRASES += ["i choose", "i select", "i pick", "my answer is", "my choice is"]
MMSTAR_PHRASES += ["옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"]


def mmstar_parse(text: str, letters: str = "ABCD") -> str | None:
    """The letter a text chooses by the rule lmms-eval has for MMStar, or None, to be counted as wrong.

    The first format that occurs wins, and in it the letter said last: at the start, at the end (no letter
    beside it), after a phrase like "answer is", "(B)", "B.", "B:", "B)", "B ", anywhere. Case matters. Quirks
    kept: "A dog" says A; after the first place of each phrase a letter counts where it first occurs, inside
    words too, so "the answer is B. A cat" says A; "plan D" at the end beats "the answer is A".
    """
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    words, text = text.strip(), f" {text} "
    lower = text.lower()
    after = [lower.find(phrase) + len(phrase) for phrase in MMSTAR_PHRASES if phrase in lower]
    formats = [
        [(0, x) for x in letters if words[:1] == x and not words[1:2].isalpha()],
        [(0, x) for x in letters if words[-1:] == x and not words[-2:-1].isalpha()],
        [(text.find(x, start), x) for start in after for x in letters],
    ]
    for shape in ("({})", "{}.", "{}:", "{})", "{} ", "{}"):
        formats.append([(text.rfind(shape.format(x)), x) for x in letters])
    for found in formats:
        place, letter = max(found, default=(-1, None))
        if place >= 0:
            return letter
    return None


# --- Short answers (GQA, DocVQA, ChartQA)
def gqa_match(prediction: str, answer: str) -> bool:
    """Whether a prediction, without final periods and in lower case, is GQA's answer (as LLaVA has it)."""
    return prediction.rstrip(".").lower() == answer


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: how many insertions, deletions and substitutions of a character turn a into b."""
    row = list(range(len(b) + 1))  # distances from the part of a read so far to each beginning of b
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def anls(prediction: str, answers: list[str], strict: bool = False) -> float:
    """Normalised Levenshtein similarity to the nearest answer, 0..1, and 0 below one half (DocVQA).

    Source: Biten et al. 2019, as in lmms-eval. Lower case and single spaces are compared.
    Quirks kept: the distance is divided by the longer of the strings as given, spaces and all; a similarity
    of exactly 0.5 stays, where the paper's formula, `strict=True`, gives 0. No answers: ValueError.
    """
    if not answers:
        raise ValueError("anls needs at least one answer, this question has none")
    tidy, *wanted = (" ".join(text.lower().split()) for text in (prediction, *answers))
    distances = [
        edit_distance(tidy, short) / (max(len(prediction), len(answer)) or 1)
        for short, answer in zip(wanted, answers, strict=True)
    ]
    score = 1 - min(distances)
    return score if score > 0.5 or (score == 0.5 and not strict) else 0.0


def chart_number(text: str) -> float | None:
    """The number a text is, as Python reads it, or None; a final % divides by 100."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(prediction: str, target: str) -> bool:
    """ChartQA's relaxed accuracy: numbers may be off by 5 % of the target, all else must agree but for case.

    Source: Masry et al. 2022, as in lmms-eval. Quirks kept: a comma or $ makes a text of a number ("2,000" is
    not 2000); 0.5 is 50%, but 50 is not; years are numbers (2019 is right for 2010); a target of zero is
    compared as text, so "0.0" is wrong for "0".
    """
    guess, truth = chart_number(prediction), chart_number(target)
    if guess is not None and truth:
        return abs(guess - truth) / abs(truth) <= 0.05
    return prediction.lower() == target.lower()


# --- Captions (CIDEr-D, BLEU-4). A score is one of the whole set: that of a subset is not comparable.

PTB_BRACKETS = str.maketrans(
    {"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- "}
)
PTB_REWRITES = (  # applied in this order to lower-cased text
    (r"[\u2018\u2019]", "'"),
    (r"\b([a-z])\.{2,}", r"\1. "),  # "a..." is read as the initial "a." and the rest of an ellipsis
    (r"\.{2,}|--+|[\"`;!?\u201c\u201d\u2026\u2013\u2014]", " "),
    (r"(?<!\d)[,:](?!//)|[,:](?!\d|//)", " "),  # stays in 12:30, 1,000 and http://
    (r"(?<=\d)'(?=\d)", " "),  # 5'6
    (r"(?<=\d:\d\d)(?=[ap]m\b)", " "),  # 12:30pm, but 10am stays whole
    (r"\bno\.(?!\s*\d)", "no "),  # "no. 5" keeps its period
    (r"([#$%&*=+]|(?<!\w)@|@(?!\w))", r" \1 "),  # a@b.com stays whole
)
PTB_ABBREVIATION = re.compile(
    r"(?:[a-z]\.)+|(?:mr|mrs|ms|dr|jr|sr|prof|capt|lt|gen|gov|sen|rev|st|ave|blvd|rd|mt|ft|no|vs|etc|est|"
    r"inc|co|corp|ltd|bros|dept|jan|feb|mar|apr|aug|sept|oct|nov|dec|mon|tue|wed|thu|fri)\."
)
PTB_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|re|ve|ll|d))(?=$|')")
PTB_TWO_PARTS = {
    part.replace(" ", ""): part for part in ("can not", "gon na", "got ta", "wan na", "gim me", "lem me")
}


def ptb_tokenize(text: str) -> list[str]:
    """A caption as COCO's scorers see it: lower-case Penn Treebank tokens without punctuation.

    Stands in for the Java tokenizer of coco-caption (CoreNLP 3.4.1): the same on nearly all captions, not on
    every odd string. Quirks kept: brackets stay as -lrb- and the like; "mr." and "u.s." keep their period.
    """
    text = text.lower().translate(PTB_BRACKETS)
    for pattern, replacement in PTB_REWRITES:
        text = re.sub(pattern, replacement, text)
    tokens = []
    for word in text.split():
        if word not in ("'s", "'m", "'re", "'ve", "'ll", "'d"):
            word = word.strip("'")
        if word.endswith(".") and not PTB_ABBREVIATION.fullmatch(word):
            word = word[:-1].strip("'")
        tokens += PTB_TWO_PARTS.get(word, PTB_CLITIC.sub(r" \1", word)).split()
    return [token for token in tokens if token != "-"]


def ngram_counts(text: str) -> Counter:
    """How often each n-gram (a tuple of n = 1..4 tokens) occurs in a caption."""
    words = ptb_tokenize(text)
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def caption_counts(
    candidates: list[str], references: list[list[str]]
) -> tuple[list[Counter], list[list[Counter]]]:
    """The n-gram counts of both. Unequal lengths, or an item without references: ValueError."""
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidate captions but {len(references)} lists of references")
    if [] in references:
        raise ValueError(f"caption item {references.index([])} has no references")
    groups = [[ngram_counts(text) for text in group] for group in references]
    return [ngram_counts(text) for text in candidates], groups


def cider_similarity(candidate: Counter, reference: Counter, items_with: Counter, items: int) -> float:
    """Clipped tf-idf cosine of two captions, 0..1, averaged over n and damped by their difference in length.

    items_with: in how many of the items an n-gram occurs. Sigma is 6; length is counted in bigrams.
    """
    cosines = []
    for n in range(1, 5):
        ours, theirs = (
            {
                gram: k * math.log(items / max(1, items_with[gram]))
                for gram, k in counts.items()
                if len(gram) == n
            }
            for counts in (candidate, reference)
        )
        dot = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs)
        cosines.append(dot / (math.hypot(*ours.values()) * math.hypot(*theirs.values()) or 1.0))
    bigrams = [sum(k for gram, k in counts.items() if len(gram) == 2) for counts in (candidate, reference)]
    gap = bigrams[0] - bigrams[1]
    return sum(cosines) / 4 * math.exp(-(gap**2) / (2 * 6**2))


def cider_d(candidates: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D of each candidate caption against its references, 0..10; papers report 100 times the mean.

    Source: Vedantam et al. 2015 and coco-caption; idf comes from these references. Quirks kept: a lone item
    has 0, a perfect caption of three words 7.5 (no 4-gram). Unequal lengths, an item without any: ValueError.
    """
    counted, groups = caption_counts(candidates, references)
    items_with = Counter(gram for group in groups for gram in set().union(*group))
    scores = []
    for candidate, group in zip(counted, groups, strict=True):
        alike = [cider_similarity(candidate, reference, items_with, len(groups)) for reference in group]
        scores.append(10 * sum(alike) / len(group))
    return scores


def bleu4(candidates: list[str], references: list[list[str]]) -> float:
    """Corpus BLEU-4 of captions, 0..1: hits are summed over the set before precisions are taken.

    Source: Papineni et al. 2002 and coco-caption: an n-gram counts at most as often as in one reference, and
    brevity is measured against the reference nearest in length, the shorter of two. Quirks kept: 1e-15 is
    added to a count of hits and 1e-9 to what divides it, so no hits give not quite 0, and a set of perfect
    captions of three words (no 4-gram) only 0.03. Unequal lengths, an item without references: ValueError.
    """
    hits, tries, reference_length = Counter(), Counter(), 0
    for candidate, group in zip(*caption_counts(candidates, references), strict=True):
        most = Counter()
        for reference in group:
            most |= reference
        hits.update(map(len, (candidate & most).elements()))  # by n
        tries.update(map(len, candidate.elements()))
        length, *lengths = (Counter(map(len, counts.elements()))[1] for counts in (candidate, *group))
        reference_length += min(lengths, key=lambda other: (abs(other - length), other))
    tiny, small = 1e-15, 1e-9
    precisions = [(hits[n] + tiny) / (tries[n] + small) for n in range(1, 5)]
    ratio = (tries[1] + tiny) / (reference_length + small)
    return math.prod(precisions) ** 0.25 * math.exp(min(0.0, 1 - 1 / ratio))


# --- Boxes (RefCOCO)
def parse_box(text: str) -> tuple[int, int, int, int] | None:
    """The first four numbers of a text as (x1, y1, x2, y2), in thousandths of the image's sides, or None.

    Each must be an integer in 0..999, whatever stands around it; digits glued to a letter (the 1 of "x1=20")
    are no number. Corners stay as they are: a box with x2 < x1 is returned and has no area.
    """
    numbers = re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", text)[:4]
    if len(numbers) < 4 or not all(re.fullmatch(r"\d{1,3}", number) for number in numbers):
        return None
    return tuple(map(int, numbers))


def box_area(box: tuple[int, int, int, int]) -> int:
    """Area with continuous edges, (x2 - x1) * (y2 - y1) without + 1; 0 where corners are swapped."""
    return max(0, box[2] - box[0]) * max(0, box[3] - box[1])


def box_iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection over union of two (x1, y1, x2, y2) boxes, 0..1; 0 if both are empty."""
    shared = box_area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return shared / (box_area(a) + box_area(b) - shared or 1)


def box_hit(prediction: str, answer: str, threshold: float = 0.5) -> float:
    """1.0 if the box in a text has IoU >= threshold with the answer's, else 0.0; its mean is accuracy.

    Some papers ask for more than 0.5, we for 0.5 or more. An answer without a box: ValueError.
    """
    truth = parse_box(answer)
    if truth is None:
        raise ValueError(f"expected four integers 0-999 (x1 y1 x2 y2) as the answer, got {answer!r}")
    box = parse_box(prediction)
    return float(box is not None and box_iou(box, truth) >= threshold)


def standard_error(scores: list[float]) -> float:
    """Standard error of the mean, in the scores' unit, 0 below two items. Rough for CIDEr-D (shared idf)."""
    n = len(scores)
    mean = sum(scores) / max(1, n)
    return math.sqrt(sum((score - mean) ** 2 for score in scores) / (n - 1) / n) if n > 1 else 0.0


# ---------------------------------------------------------------------------------------------------------
# The report: one page that opens offline. What comes from data or the model goes through `quote`, and the
# page's own policy forbids to run or to fetch anything. Canvas and CanvasText follow prefers-color-scheme.

quote = html.escape
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
DASHES = ("none", "6 3", "2 3", "9 3 2 3")  # together with the hue: no curve is told apart by colour alone
CSS = """
:root { color-scheme: light dark; --c0: #3b7fe0; --c1: #d0701f; --c2: #1f9483; --c3: #9560cc;
  --soft: color-mix(in srgb, CanvasText 65%, Canvas); --line: color-mix(in srgb, CanvasText 14%, Canvas) }
body { margin: 0 auto; max-width: 1000px; padding: 24px 20px 64px; background: Canvas; color: CanvasText;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 26px; margin: 0 } h2 { font-size: 18px; margin: 40px 0 4px } b { font-weight: 600 }
p, small, dt, th, figcaption { color: var(--soft); font-size: 13px; margin: 0 } dl, dd, figure { margin: 0 }
.grid { display: grid; gap: 16px; margin-top: 14px } img, svg { display: block; width: 100% }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin-top: 12px }
td, th { padding: 3px 0 3px 16px; white-space: nowrap; text-align: right; font-weight: normal }
.left { text-align: left; padding-left: 0 } td:has(.bar) { width: 40%; min-width: 160px }
.first td { border-top: 1px solid var(--line); padding-top: 8px } .part [rowspan] { padding-left: 20px }
[rowspan] { vertical-align: top; padding-right: 14px } .key { text-indent: -18px }
.key i { display: inline-block; margin: -3px 6px 0 18px; vertical-align: middle }
i { height: 12px; width: 22px; border-radius: 3px } .bar i { position: absolute; left: 0 }
.bar { height: 12px; border-radius: 3px; background: var(--line); position: relative }
.seen { background: var(--c0) } .unseen { background: color-mix(in srgb, var(--c0) 45%, Canvas) }
.bar .blind { margin: -2px -1px } i.blind { height: 16px; width: 2px; background: CanvasText }
i.chance { height: 22px; width: 0; border-left: 3px dotted var(--c1) } .bar .chance { margin: -5px -1px }
.card { border: 1px solid var(--line); border-radius: 8px; overflow: hidden } .card b { float: right }
.card div { padding: 8px 12px 12px } figure img { border-radius: 6px } .axis { stroke: var(--line) }
.card .answer { font-size: 15px; font-weight: 600; color: CanvasText; max-height: 15em; overflow: auto }
.good { color: color-mix(in srgb, #0c9a55 75%, CanvasText) } text { fill: var(--soft); font-size: 11px }
.bad { color: color-mix(in srgb, #e03c2c 80%, CanvasText) } polyline { fill: none; stroke-width: 2 }
.row { font-weight: 600; margin: 18px 0 -6px }
figcaption svg { display: inline; width: 24px; height: 8px; margin: 0 6px 0 16px; stroke-width: 2 }
"""


def write_report(
    path: Path, title: str, facts: list[tuple[str, str]], results: list[dict], examples: list[dict],
    curves: dict[str, dict[str, list[tuple[float, float]]]], overlays: list[dict],
    scales: list[tuple[str, list[dict]]],
) -> None:  # fmt: skip
    """Everything a run has to show, on one page. What is empty leaves its section out."""
    told = [f"<dl><dt>{quote(str(k))}</dt><dd>{quote(str(v))}</dd></dl>" for k, v in facts]
    body = f"<h1>{quote(title)}</h1>" + html_grid("", told, 165) + html_results(results)
    body += html_scales(scales)
    body += html_grid("What the decoder sees: the bright patches", [html_overlay(o) for o in overlays], 215)
    body += html_grid("Examples", [html_card(e) for e in examples], 215)
    body += html_grid("Training, log scale over steps", [html_chart(*c) for c in curves.items()], 420)
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += f'<meta name="viewport" content="width=device-width"><title>{quote(title)}</title>'
    page = f'<!doctype html><html lang="en"><head>{head}<style>{CSS}</style></head><body>{body}</body></html>'
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace")  # an answer may hold half a surrogate pair
    os.replace(temporary, path)


def html_grid(heading: str, cells: list[str], width: int) -> str:
    """A section of equal columns, at least `width` pixels wide each; nothing where there are no cells."""
    columns = f"grid-template-columns: repeat(auto-fill, minmax(min({width}px, 100%), 1fr))"
    grid = f'<h2>{heading}</h2><div class="grid" style="{columns}">{"".join(cells)}</div>'
    return grid.removeprefix("<h2></h2>") if any(cells) else ""


def html_image(image: Image.Image, alt: str, most: int = 320) -> str:
    """A picture that carries its own bytes; photos are shrunk, or fifty of them would make a heavy page."""
    image = image.convert("RGB")  # also a copy, as thumbnail works in place
    image.thumbnail((most, most))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    code = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{quote(alt)}" src="data:image/png;base64,{code}">'


def html_results(results: list[dict]) -> str:
    """A row with a bar for every result; full and pruned of one task and number of shots stand together."""
    groups = {}
    for r in sorted(results, key=lambda r: r["tokens"]):  # full before pruned, else in the order given
        groups.setdefault((r["task"], r["shots"]), []).append(r)
    rows = "".join(html_row(group, i) for group in groups.values() for i in range(len(group)))
    key = '<i class="unseen"></i>score up to blind<i class="seen"></i>what looking adds'
    key += '<i class="chance"></i>chance<i class="blind"></i>blind: same questions, other pictures'
    head = '<th class="left">task<th class="left">tokens<th><th>score<th>blind<th>chance<th>questions'
    table = f'<div style="overflow-x: auto"><table><tr>{head}</tr>{rows}</table></div>'
    return f'<h2>Results</h2><p class="key">{key}</p>{table}' if rows else ""


def html_row(group: list[dict], i: int) -> str:
    """Row i of a group; the first one also names the group."""
    r = group[i]
    base, _, part = quote(r["task"]).partition("/")
    top = 100 * max(1, math.ceil(max(g["score"] for g in group) / 100))  # CIDEr-D may exceed 100
    about = [quote(r["metric"])] + ["lower is better"] * (r["metric"] == KINDS["text"][0])
    about += [f"{r['shots']}-shot"] * (r["shots"] > 0) + [f"bar to {top}"] * (top > 100)
    name = part or f"<b>{base}</b><br><small>{', '.join(about)}</small>"
    row = "" if i else f'<td class="left" rowspan="{len(group)}">{name}</td>'
    row += f'<td class="left"><small>{quote(r["tokens"])}</small></td><td><div class="bar">'
    score, blind, chance = values = r["score"], r.get("blind_score"), r.get("chance")
    marks = (("seen", score), ("unseen", min(score, blind or 0)), ("chance", chance), ("blind", blind))
    loss = r["metric"] == KINDS["text"][0]  # no share of 100, and lower is better: no bar
    for mark, value in () if loss else marks:
        side = "width" if "seen" in mark else "left"
        if value is not None:
            row += f'<i class="{mark}" style="{side}: {max(0, min(100, 100 * value / top)):.1f}%"></i>'
    digits = 3 if loss else 1
    score, blind, chance = ("–" if value is None else f"{value:.{digits}f}" for value in values)
    error = "" if r["stderr"] is None else f"± {r['stderr']:.{digits}f}"
    row += f"</div></td><td><b>{score}</b> <small>{error}</small></td>"
    row += f"<td>{blind}</td><td>{chance}</td><td>{r['n']:,}</td>"
    return f'<tr class="{"part" if part else "" if i else "first"}">{row}</tr>'


def html_card(e: dict) -> str:
    """One picture, question and answer. A sign and a word tell the verdict; colour only repeats it."""
    kind, verdict = ("good", "✓ right") if e["score"] > 0.999 else ("bad", "✗ wrong")
    if 0 < e["score"] <= 0.999:
        kind, verdict = "", f"◐ {100 * e['score']:.0f} %"
    right = list(dict.fromkeys(e["right"]))[:3] or ["–"]
    known = "reference: " + right[0] if len(right[0]) > 40 else "right: " + " / ".join(right)
    text = f'<b class="{kind}">{verdict}</b><small>{quote(e["task"])}</small><p>{quote(e["question"])}</p>'
    text += f'<p class="answer">{quote(e["answer"]) or "–"}</p><p>{quote(known)}</p>'
    picture = html_image(e["image"], e["question"]) if e["image"] else ""
    return f'<div class="card">{picture}<div>{text}</div></div>'


def html_overlay(o: dict) -> str:
    """The picture under its patch grid, perhaps its windows, each patch as bright as its weight."""
    S = len(o["weight"])
    patch = max(8, 288 // S)  # whole pixels a patch
    light = np.kron(0.2 + 0.8 * o["weight"], np.ones((patch, patch)))[..., None]  # (S*patch, S*patch, 1)
    pixels = light * np.asarray(o["image"].convert("RGB").resize((S * patch, S * patch)))
    for side, share, colour in ((1, 0.15, 128), (o.get("window", S), 0.7, (59, 127, 224))):
        for edge in (np.s_[side * patch :: side * patch], np.s_[:, side * patch :: side * patch]):
            pixels[edge] = (1 - share) * pixels[edge] + share * np.array(colour)
    picture = html_image(Image.fromarray(pixels.astype(np.uint8)), o["label"], S * patch)
    return f"<figure>{picture}<figcaption>{quote(o['label'])}</figcaption></figure>"


def html_scales(rows: list[tuple[str, list[dict]]]) -> str:
    """A row of overlays, coarse to fine, for each model: before and after scaling."""
    told = """Attention of each scale's last block, mean over heads and over the tokens of a window.
        Brightness: 60 % even over the window's patches, 100 % four times that or more, 20 % a quarter
        or less. Blue lines part windows. Spread: 1 / sum of squares, mean over tokens."""
    cells = [(quote(label), html_grid("", [html_overlay(o) for o in row], 280)) for label, row in rows]
    grids = "".join(f'<p class="row">{label}</p>{grid}' for label, grid in cells)
    return f"<h2>Where each scale looks</h2><p>{told}</p>{grids}" if rows else ""


def html_chart(name: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    """One stage's curves over steps, on a logarithmic axis that CE, KL and the steep start can share."""
    lines = {label: [p for p in points if 0 < p[1] < math.inf] for label, points in lines.items()}
    every = np.array([point for points in lines.values() for point in points])
    if not len(every):
        return ""
    (x0, low), (x1, high) = every.min(0), every.max(0)
    x1, low = max(x1, x0 + 1), max(low, high / 1000)  # what is smaller lies on the floor
    round_numbers = [m * 10.0**e for e in range(-40, 40) for m in (1, 2, 5)]
    y0, y1 = max(t for t in round_numbers if t <= low), min(t for t in round_numbers if t > high)
    ticks = [t for t in round_numbers if y0 <= t <= y1]
    stride = next(t for t in round_numbers if t >= max(1, (x1 - x0) / 5))

    def place(x: float, y: float) -> tuple[float, float]:
        return 44 + 414 * (x - x0) / (x1 - x0), 214 - 206 * max(0, math.log(y / y0)) / math.log(y1 / y0)

    svg, legend = "", f"<b>{quote(name)}</b>"
    for t in ticks if len(ticks) < 9 else ticks[::3]:
        y = place(x0, t)[1]
        svg += f'<path class="axis" d="M44 {y}H458"/><text x="38" y="{y + 4}" text-anchor="end">{t:g}</text>'
    for t in np.arange(math.ceil(x0 / stride), x1 / stride + 1e-9) * stride:
        svg += f'<text x="{place(t, y0)[0]}" y="232" text-anchor="middle">{t:,.0f}</text>'
    for i, (label, points) in enumerate((label, points) for label, points in lines.items() if points):
        parts = np.array_split(points, min(len(points), 100))  # a long noisy curve is drawn as 100 means
        spots = [place(*part.mean(0)) for part in parts]
        style = f'style="stroke: var(--c{i % 4}); stroke-dasharray: {DASHES[i % 4]}"'
        svg += f'<polyline {style} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in spots)}"/>'
        for x, y in spots if len(spots) < 20 else []:  # what is measured rarely shows when
            svg += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill: var(--c{i % 4})"/>'
        legend += f'<svg viewBox="0 0 24 8"><path d="M0 4H24" {style}/></svg>{quote(label)}'
        legend += f" {points[-1][1]:.3g}"
    return f'<figure><figcaption>{legend}</figcaption><svg viewBox="0 0 480 238">{svg}</svg></figure>'


def make_report(path: Path, vlm, step: Path, summary: dict, examples: list[dict]) -> None:
    """report.html: scores, examples, where scales look, what pruners keep, and the loss curves of this run
    and the one it came from.
    """
    train = model.read_json(step / "config.json")["train"]
    curves, facts, folder = {}, [], step.parent if step.name.startswith("step-") else step
    while folder and (folder / "metrics.jsonl").is_file():
        config = model.read_json(folder / "config.json")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logged = [line for line in lines if "step" in line]
        names = [name for name in ("ce" if config["stage"] == "sft" else "loss", "kl", "val_loss")]
        series = {name: [(line["step"], line[name]) for line in logged if name in line] for name in names}
        curves = {f"{config['stage']}: {folder}": {k: v for k, v in series.items() if v}, **curves}
        for line in lines:
            if "scale" in line:
                told = ", ".join(f"{k[5:]} {v:.3f}" for k, v in line.items() if k.startswith("loss "))
                facts.append((f"loss on stage-1 data at the hand-over ({line['scale']})", told))
        init = config["train"]["init"]
        folder = (Path(init).parent if Path(init).name.startswith("step-") else Path(init)) if init else None
    size, pruned = data.square_tokens(vlm.cfg), data.square_tokens(vlm.cfg, "pruned")
    facts = [
        ("checkpoint", summary["model"]),
        ("commit", summary["commit"]),
        ("seed of the run, of the questions", f"{train['seed']}, {summary['seed']}"),
        ("prompt template, scoring", f"{summary['prompt']}, {summary['scoring']}"),
        ("visual tokens of an image", f"{size} full, {pruned} pruned (isolator included)"),
        *facts,
    ]
    for shown in examples:
        image = shown["image"]
        if image is not None:
            shown["image"] = data.render(image) if isinstance(image, data.Scene) else data.open_image(image)
    pictures = [shown["image"] for shown in examples if shown["image"]]
    overlays = draw_overlays(vlm, pictures[:1])
    scales = draw_scales(vlm, step, pictures[0]) if pictures else []
    write_report(path, "sightspeed report", facts, summary["results"], examples, curves, overlays, scales)


@torch.no_grad()
def draw_overlays(vlm, images: list[Image.Image]) -> list[dict]:
    """For each pruner that chooses, how much of every patch survives: its share of the kept tokens that cover
    it, in the whole picture. Not for those that merge, nor for those that read the question.
    """
    shown, cfg = [], vlm.cfg
    for image in images:
        device = next(vlm.parameters()).device
        batch = data.prompt_batch([data.load_sample([0], [image], cfg)], "pruned", cfg).to(device)
        states = vlm.states(batch.pixels)
        levels = vlm.levels(states)
        tokens, V = vlm.connector(levels), cfg.visual_tokens()  # (views, V, D), of which the first is shown
        for name, pruner in prune.PRUNERS.items():
            if pruner.merges or "text" in pruner.needs or not cfg.fits(name):
                continue
            keep = prune.kept_tokens(name, cfg.prune.keep, V, cfg.grid(), cfg.scale_tokens())
            features = levels[-1] if pruner.where == "patches" else tokens
            kept = prune.select(name, features, keep, **vlm.pruner_needs(name, states, batch))[0].tolist()
            seen = np.zeros((cfg.side, cfg.side))
            for token in kept:
                rows, columns, share = token_window(cfg, token)
                seen[rows, columns] += share
            label = f"{name} keeps {keep} of {V}"
            shown.append({"image": image, "label": label, "weight": seen / max(seen.max(), 1e-9)})
    return shown


@torch.no_grad()
def draw_scales(vlm, step: Path, image: Image.Image) -> list[tuple[str, list[dict]]]:
    """Where the tokens of each scale look, in the run that this one came from (if still there) and in it."""
    if not isinstance(vlm.connector, model.ChainOfSight):
        return []
    runs, rows = [(step, vlm)], []
    try:
        before = model.find_step(model.read_json(step / "config.json")["train"]["init"])
        runs.insert(0, (before, model.VLM.from_pretrained(before).eval()))  # on the CPU: one picture
    except UserError:
        pass  # it came from no run, or that one is gone
    for folder, each in runs:
        pixels = torch.from_numpy(data.load_images([image], each.cfg)).to(each.pixel_mean.device)
        levels, S, row = each.levels(each.states(pixels)), each.cfg.side, []
        for scale, (window, queries) in zip(each.connector.scales, each.cfg.scales()):
            seen = scale.attention(levels)[0].cpu()  # (tokens, P)
            times_even = seen.sum(0).view(S, S).numpy() * window**2 / queries  # mean over a window's tokens
            weight = (0.5 + np.log2(times_even + 1e-9) / 4).clip(0, 1)
            spread = f"{seen.square().sum(1).reciprocal().mean():.1f} of {window**2}"
            label = f"{len(seen)} tokens, windows of {window}×{window} patches; a token spreads over {spread}"
            row.append({"image": image, "label": label, "weight": weight, "window": window})
        stage = {"pretrain": "stage 1", "sft": "stage 2"}[model.read_json(folder / "config.json")["stage"]]
        rows.append((f"{stage}, {each.cfg.visual_tokens()} tokens", row))
    return rows


def token_window(cfg: model.ModelConfig, token: int) -> tuple[slice, slice, float]:
    """The patches that visual token number `token` looks at (rows, columns), and 1 / how many they are."""
    windows = [(cfg.side // cfg.grid(), 1)] if cfg.grid() else cfg.scales()  # a resampler's tokens see all
    for window, queries in windows:
        per_side = cfg.side // window
        if token < per_side**2 * queries:
            row, column = divmod(token // queries, per_side)
            rows, columns = (
                slice(row * window, (row + 1) * window),
                slice(column * window, (column + 1) * window),
            )
            return rows, columns, 1 / window**2
        token -= per_side**2 * queries
    raise ValueError(f"token {token} lies beyond the last scale")


if __name__ == "__main__":
    model.run_cli(main)
