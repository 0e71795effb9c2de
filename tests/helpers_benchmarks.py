"""Miniatures of public benchmarks in the layouts of LLaVA's folders: LLAVA[name](folder) writes one."""

import base64
import io
import json
from pathlib import Path

from PIL import Image

from tools import benchmarks

SHORT, LETTER = benchmarks.SHORT, benchmarks.LETTER
COLOURS = ["red", "blue", "green", "orange", "white", "black"]
CAPTIONS = [f"a {a} disc lies near two {b} rings" for a, b in zip(COLOURS, COLOURS[1:] + COLOURS[:1])]
LONG = 60 * "q"  # as long as a VLMEvalKit picture, and no picture


def png(n: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (40 * n, 90, 10)).save(buffer, "PNG")
    return buffer.getvalue()


def coded(n: int) -> str:
    return base64.b64encode(png(n)).decode()


def put(folder: Path, name: str, content) -> Path:
    """A picture, JSON, JSON lines, text or a .tsv, by the name."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content)
    elif path.suffix == ".tsv":
        lines = ["\t".join(content[0])] + ["\t".join(str(v) for v in row.values()) for row in content]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content))
    return path


def put_pictures(folder: Path, pattern: str, n: int = 4) -> None:
    for k in range(n):
        put(folder, pattern.format(k), png(k))


def four(**columns) -> list[dict]:
    """Rows 0..3 of a table: a list gives a column's values, anything else is the same in all rows."""
    rows = []
    for n in range(4):
        rows.append({k: v[n] if isinstance(v, list) and len(v) == 4 else v for k, v in columns.items()})
    return rows


def coco(question_file: str, label_file: str):
    """A function that lays out COCO's questions and, in another order, their labels."""

    def put_coco(folder: Path) -> None:
        questions, labels = [], []
        put_pictures(folder, "val2014/COCO_val2014_{:012d}.jpg")
        for n in range(4):
            questions.append({"image_id": n, "question": f"what is {n}?", "question_id": 10 * n + 1})
            answers = [{"answer": COLOURS[n], "answer_id": 1}] * 10
            labels.append({"question_id": 10 * n + 1, "image_id": n, "answers": answers})
        put(folder, question_file, {"info": {}, "questions": questions})
        put(folder, label_file, {"annotations": labels[::-1]})

    return put_coco


def put_textvqa(folder: Path) -> None:
    questions, labels = [], []
    put_pictures(folder, "train_images/p{}.jpg", 2)
    for n in range(4):
        text, name = f"What is {n}?\nReference OCR token: A{n}, b{SHORT}", f"p{n // 2}"
        questions.append({"question_id": name, "image": f"{name}.jpg", "text": text, "category": "default"})
        row = {"image_id": name, "question_id": n, "question": f"what is {n}?"}
        labels.append({**row, "answers": [COLOURS[n]] * 10})
    put(folder, "llava_textvqa_val_v051_ocr.jsonl", questions)
    put(folder, "TextVQA_0.5.1_val.json", {"data": labels[::-1]})


def put_vizwiz(folder: Path) -> None:
    put_pictures(folder, "val/V{}.jpg")
    answers = [[{"answer": colour, "answer_confidence": "yes"}] * 10 for colour in COLOURS[:4]]
    images = [f"V{n}.jpg" for n in range(4)]
    put(folder, "val.json", four(image=images, question="what colour?", answers=answers, answerable=1))


def put_gqa(folder: Path) -> None:
    questions, labels = [], {}
    put_pictures(folder, "data/images/n{}.jpg")
    for n in range(4):
        questions.append({"question_id": f"0{n}", "image": f"n{n}.jpg", "text": "What colour?" + SHORT})
        labels[f"0{n}"] = {"question": "What colour?", "imageId": f"n{n}", "answer": COLOURS[n]}
    put(folder, "llava_gqa_testdev_balanced.jsonl", questions[::-1])
    put(folder, "data/testdev_balanced_questions.json", labels)


def put_scienceqa(folder: Path) -> None:
    questions, labels = [], {}
    put_pictures(folder, "images/test/{}/image.png", 3)
    for n in range(4):
        text = f"Context: c{n}\nWhich?\nA. red\nB. blue\nC. green"
        row = {"id": f"{n}", "image": f"{n}/image.png"} if n < 3 else {"id": f"{n}"}
        asked = {"from": "human", "value": "<image>\n" + text if n < 3 else text}
        questions.append({**row, "conversations": [asked, {"from": "gpt", "value": "?"}]})
        label = {"question": "Which?", "choices": COLOURS[:3], "answer": n % 3, "split": "test"}
        labels[f"{n}"] = {**label, "image": None}
    put(folder, "llava_test_CQM-A.json", questions)
    put(folder, "problems.json", {**labels, "9": {**labels["0"], "split": "train"}})


