"""Evaluation: a model answers the questions of tasks, and a control shows how much of its score is seeing.

    python eval.py --model runs/a/sft --tasks scenes --out runs/a/eval.json
    python eval.py --model runs/a/sft --tasks choice:my/questions.jsonl,caption:my/captions.jsonl
    python eval.py --model runs/a/pretrain --tasks scenes_bind,scenes_cap --shots 0,4,8    # MM1's protocol
    python eval.py --model runs/a/pretrain --tasks vqa:my/val.jsonl --shots 4 --demos my/train.jsonl
    torchrun --nproc_per_node=8 eval.py --model runs/a/sft --tasks vqa:my/val.jsonl --out eval.json
    python eval.py --model runs/a/sft --chat image.png

Every task is scored twice: as it is, and blind, with its pictures swapped (a seeded derangement); whatever a
model still scores with swapped images it did not get from looking. Scores are 0-100 (CIDEr-D x 100) with
their standard error, that of text is a loss. Without --shots a question comes in the chat template; with it,
even 0, in that of a base model, behind demonstrations of the train split whose pictures are never swapped.
Answers to questions in files are kept beside --out, and a run that was killed goes on from them.
Public benchmarks: tools/benchmarks.py. A page with pictures and curves: tools/report.py eval.json.
"""

import model  # isort: skip  # first of all: it answers --help before torch is loaded
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re
import string
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import require

IS_FIRST_RANK = int(os.environ.get("RANK", 0)) == 0


@dataclass
class EvalConfig:
    # -- questions
    model: str = ""  # run or checkpoint folder
    tasks: str = "scenes"  # comma list of scenes (most of them), scenes_vqa, ..., or kind:FILE
    images: str = ""  # folder of the pictures of task files; default: the folder of the file
    n: int = 200  # questions of each Scenes task, and of each type of scenes_vqa
    seed: int = 0  # of the questions, the demonstrations, and the swapped pictures of the blind score
    chat: str = ""  # a picture to ask about in the terminal, instead of tasks
    # -- prompts and answers
    shots: str = ""  # demonstrations in the template of a base model: 0, 4 or 0,4,8; default: chat template
    demos: str = ""  # train split of a task file, from which its demonstrations are drawn
    tokens: str = "full"  # visual tokens at inference: full, pruned, or both
    scoring: str = "generate"  # or likelihood: the likeliest of the possible answers, where these are known
    blind: bool = True  # ask everything a second time about other pictures
    temperature: float = 0.0  # of --chat; tasks are always answered greedily
    # -- output
    out: str = ""  # eval.json to write
    answers: str = ""  # folder that keeps answers, and from which a later run goes on; default: beside --out
    # -- hardware
    batch_size: int = 64  # pictures in a batch
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # of matrices and their products: float32 or bfloat16; auto: bfloat16 on cuda


def main(argv: list[str]) -> None:
    cfg = EvalConfig()
    model.parse_cli(argv, __doc__, cfg)
    require(cfg.model != "", "--model is missing: a run or checkpoint folder, such as runs/a/sft")
    check_config(cfg)
    if cfg.chat:
        return chat(cfg)
    tasks = open_tasks(cfg, open_task)
    write_results(tasks, cfg, *evaluate(tasks, cfg))


def check_config(cfg: EvalConfig) -> None:
    model.require_one_of("--tokens", cfg.tokens, ("full", "pruned", "both"))
    model.require_one_of("--dtype", cfg.dtype, ("auto", "float32", "bfloat16"))
    model.require_one_of("--scoring", cfg.scoring, ("generate", "likelihood"))
    model.require_at_least(cfg, 1, "n batch_size")
    require(not cfg.out or not Path(cfg.out).is_dir(), f"--out {cfg.out} is a folder: give a file in it")


def evaluate(tasks: list["Task"], cfg: EvalConfig) -> tuple[list, list]:
    """Ask and score all tasks with every view of the visual tokens: rows of eval.json, and examples."""
    vlm, tokenizer, autocast = load_model(cfg)
    vlm.states = remember_states(vlm.states)
    first, results, examples = views_of(cfg)[0], [], []
    for view, task in itertools.product(views_of(cfg), tasks):
        if view == first or task.kind not in TEXT_KINDS:  # text looks at no view
            with autocast:
                rows, task_examples = score_task(vlm, tokenizer, task, view, cfg)
            results += rows
            examples += task_examples if view == first else []
    if dist.is_initialized():
        dist.destroy_process_group()
    return results, examples


def views_of(cfg: EvalConfig) -> tuple[str, ...]:
    return ("full", "pruned") if cfg.tokens == "both" else (cfg.tokens,)


def load_model(cfg: EvalConfig) -> tuple[model.VLM, data.Tokenizer, torch.autocast]:
    """A model, its tokenizer, and the context to answer in: as in training, matrices may be in bfloat16."""
    _, _, device = model.find_ranks(cfg.device, hours=24)  # a rank may wait that long for another
    step = model.find_step(cfg.model)
    is_half = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda")
    vlm = model.VLM.from_pretrained(step, torch.bfloat16 if is_half else torch.float32).to(device).eval()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=is_half)
    return vlm, data.Tokenizer.from_pretrained(step / "tokenizer"), autocast


def remember_states(encode, most: int = 2**30):  # bytes that are kept before all is dropped
    """VLM.states that encodes no tile twice: questions, the blind control and both views share them."""
    known = {}  # what is in a tile -> its hidden states

    def states(pixels: torch.Tensor) -> tuple:
        tiles = [hashlib.blake2b(tile.numpy()).digest() for tile in pixels.cpu()]
        if len(known) * sum(x.nbytes for x in next(iter(known.values()), ()) if x is not None) > most:
            known.clear()
        new = {tile: i for i, tile in enumerate(tiles) if tile not in known}
        if new:
            encoded = encode(pixels[[*new.values()]])
            for n, tile in enumerate(new):
                known[tile] = [x if x is None else x[n] for x in encoded]
        levels = zip(*(known[tile] for tile in tiles))
        return tuple(None if level[0] is None else torch.stack(level) for level in levels)

    return states


