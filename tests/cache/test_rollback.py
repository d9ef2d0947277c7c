"""Tokens taken back: as if they had never come."""

import functools
import re

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kvtrain
from tests.caches import CACHES
from tests.hosts import VOCAB, make_host, random_ids

SINK, RECENT, SLACK = 2, 5, 4
TOLERANCE = 1e-9  # float64


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@functools.cache
def model_of(kind, kv_heads=2):
    """By kind: ``full``, ``duo``, or ``duo+`` with compensation; layers of one kind of heads, and of both."""
    host = make_host(heads=4, kv_heads=kv_heads, layers=3)
    if kind == "full":
        return kvtrain.retrofit(host, kvtrain.Full())
    full_heads = [[kv_heads - 1], [], list(range(kv_heads))]
    method = kvtrain.Duo(sink=SINK, recent=RECENT, compensation=kind == "duo+", full_heads=full_heads, page_size=3)
    return kvtrain.retrofit(host, method)


def fed(model, ids, cache=None, **options):
    cache = model.make_cache(**options) if cache is None else cache
    return model(ids, past_key_values=cache).logits, cache


class Oracle:
    """Which tokens of a row could still be shown again, kept as a plain set of positions."""

    def __init__(self, slack, tokens=()):
        self.slack, self.tokens, self.evicted = slack, [], set()
        self.append(tokens)

    def append(self, tokens):
        for token in tokens:
            leaving = len(self.tokens) - RECENT
            self.tokens.append(token)
            if leaving >= SINK:
                self.evicted = {p for p in self.evicted | {leaving} if p > leaving - self.slack}

    def allows(self, count):
        return count <= len(self.tokens) and self._shown_again(count) <= self.evicted

    def rollback(self, count):
        left = len(self.tokens) - count
        self.evicted = {p for p in self.evicted if p < left - RECENT}
        del self.tokens[left:]

    def _shown_again(self, count):
        left = len(self.tokens) - count
        first = max(SINK, left - RECENT)
        return set(range(first, len(self.tokens) - RECENT)) if left > SINK else set()

    def copy(self):
        other = Oracle(self.slack)
        other.tokens, other.evicted = list(self.tokens), set(self.evicted)
        return other


class RollbackMachine(RuleBasedStateMachine):
    """Rows read, go back, read something else, change places and come back, each as it would be alone."""

    kind, slack = "duo", SLACK

    @initialize(rows=st.integers(1, 3))
    def start(self, rows):
        self.model, self.saved = model_of(self.kind), []
        self.options = {} if self.kind == "full" else {"slack": self.slack}
        self.cache, self.rows = self.model.make_cache(**self.options), []
        self.cache.admit(rows)
        self.rows = [Oracle(10**6 if self.kind == "full" else self.slack) for _ in range(rows)]

    def _tokens(self, data, count):
        return data.draw(st.lists(st.integers(3, VOCAB - 1), min_size=count, max_size=count))

    @rule(data=st.data(), longest=st.sampled_from([1, 1, 3, 14]))
    def read(self, data, longest):
        new = [self._tokens(data, data.draw(st.integers(0, longest))) for _ in self.rows]
        width = max(1, *map(len, new))
        ids, mask = torch.zeros(2, len(new), width, dtype=torch.long)
        for row, tokens in enumerate(new):
            if tokens:
                ids[row, -len(tokens) :], mask[row, -len(tokens) :] = torch.tensor(tokens), 1
        logits = self.model(ids, attention_mask=mask, past_key_values=self.cache).logits
        for row, tokens in enumerate(new):
            self.rows[row].append(tokens)
            if tokens:
                alone = self.model(torch.tensor([self.rows[row].tokens]), use_cache=False).logits[0, -len(tokens) :]
                close(logits[row, -len(tokens) :], alone)

    @rule(data=st.data())
    def go_back(self, data):
        """Or be refused, for a row that cannot, and nothing happens to the others either."""
        counts = [data.draw(st.integers(0, min(len(row.tokens), 2 * SLACK))) for row in self.rows]
        self._rollback(counts)

    @rule(data=st.data())
    def go_far_back(self, data):
        self._rollback([data.draw(st.integers(0, len(row.tokens))) for row in self.rows])

    def _rollback(self, counts):
        if not all(row.allows(count) for row, count in zip(self.rows, counts, strict=True)):
            with pytest.raises(ValueError, match=r"make_cache\(slack="):
                self.cache.rollback(torch.tensor(counts))
            return
        seen = self.cache.get_seq_length()
        self.cache.rollback(torch.tensor(counts))
        assert self.cache.get_seq_length() == max(0, seen - max(counts))
        for row, count in zip(self.rows, counts, strict=True):
            row.rollback(count)

    @rule(data=st.data())
    def change_places(self, data):
        indices = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=3))
        self.cache.reorder_cache(torch.tensor(indices))
        self.rows = [self.rows[index].copy() for index in indices]

    @precondition(lambda self: len(self.rows) < 4)
    @rule(data=st.data(), count=st.integers(1, 20))
    def join(self, data, count):
        tokens = self._tokens(data, count)
        self.cache.join(fed(self.model, torch.tensor([tokens]), **self.options)[1])
        self.rows.append(Oracle(self.rows[0].slack, tokens))

    @rule(data=st.data())
    def save(self, data):
        row = data.draw(st.integers(0, len(self.rows) - 1))
        self.saved.append((self.rows[row].copy(), self.cache.snapshot_row(row)))

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def restore(self, data):
        row = data.draw(st.integers(0, len(self.rows) - 1))
        oracle, state = data.draw(st.sampled_from(self.saved))
        self.cache.restore_row(row, state)
        self.rows[row] = oracle.copy()

    @invariant()
    def counts(self):
        lengths = [len(row.tokens) for row in self.rows]
        assert self.cache.tokens.tolist() == lengths
        kept = self.cache.kv_tokens()
        for row, length in enumerate(lengths):
            windows = [min(length, SINK + RECENT), length] if self.kind != "full" else [length]
            assert set(kept[:, row].flatten().tolist()) == set(windows)


