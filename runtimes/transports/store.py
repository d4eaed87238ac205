"""Files on a device by their content: only what is missing is sent, and used when its sha256 was seen there.

Below one folder of the device::

    blobs/SHA256          a file's content; SHA256.part while it is being sent, which the next attempt goes on with
    trees/ID/…            the files of one artifact under their own names; ID hashes names and contents
    exchange/…            tensors of running workers

A file that is complete is renamed into place, so that a link that breaks, a full disk or a switched-off board leaves
nothing that looks whole and isn't.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...errors import BadInput, ResourceExhausted
from ...files import hash_file, hash_json
from .shell import RemoteShell, quote

__all__ = ["DeviceStore", "LocalFile"]

_ROOM_BYTES = 4 << 20  # what must stay free beside what is sent: the tensors of a run
_BATCH = 16  # files a command: a phone's command line has 4,096 characters on old systems
_SUM = "sum() { { sha256sum || shasum -a 256; } 2>/dev/null | cut -c1-64; }\n"


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine with its content's sha256 and size, as they were found when it was looked at."""

    path: Path
    sha256: str
    size_bytes: int

    @classmethod
    def of(cls, path: Path) -> LocalFile:
        """Hash ``path``."""
        return cls(path, hash_file(path), path.stat().st_size)


