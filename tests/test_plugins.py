"""Pruners inside the model: what each is given, what it spares, with which connector it goes."""

import dataclasses
import os

import numpy as np
import pytest
import test_training
import torch
import torch.multiprocessing as mp
from test_training import TOKENIZER, assert_same, one_step, small_batch, small_config
from torch.testing import assert_close

import data
import model
import prune
import train_pretrain
from model import PruneConfig, UserError

KINDS = ("chain", "resampler", "linear", "mlp", "avgpool", "attnpool", "cabstractor")
FITS = {  # connector -> the pruners that do not go with it
    "chain": {"fastervlm", "vispruner", "pool", "visionzip", "prumerge", "prumerge+"},
    "linear": {"coarse"}, "mlp": {"coarse"},
    "avgpool": {"fastervlm", "vispruner", "visionzip", "prumerge", "prumerge+", "coarse"},
}  # fmt: skip
FITS["cabstractor"] = FITS["avgpool"]
FITS["resampler"] = FITS["attnpool"] = FITS["avgpool"] | {"pool"}
PAIRS = [(kind, name) for kind in KINDS for name in prune.PRUNERS if name not in FITS[kind]]


def config(kind: str, name: str, **changes) -> model.ModelConfig:
    """4x4 patches, of whose tokens a half is kept."""
    connector = dataclasses.replace(small_config().connector, kind=kind, tokens=9)
    cfg = small_config(connector=connector, prune=PruneConfig(name, 0.5, 2))
    return dataclasses.replace(cfg, **changes)


def build(cfg: model.ModelConfig) -> model.VLM:
    torch.manual_seed(0)
    vlm = model.VLM(cfg)
    for p in vlm.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return vlm


MIX = [("chat", "fast"), ("chat", "slow"), ("text", "slow"), ("chat", "full"), ("chat", "fast")]


# --- Every pruner with every connector that it goes with
@pytest.mark.parametrize("kind, name", PAIRS)
def test_a_mixed_batch_equals_its_samples_alone(kind, name):
    """Rows, other samples' modes and the order of views change nothing; the teacher is the fast mode."""
    cfg = config(kind, name).check()
    vlm, batch = build(cfg), small_batch(MIX, cfg)
    logits, teacher = vlm(batch)
    owner = batch.student.doc_ids.flatten()[batch.student.supervised]
    for n, pick in enumerate(MIX):
        alone, _ = vlm(small_batch([pick], cfg, start=n))
        assert_close(logits[owner == n], alone, rtol=1e-4, atol=1e-4)
    fast, _ = vlm(small_batch([("chat", "fast")], cfg, start=1))
    assert_close(teacher, fast, rtol=1e-4, atol=1e-4)
    test_training.fast_slow_sums(logits, teacher, batch)["loss"].backward()
    grads = {key: p.grad for key, p in vlm.named_parameters()}
    assert all(grads[key] is not None and grads[key].isfinite().all() for key in grads if "connector" in key)
    assert grads["isolator.weight"].abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruner_that_does_not_fit_is_refused_with_those_that_do(kind):
    for name in prune.PRUNERS:
        cfg = config(kind, name)
        if name not in FITS[kind]:
            cfg.check()
            continue
        fit = ", ".join(n for n in prune.PRUNERS if n not in FITS[kind])
        with pytest.raises(
            UserError,
            match=f"'{name}' does not fit connector.kind {kind}: use one of {fit}$".replace("+", r"\+"),
        ):
            cfg.check()


