"""Evaluation: tasks, prompts, scorers, the blind control, chat, and report.html.

    python eval.py --model runs/a/sft --tasks scenes --out runs/a/eval.json --report runs/a/report.html
    python eval.py --model runs/a/sft --tasks choice:my/questions.jsonl,caption:my/captions.jsonl
    python eval.py --model runs/a/sft --chat image.png
    python eval.py --model runs/a/pretrain --tasks scenes_bind,scenes_cap --shots 0,4,8    # MM1's protocol
    python eval.py --model runs/a/pretrain --tasks vqa:my/val.jsonl --shots 4 --demos my/train.jsonl

A task is scored twice: as it is, and with the images swapped (a seeded derangement): what a model scores
blind it did not see. Scores are 0-100 (CIDEr-D x 100), with n and the standard error beside them; that of
text is a loss. Without --shots a question comes in the chat template; with it, at 0 shots too, in that of a
base model, behind demonstrations of the train split whose pictures are never swapped.
"""

import base64
import collections
import html
import io
import json
import math
import os
import random
import re
import string
import subprocess
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
import model
import prune
from model import UserError


@dataclass
class EvalConfig:
    model: str = ""  # run or checkpoint folder
    tasks: str = "scenes"  # comma list of scenes (most), scenes_vqa, scenes_text, ..., or kind:FILE.jsonl
    shots: str = ""  # demonstrations, in MM1's templates of a base model: 0, 4 or 0,4,8; "": chat template
    demos: str = ""  # train split of kind:FILE tasks, FILE.jsonl: what their demonstrations are drawn from
    scoring: str = "generate"  # or likelihood: the likeliest of the possible answers, where these are known
    images: str = ""  # folder of the images of kind:FILE tasks; default: the file's own
    tokens: str = "full"  # visual tokens at inference: full, pruned, or both
    out: str = ""  # eval.json to write
    report: str = ""  # report.html to write
    chat: str = ""  # a picture to ask about in the terminal, instead of tasks
    n: int = 200  # questions of each Scenes task and of each type of scenes_vqa
    seed: int = 0  # of the questions, the demonstrations, and the swapped images of the blind score
    batch_size: int = 64
    temperature: float = 0.0  # of --chat; tasks are always greedy
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # of the whole model: float32 or bfloat16; auto: bfloat16 on cuda


def main(argv: list[str]) -> None:
    cfg = EvalConfig()
    model.parse_cli(argv, __doc__, cfg)
    if not cfg.model:
        raise UserError("--model is missing: a run or checkpoint folder, such as runs/a/sft")
    if cfg.tokens not in ("full", "pruned", "both"):
        raise UserError(f"--tokens '{cfg.tokens}' is unknown: use full, pruned or both")
    if cfg.dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype '{cfg.dtype}' is unknown: use auto, float32 or bfloat16")
    if cfg.scoring not in ("generate", "likelihood"):
        raise UserError(f"--scoring '{cfg.scoring}' is unknown: use generate or likelihood")
    if cfg.chat and (cfg.shots or cfg.demos or cfg.scoring != "generate"):
        raise UserError("--shots, --demos and --scoring have no effect on --chat")
    model.require_at_least(cfg, 1, "n batch_size")
    tasks = [] if cfg.chat else open_tasks(cfg)
    device = model.find_device(cfg.device)
    step = model.find_step(cfg.model)
    narrow = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device == "cuda")
    vlm = model.VLM.from_pretrained(step, torch.bfloat16 if narrow else torch.float32).to(device).eval()
    tokenizer = data.Tokenizer.from_pretrained(step / "tokenizer")
    if cfg.chat:
        return chat(vlm, tokenizer, cfg)
    results, examples = [], []
    modes = ("full", "pruned") if cfg.tokens == "both" else (cfg.tokens,)
    for mode in modes:
        for task in [task for task in tasks if mode == modes[0] or task.kind != "text"]:
            rows, shown = score_task(vlm, tokenizer, task, mode, cfg)
            results += rows
            examples += shown if mode == "full" or cfg.tokens == "pruned" else []
    print_table(results)
    summary = {"model": str(step), "commit": git_commit(), "seed": cfg.seed, "results": results}
    summary |= {"prompt": "base" if cfg.shots else "chat", "scoring": cfg.scoring}
    shown = {f"{task.name} {task.shots}-shot": task.questions for task in tasks if task.shots}
    summary["demos"] = {k: [" ".join(d.name for d in q.demos) for q in qs] for k, qs in shown.items()}
    if cfg.out:
        model.write_json(Path(cfg.out), summary)
    if cfg.report:
        make_report(Path(cfg.report), vlm, step, summary, examples)
        print(f"report: {cfg.report}")


