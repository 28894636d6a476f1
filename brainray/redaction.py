"""Removes passwords, tokens and keys from text that is logged or saved."""

import re
import shlex
import sys

HIDDEN = "***"

# Matches user:password@, also with an @ in the password or else a slash or a quote (no client takes
# both unescaped), but not host:port/path@...
_USER_INFO = re.compile(r"(?<=://)(?:[^/\s'\"]*|[^/@\s:'\"]+:(?!\d{1,5}(?:/|$))[^@\s]*)(?=@)")
_QUERY = re.compile(
    r"(?i)\b((?:[a-z0-9_.-]*?(?:password|passwd|pwd|secret|token|signature|credential|access_key|"
    r"api_?key))[a-z0-9_-]*|(?<=[?&])sig)=([^&\s'\",;)]+)"
)
_HEADER = re.compile(
    r"(?i)\b(bearer|authorization['\"]?\s*[:=]\s*['\"]?basic)\s+[a-z0-9+/=._~-]{8,}"
)


def command_line() -> str:
    """The command line of this process without secrets; undecodable bytes are escaped."""
    called = redacted(shlex.join(sys.argv))
    return called.encode(errors="backslashreplace").decode()


def redacted(text: str) -> str:
    """The text with ``***`` in place of user and password in URLs, values of secret keys, and
    tokens.
    """
    text = _USER_INFO.sub(HIDDEN, text)
    text = _QUERY.sub(rf"\1={HIDDEN}", text)
    return _HEADER.sub(rf"\1 {HIDDEN}", text)
