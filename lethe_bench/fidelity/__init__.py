"""How far eviction moves the next-token distribution of a model: forced replies, on a live server."""
