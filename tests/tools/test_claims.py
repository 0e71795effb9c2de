"""The science harness: paired differences, caching and resuming, the one-pass scorer, a whole tiny cell."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import model
from tools import claims


def test_errors_and_paired_differences_are_those_of_the_formula():
    draw = np.random.default_rng(0)
    values = draw.normal(3, 2, 500)
    mean, error = claims.mean_and_error(values, np.arange(500))
    assert np.isclose(mean, values.mean()) and np.isclose(error, values.std(ddof=1) / 500**0.5)
    assert np.isclose(error, evaluation.standard_error([*values]))
    twice = claims.mean_and_error(np.repeat(values, 2), np.repeat(np.arange(500), 2))
    assert np.allclose(twice, (mean, error))  # asking everything twice teaches nothing
    a, b = np.array([1, 1, 1, 0, 1, 0], bool), np.array([1, 0, 1, 0, 0, 1], bool)
    one = {"right": a, "picture": np.arange(6)}, {"right": b, "picture": np.arange(6)}
    points = 100 * np.array([0, 1, 0, 0, 1, -1])
    mean, error, spread = claims.difference(*([side] for side in one))
    assert np.isclose(mean, 100 / 6) and np.isclose(error, points.std(ddof=1) / 6**0.5) and spread == 0
    mean, _, spread = claims.difference([one[0], one[1]], [one[1], one[1]])  # two seeds: 16.7 and 0
    assert np.isclose(mean, 100 / 12) and np.isclose(spread, 100 / 12)


FIRST, SECOND = claims.FEW, claims.GROW
CELLS = [
    claims.Cell("a.one", FIRST, SECOND, (1, 1)), claims.Cell("a.two", FIRST, claims.FULL, (1, 1)),
    claims.Cell("a.direct", None, SECOND, (1, 1)),
    claims.Cell("b.other", f"{FIRST} --connector.reverse true", SECOND, (1, 1)),
]  # fmt: skip


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list:
    """Training and questions are stubs: what they were called with. claims.broken makes one fail."""
    made = []

    def train(stage):
        def run(argv):
            folder = Path(argv[argv.index("--out") + 1])
            assert argv[-2:] == ["--resume", "auto"]
            made.append((stage, folder.name))
            if claims.broken in argv:
                raise RuntimeError("out of paper")
            folder.mkdir(parents=True, exist_ok=True)
            steps = int(argv[argv.index("--steps") + 1])
            lines = [{"step": 1, "val_loss": 1.0}, {"step": 3, "seconds": 3 * 16 / 16, "visual_tokens": 32}]
            lines.append({"step": steps, "seconds": (steps - 3) * 16 / 8, "visual_tokens": 32})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

        return run

    def examine(run, cfg, pruned):
        made.append(("eval", run.name))
        right = np.random.default_rng(len(made)).random(50) < 0.5
        return {"right": right, "blind": ~right, "picture": np.arange(50) // 5, "ref": right[:4]}

    monkeypatch.setattr(claims, "TRAIN", {stage: train(stage) for stage in ("stage1", "stage2")})
    monkeypatch.setattr(claims, "examine", examine)
    monkeypatch.setattr(claims, "CELLS", CELLS)
    monkeypatch.setattr(claims, "COMPARE", [("a.one", "a.two")])
    monkeypatch.setattr(claims, "broken", "nothing", raising=False)
    monkeypatch.chdir(tmp_path)
    return made


def rows() -> dict:
    return {(row["cell"], row["seed"]): row for row in model.read_json(Path("runs/claims.json"))["rows"]}


def test_cells_share_stage_1_and_are_run_once(calls, capsys):
    claims.main([])
    order = "stage1 stage2 eval stage2 eval stage2 eval stage1 stage2 eval"
    assert " ".join(stage for stage, _ in calls) == order
    assert len({name for stage, name in calls if stage == "stage2"}) == 4
    row = rows()["a.one", 0]
    assert row["seconds"]["stage1"] == 3 * 16 / 16 + 347 * 16 / 8 and row["n"] == 50
    assert rows()["a.direct", 0]["seconds"].keys() == {"stage2", "eval"}
    assert np.load(f"runs/claims/{row['config_hash']}.npz")["right"].mean() * 100 == row["score"]
    shown = capsys.readouterr().out
    assert "4 cells to run" in shown and "a - b" in shown and shown.count("a.two") == 3
    calls.clear()
    claims.main([])
    assert not calls
    claims.main(["--seeds", "0,1", "--only", "a.o"])
    assert [stage for stage, _ in calls] == ["stage1", "stage2", "eval"] and ("a.one", 1) in rows()
    claims.main(["--seeds", "0,1", "--only", "a."])  # differences of two seeds together
    assert "a.one" in capsys.readouterr().out.split("a - b")[-1]
    calls.clear()
    claims.main(["--steps2", "51", "--only", "a.o"])  # other flags: the result before stays in the file
    assert [stage for stage, _ in calls] == ["stage2", "eval"]


def test_a_failing_cell_loses_no_other_and_goes_on_later(calls, monkeypatch):
    monkeypatch.setattr(claims, "broken", SECOND.split()[-1])
    with pytest.raises(model.UserError, match="a.one seed 0, a.direct seed 0, b.other seed 0"):
        claims.main([])
    assert rows().keys() == {("a.two", 0)}
    monkeypatch.setattr(claims, "broken", "nothing")
    calls.clear()
    claims.main(["--only", "a.one"])
    assert [stage for stage, _ in calls] == ["stage2", "eval"]  # its stage 1 was done


def test_limit_list_unknown_cells_and_other_scripts(calls, capsys, monkeypatch):
    claims.main(["--minutes", "1e-9"])
    claims.main(["--list"])
    assert not calls and "b.other" in capsys.readouterr().out
    with pytest.raises(model.UserError, match="no cell begins so"):
        claims.main(["--only", "zzz"])
    claims.main(["--only", "a.one"])
    calls.clear()
    monkeypatch.setattr(claims, "CODE", "another")
    capsys.readouterr()
    claims.main(["--only", "a.one", "--reuse", "true"])
    assert not calls and "*" in capsys.readouterr().out
    claims.main(["--only", "a.one"])
    assert [stage for stage, _ in calls] == ["stage1", "stage2", "eval"]


def stages_of(cell: claims.Cell) -> list[tuple]:
    """The model as each stage of a cell trains it, and the stage's flags."""
    cfg, stages = model.copy_config(model.preset("tiny")["model"]), []
    configs = claims.train_pretrain.PretrainConfig(), claims.train_sft.SftConfig()
    for flags, argv in zip(configs, claims.stage_flags(cell, 0, claims.ClaimsConfig())):
        if argv is not None:
            model.parse_cli(argv, "", cfg, flags)
            flags.check()
            cfg = model.scaled_config(cfg, flags.scale) if flags.scale else model.copy_config(cfg).check()
            stages.append((cfg, flags))
    return stages


