"""Which decode steps are scored, where a policy scores every n-th only."""

from __future__ import annotations

from collections.abc import Sequence


class Phase:
    """Counts a server's decode steps and says which are scored: host numbers only, equal on all ranks.

    A step that is not scored launches nothing of ours but the fill of its lists. That pays only if it is so for all of
    its requests, so a batch is scored in phase: all requests at each n-th step of the server, from a batch of new
    requests on. Then what a request keeps depends on when the others came. Under deterministic inference it may not:
    each request has the phase of its own length, and a step is scored if any of its requests is.

    Attributes
    ----------
    every
        n; 1 scores every step.
    by_length
        Whether each request has a phase of its own.
    scores
        Whether the step whose forward is being prepared is scored.
    """

    def __init__(self) -> None:
        self.every = 1
        self.by_length = False
        self.scores = True
        self._plain = 0

    def configure(self, every: int, by_length: bool) -> None:
        """Set what the policy scores, which changes on an idle server only: an equal setting changes nothing.

        A phase that began anew while requests run would leave tokens unstarted for longer than n steps.
        """
        if (every, by_length) != (self.every, self.by_length):
            self.every, self.by_length = every, by_length
            self.scores, self._plain = True, 0

    def advance(self, lengths: Sequence[int], new: bool) -> None:
        """Count the decode step that is being prepared.

        Parameters
        ----------
        lengths
            Tokens of each sequence, the newest included.
        new
            Whether this is the first step of all of its requests.
        """
        if self.by_length:
            self.scores = any(length % self.every == 0 for length in lengths)
        else:
            self._plain = 0 if new or self.scores else self._plain + 1
            self.scores = (self._plain + 1) % self.every == 0