# ---------------------------------------------------------------------------------------------------------
# Tasks


@dataclass
class Question:
    image: object  # a Scene or a path
    text: str
    answers: list[str]
    type: str = ""  # sub-score it belongs to
    held_out: bool = False  # about an attribute pair that no training scene has
    choices: tuple[str, ...] = ()  # possible answers, where these are known
    name: str = ""  # its id
    demos: list[data.Example] = field(default_factory=list)


@dataclass
class Task:
    name: str
    kind: str  # vqa, choice, yesno, caption, ref or text: how it is scored
    questions: list[Question]
    max_new_tokens: int = 24
    shots: int | None = None  # demonstrations before a question, in MM1's templates; None: the chat template
    chance: float | None = None  # where guessing well beats the best constant answer


METRICS = {
    "vqa": "accuracy",
    "choice": "accuracy",
    "yesno": "accuracy",
    "caption": "cider_d_x100",
    "ref": "accuracy_iou50",
    "text": "nll_per_token",
}
SCENE_TASKS = ("scenes_vqa", "scenes_text", "scenes_pope", "scenes_ref", "scenes_cap")
MORE_TASKS = ("scenes_words", "scenes_bind")  # the first of them is one of "scenes", too
CHOICES = {"colour": (*data.COLOURS,), "shape": data.SHAPES, "count": (*"0123456",)}
CHOICES |= {kind: data.YES_NO for kind in ("relation", "exists", "yesno")}


def open_tasks(cfg: EvalConfig) -> list[Task]:
    """The tasks of --tasks, each once for every number of --shots; what has no effect is refused."""
    counts = cfg.shots.split(",") if cfg.shots else []
    if not all(count.isdecimal() for count in counts):
        raise UserError(f"--shots '{cfg.shots}': use a number of at least 0 or a list such as 0,4,8")
    names = []
    for name in cfg.tasks.split(","):
        names += [*SCENE_TASKS, MORE_TASKS[0]] if name == "scenes" else [name]
    tasks = []
    for name in names:
        for shots in [int(count) for count in dict.fromkeys(counts)] or [None]:
            tasks.append(open_task(name, shots, cfg))
            if tasks[-1].kind == "text":  # no picture, so nothing to demonstrate
                break
    asked = [task for task in tasks if task.kind != "text"]
    if (cfg.shots or cfg.scoring != "generate") and not asked:
        raise UserError(f"--shots and --scoring have no effect on --tasks {cfg.tasks}")
    files = [name for name in names if ":" in name]
    kinds = {name.partition(":")[0] for name in files}
    twice = [stem for stem, n in Counter(Path(name).stem for name in files).items() if n > 1]
    if twice:
        raise UserError(
            f"--tasks has two files named {twice[0]}: their results would have one name, rename one"
        )
    if cfg.demos and len(kinds) > 1:
        raise UserError(f"--demos holds examples of one kind, --tasks asks for {' and '.join(sorted(kinds))}")
    if cfg.demos and not any(task.shots and isinstance(task.questions[0].image, Path) for task in asked):
        raise UserError("--demos has no effect without --shots above 0 and a kind:FILE task")
    for task in asked if cfg.scoring == "likelihood" else []:
        if not all(question.choices for question in task.questions):
            raise UserError(
                f"--scoring likelihood: the possible answers of {task.name} are not known; use scenes_vqa, "
                "scenes_pope, scenes_bind, choice:FILE or yesno:FILE"
            )
    return tasks


def open_task(name: str, shots: int | None, cfg: EvalConfig) -> Task:
    kind, _, file = name.partition(":")
    if name == "scenes_words":
        return words_task(cfg.n, cfg.seed)
    if name in (*SCENE_TASKS, *MORE_TASKS):
        return few_shot_task(name, cfg.n, shots, cfg.seed)
    if not file or kind not in METRICS:
        known = ", ".join((*SCENE_TASKS, *MORE_TASKS))
        raise UserError(f"--tasks '{name}' is unknown: use scenes, {known} or {'|'.join(METRICS)}:FILE")
    task = file_task(kind, Path(file), cfg.images)
    if shots is None or kind == "text":
        return task
    if shots and not cfg.demos:
        raise UserError(f"--shots {shots}: {name} needs --demos FILE, with questions of its train split")
    pool = file_task(kind, Path(cfg.demos), cfg.images).questions if shots else []
    tested = {question.image.resolve() for question in task.questions}
    both = next((question.image for question in pool if question.image.resolve() in tested), None)
    if both:
        raise UserError(f"--demos {cfg.demos} is not of the train split: {both} is also a picture of {file}")
    return add_demos(task, pool, shots, cfg.seed)


