"""The two backbones: against numbers of transformers, loading, saving, positions, documents, the cache."""

import json
from pathlib import Path

import pytest
import torch
from helpers import TOKENIZER, slot_mask, tiny_vlm
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import data
import model
from model import Decoder, DecoderConfig, UserError, ViT
from tools import export

HF = Path(__file__).parent / "fixtures" / "hf"
VITS = ("clip-vision", "clip-full", "siglip-vision", "aimv2-vision", "dinov2-vision")
DECODERS = ("llama", "llama3-rope", "qwen2", "qwen3")


def load_half(path: Path, name: str) -> ViT | Decoder:
    return (ViT if name in VITS else Decoder).from_pretrained(path)


def save_half(half: ViT | Decoder, *args) -> None:
    save = export.save_vit if isinstance(half, ViT) else export.save_decoder
    save(half, *args)


@torch.no_grad()
def check_half(path: Path, name: str) -> None:
    """The checkpoint at `path` gives what transformers gives for the one called `name`."""
    expected, half = load_file(HF / name / "expected.safetensors"), load_half(path, name)
    if name in VITS:
        pixels = expected["in.pixel_values"]
        states = half.hidden_states(pixels)
        assert len(states) == half.cfg.layers + 1
        assert len(half.hidden_states(pixels, last=1)) == 2  # stops where it may
        last = half.post_layernorm(states[-1])
        if name == "clip-vision":  # transformers norms only CLIP's CLS token
            assert_close(last[:, 0], expected["out.pooler_output"], rtol=0, atol=1e-5)
        elif name != "clip-full":
            assert_close(last, expected["out.last_hidden_state"], rtol=0, atol=1e-5)
    else:
        ids = expected["in.input_ids"]
        assert_close(half(ids), expected["out.logits"], rtol=0, atol=1e-5)
        x, positions = half.embed(ids), torch.arange(17).expand_as(ids)
        block, _ = half.layers[0](
            x, model.rope_tables(positions, half.cfg), model.document_mask(torch.zeros_like(ids))
        )
        states = (x, block)
    assert sum("hidden_" in key for key in expected) == len(states) + ("out.last_hidden_state" in expected)
    for n, state in enumerate(states):
        assert_close(state, expected[f"out.hidden_{n}"], rtol=0, atol=1e-5)


def rewritten(folder: Path, name: str, change) -> Path:
    """A copy of a checkpoint whose config and weights `change(config, weights)` edits in place."""
    config = json.loads((HF / name / "config.json").read_text())
    weights = load_file(HF / name / "model.safetensors")
    change(config, weights)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
    return folder


# --- Hugging Face checkpoints
@pytest.mark.parametrize("name", [*VITS, *DECODERS])
def test_equals_transformers(name):
    check_half(HF / name, name)


def with_prefix(config, weights):
    for key in list(weights):
        weights[f"vision_model.{key}"] = weights.pop(key)
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]


def with_text_half(config, weights):
    """A full SigLIP (fixed-resolution SigLIP2 files say siglip too)."""
    with_prefix(config, weights)
    vision = dict(config)
    config.clear()
    config.update(model_type="siglip", vision_config=vision, text_config={"hidden_size": 8, "num_heads": 1})
    for key in ("embeddings.position_embedding.weight", "encoder.layers.0.mlp.fc1.weight", "head.weight"):
        weights[f"text_model.{key}"] = torch.zeros(8, 8)
    weights.update(logit_scale=torch.ones(1), logit_bias=torch.ones(1))


def without_head(config, weights):
    for key in [key for key in weights if key.startswith(("head.", "embeddings.mask_token"))]:
        del weights[key]
    config.update(vision_use_head=False, use_head=False, use_mask_token=False)


APPLE = {  # transformers' name -> ml-aim's
    "embeddings.patch_embed": "preprocessor.patchifier.proj",
    "embeddings.rms_norm": "preprocessor.patchifier.norm",
    "attention.out_proj": "attn.proj",
    "ffn.gate_proj": "mlp.fc1",
    "ffn.up_proj": "mlp.fc3",
    "ffn.down_proj": "mlp.fc2",
    "rms_norm1": "norm_1",
    "rms_norm2": "norm_2",
    "rms_norm": "trunk.post_trunk_norm",
}


