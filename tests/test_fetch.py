"""data.download against a small server on this machine: every part of LLaVA-1.5's data, in miniature."""

import errno
import hashlib
import io
import json
import random
import re
import shutil
import threading
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

import data
from model import UserError

Usage = namedtuple("Usage", "total used free")


def picture(colour: str, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, kind)
    return buffer.getvalue()


def make_zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored, as pictures are
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def record(image: str) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a thing"}]
    return {"id": image, "image": image, "conversations": turns}


RED, BLUE, COVER = picture("red"), picture("blue"), picture("green", "GIF")
NOISE = random.Random(0).randbytes(200_000)
SFT = {  # where mix665k looks for pictures -> the zip's own name for it
    "coco/train2017/000000000009.jpg": "train2017/000000000009.jpg",
    "gqa/images/2354786.jpg": "images/2354786.jpg",
    "ocr_vqa/images/1437717772.jpg": "images/1437717772.jpg",
    "textvqa/train_images/0000599864fd15b3.jpg": "train_images/0000599864fd15b3.jpg",
    "vg/VG_100K/2.jpg": "VG_100K/2.jpg",
    "vg/VG_100K_2/1.jpg": "VG_100K_2/1.jpg",
}
PRETRAIN_JSON, PRETRAIN_ZIP, SFT_JSON, *SFT_ZIPS = (part.url for part in data.DOWNLOADS["llava"])
PRETRAIN = {"00453/004539375.jpg": RED, "00000/000000010.jpg": BLUE, "00000/noise.jpg": NOISE}
FILES = {
    PRETRAIN_JSON: json.dumps([record("00453/004539375.jpg"), record("00000/000000010.jpg")]).encode(),
    PRETRAIN_ZIP: make_zip({"00000/": b"", **PRETRAIN}),
    SFT_JSON: json.dumps([record(path) for path in SFT]).encode(),
}
for part, (path, member) in zip(data.DOWNLOADS["llava-sft"][1:], SFT.items()):
    assert path.startswith(part.to + "/")
    FILES[part.url] = make_zip({member: COVER if "ocr" in path else RED})


class Site(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = {"/all/" + url.partition("://")[2]: content for url, content in FILES.items()}
        self.asked = []  # (path, Range, If-Range), the hub's redirects not counted
        self.ranges, self.weak = True, False
        self.behave = lambda path: None  # a status, or after how many bytes of a file the connection is cut


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        site, path = self.server, urlsplit(self.path).path
        if "/huggingface.co/" in path and not self.path.endswith(
            "?signed"
        ):  # as the hub does with large files
            return self.reply(302, b"", Location=f"{site.url}{path}?signed")
        asked, condition = self.headers["Range"], self.headers["If-Range"]
        site.asked.append((path, asked, condition))
        trouble, body = site.behave(path), site.files.get(path)
        if isinstance(trouble, str):
            return self.reply(int(trouble), b"")
        if body is None:
            return self.reply(404, b"")
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        etag, start = "W/" * site.weak + etag, 0
        headers = {"ETag": etag, "Content_Type": "application/zip"}
        if asked and site.ranges and condition in (None, etag):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(body):
                return self.reply(416, b"", Content_Range=f"bytes */{len(body)}")
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.reply(206 if start else 200, body[start:trouble], len(body) - start, **headers)
        if trouble is not None:
            self.close_connection = True

    def reply(self, status: int, body: bytes, length: int = 0, **headers) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def site(monkeypatch):
    server = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("SIGHTSPEED_MIRROR", server.url + "/all/")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "WAIT", 0.0)
    monkeypatch.setattr(data, "BLOCK", 10_000)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: Usage(10**13, 0, 10**13))
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


def path_of(url: str) -> str:
    return "/all/" + url.partition("://")[2]


def cut_once(site: Site, url: str, after: int) -> None:
    """The first answer to url ends after so many bytes of the file."""
    left = [after]
    site.behave = lambda path: left.pop() if path == path_of(url) and left else None


def about(site: Site, url: str) -> list[tuple]:
    return [(span, condition) for path, span, condition in site.asked if path == path_of(url)]


def files_in(folder: Path) -> dict[str, bytes]:
    paths = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def assert_pretrain_complete(root: Path) -> None:
    """Neither zips nor halves are left behind."""
    expected = {f"LLaVA-Pretrain/images/{name}": content for name, content in PRETRAIN.items()}
    expected["LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"] = FILES[PRETRAIN_JSON]
    found = files_in(root)
    found.pop("pretrain.json")
    assert found.pop(".download/LLaVA-Pretrain_images.done") == b""
    assert found == expected


def failure(root: Path, name: str = "llava-pretrain") -> str:
    with pytest.raises(UserError) as error:
        data.download(name, str(root))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_all_of_it_lies_where_the_records_look_for_it(site, tmp_path, capfd):
    assert data.download("llava", str(tmp_path)) == tmp_path
    assert sorted(path for path, _, _ in site.asked) == sorted(site.files)  # each once
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
    data.download("llava-pretrain", str(tmp_path))
    assert_pretrain_complete(tmp_path)
    (tmp_path / "pretrain.json").write_text("[changed by its owner]")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    site.asked.clear()
    data.download("llava-pretrain", str(tmp_path))
    assert site.asked == [] and before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    data.download("llava", str(tmp_path))  # only what is new
    assert {path for path, _, _ in site.asked} == {path_of(url) for url in (SFT_JSON, *SFT_ZIPS)}


