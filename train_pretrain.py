"""Stage 1: align the connector (and the decoder) with few visual tokens an image.

    one CPU      python train_pretrain.py --preset tiny --data scenes --out runs/a/pretrain
    one GPU      the same; --dtype bfloat16 --compile true are the defaults there
    one node     torchrun --nproc_per_node=8 train_pretrain.py --data scenes --out runs/a/pretrain
    many nodes   torchrun --nnodes=2 --node_rank=R --master_addr=H --nproc_per_node=8 train_pretrain.py ...
    go on        the same command with --resume auto
    stage 1b     python train_pretrain.py --init runs/a/pretrain --scale 32to144 --train vit,connector --out b

`main` below is the stage, top to bottom. The parts of a run that stage 2 shares follow it: configs, ranks,
optimizers, schedule, step, checkpoint, log.
"""

import model  # first of all: it answers --help before torch is loaded

# isort: split

import dataclasses
import functools
import json
import math
import os
import shutil
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import prune
from model import UserError


@dataclass
class RunConfig:
    """Flags of both stages. The preset's recipe overrides these defaults, the command line overrides both."""

    out: str = ""  # run folder, made by the run
    preset: str = "tiny"  # model and recipe, see assets/presets
    init: str = ""  # start from this run or checkpoint instead of the preset's halves
    scale: str = ""  # token scaling applied to --init, see model.SCALINGS
    scale_init: str = "inflate"  # of its new scales; not in the paper: queries (those random) or random (all)
    resolution: str = ""  # SIDE, SIDE+CUT or +CUT: pixels of a view; CUT pad, split, anyres or unpad
    resume: str = ""  # "auto": continue the run in --out where its newest checkpoint left it
    data: str = "scenes"  # scenes, a LLaVA .json or a mixture .json
    val_data: str = ""  # the same for validation; default: --data itself, or unseen scenes
    seed: int = 0  # of connector, sample order and modes
    steps: int = 500  # optimizer steps
    rows: int = 16  # packed rows of an optimizer step, over all ranks and micro-steps
    batch_size: int = 0  # above 0: a step takes this many samples instead, in rows as wide as they need
    micro_steps: int = 1  # gradient accumulation
    row_length: int = 256  # positions of a row (with --batch_size: at most), shared by several samples
    row_images: int = 16  # packing: most images of a row (MM1: 16)
    row_limit: int = 2048  # positions of a sample (packed: row_length at most); documents go on in a next one
    train: str = "connector,decoder"  # what trains: a comma list of vit, connector, decoder, lora
    frozen: str = "float32"  # how matrices that do not train are kept; bfloat16 (with --dtype bfloat16): half
    pure_bf16: bool = False  # trained weights, gradients and moments in bfloat16 too: memory before quality
    lr: float = 1e-3  # peak rate of AdamW; -1: by MM1's law, from the size of the decoder
    muon_lr: float = 0.0  # above 0: Muon at this rate on the matrices inside the blocks
    vit_lr: float = 1e-4  # the encoder's peak rate (with Muon, which keeps the ratio, too)
    warmup: float = 0.03  # share of the steps
    final_lr: float = 0.1  # share of the peak at the last step (cosine)
    weight_decay: float = 0.0  # torch's: a step takes rate x this of a weight; MM1's lambda = 0.1 eta is 0.1
    decay: str = "matrices"  # what decays: matrices (neither vectors nor tables), or all (MM1)
    z_loss: float = 0.0  # on the mean squared log of the softmax's denominator (MM1: 1e-4, for 30B)
    clip: float = 1.0  # largest gradient norm
    balance: float = 0.01  # weight of the load-balance loss of --decoder.experts (MM1's)
    router_z: float = 0.001  # weight of their router's z-loss (MM1's)
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # autocast: float32 or bfloat16; auto: bfloat16 where the device is fast at it
    compile: str = "auto"  # true or false: torch.compile of every block; auto: on cuda only
    workers: int = 1  # processes that draw and decode pictures
    log_every: int = 10  # steps between log lines
    save_every: int = 0  # steps between checkpoints; 0: only at the end
    eval_every: int = 0  # steps between validations, which keep the best checkpoint; 0: never

    def check(self) -> None:
        """What can be wrong with the flags alone; called before anything is built or written."""
        model.trainable_parts(self.train)
        model.require_at_least(self, 1, "steps rows micro_steps log_every row_length row_images row_limit")
        model.require_at_least(self, 0, "seed batch_size workers save_every eval_every muon_lr vit_lr")
        model.require_at_least(self, 0, "weight_decay z_loss balance router_z")
        if self.lr < 0 and (self.lr != -1 or "decoder" not in self.train.split(",")):
            raise UserError(f"--lr {self.lr:g}: at least 0, or -1 (MM1's law) where the whole decoder trains")
        if self.decay not in ("matrices", "all"):
            raise UserError(f"--decay '{self.decay}' is unknown: use matrices or all")
        if self.scale_init not in model.SCALE_INITS:
            raise UserError(f"--scale_init '{self.scale_init}': use one of {', '.join(model.SCALE_INITS)}")
        if self.scale_init != "inflate" and not self.scale:
            raise UserError(f"--scale_init {self.scale_init} has no effect without --scale")
        if self.frozen not in ("float32", "bfloat16"):
            raise UserError(f"--frozen '{self.frozen}' is unknown: use float32 or bfloat16")

    def trains_isolator(self) -> bool:
        return False


