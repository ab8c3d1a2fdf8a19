"""The precision that training takes where the config leaves it to the machine."""

from functools import cache
from pathlib import Path

_BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # processors' instructions for bfloat16


@cache
def native_precision() -> str:
    """Return `bf16-mixed` where the processor computes in bfloat16, which takes a third of the time, else `32-true`."""
    described = Path("/proc/cpuinfo")
    words = described.read_text().split() if described.is_file() else []
    return "32-true" if _BFLOAT16.isdisjoint(words) else "bf16-mixed"
