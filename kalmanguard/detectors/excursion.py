"""Learning rates beyond what healthy training has been seen at: a known input, so it needs no statistics."""

from __future__ import annotations

from typing import NamedTuple

from kalmanguard.records import Evidence, Guarantee

#: A rate this many times the reference is suspicious, and again at every further growth by as much.
RATIO = 1.8
#: Relative growth per step that the reference follows.
GROWTH = 1.01


class ExcursionState(NamedTuple):
    """Reference learning rate per param group, and the ratio at which the test fired last (1 when it has not)."""

    reference: tuple[float, ...] = ()
    fired_at: float = 1.0

    @property
    def raised(self) -> bool:
        """Whether a learning rate is beyond what has been certified."""
        return self.fired_at > 1.0


class LearningRateExcursion:
    """Fire when a learning rate leaves the range that certified training has used.

    The reference follows the rates upward by at most 1 % a step, so a slow schedule is never an excursion, and a creep
    of 3 % a step is one after 30 steps. Rates that fall, and rates that return to where they were, are none.

    Notes
    -----
    Guarantee: HEURISTIC (a high rate is a reason to look, not harm). Cost: 0.5 us.
    """

    def learn(self, state: ExcursionState, rates: tuple[float, ...]) -> ExcursionState:
        """Take the rates of a warm-up step into the reference, without a test."""
        if len(rates) != len(state.reference):
            return ExcursionState(rates)
        return ExcursionState(tuple(map(max, state.reference, rates)))

    @staticmethod
    def ratio(state: ExcursionState, rates: tuple[float, ...]) -> float:
        """Largest of the rates over their references; 1 when they cannot be compared."""
        if not rates or len(rates) != len(state.reference):
            return 1.0
        return max(
            rate / ref if ref > 0 else 2.0 * RATIO if rate > 0 else 1.0
            for rate, ref in zip(rates, state.reference, strict=True)
        )

    def step(self, state: ExcursionState, rates: tuple[float, ...]) -> tuple[ExcursionState, Evidence | None]:
        """Test one step's rates, per param group."""
        if rates == state.reference and state.fired_at == 1.0:
            return state, None
        if len(rates) != len(state.reference):
            return ExcursionState(rates), None
        ratio = self.ratio(state, rates)
        reference = tuple(
            ref if rate <= ref else min(rate, ref * GROWTH) if ref > 0 else rate
            for rate, ref in zip(rates, state.reference, strict=True)
        )
        if ratio <= RATIO * state.fired_at:
            return ExcursionState(reference, state.fired_at if ratio > RATIO else 1.0), None
        evidence = Evidence(
            "learning-rate",
            ratio,
            True,
            Guarantee.HEURISTIC,
            f"learning rate {max(rates):.4g} is {ratio:.1f} times what training has been certified at; {RATIO} is "
            "the bound",
        )
        return ExcursionState(reference, ratio), evidence
