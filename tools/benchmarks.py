"""Public benchmarks: their questions as they are laid out, their prompts, and their own ways to score.

    python tools/benchmarks.py --model runs/a/sft --tasks pope,mme --root playground/data/eval --out eval.json
    python tools/benchmarks.py --model runs/a/sft --tasks mmstar:MMStar.tsv,mmmu:MMMU --limit 500
    python tools/benchmarks.py --model runs/a/pretrain --tasks vqav2 --shots 4 --demos vqav2/train.jsonl
    python tools/benchmarks.py --model runs/a/sft --tasks relaxed:my/charts.jsonl,anls:my/pages.jsonl
    python tools/benchmarks.py --answers their/answers --tasks pope    # scores answers of others, no model
    torchrun --nproc_per_node=8 tools/benchmarks.py --model runs/a/sft --tasks mmbench --out eval.json

--tasks names rows of BENCHMARKS, with ":PATH" where they do not lie in --root; they are read from LLaVA's
folders (playground/data/eval/NAME), from a .tsv of VLMEvalKit, or from parquet files of the hub. The tasks of
eval.py work too, and kind:FILE with two kinds more: `relaxed` (ChartQA's accuracy: numbers may be off by 5 %)
and `anls` (DocVQA's similarity of texts).

eval.py asks and scores, so its flags, its blind control and its kept answers are the same here. Prompts are
LLaVA-1.5's where it has the benchmark, else lmms-eval's. What only a server can score is written beside the
answers in the server's form (VQAv2, VizWiz, DocVQA). --limit asks a random part, drawn by the seed.
"""

import ast
import base64
import collections
import json
import math
import random
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import eval as evaluation
import model
from eval import CHOICES, Question
from model import UserError
from tools import convert

open_table = convert.open_table  # of .tsv and parquet files


@dataclass
class BenchmarkConfig(evaluation.EvalConfig):
    # -- benchmarks
    root: str = "playground/data/eval"  # where benchmarks without a path have their folders, as LLaVA's do
    limit: int = 0  # above 0: of each task of files only so many questions, drawn by the seed


def main(argv: list[str]) -> None:
    cfg = BenchmarkConfig()
    model.parse_cli(argv, __doc__, cfg)
    model.require_at_least(cfg, 0, "limit")
    evaluation.check_config(cfg)
    if not cfg.model and cfg.answers:
        return score_kept(cfg)
    model.require(cfg.model != "", "--model is missing: a run or checkpoint folder, such as runs/a/sft")
    tasks = evaluation.open_tasks(cfg, open_task)
    results, examples = evaluation.evaluate(tasks, cfg)
    evaluation.write_results(tasks, cfg, results, examples)
    write_uploads(tasks, cfg)


def score_kept(cfg: BenchmarkConfig) -> None:
    """Score the answers in the folder --answers, whoever gave them."""
    tasks = evaluation.open_tasks(cfg, open_task)
    results, examples = [], []
    for view in evaluation.views_of(cfg):
        for task in tasks:
            if task.kind == "text":
                raise UserError("--tasks: a loss on text needs --model")
            file = evaluation.answer_file(task, view, cfg)
            answers = kept_answers(file.path, task)
            missing = [i for i in range(len(task.questions)) if i not in answers]
            if missing:
                problem = f"{len(missing)} of {len(task.questions)} questions have no answer, the first is "
                problem += f"{task.questions[missing[0]].name}: give --model to have them answered"
                raise UserError(f"{file.path}: {problem}")
            answers = [answers[i] for i in range(len(task.questions))]
            blind_answers = kept_blind_answers(task, view, cfg, answers) if cfg.blind else None
            if any(question.answers for question in task.questions):
                rows, task_examples = evaluation.score_rows(task, answers, blind_answers, view, cfg.seed)
                results += rows
                examples += task_examples
    evaluation.write_results(tasks, cfg, results, examples)
    write_uploads(tasks, cfg)


def kept_answers(path: Path, task: evaluation.Task) -> dict[int, str]:
    """Answers by question number from a file in LLaVA's format; a last line that was cut off is left out."""
    numbers = {question.key: i for i, question in enumerate(task.questions)}
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    answers = {}
    for line_number, line in enumerate(lines, 1):
        place = f"{path} line {line_number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, prompt, answer = str(row["question_id"]), row["prompt"], row["text"]
            if not isinstance(answer, str):
                raise ValueError("'text' must be a string")
            number = numbers.get((name, prompt.removeprefix("<image>\n")), numbers.get((name, prompt)))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            if line_number == len(lines) and isinstance(e, json.JSONDecodeError):
                break
            raise UserError(f"{place}: expected an answer in LLaVA's format ({e!r})") from None
        if number is None:
            raise UserError(f"{place}: question_id {name} with this prompt is not one of {task.name}")
        if number in answers:
            raise UserError(f"{place}: question_id {name} is answered twice, delete one of them")
        answers[number] = answer
    return answers


def kept_blind_answers(task: evaluation.Task, view: str, cfg: BenchmarkConfig, answers: list) -> list | None:
    """Answers about swapped pictures, those to questions without a picture as they are; None if not kept."""
    path = evaluation.answer_file(task, view, cfg, blind=True).path
    if not path.is_file():
        return None
    blind_answers = list(answers)
    for i, answer in kept_answers(path, task).items():
        blind_answers[i] = answer
    return blind_answers


