"""All outgoing HTTP requests: one guarded client per purpose, over httpx's aiohttp transport.

The client checks the text of a URL (scheme, host list, port, literal address), then every address
that its host name has. It checks each redirect like a first request. The transport's resolver is
the guard itself. A connection therefore goes to a checked address, without a second look-up. The
transports run without `httpx.AsyncClient`. It would keep cookies, prepare redirects and read a
proxy or netrc from the environment, and a proxy resolves names itself, behind the guard's back.
"""
