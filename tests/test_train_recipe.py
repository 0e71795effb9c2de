"""MM1's optimisation: rates, decay, schedule, normalisation, z-loss; the dtype every weight is kept in."""

import json
import math

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, Killed, losses_of, run_stage, small_batch, small_config, small_run, weights_of
from safetensors.torch import load_file

import model
import train_pretrain
import train_sft
from train_pretrain import RunConfig, mm1_rate

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


@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[2:4])
def test_orthogonalised_matrices_keep_their_directions(shape):
    """The iteration only moves singular values: U and V stay, S goes to about 1 (0.68 to 1.21)."""
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    singular = u.mT @ train_pretrain.orthogonalise(x) @ v.mT
    values = singular.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(singular, torch.diag_embed(values), rtol=0, atol=1e-9)
    assert 0.65 < values.min() and values.max() < 1.25


# --- What dtype every weight is kept in: --frozen bfloat16 and --pure_bf16, in a step and over several runs
NO_DTYPE = "--batch_size 8 --row_length 128 --workers 0 --log_every 1 --device cpu --compile false".split()
HALF, FULL = torch.bfloat16, torch.float32


def small_vlm(train: str = "connector", kind: str = "chain", rank: int = 0, **flags) -> model.VLM:
    torch.manual_seed(0)
    vlm = model.VLM(small_config(
        connector=model.ConnectorConfig(kind, [1, 2], 32, 2, [4, 2], [4, 1], 4, key_positions=True),
        decoder=model.DecoderConfig(512, 32, 2, 2, 1, 16, 64, qkv_bias=True, tied=False),
        lora=model.LoraConfig(rank, 4.0),
    ))  # fmt: skip
    train_pretrain.freeze(vlm, RunConfig(train=train, **flags))
    return vlm


def loss_of(vlm: model.VLM, half: bool = True) -> torch.Tensor:
    batch = small_batch([("chat", "full")] * 4, vlm.cfg)
    with torch.autocast("cpu", HALF, enabled=half):
        logits, _, _ = vlm(batch)
    return F.cross_entropy(logits, batch.student.targets)


# --- Which weight is kept how
KEPT = {  # with --frozen bfloat16
    HALF: "vit.encoder.layers.0.mlp.fc1.weight vit.embeddings.patch_embedding.weight isolator.weight "
    "decoder.embed_tokens.weight decoder.lm_head.weight",
    FULL: "vit.encoder.layers.0.mlp.fc1.bias vit.embeddings.class_embedding "  # vectors
    "decoder.layers.1.input_layernorm.weight decoder.layers.1.self_attn.q_proj.bias "
    "vit.embeddings.position_embedding.weight",  # tables of positions
}


def test_frozen_matrices_are_halved_and_nothing_else():
    vlm = small_vlm(frozen="bfloat16")
    dtypes = {name: p.dtype for name, p in vlm.named_parameters()}
    for dtype, names in KEPT.items():
        assert {dtypes[name] for name in names.split()} == {dtype}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("connector.")} == {FULL}
    for name, p in vlm.named_parameters():
        vector = p.ndim == 1 or "position" in name
        assert p.dtype == (FULL if vector or p.requires_grad else HALF), name
    assert {p.dtype for p in small_vlm(frozen="float32").parameters()} == {FULL}
    assert {p.dtype for p in small_vlm(pure_bf16=True).parameters()} == {HALF}
    vlm = small_vlm(frozen="bfloat16")
    train_pretrain.freeze(vlm, RunConfig(frozen="float32"))  # and back
    assert {p.dtype for p in vlm.parameters()} == {FULL}
    vlm = small_vlm("connector,lora", rank=4, frozen="bfloat16")
    part = vlm.decoder.layers[0].self_attn.q_proj
    assert (part.weight.dtype, part.bias.dtype) == (HALF, FULL)
    assert (part.lora_a.dtype, part.lora_b.dtype) == (FULL, FULL)
    loss_of(vlm).backward()
    assert part.lora_b.grad.dtype == FULL and part.lora_b.grad.any()
    vlm = small_vlm("vit,connector,decoder", pure_bf16=True)
    loss_of(vlm).backward()
    assert {p.grad.dtype for p in vlm.parameters() if p.grad is not None} == {HALF}


@pytest.mark.parametrize("kind", ["chain", "cabstractor"])
def test_positions_of_a_frozen_connector_stay_whole(kind):
    vlm = small_vlm("decoder", kind, frozen="bfloat16")
    for name, p in vlm.connector.named_parameters():
        assert p.dtype == (FULL if p.ndim == 1 or "position" in name else HALF), name
    assert {p.dtype for p in vlm.decoder.parameters()} == {FULL}


def test_the_residual_streams_stay_whole():
    """Halved matrices do not narrow what the blocks add up, nor do they in front of a whole decoder."""
    vlm = small_vlm("connector,decoder", frozen="bfloat16")
    rows = small_batch([("chat", "full")] * 4, vlm.cfg).student
    assert vlm.decoder.embed(rows.ids).dtype == FULL
    vlm = small_vlm(frozen="bfloat16")
    with torch.autocast("cpu", HALF):
        states = vlm.vit.hidden_states(torch.randn(1, 3, 32, 32))
        embedded = vlm.decoder.embed(rows.ids)
        mask = model.document_mask(rows.doc_ids)
        hidden, _ = vlm.decoder.hidden(embedded, rows.positions, mask)
    assert {state.dtype for state in states[1:]} == {embedded.dtype, hidden.dtype} == {FULL}


