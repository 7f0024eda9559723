"""Made-up influence pages for the tests of the report and of the browser: no training behind them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tracked_replay.report import (
    Agreement,
    Fact,
    InfluencePage,
    InfluenceTarget,
    InfluentialExample,
    Picture,
    Prediction,
    RetrainedTarget,
    Validation,
    class_influence,
)

LABELS = ("cat", "dog", "frog")
RUN = "5cd38b38eb1346f3b27aba569f815c29"


def pixels(seed: int, side: int = 8, channels: int = 3) -> np.ndarray:
    """Noise: it compresses worse than any image."""
    shape = (side, side, 3) if channels == 3 else (side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def example(index: int, score: float, label: str = "cat", *, side: int = 8, steps: int = 30) -> InfluentialExample:
    """A training example whose score builds up in equal parts over the steps 2 to `steps` − 3."""
    along = np.cumsum(np.where((np.arange(steps) > 1) & (np.arange(steps) < steps - 2), score / (steps - 4), 0.0))
    return InfluentialExample(Picture(pixels(index, side), label, index, score), along)


def target(index: int = 21, *, shown: int = 4, count: int = 300, label: str = "cat", **changes: Any) -> InfluenceTarget:
    """A target of one evaluation example; its strongest training examples are those of its scores."""
    scores = np.random.default_rng(index).normal(size=count) * 1e-2
    scores[5] = 0.0
    order = np.argsort(scores)
    given: dict[str, Any] = {
        "key": str(index),
        "name": str(index),
        "measurement": 0.345,
        "pictures": [Picture(pixels(10_000 + index), label, index)],
        "size": 1,
        "prediction": Prediction("dog", False, 0.63),
        "helpful": [example(int(i), float(scores[i]), LABELS[int(i) % 3]) for i in order[:shown]],
        "harmful": [example(int(i), float(scores[i]), LABELS[int(i) % 3]) for i in order[::-1][:shown]],
        "scores": scores,
        "absolute": np.linspace(2.0, 0.0, 30),
    }
    return InfluenceTarget(**(given | changes))


def mean_target(**changes: Any) -> InfluenceTarget:
    """A target that is a mean over ten evaluation examples, of which six are shown."""
    given: dict[str, Any] = {
        "key": "combination-1",
        "name": "mean:0-9",
        "pictures": [Picture(pixels(20_000 + index), LABELS[index % 3], index) for index in range(6)],
        "size": 10,
        "prediction": None,
    }
    return target(77, **(given | changes))


def retrained(subsets: int = 20, spearman: float = 0.91) -> RetrainedTarget:
    """Outcomes of made-up retrainings."""
    predicted = 0.345 + 1e-3 * np.random.default_rng(3).normal(size=subsets)
    return RetrainedTarget(0.01, predicted, predicted + 1e-4, spearman)


def validation(lds: float = 0.996, **changes: Any) -> Validation:
    """A validation with 64 retrainings at one share."""
    given: dict[str, Any] = {
        "agreements": [
            Agreement(0.01, "magic", lds, 0.993, 0.997, 64),
            Agreement(0.01, "random", -0.053, -0.142, 0.039, 64),
        ],
        "confidence": 0.95,
        "smoothness": "Metasmoothness 0.95: the training is smooth along this removal.",
    }
    return Validation(**(given | changes))


def page(**changes: Any) -> InfluencePage:
    """A page of three targets."""
    targets = changes.get("targets", [target(21), target(3, prediction=Prediction("cat", True)), mean_target()])
    labels = np.arange(len(targets[0].scores)) % len(LABELS)
    scores = np.stack([one.scores for one in targets])
    own: list[int | str] = [one.name if one.size > 1 else 0 for one in targets]
    given: dict[str, Any] = {
        "task": "Animals",
        "targets": targets,
        "targets_in_all": len(targets),
        "training_examples": len(labels),
        "steps": 30,
        "accuracy": 0.961,
        "is_loss": True,
        "exact": True,
        "classes": class_influence(scores, labels, own, LABELS),
        "validation": None,
        "validate_command": f"tracked-replay lds --magic-run-id {RUN}",
        "facts": [Fact("Influence run", RUN), Fact("Master seed", "0", "all others are derived from it")],
        "links": {RUN: f"http://127.0.0.1:5000/#/experiments/0/runs/{RUN}"},
    }
    return InfluencePage(**(given | changes))