def write_results(tasks: list["Task"], cfg: EvalConfig, results: list, examples: list) -> None:
    """Print the table; write eval.json with all that tools/report.py needs beside the run folder."""
    if not IS_FIRST_RANK:
        return
    print_table(results)
    step = str(model.find_step(cfg.model)) if cfg.model else ""
    summary = {"model": step, "commit": git_commit(), "seed": cfg.seed, "results": results, "demos": {}}
    summary |= {"prompt": "base" if cfg.shots else "chat", "scoring": cfg.scoring, "examples": examples}
    for task in tasks:
        if task.shots:
            names = [" ".join(demo.name for demo in question.demos) for question in task.questions]
            summary["demos"][f"{task.name} {task.shots}-shot"] = names
    if cfg.out:
        model.write_json(Path(cfg.out), summary)


# --- Tasks -------------------------------------------------------------------------------------------------


@dataclass
class Question:
    images: tuple  # Scenes, paths, encoded pictures (bytes) or PIL images; empty for questions about text
    text: str
    answers: list[str]  # right answers; empty where only a benchmark's server knows them
    subsets: tuple[str, ...] = ()  # sub-scores it counts for
    choices: tuple[str, ...] = ()  # all possible answers, where these are known
    name: str | int = ""  # its id in its file
    demos: list[data.Example] = field(default_factory=list)
    options: tuple[str, ...] = ()  # texts of the lettered choices
    picture: str = ""  # where its first picture comes from: "scene:test:17", a path, or "TABLE#17"

    @property
    def key(self) -> tuple[str, str]:
        """Identifies it in its task: several questions about one picture may share an id."""
        return str(self.name), self.text


@dataclass
class Task:
    """Questions that are asked and scored in one way. The benchmarks of tools/benchmarks.py extend it."""

    name: str
    kind: str  # vqa, exact, choice, yesno, caption, ref or text: how its answers are scored
    questions: list[Question]
    max_new_tokens: int = 24
    shots: int | None = None  # demonstrations in the template of a base model; None: the chat template
    chance: float | None = None  # set where an informed guess beats the best constant answer
    path: Path | None = None  # where its questions come from, if from files
    limit: int = 0  # above 0: the questions are a random sample of this size
    tail: str = ""  # end of its questions that the template of a base model goes without

    @property
    def metric(self) -> str:
        return {"ref": "accuracy_iou50", "caption": "cider_d_x100"}.get(self.kind, "accuracy")

    def prompt(self, question: Question, tokenizer) -> list[data.Piece]:
        """A question in the chat template, or in MM1's behind demonstrations."""
        if self.shots is None:
            return data.prompt_pieces(question.text, len(question.images), tokenizer)
        text = "" if self.kind == "caption" else question.text  # the template itself asks for a caption
        return data.shot_pieces(question.demos, text, tokenizer)

    def score(self, answer: str, question: Question) -> float:
        """Score of one answer, 0..1. Captions are scored as a set, see `score_answers`."""
        right = question.answers
        if self.kind == "vqa":
            return vqa_accuracy(answer, right)
        if self.kind == "exact":  # GQA's rule in LLaVA
            return float(answer.rstrip(".").lower() in map(str.lower, right))
        if self.kind == "yesno":
            return float(yesno_parse(answer) == right[0].lower())
        if self.kind == "choice":
            return float(choice_parse(answer, [*question.options]) == right[0])
        return box_hit(answer, right[0])

    def average(self, questions: list, scores: list) -> tuple[float, list]:
        """The mean score of some of the questions, and the values that it is the mean of."""
        return sum(scores) / len(scores), scores

    def finish_rows(self, rows: list, answers: list, blind_answers: list | None) -> list:
        """Rows of eval.json; a benchmark adds rows of its own."""
        return rows


FILE_KINDS = ("vqa", "exact", "choice", "yesno", "caption", "ref", "text")
TEXT_KINDS = ("text", "likelihood")  # no pictures to swap or to demonstrate
SCENE_TASKS = {"scenes_vqa": data.QUESTION_TYPES, "scenes_text": ("text",), "scenes_pope": ("exists",)}
SCENE_TASKS |= {"scenes_ref": ("ref",), "scenes_cap": ("caption",)}
CHOICES = {"colour": tuple(data.COLOURS), "shape": data.SHAPES, "count": tuple("0123456")}
CHOICES |= dict.fromkeys(("relation", "exists", "yesno"), data.YES_NO)


def open_tasks(cfg: EvalConfig, open_task) -> list[Task]:
    """The tasks of --tasks, each once for every number of --shots. open_task(name, shots, cfg) opens one."""
    numbers = cfg.shots.split(",") if cfg.shots else []
    valid = all(map(str.isdecimal, numbers))
    require(valid, f"--shots '{cfg.shots}': use a number of at least 0 or a list such as 0,4,8")
    tasks, groups = [], {"scenes": [*SCENE_TASKS, "scenes_words"]}
    names = itertools.chain(*(groups.get(name, [name]) for name in cfg.tasks.split(",")))
    for name in dict.fromkeys(names):
        for shots in dict.fromkeys(map(int, numbers)) or [None]:
            tasks.append(open_task(name, shots, cfg))
            if tasks[-1].kind in TEXT_KINDS:
                break  # nothing to demonstrate
    titles = {(task.name, task.shots) for task in tasks}  # two of one would mix up their answers
    require(len(titles) == len(tasks), "--tasks has two tasks of one name: rename a file")
    kinds = sorted({task.kind for task in tasks if task.path and cfg.demos})
    require(len(kinds) < 2, f"--demos holds examples of one kind, --tasks asks for {' and '.join(kinds)}")
    return tasks


