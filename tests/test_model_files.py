"""Files of real checkpoints: shards, .bin files, preprocessors, and how much memory loading takes."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import all_tokens
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import model
from model import Decoder, ImageConfig, UserError

HF = Path(__file__).parent / "fixtures" / "hf"


# --- Weights
def copied(folder: Path, name: str = "llama", suffix: str = "safetensors", shards: int = 0) -> Path:
    """A fixture as one file or as shards with an index, as safetensors or as .bin."""
    shutil.copy(HF / name / "config.json", folder)
    weights = load_file(HF / name / "model.safetensors")
    stem, write = ("pytorch_model", torch.save) if suffix == "bin" else ("model", save_file)
    if not shards:
        write(weights, folder / f"{stem}.{suffix}")
        return folder
    files = [f"{stem}-{n + 1:05d}-of-{shards:05d}.{suffix}" for n in range(shards)]
    where = {key: files[n % shards] for n, key in enumerate(sorted(weights))}
    for file in files:
        write({key: weights[key] for key in weights if where[key] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def half_of(name: str, folder: Path):
    return (model.ViT if name.endswith(("vision", "full")) else Decoder).from_pretrained(folder)


@pytest.mark.parametrize("name", ["llama", "clip-full"])
@pytest.mark.parametrize("suffix, shards", [("safetensors", 3), ("bin", 0), ("bin", 3)])
def test_shards_and_bin_files_load_as_one_safetensors_file_does(name, suffix, shards, tmp_path):
    half, expected = half_of(name, copied(tmp_path, name, suffix, shards)), half_of(name, HF / name)
    assert half.cfg == expected.cfg and half.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), expected.parameters()))
    shutil.rmtree(tmp_path)  # nothing is still read from the files
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), expected.parameters()))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_broken_shards_are_named(suffix, tmp_path):
    copied(tmp_path, suffix=suffix, shards=3)
    shard = next(tmp_path.glob(f"*-00002-of-00003.{suffix}"))
    content_before = shard.read_bytes()
    for content in (b"", b"no weights", content_before[: len(content_before) // 2]):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=f"{shard} is damaged"):
            Decoder.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match="does not exist, although its index names it"):
        Decoder.from_pretrained(tmp_path)


class Malicious:
    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_a_bin_file_runs_no_code(how, tmp_path):
    copied(tmp_path, suffix="bin")
    proof, file = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    content = {**torch.load(file, weights_only=True), "model.extra": Malicious(proof)}
    if how == "pickle":
        file.write_bytes(pickle.dumps({"model.extra": Malicious(proof)}))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(UserError, match=str(file)):
        Decoder.from_pretrained(tmp_path)
    assert not proof.exists()
    if how == "zip":
        torch.load(file, weights_only=False)  # the proof that this file runs code where it may
        assert proof.exists()


def test_tensors_are_cast_once_and_owned(tmp_path):
    """bf16 files in either dtype; no parameter is a view of another, or of a fused matrix."""
    weights = {k: v.bfloat16() for k, v in load_file(HF / "llama" / "model.safetensors").items()}
    save_file(weights, copied(tmp_path) / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        decoder = Decoder.from_pretrained(tmp_path, dtype)
        for name, p in decoder.named_parameters():
            kept = dtype if p.ndim > 1 else torch.float32  # norms stay whole, and with them the residuals
            key = name if name == "lm_head.weight" else f"model.{name}"
            assert p.dtype == kept and torch.equal(p, weights[key].to(kept)) and p.is_contiguous()
            assert p.untyped_storage().nbytes() == p.numel() * p.element_size()


# --- Preprocessors
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
CLIP = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3, "do_center_crop": True}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
DINO = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_center_crop": True}
SQUARE = {"height": 224, "width": 224}
PREPROCESSORS = {
    "clip, plain numbers": ({**CLIP, "size": 336, "crop_size": 336}, CLIP_MEAN, 3, 336),
    "clip, sizes": ({**CLIP, "size": {"shortest_edge": 224}, "crop_size": SQUARE}, CLIP_MEAN, 3, 224),
    "siglip2": ({**HALF, "resample": 2, "size": {"height": 256, "width": 256}}, [0.5] * 3, 2, 256),
    "siglip": ({**HALF, "resample": 3, "size": {"height": 384, "width": 384}}, [0.5] * 3, 3, 384),
    "dinov2": ({**DINO, "size": {"shortest_edge": 256}, "crop_size": SQUARE}, DINO["image_mean"], 3, 224),
    "no crop": ({**CLIP, "do_center_crop": False, "size": 336, "crop_size": 224}, CLIP_MEAN, 3, 336),
    "no size": (HALF, [0.5] * 3, 3, 28),  # that of config.json; bicubic
}  # fmt: skip


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_preprocessors(name, tmp_path):
    shutil.copy(HF / "clip-vision" / "config.json", tmp_path)
    config, mean, resample, size = PREPROCESSORS[name]
    newer = {"image_processor": config, "processor_class": "CLIPProcessor"}  # transformers 5 saves only this
    for file, content in (("processor_config.json", newer), ("preprocessor_config.json", config)):
        model.write_json(tmp_path / file, content)
        expected = ImageConfig(mean, config["image_std"], resample)
        assert model.read_preprocessor(tmp_path) == (expected, size)
        (tmp_path / file).unlink()
    with pytest.raises(UserError, match=f"{tmp_path}/preprocessor_config.json does not exist"):
        model.read_preprocessor(tmp_path)
    for key in ("image_mean", "image_std"):
        left = {k: v for k, v in config.items() if k != key}
        model.write_json(tmp_path / "preprocessor_config.json", left)
        with pytest.raises(UserError, match="image_mean or image_std is missing"):
            model.read_preprocessor(tmp_path)


@pytest.mark.parametrize("given, side", [(0, 8), (28, 4)])
@pytest.mark.parametrize("family", ["clip", "siglip", "aimv2", "dinov2"])
def test_the_encoders_preprocessing_travels_with_the_model(family, given, side, tmp_path):
    """Mean, std, interpolation and size, from the encoder's folder through a checkpoint to its tokens."""
    encoder = copied(tmp_path, f"{family}-vision")
    size = {"height": 56, "width": 56}  # not that of the fixture: the position table is resized
    model.write_json(encoder / "preprocessor_config.json", {**DINO, "resample": 2, "crop_size": size})
    cfg = model.ModelConfig(
        vit=model.ViTConfig(image_size=given, align_corners=True),
        connector=model.ConnectorConfig("mlp", [1, 2], 16, 2),
        decoder=model.DecoderConfig(32, 16, 1, 2, 1, 8, 16),
        encoder_from=str(encoder),
    )
    vlm = model.VLM.build(cfg)
    assert vlm.cfg.image == ImageConfig(DINO["image_mean"], DINO["image_std"], 2)
    assert (vlm.cfg.vit.image_size, vlm.cfg.visual_tokens()) == (7 * side, side**2)
    assert vlm.cfg.vit.family == family and vlm.cfg.vit.align_corners
    vlm.save_pretrained(tmp_path / "saved")
    again = model.VLM.from_pretrained(tmp_path / "saved")
    assert again.cfg == vlm.cfg and again.vit.cfg == vlm.cfg.vit
    output = json.loads((tmp_path / "saved" / "preprocessor.json").read_text())
    assert output == {
        "image_size": 7 * side, "mean": DINO["image_mean"], "std": DINO["image_std"], "resample": 2,
        "cut": "",
    }  # fmt: skip
    pixels = torch.randint(0, 256, (2, 3, 7 * side, 7 * side), dtype=torch.uint8)
    mean, std = (torch.tensor(DINO[f"image_{x}"]).view(3, 1, 1) for x in ("mean", "std"))
    states = again.vit.hidden_states((pixels / 255 - mean) / std)
    cls = family in ("clip", "dinov2")
    by_hand = again.connector([states[n][:, cls:] for n in (1, 2)])
    assert by_hand.shape == (2, side**2, 16)
    for one in (vlm, again):
        assert_close(all_tokens(one, pixels), by_hand, rtol=0, atol=1e-5)


