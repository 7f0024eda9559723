"""Every command of the README and of the docs is run as it stands there, page by page, by a shell in a clone.

The clone is a copy of what a reader has, with one change: its presets are tiny. Placeholders such as TRAIN_RUN_ID stand
for runs that were made before. Programs are forks of a process that has imported everything; the README's first command
is run by programs of its own in test_mlflow_run.py. A command that is not run here stands in ``RUN_ELSEWHERE`` with
where it is run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep

import pytest
import tomli_w
from clones import ROOT, copy_project
from forked_commands import forked_commands
from test_docs import PAGES

from tracked_replay.cli import STAGES
from tracked_replay.config import preset_names

DATA = os.environ.get("TRACKED_REPLAY_DATA_ROOT", "")
TINY = {
    "data": {"train_examples": 140, "evaluation_examples": 36},
    "model": {"width": 0.125},
    "train": {"epochs": 2, "batch_size": 70, "device": "cpu", "threads": 1},
    "record": {"every": 1},
    "lds": {"subsets": 3, "resamples": 100},
}
RUN_ELSEWHERE = {
    r"pip install \.( &&)?": "`.ci/run` gives the README's second command, which installs the package",
    r'pip install "\.\[test\]" && python -m pytest -n 2': "what runs this",
    r"mlflow ui": "tests/browser starts it and looks at its pages",
    r"python -m pytest tests/.*": "what runs this",
    r"python docs/make_report_picture\.py .*": "needs a browser; tests/browser takes pictures the same way",
    r"PYTHONPATH=\. python tests/benchmarks/(run\.py|run\.py --only \S+|\w+\.py)": "`run.py --quick` runs each of them",
    r".* --device cuda.*": "needs a GPU",
    r"python -m venv peers && \. peers/bin/activate": "needs other libraries, gigabytes",
    r"pip install \. && pip install -r tests/benchmarks/peers_requirements.txt": "needs other libraries, gigabytes",
    r"PYTHONPATH=\. python tests/benchmarks/peers\.py .*": "needs other libraries, gigabytes",
}
MAKE_RUNS = """
import json
import tracked_replay as tr
from tracked_replay.stages.reproduce import run_reproduce

config = tr.Config.resolve("digits")
trained = [tr.train(config, force=True) for _ in range(3)]
magic = [tr.magic(trained[0], "0-9;mean:all", force=True) for _ in range(2)]
json.dump(
    {
        "TRAIN_RUN_ID": trained[0], "ANOTHER_TRAIN_RUN_ID": trained[1], "OTHER_RUN_ID": trained[1],
        "SECOND_RUN_ID": trained[1], "THIRD_RUN_ID": trained[2],
        "MAGIC_RUN_ID": magic[0], "OTHER_MAGIC_RUN_ID": magic[1],
        "SUSPECTS_RUN_ID": tr.suspects(trained[0]), "REPRODUCE_RUN_ID": run_reproduce(trained[0]).run_id,
    },
    open("runs.json", "w"),
)
"""
# Pages that remove a run or make their own: RUN_ID is that of the newest training.
NEWEST_PAGES = (
    "docs/how-to/clean-up.md",
    "docs/how-to/remote-server.md",
    "docs/how-to/resume.md",
    "docs/troubleshooting.md",
)
REAL_PROGRAMS = ("docs/how-to/resume.md",)  # a command is killed there
NEWEST = """
import mlflow

