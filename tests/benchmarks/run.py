"""All benchmarks: measure, log to MLflow, and bring the tables of docs/benchmarks.md up to date.

    PYTHONPATH=. python tests/benchmarks/run.py [--only replay_cost,memory] [--quick] [--device cuda]

Each benchmark runs in a process of its own. The result is a run of the experiment `benchmarks`: parameters say what
machine and code it was, metrics are the medians, and among the artifacts are a figure, the tables and all rounds.
`--quick` runs everything at toy size and leaves the page alone. `compiled` is run where `--only` names it. The
comparison with other packages, `peers`, is run where these are installed; what it writes becomes an artifact as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlflow
import psutil
import torch
from figure import picture
from measuring import Row

from tracked_replay.determinism import environment_record
from tracked_replay.tracking import code_digest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PAGE = ROOT / "docs/benchmarks.md"
EXPERIMENT = "benchmarks"
BENCHMARKS = ("replay_cost", "recording_overhead", "scaling", "memory", "budget", "lds_throughput")
ON_DEMAND = ("compiled",)  # minutes and a C++ compiler for one number, which decided a design
PEERS = "peers"
PEER_MODULES = ("dattri", "kronfluence", "trak")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = (*BENCHMARKS, *((PEERS,) if all(map(importlib.util.find_spec, PEER_MODULES)) else ()))
    available = (*everything, *ON_DEMAND)
    parser.add_argument("--only", default=",".join(everything), help=f"with commas between: {', '.join(available)}")
    parser.add_argument("--quick", action="store_true", help="toy sizes; docs/benchmarks.md is left alone")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    options = parser.parse_args()
    chosen = options.only.split(",")
    unknown = [name for name in chosen if name not in available]
    if unknown:
        hint = f"; {PEERS} needs packages of its own, see tests/benchmarks/peers.py" if PEERS in unknown else ""
        raise SystemExit(f"--only: found {unknown[0]!r}; allowed: {', '.join(available)}{hint}")
    mlflow.set_experiment(EXPERIMENT)
    with mlflow.start_run(run_name=f"benchmarks{' (quick)' if options.quick else ''}"):
        run(chosen, options.device, quick=options.quick)


def run(chosen: Sequence[str], device: str, *, quick: bool) -> None:
    """Measure, log to the active run after each benchmark, and write the page. SystemExit where one failed."""
    facts = machine_facts(device)
    mlflow.log_params(facts | {"quick": quick, "benchmarks": ",".join(chosen)})
    rows: dict[str, list[Row]] = {}
    failed = []
    for name in chosen:
        print(f"== {name}", flush=True)
        try:
            if name == PEERS:
                run_peers(quick=quick)
                continue
            rows[name] = measured(name, device, quick=quick)
        except subprocess.CalledProcessError as error:
            failed.append(f"{name} (status {error.returncode})")
            continue
        log(rows, facts)
        mlflow.log_metrics({f"{name}/{row.key}": row.value for row in rows[name]})
        if not quick:
            PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables(rows, facts)), encoding="utf-8")
    missed = [f"{name}: {row.what}" for name, found in rows.items() for row in found if row.missed]
    if missed:
        print("not as good as promised:", *missed, sep="\n  ")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def measured(name: str, device: str, *, quick: bool) -> list[Row]:
    """Rows of a benchmark that is run in a process of its own. Raises CalledProcessError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        run_script(name, "--rows", str(path), "--device", device, *(["--quick"] if quick else []))
        return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def run_peers(*, quick: bool) -> None:
    """Log what the comparison with other packages writes. Raises CalledProcessError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{PEERS}.json")
        run_script(PEERS, "--out", str(path), *(["--quick"] if quick else []))
        mlflow.log_artifact(str(path))


def run_script(name: str, *arguments: str) -> None:
    """Run a benchmark's script. Raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, str(HERE / f"{name}.py"), *arguments], check=True)


def machine_facts(device: str) -> dict[str, object]:
    """What the numbers depend on besides their parameters."""
    found = environment_record()
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name() if device != "cpu" else "",
        "cpu": found["cpu"]["model"],
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "threads_of_torch": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "revision": revision(),
        "code_digest": code_digest(),
    }


def revision() -> str:
    """The checkout's commit, and whether what is measured was changed since; empty outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "tracked_replay", "tests/benchmarks")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def log(rows: Mapping[str, Sequence[Row]], facts: Mapping[str, object]) -> None:
    """Log everything measured so far, in place of what was logged before, so that an interruption loses little."""
    everything = {name: [vars(row) | {"value": row.value} for row in found] for name, found in rows.items()}
    mlflow.log_dict({"machine": dict(facts), "benchmarks": everything}, "benchmarks.json")
    mlflow.log_text("\n\n".join(f"## {name}\n\n{table}" for name, table in tables(rows, facts).items()), "tables.md")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "benchmarks.png")
        picture(rows).savefig(path, dpi=120)
        mlflow.log_artifact(str(path))


def tables(rows: Mapping[str, Sequence[Row]], facts: Mapping[str, object]) -> dict[str, str]:
    """The text between the markers of the page, by the marker's name."""
    on_cpu = facts["device"] == "cpu"
    return {name if on_cpu else f"{name} on a GPU": table(name, found, facts) for name, found in rows.items()}


def table(name: str, rows: Sequence[Row], facts: Mapping[str, object]) -> str:
    """Machine, sizes, command and rows of a benchmark, in Markdown."""
    on_cpu = facts["device"] == "cpu"
    machine = f"{facts['cpu']}, {facts['cores']} cores" if on_cpu else str(facts["gpu"])
    option = "" if on_cpu else f" --device {facts['device']}"
    lines = [
        f"{machine}, torch {facts['torch']}, revision {facts['revision'] or 'unknown'}.{_common(rows)}",
        "",
        "```bash",
        f"PYTHONPATH=. python tests/benchmarks/{name}.py{option}",
        "```",
        "",
        "| what | median | rounds | goal |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(row.cells())} |" for row in rows)])


def _common(rows: Sequence[Row]) -> str:
    """A sentence of the sizes that all rows share."""
    sized = [row.parameters for row in rows if row.parameters] or [{}]
    common = [(key, value) for key, value in sized[0].items() if all(key in one and one[key] == value for one in sized)]
    sizes = [f"{key} {value}" for key, value in common]
    return f" Sizes: {', '.join(sizes)}." if sizes else ""


def with_tables(page: str, new: Mapping[str, str]) -> str:
    """A page with other text between its markers. SystemExit where one is missing."""
    for name, text in new.items():
        marked = re.compile(rf"(?<=<!-- benchmark: {re.escape(name)} -->\n).*?(?=<!-- end -->)", re.DOTALL)
        if len(marked.findall(page)) != 1:
            raise SystemExit(f"docs/benchmarks.md: found no place, or several, marked {name!r}; allowed: one")
        page = marked.sub(f"\n{text}\n\n".replace("\\", r"\\"), page)
    return page


if __name__ == "__main__":
    main()
