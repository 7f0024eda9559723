"""Two checkpoint files, or two folders of them, side by side: without MLflow, and without unpickling anything."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa
import safetensors
from torch import Tensor

from tracked_replay.compare.result import ULP, Comparison, Difference, TensorComparison, Tolerance, Verdict
from tracked_replay.compare.runs import ASPECTS, tolerance_text
from tracked_replay.compare.tensors import compare_states
from tracked_replay.errors import ConfigError, RecordingError
from tracked_replay.recording import Checkpoint, Recording, file_sha256, folder_source, read_checkpoint, read_manifest
from tracked_replay.recording.checkpoints import MANIFEST
from tracked_replay.recording.recorder import DIGESTS
from tracked_replay.training.state import BUFFERS, MOMENTUM, PARAMETERS

SUFFIX = ".safetensors"
GENERATORS = "generator_states"  # metadata of a file of generator states: there it is part of what was saved

_FOLDER_MANIFEST = PurePosixPath(MANIFEST).name  # where the folder is a run's checkpoints folder itself
_KINDS = {PARAMETERS: 0, BUFFERS: 1, MOMENTUM: 2}
_SHOWN = 3


def compare_paths(
    a: Path,
    b: Path,
    tolerance: Tolerance = Tolerance(),  # noqa: B008 - frozen
) -> Comparison:
    """Compare two ``.safetensors`` files, or all of them below two folders by relative path.

    Tensors decide, and whether both sides have the same files; metadata does not, but for files of generator states,
    which must agree to the byte. Where a folder holds a recorded run, or its checkpoints with their manifest, every
    file is first checked against its recorded digest: damage is no difference.

    Of several files the first that differs, numbers in names in numeric order, gives ``tensors``, ``tensors_step`` and
    ``first_divergent_step``, the number of that state; where none differs the last file with such a number (or the last
    of all) gives ``tensors``, and no step diverges.

    Args:
        a, b: two files, or two folders.
        tolerance: what does not count.

    Raises:
        ConfigError: a path does not exist, is no safetensors file, or one is a file and the other a folder; an entry of
            ``tolerance.ignore`` is neither an aspect nor matches a tensor.
        RecordingError: a folder has no safetensors file or has a link that leads out of it; a file is unreadable or
            damaged.
    """
    if tolerance.max_ulp < 0:
        raise ConfigError(f"max_ulp: found {tolerance.max_ulp}; allowed: integer >= 0")
    sides = _open_side(a), _open_side(b)
    if sides[0].is_folder != sides[1].is_folder:
        kinds = ["a folder" if side.is_folder else "a file" for side in sides]
        raise ConfigError(f"paths: found {kinds[0]} ({a}) and {kinds[1]} ({b}); allowed: two files or two folders")
    if "generators" in tolerance.ignore:
        sides = _without_generators(sides[0]), _without_generators(sides[1])
    found = _compare_sides(*sides, tolerance)
    _require_known(tolerance, found.names)
    verdict, summary = _conclude(*sides, found, tolerance)
    first = found.first if verdict == "different" else None
    shown = first or found.last
    parted = [tensor.name for tensor in first.tensors if not tensor.equal] if first else []
    return Comparison(
        a=str(a),
        b=str(b),
        verdict=verdict,
        summary=summary,
        tolerance=tolerance,
        first_divergent_step=first.step if first else None,
        first_difference="state" if first else None,
        first_tensor=parted[0] if parted else None,
        tensors=shown.tensors if shown else (),
        tensors_step=shown.step if shown else None,
        generators=tuple(found.generators),
        other=shown.metadata if shown else (),
    )


@dataclass(frozen=True)
class _Side:
    """What a path holds.

    Attributes:
        path: as it was given.
        files: safetensors files by path relative to the folder, in the order of comparison; a single file is ``""``.
    """

    path: Path
    files: dict[str, Path]

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()


class _FilePair(NamedTuple):
    """Two files of one name.

    Attributes:
        name: of both.
        names: of all tensors.
        tensors: comparisons of their tensors that are not ignored.
        generators: their digests, where they hold generator states and differ.
        step: number of the state, where both files give the same.
        metadata: entries that differ.
    """

    name: str
    names: set[str]
    tensors: tuple[TensorComparison, ...]
    generators: Difference | None
    step: int | None
    metadata: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        return self.generators is None and all(tensor.equal for tensor in self.tensors)

    @property
    def in_common(self) -> int:
        """Tensors that both sides have."""
        return sum(not tensor.difference.startswith("missing") for tensor in self.tensors)


@dataclass
class _Found:
    """What two sides' files gave.

    Attributes:
        names: of all tensors in the files that both sides have.
        in_common: tensors that were compared.
        common: files that both sides have.
        differing: how many of them differ.
        only_a, only_b: files on one side.
        first: the first pair that differs.
        last: the last pair, of those with a step where there are any.
        generators: generator states that differ.
    """

    only_a: list[str]
    only_b: list[str]
    names: set[str] = field(default_factory=set)
    in_common: int = 0
    common: int = 0
    differing: int = 0
    first: _FilePair | None = None
    last: _FilePair | None = None
    generators: list[Difference] = field(default_factory=list)


def _open_side(path: Path) -> _Side:
    """List a path's files and check them against their digests, where there are any."""
    if path.is_dir():
        return _Side(path, _open_folder(path))
    if not path.is_file():
        raise ConfigError(f"{path}: no such file or folder")
    if path.suffix != SUFFIX:
        raise ConfigError(
            f"{path}: found no {SUFFIX} file; allowed: {SUFFIX} files and folders of them, pickles are not read"
        )
    return _Side(path, {"": path})


