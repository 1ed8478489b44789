"""`catalog.yaml`: which stores there are, what they hold and where they are. Names are aliases; digests are identities.

catalog.yaml (valid Intake v2) ─▶ document (limits) ─▶ entry (schema) ─▶ Catalog: list, search, find, nested
                                                                          edit_catalog: add, remove
"""
