"""The presets: models that are what their names say, recipes that their stage knows, scaling steps."""

import dataclasses
from pathlib import Path

import pytest
import torch

import data
import model
import train_pretrain
import train_sft
from model import UserError
from train_pretrain import PretrainConfig
from train_sft import SftConfig

NAMES = model.preset_names()


BUILDS = {  # weights of the encoder and the decoder; of MM1's decoders those outside the embeddings
    "clip-smollm2-360m": (303_179_776, 361_821_120), "siglip2-qwen2.5-0.5b": (85_843_200, 494_032_768),
    "siglip2-qwen2.5-1.5b": (85_843_200, 1_543_714_304), "llava-1.5": (303_507_456, 7_615_616_512),
    "llava-next": (303_507_456, 8_030_261_248), "llava-1.5-vicuna": (303_507_456, 6_738_415_616),
    "cos-7b": (303_179_776, 6_738_415_616), "cos-8b": (303_179_776, 8_030_261_248),
    "1.2b": (303_507_456, 1.233e9), "3b": (631_371_520, 2.855e9), "7b": (631_371_520, 6.476e9),
    "30b": (631_371_520, 29.7e9), "3b-moe": (631_371_520, 63.1e9), "7b-moe": (631_371_520, 40.0e9),
}  # fmt: skip


def count(*modules: torch.nn.Module) -> int:
    """Weights without adapters."""
    return sum(p.numel() for m in modules for name, p in m.named_parameters() if ".lora_" not in name)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_the_model_of_its_name(name):
    cfg = model.copy_config(model.preset(name)["model"])
    if name.startswith("tiny"):  # takes the shapes of the shipped halves when it is built
        assert cfg.vit == model.read_vit_config(model.ASSETS / "tiny_vit" / "config.json")
        return
    with torch.device("meta"):
        vlm = model.VLM(cfg)
    vit, decoder = BUILDS[name]
    assert count(vlm.vit) == vit
    if isinstance(decoder, float):
        assert count(vlm.decoder.layers, vlm.decoder.norm) == pytest.approx(decoder, rel=2e-3)
    else:
        assert count(vlm.decoder) == decoder


# config.json of the checkpoints that the presets name, as on the hub
CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14,
    "num_attention_heads": 16, "intermediate_size": 4096, "image_size": 224,
}  # fmt: skip
LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "rms_norm_eps": 1e-5}
QWEN = {"model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6}


def shape(*sizes: int) -> dict:
    names = (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
    )
    return dict(zip(names.split(), sizes))


LLAMA3 = {**LLAMA, **shape(4096, 32, 32, 8, 14336, 128256), "rope_theta": 5e5}
CLIP_336 = {"model_type": "clip", "vision_config": {**CLIP_L, "image_size": 336}}
SIGLIP2 = {"model_type": "siglip_vision_model", "image_size": 256}
SMOLLM2 = {**LLAMA, **shape(960, 32, 15, 5, 2560, 49152), "rope_theta": 1e5, "tie_word_embeddings": True}


ON_THE_HUB = {
    "openai/clip-vit-large-patch14": {"model_type": "clip", "vision_config": CLIP_L},
    "openai/clip-vit-large-patch14-336": CLIP_336,
    "google/siglip2-base-patch16-256": {"model_type": "siglip", "vision_config": SIGLIP2},
    "HuggingFaceTB/SmolLM2-360M": SMOLLM2,
    "Qwen/Qwen2.5-0.5B": {**QWEN, **shape(896, 24, 14, 2, 4864, 151936), "tie_word_embeddings": True},
    "Qwen/Qwen2.5-1.5B": {**QWEN, **shape(1536, 28, 12, 2, 8960, 151936), "tie_word_embeddings": True},
    "Qwen/Qwen2.5-7B": {**QWEN, **shape(3584, 28, 28, 4, 18944, 152064)},
    **dict.fromkeys(["meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"], LLAMA3),
    "lmsys/vicuna-7b-v1.5": {**LLAMA, **shape(4096, 32, 32, 32, 11008, 32000)},
}


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("tiny")])
def test_a_preset_has_the_shapes_of_the_checkpoints_it_names(name, tmp_path):
    cfg, file = model.preset(name)["model"], tmp_path / "config.json"
    assert bool(cfg.encoder_from) == bool(cfg.decoder_from)
    if not cfg.encoder_from:  # MM1: at random
        return
    model.write_json(file, ON_THE_HUB[cfg.encoder_from])
    vit = model.read_vit_config(file)
    assert dataclasses.replace(vit, align_corners=cfg.vit.align_corners) == cfg.vit
    model.write_json(file, ON_THE_HUB[cfg.decoder_from])
    assert model.read_decoder_config(file) == cfg.decoder


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_flags_of_their_stage_and_complete(name):
    preset = model.preset(name)
    stages = {"pretrain": PretrainConfig, "pretrain_b": PretrainConfig, "sft": SftConfig}
    with torch.device("meta"):
        vlm = model.VLM(model.copy_config(preset["model"]))
    for stage in stages.keys() & preset.keys():
        recipe, defaults = preset[stage], dataclasses.asdict(stages[stage]())
        assert recipe.keys() <= defaults.keys()
        cfg = model.from_dict(stages[stage], {**defaults, **recipe})
        cfg.check()
        for key, value in recipe.items():  # an int may stand for a float, nothing else for another
            kind = type(defaults[key])
            assert type(value) is kind or (kind, type(value)) == (float, int), (stage, key)
        vlm.set_trainable(model.trainable_parts(cfg.train), isolator=True)
        later_cfg = model.at_resolution(vlm.cfg, cfg.resolution).check()
        assert data.square_tokens(later_cfg) < cfg.row_limit
        n = cfg.batch_size or cfg.rows  # divides over one GPU and eight
        assert n % cfg.micro_steps == 0 and n % 8 == 0
    if "scale" in preset:
        scaled = model.scaled_config(preset["model"], preset["scale"])
        assert scaled.visual_tokens() == int(preset["scale"].split("to")[1])
        assert scaled.vit.image_size == 2 * preset["model"].vit.image_size
        row_limit = {**dataclasses.asdict(SftConfig()), **preset["sft"]}["row_limit"]
        assert scaled.visual_tokens() < row_limit
    else:
        assert preset["model"].connector.kind != "chain" and "pretrain_b" not in preset
    # Every field of the model is written out, and nothing else: defaults may change, presets do not.
    values = model.read_json(model.PRESETS / f"{name}.json")
    assert dataclasses.asdict(model.from_dict(model.ModelConfig, values["model"])) == values["model"]
    keys = {"summary", "source", "ours", "reported", "scale", "model", "pretrain", "pretrain_b", "sft"}
    assert {"summary", "source", "ours", "model", "pretrain", "sft"} <= values.keys() <= keys
    assert preset["source"] and preset["ours"]


