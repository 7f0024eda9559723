"""What a training run leaves behind, as plain files: trace, checkpoints, seeds, generator states, digests."""

from tracked_replay.recording.checkpoints import Checkpoint, read_checkpoint, read_manifest, write_checkpoint
from tracked_replay.recording.expectations import require_expected, restore_generators
from tracked_replay.recording.files import file_sha256, state_digest, write_aside, write_json, write_text
from tracked_replay.recording.journal import Unfinished, find_unfinished
from tracked_replay.recording.reader import Fetch, Recording, folder_source, parse_json
from tracked_replay.recording.recorder import Recorder, write_digests
from tracked_replay.recording.trace import Trace, read_trace

__all__ = [
    "Checkpoint",
    "Fetch",
    "Recorder",
    "Recording",
    "Trace",
    "Unfinished",
    "file_sha256",
    "find_unfinished",
    "folder_source",
    "parse_json",
    "read_checkpoint",
    "read_manifest",
    "read_trace",
    "require_expected",
    "restore_generators",
    "state_digest",
    "write_aside",
    "write_checkpoint",
    "write_digests",
    "write_json",
    "write_text",
]
