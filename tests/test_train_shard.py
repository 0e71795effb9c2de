"""Sharded runs: 2 and 4 processes take the steps of one, stop, and go on in other numbers.

Weights after five AdamW steps equal those of one process to 1e-6, but for one in a thousand: where gradients
nearly cancel out, Adam makes their rounding as large as any other step. The biases of the encoder's keys are
left out for that: softmax does not see them.
"""

import dataclasses
import importlib
import shutil

import helpers
import pytest
import torch
from helpers import SMALL, on_ranks, small_batch, small_config
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import model
import train_pretrain
import train_sft
from tools import export

pytestmark = pytest.mark.slow
FAST, SLOW, FULL, TEXT = ("vqa", "pruned"), ("vqa", "slow"), ("caption", "full"), ("text", "full")
MIXES = {  # what the ranks hold in the steps' micro-batches
    "fast, slow": [[FAST, FAST], [SLOW, FAST]],
    "text, slow": [[TEXT, TEXT], [SLOW, TEXT]],
    "text, text": [[TEXT], [TEXT]],
    "text, fast": [[TEXT, TEXT], [FAST, FAST]],
    "slow text, fast": [[("text", "slow")], [FAST]],
    "slow, slow": [[SLOW], [SLOW]],
    "full, text": [[FULL, FULL], [TEXT, FULL]],
}
MANY = "fast, slow"  # the mix of all cases below
CASES = {  # flags of the run, and changes of the model
    "zero3": ({"shard": "zero3"}, {}),
    "encoder": ({"shard": "zero3", "train": "vit,connector,decoder"}, {}),
    "accumulation": ({"micro_steps": 2}, {}),
    "lora": ({"train": "connector,lora"}, {"lora": model.LoraConfig(4, 4.0)}),
    "connector": ({"train": "connector"}, {}),
    "recompute": ({"shard": "zero3", "recompute": "block"}, {}),
    "recomputed attention": ({"recompute": "attention"}, {}),
    "compile": ({"compile": "true"}, {}),
    "compile, whole": ({"compile": "true", "shard": "none"}, {}),
    "compile zero3": ({"shard": "zero3", "compile": "true"}, {}),
    "clip": ({"clip": 0.05}, {}),
}
NARROW = {  # matrices in bfloat16: other roundings than those of one process
    "bfloat16": ({"shard": "zero3", "dtype": "bfloat16"}, {}),
    "frozen in bfloat16": ({"dtype": "bfloat16", "frozen": "bfloat16", "train": "connector"}, {}),
    "lora in bfloat16": (
        {"dtype": "bfloat16", "frozen": "bfloat16", "train": "connector,lora"},
        {"lora": model.LoraConfig(4, 4.0)},
    ),
    "all in bfloat16": ({"dtype": "bfloat16", "frozen": "bfloat16", "pure_bf16": True}, {}),
}


EXPERTS = {  # their losses are means over the tokens of a rank: compared with ranks that hold all weights
    "experts": ({"shard": "zero3"}, {"experts": 4}),
    "experts, whole": ({"shard": "none"}, {"experts": 4}),
}


def small_model(experts: int = 0, **changes) -> model.ModelConfig:
    cfg = small_config(**changes)
    return dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, experts=experts, capacity=8.0))


def five_steps(rank: int, world: int, picks: list, flags: dict, changes: dict) -> tuple[dict, list[dict]]:
    """Whole weights and the logged numbers. picks: of each rank, what its micro-batches hold."""
    cfg = small_model(**changes)
    torch.manual_seed(0)
    vlm = helpers.enlarge(model.VLM(cfg))
    settings = {"warmup": 0.0, "lr": 1e-3, "vit_lr": 1e-3, "compile": "false", "dtype": "float32"}
    run_cfg = train_sft.SftConfig(**{**settings, "steps": 5, "shard": "zero2", **flags})
    run_cfg.shard = run_cfg.shard if world > 1 else "none"
    run = train_pretrain.Run("sft", run_cfg, rank, world, torch.device("cpu"))
    train_pretrain.freeze(vlm, run_cfg)
    if run_cfg.shard != "none":
        train_pretrain.shard(run, vlm, train_pretrain.make_mesh(run))
    optimizers = train_pretrain.make_optimizers(vlm, run_cfg)
    net, stats = train_pretrain.prepare(run, vlm), []
    everyone = [pick for held in picks for pick in held]
    teaches = any(mode == "slow" for _, mode in everyone)
    held = picks[rank] if world > 1 else everyone
    before = sum(len(held) for held in picks[:rank])
    for step in range(5):
        micro = []
        for n in range(run_cfg.micro_steps):
            start = (step * run_cfg.micro_steps + n) * len(everyone) + before
            micro.append(small_batch(held, cfg, start, teaches=teaches and world > 1))
        numbers = train_pretrain.optimizer_step(run, net, micro, optimizers, step, train_sft.fast_slow_loss)
        stats.append({name: float(value) for name, value in numbers.items()})
    weights = vlm.state_dict()
    for name in ("decoder.norm.weight", "decoder.layers.0.self_attn.q_proj.weight"):
        assert isinstance(weights[name], DTensor) == (run_cfg.shard != "none")
    return {name: whole(value).detach().clone() for name, value in weights.items()}, stats


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def all_cases(rank: int, world: int, cases: list) -> list:
    results = []
    for case in cases:
        with helpers.graphs():
            results.append(five_steps(rank, world, *case))
    return results