@dataclass
class PretrainConfig(RunConfig):
    pruner: str = ""  # train every sample on pruned tokens (DualSpeed's stage 1); it learns the isolator

    def trains_isolator(self) -> bool:
        return bool(self.pruner)

    def check(self) -> None:
        super().check()
        if self.pruner and self.pruner not in prune.PRUNERS:
            raise UserError(f"--pruner '{self.pruner}' is unknown: use one of {', '.join(prune.PRUNERS)}")


def main(argv: list[str]) -> None:
    run, vlm, tokenizer, cfg = start("pretrain", PretrainConfig, argv, __doc__)
    mode = "fast" if cfg.pruner else "full"
    optimizers = make_optimizers(vlm, cfg)
    first = resume(run, vlm, optimizers)
    write_config(run, vlm)
    ddp = prepare(run, vlm)
    batches = load_batches(run, vlm.cfg, tokenizer, first, lambda number: mode)
    tokens = data.square_tokens(vlm.cfg, "pruned" if cfg.pruner else "full")
    for step in run.bar(first):
        micro, waited = fetch(batches, run)
        stats = optimizer_step(run, ddp, micro, optimizers, step, caption_loss)
        run.log(step, stats, micro, waited, tokens)
        finish_step(run, vlm, tokenizer, optimizers, step)
    del ddp  # its end would hold the GIL while it waits for a thread of gloo's that wants it
    run.close()


def caption_loss(logits: Tensor, teacher: Tensor | None, batch: data.Batch) -> dict[str, Tensor]:
    """Cross entropy of the supervised positions: a sum, which optimizer_step divides by the global count."""
    return {"loss": F.cross_entropy(logits, batch.student.targets, reduction="sum")}


def longest_sample(cfg: RunConfig) -> int:
    return cfg.row_limit if cfg.batch_size else min(cfg.row_limit, cfg.row_length)


def mm1_rate(size: int | float) -> float:
    """MM1's law of the peak rate: size counts the decoder's weights without embeddings (section 3.3)."""
    return math.exp(-0.4214 * math.log(size) - 0.5535)


# ---------------------------------------------------------------------------------------------------------
# The start of a run: ranks, config, model