def put_pope(folder: Path) -> None:
    questions = []
    put_pictures(folder, "val2014/C{}.jpg")
    for number, category in enumerate(("random", "popular", "adversarial")):
        labels = []
        for n in range(4):
            row = {"image": f"C{n}.jpg", "text": f"Is there a {COLOURS[n]} ring?"}
            labels.append({**row, "question_id": n + 1, "label": ("yes", "no")[n % 2]})
            text = row["text"] + SHORT
            questions.append({**row, "question_id": 100 * number + n, "text": text, "category": category})
        put(folder, f"coco/coco_pope_{category}.json", "".join(json.dumps(row) + "\n" for row in labels))
    put(folder, "llava_pope_test.jsonl", questions[::-1])


def put_mme(folder: Path) -> None:
    release, questions = "MME_Benchmark_release_version", []
    for category, deep in (("color", ""), ("artwork", "deep"), ("code_reasoning", "")):
        for n in range(2):
            pairs = [(f"Is it {COLOURS[n]}?", "Yes"), (f"Is it {COLOURS[n + 2]}?", "No")]
            name = f"{category}/{'images/' if deep else ''}000{n}.png"
            put(folder, f"{release}/{name}", png(n + len(category) % 3))
            lines = "".join(f"{q} Please answer yes or no.\t{a}\n" for q, a in pairs)
            put(folder, f"{release}/{category}/{'questions_answers_YN/' if deep else ''}000{n}.txt", lines)
            for question, _ in pairs:
                row = {"question_id": name, "image": name, "category": category}
                questions.append({**row, "text": question + SHORT})
    put(folder, "llava_mme.jsonl", questions)


def mmbench_rows() -> list[dict]:
    rows = []
    for n in range(3):
        for turn in range(3):
            options = [COLOURS[(k + turn) % 3] for k in range(3)] + [""]
            row = {
                "index": n + 1_000_000 * turn,
                "question": f"Which is {n}?",
                "hint": "Look." if n else "nan",
            }
            row |= {**dict(zip("ABCD", options)), "answer": "ABC"[options.index(COLOURS[n])]}
            row |= {"category": f"c{n}", "image": str(n) if turn else coded(n), "l2-category": f"l{n % 2}"}
            rows.append({**row, "split": "dev"})
    return rows


