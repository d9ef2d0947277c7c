"""An architecture as ``docs/add_architecture.md`` tells, in files of its own: attention sinks and a sliding window.

``tests/models/test_planted_method.py`` puts ``models`` and ``training`` beside kvtrain's own folders of these names.
"""