@dataclass
class Run:
    """What a run knows of itself: its flags, its place among the ranks, its folder and its log."""

    stage: str
    cfg: RunConfig
    rank: int
    world: int
    device: torch.device
    best: float = math.inf  # validation loss
    skipped: Counter = field(default_factory=Counter)  # why records could not be used: how often
    cursor: list | None = None  # packing: where each group of sources goes on

    @property
    def folder(self) -> Path:
        return Path(self.cfg.out)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        if self.cfg.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text)

    def bar(self, first: int):
        self.progress = tqdm(
            total=self.cfg.steps,
            initial=first,
            desc=self.stage,
            disable=not self.main,
            dynamic_ncols=True,
            mininterval=1,
        )
        self.since, self.seen = time.perf_counter(), 0
        self.wait, self.plans = 0.0, []
        for step in range(first, self.cfg.steps):
            yield step
            self.progress.update()

    def log(self, step: int, stats: dict, micro: list[data.Batch], waited: float, visual_tokens: int) -> None:
        """Bar and metrics.jsonl every log_every steps: the only place where the loop waits for the device."""
        self.seen += sum(b.samples for b in micro) * self.world
        self.wait += waited
        self.plans += [batch.plan for batch in micro]
        self.tell_skipped(micro)
        if (step + 1) % self.cfg.log_every and step + 1 != self.cfg.steps:
            return
        values = {name: float(value) for name, value in stats.items()}
        took = time.perf_counter() - self.since
        rate, wait = self.seen / took, self.wait / took
        self.since, self.seen, self.wait = time.perf_counter(), 0, 0.0
        shown = {name: f"{value:.3f}" for name, value in values.items() if name in ("loss", "kl")}
        self.progress.set_postfix(
            {**shown, "samples/s": f"{rate:.0f}", "tok/img": visual_tokens, "wait": f"{wait:.0%}"}
        )
        speed = {"samples_per_s": round(rate, 2), "seconds": round(took, 3), "wait": round(wait, 4)}
        speed["visual_tokens"] = visual_tokens
        skipped = {"skipped": self.skipped.total()} if self.skipped.total() else {}
        self.record(step=step + 1, **speed, **values, **self.packing(), **skipped)

    def tell_skipped(self, micro: list[data.Batch]) -> None:
        """Each of the first ten records that could not be used; `close` tells how many there were and why."""
        for why, told in (skipped for batch in micro for skipped in batch.plan.skipped):
            if self.skipped.total() < 10:
                tqdm.write(f"skipped, {why}: {told}")
            self.skipped[why] += 1

    def packing(self) -> dict[str, float]:
        """Of the steps since the last log line: how full rows were, and the share of positions by kind."""
        plans, self.plans = self.plans, []
        mean = {name: sum(getattr(p, name) for p in plans) / len(plans) for name in ("fill", "images")}
        kinds = sorted({kind for p in plans for kind in p.kinds})
        shares = {f"share {kind}": sum(p.kinds.get(kind, 0) for p in plans) / len(plans) for kind in kinds}
        return {"fill": mean["fill"], "image_fill": mean["images"], **shares}

    def record(self, **values) -> None:
        if self.main:
            line = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
            with open(self.folder / "metrics.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self.progress.close()
        skipped = [self.skipped]
        if self.world > 1:
            skipped = [None] * self.world
            dist.all_gather_object(skipped, self.skipped)
        skipped = sum(skipped, Counter())  # drops what is 0
        if skipped:
            told = ", ".join(f"{n} {why}" for why, n in skipped.most_common())
            self.say(f"skipped {skipped.total()} records: {told}; python data.py check {self.cfg.data}")
        self.say(f"{self.stage}: {self.cfg.steps} steps done, checkpoint in {model.find_step(self.folder)}")
        if self.world > 1:
            dist.destroy_process_group()


def next_recipe(name: str, stage: str, scale: str) -> dict:
    """The preset's recipe of a stage; that of 1b, where it has one, for a stage 1 that scales tokens up."""
    row = model.preset(name)
    return row.get("pretrain_b" if stage == "pretrain" and scale else stage, row[stage])


def read_flags(
    config: type, stage: str, argv: list[str], doc: str
) -> tuple[RunConfig, model.ModelConfig, Path]:
    """Flags over recipe over defaults, and the checkpoint to start from: of --out to go on, else --init."""
    asked = config()  # a first look: where do recipe and model come from?
    model.parse_cli(argv, doc, asked, model.ModelConfig())
    if not asked.out:
        raise UserError("--out is missing: the run folder to write, such as runs/a")
    if asked.resume not in ("", "auto"):
        raise UserError(f"--resume '{asked.resume}': the only value is auto")
    begun = (Path(asked.out) / "latest").is_file()
    if begun and not asked.resume:
        raise UserError(f"--out {asked.out} already holds a run: add --resume auto, or choose another folder")
    if asked.scale and not asked.init:
        raise UserError(f"--scale {asked.scale} needs --init: the run whose tokens are to be scaled up")
    source = asked.out if begun else asked.init
    if not source:
        preset = model.preset(asked.preset)
        recipe, model_cfg = {**preset[stage], "preset": asked.preset}, model.copy_config(preset["model"])
    else:
        saved = model.read_run_config(model.find_step(source))
        if begun and saved["stage"] != stage:
            raise UserError(f"--out {source} holds a run of stage {saved['stage']}: choose another folder")
        named = any(word.split("=")[0] == "--preset" for word in argv)
        if named and asked.preset != saved["train"]["preset"]:
            raise UserError(f"--preset {asked.preset}: {source} was made with {saved['train']['preset']}")
        recipe = saved["train"] if begun else next_recipe(saved["train"]["preset"], stage, asked.scale)
        recipe = {"preset": saved["train"]["preset"], **recipe}
        model_cfg = model.from_dict(model.ModelConfig, saved["model"])
    cfg = model.from_dict(config, {**dataclasses.asdict(config()), **recipe})
    before, resolution = model.copy_config(model_cfg), cfg.resolution
    model.parse_cli(argv, doc, cfg, model_cfg)
    if begun and cfg.resolution != resolution:
        raise UserError(f"--resolution {cfg.resolution}: the run in {source} has '{resolution}' and keeps it")
    changed = model.changed_flags(before, model_cfg)
    if pruner := getattr(cfg, "pruner", ""):  # stage 1's; that of a recipe gives way
        given, named = any(word.split("=")[0] == "--pruner" for word in argv), model_cfg.prune.name
        if given and "prune.name" in changed and named != pruner:
            raise UserError(f"--pruner {pruner} and --prune.name {named}: give one of them")
        if not given and (source or "prune.name" in changed):
            cfg.pruner = named
        model_cfg.prune.name = cfg.pruner
    fixed = [name for name in changed if not name.startswith(("prune.", "lora.") if not begun else "prune.")]
    dense = not begun and not before.decoder.experts  # then it may get experts
    new_experts = [f"decoder.{name}" for name in model.EXPERT_FIELDS if dense]
    fixed = [name for name in fixed if name not in new_experts]
    if source and fixed:
        raise UserError(f"--{fixed[0]}: the model comes from {source}, which has its own")
    for parts, folder in ((("vit.", "image."), model_cfg.encoder_from), ("decoder.", model_cfg.decoder_from)):
        for name in changed if folder else ():
            free = ("vit.image_size", "vit.align_corners", *new_experts)
            if name.startswith(parts) and name not in free:
                raise UserError(f"--{name}: that half comes from {folder}, which has its own")
    if "connector.plan" in changed and {"connector.windows", "connector.queries"} & set(changed):
        raise UserError("--connector.plan sets windows and queries: give either the plan or those")
    if "lora.alpha" in changed and not model_cfg.lora.rank:
        raise UserError("--lora.alpha has no effect without --lora.rank")
    for name in ("--rows", "--row_images"):
        if cfg.batch_size and any(word.split("=")[0] == name for word in argv):
            raise UserError(f"{name} is for packed rows: add --batch_size 0, which is {cfg.batch_size} now")
    for name in () if model_cfg.decoder.experts else ("balance", "router_z"):
        if getattr(cfg, name) != getattr(config(), name):
            raise UserError(f"--{name} has no effect on a dense decoder: add --decoder.experts 4")
    cfg.check()
    if source:  # start() takes the model there; what cannot be shows before anything is built
        grown = model.scaled_config(model_cfg, cfg.scale) if cfg.scale and not begun else model_cfg
        model.at_resolution(grown, cfg.resolution).check()
    else:
        model_cfg = model.at_resolution(model_cfg, cfg.resolution)
    return cfg, model_cfg, model.find_step(source) if source else None


def start(stage: str, config: type, argv: list[str], doc: str):
    """Up to the model: run, model on its device, tokenizer, flags. Writes nothing but the hand-over."""
    cfg, model_cfg, step = read_flags(config, stage, argv, doc)
    rank, world, device = model.find_ranks(cfg.device)
    resolve_auto(cfg, device, world)
    if model_cfg.decoder.experts and cfg.compile == "true" and cfg.dtype == "float32":
        raise UserError(
            "--compile true --dtype float32: experts compile in bfloat16 only, take --compile false"
        )
    run = Run(stage, cfg, rank, world, device)
    torch.manual_seed(cfg.seed)
    if step:
        tokenizer = data.Tokenizer.from_pretrained(step / "tokenizer")
        saved = None if cfg.dtype == "bfloat16" else torch.float32  # halved matrices need autocast
        vlm = model.VLM.from_pretrained(step, dtype=saved)
        if model_cfg.prune.isolator != vlm.cfg.prune.isolator:
            before, now = vlm.cfg.prune.isolator, model_cfg.prune.isolator
            run.say(f"--prune.isolator {now}: a new isolator instead of the {before} vectors in {step}")
            vlm.isolator = prune.ModeIsolator(model_cfg.prune.isolator, vlm.cfg.decoder.width)
        vlm.cfg.prune = model_cfg.prune
        if vlm.cfg.lora.rank and model_cfg.lora != vlm.cfg.lora:
            run.say("the adapters at hand are merged; a frozen decoder in bfloat16 rounds part of them away")
        vlm.set_lora(model_cfg.lora)
        if model_cfg.check().decoder.experts != vlm.cfg.decoder.experts:
            vlm.cfg.decoder = model_cfg.decoder
            model.upcycle(vlm.decoder, vlm.cfg.decoder)
        vlm.cfg.check()
    else:
        tokenizer = data.find_tokenizer(model_cfg)
        vlm = model.VLM.build(model_cfg, None if cfg.frozen == "bfloat16" else torch.float32)
    settle(vlm, cfg)
    if cfg.lr == -1:
        size = model.backbone_size(vlm.decoder)
        cfg.lr = mm1_rate(size)
        run.say(f"MM1's law: {size:,} weights of the decoder without embeddings, peak rate {cfg.lr:.4g}")
    vlm.to(device)
    if tokenizer.vocab_size > vlm.cfg.decoder.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the decoder {vlm.cfg.decoder.vocab_size}"
        )
    for source, _ in data.open_sources(cfg.data, stage):  # a wrong --data shows before a folder is made
        if isinstance(source, data.FileSource):
            source.first(source.with_pictures)
            if source.table.suffix == ".parquet":
                run.say(
                    f"{source.path}: parquet is slow to read in any order; python data.py convert makes tars"
                )
    later = model.scaled_config(vlm.cfg, cfg.scale) if cfg.scale and step.parent != run.folder else vlm.cfg
    later = model.at_resolution(later, cfg.resolution)
    data.check_room(later, longest_sample(cfg), 10**9 if cfg.batch_size else cfg.row_images)
    if run.main and not (run.folder / "latest").is_file():  # what a run left that never came to a checkpoint
        for name in ("metrics.jsonl", "best"):
            (run.folder / name).unlink(missing_ok=True)
    if step:
        run.say(f"from {step}: {vlm.cfg.vit.image_size} px, {vlm.cfg.visual_tokens()} visual tokens")
        if cfg.scale and step.parent != run.folder:
            hand_over(run, vlm, tokenizer, model.read_run_config(step)["train"]["data"])
        model.set_resolution(vlm, cfg.resolution)
        settle(vlm, cfg)  # new scales and position tables
    needs = prune.PRUNERS[vlm.cfg.prune.name].needs if cfg.trains_isolator() else ()
    if "cls_attention" in needs and not vlm.cfg.vit.cls_token:
        run.say(f"{vlm.cfg.prune.name}: this encoder has no CLS token, the mean over all patches stands in")
    if cfg.resolution:
        run.say(
            f"--resolution {cfg.resolution}: {data.square_tokens(vlm.cfg)} visual tokens in a large square"
        )
    return run, vlm, tokenizer, cfg


