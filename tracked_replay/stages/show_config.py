"""Stage ``show_config``: the resolved config, with what each field takes; runs nothing."""

from __future__ import annotations

from tracked_replay.config import Config, allowed, field_info
from tracked_replay.errors import ConfigError


def describe(config: Config) -> str:
    """The config as TOML, each field with its meaning and what it allows.

    The text is a complete preset file: saved under a name that ends in ``.toml`` it can be given as ``preset``. In such
    a file ``data.root`` may be empty.

    Raises:
        ConfigError: ``data.root`` is given, but is no folder that holds the task's data.
        DataError: torchvision, which knows what the folder must hold, cannot be imported.
    """
    _require_data_root(config)
    lines: list[str] = []
    section = ""
    toml = dict(line.split(" = ", 1) for line in _plain_lines(config))
    for name in config.flat():
        group, _, field = name.rpartition(".")
        if group != section:
            lines += ["", f"[{group}]"]
            section = group
        lines.append(f"{field} = {toml[name]}  # {field_info(name).description}; allowed: {allowed(name)}")
    return "\n".join(lines) + "\n"


def _require_data_root(config: Config) -> None:
    """Refuse a folder that a training would refuse, in its words. The data themselves are not read."""
    if config.data.task != "cifar10" or not config.data.root or config.data.download:
        return
    # Imported here: other configs are shown without torch, which takes seconds to load.
    from tracked_replay.tasks import missing_cifar10

    why = missing_cifar10(config.data.root)
    if why:
        raise ConfigError(f"data.root: found {config.data.root!r}; {why}")


def _plain_lines(config: Config) -> list[str]:
    """``section.field = value`` with the value in TOML notation."""
    lines, section = [], ""
    for line in config.to_toml().splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
        elif line:
            lines.append(section + line)
    return lines
