"""The two backbones: against numbers of transformers, loading, saving, positions, documents, the cache."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import model
from model import Decoder, UserError, ViT

HF = Path(__file__).parent / "fixtures" / "hf"
DECODERS = ("llama", "qwen2", "qwen3")


def check_half(path: Path, name: str) -> None:
    """The checkpoint at `path` gives what transformers gives for the one called `name`."""
    expected = load_file(HF / name / "expected.safetensors")
    with torch.no_grad():
        if name == "clip-vision":
            vit, pixels = ViT.from_pretrained(path), expected["in.pixel_values"]
            states = vit.hidden_states(pixels)
            assert len(states) == 4 and len(vit.hidden_states(pixels, last=1)) == 2  # stops where it may
            for n, state in enumerate(states):
                assert_close(state, expected[f"out.hidden_{n}"], rtol=0, atol=1e-5)
        else:
            logits = Decoder.from_pretrained(path)(expected["in.input_ids"])
            assert_close(logits, expected["out.logits"], rtol=0, atol=1e-5)


def rewritten(folder: Path, name: str, change) -> Path:
    """A copy of a checkpoint whose config and weights `change(config, weights)` edits in place."""
    config = json.loads((HF / name / "config.json").read_text())
    weights = load_file(HF / name / "model.safetensors")
    change(config, weights)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def load_half(path: Path, name: str) -> ViT | Decoder:
    return (ViT if name == "clip-vision" else Decoder).from_pretrained(path)


# --- Hugging Face checkpoints
@pytest.mark.parametrize("name", ["clip-vision", *DECODERS])
def test_equals_transformers(name):
    check_half(HF / name, name)


def older_vit(config, weights):
    for key in list(weights):
        weights[f"vision_model.{key}"] = weights.pop(key)
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]


def older_decoder(config, weights):
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None


@pytest.mark.parametrize("name", ["clip-vision", *DECODERS])
def test_older_layout(name, tmp_path):
    check_half(rewritten(tmp_path, name, older_vit if name == "clip-vision" else older_decoder), name)


def test_keys_that_are_left_out_or_null_have_transformers_defaults(tmp_path):
    def change(config, weights):
        del config["tie_word_embeddings"], config["attention_bias"]
        config["head_dim"] = None

    check_half(rewritten(tmp_path, "llama", change), "llama")


@pytest.mark.parametrize("name", ["clip-vision", *DECODERS])
def test_halves_survive_a_round_trip(name, tmp_path):
    half = load_half(HF / name, name)
    half.save_pretrained(tmp_path)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path, HF / name))
    assert ours.keys() == theirs.keys()  # Hugging Face names
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert load_half(tmp_path, name).cfg == half.cfg
    check_half(tmp_path, name)
    half.save_pretrained(tmp_path, torch.bfloat16)
    assert {v.dtype for v in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("clip-vision", "encoder.layers.1.mlp.fc1.weight"),
        ("llama", "model.layers.2.self_attn.k_proj.weight"),
        ("qwen2", "model.layers.0.self_attn.q_proj.bias"),
        ("qwen3", "model.layers.1.self_attn.q_norm.weight"),
    ],
)
def test_broken_checkpoints_are_named(name, tensor, tmp_path):
    def refused(change, *words):
        with pytest.raises(UserError) as error:
            load_half(rewritten(tmp_path, name, change), name)
        for word in (str(tmp_path), *words):
            assert word in str(error.value)

    short = tensor.removeprefix("model.")
    shape = str(tuple(load_file(HF / name / "model.safetensors")[tensor].shape))
    refused(lambda config, weights: config.update(model_type="mamba"), "config.json", "'mamba'")
    refused(lambda config, weights: weights.pop(tensor), short, "missing")
    refused(lambda config, weights: weights.update({tensor: torch.zeros(3, 5)}), short, "(3, 5)", shape)
    refused(lambda config, weights: weights.update({"what.is.this": torch.zeros(1)}), "what.is.this")
    (tmp_path / "config.json").write_text("{\n 'no': json\n}")
    with pytest.raises(UserError, match="config.json line 2"):
        load_half(tmp_path, name)
    for file in ("config.json", "model.safetensors"):
        rewritten(tmp_path, name, lambda config, weights: None)
        (tmp_path / file).unlink()
        with pytest.raises(UserError, match=f"{tmp_path}/{file} does not exist"):
            load_half(tmp_path, name)


@pytest.mark.parametrize(
    "name, key, value, word",
    [
        ("llama", "rope_parameters", {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0}, "yarn"),
        (
            "qwen2",
            "rope_parameters",
            {"type": "linear", "factor": 2.0},
            "linear",
        ),  # the older key for the type
        ("clip-vision", "hidden_act", "relu", "relu"),
    ],
)
def test_what_we_do_not_have_is_named(name, key, value, word, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/config.json.*{word}"):
        load_half(rewritten(tmp_path, name, lambda config, weights: config.update({key: value})), name)


# --- ViT positions
def bicubic(old: int, new: int, align_corners: bool) -> torch.Tensor:
    """torch's bicubic resize of one axis as a (new, old) matrix: Keys' kernel, a = -0.75, clamped borders."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        at = i * (old - 1) / (new - 1) if align_corners else (i + 0.5) * old / new - 0.5
        for j in range(int(at // 1) - 1, int(at // 1) + 3):
            d, a = abs(at - j), -0.75
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), old - 1)] += near if d <= 1 else far
    return matrix


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("side", [3, 6, 8])
def test_positions_are_resized_bicubically(side, align_corners):
    vit = ViT.from_pretrained(HF / "clip-vision")
    vit.cfg.align_corners = align_corners
    table = vit.embeddings.position_embedding.weight.detach().double()
    grid, m = table[1:].unflatten(0, (4, 4)), bicubic(4, side, align_corners)
    expected = torch.cat([table[:1], torch.einsum("ir,jc,rcd->ijd", m, m, grid).flatten(0, 1)])
    assert_close(vit.embeddings.positions(side).double(), expected, rtol=0, atol=1e-6)
    pixels = torch.randn(1, 3, 7 * side, 7 * side)
    before = vit.hidden_states(pixels)[-1]  # resized at every call
    vit.resize(7 * side)
    assert vit.cfg.image_size == 7 * side and vit.embeddings.position_embedding.weight.is_leaf
    assert torch.equal(vit.hidden_states(pixels)[-1], before)  # resized once and for all