def resolve_auto(cfg: RunConfig, device: torch.device, world: int) -> None:
    cuda = device.type == "cuda"
    if cfg.dtype == "auto":
        cfg.dtype = str(fast_dtype(device)).removeprefix("torch.")
    if cfg.compile == "auto":
        cfg.compile = "true" if cuda else "false"
    if cfg.dtype not in ("float32", "bfloat16") or cfg.compile not in ("true", "false"):
        raise UserError(
            f"--dtype {cfg.dtype} --compile {cfg.compile}: use float32 or bfloat16, true or false"
        )
    if cfg.dtype == "float32":
        cfg.frozen = "float32"  # halved matrices need autocast
        if cfg.pure_bf16:
            raise UserError("--pure_bf16 true needs --dtype bfloat16")
    name = "batch_size" if cfg.batch_size else "rows"
    taken, unit = getattr(cfg, name), cfg.micro_steps * world
    if taken % unit:
        fits = [n for n in range(1, cfg.micro_steps) if taken % (n * world) == 0]
        fix = f"--micro_steps {fits[-1]}" if fits else f"--{name} {unit * -(-taken // unit)}"
        told = f"--{name} {taken} is not divisible by {cfg.micro_steps} micro-steps x {world} ranks"
        raise UserError(f"{told}: add {fix}")