def test_a_step_with_halved_matrices_is_close_to_one_without():
    losses, gradients = [], []
    for frozen in ("float32", "bfloat16"):
        vlm = small_vlm(frozen=frozen)
        loss = loss_of(vlm)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in vlm.connector.parameters()]))
        assert gradients[-1].dtype == FULL
    # Autocast rounds these matrices anyway; only the embeddings are rounded anew
    assert losses[1] == pytest.approx(losses[0], abs=5e-3)
    assert losses[1] == pytest.approx(loss_of(small_vlm(), half=False).item(), abs=2e-2)
    assert F.cosine_similarity(*gradients, dim=0) > 0.98


# --- Runs
def test_a_run_in_pure_bf16(tmp_path, small_halves):
    flags = [*NO_DTYPE, *small_halves, *"--pure_bf16 true --dtype bfloat16 --lr 3e-3".split()]
    train_pretrain.main([*flags, "--steps", "30", "--out", str(tmp_path / "a")])
    losses = [*losses_of(tmp_path / "a").values()]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert {value.dtype for value in weights_of(tmp_path / "a").values()} == {HALF}
    moments = load_file(model.find_step(tmp_path / "a") / "optimizer" / "model.safetensors")
    kinds = {name.rpartition(".")[2] for name in moments}
    assert kinds == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}  # AdamW's, and the preset's Muon's
    assert {m.dtype for m in moments.values() if m.ndim} == {HALF}


def test_a_run_with_halved_matrices_goes_on_and_hands_over(tmp_path, small_halves, monkeypatch):
    """Exact resume; in stage 2 what trains is whole again, from the values that were saved."""
    train = "--train connector --frozen bfloat16 --dtype bfloat16 --warmup 0 --muon_lr 0 --steps 4".split()
    flags = [*NO_DTYPE, *small_halves, *train, "--save_every", "2"]
    train_pretrain.main([*flags, "--out", str(tmp_path / "whole")])
    first = weights_of(tmp_path / "whole")
    assert first["decoder.embed_tokens.weight"].dtype == HALF
    assert first["connector.proj.weight"].dtype == FULL
    with pytest.raises(Killed):
        run_stage(train_pretrain, [*flags, "--out", str(tmp_path / "cut")], 2, monkeypatch)
    train_pretrain.main([*flags, "--resume", "auto", "--out", str(tmp_path / "cut")])
    helpers.assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")

    sft = [*NO_DTYPE, "--init", str(tmp_path / "whole"), *train, "--train", "connector,decoder", "--lr", "0"]
    train_sft.main([*sft, "--out", str(tmp_path / "sft")])
    second = weights_of(tmp_path / "sft")
    assert {v.dtype for k, v in second.items() if k.startswith(("connector", "decoder"))} == {FULL}
    assert second["vit.encoder.layers.0.mlp.fc1.weight"].dtype == HALF
    assert all(torch.equal(second[name].float(), value.float()) for name, value in first.items())


HALVED = [("connector", "bfloat16"), ("connector", "float32"), ("decoder", "bfloat16")]


@pytest.mark.parametrize("train, dtype", HALVED)
def test_tokens_scale_up_from_halved_matrices(train, dtype, tmp_path, small_halves):
    """Also where the connector, whose scales are made anew, was frozen, and where there is no autocast."""
    flags = [*NO_DTYPE, *small_halves, "--train", train, "--frozen", "bfloat16", "--dtype", "bfloat16"]
    train_pretrain.main([*flags, "--steps", "1", "--out", str(tmp_path / "a")])
    sft = [*NO_DTYPE, "--init", str(tmp_path / "a"), "--scale", "32to144", "--dtype", dtype, "--steps", "1"]
    train_sft.main([*sft, "--out", str(tmp_path / "b")])
    assert model.VLM.from_pretrained(tmp_path / "b").cfg.visual_tokens() == 144


@pytest.mark.parametrize("part", ["attention", "block"])
@pytest.mark.parametrize("experts", [0, 4])
def test_recomputing_changes_no_gradient_and_keeps_less(part, experts):
    """Bit for bit, over full, slow and text-only samples, with an encoder that trains."""
    cfg, gradients, kept = small_config(), {}, {}
    cfg.decoder.experts = experts
    batch = small_batch([("chat", "pruned"), ("chat", "slow"), ("text", "pruned")], cfg)
    for recompute in ("none", part):
        torch.manual_seed(0)
        vlm = model.VLM(model.copy_config(cfg))
        vlm.set_trainable(["vit", "connector", "decoder"], isolator=True)
        vlm = train_pretrain.prepare(small_run(recompute=recompute), vlm)
        saved = []

        def keep(x: torch.Tensor, saved=saved) -> torch.Tensor:
            saved.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logits, teacher, router = vlm(batch)
            loss = train_sft.fast_slow_loss(logits, teacher, batch)["loss"]
        (loss + (router.sum() if experts else 0.0)).backward()
        gradients[recompute] = {name: p.grad for name, p in vlm.named_parameters() if p.grad is not None}
        kept[recompute] = sum(saved)
    assert gradients["none"].keys() == gradients[part].keys()
    assert all(torch.equal(gradients[part][name], g) for name, g in gradients["none"].items())
    assert kept[part] < {"attention": 0.9, "block": 0.5}[part] * kept["none"]
