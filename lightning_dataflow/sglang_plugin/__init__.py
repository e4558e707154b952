"""Turns a stock SGLang server into a capture server.

`hook` runs inside the server, loaded through SGLang's plugin group. `wire` holds the messages between server and clients,
and imports the standard library only. Nothing here imports lightning, hydra or transformers.
"""
