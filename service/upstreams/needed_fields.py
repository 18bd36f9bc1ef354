"""The part of a document from which reports are made. A document that is too large or too deep for
the parser becomes one that is not.
"""

import re
from itertools import islice

FIELDS = frozenset(
    b"id task_id status progress error code message type param task_info can_cancel estimated_time"
    b" usage billing_rule user_group credits_reserved credits_used billing refunded_credits"
    b" results result_data result result_urls result_url output_url file_url"
    b" url image_url images image urls data task output uri link download_url"
    b" b64_json base64".split()
)
LEVELS = 32  # of lists and objects. Links and figures have fewer around them
LONG = 128 << 10  # bytes of a text. A link has fewer, with all of its characters escaped
TOKENS = 1 << 19  # texts and rows of brackets, which take 0.3 s
TOKEN = re.compile(rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)"?(\s*+:)?+|[\[{]++|[\]}]++', re.DOTALL)


def needed_part(body: bytes | bytearray) -> bytes:
    """The first object of the body without other fields than `FIELDS`, without lists and objects
    below `LEVELS`, and without long texts. A body that cannot be read so far comes back as it is.
    """
    kept: list[bytes | bytearray] = []
    depth, start = 0, 0
    left_out: int | None = None  # the level of a field or a value that is left out
    for token in islice(TOKEN.finditer(body), TOKENS):
        mark = token[0][:1]
        if mark == b'"':
            name = token[1] if token[2] and depth <= LEVELS else None
            needed = name is not None and (name in FIELDS or name.isdigit())
            if name is not None and not needed and left_out is None:
                kept.append(body[start : token.start()])
                left_out = depth
            elif needed and left_out == depth:
                start, left_out = token.start(), None
            elif left_out is None and len(token[0]) > LONG:
                kept.append(body[start : token.start()] + b'""')
                start = token.end()
        elif mark in b"[{":
            if left_out is None and depth + len(token[0]) > LEVELS:
                kept.append(body[start : token.start() + LEVELS - depth] + b"null")
                left_out = LEVELS + 1
            depth += len(token[0])
        else:
            if left_out is not None and depth >= left_out > depth - len(token[0]):
                within = left_out > LEVELS
                kept.append(b"" if within else b'"":0')
                start, left_out = token.start() + depth - left_out + within, None
            depth -= len(token[0])
            if depth <= 0:
                return b"".join([*kept, body[start : token.end() + depth]])
    return bytes(body)
