"""Where the objects of a store lie: a local directory or any fsspec URL, behind one small interface.

An object is written once, and appears whole or not at all.
"""

from tubelet_store.objects.local import LocalRoot, link_or_copy, synchronise
from tubelet_store.objects.place import open_root
from tubelet_store.objects.remote import RemoteRoot
from tubelet_store.objects.root import ObjectRoot

__all__ = ["LocalRoot", "ObjectRoot", "RemoteRoot", "link_or_copy", "open_root", "synchronise"]