def as_apple_has_it(config, weights):
    """AIMv2's first files: other names, q, k and v in one matrix, positions with a leading axis."""
    without_head(config, weights)
    before = dict(weights)
    weights.clear()
    weights["preprocessor.pos_embed"] = before.pop("embeddings.position_embedding.weight")[None]
    for i in range(config["num_hidden_layers"]):
        names = [f"encoder.layers.{i}.attention.{part}_proj.weight" for part in "qkv"]
        weights[f"trunk.blocks.{i}.attn.qkv.weight"] = torch.cat([before.pop(name) for name in names])
    for name, value in before.items():
        where, _, rest = name.partition("encoder.layers.")
        layer, _, part = rest.partition(".") if rest else ("", "", where)
        part, _, kind = part.rpartition(".")
        weights[f"trunk.blocks.{layer}." * bool(rest) + f"{APPLE[part]}.{kind}"] = value
    for key in ("hidden_act", "mlp_bias", "use_head", "is_native"):
        config.pop(key, None)
    config.update(model_type="aimv2", use_bias=False, qkv_bias=False, architectures=["AIMv2Model"])


def older_rope(config, weights, key: str = "type"):
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = {key: kind, **rope} if kind != "default" else None


def newer_key_in_older_rope(config, weights):
    older_rope(config, weights, "rope_type")


def rope_buffers(config, weights):
    for i in range(config["num_hidden_layers"]):
        weights[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)


def tied_with_a_head(config, weights):
    assert config["tie_word_embeddings"] and "lm_head.weight" not in weights
    weights["lm_head.weight"] = torch.zeros(96, 32)  # transformers ties it to the table, whatever it holds


def keys_left_out(config, weights):
    """What transformers has as defaults, or derives, may be absent or null."""
    for key in ("tie_word_embeddings", "attention_bias", "rms_norm_eps", "layer_norm_eps", "qkv_bias"):
        if key != "tie_word_embeddings" or not config.get(key):
            config.pop(key, None)
    if config["model_type"] != "qwen3":  # whose default is 128, not width / heads
        config["head_dim"] = None


@pytest.mark.parametrize("change, names", [
    (with_prefix, [name for name in VITS if name != "clip-full"]), (with_text_half, ["siglip-vision"]),
    (without_head, ["siglip-vision", "aimv2-vision", "dinov2-vision"]), (as_apple_has_it, ["aimv2-vision"]),
    (older_rope, DECODERS), (newer_key_in_older_rope, ["llama3-rope"]), (rope_buffers, DECODERS),
    (tied_with_a_head, ["llama3-rope", "qwen2"]), (keys_left_out, [*VITS, *DECODERS]),
])  # fmt: skip
def test_other_layouts(change, names, tmp_path):
    for name in names:
        check_half(rewritten(tmp_path, name, change), name)


