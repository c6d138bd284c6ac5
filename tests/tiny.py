"""The command line of dl_utils.py on the small data of conftest.py, in the folder TINY."""

import gzip
import hashlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import dl_utils as dl


def sums(raw):
    """What dl.DATA_FILES is for the files of a folder."""
    unpacked = {name: gzip.decompress((raw / f"{name}.gz").read_bytes()) for name in dl.DATA_FILES}
    return {name: hashlib.sha256(content).hexdigest() for name, content in unpacked.items()}


if "TINY" in os.environ:  # here and in the workers, which import this file as well
    dl.DATA_FILES = sums(Path(os.environ["TINY"]) / "FashionMNIST/raw")

if __name__ == "__main__":
    sys.exit(dl.main([*sys.argv[1:], "--data", os.environ["TINY"]]))
