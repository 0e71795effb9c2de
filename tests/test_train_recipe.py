"""MM1's optimisation: learning-rate law, decoupled decay, schedule, one normalisation, z-loss."""

import json
import math

import pytest
import torch
from helpers import SMALL, small_batch, small_config, small_run

import model
import train_pretrain
from train_pretrain import mm1_rate

LAW = {  # weights without embeddings -> peak rate
    9e6: 6.7468e-4, 85e6: 2.6192e-4, 302e6: 1.5351e-4, 1.2e9: 8.5832e-5, 2.9e9: 5.9178e-5,
    6.4e9: 4.2393e-5, 30e9: 2.2108e-5,
}  # fmt: skip


def test_the_law_and_the_schedule():
    """Its values, and that it is a line in logarithms."""
    assert mm1_rate(1) == pytest.approx(0.57493, rel=1e-5)
    assert {size: mm1_rate(size) for size in LAW} == pytest.approx(LAW, rel=1e-4)
    for a, b in zip(LAW, [*LAW][1:]):
        slope = math.log(mm1_rate(b) / mm1_rate(a)) / math.log(b / a)
        assert slope == pytest.approx(-0.4214, rel=1e-9)
    # MM1 at 1.2B: 200k steps, 2,000 of warm-up, cosine to a tenth.
    cfg = train_pretrain.RunConfig(steps=200_000, warmup=0.01, final_lr=0.1)
    peak = mm1_rate(1.2e9)
    spots = {
        1000: 4.2916e-5, 2000: 8.5832e-5, 51_500: 7.4519e-5, 101_000: 4.7208e-5, 150_500: 1.9896e-5,
        200_000: 8.5832e-6,
    }  # fmt: skip
    for step, rate in spots.items():  # the first step is number 0 here
        assert peak * train_pretrain.schedule(step - 1, cfg) == pytest.approx(rate, rel=1e-4)


def test_the_law_sets_the_rate_unless_a_flag_does(tmp_path, small_halves):
    flags = [*SMALL, *small_halves, "--steps", "1", "--muon_lr", "0"]
    for out, more, rate in (("a", ["--lr", "-1"], None), ("b", ["--lr", "0.5"], 0.5)):
        train_pretrain.main([*flags, *more, "--out", str(tmp_path / out)])
        saved = json.loads((tmp_path / out / "config.json").read_text())["train"]["lr"]
        weights = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32  # two blocks and the last norm
        assert saved == (rate or mm1_rate(weights))


def step_without_gradient(done: int, **flags) -> tuple[dict, dict]:
    """The weights before and after a step whose gradients are zero."""
    flags |= {"lr": mm1_rate(1.2e9), "vit_lr": 5e-5, "weight_decay": 0.1, "warmup": 0.01, "steps": 1000}
    run = small_run(**flags)
    torch.manual_seed(0)
    vlm = model.VLM(small_config())
    vlm.set_trainable(["vit", "connector", "decoder"], isolator=False)
    vlm.double()
    before = {name: p.detach().clone() for name, p in vlm.named_parameters()}
    optimizers = train_pretrain.make_optimizers(vlm, run.cfg)
    batch = small_batch([("caption", "full")], vlm.cfg)

    def nothing(logits, teacher, batch) -> dict:
        return {"loss": 0.0 * logits.sum()}

    train_pretrain.optimizer_step(run, vlm, [batch], optimizers, done, nothing)
    return before, {name: p.detach() for name, p in vlm.named_parameters()}


@pytest.mark.parametrize(("step", "share"), [(9, 1.0), (4, 0.5)])
def test_decay_takes_a_tenth_of_the_rate(step, share):
    """lambda = 0.1 eta, decoupled: 8.583e-6 of a weight at the peak, half of it half-way up."""
    before, after = step_without_gradient(step, decay="all")
    for name, value in before.items():
        if "isolator" in name or not value.any() or "post_layernorm" in name:
            continue
        rate = 5e-5 if name.startswith("vit.") else mm1_rate(1.2e9)
        lost = (1 - after[name] / value)[value != 0]
        torch.testing.assert_close(lost, torch.full_like(lost, 0.1 * rate * share), rtol=1e-6, atol=1e-13)
    assert 0.1 * mm1_rate(1.2e9) == pytest.approx(8.583e-6, rel=1e-4)


def test_by_default_only_matrices_decay():
    before, after = step_without_gradient(9)
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert {"decoder.norm.weight", "decoder.embed_tokens.weight", "connector.proj.bias"} <= kept
    assert not kept & {"decoder.layers.0.mlp.up_proj.weight", "vit.embeddings.patch_embedding.weight"}


def test_z_loss_is_the_mean_squared_log_of_the_denominator():
    torch.manual_seed(0)
    vlm = model.VLM(small_config())
    vlm.set_trainable(["decoder"], isolator=False)
    batch = small_batch([("caption", "full"), ("text", "full")], vlm.cfg)
    logits = vlm(batch)[0].detach().double()
    run = small_run(z_loss=0.5, lr=0.0, steps=10)
    optimizers = train_pretrain.make_optimizers(vlm, run.cfg)
    stats = train_pretrain.optimizer_step(run, vlm, [batch], optimizers, 0, train_pretrain.caption_loss)
    z = logits.exp().sum(-1).log().pow(2).mean()
    ce = torch.nn.functional.cross_entropy(logits, batch.student.targets)
    assert stats["z"].item() == pytest.approx(z.item(), rel=1e-5)
    assert stats["loss"].item() == pytest.approx((ce + 0.5 * z).item(), rel=1e-5)


SHAPES = [(16, 16), (8, 24), (8, 24), (24, 8), (16, 16)]


def muon_steps(make) -> list[torch.Tensor]:
    """Weights and momenta after four steps on the same gradients."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    muon = make([{"params": parameters, "lr": 0.02, "weight_decay": 0.1}])
    for _ in range(4):
        for p in parameters:
            p.grad = torch.randn_like(p)
        muon.step()
    return [*(p.detach() for p in parameters), *(muon.state[p]["momentum_buffer"] for p in parameters)]


def test_muon_equals_torchs_in_its_precision():
    expected = muon_steps(torch.optim.Muon)
    stacked = muon_steps(lambda groups: train_pretrain.Muon(groups, torch.bfloat16))
    torch.testing.assert_close(stacked, expected, rtol=1e-2, atol=1e-3)
    exact = muon_steps(lambda groups: train_pretrain.Muon(groups, torch.float32))
    torch.testing.assert_close(exact, expected, rtol=0.05, atol=5e-3)
    assert model.fast_dtype(torch.device("cuda")) == torch.bfloat16
    assert model.fast_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)