def put_seed(folder: Path) -> None:
    questions, labels = [], []
    for n in range(4):
        kind = ("image", "video")[n // 3]
        put(folder, f"SEED-Bench-{kind}/p_{n}", png(n))
        text = "Which?\nA. red\nB. blue\nC. green\nD. orange" + LETTER
        questions.append({"question_id": f"{n}_0", "image": f"SEED-Bench-{kind}/p_{n}", "text": text})
        row = {**{f"choice_{c}": o for c, o in zip("abcd", COLOURS)}, "answer": "ABCD"[n], "data_type": kind}
        labels.append({**row, "question": "Which?", "question_id": f"{n}_0", "question_type_id": 1 + n // 2})
    put(folder, "llava-seed-bench.jsonl", questions)
    types = {"Scene Understanding": 1, "Action Recognition": 2}
    put(folder, "SEED-Bench.json", {"question_type": types, "questions": labels[::-1]})


def put_docvqa(folder: Path) -> None:
    rows = []
    put_pictures(folder, "documents/d{}.png")
    for n in range(4):
        row = {"questionId": n, "question": "What does it say?", "image": f"documents/d{n}.png"}
        rows.append({**row, "answers": [f"ITC {n} Limited", f"itc {n}"], "data_split": "val"})
    put(folder, "val_v1.0_withQT.json", {"dataset_name": "docvqa", "data": rows})


def put_chartqa(folder: Path) -> None:
    for kind in ("human", "augmented"):
        rows = []
        for n in range(2):
            put(folder, f"test/png/{kind}{n}.png", png(n + 2 * (kind == "human")))
            rows.append({"imgname": f"{kind}{n}.png", "query": f"How many {n}?", "label": f"{10 ** (n + 1)}"})
        put(folder, f"test/test_{kind}.json", rows)


def karpathy(file: str, folder_of_pictures: str, name: str, **more):
    """A function that lays out captions and pictures as Karpathy's splits have them."""

    def put_karpathy(folder: Path) -> None:
        put_pictures(folder, f"{folder_of_pictures}/{name}")
        rows = []
        for n in range(4):
            sentences = [{"raw": CAPTIONS[n], "tokens": []}] * 5
            rows.append(
                {"filename": name.format(n), "imgid": n, "sentences": sentences, "split": "test", **more}
            )
        train = {**rows[0], "imgid": 99, "split": "train", "filename": "gone.jpg"}
        put(folder, file, {"images": [*rows, train]})

    return put_karpathy


def put_nocaps(folder: Path) -> None:
    images, labels = [], []
    put_pictures(folder, "images/{}.jpg")
    for n in range(4):
        images.append({"id": n, "file_name": f"{n}.jpg", "domain": ("in-domain", "out-domain")[n % 2]})
        labels += [{"image_id": n, "id": 10 * n + k, "caption": CAPTIONS[n]} for k in range(3)]
    put(folder, "nocaps_val_4500_captions.json", {"images": images, "annotations": labels[::-1]})


def put_textcaps(folder: Path) -> None:
    rows = []
    put_pictures(folder, "train_images/t{}.jpg")
    for n in range(4):
        row = {"image_id": f"t{n}", "caption_str": CAPTIONS[n], "reference_strs": [CAPTIONS[n]] * 2}
        rows += [{**row, "caption_id": 2 * n + k} for k in range(2)]
    put(folder, "TextCaps_0.1_val.json", {"data": rows})


def put_refcoco(folder: Path, name: str = "refcoco") -> None:
    put_pictures(folder, "coco/{}.png", 2)
    for split in ("val", "testA"):
        rows = []
        for n in range(2):
            row = {"image": f"coco/{n}.png", "sent": f"the {COLOURS[n]} one, {split}", "width": 20}
            rows.append({**row, "height": 10, "bbox": [2 * n, n, 10 + 8 * n, 5 + n]})
        put(folder, f"{name}_{split}.jsonl", rows)


def put_arc(folder: Path, name: str) -> None:
    rows = []
    for n in range(4):
        labels = "ABCD" if n % 2 else "1234"
        choices = [{"text": colour, "label": label} for colour, label in zip(COLOURS, labels)]
        question = {"stem": f"Which {n}?", "choices": choices}
        rows.append({"id": f"M{n}", "question": question, "answerKey": labels[n]})
    put(folder, name, rows)


def put_piqa(folder: Path) -> None:
    put(
        folder,
        "valid.jsonl",
        four(goal=[f"Do {n}." for n in range(4)], sol1="Push it.", sol2="Pull it slowly."),
    )
    put(folder, "valid-labels.lst", "0\n1\n1\n0\n")


def put_hellaswag(folder: Path) -> None:
    rows = []
    for n in range(4):
        row = {"ind": n, "activity_label": "Cooking", "ctx_a": "He cuts.", "ctx_b": "then he", "label": n}
        rows.append({**row, "ctx": "He cuts. then he", "endings": [f"eats [x] {c}." for c in COLOURS[:4]]})
    put(folder, "hellaswag_val.jsonl", rows)


def mmmu_rows() -> list[dict]:
    rows = []
    for n in range(4):
        row = {"id": f"validation_Art_Theory_{n}", "question": "<image 2> or <image 1>: which?"}
        row |= {"image_1": png(n), "image_2": png(n + 1), "answer": "ABC"[n] if n < 3 else "['24', '24.0']"}
        row |= {"options": str(COLOURS[:3]) if n < 3 else "[]"}
        rows.append({**row, "question_type": "multiple-choice" if n < 3 else "open"})
    return rows


LLAVA = {
    "vqav2": coco("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
    "okvqa": coco("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"),
    "textvqa": put_textvqa, "textvqa_ocr": put_textvqa, "vizwiz": put_vizwiz, "gqa": put_gqa,
    "scienceqa": put_scienceqa, "pope": put_pope, "mme": put_mme,
    "mmbench": lambda folder: put(folder, "mmbench_dev_20230712.tsv", mmbench_rows()),
    "mmbench_cn": lambda folder: put(folder, "mmbench_dev_cn_20231003.tsv", mmbench_rows()),
    "seed": put_seed, "docvqa": put_docvqa, "chartqa": put_chartqa,
    "coco_cap": karpathy("dataset_coco.json", "val2014", "C{}.jpg", filepath="val2014"),
    "flickr30k": karpathy("dataset_flickr30k.json", "flickr30k-images", "{}.jpg"),
    "nocaps": put_nocaps, "textcaps": put_textcaps, "refcoco": put_refcoco,
    "refcoco+": lambda folder: put_refcoco(folder, "refcoco+"),
    "refcocog": lambda folder: put_refcoco(folder, "refcocog"),
    "arc_easy": lambda folder: put_arc(folder, "ARC-Easy-Test.jsonl"),
    "arc_challenge": lambda folder: put_arc(folder, "ARC-Challenge-Test.jsonl"),
    "piqa": put_piqa, "hellaswag": put_hellaswag,
}  # fmt: skip
