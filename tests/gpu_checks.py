"""What only a GPU can show, beside `pytest -m cuda`: that no step waits for the device, that the memory which
was traced is the memory that is taken, and how long a step takes, eager and compiled.

    python tests/gpu_checks.py PRESET ...    random weights, stage 2, adapters where the decoder is large
"""

import dataclasses
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model
import train_pretrain
import train_sft
from tools import plan

STEPS = 8
LARGE = 1e9  # weights of a decoder, above which its adapters train alone


def stage_of(name: str) -> plan.Stage:
    values = model.preset(name)
    stage = plan.stages_of(values, values["model"])[-1]
    size = stage.flags["batch_size"] or stage.flags["rows"]
    flags = {"micro_steps": size // 2 if stage.flags["batch_size"] else size}  # 2 samples, or a row
    with torch.device("meta"):
        large = sum(p.numel() for p in model.Decoder(stage.cfg.decoder).parameters()) > LARGE
    if large:
        flags |= {"train": "connector,lora", "lora.rank": 64, "frozen": "bfloat16"}
    return stage.changed(flags)


def batch_of(stage: plan.Stage) -> data.Batch:
    side, text = stage.cfg.vit.image_size, stage.text
    sizes = [(2 * side, 2 * side)] if stage.cfg.image.cut in data.CUT_BY_SIZE else None
    pixels = np.random.default_rng(0).integers(0, 256, (stage.tiles, 3, side, side), np.uint8)
    picture = data.Sample([0, ([5] * text, True)], pixels, sizes)
    n = stage.load(1).tiles // stage.tiles
    return data.make_batch([picture] * n, [stage.largest] * n, stage.cfg, stage.flags["row_length"], 10**6)


def measure(name: str, compiled: str, device: torch.device) -> str:
    stage = stage_of(name)
    flags, cuda = dataclasses.asdict(train_sft.SftConfig()), device.type == "cuda"
    flags = {key: stage.flags[key] for key in flags}
    flags |= {"compile": compiled, "dtype": "bfloat16", "muon_lr": 0.0}
    cfg = train_sft.SftConfig(**flags)
    with device:
        vlm = model.VLM(model.copy_config(stage.cfg))
    train_pretrain.freeze(vlm, cfg)
    run = train_pretrain.Run("sft", cfg, 0, 1, device)
    optimizers, net = train_pretrain.make_optimizers(vlm, cfg), train_pretrain.prepare(run, vlm)
    batch, seconds = batch_of(stage).to(device), []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for step in range(STEPS):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        began = time.perf_counter()
        stats = train_pretrain.optimizer_step(
            run, net, [batch], optimizers, step, train_sft.fast_slow_loss
        )  # fmt: skip
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")
    positions, targets = batch.student.ids.numel(), len(batch.student.targets)
    load = plan.Load(len(batch.pixels), positions, targets, targets)
    planned = plan.Peak(stage.cfg, {**stage.flags, **flags}, 1).at(load)["all"] / 1e9
    step, spread = statistics.median(seconds[3:]), f"{min(seconds[3:]):.3f}-{max(seconds[3:]):.3f}"
    shape = tuple(batch.student.ids.shape)
    times = f"step {step:.3f} s ({spread}), the first {seconds[0]:.1f} s, rows {shape}"
    memories = f"peak {peak:.1f} GB, planned {planned:.1f}"
    return f"{name}, compile {compiled}: {times}; {memories}; loss {float(stats['loss']):.3f}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(torch.cuda.get_device_name() if device.type == "cuda" else "no GPU: only whether this runs")
    for name in sys.argv[1:]:
        for compiled in ("false", "true") if device.type == "cuda" else ("false",):
            print(measure(name, compiled, device), flush=True)
            torch._dynamo.reset()
