"""Component seeds, derived from one master seed by hashing."""

import hashlib
import operator
from typing import Any, SupportsIndex

from tracked_replay.errors import ConfigError


def _as_int(value: SupportsIndex, name: str) -> int:
    """Return ``value`` as a Python int; a bool, a float or a string raises ConfigError."""
    # bool is an int to Python, but "True_model" would be hashed where "1_model" is meant.
    if isinstance(value, bool):
        raise ConfigError(f"{name} must be an integer, found {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} must be an integer, found {value!r}") from None


def _hashed_string(master_seed: int, purpose: str, instance_id: str | int | None) -> str:
    """Return the text that is hashed, ``"{master}_{purpose}"`` or ``"{master}_{purpose}_{instance}"``."""
    master = _as_int(master_seed, "master_seed")
    if not isinstance(purpose, str) or not purpose:
        raise ConfigError(f"purpose must be a non-empty string, found {purpose!r}")
    if instance_id is None:
        return f"{master}_{purpose}"
    # 0 and "" are instance IDs like any other; only None means "no instance".
    instance = instance_id if isinstance(instance_id, str) else _as_int(instance_id, "instance_id")
    return f"{master}_{purpose}_{instance}"


def _seed_of(hashed: str) -> int:
    return int(hashlib.sha256(hashed.encode("utf-8")).hexdigest()[:8], 16) % 2**31


def derive_component_seed(master_seed: int, purpose: str, instance_id: str | int | None = None) -> int:
    """Derive the seed of one component from the master seed.

    The seed is the first 8 hexadecimal digits of ``SHA256("{master}_{purpose}[_{instance}]")``, modulo 2**31. It is
    the same on every platform and in every Python process, which ``hash()`` is not.

    Args:
        master_seed: the run's seed.
        purpose: what the component is for, for example ``"model"`` or ``"dataloader"``; not empty.
        instance_id: tells components of the same purpose apart. Components that must be identical share one.
            An integer and its decimal string are the same instance.

    Returns:
        An integer in ``[0, 2**31)``.

    Raises:
        ConfigError: ``master_seed`` is no integer, ``purpose`` is empty, or ``instance_id`` is of another type.
    """
    return _seed_of(_hashed_string(master_seed, purpose, instance_id))


class SeedDerivations:
    """Derives component seeds of one run and remembers each of them, in the order of first use.

    Args:
        master_seed: the run's seed.

    Raises:
        ConfigError: ``master_seed`` is no integer.
    """

    def __init__(self, master_seed: int) -> None:
        self._master_seed = _as_int(master_seed, "master_seed")
        self._records: dict[str, dict[str, Any]] = {}

    @property
    def master_seed(self) -> int:
        """The seed that all others are derived from."""
        return self._master_seed

    def derive(self, purpose: str, instance_id: str | int | None = None) -> int:
        """Derive a component's seed as `derive_component_seed` does, and record it the first time.

        Args:
            purpose: what the component is for; not empty.
            instance_id: tells components of the same purpose apart.

        Returns:
            An integer in ``[0, 2**31)``.

        Raises:
            ConfigError: an argument is not valid, or a component of another purpose is hashed from the same text, so
                that two components which are meant to be independent would draw the same numbers.
        """
        hashed = _hashed_string(self._master_seed, purpose, instance_id)
        known = self._records.get(hashed)
        if known is None:
            known = {"component": purpose, "instance_id": instance_id, "hashed": hashed, "seed": _seed_of(hashed)}
            self._records[hashed] = known
        elif known["component"] != purpose:
            # "a_b" without an instance and "a" with instance "b".
            raise ConfigError(
                f"component {purpose!r} (instance {instance_id!r}) would share its seed with {known['component']!r} "
                f"(instance {known['instance_id']!r}), both hashed from {hashed!r}: rename one of them"
            )
        return known["seed"]

    def to_json_dict(self) -> dict[str, Any]:
        """Return ``{"master_seed": ..., "derivations": [{"component", "instance_id", "hashed", "seed"}, ...]}``.

        The derivations stand in the order of first use. The result is a copy: changing it changes no record.
        """
        return {"master_seed": self._master_seed, "derivations": [dict(record) for record in self._records.values()]}