LEFT_OUT = {  # transformers' defaults
    "clip_vision_model": (224, 32, 768, 12, 12, 3072, "quick_gelu", 1e-5),
    "siglip_vision_model": (224, 16, 768, 12, 12, 3072, "gelu_pytorch_tanh", 1e-6),
    "aimv2_vision_model": (224, 14, 1024, 24, 8, 2816, "silu", 1e-5),
    "aimv2": (224, 14, 1024, 24, 8, 2816, "silu", 1e-5),
    "dinov2": (224, 14, 768, 12, 12, 3072, "gelu", 1e-6),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_a_config_of_nothing_but_its_type_has_transformers_defaults(kind, tmp_path):
    file, names = tmp_path / "config.json", [*model.KEY_MAPS["encoder_fields"]]
    model.write_json(file, {"model_type": kind})
    cfg = model.read_vit_config(file)
    assert tuple(getattr(cfg, name) for name in names) == LEFT_OUT[kind]
    assert cfg.attention_bias == cfg.mlp_bias == ("aimv2" not in kind)
    full = {"model_type": kind.split("_")[0], "vision_config": {"image_size": 448, "model_type": kind}}
    model.write_json(file, full)
    assert model.read_vit_config(file) == model.dataclasses.replace(cfg, image_size=448)


def of_the_encoder(weights: dict) -> dict:
    """What a vision-only file holds: no text half, no pooling head, no mask token."""
    other = ("text_", "visual_projection", "logit_scale", "head.", "embeddings.mask_token")
    return {k.removeprefix("vision_model."): v for k, v in weights.items() if not k.startswith(other)}


@pytest.mark.parametrize("name", [*VITS, *DECODERS])
def test_halves_survive_a_round_trip(name, tmp_path):
    half = load_half(HF / name, name)
    save_half(half, tmp_path)
    actual, expected = (load_file(path / "model.safetensors") for path in (tmp_path, HF / name))
    expected = of_the_encoder(expected) if name in VITS else expected
    if name in ("clip-vision", "clip-full", "siglip-vision"):  # the hub's prefix, which both releases read
        assert all(key.startswith("vision_model.") for key in actual)
        actual = {key.removeprefix("vision_model."): value for key, value in actual.items()}
    assert actual.keys() == expected.keys()  # Hugging Face names
    assert all(torch.equal(actual[key], expected[key]) for key in actual)
    assert load_half(tmp_path, name).cfg == half.cfg
    check_half(tmp_path, name)
    actual, expected = (json.loads((path / "config.json").read_text()) for path in (tmp_path, HF / name))
    expected = expected.get("vision_config", expected)
    heads = {"vision_use_head", "use_head", "use_mask_token"}  # ours say that there is none
    assert actual.keys() & heads == expected.keys() & heads and not any(actual.get(key) for key in heads)
    for key in (actual.keys() & expected.keys()) - heads:
        assert actual[key] == expected[key], key  # so that transformers reads the same model
    save_half(half, tmp_path, torch.bfloat16)
    assert {v.dtype for v in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("name, tensor", [
    ("clip-full", "vision_model.embeddings.class_embedding"),
    ("siglip-vision", "embeddings.patch_embedding.bias"),
    ("aimv2-vision", "encoder.layers.2.ffn.up_proj.weight"),
    ("dinov2-vision", "encoder.layer.1.layer_scale2.lambda1"),
    ("llama", "model.layers.2.self_attn.k_proj.weight"), ("llama3-rope", "model.embed_tokens.weight"),
    ("qwen2", "model.layers.0.self_attn.q_proj.bias"), ("qwen3", "model.layers.1.self_attn.q_norm.weight"),
])  # fmt: skip
def test_broken_checkpoints_are_named(name, tensor, tmp_path):
    def refused(change, *words):
        with pytest.raises(UserError) as error:
            load_half(rewritten(tmp_path, name, change), name)
        for word in (str(tmp_path), *words):
            assert word in str(error.value)

    short = tensor.removeprefix("model.").removeprefix("vision_model.")
    for hub_name, our_name in model.ENCODERS[name.split("-")[0]]["names"] if name in VITS else []:
        short = short.replace(hub_name, our_name)  # errors speak of our names
    shape = str(tuple(load_file(HF / name / "model.safetensors")[tensor].shape))
    known = "clip, siglip, aimv2, dinov2" if name in VITS else "llama, qwen2, qwen3"
    refused(lambda config, weights: config.update(model_type="mamba"), "config.json", "'mamba'", known)
    refused(lambda config, weights: weights.pop(tensor), short, "missing")
    refused(lambda config, weights: weights.update({tensor: torch.zeros(3, 5)}), short, "(3, 5)", shape)
    refused(lambda config, weights: weights.update({"what.is.this": torch.zeros(1)}), "what.is.this")
    (tmp_path / "config.json").write_text("{\n 'no': json\n}")
    with pytest.raises(UserError, match="config.json: .* line 2"):
        load_half(tmp_path, name)
    for file in ("config.json", "model.safetensors"):
        rewritten(tmp_path, name, lambda config, weights: None)
        (tmp_path / file).unlink()
        with pytest.raises(UserError, match=f"{tmp_path}/{file} does not exist"):
            load_half(tmp_path, name)


@pytest.mark.parametrize("name, change, word", [
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0}}, "'yarn'"),
    ("qwen2", {"rope_parameters": {"type": "linear", "factor": 2.0}}, "'linear'"),  # the older key
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window True"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
    ("llama", {"mlp_bias": True}, "mlp_bias"), ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("llama", {"hidden_size": None}, "'hidden_size' is missing"),
    ("llama", {"attention_bias": True}, "q_proj.bias' is missing"),  # says so, and has none
    ("clip-vision", {"hidden_act": "relu"}, "'relu'"),
    ("aimv2-vision", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),  # its gate is silu, whatever is said
    ("aimv2-vision", {"is_native": True}, "is_native"),
    ("dinov2-vision", {"use_swiglu_ffn": True}, "use_swiglu_ffn"),
    ("siglip-vision", {"model_type": "siglip2_vision_model"}, "take a fixed-resolution SigLIP2"),
    ("siglip-vision", {"model_type": "siglip2"}, "take a fixed-resolution SigLIP2"),
])  # fmt: skip
def test_what_we_do_not_have_is_named(name, change, word, tmp_path):
    with pytest.raises(UserError, match=word) as error:
        load_half(rewritten(tmp_path, name, lambda config, weights: config.update(change)), name)
    assert str(tmp_path) in str(error.value)


