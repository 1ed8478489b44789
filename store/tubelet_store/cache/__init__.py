"""A local cache of remote shards: what is mapped here has the bytes that the manifest says, or it is an error.

    open(object) ─▶ objects/<sha256> there? ─▶ open file, shared lock ─▶ memory map
                        │ no
                        ▼
    claim (lock on partial/<sha256>) ─▶ room (evict, reserve) ─▶ parts in parallel, each checked ─▶ rename into objects/

The directory is the whole state, and every process of a node may share it, whatever stores and jobs they work on:

* Files are named by the digest of their content, so versions of a store share what is equal and never mix.
* A reader holds a shared lock on the file it maps. The memory map keeps the file open, so the lock lasts exactly as
  long as the map and ends with the process, however that ends. Whoever evicts takes an exclusive lock first: a file in
  use stays. Eviction is by unlink, files are never written again.
* One process at a time downloads an object: the one with the lock on its partial file. Of a download that was cut off
  the parts that arrived are kept, and checked again before they count.
* Room is decided under one lock for the directory, and reserved by allocating the partial file whole: the files never
  exceed the budget. Several jobs with several budgets each keep their own when they fetch.
* Nothing waits for the disk (that took a third of the time). A power cut may therefore lose bytes that were written:
  whoever comes first after the machine was started again moves every object back among the partial ones, so that each
  is checked before it counts, and what was lost is fetched.

Locks are released by name (LOCK_UN), not only by closing: a child forked meanwhile holds the same open file.
"""
