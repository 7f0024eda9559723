"""No server, a server that answers with errors, and stores that are none."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from tracked_replay import cli
from tracked_replay.errors import RunError
from tracked_replay.tracking import require_server, server


class Failing(http.server.BaseHTTPRequestHandler):
    """Answers 500 whatever is asked."""

    def do_GET(self) -> None:
        self.send_error(500)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def failing() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Failing) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture
def nobody(store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address at which nothing listens."""
    monkeypatch.setattr(server, "SECONDS_BETWEEN", 0.01)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_nothing_at_the_address_is_said_without_the_password(nobody: str) -> None:
    mlflow.set_tracking_uri(f"http://me:secret@{nobody}")
    started = time.monotonic()
    with pytest.raises(
        RunError, match=rf"^MLFLOW_TRACKING_URI: found http://me:\*\*\*@{nobody}, where no server answers"
    ):
        require_server()
    assert time.monotonic() - started < 5


def test_a_command_without_a_server_ends_in_one_sentence(
    nobody: str, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr(cli, "_configure_logging", lambda _: None)
    mlflow.set_tracking_uri(f"http://{nobody}")
    with pytest.raises(SystemExit) as ended:
        cli.main(["train"])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: MLFLOW_TRACKING_URI: found http://")
    assert said.err.count("\n") == 1
    cli.main(["show_config"])
    assert "seed = 0" in capsys.readouterr().out


def test_what_a_server_answers_is_not_judged(failing: str, store: Path) -> None:
    mlflow.set_tracking_uri(f"http://{failing}")
    require_server()


def test_a_store_that_is_no_server_passes(store: Path) -> None:
    require_server()
