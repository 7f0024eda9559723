"""The benchmarks run at toy size, their rows reach MLflow, and the tables of the page can be written anew."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import measuring
import pytest
import run
from measuring import Row

FACTS = {"device": "cpu", "cpu": "a processor", "cores": 2, "torch": "2", "revision": "abc"}


def test_a_row_is_the_median_of_its_rounds_and_knows_its_goal() -> None:
    row = Row("key", "one ÷ other", [3.0, 1.0, 2.0], at_most=1.5)
    assert row.value == 2
    assert row.missed
    assert row.cells() == ("one ÷ other", "2.00", "1.00 to 3.00 in 3", "≤ 1.5 (missed)")
    assert Row(**json.loads(json.dumps(asdict(row)))).value == 2


def test_numbers_keep_three_digits() -> None:
    assert [measuring.shown(value) for value in (0.0123, 1.0049, 12.34, 999.4, 12345.6, 0, -0.5)] == [
        "0.0123",
        "1.00",
        "12.3",
        "999",
        "12,346",
        "0",
        "−0.500",
    ]


def test_works_are_timed_in_turn_and_every_other_round_backwards() -> None:
    order: list[str] = []
    times = measuring.in_turn({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert "".join(order) == "abbaab"
    assert [len(found) for found in times.values()] == [3, 3]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", [*run.BENCHMARKS, *run.ON_DEMAND])
def test_the_page_has_one_place_for_each_table(name: str, device: str) -> None:
    page = run.PAGE.read_text(encoding="utf-8")
    facts = FACTS | {"device": device, "gpu": "a GPU"}
    new = run.tables({name: [Row("key", "a new row", [1.0])]}, facts)
    once = run.with_tables(page, new)
    assert once.count("| a new row | 1.00 |  |  |") == 1
    assert run.with_tables(once, new) == once
    outside = [
        re.sub(rf"<!-- benchmark: {re.escape(marker)} -->.*?<!-- end -->", "", once, flags=re.S) for marker in new
    ]
    assert outside == [
        re.sub(rf"<!-- benchmark: {re.escape(marker)} -->.*?<!-- end -->", "", page, flags=re.S) for marker in new
    ]


def test_a_page_without_the_marker_is_refused() -> None:
    with pytest.raises(SystemExit, match="marked 'memory'"):
        run.with_tables("no marker", {"memory": "text"})


@pytest.mark.slow
def test_the_command_measures_logs_and_leaves_the_page_alone(store: Path) -> None:
    from mlflow.tracking import MlflowClient

    page = run.PAGE.read_bytes()
    environment = {**os.environ, "PYTHONPATH": str(run.ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db"}
    command = [sys.executable, str(run.HERE / "run.py"), "--quick", "--only", "replay_cost,budget"]
    subprocess.run(command, check=True, env=environment, cwd=store, timeout=500)
    assert run.PAGE.read_bytes() == page
    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name(run.EXPERIMENT).experiment_id])
    assert found.info.status == "FINISHED"
    assert {"cpu", "cores", "torch", "revision", "code_digest"} <= set(found.data.params)
    path = client.download_artifacts(found.info.run_id, "benchmarks.json", str(store))
    benchmarks = json.loads(Path(path).read_text(encoding="utf-8"))["benchmarks"]
    logged = {f"{name}/{row['key']}": row["value"] for name, rows in benchmarks.items() for row in rows}
    assert logged == found.data.metrics
    four = next(row for row in benchmarks["replay_cost"] if row["key"] == "4_targets")
    assert four["values"] == [all_of_them / step for step, all_of_them in zip(*four["raw"].values(), strict=True)]
    assert all(0 < row["value"] <= 1 for row in benchmarks["budget"])
    assert {item.path for item in client.list_artifacts(found.info.run_id)} == {
        "benchmarks.json",
        "benchmarks.png",
        "tables.md",
    }
