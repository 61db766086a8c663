"""What a recipe will do, before it does anything: the plan with tokens, parameters, memory and disk.

Reads configs that are on this machine already; a model that is not is named as unknown, never downloaded.
"""

from distill.forecast.describe_plan import describe

__all__ = ["describe"]