def test_wrong_prune_flags_are_refused():
    chain = config("chain", "coarse")  # 1 window of 4 queries, 4 of 1
    for change, words in (
        ({"name": "divprun"}, "'divprun' is unknown: use one of random, grid"),
        ({"keep": 0.0}, "prune.keep 0 must be above 0"),
        ({"isolator": -1}, "prune.isolator -1 at least 0"),
        ({"isolator_per": "view"}, "isolator_per 'view' tile or image"),
        ({"keep": 5}, "keep 5: coarse keeps whole scales, so one of 4, 8"),
    ):
        with pytest.raises(UserError, match=words):
            dataclasses.replace(chain, prune=dataclasses.replace(chain.prune, **change)).check()
    with pytest.raises(UserError, match="does not fit"):  # the first tokens would be the finest
        dataclasses.replace(chain, connector=dataclasses.replace(chain.connector, reverse=True)).check()
    with pytest.raises(UserError, match="--pruner grid and --prune.name random: give one"):
        train_pretrain.main("--pruner grid --prune.name random --out nowhere".split())


# --- What is computed
def watch(module: torch.nn.Module) -> list[tuple[int, ...]]:
    seen = []
    module.register_forward_hook(lambda m, inputs, out: seen.append(tuple(inputs[0][-1].shape[:2])))
    return seen


def test_coarse_computes_no_finer_scale_for_fast_samples():
    cfg = config("chain", "coarse")
    vlm = build(cfg)
    seen = [watch(scale) for scale in vlm.connector.scales]
    fast = small_batch([("chat", "fast")] * 3, cfg)
    bank = vlm.bank(fast)
    assert seen == [[(3, 16)], []] and len(bank) == 3 * (2 + 4)
    expected = vlm.encode(fast.pixels)[:, :4]  # the first scale's tokens: as select and gather would have it
    assert_close(bank.view(3, 6, -1)[:, 2:], expected)
    assert torch.equal(
        prune.gather(vlm.encode(fast.pixels), prune.select("coarse", vlm.encode(fast.pixels), 4)), expected
    )
    for keep, kept in ((0.1, 4), (4, 4), (0.9, 4), (8, 8), (1.0, 8), (100, 8)):
        assert dataclasses.replace(cfg, prune=PruneConfig("coarse", keep)).check().kept_tokens() == kept


@pytest.mark.parametrize("name", [n for n, p in prune.PRUNERS.items() if p.where == "patches"])
def test_in_front_of_the_connector_only_what_is_kept_goes_through_it(name):
    cfg = config("mlp", name)
    vlm = build(cfg)
    seen = watch(vlm.connector)
    vlm.bank(small_batch(MIX, cfg))
    assert seen == [(2, 16), (3, 8)]  # whole: slow and full; pruned: fast and slow
    assert cfg.visual_tokens("pruned") == 8 + 2


def test_full_samples_alone_need_no_pruner(monkeypatch):
    monkeypatch.setattr(prune, "reduce", None)
    vlm = build(config("linear", "cdpruner"))
    assert len(vlm.bank(small_batch([("chat", "full")] * 2, vlm.cfg))) == 2 * 16


