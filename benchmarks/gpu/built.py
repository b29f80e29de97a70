"""Fails unless torch_bptt was built with CUDA; says what the plan knows of the device, and puts the
compiled part, by gzip, into a folder.

    python -m gpu.built FOLDER

Unpacked into torch_bptt/, it spares a fresh machine of the same kind the build.
"""

import gzip
import sys
from pathlib import Path

from torch_bptt._extension import _C


def main(folder: str) -> int:
    facts = _C.build_info()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    if not facts["cuda"][0].isdigit():  # a version comes first, if it was built for a GPU
        print(f"gpu.built: torch_bptt was built without CUDA: {facts['cuda']}")
        return 1
    print("\n".join(f"{name}: {value}" for name, value in _C.cuda_facts(0).items()))
    library = Path(_C.__file__)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{library.name}.gz").write_bytes(gzip.compress(library.read_bytes()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
