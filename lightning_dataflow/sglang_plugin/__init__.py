"""What turns a stock SGLang server into a capture server, and what it and its clients say to each other.

`hook` runs inside the server, loaded through SGLang's plugin group; `wire` is shared with the clients and imports the
standard library only. Nothing here imports lightning, hydra or transformers.
"""