# --- What pruners are given
@pytest.mark.parametrize("cls_token", [True, False])
def test_attention_is_that_of_the_block(cls_token):
    """Against the block's attention matrix written out, whose product with the values it must be."""
    cfg = dataclasses.replace(small_config().vit, cls_token=cls_token)
    torch.manual_seed(0)
    vit = model.ViT(cfg)
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.2)
    states = vit.hidden_states(torch.randn(3, 3, 32, 32))
    block = vit.encoder["layers"][1]
    x, attn = block.layer_norm1(states[1]), block.self_attn
    q, k, v = (p(x).view(3, -1, 2, 16).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    matrix = torch.softmax(q @ k.mT / 4, -1)  # (I, H, 1 + P, 1 + P)
    assert_close(attn.out_proj((matrix @ v).transpose(1, 2).flatten(2)), attn(x), rtol=1e-4, atol=1e-5)
    expected = matrix[:, :, 0, 1:].mean(1) if cls_token else matrix.mean((1, 2))
    weights, keys = vit.attention(states[1], 1)
    assert_close(weights, expected)
    assert_close(keys, k[:, :, int(cls_token) :])
    assert weights.std() > 1e-3 and not weights.requires_grad


def test_needs_are_of_the_pruned_views_alone():
    cfg = config("linear", "random")
    vlm, batch = build(cfg), small_batch(MIX, cfg)
    batch.questions = data.asked(
        [data.Sample([0, ([5, 6], False), ([7], True)], np.zeros((1,)))] * 4, 4, config("linear", "cdpruner")
    )
    states = vlm.states(batch.pixels)
    assert batch.pruned.tolist() == [0, 1, 3]
    for name, pruner in prune.PRUNERS.items():
        given = vlm.pruner_needs(name, states, batch)
        assert set(given) == set(pruner.needs)
        assert all(len(x) == 3 for x in given.values() if isinstance(x, torch.Tensor))


def test_the_question_is_what_the_pruner_reads_and_never_the_answer():
    cfg = config("linear", "cdpruner")
    batch = small_batch(MIX, cfg)
    for n, (kind, _) in enumerate(MIX):
        if kind == "text":
            continue
        view = n - (n > 2)
        record = data.Scenes("chat")[n]
        told = TOKENIZER.decode([i for i in batch.questions[view].tolist() if i >= 0])
        for part in record.parts[::2]:
            assert [p for p in part[1] if isinstance(p, str)][0].strip() in told
        ids = [
            i for p in data.pieces_of(record, TOKENIZER) if not isinstance(p, int) and not p[1] for i in p[0]
        ]
        assert batch.questions[view][batch.questions[view] >= 0].tolist() == ids
    assert small_batch(MIX, config("linear", "divprune")).questions is None
    vlm = build(cfg)
    other = small_batch(MIX, cfg)
    other.questions = torch.full_like(other.questions, -1)  # nothing asked: falls back, no error
    assert vlm.bank(other).isfinite().all()


def test_random_depends_on_picture_and_step_not_on_its_neighbours():
    cfg = config("linear", "random")
    vlm = build(cfg)
    alone, several = (vlm.bank(small_batch([("chat", "fast")] * n, cfg, start=2 - n // 2)) for n in (1, 3))
    assert torch.equal(alone, several.view(3, 10, -1)[1])
    later = small_batch([("chat", "fast")], cfg, start=2)
    later.next_sample = 16
    assert not torch.equal(vlm.bank(later), alone)


# --- Isolators of a picture that is cut
def test_an_isolator_for_each_tile_or_for_each_image():
    per = {}
    for which in ("tile", "image"):
        cfg = config(
            "linear",
            "divprune",
            image=model.ImageConfig(cut="split"),
            prune=PruneConfig("divprune", 3, 2, which),
        )
        per[which] = data.picture_slots(cfg, "pruned", (64, 64)).tolist()
        assert len(data.picture_slots(cfg, "full", (64, 64))) == 5 * 16
        assert data.square_tokens(cfg, "pruned") == len(per[which])
    assert per["tile"] == list(range(25))
    assert per["image"] == [0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 14, 17, 18, 19, 22, 23, 24]


# --- Ranks
ALL_FAST = ([("chat", "fast")], [("text", "fast"), ("chat", "fast")])


def rank_main(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    test_training.small_config = lambda: config("chain", "coarse")
    result = one_step(rank, 2, [small_batch(ALL_FAST[rank], config("chain", "coarse"), start=rank)])
    if rank == 0:
        torch.save(result, f"{folder}/ranks.pt")
    torch.distributed.destroy_process_group()


def test_scales_that_no_rank_computes_do_not_stop_ddp(tmp_path, monkeypatch):
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    monkeypatch.setattr(test_training, "small_config", lambda: config("chain", "coarse"))
    together = small_batch([*ALL_FAST[0], *ALL_FAST[1]], config("chain", "coarse"))
    assert_same(one_step(0, 1, [together]), torch.load(tmp_path / "ranks.pt", weights_only=True))
