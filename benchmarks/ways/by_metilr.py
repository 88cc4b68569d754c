"""metilr's way: all that an evaluation leaves behind by default.

python by_metilr.py ROOT ENGINE
"""

import sys

import metilr

if __name__ == "__main__":
    print(metilr.evaluate(sys.argv[1], extraction=metilr.ExtractionOptions(engine=sys.argv[2])).model_dump_json())
