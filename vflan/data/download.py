"""Real sets from the Hugging Face hub, into the folders where vflan looks for them.

    vflan download vision_flan_191
    vflan download --list

Files come over plain HTTP straight into their folder, so nothing is stored twice, and a download that was killed goes on where it
stopped: the hub's own client keeps no partial file between two calls.
"""

import difflib
import errno
import hashlib
import os
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants, errors, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers

from vflan.config import output_path, shown
from vflan.io import set_aside
from vflan.progress import progress


@dataclass(frozen=True)
class HubSet:
    """A set that lives on the hub: its repository, the files that vflan reads, and what the hub does not hold of it."""

    repo: str
    folder: str  # relative to the project folder
    files: tuple[str, ...]  # paths in the repository; * stands for anything
    then: str  # what remains to be done
    licence: str  # as far as it could be found out; data/README.md says more


SETS = {
    "vision_flan_191": HubSet(
        "Vision-Flan/vision-flan_191-task_1k",
        "data/vision_flan",
        ("annotation_191-task_1k.json", "image_191-task_1k.zip"),
        "complete: the zip can stay packed",
        "none of its own: for research, each source keeps its terms",
    ),
    "vision_flan": HubSet(
        "Vision-Flan/vision-flan",
        "data/vision_flan",
        ("vision_flan.json", "shard_*.zip", "*.sh"),
        "unpack the shards: sh run.sh in that folder",
        "none of its own: for research, each source keeps its terms",
    ),
    "llava_pretrain": HubSet(
        "liuhaotian/LLaVA-Pretrain",
        "data/llava_pretrain",
        ("blip_laion_cc_sbu_558k.json", "images.zip"),
        "complete: the zip can stay packed",
        "other: those of LAION, CC and SBU",
    ),
    "llava_instruct": HubSet(
        "liuhaotian/LLaVA-Instruct-150K",
        "data/llava_instruct",
        ("llava_instruct_150k.json",),
        "the pictures are COCO train2017, from cocodataset.org, into train2017/",
        "CC BY 4.0, and the terms of GPT-4's maker; pictures: COCO's",
    ),
    "llava_1_5": HubSet(
        "liuhaotian/LLaVA-Instruct-150K",
        "data/llava_1_5",
        ("llava_v1_5_mix665k.json",),
        "the pictures are those of COCO, GQA, OCR-VQA, TextVQA and Visual Genome, from their sites",
        "CC BY 4.0, the terms of GPT-4's maker, and each source's",
    ),
}


def fetch(name: str, folder: str | os.PathLike | None = None) -> Path:
    """Download a set (a key of SETS) into its folder under data/, or into `folder`, and return the folder.

    Every file's size and checksum are compared with what the hub states, also of files that are there already: a second call checks
    them all and fetches only what is missing or damaged. Interrupted or killed, the next call goes on where this one stopped. A
    mirror is named by HF_ENDPOINT. ValueError, FileNotFoundError, PermissionError, ConnectionError and OSError say what to do.
    """
    if name not in SETS:
        near = difflib.get_close_matches(name, SETS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"There is no set {name!r}; the closest is {near!r}, and all are {', '.join(SETS)}."
        )
    wanted = SETS[name]
    folder = output_path(folder or wanted.folder)
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    api = HfApi(endpoint=endpoint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".fetch.lock", timeout=0):
            commit, files = _listing(api, wanted)
            missing = [file for file in files if not _is_whole(folder / file.path, file)]
            _check_space(name, folder, missing)
            for file in missing:
                url = hf_hub_url(
                    wanted.repo, file.path, repo_type="dataset", revision=commit, endpoint=endpoint
                )
                _download(url, file, folder / file.path)
    except Timeout:
        raise OSError(
            f"{shown(folder)}: another fetch is at work there; wait for it to end."
        ) from None
    except errors.GatedRepoError:
        page = f"{endpoint}/datasets/{wanted.repo}"
        raise PermissionError(
            f"{wanted.repo} asks you to accept its terms first: do so at {page}, run `hf auth login`, and fetch again."
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{endpoint} has no dataset {wanted.repo} any more, or hides it; data/README.md says what else is known of {name}."
        ) from None
    except (
        errors.OfflineModeIsEnabled,
        errors.HTTPError,
    ) as trouble:  # HTTPError: all that goes wrong on the way
        reason = str(trouble).strip().split("\n")[0]
        raise ConnectionError(
            f"{endpoint} cannot be reached, or broke off ({reason}). What has come so far is kept: "
            "check the network (or name a mirror in HF_ENDPOINT) and fetch again."
        ) from None
    except OSError as trouble:
        if trouble.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"The disk of {shown(folder)} is full. What has come so far is kept: make room and fetch again."
        ) from None
    return folder


