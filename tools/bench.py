"""The speed table: what fewer visual tokens are worth in time. `make bench` writes runs/bench.json.

    python tools/bench.py                         everything, about ten minutes on two cores
    python tools/bench.py --only cos.stage1.time --rounds 3 --out runs/quick.json

Every row is a ratio of real steps (train_pretrain.optimizer_step on one micro-batch made by data.make_batch:
forward, backward, clipping, fused AdamW) that alternate in one process: A B C, A B C, ... after a round of
warm-up, so that a busy machine slows both sides of a ratio. Weights are random and batches lie in memory.

    value       median over the rounds of the ratio within a round
    spread      its quartiles
    floor       the same ratio in counted FLOPs (plan.sample_cost: no padding, no optimizer, no launches)
    efficiency  floor / value, of a speedup value / floor: the share of the possible that is reached; above 1
                the other side has less
    at_7b       the floor with CLIP-L and a 7B decoder (preset cos-7b, of dualspeed llava-1.5-vicuna) /
                efficiency, of a speedup * efficiency, at most that floor: only this may stand beside
                "published"

One geometry for all rows (GEOMETRY below), small enough for a CPU. Its encoder has the share of the FLOPs
that CLIP-L has beside a 7B decoder: 9 % at 32 tokens and 1.4 % at 336 (there 9 and 1.5). Its connector has
21 % (there 1): as wide as this decoder, and all of it trains. Captions have 23 tokens each.

Rows of dualspeed: the same decoder, all of which trains, and encoder, on 24 x 24 patches behind LLaVA's
connector: 576 tokens a tile, or 58 and the isolator's 4. llava15 is one tile, next five; 100, 200 or 300
tokens of text, of which the last 40 % are supervised. Encoder's share of a fast step at 200: 5 and 11 %
(there 3 and 8). coarse is Chain-of-Sight's connector, on 16 x 16 patches: 336 tokens, or its first two scales
with 80 and 4. Speedups are composed of separately timed steps, nine fast to one slow; "mixed" times a packed
micro-batch of ten. Attention, fp32 on a CPU, is slower for its FLOPs than all else, and full steps have most
of it: an efficiency above 1 is that and no merit.

Rows that end in _per_s are no ratios. Of reading floor and efficiency are those of Pillow's decoding alone,
of planner those of the demo's stage 1, which one process has to feed, and 10,000 of a node. Rows of mfu are
FLOPs counted in a step of the demo's recipe, optimizer left out, over what the machine reaches in products of
the demo's own shapes: 4096 x 128 by 128 x 128. Rows of reference_style are the step that small trainers take
(one sample a row, padded to the longest, a head at all positions; in stage 2 one mode a batch, the encoder
run again for the teacher, a pruning loop over pictures) against ours on the same samples. Rows of growth are
exponents: 1 where twice as much takes twice as long, their floor that of the counted FLOPs.
"""

import dataclasses
import functools
import itertools
import json
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import eval as scoring
import model
import prune
import train_pretrain
import train_sft
from tools import plan

GEOMETRY = model.ModelConfig(
    vit=model.ViTConfig(128, 8, width=128, layers=6, heads=4, mlp_width=512),  # 16 x 16 patches
    connector=model.ConnectorConfig(levels=[4, 6], width=512, heads=8),
    decoder=model.DecoderConfig(4096, 512, 8, heads=8, kv_heads=8, head_dim=64, mlp_width=1408),
    lora=model.LoraConfig(16, 16.0),
)
SAMPLES = 8  # of a step where batches are equal
TEXT = 23  # tokens of every caption, all of them supervised: the mean of Chain-of-Sight's data


@dataclass
class BenchConfig:
    rounds: int = 3  # timed rounds, after one of warm-up
    only: str = ""  # measure only rows whose name starts so
    out: str = "runs/bench.json"  # the file to write

    def wants(self, name: str) -> bool:
        return name.startswith(self.only)


class Trainer:
    """A model with its optimizers and a synthetic batch of captions; `step` also takes other batches."""

    def __init__(self, cfg: model.ModelConfig, recipe: dict, samples=0, config=train_pretrain.RunConfig):
        torch.manual_seed(0)
        self.flags, self.loss = flags_of(recipe, config), train_pretrain.caption_loss
        self.run = train_pretrain.Run("pretrain", self.flags, 0, 1, torch.device("cpu"))
        self.vlm = model.VLM.build(model.copy_config(cfg))
        train_pretrain.freeze(self.vlm, self.flags)
        self.optimizers = train_pretrain.make_optimizers(self.vlm, self.flags)
        train_pretrain.prepare(self.run, self.vlm)
        self.batch = captions(self.vlm.cfg, samples, self.flags.row_length) if samples else None

    def step(self, batch: data.Batch | None = None) -> None:
        micro = [batch or self.batch]
        train_pretrain.optimizer_step(self.run, self.vlm, micro, self.optimizers, 0, self.loss)

    def connector_alone(self) -> Callable[[], None]:
        """Forward and backward of the connector in this step, the encoder's output given."""
        connector = self.vlm.connector
        with torch.no_grad(), self.run.autocast():
            levels = self.vlm.levels(self.vlm.states(self.batch.pixels))
            tokens = connector(levels)

        def run() -> None:
            with self.run.autocast():
                out = connector(levels)
            out.backward(tokens)
            connector.zero_grad(set_to_none=True)

        return run


def flags_of(recipe: dict, config=train_pretrain.RunConfig) -> train_pretrain.RunConfig:
    """A stage's flags as a run on this CPU resolves them."""
    flags = config(**recipe)
    train_pretrain.resolve_device(flags, torch.device("cpu"), 1)
    return flags


