"""Whether anything answers where the tracking server should be."""

from __future__ import annotations

import re
import ssl
import time
import urllib.error
import urllib.request

import mlflow

from tracked_replay.errors import RunError
from tracked_replay.tracking.runs import shown_uri

ATTEMPTS = 3
SECONDS_BETWEEN = 2.0
SECONDS_TO_ANSWER = 10.0


def require_server() -> None:
    """Say at once where no tracking server answers; MLflow itself asks again for minutes, without a word.

    Any answer counts, an error too: what a server answers is MLflow's matter. A store that is no server passes.

    Raises:
        RunError: nothing answers.
    """
    address = re.sub(r"(?<=://)[^/@]*@", "", mlflow.get_tracking_uri())  # a password is not needed for this
    if not address.startswith(("http://", "https://")):
        return
    for attempt in range(ATTEMPTS):
        try:
            urllib.request.urlopen(address, timeout=SECONDS_TO_ANSWER).close()  # noqa: S310 - of these two schemes
            return
        except urllib.error.HTTPError:
            return
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):  # it answers; MLflow has settings of its own for certificates
                return
            if attempt < ATTEMPTS - 1:
                time.sleep(SECONDS_BETWEEN)
            else:
                raise RunError(
                    f"MLFLOW_TRACKING_URI: found {shown_uri()}, where no server answers ({reason}); allowed: the "
                    f"address of a running tracking server, or nothing for a store in this folder"
                ) from None
