"""Take the README's picture of the report page: the demo museum's, which is synthetic from end to end.

    python docs/report_picture.py

Evaluates the demo (two minutes on two cores, or seconds where its descriptors are there) and photographs the top of the
page and of its gallery with Chromium (``chromium`` on the path, or the variable CHROMIUM).
"""

import io
import os
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from metilr.commands.evaluate import evaluate
from metilr.evaluation.options import ReportOptions
from metilr.extraction.options import ExtractionOptions

PICTURE = Path(__file__).with_name("report.jpg")
WINDOW = {"width": 1200, "height": 820}


def main() -> None:
    """Evaluate, photograph, write."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "demo"
        evaluate(output=output, extraction=ExtractionOptions(quiet=True), report=ReportOptions(wandb="off"))
        top, gallery = _photograph(output / "report" / "index.html")
    both = Image.new("RGB", (top.width + gallery.width + 16, top.height), "grey")
    both.paste(top, (0, 0))
    both.paste(gallery, (top.width + 16, 0))
    both.save(PICTURE, quality=80, optimize=True)
    print(f"wrote {PICTURE}")


def _photograph(page_file: Path) -> list[Image.Image]:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=WINDOW, color_scheme="light")
        page.goto(page_file.as_uri())
        pictures = []
        for section in ("header", "#gallery"):
            page.locator(section).first.scroll_into_view_if_needed()
            page.evaluate("section => document.querySelector(section).scrollIntoView()", section)
            page.wait_for_timeout(1500)  # ms; pictures load as they come into view
            pictures.append(Image.open(io.BytesIO(page.screenshot())))
        browser.close()
    return pictures


if __name__ == "__main__":
    main()