def draw(cfg: model.ModelConfig, lengths: list[int], pictures: int = 1, answer: float = 1.0) -> list[tuple]:
    """Samples of so many tokens behind pictures of noise; the last share `answer` of them is supervised."""
    rng, size, samples = np.random.default_rng(0), cfg.vit.image_size, []
    for length in lengths:
        text = rng.integers(1, cfg.decoder.vocab_size, length).tolist()
        question = length - round(answer * length)
        pieces = [*range(pictures), (text[:question], False), (text[question:], True)]
        samples.append((pieces, rng.integers(0, 256, (pictures, 3, size, size), dtype=np.uint8)))
    return samples


def captions(cfg: model.ModelConfig, samples: int, row_length: int) -> data.Batch:
    return data.make_batch(draw(cfg, [TEXT] * samples), ["full"] * samples, cfg, row_length, limit=4096)


def alternate(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Name -> seconds of its step in each round, after one round of warm-up."""
    seconds = {name: [] for name in steps}
    for n in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if n:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def make_row(name: str, ratios: list[float], floor: float, at_7b=None, published=None, note="") -> dict:
    """A row of bench.json from the ratios of all rounds; at_7b: the floor there."""
    value, speedup = statistics.median(ratios), name.endswith("speedup")
    quartiles = np.quantile(ratios, [0.25, 0.75]).round(4).tolist()
    efficiency = value / floor if speedup else floor / value
    reached = min(1.0, efficiency)
    there = at_7b and (at_7b * reached if speedup else at_7b / reached)
    row = {"name": name, "value": value, "spread": quartiles, "floor": floor}
    row |= {"efficiency": efficiency, "at_7b": there, "published": published}
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} | {"note": note}


# ---------------------------------------------------------------------------------------------------------
# Rows. A function takes the flags and returns its rows; MEASURES below lists them all.

# Chain-of-Sight's stage 1: name -> what the connector is, and the paper's time a sample, 336 tokens = 1
STAGE1 = {
    "336": ({"kind": "chain", "plan": "336"}, 1.0),
    "32": ({"kind": "chain", "plan": "32"}, 0.27),
    "48": ({"kind": "chain", "plan": "48"}, 0.35),
    "80": ({"kind": "chain", "plan": "80"}, 0.42),
    "linear256": ({"kind": "linear"}, 0.82),
    "resampler336": ({"kind": "resampler", "tokens": 336}, 1.0),
}


def stage1_config(cfg: model.ModelConfig, name: str) -> model.ModelConfig:
    """`cfg` with the connector of a row of STAGE1."""
    cfg = model.copy_config(cfg)
    cfg.connector = dataclasses.replace(cfg.connector, **STAGE1[name][0])
    return cfg.check()


def stage1_flops(cfg: model.ModelConfig, name: str) -> dict[str, float]:
    """FLOPs by part of one sample: connector and adapters train, as in the paper's stage 1."""
    train = model.trainable_parts(model.preset("cos-7b")["pretrain"]["train"])
    return plan.sample_cost(stage1_config(cfg, name), train, TEXT, "full", 1)


def stage1_floor(cfg: model.ModelConfig, name: str) -> float:
    return sum(stage1_flops(cfg, name).values()) / sum(stage1_flops(cfg, "336").values())


def shares(flops: dict[str, float]) -> dict[str, float]:
    return {part: round(value / sum(flops.values()), 4) for part, value in flops.items()}


def stage1(bench: BenchConfig) -> list[dict]:
    """Time a sample as a share of the 336-token step: at equal samples, and at equal positions."""
    names = [f"time.{name}" for name in STAGE1] + [f"budget.{name}" for name in STAGE1 if "336" not in name]
    keys = [name for name in names if name != "time.336" and bench.wants(f"cos.stage1.{name}")]
    if not keys:
        return []
    recipe, seven = model.preset("cos-7b")["pretrain"], model.preset("cos-7b")["model"]
    base = Trainer(stage1_config(GEOMETRY, "336"), recipe, SAMPLES)
    trainers, positions = {"336": base}, base.batch.student.ids.numel()
    for key in keys:
        kind, name = key.split(".")
        cfg, samples = stage1_config(GEOMETRY, name), SAMPLES
        if kind == "budget":
            samples = positions // (cfg.visual_tokens() + TEXT)
            while captions(cfg, samples, base.flags.row_length).student.ids.numel() > positions:
                samples -= 1
        trainers[key] = Trainer(cfg, recipe, samples)
    seconds = alternate({key: trainer.step for key, trainer in trainers.items()}, bench.rounds)
    rows = []
    for key in keys:
        name, batch = key.split(".")[1], trainers[key].batch
        ratios = [a / b * SAMPLES / batch.samples for a, b in zip(seconds[key], seconds["336"])]
        floors = stage1_floor(GEOMETRY, name), stage1_floor(seven, name)
        shape, ms = " x ".join(map(str, batch.student.ids.shape)), statistics.median(seconds[key]) * 1e3
        note = f"{batch.samples} samples, {shape} positions, {ms:.0f} ms"
        rows.append(make_row(f"cos.stage1.{key}", ratios, *floors, STAGE1[name][1], note))
    return rows


def connector_share(bench: BenchConfig) -> list[dict]:
    """Chain-of-Sight's connector in a stage-1 step: measured in the demo's model, counted in the paper's."""
    rows = []
    if bench.wants("connector.share.tiny"):
        recipe = model.preset("tiny")["pretrain"]
        trainer = Trainer(model.preset("tiny")["model"], recipe, 32)
        seconds = alternate({"alone": trainer.connector_alone(), "step": trainer.step}, 5 * bench.rounds)
        ratios = [a / b for a, b in zip(seconds["alone"], seconds["step"])]
        train = model.trainable_parts(recipe["train"])
        floor = shares(plan.sample_cost(trainer.vlm.cfg, train, TEXT, "full", 1))["connector"]
        note = "forward and backward in the whole step; floor: its share of the FLOPs; aim: at most 0.25"
        rows.append(make_row("connector.share.tiny", ratios, floor, note=note))
    if bench.wants("connector.share.7b"):
        share = shares(stage1_flops(model.preset("cos-7b")["model"], "32"))["connector"]
        row = make_row("connector.share.7b", [share], share, note="FLOPs at 32 tokens; aim: below 0.05")
        rows.append({**row, "spread": None, "efficiency": None})  # counted, not measured
    return rows


def packing(bench: BenchConfig) -> list[dict]:
    """Samples one a row, padded to the longest of the batch, against the same packed into rows of 512."""
    if not bench.wants("packing.speedup"):
        return []
    cfg, recipe = stage1_config(GEOMETRY, "32"), model.preset("cos-7b")["pretrain"]
    V, n = cfg.visual_tokens(), 2 * SAMPLES
    lengths = np.exp(np.random.default_rng(0).normal(np.log(60), 0.8, n)).clip(8, 512 - V).astype(int)
    samples, taken = draw(cfg, lengths.tolist()), (lengths + V).tolist()
    layouts = {"padded": (max(taken), [[i] for i in range(n)]), "packed": (512, data.best_fit(taken, 512))}
    trainers, flops, fill = {}, {}, {}
    for name, (T, rows) in layouts.items():
        trainers[name] = trainer = Trainer(cfg, recipe)
        trainer.batch = data.make_batch(samples, ["full"] * n, cfg, T, 4096, rows=rows)
        parts = plan.sample_cost(cfg, model.trainable_parts(recipe["train"]), T - V, "full", 1)
        flops[name] = n * (parts["vit"] + parts["connector"]) + len(rows) * parts["decoder"]
        fill[name] = sum(taken) / (len(rows) * T)
    seconds = alternate({name: trainer.step for name, trainer in trainers.items()}, bench.rounds)
    ratios = [a / b for a, b in zip(seconds["padded"], seconds["packed"])]
    shapes = [f"{name} {len(rows)} x {T}, {fill[name]:.0%} full" for name, (T, rows) in layouts.items()]
    note = f"{n} samples of {V} visual and about 60 tokens: {', '.join(shapes)}"
    return [make_row("packing.speedup", ratios, flops["padded"] / flops["packed"], note=note)]


# DualSpeed's stage 2 (connector and decoder train): name -> tiles a sample, samples a step, paper's speedup
DUAL = {"llava15": (1, 4, 2.1), "next": (5, 1, 4.0), "coarse": (1, 4, None)}
DUAL_SIDE = 24  # patches
DUAL_TEXT = 200, 100, 300  # tokens of text; the first where a name has none. The paper gives no lengths
ANSWER = 0.4  # the share of them that is supervised
DUAL_ROUNDS = 5  # at most: a full step of 3080 positions takes seconds


def dual_config(cfg: model.ModelConfig, name: str) -> model.ModelConfig:
    """`cfg` with LLaVA's connector on 24 x 24 patches: 576 tokens a tile, pruned to 58 behind 4 isolators."""
    if name == "coarse":
        cfg = dataclasses.replace(stage1_config(cfg, "336"), lora=model.LoraConfig(0))
        return dataclasses.replace(cfg, prune=model.PruneConfig("coarse", 80, 4)).check()
    vit = dataclasses.replace(cfg.vit, image_size=DUAL_SIDE * cfg.vit.patch_size)
    connector = dataclasses.replace(cfg.connector, kind="mlp", levels=[cfg.vit.layers])
    changed = {"vit": vit, "connector": connector, "lora": model.LoraConfig(0)}
    return dataclasses.replace(cfg, **changed, prune=model.PruneConfig("divprune", 0.1, 4)).check()


def dual_parts(cfg: model.ModelConfig, text: int, mode: str, tiles: int) -> dict[str, float]:
    """FLOPs by part of a sample: sample_cost, whose head sees all text, with a head that sees the answers."""
    parts = plan.sample_cost(cfg, ["connector", "decoder"], text, mode, tiles)
    unseen = (1 - ANSWER) * parts["head"]
    if mode == "slow":
        parts["teacher"] -= unseen / 3  # a forward pass
    return {**parts, "head": parts["head"] - unseen}


def dual_flops(cfg: model.ModelConfig, step: tuple, tiles: int) -> float:
    modes, text = step
    return sum(modes.count(mode) * sum(dual_parts(cfg, text, mode, tiles).values()) for mode in {*modes})


def dual_batch(cfg: model.ModelConfig, step: tuple, tiles: int) -> data.Batch:
    """A sample a row; where modes mix, packed: rows of the width up to 1024 that leaves least padding."""
    modes, text = step
    samples = draw(cfg, [text] * len(modes), tiles, ANSWER)
    return data.make_batch(samples, modes, cfg, 1024 if len({*modes}) > 1 else 1, limit=4096)


def one_in_ten(full: float, fast: float, slow: float) -> float:
    return full / (0.9 * fast + 0.1 * slow)


def one_in_twenty(full: float, fast: float, slow: float) -> float:
    return full / (0.95 * fast + 0.05 * slow)


def dual_rows(name: str) -> dict[str, tuple]:
    """Row -> its steps, each (mode of every sample, tokens of text), their ratio, what is published."""
    _, n, published = DUAL[name]
    counts = {text: n * max(1, DUAL_TEXT[0] // text) for text in DUAL_TEXT}  # twice as many of the shortest
    steps = [[((mode,) * counts[t], t) for mode in ("full", "pruned", "slow")] for t in DUAL_TEXT]
    full, fast, slow = steps[0]
    rows = {"fast.t200": ([full, fast], lambda full, fast: fast / full, None)}
    rows |= {"slow.t200": ([full, slow], lambda full, slow: slow / full, None)}
    rows |= {"speedup": (steps[0], one_in_ten, published), "r05.speedup": (steps[0], one_in_twenty, None)}
    rows |= {f"t{three[0][1]}.speedup": (three, one_in_ten, None) for three in steps[1:]}
    if name == "llava15":  # ours, --mode sample: both in one micro-batch
        ten = [(("full",) * 10, full[1]), (("slow", *["pruned"] * 9), full[1])]
        rows |= {"mixed.speedup": (ten, lambda full, mixed: full / mixed, None)}
    return {f"dualspeed.{name}.{key}": row for key, row in rows.items()}


def dualspeed(bench: BenchConfig) -> list[dict]:
    """Fast and slow steps as a share of the full one, and what nine fast in ten are worth."""
    rows, seven = [], model.preset("llava-1.5-vicuna")
    for name, (tiles, n, _) in DUAL.items():
        cfg, at_7b = dual_config(GEOMETRY, name), seven["model"]
        if name == "coarse":
            at_7b = dual_config(model.preset("cos-7b")["model"], name)
        measured = {key: row for key, row in dual_rows(name).items() if bench.wants(key)}
        fast, share = (("pruned",) * n, DUAL_TEXT[0]), f"dualspeed.select.share.{name}"
        measure_share = name != "coarse" and bench.wants(share)  # there is nothing to select
        all_steps = {fast: None} if measure_share else {}
        for steps, _, _ in measured.values():
            all_steps |= dict.fromkeys(steps)
        if not all_steps:
            continue
        trainer = Trainer(cfg, seven["sft"], config=train_sft.SftConfig)
        flags, batches = trainer.flags, {step: dual_batch(cfg, step, tiles) for step in all_steps}
        weights = {"temperature": flags.temperature, "weight": flags.distill_weight}
        trainer.loss = functools.partial(train_sft.fast_slow_loss, **weights)
        runs = {step: functools.partial(trainer.step, batch) for step, batch in batches.items()}
        if measure_share:
            with torch.no_grad(), trainer.run.autocast():
                tokens = trainer.vlm.connector(
                    trainer.vlm.levels(trainer.vlm.states(batches[fast].pixels))
                )  # (n * tiles, 576, D)
            runs[share] = functools.partial(prune.select, cfg.prune.name, tokens, cfg.kept_tokens())
        seconds = alternate(runs, min(bench.rounds, DUAL_ROUNDS))
        flops = [{step: dual_flops(c, step, tiles) for step in all_steps} for c in (cfg, at_7b)]
        for key, (steps, ratio, published) in measured.items():
            ratios = [ratio(*times) for times in zip(*(seconds[step] for step in steps))]
            floors = [ratio(*(counted[step] for step in steps)) for counted in flops]
            notes = []
            for step in steps:
                B, T = batches[step].student.ids.shape
                notes.append(f"{B} x {T}, {1e3 * statistics.median(seconds[step]):.0f} ms")
            rows.append(make_row(key, ratios, *floors, published, "; ".join(notes)))
        if measure_share:
            ratios = [a / b for a, b in zip(seconds[share], seconds[fast])]
            distances = 2 * len(tokens) * tokens.shape[1] ** 2 * tokens.shape[2]
            note = f"divprune of {len(tokens)} tiles; floor: FLOPs of their distances alone; aim: below 0.02"
            row = make_row(share, ratios, distances / flops[0][fast], note=note)
            rows.append({**row, "efficiency": None})  # choosing, one token after another, counts no FLOPs
    return rows


def reading(bench: BenchConfig) -> list[dict]:
    """Pictures that one core reads a second: from a JPEG file to the encoder's uint8 of 336 px."""
    cfg, rows = model.copy_config(GEOMETRY), []
    cfg.vit.image_size = 336
    for width, height in ((336, 336), (640, 480)):
        name = f"reading.{width}x{height}.images_per_s"
        if not bench.wants(name):
            continue
        noise = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "a.jpg")  # as smooth, and about as many bytes, as a photo
            Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, quality=90)
            size, times = file.stat().st_size, 50
            ways = {
                "read": lambda: [data.load_images([file], cfg) for _ in range(times)],
                "decode": lambda: [Image.open(file).load() for _ in range(times)],
            }
            seconds = alternate(ways, bench.rounds)
        ratios = [times / took for took in seconds["read"]]
        floor = statistics.median(times / took for took in seconds["decode"])
        row = make_row(name, ratios, floor, note=f"JPEG of {size:,} bytes; floor: Pillow's decoding alone")
        rows.append({**row, "efficiency": round(row["value"] / floor, 4)})
    return rows


# How much of the machine a step of the demo uses, and what each saving in a step is worth.

REFERENCE_LENGTHS = np.exp(np.random.default_rng(0).normal(np.log(60), 0.8, 32)).clip(8, 400).astype(int)


def demo_trainer(stage: str, dtype: str = "float32", **flags) -> tuple[Trainer, plan.ModelConfig]:
    """A step of the demo's recipe: packed rows of Scenes as its loader gives them."""
    preset, config = model.preset("tiny"), train_sft.SftConfig if stage == "sft" else train_pretrain.RunConfig
    recipe = {**preset[stage], "dtype": dtype, "compile": "false", **flags}
    trainer = Trainer(preset["model"], recipe, config=config)
    if stage == "sft":
        model.scale_up(trainer.vlm, preset["scale"], "inflate")
        train_pretrain.freeze(trainer.vlm, trainer.flags)
        trainer.optimizers = train_pretrain.make_optimizers(trainer.vlm, trainer.flags)
        trainer.loss = train_sft.fast_slow_loss
    return trainer


def demo_batches(trainer: Trainer, stage: str, steps: int) -> list[data.Batch]:
    cfg = trainer.vlm.cfg
    mode = (lambda number: prune.draw_mode(0, number, 0.1)) if stage == "sft" else (lambda number: "full")
    sources = data.open_sources("scenes", stage)
    rows = data.Plan(
        sources, data.find_tokenizer(cfg), cfg, trainer.flags, mode, range(steps), by_kind=stage != "sft"
    )
    return [data.Stream(rows)[planned] for planned in rows.micro_batches()]


def counted_flops(trainer: Trainer, batch: data.Batch) -> float:
    """FLOPs of that step by part: all that is no padding, forward and backward, without the optimizer."""
    cfg, train = trainer.vlm.cfg, model.trainable_parts(trainer.flags.train)
    with torch.device("meta"):
        vit, patches = plan.encoder_cost(cfg, "vit" in train, 1)
        connector = plan.connector_cost(cfg, "connector" in train, "full", patches)
    flops = len(batch.pixels) * (vit + connector)
    for rows, passes in ((batch.student, 3), (batch.teacher, 1)):
        if rows is not None:
            lengths = torch.bincount(rows.doc_ids[rows.doc_ids >= 0]).tolist()
            flops += passes * sum(decoder_forward(cfg.decoder, length) for length in lengths)
            flops += passes * 2 * len(rows.targets) * cfg.decoder.width * cfg.decoder.vocab_size
    return flops


def decoder_forward(d: model.DecoderConfig, length: int) -> float:
    """FLOPs of the blocks on a document: matrices, and causal attention's half of length^2 pairs."""
    queries, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
    weights = d.width * (2 * queries + 2 * keys + 3 * d.mlp_width)
    return d.layers * (2 * length * weights + 2 * length**2 * queries)


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the products that the demo's decoder consists of, the best of many."""
    x, w = torch.ones(4096, 128, dtype=dtype), torch.ones(128, 128, dtype=dtype)
    seconds = min(timeit.repeat(lambda: x @ w, number=20, repeat=20)) / 20
    return 2 * 4096 * 128 * 128 / seconds


def mfu(bench: BenchConfig) -> list[dict]:
    """Counted FLOPs of the demo's steps a second, over the machine's own rate of matrix products."""
    rows, fast = [], str(model.fast_dtype(torch.device("cpu"))).removeprefix("torch.")
    for stage, dtype in itertools.product(("pretrain", "sft"), dict.fromkeys(("float32", fast))):
        name = f"mfu.of_own_matmul.{stage}.{dtype}"
        if not bench.wants(name):
            continue
        trainer = demo_trainer(stage, dtype)
        batches = itertools.cycle(demo_batches(trainer, stage, 4))
        ratios = []
        for n in range(bench.rounds + 1):
            batch, began = next(batches), time.perf_counter()
            trainer.step(batch)
            seconds = time.perf_counter() - began
            rate = counted_flops(trainer, batch) / seconds
            ratios += [rate / matmul_rate(getattr(torch, dtype))] if n else []
        note = f"last step {seconds * 1e3:.0f} ms, {rate / 1e9:.0f} GFLOP/s; aim: 0.60"
        row = make_row(name, ratios, 1.0, note=note)
        rows.append({**row, "efficiency": row["value"]})
    return rows


def everywhere(batch: data.Batch) -> data.Batch:
    """The same batch with a head at every position, as cross entropy with ignored targets takes it."""

    def spread(rows: data.Rows) -> data.Rows:
        targets = torch.full((rows.ids.numel(),), -100)
        targets[rows.supervised] = rows.targets
        return dataclasses.replace(rows, supervised=torch.arange(len(targets)), targets=targets)

    teacher = batch.teacher and spread(batch.teacher)
    return dataclasses.replace(batch, student=spread(batch.student), teacher=teacher)


def reference_stage1(bench: BenchConfig) -> list[dict]:
    """Padded to the longest with logits everywhere, against packed rows with logits at labels alone."""
    name = "reference_style.stage1.speedup"
    if not bench.wants(name):
        return []
    cfg, n = stage1_config(GEOMETRY, "32"), len(REFERENCE_LENGTHS)
    cfg.lora, recipe = model.LoraConfig(0), {"train": "connector,decoder", "dtype": "float32"}
    samples = draw(cfg, REFERENCE_LENGTHS.tolist())
    ours, reference = Trainer(cfg, recipe), Trainer(cfg, recipe)
    ours.batch = data.make_batch(samples, ["full"] * n, cfg, 512, 4096)
    alone = [[i] for i in range(n)]
    longest = int(REFERENCE_LENGTHS.max()) + cfg.visual_tokens()
    reference.batch = everywhere(data.make_batch(samples, ["full"] * n, cfg, longest, 4096, rows=alone))
    seconds = alternate({"reference": reference.step, "ours": ours.step}, min(bench.rounds, 5))
    ratios = [a / b for a, b in zip(seconds["reference"], seconds["ours"])]
    note = f"{n} samples in {[*reference.batch.student.ids.shape]} against {[*ours.batch.student.ids.shape]}"
    return [make_row(name, ratios, 2.0, note=f"{note}; the floor is the aim")]


PRUNE_ALL = prune.reduce


def prune_one_by_one(name: str, features: torch.Tensor, keep: int, **needs) -> torch.Tensor:
    return torch.cat([PRUNE_ALL(name, picture[None], keep, **needs) for picture in features])


class ReferenceVLM(model.VLM):
    """Student and teacher each run encoder and connector; every picture is pruned by itself."""

    def bank(self, batch: data.Batch) -> torch.Tensor:
        with mock.patch.object(prune, "reduce", prune_one_by_one):
            return super().bank(batch)

    def forward(self, batch: data.Batch) -> tuple:
        logits, _ = self.logits(batch.student, self.splice(batch.student, self.bank(batch)))
        if batch.teacher is None:
            return logits, None, None
        with torch.no_grad():
            teacher, _ = self.logits(batch.teacher, self.splice(batch.teacher, self.bank(batch)))
        return logits, teacher, None


def reference_loss(logits, teacher, batch: data.Batch) -> dict:
    """Over all positions, of which those without a target are masked, as are those of the distillation."""
    ce = torch.nn.functional.cross_entropy(logits, batch.student.targets, reduction="sum")
    if teacher is None:
        return {"loss": ce}
    student = logits[batch.student.targets >= 0][batch.distill]
    return {"loss": ce + prune.distillation_sum(student, teacher[batch.teacher.targets >= 0], 1.0)}


def reference_stage2(bench: BenchConfig) -> list[dict]:
    """Ten samples, nine fast: one mode a batch, padded and with all detours, against ours in packed rows."""
    name = "reference_style.stage2.speedup"
    if not bench.wants(name):
        return []
    cfg, recipe = dual_config(GEOMETRY, "llava15"), {"train": "connector,decoder", "dtype": "float32"}
    samples = draw(cfg, (2 * REFERENCE_LENGTHS[:10]).tolist(), 1, ANSWER)
    trainer = Trainer(cfg, recipe, config=train_sft.SftConfig)
    reference = Trainer(cfg, recipe, config=train_sft.SftConfig)
    trainer.loss, reference.loss = train_sft.fast_slow_loss, reference_loss
    reference.vlm.__class__ = ReferenceVLM
    ours = data.make_batch(samples, ["slow", *["pruned"] * 9], cfg, 1024, 4096)
    alone, one_mode = [[i] for i in range(10)], {}
    for mode, view in (("pruned", "pruned"), ("slow", "full")):
        width = 2 * int(REFERENCE_LENGTHS[:10].max()) + cfg.visual_tokens(view)
        padded = data.make_batch(samples, [mode] * 10, cfg, width, 4096, rows=alone)
        one_mode[mode] = everywhere(padded)

    steps = {mode: functools.partial(reference.step, batch) for mode, batch in one_mode.items()}
    seconds = alternate({**steps, "ours": functools.partial(trainer.step, ours)}, min(bench.rounds, 5))
    ratios = []
    for fast, slow, mixed in zip(seconds["pruned"], seconds["slow"], seconds["ours"]):
        ratios.append((0.9 * fast + 0.1 * slow) / mixed)
    note = f"fast {[*one_mode['pruned'].student.ids.shape]}, slow {[*one_mode['slow'].student.ids.shape]}"
    note += f" against {[*ours.student.ids.shape]}; the floor is the aim"
    return [make_row(name, ratios, 1.7, note=note)]


def head(bench: BenchConfig) -> list[dict]:
    """Logits where there is a label, against logits everywhere: fast samples, 40 % of the text supervised."""
    rows = []
    for words in (50_000, 150_000):
        name = f"head.{words // 1000}k.speedup"
        if not bench.wants(name):
            continue
        cfg = dual_config(GEOMETRY, "llava15")
        cfg.decoder.vocab_size = words
        trainer = Trainer(cfg, {"train": "connector", "dtype": "float32"})
        few = dual_batch(cfg, (("pruned",) * 4, DUAL_TEXT[0]), 1)
        steps = {name: functools.partial(trainer.step, batch) for name, batch in
                 (("few", few), ("all", everywhere(few)))}  # fmt: skip
        seconds = alternate(steps, min(bench.rounds, 3))
        ratios = [a / b for a, b in zip(seconds["all"], seconds["few"])]
        parts = dual_parts(cfg, DUAL_TEXT[0], "pruned", 1)
        per_label = parts["head"] / (ANSWER * DUAL_TEXT[0])
        body = sum(parts.values()) - parts["head"]
        positions = few.student.ids.numel() / 4
        floor = (body + positions * per_label) / sum(parts.values())
        note = f"{len(few.student.targets)} labels at {few.student.ids.numel()} positions; connector trains"
        rows.append(make_row(name, ratios, floor, note=note))
    return rows


def muon(bench: BenchConfig) -> list[dict]:
    """Muon on the demo's matrices: torch's, one by one in bfloat16, over ours, stacked by shape."""
    if not bench.wants("muon.speedup"):
        return []
    trainer = demo_trainer("pretrain")
    ours = trainer.optimizers[1]
    matrices = [p for group in ours.param_groups for p in group["params"]]
    for p in matrices:
        p.grad = torch.randn_like(p)
    torch_muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=0.0)
    seconds = alternate({"torch": torch_muon.step, "ours": ours.step}, bench.rounds)
    ratios = [a / b for a, b in zip(seconds["torch"], seconds["ours"])]
    ms = statistics.median(seconds["ours"]) * 1e3
    return [make_row("muon.speedup", ratios, 1.0, note=f"{len(matrices)} matrices, ours {ms:.0f} ms")]


