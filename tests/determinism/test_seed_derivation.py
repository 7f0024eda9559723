import hashlib
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from tracked_replay.determinism import SeedDerivations, derive_component_seed
from tracked_replay.errors import ConfigError


def _by_bytes(text: str) -> int:
    # The first 8 hexadecimal digits are the first 4 bytes, big-endian; modulo 2**31 drops the top bit.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") & 0x7FFFFFFF


@pytest.mark.parametrize(
    ("master", "purpose", "instance", "text", "seed"),
    [
        (42, "model", None, "42_model", 1840589084),
        (42, "model", "shared_training", "42_model_shared_training", 828413901),
        (42, "dataloader", 0, "42_dataloader_0", 1368563339),
        (0, "optimizer", "", "0_optimizer_", 640698964),
        (-7, "epoch", 12, "-7_epoch_12", 1701040871),
    ],
)
def test_a_seed_is_the_first_hex_digits_of_the_sha256(master, purpose, instance, text, seed):
    assert derive_component_seed(master, purpose, instance) == seed
    assert _by_bytes(text) == seed


def test_seeds_lie_within_31_bits():
    # Without the modulo about half of these would be larger.
    assert all(0 <= derive_component_seed(1, "p", instance) < 2**31 for instance in range(200))


def test_purposes_and_instances_have_seeds_of_their_own():
    names = [("model", None), ("model", "a"), ("model", "b"), ("model", 0), ("optimizer", "a"), ("optimizer", None)]
    assert len({derive_component_seed(42, *name) for name in names}) == len(names)


def test_a_numpy_integer_is_an_integer():
    assert derive_component_seed(np.int64(42), "model", np.int32(3)) == derive_component_seed(42, "model", "3")


def test_seeds_do_not_depend_on_the_process():
    code = "from tracked_replay.determinism._seeds import derive_component_seed as d; print(d(42, 'model', 'x'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == derive_component_seed(42, "model", "x")


@pytest.mark.parametrize(
    "arguments",
    [
        ("42", "model"),
        (4.0, "model"),
        (True, "model"),
        (None, "model"),
        (42, ""),
        (42, 3),
        (42, "m", 1.5),
        (42, "m", True),
    ],
)
def test_arguments_that_would_be_hashed_by_accident_are_refused(arguments):
    with pytest.raises(ConfigError):
        derive_component_seed(*arguments)


def test_a_thousand_derivations_take_at_most_ten_milliseconds():
    def seconds() -> float:
        start = time.perf_counter()
        for instance in range(1000):
            derive_component_seed(42, "model", instance)
        return time.perf_counter() - start

    # The best of a few: another process on the machine is not what is measured.
    assert min(seconds() for _ in range(10)) <= 0.010


def test_derivations_are_recorded_once_each_in_order():
    derivations = SeedDerivations(42)
    first = derivations.derive("model", "shared_training")
    second = derivations.derive("dataloader", 3)
    assert derivations.derive("model", "shared_training") == first
    third = derivations.derive("optimizer")
    expected = {
        "master_seed": 42,
        "derivations": [
            {
                "component": "model",
                "instance_id": "shared_training",
                "hashed": "42_model_shared_training",
                "seed": _by_bytes("42_model_shared_training"),
            },
            {"component": "dataloader", "instance_id": 3, "hashed": "42_dataloader_3", "seed": second},
            {"component": "optimizer", "instance_id": None, "hashed": "42_optimizer", "seed": third},
        ],
    }
    assert derivations.to_json_dict() == expected
    assert json.loads(json.dumps(derivations.to_json_dict())) == expected


def test_a_changed_json_dict_changes_no_record():
    derivations = SeedDerivations(1)
    derivations.derive("model")
    derivations.to_json_dict()["derivations"][0]["seed"] = -1
    assert derivations.to_json_dict()["derivations"][0]["seed"] == _by_bytes("1_model")


def test_two_components_hashed_from_one_text_are_refused():
    derivations = SeedDerivations(42)
    derivations.derive("model_a")
    with pytest.raises(ConfigError, match="42_model_a"):
        derivations.derive("model", "a")
