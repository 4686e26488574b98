"""The saved models of these tests."""

from saved_models import hub_layout, inputs, processor, source

__all__ = ["hub_layout", "inputs", "processor", "source"]
