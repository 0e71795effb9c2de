"""Shared fixtures: two small random halves in Hugging Face layout, so that no test needs trained weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import data
import model
from tools import export

torch.set_num_threads(1)  # these models are too small to gain from more


@pytest.fixture(scope="session")
def small_halves(tmp_path_factory) -> list[str]:
    """Flags that start a run from a 64 px, 2-block encoder and a 2-block decoder."""
    folder = tmp_path_factory.mktemp("halves")
    torch.manual_seed(0)
    vocab = data.Tokenizer.from_pretrained(model.ASSETS / "scenes.tiktoken").vocab_size
    export.save_vit(model.ViT(model.ViTConfig(64, 8, 32, 4, 2, 64)), folder / "vit")
    image = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    model.write_json(folder / "vit" / "preprocessor_config.json", image)
    export.save_decoder(model.Decoder(model.DecoderConfig(vocab, 32, 2, 2, 1, 16, 64)), folder / "lm")
    halves = ["--encoder_from", str(folder / "vit"), "--decoder_from", str(folder / "lm")]
    return [*halves, "--connector.width", "32", "--connector.heads", "2"]


@pytest.fixture
def add_preset(tmp_path_factory, monkeypatch):
    """A function that adds a preset for this test: that of the demo with other recipes."""
    folder = tmp_path_factory.mktemp("presets")
    shutil.copytree(model.PRESETS, folder, dirs_exist_ok=True)
    monkeypatch.setattr(model, "PRESETS", folder)

    def add(name: str, **recipes: dict) -> Path:
        values = {**model.read_json(folder / "tiny.json"), **recipes}
        (folder / f"{name}.json").write_text(json.dumps(values))
        return folder / f"{name}.json"

    return add


@pytest.fixture
def fp64():
    """Double precision and a fixed seed, for comparisons with formulas."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
