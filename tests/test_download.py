"""The hub: its real client against a small hub on this machine, and finding what it left."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import model

ROOT = Path(__file__).parent.parent
# The client writes pieces of 10 MiB, so that a cut must come after more than one.
BIG = random.Random(0).randbytes(24_000_000)
CUT = 15_000_000
OLD, NEW, BINARY, CLOSED, EMPTY = ("1" * 40, "2" * 40, "3" * 40, "4" * 40, "5" * 40)
SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "vocab.tiktoken": b"AA== 0\n",
    "original/tokenizer.model": b"AA== 0\n",
}
UNWANTED = [  # each of them would match a careless pattern
    *"README.md onnx/model.onnx onnx/config.json model.gguf tf_model.h5 flax_model.msgpack".split(),
    *"pytorch_model.bin pytorch_model.bin.index.json training_args.bin optimizer.bin".split(),
    *"original/consolidated.00.pth original/model.safetensors consolidated.safetensors".split(),
    *"open_clip_model.safetensors model.fp16.safetensors fp16/model.safetensors".split(),
]
REPOS = {  # repository -> commit -> files
    "lab/half": {
        OLD: {**SMALL, "config.json": b'{"model_type": "older"}', "model.safetensors": b"older"},
        NEW: {
            **{name: b"unwanted" for name in UNWANTED},
            **SMALL,
            "model.safetensors.index.json": b'{"weight_map": {}}',
            "model-00001-of-00002.safetensors": b"first",
            "model-00002-of-00002.safetensors": BIG,
        },
    },
    "lab/binary": {BINARY: {**SMALL, "pytorch_model.bin": b"pickle", "training_args.bin": b"unwanted"}},
    "lab/gated": {CLOSED: {**SMALL, "model.safetensors": b"secret"}},
    "lab/gguf": {EMPTY: {"config.json": b"{}", "model.gguf": b"unwanted"}},
}
BRANCHES = {
    "lab/half": {"main": NEW, "v1": OLD},
    "lab/binary": {"main": BINARY},
    "lab/gated": {"main": CLOSED},
    "lab/gguf": {"main": EMPTY},
}
WANTED = [n for n in REPOS["lab/half"][NEW] if n not in UNWANTED]


class Hub(ThreadingHTTPServer):
    """What the client asks of the hub: a repository's facts, its tree, files (large ones on another path)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked = []  # (method, path, Range header)
        self.behave = lambda method, path: None  # "cut", "stall", or a status to answer with
        self.release = threading.Event()  # ends all stalls

    def fetched(self) -> list[str]:
        """The names of the files whose content was asked for."""
        paths = [path for method, path, _ in self.asked if method == "GET"]
        return [re.sub(r".*/(resolve|cdn)/\w{40}/", "", p) for p in paths if "/api/" not in p]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, self.headers["Range"]))
        trouble = self.server.behave(self.command, path)
        api = re.fullmatch(r"/api/models/(\w+/\w+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/(\w+/\w+)/(resolve|cdn)/(\w{40})/(.+)", path)
        if isinstance(trouble, int):
            self.reply(b"", trouble)
        elif trouble == "stall" and api:
            self.server.release.wait(20)
        elif api:
            self.answer_api(*api.groups())
        else:
            self.answer_file(*file.groups(), trouble)

    def reply(self, body: bytes, status: int = 200, length: int | None = None, **headers) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_api(self, repo: str, kind: str, revision: str) -> None:
        token = self.headers["Authorization"]
        if repo not in REPOS:  # only those whom the hub knows are told that there is no such thing
            return self.reply(b"", 404 if token else 401, X_Error_Code="RepoNotFound")
        commit = BRANCHES[repo].get(revision or "main", revision)
        if commit not in REPOS[repo]:
            return self.reply(b"", 404, X_Error_Code="RevisionNotFound")
        files = REPOS[repo][commit]
        if kind == "tree":
            facts = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in files.items()
            ]
        else:
            siblings = [{"rfilename": n, "size": len(b)} for n, b in files.items()]
            facts = {"id": repo, "sha": commit, "siblings": siblings}
        self.reply(json.dumps(facts).encode(), Content_Type="application/json")

    def answer_file(self, repo: str, kind: str, commit: str, name: str, trouble: str | None) -> None:
        if repo == "lab/gated":
            return self.reply(b"", 403 if self.headers["Authorization"] else 401, X_Error_Code="GatedRepo")
        body = REPOS[repo][commit][name]
        facts = {"X_Repo_Commit": commit, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        if kind == "resolve" and name.endswith("safetensors"):
            facts |= {"X_Linked_Etag": facts["ETag"], "X_Linked_Size": str(len(body))}
            return self.reply(b"", 302, Location=f"{self.server.url}/{repo}/cdn/{commit}/{name}", **facts)
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.headers["Range"] else 0
        if start:
            facts["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        sent = body[start:CUT] if trouble and self.command == "GET" else body[start:]
        self.reply(sent, 206 if start else 200, length=len(body) - start, **facts)
        if trouble == "stall" and self.command == "GET":
            self.server.release.wait(20)
        if trouble:
            self.close_connection = True


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join(10)


def start(hub_url: str, to: Path, *repos: str, **env) -> subprocess.Popen:
    """Downloads in a process of their own: the client reads its settings when it is imported."""
    code = (
        "import sys, model\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "for repo in sys.argv[2:]:\n"
        "    try: print(model.download(repo, sys.argv[1]))\n"
        "    except model.UserError as error: print(f'refused: {error}')\n"
    )
    clean = {
        k: v for k, v in os.environ.items() if not re.match(r"HF_|HUGGING|TRANSFORMERS|\w*_proxy$", k, re.I)
    }
    settings = {"HF_ENDPOINT": hub_url, "HF_HOME": str(to.parent / "hf_home"), "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(to), *repos],
        cwd=ROOT, env={**clean, **settings, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def download(hub_url: str, to: Path, *repos: str, **env) -> list[str]:
    """What each download gives: its folder, or the sentence that refuses it."""
    process = start(hub_url, to, *repos, **env)
    try:
        told, noise = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, noise
    lines = told.splitlines()
    assert len(lines) == len(repos), told  # one line each
    return lines


def files_in(folder: Path) -> dict[str, bytes]:
    """What lies in a folder beside the client's notes and ours."""
    paths = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    return {
        str(p): (folder / p).read_bytes() for p in paths if p.parts[0] != ".cache" and p.name != "source.json"
    }


def assert_complete(folder: Path) -> None:
    assert files_in(folder) == {name: REPOS["lab/half"][NEW][name] for name in WANTED}
    assert model.read_json(folder / "source.json")["commit"] == NEW
    assert not list(folder.rglob("*.incomplete")) and model.find_half(str(folder)) == folder


def assert_unfinished(folder: Path) -> None:
    assert not (folder / "source.json").exists()
    with pytest.raises(model.UserError, match="unfinished download"):
        model.find_half(str(folder))


def test_fetches_what_the_loaders_read_and_nothing_else(hub, tmp_path):
    folder = tmp_path / "half"
    assert download(hub.url, folder, "lab/half") == [str(folder)]
    assert_complete(folder)
    assert model.read_json(folder / "source.json") == {"repo": "lab/half", "revision": "main", "commit": NEW}
    assert sorted(hub.fetched()) == sorted(WANTED)
    named = " ".join(path for method, path, _ in hub.asked)
    assert not [name for name in UNWANTED if f"/{NEW}/{name}" in named]  # not even asked about
    hub.asked.clear()
    assert download(hub.url, folder, "lab/half") == [str(folder)] and hub.fetched() == []


def test_weights_in_bin_only_where_there_are_no_safetensors(hub, tmp_path):
    download(hub.url, tmp_path / "b", "lab/binary")
    assert sorted(files_in(tmp_path / "b")) == sorted([*SMALL, "pytorch_model.bin"])


def test_a_branch_is_resolved_to_its_commit_and_two_commits_do_not_mix(hub, tmp_path):
    first, second, third = download(hub.url, tmp_path / "h", "lab/half@v1", f"lab/half@{OLD}", "lab/half")
    assert first == second == str(tmp_path / "h")
    assert "holds another download" in third and "delete the folder or change --to" in third
    assert files_in(tmp_path / "h") == REPOS["lab/half"][OLD]
    source = {"repo": "lab/half", "revision": OLD, "commit": OLD}
    assert model.read_json(tmp_path / "h" / "source.json") == source


def large_file(method: str, path: str) -> bool:
    return method == "GET" and "/cdn/" in path and path.endswith("00002-of-00002.safetensors")


def test_a_cut_connection_is_continued_where_it_broke(hub, tmp_path):
    troubles = ["cut"]
    hub.behave = lambda *request: troubles.pop() if troubles and large_file(*request) else None
    assert download(hub.url, tmp_path / "h", "lab/half") == [str(tmp_path / "h")]
    ranges = [asked for method, path, asked in hub.asked if large_file(method, path)]
    assert ranges == [None, f"bytes={10 * 2**20}-"]  # from the last whole piece
    assert_complete(tmp_path / "h")


def test_a_download_that_failed_is_finished_by_the_next(hub, tmp_path):
    troubles = ["cut", 503]
    hub.behave = lambda *request: troubles.pop(0) if troubles and large_file(*request) else None
    (message,) = download(hub.url, tmp_path / "h", "lab/half")
    assert message.startswith("refused: lab/half was not downloaded") and "503" in message and troubles == []
    assert_unfinished(tmp_path / "h")
    done = set(files_in(tmp_path / "h"))
    assert len(done) == len(WANTED) - 1
    hub.asked.clear()
    assert download(hub.url, tmp_path / "h", "lab/half") == [str(tmp_path / "h")]
    assert set(hub.fetched()) == set(WANTED) - done  # what was finished is not fetched again
    assert_complete(tmp_path / "h")


def test_a_killed_download_is_finished_by_the_next(hub, tmp_path):
    hub.behave = lambda *request: "stall" if large_file(*request) else None
    process = start(hub.url, tmp_path / "h", "lab/half")
    for _ in range(300):
        if partial := [p for p in (tmp_path / "h").rglob("*.incomplete") if p.stat().st_size >= 10 * 2**20]:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    hub.release.set()
    assert partial and partial[0].exists()
    assert_unfinished(tmp_path / "h")
    done = set(files_in(tmp_path / "h"))
    hub.behave = lambda method, path: None
    hub.asked.clear()
    assert download(hub.url, tmp_path / "h", "lab/half") == [str(tmp_path / "h")]
    assert len(done) == len(WANTED) - 1 and set(hub.fetched()) == set(WANTED) - done
    assert_complete(tmp_path / "h")  # also: the killed process's part is gone


@pytest.mark.parametrize("asked, there", [("/tree/", None), ("/config.json", b"another size")])
def test_what_the_client_leaves_out_without_an_error_is_noticed(asked, there, hub, tmp_path):
    """It is content with the folder where the list of files is refused, with a file where its facts are."""
    if there:
        (tmp_path / "h").mkdir()
        (tmp_path / "h" / "config.json").write_bytes(there)
    hub.behave = lambda method, path: 401 if asked in path else None
    (message,) = download(hub.url, tmp_path / "h", "lab/half")
    assert "config.json is not complete: repeat the download of lab/half" in message
    assert_unfinished(tmp_path / "h")


def test_the_reason_is_the_hubs_answer_not_the_clients_conclusion(hub, tmp_path):
    hub.behave = lambda method, path: 403 if method == "HEAD" else None
    (message,) = download(hub.url, tmp_path / "h", "lab/half")
    assert "403 Forbidden" in message and "local cache" not in message and hub.url in message


def test_each_refusal_is_one_sentence_with_the_reason(hub, tmp_path):
    reasons = {
        "half": "'half' is no repository: write owner/name",
        "a/b/c": "'a/b/c' is no repository",
        "lab/no--name": "lab/no--name was not downloaded",
        "lab/none": "no such repository: check the name, or set HF_TOKEN if it is not public",
        "lab/half@v9": "lab/half@v9 was not downloaded (it has no such revision)",
        "lab/gated": "it is gated: accept its licence on its page, then set HF_TOKEN",
        "lab/gguf": "lab/gguf has neither model.safetensors nor pytorch_model.bin",
    }
    for env in ({}, {"HF_TOKEN": "hf_x"}):  # 401 and 403, 401 and 404
        for message, reason in zip(download(hub.url, tmp_path / "h", *reasons, **env), reasons.values()):
            assert message.startswith("refused: ") and reason in message, message
        assert not list((tmp_path / "h").rglob("source.json")) and files_in(tmp_path / "h") == {}
    asked = "/lab/gated/resolve/" + CLOSED
    assert any(path.startswith(asked) for _, path, _ in hub.asked)  # it was the file that was refused


def test_no_network_is_one_sentence_that_offers_a_local_folder(hub, tmp_path):
    hub.behave = lambda method, path: "stall"
    (slow,) = download(hub.url, tmp_path / "h", "lab/half")
    assert "not downloaded" in slow and "ReadTimeout" in slow and hub.url in slow
    (offline,) = download(hub.url, tmp_path / "h", "lab/half", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in offline
    (refused,) = download("http://127.0.0.1:1", tmp_path / "h", "lab/half")
    assert "was not downloaded (http://127.0.0.1:1: ConnectError" in refused
    assert all("a local folder in Hugging Face layout works too" in line for line in (slow, offline, refused))
    assert len(hub.asked) == 1 and not (tmp_path / "h").exists()


# --- find_half
def test_find_half_takes_a_folder_or_a_finished_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fetched = tmp_path / "weights" / "lab" / "half"
    (tmp_path / "mine").mkdir()
    model.write_json(fetched / "source.json", {})
    assert model.find_half("mine") == Path("mine") and model.find_half(str(tmp_path)) == tmp_path
    assert model.find_half("lab/half") == Path("weights/lab/half")
    (fetched / model.STATE).mkdir(parents=True)
    (fetched / model.STATE / "x.incomplete").touch()
    assert model.find_half("lab/half") == Path("weights/lab/half")  # source.json says that it is complete
    (fetched / "source.json").unlink()
    for name in ("lab/half", "weights/lab/half"):
        with pytest.raises(model.UserError, match="weights/lab/half is an unfinished download: repeat"):
            model.find_half(name)


@pytest.mark.parametrize("name", ["lab/other", "nowhere", "/nowhere/at/all", "../mine", "../../mine"])
def test_find_half_says_how_to_get_what_is_missing(name, tmp_path, monkeypatch):
    (tmp_path / "here" / "weights").mkdir(parents=True)
    (tmp_path / "here" / "mine").mkdir()  # weights/../mine, which no repository is called
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(model.UserError) as error:
        model.find_half(name)
    said = f"{name} is neither a folder in Hugging Face layout nor a repository (owner/name)"
    if name == "lab/other":
        said = f"{name} is no folder and not downloaded: fetch it with python model.py --download {name}, "
        said += "or give a folder in Hugging Face layout"
    assert str(error.value) == said
