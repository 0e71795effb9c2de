"""`make demo`, literally: its commands as they stand in the Makefile, and what the demo must show."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def demo_commands(out: Path) -> list[list[str]]:
    """The python lines of the Makefile's demo target, writing to `out` instead of runs/demo."""
    rule = (ROOT / "Makefile").read_text().split("\ndemo:")[1].split("\n\n")[0]
    lines = [line.strip() for line in rule.splitlines() if line.strip().startswith("$(BIN)/python")]
    lines = [line.replace("runs/demo", str(out)).replace("$(SEED)", "0") for line in lines]
    return [[sys.executable, *line.split()[1:]] for line in lines]


@pytest.mark.slow
def test_the_demo_sees(tmp_path):
    commands = demo_commands(tmp_path)
    assert [Path(command[1]).name for command in commands] == ["train_pretrain.py", "train_sft.py", "eval.py"]
    for command in commands:
        subprocess.run(command, cwd=ROOT, check=True)
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    rows = {(row["task"], row["tokens"]): row for row in results}
    full, pruned = rows["scenes_vqa", "full"], rows["scenes_vqa", "pruned"]
    assert full["score"] >= 75 and full["score"] - full["blind_score"] >= 35, full
    assert pruned["score"] > pruned["blind_score"] + 20, pruned
    log = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert log[0]["loss inflate"] < log[0]["loss random"]
    assert (tmp_path / "report.html").stat().st_size > 20_000
