"""Stage 2: fine-tune with many visual tokens, most samples fast and a few slow (DualSpeed, arXiv 2602.03815).

    one CPU      python train_sft.py --init runs/a/pretrain --scale 32to144 --data scenes --out runs/a/sft
    one GPU      the same; one node: torchrun --nproc_per_node=8 train_sft.py ...; many: add --nnodes=N
    go on        the same command with --resume auto
    sharper      --resolution 672+split cuts a picture in four beside the whole, +unpad as LLaVA-NeXT does
    plain        --slow_share 1 --distill_weight 0 is fine-tuning on all tokens, --slow_share 0 naive pruning

A fast sample is trained on K pruned visual tokens behind the mode isolator, a slow one on all V tokens; the
teacher of a slow sample is the model itself on its pruned tokens. Model and tokenizer come with --init.
"""

import model  # isort: skip  # first of all: it answers --help before torch is loaded
import functools
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

import data
import prune
from model import require, require_at_least, require_one_of
from train_pretrain import (
    RunConfig,
    begin,
    finish_step,
    load_batches,
    make_optimizers,
    optimizer_step,
    prepare,
    start,
)


@dataclass
class SftConfig(RunConfig):
    # -- DualSpeed
    slow_share: float = 0.1  # share of samples (or batches) trained on all visual tokens
    mode: str = "sample"  # draw fast or slow for every "sample" (ours), or for every "batch" (the paper)
    temperature: float = 1.0  # of the distillation
    distill_weight: float = 1.0  # of KL beside cross entropy

    def trains_isolator(self) -> bool:
        return self.slow_share < 1

    def check(self) -> None:
        super().check()
        require_one_of("--mode", self.mode, ("sample", "batch"))
        require_at_least(self, 0, "distill_weight slow_share")
        require(self.slow_share <= 1, f"--slow_share {self.slow_share} is not a share between 0 and 1")
        require(self.temperature > 0, f"--temperature {self.temperature}: must be above 0")
        batch = self.mode == "sample" or self.batch_size
        require(batch, "--mode batch draws once for a number of samples: add --batch_size 32 or so")


def main(argv: list[str]) -> None:
    run, vlm, tokenizer, cfg = start("sft", SftConfig, argv, __doc__)
    if not cfg.init and cfg.resume != "auto":
        run.say("no --init: fine-tuning starts from a connector that stage 1 never aligned")
    optimizers = make_optimizers(vlm, cfg)
    first = begin(run, vlm, optimizers)
    ddp = prepare(run, vlm)

    def choose_mode(number: int) -> str:
        """One draw a sample, or one for a whole optimizer step: all ranks and micro-steps."""
        draw = number if cfg.mode == "sample" else number // cfg.batch_size
        mode = prune.draw_mode(cfg.seed, draw, cfg.slow_share)
        return "full" if mode == "slow" and cfg.distill_weight == 0 else mode  # without a teacher

    loss = functools.partial(fast_slow_loss, temperature=cfg.temperature, weight=cfg.distill_weight)
    batches = load_batches(run, vlm.cfg, tokenizer, first, choose_mode)
    full, pruned = data.square_tokens(vlm.cfg), data.square_tokens(vlm.cfg, "pruned")
    mean_tokens = round(cfg.slow_share * full + (1 - cfg.slow_share) * pruned)
    run.say(f"{1 - cfg.slow_share:.0%} fast on {pruned} visual tokens ({vlm.cfg.prune.name}), slow on {full}")
    for step in run.bar(first):
        micro = next(batches)
        stats = optimizer_step(run, ddp, micro, optimizers, step, loss)
        run.log(step, stats, micro, mean_tokens)
        finish_step(run, vlm, tokenizer, optimizers, step)
    del ddp  # first: its destructor can deadlock, holding the GIL while a thread of gloo waits for it
    run.close()


def fast_slow_loss(
    logits: Tensor, teacher: Tensor | None, batch: data.Batch, temperature: float = 1.0, weight: float = 1.0
) -> dict[str, Tensor]:
    """Sums over supervised positions: cross entropy of all samples, KL(teacher || student) of slow ones."""
    ce = F.cross_entropy(logits, batch.student.targets, reduction="sum")
    if teacher is None:
        return {"loss": ce, "ce": ce, "kl": ce.new_zeros(())}
    kl = prune.distillation_sum(logits[batch.distill], teacher, temperature)
    return {"loss": ce + weight * kl, "ce": ce, "kl": kl}


if __name__ == "__main__":
    model.run_cli(main)
