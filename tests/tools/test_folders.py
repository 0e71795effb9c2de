"""Pictures in folders to files that training and evaluation read."""

import json

import pytest

import data
import model
from tools import folders


def test_folders_become_a_training_and_a_test_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for kind in ("dog", "cat"):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for n in range(10):
            data.render(data.make_scene("train", n)).save(tmp_path / "pictures" / kind / f"{n}.png")
    folders.main(["pictures"])
    assert "32 records to learn from in train.json, 4 questions to ask" in capsys.readouterr().out
    questions = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert [q["answers"] for q in questions] == [["A"], ["A"], ["B"], ["B"]]  # A. cat, B. dog
    assert "What is this?\nA. cat\nB. dog\nAnswer" in questions[0]["text"]
    ((source, _),) = data.open_sources("train.json", "sft")
    records = [source[n] for n in range(len(source))]
    assert {str(record.images[0]) for record in records}.isdisjoint(q["image"] for q in questions)
    assert sum(record.parts[1][1] == ["dog"] for record in records) == 8

    with pytest.raises(model.UserError, match="has 0 folders"):
        folders.main(["pictures/cat"])
    with pytest.raises(model.UserError, match="give the folder"):
        folders.main([])
