"""The scheduler alone, over rows in plain Python."""

import ast
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kvtrain.inference.engine as package
from kvtrain.cache.budget import CacheFullError
from kvtrain.inference.engine.forecast import Forecast, Growth
from kvtrain.inference.engine.limits import Limits
from kvtrain.inference.engine.prefixes import KeptRows, common_length, parting
from kvtrain.inference.engine.scheduler import Scheduler
from kvtrain.inference.engine.sequence import ServedSequence
from tests.inference.pools import FakePool


class Served:
    """A scheduler with the passes around it, as an engine runs them; answers are what a function says."""

    def __init__(self, pool, rollback=False, **limits):
        self.pool = pool
        self.limits = Limits(**{"max_requests": 4, "step_tokens": 8, "shared_tokens": 3, **limits})
        self.scheduler = Scheduler(pool, self.limits, Forecast(pool.state, 1.0), rollback)
        self.ends, self.done, self.arrivals, self.steps, self.reads = {}, {}, 0, 0, []

    def add(self, prompt, max_new_tokens=4, new_tokens=None):
        sequence = ServedSequence(tuple(prompt), max_new_tokens, self.arrivals)
        self.ends[sequence] = max_new_tokens if new_tokens is None else new_tokens
        self.arrivals += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self):
        self.steps += 1
        self.scheduler.admit()
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        before = oldest and (oldest.seen, len(oldest.output))
        for run in (self.scheduler.decode_pass, self.scheduler.prompt_pass):
            self._commit(run(self._feed))
        if oldest in self.scheduler.running:
            assert (oldest.seen, len(oldest.output)) > before, "the oldest that runs makes room for nobody"
        for refusal in self.scheduler.refused:
            self.done[refusal.sequence] = refusal.reason
        self.scheduler.refused.clear()

    def _feed(self, batch):
        width = max(chunk.tokens for chunk in batch)
        assert len(batch) * width <= self.limits.step_tokens
        if self.pool.held_bytes() + self.pool.bytes_for([s.row for s, _ in batch], width) > self.pool.budget:
            raise CacheFullError("full")
        for sequence, count in batch:
            assert sequence.row.tokens == list(sequence.tokens(0, sequence.seen)), "a row holds its own tokens"
            self.pool.feed(sequence.row, sequence.tokens(sequence.seen, sequence.seen + count))
            assert self.pool.held_bytes() <= self.pool.budget

    def _commit(self, fed):
        if fed is None:
            return
        batch, _ = fed
        for chunk in batch:
            self.reads += [] if chunk.sequence.decoding else [(chunk.sequence, chunk.tokens)]
            self.scheduler.advance(chunk)
        for sequence, _ in batch:
            if sequence.seen == sequence.length:
                sequence.output.append(100 + sequence.length % 7)
                if len(sequence.output) == self.ends[sequence]:
                    self.scheduler.remove(sequence, keep=True)
                    self.scheduler.forecast.ended(len(sequence.output), sequence.max_new_tokens)
                    self.done[sequence] = "length"

    def drain(self, most=2000):
        for _ in range(most):
            if not self.scheduler.busy:
                return self
            self.step()
        raise AssertionError(f"still busy after {most} steps")


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come and go in any order and size, under a budget that holds a few of them."""

    @initialize(
        budget=st.integers(30, 90), merge=st.sampled_from([0, 2, 3]), state=st.sampled_from([0, 1, 9]),
        rollback=st.booleans(), kept=st.sampled_from([0, 1, 3]), swap=st.sampled_from([0, 20, None]),
        hopeful=st.booleans(),
    )  # fmt: skip
    def start(self, budget, merge, state, rollback, kept, swap, hopeful):
        self.served = Served(FakePool(budget, merge, state), rollback, kept_prefixes=kept, swap_bytes=swap)
        for _ in range(100 * hopeful):  # lets too many in
            self.served.scheduler.forecast.ended(1, 100)
        self.alive = []

    @rule(
        common=st.integers(0, 12), own=st.lists(st.integers(0, 2), min_size=1, max_size=20),
        most=st.integers(1, 20), share=st.floats(0, 1),
    )  # fmt: skip
    def submit(self, common, own, most, share):
        self.alive.append(self.served.add([9] * common + own, most, max(1, int(share * most))))

    @rule(ticks=st.integers(1, 6))
    def step(self, ticks):
        for _ in range(ticks):
            self.served.step()

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data):
        sequence = self.alive.pop(data.draw(st.integers(0, len(self.alive) - 1)))
        if sequence not in self.served.done:
            self.served.scheduler.remove(sequence, keep=False)

    @precondition(lambda self: self.served.done)
    @rule(data=st.data(), own=st.lists(st.integers(0, 2), min_size=1, max_size=4))
    def next_turn(self, data, own):
        """A prompt that goes on behind an answer."""
        former = data.draw(st.sampled_from(sorted(self.served.done, key=lambda s: s.arrival)))
        self.alive.append(self.served.add([*former.prompt, *former.output, *own]))

    @rule()
    def drop_kept(self):
        self.served.scheduler.drop_kept()

    @invariant()
    def bytes_are_owned(self):
        scheduler, pool = self.served.scheduler, self.served.pool
        owned = [s.row for s in scheduler.running] + scheduler.kept.rows()
        assert len(set(map(id, owned))) == len(owned)
        assert set(map(id, owned)) == set(map(id, pool.rows)) - set(map(id, pool.empty))
        assert pool.held_bytes() <= pool.budget
        assert len(scheduler.kept) <= self.served.limits.kept_prefixes
        assert scheduler.swapped_bytes == sum(s.snapshot.num_bytes() for s in scheduler.queue if s.snapshot)

    def teardown(self):
        if hasattr(self, "served"):
            self.served.drain()
            assert all(sequence in self.served.done for sequence in self.alive)
            self.served.scheduler.drop_kept()
            assert self.served.pool.held_bytes() == 0 == self.served.scheduler.swapped_bytes


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def ample(**limits):
    return Served(FakePool(10_000), **{"max_requests": 32, "step_tokens": 64, **limits})


@pytest.mark.parametrize("rollback", [False, True])
def test_a_common_beginning_is_read_once(rollback):
    served = ample(rollback=rollback)
    for own in range(16):
        served.add([9] * 20 + [own, own + 1])
    served.drain()
    assert sum(tokens for _, tokens in served.reads) == 20 + 16 * 2 == served.scheduler.read_tokens


def test_several_answers_to_a_prompt_read_it_once():
    served = ample()
    for _ in range(4):
        served.add(range(30))
    served.drain()
    assert served.scheduler.read_tokens == 29 + 4  # the last token is read by each: its logits are theirs


def test_requests_that_come_later_find_where_others_parted():
    """The second one parts from the first, and the third finds that place."""
    served, read = ample(), []
    for own in range(3):
        served.add([9] * 20 + [own, own])
        before = served.scheduler.read_tokens
        served.drain()
        read.append(served.scheduler.read_tokens - before)
    assert read == [22, 22, 2]


@pytest.mark.parametrize("rollback", [False, True])
def test_ten_turns_read_no_token_twice(rollback):
    served, prompt = ample(rollback=rollback), [1, 2, 3, 4]
    for turn in range(10):
        sequence = served.add(prompt)
        served.drain()
        prompt = [*prompt, *sequence.output, turn]
    assert served.scheduler.read_tokens == 4 + 9 * 2  # an answer's last token was chosen and never fed
    assert len(served.scheduler.kept) == 1, "a row that is gone on with is taken over, not copied"


def test_where_rows_can_be_cut_any_common_beginning_is_used():
    for rollback, read in ((False, 12), (True, 2)):
        served = ample(rollback=rollback)
        served.add([9] * 10 + [1, 1, 1, 1])
        served.drain()
        before = served.scheduler.read_tokens
        served.add([9] * 10 + [2, 2])
        served.drain()
        assert served.scheduler.read_tokens - before == read


def test_no_prefix_is_kept_where_none_is_wanted():
    served = ample(kept_prefixes=0)
    for _ in range(3):
        served.add([9] * 20)
    served.drain()
    assert served.scheduler.read_tokens == 60 and served.pool.held_bytes() == 3 * served.pool.state
    served.scheduler.drop_kept()
    assert served.pool.held_bytes() == 0


def test_kept_rows_go_before_anyone_waits_or_is_preempted():
    served = Served(FakePool(60, state=0), max_requests=2)
    served.add([1] * 30, 2)
    served.drain()
    assert len(served.scheduler.kept) == 1
    served.add([2] * 30, 2)
    served.add([3] * 20, 2)
    served.drain()
    assert served.scheduler.preemptions == 0 and set(served.done.values()) == {"length"}


def test_a_row_that_cannot_be_copied_is_taken_over():
    """Not even when the copy has got as far as an empty row."""
    served = Served(FakePool(34, state=1))
    row = served.pool.take()
    served.pool.feed(row, [9] * 20)
    served.scheduler.kept.add((9,) * 20, row, branch=True)
    sequence = served.add([9] * 20 + [1, 2])
    served.drain(most=10)
    assert served.done[sequence] == "length" and sequence.cached == 20
    assert served.scheduler.read_tokens == 2 and len(served.scheduler.kept) == 1


@pytest.mark.parametrize("swap", [None, 0])
def test_the_youngest_makes_room_by_swap_or_reads_again(swap):
    """Two that seem to be short and are not: the older one never stops."""
    served = Served(FakePool(32, state=0), kept_prefixes=0, swap_bytes=swap)
    for _ in range(60):
        served.scheduler.forecast.ended(1, 100)
    older, younger = served.add([1] * 8, 16), served.add([2] * 8, 16)
    while not older.output:
        served.step()
    for _ in range(15):
        served.step()
    assert older in served.done and older.preemptions == 0 and younger.preemptions == 1
    again = 8 + len(younger.output) - 1 if swap == 0 else 0
    served.drain()
    assert served.done[younger] == "length" and len(younger.output) == 16
    assert served.scheduler.read_tokens == 8 + 8 + again


def test_the_youngest_goes_first_and_stands_before_those_that_came_later():
    served = Served(FakePool(48, state=0), max_requests=3, kept_prefixes=0)
    for _ in range(100):
        served.scheduler.forecast.ended(1, 100)
    old, middle, young, last = (served.add([own] * 4, 16) for own in range(4))
    while not young.preemptions:
        served.step()
    assert served.scheduler.queue == [young, last] and (old.preemptions, middle.preemptions) == (0, 0)
    served.drain()
    assert list(served.done) == [old, middle, young, last]


def test_what_does_not_fit_alone_is_given_up_with_both_figures():
    served = Served(FakePool(32, state=0))
    served.add([1] * 40, 2)
    served.add([2] * 5, 2)
    served.drain()
    refused, fine = served.done.values()
    assert refused == (
        "it holds 32 bytes after 32 tokens, the next may take 4 more, and that is above the budget of 32 bytes: "
        "raise the budget, or ask for fewer tokens"
    )
    assert fine == "length"


def test_short_prompts_share_a_pass_and_long_ones_go_in_chunks_beside_decoding():
    served = ample(step_tokens=40)
    short = [served.add([own] * 5) for own in range(8)]
    served.step()
    assert all(len(sequence.output) == 1 for sequence in short)
    long = served.add([8] * 100)
    served.step()
    assert long.seen == 40 - 8 and all(len(sequence.output) == 2 for sequence in short)


def test_admission_learns_that_answers_end_early():
    def most_running(share):
        served = Served(FakePool(200, state=0), max_requests=32, step_tokens=64, kept_prefixes=0)
        for _ in range(100):
            served.scheduler.forecast.ended(share, 10)
        for own in range(20):
            served.add([own] * 10, 40, 40 * share // 10)
        served.step()
        return len(served.scheduler.running)

    assert most_running(10) == 4 and most_running(2) >= 8


def test_a_forecast_is_the_line_that_it_has_seen():
    forecast = Forecast(fixed=500, slope=100)
    for tokens in (32, 64, 96, 128) * 30:
        forecast.observe(tokens, 500 + 10 * tokens)
    assert forecast.row_bytes(1000) == pytest.approx(10_500)
    assert forecast.least_bytes(1000) == 10_500
    assert Forecast(fixed=0, slope=7).row_bytes(10) == 70


def test_a_peak_is_where_sequences_meet_not_the_sum_of_their_ends():
    forecast = Forecast(fixed=0, slope=1)
    short, long = Growth(held=50, tokens=10), Growth(held=10, tokens=60)
    assert forecast.peak([short, long]) == pytest.approx(forecast.caution * (60 + 20))
    assert forecast.peak([long]) == pytest.approx(forecast.caution * 70)
    before = forecast.caution
    forecast.preempted()
    assert forecast.caution > before


def test_prefixes_part_where_most_is_saved():
    assert common_length(tuple(range(600)), (*range(599), 0)) == 599 and common_length((1, 2), (1, 2, 3)) == 2
    prompt = tuple(range(100))
    others = [(*prompt[:10], 0), (*prompt[:10], 1), (*prompt[:10], 2), (*prompt[:14], 3)]
    assert parting(prompt, others, 4) == 10
    assert parting(prompt, [prompt], 4) == 99
    assert parting(prompt, [(5,)], 4) is None and parting(prompt, [], 4) is None


def test_the_least_recently_used_row_goes_first():
    kept = KeptRows(shortest=2, rollback=False)
    for number in range(3):
        assert kept.add((number, 1, 1), f"row {number}", branch=False) is None
    assert kept.find((0, 1, 1, 5)).kept.row == "row 0" and kept.find((0, 1, 1)) is None
    assert [kept.evict() for _ in range(4)] == ["row 1", "row 2", "row 0", None]


@pytest.mark.parametrize("name", ["scheduler", "sequence", "forecast", "prefixes", "limits", "request", "stats"])
def test_the_scheduler_knows_no_tensors(name):
    tree = ast.parse((Path(package.__file__).parent / f"{name}.py").read_text())
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert not {module.split(".")[0] for module in imported} & {"torch", "transformers", "tokenizers"}
