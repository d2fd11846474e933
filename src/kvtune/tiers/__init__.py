"""Places for bytes that left the device pool: one port, bounded bodies.

A tier is byte-transparent: it gives back what it was given or says that it cannot. What a key means, and what
to do about a miss, is the caller's business.
"""

from kvtune.tiers.host_arena import HostArena
from kvtune.tiers.tier import Payload, Tier

__all__ = ["HostArena", "Payload", "Tier"]
