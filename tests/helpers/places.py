"""Places where nothing can be written."""

import os
import subprocess
from pathlib import Path

_SCRIPT = """
while [ "$1" != -- ]; do
  mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" || exit
  shift
done
shift
exec "$@"
"""


def read_only(*folders: Path) -> list[str]:
    """The beginning of a command line that finds folders read-only; empty where the system does not allow that."""
    unshare = ["unshare", "-m" if os.geteuid() == 0 else "-rm", "sh", "-ec", _SCRIPT, "sh", *map(str, folders), "--"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return unshare
