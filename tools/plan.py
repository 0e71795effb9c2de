"""What a preset costs before anything is downloaded: parameters, tokens, FLOPs, memory and hours.

    python tools/plan.py --preset 7b --gpus 8
    python tools/plan.py --preset llava-1.5 --peak_tflops 312 --slow_share 1      on A100, all samples slow
    python tools/plan.py --preset siglip2-qwen2.5-0.5b --gpus 1 --gb 24 --lora.rank 64 --train connector,lora
    python tools/plan.py --cards                          the flags with which each preset fits which GPUs

All is counted on torch's meta device, so no weights are needed: matrix products only, causal attention not
halved, no padding; one block is counted and taken times the layers. The model's flags (--prune.keep,
--connector.plan, ...) change the plan, and so do those of the recipes below.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model
import prune
import train_pretrain
import train_sft
from model import ModelConfig

STAGE1_TEXT, STAGE2_TEXT = 23, 200  # tokens of text in a sample, about: LLaVA's captions, its conversations
WORKLOADS = (  # name, samples in each stage, text tokens of a sample: what the hours are given for
    ("LLaVA-Pretrain 558k", {"1": 558_128}, 23),  # captions of 14 tokens on average, and their template
    ("LLaVA mix665k", {"2": 665_298}, 200),
    ("Chain-of-Sight's 65M pairs", {"1": 120_000 * 512, "1b": 30_000 * 128}, 23),
    ("MM1: 200k steps of 512 rows of 4096", {"1": 200_000 * 512 * 14}, 148),  # half text, half images of 144
    ("MM1: 10k steps of 256", {"2": 2_560_000}, 200),
)
COUNTED = ("vit", "connector", "decoder", "head", "teacher")  # what sample_cost counts
# GPUs for which --cards looks for flags: how many, GB of each, dense bfloat16 TFLOP/s (RTX 4090, H100).
CARDS = ((1, 24, 165.0), (1, 80, 989.0), (8, 80, 989.0), (16, 80, 989.0))
SHARDS = ("zero2", "zero3")
USABLE = 0.92  # of a GPU's memory: the rest goes to its driver, and is lost between tensors
# float32 numbers for each logit, at the most: a student's own, their log-softmax and its gradient; a teacher
# adds its own, those of the student for the same answers, both log-softmaxes and the terms of the KL.
STUDENT_LOGITS, TEACHER_LOGITS = 3, 6
# FlopCounterMode does not know grouped_mm: (rows, in) times (E, in, out), or (in, rows) times (rows, out).
GROUPED_MM = {torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1]}


@dataclass
class PlanConfig:
    # -- plan
    preset: str = "tiny"  # a file of assets/presets
    gpus: int = 8  # in all; above 8: nodes of 8
    gb: int = 80  # memory of each, in GB
    peak_tflops: float = 989.0  # of one GPU, dense bfloat16: 989 H100, 312 A100
    mfu: float = 0.4  # share of it that a run reaches
    micro_steps: int = 0  # of every stage; 0: its recipe's
    # -- recipes (by default the preset's)
    pruner: str = ""  # of stage 1: all samples on tokens pruned by this pruner; "" for all tokens
    train: str = "connector,decoder"  # what trains in stage 2: connector,lora with --lora.rank 64
    slow_share: float = 0.1  # of stage 2: share of samples on all visual tokens
    distill_weight: float = 1.0  # of stage 2; above 0: slow samples have a teacher's pass, too
    resolution: str = ""  # of stage 2, size and cut of pictures: SIDE, SIDE+CUT or +CUT
    recompute: str = "none"  # of stage 2: attention, or each block, is computed again on the way back
    # -- instead
    cards: bool = False  # a table of all presets: on which GPUs, with which flags, in how many hours

    def check(self) -> None:
        model.require_at_least(self, 1, "gpus gb")
        model.require(self.gpus <= 8 or self.gpus % 8 == 0, f"--gpus {self.gpus}: nodes have 8 each")
        model.require_at_least(self, 0, "micro_steps slow_share distill_weight")
        model.require_one_of("--recompute", self.recompute, ("none", "attention", "block"))
        model.require(self.slow_share <= 1, f"--slow_share {self.slow_share} is no share between 0 and 1")
        model.require(self.mfu > 0, f"--mfu {self.mfu} must be above 0")
        model.require(self.peak_tflops > 0, f"--peak_tflops {self.peak_tflops} must be above 0")


SFT_FLAGS = ("train", "slow_share", "distill_weight", "resolution", "recompute")
RECIPE_FLAGS = {"pretrain": ("pruner",), "sft": SFT_FLAGS}


def main(argv: list[str]) -> None:
    plan = PlanConfig()
    model.parse_cli(argv, None, plan, ModelConfig())  # a first look: which preset?
    if plan.cards and not {"-h", "--help"} & {*argv}:
        return print_cards()
    values = model.preset(plan.preset)
    for recipe, names in RECIPE_FLAGS.items():
        for name in names:
            setattr(plan, name, values[recipe].get(name, getattr(PlanConfig, name)))
    cfg = values["model"]
    model.parse_cli(argv, __doc__, plan, cfg)
    plan.check()
    print_plan(cfg, plan)


# ---------------------------------------------------------------------------------------------------------
# Counting one sample


def count(run: Callable[[], Tensor]) -> float:
    """FLOPs of forward and backward of `run`, on meta."""
    with FlopCounterMode(display=False, custom_mapping=GROUPED_MM) as counter:
        out = run()
        if out.requires_grad:
            out.sum().backward()
    return float(counter.get_total_flops())


def sample_cost(
    cfg: ModelConfig, train: list[str], text: int, mode: str, tiles: int, recompute: str = "none"
) -> dict[str, float]:
    """FLOPs of each of COUNTED, of a sample with one picture of so many tiles and `text` tokens. mode: full,
    pruned, or slow (full, and a teacher's forward on the pruned view).
    """
    model.require_one_of("mode", mode, ("full", "pruned", "slow"))
    view, flops = "pruned" if mode == "pruned" else "full", {}
    with torch.device("meta"):
        flops["vit"], patches = encoder_cost(cfg, "vit" in train, tiles, recompute)
        flops["connector"] = connector_cost(cfg, "connector" in train, view, patches)
        blocks = decoder_blocks(cfg, train)
        train_pretrain.recompute(blocks.layers, recompute)
        flops["decoder"], flops["head"] = decoder_cost(cfg, blocks, view, text, tiles)
        if mode == "slow":
            with torch.no_grad():
                flops["teacher"] = sum(decoder_cost(cfg, blocks, "pruned", text, tiles))
    return flops


def encoder_cost(cfg: ModelConfig, trains: bool, tiles: int, recompute: str = "none") -> tuple[float, Tensor]:
    """FLOPs of the encoder up to the highest level that is read, and patches of that shape."""
    vit = cfg.vit
    block = model.ViTBlock(vit).bfloat16().requires_grad_(trains)
    positions = cfg.side**2 + vit.cls_token
    states = torch.zeros(tiles, positions, vit.width).bfloat16().requires_grad_(trains)
    train_pretrain.recompute([block], recompute)
    flops = count(lambda: block(states))
    stem = 2 * tiles * cfg.side**2 * 3 * vit.patch_size**2 * vit.width * (2 if trains else 1)
    return max(cfg.connector.levels) * flops + stem, states[:, int(vit.cls_token) :]


def connector_cost(cfg: ModelConfig, trains: bool, view: str, patches: Tensor) -> float:
    connector = model.CONNECTORS[cfg.connector.kind](cfg).bfloat16().requires_grad_(trains)
    where = prune.PRUNERS[cfg.prune.name].where if view == "pruned" else ""
    inputs = [[patches] * len(cfg.connector.levels)]
    if where == "scales":  # these two spare the connector work: see VLM.bank
        inputs.append(cfg.coarse_scales())
    elif where == "patches":
        inputs[0] = [patches[:, : cfg.kept_tokens()]]
    return count(lambda: connector(*inputs))


def decoder_blocks(cfg: ModelConfig, train: list[str]) -> model.Decoder:
    """A decoder of one dense block and, with experts, a sparse one."""
    layers = 2 if cfg.decoder.experts else 1
    blocks = model.Decoder(dataclasses.replace(cfg.decoder, layers=layers, expert_every=2))
    if cfg.lora.rank:
        model.add_lora(blocks, cfg.lora)
    blocks.bfloat16()
    for name, p in blocks.named_parameters():
        p.requires_grad_("decoder" in train or ("lora" in train and ".lora_" in name))
    return blocks


def decoder_cost(
    cfg: ModelConfig, blocks: model.Decoder, view: str, text: int, tiles: int
) -> tuple[float, float]:
    """FLOPs of all blocks, FLOPs of the head at the text's positions."""
    c = cfg.decoder
    sparse = sum(c.sparse(layer) for layer in range(c.layers))
    T = text + cfg.visual_tokens(view, tiles)
    x = torch.zeros(1, T, c.width).bfloat16().requires_grad_()
    rope, mask = model.rope_tables(torch.zeros(1, T), c), torch.zeros(1, 1, T, T, dtype=torch.bool)
    flops = 0.0
    for block, times in zip(blocks.layers, (c.layers - sparse, sparse)):
        flops += times * count(lambda block=block: block(x, rope, mask)[0])
    return flops, count(lambda: blocks.head(x[:, :text]))


# ---------------------------------------------------------------------------------------------------------
# The most memory that a step takes on each GPU: formulas, whose parts one block and the connector tell. What
# a block keeps for its backward pass is measured without data, under autocast, at two lengths: what does not
# grow with them are bfloat16 copies of weights. tests/cases_memory.py traces whole steps beside it.


@dataclass
class Load:
    """What a micro-batch of one GPU holds."""

    tiles: int  # of all pictures
    positions: int  # of all rows, padding too
    supervised: int
    taught: int = 0  # of these, those that a teacher sees, too


def kept_bytes(run, parameters) -> float:
    """Bytes that the backward pass of run() keeps, without the weights themselves."""
    kept, weights = {}, {p.untyped_storage()._cdata for p in parameters}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    del out
    return float(sum(kept.values()))


def line(run, parameters, size: int) -> tuple[float, float]:
    """(bytes that do not grow, bytes for each unit) of what run(size) keeps."""
    one, two = (kept_bytes(lambda n=n: run(n), parameters) for n in (size, 2 * size))
    return 2 * one - two, (two - one) / size


def trainable(module: nn.Module, flags: dict, trains: bool) -> nn.Module:
    """A module made on "meta", with fake weights, the dtypes and the gradients of a run."""
    adapters = "lora" in flags["train"].split(",")
    for prefix, part in module.named_modules():
        for name, p in part._parameters.items():
            if p is not None:
                learns = trains or (adapters and name.startswith("lora_"))
                narrow = flags["pure_bf16"] or (not learns and flags["frozen"] == "bfloat16")
                kept = model.kept_dtype(f"{prefix}.{name}", p, torch.bfloat16 if narrow else torch.float32)
                dtype = torch.bfloat16 if flags["pure_bf16"] else kept
                part._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype), learns)
    return module


