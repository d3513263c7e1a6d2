"""The scheduler under random traffic, beside a model of the KV memory it steers.

`Machine` stands in for model and cache: each slot is a list of tokens, chunks and decodes write to it, prefix copies
move them, and before any of them runs, the slot must hold exactly the tokens the request says were computed. A
request's next token is a hash of all tokens before it and its seed, so every answer is known in advance.
"""

import random
import sys
import zlib

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gpt_fast.config import SamplingParams
from gpt_fast.engine.scheduler import MIN_SHARED, Scheduler
from gpt_fast.request import Request, SampledToken
from support.examples import examples

EOS = 0
VOCAB = 50


def next_token(tokens, seed):
    return zlib.crc32(repr((tokens, seed)).encode()) % VOCAB


def expected_answer(prompt, params, seed, max_seq_len):
    output = []
    while True:
        output.append(next_token(prompt + output, seed))
        if output[-1] == EOS and not params.ignore_eos:
            return output, "stop"
        if len(output) == params.max_new_tokens or len(prompt) + len(output) == max_seq_len:
            return output, "length"


class Machine:
    """A scheduler, the memory it believes in, and everything that must hold."""

    def __init__(self, *, slots, max_seq_len=64, chunk=24, chunk_beside_decode=8, reuse_prefix=True, verified=1):
        self.scheduler = Scheduler(slots=slots, max_seq_len=max_seq_len, eos_ids=[EOS], reuse_prefix=reuse_prefix)
        self.chunk, self.chunk_beside_decode, self.verified = chunk, chunk_beside_decode, verified
        self.memory = [[None] * max_seq_len for _ in range(slots)]
        self.owner_of = [[None] * max_seq_len for _ in range(slots)]
        self.requests, self.answers, self.reasons = {}, {}, {}
        self.computed_tokens = 0
        self.count = 0

    def add(self, prompt, owner="", **params):
        self.count += 1
        name = f"r{self.count}"
        request = Request(name, list(prompt), SamplingParams(**params), seed=self.count, owner=owner)
        self.scheduler.add(request)
        self.requests[name], self.answers[name] = request, []
        return name

    def abort(self, name):
        known = name in self.requests and name not in self.reasons
        assert self.scheduler.abort(name) == known
        self.requests.pop(name, None)

    def step(self):
        decoding = {name for name, s in self.scheduler.running.items() if s.output}
        prefilling = self.scheduler.prefilling
        plan = self.scheduler.schedule(chunk=self.chunk, chunk_beside_decode=self.chunk_beside_decode)
        assert {s.id for s in plan.decodes} == decoding  # nobody who streams ever waits
        budget = self.chunk_beside_decode if decoding else self.chunk
        assert sum(c.count for c in plan.chunks) <= budget and all(c.count > 0 for c in plan.chunks)
        assert bool(plan) == bool(self.scheduler.running) and bool(plan.chunks) == prefilling
        ids = [c.request.id for c in plan.chunks] + [s.id for s in plan.decodes]
        assert len(set(ids)) == len(ids)
        sampled = self.execute(plan)
        events = self.scheduler.commit(plan, sampled)
        assert plan.more == any(not s.output for s in self.scheduler.running.values())
        for event in events:
            assert event.request_id not in self.reasons  # nothing after the end
            self.answers[event.request_id].append(event.token)
            if event.finish_reason:
                self.reasons[event.request_id] = event.finish_reason
                self.check_answer(event.request_id)
        self.scheduler.check_integrity()
        return events

    def execute(self, plan):
        """Do to the memory what the runner does to the cache, in its order."""
        for copy in plan.copies:
            assert None not in self.memory[copy.source][: copy.length]
            for rows in (self.memory, self.owner_of):
                rows[copy.target][: copy.length] = rows[copy.source][: copy.length]
        sampled = {}
        for chunk in plan.chunks:
            request = chunk.request
            self.write(request, request.computed, chunk.count)
            assert chunk.last == (request.computed + chunk.count == len(request.prompt))
            if chunk.last:
                sampled[request.id] = [SampledToken(next_token(request.prompt, request.seed))]
        for request in plan.decodes:
            assert request.computed == request.length - 1
            self.write(request, request.computed, 1)
            sampled[request.id] = self.verify(request)
        return sampled

    def verify(self, request):
        """One token, or as many as a verified draft brings: their keys are in the slot already."""
        tokens = request.prompt + request.output
        for _ in range(random.Random(str(tokens)).randint(1, self.verified)):
            tokens.append(next_token(tokens, request.seed))
        new = tokens[request.length :]
        for i, token in enumerate(new[:-1]):
            if request.length + i < self.scheduler.max_seq_len:
                self.memory[request.slot][request.length + i] = token
                self.owner_of[request.slot][request.length + i] = request.owner
        return [SampledToken(t) for t in new]

    def write(self, request, start, count):
        """The tokens go in; what attention would read before them must be this request's own beginning."""
        stop = start + count
        tokens = request.tokens(0, stop)
        assert tokens == (request.prompt + request.output)[:stop]
        memory, owners = self.memory[request.slot], self.owner_of[request.slot]
        assert memory[:start] == tokens[:start]
        assert set(owners[:start]) <= {request.owner}
        memory[start:stop] = tokens[start:]
        owners[start:stop] = [request.owner] * count
        self.computed_tokens += count

    def check_answer(self, name):
        s = self.requests[name]
        expected, reason = expected_answer(s.prompt, s.params, s.seed, self.scheduler.max_seq_len)
        assert self.answers[name] == expected
        assert self.reasons[name] == reason
        assert name not in self.scheduler.running

    def drain(self):
        """Everything ends within the steps its tokens need: nobody starves."""
        left = [s for name, s in self.requests.items() if name not in self.reasons]
        least = min(self.chunk_beside_decode, self.chunk)
        bound = sum(s.params.max_new_tokens + len(s.prompt) // least + 2 for s in left)
        for _ in range(bound):
            if self.scheduler.idle:
                break
            self.step()
        assert self.scheduler.idle and set(self.requests) <= set(self.reasons)
        assert len(self.scheduler.free) == len(self.scheduler.slots)


def shared_prompt(rng, max_seq_len):
    """Prompts that begin alike more often than not: one of few beginnings, cut anywhere, with an end of its own."""
    beginning = (
        [(rng.randrange(3) + i * i) % VOCAB for i in range(max_seq_len)]
        if rng.random() < 0.3
        else list(range(1, max_seq_len))
    )
    prompt = beginning[: rng.randrange(max_seq_len)] + [rng.randrange(VOCAB) for _ in range(rng.randrange(8))]
    return prompt[: max_seq_len - 1] or [1]


class Traffic(RuleBasedStateMachine):
    @initialize(
        slots=st.integers(1, 5),
        chunk=st.integers(1, 40),
        beside=st.integers(1, 20),
        reuse=st.booleans(),
        max_seq_len=st.sampled_from([2, 17, 64]),
        verified=st.integers(1, 4),
    )
    def start(self, slots, chunk, beside, reuse, max_seq_len, verified):
        self.machine = Machine(
            slots=slots,
            chunk=chunk,
            chunk_beside_decode=min(beside, chunk),
            reuse_prefix=reuse,
            max_seq_len=max_seq_len,
            verified=verified,
        )

    @rule(
        seed=st.integers(0, 10**6), owner=st.sampled_from(["", "a"]), new=st.integers(1, 20), ignore_eos=st.booleans()
    )
    def add(self, seed, owner, new, ignore_eos):
        prompt = shared_prompt(random.Random(seed), self.machine.scheduler.max_seq_len)
        self.machine.add(prompt, owner, max_new_tokens=new, ignore_eos=ignore_eos)

    @rule(data=st.data())
    def continue_a_chat(self, data):
        """The next turn: an earlier prompt, its answer, and more."""
        machine = self.machine
        if not machine.requests:
            return
        name = data.draw(st.sampled_from(sorted(machine.requests)))
        s = machine.requests[name]
        prompt = (s.prompt + machine.answers[name] + [7, 8])[: machine.scheduler.max_seq_len - 1]
        machine.add(prompt, s.owner, max_new_tokens=5)

    @rule(data=st.data())
    def abort(self, data):
        self.machine.abort(data.draw(st.sampled_from([*sorted(self.machine.requests), "unknown"])))

    @rule(steps=st.integers(1, 10))
    def run(self, steps):
        for _ in range(steps):
            self.machine.step()

    @invariant()
    def slots_agree(self):
        if hasattr(self, "machine"):
            self.machine.scheduler.check_integrity()
            running = self.machine.scheduler.running.values()
            assert len({s.slot for s in running}) == len(running) <= len(self.machine.scheduler.slots)

    def teardown(self):
        if hasattr(self, "machine"):
            self.machine.drain()


TestTraffic = Traffic.TestCase
TestTraffic.settings = examples(150, stateful_step_count=30)


@pytest.mark.slow
def test_twenty_thousand_random_steps():
    rng = random.Random(0)
    machine = Machine(slots=6, max_seq_len=48, chunk=16, chunk_beside_decode=8)
    for _ in range(20_000):
        if rng.random() < 0.25 and len(machine.scheduler.waiting) < 20:
            prompt = shared_prompt(rng, 48)
            machine.add(prompt, rng.choice(["", "a"]), max_new_tokens=rng.randint(1, 20), ignore_eos=rng.random() < 0.5)
        if rng.random() < 0.03 and (alive := [n for n in machine.requests if n not in machine.reasons]):
            machine.abort(rng.choice(alive))
        machine.step()
        for name in [n for n in machine.reasons if n in machine.requests]:
            del machine.requests[name]
    machine.drain()
    assert len(machine.reasons) > 1000


# -------------------------------------------------------------------------------------- cases


def test_first_come_first_served_and_no_more_than_the_slots():
    machine = Machine(slots=2)
    names = [machine.add([1, 2, i], max_new_tokens=3, ignore_eos=True) for i in range(3, 8)]
    machine.step()
    assert list(machine.scheduler.running) == names[:2]
    assert [s.id for s in machine.scheduler.waiting] == names[2:]
    started = []
    while not machine.scheduler.idle:
        started += [n for n in machine.scheduler.running if n not in started]
        machine.step()
    assert started[:5] == names


def test_a_long_prompt_does_not_stop_a_stream_nor_is_it_starved_by_short_ones():
    machine = Machine(slots=4, max_seq_len=2048, chunk=64, chunk_beside_decode=16)
    stream = machine.add([1], max_new_tokens=1500, ignore_eos=True)
    machine.step()
    long = machine.add(list(range(1, 50)) * 20, max_new_tokens=1)
    steps = 0
    while long not in machine.reasons:
        if len(machine.scheduler.running) < 4:
            machine.add([steps % VOCAB + 1] * 15, max_new_tokens=1, ignore_eos=True)  # a short prompt at every turn
        before = len(machine.answers[stream])
        machine.step()
        assert len(machine.answers[stream]) == before + 1
        steps += 1
    assert steps <= 2 * (980 / 16) + 4


def test_abort_frees_the_slot_at_once():
    machine = Machine(slots=1)
    first = machine.add([1] * 40, max_new_tokens=20)
    second = machine.add([2] * 3, max_new_tokens=1)
    waiting = machine.add([3], max_new_tokens=1)
    machine.step()
    machine.abort(first)
    machine.abort(waiting)
    machine.step()
    assert second in machine.reasons
    assert machine.scheduler.idle
    assert not machine.scheduler.abort(first) and not machine.scheduler.abort("never seen")


def test_what_add_refuses():
    machine = Machine(slots=1, max_seq_len=8)
    for prompt in ([], [1] * 8, [1] * 100):
        with pytest.raises(ValueError, match=r"prompt.*allowed 1\.\.7"):
            machine.add(prompt)
    scheduler = machine.scheduler
    scheduler.add(Request("a", [1], SamplingParams(), seed=0))
    for _ in range(2):  # waiting, then running
        with pytest.raises(ValueError, match="request id"):
            scheduler.add(Request("a", [1], SamplingParams(), seed=0))
        scheduler.schedule(chunk=1, chunk_beside_decode=1)
    assert not scheduler.schedule(chunk=1, chunk_beside_decode=1).decodes


def test_an_empty_scheduler_plans_nothing():
    plan = Scheduler(slots=1, max_seq_len=8, eos_ids=[]).schedule(chunk=8, chunk_beside_decode=8)
    assert not plan and plan.copies == plan.chunks == plan.decodes == ()


# ------------------------------------------------------------------------------- prefix reuse


def ran(machine, prompt, **options):
    """Run one request to its end; how many of its tokens were computed."""
    before = machine.computed_tokens
    name = machine.add(prompt, **{"max_new_tokens": 4, "ignore_eos": True, **options})
    while name not in machine.reasons:
        machine.step()
    return machine.computed_tokens - before


def test_the_next_turn_of_a_chat_computes_only_what_is_new():
    machine = Machine(slots=3)
    prompt = list(range(1, 31))
    assert ran(machine, prompt) == 30 + 3  # the last token sampled is never fed
    answer = machine.answers["r1"]
    assert ran(machine, [*prompt, *answer, 7, 8]) == 1 + 2 + 3
    assert ran(machine, [*prompt, 9]) == 1 + 3


def test_chats_that_share_a_system_prompt_keep_their_own_turns():
    """A second chat with the same beginning must not take over the first one's slot while others are empty."""
    machine = Machine(slots=4)
    system = list(range(1, 21))
    first, second = [*system, *[30] * 30], [*system, *[31] * 30]
    assert ran(machine, first) == 50 + 3
    assert ran(machine, second) == 30 + 3
    for name, prompt in (("r1", first), ("r2", second)):
        assert ran(machine, [*prompt, *machine.answers[name], 7]) == 1 + 1 + 3


def test_prompts_that_arrive_together_share_their_beginning():
    machine = Machine(slots=4, chunk=24)
    system = list(range(1, 21))
    names = [machine.add([*system, 30 + i, 31 + i], max_new_tokens=1) for i in range(4)]
    while set(names) - set(machine.reasons):
        machine.step()
    assert machine.computed_tokens <= 24 + 3 * 2  # the second began in the step that computed the first's
    assert sum(s.reused for s in machine.requests.values()) == 4 * 22 - machine.computed_tokens


def test_nothing_is_shared_between_owners_or_when_told_not_to():
    prompt = list(range(1, 31))
    machine = Machine(slots=1)
    ran(machine, prompt, owner="a")
    assert ran(machine, prompt, owner="b") == 33
    assert ran(machine, prompt, owner="b") == 1 + 3
    machine = Machine(slots=1, reuse_prefix=False)
    ran(machine, prompt)
    assert ran(machine, prompt) == 33


def test_a_short_common_beginning_is_not_worth_a_copy():
    machine = Machine(slots=2)
    assert ran(machine, list(range(1, MIN_SHARED)) + [40] * 5) == MIN_SHARED - 1 + 5 + 3
    assert ran(machine, list(range(1, MIN_SHARED)) + [41] * 5) == MIN_SHARED - 1 + 5 + 3


def test_a_step_is_cheap():
    """Planning must be small beside a 2 ms model step, with full slots and a queue, and cost no more for long texts."""
    short, long = (lines_of_200_steps(length) for length in (40, 4000))
    assert short == long
    assert long / 200 < 5000  # lines of Python, some 1e7 of which run in a second: half a millisecond


def lines_of_200_steps(length):
    """Lines of Python that run in 200 steps of 16 full slots, with 48 requests that wait, all of `length` tokens."""
    scheduler = Scheduler(slots=16, max_seq_len=8192, eos_ids=[])
    params = SamplingParams(max_new_tokens=4000)
    for i in range(64):
        scheduler.add(Request(str(i), [i] + [1] * length, params, seed=0))
    while not all(s.output for s in scheduler.running.values()) or len(scheduler.running) < 16:
        commit(scheduler)
    lines, before = 0, sys.gettrace()

    def trace(frame, event, _):
        nonlocal lines
        lines += event == "line"
        return trace

    sys.settrace(trace)
    try:
        for _ in range(200):
            commit(scheduler)
    finally:
        sys.settrace(before)
    return lines


def commit(scheduler):
    plan = scheduler.schedule(chunk=4096, chunk_beside_decode=4096)
    ids = [c.request.id for c in plan.chunks if c.last] + [s.id for s in plan.decodes]
    scheduler.commit(plan, {i: [SampledToken(5)] for i in ids})


def test_slots_are_forgotten_but_for_those_in_use():
    """A prompt that came before is computed anew; one that runs keeps what it has."""
    scheduler = Scheduler(slots=2, max_seq_len=64, eos_ids=[])
    prompt = list(range(40))
    for name in ("first", "again"):
        request = Request(name, prompt, SamplingParams(max_new_tokens=1), seed=0)
        scheduler.add(request)
        plan = scheduler.schedule(chunk=64, chunk_beside_decode=64)
        assert request.reused == 0 and scheduler.load() == (1, 0, 0.0)
        scheduler.forget_slots()
        scheduler.commit(plan, {name: [SampledToken(5)]})
        assert request.computed == 40 and scheduler.slots[request.slot].tokens == prompt
        scheduler.forget_slots()
        scheduler.check_integrity()
