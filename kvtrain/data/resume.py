"""Which data a place in a loader belongs to: the same number means other rows elsewhere."""

import logging

# What batches depend on beside their place, such as the corpus, the length of its rows and the seed.
Identity = dict[str, str | int]
logger = logging.getLogger("kvtrain")


def check_identity(saved: Identity | None, current: Identity, strict: bool) -> None:
    """Compare a loader's data with that of the checkpoint that it resumes from.

    Args:
        saved: What the checkpoint says; those of version 0.1 say nothing.
        current: The loader's.
        strict: Whether other data is refused.

    Raises:
        ValueError: It is other data.
    """
    if saved is None:
        logger.warning("the checkpoint does not say what data it was trained on; going on with the recipe's, unchecked")
        return
    changed = [
        f"{name} was {saved.get(name)}, is {value}" for name, value in current.items() if saved.get(name) != value
    ]
    if changed and strict:
        raise ValueError(
            f"the data has changed since the checkpoint ({'; '.join(changed)}); restore it, or go on with the new "
            "one by --data.strict_resume false"
        )
    if changed:
        logger.warning("the data has changed since the checkpoint (%s); going on in another order", "; ".join(changed))
