"""Take the pictures of the report page and of an audit's: the demo museum's, which is synthetic from end to end.

    python docs/report_picture.py

Evaluates and audits the demo (five minutes on two cores, less with its descriptors) and photographs two places of each
page with Chromium (``chromium`` on the path, or the variable CHROMIUM).
"""

import io
import os
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from metilr.commands.audit import audit
from metilr.commands.evaluate import evaluate
from metilr.demo import DEMO
from metilr.evaluation.options import ReportOptions
from metilr.extraction.options import ExtractionOptions

DOCS = Path(__file__).parent
WINDOW = {"width": 1200, "height": 820}


def main() -> None:
    """Evaluate, audit, photograph, write."""
    extraction = ExtractionOptions(quiet=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        evaluate(output=folder / "demo", extraction=extraction, report=ReportOptions(wandb="off"))
        _photograph(folder / "demo" / "report" / "index.html", ("header", "#gallery"), DOCS / "report.jpg")
        audit(DEMO, extraction=extraction, output=folder / "audit")
        _photograph(folder / "audit" / "audit.html", ("header", "#coverage"), DOCS / "audit.jpg")


def _photograph(page_file: Path, sections: tuple[str, str], picture: Path) -> None:
    """Write two places of a page side by side."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=WINDOW, color_scheme="light")
        page.goto(page_file.as_uri())
        taken = []
        for section in sections:
            page.locator(section).first.scroll_into_view_if_needed()
            page.evaluate("section => document.querySelector(section).scrollIntoView()", section)
            page.wait_for_timeout(1500)  # ms; pictures load as they come into view
            taken.append(Image.open(io.BytesIO(page.screenshot())))
        browser.close()
    left, right = taken
    both = Image.new("RGB", (left.width + right.width + 16, left.height), "grey")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + 16, 0))
    both.save(picture, quality=80, optimize=True)
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