def open_task(name: str, shots: int | None, cfg: EvalConfig) -> Task:
    kind, _, file = name.partition(":")
    scenes = (*SCENE_TASKS, "scenes_words", "scenes_bind")
    if name in scenes:
        return scenes_task(name, cfg.n, cfg.seed, shots)
    known = f"{', '.join(scenes)} or {'|'.join(FILE_KINDS)}:FILE; all else: python tools/benchmarks.py"
    require(file != "" and kind in FILE_KINDS, f"--tasks '{name}' is unknown: use scenes, {known}")
    task = file_task(kind, Path(file), cfg.images)
    if kind == "text":
        return task
    pool = file_task(kind, Path(cfg.demos), cfg.images).questions if shots and cfg.demos else []
    return add_demos(task, pool, shots, cfg.seed)


def scenes_task(name: str, n: int, seed: int, shots: int | None = None) -> Task:
    """A task of Scenes in the chat template (shots None) or behind demonstrations, with the same questions.
    Demonstrations are drawn from about as many training questions as OpenFlamingo's, 2,048.
    """
    if name == "scenes_bind":
        return bind_task(n, shots, seed)
    if name == "scenes_words":  # their loss rises where training on pictures makes a decoder forget
        scenes, start = data.Scenes("text", "test"), seed * 1_000_000
        texts = [scenes[start + i].parts[0] for i in range(n)]
        return Task(name, "text", [Question((), text, []) for text in texts])
    kind = {"scenes_pope": "yesno", "scenes_ref": "ref", "scenes_cap": "caption"}.get(name, "vqa")
    questions = scene_questions(name, n, seed, "test")
    task = Task(name, kind, questions, max_new_tokens=96 if kind == "caption" else 16)
    pool = scene_questions(name, 2048 // len(SCENE_TASKS[name]), seed, "train") if shots else []
    return add_demos(task, pool, shots, seed)


def scene_questions(name: str, n: int, seed: int, split: str) -> list[Question]:
    """n questions of each type that the task asks, about unseen scenes (test) or training ones."""
    questions = []
    for kind in SCENE_TASKS[name]:
        i, end = 0, len(questions) + n
        while len(questions) < end:
            rng, number = random.Random(f"{name}-{kind}-{seed}-{i}"), seed * 1_000_000 + i
            scene, picture = data.make_scene(split, number), f"scene:{split}:{number}"
            question = Question((scene,), "", [], name=str(len(questions)), picture=picture)
            i += 1
            if kind == "caption":
                question.text = data.CAPTION_PROMPT
                question.answers = [data.say(scene), data.say(scene, rng), data.say(scene, rng)]
            elif asked := data.ask(scene, kind, rng, split):
                question.text, question.answers = asked.question, [asked.answer]
                question.choices = CHOICES.get(kind, ())
                question.subsets = (kind if name == "scenes_vqa" else "",)
                if asked.held_out:  # about a pair of colour and shape that no training scene has
                    question.subsets += ("held_out",)
            if question.answers:  # some scenes offer no question of a kind
                questions.append(question)
    return questions


def bind_task(n: int, shots: int | None, seed: int) -> Task:
    """Questions with a made-up word, which only the demonstrations explain: at least one, at a random place,
    has it as its answer. The word fits half of the things asked about: ignoring demonstrations scores 50 %.
    """
    questions = []
    for i in range(n):
        rng = random.Random(f"scenes_bind-{seed}-{i}")
        number = rng.randrange(1 << 40)
        scene, word = data.make_scene("test", number), rng.choice(data.MADE_UP)
        thing, fits, by_name = rng.choice(scene.things), i % 2 == 0, i % 4 < 2
        attribute = rng.choice(("colour", "shape"))
        value, values = getattr(thing, attribute), CHOICES[attribute]
        meaning = value if fits else rng.choice([other for other in values if other != value])
        asked = data.ask_bound(scene, thing, word, meaning, by_name)
        decisive, demos = int(rng.random() * (shots or 0)), []
        for k in range(shots or 0):
            draw = (True, True) if k == decisive else (rng.random() < 0.5, rng.random() < 0.5)
            demos.append(data.draw_bound(word, meaning, *draw, rng, "train"))
        subset, choices = ("name", (*values, *data.MADE_UP)) if by_name else ("yes_no", data.YES_NO)
        question = Question((scene,), asked.question, [asked.answer], (subset,), choices, str(i), demos)
        questions.append(replace(question, picture=f"scene:test:{number}"))
    return Task("scenes_bind", "vqa", questions, 16, shots, chance=50.0)


def file_task(kind: str, path: Path, images: str) -> Task:
    """JSON lines of {"question_id", "image", "text", "answers": [...]}; of kind text, {"text"} will do."""
    require(path.is_file(), f"--tasks {kind}:{path}: no such file")
    questions, table, folder = {}, data.Table(path), Path(images) if images else path.parent
    for i in range(len(table)):
        row, place = table.raw(i)
        answers, name = row.get("answers"), row.get("question_id", i)
        require(isinstance(row.get("text"), str), f"{place}: 'text' must be a string")
        question = Question((), row["text"], [], name=name)
        key = i if kind == "text" else question.key
        require(key not in questions, f"{place}: question_id {name} is there twice with one text: drop one")
        questions[key] = question
        if kind == "text":
            continue
        require(isinstance(answers, list) and answers, f"{place}: 'answers' must be a list of at least one")
        (image,) = data.local_pictures([row.get("image")], folder, place)
        require(image.is_file(), f"{place}: image {image} does not exist")
        question.images, question.picture = (image,), str(image.resolve())
        question.answers = [*map(str, answers)]
        question.subsets = () if kind == "caption" else (str(row.get("category") or ""),)
        options = option_letters(row["text"]) if kind == "choice" else {}
        question.choices, question.options = CHOICES.get(kind, tuple(options)), tuple(options.values())
        check_answer(kind, question, place)
    return Task(path.stem, kind, [*questions.values()], max_new_tokens=64, path=path)


def check_answer(kind: str, question: Question, place: str) -> None:
    """Refuse a right answer that nothing can match, before anything is asked."""
    answer = question.answers[0]
    valid = {"choice": answer in question.choices, "yesno": answer.strip().lower() in data.YES_NO}
    valid |= {"ref": parse_box(answer) is not None}
    forms = {"choice": "the letter of an option, a line 'A. ...' of its text", "yesno": "yes or no"}
    form = forms.get(kind, "four integers 0-999")
    require(valid.get(kind, True), f"{place} has the answer '{answer}', which is not {form}")


def add_demos(task: Task, pool: list[Question], shots: int | None, seed: int) -> Task:
    """The task in MM1's templates, each question behind `shots` demonstrations drawn from `pool`."""
    if shots is None:
        return task
    problem = f"{task.name} has only {len(pool)} demonstrations to draw from: give more --demos"
    require(shots <= len(pool), f"--shots {shots}: {problem}")
    test_pictures, examples, questions = set(), [], []
    for question in task.questions:
        problem = f"{task.name} question {question.name} has {len(question.images)} pictures"
        require(len(question.images) == 1, f"--shots {shots}: {problem}, MM1's templates have one")
        test_pictures |= {question.picture, *question.images}
    for question in pool:
        is_new = test_pictures.isdisjoint((question.picture, *question.images))
        require(is_new, f"--demos is not of the train split: {question.picture} is also asked about")
        text = "" if task.kind == "caption" else question.text.removesuffix(task.tail)
        examples.append(data.Example(question.images[0], text, question.answers[0], str(question.name)))
    for i, question in enumerate(task.questions):
        demos = random.Random(f"demos-{task.name}-{seed}-{i}").sample(examples, shots)
        questions.append(replace(question, text=question.text.removesuffix(task.tail), demos=demos))
    return replace(task, questions=questions, shots=shots)


# --- Asking ------------------------------------------------------------------------------------------------


def answer_all(vlm, tokenizer, task: Task, images: list, view: str, cfg, kept=None, known=()) -> list[str]:
    """An answer to each question, asked in batches of similar length that the ranks share.

    images: the pictures of each question; demonstrations keep theirs. kept: an AnswerFile; its answers and
    the `known` ones (by question number) are not asked for again, new ones are added to it batch by batch.
    """
    rank, world, _ = model.find_ranks(cfg.device)
    answers = dict(known) | (kept.read() if kept else {})
    prompts, pictures = {}, {}
    for i, question in enumerate(task.questions):
        if i not in answers:
            prompts[i] = task.prompt(question, tokenizer)
            pictures[i] = [*(demo.image for demo in question.demos), *images[i]]
    lengths = prompt_lengths(task, prompts, pictures, vlm.cfg, view)
    order = sorted(lengths, key=lengths.get)
    size = max(1, cfg.batch_size // (1 + (task.shots or 0)))  # as many pictures at any number of shots
    marks = stop_marks(task)
    stops = tokenizer.ids_with(marks) if marks else ()
    batches = [order[start + rank * size :][:size] for start in range(0, len(order), world * size)]
    bar = tqdm(batches, desc=f"{task.name} {view}", leave=False, disable=rank > 0)
    for numbers, samples in zip(bar, load_batches(task, batches, prompts, pictures, vlm.cfg)):
        texts = []
        if numbers and "likelihood" in (cfg.scoring, task.kind):
            questions = [task.questions[i] for i in numbers]
            texts = likeliest_choices(vlm, tokenizer, task, questions, samples, view)
        elif numbers:
            batch = data.prompt_batch(samples, view, vlm.cfg).to(next(vlm.parameters()).device)
            for ids in vlm.generate(batch, tokenizer.end, task.max_new_tokens, stops=stops):
                texts.append(cut_answer(tokenizer.decode(ids), marks))
        gathered = [dict(zip(numbers, texts))] * world
        if world > 1:
            dist.all_gather_object(gathered, gathered[rank])
        for rank_answers in gathered:
            answers |= rank_answers
            if kept and rank == 0:
                kept.append(rank_answers)
    too_long = dict.fromkeys(prompts.keys() - lengths.keys(), "")
    if kept and rank == 0:
        kept.append(too_long)
    answers |= too_long
    return [answers[i] for i in range(len(task.questions))]


def load_batches(task: Task, batches: list[list[int]], prompts: dict, pictures: dict, cfg):
    """The samples of each batch, whose pictures threads decode while the model answers the one before."""

    def load(i: int) -> data.Sample:
        return data.load_sample(prompts[i], pictures[i], cfg, f"{task.name} question {i}")

    drawn = any(isinstance(image, data.Scene) for image in itertools.chain(*pictures.values()))
    with ThreadPoolExecutor() as pool:
        start = map if drawn else pool.map  # to draw takes Python, which the model's thread needs
        loading = (start(load, numbers) for numbers in [*batches, []])
        for samples, _ in itertools.pairwise(loading):  # the following ones have been started
            yield [*samples]


def prompt_lengths(task: Task, prompts: dict, pictures: dict, cfg: model.ModelConfig, view: str) -> dict:
    """Positions of each prompt and its answer. A few that take more than the decoder was trained for are left
    out and count as wrong; many are an error.
    """
    lengths, context = {}, cfg.decoder.context
    for i, pieces in prompts.items():
        slots = data.sample_slots(cfg, view, data.picture_sizes(pictures[i], cfg))
        lengths[i] = len(data.lay_out(pieces, slots).ids) + task.max_new_tokens
    fitting = {i: length for i, length in lengths.items() if length <= context}
    too_long = len(lengths) - len(fitting)
    need = f"{task.name}: pictures, text and answer take {max(lengths.values(), default=0)} positions in the"
    need += f" longest question, the decoder was trained for {context}"
    require(too_long <= len(lengths) / 50, f"{need}: use fewer --shots or --tokens pruned")
    if too_long and IS_FIRST_RANK:
        print(f"{need}: {too_long} questions are too long and count as wrong")
    return fitting


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


def likeliest_choices(vlm, tokenizer, task: Task, questions: list, samples: list, view: str) -> list[str]:
    """The likeliest choice of each question; of kind likelihood, the log-probabilities of all, as JSON."""
    in_turn = task.shots is None and task.kind != "likelihood"  # an answer begins the turn of a chat template
    space, known = "" if tokenizer.prefix or in_turn else " ", all(question.choices for question in questions)
    require(known, f"--scoring likelihood: the possible answers of {task.name} are not known")
    options = [[tokenizer.encode(space + choice) for choice in question.choices] for question in questions]
    sums = answer_likelihoods(vlm, samples, options, view)
    if task.kind == "likelihood":
        return [json.dumps(values.round(4).tolist()) for values in sums]
    return [question.choices[values.argmax()] for question, values in zip(questions, sums)]


@torch.no_grad()
def answer_likelihoods(vlm, samples: list, options: list, view: str) -> list[np.ndarray]:
    """Summed log-probability of the tokens of each option: an array for each prompt.

    samples: prompts as for data.prompt_batch; options: token ids of the options of each prompt. They lie
    behind it in one row, each attending to the prompt and to itself only, so that the prompt is read once.
    """
    batch = data.prompt_batch(samples, view, vlm.cfg).to(next(vlm.parameters()).device)
    rows = batch.student
    T, tails, predictions, lengths = rows.ids.shape[1], [], [], []
    for b, row_options in enumerate(options):
        tail = []  # (token, number of its option, place in it); last tokens predict nothing and stay out
        for number, ids in enumerate(row_options, 1):
            lengths.append(len(ids))
            predictions.append((b, T - 1, ids[0]))  # (row, position that predicts, token)
            for place, token in enumerate(ids[:-1]):
                predictions.append((b, T + len(tail), ids[place + 1]))
                tail.append((token, number, place))
        tails.append(torch.tensor(tail, dtype=torch.long).view(-1, 3))
    tail = torch.nn.utils.rnn.pad_sequence(tails, batch_first=True, padding_value=-1)  # (B, W, 3)
    ids, owner, place = tail.to(rows.ids.device).unbind(-1)  # (B, W) each
    x = torch.cat([vlm.splice(rows, vlm.bank(batch)), vlm.decoder.embed(ids.clamp(0))], 1)  # (B, T + W, D)
    positions = torch.cat([rows.positions, rows.positions[:, -1:] + 1 + place], 1)  # (B, T + W)
    owner = torch.cat([rows.doc_ids, owner], 1)  # (B, T + W): 0 in the prompt, -1 at padding
    mask = ((owner[:, :, None] == owner[:, None]) | (owner[:, None] == 0)).tril()  # (B, T + W, T + W)
    hidden, _ = vlm.decoder.hidden(x, positions, mask[:, None])
    row, position, token = torch.tensor(predictions, device=x.device).unbind(-1)  # (R,) each
    logits = vlm.decoder.head(hidden[row, position]).float().log_softmax(-1)  # (R, N)
    log_probs = logits.gather(1, token[:, None])[:, 0].cpu()  # (R,)
    sums = np.array([chunk.sum().item() for chunk in log_probs.split(lengths)])
    return np.split(sums, np.cumsum([*map(len, options)])[:-1])


@dataclass
class AnswerFile:
    """Answers to a task as JSON lines in LLaVA's format, so that a run that was killed goes on from them."""

    path: Path
    task: Task
    facts: dict  # "metadata": a hash of all that an answer depends on beside its question

    def read(self) -> dict[int, str]:
        """Kept answers by question number. A last line without its end is removed from the file."""
        numbers, answers = {question.key: i for i, question in enumerate(self.task.questions)}, {}
        content = self.path.read_bytes() if self.path.is_file() else b""
        complete = content[: content.rfind(b"\n") + 1]
        for n, line in enumerate(complete.splitlines(), 1):
            try:
                row = json.loads(line)
                answers[numbers[str(row["question_id"]), row["prompt"]]] = row["text"]
                same = row["metadata"] == self.facts["metadata"]
            except (ValueError, KeyError, TypeError):
                same = False
            problem = f"{self.path} line {n} was answered under another prompt, model, seed or --demos"
            require(same, f"{problem}: use another --answers")
        if len(complete) < len(content) and IS_FIRST_RANK:
            os.truncate(self.path, len(complete))
        return answers

    def append(self, answers: dict[int, str]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            for i, text in answers.items():
                question = self.task.questions[i]
                row = {"question_id": question.name, "prompt": question.text, "text": text}
                file.write(json.dumps({**row, "answer_id": f"{self.path.stem}-{i}", **self.facts}) + "\n")


def answer_file(task: Task, view: str, cfg: EvalConfig, vlm=None, blind=False) -> AnswerFile | None:
    """Where the answers to a task are kept, if they are: in --answers, else beside --out."""
    if not cfg.answers and not (cfg.out and task.path):
        return None
    name = task.name if task.shots is None else f"{task.name}.{task.shots}shot"
    name += f".limit{task.limit}" if task.limit else ""
    name += {"full": "", "pruned": ".pruned"}[view] + (".blind" if blind else "")
    path = Path(cfg.answers or f"{Path(cfg.out).with_suffix('')}_answers") / f"{name}.jsonl"
    is_input = task.path is not None and path.resolve() == task.path.resolve()
    require(not is_input, f"{path} holds the questions themselves: use another folder for --answers")
    path.parent.mkdir(parents=True, exist_ok=True)
    swapped = sum(len(question.images) > 0 for question in task.questions) if blind else 0
    facts = [task.max_new_tokens, cfg.scoring, cfg.seed, cfg.images, swapped]
    for question in task.questions:
        facts += [example[1:] for example in question.demos]
    for weights in vlm.parameters() if vlm else ():
        facts.append(weights.detach().flatten().view(torch.int16).sum().item())
    metadata = {"settings": hashlib.sha1(repr(facts).encode()).hexdigest()}
    return AnswerFile(path, task, {"model_id": cfg.model, "metadata": metadata})


# --- Scoring -----------------------------------------------------------------------------------------------


def score_task(vlm, tokenizer, task: Task, view: str, cfg: EvalConfig) -> tuple[list, list]:
    """Rows of eval.json (the task, then its subsets) and examples; none where no right answers are known."""
    if task.kind == "text":
        return [score_text(vlm, tokenizer, task, cfg)], []
    kept, blind_answers = answer_file(task, view, cfg, vlm), None
    images = [question.images for question in task.questions]
    answers = answer_all(vlm, tokenizer, task, images, view, cfg, kept)
    if not any(question.answers for question in task.questions):
        if IS_FIRST_RANK:
            place = kept.path if kept else "nowhere: give --out or --answers"
            print(f"{task.name}: no right answers in {task.path}, so no score; answers are kept in {place}")
        return [], []
    if cfg.blind and any(images):
        known = {i: answers[i] for i, pictures in enumerate(images) if not pictures}  # nothing to swap
        kept, swapped = answer_file(task, view, cfg, vlm, blind=True), derange(images, cfg.seed)
        blind_answers = answer_all(vlm, tokenizer, task, swapped, view, cfg, kept, known)
    return score_rows(task, answers, blind_answers, view, cfg.seed)


def derange(images: list[tuple], seed: int) -> list[tuple]:
    """The same pictures dealt out anew, none where it was: one cycle through them in random order. A single
    picture stays. Cycles are drawn until no question with several pictures gets another one of its own.
    """
    pictures = list(dict.fromkeys(itertools.chain.from_iterable(images)))
    rng = random.Random(seed)
    for _ in range(100):
        cycle = rng.sample(pictures, len(pictures))
        successor = dict(zip(cycle, cycle[1:] + cycle[:1]))
        dealt = [tuple(map(successor.get, group)) for group in images]
        if len(cycle) < 2 or all(set(old).isdisjoint(new) for old, new in zip(images, dealt)):
            break
    return dealt


def score_rows(task: Task, answers: list, blind_answers: list | None, view: str, seed: int) -> tuple:
    """Rows and examples of a task, from its answers and those about swapped pictures."""
    scores = score_answers(task, answers)
    blind_scores = score_answers(task, blind_answers) if blind_answers else None
    levels = [*itertools.zip_longest(*(question.subsets for question in task.questions))]
    members = {"": {*range(len(answers))}}  # question numbers of each subset
    for i, name in itertools.chain(*map(enumerate, levels)):
        if name:
            members.setdefault(name, set()).add(i)
    rows = [row_of(task, name, sorted(members[name]), scores, blind_scores, view) for name in members]
    if levels and all(levels[0]):  # a guess may be the best constant answer of each
        parts = [row for name, row in zip(members, rows) if name in levels[0]]
        total = sum(row["chance"] * row["n"] for row in parts)
        rows[0]["chance"] = round(total / sum(row["n"] for row in parts), 2)
    examples, numbers = [], range(len(answers))
    for i in random.Random(seed).sample(numbers, min(6, len(numbers))):
        question = task.questions[i]
        example = {"task": task.name, "metric": task.metric, "tokens": view, "question": question.text}
        example |= {"picture": question.picture, "right": question.answers, "answer": answers[i]}
        example |= {"blind_answer": blind_answers[i] if blind_answers else None, "score": scores[i]}
        examples.append(example)
    return task.finish_rows(rows, answers, blind_answers), examples


def row_of(task: Task, name: str, numbers: list, scores: list, blind_scores: list | None, view: str) -> dict:
    """The row of a task, or of its subset `name`, which holds the questions `numbers`."""
    questions = [task.questions[i] for i in numbers]
    blind_score, chance = None, task.chance
    score, values = task.average(questions, [100 * scores[i] for i in numbers])
    if blind_scores and any(question.images for question in questions):
        blind_score = round(task.average(questions, [100 * blind_scores[i] for i in numbers])[0], 2)
    if chance is None:  # that of the best constant answer
        right, chance = [question.answers[0] for question in questions], 0.0
        for constant, _ in Counter(right).most_common(5) if task.metric in ("accuracy", "acc") else ():
            chance = max(chance, task.average(questions, [100 * (text == constant) for text in right])[0])
    row = {"task": f"{task.name}/{name}" if name else task.name, "metric": task.metric}
    row |= {"score": round(score, 2), "stderr": round(standard_error(values), 2), "n": len(values)}
    row |= {"shots": task.shots or 0, "tokens": view, "blind_score": blind_score}
    return row | {"chance": round(chance, 2)}


def score_answers(task: Task, answers: list[str]) -> list[float]:
    """One score for each question, 0..1 (CIDEr-D: 0..10)."""
    if task.kind == "caption":
        return cider_d(answers, [question.answers for question in task.questions])
    return [task.score(answer, question) for answer, question in zip(answers, task.questions)]


@torch.no_grad()
def score_text(vlm, tokenizer, task: Task, cfg: EvalConfig) -> dict:
    """Mean negative log-likelihood of a token in nats, the end token included; the error is of a ratio."""
    samples, sums, counts = [], [], []
    for question in task.questions:
        pieces = data.pieces_of(data.Record("text", [question.text], []), tokenizer)
        samples.append((pieces, data.load_images([], vlm.cfg)))
    samples.sort(key=lambda sample: sum(len(ids) for ids, _ in sample[0]))  # rows of similar length
    for start in range(0, len(samples), cfg.batch_size):
        rows = samples[start : start + cfg.batch_size]
        batch = data.make_batch(rows, ["full"] * len(rows), vlm.cfg, 0, vlm.cfg.decoder.context)
        batch = batch.to(next(vlm.parameters()).device)
        loss = F.cross_entropy(vlm(batch)[0], batch.student.targets, reduction="none")  # (R,)
        owner = batch.student.doc_ids.flatten()[batch.student.supervised]  # (R,)
        sums += torch.bincount(owner, loss, len(rows)).tolist()
        counts += torch.bincount(owner, minlength=len(rows)).tolist()
    mean = sum(sums) / sum(counts)
    residuals = [nll - mean * count for nll, count in zip(sums, counts)]
    error = len(sums) * standard_error(residuals) / sum(counts)
    row = {"task": task.name, "metric": "nll_per_token", "score": round(mean, 4), "stderr": round(error, 4)}
    return {**row, "n": len(sums), "shots": 0, "tokens": "full", "blind_score": None, "chance": None}


def standard_error(scores: list[float]) -> float:
    """Standard error of the mean, in the scores' unit, 0 below two items. Rough for CIDEr-D (shared idf)."""
    return float(np.std(scores, ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0


# --- Output and chat ---------------------------------------------------------------------------------------


def print_table(results: list[dict]) -> None:
    head = f"\n{'task':<28}{'shots':>5}  {'tokens':<8}{'score':>7}{'±':>7}{'blind':>8}{'chance':>8}{'n':>7}"
    print(head + "  metric")
    for row in results:
        name, _, subset = row["task"].partition("/")
        digits, numbers = 3 if row["metric"] == "nll_per_token" else 1, ""
        for key, width in {"score": 7, "stderr": 7, "blind_score": 8, "chance": 8}.items():
            numbers += ("–" if row[key] is None else f"{row[key]:.{digits}f}").rjust(width)
        line = f"{'  ' + subset if subset else name:<28}{row['shots']:>5}  {row['tokens']:<8}{numbers}"
        print(f"{line}{row['n']:>7}  {row['metric']}")


def git_commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def chat(cfg: EvalConfig) -> None:
    """Ask about one picture; earlier questions and answers stay in the context. An empty line ends."""
    vlm, tokenizer, autocast = load_model(cfg)
    picture = data.load_sample([], [Path(cfg.chat)], vlm.cfg, "--chat")
    view, history = views_of(cfg)[0], []
    tokens = len(data.sample_slots(vlm.cfg, view, picture.sizes)[0])
    print(f"{cfg.chat}: {tokens} visual tokens. Ask; an empty line ends.")
    with autocast, contextlib.suppress(EOFError):
        while question := input("> ").strip():
            sample = picture._replace(pieces=data.prompt_pieces(question, 1, tokenizer, history))
            batch = data.prompt_batch([sample], view, vlm.cfg).to(next(vlm.parameters()).device)
            ids = vlm.generate(batch, tokenizer.end, 128, cfg.temperature, cfg.seed + len(history))[0]
            history.append((question, tokenizer.decode(ids).strip()))
            print(history[-1][1])


# --- Scorers: pure functions from text to numbers. assets/scoring.json holds their tables of words. --------

TABLES = model.read_json(model.ASSETS / "scoring.json")


def vqa_normalise(text: str) -> str:
    """An answer as VQA scorers compare it: lower case, digits for number words, no articles or punctuation.

    The rules are EvalAI's, as in TextVQA and LLaVA. Quirks kept: "it's" becomes "it 's"; a mark beside a
    space anywhere is deleted everywhere, any other becomes a space; only the first 32 periods go.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    cleaned = text = re.sub(r"[\n\t]", " ", text).strip()
    for mark in TABLES["vqa_punctuation"]:
        beside_space = mark + " " in text or " " + mark in text
        cleaned = cleaned.replace(mark, "" if beside_space else " ")
    words = re.sub(r"\.(?!\d)", "", cleaned, count=32).split()
    words = [TABLES["vqa_numbers"].get(word, word) for word in words]
    words = [TABLES["vqa_contractions"].get(word, word) for word in words if word not in ("a", "an", "the")]
    return " ".join(words)


def vqa_accuracy(prediction: str, answers: list[str]) -> float:
    """Soft accuracy in 0..1 of one prediction against the answers of (usually ten) annotators.

    Antol et al. 2015: each annotator in turn is left out, min(1, matches among the others / 3) is averaged.
    With ten answers 0, 1, 2, 3, 4+ matches give 0, .3, .6, .9, 1. A single answer is compared for equality.
    """
    n, k = len(answers), [*map(vqa_normalise, answers)].count(vqa_normalise(prediction))
    if n == 1:
        return float(k)
    return (k * min(1, (k - 1) / 3) + (n - k) * min(1, k / 3)) / n


def yesno_parse(text: str) -> str:
    """'yes' or 'no' by POPE's rule: 'no' if No, no or not is a word before the first period, otherwise 'yes'.
    Quirks kept: case matters and only single spaces part words, so "NO", "Nope" and "" are 'yes'.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "yes" if {"No", "no", "not"}.isdisjoint(words) else "no"


def option_letters(text: str) -> dict[str, str]:
    """Letter -> option of the lines "A. red" in a question: the last A and what follows it in order."""
    lines = re.findall(r"^([A-Z])\. (.*)$", text, re.M)
    letters = "".join(letter for letter, _ in lines)
    start = max(0, letters.rfind("A"))
    in_order = os.path.commonprefix([letters[start:], string.ascii_uppercase])
    return dict(lines[start : start + len(in_order)])


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
    for candidates in (alone, marked, stated):
        letter = candidates[0].upper() if len(set(candidates)) == 1 else ""
        if letter and letter in letters:
            return letter
    options = [" ".join(option.lower().split()) for option in options]
    longest_first = sorted(options, key=len, reverse=True)  # so that "dark green" is tried before "green"
    pattern = r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)"
    mentioned = set(re.findall(pattern, " ".join(text.lower().split()))) - {""}
    chosen = [letter for letter, option in zip(letters, options) if option in mentioned]
    return chosen[0] if len(chosen) == 1 else None


def ptb_tokenize(text: str) -> list[str]:
    """A caption as COCO's scorers see it: lower-case Penn Treebank tokens without punctuation. Stands in for
    coco-caption's Java tokenizer (CoreNLP 3.4.1): the same on nearly all captions, not on every odd string.
    """
    text = text.lower().translate(str.maketrans(TABLES["ptb_brackets"]))
    for pattern, replacement, _ in TABLES["ptb_rewrites"]:
        text = re.sub(pattern, replacement, text)
    abbreviation = r"(?:[a-z]\.)+|(?:" + TABLES["ptb_abbreviations"].replace(" ", "|") + r")\."
    tokens = []
    for word in text.split():
        if word not in ("'s", "'m", "'re", "'ve", "'ll", "'d"):
            word = word.strip("'")
        if word.endswith(".") and not re.fullmatch(abbreviation, word):
            word = word[:-1].strip("'")
        clitics_apart = re.sub(r"(?<=\w)(n't|'(?:s|m|re|ve|ll|d))(?=$|')", r" \1", word)
        tokens += TABLES["ptb_two_parts"].get(word, clitics_apart).split()
    return [token for token in tokens if token != "-"]


def ngram_counts(text: str) -> Counter:
    """How often each n-gram (a tuple of n = 1..4 tokens) occurs in a caption."""
    words, counts = ptb_tokenize(text), Counter()
    for n in range(1, 5):
        counts.update(zip(*(words[i:] for i in range(n))))
    return counts


def cider_d(captions: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D of each caption against its references, 0..10; papers report 100 times the mean.

    Source: Vedantam et al. 2015 and coco-caption. The idf comes from these references, so the score of a
    subset is not comparable. Quirks kept: a lone item has 0, a perfect caption of three words 7.5.
    """
    groups = [[*map(ngram_counts, texts)] for texts in references]
    items_with = Counter(gram for group in groups for gram in set().union(*group))
    idf = {gram: math.log(len(groups) / count) for gram, count in items_with.items()}
    scores, unseen = [], math.log(max(1, len(groups)))
    for caption, group in zip(map(ngram_counts, captions), groups, strict=True):
        similarities = [cider_similarity(caption, reference, idf, unseen) for reference in group]
        scores.append(10 * sum(similarities) / len(group))
    return scores


def cider_similarity(caption: Counter, reference: Counter, idf: dict, unseen: float) -> float:
    """Clipped tf-idf cosine of two captions, 0..1, averaged over n and damped by their difference in length,
    which is counted in bigrams (sigma 6). unseen: the idf of n-grams in no reference.
    """
    total = 0.0
    for n in range(1, 5):
        a = {gram: k * idf.get(gram, unseen) for gram, k in caption.items() if len(gram) == n}
        b = {gram: k * idf[gram] for gram, k in reference.items() if len(gram) == n}
        dot = sum(min(a[gram], b[gram]) * b[gram] for gram in a if gram in b)
        total += dot / (math.hypot(*a.values()) * math.hypot(*b.values()) or 1.0)
    bigrams = Counter(map(len, caption.elements()))[2] - Counter(map(len, reference.elements()))[2]
    return total / 4 * math.exp(-(bigrams**2) / (2 * 6**2))


def parse_box(text: str) -> tuple[int, ...] | None:
    """The first four numbers of a text as (x1, y1, x2, y2), in thousandths of the image's sides, or None.
    Each must be an integer in 0..999; digits glued to a letter (the 1 of "x1=20") are no number.
    """
    numbers = re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", text)[:4]
    valid = len(numbers) == 4 and all(re.fullmatch(r"\d{1,3}", number) for number in numbers)
    return tuple(map(int, numbers)) if valid else None


def box_hit(prediction: str, answer: str) -> float:
    """1.0 if the box in a text and the answer's have an intersection over union of at least 0.5, else 0.0.
    Edges are continuous (no + 1), and a box with swapped corners has no area.
    """
    truth, box = parse_box(answer), parse_box(prediction)
    if truth is None:
        raise ValueError(f"expected four integers 0-999 (x1 y1 x2 y2) as the answer, got {answer!r}")
    if box is None:
        return 0.0
    boxes = np.array([box, truth])
    overlap = np.concatenate([boxes[:, :2].max(0), boxes[:, 2:].min(0)])
    area, true_area, shared = ((corners[2:] - corners[:2]).clip(0).prod() for corners in (*boxes, overlap))
    return float(shared / (area + true_area - shared or 1) >= 0.5)


if __name__ == "__main__":
    model.run_cli(main)
