"""Where the objects of a store lie: a local directory or any fsspec URL, behind one small interface.

An object is written once, and appears whole or not at all.

Reading objects over a network: one small interface, two clients behind it, the same retries around all of them.

    read / read_range / size / list_keys ─▶ one attempt by the client ─▶ passing fault? wait (doubling, jittered), again
                                                                     └▶ anything else: one clear error, named by key

`FsspecTransport` works for every fsspec URL. `ObstoreTransport` reads `s3://` where obstore is installed, at twice the
speed of s3fs and half its processor time (benchmarks/results/remote.txt; plain sockets signed by botocore were not
faster). Clients are built where they are first used, one per process, and neither they nor any credentials are ever
pickled: what travels is the URL. After a fork a process builds its own; obstore's runtime does not survive a fork, so a
forked child of a process that used it reads through fsspec.
"""
