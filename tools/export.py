"""A run as two Hugging Face folders, which transformers and others load: encoder/ and decoder/.

    python tools/export.py RUN OUT
    python tools/export.py RUN OUT --whole   # instead this project's own layout, in one file of weights

RUN is a run folder or a checkpoint, sharded or not. Adapters are merged; preprocessor and tokenizer go along.
The connector has no layout of its own there and stays in the run.
"""

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from model import Decoder, UserError, ViT, ViTConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PREPROCESSING = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")  # what training does, too


@dataclasses.dataclass
class ExportConfig:
    # -- export
    whole: bool = False  # the whole model as one model.safetensors, with config and tokenizer


def main(argv: list[str]) -> None:
    cfg, paths = ExportConfig(), [word for word in argv if not word.startswith("-")]
    model.parse_cli([word for word in argv if word.startswith("-")], __doc__, cfg)
    model.require(len(paths) == 2, "give a run and a new folder: python tools/export.py RUN OUT")
    print(f"in {(merge if cfg.whole else export)(*paths)}")


def merge(run: str, out: str) -> Path:
    """Copy a checkpoint, sharded or not, with all of its weights in one model.safetensors."""
    step, to = model.find_step(run), Path(out).resolve()
    model.require(not to.exists(), f"{to} exists: choose a new folder")
    unfinished = to.with_name(to.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    kept = {"ignore": shutil.ignore_patterns("*.safetensors", "optimizer", "state.json")}
    shutil.copytree(step, unfinished, **kept)
    weights = {name: read() for name, read in model.open_weights(step).items()}
    for name, value in model.VLM.from_pretrained(step).state_dict().items():  # which checks that all is there
        model.require(weights[name].shape == value.shape, f"{step}: a shard of tensor '{name}' is missing")
    model.write_weights(unfinished / "model.safetensors", weights)
    os.replace(unfinished, to)
    return to


def export(run: str, out: str) -> Path:
    """encoder/ and decoder/ of a run in Hugging Face layout, LoRA merged, with preprocessor and tokenizer."""
    step, to = model.find_step(run), Path(out).resolve()
    model.require(not to.exists() or not any(to.iterdir()), f"{to} is not empty: choose a new folder")
    vlm = model.VLM.from_pretrained(step)
    unfinished = to.with_name(to.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    end = model.read_json(step / "config.json").get("end_token")
    save_decoder(vlm.decoder, unfinished / "decoder", end=end)
    save_vit(vlm.vit, unfinished / "encoder")
    model.write_json(unfinished / "encoder" / "preprocessor_config.json", preprocessor(vlm.cfg))
    for file in (step / "tokenizer").iterdir():
        shutil.copy(file, unfinished / "decoder" / file.name)
    to.mkdir(parents=True, exist_ok=True)
    os.replace(unfinished, to)
    return to


def preprocessor(cfg: model.ModelConfig) -> dict:
    """preprocessor_config.json of the encoder."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": cfg.image.mean,
        "image_std": cfg.image.std,
        "resample": cfg.image.resample,
        "size": {"height": cfg.vit.image_size, "width": cfg.vit.image_size},
        "do_center_crop": False,
        **dict.fromkeys(PREPROCESSING, True),
    }


def save_vit(vit: ViT, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """config.json and model.safetensors as the family's vision-only model in transformers has them."""
    family, fields = vit.cfg.family, dataclasses.asdict(vit.cfg)
    config = {key: fields[name] for name, key in model.KEY_MAPS["encoder_fields"].items()}
    model.write_json(Path(folder) / "config.json", {**config, **family_fields(vit.cfg)})
    weights = {}
    for name, value in vit.state_dict().items():
        for hub_name, our_name in reversed(model.ENCODERS[family]["names"]):
            name = name.replace(our_name, hub_name)
        if family in ("clip", "siglip"):  # as on the hub; transformers 4 and 5 both read it
            name = f"vision_model.{name}"
        if name.endswith("cls_token"):
            value = value[None, None]  # (1, 1, D)
        elif name.endswith("position_embeddings"):
            value = value[None]  # (1, 1 + P, D)
        weights[name] = value.to(dtype)
    model.write_weights(Path(folder) / "model.safetensors", weights)


def family_fields(cfg: ViTConfig) -> dict:
    """What config.json says of one family alone."""
    if cfg.family == "clip":
        return {"model_type": "clip_vision_model"}
    if cfg.family == "siglip":
        return {"model_type": "siglip_vision_model", "vision_use_head": False}
    if cfg.family == "aimv2":
        return {
            "model_type": "aimv2_vision_model", "rms_norm_eps": cfg.norm_eps, "qkv_bias": cfg.attention_bias,
            "mlp_bias": cfg.mlp_bias, "use_head": False, "is_native": False,
        }  # fmt: skip
    return {
        "model_type": "dinov2", "mlp_ratio": cfg.mlp_width // cfg.width, "qkv_bias": cfg.attention_bias,
        "use_mask_token": False,
    }  # fmt: skip


def save_decoder(
    decoder: Decoder, folder: str | Path, dtype: torch.dtype = torch.float32, end: int | None = None
) -> None:
    """config.json and model.safetensors, Hugging Face names, LoRA merged. end: id that ends text."""
    cfg = decoder.cfg
    if cfg.experts:
        raise UserError(f"{folder}: no Llama layout holds decoder.experts; a run folder keeps them")
    config = {key: getattr(cfg, name) for name, key in model.KEY_MAPS["decoder_fields"].items()}
    config["model_type"] = "llama"
    if cfg.qkv_bias:
        config["model_type"] = "qwen2"
    if cfg.qk_norm:
        config["model_type"] = "qwen3"
    config["architectures"] = [ARCHITECTURES[config["model_type"]]]
    rope = {"rope_type": "default"}
    if cfg.rope_factor != 1:
        rope = {key: getattr(cfg, name) for name, key in model.KEY_MAPS["rope_fields"].items()}
        rope = config["rope_scaling"] = {"rope_type": "llama3", **rope}
    config["rope_theta"] = cfg.rope_theta  # this and rope_scaling are what transformers 4 reads
    config["rope_parameters"] = {**rope, "rope_theta": cfg.rope_theta}
    if end is not None:
        config["eos_token_id"] = end
    model.write_json(Path(folder) / "config.json", config)
    weights = {}
    for name, value in model.merged(decoder).items():
        weights[name if name == "lm_head.weight" else f"model.{name}"] = value.to(dtype)
    model.write_weights(Path(folder) / "model.safetensors", weights)


if __name__ == "__main__":
    model.run_cli(main)