stage = "tags.`tracked_replay.stage` = 'train' and status = 'FINISHED'"
print(mlflow.search_runs(filter_string=stage, search_all_experiments=True, output_format="list")[0].info.run_id)
"""


class Page:
    """A page's commands in their order, as one script for bash."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.relative_to(ROOT).as_posix()
        self.files: dict[str, str] = {}
        self.lines: list[str] = []
        self.elsewhere: set[str] = set()
        self.on_cifar10: list[str] = []
        if self.name == "docs/reference.md":  # its code is signatures
            return
        found = re.finditer(
            r"^(?:<!-- (?P<marker>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<block>.*?)^```|`(?P<inline>[^`\n]+)`",
            path.read_text(encoding="utf-8"),
            re.DOTALL | re.MULTILINE,
        )
        for number, piece in enumerate(found):
            marker = piece["marker"] or ""
            if piece["inline"]:
                if is_command(piece["inline"]):
                    self._add(piece["inline"])
            elif marker.startswith("file: "):
                self.files[marker.removeprefix("file: ")] = piece["block"]
            elif piece["language"] == "python" and not marker:
                self.files[f"block{number}.py"] = f"from given import *\n{piece['block']}"
                self.lines.append(f"python block{number}.py")
            elif piece["language"] == "bash":
                for line in piece["block"].replace("\\\n", " ").splitlines():
                    self._add(line)

    def _add(self, line: str) -> None:
        command = re.sub(r"(^|\s+)#.*", "", line)
        reason = next((pattern for pattern in RUN_ELSEWHERE if re.fullmatch(pattern, command)), None)
        if reason is not None:
            self.elsewhere.add(reason)
        elif re.search(r"\bDATA\b", command):
            self.on_cifar10.append(command)
        elif command:
            self.lines.append(command)


def is_command(code: str) -> bool:
    """Whether code inside a sentence is a whole command, and not the name of one."""
    ours = re.match(r"(?:tracked-replay|python -m tracked_replay|mlflow run \. -e) (\w+) \S", code)
    if ours is not None:
        return ours[1] in STAGES and "…" not in code
    return re.match(r"mlflow (runs|gc)\b|python (docs|tests|-m pytest)\b", code) is not None


WRITTEN = {page.name: page for page in map(Page, PAGES)}


