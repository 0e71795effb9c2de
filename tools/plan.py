"""What a preset costs before anything is downloaded: parameters, tokens, FLOPs, memory and hours.

    python tools/plan.py --preset 7b --gpus 8
    python tools/plan.py --preset llava-1.5 --peak_tflops 312 --slow_share 1      on A100, all samples slow
    python tools/plan.py --preset siglip2-qwen2.5-0.5b --gpus 1 --lora.rank 64 --train connector,lora

All is counted on torch's meta device, so no weights are needed: matrix products only, causal attention not
halved, no recomputation, no padding; one block is counted and taken times the layers. The model's flags
(--prune.keep, --connector.plan, --lora.rank, ...) change the plan, and so do those of the recipes below.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model
import prune
import train_pretrain
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
# Under autocast residuals, norms and rotations stay float32: measured 1.6 (a Qwen2.5 block) to 2.0 (a small
# VLM) times the bytes that pure bfloat16 keeps.
AUTOCAST = 1.8
# Bytes of a trained weight: float32 weight, gradient and two moments (16), and autocast's bfloat16 copy (2).
TRAINED_BYTES = 18
# FlopCounterMode does not know grouped_mm: (rows, in) times (E, in, out), or (in, rows) times (rows, out).
GROUPED_MM = {torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1]}


@dataclass
class PlanConfig:
    # -- plan
    preset: str = "tiny"  # a file of assets/presets
    gpus: int = 8  # in all
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

    def check(self) -> None:
        model.require_at_least(self, 1, "gpus")
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


def count(run: Callable[[], Tensor], positions: int = 0) -> tuple[float, float]:
    """FLOPs of forward and backward of `run`, and the bytes that its backward pass keeps; all on meta.

    Weights are not counted, nor the T x T attention probabilities (of `positions`), which fused attention
    never stores.
    """
    kept = {}

    def pack(x: Tensor) -> Tensor:
        is_weight = isinstance(x if x._base is None else x._base, nn.Parameter)
        if x.is_floating_point() and not is_weight and x.shape[-2:] != (positions, positions):
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with FlopCounterMode(display=False, custom_mapping=GROUPED_MM) as counter, hooks:
        out = run()
        stored = sum(kept.values())
        if out.requires_grad:
            out.sum().backward()
    return float(counter.get_total_flops()), float(stored)


def sample_cost(
    cfg: ModelConfig, train: list[str], text: int, mode: str, tiles: int, recompute: str = "none"
) -> tuple[dict, float]:
    """FLOPs of each of COUNTED, and kept bytes, of a sample with one picture of so many tiles and `text`
    tokens. mode: full, pruned, or slow (full, and a teacher's forward on the pruned view).
    """
    model.require_one_of("mode", mode, ("full", "pruned", "slow"))
    view, flops = "pruned" if mode == "pruned" else "full", {}
    with torch.device("meta"):
        flops["vit"], patches, vit_bytes = encoder_cost(cfg, "vit" in train, tiles, recompute)
        flops["connector"], connector_bytes = connector_cost(cfg, "connector" in train, view, patches)
        blocks = decoder_blocks(cfg, train)
        train_pretrain.recompute(blocks.layers, recompute)
        costs = decoder_cost(cfg, blocks, view, text, tiles, recompute)
        flops["decoder"], flops["head"], decoder_bytes = costs
        if mode == "slow":
            with torch.no_grad():
                flops["teacher"] = sum(decoder_cost(cfg, blocks, "pruned", text, tiles)[:2])
    return flops, AUTOCAST * (vit_bytes + connector_bytes + decoder_bytes)


def encoder_cost(
    cfg: ModelConfig, trains: bool, tiles: int, recompute: str = "none"
) -> tuple[float, Tensor, float]:
    """FLOPs of the encoder up to the highest level that is read, patches of that shape, kept bytes."""
    vit = cfg.vit
    block = model.ViTBlock(vit).bfloat16().requires_grad_(trains)
    positions = cfg.side**2 + vit.cls_token
    states = torch.zeros(tiles, positions, vit.width).bfloat16().requires_grad_(trains)
    train_pretrain.recompute([block], recompute)
    flops, kept = count(lambda: block(states), positions)
    kept += states.nbytes if recompute != "none" and trains else 0
    stem = 2 * tiles * cfg.side**2 * 3 * vit.patch_size**2 * vit.width * (2 if trains else 1)
    depth = max(cfg.connector.levels)
    return depth * flops + stem, states[:, int(vit.cls_token) :], depth * kept


def connector_cost(cfg: ModelConfig, trains: bool, view: str, patches: Tensor) -> tuple[float, float]:
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
    cfg: ModelConfig, blocks: model.Decoder, view: str, text: int, tiles: int, recompute: str = "none"
) -> tuple[float, float, float]:
    """FLOPs of all blocks, FLOPs of the head at the text's positions, kept bytes."""
    c = cfg.decoder
    sparse = sum(c.sparse(layer) for layer in range(c.layers))
    T = text + cfg.visual_tokens(view, tiles)
    x = torch.zeros(1, T, c.width).bfloat16().requires_grad_()
    rope, mask = model.rope_tables(torch.zeros(1, T), c), torch.zeros(1, 1, T, T, dtype=torch.bool)
    flops = kept = again = 0.0
    for block, times in zip(blocks.layers, (c.layers - sparse, sparse)):
        block_flops, block_kept = count(lambda block=block: block(x, rope, mask)[0], T)
        if (
            recompute != "none"
        ):  # every block keeps its input; while one is computed again, that one keeps all
            block_kept += x.nbytes
            again = max(again, count(lambda block=block: type(block).forward(block, x, rope, mask)[0], T)[1])
        flops, kept = flops + times * block_flops, kept + times * block_kept
    head, _ = count(lambda: blocks.head(x[:, :text]))
    logits = 3 * 4 * text * c.vocab_size  # in float32: they, log-softmax, gradient
    return flops, head, kept + again + logits / AUTOCAST


# ---------------------------------------------------------------------------------------------------------
# The stages of a preset


@dataclass
class Stage:
    """One stage of a preset, as the plan sees it."""

    name: str
    cfg: ModelConfig
    train: list[str]
    samples: dict[str, float]  # mode -> share of the samples
    flags: dict  # its recipe

    @property
    def text(self) -> int:
        return STAGE2_TEXT if self.name == "2" else STAGE1_TEXT

    @property
    def recompute(self) -> str:
        return self.flags.get("recompute", "none")

    @property
    def tiles(self) -> int:
        """Of one picture, the most that the cut gives: that of a large square."""
        side = 2 * self.cfg.vit.image_size
        return data.tile_count(self.cfg, (side, side))

    @property
    def micro(self) -> int:
        """Samples of a micro-batch, over all GPUs: with one picture each, as many as its rows take."""
        samples = self.flags.get("batch_size")
        if not samples:
            length, images = self.flags.get("row_length", 256), self.flags.get("row_images", 16)
            tokens = 0.0
            for mode, share in self.samples.items():
                tokens += share * self.cfg.visual_tokens("pruned" if mode == "pruned" else "full", self.tiles)
            per_row = min(int(length / (tokens + self.text)), images // self.tiles)
            samples = self.flags.get("rows", 16) * max(1, per_row)
        return samples // self.flags.get("micro_steps", 1)

    def cost(self, text: int) -> tuple[dict, float]:
        """FLOPs by part of a mean sample of one picture, and the most bytes that a sample keeps."""
        total, most_kept = {}, 0.0
        for mode, share in self.samples.items():
            flops, kept = sample_cost(self.cfg, self.train, text, mode, self.tiles, self.recompute)
            most_kept = max(most_kept, kept)
            for part, number in flops.items():
                total[part] = total.get(part, 0.0) + share * number
        return total, most_kept

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

    def state_bytes(self, sizes: dict) -> tuple[float, float]:
        """Weights, gradients and moments on one GPU under DDP: as the stage trains, and with LoRA 64."""
        trained = sum(trained for _, trained in sizes.values())
        frozen = sum(total for total, _ in sizes.values()) - trained
        plain = TRAINED_BYTES * trained + (2 if self.flags.get("frozen") == "bfloat16" else 4) * frozen
        decoder = sizes["decoder"][1] + sizes["embeddings"][1]
        c = self.cfg.decoder
        if not decoder or c.experts:
            return plain, plain
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        adapters = 64 * c.layers * (2 * (c.width + q) + 2 * (c.width + kv) + 3 * (c.width + c.mlp_width))
        return plain, plain - (TRAINED_BYTES - 2) * decoder + TRAINED_BYTES * adapters


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
        flags, stage_cfg = dict(values[recipe]), cfg if recipe == "pretrain" else later
        if plan and plan.micro_steps:
            flags["micro_steps"] = plan.micro_steps
        for flag in RECIPE_FLAGS.get(recipe, ()) if plan else ():
            flags[flag] = getattr(plan, flag)
        if cfg.connector.kind == values["model"].connector.kind:  # else the recipe's may not fit
            stage_cfg = model.at_resolution(stage_cfg, flags.get("resolution", ""))
        train = model.trainable_parts(flags["train"])
        if not {"lora", "decoder"} & {*train}:
            stage_cfg = dataclasses.replace(stage_cfg, lora=model.LoraConfig())
        stages.append(Stage(name, stage_cfg.check(), train, shares_of(recipe, flags), flags))
    return stages


def shares_of(recipe: str, flags: dict) -> dict[str, float]:
    """Mode -> share of a stage's samples."""
    if recipe != "sft":
        return {"pruned" if flags.get("pruner") else "full": 1.0}
    slow = flags.get("slow_share", 0.1)
    has_teacher = flags.get("distill_weight", 1.0) > 0
    shares = {"pruned": 1 - slow, "slow" if has_teacher else "full": slow}
    return {mode: share for mode, share in shares.items() if share}


# ---------------------------------------------------------------------------------------------------------
# The page


def print_plan(cfg: ModelConfig, plan: PlanConfig) -> None:
    """What a preset trains, sees, computes, keeps and takes, and what the papers' ideas are worth in it."""
    values = model.preset(plan.preset)
    stages = stages_of(values, cfg, plan)
    print(f"preset {plan.preset}: {values['source']}\nnot from there, ours: {values['ours']}\n")
    if "scale" in values and not grows(values, cfg):
        print(f"its tokens are not scaled up: {values['scale']} does not fit these flags")
    sizes = [stage.part_sizes() for stage in stages]
    print_parameters(stages, sizes)
    if cfg.decoder.experts:
        print(f"  {expert_sizes(cfg.decoder)}\n  ({values.get('reported', 'not from a paper')})")
    print_tokens(stages)
    kept = print_flops(stages)
    print_memory(stages, sizes, kept, plan.gpus)
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


def print_flops(stages: list[Stage]) -> list[float]:
    """Returns the bytes that a sample of each stage keeps for its backward pass."""
    print("\nTFLOP a sample".ljust(31) + "".join(part.rjust(11) for part in (*COUNTED, "all")))
    kept = []
    for stage in stages:
        flops, bytes_kept = stage.cost(stage.text)
        kept.append(bytes_kept)
        numbers = [flops.get(part, 0.0) for part in COUNTED] + [sum(flops.values())]
        cells = "".join(f"{number / 1e12:11.3f}" for number in numbers)
        print(f"  stage {stage.name}, {stage.text} of text".ljust(30) + cells)
    return kept


def print_memory(stages: list[Stage], sizes: list[dict], kept: list[float], gpus: int) -> None:
    columns = ("DDP", "FSDP2", "LoRA 64")
    print(
        f"\nGB on each of {gpus}".ljust(31) + "".join(name.rjust(11) for name in columns)
        + "   and activations of a sample, of a micro-batch"
    )  # fmt: skip
    for stage, size, bytes_kept in zip(stages, sizes, kept):
        ddp, lora = stage.state_bytes(size)
        micro = bytes_kept * max(1, stage.micro // gpus)
        cells = "".join(f"{x / 1e9:11.1f}" for x in (ddp, ddp / gpus, lora, bytes_kept, micro))
        print(f"  stage {stage.name}".ljust(30) + cells)
    again = ", ".join(f"{stage.recompute} in stage {stage.name}" for stage in stages)
    print(f"  FSDP2 is not built here yet; computed again for backward: {again}")


def print_hours(stages: list[Stage], plan: PlanConfig) -> None:
    speed = plan.gpus * plan.peak_tflops * 1e12 * plan.mfu
    title = f"\n{plan.gpus} x {plan.peak_tflops:g} TFLOP/s at {plan.mfu:.0%}"
    print(title.ljust(47) + "samples/s      hours")
    for workload, samples, text in WORKLOADS:
        flops = 0.0
        for stage_name, number in samples.items():  # a preset without stage 1b sees all pairs in stage 1
            stage = next((stage for stage in stages if stage.name == stage_name), stages[0])
            flops += number * sum(stage.cost(text)[0].values())
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
    return sample_cost(cfg, stage1.train, STAGE1_TEXT, "full", 1)[0]


def dualspeed_ratio(stage1: Stage, stage2: Stage, text: int, tiles: int) -> float:
    """FLOPs of a full sample over those of DualSpeed's mean one, on 24 x 24 patches through an MLP."""
    cfg = changed_config(stage1.cfg, 24 * stage1.cfg.vit.patch_size, kind="mlp")
    flops = {}
    for mode in ("full", "pruned", "slow"):
        flops[mode] = sum(sample_cost(cfg, stage2.train, text, mode, tiles)[0].values())
    return flops["full"] / (0.9 * flops["pruned"] + 0.1 * flops["slow"])


def changed_config(cfg: ModelConfig, pixels: int, **connector) -> ModelConfig:
    vit = dataclasses.replace(cfg.vit, image_size=pixels)
    connector = dataclasses.replace(cfg.connector, plan="", **connector)
    pruner = model.PruneConfig(keep=0.1)
    return dataclasses.replace(cfg, vit=vit, connector=connector, prune=pruner)


if __name__ == "__main__":
    model.run_cli(main)
