"""A step of stage 2 against DualSpeed's formulas, written out in fp64, a sample at a time, without our code.

Ours divides the sums of CE and KL by the supervised tokens of the whole step: with samples of one mode alone
these are the paper's means over answer tokens; a mixed step weighs every sample by its answers.
"""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, Killed, on_two_ranks, small_run
from torch import Tensor
from torch.testing import assert_close

import data
import model
import prune
import train_pretrain
import train_sft

# --- The reference: from patches of the ViT to loss and gradients. w: weights by name; T positions, D width.
HEADS, KV_HEADS, HEAD, LAYERS, EPS = 4, 2, 8, 2, 1e-6
THETA = 256.0  # its powers are exact in fp32, which is what our rotations are computed in
IGNORE = -100


def diverse(tokens: Tensor, keep: int) -> list[int]:
    """DivPrune by its rule: the token whose nearest other is farthest, then the farthest from all picked."""
    unit = tokens.detach() / tokens.detach().norm(dim=-1, keepdim=True)
    apart = (1 - unit @ unit.T).tolist()
    every, picked = range(len(apart)), []
    while len(picked) < keep:
        among = {i: [j for j in picked or every if j != i] for i in every if i not in picked}
        picked.append(max(among, key=lambda i: min(apart[i][j] for j in among[i])))
    return sorted(picked)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def llama(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Embeddings (T, D) of one sequence to logits (T, N)."""
    w = {name.removeprefix("decoder."): value for name, value in w.items()}
    angle = torch.arange(len(x)).double()[:, None] * THETA ** (-torch.arange(0, HEAD, 2).double() / HEAD)

    def turn(a: Tensor) -> Tensor:  # number i of the first half and of the second are a pair
        z = torch.complex(*a.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)  # (T, HEAD / 2)
        return torch.cat([z.real, z.imag], -1)

    later = torch.ones(len(x), len(x)).triu(1).bool()
    for n in range(LAYERS):
        h = rms_norm(x, w[f"layers.{n}.input_layernorm.weight"])
        q, k, v = (h @ w[f"layers.{n}.self_attn.{name}_proj.weight"].T for name in "qkv")
        q, k, v = (part.split(HEAD, -1) for part in (q, k, v))
        heads = []
        for i in range(HEADS):
            j = i // (HEADS // KV_HEADS)
            score = turn(q[i]) @ turn(k[j]).T / math.sqrt(HEAD)
            heads.append(score.masked_fill(later, -math.inf).softmax(-1) @ v[j])
        x = x + torch.cat(heads, -1) @ w[f"layers.{n}.self_attn.o_proj.weight"].T
        h = rms_norm(x, w[f"layers.{n}.post_attention_layernorm.weight"])
        gate, up, down = (w[f"layers.{n}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        gated = h @ gate.T
        x = x + (gated * torch.sigmoid(gated) * (h @ up.T)) @ down.T
    return rms_norm(x, w["norm.weight"]) @ w["lm_head.weight"].T


def answer_rows(w: dict, pieces: list, visual: list[Tensor], limit: int | None) -> tuple[Tensor, list[int]]:
    """Logits at i - 1 for every label i, and the labels; `limit` cuts the sequence on the right."""
    x, labels = [], []
    for piece in pieces:
        ids, learnt = ([], False) if isinstance(piece, int) else piece
        x.append(visual[piece] if isinstance(piece, int) else w["decoder.embed_tokens.weight"][ids])
        labels += ids if learnt else [IGNORE] * len(x[-1])
    at = [i for i, label in enumerate(labels[:limit]) if i and label != IGNORE]
    return llama(w, torch.cat(x)[:limit])[[i - 1 for i in at]], [labels[i] for i in at]


def reference(vlm, picks, temperature=1.0, weight=1.0, limit=512) -> dict:
    """Losses as means over all labels, how many there are, how many the teacher has, gradients by name."""
    w = {name: p.detach().double().clone().requires_grad_() for name, p in vlm.state_dict().items()}
    ce, kl, count, taught = 0.0, torch.zeros(()).double(), 0, 0
    for (pieces, pixels), mode in picks:
        full, pruned = [], []
        for patches in vlm.levels(vlm.states(torch.from_numpy(pixels)))[-1].detach() if len(pixels) else ():
            h = patches @ w["connector.fc1.weight"].T + w["connector.fc1.bias"]
            h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
            full.append(h @ w["connector.fc2.weight"].T + w["connector.fc2.bias"])
            kept = diverse(full[-1], round(len(full[-1]) * vlm.cfg.prune.keep))
            pruned.append(torch.cat([w["isolator.weight"], full[-1][kept]]))
        student, labels = answer_rows(w, pieces, pruned if mode == "pruned" else full, limit)
        ce = ce - student.log_softmax(-1)[range(len(labels)), labels].sum()
        count += len(labels)
        if mode == "slow" and full:
            teacher = answer_rows(w, pieces, pruned, None)[0].detach()[: len(labels)]  # the shorter sequence
            q, p = ((logits / temperature).softmax(-1) for logits in (student, teacher))
            kl = kl + temperature**2 * (p * (p / q).log()).sum()
            taught += len(labels)
    loss = (ce + weight * kl) / count
    loss.backward()
    means = {"loss": loss.item(), "ce": ce.item() / count, "kl": kl.item() / count}
    return {**means, "count": count, "taught": taught, "grads": {name: p.grad for name, p in w.items()}}


# --- Ours: flags of main, the model, samples, and the step as train_sft.py takes it
FLAGS = [*SMALL, *"--clip 1e9 --muon_lr 0 --connector.kind mlp".split()]


def tiny_vlm(**changes) -> model.VLM:
    """Llama's shape, an mlp on 6x6 patches, of which 9 are kept; weights so large that outputs vary."""
    torch.manual_seed(0)
    vlm = model.VLM(model.ModelConfig(
        vit=model.ViTConfig(image_size=48, patch_size=8, width=24, layers=2, heads=2, mlp_width=32),
        connector=model.ConnectorConfig("mlp", levels=[1]),
        decoder=model.DecoderConfig(61, 32, LAYERS, HEADS, KV_HEADS, HEAD, 48, THETA, tied=False),
        prune=dataclasses.replace(model.PruneConfig("divprune", 0.25, 4), **changes),
    ))  # fmt: skip
    for name, p in vlm.named_parameters():
        if p.numel() and not name.startswith("isolator"):
            torch.nn.init.normal_(p, float(p.ndim == 1), 1 if "embed" in name else 1.5 * p[0].numel() ** -0.5)
    vlm.set_trainable(["connector", "decoder"], isolator=True)
    return vlm.double()


SAMPLES = {  # numbers are pictures, others (length, is it learnt?)
    "one": [(3, False), 0, (4, False), (5, True)],
    "talk": [(2, False), 0, (3, False), (4, True), (3, False), (1, True), (4, False), (6, True), (2, False)],
    "two": [(2, False), 0, (3, False), (2, True), (2, False), 1, (4, False), (5, True)],
    "caption": [0, (6, True)],  # its first label is told by the last visual token
    "text": [(6, False), (4, True)],
}


def load(picks: str) -> list[tuple[tuple, str]]:
    """ "one:pruned two:slow" -> ((pieces, pixels), mode) of each, random but the same every time."""
    loaded = []
    for n, pick in enumerate(picks.split()):
        name, mode = pick.split(":")
        rng, spec = np.random.default_rng(len(name) + 100 * n), SAMPLES[name]
        pieces = [p if isinstance(p, int) else (rng.integers(0, 61, p[0]).tolist(), p[1]) for p in spec]
        images = sum(isinstance(piece, int) for piece in spec)
        loaded.append(((pieces, rng.integers(0, 256, (images, 3, 48, 48), dtype=np.uint8)), mode))
    return loaded


def take_step(run: train_pretrain.Run, vlm: model.VLM, picks: list, loss_of, limit: int = 512) -> tuple:
    """The batch, the logged numbers, and the gradients by name, which this optimizer leaves as they are."""
    samples, modes = map(list, zip(*picks))
    batch = data.make_batch(samples, modes, vlm.cfg, 128, limit)
    trained = {name: p for name, p in vlm.named_parameters() if p.requires_grad}
    groups = [{"params": [*trained.values()], "peak": 0.0}]
    still = SimpleNamespace(param_groups=groups, step=lambda: None, zero_grad=lambda set_to_none: None)
    ddp = train_pretrain.prepare(run, vlm)
    stats = train_pretrain.optimizer_step(run, ddp, [batch], [still], 0, loss_of)
    return batch, {name: float(x) for name, x in stats.items()}, {n: p.grad for n, p in trained.items()}


def assert_equals(expected: dict, stats: dict, grads: dict) -> None:
    """To 1e-5 of each gradient's largest entry: ours is in fp64 but for logits, losses and rotations."""
    losses = {name: expected[name] for name in ("loss", "ce", "kl")}
    assert {name: stats[name] for name in losses} == pytest.approx(losses, rel=1e-6, abs=1e-9)
    assert {name.split(".")[0] for name in grads} == {"connector", "isolator", "decoder"}
    for name, ours in grads.items():
        theirs = torch.zeros_like(ours) if expected["grads"][name] is None else expected["grads"][name]
        largest = max(theirs.abs().flatten().tolist(), default=0.0)
        assert_close(ours, theirs, rtol=0, atol=1e-5 * largest, msg=lambda told: f"{name}: {told}")


@pytest.fixture
def stage2(tmp_path, small_halves):
    """flags -> what train_sft.main has in hand as its first step begins: run, vlm, data, loss_of."""

    def catch(flags: str) -> dict:
        caught = {}

        def stop(run, ddp, micro, optimizers, step, loss_of):
            run.progress.close()
            caught.update(run=run, vlm=ddp, loss_of=loss_of)
            raise Killed

        def keep(*arguments):  # run, model config, tokenizer, first step, choose_mode
            caught["data"] = arguments
            return iter([[]])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_sft, "load_batches", keep)
            patch.setattr(train_sft, "optimizer_step", stop)
            with pytest.raises(Killed):
                train_sft.main([*FLAGS, *small_halves, "--out", str(tmp_path / "caught"), *flags.split()])
        return caught

    return catch