def block_lines(cfg: model.ModelConfig, flags: dict, recompute: str) -> list[tuple[float, float]]:
    """`line` of a dense and, with experts, of a sparse block, by positions."""
    layers = 2 if cfg.decoder.experts else 1
    lines = []
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False), gpu_attention():
        with torch.device("meta"):
            decoder = model.Decoder(dataclasses.replace(cfg.decoder, layers=layers, expert_every=2))
            if cfg.lora.rank:
                model.add_lora(decoder, cfg.lora)
        trainable(decoder, flags, "decoder" in flags["train"].split(","))
        train_pretrain.recompute(decoder.layers, recompute)

        def run(T: int, block: nn.Module) -> Tensor:
            x = torch.zeros(1, T, cfg.decoder.width, requires_grad=True)
            rope = model.rope_tables(torch.zeros(1, T), cfg.decoder)
            return block(x, rope, None)[0]

        for block in decoder.layers:
            lines.append(line(lambda T, block=block: run(T, block), [*block.parameters()], 128))
    return lines


def gpu_attention():
    """Attention in bfloat16, as GPUs have it."""
    return mock.patch.object(torch.Tensor, "is_cpu", False, create=True)


def encoder_line(cfg: model.ModelConfig, flags: dict) -> tuple[float, float]:
    """`line` of a trained encoder's block, by tiles."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False), gpu_attention():
        with torch.device("meta"):
            block = model.ViTBlock(cfg.vit)
        trainable(block, flags, True)
        train_pretrain.recompute([block], flags["recompute"])
        P = cfg.side**2 + cfg.vit.cls_token
        run = lambda n: block(torch.zeros(n, P, cfg.vit.width, requires_grad=True))  # noqa: E731
        return line(run, [*block.parameters()], 1)


def connector_line(cfg: model.ModelConfig, flags: dict) -> tuple[float, float]:
    """`line` of the connector, by tiles."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False), gpu_attention():
        with torch.device("meta"):
            connector = model.CONNECTORS[cfg.connector.kind](cfg)
        trainable(connector, flags, True)
        grad = "vit" in flags["train"].split(",")
        patches = lambda n: torch.zeros(n, cfg.side**2, cfg.vit.width, requires_grad=grad)  # noqa: E731
        run = lambda n: connector([patches(n)] * len(cfg.connector.levels))  # noqa: E731
        return line(run, [*connector.parameters()], 1)


