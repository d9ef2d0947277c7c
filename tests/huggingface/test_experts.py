import unittest

from tests.huggingface.suites import Suite


class TestExperts(Suite, unittest.TestCase):
    subject = "experts"
