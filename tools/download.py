"""Downloads: a repository of the Hugging Face hub, or the training data of LLaVA-1.5.

    python tools/download.py OWNER/NAME[@REVISION] [--to DIR]     into weights/OWNER/NAME if DIR is not given
    python tools/download.py llava|llava-pretrain|llava-sft --to DIR

Of a repository come the files that loading reads: configs, tokenizer, and weights in one format. Training and
evaluation find it again by the name OWNER/NAME if it lies in weights/. Set HF_TOKEN for gated repositories.

Of LLaVA's data (101 GB; both stages, or one of them) come pictures, records, and what --data takes:
DIR/pretrain.json and DIR/sft.json. A zip is deleted after unpacking, and DIR/.download/*.done says so:
without that file it is fetched anew. A zip that you already have can be put under the name in the list that
is printed first. With SIGHTSPEED_MIRROR=http://host/prefix, the file https://site/x.zip comes from
http://host/prefix/site/x.zip.

Repeat a command that was interrupted: it goes on where it stopped.
"""

import errno
import http.client
import os
import re
import shutil
import sys
import time
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
from model import UserError, read_json, write_json

# ---------------------------------------------------------------------------------------------------------
# Repositories of the hub, by its own client. source.json tells `model.find_half` that a folder is complete.

SMALL_FILES = r"(|preprocessor_|processor_|tokenizer_)config\.json|(tokenizer|vocab|added_tokens)\.json|"
SMALL_FILES += r"special_tokens_map\.json|merges\.txt|[^/]+\.tiktoken|(original/)?tokenizer\.model"
WEIGHTS = (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin")  # one of these
NOTES = Path(".cache/huggingface/download")  # what the client writes down in the folder that it fills
REASONS = {  # errors of the client, by the name of their class
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "GatedRepoError": "it is gated: accept its licence on its page, then set HF_TOKEN",
    "RevisionNotFoundError": "it has no such revision",
    "RepositoryNotFoundError": "no such repository: check the name, or set HF_TOKEN if it is not public",
}


def choose_files(names: list[str]) -> list[str]:
    """What loading reads of a repository; nothing if it has no weights."""
    for weights in WEIGHTS:
        if any(re.fullmatch(weights, name) for name in names):
            return [n for n in names if re.fullmatch(rf"{SMALL_FILES}|{weights}(\.index\.json)?", n)]
    return []


def download_repo(repo: str, to: str = "") -> Path:
    """The files of a repository in folder `to`. A repeated call fetches only those that are not complete."""
    match = re.fullmatch(model.REPO, repo)
    if not match:
        raise UserError(f"'{repo}' is no repository: write owner/name, owner/name@revision or a local folder")
    name, revision = match[1], match[2] or "main"
    folder = Path(to or f"weights/{name}")
    from huggingface_hub import errors  # slow to import, and it reads its settings then

    try:
        sizes, source = fetch_repo(name, revision, folder)
    except (OSError, ValueError, RuntimeError, errors.HTTPError) as error:
        local = "a local folder in Hugging Face layout works too"
        raise UserError(f"{repo} was not downloaded ({reason_of(error)}); {local}") from error
    for file, size in sizes.items():  # the client is content with what is there if the hub fails half-way
        if not (folder / file).is_file() or (folder / file).stat().st_size != size:
            raise UserError(f"{folder / file} is not complete: repeat the download of {repo}")
    for note in (folder / NOTES).rglob("*.incomplete"):  # ours, and those of killed processes
        note.unlink()
    write_json(folder / "source.json", source)
    return folder


def fetch_repo(name: str, revision: str, folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes of the fetched files in bytes, and the content of source.json."""
    from huggingface_hub import HfApi, constants, snapshot_download

    wait = constants.HF_HUB_ETAG_TIMEOUT  # without it this call could wait for ever
    info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=wait)
    sizes = {file.rfilename: file.size for file in info.siblings}
    files = choose_files(list(sizes))
    if not files:
        raise UserError(f"{name} has neither model.safetensors nor pytorch_model.bin: choose another")
    begun = folder / NOTES / "source.json.incomplete"
    for note in (begun, folder / "source.json"):  # files of two commits must not mix
        if note.is_file() and read_json(note).get("commit") != info.sha:
            raise UserError(f"{folder} holds another download ({note}): delete the folder or change --to")
    source = {"repo": name, "revision": revision, "commit": info.sha}
    write_json(begun, source)
    # One file at a time: the client starts an interrupted file anew, so a break costs one file at most.
    snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=files, max_workers=1)
    return {file: sizes[file] for file in files}, source


def reason_of(error: Exception) -> str:
    """Why the client failed, in a few words."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # "not in the cache either": its cause says why
        error = error.__cause__ or error
    for kind in type(error).__mro__:
        if kind.__name__ in REASONS:
            return REASONS[kind.__name__]
    return f"{constants.ENDPOINT}: {type(error).__name__}: {' '.join(str(error).split())}"


# ---------------------------------------------------------------------------------------------------------
# Training data of LLaVA-1.5

HUB = "https://huggingface.co"  # or HF_ENDPOINT
MAX_FAILED_TRIES = 5  # in a row that brought nothing new
FIRST_WAIT_S = 1.0  # before the next try; doubles
TIMEOUT_S = 60
BLOCK_BYTES = 2**20


class Part(NamedTuple):
    url: str
    to: str  # below DIR: the file, or the folder of what the zip holds
    kept_names: int  # number of trailing path components kept when unpacking; 0 if the file is not a zip
    gb: float  # size for the list alone
    note: str

    def file(self, root: Path) -> Path:
        is_zip = self.kept_names > 0
        return root / ".download" / f"{self.to.replace('/', '_')}.zip" if is_zip else root / self.to

    def finished(self, root: Path) -> Path:
        return self.file(root).with_suffix(".done") if self.kept_names else self.file(root)


# As LLaVA's README says, except: COCO's host has no certificate for its own name, but S3's path to the same
# files has; OCR-VQA's links are dead, this copy has the covers, all named .jpg as in the records (some were
# GIFs; Pillow looks at the bytes). Not verified: that the copy is complete, that Stanford's servers know
# ranges, the terms of GQA's and OCR-VQA's pictures.
DATA_SETS = {
    "llava-pretrain": [
        Part(f"{HUB}/datasets/liuhaotian/LLaVA-Pretrain/resolve/main/blip_laion_cc_sbu_558k.json",
             "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", 0, 0.181, "558,128 captions; licence: other"),
        Part(f"{HUB}/datasets/liuhaotian/LLaVA-Pretrain/resolve/main/images.zip",
             "LLaVA-Pretrain/images", 2, 27.4, "for research, under the terms of LAION, CC3M and SBU"),
    ],
    "llava-sft": [
        Part(f"{HUB}/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json",
             "llava_v1_5_mix665k.json", 0, 1.03, "665,298 conversations; CC BY 4.0"),
        Part("https://s3.amazonaws.com/images.cocodataset.org/zips/train2017.zip",
             "coco/train2017", 1, 19.337, "118,287 pictures; Flickr's terms"),
        Part("https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
             "gqa/images", 1, 21.8, "148,854 pictures of Visual Genome and COCO"),
        Part(f"{HUB}/datasets/weizhiwang/llava_v15_instruction_images/resolve/main/"
             "ocr_vqa_images_llava_v15.zip", "ocr_vqa/images", 1, 8.972, "207,572 book covers"),
        Part("https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
             "textvqa/train_images", 1, 7.072, "25,119 pictures of Open Images; CC BY 4.0"),
        Part("https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
             "vg/VG_100K", 1, 9.732, "64,346 pictures; CC BY 4.0"),
        Part("https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
             "vg/VG_100K_2", 1, 5.472, "43,903 pictures; CC BY 4.0"),
    ],
}  # fmt: skip
DATA_SETS["llava"] = DATA_SETS["llava-pretrain"] + DATA_SETS["llava-sft"]
MIXTURES = {  # file for --data: kind, path and images of its one source
    "pretrain.json": ("caption", "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "images"),
    "sft.json": ("chat", "llava_v1_5_mix665k.json", ""),
}


def download_data(name: str, to: str) -> Path:
    """A data set complete below folder `to`. Repeated, it does not ask for what is finished."""
    root, parts = Path(to), DATA_SETS[name]
    root.mkdir(parents=True, exist_ok=True)
    list_parts(name, root, [part for part in parts if not part.finished(root).exists()])
    for part in parts:
        get_part(part, root)
    for mixture, (kind, path, images) in MIXTURES.items():
        if path in [part.to for part in parts] and not (root / mixture).exists():
            write_json(root / mixture, [{"kind": kind, "path": path, "images": images}])
    return root


def list_parts(name: str, root: Path, missing: list[Part]) -> None:
    """Prints what will be fetched. A zip takes its room twice while it is unpacked."""
    to_fetch, room, free = 0.0, 0.0, shutil.disk_usage(root).free / 1e9
    for part in missing:
        file = part.file(root)
        print(f"{part.gb:6.2f} GB  {mirrored(part.url)}\n{'':11}{part.note}; {file}")
        if not file.exists():  # a zip that exists is partly unpacked already, nobody knows how far
            to_fetch += max(0.0, part.gb - size_of(Path(f"{file}.part")) / 1e9)
            unpacked = part.gb if part.kept_names else 0.0
            room = max(room, 1.05 * (to_fetch + unpacked))  # 5% for half-filled blocks
    print(f"{name}: {to_fetch:.1f} GB to fetch, at most {room:.1f} GB of disk, {free:.1f} GB are free")
    if room > free:
        raise UserError(f"{root} has {free:.1f} GB free but {name} takes {room:.1f} GB: choose another --to")


def get_part(part: Part, root: Path) -> None:
    """Fetches and unpacks what is not finished."""
    url, file, finished = mirrored(part.url), part.file(root), part.finished(root)
    broken_zip = (zipfile.BadZipFile, zlib.error, EOFError)
    try:
        if not finished.exists():
            fetch(url, file)
        if part.kept_names and not finished.exists():
            unpack(file, root / part.to, part.kept_names)
            finished.touch()
        if part.kept_names:  # the zip may be left of a call that was killed right here
            file.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException, KeyboardInterrupt, *broken_zip) as error:
        if isinstance(error, broken_zip):
            file.unlink()
        again = f"repeat the command and it goes on, or put that file at {file} yourself"
        raise UserError(f"{url} was not fetched and unpacked ({error!r}): {again}") from error


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def mirrored(url: str) -> str:
    if mirror := os.environ.get("SIGHTSPEED_MIRROR"):
        return f"{mirror.rstrip('/')}/{url.partition('://')[2]}"
    return url.replace(HUB, os.environ.get("HF_ENDPOINT", HUB).rstrip("/"))


def fetch(url: str, file: Path) -> None:
    """url to file if it does not exist, until MAX_FAILED_TRIES attempts in a row brought nothing new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part, largest, failed = Path(f"{file}.part"), 0, 0
    while not file.exists():
        try:
            fetch_remainder(url, file, part)
        except (OSError, http.client.HTTPException) as error:
            status = getattr(error, "code", 500)
            disk_full = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)
            refused = status < 500 and status not in (408, 416, 429)
            if status == 416:  # the file ends before what `part` has: that is of another file
                part.unlink()
            failed = 0 if size_of(part) > largest else failed + 1
            largest = max(largest, size_of(part))
            if disk_full or refused or failed == MAX_FAILED_TRIES:
                raise
            print(f"{url}: {error}; trying again")
            time.sleep(FIRST_WAIT_S * 2**failed)


def fetch_remainder(url: str, file: Path, part: Path) -> None:
    """One connection that appends to `part`. Its ETag is kept beside it, so that two versions never mix."""
    start, note = size_of(part), Path(f"{file}.etag")
    etag = note.read_text() if start and note.exists() else ""
    headers = {"User-Agent": "sightspeed", "Range": f"bytes={start}-", "If-Range": etag}
    if not start:
        del headers["Range"]
    if not etag:
        del headers["If-Range"]
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        if response.headers.get_content_type() == "text/html":
            raise UserError(f"{url} gave a web page, not the file: does the network ask to log in?")
        goes_on, new_etag = response.status == 206, response.headers.get("ETag", "")
        size = int(response.headers.get("Content-Length", 0))
        if goes_on:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not span or int(span[1]) != start or etag not in ("", new_etag):
                part.unlink()
                raise ConnectionError("it is not the file that was begun")
            size = int(span[2])
        note.write_text("" if new_etag.startswith("W/") else new_etag)  # If-Range does not take weak ones
        done = start if goes_on else 0
        bar = tqdm(total=size or None, initial=done, unit="B", unit_scale=True, desc=file.name)
        with open(part, "ab" if goes_on else "wb") as target, bar:
            while block := response.read(BLOCK_BYTES):
                target.write(block)
                bar.update(len(block))
    if size and size_of(part) != size:
        raise ConnectionError(f"the connection ended after {size_of(part)} of {size} bytes")
    os.replace(part, file)
    note.unlink()


def unpack(archive: Path, folder: Path, kept_names: int) -> None:
    """The files of a zip below `folder`; existing ones of the right size stay. Reading checks their CRC."""
    with zipfile.ZipFile(archive) as packed:
        members = [member for member in packed.infolist() if not member.is_dir()]
        for member in members:
            if {"", ".."} & {*member.filename.split("/")}:
                outside = f"would write outside of {folder}: {member.filename}"
                raise UserError(f"{archive} {outside}; nothing is unpacked")
        total = sum(member.file_size for member in members)
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"unpack {archive.name}") as bar:
            for member in members:
                path = folder.joinpath(*member.filename.split("/")[-kept_names:])
                if not path.exists() or size_of(path) != member.file_size:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with packed.open(member) as source, open(f"{path}.tmp", "wb") as target:
                        shutil.copyfileobj(source, target, BLOCK_BYTES)
                    os.replace(f"{path}.tmp", path)
                bar.update(member.file_size)


@dataclass
class DownloadConfig:
    to: str = ""  # folder to fill; of a repository weights/OWNER/NAME if not given


def main(argv: list[str]) -> None:
    named = bool(argv) and not argv[0].startswith("-")
    cfg = DownloadConfig()
    model.parse_cli(argv[1:] if named else argv, __doc__, cfg)
    if not named:
        raise UserError(f"what to download? Give owner/name or one of {', '.join(DATA_SETS)}")
    name = argv[0]
    if name in DATA_SETS and not cfg.to:
        raise UserError(f"{name} needs --to: the folder of the data")
    if name not in DATA_SETS and "/" not in name:
        raise UserError(f"'{name}' is neither a repository (owner/name) nor one of {', '.join(DATA_SETS)}")
    folder = download_data(name, cfg.to) if name in DATA_SETS else download_repo(name, cfg.to)
    print(f"in {folder}")


if __name__ == "__main__":
    model.run_cli(main)
