"""Model → sites: discovery, certification, costs. The only place that may know a module's name."""

from lamina.anatomy.anatomy import Anatomy
from lamina.anatomy.parts import Block, Branch, Certificate, Stack

__all__ = ["Anatomy", "Block", "Branch", "Certificate", "Stack"]
