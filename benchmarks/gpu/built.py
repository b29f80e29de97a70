"""Fails unless torch_bptt was built with CUDA; puts a copy of the compiled part into a folder.

    python -m gpu.built FOLDER

With the copy in torch_bptt/, a fresh machine of the same kind needs no build.
"""

import shutil
import sys
from pathlib import Path

from torch_bptt._extension import _C


def main(folder: str) -> int:
    facts = _C.build_info()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    if not facts["cuda"][0].isdigit():  # a version comes first, if it was built for a GPU
        print(f"gpu.built: torch_bptt was built without CUDA: {facts['cuda']}")
        return 1
    Path(folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(_C.__file__, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