def run_config(run: Run, vlm: model.VLM) -> dict:
    """config.json: everything needed to rebuild and repeat."""
    return {
        "model": dataclasses.asdict(vlm.cfg), "stage": run.stage, "train": dataclasses.asdict(run.cfg),
        "torch": torch.__version__, "world": run.world,
    }  # fmt: skip


def write_config(run: Run, vlm: model.VLM) -> None:
    """Once everything that can refuse has agreed: from here on there is a run."""
    if run.main:
        model.write_json(run.folder / "config.json", run_config(run, vlm))


def hand_over(run: Run, vlm: model.VLM, tokenizer: data.Tokenizer, stage1_data: str) -> None:
    """Scale the tokens up, and print what inflation is worth: loss on stage-1 data before any training."""
    losses = {"before": validation_loss(run, vlm, tokenizer, stage1_data, "pretrain")["all"]}
    cfg, before = vlm.cfg, (vlm.connector, vlm.cfg, vlm.vit.cfg, vlm.vit.embeddings.position_embedding)
    chosen = run.cfg.scale_init
    for init in [*(other for other in ("random", "inflate") if other != chosen), chosen]:
        vlm.connector, vlm.cfg, vlm.vit.cfg, vlm.vit.embeddings.position_embedding = before
        model.scale_up(vlm, run.cfg.scale, init)
        losses[init] = validation_loss(run, vlm, tokenizer, stage1_data, "pretrain")["all"]
    told = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    run.say(
        f"--scale {run.cfg.scale}: {cfg.visual_tokens()} -> {vlm.cfg.visual_tokens()} visual tokens; "
        f"loss on stage-1 data {told}"
    )
    run.folder.mkdir(parents=True, exist_ok=True)
    run.record(scale=run.cfg.scale, **{f"loss {name}": loss for name, loss in losses.items()})


# ---------------------------------------------------------------------------------------------------------
# Batches


def load_batches(run: Run, cfg: model.ModelConfig, tokenizer: data.Tokenizer, first: int, choose_mode):
    """The micro-batches of this rank from step `first` on. One process plans, others draw and decode."""
    c = run.cfg
    plan = data.Plan(
        data.open_sources(c.data, run.stage), tokenizer, cfg, choose_mode, c.seed, range(first, c.steps),
        c.rows, c.batch_size, c.micro_steps, run.rank, run.world, c.row_length, c.row_images, c.row_limit,
        by_kind=run.stage == "pretrain", pad_images=c.compile == "true", cursor=run.cursor,
    )  # fmt: skip
    workers = c.workers if os.name == "posix" else 0
    common = {"batch_size": None, "multiprocessing_context": "fork" if workers else None}
    planner = DataLoader(plan, num_workers=min(1, workers), **common)
    return iter(DataLoader(data.Stream(plan), sampler=planner, num_workers=workers, **common))


def fetch(batches, run: Run) -> tuple[list[data.Batch], float]:
    """The micro-batches of one optimizer step, on the device, and the seconds spent waiting for them."""
    began = time.perf_counter()
    micro = []
    for _ in range(run.cfg.micro_steps):
        batch = next(batches)
        if isinstance(batch, UserError):
            raise batch
        micro.append(batch.to(run.device))
    run.cursor = micro[-1].plan.cursor
    return micro, time.perf_counter() - began


