import unittest

from tests.huggingface.suites import Suite


class TestHybrid(Suite, unittest.TestCase):
    subject = "hybrid"
