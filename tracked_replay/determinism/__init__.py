"""Determinism of one process: seeds, generator states, sampler and loaders, flags, environment, self-test.

The lowest layer of the package: it imports nothing of the others but the errors.
"""

from tracked_replay.determinism._components import (
    create_deterministic_loader,
    create_deterministic_model,
    create_deterministic_optimizer,
    create_deterministic_scheduler,
    seed_worker,
    set_loader_epoch,
)
from tracked_replay.determinism._environment import environment_record
from tracked_replay.determinism._generators import (
    GeneratorStates,
    capture_generator_states,
    deterministic_context,
    generator_state_steps,
    load_generator_states,
    restore_generator_states,
    save_generator_states,
)
from tracked_replay.determinism._process import (
    Reproducibility,
    deterministic_flags,
    require_deterministic,
    set_global_deterministic_state,
)
from tracked_replay.determinism._sampler import DeterministicSampler
from tracked_replay.determinism._seeds import SeedDerivations, derive_component_seed
from tracked_replay.determinism._self_test import SelfTest, verify_reproducibility

__all__ = [
    "DeterministicSampler",
    "GeneratorStates",
    "Reproducibility",
    "SeedDerivations",
    "SelfTest",
    "capture_generator_states",
    "create_deterministic_loader",
    "create_deterministic_model",
    "create_deterministic_optimizer",
    "create_deterministic_scheduler",
    "derive_component_seed",
    "deterministic_context",
    "deterministic_flags",
    "environment_record",
    "generator_state_steps",
    "load_generator_states",
    "require_deterministic",
    "restore_generator_states",
    "save_generator_states",
    "seed_worker",
    "set_global_deterministic_state",
    "set_loader_epoch",
    "verify_reproducibility",
]
