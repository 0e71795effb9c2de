"""The plan: its counts against the whole model counted at once, formulas, and that every preset prints."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import model
from tools import plan


def small(**connector) -> model.ModelConfig:
    return model.ModelConfig(
        vit=model.ViTConfig(64, 8, 32, 3, 2, 64),
        connector=model.ConnectorConfig(levels=[1, 2], width=32, heads=2, **connector),
        decoder=model.DecoderConfig(200, 48, 3, 4, 2, 12, 96),
        prune=model.PruneConfig("random", 0.25, 2),
    )


def vlm_flops(cfg: model.ModelConfig, train: list[str], text: int, mode: str) -> float:
    """FLOPs of one sample through the real VLM, forward and backward, on the meta device."""
    pieces = [0, (list(range(1, text + 1)), True)]
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8).numpy()
    batch = data.make_batch([(pieces, pixels)], [mode], cfg, 1, 4096).to("meta")
    T = text + cfg.visual_tokens("pruned" if mode == "pruned" else "full")
    batch.student = cut_padding(batch.student, T)
    if batch.teacher is not None:
        batch.teacher = cut_padding(batch.teacher, text + cfg.visual_tokens("pruned"))
    with torch.device("meta"):
        vlm = model.VLM(cfg)
    vlm.to("meta").set_trainable(train, isolator=True)
    with FlopCounterMode(display=False) as counter:
        logits, _, _ = vlm(batch)
        logits.sum().backward()
    return counter.get_total_flops()


def cut_padding(rows: data.Rows, T: int) -> data.Rows:
    """The plan counts no padding: a row of exactly T positions."""
    assert len(rows.ids) == 1  # on "meta", so that where the slots are is not known
    fields = {name: getattr(rows, name)[:, :T] for name in ("ids", "positions", "doc_ids")}
    return dataclasses.replace(rows, **fields)


@pytest.mark.parametrize("train", ["connector", "connector,decoder", "vit,connector,decoder"])
@pytest.mark.parametrize("mode", ["full", "pruned", "slow"])
@pytest.mark.parametrize("kind", ["chain", "mlp", "cabstractor"])
def test_parts_add_up_to_the_whole_model(kind, mode, train):
    cfg, text = small(kind=kind), 50
    parts = plan.sample_cost(cfg, train.split(","), text, mode, 1)
    # one per cent: the plan leaves out the selection of tokens and nothing else
    assert sum(parts.values()) == pytest.approx(vlm_flops(cfg, train.split(","), text, mode), rel=0.01)


def test_recomputing_costs_a_forward_pass_and_keeps_inputs():
    values, train = model.preset("llava-1.5-vicuna"), ["connector", "decoder"]
    stage = plan.stages_of(values, values["model"])[-1]
    cfg = stage.cfg
    kept = stage.peak(8).lines[0][1]  # a block's bytes of each position
    whole = plan.sample_cost(cfg, train, 200, "full", 1)
    # A block is not computed again to its end: nothing needs the result of its last product.
    for recompute, least, most in (("attention", 1.05, 1.2), ("block", 1.25, 4 / 3)):
        flops = plan.sample_cost(cfg, train, 200, "full", 1, recompute)
        few = stage.changed({"recompute": recompute}).peak(8).lines[0][1]
        assert least * 0.99 < flops["decoder"] / whole["decoder"] < most * 1.01
        assert flops["vit"] == whole["vit"] and flops["head"] == whole["head"]  # frozen; not in a block
        assert few < {"attention": 0.9, "block": 0.15}[recompute] * kept


def test_the_published_ratios_are_where_arithmetic_puts_them():
    """chain-of-sight: 0.16-0.17 is the floor at 7B for 32 tokens; DualSpeed: about 2.4 and 3.9-4.0 at 200."""
    row = model.preset("cos-7b")
    stages = plan.stages_of(row, row["model"])
    assert [stage.name for stage in stages] == ["1", "1b", "2"]
    assert [stage.cfg.visual_tokens() for stage in stages] == [80, 1296, 1296]
    lines = plan.savings(stages[0], stages[-1])
    assert 0.15 <= float(lines[0].rsplit(":")[1].split("/")[0]) <= 0.18
    base = model.preset("1.2b")  # a small decoder behind the same encoder, which trains: less to save
    small = plan.savings(*plan.stages_of(base, base["model"]))
    fixed = [int(page[2].split("are ")[1].split("%")[0]) for page in (lines, small)]
    assert fixed[0] < 20 < 60 < fixed[1]
    row = model.preset("llava-1.5-vicuna")
    lines = plan.savings(*plan.stages_of(row, row["model"]))
    times = [float(line.split(" times on")[0].rsplit(" ", 1)[1]) for line in lines if " times on" in line]
    assert 2.2 <= times[0] <= 2.5 and 3.8 <= times[1] <= 4.1


FEW = ("tiny", "cos-7b", "llava-next", "7b-moe")  # of each kind one; the others are slow together


@pytest.mark.parametrize("names", [FEW, pytest.param(model.preset_names(), marks=pytest.mark.slow)])
def test_every_preset_has_a_plan(names, capsys):
    for name in names:
        plan.main(["--preset", name, "--gpus", "4"])
        output = capsys.readouterr().out
        assert model.preset(name)["source"] in output and "nan" not in output
        for word in ("parameters", "visual tokens", "TFLOP", "GB on each of 4", "hours", "558k"):
            assert word in output
        assert ("active for a token" in output) == name.endswith("-moe")


def test_flags_change_the_plan(capsys):
    plan.main("--preset llava-1.5 --prune.keep 0.5".split())
    assert "full 576, pruned 292;" in capsys.readouterr().out
    refused = {"--preset 9b": "--preset '9b' is unknown", "--mfu 0": "must be above 0"}
    refused |= {"--gpus 0": "--gpus 0: must be at least 1", "--slow_share 2": "no share between 0 and 1"}
    for flags, words in refused.items():
        with pytest.raises(model.UserError, match=words):
            plan.main(flags.split())


def test_the_plan_of_adapters_on_one_card():
    """Adapters only where they train, in rows of the recipe, of which a micro-batch takes a share."""
    row = model.preset("siglip2-qwen2.5-0.5b")
    flags = plan.PlanConfig(train="connector,lora", micro_steps=32)
    cfg = model.copy_config(row["model"])
    cfg.lora.rank = 64
    one, two = plan.stages_of(row, cfg, flags)
    assert (one.train, one.cfg.lora.rank) == (["connector"], 0)
    assert (two.train, two.cfg.lora.rank) == (["connector", "lora"], 64)
    assert one.load(1) == plan.Load(9, 1024, 1024 - 9 * 80)  # captions that fit into its one row
    assert two.load(1) == plan.Load(1, 1024, 1024 - 336, 200)  # the largest is slow; the rest is text
    stages = plan.stages_of(row, model.copy_config(row["model"]))
    assert [stage.load(1).positions for stage in stages] == [4096, 2048]
    assert stages[1].cost(200)["decoder"] > 1.2 * two.cost(200)["decoder"]  # it has its own gradients


def test_the_plan_scales_tokens_if_the_step_still_fits(capsys):
    for scales, full, refused in (("80", "full 1296", False), ("32", "full 32", True)):
        plan.main(["--preset", "cos-8b", "--connector.plan", scales])
        out = capsys.readouterr().out
        assert full in out and ("its tokens are not scaled up: 80to1296" in out) == refused


@pytest.mark.parametrize("kind, name", [("chain", "coarse"), ("mlp", "fastervlm"), ("linear", "visionzip")])
def test_what_a_pruner_spares_is_not_counted(kind, name):
    """The connector on what is kept only; rel: the attention to patches is not counted either."""
    cfg, train = small(kind=kind), ["connector", "decoder"]
    cfg.prune = model.PruneConfig(name, 0.5, 2)
    parts = plan.sample_cost(cfg.check(), train, 50, "pruned", 1)
    assert sum(parts.values()) == pytest.approx(vlm_flops(cfg, train, 50, "pruned"), rel=0.03)
    share = parts["connector"] / plan.sample_cost(cfg, train, 50, "full", 1)["connector"]
    assert share == pytest.approx(0.5, abs=0.05)  # of two scales with 16 tokens each, one


def test_tiles_and_hours_are_those_of_the_data(capsys):
    """LLaVA-1.5's padded picture is one tile; with all tokens its stages take 2.6 and 6.0 hours on 8 A100."""
    expected = {"llava-1.5": (336, 1, 576), "llava-next": (336, 5, 2880), "7b": (672, 5, 720)}
    for name, numbers in expected.items():
        values = model.preset(name)
        stage = plan.stages_of(values, values["model"])[-1]
        tokens = stage.cfg.visual_tokens("full", stage.tiles)
        assert (stage.cfg.vit.image_size, stage.tiles, tokens) == numbers
    flags = "--preset llava-1.5 --peak_tflops 312 --slow_share 1 --distill_weight 0 --pruner="
    plan.main(flags.split())
    lines = capsys.readouterr().out.splitlines()
    hours = {name: line.split()[-1] for line in lines for name in ("558k", "665k") if name in line}
    assert hours == {"558k": "2.6", "665k": "6.0"}
    plan.main("--preset tiny --slow_share 1".split())
    assert "samples 100% slow" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siglip2-qwen2.5-0.5b", "llava-1.5-vicuna"])
def test_the_table_of_gpus_is_what_the_plan_says(name):
    page = (model.HERE / "tools" / "README.md").read_text()
    assert all(f"\n{line}\n" in page for line in plan.card_rows(name))
