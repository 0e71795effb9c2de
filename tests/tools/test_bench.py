"""The speed table: the arithmetic of its rows, and the whole script once on a tiny model."""

import json

import pytest
import torch

import model
from tools import bench, plan

KEYS = ["name", "value", "spread", "floor", "efficiency", "at_7b", "published", "note"]
SMALL = model.ModelConfig(
    vit=model.ViTConfig(64, 8, 16, 2, 2, 32),
    connector=model.ConnectorConfig(levels=[1, 2], width=16, heads=2),
    decoder=model.DecoderConfig(64, 16, 1, 2, 2, 8, 32),
    lora=model.LoraConfig(2, 2.0),
)


def test_a_row_from_given_ratios():
    row = bench.make_row("x", [0.2, 0.5, 0.25, 0.25, 0.3], 0.2, 0.16, 0.27, "told")
    assert list(row) == KEYS and (row["name"], row["published"], row["note"]) == ("x", 0.27, "told")
    assert row["value"] == 0.25 and row["spread"] == [0.25, 0.3]
    assert row["efficiency"] == pytest.approx(0.2 / 0.25)
    assert row["at_7b"] == pytest.approx(0.16 / 0.8)  # at that model's own floor it would be 0.16
    faster = bench.make_row("x.speedup", [1.5], 2.0, 4.0, 2.1)  # three quarters, there too
    assert faster["efficiency"] == 0.75 and faster["at_7b"] == 3.0
    counted, ran = bench.make_row("x", [0.1], 0.1), []
    assert counted["at_7b"] is None and counted["spread"] == [0.1, 0.1] and counted["efficiency"] == 1
    # steps alternate, and the first round is not timed
    seconds = bench.alternate({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 2)
    assert ran == ["a", "b"] * 3 and [len(seconds[name]) for name in "ab"] == [2, 2]


def test_a_caption_batch_has_the_tokens_it_is_named_for():
    for name, visual in (("32", 32), ("linear256", 256), ("resampler336", 336)):
        cfg = bench.stage1_config(bench.GEOMETRY, name)
        rows = bench.captions(cfg, 4, 256).student
        assert (rows.doc_ids == 0).sum() == visual + bench.TEXT
        assert len(rows.targets) == 4 * bench.TEXT


def test_the_floors_and_speedups_at_7b_are_those_of_the_plan():
    seven = model.preset("cos-7b")["model"]
    flops = {name: sum(bench.stage1_flops(seven, name).values()) for name in bench.STAGE1}
    assert 0.15 < flops["32"] / flops["336"] < 0.18
    assert flops["resampler336"] == pytest.approx(flops["336"], rel=0.01)
    seven = model.preset("llava-1.5-vicuna")
    lines = plan.savings(*plan.stages_of(seven, seven["model"]))
    speedups = [float(line.split("text: ")[1].split()[0]) for line in lines if "200 of text" in line]
    steps = [((mode,), 200) for mode in ("full", "pruned", "slow")]
    flops = ([bench.dual_flops(seven["model"], step, tiles) for step in steps] for tiles in (1, 5))
    assert [bench.one_in_ten(*three) for three in flops] == pytest.approx(speedups, abs=0.1)  # of one decimal


@pytest.mark.parametrize("tiles", [1, 5])
def test_flops_of_dualspeed_by_hand(tiles):
    cfg = bench.dual_config(bench.GEOMETRY, "llava15")
    d, v, text, answers = cfg.decoder, cfg.vit, 200, 80

    def forward(visual):
        T, weights = visual + text, 4 * d.width**2 + 3 * d.width * d.mlp_width
        return d.layers * (2 * weights * T + 4 * T * T * d.width) + 2 * answers * d.width * d.vocab_size

    P = 24 * 24 + 1
    vit = v.layers * (2 * 12 * v.width**2 * P + 4 * P * P * v.width) + 2 * (P - 1) * 3 * 8 * 8 * v.width
    mlp = 2 * (P - 1) * (2 * v.width * d.width + 3 * d.width**2)  # nothing behind its first layer trains
    full, fast = (tiles * (vit + mlp) + 3 * forward(tiles * n) for n in (576, 58 + 4))
    slow = full + forward(tiles * (58 + 4))
    for mode, flops in (("full", full), ("pruned", fast), ("slow", slow)):
        assert bench.dual_flops(cfg, ((mode,), text), tiles) == pytest.approx(flops, rel=1e-9)
    nine_to_one = bench.dual_flops(cfg, (("slow", *["pruned"] * 9), text), tiles)
    assert 10 * full / nine_to_one == pytest.approx(bench.one_in_ten(full, fast, slow))


@pytest.mark.parametrize("tiles", [1, 5])
@pytest.mark.parametrize("text", bench.DUAL_TEXT)
def test_a_dualspeed_batch_has_the_tokens_it_is_named_for(tiles, text):
    cfg = bench.dual_config(SMALL, "llava15")
    for mode, visual in (("full", 576), ("pruned", 62), ("slow", 576)):
        batch = bench.dual_batch(cfg, ((mode,) * 2, text), tiles)
        rows = batch.student
        assert len(batch.pixels) == 2 * tiles and len(rows.ids) == 2  # a sample a row
        assert [(rows.doc_ids == i).sum() for i in (0, 1)] == [tiles * visual + text] * 2
        assert rows.ids.shape[1] - tiles * visual - text < 16
        assert len(rows.targets) == 2 * 0.4 * text
        last = rows.supervised.view(2, -1) - torch.tensor([[0], [rows.ids.shape[1]]])
        assert last.tolist() == 2 * [[*range(tiles * visual + text * 6 // 10 - 1, tiles * visual + text - 1)]]
        assert (batch.teacher is None) == (mode != "slow")
        if mode == "slow":
            assert len(batch.distill) == len(rows.targets)
            assert batch.teacher.targets.tolist() == rows.targets[batch.distill].tolist()
            assert (batch.teacher.doc_ids == 0).sum() == tiles * 62 + text


def test_flops_of_a_step_are_those_of_the_plan():
    """The plan counts a sample at a time, the bench a batch of any documents."""
    cfg = bench.stage1_config(bench.GEOMETRY, "32")
    cfg.lora = model.LoraConfig(0)
    trainer = bench.Trainer(cfg, {"train": "connector,decoder", "dtype": "float32"}, 3)
    flops = bench.counted_flops(trainer, trainer.batch)
    parts = plan.sample_cost(cfg, ["connector", "decoder"], bench.TEXT, "full", 1)
    assert flops == pytest.approx(3 * sum(parts.values()), rel=0.01)


def test_the_reference_step_learns_the_same():
    """It takes detours, but its losses are ours: logits everywhere, a second encoder pass, a pruning loop."""
    cfg = bench.dual_config(SMALL, "llava15")
    trainers = [bench.Trainer(cfg, {"dtype": "float32"}, config=bench.train_sft.SftConfig) for _ in range(2)]
    trainers[1].vlm.__class__ = bench.ReferenceVLM
    batch = bench.dual_batch(cfg, (("slow",) * 2, 40), 1)
    ours = bench.train_sft.fast_slow_loss(*trainers[0].vlm(batch)[:2], batch)["loss"]
    everywhere = bench.everywhere(batch)
    assert len(everywhere.student.targets) == batch.student.ids.numel() > len(batch.student.targets)
    loss = bench.reference_loss(*trainers[1].vlm(everywhere)[:2], everywhere)["loss"]
    assert loss.item() == pytest.approx(ours.item(), rel=1e-5)


def test_a_slope_is_an_exponent():
    assert bench.slope((1, 2, 4), [3.0, 12.0, 48.0]) == pytest.approx(2)


@pytest.mark.slow
def test_the_script_writes_every_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "GEOMETRY", SMALL)
    monkeypatch.setattr(bench, "SAMPLES", 4)
    monkeypatch.setattr(bench, "DUAL_SIDE", 8)
    out = tmp_path / "bench.json"
    bench.main(["--rounds", "1", "--out", str(out)])
    report = json.loads(out.read_text())
    assert {"geometry", "commit", "torch", "threads", "rows"} <= report.keys()
    assert report["geometry"]["decoder"]["width"] == 16
    rows = {row["name"]: row for row in report["rows"]}
    for name, row in rows.items():  # on shapes this small, one noisy round may show time that shrinks
        assert list(row) == KEYS and row["floor"] > 0, name
        assert row["value"] > 0 or name.startswith("growth."), name
    flops = report["geometry"]["flop_shares"]
    assert flops["dualspeed.next.slow"]["teacher"] > 0 and "teacher" not in flops["dualspeed.next.pruned"]
    budgets = [f"cos.stage1.budget.{name}" for name in ("32", "48", "80", "linear256")]
    assert len(rows) >= 54 and {*budgets, "connector.share.tiny", "packing.speedup"} <= {*rows}
    assert {"dualspeed.coarse.t300.speedup", "reading.640x480.images_per_s"} <= {*rows}
    papers = {name: row["published"] for name, row in rows.items() if "dual" in name and row["published"]}
    assert papers == {"dualspeed.llava15.speedup": 2.1, "dualspeed.next.speedup": 4.0}
    assert rows["dualspeed.llava15.speedup"]["floor"] == rows["dualspeed.llava15.mixed.speedup"]["floor"]
    for name, row in [item for item in rows.items() if "dual" in item[0]]:
        assert (row["at_7b"] is None) == (row["efficiency"] is None) == ("select" in name)
    assert [rows[name]["published"] for name in budgets] == [0.27, 0.35, 0.42, 0.82]
    assert rows["connector.share.7b"]["value"] < 0.05
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)
    for begin, names in (("cos.stage1.budget.8", ["cos.stage1.budget.80"]), ("packing", ["packing.speedup"])):
        bench.main(["--rounds", "1", "--only", begin, "--out", str(out)])
        assert [row["name"] for row in json.loads(out.read_text())["rows"]] == names
    with pytest.raises(model.UserError, match="no row's name"):
        bench.main(["--only", "cos.stage2", "--out", str(out)])
