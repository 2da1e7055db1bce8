"""When compiled code is to be compiled anew.

Numba keeps what it compiles on disk, and by itself sees a change only in the file of the function that is called. A
function that has the digest of all files its machine code comes from in its closure is compiled anew when any changes,
since Numba looks at closures as well.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def digest(files: Iterable[Path]) -> str:
    """Return the digest of what files contain."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(files))).hexdigest()
