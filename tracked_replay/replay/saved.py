"""A replay under way, saved so that it can go on after an interruption with the same bits."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from tracked_replay.recording.files import content_digest, write_bytes
from tracked_replay.replay.adjoint import ClipCounts, Cotangent
from tracked_replay.replay.compiled import CompilingAdjoint
from tracked_replay.replay.scores import PER_STEP, STEPS_PER_FILE, PerStepWriter, ScoreSum
from tracked_replay.replay.traversal import Replay, StepScores
from tracked_replay.training.state import Tensors

FILE = "replay.saved"
METADATA = "replay"
KINDS = tuple(item.name for item in dataclasses.fields(Cotangent))


@dataclass(frozen=True)
class SavedReplay:
    """A replay's position and all it has found so far.

    Attributes:
        step: number of the state that it has come to.
        cotangents: ∂φ/∂ that state, one a target.
        scores: (targets, training examples) float64.
        absolute: (targets, steps) float64.
        held: steps that the per-step writer has not written yet.
        parts: number of per-step parts that it has.
        clips: what clipping did.
        compiled: whether its steps are compiled.
    """

    step: int
    cotangents: tuple[Cotangent, ...]
    scores: np.ndarray
    absolute: np.ndarray
    held: tuple[StepScores, ...]
    parts: int
    clips: ClipCounts
    compiled: bool

    def restore(self, total: ScoreSum, per_step: PerStepWriter, clips: ClipCounts) -> None:
        """Put the sums and counts back."""
        total.scores[:], total.absolute[:] = self.scores, self.absolute
        per_step.held, per_step.parts = list(self.held), self.parts
        for item in dataclasses.fields(clips):
            setattr(clips, item.name, getattr(self.clips, item.name))


def save_replay(
    folder: Path, replay: Replay, total: ScoreSum, per_step: PerStepWriter, adjoint: CompilingAdjoint
) -> None:
    """Write ``replay.saved`` into a folder, in place of an earlier one."""
    tensors: Tensors = {"scores": torch.from_numpy(total.scores), "absolute": torch.from_numpy(total.absolute)}
    for place, cotangent in enumerate(replay.cotangents):
        for kind in KINDS:
            for name, tensor in getattr(cotangent, kind).items():
                tensors[f"cotangents/{place}/{kind}/{name}"] = (
                    tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                )
    for step in per_step.held:
        tensors[f"held/{step.step}/indices"] = torch.from_numpy(np.ascontiguousarray(step.indices))
        tensors[f"held/{step.step}/scores"] = torch.from_numpy(np.ascontiguousarray(step.scores))
    facts = {
        "step": replay.step,
        "targets": len(replay.cotangents),
        "parts": per_step.parts,
        "held": [step.step for step in per_step.held],
        "clips": dataclasses.asdict(adjoint.clips),
        "compiled": adjoint.compiled,
    }
    content = safetensors.torch.save(tensors, metadata={METADATA: json.dumps(facts)})
    # The digest stands before the content: a file that was cut short, or put together from two, is not used.
    write_bytes(folder / FILE, f"{content_digest(content)}\n".encode() + content)


def load_replay(folder: Path, device: torch.device | str) -> SavedReplay | None:
    """Read what :func:`save_replay` wrote; None where there is nothing, or nothing whole."""
    path = folder / FILE
    if not path.is_file():
        return None
    digest, _, content = path.read_bytes().partition(b"\n")
    if content_digest(content).encode() != digest:
        return None
    facts = _metadata(content)
    if not all(_is_whole(folder / PER_STEP / f"part-{part:05d}.parquet", facts) for part in range(facts["parts"])):
        return None
    tensors = safetensors.torch.load(content)
    cotangents = tuple(
        Cotangent(*(_under(tensors, f"cotangents/{place}/{kind}/", device) for kind in KINDS))
        for place in range(facts["targets"])
    )
    held = tuple(
        StepScores(step, tensors[f"held/{step}/indices"].numpy(), tensors[f"held/{step}/scores"].numpy())
        for step in facts["held"]
    )
    return SavedReplay(
        facts["step"],
        cotangents,
        tensors["scores"].numpy(),
        tensors["absolute"].numpy(),
        held,
        facts["parts"],
        ClipCounts(**facts["clips"]),
        facts["compiled"],
    )


def _is_whole(part: Path, facts: dict) -> bool:
    """Whether a part of the scores step by step is all there; a power cut can take what was written before the save."""
    try:
        return bool(pq.read_metadata(part).num_rows == STEPS_PER_FILE * facts["targets"])
    except (pa.ArrowException, OSError):
        return False


def _under(tensors: Tensors, prefix: str, device: torch.device | str) -> Tensors:
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name: tensor.to(device) for name, tensor in found.items()}


def _metadata(content: bytes) -> dict:
    length = int.from_bytes(content[:8], "little")  # safetensors' own layout: length of the header, header, tensors
    header = json.loads(content[8 : 8 + length])
    facts: dict = json.loads(header["__metadata__"][METADATA])
    return facts