def write_uploads(tasks: list[evaluation.Task], cfg: BenchmarkConfig) -> None:
    """For benchmarks whose right answers only a server knows: their answers in its form."""
    if not evaluation.IS_FIRST_RANK:
        return
    for view in evaluation.views_of(cfg):
        for task in tasks:
            row = BENCHMARKS.get(getattr(task, "benchmark", ""))
            file = evaluation.answer_file(task, view, cfg)
            if row and row.upload and file and not any(question.answers for question in task.questions):
                write_upload(task, kept_answers(file.path, task), file.path.with_suffix(".upload.json"))


def write_upload(task: "BenchmarkTask", answers: dict[int, str], path: Path) -> None:
    """What the server takes: every question of its files once, with "" where it was not asked."""
    (id_name, spell), rows = BENCHMARKS[task.benchmark].upload, {}
    for name in more_ids(task):
        rows[str(name)] = {id_name: name, "answer": ""}
    for i, question in enumerate(task.questions):
        name = question.name
        if id_name == "image" and isinstance(question.images[0], Path):
            name = question.images[0].name
        rows[str(name)] = {id_name: name, "answer": spell(answers[i])}
    model.write_json(path, [*rows.values()])


def more_ids(task: "BenchmarkTask") -> list:
    """Every question that a server wants to see: for test-dev, VQAv2's takes the whole test split."""
    whole = (task.path if task.path.is_dir() else task.path.parent) / "llava_vqav2_mscoco_test2015.jsonl"
    if task.benchmark != "vqav2" or not whole.is_file():
        return []
    return [raw["question_id"] for raw, _ in json_rows(whole.name, whole.parent)]


# ---------------------------------------------------------------------------------------------------------
# Tasks


@dataclass
class BenchmarkTask(evaluation.Task):
    """A task whose answers are scored in a benchmark's own way."""

    benchmark: str = ""  # its row in BENCHMARKS; none: a kind:FILE

    @property
    def metric(self) -> str:
        metrics = {"relaxed": "relaxed_accuracy", "anls": "anls", "likelihood": "acc"}
        return metrics.get(self.kind, super().metric)

    def prompt(self, question: Question, tokenizer) -> list[data.Piece]:
        """As eval.py has it, with pictures where "<image 2>" marks them; of kind likelihood the bare text."""
        if self.kind == "likelihood":
            return data.pieces_of(data.Record("text", [question.text], []), tokenizer)[:-1]
        if self.shots is not None:
            return super().prompt(question, tokenizer)
        return marked_prompt(question, tokenizer)

    def score(self, answer: str, question: Question) -> float:
        options, right = [*question.options], question.answers
        if self.kind == "relaxed":
            return float(any(relaxed_match(answer, text) for text in right))
        if self.kind == "anls":
            return anls(answer, right)
        if self.kind == "mme":
            return float(mme_parse(answer) == right[0].lower())
        if self.kind == "letter":
            return float(answer.strip() == right[0])
        if self.kind == "scienceqa":
            return float(scienceqa_parse(answer, len(options)) == right[0])
        if self.kind == "mmbench":
            return float(mmbench_parse(answer, options) == right[0])
        if self.kind == "mmstar":
            return float(mmstar_parse(answer) == right[0])
        if self.kind == "mmmu" and question.choices:
            return float(mmmu_parse(answer, options) == right[0])
        if self.kind == "mmmu":
            return float(mmmu_open(answer, right))
        if self.kind == "likelihood":
            return float(likeliest(answer, question) == int(right[0]))
        return super().score(answer, question)

    def average(self, questions: list[Question], scores: list[float]) -> tuple[float, list[float]]:
        """MMBench counts the rotations of a question as one, right if all of them are; MMStar's score is the
        mean over its finest categories.
        """
        row = BENCHMARKS.get(self.benchmark)
        cells = collections.defaultdict(lambda: collections.defaultdict(list))
        for i, (question, score) in enumerate(zip(questions, scores)):
            cell = cells[question.subsets[-1] if row and row.macro else ""]
            cell[rotation_group(question) if self.kind == "mmbench" else i].append(score)
        means, values = [], []
        for cell in cells.values():
            lowest = [min(group) for group in cell.values()]
            means.append(sum(lowest) / len(lowest))
            values += lowest
        return sum(means) / len(means), values

    def finish_rows(
        self, rows: list[dict], answers: list[str], blind_answers: list[str] | None
    ) -> list[dict]:
        """A benchmark's own rows behind the others, and in all rows the prompt and the limit."""
        row = BENCHMARKS.get(self.benchmark)
        extra = row.extra if row else None
        try:
            extra_rows = extra(self.questions, answers) if extra else []
            blind_rows = extra(self.questions, blind_answers) if extra and blind_answers else []
        except ValueError as e:
            raise UserError(f"{self.path}: {e}") from None
        facts = {"stderr": None, "shots": self.shots or 0, "tokens": rows[0]["tokens"], "chance": None}
        for i, (name, metric, score, n) in enumerate(extra_rows):
            blind_score = round(blind_rows[i][2], 2) if blind_rows else None
            scores = {"metric": metric, "score": round(score, 2), "n": n, "blind_score": blind_score}
            rows.append({"task": f"{self.name}/{name}", **scores, **facts})
        if row and self.shots is None:
            rows = [{**row_of_task, "prompt": row.prompt} for row_of_task in rows]
        if self.limit:
            rows = [{**row_of_task, "limit": self.limit} for row_of_task in rows]
        return rows


def rotation_group(question: Question) -> str:
    """MMBench numbers the rotations of question 7 as 7, 1000007, 2000007, ..."""
    return str(int(question.name) % 1_000_000)


