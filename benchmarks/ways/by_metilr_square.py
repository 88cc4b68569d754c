"""metilr's way, as far as the ways that resize go: squares at one scale, no whitening, the nearest image alone.

python by_metilr_square.py ROOT ENGINE
"""

import sys

import metilr

if __name__ == "__main__":
    results = metilr.evaluate(
        sys.argv[1],
        model=metilr.ModelOptions(scales=[1.0]),
        extraction=metilr.ExtractionOptions(engine=sys.argv[2], image_size=512, image_shape="square"),
        method=metilr.MethodOptions(whitening="none", k=1),
    )
    print(results.model_dump_json())
