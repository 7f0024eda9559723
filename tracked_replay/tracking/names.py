"""Names of tags and of the stages, as users and the MLflow UI see them."""

PREFIX = "tracked_replay."
STAGE = f"{PREFIX}stage"
FINGERPRINT = f"{PREFIX}fingerprint"
INPUT = f"{PREFIX}input."
DIGESTS = f"{PREFIX}digests"
EXACT = f"{PREFIX}exact"
REUSES = f"{PREFIX}reuses"
PRESET = f"{PREFIX}preset"
TASK = f"{PREFIX}task"

TRAIN = "train"
MAGIC = "magic"