def compiling(bench: BenchConfig) -> list[dict]:
    """What torch.compile is worth in the demo's stage 1, and what it takes first."""
    if not bench.wants("compile.speedup"):
        return []
    plain, began = demo_trainer("pretrain"), time.perf_counter()
    compiled = demo_trainer("pretrain", compile="true")
    batches = demo_batches(compiled, "pretrain", 4)
    for batch in batches:
        compiled.step(batch)
    warm_up = time.perf_counter() - began
    pairs = {name: itertools.cycle(batches) for name in ("plain", "compiled")}
    steps = {"plain": lambda: plain.step(next(pairs["plain"]))}
    steps |= {"compiled": lambda: compiled.step(next(pairs["compiled"]))}
    seconds = alternate(steps, bench.rounds)
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["compiled"])]
    note = f"after {warm_up:.0f} s of compiling and four steps"
    return [make_row("compile.speedup", ratios, 1.0, note=note)]


def recomputing(bench: BenchConfig) -> list[dict]:
    """What --recompute block costs in the demo's stage 1: a step without it over one with it."""
    if not bench.wants("recompute.block.speedup"):
        return []
    trainers = {part: demo_trainer("pretrain", recompute=part) for part in ("none", "block")}
    batch = demo_batches(trainers["none"], "pretrain", 1)[0]
    steps = {part: functools.partial(trainer.step, batch) for part, trainer in trainers.items()}
    seconds = alternate(steps, bench.rounds)
    ratios = [a / b for a, b in zip(seconds["none"], seconds["block"])]
    cfg, train = trainers["none"].vlm.cfg, ["connector", "decoder"]
    flops = [sum(plan.sample_cost(cfg, train, TEXT, "full", 1, part).values()) for part in trainers]
    return [make_row("recompute.block.speedup", ratios, flops[0] / flops[1], note="below 1: memory for time")]