@dataclass(frozen=True)
class Clone:
    """The project in a folder of its own.

    Attributes:
        folder: its root.
        programs: folder of programs that start at once.
        runs: run IDs by placeholder.
    """

    folder: Path
    programs: Path
    runs: dict[str, str] = field(default_factory=dict)

    def run(self, script: str, *, real: bool = False) -> str:
        """Run lines of bash in it, as in an activated environment; what they print.

        Args:
            script: the lines; the first that fails ends it.
            real: whether programs are started and not forked.
        """
        environment = environment_of(self.folder)
        if not real:
            environment["PATH"] = f"{self.programs}{os.pathsep}{environment['PATH']}"
        done = subprocess.run(
            ["bash", "-exo", "pipefail", "-c", script],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=570,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        assert "Traceback" not in done.stdout, done.stdout
        return done.stdout

    def artifacts(self, placeholder: str) -> Path:
        """Where a run's artifacts are."""
        from mlflow.tracking import MlflowClient

        run = MlflowClient(f"sqlite:///{self.folder}/mlflow.db").get_run(self.runs[placeholder])
        return Path(run.info.artifact_uri.removeprefix("file://"))


def environment_of(folder: Path) -> dict[str, str]:
    """An activated environment of somebody who has set nothing else, and whose home is in the folder."""
    clean = {name: value for name, value in os.environ.items() if not re.match("MLFLOW_|TRACKED_REPLAY_|XDG_", name)}
    return clean | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),  # the clone, and not what is installed
        "HOME": str(folder / "home"),
        "MPLCONFIGDIR": str(folder.parent / "matplotlib"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """The project with tiny presets, and the runs that placeholders stand for."""
    folder = copy_project(tmp_path_factory.mktemp("clone") / "tracked_replay")
    (folder / "home").mkdir()
    for name in preset_names():
        preset = folder / f"tracked_replay/presets/{name}.toml"
        values = tomllib.loads(preset.read_text(encoding="utf-8"))
        for group, changes in TINY.items():
            values[group] |= changes
        preset.write_text(tomli_w.dumps(values), encoding="utf-8")
    for name in ("docs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "newest.py").write_text(NEWEST, encoding="utf-8")
    (folder / "make_runs.py").write_text(MAKE_RUNS, encoding="utf-8")
    with TemporaryDirectory() as short, forked_commands(Path(short), environment_of(folder)) as programs:
        made = Clone(folder, programs)
        made.run("python make_runs.py")
        made.runs.update(json.loads((folder / "runs.json").read_text(encoding="utf-8")))
        give_files(made)
        yield made


def give_files(clone: Clone) -> None:
    """The files that commands name, in the clone."""
    folder = clone.folder
    checkpoint = clone.artifacts("TRAIN_RUN_ID") / "checkpoints/step-000001.safetensors"
    for place in (folder, folder / "FOLDER", folder / "OTHER_FOLDER"):
        place.mkdir(exist_ok=True)
        for letter in "ab":
            shutil.copy(checkpoint, place / f"{letter}.safetensors")
    shutil.copy(clone.artifacts("REPRODUCE_RUN_ID") / "compare/certificate.json", folder)
    (folder / "indices.txt").write_text("3\n17\n", encoding="utf-8")
    (folder / "weights.json").write_text('{"3": 0, "17": 2.5}', encoding="utf-8")
    names = {"run_a": "TRAIN_RUN_ID", "run_b": "OTHER_RUN_ID", "train_run": "TRAIN_RUN_ID"}
    lines = ["import tracked_replay as tr", *(f"{name} = {clone.runs[run]!r}" for name, run in names.items())]
    (folder / "given.py").write_text("\n".join(lines), encoding="utf-8")


def placed(page: Page, lines: list[str], clone: Clone) -> str:
    """A page's script with what its placeholders stand for."""
    runs = clone.runs | {"RUN_ID": "$newest" if page.name in NEWEST_PAGES else clone.runs["TRAIN_RUN_ID"]}
    if page.name in NEWEST_PAGES:
        first = next(number for number, line in enumerate(lines) if re.search(r"\bRUN_ID\b", line))
        trained = any(line.startswith("tracked-replay train") for line in lines[:first])
        more = (
            ["newest=$(python newest.py)"]
            if trained
            else ["tracked-replay train --force", "newest=$(python newest.py)"]
        )
        lines = [*lines[:first], *more, *lines[first:]]
    script = "\n".join(lines)
    for name, run_id in runs.items():
        script = re.sub(rf"\b(?<!\$){name}\b", run_id, script)
    script = re.sub(r"\bDATA\b", DATA, script)
    script = script.replace("sleep 40", "sleep 6").replace("path/to/report/index.html", "report/index.html")
    return f"REFERENCE_RUN={runs['TRAIN_RUN_ID']}\n{script}"


@contextmanager
def servers(script: str, folder: Path) -> Iterator[str]:
    """Start the tracking server that a script begins with, on a free port; the rest of the script."""
    first, _, rest = script.partition("\n")[2].partition("\n")
    if not first.startswith("mlflow server "):
        yield script
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", *first.replace("5000", port).split()]
    with subprocess.Popen(
        command, cwd=folder, env=environment_of(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/health")
            yield rest.replace("5000", port)
        finally:
            server.terminate()


def wait_for(address: str) -> None:
    started = monotonic()
    while monotonic() - started < 60:
        try:
            with urllib.request.urlopen(address, timeout=5):  # noqa: S310
                return
        except (urllib.error.URLError, ConnectionError):
            sleep(0.2)
    raise AssertionError(f"nothing answers at {address}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, page in WRITTEN.items() if page.lines])
def test_the_commands_of_a_page_run_from_top_to_bottom(name: str, clone: Clone) -> None:
    page = WRITTEN[name]
    for file, content in page.files.items():
        (clone.folder / file).write_text(content, encoding="utf-8")
    with servers(placed(page, page.lines, clone), clone.folder) as script:
        clone.run(script, real=name in REAL_PROGRAMS)


@pytest.mark.slow
@pytest.mark.cifar
@pytest.mark.skipif(not DATA, reason="TRACKED_REPLAY_DATA_ROOT names no folder with CIFAR-10")
@pytest.mark.parametrize("name", [name for name, page in WRITTEN.items() if page.on_cifar10])
def test_the_commands_of_a_page_that_need_cifar10_run(name: str, clone: Clone) -> None:
    page = WRITTEN[name]
    clone.run(placed(page, page.on_cifar10, clone))


def test_what_is_run_elsewhere_is_written_somewhere() -> None:
    assert set(RUN_ELSEWHERE) == set().union(*(page.elsewhere for page in WRITTEN.values()))
