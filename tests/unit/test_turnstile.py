"""Refusals at the turnstile: the first ones pass, a flood waits, and its lines are few."""

from service.web.callbacks import BURST, TURNS_S, WAIT_S, Turnstile


def test_a_few_refusals_pass_at_once_and_each_has_its_line() -> None:
    """As many as the burst at one moment, and for ever at the steady rate."""
    turnstile = Turnstile()
    assert [turnstile.turn(1000.0) for _ in range(BURST)] == [(0.0, 0)] * BURST
    steady = Turnstile()
    assert {steady.turn(1000.0 + number * 1.01 / TURNS_S) for number in range(5 * TURNS_S)} == {(0.0, 0)}


def test_whoever_comes_faster_waits_longer_and_never_over_a_second() -> None:
    """Waits grow one place at a time up to the limit."""
    turnstile = Turnstile()
    waits = [turnstile.turn(1000.0)[0] for _ in range(BURST + 3 * TURNS_S)]
    assert waits == sorted(waits)
    assert waits[-1] == WAIT_S
    assert 0 < min(wait for wait in waits if wait) <= 1.5 / TURNS_S


def test_a_flood_has_a_line_a_second_which_tells_of_the_others() -> None:
    """Each refusal is in a line of its own or in the number of those withheld before the next line."""
    turnstile = Turnstile()
    told = [turnstile.turn(1000.0 + number / 5000)[1] for number in range(50_001)]  # 10 s of 5000 a second
    lines = [withheld for withheld in told if withheld is not None]
    assert BURST <= len(lines) < BURST + 130
    assert sum(lines) + len(lines) <= len(told)
    assert turnstile.turn(2000.0) == (0.0, len(told) - sum(lines) - len(lines))


def test_after_a_flood_the_turnstile_is_as_it_was() -> None:
    """Two seconds later nobody waits."""
    turnstile = Turnstile()
    for _ in range(10_000):
        turnstile.turn(1000.0)
    assert turnstile.turn(1002.1 + BURST / TURNS_S)[0] == 0.0
