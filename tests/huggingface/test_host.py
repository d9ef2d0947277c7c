import unittest

from tests.huggingface.suites import Suite


class TestHost(Suite, unittest.TestCase):
    subject = "host"
