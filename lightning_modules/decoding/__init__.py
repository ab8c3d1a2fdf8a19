"""How to spend test-time compute: plain sampling, best-of-n, verified decoding."""