@pytest.mark.parametrize("cell", claims.CELLS, ids=lambda cell: cell.name)
def test_a_cell_has_the_geometry_of_its_name(cell):
    names = [cell.name for cell in claims.CELLS]
    assert len(set(names)) == len(names) and {name for pair in claims.COMPARE for name in pair} <= set(names)
    stages, (family, *words) = stages_of(cell), cell.name.split(".")
    (first, flags), (cfg, last_flags) = stages[0], stages[-1]
    assert len(stages) == (cell.stage1 is not None) + (cell.stage2 is not None)
    if family == "cos":
        few, many = map(int, words[-1].split("-"))
        assert first.visual_tokens() == (few or many) and cfg.visual_tokens() == many and cfg.side == 16
        if many == 336 and cfg.connector.kind == "chain":
            assert cfg.connector.windows == [16, 8, 1] and cfg.connector.queries == [16, 16, 1]
    elif family == "mix":  # eight demonstrations and a question fit into a row
        assert flags.data.endswith(f"mix-{cell.mix}.json") and not flags.batch_size and not cell.stage2
        assert flags.row_length >= 9 * (cfg.visual_tokens() + 35)
    elif family == "pool":
        kind, pixels, tokens = words
        assert cfg.visual_tokens() == int(tokens) and f"{cfg.vit.image_size}px" == pixels
        assert cfg.connector.kind == claims.POOLS[kind] and flags.batch_size == 16 and not cell.stage2
    elif words != ["stage1"]:
        kept = {"prune.pool": 25, "keep.50": 128, "keep.25": 64, "keep.05": 13}.get(".".join(words), 26)
        kept = 80 if words[0] == "chain" else kept
        assert cell.pruned and last_flags.steps == cell.steps2 and cfg.side == 16
        assert (flags.pruner == "divprune") == (words[0] == "fast")  # all of stage 1 on pruned tokens
        assert cfg.visual_tokens() == (336 if words[0] == "chain" else 256) and cfg.kept_tokens() == kept


