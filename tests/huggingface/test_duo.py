import unittest

from tests.huggingface.suites import Suite


class TestDuo(Suite, unittest.TestCase):
    subject = "duo"
