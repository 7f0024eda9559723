"""What two runs say about themselves, side by side: seeds, config, environment, data, code, parameter groups."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tracked_replay.compare.result import Difference
from tracked_replay.recording import Recording, parse_json, recorder

DATA = "config/data.json"

# A list and a text of several lines are compared as sets: of 100 processor flags only the few that differ are shown.
Leaf = str | tuple[str, ...] | None


class Facts(NamedTuple):
    """Values that differ between two runs.

    Attributes:
        seeds: of ``seeds/derivations.json``, as ``component[instance]``.
        config: of ``config/config.toml``, by field.
        environment: of ``environment/environment.json``, by dotted name.
        other: of ``config/data.json`` and ``config/parameter_groups.json``.
    """

    seeds: tuple[Difference, ...]
    config: tuple[Difference, ...]
    environment: tuple[Difference, ...]
    other: tuple[Difference, ...]


def compare_facts(a: Recording, b: Recording) -> Facts:
    """Everything that two runs recorded besides what they computed. Raises RecordingError, ConfigError."""
    return Facts(
        seeds=differences(_seeds(a), _seeds(b)),
        config=differences(flatten(a.config.flat()), flatten(b.config.flat())),
        environment=differences(environment(a), environment(b)),
        other=differences(_other(a), _other(b)),
    )


def read_json(recording: Recording, name: str) -> Any:
    """A recorded JSON file; ``None`` where the recording has none of that name."""
    if name not in recording.digests:
        return None
    with recording.open(name) as path:
        return parse_json(path, name)


def environment(recording: Recording) -> dict[str, Leaf]:
    """The recorded environment by dotted name."""
    return flatten(read_json(recording, recorder.ENVIRONMENT) or {})


def flatten(value: Any, prefix: str = "") -> dict[str, Leaf]:
    """Nested values as JSON holds them by dotted name; objects inside lists are numbered."""
    if isinstance(value, Mapping):
        children: list[tuple[str, Any]] = [(str(name), child) for name, child in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(child, Mapping | list | tuple) for child in value):
        children = [(str(place), child) for place, child in enumerate(value)]
    else:
        return {} if value in ([], ()) else {prefix: _leaf(value)}
    flat: dict[str, Leaf] = {}
    for name, child in children:
        flat |= flatten(child, f"{prefix}.{name}" if prefix else name)
    return flat


def differences(a: Mapping[str, Leaf], b: Mapping[str, Leaf]) -> tuple[Difference, ...]:
    """The names whose values differ, in the order of ``a``, those that only ``b`` has last."""
    found = []
    for name in dict.fromkeys([*a, *b]):
        one, other = a.get(name), b.get(name)
        if one != other:
            found.append(Difference(name, *_sides(one, other)))
    return tuple(found)


def _sides(a: Leaf, b: Leaf) -> tuple[str | None, str | None]:
    if isinstance(a, tuple) and isinstance(b, tuple) and set(a) != set(b):
        only_a = tuple(item for item in a if item not in b)
        only_b = tuple(item for item in b if item not in a)
        return _joined(only_a) or None, _joined(only_b) or None
    return _joined(a), _joined(b)


def _joined(leaf: Leaf) -> str | None:
    return ", ".join(leaf) if isinstance(leaf, tuple) else leaf


def _leaf(value: Any) -> Leaf:
    if isinstance(value, list | tuple):
        return tuple(str(_leaf(item)) for item in value)
    if isinstance(value, str):
        lines = tuple(line.strip() for line in value.splitlines())
        return lines if len(lines) > 1 else value
    return None if value is None else json.dumps(value)


def _seeds(recording: Recording) -> dict[str, Leaf]:
    content = read_json(recording, recorder.SEEDS) or {}
    seeds = {"master_seed": _leaf(content.get("master_seed"))}
    for row in content.get("derivations", []):
        instance = row["instance_id"]
        seeds[row["component"] if instance is None else f"{row['component']}[{instance}]"] = _leaf(row["seed"])
    return seeds


def _other(recording: Recording) -> dict[str, Leaf]:
    described = dict(read_json(recording, DATA) or {})
    code = described.pop("code", None)
    groups = read_json(recording, recorder.GROUPS) or []
    named = {group["name"]: {name: value for name, value in group.items() if name != "name"} for group in groups}
    return {"code": _leaf(code)} | flatten(described, "data") | flatten(named, "parameter_groups")