# ---------------------------------------------------------------------------------------------------------
# Precision, optimizers, schedule, step


def settle(vlm: model.VLM, cfg: RunConfig) -> None:
    """Freeze what does not train, and keep every weight in its dtype."""
    vlm.set_trainable(model.trainable_parts(cfg.train), cfg.trains_isolator())
    set_precision(vlm, cfg)


def set_precision(vlm: model.VLM, cfg: RunConfig) -> None:
    """Give every weight the dtype that it is kept in: float32 if it trains, cfg.frozen for other matrices.

    Vectors and position tables, which are few, stay float32, and with them the residual stream.
    """
    for name, p in vlm.named_parameters():
        narrow = p.ndim > 1 and "position" not in name and not p.requires_grad and cfg.frozen == "bfloat16"
        p.data = p.data.to(torch.bfloat16 if narrow or cfg.pure_bf16 else torch.float32)


def make_optimizers(vlm: model.VLM, cfg: RunConfig) -> list[torch.optim.Optimizer]:
    """AdamW; with --muon_lr, Muon for the matrices inside the blocks. No decay on vectors and tables."""
    groups = {}
    for name, p in vlm.named_parameters():
        if not p.requires_grad:
            continue
        vit = name.startswith("vit.")
        tables = ("embed_tokens", "position", "lm_head", "isolator")
        matrix = p.ndim in (2, 4) and not any(table in name for table in tables)  # linears and convolutions
        matrix = matrix or name.endswith("_proj")  # the experts', 3-D, which Muon does not take
        inner = p.ndim == 2 and matrix and ("layers." in name or "blocks." in name) and "lora_" not in name
        inner = inner and "router" not in name
        decays = matrix or cfg.decay == "all"
        groups.setdefault((bool(cfg.muon_lr and inner), vit, decays), []).append(p)
    if not groups:
        raise UserError(f"--train '{cfg.train}' leaves nothing to train")
    adam, muon = [], []
    for (use_muon, vit, decays), parameters in groups.items():
        peak = cfg.vit_lr if vit else cfg.lr
        if use_muon:
            peak = cfg.muon_lr * (peak / cfg.lr if cfg.lr else 1.0)
        group = {"params": parameters, "peak": peak, "weight_decay": cfg.weight_decay if decays else 0.0}
        (muon if use_muon else adam).append(group)
    optimizers = [torch.optim.AdamW(adam, lr=cfg.lr, betas=(0.9, 0.95), fused=True)] if adam else []
    return optimizers + ([Muon(muon, fast_dtype(parameters[0].device))] if muon else [])


class Muon(torch.optim.Optimizer):
    """Momentum whose update of every matrix is orthogonalised (Jordan et al. 2024), as in torch.optim.Muon.

    Unlike there, matrices of one shape are orthogonalised together, and in `dtype`: torch always takes
    bfloat16, which CPUs that emulate it multiply fifty times more slowly than float32.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, momentum: float = 0.95):
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), parameters in by_shape.items():
                updates = torch.stack([self.nesterov(p, group["momentum"]) for p in parameters])
                updates = orthogonalise(updates.to(self.dtype))  # (n, rows, columns)
                rate = group["lr"] * math.sqrt(max(1, rows / columns))
                for p, update in zip(parameters, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def nesterov(self, p: Tensor, momentum: float) -> Tensor:
        """The gradient moved towards its running mean, which takes the gradient in first."""
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        mean = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(mean, momentum)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Near U V^T of each matrix U S V^T, (n, rows, columns), by the quintic Newton-Schulz iteration whose
    coefficients are Jordan's: steep at 0, so that singular values end between about 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@functools.cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it at least as fast as float32, else float32: always on CUDA, on
    CPUs by a measurement, as many only emulate it.
    """
    if device.type == "cuda":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(256, 256, device=device, dtype=dtype)
        x @ x  # the first product chooses a kernel
        began = time.perf_counter()
        x @ x
        seconds[dtype] = time.perf_counter() - began
    return torch.bfloat16 if seconds[torch.bfloat16] < 2 * seconds[torch.float32] else torch.float32


