"""Helpers of the tests of eval.py and of what is built on it: a tiny model, its checkpoint, prompts."""

from pathlib import Path

import torch

import data
import model

TOKENIZER = data.Tokenizer.from_pretrained(model.ASSETS / "scenes.tiktoken")


def tiny_vlm(context: int = 2048, seed: int = 0) -> model.VLM:
    """4x4 patches, 4 + 4 visual tokens of which the fast mode keeps 3; weights so large that outputs vary."""
    torch.manual_seed(seed)
    vlm = model.VLM(model.ModelConfig(
        vit=model.ViTConfig(image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_width=32),
        connector=model.ConnectorConfig("chain", [1, 2], 16, 2, windows=[4, 2], queries=[4, 1]),
        decoder=model.DecoderConfig(
            TOKENIZER.vocab_size, 32, 2, 4, 2, 8, mlp_width=48, tied=True, context=context
        ),
        prune=model.PruneConfig(keep=3, isolator=2),
    ))  # fmt: skip
    for p in vlm.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return vlm.eval()


def save_tiny_run(folder: Path, seed: int = 0) -> Path:
    """A checkpoint that eval.py loads."""
    step = folder / "step-00000001"
    tiny_vlm(seed=seed).save_pretrained(step, {"stage": "pretrain", "train": {"init": "", "seed": 0}})
    TOKENIZER.save(step / "tokenizer")
    return step


def prompt_text(pieces: list, tokenizer=TOKENIZER) -> str:
    """A prompt as text, pictures as [n]."""
    return "".join(f"[{p}]" if isinstance(p, int) else tokenizer.show(p[0]) for p in pieces)