def assert_same(one: tuple, sharded: tuple, weight: float, number: float) -> None:
    for step, (expected, stats) in enumerate(zip(one[1], sharded[1])):
        for name, value in expected.items():
            assert stats[name] == pytest.approx(value, rel=number, abs=number), (step, name)
    names = [name for name in one[0] if not (name.startswith("vit.") and name.endswith("k_proj.bias"))]
    distances = torch.cat([(sharded[0][name] - one[0][name]).flatten().abs() for name in names])
    assert (distances > weight).float().mean() < 1e-3 and distances.max() < 20 * weight


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict:
    """All cases, in one pair of processes."""
    cases = {mix: (picks, {}, {}) for mix, picks in MIXES.items()}
    cases |= {name: (MIXES[MANY], *case) for name, case in {**CASES, **NARROW, **EXPERTS}.items()}
    results = on_ranks(2, all_cases, tmp_path_factory.mktemp("two"), 2, [*cases.values()])
    return {name: (case, [result[n] for result in results]) for n, (name, case) in enumerate(cases.items())}


@pytest.mark.parametrize("name", [*MIXES, *CASES])
def test_two_ranks_equal_one_process(name, two_ranks):
    case, (first, second) = two_ranks[name]
    assert_same(five_steps(0, 1, *case), first, 1e-6, 2e-5)
    assert all(torch.equal(first[0][key], second[0][key]) for key in first[0]) and first[1] == second[1]


@pytest.mark.parametrize("name", NARROW)
def test_bfloat16_equals_one_process_to_its_rounding(name, two_ranks):
    case, (first, _) = two_ranks[name]
    assert_same(five_steps(0, 1, *case), first, 0.006, 0.03)


def test_experts_equal_those_of_ranks_with_all_weights(two_ranks):
    assert_same(two_ranks["experts, whole"][1][0], two_ranks["experts"][1][0], 1e-6, 2e-5)


QUARTERS = [[FAST], [SLOW, FAST], [TEXT], [FULL]]


def test_four_ranks_equal_one_process(tmp_path):
    cases = [(QUARTERS, {**flags}, {}) for flags in ({"shard": "zero3"}, {"shard_ranks": 2})]
    one = five_steps(0, 1, *cases[0])
    for result in on_ranks(4, all_cases, tmp_path, 4, cases)[0]:
        assert_same(one, result, 1e-6, 2e-5)


# --- Whole runs: stop, and go on with fewer and with more ranks
RESUME = ["--resume", "auto"]


