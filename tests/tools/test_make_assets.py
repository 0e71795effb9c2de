"""The makers of the shipped halves: the tokenizer bit for bit, a step of each half's training."""

import pytest
import torch

import data
import model
from tools import make_assets


@pytest.mark.slow
def test_the_tokenizer_comes_out_as_shipped(tmp_path, monkeypatch):
    shipped = (model.ASSETS / "scenes.tiktoken").read_bytes()
    monkeypatch.setattr(model, "ASSETS", tmp_path)
    make_assets.main(["tokenizer"])
    assert (tmp_path / "scenes.tiktoken").read_bytes() == shipped


def test_a_patch_names_what_covers_it():
    scene = data.make_scene("train", 1)
    target = make_assets.dense_targets(scene, 16)
    for thing in scene.things:
        row, column = (int(x / data.CANVAS * 16) for x in (thing.y, thing.x))
        colour, kind, *letters = target[16 * row + column, :5].astype(int)
        assert (list(data.COLOURS)[colour], make_assets.KINDS[kind]) == thing.pair
        assert letters == 3 * [len(data.LETTERS)]


def test_a_step_of_both_halves_lowers_the_loss():
    torch.manual_seed(0)
    tokenizer = data.find_tokenizer(model.ModelConfig())
    vit = model.ViT(model.ViTConfig(layers=1))
    lm = model.Decoder(model.DecoderConfig(tokenizer.vocab_size, layers=1))
    head = make_assets.DenseHead(vit.cfg.width)
    rows = make_assets.text_batch(0, 4, tokenizer)

    def losses(named_parameters, loss_of) -> list[float]:
        values, optimizers = [], make_assets.make_optimizer(named_parameters, 0.01)
        for step in range(4):
            loss = loss_of()
            loss.backward()
            make_assets.step_all(optimizers, step, 0.0)
            values.append(loss.item())
        return values

    trained = [(name, p) for name, p in vit.named_parameters() if "post_layernorm" not in name]
    trained += head.named_parameters()
    vit_losses = losses(trained, lambda: make_assets.dense_step(vit, head, range(4), 64, "train")[0])
    lm_losses = losses(lm.named_parameters(), lambda: make_assets.text_step(lm, rows)[0])
    assert vit_losses[-1] < vit_losses[0] and lm_losses[-1] < lm_losses[0]
    assert make_assets.score_text(lm, tokenizer, 2).startswith("colour")
