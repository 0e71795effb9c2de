"""LoRA: counts, step 0, gradients, merging, saving, and runs that train adapters."""

import dataclasses

import helpers
import pytest
import torch
from helpers import TOKENIZER, small_batch, weights_of
from safetensors.torch import load_file
from torch.testing import assert_close

import model
import train_pretrain
import train_sft
from model import Decoder, DecoderConfig, LoraConfig, UserError
from tools import export

SMALL = [*helpers.SMALL, "--muon_lr", "0"]


def small_config(rank: int = 4) -> model.ModelConfig:
    decoder = DecoderConfig(TOKENIZER.vocab_size, 32, 2, 2, 1, 16, 64, qkv_bias=True)
    return helpers.small_config(decoder=decoder, lora=LoraConfig(rank, 8.0))


def small_vlm(rank: int = 4, trained: bool = False) -> model.VLM:
    """`trained`: the adapters count for something, as they do after some steps."""
    torch.manual_seed(0)
    vlm = model.VLM(small_config(rank))
    with torch.no_grad():
        for name, p in vlm.named_parameters():
            if trained and ".lora_" in name:
                p.copy_(torch.randn_like(p) * 0.3)
    return vlm


IDS = torch.arange(24).reshape(2, 12)


# --- Counts
def trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_the_final_model_of_chain_of_sight_trains_532_million():
    """The number of the paper, at 448 px with 1296 tokens and rank 64."""
    cfg = model.scaled_config(model.preset("cos-7b")["model"], "80to1296")
    assert (cfg.vit.image_size, cfg.lora.rank) == (448, 64)
    with torch.device("meta"):
        vlm = model.VLM(cfg)
    vlm.set_trainable(["vit", "connector", "lora"], isolator=False)
    assert trainable(vlm.vit) == 291_367_936  # 23 of 24 blocks, patches, CLS, 1025 positions, the first norm
    assert trainable(vlm.connector) == 81_098_752
    assert trainable(vlm.decoder) == 32 * 64 * (4 * (4096 + 4096) + 3 * (4096 + 11008)) == 159_907_840
    assert round(trainable(vlm) / 1e6, 2) == 532.37


def test_adapters_stand_beside_seven_matrices_and_only_what_is_named_has_gradients():
    vlm = small_vlm()
    names = {name for name, part in vlm.decoder.named_modules() if isinstance(part, model.LoraLinear)}
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    assert names == {
        *(f"layers.{i}.self_attn.{part}" for i in range(2) for part in attention),
        *(f"layers.{i}.mlp.{part}" for i in range(2) for part in mlp),
    }
    names_before = {name for name, _ in small_vlm(0).named_parameters()}
    assert names_before == {name for name, _ in vlm.named_parameters() if ".lora_" not in name}
    vlm = small_vlm(trained=True)
    vlm.set_trainable(["connector", "lora"], isolator=False)
    logits, _, _ = vlm(small_batch([("chat", "full")] * 2, vlm.cfg))
    (logits * torch.randn_like(logits)).sum().backward()
    for name, p in vlm.named_parameters():
        trains = name.startswith("connector.") or ".lora_" in name
        assert p.requires_grad == trains and (p.grad is not None) == trains, name
        assert not trains or p.grad.abs().max() > 0, name
    vlm.set_trainable(["decoder"], isolator=False)
    assert {name for name, p in vlm.named_parameters() if p.requires_grad} == {
        name for name, p in vlm.named_parameters() if name.startswith("decoder.")
    }


# --- Values
@torch.no_grad()
def test_step_0_is_the_base_model_and_an_adapter_adds_alpha_over_rank_times_b_a():
    with_adapters, base = small_vlm(), small_vlm(0)
    base.load_state_dict({k: v for k, v in with_adapters.state_dict().items() if ".lora_" not in k})
    assert torch.equal(with_adapters.decoder(IDS), base.decoder(IDS))
    assert all(p.any() for name, p in with_adapters.named_parameters() if name.endswith("lora_a"))
    base = torch.nn.Linear(6, 5)
    lora = model.LoraLinear(base, LoraConfig(4, 8.0))
    lora.lora_b.normal_()
    x = torch.randn(3, 6)
    by_hand = x @ (base.weight + 8 / 4 * lora.lora_b @ lora.lora_a).T + base.bias
    assert_close(lora(x), by_hand, rtol=0, atol=1e-5)


