"""Tasks, kept answers, the blind control and chat; own files go all the way in tools/test_report.py."""

import json
import threading

import pytest
import torch
from helpers_eval import TOKENIZER, save_tiny_run, tiny_vlm
from PIL import Image

import data
import eval as evaluation
import model
from model import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_run(tmp_path_factory.mktemp("tiny"))


def write_set(folder, *rows: dict, name: str = "q.jsonl"):
    """JSON lines of questions about one picture."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), (40, 90, 10)).save(folder / "a.png")
    lines = []
    for n, row in enumerate(rows):
        lines.append(json.dumps({"question_id": n, "image": "a.png", "text": "What?", **row}) + "\n")
    (folder / name).write_text("".join(lines))
    return folder / name


def open_one(kind: str, path) -> evaluation.Task:
    (task,) = evaluation.open_tasks(evaluation.EvalConfig(tasks=f"{kind}:{path}"), evaluation.open_task)
    return task


def results(out) -> list[dict]:
    return json.loads(out.read_text())["results"]


def test_chat_answers_and_remembers(saved, tmp_path, monkeypatch, capsys):
    lines = iter(["What colour is it?", "Are you sure?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    prompts = []
    real = data.prompt_pieces
    monkeypatch.setattr(data, "prompt_pieces", lambda *a: prompts.append(a) or real(*a))
    picture = write_set(tmp_path).with_name("a.png")
    evaluation.main(["--model", str(saved), "--device", "cpu", "--chat", str(picture)])
    assert "8 visual tokens" in capsys.readouterr().out
    assert len(prompts) == 2 and prompts[1][3][0][0] == "What colour is it?"  # holds the first turn


def test_derangement_moves_every_image_and_keeps_pairs_together():
    images = [(data.make_scene("test", i // 3),) for i in range(30)]
    other = evaluation.derange(images, 0)
    assert all(a != b for a, b in zip(images, other))
    assert set(other) == set(images)
    assert evaluation.derange(images, 0) == other != evaluation.derange(images, 1)


@pytest.mark.parametrize("name", evaluation.SCENE_TASKS)
def test_an_oracle_scores_100_and_the_blind_one_less(name, monkeypatch):
    """The truth told for every question gives full marks; told for the swapped pictures it does not."""
    task = evaluation.scenes_task(name, 40, 0)
    cfg = evaluation.EvalConfig()

    def answer_all(vlm, tokenizer, task, images, view, cfg, kept, known=()):
        true = [shown is question.images for shown, question in zip(images, task.questions)]
        return [q.answers[0] if is_true else "blue" for q, is_true in zip(task.questions, true)]

    monkeypatch.setattr(evaluation, "answer_all", answer_all)
    rows, examples = evaluation.score_task(None, None, task, "full", cfg)
    top = rows[0]
    assert top["task"] == name and top["n"] == (200 if name == "scenes_vqa" else 40)
    assert top["score"] == 100 if name != "scenes_cap" else top["score"] > 300
    assert top["blind_score"] < 60
    assert len(examples) == 6 and all(example["answer"] == example["right"][0] for example in examples)
    for example in examples:  # scenes are named by split and number
        _, split, number = example["picture"].split(":")
        question = next(q for q in task.questions if q.picture == example["picture"])
        assert data.make_scene(split, int(number)) == question.images[0]
    if name == "scenes_vqa":
        names = [row["task"].split("/")[1] for row in rows[1:]]
        assert [name for name in names if name != "held_out"] == [*data.QUESTION_TYPES]
        assert all(r["chance"] >= 100 / 9 for r in rows[1:])


def test_test_questions_do_not_come_from_training_scenes():
    task = evaluation.scenes_task("scenes_vqa", 50, 0)
    train = {data.make_scene("train", i) for i in range(2000)}
    assert not train & {q.images[0] for q in task.questions}
    assert any("held_out" in q.subsets for q in task.questions)


# --- Own files


@pytest.mark.parametrize(
    "kind, rows, words",
    [
        (
            "choice",
            [{"text": "A. red\nB. blue", "answers": ["red"]}],
            "'red', which is not the letter of an option",
        ),
        ("yesno", [{"answers": [True]}], "has the answer 'True', which is not yes or no"),
        ("ref", [{"answers": ["here"]}], "not four integers 0-999"),
        ("vqa", [{"answers": []}], "'answers' must be a list of at least one"),
        ("vqa", [{"image": "../a.png", "answers": ["a"]}], "leads out of the folder"),
        ("vqa", [{"image": "b.png", "answers": ["a"]}], "b.png does not exist"),
        ("vqa", [{"answers": ["a"]}, {"question_id": 0, "answers": ["a"]}], "question_id 0 is there twice"),
    ],
)
def test_own_questions_are_checked_before_they_are_asked(tmp_path, kind, rows, words):
    path = write_set(tmp_path / "in", *rows)
    write_set(tmp_path)
    with pytest.raises(UserError) as error:
        open_one(kind, path)
    assert words in str(error.value)


def test_own_questions_of_any_category_and_with_odd_characters(tmp_path):
    rows = [
        {"answers": ["Red"], "category": 3, "text": "a\u2028b\u0085c"},
        {"answers": ["x"], "category": None},
    ]
    path = write_set(tmp_path, *rows)
    path.write_text(path.read_text().encode().decode("unicode_escape"), encoding="utf-8")
    task = open_one("exact", path)
    assert [q.subsets for q in task.questions] == [("3",), ("",)] and "\u2028" in task.questions[0].text
    assert evaluation.score_answers(task, ["red.", "y"]) == [1, 0]


def test_what_is_elsewhere_is_named():
    for name in ("relaxed:a.jsonl", "anls:a.jsonl", "pope", "popes:x"):
        with pytest.raises(UserError, match="all else: python tools/benchmarks.py"):
            evaluation.open_task(name, None, evaluation.EvalConfig())


def test_options_are_the_last_lines_in_order():
    text = "Who?\nA. Lincoln said:\nI. one\nV. five\nA. red\nB. blue"
    assert evaluation.option_letters(text) == {"A": "red", "B": "blue"}
    assert evaluation.option_letters("A. one\nB. two\nI. no\nC. three") == {"A": "one", "B": "two"}
    question = evaluation.Question((), "I. one\nV. two\nA. x", ["B"], options=("both", "none"))
    task = evaluation.Task("t", "choice", [question])
    assert task.score("B", question) == 1 and task.score("A", question) == 0


def test_blind_pictures_are_no_others_of_the_same_question():
    images = [("a", "b"), ("c", "d"), ("e",), ("f", "a")]
    for seed in range(20):
        dealt = evaluation.derange(images, seed)
        assert not any({*new} & {*old} for new, old in zip(dealt, images)) and len(dealt[0]) == 2


def test_a_few_questions_that_are_too_long_count_as_wrong(capsys):
    questions = []
    for n in range(60):
        questions.append(evaluation.Question((), "What? " * (200 if n == 7 else 1), ["x"], name=n))
    task, cfg = evaluation.Task("many", "vqa", questions, 4), evaluation.EvalConfig()
    answers = evaluation.answer_all(tiny_vlm(context=60), TOKENIZER, task, [()] * 60, "full", cfg)
    assert answers[7] == "" and "1 questions are too long and count as wrong" in capsys.readouterr().out


def test_the_blind_score_can_be_spared(saved, tmp_path, monkeypatch):
    path, calls = write_set(tmp_path, {"answers": ["a"]}), []
    real = model.VLM.generate
    monkeypatch.setattr(model.VLM, "generate", lambda *a, **k: calls.append(1) or real(*a, **k))
    out = tmp_path / "e.json"
    flags = ["--model", str(saved), "--device", "cpu", "--tasks", f"vqa:{path}", "--out", str(out)]
    evaluation.main([*flags, "--blind", "false"])
    assert len(calls) == 1 and results(out)[0]["blind_score"] is None
    evaluation.main(flags)
    assert len(calls) == 2 and results(out)[0]["blind_score"] is not None


# --- Kept answers


def test_answers_under_other_settings_are_refused(saved, tmp_path):
    path = write_set(tmp_path, {"answers": ["a"]}, {"answers": ["a"], "text": "Which?"})
    for name in ("d", "e"):
        write_set(tmp_path / name, {"text": "Which?", "answers": [name]}, name="demos.jsonl")
        Image.new("RGB", (9, 9)).save(tmp_path / name / "a.png")
    base = ["--model", str(saved), "--device", "cpu", "--tasks", f"vqa:{path}"]
    shots = [*base, "--shots", "1", "--out", str(tmp_path / "out.json")]
    evaluation.main([*shots, "--demos", str(tmp_path / "d/demos.jsonl")])
    flags = [*base, "--answers", str(tmp_path / "kept")]
    evaluation.main(flags)
    file = tmp_path / "kept" / "q.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 2
    other = save_tiny_run(tmp_path / "other", seed=1)
    for argv in (
        [*shots, "--demos", str(tmp_path / "e/demos.jsonl")],
        [*flags, "--seed", "1"],
        [*flags, "--model", str(other)],
        [*flags, "--scoring", "likelihood"],
    ):
        with pytest.raises(UserError, match="under another prompt, model, seed or --demos: use another --"):
            evaluation.main(argv)
    for old, new in (("What?", "Who?"), ('"question_id": 0', '"question_id": 9')):
        file.write_text("".join(lines).replace(old, new))
        with pytest.raises(UserError, match="q.jsonl line 1 was answered under another prompt"):
            evaluation.main(flags)


def test_files_that_are_not_ours_stay_as_they_are(saved, tmp_path):
    path = write_set(tmp_path, {"answers": ["a"]})
    before = path.read_bytes()
    with pytest.raises(UserError, match="holds the questions themselves"):
        evaluation.main(["--model", str(saved), "--tasks", f"vqa:{path}", "--answers", str(tmp_path)])
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="--out .* is a folder: give a file in it"):
        evaluation.main(["--model", str(saved), "--tasks", "scenes_pope", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="--model is missing"):
        evaluation.main(["--tasks", "scenes_pope"])


# --- What a GPU likes: matrices in bfloat16, pictures decoded while it works
@pytest.mark.parametrize("flags", ["", "--scoring likelihood", "--shots 1", "--chat PICTURE"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_answers_in_bfloat16_are_computed_in_autocast_over_float32_residuals(
    saved, tmp_path, monkeypatch, flags, dtype
):
    picture, seen, lines = write_set(tmp_path).with_name("a.png"), [], iter(["What is it?", ""])
    real = model.Decoder.hidden

    def hidden(decoder, x, *more):
        dtypes = {p.dtype for p in decoder.parameters() if p.ndim > 1}
        seen.append((x.dtype, decoder.norm.weight.dtype, *dtypes, torch.is_autocast_enabled("cpu")))
        return real(decoder, x, *more)

    monkeypatch.setattr(model.Decoder, "hidden", hidden)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    common = f"--model {saved} --device cpu --dtype {dtype} --n 2 --tasks scenes_pope"
    evaluation.main([*common.split(), *flags.replace("PICTURE", str(picture)).split()])
    half = dtype == "bfloat16"
    assert {*seen} == {(torch.float32, torch.float32, torch.bfloat16 if half else torch.float32, half)}
    assert not torch.is_autocast_enabled("cpu")


def test_text_is_scored_in_bfloat16_too(saved, tmp_path):
    losses = []
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.json"
        flags = f"--model {saved} --device cpu --dtype {dtype} --tasks scenes_words --n 4 --out {out}"
        evaluation.main(flags.split())
        losses.append(results(out)[0]["score"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)


def file_batches(folder, vlm) -> tuple:
    """Three batches of two questions, each about its own picture."""
    path = write_set(folder, *({"image": f"{n}.png", "answers": ["a"]} for n in range(6)))
    for n in range(6):
        Image.new("RGB", (20, 10), (40 * n, 90, 10)).save(folder / f"{n}.png")
    task = open_one("vqa", path)
    prompts = {i: task.prompt(question, TOKENIZER) for i, question in enumerate(task.questions)}
    pictures = {i: [*question.images] for i, question in enumerate(task.questions)}
    return task, [[4, 0], [1, 3], [5, 2]], prompts, pictures, vlm.cfg


def test_pictures_are_decoded_while_the_batch_before_is_answered(tmp_path, monkeypatch):
    task, batches, prompts, pictures, cfg = file_batches(tmp_path, tiny_vlm())
    alone = {i: data.load_sample(prompts[i], pictures[i], cfg) for i in range(6)}
    loaded, real = {i: threading.Event() for i in range(6)}, data.load_sample

    def load_sample(pieces, images, cfg, name):
        loaded[int(images[0].stem)].set()
        return real(pieces, images, cfg, name)

    monkeypatch.setattr(data, "load_sample", load_sample)
    waiting = iter(evaluation.load_batches(task, batches, prompts, pictures, cfg))
    for numbers, following, later in zip(batches, [*batches[1:], []], [*batches[2:], [], []]):
        samples = next(waiting)
        assert all(loaded[i].wait(20) for i in following) and not any(loaded[i].is_set() for i in later)
        for i, sample in zip(numbers, samples, strict=True):
            assert sample.pieces == alone[i].pieces and (sample.pixels == alone[i].pixels).all()
    assert next(waiting, None) is None


def test_a_broken_picture_is_named_when_its_turn_comes(tmp_path, monkeypatch):
    vlm, kept = tiny_vlm(), []
    task, *_ = file_batches(tmp_path, vlm)
    (tmp_path / "3.png").write_bytes(b"no picture")
    images, cfg = [question.images for question in task.questions], evaluation.EvalConfig(batch_size=2)
    file = evaluation.AnswerFile(tmp_path / "kept.jsonl", task, {"metadata": {}})
    with pytest.raises(UserError, match=r"^q question 3: image .*3.png does not decode"):
        evaluation.answer_all(vlm, TOKENIZER, task, images, "full", cfg, file)
    kept = [json.loads(line)["question_id"] for line in file.path.read_text().splitlines()]
    assert kept == [0, 1]  # the batch before


# --- The encoder
@pytest.mark.parametrize("most", [2**30, 0])
def test_no_tile_is_encoded_twice(most):
    """Unless more is kept than may be: then all is encoded anew."""
    encoded = []

    def encode(pixels):
        encoded.append(len(pixels))
        return pixels.float().flatten(1), None, pixels.float().sum((1, 2)) + 1

    pixels = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    states = evaluation.remember_states(encode, most)
    for picked in ([0, 1, 0, 2], [2, 3, 1], [3, 0]):
        expected = encode(pixels[picked])
        encoded.pop()
        for value, like in zip(states(pixels[picked]), expected):
            assert (value is None and like is None) or torch.equal(value, like)
    assert encoded == ([3, 1] if most else [3, 3, 2])
