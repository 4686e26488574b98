"""Metrics against published values, brute force and their defining properties."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from qvlm_hf.calibration.measure.answers import answer_kl
from qvlm_hf.evaluation.metrics import (
    PairedCounts,
    Proportion,
    mcnemar_p_value,
    paired_difference,
    wilson_interval,
)


def counts(both_right, only_first, only_second, both_wrong):
    return PairedCounts(
        both_right=both_right, only_first=only_first, only_second=only_second, both_wrong=both_wrong
    )


PROPORTIONS = st.integers(1, 3000).flatmap(
    lambda total: st.tuples(st.integers(0, total), st.just(total))
)
COUNTS = st.builds(counts, *[st.integers(0, 300)] * 4).filter(lambda c: c.total > 0)


# R. G. Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3.
WILSON = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605)}
WILSON |= {(0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}


@pytest.mark.parametrize(("pair", "ends"), WILSON.items())
def test_wilson_published_values(pair, ends):
    interval = wilson_interval(*pair)
    assert (interval.low, interval.high) == pytest.approx(ends, abs=5e-5)


@given(PROPORTIONS)
def test_wilson_ends_solve_the_score_equation(pair):
    successes, total = pair
    interval, share = wilson_interval(successes, total), successes / total
    assert 0 <= interval.low <= share <= interval.high <= 1
    for end in (interval.low, interval.high):
        # a score interval: |share - end| = z * standard error at the end
        error = 1.959963984540054 * math.sqrt(end * (1 - end) / total)
        assert abs(share - end) == pytest.approx(error, abs=1e-9)
    mirrored = wilson_interval(total - successes, total)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_no_proportion(successes, total):
    message = rf"{successes} of {total} is no proportion; it takes 0 <= successes"
    with pytest.raises(ValueError, match=message):
        Proportion(successes=successes, total=total)


def test_paired_counts():
    first, second = [True, True, True, False, False], [True, False, False, True, False]
    assert PairedCounts.of(first, second) == counts(1, 2, 1, 1)
    message = "5 and 4 answers cannot be paired; evaluate both models on the same samples"
    with pytest.raises(ValueError, match=message):
        PairedCounts.of(first, second[:4])


# Two-sided binomial probabilities, by hand: 2 * (1 + 10) / 2**10, 2 / 2**6; equal splits are no
# evidence at all.
@pytest.mark.parametrize(
    ("b", "c", "expected"),
    [(1, 9, 22 / 1024), (9, 1, 22 / 1024), (6, 0, 2 / 64), (5, 5, 1.0), (0, 0, 1.0), (1, 0, 1.0)],
)
def test_mcnemar_by_hand(b, c, expected):
    assert mcnemar_p_value(counts(100, b, c, 7)) == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 8), st.integers(0, 8))
def test_mcnemar_by_enumeration(b, c):
    """Counts the sign patterns of the disagreements that are split at least as unevenly."""
    extreme = sum(
        abs(2 * sum(signs) - (b + c)) >= abs(b - c)
        for signs in itertools.product((0, 1), repeat=b + c)
    )
    assert mcnemar_p_value(counts(0, b, c, 0)) == pytest.approx(extreme / 2 ** (b + c))


def test_mcnemar_many_questions():
    assert 0 < mcnemar_p_value(counts(0, 3000, 2600, 0)) < 1e-6


def test_paired_difference_by_hand():
    """Method 10 written out for 1000 questions, 4 lost and 1 won."""
    difference, interval = paired_difference(counts(941, 4, 1, 54))
    assert difference == pytest.approx(-0.003)
    first, second = wilson_interval(945, 1000), wilson_interval(942, 1000)
    phi = (941 * 54 - 4 * 1 - 500) / math.sqrt(945 * 55 * 942 * 58)
    down, up = 0.942 - second.low, first.high - 0.945
    low = -0.003 - math.sqrt(down**2 - 2 * phi * down * up + up**2)
    up, down = second.high - 0.942, 0.945 - first.low
    high = -0.003 + math.sqrt(up**2 - 2 * phi * up * down + down**2)
    assert (interval.low, interval.high) == pytest.approx((low, high))
    # pairing helps: unpaired, it would be 4 points wide
    assert -0.01 < interval.low < interval.high < 0.005


@given(COUNTS)
def test_paired_difference_properties(table):
    difference, interval = paired_difference(table)
    assert -1 <= interval.low <= difference <= interval.high <= 1
    assert interval.low < interval.high
    other = counts(table.both_right, table.only_second, table.only_first, table.both_wrong)
    swapped, mirrored = paired_difference(other)
    assert swapped == -difference
    assert (-mirrored.high, -mirrored.low) == pytest.approx((interval.low, interval.high))


def test_paired_difference_covers_the_truth():
    """Of 400 simulated comparisons about 95 % contain the true difference of -0.04."""
    generator, inside = random.Random(0), 0
    outcomes = [(True, True), (True, False), (False, True), (False, False)]
    for _ in range(400):
        drawn = generator.choices(outcomes, weights=(0.80, 0.07, 0.03, 0.10), k=200)
        _, interval = paired_difference(PairedCounts.of(*zip(*drawn, strict=True)))
        inside += interval.low <= -0.04 <= interval.high
    assert 0.92 < inside / 400 < 0.985


def test_answer_kl_by_hand():
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]])
    model = torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]])
    expected = (0.5 * math.log(2) + 0.25 * math.log(0.5)) / 2
    # logits are defined up to a constant per token
    assert answer_kl(reference.log() + 3, model.log() - 7) == pytest.approx(expected, rel=1e-6)
    skewed = torch.tensor([[0.9, 0.05, 0.05]])  # tells the direction, which the pair above does not
    forward = 0.5 * math.log(0.5 / 0.9) + 2 * 0.25 * math.log(0.25 / 0.05)
    assert answer_kl(reference[:1].log(), skewed.log()) == pytest.approx(forward, rel=1e-6)


@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.integers(2, 40),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_answer_kl_properties(seed, tokens, vocabulary, dtype):
    generator = torch.Generator().manual_seed(seed)
    first, second = (5 * torch.randn(2, tokens, vocabulary, generator=generator)).to(dtype)
    assert answer_kl(first, first) == 0.0
    assert answer_kl(first, second) > 0
    logs = (logits.float().log_softmax(-1) for logits in (second, first))
    expected = torch.nn.functional.kl_div(*logs, reduction="sum", log_target=True)
    assert answer_kl(first, second) == pytest.approx(expected.item() / tokens, rel=1e-3, abs=1e-5)


def test_answer_kl_ruled_out_tokens():
    reference = torch.tensor([[0.0, 0.0, -math.inf]])
    assert answer_kl(reference, reference) == 0.0
    assert answer_kl(reference, torch.zeros(1, 3)) == pytest.approx(math.log(3 / 2))
    assert answer_kl(torch.zeros(1, 3), reference) == math.inf


@pytest.mark.parametrize(("first", "second"), [((2, 3), (2, 4)), ((0, 3), (0, 3)), ((3,), (3,))])
def test_answer_kl_refuses(first, second):
    message = r"logits have the shapes .* both must be \[tokens, vocabulary\]"
    with pytest.raises(ValueError, match=message):
        answer_kl(torch.zeros(first), torch.zeros(second))


# ---- the same by scipy ---------------------------------------------------------------------------


@pytest.mark.parametrize(("successes", "total"), [(0, 9), (1, 3), (57, 60), (949, 1000), (8, 8)])
def test_wilson_as_scipy(successes, total):
    theirs = stats.binomtest(successes, total).proportion_ci(0.95, method="wilson")
    ours = wilson_interval(successes, total)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("pair", [(0, 0), (3, 9), (11, 0), (40, 41), (130, 90)])
def test_mcnemar_as_scipys_binomial_test(pair):
    expected = stats.binomtest(pair[0], sum(pair)).pvalue if sum(pair) else 1.0
    assert mcnemar_p_value(counts(7, *pair, 2)) == pytest.approx(expected, rel=1e-12)


def test_kl_as_scipys_relative_entropy():
    torch.manual_seed(0)
    reference, model = torch.randn(2, 50, 300, dtype=torch.float64) * 4
    p, q = (special.softmax(logits.numpy(), axis=-1) for logits in (reference, model))
    expected = special.rel_entr(p, q).sum(-1).mean()
    assert answer_kl(reference, model) == pytest.approx(expected, rel=1e-10)
