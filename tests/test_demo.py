"""`make demo`, literally: its commands as they stand in the Makefile, and what the demo must show."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def demo_commands(out: Path) -> list[list[str]]:
    """The python lines of the Makefile's demo target, writing to `out` instead of runs/demo."""
    rule = (ROOT / "Makefile").read_text().split("\ndemo:")[1].split("\n\n")[0]
    rule = rule.replace("runs/demo", str(out)).replace("$(SEED)", "0")
    lines = re.findall(r"\$\(BIN\)/python (.*)", rule)
    return [[sys.executable, *line.split()] for line in lines]


@pytest.mark.slow
def test_the_demo_sees(tmp_path):
    commands = demo_commands(tmp_path)
    programs = ["train_pretrain.py", "train_sft.py", "eval.py", "report.py"]
    assert [Path(command[1]).name for command in commands] == programs
    for command in commands:
        subprocess.run(command, cwd=ROOT, check=True)
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    rows = {(row["task"], row["tokens"]): row for row in results}
    full, pruned = rows["scenes_vqa", "full"], rows["scenes_vqa", "pruned"]
    assert full["score"] >= 75 and full["score"] - full["blind_score"] >= 35, full
    assert pruned["score"] > pruned["blind_score"] + 20, pruned
    page = (tmp_path / "report.html").read_text()
    random_scales, inflated = re.search(r"random ([\d.]+), inflate ([\d.]+)", page).groups()
    assert float(inflated) < float(random_scales) and len(page) > 20_000
