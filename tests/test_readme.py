"""The README's sections on own pictures and real runs, literally: their commands in a copy of the project,
only the line of variables is another. A server on this machine has LLaVA's data and the hub's halves, small.
"""

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from helpers_benchmarks import LLAVA
from helpers_tokenizers import write_tokenizer
from PIL import Image, ImageDraw

import data
import model
from tools import download, export

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
COMMIT = "1" * 40


def blocks(section: str) -> list[list[str]]:
    """The bash blocks of a section of the README, as lines."""
    text = (ROOT / "README.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [block.splitlines() for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)]


def follow(lines: list[str], folder: Path, env: dict, **variables) -> str:
    """Runs a block in `folder` with other variables, as many as its first line has; gives what it printed."""
    names = re.findall(r"(\w+)=\S+", lines[0])
    assert [*variables] == names and re.fullmatch(r"(\w+=\S+ ?)+", lines[0]), lines[0]
    script = [" ".join(f"{name}={value}" for name, value in variables.items()), *lines[1:]]
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", "\n".join(script)], cwd=folder, env=env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate("What is this?\n", timeout=900)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # ranks and workers, too
    assert process.returncode == 0, output[-6000:]
    return output


def copy_project(folder: Path) -> None:
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder / file.name)
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "assets", folder / "assets")


def shrink_project(folder: Path) -> None:
    """The presets' connectors become as small as the halves here, and the disk seems to be large enough."""
    for file in (folder / "assets" / "presets").glob("siglip2-*.json"):
        preset = json.loads(file.read_text())
        preset["model"]["connector"] |= {"width": 32, "heads": 2}
        file.write_text(json.dumps(preset))
    file = folder / "tools" / "download.py"
    text, free = file.read_text(), "shutil.disk_usage(root).free"
    assert text.count(free) == 1
    file.write_text(text.replace(free, "10**12"))


