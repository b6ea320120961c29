"""Where the tables of `tabular.py` and `trees.py` come from: KEEL, and OpenML."""
