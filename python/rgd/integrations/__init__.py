"""RGD where people train: one module a trainer, each imported only by who asks for it."""
