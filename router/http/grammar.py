"""The grammar of a request's head (RFC 9112, sections 2 to 5), as regular expressions over bytes.

They take exactly what the RFC allows. Repetitions give nothing back once they have matched (`*+`), so that a
head costs time in proportion to its length, whatever stands in it.
"""

from __future__ import annotations

import re

TOKEN_CHARACTER = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
TOKEN = rb"%b++" % TOKEN_CHARACTER.encode()
TEXT = rb"[\t\x20-\x7e\x80-\xff]"  # what a value is made of: no control characters, and so no line breaks
_FIELD = rb"%b:%b*+" % (TOKEN, TEXT)
FIELD_LINE = re.compile(_FIELD)

# Method, target, minor version, header lines.
HEAD = re.compile(rb"(%b) ([\x21-\x7e]++) HTTP/1\.([0-9])\r\n((?:%b\r\n)*+)\r\n" % (TOKEN, _FIELD))
REQUEST_LINE = re.compile(rb"%b ([^ ]++) HTTP/([0-9])\.[0-9]" % TOKEN)
# What no head holds: control characters and lone halves of line breaks (the last byte may become a whole).
FORBIDDEN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?=[^\n])|(?<!\r)\n")
BLANK_LINES = re.compile(rb"(?:\r\n)*+")
_HOST = r"[0-9A-Za-z\-._~%!$&'()*+,;=:\[\]]"
HOST = re.compile(rb"%b*+" % _HOST.encode())
# Path and query of a target that names scheme and host.
ABSOLUTE_FORM = re.compile(rf"https?://{_HOST}++(/[^?#]*+)?(\?[^#]*+)?", re.IGNORECASE)