# --- Llama 3's rope
LLAMA_3_2_1B = DecoderConfig(head_dim=64, rope_theta=5e5, rope_factor=32.0, rope_length=8192)


def test_llama3_rope_reference_numbers():
    known = {
        14: 0.00321144599, 15: 0.00129054793, 16: 0.000429556797, 17: 9.7082878e-05,
        18: 1.94616382e-05, 31: 9.41830673e-08,
    }  # fmt: skip
    cos, sin = model.rope_tables(torch.tensor([[1]]), LLAMA_3_2_1B)
    for i, frequency in known.items():
        assert torch.atan2(sin, cos)[0, 0, 0, i].item() == pytest.approx(frequency, rel=1e-6)


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


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("side", [3, 8, 24, 27])  # the last: 336, 378 px / 14
def test_positions_are_resized_bicubically(side, align_corners, name):
    vit = ViT.from_pretrained(HF / name)
    vit.cfg.align_corners = align_corners
    table = vit.embeddings.position_embedding.weight.detach().double()
    first = len(table) - 16  # CLS, if there is one, stays as it is
    assert first == name.startswith(("clip", "dinov2"))
    grid, m = table[first:].unflatten(0, (4, 4)), bicubic(4, side, align_corners)
    expected = torch.cat([table[:first], torch.einsum("ir,jc,rcd->ijd", m, m, grid).flatten(0, 1)])
    assert_close(vit.positions(7 * side).double(), expected, rtol=0, atol=1e-6)
    pixels = torch.randn(1, 3, 7 * side, 7 * side)
    before = vit.hidden_states(pixels)[-1]  # resized at every call
    assert before.shape == (1, side**2 + first, 32)
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
    cache = {}
    steps, start = [], 0
    with torch.no_grad():
        for n in chunks:
            here = slice(start, start + n)
            x, positions = decoder.embed_tokens(ids[:, here]), torch.arange(17)[here].expand(2, -1)
            steps.append(decoder.hidden(x, positions, causal[:, :, here, : start + n], cache)[0])
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
        return decoder.hidden(decoder.embed_tokens(ids), positions, model.document_mask(doc_ids))[0]

    packed = hidden(ids)
    assert packed.isfinite().all()
    for here in (slice(0, 8), slice(8, 17)):
        alone = decoder.head(packed[:, here])
        assert_close(alone, decoder(ids[:, here]), rtol=0, atol=1e-5)
        other = ids.clone()
        other[:, here] = (other[:, here] + 1) % 96
        changed = (hidden(other) != packed).any(-1)[0]
        assert changed[here].all() and changed.sum() == here.stop - here.start  # the rest is bit-equal


# --- The VLM on small random weights: generation, saving and loading, packed rows, control words in text
def prompts() -> list[tuple[list, torch.Tensor]]:
    """Two pictures in a dialogue, one and a long question, no picture, one and a short question."""
    questions = [
        ("how many?", 2, [("hello", "there it is")]),
        ("is there any red star to the left of the word?", 1, []), ("no picture at all", 0, []),
        ("what is this?", 1, []),
    ]  # fmt: skip
    samples = []
    for n, (text, images, history) in enumerate(questions):
        scenes = [data.make_scene("train", 10 * n + i) for i in range(images)]
        pieces = data.prompt_pieces(text, images, TOKENIZER, history)
        samples.append((pieces, data.load_images(scenes, tiny_vlm().cfg)))
    return samples


