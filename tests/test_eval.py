"""Evaluation end to end: own pictures through both stages, file tasks, blind control, chat, report."""

import json

import pytest
from PIL import Image, ImageDraw

import data
import eval as evaluation
import model
import train_pretrain
import train_sft

COLOURS = ["red", "blue", "green", "orange"]


@pytest.fixture(scope="module")
def own_set(tmp_path_factory):
    """Twelve pictures in LLaVA's format: palette, alpha, plain; several turns; one record without image."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "images").mkdir()
    records, choices, captions = [], [], []
    for n in range(12):
        colour = COLOURS[n % 4]
        picture = Image.new("RGBA", (40 + n, 50), (0, 0, 0, 0))
        ImageDraw.Draw(picture).ellipse((5, 5, 35, 35), fill=colour)
        picture = [picture, picture.convert("RGB"), picture.convert("P")][n % 3]
        picture.save(folder / "images" / f"{n}.png")
        options = "\n".join(f"{letter}. {name}" for letter, name in zip("ABCD", COLOURS))
        ask = (
            f"What colour is it?\n{options}\nAnswer with the option's letter from the given choices directly."
        )
        talk = [
            {"from": "human", "value": f"<image>\n{ask}"},
            {"from": "gpt", "value": "ABCD"[n % 4]},
            {"from": "human", "value": "Provide a one-sentence caption for the provided image."},
            {"from": "gpt", "value": f"a {colour} disc"},
        ]
        records.append({"id": n, "image": f"images/{n}.png", "conversations": talk})
        row = {"question_id": n, "image": f"images/{n}.png"}
        choices.append({**row, "text": ask, "answers": ["ABCD"[n % 4]], "category": colour})
        captions.append({**row, "text": talk[2]["value"], "answers": [f"a {colour} disc", f"{colour} disc"]})
    say = [{"from": "human", "value": "Say <image>."}, {"from": "gpt", "value": "<image>"}]
    records.append({"id": "text", "conversations": say})
    (folder / "train.json").write_text(json.dumps(records))
    for name, rows in (("choice", choices), ("caption", captions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def trained(own_set, small_halves, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    flags = f"--batch_size 4 --workers 0 --dtype float32 --log_every 1 --data {own_set}/train.json".split()
    train_pretrain.main([*flags, *small_halves, "--steps", "4", "--out", str(out / "a")])
    sft = ["--init", str(out / "a"), "--scale", "32to144", "--steps", "4", "--slow_share", "0.5"]
    train_sft.main([*flags, *sft, "--out", str(out / "b")])
    return out / "b"


def test_own_files_go_all_the_way_to_scores_and_report(own_set, trained, tmp_path):
    tasks = f"choice:{own_set}/choice.jsonl,caption:{own_set}/caption.jsonl"
    flags = ["--model", str(trained), "--tasks", tasks, "--tokens", "both"]
    out, report = tmp_path / "eval.json", tmp_path / "report.html"
    evaluation.main([*flags, "--out", str(out), "--report", str(report)])
    summary = json.loads(out.read_text())
    assert {"model", "commit", "seed", "results"} <= summary.keys()
    keys = {"task", "metric", "score", "stderr", "n", "shots", "tokens", "blind_score"}
    assert all(keys <= row.keys() for row in summary["results"])
    names = [(row["task"], row["tokens"]) for row in summary["results"]]
    assert ("choice", "full") in names and ("caption", "pruned") in names and ("choice/red", "full") in names
    page = report.read_text()
    assert "stage 1, 32 tokens" in page and "64 tokens, windows of 2×2 patches" in page
    assert page.startswith("<!doctype html>") and "What colour is it?" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page  # opens offline


def test_report_shows_where_scales_look_before_and_after(trained, tmp_path):
    picture, step = Image.new("RGB", (64, 64), "red"), model.find_step(trained)
    vlm = model.VLM.from_pretrained(step)
    rows = evaluation.draw_scales(vlm, step, picture)
    assert [label for label, _ in rows] == ["stage 1, 32 tokens", "stage 2, 144 tokens"]
    assert [[o["window"] for o in row] for _, row in rows] == [[8, 2], [16, 8, 2]]
    assert all(o["weight"].min() >= 0 and o["weight"].max() <= 1 for _, row in rows for o in row)
    config = model.read_json(step / "config.json")
    for init in ("", str(tmp_path / "gone")):  # its stage 1 is not there: one row
        model.write_json(tmp_path / "config.json", {**config, "train": {**config["train"], "init": init}})
        assert [label for label, _ in evaluation.draw_scales(vlm, tmp_path, picture)] == [
            "stage 2, 144 tokens"
        ]


@pytest.mark.parametrize("kind", model.CONNECTORS)
def test_scales_are_shown_of_connectors_that_have_windows(kind, tmp_path):
    vlm = model.VLM(model.ModelConfig(connector=model.ConnectorConfig(kind)))
    model.write_json(tmp_path / "config.json", {"stage": "pretrain", "train": {"init": ""}})
    scales = evaluation.draw_scales(vlm, tmp_path, Image.new("RGB", (64, 64)))
    assert [len(row) for _, row in scales] == {"chain": [2], "resampler": [1]}.get(kind, [])
    evaluation.write_report(tmp_path / "report.html", "", [], [], [], {}, [], scales)
    page = (tmp_path / "report.html").read_text()
    assert ("Where each scale looks" in page) == bool(scales)
    assert page.count("<img") == sum(len(row) for _, row in scales)


def test_chat_answers_and_remembers(own_set, trained, monkeypatch, capsys):
    lines = iter(["What colour is it?", "Are you sure?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    seen = []
    real = data.prompt_pieces
    monkeypatch.setattr(data, "prompt_pieces", lambda *a: seen.append(a) or real(*a))
    evaluation.main(["--model", str(trained), "--chat", str(own_set / "images" / "0.png")])
    assert "144 visual tokens" in capsys.readouterr().out
    assert (
        len(seen) == 2 and seen[1][3][0][0] == "What colour is it?"
    )  # the second prompt holds the first turn


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

    def answer_all(vlm, tokenizer, task, images, mode, cfg, log, blind=False):
        looked = [a is q.images for a, q in zip(images, task.questions)]
        return [q.answers[0] if seen else "blue" for q, seen in zip(task.questions, looked)]

    monkeypatch.setattr(evaluation, "answer_all", answer_all)
    rows, shown = evaluation.score_task(None, None, task, "full", cfg)
    top = rows[0]
    assert top["task"] == name and top["n"] == (200 if name == "scenes_vqa" else 40)
    assert top["score"] == 100 if name != "scenes_cap" else top["score"] > 300
    assert top["blind_score"] < 60
    if name == "scenes_vqa":
        assert [r["task"].split("/")[1] for r in rows[1:] if "held_out" not in r["task"]] == list(
            data.QUESTION_TYPES
        )
        assert all(r["chance"] >= 100 / 9 for r in rows[1:])


def test_test_questions_do_not_come_from_training_scenes():
    task = evaluation.scenes_task("scenes_vqa", 50, 0)
    train = {data.make_scene("train", i) for i in range(2000)}
    assert not train & {q.images[0] for q in task.questions}
    assert any("held_out" in q.parts for q in task.questions)


def test_rank_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "x.tiktoken").write_text("hello\n")
    with pytest.raises(model.UserError, match="not a tiktoken rank file"):
        data.Tokenizer.from_pretrained(tmp_path / "x.tiktoken")
