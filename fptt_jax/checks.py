"""Refusing static values that mean nothing, with what was got and what was expected."""

import math
import sys
from typing import Any

TINY, HUGE = math.ulp(0.0), sys.float_info.max
"""The least number above 0 and the greatest finite one."""


def check_number(name: str, value: Any, low: float, high: float, expected: str) -> float:
  """`value` as a float; a ValueError that names it if it is no number or outside its range (NaN is)."""
  try:
    number = math.nan if isinstance(value, str | bytes) else float(value)
  except (TypeError, ValueError):
    number = math.nan
  if not low <= number <= high:
    raise ValueError(f'{name} must be {expected}, got {value!r}.')
  return number


def check_integer(name: str, value: Any, low: int, high: float, expected: str) -> int:
  """`value` as an int; a ValueError that names it if it is no whole number or outside its range."""
  number = check_number(name, value, low, high, expected)
  if number != int(number):
    raise ValueError(f'{name} must be {expected}, got {value!r}.')
  return int(number)
