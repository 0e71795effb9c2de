"""Pruners inside the model: what each is given, what it spares, with which connector it goes."""

import dataclasses

import helpers
import numpy as np
import pytest
import torch
from helpers import all_tokens, enlarge, log_of, slot_mask, small_batch, small_config
from torch.testing import assert_close

import data
import model
import prune
import train_pretrain
import train_sft
from model import PruneConfig, UserError

KINDS = ("chain", "resampler", "linear", "mlp", "avgpool", "attnpool", "cabstractor")
MISFITS = {  # connector -> the pruners that do not go with it
    "chain": {"fastervlm", "vispruner", "pool", "visionzip", "prumerge", "prumerge+"},
    "linear": {"coarse"}, "mlp": {"coarse"},
    "avgpool": {"fastervlm", "vispruner", "visionzip", "prumerge", "prumerge+", "coarse"},
}  # fmt: skip
MISFITS["cabstractor"] = MISFITS["avgpool"]
MISFITS["resampler"] = MISFITS["attnpool"] = MISFITS["avgpool"] | {"pool"}
PAIRS = [(kind, name) for kind in KINDS for name in prune.PRUNERS if name not in MISFITS[kind]]


def config(kind: str, name: str, **changes) -> model.ModelConfig:
    """4x4 patches, of whose tokens a half is kept."""
    connector = dataclasses.replace(small_config().connector, kind=kind, tokens=9)
    cfg = small_config(connector=connector, prune=PruneConfig(name, 0.5, 2))
    return dataclasses.replace(cfg, **changes)


def build(cfg: model.ModelConfig) -> model.VLM:
    """With weights so large that outputs vary."""
    torch.manual_seed(0)
    return enlarge(model.VLM(cfg))


MIX = [("chat", "pruned"), ("chat", "slow"), ("text", "slow"), ("chat", "full"), ("chat", "pruned")]


# --- Every pruner with every connector that it goes with
@pytest.mark.parametrize("kind, name", PAIRS)
def test_a_mixed_batch_equals_its_samples_alone(kind, name):
    """Rows, other samples' modes and the order of pictures change nothing; the teacher is the fast mode."""
    cfg = config(kind, name).check()
    vlm, batch = build(cfg), small_batch(MIX, cfg)
    logits, teacher, _ = vlm(batch)
    owner = batch.student.doc_ids.flatten()[batch.student.supervised]
    for n, pick in enumerate(MIX):
        alone, _, _ = vlm(small_batch([pick], cfg, start=n))
        assert_close(logits[owner == n], alone, rtol=1e-4, atol=1e-4)
    pruned, _, _ = vlm(small_batch([("chat", "pruned")], cfg, start=1))
    assert_close(teacher, pruned, rtol=1e-4, atol=1e-4)
    train_sft.fast_slow_loss(logits, teacher, batch)["loss"].backward()
    grads = {key: p.grad for key, p in vlm.named_parameters()}
    assert all(grads[key] is not None and grads[key].isfinite().all() for key in grads if "connector" in key)
    assert grads["isolator.weight"].abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruner_that_does_not_fit_is_refused_with_those_that_do(kind):
    for name in prune.PRUNERS:
        cfg = config(kind, name)
        if name not in MISFITS[kind]:
            cfg.check()
            continue
        fit = ", ".join(n for n in prune.PRUNERS if n not in MISFITS[kind])
        message = f"'{name}' does not fit connector.kind {kind}: use one of {fit}$"
        with pytest.raises(UserError, match=message.replace("+", r"\+")):
            cfg.check()


def test_wrong_prune_flags_are_refused():
    chain = config("chain", "coarse")  # 1 window of 4 queries, 4 of 1
    for change, words in (
        ({"name": "divprun"}, "'divprun' does not fit .*: use one of random, grid"),
        ({"keep": 0.0}, "prune.keep 0 must be above 0"),
        ({"isolator_per": "view"}, "isolator_per 'view' is unknown: use one of tile, image"),
        ({"keep": 5}, r"keep 5: coarse keeps whole scales, so one of \[4, 8\]"),
    ):
        with pytest.raises(UserError, match=words):
            dataclasses.replace(chain, prune=dataclasses.replace(chain.prune, **change)).check()
    with pytest.raises(UserError, match="does not fit"):  # the first tokens would be the finest
        dataclasses.replace(chain, connector=dataclasses.replace(chain.connector, reverse=True)).check()


