"""The two stages: exact resume, ranks, accumulation, modes, and that training lowers the loss."""

import json
import os

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

import data
import model
import train_pretrain
import train_sft

TOKENIZER = data.Tokenizer.from_pretrained(model.ASSETS / "scenes.tiktoken")
SMALL = "--batch_size 8 --row_length 128 --workers 0 --log_every 1 --dtype float32 --device cpu".split()


def small_config(**changes) -> model.ModelConfig:
    cfg = model.ModelConfig(
        vit=model.ViTConfig(image_size=32, width=32, layers=2, heads=2, mlp_width=64),
        decoder=model.DecoderConfig(TOKENIZER.vocab_size, 32, 2, 2, 1, 16, 64),
        connector=model.ConnectorConfig(levels=[1, 2], width=32, heads=2, windows=[4, 2], queries=[4, 1]),
        prune=model.PruneConfig(keep=0.5, isolator=2),
    )
    return model.dataclasses.replace(cfg, **changes)


def small_batch(picks: list[tuple[str, str]], cfg: model.ModelConfig, start: int = 0) -> data.Batch:
    """picks: (kind, mode) of each sample; number n, counted from `start`, is always the same record."""
    samples = []
    for n, (kind, _) in enumerate(picks, start):
        record = data.Scenes(kind)[int(kind == "text") * 100 + n]
        samples.append((data.pieces_of(record, TOKENIZER), data.load_images(record.images, cfg)))
    return data.make_batch(samples, [mode for _, mode in picks], cfg, 128, 512)


fast_slow_sums = train_sft.fast_slow_loss  # T = 1, weight 1


