import unittest

from tests.huggingface.suites import Suite


class TestDmc(Suite, unittest.TestCase):
    subject = "dmc"