# --- What is computed
def watch(module: torch.nn.Module) -> list[tuple[int, ...]]:
    """A list that gets (images, patches) of every call of the module."""
    shapes = []
    module.register_forward_hook(lambda m, inputs, out: shapes.append(tuple(inputs[0][-1].shape[:2])))
    return shapes


def test_coarse_computes_no_finer_scale_for_pruned_samples():
    cfg = config("chain", "coarse")
    vlm = build(cfg)
    shapes = [watch(scale) for scale in vlm.connector.scales]
    batch = small_batch([("chat", "pruned")] * 3, cfg)
    bank = vlm.bank(batch)
    assert shapes == [[(3, 16)], []] and len(bank) == 3 * (2 + 4)
    tokens = all_tokens(vlm, batch.pixels)
    assert_close(bank.view(3, 6, -1)[:, 2:], tokens[:, :4])  # the first scale's
    assert torch.equal(prune.gather(tokens, prune.select("coarse", tokens, 4)), tokens[:, :4])
    for keep, kept in ((0.1, 4), (4, 4), (0.9, 4), (8, 8), (1.0, 8), (100, 8)):
        assert dataclasses.replace(cfg, prune=PruneConfig("coarse", keep)).check().kept_tokens() == kept


@pytest.mark.parametrize("name", [n for n, p in prune.PRUNERS.items() if p.where == "patches"])
def test_in_front_of_the_connector_only_what_is_kept_goes_through_it(name):
    cfg = config("mlp", name)
    vlm = build(cfg)
    shapes = watch(vlm.connector)
    vlm.bank(small_batch(MIX, cfg))
    assert shapes == [(2, 16), (3, 8)]  # all tokens: slow and full; pruned ones: pruned and slow
    assert cfg.visual_tokens("pruned") == 8 + 2


@pytest.mark.parametrize("mode", ["full", "pruned", "slow"])
@pytest.mark.parametrize("name", ["divprune", "coarse"])
def test_blank_pictures_and_pictures_cut_off_are_in_no_bank(name, mode):
    """Compiled runs fill up with blank pictures; here the only other picture lies behind the limit."""
    cfg = config("chain", name)
    vlm = build(cfg)
    pieces = [([5, 6, 7], True), 0, ([8], True)]  # a limit of four positions leaves the picture out
    sample = (pieces, np.zeros((1, 3, 32, 32), np.uint8))
    for multiple in (1, 8):
        batch = data.make_batch([sample], [mode], cfg, 16, 4, tile_multiple=multiple)
        assert len(batch.pixels) == multiple and vlm.bank(batch) is None
        logits, teacher, _ = vlm(batch)
        logits.sum().backward()
        assert teacher is None and logits.isfinite().all()
        assert all(p.grad is not None for p in vlm.connector.parameters())
        vlm.zero_grad(set_to_none=True)


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


def test_full_samples_need_no_pruner_and_needs_are_of_the_pruned_views_alone(monkeypatch):
    cfg = config("linear", "random")
    vlm, batch = build(cfg), small_batch(MIX, cfg)
    samples = [data.Sample([0, ([5, 6], False), ([7], True)], np.zeros((1,)))] * 4
    batch.questions = data.question_ids(samples, 4, config("linear", "cdpruner"))
    states = vlm.states(batch.pixels)
    assert batch.pruned_tiles.tolist() == [0, 1, 3]
    for name, pruner in prune.PRUNERS.items():
        given = vlm.pruner_needs(name, states, batch)
        assert set(given) == set(pruner.needs)
        assert all(len(x) == 3 for x in given.values() if isinstance(x, torch.Tensor))
    monkeypatch.setattr(prune, "reduce", None)
    vlm = build(config("linear", "cdpruner"))
    assert len(vlm.bank(small_batch([("chat", "full")] * 2, vlm.cfg))) == 2 * 16


def test_the_question_is_what_the_pruner_reads_and_never_the_answer():
    cfg = config("linear", "cdpruner")
    picture, questions = np.zeros((1, 3, 32, 32), np.uint8), [[20, 21, 23], [31, -1, -1], [31, -1, -1]]
    dialogue = [([9], False), 0, ([20, 21], False), ([22], True), ([23], False), ([24, 25], True)]
    shots = [0, ([30], False), 1, ([31], False), ([32], True)]  # demonstrations come before the last picture
    samples = [(dialogue, np.concatenate([picture] * 2)), ([([7] * 50, False), ([8], True)], picture[:0])]
    samples += [(shots, np.concatenate([picture] * 2))]
    modes = [data.Sample(samples[0][0], picture), *samples[1:]]
    batch = data.make_batch(modes, ["pruned"] * 3, cfg, 256, 256)
    assert batch.questions.tolist() == questions  # long texts without pictures: no matter
    assert data.prompt_batch(modes, "pruned", cfg).questions.tolist() == batch.questions.tolist()
    assert small_batch(MIX, config("linear", "divprune")).questions is None
    vlm, other = build(cfg), small_batch(MIX, cfg)
    asked = vlm.bank(other)
    other.questions = torch.full_like(other.questions, -1)  # nothing asked
    assert vlm.bank(other).isfinite().all() and not torch.equal(vlm.bank(other), asked)