def _machine(kind, slack=SLACK):
    machine = type(f"RollbackMachine_{kind}_{slack}", (RollbackMachine,), {"kind": kind, "slack": slack})
    machine.TestCase.settings = settings(max_examples=25, stateful_step_count=16)
    return machine.TestCase


TestRollbackOfFull, TestRollbackOfDuo = _machine("full"), _machine("duo")
TestRollbackOfCompensatedDuo, TestRollbackWithoutSlack = _machine("duo+"), _machine("duo+", 0)


@pytest.mark.parametrize("kind", ["duo", "duo+"])
@pytest.mark.parametrize("chunk", [1, 3, 30])
def test_a_replay_is_a_straight_run(kind, chunk):
    """Back by every number up to the slack, again and again, and on with other tokens."""
    model, ids = model_of(kind), random_ids(2, 60)
    expected = model(ids, use_cache=False).logits
    for count in range(1, SLACK + 1):
        _, cache = fed(model, ids[:, :25], slack=SLACK)
        for _ in range(3):
            model(random_ids(2, count, seed=count), past_key_values=cache)
            cache.rollback(count)
        logits = [model(part, past_key_values=cache).logits for part in ids[:, 25:].split(chunk, 1)]
        close(torch.cat(logits, 1), expected[:, 25:])
        assert cache.get_seq_length() == 60 and cache.tokens.tolist() == [60, 60]


@pytest.mark.parametrize("first", range(1, SLACK + 1))
def test_slack_that_is_used_up_fills_again_with_what_is_dropped(first):
    """Back, on, and back again, by every number."""
    model, ids = model_of("duo+"), random_ids(1, 30)
    other = random_ids(1, SLACK, seed=5)
    for more in range(SLACK + 1):
        text = torch.cat([ids[:, : 30 - first], other[:, :more]], 1)
        expected = model(torch.cat([text, other], 1), use_cache=False).logits
        for second in range(SLACK + 2):
            _, cache = fed(model, ids, slack=SLACK)
            oracle = Oracle(SLACK, range(30))
            cache.rollback(first)
            oracle.rollback(first)
            if more:
                model(other[:, :more], past_key_values=cache)
                oracle.append(range(more))
            left = text.shape[1] - second
            if oracle.allows(second):
                cache.rollback(second)
                rest = torch.cat([text[:, left:], other], 1)
                close(fed(model, rest, cache)[0], expected[:, left:])
            else:
                with pytest.raises(ValueError, match=f"slack={SLACK + max(first - more, 0) + second - SLACK}"):
                    cache.rollback(second)


