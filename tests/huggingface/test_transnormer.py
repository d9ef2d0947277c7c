import unittest

from tests.huggingface.suites import Suite


class TestTransnormer(Suite, unittest.TestCase):
    subject = "transnormer"