def test_random_depends_on_picture_and_step_not_on_its_neighbours():
    cfg = config("linear", "random")
    vlm = build(cfg)
    alone, several = (vlm.bank(small_batch([("chat", "pruned")] * n, cfg, start=2 - n // 2)) for n in (1, 3))
    assert torch.equal(alone, several.view(3, 10, -1)[1])
    later = small_batch([("chat", "pruned")], cfg, start=2)
    later.next_sample = 16
    assert not torch.equal(vlm.bank(later), alone)


# --- Isolators of a picture that is cut
def test_an_isolator_for_each_tile_or_for_each_image():
    per = {}
    for which in ("tile", "image"):
        changes = {"image": model.ImageConfig(cut="split"), "prune": PruneConfig("divprune", 3, 2, which)}
        cfg = config("linear", "divprune", **changes)
        per[which] = data.picture_slots(cfg, "pruned", (64, 64)).tolist()
        assert len(data.picture_slots(cfg, "full", (64, 64))) == 5 * 16
        assert data.square_tokens(cfg, "pruned") == len(per[which]) == cfg.visual_tokens("pruned", 5)
        vlm, tiles = build(cfg), torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
        sample = data.Sample([0, ([7], True)], tiles.numpy(), [(64, 64)])
        batch = data.make_batch([sample], ["pruned"], cfg, 64, 64)
        x = vlm.splice(batch.student, vlm.bank(batch))[slot_mask(batch.student)]
        tokens = all_tokens(vlm, tiles)
        kept = prune.gather(tokens, prune.select("divprune", tokens, 3))  # (5, 3, D)
        front = [vlm.isolator.weight if which == "tile" or n == 0 else kept[0, :0] for n in range(5)]
        assert_close(x, torch.cat([part for n in range(5) for part in (front[n], kept[n])]))
        x.sum().backward()
        assert (vlm.isolator.weight.grad == (5 if which == "tile" else 1)).all()
    assert per["tile"] == list(range(25))
    assert per["image"] == [0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 14, 17, 18, 19, 22, 23, 24]


# --- Flags of both stages
def test_a_pruner_of_the_recipe_gives_way_to_that_of_the_command_line():
    for words, pruner, name in (
        ("--preset llava-1.5", "divprune", "divprune"),
        ("--preset llava-1.5 --prune.name grid", "grid", "grid"),
        ("--preset llava-1.5 --pruner random", "random", "random"),
        ("--prune.name grid", "", "grid"),
    ):
        argv = [*words.split(), "--out", "nowhere"]
        cfg, model_cfg, *_ = train_pretrain.resolve_flags(train_pretrain.PretrainConfig, "pretrain", argv, "")
        assert (cfg.pruner, model_cfg.prune.name) == (pruner, name)


def test_stage_1_on_pruned_tokens_is_validated_on_them(monkeypatch, tmp_path, small_halves):
    views = []

    def validation_loss(*arguments) -> dict[str, float]:
        views.append(arguments[-1])
        return {"all": 1.0}

    monkeypatch.setattr(train_pretrain, "validation_loss", validation_loss)
    words = "--steps 2 --rows 2 --eval_every 2 --workers 0 --dtype float32 --pruner coarse".split()
    train_pretrain.main([*words, *small_halves, "--out", str(tmp_path / "a")])
    assert views == ["pruned"]
    cfg = model.VLM.from_pretrained(tmp_path / "a").cfg
    assert cfg.prune.name == "coarse"
    assert log_of(tmp_path / "a")[0]["visual_tokens"] == cfg.visual_tokens("pruned")


def test_scales_that_no_rank_computes_do_not_stop_ddp(tmp_path):
    ranks = ([("chat", "pruned")], [("text", "pruned"), ("chat", "pruned")])
    helpers.assert_ranks_equal_one_process([ranks], config("chain", "coarse"), tmp_path)
