"""Stage 1: align the connector (and the decoder) with few visual tokens an image.

    one CPU      python train_pretrain.py --preset tiny --data scenes --out runs/a/pretrain
    one GPU      the same; --dtype bfloat16 --compile true are the defaults there
    one node     torchrun --nproc_per_node=8 train_pretrain.py --data scenes --out runs/a/pretrain
    many nodes   torchrun --nnodes=2 --node_rank=R --master_addr=H --nproc_per_node=8 train_pretrain.py ...
    large        the same with --shard zero2 or zero3; with many nodes, --out is a folder that all of them see
    go on        the same command with --resume auto
    stage 1b     python train_pretrain.py --init runs/a/pretrain --scale 32to144 --train vit,connector --out b

`main` is the stage, top to bottom. What it calls follows in its order; stage 2 imports these parts.
"""

import model  # isort: skip  # first of all: it answers --help before torch is loaded
import dataclasses
import functools
import json
import math
import os
import shutil
import time
import timeit
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from model import UserError, require, require_at_least, require_one_of


@dataclass
class RunConfig(data.RowConfig):
    """Flags of both stages. The preset's recipe overrides these defaults, the command line overrides both."""

    # -- run
    out: str = ""  # run folder, made by the run
    preset: str = "tiny"  # model and recipe: a file of assets/presets
    init: str = ""  # start from this run or checkpoint instead of the preset's halves
    scale: str = ""  # token scaling applied to --init, see model.SCALINGS
    scale_init: str = "inflate"  # of its new scales; not in the paper: queries (those random) or random (all)
    resolution: str = ""  # SIDE, SIDE+CUT or +CUT: pixels of a tile; CUT pad, split, anyres or unpad
    resume: str = ""  # "auto": continue the run in --out where its newest checkpoint left it
    steps: int = 500  # optimizer steps
    # -- data
    data: str = "scenes"  # scenes, a file of records, or a mixture .json
    val_data: str = ""  # the same for validation; default: --data itself, or unseen scenes
    workers: int = -1  # processes that draw and decode pictures; -1: a rank's cores but one, on a CPU 1
    # -- optimizer
    train: str = "connector,decoder"  # what trains: a comma list of vit, connector, decoder, lora
    lr: float = 1e-3  # peak rate of AdamW; -1: by MM1's law, from the size of the decoder
    muon_lr: float = 0.0  # above 0: Muon at this rate on the matrices inside the blocks
    vit_lr: float = 1e-4  # the encoder's peak rate (with Muon, which keeps the ratio, too)
    warmup: float = 0.03  # share of the steps
    final_lr: float = 0.1  # share of the peak at the last step (cosine)
    weight_decay: float = 0.0  # AdamW's decoupled decay: a step subtracts lr * weight_decay * w; MM1 uses 0.1
    decay: str = "matrices"  # what decays: matrices (neither vectors nor tables), or all (MM1)
    clip: float = 1.0  # largest gradient norm
    z_loss: float = 0.0  # weight of the mean squared log of the softmax's denominator (MM1: 1e-4, for 30B)
    balance: float = 0.01  # weight of the experts' load-balance loss (MM1's)
    router_z: float = 0.001  # weight of their router's z-loss (MM1's)
    # -- precision
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # of autocast: float32 or bfloat16; auto: bfloat16 where the device is fast at it
    frozen: str = "float32"  # how matrices that do not train are kept; bfloat16 (with --dtype bfloat16): half
    pure_bf16: bool = False  # trained weights, gradients and moments in bfloat16 too: memory before quality
    compile: str = "auto"  # true or false: torch.compile of every block; auto: on cuda only
    recompute: str = "none"  # memory for time: attention, or each block, is computed again on the way back
    shard: str = "none"  # share weights out: zero2 keeps gathered blocks until backward, zero3 not
    shard_ranks: int = 0  # ranks that hold one copy of the weights together, such as a node's; 0: all
    # -- logging
    log_every: int = 10  # steps between log lines
    save_every: int = 0  # steps between checkpoints; 0: only at the end
    eval_every: int = 0  # steps between validations, which keep the best checkpoint; 0: never
    profile: int = -1  # a step: it and the next four are traced into OUT/trace.json, for Perfetto; -1: none
    later: float = 0.0  # what follows in a chain, as a multiple of this run: the bar counts its time, too

    def check(self) -> None:
        """Refuse what can be wrong with the flags alone, before anything is built or written."""
        model.trainable_parts(self.train)
        require_at_least(self, 1, "steps rows micro_steps log_every row_length row_images row_limit")
        require_at_least(self, 0, "seed batch_size save_every eval_every muon_lr vit_lr z_loss")
        require_at_least(self, 0, "weight_decay balance router_z shard_ranks")
        law = self.lr == -1 and "decoder" in self.train.split(",")
        require(self.lr >= 0 or law, f"--lr {self.lr:g}: at least 0, or -1 if the whole decoder trains")
        require_one_of("--decay", self.decay, ("matrices", "all"))
        require_one_of("--scale_init", self.scale_init, model.SCALE_INITS)
        require_one_of("--frozen", self.frozen, ("float32", "bfloat16"))
        require_one_of("--dtype", self.dtype, ("auto", "float32", "bfloat16"))
        require_one_of("--compile", self.compile, ("auto", "true", "false"))
        require_one_of("--recompute", self.recompute, ("none", "attention", "block"))
        require_one_of("--shard", self.shard, ("none", "zero2", "zero3"))

    def trains_isolator(self) -> bool:
        return False


