"""Stage ``clean``: remove artifacts of a run by kind. It makes no run of its own."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from tqdm import tqdm

from tracked_replay.errors import ConfigError, RunError
from tracked_replay.tracking import names
from tracked_replay.tracking.cleaning import EndedRun, Reader, StoredFile

logger = logging.getLogger(__name__)

ALL = "all"
# Patterns of paths; `*` stands for any signs, `/` among them. The manifest of the checkpoints stays, so that the
# digests of the states remain known.
KINDS: dict[str, tuple[str, ...]] = {
    "checkpoints": ("checkpoints/*.safetensors", "rng/*"),
    "trace": ("trace/*",),
    "scores": ("scores/*",),
    "figures": ("figures/*", "report/*", "images/*", "table_images/*"),
    "lds": ("lds/*",),
    ALL: ("*",),
}
LOOKED_AT = frozenset({"figures"})  # no stage reads them: what is left is still the run's result
WITH_RETRAININGS = frozenset({"lds", ALL})  # they take all artifacts of the run's retrainings along
WITH_COPIES = frozenset({"checkpoints", ALL})  # they take along what this machine keeps of fetched states


class Need(NamedTuple):
    """Which artifacts of a stage's runs other runs need.

    Attributes:
        kinds: the artifacts.
        parameter: by which the others name the run.
        stages: whose FINISHED runs cannot be taken further without. A RUNNING run counts whatever its stage.
    """

    kinds: frozenset[str]
    parameter: str
    stages: frozenset[str]


# A `verify` run is not among them: it says what was found when it looked.
NEEDS = {
    names.TRAIN: Need(
        frozenset({"checkpoints", "trace", ALL}),
        "train_run_id",
        frozenset({names.MAGIC, names.LDS, names.COUNTERFACTUAL}),
    ),
    names.MAGIC: Need(frozenset({"scores", ALL}), "magic_run_id", frozenset({names.LDS, names.COUNTERFACTUAL})),
    names.LDS: Need(frozenset({"lds", ALL}), "lds_run_id", frozenset({names.MAIN})),
}
RESULTS = {names.MAGIC: "scores", names.LDS: "lds"}  # a run that lost its own result needs nothing any more
NAMED = 5  # runs in a message


class RunFiles(NamedTuple):
    """Files of a run.

    Attributes:
        run_id: the run.
        files: path inside its artifacts and size in bytes.
    """

    run_id: str
    files: tuple[StoredFile, ...]


@dataclass(frozen=True)
class Cleaned:
    """What was removed, or would be.

    Attributes:
        run_id: the run; where the one that was named only points to an earlier result, the run that holds it.
        files: its files: path inside its artifacts and size in bytes.
        removed: whether they are gone; ``False`` after a dry run and where there was nothing to remove.
        downstream: the runs that need them.
        retrainings: files of its retrainings, which are removed with it.
        here: copies of its states in this machine's cache, and what an interruption left there; paths inside the cache.
        refused: after a dry run, the sentence with which the removal would be refused; empty where it would not be.
    """

    run_id: str
    files: tuple[StoredFile, ...]
    removed: bool
    downstream: tuple[Reader, ...] = ()
    retrainings: tuple[RunFiles, ...] = ()
    here: tuple[StoredFile, ...] = ()
    refused: str = ""

    @property
    def count(self) -> int:
        """Number of files, those of retrainings and of the cache among them."""
        return len(self.files) + sum(len(child.files) for child in self.retrainings) + len(self.here)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return _size(self.files) + sum(_size(child.files) for child in self.retrainings) + _size(self.here)


class _Part(NamedTuple):
    """What is removed from one run, and which kinds it then lacks."""

    run: EndedRun
    files: tuple[StoredFile, ...]
    kinds: frozenset[str]

    @property
    def paths(self) -> list[str]:
        return [file.path for file in self.files]


def parse_what(text: str) -> tuple[str, ...]:
    """Kinds of artifacts, in the order of ``KINDS``. Raises ConfigError."""
    found = [item.strip() for item in text.split(",")]
    for item in found:
        if item not in KINDS:
            shown = repr(item) if len(item) <= 80 else f"{item[:80]!r}…"
            raise ConfigError(f"what: found {shown}; allowed: {', '.join(KINDS)}, or several joined by commas")
    return tuple(kind for kind in KINDS if kind in found)


def run_clean(run_id: str, what: str, *, dry_run: bool = False, force: bool = False) -> Cleaned:
    """Remove artifacts of a run; its parameters, metrics and tags stay.

    What this machine's cache holds of it goes with them: copies of fetched checkpoints with these, and with all of it
    also what an interruption left there.

    A run that lost what a stage reads is no longer reused: the same command computes the result again. That there is
    nothing to remove is no error.

    Args:
        run_id: a run of any stage that has ended, however it did.
        what: kinds of artifacts joined by commas: ``checkpoints``, ``trace``, ``scores``, ``figures``, ``lds`` (and
            the artifacts of the run's retrainings), ``all`` (likewise).
        dry_run: find what would be removed and whether that would be refused, and remove nothing.
        force: remove even what other runs need.

    Returns:
        The files, and the runs that need them.

    Raises:
        ConfigError: an unknown kind.
        RunError: no such run, a run that has not ended, or, without ``force`` and ``dry_run``, one whose files others
            need.
        RecordingError: an artifact is a link, or the store cannot remove it.
    """
    kinds = parse_what(what)
    run = EndedRun.open(run_id)
    waiting = ALL in kinds
    here = run.here(waiting=waiting) if WITH_COPIES & set(kinds) else ()
    parts = _parts(run, kinds) or ([_Part(run, (), frozenset({ALL}))] if here and waiting else [])
    downstream = _downstream(parts[0]) if parts else ()
    for part in parts:
        part.run.require_removable(part.paths)
    refused = _still_needed(parts[0], downstream) if downstream and not force else None
    if refused and not dry_run:
        raise refused
    if parts and not dry_run:
        _remove(parts)
    if here and not dry_run:
        run.remove_here(waiting=waiting)
    retrainings = tuple(RunFiles(part.run.run_id, part.files) for part in parts[1:])
    files = parts[0].files if parts else ()
    removed = bool(parts or here) and not dry_run
    return Cleaned(run.run_id, files, removed, downstream, retrainings, here, str(refused or ""))


def _parts(run: EndedRun, kinds: Sequence[str]) -> list[_Part]:
    """What is removed from the run, then from each of its retrainings; nothing where nothing is there."""
    own = _part(run, kinds)
    with_retrainings = WITH_RETRAININGS & set(kinds)
    children = [_part(child, [ALL] if with_retrainings else kinds) for child in run.retrainings()]
    children = [child for child in children if child.files]
    if not own.files and not children:
        return []
    if children:
        of_children = with_retrainings or frozenset().union(*(child.kinds for child in children))
        own = own._replace(kinds=own.kinds | of_children)
    return [own, *children]


def _part(run: EndedRun, kinds: Iterable[str]) -> _Part:
    found = {
        kind: [file for file in run.files if any(fnmatchcase(file.path, pattern) for pattern in KINDS[kind])]
        for kind in kinds
    }
    files = sorted({file for chosen in found.values() for file in chosen})
    return _Part(run, tuple(files), frozenset(kind for kind, chosen in found.items() if chosen))


def _remove(parts: Sequence[_Part]) -> None:
    # Marked before anything is removed, so that an interruption leaves no run that looks whole and is not.
    for part in parts:
        known = part.run.cleaned | part.kinds
        part.run.mark([kind for kind in KINDS if kind in known], reusable=part.kinds <= LOOKED_AT)
    for part in parts:
        part.run.remove(part.paths)


def _downstream(part: _Part) -> tuple[Reader, ...]:
    need = NEEDS.get(part.run.stage)
    if need is None or not need.kinds & part.kinds:
        return ()
    return tuple(reader for reader in part.run.readers(need.parameter) if _needs(reader, need))


def _needs(reader: Reader, need: Need) -> bool:
    if reader.status != "FINISHED":
        return True
    return reader.stage in need.stages and not reader.cleaned & {RESULTS.get(reader.stage), ALL}


def _still_needed(part: _Part, downstream: Sequence[Reader]) -> RunError:
    kinds = [kind for kind in KINDS if kind in part.kinds & NEEDS[part.run.stage].kinds]
    shown = [_shown(reader) for reader in downstream[:NAMED]]
    more = len(downstream) - len(shown)
    return RunError(
        f"what: found {','.join(kinds)}, needed by {', '.join(shown)}{f' and {more} more' if more else ''}; "
        f"allowed: clean those first, or force"
    )


def _shown(reader: Reader) -> str:
    return f"{reader.stage} run {reader.run_id}{'' if reader.status == 'FINISHED' else f' ({reader.status})'}"


def describe(cleaned: Cleaned) -> str:
    """What was removed, or would be: a table by folder, largest first."""
    if not cleaned.count:
        return f"run {cleaned.run_id} has nothing of that kind; nothing to remove\n"
    sizes, counts = Counter[str](), Counter[str]()
    for file in cleaned.files:
        folder, slash, _ = file.path.partition("/")
        sizes[folder + slash] += file.bytes
        counts[folder + slash] += 1
    for child in cleaned.retrainings:
        name = f"{len(cleaned.retrainings)} retraining{'s' if len(cleaned.retrainings) > 1 else ''}"
        sizes[name] += _size(child.files)
        counts[name] += len(child.files)
    if cleaned.here:
        name = "cache of this machine"
        counts[name], sizes[name] = len(cleaned.here), _size(cleaned.here)
    rows = [(name, counts[name], sizes[name]) for name in sorted(counts, key=lambda name: (-sizes[name], name))]
    rows.append(("total", cleaned.count, cleaned.bytes))
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'removed' if cleaned.removed else 'would be removed'} from run {cleaned.run_id}:"]
    for name, count, size in rows:
        noun = "file " if count == 1 else "files"
        lines.append(f"  {name:{width}}  {count:5d} {noun}  {tqdm.format_sizeof(size, 'B', 1000):>6}")
    lines += [f"{'was' if cleaned.removed else 'is'} needed by {_shown(reader)}" for reader in cleaned.downstream]
    if cleaned.refused:
        lines.append(f"would be refused: {cleaned.refused}")
    return "\n".join(lines) + "\n"


def _size(files: Iterable[StoredFile]) -> int:
    return sum(file.bytes for file in files)