# --- Losses and gradients
@pytest.mark.parametrize("picks, flags, limit", [
    ("talk:pruned", "", 512),
    ("talk:slow", "", 512),
    ("talk:slow", "--temperature 2", 512),
    ("two:slow caption:slow", "--distill_weight 0.5", 512),
    ("two:pruned caption:pruned", "", 512),
    ("talk:slow one:slow", "--distill_weight 0", 512),
    ("one:pruned talk:slow text:slow caption:slow two:pruned text:pruned two:slow", "", 512),
    ("caption:slow two:pruned one:slow text:slow", "--temperature 2 --distill_weight 0.5", 512),
    ("text:slow", "", 512),  # the same input twice has nothing to teach
    ("talk:slow one:pruned caption:slow", "", 55),  # cuts the last of three answers
    ("one:pruned talk:slow", "--temperature 2", 53),  # ends where that answer begins
    ("talk:slow one:pruned", "", 40),  # leaves the slow sample no answer at all
])  # fmt: skip
def test_a_step_equals_the_formulas(picks, flags, limit, stage2):
    vlm, loaded, caught = tiny_vlm(), load(picks), stage2(flags)
    batch, stats, grads = take_step(caught["run"], vlm, loaded, caught["loss_of"], limit)
    cfg = caught["run"].cfg
    expected = reference(vlm, loaded, cfg.temperature, cfg.distill_weight, limit)
    assert_equals(expected, stats, grads)
    assert len(batch.student.targets) == expected["count"]
    assert (expected["kl"] > 0.05) == (expected["taught"] > 0)
    assert (batch.teacher is None) == (picks == "text:slow" or "slow" not in picks)
    if batch.teacher is not None:  # rows of both belong to the same answer tokens
        assert len(batch.teacher.targets) == expected["taught"]
        assert torch.equal(batch.teacher.targets, batch.student.targets[batch.distill])
    assert (expected["count"] < reference(vlm, loaded)["count"]) == (limit < 512)
    has_pruned = any(mode == "pruned" and len(pixels) for (_, pixels), mode in loaded)
    assert (grads["isolator.weight"].abs().max() > 0) == has_pruned  # exactly 0 where none is