def marked_prompt(question: Question, tokenizer) -> list[data.Piece]:
    """A question in the chat template, each picture where it is marked, the unmarked ones in front."""
    content, unplaced = [], set(range(len(question.images)))
    for n, text in enumerate(re.split(r"<image (\d+)>", question.text)):  # texts and numbers in turn
        if n % 2 and int(text) - 1 in unplaced:
            content.append(int(text) - 1)
            unplaced.discard(int(text) - 1)
        elif text:
            content.append(f"<image {text}>" if n % 2 else text)
    turns = [("user", [*sorted(unplaced), *content]), ("assistant", [])]
    return data.chat_pieces(turns, tokenizer)


def open_task(name: str, shots: int | None, cfg: BenchmarkConfig) -> evaluation.Task:
    """A benchmark or a kind:FILE, perhaps a part of it; else one of eval.py's tasks."""
    kind, _, file = name.partition(":")
    if kind in BENCHMARKS:
        path, read = Path(file) if file else default_folder(kind, cfg.root), read_benchmark
    elif file and kind in (*evaluation.FILE_KINDS, "relaxed", "anls"):
        path, read = Path(file), read_own
    elif name in (*evaluation.SCENE_TASKS, "scenes_bind", "scenes_words"):
        return evaluation.open_task(name, shots, cfg)
    else:
        known = ", ".join(["scenes", *BENCHMARKS])
        kinds = "|".join([*evaluation.FILE_KINDS, "relaxed", "anls"])
        raise UserError(f"--tasks '{name}' is unknown: use {known} or {kinds}:FILE")
    task = read(kind, path, cfg.images)
    check_labels(task)
    limit_questions(task, cfg.limit, cfg.seed)
    if shots is None or task.kind in evaluation.TEXT_KINDS:
        return task
    pool = read(kind, Path(cfg.demos), cfg.images).questions if shots and cfg.demos else []
    return evaluation.add_demos(task, pool, shots, cfg.seed)


def read_own(kind: str, path: Path, images: str) -> BenchmarkTask:
    return BenchmarkTask(**vars(evaluation.file_task(kind, path, images)))


def limit_questions(task: evaluation.Task, limit: int, seed: int) -> None:
    """Keep `limit` questions; MME's pairs and MMBench's rotations stay together."""
    units = []
    for question in task.questions:
        unit = question.key
        if task.kind == "mme":
            unit = str(question.name)
        if task.kind == "mmbench":
            unit = rotation_group(question)
        units.append(unit)
    if limit and len({*units}) > limit:
        kept = {*random.Random(f"limit-{seed}").sample([*dict.fromkeys(units)], limit)}
        task.questions = [question for question, unit in zip(task.questions, units) if unit in kept]
        task.limit = limit


def check_labels(task: evaluation.Task) -> None:
    """Refuse right answers that are missing or that no answer can match, before anything is asked."""
    some_answered = any(question.answers for question in task.questions)
    for question in task.questions:
        place = f"{task.path}: question {question.name}"
        if some_answered and not question.answers and task.kind not in evaluation.TEXT_KINDS:
            raise UserError(f"{place} has no answer, while others have")
        if question.answers and task.kind in ("yesno", "mme", "ref"):
            evaluation.check_answer(task.kind.replace("mme", "yesno"), question, place)


# ---------------------------------------------------------------------------------------------------------
# The table. What LLaVA's question files hold ends in the tail of the prompt already and is taken as it is.

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
    kind: str  # how an answer is scored, see BenchmarkTask.score
    prompt: str  # of question, hint, context (a hint, announced), options (one a line), ocr
    max_new_tokens: int
    split: str  # beginning of the names of its parquet files, where a folder has several splits
    source: str
    files: tuple[str, ...] = ()  # in its folder, "questions | labels | picture": the first that exist count
    parts: tuple[str, ...] = ()  # columns that name the subsets of a question
    join: tuple[str, ...] = ("id",)  # what labels in a file of their own share with their question
    extra: Callable | None = None  # more rows: (questions, answers) -> [(name, metric, score, n)]
    upload: tuple[str, Callable] | None = None  # for a server: its name of the id, and how it spells answers
    macro: bool = False  # the score is the mean over the last subsets' means, not over questions
    folder: str = ""  # under --root; default: its name

    @property
    def tail(self) -> str:
        return self.prompt.rpartition("}")[2]


def pope_rows(questions: list[Question], answers: list[str]) -> list[tuple]:
    """Precision, recall, F1 and yes_ratio of each category; LLaVA reports the mean F1 of the three."""
    rows, f1_scores = [], []
    for category in dict.fromkeys(question.subsets[:1] for question in questions):
        pairs = []
        for question, answer in zip(questions, answers):
            if question.subsets[:1] == category:
                pairs.append((answer, question.answers[0]))
        scores = yesno_metrics(*map(list, zip(*pairs)))
        f1_scores.append(100 * scores["f1"])
        for metric, score in scores.items():
            if metric != "accuracy":
                rows.append((" ".join([*category, metric]), metric, 100 * score, len(pairs)))
    return [("mean f1", "f1", sum(f1_scores) / len(f1_scores), len(questions)), *rows]


def mme_rows(questions: list[Question], answers: list[str]) -> list[tuple]:
    """Points: accuracy + that of pictures with both answers right, 200 a category."""
    judged, counts = [], Counter(question.subsets[0] for question in questions)
    for question, answer in zip(questions, answers):
        facts = {"category": question.subsets[0], "question_id": str(question.name)}
        judged.append({**facts, "gt": question.answers[0], "pred": answer})
    for name, categories in MME_CATEGORIES.items():
        counts[name] = sum(counts[category] for category in categories)
    rows = []
    for name, score in mme_score(judged).items():
        points = score["score"] if isinstance(score, dict) else score
        rows.append((f"{name} points", "points", points, counts[name]))
    return rows