@pytest.mark.parametrize("kind", ["duo", "duo+"])
def test_a_refusal_asks_for_the_slack_that_is_enough(kind):
    model, ids = model_of(kind), random_ids(1, 40)
    expected = model(ids, use_cache=False).logits
    for slack in (0, 2):
        _, cache = fed(model, ids[:, :30], slack=slack)
        if slack:  # what was taken back once is no longer set aside
            model(ids[:, 30:31], past_key_values=cache)
            cache.rollback(1)
        with pytest.raises(ValueError, match="row 0 cannot go back by 7 tokens") as refusal:
            cache.rollback(7)
        asked = int(re.search(r"slack=(\d+)", str(refusal.value))[1])
        close(fed(model, ids[:, 30:], cache)[0], expected[:, 30:])
        for enough in (asked, asked - 1):
            _, cache = fed(model, ids[:, :30], slack=enough)
            if slack:
                model(ids[:, 30:31], past_key_values=cache)
                cache.rollback(1)
            if enough < asked:
                with pytest.raises(ValueError, match=f"slack={asked}"):
                    cache.rollback(7)
            else:
                cache.rollback(7)
                close(fed(model, ids[:, 23:], cache)[0], expected[:, 23:])


@pytest.mark.parametrize("kind", ["full", "duo", "duo+"])
def test_while_nothing_is_dropped_any_number_may_go(kind):
    model, ids = model_of(kind), random_ids(2, 30)
    expected = model(ids, use_cache=False).logits
    for count in range(SINK + RECENT + 1):
        _, cache = fed(model, ids[:, : SINK + RECENT])
        cache.rollback(count)
        left = SINK + RECENT - count
        assert cache.get_seq_length() == left
        close(fed(model, ids[:, left:], cache)[0], expected[:, left:])
        for keep in range(SINK + 1):  # nor do sinks ever go
            cache.rollback(cache.get_seq_length() - keep)
            close(fed(model, ids[:, keep:], cache)[0], expected[:, keep:])


@pytest.mark.parametrize("kind", ["duo", "duo+"])
def test_who_goes_back_to_the_sinks_starts_anew(kind):
    """A later step back is not held against what was dropped before."""
    model, ids = model_of(kind), random_ids(2, 30)
    expected = model(ids, use_cache=False).logits
    for keep in range(SINK + 1):
        _, cache = fed(model, ids, slack=SLACK)
        cache.rollback(30 - keep)
        close(fed(model, ids[:, keep:20], cache)[0], expected[:, keep:20])
        cache.rollback(SLACK)
        close(fed(model, ids[:, 20 - SLACK :], cache)[0], expected[:, 20 - SLACK :])


def test_pages_of_what_is_taken_back_are_free_again():
    model, ids = model_of("full"), random_ids(2, 500)
    _, cache = fed(model, ids)
    before = cache.kv_bytes()
    cache.rollback(torch.tensor([400, 300]))
    assert cache.kv_tokens()[:, 0].unique().tolist() == [100] and cache.kv_tokens()[:, 1].unique().tolist() == [200]
    assert cache.kv_bytes() < 0.4 * before and cache.get_seq_length() == 100
    cache.rollback(100 * torch.tensor([1, 2]))
    assert cache.kv_tokens().max() == 0 and cache.kv_bytes() < 0.05 * before  # a spare page a head


@pytest.mark.parametrize("kind", ["duo", "duo+"])
def test_slack_is_paid_for_by_those_who_ask_for_it(kind):
    """Keys and values of so many tokens a streaming head, and one number a row and layer."""
    model, ids = model_of(kind), random_ids(3, 20)
    (_, bare), (_, none), (_, some) = (fed(model, ids, **told) for told in ({}, {"slack": 0}, {"slack": 6}))
    assert bare.kv_bytes() == none.kv_bytes()
    pages = sum(store.num_bytes() for layer in bare.layers for store in layer.stores[:1])
    sums = (1 + 2) * 3 * 2 * 8 * 8 if kind == "duo+" else 0  # heads, rows, keys and values, D, float64
    assert bare.kv_bytes() == pages + sums + 3 * 8
    assert some.kv_bytes() - bare.kv_bytes() == (1 + 2) * 3 * 6 * 2 * 8 * 8 + 2 * 3 * 8
    assert [len(layer.stores) for layer in some.layers] == [
        len(layer.stores) + (at < 2) for at, layer in enumerate(bare.layers)
    ]


@pytest.mark.parametrize("kind", ["full", "duo", "duo+"])
def test_crop_rolls_back(kind):
    """By a new length or by a negative number, as versions of transformers have it; by nothing for 0."""
    model, ids = model_of(kind), random_ids(1, 30)
    _, cache = fed(model, ids[:, :20], **({} if kind == "full" else {"slack": 5}))
    for length, left in ((0, 20), (25, 20), (20, 20), (-2, 18), (15, 15)):
        cache.crop(length)
        assert cache.get_seq_length() == left
    close(fed(model, ids[:, 15:], cache)[0], model(ids, use_cache=False).logits[:, 15:])


