"""All outgoing HTTP requests: one guarded client per purpose, over aiohttp.

The client checks the text of a URL (scheme, host list, port, literal address), then every address
that its host name has. It checks each redirect like a first request. The session's resolver is the
guard itself. A connection therefore goes to a checked address, without a second look-up. The
sessions keep no cookies and read no proxy or netrc from the environment: a proxy resolves names
itself, behind the guard's back.
"""
