"""How owners share the slots of a stage. A slot of a delivery is held until the server answers or
the attempt times out.
"""

from service.db.transaction import Transaction
from service.fair_places import has_share

REST = 4  # An owner may use one slot for each four that stay free (see `fair_places`).


def take_slot(tx: Transaction, stage: str, owner: str = "") -> bool:
    """Uses a free slot of this process for a row of the owner. False: the row stays due."""
    used, free = tx.shares.get(stage), tx.slots.get(stage, 0)
    if free > 0 and (used is None or has_share(used.get(owner, 0), free, REST)):
        use_slot(tx, stage, owner)
        return True
    tx.due.add(stage)
    return False


def use_slot(tx: Transaction, stage: str, owner: str) -> None:
    tx.slots[stage] -= 1
    if (used := tx.shares.get(stage)) is not None:
        used[owner] = used.get(owner, 0) + 1


def claimable(tx: Transaction, stage: str) -> tuple[int, list[str]]:
    """How many rows one statement may lease, and the owners whose rows it must pass over.

    The rows may all be one owner's. So their number fits into the share of each owner that still
    has one.
    """
    used, free = tx.shares.get(stage), tx.slots[stage]
    if used is None:
        return free, []
    full = [owner for owner, slots in used.items() if not has_share(slots, free, REST)]
    most = max((slots for slots in used.values() if has_share(slots, free, REST)), default=0)
    return max(1, -(-(free - REST * most) // (REST + 1))), full