def train(rank: int, stage: str, argv: list[str], stop: int | None) -> bool:
    """A run of this rank to its end; with `stop` it dies before step `stop`."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            helpers.run_stage(importlib.import_module(stage), argv, stop, patch)
        except helpers.Killed:
            return False
    return True


def test_a_run_goes_on_with_fewer_and_with_more_ranks(tmp_path, small_halves):
    """Stage 1 in two sharded processes, cut at its fourth step; stage 2 starts from what it wrote."""
    common = [*SMALL, "--shard", "zero3", "--muon_lr", "0", "--warmup", "0", "--save_every", "2"]
    flags = [*common, *small_halves, "--steps", "4", "--out"]
    assert on_ranks(2, train, tmp_path / "w", "train_pretrain", [*flags, f"{tmp_path}/whole"], None) == [1, 1]
    assert on_ranks(2, train, tmp_path / "c", "train_pretrain", [*flags, f"{tmp_path}/cut"], 3) == [0, 0]
    step = model.find_step(tmp_path / "cut")
    assert step.name == "step-00000002" and len([*step.glob("shard-*.safetensors")]) == 2
    weights = model.VLM.from_pretrained(tmp_path / "whole").state_dict()
    for world in (1, 2, 4):
        out = tmp_path / f"on-{world}"
        shutil.copytree(tmp_path / "cut", out)
        on_ranks(world, train, tmp_path / f"r{world}", "train_pretrain", [*flags, str(out), *RESUME], None)
        losses = helpers.losses_of(out)
        assert losses == pytest.approx(helpers.losses_of(tmp_path / "whole"), rel=1e-5)
        for name, value in model.VLM.from_pretrained(out).state_dict().items():
            limit = 0 if world == 2 else 2e-6
            torch.testing.assert_close(value, weights[name], rtol=0, atol=limit, msg=lambda m: f"{name}: {m}")
    export.main([f"{tmp_path}/whole", f"{tmp_path}/merged", "--whole"])
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == weights.keys() and all(
        torch.equal(merged[name], weights[name]) for name in merged
    )
    assert (tmp_path / "merged" / "tokenizer").is_dir() and model.VLM.from_pretrained(tmp_path / "merged")
    packed = "--batch_size 0 --rows 4 --workers 1 --slow_share 0.5 --steps 2".split()
    later = [*common, *packed, "--init", f"{tmp_path}/on-4", "--out"]
    assert on_ranks(2, train, tmp_path / "s", "train_sft", [*later, f"{tmp_path}/two"], None) == [1, 1]
    train_sft.main([*later, f"{tmp_path}/one"])
    assert helpers.losses_of(tmp_path / "two") == pytest.approx(helpers.losses_of(tmp_path / "one"), rel=1e-5)


def test_nothing_is_left_of_a_checkpoint_that_was_cut(tmp_path, small_halves):
    """`latest` names a checkpoint only when all ranks have written it."""
    flags = [*SMALL, *small_halves, "--shard", "zero2", "--muon_lr", "0", "--steps", "2", "--save_every", "1"]
    with pytest.raises(Exception, match="the disk is full"):
        on_ranks(2, train_on_a_full_disk, tmp_path / "r", [*flags, "--out", f"{tmp_path}/a"])
    assert model.find_step(tmp_path / "a").name == "step-00000001"
    assert not (tmp_path / "a" / "step-00000002").exists()


def train_on_a_full_disk(rank: int, argv: list[str]) -> None:
    """The second rank cannot write its second checkpoint."""
    real, calls = train_pretrain.dcp.save, []

    def save(tensors, storage_writer):
        calls.append(tensors)
        if rank == 1 and len(calls) == 4:  # weights and moments of the first, weights of the second, these
            raise OSError("the disk is full")
        return real(tensors, storage_writer=storage_writer)

    train_pretrain.dcp.save = save
    train_pretrain.main(argv)


@pytest.mark.parametrize("flags, world, fix", [
    ({"shard": "zero2", "muon_lr": 0.01}, 2, "--shard zero2: Muon needs whole matrices"),
    ({"shard": "zero3", "shard_ranks": 3}, 4, "--shard_ranks 3 does not divide the 4 ranks"),
])  # fmt: skip
def test_what_cannot_be_sharded_is_refused_in_a_sentence(flags, world, fix):
    cfg = train_pretrain.RunConfig(**flags)
    with pytest.raises(model.UserError, match=fix):
        train_pretrain.resolve_device(cfg, torch.device("cpu"), world)


def test_one_process_shards_nothing_and_its_run_may_be_sharded_later():
    cfg = train_pretrain.RunConfig(shard="zero3", muon_lr=0.01)
    train_pretrain.resolve_device(cfg, torch.device("cpu"), 1)
    run = train_pretrain.Run("sft", cfg, 0, 1, torch.device("cpu"))
    assert not run.sharded and cfg.shard == "zero3" and dataclasses.replace(run, world=2).sharded


def test_a_shard_that_is_missing_is_named(tmp_path, small_halves):
    flags = [*SMALL, *small_halves, "--shard", "zero2", "--muon_lr", "0", "--steps", "1"]
    on_ranks(2, train, tmp_path / "r", "train_pretrain", [*flags, "--out", f"{tmp_path}/a"], None)
    shards = sorted(model.find_step(tmp_path / "a").glob("shard-*.safetensors"))
    for file in shards:
        hidden = file.rename(tmp_path / file.name)
        with pytest.raises(model.UserError, match=r"tensor '.*' is (missing|\()"):
            model.VLM.from_pretrained(tmp_path / "a")
        hidden.rename(file)
    assert model.VLM.from_pretrained(tmp_path / "a")
