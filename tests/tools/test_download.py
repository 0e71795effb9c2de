"""The hub: its real client against a small hub on this machine; then LLaVA's data, all of it in miniature."""

import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from helpers import chat, picture, write
from PIL import Image

import data
import model
from model import UserError
from tools import download


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler: type):
        super().__init__(("127.0.0.1", 0), handler)
        self.url, self.requests = f"http://127.0.0.1:{self.server_port}", []
        self.behave = lambda *request: None  # what goes wrong with a request
        self.release = threading.Event()  # ends all stalls


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status: int, body: bytes = b"", length: int | None = None, **headers) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def serve(handler: type):
    server = Server(handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join(10)


def files_in(folder: Path) -> dict[str, bytes]:
    """What lies in a folder beside the hub client's notes and ours."""
    paths = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    notes = (".cache/", "source.json")
    return {name: p.read_bytes() for name, p in paths.items() if not name.startswith(notes)}


# ---------------------------------------------------------------------------------------------------------
# The hub

BIG, CUT = random.Random(0).randbytes(240_000), 150_000
OLD, NEW, BINARY, CLOSED, EMPTY = ("1" * 40, "2" * 40, "3" * 40, "4" * 40, "5" * 40)
SMALL = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}"}
SMALL |= dict.fromkeys(["vocab.tiktoken", "original/tokenizer.model"], b"AA== 0\n")
UNWANTED = [  # each of them would match a careless pattern
    *"README.md onnx/model.onnx onnx/config.json model.gguf tf_model.h5 flax_model.msgpack".split(),
    *"pytorch_model.bin pytorch_model.bin.index.json training_args.bin optimizer.bin".split(),
    *"original/consolidated.00.pth original/model.safetensors consolidated.safetensors".split(),
    *"open_clip_model.safetensors model.fp16.safetensors fp16/model.safetensors".split(),
]
HALF = {
    **{name: b"unwanted" for name in UNWANTED}, **SMALL,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "model-00001-of-00002.safetensors": b"first", "model-00002-of-00002.safetensors": BIG,
}  # fmt: skip
OLD_HALF = {**SMALL, "config.json": b'{"model_type": "older"}', "model.safetensors": b"older"}
REPOS = {  # repository -> commit -> files; the last commit is that of the branch main
    "lab/half": {OLD: OLD_HALF, NEW: HALF},
    "lab/binary": {BINARY: {**SMALL, "pytorch_model.bin": b"pickle", "training_args.bin": b"unwanted"}},
    "lab/gated": {CLOSED: {**SMALL, "model.safetensors": b"secret"}},
    "lab/gguf": {EMPTY: {"config.json": b"{}", "model.gguf": b"unwanted"}},
}
WANTED = [name for name in HALF if name not in UNWANTED]