@pytest.mark.parametrize("isolator", [0, 4])
def test_all_tokens_teach_nothing_but_the_isolator(isolator, stage2):
    vlm, loaded, caught = tiny_vlm(keep=1.0, isolator=isolator), load("talk:slow two:slow"), stage2("")
    _, stats, grads = take_step(caught["run"], vlm, loaded, caught["loss_of"])
    assert_equals(reference(vlm, loaded), stats, grads)
    assert stats["kl"] > 1e-3 if isolator else abs(stats["kl"]) < 1e-10


RANKS = "talk:slow two:slow caption:pruned one:pruned"  # two of rank 0, which has a teacher, two of rank 1


def step_of_rank(rank: int) -> tuple[dict, dict]:
    mine = load(RANKS)[2 * rank : 2 * rank + 2]
    return take_step(small_run(rank, 2, clip=1e9), tiny_vlm(), mine, train_sft.fast_slow_loss)[1:]


def test_two_ranks_equal_the_formulas(tmp_path):
    expected = reference(tiny_vlm(), load(RANKS))
    for stats, grads in on_two_ranks(step_of_rank, tmp_path):
        assert_equals(expected, stats, grads)


# --- Modes
ENDS = [("--slow_share 0", "pruned"), ("--slow_share 1 --distill_weight 0", "full")]


