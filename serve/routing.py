"""Which model replica an image goes to: equal shapes to the same one, as long as it is not much busier. Pure.

Only images of one shape share a forward pass (serve/batching.py). A router that looks at the load alone spreads each
shape over all replicas, and their batches stay small; one that looks at the shape alone leaves replicas idle under one
hot shape. Here each shape has its own order of the replicas, and a replica is passed over where it holds too much more
than the least loaded one:

- The order is rendezvous, or highest random weight, hashing (Thaler and Ravishankar, "Using name-based mappings to
  increase hit rates", IEEE/ACM Transactions on Networking 6(1), 1998): the replicas by a hash of shape and replica. A
  replica that goes moves the shapes that it had and no other; one that comes takes its part from all.
- The bound is the idea of consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, SODA 2018), with a
  difference: it lies above the least loaded replica, not above the mean, by a batch, since that is what a shape gains
  by staying together; and by less where the least loaded holds little, since an idle replica answers sooner than a
  batch that has to wait for its turn. What does not fit goes on in the shape's own order.

The hash is blake2b, since Python's own differs between processes: so all HTTP replicas agree without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

# So many more for each request of the least loaded: none where it is idle, a batch from a few on.
PATIENCE = 2


def order(shape_key: tuple[int, ...], loads: Mapping[str, int], slack: int) -> list[str]:
    """All replicas of `loads` (replica id to requests that it holds), best first, for an image of shape `shape_key`.

    First come those with at most `slack` requests more than the least loaded, and at most PATIENCE more for each that
    it holds, in the shape's own order; then the others, the least loaded first.
    """
    least = min(loads.values(), default=0)
    bound = least + min(slack, PATIENCE * least)

    def rank(replica: str) -> tuple[int, int]:
        return max(0, loads[replica] - bound), -_weight(shape_key, replica)

    return sorted(loads, key=rank)


def _weight(shape_key: tuple[int, ...], replica: str) -> int:
    name = "x".join(map(str, shape_key)) + "@" + replica
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")
