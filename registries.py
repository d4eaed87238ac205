"""Downloading a package file through the client that the user has set up (pip, npm), or a hub snapshot.

No address of a registry stands here: mirrors, proxies and credentials are those of the user's own configuration.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import BadInput, EdgestillError, MissingDependency

__all__ = ["download_npm", "download_pypi", "download_pypi_source", "download_snapshot"]

_RETRIES = "3"
_NETWORK = re.compile(
    r"ECONN|ENOTFOUND|ETIMEDOUT|EAI_AGAIN|NewConnectionError|ConnectTimeout|connection broken|Max retries|"
    r"Failed to establish|name resolution|ProxyError|Network is unreachable|Cannot connect|timed out|SSLError",
    re.IGNORECASE,
)
_ABSENT = re.compile(r"No matching distribution|E404|ETARGET|notarget|Could not find a version", re.IGNORECASE)
# Weights that can run code when they are loaded, and formats that edgestill does not read.
_NEVER = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.py", "*.npy")
_MODEL_FILES = ("*.json", "*.txt", "*.safetensors", "*.model", "*.jinja", "README.md", "LICENSE*")


def download_pypi(name: str, version: str, folder: Path, *, target: Sequence[str] = ()) -> Path:
    """``name==version`` as a wheel in ``folder``, without what it requires.

    ``target``: options of pip that name another platform than this one (``--platform …``).
    """
    what = f"{name}=={version}"
    _pip_download(f"pypi:{what}", folder, "--only-binary=:all:", *target, what)
    return _only(folder, "*.whl", what)


def download_pypi_source(name: str, version: str, sha256: str, folder: Path) -> Path:
    """The source package of ``name==version`` as a .tar.gz in ``folder``.

    pip runs the package's build script to learn its metadata; it compares ``sha256`` before it does.
    """
    what = f"{name}=={version}"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{what} --hash=sha256:{sha256}\n", encoding="utf-8")
    _pip_download(f"the source of {what}", folder, f"--no-binary={name}", "--requirement", str(requirements))
    return _only(folder, "*.tar.gz", what)


def _pip_download(what: str, folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet",
               "--disable-pip-version-check", "--retries", _RETRIES, "--dest", str(folder), *arguments]  # fmt: skip
    result = _run(command, folder)
    if result.returncode != 0:
        if "No module named pip" in result.stderr:
            raise MissingDependency("pip is not installed", hint=f"{sys.executable} -m ensurepip")
        if "DO NOT MATCH THE HASHES" in result.stderr:
            raise BadInput(
                f"{what}: the package does not have the pinned sha256", hint="check the mirror that pip is set up with"
            )
        raise _failed(what, result.stderr, "pip download")


def download_npm(name: str, version: str, folder: Path) -> Path:
    """``name@version`` as a .tgz in ``folder``; no script of the package is run."""
    npm = shutil.which("npm")
    what = f"{name}@{version}"
    if npm is None:
        raise MissingDependency(f"npm is not installed (needed for npm:{what})", hint="install Node.js: nodejs.org")
    command = [npm, "pack", what, "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier",
               "--loglevel=error", f"--fetch-retries={_RETRIES}", f"--pack-destination={folder}"]  # fmt: skip
    result = _run(command, folder)
    if result.returncode != 0:
        raise _failed(f"npm:{what}", result.stderr, "npm pack")
    return _only(folder, "*.tgz", what)


def download_snapshot(name: str, commit: str, path: str, folder: Path) -> None:
    """The files of a hub repository at ``commit`` (below ``path``) into ``folder``, pickles and code left out."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    except ModuleNotFoundError:
        raise MissingDependency.package("huggingface_hub", "distill") from None
    wanted = [path, f"{path}/*"] if path else [*_MODEL_FILES, *(f"*/{pattern}" for pattern in _MODEL_FILES)]
    address = f"hf:{name}@{commit}"
    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        snapshot_download(name, revision=commit, local_dir=folder, allow_patterns=wanted, ignore_patterns=list(_NEVER))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise BadInput(f"{address}: the hub has no such repository or commit", hint="check name and commit") from None
    except Exception as error:  # whatever the hub's client raises (httpx, requests, offline mode) means: not reached
        raise EdgestillError(
            f"{address}: no model hub can be reached ({type(error).__name__})",
            hint="set HF_ENDPOINT to a mirror, or copy the folder here and use file:",
        ) from error
    finally:
        if not quiet:
            enable_progress_bars()


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a client to its end; an interrupt ends it too, and what it left lies in ``folder``, which is temporary."""
    environment = {**os.environ, "PIP_PROGRESS_BAR": "off", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )


def _failed(address: str, stderr: str, client: str) -> EdgestillError:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = next((line for line in lines if "ERROR" in line or "ERR!" in line or "error" in line), (lines or [""])[-1])
    last = re.sub(r"https?://\S+", "the registry", last)[:200]
    if _NETWORK.search(stderr):
        return EdgestillError(
            f"{address}: the registry can't be reached ({client})",
            hint="check network, proxy and mirror settings, then run the same command again",
        )
    if _ABSENT.search(stderr):
        return BadInput(
            f"{address}: the registry has no such version", hint="check name and version (a wheel is needed)"
        )
    return EdgestillError(f"{address}: {client} failed: {last}", hint=f"run `{client}` by hand to see more")


def _only(folder: Path, pattern: str, what: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise BadInput(f"{what}: expected one {pattern[1:]} file, got {len(found)}", hint="check the package")
    return found[0]
