"""What may watch a server: test aids and the measuring of a profile. In production nothing does."""