# --- Memory
BILLION = {  # Llama-3.2-1B with a smaller vocabulary
    "model_type": "llama", "vocab_size": 32768, "hidden_size": 2048, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 5e5, "tie_word_embeddings": True,
}  # fmt: skip


def write_billion(folder: Path, shards: int = 4) -> int:
    """Random bf16 shards by the format's definition, a megabyte at a time; returns the number of weights."""
    model.write_json(folder / "config.json", BILLION)
    with torch.device("meta"):
        decoder = Decoder(model.read_decoder_config(folder / "config.json"))
    shapes = {f"model.{name}": tuple(p.shape) for name, p in decoder.named_parameters()}
    noise = memoryview(torch.randn(2**19).bfloat16().view(torch.uint8).numpy())
    names, where = [*shapes], {}
    for n in range(shards):
        file, header, end = f"model-{n + 1:05d}-of-{shards:05d}.safetensors", {}, 0
        for name in names[n * len(names) // shards : (n + 1) * len(names) // shards]:
            begin, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
            where[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, end, len(noise)):
                f.write(noise[: end - start])
    model.write_json(folder / "model.safetensors.index.json", {"weight_map": where})
    return sum(math.prod(shape) for shape in shapes.values())


LOAD = """
import resource, sys, torch, model
dtype = getattr(torch, sys.argv[2])
torch.zeros(8, 8).to(dtype) @ torch.zeros(8, 8).to(dtype)
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
decoder = model.Decoder.from_pretrained(sys.argv[1], dtype)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
assert {p.dtype for p in decoder.parameters() if p.ndim > 1} == {dtype}
assert all(p.isfinite().all() for p in decoder.norm.parameters())
print((peak - before) / sum(p.numel() * p.element_size() for p in decoder.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    try:
        assert 1.0e9 < write_billion(tmp_path) < 1.1e9
        for dtype in ("float32", "bfloat16"):
            command = [sys.executable, "-c", LOAD, str(tmp_path), dtype]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            root = Path(model.__file__).parent
            done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert 0.9 < float(done.stdout) <= 1.15
    finally:
        for shard in tmp_path.glob("*.safetensors"):
            shard.unlink()
