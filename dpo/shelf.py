"""The folder of a run's checkpoints: which are sound, which stay, which are set aside. One process works on it; it
knows neither ranks nor tensors.

    step-00000100/            complete, with manifest.json: who wrote it, and size and SHA-256 of every other file
    .step-00000100.part/      being written; what a dead process left of one is removed at the next start
    damaged-step-00000100/    its files are not those of its manifest: set aside, never read again
    left-step-00000100/       of a course that the run has left (`checkpoint.resume=PATH`), or with foreign files in it

Whatever else lies there is not touched, and links are not followed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo.durable import Sealed, seal_of, sync_folder, write_json
from dpo.refusals import CheckpointError, DiskError

_NAME = re.compile(r"step-\d{8}")
_PART = re.compile(r"\.step-\d{8}\.(part|older)")
MANIFEST = "manifest.json"


class Shelf:
    """The checkpoints of one run.

    Attributes:
        root: the folder; it need not exist yet.
        trust: use checkpoints of other users, and such as others may write to.
        trusting: the flag that does so, for messages.
        warnings: what people should know, since they were last read.
    """

    def __init__(self, root: Path, trust: bool = False, trusting: str = "--checkpoint.trust true") -> None:
        self.root, self.trust, self.trusting = root, trust, trusting
        self.warnings: list[str] = []
        self._sound: set[Path] = set()

    def listed(self) -> list[Path]:
        """Checkpoints by step, sound or not; never a link or a foreign file."""
        if not self.root.is_dir():
            return []
        return sorted(
            path
            for path in self.root.iterdir()
            if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        )

    # ---- reading

    def newest_sound(self) -> Path | None:
        """The newest sound one, or None where there is none at all; damaged ones on the way are set aside.

        Raises:
            CheckpointError: all are damaged, or one is not trusted.
        """
        problems = []
        for path in reversed(self.listed()):
            try:
                self.verify(path)
            except DamageError as error:
                problems.append(f"{error} (set aside as {self._set_aside(path, 'damaged').name})")
                continue
            if problems:
                self.warnings.append(f"{'; '.join(problems)}; resuming from {path.name}")
            return path
        if problems:
            raise CheckpointError(
                f"{'; '.join(problems)}; no sound checkpoint is left: start again to train from step 0"
            )
        return None

    def verify(self, path: Path) -> dict[str, Any]:
        """The manifest of a checkpoint that is trusted and whose files are those of the manifest.

        Raises:
            DamageError: a file is missing or is another one.
            CheckpointError: it belongs to another user, or others may write to it.
        """
        if not self.trust:
            _require_own(path, self.trusting)
        manifest = _read_manifest(path)
        for name, sealed, found in zip(manifest["files"], *_seals(path, manifest["files"]), strict=True):
            if sealed != found:
                raise DamageError(f"{path / name}: missing or damaged")
        self._sound.add(path)
        return manifest

    def clear_parts(self) -> None:
        """Remove what dead processes have not completed."""
        for path in self.root.iterdir() if self.root.is_dir() else ():
            if _PART.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)

    # ---- writing

    def prepare(self, step: int, num_bytes: int) -> Path:
        """An empty folder to write the checkpoint of a step into.

        Raises:
            DiskError: there is no room for so many bytes.
            OSError: it cannot be made.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if free < num_bytes:
            raise DiskError(
                f"{self.root}: a checkpoint takes {size(num_bytes)} and {size(free)} are free: free"
                f" {size(num_bytes - free)}, then start again"
            )
        aside = self.root / f".{_name(step)}.part"
        final = self.root / _name(step)
        for place in (aside, final):
            if place.is_symlink() or (place.exists() and not place.is_dir()):
                raise CheckpointError(f"{place}: not a checkpoint of ours: move it away")
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(mode=0o700)
        return aside

    def commit(self, aside: Path, facts: dict[str, Any], files: dict[str, Sealed], keep: int) -> Path:
        """Complete what was written into `aside`, whose files are on the disk; then drop old ones.

        Args:
            facts: of the manifest, `step` among them.
            keep: how many sound ones stay.
        """
        final = self.root / _name(facts["step"])
        write_json(aside / MANIFEST, facts | {"files": {name: asdict(sealed) for name, sealed in files.items()}})
        sync_folder(aside)
        older = final.with_name(f".{final.name}.older")
        if older.exists():
            shutil.rmtree(older)
        if final.exists():
            os.replace(final, older)
        os.replace(aside, final)
        sync_folder(self.root)
        self._sound.add(final)
        if older.exists():
            shutil.rmtree(older)
        self._retire(final, keep)
        return final

    def _retire(self, newest: Path, keep: int) -> None:
        """Keep `newest` and the `keep` - 1 sound ones before it. Those with more steps are of a course that the run
        has left: set aside, for the next resume must not take them for the newest."""
        others = [path for path in self.listed() if path != newest]
        for later in (path for path in others if path.name > newest.name):
            self._set_aside(later, "left")
        num_kept = 1
        for path in reversed([path for path in others if path.name < newest.name]):
            if num_kept == keep:
                self._drop(path)
            elif self._is_sound(path):
                num_kept += 1

    def _is_sound(self, path: Path) -> bool:
        """Whether a checkpoint counts; one that this process has neither written nor read is read now."""
        if path in self._sound:
            return True
        try:
            self.verify(path)
        except DamageError as error:
            self.warnings.append(f"{error} (set aside as {self._set_aside(path, 'damaged').name})")
            return False
        except CheckpointError as error:
            self.warnings.append(f"{error}; it is not counted among checkpoint.keep")
            return False
        return True

    def _set_aside(self, path: Path, why: str) -> Path:
        self._sound.discard(path)
        number, aside = 1, path.with_name(f"{why}-{path.name}")
        while aside.exists() or aside.is_symlink():
            number += 1
            aside = path.with_name(f"{why}-{path.name}.{number}")
        os.replace(path, aside)
        return aside

    def _drop(self, path: Path) -> None:
        """Remove a checkpoint, but nothing in it that is not of its manifest."""
        self._sound.discard(path)
        try:
            names = [*_read_manifest(path)["files"], MANIFEST]
        except DamageError:
            names = []
        for name in names:
            (path / name).unlink(missing_ok=True)
        try:
            path.rmdir()
        except OSError:
            self.warnings.append(
                f"{path}: holds other files, so it was set aside as {self._set_aside(path, 'left').name}"
            )