@pytest.mark.parametrize("weak", [False, True])
def test_a_cut_connection_goes_on_at_the_byte(weak, site, tmp_path):
    cut_once(site, PRETRAIN_ZIP, 123_456)
    site.weak = weak
    data.download("llava-pretrain", str(tmp_path))
    etag = None if weak else f'"{hashlib.sha1(FILES[PRETRAIN_ZIP]).hexdigest()}"'  # a weak one would never do
    assert about(site, PRETRAIN_ZIP) == [(None, None), ("bytes=123456-", etag)]
    assert_pretrain_complete(tmp_path)


def test_the_next_call_goes_on_where_a_failed_one_stopped(site, tmp_path):
    answers = [150_000, "404"]
    site.behave = lambda path: answers.pop(0) if path == path_of(PRETRAIN_ZIP) and answers else None
    message = failure(tmp_path)
    url = site.url + path_of(PRETRAIN_ZIP)
    assert (
        message.startswith(f"{url} was not fetched") and "404" in message and "repeat the command" in message
    )
    archive = tmp_path / ".download/LLaVA-Pretrain_images.zip"
    assert str(archive) in message and not archive.exists()
    assert Path(f"{archive}.part").read_bytes() == FILES[PRETRAIN_ZIP][:150_000]
    site.asked.clear()
    data.download("llava-pretrain", str(tmp_path))
    assert [(path, span) for path, span, _ in site.asked] == [(path_of(PRETRAIN_ZIP), "bytes=150000-")]
    assert_pretrain_complete(tmp_path)


def test_a_server_without_ranges_starts_anew(site, tmp_path):
    site.ranges = False
    cut_once(site, PRETRAIN_ZIP, 100_000)
    data.download("llava-pretrain", str(tmp_path))
    assert [span for span, _ in about(site, PRETRAIN_ZIP)] == [None, "bytes=100000-"]
    assert_pretrain_complete(tmp_path)


@pytest.mark.parametrize("how", ["If-Range", "206 of another", "206 of elsewhere", "longer than the file"])
def test_two_versions_of_a_file_do_not_mix(how, site, tmp_path, monkeypatch):
    """The first half is of another one: the server says so, or only its ETag does, or there is no rest."""
    part = tmp_path / ".download/LLaVA-Pretrain_images.zip.part"
    part.parent.mkdir()
    part.write_bytes(b"old" * 100_000 if how == "longer than the file" else b"old" * 1000)
    if how != "longer than the file":
        (part.parent / "LLaVA-Pretrain_images.zip.etag").write_text('"old"')
    if how == "206 of another":  # a server that knows Range but not If-Range
        get = Handler.do_GET

        def careless(self):
            del self.headers["If-Range"]
            get(self)

        monkeypatch.setattr(Handler, "do_GET", careless)
    if how == "206 of elsewhere":
        (part.parent / "LLaVA-Pretrain_images.zip.etag").unlink()
        reply, other = Handler.reply, {"Content_Range": f"bytes 9-99/{len(FILES[PRETRAIN_ZIP])}"}
        monkeypatch.setattr(Handler, "reply", lambda self, *a, **kw: reply(self, *a, **({**kw, **other})))
    data.download("llava-pretrain", str(tmp_path))
    assert len(about(site, PRETRAIN_ZIP)) == (1 if how == "If-Range" else 2)
    assert_pretrain_complete(tmp_path)


def test_a_file_that_stays_short_is_never_put_in_place(site, tmp_path, capfd):
    site.behave = lambda path: 70 if path == path_of(PRETRAIN_JSON) else None
    message = failure(tmp_path)
    size = len(FILES[PRETRAIN_JSON])
    assert f"the connection ended after 70 of {size} bytes" in message
    halves = {f"blip_laion_cc_sbu_558k.json.{kind}" for kind in ("part", "etag")}
    assert set(files_in(tmp_path / "LLaVA-Pretrain")) == halves
    assert [span for span, _ in about(site, PRETRAIN_JSON)] == [None] + data.TRIES * ["bytes=70-"]
    assert capfd.readouterr().out.count("trying again") == data.TRIES


@pytest.mark.parametrize("status, attempts", [("404", 1), ("403", 1), ("503", 5), ("429", 5)])
def test_a_refusal_ends_at_once_and_an_overload_is_waited_for(status, attempts, site, tmp_path):
    site.behave = lambda path: status
    message = failure(tmp_path)
    assert site.url + path_of(PRETRAIN_JSON) in message and status in message
    assert len(site.asked) == attempts
    site.behave = lambda path: status if status in ("503", "429") and len(site.asked) % 3 else None
    data.download("llava-pretrain", str(tmp_path))
    assert_pretrain_complete(tmp_path)


