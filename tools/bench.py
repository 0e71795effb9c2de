"""The speed table: what fewer visual tokens are worth in time. `make bench` writes runs/bench.json.

    python tools/bench.py                         everything, ten to fifteen minutes on two cores
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

Rows of reading are no ratios but pictures a second, floor and efficiency those of Pillow's decoding alone.
"""

import dataclasses
import functools
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
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
SAMPLES = 16  # of a step where batches are equal
TEXT = 23  # tokens of every caption, all of them supervised: the mean of Chain-of-Sight's data


@dataclass
class BenchConfig:
    rounds: int = 15  # timed rounds, after one of warm-up
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
    return plan.sample_cost(stage1_config(cfg, name), train, TEXT, "full", 1)[0]


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
        floor = shares(plan.sample_cost(trainer.vlm.cfg, train, TEXT, "full", 1)[0])["connector"]
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
        parts = plan.sample_cost(cfg, model.trainable_parts(recipe["train"]), T - V, "full", 1)[0]
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
    parts = plan.sample_cost(cfg, ["connector", "decoder"], text, mode, tiles)[0]
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


MEASURES = [stage1, connector_share, packing, dualspeed, reading]


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


def show(rows: list[dict]) -> None:
    columns = ("value", "spread", "floor", "efficiency", "at_7b", "published")
    print("name".ljust(30) + "".join(column.rjust(13) for column in columns) + "  note")
    for row in rows:
        line = row["name"].ljust(30)
        for column in columns:
            numbers = row[column] if isinstance(row[column], list) else [row[column]]
            line += "-".join("" if x is None else f"{x:.3f}" for x in numbers).rjust(13)
        print(f"{line}  {row['note']}")


def main(argv: list[str]) -> None:
    bench = BenchConfig()
    model.parse_cli(argv, __doc__, bench)
    model.require_at_least(bench, 1, "rounds")
    rows = [row for measure in MEASURES for row in measure(bench)]
    model.require(rows, f"--only {bench.only}: no row's name starts so")
    at = {"commit": commit(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    report = {"geometry": describe_geometry(), **at, "rounds": bench.rounds, "rows": rows}
    model.write_json(Path(bench.out), report)
    show(rows)
    print(f"in {bench.out}")


if __name__ == "__main__":
    model.run_cli(main)
