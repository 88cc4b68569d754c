"""Which of your pictures is on this photo? ``python examples/search_own_folder.py FOLDER PHOTO``.

FOLDER has a sub-folder for each exhibit. The index goes to ``runs/example_index`` and is made once.
"""

import argparse
from pathlib import Path

import metilr


def main() -> None:
    """Index the folder, unless that was done before, and answer the photo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--index", type=Path, default=Path("runs/example_index"))
    parser.add_argument("--backbone", default="lite0_in", help="lite0_in, r18_swsl, timm/NAME, ...")
    parser.add_argument("--weights", help="a file; random for a try without any")
    options = parser.parse_args()

    if not options.index.exists():
        model = metilr.ModelOptions(backbone=options.backbone, weights=options.weights)
        metilr.index(options.folder, options.index, model=model, extraction=metilr.ExtractionOptions(quiet=True))
    collection = metilr.open_collection(options.index)
    answer = collection.answer(options.photo)
    print(f"{options.photo}: {answer.exhibit} (log-confidence {answer.log_confidence:.3f})")
    for match in answer.matches:
        print(f"  {match.similarity:.3f}  {match.exhibit}  {collection.image(match.row)}")


if __name__ == "__main__":  # decoding processes import this file
    main()