def test_no_network_is_one_sentence(site, tmp_path, monkeypatch):
    monkeypatch.setenv("SIGHTSPEED_MIRROR", "http://127.0.0.1:9/all")  # where nothing listens
    message = failure(tmp_path)
    assert message.startswith("http://127.0.0.1:9/all/huggingface.co/datasets/") and "refused" in message


def test_a_page_that_asks_to_log_in_is_no_data(site, tmp_path, monkeypatch):
    reply = Handler.reply
    page = {"Content_Type": "text/html; charset=utf-8"}
    monkeypatch.setattr(Handler, "reply", lambda self, *args, **kw: reply(self, *args, **{**kw, **page}))
    assert "gave a web page, not the file" in failure(tmp_path)
    assert not (tmp_path / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json").exists()


@pytest.mark.parametrize(
    "error, said",
    [(KeyboardInterrupt(), "KeyboardInterrupt"), (OSError(errno.ENOSPC, "disk full"), "disk full")],
)
def test_an_unpacking_that_was_stopped_goes_on_with_the_rest(error, said, site, tmp_path, monkeypatch):
    """As a kill would, it leaves two members, half of the third, and the zip."""
    copy, copied = shutil.copyfileobj, []

    def stop_in_the_third(source, target, length):
        copied.append(target.name)
        if len(copied) == 3:
            target.write(source.read(50_000))
            raise error
        copy(source, target, length)

    monkeypatch.setattr(data.shutil, "copyfileobj", stop_in_the_third)
    assert said in failure(tmp_path)
    images = tmp_path / "LLaVA-Pretrain/images"
    assert sorted(files_in(images)) == ["00000/000000010.jpg", "00000/noise.jpg.tmp", "00453/004539375.jpg"]
    site.asked.clear()
    data.download("llava-pretrain", str(tmp_path))
    assert site.asked == []  # the zip was still there
    assert copied[3:] == [str(images / "00000/noise.jpg.tmp")]  # and the two were left alone
    assert_pretrain_complete(tmp_path)


def test_a_member_of_another_size_is_written_anew(site, tmp_path):
    half = tmp_path / "LLaVA-Pretrain/images/00453/004539375.jpg"
    half.parent.mkdir(parents=True)
    half.write_bytes(RED[:100])
    data.download("llava-pretrain", str(tmp_path))
    assert_pretrain_complete(tmp_path)


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
    data.download("llava-pretrain", str(tmp_path))
    assert_pretrain_complete(tmp_path)


def test_a_zip_that_is_there_already_is_used(site, tmp_path):
    (tmp_path / ".download").mkdir()
    (tmp_path / ".download/LLaVA-Pretrain_images.zip").write_bytes(FILES[PRETRAIN_ZIP])
    data.download("llava-pretrain", str(tmp_path))
    assert about(site, PRETRAIN_ZIP) == []
    assert_pretrain_complete(tmp_path)


def test_too_little_disk_is_said_before_anything_is_fetched(site, tmp_path, monkeypatch):
    free = [0.0]
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: Usage(10**13, 0, int(1e9 * free[0])))
    free[0] = 57.7  # the captions, and twice the pictures with 5% for blocks: 57.73 GB
    message = failure(tmp_path)
    assert "57.7 GB free but llava-pretrain takes 57.7 GB" in message and site.asked == []
    part = tmp_path / ".download/LLaVA-Pretrain_images.zip.part"
    part.parent.mkdir()
    part.write_bytes(b"")
    with open(part, "r+b") as file:
        file.truncate(10**9)  # takes no room: what is fetched already needs not be fetched
    data.check_disk("x", tmp_path, data.DOWNLOADS["llava-pretrain"])
    free[0] = 28.6  # the zip is there, so is the room that it had planned for
    part.rename(part.with_suffix(""))
    data.check_disk("x", tmp_path, data.DOWNLOADS["llava-pretrain"])


def test_where_addresses_lead(monkeypatch):
    monkeypatch.delenv("SIGHTSPEED_MIRROR", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    coco = data.DOWNLOADS["llava-sft"][1].url
    assert data.mirrored(PRETRAIN_ZIP) == PRETRAIN_ZIP and data.mirrored(coco) == coco
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example/")
    assert data.mirrored(PRETRAIN_ZIP) == (
        "https://hub.example/datasets/liuhaotian/LLaVA-Pretrain/resolve/main/images.zip"
    )
    assert data.mirrored(coco) == coco
    monkeypatch.setenv("SIGHTSPEED_MIRROR", "http://m/p")  # before HF_ENDPOINT
    assert data.mirrored(coco) == "http://m/p/s3.amazonaws.com/images.cocodataset.org/zips/train2017.zip"
    assert data.mirrored(SFT_JSON).startswith("http://m/p/huggingface.co/datasets/liuhaotian/")


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    assert failure(tmp_path, "lava") == ("no data set is called 'lava': use llava-pretrain, llava-sft, llava")


def test_a_full_disk_is_not_tried_again(site, tmp_path, monkeypatch):
    def full(path, mode):
        file = open(path, mode)
        file.close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "open", full, raising=False)
    assert "No space left on device" in failure(tmp_path) and len(site.asked) == 1