@dataclass
class PretrainConfig(RunConfig):
    # -- DualSpeed
    pruner: str = ""  # train every sample on pruned tokens (DualSpeed's stage 1); it learns the isolator

    def trains_isolator(self) -> bool:
        return bool(self.pruner)


def main(argv: list[str]) -> None:
    run, vlm, tokenizer, cfg = start("pretrain", PretrainConfig, argv, __doc__)
    mode = "pruned" if cfg.pruner else "full"
    optimizers = make_optimizers(vlm, cfg)
    first = begin(run, vlm, optimizers)
    ddp = prepare(run, vlm)
    batches = load_batches(run, vlm.cfg, tokenizer, first, lambda number: mode)
    tokens = data.square_tokens(vlm.cfg, mode)
    for step in run.bar(first):
        micro = next(batches)
        stats = optimizer_step(run, ddp, micro, optimizers, step, caption_loss)
        run.log(step, stats, micro, tokens)
        finish_step(run, vlm, tokenizer, optimizers, step)
    del ddp  # first: its destructor can deadlock, holding the GIL while a thread of gloo waits for it
    run.close()


# --- The step -----------------------------------------------------------------------------------------------


def caption_loss(logits: Tensor, teacher: Tensor | None, batch: data.Batch) -> dict[str, Tensor]:
    """Cross entropy of the supervised positions: a sum, which optimizer_step divides by the global count."""
    return {"loss": F.cross_entropy(logits, batch.student.targets, reduction="sum")}


def optimizer_step(run: "Run", ddp: nn.Module, micro: list, optimizers, step: int, loss_of) -> dict:
    """One step over all micro-batches and ranks; returns what the log shows, as tensors on the device.

    Every loss is a sum divided by one number, the supervised tokens of the whole step, so that 8 micro-steps
    of 1 sample equal 1 of 8 and ranks with more answers weigh more.
    """
    supervised = sum(len(batch.student.targets) for batch in micro)
    if not supervised and run.world == 1:  # all pictures of the step turned out to be broken
        return {}
    count = torch.full((), float(supervised), device=run.device)  # filled there: nothing is copied
    if run.world > 1:
        dist.all_reduce(count)
        count = count.clamp(1)
    sums = {}
    for n, batch in enumerate(micro):
        last = n == len(micro) - 1
        with nullcontext() if last or not isinstance(ddp, DistributedDataParallel) else ddp.no_sync():
            with run.autocast():
                logits, teacher, router_losses = ddp(batch)
            losses = add_penalties(run.cfg, loss_of(logits, teacher, batch), logits, router_losses)
            (losses["loss"] * (run.world / count)).backward()  # gradients are averaged over the ranks
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    rate = schedule(step, run.cfg)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = group["peak"] * rate
    norm = nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], run.cfg.clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    finite = norm.isfinite()
    for optimizer in optimizers:
        optimizer.found_inf = (~finite).float()  # at 1 AdamW's fused kernel skips the step, and so does Muon
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    means = torch.stack([*sums.values()]) / count
    if run.world > 1:
        dist.all_reduce(means)
    return {**dict(zip(sums, means)), "grad_norm": norm, "rate": rate, "finite": finite}


def add_penalties(cfg: RunConfig, losses: dict, logits: Tensor, router_losses: Tensor | None) -> dict:
    """Adds --z_loss and the experts' router losses: means, so times the number of supervised tokens."""
    loss, penalties = losses["loss"], {}
    if cfg.z_loss:
        penalties["z"] = logits.logsumexp(-1).square().sum()
        loss = loss + cfg.z_loss * penalties["z"]
    if router_losses is not None:
        penalties["balance"], penalties["router_z"] = router_losses * len(logits)
        loss = loss + cfg.balance * penalties["balance"] + cfg.router_z * penalties["router_z"]
    return {**losses, **penalties, "loss": loss}


# --- Optimizers and schedule --------------------------------------------------------------------------------


def make_optimizers(vlm: model.VLM, cfg: RunConfig) -> list[torch.optim.Optimizer]:
    """AdamW; with --muon_lr, Muon for the matrices inside the blocks. Each group knows its peak rate."""
    groups = {}
    for name, p in vlm.named_parameters():
        if p.requires_grad:
            tables = ("embed_tokens", "position", "lm_head", "isolator")
            matrix = p.ndim in (2, 4) and not any(table in name for table in tables)
            matrix = matrix or name.endswith("_proj")  # the experts' stacked ones, which Muon does not take
            inner = p.ndim == 2 and matrix and ("layers." in name or "blocks." in name)
            inner = inner and "lora_" not in name and "router" not in name
            key = (bool(cfg.muon_lr and inner), name.startswith("vit."), matrix or cfg.decay == "all")
            groups.setdefault(key, []).append(p)
    adam, muon = [], []
    for (use_muon, in_vit, decays), parameters in groups.items():
        peak = cfg.vit_lr if in_vit else cfg.lr
        if use_muon:
            peak = cfg.muon_lr * (peak / cfg.lr if cfg.lr else 1.0)
        group = {"params": parameters, "peak": peak, "weight_decay": cfg.weight_decay if decays else 0.0}
        (muon if use_muon else adam).append(group)
    optimizers = [torch.optim.AdamW(adam, lr=cfg.lr, betas=(0.9, 0.95), fused=True)] if adam else []
    return optimizers + ([Muon(muon, model.fast_dtype(parameters[0].device))] if muon else [])


