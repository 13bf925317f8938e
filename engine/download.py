"""Finds the model that a user names: a directory, the demo, or an id on the Hugging Face hub."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixbit.engine.demo import ensure_demo
from mixbit.engine.errors import UserError
from mixbit.engine.shipped import shipped_model

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

Progress = Callable[[str, int, int], None]

# All that a model needs, at the top of its repository: weights, settings, tokenizer. No pickles, no code.
_NEEDED = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
_NOT_NEEDED = ("*/*", "*.py", "*.bin", "*.pkl", "*.pt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_POLL_SECONDS = 0.25


class DownloadError(UserError):
    """The model that was named cannot be had; the message says why and what to do."""


def resolve_model(
    reference: str, *, revision: str | None = None, progress: Progress | None = None, refresh: bool = False
) -> Path:
    """The directory of a model: "demo", a directory, the name of a model that came with Mixbit, or a hub id
    `org/name`, downloaded if it is not cached.

    revision: branch, tag or commit of a hub id. refresh: ask the hub for newer files even if the model is
    cached; without it a cached model needs no network. A broken transfer is resumed; complete files are kept.
    progress(stage, done, total) counts bytes. Raises DownloadError, or DemoError for the demo.
    """
    report: Progress = progress or (lambda stage, done, total: None)
    if not reference.strip():
        raise DownloadError("the name of the model is empty; give a directory, a hub id ORG/NAME or demo")
    path = Path(reference).expanduser()
    if reference == "demo" or path.is_dir():
        if revision is not None:
            raise DownloadError(f"--revision {revision} is for models of the hub; {reference!r} is not one")
        return ensure_demo(report) if reference == "demo" else path
    if (shipped := shipped_model(reference)) is not None and revision is None:
        return shipped
    if path.is_file():
        hint = f"convert it first: mixbit convert {reference} OUT/" if path.suffix == ".gguf" else "give its directory"
        raise DownloadError(f"{reference}: a file, not a model directory; {hint}")
    if reference.startswith(("/", "./", "../", "~")) or reference.count("/") > 1:
        raise DownloadError(f"{reference}: no such directory")
    if not _HUB_ID.fullmatch(reference):
        raise DownloadError(
            f"{reference}: no such directory, and not a hub id; those are ORG/NAME, "
            "for example mlx-community/Qwen3-0.6B-4bit"
        )
    hub = _Hub(reference, revision)
    cached = None if refresh else hub.cached()
    return cached or hub.download(report)


@dataclass(frozen=True)
class _Hub:
    """One repository of the hub."""

    name: str
    revision: str | None

    @property
    def options(self) -> dict[str, Any]:
        return {"revision": self.revision, "allow_patterns": list(_NEEDED), "ignore_patterns": list(_NOT_NEEDED)}

    def cached(self) -> Path | None:
        """The model in the local cache if it is complete there."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            path = Path(snapshot_download(self.name, local_files_only=True, **self.options))
        except LocalEntryNotFoundError:
            return None
        return path if _is_complete(path) else None

    def download(self, progress: Progress) -> Path:
        """Fetch what is missing."""
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
        progress("asking the hub", 0, 1)
        endpoint = os.environ.get("HF_ENDPOINT") or None
        with self._explained():
            info = HfApi(endpoint=endpoint).model_info(self.name, revision=self.revision, files_metadata=True)
            sizes = self._sizes(info)
            with _watched(self._blobs(), sizes, progress):
                path = Path(snapshot_download(self.name, endpoint=endpoint, **self.options))
        if not _is_complete(path):
            raise DownloadError(f"{self.name}: the download ended, but files are missing in {path}; run it again")
        return path

    def _sizes(self, info: ModelInfo) -> dict[str, int]:
        """Bytes of each needed file, by the name of its blob.

        Raises DownloadError if these are not the files of a model, or the disk is too small for them.
        """
        needed = [file for file in info.siblings or [] if _is_needed(file.rfilename)]
        names = [file.rfilename for file in info.siblings or []]
        if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
            found = ", ".join(sorted(names)[:6]) or "nothing"
            raise DownloadError(f"{self.name}: not a model in safetensors format (it has: {found})")
        sizes = {(file.lfs.sha256 if file.lfs else file.blob_id) or "": file.size or 0 for file in needed}
        missing = sum(sizes.values()) - sum(_stored(self._blobs(), sizes).values())
        directory = self._blobs()
        while not directory.exists():
            directory = directory.parent
        free = shutil.disk_usage(directory).free
        if missing > free:
            raise DownloadError(
                f"{self.name}: {missing / 1e9:.1f} GB are to be downloaded, but {directory} has {free / 1e9:.1f} GB "
                "free; free some space, or set HF_HOME to a larger disk"
            )
        return sizes

    def _blobs(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{self.name.replace('/', '--')}" / "blobs"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the hub client's errors into messages that say what to do."""
        from huggingface_hub import constants
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        name, site = self.name, os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        try:
            yield
        except UserError:
            raise
        except GatedRepoError:
            raise DownloadError(
                f"{name}: access is restricted; accept the terms at {site}/{name}, then log in with "
                "`hf auth login` or set HF_TOKEN"
            ) from None
        except RevisionNotFoundError:
            raise DownloadError(f"{name}: has no revision {self.revision!r}; see {site}/{name}/tree/main") from None
        except RepositoryNotFoundError:
            raise DownloadError(
                f"{name}: no such directory, and no such model at {site}; if it is private, log in with "
                "`hf auth login` or set HF_TOKEN"
            ) from None
        except HfHubHTTPError as error:
            if isinstance(error, LocalEntryNotFoundError) or error.response is None:
                raise self._unreachable(site, error) from None
            raise DownloadError(f"{name}: {site} answers with HTTP status {error.response.status_code}") from None
        # The client's HTTP library differs by version, and so do its errors of connection.
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None and error.filename:
                raise DownloadError(f"{name}: {error.filename}: {error.strerror}") from None
            raise self._unreachable(site, error) from error

    def _unreachable(self, site: str, error: Exception) -> DownloadError:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return DownloadError(
            f"{self.name}: not (wholly) in the local cache, and {site} cannot be reached ({cause}). Check the "
            "connection and run it again: files that are complete are kept"
        )


def _is_needed(name: str) -> bool:
    return any(fnmatchcase(name, p) for p in _NEEDED) and not any(fnmatchcase(name, p) for p in _NOT_NEEDED)


def _is_complete(path: Path) -> bool:
    """Whether a config, a tokenizer and every shard of the weights are there."""
    from mixbit.engine.checkpoint import open_checkpoint
    from mixbit.engine.errors import CheckpointError

    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return False
    try:
        open_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _stored(blobs: Path, sizes: dict[str, int]) -> dict[str, int]:
    """Bytes that are on disk already, finished or not, by the name of the blob."""
    found = dict.fromkeys(sizes, 0)
    try:
        entries = list(os.scandir(blobs))
    except FileNotFoundError:
        return found
    for entry in entries:
        name = entry.name.split(".")[0]
        if name in found:
            try:
                found[name] = min(max(found[name], entry.stat().st_size), sizes[name])
            except FileNotFoundError:  # renamed meanwhile: the next look finds it
                continue
    return found


@contextmanager
def _watched(blobs: Path, sizes: dict[str, int], progress: Progress) -> Iterator[None]:
    """Report the bytes on disk until the block ends."""
    total, ended = sum(sizes.values()), threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            progress("downloading", sum(_stored(blobs, sizes).values()), total)

    progress("downloading", sum(_stored(blobs, sizes).values()), total)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    progress("downloading", total, total)