def one_step(rank: int, world: int, micro: list[data.Batch]) -> tuple[dict, dict]:
    """A plain SGD step, whose change is the gradient: new weights and the logged numbers."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vlm = model.VLM(small_config())
    vlm.set_trainable(["vit", "connector", "decoder"], isolator=True)
    cfg = train_pretrain.RunConfig(clip=1e9, warmup=0, steps=10, compile="false", dtype="float32")
    run = train_pretrain.Run("sft", cfg, rank, world, torch.device("cpu"))
    trained = [{"params": [p for p in vlm.parameters() if p.requires_grad], "peak": 1.0}]
    optimizers = [torch.optim.SGD(trained, lr=1.0)]
    stats = train_pretrain.optimizer_step(
        run, train_pretrain.prepare(run, vlm), micro, optimizers, 0, fast_slow_sums
    )
    return vlm.state_dict(), {name: float(value) for name, value in stats.items()}


MIXES = {  # what rank 0 and rank 1 hold
    "slow on one rank only": ([("chat", "slow"), ("chat", "fast")], [("chat", "fast"), ("chat", "fast")]),
    "image-free rank": ([("chat", "fast"), ("chat", "slow")], [("text", "fast"), ("text", "slow")]),
    "only slow": ([("chat", "slow")], [("chat", "slow")]),
    "no image at all": ([("text", "fast")], [("text", "fast")]),
}


def rank_main(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    results = {}
    for name, ranks in MIXES.items():
        batch = small_batch(ranks[rank], small_config(), start=rank * len(ranks[0]))
        results[name] = one_step(rank, 2, [batch])
    if rank == 0:
        torch.save(results, f"{folder}/ranks.pt")
    torch.distributed.destroy_process_group()


def assert_same(a: tuple[dict, dict], b: tuple[dict, dict]) -> None:
    for name, value in a[1].items():
        assert b[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name, weight in a[0].items():
        torch.testing.assert_close(b[0][name], weight, rtol=1e-4, atol=2e-6, msg=name)


def test_two_ranks_equal_one_process(tmp_path):
    """Losses and gradients, with fast, slow and image-free batches on one rank or on both."""
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    results = torch.load(tmp_path / "ranks.pt", weights_only=True)
    for name, ranks in MIXES.items():
        together = small_batch([*ranks[0], *ranks[1]], small_config())
        assert_same(one_step(0, 1, [together]), results[name])


def test_accumulation_equals_one_batch():
    picks = [("chat", "fast"), ("chat", "slow"), ("text", "fast")]
    assert_same(
        one_step(0, 1, [small_batch(picks, small_config())]),
        one_step(
            0, 1, [small_batch(picks[:1], small_config()), small_batch(picks[1:], small_config(), start=1)]
        ),
    )


def gradients(picks: list[tuple[str, str]], distill: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    vlm = model.VLM(small_config())
    vlm.set_trainable(["connector", "decoder"], isolator=True)
    batch = small_batch(picks, vlm.cfg)
    logits, teacher, _ = vlm(batch)
    fast_slow_sums(logits, teacher if distill else None, batch)["loss"].backward()
    return {name: p.grad for name, p in vlm.named_parameters() if p.requires_grad}


def test_isolator_learns_from_fast_samples_only():
    assert gradients([("chat", "slow"), ("chat", "slow")])["isolator.weight"].abs().max() == 0
    assert gradients([("chat", "fast")])["isolator.weight"].abs().max() > 0


def test_teacher_sees_pruned_tokens_and_carries_no_gradient():
    torch.manual_seed(0)
    vlm = model.VLM(small_config())
    slow = small_batch([("chat", "slow")], vlm.cfg)
    fast = small_batch([("chat", "fast")], vlm.cfg)
    logits, teacher, _ = vlm(slow)
    torch.testing.assert_close(teacher, vlm(fast)[0])  # the teacher is the fast view of the same sample
    assert not teacher.requires_grad and not torch.allclose(logits, teacher)
    assert slow.teacher.targets.tolist() == slow.student.targets[slow.distill].tolist()


def test_slow_loss_equals_the_formula_in_double():
    """CE, KL and the gradients of connector, isolator and decoder, from the plain formulas in fp64."""
    torch.manual_seed(0)
    vlm = model.VLM(small_config()).double()
    for p in vlm.decoder.parameters():
        p.data *= 3  # peaked attention and predictions, so that there is a KL to measure
    vlm.set_trainable(["connector", "decoder"], isolator=True)
    batch = small_batch([("chat", "slow"), ("chat", "fast")], vlm.cfg)
    logits, teacher, _ = vlm(batch)
    sums = fast_slow_sums(logits, teacher, batch)
    log_p = logits.double().log_softmax(-1)
    ce = -log_p[torch.arange(len(log_p)), batch.student.targets].sum()
    q = teacher.double().softmax(-1)
    kl = (q * (q.log() - log_p[batch.distill])).sum()
    assert sums["ce"].item() == pytest.approx(ce.item(), rel=1e-6)
    assert sums["kl"].item() == pytest.approx(kl.item(), rel=1e-4) and kl > 1e-2
    trained = [p for p in vlm.parameters() if p.requires_grad]
    ours = torch.autograd.grad(sums["loss"], trained, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(ce + kl, trained)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Killed(Exception):
    pass


REAL_STEP = train_pretrain.optimizer_step


def run_stage(stage, argv: list[str], stop: int | None, monkeypatch) -> None:
    """main(), killed at the start of step `stop` if given."""

    def step_or_die(run, ddp, micro, optimizers, step, loss_of):
        if step == stop:
            raise Killed
        return REAL_STEP(run, ddp, micro, optimizers, step, loss_of)

    monkeypatch.setattr(stage, "optimizer_step", step_or_die)
    stage.main(argv)


@pytest.mark.parametrize("stage", [train_pretrain, train_sft])
def test_resume_is_exact(stage, tmp_path, monkeypatch, small_halves):
    """Five steps, a kill at the eighth, and on from the checkpoint: the same bits as ten in one go."""
    flags = [
        *SMALL,
        *small_halves,
        *"--steps 10 --save_every 5 --muon_lr 0.01 --train vit,connector,decoder".split(),
    ]
    if stage is train_sft:
        flags += ["--slow_share", "0.5"]
    run_stage(stage, [*flags, "--out", str(tmp_path / "whole")], None, monkeypatch)
    with pytest.raises(Killed):
        run_stage(stage, [*flags, "--out", str(tmp_path / "cut")], 7, monkeypatch)
    assert (tmp_path / "cut" / "latest").read_text().strip() == "step-00000005"
    run_stage(stage, ["--out", str(tmp_path / "cut"), "--resume", "auto", *flags], None, monkeypatch)
    weights = [
        (tmp_path / run / "step-00000010" / "model.safetensors").read_bytes() for run in ("whole", "cut")
    ]
    assert weights[0] == weights[1]
    logs = [
        [json.loads(x) for x in (tmp_path / r / "metrics.jsonl").read_text().splitlines()]
        for r in ("whole", "cut")
    ]
    losses = [[(line["step"], line["loss"]) for line in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 10  # every step is told once


def test_resume_takes_new_rates_keeps_the_best_and_refuses_what_cannot_go_on(tmp_path, small_halves):
    flags = [*SMALL, *small_halves, "--muon_lr", "0", "--out", str(tmp_path / "a")]
    train_pretrain.main([*flags, *"--steps 4 --eval_every 2".split()])
    log = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    best = min(line["val_loss"] for line in log if "val_loss" in line)
    weights = load_file(model.find_step(tmp_path / "a") / "model.safetensors")
    again = [*flags, *"--resume auto --steps 6 --lr 0 --eval_every 2".split()]
    train_pretrain.main(again)
    after = load_file(model.find_step(tmp_path / "a") / "model.safetensors")
    assert all(torch.equal(weights[name], after[name]) for name in weights)  # a rate of 0 changes nothing
    state = (tmp_path / "a" / "best").read_text().strip()
    assert (tmp_path / "a" / state).is_dir() and best > 0
    config = (tmp_path / "a" / "config.json").read_text()
    for stage, extra in ((train_pretrain, ["--train", "connector"]), (train_pretrain, ["--muon_lr", "0.1"])):
        with pytest.raises(model.UserError, match="another --train or --muon_lr"):
            stage.main([*again, "--steps", "8", *extra])
    with pytest.raises(model.UserError, match="holds a run of stage pretrain"):
        train_sft.main([*SMALL, "--out", str(tmp_path / "a"), "--resume", "auto"])
    assert (tmp_path / "a" / "config.json").read_text() == config  # nothing was overwritten


def test_training_lowers_the_loss_end_to_end(tmp_path, small_halves):
    """Both stages with scaling between them, from random halves: the loss falls by a third."""
    flags = [*SMALL, "--lr", "3e-3", "--log_every", "5"]
    train_pretrain.main([*flags, *small_halves, "--steps", "60", "--out", str(tmp_path / "a")])
    log = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.66 * log[0]["loss"]
    sft = [*flags, "--init", str(tmp_path / "a"), "--scale", "32to144", "--steps", "20", "--eval_every", "20"]
    train_sft.main([*sft, "--out", str(tmp_path / "b")])
    vlm = model.VLM.from_pretrained(tmp_path / "b")
    assert vlm.cfg.visual_tokens() == 144 and vlm.cfg.side == 16
    log = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss before", "loss inflate", "loss random"} <= log[0].keys()
    assert (tmp_path / "b" / "best").read_text() == (tmp_path / "b" / "latest").read_text()
    assert np.isfinite([line["loss"] for line in log if "loss" in line]).all()


def test_stage_1_on_pruned_tokens_learns_the_isolator(tmp_path, small_halves):
    flags = [*SMALL, *small_halves, "--steps", "2", "--pruner", "grid", "--out", str(tmp_path / "a")]
    train_pretrain.main(flags)
    vlm = model.VLM.from_pretrained(tmp_path / "a")
    torch.manual_seed(0)  # the run's seed: where its isolator started
    start = model.VLM.build(model.copy_config(vlm.cfg))
    assert vlm.cfg.prune.name == "grid" and not torch.equal(vlm.isolator.weight, start.isolator.weight)
    log = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1])
    assert log["visual_tokens"] == vlm.cfg.visual_tokens("pruned")


@pytest.mark.slow
def test_compiled_blocks_have_no_graph_break(tmp_path, small_halves):
    """--compile true uses fullgraph=True, which raises on a break or on too many recompilations: training in
    both modes with a changing number of rows, validation, and generation between steps.
    """
    flags = [*SMALL, *small_halves, *"--compile true --steps 4 --slow_share 0.3 --eval_every 2".split()]
    train_sft.main([*flags, "--out", str(tmp_path / "a")])
    assert (tmp_path / "a" / "best").is_file()
