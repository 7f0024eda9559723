"""Names of tags and of the stages, as users and the MLflow UI see them."""

PREFIX = "tracked_replay."
STAGE = f"{PREFIX}stage"
FINGERPRINT = f"{PREFIX}fingerprint"
PENDING = f"{PREFIX}pending"  # fingerprint of a run that has not finished: an interrupted one is gone on with
VERDICT = f"{PREFIX}verdict"
CLEANED = f"{PREFIX}cleaned"
INPUT = f"{PREFIX}input."
DIGESTS = f"{PREFIX}digests"
EXACT = f"{PREFIX}exact"
REUSES = f"{PREFIX}reuses"
REPRODUCES = f"{PREFIX}reproduces"  # of a training that `reproduce` made: the run that it repeats
VALIDATED_BY = f"{PREFIX}validated_by"  # of a `magic` run: the newest `lds` run about it
TASK = f"{PREFIX}task"

HELD = "Held against retraining:"  # begins the line of a `magic` run's description that its validation fills in
UNTRIED = "- next, how far they can be trusted:"  # begins its last line, as long as there is no validation

TRAIN = "train"
MAGIC = "magic"
LDS = "lds"
RETRAINING = "retraining"
COUNTERFACTUAL = "counterfactual"
VERIFY = "verify"
MAIN = "main"
COMPARE = "compare"
REPRODUCE = "reproduce"
SUSPECTS = "suspects"
FAILED = f"{PREFIX}failed_retrainings"
EQUALITY = f"{PREFIX}equality"
PROCESS = f"{PREFIX}process"
