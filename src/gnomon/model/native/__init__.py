"""Our decoder on a CPU as one C function per step, compiled at first use; `bind.py` loads it."""