def bleu_rows(questions: list[Question], answers: list[str]) -> list[tuple]:
    score = bleu4(answers, [question.answers for question in questions])
    return [("bleu4", "bleu4", 100 * score, len(questions))]


def norm_rows(questions: list[Question], answers: list[str]) -> list[tuple]:
    right = 0
    for question, answer in zip(questions, answers):
        right += likeliest(answer, question, by_bytes=True) == int(question.answers[0])
    return [("norm", "acc_norm", 100 * right / len(questions), len(questions))]


def likeliest(answer: str, question: Question, by_bytes: bool = False) -> int:
    """The option with the largest of the summed log-likelihoods that `answer` lists, or with the largest one
    per byte (lm-eval's acc_norm counts characters: the same where all are ASCII).
    """
    best, best_value = 0, -math.inf
    for i, (value, option) in enumerate(zip(json.loads(answer), question.choices)):
        value = value / len(option.encode()) if by_bytes else value
        if value > best_value:
            best, best_value = i, value
    return best


CAPTION = {"extra": bleu_rows, "prompt": data.CAPTION_PROMPT, "kind": "caption", "max_new_tokens": 64}
BOX = {"kind": "ref", "prompt": REGION, "max_new_tokens": 32, "parts": ("split",)}
WORDS = {
    "kind": "likelihood",
    "prompt": "Question: {question}\nAnswer:",
    "max_new_tokens": 64,  # room for an option
    "extra": norm_rows,
}
LETTERED = ("choice", "letter", "scienceqa", "mmbench", "mmstar", "mmmu")
BENCHMARKS = {
    "vqav2": Benchmark(
        "vqa", "{question}" + SHORT, 16, "val", "Goyal et al. 2017",
        (f"v2_OpenEnded_mscoco_val2014_questions.json | v2_mscoco_val2014_annotations.json | {VAL2014}",
         "llava_vqav2_mscoco_test-dev2015.jsonl | | test2015/{image}",
         "llava_vqav2_mscoco_test2015.jsonl | | test2015/{image}"),
        upload=("question_id", evaluation.vqa_normalise),
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
        upload=("image", evaluation.vqa_normalise),
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
COLUMNS = {  # our name -> the names in files; the first that is there and not empty counts
    "id": "question_id questionId index id ind cocoid imgid img_id image_id",
    "image id": "image_id cocoid imgid img_id id question_id ind",  # captions are about pictures
    "image": "image imgname file_name filename image_id imageId",
    "question": "question query ctx goal sent expression text",
    "answers": "answers answer answerKey reference_strs annotations_captions sentences captions caption "
    "caption_str label multiple_choice_answer",
    "options": "options choices endings",
}


# ---------------------------------------------------------------------------------------------------------
# Reading: rows of files, then the questions of a row


def default_folder(name: str, root: str) -> Path:
    folder = Path(root) / (BENCHMARKS[name].folder or name)
    if not folder.is_dir():
        raise UserError(
            f"--tasks {name}: no folder {folder}; say where it is: --root DIR or --tasks {name}:PATH"
        )
    return folder


def read_benchmark(name: str, path: Path, images: str) -> BenchmarkTask:
    """The questions of a benchmark: a folder as LLaVA or its authors lay it out, a .tsv of VLMEvalKit, or
    parquet files of the hub. Pictures of tables stay in memory, each once.
    """
    if not path.exists() and ("**" in path.name or not any(path.parent.glob(path.name))):
        raise UserError(f"--tasks {name}:{path}: no such file or folder")
    row, memory, labels, folder, label_files, pattern = BENCHMARKS[name], {}, {}, path.parent, "", ""
    is_table = path.suffix in (".tsv", ".parquet") or (path.is_dir() and any(path.rglob("*.parquet")))
    if is_table:
        rows = table_rows(name, path)
    else:
        folder, question_files, label_files, pattern = find_layout(name, path, images)
        is_table = question_files.endswith(".tsv")
        try:
            rows = (
                table_rows(name, folder / question_files) if is_table else json_rows(question_files, folder)
            )
            for raw, _ in json_rows(label_files, folder) if label_files else ():
                labels.setdefault(join_key(row, raw), raw)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            files = f"{folder}: {question_files} or {label_files}"
            raise UserError(f"{files} are not laid out as {name}'s ({e!r})") from None
    if is_table and images:
        raise UserError(f"--images has no effect on {path}, whose pictures lie in it")
    questions, places = [], []
    for n, (raw, place) in enumerate(rows):
        raw = {**raw, "ind": raw.get("ind", n)}  # what has no id is counted
        if labels:
            raw = with_label(row, raw, labels, f"{place}: {label_files} in {folder}")
        try:
            if is_table:
                pictures = encoded_pictures(raw, memory, place)
            else:
                pictures = file_pictures(raw, folder, images, pattern, place)
            row_questions = questions_of(name, raw, pictures)
        except (KeyError, ValueError, TypeError, IndexError, SyntaxError, AttributeError) as e:
            columns = ", ".join(map(str, [*raw][:20]))
            raise UserError(f"{place}: not a question of {name} ({e!r}); its columns are {columns}") from None
        for question in row_questions:
            if pictures:
                question.picture = raw["picture_at"] if is_table else str(pictures[0].resolve())
        questions += row_questions
        places += [place] * len(row_questions)
    if row.kind == "caption":
        questions = merge_captions(questions)
    questions = with_unique_names(row, questions, places)
    if not questions:
        raise UserError(f"{path}: holds no questions of {name}")
    return BenchmarkTask(
        name, row.kind, questions, row.max_new_tokens, path=path, tail=row.tail, benchmark=name
    )


def with_label(row: Benchmark, raw: dict, labels: dict[tuple, dict], place: str) -> dict:
    """A row of a question file joined with its row of the label files."""
    key = join_key(row, raw)
    if key not in labels:
        names = ", ".join(f"{column} {value}" for column, value in zip(row.join, key))
        raise UserError(f"{place} has no label for {names}")
    there = {column: value for column, value in raw.items() if value is not None}
    return {**labels[key], "question": None, **there}


def merge_captions(questions: list[Question]) -> list[Question]:
    """One question a picture, of files with a row for each caption; TextCaps has all captions in each row."""
    merged = {}
    for question in questions:
        first = merged.setdefault(str(question.name), question)
        if first.answers != question.answers:
            first.answers += question.answers
    return [*merged.values()]


def with_unique_names(row: Benchmark, questions: list[Question], places: list[str]) -> list[Question]:
    """POPE numbers its questions anew in every category; TextVQA asks the same twice about a picture."""
    counts = Counter(question.key for question in questions)
    if max(counts.values(), default=1) > 1 and all(question.subsets for question in questions):
        renamed = []
        for question in questions:
            renamed.append(replace(question, name=f"{question.subsets[0]}/{question.name}"))
        questions = renamed
    first_place = {}
    for question, place in zip(questions, places):
        if question.key in first_place and "image" in row.join:
            question.name = f"{question.name}#{len(first_place)}"
        if question.key in first_place:
            problem = f"question_id {question.name} is there twice, first at {first_place[question.key]}"
            raise UserError(f"{place}: {problem}: drop one")
        first_place[question.key] = place
    return questions


# --- Files


def find_layout(name: str, path: Path, images: str) -> tuple[Path, str, str, str]:
    """Folder, question files, label files and the pattern of pictures; a path that is a file says which."""
    folder = path if path.is_dir() else path.parent
    missing_files = []
    for layout in BENCHMARKS[name].files:
        question_files, label_files, pattern = [*(text.strip() for text in layout.split("|")), "", ""][:3]
        if path.is_file() and not path.match(Path(question_files).name):
            continue
        pictures = Path(images) if images else folder / pattern.partition("{")[0].rpartition("/")[0]
        exists = {question_files: path.is_file() or any(folder.glob(question_files))}
        exists[str(pictures)] = pictures.is_dir()
        if label_files and "llava" in question_files:
            exists[label_files] = any(folder.glob(label_files))
        if all(exists.values()):
            return folder, path.name if path.is_file() else question_files, label_files, pattern
        missing_files.append(" and ".join(file for file in exists if not exists[file]))
    tables = [path] if path.is_file() else [*folder.glob("*.tsv")]
    if len(tables) == 1:
        return folder, tables[0].name, "", "{image}"
    missing = ", or ".join(missing_files) or "a .tsv or .parquet file"
    raise UserError(
        f"{path}: not the folder of {name}: it lacks {missing}; give such a folder, a .tsv or parquet files: "
        f"--tasks {name}:PATH"
    )


def json_rows(pattern: str, folder: Path) -> list[tuple[dict, str]]:
    """Records of files as benchmarks lay them out, and their places; `file` in one is its file's stem."""
    rows = []
    for path in sorted(folder.glob(pattern)):
        for raw, place in file_records(path, folder):
            if not isinstance(raw, dict):
                raise UserError(f"{place}: expected an object, got {str(raw)[:40]}")
            rows.append(({"file": path.stem, **raw}, place))
    return rows


def file_records(path: Path, folder: Path) -> list[tuple[dict, str]]:
    records = []
    if path.suffix == ".txt":  # MME: the questions about a picture, each with its answer behind a tab
        name = "/".join([path.relative_to(folder).parts[1], path.stem])
        for line in path.read_text("utf-8-sig").splitlines():
            if line.count("\t") == 1:
                question, answer = line.split("\t")
                facts = {"question_id": name, "image": path.stem}
                records.append({**facts, "question": question, "answer": answer})
    elif path.suffix == ".lst":  # PIQA: the number of the right answer of every line
        records = [{"ind": i, "label": label} for i, label in enumerate(path.read_text("utf-8-sig").split())]
    elif path.suffix == ".json":
        records = whole_json(path)
    else:
        table = data.Table(path)
        return [table.raw(i) for i in range(len(table))]
    return [(record, f"{path} record {n}") for n, record in enumerate(records)]


def whole_json(path: Path) -> list[dict]:
    """The records of a .json: a list, the list in an object (with COCO's captions put to their pictures), an
    object of objects by their ids, or, as POPE has it, one a line.
    """
    text = path.read_text("utf-8-sig")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        try:
            value = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError:
            raise UserError(f"{path} line {e.lineno} column {e.colno}: not valid JSON ({e.msg})") from None
    if isinstance(value, dict) and {"images", "annotations"} <= value.keys():
        captions = collections.defaultdict(list)
        for annotation in value["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        return [{**image, "captions": captions[image["id"]]} for image in value["images"]]
    if isinstance(value, dict):
        types = {number: name for name, number in value.get("question_type", {}).items()}  # SEED's
        lists = [value[key] for key in ("questions", "annotations", "data", "images") if key in value]
        value = lists[0] if lists else [{"question_id": key, **record} for key, record in value.items()]
        for record in value if types else ():
            record["question_type"] = types.get(record.get("question_type_id"))
    records = []
    for record in value:
        if not isinstance(record, dict) or record.get("split", "test") == "test":
            records.append(record)
    return records


def table_rows(name: str, path: Path) -> Iterator[tuple[dict, str]]:
    """Rows of a .tsv, or of parquet files: those of the benchmark's split, if it is one of several.
    `picture_at` in one is where tools/report.py finds its first picture: FILE#ROW.
    """
    all_files = sorted(path.rglob("*.parquet")) if path.is_dir() else sorted(path.parent.glob(path.name))
    files = [file for file in all_files if file.name.startswith(BENCHMARKS[name].split)] or all_files
    splits = {file.name.partition("-")[0] for file in files}
    if len(splits) > 1:
        raise UserError(
            f"{path}: has the splits {', '.join(sorted(splits))}: name one, --tasks {name}:FILE.parquet"
        )
    folders = {file.parent for file in files if not file.parent.name.endswith("_images")}
    if len(folders) > 1 and name != "mmmu":  # whose subjects have a folder each
        names = ", ".join(sorted(str(folder) for folder in folders))
        raise UserError(f"{path}: has several sets of questions, name one of them: {names}")
    pictures = {}  # GQA's lie in files of their own, which come first
    for file in sorted(files, key=lambda file: not file.parent.name.endswith("_images")):
        table = open_table(file)
        splits = splits_of_rows(name, table)
        for i in range(len(table)):
            raw, place = table.raw(i)
            if splits and raw["split"] not in splits:
                continue
            raw = {**raw, "picture_at": f"{file}#{i}"}
            if file.parent.name.endswith("_images"):
                pictures[raw["id"]] = {"image": raw["image"], "picture_at": raw["picture_at"]}
            else:
                yield {**raw, **pictures.get(raw.get("imageId"), {})}, place


def splits_of_rows(name: str, table: data.Table) -> set[str]:
    """The splits that count in a table of several, such as MMMU_DEV_VAL.tsv; empty: all rows count."""
    row = BENCHMARKS[name]
    if "split" not in table.raw(0)[0] or "split" in row.parts:
        return set()
    splits = {str(table.raw(i)[0]["split"]) for i in range(len(table))}
    return {split for split in splits if split.startswith(row.split)}


# --- Pictures


def encoded_pictures(raw: dict, memory: dict[bytes, bytes], place: str) -> tuple:
    """The bytes of a row's pictures, each picture once in memory."""
    pictures = []
    for column in ("image", *(f"image_{i}" for i in range(1, 10))):
        cell = first_of(raw, column)
        cells = tsv_pictures(cell, place) if isinstance(cell, str) else cell
        for picture in cells if isinstance(cells, list) else [cells]:
            content = picture["bytes"] if isinstance(picture, dict) else picture
            if content:
                pictures.append(memory.setdefault(content, content))
    return tuple(pictures)


def tsv_pictures(cell: str, place: str) -> list[bytes]:
    """The picture, or the list of pictures, that a cell holds in base64."""
    try:
        texts = json.loads(cell.replace("'", '"')) if cell.startswith("[") else [cell]
        return [base64.b64decode(text, validate=True) for text in texts]
    except (ValueError, TypeError, AttributeError):
        raise data.BadRecord(f"{place}: its image is not base64") from None


def file_pictures(raw: dict, folder: Path, images: str, pattern: str, place: str) -> tuple:
    if not pattern or (pattern.endswith("{image}") and not raw.get("image")):  # ScienceQA has some without
        return ()
    path = Path(images or folder) / (pattern.rpartition("/")[2] if images else pattern).format_map(raw)
    deeper = path.parent / "images" / path.name  # some of MME's categories have it so
    if not path.is_file() and not deeper.is_file():
        raise UserError(f"{place}: image {path} does not exist")
    return (path if path.is_file() else deeper,)


# --- Questions


def questions_of(name: str, raw: dict, pictures: tuple) -> list[Question]:
    """A record as the question to ask: one, but for RefCOCO, which describes a box in several sentences."""
    row = BENCHMARKS[name]
    if not pictures and row.kind not in ("scienceqa", "likelihood"):
        raise KeyError("image")
    if isinstance(raw.get("question"), dict):  # ARC's own files
        raw = {**raw, **raw["question"], "question": raw["question"]["stem"]}
    if "conversations" in raw:  # LLaVA's ScienceQA
        text = raw["conversations"][0]["value"].replace("<image>", "").strip()
        raw = {**raw, "text": text, "question": None}
    id_columns = COLUMNS["image id" if row.kind == "caption" else "id"]
    if name == "mme":  # whose pairs have the id of their picture
        id_columns = "question_id image_path " + id_columns
    number = first_of(raw, id_columns)
    subsets = tuple(subset_of(raw, column, pictures) for column in row.parts)
    if row.kind == "ref":
        return box_questions(row, raw, pictures, subsets, number)
    if row.kind == "likelihood":
        return [words_question(name, raw, subsets, number)]
    options, answers = options_of(raw), texts_of(first_of(raw, COLUMNS["answers"]))
    text = prompt_text(name, raw, options)
    choices = CHOICES["yesno"] if row.kind in ("yesno", "mme") else ()
    if row.kind in LETTERED:
        if not options:
            options = [*evaluation.option_letters(text).values()]
        choices = tuple(string.ascii_uppercase[: len(options)])
        if options and answers and answers[0].isdecimal():
            answers = [string.ascii_uppercase[int(answers[0])]]
        if choices and answers and answers[0] not in choices and row.kind != "mmstar":
            raise ValueError(f"answer {answers[0]} is none of the options {', '.join(choices)}")
    options = tuple(options) if row.kind in LETTERED else ()
    return [Question(pictures, text, answers, subsets, choices, number, options=options)]


def prompt_text(name: str, raw: dict, options: list[str]) -> str:
    """A record in its benchmark's prompt, or the text of LLaVA's question file, which has it already."""
    row, question = BENCHMARKS[name], bare_question(BENCHMARKS[name], raw)
    text = raw.get("text") if raw.get("question") is None else None
    if name == "textvqa":  # lmms-eval's way, whatever the file
        question, text = question.capitalize(), None
    if text is not None:
        if "ocr" not in row.prompt:
            text = re.sub(r"\nReference OCR token:.*", "", text)
        return text if text.endswith(row.tail) else text + row.tail
    if "{question}" in row.prompt and not question:
        raise KeyError("question")
    lines = [f"\n{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options)]
    hint = first_of(raw, "hint")
    hints = {"hint": f"{hint}\n" if hint else "", "context": f"Context: {hint}\n" if hint else ""}
    prompt = row.prompt if options or row.kind != "mmmu" else "{question}\n" + SHORT  # an open question
    ocr = ", ".join(raw.get("ocr_tokens") or [])
    return prompt.format(question=question, options="".join(lines), ocr=ocr, **hints)


def words_question(name: str, raw: dict, subsets: tuple, number) -> Question:
    """ARC, PIQA, HellaSwag: a text, its possible continuations, and the number of the right one."""
    row, question, options = BENCHMARKS[name], bare_question(BENCHMARKS[name], raw), options_of(raw)
    if name == "hellaswag":
        question = plain_steps(f"{raw['activity_label']}: {raw['ctx_a']} {raw['ctx_b'].capitalize()}")
        options = [plain_steps(option) for option in options]
    labels = raw.get("choices", {})
    labels = [c["label"] for c in labels] if isinstance(labels, list) else labels.get("label", [])
    answers = []
    for answer in texts_of(first_of(raw, COLUMNS["answers"])):
        answers.append(str(labels.index(answer) if answer in labels else int(answer)))
    return Question((), row.prompt.format(question=question), answers, subsets, (*options,), number)


def box_questions(row: Benchmark, raw: dict, pictures: tuple, subsets: tuple, number) -> list[Question]:
    """bbox is (x1, y1, x2, y2) beside the picture's width and height, else COCO's (x, y, width, height)."""
    sentences = texts_of(first_of(raw, "sent expression sentences answer text"))
    box = [float(x) for x in raw["bbox"]]
    if "width" in raw:
        size = raw["width"], raw["height"]
    else:
        size, box = data.picture_size(pictures[0]), [*box[:2], box[0] + box[2], box[1] + box[3]]
    corners = [str(max(0, min(999, round(1000 * x / size[i % 2])))) for i, x in enumerate(box)]
    questions = []
    for i, sentence in enumerate(sentences):
        name = number if len(sentences) == 1 else f"{number}/{i}"
        text = row.prompt.format(question=sentence)
        questions.append(Question(pictures, text, [" ".join(corners)], subsets, name=name))
    return questions


def plain_steps(text: str) -> str:
    """HellaSwag's WikiHow texts without their marks, as lm-eval cleans them."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


# --- Columns


def first_of(raw: dict, names: str):
    """The value of the first of these columns that is there and not empty."""
    for name in names.split():
        if name in raw and raw[name] not in (None, "", "nan", []):
            return raw[name]
    return None


def bare_question(row: Benchmark, raw: dict) -> str:
    """Without what prompts add to it."""
    text = re.sub(r"\n?Reference OCR token:.*", "", str(first_of(raw, COLUMNS["question"]) or ""))
    text = text.replace("in the imange?", "in the image?")  # POPE's typo, not in all of its versions
    text = text.strip().removesuffix(SHORT.strip()).strip()
    return text.removesuffix("Please answer yes or no.").strip()


def join_key(row: Benchmark, raw: dict) -> tuple[str, ...]:
    """What joins a question and its labels."""
    values = {
        "id": str(first_of(raw, COLUMNS["id"])),
        "image": Path(str(first_of(raw, COLUMNS["image"]))).stem,
        "question": bare_question(row, raw).lower(),
        "category": subset_of(raw, "category", ()),
    }
    return tuple(values[column] for column in row.join)


def subset_of(raw: dict, column: str, pictures: tuple) -> str:
    """The sub-score a record belongs to: from that column, its id or its file's name."""
    if column == "picture":
        return "IMG" if pictures else "TXT"
    value, name = first_of(raw, column), str(first_of(raw, COLUMNS["id"]))
    if column == "subject":
        value = first_of(raw, "subject category") or re.sub(r"^[a-z]+_|_\d+$", "", name)  # validation_Art_1
    if value in (None, "default"):
        value = name.partition("/")[0] if "/" in name else raw.get("file", "")
    return re.sub(r"^(coco_pope_|test_|refcoco[+g]?_)|_test$", "", str(value))


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
    if not isinstance(value, list):
        return [str(value)]
    texts = []
    for item in value:
        texts += texts_of(item)
    return texts


def options_of(raw: dict) -> list[str]:
    """The texts of a record's options, from one column or from a column each."""
    value = first_of(raw, COLUMNS["options"])
    if isinstance(value, str):
        value = ast.literal_eval(value)
    if isinstance(value, dict):  # ARC
        value = value["text"]
    if value is None:
        value = []
        for names in ("ABCDEFGHI", [f"choice_{c}" for c in "abcd"], ("sol1", "sol2")):
            filled = [name for name in names if raw.get(name) not in (None, "", "nan")]
            if filled != [*names[: len(filled)]]:
                raise ValueError(f"an option before {filled[-1]} is empty")
            value = value or [raw[name] for name in filled]
    return [option["text"] if isinstance(option, dict) else str(option) for option in value]


# ---------------------------------------------------------------------------------------------------------
# Scorers: pure functions from text to numbers

# --- Yes or no (POPE, MME)


def yesno_metrics(predictions: list[str], labels: list[str]) -> dict[str, float]:
    """accuracy, precision, recall, f1 and yes_ratio, all in 0..1, with 'yes' as the positive class (POPE).

    predictions: the model's raw texts, parsed here; labels: yes or no in any case, in that order. The
    yes_ratio is the predictions'. A ratio over nothing is 0. Unequal lengths or other labels: ValueError.
    """
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions but {len(labels)} labels")
    truths = [label.strip().lower() for label in labels]
    if not set(truths) <= {"yes", "no"}:
        raise ValueError(f"labels must be yes or no, got also {sorted(set(truths) - {'yes', 'no'})}")
    pairs = Counter(zip(map(evaluation.yesno_parse, predictions), truths, strict=True))
    hits = pairs["yes", "yes"]
    yes_answers = hits + pairs["yes", "no"]
    precision = hits / max(1, yes_answers)
    recall = hits / max(1, hits + pairs["no", "yes"])
    return {
        "accuracy": (hits + pairs["no", "no"]) / max(1, len(truths)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": yes_answers / max(1, len(truths)),
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


# --- Multiple choice (ScienceQA, MMBench, MMMU, MMStar)


def scienceqa_parse(text: str, n: int) -> str | None:
    """The letter of an answer to a ScienceQA question with n choices by LLaVA's rule, or None (wrong).

    The text is one of A-E, or starts with "A. ", or holds exactly one "The answer is A" and one character
    more (the rule's period is a regex dot). Quirks kept: no strip and no lower case, so " A", "a", "(A)" and
    "A." alone fail, as does a final "The answer is C" without a period. A letter beyond n or beyond E: None.
    """
    start = re.match(r"([A-E])(?:\. |\Z)", text)
    letters = [start[1]] if start else re.findall(r"The answer is ([A-Z]).", text)
    return letters[0] if len(letters) == 1 and letters[0] in "ABCDE"[:n] else None


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
        letters = [letter for letter in "ABCDE" if shape.format(letter) in words]
        article = shape == "{}" and letters == ["A"] and len(words) > 3
        if len(letters) == 1 and not article:
            return letters[0]
    lettered = zip(string.ascii_uppercase, options, strict=False)
    named = [letter for letter, option in lettered if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


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
        candidates = [letter for letter in letters if shape.format(letter) in text]
        if candidates:
            return max(candidates, key=lambda letter: text.rfind(place.format(letter)))
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
    statements, values = tails or [text], set()
    for statement in statements:
        values.update(mmmu_normalise(statement))
        for pattern in MMMU_NUMBERS:
            for number in re.findall(pattern, statement):
                values.update(mmmu_normalise(number))
    return sorted(values, key=str)


def mmmu_open(text: str, golds: list[str]) -> bool:
    """Whether an open answer is right by MMMU's rule: a gold lies within a text it gives, or is its number.

    Numbers are rounded to two places; see `mmmu_values`. Quirks kept: a gold "no" is right where the text
    says "unknown"; number words are no numbers.
    """
    values = mmmu_values(text)
    for gold in golds:
        for right in mmmu_normalise(gold):
            for value in values:
                if right == value or (isinstance(right, str) and isinstance(value, str) and right in value):
                    return True
    return False


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
    for places in formats:
        place, letter = max(places, default=(-1, None))
        if place >= 0:
            return letter
    return None


# --- Short answers (DocVQA, ChartQA)


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
    tidy, *tidy_answers = (" ".join(text.lower().split()) for text in (prediction, *answers))
    distances = [
        edit_distance(tidy, short) / (max(len(prediction), len(answer)) or 1)
        for short, answer in zip(tidy_answers, answers, strict=True)
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


# --- Captions. A score is one of the whole set: that of a subset is not comparable.


def bleu4(candidates: list[str], references: list[list[str]]) -> float:
    """Corpus BLEU-4 of captions, 0..1: hits are summed over the set before precisions are taken.

    Source: Papineni et al. 2002 and coco-caption: an n-gram counts at most as often as in one reference, and
    brevity is measured against the reference nearest in length, the shorter of two. Quirks kept: 1e-15 is
    added to a count of hits and 1e-9 to what divides it, so no hits give not quite 0, and a set of perfect
    captions of three words (no 4-gram) only 0.03. Unequal lengths, an item without references: ValueError.
    """
    hits, tries, reference_length = Counter(), Counter(), 0
    for candidate, texts in zip(candidates, references, strict=True):
        counts, group = evaluation.ngram_counts(candidate), [*map(evaluation.ngram_counts, texts)]
        most = Counter()
        for reference in group:
            most |= reference
        for gram, k in counts.items():
            tries[len(gram)] += k
            hits[len(gram)] += min(k, most[gram])
        length = word_count(counts)
        lengths = [word_count(reference) for reference in group]
        reference_length += min(lengths, key=lambda other: (abs(other - length), other))
    tiny, small = 1e-15, 1e-9
    precisions = [(hits[n] + tiny) / (tries[n] + small) for n in range(1, 5)]
    ratio = (tries[1] + tiny) / (reference_length + small)
    return math.prod(precisions) ** 0.25 * math.exp(min(0.0, 1 - 1 / ratio))


def word_count(counts: Counter) -> int:
    """Words of a caption, from the counts of its n-grams."""
    return sum(k for gram, k in counts.items() if len(gram) == 1)


if __name__ == "__main__":
    model.run_cli(main)
