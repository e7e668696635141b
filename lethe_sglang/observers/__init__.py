"""What may watch a server: the measuring of a profile, and test aids from outside. In production nothing does."""