class Peak:
    """The peak of a model that trains with these flags (all of a run's) on so many GPUs: `at` any load."""

    def __init__(self, cfg: model.ModelConfig, flags: dict, gpus: int):
        self.cfg, self.flags, self.gpus = cfg, flags, gpus
        self.train = flags["train"].split(",")
        self.ranks = (flags["shard_ranks"] or gpus) if flags["shard"] != "none" else 1  # that share weights
        with torch.device("meta"):
            vlm = model.VLM(model.copy_config(cfg))
        vlm.set_trainable(self.train, isolator=True)
        self.number = 2 if flags["pure_bf16"] else 4  # bytes of what trains
        self.trained = dict.fromkeys(("block", "root", "encoder"), 0)  # a frozen encoder is not sharded
        self.weights = dict(self.trained)  # bytes
        for name, p in vlm.named_parameters():
            part = "encoder" if name.startswith("vit.") and not p.requires_grad else "root"
            part = "block" if name.startswith("decoder.layers.") else part
            narrow = not p.requires_grad and flags["frozen"] == "bfloat16" and p.ndim > 1
            self.trained[part] += p.numel() * p.requires_grad
            self.weights[part] += p.numel() * (2 if narrow else self.number)
        self.blocks = [sum(p.numel() for p in block.parameters()) for block in vlm.decoder.layers]
        self.lines = block_lines(cfg, flags, flags["recompute"])
        self.again = (0.0, 0.0)
        if flags["recompute"] == "block":  # while one is computed again, it keeps all
            self.again = max(block_lines(cfg, flags, "none"), key=sum)
        self.connector = self.encoder = (0.0, 0.0)
        if {"connector", "vit"} & {*self.train}:
            self.connector = connector_line(cfg, flags)
        if "vit" in self.train:
            self.encoder = tuple(max(cfg.connector.levels) * x for x in encoder_line(cfg, flags))

    def at(self, load: Load) -> dict[str, float]:
        """Bytes by what takes them, when they are the most: where backward begins, where it has left the
        decoder, or at the update; "all" is their sum.
        """
        c, full, shared = self.cfg.decoder, self.number, self.ranks > 1
        trained = sum(self.trained.values())
        weights = (self.weights["block"] + self.weights["root"]) / self.ranks + self.weights["encoder"]
        state = {"weights": weights, "moments": 2 * full * trained / self.ranks}
        gradients = full * trained / self.ranks
        sparse = sum(c.sparse(layer) for layer in range(c.layers))
        first = {
            "activations": (self.connector[1] + self.encoder[1]) * load.tiles,
            "copies": self.connector[0] + self.encoder[0],
        }
        head = c.width * c.vocab_size * ("decoder" in self.train)
        activations = first["activations"] + self.again[1] * load.positions
        copies = first["copies"] + 2 * head + (0 if shared else self.again[0])
        for (fixed, each), layers in zip(self.lines, (c.layers - sparse, sparse)):
            activations += layers * each * load.positions
            copies += 0 if shared else layers * fixed  # sharded, blocks are gathered in bfloat16
        logits = 4.0 * c.vocab_size * (STUDENT_LOGITS * load.supervised + TEACHER_LOGITS * load.taught)
        begins = {**state, "activations": activations, "copies": copies, "logits": logits}
        ends = {**state, **first, "gradients": gradients}
        if shared:  # blocks in bfloat16, of one the gradient, also in float32; all else, with its gradient
            here = sum(self.blocks) if self.flags["shard"] == "zero2" else 2 * max(self.blocks)
            gradient = 6 * max(self.blocks) if self.trained["block"] else 0
            begins["gathered"] = 2 * here + gradient + self.weights["root"] + full * head
            ends["gathered"] = self.weights["root"] + full * self.trained["root"]
        elif self.gpus > 1:
            begins["gradients"] = gradients  # DDP's buckets are there all the time
        update = {**state, "gradients": gradients}
        most = max(begins, ends, update, key=lambda parts: sum(parts.values()))
        return {**most, "all": sum(most.values())}