def planner(bench: BenchConfig) -> list[dict]:
    """Samples a second that one process plans, draws and packs, over those that the demo's step takes."""
    name = "planner.samples_per_s"
    if not bench.wants(name):
        return []
    trainer, rates, needs = demo_trainer("pretrain"), [], []
    for _ in range(bench.rounds):
        began = time.perf_counter()
        batches = demo_batches(trainer, "pretrain", 40)
        rates.append(sum(batch.samples for batch in batches) / (time.perf_counter() - began))
        began = time.perf_counter()
        trainer.step(batches[0])
        needs.append(batches[0].samples / (time.perf_counter() - began))
    row = make_row(name, rates, statistics.median(needs), note="on one core; floor: what the step takes")
    return [{**row, "efficiency": round(row["value"] / row["floor"], 4)}]


RANKS = 8  # of a node


def node_planner(bench: BenchConfig) -> list[dict]:
    """Samples a second of a node of 8 ranks that share what they draw of records in LLaVA's form, packed: one
    rank is timed, with the pools of the others on the board. The floor is what a node should reach.
    """
    name = "planner.node_samples_per_s"
    if not bench.wants(name):
        return []
    words, rng = "where is the red circle left of a small green square".split(), random.Random(0)
    records, rates = [], []
    for n in range(2000):
        turns = [("gpt" if i % 2 else "human", rng.choices(words, k=20)) for i in range(4)]
        turns = [{"from": role, "value": " ".join(text)} for role, text in turns]
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        records.append({"image": f"{n}.jpg", "conversations": turns})
    with tempfile.TemporaryDirectory() as folder:
        model.write_json(Path(folder) / "a.json", records)
        for n in range(len(records)):
            Image.new("RGB", (8, 8)).save(Path(folder) / f"{n}.jpg")
        cfg = model.preset("tiny")["model"]
        tokenizer, sources = data.find_tokenizer(cfg), data.open_sources(f"{folder}/a.json", "sft")
        for _ in range(min(3, bench.rounds)):
            board = data.open_store("localhost", 0, is_master=True, wait_for_workers=False)
            shared = data.Plan(
                sources, tokenizer, cfg, data.RowConfig(rows=64, row_length=1024), lambda number: "pruned",
                range(10**6), world=RANKS, board=("localhost", board.port),
            )  # fmt: skip
            alone, order = dataclasses.replace(shared, board=None), shared.order(0, 0)
            for pool in range(2 * RANKS):
                drawn = alone.draw(0, itertools.islice(order, alone.POOL))
                if pool % RANKS:
                    board.set(f"0-{pool}", pickle.dumps(drawn))
            began = time.perf_counter()
            next(planned for planned in shared.micro_batches() if planned.cursor[0][0] == 2 * RANKS - 1)
            rates.append((2 * RANKS - 1) * shared.POOL / (time.perf_counter() - began))
    return [make_row(name, rates, 10_000.0, note="of 8 processes, on a core each")]


