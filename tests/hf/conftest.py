"""The saved models of these tests."""

from saved_models import ask, hub_layout, inputs, kinds, processor, saved, source

__all__ = ["ask", "hub_layout", "inputs", "kinds", "processor", "saved", "source"]