def add_demos(task: Task, pool: list[Question], shots: int, seed: int) -> Task:
    """The task in MM1's templates, behind `shots` demonstrations, drawn from `pool` for each question."""
    if shots > len(pool):
        raise UserError(f"--shots {shots}: {task.name} has only {len(pool)} demonstrations to draw from")
    caption = task.kind == "caption"  # asked by the template alone
    shown = [data.Example(q.image, "" if caption else q.text, q.answers[0], q.name) for q in pool]
    questions = []
    for i, question in enumerate(task.questions):
        demos = random.Random(f"demos-{task.name}-{seed}-{i}").sample(shown, shots)
        questions.append(replace(question, demos=demos))
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
        found.append(Question(scene, asked.question, [asked.answer], kind, False, choices, str(i), demos))
    return Task("scenes_bind", "vqa", found, 16, shots, chance=50.0)


def words_task(n: int, seed: int) -> Task:
    """Unseen scenes told in words: a loss that rises where training on pictures makes a decoder forget."""
    texts = [data.Scenes("text", "test")[seed * 1_000_000 + i].parts[0] for i in range(n)]
    return Task("scenes_words", "text", [Question(None, text, []) for text in texts])


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
                found.append(Question(scene, data.CAPTION_PROMPT, references, name=number))
                continue
            asked = data.ask(scene, kind, rng, split)
            if asked:
                sub, choices = kind if name == "scenes_vqa" else "", CHOICES.get(kind, ())
                found.append(Question(scene, asked[1], [asked[2]], sub, asked[3], choices, number))
    scorer = {"scenes_pope": "yesno", "scenes_ref": "ref", "scenes_cap": "caption"}.get(name, "vqa")
    return Task(name, scorer, found, max_new_tokens=96 if scorer == "caption" else 16)


def file_task(kind: str, path: Path, images: str) -> Task:
    """JSON lines of {"question_id", "image", "text", "answers": [...]}; of kind text, {"text"} will do."""
    if not path.is_file():
        raise UserError(f"--tasks {kind}:{path}: no such file")
    questions = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row["text"], str):
                raise ValueError("'text' must be a string")
            if kind == "text":
                questions.append(Question(None, row["text"], []))
                continue
            if not isinstance(row["answers"], list) or not row["answers"]:
                raise ValueError("'answers' must be a list of at least one")
            answers = [str(answer) for answer in row["answers"]]
            image = (Path(images) if images else path.parent) / row["image"]
            choices = tuple(option_letters(row["text"])) if kind == "choice" else CHOICES.get(kind, ())
            category = row.get("category", "") if kind != "caption" else ""
            name = str(row.get("question_id", number))
            questions.append(Question(image, row["text"], answers, category, False, choices, name))
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{path} line {number}: expected an object with image, text and answers ({e})"
            ) from None
    if not questions:
        raise UserError(f"{path}: holds no questions")
    return Task(path.stem, kind, questions, max_new_tokens=64)


# ---------------------------------------------------------------------------------------------------------
# Answering and scoring


def score_task(vlm, tokenizer, task: Task, mode: str, cfg: EvalConfig) -> tuple[list[dict], list[dict]]:
    """Rows of eval.json (the task, then its types) and a few examples for the report."""
    if task.kind == "text":
        return [score_text(vlm, tokenizer, task, mode, cfg)], []
    images = [q.image for q in task.questions]
    answers = answer_all(vlm, tokenizer, task, images, mode, cfg)
    scores = score_answers(task, answers)
    blind = score_answers(task, answer_all(vlm, tokenizer, task, derange(images, cfg.seed), mode, cfg))
    groups = collections.defaultdict(list)
    for i, question in enumerate(task.questions):
        groups[question.type].append(i)
    whole, types = groups.pop("", range(len(answers))), dict(groups)
    held_out = [i for i, question in enumerate(task.questions) if question.held_out]
    cuts = {"": whole, **types, **({"held_out": held_out} if held_out else {})}
    rows = [row_of(task, name, members, scores, blind, mode) for name, members in cuts.items()]
    if types:  # knowing the type alone gives the best constant answer of each
        chances = [row["chance"] * row["n"] for row in rows[1 : 1 + len(types)]]
        rows[0]["chance"] = round(sum(chances) / len(answers), 2)
    picked = random.Random(cfg.seed).sample(range(len(answers)), min(6, len(answers)))
    shown = []
    for q, answer, score in ((task.questions[i], answers[i], scores[i]) for i in picked):
        about = {"image": q.image, "task": task.name, "question": q.text, "right": q.answers}
        shown.append({**about, "answer": answer, "score": min(1.0, score)})
    return rows, shown


