"""The recovery ladder and its budget: which rung the next rollback takes, and when to stop trying."""

from __future__ import annotations

from typing import NamedTuple

#: Rungs: 0 rollback, 1 further back with the learning rate cut, 2 also with fresh optimizer moments.
RUNGS = 3
#: A relapse within so many steps of a restore means that the cause is still there: trying again is cheap.
_AT_ONCE = 3


class LadderState(NamedTuple):
    """Where the run stands on the ladder.

    ``score``: what rollbacks without a recovery between them add up to; ``hold``: steps effects stay in force;
    ``onset``: when the trouble began that the first of those rollbacks was about. ``cut``: the learning rate is cut;
    ``given_back``: it was, and is no longer; ``relapses``: how often the run has failed again after that.
    """

    score: int = 0
    rollbacks: int = 0
    restored_at: int = -(1 << 40)
    level: float = float("inf")
    hold: int = 0
    onset: int = 0
    cut: bool = False
    given_back: bool = False
    relapses: int = 0


class Ladder:
    """Escalate with the score: rollback, further back and slower, with fresh moments, halt.

    Notes
    -----
    Liveness (claim C6): every rollback adds at least 1 to the score, the score falls only by a recovery (``hold`` steps
    without harm that end in an accepted probe, then four times as many in a quiet run), and the run halts before the
    score exceeds ``budget``; so at most ``budget`` rollbacks happen without a recovery between them. EXACT.
    """

    def __init__(self, *, budget: int, recovery_steps: int) -> None:
        self._budget, self._recovery_steps = budget, recovery_steps

    def weight(self, state: LadderState, step: int) -> int:
        """What a rollback at ``step`` adds to the score."""
        if state.score == 0 or step - state.restored_at <= _AT_ONCE:
            return 1
        # The run was given time and lost it again: the next rung's turn.
        return self._budget // RUNGS + 1

    def rung(self, state: LadderState, step: int) -> int | None:
        """Rung of a rollback at ``step``; ``None`` when the budget is spent and the run must halt."""
        score = state.score + self.weight(state, step)
        if score > self._budget:
            return None
        return min(RUNGS - 1, (score - 1) * RUNGS // self._budget)

    def climb(self, state: LadderState, step: int, level: float, onset: int) -> LadderState:
        """Record a rollback at ``step``, of what began at ``onset``, to a state whose probe level was ``level``."""
        at_once = state.score > 0 and step - state.restored_at <= _AT_ONCE
        hold = self._recovery_steps if state.score == 0 else state.hold if at_once else 2 * state.hold
        began = onset if state.score == 0 else min(state.onset, onset)
        score = state.score + self.weight(state, step)
        cut = (self.rung(state, step) or 0) > 0
        relapses = state.relapses + state.given_back
        return LadderState(score, state.rollbacks + 1, step, level, hold, began, cut, False, relapses)

    @staticmethod
    def released(state: LadderState) -> LadderState:
        """What was in force is lifted."""
        return state._replace(cut=False, given_back=state.given_back or state.cut)

    def recovered(self, state: LadderState, step: int) -> bool:
        """Whether the effects of the last rollback may be lifted, given an accepted probe at ``step``."""
        return step - state.restored_at >= state.hold

    def settle(self, state: LadderState, step: int) -> LadderState:
        """Forget the score once the run has been quiet for long enough after a recovery."""
        if state.score and step - state.restored_at >= 5 * state.hold:
            return state._replace(score=0, rollbacks=0, given_back=False, relapses=0)
        return state