class HubHandler(Handler):
    """What the client asks of the hub: a repository's facts, its tree, files (large ones on another path)."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers["Range"]))
        trouble = self.server.behave(self.command, path)
        api = re.fullmatch(r"/api/models/(\w+/\w+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/(\w+/\w+)/(resolve|cdn)/(\w{40})/(.+)", path)
        if isinstance(trouble, int):
            self.reply(trouble)
        elif trouble == "stall" and api:
            self.server.release.wait(20)
        elif api:
            self.answer_api(*api.groups())
        else:
            self.answer_file(*file.groups(), trouble)

    def answer_api(self, repo: str, kind: str, revision: str) -> None:
        token = self.headers["Authorization"]
        if repo not in REPOS:  # only those whom the hub knows are told that there is no such thing
            return self.reply(404 if token else 401, X_Error_Code="RepoNotFound")
        branches = {"main": [*REPOS[repo]][-1], "v1": OLD}
        commit = branches.get(revision or "main", revision)
        if commit not in REPOS[repo]:
            return self.reply(404, X_Error_Code="RevisionNotFound")
        files = REPOS[repo][commit]
        if kind == "tree":
            facts = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in files.items()]
        else:
            siblings = [{"rfilename": n, "size": len(b)} for n, b in files.items()]
            facts = {"id": repo, "sha": commit, "siblings": siblings}
        self.reply(200, json.dumps(facts).encode(), Content_Type="application/json")

    def answer_file(self, repo: str, kind: str, commit: str, name: str, trouble: str | None) -> None:
        if repo == "lab/gated":
            return self.reply(403 if self.headers["Authorization"] else 401, X_Error_Code="GatedRepo")
        body = REPOS[repo][commit][name]
        facts = {"X_Repo_Commit": commit, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        if kind == "resolve" and name.endswith("safetensors"):
            facts |= {"X_Linked_Etag": facts["ETag"], "X_Linked_Size": str(len(body))}
            return self.reply(302, Location=f"{self.server.url}/{repo}/cdn/{commit}/{name}", **facts)
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.headers["Range"] else 0
        if start:
            facts["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        sent = body[start:CUT] if trouble and self.command == "GET" else body[start:]
        self.reply(206 if start else 200, sent, len(body) - start, **facts)
        if trouble == "stall" and self.command == "GET":
            self.server.release.wait(20)
        if trouble:
            self.close_connection = True


@pytest.fixture
def hub():
    yield from serve(HubHandler)


def fetched(hub: Server) -> list[str]:
    """The names of the files whose content was asked for."""
    paths = [path for method, path, _ in hub.requests if method == "GET"]
    return [re.sub(r".*/(resolve|cdn)/\w{40}/", "", path) for path in paths if "/api/" not in path]


def settings(hub_url: str, to: Path, **env) -> dict[str, str]:
    """The environment without what the client might read from ours."""
    foreign = re.compile(r"HF_|HUGGING|TRANSFORMERS|\w*_proxy$", re.I)
    clean = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    clean |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(to.parent / "hf_home"), "HF_HUB_DISABLE_XET": "1"}
    clean |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    return {**clean, **env}


def fetch(hub_url: str, to: Path, *repos: str, **env) -> list[str]:
    """What each download gives: its folder, or the sentence that refuses it."""
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", settings(hub_url, to, **env))
        for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
            patch.delitem(sys.modules, name)  # the client reads its settings when it is imported
        for repo in repos:
            try:
                results.append(str(download.download_repo(repo, str(to))))
            except UserError as error:
                results.append(f"refused: {error}")
    assert not any("\n" in line for line in results)
    return results


def assert_complete(folder: Path) -> None:
    assert files_in(folder) == {name: HALF[name] for name in WANTED}
    assert model.read_json(folder / "source.json")["commit"] == NEW
    assert not list(folder.rglob("*.incomplete")) and model.find_half(str(folder)) == folder


def assert_unfinished(folder: Path) -> None:
    assert not (folder / "source.json").exists()  # without it, `find_half` takes no download


def test_fetches_what_the_loaders_read_and_nothing_else(hub, tmp_path):
    folder = tmp_path / "half"
    assert fetch(hub.url, folder, "lab/half") == [str(folder)]
    assert_complete(folder)
    assert model.read_json(folder / "source.json") == {"repo": "lab/half", "revision": "main", "commit": NEW}
    assert sorted(fetched(hub)) == sorted(WANTED)
    named = " ".join(path for method, path, _ in hub.requests)
    assert not [name for name in UNWANTED if f"/{NEW}/{name}" in named]  # not even asked about
    hub.requests.clear()
    assert fetch(hub.url, folder, "lab/half") == [str(folder)] and fetched(hub) == []
    fetch(hub.url, tmp_path / "b", "lab/binary")  # no safetensors: then .bin
    assert sorted(files_in(tmp_path / "b")) == sorted([*SMALL, "pytorch_model.bin"])


def test_a_branch_is_resolved_to_its_commit_and_two_commits_do_not_mix(hub, tmp_path):
    first, second, third = fetch(hub.url, tmp_path / "h", "lab/half@v1", f"lab/half@{OLD}", "lab/half")
    assert first == second == str(tmp_path / "h")
    assert "holds another download" in third and "delete the folder or change --to" in third
    assert files_in(tmp_path / "h") == OLD_HALF
    source = {"repo": "lab/half", "revision": OLD, "commit": OLD}
    assert model.read_json(tmp_path / "h" / "source.json") == source


def large_file(method: str, path: str) -> bool:
    return method == "GET" and "/cdn/" in path and path.endswith("00002-of-00002.safetensors")


def test_a_download_that_failed_is_finished_by_the_next(hub, tmp_path):
    """Without fetching again what was finished: all but the large file."""
    folder, troubles = tmp_path / "h", ["cut", 503]
    hub.behave = lambda *request: troubles.pop(0) if troubles and large_file(*request) else None
    (message,) = fetch(hub.url, folder, "lab/half")
    assert message.startswith("refused: lab/half was not downloaded") and "503" in message and troubles == []
    assert_unfinished(folder)
    write(folder / download.NOTES / "x.incomplete", b"of a process that was killed")
    done = set(files_in(folder))
    hub.requests.clear()
    assert fetch(hub.url, folder, "lab/half") == [str(folder)]
    assert len(done) == len(WANTED) - 1 and set(fetched(hub)) == set(WANTED) - done
    assert_complete(folder)


@pytest.mark.parametrize("asked, there", [("/tree/", None), ("/config.json", b"another size")])
def test_what_the_client_leaves_out_without_an_error_is_noticed(asked, there, hub, tmp_path):
    """It is content with the folder where the list of files is refused, with a file where its facts are."""
    if there:
        write(tmp_path / "h" / "config.json", there)
    hub.behave = lambda method, path: 401 if asked in path else None
    (message,) = fetch(hub.url, tmp_path / "h", "lab/half")
    assert "config.json is not complete: repeat the download of lab/half" in message
    assert_unfinished(tmp_path / "h")
    hub.behave = lambda method, path: 403 if method == "HEAD" else None
    (message,) = fetch(hub.url, tmp_path / "o", "lab/half")  # the hub's answer, not the client's conclusion
    assert "403 Forbidden" in message and "local cache" not in message and hub.url in message


def test_each_refusal_is_one_sentence_with_the_reason(hub, tmp_path):
    reasons = {
        "half": "'half' is no repository: write owner/name", "a/b/c": "'a/b/c' is no repository",
        "lab/no--name": "lab/no--name was not downloaded",
        "lab/none": "no such repository: check the name, or set HF_TOKEN if it is not public",
        "lab/half@v9": "lab/half@v9 was not downloaded (it has no such revision)",
        "lab/gated": "it is gated: accept its licence on its page, then set HF_TOKEN",
        "lab/gguf": "lab/gguf has neither model.safetensors nor pytorch_model.bin",
    }  # fmt: skip
    for env in ({}, {"HF_TOKEN": "hf_x"}):  # 401 and 403, 401 and 404
        for message, reason in zip(fetch(hub.url, tmp_path / "h", *reasons, **env), reasons.values()):
            assert message.startswith("refused: ") and reason in message, message
        assert not list((tmp_path / "h").rglob("source.json")) and files_in(tmp_path / "h") == {}
    asked = "/lab/gated/resolve/" + CLOSED
    assert any(path.startswith(asked) for _, path, _ in hub.requests)  # it was the file that was refused


def test_no_network_is_one_sentence_that_offers_a_local_folder(hub, tmp_path):
    hub.behave = lambda method, path: "stall"
    (slow,) = fetch(hub.url, tmp_path / "h", "lab/half")
    assert "not downloaded" in slow and "ReadTimeout" in slow and hub.url in slow
    (offline,) = fetch(hub.url, tmp_path / "h", "lab/half", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in offline
    (refused,) = fetch("http://127.0.0.1:1", tmp_path / "h", "lab/half")
    assert "was not downloaded (http://127.0.0.1:1: ConnectError" in refused
    assert all("a local folder in Hugging Face layout works too" in line for line in (slow, offline, refused))
    assert len(hub.requests) == 1 and not (tmp_path / "h").exists()


# --- find_half
def test_find_half_takes_a_folder_or_a_finished_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fetched = tmp_path / "weights" / "lab" / "half"
    (tmp_path / "mine").mkdir()
    model.write_json(fetched / "source.json", {})
    assert model.find_half("mine") == Path("mine") and model.find_half(str(tmp_path)) == tmp_path
    assert model.find_half("lab/half") == Path("weights/lab/half")
    (fetched / download.NOTES).mkdir(parents=True)
    (fetched / download.NOTES / "x.incomplete").touch()
    assert model.find_half("lab/half") == Path("weights/lab/half")  # source.json says that it is complete
    (fetched / "source.json").unlink()
    for name in ("lab/half", "lab/half@v1"):
        with pytest.raises(UserError, match=f"{name} is no folder and not downloaded: fetch it"):
            model.find_half(name)
    model.write_json(fetched / "source.json", {"repo": "lab/half", "revision": "v1", "commit": OLD})
    for name in ("lab/half", "lab/half@v1", f"lab/half@{OLD}"):
        assert model.find_half(name) == Path("weights/lab/half")
    with pytest.raises(UserError, match="lab/half@v2 is no folder and not downloaded: fetch it"):
        model.find_half("lab/half@v2")
    for name in ("lab/other", "nowhere", "/nowhere/at/all", "../mine"):
        message = f"{name} is neither a folder in Hugging Face layout nor a repository"
        if name == "lab/other":
            message = "lab/other is no folder and not downloaded: fetch it with python "
        with pytest.raises(UserError, match=message):
            model.find_half(name)


# ---------------------------------------------------------------------------------------------------------
# LLaVA's data


def make_zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored, as pictures are
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def room(gb: float):
    """Stands for shutil.disk_usage."""
    return lambda path: SimpleNamespace(free=int(gb * 1e9))


RED, BLUE, COVER = picture("red", "JPEG", (8, 6)), picture("blue", "JPEG"), picture("green", "GIF", (8, 6))
NOISE = random.Random(0).randbytes(200_000)
SFT = {  # where mix665k looks for pictures -> the zip's own name for it
    "coco/train2017/000000000009.jpg": "train2017/000000000009.jpg",
    "gqa/images/2354786.jpg": "images/2354786.jpg",
    "ocr_vqa/images/1437717772.jpg": "images/1437717772.jpg",
    "textvqa/train_images/0000599864fd15b3.jpg": "train_images/0000599864fd15b3.jpg",
    "vg/VG_100K/2.jpg": "VG_100K/2.jpg",
    "vg/VG_100K_2/1.jpg": "VG_100K_2/1.jpg",
}
PRETRAIN_JSON, PRETRAIN_ZIP, SFT_JSON, *SFT_ZIPS = (part.url for part in download.DATA_SETS["llava"])
PRETRAIN = {"00453/004539375.jpg": RED, "00000/000000010.jpg": BLUE, "00000/noise.jpg": NOISE}
FILES = {
    PRETRAIN_JSON: json.dumps([chat("00453/004539375.jpg"), chat("00000/000000010.jpg")]).encode(),
    PRETRAIN_ZIP: make_zip({"00000/": b"", **PRETRAIN}),
    SFT_JSON: json.dumps([chat(path) for path in SFT]).encode(),
}
for part, (path, member) in zip(download.DATA_SETS["llava-sft"][1:], SFT.items()):
    assert path.startswith(part.to + "/")
    FILES[part.url] = make_zip({member: COVER if "ocr" in path else RED})


class DataHandler(Handler):
    def do_GET(self):
        site, path = self.server, urlsplit(self.path).path
        if "/huggingface.co/" in path and not self.path.endswith("?signed"):  # as the hub with large files
            return self.reply(302, Location=f"{site.url}{path}?signed")
        asked, condition = self.headers["Range"], self.headers["If-Range"]
        site.requests.append((path, asked, condition))
        trouble, body = site.behave(path), site.files.get(path)
        if isinstance(trouble, str):
            return self.reply(int(trouble))
        if body is None:
            return self.reply(404)
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        etag, start = "W/" * site.weak + etag, 0
        headers = {"ETag": etag, "Content_Type": "application/zip"}
        if asked and site.ranges and condition in (None, etag):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(body):
                return self.reply(416, Content_Range=f"bytes */{len(body)}")
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.reply(206 if start else 200, body[start:trouble], len(body) - start, **headers)
        if trouble is not None:
            self.close_connection = True


@pytest.fixture
def site(monkeypatch):
    serving = serve(DataHandler)
    server = next(serving)
    server.files = {path_of(url): content for url, content in FILES.items()}
    server.ranges, server.weak = True, False
    monkeypatch.setenv("SIGHTSPEED_MIRROR", server.url + "/all/")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(download, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(download.shutil, "disk_usage", room(1e4))
    yield server
    next(serving, None)


def path_of(url: str) -> str:
    return "/all/" + url.partition("://")[2]


def about(site: Server, url: str) -> list[tuple]:
    return [(span, condition) for path, span, condition in site.requests if path == path_of(url)]


def complete(root: Path) -> None:
    """Downloads; then all is there, and neither zips nor halves are left behind."""
    download.download_data("llava-pretrain", str(root))
    expected = {f"LLaVA-Pretrain/images/{name}": content for name, content in PRETRAIN.items()}
    expected["LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"] = FILES[PRETRAIN_JSON]
    expected[".download/LLaVA-Pretrain_images.done"] = b""
    files = files_in(root)
    files.pop("pretrain.json")
    assert files == expected


def failure(root: Path, name: str = "llava-pretrain") -> str:
    with pytest.raises(UserError) as error:
        download.download_data(name, str(root))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_all_of_it_lies_where_the_records_look_for_it(site, tmp_path, capfd):
    assert download.download_data("llava", str(tmp_path)) == tmp_path
    assert sorted(path for path, _, _ in site.requests) == sorted(site.files)  # each once
    ((captions, _),) = data.open_sources(str(tmp_path / "pretrain.json"), "pretrain")
    assert captions.kind == "caption" and len(captions) == 2
    first = captions[0].images[0]
    assert first == tmp_path / "LLaVA-Pretrain/images/00453/004539375.jpg" and first.read_bytes() == RED
    ((chats, _),) = data.open_sources(str(tmp_path / "sft.json"), "sft")
    assert chats.kind == "chat" and [r.images for r in chats] == [[tmp_path / path] for path in SFT]
    for path in SFT:
        assert Image.open(tmp_path / path).size == (8, 6)  # a GIF by the name of .jpg too
    assert not list(tmp_path.rglob("*.zip")) and not list(tmp_path.rglob("*.tmp"))
    told = capfd.readouterr()
    assert f"21.80 GB  {site.url}/all/downloads.cs.stanford.edu/nlp/data/gqa/images.zip" in told.out
    assert "llava: 101.0 GB to fetch" in told.out and "VG_100K_2.zip: 100%" in told.err


def test_what_is_finished_is_neither_asked_for_nor_touched(site, tmp_path):
    complete(tmp_path)
    (tmp_path / "pretrain.json").write_text("[changed by its owner]")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    site.requests.clear()
    download.download_data("llava-pretrain", str(tmp_path))
    assert site.requests == [] and before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    download.download_data("llava", str(tmp_path))  # only what is new
    assert {path for path, _, _ in site.requests} == {path_of(url) for url in (SFT_JSON, *SFT_ZIPS)}


@pytest.mark.parametrize("server", ["strong", "weak", "no ranges"])
def test_a_cut_connection_goes_on_at_the_byte_or_starts_anew(server, site, tmp_path):
    left = [123_456]  # bytes of the first answer
    site.behave = lambda path: left.pop() if path == path_of(PRETRAIN_ZIP) and left else None
    site.weak, site.ranges = server == "weak", server != "no ranges"
    complete(tmp_path)
    etag = f'"{hashlib.sha1(FILES[PRETRAIN_ZIP]).hexdigest()}"'
    etag = None if site.weak else etag  # If-Range does not take weak ones
    assert about(site, PRETRAIN_ZIP) == [(None, None), ("bytes=123456-", etag)]


def test_the_next_call_goes_on_where_a_failed_one_stopped(site, tmp_path):
    answers = [150_000, "404"]
    site.behave = lambda path: answers.pop(0) if path == path_of(PRETRAIN_ZIP) and answers else None
    message = failure(tmp_path)
    url = site.url + path_of(PRETRAIN_ZIP)
    assert message.startswith(f"{url} was not fetched") and "404" in message and "repeat" in message
    archive = tmp_path / ".download/LLaVA-Pretrain_images.zip"
    assert str(archive) in message and not archive.exists()
    assert Path(f"{archive}.part").read_bytes() == FILES[PRETRAIN_ZIP][:150_000]
    site.requests.clear()
    complete(tmp_path)
    assert [(path, span) for path, span, _ in site.requests] == [(path_of(PRETRAIN_ZIP), "bytes=150000-")]


@pytest.mark.parametrize("how", ["If-Range", "206 of another", "206 of elsewhere", "longer than the file"])
def test_two_versions_of_a_file_do_not_mix(how, site, tmp_path, monkeypatch):
    """The first half is of another one: the server says so, or only its ETag does, or there is no rest."""
    longer, get, reply = how == "longer than the file", DataHandler.do_GET, DataHandler.reply
    part = tmp_path / ".download/LLaVA-Pretrain_images.zip.part"
    write(part, b"old" * (100_000 if longer else 1000))
    if not longer and how != "206 of elsewhere":
        part.with_suffix(".etag").write_text('"old"')

    def careless(self):  # a server that knows Range but not If-Range
        del self.headers["If-Range"]
        get(self)

    if how == "206 of another":
        monkeypatch.setattr(DataHandler, "do_GET", careless)
    if how == "206 of elsewhere":
        other = {"Content_Range": f"bytes 9-99/{len(FILES[PRETRAIN_ZIP])}"}
        monkeypatch.setattr(DataHandler, "reply", lambda self, *a, **kw: reply(self, *a, **({**kw, **other})))
    complete(tmp_path)
    assert len(about(site, PRETRAIN_ZIP)) == (1 if how == "If-Range" else 2)


def test_a_file_that_stays_short_is_never_put_in_place(site, tmp_path, capfd):
    site.behave = lambda path: 70 if path == path_of(PRETRAIN_JSON) else None
    message = failure(tmp_path)
    size = len(FILES[PRETRAIN_JSON])
    assert f"the connection ended after 70 of {size} bytes" in message
    halves = {f"blip_laion_cc_sbu_558k.json.{kind}" for kind in ("part", "etag")}
    assert set(files_in(tmp_path / "LLaVA-Pretrain")) == halves
    spans = [span for span, _ in about(site, PRETRAIN_JSON)]
    assert spans == [None] + download.MAX_FAILED_TRIES * ["bytes=70-"]
    assert capfd.readouterr().out.count("trying again") == download.MAX_FAILED_TRIES


@pytest.mark.parametrize("status, attempts", [("404", 1), ("503", 5), ("429", 5)])
def test_a_refusal_ends_at_once_and_an_overload_is_waited_for(status, attempts, site, tmp_path):
    site.behave = lambda path: status
    message = failure(tmp_path)
    assert site.url + path_of(PRETRAIN_JSON) in message and status in message
    assert len(site.requests) == attempts
    site.behave = lambda path: status if attempts > 1 and len(site.requests) % 3 else None
    complete(tmp_path)


def test_no_network_a_page_that_asks_to_log_in_and_a_full_disk(site, tmp_path, monkeypatch):
    def full(path, mode):
        open(path, mode).close()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setenv("SIGHTSPEED_MIRROR", "http://127.0.0.1:9/all")  # where nothing listens
        message = failure(tmp_path)
        assert message.startswith("http://127.0.0.1:9/all/huggingface.co/datasets/") and "refused" in message
    with monkeypatch.context() as patch:
        reply, page = DataHandler.reply, {"Content_Type": "text/html; charset=utf-8"}
        patch.setattr(DataHandler, "reply", lambda self, *args, **kw: reply(self, *args, **{**kw, **page}))
        assert "gave a web page, not the file" in failure(tmp_path)
        assert not (tmp_path / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json").exists()
    site.requests.clear()
    monkeypatch.setattr(download, "open", full, raising=False)
    assert "No space left on device" in failure(tmp_path) and len(site.requests) == 1  # not tried again


@pytest.mark.parametrize("error", [KeyboardInterrupt("stopped"), OSError(errno.ENOSPC, "stopped")], ids=repr)
def test_an_unpacking_that_was_stopped_goes_on_with_the_rest(error, site, tmp_path, monkeypatch):
    """As a kill would, it leaves two members, half of the third, and the zip."""
    copy, copied = shutil.copyfileobj, []

    def stop_in_the_third(source, target, length):
        copied.append(target.name)
        if len(copied) == 3:
            target.write(source.read(50_000))
            raise error
        copy(source, target, length)

    monkeypatch.setattr(download.shutil, "copyfileobj", stop_in_the_third)
    assert "stopped" in failure(tmp_path) or "KeyboardInterrupt" in failure(tmp_path)
    images = tmp_path / "LLaVA-Pretrain/images"
    assert sorted(files_in(images)) == ["00000/000000010.jpg", "00000/noise.jpg.tmp", "00453/004539375.jpg"]
    site.requests.clear()
    complete(tmp_path)
    assert site.requests == []  # the zip was still there
    assert copied[3:] == [str(images / "00000/noise.jpg.tmp")]  # and the two were left alone


def test_a_member_of_another_size_is_written_anew_and_a_zip_that_is_there_is_used(site, tmp_path):
    write(tmp_path / "LLaVA-Pretrain/images/00453/004539375.jpg", RED[:100])
    write(tmp_path / ".download/LLaVA-Pretrain_images.zip", FILES[PRETRAIN_ZIP])
    complete(tmp_path)
    assert about(site, PRETRAIN_ZIP) == []


@pytest.mark.parametrize("name", ["../../evil.jpg", "/evil.jpg", "00000/../../../evil.jpg", "00000/.."])
def test_a_zip_that_reaches_outside_is_refused(name, site, tmp_path):
    site.files[path_of(PRETRAIN_ZIP)] = make_zip({"00000/fine.jpg": RED, name: b"evil"})
    root = tmp_path / "in" / "here"
    message = failure(root)
    assert "would write outside of" in message and name in message
    assert not list(tmp_path.rglob("evil*")) and not list(tmp_path.rglob("fine.jpg"))
    assert not (root / "pretrain.json").exists()


@pytest.mark.parametrize("harm", ["a byte", "no zip"])
def test_a_broken_zip_is_fetched_anew(harm, site, tmp_path):
    good = site.files[path_of(PRETRAIN_ZIP)]
    at = good.index(NOISE) + 1000
    bad = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] if harm == "a byte" else b"not a zip"
    site.files[path_of(PRETRAIN_ZIP)] = bad
    assert "BadZipFile" in failure(tmp_path)
    assert not (tmp_path / "LLaVA-Pretrain/images/00000/noise.jpg").exists()
    site.files[path_of(PRETRAIN_ZIP)] = good
    complete(tmp_path)


def test_too_little_disk_is_said_before_anything_is_fetched(site, tmp_path, monkeypatch):
    # the captions, and twice the pictures with 5% for blocks: 57.73 GB
    monkeypatch.setattr(download.shutil, "disk_usage", room(57.7))
    message = failure(tmp_path)
    assert "57.7 GB free but llava-pretrain takes 57.7 GB" in message and site.requests == []
    part = write(tmp_path / ".download/LLaVA-Pretrain_images.zip.part", b"")
    os.truncate(part, 10**9)  # takes no room: what is fetched already needs not be fetched
    download.list_parts("x", tmp_path, download.DATA_SETS["llava-pretrain"])
    monkeypatch.setattr(download.shutil, "disk_usage", room(28.6))
    part.rename(part.with_suffix(""))  # the zip is there, so is the room that it had planned for
    download.list_parts("x", tmp_path, download.DATA_SETS["llava-pretrain"])


def test_where_addresses_lead(monkeypatch):
    coco, path = download.DATA_SETS["llava-sft"][1].url, PRETRAIN_ZIP.removeprefix("https://huggingface.co/")
    assert path == "datasets/liuhaotian/LLaVA-Pretrain/resolve/main/images.zip"
    monkeypatch.delenv("SIGHTSPEED_MIRROR", raising=False)
    for hub in ("https://huggingface.co", "https://hub.example/"):
        monkeypatch.setenv("HF_ENDPOINT", hub)
        assert download.mirrored(PRETRAIN_ZIP) == f"{hub.rstrip('/')}/{path}"
        assert download.mirrored(coco) == coco
    monkeypatch.setenv("SIGHTSPEED_MIRROR", "http://m/p")  # before HF_ENDPOINT
    assert download.mirrored(coco) == "http://m/p/s3.amazonaws.com/images.cocodataset.org/zips/train2017.zip"
    assert download.mirrored(PRETRAIN_ZIP) == f"http://m/p/huggingface.co/{path}"


def test_the_command_tells_repositories_from_data_sets(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(download, "download_repo", lambda *args: calls.append(args) or "weights")
    monkeypatch.setattr(download, "download_data", lambda *args: calls.append(args) or "data")
    download.main(["lab/half@v1"])
    download.main(["lab/half", "--to", "here"])
    download.main(["llava-sft", "--to=there"])
    assert calls == [("lab/half@v1", ""), ("lab/half", "here"), ("llava-sft", "there")]
    assert capsys.readouterr().out == "in weights\nin weights\nin data\n"
    for argv, words in ((["lava"], "llava-pretrain, llava-sft, llava"), (["llava"], "--to"), ([], "owner")):
        with pytest.raises(UserError, match=words):
            download.main(argv)
