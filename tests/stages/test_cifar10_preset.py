"""The preset `cifar10-small` on the real CIFAR-10, cut to a few steps."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import tracked_replay as tr

DATA_ROOT = os.environ.get("TRACKED_REPLAY_DATA_ROOT", "")


@pytest.mark.cifar
@pytest.mark.slow
@pytest.mark.skipif(not DATA_ROOT, reason="TRACKED_REPLAY_DATA_ROOT does not name a folder with the real CIFAR-10")
def test_magic_on_real_images(store: Path) -> None:
    from mlflow.artifacts import download_artifacts

    overrides = "train.epochs=2,data.train_examples=300,data.evaluation_examples=50,train.batch_size=100"
    config = tr.Config.resolve("cifar10-small", data_root=DATA_ROOT, overrides=overrides)
    run = tr.magic(targets="0-1", config=config)
    table = tr.load_scores(run)
    scores = table["score"].to_numpy().reshape(2, 300)
    assert np.isfinite(scores).all()
    assert np.count_nonzero(scores) == scores.size  # every image was in a batch of each epoch
    # The first ten labels of data_batch_1 and of test_batch, as published.
    assert table["label"].to_pylist()[:10] == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    figures = Path(download_artifacts(run_id=run, artifact_path="figures"))
    assert (figures / "target-0-extremes.png").read_bytes().startswith(b"\x89PNG")
