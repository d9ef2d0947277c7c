"""``python -m kvtrain`` is ``kvtrain``."""

from kvtrain.cli import main

raise SystemExit(main())
