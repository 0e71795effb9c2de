"""Mixture of experts: routing and its losses against plain loops, upcycling, training, files, the plan."""

import dataclasses
import math

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, log_of, small_batch, small_config, small_run

import data
import model
import train_pretrain
import train_sft
from model import DecoderConfig, UserError
from tools import export, plan

CFG = DecoderConfig(width=16, mlp_width=24, experts=4)
CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a cuda device")]


def make_experts(capacity: float, **changes) -> model.Experts:
    """Weights large enough that routing is uneven and outputs are not tiny."""
    torch.manual_seed(0)
    experts = model.Experts(dataclasses.replace(CFG, capacity=capacity, **changes))
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return experts


def reference(experts: model.Experts, x: torch.Tensor, real: torch.Tensor | None, drops: bool = True):
    """The layer token by token in float64, AXLearn's Top-2 rules: (output, losses, dropped pairs)."""
    w = {name: p.double() for name, p in experts.named_parameters()}
    E = len(w["gate_proj"])
    tokens = x.double().flatten(0, 1)
    real = torch.ones(len(tokens), dtype=torch.bool) if real is None else real.flatten()
    logits = tokens @ w["router.weight"].T
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    limit = math.ceil(int(len(tokens) * experts.capacity / E) / 4) * 4 if drops else len(tokens)
    best = probabilities.argsort(1, descending=True)[:, :2]
    out, taken, dropped = torch.zeros_like(tokens), [0] * E, []
    for choice in (0, 1):
        for n in [n for n in range(len(tokens)) if real[n]]:
            e = int(best[n, choice])
            taken[e] += 1
            if taken[e] > limit:
                dropped.append((n, choice))
                continue
            gate = probabilities[n, e] / (probabilities[n, best[n, 0]] + probabilities[n, best[n, 1]])
            inner = F.silu(w["gate_proj"][e] @ tokens[n]) * (w["up_proj"][e] @ tokens[n])
            out[n] = out[n] + gate * (w["down_proj"][e] @ inner)
    n = real.sum()
    first = torch.stack([(best[real, 0] == e).sum() / n for e in range(E)])
    balance = E * (first * probabilities[real].sum(0) / n).sum()
    z = logits[real].exp().sum(1).log().pow(2).sum() / n
    return out.view_as(x), torch.stack([balance, z]), dropped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("capacity", [0.5, 1.0, 4.0])
