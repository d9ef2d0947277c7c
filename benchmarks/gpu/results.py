"""The file of results: lines are on the disk as soon as they are known."""

import datetime
import re
from pathlib import Path

DONE = "-- {name}: done"


class Results:
    """One file, to which lines are added.

    Args:
        path: The file.

    Attributes:
        trouble: Lines of this run that report a failure.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.trouble = path, 0

    @classmethod
    def open(cls, folder: Path, kind: str, *, resume: bool) -> "Results":
        """A new file of today, or the newest one of its kind.

        Args:
            folder: Where results lie.
            kind: ``gpu`` or ``gpu-cpu``; behind the date in the name.
            resume: Go on with a file that is there.

        Raises:
            ValueError: There is none to go on with.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if resume:
            found = [path for path in folder.glob("*.txt") if re.fullmatch(rf"[\d-]+-{kind}(-\d+)?\.txt", path.name)]
            if not found:
                raise ValueError(f"{folder} holds no results to go on with; leave out --resume")
            return cls(max(found, key=lambda path: path.stat().st_mtime))
        stem, number = f"{datetime.date.today().isoformat()}-{kind}", 1
        while (path := folder / (f"{stem}.txt" if number == 1 else f"{stem}-{number}.txt")).exists():
            number += 1
        return cls(path)

    def write(self, line: str) -> None:
        """Add a line, and show it."""
        self.trouble += line.startswith(("  failed: ", "  error: ")) or ": error: " in line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        print(line, flush=True)

    def is_done(self, name: str) -> bool:
        """Whether a section ran to its end in this file."""
        if not self.path.exists():
            return False
        return any(
            line.startswith(DONE.format(name=name)) for line in self.path.read_text(encoding="utf-8").split("\n")
        )
