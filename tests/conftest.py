"""Shared fixtures: two small random halves in Hugging Face layout, so that no test needs trained weights."""

import pytest
import torch

import data
import model

torch.set_num_threads(1)  # these models are too small to gain from more


@pytest.fixture(scope="session")
def small_halves(tmp_path_factory) -> list[str]:
    """Flags that start a run from a 64 px, 2-block encoder and a 2-block decoder."""
    folder = tmp_path_factory.mktemp("halves")
    torch.manual_seed(0)
    vocab = data.Tokenizer.from_pretrained(model.ASSETS / "scenes.tiktoken").vocab_size
    model.ViT(model.ViTConfig(64, 8, 32, 4, 2, 64)).save_pretrained(folder / "vit")
    image = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    model.write_json(folder / "vit" / "preprocessor_config.json", image)
    model.Decoder(model.DecoderConfig(vocab, 32, 2, 2, 1, 16, 64)).save_pretrained(folder / "lm")
    halves = ["--encoder_from", str(folder / "vit"), "--decoder_from", str(folder / "lm")]
    return [*halves, "--connector.width", "32", "--connector.heads", "2"]
