"""Modules of the package that need a client that is not installed here are left out of the doctests."""

import importlib.util

NEEDS = {
    "python/rgd/integrations/trl.py": "trl",
    "python/rgd/integrations/transformers.py": "transformers",
    "python/rgd/integrations/lightning.py": "lightning",
    "python/rgd/sklearn.py": "sklearn",
}
collect_ignore = [path for path, client in NEEDS.items() if importlib.util.find_spec(client) is None]
