"""A cache's rows in plain Python: pages, a state a row, a share of the tokens kept; and what each row was fed."""

from dataclasses import dataclass, field

from kvtrain.cache.budget import CacheFullError

PAGE = 4  # slots, a byte each


@dataclass(eq=False)
class FakeRow:
    tokens: list[int] = field(default_factory=list)
    kept: int = 0

    def pages(self, more=0):
        return -(-(self.kept + more) // PAGE)


@dataclass(frozen=True)
class FakeSnapshot:
    tokens: tuple[int, ...]
    kept: int

    def num_bytes(self):
        return self.kept


class FakePool:
    """Keeps every token whose number is not divisible by ``merge``; an empty row holds ``state`` bytes."""

    cuts_prompts = False

    def __init__(self, budget, merge=0, state=1):
        self.budget, self.merge, self.state = budget, merge, state
        self.rows, self.empty = [], []

    def held_bytes(self):
        return sum(map(self._size, self.rows))

    def _size(self, row):
        return self.state + PAGE * row.pages()

    def _require(self, more):
        if self.held_bytes() + more > self.budget:
            raise CacheFullError("full")

    def take(self):
        if not self.empty:
            self._require(self.state)
            self.rows.append(FakeRow())
            return self.rows[-1]
        return self.empty.pop()

    def release(self, row):
        assert row in self.rows and row not in self.empty
        row.tokens, row.kept = [], 0
        self.empty.append(row)

    def trim(self):
        self.rows = [row for row in self.rows if row not in self.empty]
        trimmed, self.empty = bool(self.empty), []
        return trimmed

    def copy(self, source):
        return self.restore(self.snapshot(source))

    def rollback(self, row, tokens):
        assert 0 < tokens <= len(row.tokens)
        del row.tokens[-tokens:]
        row.kept = self._kept(row.tokens)

    def snapshot(self, row):
        return FakeSnapshot(tuple(row.tokens), row.kept)

    def restore(self, snapshot):
        row = self.take()
        if self.held_bytes() + PAGE * -(-snapshot.kept // PAGE) > self.budget:
            self.empty.append(row)
            raise CacheFullError("full")
        row.tokens, row.kept = list(snapshot.tokens), snapshot.kept
        return row

    def row_bytes(self, rows):
        return [self._size(row) for row in rows]

    def bytes_for(self, rows, tokens):
        return sum(PAGE * (row.pages(tokens) - row.pages()) for row in rows)

    def feed(self, row, tokens):
        """A forward pass: checked beforehand, as the cache's is."""
        row.tokens += tokens
        row.kept = self._kept(row.tokens)

    def _kept(self, tokens):
        return sum(1 for number in range(len(tokens)) if not self.merge or number % self.merge)