class DeviceStore:
    """The store in the device's folder ``root`` (absolute, as the device says it)."""

    def __init__(self, shell: RemoteShell, root: str) -> None:
        self._shell = shell
        self.root = root
        self.sent_bytes = 0
        self._there: dict[str, str] = {}

    def blob(self, file: LocalFile, *, executable: bool = False) -> str:
        """The path on the device of one file that stands alone (the worker, the runner); sent if it is missing."""
        path = f"{self.root}/blobs/{file.sha256}"
        if path not in self._there:
            self._shell.steady(lambda: self._supply([(path, file)]))
            if executable:
                script = f"chmod 755 {quote(path)}"
                self._shell.steady(lambda: self._shell.check(script, "making the runner executable"))
            self._there[path] = path
        return path

    def tree(self, files: Mapping[str, LocalFile]) -> str:
        """A folder on the device with just these files, by their relative POSIX paths; what is missing is sent."""
        identity = hash_json(sorted([path, file.sha256] for path, file in files.items()))
        folder = f"{self.root}/trees/{identity}"
        if folder not in self._there:
            wanted = [(f"{folder}/{path}", file) for path, file in sorted(files.items())]
            self._shell.steady(lambda: self._supply(wanted))
            self._there[folder] = folder
        return folder

    def forget(self) -> None:
        """Look again at what is there before it is used: the link broke, and the board may have been switched off."""
        self._there.clear()

    def _supply(self, wanted: Sequence[tuple[str, LocalFile]]) -> None:
        """Make each path hold its file. Safe to begin again at any point."""
        missing = [pair for start in range(0, len(wanted), _BATCH) for pair in self._missing(wanted[start:][:_BATCH])]
        contents = {file.sha256: (file, offset) for _, file, offset in missing}
        self._check_room(sum(file.size_bytes - max(offset, 0) for file, offset in contents.values()))
        for file, offset in contents.values():
            self._send(file, offset)
        self._place([(path, file) for path, file, _ in missing])

    def _missing(self, wanted: Sequence[tuple[str, LocalFile]]) -> list[tuple[str, LocalFile, int]]:
        """What does not hold its content yet, with the bytes of it that the device has (a content that is whole but
        not in place: all of them)."""
        lines = [_SUM, f"cd {quote(self.root)} && mkdir -p blobs trees exchange || exit 1"]
        for path, file in wanted:
            blob, part = f"blobs/{file.sha256}", f"blobs/{file.sha256}.part"
            lines.append(
                f'if [ -f {quote(path)} ] && [ "$(sum < {quote(path)})" = {file.sha256} ]; then echo placed\n'
                f'elif [ -f {blob} ] && [ "$(sum < {blob})" = {file.sha256} ]; then echo whole\n'
                f"elif [ -f {part} ]; then echo part $(wc -c < {part})\n"
                f"else rm -f {blob}; echo none\nfi"
            )
        seconds = 60 + sum(file.size_bytes for _, file in wanted) / 5e6  # an SD card reads 5 MB a second at worst
        ran = self._shell.check("\n".join(lines), "looking for files", seconds=seconds)
        answers = ran.text.split("\n")[: len(wanted)]
        missing = []
        for (path, file), answer in zip(wanted, answers, strict=True):
            kind, _, number = answer.partition(" ")
            offset = int(number) if kind == "part" and number.strip().isdigit() else 0
            if kind == "whole":
                offset = file.size_bytes
            if kind != "placed":
                missing.append((path, file, min(offset, file.size_bytes)))
        return missing

    def _check_room(self, needed: int) -> None:
        if needed <= 0:
            return
        ran = self._shell.check(f"df -Pk {quote(self.root)}", "looking for free space")
        columns = ran.text.strip().splitlines()[-1].split()
        # The mount point may have blanks: counted from the percent sign, the number before it is what is free.
        percent = next((i for i, word in enumerate(columns) if word.endswith("%")), 0)
        free = int(columns[percent - 1]) * 1024 if percent and columns[percent - 1].isdigit() else None
        if free is not None and free < needed + _ROOM_BYTES:
            megabytes = (needed + _ROOM_BYTES) >> 20
            raise ResourceExhausted(
                f"{self._shell.name}: {free >> 20} MB are free in {self.root}, {megabytes} MB are needed",
                hint=f"free some room there (rm -r {self.root} removes what earlier runs sent)",
            )

    def _send(self, file: LocalFile, offset: int) -> None:
        """Send the content, from ``offset`` on; whole, it is renamed to its hash."""
        blob = quote(f"{self.root}/blobs/{file.sha256}")
        part = f"{self.root}/blobs/{file.sha256}.part"
        for begin in (offset, 0):  # what a link left may be damaged: once more from the start
            if begin < file.size_bytes or not file.size_bytes:
                try:
                    self._shell.send(file.path, part, begin)
                except ResourceExhausted:
                    self._shell.run(f"rm -f {quote(part)}")
                    raise
                self.sent_bytes += file.size_bytes - begin
            elif begin == offset and self._shell.run(f"[ -f {blob} ]").status == 0:
                return
            seconds = 60 + file.size_bytes / 5e6
            script = (
                f'{_SUM}if [ "$(sum < {quote(part)})" = {file.sha256} ]; then mv {quote(part)} {blob}\n'
                f"else rm -f {quote(part)}; echo damaged\nfi"
            )
            if "damaged" not in self._shell.check(script, f"checking {file.path.name}", seconds=seconds).text:
                return
            if LocalFile.of(file.path).sha256 != file.sha256:
                raise BadInput(f"{file.path} changed while it was sent", hint="leave it alone during a run")
        raise ResourceExhausted(
            f"{self._shell.name}: {file.path.name} arrived damaged twice", hint="check the device's storage"
        )

    def _place(self, wanted: Sequence[tuple[str, LocalFile]]) -> None:
        """Let each path hold its content: a second name for it; where the system forbids links (Android), the content
        moves to the last path that wants it, so that a model does not need its room twice."""
        scripts = []
        for index, (path, file) in enumerate(wanted):
            blob = f"{self.root}/blobs/{file.sha256}"
            if path != blob:
                again = any(other.sha256 == file.sha256 for _, other in wanted[index + 1 :])
                words = f"{quote(blob)} {quote(path)}"
                scripts.append(
                    f"mkdir -p {quote(str(PurePosixPath(path).parent))} && rm -f {quote(path)} && "
                    f"{{ ln {words} 2>/dev/null || {'cp' if again else 'mv'} {words}; }} || exit 1"
                )
        for start in range(0, len(scripts), _BATCH):
            self._shell.check("\n".join(scripts[start:][:_BATCH]), "putting files into place", seconds=600)