def _listing(api: HfApi, wanted: HubSet) -> tuple[str, list[RepoFile]]:
    """The commit that is fetched, so that a change on the hub cannot mix two versions, and its files that are wanted."""
    commit = api.dataset_info(wanted.repo).sha
    tree = api.list_repo_tree(wanted.repo, repo_type="dataset", revision=commit, recursive=True)
    tree = [file for file in tree if isinstance(file, RepoFile)]
    for pattern in wanted.files:
        if not any(fnmatch(file.path, pattern) for file in tree):
            raise FileNotFoundError(
                f"{wanted.repo} holds no {pattern} any more; look at {api.endpoint}/datasets/{wanted.repo}/tree/main."
            )
    return commit, [
        file for file in tree if any(fnmatch(file.path, pattern) for pattern in wanted.files)
    ]


def _download(url: str, file: RepoFile, target: Path) -> None:
    """One file, whole and verified, or not at all; what came before an interruption is continued."""
    part = _part(file, target)
    part.parent.mkdir(parents=True, exist_ok=True)
    headers = build_hf_headers() | {
        "Accept-Encoding": "identity"
    }  # sizes and ranges are those of the file itself
    while True:
        with open(part, "ab") as out:
            start = out.tell()
            if start < file.size:
                http_get(
                    url,
                    out,
                    resume_size=start,
                    headers=headers,
                    displayed_filename=file.path,
                    tqdm_class=_bar,
                )
        if part.stat().st_size < file.size:
            raise ConnectionError(
                f"{file.path} broke off. What has come so far is kept: fetch again."
            )
        if _is_whole(part, file):
            if os.path.lexists(
                target
            ):  # damaged, of another version, or somebody's own: it is not for us to delete
                set_aside(target)
            part.replace(target)
            return
        part.unlink()
        if (
            not start
        ):  # else what was there may have been the damaged half: once more, from the beginning
            raise OSError(
                f"{file.path} arrived damaged: its checksum is not the one that the hub states. Fetch again later."
            )


def _part(file: RepoFile, target: Path) -> Path:
    """Where a download grows: named after the content, so that another version never continues it."""
    return target.with_name(f".{target.name}.{_checksum(file)[:12]}.part")


def _checksum(file: RepoFile) -> str:
    return file.lfs.sha256 if file.lfs else file.blob_id


def _is_whole(path: Path, file: RepoFile) -> bool:
    """Whether the file at `path` is the hub's: its size, then SHA-256 (large files) or git's SHA-1 (small ones)."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(f"blob {file.size}\0".encode())
    with open(path, "rb") as content, progress(f"checking {file.path}", file.size, "B") as bar:
        while block := content.read(2**20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest() == _checksum(file)


def _check_space(name: str, folder: Path, missing: list[RepoFile]) -> None:
    parts = [_part(file, folder / file.path) for file in missing]
    here = sum(
        min(part.stat().st_size, file.size) for part, file in zip(parts, missing) if part.exists()
    )
    needed, free = sum(file.size for file in missing) - here, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{name} needs {needed / 1e9:.1f} GB more in {shown(folder)}, where {free / 1e9:.1f} GB are free: make room, "
            "or give another folder."
        )


def _bar(desc: str, total: int | None, initial: int = 0, **_):
    """What the hub's download takes for a class of bars."""
    return progress(f"fetching {desc}", total or 0, "B", initial)
