"""One durable checkpoint: a folder of safetensors, JSON and a manifest with the digest of every file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kalmanguard.errors import SnapshotError
from kalmanguard.snapshots.codec import decode, encode
from kalmanguard.snapshots.files import (
    file_digest,
    inside,
    read_json,
    sync_tree,
    text_digest,
    walk,
    write_text,
)

FORMAT: Final = "kalmanguard-checkpoint"
VERSION: Final = 1

MANIFEST: Final = "manifest.json"
TENSORS: Final = "tensors.safetensors"
TREE: Final = "tree.json"
MODEL: Final = "model"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint says about itself.

    Attributes
    ----------
    step
        Step of the state.
    clean
        Whether the state was certified when it was saved.
    sequence
        Number of the save within the store, from 1.
    files
        (size in bytes, SHA-256) by relative path.
    digest
        SHA-256 of the manifest's own text.
    """

    step: int
    clean: bool
    sequence: int
    files: dict[str, tuple[int, str]]
    digest: str


def write_checkpoint(
    folder: Path,
    *,
    step: int,
    sequence: int,
    clean: bool,
    tree: Any,
    meta: dict[str, Any],
    model_saver: Callable[[Path], None] | None,
) -> str:
    """Write everything into the new folder ``folder``, synced; return the digest of its manifest.

    Raises
    ------
    SnapshotError
        The tree or the metadata hold what a checkpoint cannot keep.
    OSError
        The disk is full or not writable.
    """
    text, tensors = encode({"tree": tree, "meta": meta})
    folder.mkdir()
    try:
        save_file(tensors, folder / TENSORS)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise SnapshotError(f"The tensors of step {step} could not be written: {error}.") from error
    (folder / TREE).write_text(text, encoding="utf-8")
    if model_saver is not None:
        (folder / MODEL).mkdir()
        model_saver(folder / MODEL)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in walk(folder)
    }
    manifest = json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "clean": clean,
            "sequence": sequence,
            "files": files,
        },
        indent=1,
    )
    write_text(folder / MANIFEST, manifest)
    sync_tree(folder)
    return text_digest(manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read and check a checkpoint's manifest, not yet its files.

    Raises
    ------
    SnapshotError
        It is missing, damaged, foreign, or of a newer version.
    """
    path = inside(folder, MANIFEST)
    data = read_json(path, "the checkpoint's manifest")
    check_format(data, path)
    try:
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in dict(data["files"]).items()}
        manifest = Manifest(
            step=int(data["step"]),
            clean=bool(data["clean"]),
            sequence=int(data["sequence"]),
            files=files,
            digest=file_digest(path),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SnapshotError(f"{path} is damaged: {type(error).__name__} {error}.") from error
    if TENSORS not in files or TREE not in files:
        raise SnapshotError(f"{path} is damaged: it does not list {TENSORS} and {TREE}.")
    return manifest


def check_format(data: dict[str, Any], path: Path) -> None:
    """Refuse files of other programs and of newer versions.

    Raises
    ------
    SnapshotError
        Either of them.
    """
    if data.get("format") != FORMAT:
        raise SnapshotError(f"{path} was not written by kalmanguard (its format is {data.get('format')!r}).")
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise SnapshotError(f"{path} is damaged: its version is {version!r}.")
    if version > VERSION:
        raise SnapshotError(
            f"{path} has format version {version}, newer than the version {VERSION} that this kalmanguard reads; "
            "upgrade kalmanguard."
        )


def read_checkpoint(folder: Path, *, manifest_digest: str | None = None) -> tuple[int, Any, dict[str, Any]]:
    """Verify every file of a checkpoint and return (step, tree, meta).

    Parameters
    ----------
    folder
        The checkpoint.
    manifest_digest
        Digest that the manifest must have, where something vouches for it.

    Raises
    ------
    SnapshotError
        Anything is missing, truncated, tampered with, foreign or newer.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise SnapshotError(f"{folder} is not a checkpoint folder.")
    manifest = read_manifest(folder)
    if manifest_digest is not None and manifest.digest != manifest_digest:
        raise SnapshotError(f"{folder / MANIFEST} was changed after it was written: its SHA-256 digest differs.")
    for name, (nbytes, digest) in manifest.files.items():
        _check_file(inside(folder, name), nbytes, digest)
    listed = {*manifest.files, MANIFEST}
    for path in walk(folder):
        if path.relative_to(folder).as_posix() not in listed:
            raise SnapshotError(f"{path} does not belong to the checkpoint; remove it if you put it there.")
    try:
        tensors = load_file(folder / TENSORS)
        text = (folder / TREE).read_text(encoding="utf-8")
    except (SafetensorError, OSError, ValueError) as error:
        raise SnapshotError(f"The checkpoint {folder} cannot be read: {error}.") from error
    content = decode(text, tensors)
    if not isinstance(content, dict) or not isinstance(content.get("meta"), dict) or "tree" not in content:
        raise SnapshotError(f"{folder / TREE} is not the tree of a checkpoint.")
    return manifest.step, content["tree"], content["meta"]


def _check_file(path: Path, nbytes: int, digest: str) -> None:
    try:
        size = path.stat().st_size
        if size != nbytes:
            raise SnapshotError(
                f"{path} has {size:,} bytes but should have {nbytes:,}: it is "
                f"{'truncated' if size < nbytes else 'not what was written'}."
            )
        if file_digest(path) != digest:
            raise SnapshotError(f"{path} was changed after it was written: its SHA-256 digest differs.")
    except FileNotFoundError:
        raise SnapshotError(f"{path} is missing from the checkpoint.") from None
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error.strerror}.") from error
