"""Takes the picture of a report for the documentation; needs Chromium and the test extra.

python docs/make_report_picture.py path/to/report/index.html docs/images/report-digits.png
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 1240, 1180  # CSS pixels

sys.path.insert(0, str(ROOT / "tests" / "browser"))


def main(report: str, picture: str) -> None:
    """Open a report and write what is seen of it as PNG."""
    from chromium import chromium

    with chromium() as browser:
        browser.look(WIDTH, height=HEIGHT)
        browser.open(Path(report).resolve().as_uri())
        browser.driver.save_screenshot(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
