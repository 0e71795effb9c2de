"""The page of a run, from own pictures through both stages: scores, examples, overlays, scales, curves."""

import base64
import json

import pytest
from PIL import Image, ImageDraw

import data
import eval as evaluation
import model
import train_pretrain
import train_sft
from tools import benchmarks, report

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
        ask = f"What colour is it?\n{options}{benchmarks.LETTER}"
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
    out = tmp_path / "eval.json"
    evaluation.main([*flags, "--out", str(out)])
    summary = json.loads(out.read_text())
    assert {"model", "commit", "seed", "results"} <= summary.keys()
    keys = {"task", "metric", "score", "stderr", "n", "shots", "tokens", "blind_score"}
    assert all(keys <= row.keys() for row in summary["results"])
    names = [(row["task"], row["tokens"]) for row in summary["results"]]
    assert ("choice", "full") in names and ("caption", "pruned") in names and ("choice/red", "full") in names
    report.main([str(out)])
    page = (tmp_path / "report.html").read_text()
    assert "stage 1, 32 tokens" in page and "64 tokens, windows of 2×2 patches" in page
    assert page.startswith("<!doctype html>") and "What colour is it?" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page  # opens offline


def test_report_shows_where_scales_look_before_and_after(trained, tmp_path):
    picture, step = Image.new("RGB", (64, 64), "red"), model.find_step(trained)
    vlm = model.VLM.from_pretrained(step)
    rows = report.draw_scales(vlm, step, picture)
    assert [label for label, _ in rows] == ["stage 1, 32 tokens", "stage 2, 144 tokens"]
    assert [[o["window"] for o in row] for _, row in rows] == [[8, 2], [16, 8, 2]]
    assert all(o["weight"].min() >= 0 and o["weight"].max() <= 1 for _, row in rows for o in row)
    config = model.read_json(step / "config.json")
    for init in ("", str(tmp_path / "gone")):  # its stage 1 is not there: one row
        model.write_json(tmp_path / "config.json", {**config, "train": {**config["train"], "init": init}})
        assert [label for label, _ in report.draw_scales(vlm, tmp_path, picture)] == ["stage 2, 144 tokens"]


@pytest.mark.parametrize("kind", model.CONNECTORS)
def test_scales_are_shown_of_connectors_that_have_windows(kind, tmp_path):
    vlm = model.VLM(model.ModelConfig(connector=model.ConnectorConfig(kind)))
    model.write_json(tmp_path / "config.json", {"stage": "pretrain", "train": {"init": ""}})
    scales = report.draw_scales(vlm, tmp_path, Image.new("RGB", (64, 64)))
    assert [len(row) for _, row in scales] == {"chain": [2], "resampler": [1]}.get(kind, [])
    report.write_report(tmp_path / "report.html", "", [], [], [], {}, [], scales)
    page = (tmp_path / "report.html").read_text()
    assert ("Where each scale looks" in page) == bool(scales)
    assert page.count("<img") == sum(len(row) for _, row in scales)


def example(**changes) -> dict:
    fields = {
        "task": "t",
        "metric": "accuracy",
        "question": "q?",
        "right": ["a"],
        "answer": "a",
        "score": 1.0,
    }
    return {**fields, "image": None, "blind_answer": None, **changes}


def test_a_caption_has_a_score_and_is_not_right_or_wrong():
    for score in (0.0, 0.4, 1.7):  # CIDEr-D / 10 of a good caption may exceed 1
        card = report.html_card(example(metric="cider_d_x100", score=score))
        assert f"CIDEr-D {100 * score:.0f}" in card and "right</b>" not in card and "wrong</b>" not in card
    assert "✓ right" in report.html_card(example()) and "✗ wrong" in report.html_card(example(score=0.0))
    assert "◐ 30 %" in report.html_card(example(score=0.3))
    card = report.html_card(example(blind_answer="<b>", answer="<i>"))
    assert "with another picture: &lt;b&gt;" in card and "&lt;i&gt;" in card


def test_rows_of_a_loss_have_no_bar_and_those_of_shots_name_them():
    row = {"task": "scenes_words", "metric": "nll_per_token", "score": 1.2345, "stderr": 0.1, "n": 7}
    row |= {"shots": 0, "tokens": "full", "blind_score": None, "chance": None}
    page = report.html_results([row])
    assert "<b>1.234</b>" in page and "lower is better" in page and 'class="seen" style' not in page
    shots = {**row, "task": "scenes_bind", "metric": "accuracy", "score": 50.0, "shots": 4, "chance": 50.0}
    page = report.html_results([shots])
    assert "4-shot" in page and 'class="seen" style="width: 50.0%"' in page


def test_pictures_are_found_by_their_names(tmp_path):
    assert report.open_picture("scene:test:17").size == data.render(data.make_scene("test", 17)).size
    Image.new("RGB", (7, 5), "red").save(tmp_path / "a#1.png")
    assert report.open_picture(str(tmp_path / "a#1.png")).size == (7, 5)
    code = base64.b64encode((tmp_path / "a#1.png").read_bytes()).decode()
    (tmp_path / "t.tsv").write_text(f"index\timage\n0\tx\n1\t{code}\n")
    assert report.open_picture(f"{tmp_path}/t.tsv#1").size == (7, 5)


def test_of_answers_without_a_run_scores_and_examples_are_shown(tmp_path):
    path, rows = tmp_path / "q.jsonl", []
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    path.write_text(json.dumps({"question_id": 0, "image": "a.png", "text": "What?", "answers": ["x"]}))
    rows.append({"question_id": 0, "prompt": "What?", "text": "x", "metadata": {}})
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "q.jsonl").write_text(json.dumps(rows[0]))
    flags = ["--answers", str(tmp_path / "theirs"), "--tasks", f"vqa:{path}"]
    benchmarks.main([*flags, "--out", str(tmp_path / "eval.json")])
    report.main([str(tmp_path / "eval.json"), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "✓ right" in page and "<img" in page and "Where each scale looks" not in page
    for argv in ([], [str(tmp_path / "none.json")]):
        with pytest.raises(model.UserError, match="give an eval.json"):
            report.main(argv)
    with pytest.raises(model.UserError, match="is a folder"):
        report.main([str(tmp_path / "eval.json"), "--out", str(tmp_path)])