def test_the_layer_equals_a_loop_over_tokens(capacity, padded, dtype):
    """Outputs, losses, all gradients, with and without drops; padding takes no place and does not count."""
    experts, x = make_experts(capacity), torch.randn(2, 20, 16, requires_grad=True)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, 5:9], real[1, 12:] = not padded, not padded
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y, losses = experts(x, real)
    assert torch.equal(losses, experts(x, real)[1])  # the router stays in float32 under autocast
    right, right_losses, dropped = reference(experts, x, real)
    assert bool(dropped) == (capacity < 4) and y.dtype == torch.float32
    if dtype == torch.float32:
        torch.testing.assert_close(losses.double(), right_losses, rtol=1e-5, atol=1e-6)
    weight = torch.randn(2, 20, 16) * real[..., None]
    gradients = []
    for out, words in ((y, losses), (right, right_losses)):
        x.grad = None
        experts.zero_grad()
        ((out * weight).sum() + words.sum()).backward()
        gradients.append([x.grad, *(p.grad for p in experts.parameters())])
    for actual, expected in zip((y * weight, *gradients[0]), ((right * weight).float(), *gradients[1])):
        tolerance = expected.detach().abs().max().item() * (1e-5 if dtype == torch.float32 else 0.03)
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_without_gradient_or_outside_of_training_nothing_is_dropped():
    experts, x = make_experts(0.25), torch.randn(1, 40, 16)
    right, _, _ = reference(experts, x, None, drops=False)
    assert not torch.allclose(experts(x)[0], right.float(), atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(experts(x)[0], right.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(experts.eval()(x)[0], right.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n, z", [(64, 17.296), (32, 12.011)])
def test_a_uniform_router_has_the_losses_of_the_formula(n, z):
    experts = make_experts(2.0, experts=n)
    torch.nn.init.zeros_(experts.router.weight)
    _, losses = experts(torch.randn(2, 50, 16))
    torch.testing.assert_close(losses, torch.tensor([1.0, math.log(n) ** 2]))
    assert losses[1].item() == pytest.approx(z, abs=5e-4)


def sparse_config(**changes) -> model.ModelConfig:
    cfg = small_config()
    cfg.decoder = dataclasses.replace(cfg.decoder, experts=4, **changes)
    return cfg


def test_an_upcycled_decoder_gives_the_dense_logits_and_its_backbone_is_the_dense_one():
    torch.manual_seed(0)
    dense = model.Decoder(small_config().decoder)
    ids = torch.randint(0, dense.cfg.vocab_size, (2, 40))
    before, size = dense(ids), model.backbone_size(dense)
    model.upcycle(dense, sparse_config(capacity=4.0).decoder)  # in training, where it could drop
    assert [type(block.mlp).__name__ for block in dense.layers] == ["GatedMLP", "Experts"]
    torch.testing.assert_close(dense(ids), before, rtol=1e-5, atol=1e-6)
    assert model.backbone_size(dense) == size
    assert all(p.requires_grad and p.is_leaf for p in dense.parameters())
    _, losses = dense.hidden(dense.embed(ids), torch.arange(40).expand(2, -1), model.document_mask(ids * 0))
    balance, z = losses.tolist()
    assert 0.9 < balance < 1.2 and z == pytest.approx(math.log(4) ** 2, rel=0.1)
    cfg = dataclasses.replace(CFG, layers=7, expert_every=3)
    assert [i + 1 for i in range(7) if cfg.sparse(i)] == [3, 6]
    decoder = model.Decoder(cfg)
    assert [type(block.mlp) is model.Experts for block in decoder.layers] == list(map(cfg.sparse, range(7)))
    dense = model.Decoder(dataclasses.replace(cfg, experts=0))
    names = ("embed_tokens", "lm_head")
    plain = sum(p.numel() for name, p in dense.named_parameters() if not name.startswith(names))
    assert model.backbone_size(decoder) == model.backbone_size(dense) == plain


def one_step(rank: int, world: int, batch: data.Batch, weights=(0.01, 0.001), **changes):
    torch.manual_seed(0)
    vlm = model.VLM(sparse_config(**changes))
    vlm.set_trainable(["vit", "connector", "decoder"], isolator=True)
    balance, router_z = weights
    run = small_run(rank, world, clip=1e9, warmup=0, steps=10, balance=balance, router_z=router_z)
    before = {name: p.detach().clone() for name, p in vlm.named_parameters()}
    trained = [{"params": [p for p in vlm.parameters() if p.requires_grad], "peak": 1.0}]
    optimizers, ddp = [torch.optim.SGD(trained, lr=1.0, fused=True)], train_pretrain.prepare(run, vlm)
    stats = train_pretrain.optimizer_step(run, ddp, [batch], optimizers, 0, train_sft.fast_slow_loss)
    change = {name: before[name] - p.detach() for name, p in vlm.named_parameters()}
    return change, {name: float(value) for name, value in stats.items()}


def test_one_step_trains_router_and_experts_and_the_losses_reach_the_router():
    batch = small_batch([("chat", "pruned"), ("chat", "slow")], sparse_config())
    with_losses, stats = one_step(0, 1, batch)
    without, plain = one_step(0, 1, batch, weights=(0.0, 0.0))
    router = "decoder.layers.1.mlp.router.weight"
    for name in (router, *(f"decoder.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down"))):
        assert with_losses[name].abs().max() > 0, name
    assert not torch.allclose(with_losses[router], without[router], rtol=1e-3, atol=0)
    assert stats["balance"] > 0.9 and stats["router_z"] == plain["router_z"] > 1
    added = 0.01 * stats["balance"] + 0.001 * stats["router_z"]
    assert stats["loss"] == pytest.approx(plain["loss"] + added, rel=1e-6)
    assert plain["loss"] == pytest.approx(plain["ce"] + plain["kl"], rel=1e-6)


def test_who_has_router_losses():
    cfg = sparse_config()
    vlm = model.VLM(cfg)
    slow, plain = (small_batch([("chat", mode)], cfg) for mode in ("slow", "full"))
    losses = [vlm(batch)[2] for batch in (slow, plain)]
    assert losses[0].requires_grad and losses[1].requires_grad
    torch.testing.assert_close(*losses)
    with torch.no_grad():
        assert vlm(slow)[2] is None
    # Or stage 1 would align a connector to another function than the one that evaluation uses.
    torch.manual_seed(0)
    vlm = model.VLM(sparse_config(capacity=0.25))
    vlm.set_trainable(["connector"], isolator=False)
    batch = small_batch([("chat", "full")], vlm.cfg)
    trained, _, router_losses = vlm(batch)
    assert router_losses is None
    assert torch.equal(trained, vlm.eval()(batch)[0])


def step_of_rank(rank: int) -> tuple:
    batch = small_batch([("chat", "pruned"), ("text", "pruned")], sparse_config(), start=2 * rank)
    return one_step(rank, 2, batch, weights=(0.0, 0.0), capacity=4.0)


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    """Without drops and router losses, which are those of a rank's own tokens."""
    two = helpers.on_two_ranks(step_of_rank, tmp_path)[0]
    batch = small_batch([("chat", "pruned"), ("text", "pruned")] * 2, sparse_config())
    one = one_step(0, 1, batch, weights=(0.0, 0.0), capacity=4.0)
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-4)
    for name, change in one[0].items():
        torch.testing.assert_close(two[0][name], change, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_an_expert_without_tokens_has_a_gradient_of_zeros(device):
    """Or DDP would wait for it."""
    experts = make_experts(2.0)
    with torch.no_grad():
        experts.router.weight.copy_(torch.eye(4, 16) * torch.tensor([1.0, 1.0, 0, 0])[:, None])
    x = torch.randn(1, 30, 16)
    x[..., :2] = 5.0
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    y, _ = experts.to(device, dtype)(x.to(device, dtype))
    y.sum().backward()
    for p in (experts.gate_proj, experts.up_proj, experts.down_proj):
        used = p.grad.abs().amax((1, 2)) > 0
        assert used.tolist() == [True, True, False, False]


def test_decay_and_muon():
    vlm = model.VLM(sparse_config())
    vlm.set_trainable(["decoder"], isolator=False)
    adam, muon = train_pretrain.make_optimizers(vlm, train_pretrain.RunConfig(muon_lr=0.1, weight_decay=0.1))
    groups = {id(p): group for group in adam.param_groups for p in group["params"]}
    mlp = vlm.decoder.layers[1].mlp
    for p in mlp.parameters():
        assert groups[id(p)]["weight_decay"] == 0.1
    assert all(p.ndim == 2 and p is not mlp.router.weight for g in muon.param_groups for p in g["params"])


def test_a_run_saves_resumes_and_logs(tmp_path, small_halves, monkeypatch):
    """Upcycled from a dense half; stopped and resumed bit for bit; fine-tuned, where its experts stay."""
    run, cut = tmp_path / "run", tmp_path / "cut"
    flags = [*SMALL, *small_halves, "--decoder.experts", "4", "--steps", "2", "--save_every", "1", "--out"]
    train_pretrain.main([*flags, str(run)])
    with pytest.raises(helpers.Killed):
        helpers.run_stage(train_pretrain, [*flags, str(cut)], 1, monkeypatch)
    train_pretrain.main([*flags, str(cut), "--resume", "auto"])
    helpers.assert_same_weights(cut, run)
    assert all(line["balance"] > 0.9 and line["router_z"] > 1 for line in log_of(run))
    weights = model.VLM.from_pretrained(run).state_dict()
    assert weights["decoder.layers.1.mlp.gate_proj"].shape == (4, 64, 32)
    sft = [*SMALL, "--init", str(run), "--steps", "1", "--out"]
    train_sft.main([*sft, str(tmp_path / "sft")])
    assert model.VLM.from_pretrained(tmp_path / "sft").cfg.decoder.experts == 4
    for flag, value in (("experts", "8"), ("experts", "0"), ("expert_every", "1"), ("capacity", "1")):
        with pytest.raises(UserError, match=f"--decoder.{flag} cannot change"):
            train_sft.main([*sft, str(tmp_path / "no"), f"--decoder.{flag}", value])
    with pytest.raises(UserError, match="no Llama layout holds"):
        export.export(str(run), str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists() and not (tmp_path / "hf.tmp").exists()


def test_a_dense_run_can_be_upcycled(tmp_path, small_halves):
    dense = tmp_path / "dense"
    train_pretrain.main([*SMALL, *small_halves, "--steps", "1", "--out", str(dense)])
    (line,) = log_of(dense)
    assert "balance" not in line and "router_z" not in line
    begin = [*SMALL, "--init", str(dense), "--steps", "1", "--lr", "0", "--muon_lr", "0", "--out"]
    train_pretrain.main([*begin, str(tmp_path / "moe"), "--decoder.experts", "4", "--balance", "0.02"])
    vlms = [model.VLM.from_pretrained(folder).eval() for folder in (dense, tmp_path / "moe")]
    batch = small_batch([("chat", "full"), ("text", "full")], vlms[0].cfg)
    torch.testing.assert_close(vlms[1](batch)[0], vlms[0](batch)[0], rtol=1e-4, atol=1e-5)
    for flags, words in (
        ("--decoder.width 64", "--decoder.width cannot change"),
        ("--decoder.experts 4 --lora.rank 2", "adapters need a dense"),
        ("--decoder.experts 1", "must be 0 or above 1"),
        ("--decoder.experts 4 --decoder.expert_every 3", "lie in 1..2"),
        ("--decoder.experts 4 --compile true", "experts compile in bfloat16 only"),
    ):
        with pytest.raises(UserError, match=words):
            train_pretrain.main([*begin, str(tmp_path / "no"), *flags.split()])
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("mode", ["full", "pruned", "slow"])
def test_the_plan_counts_the_experts_that_a_token_meets(mode):
    """Two of E: a sparse block costs the products of a gated MLP twice as wide, and the router's."""
    cfg = sparse_config(layers=3, expert_every=3)
    wide = small_config()
    wide.decoder = dataclasses.replace(wide.decoder, layers=3)
    parts = plan.sample_cost(cfg, ["decoder"], 50, mode, 1)
    dense = plan.sample_cost(wide, ["decoder"], 50, mode, 1)
    T = 50 + cfg.visual_tokens("pruned" if mode == "pruned" else "full")
    c = cfg.decoder
    extra = 6 * T * (3 * c.width * c.mlp_width + c.experts * c.width)
    assert parts["decoder"] - dense["decoder"] == pytest.approx(extra, rel=1e-3)  # the losses' few products


@pytest.mark.parametrize("name, active", [("3b-moe", 3.814e9), ("7b-moe", 7.559e9)])
def test_active_sizes_of_mm1s_experts(name, active):
    """All weights: test_model_presets.py."""
    words = plan.expert_sizes(model.preset(name)["model"].decoder).replace(",", "")
    assert f"{active / 1e6:.0f}"[:3] in words