LINEAR = "--connector.kind linear"


@pytest.mark.parametrize(
    "flags, view",
    [(claims.FEW, "full"), (LINEAR, "full"), ("--connector.kind resampler", "full"), (LINEAR, "pruned"),
     (f"{LINEAR} --prune.name cdpruner", "pruned"), (f"{LINEAR} --prune.name random", "pruned")],
)  # fmt: skip
def test_one_pass_equals_greedy_decoding_for_all_questions(flags, view):
    """The shipped decoder already answers, often wrongly: nobody has shown it a picture."""
    torch.manual_seed(0)
    cfg = model.copy_config(model.preset("tiny")["model"])
    model.parse_cli(flags.split(), "", cfg)
    vlm, tokenizer = model.VLM.build(cfg).eval(), data.find_tokenizer(cfg)
    questions, pixels, *pictures = claims.exam(24, cfg.vit.image_size, cfg.image.resample)
    images = [question.images for question in questions]
    task = evaluation.Task("scenes_vqa", "vqa", questions, max_new_tokens=16)
    both = claims.right_answers(vlm, tokenizer, questions * 2, pixels, sum(pictures, []), 5, view)
    for right, numbers, shown in zip(both.reshape(2, -1), pictures, (images, evaluation.derange(images, 0))):
        answers = evaluation.answer_all(vlm, tokenizer, task, shown, view, evaluation.EvalConfig())
        assert [*right] == [answer == q.answers[0] for answer, q in zip(answers, questions)]
        assert [*right] == evaluation.score_answers(task, answers)  # here nobody says "two" for 2
        assert 0 < right.mean() < 1
        easy = [evaluation.Question(q.images, q.text, [answer]) for q, answer in zip(questions, answers)]
        ended = [len(tokenizer.encode(answer)) < 16 for answer in answers]  # by themselves
        assert (claims.right_answers(vlm, tokenizer, easy, pixels, numbers, view=view)[ended]).all()


def test_a_whole_cell(small_halves, tmp_path, monkeypatch):
    first = " ".join(["--connector.plan 32 --row_length 128", *small_halves])
    cell = claims.Cell("tiny.32-144", first, f"{claims.FULL} --scale 32to144", (1, 1))
    monkeypatch.setattr(claims, "CELLS", [cell])
    flags = ["--steps1", "2", "--steps2", "2", "--batch_size", "4", "--n", "6", "--ref", "4"]
    claims.main([*flags, "--out", str(tmp_path / "c")])
    row = json.loads((tmp_path / "c.json").read_text())["rows"][0]
    assert row["visual_tokens"] == {"stage1": 32, "stage2": 144} and row["n"] == 30
    assert row["seconds"].keys() == {"stage1", "stage2", "eval"}
    assert row["commit"] and 0 <= row["score"] <= 100
    (tmp_path / "c.json").unlink()  # lost: only the questions are asked again
    monkeypatch.setattr(claims, "TRAIN", {})
    claims.main([*flags, "--out", str(tmp_path / "c")])
    assert json.loads((tmp_path / "c.json").read_text())["rows"][0]["score"] == row["score"]