def _open_folder(root: Path) -> dict[str, Path]:
    found = dict(sorted(_walk(root), key=lambda item: _natural(item[0])))
    files = {name: path for name, path in found.items() if path.suffix == SUFFIX}
    if not files:
        raise RecordingError(f"{root}: found no {SUFFIX} file in it")
    try:
        _require_undamaged(root, found)
    except (RecordingError, OSError) as error:
        raise RecordingError(f"{root}: {error}") from error
    return files


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """Safetensors files, manifests and digests below a folder. Links to folders are not followed."""

    def fail(error: OSError) -> None:
        raise RecordingError(f"{root}: cannot be listed: {error}") from error

    for folder, folders, names in os.walk(root, onerror=fail):
        for name in folders:
            _require_inside(root, Path(folder, name))
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if path.suffix == SUFFIX or relative in (MANIFEST, _FOLDER_MANIFEST, DIGESTS):
                _require_inside(root, path)
                if not path.is_file():
                    raise RecordingError(f"{path}: cannot be read: it is no regular file")
                yield relative, path


def _require_inside(root: Path, path: Path) -> None:
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise RecordingError(f"{path}: found a link that leads out of {root}; such links are not followed")


def _require_undamaged(root: Path, found: dict[str, Path]) -> None:
    """Check files against the digests that were recorded with them.

    Raises:
        RecordingError: the first that is missing or damaged.
    """
    for manifest in (MANIFEST, _FOLDER_MANIFEST):
        if manifest in found:
            for row in _manifest_rows(root, manifest, found):
                name = str(PurePosixPath(manifest).with_name(PurePosixPath(row.file).name))
                if name not in found:
                    raise RecordingError(f"{name} is missing, though {manifest} lists it")
                read_checkpoint(found[name], row)


def _manifest_rows(root: Path, manifest: str, found: dict[str, Path]) -> Sequence[Checkpoint]:
    """Rows of a manifest; where the folder's digests cover it, everything that they cover is checked first."""
    try:
        recording = Recording(folder_source(root))
        if DIGESTS not in found or manifest not in recording.digests:
            return read_manifest(root / manifest)
        for name in found:
            if name in recording.digests:
                with recording.open(name):
                    pass
        return recording.checkpoints
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise RecordingError(f"{manifest}, or {DIGESTS} beside it, is damaged: {error}") from error


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sorts ``step-9`` before ``step-10``."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _order(name: str) -> tuple[int, object]:
    """Sorts parameters before buffers, momentum and tensors of other names."""
    return _KINDS.get(name.partition("/")[0], len(_KINDS)), _natural(name)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys(), key=_order)}, file.metadata() or {}
    except (safetensors.SafetensorError, OSError, KeyError) as error:
        raise RecordingError(f"{path}: cannot be read as a safetensors file: {error}") from error


def _without_generators(side: _Side) -> _Side:
    return replace(side, files={name: path for name, path in side.files.items() if GENERATORS not in _read(path)[1]})