# --- Cache and documents
@pytest.mark.parametrize("chunks", [[1] * 17, [9, 5, 3]])
@pytest.mark.parametrize("name", DECODERS)
def test_cache_equals_the_full_forward(name, chunks):
    decoder = Decoder.from_pretrained(HF / name)
    ids = load_file(HF / name / "expected.safetensors")["in.input_ids"]
    causal = model.document_mask(torch.zeros_like(ids))
    cache = model.KVCache(decoder.cfg, 2, 17)
    steps, start = [], 0
    with torch.no_grad():
        for n in chunks:
            here = slice(start, start + n)
            x, positions = decoder.embed_tokens(ids[:, here]), torch.arange(17)[here].expand(2, -1)
            steps.append(decoder.hidden(x, positions, causal[:, :, here, : start + n], cache))
            start += n
        assert_close(decoder.head(torch.cat(steps, 1)), decoder(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_documents_in_a_row_do_not_see_each_other(name):
    decoder = Decoder.from_pretrained(HF / name)
    torch.manual_seed(0)
    ids = torch.randint(0, 96, (1, 20))
    doc_ids = torch.tensor([[4] * 8 + [2] * 9 + [-1] * 3])  # padding behind
    positions = torch.tensor([[*range(8), *range(9), 0, 0, 0]])

    def hidden(ids):
        return decoder.hidden(decoder.embed_tokens(ids), positions, model.document_mask(doc_ids))

    packed = hidden(ids)
    assert packed.isfinite().all()
    for here in (slice(0, 8), slice(8, 17)):
        alone = decoder.head(packed[:, here])
        assert_close(alone, decoder(ids[:, here]), rtol=0, atol=1e-5)
        other = ids.clone()
        other[:, here] = (other[:, here] + 1) % 96
        changed = (hidden(other) != packed).any(-1)[0]
        assert changed[here].all() and changed.sum() == here.stop - here.start  # the rest is bit-equal