def evaluation(bench: BenchConfig) -> list[dict]:
    """Answers a second in batches of 64 over one by one; likelihoods with the prompt read once over each."""
    rows, vlm = [], demo_trainer("sft").vlm.eval()
    tokenizer = data.find_tokenizer(vlm.cfg)
    if bench.wants("evaluation.batch.speedup"):
        task = scoring.scenes_task("scenes_vqa", 13, 0)
        images, seconds = [question.images for question in task.questions], {}
        ways = {}
        for size in (1, 64):
            cfg = scoring.EvalConfig(batch_size=size, device="cpu")
            ways[size] = functools.partial(scoring.answer_all, vlm, tokenizer, task, images, "full", cfg)
        seconds = alternate(ways, min(bench.rounds, 3))
        ratios = [a / b for a, b in zip(seconds[1], seconds[64])]
        rate = len(images) / statistics.median(seconds[64])
        note = f"{rate:.0f} answers a second in batches, random weights"
        rows.append(make_row("evaluation.batch.speedup", ratios, 1.0, note=note))
    if bench.wants("evaluation.choices.speedup"):
        task = scoring.scenes_task("scenes_vqa", 3, 0)
        samples, options = [], []
        for question in task.questions:
            pieces = task.prompt(question, tokenizer)
            samples.append(data.load_sample(pieces, question.images, vlm.cfg))
            options.append([tokenizer.encode(choice) for choice in question.choices])

        def apart() -> None:
            for number in range(max(map(len, options))):
                having = [i for i, choices in enumerate(options) if number < len(choices)]
                one = [[options[i][number]] for i in having]
                scoring.answer_likelihoods(vlm, [samples[i] for i in having], one, "full")

        shared = functools.partial(scoring.answer_likelihoods, vlm, samples, options, "full")
        seconds = alternate({"apart": apart, "shared": shared}, bench.rounds)
        ratios = [a / b for a, b in zip(seconds["apart"], seconds["shared"])]
        count = statistics.mean(map(len, options))
        note = f"{count:.1f} choices a question; floor: all in the prompt"
        rows.append(make_row("evaluation.choices.speedup", ratios, count, note=note))
    return rows


