"""Whatever workers do and however they die, each row is answered once and none is lost."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gpt_fast.batch.dealer import Dealer, Done
from support.examples import examples

COUNT = 30
WORKERS = st.sampled_from(["a", "b", "c"])


class Book:
    """A journal in memory, which refuses a second answer as the real one does."""

    def __init__(self):
        self.kept = {}

    def add(self, number, line):
        return self.kept.setdefault(number, line) is line


class Dealing(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.book, self.told = Book(), []
        self.dealer = Dealer(((n, f"row {n}") for n in range(1, COUNT + 1)), self.book, self.told.append)
        self.held = {"a": [], "b": [], "c": []}

    @rule(worker=WORKERS, answered=st.integers(0, 9), want=st.integers(0, 9))
    def trade(self, worker, answered, want):
        held = self.held[worker]
        done, self.held[worker] = held[:answered], held[answered:]
        deal = self.dealer.trade(worker, [Done(number, f"answer {number}", 1) for number, _ in done], want)
        self.held[worker] += deal.rows
        if deal.over:
            assert len(self.book.kept) == COUNT

    @rule(worker=WORKERS)
    def die(self, worker):
        self.dealer.lost(worker)
        self.held[worker] = []

    @invariant()
    def nothing_is_told_or_held_twice(self):
        numbers = [done.number for done in self.told]
        in_flight = [number for rows in self.held.values() for number, _ in rows]
        assert len(set(numbers + in_flight)) == len(numbers + in_flight)

    def teardown(self):
        for worker in self.held:
            while not self.dealer.trade(worker, [], 0).rows and self.held[worker]:
                self.trade(worker, 9, 0)
        while not (deal := self.dealer.trade("last", [], 4)).over:
            self.dealer.trade("last", [Done(number, f"answer {number}", 1) for number, _ in deal.rows], 0)
        assert self.book.kept == {n: f"answer {n}" for n in range(1, COUNT + 1)}
        assert len(self.told) == COUNT


TestDealing = Dealing.TestCase
TestDealing.settings = examples(40)
