"""The first and the latest tokens of each row, in constant memory."""

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.ring import RingStore


class WindowCacheLayer(KVCacheLayer):
    def __init__(self, num_heads, head_dim, window, placement):
        self.ring = RingStore(num_heads, head_dim, recent=window.recent, sink=window.sink, placement=placement)
        super().__init__(self.ring)

    def kv_tokens(self):
        kept = self.ring["tokens"].clamp(max=self.ring.sink + self.ring.recent)
        return kept[:, None].expand(-1, self.ring["keys"].shape[1])
