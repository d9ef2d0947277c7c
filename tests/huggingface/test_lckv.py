import unittest

from tests.huggingface.suites import Suite


class TestLckv(Suite, unittest.TestCase):
    subject = "lckv"