def row_of(
    task: Task, name: str, members: list[int], scores: list[float], blind: list[float], mode: str
) -> dict:
    mine = [100 * scores[i] for i in members]
    most_common = Counter(task.questions[i].answers[0] for i in members).most_common(1)[0][1]
    chance = 100 * most_common / len(members) if task.kind in ("vqa", "choice", "yesno") else 0.0
    chance = chance if task.chance is None else task.chance
    return {
        "task": f"{task.name}/{name}" if name else task.name,
        "metric": METRICS[task.kind],
        "score": round(sum(mine) / len(mine), 2),
        "stderr": round(standard_error(mine), 2),
        "n": len(mine),
        "shots": task.shots or 0,
        "tokens": mode,
        "blind_score": round(100 * sum(blind[i] for i in members) / len(members), 2),
        "chance": round(chance, 2),  # the best constant answer
    }


def derange(images: list, seed: int) -> list:
    """The same images dealt out anew, none where it was: one cycle through them in random order.

    A task with a single picture keeps it: its blind score says nothing.
    """
    different = list(dict.fromkeys(images))  # scenes and paths; questions about one image stay together
    cycle = random.Random(seed).sample(different, len(different))
    other = dict(zip(cycle, cycle[1:] + cycle[:1]))
    return [other[image] for image in images]


def answer_all(vlm, tokenizer, task: Task, images: list, mode: str, cfg: EvalConfig) -> list[str]:
    """Greedy answers, or the likeliest of the possible ones, in batches of similar length.

    images: the picture of each question; those of its demonstrations stay theirs.
    """
    prompts = [prompt_of(task, question, tokenizer) for question in task.questions]
    shown = [[*(demo.image for demo in q.demos), image] for q, image in zip(task.questions, images)]
    lengths = check_lengths(task, prompts, shown, vlm.cfg, mode)
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])
    answers, device = [""] * len(prompts), next(vlm.parameters()).device
    marks = stop_marks(task)
    stops = [i for token, i in tokenizer.ranks.items() if any(mark.encode() in token for mark in marks)]
    size = max(1, cfg.batch_size // (1 + (task.shots or 0)))  # as many pictures at any number of shots
    for start in tqdm(range(0, len(order), size), desc=f"{task.name} {mode}", leave=False):
        chosen = order[start : start + size]
        samples = []
        for i in chosen:
            samples.append(data.load_sample(prompts[i], shown[i], vlm.cfg, f"{task.name} question {i}"))
        if cfg.scoring == "likelihood":
            space = "" if task.shots is None or tokenizer.prefix else " "
            options = [task.questions[i].choices for i in chosen]
            coded = [[tokenizer.encode(space + option) for option in each] for each in options]
            best = [sums.argmax() for sums in answer_likelihoods(vlm, samples, coded, mode)]
            said = [each[k] for each, k in zip(options, best)]
        else:
            batch = data.prompt_batch(samples, mode, vlm.cfg).to(device)
            new = vlm.generate(batch, tokenizer.end, task.max_new_tokens, stops=stops)
            said = [cut_answer(tokenizer.decode(ids), marks) for ids in new]
        for i, answer in zip(chosen, said):
            answers[i] = answer
    return answers


def prompt_of(task: Task, question: Question, tokenizer) -> list[data.Piece]:
    if task.shots is None:
        return data.prompt_pieces(question.text, 1, tokenizer)
    return data.shot_pieces(question.demos, "" if task.kind == "caption" else question.text, tokenizer)


def check_lengths(task: Task, prompts: list, shown: list, cfg: model.ModelConfig, mode: str) -> list[int]:
    """Positions of each prompt: with an answer they must not be more than the decoder was trained for."""
    lengths = []
    for pieces, images in zip(prompts, shown):
        slots = data.sample_slots(cfg, mode, data.picture_sizes(images, cfg))
        lengths.append(len(data.lay_out(pieces, slots).ids))
    needed, room = max(lengths) + task.max_new_tokens, cfg.decoder.context
    if needed > room:
        raise UserError(
            f"{task.name}: {1 + (task.shots or 0)} x {data.square_tokens(cfg, mode)} visual tokens, text and "
            f"answer take {needed} positions, the decoder was trained for {room}: use fewer --shots or "
            "--tokens pruned"
        )
    return lengths


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
    hidden = vlm.decoder.hidden(x, positions, mask[:, None])
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
        "task": task.name, "metric": METRICS["text"], "score": round(mean, 4), "stderr": round(error, 4),
        "n": len(sums), "shots": 0, "tokens": "full", "blind_score": None, "chance": None,
    }  # fmt: skip


