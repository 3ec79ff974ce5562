"""JSON as the standard means it, for lines that somebody else wrote. Python's own reader is more lenient."""

from __future__ import annotations

import json
import math
from typing import Any

from gnomon.base.errors import DataError


class _Refused(Exception):
    """Why a value is refused."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Refused(f"key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
    return found


def _constant(text: str) -> Any:
    raise _Refused(f"{text} is not JSON; write a finite number or a string")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"number {text[:40]} is too large")
    return value


def loads(raw: bytes) -> Any:
    """The value of one line: strict UTF-8, no duplicate keys, no NaN or infinity, no lone surrogates.

    Raises DataError with the reason, on any bytes at all.
    """
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float)
        if b"\\u" in raw:  # only an escape can write a surrogate: the decoder has refused a raw one
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _Refused as error:
        raise DataError(str(error)) from None
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start} of the line)") from None
    except UnicodeEncodeError:
        raise DataError("a lone surrogate escape; write the character itself or a full pair") from None
    except RecursionError:
        raise DataError("nested too deeply") from None
    except ValueError as error:
        raise DataError(f"not JSON: {str(error)[:120]}") from None
    return value
