"""The plan of the house: two tiers and one arrow, files to read in an evening, tests that mirror them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {  # lines at most; the aims behind them: what an evening's reading should come to
    "model.py": 1731,  # 1,250
    "prune.py": 400,
    "train_pretrain.py": 880,  # 780 with sharding
    "train_sft.py": 110,
    "data.py": 1736,  # 1,350
    "eval.py": 890,  # 800
}
IDEAS = ("model.py", "prune.py", "train_pretrain.py", "train_sft.py")
ALL_SIX, FOUR_WITH_IDEAS, TESTS, README, WIDTH = 5730, 3106, 12500, 260, 110  # aims: 4,700; 2,540; 9,500
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


def imports(path: Path) -> set[str]:
    """Top-level modules that a file imports, anywhere in it; those of a package by their dotted name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def scripts_imported(script: str) -> set[str]:
    return {name for name in LIMITS if name.removesuffix(".py") in imports(ROOT / script)} - {script}


@pytest.mark.parametrize("script", LIMITS)
def test_the_six_never_import_tools_or_tests(script):
    outside = {name.split(".")[0] for name in imports(ROOT / script)} & {"tools", "tests", "helpers", *TOOLS}
    assert not outside


def test_no_cycle_among_the_six():
    ready, waiting = set(), set(LIMITS)
    while waiting:
        free = {script for script in waiting if scripts_imported(script) <= ready}
        assert free, f"a cycle among {sorted(waiting)}"
        ready, waiting = ready | free, waiting - free


@pytest.mark.parametrize("script", LIMITS)
def test_lines_of_a_script(script):
    assert lines(ROOT / script) <= LIMITS[script]


def test_lines_in_all():
    assert sum(lines(ROOT / script) for script in LIMITS) <= ALL_SIX
    assert sum(lines(ROOT / script) for script in IDEAS) <= FOUR_WITH_IDEAS
    assert sum(lines(path) for path in (ROOT / "tests").rglob("*.py")) <= TESTS
    assert lines(ROOT / "README.md") <= README


def test_nothing_but_the_six_is_on_the_ground_floor():
    assert {path.name for path in ROOT.glob("*.py")} == set(LIMITS)
    assert not [path for path in (ROOT / "tools").iterdir() if path.is_dir() and any(path.rglob("*.py"))]


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")) + sorted((ROOT / "tools").glob("*.py")), ids=str)
def test_width(path):
    assert not [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > WIDTH]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_is_a_program_with_a_manual(tool):
    tree = ast.parse((ROOT / "tools" / f"{tool}.py").read_text())
    assert f"python tools/{tool}.py" in (ast.get_docstring(tree) or "")
    assert isinstance(tree.body[-1], ast.If)  # if __name__ == "__main__"
    assert f"{tool}.py" in (ROOT / "tools" / "README.md").read_text()


def test_tests_mirror_the_house():
    """test_SCRIPT.py or test_SCRIPT_part.py, tests/tools/test_TOOL.py or test_TOOL_part.py."""
    stems = [script.removesuffix(".py") for script in LIMITS] + ["train", "golden", "house", "demo", "readme"]
    for folder, names in ((ROOT / "tests", stems), (ROOT / "tests" / "tools", TOOLS)):
        for path in folder.glob("test_*.py"):
            subject = path.stem.removeprefix("test_")
            assert any(subject == name or subject.startswith(f"{name}_") for name in names), path.name


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not {name for name in imports(path) if name.startswith("test_")}, path.name


@pytest.mark.parametrize("script", ["train_pretrain.py", "train_sft.py", "eval.py"])
def test_help_and_a_mistyped_flag_answer_without_torch(script):
    """Importing torch takes seconds, so flags are read before: with a broken torch they still answer."""
    broken = "import sys; sys.modules['torch'] = None; import runpy; sys.argv[0] = '{0}'; "
    broken += "sys.path.insert(0, '.'); runpy.run_path('{0}', run_name='__main__')"

    def run(flag: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", broken.format(script), flag]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    manual = run("--help")
    assert manual.returncode == 0 and "--seed" in manual.stdout
    typo = run("--sed=1")
    assert typo.returncode == 2 and "did you mean --seed" in typo.stderr