def _compare_sides(a: _Side, b: _Side, tolerance: Tolerance) -> _Found:
    found = _Found([name for name in a.files if name not in b.files], [name for name in b.files if name not in a.files])
    for name in a.files:
        if name in b.files:
            pair = _compare_files(name, a.files[name], b.files[name], tolerance)
            found.common += 1
            found.names |= pair.names
            found.in_common += pair.in_common
            if pair.step is not None or found.last is None or found.last.step is None:
                found.last = pair
            if pair.generators is not None:
                found.generators.append(pair.generators)
            if not pair.equal:
                found.differing += 1
                found.first = found.first or pair
    return found


def _compare_files(name: str, a: Path, b: Path, tolerance: Tolerance) -> _FilePair:
    (tensors_a, metadata_a), (tensors_b, metadata_b) = _read(a), _read(b)
    generators = None
    if GENERATORS in metadata_a and GENERATORS in metadata_b:
        digests = file_sha256(a), file_sha256(b)
        generators = Difference(name or a.name, *digests) if digests[0] != digests[1] else None
    entries = [(key, metadata_a.get(key), metadata_b.get(key)) for key in sorted(metadata_a.keys() | metadata_b.keys())]
    step = metadata_a.get("step", "")
    return _FilePair(
        name=name,
        names=tensors_a.keys() | tensors_b.keys(),
        tensors=compare_states(tensors_a, tensors_b, tolerance),
        generators=generators,
        step=int(step) if step == metadata_b.get("step") and re.fullmatch("[0-9]{1,18}", step) else None,
        metadata=tuple(Difference(f"metadata.{key}", one, other) for key, one, other in entries if one != other),
    )


def _require_known(tolerance: Tolerance, names: set[str]) -> None:
    for entry in tolerance.ignore:
        if names and entry not in ASPECTS and not any(fnmatchcase(name, entry) for name in names):
            examples = ", ".join(sorted(names, key=_order)[:_SHOWN])
            raise ConfigError(
                f"ignore: found {entry!r}; allowed: {', '.join(ASPECTS)}, or a pattern of tensor names such as "
                f"{MOMENTUM}/* (tensors here: {examples}, …)"
            )


def _conclude(a: _Side, b: _Side, found: _Found, tolerance: Tolerance) -> tuple[Verdict, str]:
    """The verdict, and why."""
    if a.path.samefile(b.path):
        return "identical", f"identical: both paths are the same {'folder' if a.is_folder else 'file'}."
    if not found.in_common:
        if found.common:
            reason = f"no tensor that both sides have ({tolerance_text(tolerance)})"
        else:
            reason = f"no file that both sides have ({len(a.files)} in a, {len(b.files)} in b)"
        return "incomparable", f"incomparable: {reason}."
    if found.differing or found.only_a or found.only_b:
        in_force = f" {tolerance_text(tolerance, beyond=True)}" if tolerance != Tolerance() else ""
        return "different", f"different{in_force}: {'; '.join(_differences(a, found, tolerance))}."
    compared = f"{found.common} files" if a.is_folder else f"{found.in_common} tensors"
    return "identical", f"identical {tolerance_text(tolerance)}: {compared}."


def _differences(a: _Side, found: _Found, tolerance: Tolerance) -> Iterator[str]:
    if found.first is None:
        yield f"none of {found.common} common files"
    else:
        where = f"{found.differing} of {found.common} common files, first {found.first.name}: " if a.is_folder else ""
        yield f"{where}{_pair_text(found.first, tolerance)}"
    for side, names in (("a", found.only_a), ("b", found.only_b)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield f"only in {side}: {', '.join(names[:_SHOWN])}{more}"


def _pair_text(pair: _FilePair, tolerance: Tolerance) -> str:
    differing = [tensor for tensor in pair.tensors if not tensor.equal]
    if not differing:
        return "the generator states, outside of their tensors"
    first = _tensor_text(differing[0], explain=not tolerance.max_ulp)
    return f"{len(differing)} of {len(pair.tensors)} tensors, first {differing[0].name} ({first})"


def _tensor_text(tensor: TensorComparison, *, explain: bool) -> str:
    """What differs; ``explain`` where nothing before it has said what ULP are."""
    if tensor.difference == "dtype":
        return f"dtype {tensor.dtype_a} in a, {tensor.dtype_b} in b"
    if tensor.difference == "shape":
        return f"shape {tensor.shape_a} in a, {tensor.shape_b} in b"
    if tensor.difference != "values":
        return tensor.difference
    apart = "" if tensor.largest_ulp is None else f", at most {tensor.largest_ulp} ULP apart"
    if apart and explain:
        apart += f"; {ULP}"
    return f"{tensor.beyond} of {tensor.elements} elements{apart}"
