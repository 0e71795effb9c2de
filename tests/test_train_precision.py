"""What dtype every weight is kept in: --frozen bfloat16 and --pure_bf16, in a step and over several runs."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    TOKENIZER,
    Killed,
    assert_same_weights,
    losses_of,
    run_stage,
    small_batch,
    small_config,
    weights_of,
)

import model
import train_pretrain
import train_sft
from train_pretrain import RunConfig

SMALL = "--batch_size 8 --row_length 128 --workers 0 --log_every 1 --device cpu --compile false".split()
HALF, FULL = torch.bfloat16, torch.float32


def small_vlm(train: str = "connector", kind: str = "chain", rank: int = 0, **flags) -> model.VLM:
    torch.manual_seed(0)
    vlm = model.VLM(small_config(
        connector=model.ConnectorConfig(kind, [1, 2], 32, 2, [4, 2], [4, 1], 4, key_positions=True),
        decoder=model.DecoderConfig(TOKENIZER.vocab_size, 32, 2, 2, 1, 16, 64, qkv_bias=True, tied=False),
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
    flags = [*SMALL, *small_halves, *"--pure_bf16 true --dtype bfloat16 --lr 3e-3".split()]
    train_pretrain.main([*flags, "--steps", "30", "--out", str(tmp_path / "a")])
    losses = [*losses_of(tmp_path / "a").values()]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert {value.dtype for value in weights_of(tmp_path / "a").values()} == {HALF}
    state = torch.load(model.find_step(tmp_path / "a") / "state.pt", weights_only=True)
    for optimizer in state["optimizers"]:  # AdamW, and the preset's Muon
        moments = [value for moment in optimizer["state"].values() for value in moment.values()]
        assert {m.dtype for m in moments if m.ndim} == {HALF}


def test_a_run_with_halved_matrices_goes_on_and_hands_over(tmp_path, small_halves, monkeypatch):
    """Exact resume; in stage 2 what trains is whole again, from the values that were saved."""
    train = "--train connector --frozen bfloat16 --dtype bfloat16 --warmup 0 --muon_lr 0 --steps 4".split()
    flags = [*SMALL, *small_halves, *train, "--save_every", "2"]
    train_pretrain.main([*flags, "--out", str(tmp_path / "whole")])
    first = weights_of(tmp_path / "whole")
    assert first["decoder.embed_tokens.weight"].dtype == HALF
    assert first["connector.proj.weight"].dtype == FULL
    with pytest.raises(Killed):
        run_stage(train_pretrain, [*flags, "--out", str(tmp_path / "cut")], 2, monkeypatch)
    train_pretrain.main([*flags, "--resume", "auto", "--out", str(tmp_path / "cut")])
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")

    sft = [*SMALL, "--init", str(tmp_path / "whole"), *train, "--train", "connector,decoder", "--lr", "0"]
    train_sft.main([*sft, "--out", str(tmp_path / "sft")])
    second = weights_of(tmp_path / "sft")
    assert {v.dtype for k, v in second.items() if k.startswith(("connector", "decoder"))} == {FULL}
    assert second["vit.encoder.layers.0.mlp.fc1.weight"].dtype == HALF
    assert all(torch.equal(second[name].float(), value.float()) for name, value in first.items())


HALVED = [("connector", "bfloat16"), ("connector", "float32"), ("decoder", "bfloat16")]


@pytest.mark.parametrize("train, dtype", HALVED)
def test_tokens_scale_up_from_halved_matrices(train, dtype, tmp_path, small_halves):
    """Also where the connector, whose scales are made anew, was frozen, and where there is no autocast."""
    flags = [*SMALL, *small_halves, "--train", train, "--frozen", "bfloat16", "--dtype", "bfloat16"]
    train_pretrain.main([*flags, "--steps", "1", "--out", str(tmp_path / "a")])
    sft = [*SMALL, "--init", str(tmp_path / "a"), "--scale", "32to144", "--dtype", dtype, "--steps", "1"]
    train_sft.main([*sft, "--out", str(tmp_path / "b")])
    assert model.VLM.from_pretrained(tmp_path / "b").cfg.visual_tokens() == 144
