import unittest

from tests.huggingface.suites import Suite


class TestFull(Suite, unittest.TestCase):
    subject = "full"
