"""The speedrun: its test against tables of Student's distribution, and what makes a record."""

import json
import subprocess

import pytest

import model
from tools import speedrun


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [
        (2.015, 5, 0.05),
        (2.571, 5, 0.025),
        (6.314, 1, 0.05),
        (2.228, 10, 0.025),
        (1.645, 1e5, 0.05),
        (0, 3, 0.5),
    ],
)
def test_the_tail_of_student_is_that_of_the_tables(t, freedom, p):
    assert speedrun.student_tail(t, freedom) == pytest.approx(p, abs=1e-4)
    assert speedrun.student_tail(-t, freedom) == pytest.approx(1 - p, abs=1e-4)


def test_welch_by_hand():
    """Means 3 and 6, variances 2.5 and 10: t 3 / sqrt(2.5), 2.5^2 / (0.5^2 / 4 + 2^2 / 4) = 5.88 degrees."""
    p = speedrun.welch([1, 2, 3, 4, 5], [2, 4, 6, 8, 10])
    assert p == pytest.approx(speedrun.student_tail(3 / 2.5**0.5, 5.8824), abs=1e-5)
    assert 0.05 < p < 0.055 and speedrun.welch([2, 4, 6, 8, 10], [1, 2, 3, 4, 5]) == pytest.approx(1 - p)


def rows_of(seconds: float, score: float = 91.0, blind: float = 30.0, seeds=range(5)) -> list[dict]:
    return [{"seed": seed, "seconds": seconds + seed / 10, "score": score, "blind": blind} for seed in seeds]


def test_what_makes_a_record():
    assert speedrun.judge(rows_of(100), rows_of(200)) == speedrun.judge(rows_of(100), None) == []
    (slower,) = speedrun.judge(rows_of(200), rows_of(100))
    assert slower == "not faster than the record before it: p 1.000"
    reasons = speedrun.judge(rows_of(100, 89.9, 35.0, range(3)), rows_of(200))
    assert reasons == [
        "median score 89.9 is below 90",
        "blind score 35.0 is above 34",
        "seeds 0-4 were not all run",
    ]


def test_runs_alternate_and_are_written_to_the_record(tmp_path, monkeypatch, capsys):
    """With scripts that are not run: the calls, and what becomes of their logs."""
    calls = []

    def run(call, **_):
        folder, script = call[call.index("--out") + 1], call[1]
        calls.append((script, folder))
        if script == "eval.py":
            row = {"task": "scenes_vqa", "score": 92.0, "blind_score": 31.0}
            return model.write_json(speedrun.Path(folder), {"results": [row]})
        seconds = 20 if "01-slow" in folder else 10 + len(calls) / 100
        lines = [
            {"step": 10, "seconds": seconds},
            {"step": 20, "seconds": seconds},
            {"step": 20, "val_loss": 1},
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        return model.write_text(speedrun.Path(folder) / "metrics.jsonl", text)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(speedrun.bench, "commit", lambda: "abc")
    monkeypatch.setattr(speedrun, "RECORDS", tmp_path / "records")
    for name in ("01-slow", "02-fast"):
        flags = {"pretrain": "--steps 2", "sft": "--scale 32to144"}
        model.write_json(tmp_path / "records" / name / "record.json", {"note": name, "flags": flags})
    record = tmp_path / "records" / "02-fast"
    speedrun.main(["--record", str(record), "--seeds", "0,1", "--out", str(tmp_path / "runs")])
    order = [speedrun.Path(folder).parent.name for script, folder in calls if script == "eval.py"]
    assert order == ["01-slow-seed0", "02-fast-seed0", "01-slow-seed1", "02-fast-seed1"]
    values = model.read_json(record / "record.json")
    assert [row["seed"] for row in values["results"]] == [0, 1] and values["note"] == "02-fast"
    assert all(40 < row["seconds"] < 42 for row in values["results"])
    assert values["before"]["record"] == "01-slow" and values["before"]["results"][0]["seconds"] == 80
    assert "02-fast is no record: seeds 0-4 were not all run" in capsys.readouterr().out
    speedrun.main(["--list", "true"])
    assert "02-fast" in capsys.readouterr().out
    with pytest.raises(model.UserError, match="--record is missing"):
        speedrun.main([])
