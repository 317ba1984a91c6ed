# SPDX-License-Identifier: Apache-2.0
"""What addresses of servers may be: they are printed and written down, so they hold no key."""

from urllib.parse import urlsplit


def check_url(name: str, url: str | None) -> None:
    """Raises ValueError with the `name` of where a url was given if it is none of a server.

    The url itself is not repeated: what is wrong may be that it holds a key.
    """
    if url is not None and not is_plain(url):
        raise ValueError(f"{name}: expected http(s)://host/path without a key in it")


def is_plain(url: str) -> bool:
    """Whether a server's address is one, and holds no user, password, query or fragment."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # either may be none
    except ValueError:
        return False
    more = "@" in parts.netloc or parts.query or parts.fragment
    printable = url.isprintable() and " " not in url
    return parts.scheme in ("http", "https") and bool(host) and printable and not more
