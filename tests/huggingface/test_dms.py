import unittest

from tests.huggingface.suites import Suite


class TestDMS(Suite, unittest.TestCase):
    subject = "dms"
