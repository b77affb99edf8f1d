"""Tests. A package, so that a helper has one name: `from tests.helpers import build`."""
