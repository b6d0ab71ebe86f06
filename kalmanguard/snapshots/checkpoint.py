"""One durable checkpoint: a folder of safetensors, JSON and a manifest with the digest of every file."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
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
SHARDED_FORMAT: Final = "kalmanguard-sharded-checkpoint"
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
    files = {path.relative_to(folder).as_posix(): (path.stat().st_size, file_digest(path)) for path in walk(folder)}
    digest = write_manifest(folder, step=step, clean=clean, sequence=sequence, files=files)
    sync_tree(folder)
    return digest


def write_manifest(
    folder: Path,
    *,
    step: int,
    clean: bool,
    sequence: int,
    files: Mapping[str, tuple[int, str]],
    kind: str = FORMAT,
) -> str:
    """Write the manifest of files that are there already; return its digest."""
    manifest = json.dumps(
        {
            "format": kind,
            "version": VERSION,
            "step": step,
            "clean": clean,
            "sequence": sequence,
            "files": {name: {"bytes": nbytes, "sha256": digest} for name, (nbytes, digest) in files.items()},
        },
        indent=1,
    )
    write_text(folder / MANIFEST, manifest)
    return text_digest(manifest)


def read_manifest(folder: Path, *, kind: str = FORMAT, required: Collection[str] = (TENSORS, TREE)) -> Manifest:
    """Read and check a checkpoint's manifest, not yet its files.

    Parameters
    ----------
    folder
        The checkpoint.
    kind
        Its format.
    required
        Files without which there is no checkpoint of this format.

    Raises
    ------
    SnapshotError
        It is missing, damaged, foreign, or of a newer version.
    """
    path = inside(folder, MANIFEST)
    data = read_json(path, "the checkpoint's manifest")
    check_format(data, path, kind)
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
    if not files.keys() >= set(required):
        raise SnapshotError(f"{path} is damaged: it does not list {' and '.join(required)}.")
    return manifest


def check_format(data: dict[str, Any], path: Path, kind: str = FORMAT) -> None:
    """Refuse files of other programs and of newer versions.

    Raises
    ------
    SnapshotError
        Either of them.
    """
    found = data.get("format")
    if found != kind and found in (FORMAT, SHARDED_FORMAT):
        reader = "distributed.durable.ShardedStore" if found == SHARDED_FORMAT else "snapshots.disk.CheckpointStore"
        raise SnapshotError(f"{path} has the format {found!r}, not {kind!r}: read it with kalmanguard.{reader}.")
    if found != kind:
        raise SnapshotError(f"{path} was not written by kalmanguard (its format is {found!r}).")
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
    check_files(folder, manifest, list(manifest.files))
    check_strays(folder, manifest)
    try:
        tensors = load_file(folder / TENSORS)
        text = (folder / TREE).read_text(encoding="utf-8")
    except (SafetensorError, OSError, ValueError) as error:
        raise SnapshotError(f"The checkpoint {folder} cannot be read: {error}.") from error
    content = decode(text, tensors)
    if not isinstance(content, dict) or not isinstance(content.get("meta"), dict) or "tree" not in content:
        raise SnapshotError(f"{folder / TREE} is not the tree of a checkpoint.")
    return manifest.step, content["tree"], content["meta"]


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare some of a checkpoint's files with its manifest, byte by byte through their digests.

    Raises
    ------
    SnapshotError
        One is missing, truncated, or not what was written.
    """
    for name in names:
        _check_file(inside(folder, name), *manifest.files[name])


def check_strays(folder: Path, manifest: Manifest) -> None:
    """Refuse files that the manifest does not list.

    Raises
    ------
    SnapshotError
        There is one, or a link.
    """
    listed = {*manifest.files, MANIFEST}
    for path in walk(folder):
        if path.relative_to(folder).as_posix() not in listed:
            raise SnapshotError(f"{path} does not belong to the checkpoint; remove it if you put it there.")


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
