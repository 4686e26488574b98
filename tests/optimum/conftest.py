"""The saved models of these tests."""

from saved_models import processor, source

__all__ = ["processor", "source"]
