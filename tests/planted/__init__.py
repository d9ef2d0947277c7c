"""An architecture as CONTRIBUTING tells how to write one, in files of its own: attention sinks and a sliding window.

``tests/models/test_planted_method.py`` puts ``models`` and ``training`` beside kvtrain's own folders of these names.
"""