def option_letters(text: str) -> dict[str, str]:
    """Letter -> option of the lines "A. red" in a question."""
    return dict(re.findall(r"^([A-Z])\. (.*)$", text, re.M))


def score_answers(task: Task, answers: list[str]) -> list[float]:
    """One score for each question, 0..1 (CIDEr-D: 0..10)."""
    asked = task.questions
    if task.kind == "caption":
        return cider_d(answers, [q.answers for q in asked])
    if task.kind == "choice":
        options = [list(option_letters(q.text).values()) for q in asked]
        return [float(choice_parse(a, o) == q.answers[0]) for a, o, q in zip(answers, options, asked)]
    if task.kind == "yesno":
        return [float(yesno_parse(a) == q.answers[0].lower()) for a, q in zip(answers, asked)]
    if task.kind == "ref":
        return [box_hit(a, q.answers[0]) for a, q in zip(answers, asked)]
    return [vqa_accuracy(a, q.answers) for a, q in zip(answers, asked)]


def print_table(results: list[dict]) -> None:
    head = f"\n{'task':<28}{'shots':>5}  {'tokens':<8}{'score':>7}{'±':>7}{'blind':>8}{'chance':>8}{'n':>7}"
    print(head + "  metric")
    for r in results:
        name = "  " + r["task"].split("/")[1] if "/" in r["task"] else r["task"]
        blind, chance = ("–" if r[key] is None else f"{r[key]:.1f}" for key in ("blind_score", "chance"))
        digits = 1 if r["metric"] != METRICS["text"] else 3
        print(
            f"{name:<28}{r['shots']:>5}  {r['tokens']:<8}{r['score']:>7.{digits}f}{r['stderr']:>7.{digits}f}"
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
VQA_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
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
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "gimme": "gim me",
    "lemme": "lem me",
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
    about = [quote(r["metric"])] + ["lower is better"] * (r["metric"] == METRICS["text"])
    about += [f"{r['shots']}-shot"] * (r["shots"] > 0) + [f"bar to {top}"] * (top > 100)
    name = part or f"<b>{base}</b><br><small>{', '.join(about)}</small>"
    row = "" if i else f'<td class="left" rowspan="{len(group)}">{name}</td>'
    row += f'<td class="left"><small>{quote(r["tokens"])}</small></td><td><div class="bar">'
    score, blind, chance = values = r["score"], r.get("blind_score"), r.get("chance")
    marks = (("seen", score), ("unseen", min(score, blind or 0)), ("chance", chance), ("blind", blind))
    loss = r["metric"] == METRICS["text"]  # no share of 100, and lower is better: no bar
    for mark, value in () if loss else marks:
        side = "width" if "seen" in mark else "left"
        if value is not None:
            row += f'<i class="{mark}" style="{side}: {max(0, min(100, 100 * value / top)):.1f}%"></i>'
    digits = 3 if loss else 1
    score, blind, chance = ("–" if value is None else f"{value:.{digits}f}" for value in values)
    row += f"</div></td><td><b>{score}</b> <small>± {r['stderr']:.{digits}f}</small></td>"
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
    return f'<div class="card">{html_image(e["image"], e["question"])}<div>{text}</div></div>'


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
        shown["image"] = data.render(image) if isinstance(image, data.Scene) else data.open_image(image)
    overlays = draw_overlays(vlm, [shown["image"] for shown in examples[:1]])
    scales = draw_scales(vlm, step, examples[0]["image"]) if examples else []
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
