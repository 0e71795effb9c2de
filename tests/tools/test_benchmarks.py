"""Benchmarks: miniatures in the layouts of LLaVA, VLMEvalKit and the hub; joins, answer files, two ranks."""

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_benchmarks import (
    CAPTIONS,
    COLOURS,
    LETTER,
    LLAVA,
    SHORT,
    coded,
    four,
    mmbench_rows,
    mmmu_rows,
    png,
    put,
    put_gqa,
    put_mme,
    put_piqa,
    put_pope,
    put_scienceqa,
    put_textvqa,
)
from helpers_eval import TOKENIZER, prompt_text, save_tiny_run, tiny_vlm

import eval as evaluation
import model
from model import UserError
from tools import benchmarks

ROOT = Path(__file__).parent.parent.parent
ABCD = dict(zip("ABCD", COLOURS))


def picture(n: int) -> dict:
    return {"bytes": png(n), "path": f"{n}.png"}


def mme_table(pictures: list) -> list[dict]:
    names = [f"color/{n // 2}.png" for n in range(4)]
    texts = [f"Is it {n}? Please answer yes or no." for n in range(4)]
    return four(image=pictures, question_id=names, category="color", question=texts, answer=["Yes", "No"] * 2)


CODED, PICTURES, NUMBERS = [coded(n) for n in range(4)], [picture(n) for n in range(4)], [0, 1, 2, 3]
LETTERS, TEXTS = list("ABCD"), [str(n) for n in range(4)]
which = functools.partial(four, index=NUMBERS, image=CODED, question="Which?", answer=LETTERS)
shown = functools.partial(four, image=PICTURES, question="Which?")
many = [[colour] * 10 for colour in COLOURS[:4]]
captions = [[caption] * 5 for caption in CAPTIONS[:4]]
categories, fine = ["c0", "c0", "c1", "c1"], ["l0", "l1", "l2", "l3"]
TSV = {  # VLMEvalKit's columns
    "mmbench": mmbench_rows(),
    "mmbench_cn": mmbench_rows(),
    "mmstar": which(**ABCD, category=categories, l2_category=fine),
    "seed": which(**ABCD, category="Scene"),
    "mmmu": four(
        index=NUMBERS, image=[f"['{coded(n)}', '{coded(n + 1)}']" for n in range(4)], **ABCD, answer=LETTERS,
        question="<image 1> or <image 2>?", category="Art", **{"l2-category": "Arts"}, split="validation",
    ),
    "scienceqa": which(hint="", **ABCD),
    "pope": four(
        index=NUMBERS, image=[coded(0), coded(1)] * 2, question=[f"Is it {n}?" for n in range(4)],
        answer=["yes", "no"] * 2, category="random",
    ),
    "mme": mme_table([coded(n // 2) for n in range(4)]),
    "chartqa": which(question="How many?", answer=[10**n for n in range(4)], split="test_human"),
}  # fmt: skip
PARQUET = {  # the hub's columns, as lmms-eval reads them
    "vqav2": shown(question_id=NUMBERS, answers=[[{"answer": a[0], "answer_id": 1}] * 10 for a in many]),
    "okvqa": shown(question_id=NUMBERS, answers=many),
    "textvqa": shown(question_id=NUMBERS, answers=many, ocr_tokens=["A"]),
    "textvqa_ocr": shown(question_id=NUMBERS, answers=many, ocr_tokens=["A"]),
    "vizwiz": shown(question_id=[f"V{n}" for n in range(4)], answers=many),
    "scienceqa": shown(choices=[COLOURS[:4]] * 4, answer=NUMBERS, hint=""),
    "pope": shown(
        question_id=list("0011"), answer=["yes", "yes", "no", "no"], category=["random", "popular"] * 2
    ),
    "mme": mme_table([picture(n // 2) for n in range(4)]),
    "mmbench": shown(index=NUMBERS, **ABCD, answer=LETTERS, hint="nan", category="c", **{"L2-category": "l"}),
    "seed": four(
        image=[[picture(n)] for n in range(4)], question="Which?", answer=LETTERS, data_type="image",
        question_id=TEXTS, question_type_id=1, **{f"choice_{c}": o for c, o in zip("abcd", COLOURS)},
    ),
    "mmmu": [{**row, "image_1": picture(n), "image_2": picture(n + 1)} for n, row in enumerate(mmmu_rows())],
    "mmstar": four(
        index=NUMBERS, question="Which?\nOptions: A: red, B: blue, C: green, D: orange", answer=LETTERS,
        image=[{"bytes": png(n), "path": None} for n in range(4)], category=categories, l2_category=fine,
    ),
    "docvqa": shown(questionId=TEXTS, answers=[[f"ITC {colour}"] for colour in COLOURS[:4]]),
    "chartqa": shown(type=["human_test", "augmented_test"] * 2, answer=[str(10**n) for n in range(4)]),
    "coco_cap": shown(question_id=[f"{n}.jpg" for n in range(4)], id=NUMBERS, answer=captions),
    "flickr30k": shown(img_id=TEXTS, caption=captions),
    "nocaps": shown(image_id=NUMBERS, annotations_captions=captions, domain="in-domain"),
    "textcaps": shown(image_id=TEXTS, caption_str=[[c[0]] for c in captions], reference_strs=captions),
    "refcoco": shown(
        question_id=TEXTS, answer=[["this", "that"]] * 4, bbox=[[2.0, n, 8.0, 4.0] for n in range(4)]
    ),
}  # fmt: skip


def open_all(**flags) -> list[evaluation.Task]:
    return evaluation.open_tasks(benchmarks.BenchmarkConfig(**flags), benchmarks.open_task)


def open_one(name: str, path: Path | str, **flags) -> evaluation.Task:
    (task,) = open_all(tasks=f"{name}:{path}", **flags)
    return task


def right_answer(question: evaluation.Question, kind: str, right: float = -1.0, wrong: float = -200.0) -> str:
    if kind != "likelihood":
        return question.answers[0]
    numbers = map(str, range(len(question.choices)))
    return json.dumps([right if number == question.answers[0] else wrong for number in numbers])


def wrong_answer(question: evaluation.Question, kind: str) -> str:
    if kind == "likelihood":
        return right_answer(question, kind, -200.0, -1.0)
    return {"yes": "No", "no": "Yes"}.get(question.answers[0].lower(), "nothing of that")


def score(task: evaluation.Task, answer, monkeypatch, blind=wrong_answer) -> dict:
    """Rows by name, where the model answers so, and so behind other pictures."""

    def answer_all(vlm, tokenizer, task, images, view, cfg, kept, known=()):
        answers = []
        for question, pictures in zip(task.questions, images):
            assert pictures == question.images or not {*pictures} & {*question.images}
            answers.append((answer if pictures == question.images else blind)(question, task.kind))
        return answers

    monkeypatch.setattr(evaluation, "answer_all", answer_all)
    rows, examples = evaluation.score_task(None, None, task, "full", evaluation.EvalConfig())
    assert {example["picture"] for example in examples} <= {question.picture for question in task.questions}
    assert all(bool(question.picture) == bool(question.images) for question in task.questions)
    keys = {"task", "metric", "score", "stderr", "n", "shots", "tokens", "blind_score", "chance"}
    assert all(keys <= row.keys() for row in rows)
    evaluation.print_table(rows)
    return {row["task"]: row for row in rows}


def check_oracle(task: evaluation.Task, monkeypatch) -> dict:
    top = 1000 if task.kind == "caption" else 100
    rows, wrong = score(task, right_answer, monkeypatch), score(task, wrong_answer, monkeypatch)
    assert rows[task.name]["score"] == top, rows
    assert wrong[task.name]["score"] < top / 2
    assert rows[task.name]["prompt"] == benchmarks.BENCHMARKS[task.benchmark].prompt
    sees = any(q.images for q in task.questions)
    assert (rows[task.name]["blind_score"] is None) == (not sees)
    return rows


@pytest.mark.parametrize("name", LLAVA)
def test_folders_of_llava_and_of_the_authors(name, tmp_path, monkeypatch):
    folder = tmp_path / (benchmarks.BENCHMARKS[name].folder or name)
    LLAVA[name](folder)
    task = open_one(name, folder)
    check_oracle(task, monkeypatch)
    (found,) = open_all(tasks=name, root=str(tmp_path))
    assert found.questions == task.questions


@pytest.mark.parametrize("name", TSV)
def test_tables_of_vlmevalkit(name, tmp_path, monkeypatch):
    task = open_one(name, put(tmp_path, "X_DEV.tsv", TSV[name]))
    assert all(isinstance(p, bytes) and p.startswith(b"\x89PNG") for q in task.questions for p in q.images)
    check_oracle(task, monkeypatch)


@pytest.mark.parametrize("name", PARQUET)
def test_parquet_of_the_hub(name, tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    split = benchmarks.BENCHMARKS[name].split
    for which, rows in ((split, PARQUET[name]), ("other", PARQUET[name][:1])):
        parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / f"{which}-00000-of-00001.parquet")
    task = open_one(name, tmp_path)
    check_oracle(task, monkeypatch)
    if name == "refcoco":  # COCO's x, y, width, height in a picture of 20 x 10
        boxes = [q.answers[0] for q in task.questions[:3]]
        assert boxes == ["100 0 500 400", "100 0 500 400", "100 100 500 500"]


def test_gqa_of_the_hub_has_its_pictures_in_files_of_their_own(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"id": f"n{n}", "image": picture(n)} for n in range(3)]
    questions = [{"id": f"0{n}", "imageId": f"n{n}", "question": "?", "answer": COLOURS[n]} for n in range(3)]
    for part, rows in (("images", images), ("instructions", questions)):
        (tmp_path / f"testdev_balanced_{part}").mkdir()
        file = tmp_path / f"testdev_balanced_{part}" / "testdev-00000-of-00001.parquet"
        parquet.write_table(arrow.Table.from_pylist(rows), file)
    check_oracle(open_one("gqa", tmp_path), monkeypatch)


# --- What is asked


def test_prompts_to_the_letter(tmp_path):
    for name, put_files in LLAVA.items():
        put_files(tmp_path / name)
    texts = {name: open_one(name, tmp_path / name).questions[0].text for name in LLAVA}
    options = "\nA. red\nB. blue\nC. green"
    assert texts["vqav2"] == f"what is 0?{SHORT}" == texts["okvqa"]
    assert texts["textvqa"] == f"What is 0?{SHORT}"
    assert texts["textvqa_ocr"] == f"What is 0?\nReference OCR token: A0, b{SHORT}"
    assert texts["vizwiz"] == (
        f"what colour?\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT}"
    )
    assert texts["scienceqa"] == f"Context: c0\nWhich?{options}{LETTER}"
    assert texts["pope"] == f"Is there a orange ring?{SHORT}"  # the suffix is there once
    assert texts["mme"] == f"Is it red?{SHORT}"
    assert texts["mmbench"] == f"Which is 0?{options}{LETTER}"
    assert texts["mmbench_cn"] == f"Which is 0?{options}\n请直接回答选项字母。"
    assert texts["seed"] == f"Which?{options}\nD. orange{LETTER}"
    assert texts["chartqa"] == "How many 0?\nAnswer the question with a single word."
    assert texts["coco_cap"] == "Provide a one-sentence caption for the provided image."
    assert texts["arc_easy"] == "Question: Which 0?\nAnswer:" and texts["piqa"] == "Question: Do 0.\nAnswer:"
    assert texts["hellaswag"] == "Cooking: He cuts. Then he"
    swag = open_one("hellaswag", tmp_path / "hellaswag").questions[1]
    assert swag.choices == tuple(f"eats {c}." for c in COLOURS[:4]) and swag.answers == ["1"]
    assert open_one("mmbench", tmp_path / "mmbench").questions[3].text.startswith("Look.\nWhich is 1?")
    star = open_one("mmstar", put(tmp_path, "MMStar.tsv", TSV["mmstar"])).questions[0].text
    assert star == f"Which?{options}\nD. orange{LETTER.removesuffix('.')}"
    box = open_one("refcoco", tmp_path / "refcoco").questions[1]
    assert box.text.endswith("the blue one, testA") and box.answers == ["100 100 900 600"]


def test_pictures_stand_at_their_marks():
    def laid(text: str, n: int) -> str:
        q = evaluation.Question((*map(png, range(n)),), text, ["A"])
        pieces = benchmarks.BenchmarkTask("t", "mmmu", [q]).prompt(q, TOKENIZER)
        return re.sub(" +", " ", prompt_text(pieces))

    plain = laid("which?", 1)
    assert "[0]" in plain and plain.index("[0]") < plain.index("which?")
    marked = laid("see <image 2> then <image 1>, <image 2>; <image 9>", 3)
    places = [marked.index(mark) for mark in ("[2]", "see", "[1]", "then", "[0]", "<image 2>", "<image 9>")]
    assert places == sorted(places)  # the one without a mark first, a second mark stays text
    assert "[" not in laid("no picture <image 1>", 0) and "<image 1>" in laid("no picture <image 1>", 0)


def test_several_pictures_none_and_bytes_go_through_a_model(tmp_path):
    vlm = tiny_vlm()
    task = open_one("mmmu", put(tmp_path, "MMMU.tsv", TSV["mmmu"]))
    assert [len(q.images) for q in task.questions] == [2] * 4
    task.questions[1].images, task.max_new_tokens = (), 4
    for mode in ("full", "pruned"):
        cfg = evaluation.EvalConfig(batch_size=3)
        rows, examples = evaluation.score_task(vlm, TOKENIZER, task, mode, cfg)
        assert rows[0]["n"] == len(examples) == 4
        assert {example["picture"] for example in examples} == {f"{tmp_path}/MMMU.tsv#{n}" for n in range(4)}


def test_likelihoods_of_words_are_those_of_the_decoder(tmp_path):
    """Sums and sums a byte, against one sequence at a time through the decoder alone."""
    put_piqa(tmp_path)
    vlm, task = tiny_vlm(), open_one("piqa", tmp_path)
    rows, _ = evaluation.score_task(vlm, TOKENIZER, task, "full", evaluation.EvalConfig(batch_size=3))
    right = {"acc": 0, "acc_norm": 0}
    for question in task.questions:
        sums = []
        for option in question.choices:
            head = [*TOKENIZER.start, *TOKENIZER.encode(question.text)]
            ids = [*head, *TOKENIZER.encode(option)]
            logits = vlm.decoder(torch.tensor([ids]))[0].log_softmax(-1)
            sums.append(sum(logits[t - 1, ids[t]].item() for t in range(len(head), len(ids))))
        norms = [s / len(option.encode()) for s, option in zip(sums, question.choices)]
        right["acc"] += sums.index(max(sums)) == int(question.answers[0])
        right["acc_norm"] += norms.index(max(norms)) == int(question.answers[0])
    assert {row["metric"]: row["score"] for row in rows} == {k: 25 * v for k, v in right.items()}
    assert all(row["blind_score"] is None for row in rows)
    best = json.dumps([-10.0, -12.0])  # 8 and 15 bytes
    question = task.questions[0]
    assert benchmarks.likeliest(best, question) == 0 and benchmarks.likeliest(best, question, True) == 1


# --- How it is scored


def half(question, kind):
    return right_answer(question, kind) if str(question.name)[-1] in "02468" else wrong_answer(question, kind)


def test_pope_has_f1_per_category_and_its_mean(tmp_path, monkeypatch):
    put_pope(tmp_path)
    task = open_one("pope", tmp_path)
    rows = score(task, lambda q, kind: "Yes", monkeypatch)
    assert [rows[name]["score"] for name in ("pope", "pope/random", "pope/random precision")] == [50] * 3
    assert rows["pope/mean f1"]["score"] == pytest.approx(66.67)
    assert rows["pope/popular yes_ratio"]["score"] == 100
    first = next(q for q in task.questions if q.subsets == ("random",) and q.answers == ["yes"])
    one_wrong = score(task, lambda q, kind: "No" if q is first else right_answer(q, kind), monkeypatch)
    f1 = [one_wrong[f"pope/{part} f1"]["score"] for part in ("random", "popular", "adversarial")]
    assert f1[1:] == [100, 100] and f1[0] < 100
    assert one_wrong["pope/mean f1"]["score"] == pytest.approx(sum(f1) / 3, abs=0.01)
    assert rows["pope/random f1"]["blind_score"] == 0


def test_pope_labels_of_the_authors_alone_are_enough(tmp_path, monkeypatch):
    """They number their questions anew in each file."""
    put_pope(tmp_path)
    (tmp_path / "llava_pope_test.jsonl").unlink()
    task = open_one("pope", tmp_path)
    assert len(task.questions) == 12 and {q.name for q in task.questions} >= {"random/1", "popular/1"}
    assert all(q.text.endswith(SHORT) and q.text.count("single word") == 1 for q in task.questions)
    check_oracle(task, monkeypatch)


def test_mme_counts_pairs(tmp_path, monkeypatch):
    put_mme(tmp_path)
    task = open_one("mme", tmp_path)
    assert score(task, right_answer, monkeypatch)["mme/perception points"]["score"] == 400
    missed = task.questions[0]
    rows = score(task, lambda q, kind: "No" if q is missed else right_answer(q, kind), monkeypatch)
    assert missed.subsets == ("color",) and rows["mme/color points"]["score"] == 75 + 50
    assert rows["mme/perception points"]["score"] == 325 and rows["mme/cognition points"]["score"] == 200
    few = open_one("mme", tmp_path, limit=2).questions
    assert len(few) == 4 and len({q.name for q in few}) == 2  # pairs stay together


def test_mmbench_is_circular(tmp_path, monkeypatch):
    LLAVA["mmbench"](tmp_path)
    task = open_one("mmbench", tmp_path)
    first, second, _, other = (q.images[0] for q in task.questions[:4])
    assert first is second and first != other
    rows = score(task, lambda q, kind: q.answers[0] if q.name != "1000001" else "no idea", monkeypatch)
    assert rows["mmbench"]["n"] == 3 and rows["mmbench"]["score"] == pytest.approx(66.67)
    assert rows["mmbench/c1"]["score"] == 0 and rows["mmbench/l0"]["score"] == 100
    assert rows["mmbench"]["chance"] == 0  # one letter is never right in all rotations
    few = open_one("mmbench", tmp_path, limit=1).questions
    assert len(few) == 3 and len({benchmarks.rotation_group(q) for q in few}) == 1


def test_mmstar_is_a_mean_over_its_capabilities(tmp_path, monkeypatch):
    rows = [{**row, "l2_category": "ab"[n == 3], "category": "c"} for n, row in enumerate(TSV["mmstar"])]
    task = open_one("mmstar", put(tmp_path, "MMStar.tsv", rows))
    found = score(task, lambda q, kind: "D", monkeypatch)
    assert found["mmstar"]["score"] == 50 and found["mmstar/a"]["score"] == 0  # not 25


def test_captions_of_coco_and_rows_of_one_caption_each(tmp_path, monkeypatch):
    images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in range(3)]
    captions_of_all = [{"image_id": n % 3, "id": n, "caption": CAPTIONS[n]} for n in range(6)]
    for image in images:
        put(tmp_path, f"coco/val2017/{image['file_name']}", png(image["id"]))
        put(tmp_path, f"text/train_images/{image['id']}.jpg", png(image["id"]))
    put(tmp_path, "coco/captions_val2017.json", {"images": images, "annotations": captions_of_all})
    rows = [{"image_id": row["image_id"], "caption_str": row["caption"]} for row in captions_of_all]
    put(tmp_path, "text/TextCaps_0.1_val.json", {"data": rows})
    for name, folder in (("coco_cap", "coco"), ("textcaps", "text")):
        task = open_one(name, tmp_path / folder)
        assert [q.answers for q in task.questions] == [[CAPTIONS[n], CAPTIONS[n + 3]] for n in range(3)]
        rows = score(task, right_answer, monkeypatch)
        expected = evaluation.cider_d(CAPTIONS[:3], [q.answers for q in task.questions])
        assert rows[name]["score"] == pytest.approx(100 * sum(expected) / 3, abs=0.01)
        assert rows[f"{name}/bleu4"]["score"] == 100


def test_parts_of_seed_scienceqa_chartqa_and_nocaps(tmp_path, monkeypatch):
    names = {}
    for name in ("seed", "scienceqa", "chartqa", "nocaps", "refcoco"):
        LLAVA[name](tmp_path / name)
        rows = score(open_one(name, tmp_path / name), right_answer, monkeypatch)
        names[name] = [row.partition("/")[2] for row in rows][1:]
        if name == "scienceqa":
            assert rows["scienceqa/IMG"]["n"] == 3 and rows["scienceqa/TXT"]["blind_score"] is None
            assert rows["scienceqa"]["blind_score"] == 25  # what is asked without a picture stays as it is
    assert names["seed"] == ["image", "video", "Scene Understanding", "Action Recognition"]
    assert names["scienceqa"] == ["IMG", "TXT"] and names["chartqa"] == ["augmented", "human"]
    assert names["nocaps"] == ["in-domain", "out-domain", "bleu4"] and names["refcoco"] == ["testA", "val"]


def test_a_task_of_questions_without_labels_is_answered_but_not_scored(saved, tmp_path, capsys):
    rows = []
    for n in range(3):
        put(tmp_path, f"vqav2/test2015/{n}.jpg", png(n))
        put(tmp_path, f"vizwiz/test/V{n}.jpg", png(n))
        row = {"question_id": 7 + n, "image": f"{n}.jpg", "text": "What?" + SHORT}
        rows.append({**row, "category": "default"})
    put(tmp_path, "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", rows[:2])
    put(tmp_path, "vqav2/llava_vqav2_mscoco_test2015.jsonl", rows)
    put(tmp_path, "vizwiz/llava_test.jsonl", [{**r, "image": f"V{n}.jpg"} for n, r in enumerate(rows)])
    out = tmp_path / "eval.json"
    flags = ["--model", str(saved), "--device", "cpu", "--root", str(tmp_path), "--out", str(out)]
    benchmarks.main([*flags, "--tasks", "vqav2,vizwiz"])
    assert json.loads(out.read_text())["results"] == []
    assert "vqav2: no right answers" in capsys.readouterr().out
    folder = tmp_path / "eval_answers"
    names = "vizwiz.jsonl vizwiz.upload.json vqav2.jsonl vqav2.upload.json"
    assert sorted(p.name for p in folder.iterdir()) == names.split()
    said = [json.loads(line) for line in (folder / "vqav2.jsonl").read_text().splitlines()]
    upload = {row["question_id"]: row["answer"] for row in model.read_json(folder / "vqav2.upload.json")}
    assert upload == {**{r["question_id"]: evaluation.vqa_normalise(r["text"]) for r in said}, 9: ""}
    rows = model.read_json(folder / "vizwiz.upload.json")
    assert {row["image"] for row in rows} == {"V0.jpg", "V1.jpg", "V2.jpg"}


# --- What is wrong with files


DOC = {"question": "?", "image": "documents/d0.png"}
YES_TO_MAYBE = ("MME_Benchmark_release_version/color/0001.txt", "Is it blue?\tMaybe\nIs it orange?\tNo\n")
GQA = "llava_gqa_testdev_balanced.jsonl"
MMBENCH = "mmbench_dev_20230712.tsv"


@pytest.mark.parametrize(
    "name, file, content, words",  # content None: the file is missing
    [
        ("pope", "coco/coco_pope_random.json", "{}", "coco_pope_.*has no label for category random"),
        ("pope", "val2014/C1.jpg", None, r"llava_pope_test.jsonl line \d+: .*C1.jpg does not exist"),
        ("textvqa", "TextVQA_0.5.1_val.json", '{"data": [\n{]}', "TextVQA_0.5.1_val.json line 2"),
        ("gqa", GQA, [{"question_id": "00", "image": "n0.jpg", "text": "a"}] * 2,
         r"jsonl line 2: question_id 00 is there twice, first at .*jsonl line 1"),
        ("gqa", "data", None, "not the folder of gqa: it lacks .*testdev_balanced_questions"),
        ("docvqa", "val_v1.0_withQT.json", {"data": [{"questionId": 1, "image": "documents/d0.png"}]},
         "record 0: not a question of docvqa .*its columns are file, questionId"),
        ("docvqa", "val_v1.0_withQT.json",
         {"data": [{**DOC, "questionId": n, "answers": ["x"] * n} for n in range(2)]},
         "question 0 has no answer, while others have"),
        ("mme", *YES_TO_MAYBE, "has the answer 'Maybe', which is not yes or no"),
        ("mmbench", MMBENCH, [{**mmbench_rows()[0], "image": "77"}], "line 2: .*77, which no row has"),
        ("mmbench", MMBENCH, [{**mmbench_rows()[0], "answer": "E"}], "answer E is none of"),
    ],
)  # fmt: skip
def test_errors_name_file_line_and_fix(name, file, content, words, tmp_path, monkeypatch):
    folder = tmp_path / name
    LLAVA[name](folder)
    if content is not None:
        put(folder, file, content)
    elif (folder / file).is_dir():
        shutil.rmtree(folder / file)
    else:
        (folder / file).unlink()
    with pytest.raises(UserError, match=words):
        score(open_one(name, folder), lambda q, kind: "x", monkeypatch)


def test_addresses_that_are_wrong_say_so(tmp_path):
    for tasks, words in [
        ("pope", "no folder .*pope; say where it is: --root DIR or --tasks pope:PATH"),
        (f"pope:{tmp_path}/none", "no such file or folder"),
        ("popes", "is unknown: use scenes, .*pope"),
    ]:
        with pytest.raises(UserError, match=words):
            open_all(tasks=tasks, root=str(tmp_path))
    bare = [{k: v for k, v in row.items() if k != "image"} for row in TSV["mmstar"]]
    words = "line 2: not a question of mmstar .*'image'.*its columns are index, question"
    with pytest.raises(UserError, match=words):
        open_one("mmstar", put(tmp_path, "bare.tsv", bare))
    put_gqa(tmp_path)
    with pytest.raises(UserError, match="two tasks of one name"):
        open_all(tasks=f"gqa:{tmp_path},gqa:{tmp_path}/.")


def test_labels_come_by_their_question_and_not_by_the_order_of_files(tmp_path):
    put_textvqa(tmp_path)  # labels are in reverse there, two questions share a picture and its id
    for q in open_one("textvqa", tmp_path).questions:
        assert q.answers == [COLOURS[int(re.search(r"\d", q.text)[0])]] * 10
    lines = (tmp_path / "llava_textvqa_val_v051_ocr.jsonl").read_text()
    again = put(tmp_path, "twice.jsonl", lines + lines.splitlines()[0] + "\n")
    again.rename(tmp_path / "llava_textvqa_val_v051_ocr.jsonl")
    names = [question.name for question in open_one("textvqa", tmp_path).questions]
    assert names == ["p0", "p0", "p1", "p1", "p0#4"]  # ids are the pictures', one question stands there twice
    put(tmp_path, "llava_textvqa_val_v051_ocr.jsonl", [json.loads(line) for line in lines.splitlines()])
    one = open_one("textvqa", tmp_path / "llava_textvqa_val_v051_ocr.jsonl")
    assert one.questions == open_one("textvqa", tmp_path).questions  # a question file instead of its folder
    only = put(tmp_path / "star", "any.tsv", TSV["mmstar"])
    assert open_one("mmstar", only.parent).questions == open_one("mmstar", only).questions
    one = open_one("textvqa", tmp_path, limit=2)
    assert len(one.questions) == 2 and one.limit == 2


# --- Files of answers


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_run(tmp_path_factory.mktemp("tiny"))


def results(out: Path) -> list[dict]:
    return json.loads(out.read_text())["results"]


def test_answers_that_llava_gave_are_scored_as_they_are(tmp_path):
    put_pope(tmp_path / "pope")
    rows = [json.loads(line) for line in (tmp_path / "pope/llava_pope_test.jsonl").read_text().splitlines()]
    more = {"answer_id": "x", "model_id": "llava-v1.5-7b", "metadata": {}}
    said = [{"question_id": r["question_id"], "prompt": r["text"], "text": "Yes", **more} for r in rows]
    put(tmp_path, "answers/pope.jsonl", said)
    flags = ["--answers", str(tmp_path / "answers"), "--tasks", "pope", "--root", str(tmp_path)]
    benchmarks.main([*flags, "--out", str(tmp_path / "eval.json")])
    found = {row["task"]: row["score"] for row in results(tmp_path / "eval.json")}
    assert found["pope"] == 50 and found["pope/random recall"] == 100
    assert [p.name for p in (tmp_path / "answers").iterdir()] == ["pope.jsonl"]


def test_a_killed_run_goes_on_where_it_stopped(saved, tmp_path, monkeypatch, capsys):
    put_pope(tmp_path / "pope")
    out, answers = tmp_path / "eval.json", tmp_path / "eval_answers"
    base = ["--model", str(saved), "--tasks", "pope", "--root", str(tmp_path), "--device", "cpu"]
    flags = [*base, "--out", str(out), "--batch_size", "3"]
    benchmarks.main(flags)
    lines = (answers / "pope.jsonl").read_bytes().splitlines(keepends=True)
    whole, first = kept_lines(answers), results(out)
    assert sorted(whole) == ["pope.blind.jsonl", "pope.jsonl"]
    rows = [json.loads(line) for line in lines]
    assert {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"} == rows[0].keys()
    assert rows[0]["model_id"] == str(saved) and {203, 0} <= {row["question_id"] for row in rows}

    batches, real, deadly = [], model.VLM.generate, []

    def generate(self, batch, *a, **k):
        if len(batches) in deadly:
            raise KeyboardInterrupt
        return batches.append(batch.samples) or real(self, batch, *a, **k)

    monkeypatch.setattr(model.VLM, "generate", generate)
    benchmarks.main(flags)
    assert not batches and kept_lines(answers) == whole

    (answers / "pope.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:20])  # killed while it wrote
    benchmarks.main(flags)
    assert sum(batches) == 6 and kept_lines(answers) == whole and results(out) == first

    batches.clear()
    deadly.append(1)  # killed once more, in its second batch
    (answers / "pope.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])
    with pytest.raises(KeyboardInterrupt):
        benchmarks.main(flags)
    there = (answers / "pope.jsonl").read_bytes().splitlines(keepends=True)
    assert there[:5] == lines[:5] and len(there) == len({*there} & {*lines}) == 8
    deadly.clear()
    benchmarks.main(flags)
    assert kept_lines(answers) == whole

    (answers / "pope.blind.jsonl").unlink()
    again = tmp_path / "again.json"
    benchmarks.main(["--answers", str(answers), *base[2:], "--out", str(again)])  # no model: what is there
    assert results(again)[0]["score"] == first[0]["score"] and results(again)[0]["blind_score"] is None
    (answers / "pope.jsonl").write_bytes(b"".join(lines[:5]))
    with pytest.raises(UserError, match="7 of 12 questions have no answer, the first.*give --model"):
        benchmarks.main(["--answers", str(answers), *base[2:]])
    with pytest.raises(UserError, match="--model is missing"):
        benchmarks.main(base[2:])


def kept_lines(folder: Path) -> dict[str, list[bytes]]:
    """The answers of each file, which stand there in the order in which they were given."""
    return {path.name: sorted(path.read_bytes().splitlines()) for path in folder.iterdir()}


@pytest.mark.slow
def test_two_ranks_give_the_answers_of_one_process(saved, tmp_path):
    """Answers of a killed run of one process are taken over."""
    put_pope(tmp_path / "pope")
    put_piqa(tmp_path / "piqa")
    tasks = ["--tasks", "pope,piqa,scenes_pope", "--root", str(tmp_path), "--batch_size", "5"]
    flags = ["tools/benchmarks.py", "--model", str(saved), "--device", "cpu", *tasks]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    one_answers, two_answers = tmp_path / "one_answers", tmp_path / "two_answers"
    for name, launch in (("one", [sys.executable]), ("two", two), ("two", two)):
        command = [*launch, *flags, "--out", str(tmp_path / f"{name}.json")]
        subprocess.run(command, cwd=ROOT, check=True, timeout=300)
        assert results(tmp_path / "one.json") == results(tmp_path / f"{name}.json")
        assert kept_lines(one_answers) == kept_lines(tmp_path / f"{name}_answers")
        if name == "two":
            lines = (two_answers / "pope.jsonl").read_text().splitlines(keepends=True)
            (two_answers / "pope.jsonl").write_text("".join(lines[:4]) + lines[4][:30])


def test_benchmarks_have_shots_from_a_train_split(tmp_path):
    put_gqa(tmp_path / "test")
    rows = []
    for n, colour in enumerate(COLOURS):
        put(tmp_path, f"train/t{n}.png", png(n))
        rows.append({"question_id": n, "question": "What shape?", "answer": colour, "image": f"t{n}.png"})
    put(tmp_path, "train/train.jsonl", rows)
    demos = str(tmp_path / "train" / "train.jsonl")
    task = open_one("gqa", tmp_path / "test", shots="2", demos=demos)
    said = prompt_text(task.prompt(task.questions[0], TOKENIZER))
    one = r"\[\d\] Question: What shape\? Short answer: \w+\n"
    assert re.fullmatch(one * 2 + r"\[2\] Question: What colour\? Short answer:", said)
    put_scienceqa(tmp_path / "sqa")
    with pytest.raises(UserError, match="question 3 has 0 pictures, MM1's templates have one"):
        open_one("scienceqa", tmp_path / "sqa", shots="0")


# --- Tables, options and label files as they are found


def own_set(folder: Path, *rows: dict, name: str = "q.jsonl") -> Path:
    put(folder, "a.png", png(1))
    facts = {"image": "a.png", "text": "What?"}
    return put(folder, name, [{"question_id": n, **facts, **row} for n, row in enumerate(rows)])


def test_files_that_are_not_ours_stay_as_they_are(saved, tmp_path):
    path = own_set(tmp_path, {"answers": ["a"], "text": "1?"}, {"answers": ["b"], "text": "2?"})
    path.write_text(path.read_text().rstrip("\n"))
    before = path.read_bytes()
    with pytest.raises(UserError, match="holds the questions themselves"):
        benchmarks.main(["--model", str(saved), "--tasks", f"vqa:{path}", "--answers", str(tmp_path)])
    assert path.read_bytes() == before
    said = [{"question_id": n, "prompt": f"<image>\n{n + 1}?", "text": "a", "metadata": {}} for n in range(2)]
    theirs = put(tmp_path, "their/q.jsonl", "\n\n".join(map(json.dumps, said)))  # no newline at the end
    before, flags = theirs.read_bytes(), ["--tasks", f"vqa:{path}", "--answers", str(theirs.parent)]
    benchmarks.main([*flags, "--out", str(tmp_path / "e.json")])
    assert results(tmp_path / "e.json")[0]["score"] == 50 and theirs.read_bytes() == before
    theirs.write_text(json.dumps({**said[0], "text": None}) + "\n")
    with pytest.raises(UserError, match="line 1: expected an answer"):
        benchmarks.main(flags)


def test_sets_of_questions_are_not_mixed(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = {"questionId": "1", "question": "What?", "answers": ["a"], "image": {"bytes": png(1), "path": ""}}
    for folder in ("DocVQA", "InfographicVQA"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "validation-00000-of-00001.parquet"
        parquet.write_table(arrow.Table.from_pylist([row]), file)
    with pytest.raises(UserError, match="several sets of questions, name one of them: .*DocVQA, .*Infograph"):
        open_one("docvqa", tmp_path)
    assert len(open_one("docvqa", tmp_path / "DocVQA").questions) == 1


def test_tables_of_vlmevalkit_as_they_are(tmp_path):
    rows = [
        {"index": n, "category": "color", "image_path": f"color/{n // 2}.jpg", "image": coded(n // 2),
         "question": f"Is it {n}? Please answer yes or no.", "answer": ("Yes", "No")[n % 2]}
        for n in range(4)
    ]  # fmt: skip
    task = open_one("mme", put(tmp_path, "MME.tsv", rows))
    assert [str(q.name) for q in task.questions] == ["color/0.jpg"] * 2 + ["color/1.jpg"] * 2
    rows = [{**row, "split": ("dev", "validation")[n % 2]} for n, row in enumerate(TSV["mmmu"])]
    task = open_one("mmmu", put(tmp_path, "MMMU_DEV_VAL.tsv", rows))
    assert len(task.questions) == len(rows) // 2 > 0
    rows = [{"index": n, "image": coded(n), "question": "?", "answer": "3", "split": f"test_{kind}"}
            for n, kind in enumerate(("human", "augmented"))]  # fmt: skip
    task = open_one("chartqa", put(tmp_path, "ChartQA_TEST.tsv", rows))
    assert [q.subsets for q in task.questions] == [("human",), ("augmented",)]
    text = """["levi's", 'b']"""
    assert benchmarks.texts_of(text) == ["levi's", "b"] and benchmarks.texts_of("['open") == ["['open"]
    assert benchmarks.texts_of([{"answer": "surf", "raw_answer": "surfing"}]) == ["surfing"]


@pytest.mark.parametrize("kind", ["choice", "mmbench", "mmmu"])
def test_options_are_those_of_the_question_and_not_lines_that_look_like_them(kind):
    text, options = "I. one\nV. two\nA. x", ("both", "none")
    question = evaluation.Question((), text, ["B"], (), ("A", "B"), options=options)
    task = benchmarks.BenchmarkTask("t", kind, [question])
    assert task.score("B", question) == 1 and task.score("A", question) == 0


def test_own_files_of_the_kinds_that_are_here_and_of_all_others(tmp_path):
    path = own_set(tmp_path, {"answers": ["100"]}, {"answers": ["Limited"], "text": "Who?"})
    for kind, metric, scores in (
        ("relaxed", "relaxed_accuracy", [1, 0]),
        ("anls", "anls", [2 / 3, 6 / 7]),
        ("vqa", "accuracy", [0, 0]),
    ):
        task = open_one(kind, path)
        assert task.metric == metric
        assert evaluation.score_answers(task, ["104", "limitd"]) == pytest.approx(scores)
    assert len(open_one("vqa", path, limit=1).questions) == 1
    (task,) = open_all(tasks="scenes_pope", n=3)
    assert len(task.questions) == 3
    with pytest.raises(UserError, match="--demos is not of the train split"):
        open_one("vqa", path, shots="1", demos=str(path))


@pytest.mark.parametrize("content", ['{"a": 1}', "5", '{"annotations": 5}', '{"a": \udcff', "[1]"])
def test_odd_label_files_are_one_sentence(tmp_path, content):
    put_scienceqa(tmp_path)
    (tmp_path / "problems.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError):
        open_one("scienceqa", tmp_path)