def greedy(vlm: model.VLM, sample: tuple, mode: str, steps: int) -> list[int]:
    """Arg max of a full forward of this one sample, over and over: no cache, no batch."""
    pieces, new = sample[0], []
    for _ in range(steps):
        batch = data.prompt_batch([([*pieces, (new, False)], sample[1])], mode, vlm.cfg)
        rows = batch.student
        x = vlm.splice(rows, vlm.bank(batch))
        hidden, _ = vlm.decoder.hidden(x, rows.positions, model.document_mask(rows.doc_ids))
        new = [*new, vlm.decoder.head(hidden[0, -1]).argmax().item()]
    return new


@torch.no_grad()
@pytest.mark.parametrize("mode", ["full", "pruned"])
def test_generate_is_the_arg_max_of_full_forwards(mode):
    vlm, samples = tiny_vlm(), prompts()
    expected = [greedy(vlm, sample, mode, 8) for sample in samples]
    assert len(set(map(tuple, expected))) == 4 and len(set(sum(expected, []))) > 12  # a test worth its name
    batch = data.prompt_batch(samples, mode, vlm.cfg)
    tokens = 8 if mode == "full" else 5
    assert slot_mask(batch.student).sum(1).tolist() == [n * tokens for n in (2, 1, 0, 1)]
    never = TOKENIZER.vocab_size  # an id that no arg max takes
    assert vlm.generate(batch, never, 8) == expected
    end = expected[1][2]  # now one row ends early, and perhaps others
    stopped = [row[: row.index(end)] if end in row else row for row in expected]
    assert vlm.generate(batch, end, 8) == stopped and len(stopped[1]) < 3
    sampled = [vlm.generate(batch, never, 8, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize("tokens, on_cpu, on_cuda", [(20, 20, 2), (3, 3, 1)], ids=["endless", "short"])
def test_a_gpu_is_asked_every_8_tokens_whether_all_rows_ended(tokens, on_cpu, on_cuda, monkeypatch):
    """Each time the host waits for it. A row that ended gets `end` again, so the answers are the same."""
    vlm, real, asked = tiny_vlm(), torch.Tensor.all, []
    batch = data.prompt_batch(prompts(), "full", vlm.cfg)
    endless = vlm.generate(batch, TOKENIZER.vocab_size, 20)
    never = min({*range(TOKENIZER.vocab_size)}.difference(*endless))
    stops = [row[tokens - 1] for row in endless] if tokens < 8 else []
    monkeypatch.setattr(torch.Tensor, "all", lambda x: asked.append(x) or real(x))
    rows = vlm.generate(batch, never, 20, stops=stops)
    assert len(asked) <= on_cpu and len(asked) == max(map(len, rows))
    asked.clear()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    assert vlm.generate(batch, never, 20, stops=stops) == rows and len(asked) == on_cuda


def samples_of_scenes() -> list[tuple[list, torch.Tensor]]:
    records = [data.Scenes("chat")[i] for i in range(3)]
    return [(data.pieces_of(r, TOKENIZER), data.load_images(r.images, tiny_vlm().cfg)) for r in records]


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_gives_the_same_logits(tied, tmp_path):
    vlm = tiny_vlm(tied)
    vlm.save_pretrained(tmp_path / "step-00000005")
    (tmp_path / "latest").write_text("step-00000005\n")
    batch = data.make_batch(samples_of_scenes(), ["slow", "pruned", "full"], vlm.cfg, 256, 250)
    expected = vlm(batch)
    assert expected[0].shape == (len(batch.student.targets), TOKENIZER.vocab_size)
    assert expected[1].shape == (len(batch.distill), TOKENIZER.vocab_size)
    for path in (tmp_path, tmp_path / "step-00000005"):  # a run folder, a step folder
        again = model.VLM.from_pretrained(path)
        assert again.cfg == vlm.cfg
        for actual, desired in zip(again(batch)[:2], expected[:2]):
            assert torch.equal(actual, desired)
    with pytest.raises(UserError, match=f"{tmp_path}/nothing is neither a run folder"):
        model.VLM.from_pretrained(tmp_path / "nothing")