def clean_environment(folder: Path, **settings) -> dict:
    private = re.compile(r"HF_|HUGGING|TRANSFORMERS|SIGHTSPEED|\w*_proxy$", re.I)
    env = {name: value for name, value in os.environ.items() if not private.match(name)}
    path = f"{Path(sys.executable).parent}:{env['PATH']}"  # where python and torchrun are
    return {**env, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf_home"), **settings}


# --- A server: the hub's answers about repositories, and below /all/ every address of a data set


class Site(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, repos: dict[str, Path], files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.files = repos, {"/all/" + url.partition("://")[2]: b for url, b in files.items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def reply(self, body: bytes, status: int = 200, **headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path in self.server.files:
            return self.reply(self.server.files[path])
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/[^/]+", path)
        file = re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path)
        repo = (api or file) and (api or file)[1]
        if repo not in self.server.repos:
            return self.reply(b"", 404)
        folder = self.server.repos[repo]
        if file:
            body = (folder / file[2]).read_bytes()
            return self.reply(body, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha256(body).hexdigest()}"')
        sizes = {file.name: {"size": file.stat().st_size} for file in folder.iterdir()}
        if api[2] == "tree":
            facts = [{"type": "file", "path": name, "oid": "2" * 40, **size} for name, size in sizes.items()]
        else:
            siblings = [{"rfilename": name, **size} for name, size in sizes.items()]
            facts = {"id": repo, "sha": COMMIT, "siblings": siblings}
        self.reply(json.dumps(facts).encode(), Content_Type="application/json")


def write_halves(folder: Path) -> dict[str, Path]:
    """Small random halves as the hub has them, by the names of their repositories."""
    torch.manual_seed(0)
    encoder = folder / "encoder"
    vit = model.ViTConfig(256, 16, 32, 12, 1, 64, "gelu_pytorch_tanh", 1e-6, False, "siglip", False, "")
    vit.patch_bias = True
    export.save_vit(model.ViT(vit), encoder)
    config = model.read_json(encoder / "config.json")
    del config["model_type"], config["hidden_act"], config["layer_norm_eps"]  # the hub's file has no defaults
    model.write_json(encoder / "config.json", {"model_type": "siglip", "vision_config": config})
    image = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    model.write_json(encoder / "preprocessor_config.json", {**image, "size": {"height": 256, "width": 256}})
    repos = {"google/siglip2-base-patch16-256": encoder}
    for name, width in (("Qwen/Qwen2.5-0.5B", 32), ("Qwen/Qwen2.5-1.5B", 48)):
        to = repos[name] = folder / name
        lm = model.DecoderConfig(512, width, 2, 4, 2, width // 4, 64, 1e6, qkv_bias=True)
        export.save_decoder(model.Decoder(lm), to, torch.bfloat16)
        write_tokenizer(to, "qwen")
    return repos


def jpeg(rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    size, colour = (rng.randrange(30, 90), rng.randrange(30, 90)), tuple(rng.randbytes(3))
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


def turns(*said: str) -> list[dict]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]


def write_twin(more: dict[str, dict[str, bytes]]) -> dict[str, bytes]:
    """LLaVA's two JSONs of 200 records each and their zips, in the real layouts: address -> content.
    In each a record's picture is in no zip, in the first one more does not decode. more: zip -> more members.
    """
    rng, parts = random.Random(0), download.DATA_SETS["llava"]
    zips, pretrain, sft = {part.to: {} for part in parts if part.kept_names}, [], []
    for i in range(200):
        image = f"{i % 7:05d}/{i:09d}.jpg"
        if i != 50:
            content = jpeg(rng)
            zips["LLaVA-Pretrain/images"][image] = content[:100] if i == 60 else content
        asked = "Render a clear and concise summary of the photo.\n<image>"
        record = {"id": image[6:-4], "image": image, "conversations": turns(asked, f"a small photo no. {i}")}
        pretrain.append(record)
    folders = parts[3:]
    for i in range(200):
        part = folders[i % len(folders)]
        inside = {"gqa/images": "images", "ocr_vqa/images": "images"}.get(part.to, part.to.split("/")[-1])
        said = turns("<image>\nWhat is it?", f"Number {i}.", "Sure?", "Yes.")
        record = {"id": f"{i:06d}", "image": f"{part.to}/{i}.jpg", "conversations": said}
        if i % 10 == 9:  # ShareGPT's have no picture
            record = {
                "id": f"x{i}_0",
                "model": "",
                "conversations": turns("Count.", "1, 2, 3", "More", "4, 5"),
            }
        elif i != 70:
            zips[part.to][f"{inside}/{i}.jpg"] = jpeg(rng)
        sft.append(record)
    files = {}
    for part in parts:
        if not part.kept_names:
            files[part.url] = json.dumps(pretrain if "Pretrain" in part.to else sft).encode()
            continue
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in {**zips[part.to], **more.get(part.to, {})}.items():
                archive.writestr(name, content)
        files[part.url] = buffer.getvalue()
    return files


ASKED = {"pope": 12, "textvqa": 4, "gqa": 4, "scienceqa": 4, "mme": 12}  # questions in the miniatures
BENCHMARKS = {"pope": "pope", "textvqa": "textvqa", "gqa": "gqa", "scienceqa": "scienceqa", "mme": "MME"}


@pytest.fixture(scope="module")
def evening(tmp_path_factory):
    """The project's copy, its environment, and its server."""
    folder = tmp_path_factory.mktemp("evening")
    (folder / "project").mkdir()
    copy_project(folder / "project")
    shrink_project(folder / "project")
    questions = folder / "project" / "playground/data/eval"
    for name, place in BENCHMARKS.items():
        LLAVA[name](questions / place)
    more = {}  # pictures that questions ask about, but that come with the training data
    for place, to in (("gqa/data/images", "gqa/images"), ("textvqa/train_images", "textvqa/train_images")):
        shown = [*(questions / place).iterdir()]
        more[to] = {f"{to.split('/')[1]}/{file.name}": file.read_bytes() for file in shown}
        shutil.rmtree(questions / place)
    server = Site(write_halves(folder / "hub"), write_twin(more))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    settings = {"HF_ENDPOINT": server.url, "SIGHTSPEED_MIRROR": server.url + "/all", "no_proxy": "*"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    yield folder / "project", clean_environment(folder, **settings), folder / "llava"
    server.shutdown()
    server.server_close()
    thread.join(10)


def check_run(run: Path, output: str, steps: tuple[int, int], lora: int) -> None:
    """Checkpoints, predictions, scores with the blind one beside, the export; skipped records were output."""
    for stage, last in zip(("pretrain", "sft"), steps):
        lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == last and lines[-1]["skipped"] > 0
        assert (run / stage / "latest").read_text().strip() == f"step-{last:08d}"
    assert "skipped, image missing: " in output and "skipped, image broken: " in output
    assert len(re.findall(r"skipped .*\d+ image missing", output)) >= 2  # at the end of each stage
    report = json.loads((run / "eval.json").read_text())
    scores = {row["task"]: row for row in report["results"]}
    assert {*BENCHMARKS, "pope/mean f1", "mme/perception points"} <= {*scores}
    for task in BENCHMARKS:
        row, answers = scores[task], (run / "eval_answers" / f"{task}.jsonl").read_text().splitlines()
        assert 0 <= row["score"] <= 100 and row["blind_score"] is not None
        assert row["n"] == len(answers) == ASKED[task] and all("text" in json.loads(line) for line in answers)
    assert (run / "report.html").stat().st_size > 10_000
    vlm = model.VLM.from_pretrained(run / "sft")
    assert (vlm.cfg.visual_tokens(), vlm.cfg.vit.image_size, vlm.cfg.lora.rank) == (336, 512, lora)
    model.ViT.from_pretrained(run / "hf" / "encoder")
    decoder = model.Decoder.from_pretrained(run / "hf" / "decoder")
    ids = data.Tokenizer.from_pretrained(run / "hf" / "decoder").encode("What is this?")
    with torch.no_grad():  # adapters are merged
        trained, exported = (lm(torch.tensor([ids])) for lm in (vlm.decoder, decoder))
    torch.testing.assert_close(trained, exported, rtol=0, atol=1e-4)
    assert "336 visual tokens. Ask; an empty line ends.\n> " in output  # the chat


def test_one_node_one_evening(evening):
    project, env, root = evening
    setup, node, card = blocks("Real runs")
    shared = {"DATA": root, "EVAL": "playground/data/eval"}
    output = follow(setup, project, env, **shared)
    assert (
        "101.0 GB to fetch" in output
        and output.count("usable   198") == 1
        and output.count("usable   199") == 1
    )
    assert "in weights/Qwen/Qwen2.5-1.5B" in output and not [*root.rglob("*.zip")]
    few = {"PRETRAIN_STEPS": 3, "SFT_STEPS": 2, **shared, "PICTURE": "assets/scene.png"}
    names = {"PRESET": "siglip2-qwen2.5-0.5b", "RUN": "runs/node", "GPUS": 2, "WORKERS": 1}
    check_run(project / "runs/node", follow(node, project, env, **names, **few), (3, 2), 0)
    names = {"PRESET": "siglip2-qwen2.5-1.5b", "RUN": "runs/card", "WORKERS": 1}
    check_run(project / "runs/card", follow(card, project, env, **names, **few), (3, 2), 64)


# --- Own pictures


def draw_shapes(folder: Path, each: int) -> None:
    """Circles, squares and triangles, as photographs of things would lie in folders."""
    rng = random.Random(0)
    for kind in ("circle", "square", "triangle"):
        (folder / kind).mkdir(parents=True)
        for i in range(each):
            width, height, r = rng.randrange(80, 160), rng.randrange(80, 160), rng.randrange(15, 35)
            x, y = rng.randrange(r, width - r), rng.randrange(r, height - r)
            image = Image.new("RGB", (width, height), tuple(rng.randrange(170, 256) for _ in range(3)))
            draw, fill = ImageDraw.Draw(image), rng.choice(["#c81e1e", "#1e3cc8", "#148c28"])
            if kind == "circle":
                draw.ellipse((x - r, y - r, x + r, y + r), fill)
            elif kind == "square":
                draw.rectangle((x - r, y - r, x + r, y + r), fill)
            else:
                draw.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill)
            image.save(folder / kind / f"{i}.jpg", quality=92)


def test_train_on_your_own_pictures(tmp_path):
    copy_project(tmp_path)
    draw_shapes(tmp_path / "pictures", 100)
    (block,) = blocks("Your own data")
    few = {"PRETRAIN_STEPS": 60, "SFT_STEPS": 30, "PICTURE": "pictures/circle/1.jpg"}
    output = follow(block, tmp_path, clean_environment(tmp_path), **few)
    assert (
        "480 records to learn from in train.json, 60 questions to ask" in output and "usable   480" in output
    )
    (row,) = json.loads((tmp_path / "runs/mine/eval.json").read_text())["results"]
    assert row["metric"] == "accuracy" and row["n"] == 60
    assert row["score"] > 80 and row["score"] > row["blind_score"] + 30 and row["blind_score"] < 50, row
    assert re.search(r"Ask; an empty line ends.\n> (circle|square|triangle)\n", output), output[-300:]
