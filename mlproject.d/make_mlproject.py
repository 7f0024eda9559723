"""Writes ``MLproject`` from the stages' parameters: ``python mlproject.d/make_mlproject.py`` in the repository's root.

``tests/test_mlproject.py`` fails where the two differ.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The code beside this script, whatever is installed.
sys.path.insert(0, str(ROOT))

from tracked_replay.cli import STAGES
from tracked_replay.stages.parameters import fields_of

HEAD = "name: tracked_replay\n\npython_env: mlproject.d/python_env.yaml\n\nentry_points:"


def mlproject() -> str:
    """The content of the file."""
    lines = [HEAD]
    for stage, (model, _) in STAGES.items():
        fields = fields_of(model)
        lines += [f"  {stage}:", "    parameters:"]
        for name, field in fields.items():
            default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
            plain = default.replace("-", "").isalpha() and default not in ("true", "false")
            written = default if plain else f'"{default}"'
            lines.append(f"      {name}: {{type: string, default: {written}}}")
        options = " ".join(f"--{name.replace('_', '-')} {{{name}}}" for name in fields)
        command = f"python -m tracked_replay {stage} {options}"
        lines.append("    command: >-")
        indent = "      "
        lines += textwrap.wrap(command, 112, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "MLproject").write_text(mlproject(), encoding="utf-8")
