"""The speed table: the arithmetic of its rows, and the whole script once on a tiny model."""

import json

import benchmark
import pytest

import model

KEYS = ["name", "value", "spread", "floor", "efficiency", "at_7b", "published", "note"]
SMALL = model.ModelConfig(
    vit=model.ViTConfig(64, 8, 16, 2, 2, 32),
    connector=model.ConnectorConfig(levels=[1, 2], width=16, heads=2),
    decoder=model.DecoderConfig(64, 16, 1, 2, 2, 8, 32),
    lora=model.LoraConfig(2, 2.0),
)


def test_a_row_from_given_ratios():
    row = benchmark.make_row("x", [0.2, 0.5, 0.25, 0.25, 0.3], 0.2, 0.16, 0.27, "told")
    assert list(row) == KEYS and (row["name"], row["published"], row["note"]) == ("x", 0.27, "told")
    assert row["value"] == 0.25 and row["spread"] == [0.25, 0.3]
    assert row["efficiency"] == pytest.approx(0.2 / 0.25)
    assert row["at_7b"] == pytest.approx(0.16 / 0.8)  # at that model's own floor it would be 0.16
    counted = benchmark.make_row("x", [0.1], 0.1)
    assert counted["at_7b"] is None and counted["spread"] == [0.1, 0.1] and counted["efficiency"] == 1


def test_steps_alternate_and_the_first_round_is_not_timed():
    ran = []
    seconds = benchmark.alternate({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 2)
    assert ran == ["a", "b"] * 3 and [len(seconds[name]) for name in "ab"] == [2, 2]


def test_a_caption_batch_has_the_tokens_it_is_named_for():
    for name, visual in (("32", 32), ("linear256", 256), ("resampler336", 336)):
        cfg = benchmark.stage1_config(benchmark.GEOMETRY, name)
        rows = benchmark.captions(cfg, 4, 256).student
        assert (rows.doc_ids == 0).sum() == visual + benchmark.TEXT
        assert len(rows.targets) == 4 * benchmark.TEXT


def test_the_floors_at_7b_are_those_of_the_plan():
    seven = model.preset("cos-7b")["model"]
    flops = {name: sum(benchmark.stage1_flops(seven, name).values()) for name in benchmark.STAGE1}
    assert 0.15 < flops["32"] / flops["336"] < 0.18
    assert flops["resampler336"] == pytest.approx(flops["336"], rel=0.01)


def test_the_script_writes_every_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "GEOMETRY", SMALL)
    monkeypatch.setattr(benchmark, "SAMPLES", 4)
    out = tmp_path / "bench.json"
    benchmark.main(["--rounds", "1", "--out", str(out)])
    report = json.loads(out.read_text())
    assert {"geometry", "commit", "torch", "threads", "rows"} <= report.keys()
    assert report["geometry"]["decoder"]["width"] == 16
    rows = {row["name"]: row for row in report["rows"]}
    assert all(list(row) == KEYS and row["value"] > 0 and row["floor"] > 0 for row in rows.values())
    names = [f"cos.stage1.time.{name}" for name in ("32", "48", "80", "linear256", "resampler336")]
    names += [f"cos.stage1.budget.{name}" for name in ("32", "48", "80", "linear256")]
    assert list(rows) == [*names, "connector.share.tiny", "connector.share.7b", "packing.speedup"]
    published = [0.27, 0.35, 0.42, 0.82, 1.0]
    assert [rows[name]["published"] for name in names] == published + published[:4]
    assert rows["connector.share.7b"]["value"] < 0.05
    told = capsys.readouterr().out
    assert all(name in told for name in rows)


def test_only_some_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "GEOMETRY", SMALL)
    out = tmp_path / "bench.json"
    benchmark.main(["--rounds", "1", "--only", "cos.stage1.budget.8", "--out", str(out)])
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["cos.stage1.budget.80"]
    with pytest.raises(model.UserError, match="no row's name"):
        benchmark.main(["--only", "cos.stage2", "--out", str(out)])