# ---------------------------------------------------------------------------------------------------------
# The stages of a preset


@dataclass
class Stage:
    """One stage of a preset, as the plan sees it."""

    name: str
    cfg: ModelConfig
    train: list[str]
    samples: dict[str, float]  # mode -> share of the samples
    flags: dict  # of the run: its recipe over the defaults
    recipe: dict  # the flags without what the command line of the plan changes
    given: dict  # flags of the model that differ from the preset

    @property
    def text(self) -> int:
        return STAGE2_TEXT if self.name == "2" else STAGE1_TEXT

    @property
    def size(self) -> int:
        """Samples or rows of an optimizer step."""
        return self.flags["batch_size"] or self.flags["rows"]

    @property
    def recompute(self) -> str:
        return self.flags["recompute"]

    @property
    def tiles(self) -> int:
        """Of one picture, the most that the cut gives: that of a large square."""
        side = 2 * self.cfg.vit.image_size
        return data.tile_count(self.cfg, (side, side))

    @property
    def largest(self) -> str:
        """The mode whose samples take the most."""
        return max(self.samples, key=("pruned", "full", "slow").index)

    def in_a_row(self) -> int:
        """Samples of the largest mode, with one picture each, that share a row."""
        view = "pruned" if self.largest == "pruned" else "full"
        positions = self.cfg.visual_tokens(view, self.tiles) + self.text
        fit = min(self.flags["row_length"] // positions, self.flags["row_images"] // self.tiles)
        return max(1, fit)

    def load(self, gpus: int) -> Load:
        """The largest micro-batch of a GPU. What is left of packed rows is text, of which all is learned."""
        view = "pruned" if self.largest == "pruned" else "full"
        visual, flags = self.cfg.visual_tokens(view, self.tiles), self.flags
        share = max(1, self.size // (flags["micro_steps"] * gpus))  # of a GPU's micro-batch
        samples = share * (1 if flags["batch_size"] else self.in_a_row())
        positions = samples * (visual + self.text)
        if not flags["batch_size"]:
            positions = max(positions, share * flags["row_length"])
        taught = samples * self.text if self.largest == "slow" else 0
        return Load(samples * self.tiles, positions, positions - samples * visual, taught)

    def cost(self, text: int) -> dict[str, float]:
        """FLOPs by part of a mean sample of one picture."""
        total = {}
        for mode, share in self.samples.items():
            flops = sample_cost(self.cfg, self.train, text, mode, self.tiles, self.recompute)
            for part, number in flops.items():
                total[part] = total.get(part, 0.0) + share * number
        return total

    def peak(self, gpus: int) -> Peak:
        """What it takes of each GPU, at any load."""
        return Peak(self.cfg, self.flags, gpus)

    def fitting(self, gpus: int, gb: int) -> dict | None:
        """Flags beside the recipe's with which this stage fits: of those the ones that cost the least time.
        Where the whole of a pre-trained decoder does not, its adapters train; None if they do not fit either.
        """
        size, changes = self.size, [{}]
        if "decoder" in self.train and self.cfg.decoder_from:
            changes += [{"train": ",".join({**dict.fromkeys(self.train), "lora": 0}).replace("decoder,", ""),
                         "frozen": "bfloat16", "lora.rank": 64}]  # fmt: skip
        modes = [{}]
        for ranks in (8, 0) if gpus > 8 else (0,) * (gpus > 1):  # of a node, of all
            modes += [{"shard": shard, "shard_ranks": ranks} for shard in SHARDS]
        micro_steps = [n for n in range(1, size + 1) if size % (n * gpus) == 0]
        for change in changes:
            for recompute in ("none", "block"):
                for mode in modes:
                    peak = self.changed({**change, **mode, "recompute": recompute}).peak(gpus)
                    for n in micro_steps:
                        flags = {**change, **mode, "recompute": recompute, "micro_steps": n}
                        if peak.at(self.changed(flags).load(gpus))["all"] <= USABLE * 1e9 * gb:
                            flags = self.flags | self.given | flags
                            order = dict.fromkeys([*self.given, *change, *mode, *flags])
                            return {k: flags[k] for k in order if flags[k] != self.recipe.get(k)}
        return None

    def changed(self, flags: dict) -> "Stage":
        cfg = self.cfg
        if "lora.rank" in flags:
            cfg = dataclasses.replace(cfg, lora=model.LoraConfig(flags["lora.rank"]))
        flags = {**self.flags, **flags}
        return dataclasses.replace(self, cfg=cfg, flags=flags, train=model.trainable_parts(flags["train"]))

    def part_sizes(self) -> dict[str, tuple[int, int]]:
        """Part -> (parameters, those that train)."""
        with torch.device("meta"):
            vlm = model.VLM(model.copy_config(self.cfg))
        vlm.set_trainable(self.train, isolator=True)
        sizes = {}
        for name, p in vlm.named_parameters():
            part = "lora" if ".lora_" in name else name.split(".")[0]
            if "embed_tokens" in name or "lm_head" in name:
                part = "embeddings"
            total, trained = sizes.get(part, (0, 0))
            sizes[part] = (total + p.numel(), trained + p.numel() * p.requires_grad)
        return sizes


def grows(values: dict, cfg: ModelConfig) -> bool:
    """Whether the preset's scaling step still fits: a flag may have changed the connector."""
    kinds = cfg.connector.kind, values["model"].connector.kind
    return "scale" in values and kinds == ("chain", "chain") and cfg.scales() == values["model"].scales()


def stages_of(values: dict, cfg: ModelConfig, plan: PlanConfig | None = None) -> list[Stage]:
    """Stage 1, perhaps 1b, and 2 of a preset, each with the config it has by then; plan: its flags win."""
    later = model.scaled_config(cfg, values["scale"]) if grows(values, cfg) else cfg
    stages = []
    for name, recipe in (("1", "pretrain"), ("1b", "pretrain_b"), ("2", "sft")):
        if recipe not in values:
            continue
        defaults = train_sft.SftConfig if recipe == "sft" else train_pretrain.PretrainConfig
        base = {**dataclasses.asdict(defaults()), **values[recipe]}
        flags = dict(base)
        stage_cfg = cfg if recipe == "pretrain" else later
        if plan and plan.micro_steps:
            flags["micro_steps"] = plan.micro_steps
        for flag in RECIPE_FLAGS.get(recipe, ()) if plan else ():
            flags[flag] = getattr(plan, flag)
        if cfg.connector.kind == values["model"].connector.kind:  # else the recipe's may not fit
            stage_cfg = model.at_resolution(stage_cfg, flags["resolution"])
        train = model.trainable_parts(flags["train"])
        if not {"lora", "decoder"} & {*train}:
            stage_cfg = dataclasses.replace(stage_cfg, lora=model.LoraConfig())
        given = {}
        for flag, (config, field, *_) in model.flags_of(cfg).items():
            may = flag.startswith("prune.") or (flag.startswith("lora.") == ("lora" in train))
            may = may and (recipe == "pretrain" or flag.startswith(("prune.", "lora.")))
            if may and flag in model.changed_flags(values["model"], cfg):
                given[flag] = getattr(config, field)
        if (
            recipe != "pretrain"
            and grows(values, cfg)
            and (recipe == "pretrain_b" or "pretrain_b" not in values)
        ):
            given["scale"] = values["scale"]
        stages.append(
            Stage(name, stage_cfg.check(), train, shares_of(recipe, flags), flags, base, given)
        )  # fmt: skip
    return stages


def shares_of(recipe: str, flags: dict) -> dict[str, float]:
    """Mode -> share of a stage's samples."""
    if recipe != "sft":
        return {"pruned" if flags["pruner"] else "full": 1.0}
    slow, has_teacher = flags["slow_share"], flags["distill_weight"] > 0
    shares = {"pruned": 1 - slow, "slow" if has_teacher else "full": slow}
    return {mode: share for mode, share in shares.items() if share}


# ---------------------------------------------------------------------------------------------------------
# The page


def print_plan(cfg: ModelConfig, plan: PlanConfig) -> None:
    """What a preset trains, sees, computes, keeps and takes, and what the papers' ideas are worth in it."""
    values = model.preset(plan.preset)
    stages = stages_of(values, cfg, plan)
    for stage in stages:
        text = f"stage {stage.name}: {stage.size} samples or rows a step do not divide by {plan.gpus} GPUs"
        model.require(stage.size % plan.gpus == 0, text)
    print(f"preset {plan.preset}: {values['source']}\nnot from there, ours: {values['ours']}\n")
    if "scale" in values and not grows(values, cfg):
        print(f"its tokens are not scaled up: {values['scale']} does not fit these flags")
    sizes = [stage.part_sizes() for stage in stages]
    print_parameters(stages, sizes)
    if cfg.decoder.experts:
        print(f"  {expert_sizes(cfg.decoder)}\n  ({values.get('reported', 'not from a paper')})")
    print_tokens(stages)
    print_flops(stages)
    print_memory(stages, plan)
    print_hours(stages, plan)
    print("\nwhat the papers' ideas save here (FLOPs), beside what they report (time, 7B behind CLIP-L)")
    for line in savings(stages[0], stages[-1]):
        print(f"  {line}")


def print_parameters(stages: list[Stage], sizes: list[dict]) -> None:
    print("parameters (millions)".ljust(30) + "".join(f"stage {s.name}, trained".rjust(22) for s in stages))
    totals = [{**size, "all": tuple(map(sum, zip(*size.values())))} for size in sizes]
    parts = dict.fromkeys(part for size in totals for part in size)
    for part in parts:
        line = f"  {part}".ljust(30)
        for size in totals:
            total, trained = size.get(part, (0, 0))
            line += f"{total / 1e6:,.1f}, {trained / 1e6:,.1f}".rjust(22)
        print(line)


def expert_sizes(cfg: model.DecoderConfig) -> str:
    """How many parameters the experts make of a dense backbone, and how many of them a token meets."""
    with torch.device("meta"):
        decoder = model.Decoder(cfg)
    backbone = [p for name, p in decoder.named_parameters() if "lm_head" not in name and "embed" not in name]
    total = sum(p.numel() for p in backbone)
    experts = sum(p.numel() for p in backbone if p.ndim == 3)
    active = total - experts * (cfg.experts - 2) // cfg.experts
    sparse = sum(cfg.sparse(layer) for layer in range(cfg.layers))
    return (
        f"{cfg.experts} experts in {sparse} of {cfg.layers} layers: a decoder of {total / 1e6:,.1f}, "
        f"{active / 1e6:,.1f} active for a token, dense {model.backbone_size(decoder) / 1e6:,.1f}"
    )


def print_tokens(stages: list[Stage]) -> None:
    print("\nvisual tokens a tile")
    for stage in stages:
        c = stage.cfg
        modes = ", ".join(f"{share:.0%} {mode}" for mode, share in stage.samples.items())
        tokens = f"full {c.visual_tokens()}, pruned {c.visual_tokens('pruned')}"
        print(
            f"  stage {stage.name}: {c.vit.image_size} px, {c.side**2} patches; {tokens}; "
            f"tiles a picture {stage.tiles}, in all {c.visual_tokens('full', stage.tiles)}; samples {modes}"
        )


def print_flops(stages: list[Stage]) -> None:
    print("\nTFLOP a sample".ljust(31) + "".join(part.rjust(11) for part in (*COUNTED, "all")))
    for stage in stages:
        flops = stage.cost(stage.text)
        numbers = [flops.get(part, 0.0) for part in COUNTED] + [sum(flops.values())]
        cells = "".join(f"{number / 1e12:11.3f}" for number in numbers)
        print(f"  stage {stage.name}, {stage.text} of text".ljust(30) + cells)


def print_memory(stages: list[Stage], plan: PlanConfig) -> None:
    columns = ("weights", "moments", "gradients", "gathered", "copies", "activations", "logits", "all")
    title = f"\nGB on each of {plan.gpus} at the peak"
    print(title.ljust(31) + "".join(name.rjust(12) for name in columns))
    for stage in stages:
        parts = stage.peak(plan.gpus).at(stage.load(plan.gpus))
        cells = "".join(f"{parts.get(name, 0.0) / 1e9:12.1f}" for name in columns)
        print(f"  stage {stage.name}".ljust(30) + cells)
        flags = stage.fitting(plan.gpus, plan.gb)
        print(f"    on {plan.gb} GB: {command(stage, plan.preset, flags, plan.gpus)}")


def command(stage: Stage, preset: str, flags: dict | None, gpus: int) -> str:
    if flags is None:
        return "does not fit"
    script = "train_sft.py" if stage.name == "2" else "train_pretrain.py"
    nodes = f"--nnodes={gpus // 8} --node_rank=R --master_addr=H " if gpus > 8 else ""
    start = f"torchrun {nodes}--nproc_per_node={min(gpus, 8)}" if gpus > 1 else "python"
    origin = f"--preset {preset}" if stage.name == "1" else "--init RUN"
    words = [f"--{name} {value}" for name, value in {**flags, "data": "DATA", "out": "OUT"}.items()]
    return " ".join([start, script, origin, *words])


def print_cards() -> None:
    """Markdown: every preset for GPUs on CARDS; tools/README.md holds it."""
    print("| preset | GPUs | flags of stage 1 | flags of stage 2 | hours |\n|---|---|---|---|---|")
    for name in model.preset_names():
        for line in card_rows(name) if not name.startswith("tiny") else ():
            print(line, flush=True)


def card_rows(name: str) -> list[str]:
    """Those of the GPUs that one of its stages fits."""
    values, lines = model.preset(name), []
    for gpus, gb, tflops in CARDS:
        cells, flops = [], 0.0
        stages = stages_of(values, values["model"])
        for stage, (_, samples, text) in zip((stages[0], stages[-1]), WORKLOADS):
            flags = stage.fitting(gpus, gb)
            shown = {k: v for k, v in (flags or {}).items() if k != "scale"}
            cells.append("does not fit" if flags is None else flags_text(shown))
            flops += sum(samples.values()) * sum(stage.changed(flags or {}).cost(text).values())
        hours = flops / (gpus * tflops * 1e12 * PlanConfig.mfu) / 3600
        if cells != ["does not fit"] * 2:
            cells.append("" if "does not fit" in cells else f"{hours:,.1f}")
            lines.append(f"| {name} | {gpus} x {gb} GB | {' | '.join(cells)} |")
    return lines


def flags_text(flags: dict) -> str:
    return "`" + " ".join(f"--{name} {value}" for name, value in flags.items()) + "`" if flags else "its own"


def print_hours(stages: list[Stage], plan: PlanConfig) -> None:
    speed = plan.gpus * plan.peak_tflops * 1e12 * plan.mfu
    title = f"\n{plan.gpus} x {plan.peak_tflops:g} TFLOP/s at {plan.mfu:.0%}"
    print(title.ljust(47) + "samples/s      hours")
    for workload, samples, text in WORKLOADS:
        flops = 0.0
        for stage_name, number in samples.items():  # a preset without stage 1b sees all pairs in stage 1
            stage = next((stage for stage in stages if stage.name == stage_name), stages[0])
            flops += number * sum(stage.cost(text).values())
        seconds = flops / speed
        print(f"  {workload}".ljust(44) + f"{sum(samples.values()) / seconds:11,.0f}{seconds / 3600:11,.1f}")


def savings(stage1: Stage, stage2: Stage) -> list[str]:
    """What the papers' two ideas are worth with these halves, in FLOPs, beside what they report.

    What they report is time, with a 7B decoder behind CLIP-L: no halves but those can be expected to match.
    """
    few = [resampler_flops(stage1, tokens) for tokens in (32, 48, 80, 336)]
    totals = [sum(flops.values()) for flops in few]
    ratios = " / ".join(f"{total / totals[-1]:.2f}" for total in totals)
    fixed = (few[0]["vit"] + few[0]["connector"]) / totals[0]
    lines = [
        f"Chain-of-Sight, stage 1 with 32 / 48 / 80 / 336 tokens and 23 of text: {ratios}",
        "  reported: 0.27 / 0.35 / 0.42 / 1.00 of the time (steps 30 % shorter, batches 2.5 times larger)",
        f"  encoder and connector, which fewer tokens do not shrink, are {fixed:.0%} of the FLOPs at 32 here",
    ]
    for tiles, reported in (
        (1, "576 tokens (LLaVA-1.5): reported 2.1"),
        (5, "5 x 576 (LLaVA-NeXT): reported 4.0"),
    ):
        at_200, at_100, at_300 = (dualspeed_ratio(stage1, stage2, text, tiles) for text in (200, 100, 300))
        lines.append(f"DualSpeed, one in ten slow, 200 of text: {at_200:.1f} times on {reported} (time)")
        lines.append(f"  {at_100:.1f} at 100 of text, {at_300:.1f} at 300: its own lengths are not known")
    return lines


def resampler_flops(stage1: Stage, tokens: int) -> dict[str, float]:
    """FLOPs of a stage-1 sample if the connector were a plain resampler with so many tokens."""
    cfg = changed_config(stage1.cfg, stage1.cfg.vit.image_size, kind="resampler", tokens=tokens)
    return sample_cost(cfg, stage1.train, STAGE1_TEXT, "full", 1)


def dualspeed_ratio(stage1: Stage, stage2: Stage, text: int, tiles: int) -> float:
    """FLOPs of a full sample over those of DualSpeed's mean one, on 24 x 24 patches through an MLP."""
    cfg = changed_config(stage1.cfg, 24 * stage1.cfg.vit.patch_size, kind="mlp")
    flops = {}
    for mode in ("full", "pruned", "slow"):
        flops[mode] = sum(sample_cost(cfg, stage2.train, text, mode, tiles).values())
    return flops["full"] / (0.9 * flops["pruned"] + 0.1 * flops["slow"])


def changed_config(cfg: ModelConfig, pixels: int, **connector) -> ModelConfig:
    vit = dataclasses.replace(cfg.vit, image_size=pixels)
    connector = dataclasses.replace(cfg.connector, plan="", **connector)
    pruner = model.PruneConfig(keep=0.1)
    return dataclasses.replace(cfg, vit=vit, connector=connector, prune=pruner)


if __name__ == "__main__":
    model.run_cli(main)