# What grows -> its sizes, and a step of that size: (decoder's width, samples, text, pictures a sample)
GROWTH = {
    "samples": ((8, 16, 32), lambda n: (512, n, 60, 1)),
    "tokens": ((64, 128, 256), lambda n: (512, 8, n, 1)),
    "pictures": ((1, 2, 4), lambda n: (512, 8, 60, n)),
    "width": ((256, 512, 1024), lambda n: (n, 8, 60, 1)),
}


def growth(bench: BenchConfig) -> list[dict]:
    """Exponents: the slope of log time over log size, and that of the counted FLOPs as the floor."""
    rows = []
    for what, (sizes, step_of) in GROWTH.items():
        name = f"growth.{what}"
        if not bench.wants(name):
            continue
        trainers, flops = {}, []
        for size in sizes:
            width, n, text, pictures = step_of(size)
            cfg = stage1_config(GEOMETRY, "32")
            cfg.lora = model.LoraConfig(0)
            narrow = {"width": width, "mlp_width": 11 * width // 4, "heads": width // 64}
            cfg.decoder = dataclasses.replace(cfg.decoder, **narrow, kv_heads=width // 64)
            trainers[size] = Trainer(cfg, {"train": "connector,decoder", "dtype": "float32"})
            samples = draw(cfg, [text] * n, pictures)
            trainers[size].batch = data.make_batch(samples, ["full"] * n, cfg, 1, 4096)
            flops.append(counted_flops(trainers[size], trainers[size].batch))
        steps = {size: trainer.step for size, trainer in trainers.items()}
        seconds = alternate(steps, min(bench.rounds, 5))
        slopes = [slope(sizes, times) for times in zip(*seconds.values())]
        row = make_row(name, slopes, slope(sizes, flops), note=f"{what}: {sizes}")
        rows.append(row)
    return rows


def slope(sizes: tuple, values) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def processes(bench: BenchConfig) -> list[dict]:
    """Samples a second of two processes over one, a thread each: the demo's stage 1 through torchrun."""
    if not bench.wants("processes.speedup"):
        return []
    rates = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn, ranks in itertools.product(range(2), rates):
            out = Path(folder, f"{turn}-{ranks}")
            script = "train_pretrain.py --steps 24 --log_every 8 --dtype float32 --rows 16 --device cpu"
            launch = f"-m torch.distributed.run --standalone --nproc_per_node={ranks} {script}"
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, *launch.split(), "--out", str(out)]
            subprocess.run(command, check=True, capture_output=True, env=env, cwd=ROOT)
            lines = map(json.loads, (out / "metrics.jsonl").read_text("utf-8").splitlines())
            rates[ranks] += [line["samples_per_s"] for line in lines if line["step"] > 8]
    ratios = [two / one for two, one in zip(rates[2], rates[1])]
    return [make_row("processes.speedup", ratios, 2.0, note="one thread each; floor: twice as fast")]


MEASURES = [stage1, connector_share, packing, dualspeed, reading, mfu, reference_stage1, reference_stage2]
MEASURES += [head, muon, compiling, recomputing, planner, node_planner, evaluation, growth, processes]


def describe_geometry() -> dict:
    """What was measured, and each part's share of the FLOPs with each connector."""
    flags = flags_of(model.preset("cos-7b")["pretrain"])
    parts = {part: dataclasses.asdict(getattr(GEOMETRY, part)) for part in ("vit", "decoder", "lora")}
    connector = {key: getattr(GEOMETRY.connector, key) for key in ("levels", "width", "heads")}
    run = {"trains": flags.train, "autocast": flags.dtype, "row_length": flags.row_length}
    flops = {name: shares(stage1_flops(GEOMETRY, name)) for name in STAGE1}
    for name, mode in itertools.product(DUAL, ("full", "pruned", "slow")):
        cfg = dual_config(GEOMETRY, name)
        flops[f"dualspeed.{name}.{mode}"] = shares(dual_parts(cfg, DUAL_TEXT[0], mode, DUAL[name][0]))
    return {**parts, "connector": connector, **run, "text": TEXT, "samples": SAMPLES, "flop_shares": flops}


def commit() -> str:
    """The commit that was measured, with a + if files differ from it; empty outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


COLUMNS = ("value", "spread", "floor", "efficiency", "at_7b", "published")


def line_of(row: dict) -> str:
    line = row["name"].ljust(38)
    for column in COLUMNS:
        numbers = row[column] if isinstance(row[column], list) else [row[column]]
        line += "-".join("" if x is None else f"{x:.3f}" for x in numbers).rjust(14)
    return f"{line}  {row['note']}"


def cpu_name() -> str:
    """Of /proc/cpuinfo, where there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def main(argv: list[str]) -> None:
    bench = BenchConfig()
    model.parse_cli(argv, __doc__, bench)
    model.require_at_least(bench, 1, "rounds")
    rows = []
    print("name".ljust(38) + "".join(column.rjust(14) for column in COLUMNS) + "  note")
    for measure in (progress := tqdm(MEASURES, "bench", dynamic_ncols=True, smoothing=1)):
        progress.set_postfix_str(measure.__name__)
        for row in measure(bench):
            rows.append(row)
            tqdm.write(line_of(row))
    model.require(rows, f"--only {bench.only}: no row's name starts so")
    at = {"commit": commit(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    at |= {"cpu": cpu_name(), "capability": torch.backends.cpu.get_cpu_capability()}
    report = {"geometry": describe_geometry(), **at, "rounds": bench.rounds, "rows": rows}
    model.write_json(Path(bench.out), report)
    print(f"in {bench.out}")


if __name__ == "__main__":
    model.run_cli(main)
