"""Stage ``show_config``: the resolved config, with what each field takes; runs nothing."""

from __future__ import annotations

from tracked_replay.config import Config, allowed, field_info


def describe(config: Config) -> str:
    """The config as TOML, each field with its meaning and what it allows.

    The text is a complete preset file: saved under a name that ends in ``.toml`` it can be given as ``preset``.
    """
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


def _plain_lines(config: Config) -> list[str]:
    """``section.field = value`` with the value in TOML notation."""
    lines, section = [], ""
    for line in config.to_toml().splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
        elif line:
            lines.append(section + line)
    return lines