class DamageError(CheckpointError):
    """The files of a checkpoint are not those of its manifest."""


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        manifest["files"] = {name: Sealed(**sealed) for name, sealed in manifest["files"].items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise DamageError(f"{path}: no readable {MANIFEST}, so it is not a complete checkpoint") from error
    strange = [name for name in manifest["files"] if Path(name).name != name or (path / name).is_symlink()]
    if strange or "trainer.json" not in manifest["files"]:
        raise DamageError(f"{path / MANIFEST}: not the manifest of a checkpoint")
    return manifest


def _seals(path: Path, files: dict[str, Sealed]) -> tuple[list[Sealed], list[Sealed | None]]:
    """Of each file: what the manifest says, and what it is (None: missing); sizes first, since hashing takes time."""

    def found(name: str) -> Sealed | None:
        try:
            file_size = (path / name).stat().st_size
            return seal_of(path / name) if file_size == files[name].bytes else Sealed(file_size, "")
        except OSError:
            return None

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(files.values()), list(pool.map(found, files))


def _require_own(path: Path, trusting: str) -> None:
    """Refuse what another user has written, or could have: nothing of it was read yet.

    Raises:
        CheckpointError: names the file and what to do.
    """
    for place in (path, *sorted(path.iterdir())):
        status = place.lstat()
        if status.st_uid != os.geteuid():
            raise CheckpointError(
                f"{place}: belongs to user {status.st_uid}, not to you: {trusting} takes it all the same"
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not stat.S_ISLNK(status.st_mode):
            raise CheckpointError(
                f"{place}: others may write to it: chmod -R go-w {path} if you know that none has, or {trusting}"
            )


def size(num_bytes: float) -> str:
    """Bytes as 12.3 GB or 840 kB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes / 1e3:.3g} kB"
