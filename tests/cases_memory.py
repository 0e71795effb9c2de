"""Every preset fits its card: whole steps are traced, and the plan is compared with them.

On a CUDA that is not there, or where weights are sharded as one rank of a group that is not there either, on
a CPU whose attention is that of a GPU. test_train_cuda.py starts it in a process of its own.
"""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers_cuda import Memory, fake_vlm, pretend, trace_steps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import data
import model
import train_pretrain
import train_sft
from tools import plan

pretend()
warnings.simplefilter("ignore")
CPU = torch.device("cpu")
MEANT_FOR = {  # GPUs, GB of each
    **dict.fromkeys(("siglip2-qwen2.5-0.5b", "siglip2-qwen2.5-1.5b", "clip-smollm2-360m"), (1, 24)),
    **dict.fromkeys(("llava-1.5", "llava-1.5-vicuna", "llava-next", "cos-7b", "cos-8b"), (8, 80)),
    **dict.fromkeys(("1.2b", "3b", "7b"), (8, 80)),
    **{"30b": (16, 80), "3b-moe": (32, 80), "7b-moe": (64, 80)},
}


def stage_of(name: str, number: str) -> plan.Stage:
    values = model.preset(name)
    return {stage.name: stage for stage in plan.stages_of(values, values["model"])}[number]


def fullest_batch(stage: plan.Stage, gpus: int) -> data.Batch:
    """What plan.Stage.load says: pictures of the largest kind, and in packed rows text behind them."""
    cfg, flags, load, text = stage.cfg, stage.flags, stage.load(gpus), stage.text
    side = cfg.vit.image_size
    size = (2 * side, 2 * side) if cfg.image.cut in data.CUT_BY_SIZE else data.ANY_SIZE
    blank = np.zeros((stage.tiles, 3, side, side), np.uint8)
    picture = data.Sample([0, ([5] * text, True)], blank, [size])
    if flags["batch_size"]:
        samples = load.tiles // stage.tiles
        return data.make_batch(
            [picture] * samples, [stage.largest] * samples, cfg, flags["row_length"], 10**6
        )  # fmt: skip
    rows, samples, modes = [], [], []
    each = stage.in_a_row()
    for _ in range(load.positions // flags["row_length"]):
        rows.append([*range(len(samples), len(samples) + each + 1)])
        left = flags["row_length"] - each * (load.positions - load.supervised) * stage.tiles // load.tiles
        left -= each * text
        samples += [picture] * each + [data.Sample([([5] * max(1, left), True)], blank[:0], [])]
        modes += [stage.largest] * each + ["pruned"]
    return data.make_batch(samples, modes, cfg, flags["row_length"], 10**6, rows=rows)


def config_of(stage: plan.Stage) -> train_pretrain.RunConfig:
    kind = train_sft.SftConfig if stage.name == "2" else train_pretrain.PretrainConfig
    names = {field.name for field in dataclasses.fields(kind)}
    flags = {name: value for name, value in stage.flags.items() if name in names}
    return kind(**{**flags, "lr": 1e-4, "compile": "false", "dtype": "bfloat16"})


def loss_of(stage: plan.Stage):
    return train_sft.fast_slow_loss if stage.name == "2" else train_pretrain.caption_loss


def gpu_attention(q, k, v, mask=None):
    """`model.attend` with the bytes of CUDA's kernels."""
    dtype = v.dtype
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=mask is not None, enable_gqa=True
        )  # fmt: skip
    return out.to(dtype).transpose(-3, -2).flatten(-2)


def flash_attention(q, k, v, attn_mask=None, enable_gqa=False):
    """What CUDA's dispatcher takes for attention without a mask; a build for CPUs would store all pairs."""
    assert attn_mask is None
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def sharded_peak(stage: plan.Stage, batch: data.Batch, gpus: int, monkeypatch) -> int:
    """Bytes at the peak of the second step of rank 0."""
    flags = config_of(stage)
    ranks = flags.shard_ranks or gpus
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    monkeypatch.setattr(model, "attend", gpu_attention)
    run = train_pretrain.Run("any", dataclasses.replace(flags, shard_ranks=0), 0, ranks, CPU)
    mesh = train_pretrain.make_mesh(run)
    traced, resize = Memory(CPU), torch.UntypedStorage.resize_

    def resize_counted(storage, size):
        resize(storage, size)
        if storage._cdata in traced.bytes:
            traced.resize(storage._cdata, size)
        return storage

    monkeypatch.setattr(torch.UntypedStorage, "resize_", resize_counted)  # FSDP frees what it gathered so
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        vlm = fake_vlm(model.copy_config(stage.cfg), flags, CPU)
        train_pretrain.shard(run, vlm, mesh)
        optimizers, net = train_pretrain.make_optimizers(vlm, flags), train_pretrain.prepare(run, vlm)
        for x in [*vlm.parameters(), *vlm.buffers()]:
            traced.add(x)
        for step in range(2):
            traced.peak = 0
            with traced:
                micro = [batch.map(mode.from_tensor)]
                train_pretrain.optimizer_step(run, net, micro, optimizers, step, loss_of(stage))
                del micro
    dist.destroy_process_group()
    return traced.peak


@pytest.mark.parametrize("number", ["1", "2"])
@pytest.mark.parametrize("name", MEANT_FOR)
def test_a_preset_fits_its_card_and_the_plan_knows_it(name, number, monkeypatch):
    gpus, gb = MEANT_FOR[name]
    stage = stage_of(name, number)
    stage = stage.changed(stage.fitting(gpus, gb))
    load, batch = stage.load(gpus), fullest_batch(stage, gpus)
    assert batch.student.ids.numel() >= load.positions and len(batch.pixels) == load.tiles
    if stage.flags["shard"] == "none":
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash_attention)
        planned = plan.Peak(stage.cfg, stage.flags, 1).at(load)["all"]  # DDP's buckets are not traced
        traced = trace_steps(
            model.copy_config(stage.cfg), config_of(stage), [batch] * 2, "any", loss_of(stage)
        ).memory.peak  # fmt: skip
        buckets = stage.peak(gpus).at(load)["all"] - planned
    else:
        planned, buckets = stage.peak(gpus).at(load)["all"], 0
        traced = sharded_peak(stage, batch, gpus, monkeypatch)
    changes = {k: stage.flags[k] for k in ("train", "shard", "shard_ranks", "recompute", "micro_steps")}
    print(f"\n{name} {number}: planned {planned / 1e9:.1f}, traced {traced / 1e9:.1f} GB, {load}, {changes}")
    assert traced + buckets < gb * 1e9
    assert traced == pytest.approx(planned, rel=0.15)


def test_every_preset_has_a_card():
    assert MEANT_FOR.keys() == {name for name in model.preset_names() if not name.startswith("tiny")}
