"""KV codecs: encode, decode and declared error bounds of one side (K or V), and the write into the cache."""

from kvtune.codecs.codec import CODECS, Codec, Encoded, codec
from kvtune.codecs.write import write_kv

__all__ = ["CODECS", "Codec", "Encoded", "codec", "write_kv"]
