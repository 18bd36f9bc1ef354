"""The garbage collector of a server process."""

import gc

# A young collection for each so many new containers, and a full one after 10 × 10 young ones.
# Python's 700 would look through the objects of the requests under way many times a second.
THRESHOLDS = 20_000, 10, 10


def settle() -> None:
    """Called once at the end of a start: what lives now lives as long as the process. The collector
    never looks at it again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
