"""``python -m kvtrain`` is ``kvtrain``."""

from kvtrain_cli import main

raise SystemExit(main())