def test_presets_are_read_anew_and_their_folders_are_the_repositorys(monkeypatch, tmp_path):
    model.preset("cos-7b")["model"].vit.image_size = 7
    assert model.preset("cos-7b")["model"].vit.image_size == 224
    monkeypatch.chdir(tmp_path)  # wherever the process runs
    tiny = model.preset("tiny")["model"]
    assert model.find_half(tiny.encoder_from) == model.ASSETS / "tiny_vit"
    assert model.find_half(tiny.decoder_from) == model.ASSETS / "tiny_lm"
    with pytest.raises(UserError, match="--preset 'cos-9b' is unknown: use one of .*tiny"):
        model.preset("cos-9b")


@pytest.mark.parametrize("name", ["1.2b", "3b", "7b", "30b"])
def test_mm1s_recipes(name):
    preset = model.preset(name)
    recipe, cfg = preset["pretrain"], preset["model"]
    assert recipe["lr"] == -1 and recipe["vit_lr"] == 5e-5  # by its law; the encoder's is fixed
    assert recipe["weight_decay"] == recipe["final_lr"] == 0.1  # torch's decay is a share of the rate
    assert recipe["rows"] * recipe["row_length"] == 2_097_152 and cfg.visual_tokens() * 16 == 2304
    assert recipe["rows"] * recipe["row_length"] * recipe["steps"] == 419_430_400_000
    assert round(recipe["warmup"] * recipe["steps"]) == 2000
    assert cfg.connector.levels == [cfg.vit.layers] and cfg.decoder.context == recipe["row_length"]


# --- Which recipe a run takes
FEW = "--steps 1 --batch_size 4 --micro_steps 1 --workers 0 --device cpu --dtype float32".split()


def recipe_of(run: Path) -> dict:
    return model.read_json(model.find_step(run) / "config.json")["train"]


def test_flags_over_recipe_over_defaults_and_the_recipe_goes_on(tmp_path, small_halves, add_preset):
    rates = {"pretrain": {"lr": 3e-3, "clip": 0.5}, "pretrain_b": {"lr": 4e-3}, "sft": {"lr": 5e-3}}
    file = add_preset("mine", **rates)
    a, b, c = tmp_path / "1", tmp_path / "1b", tmp_path / "2"
    train_pretrain.main(["--preset", "mine", *small_halves, *FEW, "--clip", "0.7", "--out", str(a)])
    assert (recipe_of(a)["lr"], recipe_of(a)["clip"], recipe_of(a)["warmup"]) == (3e-3, 0.7, 0.03)
    train_pretrain.main(["--init", str(a), "--scale", "32to144", *FEW, "--out", str(b)])  # stage 1b
    assert (recipe_of(b)["lr"], recipe_of(b)["preset"]) == (4e-3, "mine")
    train_sft.main(["--init", str(b), *FEW, "--preset", "mine", "--out", str(c)])
    assert recipe_of(c)["lr"] == 5e-3
    with pytest.raises(model.UserError, match="--preset cannot change"):
        train_sft.main(["--init", str(a), "--preset", "7b", *FEW, "--out", str(tmp_path / "no")])
    file.unlink()  # to go on it is not needed
    train_sft.main(["--init", str(b), *FEW, "--steps", "2", "--resume", "auto", "--out", str(c)])
    with pytest.raises(model.UserError, match="--preset 'mine' is unknown"):
        train_sft.main(["--init", str(b), *FEW, "--out", str(tmp_path / "3")])
