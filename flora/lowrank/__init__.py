"""How low rank is built: targets, activation statistics, nested factors, supernet, compact model."""