@pytest.mark.parametrize("flags, mode", ENDS)
def test_the_ends_are_naive_pruning_and_plain_fine_tuning(flags, mode, stage2, tmp_path, small_halves):
    """Three steps of main against a loop by hand over the same samples, all in one mode: the same weights."""
    flags += " --steps 3 --weight_decay 0"
    train_sft.main([*FLAGS, *small_halves, *flags.split(), "--out", str(tmp_path / "run")])
    caught = stage2(flags)
    vlm, before = caught["vlm"], caught["vlm"].isolator.weight.detach().clone()
    batches = train_pretrain.load_batches(*caught["data"][:4], lambda number: mode)
    adam = torch.optim.AdamW(vlm.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    cosine = (1.0, 0.55, 0.1)  # to a tenth of the rate
    for (batch,), rate in zip(itertools.islice(batches, 3), cosine, strict=True):
        logits, teacher, _ = vlm(batch)
        assert batch.teacher is None and teacher is None
        adam.zero_grad()
        targets = batch.student.targets
        (F.cross_entropy(logits, targets, reduction="sum") * (1 / len(targets))).backward()
        adam.param_groups[0]["lr"] = caught["run"].cfg.lr * rate
        adam.step()
    trained = model.VLM.from_pretrained(tmp_path / "run").state_dict()
    for name, weight in vlm.state_dict().items():
        assert_close(trained[name], weight, rtol=0, atol=1e-7, msg=lambda text: f"{name}: {text}")
    assert torch.equal(trained["isolator.weight"], before) == (mode == "full")


class StreamWithPlan(data.Stream):
    def __getitem__(self, planned):
        batch = super().__getitem__(planned)
        batch.plan = planned  # with its rows
        return batch


def draw(arguments: tuple, world: int) -> list[tuple[int, int, str]]:
    """(step, number, mode) of every sample of a run as all its ranks load it."""
    places = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "Stream", StreamWithPlan)
        for rank in range(world):
            run = dataclasses.replace(arguments[0], rank=rank, world=world)
            for batch in itertools.chain(*train_pretrain.load_batches(run, *arguments[1:])):
                chunks = itertools.chain(*batch.plan.rows)
                places += [(batch.plan.step, chunk.number, chunk.mode) for chunk in chunks]
    return sorted(places)


@pytest.mark.parametrize("mode, samples", [("sample", 1), ("batch", 8)])
def test_a_draw_is_for_a_sample_or_for_a_whole_step(mode, samples, stage2):
    flags = f"--steps 8 --slow_share 0.3 --seed 3 --mode {mode}"
    arguments = stage2(f"{flags} --micro_steps 2")["data"]
    places = draw(arguments, world=2)
    assert [number for _, number, _ in places] == list(range(64))
    assert places == draw(stage2(flags)["data"], 1) == draw(stage2(f"{flags} --workers 1")["data"], 2)
    modes = [m for _, _, m in places]
    assert modes == [prune.draw_mode(3, n // samples, 0.3) for n in range(64)] and len({*modes}) == 2
    mixed = [{m for step, _, m in places if step == n} == {"pruned", "slow"} for n in range(8)]
    assert not any(mixed) if mode == "batch" else sum(mixed) > 4
    slow = sum(arguments[-1](draw * samples) == "slow" for draw in range(5000))
    assert abs(slow - 1500) < 3 * math.sqrt(5000 * 0.3 * 0.7)


# --- The isolator from stage to stage
def test_the_isolator_goes_from_stage_1_to_stage_2(stage2, tmp_path, small_halves):
    for pruner in ([], ["--pruner", "divprune"]):
        out = tmp_path / f"a{len(pruner)}"
        train_pretrain.main([*FLAGS, *small_halves, *pruner, "--steps", "3", "--out", str(out)])
    untouched, learnt = (model.VLM.from_pretrained(tmp_path / name) for name in ("a0", "a2"))
    assert torch.equal(untouched.isolator.weight, stage2("")["vlm"].isolator.weight)  # as any run begins
    assert learnt.cfg.prune.name == "divprune" and learnt.isolator.weight.shape == (4, 32)
    assert (learnt.isolator.weight - untouched.isolator.weight).abs().min() > 1e-5  # each number has moved
    learnt.save_pretrained(tmp_path / "again")
    for vlm in (model.VLM.from_pretrained(tmp_path / "again"), stage2(f"--init {out}")["vlm"]):
        assert torch.equal(vlm.isolator.weight, learnt.isolator.weight)
