"""Bad input: one clear sentence, exit code 2, nothing written. And the flags themselves."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import model
import train_pretrain
import train_sft

ROOT = Path(__file__).parent.parent
PRETRAIN = [sys.executable, "train_pretrain.py"]
FEW = "--steps 1 --batch_size 4 --micro_steps 1 --workers 0 --device cpu --dtype float32".split()


def refused(main, argv: list[str]) -> str:
    with pytest.raises(model.UserError) as error:
        main(argv)
    return str(error.value)


def test_exit_code_is_2_and_the_message_one_line():
    done = subprocess.run([*PRETRAIN, "--step", "3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "train_pretrain.py: unknown flag '--step', did you mean --steps?\n"


REFUSED = {  # flags of train_pretrain.py beside --out: a regular expression that the sentence fits
    "--steps many": "--steps 'many': expected a whole number",
    "--model.x 1": "unknown flag '--model.x'",
    "--clip --steps 1": "--clip: expected a value",
    "--init nowhere": "nowhere is neither a run folder nor a checkpoint",
    f"--init {ROOT}/assets/tiny_vit": "assets/tiny_vit is neither a run .*--encoder_from",
    "--preset cos-7b": "is no folder and not downloaded: fetch it with python tools/download.py",
    "--data none.json": "none.json.*scenes",
    "--connector.windows 8,3": r"3 does not divide the 8x8 patch grid.*\[1, 2, 4, 8\]",
    "--connector.windows 2,8": "from coarse to fine",
    "--connector.levels 4,2": "low to high",
    "--connector.kind mlp --resolution 60": "60 is no positive multiple of vit.patch_size 8",
    "--encoder_from= --vit.image_size 0": "vit.image_size 0 is no positive multiple",
    "--image.mean 0,0,0": "--image.mean cannot change: .*tiny_vit has its own",
    "--prune.keep nan": "must be above 0",
    "--pruner magic": "magic.*divprune",
    "--resolution 64x2": "--resolution '64x2': use SIDE in pixels",
    "--resolution 128": "this chain connector sees 64 px, which --scale changes",
    "--resolution +unpad": "unpad needs a grid of tokens .* not chain",
    "--scale 32to144": "--scale 32to144 needs --init",
    "--scale_init nearest": "use one of inflate, queries, random",
    "--train head": "'head'.*vit, connector, decoder",
    "--train lora": "add --lora.rank",
    "--batch_size 10 --micro_steps 3": "--batch_size 10 .*3 micro-steps.*--micro_steps 1 or 2",
    "--batch_size 0 --rows 0": "--rows 0: must be at least 1",
    "--row_limit 32": "32 positions.*--row_limit",
    "--lr -0.5": "--lr -0.5: .*-1",
    "--lr -1 --train connector": "at least 0, or -1 if the whole decoder trains",
    "--decay some": "--decay 'some'.*matrices.*all",
    "--frozen int8": "--frozen 'int8' is unknown",
    "--pure_bf16": "--pure_bf16 true needs --dtype bfloat16",
    "--resume yes": "--resume 'yes'.*auto",
    "--device tpu": "tpu.*auto, cpu, cuda",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_wrong_flags_say_so_and_write_nothing(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(model.UserError, match=REFUSED[flags]):
        train_pretrain.main([*FEW, *flags.split(), "--out", "run"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(model.UserError, match="--out is missing"):
        train_pretrain.main([])


def test_scaling_from_the_wrong_base_is_refused(tmp_path, small_halves):
    flags = [*small_halves, *"--steps 1 --batch_size 4 --workers 0 --dtype float32".split()]
    train_pretrain.main([*flags, "--out", str(tmp_path / "a")])
    sft = ["--init", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--scale"]
    message = refused(train_sft.main, [*sft, "80to336"])
    assert "starts from two scales with 80 tokens, this model has 32" in message
    assert "--slow_share 2.0" in refused(train_sft.main, [*sft[:-1], "--slow_share", "2"])
    assert "distill_weight" in refused(train_sft.main, [*sft[:-1], "--distill_weight", "-1"])
    assert "above 0" in refused(train_sft.main, [*sft[:-1], "--temperature", "0"])
    assert "did you mean 32to144" in refused(train_sft.main, [*sft, "32to44"])
    assert not (tmp_path / "b").exists()
    assert "cannot change" in refused(train_sft.main, [*sft[:-1], "--connector.windows", "8,4"])
    assert "holds a run: add --resume" in refused(train_pretrain.main, [*flags, "--out", str(tmp_path / "a")])


def test_broken_files_and_commands_are_one_sentence(tmp_path):
    (tmp_path / "x.json").write_text('[{"conversations": }]')
    message = refused(train_pretrain.main, ["--out", str(tmp_path / "a"), "--data", str(tmp_path / "x.json")])
    assert "line 1 column" in message and not (tmp_path / "a").exists()
    assert "--model is missing" in refused(evaluation.main, [])
    assert "neither a run folder" in refused(evaluation.main, ["--model", str(tmp_path)])
    message = refused(evaluation.main, ["--model", str(ROOT / "assets" / "tiny_lm")])
    assert "neither a run folder nor a checkpoint" in message
    assert "--n 0: must be at least 1" in refused(evaluation.main, ["--model", str(tmp_path), "--n", "0"])
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "text": "What?"}\n')
    with pytest.raises(model.UserError, match="q.jsonl line 1"):
        evaluation.file_task("vqa", tmp_path / "q.jsonl", "")
    cfg = evaluation.EvalConfig(tasks="scenes_vqaa")
    with pytest.raises(model.UserError, match="scenes_vqaa"):
        evaluation.open_tasks(cfg, evaluation.open_task)


HELP = [  # a group, and a flag with its value in the preset
    (train_pretrain, "--preset cos-7b", ["model: connector:", "--lora.rank [64]", "--lr [0.0002]"]),
    (train_sft, "--preset tiny", ["model: decoder:", "--connector.windows [8,2]", "--lr [0.002]"]),
    (evaluation, "", ["--tasks"]),
]


@pytest.mark.parametrize("script, flags, words", HELP)
def test_help_has_the_presets_values(script, flags, words, capsys):
    """That it comes before torch is loaded: test_house.py."""
    with pytest.raises(SystemExit):
        script.main([*flags.split(), "--help"])
    out = capsys.readouterr().out
    assert all(word in out for word in words)


def test_help_and_flags_of_configs(capsys):
    for config in (model.ModelConfig, evaluation.EvalConfig, train_sft.SftConfig):
        flags = model.flags_of(config())
        assert [name for name, (*_, text, _) in flags.items() if not text] == []  # each has a line of help
    cfg = train_pretrain.PretrainConfig(lr=0.5, steps=7)
    with pytest.raises(SystemExit) as stop:
        model.parse_cli(["--help"], "The manual: 100% of it.", cfg, model.ModelConfig())
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith("The manual: 100% of it.")
    assert "--lr [0.5]" in out and "--steps [7]" in out and "--decoder.tied [True]" in out
    assert "\nmodel: pruned tokens:\n  --prune.name [divprune]" in out
    assert "the first look ignores it" and model.parse_cli(["-h"], None, cfg) is None
    cfg = model.ModelConfig()
    model.parse_cli("--connector.windows=16,4 --decoder.qk_norm --decoder.tied false".split(), "", cfg)
    assert cfg.connector.windows == [16, 4] and cfg.decoder.qk_norm is True and cfg.decoder.tied is False
    model.parse_cli(["--encoder_from=", "--connector.queries", "3,4", "--lora.alpha", "-1"], "", cfg)
    assert (cfg.encoder_from, cfg.connector.queries, cfg.lora.alpha) == ("", [3, 4], -1.0)
    assert model.changed_flags(model.ModelConfig(), cfg) == [
        "connector.windows", "connector.queries", "decoder.qk_norm", "decoder.tied", "lora.alpha",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "error, code", [(KeyboardInterrupt, 130), (model.UserError("no"), 2), (OSError("no"), 2)]
)
def test_no_error_of_a_user_or_the_system_leaves_a_traceback(error, code, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as ended:
        model.run_cli(main)
    assert ended.value.code == code and "Traceback" not in capsys.readouterr().err


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    model.run_cli(lambda argv: print("caf\u00e9 \u2713"))
    terminal.flush()
    assert terminal.buffer.getvalue() == b"caf\\xe9 \\u2713\n"
