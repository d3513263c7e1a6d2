"""The controller's promise, by simulation; prompt lookup, against a slow reference."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.config import SamplingParams
from gpt_fast.request import Request
from gpt_fast.speculative.controller import Acceptance, Candidate, Controller, expected_tokens
from gpt_fast.speculative.costs import PLAIN, BatchShape, Choice, rising
from gpt_fast.speculative.ngram import NGramIndex, NGramProposer
from gpt_fast.speculative.proposer import Offer
from gpt_fast.speculative.speculator import Speculator, Totals
from gpt_fast.speculative.verify import Proposal
from support.examples import examples, rest_slow

# ---------------------------------------------------------------------------------------- controller


class Machine:
    """Costs of a simulated machine, in seconds: plain 1, a draft step c, v extra for each token verified.

    noise: of a step, evenly up to this share. drift: how far the whole machine's speed wanders. stalls: share of the
    steps that take twice as long. Sampled steps are dearer, all by the same half.
    """

    def __init__(self, *, c, v, noise=0.05, drift=0.0, stalls=0.0, seed=0):
        self.c, self.v, self.noise, self.drift, self.stalls = c, v, noise, drift, stalls
        self.rng, self.pace = random.Random(seed), 0.0

    def mean(self, choice, sampled=False):
        return (1.0 if choice is None else choice.k * self.c + 1 + self.v * choice.k + 0.02) * (1.5 if sampled else 1)

    def seconds(self, choice, sampled=False):
        self.pace += self.rng.gauss(0, 0.05) - 0.02 * self.pace
        drift = 1 + self.drift * max(-1.0, min(self.pace, 1.0))
        stall = 2 if self.rng.random() < self.stalls else 1
        return self.mean(choice, sampled) * drift * stall * self.rng.uniform(1 - self.noise, 1 + self.noise)


def simulate(
    machine, true_rate, *, requests, tokens, counts=(1, 2, 4, 8), lag=None, seed=0, known=True, rows=1, mixed=False
):
    """Decode `requests` answers of `tokens` tokens one after another; (seconds, plain seconds, controller, ks), by the
    machine's means, which one run's luck does not change.

    true_rate(request, token): chance that a proposal stands. lag: a draft's prompt, at a tenth of a step a token;
    what it has not seen since costs as much. None: no draft, nothing to catch up with.
    mixed: every other answer is sampled.
    """
    controller = Controller(list(counts))
    rng = random.Random(seed)
    for choice in (PLAIN, *(Choice("draft", k) for k in counts)) if known else ():
        controller.costs.learn(choice, BatchShape(rows), machine.seconds(None if choice == PLAIN else choice))
    speculator = Speculator({}, controller, max_seq_len=1 << 20)
    spent, plain, chosen = 0.0, 0.0, []
    for request in range(requests):
        row = Request("r", [1], SamplingParams(), 0)
        speculator.acceptances = {row: {}}
        sampled = mixed and request % 2 == 1
        batch = BatchShape(rows, sampled)
        done, seen = 0, -(lag or 0)
        plain += tokens * machine.mean(None, sampled)
        while done < tokens:
            limit = min(8, tokens - done - 1)
            behind = done - seen if lag is not None and done - seen > 16 else 0
            candidates = [Candidate(limit, speculator._rate(row, ("draft", 0)), behind)] * rows
            choice = controller.choose(batch, {"draft": candidates})
            count = 0 if choice is None else min(choice.k, limit)
            stood = 0
            while stood < count and rng.random() < true_rate(request, done):
                stood += 1
            fed = behind if choice else 0
            spent += machine.mean(choice, sampled) + 0.1 * fed
            seconds = machine.seconds(choice, sampled) + 0.1 * fed
            controller.learn(choice, batch, (stood + 1) * rows, seconds, caught_up=fed, rows_behind=rows * (fed > 0))
            done += stood + 1
            if choice:
                seen = done
                speculator._learn_row(row, ("draft", 0), count, stood)
            chosen.append(count)
    return spent, plain, controller, chosen


@pytest.mark.parametrize("c", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", rest_slow(range(3)))
def test_a_useless_draft_costs_at_most_three_percent(c, seed):
    machine = Machine(c=c, v=0.08, seed=seed)
    spent, plain, _, chosen = simulate(machine, lambda *_: 0.01, requests=20, tokens=100, lag=200, seed=seed)
    assert spent / plain < 1.03
    assert sum(k > 0 for k in chosen) < 0.2 * len(chosen)


@pytest.mark.slow
@given(
    c=st.floats(0, 1),
    v=st.floats(0, 0.2),
    rate=st.floats(0, 1),
    noise=st.floats(0, 0.3),
    drift=st.floats(0, 0.3),
    stalls=st.floats(0, 0.05),
    mixed=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
@examples(20)
def test_whatever_the_machine_speculation_is_never_slower(c, v, rate, noise, drift, stalls, mixed, seed):
    """Drafts good and bad, costs noisy and wandering, texts greedy and sampled by turns."""
    machine = Machine(c=c, v=v, noise=noise, drift=drift, stalls=stalls, seed=seed)
    spent, plain, _, _ = simulate(machine, lambda *_: rate, requests=60, tokens=64, lag=100, seed=seed, mixed=mixed)
    assert spent / plain < 1.03


@pytest.mark.parametrize("seed", rest_slow(range(4)))
@pytest.mark.parametrize("gain", [0.8, 0.9, 0.95, 1.0, 1.05])
def test_near_break_even_noise_is_not_taken_for_gain(gain, seed):
    """A draft whose largest k has `gain` of plain decode's speed: whichever cost was last measured too low, it is not
    believed for long, and neither is a plain step that was measured too high."""
    rate = 0.9
    c = (expected_tokens(rate, 8) / gain - 1.02 - 0.02 * 8) / 8
    machine = Machine(c=c, v=0.02, noise=0.3, drift=0.2, stalls=0.02, seed=seed)
    spent, plain, _, _ = simulate(machine, lambda *_: rate, requests=100, tokens=64, lag=50, seed=seed, mixed=True)
    assert spent / plain < 1.03


def test_a_short_first_request_pays_no_more_than_the_overdraft():
    spent, plain, controller, _ = simulate(Machine(c=0.5, v=0.1), lambda *_: 0.0, requests=1, tokens=60, lag=30)
    assert spent - plain < controller.overdraft + 8 * 0.5 + 3 + 2  # overdrawn by at most one step and one catching up


@pytest.mark.parametrize(("rate", "c", "least"), [(0.9, 0.1, 2.6), (0.8, 0.1, 1.9), (0.6, 0.05, 1.4), (0.95, 0.0, 3.5)])
def test_a_good_draft_gets_nearly_the_best_fixed_k(rate, c, least):
    machine = Machine(c=c, v=0.05)
    spent, plain, _, _ = simulate(machine, lambda *_: rate, requests=10, tokens=200)
    best = max(expected_tokens(rate, k) / (k * c + 1 + 0.05 * k + 0.02) for k in (1, 2, 4, 8))
    assert plain / spent > 0.9 * best
    assert plain / spent > least * 0.9


def test_it_turns_on_again_when_the_text_changes():
    """Useless for 40 requests, then good: speculation must be back within a few requests."""
    machine = Machine(c=0.1, v=0.05)
    _, _, _, chosen = simulate(machine, lambda request, _: 0.02 if request < 40 else 0.9, requests=60, tokens=100)
    assert sum(chosen[-200:]) / 200 > 2


def test_a_draft_that_must_read_the_prompt_first_is_tried_again():
    """The account saves up for a probe that costs more than it may keep otherwise."""
    machine = Machine(c=0.1, v=0.05)
    _, _, _, chosen = simulate(
        machine, lambda request, _: 0.02 if request < 40 else 0.9, requests=90, tokens=100, lag=100
    )
    assert sum(chosen[-200:]) / 200 > 2


def test_it_follows_a_change_within_a_request():
    machine = Machine(c=0.05, v=0.05)
    spent, plain, _, _ = simulate(machine, lambda _, t: 0.95 if t % 400 > 200 else 0.02, requests=5, tokens=2000)
    assert plain / spent > 1.25


def test_plain_decode_is_looked_at_again_and_again():
    """However good the draft, no more than COMPARE_EVERY steps in a row go without a plain one to compare with."""
    machine = Machine(c=0.05, v=0.05)
    _, _, controller, chosen = simulate(machine, lambda *_: 0.95, requests=4, tokens=2000)
    gaps = [len(run) for run in "".join("s" if k else "p" for k in chosen).split("p")]
    assert max(gaps) <= controller.COMPARE_EVERY


def test_nothing_is_chosen_before_plain_decode_is_known():
    assert Controller([4]).choose(BatchShape(1), {"draft": [Candidate(4, 0.99)]}) is None


@pytest.mark.parametrize(("c", "speculates"), [(0.1, True), (2.0, False)])
def test_costs_that_nobody_measured_are_found_out(c, speculates):
    """An engine without a warm-up: choices are tried, and those that do not pay are left alone."""
    machine = Machine(c=c, v=0.05)
    spent, plain, _, chosen = simulate(machine, lambda *_: 0.9, requests=5, tokens=200, known=False)
    assert (sum(k > 0 for k in chosen[-100:]) > 50) == speculates
    assert spent / plain < (0.6 if speculates else 1.06)


@pytest.mark.parametrize(("choice", "caught_up"), [(None, 0), (Choice("draft", 4), 0), (Choice("draft", 4), 3)])
def test_a_stall_of_the_machine_changes_nothing(choice, caught_up):
    """A step that took a minute, whichever it was: a good draft is still used, a bad one still not."""
    for rate, expected in ((0.9, Choice("draft", 4)), (0.0, None)):
        controller = Controller([4])
        controller.costs.learn(PLAIN, BatchShape(1), 1.0)
        controller.costs.learn(Choice("draft", 4), BatchShape(1), 1.3)
        controller.learn(choice, BatchShape(1), 1, 60.0, caught_up=caught_up)
        for _ in range(10):
            controller.learn(None, BatchShape(1), 1, 1.0)
        assert controller.choose(BatchShape(1), {"draft": [Candidate(4, rate)]}) == expected


def test_a_step_is_chosen_for_all_its_rows_together():
    """Seven useless rows beside one good one: worth it only while verification is nearly free."""
    rows = [Candidate(4, 0.95)] + [Candidate(4, 0.05)] * 7
    for cost, expected in ((1.05, True), (2.0, False)):
        controller = Controller([4])
        controller.costs.learn(PLAIN, BatchShape(8), 1.0)
        controller.costs.learn(Choice("draft", 4), BatchShape(8), cost)
        assert (controller.choose(BatchShape(8), {"draft": rows}) is not None) == expected


def test_the_better_arm_is_chosen():
    controller = Controller([2, 4])
    controller.costs.learn(PLAIN, BatchShape(1), 1.0)
    for k in (2, 4):
        controller.costs.learn(Choice("draft", k), BatchShape(1), 1 + 0.2 * k)
        controller.costs.learn(Choice("ngram", k), BatchShape(1), 1 + 0.05 * k)
    good, poor = [Candidate(4, 0.9)], [Candidate(4, 0.3)]
    assert controller.choose(BatchShape(1), {"draft": good, "ngram": poor}) == Choice("draft", 4)
    assert controller.choose(BatchShape(1), {"draft": good, "ngram": good}) == Choice("ngram", 4)
    assert controller.choose(BatchShape(1), {"draft": good, "ngram": [Candidate(0, 0.9)]}) == Choice("draft", 4)


def test_costs_of_unmeasured_rows_follow_the_nearest():
    controller = Controller([4])
    controller.costs.learn(PLAIN, BatchShape(8), 2.0)
    controller.costs.learn(Choice("draft", 4), BatchShape(8), 3.0)
    controller.costs.learn(PLAIN, BatchShape(5), 1.0)
    assert controller.costs.relative("draft", BatchShape(5)) == {4: 1.5}
    assert controller.costs.plain(BatchShape(6)) == 1.0


def test_fewer_proposals_never_cost_more():
    """What was measured seldom gives way to what was measured often; no speculative step is below a plain one."""
    costs = Controller([1, 4, 8]).costs
    for choice, seconds, times in (
        (PLAIN, 1.0, 1),
        (Choice("ngram", 1), 0.9, 1),
        (Choice("ngram", 4), 5.5, 1),
        (Choice("ngram", 8), 1.5, 3),
        (Choice("draft", 8), 1.2, 1),
    ):
        for _ in range(times):
            costs.learn(choice, BatchShape(1), seconds)
    assert costs.relative("ngram", BatchShape(1)) == {1: 1.0, 4: 2.5, 8: 2.5}


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 20)), max_size=8))
def test_pooled_costs_rise_and_keep_their_weighted_mean(found):
    pooled = rising(found)
    assert pooled == sorted(pooled) and len(pooled) == len(found)
    total = sum(mean * weight for mean, (_, weight) in zip(pooled, found, strict=True))
    assert total == pytest.approx(sum(value * weight for value, weight in found), abs=1e-9)
    if [v for v, _ in found] == sorted(v for v, _ in found):
        assert pooled == [v for v, _ in found]


@given(rate=st.floats(0, 1), k=st.integers(0, 16))
def test_expected_tokens_is_the_sum_of_the_powers(rate, k):
    assert expected_tokens(rate, k) == pytest.approx(sum(rate**i for i in range(k + 1)), rel=1e-6)


def test_totals_count_each_position_once():
    totals = Totals()
    totals.learn(4, 2)
    totals.learn(2, 2)
    totals.learn(3, 0)
    assert (totals.steps, totals.drafted, totals.accepted) == (3, 9, 4)
    assert totals.blocks == [1, 0, 2, 0, 0]
    assert totals.positions == [[3, 2], [2, 2], [1, 0], [0, 0]]


# -------------------------------------------------------------------------------------- speculator


class Guesses:
    """A proposer that is right or wrong as it is told, and counts how often it is asked."""

    def __init__(self):
        self.asked, self.right = 0, False

    def offers(self, requests, limits):
        self.asked += 1
        return [Offer(limit) for limit in limits]

    def propose(self, requests, counts):
        return Proposal(torch.zeros(len(requests), max(counts), dtype=torch.int64), list(counts))

    def learn(self, requests, accepted): ...


def decode(speculator, requests, steps):
    """Steps at known costs; how many of them were plain."""
    plain = 0
    for _ in range(steps):
        proposal = speculator.propose(requests)
        right = speculator.proposers["draft"].right
        accepted = [0] * len(requests) if proposal is None or not right else proposal.counts
        seconds = 1.0 if proposal is None else 1 + 0.1 * max(proposal.counts)
        speculator.learn(requests, proposal, accepted, seconds)
        plain += proposal is None
        for s, count in zip(requests, accepted, strict=True):
            s.output += [0] * (count + 1)
    return plain


@pytest.fixture
def guessing():
    controller = Controller([1, 4])
    for choice, cost in ((PLAIN, 1.0), (Choice("draft", 1), 1.1), (Choice("draft", 4), 1.4)):
        controller.costs.learn(choice, BatchShape(1), cost)
    return Speculator({"draft": Guesses()}, controller, max_seq_len=1 << 20)


def new_request():
    return Request("r", [1], SamplingParams(max_new_tokens=1 << 20), 0, output=[0])


def test_a_useless_proposer_is_asked_less_and_less(guessing):
    row, asked = new_request(), []
    for _ in range(4):
        before = guessing.proposers["draft"].asked
        assert decode(guessing, [row], 250) > 200
        asked.append(guessing.proposers["draft"].asked - before)
    assert asked[-1] < 150
    assert guessing.controller.balance > -guessing.controller.overdraft - 1


def test_a_rest_ends_with_a_new_request(guessing):
    row = new_request()
    decode(guessing, [row], 400)
    while not guessing.resting:
        decode(guessing, [row], 1)
    asked = guessing.proposers["draft"].asked
    decode(guessing, [row], 1)
    assert guessing.proposers["draft"].asked == asked  # the step was not even looked at
    decode(guessing, [row], 10)
    while not guessing.resting:
        decode(guessing, [row], 1)
    asked = guessing.proposers["draft"].asked
    guessing.propose([row, new_request()])
    assert guessing.proposers["draft"].asked == asked + 1


def test_a_step_that_is_said_early_to_be_plain_is_plain(guessing):
    """Half of the looks come one step before, as a runner asks that begins it early."""
    row, plain = new_request(), 0
    for i in range(400):
        promised = i % 2 and guessing.plain_next([row], unknown=0)
        plain += promised
        assert decode(guessing, [row], 1) >= promised
        if i % 2 == 0 and guessing.plain_next([row], unknown=1):
            row.output += [0]
            assert guessing.propose([row]) is None and guessing.last.early
            guessing.learn([row], None, [0], 1.0)
    assert plain > 100
    assert guessing.controller.balance > -guessing.controller.overdraft - 1


def test_a_promise_to_other_sequences_binds_nobody(guessing):
    """Some have ended or were aborted since: what is left is looked at anew."""
    first, second = new_request(), new_request()
    decode(guessing, [first, second], 400)
    while not guessing.plain_next([first, second], unknown=0):
        decode(guessing, [first, second], 1)
    guessing.resting, guessing.proposers["draft"].right = 0, True
    guessing.controller.balance = 1e9
    assert guessing.propose([second]) is not None


@pytest.mark.parametrize(("accepted", "waits"), [(0.9, True), (0.02, False)])
def test_a_lookup_is_waited_for_where_its_next_token_is_likely(accepted, waits):
    """Match of one token: whether the next step begins ahead depends on how often such matches go on."""
    controller = Controller([4])
    for choice, cost in ((PLAIN, 1.0), (Choice("ngram", 4), 1.3)):
        controller.costs.learn(choice, BatchShape(1), cost)
    speculator = Speculator({"ngram": NGramProposer(torch.device("cpu"))}, controller, max_seq_len=1 << 20)
    row = Request("r", [5, 6, 7, 8, 9, 2, 3], SamplingParams(max_new_tokens=1 << 20), 0, output=[5])
    speculator.pool = {("ngram", kind): Acceptance(accepted * 1000, 1000) for kind in range(1, 6)}
    assert speculator.plain_next([row], unknown=1) != waits
    row.output += [6]
    assert (speculator.propose([row]) is not None) == waits


def test_plain_steps_that_could_not_overlap_are_paid_from_the_account():
    controller = Controller([4])
    controller.costs.learn(PLAIN, BatchShape(1), 1.0)
    for _ in range(50):
        controller.learn(None, BatchShape(1), 1, 1.04, overlapped=False)
    assert controller.costs.plain(BatchShape(1)) == 1.0
    assert controller.costs.relative("unoverlapped", BatchShape(1)) == {0: pytest.approx(1.04)}
    assert controller.balance == pytest.approx(50 * (controller.allowance - 0.04))


def test_a_proposer_that_turns_good_is_noticed_despite_rests(guessing):
    row = new_request()
    decode(guessing, [row], 400)
    guessing.proposers["draft"].right = True
    decode(guessing, [row], 100)
    assert decode(guessing, [row], 100) < 10


# ------------------------------------------------------------------------------------------ n-gram


def slow_lookup(tokens, count):
    """Every earlier end, longest match with the end of the tokens first, then the most recent."""
    best, best_length = None, 0
    for end in range(1, len(tokens)):
        length = 0
        while length < min(end, NGramIndex.LONGEST) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length and length >= best_length:
            best, best_length = end, length
    if best is None:
        return [], 0
    out = list(tokens)
    for i in range(count):
        out.append(out[best + i])
    return out[len(tokens) :], best_length


@given(tokens=st.lists(st.integers(0, 4), max_size=60), count=st.integers(1, 8), cut=st.integers(0, 60))
def test_lookup_is_the_slow_one(tokens, count, cut):
    index = NGramIndex()
    index.LOOKED_AT = 1000
    index.extend(tokens[:cut])
    index.extend(tokens[cut:])
    assert index.propose(count) == slow_lookup(tokens, count)


@given(tokens=st.lists(st.integers(0, 2), max_size=200), count=st.integers(1, 8))
def test_lookup_proposes_only_what_followed_its_match(tokens, count):
    index = NGramIndex()
    index.extend(tokens)
    proposal, length = index.propose(count)
    assert len(proposal) == (count if length else 0)
    if length:
        text = [*tokens, *proposal]
        found = [e for e in range(length, len(tokens)) if tokens[e - length : e] == tokens[-length:]]
        assert any(text[e : e + count] == proposal for e in found)


def test_one_token_is_a_match_where_there_is_no_longer_one():
    index = NGramIndex()
    index.extend([5, 1, 2, 3, 9, 1])
    assert index.propose(3) == ([2, 3, 9], 1)
    index.extend([2])
    assert index.propose(2) == ([3, 9], 2)


def test_a_loop_goes_on_periodically():
    index = NGramIndex()
    index.extend([5, 1, 2, 3, 1, 2, 3, 1, 2])
    assert index.propose(7) == ([3, 1, 2, 3, 1, 2, 3], 5)


def test_lookup_stays_fast_in_a_long_monotonous_text():
    index = NGramIndex()
    index.extend([7] * 100_000)
    assert index.propose(4) == ([7, 7, 7, 7], NGramIndex.LONGEST)