class Muon(torch.optim.Optimizer):
    """Momentum whose update of every matrix is orthogonalised (Jordan et al. 2024), as in torch.optim.Muon.

    Unlike there, matrices of one shape are orthogonalised together, and in `dtype`: torch always takes
    bfloat16, which CPUs that emulate it multiply fifty times more slowly than float32.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, momentum: float = 0.95):
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum})
        self.dtype = dtype
        self.found_inf = torch.zeros(())  # 1: the step changes nothing, as in torch's fused optimizers

    @torch.no_grad()
    def step(self, closure=None) -> None:
        skips = self.found_inf > 0
        for group in self.param_groups:
            stacks = {}  # matrices of one shape, of about 2^26 numbers at a time, as they are copied
            for n, p in enumerate(group["params"]):
                if p.grad is not None:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                    stacks.setdefault((*p.shape, n * p.numel() // 2**26), []).append(p)
            for (rows, columns, _), matrices in stacks.items():
                means = [self.state[p]["momentum_buffer"] for p in matrices]
                grads = [torch.where(skips, mean, p.grad) for p, mean in zip(matrices, means)]
                means = [mean.lerp_(grad, 1 - group["momentum"]) for grad, mean in zip(grads, means)]
                nesterov = [grad.lerp(mean, group["momentum"]) for grad, mean in zip(grads, means)]
                rate = group["lr"] * math.sqrt(max(1, rows / columns))
                updates = torch.where(skips, 0.0, orthogonalise(torch.stack(nesterov).to(self.dtype)))
                kept = torch.where(skips, 1.0, 1 - group["lr"] * group["weight_decay"])
                for p, update in zip(matrices, updates):
                    p.mul_(kept).add_(update, alpha=-rate)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Near U V^T of each matrix U S V^T, (n, rows, columns), by the quintic Newton-Schulz iteration with
    Jordan's coefficients: steep at 0, so that singular values end between about 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def mm1_rate(size: int | float) -> float:
    """MM1's law of the peak rate (section 3.3); size counts the decoder's weights without embeddings."""
    return math.exp(-0.4214 * math.log(size) - 0.5535)


def schedule(step: int, cfg: RunConfig) -> float:
    """Share of the peak rate in `step`, from 0: linear warm-up to 1, a cosine to final_lr in the last one."""
    warm = max(1, round(cfg.warmup * cfg.steps))
    if step < warm:
        return (step + 1) / warm
    done = (step + 1 - warm) / max(1, cfg.steps - warm)
    return cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


# --- Flags: the command line over the recipe over defaults --------------------------------------------------

# What may differ from the weights that a run starts with, besides new experts of a dense decoder; "prune." is
# a group of flags. When a run goes on, nothing may that its data order or its optimizers depend on.
MAY_CHANGE = {
    "preset": {"vit.image_size", "vit.align_corners"},  # of halves from folders; all else is new
    "init": {"prune.", "lora."},  # and all flags of the run but --preset
    "resume": {
        *"out init resume steps micro_steps val_data workers lr vit_lr warmup final_lr weight_decay".split(),
        *"clip z_loss temperature balance router_z device dtype frozen compile recompute shard".split(),
        *"shard_ranks log_every save_every eval_every later profile".split(),
    },
}


def resolve_flags(config: type, stage: str, argv: list[str], doc: str) -> tuple:
    """(run config, model config, the checkpoint to start from or None, "preset", "init" or "resume")"""
    cfg = config()
    model.parse_cli(argv, None, cfg, model.ModelConfig())  # a first look, for where the recipe comes from
    require_one_of("--resume", cfg.resume, ("", "auto"))
    begun = bool(cfg.out) and (Path(cfg.out) / "latest").is_file()
    require(cfg.resume or not begun, f"--out {cfg.out} holds a run: add --resume auto, or choose another")
    require(cfg.init or not cfg.scale, f"--scale {cfg.scale} needs --init: the run whose tokens grow")
    origin, step, name = "preset", None, cfg.preset
    if begun or cfg.init:
        origin, step = "resume" if begun else "init", model.find_step(cfg.out if begun else cfg.init)
        saved = model.read_json(step / "config.json")
        require("train" in saved, f"{step} has no flags of a run: start from a run's checkpoint")
        name, base_model = saved["train"]["preset"], model.from_dict(model.ModelConfig, saved["model"])
    if begun:
        recipe = saved["train"]
        require(saved["stage"] == stage, f"--out {cfg.out} holds a run of stage {saved['stage']}")
    else:
        preset = model.preset(name)
        later = "pretrain_b" if stage == "pretrain" and cfg.scale else stage  # tokens are scaled up
        recipe = {**preset.get(later, preset[stage]), "preset": name}
        base_model = base_model if step else preset["model"]
    base = model.from_dict(config, {**dataclasses.asdict(config()), **recipe})
    cfg, model_cfg = model.copy_config(base), model.copy_config(base_model)
    model.parse_cli(argv, doc, cfg, model_cfg)
    given = {word.partition("=")[0][2:] for word in argv}
    require(cfg.out, "--out is missing: the run folder to write, such as runs/a")
    if getattr(cfg, "pruner", ""):  # the same choice as --prune.name: the one that changes wins
        cfg.pruner = cfg.pruner if cfg.pruner != base.pruner else model_cfg.prune.name
        model_cfg.prune.name = cfg.pruner
    flags = [flag for flag in model.changed_flags(base, cfg) if begun or flag == "preset"]
    halves = {"decoder": model_cfg.decoder_from, **dict.fromkeys(("vit", "image"), model_cfg.encoder_from)}
    dense = not begun and not base_model.decoder.experts
    may_change = MAY_CHANGE[origin] | ({*model.EXPERT_FLAGS} if dense else set())
    for flag in flags + model.changed_flags(base_model, model_cfg):
        group = flag.partition(".")[0]
        weights, free = step or halves.get(group), {flag, group + "."} & may_change
        require(free or not weights, f"--{flag} cannot change: {weights} has its own")
    require(not (cfg.batch_size and given & {"rows", "row_images"}), "--rows packs rows: add --batch_size 0")
    cfg.check()
    return cfg, model_cfg, step, origin


def resolve_device(cfg: RunConfig, device: torch.device, world: int) -> None:
    """What "auto" means on this device, and whether a step divides over the ranks."""
    if cfg.dtype == "auto":
        narrow = torch.tensor(int(model.fast_dtype(device) == torch.bfloat16), device=device)
        if dist.is_initialized():
            dist.broadcast(narrow, 0)  # ranks that measured otherwise follow the first
        cfg.dtype = "bfloat16" if narrow else "float32"
    if cfg.workers == -1:  # on a CPU the step itself takes all cores
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cfg.workers = max(1, cores - 1) if device.type == "cuda" else 1
    if cfg.compile == "auto":
        cfg.compile = "true" if device.type == "cuda" else "false"
    if cfg.dtype == "float32":
        cfg.frozen = "float32"  # without autocast a product needs both sides in one dtype
    require(not cfg.pure_bf16 or cfg.dtype == "bfloat16", "--pure_bf16 true needs --dtype bfloat16")
    if cfg.shard != "none" and world > 1:
        require(not cfg.muon_lr, f"--shard {cfg.shard}: Muon needs whole matrices, take --muon_lr 0")
        even = world % (cfg.shard_ranks or world) == 0
        require(even, f"--shard_ranks {cfg.shard_ranks} does not divide the {world} ranks: take 0 for all")
    name = "batch_size" if cfg.batch_size else "rows"
    size = getattr(cfg, name)
    micro_steps = [str(n) for n in range(1, size + 1) if size % (n * world) == 0]
    fix = f"--micro_steps {' or '.join(micro_steps)}" if micro_steps else f"a multiple of {world}"
    step = f"{cfg.micro_steps} micro-steps x {world} ranks"
    require(size % (cfg.micro_steps * world) == 0, f"--{name} {size} is not divisible by {step}: take {fix}")


# --- The start of a run -------------------------------------------------------------------------------------


def start(stage: str, config: type, argv: list[str], doc: str) -> tuple:
    """All before the first step: (Run, VLM on its device, tokenizer, flags). Nothing is written yet."""
    cfg, model_cfg, step, origin = resolve_flags(config, stage, argv, doc)
    rank, world, device = model.find_ranks(cfg.device)
    resolve_device(cfg, device, world)
    experts = model_cfg.decoder.experts and (cfg.compile, cfg.dtype) == ("true", "float32")
    require(not experts, "--compile true --dtype float32: experts compile in bfloat16 only")
    run = Run(stage, cfg, rank, world, device)
    torch.manual_seed(cfg.seed)
    sources = data.open_sources(cfg.data, stage)  # a wrong --data shows before anything is loaded
    for source, _ in sources:
        if isinstance(source, data.FileSource):  # so does a folder that has none of the pictures
            source.first_usable(source.with_pictures)
    place = int(os.environ.get("LOCAL_RANK", 0))
    turns, mesh = torch.tensor(place + 1, device=device), make_mesh(run) if run.sharded else None
    if run.sharded:
        dist.all_reduce(turns, dist.ReduceOp.MAX)
    for turn in range(int(turns)):  # sharded, a node holds one whole copy of the model at a time
        if turn == place:
            vlm, tokenizer = build_model(cfg, model_cfg, step, origin)
            run.announce(vlm, step or f"preset {cfg.preset}", sources)
            if run.sharded:
                shard(run, vlm, mesh)
            vlm.to(device)
        if run.sharded:
            dist.barrier()
    return run, vlm, tokenizer, cfg


def build_model(cfg: RunConfig, model_cfg: model.ModelConfig, step: Path | None, origin: str) -> tuple:
    """The VLM on the CPU, from the checkpoint `step` or the preset's halves, and its tokenizer."""
    if step:
        tokenizer = data.Tokenizer.from_pretrained(step / "tokenizer")
        # Frozen matrices may be saved in bfloat16, which only autocast multiplies with float32.
        vlm = model.VLM.from_pretrained(step, None if cfg.dtype == "bfloat16" else torch.float32)
        vlm.adapt(model_cfg)
    else:
        tokenizer = data.find_tokenizer(model_cfg)
        model_cfg = model.at_resolution(model_cfg, cfg.resolution)
        vlm = model.VLM.build(model_cfg, None if cfg.frozen == "bfloat16" else torch.float32)
    if cfg.scale and origin == "init":
        model.scale_up(vlm, cfg.scale, cfg.scale_init)
    model.set_resolution(vlm, cfg.resolution)
    freeze(vlm, cfg)
    if cfg.lr == -1:
        cfg.lr = mm1_rate(model.backbone_size(vlm.decoder))
    ids, rows = tokenizer.vocab_size, vlm.cfg.decoder.vocab_size
    require(ids <= rows, f"the tokenizer has {ids} ids, the decoder {rows}: give --tokenizer_from its own")
    cfg.check_room(vlm.cfg)
    return vlm, tokenizer