def schedule(step: int, cfg: RunConfig) -> float:
    """Share of the peak rate in `step`, from 0: linear warm-up to 1, a cosine to final_lr in the last one."""
    warm = max(1, round(cfg.warmup * cfg.steps))
    if step < warm:
        return (step + 1) / warm
    done = (step + 1 - warm) / max(1, cfg.steps - warm)
    return cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def prepare(run: Run, vlm: model.VLM) -> nn.Module:
    """Compile block by block if asked, wrap in DDP if there are other ranks."""
    vlm.train()
    if run.cfg.compile == "true":
        torch._dynamo.config.recompile_limit = 64  # a few row shapes, with and without gradient
        for block in [*vlm.vit.encoder["layers"], *vlm.decoder.layers]:
            block.compile(fullgraph=True)
    if run.world == 1:
        return vlm
    ids = [run.device.index] if run.device.type == "cuda" else None
    return DistributedDataParallel(vlm, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def optimizer_step(run: Run, ddp: nn.Module, micro: list[data.Batch], optimizers, step: int, loss_of) -> dict:
    """One step over all micro-batches and ranks. Every loss is a sum divided by one number: the supervised
    tokens of the whole step, so that 8 micro-steps of 1 equal 1 of 8 and ranks with more answers weigh more.
    """
    learned = sum(len(b.student.targets) for b in micro)
    if not learned and run.world == 1:  # all pictures of the step turned out to be broken
        return {}
    count = torch.tensor(float(learned), device=run.device)
    if run.world > 1:
        dist.all_reduce(count)
        count = count.clamp(1)
    sums = {}
    for n, batch in enumerate(micro):
        last = n == len(micro) - 1
        with nullcontext() if last or run.world == 1 else ddp.no_sync():
            with run.autocast():
                logits, teacher, router_losses = ddp(batch)
            losses = add_penalties(run, loss_of(logits, teacher, batch), logits, router_losses)
            (losses["loss"] * (run.world / count)).backward()  # DDP divides by the number of ranks
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    rate = schedule(step, run.cfg)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, run.cfg.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    values = torch.stack([*sums.values()]) / count
    if run.world > 1:
        dist.all_reduce(values)
    return {**dict(zip(sums, values)), "grad_norm": norm, "rate": rate}


def add_penalties(run: Run, losses: dict, logits: Tensor, router_losses: Tensor | None) -> dict:
    """--z_loss and, where there are experts, their routers' losses: means, so times the supervised tokens."""
    loss, more = losses["loss"], {}
    if run.cfg.z_loss:
        more["z"] = logits.logsumexp(-1).square().sum()
        loss = loss + run.cfg.z_loss * more["z"]
    if router_losses is not None:
        more["balance"], more["router_z"] = router_losses * len(logits)
        loss = loss + run.cfg.balance * more["balance"] + run.cfg.router_z * more["router_z"]
    return {**losses, **more, "loss": loss}


# ---------------------------------------------------------------------------------------------------------
# Checkpoints and validation


def finish_step(run: Run, vlm: model.VLM, tokenizer, optimizers, step: int) -> None:
    """Save before validating, so that a failure there loses nothing."""
    cfg, done = run.cfg, step + 1
    last = done == cfg.steps
    evaluate = cfg.eval_every and (done % cfg.eval_every == 0 or last)
    if evaluate or last or (cfg.save_every and done % cfg.save_every == 0):
        save(run, vlm, tokenizer, optimizers, done)
    if evaluate:
        vlm.eval()
        mode = "fast" if getattr(cfg, "pruner", "") else "full"  # in the one mode that stage 1 trains
        kinds = validation_loss(run, vlm, tokenizer, cfg.val_data or cfg.data, run.stage, mode)
        loss = kinds.pop("all")
        told = ", ".join(f"{kind} {value:.4f}" for kind, value in kinds.items())
        run.say(f"step {done}: validation loss {loss:.4f} ({told})" + " (best)" * (loss < run.best))
        run.record(step=done, val_loss=loss, **{f"val_loss {kind}": value for kind, value in kinds.items()})
        if loss < run.best:
            run.best = loss
            if run.main:
                write_text(run.folder / "best", f"step-{done:08d}\n")
        if run.main:
            show_answers(run, vlm, tokenizer, cfg.val_data or cfg.data, mode)
        vlm.train()


def order_of(run: Run, vlm: model.VLM) -> dict:
    """What the order of the samples depends on, their lengths too, and so who shares a row."""
    names = "data seed rows batch_size row_length row_images row_limit resolution pruner slow_share mode"
    flags = {name: getattr(run.cfg, name) for name in names.split() if hasattr(run.cfg, name)}
    return flags | {f"prune.{name}": value for name, value in dataclasses.asdict(vlm.cfg.prune).items()}


def save(run: Run, vlm: model.VLM, tokenizer, optimizers, done: int) -> None:
    """step-00000200/ under a temporary name, then renamed; then `latest` points to it; then older ones go."""
    if run.main:
        folder = run.folder / f"step-{done:08d}"
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        vlm.save_pretrained(temporary, {**run_config(run, vlm), "end_token": tokenizer.end})
        tokenizer.save(temporary / "tokenizer")
        state = {
            "optimizers": [o.state_dict() for o in optimizers], "step": done, "rng": torch.get_rng_state(),
            "cursor": run.cursor, "order": order_of(run, vlm),
        }  # fmt: skip
        torch.save(state, temporary / "state.pt")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        write_text(run.folder / "latest", folder.name + "\n")
        best = (run.folder / "best").read_text().strip() if (run.folder / "best").is_file() else ""
        for old in run.folder.glob("step-*"):
            if old.name not in (folder.name, best):
                shutil.rmtree(old)
    if run.world > 1:
        dist.barrier()


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def resume(run: Run, vlm: model.VLM, optimizers) -> int:
    """The number of the next step; optimizers and RNG of a checkpoint whose weights are loaded already."""
    if run.cfg.resume != "auto" or not (run.folder / "latest").is_file():
        return 0
    folder = model.find_step(run.folder)
    state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    if "order" not in state:
        raise UserError(
            f"{folder}: an older version wrote it, it cannot be continued; start from it by --init"
        )
    for name, value in order_of(run, vlm).items():
        before = state["order"].get(name, value)  # an older version knew fewer
        if value != before:
            raise UserError(f"{folder}: was trained with --{name} {before}, its data order ends with another")
    layout = [[len(g["params"]) for g in o["param_groups"]] for o in state["optimizers"]]
    if layout != [[len(g["params"]) for g in o.param_groups] for o in optimizers]:
        raise UserError(f"{folder}: was trained with another --train or --muon_lr, it cannot be continued so")
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        asked = [(group["peak"], group["weight_decay"]) for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, (peak, decay) in zip(optimizer.param_groups, asked):  # rates may be changed on the way
            group["peak"], group["weight_decay"] = peak, decay
    torch.set_rng_state(state["rng"])
    run.cursor = state["cursor"]
    log = run.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    kept = [line for line in lines if line.get("step", 0) <= state["step"]]  # later steps come again
    run.skipped["before"] = kept[-1].get("skipped", 0) if kept else 0
    run.best = min((line["val_loss"] for line in kept if "val_loss" in line), default=math.inf)
    if run.world > 1:
        dist.barrier()  # all have read it
    if run.main:
        write_text(log, "".join(json.dumps(line) + "\n" for line in kept))
    run.say(f"resumed from {folder}")
    return state["step"]


@torch.no_grad()
def validation_loss(run: Run, vlm, tokenizer, spec: str, stage: str, mode: str = "full") -> dict[str, float]:
    """Mean loss per supervised token of every kind, on unseen scenes or --val_data; "all" weighs the kinds as
    that data does. About 128 samples in all. mode: full (all visual tokens) or fast.
    """
    kinds, losses = {}, {}
    for s, weight in data.open_sources(spec, stage):
        unseen = data.Scenes(s.kind, "test") if isinstance(s, data.Scenes) else s
        if weight:
            kinds.setdefault(s.kind, []).append((unseen, weight))
    c, size = run.cfg, 128 // len(kinds)
    for kind, sources in kinds.items():
        plan = data.Plan(
            sources, tokenizer, vlm.cfg, lambda n: mode, 1, range(4), 0, size // 4, row_length=c.row_length,
            limit=longest_sample(c),
        )  # fmt: skip
        total, count = 0.0, 0
        for planned in plan:
            batch = planned if isinstance(planned, UserError) else data.Stream(plan)[planned]
            if isinstance(batch, UserError):
                raise batch
            with run.autocast():
                logits, _, _ = vlm(batch.to(run.device))
            total += F.cross_entropy(logits, batch.student.targets.to(run.device), reduction="sum").item()
            count += len(batch.student.targets)
        if not count:
            raise UserError(
                f"validation: no sample of kind {kind} in {spec} can be used: python data.py check"
            )
        losses[kind] = total / count
    shares = {kind: sum(weight for _, weight in sources) for kind, sources in kinds.items()}
    mean = sum(shares[kind] * loss for kind, loss in losses.items()) / sum(shares.values())
    return {"all": mean, **losses}


def show_answers(run: Run, vlm: model.VLM, tokenizer, spec: str, mode: str, n: int = 4) -> None:
    """A few generated answers beside the right ones, so that one sees what a loss of 0.4 means."""
    source = next((s for s, _ in data.open_sources(spec, run.stage) if s.kind == "chat"), None)
    if source is None:
        return
    source = data.Scenes("chat", "test") if isinstance(source, data.Scenes) else source
    for i in range(min(n, len(source))):
        try:
            record = source[i]
            first = [role for role, _ in record.parts].index("user")  # behind a system text
            asked, answer = record.parts[first][1], record.parts[first + 1][1][0]
            images = record.images[: sum(isinstance(part, int) for part in asked)]
            turns = [*record.parts[: first + 1], ("assistant", [])]
            pieces = data.chat_pieces(turns, tokenizer, to_answer=True)
            sample = data.load_sample(pieces, images, vlm.cfg, record.name)
        except data.BadRecord:
            continue
        batch = data.prompt_batch([sample], "pruned" if mode == "fast" else "full", vlm.cfg)
        with run.autocast():
            said = tokenizer.decode(vlm.generate(batch.to(run.device), tokenizer.end, 24)[0])
        question = " ".join(part for part in asked if isinstance(part, str))
        run.say(f"   {question!r} -> {said!r} (right: {answer!r})")


if __name__ == "__main__":
    model.run_cli(main)
