"""The network as Haiku modules, with the release's module and parameter names."""

from grok1.network.kv_cache import KVCache
from grok1.network.language_model import network
from grok1.network.shard import ModelShard

__all__ = ["KVCache", "ModelShard", "network"]