def freeze(vlm: model.VLM, cfg: RunConfig) -> None:
    """Freeze what does not train. Trained weights are kept in float32, frozen matrices as --frozen says."""
    vlm.set_trainable(model.trainable_parts(cfg.train), cfg.trains_isolator())
    for name, p in vlm.named_parameters():
        narrow = not p.requires_grad and cfg.frozen == "bfloat16"
        dtype = model.kept_dtype(name, p, torch.bfloat16 if narrow else torch.float32)
        p.data = p.data.to(torch.bfloat16 if cfg.pure_bf16 else dtype)


def make_mesh(run: "Run") -> DeviceMesh:
    """The ranks that share weights; with --shard_ranks in rows of so many, each of which has all (HSDP)."""
    n, kind = run.cfg.shard_ranks or run.world, run.device.type
    if n == run.world:
        return init_device_mesh(kind, (n,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (run.world // n, n), mesh_dim_names=("replicate", "shard"))


def shard(run: "Run", vlm: model.VLM, mesh: DeviceMesh) -> None:
    """FSDP2: a rank keeps its share of every weight and of its gradient and moments. A decoder block is
    gathered to run, under autocast in bfloat16 (norms and routers, too); gradients are averaged in float32.
    All else is gathered once a micro-step: a rank without pictures runs no encoder, yet all must gather
    alike. A frozen encoder stays whole on every rank.
    """
    cfg = run.cfg
    narrow, reduce = getattr(torch, cfg.dtype), {"reduce_dtype": torch.float32, "cast_forward_inputs": False}
    for block in vlm.decoder.layers:
        precision = MixedPrecisionPolicy(narrow, **reduce)
        fully_shard(block, mesh=mesh, reshard_after_forward=cfg.shard == "zero3", mp_policy=precision)
    frozen = {p for p in vlm.vit.parameters() if not p.requires_grad}
    common = {"reshard_after_forward": False, "ignored_params": frozen}
    fully_shard(vlm, mesh=mesh, mp_policy=MixedPrecisionPolicy(**reduce), **common)


def begin(run: "Run", vlm: model.VLM, optimizers) -> int:
    """The first step, 0 or where a run goes on, whose optimizers and log are restored. From here on the run
    exists on disk: every check has passed.
    """
    first, lines, log = 0, [], run.folder / "metrics.jsonl"
    if (run.folder / "latest").is_file():
        folder = model.find_step(run.folder)
        state, moments = model.read_json(folder / "state.json"), moments_of(vlm, optimizers)
        if not run.sharded:
            readers = model.open_weights(folder / "optimizer")
            for name, tensor in moments.items():
                value = readers[name]() if name in readers else None
                same = value is not None and value.shape == tensor.shape
                require(same, f"{folder / 'optimizer'}: '{name}' is missing, or of another shape")
                tensor.copy_(value)
        else:
            dcp.load(moments, storage_reader=HuggingFaceStorageReader(str(folder / "optimizer")))
        first, run.cursor = state["step"], state["cursor"]
        lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.is_file() else []
        lines = [line for line in lines if line.get("step", 0) <= first]  # later steps come again
        run.skipped += Counter(before=max((line.get("skipped", 0) for line in lines), default=0))
        run.best = min((line["val_loss"] for line in lines if "val_loss" in line), default=math.inf)
        run.say(f"resumed from {folder}")
    if run.world > 1:
        dist.barrier()  # all have read it
    if run.rank == 0:
        model.write_json(run.folder / "config.json", run.config(vlm))
        model.write_text(log, "".join(json.dumps(line) + "\n" for line in lines))
    return first


def prepare(run: "Run", vlm: model.VLM) -> nn.Module:
    """Recompute and compile block by block if asked, wrap in DDP if other ranks have the same weights."""
    blocks = [*vlm.vit.encoder["layers"], *vlm.decoder.layers]
    vlm.train()
    if run.cfg.compile == "true":
        # The compiler chooses what to keep: of what a block would keep, this share.
        budget = {"none": 1.0, "attention": 0.5, "block": 0.0}[run.cfg.recompute]
        torch._functorch.config.activation_memory_budget = budget
        torch._dynamo.config.recompile_limit = 64  # a few row shapes, with and without gradient
        torch._dynamo.config.optimize_ddp = False  # it would cut every block into pieces
        for block in blocks:
            block.compile(fullgraph=True)
    else:
        recompute(blocks, run.cfg.recompute)
    if run.world == 1 or run.sharded:
        return vlm
    ids = [run.device.index] if run.device.type == "cuda" else None
    return DistributedDataParallel(vlm, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def recompute(blocks: list[nn.Module], part: str) -> None:
    """Let blocks, or their attention alone, keep only their inputs: backward computes the rest again."""
    for block in blocks if part != "none" else ():
        module = block.self_attn if part == "attention" else block
        options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in them is drawn
        module.forward = functools.partial(checkpoint, module.forward, **options)


def load_batches(run: "Run", cfg: model.ModelConfig, tokenizer: data.Tokenizer, first: int, choose_mode):
    """The micro-batches of each step, on the device. One process plans the rows, others draw and decode."""
    sources, steps = data.open_sources(run.cfg.data, run.stage), range(first, run.cfg.steps)
    plan = data.Plan(
        sources, tokenizer, cfg, run.cfg, choose_mode, steps, run.rank, run.world, cursor=run.cursor,
        by_kind=run.stage == "pretrain", tile_multiple=8 if run.cfg.compile == "true" else 1,
        board=open_board(run),
    )  # fmt: skip
    workers, pin = run.cfg.workers if os.name == "posix" else 0, run.device.type == "cuda"
    common = {"batch_size": None, "multiprocessing_context": "fork" if workers else None}
    planner = DataLoader(plan, num_workers=min(1, workers), **common)
    ahead = {"prefetch_factor": 4 if workers else None, "pin_memory": pin}
    loader = iter(DataLoader(data.Stream(plan), sampler=planner, num_workers=workers, **ahead, **common))
    tile_flops = forward_flops(cfg)
    for _ in steps:
        began, micro = time.perf_counter(), []
        for _ in range(run.cfg.micro_steps):
            batch = next(loader)
            if isinstance(batch, UserError):
                raise batch
            run.work.update(work_of(batch, cfg, run.cfg.train, tile_flops))
            micro.append(batch.to(run.device))
        run.cursor = micro[-1].plan.cursor
        run.wait += time.perf_counter() - began
        yield micro


def open_board(run: "Run") -> tuple[str, int] | None:
    """Host and port of a store, in rank 0, on which the ranks' planners share what they draw."""
    if run.world == 1 or run.cfg.batch_size:
        return None
    host = os.environ.get("MASTER_ADDR", "localhost")
    if run.rank == 0:
        run.board = data.open_store(host, 0, is_master=True, wait_for_workers=False)
    port = torch.full((), run.board.port if run.rank == 0 else 0, device=run.device)
    dist.broadcast(port, 0)
    return host, int(port)


# --- Checkpoints and validation -----------------------------------------------------------------------------


def finish_step(run: "Run", vlm: model.VLM, tokenizer, optimizers, step: int) -> None:
    """Save before validating, so that a failure there loses nothing."""
    cfg, done = run.cfg, step + 1
    last = done == cfg.steps
    validates = cfg.eval_every and (done % cfg.eval_every == 0 or last)
    if validates or last or (cfg.save_every and done % cfg.save_every == 0):
        save(run, vlm, tokenizer, optimizers, done)
    if validates:
        spec, view = cfg.val_data or cfg.data, "pruned" if getattr(cfg, "pruner", "") else "full"
        losses = validation_loss(run, vlm.eval(), tokenizer, spec, run.stage, view)
        vlm.train()
        best = losses["all"] < run.best
        summary = ", ".join(f"{kind} {value:.4f}" for kind, value in losses.items())
        run.say(f"step {done}: validation loss of {summary}" + (" (best)" if best else ""))
        run.record(step=done, **{f"val_loss {kind}".removesuffix(" all"): x for kind, x in losses.items()})
        run.best = min(run.best, losses["all"])
        if best and run.rank == 0:
            model.write_text(run.folder / "best", f"step-{done:08d}\n")


def save(run: "Run", vlm: model.VLM, tokenizer, optimizers, done: int) -> None:
    """step-00000200/ under a temporary name, then renamed; then `latest` points to it; then older ones go.
    Rank 0 writes it, but where weights are sharded every rank its own shards, also as safetensors.
    """
    folder = run.folder / f"step-{done:08d}"
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        if run.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            vlm.save_config(temporary, {**run.config(vlm), "end_token": tokenizer.end})
            tokenizer.save(temporary / "tokenizer")
            model.write_json(temporary / "state.json", {"step": done, "cursor": run.cursor})
        for place, tensors in (("", vlm.state_dict()), ("optimizer", moments_of(vlm, optimizers))):
            if run.sharded:
                dist.barrier()
                writer = HuggingFaceStorageWriter(str(temporary / place), save_distributed=True)
                dcp.save(tensors, storage_writer=writer)  # it returns when all ranks have written
            elif run.rank == 0:
                model.write_weights(temporary / place / "model.safetensors", tensors)
    except BaseException:  # a full disk, or Ctrl-C
        if run.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if run.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        model.write_text(run.folder / "latest", folder.name + "\n")
        best = (run.folder / "best").read_text().strip() if (run.folder / "best").is_file() else ""
        for old in run.folder.glob("step-*"):
            if old.name not in (folder.name, best):
                shutil.rmtree(old)
    if run.world > 1:
        dist.barrier()


def moments_of(vlm: model.VLM, optimizers: list) -> dict[str, Tensor]:
    """The optimizers' own tensors, by the names of their weights; made first where no step was yet."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(vlm, optimizers, options=flat)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


@torch.no_grad()
def validation_loss(
    run: "Run", vlm, tokenizer, spec: str, stage: str, view: str = "full"
) -> dict[str, float]:
    """Mean loss per supervised token, on unseen scenes or --val_data: "all", and that of every kind, weighed
    as the data weighs its sources. About 128 samples in all.
    """
    sources, losses, weights = data.open_sources(spec, stage), Counter(), Counter()
    size, length, limit = max(1, 32 // len(sources)), run.cfg.row_length, run.cfg.sample_limit
    rows = data.RowConfig(batch_size=size, row_length=length, row_limit=limit)
    for source, weight in filter(lambda pair: pair[1], sources):
        unseen = data.Scenes(source.kind, "test") if isinstance(source, data.Scenes) else source
        plan = data.Plan([(unseen, 1.0)], tokenizer, vlm.cfg, rows, lambda number: view, range(4))
        stream, total, count = data.Stream(plan), 0.0, 0
        for planned in plan.micro_batches():
            batch = stream[planned].to(run.device)
            with run.autocast():
                logits, _, _ = vlm(batch)
            total += F.cross_entropy(logits, batch.student.targets, reduction="sum").item()
            count += len(logits)
        check = f"python tools/check.py {spec} says why"
        require(count, f"validation: no sample of kind {source.kind} in {spec} can be used: {check}")
        for name in ("all", source.kind):
            losses[name] += weight * total / count
            weights[name] += weight
    return {name: losses[name] / weights[name] for name in losses}


# --- What a step computes -----------------------------------------------------------------------------------

# TFLOP/s of dense bfloat16 products, from the data sheets of cards with these words in their names.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "4090": 165, "3090": 71}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the device reaches in products: a known card's by its data sheet, a CPU's measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((1e12 * peak for card, peak in PEAK_TFLOPS.items() if card in name), None)
    x = torch.ones(512, 512, dtype=dtype)
    return 2 * 512**3 / min(timeit.repeat(lambda: x @ x, number=1, repeat=20))


def forward_flops(cfg: model.ModelConfig) -> tuple[float, float]:
    """Of encoder and connector on one tile."""
    with torch.device("meta"):
        block = model.ViTBlock(cfg.vit).requires_grad_(False)
        connector = model.CONNECTORS[cfg.connector.kind](cfg).requires_grad_(False)
        positions = torch.zeros(1, cfg.side**2 + cfg.vit.cls_token, cfg.vit.width)
        patches = positions[:, int(cfg.vit.cls_token) :]
        with FlopCounterMode(display=False) as in_block:
            block(positions)
        with FlopCounterMode(display=False) as in_connector:
            connector([patches] * len(cfg.connector.levels))
    return max(cfg.connector.levels) * in_block.get_total_flops(), in_connector.get_total_flops()


def work_of(batch: data.Batch, cfg: model.ModelConfig, train: str, tile_flops: tuple) -> dict[str, float]:
    """What a micro-batch is worth: supervised tokens, all tokens, and FLOPs of the products that they need:
    forward, and backward where gradients flow. Neither padding counts nor what --recompute does twice.
    """
    d, tiles = cfg.decoder, len({*batch.full_tiles.tolist(), *batch.pruned_tiles.tolist()})
    passes = {part: 3 if part in train.split(",") else 1 for part in ("vit", "connector")}
    flops = tiles * (passes["vit"] * tile_flops[0] + passes["connector"] * tile_flops[1])
    sparse = sum(d.sparse(layer) for layer in range(d.layers))  # whose tokens meet two experts
    queries, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
    weights = d.width * (d.layers * 2 * (queries + keys) + (d.layers + sparse) * 3 * d.mlp_width)
    ends = 2 * (d.width + queries) + 2 * (d.width + keys) + 3 * (d.width + d.mlp_width)  # of adapters, whose
    weights += 1.5 * cfg.lora.rank * d.layers * ends  # three passes are counted beside two of what is frozen
    student = 3 if "decoder" in train.split(",") else 2  # backward to weights and inputs, or to inputs alone
    for rows, times in ((batch.student, student), (batch.teacher, 1)):
        if rows is not None:
            lengths = torch.bincount(rows.doc_ids[rows.doc_ids >= 0]).double()
            pairs = 2 * d.layers * queries * lengths.square().sum().item()  # causal: half of T x T
            head = 2 * len(rows.targets) * d.width * d.vocab_size
            flops += times * (2 * weights * lengths.sum().item() + head) + (3 if times > 1 else 1) * pairs
    tokens = (batch.student.doc_ids >= 0).sum().item()
    return {"supervised": len(batch.student.targets), "tokens": tokens, "flops": flops}


# --- The log ------------------------------------------------------------------------------------------------


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
    work: Counter = field(default_factory=Counter)  # since the last log line, of this rank: see `work_of`
    wait: float = 0.0  # seconds since the last log line in which the loop waited for data
    cpu_seconds: float | None = None  # of all threads, up to the last log line
    is_crowded: bool = False  # see `warn_if_crowded`
    board: object = None  # see `open_board`
    finite: list[tuple] = field(default_factory=list)  # since the last log line: see `check_finite`
    in_a_row: int = 0  # steps up to now without a finite gradient

    @property
    def folder(self) -> Path:
        return Path(self.cfg.out)

    @property
    def sharded(self) -> bool:
        return self.world > 1 and self.cfg.shard != "none"

    def config(self, vlm: model.VLM) -> dict:
        """config.json: everything needed to rebuild and repeat."""
        facts = {"stage": self.stage, "torch": torch.__version__, "world": self.world}
        return {"model": dataclasses.asdict(vlm.cfg), "train": dataclasses.asdict(self.cfg), **facts}

    def autocast(self) -> torch.autocast:
        """Without a cache of cast weights: a pass reads each once, and a teacher's have no gradient."""
        enabled = self.cfg.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled, cache_enabled=False)

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def record(self, **values) -> None:
        """A line of metrics.jsonl."""
        if self.rank == 0:
            values = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
            line = {
                k: v for k, v in values.items() if v == v and v not in (math.inf, -math.inf)
            }  # JSON has none
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")

    def announce(self, vlm: model.VLM, origin: str, sources: list) -> None:
        """In three lines before the bar: the model, its data, and the machine."""
        c, total, trained = self.cfg, 0, 0
        for p in vlm.parameters():
            total, trained = total + p.numel() / 1e6, trained + p.numel() * p.requires_grad / 1e6
        picture = f"{data.square_tokens(vlm.cfg)} tokens for a picture of {vlm.cfg.vit.image_size} px"
        self.say(f"model   {origin}: {total:,.2f}M parameters, {trained:,.2f}M train ({c.train}), {picture}")
        records = ", ".join(f"{source.name} ({source.kind}, {len(source):,})" for source, _ in sources)
        step = f"{c.batch_size} samples" if c.batch_size else f"{c.rows} rows of {c.row_length} positions"
        self.say(f"data    {records}; a step takes {step}")
        cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        fast = "faster" if f"torch.{c.dtype}" == str(model.fast_dtype(self.device)) else "slower"
        device = f"{self.world} x {self.device.type} ({cpu})"
        self.say(f"run     {c.steps} steps, rate {c.lr:.3g}, {c.dtype} (the {fast} here), {device}")

    def bar(self, first: int):
        """The numbers of the steps, behind a progress bar."""
        common = {"disable": self.rank > 0, "dynamic_ncols": True, "mininterval": 1}
        self.progress = tqdm(total=self.cfg.steps, initial=first, desc=self.stage, **common)
        self.began = self.since = time.perf_counter()
        self.first, self.samples, self.plans = first, 0, []
        self.peak = peak_flops(self.device, getattr(torch, self.cfg.dtype))
        profiler, profiled = torch.profiler.profile(), self.cfg.profile if self.rank == 0 else -1
        for step in range(first, self.cfg.steps):
            if step == profiled:
                profiler.start()
            yield step
            if profiled >= 0 and step == min(profiled + 4, self.cfg.steps - 1):
                profiler.stop()
                profiler.export_chrome_trace(str(self.folder / "trace.json"))
            self.progress.update()

    def log(self, step: int, stats: dict, micro: list[data.Batch], visual_tokens: int) -> None:
        """Bar and metrics.jsonl every log_every steps: the only place where the loop waits for the device."""
        self.samples += sum(batch.samples for batch in micro) * self.world
        self.plans += [batch.plan for batch in micro]
        if "finite" in stats:
            names = [name for batch in micro for name in batch.plan.names]
            self.finite.append((step + 1, stats["finite"], names))
        for batch in micro:
            for reason, message in batch.plan.skipped:
                if self.skipped.total() < 10:
                    tqdm.write(f"skipped, {reason}: {message}")
                self.skipped[reason] += 1
        if (step + 1) % self.cfg.log_every and step + 1 != self.cfg.steps:
            return
        self.check_finite()
        values = {name: float(value) for name, value in stats.items() if name != "finite"}
        seconds, n = time.perf_counter() - self.since, len(self.plans)
        rate, wait = self.samples / seconds, self.wait / seconds
        work = {name: self.world * x / seconds for name, x in self.work.items()}  # a second, of all ranks
        bar = {name: f"{values[name]:.3f}" for name in ("loss", "kl") if name in values}
        bar |= {"samples/s": f"{rate:.0f}", "tok/img": visual_tokens, "wait": f"{wait:.0%}"}
        speed = {"samples_per_s": rate, "seconds": seconds, "wait": wait, "visual_tokens": visual_tokens}
        speed |= {"tokens_per_s": work["tokens"], "supervised_per_s": work["supervised"]}
        speed |= {"tflops": work["flops"] / 1e12, "peak_gb": self.peak_bytes() / 1e9}
        if self.peak:
            speed["mfu"] = work["flops"] / (self.world * self.peak)
            bar["mfu"] = f"{speed['mfu']:.0%}"
        pace = (time.perf_counter() - self.began) / (step + 1 - self.first)  # seconds a step
        speed["left"] = pace * (self.cfg.steps - step - 1)
        if self.cfg.later:
            left = tqdm.format_interval(speed["left"] + pace * self.cfg.steps * self.cfg.later)
            bar["whole chain left"] = left
        self.progress.set_postfix(bar)
        rows = Counter()  # how full they were, and each kind's share of the positions
        for plan in self.plans:
            rows.update({name: share / n for name, share in plan.shares.items()})
        if self.skipped:
            rows["skipped"] = self.skipped.total()
        self.record(step=step + 1, **speed, **values, **rows)
        self.warn_if_crowded(seconds - self.wait)
        self.since, self.samples, self.wait, self.plans = time.perf_counter(), 0, 0.0, []
        self.work.clear()

    def check_finite(self) -> None:
        """Steps without a finite gradient changed nothing: they are counted, and the records that this rank
        had in them kept in a file. Ten in a row end the run.
        """
        for step, finite, names in self.finite:
            self.in_a_row = 0 if finite else self.in_a_row + 1
            if not finite:
                self.skipped["loss or gradient not finite"] += 1
                with open(self.folder / f"not_finite-{self.rank}.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, "records": names}) + "\n")
            fix = "--lr may be too large; not_finite-*.jsonl names the records, the last checkpoint is intact"
            text = f"{self.folder}: no gradient was finite in ten steps up to {step}"
            require(self.in_a_row < 10, f"{text}: {fix}")
        self.finite.clear()

    def peak_bytes(self) -> int:
        """The most memory that was held: of the GPU's, or on a CPU by the process (0 if unknown)."""
        if self.device.type == "cuda" or os.name != "posix":
            return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        import resource  # of POSIX systems only

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def warn_if_crowded(self, seconds: float) -> None:
        """Once: threads that wait for each other while another program has their core make steps up to ten
        times slower. The first interval, in which code is compiled, does not count.
        """
        used, threads = time.process_time(), torch.get_num_threads()
        share = 1.0 if self.cpu_seconds is None else (used - self.cpu_seconds) / (seconds * threads)
        self.cpu_seconds = used
        if share < 0.7 and threads > 1 and self.device.type == "cpu" and not self.is_crowded:
            self.is_crowded = True
            text = f"crowded: {threads} threads had {share:.0%} of their cores' time, others have the rest;"
            self.say(f"{text} OMP_NUM_THREADS={threads // 2} in front of the command may be faster")

    def close(self) -> None:
        self.progress.close()
        if self.skipped:  # of the plan, by rank 0 for all, and pictures that did not decode here
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.skipped.most_common())
            tqdm.write(f"skipped {reasons}: python tools/check.py {self.cfg.data} names the records")
        self.say(f"{self.stage}: {self.cfg.steps} steps done, checkpoint in {model.find_step(self.folder)}")
        if self.world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    model.run_cli(main)