@pytest.mark.parametrize("kind", ["full", "duo", "duo+"])
def test_drafts_that_are_taken_back_change_nothing(kind):
    """Speculative decoding by hand: bad drafts, good ones and mixed ones, against greedy decoding."""
    model, ids = model_of(kind), random_ids(1, 9)
    plain = model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None)
    draft_length, generator, accepted = 3, torch.Generator().manual_seed(0), []
    _, cache = fed(model, ids[:, :-1], **({} if kind == "full" else {"slack": draft_length}))
    text = ids
    while text.shape[1] < plain.shape[1]:
        draft = plain[:, text.shape[1] :][:, :draft_length].clone()
        wrong = torch.rand(draft.shape, generator=generator) < 0.3
        draft[wrong] = (draft[wrong] + 1) % VOCAB
        chosen = fed(model, torch.cat([text[:, -1:], draft], 1), cache)[0].argmax(-1)
        matches = int((draft == chosen[:, :-1]).long().cumprod(1).sum())
        accepted.append(matches)
        text = torch.cat([text, chosen[:, : matches + 1]], 1)
        cache.crop(matches - draft.shape[1])
        assert cache.get_seq_length() == text.shape[1] - 1
    assert torch.equal(text[:, : plain.shape[1]], plain) and {0, draft_length} < set(accepted)


@pytest.mark.parametrize("kind", ["full", "duo", "duo+"])
@pytest.mark.parametrize("guesser", ["prompt", "stranger", "itself"])
def test_assisted_decoding_is_plain_decoding(kind, guesser):
    """Guesses of which all, some or none are right: the cache is that of the model, with room to go back."""
    model, ids = model_of(kind), random_ids(1, 20).repeat(1, 2)
    plain = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    helpers = {"prompt": {"prompt_lookup_num_tokens": 3}, "itself": {"assistant_model": model}}
    stranger = kvtrain.retrofit(make_host(heads=4, kv_heads=2, layers=3, seed=5), kvtrain.Full())
    assisted = model.generate(ids, **plain, **helpers.get(guesser, {"assistant_model": stranger}))
    assert torch.equal(assisted, model.generate(ids, **plain))


def test_numbers_that_mean_nothing_are_refused():
    _, cache = fed(model_of("full"), random_ids(2, 8))
    for tokens, message in (
        (-1, "cropped by -1"),
        (9, r"seen \[8, 8\] tokens cannot be rolled back or cropped by 9"),
        (torch.tensor([1, 2, 3]), "one for each of 2 rows"),
        (torch.tensor([0.5, 1.0]), "one for each of 2 rows"),
        (torch.tensor([9, 0]), r"cropped by tensor\(\[9, 0"),
        (torch.tensor([3, -1]), r"cropped by tensor\(\[ 3, -1"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.rollback(tokens)
    cache.join(fed(model_of("full"), random_ids(1, 3))[1])
    with pytest.raises(ValueError, match=r"seen \[8, 8, 3\] tokens"):
        cache.rollback(4)
    with pytest.raises(ValueError, match="cropped by 5"):
        model_of("full").make_cache().crop(-5)
    with pytest.raises(ValueError, match="0 or more, not -1"):
        model_of("duo").make_cache(slack=-1)
    with pytest.raises(ValueError, match="no option 'slacks'"):
        model_of("duo").make_cache(slacks=1)


@pytest.mark.parametrize(("mine", "theirs"), [(0, 2), (2, 0), (2, 3)])
def test_rows_of_another_slack_cannot_join(mine, theirs):
    model, ids = model_of("duo"), random_ids(2, 20)
    (_, cache), (_, other) = (fed(model, ids[:1, :12], slack=slack) for slack in (mine, theirs))
    with pytest.raises(ValueError, match="same model and options"):
        cache.join(other)
    assert cache.num_rows == 1
    close(fed(model, ids[:1, 12:], cache)[0], model(ids[:1], use_cache=False).logits[:, 12:])


@pytest.mark.parametrize("method", [name for name in CACHES if name.split("_")[0] in ("dmc", "lckv", "transnormer")])
def test_caches_that_merge_or_share_refuse_and_stay(method):
    model = CACHES[method].retrofit(make_host(layers=CACHES[method].layers))
    ids = random_ids(2, 20)
    _, cache = fed(model, ids[:, :12])
    for take_back in (lambda: cache.rollback(1), lambda: cache.crop(-1), lambda: cache.crop(11)):
        with pytest.raises(ValueError, match="use snapshot_row and restore_row"):
            take_back()
    cache.crop(0)
    close(fed(model, ids[:, 12:], cache)[0], model(ids, use_cache=False).logits[:, 12:])