@torch.no_grad()
def test_adapters_are_saved_and_merged_weights_are_the_same_model(tmp_path):
    vlm = small_vlm(trained=True)
    base = Decoder(vlm.cfg.decoder)
    weights = model.merged(vlm.decoder)
    shapes = [{k: v.shape for k, v in w.items()} for w in (weights, base.state_dict())]
    assert shapes[0] == shapes[1]
    base.load_state_dict(weights)
    expected = vlm.decoder(IDS)
    assert_close(base(IDS), expected, rtol=0, atol=1e-5)
    plain = small_vlm(0).decoder
    plain.load_state_dict({k: v for k, v in vlm.decoder.state_dict().items() if ".lora_" not in k})
    assert (plain(IDS) - expected).abs().max() > 1e-2  # without them it is another model
    export.save_decoder(vlm.decoder, tmp_path)  # what leaves for Hugging Face is merged
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))
    assert_close(Decoder.from_pretrained(tmp_path)(IDS), expected, rtol=0, atol=1e-5)
    vlm.save_pretrained(tmp_path / "run")
    again = model.VLM.from_pretrained(tmp_path / "run")
    assert again.cfg == vlm.cfg and again.state_dict().keys() == vlm.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), vlm.parameters()))
    assert torch.equal(again.decoder(IDS), vlm.decoder(IDS))


@torch.no_grad()
@pytest.mark.parametrize("cfg", [LoraConfig(2, 8.0), LoraConfig(4, 16.0), LoraConfig(0), LoraConfig(4, 8.0)])
def test_other_adapters_start_from_the_merged_model(cfg):
    vlm = small_vlm(trained=True)
    before, expected = dict(vlm.decoder.named_parameters()), vlm.decoder(IDS)
    vlm.adapt(dataclasses.replace(vlm.cfg, lora=cfg))
    assert_close(vlm.decoder(IDS), expected, rtol=0, atol=1e-5)
    assert vlm.cfg.lora == cfg
    after = dict(vlm.decoder.named_parameters())
    same = cfg == LoraConfig(4, 8.0)
    assert all((after[name] is p) == same for name, p in before.items() if name in after and "_proj" in name)
    ranks = {p.shape[0] for name, p in after.items() if name.endswith("lora_a")}
    assert ranks == ({cfg.rank} if cfg.rank else set())
    if not same:
        assert not any(p.any() for name, p in after.items() if name.endswith("lora_b"))


# --- Runs
def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_runs_change_only_the_adapters_and_carry_them_on(tmp_path, small_halves):
    a, b, c = (tmp_path / name for name in "abc")
    flags = [*SMALL, "--train", "connector,lora"]
    stage1 = [*flags, *small_halves, "--lora.rank", "4", "--lora.alpha", "8", "--steps"]
    train_pretrain.main([*stage1, "1", "--lr", "0", "--out", str(tmp_path / "0")])  # where it begins
    train_pretrain.main([*stage1, "3", "--warmup", "0", "--out", str(a)])
    start, first = weights_of(tmp_path / "0"), weights_of(a)
    trained = {name for name in first if name.startswith("connector.") or ".lora_" in name}
    assert changed(start, first) == trained and sum(".lora_" in name for name in trained) == 2 * 7 * 2

    sft = [*flags, "--init", str(a), "--steps", "2", "--warmup", "0"]
    train_sft.main([*sft, "--out", str(b)])  # the same adapters go on
    second = weights_of(b)
    assert second.keys() == first.keys()
    moved = changed(first, second)
    assert moved <= {*trained, "isolator.weight"} and {n for n in trained if ".lora_" in n} <= moved
    assert model.VLM.from_pretrained(b).cfg.lora == LoraConfig(4, 8.0)

    train_sft.main([*sft, "--lr", "0", "--lora.rank", "2", "--out", str(c)])  # others, on the merged model
    old, new = (model.VLM.from_pretrained(run).decoder for run in (a, c))
    assert new.layers[0].mlp.up_proj.lora_a.shape[0] == 2
    with torch.no_grad():
        assert_close(new(IDS), old(IDS), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="--lora.rank cannot change"):  # not in the middle of a run
        train_sft.main([*sft, "--out", str(c), "--resume", "auto", "--lora.rank", "8"])
