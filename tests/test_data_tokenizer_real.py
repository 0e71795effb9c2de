"""A researcher's way, end to end: halves as the hub has them (small widths, random weights, the real Qwen
vocabulary or a small one of Vicuna's kind), a preset's recipe, LLaVA's JSON, both stages, evaluation, export,
and loading what was exported.
"""

import importlib.metadata
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import chat, log_of, write
from helpers_tokenizers import write_tokenizer
from PIL import Image

import data
import eval as evaluation
import model
import train_pretrain
import train_sft
from tools import check, export

GEOMETRY = "--vit.image_size 0 --connector.levels 2,3 --connector.width 32 --connector.heads 2".split()
GEOMETRY += "--connector.windows 8,2 --connector.queries 16,1".split()
FEW = "--batch_size 4 --micro_steps 1 --workers 0 --device cpu --log_every 1".split()


def write_halves(folder: Path) -> None:
    """A full SigLIP2 file and a Qwen2.5 folder."""
    torch.manual_seed(0)
    vit = model.ViTConfig(64, 8, 32, 4, 2, 64, "gelu_pytorch_tanh", 1e-6, False, "siglip", False, "")
    vit.patch_bias = True
    export.save_vit(model.ViT(vit), folder / "vit")
    config = model.read_json(folder / "vit" / "config.json")
    del config["model_type"], config["hidden_act"], config["layer_norm_eps"]  # the hub's file has no defaults
    model.write_json(folder / "vit" / "config.json", {"model_type": "siglip", "vision_config": config})
    size = {"height": 64, "width": 64}
    image = {"image_mean": [0.4] * 3, "image_std": [0.3] * 3, "resample": 2, "size": size}
    model.write_json(folder / "vit" / "preprocessor_config.json", image)
    lm = model.DecoderConfig(151936, 32, 2, 4, 2, 8, 64, 1e6, qkv_bias=True)
    export.save_decoder(model.Decoder(lm), folder / "lm", torch.bfloat16)
    ranks = next(f for f in importlib.metadata.files("dashscope") if f.name == "qwen.tiktoken")
    shutil.copy(ranks.locate(), folder / "lm")


def write_vicuna_halves(folder: Path) -> None:
    """A CLIP and a Llama folder; the tokenizer has the form that transformers gives Vicuna's."""
    torch.manual_seed(0)
    export.save_vit(model.ViT(model.ViTConfig(64, 8, 32, 4, 2, 64)), folder / "vit")
    image = {"image_mean": [0.4] * 3, "image_std": [0.3] * 3, "resample": 3}
    model.write_json(folder / "vit" / "preprocessor_config.json", image)
    lm = model.DecoderConfig(512, 32, 2, 4, 4, 8, 64, tied=False)
    export.save_decoder(model.Decoder(lm), folder / "lm")
    write_tokenizer(folder / "lm", "metaspace")


def write_chats(folder: Path) -> Path:
    rng, answer = np.random.default_rng(0), "Café number {}.<|im_end|><|im_start|>"  # data, not control
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    records = [chat(f"{i}.png", "<image>\nWhat is this?", answer.format(i)) for i in range(8)]
    return write(folder / "chats.json", records)


@pytest.mark.parametrize("preset", ["llava-1.5-vicuna", "cos-7b"])
def test_the_papers_own_decoder_takes_steps_of_both_stages(preset, tmp_path):
    write_vicuna_halves(tmp_path)
    chats = str(write_chats(tmp_path))
    geometry = GEOMETRY if preset == "cos-7b" else ["--vit.image_size", "0", "--connector.levels", "3"]
    halves = ["--encoder_from", str(tmp_path / "vit"), "--decoder_from", str(tmp_path / "lm")]
    flags = ["--preset", preset, *halves, *geometry, *FEW, "--data", chats, "--out", str(tmp_path / "1")]
    train_pretrain.main([*flags, "--steps", "1"])
    more = ["--init", str(tmp_path / "1"), *FEW, "--data", chats, "--out", str(tmp_path / "2")]
    train_sft.main([*more, "--steps", "1"])
    for run in ("1", "2"):
        step = model.find_step(tmp_path / run)
        files = (step / "tokenizer" / "tokenizer.json", tmp_path / "lm" / "tokenizer.json")
        assert files[0].read_bytes() == files[1].read_bytes()
        losses = [line["loss"] for line in log_of(tmp_path / run)]
        assert len(losses) == 1 and 3 < losses[0] < 9  # of 512 ids, log 512 = 6.2
    tokenizer = data.Tokenizer.from_pretrained(step / "tokenizer")
    ((chat, _),) = data.open_sources(chats, "sft")
    pieces = data.pieces_of(chat[0], tokenizer)
    text = "".join(
        "<image>" if isinstance(piece, int) else check.text_of(piece[0], tokenizer) for piece in pieces
    )
    answer = "Café number 0.<|im_end|><|im_start|>"
    assert text == f"<s> {tokenizer.system} USER: <image> What is this? ASSISTANT: {answer}</s>"


@pytest.mark.slow
def test_from_the_hubs_halves_to_an_export(tmp_path, capsys):
    write_halves(tmp_path)
    chats = str(write_chats(tmp_path))
    halves = ["--encoder_from", str(tmp_path / "vit"), "--decoder_from", str(tmp_path / "lm")]
    stage1, stage2 = str(tmp_path / "1"), str(tmp_path / "2")
    flags = ["--preset", "siglip2-qwen2.5-0.5b", *halves, *GEOMETRY, *FEW]
    train_pretrain.main([*flags, "--data", chats, "--steps", "2", "--out", stage1])
    again = ["--init", stage1, "--scale", "32to144", *FEW, "--data", chats, "--out", stage2]
    lora = "--steps 2 --save_every 1 --lora.rank 4 --train connector,lora".split()
    train_sft.main([*again, *lora])
    train_sft.main([*again, "--steps", "4", "--resume", "auto"])
    vlm = model.VLM.from_pretrained(stage2)
    assert vlm.cfg.visual_tokens() == 144 and vlm.cfg.vit.image_size == 128 and vlm.cfg.lora.rank == 4
    assert vlm.cfg.image == model.ImageConfig([0.4] * 3, [0.3] * 3, 2)
    tokenizer = data.Tokenizer.from_pretrained(model.find_step(stage2) / "tokenizer")
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0] and tokenizer.end == 151645
    told = tokenizer.encode("Café number 0.<|im_end|><|im_start|>")
    assert not {151644, 151645} & set(told) and tokenizer.decode(told).endswith("<|im_end|><|im_start|>")
    report = tmp_path / "eval.json"
    evaluation.main(["--model", stage2, "--tasks", "scenes_vqa", "--n", "4", "--out", str(report)])
    assert model.read_json(report)["results"][0]["n"] == 4 * 5  # five kinds of question
    export.main([stage2, str(tmp_path / "hf")])
    vit = model.ViT.from_pretrained(tmp_path / "hf" / "encoder")
    lm = model.Decoder.from_pretrained(tmp_path / "hf" / "decoder")
    exported = data.Tokenizer.from_pretrained(tmp_path / "hf" / "decoder")
    assert exported.encode("é") == tokenizer.encode("e\u0301")
    pixels, ids = torch.randn(1, 3, 128, 128), torch.randint(0, 151936, (1, 9))
    with torch.no_grad():
        assert torch.equal(vit.hidden_states(pixels)[-1], vlm.vit.hidden_states(pixels)[-1])
        torch.testing.assert_close(lm(ids), vlm.decoder(ids), rtol=0, atol=1e-5)
